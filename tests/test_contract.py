"""Whatever was recorded, every state of it can be had again, bit for bit.

The states are compared with those of an independent loop, the one that anybody would write: a
jitted step, batches picked by numpy, keys folded as the definitions say.
"""

import functools
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import (
    BATCH,
    EPOCHS,
    MODELS,
    OPTIMIZERS,
    SEED,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
)

import replay
from replay.identity import threads

TESTS = pathlib.Path(__file__).parent

DEFAULT = (
    Case("dense", "momentum", pad=True),
    Case("convolution", "adamw"),
    Case("lstm", "clipped_adam", "block"),
    Case("transformer", "clipped_adam"),
    Case("memory", "accumulated", "block"),
    Case("equinox", "plateau", weighted=True),
    Case("bfloat16", "adamw", "block"),
    Case("loss_scaling", "accumulated"),
)
PRODUCT = tuple(
    Case(model, optimizer, dispatch)
    for model, optimizer, dispatch in itertools.product(MODELS, OPTIMIZERS, ("step", "block"))
)
OF = {case.model: case for case in DEFAULT}
CASES = {str(case): case for case in (*DEFAULT, *PRODUCT)}
# Large enough for XLA to share one contraction or sum out among threads, which regroups it.
THREADED = (OF["convolution"], OF["transformer"])
KILLED = (OF["memory"],)  # by step, a dense network is killed in test_kill.py


def by_default(chosen):
    """Return the default cases, those that are not chosen as part of the complete matrix."""
    return [
        case if case in chosen else pytest.param(case, marks=pytest.mark.full) for case in DEFAULT
    ]


every_case = pytest.mark.parametrize(
    "replayed",
    [*DEFAULT, *(pytest.param(c, marks=pytest.mark.full) for c in PRODUCT if c not in DEFAULT)],
    ids=str,
    indirect=True,
)


# ------------------------------------------------------------------------------- the comparison


