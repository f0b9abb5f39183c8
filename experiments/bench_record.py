"""What recording a training costs, and how long it takes to go back into it.

Question: can recording be left on? Against loops that a good user would write by hand, and against
orbax saving as often: time of a step, stall at a checkpoint, memory, bytes of log. And afterwards:
how long does it take to open a run, and to reach one of its states?

Command:  python experiments/bench_record.py            writes results/bench_record.json
          python experiments/bench_record.py --quick    runs all of it for a moment, writes nothing
          python experiments/bench_record.py --only stalls memory
                                                           measures these sections again
Expected: the result says which of these targets are met. Step dispatch takes at most 1.10, 1.02
          and 1.01 times a hand-written step of 2, 10 and 100 ms; block dispatch at most 0.9 times
          one of 0.1 ms, and 1.15 times a hand-written scan. A checkpoint stalls the loop for 2 ms;
          memory grows by a copy of the state and 64 MB; the log by 16 bytes a step and by the
          entropy of the sample ids and 15%. Going back takes 1.2 times the training, opening a
          run 200 ms.
Run time: 15 to 30 minutes on two cores, --quick 3 minutes; nothing else should run meanwhile.

The loops that are compared:
  jit    one jitted and donated step; a thread gathers numpy batches, two chunks of 64 steps ahead;
         nothing waits for a step, no loss is kept
  scan   the same step in a compiled loop over 64 staged batches
  step   `replay.Recorder` as it is by default, dispatched step by step
  block  the same with `dispatch="block"`
  orbax  `jit`, saved by orbax's `AsyncCheckpointer` (OCDBT) whenever `step` stores a state

How it is measured. Machines are noisy, so figures of different minutes are never compared: blocks
of steps of all loops alternate in one process, and a ratio is the median of the ratios of
neighbouring blocks, with a bootstrap interval of 95%. Where its memory happens to lie makes a loop
some percent faster in one process than in another: long steps are timed in several, which are
drawn like the blocks. Between blocks the process comes to rest, so that nobody pays for another's
background work, and each block ends with a copy of the state that is waited for
(`recorder.state`; the other loops make one too). Blocks in which a checkpoint falls count like any
other. `sums` is the ratio of the sums of all blocks, in which a rare checkpoint has its full
weight, and `processor` the ratio of processor time, background work included. A target is met
where the upper end of the interval meets it.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import replay

# orbax tells at every save that arrays of one device have no sharding to speak of.
logging.getLogger("absl").setLevel(logging.ERROR)

RESULT = pathlib.Path(__file__).parent / "results" / "bench_record.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model in training, and what its steps are compared with.

    Attributes:
        model: `mlp`, `cnn` or `transformer`.
        widths: of its layers.
        batch: samples in a batch.
        side: images have `side` x `side` pixels, 8 or 28.
        interval: steps between two stored states: what a recorder chooses by default for a run
            of 20 times as many steps.
        block: steps in a timed block.
        rounds: how many blocks of each loop are timed in a process.
        processes: how many there are, with the loops opened in turn: where its memory happens to
            lie makes a loop some percent faster in one process than in another.
        loops: which loops.
        limits: `(loop, compared with, largest ratio)`.
    """

    model: str
    widths: tuple[int, ...]
    batch: int
    side: int
    interval: int
    block: int
    rounds: int
    loops: tuple[str, ...] = ("jit", "step", "orbax")
    limits: tuple[tuple[str, str, float], ...] = ()
    processes: int = 1


