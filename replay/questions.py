"""The questions that are asked most often, ready-made: expressions, their answers, and tables.

Each function checks what it is given and replays nothing; `Question.answers` does.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from replay.api import Run, compute
from replay.data import Data, spaced
from replay.errors import QueryError
from replay.query.expressions import Expression
from replay.results import Result
from replay.tree import Leaf

_LABELS = ("label", "labels", "target", "targets", "class", "y")

# How many states a distance between two runs is drawn at, and how many samples both are tested on.
_MOST_STATES, _MOST_SAMPLES = 60, 2000


class Table(NamedTuple):
    """What is printed of an answer.

    Attributes:
        title: one line, what the rows are.
        columns: their names; those in `words` are text.
        rows: a text for each column.
        words: names of columns to be aligned to the left.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: tuple[str, ...] = ("tensor", "weight")


@dataclass(frozen=True, eq=False)
class Question:
    """A question of a run, answered in one replay when its answers are first asked for.

    Attributes:
        name: of the function that made it.
        run: which is asked.
        expressions: what is computed, by name.
        settings: what it was made with.
        read: turns answers into tables.
    """

    name: str
    run: Run
    expressions: Mapping[str, Expression]
    settings: Mapping[str, Any]
    read: Callable[["Question"], list[Table]] = field(repr=False)

    def explain(self) -> str:
        """Tell what the answers take: steps, how, seconds. Nothing is executed."""
        first = next(iter(self.expressions.values()))
        for other in self.expressions.values():
            first = first if other.source is first.source else _beside(first, other)
        return first.source.explain(*self.expressions.values())

    @functools.cached_property
    def answers(self) -> dict[str, Result]:
        """The results by name; the first access replays."""
        found = compute(*self.expressions.values())
        return dict(zip(self.expressions, found, strict=True))

    def tables(self) -> list[Table]:
        """Return the answers as tables."""
        return self.read(self)

    @property
    def footing(self) -> str:
        """The grade of the answers, and how many steps were replayed for them."""
        found = self.answers.values()
        grades = [answer.attrs["grade"] for answer in found if "empty" not in answer.attrs]
        steps = max(answer.attrs["steps"] for answer in self.answers.values())
        known = ("FAILED", "NUMERIC", "UNAUDITED", "BITWISE")
        grade = next((grade for grade in known if grade in grades), "LOGGED")
        meaning = {
            "BITWISE": "every bit that was logged agrees",
            "UNAUDITED": "not all of it was compared with a stored state",
        }.get(grade, "")
        return f"{grade}: {steps:,} steps replayed" + (f"; {meaning}" if meaning else "")


# -------------------------------------------------------------------------------- the questions


def samples(
    run: Run, *, epoch: int = 0, top: int = 5, by: str | None = None, tensor: str = "*"
) -> Question:
    """Ask which samples, or which classes, changed the weights most in an epoch.

    What a sample does to a tensor is the sum of its absolute shares in the updates of its weights
    (see `Quantities.sample_updates`).

    Args:
        run: which is asked.
        epoch: its number.
        top: how many samples of each tensor.
        by: groups samples by this leaf of the data; `label` stands for the one that is a class.
        tensor: a path, or a pattern such as `Dense_*`.

    Raises:
        QueryError: there is no such epoch, tensor or leaf.
    """
    _positive("top", top)
    shares = abs(run.sample_updates.sel(epoch=epoch, tensor=tensor)).by("tensor")
    groups = None if by is None else labels(run, by)
    if by is not None and groups is None:
        labels(run, by, needed=True)
    expression = shares.by("sample") if groups is None else shares.groupby(groups).sum()
    settings = {"epoch": epoch, "top": top, "by": by, "tensor": tensor}
    return Question("samples", run, {"moved": expression}, settings, _read_samples)


def weights(run: Run, *, top: int = 20, tensor: str = "*") -> Question:
    """Ask which weights changed most over the training.

    The path of a weight is the sum of the absolute values of its updates.

    Args:
        run: which is asked.
        top: how many weights.
        tensor: a path, or a pattern.

    Raises:
        QueryError: there is no such tensor.
    """
    _positive("top", top)
    updates = run.updates.sel(tensor=tensor)
    path = abs(updates).sum("step")
    expressions = {
        "top": path.top_k(top, dim="weight"),
        "tensors": path.by("tensor"),
        "net": updates.sum("step"),
    }
    return Question("weights", run, expressions, {"top": top, "tensor": tensor}, _read_weights)


