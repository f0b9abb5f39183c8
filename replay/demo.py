"""The demonstration: a training recorded here, and questioned where its code cannot be imported.

A new question is a function of an open run that returns rows for the table: add it to
`QUESTIONS`.
"""

import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from rich.filesize import decimal

from replay.api import Run, open
from replay.errors import Grade, ReplayError
from replay.order import Order
from replay.program import Program
from replay.recorder import Recorder
from replay.report import plot_loss

BATCH_SIZE = 64

# What the second process cannot import: the code of the training, and what that code needs.
BARRED = ("replay.demo", "flax", "sklearn")


def main(directory: str | os.PathLike, *, epochs: int = 20) -> int:
    """Record a training, question it in another process, and print what was found.

    Args:
        directory: where the run and the picture of its losses go, as `digits`, or `digits-2` if
            that exists, and so on.
        epochs: passes over the 1,438 training samples, 22 steps each.

    Returns:
        The exit code: 0 if the run is `BITWISE`, else 1.

    Raises:
        ReplayError: the extra `demo` is not installed, or the second process failed.
    """
    missing = [x for x in ("flax", "matplotlib", "sklearn") if importlib.util.find_spec(x) is None]
    if missing:
        raise ReplayError(
            f"the demonstration needs {' and '.join(missing)}",
            why="it trains a flax network on scikit-learn's digits and draws its losses",
            fix='pip install "jax-replay[demo]"',
        )
    names = (f"digits-{n}" if n > 1 else "digits" for n in itertools.count(1))
    path = next(path for path in (pathlib.Path(directory, n) for n in names) if not path.exists())
    console = rich.console.Console(markup=False, emoji=False, highlight=False)
    console.print(f"recording {path}", soft_wrap=True)
    rows = record_digits(path, epochs)
    console.print(f"asking a process that cannot import {', '.join(BARRED)}", soft_wrap=True)
    rows |= ask_elsewhere(path)
    picture = path.with_name(f"{path.name}-loss.png")
    plot_loss(open(path)).savefig(picture, dpi=150)
    rows["picture of the losses"] = str(picture)
    table = rich.table.Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    return 0 if rows["grade"] == Grade.BITWISE.name else 1


# ------------------------------------------------------------------------------- the training


def record_digits(path: pathlib.Path, epochs: int) -> dict[str, str]:
    """Train a small convolutional network with dropout on handwritten digits, and record it."""
    train, test = _digits()
    order = Order.shuffled(BATCH_SIZE, epochs, seed=0).bind(len(train["label"]))
    network = _network()

    def loss(apply, example):
        logits = apply(example["image"], train=True)
        right = (logits.argmax() == example["label"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
        return losses, {"training_accuracy": right}

    @jax.jit
    def accuracy(params):
        logits = network.apply({"params": params}, test["image"], train=False)
        return jnp.mean(logits.argmax(axis=1) == test["label"])

    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, len(order) // 10, len(order))
    program = Program.linen(
        network, loss, optax.adamw(rate), train["image"][0], train=False, name="digits"
    )
    begun = time.perf_counter()
    with (
        Recorder(path, program, train, order, key=jax.random.key(0), checkpoints=100) as recorder,
        _progress() as bar,
    ):
        task = bar.add_task("recording", total=len(order), accuracy=0.0)
        while recorder.advance(len(order) // epochs):
            found = float(accuracy(recorder.params))
            recorder.log(test_accuracy=found)
            bar.update(task, completed=recorder.step, accuracy=found)
    seconds = time.perf_counter() - begun

    run = open(path)
    size, weights = sum(run.log.place.list().values()), sum(math.prod(t.shape) for t in run.tensors)
    every = run.steps * BATCH_SIZE * weights * 4
    return {
        "steps": f"{run.steps:,} of {BATCH_SIZE} samples",
        "weights": f"{weights:,}",
        "test accuracy": f"{found:.4f}",
        "seconds to record": f"{seconds:.1f}, with compiling and the self-test",
        "bytes of the log": decimal(size),
        "every weight at every sample": f"{decimal(every)}, {every / size:,.0f} times the log",
    }


def _digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a training and a test set: `image` uint8[n, 8, 8, 1], 0 to 16; `label` int32[n]."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    mixed = np.random.default_rng(0).permutation(len(labels))
    samples = {
        "image": images[mixed].astype(np.uint8).reshape(-1, 8, 8, 1),
        "label": labels[mixed].astype(np.int32),
    }
    fifth = len(labels) // 5
    train = {name: values[fifth:] for name, values in samples.items()}
    return train, {name: values[:fifth] for name, values in samples.items()}


def _network() -> Any:
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = images.astype(jnp.float32) / 16
            x = nn.relu(nn.Conv(16, (3, 3))(x))
            x = nn.relu(nn.Conv(32, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = x.reshape(*x.shape[:-3], -1)
            x = nn.Dropout(0.3, deterministic=not train)(x)
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(10)(x)

    return Network()


def _progress() -> rich.progress.Progress:
    console = rich.console.Console(stderr=True)
    columns = (
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("test accuracy {task.fields[accuracy]:.3f}"),
    )
    return rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)


# ------------------------------------------------------------------------------ the questions
#
# The source of these functions is all that the second process is given, besides the run.


def audit(run: Run) -> dict[str, str]:
    """Replay all steps and compare every bit that the log has kept."""
    found = run.verify()
    seconds = f"{found.seconds:.1f}, with starting and compiling"
    return {"grade": found.grade.name, "seconds to audit": seconds}


def state_never_stored(run: Run) -> dict[str, str]:
    """Fetch the weights at a step of which nothing was stored."""
    step = min(123, run.steps // 2)
    assert step not in run.checkpoints
    norm = optax.global_norm(run.state(step).params)
    return {f"norm of the weights at step {step}": f"{norm:.6f}, of a state that was never stored"}


QUESTIONS = (audit, state_never_stored)

_ELSEWHERE = """
import json, sys
sys.path[:] = {path!r}
for name in {barred!r}:
    sys.modules[name] = None
import optax
from replay.api import Run, open
{questions}
rows = {{}}
for question in ({names}):
    rows |= question(open({run!r}))
print(json.dumps(rows))
"""


def ask_elsewhere(path: pathlib.Path) -> dict[str, str]:
    """Ask all questions in a fresh, isolated process in another directory.

    Raises:
        ReplayError: the process failed; what it said stands on stderr.
    """
    script = _ELSEWHERE.format(
        path=[os.path.abspath(folder) for folder in sys.path],
        barred=BARRED,
        questions="\n".join(map(inspect.getsource, QUESTIONS)),
        names="".join(f"{question.__name__}, " for question in QUESTIONS),
        run=str(path.absolute()),
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-I", "-c", script]
        done = subprocess.run(command, cwd=elsewhere, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ReplayError(
            f"the process that questions {path} ended with code {done.returncode}",
            why="a run has to answer without the code that recorded it",
            fix=f"replay verify {path}",
        )
    return json.loads(done.stdout.splitlines()[-1])
