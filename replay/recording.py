"""A training under way: steps executed, and what of them is due for the log."""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from replay.checkpoints import Schedule
from replay.indexing import Observer
from replay.log import Log
from replay.selftest import SelfTest
from replay.trajectory import Engine, Executed, Stretch, checksums
from replay.writer import Commit, LogWriter, Result


class Recording:
    """Executes stretches of steps and hands what they computed to the log.

    Args:
        log: the run, created or reopened, its lock held.
        engine: the compiled programs.
        leaves: raw leaves of the state to begin at.
        start: the number of that state.
        schedule: when states are stored.
        observer: what an index looks at each step with; None without one.
        on_log_error: as for `LogWriter`.
        commit_steps: steps after which a commit is due.
        commit_seconds: seconds after which one is.

    Attributes:
        step: the state reached.
        state: as the engine holds it.
        last: what the last call of the engine computed.
        intact: whether `state` is the state `step`: not while steps are executed, and never again
            where that was interrupted.
    """

    def __init__(
        self,
        log: Log,
        engine: Engine,
        leaves: Sequence[Any],
        *,
        start: int,
        schedule: Schedule,
        observer: Observer | None = None,
        on_log_error: str,
        commit_steps: int,
        commit_seconds: float,
    ):
        self.log, self.engine, self.step = log, engine, start
        self.state = engine.load(leaves)
        self.last: Executed | None = None
        self.test: SelfTest | None = None
        self.writer = LogWriter(log, on_error=on_log_error, start=start)
        self._schedule, self._observer = schedule, observer
        if observer is not None:
            observer.begin(start, self.state)
        arrays = log.header.arrays
        spooled = arrays["data"] if log.header.data == "spooled" else ()
        self._names = {spec.name for spec in (*arrays["steps"], *spooled)}
        self._stored = set(log.own.checkpoints)
        self._commit_steps, self._commit_seconds = commit_steps, commit_seconds
        self._results: list[Result] = []
        self._columns: list[tuple[str, int, np.ndarray]] = []
        self._metrics: list[tuple[int, dict[str, float]]] = []
        # One copy for all checkpoints: fresh memory would cost several times the copying. Copied
        # into at once, so that nothing is compiled when the training is under way.
        self._copy: Sequence[Any] | None = engine.fetch(self.state, into=engine.fetch(self.state))
        self._committed, self.intact = start, True
        self._began = self._committed_at = time.perf_counter()
        self._busy = 0.0
        if log.own.checkpoints:
            self.writer.submit({"kind": "resumed", "state": start})
        else:
            self._commit(checkpoint=True)

    def measure(self, metrics: dict[str, float]) -> None:
        """Keep numbers that the user logs at the present step."""
        self._metrics.append((self.step, metrics))

    def execute(self, stretch: Stretch) -> None:
        """Execute a stretch; a checkpoint can only fall on its end."""
        assert self.intact and stretch.begin == self.step, "a step left out or taken twice"
        begun, self.intact = time.perf_counter(), False
        losses, aux, seen, count = [], [], [], 0
        for executed in self.engine.advance(self.state, stretch):
            self.state, self.last = executed.after, executed
            if self._observer is not None:
                seen.append(self._observer.take(executed.after, executed.grads))
                self.last = executed._replace(grads=None)
            losses.append(executed.losses)
            aux.append(executed.aux)
            count += executed.count
        self.step, self.intact = self.step + count, True
        elapsed = time.perf_counter() - begun
        self._busy += elapsed
        self._keep(stretch, losses, aux, seen, round(1e6 * elapsed / count))
        if self._schedule.due(self.step, busy=self._busy, wall=time.perf_counter() - self._began):
            self._commit(checkpoint=True)
        elif (
            self.step - self._committed >= self._commit_steps
            or time.perf_counter() - self._committed_at >= self._commit_seconds
        ):
            self._commit(checkpoint=False)

    def close(self, *, complete: bool) -> None:
        """Store the state reached, unless it is stored, and wait until all is durable.

        A stretch that was interrupted half way has no state to store: the run then ends at its
        last commit, and `resume` repeats what came after.
        """
        try:
            if self.intact and (complete or self._metrics or self.step not in self._stored):
                self._commit(checkpoint=self.step not in self._stored, closed=complete)
            self._report_test()
        finally:
            self.writer.close()
            self._copy = None

    def _keep(
        self, stretch: Stretch, losses: list, aux: list, seen: list, microseconds: int
    ) -> None:
        rows = slice(stretch.first, stretch.stop)
        weights = None if stretch.weights is None else stretch.weights[rows]
        self._results.append(Result(stretch.begin, losses, aux, weights, seen))
        ids, ones = stretch.ids[rows], np.ones((1, 1), np.float32)
        batch = [leaf[rows] for leaf in stretch.batch]
        known = {
            "steps/ids": lambda: ids,
            "steps/weights": lambda: (
                np.broadcast_to(ones, ids.shape) if weights is None else weights
            ),
            "steps/microseconds": lambda: np.full(
                len(ids), min(microseconds, 2**32 - 1), np.uint32
            ),
            "steps/batch_crc32c": lambda: checksums(batch),
            **{f"data/{i}": lambda i=i: batch[i] for i in range(len(batch))},
        }
        for name in self._names & set(known):
            self._columns.append((name, stretch.begin, known[name]()))

    def _commit(self, *, checkpoint: bool, closed: bool = False) -> None:
        leaves = None
        if checkpoint:
            self.writer.wait_for_checkpoint()
            leaves = self._copy = self.engine.fetch(self.state, into=self._copy)
        # The fingerprint of a copy, where there is one: the next step, which writes over the state,
        # waits for whoever still reads it.
        digest = self.engine.fingerprint(self.state if leaves is None else leaves)
        drop, segment = (), None
        if checkpoint and self._observer is not None and self._observer.start < self.step:
            segment = self._observer.close()
        if checkpoint:
            drop = self._schedule.give_up(self.step)
            self._stored = (self._stored | {self.step}) - set(drop)
        if self.test is not None and self.test.done:
            self._report_test()
        self.writer.submit(
            Commit(
                state=self.step,
                digest=digest,
                results=self._results,
                columns=self._columns,
                metrics=self._metrics,
                leaves=None if leaves is None else list(leaves),
                drop=drop,
                segment=segment,
                closed=closed,
            )
        )
        self._results, self._columns, self._metrics = [], [], []
        self._committed, self._committed_at = self.step, time.perf_counter()

    def _report_test(self) -> None:
        if self.test is None:
            return
        differs = self.test.wait()
        self.test = None
        self.writer.submit({"kind": "selftest", "differs": differs})
        if differs:
            warnings.warn(
                f"{self.log.place} will not replay bit for bit: {differs}\n  recording goes on, "
                "and its grade starts at NUMERIC\n  fix: pass all randomness through the key; with "
                "NPROC=1 before Python starts, XLA computes with one thread",
                RuntimeWarning,
                stacklevel=2,
            )
