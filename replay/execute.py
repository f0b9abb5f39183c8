"""Running a plan: one replay for all questions of a stage, folded step by step.

Every reduction of every tensor is an executable of its own, so that an answer does not depend on
what else was asked. Running states are folded within aligned blocks of steps and joined in one
fixed tree, so that an answer put together by several processes has the bits of one.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay import grouped, reuse, tiles
from replay import plan as planning
from replay.cache import Cache, Cell
from replay.cells import Root
from replay.errors import Grade, QueryError
from replay.folds import Asked, Collected, Fold, Labelled, Sampled, keys_of, rule_of
from replay.frames import FEW_WEIGHTS, Frame, few
from replay.local import Everything, Known, Local, among
from replay.narrowing import Narrowed, narrowed
from replay.query import states
from replay.query.nodes import (
    RAGGED,
    Among,
    Lag,
    Map,
    Node,
    Part,
    Pick,
    Reduce,
    Rename,
    Scan,
    Take,
    restrict,
)
from replay.reducing import reduce_now
from replay.replaying import Rests
from replay.reuse import Course
from replay.tiles import Sparing, Tiled
from replay.values import Value, aligned, none_of, on_host, stacked, without_walk

MEMORY = 2**30
LOOK = 4  # steps after which somebody looks, and waits, whether a question is answered
_KEPT = (Grade.BITWISE, Grade.UNAUDITED)  # and kept with their answers


class Answer(NamedTuple):
    """What a question is answered with.

    Attributes:
        value: with all dimensions.
        node: the plan, anchors replaced by what they were found to be.
        grade: of the replay.
        steps: how many steps were replayed for all questions together.
        occurrences: for what was taken: steps, positions and samples.
    """

    value: Value
    node: Node
    grade: Grade
    steps: int
    occurrences: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class Execution:
    """Questions under way.

    Args:
        runs: by name.
        memory: bytes that an answer may take.
        exact: raise where a replay departs from its run.
        progress: called with the number of steps done since the last call.

    Attributes:
        computed: whether anything was not answered from the log.
    """

    def __init__(
        self,
        runs: Mapping[str, Asked],
        *,
        memory: int = MEMORY,
        exact: bool = True,
        progress: Callable[[int], None] = lambda steps: None,
    ):
        self.runs, self._memory, self._exact, self._progress = runs, memory, exact, progress
        self._known: dict[Node, Value] = {}
        self.grade, self.steps = Grade.BITWISE, 0
        self._keys: dict[Node, list[int]] = {}
        self._places: dict[Node, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        same = [asked.identity for asked in runs.values()]
        self._identities = {  # of copies of one run, each its own
            name: asked.identity + f" {i}" * (same.count(asked.identity) > 1)
            for i, (name, asked) in enumerate(sorted(runs.items()))
        }
        self._identities |= {
            f"{name} {source}": identity
            for name, asked in runs.items()
            for source, identity in asked.sources.items()
        }
        # States from one to another that were found to be those of the run.
        self._verified: list[tuple[int, int]] = []
        self._verifying: list[tuple[int, int]] = []
        self._narrowed: dict[Node, Narrowed | None] = {}
        self._questions: list[Node] = []
        self._passing: set[Node] = set()  # over tiles, whose cells are not worth keeping
        self.computed = False
        # While an anchor is looked for, states near it are kept for what is asked about it.
        self._anchoring = False
        self._rests = {name: Rests() for name in runs}

    # ---- questions

    def answer(self, questions: Sequence[Node], distribute: Any = None) -> list[Answer]:
        """Answer canonical plans, in one replay where they need nothing of each other."""
        anchors = [
            take.anchor for q in questions for take in _takes(q) if isinstance(take.anchor, Node)
        ]
        if anchors:
            before, self._anchoring = self._anchoring, True
            found = self.answer(list(dict.fromkeys(anchors)), distribute)
            self._anchoring = before
            steps = {
                anchor: int(answer.value.data[0])
                for anchor, answer in zip(dict.fromkeys(anchors), found, strict=True)
            }
            questions = [_anchored(q, steps) for q in questions]
        asked, questions = questions, [self._cut(q) for q in questions]
        begun, before = time.perf_counter(), self.steps
        fresh = [q for q in questions if not self._recalled(q)]
        wanted = [root for q in fresh for root in planning.roots(q)]
        self._questions = fresh
        for stage in planning.stages(wanted):
            self._run(stage, distribute)
        answers = []
        for question, node in zip(asked, questions, strict=True):
            where = self._places[node] if isinstance(node, Take) else None
            answers.append(Answer(self.value(node), question, self.grade, self.steps, where))
        if self.steps > before:
            seconds = (time.perf_counter() - begun) / len(fresh)
            for node in fresh:
                self._keep(node, seconds)
            self._flush()
        return answers

    def keys(self, node: Node) -> list[int]:
        """Return the epochs or windows of a root."""
        return self._keys.get(node, [])

    def value(self, node: Node) -> Value:
        """Return the value of a node after all replays."""
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: Node) -> Value:
        if isinstance(node, Scan):
            return self._logged(node)
        if isinstance(node, Pick):
            child = self.value(node.child)
            axis = child.dims.index(node.dim)
            pick = lambda x: np.take(x, node.index, axis)  # noqa: E731
            fields = {name: [pick(x) for x in parts] for name, parts in child.fields.items()}
            return Value(node.dims, [pick(x) for x in child.data], fields)
        if isinstance(node, Take):
            return self._picked(node.child, self.value(node.child), self._places[node])
        if isinstance(node, Among):
            return self._only(node)
        if isinstance(node, Rename):
            child = self.value(node.child)
            dims = tuple(node.new if dim == node.old else dim for dim in child.dims)
            order = [dims.index(dim) for dim in node.dims]
            fields = {n: [x.transpose(order) for x in v] for n, v in child.fields.items()}
            return Value(node.dims, [x.transpose(order) for x in child.data], fields)
        if isinstance(node, Lag):
            child = self.value(node.child)
            axis = child.dims.index(node.walked)
            return Value(child.dims, [np.take(x, range(x.shape[axis] - 1), axis)
                                      for x in child.data])  # fmt: skip
        if isinstance(node, Reduce):
            return self._reduced(node)
        assert isinstance(node, Map), node
        values = [self.value(x) if isinstance(x, Node) else x for x in node.arguments]
        arrays = [self._at(x, v, node) for x, v in zip(node.arguments, values, strict=True)]
        count = max((len(v.data) for v in values if isinstance(v, Value)), default=1)
        with np.errstate(all="ignore"):
            data = [
                np.asarray(getattr(jnp, node.function)(
                    *[a[i if len(a) > 1 else 0] if isinstance(a, list) else a for a in arrays]
                ))
                for i in range(count)
            ]  # fmt: skip
        return Value(node.dims, data)

    def _at(self, argument: Any, value: Any, node: Node) -> Any:
        """Return an argument's arrays at the steps of a node, its axes those of the node."""
        if not isinstance(value, Value):
            return value
        data = value.data
        if argument.walked and len(argument.steps) != len(node.steps):
            axis = value.dims.index(argument.walked)
            places = np.searchsorted(argument.steps, node.steps)
            data = [np.take(x, places, axis) for x in data]
        return [aligned(x, value.dims, node.dims) for x in data]

    def _reduced(self, node: Reduce) -> Value:
        """Reduce something that is there in full; its steps are taken one after the other."""
        walked = node.child.walked
        if not walked:
            return reduce_now(node, Everything(self.value), np)
        rows = Known(self.value)
        asked = self.runs[next(node.child.scans()).run]
        if walked not in node.over:  # each step by itself
            found = [
                on_host(reduce_now(node, rows.at(step, self._ids(node.child, step)), np))
                for step in node.child.steps.tolist()
            ]
            if found:
                return stacked(walked, found)
            blank = reduce_now(node, rows.blank(self._ids(node.child, 0)), np)
            return none_of(stacked(walked, [blank]), walked)
        root = Fold(node, asked)
        for step in node.child.steps.tolist():
            root.take(rows.at(step, self._ids(node.child, step)))
        self._keys[node] = root.keys()
        return root.result(lambda: rows.blank(self._ids(node.child, 0)))

    def _ids(self, node: Node, step: int) -> np.ndarray | None:
        if "position" not in node.dims:
            return None
        return self.runs[next(node.scans()).run].observers.log.ids(step, step + 1)[0]

    def _only(self, node: Among) -> Value:
        value = self.value(node.child)
        axis = value.dims.index("step")
        log = self.runs[next(node.scans()).run].observers.log
        rows = [log.ids(step, step + 1)[0] for step in node.steps.tolist()]
        found = [
            on_host(
                among(
                    node,
                    Value(without_walk(value.dims), [np.take(x, i, axis) for x in value.data]),
                    ids,
                )
            )
            for i, ids in enumerate(rows)
        ]
        return stacked("step", found) if found else value

    def _logged(self, scan: Scan) -> Value:
        asked = self.runs[scan.run]
        steps = scan.steps
        if scan.quantity == "column":
            return Value(("step",), [asked.columns(scan.name)[steps]])
        if not len(steps):
            blank = np.zeros((0, asked.catalogue.batch), np.int32)
            return Value(("step", "position"), [blank])
        first = int(steps[0])
        ids = asked.observers.log.ids(first, int(steps[-1]) + 1)
        return Value(("step", "position"), [ids[steps - first]])

    # ---- anchors

    def _cut(self, node: Node) -> Node:
        """Cut what is taken from to the steps that matter, and keep which occurrences those are."""
        node = node.rebuilt(self._cut)
        if not isinstance(node, Take):
            return node
        child, where = self._taken(node)
        node = dataclasses.replace(node, child=child)
        self._places[node] = where
        return node

    def _taken(self, take: Take) -> tuple[Node, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return what is taken from, cut to the steps that matter, and the occurrences."""
        child, anchor = take.of or take.child, take.anchor
        steps = child.steps
        if anchor < 0:
            chosen = steps[:0]
        elif take.before:
            chosen = steps[steps <= anchor] if take.inclusive else steps[steps < anchor]
        else:
            chosen = steps[steps >= anchor] if take.inclusive else steps[steps > anchor]
        log = self.runs[next(child.scans()).run].observers.log
        count = math.inf if take.count is None else take.count
        positions = "position" in child.dims
        found: list[tuple[int, int, int]] = []
        for step in chosen[::-1].tolist() if take.last else chosen.tolist():
            if len(found) >= count:
                break
            if not positions:
                found.append((step, -1, -1))
                continue
            ids = log.ids(step, step + 1)[0]
            places = np.flatnonzero(ids >= 0).tolist()
            for place in places[::-1] if take.last else places:
                if len(found) < count:
                    found.append((step, place, int(ids[place])))
        found.sort()
        columns = np.asarray(found, np.int64).reshape(-1, 3)
        where = tuple(columns.T)
        steps = np.unique(columns[:, 0])
        missing = np.setdiff1d(steps, take.child.steps)
        if len(missing):
            raise QueryError(
                f"there is nothing at step {missing[0]} to put beside what was taken",
                why="a difference lacks the first step, and a selection what it leaves out",
                fix="take from later steps, or join a quantity of all steps",
            )
        return restrict(take.child, "step", steps), where  # type: ignore[return-value]

    def _picked(self, node: Node, value: Value, where: Any) -> Value:
        steps, positions, _ = where
        rows = np.searchsorted(node.steps, steps)
        axis = value.dims.index("step")
        dims = ["occurrence" if dim == "step" else dim for dim in value.dims if dim != "position"]

        def pick(x):
            x = np.take(x, rows, axis)
            if "position" not in value.dims:
                return x
            place = value.dims.index("position")
            x = np.moveaxis(x, (axis, place), (0, 1))
            return x[np.arange(len(rows)), positions]

        if "position" in value.dims:
            rest = [dim for dim in dims if dim != "occurrence"]
            dims = ["occurrence", *rest]
        fields = {name: [pick(x) for x in parts] for name, parts in value.fields.items()}
        return Value(tuple(dims), [pick(x) for x in value.data], fields)

    # ---- replays

    def _root(self, node: Node) -> Root:
        asked = self.runs[next(node.scans()).run]
        if isinstance(node, Reduce) and not node.walked:
            if grouped.fits(planning.of_samples(node.child), node):
                return Labelled(node, asked)
            rule = rule_of(node)
            return Fold(node, asked) if rule is None else Sampled(node, asked, rule)
        return Collected(node)

    def _check(self, node: Node) -> None:
        """Refuse an answer that would not fit, before anything is replayed."""
        tiled = self.tiled(node, self._questions, self._memory)
        sizes = 1
        catalogue = self.runs[next(node.scans()).run].catalogue
        for dim in node.dims:
            if dim in ("step", "state"):
                sizes *= len(node.steps)
            elif dim == "position":
                sizes *= catalogue.batch
            elif dim == "sample":
                sizes *= max(scan.samples for scan in node.scans())
            elif dim in RAGGED:
                sizes *= max(sum(part.size for part in node.parts), 1)
        if isinstance(node, Reduce):
            sizes *= max(node.options.get("k", 1), len(node.options.get("edges", ())) + 1)
            if node.by is not None and node.by.kind in ("labels", "sample"):
                sizes *= node.by.count
            if node.how == "quantile" and not node.walked:
                sizes *= states.BUCKETS
        if tiled is not None:
            sizes = tiled.entries * sum(part.size for part in node.parts)
        if 4 * sizes > self._memory:
            raise QueryError(
                f"the answer would take {4 * sizes / 2**20:,.0f} MiB: {', '.join(node.dims)}",
                why=f"the limit is {self._memory / 2**20:,.0f} MiB",
                fix="reduce it over a dimension, choose fewer steps or weights, or pass memory=",
            )
        if isinstance(node, Reduce) and node.how == "top_k":
            reduced = math.prod(
                [catalogue.batch if "position" in node.over else 1]
                + [sum(p.size for p in node.child.parts) if "weight" in node.over else 1]
            )
            if reduced >= 2**31:
                raise QueryError(
                    f"a ranking of {reduced:,} values in one step",
                    why="places are counted in 32 bits",
                    fix="choose tensors",
                )
        if tiled is None and (size := self._multiplied_out(node)) > self._memory:
            raise QueryError(
                f"{size / 2**20:,.0f} MiB of one tensor's gradients would "
                "be multiplied out at once",
                why="there is no rule that answers this from their factors",
                fix="choose weights or a smaller tensor, or pass memory=",
            )

    def _multiplied_out(self, node: Node) -> int:
        """Return the bytes of one tensor's gradients that are multiplied out at once."""
        if isinstance(self._root(node), Sampled | Labelled):
            return 0
        batch = self.runs[next(node.scans()).run].catalogue.batch
        return 4 * tiles.multiplied_out(node) * batch

    # ---- tiles of the weights

    def passes(
        self, roots: Sequence[Node], questions: Sequence[Node], memory: int
    ) -> list[dict[Node, Node]]:
        """Return what is folded along each replay, a root or one over a tile, and its root."""
        tiled = [one for root in roots if (one := self.tiled(root, questions, memory))]
        return tiles.passes(roots, tiled)

    def tiled(self, root: Node, questions: Sequence[Node], memory: int) -> Tiled | None:
        """Return the tiles of a root whose weights do not go together; None where they do.

        Args:
            root: what is computed along a replay.
            questions: those that it is computed for.
            memory: bytes that an answer may take.
        """
        looked = set(planning.below(root).dims)
        if "weight" not in root.dims or not root.parts or looked & {"tensor", "unit"}:
            return None
        asked, taker = self.runs[planning.runs_of(root)[0]], self._root(root)
        batch, keys = asked.catalogue.batch, keys_of(root, asked, planning.below(root).steps)
        _, steps = np.unique(keys, return_counts=True)
        count = functools.partial(tiles.count, batch=batch, keys=len(steps))
        state = taker.weight_bytes(lambda dim: count(root, dim))
        each = state * (tiles.WORKING + taker.states(steps.tolist()))
        weights, multiplied = sum(part.size for part in root.parts), self._multiplied_out(root)
        limit, least = memory // max(each, 1), 1
        if multiplied:  # of which a quarter of the memory is left to whole tensors
            rows = max([batch, *(scan.samples for scan in root.scans())])
            limit = memory * 3 // 4 // (each + 4 * rows * tiles.COPIES)
            least = FEW_WEIGHTS + 1
        fields = 3 if isinstance(root, Reduce) and root.how == "top_k" else 1
        # Whole tensors have the bits that they have beside others, whatever is asked of them.
        for split in (False, True):
            top = tiles.top_of(root, questions, count, split=split)
            entries = tiles.entries(top, count)
            needed = state > 4 * fields * entries and each * weights > memory
            if not needed and multiplied <= memory or split and taker.wholes:
                return None
            if split and not tiles.splits(root):
                return None
            parts = tiles.parted(root.parts, limit, split=split, least=least)
            if parts is not None:
                # What stands below a norm of all weights, say, is looked at as a whole.
                small = self._multiplied_out(tiles.over(root, parts[0])) <= memory
                return Tiled(root, top, parts, entries, state * weights) if small else None
        return None

    def _run(self, stage: Sequence[Node], distribute: Any = None) -> None:
        stage = [node for node in stage if node not in self._known]
        for node in stage:
            for constant in planning.constants(node):
                self.value(constant)
            for scan in node.scans():
                if scan.quantity == "column":
                    self.value(scan)
        stage = [node for node in stage if not self._recalled(node)]
        for node in stage:
            self._check(node)
        cut = {node: found for node in stage if (found := self.narrowed(node)) is not None}
        rests = [cut[node].rest if node in cut else node for node in stage]
        stage = [node for node in dict.fromkeys(rests) if node is not None]
        stage = [node for node in stage if node not in self._known and not self._recalled(node)]
        together: dict[tuple[str, ...], list[Node]] = {}
        for node in stage:
            together.setdefault(planning.runs_of(node), []).append(node)
        for names, nodes in together.items():
            self.computed = True
            left = [found.rest for found in cut.values() if found.rest is not None]
            self._fold(names, nodes, [*self._questions, *left], distribute)
        for node, found in cut.items():
            replayed = None if found.rest is None else self._known[found.rest].data
            self._known[node] = Value(node.dims, found.combine(replayed))
            self._keys[node] = node.steps.tolist() if node.walked else [0]

    def _fold(
        self,
        names: tuple[str, ...],
        nodes: Sequence[Node],
        questions: Sequence[Node],
        distribute: Any,
    ) -> None:
        """Replay for roots, as often as there are tiles of their weights."""
        tiled = [x for node in nodes if (x := self.tiled(node, questions, self._memory))]
        apart: dict[Node, list[tuple[Tiled, tuple[Part, ...]]]] = {}
        for one in tiled:
            cache, pairs = self._cache(one.root), list(zip(one.nodes, one.tiles, strict=True))
            if cache is not None and not cache.takes(one.state):
                self._passing |= set(one.nodes)
            for node, tile in pairs:
                apart.setdefault(node, []).append((one, tile))
        values: dict[Node, dict[Node, Value]] = {one.root: {} for one in tiled}
        for along in tiles.passes(nodes, tiled):
            before = set(self._known)
            for node in along:
                for one, tile in apart.get(node, ()):
                    self._known |= tiles.constants(one.root, tile, self.value)
            for node, root in self.replayed(names, list(along), distribute).items():
                self._known[node] = root.result(lambda n=node: self._blank(n))
                self._keys[node] = root.keys()
                for one, tile in apart.get(node, ()):
                    self._keys[one.root] = root.keys()
                    values[one.root][node] = self.value(tiles.over(one.top, tile))
            for node in set(self._known) - before - (set(nodes) - set(values)):
                del self._known[node]
        for one in tiled:
            self._known[one.top] = one.joined([values[one.root][node] for node in one.nodes])

    def replayed(
        self,
        names: tuple[str, ...],
        nodes: Sequence[Node],
        distribute: Any = None,
        within: range | None = None,
    ) -> dict[Node, Root]:
        """Return roots that have taken all their steps, or those within a range."""
        without: dict[Node, frozenset[int]] = {}
        while True:
            roots = {node: self._root(node) for node in nodes}
            try:
                if distribute is None or not distribute(self, names, roots):
                    self.walk(names, roots, within, without)
                return roots
            except reuse.Lost as lost:
                node, numbers = lost.args
                without[node] = without.get(node, frozenset()) | numbers
            finally:  # also where a question is broken off
                self._flush()

    # ---- what is kept already

    def _flush(self) -> None:
        for cache in {asked.cache for asked in self.runs.values()} - {None}:
            assert cache is not None
            cache.flush()

    def _cache(self, node: Node) -> Cache | None:
        if any(scan.quantity == "column" for scan in node.scans()):
            return None  # a column may be logged anew when a run is continued
        return self.runs[planning.runs_of(node)[0]].cache

    def _recalled(self, node: Node) -> bool:
        if not planning.replayed(node):
            return False
        cache = self._cache(node)
        found = reuse.recall(cache, node, self._identities) if cache is not None else None
        if found is None:
            return False
        self._known[node], self._keys[node], grade = found
        self.computed = True
        self.grade = self.grade & grade
        return True

    def _keep(self, node: Node, seconds: float) -> None:
        cache = self._cache(node)
        if cache is None or self.grade not in _KEPT or not planning.replayed(node):
            return
        keys: list[int] = []
        stack = [node]
        while stack and not keys:
            this = stack.pop()
            keys = self.keys(this) if set(this.dims) & {"epoch", "window"} else []
            stack += this.children
        value = self.value(node)
        reuse.keep(cache, node, self._identities, value, keys, self.grade, seconds)

    def recalled(self, node: Node) -> bool:
        """Whether the answer to a question is kept already."""
        if not planning.replayed(node) or planning.waits(node):
            return False
        cache = self._cache(node)
        return cache is not None and reuse.has(cache, node, self._identities)

    def course(
        self, root: Root, within: range | None = None, without: frozenset[int] = frozenset()
    ) -> Course:
        """Return which steps of a root are left to replay."""
        steps = planning.below(root.node).steps
        if within is not None:
            steps = steps[(steps >= within.start) & (steps < within.stop)]
        names = planning.runs_of(root.node)
        keys = keys_of(root.node, self.runs[names[0]], steps)
        cache = self._cache(root.node) if len(names) == 1 else None
        return Course(root, cache, steps, keys, self._identities, without)

    def left(self, node: Node) -> tuple[Node | None, int]:
        """Return a root cut to the steps that are left to replay, and how many cells are not."""
        if self.recalled(node):
            return None, 1
        course = self.course(self._root(node))
        return planning.cut(node, course.left), course.reused

    # ---- what the log decides

    def narrowed(self, node: Node) -> Narrowed | None:
        """Return what the indexes of its run leave of a root; None where they say nothing."""
        if node not in self._narrowed:
            asked = [self.runs[name] for name in planning.runs_of(node)]
            self._narrowed[node] = None
            if len(asked) == 1 and asked[0].index is not None:
                self._narrowed[node] = narrowed(
                    node, asked[0].index, constant=self._known.get, column=asked[0].columns
                )
        return self._narrowed[node]

    def spared(self, node: Node) -> Narrowed | None:
        """Return what the indexes leave of a root whose answer is not kept already."""
        return None if self.recalled(node) else self.narrowed(node)

    # ---- the walk

    def walk(
        self,
        names: tuple[str, ...],
        roots: Mapping[Node, Root],
        within: range | None = None,
        without: Mapping[Node, frozenset[int]] = MappingProxyType({}),
    ) -> None:
        """Replay, and let every root take what it asks about.

        Args:
            names: of the runs, walked side by side.
            roots: node -> what takes its steps.
            within: only these steps or states.
            without: node -> cells that are kept, but are to be replayed nevertheless.

        Raises:
            Lost: a kept cell could not be read.
        """
        courses, wanted, cuts = {}, {}, []
        keeper = _Keeper(len(roots))
        self._verified = []
        for node, root in roots.items():
            course = self.course(root, within, without.get(node, frozenset()))
            courses[node] = course
            if node not in self._passing:
                root.closed = functools.partial(keeper.closed, course)
            left = planning.cut(node, course.left)
            if left is None:
                continue
            below = planning.below(left)
            looked = frozenset(planning.earlier(below).tolist())
            wanted[node] = (frozenset(course.left.tolist()), looked, below.walked)
            cuts.append(left)
        passed, reached = planning.union(cuts)
        lags: dict[Node, dict] = {node: {} for node in roots}
        behind = {n: below for n in wanted if planning.lags(below := planning.below(n))}
        scans = [scan for left in cuts for scan in left.scans()]
        walks = []
        for name in names:
            mine = [scan for scan in scans if scan.run == name]
            asked = self.runs[name]
            take, factors = few(asked.observers, mine, overlaps=asked.replayer.overlaps)
            if factors is not None:
                factors = _at(_of_samples(name, wanted), factors)
            walks.append(self._frames(name, passed, reached, take, factors))
        early, done = all(map(planning.stops_early, roots)), set()
        every = min([LOOK, *(self.runs[name].replayer.ahead for name in names)])
        frames_at = {*passed.tolist(), *reached.tolist()}

        def answered(*, now: bool) -> bool:
            """Leave roots alone whose answer is known, and tell whether that is all of them."""
            for node in (node for node in roots if node not in done and roots[node].done(now)):
                done.add(node)
                roots[node].closed = _not_kept  # its cell holds some of the steps only
            return len(done) == len(roots)

        with contextlib.ExitStack() as stack:
            for walk in walks:
                stack.enter_context(contextlib.closing(walk))
            if early:
                for node, course in courses.items():
                    course.before(min(wanted[node][0]) if node in wanted else None)
                if answered(now=True) or not cuts:
                    walks = []
            for frames in zip(*walks, strict=True):
                step, replayed = frames[0].step, frames[0].replayed
                here = dict(zip(names, frames, strict=True))
                for node, (steps, looked, walked) in wanted.items():
                    if step not in looked or (walked == "step" and replayed is None):
                        continue
                    local = Local(here, step, self._known, lags[node])
                    if step in steps and node not in done:
                        courses[node].before(step)
                        roots[node].take(local)
                    if node in behind:
                        local.remember(behind[node])
                gap = step + 1 not in frames_at  # nobody replays what comes next in vain
                if early and (gap or step % every == 0) and answered(now=gap):
                    shown = [frame.replayed for frame in frames if frame.replayed is not None]
                    if not all(replayed.agrees() for replayed in shown):
                        self.grade = self.grade & Grade.NUMERIC
                    break
                if keeper.waiting:
                    keeper.audited([*self._verified, *self._verifying])
                replayed = None
                for frame in frames:
                    frame.close()
        for node, root in roots.items():
            if node not in done:
                root.end()
                courses[node].before(None)
            root.closed = _not_kept
        keeper.audited(self._verified)

    def _frames(
        self,
        name: str,
        steps: np.ndarray,
        reached: np.ndarray,
        take: Callable[[Sequence[Any]], Any] | None = None,
        factors: Callable[..., list[Any]] | None = None,
    ) -> Generator[Frame]:
        """Yield a frame for every step and state that is asked about, ascending.

        Of states it has what `take` takes from them, which takes less time than to keep all, and
        of steps what `factors` computes before they take the memory of their states.
        """
        asked = self.runs[name]
        frame = functools.partial(Sparing, memory=self._memory // 4)
        order = np.union1d(steps, reached)
        either, only = set(order.tolist()), set(reached.tolist())
        kept = Rests.KEPT * sum(leaf.nbytes for leaf in asked.observers.signature.state)
        rests = self._rests[name] if self._exact and kept <= self._memory // 4 else None
        seen = either | {step + 1 for step in steps.tolist()}

        def look(state: int, leaves: Sequence[Any]) -> Any:
            return take(leaves) if take is not None and state in seen else None

        for span in planning.spans(asked.catalogue.checkpoints, steps, reached):
            if not span.steps:
                leaves = jax.device_put(asked.replayer.stored(span.start), jax.devices()[0])
                self._verified.append((span.start, span.start))
                yield frame(asked.observers, span.start, leaves, None)
                continue
            last, begin = None, span.start
            if rests is not None:
                wanted = int(order[np.searchsorted(order, span.start)])
                rested = rests.nearest(span.start, min(wanted, span.stop - 1))
                begin = rested[0] if rested else begin
                self._progress(begin - span.start)
            walk = asked.replayer.steps(
                begin, span.stop, exact=self._exact, late=True, look=take and look,
                beforehand=factors, rests=rests, rest=self._anchoring,
            )  # fmt: skip
            try:
                for replayed in walk:
                    step, last = replayed.executed.start, replayed._replace(beforehand=None)
                    if not replayed.deviation:  # else what closes is not what began
                        self._verifying = [(span.start, replayed.closed)]
                    self.steps += 1
                    if step in either:
                        yield frame(asked.observers, step, replayed.executed.before, replayed)
                    replayed = None  # its factors are gone before those of the next step are made
                    self._progress(1)
            finally:  # also where the rest is not asked for any more
                self._verifying = []
                if last is not None and not last.deviation:
                    self._verified.append((span.start, last.closed))
                if last is not None and last.deviation:
                    self.grade = self.grade & Grade.NUMERIC
                elif last is None or last.closed != span.stop:
                    self.grade = self.grade & Grade.UNAUDITED
            if span.stop in only:
                assert last is not None
                yield frame(asked.observers, span.stop, last.executed.after, None)

    def _blank(self, node: Node) -> Local:
        """Return values of the forms that a step has, for questions about no step at all."""
        here, counted = {}, (self.steps, self.grade)
        for name in planning.runs_of(node):
            walk = self._frames(name, np.asarray([0]), np.zeros(0, np.int64))
            with contextlib.closing(walk):
                here[name] = next(walk)
        self.steps, self.grade = counted  # the answer takes nothing from that step
        lags: dict[Node, Any] = {}
        local = Local(here, 0, self._known, lags)
        stack = [node]
        while stack:
            this = stack.pop()
            if isinstance(this, Lag):
                lags[this] = (0, local.value(this.child))
            stack += this.children
        return local


def _of_samples(name: str, wanted: Mapping[Node, Any]) -> frozenset[int]:
    """Return the steps at which somebody looks at the gradients of a run's samples."""
    found: set[int] = set()
    for node, (_, looked, _) in wanted.items():
        if any(s.run == name and s.quantity == "sample_grads" for s in node.scans()):
            found |= looked
    return frozenset(found)


def _at(steps: frozenset[int], factors: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Return what computes factors at some steps only."""
    return lambda step, *inputs: factors(step, *inputs) if step in steps else None


def _not_kept(number: int, key: int, cell: Cell) -> None:
    """Keep nothing of a cell."""


class _Keeper:
    """Cells that wait for the audit of their steps, to be kept after it.

    What nobody has audited is not kept: whoever asks again would not get the grade of a replay.
    """

    def __init__(self, roots: int):
        self.waiting: list[tuple[Course, int, int, Cell, float]] = []
        self._roots, self._begun = roots, time.perf_counter()

    def closed(self, course: Course, number: int, key: int, cell: Cell) -> None:
        """Take a cell, if it is to be kept and there is room for those that wait."""
        now = time.perf_counter()
        seconds, self._begun = (now - self._begun) / self._roots, now
        waiting = sum(_bytes(cell) for *_, cell, _ in self.waiting)
        if course.fits(_bytes(cell) + waiting):
            self.waiting.append((course, number, key, cell, seconds))

    def audited(self, verified: Sequence[tuple[int, int]]) -> None:
        """Keep the cells of steps between states that were found to be those of the run."""
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            course, number, key, cell, seconds = one
            if course.within(number, verified):
                course.keep(number, key, cell, seconds)
            else:
                self.waiting.append(one)


def _bytes(cell: Cell) -> int:
    return sum(x.nbytes for part in cell.parts for x in part)


def _takes(node: Node) -> Iterator[Take]:
    if isinstance(node, Take):
        yield node
    for child in node.children:
        yield from _takes(child)


def _anchored(node: Node, steps: Mapping[Node, int]) -> Node:
    node = node.rebuilt(lambda child: _anchored(child, steps))
    if isinstance(node, Take) and isinstance(node.anchor, Node):
        return dataclasses.replace(node, anchor=steps[node.anchor])
    return node
