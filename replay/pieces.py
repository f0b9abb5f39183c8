"""Digests of large values: of pieces, side by side, and of a file's while they are read.

A digest is the sha256 of those of all pieces, each of `PIECE` bytes but the last. What has been
read and digested lies in memory of our own: who changes the file later changes nothing.
"""

import collections
import concurrent.futures
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Small enough to be digested before it has left the cache of a core.
PIECE = 2**20
# XLA reads memory in place where it begins at a multiple of this.
ALIGNED = 64


class Stretch(NamedTuple):
    """Bytes of a file.

    Attributes:
        path: of the file.
        start: where they begin.
        size: how many they are.
        after: how many follow them up to the end of the file.
    """

    path: pathlib.Path
    start: int
    size: int
    after: int = 0


def empty(size: int) -> np.ndarray:
    """Return writable bytes that begin where XLA reads in place."""
    whole = np.empty(size + ALIGNED, np.uint8)
    first = -whole.ctypes.data % ALIGNED
    return whole[first : first + size]


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of an array, in the order of C, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def digests(values: Sequence[bytes | memoryview]) -> list[bytes]:
    """Return the digest of each of several values.

    >>> digests([b"a"])[0].hex()[:8]
    'bf5d3aff'
    """

    def look(number: int, first: int, last: int) -> bytes:
        return hashlib.sha256(memoryview(values[number])[first:last]).digest()

    return _of_pieces([len(value) for value in values], look)


def read(stretches: Sequence[Stretch]) -> list[tuple[np.ndarray, bytes] | None]:
    """Return stretches of files, and their digests; None for what is not there as described."""
    files = [_opened(stretch) for stretch in stretches]
    found = [empty(s.size if file >= 0 else 0) for s, file in zip(stretches, files, strict=True)]
    short = [file < 0 for file in files]

    def look(number: int, first: int, last: int) -> bytes:
        piece = found[number].data[first:last]
        try:
            got = os.preadv(files[number], [piece], stretches[number].start + first)
        except OSError:
            got = -1
        if got != last - first:
            short[number] = True
        return hashlib.sha256(piece).digest()

    try:
        known = _of_pieces([len(one) for one in found], look)
    finally:
        for file in files:
            if file >= 0:
                os.close(file)
    return [
        None if bad else (array, digest)
        for bad, array, digest in zip(short, found, known, strict=True)
    ]


def _opened(stretch: Stretch) -> int:
    """Return an open file, -1 where there is none of just the size that it should have."""
    try:
        file = os.open(stretch.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except OSError:
        return -1
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_size == stretch.start + stretch.size + (
        stretch.after
    ):
        return file
    os.close(file)
    return -1


def _of_pieces(sizes: Sequence[int], look: Callable[[int, int, int], bytes]) -> list[bytes]:
    """Return digests of values of these sizes; `look` digests a stretch of the one of a number."""
    cuts = [
        (number, first, min(first + PIECE, size))
        for number, size in enumerate(sizes)
        for first in range(0, size, PIECE)
    ]
    left = collections.deque(enumerate(cuts))
    done = [b""] * len(cuts)

    def work() -> None:
        while left:
            try:
                i, cut = left.popleft()
            except IndexError:  # another thread has taken the last one
                return
            done[i] = look(*cut)

    helpers = min(_WORKERS, len(cuts) // 2) - 1
    others = [_THREADS.submit(work) for _ in range(helpers)]
    work()
    for other in others:
        if not other.cancel():  # one that has not begun would find nothing left
            other.result()
    of: list[list[bytes]] = [[] for _ in sizes]
    for (number, _, _), digest in zip(cuts, done, strict=True):
        of[number].append(digest)
    return [hashlib.sha256(b"".join(each)).digest() for each in of]


_WORKERS = min(os.cpu_count() or 1, 8)
_THREADS = concurrent.futures.ThreadPoolExecutor(_WORKERS, "replay-digest")
