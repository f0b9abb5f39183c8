"""Per-sample gradients of any JAX loss, asked for by what is wanted of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from replay.errors import ProgramError
from replay.grads import strategy, stream
from replay.grads.reductions import Dot, Histogram, Max, Min, Norm, Reduction, Sum, TopK
from replay.grads.sources import STRATEGIES, Asked, Group, Problem, chunks
from replay.tree import paths

MEMORY = 2**30


class PerSample:
    """Reductions of the gradients of every sample's own loss, without materialising them.

    Made by `replay.per_sample`. Every method takes `(params, batch, keys)`: the parameters, the
    examples with a leading batch axis on every leaf, and one typed key for each sample (None for a
    loss that needs none; it is then called with None). A batched loss also takes `model_state` and
    `key` by name. All methods can be jitted. Sums run over the samples in their order, and equal
    values are told apart by it.

    Attributes:
        strategy: `auto`, one of `factored`, `scan` and `vmap`, or a mapping from paths of tensors
            to these.
        memory: bytes that what is known of the samples' gradients may take while it is reduced.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        *,
        strategy: str | Mapping[str, str] = "auto",
        memory: int = MEMORY,
        batched: bool = False,
    ):
        self._loss, self._batched = loss, batched
        self.strategy, self.memory = strategy, memory
        named = [strategy] if isinstance(strategy, str) else list(strategy.values())
        unknown = sorted({name for name in named if name not in (*STRATEGIES, "auto")})
        if unknown:
            raise ProgramError(
                f"there is no strategy {unknown[0]!r}",
                why="it decides how the gradients of single samples are computed",
                fix=f"one of auto, {', '.join(STRATEGIES)}",
            )

    def losses(
        self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any
    ) -> Float[Array, " batch"]:
        """Return the loss of each sample."""
        asked = self._ask(params, batch, keys, **context)
        return jax.vmap(lambda row: asked.problem.loss(asked.leaves, row, asked.shared))(asked.rows)

    def norms(
        self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any
    ) -> Float[Array, " batch"]:
        """Return the Euclidean norm of each sample's gradient over all parameters."""
        return self._column(Norm(), self._ask(params, batch, keys, **context))

    def tensor_norms(
        self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any
    ) -> PyTree:
        """Return the norm of each sample's gradient for each tensor, leaves `[batch]`."""
        asked = self._ask(params, batch, keys, **context)
        return jax.tree.unflatten(
            jax.tree.structure(params), self._column(Norm(per_tensor=True), asked)
        )

    def dot(
        self, direction: PyTree, params: PyTree, batch: PyTree, keys: Any = None, **context: Any
    ) -> Float[Array, " batch"]:
        """Return the dot product of each sample's gradient with a direction shaped like params.

        Raises:
            ProgramError: the direction is not shaped like params.
        """
        asked = self._ask(params, batch, keys, **context)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(direction)]
        if jax.tree.structure(direction) != jax.tree.structure(params) or shapes != [
            x.shape for x in asked.leaves
        ]:
            raise ProgramError(
                "the direction has another tree structure, or other shapes, than params",
                why="each tensor's gradient is multiplied by the direction's tensor of that name",
                fix="pass a pytree like params, such as another gradient or a step",
            )
        return self._column(Dot(direction), asked)

    def gram(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        other: PyTree = None,
        other_keys: Any = None,
        **context: Any,
    ) -> Float[Array, "batch other"]:
        """Return the dot products between the gradients of two batches, or within one."""
        mine = self._ask(params, batch, keys, **context)
        theirs = mine if other is None else self._ask(params, other, other_keys, **context)
        total = jnp.zeros((mine.problem.size, theirs.problem.size))
        for group in self._groups("gram", mine):
            partner = group
            if other is not None:
                wanted = [group.strategy * (i in group.tensors) for i in range(len(mine.leaves))]
                (partner,) = theirs.problem.groups(wanted, self.memory)

            def rows(_, ours, numbers, partner=partner):
                def columns(_, others, numbers):
                    products = [a.gram(b) for a, b in zip(ours, others, strict=True)]
                    return None, sum(products[1:], products[0]).T

                return None, theirs.visit(partner, columns, None)[1].T

            total += mine.visit(group, rows, None)[1]
        return total

    def sum(self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any) -> PyTree:
        """Return the sum of the gradients: one ordinary backward pass."""
        return jax.grad(lambda p: self.losses(p, batch, keys, **context).sum())(params)

    def abs_sum(self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any) -> PyTree:
        """Return for each weight the sum over samples of its |gradient|."""
        return self.reduce(Sum("magnitude"), params, batch, keys, **context)

    def square_sum(self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any) -> PyTree:
        """Return for each weight the sum over samples of its squared gradient."""
        return self.reduce(Sum("square"), params, batch, keys, **context)

    def max(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        of: str = "magnitude",
        **context: Any,
    ) -> PyTree:
        """Return for each weight the largest |gradient| (or gradient, `of="value"`)."""
        return self.reduce(Max(of), params, batch, keys, **context)

    def min(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        of: str = "magnitude",
        **context: Any,
    ) -> PyTree:
        """Return for each weight the smallest |gradient| (or gradient, `of="value"`)."""
        return self.reduce(Min(of), params, batch, keys, **context)

    def argmax(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        of: str = "magnitude",
        smallest: bool = False,
        **context: Any,
    ) -> PyTree:
        """Return for each weight the position of the sample with the largest |gradient|.

        With `of="value"` that of the largest gradient; with `smallest` that of the smallest.
        """
        _, positions = self.reduce(TopK(1, of, smallest), params, batch, keys, **context)
        return jax.tree.map(lambda x: x[0], positions)

    def top_k(
        self,
        k: int,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        of: str = "magnitude",
        smallest: bool = False,
        **context: Any,
    ) -> tuple[PyTree, PyTree]:
        """Return for each weight the `k` largest |gradient| and the samples they are of.

        Returns:
            Leaves `[k, *shape]` of values in falling order, and `int32[k, *shape]` of positions in
            the batch. Of equal values the earlier sample comes first; where the batch has fewer
            than `k` samples the rest is `-inf` and -1. NaN counts as infinite.
        """
        return self.reduce(TopK(k, of, smallest), params, batch, keys, **context)

    def at(
        self,
        tensor: str,
        index: tuple[int, ...],
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        **context: Any,
    ) -> Float[Array, " batch"]:
        """Return the gradient of every sample with respect to one weight.

        Raises:
            ProgramError: there is no such tensor, or no such weight in it.
        """
        asked = self._ask(params, batch, keys, **context)
        names = list(asked.problem.names)
        if tensor not in names:
            raise ProgramError(
                f"there is no tensor {tensor!r}",
                why="a weight is named by the path of its tensor and its index",
                fix=f"one of {', '.join(names)}",
            )
        shape = asked.leaves[names.index(tensor)].shape
        if len(index) != len(shape) or any(
            not -n <= i < n for i, n in zip(index, shape, strict=False)
        ):
            raise ProgramError(
                f"{tensor} has no weight {list(index)}",
                why=f"its shape is {list(shape)}",
                fix="one index for each axis",
            )
        unit = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in asked.leaves]
        unit[names.index(tensor)] = unit[names.index(tensor)].at[index].set(1)
        return self._column(Dot(unit), asked, only=names.index(tensor))

    def histogram(
        self,
        edges: Sequence[float],
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        **context: Any,
    ) -> PyTree:
        """Count |gradients| of all samples and weights of a tensor between edges.

        Returns:
            For each tensor `int32[edges + 1]`: below the first edge, between neighbours (the lower
            edge included), and from the last edge on, NaN included.
        """
        edges = tuple(float(edge) for edge in edges)
        return self.reduce(Histogram(edges), params, batch, keys, **context)

    def project(
        self,
        dimension: int,
        key: Key[Array, ""],
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        **context: Any,
    ) -> Float[Array, "batch dimension"]:
        """Project each sample's gradient on random signs, scaled to keep norms on average.

        The signs are a function of `key` and the number of the tensor, so that projections of
        several batches can be compared (Achlioptas, 2003).
        """
        asked = self._ask(params, batch, keys, **context)
        total = jnp.zeros((asked.problem.size, dimension))
        for group in self._groups("project", asked):

            def project(_, gradients, numbers, group=group):
                def along(number):
                    parts = []
                    for leaf, mine in zip(group.tensors, gradients, strict=True):
                        own = jax.random.fold_in(jax.random.fold_in(key, leaf), number)
                        parts.append(mine.dots(_signs(own, mine.form.shape, mine.form.wide)))
                    return sum(parts)

                return None, lax.map(along, jnp.arange(dimension, dtype=jnp.uint32)).T

            total += asked.visit(group, project, None)[1]
        return total / jnp.sqrt(jnp.asarray(dimension, total.dtype))

    def grads(self, params: PyTree, batch: PyTree, keys: Any = None, **context: Any) -> PyTree:
        """Return the gradients themselves, leaves `[batch, *shape]`."""
        asked = self._ask(params, batch, keys, **context)
        found: dict[int, Any] = {}
        for group in self._groups("grads", asked):
            _, rows = asked.visit(
                group,
                lambda _, gradients, numbers: (None, [g.materialised() for g in gradients]),
                None,
            )
            found.update(zip(group.tensors, rows, strict=True))
        return _tree(params, found)

    def reduce(
        self, reduction: Reduction, params: PyTree, batch: PyTree, keys: Any = None, **context: Any
    ) -> PyTree:
        """Return any of `replay.reductions`: a result for each tensor, or for each sample."""
        asked = self._ask(params, batch, keys, **context)
        if isinstance(reduction, Norm | Dot):
            return self._column(reduction, asked)
        found: dict[int, Any] = {}
        for group in self._groups(_name(reduction), asked):

            def step(states, gradients, numbers):
                pairs = zip(states, gradients, strict=True)
                return [reduction.step(state, mine, numbers) for state, mine in pairs], None

            forms = [tensor.form for tensor in group.tensors.values()]
            layouts = asked.layouts(group)
            pairs = list(zip(forms, layouts, strict=True))
            states = [reduction.init(layout, form.wide) for form, layout in pairs]
            states, _ = asked.visit(group, step, states)
            for number, pair, state in zip(group.tensors, pairs, states, strict=True):
                found[number] = reduction.final(*pair, state)
        answer = [found[i] for i in range(len(found))]
        return as_tree(jax.tree.structure(params), reduction, answer)

    def explain(
        self, params: PyTree, batch: PyTree, keys: Any = None, *, of: str = "", **context: Any
    ) -> str:
        """Tell for every tensor which way its gradients are had, and why.

        Args:
            params: the parameters.
            batch: the examples.
            keys: of the samples.
            of: of which question; a reduction as it prints, or `norms`, `gram`, `project`, `grads`.
            **context: as for the other methods.
        """
        asked = self._ask(params, batch, keys, **context)
        groups = self._groups(of, asked)
        factored = asked.problem.factored(self.memory)
        lines = []
        for number, name in enumerate(asked.problem.names):
            group = next(group for group in groups if number in group.tensors)
            tensor, known = group.tensors[number], factored.tensors[number]
            used = ", ".join(factored.meetings[i].operation for i in known.meetings)
            why = f"  ({tensor.reason})" if tensor.reason else ""
            lines.append(f"{name:<40} {tensor.form.way:<8} {group.strategy:<8} {used}{why}")
        if of and (seconds := strategy.recall(self._identity(of, asked))):
            taken = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items())
            lines.append(f"measured on this machine: {taken}")
        return "\n".join(lines)

    def tune(
        self,
        of: str | Reduction,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        **context: Any,
    ) -> dict[str, float]:
        """Time every strategy on this machine, and remember which is fastest.

        `auto` then chooses it, in this process and in later ones, for the same loss, shapes,
        question and machine; without, it takes factors.

        Args:
            of: a reduction, or `norms`, `gram`, `project` (on 16 directions) or `grads`.
            params: the parameters.
            batch: the examples.
            keys: of the samples.
            **context: as for the other methods.

        Returns:
            Seconds by strategy; those that do not fit in memory are left out.
        """
        calls = {}
        for name in STRATEGIES:
            fixed = PerSample(self._loss, strategy=name, memory=self.memory, batched=self._batched)
            ask: Callable[..., Any]
            if isinstance(of, str):
                ask = {
                    "norms": fixed.norms,
                    "gram": fixed.gram,
                    "grads": fixed.grads,
                    "project": lambda *a, f=fixed, **c: f.project(16, jax.random.key(0), *a, **c),
                }[of]
            else:
                ask = lambda *a, f=fixed, **c: f.reduce(of, *a, **c)  # noqa: E731
            ask = jax.jit(ask)
            try:
                jax.block_until_ready(ask(params, batch, keys, **context))
            except ProgramError:
                continue
            calls[name] = lambda ask=ask: ask(params, batch, keys, **context)
        seconds = strategy.measure(calls)
        asked = self._ask(params, batch, keys, **context)
        strategy.remember(self._identity(of if isinstance(of, str) else _name(of), asked), seconds)
        return seconds

    def stream(self, *questions: Reduction) -> "BatchStream":
        """Return running states of reductions over many batches.

        Example:
            >>> import jax.numpy as jnp
            >>> from replay import reductions
            >>> stream = per_sample(lambda w, x, key: w * x).stream(reductions.TopK(2))
            >>> for batch in (jnp.array([1.0, 5.0]), jnp.array([3.0, 2.0])):
            ...     stream.update(jnp.float32(1), batch)
            >>> values, occurrences = stream.results()[0]
            >>> values.tolist(), occurrences.tolist()
            ([5.0, 3.0], [1, 2])
        """
        return BatchStream(self, questions)

    def _column(self, column: Norm | Dot, asked: Asked, only: int | None = None) -> Any:
        found: dict[int, Any] = {}
        for group in self._groups(_name(column), asked, only):

            def look(_, gradients, numbers, group=group):
                pairs = zip(group.tensors, gradients, strict=True)
                return None, [column.column(mine, number) for number, mine in pairs]

            found.update(zip(group.tensors, asked.visit(group, look, None)[1], strict=True))
        return column.join([found[i] for i in sorted(found)])

    def _groups(self, question: str, asked: Asked, only: int | None = None) -> list[Group]:
        names, given = asked.problem.names, self.strategy
        if isinstance(given, str):
            chosen = [given] * len(names)
        else:
            for path in given:
                if path not in names:
                    raise ProgramError(
                        f"there is no tensor {path!r} to choose a strategy for",
                        why="a tensor is named by its path",
                        fix=f"one of {', '.join(names)}",
                    )
            chosen = [given.get(name, "auto") for name in names]
        if "auto" in chosen:
            seconds = strategy.recall(self._identity(question, asked))
            best = min(seconds, key=seconds.__getitem__) if seconds else "factored"
            if not seconds and asked.problem.factored(self.memory).sample_bytes > self.memory:
                best = "scan"
            chosen = [best if name == "auto" else name for name in chosen]
        if only is not None:
            chosen = [name if i == only else "" for i, name in enumerate(chosen)]
        return asked.problem.groups(chosen, self.memory)

    def _identity(self, question: str, asked: Asked) -> str:
        problem = asked.problem
        shapes = [problem.leaves, problem.rows, problem.shared]
        jaxpr = jax.make_jaxpr(problem.loss)(*map(list, shapes))
        return strategy.identity(question, str(jaxpr), problem.size, self.memory)

    def _scalar(self, params: PyTree, example: PyTree, key: Any) -> Any:
        result = self._loss(params, example, key)
        value = result[0] if isinstance(result, tuple) else result
        if jnp.shape(value) != ():
            raise ProgramError(
                f"the loss of one example has shape {list(jnp.shape(value))}",
                why="a per-sample loss is called with one example, without batch axis",
                fix="reduce it to a scalar, or pass batched=True for one that takes a batch",
            )
        return value

    def _ask(
        self, params: PyTree, batch: PyTree, keys: Any, *, model_state: PyTree = (), key: Any = None
    ) -> Asked:
        params = jax.tree.map(jnp.asarray, params)
        leaves, tree = jax.tree.flatten(params)
        for path, leaf in zip(paths(params), leaves, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ProgramError(
                    f"parameter {path!r} is {leaf.dtype}{list(leaf.shape)}, not floating point",
                    why="there is a gradient with respect to every parameter",
                    fix="keep integers in the closure of the loss, or in the examples",
                )
        size = _samples((batch, keys))
        if self._batched:
            rows = [jnp.arange(size, dtype=jnp.int32)]
            shared, shared_tree = jax.tree.flatten((model_state, batch, key, keys))

            def batch_loss(leaves, row, shared):
                context = jax.tree.unflatten(shared_tree, shared)
                result = self._loss(jax.tree.unflatten(tree, leaves), *context)
                losses = result[0] if isinstance(result, tuple) else result
                if jnp.shape(losses) != (size,):
                    raise ProgramError(
                        f"the batched loss returned shape {list(jnp.shape(losses))} for {size} "
                        "samples",
                        why="entry i is the loss of sample i, with the whole batch as context",
                        fix="return losses of shape [batch], or (losses, model_state)",
                    )
                return losses[row[0]]

            loss = batch_loss
        else:
            rows, row_tree = jax.tree.flatten((batch, keys))
            shared = []

            def sample_loss(leaves, row, shared):
                example = jax.tree.unflatten(row_tree, row)
                return self._scalar(jax.tree.unflatten(tree, leaves), *example)

            loss = sample_loss

        rows, shared = ([jnp.asarray(x) for x in part] for part in (rows, shared))
        problem = Problem(
            loss,
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
            paths(params),
            [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in rows],
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shared],
            size,
        )
        return Asked(problem, leaves, rows, shared)


