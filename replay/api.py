"""What a researcher holds: record a training, open it later, ask for any state, audit it."""

import collections
import concurrent.futures
import dataclasses
import functools
import operator
import os
import reprlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from replay.artifact import KEY_IMPLEMENTATION, load
from replay.asking import Asking, Subject
from replay.cache import Cache
from replay.checkpoints import Checkpoints
from replay.counterfactuals import NULLS, Trained
from replay.counterfactuals import counterfactuals as train_lanes
from replay.data import Data
from replay.edits import Edit
from replay.effects import Counterfactuals
from replay.errors import Grade, LogError, OrderError, ProgramError, QueryError, printable
from replay.fork import Training, create_fork, detach
from replay.fork import train as train_on
from replay.frames import of_the_form
from replay.grads.per_sample import MEMORY
from replay.grads.reductions import Reduction, TopK
from replay.grads.stream import check
from replay.indexes import Indexes, build
from replay.indexing import NUMBERS
from replay.influence import LearningRate, states_of, tracin
from replay.lanes import Functions, archived, of_program
from replay.log import Log, thin
from replay.order import Order
from replay.program import Inputs, Program, State
from replay.progress import progress_bar
from replay.quantities import OtherSamples, Quantities
from replay.query.expressions import Expression, Joined
from replay.query.nodes import Node
from replay.recorder import Recorder
from replay.replaying import Audit, Replayer
from replay.results import Result
from replay.sample_gradients import Reduced, SampleGradients, reduce
from replay.store import Place
from replay.tracing import check_program, state_tree
from replay.tree import Leaf, lift, nest


class Step(NamedTuple):
    """One replayed step, as `Run.trajectory` yields it.

    Attributes:
        step: its number t.
        state: state t, before the step.
        batch: the examples, each leaf `[batch, ...]`.
        keys: the step's key, and the keys of its samples `[batch]`.
        losses: `[batch]`, the losses that the run itself computed, not weighted.
        grads: the batch gradient that the run itself used, shaped like `state.params`.
        ids: `int32[batch]`, the samples; -1 where a short batch was padded.
        weights: `float32[batch]`, factors of the losses.
        deviation: largest deviation from the log met so far; 0 while every bit agrees.
    """

    step: int
    state: Any
    batch: PyTree
    keys: tuple[Key[Array, ""], Key[Array, " batch"]]
    losses: Float[np.ndarray, " batch"]
    grads: PyTree
    ids: np.ndarray
    weights: np.ndarray
    deviation: float


def record(
    path: str | os.PathLike,
    program: Program,
    data: Any,
    order: Order,
    *,
    key: Key[Array, ""],
    progress: bool | None = None,
    **options: Any,
) -> "Run":
    """Train to the end of the order, and record it.

    Args:
        path: the run directory, or the URL of a TensorStore key-value store.
        program: what is trained.
        data: the samples, anything that `Data.of` takes.
        order: which samples make which batch.
        key: a typed key, `jax.random.key(seed)`.
        progress: whether to show a progress bar; by default where there is a terminal.
        **options: as for `Recorder`.

    Returns:
        The run, open.

    Raises:
        ReplayError: as `Recorder`.
    """
    source = Data.of(data)
    with Recorder(path, program, source, order, key=key, **options) as recorder:
        with progress_bar("recording", recorder.steps or 0, progress) as report:
            report(recorder.step)
            steps = 1
            while True:
                begin, before = recorder.step, time.perf_counter()
                if not recorder.advance(steps):
                    break
                report(recorder.step - begin, recorder.loss)
                # About five reports a second: asking for the loss waits for the step.
                pace = (recorder.step - begin) / max(time.perf_counter() - before, 1e-6)
                steps = max(1, min(4 * steps, int(0.2 * pace)))
    log = Log(Place(path))
    if log.header.data == "embedded":
        source = _embedded(log, source.tree)
    run = Run(log, source, tree=state_tree(program))
    run._program = program
    return run


def open(
    path: str | os.PathLike,
    *,
    program: Program | None = None,
    data: Any = None,
    allow: Sequence[str] = (),
    parent: str | os.PathLike | None = None,
) -> "Run":
    """Open a run, needing nothing of the code that recorded it.

    Args:
        path: the run directory, or the URL of a TensorStore key-value store.
        program: the program that was recorded, to get states in its own tree types; it is
            compared with the archived one.
        data: the samples, for a run that does not hold them; compared with the log.
        allow: custom calls that the archived programs may make besides those of jaxlib; name
            only what you trust.
        parent: where the parent of a fork lies, if it was moved; compared with the fork's record.

    Raises:
        LogError: there is no run, it is damaged, or it is of a newer format; or it is a fork whose
            parent is not to be found.
        IdentityError: `program` is not the recorded one.
        DataError: `data` is not the recorded data.
    """
    log = Log(Place(path), None if parent is None else Place(parent))
    source = None if data is None else Data.of(data)
    if source is not None and log.header.fingerprint is not None:
        source.check(log.header.fingerprint)
    if log.header.data == "embedded":
        source = _embedded(log, None if source is None else source.tree)
    if program is not None and source is not None:
        check_program(program, log, source)
    tree = None if program is None else state_tree(program)
    run = Run(log, source, tree=tree, allow=allow)
    run._program = program
    return run


