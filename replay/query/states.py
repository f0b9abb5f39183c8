"""Reductions as mergeable states: init, step, merge, final.

A state takes the values of one step after the other, `x[*kept, n]` with what is reduced on the last
axis, and joins with the state of later steps. Sums of floating-point numbers depend on their order,
so that order is fixed elsewhere (`Blocks`). Counts are pairs of `uint32`, low and high, so that
they neither round nor overflow.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Buckets of the quantile sketch: the bfloat16 numbers in their order.
BUCKETS = 2**16


class Values(NamedTuple):
    """What a step gives to a reduction.

    Attributes:
        x: `[*kept, n]`.
        valid: `bool[n]`: whether there is a value, padding left out.
        numbers: `int32[n]`, or as `x`: where each stands within the step.
        step: `int32`.
    """

    x: Any
    valid: Any
    numbers: Any
    step: Any

    @property
    def mask(self) -> Any:
        """`valid`, with axes for all of `x`."""
        return _spread(self.valid, self.x)


def _spread(row: Any, x: Any) -> Any:
    """Give `[n]` axes of length one for what is kept in `[*kept, n]`."""
    return row if row.ndim == x.ndim else row.reshape((1,) * (x.ndim - 1) + row.shape)


class State(NamedTuple):
    """A reduction: how its running state is made, grows, joins and is read.

    Attributes:
        init: `init(kept, dtype) -> state`.
        step: `step(state, values) -> state`.
        merge: `merge(state of earlier steps, state of later ones) -> state`.
        final: `final(state, numpy or jax.numpy) -> dict of fields`, `value` among them.
        exact: whether the order of folds and merges has no say.
    """

    init: Callable[[tuple[int, ...], Any], Any]
    step: Callable[[Any, Values], Any]
    merge: Callable[[Any, Any], Any]
    final: Callable[[Any, Any], dict[str, Any]]
    exact: bool = False


def wide(dtype: Any) -> Any:
    """Return the dtype of sums: at least float32 for numbers that are not whole."""
    if is_count(dtype) or jnp.issubdtype(dtype, jnp.integer):
        return jnp.dtype(dtype)
    return real(dtype)


def real(dtype: Any) -> Any:
    """Return the dtype of means: that of the numbers, but at least float32."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.promote_types(dtype, jnp.float32)
    return jnp.dtype(jnp.float32)


def is_count(dtype: Any) -> bool:
    """Whether a sum counts how often something holds."""
    return jnp.dtype(dtype).kind == "b"


def reduction(how: str, settings: dict[str, Any], dtype: Any) -> State:
    """Return a reduction of values of a dtype by its name."""
    if how == "sum" and is_count(dtype):
        return _counting(lambda x: x)
    if how == "mean" and is_count(dtype):
        return _SHARE
    if how == "count":
        return _counting(lambda x: ~jnp.isnan(x.astype(jnp.float32)))
    return {
        "sum": lambda: _SUM,
        "norm": lambda: _NORM,
        "mean": lambda: _MEAN,
        "var": lambda: _var(settings["ddof"]),
        "min": lambda: _extreme(-1),
        "max": lambda: _extreme(1),
        "any": lambda: _ANY,
        "all": lambda: _ALL,
        "first": lambda: _FIRST,
        "last": lambda: _LAST,
        "top_k": lambda: _top_k(settings["k"], settings["smallest"]),
        "hist": lambda: _hist(settings["edges"]),
        "quantile": lambda: _sketch(settings["q"]),
    }[how]()


# -------------------------------------------------------------------------------------- counting

# XLA on CPU goes through truth values one by one where it reduces a row, and through many at once
# where it adds up rows of a table: half the time for counts, a sixth for `any`.
LANES = 1024
_ROWS = 2**16 - 1  # which `uint16` counts


