"""Values with named axes, and functions of elements fused into one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from replay.query.nodes import RAGGED, At, Map, Node, Scan, ordered


class Value(NamedTuple):
    """An array with names for its axes; of ragged ones, an array for each tensor.

    Attributes:
        dims: names of the axes.
        data: one array, or one for each part.
        fields: what a ranking says besides, as `data`: `step` and `number`.
    """

    dims: tuple[str, ...]
    data: list[Any]
    fields: dict[str, list[Any]] = {}


def aligned(x: Any, dims: Sequence[str], wanted: Sequence[str]) -> Any:
    """Give an array axes of length one for the dimensions that it lacks."""
    if tuple(dims) == tuple(wanted) or not hasattr(x, "ndim"):
        return x
    places = [i for i, dim in enumerate(wanted) if dim not in dims]
    return x.reshape([1 if i in places else x.shape[list(dims).index(d)]
                      for i, d in enumerate(wanted)])  # fmt: skip


def without_walk(dims: Sequence[str]) -> tuple[str, ...]:
    """Leave out the dimension that a replay walks along."""
    return tuple(dim for dim in dims if dim not in ("step", "state"))


# Functions of elements without a product, which might be contracted with a sum: of float32 and
# wider their results are equal whatever else an executable computes, and however it is fused.
FIXED = frozenset(
    "abs absolute add subtract positive negative sign minimum maximum fmin fmax rint floor ceil "
    "trunc isnan isinf isfinite signbit clip where less less_equal greater greater_equal equal "
    "not_equal logical_and logical_or logical_xor logical_not".split()
)


@dataclasses.dataclass(frozen=True)
class Given:
    """A starting value of a formula.

    Attributes:
        number: among the starting values.
        dims: without the one that is walked.
        ragged: whether it runs over the weights of a tensor.
    """

    number: int
    dims: tuple[str, ...]
    ragged: bool
    fixed = True

    def __call__(self, arrays: Sequence[Any]) -> Any:
        """Return it."""
        x = arrays[self.number]
        return flat(x, self.dims) if self.ragged else x


@dataclasses.dataclass(frozen=True)
class Formula:
    """Functions of elements, and not of whose: equal formulas share their executables.

    Attributes:
        function: its name in `jax.numpy`.
        arguments: formulas, starting values and numbers.
        dims: without the one that is walked.
        constants: the numbers as they are written, since 1 == 1.0 == True.
    """

    function: str
    arguments: tuple[Any, ...]
    dims: tuple[str, ...]
    constants: str

    @property
    def fixed(self) -> bool:
        """Whether its results are equal in any executable, for float32 and wider."""
        of = (x for x in self.arguments if isinstance(x, Formula | Given))
        return self.function in FIXED and all(x.fixed for x in of)

    def __call__(self, arrays: Sequence[Any]) -> Any:
        """Return the value for starting values, the arrays of one tensor."""
        return getattr(jnp, self.function)(*[
            aligned(x(arrays), x.dims, self.dims) if isinstance(x, Formula | Given) else x
            for x in self.arguments
        ])  # fmt: skip


@functools.lru_cache(maxsize=4096)
def fused(node: Node) -> tuple[tuple[Node, ...], Formula | Given]:
    """Return what a tree of functions of elements starts from, and one function of all of it."""
    starts: dict[Node, int] = {}

    def build(this: Node) -> Formula | Given:
        dims = without_walk(this.dims)
        if isinstance(this, Scan) and this.quantity == "updates":
            this = moved(this)
        if not isinstance(this, Map) or not this.walked:
            return Given(starts.setdefault(this, len(starts)), dims, bool(this.parts))
        arguments = [build(x) if isinstance(x, Node) else x for x in this.arguments]
        return Formula(this.function, tuple(arguments), dims, this.constants)

    formula = build(node)
    return tuple(starts), formula


def moved(scan: Scan) -> Node:
    """Return updates as the difference of weights, to be computed where they are used."""
    weights = dataclasses.replace(scan, quantity="weights")
    return Map("subtract", (At(weights, 1), At(weights, 0)))


def flat(x: Any, dims: Sequence[str]) -> Any:
    """Let the last axis run over all weights of a tensor, which may come in its own shape."""
    if not set(dims) & set(RAGGED) or x.ndim == len(dims):
        return x
    return x.reshape(*x.shape[: len(dims) - 1], -1)


def ragged(value: Value) -> bool:
    """Whether a value has an array for each tensor."""
    return len(value.data) > 1 or bool(set(value.dims) & set(RAGGED))


def of_part(values: Sequence[Value], part: int) -> list[Any]:
    """Return the arrays of one tensor; what has none of its own goes with each."""
    return [x.data[part] if len(x.data) > 1 else x.data[0] for x in values]


def stacked(dim: str, values: Sequence[Value]) -> Value:
    """Join values along a new dimension."""
    dims = (dim, *values[0].dims)
    wanted = ordered(dims)
    order = [dims.index(d) for d in wanted]

    def join(lists):
        return [np.stack([np.asarray(x) for x in parts]).transpose(order)
                for parts in zip(*lists, strict=True)]  # fmt: skip

    fields = {name: join([value.fields[name] for value in values]) for name in values[0].fields}
    return Value(wanted, join([value.data for value in values]), fields)


def joined(dim: str, values: Sequence[Value]) -> Value:
    """Join values along a dimension that they have."""
    axis = values[0].dims.index(dim)

    def join(lists):
        return [np.concatenate(parts, axis) for parts in zip(*lists, strict=True)]

    fields = {name: join([value.fields[name] for value in values]) for name in values[0].fields}
    return Value(values[0].dims, join([value.data for value in values]), fields)


def none_of(value: Value, dim: str) -> Value:
    """Return the same without any entry of a dimension."""
    none = (*[slice(None)] * value.dims.index(dim), slice(0, 0))
    fields = {name: [x[none] for x in parts] for name, parts in value.fields.items()}
    return Value(value.dims, [x[none] for x in value.data], fields)


def on_host(value: Value) -> Value:
    """Return the same in NumPy's arrays, weights along one axis."""
    return Value(
        value.dims,
        [flat(np.asarray(x), value.dims) for x in value.data],
        {name: [np.asarray(x) for x in parts] for name, parts in value.fields.items()},
    )
