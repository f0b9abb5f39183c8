"""From an expression to its answer: the runs that are asked, the replay, the result."""

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np

from replay import plan as planning
from replay import predicting, prices
from replay.cache import Cache, budget
from replay.data import Data
from replay.errors import Grade, QueryError
from replay.execute import MEMORY, Execution
from replay.folds import Asked
from replay.frames import Observers, of_the_form
from replay.grads import strategy as rates
from replay.grads.reductions import BLOCK_STEPS
from replay.grads.stream import COMPILED
from replay.identity import environment, sha256
from replay.indexes import Indexes
from replay.log import Log
from replay.progress import progress_bar
from replay.query.expressions import Expression
from replay.query.nodes import ELSEWHERE, QUANTITIES, Group, Lag, Node, Part, Scan
from replay.replaying import Replayer
from replay.results import RULE, Result, result_of
from replay.sample_gradients import SampleGradients

# What an answer took is as much as was expected, and nothing is learnt, up to this logarithm.
SURE = 0.1


class Subject(NamedTuple):
    """A run that can be asked.

    Attributes:
        name: in plans.
        log: the record.
        replayer: returns what re-executes it.
        gradients: memory -> its per-sample gradients.
        history: returns its columns.
        others: data sources by name.
        allow: custom calls that its programs may make.
        portable: whether another process can open it by its path alone.
        indexes: returns what is known of it without replaying.
    """

    name: str
    log: Log
    replayer: Callable[[], Replayer]
    gradients: Callable[[int], SampleGradients]
    history: Callable[[], dict[str, np.ndarray]]
    others: dict[str, Data]
    allow: tuple[str, ...]
    portable: bool
    indexes: Callable[[], Indexes]


