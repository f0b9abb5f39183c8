"""The command line: what is parsed, called and printed, and which audits this user remembers.

What a run says about itself is printed as plain text: it may come from a stranger, and a name
must not colour, move or overwrite anything in the terminal that shows it.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pandas as pd
import rich.box
import rich.console
import rich.table
import rich.tree
import tyro
from rich.filesize import decimal
from rich.text import Text

from replay import demo, prices, questions, report
from replay.ancestry import FOLDER
from replay.api import Run, open
from replay.comparing import compare
from replay.errors import DataError, Grade, LogError, ReplayError, printable
from replay.identity import sha256
from replay.log import HEADER, JOURNAL, Glance, glance
from replay.order import Order
from replay.replaying import Audit
from replay.store import Place
from replay.tree import lower, nest, paths

_STYLES = {Grade.BITWISE: "green", Grade.NUMERIC: "yellow", Grade.FAILED: "red"}
_MOST_TENSORS = 20
_MOST_ROWS = 1000

_Where = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
_Samples = Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.npz")]
_Pairs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
_Picture = Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.png")]

app = tyro.extras.SubcommandApp()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `replay`; those of this process by default.

    Returns:
        The exit code: 0 for success, 1 where a replay is not bit for bit the run, 2 where there
        is no answer. A word that no command knows ends the process with 2.
    """
    try:
        return app.cli(
            args=arguments,
            prog="replay",
            description="Record a JAX training run, and ask afterwards what happened, bit for bit.",
            config=(
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
            ),
        )
    except ReplayError as error:
        parts = (f"error: {error.what}", f"  why: {error.why}", f"  fix: {error.fix}")
        _say(*parts, stderr=True)
        return 2


@app.command(name="demo")
def run_demo(directory: pathlib.Path = pathlib.Path("runs")) -> int:
    """Record a small training and replay it in a process that lacks its code.

    A convolutional network learns scikit-learn's digits. Then another process, to which the code of
    the network is barred, audits the run, asks for a state that was never stored, asks all
    questions of `replay ask`, and trains the second half again in another order, as a fork. The
    runs are DIRECTORY/digits and digits-reordered, the pictures are in digits.html, or digits-2
    where that exists, and so on: nothing is ever overwritten. Exits with 1 unless the audit is
    BITWISE.

    Example: replay demo --directory runs

    Args:
        directory: where the runs and the page of pictures go
    """
    return demo.main(directory)


@app.command
def ls(
    directory: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")
    ] = pathlib.Path("."),
) -> int:
    """List all runs below a directory.

    The grade is BITWISE only where you have audited the run, and it has not changed since.

    Example: replay ls runs

    Args:
        directory: where to look
    """
    _check_directory(directory)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "program"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "weights", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("closed", "created", "grade"):
        table.add_column(name, no_wrap=True)
    unreadable = []
    for folder in _runs_below(directory):
        name = folder.relative_to(directory) if folder != directory else folder
        try:
            run = open(folder)
        except ReplayError as error:
            unreadable.append(f"{name} cannot be opened: {error.what}")
            continue
        grade, _ = _grade(run)
        table.add_row(
            _plain(name),
            _plain(run.log.header.name),
            f"{run.steps:,}",
            f"{_weights(run):,}",
            decimal(sum(run.log.place.list().values())),
            "yes" if run.log.durable.closed else "no",
            _time(run.log.header.created),
            Text(grade.name, style=_STYLES.get(grade, "")),
        )
    if table.row_count:
        _console().print(table)
    elif not unreadable:
        _say(f"there are no runs below {directory}")
    _say(*unreadable)
    return 0


@app.command
def show(run: _Where) -> int:
    """Show what a run is, where it was recorded, and what it takes on disk.

    Example: replay show runs/digits

    Args:
        run: the run directory, or the URL of a key-value store
    """
    recorded = open(run)
    header, durable = recorded.log.header, recorded.log.durable
    grade, note = _grade(recorded)
    planned = "" if header.order is None else f" of {header.steps:,}"
    closed = "closed" if durable.closed else "not closed"
    tensors = [_plain(leaf) for leaf in recorded.tensors]
    more = [f"and {len(tensors) - _MOST_TENSORS:,} more"] if len(tensors) > _MOST_TENSORS else []
    table = rich.table.Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {
        "run": _plain(recorded.path),
        "grade": Text.assemble((grade.name, _STYLES.get(grade, "")), _plain(note)),
        "program": _plain(f"{header.name}, dispatched by {recorded.dispatch}"),
        "steps": f"{recorded.steps:,}{planned}, {closed}, recorded {_time(header.created)}",
        "loss": _losses(recorded),
        "batches": f"{header.signature.batch_size:,} samples each",
        "order": _plain(recorded.order or "as fed"),
        **_forked(recorded),
        "data": _plain(header.data),
        "stored states": _states(recorded),
        "recorded with": _plain(", ".join(f"{k} {v}" for k, v in header.environment.items())),
        "weights": "\n".join(
            [f"{_weights(recorded):,} in {len(tensors):,} tensors", *tensors[:_MOST_TENSORS], *more]
        ),
        "bytes": _sizes(recorded),
    }.items():
        table.add_row(name, value)
    _console().print(table)
    return 0


