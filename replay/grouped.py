"""Sums of the gradients of samples by the label of the sample, from factors.

The samples of some steps are kept as factors and sorted by label, so that a label's sum is a matrix
product over many of its samples, and the large running sums are touched once in a while, not at
every step. When they are is a matter of the numbers of the steps alone, so that it does not depend
on where a range begins.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replay.cache import Cell
from replay.cells import Root
from replay.grads.gradients import Form, settle
from replay.grads.reductions import BLOCK_STEPS
from replay.grads.sources import gradients_of
from replay.query.nodes import Reduce, Scan

# Samples of one label that are multiplied together, and bytes of factors that are kept.
CHUNK = 256
KEPT_BYTES = 2**26


class Sums(Root):
    """The running sums of one root.

    Args:
        node: a sum (or mean) over steps and positions, by labels.
        of: `value`, `magnitude` or `square`.
        scan: the gradients.
        numbers: of the tensors.
        forms: what is known of the gradients of each tensor.
    """

    def __init__(
        self,
        node: Reduce,
        of: str,
        scan: Scan,
        numbers: Sequence[int],
        forms: Callable[[], dict[int, Form]],
    ):
        assert node.by is not None
        super().__init__(node)
        self._how, self._of, self._scan, self._numbers = node.how, of, scan, list(numbers)
        self._forms = forms
        self._labels = np.frombuffer(node.by.labels, "<i4")
        self._count = node.by.count
        self._kept: dict[int, list[tuple[Any, np.ndarray]]] = {}
        self._states: dict[int, Any] = {}
        self._layouts: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._samples = np.zeros(self._count, np.int64)
        self._step = -1

    def totals(self) -> list[np.ndarray] | None:
        """Return the sums, `[labels, weights]` for each part; None where there was no step."""
        self.end()
        if not self._plain:
            return None
        totals, forms = [], self._forms()
        samples = np.asarray(self._plain[0]["samples"], np.int64)
        leaves = self.found(0)
        rows = zip(self._scan.tensors, self._numbers, self._plain[0]["each"], strict=True)
        for part, (tensor, number, layout) in enumerate(rows):
            (total,) = leaves[part]
            total = settle(forms[number], tuple(layout), jnp.asarray(total))
            flat = np.asarray(total).reshape(self._count, -1)
            if self._how == "mean":
                with np.errstate(invalid="ignore", divide="ignore"):
                    flat = flat / samples[:, None].astype(flat.dtype)
            totals.append(flat if tensor.indices is None else flat[:, list(tensor.indices)])
        return totals

    def _take(self, local: Any) -> None:
        frame = local.frames[self._scan.run]
        if self._step >= 0 and any(
            local.step // every != self._step // every for every in self._every().values()
        ):
            self._flush(local.step)
        self._step = local.step
        ids = frame.ids[frame.valid]
        self._samples += np.bincount(self._labels[ids], minlength=self._count)
        for number in self._numbers:
            for carried, occurrences in frame.parts(number):
                if number not in self._layouts:
                    layout = gradients_of(carried.form, carried.payload).layout
                    self._layouts[number] = carried.form, layout
                rows = np.asarray(occurrences) % len(frame.ids)
                self._kept.setdefault(number, []).append(
                    (carried.payload, self._labels[frame.ids[rows]])
                )

    def _close(self) -> dict[int, Cell]:
        self._flush()
        if not self._layouts:  # no sample at all
            return {}
        layouts = [list(self._layouts[number][1]) for number in self._numbers]
        plain = {"samples": self._samples.tolist(), "each": layouts}
        parts = [[self._states[number]] for number in self._numbers]
        self._states, self._samples = {}, np.zeros(self._count, np.int64)
        return {0: Cell(plain, parts)}

    def _merge(self, part: int) -> Callable[[list[Any], list[Any]], list[Any]]:
        return lambda first, second: [jnp.add(first[0], second[0])]

    def _every(self) -> dict[int, int]:
        """Return, for each tensor, the steps that are kept: a power of two, of a block at most."""
        found = {}
        for number, kept in self._kept.items():
            each = sum(x.nbytes for x in jax.tree.leaves(kept[0][0]))
            fits = max(1, KEPT_BYTES // max(each, 1))
            found[number] = min(BLOCK_STEPS, 2 ** int(math.log2(fits)))
        return found

    def _flush(self, step: int | None = None) -> None:
        """Add up what is kept of the tensors that are due; of all without a step."""
        for number, every in self._every().items():
            if step is not None and step // every == self._step // every:
                continue
            kept = self._kept.pop(number)
            form, layout = self._layouts[number]
            labels = np.concatenate([labels for _, labels in kept])
            rows, owners = chunked(labels, self._count, every * max(len(x) for _, x in kept))
            payload = kept[0][0]
            if len(kept) > 1:
                payload = _joined([payload for payload, _ in kept])
            if number not in self._states:
                self._states[number] = jnp.zeros((self._count, *layout), form.wide)
            self._states[number] = _add(form, self._of, self._states[number], payload, rows, owners)


def chunked(labels: np.ndarray, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort samples by label into chunks of one label each.

    Args:
        labels: of each sample.
        count: how many labels there are.
        most: samples that there may be; it alone decides how many chunks there are.

    Returns:
        `int32[chunks, size]` of samples, -1 for none, and the label of each chunk.

    >>> rows, owners = chunked(np.array([1, 0, 1]), 2, 4)
    >>> rows[:2, :2].tolist(), owners[:2].tolist()
    ([[1, -1], [0, 2]], [0, 1])
    """
    size = min(CHUNK, most)
    chunks = most // size + count
    rows = np.full((chunks, size), -1, np.int32)
    owners = np.zeros(chunks, np.int32)
    at = 0
    order = np.argsort(labels, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(labels, minlength=count))
    for label, end in enumerate(ends.tolist()):
        start = int(ends[label - 1]) if label else 0
        for first in range(start, end, size):
            mine = order[first : min(first + size, end)]
            rows[at, : len(mine)], owners[at] = mine, label
            at += 1
    return rows, owners


@jax.jit
def _joined(payloads: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *payloads)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(form: Any, of: str, state: Any, payload: Any, rows: Any, owners: Any) -> Any:
    def one(state, chunk):
        rows, owner = chunk

        def pick(x):
            inside = (rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(inside, x[jnp.maximum(rows, 0)], jnp.zeros((), x.dtype))

        mine = jax.tree.map(pick, payload)
        return state.at[owner].add(gradients_of(form, mine).total(of)), None

    return jax.lax.scan(one, state, (rows, owners))[0]


def fits(found: tuple[str, Scan] | None, node: Reduce) -> bool:
    """Whether a root over what was found of per-sample gradients is answered by sums."""
    if found is None or node.by is None or node.by.kind != "labels":
        return False
    known = found[1].quantity == "sample_grads" and not found[1].source
    return known and set(node.over) == {"step", "position"} and node.how in ("sum", "mean")
