"""What is asked of per-sample gradients, as states that take samples one after the other and merge.

A running state belongs to one tensor; `step` takes the next samples, `merge` joins the state of
earlier samples with that of later ones. Sums of floating-point numbers depend on their order, so
the order is fixed (`Blocks`): a left fold within aligned blocks of steps, of which a few go as one
where the gradient of a sample is one product, then one binary tree over the blocks. An answer put
together from the states of blocks has the bits of a fresh one. What is `exact` (maxima, rankings,
counts) is the same in any order, and runs on from block to block: after many samples a ranking
rarely changes, and is the cheaper for it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from replay.errors import ProgramError
from replay.grads.factors import Outer
from replay.grads.gradients import OF, Form, Gradients, settle
from replay.kernels import top_k

BLOCK_STEPS = 64


def _check(of: str, known: Sequence[str]) -> None:
    if of not in known:
        raise ProgramError(
            f"there is no {of!r} of a gradient",
            why="a reduction looks at the gradient g itself, at |g| or at g squared",
            fix=f"one of {', '.join(map(repr, known))}",
        )


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum over samples of g (`value`), |g| (`magnitude`) or g² (`square`), for each weight."""

    of: str = "value"

    exact = False  # whether the order of folds and merges has no say

    def __post_init__(self):
        _check(self.of, ("value", "magnitude", "square"))

    def init(self, layout: tuple[int, ...], dtype: Any) -> Any:
        """Return the state before any sample."""
        return jnp.zeros(layout, dtype)

    def step(self, state: Any, gradients: Gradients, occurrences: Any) -> Any:
        """Take some samples; `occurrences` are their numbers, `int32[samples]`."""
        return state + gradients.total(self.of)

    def merge(self, first: Any, second: Any) -> Any:
        """Join the state of earlier samples with that of later ones."""
        return first + second

    def final(self, form: Form, layout: tuple[int, ...], state: Any) -> Any:
        """Return the answer, in the tensor's shape."""
        return settle(form, layout, state)


@dataclasses.dataclass(frozen=True)
class Max:
    """The largest g (`value`) or |g| (`magnitude`) over samples, for each weight; NaN wins."""

    of: str = "magnitude"

    exact = True

    def __post_init__(self):
        _check(self.of, ("value", "magnitude"))

    def init(self, layout: tuple[int, ...], dtype: Any) -> Any:
        """Return the state before any sample."""
        return jnp.full(layout, -jnp.inf, dtype)

    def step(self, state: Any, gradients: Gradients, occurrences: Any) -> Any:
        """Take some samples."""
        return jnp.maximum(state, gradients.largest(self.of))

    def merge(self, first: Any, second: Any) -> Any:
        """Join the state of earlier samples with that of later ones."""
        return jnp.maximum(first, second)

    def final(self, form: Form, layout: tuple[int, ...], state: Any) -> Any:
        """Return the answer, in the tensor's shape."""
        return settle(form, layout, state)


@dataclasses.dataclass(frozen=True)
class Min:
    """The smallest g (`value`) or |g| (`magnitude`) over samples, for each weight; NaN wins."""

    of: str = "magnitude"

    exact = True

    def __post_init__(self):
        _check(self.of, ("value", "magnitude"))

    def init(self, layout: tuple[int, ...], dtype: Any) -> Any:
        """Return the state before any sample."""
        return jnp.full(layout, jnp.inf, dtype)

    def step(self, state: Any, gradients: Gradients, occurrences: Any) -> Any:
        """Take some samples."""
        return jnp.minimum(state, -gradients.largest(self.of, -1))

    def merge(self, first: Any, second: Any) -> Any:
        """Join the state of earlier samples with that of later ones."""
        return jnp.minimum(first, second)

    def final(self, form: Form, layout: tuple[int, ...], state: Any) -> Any:
        """Return the answer, in the tensor's shape."""
        return settle(form, layout, state)


