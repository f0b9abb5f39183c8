"""A small recording that tests kill, starve and trace: `python killed.py PATH [option=value …]`."""

import ast
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import replay

STEPS, EVERY, LOGGED, IN_EPOCH = 2016, 200, 100, 32
KEY = jax.random.key(7)
_random = np.random.Generator(np.random.Philox(7))
DATA = {
    "x": _random.normal(size=(8 * IN_EPOCH, 64)).astype(np.float32),
    "y": _random.integers(0, 10, 8 * IN_EPOCH).astype(np.int32),
}
WEIGHTS = {
    "hidden": 0.1 * _random.normal(size=(64, 16)).astype(np.float32),
    "out": 0.1 * _random.normal(size=(16, 10)).astype(np.float32),
}


def loss(params, example, key):
    hidden = jnp.tanh(example["x"] @ params["hidden"])
    hidden = jnp.where(jax.random.bernoulli(key, 0.9, hidden.shape), hidden, 0.0)
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@functools.cache
def program(rate=0.05):
    return replay.Program(WEIGHTS, loss, optax.sgd(rate, momentum=0.9), name="killed")


def order(steps=STEPS, seed=3):
    return replay.Order.shuffled(batch_size=8, epochs=steps // IN_EPOCH, seed=seed)


def recorder(path, *, steps=STEPS, **options):
    """Return a recorder that begins the run at `path`, or takes it up again."""
    settings = {"program": program(), "data": DATA, "order": order(steps), "key": KEY}
    settings |= {"checkpoints": EVERY, "commit_steps": 64, "commit_seconds": 0.2}
    return replay.Recorder(path, **(settings | {"self_test": False, "resume": True} | options))


def train(path, **options):
    """Record to the end, logging at every hundredth state."""
    with recorder(path, **options) as recording:
        while recording.advance(LOGGED - recording.step % LOGGED):
            recording.log(reached=recording.step)


if __name__ == "__main__":
    pairs = (argument.partition("=") for argument in sys.argv[2:])
    train(sys.argv[1], **{name: ast.literal_eval(value) for name, _, value in pairs})
    print("trained to the end")
