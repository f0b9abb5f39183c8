"""Arithmetic with intervals instead of numbers, and with what may or must hold.

Whatever a compiler makes of numbers that lie between bounds lies between the bounds of the result:
results are widened by their rounding, and the smallest numbers may count as zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay.bounds import LARGEST, TINY, at_least, larger


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
    stats: "Stats | Least | None" = None


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


class Stats(NamedTuple):
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


class Least(NamedTuple):
    """What magnitudes of chosen weights are at least, `float64[1, weights]`."""

    least: np.ndarray


def column(x: Any) -> np.ndarray:
    """Return a value for each step as that of all lanes."""
    return np.asarray(x)[:, None]


def unknown() -> Numbers:
    """Return what can be anything."""
    one = np.ones((1, 1))
    return Numbers(-np.inf * one, np.inf * one, one > 0, one < 0, None)


def perhaps() -> Holds:
    """Return what may hold or not."""
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


def widened(low: Any, high: Any, nan: Any, *dtypes: Any) -> Numbers:
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


def exactly(values: np.ndarray, dtype: Any) -> Numbers:
    """Return numbers that are known to the bit; of one that is none, nothing is said."""
    nan = np.isnan(values)
    low, high = np.where(nan, -np.inf, values), np.where(nan, np.inf, values)
    return Numbers(low, high, nan, ~nan, dtype)


def constant(x: Any, dtype: Any) -> Numbers:
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
    return exactly(one, dtype) if held else widened(one, one, False, dtype)


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
    return widened(low, high, a.nan | b.nan | doubtful, *_dtypes((a, b)))


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
    zero = constant(0.0, x.dtype)
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
CONDITIONS = (
    *_COMPARED, "equal", "logical_and", "logical_or", "logical_xor", "logical_not", "isnan",
    "isinf", "isfinite",
)  # fmt: skip


def of_elements(name: str, given: Sequence[Known], size: int, steps: int) -> Known:
    """Return what a function of elements can be.

    Args:
        name: of the function, in `jax.numpy`.
        given: its arguments.
        size: how many weights a lane stands for where there is but one.
        steps: how many.
    """
    name = {"absolute": "abs", "invert": "logical_not", "bitwise_and": "logical_and",
            "bitwise_or": "logical_or", "bitwise_xor": "logical_xor",
            "true_divide": "divide"}.get(name, name)  # fmt: skip
    numbers = [x for x in given if isinstance(x, Numbers)]
    if name in ("logical_and", "logical_or", "logical_xor", "logical_not"):
        return _logical(name, [_truth(x) for x in given], size, steps)
    if len(numbers) < len(given):
        return perhaps() if name in CONDITIONS else unknown()
    if name == "equal":
        return _not(_not_equal(*numbers), size)
    if name in _COMPARED:
        return _compared(name, numbers[0], numbers[1], size, steps)
    if name in ("isnan", "isinf", "isfinite"):
        return _odd(name, numbers[0], size, steps)
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
            return widened(x.low**2, x.high**2, x.nan, *_dtypes([x]))
    if name == "sqrt":
        x = numbers[0]
        with np.errstate(invalid="ignore"):
            low, high = np.sqrt(np.maximum(x.low, 0)), np.sqrt(np.maximum(x.high, 0))
        return widened(low, high, x.nan | (x.low < 0), *_dtypes([x]))
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
        return widened(low, high, nan, *_dtypes(numbers))
    return unknown()


def _logical(name: str, given: Sequence[Holds], size: int, steps: int) -> Holds:
    if name == "logical_not":
        return _not(given[0], size)
    a, b = given
    (al, ah), (bl, bh) = (_counts(x, size, steps) for x in (a, b))
    counted = a.count is not None or b.count is not None
    if name == "logical_and":
        count = (np.maximum(al + bl - size, 0), np.minimum(ah, bh)) if counted else None
        return Holds(a.must & b.must, a.may & b.may, count)
    if name == "logical_or":
        count = (np.maximum(al, bl), np.minimum(ah + bh, size)) if counted else None
        return Holds(a.must | b.must, a.may | b.may, count)
    must = (a.must & ~b.may) | (b.must & ~a.may)
    return Holds(must, ~((a.must & b.must) | (~a.may & ~b.may)))


def _compared(name: str, a: Numbers, b: Numbers, size: int, steps: int) -> Holds:
    found = _COMPARED[name](a, b)
    if b.stats is not None and a.stats is None and name in _MIRRORED:
        return _compared(_MIRRORED[name], b, a, size, steps)
    stats = a.stats
    if not isinstance(stats, Stats) or not stats.magnitude or b.stats is not None:
        return found
    if b.low.shape[-1] != 1 or name not in _MIRRORED:
        return found
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


def _odd(name: str, x: Numbers, size: int, steps: int) -> Holds:
    """Count what is not a number, or infinite."""
    stats = x.stats
    bounded = np.isfinite(x.low) & np.isfinite(x.high) & ~x.nan
    odd = Holds(np.zeros(bounded.shape, bool), ~bounded)
    if isinstance(stats, Stats) and stats.above is not None:
        known = stats.above[:, 0] >= 0
        infinite = stats.above[:, -1]
        of = {"isnan": size - stats.total, "isinf": infinite}
        of["isfinite"] = of["isnan"] + infinite
        odd = odd._replace(count=(np.where(known, of[name], 0), np.where(known, of[name], size)))
    return _not(odd, size) if name == "isfinite" else odd


def _magnitude(x: Numbers) -> Numbers:
    low = np.where(x.low > 0, x.low, np.where(x.high < 0, -x.high, 0.0))
    high = np.maximum(np.abs(x.low), np.abs(x.high))
    stats = x.stats
    if isinstance(stats, Least):
        low, stats = np.maximum(low, stats.least), None
    elif isinstance(stats, Stats):
        stats = stats._replace(magnitude=True)
    return Numbers(low, high, x.nan, x.exact, x.dtype, stats)


def side_by_side(found: Sequence[Known], steps: int) -> Known:
    """Put what is known of several tensors into lanes."""

    def beside(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.broadcast_to(x, (steps, 1)) for x in arrays], axis=1)

    held = [x for x in found if isinstance(x, Holds)]
    if len(held) == len(found):
        return Holds(beside([x.must for x in held]), beside([x.may for x in held]))
    numbers = [x for x in found if isinstance(x, Numbers)]
    if len(numbers) < len(found):
        return unknown()
    low, high = beside([x.low for x in numbers]), beside([x.high for x in numbers])
    nan, exact = beside([x.nan for x in numbers]), beside([x.exact for x in numbers])
    dtypes = {x.dtype for x in numbers}
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
            return Holds(column(least > 0), column(most > 0))
        if how == "all":
            return Holds(column(least == total), column(most == total))
        if how == "count":
            least = most = np.full(steps, total, np.int64)
        if how in ("sum", "count") and total < 2**31:
            low, high = (column(x.astype(np.float64)) for x in (least, most))
            return Numbers(low, high, low < 0, low == high, np.dtype(np.int32))
        if how == "mean" and 0 < total <= 2**24:
            # Counts up to 2**24 are added without rounding; the quotient is rounded somehow.
            none = column(most == 0)
            found = widened(
                column(least / total), column(most / total), False, np.dtype(np.float32)
            )
            low, high = np.where(none, 0.0, found.low), np.where(none, 0.0, found.high)
            return Numbers(low, high, found.nan & ~none, none, np.dtype(np.float32))
        return unknown()
    if not all(isinstance(x, Numbers) for x in parts):
        return unknown()
    numbers = [x for x in parts if isinstance(x, Numbers)]
    if how in ("max", "min"):
        return _extreme(how, numbers, steps)
    if how == "norm":
        return _norm(numbers, sizes, steps)
    return unknown()


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
    if isinstance(x.stats, Stats) and x.stats.magnitude and how == "max":
        most, exact = column(x.stats.most), column(x.stats.exact)
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
        if not isinstance(x.stats, Stats) or x.dtype != np.dtype(np.float32):
            return unknown()
        with np.errstate(over="ignore", invalid="ignore"):
            squares = squares + x.stats.norm**2
    share = (total + 64) * 2.0**-22
    with np.errstate(invalid="ignore"):
        known = np.isfinite(squares) & (squares < 1e37) & (share < 0.5)
    spare = total * 2 * TINY
    low = np.where(known, np.sqrt(np.maximum(squares * (1 - share) - spare, 0)), -np.inf)
    high = np.where(known, np.sqrt(np.where(known, squares, 0) * (1 + share) + spare), np.inf)
    return widened(column(low), column(high), column(~known), np.dtype(np.float32))
