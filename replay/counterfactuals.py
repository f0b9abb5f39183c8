"""The job of many counterfactuals: edits become batches of lanes, lanes are trained, and compared.

Every batch of lanes carries the unedited run as its control, so that an effect is the difference of
two lanes of one executable. Null lanes, spread over the batches, differ from the control by one
unit in the last place of one weight: what becomes of that is the noise that effects stand out from,
or do not.
"""

import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay.cache import Cache, budget
from replay.data import Data, check_precision, whole_numbers
from replay.edited import UNEDITED, Edited, Lane, Staging, digest_of, met, nudges
from replay.edits import Edit
from replay.effects import Changes, Counterfactuals, in_noise, largest
from replay.errors import LogError, OrderError, QueryError
from replay.identity import environment, settings_here, sha256, threads
from replay.lanes import FORMS, Functions, Lanes, Measure
from replay.log import Log
from replay.metrics import metric_of
from replay.progress import progress_bar
from replay.results import Result

MEMORY = 2**30
NULLS = 16
# More lanes in one call bring nothing on a CPU, and make the work that an interruption loses.
_WIDEST = {"map": 32, "vmap": 32}
_WIDEST_ON_ACCELERATOR = 256
_VERSION = 1


class Trained(NamedTuple):
    """What the job needs of a run.

    Attributes:
        path: where it lies.
        log: the record.
        data: the samples.
        state: returns the raw leaves of a state.
        params: makes the tree of weights from the raw leaves of a state.
        functions: returns what lanes of a form are made of.
        fork: trains a real fork, and returns the raw leaves of a state of it:
            `fork(edit, at, until)`.
    """

    path: str
    log: Log
    data: Data | None
    state: Callable[[int], Sequence[np.ndarray]]
    params: Callable[[Sequence[Any]], Any]
    functions: Callable[[str], Functions]
    fork: Callable[[Edit, int, int], Sequence[np.ndarray]]


class _Batch(NamedTuple):
    """What some lanes have come to: the control lane first.

    Attributes:
        values: the metric of each, `float64[lanes, ...]`.
        deviation: largest difference between a weight of the control lane and the run's.
    """

    values: np.ndarray
    deviation: float