def bits(state):
    """Return path -> a hash of dtype, shape and every bit, for each leaf of a state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()
        ).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def first_difference(found, expected):
    """Name the first state and leaf that differ; None where all are equal."""
    if len(found) != len(expected):
        return f"{len(found)} states instead of {len(expected)}"
    for number, (here, there) in enumerate(zip(found, expected, strict=True)):
        for path in sorted({*here, *there}):
            if here.get(path) != there.get(path):
                return f"state {number}: {path}"
    return None


# -------------------------------------------------------------------------------- the reference


class Reference(NamedTuple):
    """What the independent loop computed.

    Attributes:
        states: the bits of states 0 to 48.
        losses: `[steps, batch]`.
        aux: what the loss reported besides, of each step.
        grads: the bits of the gradient of each step.
    """

    states: list[dict[str, str]]
    losses: np.ndarray
    aux: list[Any]
    grads: list[dict[str, str]]


def ids_of(case):
    """Return the sample of every occurrence, `int32[steps, batch]`, -1 where there is none."""
    if case.model == "memory":
        return np.array([[48 * s + t for s in range(BATCH)] for t in range(STEPS)], np.int32)
    occurrences = np.full((EPOCHS, STEPS_PER_EPOCH * BATCH), -1, np.int32)
    for epoch in range(EPOCHS):
        generator = np.random.Generator(np.random.Philox(key=np.array([SEED, epoch], np.uint64)))
        order = generator.permutation(case.samples)[: occurrences.shape[1]]
        occurrences[epoch, : len(order)] = order
    return occurrences.reshape(STEPS, BATCH)


def weights_of(case, ids):
    """Return the factor of every loss, `float32[steps, batch]`."""
    factors = np.linspace(0, 2, case.samples, dtype=np.float32)[ids] if case.weighted else 1
    return np.where(ids < 0, 0, factors).astype(np.float32)


@functools.cache
def compiled(case):
    """Return `init(key)` and `advance(state, inputs, step)` of a program of its own."""
    program = case.program()
    return jax.jit(program.init), {"step": by_step, "block": by_block}[case.dispatch](program)


def reference(case, masked=None):
    """Train without a recorder; a masked sample counts for nothing from a step on."""
    init, advance = compiled(case)
    ids, run_key = ids_of(case), jax.random.key(SEED)
    weights = weights_of(case, ids)
    if masked is not None:
        sample, start = masked
        weights[start:][ids[start:] == sample] = 0
    batches = {name: rows[np.maximum(ids, 0)] for name, rows in case.data.items()}
    inputs = staged(run_key, np.arange(STEPS, dtype=np.uint32), ids, weights, batches)
    state = init(jax.random.fold_in(run_key, np.uint32(2**32 - 1)))
    states, losses, aux, grads = [bits(state)], [], [], []
    for step in range(STEPS):
        state, *computed = advance(state, inputs, np.int32(step))
        states.append(bits(state))
        losses.append(np.asarray(computed[0]))
        aux.append(jax.device_get(computed[1]))
        grads.append(bits(computed[2]))
    return Reference(states, np.stack(losses), aux, grads)


@jax.jit
def staged(run_key, steps, ids, weights, batches):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(run_key, steps)
    fold_each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    sample_keys = fold_each(keys, ids.astype(jnp.uint32))
    return replay.Inputs(steps, ids, weights, batches, keys, sample_keys)


@jax.jit
def row(inputs, step):
    return jax.tree.map(lambda x: x[step], inputs)


def one_step(program, state, inputs):
    """Return `state, losses, aux, grads`: the definition of a step."""
    results = program.gradient(state, inputs)
    losses, aux, grads, carry = jax.lax.optimization_barrier(results)
    return program.update(state, carry, grads, losses), losses, aux, grads


def by_step(program):
    """Return `advance(state, inputs, step) -> state, losses, aux, grads`: one jitted function."""
    jitted = jax.jit(functools.partial(one_step, program))
    return lambda state, inputs, step: jitted(state, row(inputs, step))


def by_block(program):
    """Return `advance` as a compiled loop over all inputs, of which it is asked one turn a time.

    The loop carries the gradients, because the definition of a block does: a convolution in a loop
    has other bits where they are dropped.
    """

    def body(step, carried, inputs):
        return one_step(program, carried[0], row(inputs, step))

    @jax.jit
    def turns(state, inputs, start, stop):
        shapes = jax.eval_shape(body, start, (state,), inputs)[1:]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(start, stop, lambda i, c: body(i, c, inputs), (state, *blank))

    return lambda state, inputs, step: turns(state, inputs, step, step + np.int32(1))


# ------------------------------------------------------------------------------- the recordings


class Recording(NamedTuple):
    """Where a case is recorded, and what it has to be equal to."""

    path: pathlib.Path
    expected: Reference


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a function that records a case and runs its reference, once."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def recording(case):
        if case not in known:
            path = folder / str(case)
            record(case, path)
            known[case] = Recording(path, reference(case))
        return known[case]

    return recording


@pytest.fixture(scope="module")
def replayed(request, recorded):
    """Return a run opened without its code, for all tests of one case, and the reference."""
    path, expected = recorded(request.param)
    return replay.open(path), expected


def record(case, path, **options):
    with case.recorder(path, **options) as recorder:
        while recorder.advance(20):
            pass


def in_process(source, asked, *, count, expect=0):
    """Run source in a fresh, isolated Python with a thread count; JSON in, JSON out."""
    setup = f"import json, sys\nsys.path[:0] = {[str(TESTS.parent), str(TESTS)]}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{setup}asked = json.load(sys.stdin)\n{source}"],
        env={**os.environ, "NPROC": str(count)},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout) if done.stdout else None


# --------------------------------------------------------------------------------- the contract


@every_case
def test_every_state_is_that_of_an_independent_loop(replayed):
    run, expected = replayed
    numbers, states = zip(*run.states(slice(None)), strict=True)
    assert numbers == tuple(range(STEPS + 1))
    assert first_difference([bits(state) for state in states], expected.states) is None
    alone = (0, 5, 16, 31, 33, STEPS)
    found = [bits(run.state(number)) for number in alone]
    assert first_difference(found, [expected.states[number] for number in alone]) is None


@every_case
def test_an_audit_of_a_faithful_replay_is_bitwise(replayed):
    audit = replayed[0].verify()
    assert audit.grade is replay.Grade.BITWISE, str(audit)
    assert (audit.complete, audit.steps, len(audit.segments)) == (True, 48, 3)


@every_case
def test_a_replayed_step_has_the_losses_and_the_gradient_of_the_independent_loop(replayed):
    run, expected = replayed
    steps = list(run.trajectory(14, 18))
    assert [step.step for step in steps] == [14, 15, 16, 17]
    assert (np.stack([step.losses for step in steps]) == expected.losses[14:18]).all()
    assert first_difference([bits(step.grads) for step in steps], expected.grads[14:18]) is None


@every_case
def test_a_fork_without_an_edit_is_its_parent_at_every_step(replayed, tmp_path):
    run, expected = replayed
    fork = run.fork(tmp_path / "fork", at=20)
    audit = fork.verify()
    assert audit.grade is replay.Grade.BITWISE, str(audit)
    states = [bits(state) for _, state in replay.open(tmp_path / "fork").states(slice(None))]
    assert first_difference(states, expected.states) is None


@pytest.mark.parametrize("case", by_default((OF["convolution"],)), ids=str)
def test_a_fork_without_a_sample_is_an_independent_loop_with_that_sample_masked(
    case, recorded, tmp_path
):
    sample = int(ids_of(case)[20][2])
    run = replay.open(recorded(case).path)
    fork = run.fork(tmp_path / "fork", at=20, sample_weights={sample: 0.0})
    states = [bits(state) for _, state in fork.states(slice(None))]
    assert first_difference(states, reference(case, masked=(sample, 20)).states) is None
    assert states[:21] == recorded(case).expected.states[:21]
    assert states[21:] != recorded(case).expected.states[21:]


@pytest.mark.parametrize(
    "cases", [DEFAULT, pytest.param(PRODUCT, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_a_fresh_process_without_the_code_reaches_every_state(cases, recorded):
    source = f"""