class Asking:
    """Whom expressions ask: one run, or several that a question combines.

    Args:
        subjects: the runs.
        work: `work(path, allow, nodes, range, options)`, what another process is to do.
    """

    def __init__(self, subjects: Sequence[Subject], work: Callable[..., Any]):
        self.subjects = {subject.name: subject for subject in subjects}
        self._work = work
        self._observers: dict[tuple[str, str, int], Observers] = {}
        self._caches: dict[tuple, Cache] = {}
        self._contents: dict[int, tuple[Data, str]] = {}

    def joint(self, other: "Asking") -> "Asking":
        """Return whom a question about the runs of both asks."""
        if set(other.subjects) <= set(self.subjects):
            return self
        both = {**self.subjects, **other.subjects}
        return Asking(list(both.values()), self._work)

    # ---- building expressions

    def scan(self, quantity: str, *, name: str = "", source: str = "") -> Expression:
        """Return a quantity of the (one) run, whole.

        Raises:
            QueryError: there is no such column, activation or program.
        """
        (subject,) = self.subjects.values()
        log = subject.log
        steps = log.durable.steps
        dims = (ELSEWHERE if source else QUANTITIES)[quantity]
        where = (0, steps + 1, 1) if "state" in dims else (0, steps, 1)
        tensors: tuple[Part, ...] = ()
        if "weight" in dims:
            prefix = "opt_state" if quantity == "opt_state" else "params"
            tensors = tuple(
                Part(leaf.path.partition("/")[2], tuple(leaf.shape))
                for leaf in log.header.signature.state
                if leaf.path.partition("/")[0] == prefix and leaf.key is None
            )
        samples = len(subject.others[source]) if source else 0
        needs = {
            "sample_grads": "sample_gradient", "sample_updates": "sample_gradient",
            "condition": "sample_gradient", "activations": "activations",
        }.get(quantity, "losses" if source else "")  # fmt: skip
        if needs and needs not in log.header.programs:
            raise QueryError(
                f"{log.place} cannot answer for {quantity}",
                why=f"it was recorded without a program {needs!r}; it has "
                f"{', '.join(sorted(log.header.programs))}",
                fix="record it with a program that defines it",
            )
        plan = Scan(subject.name, quantity, where, tensors, name, source, samples)
        return Expression(plan, self)

    def activations(self, name: str, source: str = "") -> Expression:
        """Return a tagged intermediate.

        Raises:
            QueryError: nothing of that name was tagged.
        """
        found = self.scan("activations", name=name, source=source)
        (subject,) = self.subjects.values()
        names = [leaf["name"] for leaf in subject.log.header.programs["activations"]["table"]]
        if name not in names:
            raise QueryError(
                f"there are no activations {name!r}",
                why="a loss names them by jax.ad_checkpoint.checkpoint_name(x, name)",
                fix=f"one of {', '.join(names)}",
            )
        return found

    def column(self, name: str) -> Expression:
        """Return a logged column."""
        (subject,) = self.subjects.values()
        _column(subject, name)
        return self.scan("column", name=name)

    def add(self, source: Any, name: str) -> str:
        """Take a data source, and return the name that plans know it by.

        Raises:
            DataError: its examples have another form than the run's.
        """
        (subject,) = self.subjects.values()
        data = of_the_form(subject.log, source)
        name = name or f"source{len(subject.others)}"
        if name in subject.others:  # another one may go by it in a plan
            name = f"{name} ({len(subject.others)})"
        subject.others[name] = data
        return name

    def labels(self, by: Any, others: int) -> Group:
        """Return the groups of a dimension's name, or of labels.

        Args:
            by: a name, or a label for each sample.
            others: how many samples there are, where they are not those of the run.
        """
        subject = next(iter(self.subjects.values()))
        samples = others or self._samples()
        if isinstance(by, str):
            if by in ("tensor", "unit", "epoch"):
                return Group(by)
            if by == "sample":
                return Group("sample", size=samples)
            raise QueryError(
                f"there are no groups by {by!r}",
                why="groups have a name, or are given by labels",
                fix="one of tensor, unit, epoch, sample, or an array with a label for each sample",
            )
        labels = np.asarray(by).reshape(-1)
        if len(labels) != samples:
            raise QueryError(
                f"{len(labels)} labels for the {samples} samples of {subject.log.place}",
                why="the label of sample i is the i-th",
                fix="pass an array with one label for each sample of the data set, in its order",
            )
        names, numbers = np.unique(labels, return_inverse=True)
        return Group("labels", numbers.astype("<i4").tobytes(), tuple(names.tolist()))

    def epochs(self, wanted: Sequence[int]) -> np.ndarray:
        """Return the steps of epochs."""
        subject = next(iter(self.subjects.values()))
        steps = np.arange(subject.log.durable.steps)
        numbers = _epochs(subject.log, steps)
        there = np.unique(numbers)
        missing = [epoch for epoch in wanted if epoch not in there]
        if missing:
            raise QueryError(
                f"there is no epoch {missing[0]}",
                why=f"the run has epochs {there[0]} to {there[-1]}",
                fix="choose among them",
            )
        return steps[np.isin(numbers, wanted)]

    def batches(self) -> int:
        """Return the batch size."""
        return next(iter(self.subjects.values())).log.header.signature.batch_size

    def _samples(self) -> int:
        subject = next(iter(self.subjects.values()))
        if subject.log.header.order is not None:
            return int(subject.log.header.order[1])
        return int(subject.log.ids(0, subject.log.durable.steps).max(initial=-1)) + 1

    # ---- answers

    def compute(
        self,
        *expressions: Expression,
        progress: bool | None = None,
        memory: int = MEMORY,
        executor: Executor | None = None,
        exact: bool = True,
        strategy: str = "factored",
        cache: bool = True,
        index: bool = True,
    ) -> list[Result]:
        """Answer several questions in one replay.

        Args:
            *expressions: the questions.
            progress: whether to show a progress bar; by default where there is a terminal.
            memory: bytes that an answer, or a tensor's gradients of one batch, may take.
            executor: where to replay parts; here by default.
            exact: raise where a replay departs from its run, else report it as the grade.
            strategy: `factored`, or `scan` over samples.
            cache: whether answers, and what they are put together from, are kept in the run, and
                taken from there. `REPLAY_CACHE_BYTES` says how much of them, 0 for none.
            index: whether steps that the indexes of a run decide are left out of the replay.
        """
        nodes = [planning.canonical(expression.plan) for expression in expressions]
        asked = {
            name: self._asked(name, memory, strategy, cache, index, _sources(nodes, name))
            for name in self._names(nodes)
        }
        total = self._steps(nodes, asked, memory)
        with progress_bar("asking", total, progress if total else False) as report:
            execution = Execution(asked, memory=memory, exact=exact, progress=report)
            distribute = None
            if executor is not None:
                distribute = functools.partial(
                    self._distribute, executor=executor,
                    options={
                        "memory": memory, "exact": exact, "strategy": strategy, "cache": cache
                    },
                )  # fmt: skip
            begun = time.perf_counter()
            with predicting.Compiling() as compiling:
                answers = execution.answer(nodes, distribute)
            if executor is None and execution.steps:
                taken = time.perf_counter() - begun - compiling.seconds
                try:
                    self._remember(nodes, asked, execution.steps, taken)
                except Exception as error:  # an answer is there: no prediction may lose it
                    warnings.warn(
                        f"what this question took is not remembered: {error!r}", stacklevel=2
                    )
        return [
            self._result(node, answer, execution)
            for node, answer in zip(nodes, answers, strict=True)
        ]

    def explain(
        self,
        *expressions: Expression,
        memory: int = MEMORY,
        strategy: str = "factored",
        cache: bool = True,
        index: bool = True,
        calibrate: bool = False,
        **_: Any,
    ) -> str:
        """Tell what an answer takes, executing nothing of it.

        Seconds stand on prices of what is called, which are those of another machine (and called
        `estimated`) until this one is calibrated, and on what questions took before (`measured`).

        Args:
            *expressions: the questions.
            memory: as for `compute`; likewise strategy, cache and index.
            strategy: how per-sample gradients are had.
            cache: whether what is kept is taken into account.
            index: whether what indexes decide is.
            calibrate: measure the prices of this machine first, once for all later processes; it
                takes about half a minute.
        """
        if calibrate and not prices.prices()[1]:
            prices.calibrate()
        nodes = [planning.canonical(expression.plan) for expression in expressions]
        asked = {
            name: self._asked(name, memory, strategy, cache, index, _sources(nodes, name))
            for name in self._names(nodes)
        }
        execution = Execution(asked)
        return planning.explain(
            nodes,
            {name: one.catalogue for name, one in asked.items()},
            functools.partial(self._rate, asked, predicting.compiled()),
            execution,
            memory=memory,
            narrow=execution.spared,
        )

    def _names(self, nodes: Sequence[Node]) -> list[str]:
        return sorted({scan.run for node in nodes for scan in node.scans()})

    def _asked(
        self,
        name: str,
        memory: int,
        strategy: str,
        cache: bool,
        index: bool = False,
        sources: Sequence[str] = (),
    ) -> Asked:
        if strategy not in ("factored", "scan"):
            raise QueryError(
                f"there is no strategy {strategy!r} for recorded steps",
                why="they are answered by archived programs",
                fix="one of factored, scan",
            )
        subject = self.subjects[name]
        key = (name, strategy, memory)
        if key not in self._observers:
            self._observers[key] = Observers(
                subject.log,
                functools.partial(subject.gradients, memory),
                subject.others,
                allow=subject.allow,
                way=strategy,
            )
        log = subject.log
        return Asked(
            subject.replayer(),
            self._observers[key],
            _catalogue(subject, strategy),
            lambda column: _column(subject, column),
            functools.partial(_epochs, log),
            self._cache(subject, memory, strategy) if cache else None,
            subject.log.identity,
            {source: self._content(subject.others[source]) for source in sources} if cache else {},
            subject.indexes() if index and subject.indexes().levels else None,
        )

    def _cache(self, subject: Subject, memory: int, strategy: str) -> Cache | None:
        """Return where answers are kept, for programs that round as those of this process."""
        limit = budget()
        if not limit:
            return None
        key = (subject.name, memory, strategy, limit)
        if key not in self._caches:
            here = (sorted(environment().items()), np.__version__, COMPILED, memory, strategy)
            identity = sha256(repr(here).encode())
            self._caches[key] = Cache(subject.log.place, identity, limit)
        return self._caches[key]

    def _content(self, data: Data) -> str:
        """Return a digest of all that other samples hold, read once."""
        if id(data) not in self._contents:
            digests = []
            for first in range(0, len(data), 4096):
                leaves = data.leaves(np.arange(first, min(first + 4096, len(data))))
                digests += [(str(x.dtype), x.shape, sha256(x.tobytes())) for x in leaves]
            self._contents[id(data)] = (data, sha256(repr(digests).encode()))
        return self._contents[id(data)][1]

    def _steps(self, nodes: Sequence[Node], asked: Mapping[str, Asked], memory: int) -> int:
        total, execution = 0, Execution(asked)
        nodes = [node for node in nodes if not execution.recalled(node)]
        for stage in planning.stages(planning.replays(nodes)):
            known = {root: execution.spared(root) for root in stage}
            rests = [root if (cut := known[root]) is None else cut.rest for root in stage]
            rests = [root for root in rests if root is not None]
            for one in execution.passes(rests, nodes, memory):
                lefts = [execution.left(root)[0] for root in one]
                cuts = [root for root in lefts if root is not None]
                for name in sorted({run for root in cuts for run in planning.runs_of(root)}):
                    mine = [root for root in cuts if name in planning.runs_of(root)]
                    passed, reached = planning.union(mine)
                    walk = planning.spans(asked[name].catalogue.checkpoints, passed, reached)
                    total += sum(span.steps for span in walk)
        return total

    def _result(self, node: Node, answer: Any, execution: Execution) -> Result:
        scans = list(node.scans())
        log = self.subjects[scans[0].run].log
        computed = planning.replayed(node) and execution.computed
        attributes: dict[str, Any] = {
            "plan": "\n".join(answer.node.lines()),
            "grade": str(answer.grade) if computed else "LOGGED",
            "steps": answer.steps,
        }
        if {"sample_updates", "condition"} & {scan.quantity for scan in scans}:
            attributes["rule"] = RULE
        if answer.occurrences is not None and not len(answer.occurrences[0]):
            attributes["empty"] = "the anchor never happens, or nothing stands on that side of it"
        return result_of(
            node,
            answer.value,
            attributes=attributes,
            batch=log.header.signature.batch_size,
            samples_at=functools.partial(_samples_at, log),
            keys=_keys(execution, node),
            occurrences=answer.occurrences,
        )

    # ---- other processes

    def _distribute(
        self, execution: Execution, names: tuple[str, ...], roots: Mapping[Node, Any],
        *, executor: Executor, options: dict[str, Any],
    ) -> bool:  # fmt: skip
        """Replay parts in an executor; False where that cannot be."""
        name, *others = names
        if others or not self.subjects[name].portable:
            return False
        if any(map(planning.stops_early, roots)) or any(map(_looks_back, roots)):
            return False
        if any(scan.source for node in roots for scan in node.scans()):
            return False
        if any(planning.constants(node) for node in roots):
            return False
        subject, asked = self.subjects[name], execution.runs[name]
        if all(execution.course(root).ended for root in roots.values()):
            return False
        passed, reached = planning.union(list(roots))
        looked = np.union1d(passed, reached)
        workers = getattr(executor, "_max_workers", 4)
        cuts = portions(asked.catalogue.checkpoints, looked, workers)
        if len(cuts) < 2:
            return False
        nodes = list(roots)
        jobs = [
            executor.submit(self._work, _address(subject.log), subject.allow, nodes, cut, options)
            for cut in cuts
        ]
        try:
            for job in jobs:
                states, grade, steps = job.result()
                for node, state in zip(nodes, states, strict=True):
                    roots[node].absorb(state)
                execution.grade = execution.grade & Grade[grade]
                execution.steps += steps
                execution._progress(steps)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return True

    def part(self, nodes: Sequence[Node], within: range, options: dict[str, Any]) -> Any:
        """Do what another process was asked to: return states, grade and steps."""
        (name,) = self._names(nodes)
        asked = {name: self._asked(name, options["memory"], options["strategy"], options["cache"])}
        execution = Execution(asked, memory=options["memory"], exact=options["exact"])
        for node in nodes:
            for scan in node.scans():
                if scan.quantity == "column":
                    execution.value(scan)
        roots = execution.replayed((name,), nodes, within=within)
        return [root.state() for root in roots.values()], execution.grade.name, execution.steps

    # ---- rates

    def _rate(
        self,
        asked: Mapping[str, Asked],
        compiled: set[Any],
        folded: Sequence[Node],
        roots: Sequence[Node],
        name: str,
        spans: Sequence[planning.Span],
    ) -> predicting.Predicted:
        """Return what a replay takes; what it compiles is added to what is compiled."""
        one = asked[name]
        loads = predicting.loads(one, spans, folded)
        known = dict(rates.recall(self._rate_key((), one)))
        known |= rates.recall(self._rate_key(tuple(roots), one))
        found = predicting.seconds(loads, one, known, compiled)
        compiled |= {load.key for load in loads}
        return found

    def _rate_key(self, roots: tuple[Node, ...], asked: Asked) -> str:
        """Return the key of what is learnt of the steps of a run, or of questions of a form."""
        texts = sorted(
            str(entry.get("text")) for entry in asked.observers.log.header.programs.values()
        )
        scans = [
            (scan.quantity, scan.name, [(p.path, p.indices is None) for p in scan.tensors])
            for root in roots
            for scan in root.scans()
        ]
        shape = [
            type(x).__name__ + str(getattr(x, "how", "")) + ",".join(getattr(x, "over", ()))
            for root in roots
            for x in _all(root)
        ]
        key = sha256(repr((scans, shape, texts, sorted(prices.prices()[0].items()))).encode())
        return rates.identity("rate of a replayed question", key, 0, 0)

    def _remember(
        self, nodes: Sequence[Node], asked: Mapping[str, Asked], steps: int, seconds: float
    ) -> None:
        """Keep what a replay took, compilations left out, for the next prediction."""
        found, total = [], 0
        for stage in planning.stages(planning.replays(nodes)):
            for name in sorted({run for root in stage for run in planning.runs_of(root)}):
                mine = [root for root in stage if name in planning.runs_of(root)]
                spans = planning.spans(asked[name].catalogue.checkpoints, *planning.union(mine))
                loads = predicting.loads(asked[name], spans, mine)
                predicting.has_compiled(loads)
                total += sum(span.steps for span in spans)
                found.append((mine, asked[name], loads))
        # Of a part of the steps, or of several replays, nobody knows what each took.
        if len(found) != 1 or total != steps or steps < 8 or any(map(planning.waits, nodes)):
            return
        ((roots, one, loads),) = found
        told = predicting.seconds(loads, one, {}, set())
        learnt = predicting.learnt(told, seconds)
        for what, name in (((), "step"), (tuple(roots), "replay")):
            if name in learnt:
                key = self._rate_key(what, one)
                before = rates.recall(key).get(name)
                if before is None or abs(math.log(learnt[name] / before)) > SURE:
                    mean = math.sqrt((before or learnt[name]) * learnt[name])
                    rates.remember(key, {name: mean})


