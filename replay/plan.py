"""Which steps a question replays, from which stored states: pure, and told before anything runs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from replay.query.nodes import (
    At,
    Lag,
    Map,
    Node,
    Part,
    Reduce,
    Rename,
    Scan,
    Take,
    restrict,
)

# What the log itself answers.
LOGGED = ("samples", "column")


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """What a planner knows of a run.

    Attributes:
        name: of the run.
        steps: how many there are.
        batch: the batch size.
        checkpoints: the stored states, ascending.
        seconds: of a step when it was trained.
        ways: tensor -> how its per-sample gradients are had.
    """

    name: str
    steps: int
    batch: int
    checkpoints: tuple[int, ...]
    seconds: float
    ways: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Span:
    """A replay: from a stored state, of steps up to `stop`.

    Attributes:
        start: the stored state.
        stop: the last state that is reached.
    """

    start: int
    stop: int

    @property
    def steps(self) -> int:
        """How many are replayed."""
        return self.stop - self.start


def push_at(node: Node, offset: int, where: Any) -> Node:
    """Look at states from a step, as far down as possible."""
    if isinstance(node, Scan):
        return At(node, offset, where) if "state" in node.dims else node
    if "state" not in node.dims:
        return node
    return node.rebuilt(lambda child: push_at(child, offset, where))


def canonical(node: Node) -> Node:
    """Return the form of a plan that is executed, the same for equal questions."""
    if isinstance(node, At):
        pushed = push_at(node.child, node.offset, node.where)
        return pushed if isinstance(pushed, At) else canonical(pushed)
    node = node.rebuilt(canonical)
    if isinstance(node, Take) and isinstance(node.anchor, Node):
        node = dataclasses.replace(node, anchor=canonical(node.anchor))
    if isinstance(node, Reduce):
        return _split(node)
    return node


def _split(node: Reduce) -> Node:
    """Reduce attributed updates within a step first: their factors add up there."""
    found = of_samples(node.child)
    if (
        found is not None
        and found[1].quantity == "sample_updates"
        and not found[1].source
        and node.how == "sum"
        and found[0] in ("value", "magnitude")
        and "position" in node.over
        and len(node.over) > 1
        and (node.by is None or node.by.kind == "labels")
    ):
        inner = dataclasses.replace(node, over=("position",))
        rest = tuple(dim for dim in node.over if dim != "position")
        return Reduce(inner, "sum", rest)
    return node


def of_samples(node: Node) -> tuple[str, Scan] | None:
    """Return what of which per-sample quantity a node is: itself, its magnitude or its square."""
    if isinstance(node, Scan):
        known = node.quantity in ("sample_grads", "sample_updates")
        return ("value", node) if known else None
    if not isinstance(node, Map) or len(node.children) not in (1, 2):
        return None
    first = node.children[0]
    if not isinstance(first, Scan) or of_samples(first) is None:
        return None
    if node.function in ("abs", "absolute"):
        return "magnitude", first
    squared = (
        node.function == "square"
        or (node.function == "power" and node.arguments == (first, 2))
        or (node.function == "multiply" and node.arguments == (first, first))
    )
    return ("square", first) if squared else None


def replayed(node: Node) -> bool:
    """Whether a node needs more than what the log holds."""
    return any(scan.quantity not in LOGGED for scan in node.scans())


@functools.lru_cache(maxsize=1024)
def lags(node: Node) -> tuple[Lag, ...]:
    """Return what looks back at an earlier step, along a replay for a node."""
    below = (lags(child) for child in node.children if child.walked == node.walked)
    return (*((node,) if isinstance(node, Lag) else ()), *itertools.chain(*below))


def earlier(node: Node) -> np.ndarray:
    """Return all steps at which something below a node is looked at, those of lags included."""
    return _together([node.steps, *(lag.child.steps for lag in lags(node))])


def spans(checkpoints: Sequence[int], steps: np.ndarray, states: np.ndarray) -> list[Span]:
    """Return the replays that pass all the steps and reach all the states.

    All are ascending. A stretch between stored states that holds none of them is skipped.

    >>> spans([0, 10, 20, 30], np.array([12, 13]), np.array([30]))
    [Span(start=10, stop=14), Span(start=30, stop=30)]
    >>> spans([0, 10, 20], np.array([5, 9, 15]), np.array([], int))
    [Span(start=0, stop=16)]
    """
    stored = np.asarray(checkpoints)
    ends: dict[int, int] = {}
    for reached, inclusive in ((steps, 1), (states, 0)):
        if not len(reached):
            continue
        places = np.searchsorted(stored, reached, side="right") - 1
        last = np.append(np.flatnonzero(np.diff(places)), len(places) - 1)
        for start, stop in zip(stored[places[last]].tolist(), reached[last].tolist(), strict=True):
            ends[start] = max(ends.get(start, 0), stop + inclusive)
    found: list[Span] = []
    for start in sorted(ends):
        if found and found[-1].stop >= start:
            found[-1] = Span(found[-1].start, max(ends[start], found[-1].stop))
        else:
            found.append(Span(start, ends[start]))
    return found


def roots(node: Node) -> list[Node]:
    """Return what is computed along a replay, from which the rest follows afterwards."""
    if isinstance(node, Take):
        return [node.child] if replayed(node.child) else []
    if is_root(node):
        inner = [root for constant in constants(node) for root in roots(constant)]
        return [*inner, node] if replayed(node) else inner
    return [root for child in node.children for root in roots(child)]


def takes(node: Node) -> list[Take]:
    """Return what is taken below a node, by the steps that it stands before or after."""
    found = [take for child in node.children for take in takes(child)]
    return [node, *found] if isinstance(node, Take) else found


def waits(node: Node) -> bool:
    """Whether fewer steps may be replayed than are chosen, as only some of them are taken."""
    return bool(takes(node))


def turns(questions: Sequence[Node]) -> list[list[Node]]:
    """Return questions after those that find their anchors."""
    waiting = [take.anchor for question in questions for take in takes(question)]
    anchors = list(dict.fromkeys(anchor for anchor in waiting if isinstance(anchor, Node)))
    return [*turns(anchors), list(questions)] if anchors else [list(questions)]


def replays(questions: Sequence[Node]) -> list[Node]:
    """Return the roots of questions and of their anchors."""
    return [root for turn in turns(questions) for node in turn for root in roots(node)]


def is_root(node: Node) -> bool:
    """Whether a node takes in, or gives, a value for each step."""
    if isinstance(node, Take | Rename):
        return False
    if isinstance(node, Reduce) and node.child.walked:
        return not _afterwards(node)
    return bool(node.walked) and not _afterwards(node)


def _afterwards(node: Node) -> bool:
    """Whether a node looks at all steps of something that has to be collected first."""
    return any(
        isinstance(child, Rename | Take) or (child.walked and _afterwards(child))
        for child in node.children
    )


def constants(node: Node) -> list[Node]:
    """Return what stands below a root and is the same at every step: folds of their own."""
    found: list[Node] = []
    for child in node.children:
        if not child.walked:
            found.append(child)
        else:
            found += constants(child)
    return found


def runs_of(node: Node) -> tuple[str, ...]:
    """Return the runs that a node looks at."""
    return tuple(sorted({scan.run for scan in node.scans()}))


def tensors_of(node: Node) -> tuple[Part, ...]:
    """Return the tensors that a node looks at."""
    found: dict[str, Part] = {}
    for scan in node.scans():
        found |= {part.path: part for part in scan.tensors}
    return tuple(found.values())


def stops_early(node: Node) -> bool:
    """Whether the answer may be known before the last step."""
    return isinstance(node, Reduce) and node.how in ("first", "any")


def visits(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that a root passes, and the states it reaches."""
    child, none = below(node), np.zeros(0, np.int64)
    found = earlier(child)
    return (found, none) if child.walked == "step" else (none, found)


