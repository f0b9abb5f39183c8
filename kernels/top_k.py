"""The k largest |g| of each weight over all samples so far, and whose gradients they are.

The gradient of sample n is `g[n, b, i, j] = sum_t left[n, b, t, i] * right[n, b, t, j]`. A state
holds, for each weight, the `k` largest |g| in falling order and the occurrences they belong to:

    values'[:, b, i, j] = the first k of stable_sort(values[:, b, i, j] ++ |g[:, b, i, j]|, falling)

so of equal values the earlier occurrence stays first; with k = 1 it is the arg-max. A place that
no sample has taken yet holds -inf and the occurrence -1. NaN ranks above every number, +inf
included, and stays NaN: a gradient that is not a number must not hide. Of several NaNs the earlier
comes first, as of other equals.

All variants have one signature, `(values, occurrences, left, right, occurrence) -> (values,
occurrences)`, with these shapes and dtypes:

    values       float32[k, b, i, j]     from `empty`, or what an earlier call returned
    occurrences  int32[k, b, i, j]
    left         float32[n, b, t, i]     n >= 1; t = 1 for a dense layer, else steps in time
    right        float32[n, b, t, j]     of gradients that exist already, see `from_rows`
    occurrence   int32[n]                ascending, and above those of earlier calls

Variants and their use:

    reference  sorts all samples at once; the oracle of the tests
    xla        to be jitted: inside of a compiled step, and where numba is missing
    compiled   numba on the CPU, called from the host; the fastest; None without numba
    pallas     Triton on a GPU, unproven; nobody calls it by default

A running top-k rarely changes: after s samples a new one enters the k of a weight with probability
k / s. So the fast variants first test against the k-th value, and insert only where it is beaten.

They compare the bits of |g| as int32, which orders them as wanted: -inf has the sign bit and is
below all, NaN is above inf. With t = 1 a gradient is one product, rounded once, so that all
variants agree to the bit; longer sums are rounded in another order by each. The CPU variants take
gradients below the smallest normal number as zero, because XLA computes so on CPU.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

State = tuple[Float32[Array, "k b i j"], Int32[Array, "k b i j"]]

NAN = 0x7FC00000  # the bits of the NaN that stands for all
INFINITY = 0x7F800000
SMALLEST_NORMAL = 0x00800000
NOTHING = -1 << 31  # below the bits of -inf

# Measured on the layer 784x512: with 16 samples to a pass XLA compiles a vectorised loop, which
# it does not with 2 to 8; with more, nothing is gained.
SAMPLES = 16
# Weights whose samples are looked at together, of those with a new entry.
CHUNK = 512
# Samples whose sums over time exist at once.
SUMS = 8


def empty(k: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the state before the first sample, of weights of shape `(b, i, j)`.

    >>> values, occurrences = empty(2, (1, 1, 1))
    >>> values.ravel(), occurrences.ravel()
    (array([-inf, -inf], dtype=float32), array([-1, -1], dtype=int32))
    """
    return np.full((k, *shape), -np.inf, np.float32), np.full((k, *shape), -1, np.int32)


def from_rows(
    rows: Float32[Array, "n m"],
) -> tuple[Float32[Array, "n 1 1 1"], Float32[Array, "n 1 1 m"]]:
    """Return the factors of gradients that exist already, for a state of shape `[k, 1, 1, m]`."""
    rows = jnp.asarray(rows)
    return jnp.ones((rows.shape[0], 1, 1, 1), rows.dtype), rows[:, None, None, :]


def merge(
    values_a: Float32[Array, "k b i j"],
    occurrences_a: Int32[Array, "k b i j"],
    values_b: Float32[Array, "l b i j"],
    occurrences_b: Int32[Array, "l b i j"],
) -> State:
    """Return the top k of two states, of which `a` saw the earlier samples; k is that of `a`."""
    bits = jnp.concatenate([_bits(values_a), _bits(values_b)])
    occurrences = jnp.concatenate([occurrences_a, occurrences_b])
    # ~x falls as x rises, and no integer overflows.
    bits, occurrences = lax.sort((~bits, occurrences), dimension=0, is_stable=True, num_keys=1)
    k = len(values_a)
    return lax.bitcast_convert_type(~bits[:k], jnp.float32), occurrences[:k]


