"""What an edit promises: it changes what it names, and what cannot be meant is refused."""

import doctest
import itertools

import jax
import numpy as np
import optax
import pytest

import replay.edits
from replay.edits import Edit, all_orders, leave_one_out, leave_out, leave_some_out
from replay.errors import DataError, OrderError
from replay.order import Order

ORDER = Order.sequential(2, epochs=2, pad=True).bind(5)  # steps 0-2 and 3-5, each [01][23][4-]
ONES = np.ones(5, np.float32)


def test_examples_in_docstrings_run():
    results = doctest.testmod(replay.edits)
    assert results.failed == 0 and results.attempted >= 3


# --------------------------------------------------------------------------------------- order


def test_a_function_is_given_an_order_whose_edits_begin_at_the_fork():
    after = Edit(order=lambda order: order.drop([1, 3])).order_after(ORDER, 2)
    assert after[:].tolist() == [[0, 1], [2, 3], [4, -1], [0, 2], [4, -1]]
    with pytest.raises(OrderError, match=r"step \[1\] comes before step 2"):
        Edit(order=lambda order: order.swap(1, 4)).order_after(ORDER, 2)


def test_an_order_that_is_given_whole_is_bound_to_the_data_of_the_run():
    whole = Order.explicit([[0, 1], [4, 4], [3, 3]])
    assert Edit(order=whole).order_after(ORDER, 1)[:].tolist() == [[0, 1], [4, 4], [3, 3]]
    assert Edit().order_after(ORDER, 3) is ORDER


def test_an_order_that_differs_before_the_fork_is_refused_with_the_step():
    with pytest.raises(OrderError, match="differs at step 1, before step 2") as caught:
        Edit(order=ORDER.swap(1, 3)).order_after(ORDER, 2)
    assert caught.value.fix.startswith("at=1, or edit only what comes later")
    with pytest.raises(OrderError, match="differs at step 2"):  # by a weight alone
        Edit(order=ORDER.drop([4], refill=False)).order_after(ORDER, 3)
    long = Order.shuffled(1, 1, 0).bind(3000)
    with pytest.raises(OrderError, match="differs at step 2100"):
        Edit(order=long.swap(2100, 2200)).order_after(long, 2500)
    assert Edit(order=long.swap(2100, 2200)).order_after(long, 2100)[2100] == long[2200]


@pytest.mark.parametrize(
    ("order", "at", "message"),
    [
        (Order.sequential(1), 0, "batches of 1, the run of 2"),
        (lambda order: order.drop([1]), 5, "no batch from step 5 on has samples"),
        (lambda order: order.drop([4]), 5, "has 5 steps, the fork begins at step 5"),
        (ORDER.drop([4]), 4, "the order has 4 steps, the fork begins at step 4"),
        (lambda order: order, 6, "the order has 6 steps, the fork begins at step 6"),
        (lambda order: order, 7, "since: there is no step 7"),
        (lambda order: None, 2, "returned a NoneType"),
        (ORDER.drop([4]).bind, 0, "cannot be bound"),
        (Order.sequential(2, pad=True).bind(4), 0, "cannot be bound to 5 samples"),
    ],
)
def test_orders_that_no_fork_can_take_are_refused(order, at, message):
    with pytest.raises(OrderError, match=message) as caught:
        Edit(order=order).order_after(ORDER, at)
    assert caught.value.why and caught.value.fix


# ------------------------------------------------------------------------------------- factors


def test_factors_of_some_samples_leave_the_others():
    before = np.array([1, 0.5, 1, 0, 1], np.float32)
    after = Edit(sample_weights={3: 2, np.int64(0): 0.25}).factors(before)
    assert after.tolist() == [0.25, 0.5, 1, 2, 1]
    assert after.dtype == np.float32
    assert before.tolist() == [1, 0.5, 1, 0, 1]
    assert Edit(sample_weights={}).factors(before).tolist() == before.tolist()
    assert Edit().factors(before) is before


