"""Reductions over strategies, memory limits, batches and the steps of a recorded run."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import strategies as st
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import reductions, replaying
from replay.grads import stream as streams
from replay.grads.reductions import BLOCK_STEPS, Blocks
from replay.journal import frame, only_frame
from replay.log import HEADER

Sum, Max, Min, TopK = reductions.Sum, reductions.Max, reductions.Min, reductions.TopK
Histogram, Norm, Dot = reductions.Histogram, reductions.Norm, reductions.Dot

# Two programs for one quantity sum the same products in other orders: a few units of float32.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": normal(7, 6), "b": normal(6, 3, seed=1), "c": normal(3, seed=2)}
BATCH = normal(9, 5, 7, seed=3)


def loss(params, x, key):
    hidden = jnp.tanh(x @ params["a"])
    return jnp.sin(hidden @ params["b"]).sum() + params["c"] @ x[0, :3]


def truth(loss=loss, params=PARAMS, batch=BATCH):
    return jax.vmap(jax.grad(lambda p, x: loss(p, x, None)), (None, 0))(params, batch)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


# ---------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("strategy", "memory"),
    [
        ("factored", 600),
        pytest.param("scan", 2**30, marks=pytest.mark.full),
        pytest.param({"a": "scan", "b": "vmap"}, 600, marks=pytest.mark.full),
        pytest.param("factored", 2**30, marks=pytest.mark.full),
        pytest.param("vmap", 600, marks=pytest.mark.full),
        pytest.param("vmap", 2**30, marks=pytest.mark.full),
    ],
)
def test_every_strategy_gives_the_same_answers_within_any_memory(strategy, memory):
    per_sample, grads = replay.per_sample(loss, strategy=strategy, memory=memory), truth()
    jitted = jax.jit(lambda p, x: (per_sample.square_sum(p, x), per_sample.top_k(2, p, x)))
    squares, (values, positions) = jitted(PARAMS, BATCH)
    close(squares, jax.tree.map(lambda g: np.square(g).sum(0), grads))
    close(values, jax.tree.map(lambda g: -np.sort(-np.abs(g), 0)[:2], grads))
    first = jax.tree.map(lambda g: np.abs(g).argmax(0), grads)
    assert jax.tree.map(lambda p, q: (p[0] == q).all(), positions, first) == dict.fromkeys(
        "abc", True
    )
    close(per_sample.min(PARAMS, BATCH, of="value"), jax.tree.map(lambda g: g.min(0), grads))
    close(per_sample.grads(PARAMS, BATCH), grads)
    flat = np.concatenate([g.reshape(9, -1) for g in jax.tree.leaves(grads)], 1)
    close(per_sample.gram(PARAMS, BATCH), flat @ flat.T)
    close(per_sample.gram(PARAMS, BATCH, other=BATCH[:4]), flat @ flat[:4].T)
    close(per_sample.norms(PARAMS, BATCH), np.linalg.norm(flat, axis=1))
    close(per_sample.at("a", (2, 1), PARAMS, BATCH), grads["a"][:, 2, 1])


def test_a_memory_that_holds_no_sample_is_refused_with_the_bytes_it_takes():
    for strategy, size in (
        ("scan", 4 * (42 + 18 + 3)),
        ("factored", 4 * (5 * (7 + 6 + 6 + 3) + 3 + 1)),
    ):
        per_sample = replay.per_sample(loss, strategy=strategy, memory=100)
        with pytest.raises(replay.ProgramError, match=f"one sample takes {size} bytes") as caught:
            per_sample.square_sum(PARAMS, BATCH)
        assert f"memory={size}" in caught.value.fix


def test_what_does_not_fit_as_factors_is_computed_sample_by_sample():
    per_sample = replay.per_sample(loss, memory=300)
    assert set(line.split()[2] for line in per_sample.explain(PARAMS, BATCH).splitlines()) == {
        "scan"
    }
    close(per_sample.max(PARAMS, BATCH), jax.tree.map(lambda g: np.abs(g).max(0), truth()))


def test_unknown_strategies_and_tensors_are_refused():
    with pytest.raises(replay.ProgramError, match="there is no strategy 'fast'"):
        replay.per_sample(loss, strategy="fast")
    with pytest.raises(replay.ProgramError, match="there is no tensor 'd' to choose"):
        replay.per_sample(loss, strategy={"d": "scan"}).norms(PARAMS, BATCH)
    with pytest.raises(replay.ProgramError, match=r"a has no weight \[9, 0\]"):
        replay.per_sample(loss).at("a", (9, 0), PARAMS, BATCH)


def test_what_was_measured_is_chosen_and_told():
    per_sample, question = replay.per_sample(loss), Sum("square")
    seconds = per_sample.tune(question, PARAMS, BATCH)
    assert set(seconds) == {"factored", "scan", "vmap"}
    fastest = min(seconds, key=seconds.__getitem__)
    *lines, measured = (
        replay.per_sample(loss).explain(PARAMS, BATCH, of=repr(question)).splitlines()
    )
    assert [line.split()[2] for line in lines] == [fastest] * 3
    assert measured.startswith("measured on this machine: factored ")
    other = replay.per_sample(loss).explain(PARAMS, BATCH, of=repr(Max())).splitlines()
    assert [line.split()[2] for line in other] == ["factored"] * 3


# ------------------------------------------------------------------------------ batched losses


def batch_norm(params, model_state, batch, key, sample_keys):
    hidden = batch["x"] @ params["w"]
    mean, variance = hidden.mean(0, keepdims=True), hidden.var(0, keepdims=True)
    hidden = (hidden - mean) / jnp.sqrt(variance + 1e-3) * params["scale"][None]
    return jnp.sin(jax.nn.relu(hidden) @ params["v"]).sum(1) * model_state, model_state


def contrastive(params, model_state, batch, key, sample_keys):
    similar = (batch["x"] @ params["w"]) @ (batch["y"] @ params["v"]).T
    return -jnp.diag(jax.nn.log_softmax(similar, axis=1)) * model_state


@pytest.mark.parametrize(
    ("batched", "strategy"),
    [
        pytest.param(batch_norm, "factored", marks=pytest.mark.full),
        (contrastive, "scan"),
        pytest.param(batch_norm, "vmap", marks=pytest.mark.full),
        pytest.param(contrastive, "factored", marks=pytest.mark.full),
    ],
)
def test_a_sample_of_a_coupled_batch_has_the_batch_as_context(batched, strategy):
    params = {"w": normal(7, 6), "scale": normal(6), "v": normal(6, 5, seed=4)}
    batch = {"x": normal(8, 7, seed=5), "y": normal(8, 6, seed=6)}
    if batched is contrastive:
        params = {"w": params["w"], "v": normal(6, 6, seed=7)}
    state = jnp.float32(0.5)

    def losses(params):
        result = batched(params, state, batch, None, None)
        return result[0] if isinstance(result, tuple) else result

    expected = jax.jacrev(losses)(params)
    per_sample = replay.per_sample(batched, batched=True, strategy=strategy, memory=6000)
    close(per_sample.losses(params, batch, model_state=state), losses(params))
    close(per_sample.grads(params, batch, model_state=state), expected)
    squares = jax.jit(lambda p: per_sample.square_sum(p, batch, model_state=state))(params)
    close(squares, jax.tree.map(lambda g: jnp.square(g).sum(0), expected))
    close(
        per_sample.sum(params, batch, model_state=state),
        jax.tree.map(lambda g: g.sum(0), expected),
    )


def test_a_batched_loss_that_returns_no_column_is_refused():
    per_sample = replay.per_sample(lambda p, s, batch, key, keys: batch.sum(), batched=True)
    with pytest.raises(replay.ProgramError, match=r"returned shape \[\] for 9 samples"):
        per_sample.norms(PARAMS, BATCH)


# ------------------------------------------------------------------------------- running states


def batches(count):
    return [normal(4, 5, 7, seed=10 + i) for i in range(count)]


def streamed(*questions, count=5, **options):
    stream = replay.per_sample(loss, **options).stream(*questions)
    for batch in batches(count):
        stream.update(PARAMS, batch)
    return stream.results()


@pytest.mark.parametrize("strategy", ["factored", pytest.param("scan", marks=pytest.mark.full)])
def test_a_stream_answers_as_one_large_batch_would(strategy):
    questions = (Sum("square"), TopK(3), Max(), Histogram((0.1, 1.0)), Norm(), Dot(PARAMS))
    squares, (values, occurrences), largest, counts, norms, dots = streamed(
        *questions, strategy=strategy
    )
    grads = truth(batch=jnp.concatenate(batches(5)))
    close(squares, jax.tree.map(lambda g: np.square(g).sum(0), grads))
    close(largest, jax.tree.map(lambda g: np.abs(g).max(0), grads))
    close(values, jax.tree.map(lambda g: -np.sort(-np.abs(g), 0)[:3], grads))
    for name, found in occurrences.items():
        order = np.argsort(-np.abs(grads[name]), axis=0, kind="stable")[:3]
        assert found.tolist() == order.tolist()
    assert {name: int(count.sum()) for name, count in counts.items()} == {
        "a": 20 * 42,
        "b": 20 * 18,
        "c": 20 * 3,
    }
    flat = np.concatenate([g.reshape(20, -1) for g in jax.tree.leaves(grads)], 1)
    along = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(PARAMS)])
    close(norms, np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(dots, flat @ along, rtol=1e-4, atol=1e-4)  # cancels


def test_an_answer_does_not_depend_on_what_else_is_asked():
    together = streamed(Sum("square"), TopK(2), Norm(), count=3)
    alone = [streamed(question, count=3)[0] for question in (Sum("square"), TopK(2), Norm())]
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_asking_in_the_middle_changes_nothing_afterwards():
    stream = replay.per_sample(loss).stream(Sum("magnitude"))
    for batch in batches(4):
        stream.update(PARAMS, batch)
        stream.results()
    (asked,), (unasked,) = stream.results(), streamed(Sum("magnitude"), count=4)
    for a, b in zip(jax.tree.leaves(asked), jax.tree.leaves(unasked), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_answer_stays_what_it_was_when_more_samples_come():
    stream, early = replay.per_sample(loss).stream(TopK(3)), []
    for number, batch in enumerate(batches(4)):
        stream.update(PARAMS, batch)
        early.append((number + 1, stream.results()))
    for count, answer in early:
        for a, b in zip(
            jax.tree.leaves(answer), jax.tree.leaves(streamed(TopK(3), count=count)), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_steps_go_forwards_and_questions_are_reductions():
    stream = replay.per_sample(loss).stream(Max())
    stream.update(PARAMS, BATCH, step=7)
    with pytest.raises(replay.ProgramError, match="step 7 comes after step 7"):
        stream.update(PARAMS, BATCH, step=7)
    with pytest.raises(replay.ProgramError, match="'max' is no reduction"):
        replay.per_sample(loss).stream("max")
    with pytest.raises(replay.ProgramError, match="there is no 'cube' of a gradient"):
        Sum("cube")
    with pytest.raises(replay.ProgramError, match="the 0 largest"):
        TopK(0)


def dense(params, x, key):
    return jnp.sin(jnp.tanh(x @ params["a"]) @ params["b"] + params["c"]).sum()


def dense_sums(steps, *others, sizes=None, between=lambda stream: None, **options):
    """Stream the squares of batches of five samples, or of `sizes`, at steps of these numbers."""
    stream = replay.per_sample(dense, **options).stream(Sum("square"), *others)
    for step in steps:
        size = (sizes or {}).get(step, 5)
        stream.update(PARAMS, normal(size, 7, seed=step), step=step)
        between(stream)
    return stream.results()[0]


def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def summed_together(monkeypatch):
    """Return how many steps each product summed that summed several."""
    counts, steps = [], streams._shared_steps

    def counted(reduction, form):
        run = steps(reduction, form)

        def call(state, payloads):
            counts.append(len(payloads))
            return run(state, payloads)

        return call

    monkeypatch.setattr(streams, "_shared_steps", counted)
    return counts


def test_eight_steps_are_summed_as_one_wherever_a_range_begins(summed_together):
    whole = dense_sums(range(61, 64 + 19))
    assert summed_together == [8] * 3 * 2, "of three tensors, steps 64 to 79"
    grads = truth(dense, batch=jnp.concatenate([normal(5, 7, seed=s) for s in range(61, 83)]))
    close(whole, jax.tree.map(lambda g: np.square(g).sum(0), grads))
    parts = dense_sums(range(61, 64)), dense_sums(range(64, 64 + 19))
    same(whole, jax.tree.map(np.add, *parts))
    summed_together.clear()
    dense_sums(range(66, 64 + 19))
    assert summed_together == [8] * 3, "steps 72 to 79"


def test_steps_that_wait_are_counted_where_somebody_asks_in_the_middle(summed_together):
    found = []
    whole = dense_sums(range(11), between=lambda stream: found.append(stream.results()[0]))
    assert summed_together == [8] * 3
    same(whole, dense_sums(range(11)))
    for count in (3, 8, 10):
        same(found[count - 1], dense_sums(range(count)))


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ([0, 1, 2, 4, 5, 6, 7, 8], {}),
        (range(8), {"sizes": {5: 3}}),
        (range(8), {"memory": 900}),
        (range(8), {"memory": 300}),
        (range(8), {"strategy": "scan"}),
    ],
    ids=["one missing", "one shorter", "no room for two", "no room for one", "by scan"],
)
def test_steps_are_summed_one_by_one_where_they_are_not_alike_or_take_too_much(
    summed_together, steps, options
):
    found = dense_sums(steps, **options)
    assert not summed_together
    sizes = options.get("sizes", {})
    batch = jnp.concatenate([normal(sizes.get(s, 5), 7, seed=s) for s in steps])
    close(found, jax.tree.map(lambda g: np.square(g).sum(0), truth(dense, batch=batch)))


@pytest.mark.parametrize("first", ["one product", "a sum over time"])
def test_what_a_stream_began_with_does_not_decide_which_steps_are_summed_as_one(
    summed_together, first
):
    def layers(params, x, key):
        return jnp.sin(jnp.tanh(x @ params["a"]) @ params["b"]).sum()

    def batch(step):
        long = (step == 0) == (first == "a sum over time")
        return normal(5, *[2] * long, 7, seed=step)

    params, steps = {"a": PARAMS["a"], "b": PARAMS["b"]}, (0, *range(8, 16))
    stream = replay.per_sample(layers).stream(Sum("square"))
    for step in steps:
        stream.update(params, batch(step), step=step)
    assert summed_together == [8] * (2 if first == "a sum over time" else 0)
    parts = [truth(layers, params, batch(step)) for step in steps]
    expected = jax.tree.map(lambda *gs: sum(np.square(g).sum(0) for g in gs), *parts)
    close(stream.results()[0], expected)


def test_sums_do_not_depend_on_what_else_is_asked(summed_together):
    same(dense_sums(range(11), Norm(), TopK(2)), dense_sums(range(11)))
    assert summed_together == [8] * 3 * 2


def test_batches_of_padding_alone_add_nothing(tmp_path):
    with replay.Recorder(tmp_path / "run", tiny.PROGRAM, key=tiny.KEY) as recorder:
        for step in range(6):
            padded = {"ids": [-1] * 4, "weights": [0.0] * 4} if step in (2, 5) else {}
            recorder.feed({k: x[step : step + 4] for k, x in tiny.DATA.items()}, **padded)
    run = replay.open(tmp_path / "run")
    found = run.reduce(Sum("square"), strategy="factored")
    assert found.occurrences.tolist() == [t * 4 + p for t in (0, 1, 3, 4) for p in range(4)]
    parts = [
        run.reduce(Sum("square"), strategy="factored", steps=slice(a, b)).answers[0]
        for a, b in ((0, 2), (3, 5))
    ]
    close(found.answers[0], jax.tree.map(np.add, *parts))


@pytest.mark.parametrize(("i", "j"), [(3, 5), (5, 3)])
def test_dot_products_of_sequences_whichever_side_is_the_wider(i, j):
    def loss(w, x, key):
        return jnp.sin(x @ w).sum()

    w, along, batch = normal(i, j), normal(i, j, seed=1), normal(6, 4, i, seed=2)
    expected = np.einsum("nij,ij->n", truth(loss, w, batch), along)
    close(replay.per_sample(loss).dot(along, w, batch), expected)


def test_as_many_steps_are_summed_as_one_as_fit_in_memory(summed_together):
    dense_sums(range(8), memory=2_300)
    assert summed_together == [4] * 3 * 2


@hypothesis.given(st.integers(0, 200), st.integers(1, 200), st.data())
def test_an_answer_from_kept_blocks_has_the_bits_of_a_fresh_one(first, count, data):
    """Blocks that lie wholly in two ranges may be taken from the other's work."""
    values = np.random.default_rng(0).normal(size=400 * 4).astype(np.float32).reshape(400, 4)
    size = 4  # steps in a block

    def block_state(block, start, stop):
        total = np.float32(0)
        for step in range(max(start, block * size), min(stop, (block + 1) * size)):
            total = np.float32(total + values[step].sum(dtype=np.float32))
        return total

    stop = first + count
    blocks = range(first // size, (stop - 1) // size + 1)
    fresh, kept = Blocks(np.add), Blocks(np.add)
    known = {b: block_state(b, 0, 10**6) for b in range(100)}
    for block in blocks:
        fresh.close(block, block_state(block, first, stop))
        whole = block * size >= first and (block + 1) * size <= stop
        kept.close(block, known[block] if whole else block_state(block, first, stop))
    assert fresh.result().tobytes() == kept.result().tobytes()
    middle = data.draw(st.integers(0, len(blocks)))
    grown = Blocks(np.add)
    for block in blocks[:middle]:
        grown.close(block, block_state(block, first, stop))
    grown = grown.copy()
    for block in blocks[middle:]:
        grown.close(block, block_state(block, first, stop))
    assert grown.result().tobytes() == fresh.result().tobytes()


def test_the_order_of_sums_is_the_one_that_is_written_down():
    join = Blocks(lambda a, b: f"({a}{b})")
    for block, name in enumerate("abcdefg", start=1):
        join.close(block, name)
    assert join.result() == "((a(bc))((de)(fg)))"
    assert BLOCK_STEPS == 64
    assert Blocks(np.add).result() is None


# ------------------------------------------------------------------------------- recorded steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("reduce") / "run")


@pytest.fixture(scope="module")
def walked(run):
    """What a loop over the run's trajectory computes by `vmap(grad)`: ids, gradients by step."""
    grad = jax.vmap(jax.grad(tiny.loss), (None, 0, 0))
    steps = list(run.trajectory())
    grads = [grad(step.state.params, step.batch, step.keys[1]) for step in steps]
    return np.stack([s.ids for s in steps]), jax.tree.map(lambda *g: np.stack(g), *grads)


@pytest.mark.parametrize("strategy", ["factored", "scan", "auto"])
def test_a_run_answers_for_the_gradients_of_its_samples(run, walked, strategy):
    ids, grads = walked
    found = run.reduce(Sum("square"), TopK(3), Norm(), Sum(), strategy=strategy)
    squares, (values, occurrences), norms, _ = found.answers
    flat = jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), grads)
    close(squares, jax.tree.map(lambda g: np.square(g).sum(0), flat))
    close(values, jax.tree.map(lambda g: -np.sort(-np.abs(g), 0)[:3], flat))
    rows = np.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(flat)], 1)
    close(norms, np.linalg.norm(rows, axis=1))
    order = np.argsort(-np.abs(flat["hidden"]), axis=0, kind="stable")[:3]
    assert occurrences["hidden"].tolist() == order.tolist()
    assert run.samples_at(occurrences["hidden"]).tolist() == ids.reshape(-1)[order].tolist()
    assert found.occurrences.tolist() == list(range(tiny.STEPS * tiny.BATCH))
    assert found.grade == replay.Grade.BITWISE
    assert found.gap < 1e-6
    assert found.deviation == 0
    if strategy != "auto":
        assert set(found.strategies.values()) == {strategy}


