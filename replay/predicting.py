"""What a replay takes in seconds: which executables it calls, how often, on how many elements.

A question is a list of loads, told from its plan alone. What a load costs is linear, by its kind
(`replay.prices`), and each executable that is new to this process is compiled once. What questions
really took refines that: for questions of the same form, and for the steps of the run. Known to be
imperfect: other work on the machine is not foreseen, and what was compiled otherwise than by a
question is taken for new.
"""

import math
import threading
import time
from collections.abc import Container, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from replay import grouped, tiles
from replay import plan as planning
from replay.folds import TOGETHER, Asked, rule_of
from replay.frames import FEW_WEIGHTS
from replay.grads.reductions import BLOCK_STEPS
from replay.log import Log
from replay.prices import RANKS, Price, of_program, prices
from replay.query import states
from replay.query.nodes import RAGGED, WALKED, Among, Map, Node, Part, Pick, Reduce, Scan
from replay.reducing import EARLY, kind_of, layouts, ranked
from replay.values import fused, without_walk

# What is not in executables, in calls of JAX outside of a function: of a replay, of each leaf of a
# stored state, of a replayed step, of each root at a step, and of each of its tensors.
OF_A_REPLAY, OF_A_LEAF, OF_A_STEP, OF_A_ROOT, OF_A_TENSOR = 150, 5, 8, 5, 1
# What is measured again and again finds everything in the caches of the processor; between the
# other work of a question it takes that much longer.
IN_PASSING = 1.65
# To compile what folds one step, of what it takes to compile that for several.
ONE_STEP = 0.5
# Executables that every replay needs: fingerprints, copies, inputs.
OF_EVERY_REPLAY = 8


class Load(NamedTuple):
    """An executable that a replay calls.

    Attributes:
        key: what tells it from others of this process.
        kind: of its price, or the name of an archived program.
        calls: how many there are.
        size: elements that a call touches.
        repeats: how often a call runs through the program, for a loop over samples.
        compiled: how many times it is compiled, relative to its price: for each form of its inputs.
    """

    key: Hashable
    kind: str
    calls: float
    size: float
    repeats: float = 0.0
    compiled: float = 1.0


