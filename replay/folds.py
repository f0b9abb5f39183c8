"""What the roots of a plan come to along a replay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from replay import grouped
from replay import plan as planning
from replay.frames import Observers
from replay.grads import reductions as grads
from replay.grads.reductions import BLOCK_STEPS, Blocks
from replay.grads.stream import Stream
from replay.local import Local
from replay.query.nodes import RAGGED, Node, Part, Reduce, Scan
from replay.reducing import dtype_of, finished, inputs, layouts, merger, ranked, stepper
from replay.replaying import Replayer
from replay.values import Value, fused, none_of, of_part, on_host, stacked


class Asked(NamedTuple):
    """A run that is asked.

    Attributes:
        replayer: re-executes its steps.
        observers: its archived programs.
        catalogue: what a planner knows of it.
        columns: name -> a number for each step.
        epochs: the epoch of each step.
    """

    replayer: Replayer
    observers: Observers
    catalogue: planning.Catalogue
    columns: Callable[[str], np.ndarray]
    epochs: Callable[[np.ndarray], np.ndarray]


class Fold:
    """The running state of one root that reduces steps.

    Attributes:
        node: the reduction.
    """

    def __init__(self, node: Reduce, asked: Asked):
        self.node, self._asked = node, asked
        self._keyed = node.by is not None and node.by.kind in ("epoch", "window")
        self._shapes, self._result = layouts(node)
        self._programs = [stepper(node, shape) for shape in self._shapes]
        self._starts, _ = fused(ranked(node))
        self._states: dict[tuple[int, int], Any] = {}
        self._blocks: dict[tuple[int, int], Blocks] = {}
        self._block: int | None = None
        self._dtype: Any = None

    def take(self, local: Local) -> None:
        """Take the values of a step."""
        values, valid, groups = inputs(self.node, local, self._starts)
        if self._dtype is None:
            shapes = tuple((tuple(x.shape), str(x.dtype)) for x in of_part(values, 0))
            self._dtype = dtype_of(self.node, shapes)
        block = local.step // BLOCK_STEPS
        if block != self._block:
            self.close()
            self._block = block
        for i, (init, step) in enumerate(self._programs):
            arrays, key = of_part(values, i), (_key(self.node, self._asked, local.step), i)
            if key not in self._states:
                self._states[key] = init(arrays)
            self._states[key] = step(self._states[key], arrays, np.int32(local.step), valid, groups)

    def close(self) -> None:
        """End the present block."""
        for key, state in self._states.items():
            if key not in self._blocks:
                self._blocks[key] = Blocks(merger(self.node, self._dtype))
            assert self._block is not None
            self._blocks[key].close(self._block, state)
        self._states = {}

    def done(self) -> bool:
        """Whether no later step can change the answer."""
        if self.node.how not in ("first", "any") or self._keyed:
            return False
        found = [np.asarray(x) for x in (*self._states.values(), *self._results().values())]
        several = len(self._shapes) > 1 and not set(RAGGED) & set(self.node.over)
        if several or not found or max(x.size for x in found) > 1:
            return False
        return any(bool(x >= 0) if self.node.how == "first" else bool(x) for x in found)

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        self.close()
        nodes = {key: blocks.nodes for key, blocks in self._blocks.items()}
        return self._dtype, jax.tree.map(np.asarray, nodes)

    def absorb(self, state: Any) -> None:
        """Take what a later stretch of steps has come to elsewhere."""
        dtype, nodes = state
        self._dtype = self._dtype if dtype is None else dtype
        for key, found in nodes.items():
            if key not in self._blocks:
                self._blocks[key] = Blocks(merger(self.node, self._dtype))
            for node in found:
                self._blocks[key].push(*node)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer; of no steps at all, that of the blank state."""
        self.close()
        found = self._results()
        keys = sorted({key for key, _ in found})
        if not found:
            local = empty()
            values, _, _ = inputs(self.node, local)
            shapes = tuple((tuple(x.shape), str(x.dtype)) for x in of_part(values, 0))
            self._dtype = dtype_of(self.node, shapes)
            for i, shape in enumerate(self._shapes):
                found[0, i] = stepper(self.node, shape)[0](of_part(values, i))
            keys = [0]
        several = [
            finished(
                self.node, self._result, [found[key, i] for i in range(len(self._shapes))],
                self._dtype, np,
            )
            for key in keys
        ]  # fmt: skip
        if not self._keyed:
            return several[0]
        assert self.node.by is not None
        answer = stacked(self.node.by.dim, several)
        return answer if self.keys() else none_of(answer, self.node.by.dim)

    def keys(self) -> list[int]:
        """Return the epochs or windows that there are."""
        return sorted({key for key, _ in self._results()})

    def _results(self) -> dict[tuple[int, int], Any]:
        return {key: blocks.result() for key, blocks in self._blocks.items()}


def _key(node: Reduce, asked: Asked, step: int) -> int:
    """Return the epoch or window that a step belongs to; 0 where a root tells none apart."""
    if node.by is None or node.by.kind not in ("epoch", "window"):
        return 0
    if node.by.kind == "window":
        return step // node.by.size
    return int(asked.epochs(np.asarray([step]))[0])


