"""The record of a run: what stands in which file, and how it is read.

Layout and order of writing: programs and data first, then `run.msgpack`, which makes the
directory a run; afterwards step columns and checkpoints, each commit closed by a record in the
journal.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from replay.artifact import VERSIONS, Signature
from replay.errors import LogError
from replay.identity import sha256
from replay.journal import Durable, frame, only_frame
from replay.order import Order
from replay.store import ArraySpec, Place, StoredArray, lay_out, rows
from replay.tree import Leaf

FORMAT = 1
HEADER, JOURNAL = "run.msgpack", "journal.msgpack"

# Rows in one chunk of the step columns: with sample ids a file of about half a megabyte.
_COLUMN_BYTES = 2**19


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known when a run starts, written once.

    Attributes:
        name: name of the program.
        created: seconds since 1970.
        key: the run's key data, two `uint32`.
        signature: the leaves of the programs.
        programs: name -> version, sha256 and bytes of the file, hash of the StableHLO text and,
            for trajectory programs, of the optimized HLO.
        environment: the machine and its settings.
        order: spec of the order and the number of samples; None for a run that is fed.
        order_checksum: where the ids themselves are not logged.
        steps: planned number of steps; for a run that is fed, the most it may have.
        data: where samples come from: `embedded`, `spooled` or `external`.
        fingerprint: of the data, as `Data.fingerprint` returns it.
        arrays: layouts of the arrays in `states/`, `steps/` and `data/`.
        parent: run, step and edit of a fork; None for a run of its own.
    """

    name: str
    created: float
    key: tuple[int, int]
    signature: Signature
    programs: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    order: list | None
    order_checksum: int | None
    steps: int
    data: str
    fingerprint: dict[str, Any] | None
    arrays: dict[str, tuple[ArraySpec, ...]]
    parent: dict[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return msgpack-able data, the inverse of `from_plain`."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {
            group: [spec.to_plain() for spec in specs] for group, specs in self.arrays.items()
        }
        return {**plain, "format": FORMAT, "signature": self.signature.to_plain(), "arrays": arrays}

    @classmethod
    def from_plain(cls, plain: Any, place: Place) -> "Header":
        """Rebuild a header from a record nobody vouches for.

        Raises:
            LogError: it is of a newer format, or not a header at all.
        """
        found = plain.get("format") if isinstance(plain, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise LogError(
                f"{place} has format {found}; this version of replay reads up to {FORMAT}",
                why="a newer format may mean something else by the same bytes",
                fix="pip install --upgrade jax-replay",
            )
        try:
            arrays = {
                group: tuple(ArraySpec.from_plain(spec) for spec in plain["arrays"][group])
                for group in ("states", "steps", "data")
            }
            fields = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
            first, second = (int(word) for word in fields["key"])
            signature = Signature.from_plain(fields["signature"])
            unknown = set(fields["programs"]) - set(VERSIONS)
            if unknown or len(arrays["states"]) != len(signature.state):
                raise ValueError(f"programs {sorted(unknown)} or arrays that do not fit")
            fields |= {"arrays": arrays, "signature": signature, "key": (first, second)}
            fields |= {"programs": {k: dict(v) for k, v in fields["programs"].items()}}
            fields |= {"environment": dict(fields["environment"]), "steps": int(fields["steps"])}
            return cls(**fields)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LogError(
                f"{place}: {HEADER} is not the header of a run: {error!r}",
                why="it says what the run is and how its files are to be read",
                fix="restore the file from a copy of the run",
            ) from error


def layouts(
    signature: Signature,
    steps: int,
    *,
    ids: bool,
    weights: bool,
    batch_checksums: bool,
    samples: int = 0,
    spool: bool = False,
) -> dict[str, tuple[ArraySpec, ...]]:
    """Lay out every array of a run.

    Args:
        signature: the leaves of the programs.
        steps: the most steps that the run may have.
        ids: whether sample ids are logged.
        weights: whether sample weights other than one occur.
        batch_checksums: whether the content of each batch is to be checked against the log.
        samples: how many an embedded data set has; 0 where none is embedded.
        spool: whether the batches themselves are kept.
    """
    size = signature.batch_size
    chunk = max(64, min(4096, _COLUMN_BYTES // (4 * size)))
    states = []
    for i, leaf in enumerate(signature.state):
        spec = rows(f"states/{i}", leaf.shape, steps + 1, leaf.dtype, _dims("checkpoint", i, leaf))
        states.append(dataclasses.replace(spec, attributes={"path": leaf.path}))

    def column(name: str, dtype: str, **attributes: Any) -> ArraySpec:
        return ArraySpec(
            f"steps/{name}", (steps,), (chunk,), dtype, ("step",), attributes=attributes
        )

    def table(name: str, dtype: str) -> ArraySpec:
        dims = ("step", "position")
        return ArraySpec(f"steps/{name}", (steps, size), (chunk, size), dtype, dims, ids=True)

    columns = [column("witness", "uint64"), column("loss", "float32")]
    columns += [column("microseconds", "uint32")]
    columns += [table("ids", "int32")] if ids else []
    columns += [table("weights", "float32")] if weights else []
    columns += [column("batch_crc32c", "uint32")] if batch_checksums else []
    columns += [
        column(f"aux_{i}", "float32", path=leaf.path) for i, leaf in enumerate(signature.aux)
    ]
    data = []
    for i, leaf in enumerate(signature.batch):
        if spool:
            row, count, dims = (size, *leaf.shape), steps, _dims("step", i, leaf, 1)
        else:
            row, count, dims = leaf.shape, samples, _dims("sample", i, leaf)
        each = max(1, size * leaf.nbytes if spool else leaf.nbytes)
        piece = (max(1, min(count, 2**22 // each)), *(max(n, 1) for n in row))
        attributes = {"path": leaf.path}
        data.append(
            ArraySpec(f"data/{i}", (count, *row), piece, leaf.dtype, dims, attributes=attributes)
        )
    stored = tuple(data) if spool or samples else ()
    return {"states": tuple(states), "steps": tuple(columns), "data": stored}


def _dims(first: str, number: int, leaf: Leaf, extra: int = 0) -> tuple[str, ...]:
    """Name the axes so that no two arrays of a group share one but the first, as xarray asks."""
    return (first, *(f"leaf_{number}_axis_{i}" for i in range(len(leaf.shape) + extra)))


def create(
    place: Place,
    header: Header,
    programs: Mapping[str, bytes],
    embedded: Sequence[np.ndarray] | None,
) -> None:
    """Write all that is known before the first step; the run exists from the last byte on.

    Raises:
        LogError: the place already holds a run, or files that are not a run's.
    """
    known = {HEADER, JOURNAL, "lock", "states", "steps", "program", "data", "cache"}
    present = place.list()
    strangers = sorted({name.split("/")[0] for name in present} - known)
    if HEADER in present or strangers:
        raise LogError(
            f"{place} already holds {'a run' if HEADER in present else strangers[0]}",
            why="a recording never overwrites what is there",
            fix="choose another directory, delete this one, or pass resume=True to continue it",
        )
    for leftover in ("states", "steps", "program", "data", JOURNAL):
        place.delete(leftover)
    for name, data in programs.items():
        place.write(f"program/{name}", data)
    for group, specs in header.arrays.items():
        if specs:
            lay_out(place, group, specs)
    for spec, values in zip(header.arrays["data"], embedded or (), strict=False):
        array = StoredArray(place, spec)
        for start in range(0, len(values), spec.chunk[0]):
            array.write(start, values[start : start + spec.chunk[0]])
    place.write(HEADER, frame(header.to_plain()))


class Log:
    """A run directory, for reading. Nothing is executed and little is read until asked for.

    Attributes:
        place: where it lies.
        header: what was known at the start.
        durable: what the journal vouches for, as of when the log was opened.

    Raises:
        LogError: there is no run, it is damaged, or it is of a newer format.
    """

    def __init__(self, place: Place):
        self.place = place
        if place.size(HEADER) is None:
            raise LogError(
                f"{place} is not a run: it has no {HEADER}",
                why="that file names the program, the order and the layout of everything else",
                fix="check the path; `replay ls DIR` lists the runs below a directory",
            )
        payload = only_frame(place.read(HEADER, limit=2**28), f"{place}: {HEADER}")
        self.header = Header.from_plain(payload, place)
        self.durable = Durable()
        if place.size(JOURNAL) is not None:
            self.durable = Durable.read(place.read(JOURNAL), f"{place}: {JOURNAL}")
        self._check_sizes()
        self._arrays: dict[str, StoredArray] = {}
        self._cached: collections.OrderedDict[tuple[str, int], np.ndarray] = (
            collections.OrderedDict()
        )

    @functools.cached_property
    def order(self) -> Order | None:
        """The order of the samples; None for a run that was fed."""
        if self.header.order is None:
            return None
        spec, samples = self.header.order
        return Order.from_spec(spec).bind(samples)

    def program(self, name: str) -> bytes:
        """Return the bytes of an archived program.

        Raises:
            LogError: it was not archived, is missing or damaged, or of a newer version.
        """
        entry = self.header.programs.get(name)
        if entry is None:
            raise LogError(
                f"{self.place} has no program {name!r}",
                why=f"it was recorded with {', '.join(sorted(self.header.programs))}",
                fix="record again with a program that defines it",
            )
        if entry.get("version") != VERSIONS[name]:
            raise LogError(
                f"{self.place}: program/{name} has version {entry.get('version')}; this version "
                f"of replay knows {VERSIONS[name]}",
                why="its arguments may mean something else",
                fix="pip install --upgrade jax-replay",
            )
        data = self.place.read(f"program/{name}", limit=2**30)
        if sha256(data) != entry.get("sha256"):
            raise LogError(
                f"{self.place}: program/{name} is damaged: its checksum does not agree",
                why="a changed program computes something else",
                fix="restore the file from a copy of the run",
            )
        return data

    def checkpoint(self, state: int, leaves: Sequence[int] | None = None) -> list[np.ndarray]:
        """Read the raw leaves of a stored state, or of some of them by number."""
        row = self.durable.checkpoints[state]
        wanted = range(len(self.header.signature.state)) if leaves is None else leaves
        return [self.array("states", i).read(row) for i in wanted]

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read steps `[start, stop)` of a column.

        Raises:
            LogError: a chunk is missing or damaged.
        """
        numbers = {spec.name: i for i, spec in enumerate(self.header.arrays["steps"])}
        number = numbers[f"steps/{name}"]
        spec = self.header.arrays["steps"][number]
        rows = spec.chunk[0]
        if stop <= start:
            return np.zeros((0, *spec.shape[1:]), spec.dtype)
        parts = []
        for index in range(start // rows, -(-stop // rows)):
            first = index * rows
            part = self._chunk("steps", number, index)
            parts.append(part[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def has_column(self, name: str) -> bool:
        """Tell whether a column was logged."""
        return any(spec.name == f"steps/{name}" for spec in self.header.arrays["steps"])

    def embedded(self) -> list[np.ndarray]:
        """Read the data set that lies in the run, one array a leaf."""
        return [self.array("data", i).read() for i in range(len(self.header.arrays["data"]))]

    def spooled(self, start: int, stop: int) -> list[np.ndarray]:
        """Read the batches that were fed at steps `[start, stop)`."""
        count = len(self.header.arrays["data"])
        return [self.array("data", i).read(slice(start, stop)) for i in range(count)]

    def _chunk(self, group: str, number: int, index: int) -> np.ndarray:
        """Read one chunk of a step column; the last few are kept, as replays go step by step."""
        array = self.array(group, number)
        key = (array.spec.name, index)
        if key not in self._cached:
            rows = array.spec.chunk[0]
            stop = min((index + 1) * rows, array.spec.shape[0])
            self._cached[key] = array.read(slice(index * rows, stop))
            while len(self._cached) > 16:
                self._cached.popitem(last=False)
        return self._cached[key]

    def array(self, group: str, number: int) -> StoredArray:
        """Return one array of a group, opened once."""
        spec = self.header.arrays[group][number]
        if spec.name not in self._arrays:
            label = str(spec.attributes.get("path", ""))
            self._arrays[spec.name] = StoredArray(self.place, spec, label=label)
        return self._arrays[spec.name]

    def _check_sizes(self) -> None:
        """Refuse sizes that this machine cannot hold before memory is taken for them."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        signature = self.header.signature
        parts = {
            "one state": sum(leaf.nbytes for leaf in signature.state),
            "one batch": signature.batch_size * sum(leaf.nbytes for leaf in signature.batch),
        }
        if self.header.data == "embedded":
            parts["the embedded data"] = sum(_bytes(s.shape, s) for s in self.header.arrays["data"])
        for group in self.header.arrays.values():
            parts |= {f"a chunk of {spec.name}": _bytes(spec.chunk, spec) for spec in group}
        for what, size in parts.items():
            if size > memory:
                raise LogError(
                    f"{self.place} declares {size / 2**30:,.1f} GiB for {what}; this machine has "
                    f"{memory / 2**30:,.1f} GiB",
                    why="a size is checked before memory is taken for it",
                    fix="open the run on a machine with more memory, if you trust its source",
                )
        for spec, leaf in zip(self.header.arrays["states"], signature.state, strict=True):
            if spec.shape[1:] != leaf.shape or spec.dtype != leaf.dtype:
                raise LogError(
                    f"{self.place}: {HEADER} lays out {spec.name} unlike the leaf {leaf}",
                    why="a state is rebuilt from arrays of exactly its leaves' shapes",
                    fix="restore the file from a copy of the run",
                )


def _bytes(shape: Sequence[int], spec: ArraySpec) -> int:
    size = np.dtype(spec.dtype).itemsize
    for n in shape:
        size *= n
    return size


def thin(log: Log, keep: Sequence[int]) -> list[int]:
    """Give up all checkpoints but those of the given states, the first and the last.

    Returns:
        The states whose checkpoints were dropped.
    """
    stored = sorted(log.durable.checkpoints)
    dropped = sorted(set(stored) - set(keep) - {stored[0], stored[-1]})
    if dropped:
        log.place.append(JOURNAL, frame({"kind": "dropped", "states": dropped}))
        delete_rows(log, [log.durable.checkpoints.pop(state) for state in dropped])
    return dropped


def delete_rows(log: Log, rows: Sequence[int]) -> None:
    """Delete the files of dropped checkpoints."""
    for row in rows:
        for spec in log.header.arrays["states"]:
            log.place.delete(f"{spec.name}/c/{row}")