def cut(root: Node, steps: np.ndarray) -> Node | None:
    """Return a root that looks only at some of its steps or states; None where there are none."""
    looked = below(root)
    if len(steps) == len(looked.steps):
        return root if len(steps) else None
    if not len(steps):
        return None
    looked = restrict(looked, looked.walked, steps)
    return (
        dataclasses.replace(root, child=looked)
        if isinstance(root, Reduce) and not root.walked
        else looked
    )


def below(root: Node) -> Node:
    """Return what a root looks at, at every step."""
    return root.child if isinstance(root, Reduce) and not root.walked else root


class Kept(Protocol):
    """What earlier questions have left."""

    def recalled(self, node: Node) -> bool:
        """Whether the answer to a question is kept."""
        ...

    def left(self, node: Node) -> tuple[Node | None, int]:
        """Return a root cut to the steps that are left to replay, and how many cells are not."""
        ...

    def passes(
        self, roots: Sequence[Node], questions: Sequence[Node], memory: int
    ) -> list[dict[Node, Node]]:
        """Return what is folded along each replay, a root or one over a tile, and its root."""
        ...


def explain(
    questions: Sequence[Node],
    catalogues: dict[str, Catalogue],
    rate: Any,
    kept: Kept,
    *,
    memory: int,
    narrow: Callable[[Node], Any] = lambda root: None,
) -> str:
    """Tell what an answer takes.

    Args:
        questions: canonical plans.
        catalogues: of the runs.
        rate: `rate(folded, roots, run, spans)`, the seconds of a replay: `replay`, those to
            `compile`, and `how` they are known.
        kept: knows what earlier questions have left.
        memory: bytes that an answer may take.
        narrow: `narrow(root) -> Narrowed`, what the log decides of it; None where nothing.
    """
    lines = []
    for number, question in enumerate(questions):
        lines.append(f"question {number + 1}" if len(questions) > 1 else "question")
        lines += question.lines("  ")
    if not any(map(replayed, replays(questions))):
        return "\n".join([*lines, "answered from the log: nothing is replayed"])
    fresh = [question for question in questions if not kept.recalled(question)]
    if len(fresh) < len(questions):
        lines.append(f"kept from earlier questions: {len(questions) - len(fresh)} of the answers")
    questions = fresh
    total, known_roots = 0.0, set()
    for turn in turns(questions):
        wanted = [root for question in turn for root in roots(question)]
        wanted = [root for root in wanted if root not in known_roots]
        known_roots |= set(wanted)
        taken = {root for question in turn if waits(question) for root in roots(question)}
        for stage in stages(wanted):
            together: dict[tuple[str, ...], list[Node]] = {}
            for root in stage:
                together.setdefault(runs_of(root), []).append(root)
            for names, mine in together.items():
                known = {root: found for root in mine if (found := narrow(root)) is not None}
                for found in known.values():
                    lines += found.lines()
                rests = [known[root].rest if root in known else root for root in mine]
                taken |= {known[root].rest for root in taken & set(known)}
                mine = [root for root in dict.fromkeys(rests) if root is not None]
                if not mine:
                    lines.append("answered from the log: nothing is replayed")
                    continue
                bound = "up to " if all(map(stops_early, mine)) or taken & set(mine) else ""
                passes, reused = [], 0
                for one in kept.passes(mine, turn, memory):
                    cuts = [(*kept.left(node), node, root) for node, root in one.items()]
                    passes.append([
                        (left, left if node == root else root)
                        for left, _, node, root in cuts if left is not None
                    ])  # fmt: skip
                    reused += sum(count for _, count, *_ in cuts)
                passes = [one for one in passes if one] or [[]]
                if reused:
                    lines.append(f"kept from earlier questions: {reused} cells of steps")
                for name in names if passes[0] or not reused else ():
                    told, seconds = _replay(passes, catalogues[name], bound, rate)
                    lines, total = [*lines, *told], total + seconds
    lines.append(f"memory limit {memory / 2**20:,.0f} MiB; about {total:.2g} s in all")
    return "\n".join(lines)


