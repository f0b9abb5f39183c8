"""What an order promises: the same batches from anywhere, edits that compose, errors that help."""

import copy
import doctest
import pickle
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import replay.order
from replay.errors import OrderError
from replay.order import Order

TINY = Order.sequential(2, epochs=2, pad=True).bind(5)  # steps 0-2 and 3-5, each [01][23][4-]
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def test_examples_in_docstrings_run():
    results = doctest.testmod(replay.order)
    assert results.failed == 0 and results.attempted >= 8


# --------------------------------------------------------------------------------------- bases


def test_shuffled_is_pinned_to_philox_of_seed_and_epoch():
    order = Order.shuffled(batch_size=4, epochs=2, seed=7).bind(10)
    assert order[:].tolist() == [[6, 3, 9, 1], [2, 0, 5, 7], [1, 9, 2, 8], [5, 0, 4, 3]]
    flat = np.random.Generator(np.random.Philox(key=[7, 1])).permutation(10)
    assert order[2:4].reshape(-1).tolist() == flat[:8].tolist()
    assert order[0].dtype == np.int32


def test_seeds_use_all_64_bits():
    largest = Order.shuffled(8, 1, 2**64 - 1).bind(8)[0].tolist()
    neighbour = Order.shuffled(8, 1, 2**64 - 2).bind(8)[0].tolist()
    assert largest != neighbour  # a key that passed through float64 would make them equal
    with pytest.raises(OrderError, match="seed is 18446744073709551616"):
        Order.shuffled(8, 1, 2**64)


def test_last_short_batch_is_dropped_or_padded_with_weight_zero():
    assert Order.sequential(2).bind(5)[:].tolist() == [[0, 1], [2, 3]]
    ids, weights = Order.sequential(2, pad=True).bind(5).batches(0, 3)
    assert ids.tolist() == [[0, 1], [2, 3], [4, -1]]
    assert weights.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)


def test_padding_makes_one_batch_of_fewer_samples_than_the_batch_size():
    assert Order.sequential(4, pad=True).bind(3)[:].tolist() == [[0, 1, 2, -1]]
    assert sorted(Order.shuffled(4, 1, 0, pad=True).bind(3)[0].tolist()) == [-1, 0, 1, 2]


def test_explicit_takes_every_row_as_a_batch_of_one_epoch():
    order = Order.explicit([[3, 3], [0, 2], [1, 1]]).bind(4)
    assert (len(order), order.epochs, order.batch_size) == (3, 1, 2)
    assert order[1:].tolist() == [[0, 2], [1, 1]]
    assert order.batches(0, 3).weights.tolist() == [[1, 1], [1, 1], [1, 1]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**64 - 1))
@quick
def test_every_padded_epoch_of_shuffled_is_a_permutation(samples, batch, seed):
    order = Order.shuffled(batch, 3, seed, pad=True).bind(samples)
    for epoch in range(3):
        ids = order[order.steps_in(epoch).start : order.steps_in(epoch).stop].reshape(-1)
        assert sorted(ids[ids >= 0].tolist()) == list(range(samples))


# ------------------------------------------------------------------------------------- reading


def test_steps_index_like_numpy():
    assert TINY[-1].tolist() == [4, -1]
    shuffled = Order.shuffled(2, 3, 0).bind(4).swap(0, 5)
    assert shuffled[-1].tolist() == shuffled[5].tolist() == shuffled[:][-1].tolist()
    assert TINY[np.int64(3)].tolist() == [0, 1]
    assert TINY[4:99].tolist() == [[2, 3], [4, -1]]
    assert TINY[::-2].tolist() == [[4, -1], [0, 1], [2, 3]]
    assert TINY[4:2].shape == (0, 2)
    assert [ids.tolist() for ids in TINY] == TINY[:].tolist()


def test_epochs_and_their_steps_are_found_from_either_side():
    assert TINY.epoch([0, 2, 3, 5]).tolist() == [0, 0, 1, 1]
    assert TINY.epoch([[5], [0]]).tolist() == [[1], [0]]
    assert TINY.epoch(4) == 1
    assert TINY.steps_in(1) == range(3, 6)


def test_reading_all_steps_in_pieces_permutes_each_epoch_once(monkeypatch):
    made, permutation = [], replay.order._permutation
    monkeypatch.setattr(
        replay.order, "_permutation", lambda *key: made.append(key) or permutation(*key)
    )
    order = Order.shuffled(2, 3, 5).bind(20)
    for t in range(0, 30, 3):
        order.batches(t, t + 3)
    assert made == [(5, 0, 20), (5, 1, 20), (5, 2, 20)]


def test_what_is_read_may_be_changed_without_changing_the_order():
    for order in (
        TINY,
        Order.shuffled(2, 2, 0).bind(4).reversed(0),
        Order.explicit([[0, 1]]).bind(2),
    ):
        before = order[:].tolist()
        ids, weights = order.batches(0, len(order))
        ids[:], weights[:] = -7, -7
        assert order[:].tolist() == before
        assert (order.batches(0, 1).weights == 1).all()


def test_binding_again_to_the_same_number_changes_nothing():
    assert TINY.bind(5) is TINY
    assert (TINY.samples, Order.sequential(2).samples) == (5, None)


