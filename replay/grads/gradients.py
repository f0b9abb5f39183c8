"""The per-sample gradients of one parameter tensor, held as factors, and what is asked of them.

Each tensor takes one of four paths, shown by `explain`: `rule` (the factors of one meeting, each
element of the tensor once), `direct` (gradients no larger than what they are made of), `factors`
(materialised one sample at a time from the factors, because uses overlap or are combined) and
`zero` (the loss does not depend on it).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replay.grads.taps import Factor, Meeting, Outer, Rows, Whole, move


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter tensor and the way its per-sample gradients are had.

    Attributes:
        number: of its leaf.
        path: name of the tensor.
        struct: shape and dtype.
        meetings: numbers of the meetings that it takes part in.
        way: `rule`, `direct`, `factors` or `zero`.
        reason: why it is not `rule`; empty where it is.
        place: for `rule`, where each element stands in the meeting's value, -1 for nowhere; None
            where the value is the tensor, reshaped.
    """

    number: int
    path: str
    struct: jax.ShapeDtypeStruct
    meetings: tuple[int, ...]
    way: str
    reason: str
    place: np.ndarray | None = None


def plan(
    meetings: Sequence[Meeting], kinds: Sequence[type], structs: Sequence[Any], paths: Sequence[str]
) -> tuple[Tensor, ...]:
    """Choose a way for every tensor; `kinds` are the classes of the meetings' factors."""
    offsets = np.cumsum([0] + [math.prod(x.shape) for x in structs])
    tensors = []
    for number, (struct, path) in enumerate(zip(structs, paths, strict=True)):
        mine = [i for i, meeting in enumerate(meetings) if number in meeting.leaves]
        way, reason = "factors", ""
        place: np.ndarray | None = None
        if not mine:
            way, reason = "zero", "the loss does not depend on it"
        elif all(kinds[i] is Whole for i in mine):
            way, reason = "direct", "its gradients are no larger than what they are made of"
        elif len(mine) > 1:
            used = ", ".join(sorted({meetings[i].operation for i in mine}))
            reason = f"it is used {len(mine)} times ({used})"
        elif (source := meetings[mine[0]].source) is None:
            reason = "it is combined with other values before it meets the data"
        else:
            flat = source.reshape(-1)
            inside = np.flatnonzero((flat >= offsets[number]) & (flat < offsets[number + 1]))
            elements = flat[inside] - offsets[number]
            if len(np.unique(elements)) < len(elements):
                reason = "its elements are repeated before they meet the data"
            else:
                way = "rule"
                place = np.full(math.prod(struct.shape), -1, np.int32)
                place[elements] = inside
                if np.array_equal(place, np.arange(flat.size)):
                    place = None
        tensors.append(Tensor(number, path, struct, tuple(mine), way, reason, place))
    return tuple(tensors)


def value_of(meeting: Meeting, factor: Factor) -> Any:
    """Return the gradient of one sample with respect to a meeting's value, in float32 or wider."""
    if isinstance(factor, Outer):
        dtype = jnp.promote_types(factor.left.dtype, jnp.float32)
        left, right = factor.left.astype(dtype), factor.right.astype(dtype)
        return move(jnp.einsum("bti,btj->bij", left, right), meeting.moves)
    if isinstance(factor, Rows):
        right = factor.right.astype(jnp.promote_types(factor.right.dtype, jnp.float32))
        table = jnp.zeros((meeting.shape[0], right.shape[1]), right.dtype)
        return move(table.at[factor.index].add(right, mode="drop"), meeting.moves)
    return factor.value