# ------------------------------------------------------------------------------------- reference


def reference(values: Any, occurrences: Any, left: Any, right: Any, occurrence: Any) -> State:
    """Sort all samples at once; the oracle. Shapes and dtypes are at the head of this file."""
    rows = jnp.abs(_gradients(jnp.asarray(left), jnp.asarray(right)))
    whose = jnp.broadcast_to(jnp.asarray(occurrence)[:, None, None, None], rows.shape)
    return merge(jnp.asarray(values), jnp.asarray(occurrences), rows, whose)


def _gradients(left: Any, right: Any) -> Any:
    """Return `[n, b, i, j]`: for t = 1 the products themselves, each rounded once."""
    if left.shape[2] == 1:
        return left[:, :, 0, :, None] * right[:, :, 0, None, :]
    return jnp.einsum("nbti,nbtj->nbij", left, right, precision=lax.Precision.HIGHEST)


def _bits(values: Any) -> Any:
    """Return bits in the order of |g|, and of what a state holds, with one NaN for all."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(jnp.isnan(values), NAN, bits)


# ------------------------------------------------------------------------------------------- XLA


def xla(values: Any, occurrences: Any, left: Any, right: Any, occurrence: Any) -> State:
    """Find the largest |g| of the batch in one pass, then look at the weights it changes.

    For k = 1 a second pass finds whose it is. For k > 1 the weights whose largest |g| beats their
    k-th value are gathered, and only their samples are sorted in. Sums over time (t > 1) exist for
    a few samples at a time. Shapes and dtypes are at the head of this file; to be jitted.
    """
    k, shape = values.shape[0], values.shape[1:]
    values, left, right, occurrence = map(jnp.asarray, (values, left, right, occurrence))
    bits = lax.bitcast_convert_type(values, jnp.int32).reshape(k, -1)
    state = bits, jnp.asarray(occurrences).reshape(k, -1)
    if left.shape[2] == 1:
        state = _batch(state, left[:, :, 0], right[:, :, 0], occurrence)
    else:
        state = _sums(state, left, right, occurrence)
    bits, occurrences = (each.reshape(k, *shape) for each in state)
    return lax.bitcast_convert_type(bits, jnp.float32), occurrences


def _dots(left: Any, right: Any) -> Any:
    """Return the sums over time `[..., i, j]` of `[..., t, i]` and `[..., t, j]`, one by one.

    Measured: XLA on CPU takes 6 to 20 times as long for a batch of matrix products.
    """
    many = [each.reshape(-1, *each.shape[-2:]) for each in (left, right)]
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    sums = lax.map(lambda pair: dot(pair[0].T, pair[1]), many)
    return sums.reshape(*left.shape[:-2], *sums.shape[1:])


def largest(left: Any, right: Any) -> Float32[Array, "b i j"]:
    """Return the largest |g| of each weight in one batch, without whose it is; to be jitted."""
    left, right = jnp.asarray(left), jnp.asarray(right)
    if left.shape[2] == 1:
        bits = _largest(_parts(left[:, :, 0]), _parts(right[:, :, 0]))
        return lax.bitcast_convert_type(bits, jnp.float32)

    def step(most, sample):
        return jnp.maximum(most, _bits(jnp.abs(_dots(*sample)))), None

    zeros = jnp.zeros((*left.shape[1::2], right.shape[3]), jnp.int32)
    return lax.bitcast_convert_type(lax.scan(step, zeros, (left, right))[0], jnp.float32)


def _sums(state: Any, left: Any, right: Any, occurrence: Any) -> Any:
    """Take samples of several steps in time, a few at once."""

    def step(state, samples):
        left, right, occurrence = samples
        rows = _dots(left, right).reshape(len(left), 1, -1)
        ones = jnp.ones((len(left), 1, 1), rows.dtype)
        return _batch(state, ones, rows, occurrence), None

    count = len(left) // SUMS * SUMS
    samples = left, right, occurrence
    if count:
        state, _ = lax.scan(step, state, [_split(each[:count], SUMS) for each in samples])
    if count < len(left):
        state, _ = step(state, [each[count:] for each in samples])
    return state


def _batch(state: Any, left: Any, right: Any, occurrence: Any) -> Any:
    """Take samples `left [n, b, i]`, `right [n, b, j]` into `bits [k, m]`, `occurrences [k, m]`."""
    bits, occurrences = state
    parts = _parts(left), _parts(right)
    most = _largest(*parts)
    if len(bits) > 1:
        return _insert(state, most.ravel(), left, right, occurrence)

    # Nothing matches where no sample beats the state: the occurrence stays, in its own memory.
    target = jnp.where(most > bits.reshape(most.shape), most, NOTHING)

    def match(whose, part):
        *part, occurrence = part
        for left, right, number in reversed(list(zip(*part, occurrence, strict=True))):
            equal = jnp.minimum(_product(left[:, :, None], right[:, None, :]), NAN) == target
            whose = jnp.where(equal, number, whose)
        return whose, None

    numbers = _parts(occurrence)
    whose, _ = lax.scan(match, occurrences.reshape(most.shape), [*parts, numbers], reverse=True)
    return jnp.maximum(bits, most.reshape(1, -1)), whose.reshape(1, -1)


def _parts(samples: Any) -> Any:
    """Split samples for the passes, the last filled with zeros, which never are first to match."""
    spare = ((0, -len(samples) % SAMPLES), *[(0, 0)] * (samples.ndim - 1))
    return _split(jnp.pad(samples, spare), SAMPLES)


def _largest(left: Any, right: Any) -> Any:
    """Return the bits of the largest |g| of samples in parts `[p, SAMPLES, b, i or j]`."""

    def step(most, part):
        for left, right in zip(*part, strict=True):
            most = jnp.maximum(most, _product(left[:, :, None], right[:, None, :]))
        return most, None

    zeros = jnp.zeros((*left.shape[2:], right.shape[3]), jnp.int32)
    return jnp.minimum(lax.scan(step, zeros, (left, right))[0], NAN)


def _split(samples: Any, size: int) -> Any:
    return samples.reshape(-1, size, *samples.shape[1:])


def _product(left: Any, right: Any) -> Any:
    return lax.bitcast_convert_type(jnp.abs(left * right), jnp.int32)


def _insert(state: Any, most: Any, left: Any, right: Any, occurrence: Any) -> Any:
    """Insert samples into the weights where the largest of them, `most [m]`, beats the k-th."""
    (k, m), (n, _, i), j = state[0].shape, left.shape, right.shape[2]
    count, find = _true(most > state[0][-1])
    # Gathers read the samples of a weight from one place: a quarter faster.
    left, right = (each.transpose(1, 2, 0).reshape(-1, n) for each in (left, right))
    places = jnp.arange(k, dtype=jnp.int32)[:, None]
    order = jnp.arange(n, dtype=jnp.int32)[None, :]

    def chunk(carry):
        start, all_bits, all_occurrences = carry
        weights = find(start + jnp.arange(CHUNK, dtype=jnp.int32))  # m where there is none left
        where = jnp.minimum(weights, m - 1)
        block = where // (i * j)
        of_left, of_right = where // j, block * j + where % j
        rows = jnp.minimum(_product(left[of_left], right[of_right]), NAN)  # [CHUNK, n]

        def changing(carry):
            _, most, bits, _ = carry
            return jnp.any(most > bits[-1])

        def take(carry):
            """Insert the largest sample of each weight, and strike it out."""
            rows, most, bits, occurrences = carry
            first = jnp.where(rows == most[:, None], order, n).min(axis=1)
            rank = jnp.sum(bits >= most[None], axis=0, keepdims=True, dtype=jnp.int32)
            above = jnp.concatenate([bits[:1], bits[:-1]])
            whose = jnp.concatenate([occurrences[:1], occurrences[:-1]])
            here = jnp.where(places == rank, most[None], above)
            whose = jnp.where(places == rank, occurrence[first][None], whose)
            rows = jnp.where(order == first[:, None], NOTHING, rows)
            return (
                rows,
                rows.max(axis=1),
                jnp.where(places < rank, bits, here),
                jnp.where(places < rank, occurrences, whose),
            )

        old = all_bits[:, where], all_occurrences[:, where]
        _, _, bits, occurrences = lax.while_loop(changing, take, (rows, rows.max(axis=1), *old))
        return (
            start + CHUNK,
            all_bits.at[:, weights].set(bits, mode="drop"),
            all_occurrences.at[:, weights].set(occurrences, mode="drop"),
        )

    start = jnp.zeros((), jnp.int32)
    return lax.while_loop(lambda carry: carry[0] < count, chunk, (start, *state))[1:]


def _true(mask: Any, group: int = 32) -> tuple[Any, Callable[[Any], Any]]:
    """Return how many entries of `mask [m]` are true, and a function to the position of the n-th.

    It is `m` or more where there is none. Several times as fast as `jnp.nonzero`, which sums over
    all entries; here only the sums of groups are summed up.
    """
    groups = jnp.pad(mask, (0, -len(mask) % group)).reshape(-1, group).astype(jnp.int32)
    sizes = groups.sum(axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def find(number):
        which = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        inside = jnp.minimum(which, len(sizes) - 1)
        before = jnp.cumsum(groups[inside], axis=1, dtype=jnp.int32)
        rest = number - (ends[inside] - sizes[inside])
        place = jnp.sum(before <= rest[:, None], axis=1, dtype=jnp.int32)
        return jnp.where(which < len(sizes), which * group + place, len(mask))

    return ends[-1], find


# ------------------------------------------------------------------------------------------- CPU


def _compiled(values: Any, occurrences: Any, left: Any, right: Any, occurrence: Any) -> Any:
    """Test against the k-th values in vectors, insert one by one; updates the state IN PLACE.

    The state must be numpy arrays, which are changed and returned; the rest may be JAX arrays on
    CPU, which are read without a copy. Zeros in `left`, half of them after a ReLU, cost nothing
    once k samples were seen. Shapes and dtypes are at the head of this file.

    Raises:
        TypeError: the state is not of writable, contiguous numpy arrays of the right dtypes.
    """
    for name, array, dtype in (
        ("values", values, np.float32),
        ("occurrences", occurrences, np.int32),
    ):
        if not (
            isinstance(array, np.ndarray)
            and array.dtype == dtype
            and array.flags.c_contiguous
            and array.flags.writeable
        ):
            raise TypeError(
                f"{name} is a {type(array).__name__} that cannot be updated in place: the compiled "
                "kernel writes into the state that it is given. Start from `top_k.empty`, or copy: "
                f"`np.array(state, np.{np.dtype(dtype).name})`."
            )
    from replay.kernels.top_k_cpu import loop  # imports numba

    left, right = _to_read(left, np.float32), _to_read(right, np.float32)
    # All of a row's gradients are zeros: not where a zero meets what is not finite.
    silent = ~left.any(axis=2) & np.isfinite(right).all(axis=(2, 3))[:, :, None]
    occurrence = _to_read(occurrence, np.int32)
    loop(values.view(np.int32), occurrences, left, right, silent, occurrence)
    return values, occurrences


def _to_read(array: Any, dtype: Any) -> np.ndarray:
    """Return a read-only view, which JAX arrays give anyway: numba compiles for each kind."""
    view = np.ascontiguousarray(array, dtype).view()
    view.flags.writeable = False
    return view


# Whether there is numba is asked without importing it.
compiled = _compiled if importlib.util.find_spec("numba") else None


# ------------------------------------------------------------------------------------------- GPU


def pallas(
    values: Any,
    occurrences: Any,
    left: Any,
    right: Any,
    occurrence: Any,
    *,
    tile: int = 32,
    interpret: bool = False,
) -> State:
    """Keep the k largest of a tile of weights in registers while the samples pass by.

    Unproven: has only run in interpret mode. Shapes and dtypes are at the head of this file.

    Args:
        values: of the state.
        occurrences: of the state.
        left: factors.
        right: factors.
        occurrence: of each sample.
        tile: side of the square of weights that one program holds, a power of two.
        interpret: compute with JAX operations on any device.
    """
    k, b, i, j = values.shape
    n, _, t, _ = left.shape
    tile_i, tile_j = -i % tile, -j % tile
    wide = ((0, 0), (0, 0), (0, tile_i), (0, tile_j))
    state = [jnp.pad(jnp.asarray(each), wide) for each in (values, occurrences)]
    left = jnp.pad(jnp.asarray(left), ((0, 0), (0, 0), (0, 0), (0, tile_i)))
    right = jnp.pad(jnp.asarray(right), ((0, 0), (0, 0), (0, 0), (0, tile_j)))
    planes = pl.BlockSpec((k, 1, tile, tile), lambda b, i, j: (0, b, i, j))
    values, occurrences = pl.pallas_call(
        functools.partial(_tile, k=k, n=n, t=t),
        grid=(b, (i + tile_i) // tile, (j + tile_j) // tile),
        in_specs=[
            planes,
            planes,
            pl.BlockSpec((n, 1, t, tile), lambda b, i, j: (0, b, 0, i)),
            pl.BlockSpec((n, 1, t, tile), lambda b, i, j: (0, b, 0, j)),
            pl.BlockSpec((n,), lambda b, i, j: (0,)),
        ],
        out_specs=[planes, planes],
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in state],
        interpret=interpret,
    )(*state, left, right, jnp.asarray(occurrence))
    return values[:, :, :i, :j], occurrences[:, :, :i, :j]


def _tile(values, occurrences, left, right, occurrence, new_values, new_occurrences, *, k, n, t):
    """Fold all samples into one tile; Triton has no arrays of k planes, so tuples hold them."""
    size = left.shape[-1]

    def product(s, time):
        return left[s, 0, time, :][:, None] * right[s, 0, time, :][None, :]

    def sample(s, state):
        g = product(s, 0)
        if t > 1:
            g = lax.fori_loop(1, t, lambda time, g: g + product(s, time), g)
        new = jnp.minimum(lax.bitcast_convert_type(jnp.abs(g), jnp.int32), NAN)
        number = jnp.broadcast_to(occurrence[s], (size, size))

        def insert(state):
            bits, whose = state
            stays = [each >= new for each in bits]
            here = [jnp.where(stays[0], bits[0], new)]
            who = [jnp.where(stays[0], whose[0], number)]
            for p in range(1, k):
                moved = jnp.where(stays[p - 1], new, bits[p - 1])
                who.append(
                    jnp.where(stays[p], whose[p], jnp.where(stays[p - 1], number, whose[p - 1]))
                )
                here.append(jnp.where(stays[p], bits[p], moved))
            return tuple(here), tuple(who)

        beaten = jnp.max((new > state[0][-1]).astype(jnp.int32)) > 0
        return lax.cond(beaten, insert, lambda state: state, state)

    state = (
        tuple(lax.bitcast_convert_type(values[p, 0], jnp.int32) for p in range(k)),
        tuple(occurrences[p, 0] for p in range(k)),
    )
    bits, whose = lax.fori_loop(0, n, sample, state)
    for p in range(k):
        new_values[p, 0] = lax.bitcast_convert_type(bits[p], jnp.float32)
        new_occurrences[p, 0] = whose[p]
