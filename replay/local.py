"""The value of every node of a plan at one step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replay import plan as planning
from replay.errors import QueryError
from replay.frames import Frame
from replay.grads.sources import gradients_of
from replay.query import states
from replay.query.nodes import Among, At, Group, Lag, Node, Part, Pick, Reduce, Scan
from replay.reducing import reduce_now
from replay.sample_gradients import weighted
from replay.values import Formula, Given, Value, fused, of_part, ragged, without_walk


class Local:
    """The value of every node at one step.

    Args:
        frames: of the runs, by name.
        step: where the replay is.
        known: what was computed before.
        lags: what stood at the step before, by node.
    """

    def __init__(
        self,
        frames: Mapping[str, Frame],
        step: int,
        known: Mapping[Node, Value],
        lags: dict[Node, tuple[int, Value]],
    ):
        self.frames, self.step = frames, step
        self._known, self._lags = known, lags
        self._memo: dict[Node, Value] = {}

    def value(self, node: Node) -> Value:
        """Return the value of a node, without the dimension that is walked."""
        if not node.walked:
            return self._known[node]
        if node not in self._memo:
            self._memo[node] = self._value(node)
        return self._memo[node]

    def _value(self, node: Node) -> Value:
        dims = without_walk(node.dims)
        if isinstance(node, Scan):
            return Value(dims, self._scan(node, 0))
        if isinstance(node, At):
            assert isinstance(node.child, Scan)
            return Value(dims, self._scan(node.child, node.offset))
        if isinstance(node, Lag):
            return self._lags[node][1]
        if isinstance(node, Among):
            return among(node, self.value(node.child), self.ids(node))
        if isinstance(node, Pick):
            child = self.value(node.child)
            axis = child.dims.index(node.dim)
            return Value(dims, [jnp.take(x, node.index, axis) for x in child.data])
        if isinstance(node, Reduce):
            special = self._column(node) or self._shares(node)
            return special or reduce_now(node, self, jnp)
        starts, formula = fused(node)
        arrays = [self.value(start) for start in starts]
        run = _jitted(formula)
        count = max((len(x.data) for x in arrays if ragged(x)), default=1)
        return Value(dims, [run(of_part(arrays, i)) for i in range(count)])

    def remember(self, node: Node) -> None:
        """Keep, for the next step, what lags below a node look back at."""
        lags = [lag for lag in planning.lags(node) if self.step in lag.child.steps]
        found = {lag: (self.step, self.value(lag.child)) for lag in lags}
        self._lags |= found  # at last, as a difference of differences looks back within

    def valid(self, node: Node) -> np.ndarray:
        """Return where in the batch of a node's run there is a sample that is chosen."""
        return chosen(node, self.ids(node))

    def ids(self, node: Node) -> np.ndarray:
        """Return the batch of a node's run."""
        return self.frames[next(node.scans()).run].ids

    def _scan(self, scan: Scan, offset: int) -> list[Any]:
        frame = self.frames[scan.run]
        if scan.quantity == "column":
            return [self._known[scan].data[0][np.searchsorted(scan.steps, self.step)]]
        return [frame.get(scan, part, offset) for part in scan.tensors or (None,)]

    def _column(self, node: Reduce) -> Value | None:
        """Return norms of samples from factors."""
        found = planning.of_samples(node.child)
        if found is None or node.by is not None or node.over != ("weight",):
            return None
        of, scan = found
        squares = node.how == "norm" and of != "square" or node.how == "sum" and of == "square"
        whole = all(part.indices is None for part in scan.tensors)
        if not squares or not whole or scan.quantity != "sample_grads" or scan.source:
            return None
        frame = self.frames[scan.run]
        size = frame.observers.signature.batch_size
        total = jnp.zeros(size, jnp.float32)
        for part in scan.tensors:
            for carried, occurrences in frame.parts(frame.observers.tensor[part.path]):
                rows = np.asarray(occurrences) % size
                total = total.at[rows].add(_square_norms(carried.form, carried.payload))
        return Value(("position",), [jnp.sqrt(total) if node.how == "norm" else total])

    def _shares(self, node: Reduce) -> Value | None:
        """Return sums over the batch of shares of the update, without making them."""
        found = planning.of_samples(node.child)
        if found is None or node.how != "sum" or node.over != ("position",):
            return None
        (of, scan), by = found, node.by
        if scan.source or scan.quantity != "sample_updates" or of == "square":
            return None
        if by is not None and by.kind != "labels":
            return None
        frame, data = self.frames[scan.run], []
        for part in scan.tensors:
            data.append(_sum_of_shares(frame, part, of, by))
        return Value(without_walk(node.dims), data)


