"""Running a plan: one replay for all questions of a stage, folded step by step.

Every reduction of every tensor is an executable of its own, so that an answer does not depend on
what else was asked. Running states are folded within aligned blocks of steps and joined in one
fixed tree, so that an answer put together by several processes has the bits of one.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay import grouped
from replay import plan as planning
from replay.errors import Grade, QueryError
from replay.frames import CONDITION_LIMIT, Frame, Observers
from replay.grads import reductions as grads
from replay.grads.reductions import BLOCK_STEPS, Blocks
from replay.grads.sources import gradients_of
from replay.grads.stream import Stream
from replay.query import states
from replay.query.nodes import (
    RAGGED,
    Among,
    At,
    Group,
    Lag,
    Map,
    Node,
    Part,
    Pick,
    Reduce,
    Rename,
    Scan,
    Take,
    ordered,
    restrict,
)
from replay.query.states import Values
from replay.replaying import Replayer
from replay.sample_gradients import weighted

MEMORY = 2**30


class Value(NamedTuple):
    """An array with names for its axes; of ragged ones, an array for each tensor.

    Attributes:
        dims: names of the axes.
        data: one array, or one for each part.
        fields: what a ranking says besides, as `data`: `step` and `number`.
    """

    dims: tuple[str, ...]
    data: list[Any]
    fields: dict[str, list[Any]] = {}


class Asked(NamedTuple):
    """A run that is asked.

    Attributes:
        replayer: re-executes its steps.
        observers: its archived programs.
        catalogue: what a planner knows of it.
        columns: name -> a number for each step.
        epochs: the epoch of each step.
    """

    replayer: Replayer
    observers: Observers
    catalogue: planning.Catalogue
    columns: Callable[[str], np.ndarray]
    epochs: Callable[[np.ndarray], np.ndarray]


class Answer(NamedTuple):
    """What a question is answered with.

    Attributes:
        value: with all dimensions.
        node: the plan, anchors replaced by what they were found to be.
        grade: of the replay.
        steps: how many steps were replayed for all questions together.
        occurrences: for what was taken: steps, positions and samples.
    """

    value: Value
    node: Node
    grade: Grade
    steps: int
    occurrences: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


# ----------------------------------------------------------------------------- values of one step


def _aligned(x: Any, dims: Sequence[str], wanted: Sequence[str]) -> Any:
    """Give an array axes of length one for the dimensions that it lacks."""
    if tuple(dims) == tuple(wanted) or not hasattr(x, "ndim"):
        return x
    places = [i for i, dim in enumerate(wanted) if dim not in dims]
    return x.reshape([1 if i in places else x.shape[list(dims).index(d)]
                      for i, d in enumerate(wanted)])  # fmt: skip


def _without_walk(dims: Sequence[str]) -> tuple[str, ...]:
    return tuple(dim for dim in dims if dim not in ("step", "state"))


@functools.cache
def fused(node: Node) -> tuple[tuple[Node, ...], Callable[[Sequence[Any]], Any]]:
    """Return what a tree of functions of elements starts from, and one function of all of it."""
    starts: dict[Node, int] = {}

    def build(this: Node) -> Callable[[Sequence[Any]], Any]:
        dims = _without_walk(this.dims)
        if isinstance(this, Scan) and this.quantity == "updates":
            this = _moved(this)
        if not isinstance(this, Map) or not this.walked:
            number, ragged = starts.setdefault(this, len(starts)), bool(this.parts)
            return lambda arrays: _flat(arrays[number], dims) if ragged else arrays[number]
        parts = [
            (build(x), _without_walk(x.dims)) if isinstance(x, Node) else (x, None)
            for x in this.arguments
        ]
        function = getattr(jnp, this.function)

        def run(arrays):
            given = [
                part if mine is None else _aligned(part(arrays), mine, dims) for part, mine in parts
            ]
            return function(*given)

        return run

    run = build(node)
    return tuple(starts), run


def _moved(scan: Scan) -> Node:
    """Return updates as the difference of weights, to be computed where they are used."""
    weights = dataclasses.replace(scan, quantity="weights")
    return Map("subtract", (At(weights, 1), At(weights, 0)))


def _flat(x: Any, dims: Sequence[str]) -> Any:
    """Let the last axis run over all weights of a tensor, which may come in its own shape."""
    if not set(dims) & set(RAGGED) or x.ndim == len(dims):
        return x
    return x.reshape(*x.shape[: len(dims) - 1], -1)


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
        dims = _without_walk(node.dims)
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
        starts, _ = fused(node)
        arrays = [self.value(start) for start in starts]
        run = _jitted(node)
        count = max((len(x.data) for x in arrays if _ragged(x)), default=1)
        return Value(dims, [run(_of_part(arrays, i)) for i in range(count)])

    def remember(self, node: Node) -> None:
        """Keep, for the next step, what lags below a node look back at."""
        found, stack = {}, [node]
        while stack:
            this = stack.pop()
            if isinstance(this, Lag) and self.step in this.child.steps:
                found[this] = (self.step, self.value(this.child))
            stack += [child for child in this.children if child.walked]
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
        return Value(_without_walk(node.dims), data)


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
        mine = chosen(node, ids).reshape([*shape, *[1] * (x.ndim - len(shape))])
        if states.is_count(x.dtype):
            return x & mine
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        return jnp.where(mine, x.astype(dtype), jnp.asarray(jnp.nan, dtype))

    return Value(value.dims, [only(x) for x in value.data])


@functools.cache
def _jitted(node: Node) -> Callable[[Sequence[Any]], Any]:
    return jax.jit(fused(node)[1])


def _ragged(value: Value) -> bool:
    return len(value.data) > 1 or bool(set(value.dims) & set(RAGGED))


def _of_part(values: Sequence[Value], part: int) -> list[Any]:
    return [x.data[part] if len(x.data) > 1 else x.data[0] for x in values]


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


# --------------------------------------------------------------------------------- reductions


class Shape(NamedTuple):
    """How the values of a part are laid out for a reduction.

    Attributes:
        dims: of the child, without the one that is walked.
        over: those that are reduced within a step.
        rows: the one along which groups of samples are told apart, or nothing.
        kept: those that stay, in order; `unit` for groups by unit.
        units: how many units a part has, for groups by unit.
        offset: number of the part's first weight among all, for rankings of weights; tensors of
            one shape share executables otherwise.
        total: how many weights there are, likewise.
    """

    dims: tuple[str, ...]
    over: tuple[str, ...]
    rows: str
    kept: tuple[str, ...]
    units: int = 0
    offset: int = 0
    total: int = 1

    def arrange(self, x: Any) -> tuple[Any, Any]:
        """Return `[(rows,) *kept, n]` and the `int32[(rows,) n]` numbers of what is reduced."""
        dims, over = list(self.dims), list(self.over)
        numbers = self._numbers(x, dims)
        if self.units:
            x = x.reshape(*x.shape[:-1], -1, self.units)
            numbers = jnp.broadcast_to(numbers, (*numbers.shape[:-1], x.shape[-2] * self.units))
            numbers = numbers.reshape(*numbers.shape[:-1], -1, self.units)
            dims = [*dims[:-1], "_row", "unit"]
            over = ["_row" if dim == "weight" else dim for dim in over]
        rows = [self.rows] if self.rows else []
        inner = [dim for dim in over if dim != self.rows]
        order = [dims.index(dim) for dim in (*rows, *self.kept, *inner)]
        x, numbers = (y.transpose(order) for y in (x, jnp.broadcast_to(numbers, x.shape)))
        lead = len(rows) + len(self.kept)
        x, numbers = (y.reshape(*y.shape[:lead], -1) for y in (x, numbers))
        return x, numbers

    def _numbers(self, x: Any, dims: Sequence[str]) -> Any:
        """Return where each element stands among all that a step reduces, row-major."""
        total, stride = jnp.zeros((1,) * x.ndim, jnp.int32), 1
        for axis in reversed(range(x.ndim)):
            dim = dims[axis]
            if dim not in self.over:
                continue
            shape = [1] * x.ndim
            shape[axis] = x.shape[axis]
            place = jnp.arange(x.shape[axis], dtype=jnp.int32).reshape(shape)
            weight = dim in RAGGED and self.total > 1
            total = total + (place + (self.offset if weight else 0)) * stride
            stride *= self.total if weight else x.shape[axis]
        return total


@functools.cache
def _shapes(node: Reduce) -> tuple[list[Shape], tuple[str, ...]]:
    """Return the layout of each part of what a reduction reduces, and the dimensions of results."""
    child = node.child
    dims = _without_walk(child.dims)
    over = tuple(dim for dim in node.over if dim in dims)
    rows, kept = "", tuple(dim for dim in dims if dim not in over)
    kind = node.by.kind if node.by else ""
    if kind in ("labels", "sample"):
        rows = next(dim for dim in over if dim in ("position", "sample"))
    if kind == "unit":
        kept = (*kept, "unit")
    added = {"top_k": "rank", "hist": "bin", "quantile": "quantile"}.get(node.how)
    result = (*([node.by.dim] if rows and node.by else []), *kept, *([added] if added else []))
    parts = child.parts if set(dims) & set(RAGGED) else ()
    if not parts:
        return [Shape(dims, over, rows, kept)], result
    if kind == "unit" and any(part.indices is not None for part in parts):
        raise QueryError(
            "units of chosen weights are asked for",
            why="a unit is a whole column of its tensor",
            fix="group whole tensors by unit",
        )
    units = [(part.shape or (1,))[-1] for part in parts]
    ranked = node.how == "top_k" and set(RAGGED) & set(over)
    sizes = [part.size for part in parts] if "weight" in dims else units
    offsets = np.cumsum([0, *sizes]).tolist()
    shapes = [
        Shape(
            dims, over, rows, kept, each if kind == "unit" else 0,
            *((offset, offsets[-1]) if ranked else ()),
        )
        for each, offset in zip(units, offsets[:-1], strict=True)
    ]  # fmt: skip
    return shapes, result


@functools.cache
def _stepper(node: Reduce, shape: Shape) -> tuple[Callable, Callable]:
    """Return `init(arrays) -> state` and `step(state, arrays, step, valid, groups) -> state`."""
    starts, run = fused(_ranked(node))

    def how(x):
        return states.reduction(node.how, node.options, x.dtype)

    def arranged(arrays):
        x = run(arrays)
        x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, (1,) * len(shape.dims)))
        return shape.arrange(jnp.asarray(x))

    def mask(valid, x):
        """Spread `bool[batch]` over what is reduced, `bool[n]`."""
        if valid is None:
            return jnp.ones(x.shape[-1], bool)
        first = shape.over.index("position")
        rest = x.shape[-1] // len(valid)
        assert first == 0, "positions are the first of what is reduced"
        return jnp.repeat(valid, rest)

    def init(arrays):
        x, _ = arranged(arrays)
        reduction = how(x)
        kept = x.shape[1:-1] if shape.rows else x.shape[:-1]
        state = reduction.init(kept, x.dtype)
        if not shape.rows:
            return state
        assert node.by is not None
        count = node.by.count
        return jax.tree.map(lambda s: jnp.repeat(s[None], count, 0), state)

    def step(state, arrays, step, valid, groups):
        x, numbers = arranged(arrays)
        reduction = how(x)
        if not shape.rows:
            flat = numbers.reshape(-1, x.shape[-1])[0]
            if shape.units:
                flat = numbers  # of each unit its own
            return reduction.step(state, Values(x, mask(valid, x), flat, step))

        def one(state, row):
            x, numbers, group = row
            inside = group >= 0
            place = jnp.maximum(group, 0)
            mine = jax.tree.map(lambda s: s[place], state)
            flat = numbers.reshape(-1, x.shape[-1])[0]
            valid = jnp.full(x.shape[-1], inside)
            new = reduction.step(mine, Values(x, valid, flat, step))
            return jax.tree.map(lambda s, n: s.at[place].set(n), state, new), None

        return jax.lax.scan(one, state, (x, numbers, groups))[0]

    return jax.jit(init), jax.jit(step, donate_argnums=0)


@functools.cache
def _once(node: Reduce, shape: Shape) -> Callable[..., Any]:
    """Return `state(arrays, step, valid, groups)` of a reduction that begins and ends with it."""
    init, step = _stepper(node, shape)
    return jax.jit(lambda arrays, *more: step(init(arrays), arrays, *more))


@functools.cache
def _reader(node: Reduce, result_dims: tuple[str, ...], dtype: Any) -> Callable[..., Any]:
    """Return what turns the states of all parts into arrays, on the device."""

    def read(per_part):
        found = _finished(node, result_dims, per_part, dtype, jnp)
        return found.data, found.fields

    return jax.jit(read)


def _ranked(node: Reduce) -> Node:
    """Leave out of rankings the shares of updates in which samples cancel."""
    scans = [s for s in node.child.scans() if s.quantity == "sample_updates" and not s.source]
    if node.how != "top_k" or not scans or not {"step", "position"} <= set(node.child.dims):
        return node.child
    limit = dataclasses.replace(scans[0], quantity="condition")
    worst = math.inf if node.options["smallest"] else -math.inf
    return Map("where", (Map("less_equal", (limit, CONDITION_LIMIT)), node.child, worst))


@functools.cache
def _merger(node: Reduce, dtype: Any) -> Callable[[Any, Any], Any]:
    return jax.jit(states.reduction(node.how, node.options, dtype).merge)


@functools.cache
def _dtype(node: Reduce, shapes: tuple) -> Any:
    _, run = fused(_ranked(node))
    found = jax.eval_shape(run, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    return found.dtype


def _groups(node: Reduce, local: Local) -> Any:
    """Return the group of each position, -1 for none."""
    assert node.by is not None
    if "sample" in node.child.dims:
        labels = np.frombuffer(node.by.labels, "<i4")
        return labels[: node.child.scans().__next__().samples]
    ids = local.ids(node)
    if node.by.kind == "sample":
        return ids
    labels = np.frombuffer(node.by.labels, "<i4")
    return np.where(ids < 0, -1, labels[np.maximum(ids, 0)]).astype(np.int32)


def _inputs(
    node: Reduce, local: Any, starts: Sequence[Node] | None = None
) -> tuple[list[Value], Any, Any]:
    """Return the values that a reduction starts from, where samples are, and their groups."""
    values = [local.value(start) for start in starts or fused(_ranked(node))[0]]
    valid = None
    if "position" in node.over:
        valid = local.valid(node)
    rows = node.by is not None and node.by.kind in ("labels", "sample")
    return values, valid, _groups(node, local) if rows else None


def _finished(node: Reduce, result_dims, per_part: list[Any], dtype: Any, xp: Any) -> Value:
    """Read the states of all parts, joining them where weights were reduced."""
    reduction = states.reduction(node.how, node.options, dtype)
    kind = node.by.kind if node.by else ""
    parted = kind in ("tensor", "unit")
    if set(RAGGED) & set(node.over) and not parted and len(per_part) > 1:
        merge = _merger(node, dtype)
        per_part = [functools.reduce(merge, per_part)]
    read = [reduction.final(state, xp) for state in per_part]
    wanted = ordered(result_dims)
    order = [result_dims.index(dim) for dim in wanted]
    fields: dict[str, list[Any]] = {
        name: [xp.asarray(one[name]).transpose(order) for one in read] for name in read[0]
    }
    if kind == "tensor":
        fields = {name: [xp.stack(parts)] for name, parts in fields.items()}
        wanted = ("tensor", *wanted)
        places = ordered(wanted)
        axes = [wanted.index(dim) for dim in places]
        fields = {name: [x.transpose(axes) for x in parts] for name, parts in fields.items()}
        wanted = places
    return Value(wanted, fields.pop("value"), fields)


def reduce_now(node: Reduce, local: Any, xp: Any) -> Value:
    """Reduce what stands at one step, or what is left after all of them."""
    values, valid, groups = _inputs(node, local)
    shapes, result_dims = _shapes(node)
    dtype = _dtype(node, tuple((tuple(x.shape), str(x.dtype)) for x in _of_part(values, 0)))
    if node.how == "quantile" and groups is None and (not node.by or node.by.kind == "tensor"):
        return _exact_quantiles(node, shapes, values, valid, xp)
    per_part = [
        _once(node, shape)(_of_part(values, i), np.int32(local.step), valid, groups)
        for i, shape in enumerate(shapes)
    ]
    if xp is np or node.how == "quantile":
        return _finished(node, result_dims, per_part, dtype, xp)
    data, fields = _reader(node, result_dims, dtype)(per_part)
    tensor = {"tensor"} if node.by and node.by.kind == "tensor" else set()
    return Value(ordered({*result_dims, *tensor}), data, fields)


def _exact_quantiles(node, shapes, values, valid, xp) -> Value:
    _, result_dims = _shapes(node)
    q = node.options["q"]
    arranged, masks = [], []
    for i, shape in enumerate(shapes):
        x, _ = shape.arrange(jnp.asarray(fused(node.child)[1](_of_part(values, i))))
        arranged.append(x)
        masks.append(
            jnp.ones(x.shape[-1], bool)
            if valid is None
            else jnp.repeat(jnp.asarray(valid), x.shape[-1] // len(valid))
        )
    if node.by is None and "weight" in node.over:
        arranged, masks = [jnp.concatenate(arranged, -1)], [jnp.concatenate(masks, -1)]
    found = [xp.asarray(_quantiles(x, m, q)) for x, m in zip(arranged, masks, strict=True)]
    if node.by is not None:
        found, result_dims = [xp.stack(found)], ("tensor", *result_dims)
    wanted = ordered(result_dims)
    order = [result_dims.index(dim) for dim in wanted]
    return Value(wanted, [x.transpose(order) for x in found])


_quantiles = functools.partial(jax.jit, static_argnums=2)(states.quantiles)


# --------------------------------------------------------------------------------- along a replay


class Fold:
    """The running state of one root that reduces steps.

    Attributes:
        node: the reduction.
    """

    def __init__(self, node: Reduce, asked: Asked):
        self.node, self._asked = node, asked
        self._keyed = node.by is not None and node.by.kind in ("epoch", "window")
        self._shapes, self._result = _shapes(node)
        self._programs = [_stepper(node, shape) for shape in self._shapes]
        self._starts, _ = fused(_ranked(node))
        self._states: dict[tuple[int, int], Any] = {}
        self._blocks: dict[tuple[int, int], Blocks] = {}
        self._block: int | None = None
        self._dtype: Any = None

    def take(self, local: Local) -> None:
        """Take the values of a step."""
        values, valid, groups = _inputs(self.node, local, self._starts)
        if self._dtype is None:
            shapes = tuple((tuple(x.shape), str(x.dtype)) for x in _of_part(values, 0))
            self._dtype = _dtype(self.node, shapes)
        block = local.step // BLOCK_STEPS
        if block != self._block:
            self.close()
            self._block = block
        for i, (init, step) in enumerate(self._programs):
            arrays, key = _of_part(values, i), (_key(self.node, self._asked, local.step), i)
            if key not in self._states:
                self._states[key] = init(arrays)
            self._states[key] = step(self._states[key], arrays, np.int32(local.step), valid, groups)

    def close(self) -> None:
        """End the present block."""
        for key, state in self._states.items():
            if key not in self._blocks:
                self._blocks[key] = Blocks(_merger(self.node, self._dtype))
            assert self._block is not None
            self._blocks[key].close(self._block, state)
        self._states = {}

    def done(self) -> bool:
        """Whether no later step can change the answer."""
        if self.node.how not in ("first", "any") or self._keyed:
            return False
        found = [np.asarray(x) for x in (*self._states.values(), *self._results().values())]
        several = len(self._shapes) > 1 and not set(RAGGED) & set(self.node.over)
        if several or not found or max(x.size for x in found) > 1:
            return False
        return any(bool(x >= 0) if self.node.how == "first" else bool(x) for x in found)

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        self.close()
        nodes = {key: blocks.nodes for key, blocks in self._blocks.items()}
        return self._dtype, jax.tree.map(np.asarray, nodes)

    def absorb(self, state: Any) -> None:
        """Take what a later stretch of steps has come to elsewhere."""
        dtype, nodes = state
        self._dtype = self._dtype if dtype is None else dtype
        for key, found in nodes.items():
            if key not in self._blocks:
                self._blocks[key] = Blocks(_merger(self.node, self._dtype))
            for node in found:
                self._blocks[key].push(*node)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer; of no steps at all, that of the blank state."""
        self.close()
        found = self._results()
        keys = sorted({key for key, _ in found})
        if not found:
            local = empty()
            values, _, _ = _inputs(self.node, local)
            shapes = tuple((tuple(x.shape), str(x.dtype)) for x in _of_part(values, 0))
            self._dtype = _dtype(self.node, shapes)
            for i, shape in enumerate(self._shapes):
                found[0, i] = _stepper(self.node, shape)[0](_of_part(values, i))
            keys = [0]
        several = [
            _finished(
                self.node, self._result, [found[key, i] for i in range(len(self._shapes))],
                self._dtype, np,
            )
            for key in keys
        ]  # fmt: skip
        if not self._keyed:
            return several[0]
        assert self.node.by is not None
        answer = stacked(self.node.by.dim, several)
        return answer if self.keys() else _none_of(answer, self.node.by.dim)

    def keys(self) -> list[int]:
        """Return the epochs or windows that there are."""
        return sorted({key for key, _ in self._results()})

    def _results(self) -> dict[tuple[int, int], Any]:
        return {key: blocks.result() for key, blocks in self._blocks.items()}