def _table(truth: Any) -> tuple[Any, Any]:
    """Cut the last axis, `[*kept, n]`, into rows `[*kept, rows, lanes]` and the rest, `[*kept, m]`.

    There are no rows where it is short.
    """
    n = truth.shape[-1]
    lanes = LANES * -(-n // (LANES * _ROWS))
    rows = n // max(lanes, 1)
    if rows < 2:
        return None, truth
    table = truth[..., : rows * lanes].reshape(*truth.shape[:-1], rows, lanes)
    return table, truth[..., rows * lanes :]


def _count_true(truth: Any) -> Any:
    """Return how many of the last axis are true, `uint32[*kept]`."""
    table, rest = _table(truth)
    count = rest.sum(-1, dtype=jnp.uint32)
    if table is None:
        return count
    return table.sum(-2, dtype=jnp.uint16).sum(-1, dtype=jnp.uint32) + count


def _any_true(truth: Any) -> Any:
    """Return whether any of the last axis is true, `bool[*kept]`."""
    table, rest = _table(truth)
    if table is None:
        return rest.any(-1)
    return (table.astype(jnp.uint8).max(-2).max(-1) > 0) | rest.any(-1)


def _blank_count(*shape: int) -> Any:
    return jnp.zeros((*shape, 2), jnp.uint32)


def _more(count: Any, extra: Any) -> Any:
    """Add `uint32` numbers to counts."""
    low = count[..., 0] + extra
    return jnp.stack([low, count[..., 1] + (low < extra).astype(jnp.uint32)], axis=-1)


def _join_counts(first: Any, second: Any) -> Any:
    low = first[..., 0] + second[..., 0]
    carry = (low < second[..., 0]).astype(jnp.uint32)
    return jnp.stack([low, first[..., 1] + second[..., 1] + carry], axis=-1)


def _read_count(count: Any, xp: Any) -> Any:
    """Return counts as `int64`; on the device, where a step has fewer than 2**31, as `int32`."""
    if xp is np:
        count = np.asarray(count).astype(np.int64)
        return count[..., 0] + (count[..., 1] << 32)
    return count[..., 0].astype(jnp.int32)


def _total(values: Values) -> Any:
    return values.valid.sum(dtype=jnp.uint32)


def _number(count: Any, xp: Any, like: Any) -> Any:
    """Return counts, one for each group where there are groups, to combine with numbers."""
    number = _read_count(count, xp).astype(like.dtype)
    return number.reshape(number.shape + (1,) * (like.ndim - number.ndim))


def _counting(holds: Callable[[Any], Any]) -> State:
    def step(state, values):
        return _more(state, _count_true(holds(values.x) & values.mask))

    return State(
        lambda kept, dtype: _blank_count(*kept),
        step,
        _join_counts,
        lambda state, xp: {"value": _read_count(state, xp)},
        exact=True,
    )


# ------------------------------------------------------------------------------------------ sums


def _kept(values: Values, blank: Any) -> Any:
    return jnp.where(values.mask, values.x, jnp.asarray(blank, values.x.dtype))


def _zeros(kept: tuple[int, ...], dtype: Any) -> Any:
    return jnp.zeros(kept, wide(dtype))


def _add(state: Any, values: Values) -> Any:
    return state + _kept(values, 0).astype(state.dtype).sum(-1)


_SUM = State(_zeros, _add, jnp.add, lambda state, xp: {"value": xp.asarray(state)})

_NORM = State(
    lambda kept, dtype: jnp.zeros(kept, real(dtype)),
    lambda state, values: state + jnp.square(_kept(values, 0).astype(state.dtype)).sum(-1),
    jnp.add,
    lambda state, xp: {"value": xp.sqrt(xp.asarray(state))},
)


def _real(kept: tuple[int, ...], dtype: Any) -> Any:
    return jnp.zeros(kept, real(dtype))


def _final_mean(state: Any, xp: Any) -> dict[str, Any]:
    total, count = state
    total = xp.asarray(total)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"value": total / _number(count, xp, total)}


def _share(state: Any, xp: Any) -> dict[str, Any]:
    total = _read_count(state[0], xp).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"value": total / _number(state[1], xp, total)}


