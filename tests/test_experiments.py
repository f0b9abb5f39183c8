"""That experiments still run to their end, by their quick settings, which write nothing."""

import sys

import pytest

from experiments import explode, leave_one_out, reorder, to_zero


@pytest.mark.parametrize(
    "experiment",
    [
        leave_one_out,
        *(pytest.param(x, marks=pytest.mark.full) for x in (to_zero, explode, reorder)),
    ],
    ids=lambda experiment: experiment.__name__.rpartition(".")[2],
)
def test_an_experiment_runs_to_its_end_and_writes_nothing(experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["experiment", "--quick"])
    monkeypatch.setattr(experiment, "RESULT", tmp_path / "result.json")
    experiment.main()
    assert list(tmp_path.iterdir()) == []
