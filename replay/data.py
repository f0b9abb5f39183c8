"""Where samples come from: every kind of source behind one address, an integer id.

A replay reads a sample again years later and needs the same bits, so a source is accepted only
if JAX holds its values unaltered and its item `i` is the same at every reading.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from replay.errors import DataError
from replay.tree import Leaf, nest

PROBES = 16
CHUNK_BYTES = 8 * 2**20
# A sample's id is folded into its key as 32 bits, and -1 is taken by padding.
MOST_SAMPLES = 2**31 - 1
# What map-style datasets return for labels and targets has no dtype of its own; these are the
# types that JAX gives to the same scalars.
SCALARS = {bool: np.dtype(np.bool_), int: np.dtype(np.int32), float: np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Data:
    """A finite set of samples, each with an id from 0 to `len(data) - 1`.

    Build one with `Data.of` or `Data.of_leaves`.

    Attributes:
        spec: the leaves of one example, in the order in which programs receive them.
        tree: the example's tree structure; None where the tree is nested dicts by path.
        samples: how many there are, the same as `len(data)`.
        read: `read(ids[n]) -> [leaf[n, ...], ...]` for ids that are known to exist.
        arrays: the whole of every leaf, `[samples, ...]`, where the source is arrays.

    Example:
        >>> data = Data.of({"x": np.zeros((5, 2), np.float32), "y": np.arange(5)})
        >>> data
        Data(5 samples, x: float32[2], y: int32[])
        >>> data.fetch([[3, 4], [0, -1]])["y"]
        array([[3, 4],
               [0, 0]], dtype=int32)
    """

    spec: tuple[Leaf, ...]
    tree: Any
    samples: int
    read: Callable[[np.ndarray], list[np.ndarray]]
    arrays: tuple[np.ndarray, ...] | None = None

    @classmethod
    def of(cls, source: Any) -> "Data":
        """Give samples of any source an address.

        Args:
            source: a pytree of arrays that share their leading axis (not copied, so do not
                write to them; memory-mapped arrays stay on disk unless they are narrowed); a
                Hugging Face `Dataset` (without a format it is read as NumPy, where its floats
                are float32); or anything with `len(source)` and `source[i]`, or failing that
                `source[ids]`, that returns pytrees of arrays or scalars: a grain `MapDataset`,
                a torch map-style dataset. A `Data` is returned as it is.

        Returns:
            Data whose 64-bit integers are narrowed to 32 bits (unless JAX runs with x64) and
            whose Python scalars are int32, float32 and bool.

        Raises:
            DataError: the source cannot be addressed, is empty, or gives other bits when it is
                read again; its leaves are not numbers, differ in length, or would be altered
                by JAX (float64 without x64, integers that do not fit 32 bits).
        """
        if isinstance(source, Data):
            return source
        if isinstance(source, Iterator):
            raise _unaddressable(source, "it only gives one after another")
        paths, leaves, tree = _flatten(source)
        if any(leaf is source for leaf in leaves) and not hasattr(source, "__array__"):
            return _addressed(source)
        return cls.of_leaves(leaves, paths, tree)

    @classmethod
    def of_leaves(
        cls,
        leaves: Sequence[ArrayLike],
        paths: Sequence[str] | None = None,
        tree: Any = None,
    ) -> "Data":
        """Build data from flat leaves.

        Args:
            leaves: arrays `[samples, ...]`; their order is kept.
            paths: the path of each; by default that of `tree`, else `0`, `1`, … (a single leaf
                is a bare array).
            tree: the example's tree structure; without it examples are nested dicts by path.

        Raises:
            DataError: as `Data.of`.
        """
        if paths is None and tree is not None:
            paths, _, _ = _flatten(jax.tree.unflatten(tree, leaves))
        elif paths is None:
            paths = [str(i) for i in range(len(leaves))] if len(leaves) > 1 else [""]
        if not leaves:
            raise _empty("the data")
        nest(paths, leaves)  # a run opened without its code has only the paths to go by
        arrays = tuple(_held(leaf, path) for path, leaf in zip(paths, leaves, strict=True))
        lengths = {path: array.shape[:1] for path, array in zip(paths, arrays, strict=True)}
        if len(set(lengths.values())) > 1 or () in lengths.values():
            shown = ", ".join(f"{_name(path)} {list(n)}" for path, n in lengths.items())
            raise DataError(
                f"the leaves do not share a leading axis: {shown}",
                why="entry i of every leaf, taken together, is sample i",
                fix="give every leaf one row per sample; turn a list of samples into arrays with "
                "jax.tree.map(lambda *rows: np.stack(rows), *samples)",
            )
        if not len(arrays[0]):
            raise _empty("the data")

        def read(ids: np.ndarray) -> list[np.ndarray]:
            return [array.take(ids, axis=0) for array in arrays]

        return cls(_spec(paths, arrays, 1), tree, len(arrays[0]), read, arrays)

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        return f"Data({self.samples} samples, {', '.join(map(str, self.spec))})"

    @property
    def nbytes(self) -> int:
        """Bytes of all samples together."""
        return self.samples * sum(leaf.nbytes for leaf in self.spec)

    def fetch(self, ids: ArrayLike) -> Any:
        """Read samples by id.

        Args:
            ids: integers of any shape, for example `[steps, batch]`; -1, which pads a short
                batch, reads sample 0.

        Returns:
            An example whose leaves have the shape `[*ids.shape, *leaf.shape]`.

        Raises:
            DataError: an id does not exist, or a sample differs in shape or dtype from the spec.
        """
        leaves = self.leaves(ids)
        if self.tree is None:
            return nest([leaf.path for leaf in self.spec], leaves)
        return jax.tree.unflatten(self.tree, leaves)

    def leaves(self, ids: ArrayLike) -> list[np.ndarray]:
        """Read samples by id, as `fetch` does, without building the tree.

        Returns:
            C-contiguous arrays `[*ids.shape, *leaf.shape]`, in the order of `spec`.

        Raises:
            DataError: as `fetch`.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise DataError(
                f"sample ids are {ids.dtype.name}",
                why="a sample is addressed by an integer",
                fix="pass integers: ids.astype(np.int32)",
            )
        if not ids.size:
            return [_blank(leaf, *ids.shape) for leaf in self.spec]
        if ids.min() < -1 or ids.max() >= self.samples:
            bad = ids[(ids < -1) | (ids >= self.samples)][0]
            raise DataError(
                f"sample {bad} does not exist: the data has {self.samples} samples",
                why=f"ids run from 0 to {self.samples - 1}; -1 stands for padding",
                fix="make the order for this data: its ids must be smaller than len(data)",
            )
        rows = self.read(np.maximum(ids, 0).reshape(-1))
        return [row.reshape(ids.shape + row.shape[1:]) for row in rows]

    def in_memory(self, progress: Callable[[int, int], None] | None = None) -> "Data":
        """Read every sample once, into arrays.

        Args:
            progress: called with (samples read, samples in all) after each chunk.

        Returns:
            Data with the same spec, tree and samples, whose `arrays` are set.
        """
        report = progress or (lambda done, total: None)
        if self.arrays is not None:
            report(self.samples, self.samples)
            return self
        arrays = [_blank(leaf, self.samples) for leaf in self.spec]
        step = max(1, CHUNK_BYTES * self.samples // max(1, self.nbytes))
        for start in range(0, self.samples, step):
            stop = min(start + step, self.samples)
            for array, rows in zip(arrays, self.read(np.arange(start, stop)), strict=True):
                array[start:stop] = rows
            report(stop, self.samples)
        return Data.of_leaves(arrays, [leaf.path for leaf in self.spec], self.tree)

    def fingerprint(self, probes: int = PROBES) -> dict[str, Any]:
        """Describe the data in a few hundred bytes, for `check` to compare with later.

        Args:
            probes: how many samples, evenly spaced, are read and summed.

        Returns:
            `{"samples": int, "spec": [[path, shape, dtype], …], "probes": [[id, crc32c], …]}`,
            lists, strings and integers only.
        """
        return {
            "samples": self.samples,
            "spec": [[leaf.path, list(leaf.shape), leaf.dtype] for leaf in self.spec],
            "probes": [
                [i, checksum(self.leaves([i]))] for i in _spread(self.samples, probes).tolist()
            ],
        }

    def check_arrays(self, arrays: Sequence[np.ndarray]) -> None:
        """Compare every sample with those of a run that holds its data.

        Raises:
            DataError: naming the first sample that differs.
        """
        ids = np.arange(self.samples)
        if changed := _difference(self.spec, ids, arrays, self.leaves(ids)):
            raise _other(f"{changed} has other content than in the run")

    def check(self, fingerprint: Any) -> None:
        """Compare the data with a fingerprint, which may come from a run nobody vouches for.

        Raises:
            DataError: naming the first difference (number of samples, a leaf, the content of a
                probe sample), or that the fingerprint is malformed.
        """
        samples, spec, probes = _parsed(fingerprint)
        if samples != self.samples:
            raise _other(f"the data has {self.samples} samples, the run was made with {samples}")
        mine, theirs = {x.path: x for x in self.spec}, {x.path: x for x in spec}
        for path in theirs | mine:
            if path not in mine:
                raise _other(f"the data lacks a leaf of the run: {theirs[path]}")
            if path not in theirs:
                raise _other(f"the data has a leaf that the run does not have: {mine[path]}")
            if mine[path] != theirs[path]:
                raise _other(f"a leaf differs: {mine[path]} here, {theirs[path]} in the run")
        if self.spec != spec:
            raise _other(f"the leaves have the order {list(mine)}, in the run {list(theirs)}")
        for i, recorded in probes:
            found = checksum(self.leaves([i]))
            if found != recorded:
                raise _other(
                    f"sample {i} has other content: crc32c {found:08x}, in the run {recorded:08x}"
                )


def checksum(leaves: Sequence[np.ndarray]) -> int:
    """Return the crc32c (32 bits) of the bytes of the leaves, in order.

    >>> f"{checksum([np.frombuffer(b'123456789', np.uint8)]):08x}"
    'e3069283'
    """
    return functools.reduce(google_crc32c.extend, (leaf.tobytes() for leaf in leaves), 0)


def _addressed(source: Any) -> Data:
    """Wrap a source that is asked for its samples, after reading a few of them twice."""
    if isinstance(source, Mapping):  # as DatasetDict and Bunch, whose `len` is no number of samples
        names = ", ".join(map(str, itertools.islice(source, 5)))
        raise _unaddressable(source, f"it maps names ({names}, …); pass one of its values")
    try:
        samples = len(source)
    except TypeError as error:
        raise _unaddressable(source, str(error)) from error
    if samples == 0:
        raise _empty("the source")
    if samples > MOST_SAMPLES:
        raise DataError(
            f"the source says that it has {samples} samples",
            why="a sample's id has 32 bits; so many samples usually mean that one is repeated",
            fix="pass the dataset as it is before .repeat(); epochs belong into replay.Order",
        )
    batched = hasattr(source, "with_format")
    if batched and source.format["type"] is None:
        source = source.with_format("numpy")
    first, batched = _first(source, batched)
    paths, values, tree = _flatten(first)
    if not paths:
        raise _empty("sample 0")
    nest(paths, values)
    held = [_held(x, path, "sample 0: ") for path, x in zip(paths, values, strict=True)]
    spec = _spec(paths, held, int(batched))
    conform = functools.partial(_conform, spec=spec, tree=tree)

    def read_each(ids: np.ndarray) -> list[np.ndarray]:
        arrays = [_blank(leaf, len(ids)) for leaf in spec]
        for row, i in enumerate(ids.tolist()):
            for array, value in zip(arrays, conform(source[i], (), f"sample {i}"), strict=True):
                array[row] = value
        return arrays

    def read_together(ids: np.ndarray) -> list[np.ndarray]:
        try:
            # Copied, because a source may fill one buffer again and again.
            found = conform(source[ids], ids.shape, "a batch of samples")
            return [np.array(array, order="C") for array in found]
        except DataError:
            # Read alone, the sample to blame shows: unequal samples read together may come back
            # as an array of objects.
            for i in ids if len(ids) > 1 else ():
                conform(source[np.array([i])], (1,), f"sample {i}")
            raise

    data = Data(spec, tree, samples, read_together if batched else read_each)
    probes = _spread(samples, PROBES)
    seen = data.read(probes)
    if changed := _difference(spec, probes, seen, data.read(probes)):
        raise DataError(
            f"{changed} gives other bits when it is read again",
            why="a replay reads every sample again and must find what the training saw",
            fix="return the same example at every reading; random augmentation belongs into the "
            "loss, with its key: loss(params, example, key)",
        )
    # A grain MapDataset continues into its next epoch: item len + i is item i of epoch 2.
    if hasattr(source, "to_iter_dataset") and (
        changed := _difference(spec, probes, seen, read_each(probes + samples))
    ):
        raise DataError(
            f"{changed} is another example in the grain dataset's second epoch",
            why="after shuffle or random_map an index is a place in one epoch, not a sample",
            fix="pass the dataset as it is before them; put the shuffle into replay.Order, and "
            "the augmentation into the loss, with its key: loss(params, example, key)",
        )
    return data


def _first(source: Any, batched: bool) -> tuple[Any, bool]:
    """Read sample 0, and tell whether the source is to be asked with an array of ids.

    Only if it has to: a source that takes an integer is read one by one even where an array
    works too, because its example could then depend on the others (a maximum over everything).
    """
    ids = np.array([0])
    try:
        return source[ids if batched else 0], batched
    except Exception as error:
        try:
            return source[ids], True
        except Exception:
            raise _unaddressable(source, f"source[0] raised {error!r}") from error


def _conform(
    found: Any, lead: tuple[int, ...], where: str, *, spec: tuple[Leaf, ...], tree: Any
) -> list[np.ndarray]:
    """Flatten what a source returned, and refuse it where it is not like sample 0."""
    values, structure = jax.tree.flatten(found)
    if structure != tree:
        names = [leaf.path for leaf in spec]
        raise _uneven(f"{where} has the leaves {_flatten(found)[0]}, sample 0 has {names}")
    arrays = [_held(x, leaf.path, f"{where}: ") for x, leaf in zip(values, spec, strict=True)]
    for array, leaf in zip(arrays, spec, strict=True):
        if array.shape != (*lead, *leaf.shape) or array.dtype != np.dtype(leaf.dtype):
            rest = array.shape[len(lead) :] if array.shape[: len(lead)] == lead else array.shape
            got = Leaf(leaf.path, rest, array.dtype.name)
            raise _uneven(f"{where} has {got}, sample 0 has {leaf}")
    return arrays


def spaced(count: int, most: int) -> np.ndarray:
    """Return at most so many numbers below a count, evenly spaced, the first and last among them.

    >>> spaced(9, 3)
    array([0, 4, 8])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def check_precision(leaves: Sequence[Leaf], where: str) -> None:
    """Refuse 64-bit numbers of a run in a process whose JAX would round them.

    Args:
        leaves: of its states and batches.
        where: the run.

    Raises:
        DataError: there are some, and JAX runs without x64.
    """
    for leaf in leaves:
        if jax.dtypes.canonicalize_dtype(jnp.dtype(leaf.dtype)) != jnp.dtype(leaf.dtype):
            raise DataError(
                f"{where} was recorded with x64: {leaf.path} is {leaf.dtype}",
                why="without x64, JAX would round it and not say so",
                fix='jax.config.update("jax_enable_x64", True), before the run is opened',
            )


def whole_numbers(values: Any) -> np.ndarray | None:
    """Return a row of whole numbers as `int64[n]`; None where it is anything else.

    What is not whole is not cut off: an array of truth values, `[0.5]` or `[[1], [2, 3]]` is none.

    >>> whole_numbers([3, -1]), whole_numbers([]), whole_numbers(2.0)
    (array([ 3, -1]), array([], dtype=int64), None)
    """
    try:
        found = np.asarray(values if isinstance(values, np.ndarray) else list(values))
    except (TypeError, ValueError):
        return None
    plain = found.ndim == 1 and (found.dtype.kind in "iu" or not found.size)
    return found.astype(np.int64) if plain else None


def _held(value: Any, path: str, where: str = "") -> np.ndarray:
    """Return a leaf as the array that JAX would hold, refusing what JAX would alter."""
    try:
        array = np.asarray(value)
    except Exception as error:
        raise _not_numbers(f"{where}{_name(path)} is a {type(value).__name__}", path) from error
    if array.dtype.kind not in "biufc" and not jnp.issubdtype(array.dtype, np.number):
        raise _not_numbers(f"{where}{_name(path)} holds {array.dtype.name} values", path)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    dtype = SCALARS.get(type(value)) or jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype and dtype.char not in "gG":  # JAX has no long doubles at all
        return array
    narrow = array.astype(dtype)
    if array.dtype.kind in "iu":
        if (narrow != array).any():
            lost = array[narrow != array][0]
            raise DataError(
                f"{where}{_name(path)} holds {lost}, which does not fit {dtype.name}",
                why="without x64, JAX keeps integers in 32 bits and would cut off the rest",
                fix='use smaller numbers, or jax.config.update("jax_enable_x64", True)',
            )
    elif type(value) is not float:
        single = "complex64" if array.dtype.kind == "c" else "float32"
        raise DataError(
            f"{where}{_name(path)} holds {array.dtype.name} values",
            why=f"without x64, JAX would round them to {single} and not say so",
            fix=f"convert them with .astype(np.{single}), or keep 64 bits with "
            'jax.config.update("jax_enable_x64", True)',
        )
    return narrow


def _difference(spec, ids, before, after) -> str | None:
    """Name the first sample and leaf whose bits differ between two readings."""
    for leaf, xs, ys in zip(spec, before, after, strict=True):
        if xs.tobytes() == ys.tobytes():
            continue
        for i, x, y in zip(ids, xs, ys, strict=True):
            if x.tobytes() != y.tobytes():
                return f"sample {i} ({_name(leaf.path)})"
    return None


def _parsed(fingerprint: Any) -> tuple[int, tuple[Leaf, ...], list[tuple[int, int]]]:
    """Take a fingerprint apart, which may be anything; ids are checked where they are read."""
    try:
        samples = index(fingerprint["samples"])
        spec = tuple(
            Leaf(str(path), tuple(map(index, shape)), str(dtype))
            for path, shape, dtype in fingerprint["spec"]
        )
        probes = [(index(i), index(crc)) for i, crc in fingerprint["probes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the recorded fingerprint of the data is malformed: {error!r}",
            why="without it nothing tells whether this is the data of the run",
            fix="restore run.msgpack from a copy: it is damaged, or replay did not write it",
        ) from error
    return samples, spec, probes


def _spec(paths: Sequence[str], arrays: Sequence[np.ndarray], leading: int) -> tuple[Leaf, ...]:
    pairs = zip(paths, arrays, strict=True)
    return tuple(Leaf(path, array.shape[leading:], array.dtype.name) for path, array in pairs)


def _blank(leaf: Leaf, *lead: int) -> np.ndarray:
    return np.empty((*lead, *leaf.shape), np.dtype(leaf.dtype))


def _spread(samples: int, count: int) -> np.ndarray:
    count = min(count, samples)
    return np.arange(count) * (samples - 1) // max(1, count - 1)


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return paths, [leaf for _, leaf in pairs], structure


def _name(path: str) -> str:
    return f"leaf {path!r}" if path else "the array"


def _empty(what: str) -> DataError:
    return DataError(
        f"{what} is empty",
        why="every sample needs at least one array, and a run at least one sample",
        fix="check the path and the filter that made it; filter before, not while, reading",
    )


def _unaddressable(source: Any, reason: str) -> DataError:
    return DataError(
        f"a {type(source).__name__} cannot be asked for its samples by id: {reason}",
        why="a replay reads the samples of any step again, by their ids",
        fix="pass a source with __len__ and __getitem__(i); where there is none, as in a stream "
        "or a loader, the run keeps the batches: recorder.feed(batch)",
    )


def _not_numbers(what: str, path: str) -> DataError:
    return DataError(
        what,
        why="a JAX array holds numbers and booleans only",
        fix="encode the leaf as numbers, pad what varies in length, or leave it out "
        f"(Hugging Face: source.remove_columns({path.partition('/')[0]!r}), or source.flatten() "
        "for nested columns)",
    )


def _uneven(what: str) -> DataError:
    return DataError(
        what,
        why="programs are compiled once, for one structure, shape and dtype of all examples",
        fix="pad what varies in length to one shape (and mask it in the loss), return one dtype, "
        "and filter before, not while, reading",
    )


def _other(what: str) -> DataError:
    return DataError(
        what,
        why="a replay on other data does not give the bits of the run",
        fix="pass the data that the run was recorded with; run.on(source) asks about other data",
    )
