"""Bytes and arrays at rest: a place for a run, and zarr arrays in it that cannot lie unnoticed.

Every chunk carries a crc32c; a chunk that is missing is an error and never zeros; the layout of
an array comes from its checksummed `ArraySpec`, not from the `zarr.json` beside it, which is
written for xarray and zarr-python.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import operator
import os
import pathlib
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from replay.errors import LogError

# What zarr-python cannot read is kept as unsigned integers of the same width.
_STORED_AS = {"bfloat16": "uint16"} | {
    name: "uint8" for name in dir(ml_dtypes) if name.startswith("float8")
}


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """The layout of one array, complete: nothing about it is read from its folder.

    Attributes:
        name: its folder inside the run, such as `states/3`; never made from a tensor's name.
        shape: the whole logical shape; space is taken only by chunks that are written.
        chunk: the unit of writing, one file.
        dtype: of the values.
        dims: names of the dimensions.
        inner: the unit of reading inside a file, for chunks that are large; else `chunk`.
        ids: whether the values are small integers, which compress by bit planes.
        attributes: for readers of the zarr group.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    inner: tuple[int, ...] | None = None
    ids: bool = False
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Return the zarr v3 metadata."""
        stored = _STORED_AS.get(self.dtype, self.dtype)
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        width = np.dtype(stored).itemsize
        blosc = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "typesize": width}
        compress = (
            {"name": "blosc", "configuration": blosc | {"blocksize": 0}}
            if self.ids
            else {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
        )
        codecs = [little, compress, {"name": "crc32c"}]
        if self.inner not in (None, self.chunk):
            sharding = {
                "chunk_shape": list(self.inner or ()),
                "codecs": codecs,
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        fill: Any = False if stored == "bool" else 0
        if np.dtype(stored).kind == "c":
            fill = [0.0, 0.0]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": codecs,
            "dimension_names": list(self.dims),
            "attributes": self.attributes | ({} if stored == self.dtype else {"dtype": self.dtype}),
        }

    def to_plain(self) -> dict[str, Any]:
        """Return msgpack-able data, the inverse of `from_plain`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Any) -> "ArraySpec":
        """Rebuild a spec from a record nobody vouches for; the values are checked when opened."""
        shapes = {name: tuple(map(operator.index, plain[name])) for name in ("shape", "chunk")}
        inner = None if plain["inner"] is None else tuple(map(operator.index, plain["inner"]))
        if not all(n >= 0 for n in shapes["shape"]) or not all(n > 0 for n in shapes["chunk"]):
            raise ValueError(f"{plain['name']!r} has an impossible shape")
        if math.prod(shapes["chunk"]) > 2**34 or len(shapes["shape"]) != len(shapes["chunk"]):
            raise ValueError(f"{plain['name']!r} has impossible chunks")
        if not re.fullmatch(
            r"(states|steps|segments|data|index/[0-9a-f]{16})/[a-z0-9_]+", plain["name"]
        ):
            raise ValueError(f"{plain['name']!r} is not the name of an array of a run")
        return cls(
            name=plain["name"],
            **shapes,
            dtype=str(plain["dtype"]),
            dims=tuple(str(dim) for dim in plain["dims"]),
            inner=inner,
            ids=bool(plain["ids"]),
            attributes={str(k): str(v) for k, v in plain["attributes"].items()},
        )


def rows(name: str, row: Sequence[int], count: int, dtype: str, dims: Sequence[str]) -> ArraySpec:
    """Lay out an array of `count` equal rows, in files of about 8 MiB and pieces of about 4.

    A file is encoded as a whole, in memory that the training would rather have.
    """
    width = np.dtype(_STORED_AS.get(dtype, dtype)).itemsize

    def halved(row: Sequence[int], limit: int) -> tuple[int, ...]:
        sizes = [max(n, 1) for n in row]
        for axis in range(len(sizes)):
            while sizes[axis] % 2 == 0 and math.prod(sizes) * width > limit:
                sizes[axis] //= 2
        return tuple(sizes)

    file = halved(row, 2**23)
    chunk, inner = (1, *file), (1, *halved(file, 2**22))
    return ArraySpec(name, (count, *row), chunk, dtype, tuple(dims), inner)