def compare(run: Run, other: Run, *, step: int | None = None) -> Question:
    """Ask how far two runs are apart after so many steps, and how far each has come.

    Args:
        run: which is asked.
        other: another run of weights of the same shapes.
        step: after how many; by default as many as both have.

    Raises:
        QueryError: there are fewer steps, or the weights have other shapes.
    """
    shortest = min(run.steps, other.steps)
    step = shortest if step is None else step
    if not 1 <= step <= shortest:
        raise QueryError(
            f"{run.path} and {other.path} are compared after {step} steps",
            why=f"they have {run.steps:,} and {other.steps:,}",
            fix=f"1 to {shortest}",
        )
    check_alike(run, other)
    states = np.unique(np.linspace(0, step, _MOST_STATES).round().astype(int)).tolist()
    apart: Expression = np.subtract(run.weights, other.weights)  # type: ignore[assignment,call-overload]
    expressions = {
        "apart": apart.sel(state=step).groupby("tensor").norm(),
        "distance": apart.sel(state=states).norm("weight"),
    }
    tested = None if "losses" not in run.log.header.programs else samples_of(run)
    for name, each in (("a", run), ("b", other)):
        moved = each.updates.sel(step=slice(0, step)).sum("step")
        expressions[f"{name} moved"] = moved.groupby("tensor").norm()
        expressions[f"{name} logged"] = each.column("loss").sel(step=slice(0, step))
        if tested is not None and "losses" in each.log.header.programs:
            losses = each.on(tested, name="samples of both").sample_losses
            expressions[f"{name} loss"] = losses.sel(state=step).mean()
    settings = {"other": other, "step": step, "tested": 0 if tested is None else len(tested)}
    return Question("compare", run, expressions, settings, _read_compare)


def explosion(
    run: Run, *, threshold: float = 1024.0, share: float = 0.1, last: int = 10
) -> Question:
    """Ask for the last samples before more than a share of the gradients exceed a threshold.

    NaN counts as exceeding it.

    Args:
        run: which is asked.
        threshold: of the absolute values of the batch gradient.
        share: of all weights, 0 to 1.
        last: how many samples.
    """
    _positive("last", last)
    if not 0 <= share < 1:
        raise QueryError(
            f"more than a share of {share} of all gradients",
            why="a share of all lies from 0 to below 1",
            fix="such as 0.1",
        )
    exceeding = (~(abs(run.grads) <= threshold)).mean("weight")  # type: ignore[operator]
    boom = (exceeding > share).first("step")
    taken = run.samples.before(boom, last=last).join(
        loss=run.sample_losses, norm=run.sample_grads.norm("weight")
    )
    expressions = {
        "step": boom,
        "exceeding": exceeding,
        "largest": abs(run.grads).max("weight"),
        **taken.parts,
    }
    settings = {"threshold": threshold, "share": share, "last": last}
    return Question("explosion", run, expressions, settings, _read_explosion)


def zero(run: Run, weight: str, *, last: int = 20) -> Question:
    """Ask for the last samples that led a weight to zero, and the share of each.

    Args:
        run: which is asked.
        weight: such as `Dense_0/kernel[3,7]`.
        last: how many samples, those of the step itself included.

    Raises:
        QueryError: there is no such weight.
    """
    _positive("last", last)
    key = parse_weight(run, weight)
    path = run.weights[key].sum("weight")
    hit = path.crosses(0.0).first("step")
    updates, carried, shares = (
        quantity[key].sum("weight")
        for quantity in (run.updates, run.carried_updates, run.sample_updates)
    )
    taken = run.samples.before(hit, last=last, inclusive=True).join(share=shares)
    expressions = {
        "step": hit,
        "path": path,
        "update": updates.before(hit, last=1, inclusive=True),
        "carried": carried.before(hit, last=1, inclusive=True),
        **taken.parts,
    }
    settings = {"weight": weight, "last": last}
    return Question("zero", run, expressions, settings, _read_zero)


def gradients(run: Run, *, low: int = -24, high: int = 4, tensor: str = "*") -> Question:
    """Ask how large the gradients of the weights are at each step, counted by powers of two.

    Args:
        run: which is asked.
        low: the lowest power.
        high: the highest.
        tensor: a path, or a pattern.
    """
    edges = [2.0**power for power in range(low, high + 1)]
    found = abs(run.grads.sel(tensor=tensor)).hist(edges, dim="weight")
    return Question("gradients", run, {"counts": found}, {"tensor": tensor}, lambda question: [])


# -------------------------------------------------------------------------------- their tables