# Of truth values: whole numbers are added faster, and do not stop at 2**24.
_SHARE = State(
    lambda kept, dtype: (_blank_count(*kept), _blank_count()),
    lambda state, values: (
        _more(state[0], _count_true(values.x & values.mask)),
        _more(state[1], _total(values)),
    ),
    lambda first, second: tuple(map(_join_counts, first, second)),
    _share,
    exact=True,
)

_MEAN = State(
    lambda kept, dtype: (_real(kept, dtype), _blank_count()),
    lambda state, values: (_add(state[0], values), _more(state[1], _total(values))),
    lambda first, second: (first[0] + second[0], _join_counts(first[1], second[1])),
    _final_mean,
)


def _var(ddof: int) -> State:
    """Chan, Golub and LeVeque (1979): counts, means and sums of squared deviations."""

    def join(first, second):
        (n, mean, m2), (more, other, other_m2) = first, second
        a, b = (_number(x, jnp, mean) for x in (n, more))
        share = jnp.where(a + b > 0, b / jnp.maximum(a + b, 1), 0)
        gap = other - mean
        return (
            _join_counts(n, more),
            jnp.where(a > 0, mean + gap * share, other),
            m2 + other_m2 + jnp.where((a > 0) & (b > 0), jnp.square(gap) * a * share, 0),
        )

    def step(state, values):
        count = values.valid.sum(dtype=jnp.uint32)
        x = _kept(values, 0).astype(state[1].dtype)
        mean = x.sum(-1) / jnp.maximum(count, 1).astype(x.dtype)
        m2 = jnp.where(values.mask, jnp.square(x - mean[..., None]), 0).sum(-1)
        return join(state, (_more(_blank_count(), count), mean, m2))

    def final(state, xp):
        count, _, m2 = state
        m2 = xp.asarray(m2)
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"value": m2 / (_number(count, xp, m2) - ddof)}

    def init(kept, dtype):
        return _blank_count(), _real(kept, dtype), _real(kept, dtype)

    return State(init, step, join, final)


# -------------------------------------------------------------------------------------- extremes


def _lowest(dtype: Any, sign: int) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -sign * math.inf
    if is_count(dtype):
        return sign < 0
    return jnp.iinfo(dtype).min if sign > 0 else jnp.iinfo(dtype).max


def _extreme(sign: int) -> State:
    choose = jnp.maximum if sign > 0 else jnp.minimum

    def step(state, values):
        x = _kept(values, _lowest(state.dtype, sign))
        found = x.max(-1) if sign > 0 else x.min(-1)
        if jnp.issubdtype(x.dtype, jnp.floating):  # XLA's own may lose a NaN among others on CPU
            found = jnp.where(_any_true(jnp.isnan(x)), jnp.nan, found).astype(x.dtype)
        return choose(state, found)

    return State(
        lambda kept, dtype: jnp.full(kept, _lowest(dtype, sign), dtype),
        step,
        choose,
        lambda state, xp: {"value": xp.asarray(state)},
        exact=True,
    )


def _holds(values: Values) -> Any:
    return _any_true(values.x.astype(bool) & values.mask)


_ANY = State(
    lambda kept, dtype: jnp.zeros(kept, bool),
    lambda state, values: state | _holds(values),
    jnp.logical_or,
    lambda state, xp: {"value": xp.asarray(state)},
    exact=True,
)

_ALL = State(
    lambda kept, dtype: jnp.ones(kept, bool),
    lambda state, values: state & ~_any_true(~values.x.astype(bool) & values.mask),
    jnp.logical_and,
    lambda state, xp: {"value": xp.asarray(state)},
    exact=True,
)


_FIRST = State(
    lambda kept, dtype: jnp.full(kept, -1, jnp.int32),
    lambda state, values: jnp.where((state < 0) & _holds(values), values.step, state),
    lambda first, second: jnp.where(first < 0, second, first),
    lambda state, xp: {"value": xp.asarray(state)},
    exact=True,
)

_LAST = State(
    lambda kept, dtype: jnp.full(kept, -1, jnp.int32),
    lambda state, values: jnp.where(_holds(values), values.step, state),
    lambda first, second: jnp.where(second < 0, first, second),
    lambda state, xp: {"value": xp.asarray(state)},
    exact=True,
)


