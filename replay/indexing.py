"""The columns of an index, computed beside a training by an observer that never feeds it.

Whoever observes needs the weights before and after each step, and a training gives its state away.
So the observer keeps a copy of the weights, and writes the new ones over it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replay import bounds
from replay.artifact import Signature
from replay.bounds import EDGES
from replay.store import ArraySpec, rows
from replay.tree import Leaf, copies

LEVELS = ("off", "scalars", "rows", "weights")

# Of other tensors nothing is said: float32 does not hold their numbers.
OBSERVED = ("float32", "bfloat16", "float16")

NUMBERS = ("grads_max", "grads_norm", "updates_max", "updates_norm")
COUNTS = len(EDGES) + 1  # the last of them is of what is not a number

# An index reads every weight several times. Beside a step of 550 operations for each weight it took
# nearly as long as the step; of many more, about as much less. What is fixed is a fraction of a
# millisecond. See experiments/bench_index.py.
_OPERATIONS_OF_A_WEIGHT = 16384
_OPERATIONS = 2**29


class Summary(NamedTuple):
    """What an index keeps of a segment.

    Attributes:
        start: its first state.
        stop: its last state.
        parts: for each tensor its arrays, still on the device: of `rows` the sums of the largest
            updates of each row and each column, of `weights` the path of each weight and its
            smallest magnitude.
    """

    start: int
    stop: int
    parts: Sequence[Any]


def tensors(signature: Signature) -> tuple[Leaf, ...]:
    """Return the tensors of an index, named below `params`."""
    leaves = [signature.state[i] for i in signature.weights]
    return tuple(
        dataclasses.replace(leaf, path=leaf.path.partition("/")[2] or leaf.path) for leaf in leaves
    )


def default_level(operations: float, signature: Signature) -> str:
    """Return the level of a run that was given none: `scalars` where it costs next to nothing.

    Args:
        operations: of a step, as the compiler counts them.
        signature: of the run.
    """
    weights = sum(math.prod(leaf.shape) for leaf in tensors(signature))
    cheap = operations >= max(_OPERATIONS_OF_A_WEIGHT * weights, _OPERATIONS)
    return "scalars" if cheap and not signature.block else "off"


def layout(
    level: str, signature: Signature, steps: int, *, columns: str, segments: str
) -> tuple[tuple[ArraySpec, ...], tuple[ArraySpec, ...]]:
    """Lay out the arrays of an index: a row for each step, and a row for each segment.

    Args:
        level: of the index.
        signature: of the run.
        steps: the most steps that it may have.
        columns: the folder of what is kept of steps.
        segments: the folder of what is kept of segments.
    """
    if level == "off":
        return (), ()
    leaves = tensors(signature)
    names = {"tensors": "\n".join(leaf.path for leaf in leaves)}

    def column(name: str, dtype: str, more: tuple[int, ...], dims: tuple[str, ...], **marks: str):
        shape = (len(leaves), *more)
        chunk = max(64, min(4096, 2**20 // (4 * max(math.prod(shape), 1))))
        return ArraySpec(
            f"{columns}/{name}", (steps, *shape), (chunk, *(max(n, 1) for n in shape)), dtype,
            ("step", "tensor", *dims), ids=dtype == "uint32", attributes=names | marks,
        )  # fmt: skip

    edges = " ".join(map(repr, EDGES))
    found = [column(name, "float32", (), ()) for name in NUMBERS]
    found.append(column("grads_above", "uint32", (COUNTS,), ("edge",), edges=edges))
    parts = []
    for i, leaf in enumerate(leaves):
        for name, shape, dtype in _forms(level, leaf.shape):
            dims = ("segment", *(f"tensor_{i}_{name}_{k}" for k in range(len(shape))))
            spec = rows(f"{segments}/{name}_{i}", shape, steps + 1, dtype, dims)
            parts.append(dataclasses.replace(spec, attributes={"path": leaf.path}))
    return tuple(found), tuple(parts)


def _forms(level: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of what is kept of a tensor in each segment."""
    if level == "rows":
        return [("rows", shape[:-1], "float32"), ("columns", shape[-1:], "float32")]
    if level == "weights":
        return [("path", shape, "uint8"), ("least", shape, "uint8")]
    return []


