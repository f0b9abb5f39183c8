"""Which steps of a question the indexes decide, so that only the others are replayed.

The plan below a root is evaluated with intervals instead of numbers: what every node is at least
and at most, at every step; of conditions, whether they must or may hold; of the weights of a
tensor, how many they hold for at least and at most. What no column bounds is unbounded, and is
replayed. An answer is put together from what is decided and from the same root over the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from replay.bounds import LARGEST, TINY, at_least, larger
from replay.plan import cut, tensors_of
from replay.query.nodes import At, Map, Node, Part, Reduce, Scan

# What may be looked at without replaying it.
BOUNDED = ("grads", "updates", "weights")

# Numbers of steps and weights that are compared at once, and in all segments together.
_AT_ONCE, _AT_ALL = 2**22, 2**28


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


class Numbers(NamedTuple):
    """What numbers can be, `[steps, lanes]`; an axis of one stands for all.

    Attributes:
        low: `float64`, no value is below.
        high: `float64`, no value is above.
        nan: whether there may be one that is not a number.
        exact: whether `low` is the value to the last bit.
        dtype: of the values.
        stats: what is logged of all weights of a tensor, or of the magnitude of some.
    """

    low: np.ndarray
    high: np.ndarray
    nan: np.ndarray
    exact: np.ndarray
    dtype: Any
    stats: "_Stats | _Least | None" = None


class Holds(NamedTuple):
    """Whether a condition holds, `[steps, lanes]`.

    Attributes:
        must: surely.
        may: perhaps.
        count: for all weights of a tensor, of how many at least and at most, `int64[steps]` each.
    """

    must: np.ndarray
    may: np.ndarray
    count: tuple[np.ndarray, np.ndarray] | None = None


class _Stats(NamedTuple):
    """What is logged of all weights of a tensor.

    Attributes:
        most: `float64[steps]`, the largest magnitude; NaN where not known.
        exact: `bool[steps]`, whether a replay would return its very bits.
        norm: `float64[steps]`.
        above: `int64[steps, edges]`; None for updates.
        total: `int64[steps]`, how many are numbers.
        magnitude: whether it is the magnitudes themselves that are asked about.
    """

    most: np.ndarray
    exact: np.ndarray
    norm: np.ndarray
    above: np.ndarray | None
    total: np.ndarray
    magnitude: bool = False


Known = Numbers | Holds


class Narrowed(NamedTuple):
    """A root, with what is decided of it.

    Attributes:
        rest: the same root over what has to be replayed; None if that is nothing.
        combine: makes the arrays of the whole answer, as `data` of a value, from those of `rest`.
        looked: how many steps, or states, the question looks at.
        left: how many are replayed to be looked at.
        skipped: bound -> segments that hold none of those.
    """

    rest: Node | None
    combine: Callable[[list[np.ndarray] | None], list[np.ndarray]]
    looked: int
    left: int
    skipped: dict[str, list[tuple[int, int]]]

    def lines(self) -> list[str]:
        """Tell what is decided."""
        decided = self.looked - self.left
        found = [f"  {decided:,} of {self.looked:,} decided by the log"]
        for bound, segments in self.skipped.items():
            shown = ", ".join(f"{a} to {b}" for a, b in segments[:4])
            more = f", and {len(segments) - 4} more" if len(segments) > 4 else ""
            found.append(f"  {len(segments)} segments skipped by {bound}: states {shown}{more}")
        return found


# ------------------------------------------------------------------------------------- intervals


def _column(x: Any) -> np.ndarray:
    return np.asarray(x)[:, None]


def _unknown() -> Numbers:
    one = np.ones((1, 1))
    return Numbers(-np.inf * one, np.inf * one, one > 0, one < 0, None)


def _perhaps() -> Holds:
    return Holds(np.zeros((1, 1), bool), np.ones((1, 1), bool))


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, 0.0, x)


def _above(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell whether a > b, and whether so does who takes the smallest numbers for zero."""
    return a > b, _flushed(a) > _flushed(b)


