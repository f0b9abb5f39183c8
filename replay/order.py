"""Which samples make each batch: an order is a base and its edits, plain data until it is bound.

Any batch follows from its step alone, so a replay may start anywhere. Numpy does not promise the
same permutations for ever: a log keeps `Order.checksum` beside the spec, and compares.
"""

import contextlib
import dataclasses
import functools
import operator
import reprlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from replay.errors import OrderError

_Steps = NDArray[np.int64]
_PADDING = -1  # as an index it names the last entry: hence tables of samples + 1
_MOST_EDITS = 100  # each may nest six calls in the next, and Python allows a thousand


class Batches(NamedTuple):
    """Some batches, one per row; padded positions have id -1 and weight 0."""

    ids: NDArray[np.int32]  # [steps, batch]
    weights: NDArray[np.float32]  # [steps, batch]

    def at(self, rows: NDArray[Any]) -> "Batches":
        """Return a copy of these rows."""
        return Batches(self.ids[rows], self.weights[rows])


class _NoSuchStep(OrderError, IndexError):
    """An IndexError as well, because that is what ends iteration over an order."""


@dataclass(frozen=True, eq=False)
class _Bound:
    """An order over known data; `rows` maps any steps to fresh arrays that the caller may change.

    Epoch e owns the steps from starts[e] to starts[e + 1] - 1. An edit leaves the steps before
    `since` as they are.
    """

    samples: int
    batch_size: int
    pad: bool
    starts: _Steps
    rows: Callable[[_Steps], Batches]
    since: int = 0

    @functools.cached_property
    def fixed(self) -> _Steps:
        """How many steps at the beginning of each epoch come before `since`."""
        return np.clip(self.since - self.starts[:-1], 0, np.diff(self.starts))

    def whole(self, epoch: int) -> Batches:
        return self.rows(np.arange(self.starts[epoch], self.starts[epoch + 1]))

    def check(
        self, name: str, noun: str, values: ArrayLike, kind: type[OrderError] = OrderError
    ) -> None:
        counts = {"sample": self.samples, "step": self.starts[-1], "epoch": len(self.starts) - 1}
        values, count = np.asarray(values), counts[noun]
        wrong = np.unique(values[(values < 0) | (values >= count)])
        if wrong.size:
            raise kind(
                f"{name}: there is no {noun} {_shown(wrong)}",
                why=f"at this point the order has {count} {noun}s, 0 to {count - 1}",
                fix=f"pass {noun}s that exist, and bind the order to the data it was made for",
            )

    def check_steps(self, name: str, steps: ArrayLike) -> None:
        self.check(name, "step", steps)
        early = np.unique(np.asarray(steps)[np.asarray(steps) < self.since])
        if early.size:
            self.refuse(f"{name}: step {_shown(early)} comes", early[0])

    def check_epoch(self, name: str, epoch: int) -> None:
        self.check(name, "epoch", epoch)
        start, stop = self.starts[epoch : epoch + 2].tolist()
        if start < self.since and stop <= self.since:
            self.refuse(f"{name}: epoch {epoch}, steps {start} to {stop - 1}, comes", start)

    def refuse(self, what: str, first: int) -> NoReturn:
        raise OrderError(
            f"{what} before step {self.since}, since which this order is edited",
            why="all batches before that step stay as they are; a fork shares them with its parent",
            fix=f"edit what comes later, or begin earlier: order.since({first}), a fork at={first}",
        )


# ------------------------------------------------------------------------------------ batches