def test_equality_and_hash_follow_the_spec_alone():
    assert Order.sequential(2, epochs=2, pad=True) == TINY
    assert hash(Order.sequential(2, epochs=2, pad=True)) == hash(TINY)
    assert TINY.swap(0, 1) != TINY.swap(1, 0)
    assert TINY.drop([3, 1, 3]) == TINY.drop([1, 3])
    assert TINY.replaced({4: [0, 0], 1: [1, 1]}) == TINY.replaced({1: [1, 1], 4: [0, 0]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda order: pickle.loads(pickle.dumps(order))])
def test_copies_stay_bound(copied):
    order = TINY.swap(0, 1).reversed(1).since(2).drop([3]).shuffled_again(None, 4)
    assert copied(order) == order
    assert copied(order)[:].tolist() == order[:].tolist()
    assert copied(Order.sequential(2)).samples is None


def test_an_order_prints_as_the_code_that_makes_it():
    order = Order.shuffled(batch_size=64, epochs=20, seed=0).swap(3, 7)
    assert repr(order) == "Order.shuffled(batch_size=64, epochs=20, seed=0).swap(3, 7)  # unbound"
    assert repr(TINY.drop([4, 1], refill=False).drop(0).reversed(1).shuffled_again(0, 5)) == (
        "Order.sequential(batch_size=2, epochs=2, pad=True).drop([1, 4], refill=False).drop([0])"
        ".reversed(1).shuffled_again(0, 5)  # 5 samples, 4 steps"
    )
    assert repr(Order.explicit(np.arange(8).reshape(4, 2)).replaced({3: [0, 9]})) == (
        "Order.explicit(batch_size=2, ids=[0, 1, 2, 3, 4, 5, … 8 in all])"
        ".replaced([3], [0, 9])  # unbound"
    )
    curriculum = TINY.since(1).sorted_by([5, 3, 4, 3, 9]).shuffled_again(None, 2).reversed(None)
    assert repr(curriculum.sorted_by([0] * 5, epoch=1, descending=True)) == (
        "Order.sequential(batch_size=2, epochs=2, pad=True).since(1).sorted_by([2, 0, 1, 0, 3])"
        ".shuffled_again(None, 2).reversed(None)"
        ".sorted_by([0, 0, 0, 0, 0], epoch=1, descending=True)  # 5 samples, 6 steps"
    )


def test_checksum_is_the_crc_of_ids_and_weights_step_by_step():
    by_hand = b"".join(
        np.array(ids, "<i4").tobytes() + np.array(weights, "<f4").tobytes()
        for ids, weights in [([0, 1], [1, 1]), ([2, 3], [1, 1]), ([4, -1], [1, 0])] * 2
    )
    assert TINY.checksum() == zlib.crc32(by_hand) == 715606404
    assert Order.shuffled(64, 20, 0).bind(1797).checksum() == 3704919204


def test_checksum_sees_ids_weights_and_sequence_but_not_how_they_were_made():
    order = Order.shuffled(2, 3, 0).bind(6)
    assert Order.explicit(order[:]).bind(6).checksum() == order.checksum()
    assert order.swap(0, 1).swap(0, 1).checksum() == order.checksum()
    edits = [order.swap(0, 1), order.drop([1], refill=False), order.reversed(2)]
    assert len({order.checksum(), *(edit.checksum() for edit in edits)}) == 4


# --------------------------------------------------------------------------------------- edits


def test_swap_exchanges_batches_also_between_epochs():
    assert TINY.swap(2, 3)[:].tolist() == [[0, 1], [2, 3], [0, 1], [4, -1], [2, 3], [4, -1]]
    assert TINY.swap(2, 3).batches(3, 4).weights.tolist() == [[1, 0]]
    assert TINY.swap(0, 1).swap(1, 4)[:].tolist() == [
        *([2, 3], [2, 3], [4, -1], [0, 1], [0, 1], [4, -1])
    ]


def test_drop_closes_up_within_each_epoch():
    order = TINY.drop([0, 3])
    assert order[:].tolist() == [[1, 2], [4, -1], [1, 2], [4, -1]]
    assert order.steps_in(1) == range(2, 4)
    assert Order.sequential(2, epochs=2).bind(5).drop(1)[:].tolist() == [[0, 2], [0, 2]]


def test_drop_leaves_epochs_of_different_length_where_samples_were_moved():
    order = TINY.replaced({0: [4, 4]}).drop([4])
    assert order[:].tolist() == [[2, 3], [0, 1], [2, 3]]
    assert order.epoch([0, 1, 2]).tolist() == [0, 1, 1]
    empty_first = TINY.replaced([[4, 4]] * 3).drop([4])
    assert empty_first.epoch([0, 1]).tolist() == [1, 1]
    assert empty_first.steps_in(0) == range(0, 0)
    assert empty_first.reversed(0)[:].tolist() == [[0, 1], [2, 3]]


def test_drop_in_place_keeps_ids_and_takes_the_weight():
    order = TINY.drop([1, 2], refill=False)
    assert order[:].tolist() == TINY[:].tolist()
    assert order.batches(0, 3).weights.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_reversed_turns_occurrences_around_and_leaves_padding_at_the_end():
    order = TINY.drop([3], refill=False).reversed(1)
    assert order[:].tolist() == [[0, 1], [2, 3], [4, -1], [4, 3], [2, 1], [0, -1]]
    assert order.batches(3, 6).weights.tolist() == [[1, 0], [1, 1], [1, 0]]