def chosen(node: Node, ids: np.ndarray) -> np.ndarray:
    """Return where in a batch there is a sample, of those that a node looks at."""
    found = ids >= 0
    stack = [node]
    while stack:
        this = stack.pop()
        if isinstance(this, Among):
            found = found & np.isin(ids, this.samples)
        stack += this.children
    return found


def among(node: Among, value: Value, ids: np.ndarray) -> Value:
    """Make NaN, or false, of what belongs to other samples."""
    shape = [-1 if dim == "position" else 1 for dim in value.dims]

    def only(x):
        # A tensor comes in its own shape, and a scalar has no axis of weights.
        mine = chosen(node, ids).reshape([*shape[: x.ndim], *[1] * (x.ndim - len(shape))])
        if states.is_count(x.dtype):
            return x & mine
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        return jnp.where(mine, x.astype(dtype), jnp.asarray(jnp.nan, dtype))

    return Value(value.dims, [only(x) for x in value.data])


@functools.lru_cache(maxsize=256)
def _jitted(formula: Formula | Given) -> Callable[[Sequence[Any]], Any]:
    return jax.jit(formula.__call__)


@functools.partial(jax.jit, static_argnums=0)
def _square_norms(form, payload):
    return gradients_of(form, payload).square_norms()


def _sum_of_shares(frame: Frame, part: Part, of: str, by: Group | None) -> Any:
    number = frame.observers.tensor[part.path]
    assert frame.replayed is not None
    size = frame.observers.signature.batch_size
    total = 0.0
    for carried, occurrences in frame.parts(number):
        rows = np.asarray(occurrences) % size
        weights = frame.replayed.weights[rows] / np.float32(size)
        if by is None:
            table = weights[None]
        else:
            groups = np.frombuffer(by.labels, "<i4")[frame.ids[rows]]
            table = np.where(np.arange(by.count)[:, None] == groups, weights, 0)
        total = total + _weighted_sums(carried.form, of, carried.payload, table)
    share = frame.share(number)
    found = _times(total, share, of, part.indices)
    return found[0] if by is None else found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weighted_sums(form, of, payload, table):
    """Return sums over the samples with several rows of weights, `[rows, *shape]`."""
    one = functools.partial(weighted, form, of, payload)
    return jax.lax.map(one, jnp.asarray(table))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _times(total, share, of, indices):
    share = jnp.abs(share) if of == "magnitude" else share
    flat = (total * share[None]).reshape(len(total), -1)
    return flat if indices is None else flat[:, np.asarray(indices, np.int32)]


class Known:
    """What was collected, given out again step by step by the interface of `Local`."""

    def __init__(self, value: Callable[[Node], Value]):
        self._value, self._blank = value, False
        self.step = 0
        self._ids: np.ndarray | None = None

    def at(self, step: int, ids: np.ndarray | None) -> "Known":
        """Stand at a step."""
        self.step, self._ids = step, ids
        return self

    def blank(self, ids: np.ndarray | None) -> "Known":
        """Stand at no step: the values are zero."""
        self._ids, self._blank = ids, True
        return self

    def value(self, node: Node) -> Value:
        """Return the value of a node at the step, without the dimension that is walked."""
        found = self._value(node)
        if not node.walked:
            return found
        axis = found.dims.index(node.walked)
        dims = tuple(dim for dim in found.dims if dim != node.walked)
        if self._blank:
            shape = lambda x: [n for i, n in enumerate(x.shape) if i != axis]  # noqa: E731
            return Value(dims, [np.zeros(shape(x), x.dtype) for x in found.data])
        place = int(np.searchsorted(node.steps, self.step))
        return Value(dims, [np.take(x, place, axis) for x in found.data])

    def valid(self, node: Node) -> np.ndarray:
        """Return where in the batch there is a sample that is chosen."""
        return chosen(node, self.ids(node))

    def ids(self, node: Node) -> np.ndarray:
        """Return the batch."""
        assert self._ids is not None
        return self._ids


class Everything:
    """Values after the replay, by the interface of `Local`."""

    step = 0

    def __init__(self, value: Callable[[Node], Value]):
        self.value = value

    def valid(self, node: Node) -> None:
        """Every position has had a sample at some step."""

    def ids(self, node: Node) -> np.ndarray:
        """Return no samples.

        Raises:
            QueryError: always.
        """
        raise QueryError(
            "samples are told apart after their steps were reduced",
            why="a position holds another sample at each step",
            fix="group by labels or samples first: x.groupby(labels).sum()",
        )
