import threading
import time
import weakref

import numpy as np
import pytest

from replay.trajectory import Stretch, cuts, prefetch, stage, steps_at_once


def test_steps_are_cut_at_multiples_counted_from_step_zero():
    assert list(cuts(0, 10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(cuts(3, 20, 8, every=10)) == [(3, 8), (8, 10), (10, 16), (16, 20)]
    assert list(cuts(5, 5, 4)) == []


def test_a_stretch_splits_into_views():
    ids = np.arange(8).reshape(4, 2)
    stretch = Stretch(10, 0, 4, ids, None, [ids])
    first, rest = stretch.split(1)
    assert (first.begin, first.size, rest.begin, rest.size) == (10, 1, 11, 3)
    assert rest.ids is ids


def test_few_large_or_many_small_batches_are_staged_together():
    assert steps_at_once(0) == 64
    assert steps_at_once(2**20) == 16
    assert steps_at_once(2**30) == 1


def test_an_error_while_reading_is_raised_where_the_stretch_was_wanted():
    def read(start, stop):
        if start == 4:
            raise ValueError("unreadable")
        return start

    staged = stage(read, cuts(0, 8, 2))
    assert [next(staged), next(staged)] == [0, 2]
    with pytest.raises(ValueError, match="unreadable"):
        next(staged)


def test_closing_ends_the_reading_thread():
    before = threading.active_count()
    staged = stage(lambda a, b: a, cuts(0, 10**9, 1))
    assert next(staged) == 0
    staged.close()
    for thread in threading.enumerate():
        if thread.name == "replay-stage":
            thread.join(timeout=5)
    assert threading.active_count() == before


class Large:
    """Stands for the state of a step."""


def soon(condition):
    """Wait until a condition holds, but not for long; tell whether it does."""
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    return condition()


def test_who_waits_closes_what_makes_the_items_and_holds_none_of_them():
    closed, made, gone = [], [], []

    def items():
        try:
            while True:
                item = Large()
                made.append(weakref.ref(item))
                yield item
                item = None
                if len(made) == 1:
                    gone.append(soon(lambda: made[0]() is None))  # while the next one is made
        finally:
            closed.append(threading.current_thread().name)

    ahead = prefetch(items(), 1, name="replay-test", wait=True)
    item = next(ahead)
    assert item is made[0]()
    item = None
    item = next(ahead)
    assert gone == [True] and item is made[1]()
    assert soon(lambda: len(made) == 4)  # two taken, one ready, one that waits for room
    assert not closed
    ahead.close()
    assert closed == ["replay-test"] and len(made) == 4
    assert not any(thread.name == "replay-test" for thread in threading.enumerate())
    item = None
    assert not any(ref() for ref in made)
