"""The per-sample gradients of one tensor over some samples, and what is asked of them.

Gradients come in three forms: `Factored` (the factors of one meeting, each element of the tensor
once), `Combined` (factors that are multiplied out one sample at a time, because uses overlap or
are combined) and `Materialised`. `plan` chooses one for every tensor; `explain` shows it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replay.grads.factors import Factor, Moves, Outer, Rows, Whole, move
from replay.grads.taps import Elements, Meeting
from replay.kernels import square_sum, top_k

# What can be asked of one element of a gradient.
OF: dict[str, Callable[[Any], Any]] = {
    "value": lambda g: g,
    "magnitude": jnp.abs,
    "square": jnp.square,
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What is known of a tensor's gradients before there are any; equal forms share executables.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        way: `rule` (factors of one meeting), `direct` (materialised, no larger than what it is
            made of), `factors` (multiplied out one sample at a time), `zero` (the loss does not
            depend on it), or `whole` (materialised, because the strategy says so).
        kind: for `rule`, the class of the factor: `Outer` or `Rows`.
        value: for `rule`, the shape of the value that meets the data.
        moves: for `rule`, how a multiplied-out factor becomes that value.
        places: for `rule`, little-endian `int32`: where each element of the tensor stands in the
            value, -1 for nowhere; None where the value is the tensor, reshaped.
        alone: whether no other tensor is part of that value.
    """

    shape: tuple[int, ...]
    dtype: str
    way: str
    kind: str = ""
    value: tuple[int, ...] = ()
    moves: Moves = ()
    places: bytes | None = None
    alone: bool = True

    @property
    def wide(self) -> Any:
        """The dtype of results: that of the tensor, or float32 where that is narrower."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def pick(self, per_value: Any) -> Any:
        """Turn a result for each element of the meeting's value into one for the tensor's."""
        flat = per_value.reshape(-1)
        if self.places is None:
            return flat.reshape(self.shape)
        places = np.frombuffer(self.places, "<i4")
        return jnp.where(places < 0, 0, flat[np.maximum(places, 0)]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter tensor and the way its per-sample gradients are had.

    Attributes:
        path: name of the tensor.
        form: what is known of its gradients.
        meetings: numbers of the meetings that it takes part in.
        reason: why the way is not `rule`; empty where it is.
        box: the part of the meeting's `Outer` that is the tensor's own, as `(first, stop)` of each
            axis of its product; None for all of it.
    """

    path: str
    form: Form
    meetings: tuple[int, ...] = ()
    reason: str = ""
    box: tuple[tuple[int, int], ...] | None = None

    def cut(self, factor: Any) -> Any:
        """Return the tensor's own part of the factor of its meeting."""
        if self.box is None:
            return factor
        (b, b_stop), (i, i_stop), (j, j_stop) = self.box
        left, right = factor
        return Outer(left[b:b_stop, :, i:i_stop], right[b:b_stop, :, j:j_stop])


def plan(
    meetings: Sequence[Meeting],
    factors: Sequence[Factor],
    structs: Sequence[Any],
    paths: Sequence[str],
) -> tuple[Tensor, ...]:
    """Choose a way for every tensor; `factors` are the shapes of the meetings' factors."""
    kinds = [type(factor) for factor in factors]
    offsets = np.cumsum([0] + [math.prod(x.shape) for x in structs])
    tensors = []
    for number, (struct, path) in enumerate(zip(structs, paths, strict=True)):
        mine = [i for i, meeting in enumerate(meetings) if number in meeting.leaves]
        form = Form(tuple(struct.shape), str(struct.dtype), "factors")
        reason, box = "", None
        if not mine:
            form, reason = _way(form, "zero"), "the loss does not depend on it"
        elif all(kinds[i] is Whole for i in mine):
            form = _way(form, "direct")
            reason = "its gradients are no larger than what they are made of"
        elif len(mine) > 1:
            used = ", ".join(sorted({meetings[i].operation for i in mine}))
            reason = f"it is used {len(mine)} times ({used})"
        elif (source := meetings[mine[0]].source) is None:
            reason = "it is combined with other values before it meets the data"
        else:
            places, repeated = _places(source, offsets[number], math.prod(struct.shape))
            if repeated:
                reason = "its elements are repeated before they meet the data"
            else:
                form = dataclasses.replace(
                    form,
                    way="rule",
                    kind=kinds[mine[0]].__name__,
                    value=tuple(meetings[mine[0]].shape),
                    moves=meetings[mine[0]].moves,
                    places=places,
                    alone=len(meetings[mine[0]].leaves) == 1,
                )
                box = _box(form, factors[mine[0]])
                if box is not None:
                    moves = (("reshape", form.shape),)
                    form = dataclasses.replace(
                        form, value=form.shape, moves=moves, places=None, alone=True
                    )
        tensors.append(Tensor(path, form, tuple(mine), reason, box))
    return tuple(tensors)


