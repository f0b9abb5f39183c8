"""Reductions within a step or of what was collected: their layout, and their executables."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay.errors import QueryError
from replay.frames import CONDITION_LIMIT
from replay.query import states
from replay.query.nodes import RAGGED, Map, Node, Reduce, ordered
from replay.query.states import Values
from replay.values import Formula, Given, Value, fused, of_part, without_walk


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


@functools.lru_cache(maxsize=4096)
def layouts(node: Reduce) -> tuple[list[Shape], tuple[str, ...]]:
    """Return the layout of each part of what a reduction reduces, and the dimensions of results."""
    child = node.child
    dims = without_walk(child.dims)
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


# Reductions whose answer may be known before the last step.
EARLY = ("first", "any")
# Tensors that share an executable, where that cannot touch a bit of their answer.
SHARED = 16


class Kind(NamedTuple):
    """What of a reduction decides its executables: not whose values it reduces, at which steps.

    Attributes:
        how: its name.
        settings: of its own, as pairs.
        by: the kind of its groups, or nothing.
        groups: how many groups of samples there are.
        ragged: whether it reduces weights or units.
    """

    how: str
    settings: tuple[tuple[str, Any], ...]
    by: str
    groups: int
    ragged: bool

    def of(self, dtype: Any) -> states.State:
        """Return the reduction of values of a dtype."""
        return states.reduction(self.how, dict(self.settings), dtype)


def kind_of(node: Reduce) -> Kind:
    """Return the kind of a reduction."""
    by, groups = (node.by.kind, node.by.count) if node.by else ("", 0)
    return Kind(node.how, node.settings, by, groups, bool(set(RAGGED) & set(node.over)))


def stepper(
    node: Reduce, shape: Shape, *, donate: bool = True
) -> tuple[Callable, Callable, Callable]:
    """Return how a state begins and grows.

    `init(arrays) -> state`, `step(state, arrays, step, valid, groups) -> state`, and the same for a
    few steps one after the other, `many(state, [arrays, ...], steps) -> state`. These take the
    memory of the state, unless `donate` is false.
    """
    return _stepper(kind_of(node), fused(ranked(node))[1], shape, donate)


@functools.lru_cache(maxsize=4096)
def _stepper(
    kind: Kind, formula: Formula | Given, shape: Shape, donate: bool
) -> tuple[Callable, Callable, Callable]:
    def arranged(arrays):
        x = formula(arrays)
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
        reduction = kind.of(x.dtype)
        kept = x.shape[1:-1] if shape.rows else x.shape[:-1]
        state = reduction.init(kept, x.dtype)
        if not shape.rows:
            return state
        return jax.tree.map(lambda s: jnp.repeat(s[None], kind.groups, 0), state)

    def step(state, arrays, step, valid, groups):
        x, numbers = arranged(arrays)
        reduction = kind.of(x.dtype)
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

    def many(state, rows, steps):
        for i, arrays in enumerate(rows):
            state = step(state, arrays, steps[i], None, None)
        return state

    # A blank state is committed to a device, as what a step returns: `jit` compiles that once.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    taken = (0,) if donate else ()
    begin = jax.jit(init, out_shardings=here)
    return begin, jax.jit(step, donate_argnums=taken), jax.jit(many, donate_argnums=taken)


@functools.lru_cache(maxsize=4096)
def _once(kind: Kind, formula: Formula | Given, shapes: tuple[Shape, ...]) -> Callable[..., Any]:
    """Return `states(arrays of each part, step, valid, groups)` that begin and end with a step."""
    programs = [_stepper(kind, formula, shape, True) for shape in shapes]

    def states(parts, *more):
        each = zip(programs, parts, strict=True)
        return [step(init(arrays), arrays, *more) for (init, step, _), arrays in each]

    return jax.jit(states)


@functools.lru_cache(maxsize=4096)
def _reader(kind: Kind, result_dims: tuple[str, ...], dtype: Any) -> Callable[..., Any]:
    """Return what turns the states of all parts into arrays, on the device."""

    def read(per_part):
        found = _finished(kind, result_dims, per_part, dtype, jnp)
        return found.data, found.fields

    return jax.jit(read)


@functools.lru_cache(maxsize=4096)
def _read_once(
    kind: Kind,
    formula: Formula | Given,
    shapes: tuple[Shape, ...],
    result_dims: tuple[str, ...],
    dtype: Any,
) -> Callable[..., Any]:
    """Return what `_once` and then `_reader` do, by one executable, with the bits of two.

    The barrier hides from the reading what the compiler knows of the states: it would multiply by
    the reciprocal of a count that is a constant.
    """
    once, read = _once(kind, formula, shapes), _reader(kind, result_dims, dtype)
    return jax.jit(lambda *arguments: read(jax.lax.optimization_barrier(once(*arguments))))


def ranked(node: Reduce) -> Node:
    """Leave out of rankings the shares of updates in which samples cancel."""
    scans = [s for s in node.child.scans() if s.quantity == "sample_updates" and not s.source]
    if node.how != "top_k" or not scans or not {"step", "position"} <= set(node.child.dims):
        return node.child
    limit = dataclasses.replace(scans[0], quantity="condition")
    worst = math.inf if node.options["smallest"] else -math.inf
    return Map("where", (Map("less_equal", (limit, CONDITION_LIMIT)), node.child, worst))


def blank_state(node: Reduce, dtype: str) -> Any:
    """Return shapes and dtypes of the state of a reduction that keeps no dimension."""
    return _blank(kind_of(node), dtype)


@functools.cache
def _blank(kind: Kind, dtype: str) -> Any:
    return jax.eval_shape(lambda: kind.of(jnp.dtype(dtype)).init((), jnp.dtype(dtype)))


def merger(node: Reduce, dtype: str) -> Callable[[list[Any], list[Any]], list[Any]]:
    """Return what joins the leaves of the state of earlier steps with those of later ones."""
    return _merger(kind_of(node), dtype)


@functools.lru_cache(maxsize=4096)
def _merger(kind: Kind, dtype: str) -> Callable[[list[Any], list[Any]], list[Any]]:
    tree = jax.tree.structure(_blank(kind, dtype))
    merge = kind.of(jnp.dtype(dtype)).merge

    def join(first, second):
        both = [jax.tree.unflatten(tree, leaves) for leaves in (first, second)]
        return jax.tree.leaves(merge(*both))

    return jax.jit(join)


def dtype_of(node: Reduce, shapes: tuple) -> Any:
    """Return the dtype of what is reduced, for starting values of these shapes and dtypes."""
    return _dtype_of(fused(ranked(node))[1], shapes)


@functools.lru_cache(maxsize=4096)
def _dtype_of(formula: Formula | Given, shapes: tuple) -> Any:
    return jax.eval_shape(formula, [jax.ShapeDtypeStruct(s, d) for s, d in shapes]).dtype


def _groups(node: Reduce, local: Any) -> Any:
    """Return the group of each position, -1 for none."""
    assert node.by is not None
    if "sample" in node.child.dims:
        labels = np.frombuffer(node.by.labels, "<i4")
        return labels[: node.child.scans().__next__().samples]
    ids = local.ids(node)
    group = np.maximum(ids, 0)
    if node.by.kind == "labels":
        group = np.frombuffer(node.by.labels, "<i4")[group]
    return np.where(local.valid(node), group, -1).astype(np.int32)


def inputs(
    node: Reduce, local: Any, starts: Sequence[Node] | None = None
) -> tuple[list[Value], Any, Any]:
    """Return the values that a reduction starts from, where samples are, and their groups."""
    values = [local.value(start) for start in starts or fused(ranked(node))[0]]
    valid = None
    if "position" in node.over:
        valid = local.valid(node)
    rows = node.by is not None and node.by.kind in ("labels", "sample")
    return values, valid, _groups(node, local) if rows else None


def finished(node: Reduce, result_dims, per_part: list[Any], dtype: Any, xp: Any) -> Value:
    """Read the states of all parts, joining them where weights were reduced."""
    return _finished(kind_of(node), result_dims, per_part, dtype, xp)


def _finished(kind: Kind, result_dims, per_part: list[Any], dtype: Any, xp: Any) -> Value:
    if kind.ragged and kind.by not in ("tensor", "unit") and len(per_part) > 1:
        merge = _merger(kind, str(dtype))
        leaves = functools.reduce(merge, map(jax.tree.leaves, per_part))
        per_part = [jax.tree.unflatten(jax.tree.structure(per_part[0]), leaves)]
    reduction = kind.of(dtype)
    read = [reduction.final(state, xp) for state in per_part]
    wanted = ordered(result_dims)
    order = [result_dims.index(dim) for dim in wanted]
    fields: dict[str, list[Any]] = {
        name: [xp.asarray(one[name]).transpose(order) for one in read] for name in read[0]
    }
    if kind.by == "tensor":
        fields = {name: [xp.stack(parts)] for name, parts in fields.items()}
        wanted = ("tensor", *wanted)
        places = ordered(wanted)
        axes = [wanted.index(dim) for dim in places]
        fields = {name: [x.transpose(axes) for x in parts] for name, parts in fields.items()}
        wanted = places
    return Value(wanted, fields.pop("value"), fields)


def reduce_now(node: Reduce, local: Any, xp: Any) -> Value:
    """Reduce what stands at one step, or what is left after all of them."""
    values, valid, groups = inputs(node, local)
    shapes, result_dims = layouts(node)
    if node.how == "quantile":
        return _exact_quantiles(node, shapes, values, valid, groups, xp)
    dtype, size = _within(node, tuple((x.shape, x.dtype) for x in of_part(values, 0)))
    kind, formula, dims = kind_of(node), fused(ranked(node))[1], _dims_within(node)
    if size > 1 and xp is not np and len(shapes) <= size:
        parts = [of_part(values, i) for i in range(len(shapes))]
        run = _read_once(kind, formula, tuple(shapes), result_dims, dtype)
        return Value(dims, *run(parts, np.int32(local.step), valid, groups))
    per_part = []
    for first in range(0, len(shapes), size):
        some = shapes[first : first + size]
        parts = [of_part(values, first + i) for i in range(len(some))]
        run = _once(kind, formula, tuple(some))
        per_part += run(parts, np.int32(local.step), valid, groups)
    if xp is np:
        return finished(node, result_dims, per_part, dtype, xp)
    return Value(dims, *_reader(kind, result_dims, dtype)(per_part))


@functools.lru_cache(maxsize=4096)
def _within(node: Reduce, forms: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[Any, int]:
    """Return the dtype of what a step reduces, and how many tensors may share an executable.

    Args:
        node: the reduction.
        forms: shape and dtype of each starting value, of the first tensor.
    """
    dtype = dtype_of(node, tuple((tuple(shape), str(of)) for shape, of in forms))
    wide = all(of.itemsize >= 4 or of.kind == "b" for _, of in forms)
    fixed = wide and kind_of(node).of(dtype).exact and fused(ranked(node))[1].fixed
    return dtype, SHARED if fixed else 1


@functools.lru_cache(maxsize=4096)
def _dims_within(node: Reduce) -> tuple[str, ...]:
    tensor = {"tensor"} if node.by and node.by.kind == "tensor" else set()
    return ordered({*layouts(node)[1], *tensor})


def _exact_quantiles(node, shapes, values, valid, groups, xp) -> Value:
    _, result_dims = layouts(node)
    formula, q = fused(node.child)[1], node.options["q"]
    # Samples stand first in what is reduced: a mask of them is repeated along all the rest.
    first = [dim for dim in shapes[0].over if dim in ("position", "sample")]
    rest = [dim for dim in shapes[0].over if dim not in first]
    shapes = [shape._replace(rows="", over=(*first, *rest)) for shape in shapes]
    arranged = [_arranged(formula, shape)(of_part(values, i)) for i, shape in enumerate(shapes)]
    apart = node.by is not None and node.by.kind in ("tensor", "unit")
    together = kind_of(node).ragged and not apart
    several = [arranged] if together else [[x] for x in arranged]
    if groups is None:
        found = [xp.asarray(_quantiles(parts, valid, q)) for parts in several]
    else:
        assert node.by is not None
        there = np.full(min(len(groups), node.by.count), node.by.count, np.int32)
        present = np.unique(groups[groups >= 0])
        there[: len(present)] = present
        found = [xp.asarray(_grouped(parts, groups, there, q, node.by.count)) for parts in several]
    if node.by is not None and node.by.kind == "tensor":
        found, result_dims = [xp.stack(found)], ("tensor", *result_dims)
    wanted = ordered(result_dims)
    order = [result_dims.index(dim) for dim in wanted]
    return Value(wanted, [x.transpose(order) for x in found])


@functools.lru_cache(maxsize=4096)
def _arranged(formula: Formula | Given, shape: Shape) -> Callable[..., Any]:
    return jax.jit(lambda arrays: shape.arrange(jnp.asarray(formula(arrays)))[0])


@functools.partial(jax.jit, static_argnums=2)
def _quantiles(parts, valid, q):
    """Return the quantiles of an array that comes in parts along the last axis."""

    def mask(x):
        n = x.shape[-1]
        return jnp.ones(n, bool) if valid is None else jnp.repeat(valid, n // len(valid))

    masks = jnp.concatenate([mask(x) for x in parts])
    return states.quantiles(jnp.concatenate(parts, -1), masks, q)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _grouped(parts, groups, there, q, count):
    """Return `_quantiles` of each group; not numbers of groups that are not among those `there`.

    Args:
        parts: as there.
        groups: of each position, -1 for none.
        there: groups that have a position; `count` for none.
        q: the shares.
        count: how many groups there are.
    """
    found = jax.lax.map(lambda group: _quantiles(parts, groups == group, q), there)
    blank = jnp.full((count, *found.shape[1:]), jnp.nan, found.dtype)
    return blank.at[there].set(found, mode="drop")
