"""The indexes of a run: what was logged beside the training, and what a replay has built since.

What cannot be read is left out with a warning: a question then replays more, and answers the same.
"""

import collections
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay import bounds
from replay.errors import LogError, QueryError
from replay.identity import fingerprint_on_host, sha256
from replay.indexing import LEVELS, OBSERVED, Observer, columns_of, layout, stored, tensors
from replay.journal import frame, only_frame
from replay.log import HEADER, Log
from replay.query.nodes import Part
from replay.replaying import Replayer
from replay.store import ArraySpec, StoredArray, lay_out

# A stored tensor of up to so many bytes is one piece on disk: it is read, and checked, as a whole.
_ONE_PIECE = 2**22

# Bytes of what was read that are kept for the next question.
_KEPT = 2**28

# So many steps are held before they are written.
_WRITTEN_AT_ONCE = 4096


class Scalars(NamedTuple):
    """What is known of one tensor at each of the first steps of a run.

    Attributes:
        grads_max: `float32[steps]`, the largest magnitude; NaN where one is not a number.
        grads_norm: `float32[steps]`, the norm, rounded somehow.
        grads_above: `int64[steps, edges]`, how many magnitudes exceed each of `bounds.EDGES`.
        grads_nan: `int64[steps]`, how many are not numbers.
        updates_max: `float32[steps]`.
        updates_norm: `float32[steps]`.
    """

    grads_max: np.ndarray
    grads_norm: np.ndarray
    grads_above: np.ndarray
    grads_nan: np.ndarray
    updates_max: np.ndarray
    updates_norm: np.ndarray

    @property
    def steps(self) -> int:
        """How many steps are known."""
        return len(self.grads_max)


class Where(NamedTuple):
    """Where weights can have been at all states of a segment.

    Attributes:
        low: `float64[weights]`.
        high: `float64[weights]`.
        least: `float64[weights]`, lower bound of the magnitude.
        bound: what says so.
    """

    low: np.ndarray
    high: np.ndarray
    least: np.ndarray
    bound: str


class _Kept(NamedTuple):
    """One index on disk.

    Attributes:
        level: of it.
        steps: how many it knows.
        segments: `(first state, last state, row)`.
        specs: its arrays by the last part of their names.
    """

    level: str
    steps: int
    segments: Sequence[tuple[int, int, int]]
    specs: dict[str, ArraySpec]


