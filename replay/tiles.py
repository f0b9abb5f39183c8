"""Which weights are looked at in which pass over the steps, where all at once exceed memory.

A root that keeps weights apart folds each by itself, so that they may be folded one tile after the
other, each tile along a replay of its own, and put together afterwards. The bits are the same as
long as no executable's result for one weight depends on which others stand beside it. IEEE 754
rounds arithmetic in one way, but XLA computes a logarithm otherwise at the end of an array than in
its middle, and adds up the samples of a step in an order that depends on how many weights there
are. Where that is asked for, only whole tensors part.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay import plan as planning
from replay.frames import FEW_WEIGHTS, Frame, Observers
from replay.grads.sources import chunks, gradients_of
from replay.query.nodes import WALKED, Map, Node, Part, Pick, Reduce, Rename, Scan, Take, narrow
from replay.values import FIXED, Value

# Functions of elements whose result IEEE 754 fixes.
ROUNDED = FIXED | frozenset(
    "multiply divide true_divide square sqrt reciprocal bitwise_and bitwise_or bitwise_xor "
    "invert".split()
)

# Functions of elements that give truth values, which add up in any order.
TRUTHS = frozenset(
    "isnan isinf isfinite signbit less less_equal greater greater_equal equal not_equal "
    "logical_and logical_or logical_xor logical_not".split()
)

# Reductions whose order of additions matters.
SUMS = ("sum", "mean", "norm", "var")

# States beside those of closed cells that are held at once: what is folded, what a step adds to
# it, and what a merge of rankings sorts.
WORKING = 8

# Of a batch's multiplied-out gradients, a ranking holds several copies.
COPIES = 4


class Tiled(NamedTuple):
    """A root, with the weights of each of its passes.

    Attributes:
        root: the root.
        top: what is put together: the root, or the smallest of what is made of it weight by weight.
        tiles: of each pass.
        entries: how many numbers are put together for each weight.
        state: bytes that the running states of all weights would take.
    """

    root: Node
    top: Node
    tiles: tuple[tuple[Part, ...], ...]
    entries: int
    state: int

    @property
    def nodes(self) -> list[Node]:
        """The root over each tile."""
        return [over(self.root, tile) for tile in self.tiles]

    def joined(self, values: Sequence[Value]) -> Value:
        """Put the values of all tiles together."""
        places: dict[str, list[tuple[int, int]]] = {part.path: [] for part in self.root.parts}
        for i, tile in enumerate(self.tiles):
            for j, piece in enumerate(tile):
                places[piece.path].append((i, j))
        axis = values[0].dims.index("weight")

        def join(lists: Sequence[list[Any]]) -> list[Any]:
            several = ([lists[i][j] for i, j in found] for found in places.values())
            return [x[0] if len(x) == 1 else np.concatenate(x, axis) for x in several]

        fields = {name: join([value.fields[name] for value in values]) for name in values[0].fields}
        return Value(values[0].dims, join([value.data for value in values]), fields)


def over(node: Node, tile: tuple[Part, ...]) -> Node:
    """Return a node over the weights of a tile."""
    return narrow(node, lambda parts: tile)


def passes(roots: Sequence[Node], tiled: Sequence[Tiled]) -> list[dict[Node, Node]]:
    """Return what is folded along each pass, a root or one over a tile, and its root.

    All that is not tiled is folded along the first of them.
    """
    apart = {one.root for one in tiled}
    whole = {root: root for root in roots if root not in apart}
    tiles = {node: one.root for one in tiled for node in one.nodes}
    found = [{node: root} for node, root in tiles.items() if node not in whole]
    return [whole | found[0], *found[1:]] if found else [whole]


def parted(
    parts: Sequence[Part], limit: int, *, split: bool, least: int = 1
) -> tuple[tuple[Part, ...], ...] | None:
    """Part tensors into tiles of at most so many weights, in their order; None where that fails.

    Args:
        parts: the tensors.
        limit: weights of a tile.
        split: whether tensors may be split.
        least: weights that a piece of a tensor has at least.

    >>> matrix, bias = Part("kernel", (2, 5)), Part("bias", (5,))
    >>> [[str(part) for part in tile] for tile in parted([bias, matrix], 6, split=True) or ()]
    [['bias'], ['kernel[5 weights]'], ['kernel[5 weights]']]
    """
    tiles: list[list[Part]] = [[]]
    room = limit
    for part in parts:
        count = -(-part.size // limit) if limit > 0 else 0
        if count < 1 and part.size or count > 1 and (not split or part.size // count < least):
            return None
        for piece in [part] if count < 2 else _pieces(part, count):
            if piece.size > room and tiles[-1]:
                tiles.append([])
                room = limit
            tiles[-1].append(piece)
            room -= piece.size
    return tuple(map(tuple, tiles))


def _pieces(part: Part, count: int) -> list[Part]:
    """Return a tensor in pieces of about the same size."""
    # Neighbours are a range, which takes no memory and is compared at once.
    known: Any = range(part.size) if part.indices is None else part.indices
    cuts = [part.size * i // count for i in range(count + 1)]
    return [Part(part.path, part.shape, known[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def splits(node: Node) -> bool:
    """Whether the weights of a tensor may part without another bit in anything below a node."""
    if isinstance(node, Map):
        product = node.function == "power" and type(node.arguments[1]) is int
        if not (product or node.function in ROUNDED):
            return False
    if isinstance(node, Reduce) and node.how in SUMS and set(node.over) - set(WALKED):
        counts = isinstance(node.child, Map) and node.child.function in TRUTHS
        if not counts or node.how in ("norm", "var"):
            return False
    return all(splits(child) for child in node.children if "weight" in child.dims)


def top_of(
    root: Node, questions: Sequence[Node], count: Callable[[Node, str], int], *, split: bool
) -> Node:
    """Return the smallest of what all questions make of a root, weight by weight.

    Args:
        root: keeps weights apart.
        questions: whose roots it is one of.
        count: tells the entries of a dimension of a node.
        split: whether tensors may be split.
    """
    above: dict[Node, set[Node]] = {}
    stack, asked = list(questions), set(questions)
    while stack:
        this = stack.pop()
        for child in this.children:
            above.setdefault(child, set()).add(this)
            stack.append(child)
    chain = [root]
    while chain[-1] not in asked and len(above.get(chain[-1], ())) == 1:
        (this,) = above[chain[-1]]
        alone = set(this.children) == {chain[-1]} and isinstance(this, Pick | Map | Reduce)
        if not alone or this.walked or planning.is_root(this) or "weight" not in this.dims:
            break
        if split and not splits(this):
            break
        chain.append(this)
    return min(chain, key=lambda node: entries(node, count))


def constants(root: Node, tile: tuple[Part, ...], value: Callable[[Node], Value]) -> dict:
    """Return the values, over a tile, of what is the same at every step below a root."""
    found = {}
    pairs = zip(planning.constants(root), planning.constants(over(root, tile)), strict=True)
    for whole, small in pairs:
        if small == whole:
            continue
        known, number = value(whole), {part.path: i for i, part in enumerate(whole.parts)}

        def cut(arrays, known=known, number=number, parts=whole.parts):
            axis = known.dims.index("weight")
            return [_some(arrays[number[x.path]], parts[number[x.path]], x, axis) for x in tile]

        fields = {name: cut(arrays) for name, arrays in known.fields.items()}
        found[small] = Value(known.dims, cut(known.data), fields)
    return found


def _some(x: Any, part: Part, piece: Part, axis: int) -> Any:
    """Return the weights of a piece out of those of a tensor."""
    if piece == part:
        return x
    assert piece.indices is not None
    if part.indices is None:
        return np.take(x, np.asarray(piece.indices), axis)
    place = {index: i for i, index in enumerate(part.indices)}
    return np.take(x, [place[index] for index in piece.indices], axis)


def multiplied_out(node: Node) -> int:
    """Return how many weights of one tensor have their gradients of samples multiplied out.

    0 where factors answer for them, in norms and sums.
    """
    if isinstance(node, Reduce) and planning.of_samples(node.child) is not None:
        if node.over == ("weight",) and node.how in ("norm", "sum"):
            return 0
        if node.over == ("position",) and node.how == "sum":
            return 0
    if isinstance(node, Scan):
        known = node.quantity in ("sample_grads", "sample_updates")
        return max((part.size for part in node.tensors), default=0) if known else 0
    return max(map(multiplied_out, node.children), default=0)


def cuts(node: Node) -> bool:
    """Whether the weights of a node have the bits that they have in the whole of their tensors.

    So few chosen weights of a sample's gradient that they are summed by themselves have others.
    """
    return splits(node) and not any(
        scan.quantity in ("sample_grads", "sample_updates")
        and any(x.indices is not None and len(x.indices) <= FEW_WEIGHTS for x in scan.tensors)
        for scan in node.scans()
    )


def count(node: Node, dim: str, *, batch: int, keys: int) -> int:
    """Return the entries of a dimension of a node, those of weights left out.

    Args:
        node: a node.
        dim: of its dimensions.
        batch: the batch size.
        keys: epochs or windows that are told apart.
    """
    if dim in WALKED:
        return len(node.steps)
    if dim in ("position", "epoch", "window"):
        return batch if dim == "position" else keys
    of = functools.partial(count, batch=batch, keys=keys)
    if isinstance(node, Rename) and dim == node.new:
        return of(node.child, node.old)
    if isinstance(node, Take) and dim == "occurrence":
        there = [of(node.child, x) for x in node.child.dims if x in ("step", "position")]
        return math.prod(there) if node.count is None else min(node.count, math.prod(there))
    for child in node.children:
        if dim in child.dims:
            return of(child, dim)
    if isinstance(node, Scan):
        return node.samples
    assert isinstance(node, Reduce), node
    if node.by is not None and node.by.dim == dim:
        return node.by.count
    options = node.options
    return options.get("k") or len(options.get("q", ())) or len(options["edges"]) + 1


def entries(node: Node, count: Callable[[Node, str], int]) -> int:
    """Return how many numbers a node has for each weight; `count` tells those of a dimension."""
    return math.prod(count(node, dim) for dim in node.dims if dim != "weight")


# ------------------------------------------------------------------------------- chosen weights


class Sparing(Frame):
    """A step of whose per-sample gradients only as many are multiplied out at once as memory holds.

    The whole of a tensor is multiplied out, as it is where all of its weights are asked about, but
    of a few samples at a time where only some weights are kept: their bits are the same.

    Args:
        observers: of the run.
        step: its number; that of the state where there is no step.
        before: leaves of the state, or what is to be looked at of them.
        replayed: the step; None for a state alone.
        memory: bytes that are multiplied out at once; one sample at least.
    """

    def __init__(self, observers: Observers, step: int, before: Any, replayed: Any, *, memory: int):
        super().__init__(observers, step, before, replayed)
        self._memory = memory

    def get(self, scan: Scan, part: Part | None, offset: int = 0) -> Any:
        """Return a quantity; neighbouring weights as a slice, that tiles share an executable."""
        if scan.source or part is None or not isinstance(part.indices, range):
            return super().get(scan, part, offset)
        if "position" in scan.dims:
            return super().get(scan, part, offset)
        key = (scan.quantity, "", "", part, offset)
        if key not in self._known:
            whole = self.get(scan, Part(part.path, part.shape), offset)
            self._known[key] = _columns(whole, part.indices)
        return self._known[key]

    def _sample_grads(self, scan, part, offset):
        chosen, size = part.indices or (), self.observers.signature.batch_size
        each = 4 * math.prod(part.shape)
        if len(chosen) <= FEW_WEIGHTS or each * size <= self._memory:
            return super()._sample_grads(scan, part, offset)
        rows, found = [], []
        for carried, occurrences in self.parts(self.observers.tensor[part.path]):
            rows.append(np.asarray(occurrences) % size)
            for a, b in chunks(len(rows[-1]), max(1, self._memory // each)):
                some = jax.tree.map(lambda x, a=a, b=b: x[a:b], carried.payload)
                found.append(_columns(_multiplied(carried.form, some), chosen, 1))
        whole = jnp.concatenate(found)
        return jnp.zeros((size, len(chosen)), whole.dtype).at[np.concatenate(rows)].set(whole)

    def _of(self, data, ids, size):
        frame = super()._of(data, ids, size)
        return Sparing(self.observers, self.step, self.before, frame.replayed, memory=self._memory)


@functools.partial(jax.jit, static_argnums=0)
def _multiplied(form, payload):
    return gradients_of(form, payload).materialised()


def _columns(whole: Any, indices: Sequence[int], rows: int = 0) -> Any:
    """Return chosen weights; along the first `rows` axes all of them."""
    if isinstance(indices, range):
        return _slice(whole, np.int32(indices.start), len(indices), rows)
    return _gather(whole, np.asarray(indices, np.int32), rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(whole, start, size, rows):
    flat = whole.reshape(*whole.shape[:rows], -1)
    return jax.lax.dynamic_slice_in_dim(flat, start, size, rows)


@functools.partial(jax.jit, static_argnums=2)
def _gather(whole, indices, rows):
    return jnp.take(whole.reshape(*whole.shape[:rows], -1), indices, rows)