def _precision(*dtypes: Any) -> tuple[float, float, float]:
    """Return the relative rounding, the smallest normal and the largest number of an operation."""
    known = [jnp.finfo(d) for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
    eps = max([float(info.eps) for info in known], default=2.0**-7)
    tiny = max([float(info.tiny) for info in known], default=TINY)
    largest = min([float(info.max) for info in known], default=LARGEST)
    return eps, max(tiny, TINY), largest


def _widened(low: Any, high: Any, nan: Any, *dtypes: Any) -> Numbers:
    """Return bounds of what is computed with rounding from what lies between bounds."""
    eps, tiny, largest = _precision(*dtypes)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        low = low - 2 * eps * np.abs(low) - 4 * tiny
        high = high + 2 * eps * np.abs(high) + 4 * tiny
    spoiled = np.isnan(low) | np.isnan(high)
    low = np.where(spoiled | (low < -largest), -np.inf, low)
    high = np.where(spoiled | (high > largest), np.inf, high)
    nan = np.broadcast_to(np.asarray(nan) | spoiled, low.shape)
    shared = set(dtypes)
    dtype = shared.pop() if len(shared) == 1 else None
    return Numbers(low, high, nan, np.zeros(low.shape, bool), dtype)


def _exactly(values: np.ndarray, dtype: Any) -> Numbers:
    """Return numbers that are known to the bit; of one that is none, nothing is said."""
    nan = np.isnan(values)
    low, high = np.where(nan, -np.inf, values), np.where(nan, np.inf, values)
    return Numbers(low, high, nan, ~nan, dtype)


def _constant(x: Any, dtype: Any) -> Numbers:
    """Return a number as it stands beside values of a dtype."""
    value = float(x)
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer):
        # Beside whole numbers a fraction makes float32 of both.
        held = isinstance(x, int)
    else:
        kind = np.dtype(np.float32) if dtype is None else dtype
        with np.errstate(over="ignore"):
            near = float(np.asarray(value).astype(kind))
        # To float32 a number is rounded as NumPy does; to other types perhaps twice.
        held = near == value or np.isnan(value) or kind == np.dtype(np.float32)
        value = near if held else value
    one = np.full((1, 1), value)
    return _exactly(one, dtype) if held else _widened(one, one, False, dtype)


def _finite(*numbers: Numbers) -> np.ndarray:
    shape = np.broadcast_shapes(*(n.low.shape for n in numbers))
    found = np.ones(shape, bool)
    for n in numbers:
        found = found & np.isfinite(n.low) & np.isfinite(n.high)
    return found


def _dtypes(numbers: Sequence[Numbers]) -> list[Any]:
    """Return the dtypes of an operation; where one is not known, so is its precision."""
    return [n.dtype if n.dtype is not None else np.dtype(np.float32) for n in numbers]


def _arithmetic(name: str, a: Numbers, b: Numbers) -> Numbers:
    with np.errstate(all="ignore"):
        if name == "add":
            corners = [a.low + b.low, a.high + b.high]
        elif name == "subtract":
            corners = [a.low - b.high, a.high - b.low]
        elif name == "multiply":
            corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        else:
            corners = [x / y for x in (a.low, a.high) for y in (b.low, b.high)]
    low = np.min(np.stack(np.broadcast_arrays(*corners)), axis=0)
    high = np.max(np.stack(np.broadcast_arrays(*corners)), axis=0)
    doubtful = ~_finite(a, b)
    if name in ("divide", "true_divide"):
        around = (b.low <= 4 * TINY) & (b.high >= -4 * TINY)
        low, high = np.where(around, -np.inf, low), np.where(around, np.inf, high)
        doubtful = doubtful | around
    if name in ("multiply", "divide", "true_divide"):
        # Infinite times zero is not a number, in whatever corner it stands.
        low, high = np.where(doubtful, -np.inf, low), np.where(doubtful, np.inf, high)
    return _widened(low, high, a.nan | b.nan | doubtful, *_dtypes((a, b)))


def _greater(a: Numbers, b: Numbers) -> Holds:
    unordered = a.nan | b.nan
    plain, flushed = _above(a.low, b.high)
    perhaps, also = _above(a.high, b.low)
    return Holds(plain & flushed & ~unordered, perhaps | also)


def _greater_equal(a: Numbers, b: Numbers) -> Holds:
    unordered = a.nan | b.nan
    below, flushed = _above(b.high, a.low)
    surely, also = _above(b.low, a.high)
    return Holds(~below & ~flushed & ~unordered, ~(surely & also))


def _not_equal(a: Numbers, b: Numbers) -> Holds:
    # What is not a number is equal to nothing.
    below = np.logical_and(*_above(b.low, a.high))
    over = np.logical_and(*_above(a.low, b.high))
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low) & ~a.nan & ~b.nan
    return Holds(below | over, ~same)


def _not(x: Holds, size: int) -> Holds:
    count = None if x.count is None else (size - x.count[1], size - x.count[0])
    return Holds(~x.may, ~x.must, count)


def _truth(x: Known) -> Holds:
    """Return whether something counts as true."""
    if isinstance(x, Holds):
        return x
    zero = _constant(0.0, x.dtype)
    return _not_equal(x, zero)