def _key(node: Reduce, asked: Asked, step: int) -> int:
    """Return the epoch or window that a step belongs to; 0 where a root tells none apart."""
    if node.by is None or node.by.kind not in ("epoch", "window"):
        return 0
    if node.by.kind == "window":
        return step // node.by.size
    return int(asked.epochs(np.asarray([step]))[0])


def stacked(dim: str, values: Sequence[Value]) -> Value:
    """Join values along a new dimension."""
    dims = (dim, *values[0].dims)
    wanted = ordered(dims)
    order = [dims.index(d) for d in wanted]

    def join(lists):
        return [np.stack([np.asarray(x) for x in parts]).transpose(order)
                for parts in zip(*lists, strict=True)]  # fmt: skip

    fields = {name: join([value.fields[name] for value in values]) for name in values[0].fields}
    return Value(wanted, join([value.data for value in values]), fields)


class Sampled:
    """The running state of a root over the gradients of samples, by rules on their factors."""

    def __init__(self, node: Reduce, asked: Asked, rule: "Rule"):
        self.node, self._asked, self._rule = node, asked, rule
        self._keyed = node.by is not None
        self._streams: dict[int, Stream] = {}
        self._samples: dict[int, int] = {}
        tensor = asked.observers.tensor
        self._numbers = [tensor[part.path] for part in rule.scan.tensors]

    def take(self, local: Local) -> None:
        """Take the samples of a step."""
        frame = local.frames[self._rule.scan.run]
        key = _key(self.node, self._asked, local.step)
        if key not in self._streams:
            self._streams[key] = Stream(
                (self._rule.reduction,), len(self._asked.observers.tensor), self._numbers
            )
        leaves = [frame.before[i] for i in self._asked.observers.signature.weights]
        self._streams[key].update(local.step, frame.all_parts(), leaves)
        self._samples[key] = self._samples.get(key, 0) + int(frame.valid.sum())

    def done(self) -> bool:
        """No step can be the last."""
        return False

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        return {key: stream.state() for key, stream in self._streams.items()}, self._samples

    def absorb(self, state: Any) -> None:
        """Take what a later stretch of steps has come to elsewhere."""
        streams, samples = state
        for key, cells in streams.items():
            if key not in self._streams:
                self._streams[key] = Stream(
                    (self._rule.reduction,), len(self._asked.observers.tensor), self._numbers
                )
            self._streams[key].absorb(cells)
            self._samples[key] = self._samples.get(key, 0) + samples[key]

    def keys(self) -> list[int]:
        """Return the epochs or windows that there are."""
        return sorted(self._streams)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        if not self._streams:
            return Fold(self.node, self._asked).result(empty)
        values = [self._read(key) for key in self.keys()]
        if not self._keyed:
            return values[0]
        assert self.node.by is not None
        return stacked(self.node.by.dim, values)

    def _read(self, key: int) -> Value:
        (answer,) = self._streams[key].results()
        chosen = [answer[number] for number in self._numbers]
        if self._rule.reduction.__class__ is grads.Histogram:
            return Value(("bin",), [np.sum([np.asarray(x, np.int64) for x in chosen], axis=0)])
        size = self._asked.observers.signature.batch_size
        data, fields = [], {"step": [], "number": []}
        for part, found in zip(self._rule.scan.tensors, chosen, strict=True):
            if isinstance(self._rule.reduction, grads.TopK):
                values, numbers = (self._flat(part, np.asarray(x), 1) for x in found)
                data.append(values)
                fields["step"].append(np.where(numbers < 0, -1, numbers // size))
                fields["number"].append(np.where(numbers < 0, -1, numbers % size))
            else:
                data.append(self._flat(part, self._after(np.asarray(found), key), 0))
        ranked = isinstance(self._rule.reduction, grads.TopK)
        return Value(("rank", "weight") if ranked else ("weight",), data, fields if ranked else {})

    def _after(self, x: np.ndarray, key: int) -> np.ndarray:
        if self.node.how == "mean":
            return x / x.dtype.type(self._samples[key])
        return np.sqrt(x) if self.node.how == "norm" else x

    @staticmethod
    def _flat(part: Part, x: np.ndarray, lead: int) -> np.ndarray:
        flat = x.reshape(*x.shape[:lead], -1)
        return flat if part.indices is None else flat[..., list(part.indices)]


class Rule(NamedTuple):
    """A reduction of per-sample gradients that factors answer."""

    reduction: Any
    scan: Scan


def rule_of(node: Node) -> Rule | None:
    """Return how a root is answered from factors; None where nothing fits."""
    if not isinstance(node, Reduce) or (node.by and node.by.kind not in ("epoch", "window")):
        return None
    found = planning.of_samples(node.child)
    if found is None or found[1].source or found[1].quantity != "sample_grads":
        return None
    of, scan = found
    if set(node.over) == {"step", "position", "weight"} and node.how == "hist":
        whole = all(part.indices is None for part in scan.tensors)
        if of == "magnitude" and whole:
            return Rule(grads.Histogram(node.options["edges"]), scan)
        return None
    if set(node.over) != {"step", "position"}:
        return None
    plain = of in ("value", "magnitude")
    reduction = {
        "sum": lambda: grads.Sum(of),
        "mean": lambda: grads.Sum(of),
        "norm": lambda: grads.Sum("square") if plain else None,
        "max": lambda: grads.Max(of) if plain else None,
        "min": lambda: grads.Min(of) if plain else None,
        "top_k": lambda: (
            grads.TopK(node.options["k"], of, node.options["smallest"]) if plain else None
        ),
    }.get(node.how, lambda: None)()
    return None if reduction is None else Rule(reduction, scan)


class Labelled(grouped.Sums):
    """The running sums of a root over the gradients of samples, by labels."""

    def __init__(self, node: Reduce, asked: Asked):
        self._asked = asked
        of, scan = planning.of_samples(node.child) or ("", None)
        assert scan is not None
        super().__init__(node, of, scan, asked.observers.tensor)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        totals = self.totals()
        if totals is None:
            return Fold(self.node, self._asked).result(empty)
        return Value(("group", "weight"), totals)


class Collected:
    """The values of a root at every step that is asked about."""

    def __init__(self, node: Node, asked: Asked):
        self.node = node
        self._values: list[tuple[int, Value]] = []

    def take(self, local: Local) -> None:
        """Keep the value of a step; what is padding is not a number."""
        value = local.value(self.node)
        if "position" in value.dims and not (valid := local.valid(self.node)).all():
            value = _without_padding(_on_host(value), valid)
        self._values.append((local.step, value))
        if len(self._values) > 1:  # wait for all but the last
            step, value = self._values[-2]
            self._values[-2] = (step, _on_host(value))

    def done(self) -> bool:
        """No step can be the last."""
        return False

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        return [(step, _on_host(value)) for step, value in self._values]

    def absorb(self, state: Any) -> None:
        """Take what later steps have come to elsewhere."""
        self._values += state

    def keys(self) -> list[int]:
        """Return the steps."""
        return [step for step, _ in self._values]

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return all values, with the dimension that was walked."""
        if self._values:
            return stacked(self.node.walked, [_on_host(value) for _, value in self._values])
        blank = _on_host(empty().value(self.node))
        return _none_of(stacked(self.node.walked, [blank]), self.node.walked)


def _none_of(value: Value, dim: str) -> Value:
    """Return the same without any entry of a dimension."""
    none = (*[slice(None)] * value.dims.index(dim), slice(0, 0))
    fields = {name: [x[none] for x in parts] for name, parts in value.fields.items()}
    return Value(value.dims, [x[none] for x in value.data], fields)


def _on_host(value: Value) -> Value:
    return Value(
        value.dims,
        [_flat(np.asarray(x), value.dims) for x in value.data],
        {name: [np.asarray(x) for x in parts] for name, parts in value.fields.items()},
    )


def _without_padding(value: Value, valid: np.ndarray) -> Value:
    axis = value.dims.index("position")

    def blank(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(valid.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, np.nan)

    return value._replace(data=[blank(x) for x in value.data])


class _Everything:
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


class Execution:
    """Questions under way.

    Args:
        runs: by name.
        memory: bytes that an answer may take.
        exact: raise where a replay departs from its run.
        progress: called with the number of steps done since the last call.
    """

    def __init__(
        self,
        runs: Mapping[str, Asked],
        *,
        memory: int = MEMORY,
        exact: bool = True,
        progress: Callable[[int], None] = lambda steps: None,
    ):
        self.runs, self._memory, self._exact, self._progress = runs, memory, exact, progress
        self._known: dict[Node, Value] = {}
        self.grade, self.steps = Grade.BITWISE, 0
        self._keys: dict[Node, list[int]] = {}
        self._places: dict[Node, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    # ---- questions

    def answer(self, questions: Sequence[Node], distribute: Any = None) -> list[Answer]:
        """Answer canonical plans, in one replay where they need nothing of each other."""
        anchors = [
            take.anchor for q in questions for take in _takes(q) if isinstance(take.anchor, Node)
        ]
        if anchors:
            found = self.answer(list(dict.fromkeys(anchors)), distribute)
            steps = {
                anchor: int(answer.value.data[0])
                for anchor, answer in zip(dict.fromkeys(anchors), found, strict=True)
            }
            questions = [_anchored(q, steps) for q in questions]
        asked, questions = questions, [self._cut(q) for q in questions]
        wanted = [root for q in questions for root in planning.roots(q)]
        for stage in planning.stages(wanted):
            self._run(stage, distribute)
        answers = []
        for question, node in zip(asked, questions, strict=True):
            where = self._places[node] if isinstance(node, Take) else None
            answers.append(Answer(self.value(node), question, self.grade, self.steps, where))
        return answers

    def keys(self, node: Node) -> list[int]:
        """Return the epochs or windows of a root."""
        return self._keys.get(node, [])

    def value(self, node: Node) -> Value:
        """Return the value of a node after all replays."""
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: Node) -> Value:
        if isinstance(node, Scan):
            return self._logged(node)
        if isinstance(node, Pick):
            child = self.value(node.child)
            axis = child.dims.index(node.dim)
            pick = lambda x: np.take(x, node.index, axis)  # noqa: E731
            fields = {name: [pick(x) for x in parts] for name, parts in child.fields.items()}
            return Value(node.dims, [pick(x) for x in child.data], fields)
        if isinstance(node, Take):
            return self._picked(node.child, self.value(node.child), self._places[node])
        if isinstance(node, Among):
            return self._only(node)
        if isinstance(node, Rename):
            child = self.value(node.child)
            dims = tuple(node.new if dim == node.old else dim for dim in child.dims)
            order = [dims.index(dim) for dim in node.dims]
            fields = {n: [x.transpose(order) for x in v] for n, v in child.fields.items()}
            return Value(node.dims, [x.transpose(order) for x in child.data], fields)
        if isinstance(node, Lag):
            child = self.value(node.child)
            axis = child.dims.index(node.walked)
            return Value(child.dims, [np.take(x, range(x.shape[axis] - 1), axis)
                                      for x in child.data])  # fmt: skip
        if isinstance(node, Reduce):
            return self._reduced(node)
        assert isinstance(node, Map), node
        values = [self.value(x) if isinstance(x, Node) else x for x in node.arguments]
        arrays = [self._at(x, v, node) for x, v in zip(node.arguments, values, strict=True)]
        count = max((len(v.data) for v in values if isinstance(v, Value)), default=1)
        with np.errstate(all="ignore"):
            data = [
                np.asarray(getattr(jnp, node.function)(
                    *[a[i if len(a) > 1 else 0] if isinstance(a, list) else a for a in arrays]
                ))
                for i in range(count)
            ]  # fmt: skip
        return Value(node.dims, data)

    def _at(self, argument: Any, value: Any, node: Node) -> Any:
        """Return an argument's arrays at the steps of a node, its axes those of the node."""
        if not isinstance(value, Value):
            return value
        data = value.data
        if argument.walked and len(argument.steps) != len(node.steps):
            axis = value.dims.index(argument.walked)
            places = np.searchsorted(argument.steps, node.steps)
            data = [np.take(x, places, axis) for x in data]
        return [_aligned(x, value.dims, node.dims) for x in data]

    def _reduced(self, node: Reduce) -> Value:
        """Reduce something that is there in full; its steps are taken one after the other."""
        walked = node.child.walked
        if not walked:
            return reduce_now(node, _Everything(self.value), np)
        rows = Known(self.value)
        asked = self.runs[next(node.child.scans()).run]
        if walked not in node.over:
            root: Any = Collected(node, asked)
        else:
            root = Fold(node, asked)
        for step in node.child.steps.tolist():
            root.take(rows.at(step, self._ids(node.child, step)))
        self._keys[node] = root.keys() if isinstance(root, Fold) else []
        return root.result(lambda: rows.blank(self._ids(node.child, 0)))

    def _ids(self, node: Node, step: int) -> np.ndarray | None:
        if "position" not in node.dims:
            return None
        return self.runs[next(node.scans()).run].observers.log.ids(step, step + 1)[0]

    def _only(self, node: Among) -> Value:
        value = self.value(node.child)
        axis = value.dims.index("step")
        log = self.runs[next(node.scans()).run].observers.log
        rows = [log.ids(step, step + 1)[0] for step in node.steps.tolist()]
        found = [
            _on_host(
                among(
                    node,
                    Value(_without_walk(value.dims), [np.take(x, i, axis) for x in value.data]),
                    ids,
                )
            )
            for i, ids in enumerate(rows)
        ]
        return stacked("step", found) if found else value

    def _logged(self, scan: Scan) -> Value:
        asked = self.runs[scan.run]
        steps = scan.steps
        if scan.quantity == "column":
            return Value(("step",), [asked.columns(scan.name)[steps]])
        if not len(steps):
            blank = np.zeros((0, asked.catalogue.batch), np.int32)
            return Value(("step", "position"), [blank])
        first = int(steps[0])
        ids = asked.observers.log.ids(first, int(steps[-1]) + 1)
        return Value(("step", "position"), [ids[steps - first]])

    # ---- anchors

    def _cut(self, node: Node) -> Node:
        """Cut what is taken from to the steps that matter, and keep which occurrences those are."""
        node = node.rebuilt(self._cut)
        if not isinstance(node, Take):
            return node
        child, where = self._taken(node)
        node = dataclasses.replace(node, child=child)
        self._places[node] = where
        return node

    def _taken(self, take: Take) -> tuple[Node, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return what is taken from, cut to the steps that matter, and the occurrences."""
        child, anchor = take.of or take.child, take.anchor
        steps = child.steps
        if anchor < 0:
            chosen = steps[:0]
        elif take.before:
            chosen = steps[steps <= anchor] if take.inclusive else steps[steps < anchor]
        else:
            chosen = steps[steps >= anchor] if take.inclusive else steps[steps > anchor]
        log = self.runs[next(child.scans()).run].observers.log
        count = math.inf if take.count is None else take.count
        positions = "position" in child.dims
        found: list[tuple[int, int, int]] = []
        for step in chosen[::-1].tolist() if take.last else chosen.tolist():
            if len(found) >= count:
                break
            if not positions:
                found.append((step, -1, -1))
                continue
            ids = log.ids(step, step + 1)[0]
            places = np.flatnonzero(ids >= 0).tolist()
            for place in places[::-1] if take.last else places:
                if len(found) < count:
                    found.append((step, place, int(ids[place])))
        found.sort()
        columns = np.asarray(found, np.int64).reshape(-1, 3)
        where = tuple(columns.T)
        steps = np.unique(columns[:, 0])
        missing = np.setdiff1d(steps, take.child.steps)
        if len(missing):
            raise QueryError(
                f"there is nothing at step {missing[0]} to put beside what was taken",
                why="a difference lacks the first step, and a selection what it leaves out",
                fix="take from later steps, or join a quantity of all steps",
            )
        return restrict(take.child, "step", steps), where  # type: ignore[return-value]

    def _picked(self, node: Node, value: Value, where: Any) -> Value:
        steps, positions, _ = where
        rows = np.searchsorted(node.steps, steps)
        axis = value.dims.index("step")
        dims = ["occurrence" if dim == "step" else dim for dim in value.dims if dim != "position"]

        def pick(x):
            x = np.take(x, rows, axis)
            if "position" not in value.dims:
                return x
            place = value.dims.index("position")
            x = np.moveaxis(x, (axis, place), (0, 1))
            return x[np.arange(len(rows)), positions]

        if "position" in value.dims:
            rest = [dim for dim in dims if dim != "occurrence"]
            dims = ["occurrence", *rest]
        fields = {name: [pick(x) for x in parts] for name, parts in value.fields.items()}
        return Value(tuple(dims), [pick(x) for x in value.data], fields)

    # ---- replays

    def _root(self, node: Node) -> Any:
        asked = self.runs[next(node.scans()).run]
        if isinstance(node, Reduce) and not node.walked:
            if grouped.fits(planning.of_samples(node.child), node):
                return Labelled(node, asked)
            rule = rule_of(node)
            return Fold(node, asked) if rule is None else Sampled(node, asked, rule)
        return Collected(node, asked)

    def _check(self, node: Node) -> None:
        """Refuse an answer that would not fit, before anything is replayed."""
        sizes = 1
        catalogue = self.runs[next(node.scans()).run].catalogue
        for dim in node.dims:
            if dim in ("step", "state"):
                sizes *= len(node.steps)
            elif dim == "position":
                sizes *= catalogue.batch
            elif dim == "sample":
                sizes *= max(scan.samples for scan in node.scans())
            elif dim in RAGGED:
                sizes *= max(sum(part.size for part in node.parts), 1)
        if isinstance(node, Reduce):
            sizes *= max(node.options.get("k", 1), len(node.options.get("edges", ())) + 1)
            if node.by is not None and node.by.kind in ("labels", "sample"):
                sizes *= node.by.count
            if node.how == "quantile" and not node.walked:
                sizes *= states.BUCKETS
        if 4 * sizes > self._memory:
            raise QueryError(
                f"the answer would take {4 * sizes / 2**20:,.0f} MiB: {', '.join(node.dims)}",
                why=f"the limit is {self._memory / 2**20:,.0f} MiB",
                fix="reduce it over a dimension, choose fewer steps or weights, or pass memory=",
            )
        widest = max((part.size for part in planning.tensors_of(node)), default=0)
        if isinstance(node, Reduce) and node.how == "top_k":
            reduced = math.prod(
                [catalogue.batch if "position" in node.over else 1]
                + [sum(p.size for p in node.child.parts) if "weight" in node.over else 1]
            )
            if reduced >= 2**31:
                raise QueryError(
                    f"a ranking of {reduced:,} values in one step",
                    why="places are counted in 32 bits",
                    fix="choose tensors",
                )
        factored = isinstance(self._root(node), Sampled | Labelled)
        if _multiplied_out(node) and not factored and 4 * widest * catalogue.batch > self._memory:
            raise QueryError(
                f"{4 * widest * catalogue.batch / 2**20:,.0f} MiB of one tensor's gradients would "
                "be multiplied out at once",
                why="there is no rule that answers this from their factors",
                fix="choose weights or a smaller tensor, or pass memory=",
            )

    def _run(self, stage: Sequence[Node], distribute: Any = None) -> None:
        stage = [node for node in stage if node not in self._known]
        for node in stage:
            for constant in planning.constants(node):
                self.value(constant)
            for scan in node.scans():
                if scan.quantity == "column":
                    self.value(scan)
            self._check(node)
        together: dict[tuple[str, ...], list[Node]] = {}
        for node in stage:
            together.setdefault(planning.runs_of(node), []).append(node)
        for names, nodes in together.items():
            roots = {node: self._root(node) for node in nodes}
            if distribute is None or not distribute(self, names, roots):
                self.walk(names, roots)
            for node, root in roots.items():
                self._known[node] = root.result(lambda n=node: self._blank(n))
                self._keys[node] = root.keys()

    def walk(
        self, names: tuple[str, ...], roots: Mapping[Node, Any], within: range | None = None
    ) -> None:
        """Replay, and let every root take what it asks about.

        Args:
            names: of the runs, walked side by side.
            roots: node -> what takes its steps.
            within: only these steps or states.
        """
        passed, reached = planning.union(list(roots))
        if within is not None:
            passed, reached = (
                x[(x >= within.start) & (x < within.stop)] for x in (passed, reached)
            )
        wanted = {}
        for node in roots:
            below = planning.below(node)
            looked = frozenset(planning.earlier(below).tolist())
            wanted[node] = (frozenset(below.steps.tolist()), looked, below.walked)
        lags: dict[Node, dict] = {node: {} for node in roots}
        walks = [self._frames(name, passed, reached) for name in names]
        early = all(map(planning.stops_early, roots))
        with contextlib.ExitStack() as stack:
            for walk in walks:
                stack.enter_context(contextlib.closing(walk))
            for frames in zip(*walks, strict=True):
                step, has_step = frames[0].step, frames[0].replayed is not None
                here = dict(zip(names, frames, strict=True))
                for node, root in roots.items():
                    steps, looked, walked = wanted[node]
                    if step not in looked or (walked == "step" and not has_step):
                        continue
                    local = Local(here, step, self._known, lags[node])
                    if step in steps:
                        root.take(local)
                    local.remember(planning.below(node))
                if early and all(root.done() for root in roots.values()):
                    break

    def _frames(self, name: str, steps: np.ndarray, reached: np.ndarray) -> Generator[Frame]:
        """Yield a frame for every step and state that is asked about, ascending."""
        asked = self.runs[name]
        either = set(steps.tolist()) | set(reached.tolist())
        only = set(reached.tolist())
        for span in planning.spans(asked.catalogue.checkpoints, steps, reached):
            if not span.steps:
                leaves = asked.replayer.stored(span.start)
                yield Frame(asked.observers, span.start, leaves, None)
                continue
            last = None
            walk = asked.replayer.steps(span.start, span.stop, exact=self._exact, late=True)
            try:
                for replayed in walk:
                    step, last = replayed.executed.start, replayed
                    self.steps += 1
                    if step in either:
                        yield Frame(asked.observers, step, replayed.executed.before, replayed)
                    self._progress(1)
            finally:  # also where the rest is not asked for any more
                if last is not None and last.deviation:
                    self.grade = self.grade & Grade.NUMERIC
                elif last is None or last.closed != span.stop:
                    self.grade = self.grade & Grade.UNAUDITED
            if span.stop in only:
                assert last is not None
                yield Frame(asked.observers, span.stop, last.executed.after, None)

    def _blank(self, node: Node) -> Local:
        """Return values of the forms that a step has, for questions about no step at all."""
        here, counted = {}, (self.steps, self.grade)
        for name in planning.runs_of(node):
            walk = self._frames(name, np.asarray([0]), np.zeros(0, np.int64))
            with contextlib.closing(walk):
                here[name] = next(walk)
        self.steps, self.grade = counted  # the answer takes nothing from that step
        lags: dict[Node, Any] = {}
        local = Local(here, 0, self._known, lags)
        stack = [node]
        while stack:
            this = stack.pop()
            if isinstance(this, Lag):
                lags[this] = (0, local.value(this.child))
            stack += this.children
        return local


def _multiplied_out(node: Node) -> bool:
    """Whether the gradients of samples are needed themselves, and not what factors answer."""
    if isinstance(node, Reduce) and planning.of_samples(node.child) is not None:
        if node.over == ("weight",) and node.how in ("norm", "sum"):
            return False
        if node.over == ("position",) and node.how == "sum":
            return False
    if isinstance(node, Scan):
        return node.quantity in ("sample_grads", "sample_updates")
    return any(map(_multiplied_out, node.children))


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


def _takes(node: Node) -> Iterator[Take]:
    if isinstance(node, Take):
        yield node
    for child in node.children:
        yield from _takes(child)


def _anchored(node: Node, steps: Mapping[Node, int]) -> Node:
    node = node.rebuilt(lambda child: _anchored(child, steps))
    if isinstance(node, Take) and isinstance(node.anchor, Node):
        return dataclasses.replace(node, anchor=steps[node.anchor])
    return node