class Gradients:
    """The per-sample gradients of one tensor over a batch.

    Args:
        tensor: its plan.
        meetings: all meetings of the loss.
        factors: their factors, with a leading batch axis.
        parameters: all parameter leaves.
        size: the number of samples.
    """

    def __init__(
        self,
        tensor: Tensor,
        meetings: Sequence[Meeting],
        factors: Sequence[Factor],
        parameters: Sequence[Any],
        size: int,
    ):
        self.tensor, self.size = tensor, size
        self._meetings = [meetings[i] for i in tensor.meetings]
        self._factors = [factors[i] for i in tensor.meetings]
        self._parameters = parameters
        self.dtype = jnp.promote_types(tensor.struct.dtype, jnp.float32)

    def pick(self, per_value: Any) -> Any:
        """Turn a result for each element of the meeting's value into one for the tensor's."""
        shape, place = self.tensor.struct.shape, self.tensor.place
        flat = per_value.reshape(-1)
        if place is None:
            return flat.reshape(shape)
        return jnp.where(place < 0, 0, flat[np.maximum(place, 0)]).reshape(shape)

    def one(self, factors: Sequence[Factor]) -> Any:
        """Return the gradient of one sample from its factors."""
        if self.tensor.way == "rule":
            return self.pick(value_of(self._meetings[0], factors[0]))
        total = jnp.zeros(self.tensor.struct.shape, self.dtype)
        for meeting, factor in zip(self._meetings, factors, strict=True):
            total += self._pull(meeting, value_of(meeting, factor))
        return total

    def _pull(self, meeting: Meeting, cotangent: Any) -> Any:
        """Apply the chain rule from a value made of parameters to this tensor."""
        number = self.tensor.number

        def make(leaf):
            leaves = list(self._parameters)
            leaves[number] = leaf
            return meeting.make(leaves)

        value, pull = jax.vjp(make, self._parameters[number])
        return pull(cotangent.astype(value.dtype))[0].astype(self.dtype)

    def materialised(self) -> Any:
        """Return all gradients, `[batch, *shape]`."""
        if self.tensor.way == "zero":
            return jnp.zeros((self.size, *self.tensor.struct.shape), self.dtype)
        return jax.vmap(self.one)(self._factors)

    def fold(self, update: Callable[[Any, Any, Any], Any], state: Any) -> Any:
        """Fold `update(state, gradient, position)` over the samples, one gradient at a time."""

        def step(state, sample):
            factors, position = sample
            return update(state, self.one(factors), position), None

        positions = jnp.arange(self.size, dtype=jnp.int32)
        if self.tensor.way == "zero":
            zero = jnp.zeros(self.tensor.struct.shape, self.dtype)
            return lax.scan(lambda s, i: (update(s, zero, i), None), state, positions)[0]
        return lax.scan(step, state, (self._factors, positions))[0]

    def map(self, function: Callable[[Any], Any]) -> Any:
        """Apply a function to the gradient of every sample, one at a time."""
        if self.tensor.way == "zero":
            zero = jnp.zeros(self.tensor.struct.shape, self.dtype)
            return jax.vmap(lambda _: function(zero))(jnp.arange(self.size))
        return lax.map(lambda factors: function(self.one(factors)), self._factors)

    def _outer(self) -> Outer | None:
        """Return the factors `[n, b, t, i]` and `[n, b, t, j]`, where a rule may use them."""
        if self.tensor.way != "rule" or not isinstance(self._factors[0], Outer):
            return None
        left, right = self._factors[0]
        return Outer(left.astype(self.dtype), right.astype(self.dtype))

    @property
    def whole(self) -> bool:
        """Whether the tensor is the whole of the value that meets the data."""
        return self.tensor.way == "rule" and len(self._meetings[0].leaves) == 1

    def square_norms(self) -> Any:
        """Return the squared norm of each sample's gradient, `[batch]`."""
        if self.tensor.way == "direct":
            return jnp.square(self.materialised()).reshape(self.size, -1).sum(axis=1)
        outer = self._outer()
        if outer is not None and self.whole:
            left, right = outer
            times, i, j = left.shape[2], left.shape[3], right.shape[3]
            if times == 1:
                return jnp.einsum("nbti,nbtj->n", jnp.square(left), jnp.square(right))
            if times * (i + j) < i * j:
                ones = jnp.einsum("nbti,nbsi->nbts", left, left)
                return jnp.einsum("nbts,nbts->n", ones, jnp.einsum("nbti,nbsi->nbts", right, right))
        if self.whole and isinstance(self._factors[0], Rows):
            index, right = self._factors[0]
            rows = self._meetings[0].shape[0]
            inside = (index >= 0) & (index < rows)
            same = (index[:, :, None] == index[:, None, :]) & inside[:, :, None]
            products = jnp.einsum("nti,nsi->nts", right, right).astype(self.dtype)
            return jnp.where(same, products, 0).sum(axis=(1, 2))
        return self.map(lambda gradient: jnp.square(gradient).sum())

    def dots(self, direction: Any) -> Any:
        """Return the dot product of each sample's gradient with a direction, `[batch]`."""
        direction = direction.astype(self.dtype)
        total = jnp.zeros(self.size, self.dtype)
        number = self.tensor.number
        for meeting, factor in zip(self._meetings, self._factors, strict=True):

            def make(leaf, meeting=meeting):
                leaves = list(self._parameters)
                leaves[number] = leaf
                return meeting.make(leaves)

            leaf = self._parameters[number]
            _, pushed = jax.jvp(make, (leaf,), (direction.astype(leaf.dtype),))
            dtype = jnp.promote_types(pushed.dtype, self.dtype)
            total += _dots(meeting, factor, pushed.astype(dtype), dtype).real
        return total

    def square_sum(self) -> Any:
        """Return the sum over samples of each weight's squared gradient."""
        outer = self._outer()
        if outer is not None and outer.left.shape[2] == 1:
            return self._per_weight(
                "nbti,nbtj->bij", jnp.square(outer.left), jnp.square(outer.right)
            )
        if self.tensor.way == "direct":
            return jnp.square(self.materialised()).sum(axis=0)
        return self.fold(lambda total, gradient, _: total + jnp.square(gradient), self._zeros())

    def abs_sum(self) -> Any:
        """Return the sum over samples of each weight's |gradient|."""
        outer = self._outer()
        if outer is not None and outer.left.shape[2] == 1:
            return self._per_weight("nbti,nbtj->bij", jnp.abs(outer.left), jnp.abs(outer.right))
        if self.tensor.way == "direct":
            return jnp.abs(self.materialised()).sum(axis=0)
        return self.fold(lambda total, gradient, _: total + jnp.abs(gradient), self._zeros())

    def max(self) -> Any:
        """Return the largest |gradient| of each weight over the samples."""
        if self.tensor.way == "direct":
            return jnp.abs(self.materialised()).max(axis=0)
        return self.fold(lambda best, g, _: jnp.maximum(best, jnp.abs(g)), self._zeros())

    def top_k(self, k: int) -> tuple[Any, Any]:
        """Return the `k` largest |gradient| of each weight and whose they are.

        Returns:
            `[k, *shape]` values in falling order, and `int32[k, *shape]` positions in the batch;
            of equal values the first sample comes first; -1 and `-inf` where there is none.
        """
        shape = (k, *self.tensor.struct.shape)

        def insert(state, gradient, position):
            values, positions = state
            new = jnp.broadcast_to(jnp.abs(gradient), shape)
            rank = jnp.broadcast_to(jnp.sum(values >= new, axis=0), shape)
            place = lax.broadcasted_iota(rank.dtype, shape, 0)
            above = jnp.concatenate([values[:1], values[:-1]])
            whose = jnp.concatenate([positions[:1], positions[:-1]])
            values = jnp.where(place < rank, values, jnp.where(place == rank, new, above))
            here = jnp.where(place == rank, position, whose)
            return values, jnp.where(place < rank, positions, here)

        empty = jnp.full(shape, -jnp.inf, self.dtype), jnp.full(shape, -1, jnp.int32)
        return self.fold(insert, empty)

    def _per_weight(self, equation: str, left: Any, right: Any) -> Any:
        return self.pick(move(jnp.einsum(equation, left, right), self._meetings[0].moves))

    def _zeros(self) -> Any:
        return jnp.zeros(self.tensor.struct.shape, self.dtype)


