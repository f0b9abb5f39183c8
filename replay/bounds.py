"""What can be proved about steps that nobody replays: codes, paths and brackets, on NumPy arrays.

Every function here errs to one side, and says to which. Numbers are float64; what they bound was
computed in float32 or less, by compilers that may take numbers below 2**-126 for zero.
"""

from typing import NamedTuple

import numpy as np

# The largest float32, beyond which there is only infinity.
LARGEST = float(np.finfo(np.float32).max)
# Below this, a compiler may take a number for zero.
TINY = float(np.finfo(np.float32).tiny)

# What gradients are counted against: how many are larger, in magnitude. What exceeds the last is
# infinite. Gradients of a healthy training stay below 1, where counting is the dearest column.
EDGES = (*(2.0**k for k in (-20, -10, -5, -2)), *(2.0**k for k in range(21)), LARGEST)

# Codes 1 to 254 stand for 2**(-32 + (code - 1) / 6), from 2e-10 to 1,150 in steps of an eighth;
# 0 stands for zero, and 255 for what is larger than all of them, or not a number.
_POWERS = np.exp2(-32 + np.arange(254) / 6)
_ABOVE = np.concatenate([[0.0], _POWERS, [np.inf]])
_BELOW = np.concatenate([[0.0], _POWERS, [_POWERS[-1]]])


def rounded_up(x: np.ndarray) -> np.ndarray:
    """Return 8-bit codes of numbers from 0 on, `uint8`: `above(code)` is never smaller.

    >>> above(rounded_up(np.array([0.0, 1.0, 1.01, 1e-30, 1e9, np.nan]))).round(4).tolist()
    [0.0, 1.0, 1.1225, 0.0, inf, inf]
    """
    x = np.asarray(x, np.float64)
    codes = np.searchsorted(_ABOVE, x, side="left")  # NaN is sorted after infinity
    return np.minimum(codes, 255).astype(np.uint8)


def rounded_down(x: np.ndarray) -> np.ndarray:
    """Return 8-bit codes of numbers from 0 on, `uint8`: `below(code)` is never larger.

    What is not a number becomes 0.
    """
    x = np.asarray(x, np.float64)
    codes = np.searchsorted(_BELOW[:255], x, side="right") - 1
    return np.where(np.isnan(x), 0, codes).astype(np.uint8)


def above(codes: np.ndarray) -> np.ndarray:
    """Return what codes that were rounded up stand for, `float64`."""
    return _ABOVE[codes]


def below(codes: np.ndarray) -> np.ndarray:
    """Return what codes that were rounded down stand for, `float64`."""
    return _BELOW[codes]


def path_length(total: np.ndarray, steps: int) -> np.ndarray:
    """Return an upper bound of the way that weights really went.

    Args:
        total: of float32: the sum of the magnitudes of their updates, each a rounded difference of
            neighbouring states, added one after the other.
        steps: how many were added.

    Each difference and each addition is wrong by at most half a unit in the last place, or by a
    number that was taken for zero; an update that is not a number makes the bound infinite.
    """
    total = np.asarray(total, np.float64)
    if steps >= 2**20:  # (1 + 2**-24)**(2n) is no longer below 1 + n 2**-22
        return np.full(total.shape, np.inf)
    bound = total * (1 + (steps + 4) * 2.0**-22) + steps * 4 * TINY
    return np.where(np.isnan(bound), np.inf, bound)


class Reach(NamedTuple):
    """Where a weight can have been: from `low` to `high`.

    Attributes:
        low: `float64[...]`, minus infinity where nothing is known.
        high: `float64[...]`.
    """

    low: np.ndarray
    high: np.ndarray


def reach(
    first: np.ndarray,
    last: np.ndarray | None,
    length: np.ndarray,
    least: np.ndarray | float = 0.0,
) -> Reach:
    """Return where weights can have been in a segment, from where it begins and ends.

    Whoever goes from `first` to v and on to `last` goes |first - v| + |v - last| at least. So
    within `length` lies only what is at most `length` from both together.

    Args:
        first: the weights at the first state of the segment.
        last: at the last one; None where it is not stored.
        length: upper bound of the way that each went.
        least: lower bound of the magnitude of each at all states of the segment.
    """
    first = np.asarray(first, np.float64)
    length = np.asarray(length, np.float64)
    ends = first if last is None else np.asarray(last, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        half = length if last is None else length / 2
        middle = first if last is None else first / 2 + ends / 2
        slack = (np.abs(first) + np.abs(ends) + length) * 2.0**-50
        low, high = middle - half - slack, middle + half + slack
        # A way that does not even lead from one end to the other is no way: something is wrong.
        sound = np.isfinite(low) & np.isfinite(high) & (np.abs(ends - first) <= length + slack)
        low, high = np.where(sound, low, -np.inf), np.where(sound, high, np.inf)
        least = np.asarray(least, np.float64)
        # Where nothing as small as `least` was passed, the weight has stayed on one side.
        positive = sound & (least > 0) & (low > -least) & (first > 0)
        negative = sound & (least > 0) & (high < least) & (first < 0)
    return Reach(
        np.where(positive, np.maximum(low, least), low),
        np.where(negative, np.minimum(high, -least), high),
    )


def larger(
    counts: np.ndarray, total: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bracket how many magnitudes are larger than a threshold.

    Args:
        counts: `int[steps, edges]`, how many are larger than each of `EDGES`.
        total: `int[steps]`, how many are numbers.
        low: `float64[steps]`, what the threshold is at least.
        high: `float64[steps]`, what it is at most.

    Returns:
        Lower and upper bounds, `int64[steps]`; the same where the threshold is one of the edges.
    """
    return _counted(counts, total, low, high, "right")


def at_least(
    counts: np.ndarray, total: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bracket how many magnitudes are as large as a threshold, as `larger` does."""
    return _counted(counts, total, low, high, "left")


def _counted(counts, total, low, high, side):
    edges = np.asarray(EDGES)
    counts = np.asarray(counts, np.int64)
    rows = np.arange(len(counts))
    total = np.asarray(total, np.int64)
    padded = np.concatenate([total[:, None], counts, np.zeros((len(counts), 1), np.int64)], axis=1)
    # Column k + 1 counts what is larger than edge k; the first edge that is not below `high`, and
    # the last one that is not above (or is below) `low`.
    upper = np.searchsorted(edges, np.broadcast_to(high, rows.shape), side="left") + 1
    lower = np.searchsorted(edges, np.broadcast_to(low, rows.shape), side=side)
    unknown = np.isnan(low) | np.isnan(high)
    found = np.where(unknown, 0, padded[rows, np.minimum(upper, len(edges) + 1)])
    negative = np.broadcast_to(high, rows.shape) < 0
    return (
        np.where(negative, total, found),
        np.where(unknown, total, padded[rows, lower]),
    )
