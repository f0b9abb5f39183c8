"""When a recording stores its state, and which stored states it gives up again."""

import dataclasses
import math
from typing import Any

from replay.errors import LogError


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A policy for checkpoints: exactly one of four.

    State 0 and the last state are always stored. Which states are stored never changes a bit of
    the training; it decides how long a later replay takes.

    Args:
        every: store a state every so many steps.
        seconds: store a state when so many seconds of wall time have passed since the last.
        budget: store as many states, evenly spread, as fit in so many bytes before compression;
            where the length of the run is not known, the spacing doubles whenever they do not.
        reach: store so often that any step can be reached by replaying for at most so many
            seconds, judged by the time that the steps have taken.

    Raises:
        LogError: not exactly one is given, or it is not positive, or not a whole number of steps
            or bytes.

    Example:
        >>> Checkpoints(every=500)
        Checkpoints(every=500)
    """

    every: int | None = dataclasses.field(default=None, kw_only=True)
    seconds: float | None = dataclasses.field(default=None, kw_only=True)
    budget: int | None = dataclasses.field(default=None, kw_only=True)
    reach: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        name, value = next(iter(given.items()), ("", 0))
        kind = int if name in ("every", "budget") else int | float
        if (
            len(given) != 1
            or isinstance(value, bool)
            or not isinstance(value, kind)
            or not value > 0
        ):
            raise LogError(
                f"checkpoints are to be stored by {given or 'no rule'}",
                why="a policy is one rule with one positive number, of steps or bytes a whole one",
                fix="replay.Checkpoints(every=500), (seconds=60), (budget=2**30) or (reach=10)",
            )

    def __repr__(self) -> str:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return f"Checkpoints({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    @classmethod
    def of(cls, value: Any, steps: int | None) -> "Checkpoints":
        """Return a policy for a number of steps, a policy, or None for twenty segments."""
        if isinstance(value, Checkpoints):
            return value
        if value is None:
            return cls(every=math.ceil((steps or 20_000) / 20))
        return cls(every=value)


class Schedule:
    """A policy at work: told of every stretch of steps, it says when a state is due.

    Args:
        policy: the policy.
        steps: planned number of steps; None where it is not known.
        state_bytes: bytes of one state.
        start: the state that recording begins at.
        stored: states stored already.
    """

    def __init__(
        self,
        policy: Checkpoints,
        *,
        steps: int | None,
        state_bytes: int,
        start: int = 0,
        stored: tuple[int, ...] = (),
    ):
        self._policy, self._last, self._busy, self._wall = policy, start, 0.0, 0.0
        self._rows, self._stored = None, sorted(stored)
        self.every = policy.every
        if policy.budget is not None:
            rows = max(2, policy.budget // max(state_bytes, 1))
            if steps is not None:
                self.every = math.ceil(max(steps, 1) / (rows - 1))
            else:
                self._rows, self.every = rows - 1, 1  # the last state takes one

    def due(self, state: int, *, busy: float, wall: float) -> bool:
        """Tell whether a state just reached is to be stored.

        Args:
            state: the state.
            busy: seconds spent executing steps so far.
            wall: seconds on the clock so far.
        """
        if state == self._last:
            return False
        if self._rows is not None and self.every is not None:
            while state % self.every == 0 and self._on_grid(self.every) >= self._rows:
                self.every *= 2
        if self.every is not None:
            due = state % self.every == 0
        elif self._policy.seconds is not None:
            due = wall - self._wall >= self._policy.seconds
        else:
            due = busy - self._busy >= (self._policy.reach or 0.0)
        if due:
            self._last, self._busy, self._wall = state, busy, wall
        return due

    def give_up(self, state: int) -> tuple[int, ...]:
        """Record that a state is stored; return those to drop so that the budget holds."""
        earlier, self._stored = self._stored, [*self._stored, state]
        if self._rows is None or self.every is None:
            return ()
        dropped = tuple(s for s in earlier if s % self.every)
        self._stored = [s for s in self._stored if s not in dropped]
        return dropped

    def _on_grid(self, every: int) -> int:
        return sum(state % every == 0 for state in self._stored)