class Sampled:
    """The running state of a root over the gradients of samples, by rules on their factors."""

    def __init__(self, node: Reduce, asked: Asked, rule: "Rule"):
        self.node, self._asked, self._rule = node, asked, rule
        self._keyed = node.by is not None
        self._streams: dict[int, Stream] = {}
        self._samples: dict[int, int] = {}
        tensor = asked.observers.tensor
        self._numbers = [tensor[part.path] for part in rule.scan.tensors]

    def take(self, local: Local) -> None:
        """Take the samples of a step."""
        frame = local.frames[self._rule.scan.run]
        key = _key(self.node, self._asked, local.step)
        if key not in self._streams:
            self._streams[key] = Stream(
                (self._rule.reduction,), len(self._asked.observers.tensor), self._numbers
            )
        leaves = [frame.before[i] for i in self._asked.observers.signature.weights]
        self._streams[key].update(local.step, frame.all_parts(), leaves)
        self._samples[key] = self._samples.get(key, 0) + int(frame.valid.sum())

    def done(self) -> bool:
        """No step can be the last."""
        return False

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        return {key: stream.state() for key, stream in self._streams.items()}, self._samples

    def absorb(self, state: Any) -> None:
        """Take what a later stretch of steps has come to elsewhere."""
        streams, samples = state
        for key, cells in streams.items():
            if key not in self._streams:
                self._streams[key] = Stream(
                    (self._rule.reduction,), len(self._asked.observers.tensor), self._numbers
                )
            self._streams[key].absorb(cells)
            self._samples[key] = self._samples.get(key, 0) + samples[key]

    def keys(self) -> list[int]:
        """Return the epochs or windows that there are."""
        return sorted(self._streams)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        if not self._streams:
            return Fold(self.node, self._asked).result(empty)
        values = [self._read(key) for key in self.keys()]
        if not self._keyed:
            return values[0]
        assert self.node.by is not None
        return stacked(self.node.by.dim, values)

    def _read(self, key: int) -> Value:
        (answer,) = self._streams[key].results()
        chosen = [answer[number] for number in self._numbers]
        if self._rule.reduction.__class__ is grads.Histogram:
            return Value(("bin",), [np.sum([np.asarray(x, np.int64) for x in chosen], axis=0)])
        size = self._asked.observers.signature.batch_size
        data, fields = [], {"step": [], "number": []}
        for part, found in zip(self._rule.scan.tensors, chosen, strict=True):
            if isinstance(self._rule.reduction, grads.TopK):
                values, numbers = (self._flat(part, np.asarray(x), 1) for x in found)
                data.append(values)
                fields["step"].append(np.where(numbers < 0, -1, numbers // size))
                fields["number"].append(np.where(numbers < 0, -1, numbers % size))
            else:
                data.append(self._flat(part, self._after(np.asarray(found), key), 0))
        ranked = isinstance(self._rule.reduction, grads.TopK)
        return Value(("rank", "weight") if ranked else ("weight",), data, fields if ranked else {})

    def _after(self, x: np.ndarray, key: int) -> np.ndarray:
        if self.node.how == "mean":
            return x / x.dtype.type(self._samples[key])
        return np.sqrt(x) if self.node.how == "norm" else x

    @staticmethod
    def _flat(part: Part, x: np.ndarray, lead: int) -> np.ndarray:
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

    def __init__(self, node: Reduce, asked: Asked):
        self._asked = asked
        of, scan = planning.of_samples(node.child) or ("", None)
        assert scan is not None
        super().__init__(node, of, scan, asked.observers.tensor)

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return the answer."""
        totals = self.totals()
        if totals is None:
            return Fold(self.node, self._asked).result(empty)
        return Value(("group", "weight"), totals)


class Collected:
    """The values of a root at every step that is asked about."""

    def __init__(self, node: Node, asked: Asked):
        self.node = node
        self._values: list[tuple[int, Value]] = []

    def take(self, local: Local) -> None:
        """Keep the value of a step; what is padding is not a number."""
        value = local.value(self.node)
        if "position" in value.dims and not (valid := local.valid(self.node)).all():
            value = _without_padding(on_host(value), valid)
        self._values.append((local.step, value))
        if len(self._values) > 1:  # wait for all but the last
            step, value = self._values[-2]
            self._values[-2] = (step, on_host(value))

    def done(self) -> bool:
        """No step can be the last."""
        return False

    def state(self) -> Any:
        """Return what another process can `absorb`."""
        return [(step, on_host(value)) for step, value in self._values]

    def absorb(self, state: Any) -> None:
        """Take what later steps have come to elsewhere."""
        self._values += state

    def keys(self) -> list[int]:
        """Return the steps."""
        return [step for step, _ in self._values]

    def result(self, empty: Callable[[], Any]) -> Value:
        """Return all values, with the dimension that was walked."""
        if self._values:
            return stacked(self.node.walked, [on_host(value) for _, value in self._values])
        blank = on_host(empty().value(self.node))
        return none_of(stacked(self.node.walked, [blank]), self.node.walked)


def _without_padding(value: Value, valid: np.ndarray) -> Value:
    axis = value.dims.index("position")

    def blank(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(valid.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, np.nan)

    return value._replace(data=[blank(x) for x in value.data])