def portions(checkpoints: Sequence[int], looked: np.ndarray, workers: int) -> list[range]:
    """Cut what is looked at for several processes, at aligned blocks just after stored states.

    >>> portions([0, 100, 200, 300], np.arange(400), 2)
    [range(0, 256), range(256, 400)]
    """
    if not len(looked):
        return []
    first, last = int(looked[0]), int(looked[-1]) + 1
    edges = sorted(
        {math.ceil(c / BLOCK_STEPS) * BLOCK_STEPS for c in checkpoints if first < c < last}
    )
    edges = [edge for edge in edges if first < edge < last]
    if not edges:
        return [range(first, last)]
    chosen = {first, last}
    for k in range(1, workers):
        target = first + (last - first) * k / workers
        chosen.add(min(edges, key=lambda edge: abs(edge - target)))
    cuts = sorted(chosen)
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _sources(nodes: Sequence[Node], run: str) -> list[str]:
    """Return the other samples of a run that are looked at."""
    return sorted({x.source for node in nodes for x in node.scans() if x.source and x.run == run})


def _all(node: Node) -> list[Node]:
    return [node, *(x for child in node.children for x in _all(child))]


def _looks_back(node: Node) -> bool:
    return any(isinstance(x, Lag) for x in _all(node))


def _keys(execution: Execution, node: Node) -> list[int]:
    for this in _all(node):
        if execution.keys(this) and set(this.dims) & {"epoch", "window"}:
            return execution.keys(this)
    return []