class Indexes:
    """All that is known of a run without replaying it.

    Args:
        log: the run.
    """

    def __init__(self, log: Log):
        self._log = log
        leaves = tensors(log.header.signature)
        self._number = {leaf.path: i for i, leaf in enumerate(leaves)}
        self._leaves = leaves
        self._kept: list[_Kept] | None = None
        self._tables: dict[str, np.ndarray] | None = None
        self._read = _Recent(_KEPT)
        self._told: set[str] = set()

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that there are, the recorded one first."""
        return tuple(kept.level for kept in self._all())

    @property
    def steps(self) -> int:
        """How many of the first steps have columns."""
        return max((kept.steps for kept in self._all()), default=0)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Neighbouring stored states, and the last stored state with the last state of all."""
        edges = sorted({*self._log.durable.checkpoints, self._log.durable.steps})
        return list(zip(edges, edges[1:], strict=False)) or [(edges[0], edges[0])]

    def dtype(self, path: str) -> Any:
        """Return the dtype of a tensor."""
        return jnp.dtype(self._leaf(path).dtype)

    def scalars(self, path: str) -> Scalars | None:
        """Return what is known of a tensor at each step; None where nothing is."""
        if path not in self._number or self._leaf(path).dtype not in OBSERVED:
            return None
        grads = self._log.header.signature.grads[self._number[path]]
        if grads.dtype != self._leaf(path).dtype:  # compared with numbers in a precision of its own
            return None
        if self._tables is None:
            self._tables = self._columns()
        if not self._tables:
            return None
        number, found = self._number[path], self._tables
        counts = found["grads_above"][:, number].astype(np.int64)
        return Scalars(
            found["grads_max"][:, number],
            found["grads_norm"][:, number],
            counts[:, :-1],
            counts[:, -1],
            found["updates_max"][:, number],
            found["updates_norm"][:, number],
        )

    def where(self, part: Part, start: int, stop: int) -> Where:
        """Return where chosen weights can have been at states `[start, stop]`, neighbours stored.

        Args:
            part: the weights.
            start: a stored state.
            stop: the next one, or the last state of the run.
        """
        return self._read.get(("where", part, start, stop), lambda: self._where(part, start, stop))

    def _where(self, part: Part, start: int, stop: int) -> Where:
        unknown = np.full(part.size, np.inf)
        nowhere = Where(-unknown, unknown, np.zeros(part.size), "")
        if part.path not in self._number or self._leaf(part.path).dtype not in OBSERVED:
            return nowhere
        length, least, bound = self._length(part, start, stop)
        if not bound:
            return nowhere
        first = self._ends(part, start)
        last = self._ends(part, stop) if stop in self._log.durable.checkpoints else None
        if first is None or (last is None and stop in self._log.durable.checkpoints):
            return nowhere
        low, high = bounds.reach(first, last, length, least)
        return Where(low, high, least, bound)

    def at(self, part: Part, state: int) -> np.ndarray | None:
        """Return chosen weights at a stored state; None where it is not stored, or damaged."""
        if state not in self._log.durable.checkpoints or part.path not in self._number:
            return None
        return self._ends(part, state)

    # ---- how far weights went

    def _length(self, part: Part, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return upper bounds of the paths of weights, lower ones of magnitudes, and their name."""
        size = part.size
        best, least, bound = np.full(size, np.inf), np.zeros(size), ""
        scalars = self.scalars(part.path)
        if scalars is not None and scalars.steps >= stop:
            total = scalars.updates_max[start:stop].astype(np.float64).sum()
            best = np.full(size, float(bounds.path_length(total, stop - start)))
            bound = "largest update of the tensor"
        for kept in self._all():
            inside = [s for s in kept.segments if start <= s[0] and s[1] <= stop]
            inside = sorted({(a, b): row for a, b, row in inside}.items())
            edges = [start, *(b for (_, b), _ in inside)]
            if kept.level not in ("rows", "weights") or edges[-1] != stop:
                continue
            if [a for (a, _), _ in inside] != edges[:-1]:
                continue  # a gap: part of the way is not known
            parts = [self._of_segment(kept, part, row) for _, row in inside]
            if any(x is None for x in parts):
                continue
            length = np.sum([x[0] for x in parts if x is not None], axis=0) * (1 + 2.0**-40)
            if np.mean(length < best) > 0.5 or not bound:
                bound = {
                    "rows": "largest updates of rows and columns",
                    "weights": "path of each weight",
                }[kept.level]
            best = np.minimum(best, length)
            if kept.level == "weights":
                below = np.min([x[1] for x in parts if x is not None], axis=0)
                least = np.maximum(least, below)
        return best, least, bound

    def _of_segment(self, kept: _Kept, part: Part, row: int) -> Any:
        """Return paths and smallest magnitudes of weights in one segment of an index."""
        number, shape = self._number[part.path], part.shape
        names = ("path", "least") if kept.level == "weights" else ("rows", "columns")
        first, second = (self._row(kept.specs[f"{name}_{number}"], row) for name in names)
        if first is None or second is None:
            return None
        if kept.level == "weights":
            codes = [_chosen(array, part) for array in (first, second)]
            return bounds.above(codes[0]), bounds.below(codes[1])
        rows = np.broadcast_to(np.asarray(first, np.float64)[..., None] if shape else first, shape)
        columns = np.broadcast_to(np.asarray(second, np.float64), shape)
        both = np.minimum(_chosen(rows, part), _chosen(columns, part))
        return np.where(np.isnan(both), np.inf, both), np.zeros(part.size)

    def _row(self, spec: ArraySpec, row: int) -> np.ndarray | None:
        return self._read.get(
            (spec.name, row),
            lambda: self._try(lambda: StoredArray(self._log.place, spec).read(row)),
        )

    def _ends(self, part: Part, state: int) -> np.ndarray | None:
        """Read weights of a stored state: a small tensor whole, of a large one what is asked."""
        log = self._log
        number = log.header.signature.weights[self._number[part.path]]
        leaf = log.header.signature.state[number]
        log, row = log.holder(state)
        if part.indices is None or leaf.nbytes <= _ONE_PIECE:
            whole = self._read.get(
                ("state", number, state), lambda: self._try(lambda: self._checked(number, state))
            )
            return None if whole is None else _chosen(whole, part).astype(np.float64)
        indices, array = np.asarray(part.indices, np.int64), log.array("states", number)
        places = np.unravel_index(indices, leaf.shape)

        def read() -> np.ndarray:
            if len(indices) > 64:
                return array.read(row)[places]
            each = zip(*places, strict=True)
            return np.asarray([array.read((row, *map(int, place))) for place in each])

        found = self._read.get(("weights", part, state), lambda: self._try(read))
        return None if found is None else found.astype(np.float64)

    def _checked(self, number: int, state: int) -> np.ndarray:
        """Read a leaf of a stored state, and compare it with its digest."""
        (values,) = self._log.checkpoint(state, [number])
        logged = np.frombuffer(self._log.durable.digests[state], np.uint32).reshape(-1, 2)
        if (fingerprint_on_host([values])[0] != logged[number]).any():
            raise LogError(
                f"{self._log.place}: states/{number} of state {state} does not agree with its "
                "digest",
                why="its files are not the ones that the recording wrote",
                fix="restore the folder states/ from a copy of the run",
            )
        return values

    # ---- columns

    def _columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the index that knows the most steps."""
        names = ("grads_max", "grads_norm", "updates_max", "updates_norm", "grads_above")
        for kept in sorted(self._all(), key=lambda kept: -kept.steps):
            if not kept.steps:
                continue
            found = self._try(
                lambda kept=kept: {
                    name: StoredArray(self._log.place, kept.specs[name]).read(slice(0, kept.steps))
                    for name in names
                }
            )
            if found is not None:
                return found
        return {}

    # ---- on disk

    def _all(self) -> list[_Kept]:
        if self._kept is None:
            header, durable = self._log.header, self._log.durable
            self._kept = []
            if header.index != "off":
                specs = (*header.arrays["steps"], *header.arrays["segments"])
                self._kept.append(
                    _Kept(header.index, durable.steps, durable.segments, _by_name(specs))
                )
            for level in LEVELS[1:]:
                if self._log.place.size(_file(level)) is not None:
                    built = self._try(lambda level=level: _built(self._log, level))
                    self._kept += [] if built is None else [built]
        return self._kept

    def _leaf(self, path: str) -> Any:
        return self._leaves[self._number[path]]

    def _try(self, read: Callable[[], Any]) -> Any:
        """Read; say what cannot be, once, and go on without it."""
        try:
            return read()
        except LogError as error:
            if error.what not in self._told:
                self._told.add(error.what)
                warnings.warn(
                    f"{error.what}; questions replay what it would have spared", RuntimeWarning,
                    stacklevel=2,
                )  # fmt: skip
            return None


class _Recent:
    """What was read last, up to so many bytes; what could not be read is tried again."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._found: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        """Return what is kept, or read it."""
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key]
        found = read()
        if found is not None:
            self._found[key] = found
            self._held += _bytes(found)
        while self._held > self._limit:
            _, old = self._found.popitem(last=False)
            self._held -= _bytes(old)
        return found


def _bytes(found: Any) -> int:
    parts = found if isinstance(found, tuple) else (found,)
    return sum(x.nbytes for x in parts if isinstance(x, np.ndarray))


def _chosen(array: np.ndarray, part: Part) -> np.ndarray:
    flat = np.asarray(array).reshape(-1)
    return flat if part.indices is None else flat[list(part.indices)]


def _by_name(specs: Sequence[ArraySpec]) -> dict[str, ArraySpec]:
    return {spec.name.rpartition("/")[2]: spec for spec in specs}


def _file(level: str) -> str:
    return f"index/{level}.msgpack"


def _identity(log: Log) -> str:
    """Return what an index belongs to: the run as it was begun."""
    return sha256(log.place.read(HEADER))


def _built(log: Log, level: str) -> _Kept | None:
    """Read what says that an index was built; None where it is one of another run."""
    name = f"{log.place}: {_file(level)}"
    plain = only_frame(log.place.read(_file(level), limit=2**28), name)
    try:
        specs = [ArraySpec.from_plain(spec) for spec in plain["arrays"]]
        steps, run = plain["steps"], plain["run"]
        segments = [(a, b, row) for a, b, row in plain["segments"]]
        counts = [steps, *(x for segment in segments for x in segment)]
        if any(type(x) is not int or not 0 <= x < 2**48 for x in counts):
            raise ValueError("a number of steps is none")
        folder = {spec.name.rpartition("/")[0] for spec in specs}
        expected = layout(
            level, log.header.signature, steps, columns=min(folder), segments=min(folder)
        )
        form = [(spec.name, spec.shape, spec.dtype) for spec in specs]
        if form != [(spec.name, spec.shape, spec.dtype) for part in expected for spec in part]:
            raise ValueError("its arrays are not those of such an index")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LogError(
            f"{name} does not describe an index: {str(error)[:200]}",
            why="it says which arrays hold what is known of which steps",
            fix=f"delete it and build the index again: run.index({level!r})",
        ) from error
    if run != _identity(log):
        return None
    segments = [s for s in segments if s[0] < s[1] <= log.durable.steps]
    return _Kept(level, min(steps, log.durable.steps), segments, _by_name(specs))


def build(
    log: Log, replayer: Replayer, level: str, progress: Callable[[int], None] = lambda steps: None
) -> None:
    """Build an index by replaying all steps, and store it beside the run.

    Nothing of it exists before all of it is durable: one file names the rest, and is written last
    and at once. Who builds the same index meanwhile writes into a folder of its own.

    Raises:
        QueryError: there is no such level.
        LogError, DataError, DivergenceError: as a replay.
    """
    if level not in LEVELS[1:]:
        raise QueryError(
            f"there is no index {level!r}",
            why="an index is built of a level",
            fix=f"one of {', '.join(LEVELS[1:])}",
        )
    place, steps, signature = log.place, log.durable.steps, log.header.signature
    folder = f"index/{os.urandom(8).hex()}"
    columns, parts = layout(level, signature, steps, columns=folder, segments=folder)
    edges = sorted({*log.durable.checkpoints, steps})
    observer = Observer(signature, level)
    pending: list[Any] = []
    segments: list[tuple[int, int, int]] = []
    arrays = [StoredArray(place, spec) for spec in (*columns, *parts)]
    by_name = _by_name([array.spec for array in arrays])
    tables = {
        name: np.zeros(spec.shape, spec.dtype)
        for name, spec in by_name.items() if spec in columns
    }  # fmt: skip
    written = 0

    def flush() -> None:
        nonlocal written
        if pending:
            packed = np.stack([np.asarray(part) for part in pending])
            for name, values in columns_of(packed).items():
                tables[name][written : written + len(values)] = values
            written += len(pending)
            pending.clear()

    for replayed in replayer.steps(0, steps, late=True) if steps else ():
        executed = replayed.executed
        if not executed.start:
            observer.begin(0, list(executed.before))
        pending.append(observer.take(list(executed.after), executed.grads))
        if executed.start + 1 in edges:
            summary = observer.close()
            for number, values in enumerate(v for part in stored(level, summary) for v in part):
                arrays[len(columns) + number].write(len(segments), values[None])
            segments.append((summary.start, summary.stop, len(segments)))
        if len(pending) >= _WRITTEN_AT_ONCE:
            flush()
        progress(1)
    flush()
    for array in arrays[: len(columns)]:
        values, rows = tables[array.spec.name.rpartition("/")[2]], array.spec.chunk[0]
        for first in range(0, steps, rows):
            array.write(first, values[first : first + rows])
    lay_out(place, folder, [array.spec for array in arrays])
    before = place.size(_file(level))
    old = place.read(_file(level)) if before is not None else None
    plain = {
        "level": level,
        "run": _identity(log),
        "steps": steps,
        "segments": [list(segment) for segment in segments],
        "arrays": [array.spec.to_plain() for array in arrays],
    }
    place.write(_file(level), frame(plain))
    if old is not None:
        _forget(log, old, folder)


def _forget(log: Log, old: bytes, present: str) -> None:
    """Delete the folder of an index that another has taken the place of."""
    try:
        specs = [ArraySpec.from_plain(spec) for spec in only_frame(old, "index")["arrays"]]
    except (LogError, KeyError, TypeError, ValueError):
        return
    for folder in {spec.name.rpartition("/")[0] for spec in specs} - {present}:
        log.place.delete(folder)
