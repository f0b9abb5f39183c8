"""What the roots of a plan come to along a replay."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay import grouped, tiles
from replay import plan as planning
from replay.cache import Cache, Cell
from replay.cells import Root
from replay.errors import QueryError
from replay.evidence import Evidence
from replay.frames import Observers
from replay.grads import reductions as grads
from replay.grads.reductions import BLOCK_STEPS
from replay.grads.stream import Stream, final, merge
from replay.local import Local
from replay.query.nodes import RAGGED, Node, Part, Reduce, Scan
from replay.reducing import (
    EARLY,
    Kind,
    blank_state,
    dtype_of,
    finished,
    inputs,
    kind_of,
    layouts,
    merger,
    ranked,
    stepper,
)
from replay.replaying import Replayer
from replay.values import Value, fused, joined, none_of, of_part, on_host, stacked

# Steps whose values are folded into a state by one call.
TOGETHER = 4
# Bytes of the sketches that are read together.
READ = 2**24


class Asked(NamedTuple):
    """A run that is asked.

    Attributes:
        replayer: re-executes its steps.
        observers: its archived programs.
        catalogue: what a planner knows of it.
        columns: name -> a number for each step.
        epochs: the epoch of each step.
        cache: where answers are kept; None for nowhere.
        identity: what decides the bits of the run.
        sources: what decides those of other samples, by name, as far as it is known.
        index: what is known of it without replaying; None where that is not to be used.
    """

    replayer: Replayer
    observers: Observers
    catalogue: planning.Catalogue
    columns: Callable[[str], np.ndarray]
    epochs: Callable[[np.ndarray], np.ndarray]
    cache: Cache | None
    identity: str
    sources: dict[str, str]
    index: Evidence | None = None


@functools.lru_cache(maxsize=4096)
def _bytes(kind: Kind, dtype: str, weights: int) -> int:
    """Return the bytes of the state of a reduction that keeps so many weights."""
    of = jnp.dtype(dtype)
    state = jax.eval_shape(lambda: kind.of(of).init((weights,), of))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


class Fold(Root):
    """The running state of one root that reduces steps."""

    node: Reduce

    def __init__(self, node: Reduce, asked: Asked):
        super().__init__(node)
        self._asked = asked
        self._keyed = node.by is not None and node.by.kind in ("epoch", "window")
        self._shapes, self._result = layouts(node)
        self._programs = [stepper(node, shape) for shape in self._shapes]
        self._starts, _ = fused(ranked(node))
        self._states: dict[int, list[Any]] = {}
        self._waiting: list[tuple[int, int, list[Any]]] = []
        # What is as large as the weights is read, and the state touched, once in a few steps.
        rows = {"position", "sample"} & set(node.child.dims) or node.how in EARLY
        self._together = 1 if rows else TOGETHER
        self._dtype: Any = None
        self._looked: list[Any] = []
        self.exact = kind_of(node).of(jnp.dtype(jnp.float32)).exact

    def weight_bytes(self, count: Callable[[str], int]) -> int:
        """Return the bytes that a running state takes for one weight.

        Args:
            count: dimension -> its entries.
        """
        kind, shape = kind_of(self.node), self._shapes[0]
        signature = self._asked.observers.signature
        dtypes = [jnp.dtype(signature.state[i].dtype) for i in signature.weights]
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        one, two = (_bytes(kind, str(dtype), n) for n in (1, 2))
        kept = math.prod(count(dim) for dim in shape.kept if dim != "weight")
        return (two - one) * kept * (kind.groups if shape.rows else 1)

    def done(self, now: bool) -> bool:
        """Whether no later step can change the answer."""
        if self.node.how not in EARLY or self._keyed:
            return False
        # Of several tensors, what one has found says nothing of the others.
        apart = self.node.by is not None or not set(RAGGED) & set(self.node.over)
        several = len(self._shapes) > 1 and apart
        closed = [leaf for key in self.keys() for part in self.found(key) for leaf in part]
        found = [*(jax.tree.leaves(self._states) if now else self._looked), *closed]
        if several or not found or max(x.size for x in found) > 1:
            return False
        if self.node.how == "first":
            return any(np.asarray(x) >= 0 for x in found)
        return any(map(np.asarray, found))

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer; of no steps at all, that of the blank state."""
        self.end()
        if self._plain:
            several = [self._read(self.found(key), notes["dtype"])
                       for key, notes in sorted(self._plain.items())]  # fmt: skip
        else:
            values, _, _ = inputs(self.node, empty())
            dtype = self._dtype_of(values)
            blank = [init(of_part(values, i)) for i, (init, *_) in enumerate(self._programs)]
            several = [self._read([jax.tree.leaves(state) for state in blank], dtype)]
        if not self._keyed:
            return several[0]
        assert self.node.by is not None
        answer = stacked(self.node.by.dim, several)
        return answer if self._plain else none_of(answer, self.node.by.dim)

    @property
    def cuts(self) -> bool:  # type: ignore[override]
        """Whether weights stay apart, and have the bits that they have without their neighbours."""
        return self._apart and tiles.cuts(self.node)

    @property
    def _apart(self) -> bool:
        return all("weight" in shape.kept for shape in self._shapes)

    def whole(
        self, part: int, plain: dict[str, Any], leaves: list[Any], indices: tuple[int, ...]
    ) -> list[Any]:
        """Cut what the whole of a tensor has come to down to chosen weights."""
        shape = self._shapes[part]
        blanks = jax.tree.leaves(blank_state(self.node, plain["dtype"]))
        lead = 1 if shape.rows else 0
        axis = lead + shape.kept.index("weight")
        own = [x.ndim - lead - blank.ndim == len(shape.kept)
               for x, blank in zip(leaves, blanks, strict=True)]  # fmt: skip
        return [np.take(x, indices, axis) if mine else x
                for x, mine in zip(leaves, own, strict=True)]  # fmt: skip

    def _take(self, local: Local) -> None:
        if "position" in self.node.dims and (local.ids(self.node) < 0).any():
            raise QueryError(
                f"position {int((local.ids(self.node) < 0).argmax())} holds no sample at step "
                f"{local.step}, and positions are kept apart while steps are reduced",
                why="the last batch of an epoch is padded, and padding is no value",
                fix="reduce positions as well, or group by sample; or choose steps of full batches",
            )
        values, valid, groups = inputs(self.node, local, self._starts)
        if self._dtype is None:
            self._dtype = self._dtype_of(values)
        key = _key(self.node, self._asked, local.step)
        if key not in self._states:
            self._states[key] = [
                init(of_part(values, i)) for i, (init, *_) in enumerate(self._programs)
            ]
            if self.node.how in EARLY:  # `done` looks at what is so small when the next is made
                small = all(x.size <= 1 for x in jax.tree.leaves(self._states))
                self._programs = [
                    (init, *stepper(self.node, shape, donate=not small)[1:])
                    for (init, *_), shape in zip(self._programs, self._shapes, strict=True)
                ]
        if self._together > 1:
            # Which steps go together is a matter of their numbers alone.
            if self._waiting and (key, local.step // self._together) != (
                self._waiting[0][0], self._waiting[0][1] // self._together
            ):  # fmt: skip
                self._flush()
            self._waiting.append((key, local.step, values))
            return
        states = self._states[key]
        if self.node.how in EARLY:
            self._looked = jax.tree.leaves(states)
        for i, (_, step, _) in enumerate(self._programs):
            arrays = of_part(values, i)
            states[i] = step(states[i], arrays, np.int32(local.step), valid, groups)

    def _flush(self) -> None:
        """Take the steps that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        states = self._states[waiting[0][0]]
        steps = np.asarray([step for _, step, _ in waiting], np.int32)
        for i, (_, _, many) in enumerate(self._programs):
            rows = [of_part(values, i) for _, _, values in waiting]
            states[i] = many(states[i], rows, steps)

    def _close(self) -> dict[int, Cell]:
        self._flush()
        found, self._states = self._states, {}
        plain = {"dtype": str(self._dtype)}
        return {
            key: Cell(plain, [jax.tree.leaves(state) for state in states])
            for key, states in found.items()
        }

    def _merge(self, part: int) -> Callable[[list[Any], list[Any]], list[Any]]:
        (dtype, *_) = {notes["dtype"] for notes in self._plain.values()}
        return merger(self.node, dtype)

    def _read(self, parts: list[list[Any]], dtype: str) -> Value:
        """Return what states come to; of sketches, which take more to be read, some at a time."""
        if self.node.how != "quantile" or not self._apart:
            return self._finished(parts, dtype)
        found = [self._sketched(i, [np.asarray(x) for x in part], dtype)
                 for i, part in enumerate(parts)]  # fmt: skip
        return Value(found[0].dims, [value.data[0] for value in found])

    def _sketched(self, part: int, leaves: list[Any], dtype: str) -> Value:
        shape = self._shapes[part]
        size = leaves[0].shape[(1 if shape.rows else 0) + shape.kept.index("weight")]
        most = max(1, READ * size // max(leaves[0].nbytes, 1))
        rows = [tuple(range(a, min(a + most, size))) for a in range(0, max(size, 1), most)]
        cut = [self.whole(part, {"dtype": dtype}, leaves, mine) for mine in rows]
        return joined("weight", [self._finished([mine], dtype) for mine in cut])

    def _finished(self, parts: list[list[Any]], dtype: str) -> Value:
        tree = jax.tree.structure(blank_state(self.node, dtype))
        states = [jax.tree.unflatten(tree, leaves) for leaves in parts]
        return finished(self.node, self._result, states, jnp.dtype(dtype), np)

    def _dtype_of(self, values: list[Value]) -> str:
        shapes = tuple((tuple(x.shape), str(x.dtype)) for x in of_part(values, 0))
        return str(dtype_of(self.node, shapes))


def keys_of(node: Node, asked: Asked, steps: np.ndarray) -> np.ndarray:
    """Return the epoch or window that each step belongs to; 0 where a root tells none apart."""
    if not isinstance(node, Reduce) or node.by is None or node.walked:
        return np.zeros(len(steps), np.int64)
    if node.by.kind == "window":
        return steps // node.by.size
    if node.by.kind == "epoch":
        return np.asarray(asked.epochs(steps), np.int64)
    return np.zeros(len(steps), np.int64)


def _key(node: Node, asked: Asked, step: int) -> int:
    return int(keys_of(node, asked, np.asarray([step]))[0])


class Sampled(Root):
    """The running state of a root over the gradients of samples, by rules on their factors."""

    node: Reduce
    wholes = True

    def __init__(self, node: Reduce, asked: Asked, rule: "Rule"):
        super().__init__(node)
        self._asked, self._rule = asked, rule
        self._keyed = node.by is not None
        tensor = asked.observers.tensor
        self._numbers = [tensor[part.path] for part in rule.scan.tensors]
        self._streams: dict[int, Stream] = {}
        self._key = 0
        self._samples: dict[int, int] = {}
        self.exact = rule.reduction.exact
        if self.exact:  # merged in any order, and a ranking that is young changes often
            self.span = 8 * BLOCK_STEPS

    def weight_bytes(self, count: Callable[[str], int]) -> int:
        """Return the bytes that a running state takes for one weight."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self._rule.reduction.init((1,), "float32")))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        self.end()
        if not self._plain:
            return Fold(self.node, self._asked).result(empty)
        values = [self._read(key) for key in self.keys()]
        if not self._keyed:
            return values[0]
        assert self.node.by is not None
        return stacked(self.node.by.dim, values)

    def _take(self, local: Local) -> None:
        frame = local.frames[self._rule.scan.run]
        key = _key(self.node, self._asked, local.step)
        if key != self._key:  # an epoch or window is over
            if self._key in self._streams:
                self._streams[self._key].flush()
            self._key = key
        if key not in self._streams:
            self._streams[key] = Stream(
                (self._rule.reduction,), len(self._asked.observers.tensor), self._numbers
            )
        # No rule on the factors of a run's program looks at the weights themselves.
        self._streams[key].update(local.step, frame.all_parts(), ())
        self._samples[key] = self._samples.get(key, 0) + int(frame.valid.sum())

    def _close(self) -> dict[int, Cell]:
        found = {}
        for key in self._samples:
            cells = self._streams[key].close()
            layouts = [list(cells[0, number][0]) for number in self._numbers]
            parts = [jax.tree.leaves(cells[0, number][1]) for number in self._numbers]
            found[key] = Cell({"samples": [self._samples[key]], "each": layouts}, parts)
        self._samples = {}
        return found

    def _merge(self, part: int) -> Callable[[list[Any], list[Any]], list[Any]]:
        return _merge_leaves(self._rule.reduction)

    def _read(self, key: int) -> Value:
        reduction, plain = self._rule.reduction, self._plain[key]
        forms = self._asked.observers.gradients.forms(self._asked.observers.way)
        chosen = []
        for number, layout, leaves in zip(
            self._numbers, plain["each"], self.found(key), strict=True
        ):
            state = jax.tree.unflatten(_structure(reduction), leaves)
            chosen.append(final(reduction, forms[number], tuple(layout))(state))
        if isinstance(reduction, grads.Histogram):
            return Value(("bin",), [np.sum([np.asarray(x, np.int64) for x in chosen], axis=0)])
        size = self._asked.observers.signature.batch_size
        data, fields = [], {"step": [], "number": []}
        for part, found in zip(self._rule.scan.tensors, chosen, strict=True):
            if isinstance(reduction, grads.TopK):
                values, numbers = (_chosen(part, np.asarray(x), 1) for x in found)
                data.append(values)
                fields["step"].append(np.where(numbers < 0, -1, numbers // size))
                fields["number"].append(np.where(numbers < 0, -1, numbers % size))
            else:
                data.append(_chosen(part, self._after(np.asarray(found), key), 0))
        ranked = isinstance(reduction, grads.TopK)
        return Value(("rank", "weight") if ranked else ("weight",), data, fields if ranked else {})

    def _after(self, x: np.ndarray, key: int) -> np.ndarray:
        if self.node.how == "mean":
            return x / x.dtype.type(self._plain[key]["samples"][0])
        return np.sqrt(x) if self.node.how == "norm" else x


@functools.cache
def _structure(reduction: Any) -> Any:
    return jax.tree.structure(jax.eval_shape(lambda: reduction.init((1,), "float32")))


@functools.cache
def _merge_leaves(reduction: Any) -> Callable[[list[Any], list[Any]], list[Any]]:
    tree = _structure(reduction)

    def join(first, second):
        states = [jax.tree.unflatten(tree, leaves) for leaves in (first, second)]
        return jax.tree.leaves(merge(reduction)(*states))

    return jax.jit(join)


def _chosen(part: Part, x: np.ndarray, lead: int) -> np.ndarray:
    flat = x.reshape(*x.shape[:lead], -1)
    return flat if part.indices is None else flat[..., list(part.indices)]


class Rule(NamedTuple):
    """A reduction of per-sample gradients that factors answer."""

    reduction: Any
    scan: Scan


def rule_of(node: Node) -> Rule | None:
    """Return how a root is answered from factors; None where nothing fits."""
    if not isinstance(node, Reduce) or (node.by and node.by.kind not in ("epoch", "window")):
        return None
    found = planning.of_samples(node.child)
    if found is None or found[1].source or found[1].quantity != "sample_grads":
        return None
    of, scan = found
    if set(node.over) == {"step", "position", "weight"} and node.how == "hist":
        whole = all(part.indices is None for part in scan.tensors)
        if of == "magnitude" and whole:
            return Rule(grads.Histogram(node.options["edges"]), scan)
        return None
    if set(node.over) != {"step", "position"}:
        return None
    plain = of in ("value", "magnitude")
    reduction = {
        "sum": lambda: grads.Sum(of),
        "mean": lambda: grads.Sum(of),
        "norm": lambda: grads.Sum("square") if plain else None,
        "max": lambda: grads.Max(of) if plain else None,
        "min": lambda: grads.Min(of) if plain else None,
        "top_k": lambda: (
            grads.TopK(node.options["k"], of, node.options["smallest"]) if plain else None
        ),
    }.get(node.how, lambda: None)()
    return None if reduction is None else Rule(reduction, scan)


class Labelled(grouped.Sums):
    """The running sums of a root over the gradients of samples, by labels."""

    node: Reduce
    wholes = True

    def __init__(self, node: Reduce, asked: Asked):
        self._asked, observers = asked, asked.observers
        of, scan = planning.of_samples(node.child) or ("", None)
        assert scan is not None
        numbers = [observers.tensor[part.path] for part in scan.tensors]
        super().__init__(node, of, scan, numbers, lambda: observers.gradients.forms(observers.way))

    def weight_bytes(self, count: Callable[[str], int]) -> int:
        """Return the bytes that a running state takes for one weight."""
        return 4 * self._count

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        totals = self.totals()
        if totals is None:
            return Fold(self.node, self._asked).result(empty)
        return Value(("group", "weight"), totals)


class Collected(Root):
    """The values of a root at every step that is asked about."""

    def __init__(self, node: Node):
        super().__init__(node)
        self._values: list[Value] = []
        self._found: list[Value] = []

    def push(self, number: int, key: int, cell: Cell) -> None:
        """Take the values of a later cell."""
        names = cell.plain["fields"]
        data = [arrays[0] for arrays in cell.parts]
        fields = {name: [x[1 + i] for x in cell.parts] for i, name in enumerate(names)}
        self._found.append(Value(tuple(cell.plain["dims"]), data, fields))

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        self.end()
        return self._found

    def absorb(self, state: Any) -> None:
        """Take what later steps have come to elsewhere."""
        self._found += state

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return all values, with the dimension that was walked."""
        self.end()
        if self._found:
            return joined(self.node.walked, self._found)
        blank = on_host(empty().value(self.node))
        return none_of(stacked(self.node.walked, [blank]), self.node.walked)

    @property
    def cuts(self) -> bool:  # type: ignore[override]
        """Whether there are weights, with the bits that they have without their neighbours."""
        return "weight" in self.node.dims and tiles.cuts(self.node)

    def whole(
        self, part: int, plain: dict[str, Any], leaves: list[Any], indices: tuple[int, ...]
    ) -> list[Any]:
        """Cut what the whole of a tensor has come to down to chosen weights."""
        return [np.take(x, indices, -1) for x in leaves]

    def _take(self, local: Any) -> None:
        """Keep the value of a step; what is padding is not a number."""
        value = local.value(self.node)
        if "position" in value.dims and not (valid := local.valid(self.node)).all():
            value = _without_padding(on_host(value), valid)
        self._values.append(value)
        if len(self._values) > 1:  # wait for all but the last
            self._values[-2] = on_host(self._values[-2])

    def _close(self) -> dict[int, Cell]:
        values, self._values = [on_host(value) for value in self._values], []
        whole = stacked(self.node.walked, values)
        parts = [
            [x, *(arrays[i] for arrays in whole.fields.values())] for i, x in enumerate(whole.data)
        ]
        return {0: Cell({"dims": list(whole.dims), "fields": list(whole.fields)}, parts)}


def _without_padding(value: Value, valid: np.ndarray) -> Value:
    axis = value.dims.index("position")

    def blank(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(valid.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, np.nan)

    return value._replace(data=[blank(x) for x in value.data])
