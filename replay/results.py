"""Answers as datasets of xarray, with the plan, the grade and the rule in their attributes."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from replay.errors import QueryError
from replay.query.nodes import RAGGED, Node, Part, Pick, Reduce, Rename, Scan, Take
from replay.tree import nest

RULE = (
    "the share of a sample is ((D(g) - D(0)) / g) * w_i g_i / B, weight by weight, with D(g) the "
    "update that the optimizer returns for gradient g at the recorded state"
)


class Result(xr.Dataset):
    """An answer: an `xarray.Dataset`, and other forms of it.

    What has weights has a variable for each tensor, by its path, in the tensor's shape where all
    of it was asked for. A ranking has, beside its values, `step`, `position`, `sample`, `tensor`
    and `weight`, as far as it was taken over them (`<tensor>.sample` where each weight has its
    own). `attrs` hold `plan`, `grade`, `steps` (replayed) and, for attributed updates, `rule`.
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
    variables: dict[str, Any] = {}
    if not parts:
        variables["value"] = (value.dims, value.data[0])
        if ranking is not None:
            for name, found in _places(ranking, value, 0, batch, samples_at).items():
                coordinates[name] = (value.dims, found)
    for i, part in enumerate(parts):
        dims, reshape, marks = _of_part(part, value.dims, value.data[i].shape)
        variables[part.path] = (dims, reshape(value.data[i]), marks)
        if ranking is None:
            continue
        for name, found in _places(ranking, value, i, batch, samples_at).items():
            marked = {**marks, "field": name}
            variables[f"{part.path}.{name}"] = (dims, reshape(found), marked)
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


def _places(node: Reduce, value: Any, i: int, batch: int, samples_at: Any) -> dict[str, Any]:
    """Tell where the entries of a ranking stand."""
    steps, numbers = value.fields["step"][i], value.fields["number"][i]
    nobody = steps < 0
    found: dict[str, Any] = {}
    walked = node.child.walked
    if walked in node.over:
        found[walked] = np.asarray(steps)
    inner = [dim for dim in node.child.dims if dim in node.over and dim != walked]
    sizes = {"position": batch, "weight": sum(part.size for part in node.child.parts)}
    rest = np.where(nobody, 0, numbers).astype(np.int64)
    for dim in reversed(inner):
        size = sizes.get(dim) or _size(node.child, dim)
        place, rest = rest % size, rest // size
        found[dim] = np.where(nobody, -1, place)
    if "weight" in found and node.child.parts:
        paths = [part.path for part in node.child.parts]
        ends = np.cumsum([part.size for part in node.child.parts])
        which = np.searchsorted(ends, found["weight"], side="right")
        which = np.minimum(which, len(paths) - 1)
        first = np.asarray([0, *ends[:-1]])[which]
        within = np.where(nobody, -1, found["weight"] - first)
        for number, part in enumerate(node.child.parts):
            if part.indices is not None:
                mine = (which == number) & ~nobody
                within = np.where(mine, np.asarray(part.indices)[np.maximum(within, 0) *
                                                                 mine], within)  # fmt: skip
        found["tensor"] = np.where(nobody, "", np.asarray(paths, object)[which]).astype(str)
        found["weight"] = within
    if "group" in found:
        groups = (n.by for n in _below(node.child) if isinstance(n, Reduce) and n.by is not None)
        names = np.asarray(next(by for by in groups if by.kind == "labels").names)
        found["group"] = np.where(nobody, -1, names[np.maximum(found["group"], 0)]) if (
            names.dtype.kind in "iu") else np.where(nobody, "", names[found["group"]])  # fmt: skip
    if walked == "step" and "position" in found:
        at = np.where(nobody, -1, np.asarray(steps, np.int64) * batch + found["position"])
        found["sample"] = samples_at(at)
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