def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    key = np.array([seed, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count).astype(np.int32)


def _count_steps(samples: Any, batch_size: int, pad: bool, fixed: Any = 0) -> _Steps:
    steps = np.asarray(fixed + (-(-samples // batch_size) if pad else samples // batch_size))
    if not steps.any():
        raise OrderError(
            f"{np.max(samples)} samples in an epoch do not fill one batch of {batch_size}",
            why="the last short batch of an epoch is dropped, so no step would remain",
            fix="make the batches smaller, pass pad=True, or drop with refill=False",
        )
    return steps


def _chopped(ids: NDArray, weights: NDArray, batch_size: int, pad: bool) -> Batches:
    size = len(ids) if pad else len(ids) // batch_size * batch_size
    short = -size % batch_size
    ids = np.concatenate([ids[:size], np.full(short, _PADDING, np.int32)])
    weights = np.concatenate([weights[:size], np.zeros(short, np.float32)])
    return Batches(ids.reshape(-1, batch_size), weights.reshape(-1, batch_size))


@functools.lru_cache(maxsize=8)  # whole epochs: enough to read two edited orders side by side
def _made(make: Callable[[int], Batches], epoch: int) -> Batches:
    return make(epoch)


def _by_epoch(
    starts: _Steps, batch_size: int, part: Callable[[int, _Steps], Batches]
) -> Callable[[_Steps], Batches]:
    def rows(steps: _Steps) -> Batches:
        epochs = np.searchsorted(starts, steps, side="right") - 1
        distinct = np.unique(epochs).tolist()
        if len(distinct) == 1:
            return part(distinct[0], steps)
        ids = np.empty((len(steps), batch_size), np.int32)
        weights = np.empty((len(steps), batch_size), np.float32)
        for epoch in distinct:
            where = np.flatnonzero(epochs == epoch)
            ids[where], weights[where] = part(epoch, steps[where])
        return Batches(ids, weights)

    return rows


# A base is bound to a number of samples; an edit to the order below it, from which it derives.


def _shuffled(samples: int, batch_size: int, epochs: int, seed: int, pad: bool) -> _Bound:
    starts = np.arange(epochs + 1) * _count_steps(samples, batch_size, pad)
    ones = np.ones(samples, np.float32)

    def make(epoch: int) -> Batches:
        return _chopped(_permutation(seed, epoch, samples), ones, batch_size, pad)

    rows = _by_epoch(starts, batch_size, lambda e, steps: _made(make, e).at(steps - starts[e]))
    return _Bound(samples, batch_size, pad, starts, rows)


def _sequential(samples: int, batch_size: int, epochs: int, pad: bool) -> _Bound:
    starts = np.arange(epochs + 1) * _count_steps(samples, batch_size, pad)

    def rows(steps: _Steps) -> Batches:
        ids = (steps % starts[1] * batch_size)[:, None] + np.arange(batch_size)
        ids[ids >= samples] = _PADDING
        return Batches(ids.astype(np.int32), (ids >= 0).astype(np.float32))

    return _Bound(samples, batch_size, pad, starts, rows)


def _explicit(samples: int, batch_size: int, ids: NDArray[np.int32]) -> _Bound:
    table = _as_rows(ids, batch_size, len(ids) // batch_size, "explicit")
    batches = Batches(table, np.broadcast_to(np.float32(1), table.shape))
    bound = _Bound(samples, batch_size, False, np.array([0, len(table)]), batches.at)
    bound.check("explicit", "sample", ids)
    return bound


def _since(below: _Bound, step: int) -> _Bound:
    count = below.starts[-1]
    if step > count:
        raise OrderError(
            f"since: there is no step {step}",
            why=f"at this point the order has {count} steps, so edits begin at 0 to {count}",
            fix="begin earlier, and bind the order to the data it was made for",
        )
    return dataclasses.replace(below, since=step)


def _swap(below: _Bound, a: int, b: int) -> _Bound:
    below.check_steps("swap", [a, b])

    def rows(steps: _Steps) -> Batches:
        return below.rows(np.where(steps == a, b, np.where(steps == b, a, steps)))

    return dataclasses.replace(below, rows=rows)


def _drop(below: _Bound, dropped: NDArray[np.int32], refill: bool) -> _Bound:
    below.check("drop", "sample", dropped)
    since, fixed = below.since, below.fixed
    gone, seen = np.zeros((2, below.samples + 1), bool)
    gone[dropped] = gone[_PADDING] = True
    kept = np.zeros(len(fixed), np.int64)
    first = int(np.searchsorted(below.starts, since, side="right")) - 1
    for epoch in range(first, len(kept)):
        ids = below.whole(epoch).ids[fixed[epoch] :]
        seen[ids] = True
        kept[epoch] = np.count_nonzero(~gone[ids])
        if not refill and seen[dropped].all():
            break
    if not seen[dropped].all():
        raise OrderError(
            f"drop: no batch {f'from step {since} on ' if since else ''}has samples "
            f"{_shown(dropped[~seen[dropped]])}",
            why=f"at this point {np.count_nonzero(seen[:-1])} of {below.samples} samples are in "
            f"{'those batches' if since else 'the order'}: earlier edits, or a last short batch, "
            "leave out the others",
            fix=f"drop samples that occur: np.unique(order[{since or ''}:])",
        )
    if not refill:

        def rows(steps: _Steps) -> Batches:
            batches = below.rows(steps)
            batches.weights[gone[batches.ids] & (steps >= since)[:, None]] = 0
            return batches

        return dataclasses.replace(below, rows=rows)

    def make(epoch: int) -> Batches:
        ids, weights = below.whole(epoch)
        stay = fixed[epoch]
        keep = ~gone[ids[stay:]]
        moved = _chopped(ids[stay:][keep], weights[stay:][keep], below.batch_size, below.pad)
        return Batches(
            np.concatenate([ids[:stay], moved.ids]),
            np.concatenate([weights[:stay], moved.weights]),
        )

    def part(e: int, steps: _Steps) -> Batches:
        return below.rows(steps) if e < first else _made(make, e).at(steps - starts[e])

    steps_kept = _count_steps(kept, below.batch_size, below.pad, fixed)
    starts = np.concatenate([[0], np.cumsum(steps_kept)])
    return dataclasses.replace(below, starts=starts, rows=_by_epoch(starts, below.batch_size, part))


def _rearranged(
    below: _Bound,
    name: str,
    epoch: int | None,
    arrangement: Callable[[int, NDArray[np.int32]], NDArray[Any]],
) -> _Bound:
    if epoch is not None:
        below.check_epoch(name, epoch)

    def make(epoch: int) -> Batches:
        batches = below.whole(epoch)
        real = np.flatnonzero(batches.ids != _PADDING)
        real = real[real >= below.fixed[epoch] * below.batch_size]
        source = real[arrangement(epoch, batches.ids.reshape(-1)[real])]
        for array in batches:
            array.reshape(-1)[real] = array.reshape(-1)[source]
        return batches

    def part(e: int, steps: _Steps) -> Batches:
        changed = epoch in (None, e) and below.starts[e + 1] > below.since
        return _made(make, e).at(steps - below.starts[e]) if changed else below.rows(steps)

    return dataclasses.replace(below, rows=_by_epoch(below.starts, below.batch_size, part))


def _reversed(below: _Bound, epoch: int | None) -> _Bound:
    return _rearranged(below, "reversed", epoch, lambda _, ids: np.arange(len(ids))[::-1])


def _shuffled_again(below: _Bound, epoch: int | None, seed: int) -> _Bound:
    def arrangement(epoch: int, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return _permutation(seed, epoch, len(ids))

    return _rearranged(below, "shuffled_again", epoch, arrangement)


def _sorted_by(
    below: _Bound, ranks: NDArray[np.int32], epoch: int | None, descending: bool
) -> _Bound:
    if len(ranks) != below.samples:
        raise OrderError(
            f"sorted_by: there are {len(ranks)} scores",
            why=f"the order is over {below.samples} samples, and each of them needs one",
            fix="pass real numbers of shape [samples], as the data counts them",
        )
    by = ranks.astype(np.int64) * (-1 if descending else 1)  # int32 has a value without opposite

    def arrangement(_: int, ids: NDArray[np.int32]) -> NDArray[Any]:
        return np.argsort(by[ids], kind="stable")

    return _rearranged(below, "sorted_by", epoch, arrangement)


def _replaced(below: _Bound, replaced: _Steps, ids: NDArray[np.int32]) -> _Bound:
    below.check_steps("replaced", replaced)
    below.check("replaced", "sample", ids)
    table = _as_rows(ids, below.batch_size, len(replaced), "replaced")
    replaced, kept = np.unique(replaced, return_index=True)
    table = table[kept]

    def rows(steps: _Steps) -> Batches:
        batches = below.rows(steps)
        where = np.flatnonzero(np.isin(steps, replaced))
        batches.ids[where] = table[np.searchsorted(replaced, steps[where])]
        batches.weights[where] = 1
        return batches

    return dataclasses.replace(below, rows=rows)


# --------------------------------------------------------------------------------------- spec

# A spec may come from anyone, so what sizes an array is bounded here, before the array is made.
_COUNT, _INDEX, _SEED = range(1, 2**24 + 1), range(2**63), range(2**64)
_OR_NONE = (_INDEX, None)
_BASES: dict[str, tuple[Callable[..., _Bound], dict[str, Any]]] = {
    "shuffled": (
        _shuffled,
        {"batch_size": _COUNT, "epochs": _COUNT, "seed": _SEED, "pad": bool},
    ),
    "sequential": (_sequential, {"batch_size": _COUNT, "epochs": _COUNT, "pad": bool}),
    "explicit": (_explicit, {"batch_size": _COUNT, "ids": "<i4"}),
}
_EDITS: dict[str, tuple[Callable[..., _Bound], dict[str, Any]]] = {
    "since": (_since, {"step": _INDEX}),
    "swap": (_swap, {"a": _INDEX, "b": _INDEX}),
    "drop": (_drop, {"samples": "<i4", "refill": bool}),
    "reversed": (_reversed, {"epoch": _OR_NONE}),
    "shuffled_again": (_shuffled_again, {"epoch": _OR_NONE, "seed": _SEED}),
    "sorted_by": (_sorted_by, {"ranks": "<i4", "epoch": _OR_NONE, "descending": bool}),
    "replaced": (_replaced, {"steps": "<i8", "ids": "<i4"}),
}
_OPS = _BASES | _EDITS
_OPTIONS: dict[str, dict[str, Any]] = {  # with their defaults, which are not shown
    "shuffled": {"pad": False},
    "sequential": {"pad": False},
    "drop": {"refill": True},
    "sorted_by": {"epoch": None, "descending": False},
}


def _op(name: str, *values: Any) -> tuple[Any, ...]:
    fields = _OPS[name][1]
    if len(values) != len(fields):
        raise OrderError(
            f"{name}: {len(values)} values",
            why=f"it has {len(fields)}: {', '.join(fields)}",
            fix="pass what Order.spec() returned, unchanged",
        )
    op: list[Any] = [name]
    for (key, allowed), value in zip(fields.items(), values, strict=True):
        optional = allowed is _OR_NONE
        bounds = _INDEX if optional else allowed
        if isinstance(bounds, range):
            with contextlib.suppress(TypeError):
                value = value if isinstance(value, bool) else operator.index(value)
            fits = type(value) is int and value in bounds or optional and value is None
            wanted = f"an integer from {bounds[0]} to {bounds[-1]}{', or None' * optional}"
        elif allowed is bool:
            fits, wanted = type(value) is bool, "True or False"
        else:
            width = np.dtype(allowed).itemsize
            fits = type(value) is bytes and len(value) % width == 0
            wanted = f"bytes that hold {width}-byte integers"
        if not fits:
            raise OrderError(
                f"{name}: {key} is {reprlib.repr(value)}",
                why=f"it has to be {wanted}",
                fix=f"pass such a {key}; if it came from a log, the log is damaged",
            )
        op.append(value)
    return tuple(op)


def _values(op: tuple[Any, ...]) -> dict[str, Any]:
    values = dict(zip(_OPS[op[0]][1], op[1:], strict=True))
    for key, kind in _OPS[op[0]][1].items():
        if isinstance(kind, str):
            values[key] = np.frombuffer(values[key], kind).astype(kind[1:], copy=False)
    return values


def _shown(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return str(value)
    more = f", … {len(value)} in all" if len(value) > 6 else ""
    return f"[{', '.join(map(str, value[:6]))}{more}]"


def _integers(values: Any, dtype: str, name: str, shape: str = "") -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of unequal length
        array = np.array("ragged")
    dims = len(shape.split()) if shape else array.ndim
    if (array.dtype.kind not in "iu" and array.size) or array.ndim != dims:
        raise OrderError(
            f"{name} cannot be {reprlib.repr(values)}",
            why=f"they are integers{shape and f' of shape [{shape}]'}",
            fix="pass an integer array, or lists of integers, with rows of equal length",
        )
    if array.size and not 0 <= array.min() <= array.max() <= np.iinfo(dtype).max:
        raise OrderError(
            f"{name} go from {array.min()} to {array.max()}",
            why=f"they are counted from 0, and kept in {np.dtype(dtype).itemsize} bytes each",
            fix="pass ids as the data counts them, and steps as the order does, from 0",
        )
    return array.astype(dtype)


def _ranks(scores: Any) -> NDArray[np.int32]:
    try:
        array = np.asarray(scores)
    except ValueError:  # rows of unequal length
        array = np.array("ragged")
    if array.ndim != 1 or not np.can_cast(array.dtype, np.longdouble):
        raise OrderError(
            f"sorted_by: scores cannot be {reprlib.repr(scores)}",
            why="they are real numbers of shape [samples]",
            fix="pass one score for each sample, such as its loss",
        )
    unordered = np.flatnonzero(np.isnan(array))
    if unordered.size:
        raise OrderError(
            f"sorted_by: the scores of samples {_shown(unordered)} are NaN",
            why="NaN is neither before nor after another score",
            fix="np.where(np.isnan(scores), np.inf, scores) puts them last",
        )
    return np.unique(array, return_inverse=True)[1].astype("<i4")


def _as_rows(ids: NDArray[Any], batch_size: int, rows: int, name: str) -> NDArray[Any]:
    if not rows or ids.size != rows * batch_size:
        raise OrderError(
            f"{name}: {ids.size} ids do not make {rows} batches of {batch_size}",
            why="every row is one whole batch, and all batches of an order have one size",
            fix=f"pass ids as integers of shape [steps, {batch_size}]",
        )
    return ids.reshape(rows, batch_size)


# -------------------------------------------------------------------------------------- order


@dataclass(frozen=True, repr=False)
class Order:
    """Which samples make each batch: stateless, seekable, and data rather than behaviour.

    Make one with `shuffled`, `sequential` or `explicit`, bind it to the number of samples, and
    change it with edits; each gives a new order, and counts steps as the order below has them.
    Edits that follow `since(t)` leave all batches before step t as they are.
    Two orders are equal when their specs are, bound or not. What does not fit raises
    `OrderError`: an edit of a bound order when it is made, of an unbound one in `bind`.

    >>> order = Order.shuffled(batch_size=64, epochs=20, seed=0).swap(3, 7).bind(1797)
    >>> order
    Order.shuffled(batch_size=64, epochs=20, seed=0).swap(3, 7)  # 1797 samples, 560 steps
    >>> order[3].shape, len(order), order.epoch([0, 27, 28]).tolist()
    ((64,), 560, [0, 0, 1])
    """

    ops: tuple[tuple[Any, ...], ...]
    _bound: _Bound | None = field(default=None, compare=False)

    @classmethod
    def shuffled(cls, batch_size: int, epochs: int, seed: int, *, pad: bool = False) -> "Order":
        """Visit all samples once per epoch, each time in another order.

        Epoch e is `Generator(Philox(key=[seed, e])).permutation(samples)`, the key as uint64.
        The last short batch is dropped, or with `pad` filled with id -1 and weight 0.
        """
        return cls((_op("shuffled", batch_size, epochs, seed, pad),))

    @classmethod
    def sequential(cls, batch_size: int, epochs: int = 1, *, pad: bool = False) -> "Order":
        """Visit samples 0, 1, 2, … in every epoch; the last short batch is as in `shuffled`.

        >>> Order.sequential(2, pad=True).bind(3)[:].tolist()
        [[0, 1], [2, -1]]
        """
        return cls((_op("sequential", batch_size, epochs, pad),))

    @classmethod
    def explicit(cls, ids: ArrayLike) -> "Order":
        """Take each row of `ids`, integers [steps, batch], as a batch of the only epoch."""
        table = _integers(ids, "<i4", "explicit: ids", "steps batch")
        return cls((_op("explicit", table.shape[1], table.tobytes()),))

    @classmethod
    def from_spec(cls, spec: object) -> "Order":
        """Rebuild an unbound order from what `spec` returned; nothing in it is trusted.

        >>> order = Order.sequential(4).swap(0, 1)
        >>> Order.from_spec(order.spec()) == order
        True
        """
        refused = functools.partial(OrderError, fix="pass what Order.spec() returned, unchanged")
        if not isinstance(spec, list | tuple) or not 1 <= len(spec) <= 1 + _MOST_EDITS:
            raise refused(
                f"{reprlib.repr(spec)} is no spec of an order",
                why=f"that is a list of one base and at most {_MOST_EDITS} edits",
            )
        for place, op in enumerate(spec):
            known = _EDITS if place else _BASES
            named = isinstance(op, list | tuple) and op and isinstance(op[0], str)
            if not named or op[0] not in known:
                raise refused(
                    f"{reprlib.repr(op)} cannot stand at place {place} of an order's spec",
                    why=f"that is a list that begins with one of {', '.join(known)}",
                )
        return cls(tuple(_op(*op) for op in spec))

    def spec(self) -> list[list[str | int | bool | bytes | None]]:
        """Return the base and the edits as plain values; arrays are little-endian bytes.

        The number of samples is not among them: that is a fact about the data.
        """
        return [list(op) for op in self.ops]

    def bind(self, samples: int) -> "Order":
        """Return this order over samples 0 to `samples` - 1, all its edits checked.

        A `drop` looks at every epoch that it may change, which takes one permutation of the
        samples for each.
        """
        if self._bound is not None and self._bound.samples == samples:
            return self
        if self._bound is not None or type(samples) is not int or not 0 < samples < 2**31:
            raise OrderError(
                f"{self!r} cannot be bound to {reprlib.repr(samples)} samples",
                why="an order is bound once, to 1 to 2**31 - 1 samples, as ids are int32",
                fix="Order.from_spec(order.spec()).bind(len(data))",
            )
        bound: Any = samples
        for op in self.ops:
            bound = _OPS[op[0]][0](bound, *_values(op).values())
        return Order(self.ops, bound)

    # Edits

    def since(self, step: int) -> "Order":
        """Let the edits that follow touch only occurrences in steps from `step` on.

        Earlier batches stay as they are, also those of an epoch that an edit changes in part. This
        changes no batch itself. A later `since` takes its place, and `since(0)` lifts it.

        >>> Order.sequential(2, epochs=2).since(1).reversed(0).bind(6)[:].tolist()
        [[0, 1], [5, 4], [3, 2], [0, 1], [2, 3], [4, 5]]
        """
        return self._edited("since", step)

    def swap(self, a: int, b: int) -> "Order":
        """Exchange the batches of steps `a` and `b`.

        >>> Order.sequential(2).swap(0, 2).bind(6)[:].tolist()
        [[4, 5], [2, 3], [0, 1]]
        """
        return self._edited("swap", a, b)

    def drop(self, samples: ArrayLike, *, refill: bool = True) -> "Order":
        """Leave out all occurrences of `samples`, integers of any shape.

        With `refill` the later occurrences of the epoch move up, and what no longer fills a batch
        is dropped or padded as the base does: without padding, one sample less may cost a step.
        Without `refill` all batches stay as they are, and the weight of `samples` is 0.

        >>> Order.sequential(2).drop([1]).bind(5)[:].tolist()
        [[0, 2]]
        >>> Order.sequential(2).since(1).drop([3]).bind(7)[:].tolist()
        [[0, 1], [2, 4]]
        """
        dropped = np.unique(_integers(samples, "<i4", "drop: samples"))
        return self._edited("drop", dropped.tobytes(), refill)

    def reversed(self, epoch: int | None) -> "Order":
        """Turn the sequence of occurrences of one epoch around, or with None of every epoch.

        Padding stays where it is, and after `since` so does what comes before that step.

        >>> Order.sequential(2, epochs=2, pad=True).reversed(None).bind(3)[:].tolist()
        [[2, 1], [0, -1], [2, 1], [0, -1]]
        """
        return self._edited("reversed", epoch)

    def shuffled_again(self, epoch: int | None, seed: int) -> "Order":
        """Permute the occurrences of one epoch, or with None those of every epoch.

        Epoch e takes `Generator(Philox(key=[seed, e])).permutation(count)` of its `count`
        occurrences. Padding stays where it is, and after `since` so does what comes before that
        step: `order.since(t).shuffled_again(None, seed)` is another order of all that is left.

        >>> Order.sequential(3, epochs=2).shuffled_again(None, seed=7).bind(3)[:].tolist()
        [[1, 2, 0], [0, 2, 1]]
        """
        return self._edited("shuffled_again", epoch, seed)

    def sorted_by(
        self, scores: ArrayLike, *, epoch: int | None = None, descending: bool = False
    ) -> "Order":
        """Arrange the occurrences of every epoch by the score of their sample: a curriculum.

        Easy samples come first where the score is a loss. Equal scores keep their sequence, also
        in descending order. Padding stays where it is, and after `since` so does what comes
        before that step. Only the ranks of the scores are kept.

        Args:
            scores: real numbers [samples], finite or infinite.
            epoch: the only one to arrange.
            descending: whether the highest score comes first.

        Raises:
            OrderError: a score is NaN, or there is not one for each sample.

        >>> Order.sequential(2).sorted_by([0.5, 0.1, float("inf"), 0.1]).bind(4)[:].tolist()
        [[1, 3], [0, 2]]
        """
        return self._edited("sorted_by", _ranks(scores).tobytes(), epoch, descending)

    def replaced(self, ids: Mapping[int, ArrayLike] | ArrayLike) -> "Order":
        """Give steps other batches, of weight 1: {step: integers [batch]}, or [steps, batch].

        The rows of an array are for steps 0, 1, 2, …, or after `since(t)` for t, t + 1, t + 2, …

        >>> Order.sequential(2).replaced({1: [0, 0]}).bind(4)[:].tolist()
        [[0, 1], [0, 0]]
        """
        rows = list(ids.values()) if isinstance(ids, Mapping) else ids
        table = _integers(rows, "<i4", "replaced: ids", "steps batch")
        _as_rows(table, self.batch_size, len(table), "replaced")
        since = next((op[1] for op in self.ops[::-1] if op[0] == "since"), 0)
        keys = list(ids) if isinstance(ids, Mapping) else since + np.arange(len(table))
        steps = _integers(keys, "<i8", "replaced: steps", "steps")
        by_step = np.argsort(steps)
        return self._edited("replaced", steps[by_step].tobytes(), table[by_step].tobytes())

    def _edited(self, name: str, *values: Any) -> "Order":
        if len(self.ops) > _MOST_EDITS:
            raise OrderError(
                f"this order has {_MOST_EDITS} edits already, and takes no more",
                why="every batch is found by going through all of them",
                fix="write many edits as one: order.replaced({step: ids, …})",
            )
        op = _op(name, *values)
        bound = self._bound and _EDITS[name][0](self._bound, *_values(op).values())
        return Order((*self.ops, op), bound)

    # Reading

    @property
    def samples(self) -> int | None:
        """The number of samples that the order is bound to, or None."""
        return None if self._bound is None else self._bound.samples

    @property
    def batch_size(self) -> int:
        """The number of positions in every batch."""
        return _values(self.ops[0])["batch_size"]

    @property
    def epochs(self) -> int:
        """The number of passes over the data; edits keep it."""
        return _values(self.ops[0]).get("epochs", 1)

    @property
    def weighted(self) -> bool:
        """Whether weights other than 1 can occur: by padding, or by a `drop` without refill."""
        settings = [_values(op) for op in self.ops]
        return any(s.get("pad") or s.get("refill") is False for s in settings)

    def __len__(self) -> int:
        return int(self._known.starts[-1])

    def steps_in(self, epoch: int) -> range:
        """Return the steps of one epoch; after a `drop` epochs may differ in length."""
        self._known.check("steps_in", "epoch", epoch)
        return range(*self._known.starts[epoch : epoch + 2].tolist())

    def epoch(self, steps: ArrayLike) -> NDArray[np.int64]:
        """Return the epoch of each step, for integers of any shape."""
        array = _integers(steps, "<i8", "epoch: steps")
        self._known.check("epoch", "step", array)
        return np.asarray(np.searchsorted(self._known.starts, array, side="right") - 1)

    def batches(self, a: int, b: int) -> Batches:
        """Return ids int32 and weights float32 of steps `a` to `b` - 1, each [b - a, batch].

        >>> ids, weights = Order.sequential(2, pad=True).bind(3).batches(0, 2)
        >>> weights.tolist()
        [[1.0, 1.0], [1.0, 0.0]]
        """
        if not 0 <= a <= b <= len(self):
            raise OrderError(
                f"batches({a}, {b}) is not within the order",
                why=f"it has {len(self)} steps, so 0 <= a <= b <= {len(self)}",
                fix=f"order.batches({a}, min({b}, len(order)))",
            )
        return self._known.rows(np.arange(a, b))

    def __getitem__(self, key: int | slice) -> NDArray[np.int32]:
        """Return the ids of one step, [batch], or of a slice of steps, [steps, batch]."""
        if isinstance(key, slice):
            return self._known.rows(np.arange(*key.indices(len(self)))).ids
        step = operator.index(key)
        if not -len(self) <= step < len(self):
            self._known.check("order[t]", "step", step, _NoSuchStep)
        return self._known.rows(np.array([step % len(self)])).ids[0]

    def checksum(self) -> int:
        """Return the crc32 of all ids and weights, whatever spec and epochs they come from.

        Each step adds its ids as little-endian int32, then its weights as float32. This takes the
        time of making every epoch once, and the memory of one.
        """
        checksum = 0
        for epoch in range(self.epochs):
            ids, weights = self._known.whole(epoch)
            rows = np.concatenate([ids, weights.view(np.int32)], axis=1)
            checksum = zlib.crc32(rows.astype("<i4", copy=False).data, checksum)
        return checksum

    def __repr__(self) -> str:
        chain = ["Order"]
        for op in self.ops:
            options = _OPTIONS.get(op[0], {})
            shown = [
                f"{key}={_shown(value)}" if op[0] in _BASES or key in options else _shown(value)
                for key, value in _values(op).items()
                if key not in options or value is not options[key]
            ]
            chain.append(f"{op[0]}({', '.join(shown)})")
        known = self._bound and f"{self._bound.samples} samples, {len(self)} steps"
        return f"{'.'.join(chain)}  # {known or 'unbound'}"

    def __reduce__(self) -> tuple[Any, ...]:
        # A bound order holds closures, which do not pickle; its spec says as much.
        return _restored, (self.spec(), self.samples)

    @property
    def _known(self) -> _Bound:
        if self._bound is None:
            raise OrderError(
                f"{self!r} does not know its data",
                why="how many samples there are decides how many batches, and what is in each",
                fix="order = order.bind(len(data))",
            )
        return self._bound


def _restored(spec: object, samples: int | None) -> Order:
    return Order.from_spec(spec) if samples is None else Order.from_spec(spec).bind(samples)