def _places(source: Any, start: int, size: int) -> tuple[bytes | None, bool]:
    """Return where a tensor's elements stand in a value, None for in their order, and if twice."""
    if isinstance(source, Elements) and source.start == start and math.prod(source.shape) == size:
        return None, False  # the rule, and cheap however large
    flat = np.asarray(source).reshape(-1)
    inside = np.flatnonzero((flat >= start) & (flat < start + size))
    elements = flat[inside] - start
    places = np.full(size, -1, "<i4")
    places[elements] = inside
    if (places >= 0).sum() < len(elements):
        return None, True
    return None if np.array_equal(places, np.arange(flat.size)) else places.tobytes(), False


def _box(form: Form, factor: Factor) -> tuple[tuple[int, int], ...] | None:
    """Return which neighbouring rows and columns of a product are a tensor, in their order."""
    if form.places is None or not isinstance(factor, Outer):
        return None
    places = np.frombuffer(form.places, "<i4")
    if (places < 0).any():
        return None
    (b, _, i), j = factor.left.shape, factor.right.shape[2]
    product = np.arange(b * i * j).reshape(b, i, j)
    numbers = move(product, form.moves).reshape(-1)[places]
    axes = np.unravel_index(numbers, product.shape)
    box = tuple((int(axis.min()), int(axis.max()) + 1) for axis in axes)
    inside = product[tuple(slice(*bounds) for bounds in box)].reshape(-1)
    return box if np.array_equal(inside, numbers) else None


def _way(form: Form, way: str) -> Form:
    return dataclasses.replace(form, way=way)


class Gradients:
    """The gradients of one tensor over `size` samples; everything is built on `one`.

    Attributes:
        form: what is known of them.
        size: the number of samples.
        layout: shape in which running results are kept; `settle` turns it into the tensor's.
    """

    def __init__(self, form: Form, size: int):
        self.form, self.size = form, size
        self.layout = form.shape

    def samples(self) -> Any:
        """Return what `one` takes, with a leading axis of samples."""
        raise NotImplementedError

    def one(self, sample: Any) -> Any:
        """Return the gradient of one sample, in the tensor's shape."""
        raise NotImplementedError

    def laid_out(self, sample: Any) -> Any:
        """Return the gradient of one sample, in the layout."""
        return self.one(sample)

    def materialised(self) -> Any:
        """Return all gradients, `[samples, *shape]`."""
        return jax.vmap(self.one)(self.samples())

    def fold(self, update: Callable[..., Any], state: Any, *along: Any) -> Any:
        """Fold `update(state, gradient in the layout, *along)` over the samples, one at a time."""

        def step(state, sample):
            parts, rest = sample
            return update(state, self.laid_out(parts), *rest), None

        if self.size == 1:
            first = jax.tree.map(lambda x: x[0], (self.samples(), along))
            return step(state, first)[0]
        return lax.scan(step, state, (self.samples(), along))[0]

    def map(self, function: Callable[[Any], Any]) -> Any:
        """Apply a function to the gradient of every sample, one at a time."""
        return lax.map(lambda sample: function(self.one(sample)), self.samples())

    def square_norms(self) -> Any:
        """Return the squared norm of each sample's gradient, `[samples]`."""
        return self.map(lambda gradient: jnp.square(gradient).sum())

    def dots(self, direction: Any) -> Any:
        """Return the dot product of each sample's gradient with a direction, `[samples]`."""
        direction = direction.astype(self.form.wide)
        return self.map(lambda gradient: jnp.vdot(gradient, direction))

    def gram(self, other: "Gradients") -> Any:
        """Return all dot products with the gradients of other samples, `[samples, others]`."""
        return other.map(self.dots).T

    def total(self, of: str) -> Any:
        """Return the sum over samples of what `OF` names, in the layout."""
        blank = jnp.zeros(self.layout, self.form.wide)
        return self.fold(lambda total, gradient: total + OF[of](gradient), blank)

    def largest(self, of: str, sign: int = 1) -> Any:
        """Return the largest over samples of `sign` times what `OF` names, in the layout."""
        blank = jnp.full(self.layout, -jnp.inf, self.form.wide)
        return self.fold(lambda best, g: jnp.maximum(best, sign * OF[of](g)), blank)

    def kernel_factors(self) -> Outer | None:
        """Return the gradients as factors in float32, where a kernel can read them.

        `left` is `[samples, b, t, i]` and `right` `[samples, b, t, j]`; `b · i · j` is the size of
        the layout.
        """
        return None


