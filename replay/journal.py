"""What has become durable: checksummed frames, and what the frames of a run add up to.

What the journal does not name does not exist. A frame is written after the data it names is
synced; a torn last frame is what a killed recorder leaves, and is cut off.
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import msgpack

from replay.errors import LogError

_HEAD = struct.Struct("<4sII")  # magic, length, crc32c of length and payload
_MAGIC = b"RPLY"
_LIMIT = 2**28


def pack(payload: Any) -> bytes:
    """Pack msgpack-able data."""
    data = msgpack.packb(payload)
    assert data is not None  # the stubs allow for a packer that keeps its buffer
    return data


def frame(payload: Any) -> bytes:
    """Pack msgpack-able data into one frame."""
    data = pack(payload)
    return _HEAD.pack(_MAGIC, len(data), _checksum(data)) + data


def frames(data: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """Yield `(end, payload)` of every frame, with `end` the offset after it.

    Stops at a torn tail.

    Raises:
        LogError: a frame is damaged and whole frames follow it, so that it is not a torn tail.
    """
    at = 0
    while at < len(data):
        found = _frame_at(data, at)
        if found is None:
            if _later_frame(data, at + 1):
                raise LogError(
                    f"{name} is damaged at byte {at:,}",
                    why="what is written after the damage names data that could not be trusted",
                    fix="restore the file from a copy of the run",
                )
            return
        at, payload = found
        yield at, payload


def only_frame(data: bytes, name: str) -> Any:
    """Return the payload of a file that is a single frame.

    Raises:
        LogError: it is not.
    """
    found = _frame_at(data, 0)
    if found is None or found[0] != len(data):
        raise LogError(
            f"{name} is damaged: its checksum does not agree",
            why="it says what the run is and how its files are to be read",
            fix="restore the file from a copy of the run",
        )
    return found[1]


def _frame_at(data: bytes, at: int) -> tuple[int, Any] | None:
    if at + _HEAD.size > len(data):
        return None
    magic, length, checksum = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    if magic != _MAGIC or length > _LIMIT or start + length > len(data):
        return None
    payload = data[start : start + length]
    if _checksum(payload) != checksum:
        return None
    try:
        return start + length, msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, TypeError):  # not msgpack, nested too deeply, or a list as a key
        return None


def _later_frame(data: bytes, at: int) -> bool:
    while (at := data.find(_MAGIC, at)) >= 0:
        if _frame_at(data, at):
            return True
        at += 1
    return False


def _checksum(payload: bytes) -> int:
    return google_crc32c.value(struct.pack("<I", len(payload)) + payload)


@dataclasses.dataclass
class Durable:
    """What the journal of a run adds up to.

    Attributes:
        steps: steps `[0, steps)` have durable witnesses.
        checkpoints: state -> row in the arrays of `states/`.
        rows: number of rows ever used.
        segments: `(first state, last state, row in the arrays of segments/)` of an index.
        digests: state -> fingerprint: 8 bytes for each leaf at a checkpoint, else 12 in all.
        metrics: what the user logged, as `(step, {name: value})`.
        closed: whether the recorder came to its end; then `steps` is final.
        selftest: `None` until the run has proved itself, then `""` or what differed.
        resumed: states from which recording was taken up again.
        end: bytes of the journal that count.
    """

    steps: int = 0
    checkpoints: dict[int, int] = dataclasses.field(default_factory=dict)
    rows: int = 0
    segments: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    digests: dict[int, bytes] = dataclasses.field(default_factory=dict)
    metrics: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    closed: bool = False
    selftest: str | None = None
    resumed: list[int] = dataclasses.field(default_factory=list)
    end: int = 0

    @classmethod
    def read(cls, data: bytes, name: str) -> "Durable":
        """Add up the frames of a journal.

        Raises:
            LogError: a frame is damaged, or holds what no recorder writes.
        """
        durable = cls()
        for end, record in frames(data, name):
            try:
                durable._add(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise LogError(
                    f"{name} holds a record at byte {durable.end:,} that no recorder writes: "
                    f"{error!r}",
                    why="the journal decides which data exists",
                    fix="restore the file from a copy of the run",
                ) from error
            durable.end = end
        return durable

    def _add(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "steps":
            state = _natural(record["end"])
            self.steps = max(self.steps, state)
            self.digests.setdefault(state, _digest(record))
            self.metrics += [
                (_natural(step), {str(name): float(value) for name, value in values.items()})
                for step, values in record["metrics"]
            ]
        elif kind == "checkpoint":
            state, row = _natural(record["state"]), _natural(record["row"])
            self.checkpoints[state] = row
            self.rows = max(self.rows, row + 1)
            self.digests[state] = _digest(record)
        elif kind == "segment":
            start, stop, row = (_natural(record[name]) for name in ("start", "stop", "row"))
            self.segments.append((start, stop, row))
        elif kind == "dropped":
            for state in record["states"]:
                self.checkpoints.pop(_natural(state))
        elif kind == "resumed":
            state = _natural(record["state"])
            self.resumed.append(state)
            # What was logged after that state is logged again as the steps are repeated.
            self.metrics = [item for item in self.metrics if item[0] <= state]
            self.closed = False
        elif kind == "selftest":
            self.selftest = str(record["differs"])
        elif kind == "closed":
            self.closed = True
        else:
            raise ValueError(f"unknown kind {kind!r}")


def _digest(record: dict[str, Any]) -> bytes:
    if type(record["digest"]) is not bytes:
        raise ValueError("a digest is not bytes")
    return record["digest"]


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is not a number of steps")
    return value
