"""Questions about the per-sample gradients of recorded steps, answered while they are replayed.

What observes a step is made of the run's archived programs, never of the user's code: `factors`
for the tensors that have them, `sample_gradient` for the others.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replay import artifact
from replay.artifact import Signature
from replay.data import check_precision
from replay.errors import Grade, LogError, ProgramError
from replay.grads import archive
from replay.grads.factors import Outer, Rows
from replay.grads.gradients import Form, Tensor, settle
from replay.grads.reductions import BLOCK_STEPS, Reduction
from replay.grads.sources import Group, chunks, gradients_of
from replay.grads.strategy import identity, measure, recall, remember
from replay.grads.stream import TOGETHER, Stream, check
from replay.log import Log
from replay.replaying import Replayed, Replayer


class Reduced(NamedTuple):
    """What was found about the per-sample gradients of a range of steps.

    Attributes:
        answers: one for each reduction, in their order: a pytree like params (for `TopK` a pair of
            them, values and occurrences), or a column with one number for each occurrence.
        steps: the steps that were replayed.
        occurrences: `int64[samples]`, step · batch size + position, of the entries of columns.
        grade: `BITWISE` if the trajectory was compared up to a digest at its end, `UNAUDITED` if
            only its losses were, `NUMERIC` if it deviates.
        strategies: path of each tensor -> how its gradients were had.
        gap: the weighted mean of the per-sample gradients against the batch gradient that the run
            used: the largest difference over the largest element of the whole network (that of a
            single tensor may vanish but for rounding), at the first step and one of every 64.
        deviation: of the trajectory from the log; 0 where every bit agrees.
    """

    answers: tuple[Any, ...]
    steps: range
    occurrences: np.ndarray
    grade: Grade
    strategies: dict[str, str]
    gap: float
    deviation: float


class SampleGradients:
    """The per-sample gradients of a run's steps, by its archived programs.

    Args:
        log: the run.
        allow: custom calls that its programs may make besides the usual ones.
        memory: bytes that gradients may take before they are reduced.
    """

    def __init__(self, log: Log, *, allow: Sequence[str], memory: int):
        if "sample_gradient" not in log.header.programs:
            raise ProgramError(
                f"{log.place} holds no program for the gradient of one sample",
                why="from_functions was not told how a sample's gradient is computed",
                fix="record with Program.from_functions(..., sample_gradient=...)",
            )
        self._log, self._allow = log, tuple(allow)
        self._signature = log.header.signature
        check_precision((*self._signature.state, *self._signature.batch), str(log.place))
        self._memory = memory
        self._ways: dict[str, list[tuple[Group, Callable[..., list[Any]]]]] = {}
        self.names = [
            self._signature.state[i].path.partition("/")[2] for i in self._signature.weights
        ]

    def leaves(self, replayed: Replayed) -> list[Any]:
        """Return the weights before a step."""
        return [replayed.executed.before[i] for i in self._signature.weights]

    def strategies(self, way: str) -> dict[str, str]:
        """Return how the gradients of each tensor are had."""
        where = {number: group.strategy for group, _ in self._way(way) for number in group.tensors}
        return {name: where[number] for number, name in enumerate(self.names)}

    def forms(self, way: str) -> dict[int, Form]:
        """Return what is known of the gradients of each tensor before there are any."""
        return {n: x.form for group, _ in self._way(way) for n, x in group.tensors.items()}

    def groups(self, way: str) -> list[Group]:
        """Return the tensors whose gradients are had together, to be composed with other work.

        What produces them takes `inputs`: for a scan, after `int32[n]`, positions in the batch.
        """
        return [group for group, _ in self._way(way)]

    def inputs(self, replayed: Replayed) -> tuple[Any, ...]:
        """Return what the archived programs take: state, key, step, ids, weights and batch."""
        r, executed = replayed, replayed.executed
        return self._inputs(executed.start, executed.before, r.ids, r.weights, r.batch)

    def _inputs(self, step: int, before: Sequence[Any], ids, weights, batch) -> tuple[Any, ...]:
        key = _on_device(self._log.origin(step).header.key)
        return (*before, key, np.uint32(step), ids, weights, *batch)

    def beforehand(self, way: str) -> Callable[..., list[Any]] | None:
        """Return what computes the factors of a step before it takes the memory of its state.

        `(step, state, ids, weights, batch) -> payloads`, for `Replayer.steps`; None where gradients
        are not all had at once.
        """
        groups = self._way(way)
        if any(group.strategy != "factored" for group, _ in groups):
            return None
        return lambda *inputs: [produce(*self._inputs(*inputs)) for _, produce in groups]

    def parts(self, replayed: Replayed, way: str) -> Iterator[tuple]:
        """Yield `(group, payloads, occurrences)` of a step, padding left out.

        Args:
            replayed: the step.
            way: `factored`, where a tensor has factors, or `scan`.
        """
        executed = replayed.executed
        valid = np.flatnonzero(replayed.ids >= 0).astype(np.int32)
        size, had = self._signature.batch_size, replayed.beforehand
        inputs = self.inputs(replayed) if had is None else ()
        first = executed.start * size
        if first + size >= 2**31:
            raise LogError(
                f"step {executed.start} is beyond {2**31 - 1:,} occurrences",
                why="occurrences are counted in 32 bits",
                fix="ask about earlier steps",
            )
        for place, (group, produce) in enumerate(self._way(way)):
            if group.strategy == "factored":
                payloads = produce(*inputs) if had is None else had[place]
                if len(valid) < size:
                    payloads = _take(payloads, valid)
                yield group, payloads, first + valid
                continue
            for a, b in chunks(len(valid), group.at_once):
                yield group, produce(valid[a:b], *inputs), first + valid[a:b]

    def choose(
        self, asked: str, first: Callable[[], Replayed], reductions: Sequence[Reduction]
    ) -> str:
        """Return a way: for `auto` by timing both on one step, or by what was measured before.

        Args:
            asked: what was asked for.
            first: returns a step, with its state.
            reductions: what is asked for.
        """
        if asked != "auto":
            return asked
        if not self._table().tensors:
            return "scan"
        programs = self._log.header.programs
        texts = [programs[name].get("text") for name in ("factors", "sample_gradient")]
        key = identity("run", repr(reductions), texts, self._memory, TOGETHER)
        seconds = recall(key)
        if not seconds:
            replayed = first()

            def ask(way):
                def once():
                    stream = Stream(reductions, len(self.names))
                    for step in range(TOGETHER):  # some of which are summed as one
                        stream.update(step, self.parts(replayed, way), self.leaves(replayed))
                    return stream.results()

                jax.block_until_ready(once())
                return once

            seconds = measure({way: ask(way) for way in ("factored", "scan")})
            remember(key, seconds)
        return min(seconds, key=seconds.__getitem__)

    def compared(
        self, parts: Iterable[tuple], replayed: Replayed, found: list[tuple[Any, Any]]
    ) -> Iterator[tuple]:
        """Pass on the parts of a step, and compare them with the gradient of the run.

        Args:
            parts: of the step.
            replayed: the step.
            found: gains, for each tensor, the largest difference between the weighted mean of the
                samples' gradients and the gradient of the run, and its largest element. They are
                on the device: nobody waits for them.
        """
        totals: dict[int, Any] = {}
        for group, payloads, occurrences in parts:
            weights = replayed.weights[occurrences % self._signature.batch_size]
            for number, payload in zip(group.tensors, payloads, strict=True):
                part = weighted(group.tensors[number].form, "value", payload, weights)
                totals[number] = totals[number] + part if number in totals else part
            yield group, payloads, occurrences
        totals = {number: totals[number] for number in sorted(totals)}
        found.append(_apart(totals, list(replayed.executed.grads), self._signature.batch_size))

    def _table(self) -> archive.Table:
        entry = self._log.header.programs.get("factors")
        if entry is None:
            reason = "the run was recorded without factors"
            return archive.Table({}, [], dict.fromkeys(range(len(self.names)), reason))
        return archive.read(entry.get("table"), self._signature)

    def _way(self, way: str) -> list[tuple[Group, Callable[..., list[Any]]]]:
        if way not in self._ways:
            self._ways[way] = self._groups(way)
        return self._ways[way]

    def _groups(self, way: str) -> list[tuple[Group, Callable[..., list[Any]]]]:
        table, groups = self._table(), []
        rest = list(range(len(self.names)))
        if way == "factored" and table.tensors:
            data, results = self._log.program("factors"), tuple(table.results)
            run = artifact.jitted("factors", data, self._signature, self._allow, results)

            def factors(*inputs):
                return table.payloads(run(*inputs))

            size = self._signature.batch_size
            each = sum(math.prod(x.shape) * x.dtype.itemsize for x in results) // size
            fits = max(size, self._memory // max(each, 1))  # of a batch they are had at once
            groups.append((Group("factored", table.tensors, each, fits, factors), factors))
            rest = list(table.missing)
        if rest:
            groups.append(self._scan(rest))
        return groups

    def _scan(self, numbers: list[int]) -> tuple[Group, Callable[..., list[Any]]]:
        data = self._log.program("sample_gradient")
        produce = _one_by_one(data, self._signature, self._allow, tuple(numbers))
        grads = [self._signature.grads[number] for number in numbers]
        tensors = {
            number: Tensor(self.names[number], _whole(leaf), (), "strategy scan")
            for number, leaf in zip(numbers, grads, strict=True)
        }

        each = sum(leaf.nbytes for leaf in grads)
        if each > self._memory:
            raise ProgramError(
                f"the gradient of one sample takes {each:,} bytes, more than the limit of "
                f"{self._memory:,}",
                why="it is held until it is reduced",
                fix=f"memory={each} or more",
            )
        at_once = max(1, min(8, self._memory // max(each, 1)))
        return Group("scan", tensors, each, at_once, produce), produce


@functools.lru_cache(maxsize=64)
def _one_by_one(
    data: bytes, signature: Signature, allow: tuple[str, ...], numbers: tuple[int, ...]
) -> Callable[..., list[Any]]:
    """Return the gradients of some tensors for several samples, jitted: `(positions, *inputs)`."""
    exported = artifact.load("sample_gradient", data, signature, allow=allow)
    wide = [_whole(signature.grads[number]).wide for number in numbers]

    def produce(positions, *inputs):
        def one(position):
            found = exported.call(*inputs, position)
            return [found[i].astype(dtype) for i, dtype in zip(numbers, wide, strict=True)]

        return lax.map(one, positions)

    return jax.jit(produce)


def _whole(leaf: Any) -> Form:
    return Form(tuple(leaf.shape), leaf.dtype, "whole")


@jax.jit
def _take(payloads: Any, valid: Any) -> Any:
    return jax.tree.map(lambda x: x[valid], payloads)


@functools.lru_cache(maxsize=16)
def _on_device(key: Sequence[int]) -> Any:
    return jnp.asarray(np.asarray(key, np.uint32))


@functools.partial(jax.jit, static_argnums=2)
def _apart(totals: Any, grads: Sequence[Any], size: int) -> tuple[Any, Any]:
    """Return by tensor the largest |mean - gradient| and the largest |gradient|."""

    def largest(rows):
        return jnp.stack([jnp.abs(x).max(initial=0.0) for x in rows])

    wide = [used.astype(totals[number].dtype) for number, used in enumerate(grads)]
    return largest(totals[n] / size - used for n, used in enumerate(wide)), largest(wide)


def _gap(largest: Any, scales: Any) -> float:
    """Return the largest difference of a step over the largest element of its whole gradient."""
    # Python's `max` passes over what is not a number.
    difference, scale = (max(0.0, *map(float, np.asarray(x))) for x in (largest, scales))
    return difference / scale if scale else difference


@functools.partial(jax.jit, static_argnums=(0, 1))
def weighted(form: Form, of: str, payload: Any, weights: Any) -> Any:
    """Return the weighted sum of gradients (`of` is `value`), or of |them|, in the tensor's shape.

    Weights are not negative.
    """

    def scaled(x):
        return x * weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    if isinstance(payload, Outer | Rows):
        payload = payload._replace(right=scaled(payload.right))
    elif form.way != "zero":
        payload = scaled(payload)
    gradients = gradients_of(form, payload)
    return settle(form, gradients.layout, gradients.total(of))


def reduce(
    replayer: Replayer,
    gradients: SampleGradients,
    reductions: Sequence[Reduction],
    steps: range,
    *,
    strategy: str,
    exact: bool,
    progress: Callable[[int], None],
) -> Reduced:
    """Replay steps and reduce their per-sample gradients; answers are lists by tensor.

    Args:
        replayer: of the run.
        gradients: of the run.
        reductions: what is asked for.
        steps: of the run, in a row.
        strategy: `factored`, `scan`, or `auto`: what was measured to be faster on this machine.
        exact: raise where the trajectory departs from the log.
        progress: called with the number of steps done since the last call.
    """
    check(reductions)
    if strategy not in ("auto", "factored", "scan"):
        raise ProgramError(
            f"there is no strategy {strategy!r} for recorded steps",
            why="they are answered by archived programs: the factors, and the gradient of one "
            "sample",
            fix="one of auto, factored, scan",
        )
    stream = Stream(reductions, len(gradients.names))
    occurrences, deviation, closed = [], 0.0, -1
    apart: list[tuple[Any, Any]] = []

    def first() -> Replayed:
        with contextlib.closing(replayer.steps(steps.start, steps.start + 1, exact=exact)) as walk:
            return next(walk)

    strategy = gradients.choose(strategy, first, reductions)
    had = None if replayer.overlaps else gradients.beforehand(strategy)
    look = None if had is None else lambda state, leaves: None
    for replayed in replayer.steps(
        steps.start, steps.stop, exact=exact, late=True, look=look, beforehand=had
    ):
        step = replayed.executed.start
        parts = gradients.parts(replayed, strategy)
        if step == steps.start or step % BLOCK_STEPS == 0:
            parts = gradients.compared(parts, replayed, apart)
        stream.update(step, parts, gradients.leaves(replayed) if had is None else ())
        size = len(replayed.ids)
        occurrences.append(step * size + np.flatnonzero(replayed.ids >= 0))
        deviation, closed = replayed.deviation, replayed.closed
        progress(1)
    grade = Grade.BITWISE if closed == steps.stop else Grade.UNAUDITED
    return Reduced(
        tuple(stream.results()),
        steps,
        np.concatenate(occurrences).astype(np.int64),
        Grade.NUMERIC if deviation else grade,
        gradients.strategies(strategy),
        max(_gap(*pair) for pair in apart),
        deviation,
    )
