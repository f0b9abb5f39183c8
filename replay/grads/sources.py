"""Where per-sample gradients come from: factors, a scan over samples, or `vmap` of `grad`.

A group is the set of tensors whose gradients are had by one strategy, in one pass over the samples,
a few at once where memory is short.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from replay.errors import ProgramError
from replay.grads.gradients import (
    Combined,
    Factored,
    Form,
    Gradients,
    Materialised,
    Nothing,
    Tensor,
    plan,
)
from replay.grads.taps import Meeting, tap

STRATEGIES = ("factored", "scan", "vmap")

# Gradients that a scan writes before they are reduced, where both are executables of their own:
# few, so that they stay in the processor's caches.
_SCANNED = 8


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors whose gradients are had together.

    Attributes:
        strategy: `factored`, `scan` or `vmap`.
        tensors: by number of the leaf.
        sample_bytes: what is held of one sample.
        at_once: samples that fit in memory together.
        produce: `produce(leaves, rows, shared) -> [payload]`, one for each tensor, each with a
            leading axis of samples; `rows` are leaves `[samples, ...]`.
        meetings: of the loss, for tensors that need more than one of them.
    """

    strategy: str
    tensors: dict[int, Tensor]
    sample_bytes: int
    at_once: int
    produce: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]]
    meetings: Sequence[Meeting] = ()

    def gradients(self, number: int, payload: Any, leaves: Sequence[Any]) -> Gradients:
        """Return the gradients of one tensor that a payload stands for."""
        tensor = self.tensors[number]
        if tensor.form.way == "factors":
            meetings = [self.meetings[i] for i in tensor.meetings]
            return Combined(tensor.form, number, meetings, payload, leaves)
        return gradients_of(tensor.form, payload)