class BatchStream:
    """Running reductions of per-sample gradients over batches, one after the other.

    Made by `PerSample.stream`. Executables are made for the shapes of the first batch, one for
    each reduction of each tensor, and again where shapes change.
    """

    def __init__(self, per_sample: PerSample, questions: Sequence[Reduction]):
        stream.check(questions)
        self._per_sample, self._questions = per_sample, tuple(questions)
        self._parts: dict[Any, list[tuple[list[Group], list[Callable], list[int]]]] = {}
        self._shared: dict[tuple[int, ...], stream.Stream] = {}
        self._step, self._occurrence = -1, 0
        self._tree: Any = None

    def update(
        self,
        params: PyTree,
        batch: PyTree,
        keys: Any = None,
        *,
        step: int | None = None,
        **context: Any,
    ) -> None:
        """Take a batch; its samples are the next occurrences.

        Args:
            params: the parameters at this step.
            batch: examples with a leading batch axis.
            keys: of the samples.
            step: its number; the next by default. Sums are folded in blocks of steps.
            **context: as for the other methods.

        Raises:
            ProgramError: the step is not after the last one.
        """
        step = self._step + 1 if step is None else step
        if step <= self._step:
            raise ProgramError(
                f"step {step} comes after step {self._step}",
                why="sums are folded in the order of the steps, so that they can be repeated",
                fix="pass steps in ascending order",
            )
        asked = self._per_sample._ask(params, batch, keys, **context)
        size, tree = asked.problem.size, jax.tree.structure(params)
        if self._occurrence + size >= 2**31:
            raise ProgramError(
                f"more than {2**31 - 1:,} samples",
                why="occurrences are counted in 32 bits",
                fix="begin another stream, and merge what the two have found",
            )
        self._step, self._tree = step, tree
        shapes = (tree, *((x.shape, str(x.dtype)) for x in (*asked.rows, *asked.shared)))
        if shapes not in self._parts:
            self._parts[shapes] = self._plan(asked)
        first = self._occurrence
        for groups, produce, chosen in self._parts[shapes]:
            parts = (
                (
                    group,
                    one(
                        asked.leaves,
                        asked.rows if b - a == size else [row[a:b] for row in asked.rows],
                        asked.shared,
                    ),
                    jnp.arange(first + a, first + b, dtype=jnp.int32),
                )
                for group, one in zip(groups, produce, strict=True)
                for a, b in chunks(size, group.at_once)
            )
            if tuple(chosen) not in self._shared:
                questions = [self._questions[i] for i in chosen]
                self._shared[tuple(chosen)] = stream.Stream(questions, len(asked.leaves))
            self._shared[tuple(chosen)].update(step, parts, asked.leaves)
        self._occurrence += size

    def results(self) -> tuple[Any, ...]:
        """Return the answer to each question so far: pytrees like params, or columns `[samples]`.

        A `TopK` is a pair of such pytrees, values and occurrences.
        """
        found: dict[int, Any] = {}
        for chosen, running in self._shared.items():
            found.update(zip(chosen, running.results(), strict=True))
        return tuple(
            as_tree(self._tree, question, found[i]) for i, question in enumerate(self._questions)
        )

    def _plan(self, asked: Asked) -> list[tuple[list[Group], list[Callable], list[int]]]:
        by_strategy: dict[tuple[str, ...], tuple[list[Group], list[int]]] = {}
        for i, question in enumerate(self._questions):
            groups = self._per_sample._groups(_name(question), asked)
            where = {number: group.strategy for group in groups for number in group.tensors}
            key = tuple(where[number] for number in sorted(where))
            by_strategy.setdefault(key, (groups, []))[1].append(i)
        return [
            (groups, [jax.jit(group.produce) for group in groups], chosen)
            for groups, chosen in by_strategy.values()
        ]