def test_shuffled_again_permutes_one_epoch_and_weights_travel():
    order = TINY.drop([3], refill=False).shuffled_again(1, 9)
    source = np.random.Generator(np.random.Philox(key=[9, 1])).permutation(5)
    ids, weights = order.batches(3, 6)
    assert ids.reshape(-1).tolist() == [*source.tolist(), -1]
    assert weights.reshape(-1).tolist() == [*(float(i != 3) for i in source), 0]
    assert order[:3].tolist() == TINY[:3].tolist()


def test_replaced_takes_a_mapping_or_the_first_steps_with_full_weight():
    order = TINY.drop([1], refill=False)
    by_step = order.replaced({2: [1, 1], 0: [3, 3]})
    assert by_step[:4].tolist() == [[3, 3], [2, 3], [1, 1], [0, 1]]
    assert by_step.batches(0, 4).weights.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]
    assert order.replaced(np.array([[4, 4], [3, 3]]))[:3].tolist() == [[4, 4], [3, 3], [4, -1]]


def test_a_replaced_spec_from_elsewhere_may_list_its_steps_in_any_sequence():
    ids = np.array([[3, 3], [1, 1]], "<i4").tobytes()
    edit = ["replaced", np.array([1, 0], "<i8").tobytes(), ids]
    order = Order.from_spec([["sequential", 2, 1, False], edit]).bind(6)
    assert order[:].tolist() == [[1, 1], [3, 3], [4, 5]]


def test_reversed_and_shuffled_again_take_one_epoch_or_all():
    assert TINY.reversed(None)[:].tolist() == [[4, 3], [2, 1], [0, -1]] * 2
    assert TINY.reversed(None) != TINY.reversed(0).reversed(1)
    each = TINY.shuffled_again(0, 9).shuffled_again(1, 9)
    assert TINY.shuffled_again(None, 9)[:].tolist() == each[:].tolist() != TINY[:].tolist()


def test_sorted_by_arranges_every_epoch_or_one_and_ties_keep_their_sequence():
    scores = [3, 1, 2, 1, -np.inf]
    assert TINY.sorted_by(scores)[:].tolist() == [[4, 1], [3, 2], [0, -1]] * 2
    assert TINY.sorted_by(scores, descending=True)[:3].tolist() == [[0, 2], [1, 3], [4, -1]]
    assert TINY.sorted_by(scores, epoch=1)[:3].tolist() == TINY[:3].tolist()
    order = TINY.reversed(0).sorted_by(scores, epoch=0)
    assert order[:3].tolist() == [[4, 3], [1, 2], [0, -1]]


def test_sorted_by_keeps_weights_with_their_samples():
    order = TINY.drop([3], refill=False).sorted_by([4, 3, 2, 1, 0], epoch=0)
    assert order[:3].tolist() == [[4, 3], [2, 1], [0, -1]]
    assert order.batches(0, 3).weights.tolist() == [[1, 0], [1, 1], [1, 0]]


def test_scores_of_one_sequence_are_one_edit_whatever_their_type():
    wanted = TINY.sorted_by([0, 1, 1, 2, 3])
    assert wanted.spec()[1] == [
        "sorted_by",
        np.array([0, 1, 1, 2, 3], "<i4").tobytes(),
        None,
        False,
    ]
    for scores in (
        [-np.inf, 0.0, -0.0, 1e-300, np.inf],
        np.array([-7, 2, 2, 2**62, 2**62 + 1]),  # as float64 the last two would be equal
        jnp.array([0.5, 1.5, 1.5, 2, 3], jnp.bfloat16),
    ):
        assert TINY.sorted_by(scores) == wanted
    assert TINY.sorted_by(np.array([False, True, True, False, False])).spec() == (
        TINY.sorted_by([0, 1, 1, 0, 0]).spec()
    )


def test_ranks_from_elsewhere_may_be_any_integers():
    ranks = np.array([2**31 - 1, -(2**31), 0, 0, 5], "<i4").tobytes()
    edit = ["sorted_by", ranks, 0, True]
    order = Order.from_spec([["sequential", 2, 1, True], edit]).bind(5)
    assert order[:].tolist() == [[0, 4], [2, 3], [1, -1]]


# --------------------------------------------------------------------------------------- since


def test_edits_after_since_touch_only_later_occurrences():
    order = TINY.since(1)
    assert order[:].tolist() == TINY[:].tolist()
    assert order.swap(2, 3)[:4].tolist() == [[0, 1], [2, 3], [0, 1], [4, -1]]
    assert order.reversed(0)[:].tolist() == [[0, 1], [4, 3], [2, -1], [0, 1], [2, 3], [4, -1]]
    assert order.reversed(None)[3:].tolist() == [[4, 3], [2, 1], [0, -1]]
    assert order.sorted_by([0, 1, 2, 4, 3], descending=True)[:3].tolist() == [
        [0, 1],
        [3, 4],
        [2, -1],
    ]


def test_drop_after_since_closes_up_what_is_left_of_an_epoch():
    order = TINY.since(1).drop([1, 2])
    assert order[:].tolist() == [[0, 1], [3, 4], [0, 3], [4, -1]]
    assert (order.steps_in(0), order.steps_in(1)) == (range(0, 2), range(2, 4))
    assert order.swap(2, 3)[2].tolist() == [4, -1]  # the epochs are shorter, the boundary stays
    with pytest.raises(OrderError, match=r"step \[0\] comes before step 1"):
        order.swap(0, 1)
    unpadded = Order.sequential(2, epochs=2).bind(6).since(1)
    assert unpadded.drop([3])[:].tolist() == [[0, 1], [2, 4], [0, 1], [2, 4]]
    assert unpadded.drop([2, 3, 4])[:].tolist() == [[0, 1], [0, 1]]
    assert unpadded.drop([0, 1, 2, 3, 4])[:].tolist() == [[0, 1]]  # what is before step 1 stays


