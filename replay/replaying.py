"""Re-executing what was recorded, and comparing every bit that the log has kept."""

import contextlib
import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay import artifact
from replay.data import Data
from replay.errors import DivergenceError, Grade, LogError, ReplayError, printable
from replay.identity import (
    SHORT_DIGEST,
    differences,
    environment,
    fingerprint_on_host,
    short_digest,
    threads,
    witness,
)
from replay.log import JOURNAL, Log
from replay.trajectory import (
    Engine,
    Executed,
    LocalEngine,
    Stretch,
    cuts,
    prefetch,
    read_stretch,
    stage,
    staged_steps,
)
from replay.worker import RemoteEngine, settable

LATE = 16  # steps whose losses are compared together, so many that nobody waits for each
READY = 3  # steps that lie ready for who looks at them, where a thread replays ahead
AHEAD_BYTES = 2**27  # of states that are queued meanwhile: where one is large, nobody runs ahead


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a replay departs from its run.

    Attributes:
        after: the last state whose digest agrees, such as `state 16`. Losses that agree are no
            proof: a difference in the last place takes steps to show in them.
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
        return printable(where + tensor + known)


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


def _reason(segment: Segment) -> tuple[Grade, str]:
    """Return the grade of a segment and why it has none better."""
    return segment.grade, str(segment.error or segment.divergence or segment.grade.value)


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
        damage: what is wrong with files that no replay needs, looked for in a complete audit.
    """

    run: str
    segments: tuple[Segment, ...]
    steps: int
    seconds: float
    differences: dict[str, tuple]
    complete: bool
    damage: tuple[str, ...] = ()

    @property
    def grade(self) -> Grade:
        """The worst grade of a segment."""
        grade = Grade.BITWISE if self.segments else Grade.UNAUDITED
        for segment in self.segments:
            grade = grade & segment.grade
        return grade & Grade.FAILED if self.damage else grade

    def __str__(self) -> str:
        part = "all" if self.complete else "part"
        lines = [
            f"{self.grade}: {self.grade.value}",
            f"{self.steps:,} steps in {len(self.segments)} segments ({part} of {self.run}), "
            f"{self.seconds:.1f} s",
        ]
        groups = itertools.groupby(self.segments, _reason)
        bad = [(*why, [*alike]) for why, alike in groups if why[0] is not Grade.BITWISE]
        for grade, why, (first, *others) in bad[:10]:
            last = others[-1] if others else first
            lines.append(f"  states {first.start} to {last.stop}: {grade}: {why}")
        if more := sum(len(alike) for *_, alike in bad[10:]):
            lines.append(f"  and {more} more segments")
        told = {segment.error for segment in self.segments}
        lines += [f"  {error}" for error in self.damage if error not in told]
        for name, (then, now) in self.differences.items():
            lines.append(f"  {name}: recorded with {then!r}, here {now!r}")
        return "\n".join(map(printable, lines))

    __repr__ = __str__


class Replayed(NamedTuple):
    """One replayed step, raw.

    Attributes:
        executed: what the engine computed; `before` and `grads` are kept, or of states what was
            looked at.
        ids: `int32[batch]`.
        weights: `float32[batch]`.
        batch: leaves `[batch, ...]`.
        deviation: largest deviation from the log met so far; 0 while every bit agrees.
        closed: the last state whose digest has agreed.
        agrees: compares the losses of all steps up to this one, for who looks at no more of them.
            Tells whether they agree; where a replay is to be exact, raises if not.
        beforehand: what was computed before the step took the memory of its state.
    """

    executed: Executed
    ids: np.ndarray
    weights: np.ndarray
    batch: Sequence[np.ndarray]
    deviation: float
    closed: int
    agrees: Callable[[], bool]
    beforehand: Any = None


class Rests:
    """The last states at which a replay could have rested, for a later one to go on from.

    One copy is made every `EVERY` steps, into the memory of the oldest of `KEPT`: the last may lie
    beyond the step that is looked at, where the replay is ahead.
    """

    EVERY = 32
    KEPT = 3

    def __init__(self):
        self._kept: list[tuple[int, Sequence[Any], _Walk]] = []

    def nearest(self, first: int, last: int) -> tuple[int, Sequence[Any]] | None:
        """Return the latest of states `(first, last]`, with its leaves; None if there is none.

        Only those up to which the log agrees: a replay may be broken off before it was compared. Of
        one that has departed from the log, only what a digest has closed.
        """
        kept = sorted(self._kept, key=lambda one: one[0], reverse=True)
        for state, leaves, walk in kept:
            if first < state <= last and walk.agrees(state):
                if walk.divergence is None or state <= walk.closed:
                    return state, leaves
        return None

    def take(self, state: int, engine: Engine, held: Any, walk: "_Walk") -> None:
        """Take a state that a walk has come to, if one is due."""
        if state % self.EVERY == 0 and state not in {state for state, *_ in self._kept}:
            into = self._kept.pop(0)[1] if len(self._kept) == self.KEPT else None
            self._kept.append((state, engine.fetch(held, into), walk))


class Replayer:
    """Re-executes logged steps, here or in a worker started with the recorded settings.

    Args:
        log: the run.
        data: the samples; None where the run holds them or where none were passed.
        allow: custom calls that its programs may make besides the usual ones.
        like: a replayer of another run, such as the parent of a fork, whose compiled programs are
            used where they are the same.
    """

    def __init__(
        self,
        log: Log,
        data: Data | None,
        *,
        allow: Sequence[str] = (),
        like: "Replayer | None" = None,
    ):
        self._log, self._data, self._allow = log, data, tuple(allow)
        shared = like is not None and like._allow == self._allow
        self._engines: dict[tuple, Engine] = like._engines if like and shared else {}
        self._making = like._making if like and shared else threading.RLock()
        self._here: dict[str, Any] = {}
        self._differences: dict[str, tuple] | None = None

    @property
    def differences(self) -> dict[str, tuple]:
        """What is other here than when the run was recorded; starts the backend.

        Of the ancestors of a fork, too, with the step before which it concerns.
        """
        if self._differences is None:
            log, found = self._log, dict(self._of(self._log))
            while log.parent is not None and log.first:
                told = f" (before step {log.first:,})"
                log = log.parent
                for name, pair in self._of(log).items():
                    if found.get(name) != pair:
                        found[name + told] = pair
            self._differences = found
        return self._differences

    def _of(self, log: Log) -> dict[str, tuple]:
        """Return what is other here than when this run, or an ancestor of it, was recorded."""
        if not self._here:
            self._here = environment()
        return differences(log.header.environment, self._here)

    def reopened(self, log: Log) -> "Replayer":
        """Return a replayer of the same run as its log is now."""
        return Replayer(log, self._data, allow=self._allow, like=self)

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
                else f"{JOURNAL} names nothing after it: it was not durable when the recording "
                "stopped, or the file was cut off",
                fix=f"ask for a state up to {durable.steps}"
                + ("" if durable.closed else ", or continue the run with resume=True"),
            )
        stored = [s for s in durable.checkpoints if s <= state]
        if not stored:
            raise LogError(
                f"{self._log.place}: {JOURNAL} names no stored state at or before state {state}",
                why="a replay starts from a stored state",
                fix="restore the file from a copy of the run, or record the run again",
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
            row = self._log.durable.checkpoints[state]
            raise LogError(
                f"{self._log.place}: the stored state {state} does not agree with its digest, "
                f"first in states/{wrong[0]}/c/{row} "
                f"({self._log.header.signature.state[wrong[0]].path})",
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
        engine = self.engine(start, keep=False)
        walk = _Walk(self._log, start)
        held = engine.load(leaves)
        for executed in self._execute(engine, held, start, state):
            held = executed.after
            walk.check(executed, engine, late=self.ahead)
        walk.finish()
        if walk.divergence is not None:
            if exact:
                raise self._diverged(walk.divergence)
            warnings.warn(f"state {state} is not exact: {walk.divergence}", stacklevel=3)
        return [np.asarray(leaf) for leaf in engine.fetch(held)]

    def steps(
        self,
        start: int,
        stop: int,
        *,
        exact: bool = True,
        late: bool = False,
        look: Callable[[int, Sequence[Any]], Any] | None = None,
        beforehand: Callable[..., Any] | None = None,
        rests: Rests | None = None,
        rest: bool = False,
    ) -> Generator[Replayed]:
        """Replay steps `[start, stop)` for somebody who looks at each.

        With `exact`, the first difference raises. Without, it is a warning, every stored state on
        the way replaces the replayed one, and the deviation met there is reported with the later
        steps.

        Args:
            start: the first step.
            stop: the step after the last.
            exact: see above.
            late: whether the losses of some steps are compared together, when later ones are under
                way, in a thread of their own where the replay `overlaps` with who looks at it: for
                who shows nothing before the end, and asks `agrees` where they end early.
            look: `look(number, state)`, whose result stands in the place of a state; each step then
                takes the memory of the state before it.
            beforehand: `beforehand(step, state, ids, weights, batch)`, whose result, computed
                before that happens, is handed out with the step.
            rests: of an exact replay, to go on from if one lies nearer than what is stored.
            rest: whether to leave some there.
        """
        if stop <= start:
            return
        self.anchor(stop)
        walk = self._steps(
            self.anchor(start), start, stop, exact=exact, late=late, look=look,
            beforehand=beforehand, rests=rests, rest=rest,
        )  # fmt: skip
        if late and self.overlaps:
            walk = prefetch(walk, self._ready, name="replay-steps", wait=True)
        with contextlib.closing(walk):
            for found in walk:
                if isinstance(found, Divergence):
                    warnings.warn(f"not every step is exact: {found}", stacklevel=3)
                else:
                    yield found
                found = None  # what is large about a step is gone before the next one

    def _steps(
        self,
        anchor: int,
        start: int,
        stop: int,
        *,
        exact: bool,
        late: bool,
        look: Callable[[int, Sequence[Any]], Any] | None,
        beforehand: Callable[..., Any] | None,
        rests: Rests | None,
        rest: bool,
    ) -> Generator[Replayed | Divergence]:
        """Replay steps from a stored state on; yield where they depart from the log, too."""
        signature = self._log.header.signature
        keep = look is None
        engine = self.engine(anchor, keep=keep, observed=True)
        rested = rests.nearest(anchor, start) if rests is not None else None
        begin, leaves = rested or (anchor, self.stored(anchor))
        held = engine.load(leaves)
        seen = look(begin, held) if look is not None else None
        walk, deviation = _Walk(self._log, anchor, begin), 0.0
        resting = rests if rest and exact and isinstance(engine, LocalEngine) else None
        waits = (self.ahead if exact else 1) if late else 0
        stored = sorted(s for s in self._log.durable.checkpoints if begin < s < stop)
        edges = [begin, *stored, stop]
        for a, b in zip(edges, edges[1:], strict=False):
            if a in self._forks and a > begin:  # where the state of a fork is stored
                following = self.engine(a, keep=keep, observed=True)
                if following is not engine:
                    held = following.load([*map(np.asarray, engine.fetch(held))])
                    engine = following
            for stretch in self._read(a, b):
                ones = np.ones(signature.batch_size, np.float32)
                calls = engine.advance(held, stretch)
                for row in range(stretch.first, stretch.stop):
                    step = stretch.start + row
                    weights = ones if stretch.weights is None else stretch.weights[row]
                    inputs = (stretch.ids[row], weights, [leaf[row] for leaf in stretch.batch])
                    had = None
                    if beforehand is not None and step >= start:
                        had = beforehand(step, held, *inputs)
                    executed = self._entered(engine, next(calls))
                    held = executed.after
                    walk.check(executed, engine, late=waits if step + 1 < stop else 0)
                    if walk.divergence is not None and exact:
                        raise self._diverged(walk.divergence)
                    if walk.divergence is not None and not deviation:
                        deviation = float("nan")
                    if resting is not None:
                        resting.take(step + 1, engine, held, walk)
                    if look is not None:
                        before, seen = seen, look(step + 1, held)
                        executed = executed._replace(before=before, after=seen)
                    if step >= start:
                        agrees = functools.partial(self._agrees, walk, exact, step + 1)
                        yield Replayed(executed, *inputs, deviation, walk.closed, agrees, had)
                assert next(calls, None) is None, "a call for each step"
            if walk.divergence is None:
                continue
            divergence = walk.divergence
            if b in self._log.durable.checkpoints:
                tensor, found = self._deviation(b, engine.fetch(held))
                divergence = dataclasses.replace(divergence, tensor=tensor, deviation=found)
                found = found or np.nextafter(0.0, 1.0)  # the losses differed: not every bit agrees
                deviation = found if deviation != deviation else max(deviation, found)
                held = engine.load(self.stored(b))
                seen = look(b, held) if look is not None else None
                walk = _Walk(self._log, b)
            yield divergence

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
        last = edges[-1]
        if start < last <= stop and last in durable.checkpoints:
            try:  # every other stored state is where a segment starts
                self.stored(last)
            except LogError as error:
                segments.append(Segment(last, last, Grade.FAILED, error=error.what))
        if not edges[1:] and edges[0] in durable.checkpoints and start <= edges[0]:
            self.stored(edges[0])
            segments.append(Segment(edges[0], edges[0], Grade.BITWISE))
        return segments

    def _audit(self, start: int, stop: int, progress: Callable[[int], None]) -> Segment:
        engine = self.engine(start, keep=False)
        held = engine.load(self.stored(start))
        walk = _Walk(self._log, start)
        for executed in self._execute(engine, held, start, stop):
            held = executed.after
            walk.check(executed, engine, late=self.ahead)
            progress(executed.count)
        walk.finish()
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
        for stretch in self._read(start, stop):
            for executed in engine.advance(held, stretch):
                executed = self._entered(engine, executed)
                held = executed.after
                yield executed

    def _read(self, start: int, stop: int) -> Iterator[Stretch]:
        """Read the inputs of steps, cut so that a state with a digest is at the end of a stretch.

        Only there can an engine be asked for its state: a worker is ahead of what it has sent.
        """
        size = staged_steps(self._log.header.signature)
        evidence = sorted(s for s in self._log.durable.digests if start < s < stop)
        pieces = (
            piece
            for a, b in zip([start, *evidence], [*evidence, stop], strict=True)
            for piece in cuts(a, b, size)
        )
        with contextlib.closing(
            stage(lambda a, b: read_stretch(self._log, self._data, a, b), pieces)
        ) as stretches:
            yield from stretches

    @functools.cached_property
    def _forks(self) -> dict[int, dict[int, bytes]]:
        """Where this run and its ancestors begin as forks, and the leaves that are set there."""
        found: dict[int, dict[int, bytes]] = {}
        log, limit = self._log, self._log.durable.steps
        while log.header.parent is not None and log.parent is not None:
            if log.first <= limit:  # else a descendant began before it
                found[log.first] = {**log.header.parent.leaves, **found.get(log.first, {})}
                limit = log.first
            log = log.parent
        return found

    def _entered(self, engine: Engine, executed: Executed) -> Executed:
        """Set the leaves that a fork sets in the state that it begins with.

        That state has evidence, or is asked for, so that no call of an engine goes beyond it.
        """
        state = executed.start + executed.count
        assert not any(executed.start < s < state for s in self._forks), "a fork within a call"
        if not self._forks.get(state):
            return executed
        leaves = [*map(np.asarray, engine.fetch(executed.after))]
        for number, data in self._forks[state].items():
            old = leaves[number]
            leaves[number] = np.frombuffer(data, old.dtype).reshape(old.shape)
        return executed._replace(after=engine.load(leaves))

    def engine(self, step: int, *, keep: bool, observed: bool | None = None) -> Engine:
        """Return what executes a step: the programs of the run, or of the ancestor that took it.

        Args:
            step: the step.
            keep: whether every state stays valid.
            observed: whether gradients are handed out; if None, where states stay valid.

        Raises:
            LogError, IdentityError: a program is damaged or cannot be executed here.
        """
        with self._making:  # of whom walks side by side, one compiles
            return self._engine(step, keep=keep, observed=observed)

    def _engine(self, step: int, *, keep: bool, observed: bool | None) -> Engine:
        log = self._log.origin(step)
        header, signature = log.header, log.header.signature
        hashes = [header.programs[name].get("sha256") for name in signature.programs]
        # A fork that changes neither program nor key goes on with the engine of its parent.
        settings = repr(sorted(header.environment.items()))
        observed = keep if observed is None else observed
        remote = settable(self._of(log), header.environment.get("platform", "cpu"))
        keep = observed if remote else keep  # what a worker hands out stays valid
        known = (keep, observed, signature, tuple(hashes), header.key, settings)
        if known in self._engines:
            return self._engines[known]
        files = {name: log.program(name) for name in signature.programs}
        loaded = {
            name: artifact.load(name, files[name], signature, allow=self._allow) for name in files
        }
        if remote:
            engine: Engine = RemoteEngine(
                signature, files, header.key, keep=keep, recorded=header.environment
            )
        else:
            try:
                engine = LocalEngine(signature, loaded, header.key, keep=keep)
                engine.observed = observed
            except Exception as error:  # the compiler raises whatever a forged program leads it to
                raise LogError(
                    f"{log.place}: the archived {' and '.join(signature.programs)} cannot be "
                    f"compiled: {type(error).__name__}: {str(error)[:300]}",
                    why="states between the stored ones exist only by executing them",
                    fix="open the run with the versions of jax and jaxlib that `replay show` "
                    "prints; if they are these, restore program/ from a copy of the run",
                ) from error
        self._engines[known] = engine
        return engine

    def _disagreeing(self, state: int, lanes: np.ndarray) -> list[int]:
        """Return the numbers of leaves that do not agree with the digest of a stored state."""
        logged = np.frombuffer(self._log.durable.digests[state], np.uint32).reshape(-1, 2)
        return np.flatnonzero((logged != lanes).any(axis=1)).tolist()

    @functools.cached_property
    def overlaps(self) -> bool:
        """Whether steps are replayed in a thread of their own, for who asks for them `late`.

        There is then no need to be done with a state before the next one is computed, but several
        are kept. Where XLA has one thread only, both would take turns; a worker, which may be asked
        for several walks by one thread alone, runs ahead by itself.
        """
        log = self._log
        while log is not None:
            if settable(self._of(log), log.header.environment.get("platform", "cpu")):
                return False
            log = log.parent if log.first else None
        return self._ready > 0 and threads() > 1

    @property
    def _ready(self) -> int:
        """How many steps may lie ready, besides three: of who looks, and of who replays."""
        grads = sum(leaf.nbytes for leaf in self._log.header.signature.grads)
        return min(READY, AHEAD_BYTES // (self._state_bytes + grads) - 3)

    @functools.cached_property
    def ahead(self) -> int:
        """How many steps may be under way before anybody waits for them."""
        return max(1, min(LATE, AHEAD_BYTES // self._state_bytes))

    @functools.cached_property
    def _state_bytes(self) -> int:
        return max(1, sum(leaf.nbytes for leaf in self._log.header.signature.state))

    def _agrees(self, walk: "_Walk", exact: bool, state: int) -> bool:
        if walk.agrees(state):
            return True
        if exact and walk.divergence is not None:
            raise self._diverged(walk.divergence)
        return False

    def _deviation(self, state: int, leaves: Sequence[Any]) -> tuple[str | None, float]:
        """Compare a replayed state with the stored one: first differing leaf, largest deviation.

        The deviation is infinite where only one of two numbers is finite, and never zero where
        bits differ: 0.0 and -0.0 count as the smallest difference there is.
        """
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
            wide = np.complex128 if ours.dtype.kind == "c" else wide
            with np.errstate(invalid="ignore"):
                gap = np.abs(ours.astype(wide) - theirs.astype(wide)).reshape(-1)
            pairs = [np.frombuffer(x.tobytes(), np.uint8) for x in (ours, theirs)]
            differ = (pairs[0] != pairs[1]).reshape(gap.size, -1).any(axis=1)
            gap = np.where(np.isnan(gap), np.inf, gap)[differ]
            largest = max(largest, float(gap.max()) or np.nextafter(0.0, 1.0))
        return first, largest

    def _diverged(self, divergence: Divergence) -> DivergenceError:
        found = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in self.differences.items())
        if found:
            why = f"the machine differs from the recorded one: {found}"
        elif self._compiled_otherwise():
            why = "nothing that identifies the machine differs, but the compiler makes another "
            why += "executable of the archived program than it did then"
        else:
            why = "nothing that identifies the machine differs: the computation does not repeat "
            why += "itself, or a file was changed"
        return DivergenceError(
            f"the replay of {self._log.place} departs from the run {divergence}",
            why=why,
            fix="replay where it was recorded; or pass exact=False to go on from each checkpoint "
            "and be told the deviation",
        )

    def _compiled_otherwise(self) -> bool:
        """Whether the last program that moved the state is compiled to something else here."""
        step = max(self._log.durable.steps - 1, 0)
        engine = self.engine(step, keep=False)  # as who records compiles it
        if not isinstance(engine, LocalEngine):
            return False
        programs = self._log.origin(step).header.programs
        return any(
            programs[name].get("optimized") != here for name, here in engine.optimized().items()
        )


class _Walk:
    """The evidence along one replay, and the first place where it disagrees.

    Args:
        log: of the run.
        start: the state whose digest is known to agree.
        begin: a later one that an exact replay from there has come to, to go on from.
    """

    def __init__(self, log: Log, start: int, begin: int | None = None):
        self._log, self._agreed = log, f"state {start}"
        self._waiting: list[Any] = []
        self._lock = threading.RLock()  # who replays compares, and who takes no more of the steps
        self._compared = start if begin is None else begin
        self.divergence: Divergence | None = None
        self.departed, self.closed = 0, start

    def check(self, executed: Executed, engine: Engine, *, late: int = 0) -> None:
        """Compare the witnesses of the steps of one call, and the digest of the state after.

        Up to `late` calls may wait until they are compared together, which takes less time, and
        until then nobody waits for the device. A digest waits for nothing.
        """
        state = executed.start + executed.count
        with self._lock:
            self._waiting.append(executed.losses)
            if state in self._log.durable.digests:
                self.finish()
                self._check_state(state, engine, executed.after)
            elif len(self._waiting) > late:
                self._compare(len(self._waiting) - (late > 0))  # the last one is still computed

    def finish(self) -> None:
        """Compare whatever waits."""
        with self._lock:
            self._compare(len(self._waiting))

    def agrees(self, state: int) -> bool:
        """Compare what waits of the steps up to a state, one to a call; tell whether it agrees."""
        with self._lock:
            self._compare(min(len(self._waiting), max(0, state - self._compared)))
        return self.divergence is None or self.departed > state

    def _compare(self, count: int) -> None:
        if self.divergence is not None:
            self._waiting = []  # nobody compares what comes after
        first = self._waiting[:count]
        if not first:
            return
        found = witness(np.concatenate([np.atleast_2d(np.asarray(losses)) for losses in first]))
        stop = self._compared + len(found)
        differ = np.flatnonzero(found != self._log.column("witness", self._compared, stop))
        if len(differ):
            step = self._compared + int(differ[0])
            self.departed = step + 1
            self.divergence = Divergence(self._agreed, f"the losses of step {step}")
        # Only now: what could not be compared was not.
        self._waiting, self._compared = self._waiting[count:], stop

    def _check_state(self, state: int, engine: Engine, held: Any) -> None:
        logged = self._log.durable.digests.get(state)
        if self.divergence is not None or logged is None:
            return
        found = np.asarray(engine.fingerprint(held), np.uint32)
        short = len(logged) == SHORT_DIGEST
        here = short_digest(found) if short else found.tobytes()
        if here == logged:
            self._agreed, self.closed = f"state {state}", state
            return
        tensor = None
        if not short:
            differ = (np.frombuffer(logged, np.uint32).reshape(-1, 2) != found).any(axis=1)
            tensor = self._log.header.signature.state[int(np.argmax(differ))].path
        self.departed = state
        self.divergence = Divergence(self._agreed, f"state {state}", tensor)
