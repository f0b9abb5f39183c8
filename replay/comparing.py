"""Several runs side by side: where they part, how far apart they are, what each has learned.

A `Comparison` says which runs are compared, at which states and on which samples; it is frozen, and
nothing is replayed before something is asked of it. Where two logs part is read from the logs alone
(`replay.parting`). All else comes from one walk through each run: its weights at the chosen states
(in portions that fit into memory), and the losses of the same samples at them. By default these are
states that the first run has stored, so that a walk through runs of one policy replays nothing.

The first run is the reference that the others are compared with. Sums over weights are taken in
float64; at equal weights a distance is exactly 0 and a cosine exactly 1. Losses are those of the
program that was trained, so that what it draws at random (dropout, augmentation) is drawn at state
t by the key of step t: the same in runs of one key, other noise in others.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from replay.api import Run, compute
from replay.contrast import Accuracy, Found, Tested, Walk, cosine, worst
from replay.data import Data, spaced, whole_numbers
from replay.errors import QueryError, printable
from replay.grads.per_sample import MEMORY
from replay.indexing import NUMBERS
from replay.parting import Parting, parting
from replay.questions import Table, check_alike, labels_of, samples_of
from replay.results import Result

# How many states are compared, and how many training samples the runs are tested on, by default.
MOST_STATES, MOST_SAMPLES = 60, 2000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Several runs of one architecture, side by side; made by `replay.compare`.

    Answers are `xarray.Dataset`s with dimensions `run` (by name, the reference first), `state`,
    `tensor` or `sample`; their `attrs` tell the `grade` of the replays and the `steps` replayed.
    They are computed when they are first asked for, all in one replay of each run.

    Attributes:
        runs: the reference first.
        names: of the runs.
        states: at which they are compared, ascending.
        tested: sets of samples that all are tested on.
        accuracy: `accuracy(params, batch) -> [samples]`, or None.
        logits: the name of the activations that a class is read from, where all runs have one for
            each class.
        options: `memory`, `exact` and `progress`, as for `replay.compute`.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    states: tuple[int, ...]
    tested: tuple[Tested, ...]
    accuracy: Accuracy | None
    logits: str | None
    options: Mapping[str, Any]

    # ---- which states

    def sel(self, *, state: Any) -> "Comparison":
        """Compare at other states, also at such that are not stored.

        Args:
            state: a number, a list of them, or a slice; negative ones count from the last state
                that all runs have.

        Raises:
            QueryError: one of the runs has no such state.
        """
        return dataclasses.replace(self, states=_states(self.runs, self.names, state))

    # ---- what is read from the logs

    @functools.cached_property
    def partings(self) -> dict[str, Parting]:
        """Where each run parts from the reference, by name: samples, losses, states, ancestry."""
        first, *others = self.runs
        pairs = zip(self.names[1:], others, strict=True)
        return {name: parting(first.log, run.log) for name, run in pairs}

    @functools.cached_property
    def curves(self) -> Result:
        """The logged columns of all runs, NaN where a run has none.

        `loss`, and the metrics that the loss returned, are `(run, step)`; what was given to
        `Recorder.log` is `(run, logged)`, by the state that it was logged at, and has `logged/` in
        front of its name where the loss of a run has returned a metric of that name.
        """
        steps = max(run.steps for run in self.runs)
        dims, columns = {steps: "step", steps + 1: "logged"}, {}
        for number, run in enumerate(self.runs):
            for name, column in run.history().items():
                ours = name in ("step", "epoch", "seconds") or name.partition("/")[0] in NUMBERS
                if ours:
                    continue
                name = name.removeprefix("logged/") if len(column) > run.steps else name
                length = steps + len(column) - run.steps
                blank = np.full((len(self.runs), length), np.nan)
                kept = columns.setdefault((name, length), blank)
                kept[number, : len(column)] = column
        variables = {}
        for (name, length), values in columns.items():
            taken = length > steps and ((name, steps) in columns or name in dims.values())
            variables["logged/" * taken + name] = (["run", dims[length]], values)
        places = {dim: np.arange(n) for n, dim in dims.items()}
        return Result.of(variables, {"run": list(self.names), **places}, _attributes("LOGGED", 0))

    # ---- what is replayed

    @functools.cached_property
    def distances(self) -> Result:
        """How far the weights are from those of the reference, and from where they began.

        `(run, state)`: `distance` to the reference (Euclidean); `cosine` of the weights with
        those of the reference; `moved`, the distance from the run's own state 0; `moved_cosine`,
        the cosine of that displacement with the reference's. With `tensor_` in front the same of
        each tensor, `(run, state, tensor)`. A cosine with what has no length is NaN.
        """
        sums = self._found.sums
        variables: dict[str, Any] = {}
        for prefix, dims in (("", ["run", "state"]), ("tensor_", ["run", "state", "tensor"])):
            given = sums if prefix else {name: x.sum(axis=-1) for name, x in sums.items()}
            variables |= {
                f"{prefix}distance": (dims, np.sqrt(given["apart"])),
                f"{prefix}cosine": (dims, cosine(given["dot"], given["own"])),
                f"{prefix}moved": (dims, np.sqrt(given["moved"])),
                f"{prefix}moved_cosine": (dims, cosine(given["moved_dot"], given["moved"])),
            }
        return self._result(variables, tensor=[leaf.path for leaf in self.runs[0].tensors])

    @functools.cached_property
    def progress(self) -> Result:
        """What each run has learned at each state, `(run, state)`.

        `train_loss` and `test_loss`, means over the same samples; `train_accuracy` and
        `test_accuracy`, as far as a class can be told (`attrs["accuracy"]` says how); `moved` and
        `distance`, as in `distances`.
        """
        dims, variables = ["run", "state"], {}
        for tested in self.tested:
            means = self._found.losses[tested.name].mean(axis=-1, dtype=np.float64)
            variables[f"{tested.name}_loss"] = (dims, means)
            if tested.name in self._found.right:
                variables[f"{tested.name}_accuracy"] = (dims, self._found.right[tested.name])
        for name in ("moved", "distance"):
            variables[name] = (dims, self.distances[name].values)
        return self._result(variables, accuracy=self._how_classified())

    def losses(self, on: str | None = None) -> Result:
        """Return the loss of each sample, `loss (run, state, sample)`.

        Args:
            on: `train` or `test`; by default `test` where there is such a set.

        Raises:
            QueryError: the runs were compared without such samples.
        """
        tested = self._tested(on)
        values = self._found.losses[tested.name]
        return self._result({"loss": (["run", "state", "sample"], values)}, sample=tested.ids)

    def samples(self, top: int = 10, *, on: str | None = None) -> Result:
        """Return the samples whose losses differ most from the reference's at the last state.

        Args:
            top: how many.
            on: as for `losses`.

        Returns:
            For each run, `(run, rank)`: `sample`, its id; `difference`, its loss minus that of
            the reference; `loss`; and `reference`, the loss of the reference. Losses that are not
            numbers come first, equal differences in the order of the samples.

        Raises:
            QueryError: as `losses`; or `top` is below 1.
        """
        if top < 1:
            raise QueryError(
                f"top is {top}", why="it says how many are listed", fix="a number from 1 on"
            )
        losses = self.losses(on)["loss"].values[:, -1].astype(np.float64)
        ids = self._tested(on).ids
        with np.errstate(invalid="ignore"):
            differences = losses - losses[0]
        differences[(losses == losses[0]) | (np.isnan(losses) & np.isnan(losses[0]))] = 0
        keys = np.where(np.isnan(differences), -np.inf, -np.abs(differences))
        order = np.argsort(keys, axis=1, kind="stable")[:, :top]
        dims = ["run", "rank"]
        variables = {
            "sample": (dims, ids[order]),
            "difference": (dims, np.take_along_axis(differences, order, 1)),
            "loss": (dims, np.take_along_axis(losses, order, 1)),
            "reference": (dims, losses[0][order]),
        }
        return self._result(variables).isel(state=-1)

    def travelled(self) -> Result:
        """Return the lengths of the paths of the weights, `travelled (run, state)`.

        The length of a path is the sum of the Euclidean norms of all updates up to a state. Every
        step is replayed for it, except where an index tells the norms.
        """
        last = self.states[-1]
        asked = {run: run.updates.sel(step=slice(0, last)).norm("weight") for run in self.runs}
        if last:
            found = compute(*asked.values(), **self.options)
        else:
            found = [Result.of({"value": (["step"], np.zeros(0))}, {}, _attributes("BITWISE", 0))]
            found *= len(asked)
        answers = dict(zip(asked, found, strict=True))
        rows = []
        for run in self.runs:
            norms = answers[run]["value"].values.astype(np.float64)
            rows.append(np.concatenate([[0.0], np.cumsum(norms)])[list(self.states)])
        grade = str(worst(found))
        steps = max(answer.attrs["steps"] for answer in found)
        variables = {"travelled": (["run", "state"], np.stack(rows))}
        places = {"run": list(self.names), "state": list(self.states)}
        return Result.of(variables, places, _attributes(grade, steps))

    def explain(self) -> str:
        """Tell what the answers take; nothing is replayed."""
        return "\n".join(map(self._walk.explain, dict.fromkeys(self.runs)))

    # ---- how it is shown

    def tables(self, top: int = 10) -> list[Table]:
        """Return what is printed: where they part, progress, distances by tensor, samples.

        Args:
            top: how many samples whose losses differ most.
        """
        found = [self._parted(), self._progressed(), self._apart()]
        return [*found, *self._differing(top)] if self.tested else found

    @property
    def footing(self) -> str:
        """The grade of the answers, and how many steps were replayed for them."""
        return f"{self._found.grade}: {self._found.steps:,} steps replayed"

    @property
    def note(self) -> str:
        """What limits the comparison: runs of different length; empty where nothing does."""
        lengths = dict(zip(self.names, (run.steps for run in self.runs), strict=True))
        if len(set(lengths.values())) == 1:
            return ""
        told = ", ".join(f"{name} has {steps:,} steps" for name, steps in lengths.items())
        return f"{told}: compared up to state {min(lengths.values()):,}, which all have"

    def plot(self, path: Any = None) -> Any:
        """Draw losses, distances along the training and by tensor, and samples that differ most.

        Args:
            path: a file to write, in the format that its ending names.

        Returns:
            A matplotlib figure.

        Raises:
            ReplayError: matplotlib is not installed.
        """
        # By name: this module knows nothing of pictures, and matplotlib is an extra.
        figure = importlib.import_module("replay.report").draw_comparison(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __repr__(self) -> str:
        first, sizes = self.runs[0], [math.prod(leaf.shape) for leaf in self.runs[0].tensors]
        at = self.states[0], self.states[-1]
        where = f"state {at[0]:,}" if len(self.states) == 1 else f"{len(self.states)} states"
        span = "" if len(self.states) == 1 else f" ({at[0]:,} to {at[1]:,})"
        lines = [
            f"<Comparison of {len(self.runs)} runs at {where}{span}: {sum(sizes):,} weights in "
            f"{len(sizes)} tensors",
            f"  {self.names[0]}: {first.steps:,} steps of {first.path}, the reference",
        ]
        for name, run in zip(self.names[1:], self.runs[1:], strict=True):
            lines.append(f"  {name}: {run.steps:,} steps of {run.path}: {self.partings[name]}")
        lines += [f"  {self.note}"] * bool(self.note)
        return printable("\n".join(lines) + ">")

    # ---- within

    def _tested(self, on: str | None) -> Tested:
        known = {tested.name: tested for tested in self.tested}
        name = on or next(iter(reversed(known)), "train")
        if name not in known:
            raise QueryError(
                f"the runs were compared without samples to {name} them on",
                why=f"there are {', '.join(known)}"
                if known
                else "no losses were asked for, or "
                "the reference has no data at hand, or a run no program for them",
                fix="replay.compare(a, b, test=...) takes anything that replay.Data.of takes",
            )
        return known[name]

    @functools.cached_property
    def _found(self) -> Found:
        return self._walk.through(self.runs)

    @property
    def _walk(self) -> Walk:
        return Walk(self.states, self.tested, self.accuracy, self.logits, self.options)

    def _how_classified(self) -> str:
        if self.accuracy is not None:
            return "the function accuracy(params, batch)"
        if self.logits is not None and any(x.labels is not None for x in self.tested):
            return f"the largest of the activations {self.logits!r}, with the key of the step"
        return "unknown: pass accuracy=, a function of params and a batch, or tag one logit a class"

    def _result(self, variables: Mapping[str, Any], **more: Any) -> Result:
        words = {name: x for name, x in more.items() if isinstance(x, str)}
        places = {"run": list(self.names), "state": list(self.states)}
        places |= {name: x for name, x in more.items() if name not in words}
        attributes = _attributes(str(self._found.grade), self._found.steps)
        return Result.of(variables, places, {**attributes, **words})

    # ---- tables

    def _parted(self) -> Table:
        rows = [
            (name, *(_number(x) for x in (found.forked, found.samples, found.losses)),
             _number(found.state), found.tensor or "")
            for name, found in self.partings.items()
        ]  # fmt: skip
        columns = ("run", "forked", "samples", "losses", "state", "first leaf")
        title = f"where they part from {self.names[0]}: the first step, or stored state, that "
        return Table(f"{title}differs", columns, rows, ("run", "first leaf"))

    def _progressed(self) -> Table:
        columns = [str(name) for name in self.progress.data_vars]
        cosines = self.distances["moved_cosine"].values
        rows = []
        for at in _some(len(self.states)):
            for number, name in enumerate(self.names):
                values = [self.progress[x].values[number, at] for x in columns]
                row = [f"{self.states[at]:,}", name, *(f"{x:.4g}" for x in values)]
                rows.append((*row, f"{cosines[number, at]:.4f}"))
        shown = [x.replace("_", " ") for x in columns]
        names = ("state", "run", *shown, "cosine of moves")
        title = f"progress; distance and cosine are to {self.names[0]}"
        counts = [f"{len(x.data):,} {'training' if x.name == 'train' else 'held-out'} samples"
                  for x in self.tested]  # fmt: skip
        how = f"accuracy by {self._how_classified()}" if self._found.right else ""
        return Table("; ".join(filter(None, [title, *counts, how])), names, rows, ("run",))

    def _apart(self) -> Table:
        found = self.distances.isel(state=-1)
        rows = []
        for number, name in list(enumerate(self.names))[1:]:
            for place, leaf in enumerate(self.runs[0].tensors):
                values = (
                    found["tensor_distance"].values[number, place],
                    *found["tensor_moved"].values[[0, number], place],
                )
                cosine = found["tensor_moved_cosine"].values[number, place]
                shown = (f"{x:.4g}" for x in values)
                rows.append((name, leaf.path, *shown, f"{cosine:.4f}"))
        columns = ("run", "tensor", "distance", "reference moved", "moved", "cosine of moves")
        title = f"weights at state {self.states[-1]:,}, each tensor against that of {self.names[0]}"
        return Table(title, columns, rows, ("run", "tensor"))

    def _differing(self, top: int) -> Iterator[Table]:
        tested = self._tested(None)
        found = self.samples(top)
        labels = dict(zip(tested.ids.tolist(), tested.labels, strict=True)) if (
            tested.labels is not None) else None  # fmt: skip
        rows = []
        for number, name in list(enumerate(self.names))[1:]:
            for rank in range(found.sizes["rank"]):
                sample, *values = (
                    found[x].values[number, rank]
                    for x in ("sample", "reference", "loss", "difference")
                )
                label = () if labels is None else (str(labels[int(sample)]),)
                shown = (f"{values[0]:.4g}", f"{values[1]:.4g}", f"{values[2]:+.4g}")
                rows.append((name, str(sample), *label, *shown))
        more = () if labels is None else ("label",)
        columns = ("run", "sample", *more, "reference", "loss", "difference")
        kind = "training" if tested.name == "train" else "held-out"
        title = f"{kind} samples whose losses differ most at state {self.states[-1]:,}"
        yield Table(title, columns, rows, ("run",))


def compare(
    *runs: Run,
    names: Sequence[str] | None = None,
    states: Any = None,
    train: int | Sequence[int] | np.ndarray = MOST_SAMPLES,
    test: Any = None,
    accuracy: Accuracy | None = None,
    logits: str = "logits",
    label: str = "label",
    memory: int = MEMORY,
    exact: bool = True,
    progress: bool | None = None,
) -> Comparison:
    """Compare runs of one architecture: where they part, their distances, what they have learned.

    Nothing is replayed here; what cannot be compared is refused here.

    Args:
        *runs: two or more; the first is the reference.
        names: of the runs; by default the last part of their paths.
        states: a state, a list or a slice of them; by default those that the reference has
            stored, at most 60 of them, and the last that all runs have.
        train: training samples that all runs are tested on: how many of those of the reference,
            evenly spaced (0 for none), or their ids.
        test: held-out samples, anything that `Data.of` takes.
        accuracy: a JAX function `(params, batch) -> [samples]`, true or 1 where a sample is
            classified rightly; params are nested dicts by path, a batch is as the data gives it.
        logits: without `accuracy`, the name of the activations (`checkpoint_name`) whose largest
            tells the class, where every run has one for each class.
        label: the leaf of the data that holds the class; `label` also finds its usual names.
        memory: bytes that an answer may take.
        exact: raise where a replay departs from its run; else it is told as the grade.
        progress: whether to show progress bars; by default where there is a terminal.

    Raises:
        QueryError: the weights have other names or shapes; a run lacks a state, or a program for
            losses of other samples; there are no such samples.
        DataError: held-out samples are of another form than those that were trained on.

    Example:
        >>> both = replay.compare(a, b, test=test)  # doctest: +SKIP
        >>> both.partings["b"].losses  # doctest: +SKIP
        >>> both.sel(state=100).progress  # doctest: +SKIP
    """
    if len(runs) < 2:
        raise QueryError(
            f"{len(runs)} run is compared" if runs else "no run is compared",
            why="a comparison is of two runs or more",
            fix="replay.compare(a, b), or replay.compare(a, a) for a run with itself",
        )
    for other in runs:
        if not isinstance(other, Run):
            raise QueryError(
                f"{other!r:.60} is no run",
                why="runs are opened before they are compared",
                fix="replay.compare(replay.open(a), replay.open(b))",
            )
        check_alike(runs[0], other)
    # One that was opened again is one run, unless it has been trained on in between.
    known: dict[tuple[str, str, int], Run] = {}
    runs = tuple(known.setdefault((run.path, run.log.identity, run.steps), run) for run in runs)
    names = _names(runs, names)
    chosen = _states(runs, names, states)
    tested = [
        *_sets("train", _training(runs, train), runs, label),
        *_sets("test", None if test is None else (Data.of(test), None), runs, label),
    ]
    tagged = _classifies(runs, logits, tested)
    options = {"memory": memory, "exact": exact, "progress": progress}
    return Comparison(
        runs, names, chosen, tuple(tested), accuracy, logits if tagged else None, options
    )


# ------------------------------------------------------------------------------ what is compared


def _names(runs: Sequence[Run], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        paths = [run.path.rstrip("/") for run in runs]
        short = [path.rpartition("/")[2] for path in paths]
        found = short if len({*paths}) == len({*short}) else paths
        seen: dict[str, int] = {}
        for i, name in enumerate(found):
            seen[name] = seen.get(name, 0) + 1
            found[i] = f"{name} ({seen[name]})" if seen[name] > 1 else name
        return tuple(found)
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise QueryError(
            f"{len(names)} names, {len(set(names))} of them different, for {len(runs)} runs",
            why="answers are told apart by the names of the runs",
            fix=f"names={[f'run {i}' for i in range(len(runs))]}",
        )
    return tuple(map(str, names))


def _states(runs: Sequence[Run], names: Sequence[str], chosen: Any) -> tuple[int, ...]:
    last = min(run.steps for run in runs)
    if chosen is None:
        stored = [state for state in runs[0].checkpoints if state <= last]
        found = [stored[i] for i in spaced(len(stored), MOST_STATES)]
        return tuple(sorted({*found, last}))
    if isinstance(chosen, slice):
        parts = [x for x in (chosen.start, chosen.stop, chosen.step) if x is not None]
        plain = whole_numbers(parts) is not None and chosen.step != 0
        wanted = list(range(*chosen.indices(last + 1))) if plain else None
    else:
        found = whole_numbers(chosen)
        found = whole_numbers([chosen]) if found is None else found
        wanted = None if found is None else found.tolist()
    if wanted is None:
        raise QueryError(
            f"the runs are compared at states={chosen!r:.60}",
            why="states are counted: state t is that before step t",
            fix=f"a whole number from 0 to {last}, a list of them, or a slice",
        )
    wanted = [state + last + 1 if state < 0 else state for state in wanted]
    bad = [state for state in wanted if not 0 <= state <= last]
    if bad or not wanted:
        name = names[[run.steps for run in runs].index(last)]
        raise QueryError(
            f"the runs are compared at {f'state {bad[0]:,}' if bad else 'no state'}",
            why=f"{name} has the fewest: states 0 to {last:,}",
            fix=f"choose among them, such as state={last}",
        )
    return tuple(sorted(set(wanted)))


def _training(runs: Sequence[Run], train: Any) -> tuple[Data, np.ndarray] | None:
    """Return training samples of the reference, and their ids."""
    first, asked = runs[0], not isinstance(train, int | np.integer)
    lacking = [run.path for run in runs if "losses" not in run.log.header.programs]
    if not asked and (train < 1 or first.data is None or lacking):
        return None
    if first.data is None or lacking:
        raise QueryError(
            f"{lacking[0] if lacking else first.path} cannot be asked for losses of samples",
            why="it has no program for them" if lacking else "it has no data at hand",
            fix="pass train=0" if lacking else f"replay.open({first.path!r}, data=...)",
        )
    count = len(first.data)
    ids = whole_numbers(train) if asked else spaced(count, int(train))
    if ids is None:
        raise QueryError(
            f"train={train!r:.60}",
            why="it is how many training samples the runs are tested on, or their ids",
            fix="train=2000, train=[3, 17, 20], or train=0",
        )
    outside = ids[(ids < 0) | (ids >= count)]
    if len(outside) or not len(ids):
        raise QueryError(
            f"there is no training sample {outside[0]}" if len(outside) else "train names none",
            why=f"{first.path} was trained on samples 0 to {count - 1:,}",
            fix="choose among them, or pass train=0",
        )
    data = samples_of(first, ids)
    assert data is not None
    return data, ids


def _sets(
    name: str, given: tuple[Data, np.ndarray | None] | None, runs: Sequence[Run], label: str
) -> Iterator[Tested]:
    if given is None:
        return
    data, ids = given
    of = {}
    for run in dict.fromkeys(runs):
        of[run] = run.on(data, name=name)
        assert of[run].sample_losses is not None  # raises here where the run cannot tell them
    ids = np.arange(len(data)) if ids is None else ids
    yield Tested(name, data, ids, labels_of(data, label), of)


def _classifies(runs: Sequence[Run], logits: str, tested: Sequence[Tested]) -> bool:
    """Tell whether all runs have tagged a number for each class, of which the largest tells it."""
    forms = set()
    for run in runs:
        table = run.log.header.programs.get("activations", {}).get("table", [])
        forms |= {next((tuple(x["shape"][1:]) for x in table if x["name"] == logits), ())}
    (form,) = forms if len(forms) == 1 else [()]
    if len(form) != 1 or form[0] < 2:
        return False
    classes = [each.labels for each in tested if each.labels is not None]
    # A label that no place stands for, such as -1 or a number in between, would never be right.
    return all(np.isin(labels, np.arange(form[0])).all() for labels in classes)


# ------------------------------------------------------------------------------------- small things


def _attributes(grade: str, steps: int) -> dict[str, Any]:
    return {"grade": grade, "steps": steps}


def _number(step: int | None) -> str:
    return "never" if step is None else f"{step:,}"


def _some(count: int, most: int = 6) -> list[int]:
    return spaced(count, most).tolist()