def test_drop_after_since_leaves_padding_that_earlier_edits_moved():
    order = TINY.swap(0, 2).since(1)
    assert order[:3].tolist() == [[4, -1], [2, 3], [0, 1]]
    assert order.drop([3])[:3].tolist() == [[4, -1], [2, 0], [1, -1]]


def test_drop_in_place_after_since_takes_only_later_weights():
    order = TINY.since(2).drop([0, 4], refill=False)
    assert order[:].tolist() == TINY[:].tolist()
    assert order.batches(0, 6).weights.tolist() == [
        *([1, 1], [1, 1], [0, 0], [0, 1], [1, 1], [0, 0])
    ]
    assert order.weighted


def test_shuffled_again_after_since_permutes_what_is_left():
    order = TINY.since(4).shuffled_again(None, 9)
    assert order[:4].tolist() == TINY[:4].tolist()
    source = np.random.Generator(np.random.Philox(key=[9, 1])).permutation(3)
    assert order[4:].tolist() == np.append(source + 2, -1).reshape(2, 2).tolist()


def test_replaced_after_since_counts_the_rows_of_an_array_from_there():
    order = TINY.since(4).replaced([[3, 3], [1, 1]])
    assert order[3:].tolist() == [[0, 1], [3, 3], [1, 1]]
    assert order == TINY.since(4).replaced({5: [1, 1], 4: [3, 3]})
    unbound = Order.sequential(2).since(4).since(1).swap(1, 2).replaced([[3, 3]])
    assert unbound.bind(8)[:].tolist() == [[0, 1], [3, 3], [2, 3], [6, 7]]


def test_a_later_since_takes_the_place_of_an_earlier_one():
    assert TINY.since(5).since(1).swap(1, 2)[:3].tolist() == [[0, 1], [4, -1], [2, 3]]
    assert TINY.since(5).since(0).drop([0])[:].tolist() == TINY.drop([0])[:].tolist()
    first = TINY.since(3).reversed(1)
    assert first.since(5).reversed(1)[:].tolist() == first[:5].tolist() + [[0, -1]]


def test_since_the_end_leaves_nothing_to_edit():
    order = TINY.since(6)
    same = (order.reversed(None), order.sorted_by([0] * 5), order.drop([]), order)
    assert {other.checksum() for other in same} == {715606404}
    with pytest.raises(OrderError, match="no batch from step 6 on has samples"):
        order.drop([0])


def test_an_epoch_that_an_edit_emptied_may_be_rearranged_as_before():
    order = TINY.replaced([[4, 4]] * 3).drop([4])
    assert order.steps_in(0) == range(0, 0)
    assert order.since(0).reversed(0).since(1).reversed(1)[:].tolist() == [[0, 1], [3, 2]]


def test_one_step_after_since_makes_one_epoch_alone(monkeypatch):
    order = Order.shuffled(64, 1000, 5).bind(640).since(5003)
    made, permutation = [], replay.order._permutation
    monkeypatch.setattr(
        replay.order, "_permutation", lambda *key: made.append(key[1]) or permutation(*key)
    )
    order = order.reversed(None).sorted_by(np.arange(640)).shuffled_again(None, 1).swap(5007, 9000)
    assert made == []
    assert order[7005].shape == (64,)
    assert set(made) == {700}
    made.clear()
    order.drop([3], refill=False)  # which looks until it has seen the sample
    assert 500 in made and set(made) <= {500, 501, 900}


def test_edits_apply_in_the_sequence_written():
    assert TINY.drop([0]).swap(0, 1)[:2].tolist() == [[3, 4], [1, 2]]
    assert TINY.swap(0, 1).drop([0])[:2].tolist() == [[2, 3], [1, 4]]


def test_the_longest_chain_of_edits_can_be_read():
    order = Order.shuffled(4, 2, 0).bind(9)
    for _ in range(50):
        order = order.reversed(0).drop([], refill=True)
    replay.order._made.cache_clear()  # so that every edit has to be made within one call
    assert order[:].tolist() == Order.shuffled(4, 2, 0).bind(9)[:].tolist()
    with pytest.raises(OrderError, match="has 100 edits already"):
        order.swap(0, 1)


# ------------------------------------------------------------- any chain, against a plain model


def naive_base(base, samples):
    kind, batch, epochs, pad, seed = base
    made = []
    for epoch in range(epochs):
        philox = np.random.Philox(key=[seed, epoch])
        shuffled = np.random.Generator(philox).permutation(samples).tolist()
        flat = [(i, 1.0) for i in (shuffled if kind == "shuffled" else range(samples))]
        made.append(naive_chop(flat, batch, pad))
    return made


def naive_chop(flat, batch, pad):
    rows = [flat[i : i + batch] for i in range(0, len(flat), batch)]
    return [row + [(-1, 0.0)] * (batch - len(row)) for row in rows if pad or len(row) == batch]