def test_the_gap_tells_of_another_gradient(run, monkeypatch):
    steps = run._replayer.steps

    def doubled(*arguments, **options):
        for replayed in steps(*arguments, **options):
            executed = replayed.executed
            executed = executed._replace(grads=[2 * grad for grad in executed.grads])
            yield replayed._replace(executed=executed)

    monkeypatch.setattr(run._replayer, "steps", doubled)
    found = run.reduce(Norm(), steps=slice(5, 7), strategy="factored")
    assert abs(found.gap - 0.5) < 1e-6


def test_a_range_of_steps_is_answered_alone(run, walked):
    _, grads = walked
    found = run.reduce(Max(), steps=slice(5, 7))
    close(found.answers[0], jax.tree.map(lambda g: np.abs(g[5:7]).max((0, 1)), grads))
    assert found.steps == range(5, 7)
    assert found.grade == replay.Grade.UNAUDITED
    with pytest.raises(replay.OrderError, match="without a stride"):
        run.reduce(Max(), steps=slice(0, 8, 2))
    with pytest.raises(replay.OrderError, match="at least one step"):
        run.reduce(Max(), steps=slice(8, 8))


def test_padding_is_no_sample(tmp_path):
    order = replay.Order.shuffled(6, 2, seed=1, pad=True)
    run = tiny.record(tmp_path / "run", order=order)
    found = run.reduce(Histogram((0.5,)), Norm(), TopK(40))
    assert int(found.answers[0]["out"].sum()) == 2 * tiny.SAMPLES * 5
    assert len(found.answers[1]) == 2 * tiny.SAMPLES
    occurrences = found.answers[2][1]["out"]
    assert (run.samples_at(occurrences)[: 2 * tiny.SAMPLES] >= 0).all()
    assert (occurrences[2 * tiny.SAMPLES :] == -1).all()
    assert found.gap < 1e-6


