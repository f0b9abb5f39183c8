"""The record of a run: what stands in which file, and how it is read.

Layout and order of writing: programs and data first, then `run.msgpack`, which makes the
directory a run; afterwards step columns and checkpoints, each commit closed by a record in the
journal.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.ancestry import FOLDER, Parent, located, merged
from replay.artifact import VERSIONS, Signature
from replay.errors import IdentityError, LogError, ReplayError
from replay.identity import SHORT_DIGEST, fingerprint_on_host, sha256, short_digest
from replay.indexing import layout, level_of
from replay.journal import Durable, frame, frames, only_frame
from replay.order import Order
from replay.store import ArraySpec, Place, StoredArray, lay_out, rows
from replay.tree import Leaf

FORMAT = 1
HEADER, JOURNAL = "run.msgpack", "journal.msgpack"
MOST_GENERATIONS = 100

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
        sample_weights: checksum of the factors of the losses; None for ones.
        arrays: layouts of the arrays in `states/`, `steps/`, `data/` and, of an index,
            `segments/`.
        parent: what a fork is a fork of, as `ancestry.Parent` has it; None for a run of its own.
        factors: of the losses, by sample, little-endian float32; None for ones, and for a fork,
            which names those that it changes.
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
    sample_weights: int | None
    arrays: dict[str, tuple[ArraySpec, ...]]
    parent: Parent | None = None
    factors: bytes | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return msgpack-able data, the inverse of `from_plain`."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {
            group: [spec.to_plain() for spec in specs] for group, specs in self.arrays.items()
        }
        plain["parent"] = None if self.parent is None else self.parent.to_plain()
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
            segments = plain["arrays"].get("segments", [])
            arrays["segments"] = tuple(ArraySpec.from_plain(spec) for spec in segments)
            plain = {"factors": None, **plain}  # older logs kept a checksum of them alone
            fields = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
            for name, check in _FORMS.items():
                if not check(fields[name]):
                    raise ValueError(f"{name} is {reprlib.repr(fields[name])}")
            signature = Signature.from_plain(fields["signature"])
            parent = None if fields["parent"] is None else Parent.from_plain(fields["parent"])
            fields |= {"arrays": arrays, "signature": signature, "key": tuple(fields["key"])}
            fields["parent"] = parent
            header = cls(**fields)
            header._check_arrays()
            header._check_factors()
            return header
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LogError(
                f"{place}: {HEADER} is not the header of a run: {str(error)[:300]}",
                why="it says what the run is and how its files are to be read",
                fix="restore the file from a copy of the run",
            ) from error

    @property
    def index(self) -> str:
        """The level of the index that is recorded beside the training."""
        both = (*self.arrays["steps"], *self.arrays.get("segments", ()))
        return level_of([spec.name for spec in both])

    def _check_arrays(self) -> None:
        """Refuse arrays that no recorder lays out; how they are cut into chunks is theirs."""
        names = {spec.name for spec in self.arrays["steps"]}
        embedded = self.arrays["data"][0].shape[0] if self.data == "embedded" else 0
        samples = embedded or (self.fingerprint or {}).get("samples")
        if self.order is not None and self.order[1] != samples:
            raise ValueError(f"the order is over {self.order[1]} samples, the data has {samples}")
        expected = layouts(
            self.signature,
            self.steps,
            ids="steps/ids" in names,
            weights="steps/weights" in names,
            batch_checksums="steps/batch_crc32c" in names,
            samples=embedded,
            spool=self.data == "spooled",
            index=self.index,
        )
        for group, specs in expected.items():
            found = [(spec.name, spec.shape, spec.dtype) for spec in self.arrays[group]]
            if found != [(spec.name, spec.shape, spec.dtype) for spec in specs]:
                raise ValueError(f"{group} has other arrays than such programs fill")

    def _check_factors(self) -> None:
        """Refuse factors of samples, and leaves of a state, that there are not."""
        samples = 0 if self.order is None else self.order[1]
        if self.factors is not None and len(self.factors) != 4 * samples:
            raise ValueError(f"{len(self.factors) // 4} factors of {samples} samples")
        if self.parent is None:
            return
        if self.order is None or max(self.parent.factors, default=0) >= max(samples, 1):
            raise ValueError("a fork has an order, and factors of samples that it has")
        for number, data in self.parent.leaves.items():
            known = 0 <= number < len(self.signature.state)
            if not known or self.signature.state[number].nbytes != len(data):
                raise ValueError(f"leaf {number} of the state is set to {len(data)} bytes")


def _natural(value: Any, limit: int = 2**48) -> bool:
    return type(value) is int and 0 <= value < limit


def _named(value: Any) -> bool:
    return type(value) is dict and all(type(name) is str for name in value)


def _tagged(table: Any) -> bool:
    """Whether this is a table of intermediates: their names, shapes and dtypes."""
    return type(table) is list and all(
        _named(entry)
        and all(type(entry.get(name)) is str for name in ("name", "dtype"))
        and type(entry.get("shape")) is list
        and all(map(_natural, entry["shape"]))
        for entry in table
    )


# What the fields of a header have to be, where nothing else checks them.
_FORMS: dict[str, Callable[[Any], bool]] = {
    "name": lambda x: type(x) is str,
    "created": lambda x: type(x) in (int, float) and 0 <= x < 2**40,
    "key": lambda x: len(x) == 2 and all(_natural(word, 2**32) for word in x),
    "programs": lambda x: (
        _named(x)
        and set(x) <= set(VERSIONS)
        and all(map(_named, x.values()))
        and _tagged(x.get("activations", {"table": []}).get("table"))
    ),
    "environment": _named,
    "order": lambda x: x is None or (len(x) == 2 and type(x) is list and _natural(x[1], 2**31)),
    "order_checksum": lambda x: x is None or _natural(x, 2**32),
    "steps": _natural,
    "data": lambda x: x in ("embedded", "spooled", "external"),
    "fingerprint": lambda x: x is None or _named(x),
    "sample_weights": lambda x: x is None or _natural(x, 2**32),
    "parent": lambda x: x is None or _named(x),
    "factors": lambda x: x is None or (type(x) is bytes and len(x) % 4 == 0),
}


def layouts(
    signature: Signature,
    steps: int,
    *,
    ids: bool,
    weights: bool,
    batch_checksums: bool,
    samples: int = 0,
    spool: bool = False,
    index: str = "off",
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
        index: the level of the index.
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
    more, segments = layout(index, signature, steps, columns="steps", segments="segments")
    return {
        "states": tuple(states),
        "steps": (*columns, *more),
        "data": stored,
        "segments": segments,
    }


def _dims(first: str, number: int, leaf: Leaf, extra: int = 0) -> tuple[str, ...]:
    """Name the axes so that no two arrays of a group share one but the first, as xarray asks."""
    return (first, *(f"leaf_{number}_axis_{i}" for i in range(len(leaf.shape) + extra)))


def create(
    place: Place,
    header: Header,
    programs: Mapping[str, bytes],
    embedded: Sequence[np.ndarray] | None,
    state: Sequence[np.ndarray] | None = None,
) -> None:
    """Write all that is known before the first step; the run exists from the last byte on.

    The groups of a fork are laid out when it is first trained.

    Args:
        place: where, its lock held.
        header: of the run.
        programs: the files of programs by name.
        embedded: the data set, where it is kept in the run.
        state: raw leaves of a state 0 that a fork does not share with its parent.

    Raises:
        LogError: the place already holds a run, or files that are not a run's, or cannot be
            written.
    """
    known = {HEADER, JOURNAL, "lock", "states", "steps", "program", "data", "cache"}
    known |= {"segments", "index", FOLDER}
    present = place.list()
    strangers = sorted({name.split("/")[0] for name in present} - known)
    if HEADER in present or strangers:
        raise LogError(
            f"{place} already holds {'a run' if HEADER in present else strangers[0]}",
            why="a recording never overwrites what is there",
            fix="choose another directory, delete this one, or go on with what is there: "
            f"replay.open({str(place)!r}).resume(), or a Recorder with resume=True"
            if HEADER in present
            else "choose another directory",
        )
    written = frame(header.to_plain())
    Header.from_plain(only_frame(written, HEADER), place)  # what cannot be read is not written
    try:
        for leftover in ("states", "steps", "segments", "index", "program", "data", JOURNAL):
            place.delete(leftover)
        for name, data in programs.items():
            place.write(f"program/{name}", data)
        for group, specs in header.arrays.items() if header.parent is None else ():
            if specs:
                lay_out(place, group, specs)
        for spec, values in zip(header.arrays["data"], embedded or (), strict=False):
            array = StoredArray(place, spec)
            for start in range(0, len(values), spec.chunk[0]):
                array.write(start, values[start : start + spec.chunk[0]])
        if state is not None:
            _store_first(place, header, state)
        place.write(HEADER, written)
    except OSError as error:
        raise LogError(
            f"{place} cannot be written: {error}",
            why="a run begins with its program, its data and the layout of its log",
            fix="make room (or repair the disk), or record into another directory",
        ) from error


def _store_first(place: Place, header: Header, leaves: Sequence[np.ndarray]) -> None:
    lay_out(place, "states", header.arrays["states"])
    lanes = fingerprint_on_host(leaves)
    for spec, leaf in zip(header.arrays["states"], leaves, strict=True):
        StoredArray(place, spec).write(0, np.asarray(leaf)[None])
    records: tuple[dict[str, Any], ...] = (
        {"kind": "steps", "end": 0, "digest": short_digest(lanes), "metrics": []},
        {"kind": "checkpoint", "state": 0, "row": 0, "digest": lanes.tobytes()},
    )
    place.append(JOURNAL, b"".join(map(frame, records)))


class Log:
    """A run directory, for reading. Nothing is executed and little is read until asked for.

    The log of a fork answers for the steps before it as well, from the log of its parent.

    Args:
        place: where it lies.
        parent: where the parent of a fork lies, if not where the fork says.

    Attributes:
        place: where it lies.
        header: what was known at the start.
        identity: a digest of all that was known at the start: the same for copies of one run.
        parent: the log of the parent of a fork.
        own: what its journal vouches for, as of when the log was opened.
        durable: what this journal and that of the parent vouch for together.

    Raises:
        LogError: there is no run, it is damaged, or it is of a newer format; or the parent of a
            fork is not where it was.
    """

    def __init__(self, place: Place, parent: Place | None = None, *, descendants: int = 0):
        self.place = place
        self.header, self.identity = _read_header(place)
        self.own = self.durable = _read_journal(place)
        self.parent: Log | None = None
        if self.header.parent is not None:
            self.parent = _parent(place, self.header.parent, parent, descendants)
            self._check_parent(self.parent)
            self.durable = merged(self.header.parent, self.parent.durable, self.own)
        self._check_journal()
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
        order = Order.from_spec(spec)
        if order.batch_size != self.header.signature.batch_size:
            raise LogError(
                f"{self.place} has an order of batches of {order.batch_size} and programs for "
                f"batches of {self.header.signature.batch_size}",
                why="no recording has both",
                fix="restore run.msgpack from a copy of the run",
            )
        return order.bind(samples)

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
        size = entry.get("bytes")
        limit = min(size, 2**30) if type(size) is int else 0
        if entry.get("inherited") and self.parent is not None:
            data = self.parent.program(name)
        else:
            data = self.place.read(f"program/{name}", limit=limit)
        if sha256(data) != entry.get("sha256"):
            raise LogError(
                f"{self.place}: program/{name} is damaged: its checksum does not agree",
                why="a changed program computes something else",
                fix="restore the file from a copy of the run",
            )
        return data

    def checkpoint(self, state: int, leaves: Sequence[int] | None = None) -> list[np.ndarray]:
        """Read the raw leaves of a stored state, or of some of them by number."""
        log, row = self.holder(state)
        wanted = range(len(self.header.signature.state)) if leaves is None else leaves
        return [log.array("states", i).read(row) for i in wanted]

    def holder(self, state: int) -> "tuple[Log, int]":
        """Return the log that holds a stored state, this one or an ancestor's, and the row."""
        if state in self.own.checkpoints or self.parent is None:
            return self, self.own.checkpoints[state]
        return self.parent.holder(state)

    def origin(self, step: int) -> "Log":
        """Return the log whose program took a step, with its own key: this or an ancestor's."""
        if self.parent is None or step >= self.first:
            return self
        return self.parent.origin(step)

    @property
    def first(self) -> int:
        """The first step that this run has taken by itself: 0, or where a fork begins."""
        return 0 if self.header.parent is None else self.header.parent.step

    @functools.cached_property
    def factors(self) -> np.ndarray:
        """Factors of the losses by sample, `float32[samples]`, ones where none were given.

        Raises:
            LogError: an older version of replay has kept nothing but a checksum of them.
        """
        header = self.header
        if self.parent is not None and header.parent is not None:
            found = self.parent.factors.copy()
            ids = np.array(list(header.parent.factors), np.int64)
            found[ids] = np.array(list(header.parent.factors.values()), np.float32)
            return found
        samples = 0 if header.order is None else header.order[1]
        if header.factors is not None:
            return np.frombuffer(header.factors, "<f4").astype(np.float32)
        if header.sample_weights is not None:
            raise LogError(
                f"{self.place} was recorded with sample_weights, of which it holds a checksum",
                why="steps that were not taken yet need the weights themselves",
                fix="record the run again with this version of replay",
            )
        return np.ones(samples, np.float32)

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read steps `[start, stop)` of a column; sample weights are one where none were logged.

        Raises:
            LogError: a chunk is missing or damaged.
        """
        if self.parent is not None and start < min(stop, self.first):
            middle = min(stop, self.first)
            parts = [self.parent.column(name, start, middle), self.column(name, middle, stop)]
            return np.concatenate(parts)
        if name == "weights" and not self._logs("weights"):
            return np.ones((max(stop - start, 0), self.header.signature.batch_size), np.float32)
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
        """Tell whether a column was logged, here or by an ancestor."""
        inherited = self.parent is not None and self.parent.has_column(name)
        return inherited or self._logs(name)

    def _logs(self, name: str) -> bool:
        return any(spec.name == f"steps/{name}" for spec in self.header.arrays["steps"])

    def damage(self) -> list[str]:
        """Read what a replay can do without, and return what is wrong with it.

        That is every archived program and every column: they answer questions that the weights do
        not depend on.
        """
        found = []
        columns = [spec.name.partition("/")[2] for spec in self.header.arrays["steps"]]
        inherited = [] if self.parent is None else self.parent.damage()
        for read, names in (
            (self.program, self.header.programs),
            (lambda name: self.column(name, 0, self.durable.steps), columns),
        ):
            for name in names:
                try:
                    read(name)
                except ReplayError as error:
                    found.append(error.what)
        return [*found, *(error for error in inherited if error not in found)]

    def embedded(self) -> list[np.ndarray]:
        """Read the data set that lies in the run, or in that of an ancestor, one array a leaf."""
        if self.parent is not None:
            return self.parent.embedded()
        return [self.array("data", i).read() for i in range(len(self.header.arrays["data"]))]

    def spooled(self, start: int, stop: int) -> list[np.ndarray]:
        """Read the batches that were fed at steps `[start, stop)`."""
        count = len(self.header.arrays["data"])
        return [self.array("data", i).read(slice(start, stop)) for i in range(count)]

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids of steps `[start, stop)`, `int32[steps, batch]`.

        Raises:
            LogError: a chunk is missing or damaged.
            IdentityError: they are not logged, and the order makes others than it made then.
        """
        if self.parent is not None and start < min(stop, self.first):
            middle = min(stop, self.first)
            return np.concatenate([self.parent.ids(start, middle), self.ids(middle, stop)])
        if self._logs("ids"):
            return self.column("ids", start, stop)
        return self._order_as_recorded.batches(start, stop).ids

    @functools.cached_property
    def _order_as_recorded(self) -> Order:
        order = self.order
        if order is None or order.checksum() != self.header.order_checksum:
            raise IdentityError(
                f"{self.place}: {order!r} does not give the sample ids of the recording",
                why="the ids themselves are not logged, and numpy "
                f"{np.__version__} may permute otherwise than the version of then",
                fix="install the numpy that recorded the run, and record with log_ids=True",
            )
        return order

    def _chunk(self, group: str, number: int, index: int) -> np.ndarray:
        """Read one chunk of a step column; the last few are kept, as replays go step by step."""
        array = self.array(group, number)
        key = (array.spec.name, index)
        found = self._cached.get(key)
        if found is None:
            rows = array.spec.chunk[0]
            stop = min((index + 1) * rows, array.spec.shape[0])
            found = self._cached[key] = array.read(slice(index * rows, stop))
            with contextlib.suppress(KeyError):  # threads that read side by side leave fewer
                while len(self._cached) > 16:
                    self._cached.popitem(last=False)
        return found

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
            "the inputs of one call": signature.batch_size
            * max(signature.block, 1)
            * (8 + sum(leaf.nbytes for leaf in signature.batch)),
            "the results of one call": max(signature.block, 1)
            * sum(leaf.nbytes for leaf in signature.losses + signature.aux)
            + sum(leaf.nbytes for leaf in signature.grads + signature.carry),
            "one column": 8 * self.durable.steps,
        }
        if self.header.order is not None:
            parts["one epoch"] = 8 * self.header.order[1]
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

    def _check_parent(self, parent: "Log") -> None:
        """Refuse a parent whose states or batches have another form."""
        ours, theirs = self.header.signature, parent.header.signature
        shared = self.header.parent is not None and self.header.parent.shared
        if shared and ours == theirs:
            return
        form = [(s.batch, s.losses, s.batch_size, s.block) for s in (ours, theirs)]
        if shared or form[0] != form[1]:
            raise LogError(
                f"{self.place} has other leaves than its parent {parent.place}",
                why="what a fork shares with its parent has one form",
                fix="restore run.msgpack of the fork from a copy",
            )

    def _check_journal(self) -> None:
        """Refuse a journal that names what this run cannot have."""
        durable, steps = self.durable, self.header.steps
        whole = 8 * len(self.header.signature.state)
        lengths = {len(digest) for digest in durable.digests.values()}
        if (
            durable.steps > steps
            or durable.rows > steps + 1
            or min((*self.own.checkpoints, *self.own.digests), default=self.first) < self.first
            or max(durable.checkpoints, default=0) > durable.steps
            or any(not a < b <= steps or row > steps for a, b, row in durable.segments)
            or lengths - {SHORT_DIGEST, whole}
            or any(len(durable.digests[state]) != whole for state in durable.checkpoints)
        ):
            raise LogError(
                f"{self.place}: {JOURNAL} names steps, states or digests that a run of {steps:,} "
                "steps cannot have",
                why="the journal decides which data exists",
                fix="restore run.msgpack and the journal from one copy of the run",
            )


