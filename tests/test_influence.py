"""Idealised TracIn against gradients that an independent loop takes at the states of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from models import BATCH, Case
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay.influence import rates
from replay.program import Inputs

# A gradient in float32 is the end of a chain of rounded operations, some dozens in the deepest of
# these models; each moves it by at most 2^-24 of its length, where nothing cancels, and most go
# opposite ways (small models measure 3 to 7 such units). A product has two such chains.
ROUNDINGS = 32 * 2.0**-24


def keys_of(run, step, ids):
    key = jax.random.wrap_key_data(jnp.asarray(run.log.header.key, jnp.uint32))
    ids = jnp.asarray(ids, jnp.int32)
    return Inputs.fold(key, jnp.uint32(step), ids, None, ()).sample_keys


def brute(run, loss, data, others, steps, rate):
    """Return the scores of all samples, and sums of products of lengths, which bound rounding."""
    samples, count = len(jax.tree.leaves(data)[0]), len(jax.tree.leaves(others)[0])
    scores, lengths = np.zeros((2, samples, count))
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    for step in run.trajectory(steps.start, steps.stop):
        params, valid = step.state.params, np.flatnonzero(step.ids >= 0)
        ids = step.ids[valid]
        batch = jax.tree.map(lambda x, ids=ids: x[ids], data)
        mine = flat(gradients(params, batch, keys_of(run, step.step, ids)))
        keys = keys_of(run, step.step, np.arange(count))
        theirs = flat(gradients(params, others, keys))
        factor = rate * np.asarray(step.weights, np.float64)[valid] / len(step.ids)
        for position, i in enumerate(ids):
            scores[i] += factor[position] * (theirs @ mine[position])
            norms = np.linalg.norm(mine[position]) * np.linalg.norm(theirs, axis=1)
            lengths[i] += abs(factor[position]) * norms
    return scores, lengths


def flat(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def check(found, truth, lengths):
    error = np.abs(found - truth)
    assert np.abs(truth).max() > 100 * ROUNDINGS * lengths.max()  # there is something to be wrong
    assert (error <= ROUNDINGS * lengths).all(), (error / lengths.clip(1e-30)).max() / 2**-24


def recorded(case, path, **options):
    with case.recorder(path, **options) as recorder:
        recorder.advance()
    return replay.open(path, program=case.program())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("influence") / "run")


OTHERS = {"x": tiny.DATA["x"][:6] + np.float32(0.5), "y": tiny.DATA["y"][:6]}
RATE = 0.05


# ------------------------------------------------------------------------------ against the truth


@pytest.mark.parametrize(
    ("case", "steps", "strategies"),
    [
        (Case("dense", "momentum", pad=True, weighted=True), range(8, 25), "factored"),
        pytest.param(
            *(Case("lstm", "clipped_adam", "block"), range(30, 34), "factored"),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(Case("transformer", "clipped_adam"), range(40, 43), "factored, scan"),
            marks=pytest.mark.full,
        ),
    ],
    ids=str,
)
def test_scores_are_sums_of_products_of_gradients_at_the_states_of_the_run(
    case, steps, strategies, tmp_path
):
    run = recorded(case, tmp_path / "run")
    others = jax.tree.map(lambda x: x[5:16], case.data)  # a batch, and one that is filled up
    found = run.tracin(others, learning_rate=0.01, steps=slice(steps.start, steps.stop))
    truth, lengths = brute(run, case.program().sample_loss, case.data, others, steps, 0.01)
    visited = np.unique(run.ids(steps.start, steps.stop))
    visited = visited[visited >= 0]
    assert found["sample"].values.tolist() == visited.tolist()
    assert found["value"].shape == (len(visited), 11) and found["value"].dtype == np.float64
    assert found.attrs["strategies"] == strategies
    check(found["value"].values, truth[visited], lengths[visited])


SHAPES = {"table": (11, 4), "narrow": (4, 6), "wide": (6, 24), "bias": (24,), "tied": (24, 24)}


def of_all_forms(params, example, key):
    """A table, a product over time that is multiplied out and one that is not, and a tied one."""
    h = params["table"][example["tokens"]]
    h = jnp.tanh(h @ params["narrow"] * jax.random.bernoulli(key, 0.8, (4, 1)).astype(jnp.float32))
    h = jnp.tanh(h @ params["wide"] + params["bias"][None])
    return (jnp.tanh(jnp.tanh(h @ params["tied"]) @ params["tied"]).sum() - example["y"]) ** 2


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["factored", "scan"])
def test_gradients_of_every_form_are_multiplied(strategy, tmp_path):
    random = np.random.Generator(np.random.Philox(3))
    weights = {k: random.normal(0, 0.4, shape).astype(np.float32) for k, shape in SHAPES.items()}
    tokens = random.integers(0, 11, (10, 4)).astype(np.int32)
    data = {"tokens": tokens, "y": random.normal(size=10).astype(np.float32)}
    program = replay.Program(weights, of_all_forms, optax.adam(1e-2))
    order = replay.Order.shuffled(batch_size=4, epochs=3, seed=2, pad=True)
    run = tiny.record(tmp_path / "run", program, data, order)
    others = jax.tree.map(lambda x: x[:6], data)
    found = run.tracin(others, learning_rate=0.01, strategy=strategy, self_influence=True)
    truth, lengths = brute(run, of_all_forms, data, others, range(run.steps), 0.01)
    assert found.attrs["strategies"] == ("factored, scan" if strategy == "factored" else "scan")
    check(found["value"].values, truth, lengths)
    own = found["self_influence"].values[:6]
    check(own, np.diag(truth), np.diag(lengths))


@pytest.mark.full
def test_a_loss_of_a_whole_batch_is_one_of_each_sample_in_its_batch(tmp_path):
    case = Case("convolution", "adamw")
    run, program = recorded(case, tmp_path / "run"), case.program()
    others = jax.tree.map(lambda x: x[20:23], case.data)
    found = run.tracin(others, learning_rate=0.5, steps=slice(20, 21))
    (step,) = run.trajectory(20, 21)
    padded = jax.tree.map(lambda x: x[np.array([0, 1, 2, 0, 0, 0, 0, 0])], others)

    @jax.jit
    def gradients(state, batch, ids):
        def losses(params):
            inputs = Inputs.fold(case.key, jnp.uint32(20), ids, jnp.ones(BATCH), batch)
            assert program.losses is not None
            return program.losses(state._replace(params=params), inputs)

        return jax.jacrev(losses)(state.params)

    mine = flat(gradients(step.state, step.batch, jnp.asarray(step.ids)))
    places = jnp.asarray([0, 1, 2, -1, -1, -1, -1, -1], jnp.int32)
    theirs = flat(gradients(step.state, padded, places))[:3]
    lengths = np.linalg.norm(mine, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)
    scores = found["value"].sel(sample=step.ids).values
    assert found.attrs["strategies"] == "scan"
    check(scores, 0.5 / BATCH * mine @ theirs.T, 0.5 / BATCH * lengths)


def line(path, order, *, x, weights=None, rate=0.1):
    """Record a training of one weight, whose gradient is (w x - y) x, with w = 1 before step 0."""

    def loss(params, example, key):
        return 0.5 * (params["w"] * example["x"] - example["y"]) ** 2

    program = replay.Program({"w": np.float32(1.0)}, loss, optax.sgd(rate))
    data = {"x": np.asarray(x, np.float32), "y": np.zeros(len(x), np.float32)}
    with replay.Recorder(
        path, program, data, order, key=jax.random.key(0), self_test=False, sample_weights=weights
    ) as recorder:
        recorder.advance()
    return replay.open(path)


ONCE = replay.Order.explicit([[0, 1]])
THREE = {
    "x": np.array([3.0], np.float32),
    "y": np.array([0.0], np.float32),
}  # its gradient at w = 1 is 9


def test_one_step_of_one_weight_can_be_checked_by_hand(tmp_path):
    run = line(tmp_path / "run", ONCE, x=[1.0, 2.0])
    found = run.tracin(THREE, learning_rate=0.1, self_influence=True)
    assert found["value"].values.tolist() == [[0.1 / 2 * 1 * 9], [0.1 / 2 * 4 * 9]]
    assert found["self_influence"].values.tolist() == [0.1 / 2 * 1, 0.1 / 2 * 16]
    assert found["visits"].values.tolist() == [1, 1]


def test_a_sample_that_occurs_twice_in_a_batch_counts_twice(tmp_path):
    order = replay.Order.explicit([[1, 1, 0], [0, 0, 0]])
    run = line(tmp_path / "run", order, x=[1.0, 2.0])
    found = run.tracin(THREE, learning_rate=[0.3, 0.0], self_influence=True)
    assert found["value"].values.tolist() == [[0.3 / 3 * 9], [0.3 / 3 * 36 + 0.3 / 3 * 36]]
    assert found["self_influence"].values.tolist() == [0.3 / 3 * 1, 0.3 / 3 * 16 + 0.3 / 3 * 16]
    assert found["visits"].values.tolist() == [4, 2]


def test_what_fills_up_a_short_batch_counts_for_nothing(tmp_path):
    order = replay.Order.sequential(batch_size=3, epochs=1, pad=True)
    run = line(tmp_path / "run", order, x=[1.0, 2.0])
    assert run.ids(0, 1).tolist() == [[0, 1, -1]]
    found = run.tracin(THREE, learning_rate=0.3)
    assert found["value"].values.tolist() == [[0.3 / 3 * 9], [0.3 / 3 * 36]]


def test_a_sample_of_weight_zero_moves_nothing(tmp_path):
    weights = np.array([0.0, 0.5], np.float32)
    run = line(tmp_path / "run", ONCE, x=[1.0, 2.0], weights=weights)
    found = run.tracin(THREE, learning_rate=0.1)
    assert found["value"].values.tolist() == [[0.0], [0.1 * 0.5 / 2 * 36]]


def test_the_scores_of_a_small_step_add_up_to_the_loss_that_it_took_away(tmp_path):
    rate = 2.0**-10
    run = line(tmp_path / "run", ONCE, x=[1.0, 2.0], rate=rate)
    found = run.tracin(THREE, learning_rate=rate)["value"].values.sum()
    before, after = (float(0.5 * (state.params["w"] * 3) ** 2) for _, state in run.states(slice(2)))
    # The second order: half of lr^2 times the second derivative 9 and the squared mean gradient.
    second = 0.5 * 9 * (rate * 2.5) ** 2
    assert abs(before - after - (found - second)) < 2.0**-20


# --------------------------------------------------------------------------- what may be asked for


def test_a_learning_rate_is_a_number_one_for_each_step_or_a_schedule(run):
    schedule = optax.linear_schedule(0.5, 0.25, 8)
    number = run.tracin(OTHERS, learning_rate=0.5, steps=slice(0, 9))["value"].values
    column = np.full(tiny.STEPS, 0.5)
    assert (run.tracin(OTHERS, learning_rate=column, steps=slice(0, 9))["value"] == number).all()
    scheduled = run.tracin(OTHERS, learning_rate=schedule, steps=slice(0, 9))
    column[:9] = [np.asarray(schedule(t)).item() for t in range(9)]
    expected = run.tracin(OTHERS, learning_rate=column, steps=slice(0, 9))
    assert (scheduled["value"].values == expected["value"].values).all()
    assert scheduled.attrs["learning_rate"] == "0.25 to 0.5"
    assert (run.tracin(OTHERS, learning_rate=-0.5, steps=slice(0, 9))["value"] == -number).all()


def test_a_schedule_may_branch_on_the_step_or_use_numpy():
    assert rates(lambda t: 0.5 if t < 2 else 0.25, [1, 2], 3) == {1: 0.5, 2: 0.25}
    table = np.array([1.0, 0.5, 0.25])
    assert rates(lambda t: table[t], [0, 2], 3) == {0: 1.0, 2: 0.25}


def test_a_step_at_rate_zero_is_as_good_as_left_out(run):
    column = np.zeros(tiny.STEPS)
    column[6:12] = RATE
    samples = np.unique(run.ids(6, 12))
    whole = run.tracin(OTHERS, learning_rate=column)["value"].sel(sample=samples)
    part = run.tracin(OTHERS, learning_rate=RATE, steps=slice(6, 12))
    assert (whole.values == part["value"].values).all()
    assert part.attrs["grade"] == "UNAUDITED" and part.attrs["steps"] == 6


def test_chosen_samples_have_the_rows_that_they_have_among_all(run):
    whole = run.tracin(OTHERS, learning_rate=RATE)
    chosen = run.tracin(OTHERS, learning_rate=RATE, samples=[9, 2])
    assert chosen["sample"].values.tolist() == [9, 2]
    assert (chosen["value"].values == whole["value"].sel(sample=[9, 2]).values).all()
    assert whole["visits"].values.tolist() == [tiny.STEPS * tiny.BATCH // tiny.SAMPLES] * 16
    assert whole.attrs["grade"] == "BITWISE" and "TracIn" in whole.attrs["rule"]


def test_the_score_of_one_other_does_not_depend_on_those_that_are_asked_with_it(run):
    six = run.tracin(OTHERS, learning_rate=RATE)["value"].values
    two = jax.tree.map(lambda x: x[:2], OTHERS)
    assert (run.tracin(two, learning_rate=RATE)["value"].values == six[:, :2]).all()


def test_without_factors_the_scores_are_the_same_but_for_rounding_and_in_any_memory(run):
    options = {"learning_rate": RATE, "self_influence": True}
    factored = run.tracin(OTHERS, **options)
    scanned = run.tracin(OTHERS, strategy="scan", **options)
    # A gradient of 20 weights in float32 takes 80 bytes: two of a batch, and two of the others.
    little = run.tracin(OTHERS, strategy="scan", memory=800, **options)
    assert scanned.attrs["strategies"] == "scan" != factored.attrs["strategies"]
    for name in ("value", "self_influence"):
        np.testing.assert_allclose(scanned[name], factored[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(little[name], scanned[name], rtol=1e-5, atol=1e-6)


def test_what_a_sample_does_to_itself_is_its_score_for_itself(run):
    found = run.tracin(tiny.DATA, learning_rate=RATE, self_influence=True)
    own = found["self_influence"].values
    assert own.min() > 0
    np.testing.assert_allclose(np.diag(found["value"].values), own, rtol=ROUNDINGS)


def test_at_chosen_states_every_sample_is_visited_once(run):
    found = run.tracin(OTHERS, learning_rate=RATE, checkpoints=[-1, 8])
    truth, lengths = np.zeros((2, 16, 6))
    gradients = jax.vmap(jax.grad(tiny.loss), (None, 0, 0))
    for state in (8, 24):
        params = run.state(state).params
        mine = flat(gradients(params, tiny.DATA, keys_of(run, state, np.arange(16))))
        theirs = flat(gradients(params, OTHERS, keys_of(run, state, np.arange(6))))
        truth += RATE / tiny.BATCH * mine @ theirs.T
        norms = np.linalg.norm(mine, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)
        lengths += RATE / tiny.BATCH * norms
    check(found["value"].values, truth, lengths)
    assert found["visits"].values.tolist() == [2] * 16
    assert [type(state) for state in found.attrs["states"]] == [int, int]
    assert found.attrs["states"] == [8, 24] and found.attrs["grade"] == "BITWISE"
    between = run.tracin(OTHERS, learning_rate=RATE, checkpoints=[9], samples=[3])
    assert between.attrs["grade"] == "UNAUDITED" and between["value"].shape == (1, 6)


def test_a_fork_is_scored_over_the_steps_it_shares_and_over_its_own(run, tmp_path):
    fork = run.fork(tmp_path / "fork", at=12, sample_weights={3: 0.0})
    for strategy in ("factored", "scan"):
        options = {"learning_rate": RATE, "strategy": strategy}
        shared = [x.tracin(OTHERS, steps=slice(4, 12), **options) for x in (run, fork)]
        assert (shared[0]["value"].values == shared[1]["value"].values).all()
        own = fork.tracin(OTHERS, steps=slice(12, 24), **options)["value"]
        parents = run.tracin(OTHERS, steps=slice(12, 24), **options)["value"]
        assert (own.sel(sample=3) == 0).all() and (parents.sel(sample=3) != 0).all()
        assert (own != parents).all()


# -------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": [0.1, 0.2]}, r"the learning rate has shape \[2\]"),
        ({"learning_rate": float("nan")}, "the learning rate of step 0 is nan"),
        ({"learning_rate": lambda t: [0.1, t]}, r"of a step has shape \[2\]"),
        ({"learning_rate": np.ones(24), "checkpoints": [24]}, "of step 24 is not given"),
        ({"checkpoints": [25]}, r"checkpoints=\[25\] of a run with states 0 to 24"),
        ({"checkpoints": [24, -1]}, r"checkpoints=\[24, -1\]"),
        ({"checkpoints": []}, r"checkpoints=\[\]"),
        ({"checkpoints": [8], "steps": slice(3)}, "both steps and checkpoints are given"),
        ({"checkpoints": [[1], [2, 3]]}, r"checkpoints=\[\[1\], \[2, 3\]\]"),
        ({"samples": [[1], [2, 3]]}, r"asked for samples, \[\[1\], \[2, 3\]\]"),
        ({"samples": [0.5]}, r"asked for samples, \[0.5\]"),
        ({"learning_rate": "x"}, "the learning rate is 'x'"),
        ({"samples": [3, 16]}, r"asked for samples, \[16\] among them"),
        ({"samples": [3, 3]}, r"asked for samples, \[3, 3\]"),
        ({"samples": []}, r"asked for samples, \[\]"),
        ({"strategy": "vmap"}, "there is no strategy 'vmap'"),
        ({"memory": 100}, "scores of 16 samples for 6 others take 768 bytes"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_replayed(run, options, message):
    with pytest.raises(replay.QueryError, match=message) as caught:
        run.tracin(OTHERS, **{"learning_rate": 0.1, **options})
    assert caught.value.why and caught.value.fix


def test_examples_of_another_form_and_steps_that_are_not_there_are_refused(run, tmp_path):
    with pytest.raises(replay.DataError, match=r"examples of x: float32\[2\]"):
        run.tracin({"x": tiny.DATA["x"][:, :2], "y": tiny.DATA["y"]}, learning_rate=0.1)
    for steps in (slice(24, 30), slice(0, 24, 2)):
        with pytest.raises(replay.OrderError, match="of a run of 24"):
            run.tracin(OTHERS, learning_rate=0.1, steps=steps)


def test_a_run_without_the_gradient_of_one_sample_says_what_to_record(tmp_path):
    run = recorded(Case("loss_scaling", "accumulated"), tmp_path / "run")
    with pytest.raises(replay.ProgramError, match="no program for the gradient of one sample"):
        run.tracin(Case("loss_scaling", "accumulated").data, learning_rate=0.1)