@app.command
def verify(
    run: _Where,
    steps: Annotated[str, tyro.conf.arg(metavar="A:B")] = ":",
    data: _Samples = None,
) -> int:
    """Replay a run and compare the losses of its steps and its stored states, bit for bit.

    Exits with 0 if the run is BITWISE, else with 1. The audit of a whole run is remembered, in
    your own cache directory and never in the run, for `replay show` and `replay ls`.

    Example: replay verify runs/digits --steps 0:100

    Args:
        run: the run directory, or the URL of a key-value store
        steps: which steps; whole segments between stored states are audited
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """
    wanted = None if steps == ":" else _slice(steps)
    recorded = _open_with(run, data)
    if recorded.log.header.data == "external" and data is None:
        raise DataError(
            f"{recorded.path} does not hold its data, and none was given",
            why="every step is replayed on the batch it was trained on",
            fix=f"replay verify {recorded.path} --data data.npz, written by numpy.savez",
        )
    audit = recorded.verify(wanted)
    _remember(recorded, audit)
    verdict, *rest = str(audit).split("\n")
    _say(verdict, style=_STYLES.get(audit.grade, ""))
    _say(*(f"  {line.strip()}" for line in rest))  # so that no name can forge a verdict
    return 0 if audit.grade is Grade.BITWISE else 1


@app.command
def state(
    run: _Where,
    step: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")],
    out: pathlib.Path,
    force: bool = False,
    data: _Samples = None,
) -> int:
    """Write any state of a run to a file for numpy, whether it was stored or not.

    The arrays are named by their paths: `numpy.load(FILE)["params/Dense_0/kernel"]`. Types that
    numpy lacks, such as bfloat16, are kept as unsigned integers of the same width.

    Example: replay state runs/digits 123 --out state.npz

    Args:
        run: the run directory, or the URL of a key-value store
        step: the state before this step; -1 is the last state
        out: the file to write
        force: replace the file if it exists
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """
    _check_target(out, replace=force)
    recorded = _open_with(run, data)
    tree = recorded.state(step)
    arrays, notes = {}, {}
    for path, array in zip(paths(tree), map(np.asarray, lower(tree)), strict=True):
        if array.dtype.isbuiltin != 1:
            notes[path] = f", read it with .view(ml_dtypes.{array.dtype})"
            array = array.view(f"uint{8 * array.dtype.itemsize}")
        arrays[path] = array
    _write_npz(out, arrays)
    for path, array in arrays.items():
        shape = ",".join(map(str, array.shape))
        _say(f"{path}: {array.dtype}[{shape}]{notes.get(path, '')}")
    number = step + recorded.steps + 1 if step < 0 else step
    _say(f"state {number} of {recorded.path} is in {out}, {decimal(out.stat().st_size)}")
    return 0


@app.command
def plot(run: _Where, out: pathlib.Path = pathlib.Path("loss.png")) -> int:
    """Draw the losses and metrics of a run; an earlier picture is replaced.

    Example: replay plot runs/digits --out loss.png

    Args:
        run: the run directory, or the URL of a key-value store
        out: the picture to write, in the format that its ending names
    """
    _check_target(out, replace=True)
    _check_format(out)
    report.plot_loss(open(run)).savefig(out, dpi=150)
    _say(f"the picture is in {out}")
    return 0


