"""What every node of a plan is at least and at most, at steps that nobody replays."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from replay.bounds import TINY
from replay.intervals import (
    CONDITIONS,
    Holds,
    Known,
    Least,
    Numbers,
    Stats,
    column,
    constant,
    exactly,
    of_elements,
    of_weights,
    perhaps,
    side_by_side,
    unknown,
    widened,
)
from replay.query.nodes import At, Map, Node, Part, Reduce, Scan

# Numbers of steps and weights that are looked at together.
_TOGETHER = 2**26


class Evidence(Protocol):
    """What is known of one run; see `replay.indexes`."""

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Neighbouring stored states."""
        ...

    def dtype(self, path: str) -> Any:
        """Return the dtype of a tensor."""
        ...

    def scalars(self, path: str) -> Any:
        """Return the columns of a tensor."""
        ...

    def where(self, part: Part, start: int, stop: int) -> Any:
        """Return where weights can have been in a segment."""
        ...

    def at(self, part: Part, state: int) -> np.ndarray | None:
        """Return weights at a stored state."""
        ...


class Evaluation:
    """The values of nodes at some steps of one segment, or of all.

    Args:
        evidence: of the run.
        constant: what is known of nodes that are the same at every step.
        column: the logged columns.
        at: the steps, or the states where the question walks along states.
        segment: `(first state, last state)` where weights are looked at.
    """

    def __init__(
        self,
        evidence: Evidence,
        constant: Callable[[Node], Any],
        column: Callable[[str], np.ndarray],
        at: np.ndarray,
        segment: tuple[int, int] | None,
    ):
        self._evidence, self._constant, self._column = evidence, constant, column
        self.at, self._segment = at, segment
        self._memo: dict[Node, list[Known]] = {}
        self.bounds: set[str] = set()

    def value(self, node: Node) -> list[Known]:
        """Return what a node can be: for each tensor, or once."""
        if node not in self._memo:
            self._memo[node] = self._value(node)
        return self._memo[node]

    def _blank(self, node: Node) -> list[Known]:
        parts = len(node.parts) if "weight" in node.dims else 1
        condition = isinstance(node, Map) and node.function in CONDITIONS
        return [perhaps() if condition else unknown() for _ in range(parts)]

    def _value(self, node: Node) -> list[Known]:
        if set(node.dims) - {"step", "state", "weight", "tensor"}:
            return self._blank(node)
        if {"weight", "tensor"} <= set(node.dims):
            return self._blank(node)
        if not node.walked:
            return self._same(node)
        if isinstance(node, Scan):
            return self._scan(node, 0)
        if isinstance(node, At) and isinstance(node.child, Scan):
            return self._scan(node.child, node.offset)
        if isinstance(node, Reduce):
            return self._reduced(node)
        if isinstance(node, Map):
            return self._mapped(node)
        return self._blank(node)

    # ---- where values come from

    def _same(self, node: Node) -> list[Known]:
        value = self._constant(node)
        if value is None or value.dims or np.size(value.data[0]) != 1:
            return self._blank(node)
        (x,) = value.data
        x = np.asarray(x)
        if x.dtype == bool:
            held = x.reshape(1, 1)
            return [Holds(held, held)]
        if x.dtype != np.float32:
            return self._blank(node)
        return [exactly(x.astype(np.float64).reshape(1, 1), x.dtype)]

    def _scan(self, scan: Scan, offset: int) -> list[Known]:
        if scan.source:
            return self._blank(scan)
        if scan.quantity == "column":
            values = self._column(scan.name)[self.at]
            found = exactly(column(values.astype(np.float64)), np.dtype(np.float32))
            if values.dtype != np.float32:
                found = widened(found.low, found.high, found.nan, found.dtype)
            return [found]
        if scan.quantity == "weights":
            return [self._weights(part, offset) for part in scan.tensors]
        if scan.quantity in ("grads", "updates"):
            return [self._of_steps(scan.quantity, part) for part in scan.tensors]
        return self._blank(scan)

    def _weights(self, part: Part, offset: int) -> Numbers:
        if self._segment is None:
            return unknown()
        dtype = self._evidence.dtype(part.path)
        found = self._evidence.where(part, *self._segment)
        low, high, least = found.low[None], found.high[None], found.least[None]
        if found.bound:
            self.bounds.add(found.bound)
        states = self.at + offset
        if len(states) == 1 and (exact := self._evidence.at(part, int(states[0]))) is not None:
            return exactly(exact[None], dtype)
        stats = Least(least)
        nan = ~(np.isfinite(low) & np.isfinite(high))
        return Numbers(low, high, nan, np.zeros(low.shape, bool), dtype, stats)

    def _of_steps(self, quantity: str, part: Part) -> Numbers:
        scalars = self._evidence.scalars(part.path)
        if scalars is None:
            return unknown()
        inside = self.at < scalars.steps
        at = np.minimum(self.at, max(scalars.steps - 1, 0))
        if not scalars.steps:
            return unknown()
        dtype = self._evidence.dtype(part.path)
        most = getattr(scalars, f"{quantity}_max")[at].astype(np.float64)
        norm = getattr(scalars, f"{quantity}_norm")[at].astype(np.float64)
        most = np.where(inside, most, np.nan)
        norm = np.where(inside, norm, np.nan)
        nan = ~inside | ~np.isfinite(most) if quantity == "updates" else ~inside | np.isnan(most)
        # Where updates were rounded twice, to the precision of the weights and in between.
        single = dtype == np.dtype(np.float32)
        high = np.where(np.isnan(most), np.inf, most)
        if quantity == "updates" and not single:
            high = widened(column(high), column(high), False, dtype).high[:, 0]
        stats = None
        if part.indices is None:
            exact = inside & np.isfinite(most) & ((most >= TINY) | ((most == 0) & single))
            exact = exact & (single | (quantity == "grads"))
            most = np.where(exact, most, np.nan)
            counts, total = None, np.full(len(at), part.size, np.int64)
            if quantity == "grads":
                counts = scalars.grads_above[at]
                total = np.where(inside, part.size - scalars.grads_nan[at], part.size)
                counts = np.where(inside[:, None], counts, -1)
            stats = Stats(most, exact, norm, counts, total)
        self.bounds.add("norms, maxima and counts of each step")
        high = column(np.maximum(high, TINY))
        return Numbers(-high, high, column(nan), np.zeros(high.shape, bool), dtype, stats)

    # ---- functions of elements

    def _mapped(self, node: Map) -> list[Known]:
        parts = len(node.parts) if "weight" in node.dims else 1
        given = [self.value(x) if isinstance(x, Node) else x for x in node.arguments]
        lanes = ["tensor" in x.dims if isinstance(x, Node) else False for x in node.arguments]
        found = []
        for i in range(parts):
            size = node.parts[i].size if "weight" in node.dims else 1
            mine: list[Any] = [
                (x[i] if len(x) > 1 else x[0]) if isinstance(x, list) else x for x in given
            ]
            if "weight" in node.dims and any(lanes):
                return self._blank(node)
            dtypes = [x.dtype for x in mine if isinstance(x, Numbers)]
            dtype = dtypes[0] if dtypes else None
            mine = [x if isinstance(x, Numbers | Holds) else constant(x, dtype) for x in mine]
            shape = np.broadcast_shapes(*(x[0].shape for x in mine))
            if math.prod(shape) > _TOGETHER:
                return self._blank(node)
            found.append(of_elements(node.function, mine, size, len(self.at)))
        return found

    # ---- reductions within a step

    def _reduced(self, node: Reduce) -> list[Known]:
        if node.over != ("weight",) or (node.by is not None and node.by.kind != "tensor"):
            return self._blank(node)
        child = self.value(node.child)
        sizes = [part.size for part in node.child.parts]
        apart = node.by is not None
        found = [
            of_weights(node.how, [x], [size], len(self.at)) for x, size in zip(child, sizes,
                                                                                strict=True)
        ] if apart else [of_weights(node.how, child, sizes, len(self.at))]  # fmt: skip
        if len(found) == 1:
            return found
        return [side_by_side(found, len(self.at))]
