"""The logical plan of a question: frozen, printable, and canonical.

A node has named dimensions. `step` and `state` are walked by a replay, `position` is the place in a
batch, `weight` runs over the elements of all chosen tensors (ragged: each tensor has its own
number), and reductions add `group`, `rank`, `bin` and `quantile`. Selections are pushed down to the
scans while a question is built, so that equal questions have equal plans.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from replay.errors import QueryError

T = TypeVar("T")

# The order in which the dimensions of a value stand; what is not listed stands before the ragged.
ORDER = ("epoch", "window", "step", "state", "occurrence", "position", "sample", "tensor", "group")
RAGGED = ("unit", "weight")
WALKED = ("step", "state")

QUANTITIES = {
    "weights": ("state", "weight"),
    "opt_state": ("state", "weight"),
    "grads": ("step", "weight"),
    "updates": ("step", "weight"),
    "carried_updates": ("step", "weight"),
    "residual_updates": ("step", "weight"),
    "condition": ("step", "weight"),
    "samples": ("step", "position"),
    "sample_losses": ("step", "position"),
    "sample_grads": ("step", "position", "weight"),
    "sample_updates": ("step", "position", "weight"),
    "activations": ("step", "position", "unit"),
    "column": ("step",),
}

# Where other samples than those of the batch are looked at, at the state before a step.
ELSEWHERE = {
    "sample_losses": ("state", "sample"),
    "sample_grads": ("state", "sample", "weight"),
    "activations": ("state", "sample", "unit"),
}


def ordered(dims: Any) -> tuple[str, ...]:
    """Return dimensions in the order in which those of a value stand.

    >>> ordered({"weight", "rank", "step"})
    ('step', 'rank', 'weight')
    """
    dims = set(dims)
    front = [dim for dim in ORDER if dim in dims]
    back = [dim for dim in RAGGED if dim in dims]
    return (*front, *sorted(dims - set(front) - set(back)), *back)


@typing.dataclass_transform(frozen_default=True)
def frozen(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that hashes itself once: at each step of a replay plans are keys."""
    made = dataclasses.dataclass(frozen=True)(cls)
    fresh = made.__hash__

    def __hash__(self) -> int:
        known = self.__dict__
        if "_hash" not in known:
            known["_hash"] = fresh(self)
        return known["_hash"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hash: strings have another one in every process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    made.__hash__, made.__getstate__ = __hash__, __getstate__
    return made


@frozen
class Part:
    """The chosen elements of one tensor: all of them, or those with these flat indices."""

    path: str
    shape: tuple[int, ...]
    indices: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """How many elements."""
        return int(np.prod(self.shape)) if self.indices is None else len(self.indices)

    def __str__(self) -> str:
        if self.indices is None:
            return self.path
        if len(self.indices) > 3:
            return f"{self.path}[{len(self.indices)} weights]"
        places = [np.unravel_index(i, self.shape) for i in self.indices]
        return ", ".join(f"{self.path}[{','.join(map(str, map(int, p)))}]" for p in places)


@frozen
class Group:
    """What a reduction keeps apart.

    Attributes:
        kind: `labels`, `sample`, `tensor`, `unit`, `epoch` or `window` (of steps).
        labels: for `labels`, the number of the group of each sample, `int32` little-endian.
        names: for `labels`, what the groups are called.
        size: the number of samples, or the steps of a window.
    """

    kind: str
    labels: bytes = b""
    names: tuple[Any, ...] = ()
    size: int = 0

    @property
    def over(self) -> tuple[str, ...]:
        """The dimensions of which one has to be reduced."""
        return {
            "labels": ("position", "sample"),
            "sample": ("position",),
            "tensor": ("weight",),
            "unit": ("weight",),
            "epoch": WALKED,
            "window": WALKED,
        }[self.kind]

    @property
    def dim(self) -> str:
        """The dimension that takes its place."""
        return "group" if self.kind == "labels" else self.kind

    @property
    def count(self) -> int:
        """How many groups of samples there are."""
        return len(self.names) if self.kind == "labels" else self.size

    def __str__(self) -> str:
        return f"{self.count} labels" if self.kind == "labels" else self.kind


class Node:
    """A part of a plan."""

    dims: tuple[str, ...]

    @property
    def children(self) -> "tuple[Node, ...]":
        """The nodes that this one is made of."""
        return ()

    @functools.cached_property
    def walked(self) -> str:
        """The dimension that a replay walks along, or nothing."""
        return next((dim for dim in self.dims if dim in WALKED), "")

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The steps, or states, at which there is a value, ascending."""
        found = [child.steps for child in self.children if child.walked]
        return functools.reduce(functools.partial(np.intersect1d, assume_unique=True), found)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of the ragged dimension."""
        found = [child.parts for child in self.children if set(child.dims) & set(RAGGED)]
        return found[0] if found else ()

    def rebuilt(self, change: Callable[["Node"], "Node"]) -> "Node":
        """Return the same node of changed children."""
        return self

    def scans(self) -> Iterator["Scan"]:
        """Yield all scans below."""
        for child in self.children:
            yield from child.scans()

    def lines(self, indent: str = "") -> list[str]:
        """Return a tree, a line for each node."""
        return [f"{indent}{self}", *(x for c in self.children for x in c.lines(indent + "  "))]


@frozen
class Scan(Node):
    """A quantity of a run.

    Attributes:
        run: which; numbers the runs of a question by their paths.
        quantity: its name.
        where: the steps or states: `(start, stop, stride)`, or a list of numbers.
        tensors: what is chosen of them, for ragged quantities.
        name: of a column or of activations.
        source: of other samples, their name; else nothing.
        samples: how many of those there are.
    """

    run: str
    quantity: str
    where: tuple[int, int, int] | tuple[tuple[int, ...]]
    tensors: tuple[Part, ...] = ()
    name: str = ""
    source: str = ""
    samples: int = 0

    @property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of its quantity."""
        return (ELSEWHERE if self.source else QUANTITIES)[self.quantity]

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The steps, or states, that are chosen."""
        return _steps(self.where)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """What is chosen of the tensors."""
        return self.tensors

    def scans(self) -> Iterator["Scan"]:
        """Yield itself."""
        yield self

    def __str__(self) -> str:
        steps, word = self.steps, "step" if "step" in self.dims else "state"
        if not len(steps):
            chosen = f"no {word}"
        elif len(steps) == 1:
            chosen = f"{word} {steps[0]}"
        else:
            stride = steps[1] - steps[0]
            every = "" if stride == 1 else f", every {stride}"
            chosen = f"{word}s {steps[0]} to {steps[-1]}{every}"
        whose = f".on({self.source})" if self.source else ""
        name = f"({self.name})" if self.name else ""
        what = [str(part) for part in self.tensors]
        shown = ", ".join(what[:3]) + (f", and {len(what) - 3} more" if len(what) > 3 else "")
        of = f" of {shown}" if shown else ""
        return f"scan {self.run}{whose}.{self.quantity}{name}: {chosen}{of}"


@frozen
class Map(Node):
    """A function of elements, by its name in `jax.numpy`; constants stand as numbers."""

    function: str
    arguments: tuple[Any, ...]
    constants: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        # 1 == 1.0 == True and 0.0 == -0.0, but they are other questions.
        constants = [repr(x) for x in self.arguments if not isinstance(x, Node)]
        object.__setattr__(self, "constants", " ".join(constants))

    @property
    def children(self) -> tuple[Node, ...]:
        """The arguments that are no constants."""
        return tuple(x for x in self.arguments if isinstance(x, Node))

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """All dimensions of the arguments."""
        return ordered(dim for child in self.children for dim in child.dims)

    def rebuilt(self, change: Callable[[Node], Node]) -> Node:
        """Return the same function of changed arguments."""
        return Map(
            self.function, tuple(change(x) if isinstance(x, Node) else x for x in self.arguments)
        )

    def __str__(self) -> str:
        return f"map {self.function}" + (f" with {self.constants}" if self.constants else "")


@frozen
class _Unary(Node):
    child: Node

    @property
    def children(self) -> tuple[Node, ...]:
        """The one."""
        return (self.child,)

    @property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the child."""
        return self.child.dims

    def rebuilt(self, change: Callable[[Node], Node]) -> Node:
        """Return the same of a changed child."""
        return dataclasses.replace(self, child=change(self.child))


@frozen
class At(_Unary):
    """States seen from a step: the one before it (`offset` 0) or after it (1).

    Attributes:
        offset: which of them.
        where: the steps, as in a scan; None for all that lie between chosen states.
    """

    offset: int
    where: Any = None

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """With steps in the place of states."""
        return ordered("step" if dim == "state" else dim for dim in self.child.dims)

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Those whose state is there."""
        states = self.child.steps
        both = np.intersect1d(states, states - 1, assume_unique=True)
        return both if self.where is None else np.intersect1d(both, _steps(self.where))

    def __str__(self) -> str:
        return f"state {'after' if self.offset else 'before'} the step"


@frozen
class Lag(_Unary):
    """What stood at the step before, of those that are chosen."""

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """All but the first."""
        return self.child.steps[1:]

    def __str__(self) -> str:
        return "the step before"


@frozen
class Among(_Unary):
    """Only the occurrences of some samples: others are NaN or false, and no reduction sees them."""

    samples: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:6]))
        return f"samples {shown}" + (", ..." if len(self.samples) > 6 else "")