def _replay(
    passes: Sequence[Sequence[tuple[Node, Node]]], catalogue: Catalogue, bound: str, rate: Any
) -> tuple[list[str], float]:
    """Tell what the replays of one run take, and their seconds.

    Args:
        passes: along each replay, what is folded, and what is asked with it.
        catalogue: of the run.
        bound: what stands before the number of steps.
        rate: as for `explain`.
    """
    stage = [node for one in passes for node, _ in one]
    walk = spans(catalogue.checkpoints, *union(stage))
    each = [_steps([node for node, _ in one], catalogue) for one in passes]
    steps = sum(each)
    segments = max(len(catalogue.checkpoints) - 1, 1)
    ends = [*catalogue.checkpoints[1:], catalogue.steps]
    used = sum(
        any(span.start < b and span.stop > a for span in walk)
        for a, b in zip(catalogue.checkpoints, ends, strict=True)
    )
    taken = []
    for one in passes:
        folded, roots = [node for node, _ in one], [root for _, root in one]
        walked = spans(catalogue.checkpoints, *union(folded))
        taken.append(rate(folded, roots, catalogue.name, walked))
    seconds, compiling = (sum(getattr(x, of) for x in taken) for of in ("replay", "compile"))
    where = ", ".join(f"{span.start} to {span.stop}" for span in walk[:4]) or "none"
    more = f", and {len(walk) - 4} more" if len(walk) > 4 else ""
    how = " and ".join(dict.fromkeys(x.how for x in taken))
    tiles = ""
    if len(passes) > 1:
        long = " to ".join(f"{n:,}" for n in sorted({min(each), max(each)}))
        tiles = f", in {len(passes)} tiles of the weights, each a replay of {long} steps"
    lines = [
        f"replay {bound}{steps:,} steps of {catalogue.name} (states {where}{more}): "
        f"{used} of {segments} segments{tiles}",
        f"  about {seconds:.2g} s, {1e3 * seconds / max(steps, 1):.2g} ms a step ({how})",
    ]
    if compiling:
        lines.append(f"  and about {compiling:.2g} s to compile, the first time in this process")
    scans = {scan.quantity for root in stage for scan in root.scans()}
    if scans & {"sample_grads", "sample_updates", "condition"}:
        paths = dict.fromkeys(part.path for root in stage for part in tensors_of(root))
        lines += [f"  {path:<40} {catalogue.ways.get(path, 'scan')}" for path in paths]
    return lines, seconds + compiling


