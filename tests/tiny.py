"""A tiny run for tests that damage, forge or starve runs by the hundred, and compile it once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import replay
import replay.trajectory

STEPS, EVERY, BATCH, SAMPLES = 24, 8, 4, 16
KEY = jax.random.key(5)
_random = np.random.Generator(np.random.Philox(5))
DATA = {
    "x": _random.normal(size=(SAMPLES, 3)).astype(np.float32),
    "y": _random.normal(size=SAMPLES).astype(np.float32),
}
WEIGHTS = {
    "hidden": _random.normal(size=(3, 5)).astype(np.float32),
    "out": _random.normal(size=5).astype(np.float32),
}


def loss(params, example, key):
    hidden = jnp.tanh(example["x"] @ params["hidden"])
    return (hidden @ params["out"] - example["y"] + 0.1 * jax.random.normal(key)) ** 2


def program(loss=loss, init=WEIGHTS, rate=0.05):
    return replay.Program(init, loss, optax.sgd(rate, momentum=0.9), name="tiny")


PROGRAM = program()
ORDER = replay.Order.shuffled(batch_size=BATCH, epochs=STEPS * BATCH // SAMPLES, seed=1)


def recorder(path, program=PROGRAM, data=DATA, order=ORDER, *, key=KEY, **options):
    settings = {"checkpoints": EVERY, "self_test": False} | options
    return replay.Recorder(path, program, data, order, key=key, **settings)


def record(path, *arguments, **options):
    """Record to the end and return the run, opened afresh."""
    with recorder(path, *arguments, **options) as recording:
        recording.advance()
    return replay.open(path)


def bits(state):
    """Return all that there is to a state, for comparison with `==`."""
    return [
        (leaf.dtype.name, leaf.shape, leaf.tobytes())
        for leaf in map(np.asarray, jax.tree.leaves(state))
    ]


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Share executables of equal programs; all that is read and checked before stays as it is."""
    compiled, compile = {}, replay.trajectory.compile

    def cached(exported, signature, name, *, donate):
        key = (bytes(exported.mlir_module_serialized), signature, name, donate)
        if key not in compiled:
            compiled[key] = compile(exported, signature, name, donate=donate)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.trajectory, "compile", cached)
        yield
