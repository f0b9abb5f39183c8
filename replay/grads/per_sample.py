"""Per-sample gradients of any JAX loss, asked for by what is wanted of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from replay.errors import ProgramError
from replay.grads.gradients import Gradients, Tensor, grams, plan
from replay.grads.taps import Taps, tap
from replay.tree import paths


class PerSample:
    """Reductions of the gradients of every sample's own loss, without materialising them.

    Made by `replay.per_sample`. Every method takes `(params, batch, keys)`: the parameters, the
    examples with a leading batch axis on every leaf, and one typed key for each sample (None for a
    loss that needs none; it is then called with None). All methods can be jitted. Sums run over
    the samples in their order, and equal values are told apart by it.
    """

    def __init__(self, loss: Callable[..., Any]):
        self._loss = loss

    def losses(self, params: PyTree, batch: PyTree, keys: Any = None) -> Float[Array, " batch"]:
        """Return the loss of each sample."""
        return jax.vmap(self._scalar, in_axes=(None, 0, 0))(params, batch, keys)

    def norms(self, params: PyTree, batch: PyTree, keys: Any = None) -> Float[Array, " batch"]:
        """Return the Euclidean norm of each sample's gradient over all parameters."""
        squares = jax.tree.leaves(self._each(params, batch, keys, Gradients.square_norms))
        return jnp.sqrt(jnp.stack(squares).sum(axis=0))

    def tensor_norms(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return the norm of each sample's gradient for each tensor, leaves `[batch]`."""
        return jax.tree.map(jnp.sqrt, self._each(params, batch, keys, Gradients.square_norms))

    def dot(
        self, direction: PyTree, params: PyTree, batch: PyTree, keys: Any = None
    ) -> Float[Array, " batch"]:
        """Return the dot product of each sample's gradient with a direction shaped like params.

        Raises:
            ProgramError: the direction is not shaped like params.
        """
        if jax.tree.structure(direction) != jax.tree.structure(params):
            raise ProgramError(
                "the direction has another tree structure than params",
                why="each tensor's gradient is multiplied by the direction's tensor of that name",
                fix="pass a pytree like params, such as another gradient or a step",
            )
        gradients, _ = self._gradients(params, batch, keys)
        pairs = zip(gradients, jax.tree.leaves(direction), strict=True)
        dots = [gradient.dots(jnp.asarray(leaf)) for gradient, leaf in pairs]
        return jnp.stack(dots).sum(axis=0)

    def gram(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        other: PyTree = None,
        other_keys: Any = None,
    ) -> Float[Array, "batch other"]:
        """Return the dot products between the gradients of two batches, or within one."""
        mine, _ = self._gradients(params, batch, keys)
        if other is None:
            theirs = mine
        else:
            theirs, _ = self._gradients(params, other, other_keys)
        products = [grams(one, two) for one, two in zip(mine, theirs, strict=True)]
        return jnp.stack(products).sum(axis=0)

    def sum(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return the sum of the gradients: one ordinary backward pass."""
        return jax.grad(lambda p: self.losses(p, batch, keys).sum())(params)

    def abs_sum(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return for each weight the sum over samples of its |gradient|."""
        return self._each(params, batch, keys, Gradients.abs_sum)

    def square_sum(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return for each weight the sum over samples of its squared gradient."""
        return self._each(params, batch, keys, Gradients.square_sum)

    def max(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return for each weight the largest |gradient| over the samples."""
        return self._each(params, batch, keys, Gradients.max)

    def argmax(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return for each weight the position of the sample with the largest |gradient|."""
        return jax.tree.map(lambda x: x[0], self.top_k(1, params, batch, keys)[1])

    def top_k(
        self, k: int, params: PyTree, batch: PyTree, keys: Any = None
    ) -> tuple[PyTree, PyTree]:
        """Return for each weight the `k` largest |gradient| and the samples they are of.

        Returns:
            Leaves `[k, *shape]` of values in falling order, and `int32[k, *shape]` of positions in
            the batch. Of equal values the earlier sample comes first; where the batch has fewer
            than `k` samples the rest is `-inf` and -1.
        """
        gradients, tree = self._gradients(params, batch, keys)
        values, positions = zip(*(gradient.top_k(k) for gradient in gradients), strict=True)
        return jax.tree.unflatten(tree, values), jax.tree.unflatten(tree, positions)

    def at(
        self, tensor: str, index: tuple[int, ...], params: PyTree, batch: PyTree, keys: Any = None
    ) -> Float[Array, " batch"]:
        """Return the gradient of every sample with respect to one weight.

        Raises:
            ProgramError: there is no such tensor; the message lists those there are.
        """
        names = paths(params)
        if tensor not in names:
            raise ProgramError(
                f"there is no tensor {tensor!r}",
                why="a weight is named by the path of its tensor and its index",
                fix=f"one of {', '.join(names)}",
            )
        gradients, _ = self._gradients(params, batch, keys)
        return gradients[names.index(tensor)].map(lambda gradient: gradient[index])

    def histogram(
        self, edges: Float[Array, " edges"], params: PyTree, batch: PyTree, keys: Any = None
    ) -> PyTree:
        """Count |gradients| of all samples and weights of a tensor between edges.

        Returns:
            For each tensor `int32[edges + 1]`: below the first edge, between neighbours (the lower
            edge included), and from the last edge on, NaN included.
        """
        edges = jnp.asarray(edges)
        empty = jnp.zeros(edges.size + 1, jnp.int32)

        def count(total, gradient, _):
            places = jnp.searchsorted(edges, jnp.abs(gradient).reshape(-1), side="right")
            return total.at[places].add(1)

        return self._each(params, batch, keys, lambda gradient: gradient.fold(count, empty))

    def project(
        self, dimension: int, key: Key[Array, ""], params: PyTree, batch: PyTree, keys: Any = None
    ) -> Float[Array, "batch dimension"]:
        """Project each sample's gradient on random signs, scaled to keep norms on average.

        The signs are a function of `key` and the number of the tensor, so that projections of
        several batches can be compared (Achlioptas, 2003).
        """
        gradients, _ = self._gradients(params, batch, keys)

        def along(number):
            total = 0.0
            for leaf, gradient in enumerate(gradients):
                sign_key = jax.random.fold_in(jax.random.fold_in(key, leaf), number)
                shape = gradient.tensor.struct.shape
                total += gradient.dots(jax.random.rademacher(sign_key, shape, gradient.dtype))
            return total

        rows = jax.lax.map(along, jnp.arange(dimension, dtype=jnp.uint32))
        return rows.T / jnp.sqrt(jnp.asarray(dimension, rows.dtype))

    def grads(self, params: PyTree, batch: PyTree, keys: Any = None) -> PyTree:
        """Return the gradients themselves, leaves `[batch, *shape]`."""
        return self._each(params, batch, keys, Gradients.materialised)

    def explain(self, params: PyTree, batch: PyTree, keys: Any = None) -> str:
        """Tell for every tensor which way its gradients are had, and why."""
        example, key = jax.tree.map(lambda x: x[0], (batch, keys))
        taps, tensors = self._plan(params, example, key)
        lines = []
        for tensor in tensors:
            used = ", ".join(taps.meetings[i].operation for i in tensor.meetings)
            why = f"  ({tensor.reason})" if tensor.reason else ""
            lines.append(f"{tensor.path:<40} {tensor.way:<8} {used}{why}")
        return "\n".join(lines)

    def _scalar(self, params: PyTree, example: PyTree, key: Any) -> Any:
        result = self._loss(params, example, key)
        value = result[0] if isinstance(result, tuple) else result
        if jnp.shape(value) != ():
            raise ProgramError(
                f"the loss of one example has shape {list(jnp.shape(value))}",
                why="a per-sample loss is called with one example, without batch axis",
                fix="reduce it to a scalar",
            )
        return value

    def _plan(self, params: PyTree, example: PyTree, key: Any) -> tuple[Taps, tuple[Tensor, ...]]:
        leaves = jax.tree.leaves(params)
        for path, leaf in zip(paths(params), leaves, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ProgramError(
                    f"parameter {path!r} is {leaf.dtype}{list(leaf.shape)}, not floating point",
                    why="there is a gradient with respect to every parameter",
                    fix="keep integers in the closure of the loss, or in the examples",
                )
        taps = tap(self._scalar, params, example, key)
        rest = jax.tree.leaves((example, key))
        _, factors = jax.eval_shape(taps.factors, leaves, rest)
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        return taps, plan(taps.meetings, [type(x) for x in factors], structs, paths(params))

    def _gradients(self, params: PyTree, batch: PyTree, keys: Any):
        rows = jax.tree.leaves((batch, keys))
        sizes = {jnp.shape(x)[:1] for x in rows}
        if len(sizes) != 1 or () in sizes:
            shapes = ", ".join(str(list(jnp.shape(x))) for x in rows)
            raise ProgramError(
                f"the leaves of the batch do not share a leading axis: {shapes}",
                why="entry i of every leaf, taken together, is sample i",
                fix="give every leaf, and keys, one row for each sample",
            )
        ((size,),) = sizes
        params = jax.tree.map(jnp.asarray, params)
        example, key = jax.tree.map(lambda x: x[0], (batch, keys))
        taps, tensors = self._plan(params, example, key)
        leaves, tree = jax.tree.flatten(params)
        _, factors = jax.vmap(lambda rest: taps.factors(leaves, rest))(rows)
        gradients = [Gradients(t, taps.meetings, factors, leaves, size) for t in tensors]
        return gradients, tree

    def _each(self, params: PyTree, batch: PyTree, keys: Any, function: Callable) -> PyTree:
        gradients, tree = self._gradients(params, batch, keys)
        return jax.tree.unflatten(tree, [function(gradient) for gradient in gradients])


def per_sample(loss: Callable[..., Any]) -> PerSample:
    """Give the per-sample gradients of a loss, by reductions.

    Args:
        loss: `loss(params, example, key) -> scalar` or `(scalar, aux)`, of one sample.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(params, example, key):
        ...     return (jnp.dot(params["w"], example["x"]) - example["y"]) ** 2
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.array([0.0, 5.0])}
        >>> per_sample(loss).norms(params, batch).tolist()
        [2.0, 6.0]
    """
    return PerSample(loss)