def level_of(names: Sequence[str]) -> str:
    """Return the level of an index that has arrays of these names."""
    last = {name.rpartition("/")[2] for name in names}
    if "path_0" in last:
        return "weights"
    return "rows" if "rows_0" in last else "scalars" if NUMBERS[0] in last else "off"


def columns_of(packed: np.ndarray) -> dict[str, np.ndarray]:
    """Part what was observed at some steps, `uint32[steps, tensors, ...]`, by column."""
    found = {name: packed[..., i].view(np.float32) for i, name in enumerate(NUMBERS)}
    return found | {"grads_above": packed[..., len(NUMBERS) :]}


def stored(level: str, summary: Summary) -> list[list[np.ndarray]]:
    """Return the arrays of a segment in the form that is stored, by tensor, rounded safely."""
    steps, found = summary.stop - summary.start, []
    for part in filter(None, summary.parts):
        first, second = (np.asarray(x) for x in part)
        if level == "rows":
            sums = (bounds.path_length(x, steps) for x in (first, second))
            # To float32, upwards.
            found.append([np.nextafter(x.astype(np.float32), np.float32(np.inf)) for x in sums])
        else:
            codes = bounds.rounded_up(bounds.path_length(first, steps))
            found.append([codes, bounds.rounded_down(second)])
    return found


class Observer:
    """Looks at every step of a training, and keeps what its index level asks for.

    Args:
        signature: of the run.
        level: of the index, not `off`.
    """

    def __init__(self, signature: Signature, level: str):
        self.level, self._weights = level, signature.weights
        self._copy, self._start, self._take = _programs(level, signature)
        self._before: Any = None
        self._running: Any = None
        self.start = self.stop = 0

    def begin(self, state: int, leaves: Sequence[Any]) -> None:
        """Stand at a state, where a segment begins."""
        self._before = self._copy([leaves[i] for i in self._weights])
        self._running = self._start(self._before)
        self.start = self.stop = state

    def take(self, after: Sequence[Any], grads: Sequence[Any]) -> Any:
        """Look at a step; return its columns, `uint32[tensors, ...]`, still being computed."""
        weights = [after[i] for i in self._weights]
        packed, self._before, self._running = self._take(
            self._before, self._running, weights, list(grads)
        )
        self.stop += 1
        return packed

    def close(self) -> Summary:
        """End a segment, and begin the next at the state that is reached."""
        summary = Summary(self.start, self.stop, self._running)
        self._running, self.start = self._start(self._before), self.stop
        return summary


@functools.lru_cache(maxsize=4)
def _programs(level: str, signature: Signature) -> tuple[Any, Any, Any]:
    """Compile what copies weights, begins a segment, and takes a step."""
    leaves = tensors(signature)
    known = tuple(leaf.dtype in OBSERVED for leaf in leaves)
    given, grads = [leaf.struct for leaf in leaves], [leaf.struct for leaf in signature.grads]
    start = jax.jit(functools.partial(_start, level))
    take = jax.jit(functools.partial(_take, level, known), donate_argnums=(0, 1))
    running = jax.eval_shape(start, given)
    return (
        jax.jit(copies).lower(given).compile(),
        start.lower(given).compile(),
        take.lower(given, running, given, grads).compile(),
    )


def _start(level, weights):
    found = []
    for w in weights:
        if level == "rows":
            # Shapes of one row and one column where there are no more axes.
            found.append((jnp.zeros(w.shape[:-1], jnp.float32), jnp.zeros(w.shape[-1:])))
        elif level == "weights":
            found.append((jnp.zeros(w.shape, jnp.float32), jnp.abs(w).astype(jnp.float32)))
        else:
            found.append(())
    return found


def _take(level, known, before, running, after, grads):
    moved, further = [], []
    for ok, old, new, sums in zip(known, before, after, running, strict=True):
        if not ok:
            moved.append(jnp.zeros(2, jnp.uint32))
            further.append(tuple(jnp.full(x.shape, jnp.nan, jnp.float32) for x in sums))
            continue
        update = functools.partial(_update, old, new)
        numbers, spoiled = _extremes(update)
        moved.append(numbers)
        # A sum that a number is missing from is none.
        if level == "rows" and new.size:
            across = tuple(range(new.ndim - 1))
            wide = update().max(-1) if new.ndim else update()
            long = update().max(across) if across else update()
            sums = (sums[0] + wide + spoiled, sums[1] + long + spoiled)
        elif level == "weights":
            size = jnp.abs(new).astype(jnp.float32)
            sums = (sums[0] + update(), jnp.minimum(sums[1], size))
        further.append(sums)
    numbers, counts = _counted([g for ok, g in zip(known, grads, strict=True) if ok])
    rows, blank = iter(zip(numbers, counts, strict=True)), jnp.zeros(COUNTS, jnp.uint32)
    packed = []
    for ok, last in zip(known, moved, strict=True):
        first, count = next(rows) if ok else (jnp.zeros(2, jnp.uint32), blank)
        packed += [first, last, count]
    table = jnp.concatenate(packed).reshape(len(known), len(NUMBERS) + COUNTS)
    return table, [jnp.copy(x) for x in after], further