def test_factors_of_all_samples_take_the_place_of_those_before():
    given = np.array([0, 1, 2, 3, -1.0])
    after = Edit(sample_weights=given).factors(ONES)
    given[:] = 9
    assert after.tolist() == [0, 1, 2, 3, -1] and after.dtype == np.float32
    assert Edit(sample_weights=jax.numpy.arange(5)).factors(ONES).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({5: 0.0}, "there is no sample 5\n.*5 samples, 0 to 4"),
        ({-1: 0.0, 1: 0.0}, "there is no sample -1\n"),
        ({"a": 0.0}, "there is no sample 'a'"),
        ({1.0: 0.0}, "there is no sample 1.0"),
        ({True: 0.0}, "there is no sample True"),
        ({(1, 2): 0.0}, r"there is no sample \(1, 2\)"),
        ({0: np.nan}, r"not finite numbers: \[nan\]"),
        ({0: 1e300}, r"not finite numbers: \[1e\+300\]"),
        ({0: "none"}, r"not finite numbers: \['none'\]"),
        ({0: [1, 2], 1: [3]}, "not finite numbers"),
        (np.ones(4), r"has shape \[4\]\n.*each of the 5 samples"),
        (np.ones((5, 1)), r"has shape \[5, 1\]"),
        ([1, 1, np.inf, 1, 1], r"has shape \[5\] and values that are not finite"),
        (["a"] * 5, "values that are not finite"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights, message):
    with pytest.raises(DataError, match=message) as caught:
        Edit(sample_weights=weights).factors(ONES)
    assert caught.value.why and caught.value.fix


# ---------------------------------------------------------------------------------- what it says


def test_an_edit_names_what_it_changes():
    assert Edit().changed == () and str(Edit()) == "no edit"
    edit = Edit(
        order=Order.sequential(2),
        sample_weights={i: 0.5 for i in range(9)},
        optimizer={"learning_rate": 1e-3},
        key=jax.random.key(0),
        params={"w": ONES},
    )
    assert edit.changed == ("order", "sample_weights", "optimizer", "key", "params")
    assert str(edit) == (
        "Order.sequential(batch_size=2, epochs=1)  # unbound; "
        "weights {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5, …}; learning_rate 0.001; key; params"
    )
    whole = Edit(order=lambda order: order, sample_weights=ONES, optimizer=optax.sgd(1.0))
    assert str(whole) == "an order; weights of all samples; optimizer"
    assert str(Edit(sample_weights=ONES, name="as it was")) == "as it was"


# ------------------------------------------------------------------------------------ families


def test_leave_out_gives_samples_the_weight_zero():
    assert leave_out(np.array([4, 1])).factors(ONES).tolist() == [1, 0, 1, 1, 0]
    assert [e.sample_weights for e in leave_one_out([2, 4])] == [{2: 0.0}, {4: 0.0}]
    with pytest.raises(TypeError):
        leave_out([1.5])


def test_leave_some_out_draws_subsets_that_follow_from_the_seed():
    edits = leave_some_out(range(10, 30), 5, count=40, seed=3)
    subsets = [sorted(edit.sample_weights) for edit in edits]
    assert all(len(s) == 5 and set(s) <= set(range(10, 30)) for s in subsets)
    assert len({tuple(s) for s in subsets}) == 40
    philox = np.random.Philox(key=[3, 7])
    drawn = np.random.Generator(philox).choice(np.arange(10, 30), 5, replace=False)
    assert subsets[7] == sorted(drawn.tolist())
    fewer = leave_some_out([*range(29, 9, -1), 12, 12], 5, count=2, seed=3)
    assert [sorted(edit.sample_weights) for edit in fewer] == subsets[:2]
    assert [str(edit) for edit in fewer] == ["without subset 0", "without subset 1"]


@pytest.mark.parametrize(("samples", "k"), [([1, 2], 3), ([1, 1], 2), ([1, 2], 0), ([], 1)])
def test_subsets_that_are_larger_than_the_whole_are_refused(samples, k):
    with pytest.raises(OrderError, match="samples are to be left out"):
        leave_some_out(samples, k, count=1, seed=0)


def test_all_orders_takes_the_batches_of_the_steps_in_each_sequence():
    steps = [4, 1, 2, 5]
    edits = all_orders(steps)
    assert str(edits[0]) == "steps 4, 1, 2, 5"
    taken = list(itertools.permutations(steps))
    assert len(edits) == len(taken) == 24
    for edit, wanted in zip(edits, taken, strict=True):
        after = edit.order_after(ORDER, 1)
        assert [after[t].tolist() for t in steps] == [ORDER[t].tolist() for t in wanted]
        assert after[3].tolist() == [0, 1]


def test_all_orders_of_many_steps_or_of_a_step_twice_are_refused():
    for steps in (range(8), [1, 2, 1], []):
        with pytest.raises(OrderError, match=f"{len(steps)} steps are to be taken in all orders"):
            all_orders(steps)
    assert len(all_orders([3])) == 1
    with pytest.raises(OrderError, match="there is no step"):
        all_orders([4, 9])[1].order_after(ORDER, 0)