# -------------------------------------------------------------------------------------- rankings


def _in_order(x: Any) -> Any:
    """Return integers in the order of float32 numbers, NaN above all, 0.0 and -0.0 equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.int32)
    top = jnp.int32(0x7FFFFFFF)
    return jnp.where(jnp.isnan(x), top, jnp.where(bits < 0, bits ^ top, bits))


def _top_k(k: int, smallest: bool) -> State:
    def ranked(dtype):
        dtype = jnp.dtype(dtype)
        return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)

    def init(kept, dtype):
        shape = (*kept, k)
        whose = jnp.full(shape, -1, jnp.int32)
        return jnp.full(shape, -jnp.inf, ranked(dtype)), whose, whose

    def best(parts):
        values, steps, numbers = (
            jnp.concatenate([part[i] for part in parts], axis=-1) for i in range(3)
        )
        keys = (numbers, steps, steps < 0, -values, ~jnp.isnan(values))
        order = jnp.lexsort(keys, axis=-1)[..., :k]
        return tuple(jnp.take_along_axis(x, order, -1) for x in (values, steps, numbers))

    def insert(state, new):
        """Take one entry of each after the other; what stands there is earlier."""
        held, rows = (tuple(jnp.moveaxis(x, -1, 0) for x in part) for part in (state, new))
        place = lax.broadcasted_iota(jnp.int32, held[0].shape, 0)

        def one(held, row):
            values, steps, _ = held
            stays = (steps >= 0) & (jnp.isnan(values) | (values >= row[0][None]))
            rank = jnp.where(row[1] < 0, k, stays.sum(axis=0, dtype=jnp.int32))[None]

            def moved(old, own):
                above = jnp.concatenate([old[:1], old[:-1]])
                return jnp.where(place < rank, old, jnp.where(place == rank, own[None], above))

            return tuple(map(moved, held, row)), None

        return tuple(jnp.moveaxis(x, 0, -1) for x in lax.scan(one, held, rows)[0])

    def step(state, values):
        x = values.x.astype(state[0].dtype)
        x = jnp.where(values.mask, -x if smallest else x, -jnp.inf)
        numbers = _spread(values.numbers, x)
        if x.dtype == jnp.float32 and x.shape[-1] > max(2**12, 8 * k):
            # The best of many are found without sorting them; equal ones stay in their order.
            places = lax.top_k(_in_order(x), k)[1]
            numbers = jnp.take_along_axis(jnp.broadcast_to(numbers, x.shape), places, -1)
            x = jnp.take_along_axis(x, places, -1)
        there = x != -jnp.inf  # what is left out of a ranking was put at its very end
        steps = jnp.where(there, values.step, -1)
        numbers = jnp.where(there, numbers, -1)
        new = (x, *(jnp.broadcast_to(y, x.shape) for y in (steps, numbers)))
        # Of many weights, a few entries each are put in their places faster than all are sorted.
        return insert(state, new) if x.size > 2**14 * x.shape[-1] else best([state, new])

    def final(state, xp):
        values, steps, numbers = map(xp.asarray, state)
        values = -values if smallest else values
        return {"value": values, "step": steps, "number": numbers}

    return State(init, step, lambda first, second: best([first, second]), final, exact=True)


def _into(buckets: int, place: Callable[[Any], Any]) -> tuple[Callable, Callable]:
    def init(kept, dtype):
        return _blank_count(*kept, buckets)

    def step(state, values):
        places = place(values.x)
        flat = places.reshape(-1, places.shape[-1])
        extra = jax.vmap(
            lambda row: jnp.zeros(buckets, jnp.uint32).at[row].add(values.valid.astype(jnp.uint32))
        )(flat)
        return _more(state, extra.reshape(state.shape[:-1]))

    return init, step


def _hist(edges: Sequence[float]) -> State:
    def place(x):
        x = x.astype(real(x.dtype))
        return jnp.searchsorted(jnp.asarray(edges, x.dtype), x, side="right")

    init, step = _into(len(edges) + 1, place)
    final = lambda state, xp: {"value": _read_count(state, xp)}  # noqa: E731
    return State(init, step, _join_counts, final, exact=True)


def _sketch(q: Sequence[float]) -> State:
    """Count bfloat16 neighbours, and read quantiles off the counts."""

    def place(x):
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        bits = jnp.where(jnp.isnan(x), jnp.uint32(0x7FFFFFFF), bits)
        ordered = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(0x80000000))
        return (ordered >> 16).astype(jnp.int32)

    def final(state, xp):
        counts = _read_count(np.asarray(state), np)
        sums = counts.cumsum(-1)
        total = sums[..., -1:]
        found = []
        for share in q:
            rank = np.floor(share * np.maximum(total - 1, 0)).astype(np.int64)
            found.append((sums > rank).argmax(-1))
        places = np.stack(found, -1).astype(np.uint32)
        high = (places << 16) | 0x8000  # the middle of the bucket
        bits = np.where(high >> 31, high & 0x7FFFFFFF, ~high)
        values = bits.astype(np.uint32).view(np.float32)
        return {"value": np.where(total > 0, values, np.nan).astype(np.float32)}

    init, step = _into(BUCKETS, place)
    return State(init, step, _join_counts, final, exact=True)


# Quantiles of one array that are selected; of more, the array is sorted.
SELECTED = 16


def quantiles(x: Any, valid: Any, q: Sequence[float]) -> Any:
    """Return exact quantiles of the last axis, `[*kept, quantiles]`, of the valid ones.

    Numbers are told apart by their bits, since XLA takes subnormal ones for zero.
    """
    x = jnp.asarray(x, real(x.dtype))
    n = valid.sum()
    at = jnp.asarray(q, x.dtype) * jnp.maximum(n - 1, 0).astype(x.dtype)
    low = jnp.floor(at).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(n - 1, 0))
    share = _spread(at - low.astype(x.dtype), x)
    width = 8 * x.dtype.itemsize
    wide = jnp.dtype(f"uint{width}").type
    sign = wide(1 << (width - 1))
    bits = lax.bitcast_convert_type(x, wide)
    keys = jnp.where(bits > sign, ~bits, bits | sign)  # ascending with the numbers; -0 is 0
    keys = jnp.where(_spread(valid, x), keys, ~wide(0))
    if len(q) <= SELECTED:
        found = lax.map(lambda ranks: _selected(keys, *ranks), (low, high))
        found = [jnp.moveaxis(x, 0, -1) for x in found]
    else:
        ordered = jnp.sort(keys, axis=-1)
        found = [jnp.take(ordered, places, axis=-1) for places in (low, high)]
    first, second = (
        lax.bitcast_convert_type(jnp.where(key < sign, ~key, key ^ sign), x.dtype) for key in found
    )
    value = jnp.where(share > 0, first + (second - first) * share, first)
    spoiled = _any_true(jnp.isnan(x) & _spread(valid, x))[..., None] | (n == 0)
    return jnp.where(spoiled, jnp.nan, value)


def _selected(keys: Any, rank: Any, after: Any) -> tuple[Any, Any]:
    """Return the unsigned numbers that would stand at two neighbouring places, were they sorted.

    Found bit by bit from the highest, each bit by counting, which takes far less time than to sort.
    """
    wide, width = keys.dtype.type, 8 * keys.dtype.itemsize

    def narrow(i, found):
        tried = found | (wide(1 << (width - 1)) >> i.astype(wide))
        below = _count_true(keys < tried[..., None]).astype(jnp.int32)
        return jnp.where(below <= rank, tried, found)

    found = lax.fori_loop(0, width, narrow, jnp.zeros(keys.shape[:-1], wide))
    reached = _count_true(keys <= found[..., None]).astype(jnp.int32)
    larger = jnp.where(keys > found[..., None], keys, ~wide(0)).min(-1)
    return found, jnp.where(reached > after, found, larger)
