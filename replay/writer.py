"""How a log grows beside a training: commits written in the background, never half believed.

The training loop hands over arrays that are still being computed; waiting for them, hashing,
compressing and syncing happen in one thread, in order, and the journal's record comes last.
"""

import collections
import contextlib
import ctypes
import dataclasses
import os
import queue
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.errors import DivergenceError, LogError, ReplayError
from replay.identity import short_digest, witness
from replay.indexing import Summary, columns_of, stored
from replay.journal import frame
from replay.log import JOURNAL, Log, delete_rows
from replay.store import StoredArray, lay_out


class Result(NamedTuple):
    """What some neighbouring steps have computed, still on the device.

    Attributes:
        start: the first step.
        losses: of each call of the engine: `[batch]` of one step or `[steps, batch]` of a block.
        aux: of each call its leaves, `[]` or `[batch]` of one step, with a leading axis of a block.
        weights: host array `[steps, batch]`, None for ones.
        index: of each step its columns of an index, `uint32[tensors, ...]`; nothing without one.
    """

    start: int
    losses: Sequence[Any]
    aux: Sequence[Sequence[Any]]
    weights: np.ndarray | None
    index: Sequence[Any] = ()


@dataclasses.dataclass
class Commit:
    """What becomes durable together: steps up to `state`, and the state itself at a checkpoint.

    Attributes:
        state: the state reached.
        digest: fingerprint of that state, `uint32[leaves, 2]`, still on the device.
        results: of the steps since the last commit.
        columns: `(array name, first step, rows)` for everything that is known on the host.
        metrics: what the user logged since the last commit.
        leaves: the raw leaves of a copy of the state, to be stored; None if not a checkpoint.
        drop: earlier checkpoints that the policy gives up.
        segment: what an index keeps of the segment that a checkpoint ends.
        closed: whether this is the end.
    """

    state: int
    digest: Any
    results: list[Result] = dataclasses.field(default_factory=list)
    columns: list[tuple[str, int, np.ndarray]] = dataclasses.field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    leaves: list[Any] | None = None
    drop: Sequence[int] = ()
    segment: Summary | None = None
    closed: bool = False


