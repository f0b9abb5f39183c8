"""What of a root's answer is kept already, and which of its steps are left to replay."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from replay import plan as planning
from replay.cache import Cache, Cell
from replay.cells import Root
from replay.errors import Grade
from replay.identity import sha256
from replay.query.nodes import RAGGED, Lag, Node, Part, Reduce, Scan, Take, narrow, restrict
from replay.values import Value, on_host


class Lost(Exception):
    """A cell that was there when its steps were left out is gone, or not what it should be."""


class Course:
    """The steps of one root along a replay: those that are left, between cells that are there.

    Args:
        root: what takes them.
        cache: where cells are kept; None for nowhere.
        steps: the steps or states that the root looks at.
        keys: the epoch or window of each.
        names: run -> what identifies it and the other samples that are looked at.
        without: numbers of cells that are not to be read.
    """

    def __init__(
        self,
        root: Root,
        cache: Cache | None,
        steps: np.ndarray,
        keys: np.ndarray,
        names: Mapping[str, str],
        without: frozenset[int] = frozenset(),
    ):
        self.root, self.left = root, steps
        self._numbers: list[int] = []
        self._names: dict[tuple[int, int], str] = {}
        self._there: dict[int, list[tuple[int, list[Any]]]] = {}
        self._pushed = 0
        self._shelf, self._cache = None, cache
        self._lags = _looks_back(root.node)
        if cache is None or not len(steps):
            return
        family, parts, self._indices, cuts = _family(root, names)
        self._shelf = cache.shelf(family, parts, "\n".join(root.node.lines()), cuts=cuts)
        numbers = steps // root.span
        kept = self._shelf.there()
        rows: dict[int, list[tuple[int, list[Any]]]] = {}
        for number, key, name in _named(steps, keys, root.span):
            self._names[number, key] = name
            rows.setdefault(number, []).append((key, kept.get(name, [])))
        for number, cells in rows.items():
            if number not in without and all(where for _, where in cells):
                self._there[number] = cells
        self._numbers = sorted(self._there)
        self.left = steps[~np.isin(numbers, self._numbers)]

    @property
    def reused(self) -> int:
        """How many cells need no replay."""
        return len(self._there)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to replay."""
        return not len(self.left)

    def within(self, number: int, verified: Sequence[tuple[int, int]]) -> bool:
        """Whether all that was looked at for a cell lies between verified states."""
        first, last = (np.searchsorted(self.left, n * self.root.span) for n in (number, number + 1))
        steps = self.left[first:last]
        if self._lags:
            cut = planning.cut(self.root.node, steps)
            steps = steps if cut is None else planning.earlier(planning.below(cut))
        after = 0 if planning.below(self.root.node).walked == "state" else 1
        known = np.zeros(len(steps), bool)
        for start, stop in verified:
            known |= (steps >= start) & (steps + after <= stop)
        return bool(known.all())

    def fits(self, size: int) -> bool:
        """Whether so many bytes may wait to be kept."""
        return self._shelf is not None and self._cache is not None and self._cache.takes(size)

    def before(self, step: int | None) -> None:
        """Push what is there of cells before that of a step; all that is left without one.

        Raises:
            Lost: it is not there any more.
        """
        if not self._there:
            return
        end = None if step is None else step // self.root.span
        while self._pushed < len(self._numbers):
            number = self._numbers[self._pushed]
            if end is not None and number >= end:
                return
            self.root.end()
            for key, where in self._there[number]:
                cell = self._read(where)
                if cell is None:  # and what of the others, before more is replayed in vain?
                    numbers = self._numbers[self._pushed :]
                    gone = [n for n in numbers if not all(self._read(x) for _, x in self._there[n])]
                    raise Lost(self.root.node, frozenset(gone))
                self.root.push(number, key, cell)
            self._pushed += 1

    def keep(self, number: int, key: int, cell: Cell, seconds: float) -> None:
        """Keep what the steps of a cell have come to."""
        if self._shelf is not None and (number, key) in self._names:
            self._shelf.write(self._names[number, key], cell, seconds)

    def _read(self, where: list[Any]) -> Cell | None:
        assert self._shelf is not None
        for one in where:
            cell = self._shelf.read(one)
            if cell is None:
                continue
            cuts = [i for i, (_, cut) in enumerate(one[1]) if cut]
            parts = list(cell.parts)
            for i in cuts:
                parts[i] = self.root.whole(i, cell.plain, parts[i], self._indices[i])
            return Cell(cell.plain, parts)
        return None


def _named(steps: np.ndarray, keys: np.ndarray, span: int) -> list[tuple[int, int, str]]:
    """Return number, key and name of each cell; the name tells which of its steps are taken.

    >>> _named(np.arange(64, 130), np.zeros(66, int), 64)
    [(1, 0, '1-all'), (2, 0, '2-c000000000000000')]
    """
    numbers = steps // span
    fresh = np.r_[True, (np.diff(numbers) != 0) | (np.diff(keys) != 0)]
    rows = np.cumsum(fresh) - 1
    masks = np.zeros((rows[-1] + 1, span), bool)
    masks[rows, steps % span] = True
    packed = np.packbits(masks, axis=1)
    which = [
        "all" if full else row.tobytes().hex()
        for full, row in zip(np.logical_and.reduce(masks, 1), packed, strict=True)
    ]
    cells = zip(numbers[fresh].tolist(), keys[fresh].tolist(), which, strict=True)
    return [(number, key, f"{number}-{name}") for number, key, name in cells]