@frozen
class Reduce(_Unary):
    """A reduction over dimensions; `settings` are its own, as pairs."""

    how: str
    over: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    by: Group | None = None

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that are left, and what the reduction adds."""
        dims = {dim for dim in self.child.dims if dim not in self.over}
        added = {"top_k": "rank", "hist": "bin", "quantile": "quantile"}.get(self.how)
        dims |= {added} if added else set()
        return ordered(dims | ({self.by.dim} if self.by else set()))

    @property
    def options(self) -> dict[str, Any]:
        """The settings."""
        return dict(self.settings)

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Those of the child."""
        return self.child.steps

    def __str__(self) -> str:
        settings = "".join(f", {k} {v}" for k, v in self.settings)
        by = f" by {self.by}" if self.by else ""
        return f"{self.how} over {' and '.join(self.over)}{by}{settings}"


@frozen
class Pick(_Unary):
    """One entry of a dimension that a reduction has added."""

    dim: str
    index: int

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """Without it."""
        return tuple(dim for dim in self.child.dims if dim != self.dim)

    def __str__(self) -> str:
        return f"{self.dim} {self.index}"


@frozen
class Rename(_Unary):
    """A dimension by another name."""

    old: str
    new: str

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """With the new name."""
        return ordered(self.new if dim == self.old else dim for dim in self.child.dims)

    def __str__(self) -> str:
        return f"rename {self.old} to {self.new}"