def test_tensors_without_factors_are_computed_sample_by_sample(tmp_path):
    def tied(params, example, key):
        return tiny.loss(params, example, key) + jnp.square(params["out"]).sum()

    run = tiny.record(tmp_path / "run", tiny.program(tied))
    found = run.reduce(Sum("square"), strategy="factored")
    assert found.strategies == {"hidden": "factored", "out": "scan"}
    grad = jax.vmap(jax.grad(tied), (None, 0, 0))
    squares = [
        jax.tree.map(
            lambda g: jnp.square(g).sum(0), grad(step.state.params, step.batch, step.keys[1])
        )
        for step in run.trajectory()
    ]
    close(found.answers[0], jax.tree.map(lambda *parts: sum(parts), *squares))


def test_weights_that_are_joined_before_they_meet_the_data_keep_factors_of_their_own(tmp_path):
    def joined(params, example, key):
        gates = example["x"] @ jnp.concatenate([params["a"], params["b"]], axis=1)
        return jnp.sin(gates).sum() - example["y"]

    weights = {"a": normal(3, 2), "b": normal(3, 3, seed=1)}
    run = tiny.record(tmp_path / "run", tiny.program(joined, weights))
    table = run.log.header.programs["factors"]["table"]
    assert [entry["leaves"][1][0][-1] for entry in table] == [2, 3], "each its own columns"
    found = run.reduce(Sum("square"), strategy="factored")
    assert found.strategies == {"a": "factored", "b": "factored"}
    grad = jax.vmap(jax.grad(joined), (None, 0, None))
    squares = [
        jax.tree.map(lambda g: jnp.square(g).sum(0), grad(s.state.params, s.batch, None))
        for s in run.trajectory()
    ]
    close(found.answers[0], jax.tree.map(lambda *parts: sum(parts), *squares))