class LogWriter:
    """Writes commits in the background of a training.

    Waiting is bounded: at most one copy of a state is alive, because the next one is made only
    when the last is on disk; other commits queue up to eight deep.

    Args:
        log: the run, just created or about to be resumed, its lock held.
        on_error: `warn` goes on training without a log when the disk fails, `raise` does not.
        start: the state that recording begins at, or is taken up from.

    Attributes:
        bad_steps: steps whose mean loss was not finite, the first thousand.
    """

    def __init__(self, log: Log, *, on_error: str, start: int = 0):
        self._log, self._on_error = log, on_error
        self._place, self._header = log.place, log.header
        self.error: Exception | None = None
        self.bad_steps: list[int] = []
        self._row, self._segments = log.durable.rows, len(log.durable.segments)
        self._checkpoints = dict(log.own.checkpoints)
        known = log.own.steps if log.own.steps > log.first else 0  # a fork has no rows before
        self._chunks = {
            spec.name: _Chunk(StoredArray(log.place, spec), known, start)
            for group in ("steps", "data")[: 2 if log.header.data == "spooled" else 1]
            for spec in log.header.arrays[group]
        }
        self._start = start
        self._logged = log.column("witness", start, max(log.durable.steps, start))
        # Given in the training's own thread: where warnings are errors, they end what it does.
        self._warnings: collections.deque[str] = collections.deque()
        self._queue: queue.Queue[Commit | dict[str, Any] | None] = queue.Queue(maxsize=8)
        self._free = threading.Semaphore(1)
        self._thread = threading.Thread(target=self._run, name="replay-log", daemon=True)
        self._thread.start()

    def wait_for_checkpoint(self) -> None:
        """Wait until nobody reads the copy of a state any more; call it before making another.

        Whoever still held a view of it would keep its numbers: XLA then takes fresh memory.
        """
        self._free.acquire()

    def submit(self, job: Commit | dict[str, Any]) -> None:
        """Hand over a commit, or a small record for the journal.

        Raises:
            LogError: the disk has failed, with `on_error="raise"`.
            DivergenceError: a resumed run does not repeat what was logged.
        """
        self._queue.put(job)
        self._report()

    def close(self) -> None:
        """Wait until everything that was submitted is durable; raises like `submit`."""
        self.stop()
        self._report()

    def stop(self) -> None:
        """End the thread after what was submitted; raises nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _report(self) -> None:
        while self._warnings:
            warnings.warn(self._warnings.popleft(), RuntimeWarning, stacklevel=2)
        if isinstance(self.error, ReplayError):
            raise self.error
        if self.error is not None and self._on_error == "raise":
            raise self._cannot_write() from self.error

    def _run(self) -> None:
        _yield_to_training()
        while (job := self._queue.get()) is not None:
            try:
                if self.error is None:
                    self._append([job]) if isinstance(job, dict) else self._write(job)
            except Exception as error:  # whatever it is, the training must hear of it
                self.error = error
                if self._on_error == "warn" and not isinstance(error, ReplayError):
                    self._warnings.append(str(self._cannot_write()))
            finally:
                if isinstance(job, Commit) and job.leaves is not None:
                    job.leaves = None
                    _trim_heap()
                    self._free.release()

    def _write(self, commit: Commit) -> None:
        # Waited for first: meanwhile the training, undisturbed, begins its next step.
        lanes = np.asarray(commit.digest, np.uint32)
        for result in commit.results:
            self._put_result(result)
        for name, start, values in commit.columns:
            self._chunks[name].put(start, values)
        for chunk in self._chunks.values():
            chunk.write()
        digest = short_digest(lanes)
        steps = {"kind": "steps", "end": commit.state, "digest": digest, "metrics": commit.metrics}
        records: list[dict[str, Any]] = [steps]
        if commit.leaves is not None:
            for number, leaf in enumerate(commit.leaves):
                self._log.array("states", number).write(self._row, np.asarray(leaf)[None])
            place = {"state": commit.state, "row": self._row}
            records.append({"kind": "checkpoint", **place, "digest": lanes.tobytes()})
            if commit.segment is not None:
                records.append(self._put_segment(commit.segment))
            self._checkpoints[commit.state] = self._row
            self._row += 1
        if commit.drop:
            records.append({"kind": "dropped", "states": list(commit.drop)})
        if commit.closed:
            records.append({"kind": "closed"})
        self._append(records)
        delete_rows(self._log, [self._checkpoints.pop(state) for state in commit.drop])
        if commit.closed:
            self._trim(commit.state)

    def _put_result(self, result: Result) -> None:
        first = np.asarray(result.losses[0])
        join = np.concatenate if first.ndim == 2 else np.stack
        losses = join([np.asarray(part) for part in result.losses])
        start = result.start
        weights = np.ones((1, 1), np.float32) if result.weights is None else result.weights
        witnesses = witness(losses)
        logged = self._logged[start - self._start :][: len(losses)]
        differ = np.flatnonzero(logged != witnesses[: len(logged)])
        if len(differ):
            raise DivergenceError(
                f"{self._place}: step {start + differ[0]}, repeated while resuming, has other "
                "losses than the log",
                why="what came after it would not be the continuation of this run",
                fix="resume on the machine and with the versions that `replay show` prints",
            )
        self._chunks["steps/witness"].put(start, witnesses)
        with np.errstate(over="ignore", invalid="ignore"):
            means = (losses.astype(np.float64) * weights).sum(axis=1) / losses.shape[1]
            self._chunks["steps/loss"].put(start, means.astype(np.float32))
            for number, parts in enumerate(zip(*result.aux, strict=True)):
                values = join([np.asarray(part) for part in parts]).astype(np.float64)
                if values.ndim == 2:
                    total = np.broadcast_to(weights, values.shape).sum(axis=1)
                    values = (values * weights).sum(axis=1) / np.maximum(total, 1e-9)
                self._chunks[f"steps/aux_{number}"].put(start, values.astype(np.float32))
        bad = start + np.flatnonzero(~np.isfinite(means))
        if len(bad) and not self.bad_steps:
            self._warnings.append(
                f"the mean loss of step {bad[0]} is {means[bad[0] - start]}; recording goes on"
            )
        self.bad_steps += bad.tolist()[: 1000 - len(self.bad_steps)]

        if result.index:
            packed = np.stack([np.asarray(part) for part in result.index])
            for name, values in columns_of(packed).items():
                self._chunks[f"steps/{name}"].put(start, values)

    def _put_segment(self, segment: Summary) -> dict[str, Any]:
        """Write what an index keeps of a segment; return the record that makes it exist."""
        row, self._segments = self._segments, self._segments + 1
        number = 0
        for parts in stored(self._header.index, segment):
            for values in parts:
                self._log.array("segments", number).write(row, values[None])
                number += 1
        return {"kind": "segment", "start": segment.start, "stop": segment.stop, "row": row}

    def _append(self, records: list[dict[str, Any]]) -> None:
        self._place.append(JOURNAL, b"".join(map(frame, records)))

    def _trim(self, steps: int) -> None:
        """Tell readers of the zarr groups how many rows there are; our own reader knows."""
        lengths = {"states": self._row, "steps": steps, "segments": self._segments}
        for group, length in lengths.items():
            specs = self._header.arrays[group]
            if not specs:
                continue
            cut = [dataclasses.replace(s, shape=(length, *s.shape[1:])) for s in specs]
            states = {str(state): row for state, row in sorted(self._checkpoints.items())}
            attributes: dict[str, Any] = {"states": states} if group == "states" else {}
            if group == "steps" and self._log.first:
                attributes["first"] = self._log.first  # rows before it are those of the parent
            lay_out(self._place, group, cut, **attributes)

    def _cannot_write(self) -> LogError:
        return LogError(
            f"{self._place} cannot be written: {str(self.error).splitlines()[0]}",
            why="the run is valid up to its last commit, and nothing after it is recorded"
            + ("; the training itself goes on" if self._on_error == "warn" else ""),
            fix="make room (or repair the disk), then continue the run with resume=True",
        )


def _yield_to_training() -> None:
    """Give this thread, and those that it starts, what the training leaves of the processor."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _trim_heap() -> None:
    """Give the system what tracing, compiling or encoding have freed, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class _Chunk:
    """The chunk of a step column that is being filled; only whole chunks are ever written."""

    def __init__(self, array: StoredArray, known: int, start: int):
        self._array, self._known, self._size = array, known, array.spec.chunk[0]
        self._begin(start // self._size)

    def _begin(self, index: int) -> None:
        self._first, self._dirty = index * self._size, False
        self._stop = min(self._first + self._size, self._array.spec.shape[0])
        if self._first < self._known:  # taken up again: later rows must survive a partial write
            self._buffer = self._array.read(slice(self._first, self._stop)).copy()
        else:
            shape = (self._stop - self._first, *self._array.spec.shape[1:])
            self._buffer = np.zeros(shape, self._array.spec.dtype)

    def put(self, start: int, values: np.ndarray) -> None:
        """Take rows in ascending order; a chunk is written when the next one begins."""
        while len(values):
            if not self._first <= start < self._stop:
                self.write()
                self._begin(start // self._size)
            count = min(self._stop - start, len(values))
            self._buffer[start - self._first : start - self._first + count] = values[:count]
            self._dirty, start, values = True, start + count, values[count:]

    def write(self) -> None:
        """Write the chunk as it is now."""
        if self._dirty:
            self._array.write(self._first, self._buffer.copy())
            self._dirty = False
