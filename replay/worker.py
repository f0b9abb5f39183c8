"""A trajectory in another process, started with the thread count and settings of the record.

The parent sends programs, states and inputs and receives losses, gradients and states, as plain
bytes over pipes: nothing is pickled, and the worker never sees the run directory.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from replay import artifact
from replay.artifact import Signature
from replay.errors import IdentityError
from replay.identity import NUMERIC_FLAGS, environment, fingerprint_on_host
from replay.journal import pack
from replay.trajectory import Executed, LocalEngine, Stretch

# Settings that a fresh process can be given; everything else about a machine is what it is.
SETTABLE = ("threads", "xla_flags", "x64", "matmul_precision", "threefry_partitionable")


def settable(differences: Mapping[str, tuple], platform: str) -> bool:
    """Tell whether settings differ that a worker can be given, and that matter on a platform."""
    beside = () if platform == "cpu" else ("threads",)
    return any(name in SETTABLE and name not in beside for name in differences)


def _variables(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return environment variables for the recorded settings; the record is not trusted."""
    threads = recorded.get("threads")
    if type(threads) is not int or not 1 <= threads <= 4096:
        raise IdentityError(
            f"the run was recorded with {threads!r} threads",
            why="the worker that replays it is started with that number",
            fix="restore run.msgpack from a copy of the run",
        )
    flags = recorded.get("xla_flags")
    flags = flags if isinstance(flags, dict) else {}
    flags = {name: str(flags[name]) for name in NUMERIC_FLAGS if name in flags}
    clean = {k: v for k, v in flags.items() if re.fullmatch(r"[\w.,-]+", v, re.ASCII)}
    variables = {"NPROC": str(threads)}
    variables["XLA_FLAGS"] = " ".join(f"--{name}={value}" for name, value in clean.items())
    variables["JAX_ENABLE_X64"] = "1" if recorded.get("x64") is True else "0"
    partitionable = recorded.get("threefry_partitionable") is not False
    variables["JAX_THREEFRY_PARTITIONABLE"] = "1" if partitionable else "0"
    precision = recorded.get("matmul_precision")
    if precision in ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32"):
        variables["JAX_DEFAULT_MATMUL_PRECISION"] = precision
    platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
    if (platform := str(recorded.get("platform"))) in platforms:
        variables["JAX_PLATFORMS"] = platforms[platform]
    return variables


class RemoteEngine:
    """An engine whose programs run in a worker process.

    Args:
        signature: leaves of the programs.
        files: bytes of the trajectory programs, already checked by `artifact.load`.
        key: the run's key data.
        keep: whether states and gradients of every step are sent back.
        recorded: the environment to give the worker.

    Raises:
        IdentityError: the worker cannot be given that environment, or has died.
    """

    def __init__(
        self,
        signature: Signature,
        files: Mapping[str, bytes],
        key: Sequence[int],
        *,
        keep: bool,
        recorded: Mapping[str, Any],
    ):
        self._signature, self._keep = signature, keep
        variables = _variables(recorded)
        self._errors = tempfile.TemporaryFile()
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        start = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from replay.worker import serve; serve({theirs_in}, {theirs_out})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            env={**os.environ, **variables},
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        # Not __del__: in a cycle the file and the process may be collected before their engine.
        self._end = weakref.finalize(self, _end, self._process, self._errors)
        os.close(theirs_in)
        os.close(theirs_out)
        self._present: _Remote | None = None
        self._ahead = 0
        self._out, self._in = Connection(ours_out), Connection(ours_in)
        names = sorted(files)
        blobs = [np.frombuffer(files[name], np.uint8) for name in names]
        setup = {
            "signature": signature.to_plain(),
            "key": [int(word) for word in key],
            "keep": keep,
            "names": names,
        }
        found, _ = self._ask("setup", setup, blobs)
        wrong = {
            name: (recorded.get(name), found["environment"][name])
            for name in SETTABLE
            if name in recorded and recorded[name] != found["environment"][name]
        }
        if wrong:
            self.close()
            raise IdentityError(
                "a worker process could not be given the recorded settings: "
                + "; ".join(f"{k} is {b!r}, recorded {a!r}" for k, (a, b) in wrong.items()),
                why="another thread count or another setting computes other bits",
                fix="open the run on a machine and with versions like those in `replay show`",
            )

    def load(self, leaves: Sequence[Any]) -> "_Remote":
        """Send raw leaves to the worker as its state."""
        state = _Remote(list(leaves))
        self._hold(state)
        return state

    def fingerprint(self, state: "_Remote | Sequence[np.ndarray]") -> np.ndarray:
        """Return the fingerprint of the worker's state, or of leaves that were fetched."""
        if not isinstance(state, _Remote):
            return fingerprint_on_host(state)
        self._hold(state)
        return self._ask("fingerprint", {}, [])[1][0]

    def fetch(self, state: "_Remote", into: Sequence[Any] | None = None) -> list[np.ndarray]:
        """Bring a state here; `into` is not used."""
        if state.leaves is None:
            self._hold(state)
            state.leaves = self._ask("fetch", {}, [])[1]
        return state.leaves

    def advance(self, state: "_Remote", stretch: Stretch) -> Iterator[Executed]:
        """Have the worker execute a stretch; results come as the worker has them."""
        start, done, stop, ids, weights, batch = stretch
        asked = {"start": start, "stop": stop, "weights": weights is not None}
        inputs = [ids, *([] if weights is None else [weights]), *batch]
        aux = len(self._signature.aux)
        while done < stop:
            if not self._ahead or state is not self._present:
                self._hold(state)
                self._send("advance", {**asked, "first": done}, inputs)
                self._ahead = stop - done
            count, arrays = self._result()
            losses, reported, rest = arrays[0], arrays[1 : 1 + aux], arrays[1 + aux :]
            grads = rest[: len(self._signature.grads)] if self._keep else None
            after = _Remote(rest[len(self._signature.grads) :] if self._keep else None)
            before, self._present = state if self._keep else None, after
            yield Executed(start + done, count, losses, reported, grads, before, after)
            state, done = after, done + count

    def close(self) -> None:
        """End the worker."""
        self._out.close()
        self._in.close()
        self._end()

    def _hold(self, state: "_Remote") -> None:
        """Give the worker a state, unless it is the one it has.

        The worker has one state, but walks may take turns, or be left half way: what such a walk
        has not taken is thrown away, or it would be taken for the answer to another question.
        """
        while self._ahead:
            self._result()
            self._present = None
        if state is not self._present:
            assert state.leaves is not None, "a walk that keeps no states is not interrupted"
            self._ask("load", {}, state.leaves)
            self._present = state

    def _result(self) -> tuple[int, list[np.ndarray]]:
        numbers, arrays = self._receive()
        self._ahead -= numbers["count"]
        return numbers["count"], arrays

    def _ask(self, kind, numbers, arrays):
        self._send(kind, numbers, arrays)
        return self._receive()

    def _send(self, kind, numbers, arrays):
        try:
            _send(self._out, {"kind": kind, **numbers}, arrays)
        except OSError as error:
            raise self._dead() from error

    def _receive(self):
        try:
            numbers, arrays = _receive(self._in)
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if "error" in numbers:
            self._ahead, self._present = 0, None
            raise IdentityError(
                f"the worker process failed: {numbers['error']}",
                why="the run's settings differ from this process's, so its steps run in a worker",
                fix="start Python with the settings that `replay show` prints, and try again there",
            )
        return numbers, arrays

    def _dead(self) -> IdentityError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return IdentityError(
            f"the worker process ended with code {code}: {said[-1] if said else 'no message'}",
            why="the run's settings differ from this process's, so its steps run in a worker",
            fix="start Python with the settings that `replay show` prints, and try again there",
        )