def naive_edit(made, edit, batch, pad, since=0):
    """Apply one edit to epochs of batches of (id, weight), all of them plain lists."""
    name, *values = edit
    where = [(e, i) for e, epoch in enumerate(made) for i in range(len(epoch))]
    if name == "since":
        return
    if name == "swap":
        (e, i), (f, j) = (where[value] for value in values)
        made[e][i], made[f][j] = made[f][j], made[e][i]
        return
    if name == "replaced":
        for step, ids in values[0].items():
            e, i = where[step]
            made[e][i] = [(x, 1.0) for x in ids]
        return
    step = 0
    for e, epoch in enumerate(made):
        before = [row for t, row in enumerate(epoch, step) if t < since]
        after = [row for t, row in enumerate(epoch, step) if t >= since]
        step += len(epoch)
        made[e] = before + naive_change(after, e, edit, batch, pad)


def naive_change(rows, epoch, edit, batch, pad):
    """Return what an edit makes of the rows of an epoch that it may change."""
    name, *values = edit
    flat = [o for row in rows for o in row]
    real = [i for i, o in enumerate(flat) if o[0] >= 0]
    if name == "drop":
        return naive_chop([flat[i] for i in real if flat[i][0] not in values[0]], batch, pad)
    if name == "weigh":
        return [[(x, 0.0 if x in values[0] else w) for x, w in row] for row in rows]
    if name == "sorted_by":
        scores, only, descending = values
        source = sorted(real, key=lambda i: scores[flat[i][0]] * (-1 if descending else 1))
    elif name == "reversed":
        only, source = values[0], real[::-1]
    else:
        only, seed = values
        philox = np.random.Philox(key=[seed, epoch])
        source = [real[i] for i in np.random.Generator(philox).permutation(len(real))]
    if only not in (None, epoch):
        return rows
    moved = list(flat)
    for to, at in zip(real, source, strict=True):
        moved[to] = flat[at]
    return naive_chop(moved, batch, True)


def edited(order, edit):
    name, *values = edit
    if name == "weigh":
        return order.drop(*values, refill=False)
    if name == "sorted_by":
        return order.sorted_by(values[0], epoch=values[1], descending=values[2])
    return getattr(order, name)(*values)


SCORES = st.sampled_from([-np.inf, -1.5, -1, -0.0, 0, 2.5, 2.5000001, np.inf])


@st.composite
def edits(draw, made, since, batch, samples):
    """Draw an edit that fits batches whose steps before `since` stay as they are."""
    starts = np.cumsum([0, *map(len, made)]).tolist()
    rows = st.lists(st.integers(0, samples - 1), min_size=batch, max_size=batch)
    later = [b for e in made for b in e][since:]
    present = sorted({i for b in later for i, _ in b if i >= 0})
    some = st.lists(st.sampled_from(present), max_size=2) if present else st.just([])
    epochs = st.sampled_from(
        [None, *(e for e in range(len(made)) if starts[e] >= since or starts[e + 1] > since)]
    )
    scores = st.lists(SCORES, min_size=samples, max_size=samples)
    fitting = [
        st.tuples(st.just("reversed"), epochs),
        st.tuples(st.just("shuffled_again"), epochs, st.integers(0, 9)),
        st.tuples(st.just("sorted_by"), scores, epochs, st.booleans()),
        st.tuples(st.sampled_from(["drop", "weigh"]), some),
    ]
    if later:
        steps = st.integers(since, starts[-1] - 1)
        several = st.dictionaries(steps, rows, min_size=1, max_size=2)
        fitting += [
            st.tuples(st.just("swap"), steps, steps),
            st.tuples(st.just("replaced"), several),
        ]
    return draw(st.one_of(fitting))


@st.composite
def chains(draw):
    """Draw an order with its samples, and what the model says of it."""
    kind = draw(st.sampled_from(["shuffled", "sequential", "explicit"]))
    batch, samples = draw(st.integers(1, 4)), draw(st.integers(1, 11))
    epochs, seed = draw(st.integers(1, 3)), draw(st.integers(0, 9))
    pad = draw(st.booleans()) or samples < batch
    ids = st.integers(0, samples - 1)
    rows = st.lists(ids, min_size=batch, max_size=batch)
    if kind == "explicit":
        epochs, pad, table = 1, False, draw(st.lists(rows, min_size=1, max_size=6))
        order, made = Order.explicit(table), [[[(i, 1.0) for i in row] for row in table]]
    else:
        make = {"shuffled": (batch, epochs, seed), "sequential": (batch, epochs)}[kind]
        order = getattr(Order, kind)(*make, pad=pad)
        made = naive_base((kind, batch, epochs, pad, seed), samples)
    since = 0
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.integers(0, 3)) == 0:
            since = draw(st.integers(0, sum(map(len, made))))
            order = order.since(since)
        edit = draw(edits(made, since, batch, samples))
        trial = [list(epoch) for epoch in made]
        naive_edit(trial, edit, batch, pad, since)
        if any(trial):  # an order without steps is refused, which has a test of its own
            made, order = trial, edited(order, edit)
    return order, samples, made


@given(chains())
@quick
def test_any_chain_of_edits_agrees_with_plain_lists(chain):
    order, samples, made = chain
    order = order.bind(samples)
    flat = [batch for epoch in made for batch in epoch]
    ids, weights = order.batches(0, len(order))
    assert ids.tolist() == [[i for i, _ in batch] for batch in flat]
    assert weights.tolist() == [[w for _, w in batch] for batch in flat]
    assert order.epoch(np.arange(len(order))).tolist() == [e for e, b in enumerate(made) for _ in b]
    assert [len(order.steps_in(epoch)) for epoch in range(order.epochs)] == list(map(len, made))