def _read_samples(question: Question) -> list[Table]:
    run, settings = question.run, question.settings
    moved = question.answers["moved"]
    kind = "sample" if settings["by"] is None else "class"
    ranked = ranking(moved, settings["top"])
    classes = labels(run) if kind == "sample" else None
    rows = []
    for tensor, entries in ranked.items():
        for rank, (name, value, part) in enumerate(entries, 1):
            own = (str(name),) if classes is None else (str(name), str(classes[name]))
            rows.append((tensor, str(rank), *own, f"{value:.4g}", f"{part:.2%}"))
    title = f"{'samples' if kind == 'sample' else 'classes'} that changed the weights most in "
    title += f"epoch {settings['epoch']}, by the sum of their |shares| in the updates"
    more = ("label",) if classes is not None else ()
    columns = ("tensor", "rank", kind, *more, "sum |share|", "of the tensor")
    return [Table(title, columns, rows)]


def ranking(moved: Result, top: int) -> dict[str, list[tuple[Any, float, float]]]:
    """Return for all weights and for each tensor who moved it: name, sum, part of the whole."""
    values = moved["value"].transpose("tensor", ...).values.astype(np.float64)
    dim = "sample" if "sample" in moved.sizes else "group"
    names = moved[dim].values if dim in moved.coords else np.arange(values.shape[1])
    tensors = [str(name) for name in moved["tensor"].values]
    rows = dict(zip(tensors, values, strict=True))
    if len(tensors) > 1:
        rows = {"all weights": values.sum(axis=0), **rows}
    found = {}
    for tensor, row in rows.items():
        # What is not a number comes first, as in every ranking.
        order = np.argsort(np.where(np.isnan(row), -np.inf, -row), kind="stable")[:top]
        whole = row.sum() or 1.0
        found[tensor] = [(names[i].item(), float(row[i]), float(row[i] / whole)) for i in order]
    return found


def _read_weights(question: Question) -> list[Table]:
    run, answers = question.run, question.answers
    leaves = {leaf.path: leaf for leaf in run.tensors}
    rows = []
    top = answers["top"]
    for rank, (tensor, index, value) in enumerate(
        zip(top["tensor"].values, top["weight"].values, top["value"].values, strict=True), 1
    ):
        if index < 0:
            continue
        net = answers["net"][str(tensor)].values.reshape(-1)[index]
        name = weight_name(leaves[str(tensor)], int(index))
        rows.append((str(rank), name, f"{value:.4g}", f"{net:+.4g}"))
    ranked = Table(
        f"weights that changed most over {run.steps:,} steps, by the length of their paths",
        ("rank", "weight", "path", "net change"),
        rows,
    )
    rows = []
    paths = zip(answers["tensors"]["tensor"].values, answers["tensors"]["value"].values)  # noqa: B905
    for tensor, value in sorted(((str(t), float(v)) for t, v in paths), key=lambda x: -x[1]):
        count = int(np.prod(leaves[tensor].shape))
        rows.append((tensor, f"{count:,}", f"{value:.4g}", f"{value / count:.4g}"))
    title = "tensors, by the length of the paths of their weights"
    return [ranked, Table(title, ("tensor", "weights", "path", "mean path"), rows)]


def _read_compare(question: Question) -> list[Table]:
    answers, step, other = question.answers, question.settings["step"], question.settings["other"]
    columns = [answers[name]["value"].values for name in ("apart", "a moved", "b moved")]
    columns = [column.reshape(-1).astype(np.float64) for column in columns]
    names = [str(name) for name in answers["apart"]["tensor"].values]
    whole = [np.sqrt(np.sum(column**2)) for column in columns]
    rows = [
        (name, *(f"{x:.4g}" for x in values), f"{_ratio(values[0], max(values[1:])):.2f}")
        for name, *values in [
            ("all weights", *whole),
            *zip(names, *columns, strict=True),
        ]
    ]
    first = Table(
        f"weights of a = {question.run.path} and b = {other.path} after {step:,} steps",
        ("tensor", "|a - b|", "a moved", "b moved", "apart / moved"),
        rows,
    )
    rows = []
    count = question.settings["tested"]
    if "a loss" in answers and "b loss" in answers:
        means = [f"{answers[f'{x} loss'].item():.4g}" for x in "ab"]
        rows.append((f"at state {step:,}, of the same {count:,} training samples", *means))
    window = min(step, 20)
    means = [f"{answers[f'{x} logged']['value'].values[-window:].mean():.4g}" for x in "ab"]
    rows.append((f"logged, of the last {window} batches of each", *means))
    return [first, Table("mean loss", ("loss", "a", "b"), rows, ("loss",))]