def attention(params, example, key):
    heads = jnp.tanh(jnp.einsum("x,xhd->hd", example["x"], params["in"]))
    return jnp.einsum("hd,hdx->x", heads, params["out"]).sum() - example["y"]


HEADS = {"in": normal(3, 2, 4), "out": normal(2, 4, 3, seed=1)}


@pytest.mark.parametrize("dispatch", ["step", "block"])
def test_an_index_sees_gradients_that_lie_in_another_order(tmp_path, dispatch):
    options = {"dispatch": dispatch, "index": "scalars"}
    run = tiny.record(tmp_path / "run", tiny.program(attention, HEADS), **options)
    for name in HEADS:
        expected = abs(run.grads[name]).max("weight").compute(index=False)["value"].values
        assert (run.history()[f"grads_max/{name}"] == expected).all()


@pytest.mark.parametrize("dispatch", ["step", "block"])
def test_gradients_that_a_program_lays_out_in_another_order_are_seen_as_all_others(
    tmp_path, dispatch
):
    run = tiny.record(tmp_path / "run", tiny.program(attention, HEADS), dispatch=dispatch)
    engine = run._replayer.engine(0, keep=True)
    assert engine._turned == [0, 1], "else there is nothing to be seen"
    twice = jax.jit(lambda x: x * 2)
    for step in run.trajectory(5, 8):
        expected = jax.grad(
            lambda p, s=step: jax.vmap(attention, (None, 0, None))(p, s.batch, None).mean()
        )
        close(step.grads, expected(step.state.params))
        for leaf in step.grads.values():
            assert leaf.format.layout.major_to_minor == (0, 1, 2)
            assert np.array_equal(twice(leaf), np.asarray(leaf) * 2)