class _Remote:
    """A state in the worker: its leaves where they were sent here, else the present one there."""

    def __init__(self, leaves: list[np.ndarray] | None):
        self.leaves = leaves

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._here())

    def __getitem__(self, leaf: int) -> np.ndarray:
        return self._here()[leaf]

    def __len__(self) -> int:
        return len(self._here())

    def _here(self) -> list[np.ndarray]:
        assert self.leaves is not None, "only a walk that keeps states looks into them"
        return self.leaves


def _end(process: subprocess.Popen, errors: IO[bytes]) -> None:
    """End a worker, which has nothing to put in order."""
    process.kill()
    process.wait()
    errors.close()


def serve(input_descriptor: int, output_descriptor: int) -> None:
    """Execute what the parent asks for, until it closes the pipe."""
    inward, outward = Connection(input_descriptor), Connection(output_descriptor)
    engine: LocalEngine | None = None
    state: list[jax.Array] = []
    while True:
        try:
            asked, arrays = _receive(inward)
        except EOFError:
            return
        try:
            kind = asked["kind"]
            if kind == "setup":
                signature = Signature.from_plain(asked["signature"])
                programs = {
                    name: artifact.load(name, blob.tobytes(), signature, allow=None)
                    for name, blob in zip(asked["names"], arrays, strict=True)
                }
                keep = asked["keep"]
                engine = LocalEngine(signature, programs, asked["key"], keep=keep)
                _send(outward, {"environment": environment()}, [])
                continue
            assert engine is not None
            if kind == "load":
                state = engine.load(arrays)
                _send(outward, {}, [])
            elif kind == "fingerprint":
                _send(outward, {}, [engine.fingerprint(state)])
            elif kind == "fetch":
                _send(outward, {}, state)
            elif kind == "advance":
                ids, weights = arrays[0], arrays[1] if asked["weights"] else None
                batch = arrays[1 + asked["weights"] :]
                rows = (asked["start"], asked["first"], asked["stop"])
                for executed in engine.advance(state, Stretch(*rows, ids, weights, batch)):
                    state = executed.after
                    sent = [executed.losses, *executed.aux]
                    sent += [*executed.grads, *executed.after] if keep else []
                    _send(outward, {"count": executed.count}, sent)
        except Exception as error:  # told to the parent, which knows what to advise
            _send(outward, {"error": f"{type(error).__name__}: {error}"}, [])


def _send(connection: Connection, numbers: Mapping[str, Any], arrays: Sequence[Any]) -> None:
    host = [np.asarray(array) for array in arrays]
    forms = [(str(array.dtype), array.shape) for array in host]
    connection.send_bytes(pack([dict(numbers), forms]))
    for array in host:
        if array.nbytes:
            connection.send_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _receive(connection: Connection) -> tuple[dict[str, Any], list[np.ndarray]]:
    numbers, forms = msgpack.unpackb(connection.recv_bytes())
    arrays = []
    for dtype, shape in forms:
        array = np.empty(shape, jnp.dtype(dtype))
        if math.prod(shape):
            data = np.frombuffer(connection.recv_bytes(), np.uint8)
            array = data.view(jnp.dtype(dtype)).reshape(shape)
        arrays.append(array)
    return numbers, arrays