import hashlib, numpy as np
for name in ("models", "flax", "equinox"):
    sys.modules[name] = None
import jax, replay

{inspect.getsource(bits)}
runs = [replay.open(path) for path in asked]
states = [[bits(state) for _, state in run.states(slice(None))] for run in runs]
print(json.dumps([states, [run._replayer._compiled_otherwise() for run in runs]]))
"""
    runs = [recorded(case) for case in cases]
    found, otherwise = in_process(source, [str(run.path) for run in runs], count=threads())
    assert not any(otherwise), "the compiler makes the same executables in every process"
    differences = {
        str(case): first_difference(states, run.expected.states)
        for case, states, run in zip(cases, found, runs, strict=True)
    }
    assert differences == dict.fromkeys(map(str, cases))


@pytest.mark.parametrize(
    ("model", "dispatch"),
    [
        pair if pair == ("memory", "block") else pytest.param(*pair, marks=pytest.mark.full)
        for pair in itertools.product(MODELS, ("step", "block"))
    ],
)
def test_the_gradients_that_are_seen_are_those_that_were_used(tmp_path, model, dispatch):
    """Descent by a power of two rounds once, so that it can be repeated outside the program."""
    case, program = Case(model, "momentum"), MODELS[model][0](optax.sgd(2**-3))
    with replay.Recorder(
        tmp_path, program, case.data, case.order, key=case.key, dispatch=dispatch, self_test=False
    ) as recorder:
        recorder.advance(12)
    moved = 0
    for step, after in itertools.pairwise(replay.open(tmp_path).trajectory(0, 12)):
        grads = jax.device_get(step.grads)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)):
            assert model == "loss_scaling", "the only model that leaves out such a step"
            continue
        moved += 1
        expected = jax.tree.map(
            lambda w, g: w - np.float32(2**-3) * g, jax.device_get(step.state.params), grads
        )
        assert bits(after.state.params) == bits(expected)
    assert moved > 4


# ------------------------------------------------------------------------------------- threads


class Elsewhere(NamedTuple):
    """What a process with another thread count made of a case.

    Attributes:
        run: recorded there, opened here.
        expected: the reference's states there.
        found: all states of the run that was recorded here, replayed there.
        forced: the grade of that run there, when it was replayed without a worker.
    """

    run: replay.Run
    expected: list[dict[str, str]]
    found: list[dict[str, str]]
    forced: str


def with_another_count(name, theirs, own):
    """Read the parent's run, record one, and run the reference, in a process of another count."""
    case = CASES[name]
    record(case, pathlib.Path(own))
    run, forced = replay.open(theirs), replay.open(theirs)
    # As if this were the machine of the recording: no worker.
    forced._replayer._here = forced.log.header.environment
    return {
        "expected": reference(case).states,
        "found": [bits(state) for _, state in run.states(slice(None))],
        "forced": str(forced.verify().grade),
    }


@pytest.fixture(scope="module")
def elsewhere(recorded, tmp_path_factory):
    """Return a function that hands a case to a process with another thread count, once."""
    folder, known = tmp_path_factory.mktemp("elsewhere"), {}
    source = (
        "import test_contract as t\nprint(json.dumps([t.with_another_count(*a) for a in asked]))"
    )

    def answer(case):
        if case not in known:
            own = str(folder / str(case))
            asked = [(str(case), str(recorded(case).path), own)]
            (found,) = in_process(source, asked, count=1 if threads() > 1 else 2)
            known[case] = Elsewhere(replay.open(own), **found)
        return known[case]

    return answer


@pytest.mark.parametrize("case", by_default(THREADED[:1]), ids=str)
def test_a_run_is_replayed_with_the_thread_count_it_was_recorded_with(case, recorded, elsewhere):
    there = elsewhere(case)
    assert there.run.log.header.environment["threads"] != threads()
    assert first_difference(there.found, recorded(case).expected.states) is None
    found = [bits(state) for _, state in there.run.states(slice(None))]
    assert first_difference(found, there.expected) is None


