"""The proof, made while a run starts, that its first steps repeat themselves.

Three checks: the steps are executed a second time in this process; a third time in a fresh
process; and the program is traced a second time, which finds a loss that reads the clock, a
global random number or anything else that is not among its arguments.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from replay.artifact import Signature
from replay.errors import ReplayError
from replay.identity import environment, settings_here
from replay.trajectory import Engine, Stretch
from replay.worker import RemoteEngine

STEPS = 2


class SelfTest:
    """A self-test under way beside the training.

    Args:
        engine: the engine that is about to train.
        leaves: raw leaves of state 0.
        stretch: inputs of the first steps.
        signature: leaves of the programs.
        files: bytes of the trajectory programs.
        key: the run's key data.
        texts: name -> hash of the StableHLO of the programs.
        retrace: traces the program again and returns such hashes.
    """

    def __init__(
        self,
        engine: Engine,
        leaves: Sequence[Any],
        stretch: Stretch,
        *,
        signature: Signature,
        files: Mapping[str, bytes],
        key: Sequence[int],
        texts: Mapping[str, str],
        retrace: Callable[[], Mapping[str, str]],
    ):
        self._leaves = [np.array(leaf) for leaf in leaves]
        self._stretch = stretch.split(min(STEPS, stretch.size))[0]
        self._files, self._key, self._signature = files, key, signature
        self._texts, self._retrace = texts, retrace
        self.differs: list[str] = []
        self._settings = settings_here()
        self._first = self._run(engine)
        if self._run(engine) != self._first:
            self.differs.append("the first steps, executed twice in this process, differ")
        self._thread = threading.Thread(target=self._work, name="replay-selftest", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """Wait for the end of the test; return what differs, empty if nothing does."""
        self._thread.join()
        return "; ".join(self.differs)

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return not self._thread.is_alive()

    def _run(self, engine: Engine) -> tuple[bytes, ...]:
        state = engine.load(self._leaves)
        losses = []
        for executed in engine.advance(state, self._stretch):
            losses.append(np.asarray(executed.losses).tobytes())
            state = executed.after
        return (*losses, np.asarray(engine.fingerprint(state)).tobytes())

    def _work(self) -> None:
        with self._settings():
            try:
                self._trace_again()
            except Exception as error:  # of the user's own code, and in nobody's sight here
                said = error.what if isinstance(error, ReplayError) else repr(error)
                self.differs.append(f"the program cannot be traced a second time: {said}")
            try:
                self._run_elsewhere()
            except ReplayError as error:
                self.differs.append(f"the test in a fresh process failed: {error.what}")

    def _trace_again(self) -> None:
        if self._retrace() != self._texts:
            self.differs.append(
                "the program, traced twice, differs: it reads a random number, the clock or "
                "another thing that is not among its arguments, or one that has changed since it "
                "was recorded before (a new Program reads it anew)"
            )

    def _run_elsewhere(self) -> None:
        engine = RemoteEngine(
            self._signature, self._files, self._key, keep=False, recorded=environment()
        )
        if self._run(engine) != self._first:
            self.differs.append("the first steps, executed in a fresh process, differ")
        engine.close()