class Place:
    """A run directory: a local path, or the URL of any TensorStore key-value store.

    Local writes are atomic and synced before they return. Appending is a real append on a local
    path, and a rewrite of the whole (small) value on a key-value store.
    """

    def __init__(self, where: str | os.PathLike):
        self.where = os.fspath(where)
        self.path = None if "://" in self.where else pathlib.Path(self.where).absolute()
        self._kv = None
        if self.path is None:
            url = self.where if self.where.endswith("/") else self.where + "/"
            # One context for each URL would give each `memory://` store a world of its own.
            self._kv = tensorstore.KvStore.open(url, context=_CONTEXT).result()

    def __str__(self) -> str:
        return self.where

    def read(self, name: str, *, limit: int = 2**30) -> bytes:
        """Return the bytes of one file.

        Raises:
            LogError: it is missing, or larger than `limit` bytes.
        """
        size = self.size(name)
        if size is None:
            raise LogError(
                f"{self}: {name} is missing",
                why="every file that a run names is needed to answer from it",
                fix="restore the file from a copy of the run",
            )
        if size > limit:
            raise LogError(
                f"{self}: {name} has {size:,} bytes, more than the {limit:,} it may have",
                why="a size is checked before memory is taken for it",
                fix="restore the file from a copy of the run",
            )
        if self._kv is not None:
            return bytes(self._kv.read(name).result().value)
        with open(self._local / name, "rb") as file:  # a device would go on for ever
            return file.read(size)

    def size(self, name: str) -> int | None:
        """Return the bytes of one file, None where there is none."""
        if self._kv is not None:
            result = self._kv.read(name).result()
            return len(result.value) if result.state == "value" else None
        try:
            found = (self._local / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def write(self, name: str, data: bytes) -> None:
        """Write one file, all or nothing, and wait until it is durable."""
        if self._kv is not None:
            self._kv.write(name, data).result()
            return
        target = self._local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: others may be writing the same file.
        temporary = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)

    def append(self, name: str, data: bytes) -> None:
        """Append to one file and wait until it is durable."""
        if self._kv is not None:
            before = self._kv.read(name).result()
            start = before.value if before.state == "value" else b""
            self._kv.write(name, bytes(start) + data).result()
            return
        target = self._local / name
        fresh = not target.exists()
        with open(target, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            _sync_folder(target.parent)

    def truncate(self, name: str, size: int) -> None:
        """Cut one file to its first `size` bytes, durably."""
        if self._kv is not None:
            self._kv.write(name, self.read(name)[:size]).result()
            return
        with open(self._local / name, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def list(self) -> dict[str, int]:
        """Return the size in bytes of every file, by its name with slashes."""
        if self._kv is not None:
            names = [key.decode() for key in self._kv.list().result()]
            return {name: self.size(name) or 0 for name in names}
        found = {}
        for folder, _, files in os.walk(self._local):
            for file in files:
                path = pathlib.Path(folder, file)
                with contextlib.suppress(FileNotFoundError):  # a recorder may be at work
                    found[path.relative_to(self._local).as_posix()] = path.stat().st_size
        return found

    def delete(self, name: str) -> None:
        """Delete a file or a folder; nothing happens where there is none."""
        if self._kv is not None:
            self._kv.write(name, None).result()  # None deletes
            # "0" follows "/": the range holds what lies below the folder and nothing else.
            self._kv.delete_range(tensorstore.KvStore.KeyRange(name + "/", name + "0")).result()
            return
        path = self._local / name
        while path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
                shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def kvstore(self, name: str) -> Any:
        """Return the TensorStore specification of one folder inside."""
        if self._kv is not None:
            spec = self._kv.spec().to_json()
            return {**spec, "path": f"{spec.get('path', '')}{name}/"}
        return {"driver": "file", "path": f"{self._local / name}/"}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write; the operating system lets go of it when the process dies.

        Raises:
            LogError: somebody else holds it, and the message says who; or nothing can be written.
        """
        if self._kv is not None:
            yield  # one writer is the caller's promise there: object stores have no such lock
            return
        try:
            self._local.mkdir(parents=True, exist_ok=True)
            lock = open(self._local / "lock", "a+b")
        except OSError as error:
            raise LogError(
                f"{self} cannot be written: {error}",
                why="a run is a directory with files of its own",
                fix="choose a directory that can be made and written",
            ) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
                raise LogError(
                    f"{self} is being recorded by {holder}",
                    why="two writers in one run would overwrite each other's steps",
                    fix="wait for it or stop it, or record into another directory",
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            yield
            file.truncate(0)

    @property
    def _local(self) -> pathlib.Path:
        assert self.path is not None
        return self.path


class StoredArray:
    """One array of a run, open for reading and writing whole chunks."""

    def __init__(self, place: Place, spec: ArraySpec, *, label: str = ""):
        self.spec, self._place, self._label = spec, place, label
        request = {
            "driver": "zarr3",
            "kvstore": place.kvstore(spec.name),
            "metadata": spec.metadata(),
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        try:
            self._array = tensorstore.open(
                request, open=True, assume_metadata=True, context=_CONTEXT
            ).result()
        except ValueError as error:
            raise LogError(
                f"{place}: run.msgpack describes {spec.name} in a way that cannot be stored: "
                f"{str(error).splitlines()[0][:200]}",
                why="the layout of an array decides where its bytes are looked for",
                fix="restore run.msgpack from a copy of the run",
            ) from error

    def read(self, index: Any = ...) -> np.ndarray:
        """Read a selection.

        Raises:
            LogError: a chunk is missing or its checksum does not agree; the message names it.
        """
        try:
            values = np.asarray(self._array[index].read().result())
        except (ValueError, OSError) as error:
            raise LogError(
                f"{self._place}: {self.spec.name}{self._label and f' ({self._label})'} cannot be "
                f"read: {_short(error)}",
                why="a chunk that is lost or changed would give wrong values",
                fix="restore the file from a copy of the run; the other states do not need it",
            ) from error
        return values.view(self.spec.dtype) if self.spec.dtype in _STORED_AS else values

    def write(self, start: int, values: np.ndarray) -> None:
        """Write rows from `start` on, one file after the other, and wait until they are durable.

        The rows cover whole chunks: nothing is read back in order to write.

        Raises:
            OSError: the disk is full or gone.
        """
        if self.spec.dtype in _STORED_AS:
            values = np.asarray(values).view(_STORED_AS[self.spec.dtype])
        rows = self._array[start : start + len(values)].translate_to[0]
        cuts = [
            [slice(a, min(a + size, length)) for a in range(0, length, size)]
            for length, size in zip(values.shape[1:], self.spec.chunk[1:], strict=True)
        ]
        try:
            for part in itertools.product([slice(0, len(values))], *cuts):
                rows[part].write(values[part], can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise OSError(f"{self.spec.name}: {_short(error)}") from error


def lay_out(place: Place, group: str, specs: Sequence[ArraySpec], **attributes: Any) -> None:
    """Write the zarr metadata of a group and its arrays, for xarray and zarr-python to open it."""
    top = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    place.write(f"{group}/zarr.json", json.dumps(top).encode())
    for spec in specs:
        place.write(f"{spec.name}/zarr.json", json.dumps(spec.metadata()).encode())


class KeyValues:
    """Values that may be lost, by name, in a folder of a run: replaced whole, never waited for.

    Args:
        place: the run.
        folder: in it.
    """

    def __init__(self, place: Place, folder: str):
        self._place, self._folder = place, folder
        spec = place.kvstore(folder)
        self._kv = tensorstore.KvStore.open(
            {**spec, "file_io_sync": False} if spec["driver"] == "file" else spec, context=_CONTEXT
        ).result()

    def read(self, names: Sequence[str], *, limit: int = 2**34) -> list[bytes | None]:
        """Return values, None for what is not there, cannot be read, or is beyond the limit."""
        found: list[bytes | None] = []
        path = self._place.path
        large = [path is not None and _size(path / self._folder / x) > limit for x in names]
        futures = [None if big else self._kv.read(x) for x, big in zip(names, large, strict=True)]
        for future in futures:
            try:
                if future is None:
                    found.append(None)
                    continue
                result = future.result()
                found.append(bytes(result.value) if result.state == "value" else None)
            except (ValueError, OSError):
                found.append(None)
        return found

    def write(self, name: str, value: bytes) -> None:
        """Write a value, all or nothing.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._kv.write(name, value).result()
        except ValueError as error:
            raise OSError(f"{self._folder}/{name}: {_short(error)}") from error

    def delete(self, name: str) -> None:
        """Delete a value, or all below a name that ends with a slash."""
        try:
            if name.endswith("/") and self._place.path is not None:
                shutil.rmtree(self._place.path / self._folder / name, ignore_errors=True)
            elif name.endswith("/"):
                self._kv.delete_range(_below(name)).result()
            else:
                self._kv.write(name, None).result()
        except (ValueError, OSError):  # somebody else is at it, or nothing can be deleted here
            return

    def names(self, below: str = "") -> list[str]:
        """Return the names of all values below a name that ends with a slash."""
        try:
            keys = self._kv.list(_below(below) if below else None).result()
        except (ValueError, OSError):
            return []
        return [key.decode(errors="replace") for key in keys]

    def write_arrays(
        self, name: str, arrays: Sequence[tuple[np.ndarray, Sequence[str], dict]], attributes: dict
    ) -> None:
        """Write a zarr group of arrays called 0, 1, ... with dimensions and attributes.

        As they are: what is read again soon is not worth the time of compressing it. The metadata
        of the group is written last: without it nothing is there.

        Raises:
            OSError: they cannot be written.
        """
        try:
            writes = []
            for i, (array, dims, notes) in enumerate(arrays):
                array = np.asarray(array)
                request = self._request(name, i, str(array.dtype), array.shape, dims, notes)
                stored = array.view(_STORED_AS.get(str(array.dtype), array.dtype))
                opened = tensorstore.open(
                    request, create=True, delete_existing=True, context=_CONTEXT
                )
                writes.append(opened.result().write(stored))
            for write in writes:
                write.result()
        except ValueError as error:
            raise OSError(f"{self._folder}/{name}: {_short(error)}") from error
        top = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        self.write(f"{name}/zarr.json", json.dumps(top).encode())

    def read_arrays(self, name: str, forms: Sequence[Sequence[Any]]) -> list[np.ndarray] | None:
        """Return the arrays of a group; None where they cannot be read.

        Args:
            name: of the group.
            forms: dtype, shape and dimensions of each: what is said beside them is not believed.
        """
        try:
            opened = []
            for i, (dtype, shape, dims) in enumerate(forms):
                request = self._request(name, i, dtype, shape, dims, {})
                whole = 4 * math.prod(shape, start=np.dtype(dtype).itemsize) + 2**16
                path = self._place.path
                chunk = "/".join(["c", *["0"] * len(shape)])
                if path and _size(path / self._folder / name / str(i) / chunk) > whole:
                    return None
                opened.append(
                    tensorstore.open(request, open=True, assume_metadata=True, context=_CONTEXT)
                )
            reads = [one.result().read() for one in opened]
            found = [np.asarray(read.result()) for read in reads]
            return [x.view(np.dtype(form[0])) for x, form in zip(found, forms, strict=True)]
        except (ValueError, OSError, TypeError):
            return None

    def _request(
        self, name: str, number: int, dtype: str, shape: Sequence[int], dims: Any, notes: dict
    ) -> dict[str, Any]:
        place = f"{name}/{number}"
        spec = self._place.kvstore(f"{self._folder}/{place}")
        spec = {**spec, "file_io_sync": False} if spec["driver"] == "file" else spec
        chunk = tuple(max(n, 1) for n in shape)
        array = ArraySpec(place, tuple(shape), chunk, dtype, tuple(dims), attributes=notes)
        metadata = array.metadata()
        metadata["codecs"] = [x for x in metadata["codecs"] if x["name"] != "zstd"]
        return {
            "driver": "zarr3",
            "kvstore": spec,
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }


def _size(path: pathlib.Path) -> int:
    """Return the bytes of a file, none where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _below(name: str) -> Any:
    # "0" follows "/": the range holds what lies below the folder and nothing else.
    return tensorstore.KvStore.KeyRange(name, name[:-1] + "0")


def _short(error: Exception) -> str:
    return str(error).split(" [")[0].splitlines()[0][:600]


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The trajectory shares the machine with the writer: few threads, no cache of its own. Each write
# goes to a file of a name of its own and is then renamed. With TensorStore's default locking it
# goes to `<chunk>.__lock`, which is not truncated: a chunk that is shorter than what a killed
# writer left there ends with the rest of it, and cannot be read (seen with tensorstore 0.1.86).
_CONTEXT = tensorstore.Context(
    {
        "cache_pool": {"total_bytes_limit": 0},
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 4},
        "file_io_locking": {"mode": "none"},
    }
)