def counterfactuals(
    run: Trained,
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
    cache: bool = True,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Counterfactuals:
    """Train a run anew under each of many edits; see `Run.counterfactuals`."""
    begun = time.perf_counter()
    edits = _edits(edits)
    until = run.log.durable.steps if until is None else until
    form = _checked(run, edits, at, until, nulls, seed, lanes, form)
    chosen = _chosen(confirm, len(edits))
    order, before = run.log.order, run.log.factors
    assert order is not None and run.data is not None
    edited = met(edits, order, before, at, until)
    start, recorded = list(run.state(at)), list(run.state(until))
    weights = run.log.header.signature.weights
    plan = [
        *(Lane(each, None) for each in edited),
        *(Lane(UNEDITED, each) for each in nudges(start, recorded, weights, nulls, seed)),
    ]
    workers = _workers(len(plan))
    job = _Job(run, at, until, start, recorded, form, metric, plan, workers, lanes, memory)
    kept = _cache(run) if cache and job.measure.hash is not None else None
    found = job.run(kept, progress)
    result = _result(run, job, edits, edited, found, time.perf_counter() - begun)
    if chosen is None:
        effects, _ = Counterfactuals(result, None, _changes(before, edited)).means()
        chosen = _drawn(int(confirm), effects, seed)  # type: ignore[arg-type]
    confirmed = _confirmed(run, job, edits, result, chosen, kept) if len(chosen) else None
    return Counterfactuals(result, confirmed, _changes(before, edited))


# ------------------------------------------------------------------------------------- checks


def _edits(edits: Any) -> list[Edit]:
    found = list(edits) if isinstance(edits, Iterable) else [edits]
    wrong = [each for each in found if not isinstance(each, Edit)]
    if wrong or not isinstance(edits, Iterable):
        raise QueryError(
            f"edits has {type(wrong[0]).__name__} in it" if wrong else "edits is a single edit",
            why="each counterfactual is an Edit of the run, and several are asked for at once",
            fix="edits=[replay.edits.leave_out([3])], or replay.edits.leave_one_out(range(100))",
        )
    return found


def _checked(run: Trained, edits, at: int, until: int, nulls: int, seed, lanes, form) -> str:
    """Return the form of the lanes, after refusing what has no meaning."""
    log, steps = run.log, run.log.durable.steps
    if not edits:
        raise QueryError(
            "there are no edits",
            why="a counterfactual is an edit of the run",
            fix="replay.edits.leave_one_out(range(100))",
        )
    if log.order is None:
        raise OrderError(
            f"{run.path} was fed its batches, and has no order",
            why="edits say what becomes of an order, or of samples by their ids in the data",
            fix="record it with an order: replay.record(path, program, data, order, key=key)",
        )
    if not 0 <= at < until <= steps:
        raise LogError(
            f"counterfactuals from step {at} to state {until} of a run of {steps} steps",
            why="lanes begin at a state of the run, and are compared with a later one",
            fix=f"at=0 to {max(steps - 1, 0)}, and until=at + 1 to {steps}",
        )
    if at < log.first:
        raise LogError(
            f"counterfactuals from step {at} of a fork that begins at step {log.first}",
            why="the steps before are those of its parent",
            fix=f"at={log.first}, or ask the parent: run.parent.counterfactuals(...)",
        )
    if run.data is None:
        raise LogError(
            f"{run.path} does not hold its data, and none was given",
            why="lanes are trained on the samples",
            fix=f"replay.open({run.path!r}, data=...)",
        )
    signature = log.header.signature
    check_precision((*signature.state, *signature.batch), run.path)
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise QueryError(
            f"seed={seed!r}",
            why="nudges of null lanes, and edits to confirm, are drawn by it",
            fix="seed=0, or another whole number from 0 to 2**64 - 1",
        )
    if nulls < NULLS:
        raise QueryError(
            f"{nulls} null lanes",
            why=f"the spread of fewer than {NULLS} says little of the noise",
            fix=f"nulls={NULLS} or more",
        )
    if lanes is not None and lanes < 2:
        raise QueryError(
            f"lanes={lanes}",
            why="a batch of lanes has the control lane and at least one other",
            fix="lanes=2 or more, or None to choose by memory",
        )
    form = form or ("map" if jax.default_backend() == "cpu" else "vmap")
    if form not in FORMS:
        raise QueryError(
            f"there is no form {form!r}", why="lanes are trained one by one or side by side",
            fix="form='map', form='vmap', or None for that of the platform",
        )  # fmt: skip
    return form


def _chosen(confirm: Any, count: int) -> np.ndarray | None:
    """Return the numbers of the edits to confirm; None where they depend on the effects."""
    if isinstance(confirm, int | np.integer):
        wrong = [] if 0 <= confirm <= count else [int(confirm)]
        found = None if confirm else np.zeros(0, np.int64)
    else:
        found = whole_numbers(confirm)
        wrong = [confirm] if found is None else found[(found < 0) | (found >= count)].tolist()
    if wrong:
        raise QueryError(
            f"confirm={wrong[0]!r:.60} of {count} edits",
            why="it is how many edits are run again as forks, or a sequence of their numbers",
            fix=f"confirm=0 to {count}, or numbers from 0 to {count - 1}",
        )
    return found


def _drawn(count: int, effects: np.ndarray, seed: int) -> np.ndarray:
    """Return the edits with the largest effects, and others drawn by a seed."""
    first = largest(effects)[: count // 2]
    rest = np.setdiff1d(np.arange(len(effects)), first)
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, 2**32], np.uint64)))
    return np.concatenate([first, np.sort(draw.choice(rest, count - len(first), False))])


def _workers(lanes: int) -> int:
    """Return how many batches of lanes are under way at once."""
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(os.cpu_count() or 1, threads(), lanes))


# ---------------------------------------------------------------------------------------- job