@pytest.mark.parametrize(("step", "ahead"), [(5, 2**27), (tiny.STEPS - 1, 2**27), (5, 0)])
def test_losses_that_depart_from_the_log_are_noticed_before_there_is_an_answer(
    tmp_path, monkeypatch, step, ahead
):
    monkeypatch.setattr(replaying, "AHEAD_BYTES", ahead)  # 0: nobody runs ahead of the device
    run = tiny.record(tmp_path / "run")
    changed = replay.open(run.path)
    column = changed.log.column
    assert changed._replayer.ahead == (replaying.LATE if ahead else 1)

    def one_other(name, start, stop):
        values = np.array(column(name, start, stop))
        if name == "witness" and start <= step < stop:
            values[step - start] ^= 1
        return values

    changed.log.column = one_other
    with pytest.raises(replay.DivergenceError, match=f"the losses of step {step}"):
        changed.reduce(Sum("square"))
    with pytest.warns(UserWarning, match=f"the losses of step {step}"):
        found = changed.reduce(Sum("square"), exact=False)
    assert found.grade == replay.Grade.NUMERIC


def test_a_program_that_does_not_know_single_samples_says_so(tmp_path):
    whole = tiny.program()
    program = replay.Program.from_functions(whole.init, whole.gradient, whole.update)
    run = tiny.record(tmp_path / "run", program)
    with pytest.raises(replay.ProgramError, match="no program for the gradient of one sample"):
        run.reduce(Max())