def _read_explosion(question: Question) -> list[Table]:
    answers, settings = question.answers, question.settings
    step, shares = int(answers["step"]), answers["exceeding"]["value"].values
    limit = f"{settings['share']:.0%} of |gradients| exceed {settings['threshold']:g}"
    columns = ("step", "position", "sample", "label", "loss", "|gradient|")
    if step < 0:
        largest = answers["largest"]["value"].values
        most, top = int(np.argmax(shares)), int(np.argmax(largest))
        title = f"at no step do more than {limit}: at most {shares[most]:.2%}, at step {most:,}; "
        title += f"the largest |gradient| is {largest[top]:.4g}, at step {top:,}"
        return [Table(title, columns, [])]
    classes = labels(question.run)
    rows = [
        (f"{at:,}", str(position), str(sample), _class(classes, sample), f"{loss:.4g}", f"{g:.4g}")
        for at, position, sample, loss, g in zip(
            *occurrences(answers["sample"]),
            answers["loss"]["value"].values,
            answers["norm"]["value"].values,
            strict=True,
        )
    ]
    title = f"the last {len(rows)} samples before step {step:,}, the first at which more than "
    title += f"{limit} ({shares[step]:.2%})"
    if not step:
        title = f"more than {limit} at step 0 already ({shares[0]:.2%}); nothing stands before it"
    return [Table(title, columns, rows)]


def _read_zero(question: Question) -> list[Table]:
    answers, settings = question.answers, question.settings
    path, step = answers["path"]["value"].values, int(answers["step"])
    columns = ("step", "position", "sample", "label", "share")
    if step < 0:
        nearest = int(np.argmin(np.abs(path)))
        title = f"{settings['weight']} never crosses or reaches 0: it comes nearest to it at state "
        title += f"{nearest:,}, with {path[nearest]:.4g}"
        return [Table(title, columns, [])]
    classes = labels(question.run)
    rows = [
        (f"{at:,}", str(position), str(sample), _class(classes, sample), f"{share:+.3e}")
        for at, position, sample, share in zip(
            *occurrences(answers["sample"]), answers["share"]["value"].values, strict=True
        )
    ]
    update, carried = (float(answers[x]["value"].values[0]) for x in ("update", "carried"))
    title = f"{settings['weight']} goes from {path[step]:+.3e} to {path[step + 1]:+.3e} at step "
    title += f"{step:,}: {update:+.3e}, of which its batch {update - carried:+.3e} and momentum "
    title += f"and decay {carried:+.3e}; the last {len(rows)} samples that led there"
    return [Table(title, columns, rows)]


def occurrences(taken: Result) -> tuple[list[int], list[int], list[int]]:
    """Return steps, positions and samples of what was taken."""
    steps, positions, samples = (
        (taken[name].values.tolist() if name in taken.coords else taken["value"].values.tolist())
        for name in ("step", "position", "sample")
    )
    return steps, positions, samples


# ------------------------------------------------------------------------- names and examples


def parse_weight(run: Run, text: str) -> tuple[Any, ...]:
    """Return the path and the indices of a weight by its name, `Dense_0/kernel[3,7]`.

    Raises:
        QueryError: there is no such weight, or it is more than one.
    """
    found = re.fullmatch(r"(.*?)(?:\[([\d,\s]*)\])?", text, re.DOTALL)
    assert found is not None
    path, inside = found.groups()
    index = tuple(int(x) for x in (inside or "").split(",") if x.strip())
    leaves = {leaf.path: leaf for leaf in run.tensors}
    if path not in leaves:
        raise QueryError(
            f"there is no tensor {path!r}",
            why="a weight is named by its tensor and its index",
            fix=f"such as {weight_name(run.tensors[0], 0)}; one of {', '.join(list(leaves)[:12])}",
        )
    shape = leaves[path].shape
    if len(index) != len(shape) or any(i >= n for i, n in zip(index, shape, strict=True)):
        raise QueryError(
            f"{text} is not one weight",
            why=f"{path} has the shape {list(shape)}",
            fix=f"an index within it for each axis, such as {weight_name(leaves[path], 0)}",
        )
    return (path, *index) if shape else (path,)


def weight_name(leaf: Leaf, index: int) -> str:
    """Name a weight by its flat index.

    >>> weight_name(Leaf("Dense_0/kernel", (512, 16), "float32"), 55)
    'Dense_0/kernel[3,7]'
    """
    place = np.unravel_index(index, leaf.shape) if leaf.shape else ()
    return f"{leaf.path}[{','.join(map(str, map(int, place)))}]" if leaf.shape else leaf.path