class _Job:
    """Lanes in batches, compiled."""

    def __init__(
        self,
        run: Trained,
        at: int,
        until: int,
        start: list[np.ndarray],
        recorded: list[np.ndarray],
        form: str,
        metric: Any,
        plan: Sequence[Lane],
        workers: int,
        lanes: int | None,
        memory: int,
    ):
        self.log, self.at, self.until, self.form = run.log, at, until, form
        self.start, self.recorded, self.plan, self.workers = start, recorded, plan, workers
        self.threads = threads()
        order, data = run.log.order, run.data
        assert order is not None and data is not None
        signature = run.log.header.signature
        functions = run.functions(form)
        self.metric = metric_of(metric, functions, run.log, data, run.params, until)
        own = any(lane.edited.order is not None for lane in plan)
        # As a first guess: the state before and after, and, side by side, gradients beside it.
        each = sum(leaf.nbytes for leaf in signature.state) * (2 if form == "map" else 4)
        widest = _WIDEST[form] if jax.default_backend() == "cpu" else _WIDEST_ON_ACCELERATOR
        guess = min(widest, -(-len(plan) // workers) + 1, memory // (workers * max(each, 1)))
        width = lanes or max(guess, 2)
        while True:
            self.staging = Staging(
                order, run.log.factors, data, signature,
                lanes=width, steps=until - at, own=own,
            )  # fmt: skip
            self.lanes = Lanes(functions, signature, self.staging.layout)
            if self.lanes.bytes * self.workers <= memory:
                break
            if width > 2 and lanes is None:
                width = max(2, width // 2)
            elif self.workers > 1:
                self.workers = 1
            else:
                raise QueryError(
                    f"{width} lanes take {self.lanes.bytes / 2**20:,.0f} MiB",
                    why=f"the limit is {memory / 2**20:,.0f} MiB, and a batch has at least the "
                    "control lane and one other",
                    fix=f"memory={self.lanes.bytes:_}" + ", or fewer lanes=" * (width > 2),
                )
        self.measure = Measure(
            form, self.metric.function, signature, width, self.metric.extra
        )  # fmt: skip
        self.batches = self._batches(width)

    def _batches(self, width: int) -> list[list[int]]:
        """Deal edits and null lanes out to batches, so that each has its share of both."""
        nulls = sum(lane.nudge is not None for lane in self.plan)
        edits = len(self.plan) - nulls
        places = [(i + 0.5) / edits for i in range(edits)]
        places += [(i + 0.5) / nulls for i in range(nulls)]
        spread = np.argsort(places, kind="stable")
        count = -(-len(spread) // (width - 1))
        return [part.tolist() for part in np.array_split(spread, count)]

    @property
    def width(self) -> int:
        """How many lanes a batch has at most, the control lane included."""
        return self.staging.layout.lanes

    @functools.cached_property
    def hash(self) -> str:
        """What decides the bits of all batches, besides their lanes and the environment."""
        states = [sha256(np.ascontiguousarray(x).tobytes()) for x in self.start + self.recorded]
        settings = (_VERSION, self.log.identity, self.at, self.until, self.form)
        layout, programs = self.staging.layout, (self.lanes.hash, self.measure.hash)
        return sha256(repr((settings, tuple(layout), programs, states)).encode())

    def run(self, cache: Cache | None, progress: Any) -> list[_Batch]:
        """Return what every batch has come to, those that are kept without training them again."""
        plans = [self._plan(batch) for batch in self.batches]
        found: dict[int, _Batch] = {}
        for number, plan in enumerate(plans if cache is not None else ()):
            if (kept := _recalled(cache, plan, len(self.batches[number]) + 1)) is not None:
                found[number] = kept
        missing = [n for n in range(len(plans)) if n not in found]
        done, total = sum(len(self.batches[n]) for n in found), len(self.plan)
        stopped, settings = threading.Event(), settings_here()

        def work(number: int) -> _Batch | None:
            begun = time.perf_counter()
            with settings():
                batch = self._train([self.plan[i] for i in self.batches[number]], stopped)
            if batch is not None and cache is not None:  # by the worker: whoever is interrupted
                _keep(
                    cache, plans[number], batch, time.perf_counter() - begun
                )  # keeps what is done
            return batch

        with contextlib.ExitStack() as stack:
            if callable(progress):
                report = progress
                report(done, total)
            else:
                bar = stack.enter_context(
                    progress_bar("counterfactuals", total, progress, unit="lanes")
                )
                bar(done)
                report = lambda now, total: bar(now - done)  # noqa: E731
            pool = concurrent.futures.ThreadPoolExecutor(self.workers, "replay-lanes")
            # Not only when all is well: what is under way ends, what waits does not begin.
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            stack.callback(stopped.set)
            pending = {pool.submit(work, number): number for number in missing}
            for future in concurrent.futures.as_completed(pending):
                batch = future.result()
                assert batch is not None
                found[pending[future]] = batch
                after = done + len(self.batches[pending[future]])
                report(after, total)
                done = after
        return [found[number] for number in range(len(plans))]

    def _plan(self, batch: Sequence[int]) -> str:
        return f"{self.hash} {' '.join(digest_of(self.plan[i]) for i in batch)}"

    def _train(self, lanes: Sequence[Lane], stopped: threading.Event) -> _Batch | None:
        """Train the control lane and others; None where somebody has stopped it."""
        all_lanes = [Lane(UNEDITED, None), *lanes]
        key = jnp.asarray(self.log.header.key, jnp.uint32)
        states = self._stack(all_lanes)
        for first in range(self.at, self.until, self.staging.layout.rows):
            if stopped.is_set():
                return None
            stop = min(first + self.staging.layout.rows, self.until)
            inflow = self.staging.inflow(all_lanes, first, stop)
            states = self.lanes(states, key, first, stop - first, len(all_lanes), inflow)
            jax.block_until_ready(states)
        values = self.measure(states, len(all_lanes))
        weights = self.log.header.signature.weights
        deviation = max(_difference(states[i][0], self.recorded[i]) for i in weights)
        return _Batch(values, deviation)

    def _stack(self, lanes: Sequence[Lane]) -> list[Any]:
        stacked = [np.repeat(np.asarray(leaf)[None], self.width, axis=0) for leaf in self.start]
        for number, lane in enumerate(lanes):
            if lane.nudge is not None:
                leaf, index, value = lane.nudge
                stacked[leaf].reshape(self.width, -1)[number, index] = value
        return [jnp.array(leaf, copy=True) for leaf in stacked]

    def value(self, state: Sequence[np.ndarray]) -> np.ndarray:
        """Return the metric of one state, by the executable that measures lanes."""
        stacked = [np.repeat(np.asarray(leaf)[None], self.width, axis=0) for leaf in state]
        return self.measure([jnp.asarray(leaf) for leaf in stacked], 1)[0]


def _difference(a: Any, b: Any) -> float:
    """Return the largest difference of two tensors; none where both are the same NaN."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))


# -------------------------------------------------------------------------------------- cache


def _cache(run: Trained) -> Cache | None:
    """Return where batches of lanes are kept, for what rounds as this process does."""
    limit = budget()
    if not limit:
        return None
    here = ("counterfactuals", sorted(environment().items()), np.__version__)
    return Cache(run.log.place, sha256(repr(here).encode()), limit)


def _recalled(cache: Cache | None, plan: str, lanes: int) -> _Batch | None:
    found = None if cache is None else cache.answer(plan)
    if found is None or len(found[1]) != 1 or len(found[1][0]) != lanes:
        return None
    return _Batch(found[1][0], float(found[0]["deviation"]))


def _keep(cache: Cache, plan: str, batch: _Batch, seconds: float) -> None:
    dims = ["lane", *(f"metric_{i}" for i in range(batch.values.ndim - 1))]
    cache.keep(
        plan, {"deviation": batch.deviation}, [(batch.values, dims, {})],
        about=f"counterfactuals: {len(batch.values)} lanes", seconds=seconds,
    )  # fmt: skip
    cache.flush()


# ------------------------------------------------------------------------------------- result


def _changes(before: np.ndarray, edited: Sequence[Edited]) -> Changes:
    counts = [len(each.samples) for each in edited]
    samples = np.concatenate([each.samples for each in edited])
    factors = np.concatenate([each.factors for each in edited])
    return Changes(
        np.repeat(np.arange(len(edited)), counts),
        samples,
        before[samples].astype(np.float64) - factors,
        len(before),
        tuple(each.name for each in edited if each.order is not None),
    )


def _result(
    run: Trained, job: _Job, edits: Sequence[Edit], edited: Sequence[Edited],
    found: Sequence[_Batch], seconds: float,
) -> Result:  # fmt: skip
    shape, count = job.measure.shape, len(edits)
    values, effects = np.empty((2, len(job.plan), *shape))
    for batch, numbers in zip(found, job.batches, strict=True):
        values[numbers] = batch.values[1:]
        with np.errstate(invalid="ignore"):  # of a lane that has diverged, as the run may have
            effects[numbers] = batch.values[1:] - batch.values[0]
    controls = np.stack([batch.values[0] for batch in found])
    recorded = job.value(job.recorded)
    with np.errstate(invalid="ignore"):
        noise = effects[count:].std(axis=0, ddof=1)
        deviation = float(np.max(np.abs(controls - recorded), initial=0.0))
    dims = list(map(job.metric.dim, range(len(shape))))
    nudged = [lane.nudge for lane in job.plan[count:]]
    paths = [leaf.path.partition("/")[2] for leaf in run.log.header.signature.state]
    return Result.of(
        {
            "value": (["edit", *dims], values[:count]),
            "effect": (["edit", *dims], effects[:count]),
            "effect_in_noise": (["edit", *dims], in_noise(effects[:count], noise)),
            "null_value": (["null", *dims], values[count:]),
            "null_effect": (["null", *dims], effects[count:]),
            "control": (["batch", *dims], controls),
            "recorded": (dims, recorded),
            "noise": (dims, noise),
        },
        {
            "edit": np.arange(count),
            "name": ("edit", [each.name for each in edited]),
            "tensor": ("null", [paths[x.leaf] for x in nudged if x is not None]),
            "weight": ("null", [x.index for x in nudged if x is not None]),
        },
        {
            "run": run.path,
            "at": job.at,
            "until": job.until,
            "metric": job.metric.name,
            "form": job.form,
            "lanes": job.width,
            "batches": len(job.batches),
            "control_deviation": deviation,
            "control_weight_deviation": max(batch.deviation for batch in found),
            "components": int(np.prod(shape)),
            "without_noise": int(np.count_nonzero(noise == 0)),
            "noise_not_finite": int(np.count_nonzero(~np.isfinite(noise))),
            "nulls": len(nudged),
            "nulls_felt": int((effects[count:].reshape(len(nudged), -1) != 0).any(axis=1).sum()),
            "threads": job.threads,
            "program": job.lanes.hash,
            "seconds": seconds,
        },
    )


def _confirmed(
    run: Trained,
    job: _Job,
    edits: Sequence[Edit],
    result: Result,
    chosen: np.ndarray,
    cache: Cache | None,
) -> Result:
    """Run edits again as real forks, and compare."""
    forks = []
    for number in chosen.tolist():
        plan = f"fork {job.hash} {digest_of(job.plan[number])}"
        kept = _recalled(cache, plan, 1)
        if kept is None:
            begun = time.perf_counter()
            state = run.fork(edits[number], job.at, job.until)
            kept = _Batch(job.value(state)[None], 0.0)
            if cache is not None:
                _keep(cache, plan, kept, time.perf_counter() - begun)
        forks.append(kept.values[0])
    dims = ["edit", *map(job.metric.dim, range(len(job.measure.shape)))]
    fork = np.stack(forks)
    lane = result["value"].values[chosen]
    return Result.of(
        {
            "lane": (dims, lane),
            "fork": (dims, fork),
            "difference": (dims, lane - fork),
            "effect_by_lane": (dims, result["effect"].values[chosen]),
            "effect_by_fork": (dims, fork - result["recorded"].values),
        },
        {"edit": chosen, "name": ("edit", result["name"].values[chosen])},
        {"run": run.path, "at": job.at, "until": job.until, "form": job.form},
    )