CASES = {
    # Long for its steps: of a run of 10,000, twenty states would have to be written in half a
    # second. One is stored in the middle of each block, which sees it written, too.
    "0.1 ms": Case(
        "mlp", (128, 64), 64, 8, interval=5120, block=5120, rounds=16,
        loops=("jit", "scan", "step", "block", "orbax"),
        limits=(("block", "jit", 0.9), ("block", "scan", 1.15)),
    ),
    "2 ms": Case(
        "mlp", (512, 128), 128, 28, interval=500, block=100, rounds=50,
        limits=(("step", "jit", 1.10),),
    ),
    "10 ms": Case(
        "cnn", (8, 16), 64, 28, interval=250, block=25, rounds=100, limits=(("step", "jit", 1.02),)
    ),
    "100 ms": Case(
        "transformer", (128, 128), 48, 28, interval=250, block=20, rounds=24,
        loops=("jit", "step"), limits=(("step", "jit", 1.01),), processes=5,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    cases: dict[str, Case] = dataclasses.field(default_factory=lambda: CASES)
    seed: int = 0
    epochs: int = 4_000
    chunk: int = 64
    resamples: int = 4_000

    stall_steps: int = 20
    stall_cases: tuple[Case, ...] = (
        Case("mlp", (512, 128), 128, 28, 20, 20, rounds=60, loops=("jit", "step", "orbax")),
        Case("mlp", (4096, 2048), 64, 28, 20, 20, rounds=60, loops=("jit", "step", "orbax")),
    )
    stall_limit_ms: float = 2.0

    memory_case: Case = Case("mlp", (4096, 2048), 64, 28, interval=10, block=40, rounds=1)
    memory_limit_mb: float = 64.0

    log_samples: int = 100_000
    log_batch: int = 64
    log_epochs: int = 8
    log_limit_bytes: float = 16.0
    log_limit_ids: float = 1.15

    back_segments: int = 5
    back_rounds: int = 15
    back_limit: float = 1.2

    open_batch: int = 16
    open_epochs: int = 16
    open_repeats: int = 7
    open_limit_ms: float = 200.0

    def quick(self) -> "Settings":
        """Return settings for a smoke test of everything."""
        small = {"interval": 128, "block": 128, "rounds": 2}
        few = {"interval": 2, "block": 1, "rounds": 1, "processes": 2}
        return dataclasses.replace(
            self,
            cases={
                name: dataclasses.replace(case, **(few if name == "100 ms" else small))
                for name, case in self.cases.items()
            },
            stall_cases=(dataclasses.replace(self.stall_cases[0], rounds=2),),
            memory_case=dataclasses.replace(self.memory_case, widths=(256,), block=20),
            log_samples=10_000,
            back_segments=1,
            back_rounds=2,
            open_epochs=2,
            open_repeats=1,
        )


class Estimate(NamedTuple):
    """A number and its interval of 95%, which is empty where it was counted."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number that was measured.

    Attributes:
        name: what it is.
        estimate: the number.
        unit: its unit; empty for a ratio.
        limit: the target, which the upper end of the interval must not exceed.
    """

    name: str
    estimate: Estimate
    unit: str = ""
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.limit is None else self.estimate.high <= self.limit

    def __str__(self) -> str:
        value, low, high = self.estimate
        interval = "" if low == high else f"[{low:.4g}, {high:.4g}]"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        target = "" if self.limit is None else f"<= {self.limit:.4g}  {verdict}"
        return f"{self.name:<54}{value:>9.4g} {self.unit:<6}{interval:<20}{target}".rstrip()


# ------------------------------------------------------------------------------------ statistics


def counted(value: float) -> Estimate:
    """Return a number that has no interval."""
    return Estimate(value, value, value)


def median(
    values: Sequence[float] | np.ndarray, settings: Settings, processes: int = 1
) -> Estimate:
    """Return the median of measurements and its bootstrap interval (Efron, 1979).

    Args:
        values: `[n]`, of one process after the other.
        settings: how often to draw.
        processes: in how many they were measured. Those of one are not independent: of several,
            processes are drawn, and measurements of each.

    >>> median([1.0, 1.0, 1.0, 1.0, 9.0], Settings())
    Estimate(value=1.0, low=1.0, high=9.0)
    >>> median([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], Settings(), processes=2)
    Estimate(value=1.5, low=1.0, high=2.0)
    """
    values = np.asarray(values, np.float64)
    size, draw = len(values) // processes, np.random.default_rng(settings.seed).integers
    picks = draw(size, size=(settings.resamples, processes, size))
    if processes > 1:
        picks = picks + size * draw(processes, size=(settings.resamples, processes, 1))
    picks = picks.reshape(settings.resamples, -1)
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def stalls(seconds: np.ndarray, at: int) -> dict[str, np.ndarray]:
    """Return what a checkpoint costs the loop, in seconds beyond the median of the steps before.

    Args:
        seconds: `[rounds, steps]`, how long each step took.
        at: the step that stores the state.

    Returns:
        `[rounds]` each: of that step; with the step after it, which waits until the state is
        copied; with all that follow, which share the machine with the writer.

    >>> [x.tolist() for x in stalls(np.array([[1.0, 1.0, 5.0, 2.0, 1.5]]), 2).values()]
    [[4.0], [5.0], [5.5]]
    """
    extra = seconds[:, at:] - np.median(seconds[:, :at], axis=1, keepdims=True)
    steps = extra.shape[1]
    sums = extra.cumsum(axis=1)
    return {"": sums[:, 0], " and next step": sums[:, 1], f" and {steps - 1} steps": sums[:, -1]}


def permutation_bits(samples: int) -> float:
    """Return the bits that each entry of a random permutation carries: log2(N!) / N.

    >>> round(permutation_bits(4), 4)
    1.1462
    """
    return math.lgamma(samples + 1) / math.log(2) / samples


def settle() -> None:
    """Wait until no thread of this process computes any more."""
    idle = False
    while not idle:
        before = time.process_time()
        time.sleep(0.005)
        idle = time.process_time() - before < 0.0005


# ----------------------------------------------------------------------------- models and data


def digits(side: int) -> dict[str, np.ndarray]:
    """Return the 1,797 digits of scikit-learn, with a side of 28 magnified and padded."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    if side == 28:
        images = np.pad(np.kron(images, np.ones((1, 3, 3), np.float32)), ((0, 0), (2, 2), (2, 2)))
    return {"x": np.asarray(images), "y": np.asarray(labels, np.int32)}


class Transformer(nn.Module):
    """Reads an image as a sequence of rows; one layer for each width."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, image):
        x = nn.Dense(self.widths[0])(image)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape)
        for width in self.widths:
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(width)(nn.Dropout(0.1, deterministic=False)(hidden))
        return nn.Dense(10)(x.mean(axis=0))


def model(case: Case) -> tuple[Callable, Callable]:
    """Return `init(key) -> params` and `loss(params, example, key) -> scalar`."""
    if case.model == "mlp":
        layers = [layer for width in case.widths for layer in (nn.Dense(width), nn.relu)]
        module: nn.Module = nn.Sequential([jnp.ravel, *layers, nn.Dense(10)])
    elif case.model == "cnn":
        pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        layers = [layer for width in case.widths for layer in (nn.Conv(width, (3, 3)), pool)]
        module = nn.Sequential([lambda x: x[..., None], *layers, jnp.ravel, nn.Dense(10)])
    else:
        module = Transformer(case.widths)
    random = case.model == "transformer"

    def init(key):
        blank = jnp.zeros((case.side, case.side))
        return module.init({"params": key, "dropout": key}, blank)["params"]

    def loss(params, example, key):
        streams = {"dropout": key} if random else None
        logits: Any = module.apply({"params": params}, example["x"], rngs=streams)
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    return init, loss


# ----------------------------------------------------------------------------------------- loops


class Loop(NamedTuple):
    """A training that can be advanced, asked for the loss of its last step, and waited for."""

    advance: Callable[[int], Any]
    loss: Callable[[], float]
    wait: Callable[[], Any]


def prefetched(case: Case, settings: Settings) -> Generator[tuple]:
    """Yield `(steps[chunk], ids[chunk, batch], batches)`, gathered by a thread, two ahead."""
    data, size = digits(case.side), settings.chunk
    order = replay.Order.shuffled(case.batch, settings.epochs, settings.seed).bind(len(data["y"]))
    table = order[: 64 * size]  # enough for any one measurement to see fresh batches

    def gather(start: int) -> tuple:
        first = start % (len(table) - size)
        ids = table[first : first + size]
        steps = np.arange(start, start + size, dtype=np.uint32)
        return steps, ids, {name: array[ids] for name, array in data.items()}

    yield from ahead(functools.partial(gather, start) for start in itertools.count(step=size))


def ahead(tasks: Iterable[Callable[[], Any]]) -> Generator:
    """Yield what tasks return, which a thread does two ahead."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ready: collections.deque = collections.deque()
        for task in tasks:
            ready.append(thread.submit(task))
            if len(ready) > 2:
                yield ready.popleft().result()
        yield from (future.result() for future in ready)


def one_by_one(chunks: Iterator[tuple]) -> Iterator[tuple]:
    """Yield the steps of chunks."""
    for steps, ids, batches in chunks:
        for i, step in enumerate(steps):
            yield step, ids[i], {name: batch[i] for name, batch in batches.items()}


@contextlib.contextmanager
def by_hand(
    case: Case,
    settings: Settings,
    *,
    scan: bool = False,
    save: Callable[[int, Any], Any] | None = None,
) -> Iterator[Loop]:
    """Train as a good user would, calling `save(step, state)` wherever a state is to be stored."""
    init, loss = model(case)
    optimizer, run_key = optax.adam(1e-3), jax.random.key(settings.seed)

    def start(run_key):
        params = init(jax.random.fold_in(run_key, 2**32 - 1))  # as a recorder does
        return params, optimizer.init(params)

    def train(state, inputs):
        number, ids, batch = inputs
        key = jax.random.fold_in(run_key, number)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids.astype(jnp.uint32))

        def mean_loss(params):
            return jax.vmap(loss, (None, 0, 0))(params, batch, keys).mean()

        value, grads = jax.value_and_grad(mean_loss)(state[0])
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    def train_chunk(state, inputs):
        return jax.lax.scan(train, state, inputs)

    step = jax.jit(train_chunk if scan else train, donate_argnums=0)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    chunks = prefetched(case, settings)
    inputs, size = (chunks, settings.chunk) if scan else (one_by_one(chunks), 1)
    state, value, done = jax.jit(start)(run_key), None, 0

    def advance(steps):
        nonlocal state, value, done
        for _ in range(steps // size):
            state, value = step(state, next(inputs))
            done += size
            if save is not None and done % case.interval == 0:
                save(done, state)

    def last_loss():
        return float(np.ravel(np.asarray(value))[-1])

    with contextlib.closing(chunks):
        yield Loop(advance, last_loss, lambda: jax.block_until_ready(copy(state)))


@contextlib.contextmanager
def with_orbax(case: Case, settings: Settings, folder: pathlib.Path) -> Iterator[Loop]:
    """Train by hand, and save the state by orbax in the background."""
    # What its documentation calls the key improvement is on (asynchronous saving), and so are its
    # defaults that its documentation calls faster (OCDBT, folders made in the background).
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:

        def save(step, state):
            checkpointer.save(folder / str(step), args=ocp.args.PyTreeSave(state))

        with by_hand(case, settings, save=save) as loop:
            yield loop


@contextlib.contextmanager
def recorded(case: Case, settings: Settings, folder: pathlib.Path, dispatch: str) -> Iterator[Loop]:
    """Train by a recorder, all of whose settings are the defaults."""
    init, loss = model(case)
    recorder = replay.Recorder(
        folder,
        replay.Program(init, loss, optax.adam(1e-3)),
        digits(case.side),
        replay.Order.shuffled(case.batch, settings.epochs, settings.seed),
        key=jax.random.key(settings.seed),
        dispatch=dispatch,
        checkpoints=case.interval,
        self_test=False,  # a process of its own beside the first seconds of a run
    )
    with recorder:
        yield Loop(
            recorder.advance, lambda: recorder.loss, lambda: jax.block_until_ready(recorder.state)
        )


def open_loop(
    name: str, case: Case, settings: Settings, folder: pathlib.Path
) -> contextlib.AbstractContextManager[Loop]:
    """Return one of the loops that the head of this file describes, not yet begun."""
    if name in ("jit", "scan"):
        return by_hand(case, settings, scan=name == "scan")
    if name == "orbax":
        return with_orbax(case, settings, folder / name)
    return recorded(case, settings, folder / name, name)


def alternate(
    case: Case, settings: Settings, measure: Callable[[Loop], Any]
) -> dict[str, np.ndarray]:
    """Measure all loops of a case in turn, and return what was measured, `[rounds, ...]`."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loops = {
            name: stack.enter_context(open_loop(name, case, settings, folder))
            for name in case.loops
        }
        for loop in loops.values():
            # Past compilation, and half way to the first checkpoint after state 0.
            loop.advance(case.interval // 2)
            loop.loss()
            loop.wait()
        found: dict[str, list] = {name: [] for name in loops}
        for turn in range(case.rounds):
            for name in list(loops)[:: 1 if turn % 2 else -1]:
                settle()
                found[name].append(measure(loops[name]))
        settle()
        return {name: np.array(values) for name, values in found.items()}


# -------------------------------------------------------------------------------- measurements


def timed_block(steps: int, loop: Loop) -> tuple[float, float]:
    """Return the seconds that some steps take, on the wall and of the processor."""
    processor, begun = time.process_time(), time.perf_counter()
    loop.advance(steps)
    loop.wait()
    wall = time.perf_counter() - begun
    settle()
    return wall, time.process_time() - processor


def measure_steps(settings: Settings, name: str) -> list[Figure]:
    """Compare the time of a step."""
    case = settings.cases[name]
    if not case.rounds:
        return []

    measure = functools.partial(timed_block, case.block)
    turns = [case, dataclasses.replace(case, loops=case.loops[::-1])]
    parts = [
        in_new_process(alternate, turns[n % 2], settings, measure) for n in range(case.processes)
    ]
    found = {loop: np.concatenate([part[loop] for part in parts]) for loop in case.loops}
    each = functools.partial(median, settings=settings, processes=case.processes)
    figures = [
        Figure(f"{name} step: {loop}", each(1e3 * values[:, 0] / case.block), "ms")
        for loop, values in found.items()
    ]
    limits = {(ours, theirs): limit for ours, theirs, limit in case.limits}
    pairs = {(loop, "jit"): None for loop in case.loops if loop != "jit"} | limits
    for (ours, theirs), limit in pairs.items():
        what, x, y = f"{name} step: {ours} / {theirs}", found[ours], found[theirs]
        wall, processor = x.sum(axis=0) / y.sum(axis=0)
        figures += [
            Figure(what, each(x[:, 0] / y[:, 0]), limit=limit),
            Figure(f"{what}, sums", counted(wall)),
            Figure(f"{what}, processor", counted(processor)),
        ]
    return figures


def measure_stalls(settings: Settings) -> list[Figure]:
    """Compare for how long a checkpoint keeps the loop from its next step.

    After a checkpoint a recording reads its next stretch of batches, beside the training. The loop
    by hand, which stores nothing, reads as many at the same step: what it loses there to reading
    is not the checkpoint's, and is subtracted.
    """

    def each_step(loop: Loop) -> list[float]:
        seconds = []
        for _ in range(settings.stall_steps):
            begun = time.perf_counter()
            loop.advance(1)
            loop.loss()
            seconds.append(time.perf_counter() - begun)
        return seconds

    figures = []
    for case in settings.stall_cases:
        size = f"{state_bytes(case) / 1e6:.0f} MB"
        aligned = dataclasses.replace(settings, chunk=case.interval)
        found = {
            loop: stalls(1e3 * seconds, settings.stall_steps // 2 - 1)
            for loop, seconds in alternate(case, aligned, each_step).items()
        }
        for loop, parts in found.items():
            for part, extra in parts.items():
                if loop != "jit":
                    extra = extra - found["jit"][part]
                # What the writer takes of the machine later is part of the ratios of steps.
                limit = None if loop != "step" or "steps" in part else settings.stall_limit_ms
                what = f"stall by a checkpoint of {size}: {loop}{part}"
                figures.append(Figure(what, median(extra, settings), "ms", limit))
    return figures


def measure_memory(settings: Settings) -> list[Figure]:
    """Compare the peak memory of whole processes."""
    case = settings.memory_case
    state = state_bytes(case) / 1e6
    peaks = {loop: in_new_process(peak_memory, settings, loop) / 1e6 for loop in case.loops}
    what = f"peak memory, state of {state:.0f} MB"
    limits = {"step": state + settings.memory_limit_mb}
    return [Figure(f"{what}: jit", counted(peaks["jit"]), "MB")] + [
        Figure(f"{what}: {loop} - jit", counted(peak - peaks["jit"]), "MB", limits.get(loop))
        for loop, peak in peaks.items()
        if loop != "jit"
    ]


def peak_memory(settings: Settings, name: str) -> int:
    """Train for a while, and return the most bytes that this process has held."""
    case = settings.memory_case
    with (
        tempfile.TemporaryDirectory() as folder,
        open_loop(name, case, settings, pathlib.Path(folder)) as loop,
    ):
        loop.advance(case.block)
        loop.loss()
    # Not `ru_maxrss`: across `exec` it keeps the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def state_bytes(case: Case) -> int:
    """Return the size of the weights with the two moments and the counter of Adam."""
    params = jax.eval_shape(model(case)[0], jax.random.key(0))
    return 4 + 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def measure_log(settings: Settings) -> list[Figure]:
    """Weigh the log of a long run over many samples."""
    samples, size = settings.log_samples, settings.log_batch
    with tempfile.TemporaryDirectory() as folder:
        order = replay.Order.shuffled(size, settings.log_epochs, settings.seed)
        run = record_line(pathlib.Path(folder, "run"), order, settings)
        found = {"states": 0, "data": 0, "program": 0, "ids": 0, "log": 0}
        for file in filter(pathlib.Path.is_file, pathlib.Path(run.path).rglob("*")):
            parts = file.relative_to(run.path).parts
            kind = "ids" if parts[:2] == ("steps", "ids") else parts[0]
            found[kind if kind in found else "log"] += file.stat().st_size
    bits = 8 * found["ids"] / (run.steps * size)
    entropy, tighter = math.log2(samples), permutation_bits(samples)
    what = f"log of {run.steps:,} steps"
    each = counted(found["log"] / run.steps)
    return [
        Figure(f"{what}: a step, without ids", each, "bytes", settings.log_limit_bytes),
        Figure(f"{what}: an id of {samples:,}", counted(bits), "bits"),
        Figure(f"{what}: ids / log2(N)", counted(bits / entropy), "", settings.log_limit_ids),
        Figure(f"{what}: ids / (log2(N!) / N)", counted(bits / tighter)),
        Figure(f"{what}: programs, once", counted(found["program"]), "bytes"),
    ]


def record_line(path: pathlib.Path, order: replay.Order, settings: Settings) -> replay.Run:
    """Record the fit of a line through many samples, whose steps take microseconds."""
    points = np.random.default_rng(settings.seed).normal(size=(settings.log_samples, 4))
    data = {"x": points.astype(np.float32), "y": points.sum(axis=1).astype(np.float32)}

    def loss(params, example, key):
        return (example["x"] @ params["slope"] - example["y"]) ** 2

    program = replay.Program({"slope": np.zeros(4, np.float32)}, loss, optax.sgd(1e-2))
    key = jax.random.key(settings.seed)
    return replay.record(
        path, program, data, order, key=key, dispatch="block", self_test=False, progress=False
    )


def measure_back(settings: Settings, name: str, dispatch: str) -> list[Figure]:
    """Compare reaching a state with training towards it."""
    case = settings.cases[name]
    steps = case.interval
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with recorded(case, settings, folder / "past", dispatch) as past:
            past.advance(settings.back_segments * steps)
        run = replay.open(folder / "past")
        run.state(steps // 2)  # compiles
        loop = stack.enter_context(recorded(case, settings, folder / "present", dispatch))
        loop.advance(steps // 2)
        loop.wait()
        train, reach, restore = [], [], []
        for turn in range(settings.back_rounds):
            stored = turn % settings.back_segments * steps
            for seconds, work in (
                (train, lambda: (loop.advance(steps - 1), loop.wait())),
                (reach, lambda stored=stored: run.state(stored + steps - 1)),
                (restore, lambda stored=stored: run.state(stored)),
            ):
                settle()
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
        settle()
    what = f"{steps - 1} steps of {name}, {dispatch}: state(t)"
    ratio = median(np.divide(reach, train), settings)
    return [
        Figure(f"{what} / training", ratio, limit=settings.back_limit),
        Figure(f"{what}, stored itself", median(1e3 * np.array(restore), settings), "ms"),
    ]


def measure_open(settings: Settings) -> list[Figure]:
    """Time the opening of a long run in fresh processes."""
    code = (
        "import sys, time, replay; begun = time.perf_counter(); replay.open(sys.argv[1]); "
        "print(time.perf_counter() - begun)"
    )
    with tempfile.TemporaryDirectory() as folder:
        order = replay.Order.shuffled(settings.open_batch, settings.open_epochs, settings.seed)
        run = record_line(pathlib.Path(folder, "run"), order, settings)
        times = [
            float(subprocess.check_output([sys.executable, "-c", code, run.path]))
            for _ in range(settings.open_repeats)
        ]
    what = f"replay.open, run of {run.steps:,} steps"
    return [Figure(what, median(1e3 * np.array(times), settings), "ms", settings.open_limit_ms)]


# ------------------------------------------------------------------------------------------ all


def in_new_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that no measurement inherits from another."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(measure, *arguments).result()


SECTIONS: dict[str, Callable[[Settings], list[Figure]]] = {
    **{name: functools.partial(measure_steps, name=name) for name in CASES},
    "stalls": measure_stalls,
    "memory": measure_memory,
    "log": measure_log,
    "back": functools.partial(measure_back, name="2 ms", dispatch="step"),
    "back in blocks": functools.partial(measure_back, name="0.1 ms", dispatch="block"),
    "open": measure_open,
}


def environment() -> dict[str, Any]:
    """Describe the machine and the software."""
    names = ("jax", "jaxlib", "numpy", "optax", "flax", "tensorstore", "orbax-checkpoint")
    processor = pathlib.Path("/proc/cpuinfo").read_text().partition("model name")[2]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor.partition(":")[2].partition("\n")[0].strip(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("NPROC", "one for each core"),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def keep(
    result: pathlib.Path,
    question: str,
    name: str,
    figures: Sequence[Figure],
    settings: dict[str, Any],
    described: dict[str, Any],
) -> None:
    """Write a section into a result file, beside those of other sections.

    Args:
        result: the file.
        question: which it answers.
        name: of the section.
        figures: that were measured.
        settings: with which.
        described: the machine and the software.
    """
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    found["question"] = question
    found.setdefault("sections", {})[name] = {
        "environment": described,
        "settings": settings,
        "figures": [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures],
    }
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="keeps the other sections")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    begun, figures = time.perf_counter(), []
    for name in options.only or SECTIONS:
        described, started = environment(), time.perf_counter()
        found = in_new_process(SECTIONS[name], settings)
        figures += found
        print(*found, sep="\n", flush=True)
        described["load after"] = os.getloadavg()
        described["minutes"] = (time.perf_counter() - started) / 60
        if not options.quick:
            question = "what does recording a training cost?"
            keep(RESULT, question, name, found, dataclasses.asdict(settings), described)
    minutes = (time.perf_counter() - begun) / 60
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"{minutes:.1f} minutes; targets that are not met: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