@dataclasses.dataclass(frozen=True)
class TopK:
    """The `k` largest g or |g| of each weight and whose they are; of equal ones the earlier first.

    The answer is `(values, occurrences)`, `[k, *shape]` and `int32[k, *shape]`; an occurrence is
    step · batch size + position. `-inf` (`inf` for the smallest) and -1 where there are fewer than
    `k` samples. NaN comes before all numbers, of several the earlier first, and stays NaN.
    """

    k: int = 1
    of: str = "magnitude"
    smallest: bool = False

    exact = True

    def __post_init__(self):
        _check(self.of, ("value", "magnitude"))
        if self.k < 1:
            raise ProgramError(
                f"the {self.k} largest gradients are asked for",
                why="there is no state to keep them in",
                fix="k=1 or more",
            )

    def init(self, layout: tuple[int, ...], dtype: Any) -> Any:
        """Return the state before any sample."""
        shape = (self.k, *layout)
        return jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, -1, jnp.int32)

    def step(self, state: Any, gradients: Gradients, occurrences: Any) -> Any:
        """Take some samples."""
        factors = gradients.kernel_factors()
        if factors is None or not self.plain:
            return gradients.fold(self._insert, state, occurrences)
        return self._by_kernel(top_k.xla, state, factors, occurrences)

    @property
    def plain(self) -> bool:
        """Whether this is what the kernels compute: the largest magnitudes."""
        return self.of == "magnitude" and not self.smallest

    def step_on_host(self, state: Any, factors: Outer, occurrences: Any) -> Any:
        """Take some samples by the compiled kernel, into numpy arrays that are changed in place."""
        assert top_k.compiled is not None
        return self._by_kernel(top_k.compiled, state, factors, occurrences)

    def _by_kernel(self, kernel: Any, state: Any, factors: Outer, occurrences: Any) -> Any:
        shape = state[0].shape
        product = (self.k, factors.left.shape[1], factors.left.shape[3], factors.right.shape[3])
        found = kernel(*(x.reshape(product) for x in state), *factors, occurrences)
        return tuple(x.reshape(shape) for x in found)

    def merge(self, first: Any, second: Any) -> Any:
        """Join the state of earlier samples with that of later ones."""
        values, numbers = (jnp.concatenate(pair) for pair in zip(first, second, strict=True))
        order = jnp.lexsort((-values, ~jnp.isnan(values)), axis=0)[: self.k]
        return tuple(jnp.take_along_axis(x, order, 0) for x in (values, numbers))

    def final(self, form: Form, layout: tuple[int, ...], state: Any) -> Any:
        """Return values and occurrences, in the tensor's shape."""
        values, numbers = (settle(form, layout, x) for x in state)
        return (-values if self.smallest else values), numbers

    def _rank(self, gradient: Any) -> Any:
        values = OF[self.of](gradient)
        return -values if self.smallest else values

    def _insert(self, state: Any, gradient: Any, occurrence: Any) -> Any:
        values, numbers = state
        new = jnp.broadcast_to(self._rank(gradient), values.shape)
        stays = jnp.isnan(values) | (values >= new)
        rank = jnp.broadcast_to(jnp.sum(stays, axis=0), values.shape)
        place = lax.broadcasted_iota(rank.dtype, values.shape, 0)
        above = jnp.concatenate([values[:1], values[:-1]])
        whose = jnp.concatenate([numbers[:1], numbers[:-1]])
        values = jnp.where(place < rank, values, jnp.where(place == rank, new, above))
        here = jnp.where(place == rank, occurrence, whose)
        return values, jnp.where(place < rank, numbers, here)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts |g| of all samples and weights of a tensor between edges, `int32[edges + 1]`.

    Below the first edge, between neighbours (the lower edge included), and from the last edge on,
    NaN included.
    """

    edges: tuple[float, ...]

    exact = True

    def init(self, layout: tuple[int, ...], dtype: Any) -> Any:
        """Return the state before any sample."""
        return jnp.zeros(len(self.edges) + 1, jnp.int32)

    def step(self, state: Any, gradients: Gradients, occurrences: Any) -> Any:
        """Take some samples."""
        edges = jnp.asarray(self.edges, gradients.form.wide)

        def count(counts, gradient):
            places = jnp.searchsorted(edges, jnp.abs(gradient).reshape(-1), side="right")
            return counts.at[places].add(1)

        return gradients.fold(count, state)

    def merge(self, first: Any, second: Any) -> Any:
        """Join the state of earlier samples with that of later ones."""
        return first + second

    def final(self, form: Form, layout: tuple[int, ...], state: Any) -> Any:
        """Return the counts."""
        return state


@dataclasses.dataclass(frozen=True)
class Norm:
    """The Euclidean norm of each sample's gradient, over all tensors or for each of them."""

    per_tensor: bool = False

    def column(self, gradients: Gradients, number: int) -> Any:
        """Return one number for each sample, of one tensor."""
        return gradients.square_norms()

    def join(self, columns: Sequence[Any]) -> Any:
        """Return the answer for each sample from the columns of all tensors."""
        if self.per_tensor:
            return [jnp.sqrt(column) for column in columns]
        return jnp.sqrt(sum(columns[1:], columns[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Dot:
    """The dot product of each sample's gradient with a direction shaped like params."""

    direction: Any

    def column(self, gradients: Gradients, number: int) -> Any:
        """Return one number for each sample, of one tensor."""
        return gradients.dots(jnp.asarray(jax.tree.leaves(self.direction)[number]))

    def join(self, columns: Sequence[Any]) -> Any:
        """Return the answer for each sample from the columns of all tensors."""
        return sum(columns[1:], columns[0])


Running = Sum | Max | Min | TopK | Histogram
Column = Norm | Dot
Reduction = Running | Column


class Blocks:
    """The running state of a range of steps, in the order of folds and merges that is fixed.

    Args:
        merge: joins the state of earlier steps with that of later ones.

    Blocks come in ascending order; each is folded from a blank state.
    """

    def __init__(self, merge: Callable[[Any, Any], Any]):
        self._merge = merge
        self._nodes: list[tuple[int, int, Any]] = []  # level, number in the level, state

    def close(self, block: int, state: Any) -> None:
        """Take the state of a block, or of the part of it that lies in the range."""
        self.push(0, block, state)

    @property
    def nodes(self) -> list[tuple[int, int, Any]]:
        """What there is: level, number in the level, state; `push` takes it elsewhere."""
        return list(self._nodes)

    def push(self, level: int, number: int, state: Any) -> None:
        """Take the state of 2**level blocks whose first is a multiple of that."""
        node = (level, number, state)
        while self._nodes and self._nodes[-1][:2] == (node[0], node[1] ^ 1) and node[1] & 1:
            level, _, first = self._nodes.pop()
            node = (level + 1, node[1] >> 1, self._merge(first, node[2]))
        self._nodes.append(node)

    def copy(self) -> "Blocks":
        """Return blocks that grow on their own."""
        other = Blocks(self._merge)
        other._nodes = list(self._nodes)
        return other

    def result(self) -> Any:
        """Return the state of all blocks; None if there was none."""
        states = [state for _, _, state in self._nodes]
        if not states:
            return None
        total = states[0]
        for state in states[1:]:
            total = self._merge(total, state)
        return total
