"""How an answer is put together from steps that are decided and steps that are replayed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from replay.bounds import TINY
from replay.intervals import Holds, Known, Numbers
from replay.query.nodes import Node, Reduce

# Numbers of steps and weights that are compared at once.
_AT_ONCE = 2**22


class Piece(NamedTuple):
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


def lanes(node: Node) -> int:
    """Return how many tensors are kept apart."""
    if isinstance(node, Reduce) and node.by is not None and node.by.kind == "tensor":
        return len(node.child.parts)
    return max((lanes(child) for child in node.children), default=1)


class Joint:
    """An answer that is put together; of each tensor, or once, an array of lanes."""

    backwards = False

    def __init__(self, root: Node):
        self.root = root
        kept = root.dims if isinstance(root, Reduce) and not root.walked else ()
        self._ragged, self._tensors = "weight" in kept, "tensor" in kept
        self._left: list[np.ndarray] = []
        below = root.child if isinstance(root, Reduce) and not root.walked else root
        sizes = [part.size for part in below.parts]
        self._sizes = sizes if self._ragged else [lanes(root)] if self._tensors else [1]

    def fits(self, piece: Piece) -> bool:
        """Whether a piece is of the kind that is joined."""
        return all(isinstance(x, Holds) for x in piece.values)

    def look(self, piece: Piece) -> None:
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


class _Edge(Joint):
    """The first step, or the last, at which a condition holds."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self.backwards = root.how == "last"
        self._known = [np.full(n, -1, np.int64) for n in self._sizes]

    def look(self, piece: Piece) -> None:
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
                open_[some if wide[0] > 1 else slice(None)] |= doubt
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


class _Whether(Joint):
    """Whether a condition holds at any step, or at all."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._any = root.how == "any"
        self._found = [np.zeros(n, bool) for n in self._sizes]
        self._pieces: list[Piece] = []

    def look(self, piece: Piece) -> None:
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


class _Count(Joint):
    """How often a condition holds."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._every = root.how == "count"
        self._total = [np.zeros(n, np.int64) for n in self._sizes]

    def fits(self, piece: Piece) -> bool:
        assert isinstance(self.root, Reduce)
        if "weight" in self.root.over:
            return all(
                isinstance(x, Numbers) and x.dtype == np.dtype(np.int32) for x in piece.values
            )
        return super().fits(piece)

    def look(self, piece: Piece) -> None:
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


class _Extreme(Joint):
    """The largest or smallest of what is exactly known, and of what is replayed."""

    def __init__(self, root: Node):
        super().__init__(root)
        assert isinstance(root, Reduce)
        self._sign = 1 if root.how == "max" else -1
        self._best = [np.full(n, -np.inf * self._sign) for n in self._sizes]
        self._pieces: list[Piece] = []

    def fits(self, piece: Piece) -> bool:
        return not self._ragged and all(
            isinstance(x, Numbers) and x.dtype == np.dtype(np.float32) for x in piece.values
        )

    def look(self, piece: Piece) -> None:
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


class Each(Joint):
    """A value at every step."""

    def __init__(self, root: Node):
        super().__init__(root)
        self._pieces: list[Piece] = []

    def fits(self, piece: Piece) -> bool:
        """Whether its values have a type that is given back as it is."""
        dtypes = (np.dtype(np.float32), np.dtype(np.int32))
        return len(piece.values) == 1 and all(
            isinstance(x, Holds) or x.dtype in dtypes for x in piece.values
        )

    def look(self, piece: Piece) -> None:
        """Take what is known."""
        self._pieces.append(piece)
        (x,) = piece.values
        doubt = x.may & ~x.must if isinstance(x, Holds) else ~x.exact
        self._left.append(piece.at[np.broadcast_to(doubt.any(1), piece.at.shape)])

    def combine(self, data: list[np.ndarray] | None, left: np.ndarray) -> list[np.ndarray]:
        """Return the value at every step."""
        rows = []
        for piece in self._pieces:
            (x,) = piece.values
            values = x.must if isinstance(x, Holds) else x.low.astype(x.dtype)
            rows.append(np.broadcast_to(values, (len(piece.at), values.shape[1])))
        width = lanes(self.root) if "tensor" in self.root.dims else 1
        found = np.concatenate([np.broadcast_to(r, (len(r), width)) for r in rows]).copy()
        steps = np.concatenate([piece.at for piece in self._pieces])
        if "tensor" not in self.root.dims:
            found = found[:, 0]
        if data is not None:
            replayed = np.asarray(data[0])
            assert replayed.dtype == found.dtype and replayed.shape[1:] == found.shape[1:]
            found[np.searchsorted(steps, left)] = replayed
        return [found]


JOINED: dict[str, Callable[[Node], Joint]] = {
    "first": _Edge,
    "last": _Edge,
    "any": _Whether,
    "all": _Whether,
    "sum": _Count,
    "count": _Count,
    "max": _Extreme,
    "min": _Extreme,
}
