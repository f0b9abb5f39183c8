"""Reductions over many batches, each of each tensor in an executable of its own.

Sharing shares what the gradients are made of, never a compilation: an answer does not depend on
what else was asked.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replay.errors import ProgramError
from replay.grads.factors import Outer
from replay.grads.gradients import Form
from replay.grads.reductions import BLOCK_STEPS, Blocks, Column, Dot, Norm, Reduction, Sum, TopK
from replay.grads.sources import Group, gradients_of
from replay.kernels import top_k

# Whether rankings are had by a compiled kernel where that is faster.
COMPILED = top_k.compiled is not None
# Steps whose samples are summed as one, and bytes of their factors that may wait for it in a
# stream; to sum them copies those of a tensor once more.
TOGETHER = 8
HELD = 2**25


class Stream:
    """Running states of reductions over steps that come in ascending order.

    Args:
        reductions: of `replay.reductions`.
        tensors: how many the parameters have.
        only: those that are asked about; all by default.
    """

    def __init__(
        self, reductions: Sequence[Reduction], tensors: int, only: Sequence[int] | None = None
    ):
        self.reductions, self._tensors = tuple(reductions), tensors
        self._only = frozenset(range(tensors) if only is None else only)
        self._block: int | None = None
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._columns: dict[int, list[Any]] = {
            i: [] for i, r in enumerate(self.reductions) if isinstance(r, Norm | Dot)
        }

    def update(
        self,
        step: int,
        parts: Iterable[tuple[Group, list[Any], Any]],
        leaves: Sequence[Any],
    ) -> None:
        """Take the samples of a step.

        Args:
            step: its number, larger than the last one.
            parts: `(group, payloads, occurrences)` of some samples after the others, groups one
                after the other.
            leaves: of the parameters.
        """
        block = step // BLOCK_STEPS
        if block != self._block:
            for cell in self._cells.values():
                if not cell.exact:
                    cell.close(self._block)
            self._block = block
        looked: dict[int, dict[int, list[Any]]] = {i: {} for i in self._columns}
        for group, payloads, occurrences in parts:
            for number, payload in zip(group.tensors, payloads, strict=True):
                if number not in self._only:
                    continue
                for i, reduction in enumerate(self.reductions):
                    if isinstance(reduction, Norm | Dot):
                        column = _look(reduction, group, number)(payload, leaves)
                        looked[i].setdefault(number, []).append(column)
                    else:
                        if (i, number) not in self._cells:
                            self._cells[i, number] = _Cell(reduction, group, number)
                        self._cells[i, number].take(step, group, payload, leaves, occurrences)
        for i, columns in looked.items():
            self._columns[i].append([columns[number] for number in range(self._tensors)])

    def flush(self) -> None:
        """Take the steps that wait for others, since none will come."""
        for cell in self._cells.values():
            cell.flush()

    def close(self) -> dict[tuple[int, int], tuple[tuple[int, ...], Any]]:
        """Return `(layout, state)` of each reduction and tensor, and begin again from blanks."""
        found = {}
        for place, cell in self._cells.items():
            found[place] = (cell.layout, cell.end())
        return found

    def _result(self, i: int, number: int) -> Any:
        cell = self._cells.get((i, number))
        return None if cell is None else cell.result(self._block)

    def results(self) -> list[Any]:
        """Return, for each reduction, a list of what was found for each tensor, or one column.

        Columns are joined over the steps, `[samples]`; those of `Norm(per_tensor=True)` are a list.
        """
        answers = []
        for i, reduction in enumerate(self.reductions):
            if isinstance(reduction, Norm | Dot):
                answers.append(self._joined(reduction, self._columns[i]))
            else:
                answers.append([self._result(i, number) for number in range(self._tensors)])
        return answers

    def _joined(self, reduction: Column, steps: list[Any]) -> Any:
        columns = [
            np.concatenate([np.asarray(part) for step in steps for part in step[number]])
            for number in range(self._tensors)
        ]
        return jax.tree.map(np.asarray, reduction.join(columns))


class _Cell:
    """The running state of one reduction of one tensor.

    For a sum of what is one product for each sample, or as small as a bias, steps wait until there
    are several: one matrix product then sums all their samples, and the state is touched once.
    Whole aligned groups have the same bits in every range; of those that a range cuts, or that are
    not alike, steps go one by one.
    """

    def __init__(self, reduction: Any, group: Group, number: int):
        self._reduction, self._form = reduction, group.tensors[number].form
        self._group: Group | None = None
        self._number = number
        self._step = _step(reduction, group, number)
        self._blocks = Blocks(merge(reduction))
        self._waiting: list[tuple[int, Any]] = []
        self._sums = isinstance(reduction, Sum) and self._form.way in ("rule", "direct")
        self._waits = False
        self.layout: tuple[int, ...] | None = None
        self._on_host = False
        self.exact = reduction.exact
        self._state: Any = None

    def take(
        self, step: int, group: Group, payload: Any, leaves: Sequence[Any], occurrences: Any
    ) -> None:
        if group is not self._group:  # the first, or of samples of another shape
            self.flush()
            self._group = group
            layout, short = _layout(group, self._number, payload, leaves)
            self._waits = short and self._sums
            if self.layout is None:  # of sums over time XLA's matrix products are faster
                self.layout, self._on_host = layout, short and _by_kernel(self._reduction)
        if self._state is None:
            self._state = _init(self._reduction, self.layout, str(self._form.wide))()
            if self._on_host:
                self._state = tuple(np.array(x) for x in self._state)
        if self._on_host:
            factors = _factors_on_host(self._form, payload)
            self._state = self._reduction.step_on_host(self._state, factors, occurrences)
        elif self._waits:
            self._wait(step, payload)
        else:
            self._state = self._step(self._state, payload, leaves, occurrences)

    def _wait(self, step: int, payload: Any) -> None:
        if self._waiting:
            last, other = self._waiting[-1]
            size = self._together(other)
            if step // size != last // size or _forms(payload) != _forms(other):
                self.flush()
        self._waiting.append((step, payload))
        if len(self._waiting) == self._together(payload):
            self.flush()

    def _together(self, payload: Any) -> int:
        """Return how many steps of such a size are summed as one: a power of two."""
        assert self._group is not None
        samples = max(jax.tree.leaves(payload)[0].shape[0], 1)
        each = max(samples * self._group.sample_bytes, 1)
        fits = min(TOGETHER, HELD // each, self._group.at_once // samples)
        return 1 << max(fits, 1).bit_length() - 1

    def flush(self) -> None:
        if self._waiting:
            self._state = self._with_waiting(self._state)
            self._waiting = []

    def _with_waiting(self, state: Any) -> Any:
        """Return a state with the steps that wait: as one if none is missing, else one by one."""
        payloads = [payload for _, payload in self._waiting]
        if len(payloads) > 1 and len(payloads) == self._together(payloads[0]):
            return _shared_steps(self._reduction, self._form)(state, payloads)
        for payload in payloads:
            state = self._step(state, payload, (), None)
        return state

    def end(self) -> Any:
        """Return the state, and begin again from a blank one."""
        self.flush()
        state, self._state = self._state, None
        return state

    def close(self, block: int | None) -> None:
        state = self.end()
        if state is not None and block is not None:
            self._blocks.close(block, state)

    def result(self, block: int | None) -> Any:
        blocks = self._blocks.copy()
        if self._state is not None and block is not None:
            # A step takes the memory of its state, and this one goes on.
            copied = jax.tree.map(jnp.copy, self._state) if self._waiting else self._state
            blocks.close(block, self._with_waiting(copied))
        answer = final(self._reduction, self._form, self.layout)(blocks.result())
        # JAX may read numpy's memory after the call returns, and the kernel writes into it again.
        return jax.block_until_ready(answer) if self._on_host else answer


def _forms(payload: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(x.shape, x.dtype) for x in jax.tree.leaves(payload)]


def _step(reduction: Any, group: Group, number: int) -> Callable[..., Any]:
    form = group.tensors[number].form
    if form.way != "factors":
        step = _shared_step(reduction, form)
        return lambda state, payload, leaves, occurrences: step(state, payload, occurrences)
    return _own_step(reduction, group.gradients, number)


def _look(reduction: Column, group: Group, number: int) -> Callable[..., Any]:
    form = group.tensors[number].form
    if form.way != "factors":
        look = _shared_look(reduction, form, number if isinstance(reduction, Dot) else 0)
        return lambda payload, leaves: look(payload)
    return _own_look(reduction, group.gradients, number)


# Tensors of one form share an executable, whoever asks.
@functools.cache
def _shared_step(reduction: Any, form: Form) -> Callable[..., Any]:
    def step(state, payload, occurrences):
        return reduction.step(state, gradients_of(form, payload), occurrences)

    return jax.jit(step, donate_argnums=0)


@functools.cache
def _shared_steps(reduction: Sum, form: Form) -> Callable[..., Any]:
    def steps(state, payloads):
        payload = jax.tree.map(lambda *parts: jnp.concatenate(parts), *payloads)
        return reduction.step(state, gradients_of(form, payload), None)

    return jax.jit(steps, donate_argnums=0)


@functools.cache
def _shared_look(reduction: Column, form: Form, number: int) -> Callable[..., Any]:
    return jax.jit(lambda payload: reduction.column(gradients_of(form, payload), number))


@functools.lru_cache(maxsize=4096)
def _own_step(reduction: Any, gradients: Callable, number: int) -> Callable[..., Any]:
    def step(state, payload, leaves, occurrences):
        return reduction.step(state, gradients(number, payload, leaves), occurrences)

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=4096)
def _own_look(reduction: Column, gradients: Callable, number: int) -> Callable[..., Any]:
    return jax.jit(
        lambda payload, leaves: reduction.column(gradients(number, payload, leaves), number)
    )


@functools.cache
def _init(reduction: Any, layout: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    # Committed to a device, as what a step returns: `jit` compiles that step once.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(lambda: reduction.init(layout, dtype), out_shardings=here)


@functools.cache
def merge(reduction: Any) -> Callable[[Any, Any], Any]:
    """Return what joins the states of earlier and of later samples."""
    return jax.jit(reduction.merge)


@functools.cache
def final(reduction: Any, form: Form, layout: tuple[int, ...]) -> Callable[[Any], Any]:
    """Return what turns a state into the answer, in the shape of the tensor."""
    return jax.jit(lambda state: reduction.final(form, layout, state))


def _factors_on_host(form: Form, payload: Any) -> Outer:
    """Return what `Gradients.kernel_factors` would, without an operation of JAX."""
    if form.way == "rule":
        return Outer(*(np.asarray(x, np.float32) for x in payload))
    rows = np.asarray(payload, np.float32)
    return Outer(np.ones((len(rows), 1, 1, 1), np.float32), rows.reshape(len(rows), 1, 1, -1))


def _layout(
    group: Group, number: int, payload: Any, leaves: Sequence[Any]
) -> tuple[tuple[int, ...], bool]:
    """Return the layout of a tensor's running state, and whether a gradient is one product.

    Those that exist already are, too: they are products with ones.
    """
    form = group.tensors[number].form
    if form.way == "factors":
        return _probed(lambda *given: group.gradients(number, *given), payload, leaves)
    parts, tree = jax.tree.flatten(payload)
    return _shared_layout(form, tree, tuple((x.shape, str(x.dtype)) for x in parts))


def _by_kernel(reduction: Any) -> bool:
    """Whether a compiled kernel is there."""
    plain = isinstance(reduction, TopK) and reduction.plain and COMPILED
    return plain and jax.default_backend() == "cpu"


# Probing takes as long as a step of a small model.
@functools.lru_cache(maxsize=4096)
def _shared_layout(form: Form, tree: Any, parts: tuple) -> tuple[tuple[int, ...], bool]:
    payload = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*part) for part in parts])
    return _probed(functools.partial(gradients_of, form), payload)


def _probed(gradients: Callable[..., Any], *given: Any) -> tuple[tuple[int, ...], bool]:
    found: list[tuple[tuple[int, ...], bool]] = []

    def probe(*given):
        here = gradients(*given)
        factors = here.kernel_factors()
        found.append((here.layout, factors is not None and factors.left.shape[2] == 1))
        return 0

    jax.eval_shape(probe, *given)
    return found[0]


def check(reductions: Sequence[Any]) -> None:
    """Refuse what is no reduction, before anything is replayed.

    Raises:
        ProgramError: nothing is asked for, or something unknown.
    """
    strangers = [x for x in reductions if not hasattr(x, "step") and not hasattr(x, "column")]
    if strangers or not reductions:
        raise ProgramError(
            f"{strangers[0]!r} is no reduction" if strangers else "no reduction is asked for",
            why="per-sample gradients are reduced while they exist, and never stored",
            fix="replay.reductions.Sum('square'), Max(), TopK(10), Histogram(edges), Norm(), ...",
        )