def labels(run: Run, leaf: str = "label", *, needed: bool = False) -> np.ndarray | None:
    """Return the class of each sample, `[samples]`, from a leaf of the data.

    Args:
        run: which.
        leaf: the path of the leaf; `label` also finds the usual other names of a class.
        needed: raise where there is none.

    Raises:
        QueryError: there is no such leaf.
    """
    found = None if run.data is None else labels_of(run.data, leaf)
    if found is None and needed:
        known = [x.path for x in (() if run.data is None else run.data.spec) if not x.shape]
        raise QueryError(
            f"the data has no leaf {leaf!r} that could be a class",
            why="samples are grouped by a leaf with one number for each sample",
            fix=f"one of {', '.join(known)}" if known else "run.sample_updates.groupby(labels)",
        )
    return found


def labels_of(data: Data, leaf: str = "label") -> np.ndarray | None:
    """Return the class of each sample of some data, `[samples]`; None where it has none.

    Args:
        data: the samples.
        leaf: as for `labels`.
    """
    spec = data.spec
    wanted = _LABELS if leaf == "label" else (leaf,)
    known = {x.path: number for number, x in enumerate(spec) if not x.shape}
    plain = {path.rpartition("/")[2].lower(): path for path in reversed(known)}
    for name in wanted:
        path = name if name in known else plain.get(name) if leaf == "label" else None
        if path is None:
            continue
        if leaf == "label" and np.dtype(spec[known[path]].dtype).kind not in "iub":
            continue
        return data.leaves(np.arange(len(data)))[known[path]]
    return None


def images(run: Run, ids: Sequence[int]) -> np.ndarray | None:
    """Return pictures of samples, `[n, height, width]` or `[n, height, width, 3 or 4]`, 0 to 1.

    None where no leaf of an example looks like a picture.
    """
    return None if run.data is None else images_of(run.data, ids)


def images_of(data: Data, ids: Sequence[int]) -> np.ndarray | None:
    """Return pictures of samples of some data, as `images`."""
    for number, leaf in enumerate(data.spec):
        if not _is_image(leaf):
            continue
        found = data.leaves(np.asarray(ids, np.int64))[number].astype(np.float64)
        if found.ndim == 2:
            side = round(found.shape[1] ** 0.5)
            found = found.reshape(len(found), side, side)
        if found.ndim == 4 and found.shape[1] in (1, 3) and found.shape[-1] not in (1, 3, 4):
            found = np.moveaxis(found, 1, -1)
        if found.ndim == 4 and found.shape[-1] == 1:
            found = found[..., 0]
        low, high = np.nanmin(found), np.nanmax(found)
        return np.nan_to_num((found - low) / ((high - low) or 1.0))
    return None


def _is_image(leaf: Leaf) -> bool:
    shape = leaf.shape
    if np.dtype(leaf.dtype).kind not in "fiu":
        return False
    if len(shape) == 1:  # pixels in a row, where the name says so
        side = round(shape[0] ** 0.5)
        return side >= 4 and side * side == shape[0] and "image" in leaf.path.lower()
    if len(shape) == 3:
        last = shape[-1] in (1, 3, 4)
        shape = shape[:2] if last else shape[1:] if shape[0] in (1, 3) else ()
    return len(shape) == 2 and min(shape) >= 4 and max(shape) <= 4 * min(shape)


def _class(classes: np.ndarray | None, sample: int) -> str:
    return "" if classes is None or sample < 0 else str(classes[sample])


def samples_of(run: Run, ids: np.ndarray | None = None) -> Data | None:
    """Return samples that runs are tested on: those of the first, evenly spaced or by their ids."""
    if run.data is None:
        return None
    ids = spaced(len(run.data), _MOST_SAMPLES) if ids is None else ids
    return Data.of_leaves(run.data.leaves(ids), [leaf.path for leaf in run.data.spec])


def check_alike(run: Run, other: Run) -> None:
    """Refuse runs whose weights have no counterparts in each other.

    Raises:
        QueryError: a tensor is missing or has another shape; the first is named.
    """
    ours, theirs = ({x.path: list(x.shape) for x in r.tensors} for r in (run, other))
    if ours == theirs:
        return
    path = next(path for path in (*ours, *theirs) if ours.get(path) != theirs.get(path))
    shown = [f"{x.get(path, 'none')}" for x in (ours, theirs)]
    raise QueryError(
        f"{run.path} and {other.path} have other weights: {path} is {shown[0]} in one and "
        f"{shown[1]} in the other",
        why="weights are compared one by one, each with that of the same tensor and place",
        fix="compare runs of one architecture; losses and metrics stand in run.history()",
    )


def _beside(first: Expression, other: Expression) -> Expression:
    return Expression(first.plan, first.source.joint(other.source))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise QueryError(
            f"{name} is {value}", why="it says how many are listed", fix="a number from 1 on"
        )
