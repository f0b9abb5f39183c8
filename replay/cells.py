"""Running states of a root of a plan, in aligned cells of steps, joined in one fixed tree."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from replay.cache import Cell
from replay.grads.reductions import BLOCK_STEPS, Blocks
from replay.query.nodes import Node
from replay.values import Value


class Root:
    """What one root has come to; steps come in ascending order.

    Cells of `span` steps, aligned, are folded from a blank state each. What a cell has come to is
    pushed as soon as the next one begins; a cell that is known from elsewhere is pushed in its
    place instead of taking its steps.

    Attributes:
        node: the root.
        closed: called with the number of a cell, the epoch or window (0 where none is told apart)
            and what its steps have come to.
        span: steps of a cell.
        wholes: whether tensors are always taken in full, and weights chosen at the end.
        cuts: whether `whole` can cut chosen weights out of what a tensor has come to.
        exact: whether the order of merges has no say, so that one state at a time is held.
    """

    span = BLOCK_STEPS
    exact = False
    wholes = False
    cuts = False

    def __init__(self, node: Node):
        self.node = node
        self.closed: Callable[[int, int, Cell], None] = lambda number, key, cell: None
        self._number: int | None = None
        self._plain: dict[int, dict[str, Any]] = {}
        self._blocks: dict[tuple[int, int], Blocks] = {}

    def take(self, local: Any) -> None:
        """Take the values of a step."""
        number = local.step // self.span
        if number != self._number:
            self.end()
            self._number = number
        self._take(local)

    def end(self) -> None:
        """End the cell that is open."""
        number, self._number = self._number, None
        if number is None:
            return
        for key, cell in self._close().items():
            self.closed(number, key, cell)
            self.push(number, key, cell)

    def push(self, number: int, key: int, cell: Cell) -> None:
        """Take what the steps of a later cell have come to."""
        self._note(key, cell.plain)
        for part, leaves in enumerate(cell.parts):
            self._joined(key, part).push(0, number, leaves)

    def done(self, now: bool) -> bool:
        """Whether no later step can change the answer.

        Args:
            now: after the last step, which is waited for; else as far as is known before it.
        """
        return False

    def keys(self) -> list[int]:
        """Return the epochs or windows that there are."""
        return sorted(self._plain)

    def weight_bytes(self, count: Callable[[str], int]) -> int:
        """Return the bytes that a running state takes for one weight.

        Args:
            count: dimension -> its entries.
        """
        return 0

    def states(self, steps: Sequence[int]) -> int:
        """Return how many states of closed cells are held at once.

        Args:
            steps: how many there are of each epoch or window.
        """
        if self.exact:
            return len(steps)
        return sum((-(-int(count) // self.span) + 1).bit_length() for count in steps)

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        self.end()
        nodes = {place: blocks.nodes for place, blocks in self._blocks.items()}
        return self._plain, jax.tree.map(np.asarray, nodes)

    def absorb(self, state: Any) -> None:
        """Take what later steps have come to elsewhere."""
        plain, nodes = state
        for key, notes in plain.items():
            self._note(key, notes)
        for place, found in nodes.items():
            for node in found:
                self._joined(*place).push(*node)

    def whole(
        self, part: int, plain: dict[str, Any], leaves: list[Any], indices: tuple[int, ...]
    ) -> list[Any]:
        """Cut what the whole of a tensor has come to down to chosen weights."""
        raise NotImplementedError

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer; `empty` gives values of the forms that a step has."""
        raise NotImplementedError

    def found(self, key: int) -> list[list[Any]]:
        """Return, for each part, the leaves of the state of all cells that are closed."""
        count = 1 + max((part for k, part in self._blocks if k == key), default=-1)
        return [self._blocks[key, part].result() for part in range(count)]

    # ---- of each kind of root its own

    def _take(self, local: Any) -> None:
        raise NotImplementedError

    def _close(self) -> dict[int, Cell]:
        """Return what the open cell has come to, by epoch or window, and forget it."""
        raise NotImplementedError

    def _merge(self, part: int) -> Callable[[list[Any], list[Any]], list[Any]]:
        """Return what joins the leaves of two states."""
        raise NotImplementedError

    def _joined(self, key: int, part: int) -> Blocks:
        if (key, part) not in self._blocks:
            blocks = _Merged if self.exact else Blocks
            self._blocks[key, part] = blocks(self._merge(part))
        return self._blocks[key, part]

    def _note(self, key: int, plain: dict[str, Any]) -> None:
        known = self._plain.get(key)
        if known is not None and "samples" in plain:
            both = zip(known["samples"], plain["samples"], strict=True)
            plain = {**plain, "samples": [a + b for a, b in both]}
        self._plain[key] = plain


class _Merged(Blocks):
    """Blocks of which one state is held, as the order of merges has no say."""

    def push(self, level: int, number: int, state: Any) -> None:
        """Join the state with that of all earlier blocks."""
        if self._nodes:
            state = self._merge(self._nodes.pop()[2], state)
        self._nodes.append((0, 0, state))
