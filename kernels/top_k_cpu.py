"""The loops of the compiled running top-k, in numba; see `top_k` for what they compute.

A module of its own, because importing numba takes longer than importing all else: `top_k.compiled`
imports it when it is first called.
"""

import numpy as np
from numba import njit, prange

from replay.kernels.top_k import NAN, SMALLEST_NORMAL

# Neighbouring weights that are tested together, and those searched together for a new entry.
WIDTH = 512
SEARCH = 64

# Loops are vectorised over slices of one row, which numba knows to be contiguous; not over
# slices of several, and not with an offset in the index, which might be negative.


@njit(cache=True)
def _fill(new, left, right, low):
    """Write the bits of |g| of one sample, from `low` on, into `new [width]`."""
    if len(left) == 1:
        factor, row = left[0], right[0, low : low + len(new)]
        for j in range(len(new)):
            new[j] = np.float32(abs(factor * row[j])).view(np.int32)
        return
    sums = np.zeros(len(new), np.float32)
    for t in range(len(left)):
        factor, row = left[t], right[t, low : low + len(new)]
        for j in range(len(new)):
            sums[j] += factor * row[j]
    for j in range(len(new)):
        new[j] = np.float32(abs(sums[j])).view(np.int32)


@njit(cache=True)
def _one(bits):
    """Return the bits of the one NaN, or of zero, for all that count as it."""
    return np.int32(0) if bits < SMALLEST_NORMAL else min(bits, np.int32(NAN))


@njit(cache=True)
def _beaten(new, least):
    beaten = np.int32(0)
    for j in range(len(new)):
        beaten |= np.int32(new[j] > least[j])
    return beaten


@njit(cache=True)
def _replace(bits, occurrences, new, number):
    """Take one sample into rows of a state with k = 1."""
    for j in range(len(new)):
        x, old = _one(new[j]), bits[j]
        bits[j] = max(x, old)
        occurrences[j] = number if x > old else occurrences[j]


@njit(cache=True)
def _sort_in(bits, occurrences, least, new, number):
    """Take one sample into rows `[k, width]` of a state, of which `least` is the last."""
    k, width = bits.shape
    if not _beaten(new, least):
        return
    for low in range(0, width, SEARCH):
        high = min(low + SEARCH, width)
        if not _beaten(new[low:high], least[low:high]):
            continue
        for j in range(low, high):
            x = _one(new[j])
            place = k
            while place > 0 and bits[place - 1, j] < x:
                place -= 1
            for p in range(k - 1, place, -1):
                bits[p, j] = bits[p - 1, j]
                occurrences[p, j] = occurrences[p - 1, j]
            if place < k:
                bits[place, j] = x
                occurrences[place, j] = number


@njit(parallel=True, cache=True)
def loop(bits, occurrences, left, right, silent, occurrence):
    """Take samples into a state of bits and occurrences `[k, b, i, j]`, in place."""
    k, blocks, rows, columns = bits.shape
    tiles = (columns + WIDTH - 1) // WIDTH
    for task in prange(blocks * rows * tiles):
        b, i, low = task // (rows * tiles), task // tiles % rows, task % tiles * WIDTH
        high = min(low + WIDTH, columns)
        least = bits[k - 1, b, i, low:high]
        new = np.empty(high - low, np.int32)
        full = False
        for s in range(len(left)):
            full = full or least.min() >= 0
            if full and silent[s, b, i]:
                continue
            _fill(new, left[s, b, :, i], right[s, b], low)
            if k == 1:
                _replace(least, occurrences[0, b, i, low:high], new, occurrence[s])
            else:
                state = bits[:, b, i, low:high], occurrences[:, b, i, low:high]
                _sort_in(*state, least, new, occurrence[s])
