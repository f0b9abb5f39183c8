import pytest

from replay.checkpoints import Checkpoints, Schedule
from replay.errors import LogError


def stored(policy, steps, *, planned=True, state_bytes=100, seconds=0.0, busy=0.0, size=1):
    """The states that a policy keeps of a run whose stretches take so many seconds."""
    schedule = Schedule(policy, steps=steps if planned else None, state_bytes=state_bytes)
    kept = {0}
    schedule.give_up(0)
    for count, state in enumerate(range(size, steps + 1, size), 1):
        if schedule.due(state, busy=count * busy, wall=count * seconds):
            kept = (kept | {state}) - set(schedule.give_up(state))
    return sorted(kept)


def test_every_so_many_steps():
    assert stored(Checkpoints(every=4), 10) == [0, 4, 8]


def test_every_so_many_seconds_of_the_clock():
    assert stored(Checkpoints(seconds=3), 10, seconds=1.0) == [0, 3, 6, 9]


def test_so_that_replaying_takes_at_most_so_long():
    assert stored(Checkpoints(reach=2), 10, seconds=100.0, busy=0.5) == [0, 4, 8]


def test_a_budget_spreads_evenly_over_a_known_length():
    assert stored(Checkpoints(budget=500), 100) == [0, 25, 50, 75, 100]


def test_a_budget_doubles_its_spacing_where_the_length_is_not_known():
    for steps in (1, 7, 64, 1000):
        kept = stored(Checkpoints(budget=500), steps, planned=False)
        assert len(kept) <= 5
        spacing = kept[1] - kept[0]
        assert kept == list(range(0, kept[-1] + 1, spacing))
        assert steps - kept[-1] < 2 * spacing


def test_a_tiny_budget_keeps_the_ends():
    assert stored(Checkpoints(budget=1), 10) == [0, 10]


def test_a_number_is_a_number_of_steps_and_nothing_makes_twenty_segments():
    assert Checkpoints.of(7, 100) == Checkpoints(every=7)
    assert Checkpoints.of(None, 1000) == Checkpoints(every=50)
    assert Checkpoints.of(None, None) == Checkpoints(every=1000)
    assert Checkpoints.of(Checkpoints(reach=1), 5) == Checkpoints(reach=1)


@pytest.mark.parametrize("wrong", [{}, {"every": 1, "seconds": 1}, {"every": 0}, {"reach": -1.0}])
def test_a_policy_is_one_rule_with_one_positive_number(wrong):
    with pytest.raises(LogError, match="checkpoints are to be stored by") as caught:
        Checkpoints(**wrong)
    assert "replay.Checkpoints(every=500)" in caught.value.fix