class Glance(NamedTuple):
    """What a run says of itself, without its parent.

    Attributes:
        identity: as of `Log`.
        header: what was known at the start.
        steps: how many have been taken, those before a fork included.
    """

    identity: str
    header: Header
    steps: int


def glance(place: Place) -> Glance:
    """Read what a run says of itself, whether or not its parent is to be found.

    Raises:
        LogError: there is no run, it is damaged, or it is of a newer format.
    """
    header, identity = _read_header(place)
    first = 0 if header.parent is None else header.parent.step
    return Glance(identity, header, max(first, _read_journal(place).steps))


def _read_header(place: Place) -> tuple[Header, str]:
    if place.size(HEADER) is None:
        raise LogError(
            f"{place} is not a run: it has no {HEADER}",
            why="that file names the program, the order and the layout of everything else",
            fix="check the path; `replay ls DIR` lists the runs below a directory",
        )
    payload = only_frame(place.read(HEADER, limit=2**28), f"{place}: {HEADER}")
    return Header.from_plain(payload, place), sha256(repr(payload).encode())


def _read_journal(place: Place) -> Durable:
    if place.size(JOURNAL) is None:
        return Durable()
    return Durable.read(place.read(JOURNAL), f"{place}: {JOURNAL}")


def _parent(place: Place, parent: Parent, given: Place | None, descendants: int) -> Log:
    """Open the log of the parent of a fork, wherever it is found.

    Raises:
        LogError: it is nowhere, is another run, or has fewer steps than the fork shares.
    """
    if descendants >= MOST_GENERATIONS:
        raise LogError(
            f"{place} is a fork of a fork, and so on for {descendants} generations",
            why="each is opened to answer for its descendants",
            fix="fork an earlier ancestor, with the edits taken together",
        )
    looked = [given] if given is not None else located(place, parent)
    found = []
    for where in looked:
        try:
            if where.size(HEADER) is None:
                continue
            header, identity = _read_header(where)
        except OSError:  # no path of this machine
            continue
        if identity != parent.run:
            found.append(f"at {where} lies another run than that it was forked from: {header.name}")
            continue
        log = Log(where, descendants=descendants + 1)
        if log.durable.steps >= parent.step:
            return log
        found.append(
            f"at {where} lies a copy of its parent that ends at step {log.durable.steps:,}"
        )
    raise LogError(
        f"{place} is a fork at step {parent.step:,}"
        + ("".join(f"; {each}" for each in found) or f" of a run that is not at {looked[-1]}"),
        why="a fork shares everything before its first step with its parent"
        + (", which was moved or deleted" if not found else ""),
        fix="move it back, or say where it lies now: replay.open(..., parent=PATH); "
        "`replay fork FORK --detach --parent PATH` makes the fork independent of it",
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
    stored = sorted(log.own.checkpoints)  # those of an ancestor are not ours to give up
    dropped = sorted(set(stored) - set(keep) - {*stored[:1], *stored[-1:]})
    if dropped:
        clear_torn(log)
        log.place.append(JOURNAL, frame({"kind": "dropped", "states": dropped}))
        rows = [log.own.checkpoints.pop(state) for state in dropped]
        for state in dropped:
            log.durable.checkpoints.pop(state, None)
        delete_rows(log, rows)
    return dropped


def clear_torn(log: Log) -> None:
    """Remove what a killed recorder left half written, before anything is written again.

    That is the tail of the journal, and files that were not yet renamed to their places.
    """
    if log.own.end < (log.place.size(JOURNAL) or 0):
        torn = log.place.read(JOURNAL)[log.own.end :]
        assert not any(frames(torn, JOURNAL)), "somebody has written since the log was read"
        log.place.truncate(JOURNAL, log.own.end)
    for name in log.place.list():
        if name.endswith((".__lock", ".part")):
            log.place.delete(name)


def discard_unborn(place: Place) -> None:
    """Forget a recording that was killed before its first commit, so that it can begin again.

    The rest is only written once the journal names state 0: where there is more, the journal was
    lost, and nothing is touched. A fork is whole before it has a journal.

    Raises:
        LogError: the journal is damaged.
    """
    present = place.list()
    rest = re.compile(r"(states/\d+/c/[1-9]|steps/\w+/c/)")
    if HEADER not in present or any(map(rest.match, present)):
        return
    begun = JOURNAL in present and any(frames(place.read(JOURNAL), f"{place}: {JOURNAL}"))
    if not begun and _read_header(place)[0].parent is None:
        place.delete(HEADER)


def delete_rows(log: Log, rows: Sequence[int]) -> None:
    """Delete the files of dropped checkpoints."""
    for row in rows:
        for spec in log.header.arrays["states"]:
            log.place.delete(f"{spec.name}/c/{row}")