def _dots(meeting: Meeting, factor: Factor, direction: Any, dtype: Any) -> Any:
    """Return the dot products of a meeting's gradients with a direction in its value's space."""
    if isinstance(factor, Outer):
        left, right = factor.left.astype(dtype), factor.right.astype(dtype)
        blank = jax.ShapeDtypeStruct((left.shape[1], left.shape[3], right.shape[3]), dtype)
        (back,) = jax.linear_transpose(lambda x: move(x, meeting.moves), blank)(direction)
        return jnp.einsum("nbti,bij,nbtj->n", left, back, right)
    if isinstance(factor, Rows):
        index, right = factor
        rows = direction.reshape(direction.shape[0], -1)
        inside = (index >= 0) & (index < rows.shape[0])
        chosen = jnp.where(inside[..., None], rows[jnp.clip(index, 0, rows.shape[0] - 1)], 0)
        return jnp.einsum("nti,nti->n", chosen, right.astype(dtype))
    size = factor.value.shape[0]
    return factor.value.reshape(size, -1).astype(dtype) @ direction.reshape(-1)


def grams(one: "Gradients", other: "Gradients") -> Any:
    """Return all dot products between the gradients of two batches, `[batch, other batch]`."""
    mine, theirs = one._outer(), other._outer()
    if one.whole and mine is not None and theirs is not None and mine.left.shape[2] == 1:
        lefts = jnp.einsum("nbti,mbti->nmb", mine.left, theirs.left)
        return jnp.einsum(
            "nmb,nmb->nm", lefts, jnp.einsum("nbti,mbti->nmb", mine.right, theirs.right)
        )
    return other.map(one.dots).T