def _counts(x: Holds, size: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return of how many of the weights a condition holds, at least and at most, at each step."""

    def total(each):
        found = each.sum(-1, dtype=np.int64) if each.shape[-1] == size else each[:, 0] * size
        return np.broadcast_to(found.astype(np.int64), (steps,))

    low, high = total(x.must), total(x.may)
    if x.count is None:
        return low, high
    return np.maximum(low, x.count[0]), np.minimum(high, x.count[1])


_COMPARED: dict[str, Callable[[Numbers, Numbers], Holds]] = {
    "greater": _greater,
    "greater_equal": _greater_equal,
    "less": lambda a, b: _greater(b, a),
    "less_equal": lambda a, b: _greater_equal(b, a),
    "not_equal": _not_equal,
}
_MIRRORED = {
    "greater": "less", "less": "greater", "greater_equal": "less_equal",
    "less_equal": "greater_equal",
}  # fmt: skip
_CONDITIONS = (
    *_COMPARED, "equal", "logical_and", "logical_or", "logical_xor", "logical_not", "isnan",
    "isinf", "isfinite",
)  # fmt: skip


class _Evaluation:
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
        condition = isinstance(node, Map) and node.function in _CONDITIONS
        return [_perhaps() if condition else _unknown() for _ in range(parts)]

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
        return [_exactly(x.astype(np.float64).reshape(1, 1), x.dtype)]

    def _scan(self, scan: Scan, offset: int) -> list[Known]:
        if scan.source:
            return self._blank(scan)
        if scan.quantity == "column":
            values = self._column(scan.name)[self.at]
            found = _exactly(_column(values.astype(np.float64)), np.dtype(np.float32))
            if values.dtype != np.float32:
                found = _widened(found.low, found.high, found.nan, found.dtype)
            return [found]
        if scan.quantity == "weights":
            return [self._weights(part, offset) for part in scan.tensors]
        if scan.quantity in ("grads", "updates"):
            return [self._of_steps(scan.quantity, part) for part in scan.tensors]
        return self._blank(scan)

    def _weights(self, part: Part, offset: int) -> Numbers:
        if self._segment is None:
            return _unknown()
        dtype = self._evidence.dtype(part.path)
        found = self._evidence.where(part, *self._segment)
        low, high, least = found.low[None], found.high[None], found.least[None]
        if found.bound:
            self.bounds.add(found.bound)
        states = self.at + offset
        if len(states) == 1 and (exact := self._evidence.at(part, int(states[0]))) is not None:
            return _exactly(exact[None], dtype)
        stats = _Least(least)
        nan = ~(np.isfinite(low) & np.isfinite(high))
        return Numbers(low, high, nan, np.zeros(low.shape, bool), dtype, stats)

    def _of_steps(self, quantity: str, part: Part) -> Numbers:
        scalars = self._evidence.scalars(part.path)
        if scalars is None:
            return _unknown()
        inside = self.at < scalars.steps
        at = np.minimum(self.at, max(scalars.steps - 1, 0))
        if not scalars.steps:
            return _unknown()
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
            high = _widened(_column(high), _column(high), False, dtype).high[:, 0]
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
            stats = _Stats(most, exact, norm, counts, total)
        self.bounds.add("norms, maxima and counts of each step")
        high = _column(np.maximum(high, TINY))
        return Numbers(-high, high, _column(nan), np.zeros(high.shape, bool), dtype, stats)

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
            mine = [x if isinstance(x, Numbers | Holds) else _constant(x, dtype) for x in mine]
            shape = np.broadcast_shapes(*(x[0].shape for x in mine))
            if math.prod(shape) > 16 * _AT_ONCE:
                return self._blank(node)
            found.append(self._function(node.function, mine, size))
        return found

    def _function(self, name: str, given: list[Known], size: int) -> Known:
        name = {"absolute": "abs", "invert": "logical_not", "bitwise_and": "logical_and",
                "bitwise_or": "logical_or", "bitwise_xor": "logical_xor",
                "true_divide": "divide"}.get(name, name)  # fmt: skip
        numbers = [x for x in given if isinstance(x, Numbers)]
        if name in ("logical_and", "logical_or", "logical_xor", "logical_not"):
            return self._logical(name, [_truth(x) for x in given], size)
        if len(numbers) < len(given):
            return _perhaps() if name in _CONDITIONS else _unknown()
        if name == "equal":
            return _not(_not_equal(*numbers), size)
        if name in _COMPARED:
            return self._compared(name, numbers[0], numbers[1], size)
        if name in ("isnan", "isinf", "isfinite"):
            return self._finite(name, numbers[0], size)
        if name in ("add", "subtract", "multiply", "divide"):
            return _arithmetic(name, *numbers)
        if name == "abs":
            return _magnitude(numbers[0])
        if name == "negative":
            x = numbers[0]
            return Numbers(-x.high, -x.low, x.nan, np.zeros(x.low.shape, bool), x.dtype)
        if name == "positive":
            return numbers[0]
        if name == "square":
            x = _magnitude(numbers[0])
            with np.errstate(over="ignore"):
                return _widened(x.low**2, x.high**2, x.nan, *_dtypes([x]))
        if name == "sqrt":
            x = numbers[0]
            with np.errstate(invalid="ignore"):
                low, high = np.sqrt(np.maximum(x.low, 0)), np.sqrt(np.maximum(x.high, 0))
            return _widened(low, high, x.nan | (x.low < 0), *_dtypes([x]))
        if name == "sign":
            x = numbers[0]
            low = np.where(x.low >= 2 * TINY, 1.0, np.where(x.low >= 0, 0.0, -1.0))
            high = np.where(x.high <= -2 * TINY, -1.0, np.where(x.high <= 0, 0.0, 1.0))
            return Numbers(low, high, x.nan, np.zeros(low.shape, bool), x.dtype)
        if name in ("minimum", "maximum"):
            a, b = numbers
            choose = np.minimum if name == "minimum" else np.maximum
            low, high = choose(a.low, b.low), choose(a.high, b.high)
            nan = a.nan | b.nan
            # Where one may not be a number, so may be the result, or it is the other.
            low = np.where(nan, -np.inf, low)
            high = np.where(nan, np.inf, high)
            return _widened(low, high, nan, *_dtypes(numbers))
        return _unknown()

    def _logical(self, name: str, given: list[Holds], size: int) -> Holds:
        if name == "logical_not":
            return _not(given[0], size)
        a, b = given
        steps = len(self.at)
        counted = size > 1 and (a.count is not None or b.count is not None)
        (al, ah), (bl, bh) = (
            (_counts(x, size, steps) for x in (a, b)) if counted else ((None, None),) * 2
        )
        if name == "logical_and":
            count = (np.maximum(al + bl - size, 0), np.minimum(ah, bh)) if counted else None
            return Holds(a.must & b.must, a.may & b.may, count)
        if name == "logical_or":
            count = (np.maximum(al, bl), np.minimum(ah + bh, size)) if counted else None
            return Holds(a.must | b.must, a.may | b.may, count)
        must = (a.must & ~b.may) | (b.must & ~a.may)
        return Holds(must, ~((a.must & b.must) | (~a.may & ~b.may)))

    def _compared(self, name: str, a: Numbers, b: Numbers, size: int) -> Holds:
        found = _COMPARED[name](a, b)
        if b.stats is not None and a.stats is None and name in _MIRRORED:
            return self._compared(_MIRRORED[name], b, a, size)
        stats = a.stats
        if not isinstance(stats, _Stats) or not stats.magnitude or b.stats is not None:
            return found
        if b.low.shape[-1] != 1 or name not in _MIRRORED:
            return found
        steps = len(self.at)
        low, high = (np.broadcast_to(x[:, 0], (steps,)) for x in (b.low, b.high))
        unordered = np.broadcast_to(b.nan[:, 0], (steps,))
        strict = name in ("greater", "less_equal")
        if stats.above is None:
            known = ~np.broadcast_to(a.nan[:, 0], (steps,))
            least, most = np.zeros(steps, np.int64), stats.total
        else:
            known = stats.above[:, 0] >= 0
            least, most = (larger if strict else at_least)(stats.above, stats.total, low, high)
        with np.errstate(invalid="ignore"):
            some = stats.most > high if strict else stats.most >= high
            none = stats.most < low
            # Of numbers that a compiler may take for zero, nothing is said.
            safe = known & (np.abs(low) >= 2 * TINY) & (np.abs(high) >= 2 * TINY)
        least = np.where(some & safe, np.maximum(least, 1), least)
        most = np.where(none & safe, 0, most)
        least, most = np.where(safe, least, 0), np.where(safe, most, size)
        if name in ("less", "less_equal"):
            least, most = stats.total - most, stats.total - least
            least, most = np.where(safe, least, 0), np.where(safe, most, size)
        least = np.where(unordered, 0, np.maximum(least, 0))
        return found._replace(count=(least, np.minimum(most, size)))

    def _finite(self, name: str, x: Numbers, size: int) -> Holds:
        """Count what is not a number, or infinite."""
        stats = x.stats
        bounded = np.isfinite(x.low) & np.isfinite(x.high) & ~x.nan
        odd = Holds(np.zeros(bounded.shape, bool), ~bounded)
        if isinstance(stats, _Stats) and stats.above is not None:
            known = stats.above[:, 0] >= 0
            infinite = stats.above[:, -1]
            of = {"isnan": size - stats.total, "isinf": infinite}
            of["isfinite"] = of["isnan"] + infinite
            odd = odd._replace(
                count=(np.where(known, of[name], 0), np.where(known, of[name], size))
            )
        return _not(odd, size) if name == "isfinite" else odd

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
        return [_side_by_side(found, len(self.at))]


class _Least(NamedTuple):
    """What magnitudes of chosen weights are at least, `float64[1, weights]`."""

    least: np.ndarray


def _magnitude(x: Numbers) -> Numbers:
    low = np.where(x.low > 0, x.low, np.where(x.high < 0, -x.high, 0.0))
    high = np.maximum(np.abs(x.low), np.abs(x.high))
    stats = x.stats
    if isinstance(stats, _Least):
        low, stats = np.maximum(low, stats.least), None
    elif isinstance(stats, _Stats):
        stats = stats._replace(magnitude=True)
    return Numbers(low, high, x.nan, x.exact, x.dtype, stats)


def _side_by_side(found: Sequence[Known], steps: int) -> Known:
    """Put what is known of several tensors into lanes."""
    if all(isinstance(x, Holds) for x in found):
        must, may = (
            np.concatenate([np.broadcast_to(x[i], (steps, 1)) for x in found], axis=1)
            for i in (0, 1)
        )
        return Holds(must, may)
    if not all(isinstance(x, Numbers) for x in found):
        return _unknown()
    low, high, nan, exact = (
        np.concatenate([np.broadcast_to(x[i], (steps, 1)) for x in found], axis=1) for i in range(4)
    )
    dtypes = {x.dtype for x in found if isinstance(x, Numbers)}
    return Numbers(low, high, nan, exact, dtypes.pop() if len(dtypes) == 1 else None)


def of_weights(how: str, parts: Sequence[Known], sizes: Sequence[int], steps: int) -> Known:
    """Return what a reduction over the weights of some tensors can be, at each step.

    Args:
        how: of the reduction.
        parts: what is known of each tensor's weights.
        sizes: how many those are.
        steps: how many.
    """
    total = sum(sizes)
    if how in ("any", "all") or all(isinstance(x, Holds) for x in parts):
        truths = [_truth(x) for x in parts]
        pairs = [_counts(x, n, steps) for x, n in zip(truths, sizes, strict=True)]
        least, most = (np.sum([pair[i] for pair in pairs], axis=0) for i in (0, 1))
        if how == "any":
            return Holds(_column(least > 0), _column(most > 0))
        if how == "all":
            return Holds(_column(least == total), _column(most == total))
        if how == "count":
            least = most = np.full(steps, total, np.int64)
        if how in ("sum", "count") and total < 2**31:
            low, high = (_column(x.astype(np.float64)) for x in (least, most))
            return Numbers(low, high, low < 0, low == high, np.dtype(np.int32))
        if how == "mean" and 0 < total <= 2**24:
            # Counts up to 2**24 are added without rounding; the quotient is rounded somehow.
            none = _column(most == 0)
            found = _widened(
                _column(least / total), _column(most / total), False, np.dtype(np.float32)
            )
            low, high = np.where(none, 0.0, found.low), np.where(none, 0.0, found.high)
            return Numbers(low, high, found.nan & ~none, none, np.dtype(np.float32))
        return _unknown()
    if not all(isinstance(x, Numbers) for x in parts):
        return _unknown()
    numbers = [x for x in parts if isinstance(x, Numbers)]
    if how in ("max", "min"):
        return _extreme(how, numbers, steps)
    if how == "norm":
        return _norm(numbers, sizes, steps)
    return _unknown()


def _extreme(how: str, parts: Sequence[Numbers], steps: int) -> Numbers:
    each = [_extreme_of(how, x, steps) for x in parts]
    sign = 1 if how == "max" else -1
    choose, limit = (np.maximum, np.max) if how == "max" else (np.minimum, np.min)
    low = limit(np.stack([x.low for x in each]), axis=0)
    high = limit(np.stack([x.high for x in each]), axis=0)
    nan = np.any(np.stack([x.nan for x in each]), axis=0)
    # Exact where one that is exact stands beyond all that the others can be.
    edge = high if sign > 0 else low
    exact = np.zeros(low.shape, bool)
    for x in each:
        exact = exact | (x.exact & (x.low == edge) & (np.abs(edge) >= TINY))
    exact = exact | np.all(np.stack([x.exact for x in each]), axis=0)
    exact = exact & ~nan
    low, high = np.where(exact, choose(low, edge), low), np.where(exact, edge, high)
    low = np.where(exact, edge, low)
    # With something that is not a number among them, a compiler returns one of them or another.
    low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    dtypes = {x.dtype for x in parts}
    return Numbers(low, high, nan, exact, dtypes.pop() if len(dtypes) == 1 else None)


def _extreme_of(how: str, x: Numbers, steps: int) -> Numbers:
    spread = lambda y: np.broadcast_to(y, (steps, 1))  # noqa: E731
    if isinstance(x.stats, _Stats) and x.stats.magnitude and how == "max":
        most, exact = _column(x.stats.most), _column(x.stats.exact)
        low, high = np.where(exact, most, spread(x.low)), np.where(exact, most, spread(x.high))
        return Numbers(low, high, spread(x.nan), exact, x.dtype)
    limit = np.max if how == "max" else np.min
    low, high = limit(x.low, axis=-1, keepdims=True), limit(x.high, axis=-1, keepdims=True)
    nan, exact = x.nan.any(-1, keepdims=True), x.exact.all(-1, keepdims=True)
    return Numbers(spread(low), spread(high), spread(nan), spread(exact), x.dtype)


def _norm(parts: Sequence[Numbers], sizes: Sequence[int], steps: int) -> Numbers:
    """Return the norm, which two programs have rounded in two orders."""
    total, squares = sum(sizes), np.zeros(steps)
    for x in parts:
        if not isinstance(x.stats, _Stats) or x.dtype != np.dtype(np.float32):
            return _unknown()
        with np.errstate(over="ignore", invalid="ignore"):
            squares = squares + x.stats.norm**2
    share = (total + 64) * 2.0**-22
    with np.errstate(invalid="ignore"):
        known = np.isfinite(squares) & (squares < 1e37) & (share < 0.5)
    spare = total * 2 * TINY
    low = np.where(known, np.sqrt(np.maximum(squares * (1 - share) - spare, 0)), -np.inf)
    high = np.where(known, np.sqrt(np.where(known, squares, 0) * (1 + share) + spare), np.inf)
    return _widened(_column(low), _column(high), _column(~known), np.dtype(np.float32))


# ----------------------------------------------------------------------------------------- roots


def narrowed(
    root: Node,
    evidence: Evidence,
    *,
    constant: Callable[[Node], Any] = lambda node: None,
    column: Callable[[str], np.ndarray] | None = None,
) -> Narrowed | None:
    """Return what a root leaves to be replayed; None where nothing can be said.

    Args:
        root: of a canonical plan, of one run.
        evidence: what is known of the run.
        constant: the value of a node that is the same at every step; None where it is not known.
        column: name -> a number for each step.
    """
    scans = list(root.scans())
    if len({scan.run for scan in scans}) != 1:
        return None
    if not any(scan.quantity in BOUNDED and not scan.source for scan in scans):
        return None
    reduced = isinstance(root, Reduce) and not root.walked
    below = root.child if reduced else root  # type: ignore[attr-defined]
    walked = below.walked
    if reduced:
        assert isinstance(root, Reduce)
        if root.how not in _JOINED or set(root.over) - {walked, "weight"}:
            return None
        if root.by is not None and root.by.kind != "tensor":
            return None
    elif set(root.dims) - {walked, "tensor"}:
        return None
    column = column if column is not None else lambda name: np.zeros(0)
    looks = any(scan.quantity == "weights" for scan in scans)
    if looks and len(evidence.segments) * sum(p.size for p in tensors_of(root)) > _AT_ALL:
        return None
    pieces = [*_pieces(below.steps, walked, evidence.segments if looks else None)]
    if not len(below.steps):
        return None
    found: list[_Piece] = []
    for at, segment in pieces:
        evaluation = _Evaluation(evidence, constant, column, at, segment)
        values = evaluation.value(below)
        if reduced and "weight" in root.over and "weight" in below.dims:  # type: ignore[union-attr]
            assert isinstance(root, Reduce)
            values = _inner(root, values, below, len(at))
        found.append(_Piece(at, segment, values, frozenset(evaluation.bounds)))
    join = _JOINED[root.how] if isinstance(root, Reduce) and reduced else _Each
    joint = join(root)
    if not all(joint.fits(piece) for piece in found):
        return None
    for piece in found[::-1] if joint.backwards else found:
        joint.look(piece)
    left = joint.left([piece.at for piece in found])
    steps = below.steps
    if len(left) == len(steps):
        return None
    rest = cut(root, left)
    names: dict[tuple[int, int] | None, set[str]] = {}
    for piece in found:
        names.setdefault(piece.segment, set()).update(piece.bounds)
    skipped: dict[str, list[tuple[int, int]]] = {}
    for a, b in evidence.segments:
        first, last = np.searchsorted(steps, [a, b])
        if first < last and not len(np.intersect1d(left, steps[first:last])):
            bound = " and ".join(sorted(names.get((a, b) if looks else None, ())))
            skipped.setdefault(bound or "what is found elsewhere", []).append((a, b))
    return Narrowed(rest, lambda data: joint.combine(data, left), len(steps), len(left), skipped)


class _Piece(NamedTuple):
    """What is known at neighbouring steps.

    Attributes:
        at: the steps.
        segment: that they lie in.
        values: for each tensor, or once.
        bounds: what says so.
    """

    at: np.ndarray
    segment: tuple[int, int] | None
    values: list[Known]
    bounds: frozenset[str]


def _pieces(
    steps: np.ndarray, walked: str, segments: Sequence[tuple[int, int]] | None
) -> Iterator[tuple[np.ndarray, tuple[int, int] | None]]:
    """Part steps by segments; of states, the stored ones stand alone."""
    if segments is None:
        yield steps, None
        return
    for a, b in segments:
        inside = steps[(steps >= a) & (steps < b)]
        if walked == "state" and len(inside) and inside[0] == a:
            yield inside[:1], (a, b)
            inside = inside[1:]
        if len(inside):
            yield inside, (a, b)
    last = segments[-1]
    beyond = steps[steps >= last[1]] if segments else steps
    if len(beyond):
        yield beyond, last if walked == "state" else None


def _inner(root: Reduce, values: list[Known], below: Node, steps: int) -> list[Known]:
    """Reduce the weights within a step, as a root does that reduces both."""
    how = {"first": "any", "last": "any"}.get(root.how, root.how)
    sizes = [part.size for part in below.parts]
    if root.by is None:
        return [of_weights(how, values, sizes, steps)]
    found = [of_weights(how, [x], [n], steps) for x, n in zip(values, sizes, strict=True)]
    return [_side_by_side(found, steps)]


def _lanes(node: Node) -> int:
    """Return how many tensors are kept apart."""
    if isinstance(node, Reduce) and node.by is not None and node.by.kind == "tensor":
        return len(node.child.parts)
    return max((_lanes(child) for child in node.children), default=1)


class _Joint:
    """An answer that is put together; of each tensor, or once, an array of lanes."""

    backwards = False

    def __init__(self, root: Node):
        self.root = root
        lanes = root.dims if isinstance(root, Reduce) and not root.walked else ()
        self._ragged = "weight" in lanes
        self._tensors = "tensor" in lanes
        self._left: list[np.ndarray] = []
        below = root.child if isinstance(root, Reduce) and not root.walked else root
        sizes = [part.size for part in below.parts]
        self._sizes = sizes if self._ragged else [_lanes(root)] if self._tensors else [1]

    def fits(self, piece: _Piece) -> bool:
        """Whether a piece is of the kind that is joined."""
        return all(isinstance(x, Holds) for x in piece.values)

    def look(self, piece: _Piece) -> None:
        """Take what is known."""
        raise NotImplementedError

    def left(self, ats: Sequence[np.ndarray]) -> np.ndarray:
        """Return the steps that have to be replayed, ascending."""
        found = [x for x in self._left if len(x)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def combine(self, data: list[np.ndarray] | None, left: np.ndarray) -> list[np.ndarray]:
        """Return the arrays of the answer."""
        raise NotImplementedError

    def _shaped(self, lanes: list[np.ndarray]) -> list[np.ndarray]:
        return lanes if self._ragged or self._tensors else [x.reshape(()) for x in lanes]

    def _replayed(self, data: list[np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(x).reshape(-1) for x in data]


class _Edge(_Joint):
    """The first step, or the last, at which a condition holds."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self.backwards = root.how == "last"
        self._known = [np.full(n, -1, np.int64) for n in self._sizes]

    def look(self, piece: _Piece) -> None:
        at = piece.at[::-1] if self.backwards else piece.at
        open_ = np.zeros(len(at), bool)
        for known, truth in zip(self._known, piece.values, strict=True):
            assert isinstance(truth, Holds)
            must, may = (x[::-1] if self.backwards else x for x in (truth.must, truth.may))
            wide = np.broadcast_shapes(must.shape, may.shape, (1, len(known)))
            rows = max(1, _AT_ONCE // max(len(known), 1))
            for first in range(0, wide[0], rows):
                some = slice(first, first + rows)
                now, perhaps = (np.broadcast_to(x, wide)[some] for x in (must, may))
                reached = np.logical_or.accumulate(now, axis=0)
                before = np.concatenate([np.zeros((1, len(known)), bool), reached[:-1]])
                before = before | (known >= 0)
                doubt = (perhaps & ~now & ~before).any(1)
                if wide[0] == 1:
                    open_ |= doubt[0]
                else:
                    open_[some] |= doubt
                new = reached[-1] & (known < 0)
                if new.any():
                    place = now[:, new].argmax(0) + first
                    known[new] = at[place] if wide[0] > 1 else at[0]
        self._left.append(at[open_])

    def combine(self, data, left):
        found = [known.astype(np.int32) for known in self._known]
        if data is not None:
            found = [self._better(x, y) for x, y in zip(self._replayed(data), found, strict=True)]
        return self._shaped(found)

    def _better(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearer = np.maximum(x, y) if self.backwards else np.minimum(x, y)
        return np.where(x < 0, y, np.where(y < 0, x, nearer)).astype(np.int32)


class _Whether(_Joint):
    """Whether a condition holds at any step, or at all."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._any = root.how == "any"
        self._found = [np.zeros(n, bool) for n in self._sizes]
        self._pieces: list[_Piece] = []

    def look(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        for found, truth in zip(self._found, piece.values, strict=True):
            assert isinstance(truth, Holds)
            decided = truth.must if self._any else ~truth.may
            found |= decided.any(0)

    def left(self, ats):
        for piece in self._pieces:
            doubt = np.zeros(len(piece.at), bool)
            for found, truth in zip(self._found, piece.values, strict=True):
                assert isinstance(truth, Holds)
                doubt |= (truth.may & ~truth.must & ~found).any(1)
            self._left.append(piece.at[doubt])
        return super().left(ats)

    def combine(self, data, left):
        found = self._found if self._any else [~x for x in self._found]
        if data is not None:
            join = np.logical_or if self._any else np.logical_and
            found = [join(x, y) for x, y in zip(self._replayed(data), found, strict=True)]
        return self._shaped([np.asarray(x, bool) for x in found])


class _Count(_Joint):
    """How often a condition holds."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._every = root.how == "count"
        self._total = [np.zeros(n, np.int64) for n in self._sizes]

    def fits(self, piece: _Piece) -> bool:
        assert isinstance(self.root, Reduce)
        if "weight" in self.root.over:
            return all(
                isinstance(x, Numbers) and x.dtype == np.dtype(np.int32) for x in piece.values
            )
        return super().fits(piece)

    def look(self, piece: _Piece) -> None:
        steps, doubt = len(piece.at), np.zeros(len(piece.at), bool)
        both = []
        for x in piece.values:
            if isinstance(x, Numbers):
                least, most = (np.broadcast_to(y, (steps, y.shape[1])) for y in (x.low, x.high))
            else:
                least, most = x.must, x.may
                if self._every:
                    least = most = np.ones((1, 1), bool)
            doubt |= (least != most).any(1)
            both.append(least)
        sure = ~doubt
        for total, least in zip(self._total, both, strict=True):
            if len(least) == 1:
                total += least[0].astype(np.int64) * int(sure.sum())
            else:
                total += np.asarray(least)[sure].astype(np.int64).sum(0)
        self._left.append(piece.at[doubt])

    def combine(self, data, left):
        found = self._total
        if data is not None:
            found = [x + y for x, y in zip(self._replayed(data), found, strict=True)]
        return self._shaped([np.asarray(x, np.int64) for x in found])


class _Extreme(_Joint):
    """The largest or smallest of what is exactly known, and of what is replayed."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._sign = 1 if root.how == "max" else -1
        self._best = [np.full(n, -np.inf * self._sign) for n in self._sizes]
        self._pieces: list[_Piece] = []

    def fits(self, piece: _Piece) -> bool:
        return not self._ragged and all(
            isinstance(x, Numbers) and x.dtype == np.dtype(np.float32) for x in piece.values
        )

    def look(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        limit, choose = (np.max, np.maximum) if self._sign > 0 else (np.min, np.minimum)
        for best, x in zip(self._best, piece.values, strict=True):
            assert isinstance(x, Numbers)
            values = np.where(x.exact, x.low, -np.inf * self._sign)
            if len(values):
                best[:] = choose(best, limit(values, axis=0))

    def left(self, ats):
        for piece in self._pieces:
            doubt = np.zeros(len(piece.at), bool)
            for best, x in zip(self._best, piece.values, strict=True):
                assert isinstance(x, Numbers)
                beyond = x.high >= best if self._sign > 0 else x.low <= best
                doubt |= (~x.exact & (beyond | x.nan | (np.abs(best) < TINY))).any(1)
            self._left.append(piece.at[doubt])
        return super().left(ats)

    def combine(self, data, left):
        found = [x.astype(np.float32) for x in self._best]
        if data is not None:
            choose = np.maximum if self._sign > 0 else np.minimum
            found = [choose(x, y) for x, y in zip(self._replayed(data), found, strict=True)]
        return self._shaped(found)


class _Each(_Joint):
    """A value at every step."""

    def __init__(self, root: Node):
        super().__init__(root)
        self._pieces: list[_Piece] = []

    def fits(self, piece: _Piece) -> bool:
        dtypes = (np.dtype(np.float32), np.dtype(np.int32))
        return len(piece.values) == 1 and all(
            isinstance(x, Holds) or x.dtype in dtypes for x in piece.values
        )

    def look(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        (x,) = piece.values
        doubt = x.may & ~x.must if isinstance(x, Holds) else ~x.exact
        self._left.append(piece.at[np.broadcast_to(doubt.any(1), piece.at.shape)])

    def combine(self, data, left):
        rows = []
        for piece in self._pieces:
            (x,) = piece.values
            values = x.must if isinstance(x, Holds) else x.low.astype(x.dtype)
            rows.append(np.broadcast_to(values, (len(piece.at), values.shape[1])))
        width = _lanes(self.root) if "tensor" in self.root.dims else 1
        found = np.concatenate([np.broadcast_to(r, (len(r), width)) for r in rows]).copy()
        steps = np.concatenate([piece.at for piece in self._pieces])
        if "tensor" not in self.root.dims:
            found = found[:, 0]
        if data is not None:
            replayed = np.asarray(data[0])
            assert replayed.dtype == found.dtype and replayed.shape[1:] == found.shape[1:]
            found[np.searchsorted(steps, left)] = replayed
        return [found]


_JOINED: dict[str, Callable[[Node], _Joint]] = {
    "first": _Edge,
    "last": _Edge,
    "any": _Whether,
    "all": _Whether,
    "sum": _Count,
    "count": _Count,
    "max": _Extreme,
    "min": _Extreme,
}