@given(chains(), st.data())
@quick
def test_any_chain_reads_the_same_in_any_sequence(chain, data):
    order, samples, _ = chain
    ids, weights = order.bind(samples).batches(0, len(order.bind(samples)))
    other = Order.from_spec(order.spec()).bind(samples)
    for t in data.draw(st.permutations(range(len(ids)))):
        assert other[t].tolist() == ids[t].tolist()
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(ids))] * 2)))
    assert other[a:b].tolist() == other.batches(a, b).ids.tolist() == ids[a:b].tolist()
    assert other.batches(a, b).weights.tolist() == weights[a:b].tolist()


@given(chains())
@quick
def test_any_chain_returns_from_its_spec_and_binds_early_or_late(chain):
    order, samples, _ = chain
    again = Order.from_spec(order.spec())
    assert again == order and hash(again) == hash(order) and repr(again) == repr(order)
    base, *edits = order.spec()
    early = Order.from_spec([base]).bind(samples)
    for edit in edits:
        early = early._edited(*edit)
    assert early == order and early.checksum() == again.bind(samples).checksum()


@given(chains(), st.data())
@quick
def test_an_edit_after_since_leaves_what_comes_before(chain, data):
    order, samples, made = chain
    order = order.bind(samples)
    t = data.draw(st.integers(0, len(order)))
    edit = data.draw(edits(made, t, order.batch_size, samples))
    naive_edit(made, edit, order.batch_size, order._known.pad, t)
    assume(any(made))
    after = edited(order.since(t), edit)
    for kept, was in zip(after.batches(0, t), order.batches(0, t), strict=True):
        assert kept.tolist() == was.tolist()
    if edit[0] in ("reversed", "shuffled_again", "sorted_by", "weigh"):
        assert len(after) == len(order)
        for epoch in range(order.epochs):
            assert after.steps_in(epoch) == order.steps_in(epoch)
            steps = slice(after.steps_in(epoch).start, after.steps_in(epoch).stop)
            assert sorted(after[steps].ravel()) == sorted(order[steps].ravel())
    if edit[0] in ("drop", "weigh"):
        ids, weights = after.batches(t, len(after))
        assert not weights[np.isin(ids, edit[1])].any()
        if edit[0] == "drop":
            assert not np.isin(ids, edit[1]).any()


def test_a_spec_is_made_of_plain_values():
    order = TINY.swap(np.int64(0), 1).drop([4]).replaced({0: [1, 2]})
    order = order.since(np.int32(2)).reversed(None).sorted_by([0, 7, 0, 0, 0], epoch=1)
    assert order.spec() == [
        ["sequential", 2, 2, True],
        ["swap", 0, 1],
        ["drop", b"\4\0\0\0", True],
        ["replaced", b"\0\0\0\0\0\0\0\0", b"\1\0\0\0\2\0\0\0"],
        ["since", 2],
        ["reversed", None],
        ["sorted_by", b"\0\0\0\0\1" + b"\0" * 15, 1, False],
    ]
    assert type(order.spec()[1][1]) is int


# -------------------------------------------------------------------------------------- errors


def test_unbound_orders_say_how_to_bind_them():
    order = Order.sequential(2)
    for use in (
        len,
        lambda o: o[0],
        lambda o: o.batches(0, 1),
        lambda o: o.epoch(0),
        Order.checksum,
    ):
        with pytest.raises(OrderError, match=r"fix: order = order.bind\(len\(data\)\)"):
            use(order)


@pytest.mark.parametrize("samples", [0, -1, 2**31, 2.0, True, "5", None])
def test_orders_bind_to_a_sensible_number_of_samples(samples):
    with pytest.raises(OrderError, match="cannot be bound"):
        Order.sequential(2, pad=True).bind(samples)


def test_a_bound_order_refuses_another_number_of_samples():
    with pytest.raises(OrderError, match="5 samples, 6 steps cannot be bound to 6 samples"):
        TINY.bind(6)


def test_a_batch_that_no_epoch_fills_is_refused():
    with pytest.raises(OrderError) as caught:
        Order.shuffled(64, 1, 0).bind(10)
    assert str(caught.value) == (
        "10 samples in an epoch do not fill one batch of 64\n"
        "  why: the last short batch of an epoch is dropped, so no step would remain\n"
        "  fix: make the batches smaller, pass pad=True, or drop with refill=False"
    )
    with pytest.raises(OrderError, match="1 samples in an epoch do not fill one batch of 2"):
        Order.sequential(2).bind(4).drop([0, 1, 2])