class Loads:
    """What one replay of a run calls.

    Args:
        asked: the run.

    Attributes:
        found: by key.
    """

    def __init__(self, asked: Asked):
        self._asked, self._log = asked, asked.observers.log
        self._batch = asked.catalogue.batch
        self._leaves = [tuple(leaf.shape) for leaf in self._log.header.signature.grads]
        self._once: set[Hashable] = set()
        self.found: dict[Hashable, Load] = {}

    def add(
        self, key: Hashable, kind: str, calls: float, size: float = 0.0, compiled: float = 1.0
    ) -> None:
        """Add calls of an executable."""
        known = self.found.get(key)
        before = known.calls if known else 0.0
        self.found[key] = Load(key, kind, before + calls, size, compiled=compiled)

    def replay(self, spans: Sequence[planning.Span], roots: Sequence[Node]) -> list[Load]:
        """Return the loads of some replayed steps at which roots are looked at."""
        steps = sum(span.steps for span in spans)
        leaves = self._log.header.signature.state
        state = sum(math.prod(leaf.shape) for leaf in leaves)
        if steps:
            self._program("step", steps)
            self.add("step", "host", OF_A_STEP * steps)
        self.add("stored", "stored", len(spans), state, OF_EVERY_REPLAY)
        self.add("leaves", "host", len(spans) * OF_A_LEAF * len(leaves) + OF_A_REPLAY)
        for root in roots:
            if planning.runs_of(root)[0] == self._asked.catalogue.name:
                _Walk(self, root).root()
                continue
            for scan in root.scans():  # the rest is counted with the other run
                if scan.run == self._asked.catalogue.name:
                    self.quantity(scan, len(planning.earlier(planning.below(root))))
        return list(self.found.values())

    def shared(self, key: Hashable, looked: int) -> bool:
        """Whether nobody has counted yet what all roots of a replay share."""
        if key in self._once:
            return False
        self._once.add(key)
        return bool(looked)

    def _program(self, name: str, calls: float, repeats: float = 0.0) -> None:
        names = self._log.header.programs
        name = "block" if name == "step" and "step" not in names else name
        if name in names:
            key = (str(names[name].get("sha256")), name)
            before = self.found[key].calls if key in self.found else 0.0
            self.found[key] = Load(key, name, before + calls, 0.0, repeats)

    # ---- what roots share

    def quantity(self, scan: Scan, looked: int) -> None:
        """Add what it takes to have a quantity at some steps or states."""
        if scan.source:
            self._elsewhere(scan, looked)
            return
        if scan.quantity == "activations" and self.shared("activations", looked):
            self._program("activations", looked)
        if scan.quantity in ("carried_updates", "residual_updates", "condition", "sample_updates"):
            self._deltas(looked)
        if scan.quantity in ("sample_grads", "sample_updates", "condition"):
            self.parts(looked)
        for part in scan.tensors:
            self._tensor(scan, part, looked)

    def parts(self, looked: int) -> None:
        """Add the programs that give the gradients of samples."""
        if not self.shared("parts", looked):
            return
        ways = set(self._asked.catalogue.ways.values())
        if "factored" in ways:
            self._program("factors", looked)
        if "scan" in ways:
            whole = sum(map(math.prod, self._leaves))
            calls = looked * math.ceil(self._batch / 8)
            self._program("sample_gradient", calls, repeats=min(8, self._batch))
            self.add("scanned", "copied", calls, whole * min(8, self._batch))

    def _deltas(self, looked: int) -> None:
        if not self.shared("deltas", looked):
            return
        self._program("gradient", looked)
        self._program("update", 2 * looked)
        for shape in self._leaves:
            self.add(("blank", shape), "eager", looked, math.prod(shape))
            self.add(("difference", shape), "element", 2 * looked, math.prod(shape))

    def share(self, part: Part, looked: int) -> None:
        """Add (Δ(g) - Δ(0)) / g of a tensor."""
        if self.shared(("share", part.path), looked):
            self.add(("share", part.shape), "element", looked, 2 * math.prod(part.shape))

    def _tensor(self, scan: Scan, part: Part, looked: int) -> None:
        if not self.shared((scan.quantity, part), looked):
            return
        whole, chosen = math.prod(part.shape), part.indices
        if scan.quantity in ("residual_updates", "sample_updates", "condition"):
            self.share(part, looked)
        if scan.quantity in ("residual_updates", "condition"):
            self.add((scan.quantity, part.shape), "element", looked, 2 * whole)
        if scan.quantity == "condition":
            self.add(("weighted", part.shape), "copied", looked, self._batch * whole)
        if scan.quantity in ("sample_grads", "sample_updates"):
            few = chosen is not None and len(chosen) <= FEW_WEIGHTS
            size = self._batch * (len(chosen) if few and chosen else 1) * whole
            self.add(("materialised", part.shape, few and chosen), "copied", looked, size)
        if scan.quantity == "sample_updates":
            self.add(("attributed", part.shape), "copied", looked, self._batch * part.size)
        if chosen is not None:
            self.add(("choose", part.shape, chosen), "element", looked, len(chosen))

    def _elsewhere(self, scan: Scan, looked: int) -> None:
        if not self.shared((scan.quantity, scan.source, scan.name, scan.tensors), looked):
            return
        chunks = looked * math.ceil(scan.samples / self._batch)
        if scan.quantity == "sample_losses":
            self._program("losses", chunks)
        else:
            inner = Loads(self._asked)
            inner.quantity(_here(scan), chunks)
            for load in inner.found.values():
                before = self.found[load.key].calls if load.key in self.found else 0.0
                self.found[load.key] = load._replace(calls=before + load.calls)
        self.add("elsewhere", "eager", 3 * chunks, 0)


def _here(scan: Scan) -> Scan:
    return Scan(scan.run, scan.quantity, scan.where, scan.tensors, scan.name)


