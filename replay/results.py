"""Answers as datasets of xarray, with the plan, the grade and the rule in their attributes."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from replay.errors import QueryError
from replay.query.nodes import RAGGED, Node, Part, Pick, Reduce, Rename, Scan, Take
from replay.tree import nest

RULE = (
    "the share of a sample is ((D(g) - D(0)) / g) * w_i g_i / B, weight by weight, with D(g) the "
    "update that the optimizer returns for gradient g at the recorded state"
)

# Entries from which on the columns of a ranking are made when they are looked at.
LATE = 2**16


class Result(xr.Dataset):
    """An answer: an `xarray.Dataset`, and other forms of it.

    What has weights has a variable for each tensor, by its path, in the tensor's shape where all
    of it was asked for. A ranking has, beside its values, `step`, `position`, `sample`, `tensor`
    and `weight`, as far as it was taken over them (`<tensor>.sample` where each weight has its
    own); of a large ranking these are made when they are looked at. `attrs` hold `plan`, `grade`,
    `steps` (replayed) and, for attributed updates, `rule`.
    """

    __slots__ = ()

    @classmethod
    def of(
        cls,
        variables: Mapping[str, tuple[Sequence[str], Any]],
        coordinates: Mapping[str, Any],
        attributes: Mapping[str, Any],
    ) -> "Result":
        """Make a result of arrays with names for their axes."""
        return cls(dict(variables), dict(coordinates), dict(attributes))

    @classmethod
    def beside(cls, parts: Mapping[str, "Result"]) -> "Result":
        """Put answers of the same occurrences side by side."""
        first = next(iter(parts.values()))
        variables: dict[str, Any] = {}
        for name, part in parts.items():
            if len(part.data_vars) == 1:
                variables[name] = next(iter(part.data_vars.values())).variable
            else:
                variables |= {f"{name}/{key}": v.variable for key, v in part.data_vars.items()}
        drop = [name for name in parts if name in first.coords]
        coordinates = {k: v for k, v in first.coords.items() if k not in drop}
        plans = "\n".join(f"{name}\n{part.attrs['plan']}" for name, part in parts.items())
        attributes = {k: v for part in parts.values() for k, v in part.attrs.items()}
        return cls(variables, coordinates, {**attributes, "plan": plans})

    def item(self) -> Any:
        """Return the one number that this answer is.

        Raises:
            QueryError: it is more than one.
        """
        arrays = list(self.data_vars.values())
        if len(arrays) != 1 or arrays[0].size != 1:
            raise QueryError(
                f"the answer is no single number: {dict(self.sizes)}",
                why="it has entries",
                fix="reduce it, or read it as a dataset",
            )
        return arrays[0].values.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item()) if len(self.data_vars) == 1 and not self.sizes else len(self) > 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if "value" not in self.data_vars:
            raise QueryError(
                f"the answer has {len(self.data_vars)} arrays",
                why="each tensor has its own",
                fix="name one: result['Dense_0/kernel']",
            )
        return np.asarray(self["value"].values, dtype)

    def tree(self) -> Any:
        """Return the tensors as a tree shaped like params: nested dicts by path."""
        names = [str(name) for name in self.data_vars if "." not in str(name).rsplit("/")[-1]]
        return nest(names, [self[name].values for name in names])

    def df(self) -> Any:
        """Return a long table of pandas: a row for each entry; tensors one below the other."""
        names = [str(name) for name in self.data_vars]
        tensors = [
            name
            for name in names
            if any(str(dim).startswith(f"{self[name].attrs.get('tensor')}:")
                   for dim in self[name].dims)
        ]  # fmt: skip
        if not tensors:
            return self.to_dataframe().reset_index() if self.sizes else pd.DataFrame([
                {name: self[name].values.item() for name in names}
            ])  # fmt: skip
        frames = []
        for name in [n for n in tensors if "field" not in self[n].attrs]:
            array = self[name]
            own = [dim for dim in array.dims if str(dim).startswith(f"{name}:")]
            shared = [dim for dim in array.dims if dim not in own]
            sizes = [array.sizes[dim] for dim in own]
            lead = [array.sizes[dim] for dim in shared]
            count = int(np.prod(sizes)) if own else 1
            grid = np.indices((*lead, count)).reshape(len(lead) + 1, -1)
            columns: dict[str, Any] = {}
            for axis, dim in enumerate(shared):
                labels = self.coords[dim].values if dim in self.coords else np.arange(lead[axis])
                columns[str(dim)] = labels[grid[axis]]
            columns["tensor"] = name
            indices = array.attrs.get("indices")
            columns["weight"] = np.asarray(indices)[grid[-1]] if indices else grid[-1]
            columns["value"] = array.values.reshape(-1)
            for other in tensors:
                if self[other].attrs.get("field") and self[other].attrs["tensor"] == name:
                    columns[self[other].attrs["field"]] = self[other].values.reshape(-1)
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def to_arrow(self) -> Any:
        """Return the long table as a `pyarrow.Table`."""
        try:
            import pyarrow as pa
        except ImportError as error:
            raise QueryError(
                "pyarrow is not installed",
                why="tables of Arrow are its own",
                fix="pip install 'jax-replay[sql]', or take .df()",
            ) from error
        return pa.Table.from_pandas(self.df(), preserve_index=False)

    @property
    def plot(self) -> Any:  # type: ignore[override]
        """Draw the answer: `result.plot()` returns a matplotlib figure."""
        # By name: this layer knows nothing of pictures, and matplotlib is an extra.
        report = importlib.import_module("replay.report")
        return lambda **options: report.draw_result(self, **options)


def result_of(
    node: Node,
    value: Any,
    *,
    attributes: Mapping[str, Any],
    batch: int,
    samples_at: Any,
    keys: Sequence[int],
    occurrences: Any,
) -> Result:
    """Give an answer its names.

    Args:
        node: the plan.
        value: its arrays.
        attributes: of the dataset.
        batch: the batch size.
        samples_at: occurrences -> sample ids.
        keys: the epochs or windows that there are.
        occurrences: steps, positions and samples of what was taken.
    """
    parts = node.parts if set(value.dims) & set(RAGGED) else ()
    coordinates = _coordinates(node, value, keys, occurrences)
    ranking = _ranking(node) if value.fields else None
    places = {} if ranking is None else _places(ranking, value, batch, samples_at)
    variables: dict[str, Any] = {}
    if not parts:
        variables["value"] = (value.dims, value.data[0])
        for name, find in places.items():
            coordinates[name] = (value.dims, _column(find, value, 0))
    for i, part in enumerate(parts):
        dims, reshape, marks = _of_part(part, value.dims, value.data[i].shape)
        variables[part.path] = (dims, reshape(value.data[i]), marks)
        for name, find in places.items():
            marked = {**marks, "field": name}
            variables[f"{part.path}.{name}"] = (dims, _column(find, value, i, reshape), marked)
    return Result.of(variables, coordinates, attributes)


def _of_part(part: Part, dims: Sequence[str], shape: Sequence[int]) -> Any:
    marks: dict[str, Any] = {"tensor": part.path}
    if dims[-1] == "unit":
        return [*dims[:-1], f"{part.path}:unit"], lambda x: x, marks
    if part.indices is not None:
        marks["indices"] = list(part.indices)
        if len(part.indices) == 1:
            place = np.unravel_index(part.indices[0], part.shape)
            marks["weight"] = f"{part.path}[{','.join(map(str, map(int, place)))}]"
            return dims[:-1], lambda x: x[..., 0], marks
        return [*dims[:-1], f"{part.path}:weight"], lambda x: x, marks
    own = [f"{part.path}:{axis}" for axis in range(len(part.shape))]
    return [*dims[:-1], *own], lambda x: x.reshape((*x.shape[:-1], *part.shape)), marks


def _ranking(node: Node) -> Reduce | None:
    while isinstance(node, Pick | Rename):
        node = node.child
    return node if isinstance(node, Reduce) and node.how == "top_k" else None


# ---- where the entries of a ranking stand: columns of their steps and numbers, -1 for nobody


class _Steps(NamedTuple):
    """The steps themselves."""

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        # What is kept may be narrower.
        return steps if steps.dtype.itemsize >= 4 else steps.astype(np.int32)


class _Place(NamedTuple):
    """A place along one of the dimensions that are numbered together."""

    stride: int
    size: int

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        place = numbers.astype(np.int64) // self.stride % self.size
        return np.where(steps < 0, -1, place)


class _Which(NamedTuple):
    """The tensor of a weight, and its place among the chosen ones of that tensor."""

    place: _Place
    parts: tuple[Part, ...]

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = self.place(steps, numbers)
        ends = np.cumsum([part.size for part in self.parts])
        which = np.minimum(np.searchsorted(ends, place, side="right"), len(ends) - 1)
        return which, place - np.asarray([0, *ends[:-1]])[which]


class _Tensor(NamedTuple):
    """The path of the tensor of a weight."""

    which: _Which

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        which, _ = self.which(steps, numbers)
        paths = np.asarray([part.path for part in self.which.parts], object)
        return np.where(steps < 0, "", paths[which]).astype(str)


class _Weight(NamedTuple):
    """The flat index of a weight in its tensor."""

    which: _Which

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        which, within = self.which(steps, numbers)
        within = np.where(steps < 0, -1, within)
        for number, part in enumerate(self.which.parts):
            if part.indices is not None:
                mine = (which == number) & (steps >= 0)
                chosen = np.asarray(part.indices)[np.maximum(within, 0) * mine]
                within = np.where(mine, chosen, within)
        return within


class _Group(NamedTuple):
    """The name of a group."""

    place: _Place
    names: np.ndarray

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        names = self.names[np.maximum(self.place(steps, numbers), 0)]
        return np.where(steps < 0, -1 if names.dtype.kind in "iu" else "", names)


class _Sample(NamedTuple):
    """The id of a sample, from `table`, those of all occurrences from the first of a step on."""

    place: _Place
    batch: int
    first: int
    table: np.ndarray

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        place = self.place(steps, numbers) + (steps.astype(np.int64) - self.first) * self.batch
        return np.where(steps < 0, -1, self.table[np.where(steps < 0, 0, place)])


class _Looked(NamedTuple):
    """The id of a sample, looked up in the log."""

    place: _Place
    batch: int
    samples_at: Any

    def __call__(self, steps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        at = steps.astype(np.int64) * self.batch + self.place(steps, numbers)
        return self.samples_at(np.where(steps < 0, -1, at))


class _Late(BackendArray):
    """A column of a large ranking, made when it is looked at, and only where it is."""

    def __init__(self, find: Any, steps: np.ndarray, numbers: np.ndarray):
        self._find, self._steps, self._numbers = find, steps, numbers
        self.shape = steps.shape
        self.dtype = find(np.zeros(0, steps.dtype), np.zeros(0, numbers.dtype)).dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._at)

    def _at(self, key: tuple[Any, ...]) -> np.ndarray:
        return np.asarray(self._find(self._steps[key], self._numbers[key]))


def _column(find: Any, value: Any, i: int, reshape: Any = lambda x: x) -> Any:
    """Return a column of a ranking: at once where it is small, or where the log is needed."""
    steps, numbers = (reshape(np.asarray(value.fields[x][i])) for x in ("step", "number"))
    if steps.size < LATE or isinstance(find, _Looked | _Tensor):  # whose dtype is that of its texts
        return find(steps, numbers)
    late: Any = indexing.LazilyIndexedArray(_Late(find, steps, numbers))
    return indexing.MemoryCachedArray(indexing.CopyOnWriteArray(late))


def _places(node: Reduce, value: Any, batch: int, samples_at: Any) -> dict[str, Any]:
    """Return what tells where the entries of a ranking stand."""
    found: dict[str, Any] = {}
    walked = node.child.walked
    if walked in node.over:
        found[walked] = _Steps()
    inner = [dim for dim in node.child.dims if dim in node.over and dim != walked]
    sizes = {"position": batch, "weight": sum(part.size for part in node.child.parts)}
    stride = 1
    for dim in reversed(inner):
        size = sizes.get(dim) or _size(node.child, dim)
        found[dim] = _Place(stride, size)
        stride *= size
    if "weight" in found and node.child.parts:
        which = _Which(found["weight"], node.child.parts)
        found["tensor"], found["weight"] = _Tensor(which), _Weight(which)
    if "group" in found:
        groups = (n.by for n in _below(node.child) if isinstance(n, Reduce) and n.by is not None)
        names = np.asarray(next(by for by in groups if by.kind == "labels").names)
        found["group"] = _Group(found["group"], names)
    if walked == "step" and "position" in found:
        place, steps = found["position"], node.child.steps
        found["sample"] = _Looked(place, batch, samples_at)
        entries = sum(np.size(x) for x in value.fields["step"])
        first, last = (int(steps[0]), int(steps[-1]) + 1) if len(steps) else (0, 0)
        if len(steps) and LATE <= entries and (last - first) * batch <= entries:
            # All ids that may stand there are read at once: fewer than the entries are.
            table = samples_at(np.arange(first * batch, last * batch))
            found["sample"] = _Sample(place, batch, first, table)
    return found


def _size(node: Node, dim: str) -> int:
    for this in _below(node):
        if isinstance(this, Reduce) and this.by is not None and this.by.dim == dim:
            if dim == "tensor":
                return len(this.child.parts)
            return this.by.count
        if isinstance(this, Reduce) and dim in ("rank", "bin", "quantile"):
            settings = this.options
            known = {"rank": settings.get("k"), "bin": len(settings.get("edges", ())) + 1,
                     "quantile": len(settings.get("q", ()))}  # fmt: skip
            if known[dim]:
                return int(known[dim])
        if isinstance(this, Scan) and dim == "sample" and this.samples:
            return this.samples
    raise QueryError(
        f"a ranking over {dim!r}", why="its size is not known from the plan", fix="rank others"
    )


def _below(node: Node) -> Any:
    yield node
    for child in node.children:
        yield from _below(child)


def _coordinates(node: Node, value: Any, keys: Sequence[int], occurrences: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dim in value.dims:
        if dim in ("step", "state"):
            found[dim] = node.steps
        elif dim in ("epoch", "window") and len(keys):
            found[dim] = np.asarray(keys)
    for this in _below(node):
        if isinstance(this, Take):
            continue
        if isinstance(this, Reduce):
            by = this.by
            if by is not None and by.kind == "labels" and "group" in value.dims:
                found.setdefault("group", np.asarray(by.names))
            if by is not None and by.kind == "tensor" and "tensor" in value.dims:
                found.setdefault("tensor", np.asarray([p.path for p in this.child.parts]))
            if "quantile" in value.dims and this.how == "quantile":
                found.setdefault("quantile", np.asarray(this.options["q"]))
            if "bin" in value.dims and this.how == "hist":
                edges = this.options["edges"]
                found.setdefault("low", ("bin", np.asarray([-np.inf, *edges])))
                found.setdefault("high", ("bin", np.asarray([*edges, np.inf])))
    if occurrences is not None:
        for name, column in zip(("step", "position", "sample"), occurrences, strict=True):
            if name == "step" or (column >= 0).all() and len(column):
                found[name] = ("occurrence", column)
    return found
