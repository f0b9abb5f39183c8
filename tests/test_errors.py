import pickle

import pytest

import replay
from replay.errors import Grade


def test_an_error_has_three_parts_and_survives_a_process_boundary():
    error = replay.DataError("it broke", why="because", fix="mend it")
    assert str(error) == "it broke\n  why: because\n  fix: mend it"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.what, again.why, again.fix) == (
        replay.DataError,
        "it broke",
        "because",
        "mend it",
    )


def test_every_error_is_a_replay_error():
    names = [name for name in replay.__all__ if name.endswith("Error")]
    assert len(names) == 8
    for name in names:
        assert issubclass(getattr(replay, name), replay.ReplayError)


@pytest.mark.parametrize(
    ("grades", "worst"),
    [
        ([Grade.BITWISE, Grade.BITWISE], Grade.BITWISE),
        ([Grade.BITWISE, Grade.UNAUDITED], Grade.UNAUDITED),
        ([Grade.NUMERIC, Grade.UNAUDITED], Grade.NUMERIC),
        ([Grade.NUMERIC, Grade.FAILED], Grade.FAILED),
    ],
)
def test_a_run_is_as_good_as_its_worst_segment(grades, worst):
    assert grades[0] & grades[1] is grades[1] & grades[0] is worst


def test_a_grade_says_what_to_conclude():
    assert str(Grade.BITWISE) == "BITWISE"
    assert all(len(grade.value) > 20 for grade in Grade)