def _update(old, new):
    """Return how far weights went; anew for each who asks, which is faster than to keep it."""
    new, old = lax.optimization_barrier((new, old))
    return jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32))


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.uint32)


def _extremes(magnitude):
    """Return the bits of maximum and norm, and NaN where something is not finite, else 0.

    The largest of floats that are not all numbers depends on how a compiler vectorises: on CPU it
    was seen to leave NaN out. A sum of squares never does.
    """
    if not magnitude().size:
        return jnp.zeros(2, jnp.uint32), jnp.float32(0)
    squares = jnp.square(magnitude()).sum()
    most = jnp.where(jnp.isnan(squares), jnp.nan, magnitude().max())
    return _bits(jnp.stack([most, jnp.sqrt(squares)])), squares * 0


def _counted(grads):
    """Return, of each gradient, the bits of maximum and norm, and how many exceed each edge."""
    thresholds = [int(np.float32(edge).view(np.int32)) for edge in EDGES]
    few, infinite = 4, int(np.float32(np.inf).view(np.int32))
    magnitudes = [jnp.abs(g.astype(jnp.float32)) for g in grads]
    numbers = [_extremes(lambda x=x: x)[0] for x in magnitudes]
    bits = [_bits(x).astype(jnp.int32) for x in magnitudes]
    low = [_above(x, thresholds[:few]) for x in bits]
    more = [*thresholds[few:], infinite]
    high: list[Any] = [None] * len(bits)
    small = [i for i, x in enumerate(bits) if x.size < 2**15]
    for some in (small, *([i] for i in range(len(bits)) if i not in small)):
        # The gradients of a healthy training are small: then nothing else is to be counted.
        tops = [lax.bitcast_convert_type(numbers[i][0], jnp.float32) for i in some]
        if not some:
            continue
        found = lax.cond(
            functools.reduce(jnp.logical_and, [top <= EDGES[few] for top in tops]),
            lambda given: [jnp.zeros(len(more), jnp.uint32) for _ in given],
            lambda given: [_above(x, more) for x in given],
            [bits[i] for i in some],
        )
        for i, counts in zip(some, found, strict=True):
            high[i] = counts
    # In their order as integers, what is not a number stands above infinity.
    unordered = np.asarray([1] * (COUNTS - 1) + [0], np.uint32)
    counts = [jnp.concatenate(pair) for pair in zip(low, high, strict=True)]
    return numbers, [x - x[-1] * unordered for x in counts]


def _above(bits, thresholds):
    """Count what is above thresholds, four of them in the bytes of one sum of integers."""
    rows, lanes = 128, 512
    flat = bits.reshape(-1)
    whole = flat.size // (rows * lanes) * (rows * lanes)
    rest = flat[whole:]
    pieces = [jnp.pad(rest, (0, -rest.size % rows)).reshape(1, rows, -1)] if rest.size else []
    pieces += [flat[:whole].reshape(-1, rows, lanes)] if whole else []
    shifts = np.arange(0, 32, 8, dtype=np.uint32)
    found = []
    for first in range(0, len(thresholds), 4):
        four = thresholds[first : first + 4]
        count = jnp.zeros(4, jnp.uint32)
        for piece in pieces:
            packed = jnp.zeros(piece.shape, jnp.uint32)
            for shift, threshold in zip(shifts, four, strict=False):
                packed = packed + ((piece > threshold).astype(jnp.uint32) << shift)
            sums = packed.sum(1)
            parts = (sums[..., None] >> shifts[None, None]) & np.uint32(255)
            count = count + parts.sum((0, 1))
        found.append(count[: len(four)])
    return jnp.concatenate(found)
