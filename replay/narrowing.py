"""Which steps of a question the indexes decide, so that only the others are replayed.

The plan below a root is evaluated with intervals instead of numbers: what every node is at least
and at most, at every step; of conditions, whether they must or may hold; of the weights of a
tensor, how many they hold for at least and at most. What no column bounds is unbounded, and is
replayed. An answer is put together from what is decided and from the same root over the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.evidence import Evaluation, Evidence
from replay.intervals import Known, of_weights, side_by_side
from replay.joining import JOINED, Each, Piece
from replay.plan import cut, tensors_of
from replay.query.nodes import Node, Reduce

# What may be looked at without replaying it.
BOUNDED = ("grads", "updates", "weights")

# Numbers of weights that are looked at in all segments together.
_AT_ALL = 2**28


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
        if root.how not in JOINED or set(root.over) - {walked, "weight"}:
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
    found: list[Piece] = []
    for at, segment in pieces:
        evaluation = Evaluation(evidence, constant, column, at, segment)
        values = evaluation.value(below)
        if reduced and "weight" in root.over and "weight" in below.dims:  # type: ignore[union-attr]
            assert isinstance(root, Reduce)
            values = _inner(root, values, below, len(at))
        found.append(Piece(at, segment, values, frozenset(evaluation.bounds)))
    join = JOINED[root.how] if isinstance(root, Reduce) and reduced else Each
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
    return [side_by_side(found, steps)]
