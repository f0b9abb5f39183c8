"""Lanes of counterfactuals against loops written here, real forks, and themselves."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import replay
from replay import counterfactuals, edited, effects, lanes
from replay.edits import Edit, all_orders, leave_one_out, leave_out, leave_some_out
from replay.errors import DataError, LogError, OrderError, ProgramError, QueryError
from replay.identity import threads
from replay.program import Inputs
from tests import models, tiny
from tests.tiny import compile_once  # noqa: F401  # a fixture

BOTH = pytest.mark.parametrize("form", lanes.FORMS)
# Two programs of the same mathematics differ by a few units in the last place (6e-8 of numbers
# near 1) at each of 24 steps of a smooth model.
ROUNDING = 2e-5


def flat(params):
    return jnp.concatenate([params["hidden"].reshape(-1), params["out"]])


def total(params):
    return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("counterfactuals") / "run"
    tiny.record(path)
    return path


@pytest.fixture(scope="module")
def run(path):
    return replay.open(path, program=tiny.PROGRAM)


def weights_after(ids, factors, start=0, params=None):
    """Train by a loop that shares nothing with replay but the loss: weights, momentum, keys."""
    optimizer = optax.sgd(0.05, momentum=0.9)
    params = dict(tiny.WEIGHTS) if params is None else params
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, number, ids, weights):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(tiny.KEY, number), ids.astype(jnp.uint32)
        )
        batch = {name: jnp.asarray(x)[ids] for name, x in tiny.DATA.items()}

        def mean(params):
            losses = jax.vmap(tiny.loss, (None, 0, 0))(params, batch, keys)
            return (losses * weights).sum() / tiny.BATCH

        updates, state = optimizer.update(jax.grad(mean)(params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(start, len(ids)):
        weights = np.asarray(factors, np.float32)[ids[number]]
        params, state = step(params, state, np.uint32(number), ids[number], weights)
    return np.asarray(flat(params))


IDS = tiny.ORDER.bind(tiny.SAMPLES)[:]


def without(*samples):
    factors = np.ones(tiny.SAMPLES, np.float32)
    factors[list(samples)] = 0
    return factors


# ------------------------------------------------------------------------------- right numbers


@BOTH
def test_lanes_agree_with_an_independent_loop_in_which_a_sample_is_masked(run, form):
    edits = [leave_out([3]), Edit(sample_weights={5: 0.5, 9: 2.0})]
    found = run.counterfactuals(edits, metric=flat, form=form)
    twice = without()
    twice[[5, 9]] = 0.5, 2.0
    for value, factors in zip(found.value.values, [without(3), twice], strict=True):
        np.testing.assert_allclose(value, weights_after(IDS, factors), rtol=0, atol=ROUNDING)
    unedited = weights_after(IDS, without())
    np.testing.assert_allclose(found.dataset["control"].values[0], unedited, rtol=0, atol=ROUNDING)
    assert abs(found.effect.values).max() > 100 * ROUNDING


@BOTH
def test_lanes_agree_with_an_independent_loop_in_another_order(run, form):
    edits = [
        Edit(order=lambda order: order.swap(4, 20)),
        Edit(order=lambda order: order.reversed(5), sample_weights={2: 0.0}),
        leave_out([2]),
    ]
    found = run.counterfactuals(edits, metric=flat, form=form)
    swapped = IDS.copy()
    swapped[[4, 20]] = IDS[[20, 4]]
    backwards = tiny.ORDER.reversed(5).bind(tiny.SAMPLES)[:]
    for value, ids, factors in zip(
        found.value.values,
        [swapped, backwards, IDS],
        [without(), without(2), without(2)],
        strict=True,
    ):
        np.testing.assert_allclose(value, weights_after(ids, factors), rtol=0, atol=ROUNDING)


def test_control_lanes_side_by_side_are_those_of_a_plain_vmap_loop(run):
    found = run.counterfactuals(leave_one_out(range(3)), metric=flat, form="vmap", lanes=4)
    program, size = tiny.PROGRAM, 4

    def step(state, number, ids):
        batch = {name: jnp.asarray(x)[ids] for name, x in tiny.DATA.items()}
        ones = jnp.ones(tiny.BATCH, jnp.float32)
        inputs = Inputs.fold(tiny.KEY, number, ids, ones, batch)
        losses, _, grads, carry = program.gradient(state, inputs)
        return program.update(state, carry, grads, losses)

    each = jax.jit(jax.vmap(step, (0, None, None)))
    start = program.init(jax.random.key(0))
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), start)
    for number in range(tiny.STEPS):
        states = each(states, np.uint32(number), IDS[number])
    expected = np.asarray(jax.vmap(flat)(states.params))
    np.testing.assert_allclose(
        found.dataset["control"].values, np.broadcast_to(expected[:1], (7, 20)), rtol=0, atol=1e-6
    )


@BOTH
def test_an_empty_edit_has_no_effect_and_equal_edits_have_the_same(run, form):
    once = leave_out([7])
    same = Edit(order=lambda order: order.swap(2, 3).swap(3, 2))
    found = run.counterfactuals([once, Edit(), once, same, *all_orders([0, 1])], form=form)
    effect = found.effect.values
    assert effect[1] == effect[3] == effect[4] == 0
    assert effect[0] == effect[2] != 0
    assert effect[5] != 0


def test_lanes_one_by_one_have_the_bits_of_the_run_and_of_real_forks(run, tmp_path):
    edits = [*leave_one_out([1, 2]), Edit(order=lambda order: order.swap(10, 12))]
    found = run.counterfactuals(edits, at=8, metric=flat, confirm=[2, 0], form="map")
    attrs = found.dataset.attrs
    assert attrs["control_deviation"] == attrs["control_weight_deviation"] == 0
    assert (found.dataset["recorded"].values == np.asarray(flat(run.state(-1).params))).all()
    assert found.confirmed["edit"].values.tolist() == [2, 0]
    assert (found.confirmed["difference"].values == 0).all()
    assert (found.confirmed["effect_by_fork"] == found.confirmed["effect_by_lane"]).all()
    fork = run.fork(tmp_path / "fork", edits[1], at=8)
    assert (found.value.values[1] == np.asarray(flat(fork.state(-1).params))).all()


@pytest.mark.full
@pytest.mark.parametrize("model", sorted(models.MODELS))
@pytest.mark.parametrize(("optimizer", "dispatch"), [("momentum", "step"), ("adamw", "block")])
def test_lanes_one_by_one_have_the_bits_of_the_run_for_every_model(
    model, optimizer, dispatch, tmp_path
):
    case = models.Case(model, optimizer, dispatch, weighted=dispatch == "block")
    with case.recorder(tmp_path / "run") as recorder:
        recorder.advance()
    run = replay.open(tmp_path / "run")
    found = run.counterfactuals([leave_out([3])], metric=total, form="map")
    exact = found.dataset.attrs["control_weight_deviation"] == 0
    # XLA computes a convolution otherwise in a loop; a run by blocks has it in a loop as well.
    assert exact or (model, dispatch) == ("convolution", "step")
    assert found.effect.values[0] != 0


def test_confirmed_edits_are_half_the_largest_and_half_drawn_by_the_seed(run):
    edits = leave_one_out(range(8))
    found = run.counterfactuals(edits, until=6, confirm=4, seed=1)
    chosen = found.confirmed["edit"].values.tolist()
    assert chosen[:2] == found.top(2)["edit"].tolist()
    assert len(set(chosen)) == 4
    assert (found.confirmed["difference"].values == 0).all()


@BOTH
def test_the_end_of_the_lanes_may_come_before_that_of_the_run(run, form):
    found = run.counterfactuals([leave_out([4])], at=5, until=11, metric=flat, form=form)
    np.testing.assert_allclose(
        found.dataset["recorded"].values, np.asarray(flat(run.state(11).params)), rtol=0, atol=0
    )
    assert found.dataset.attrs["control_weight_deviation"] < ROUNDING


@BOTH
def test_a_metric_of_samples_is_the_loss_of_each_with_its_key_at_that_state(run, form):
    others = {name: x[:10] + 1 for name, x in tiny.DATA.items()}
    found = run.counterfactuals([leave_out([3])], metric=others, until=9, form=form)
    asked = run.on(others).sample_losses.sel(state=9).compute()
    assert found.effect.dims == ("edit", "sample")
    expected = asked["value"].values.reshape(-1)
    np.testing.assert_allclose(found.dataset["recorded"].values, expected, rtol=1e-6, atol=0)


def test_by_default_the_metric_is_the_mean_loss_of_the_training_samples(run):
    found = run.counterfactuals([leave_out([3])])
    asked = run.on(tiny.DATA).sample_losses.sel(state=tiny.STEPS).compute()
    expected = asked["value"].values.mean()
    assert float(found.dataset["recorded"]) == pytest.approx(expected, rel=1e-6)
    assert found.dataset.attrs["metric"] == "mean training loss"


def test_padding_and_recorded_weights_are_those_of_the_run(tmp_path):
    order = replay.Order.shuffled(batch_size=4, epochs=3, seed=2, pad=True)
    data = {name: x[:14] for name, x in tiny.DATA.items()}
    factors = np.linspace(0, 2, 14, dtype=np.float32)
    run = tiny.record(tmp_path / "run", data=data, order=order, sample_weights=factors)
    found = run.counterfactuals([Edit(), leave_out([5]), Edit(sample_weights=jnp.asarray(factors))])
    assert found.dataset.attrs["control_weight_deviation"] == 0
    assert found.effect.values[0] == found.effect.values[2] == 0 != found.effect.values[1]
    assert found.changes.less.tolist() == [factors[5]]


def test_what_is_staged_and_how_lanes_are_dealt_out_changes_no_bit(run, monkeypatch):
    edits = [*leave_one_out(range(6)), Edit(order=lambda order: order.shuffled_again(4, 9))]
    expected = run.counterfactuals(edits, metric=flat)
    monkeypatch.setattr(edited, "_RESIDENT", 0)
    monkeypatch.setattr(edited, "_MOST_ROWS", 5)
    found = run.counterfactuals(edits, metric=flat, lanes=4)
    assert found.dataset.attrs["batches"] == 8
    assert (found.value.values == expected.value.values).all()
    assert (found.dataset["null_effect"].values == expected.dataset["null_effect"].values).all()


def test_data_of_a_user_has_one_reader_at_a_time(tmp_path, monkeypatch):
    reading, pause = threading.Lock(), threading.Event()

    class OneByOne:
        def __len__(self):
            return tiny.SAMPLES

        def __getitem__(self, sample):
            assert reading.acquire(blocking=False), "two read at once"
            pause.wait(1e-4)
            found = {name: x[int(sample)] for name, x in tiny.DATA.items()}
            reading.release()
            return found

    tiny.record(tmp_path / "run", embed=False)
    run = replay.open(tmp_path / "run", data=OneByOne())
    monkeypatch.setattr(edited, "_RESIDENT", 0)
    monkeypatch.setattr(counterfactuals, "_workers", lambda lanes: 4)
    found = run.counterfactuals(leave_one_out(range(8)), lanes=4)
    assert found.dataset.attrs["batches"] == 8 and found.effect.values.all()


def test_a_fork_has_counterfactuals_from_where_it_begins(run, tmp_path):
    fork = run.fork(tmp_path / "fork", at=8, sample_weights={3: 0.0})
    found = fork.counterfactuals([Edit(sample_weights={3: 1.0})], at=8, metric=flat)
    assert found.dataset.attrs["control_weight_deviation"] == 0
    assert (found.value.values[0] == np.asarray(flat(run.state(-1).params))).all()
    with pytest.raises(LogError, match="of a fork that begins at step 8"):
        fork.counterfactuals([leave_out([1])], at=7)


def test_scores_of_the_samples_that_are_left_out_are_enough(run, tmp_path):
    found = run.counterfactuals(leave_one_out([1, 4, 6]), metric=flat)
    scores = run.tracin(tiny.DATA, learning_rate=0.1, samples=[6, 1, 4])
    whole = np.zeros((16, 16))
    whole[[6, 1, 4]] = scores["value"].values
    alone = found.lds(scores.isel(test=0, drop=True))
    assert (alone.correlation == found.lds(whole[:, 0]).correlation).all()
    with pytest.raises(QueryError, match="say nothing of sample 4"):
        found.lds(run.tracin(tiny.DATA, learning_rate=0.1, samples=[6, 1]))
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[1:4] == b"PNG"


# --------------------------------------------------------------------------------------- noise


def test_null_lanes_differ_by_one_unit_in_the_last_place_of_one_weight():
    state = [np.array(x, np.float32) for x in ([[0, 1], [-2, 0]], [7], [0, 3])]
    after = [x + np.float32(1) for x in state]
    found = edited.nudges(state, after, [0, 2], 40, seed=3)
    assert found == edited.nudges(state, after, [0, 2], 40, seed=3)
    assert found != edited.nudges(state, after, [0, 2], 40, seed=4)
    assert {(x.leaf, x.index) for x in found} == {(0, 1), (0, 2), (2, 1)}
    for leaf, index, value in found:
        old = state[leaf].reshape(-1)[index]
        towards = np.float32(np.inf if value > old else -np.inf)
        assert np.float32(value) == np.nextafter(old, towards)


def test_null_lanes_leave_alone_what_the_training_has_not_moved():
    state = [np.array(x, np.float32) for x in ([[0, 1], [-2, 0]], [7], [0, 3])]
    after = [state[0] * np.float32([[1, 2], [1, 1]]), state[1], state[2] + np.float32([1, 0])]
    found = edited.nudges(state, after, [0, 2], 20, seed=3)
    assert {(x.leaf, x.index) for x in found} == {(0, 1)}
    still = edited.nudges(state, state, [0, 2], 20, seed=3)
    assert {(x.leaf, x.index) for x in still} == {(0, 1), (0, 2), (2, 1)}


def test_where_all_weights_are_zero_a_null_lane_has_the_smallest_normal_number():
    zeros = [np.zeros((2, 3), np.float32)]
    (nudge,) = edited.nudges(zeros, zeros, [0], 1, seed=0)
    assert nudge.leaf == 0 and 0 <= nudge.index < 6
    assert nudge.value == np.finfo(np.float32).tiny


def test_effects_come_in_units_of_the_spread_of_the_null_lanes(run):
    found = run.counterfactuals(leave_one_out([0, 1]), metric=flat, nulls=17)
    nulls = found.dataset["null_effect"].values
    assert nulls.shape == (17, 20)
    assert found.dataset["tensor"].values[0] in ("hidden", "out")
    noise = nulls.std(axis=0, ddof=1)
    assert (found.dataset["noise"].values == noise).all() and (noise > 0).all()
    felt = int((nulls != 0).any(axis=1).sum())
    assert f"changed the metric in {felt} of 17" in repr(found) and 1 < felt
    assert (found.effect_in_noise.values == found.effect.values / noise).all()
    assert abs(found.effect_in_noise.values).max() > 1e3


def test_where_null_lanes_agree_an_effect_is_in_no_units_and_the_answer_says_so(run):
    found = run.counterfactuals([leave_out([0])], metric=lambda params: jnp.stack([
        params["out"][0], jnp.ones(())
    ]))  # fmt: skip
    assert np.isnan(found.effect_in_noise.values[0, 1])
    assert np.isfinite(found.effect_in_noise.values[0, 0])
    assert found.dataset.attrs["without_noise"] == 1
    assert "null lanes have no spread in 1 of 2 components" in repr(found)


# --------------------------------------------------------------------------------------- cache


class Progress:
    """Notes what was reported, and interrupts at a report."""

    def __init__(self, at=None):
        self.seen, self.at = [], at

    def __call__(self, done, total):
        self.seen.append((done, total))
        if len(self.seen) == self.at:
            raise KeyboardInterrupt


EDITS = leave_one_out(range(8))


@pytest.fixture
def kept(path, tmp_path, monkeypatch):
    """A copy of the run, which keeps answers."""
    monkeypatch.setenv("REPLAY_CACHE_BYTES", str(2**24))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(path, tmp_path / "run")
    return tmp_path / "run"


def answer(path, progress, **options):
    run = replay.open(path, program=tiny.PROGRAM)
    settings = {"lanes": 5, "metric": flat, "progress": progress}
    return run.counterfactuals(EDITS, **settings | options)


def same(found, expected):
    names = ("value", "effect", "null_effect", "control")
    return all((found.dataset[n].values == expected.dataset[n].values).all() for n in names)


@pytest.mark.parametrize("form", ["map", pytest.param("vmap", marks=pytest.mark.full)])
def test_an_interrupted_call_goes_on_to_the_same_numbers(kept, path, form):
    expected = answer(path, None, cache=False, form=form)
    with pytest.raises(KeyboardInterrupt):
        answer(kept, Progress(at=3), form=form)
    again = Progress()
    found = answer(kept, again, form=form)
    assert again.seen[0][0] >= 8 and again.seen[-1] == (24, 24)
    assert same(found, expected)
    third = Progress()
    assert same(answer(kept, third, form=form), expected)
    assert third.seen == [(24, 24)]
    other = Progress()
    answer(kept, other, form=form, metric=lambda params: flat(params) + 1)
    assert other.seen[0] == (0, 24)  # another metric is another question


def test_a_killed_process_leaves_what_it_has_finished(kept, path):
    script = """
        import os, sys
        from tests import test_counterfactuals as here
        def progress(done, total):
            if done:
                os._exit(9)
        here.answer(sys.argv[1], progress)
    """
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(script), str(kept)]
    settings = {"PYTHONPATH": str(root), "NPROC": str(threads())}
    killed = subprocess.run(command, env={**os.environ, **settings}, cwd=root, timeout=300)
    assert killed.returncode == 9
    again = Progress()
    assert same(answer(kept, again), answer(path, None, cache=False))
    assert again.seen[0][0] >= 4


def test_damaged_and_foreign_entries_are_computed_anew(kept, monkeypatch, tmp_path):
    expected = answer(kept, None)
    files = [x for x in (kept / "cache" / "answers").rglob("*") if x.is_file()]
    damaged = [x for x in files if x.name != "zarr.json"]
    assert damaged
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    again = Progress()
    assert same(answer(kept, again), expected)
    assert again.seen[0] == (0, 24)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody else"))
    foreign = Progress()
    assert same(answer(kept, foreign), expected)
    assert foreign.seen[0] == (0, 24)


def test_confirmed_forks_are_kept_too(kept, monkeypatch):
    first = answer(kept, None, confirm=[4])
    monkeypatch.setattr(replay.Run, "fork", None)
    again = answer(kept, None, confirm=[4])
    assert again.confirmed is not None and first.confirmed is not None
    assert (again.confirmed["fork"].values == first.confirmed["fork"].values).all()


def test_other_samples_of_the_same_form_are_another_question(kept):
    sets = [{name: x[:10] + shift for name, x in tiny.DATA.items()} for shift in (0, 1)]
    first, second = (answer(kept, None, metric=x, confirm=[4]) for x in sets)
    fresh = answer(kept, None, metric=sets[1], confirm=[4], cache=False)
    assert same(second, fresh) and not same(first, second)
    assert (second.confirmed["fork"].values == fresh.confirmed["fork"].values).all()
    assert (second.confirmed["fork"].values != first.confirmed["fork"].values).any()
    assert (second.dataset["control"].values[0] == second.dataset["recorded"].values).all()


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("edits", "options", "error", "text"),
    [
        ([], {}, QueryError, "there are no edits"),
        ([Edit(), Edit(optimizer=optax.sgd(1.0))], {}, QueryError, "edit 1 .* changes optimizer"),
        ([Edit(key=jax.random.key(1), name="x")], {}, QueryError, r"edit 0 \(x\) changes key"),
        ([leave_out([99])], {}, DataError, r"edit 0 .*there is no sample 99"),
        (
            [leave_out([int(IDS[2, 0])])],
            {"at": 3, "until": 4},
            DataError,
            "edit 0 .*no batch of st",
        ),
        (
            [Edit(order=lambda order: order.drop([1]), name="drop")],
            {},
            OrderError,
            r"edit 0 \(drop\): the new order ends after",
        ),
        (
            [Edit(order=replay.Order.sequential(tiny.BATCH, epochs=6))],
            {"at": 2},
            OrderError,
            "edit 0 .*differs at step 0",
        ),
        ([Edit()], {"at": 5, "until": 5}, LogError, "from step 5 to state 5"),
        ([Edit()], {"until": 25}, LogError, "to state 25 of a run of 24 steps"),
        ([Edit()], {"nulls": 15}, QueryError, "15 null lanes"),
        ([Edit()], {"lanes": 1}, QueryError, "lanes=1"),
        ([Edit()], {"form": "loop"}, QueryError, "there is no form 'loop'"),
        ([Edit()], {"confirm": 2}, QueryError, "confirm=2 of 1 edits"),
        ([Edit()], {"confirm": [1]}, QueryError, "confirm=1 of 1 edits"),
        ([Edit()], {"memory": 100}, QueryError, "2 lanes take 0 MiB"),
        ([Edit()], {"metric": lambda p: (p["out"], p["out"])}, QueryError, "returned 2 leaves"),
        ([Edit()], {"metric": np.zeros((3, 7), np.float32)}, DataError, "examples of"),
        ([3], {}, QueryError, "edits has int in it"),
        (Edit(), {}, QueryError, "edits is a single edit"),
        ([Edit()], {"confirm": 1.0}, QueryError, "confirm=1.0 of 1 edits"),
        ([Edit()], {"confirm": [0.7]}, QueryError, r"confirm=\[0.7\] of 1 edits"),
        ([Edit()], {"seed": -1}, QueryError, "seed=-1"),
        ([Edit()], {"seed": 0.5}, QueryError, "seed=0.5"),
        (
            [Edit()],
            {"metric": lambda p: jax.lax.complex(*[p["out"]] * 2)},
            QueryError,
            r"returned complex64\[5\]",
        ),
        ([Edit()], {"metric": lambda p: p["out"][:0]}, QueryError, r"returned float32\[0\]"),
    ],
)
def test_what_cannot_be_answered_fails_at_the_call(run, edits, options, error, text):
    with pytest.raises(error, match=text) as caught:
        run.counterfactuals(edits, **options)
    assert caught.value.why and caught.value.fix


def test_lanes_side_by_side_need_the_program_and_one_by_one_do_not(path):
    run = replay.open(path)
    with pytest.raises(ProgramError, match="opened without its program") as caught:
        run.counterfactuals([Edit()], form="vmap")
    assert "replay.open(" in caught.value.fix and "program=program" in caught.value.fix
    assert run.counterfactuals([Edit()], form="map").effect.values.tolist() == [0]


def test_numbers_of_64_bits_need_a_process_with_x64(tmp_path):
    with jax.enable_x64(True):
        weights = {name: x.astype(np.float64) for name, x in tiny.WEIGHTS.items()}
        data = {name: x.astype(np.float64) for name, x in tiny.DATA.items()}

        def loss(params, example, key):
            return (jnp.tanh(example["x"] @ params["hidden"]) @ params["out"] - example["y"]) ** 2

        wide = tiny.record(tmp_path / "run", tiny.program(loss, weights), data)
        found = wide.counterfactuals([leave_out([3])], metric=lambda p: p["out"])
        assert found.effect.values.any() and found.dataset.attrs["control_weight_deviation"] == 0
    run = replay.open(tmp_path / "run")
    for ask in (
        lambda: run.counterfactuals([leave_out([3])]),
        lambda: run.updates.norm("weight").compute(),
        lambda: run.reduce(replay.reductions.Norm()),
    ):
        with pytest.raises(DataError, match="was recorded with x64: params/hidden is float64") as e:
            ask()
        assert "jax_enable_x64" in e.value.fix


def test_a_run_that_was_fed_has_no_counterfactuals(tmp_path):
    with replay.Recorder(tmp_path / "run", tiny.PROGRAM, key=tiny.KEY, self_test=False) as recorder:
        for row in IDS[:3]:
            recorder.feed({name: x[row] for name, x in tiny.DATA.items()})
    with pytest.raises(OrderError, match="was fed its batches"):
        replay.open(tmp_path / "run").counterfactuals([Edit()])


# ------------------------------------------------------------------------------------- reading


def test_scores_that_foretell_effects_have_a_score_of_one_and_others_less(run):
    edits = leave_some_out(range(tiny.SAMPLES), 5, count=12, seed=0)
    found = run.counterfactuals([*leave_one_out([2]), *edits], metric=lambda p: p["out"][:2])
    less = np.zeros((13, tiny.SAMPLES))
    less[found.changes.edit, found.changes.sample] = found.changes.less
    assert less.sum(1).tolist() == [1, *[5] * 12]
    scores = np.linalg.pinv(less) @ found.effect.values  # what a linear model would have to say
    score = found.lds(scores)
    assert score.correlation.shape == (2,) and score.correlation.min() > 0.99
    assert found.lds(-scores).mean == pytest.approx(-score.mean)
    assert found.lds(scores[:, 0]).correlation[0] == score.correlation[0]
    assert np.isnan(found.lds(np.zeros(tiny.SAMPLES)).mean)
    with pytest.raises(QueryError, match="the scores have shape"):
        found.lds(np.zeros((tiny.SAMPLES, 3)))


def test_lanes_that_have_diverged_come_first_and_have_no_rank(run):
    edits = [*leave_one_out(range(6)), Edit(sample_weights={3: 1e38}, name="boom")]
    with pytest.warns(RuntimeWarning, match="the mean loss of step"):  # of a real fork
        found = run.counterfactuals(edits, confirm=2, seed=0)
    effects_of = found.effect.values
    assert np.isnan(effects_of).tolist() == [False] * 6 + [True]
    assert found.top(2)["name"].tolist() == ["boom", edits[found.top(2)["edit"][1]].name]
    assert found.confirmed["name"].values[0] == "boom"
    scores = np.concatenate([effects_of[:6], np.ones(10)])
    assert found.lds(scores) == (1.0, 1.0, 1)
    assert run.counterfactuals(edits[:6]).lds(scores) == (1.0, 1.0, 0)
    assert np.isnan(found.lds(np.full(16, np.nan)).mean)
    assert np.isnan(effects.spearman(np.arange(3.0), np.array([0.0, np.nan, 1.0])))


def test_null_lanes_that_are_not_finite_are_not_said_to_agree(run):
    found = run.counterfactuals([leave_out([1])], metric=lambda params: jnp.stack([
        params["out"][0], jnp.log(-jnp.abs(params["out"][0])), jnp.ones(())
    ]))  # fmt: skip
    attrs = found.dataset.attrs
    assert (attrs["without_noise"], attrs["noise_not_finite"]) == (1, 1)
    assert "null lanes are not finite in 1 of 3 components" in repr(found)
    assert np.isnan(found.effect_in_noise.values[0, 1:]).all()
    assert np.isnan(effects.in_noise(np.ones(2), np.array([np.inf, 0]))).all()


def test_scores_of_samples_say_nothing_of_orders(run):
    found = run.counterfactuals(
        [Edit(), Edit(order=lambda order: order.swap(0, 1), name="swapped")]
    )
    with pytest.raises(QueryError, match="edit 'swapped' changes the order"):
        found.lds(np.zeros(tiny.SAMPLES))


def test_ranks_are_those_of_scipy_with_ties():
    draw = np.random.Generator(np.random.Philox(8))
    for _ in range(20):
        a, b = draw.integers(0, 5, (2, 12)).astype(float)
        assert effects.ranks(a).tolist() == scipy.stats.rankdata(a).tolist()
        expected, _ = scipy.stats.spearmanr(a, b)
        assert effects.spearman(a, b) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(effects.spearman(np.ones(4), np.arange(4.0)))


def test_an_answer_tells_its_largest_effects_and_draws_them(run):
    found = run.counterfactuals(leave_one_out(range(10)), metric=tiny.DATA)
    mean = found.effect.values.mean(1)
    first = int(np.argmax(abs(mean)))
    top = found.top(3)
    assert top["name"].tolist()[0] == f"without {first}" and len(top) == 3
    assert top["effect"][0] == mean[first]
    assert f"without {first}: {mean[first]:+.4g}" in repr(found)
    assert len(found.df()) == 10 * tiny.SAMPLES
    names = [t.get_text() for t in found.plot(largest=3).axes[1].get_yticklabels()]
    assert names == top["name"].tolist()