@frozen
class Take(Node):
    """The first or last occurrences (or steps) before or after an anchor.

    Attributes:
        child: what is taken, along its steps and positions.
        anchor: a step, or a plan that finds one; below zero for never.
        count: how many; None for all.
        last: whether the last of them, nearest to an anchor that they stand before.
        before: whether they stand before the anchor.
        inclusive: whether the anchor's own step belongs to them.
        of: whose occurrences they are, where they are those of another quantity.
    """

    child: Node
    anchor: Any
    count: int | None
    last: bool
    before: bool
    inclusive: bool
    of: Node | None = None

    @property
    def children(self) -> tuple[Node, ...]:
        """What is taken; the anchor is a question of its own."""
        return (self.child,)

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        """With occurrences in the place of steps and positions."""
        rest = {dim for dim in self.child.dims if dim not in ("step", "position")}
        return ordered(rest | {"occurrence"})

    def rebuilt(self, change: Callable[[Node], Node]) -> Node:
        """Return the same of a changed child."""
        return dataclasses.replace(self, child=change(self.child))

    def scans(self) -> Iterator[Scan]:
        """Yield those of the anchor, too."""
        yield from self.child.scans()
        if isinstance(self.anchor, Node):
            yield from self.anchor.scans()

    def lines(self, indent: str = "") -> list[str]:
        """Return a tree, that of the anchor first."""
        anchor = self.anchor.lines(indent + "  ") if isinstance(self.anchor, Node) else []
        return [f"{indent}{self}", *anchor, *self.child.lines(indent + "  ")]

    def __str__(self) -> str:
        many = "all" if self.count is None else f"{'last' if self.last else 'first'} {self.count}"
        side = "before" if self.before else "after"
        anchor = "the step that is found" if isinstance(self.anchor, Node) else self.anchor
        return f"take {many} {side} {anchor}{', its own included' if self.inclusive else ''}"


def restrict(node: Node, dim: str, chosen: np.ndarray) -> Node:
    """Push a choice of steps or states down to the scans.

    Raises:
        QueryError: a question within has already looked at all of them.
    """
    if isinstance(node, Scan):
        if dim not in node.dims:
            return node
        kept = np.intersect1d(node.steps, chosen, assume_unique=True)
        return dataclasses.replace(node, where=_where(kept))
    if isinstance(node, At) and dim == "step":
        kept = np.intersect1d(node.steps, chosen)
        states = np.union1d(kept, kept + 1)
        return At(restrict(node.child, "state", states), node.offset, _where(kept))
    if isinstance(node, Lag):
        before = np.searchsorted(node.child.steps, chosen) - 1
        both = np.union1d(chosen, node.child.steps[before[before >= 0]])
        return Lag(restrict(node.child, dim, both))
    if dim not in node.dims:
        return node
    return node.rebuilt(lambda child: restrict(child, dim, chosen) if dim in child.dims else child)


def narrow(node: Node, choose: Callable[[tuple[Part, ...]], tuple[Part, ...]]) -> Node:
    """Push a choice of tensors or weights down to the scans."""
    if isinstance(node, Scan):
        return dataclasses.replace(node, tensors=choose(node.tensors)) if node.tensors else node
    if isinstance(node, Reduce) and set(node.over) & set(RAGGED):
        return node
    return node.rebuilt(lambda child: narrow(child, choose))


def _steps(where: Any) -> np.ndarray:
    return np.asarray(where[0], np.int64) if len(where) == 1 else np.arange(*where)


def _where(steps: np.ndarray) -> Any:
    if not len(steps):
        return (0, 0, 1)
    if len(steps) == 1:
        return (int(steps[0]), int(steps[0]) + 1, 1)
    stride = int(steps[1] - steps[0])
    if (np.diff(steps) == stride).all():
        return (int(steps[0]), int(steps[-1]) + 1, stride)
    return (tuple(steps.tolist()),)


def check_parts(nodes: Any) -> None:
    """Refuse to combine values of different weights.

    Raises:
        QueryError: the tensors differ, or what is chosen of them.
    """
    ragged = [x for x in nodes if isinstance(x, Node) and set(x.dims) & set(RAGGED)]
    several = dict.fromkeys(x.parts for x in ragged if x.parts)
    if len(several) > 1:
        first, second = list(several)[:2]
        raise QueryError(
            f"values of {len(first)} and of {len(second)} tensors are combined, or of other "
            "weights of them",
            why="values are combined weight by weight",
            fix="select the same tensors and weights on both sides",
        )