@app.command
def fork(
    run: _Where,
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORK")] = "",
    at: int = 0,
    swap: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="A B")] = None,
    drop: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SAMPLES")] = (),
    refill: bool = False,
    reverse: Annotated[str, tyro.conf.arg(metavar="EPOCH|all")] = "",
    reshuffle: Annotated[str, tyro.conf.arg(metavar="EPOCH|all")] = "",
    seed: int = 0,
    weigh: Annotated[_Pairs, tyro.conf.arg(metavar="SAMPLE=FACTOR")] = (),
    set: Annotated[_Pairs, tyro.conf.arg(metavar="NAME=VALUE")] = (),
    key: int | None = None,
    until: int | None = None,
    no_train: bool = False,
    detach: bool = False,
    parent: str | None = None,
    data: _Samples = None,
) -> int:
    """Train again from a past state with one thing changed, without the code of the run.

    The fork shares the log of the run up to that state; nothing is copied. Without a change it
    repeats the run bit for bit. With --detach, RUN is a fork that is made independent of its
    parent.

    Example: replay fork runs/digits runs/swapped --at 100 --swap 100 101

    Args:
        run: the run directory, or the URL of a key-value store
        path: where the fork is to lie
        at: the first step that is taken anew
        swap: two steps whose batches are exchanged
        drop: samples that are left out: by weight 0, so that batches stay as they are
        refill: let later samples of the epoch move up where samples are dropped
        reverse: turn the order of an epoch around, or of all that is left
        reshuffle: shuffle an epoch, or all that is left, by --seed
        seed: of the shuffling
        weigh: another factor of the loss of a sample; may be given several times
        set: another value of a hyperparameter that the optimizer state holds
        key: the seed of another key: other dropout, in the same order
        until: a state to stop at
        no_train: only create it; later `replay fork FORK` trains it
        detach: copy into the fork RUN what it needs of its parent
        parent: where the parent of the fork RUN lies, if it was moved
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """
    recorded = _open_with(run, data, parent=parent)
    if detach:
        copied = recorded.detach()
        _say(f"{recorded.path} is independent of its parent: {decimal(copied)} copied")
        return 0
    if not path:
        # Where FORK was forgotten, the run itself would be trained.
        given = (at, *drop, refill, reverse, reshuffle, seed, *weigh, *set, no_train)
        if any(given) or swap is not None or key is not None:
            raise ReplayError(
                f"a change of {recorded.path}, and no FORK",
                why="a change makes another run; without one, the run itself is trained to its end",
                fix=f"replay fork {recorded.path} FORK --at ..., with the folder of the new run",
            )
        try:
            recorded.resume(until=until)
        except KeyboardInterrupt:
            return _stopped(run)
        _say(repr(recorded))
        return 0

    def edited(order: Order) -> Order:
        if swap is not None:
            order = order.swap(*swap)
        if drop and refill:
            order = order.drop(drop, refill=True)
        if reverse:
            order = order.reversed(_epoch("reverse", reverse))
        if reshuffle:
            order = order.shuffled_again(_epoch("reshuffle", reshuffle), seed)
        return order

    factors = {
        _number("weigh", name, int): value for name, value in _numbers("weigh", weigh).items()
    }
    factors |= {} if refill else dict.fromkeys(drop, 0.0)
    hyperparameters = _numbers("set", set)
    reordered = swap is not None or reverse or reshuffle or (drop and refill)
    changes: dict[str, Any] = dict(
        at=at,
        order=edited if reordered else None,
        sample_weights=factors or None,
        optimizer=hyperparameters or None,
        key=None if key is None else jax.random.key(key),
    )
    try:
        made = recorded.fork(path, until=until, train=not no_train, **changes)
    except KeyboardInterrupt:
        return _stopped(path)
    _say(repr(made))
    return 0


def _stopped(path: str) -> int:
    """Say how a training that was interrupted goes on."""
    _say(f"stopped at state {glance(Place(path)).steps:,}; replay fork {path} goes on", stderr=True)
    return 130