MISFITS = {
    r"swap: there is no step \[6\]\n.*has 6 steps, 0 to 5": lambda o: o.swap(0, 6),
    r"reversed: there is no epoch \[2\]\n.*has 2 epochs, 0 to 1": lambda o: o.reversed(2),
    r"shuffled_again: there is no epoch \[7\]": lambda o: o.shuffled_again(7, 0),
    r"drop: there is no sample \[5, 8\]": lambda o: o.drop([8, 1, 5]),
    r"replaced: there is no step \[9\]": lambda o: o.replaced({9: [0, 0]}),
    r"replaced: there is no step \[6\]": lambda o: o.replaced([[0, 0]] * 7),
    r"replaced: there is no sample \[77\]\n.*has 5 samples": lambda o: o.replaced({0: [0, 77]}),
    r"no batch has samples \[0, 1\]\n.*3 of 5 samples": lambda o: o.drop([0, 1]).drop([0, 1, 2]),
    r"no batch has samples \[3\]": lambda o: o.drop(3).drop(3, refill=False),
    r"since: there is no step 7\n.*has 6 steps, so edits begin at 0 to 6": lambda o: o.since(7),
    r"since: there is no step 5\n.*has 4 steps": lambda o: o.drop([0, 1]).since(5),
    r"swap: step \[1, 3\] comes before step 4": lambda o: o.since(4).swap(3, 1),
    r"replaced: step \[2\] comes before step 4": lambda o: o.since(4).replaced({2: [0, 0]}),
    r"replaced: there is no step \[6, 7\]": lambda o: o.since(5).replaced([[0, 0]] * 3),
    r"reversed: epoch 0, steps 0 to 2, comes before step 3": lambda o: o.since(3).reversed(0),
    r"reversed: epoch 1, steps 3 to 5, comes before step 6": lambda o: o.since(6).reversed(1),
    r"shuffled_again: epoch 0, .* step 4,": lambda o: o.since(4).shuffled_again(0, 1),
    r"sorted_by: epoch 0, .* step 4,": lambda o: o.since(4).sorted_by([0] * 5, epoch=0),
    r"sorted_by: there is no epoch \[2\]": lambda o: o.sorted_by([0] * 5, epoch=2),
    r"sorted_by: there are 4 scores\n.*over 5 samples": lambda o: o.sorted_by([0] * 4),
    r"no batch from step 5 on has samples \[0, 1, 2\]": lambda o: o.since(5).drop([0, 1, 2, 4]),
    r"no batch from step 5 on has samples \[3\]": lambda o: o.since(5).drop([3], refill=False),
}


@pytest.mark.parametrize("message", MISFITS)
def test_edits_that_do_not_fit_are_refused_at_once_or_in_bind(message):
    with pytest.raises(OrderError, match=message):
        MISFITS[message](TINY)
    unbound = MISFITS[message](Order.from_spec(TINY.spec()))
    with pytest.raises(OrderError, match=message):
        unbound.bind(5)


def test_an_edit_of_what_comes_before_since_says_where_to_begin():
    with pytest.raises(OrderError) as caught:
        TINY.since(4).reversed(0)
    assert str(caught.value) == (
        "reversed: epoch 0, steps 0 to 2, comes before step 4, since which this order is edited\n"
        "  why: all batches before that step stay as they are; a fork shares them with its parent\n"
        "  fix: edit what comes later, or begin earlier: order.since(0), a fork at=0"
    )
    with pytest.raises(OrderError) as caught:
        TINY.since(5).drop([0, 1])
    assert str(caught.value) == (
        "drop: no batch from step 5 on has samples [0, 1]\n"
        "  why: at this point 1 of 5 samples are in those batches: earlier edits, or a last short "
        "batch, leave out the others\n"
        "  fix: drop samples that occur: np.unique(order[5:])"
    )