class Run(Quantities):
    """A recorded run. Every state, batch and gradient of its past can be asked for.

    Made by `replay.open` and `replay.record`. Without the program, trees are nested dicts by
    path; the state itself always has the fields of its NamedTuple.

    Attributes:
        log: the record.
    """

    _program: Program | None = None

    def __init__(
        self,
        log: Log,
        data: Data | None,
        *,
        tree: Any,
        allow: Sequence[str] = (),
        like: Replayer | None = None,
    ):
        self.log, self._data, self._tree, self._allow = log, data, tree, tuple(allow)
        self._replayer = Replayer(log, data, allow=allow, like=like)
        self._indexes = Indexes(log)
        self._gradients: dict[int, SampleGradients] = {}
        self._audited: Grade | None = None
        self._others: list[tuple[Any, str, OtherSamples]] = []
        subject = Subject(
            self.path,
            log,
            lambda: self._replayer,
            self._of_samples,
            self.history,
            {},
            self._allow,
            portable=data is None or log.header.data == "embedded",
            indexes=lambda: self._indexes,
        )
        self.asking = Asking([subject], _work)

    def _of_samples(self, memory: int) -> SampleGradients:
        if memory not in self._gradients:  # what is compiled once serves the next question
            self._gradients[memory] = SampleGradients(self.log, allow=self._allow, memory=memory)
        return self._gradients[memory]

    @property
    def path(self) -> str:
        """Where the run lies."""
        return str(self.log.place)

    @property
    def cache(self) -> Cache:
        """What is kept of answers: `entries()` lists it, `clear()` deletes it, losing only time."""
        return Cache(self.log.place, "", 0)

    @property
    def steps(self) -> int:
        """Number of steps that can be replayed; states go from 0 to this number."""
        return self.log.durable.steps

    @property
    def dispatch(self) -> str:
        """`step` or `block`."""
        return "block" if self.log.header.signature.block else "step"

    @property
    def parent(self) -> "Run | None":
        """The run that a fork is a fork of; None for a run of its own."""
        if self.log.parent is None:
            return None
        alike = self.log.parent.header.signature == self.log.header.signature
        tree = self._tree if alike else None
        return Run(self.log.parent, self._data, tree=tree, allow=self._allow, like=self._replayer)

    @property
    def forked_at(self) -> int:
        """The first step that a fork has taken by itself; 0 for a run of its own."""
        return self.log.first

    @property
    def edit(self) -> str:
        """What a fork has changed, as it is shown; empty for a run of its own."""
        return "" if self.log.header.parent is None else self.log.header.parent.edit

    @property
    def order(self) -> Order | None:
        """The order of the samples; None for a run that was fed."""
        return self.log.order

    @property
    def data(self) -> Data | None:
        """The samples; None for a run that was fed, or that neither holds nor was given them."""
        return self._data

    @property
    def checkpoints(self) -> list[int]:
        """The states that are stored."""
        return sorted(self.log.durable.checkpoints)

    @property
    def tensors(self) -> tuple[Leaf, ...]:
        """Path, shape and dtype of every tensor of weights; paths start below `params`."""
        signature = self.log.header.signature
        weights = [signature.state[i] for i in signature.weights]
        return tuple(
            Leaf(leaf.path.partition("/")[2], leaf.shape, leaf.dtype, leaf.key) for leaf in weights
        )

    @property
    def indexes(self) -> tuple[str, ...]:
        """The levels of the indexes that there are: one recorded, others built since."""
        return self._indexes.levels

    def index(self, level: str = "rows", *, progress: bool | None = None) -> None:
        """Build an index by replaying the whole run, and keep it in the run.

        Later questions leave out what it decides; no answer changes.

        Args:
            level: `scalars`, `rows` or `weights`, as for `Recorder`.
            progress: whether to show a progress bar; by default where there is a terminal.

        Raises:
            QueryError: there is no such level.
            LogError, DataError, DivergenceError: as `trajectory`.
        """
        with progress_bar("indexing", self.steps, progress) as report:
            build(self.log, self._replayer, level, report)
        self._indexes = Indexes(self.log)

    @property
    def grade(self) -> Grade:
        """What is known without replaying: of the last `verify` of the whole run by this object.

        Before there is one, `UNAUDITED`, or `NUMERIC` if the self-test failed.
        """
        if self._audited is not None:
            return self._audited
        return Grade.NUMERIC if self.log.durable.selftest else Grade.UNAUDITED

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids of steps `[start, stop)`, `int32[steps, batch]`; -1 is padding.

        Raises:
            LogError: there are no such steps, or a file is damaged.
        """
        start, stop = _counted(start, "step"), _counted(stop, "step")
        if not 0 <= start <= stop <= self.steps:
            raise LogError(
                f"{self.path} has steps 0 to {self.steps - 1}, not {start} to {stop - 1}",
                why="ids are known of steps that were taken",
                fix=f"run.ids({max(start, 0)}, {min(max(stop, 0), self.steps)})",
            )
        return self.log.ids(start, stop)

    def history(self) -> dict[str, np.ndarray]:
        """Return the logged columns.

        Returns:
            `step`, `epoch` (`int64[steps]`, for a run with an order), `loss` (weighted batch
            means, `float32[steps]`), `seconds` (of each step, averaged over the steps that were
            dispatched together), a column for each metric of the loss's `aux`, and one for each
            name given to `Recorder.log`, NaN where nothing was logged; its entry at step t was
            logged at state t, so these columns have one entry more, for the last state. A name
            that is taken has `aux/` or `logged/` in front. A run with an index has, for each
            tensor, `grads_max/Dense_0/kernel` and likewise `grads_norm`, `updates_max` and
            `updates_norm`.
        """
        steps, log = self.steps, self.log
        columns = {"step": np.arange(steps), "loss": log.column("loss", 0, steps)}
        if self.order is not None:
            columns["epoch"] = self.order.epoch(columns["step"])
        columns["seconds"] = log.column("microseconds", 0, steps).astype(np.float64) * 1e-6
        for number, leaf in enumerate(log.header.signature.aux):
            name = leaf.path or "aux"
            name = f"aux/{name}" if name in columns else name
            columns[name] = log.column(f"aux_{number}", 0, steps)
        for leaf in self.tensors if self.indexes else ():
            found = self._indexes.scalars(leaf.path)
            for name in NUMBERS if found is not None and found.steps == steps else ():
                columns[f"{name}/{leaf.path}"] = getattr(found, name)
        taken = set(columns)
        for step, metrics in log.durable.metrics:
            for name, value in metrics.items():
                name = f"logged/{name}" if name in taken else name
                column = columns.setdefault(name, np.full(steps + 1, np.nan))
                if step < len(column):
                    column[step] = value
        return columns

    def state(self, state: int, *, exact: bool = True) -> Any:
        """Return any state of the run, re-executing the steps since the nearest stored one.

        Args:
            state: 0 to `run.steps`; negative numbers count from the end.
            exact: raise where a bit departs from the log; otherwise warn, with the deviation.

        Returns:
            The state: the program's own tree if the run was opened with `program=`, else its
            NamedTuple with nested dicts by path inside. Leaves are numpy arrays.

        Raises:
            LogError: there is no such state, or a file it needs is damaged.
            DivergenceError: the replay departs from the run.
        """
        state = _counted(state, "state")
        number = state + self.steps + 1 if state < 0 else state
        return self._lift(self._replayer.state(number, exact=exact))

    def states(self, states: slice, *, exact: bool = True) -> Iterator[tuple[int, Any]]:
        """Yield `(t, state t)` for a slice of states, in one replay.

        Args:
            states: which; its step may be larger than one.
            exact: raise where a bit departs from the log; otherwise warn, and go on from each
                stored state.

        Raises:
            LogError, DivergenceError: as `state`.
        """
        wanted = range(*states.indices(self.steps + 1))
        if wanted.step < 0:
            raise OrderError(
                f"states {states} run backwards",
                why="a replay goes forwards",
                fix="ask for them in ascending order",
            )
        if not wanted:
            return
        first, last = wanted[0], wanted[-1]
        if first == last:
            yield first, self.state(first, exact=exact)
            return
        for replayed in self._replayer.steps(first, last, exact=exact):
            executed = replayed.executed
            if executed.start in wanted:
                yield executed.start, self._lift(executed.before)
            if executed.start + 1 == last:
                yield last, self._lift(executed.after)

    def trajectory(
        self, start: int = 0, stop: int | None = None, *, exact: bool = True
    ) -> Iterator[Step]:
        """Replay steps `[start, stop)` and yield each, from the nearest stored state.

        What is done with a step never feeds the trajectory. Witnesses are compared at every
        step, digests at every stored state on the way.

        Args:
            start: the first step.
            stop: the step after the last; all by default.
            exact: raise where a bit departs from the log; otherwise go on from each stored
                state, and tell the deviation with each step.

        Raises:
            LogError, DataError: a file or a batch is not what it was.
            DivergenceError: the replay departs from the run.
        """
        start = _counted(start, "step")
        stop = self.steps if stop is None else _counted(stop, "step")
        for replayed in self._replayer.steps(start, stop, exact=exact):
            executed = replayed.executed
            key = jnp.asarray(self.log.origin(executed.start).header.key, jnp.uint32)
            run_key = jax.random.wrap_key_data(key, impl=KEY_IMPLEMENTATION)
            inputs = _fold(run_key, np.uint32(executed.start), replayed.ids, replayed.weights)
            yield Step(
                step=executed.start,
                state=self._lift(executed.before),
                batch=self._batch(replayed.batch),
                keys=(inputs.key, inputs.sample_keys),
                losses=np.asarray(executed.losses),
                grads=self._grads(executed.grads),
                ids=replayed.ids,
                weights=replayed.weights,
                deviation=replayed.deviation,
            )

    def reduce(
        self,
        *reductions: Reduction,
        steps: slice | None = None,
        strategy: str = "auto",
        memory: int = MEMORY,
        exact: bool = True,
        progress: bool | None = None,
    ) -> Reduced:
        """Reduce the gradients of every sample at the weights it was trained at, in one replay.

        Nothing is written to disk, and nothing feeds the trajectory; the gradients are computed by
        the run's own archived programs.

        Args:
            *reductions: of `replay.reductions`, any number of them.
            steps: which steps, without a stride; all by default.
            strategy: `factored`, `scan` (one sample after the other), or `auto`: the one that was
                measured to be faster on this machine.
            memory: bytes that gradients may take before they are reduced.
            exact: raise where the trajectory departs from the log; otherwise report it.
            progress: whether to show a progress bar; by default where there is a terminal.

        Raises:
            ProgramError: the run holds no program for the gradient of one sample.
            LogError, DataError, DivergenceError: as `trajectory`.

        Example:
            >>> found = run.reduce(replay.reductions.TopK(3), steps=slice(0, 100))  # doctest: +SKIP
            >>> values, occurrences = found.answers[0]  # doctest: +SKIP
            >>> run.samples_at(occurrences["Dense_0"]["kernel"])  # doctest: +SKIP
        """
        check(reductions)
        wanted = self._neighbours(steps)
        with progress_bar("reducing", len(wanted), progress) as report:
            found = reduce(
                self._replayer,
                self._of_samples(memory),
                reductions,
                wanted,
                strategy=strategy,
                exact=exact,
                progress=report,
            )
        pairs = zip(reductions, found.answers, strict=True)
        return found._replace(answers=tuple(self._answer(*pair) for pair in pairs))

    def tracin(
        self,
        source: Any,
        *,
        learning_rate: LearningRate,
        steps: slice | None = None,
        checkpoints: Sequence[int] | None = None,
        samples: Any = None,
        self_influence: bool = False,
        strategy: str = "factored",
        memory: int = MEMORY,
        exact: bool = True,
        progress: bool | None = None,
    ) -> Result:
        """Score how much training on each sample lowered the loss of each other one.

        TracIn in its idealised form (Pruthi et al., 2020): for sample i and other sample j the sum,
        over the steps t that visited i, of `lr_t * w_i / B * <grad l_i, grad l_j>`, with both
        gradients at the exact weights of state t and each sample's own key of that step. Where a
        score is positive, i lowered the loss of j. It is of first order, and made for plain
        gradient descent: momentum, Adam and weight decay have no part in it. Products are float32,
        their sums float64. With `batched=True` the loss of j is that in a batch of others, the last
        of which is filled up with the first sample of them.

        Args:
            source: the others, such as a test set: anything that `Data.of` takes.
            learning_rate: a number; `float[steps of the run]`, one for each step; or a function of
                the step, such as the schedule that the optimizer was given.
            steps: which steps, without a stride; all by default.
            checkpoints: states, instead of steps: the usual approximation (TracInCP), where each
                state counts as one visit of every sample, with weight 1 and `lr_t / B`.
            samples: ids of the samples to score; by default all that are visited.
            self_influence: whether to add `self_influence`, each sample's score for itself at the
                moment of its visits: `lr_t * w_i / B * |grad l_i|^2`, summed.
            strategy: of gradients: `factored` where a tensor has factors, or `scan`.
            memory: bytes that the scores may take, and gradients of tensors without factors.
            exact: raise where the trajectory departs from the log; otherwise tell it as the grade.
            progress: whether to show a progress bar; by default where there is a terminal.

        Returns:
            `value float64[sample, test]`, with the ids as coordinates; `visits int64[sample]`, how
            often each was seen; and `attrs` with rule, grade, learning rate and seconds.

        Raises:
            ProgramError: the run holds no program for the gradient of one sample.
            QueryError: a learning rate, a state or a sample that has no meaning.
            OrderError: no step is left.
            LogError, DataError, DivergenceError: as `trajectory`.

        Example:
            >>> scores = run.tracin(test, learning_rate=0.1)  # doctest: +SKIP
            >>> scores["value"].sel(test=3).to_series().nlargest(10)  # doctest: +SKIP
            >>> norms = run.sample_grads.norm("weight")  # a score of its own  # doctest: +SKIP
            >>> norms.groupby("sample").sum().compute()  # doctest: +SKIP
        """
        return tracin(
            self.log,
            self._replayer,
            self._of_samples(memory),
            self._data,
            of_the_form(self.log, source),
            learning_rate=learning_rate,
            steps=self._neighbours(steps),
            states=None if checkpoints is None else self._states(checkpoints, steps),
            samples=samples,
            own=self_influence,
            way=strategy,
            memory=memory,
            exact=exact,
            progress=progress,
        )

    def _states(self, checkpoints: Sequence[int], steps: slice | None) -> list[int]:
        """Return states in rising order, to look at all samples in."""
        if steps is not None:
            raise QueryError(
                "both steps and checkpoints are given",
                why="at a checkpoint all samples are looked at, whichever step visits them",
                fix="one of the two",
            )
        return states_of(checkpoints, self.steps)

    def _neighbours(self, steps: slice | None) -> range:
        """Return steps that follow each other."""
        start, stop, stride = (steps or slice(None)).indices(self.steps)
        if stride != 1 or stop <= start:
            raise OrderError(
                f"steps {steps} of a run of {self.steps}",
                why="samples are reduced in the order in which they were trained on",
                fix="a slice of at least one step, without a stride",
            )
        return range(start, stop)

    def map(
        self,
        function: Callable[[Step], Any],
        *,
        steps: slice | None = None,
        exact: bool = True,
        progress: bool | None = None,
    ) -> Any:
        """Return what a JAX function makes of each replayed step, stacked.

        Args:
            function: of a `Step`, jitted; returns arrays, or a tree of them.
            steps: which; all by default.
            exact: raise where the replay departs from the run.
            progress: whether to show a progress bar; by default where there is a terminal.

        Returns:
            A tree of numpy arrays with a leading axis of steps.

        Example:
            `run.map(lambda s: jnp.linalg.norm(s.grads["Dense_0"]["kernel"], ord=2))`
        """
        found: list[Any] = []

        def add(_, step):
            found.append(jax.tree.map(np.asarray, jitted(step)))

        jitted = jax.jit(function)
        self._visit(add, None, steps, exact, progress)
        return jax.tree.map(lambda *parts: np.stack(parts), *found) if found else None

    def fold(
        self,
        function: Callable[[Any, Step], Any],
        init: Any,
        *,
        steps: slice | None = None,
        exact: bool = True,
        progress: bool | None = None,
    ) -> Any:
        """Return what `state = function(state, step)` has come to after all replayed steps.

        Args:
            function: of a state, any tree of arrays, and a `Step`; jitted.
            init: the state before the first step.
            steps: which; all by default.
            exact: raise where the replay departs from the run.
            progress: whether to show a progress bar; by default where there is a terminal.
        """
        return self._visit(jax.jit(function), init, steps, exact, progress)

    def _visit(self, function: Callable, state: Any, steps: Any, exact: bool, progress: Any) -> Any:
        wanted = range(*(steps or slice(None)).indices(self.steps))
        if wanted.step < 1:
            raise OrderError(
                f"steps {steps} run backwards",
                why="a replay goes forwards",
                fix="a slice with a positive stride",
            )
        if not wanted:
            return state
        with progress_bar("replaying", len(wanted), progress) as report:
            for step in self.trajectory(wanted[0], wanted[-1] + 1, exact=exact):
                if step.step in wanted:
                    state = function(state, step)
                    report(1)
        return state

    def sql(
        self,
        text: str,
        *,
        tables: Mapping[str, Any] | None = None,
        runs: "Mapping[str, Run] | None" = None,
        sources: Mapping[str, Any] | None = None,
        parameters: Any = None,
        limit_rows: int = 1_000_000,
        **options: Any,
    ) -> Any:
        """Answer a statement of SQL, in DuckDB's dialect.

        Tables are the quantities, with a column for each dimension (`step` or `state`, `epoch`,
        `position`, `sample`, `tensor`, `weight`) and `value`; see `docs/sql.md`. What can be
        reduced along a replay is, in one replay; DuckDB runs the rest on what is left.

        Args:
            text: one `SELECT`.
            tables: other tables by name: of Arrow, pandas or polars, or dicts of columns.
            runs: other runs by name, as in `FROM a.weights`.
            sources: other samples by name, as in `FROM test.sample_losses` or
                `FROM a.test.sample_losses`: anything that `run.on` takes.
            parameters: values of `?` and `$1`, or of `$name` by name.
            limit_rows: how many rows may be read one by one, where nothing reduces them.
            **options: as for `replay.compute`.

        Returns:
            A `Table`: `.rows`, `.df()`, `.to_arrow()`, `.attrs` with plan, grade and the SQL that
            DuckDB ran.

        Raises:
            QueryError: a table or a column does not exist, too many rows would be read, or the
                extra `sql` is not installed.
            LogError, DataError, DivergenceError: as `trajectory`.

        Example:
            `run.sql("SELECT tensor, sum(abs(value)) AS path FROM updates GROUP BY tensor").df()`
        """
        front = _sql()
        session = self._session(front, tables, runs, sources, limit_rows, options)
        return front.ask(session, text, parameters)

    def explain_sql(
        self,
        text: str,
        *,
        tables: Mapping[str, Any] | None = None,
        runs: "Mapping[str, Run] | None" = None,
        sources: Mapping[str, Any] | None = None,
        parameters: Any = None,
        limit_rows: int = 1_000_000,
        **options: Any,
    ) -> str:
        """Tell what a statement asks of the run and what that takes; nothing is replayed.

        Args: as for `sql`.
        """
        front = _sql()
        session = self._session(front, tables, runs, sources, limit_rows, options)
        return front.explain(session, text, parameters)

    def _session(self, front: Any, tables, runs, sources, limit_rows: int, options) -> Any:
        given = {"": self, **(runs or {})}
        homes: dict[int, Any] = {}
        for run in given.values():
            if id(run) not in homes:
                others = {name: run._known_as(x, name) for name, x in (sources or {}).items()}
                homes[id(run)] = front.Home(run, others)
        named = {name: homes[id(run)] for name, run in given.items()}
        return front.Session(named, tables or {}, limit=limit_rows, options=options)

    def _known_as(self, source: Any, name: str) -> OtherSamples:
        """Return other samples, the same object for the same source, so that plans stay equal."""
        if isinstance(source, OtherSamples):
            return source
        for known, called, found in self._others:
            if known is source and called == name:
                return found
        self._others.append((source, name, self.on(source, name=name)))
        return self._others[-1][2]

    def samples_at(self, occurrences: Any) -> np.ndarray:
        """Return the sample ids of occurrences (step · batch size + position); -1 stays -1."""
        occurrences = np.asarray(occurrences)
        ids = np.full(occurrences.shape, -1, np.int32)
        known = occurrences >= 0
        if known.any():
            size = self.log.header.signature.batch_size
            first = int(occurrences[known].min()) // size
            last = int(occurrences.max()) // size
            table = self.ids(first, last + 1).reshape(-1)
            ids[known] = table[occurrences[known] - first * size]
        return ids

    def verify(
        self, steps: int | slice | range | None = None, *, progress: bool | None = None
    ) -> Audit:
        """Replay all or part of the run; compare the losses of each step and all stored states.

        They are compared bit for bit. What a replay does not need is not read: the logged means,
        metrics and times, and programs other than that of the step.

        Args:
            steps: a step, or a slice or range of steps; whole segments are audited, and negative
                numbers count from the end. None for all.
            progress: whether to show a progress bar; by default where there is a terminal.

        Returns:
            The grade of every segment, where the replay departs from the run, and what differs
            in the machine.

        Raises:
            LogError: there are no such steps.
        """
        start, stop = (0, max(self.steps, 1)) if steps is None else self._bounds(steps)
        edges = sorted({*self.log.durable.checkpoints, self.steps})
        total = sum(b - a for a, b in zip(edges, edges[1:], strict=False) if b > start and a < stop)
        begun = time.perf_counter()
        if total == self.steps:
            self._audited = None  # of what is read now, nothing is known yet
        with progress_bar("replaying", total, progress) as report:
            segments = self._replayer.audit(start, stop, report)
        audit = Audit(
            run=self.path,
            segments=tuple(segments),
            steps=sum(segment.stop - segment.start for segment in segments),
            seconds=time.perf_counter() - begun,
            differences=self._replayer.differences,
            complete=total == self.steps,
            damage=tuple(self.log.damage()) if total == self.steps else (),
        )
        if audit.complete and audit.grade in (Grade.BITWISE, Grade.NUMERIC):
            self._audited = audit.grade
        return audit

    def fork(
        self,
        path: str | os.PathLike,
        edit: Edit | None = None,
        *,
        at: int,
        train: bool = True,
        until: int | None = None,
        checkpoints: Checkpoints | int | None = None,
        progress: bool | None = None,
        **changes: Any,
    ) -> "Run":
        """Train on from a past state with one thing changed: what would have happened?

        The fork is a run of its own, which shares the log of this one up to state `at` by
        reference (nothing is copied) and keeps what differs. Edits of the order and of sample
        weights run this run's own programs; without an edit the fork repeats it bit for bit.
        Logged means are weighted, so that leaving out samples of large loss lowers the logged curve
        by itself: compare forks by `sample_losses`, or on other samples.

        Args:
            path: where the fork is to lie; not in this run.
            edit: what is changed; or its fields by name: `order=`, `sample_weights=`, `optimizer=`,
                `key=`, `params=`, as for `replay.edits.Edit`.
            at: the first step that may be another, from 0 to `run.steps`.
            train: take the remaining steps now; otherwise `resume` does.
            until: a state to stop at; the end of the order by default.
            checkpoints: as for `Recorder`; by default as far apart as in this run.
            progress: whether to show a progress bar; by default where there is a terminal.
            **changes: the fields of an `Edit`.

        Returns:
            The fork, open.

        Raises:
            OrderError: the run has no such state, or the order does not agree with it before `at`.
            DataError: weights of samples that do not exist, or do not occur from `at` on.
            ProgramError: an optimizer whose state does not fit, weights of other shapes.
            LogError: the path is taken.

        Example:
            `run.fork("runs/b", at=280, order=lambda order: order.reversed(9))`
        """
        edit = _edit(edit, changes)
        place = Place(path)
        tree = create_fork(
            self.log,
            self._replayer,
            place,
            at,
            edit,
            tree=self._tree,
            allow=self._allow,
            training=Training(self._data, until, checkpoints) if train else None,
        )
        log = Log(place, self.log.place)
        source = self._data
        if log.header.data == "embedded":
            source = _embedded(log, None if source is None else source.tree)
        fork = Run(log, source, tree=tree, allow=self._allow, like=self._replayer)
        # Another optimizer makes another program, of which nobody has the code.
        grafted = edit.optimizer is not None and not isinstance(edit.optimizer, Mapping)
        fork._program = None if grafted else self._program
        if train:
            fork.resume(until=until, checkpoints=checkpoints, progress=progress)
        return fork

    def counterfactuals(
        self,
        edits: Sequence[Edit],
        *,
        at: int = 0,
        until: int | None = None,
        metric: Any = None,
        lanes: int | None = None,
        memory: int = MEMORY,
        confirm: int | Sequence[int] = 0,
        nulls: int = NULLS,
        seed: int = 0,
        form: str | None = None,
        exact: bool = True,
        cache: bool = True,
        progress: bool | Callable[[int, int], None] | None = None,
    ) -> Counterfactuals:
        """Train the rest of the run anew under each of many edits: what did each of them matter?

        Edits become lanes, and lanes are trained in batches. Every batch carries the unedited run
        as its control lane, and effects are differences to it. Null lanes, spread over the batches,
        differ from it by one unit in the last place of one weight at state `at`, drawn by `seed`
        among those that are not 0: their spread is the noise that `effect_in_noise` is told in.

        There are two forms. On a CPU lanes are trained one after the other, in one call for each
        batch of them, by the archived programs of the run (`map`): for most models with the very
        bits that a fork has. Elsewhere they are trained side by side (`vmap`), with bits of their
        own, and the run has to be opened with `program=`, as archived programs support no `vmap`.
        How far the control lanes end from the run is in `attrs` of the answer.

        What each batch of lanes has come to is kept in the run's cache: the same call goes on where
        it was interrupted, to the same numbers.

        Args:
            edits: of the order and of sample weights; `run.fork` takes others.
            at: the first step that may be another.
            until: the state at which all are compared; the last by default.
            metric: `metric(params) -> scalar or array`, a JAX function; or samples, such as a test
                set, for the loss of each, with the key that it has at state `until`. By default the
                mean loss of at most 1,024 samples of the training data, evenly spread.
            lanes: in a batch, the control lane included; by default as many as are fast and fit.
            memory: bytes that the batches which are under way at once may take.
            confirm: how many of the edits to run again as real forks: those with the largest
                effects to one half, the rest drawn by `seed`; or a sequence of their numbers.
            nulls: how many null lanes, at least 16.
            seed: of what is drawn.
            form: `map` or `vmap`, if not that of the platform.
            exact: raise where the replay of state `at` or `until` departs from the log.
            cache: keep batches of lanes in the run, and take them from there.
            progress: whether to show a progress bar; or `progress(lanes done, lanes in all)`,
                called after each batch.

        Returns:
            Value, effect and effect in units of noise of each edit; `top`, `lds`, `plot`.

        Raises:
            QueryError: an edit of what lanes share, or an option that has no meaning.
            OrderError, DataError: an edit that does not fit the run; the message names it.
            ProgramError: with `vmap`, the run was opened without `program=`; or the program cannot
                tell losses, and there is no `metric`.
            LogError, DivergenceError: as `state`.

        Example:
            `run.counterfactuals(replay.edits.leave_one_out(range(500)), metric=test).top(10)`
        """
        trained = Trained(
            self.path,
            self.log,
            self._data,
            lambda state: self._replayer.state(state, exact=exact),
            lambda raw: self._lift(raw).params,
            self._functions,
            self._forked,
        )
        return train_lanes(
            trained,
            edits,
            at=at,
            until=until,
            metric=metric,
            lanes=lanes,
            memory=memory,
            confirm=confirm,
            nulls=nulls,
            seed=seed,
            form=form,
            cache=cache,
            progress=progress,
        )

    def _functions(self, form: str) -> Functions:
        """Return what lanes are made of."""
        signature = self.log.header.signature
        if form == "map":
            names = self.log.header.programs
            return archived(
                lambda name: load(name, self.log.program(name), signature, allow=self._allow),
                signature,
                names,
            )
        if self._program is None:
            raise ProgramError(
                f"{self.path} was opened without its program",
                why="lanes side by side are made by vmap, which archived programs do not support",
                fix=f"replay.open({self.path!r}, program=program); on a CPU also form='map'",
            )
        return of_program(self._program, self._lift, self._batch)

    def _forked(self, edit: Edit, at: int, until: int) -> Sequence[np.ndarray]:
        """Return the raw leaves of a state of a fork that is trained for it alone."""
        with tempfile.TemporaryDirectory() as folder:
            fork = self.fork(os.path.join(folder, "fork"), edit, at=at, until=until, progress=False)
            return fork._replayer.state(until)

    def resume(
        self,
        *,
        until: int | None = None,
        checkpoints: Checkpoints | int | None = None,
        on_log_error: str = "warn",
        progress: bool | None = None,
    ) -> None:
        """Take the steps that are left, by the archived programs: the code is not needed.

        For forks, and for any run whose recording ended before its order. Expressions made before
        know nothing of the new steps.

        Args:
            until: a state to stop at; the end of the order by default.
            checkpoints: as for `Recorder`; by default as far apart as they are.
            on_log_error: as for `Recorder`.
            progress: whether to show a progress bar; by default where there is a terminal.

        Raises:
            OrderError: the run was fed, or has no such state.
            DataError: the run does not hold its data, and was not given it.
            LogError: somebody else records it, or it cannot be written.
        """
        order = self.order
        total = 0 if order is None else (len(order) if until is None else until) - self.steps
        with progress_bar("training", max(total, 0), progress) as report:
            try:
                training = Training(self._data, until, checkpoints)
                train_on(self.log, self._replayer, training, on_log_error, report)
            finally:
                self._reopen()

    def _reopen(self) -> None:
        """Read again what the journal vouches for; who was asked before knows what it knew."""
        parent = None if self.log.parent is None else self.log.parent.place
        log = Log(self.log.place, parent)
        self.__init__(log, self._data, tree=self._tree, allow=self._allow, like=self._replayer)

    def detach(self) -> int:
        """Copy into a fork what it needs of its parent; return the bytes that were copied.

        Raises:
            LogError: it is no fork, or cannot be written.
        """
        copied = detach(self.log)
        log = Log(self.log.place)  # whose parent is now looked for inside of it
        self.__init__(log, self._data, tree=self._tree, allow=self._allow, like=self._replayer)
        return copied

    def thin(self, keep: int) -> list[int]:
        """Give up stored states, so that about `keep` evenly spread ones are left.

        No answer is lost: states between are replayed, which takes longer.

        Returns:
            The states that are no longer stored.

        Raises:
            LogError: somebody is recording the run.
        """
        if keep < 2:
            raise LogError(
                f"{keep} states are to be kept",
                why="the first and the last state are always kept",
                fix="keep=2 or more",
            )
        with self.log.place.lock():
            # Others may have thinned, or recorded on, since this run was opened.
            self._reopen()
            stored = self.checkpoints
            targets = np.linspace(0, self.steps, keep)
            nearest = {min(stored, key=lambda s, t=target: abs(s - t)) for target in targets}
            dropped = thin(self.log, sorted(nearest))
            self._reopen()
            return dropped

    def __repr__(self) -> str:
        weights = sum(int(np.prod(leaf.shape)) for leaf in self.tensors)
        header, durable = self.log.header, self.log.durable
        state = "closed" if durable.closed else "not closed"
        indexed = f", index of {' and '.join(self.indexes)}" if self.indexes else ""
        forked = f"fork at step {self.forked_at:,} ({self.edit}), " if self.edit else ""
        return printable(
            f"<Run {self.path}: {header.name}, {forked}{self.steps:,} steps ({state}), "
            f"{weights:,} weights in {len(self.tensors)} tensors, "
            f"{len(durable.checkpoints)} stored states{indexed}, {self.grade}>"
        )

    def _bounds(self, steps: int | slice | range) -> tuple[int, int]:
        """Return the first of some steps, and the step after the last."""
        asked = str(steps)
        if isinstance(steps, slice):
            asked = ":".join("" if x is None else str(x) for x in (steps.start, steps.stop))
            steps = range(*steps.indices(self.steps))
        elif not isinstance(steps, range):
            steps = range(operator.index(steps), operator.index(steps) + 1)
        there = bool(steps) and -self.steps <= min(steps) and max(steps) < self.steps
        if not there:
            raise LogError(
                f"{self.path} has {f'steps 0 to {self.steps - 1}' * bool(self.steps) or 'no steps'}"
                f", not {asked}",
                why="an audit that compares nothing establishes nothing",
                fix="run.verify() audits all there is, run.verify(-1) the end of it",
            )
        numbers = [number + self.steps * (number < 0) for number in steps]
        return min(numbers), max(numbers) + 1

    def _lift(self, raw: Sequence[Any]) -> Any:
        leaves = self.log.header.signature.state
        lifted = lift(raw, leaves, self._tree)
        if self._tree is not None or not isinstance(lifted, dict):
            return lifted
        if set(lifted) <= set(State._fields):
            return State(**{name: lifted.get(name, {}) for name in State._fields})
        return _namedtuple(tuple(lifted))(*lifted.values())

    def _batch(self, leaves: Sequence[np.ndarray]) -> Any:
        if self._data is not None and self._data.tree is not None:
            return jax.tree.unflatten(self._data.tree, leaves)
        return nest([leaf.path for leaf in self.log.header.signature.batch], leaves)

    def _answer(self, reduction: Reduction, answer: Any) -> Any:
        if not isinstance(answer, list):
            return answer
        if isinstance(reduction, TopK):
            return tuple(self._grads(part) for part in zip(*answer, strict=True))
        return self._grads(answer)

    def _grads(self, leaves: Sequence[Any]) -> Any:
        if self._tree is not None:
            blank = jax.tree.unflatten(self._tree, self.log.header.signature.state)
            return jax.tree.unflatten(jax.tree.structure(blank.params), leaves)
        return nest([leaf.path for leaf in self.log.header.signature.grads], leaves)


def compute(
    *expressions: Expression | Joined,
    progress: bool | None = None,
    memory: int = MEMORY,
    executor: concurrent.futures.Executor | None = None,
    exact: bool = True,
    strategy: str = "factored",
    cache: bool = True,
    index: bool = True,
) -> list[Result]:
    """Answer several questions in one replay.

    An answer has the same bits whether it is asked for alone or together with others.

    Args:
        *expressions: the questions, of one run or of several, also such that were joined.
        progress: whether to show a progress bar; by default where there is a terminal.
        memory: bytes that an answer may take, and a batch's multiplied-out gradients of a tensor.
        executor: replays parts, cut at stored states; here by default. Its processes open the run
            by its path, so its data must lie in the run.
        exact: raise where a replay departs from its run; else it is told as the grade.
        strategy: of per-sample gradients: `factored` where a tensor has factors, or `scan`.
        cache: whether answers, and the states of aligned cells of steps that they were put together
            from, are kept in the run and taken from there; `REPLAY_CACHE_BYTES` bounds them.
        index: leave out of the replay what the indexes of a run decide; no answer depends on it.

    Raises:
        QueryError: the answer is too large, or has no meaning.
        LogError, DataError, DivergenceError: as `Run.trajectory`.
    """
    if not expressions:
        return []
    parts = [x.parts if isinstance(x, Joined) else {"": x} for x in expressions]
    each = [part for named in parts for part in named.values()]
    asking = functools.reduce(lambda a, b: a.joint(b), (x.source for x in each))
    answers = asking.compute(
        *each,
        progress=progress,
        memory=memory,
        executor=executor,
        exact=exact,
        strategy=strategy,
        cache=cache,
        index=index,
    )
    left = iter(answers)
    found = [{name: next(left) for name in named} for named in parts]
    return [
        Result.beside(named) if isinstance(x, Joined) else named[""]
        for x, named in zip(expressions, found, strict=True)
    ]


def _edit(edit: Edit | None, changes: Mapping[str, Any]) -> Edit:
    known = [field.name for field in dataclasses.fields(Edit)]
    strange = sorted(set(changes) - set(known))
    if strange or (edit is not None and changes):
        raise OrderError(
            f"a fork has no {', '.join(strange)}" if strange else "a fork was given two edits",
            why=f"an edit changes {', '.join(known[:-1])}",
            fix="run.fork(path, at=0, order=...), or run.fork(path, edit, at=0)",
        )
    return Edit(**changes) if edit is None else edit


def _sql() -> Any:
    """Return the front end of SQL, which is an extra."""
    try:
        from replay.query.sql import session
    except ImportError as error:
        raise QueryError(
            f"{error.name} is not installed",
            why="SQL is parsed by sqlglot, and what is left of it is run by DuckDB through Arrow",
            fix="pip install 'jax-replay[sql]', or ask by expressions: run.updates.sum('step')",
        ) from error
    return session


@functools.lru_cache(maxsize=4)
def _opened(address: tuple[str, str | None, str, int], allow: tuple[str, ...]) -> Run:
    path, parent, *_ = address  # the rest tells a run from what has been at its path before
    return open(path, parent=parent, allow=allow)


def _work(
    address: tuple[str, str | None, str, int],
    allow: tuple[str, ...],
    nodes: Sequence[Node],
    within: range,
    options: dict[str, Any],
) -> Any:
    """Replay a part of a question in another process."""
    return _opened(address, allow).asking.part(nodes, within, options)


def _counted(number: Any, what: str) -> int:
    """Return the number of a state or step.

    Raises:
        LogError: it is no whole number.
    """
    try:
        return operator.index(number)
    except TypeError:
        raise LogError(
            f"{what} {reprlib.repr(number)} is asked for",
            why="states and steps are counted: state t is that before step t",
            fix="a whole number, of any type",
        ) from None


@jax.jit
def _fold(run_key, step, ids, weights):
    return Inputs.fold(run_key, step, ids, weights, ())


@functools.cache
def _namedtuple(fields: tuple[str, ...]) -> Any:
    """Make the class of a state from the names of its fields, which a record has given."""
    return collections.namedtuple("State", fields, rename=True)


def _embedded(log: Log, tree: Any) -> Data:
    """Return the data that lies in a run, read when it is first asked for."""
    loaded: list[np.ndarray] = []

    def read(ids: np.ndarray) -> list[np.ndarray]:
        if not loaded:  # taken as they are: they may have 64 bits, which JAX need not keep here
            loaded.extend(log.embedded())
        return [array.take(ids, axis=0) for array in loaded]

    samples = log.header.arrays["data"][0].shape[0]
    return Data(log.header.signature.batch, tree, samples, read)
