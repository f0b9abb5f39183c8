"""Re-executing what was recorded, and comparing every bit that the log has kept."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay import artifact
from replay.data import Data
from replay.errors import DivergenceError, Grade, LogError, ReplayError
from replay.identity import (
    SHORT_DIGEST,
    differences,
    environment,
    fingerprint_on_host,
    short_digest,
    witness,
)
from replay.log import Log
from replay.trajectory import (
    Engine,
    Executed,
    LocalEngine,
    cuts,
    read_stretch,
    stage,
    staged_steps,
)
from replay.worker import RemoteEngine, settable


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a replay departs from its run.

    Attributes:
        after: the last evidence that agrees, such as `state 16`.
        before: the first evidence that disagrees, such as `the losses of step 21`.
        tensor: the first leaf of the state that is known to differ; None where none is known.
        deviation: largest absolute difference to a stored state; NaN where none is at hand.
    """

    after: str
    before: str
    tensor: str | None = None
    deviation: float = float("nan")

    def __str__(self) -> str:
        where = f"between {self.after} and {self.before}"
        tensor = f"; {self.tensor} differs" if self.tensor else ""
        known = f" by up to {self.deviation:.3g}" if self.deviation == self.deviation else ""
        return where + tensor + known


@dataclasses.dataclass(frozen=True)
class Segment:
    """What an audit established about the steps between two checkpoints.

    Attributes:
        start: the state at its beginning, a checkpoint.
        stop: the state at its end.
        grade: of these steps.
        divergence: where they depart from the run, for `NUMERIC`.
        error: why they could not be replayed, for `FAILED`.
    """

    start: int
    stop: int
    grade: Grade
    divergence: Divergence | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of comparing a replay with its run.

    Attributes:
        run: where the run lies.
        segments: in order.
        steps: number of steps that were replayed.
        seconds: wall time.
        differences: what is other here than when the run was recorded, `{name: (then, now)}`.
        complete: whether all durable steps of the run were audited.
    """

    run: str
    segments: tuple[Segment, ...]
    steps: int
    seconds: float
    differences: dict[str, tuple]
    complete: bool

    @property
    def grade(self) -> Grade:
        """The worst grade of a segment."""
        grade = Grade.BITWISE if self.segments else Grade.UNAUDITED
        for segment in self.segments:
            grade = grade & segment.grade
        return grade

    def __str__(self) -> str:
        part = "all" if self.complete else "part"
        lines = [
            f"{self.grade}: {self.grade.value}",
            f"{self.steps:,} steps in {len(self.segments)} segments ({part} of {self.run}), "
            f"{self.seconds:.1f} s",
        ]
        bad = [segment for segment in self.segments if segment.grade is not Grade.BITWISE]
        for segment in bad[:10]:
            why = segment.error or segment.divergence or segment.grade.value
            lines.append(f"  states {segment.start} to {segment.stop}: {segment.grade}: {why}")
        if len(bad) > 10:
            lines.append(f"  and {len(bad) - 10} more segments")
        for name, (then, now) in self.differences.items():
            lines.append(f"  {name}: recorded with {then!r}, here {now!r}")
        return "\n".join(lines)

    __repr__ = __str__


class Replayed(NamedTuple):
    """One replayed step, raw.

    Attributes:
        executed: what the engine computed; `before` and `grads` are kept.
        ids: `int32[batch]`.
        weights: `float32[batch]`.
        batch: leaves `[batch, ...]`.
        deviation: largest deviation from the log met so far; 0 while every bit agrees.
    """

    executed: Executed
    ids: np.ndarray
    weights: np.ndarray
    batch: Sequence[np.ndarray]
    deviation: float


class Replayer:
    """Re-executes logged steps, here or in a worker started with the recorded settings.

    Args:
        log: the run.
        data: the samples; None where the run holds them or where none were passed.
        allow: custom calls that its programs may make besides the usual ones.
    """

    def __init__(self, log: Log, data: Data | None, *, allow: Sequence[str] = ()):
        self._log, self._data, self._allow = log, data, tuple(allow)
        self._engines: dict[bool, Engine] = {}
        self._differences: dict[str, tuple] | None = None

    @property
    def differences(self) -> dict[str, tuple]:
        """What is other here than when the run was recorded; starts the backend."""
        if self._differences is None:
            self._differences = differences(self._log.header.environment, environment())
        return self._differences

    def anchor(self, state: int) -> int:
        """Return the nearest stored state at or before a state.

        Raises:
            LogError: the log has nothing at or before it, or ends before it.
        """
        durable = self._log.durable
        if not 0 <= state <= durable.steps:
            raise LogError(
                f"{self._log.place} has states 0 to {durable.steps}, not {state}",
                why="the run was closed there"
                if durable.closed
                else "nothing after it was durable when the recording stopped",
                fix=f"ask for a state up to {durable.steps}"
                + ("" if durable.closed else ", or continue the run with resume=True"),
            )
        stored = [s for s in durable.checkpoints if s <= state]
        if not stored:
            raise LogError(
                f"{self._log.place} has no stored state at or before state {state}",
                why="a replay starts from a stored state",
                fix="record the run again",
            )
        return max(stored)

    def stored(self, state: int) -> list[np.ndarray]:
        """Read a stored state and compare it with its digest.

        Raises:
            LogError: a file is missing or damaged, or holds another state.
        """
        leaves = self._log.checkpoint(state)
        wrong = self._disagreeing(state, fingerprint_on_host(leaves))
        if wrong:
            raise LogError(
                f"{self._log.place}: the stored state {state} does not agree with its digest, "
                f"first in {wrong[0]}",
                why="its files are not the ones that the recording wrote",
                fix="restore the folder states/ from a copy of the run",
            )
        return leaves

    def state(self, state: int, *, exact: bool = True) -> list[np.ndarray]:
        """Return the raw leaves of any state.

        Raises:
            DivergenceError: with `exact`, a replayed step departs from the log.
        """
        start = self.anchor(state)
        leaves = self.stored(start)
        if start == state:
            return leaves
        engine = self._engine(keep=False)
        walk = _Walk(self._log, start)
        held = engine.load(leaves)
        for executed in self._execute(engine, held, start, state):
            held = executed.after
            walk.check_losses(executed)
        walk.check_state(state, lambda: np.asarray(engine.fingerprint(held)))
        if walk.divergence is not None:
            if exact:
                raise self._diverged(walk.divergence)
            warnings.warn(f"state {state} is not exact: {walk.divergence}", stacklevel=3)
        return [np.asarray(leaf) for leaf in engine.fetch(held)]

    def steps(self, start: int, stop: int, *, exact: bool = True) -> Iterator[Replayed]:
        """Replay steps `[start, stop)` for somebody who looks at each.

        With `exact`, the first difference raises. Without, every stored state on the way replaces
        the replayed one, and the deviation met there is reported with the later steps.
        """
        if stop <= start:
            return
        self.anchor(stop)
        anchor = self.anchor(start)
        engine, signature = self._engine(keep=True), self._log.header.signature
        held, walk, deviation = engine.load(self.stored(anchor)), _Walk(self._log, anchor), 0.0
        size = staged_steps(signature)
        stored = sorted(s for s in self._log.durable.checkpoints if anchor < s < stop)
        edges = [anchor, *stored, stop]
        for a, b in zip(edges, edges[1:], strict=False):
            read = stage(lambda x, y: read_stretch(self._log, self._data, x, y), cuts(a, b, size))
            for stretch in read:
                ones = np.ones(signature.batch_size, np.float32)
                for executed in engine.advance(held, stretch):
                    held, row = executed.after, executed.start - stretch.start
                    walk.check_losses(executed)
                    if walk.divergence is not None and exact:
                        raise self._diverged(walk.divergence)
                    if walk.divergence is not None and not deviation:
                        deviation = float("nan")
                    if executed.start >= start:
                        weights = ones if stretch.weights is None else stretch.weights[row]
                        batch = [leaf[row] for leaf in stretch.batch]
                        yield Replayed(executed, stretch.ids[row], weights, batch, deviation)
            walk.check_state(b, lambda h=held: np.asarray(engine.fingerprint(h)))
            if walk.divergence is None:
                continue
            if exact:
                raise self._diverged(walk.divergence)
            if b in self._log.durable.checkpoints:
                found = self._deviation(b, engine.fetch(held))[1]
                deviation = found if deviation != deviation else max(deviation, found)
                held, walk = engine.load(self.stored(b)), _Walk(self._log, b)

    def audit(self, start: int, stop: int, progress: Callable[[int], None]) -> list[Segment]:
        """Replay all segments that hold steps of `[start, stop)`; call `progress(steps)`."""
        durable = self._log.durable
        edges = sorted({*durable.checkpoints, durable.steps})
        segments = []
        for a, b in zip(edges, edges[1:], strict=False):
            if b <= start or a >= stop:
                continue
            try:
                segments.append(self._audit(a, b, progress))
            except DivergenceError:
                raise
            except ReplayError as error:
                segments.append(Segment(a, b, Grade.FAILED, error=error.what))
        if not edges[1:] and edges and start <= edges[0]:
            self.stored(edges[0])
            segments.append(Segment(edges[0], edges[0], Grade.BITWISE))
        return segments

    def _audit(self, start: int, stop: int, progress: Callable[[int], None]) -> Segment:
        engine = self._engine(keep=False)
        held, walk = engine.load(self.stored(start)), _Walk(self._log, start)
        for executed in self._execute(engine, held, start, stop):
            held = executed.after
            walk.check_losses(executed)
            if executed.start + executed.count in self._log.durable.digests:
                state = executed.start + executed.count
                walk.check_state(state, lambda h=held: np.asarray(engine.fingerprint(h)))
            progress(executed.count)
        divergence = walk.divergence
        if divergence is None and walk.closed != stop:
            return Segment(start, stop, Grade.UNAUDITED)
        if divergence is None:
            return Segment(start, stop, Grade.BITWISE)
        if stop in self._log.durable.checkpoints:
            tensor, deviation = self._deviation(stop, engine.fetch(held))
            divergence = dataclasses.replace(divergence, tensor=tensor, deviation=deviation)
        return Segment(start, stop, Grade.NUMERIC, divergence=divergence)

    def _execute(self, engine: Engine, held: Any, start: int, stop: int) -> Iterator[Executed]:
        size = staged_steps(self._log.header.signature)
        evidence = sorted(s for s in self._log.durable.digests if start < s < stop)
        pieces = (
            piece
            for a, b in zip([start, *evidence], [*evidence, stop], strict=True)
            for piece in cuts(a, b, size)
        )
        read = stage(lambda a, b: read_stretch(self._log, self._data, a, b), pieces)
        try:
            for stretch in read:
                for executed in engine.advance(held, stretch):
                    held = executed.after
                    yield executed
        finally:
            read.close()

    def _engine(self, *, keep: bool) -> Engine:
        if keep in self._engines:
            return self._engines[keep]
        header = self._log.header
        signature = header.signature
        files = {name: self._log.program(name) for name in signature.programs}
        loaded = {
            name: artifact.load(name, files[name], signature, allow=self._allow) for name in files
        }
        if settable(self.differences, header.environment.get("platform", "cpu")):
            engine: Engine = RemoteEngine(
                signature, files, header.key, keep=keep, recorded=header.environment
            )
        else:
            engine = LocalEngine(signature, loaded, header.key, keep=keep)
        self._engines[keep] = engine
        return engine

    def _disagreeing(self, state: int, lanes: np.ndarray) -> list[str]:
        """Return the paths of leaves that do not agree with the digest of a stored state."""
        leaves = self._log.header.signature.state
        logged = np.frombuffer(self._log.durable.digests[state], np.uint32)
        if logged.size != 2 * len(leaves):
            return ["the digest itself"]
        differ = (logged.reshape(-1, 2) != lanes).any(axis=1)
        return [leaf.path for leaf, wrong in zip(leaves, differ, strict=True) if wrong]

    def _deviation(self, state: int, leaves: Sequence[Any]) -> tuple[str | None, float]:
        """Compare a replayed state with the stored one: first differing leaf, largest deviation."""
        first, largest = None, 0.0
        stored = self._log.checkpoint(state)
        for leaf, ours, theirs in zip(
            self._log.header.signature.state, leaves, stored, strict=True
        ):
            ours = np.asarray(ours)
            if ours.tobytes() == theirs.tobytes():
                continue
            first = first or leaf.path
            wide = np.float64 if jnp.issubdtype(ours.dtype, jnp.inexact) else np.int64
            with np.errstate(invalid="ignore"):
                gap = np.abs(ours.astype(wide) - theirs.astype(wide))
            largest = max(largest, float(np.nanmax(gap, initial=0.0)))
        return first, largest

    def _diverged(self, divergence: Divergence) -> DivergenceError:
        found = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in self.differences.items())
        return DivergenceError(
            f"the replay of {self._log.place} departs from the run {divergence}",
            why=f"the machine differs from the recorded one: {found}"
            if found
            else "nothing that identifies the machine differs: the computation does not repeat "
            "itself, or a file was changed",
            fix="replay where it was recorded; or pass exact=False to go on from each checkpoint "
            "and be told the deviation",
        )


class _Walk:
    """The evidence along one replay, and the first place where it disagrees."""

    def __init__(self, log: Log, start: int):
        self._log, self._agreed = log, f"state {start}"
        self.divergence: Divergence | None = None
        self.closed = start

    def check_losses(self, executed: Executed) -> None:
        """Compare the witnesses of the steps of one call; waits for their losses."""
        if self.divergence is not None:
            return
        start, stop = executed.start, executed.start + executed.count
        found = witness(np.atleast_2d(np.asarray(executed.losses)))
        differ = np.flatnonzero(found != self._log.column("witness", start, stop))
        last = start + int(differ[0]) - 1 if len(differ) else stop - 1
        if last >= start:
            self._agreed = f"the losses of step {last}"
        if len(differ):
            self.divergence = Divergence(self._agreed, f"the losses of step {last + 1}")

    def check_state(self, state: int, lanes: Callable[[], np.ndarray]) -> None:
        """Compare a state with its digest, if it has one."""
        logged = self._log.durable.digests.get(state)
        if self.divergence is not None or logged is None:
            return
        found = np.asarray(lanes(), np.uint32)
        short = len(logged) == SHORT_DIGEST
        here = short_digest(found) if short else found.tobytes()
        if here == logged:
            self._agreed, self.closed = f"state {state}", state
            return
        tensor = None
        if not short:
            differ = (np.frombuffer(logged, np.uint32).reshape(-1, 2) != found).any(axis=1)
            tensor = self._log.header.signature.state[int(np.argmax(differ))].path
        self.divergence = Divergence(self._agreed, f"state {state}", tensor)