@app.command
def tree(
    directory: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")
    ] = pathlib.Path("."),
) -> int:
    """Draw the families of runs below a directory: which run is a fork of which, and what changed.

    Example: replay tree runs

    Args:
        directory: where to look
    """
    _check_directory(directory)
    runs: dict[pathlib.Path, Glance] = {}
    unreadable = []
    for folder in _runs_below(directory):
        try:
            runs[folder] = glance(Place(folder))
        except ReplayError as error:
            name = folder.relative_to(directory) if folder != directory else folder
            unreadable.append(f"{name} cannot be opened: {error.what}")
    families = rich.tree.Tree(_plain(directory), guide_style="dim")

    def parent_of(folder: pathlib.Path) -> pathlib.Path | None:
        """Return the parent of a fork: where the fork says, or another copy of it."""
        parent = runs[folder].header.parent
        if parent is None:
            return None
        copies = [other for other, seen in runs.items() if seen.identity == parent.run]
        named = (folder / parent.path).resolve()
        return next((x for x in copies if x.resolve() == named), next(iter(copies), None))

    parents = {folder: parent_of(folder) for folder in runs}

    def grow(branch: rich.tree.Tree, folder: pathlib.Path) -> None:
        _, header, steps = runs[folder]
        name = folder.relative_to(directory) if folder != directory else folder
        parent = header.parent
        words = header.name if parent is None else f"from step {parent.step:,}: {parent.edit}"
        words += f"{',' if parent is None else ';'} {steps:,} of {header.steps:,} steps"
        if parent is not None and parents[folder] is None:
            words += f"; its parent is not here, but at {parent.path}"
        if (folder / FOLDER / HEADER).exists():
            words += "; independent of its parent"
        twig = branch.add(Text.assemble((_plain(name), "bold"), _plain(f"  {words}")))
        for other, above in parents.items():
            if above == folder:
                grow(twig, other)

    for folder, above in parents.items():
        if above is None:
            grow(families, folder)
    if runs:
        _console().print(families)
    elif not unreadable:
        _say(f"there are no runs below {directory}")
    _say(*unreadable)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """What every question takes.

    Args:
        explain: print what the answer would take, and replay nothing
        plot: draw the answer, too; an earlier picture is replaced
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """

    explain: bool = False
    plot: _Picture = None
    data: _Samples = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Changers(_Asked):
    """Which samples, or classes, changed the weights most in an epoch.

    Example: replay ask runs/digits samples --epoch 1 --top 3

    Args:
        epoch: the number of the epoch
        top: how many samples are listed for each tensor
        by_class: rank classes instead of samples, by a leaf of the data
        label: the leaf that holds the class, where it has an unusual name
        tensor: one tensor, or several by a pattern such as Dense_*
    """

    epoch: int = 0
    top: int = 5
    by_class: bool = False
    label: str = "label"
    tensor: str = "*"

    def of(self, run: Run) -> questions.Question:
        by = self.label if self.by_class else None
        return questions.samples(run, epoch=self.epoch, top=self.top, by=by, tensor=self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Changed(_Asked):
    """Which weights changed most over the training.

    Example: replay ask runs/digits weights --top 10

    Args:
        top: how many weights are listed
        tensor: one tensor, or several by a pattern such as Dense_*
    """

    top: int = 20
    tensor: str = "*"

    def of(self, run: Run) -> questions.Question:
        return questions.weights(run, top=self.top, tensor=self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Explosion(_Asked):
    """The last samples before more than a share of the gradients exceed a threshold.

    Example: replay ask runs/digits explosion --threshold 0.5 --last 6

    Args:
        threshold: of the absolute value of a gradient; what is NaN exceeds it
        share: of all weights, 0 to 1
        last: how many samples are listed
    """

    threshold: float = 1024.0
    share: float = 0.1
    last: int = 10

    def of(self, run: Run) -> questions.Question:
        return questions.explosion(run, threshold=self.threshold, share=self.share, last=self.last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Zero(_Asked):
    """The last samples that led a weight to zero, and the share of each.

    Example: replay ask runs/digits zero --weight 'w[1]' --last 6

    Args:
        weight: its tensor and its index, such as 'Dense_0/kernel[3,7]'
        last: how many samples are listed
    """

    weight: str
    last: int = 20

    def of(self, run: Run) -> questions.Question:
        return questions.zero(run, self.weight, last=self.last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compared(_Asked):
    """How far apart two runs are after some steps: their weights, and their losses.

    Example: replay ask runs/digits compare runs/digits --step 60

    Args:
        other: the other run
        step: after how many steps; by default as many as both have
    """

    other: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")]
    step: int | None = None

    def of(self, run: Run) -> questions.Question:
        return questions.compare(run, _open_with(self.other, self.data), step=self.step)


@app.command
def ask(
    run: _Where,
    question: Annotated[_Changers, tyro.conf.subcommand("samples")]
    | Annotated[_Changed, tyro.conf.subcommand("weights")]
    | Annotated[_Explosion, tyro.conf.subcommand("explosion")]
    | Annotated[_Zero, tyro.conf.subcommand("zero")]
    | Annotated[_Compared, tyro.conf.subcommand("compare")],
) -> int:
    """Ask a run which samples and weights did what; `replay ask RUN QUESTION --help` tells more.

    Example: replay ask runs/digits weights --top 10

    Args:
        run: the run directory, or the URL of a key-value store
        question: what is asked
    """
    if question.plot is not None:
        _check_target(question.plot, replace=True)
        _check_format(question.plot)
    asked = question.of(_open_with(run, question.data))
    if question.explain:
        _say(f"what the answer of {asked.name} would take", style="bold")
        _say(*(f"  {line}" for line in asked.explain().splitlines()))
        return 0
    for table in asked.tables():
        _show_table(table)
    _say(asked.footing)
    if question.plot is not None:
        report.draw_question(asked).savefig(question.plot, dpi=150)
        _say(f"the picture is in {question.plot}")
    return 0


def _show_table(table: questions.Table) -> None:
    _say(table.title, style="bold")
    if not table.rows:
        return
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in table.columns:
        words = name in table.words
        justify = "left" if words else "right"
        shown.add_column(_plain(name), justify=justify, overflow="fold", no_wrap=not words)
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    _console().print(shown)


@app.command(name="compare")
def compare_runs(
    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN [RUN ...]")
    ],
    state: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    top: int = 10,
    train: int = 2000,
    test: _Samples = None,
    logits: str = "logits",
    explain: bool = False,
    plot: _Picture = None,
    data: _Samples = None,
) -> int:
    """Compare runs of one architecture: where they part, how far apart they are, what each learned.

    The first run is the reference. Without --state they are compared at the states that it has
    stored. What differs first is read from the logs; nothing is replayed for it.

    Example: replay compare runs/digits runs/digits --state 60

    Args:
        runs: two run directories or more, or URLs of key-value stores
        state: compare at this state only, stored or not; -1 is the last that all have
        top: how many samples whose losses differ most are listed
        train: how many training samples all are tested on, evenly spaced; 0 for none
        test: held-out samples, as numpy.savez(FILE, x=..., y=...) writes them
        logits: the name of the activations whose largest tells a class, for the accuracy
        explain: print what the answer would take, and replay nothing
        plot: draw the answer, too; an earlier picture is replaced
        data: the samples of runs that do not hold them, as numpy.savez(FILE, x=..., y=...) does
    """
    if plot is not None:
        _check_target(plot, replace=True)
        _check_format(plot)
    held_out = None if test is None else _read_samples(test)
    opened = [_open_with(run, data) for run in runs]
    found = compare(*opened, states=state, train=train, test=held_out, logits=logits)
    if explain:
        _say(*found.explain().splitlines())
        return 0
    for name, parting in found.partings.items():
        _say(f"{found.names[0]} and {name}: {parting}")
    _say(*[found.note] * bool(found.note))
    for table in found.tables(top)[1:]:
        _show_table(table)
    _say(found.footing)
    if plot is not None:
        found.plot(plot)
        _say(f"the picture is in {plot}")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Named:
    """What a statement may name besides the run.

    Args:
        run_: another run by a name, NAME=RUN, as in FROM NAME.weights; may be repeated
        table: a table by a name, NAME=FILE.csv or FILE.parquet; may be repeated
        limit_rows: how many rows may be read one by one
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """

    run_: Annotated[_Pairs, tyro.conf.arg(name="run", metavar="NAME=RUN")] = ()
    table: Annotated[_Pairs, tyro.conf.arg(metavar="NAME=FILE")] = ()
    limit_rows: int = 1_000_000
    data: _Samples = None

    def options(self) -> dict[str, Any]:
        tables = {name: _table(pathlib.Path(file)) for name, file in _pairs("table", self.table)}
        runs = {name: _open_with(where, self.data) for name, where in _pairs("run", self.run_)}
        return {"tables": tables, "runs": runs, "limit_rows": self.limit_rows}


@app.command
def sql(
    run: _Where,
    statement: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STATEMENT")],
    named: _Named = _Named(),  # noqa: B008  # frozen
    explain: bool = False,
    csv: bool = False,
    json: bool = False,
    parquet: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> int:
    """Answer a statement of SQL about a run: a SELECT over weights, grads, sample_updates, ...

    Example: replay sql runs/digits "SELECT tensor, sum(abs(value)) AS path FROM updates GROUP BY 1"

    Args:
        run: the run directory, or the URL of a key-value store
        statement: one SELECT, in the dialect of DuckDB
        named: other runs and tables
        explain: print what the answer would take, and replay nothing
        csv: print the rows as CSV
        json: print the rows as JSON, one object a line
        parquet: write the rows to this file; an earlier one is replaced
    """
    if parquet is not None:
        _check_target(parquet, replace=True)
    recorded, options = _open_with(run, named.data), named.options()
    if explain:
        _say(*recorded.explain_sql(statement, **options).splitlines())
        return 0
    answer = recorded.sql(statement, **options)
    if parquet is not None:
        answer.to_parquet(parquet)
        _say(f"{len(answer):,} rows are in {parquet}, {decimal(parquet.stat().st_size)}")
    elif csv or json:
        _print_rows(answer, csv=csv)
    else:
        _show_rows(answer)
    return 0


@app.command
def explain(
    run: _Where,
    statement: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STATEMENT")],
    named: _Named = _Named(),  # noqa: B008  # frozen
) -> int:
    """Tell what a statement of SQL would take, and replay nothing.

    Example: replay explain runs/digits "SELECT step, max(abs(value)) FROM grads GROUP BY step"

    Args:
        run: the run directory, or the URL of a key-value store
        statement: one SELECT, in the dialect of DuckDB
        named: other runs and tables
    """
    recorded = _open_with(run, named.data)
    _say(*recorded.explain_sql(statement, **named.options()).splitlines())
    return 0


@app.command
def calibrate() -> int:
    """Measure what this machine takes for each kind of work, so that seconds are told of it.

    It takes about half a minute and is done once: later processes know it, and what `replay
    explain` and `replay ask --explain` predict stands on it.

    Example: replay calibrate
    """
    found = prices.calibrate()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind of work")
    for name in ("call [µs]", "element [ns]", "to compile [s]"):
        table.add_column(name, justify="right")
    for kind, price in found.items():
        numbers = (1e6 * price.call, 1e9 * price.element, price.compile)
        table.add_row(kind, *(f"{x:.3g}" for x in numbers))
    _console().print(table)
    _say("kept for this machine: what `explain` predicts is `calibrated` from now on")
    return 0


@app.command
def index(
    run: _Where,
    level: Literal["scalars", "rows", "weights"] = "rows",
    data: _Samples = None,
) -> int:
    """Build an index of a run by replaying it once, so that later questions replay less.

    No answer depends on it. It is kept in the run, beside what was recorded.

    Example: replay index runs/digits --level rows

    Args:
        run: the run directory, or the URL of a key-value store
        level: what is kept: of each step (scalars), also of rows and columns of weights between
            stored states (rows), or of each weight (weights)
        data: the samples of a run that does not hold them, as numpy.savez(FILE, x=..., y=...) does
    """
    recorded = _open_with(run, data)
    recorded.index(level)
    folder = sum(size for name, size in recorded.log.place.list().items() if _of_index(name))
    _say(f"{recorded.path} has an index of {level}; its indexes take {decimal(folder)}")
    return 0


def _of_index(name: str) -> bool:
    return name.split("/")[0] in ("index", "segments")


@app.command
def thin(run: _Where, keep: int) -> int:
    """Give up stored states, so that about so many evenly spread ones are left.

    No answer is lost: what lay between is replayed, which takes longer.

    Example: replay thin runs/digits --keep 3

    Args:
        run: the run directory, or the URL of a key-value store
        keep: how many states to keep, the first and the last among them
    """
    recorded = open(run)
    before = sum(recorded.log.place.list().values())
    dropped = recorded.thin(keep)
    freed = decimal(before - sum(recorded.log.place.list().values()))
    _say(f"{len(dropped):,} stored states given up, {freed} freed; left: {_states(recorded)}")
    return 0


@app.command
def cache(
    do: Annotated[Literal["ls", "clear"], tyro.conf.Positional],
    run: _Where,
) -> int:
    """List what a run keeps of its answers, or delete it: that loses only time.

    Example: replay cache ls runs/digits

    Args:
        do: list it, or delete it
        run: the run directory, or the URL of a key-value store
    """
    kept = open(run).cache
    entries = kept.entries()
    if do == "clear":
        kept.clear()
    total = decimal(sum(entry.bytes for entry in entries))
    if entries and do == "ls":
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("question", overflow="fold")
        for name in ("kept", "bytes", "took"):
            table.add_column(name, justify="right", no_wrap=True)
        for entry in entries:
            cells = f"{entry.count:,} cell{'s' * (entry.count > 1)}"
            parts = cells if entry.kind == "cells" else "answer"
            lines = [line.strip() for line in entry.about.splitlines()]
            table.add_row(
                _plain(", of ".join(lines)), parts, decimal(entry.bytes), f"{entry.seconds:.3g} s"
            )
        _console().print(table)
    saved = sum(entry.seconds for entry in entries if entry.kind == "answer")
    _say(f"{total} {'deleted' if do == 'clear' else f'kept, answers that took {saved:.3g} s'}")
    return 0


def _open_with(run: str, data: pathlib.Path | None, **options: Any) -> Run:
    """Open a run, with its samples from a file of numpy's where one is given."""
    samples = {} if data is None else {"data": _read_samples(data)}
    return open(run, **samples, **options)


def _read_samples(data: pathlib.Path) -> Any:
    """Read samples from a file of numpy's."""
    try:
        with data.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                loaded = {name: loaded[name] for name in loaded.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{data} cannot be read: {str(error).partition('. ')[0]}",
            why="samples are read from what numpy writes, one array for each leaf, by its path",
            fix='numpy.savez("data.npz", x=..., y=...), or numpy.save for a single array',
        ) from error
    return nest(list(loaded), list(loaded.values())) if isinstance(loaded, dict) else loaded


def _pairs(option: str, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals and value):
            raise ReplayError(
                f"--{option} {pair}",
                why="what a statement names is given as NAME=VALUE",
                fix=f"--{option} name=value",
            )
        yield name, value


def _numbers(option: str, given: Sequence[str]) -> dict[str, float]:
    found = {}
    for pair in given:
        name, _, value = pair.partition("=")
        found[name] = _number(option, value, float)
    return found


def _epoch(option: str, text: str) -> int | None:
    return None if text == "all" else _number(option, text, int)


def _number(option: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ReplayError(
            f"--{option}: {text!r} is not a number",
            why="an edit is said by numbers",
            fix="such as --weigh 17=0.5, --set learning_rate=0.01, --reverse 9",
        ) from error


def _table(file: pathlib.Path) -> Any:
    """Read a table from a file of CSV or Parquet."""
    try:
        if file.suffix.lower() == ".parquet":
            return pd.read_parquet(file)
        return pd.read_csv(file)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{file} cannot be read: {str(error).partition(chr(10))[0]}",
            why="tables are read from CSV, with a line of names, or from Parquet",
            fix="--table labels=labels.csv, with columns such as sample and label",
        ) from error


def _show_rows(answer: Any) -> None:
    """Print rows as a table, and what they were made from."""
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    words = answer.df().dtypes.map(lambda kind: kind.kind not in "iuf").tolist()
    for name, word in zip(answer.columns, words, strict=True):
        shown.add_column(_plain(name), justify="left" if word else "right", overflow="fold")
    for row in answer.rows[:_MOST_ROWS]:
        cells = ["" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in row]
        shown.add_row(*map(_plain, cells))
    _console().print(shown)
    more = f", {_MOST_ROWS} shown: --csv prints all" if len(answer) > _MOST_ROWS else ""
    steps = f"{answer.attrs['steps']:,} steps replayed"
    _say(f"{len(answer):,} rows{more}; {steps}, {answer.attrs['grade']}")


def _print_rows(answer: Any, *, csv: bool) -> None:
    frame = answer.df()
    text = frame.to_csv(index=False) if csv else frame.to_json(orient="records", lines=True)
    sys.stdout.write("".join(f"{printable(line)}\n" for line in text.splitlines()))


def _slice(steps: str) -> slice:
    found = re.fullmatch(r"(\d*)(:?)(\d*)", steps)
    if not found or not any(found.groups()):
        raise ReplayError(
            f"--steps {steps}",
            why="steps are A:B, from A up to B without it, either of them left out, or one number",
            fix="--steps 0:100",
        )
    start, colon, stop = found.groups()
    first = int(start or 0)
    return slice(first, int(stop) if stop else None if colon else first + 1)


def _runs_below(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, inside, files in os.walk(directory):
        inside.sort()
        if HEADER in files:
            inside.clear()
            yield pathlib.Path(folder)


def _check_target(out: pathlib.Path, *, replace: bool) -> None:
    """Refuse a file that cannot be written before minutes are spent on what goes into it."""
    if out.exists() and not (replace and out.is_file()):
        raise ReplayError(
            f"{out} exists",
            why="a directory is not replaced" if replace else "nothing is overwritten unasked",
            fix="name another file" + ("" if replace else ", or pass --force"),
        )
    if not os.access(out.parent, os.W_OK):
        raise ReplayError(
            f"{out.parent} is not a directory that can be written",
            why=f"{out.name} is to go there",
            fix=f"mkdir -p {out.parent}, or name another file",
        )


def _check_directory(directory: pathlib.Path) -> None:
    if not directory.is_dir():
        raise LogError(
            f"{directory} is not a directory",
            why="runs are looked for below a directory",
            fix="replay ls DIR, with a directory that holds runs",
        )


def _check_format(out: pathlib.Path) -> None:
    formats = report.formats()
    if out.suffix[1:].lower() not in formats:
        raise ReplayError(
            f"{out} does not end in a known format",
            why=f"matplotlib writes {', '.join(formats)}",
            fix=f"name it {out.stem}.png",
        )


def _write_npz(out: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what `numpy.load` reads, all or nothing, equal bytes for equal arrays.

    `numpy.savez` takes the names as keyword arguments, so that a leaf called `file` fails.
    """
    part = out.with_name(out.name + ".part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            for path, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{path}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------- remembered audits


def _remember(run: Run, audit: Audit) -> None:
    """Note the audit of a whole run in the user's own cache; the run does not vouch for itself."""
    if not audit.complete or audit.grade not in (Grade.BITWISE, Grade.NUMERIC):
        return  # what failed, perhaps for want of its data, has not been compared
    today = datetime.date.today().isoformat()
    note = {"grade": audit.grade.name, "date": today, "host": socket.gethostname()}
    # A home that cannot be written, or an account without one, only forgets.
    with contextlib.suppress(OSError, RuntimeError):
        file = _note(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(note))


def _grade(run: Run) -> tuple[Grade, str]:
    """Return what is known of a run, and when and where this user's last audit found it."""
    try:
        note = json.loads(_note(run).read_text())
        date, host = datetime.date.fromisoformat(note["date"]), str(note["host"])
        where = "this machine" if host == socket.gethostname() else host
        return Grade[note["grade"]], f" (audited {date} on {where})"
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return run.grade, ""


def _note(run: Run) -> pathlib.Path:
    """Name the note by all that the audit read of the record, so that a changed run has none."""
    place, end = run.log.place, run.log.durable.end
    name = sha256(place.read(HEADER) + (place.read(JOURNAL)[:end] if end else b""))
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(cache, "jax-replay", "audits", f"{name}.json")


# ---------------------------------------------------------------------------------- printing


def _console(*, stderr: bool = False) -> rich.console.Console:
    """Return a console that takes text as it is; what is piped is not folded at 80 columns."""
    console = rich.console.Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _plain(value: Any) -> str:
    """Return one line of text of bounded length, with what is not printable escaped."""
    return printable(str(value)[:2000]).replace("\n", "\\n")


def _say(*lines: Any, style: str = "", stderr: bool = False) -> None:
    for line in lines:
        _console(stderr=stderr).print(Text(_plain(line), style=style), soft_wrap=True)


def _time(seconds: Any) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "at a time unknown"


def _weights(run: Run) -> int:
    return sum(math.prod(leaf.shape) for leaf in run.tensors)


def _states(run: Run) -> str:
    names = list(map(str, run.checkpoints))
    shown = names if len(names) <= 12 else [*names[:8], "...", *names[-3:]]
    return f"{len(names):,} ({', '.join(shown)})"


def _forked(run: Run) -> dict[str, str]:
    """Return the line of `show` that says what a fork is a fork of."""
    if run.log.parent is None:
        return {}
    parent = run.log.parent.place
    return {"fork of": _plain(f"{parent} from step {run.forked_at:,} on: {run.edit}")}


def _losses(run: Run) -> str:
    try:
        losses = run.log.column("loss", 0, run.steps)
    except ReplayError as error:  # the rest of a damaged run is still worth showing
        return _plain(error.what)
    finite = np.flatnonzero(np.isfinite(losses))
    if not finite.size:
        return report.sparkline(losses) or "no step yet"
    least = finite[np.argmin(losses[finite])]
    words = f"first {losses[0]:.4g}, last {losses[-1]:.4g}, least {losses[least]:.4g}"
    words += f" at step {least:,}"
    if finite.size < losses.size:
        first = np.argmin(np.isfinite(losses))
        words += f"; {losses.size - finite.size:,} not finite, the first at step {first:,}"
    return f"{report.sparkline(losses)}\n{words}"


def _sizes(run: Run) -> str:
    parts = dict.fromkeys(("states", "steps", "program", "data", "journal", "cache", "other"), 0)
    for name, size in run.log.place.list().items():
        part = name.split("/")[0].removesuffix(".msgpack")
        parts[part if part in parts else "other"] += size
    total = sum(parts.values())
    each = ", ".join(f"{name} {decimal(size)}" for name, size in parts.items())
    every = run.steps * run.log.header.signature.batch_size * _weights(run) * 4
    return (
        f"{decimal(total)} ({each})\n"
        f"{decimal(every)} would hold every weight at every sample, {every / total:,.0f} times that"
    )