@pytest.mark.parametrize(
    "case", [THREADED[0], pytest.param(THREADED[1], marks=pytest.mark.full)], ids=str
)
def test_with_another_thread_count_the_bits_differ_and_an_audit_says_so(case, recorded, elsewhere):
    there = elsewhere(case)
    assert first_difference(there.expected, recorded(case).expected.states) is not None
    assert there.forced == "NUMERIC"


def test_walks_through_a_worker_may_take_turns_and_be_left_half_way(elsewhere):
    there = elsewhere(THREADED[0])
    turns = itertools.chain.from_iterable(
        zip(there.run.trajectory(0, 8), there.run.trajectory(30, 38), strict=True)
    )
    expected = [there.expected[t] for t in range(8) for t in (t, t + 30)]
    assert first_difference([bits(step.state) for step in turns], expected) is None
    left = there.run.trajectory(5)
    next(left)
    found = [bits(state) for _, state in there.run.states(slice(20, 24))]
    assert first_difference(found, there.expected[20:24]) is None
    assert first_difference([bits(next(left).state)], there.expected[6:7]) is None


# -------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("case", by_default(KILLED), ids=str)
def test_a_killed_run_goes_on_to_the_bits_it_would_have_had(case, recorded, tmp_path):
    expected, path = recorded(case).expected.states, tmp_path / "run"
    # When state 32 is handed over for storing, state 16 is durable; 37 is inside a segment.
    source = """
import os, pathlib, signal, test_contract
with test_contract.CASES[asked[0]].recorder(pathlib.Path(asked[1]), commit_steps=4) as recorder:
    recorder.advance(37)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    in_process(source, [str(case), str(path)], count=threads(), expect=-signal.SIGKILL)
    killed = replay.open(path)
    assert killed.checkpoints[:2] == [0, 16] and killed.steps <= 37 and "not closed" in repr(killed)
    found = [bits(state) for _, state in killed.states(slice(None))]
    assert first_difference(found, expected[: killed.steps + 1]) is None
    record(case, path, resume=True)
    resumed = replay.open(path)
    found = [bits(state) for _, state in resumed.states(slice(None))]
    assert first_difference(found, expected) is None


# -------------------------------------------------------------------------------------- columns


def test_logged_metrics_are_means_over_the_samples_that_count(recorded):
    case = OF["dense"]
    path, expected = recorded(case)
    weights, history = weights_of(case, ids_of(case)), replay.open(path).history()
    assert (weights == 0).sum() == 4 * EPOCHS
    for name in ("accuracy", "largest"):
        values = np.stack([aux[name] for aux in expected.aux]).astype(np.float64)
        means = np.average(values, axis=1, weights=weights)
        assert (history[name] == means.astype(np.float32)).all()
    losses = (expected.losses.astype(np.float64) * weights).sum(axis=1) / BATCH
    assert (history["loss"] == losses.astype(np.float32)).all()


# ------------------------------------------------------------- what makes these checks not empty


def test_the_comparison_sees_one_changed_bit_a_dtype_and_a_shape():
    state = {"a": np.ones(2, np.float32), "b": np.zeros((2, 2), np.int32)}
    expected = [bits(state), bits(state)]
    assert first_difference(expected, expected) is None
    one_bit = {**state, "a": np.array([1, np.nextafter(np.float32(1), np.float32(2))])}
    negative_zero = {"a": np.zeros(1, np.float32)}, {"a": -np.zeros(1, np.float32)}
    assert first_difference([bits(state), bits(one_bit)], expected) == "state 1: a"
    assert first_difference([bits({**state, "b": np.zeros(4, np.int32)})], expected[:1]) == (
        "state 0: b"
    )
    assert bits(negative_zero[0]) != bits(negative_zero[1])
    assert bits({"a": np.zeros(1, np.int32)}) != bits({"a": np.zeros(1, np.float32)})
    assert first_difference(expected[:1], expected) == "1 states instead of 2"


def test_every_model_optimizer_and_form_of_dispatch_is_in_the_default_run():
    assert {case.model for case in DEFAULT} == set(MODELS)
    assert {case.optimizer for case in DEFAULT} == set(OPTIMIZERS)
    assert {case.dispatch for case in DEFAULT} == {"step", "block"}


def test_the_loss_scale_rises_and_falls(recorded):
    run = replay.open(recorded(OF["loss_scaling"]).path)
    scales = [float(state.scale) for _, state in run.states(slice(None))]
    changes = {b / a for a, b in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}


def test_the_plateau_slows_the_training_down(recorded):
    state = replay.open(recorded(OF["equinox"]).path).state(STEPS)
    assert float(state.opt_state["1"]["scale"]) < 1