def settle(form: Form, layout: tuple[int, ...], result: Any) -> Any:
    """Turn a running result `[..., *layout]` into the shape of the tensor, `[..., *shape]`."""
    if layout == form.shape:
        return result
    leading = result.ndim - len(layout)
    function = lambda x: form.pick(move(x, form.moves))  # noqa: E731
    for _ in range(leading):
        function = jax.vmap(function)
    return function(result)


class Nothing(Gradients):
    """Of a tensor that the loss does not depend on."""

    def samples(self) -> Any:
        """Return numbers, which stand for nothing."""
        return jnp.arange(self.size)

    def one(self, sample: Any) -> Any:
        """Return zeros."""
        return jnp.zeros(self.form.shape, self.form.wide)


class Materialised(Gradients):
    """Gradients as they are.

    Args:
        form: of the tensor.
        rows: `[samples, *shape]`.
    """

    def __init__(self, form: Form, rows: Any):
        super().__init__(form, rows.shape[0])
        self._rows = rows.astype(form.wide)

    def samples(self) -> Any:
        """Return the rows."""
        return self._rows

    def one(self, sample: Any) -> Any:
        """Return a row."""
        return sample

    def square_norms(self) -> Any:
        """Return the squared norm of each sample's gradient, `[samples]`."""
        return jnp.square(self._rows).reshape(self.size, -1).sum(axis=1)

    def dots(self, direction: Any) -> Any:
        """Return the dot product of each sample's gradient with a direction, `[samples]`."""
        return self._rows.reshape(self.size, -1) @ direction.astype(self.form.wide).reshape(-1)

    def gram(self, other: Gradients) -> Any:
        """Return all dot products with the gradients of other samples, `[samples, others]`."""
        if isinstance(other, Materialised):
            return self._rows.reshape(self.size, -1) @ other._rows.reshape(other.size, -1).T
        return super().gram(other)

    def total(self, of: str) -> Any:
        """Return the sum over samples of what `OF` names."""
        return OF[of](self._rows).sum(axis=0)

    def largest(self, of: str, sign: int = 1) -> Any:
        """Return the largest over samples of `sign` times what `OF` names."""
        return (sign * OF[of](self._rows)).max(axis=0)

    def kernel_factors(self) -> Outer | None:
        """Return the rows, each times one."""
        if self.form.wide != jnp.float32:
            return None
        return Outer(*top_k.from_rows(self._rows.reshape(self.size, -1)))


