"""What a large ranking tells of its entries is made when it is looked at, and is no different."""

import pickle

import numpy as np
import pytest
import tiny
from test_query import LABELS, bits_of
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it
from xarray.core import indexing

import replay
from replay import asking, results

SAMPLES = ("step", "position")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("results") / "run")


@pytest.fixture
def late(monkeypatch):
    """Make every column late, and return where lookups in the log are counted."""
    lookups, look = [], asking._samples_at
    monkeypatch.setattr(results, "LATE", 0)
    monkeypatch.setattr(asking, "_samples_at", lambda *x: lookups.append(x[1].size) or look(*x))
    return lookups


def rankings(run):
    # Of 16 samples, so that the last ranks are nobody's.
    first = abs(run.sample_grads["hidden", 1:].sel(step=slice(5, 9))).top_k(20, SAMPLES)
    return (
        first,
        first.sel(rank=3),
        run.sample_grads["out"].groupby(LABELS).sum().top_k(2, "group"),
        run.grads["hidden", 1:, ::2].top_k(4),
    )


def is_late(variable):
    return isinstance(variable._data, indexing.MemoryCachedArray)


def test_the_columns_of_a_ranking_are_the_same_made_at_once_and_when_looked_at(run, late):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "LATE", 2**16)
        eager = replay.compute(*rankings(run), cache=False)
    found = replay.compute(*rankings(run), cache=False)
    late_ones = 0
    for one, other in zip(eager, found, strict=True):
        assert not any(map(is_late, one.variables.values()))
        late_ones += sum(map(is_late, other.variables.values()))
        assert bits_of(one) == bits_of(other) == bits_of(pickle.loads(pickle.dumps(other)))
        assert one.identical(other.copy(deep=True))
    assert late_ones == 3 + 3 + 1 + 1


def test_a_late_column_is_made_where_it_is_looked_at_and_needs_no_log(run, late):
    found = abs(run.sample_grads).top_k(20, SAMPLES).compute(cache=False)
    assert late == [tiny.STEPS * tiny.BATCH]  # all ids at once, for both tensors
    names = ["hidden.step", "hidden.position", "hidden.sample"]
    assert all(is_late(found.variables[name]) for name in names)
    step, position, sample = (found[name][:, 2, 3].values for name in names)
    assert sample.tolist() == run.log.ids(0, tiny.STEPS)[step, position].tolist()
    assert (step.dtype.name, position.dtype.name, sample.dtype.name) == ("int32", "int64", "int32")
    assert found["hidden.sample"].values[:, 2, 3].tolist() == sample.tolist()
    twice = [found["hidden.sample"].values for _ in range(2)]
    assert np.shares_memory(*twice)  # made once
    assert len(late) == 1


def test_ids_are_looked_up_for_the_entries_where_those_are_fewer(run, late):
    found = abs(run.sample_grads["out"]).top_k(2, SAMPLES).compute(cache=False)
    assert late == [found["out.sample"].size] == [10]
    assert not is_late(found.variables["out.sample"])


def test_a_ranking_over_no_steps_is_nobodys(run, late):
    none = run.sample_grads.sel(step=slice(2, 2)).top_k(2, SAMPLES).compute(cache=False)
    assert (none["hidden.sample"].values == -1).all()