class _Walk:
    """What one root evaluates at the steps that it looks at."""

    def __init__(self, loads: Loads, root: Node):
        self._loads, self._root = loads, root
        self._steps = planning.below(root).steps
        self._looked = len(planning.earlier(planning.below(root)))
        self._batch = loads._batch
        self._known: set[Node] = set()

    def root(self) -> None:
        """Add all of it."""
        root, loads = self._root, self._loads
        if not self._looked:
            return
        loads.add("root", "host", OF_A_ROOT * self._looked)
        loads.add("tensors", "host", OF_A_TENSOR * self._looked * len(planning.tensors_of(root)))
        blocks = len(np.unique(self._steps // BLOCK_STEPS))
        if isinstance(root, Reduce) and not root.walked:
            if grouped.fits(planning.of_samples(root.child), root):
                self._labelled(root)
            elif rule_of(root) is not None:
                self._sampled(root, blocks)
            else:
                self._folded(root, blocks)
            return
        self._value(root)
        for shape, part in self._layout(root):
            loads.add(("host", shape), "host", self._looked, self._size(root, part))

    # ---- roots

    def _folded(self, root: Reduce, blocks: int) -> None:
        starts, formula = fused(ranked(root))
        for start in starts:
            self._value(start)
        rows = {"position", "sample"} & set(root.child.dims) or root.how in EARLY
        together = 1 if rows else TOGETHER
        calls = math.ceil(self._looked / together)
        kind = kind_of(root)
        for shape, (layout, part) in self._shapes(root):
            key = ("fold", kind, formula, layout, shape)
            load = self._reduction(root, part, calls, together)
            self._loads.add(key, *load, compiled=self._forms(together))
            self._loads.add(("init", *key[1:]), "element", blocks, 0)
            if blocks > 1:
                self._loads.add(("merge", kind, shape), "eager", blocks, self._size(root, part))
        self._loads.add(("result", kind), "eager", 4, 0)

    def _forms(self, together: int) -> float:
        """Return how many executables fold steps together: one for each number of them."""
        if together == 1:
            return ONE_STEP
        return float(len(np.unique(np.unique(self._steps // together, return_counts=True)[1])))

    def _sampled(self, root: Reduce, blocks: int) -> None:
        rule = rule_of(root)
        assert rule is not None
        self._loads.parts(self._looked)
        reduction, name = rule.reduction, type(rule.reduction).__name__
        for part in rule.scan.tensors:
            factored = self._loads._asked.catalogue.ways.get(part.path) == "factored"
            whole, kind = self._batch * math.prod(part.shape), "copied"
            if name == "Sum" and factored:
                whole, kind = 2 * whole, "product"
            elif name == "Histogram":
                kind = "hist within"
            elif name == "TopK":
                whole *= reduction.k / RANKS
                kind = "ranked" if reduction.plain else "inserted"
            key = ("sampled", reduction, part.shape, factored)
            self._loads.add(key, kind, self._looked, whole)
            self._loads.add(("sampled init", *key[1:]), "element", blocks, 0)
            self._loads.add(("sampled final", *key[1:]), "eager", 1, math.prod(part.shape))
        if blocks > 1:
            self._loads.add(("sampled merge", reduction), "eager", blocks, 0)

    def _labelled(self, root: Reduce) -> None:
        found = planning.of_samples(root.child)
        assert found is not None and root.by is not None
        self._loads.parts(self._looked)
        for part in found[1].tensors:
            size = 2 * self._batch * math.prod(part.shape)
            key = ("labelled", found[0], part.shape, root.by.count, self._batch)
            self._loads.add(key, "product", self._looked, size)
            self._loads.add(("labelled join", part.shape), "eager", self._looked / 8, 0)

    # ---- values

    def _value(self, node: Node) -> None:
        if node in self._known or not node.walked:
            return
        self._known.add(node)
        if isinstance(node, Scan):
            mine = node.run == self._loads._asked.catalogue.name
            if mine and node.quantity not in planning.LOGGED:
                self._loads.quantity(node, self._looked)
        elif isinstance(node, Reduce):
            self._reduced(node)
        elif isinstance(node, Map):
            starts, formula = fused(node)
            for start in starts:
                self._value(start)
            for shape, part in self._layout(node):
                key = ("map", formula, shape)
                self._loads.add(key, "element", self._looked, self._size(node, part))
        else:
            for child in node.children:
                self._value(child)
            if isinstance(node, Among | Pick):
                for shape, part in self._layout(node):
                    key = (type(node).__name__, shape)
                    self._loads.add(key, "eager", self._looked, 2 * self._size(node, part))

    def _reduced(self, node: Reduce) -> None:
        """Add a reduction within a step."""
        found = planning.of_samples(node.child)
        if found is not None and self._from_factors(node, *found):
            return
        starts, formula = fused(ranked(node))
        for start in starts:
            self._value(start)
        kind = kind_of(node)
        exact = node.how == "quantile"
        for shape, (layout, part) in self._shapes(node):
            key = ("once", kind, formula, layout, shape)
            if exact:
                size = self._size(node.child, part)
                several = min(len(node.options["q"]), states.SELECTED)
                if node.by is not None and node.by.kind in ("labels", "sample"):
                    several *= min(self._batch, node.by.count)
                self._loads.add(key, "selected", self._looked, several * size)
                self._loads.add(("arranged", formula, shape), "element", self._looked, size)
            else:
                load = self._reduction(node, part, self._looked, 1)
                self._loads.add(key, *load, compiled=ONE_STEP)
        shapes = tuple(shape for shape, _ in self._shapes(node))
        self._loads.add(("read", kind, shapes), "element", self._looked, 0)

    def _from_factors(self, node: Reduce, of: str, scan: Scan) -> bool:
        """Add norms of samples, and sums of shares over them, which are not multiplied out."""
        if scan.source:
            return False
        whole = all(part.indices is None for part in scan.tensors)
        squares = (node.how, of) in (("norm", "value"), ("norm", "magnitude"), ("sum", "square"))
        if scan.quantity == "sample_grads" and node.over == ("weight",) and squares and whole:
            kind = "norms"
        elif (
            scan.quantity == "sample_updates" and node.how == "sum" and of != "square"
            and node.over == ("position",) and (not node.by or node.by.kind == "labels")
        ):  # fmt: skip
            kind = "shares"
            self._loads._deltas(self._looked)
        else:
            return False
        self._loads.parts(self._looked)
        rows = node.by.count if node.by else 1
        for part in scan.tensors:
            size = math.prod(part.shape)
            if kind == "norms":
                inner = self._batch * sum(part.shape or (1,))
                self._loads.add(("norms", part.shape), "element", self._looked, inner)
                self._loads.add("added", "eager", self._looked, self._batch)
                continue
            self._loads.share(part, self._looked)
            work = 2.0 * self._batch * size * rows
            self._loads.add(("shares", of, part.shape, rows), "product", self._looked, work, 2)
            self._loads.add(("times", part), "element", self._looked, 2 * size * rows)
            self._loads.add("added", "eager", self._looked, rows * size)
        return True

    # ---- sizes

    def _reduction(
        self, node: Reduce, part: Part | None, calls: float, steps: int
    ) -> tuple[str, float, float]:
        """Return kind, calls and size of a reduction of one tensor."""
        size = float(self._size(node.child, part))
        if node.by is not None and node.by.kind in ("labels", "sample"):
            return "rows", calls, 2 * size
        within = bool(set(without_walk(node.child.dims)) & set(node.over))
        how = node.how if node.how in ("var", "top_k", "hist", "quantile") else "sum"
        kind = f"{how} within" if within else how
        if how == "top_k":
            kept = self._size(node, part) / node.options["k"]
            each = size / max(kept, 1)
            ordered = each <= max(2**12, 8 * node.options["k"]) if within else size <= 2**14
            kind = "top_k" + " sorted" * ordered + " within" * within
            if not within:
                size *= node.options["k"] / RANKS
        if how == "quantile":
            if not within:  # the counts of each weight are all read and written
                return "element", calls, 2.0 * size * states.BUCKETS * steps
            kind = "quantile within"
        return kind, calls, size * steps

    def _size(self, node: Node, part: Part | None) -> int:
        """Return the elements that a node has at a step, of one tensor."""
        size = 1
        for dim in without_walk(node.dims):
            size *= self._length(node, dim, part)
        return size

    def _length(self, node: Node, dim: str, part: Part | None) -> int:
        if dim == "position":
            return self._batch
        if dim == "sample":
            return max([scan.samples for scan in node.scans()] + [1])
        if dim == "weight":
            return part.size if part else 1
        if dim == "unit":
            return (part.shape or (1,))[-1] if part else 64
        if dim in WALKED or dim in ("epoch", "window"):
            return 1  # of what is had at one step
        return tiles.count(node, dim, batch=self._batch, keys=1)

    def _layout(self, node: Node) -> list[tuple[Hashable, Part | None]]:
        """Return the tensors of a node and the form of each."""
        if not set(node.dims) & set(RAGGED) or not node.parts:
            return [(tuple(without_walk(node.dims)), None)]
        return [((tuple(without_walk(node.dims)), part.shape, part.size), part)
                for part in node.parts]  # fmt: skip

    def _shapes(self, node: Reduce) -> list[tuple[Hashable, tuple[Any, Part | None]]]:
        shapes, _ = layouts(node)
        parts = self._layout(node.child)
        return [(form, (layout, part)) for layout, (form, part) in zip(shapes, parts, strict=False)]


# -------------------------------------------------------------------------------------- seconds


class Predicted(NamedTuple):
    """Seconds of a replay.

    Attributes:
        replay: of it, everything compiled.
        compile: of executables that are new to this process.
        how: `measured`, where questions of this form have been asked; `calibrated`, where the
            prices are those of this machine; else `estimated`.
        step: of the replay, its steps alone.
    """

    replay: float
    compile: float
    how: str
    step: float


_seen: set[Hashable] = set()  # what questions have compiled in this process


def priced(load: Load, log: Log, table: dict[str, Price]) -> Price:
    """Return the price of a load."""
    element = table["element"]
    if load.kind in log.header.programs:
        found = of_program(log.program(load.kind), table)
        each = found.call - element.call
        return found._replace(call=element.call + each * max(load.repeats, 1.0))
    derived = {
        "copied": element,
        "host": Price(table["eager"].call, element.element, 0.0),
        "ranked": Price(2 * element.call, 0.5 * element.element, 0.0),
        "inserted": table["top_k"]._replace(element=0.5 * table["top_k"].element),
        "stored": Price(0.0, 17 * element.element, element.compile),
    }
    return derived[load.kind] if load.kind in derived else table[load.kind]


def loads(asked: Asked, spans: Sequence[planning.Span], roots: Sequence[Node]) -> list[Load]:
    """Return what a replay of some steps calls, at which roots are looked at."""
    return Loads(asked).replay(spans, roots)


def seconds(
    loads: Sequence[Load], asked: Asked, known: Mapping[str, float], compiled: Container[Hashable]
) -> Predicted:
    """Return what loads take.

    Args:
        loads: of one replay.
        asked: the run.
        known: what was learnt: `step` and `replay`, factors of what is told otherwise, by machine
            and run, or by machine, run and form of the question.
        compiled: keys of what this process has.
    """
    table, measured = prices()
    log, step, rest, compiling = asked.observers.log, 0.0, 0.0, 0.0
    for load in loads:
        price = priced(load, log, table)
        if load.key not in compiled and load.calls:
            compiling += IN_PASSING * price.compile * load.compiled
        if load.kind in ("step", "block"):
            step += load.calls * max(IN_PASSING * price.call, asked.catalogue.seconds)
        else:
            rest += IN_PASSING * load.calls * (price.call + load.size * price.element)
    factor = known.get("replay", 0.0)
    step *= 1.0 if factor else known.get("step", 1.0)
    how = "measured" if factor else "calibrated" if measured else "estimated"
    return Predicted((step + rest) * (factor or 1.0), compiling, how, step)


class Compiling:
    """Measures the seconds that this thread compiles, those of tracing included."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> "Compiling":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *error: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        mine = threading.get_ident() == self._thread  # listeners hear all threads
        if mine and event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    @property
    def seconds(self) -> float:
        """How long so far; what compiles within another compilation counts once."""
        total, end = 0.0, -math.inf
        for first, last in sorted(self._spans):
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total


def learnt(told: Predicted, taken: float) -> dict[str, float]:
    """Return the factors by which a replay took longer than it was told from its plan alone.

    Args:
        told: with nothing known.
        taken: seconds, compilations left out.
    """
    factor = min(max(taken / max(told.replay, 1e-9), 0.05), 20.0)
    return {"replay": factor, **({"step": factor} if told.step > 0.5 * told.replay else {})}


def compiled() -> set[Hashable]:
    """Return the keys of what questions have compiled in this process."""
    return set(_seen)


def has_compiled(loads: Sequence[Load]) -> None:
    """Note that this process has what loads call."""
    _seen.update(load.key for load in loads if load.calls)


def forget() -> None:
    """Take everything for new to this process again, as after `jax.clear_caches()`."""
    _seen.clear()