def test_explicit_ids_have_to_exist_in_the_data():
    with pytest.raises(OrderError, match=r"explicit: there is no sample \[4, 9\]\n.*4 samples, 0"):
        Order.explicit([[0, 9], [4, 1]]).bind(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Order.shuffled(0, 1, 0), "batch_size is 0\n.*an integer from 1 to 16777216"),
        (lambda: Order.shuffled(2.0, 1, 0), "batch_size is 2.0"),
        (lambda: Order.shuffled(True, 1, 0), "batch_size is True"),
        (lambda: Order.sequential(2, 2**24 + 1), "epochs is 16777217"),
        (lambda: Order.sequential(2, pad=1), "pad is 1\n.*True or False"),
        (lambda: TINY.swap(-1, 0), "swap: a is -1"),
        (lambda: TINY.reversed(-1), "reversed: epoch is -1\n.*9223372036854775807, or None"),
        (lambda: TINY.reversed(False), "reversed: epoch is False"),
        (lambda: TINY.shuffled_again(None, None), "seed is None\n.*0 to [0-9]*\n"),
        (lambda: TINY.since(-1), "since: step is -1"),
        (lambda: TINY.since(None), "since: step is None"),
        (lambda: TINY.since(2**62).replaced([[0, 1]]), "since: there is no step"),
        (lambda: TINY.sorted_by([0, 1, 2, np.nan, 0]), r"scores of samples \[3\] are NaN"),
        (lambda: TINY.sorted_by([[0] * 5]), r"scores cannot be \[\[0, 0, 0, 0, 0\]\]"),
        (lambda: TINY.sorted_by([1j] * 5), "sorted_by: scores cannot be"),
        (lambda: TINY.sorted_by("abcde"), "sorted_by: scores cannot be"),
        (lambda: TINY.sorted_by([0, [1], 2]), "sorted_by: scores cannot be"),
        (lambda: TINY.sorted_by([None] * 5), "sorted_by: scores cannot be"),
        (lambda: TINY.sorted_by([0] * 5, epoch="1"), "sorted_by: epoch is '1'"),
        (lambda: TINY.sorted_by([0] * 5, descending=1), "sorted_by: descending is 1"),
        (lambda: TINY.drop([-1]), "drop: samples go from -1 to -1"),
        (lambda: TINY.drop([0.5]), r"drop: samples cannot be \[0.5\]"),
        (lambda: TINY.drop([2**31]), "drop: samples go from 2147483648"),
        (lambda: Order.explicit([1, 2]), r"ids cannot be \[1, 2\]\n.*shape \[steps batch\]"),
        (lambda: Order.explicit([[1, 2], [3]]), r"ids cannot be \[\[1, 2\], \[3\]\]"),
        (lambda: Order.explicit(np.zeros((2, 0), int)), "batch_size is 0"),
        (lambda: Order.explicit(np.zeros((0, 2), int)).bind(2), "0 ids do not make 0 batches of 2"),
        (lambda: Order.explicit([[-1, 2]]), "explicit: ids go from -1 to 2"),
        (lambda: TINY.replaced({0: [1, 2, 3]}), "3 ids do not make 1 batches of 2"),
        (lambda: TINY.replaced({}), r"replaced: ids cannot be \[\]"),
        (lambda: TINY.replaced({0: [1, 2], 1: [1]}), r"replaced: ids cannot be"),
        (lambda: TINY.replaced({0.5: [1, 2]}), "replaced: steps cannot be"),
        (lambda: TINY.batches(2, 7), r"batches\(2, 7\) is not within the order\n.*6 steps"),
        (lambda: TINY.batches(3, 2), r"batches\(3, 2\)"),
        (lambda: TINY.batches(-1, 2), r"batches\(-1, 2\)"),
        (lambda: TINY.epoch([0, 6]), r"epoch: there is no step \[6\]"),
        (lambda: TINY.steps_in(2), r"steps_in: there is no epoch \[2\]"),
        (lambda: TINY[6], r"there is no step \[6\]"),
        (lambda: TINY[-7], r"there is no step \[-7\]"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(OrderError, match=message) as caught:
        make()
    assert caught.value.why and caught.value.fix


@pytest.mark.parametrize(
    "spec",
    [
        *(None, 7, "shuffled", [], {}, [[]], [None], ["shuffled"], [[["shuffled"]]], [{}]),
        [["swap", 0, 1]],
        [["unheard of", 1]],
        [["sequential", 2, 1]],
        [["sequential", 2, 1, False, 0]],
        [["sequential", 2, 1, 0]],
        [["sequential", 2**62, 1, True]],
        [["sequential", 2, 2**62, True]],
        [["sequential", "2", 1, True]],
        [["shuffled", 2, 1, -1, False]],
        [["explicit", 2, b"\0" * 7]],
        [["explicit", 2, [0, 1]]],
        [["sequential", 2, 1, False], ["sequential", 2, 1, False]],
        [["sequential", 2, 1, False], ["swap", 0, None]],
        [["sequential", 2, 1, False], ["drop", b"\0" * 4, 1]],
        [["since", 0]],
        [["sequential", 2, 1, False], ["since", None]],
        [["sequential", 2, 1, False], ["since", 2**63]],
        [["sequential", 2, None, False]],
        [["sequential", 2, 1, False], ["reversed", 2**63]],
        [["sequential", 2, 1, False], ["reversed", False]],
        [["sequential", 2, 1, False], ["shuffled_again", None, None]],
        [["sequential", 2, 1, False], ["sorted_by", b"\0" * 7, None, False]],
        [["sequential", 2, 1, False], ["sorted_by", b"\0" * 16, -1, False]],
        [["sequential", 2, 1, False], ["sorted_by", b"\0" * 16, 0, None]],
        [["sequential", 2, 1, False], ["replaced", b"\0" * 4, b"\0" * 8]],
        [["sequential", 2, 1, False], *[["swap", 0, 1]] * 101],
    ],
)
def test_a_damaged_spec_is_refused_before_it_is_used(spec):
    with pytest.raises(OrderError):
        Order.from_spec(spec)


@pytest.mark.parametrize(
    "spec",
    [
        [["explicit", 2, b"\0" * 12]],
        [["explicit", 2, b""]],
        [["explicit", 2, b"\xff" * 8]],
        [["sequential", 2, 1, False], ["drop", b"\xff" * 4, True]],
        [["sequential", 2, 1, False], ["since", 2**63 - 1]],
        [["sequential", 2, 1, False], ["reversed", 2**63 - 1]],
        [["sequential", 2, 1, False], ["sorted_by", b"", None, False]],
        [["sequential", 2, 1, False], ["sorted_by", b"\0" * 20, None, False]],
        [["sequential", 2, 1, False], ["replaced", b"\0" * 8, b"\0" * 12]],
        [["sequential", 2, 1, False], ["replaced", b"\xff" * 8, b"\0" * 8]],
        [["sequential", 2, 1, False], ["replaced", b"\0" * 8, b"\xff" * 8]],
    ],
)
def test_a_spec_whose_fields_disagree_is_refused_in_bind(spec):
    order = Order.from_spec(spec)
    assert "unbound" in repr(order)
    with pytest.raises(OrderError):
        order.bind(4)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**65), st.binary(max_size=9), st.floats(),
    st.sampled_from(["shuffled", "sequential", "explicit", "swap", "drop", "replaced"]),
)  # fmt: skip


@given(st.lists(st.lists(leaves, max_size=5), max_size=3))
@quick
def test_no_spec_raises_anything_but_an_order_error(spec):
    try:
        assert Order.from_spec(spec).spec() == spec
    except OrderError as error:
        assert error.fix
