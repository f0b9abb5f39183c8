"""How a pytree becomes a list of named, typed leaves that survive without its classes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replay.errors import DataError


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a pytree: its path, and what is needed to rebuild it from bytes.

    A typed PRNG key is described by its raw key data (`uint32`) and the name of its
    implementation, because that is how it crosses an exported program and a file.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    key: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype as JAX wants them, of the key data where it is a key."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def __str__(self) -> str:
        return f"{self.path or '(the array)'}: {self.dtype}[{','.join(map(str, self.shape))}]"


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is a typed PRNG key array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def paths(tree: Any) -> list[str]:
    """Return the path of every leaf, as `Dense_0/kernel`, in flattening order."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def describe(tree: Any) -> tuple[Leaf, ...]:
    """Describe every leaf of a tree of arrays or their shapes, typed keys by their key data."""

    def leaf(path: str, value: Any) -> Leaf:
        if is_key(value):
            names = []  # told by the traced value, as a ShapeDtypeStruct of a key does not know

            def raw_of(key):
                names.append(str(jax.random.key_impl(key)))
                return jax.random.key_data(key)

            raw = jax.eval_shape(raw_of, value)
            return Leaf(path, tuple(raw.shape), str(raw.dtype), names[0])
        return Leaf(path, tuple(np.shape(value)), str(jnp.result_type(value)))

    return tuple(map(leaf, paths(tree), jax.tree.leaves(tree)))


def lower(tree: Any) -> list[Any]:
    """Flatten a tree to its raw leaves: typed keys become their key data."""
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]


def lift(raw: Iterable[Any], leaves: Sequence[Leaf], treedef: Any = None) -> Any:
    """Rebuild a tree from raw leaves; nested dicts by path where the treedef is not known."""
    values = [
        jax.random.wrap_key_data(x, impl=leaf.key) if leaf.key else x
        for x, leaf in zip(raw, leaves, strict=True)
    ]
    if treedef is not None:
        return jax.tree.unflatten(treedef, values)
    return nest([leaf.path for leaf in leaves], values)


def nest(paths: Sequence[str], leaves: Sequence[Any]) -> Any:
    """Build nested dicts from paths: `a/b` becomes `{"a": {"b": leaf}}`.

    The indices of lists and tuples become string keys; one leaf with an empty path is returned
    as it is. `jax.tree.leaves` sorts string keys (`10` before `2`), so find leaves again by
    path, not by position.

    Raises:
        DataError: a path occurs twice, or runs through a leaf.

    >>> nest(["a/0", "a/1", "b"], [1, 2, 3])
    {'a': {'0': 1, '1': 2}, 'b': 3}
    """
    if list(paths) == [""]:
        return leaves[0]
    root: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        *parents, name = path.split("/")
        node: Any = root
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name in node:
            raise DataError(
                f"two leaves claim the path {path!r}",
                why="a run names every leaf by its path, with / between the keys",
                fix="rename one of the keys, and use no / inside a key",
            )
        node[name] = leaf
    return root


def copies(leaves: Sequence[jax.Array], into: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """Copy arrays, to be jitted: into the memory of others, where those are donated."""
    return [jnp.copy(leaf) for leaf in leaves]