def _steps(stage: Sequence[Node], catalogue: Catalogue) -> int:
    """Return how many steps one replay for some roots takes."""
    return sum(span.steps for span in spans(catalogue.checkpoints, *union(stage)))


def union(stage: Sequence[Node]) -> tuple[np.ndarray, np.ndarray]:
    """Return all steps that the roots of a stage pass, and all states they reach."""
    both = [visits(root) for root in stage]
    return _together([pair[0] for pair in both]), _together([pair[1] for pair in both])


def _together(several: Sequence[np.ndarray]) -> np.ndarray:
    """Return all numbers of ascending arrays, ascending."""
    some = [x for x in several if len(x)]
    if len(some) < 2:
        return some[0].astype(np.int64) if some else np.zeros(0, np.int64)
    return np.unique(np.concatenate(some)).astype(np.int64)


def stages(wanted: Sequence[Node]) -> list[list[Node]]:
    """Part roots into replays: those that wait for constants come after them."""
    found: list[list[Node]] = []
    depth: dict[Node, int] = {}

    def level(root: Node) -> int:
        if root not in depth:
            inner = [x for constant in constants(root) for x in roots(constant)]
            depth[root] = 1 + max(map(level, inner), default=-1)
        return depth[root]

    for root in dict.fromkeys(wanted):
        if not replayed(root):
            continue
        while len(found) <= level(root):
            found.append([])
        found[level(root)].append(root)
    return [stage for stage in found if stage]
