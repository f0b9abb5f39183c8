"""What an order promises: the same batches from anywhere, edits that compose, errors that help."""

import copy
import doctest
import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
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
    order = TINY.swap(0, 1).reversed(1)
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


def naive_edit(made, edit, batch, pad):
    """Apply one edit to epochs of batches of (id, weight), all of them plain lists."""
    name, *values = edit
    where = [(e, i) for e, epoch in enumerate(made) for i in range(len(epoch))]
    if name == "swap":
        (e, i), (f, j) = (where[value] for value in values)
        made[e][i], made[f][j] = made[f][j], made[e][i]
    elif name == "replaced":
        for step, ids in values[0].items():
            e, i = where[step]
            made[e][i] = [(x, 1.0) for x in ids]
    elif name == "drop":
        gone = set(values[0])
        made[:] = [
            naive_chop([o for b in e for o in b if o[0] not in gone | {-1}], batch, pad)
            for e in made
        ]
    elif name == "weigh":
        made[:] = [[[(x, 0.0 if x in values[0] else w) for x, w in b] for b in e] for e in made]
    else:
        flat = [o for b in made[values[0]] for o in b]
        real = [i for i, o in enumerate(flat) if o[0] >= 0]
        if name == "reversed":
            source = real[::-1]
        else:
            philox = np.random.Philox(key=[values[1], values[0]])
            source = [real[i] for i in np.random.Generator(philox).permutation(len(real))]
        moved = list(flat)
        for to, at in zip(real, source, strict=True):
            moved[to] = flat[at]
        made[values[0]] = naive_chop(moved, batch, True)


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
    for _ in range(draw(st.integers(0, 6))):
        steps = st.integers(0, sum(map(len, made)) - 1)
        present = sorted({i for e in made for b in e for i, _ in b if i >= 0})
        some = st.lists(st.sampled_from(present), max_size=2) if present else st.just([])
        edit = draw(
            st.one_of(
                st.tuples(st.just("swap"), steps, steps),
                st.tuples(st.just("reversed"), st.integers(0, epochs - 1)),
                st.tuples(st.just("shuffled_again"), st.integers(0, epochs - 1), ids),
                st.tuples(
                    st.just("replaced"), st.dictionaries(steps, rows, min_size=1, max_size=2)
                ),
                st.tuples(st.sampled_from(["drop", "weigh"]), some),
            )
        )
        trial = [list(epoch) for epoch in made]
        naive_edit(trial, edit, batch, pad)
        if any(trial):  # an order without steps is refused, which has a test of its own
            made = trial
            name, *values = edit
            order = (
                order.drop(*values, refill=False)
                if name == "weigh"
                else getattr(order, name)(*values)
            )
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


def test_a_spec_is_made_of_plain_values():
    order = TINY.swap(np.int64(0), 1).drop([4]).replaced({0: [1, 2]})
    assert order.spec() == [
        ["sequential", 2, 2, True],
        ["swap", 0, 1],
        ["drop", b"\4\0\0\0", True],
        ["replaced", b"\0\0\0\0\0\0\0\0", b"\1\0\0\0\2\0\0\0"],
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
}


@pytest.mark.parametrize("message", MISFITS)
def test_edits_that_do_not_fit_are_refused_at_once_or_in_bind(message):
    with pytest.raises(OrderError, match=message):
        MISFITS[message](TINY)
    unbound = MISFITS[message](Order.from_spec(TINY.spec()))
    with pytest.raises(OrderError, match=message):
        unbound.bind(5)


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
        (lambda: TINY.reversed(-1), "reversed: epoch is -1"),
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