@pytest.mark.parametrize(
    "change",
    [
        {"way": "guess"},
        {"kind": "Inner"},
        {"moves": [["reshape", [5, 3]]]},
        {"moves": [["tobytes", [3, 5]]]},
        {"moves": [["transpose", [0, 1, 1]]]},
        {"value": [3, 6]},
        {"leaves": [[[4, 1, 1, 3], "float32"]]},
        {"leaves": [[[4, 1, 1, 3], "float32"], [[4, 1, 1, 9], "float32"]]},
        {"leaves": [[[4, 1, 1, 2**50], "float32"], [[4, 1, 1, 5], "float32"]]},
        {"leaves": [[[4, 1, 1, 3], "object"], [[4, 1, 1, 5], "float32"]]},
    ],
)
def test_a_forged_table_of_factors_is_refused(run, tmp_path, change):
    for file in replay.store.Place(run.path).list():
        data = replay.store.Place(run.path).read(file)
        if file == HEADER:
            header = only_frame(data, HEADER)
            header["programs"]["factors"]["table"][0] |= change
            data = frame(header)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(data)
    forged = replay.open(tmp_path)
    with pytest.raises(replay.LogError, match="'factors'|program/factors"):
        forged.reduce(Max(), strategy="factored", steps=slice(0, 1))


def test_factors_of_a_narrow_dtype_are_reduced_in_float32(tmp_path):
    def half(params, example, key):
        x = example["x"].astype(jnp.bfloat16)
        hidden = jnp.tanh(x @ params["hidden"].astype(jnp.bfloat16)).astype(jnp.float32)
        return jnp.square(hidden @ params["out"] - example["y"])

    program = replay.Program(tiny.WEIGHTS, half, optax.sgd(0.1))
    run = tiny.record(tmp_path / "run", program)
    found = run.reduce(Sum("square"), Norm())
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.answers)} == {"float32"}


def test_reductions_are_frozen_and_tell_themselves_apart():
    assert {Sum(), Sum("value"), Max("value"), Min("value")} == {Sum(), Max("value"), Min("value")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sum().of = "square"
