"""The demonstration: a training recorded here, and questioned where its code cannot be imported.

What is printed comes from `QUESTIONS`, functions of an open run that return rows for the table.
What the page shows comes from `PICTURES`, functions of two runs that return a ready-made question.
"""

import base64
import html
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from rich.filesize import decimal

from replay import comparing, questions, report
from replay.api import Run, open
from replay.errors import Grade, ReplayError
from replay.order import Order
from replay.program import Program
from replay.recorder import Recorder

BATCH_SIZE = 64

# What the second process cannot import: the code of the training, and what that code needs.
BARRED = ("replay.demo", "flax", "sklearn")


def main(directory: str | os.PathLike, *, epochs: int = 20) -> int:
    """Record a training, question it in another process, and print what was found.

    Args:
        directory: where the run, its fork and the page of pictures go, as `digits`,
            `digits-reordered` and `digits.html`, or `digits-2` and so on if that exists.
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
    other = path.with_name(f"{path.name}-reordered")
    console.print(f"recording {path}", soft_wrap=True)
    rows = record_digits(path, epochs)
    console.print(f"asking a process that cannot import {', '.join(BARRED)}", soft_wrap=True)
    answers, shown = ask_elsewhere(path, other)
    page = path.with_name(f"{path.name}.html")
    page.write_text(page_of(str(path), {**rows, **answers}, shown), encoding="utf-8")
    rows |= answers
    rows["pictures of the answers"] = str(page)
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
    each = len(order) // epochs
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
    options: dict[str, Any] = {"key": jax.random.key(0), "checkpoints": 100}
    with Recorder(path, program, train, order, **options) as recorder, _progress() as bar:
        task = bar.add_task("recording", total=len(order), accuracy=0.0)
        while recorder.advance(each):
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


def reordered(run: Run, path: str) -> Run:
    """Train the second half again, by the archived program, with its samples in another order."""
    return run.fork(path, at=run.steps // 2, order=lambda order: order.shuffled_again(None, 1))


def which_samples(run: Run) -> questions.Question:
    """Which samples changed the weights most in an epoch?"""
    return questions.samples(run, epoch=min(3, run.steps // 22 - 1), top=5, tensor="Dense_*")


def which_weights(run: Run) -> questions.Question:
    """Which weights changed most over the training?"""
    return questions.weights(run, top=20)


def large_gradients(run: Run) -> questions.Question:
    """Which samples came last before the gradients became large?"""
    return questions.explosion(run, threshold=0.03, last=10)


def weight_to_zero(run: Run) -> questions.Question:
    """Which samples led a weight to zero, and how much did each of them do?"""
    first, last = (np.asarray(run.state(at).params["Dense_1"]["kernel"]) for at in (0, run.steps))
    place = int(np.argmin(first * last))  # that which went furthest to the other side
    return questions.zero(run, f"Dense_1/kernel[{place // 10},{place % 10}]", last=64)


PICTURES = (
    which_samples,
    which_weights,
    large_gradients,
    weight_to_zero,
)


def section(title: str, question: questions.Question) -> dict[str, Any]:
    """Return what the page shows of a question."""
    words = ["replay", "ask", question.run.path, question.name]
    for name, value in question.settings.items():
        if name == "other":
            words.append(value.path)
        elif name not in ("by", "tested"):
            words += [f"--{name}", str(value)]
    return {
        "title": title,
        "command": shlex.join(words),
        "tables": question.tables(),
        "footing": question.footing,
        "picture": encoded(report.draw_question(question)),
    }


def encoded(figure: Any) -> str:
    """Return a picture as text, PNG in base64."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def sections(run: Run, other: Run, makes: Sequence[Callable]) -> list[dict[str, Any]]:
    """Answer all questions of the page, and compare the run with its fork."""
    losses = {"title": "The training", "picture": encoded(report.plot_loss(run))}
    both, at = comparing.compare(run, other, names=("recorded", "reordered")), str(other.forked_at)
    words = ["fork", run.path, other.path, "--at", at, "--reshuffle", "all", "--seed", "1"]
    forked = {
        "title": "What if the second half had come in another order?",
        "command": f"replay {shlex.join(words)} && "
        f"replay {shlex.join(['compare', run.path, other.path])}",
        "tables": both.tables(),
        "footing": f"{other.edit} from step {other.forked_at:,} on; {both.footing}",
        "picture": encoded(both.plot()),
    }
    return [losses, *(section(str(make.__doc__), make(run)) for make in makes), forked]