def _signs(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return random signs, each from one bit: `jax.random.rademacher` takes 32 for each."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.astype(dtype)).reshape(-1)[:size].reshape(shape)


def _name(question: Reduction) -> str:
    """Return under what name a question's strategies are remembered."""
    return {Norm: "norms", Dot: "dot"}.get(type(question), repr(question))


def as_tree(tree: Any, question: Reduction, answer: Any) -> Any:
    """Give an answer of a stream the form of the parameters."""
    if isinstance(question, Norm | Dot) and not isinstance(answer, list):
        return answer
    if isinstance(question, TopK):
        return tuple(jax.tree.unflatten(tree, part) for part in zip(*answer, strict=True))
    return jax.tree.unflatten(tree, answer)


def _samples(rows: PyTree) -> int:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(rows)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ProgramError(
            "the leaves of the batch do not share a leading axis: "
            f"{', '.join(str(list(shape)) for shape in shapes)}",
            why="entry i of every leaf, taken together, is sample i",
            fix="give every leaf, and keys, one row for each sample",
        )
    return sizes.pop()[0]


def _tree(params: PyTree, found: Mapping[int, Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(params), [found[i] for i in range(len(found))])


def per_sample(
    loss: Callable[..., Any],
    *,
    strategy: str | Mapping[str, str] = "auto",
    memory: int = MEMORY,
    batched: bool = False,
) -> PerSample:
    """Give the per-sample gradients of a loss, by reductions.

    Args:
        loss: `loss(params, example, key) -> scalar` or `(scalar, aux)`, of one sample; with
            `batched`, `loss(params, model_state, batch, key, sample_keys) -> losses[B]` or
            `(losses[B], model_state)`, as for `replay.Program`.
        strategy: `factored` (one backward pass, factors reduced by rule), `scan` (one sample after
            the other), `vmap` (micro-batches of `vmap(grad)`), a mapping from paths of tensors to
            these, or `auto`: what `tune` has found to be fastest, or else factors.
        memory: bytes that may be held of the samples' gradients, or of their factors, before they
            are reduced; the samples are taken in micro-batches that keep to it.
        batched: whether the loss takes a whole batch, for what couples samples (batch norm,
            contrastive losses): the gradient of each sample's loss then has the batch as context.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(params, example, key):
        ...     return (jnp.dot(params["w"], example["x"]) - example["y"]) ** 2
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.array([0.0, 5.0])}
        >>> per_sample(loss).norms(params, batch).tolist()
        [2.0, 6.0]
    """
    return PerSample(loss, strategy=strategy, memory=memory, batched=batched)