class Factored(Gradients):
    """Gradients as the factors of the one meeting that every element takes part in once.

    Args:
        form: of the tensor, its way `rule`.
        factor: `Outer` or `Rows`, with a leading axis of samples.
    """

    def __init__(self, form: Form, factor: Outer | Rows):
        super().__init__(form, factor.right.shape[0])
        self.factor = factor
        self.outer: Outer | None = None
        if isinstance(factor, Outer):
            left, right = factor.left.astype(form.wide), factor.right.astype(form.wide)
            self.factor = self.outer = Outer(left, right)
            if form.places is None:
                self.layout = (left.shape[1], left.shape[3], right.shape[3])

    @property
    def rank_one(self) -> bool:
        """Whether the gradient of each sample is an outer product of two vectors."""
        return self.outer is not None and self.outer.left.shape[2] == 1

    def samples(self) -> Any:
        """Return the factors."""
        return self.factor

    def one(self, sample: Any) -> Any:
        """Multiply out the factors of one sample."""
        return self.form.pick(multiplied(self.form, sample))

    def laid_out(self, sample: Any) -> Any:
        """Return the gradient of one sample, in the layout."""
        if self.layout == self.form.shape or not isinstance(sample, Outer):
            return self.one(sample)
        return _product(sample)

    def square_norms(self) -> Any:
        """Return the squared norm of each sample's gradient, `[samples]`."""
        if not self.form.alone:
            return super().square_norms()
        if self.outer is None:
            index, right = self.factor
            inside = (index >= 0) & (index < self.form.value[0])
            same = (index[:, :, None] == index[:, None, :]) & inside[:, :, None]
            products = jnp.einsum("nti,nsi->nts", right, right).astype(self.form.wide)
            return jnp.where(same, products, 0).sum(axis=(1, 2))
        left, right = self.outer
        times, i, j = left.shape[2], left.shape[3], right.shape[3]
        if times == 1:
            return jnp.einsum("nbti,nbtj->n", jnp.square(left), jnp.square(right))
        if times * (i + j) < i * j:
            return jnp.einsum(
                "nbts,nbts->n",
                jnp.einsum("nbti,nbsi->nbts", left, left),
                jnp.einsum("nbti,nbsi->nbts", right, right),
            )
        return super().square_norms()

    def dots(self, direction: Any) -> Any:
        """Return the dot product of each sample's gradient with a direction, `[samples]`."""
        if self.form.places is not None:
            return super().dots(direction)
        direction = direction.astype(self.form.wide).reshape(self.form.value)
        return dots_of(self.form.moves, self.factor, direction)

    def gram(self, other: Gradients) -> Any:
        """Return all dot products with the gradients of other samples, `[samples, others]`."""
        if not isinstance(other, Factored) or not self.form.alone:
            return super().gram(other)
        if self.outer is None or other.outer is None:
            return lax.map(self._dots_of_rows, other.factor).T
        mine, theirs = self.outer, other.outer
        (b, times, i), j = mine.left.shape[1:], mine.right.shape[3]
        if self.rank_one and other.rank_one and b == 1:  # as one product of matrices each
            lefts, rights = (x[:, 0, 0] @ y[:, 0, 0].T for x, y in zip(mine, theirs, strict=True))
            return lefts * rights
        if self.rank_one and other.rank_one:
            lefts = jnp.einsum("nbti,mbti->nmb", mine.left, theirs.left)
            rights = jnp.einsum("nbti,mbti->nmb", mine.right, theirs.right)
            return jnp.einsum("nmb,nmb->nm", lefts, rights)
        if times * (i + j) < i * j:

            def dots(sample):
                lefts = jnp.einsum("nbti,bsi->nbts", mine.left, sample.left)
                rights = jnp.einsum("nbti,bsi->nbts", mine.right, sample.right)
                return jnp.einsum("nbts,nbts->n", lefts, rights)

            return lax.map(dots, theirs).T
        # Multiplied out, they take no more memory than their factors.
        whole, others = (Materialised(self.form, x.materialised()) for x in (self, other))
        return whole.gram(others)

    def _dots_of_rows(self, sample: Rows) -> Any:
        """Return the dot products with one gradient that has rows where an index says."""
        index, right = self.factor
        inside = (index >= 0) & (index < self.form.value[0])
        same = (index[:, :, None] == sample.index[None, None, :]) & inside[:, :, None]
        products = jnp.einsum("nti,si->nts", right, sample.right).astype(self.form.wide)
        return jnp.where(same, products, 0).sum(axis=(1, 2))

    def total(self, of: str) -> Any:
        """Return the sum over samples of what `OF` names, in the layout."""
        if self.outer is None or self.form.places is not None:
            return super().total(of)
        left, right = self.outer
        if of == "value" and left.shape[1] == 1:
            return jnp.einsum("nti,ntj->ij", left[:, 0], right[:, 0])[None]
        if of == "value":
            return jnp.einsum("nbti,nbtj->bij", left, right)
        blank = jnp.zeros(self.layout, self.form.wide)
        return square_sum.xla(blank, left, right, power={"magnitude": 1, "square": 2}[of])

    def largest(self, of: str, sign: int = 1) -> Any:
        """Return the largest over samples of `sign` times what `OF` names, in the layout."""
        factors = self.kernel_factors()
        if factors is None or of != "magnitude" or sign != 1:
            return super().largest(of, sign)
        return top_k.largest(*factors)

    def kernel_factors(self) -> Outer | None:
        """Return the factors, where the layout is that of their product."""
        if self.form.places is not None or self.form.wide != jnp.float32:
            return None
        return self.outer