_ELSEWHERE = """
import base64, io, json, shlex, sys
from collections.abc import Callable, Sequence
from typing import Any
sys.path[:] = {path!r}
for name in {barred!r}:
    sys.modules[name] = None
import numpy as np
import optax
from replay import comparing, questions, report
from replay.api import Run, open
{sources}
run, other = open({run!r}), {other!r}
rows = {{}}
for question in ({names}):
    rows |= question(run)
shown = [] if other is None else sections(run, reordered(run, other), ({pictures}))
print(json.dumps([rows, shown]))
"""


def ask_elsewhere(
    path: pathlib.Path, other: pathlib.Path | None = None
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Ask all questions in a fresh, isolated process in another directory.

    Args:
        path: the run.
        other: where its fork is to lie, which is compared with it; without it, nothing is drawn.

    Returns:
        Rows for the table, and sections of the page.

    Raises:
        ReplayError: the process failed; what it said stands on stderr.
    """
    script = _ELSEWHERE.format(
        path=[os.path.abspath(folder) for folder in sys.path],
        barred=BARRED,
        sources="\n".join(
            map(inspect.getsource, (*QUESTIONS, reordered, *PICTURES, section, encoded, sections))
        ),
        names="".join(f"{question.__name__}, " for question in QUESTIONS),
        pictures="".join(f"{make.__name__}, " for make in PICTURES),
        run=str(path.absolute()),
        other=None if other is None else str(other.absolute()),
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
    rows, shown = json.loads(done.stdout.splitlines()[-1])
    return rows, shown


# ----------------------------------------------------------------------------------- the page

_MOST_ROWS = 15

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1040px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2.5em }
img { max-width: 100%; display: block; margin: 1em 0 }
table { border-collapse: collapse; margin: .5em 0 1em; font-size: 13px }
th, td { padding: .15em .8em .15em 0; text-align: right; font-variant-numeric: tabular-nums }
th { border-bottom: 1px solid #999; font-weight: 600 } .words { text-align: left }
code { background: #f3f3f3; padding: .15em .4em; overflow-wrap: anywhere }
.note { color: #666; font-size: 13px }
"""


def page_of(title: str, rows: dict[str, str], shown: Sequence[dict[str, Any]]) -> str:
    """Make one HTML page that holds all of its pictures; every text in it is escaped."""
    text = html.escape
    parts = [f"<h1>{text(title)}</h1>", "<table>"]
    for name, value in rows.items():
        parts.append(
            f'<tr><td class="words"><b>{text(name)}</b></td><td class="words">{text(value)}</td>'
        )
    parts.append("</table>")
    for each in shown:
        parts.append(f"<h2>{text(each['title'])}</h2>")
        if "command" in each:
            parts.append(f"<p><code>{text(each['command'])}</code></p>")
        parts.append(
            f'<img alt="{text(each["title"])}" src="data:image/png;base64,{text(each["picture"])}">'
        )
        for heading, columns, lines, words in each.get("tables", ()):
            kinds = [' class="words"' if column in words else "" for column in columns]
            more = len(lines) - _MOST_ROWS
            parts.append(f"<p>{text(heading)}</p>")
            if lines:
                parts.append(_row("th", columns, kinds, "<table>"))
                parts += [_row("td", line, kinds) for line in lines[:_MOST_ROWS]]
                parts.append("</table>" + f'<p class="note">and {more:,} more</p>' * (more > 0))
        if "footing" in each:
            parts.append(f'<p class="note">{text(each["footing"])}</p>')
    head = f'<meta charset="utf-8"><title>{text(title)}</title><style>{_STYLE}</style>'
    return (
        f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n"
        + "\n".join(parts)
        + ("\n</body></html>\n")
    )


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str], before: str = "") -> str:
    pairs = zip(cells, kinds, strict=True)
    inside = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in pairs)
    return f"{before}<tr>{inside}</tr>"
