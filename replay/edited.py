"""Edits that have met a run: what each lane starts from, and what it consumes at each step."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay.artifact import Signature
from replay.data import Data
from replay.edits import Edit
from replay.errors import DataError, OrderError, QueryError, ReplayError
from replay.identity import sha256
from replay.lanes import Inflow, Layout
from replay.order import Order

# What batches are gathered from lies on the device as a whole up to this size.
_RESIDENT = 2**28
# What a call consumes is staged on the host, and a call that is under way cannot be interrupted.
_STAGED_BYTES, _OPERATIONS, _MOST_ROWS = 2**26, 1e11, 1024


class Edited(NamedTuple):
    """An edit of a run.

    Attributes:
        name: how it is shown.
        order: of the samples; None for that of the run.
        samples: whose losses have another factor, ascending.
        factors: of their losses, `float32`.
        digest: of all that the lane consumes; edits that come to the same have the same.
    """

    name: str
    order: Order | None
    samples: np.ndarray
    factors: np.ndarray
    digest: str


class Nudge(NamedTuple):
    """One unit in the last place of one weight.

    Attributes:
        leaf: number of the tensor among the leaves of a state.
        index: of the weight in the flattened tensor.
        value: what it becomes.
    """

    leaf: int
    index: int
    value: float


class Lane(NamedTuple):
    """What is trained: an edit, or none, and a nudge, or none."""

    edited: Edited
    nudge: Nudge | None


UNEDITED = Edited("", None, np.zeros(0, np.int64), np.zeros(0, np.float32), "")


def met(
    edits: Sequence[Edit], order: Order, before: np.ndarray, at: int, until: int
) -> list[Edited]:
    """Let edits meet a run.

    Args:
        edits: of orders and sample weights.
        order: of the run, bound.
        before: factors of the losses, `float32[samples]`.
        at: the first step that may be another.
        until: the state at which all are compared.

    Raises:
        QueryError: an edit changes what lanes cannot.
        OrderError, DataError: an edit does not fit the run. The message names the edit.
    """
    seen = _seen(order, at, until)
    found = []
    for number, edit in enumerate(edits):
        what = f"edit {number} ({edit})"
        others = [name for name in edit.changed if name not in ("order", "sample_weights")]
        if others:
            raise QueryError(
                f"{what} changes {' and '.join(others)}",
                why="all lanes share one program, one key and one start; lanes differ in order and "
                "sample weights",
                fix=f"run.fork(path, at={at}, {others[0]}=...) runs such an edit by itself",
            )
        try:
            found.append(_met(edit, order, before, at, until, seen))
        except ReplayError as error:
            raise type(error)(f"{what}: {error.what}", why=error.why, fix=error.fix) from error
    return found


def _met(
    edit: Edit, order: Order, before: np.ndarray, at: int, until: int, seen: np.ndarray
) -> Edited:
    after = None if edit.order is None else edit.order_after(order, at)
    if after is not None and len(after) < until:
        raise OrderError(
            f"the new order ends after {len(after)} steps",
            why=f"all edits are compared at state {until}",
            fix=f"until={len(after)}, or an edit that keeps the steps: drop(..., refill=False)",
        )
    factors = edit.factors(before)
    seen = seen if after is None else _seen(after, at, until)
    given = edit.sample_weights
    missing = [int(i) for i in given if not seen[i]] if isinstance(given, Mapping) else []
    if missing:
        shown = ", ".join(map(str, missing[:6])) + ", …" * (len(missing) > 6)
        raise DataError(
            f"no batch of steps {at} to {until - 1} has sample {shown}",
            why="another weight of theirs would change nothing",
            fix=f"begin earlier, or weigh samples that occur: np.unique(run.order[{at}:{until}])",
        )
    samples = np.flatnonzero(factors != before)
    digest = hashlib.sha256(samples.tobytes() + factors[samples].tobytes())
    for start in range(at, until, 1024) if after is not None else ():
        for rows in after.batches(start, min(start + 1024, until)) if after is not None else ():
            digest.update(np.ascontiguousarray(rows).tobytes())
    return Edited(str(edit), after, samples, factors[samples], digest.hexdigest())


def _seen(order: Order, start: int, stop: int) -> np.ndarray:
    """Return which samples occur in some steps, `bool[samples]`."""
    seen = np.zeros((order.samples or 0) + 1, bool)  # padding, -1, is the last
    for first in range(start, stop, 1024):
        seen[order.batches(first, min(first + 1024, stop)).ids] = True
    return seen[:-1]


def nudges(
    state: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    weights: Sequence[int],
    count: int,
    seed: int,
) -> list[Nudge]:
    """Choose weights, and move each by one unit in the last place, up or down.

    Weights are chosen among that are not 0, since one unit in the last place of 0 is lost in the
    first addition, and that the training has moved: what no gradient reaches (weights of a pixel
    that is always dark, or of a unit that is off) hands no difference on. Where none is left, all
    that are not 0 count; where all are 0, one becomes the smallest normal number, which tells
    little.

    Args:
        state: raw leaves.
        after: raw leaves at the end of the training.
        weights: which leaves are weights.
        count: how many nudges.
        seed: of the choice, `Generator(Philox(key=[seed, number]))`.
    """
    values = {leaf: np.asarray(state[leaf]).reshape(-1) for leaf in weights}
    moved = {leaf: values[leaf] != np.asarray(after[leaf]).reshape(-1) for leaf in weights}
    present = [(leaf, np.flatnonzero((x != 0) & moved[leaf])) for leaf, x in values.items()]
    if not any(len(places) for _, places in present):
        present = [(leaf, np.flatnonzero(x)) for leaf, x in values.items()]
    ends = np.cumsum([len(places) for _, places in present])
    found = []
    for number in range(count):
        draw = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        up = bool(draw.integers(2))
        if not ends[-1]:
            leaf = weights[int(draw.integers(len(weights)))]
            tiny = jnp.finfo(state[leaf].dtype).tiny
            found.append(Nudge(leaf, int(draw.integers(state[leaf].size)), float(tiny)))
            continue
        place = int(draw.integers(ends[-1]))
        which = int(np.searchsorted(ends, place, side="right"))
        leaf, places = present[which]
        index = int(places[place - (ends[which - 1] if which else 0)])
        old = np.asarray(state[leaf]).reshape(-1)[index]
        towards = np.asarray(np.inf if up else -np.inf, old.dtype)
        found.append(Nudge(leaf, index, float(np.nextafter(old, towards))))
    return found


class Staging:
    """What the lanes of a run consume, step by step.

    Args:
        order: of the run, bound.
        before: factors of the losses, `float32[samples]`.
        data: the samples.
        signature: of the run.
        lanes: in one call.
        steps: that there are in all.
        own: whether orders are edited.

    Attributes:
        layout: how many lanes and steps a call takes.
    """

    def __init__(
        self,
        order: Order,
        before: np.ndarray,
        data: Data,
        signature: Signature,
        *,
        lanes: int,
        steps: int,
        own: bool,
    ):
        self._order, self._before, self._data = order, before, data
        # Calls are staged side by side, and data of a user need not bear two readers.
        self._reading = threading.Lock()
        size = signature.batch_size
        example = sum(leaf.nbytes for leaf in signature.batch)
        resident = data.nbytes <= _RESIDENT
        batches = lanes if own else 1
        each = size * (4 * lanes + 8 * batches + example * batches * (not resident))
        weights = sum(signature.state[i].nbytes for i in signature.weights) // 4
        most = min(_STAGED_BYTES // each, int(_OPERATIONS / (6 * size * weights * lanes + 1)))
        rows = min(steps, max(1, min(most, _MOST_ROWS)))
        table = len(data) if resident else min(len(data), rows * size * batches)
        self.layout = Layout(lanes, rows, own, table)
        self._table = None
        if resident:
            self._table = [jnp.asarray(leaf) for leaf in data.leaves(np.arange(len(data)))]

    def inflow(self, lanes: Sequence[Lane], start: int, stop: int) -> Inflow:
        """Return what some lanes consume in steps `[start, stop)`; others are like the first."""
        layout, given = self.layout, self._order.batches(start, stop)
        ids = np.zeros((layout.lanes if layout.own else 1, layout.rows, given.ids.shape[1]), "i4")
        weights = np.zeros((layout.lanes, *ids.shape[1:]), np.float32)
        count = stop - start
        ids[:, :count] = given.ids
        places = np.maximum(given.ids, 0)
        weights[:, :count] = given.weights * self._before[places]
        for number, lane in enumerate(lanes):
            edited = lane.edited
            batches, where = given, places
            if edited.order is not None:
                batches = edited.order.batches(start, stop)
                ids[number, :count], where = batches.ids, np.maximum(batches.ids, 0)
            if edited.order is not None or len(edited.samples):
                factors = self._before
                if len(edited.samples):
                    factors = factors.copy()
                    factors[edited.samples] = edited.factors
                weights[number, :count] = batches.weights * factors[where]
        places = np.maximum(ids, 0)  # padding reads sample 0, as in the run
        if self._table is not None:
            return Inflow(ids, places, weights, self._table)
        unique, places = np.unique(places, return_inverse=True)
        rows = np.zeros(layout.table, unique.dtype)
        rows[: len(unique)] = unique
        with self._reading:
            table: list[Any] = self._data.leaves(rows)
        return Inflow(ids, places.reshape(ids.shape).astype(np.int32), weights, table)


def digest_of(lane: Lane) -> str:
    """Return a digest of what makes a lane another than the control lane."""
    return sha256(repr((lane.edited.digest, lane.nudge)).encode())