def _family(
    root: Root, names: Mapping[str, str]
) -> tuple[str, list[str], list[tuple[int, ...]], bool]:
    """Return what the cells of a root have in common with those of others.

    Its plan without steps, epochs and windows; its tensors apart, where each has cells of its
    own; of each the chosen weights; and whether those can be cut out of the whole.
    """
    node = root.node
    looked = planning.below(node)
    parts: tuple[Part, ...] = ()
    if not _looks_back(looked):  # a difference looks back to whatever step was chosen before
        looked = restrict(looked, looked.walked, np.zeros(0, np.int64))
    reduced = set(node.over) if isinstance(node, Reduce) and not node.walked else set()
    ranked = isinstance(node, Reduce) and node.how == "top_k" and reduced & set(RAGGED)
    if set(RAGGED) & set(looked.dims) and not ranked:
        parts = looked.parts
        looked = narrow(looked, lambda parts: ())
    stripped = looked
    if isinstance(node, Reduce) and not node.walked:
        by = node.by if node.by and node.by.kind not in ("epoch", "window") else None
        stripped = dataclasses.replace(node, child=looked, by=by)
    text = f"{type(root).__name__} {root.span} {_named_runs(stripped, names)!r}"
    texts, chosen = [], []
    for part in parts:
        indices = None if root.wholes else part.indices
        which = "" if indices is None else sha256(repr(indices).encode())[:32]
        texts.append(f"{part.path} {part.shape}/ {which}")
        chosen.append(indices or ())
    return text, texts, chosen, bool(parts) and root.cuts


def _named_runs(node: Node, names: Mapping[str, str]) -> Node:
    """Call runs by what identifies them, not by where they are, and labels by their digest."""
    if isinstance(node, Reduce) and node.by is not None and node.by.labels:
        # There is one for each sample, and the text of a plan is looked up often.
        by = dataclasses.replace(node.by, labels=bytes.fromhex(sha256(node.by.labels)))
        return Reduce(_named_runs(node.child, names), node.how, node.over, node.settings, by)
    if isinstance(node, Take) and node.of is not None:
        node = dataclasses.replace(node, of=_named_runs(node.of, names))
    if isinstance(node, Scan):
        source = names[f"{node.run} {node.source}"] if node.source else ""
        return dataclasses.replace(node, run=names[node.run], source=source)
    return node.rebuilt(lambda child: _named_runs(child, names))


def _looks_back(node: Node) -> bool:
    return isinstance(node, Lag) or any(map(_looks_back, node.children))


def has(cache: Cache, node: Node, names: Mapping[str, str]) -> bool:
    """Whether the value of a root or question is kept."""
    return cache.has(repr(_named_runs(node, names)))


def recall(
    cache: Cache, node: Node, names: Mapping[str, str]
) -> tuple[Value, list[int], Grade] | None:
    """Return the value of a root, its epochs or windows and its grade, where they are kept."""
    found = cache.answer(repr(_named_runs(node, names)))
    if found is None:
        return None
    plain, arrays = found
    count, names_ = plain["count"], plain["fields"]
    rows = [arrays[i * count : (i + 1) * count] for i in range(1 + len(names_))]
    value = Value(tuple(plain["dims"]), rows[0], dict(zip(names_, rows[1:], strict=True)))
    return value, plain["keys"], Grade[plain["grade"]]


def keep(
    cache: Cache,
    node: Node,
    names: Mapping[str, str],
    value: Value,
    keys: list[int],
    grade: Grade,
    seconds: float,
) -> None:
    """Keep the value of a root."""
    value = on_host(value)
    plain = {
        "dims": list(value.dims),
        "fields": list(value.fields),
        "count": len(value.data),
        "keys": list(map(int, keys)),
        "grade": grade.name,
    }
    parts = [str(part) for part in node.parts] if len(node.parts) == len(value.data) else []
    fields = {name: [_narrow(x) for x in values] for name, values in value.fields.items()}
    arrays = []
    for field, values in {"value": value.data, **fields}.items():
        for i, x in enumerate(values):
            notes = {"field": field} | ({"tensor": parts[i]} if parts else {})
            dims = [f"{dim}_{i}" if parts and dim in RAGGED else dim for dim in value.dims]
            if np.ndim(x) != len(dims):
                return
            arrays.append((x, dims, notes))
    cache.keep(
        repr(_named_runs(node, names)), plain, arrays, about="\n".join(node.lines()),
        seconds=seconds,
    )  # fmt: skip


def _narrow(x: np.ndarray) -> np.ndarray:
    """Keep steps and places in as few bytes as hold them; a result widens them again."""
    if x.dtype != np.int32 or not x.size:
        return x
    low, high = int(x.min()), int(x.max())
    for kind in map(np.iinfo, ("uint8", "int8", "uint16", "int16")):
        if kind.min <= low and high <= kind.max:
            return x.astype(kind.dtype)
    return x