class Combined(Gradients):
    """Gradients multiplied out one sample at a time from the factors of several meetings.

    Args:
        form: of the tensor.
        number: of its leaf.
        meetings: those that it takes part in.
        factors: theirs, with a leading axis of samples.
        parameters: all parameter leaves.
    """

    def __init__(
        self,
        form: Form,
        number: int,
        meetings: Sequence[Meeting],
        factors: Sequence[Factor],
        parameters: Sequence[Any],
    ):
        super().__init__(form, jax.tree.leaves(factors)[0].shape[0])
        self._number, self._meetings = number, meetings
        self._factors, self._parameters = list(factors), parameters

    def samples(self) -> Any:
        """Return the factors."""
        return self._factors

    def one(self, sample: Any) -> Any:
        """Multiply out each meeting's factors, and apply the chain rule to what meets."""
        total = jnp.zeros(self.form.shape, self.form.wide)
        for meeting, factor in zip(self._meetings, sample, strict=True):
            value, pull = jax.vjp(self._make(meeting), self._parameters[self._number])
            form = Form((), "float32", "", value=tuple(meeting.shape), moves=meeting.moves)
            total += pull(multiplied(form, factor).astype(value.dtype))[0].astype(self.form.wide)
        return total

    def dots(self, direction: Any) -> Any:
        """Return the dot product of each sample's gradient with a direction, `[samples]`."""
        total = jnp.zeros(self.size, self.form.wide)
        leaf = self._parameters[self._number]
        for meeting, factor in zip(self._meetings, self._factors, strict=True):
            _, pushed = jax.jvp(self._make(meeting), (leaf,), (direction.astype(leaf.dtype),))
            dtype = jnp.promote_types(pushed.dtype, self.form.wide)
            total += dots_of(meeting.moves, factor, pushed.astype(dtype)).real
        return total

    def _make(self, meeting: Meeting) -> Callable[[Any], Any]:
        def make(leaf):
            leaves = list(self._parameters)
            leaves[self._number] = leaf
            return meeting.make(leaves)

        return make


def _product(outer: Outer) -> Any:
    dtype = jnp.promote_types(outer.left.dtype, jnp.float32)
    return jnp.einsum("bti,btj->bij", outer.left.astype(dtype), outer.right.astype(dtype))


def multiplied(form: Form, factor: Factor) -> Any:
    """Return the gradient of one sample with respect to a meeting's value."""
    if isinstance(factor, Outer):
        return move(_product(factor), form.moves)
    if isinstance(factor, Rows):
        right = factor.right.astype(jnp.promote_types(factor.right.dtype, jnp.float32))
        table = jnp.zeros((form.value[0], right.shape[1]), right.dtype)
        return move(table.at[factor.index].add(right, mode="drop"), form.moves)
    return factor.value


def dots_of(moves: Moves, factor: Factor, direction: Any) -> Any:
    """Return the dot products of a meeting's gradients with a direction in its value's space."""
    dtype = direction.dtype
    if isinstance(factor, Outer):
        left, right = factor.left.astype(dtype), factor.right.astype(dtype)
        blank = jax.ShapeDtypeStruct((left.shape[1], left.shape[3], right.shape[3]), dtype)
        (back,) = jax.linear_transpose(lambda x: move(x, moves), blank)(direction)
        # Of sequences einsum multiplies `left` first, and keeps `right` until then, in more memory.
        # With i > j, as in convolutions, this way would be slower.
        if left.shape[2] > 1 and left.shape[3] <= right.shape[3]:
            return (jnp.einsum("nbtj,bij->nbti", right, back) * left).sum(axis=(1, 2, 3))
        return jnp.einsum("nbti,bij,nbtj->n", left, back, right)
    if isinstance(factor, Rows):
        index, right = factor
        rows = direction.reshape(direction.shape[0], -1)
        inside = (index >= 0) & (index < rows.shape[0])
        chosen = jnp.where(inside[..., None], rows[jnp.clip(index, 0, rows.shape[0] - 1)], 0)
        return jnp.einsum("nti,nti->n", chosen, right.astype(dtype))
    size = factor.value.shape[0]
    return factor.value.reshape(size, -1).astype(dtype) @ direction.reshape(-1)