def gradients_of(form: Form, payload: Any) -> Gradients:
    """Return the gradients that a payload stands for; `Combined` ones need more than a form."""
    if form.way == "rule":
        return Factored(form, payload)
    if form.way == "zero":
        return Nothing(form, payload.shape[0])
    return Materialised(form, payload)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss of one sample, and the shapes it is asked about.

    Attributes:
        loss: `loss(leaves, sample leaves, shared leaves) -> scalar`.
        leaves: shapes of the parameter leaves.
        names: their paths.
        rows: shapes of one sample's leaves.
        shared: shapes of what all samples share.
        size: how many samples there are.
    """

    loss: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]
    leaves: Sequence[jax.ShapeDtypeStruct]
    names: Sequence[str]
    rows: Sequence[jax.ShapeDtypeStruct]
    shared: Sequence[jax.ShapeDtypeStruct]
    size: int

    def factored(self, memory: int, chosen: Sequence[int] | None = None) -> Group:
        """Return the chosen tensors, all by default, by taps and factors."""
        count = len(self.rows)

        def flat_loss(leaves, *rest):
            return self.loss(leaves, rest[:count], rest[count:])

        taps = tap(flat_loss, list(self.leaves), *self.rows, *self.shared)
        _, shapes = jax.eval_shape(taps.factors, self.leaves, [*self.rows, *self.shared])
        tensors = plan(taps.meetings, shapes, self.leaves, self.names)
        numbers = range(len(tensors)) if chosen is None else chosen
        wanted = {i: tensors[i] for i in numbers}

        def one(leaves, sample, shared):
            _, factors = taps.factors(leaves, [*sample, *shared])
            payloads = []
            for number, tensor in wanted.items():
                mine = [factors[i] for i in tensor.meetings]
                if tensor.form.way == "direct":
                    meetings = [taps.meetings[i] for i in tensor.meetings]
                    many = jax.tree.map(lambda x: x[None], mine)
                    combined = Combined(tensor.form, number, meetings, many, leaves)
                    payloads.append(combined.one(mine))
                elif tensor.form.way == "zero":
                    payloads.append(jnp.int32(0))
                else:
                    payloads.append(tensor.cut(mine[0]) if tensor.form.way == "rule" else mine)
            return payloads

        each = _bytes(jax.eval_shape(one, self.leaves, self.rows, self.shared))
        return Group("factored", wanted, each, _at_once(each, memory), _over(one), taps.meetings)

    def materialised(self, memory: int, strategy: str, chosen: Sequence[int]) -> Group:
        """Return tensors whose gradients are computed one sample at a time, or under `vmap`."""
        forms = [
            Form(tuple(self.leaves[i].shape), str(self.leaves[i].dtype), "whole") for i in chosen
        ]
        wanted = {
            i: Tensor(self.names[i], form, (), f"strategy {strategy}")
            for i, form in zip(chosen, forms, strict=True)
        }

        def one(leaves, sample, shared):
            def loss(mine):
                merged = list(leaves)
                for number, leaf in zip(chosen, mine, strict=True):
                    merged[number] = leaf
                return self.loss(merged, sample, shared)

            grads = jax.grad(loss)([leaves[i] for i in chosen])
            return [g.astype(form.wide) for g, form in zip(grads, forms, strict=True)]

        each = _bytes([jax.ShapeDtypeStruct(form.shape, form.wide) for form in forms])
        scan = strategy == "scan"
        # A ranking or a projection holds six copies of what it looks at, and something besides.
        at_once = _at_once(8 * each, memory)
        at_once = min(at_once, _SCANNED) if scan else at_once
        return Group(strategy, wanted, each, at_once, _one_by_one(one) if scan else _over(one))

    def groups(self, strategies: Sequence[str], memory: int) -> list[Group]:
        """Return the groups for a strategy for each tensor.

        Raises:
            ProgramError: not even one sample fits in the memory.
        """
        groups = []
        for strategy in STRATEGIES:
            chosen = [i for i, mine in enumerate(strategies) if mine == strategy]
            if chosen and strategy == "factored":
                groups.append(self.factored(memory, chosen))
            elif chosen:
                groups.append(self.materialised(memory, strategy, chosen))
        for group in groups:
            if group.sample_bytes > memory:
                raise ProgramError(
                    f"one sample takes {group.sample_bytes:,} bytes by {group.strategy!r}, more "
                    f"than the limit of {memory:,}",
                    why="what is known of a sample's gradients is held until it is reduced",
                    fix=f"per_sample(loss, memory={group.sample_bytes}) or more, or another "
                    f"strategy: {', '.join(s for s in STRATEGIES if s != group.strategy)}",
                )
        return groups


def _over(one: Callable) -> Callable:
    def produce(leaves, rows, shared):
        return jax.vmap(lambda sample: one(leaves, sample, shared))(rows)

    return produce


def _one_by_one(one: Callable) -> Callable:
    def produce(leaves, rows, shared):
        if rows[0].shape[0] == 1:
            return [x[None] for x in one(leaves, [row[0] for row in rows], shared)]
        return lax.map(lambda sample: one(leaves, sample, shared), rows)

    return produce


def _at_once(each: int, memory: int) -> int:
    return max(1, memory // max(each, 1))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Asked(NamedTuple):
    """A batch of samples, flat, and the loss that is asked about.

    Attributes:
        problem: the loss and the shapes.
        leaves: of the parameters.
        rows: leaves `[samples, ...]`.
        shared: leaves that all samples share.
    """

    problem: Problem
    leaves: Sequence[Any]
    rows: Sequence[Any]
    shared: Sequence[Any]

    def gradients(self, group: Group, rows: Sequence[Any]) -> list[Gradients]:
        """Return the gradients of all tensors of a group, of some of the samples."""
        payloads = group.produce(self.leaves, rows, self.shared)
        pairs = zip(group.tensors, payloads, strict=True)
        return [group.gradients(number, payload, self.leaves) for number, payload in pairs]

    def layouts(self, group: Group) -> list[tuple[int, ...]]:
        """Return the shapes in which running results of a group's tensors are kept."""
        found: list[tuple[int, ...]] = []

        def probe(leaves, rows, shared):
            asked = Asked(self.problem, leaves, rows, shared)
            found.extend(g.layout for g in asked.gradients(group, [row[:1] for row in rows]))
            return 0

        jax.eval_shape(probe, self.leaves, self.rows, self.shared)
        return found

    def visit(
        self, group: Group, function: Callable[[Any, list[Gradients], Any], Any], state: Any
    ) -> tuple[Any, Any]:
        """Fold `function(state, gradients, numbers) -> state, out` over the samples.

        As many samples at once as memory allows; `numbers` are theirs, `int32[samples]`, and what
        comes out for each sample is joined.
        """
        size, at_once = self.problem.size, 1 if group.strategy == "scan" else group.at_once
        numbers = jnp.arange(size, dtype=jnp.int32)
        rows = [jnp.asarray(row) for row in self.rows]

        def some(state, part):
            part, numbers = part
            return function(state, self.gradients(group, part), numbers)

        if at_once >= size:
            return some(state, (rows, numbers))
        full = size // at_once * at_once
        cut = jax.tree.map(
            lambda x: x[:full].reshape(full // at_once, at_once, *x.shape[1:]), (rows, numbers)
        )
        state, out = lax.scan(some, state, cut)
        out = jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), out)
        if full < size:
            state, last = some(state, jax.tree.map(lambda x: x[full:], (rows, numbers)))
            out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, last)
        return state, out


def chunks(size: int, at_once: int) -> list[tuple[int, int]]:
    """Cut samples `[0, size)` in pieces.

    >>> chunks(7, 3)
    [(0, 3), (3, 6), (6, 7)]
    """
    return [(a, min(a + at_once, size)) for a in range(0, size, at_once)]