def _catalogue(subject: Subject, way: str) -> planning.Catalogue:
    log = subject.log
    steps = log.durable.steps
    seconds = log.column("microseconds", 0, steps).astype(np.float64) * 1e-6
    # Whoever trains does not wait for a step, but for some of them together.
    together = max(min(32, len(seconds)), 1)
    blocks = seconds[: len(seconds) // together * together].reshape(-1, together).mean(1)
    each = float(np.median(blocks)) if len(blocks) else 0.0
    entry = log.header.programs.get("factors")
    names = [leaf.path for leaf in log.header.signature.grads]
    ways = dict.fromkeys(names, "scan")
    if entry is not None and way == "factored":
        table = entry.get("table") or []
        for name, row in zip(names, table, strict=False):
            if isinstance(row, dict) and row.get("way") != "none":
                ways[name] = "factored"
    return planning.Catalogue(
        subject.name,
        steps,
        log.header.signature.batch_size,
        tuple(sorted(log.durable.checkpoints)),
        float(each),
        ways,
    )


def _column(subject: Subject, name: str) -> np.ndarray:
    columns = subject.history()
    if name not in columns:
        raise QueryError(
            f"there is no column {name!r}",
            why="columns are what was logged",
            fix=f"one of {', '.join(columns)}",
        )
    return columns[name][: subject.log.durable.steps]


def _epochs(log: Log, steps: np.ndarray) -> np.ndarray:
    if log.order is None:
        raise QueryError(
            f"{log.place} has no epochs",
            why="its batches were fed, in no order that is known",
            fix="choose steps",
        )
    return np.asarray(log.order.epoch(np.asarray(steps)))


def _samples_at(log: Log, occurrences: np.ndarray) -> np.ndarray:
    found = np.full(occurrences.shape, -1, np.int32)
    known = occurrences >= 0
    if known.any():
        size = log.header.signature.batch_size
        first, last = int(occurrences[known].min()) // size, int(occurrences.max()) // size
        table = log.ids(first, last + 1).reshape(-1)
        found[known] = table[occurrences[known] - first * size]
    return found


def _address(log: Log) -> tuple[str, str | None, str, int]:
    """Return where another process finds a run, and which it is: others may come to lie there."""
    parent = None if log.parent is None else str(log.parent.place)
    return str(log.place), parent, log.identity, log.own.end
