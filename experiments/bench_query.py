"""What it costs to ask a run, in plain trainings of the same steps.

Question: how much longer than training them anew does it take to replay steps and answer the five
questions of the founding paper about them; how many steps are replayed; how much memory does it
take; what would the naive way take; and what do two processes gain?

Command:  python experiments/bench_query.py            writes results/bench_query.json
          python experiments/bench_query.py --quick    runs all of it, briefly; writes nothing
Expected: the result says which of these targets are met. In trainings of the same steps: the ten
          samples with the largest gradient for each weight in one epoch 9, sums by class 3, the
          weights that moved most in the whole training 1.5, the last samples before an explosion
          and those that led a weight across zero 1.3 of the steps up to the event; a comparison of
          two runs replays at most one segment of each. Two processes take at most 1/1.8 of the
          time of one, on a run that was recorded with one thread. (The one uses more than one core
          of the two: beside its arithmetic, steps are dispatched and compared. So the same is
          measured of one that is held to one core.)
Run time: 40 minutes on two cores, --quick 2 minutes; nothing else should run meanwhile.

The run is an MLP 784-512-128-10 (469 thousand weights) on digits, batch 128, Adam, whose rate rises
by a factor of 100 after three quarters of the training, so that there is an explosion to be asked
about. "Training" is the loop that anybody would write: one jitted, donated step, batches picked
beforehand, no recording. It and the question alternate, and a ratio is the median of the ratios of
neighbours; the first, which compiles, is reported by itself as "cold". The naive way trains anew,
materialises the gradients of all samples by `vmap(grad)` and reduces them with numpy; it is
measured on a few steps and scaled.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from bench_per_sample import CASES, build, source
from bench_per_sample import Settings as Models
from bench_record import Figure, counted, environment, in_new_process, keep, median, settle

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "bench_query.json"
QUESTION = "what does it cost to ask a run, in plain trainings of the same steps?"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    epoch_steps: int = 256
    epochs: int = 8
    batch: int = 128
    seed: int = 0
    rate: float = 1e-3
    spike: float = 100.0
    repeats: int = 5
    naive_steps: int = 3
    processes: int = 2
    resamples: int = 4_000

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.epoch_steps * self.epochs

    @property
    def spike_at(self) -> int:
        """The step at which the rate rises: in the middle of a segment."""
        return 3 * self.steps // 4 + self.epoch_steps // 2

    def quick(self) -> "Settings":
        """Return settings for a smoke test."""
        return dataclasses.replace(self, epoch_steps=64, epochs=4, repeats=2, naive_steps=1)


LIMITS = {
    "Q1 samples of each weight": 9.0,
    "Q1 by class": 3.0,
    "Q2 weights that moved most": 1.5,
    "Q4 before an explosion": 1.3,
    "Q5 across zero": 1.3,
}


class Fixture:
    """The run, and the training that it is compared with."""

    def __init__(self, settings: Settings, folder: pathlib.Path, seed: int):
        self.settings = settings
        init, self.loss = build(CASES["mlp"], Models())
        size = settings.epoch_steps * settings.batch
        data = source(CASES["mlp"], Models())
        self.data = {k: np.resize(v, (size, *v.shape[1:])) for k, v in data.items()}
        rate = optax.join_schedules(
            [optax.constant_schedule(r) for r in (settings.rate, settings.spike * settings.rate)],
            [settings.spike_at],
        )
        self.optimizer = optax.adam(rate)
        order = replay.Order.shuffled(settings.batch, settings.epochs, seed)
        self.table = order.bind(size)[:]
        self.params = jax.jit(init)(jax.random.key(settings.seed))
        self.run = replay.record(
            folder / f"run{seed}",
            replay.Program(init, self.loss, self.optimizer),
            self.data,
            order,
            key=jax.random.key(settings.seed),
            checkpoints=settings.epoch_steps,
            embed=True,  # other processes open the run by its path
            self_test=False,
            progress=False,
        )
        self._step: Any = None

    def train(self, steps: range) -> float:
        """Train plainly, from the beginning; return the seconds that some steps took."""
        batches = [{k: v[self.table[t]] for k, v in self.data.items()} for t in steps]
        if self._step is None:

            def step(state, batch):
                def mean_loss(params):
                    return jax.vmap(self.loss, (None, 0, None))(params, batch, None).mean()

                value, grads = jax.value_and_grad(mean_loss)(state[0])
                updates, opt_state = self.optimizer.update(grads, state[1], state[0])
                return (optax.apply_updates(state[0], updates), opt_state), value

            self._step = jax.jit(step, donate_argnums=0)
        copy = jax.tree.map(jnp.copy, self.params)
        state = (copy, self.optimizer.init(copy))
        state, value = self._step(state, batches[0])
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for batch in batches:
            state, value = self._step(state, batch)
        jax.block_until_ready((state, value))
        return time.perf_counter() - begun

    def naive(self, steps: int) -> float:
        """Return the seconds of a step that materialises, and ranks with numpy."""
        grad = jax.jit(jax.vmap(jax.grad(self.loss), (None, 0, None)))
        best = [np.full((10, x.size), -np.inf, np.float32) for x in jax.tree.leaves(self.params)]
        ids = [np.full(x.shape, -1, np.int32) for x in best]
        taken = []
        for t in range(steps + 1):
            batch = {k: v[self.table[t]] for k, v in self.data.items()}
            begun = time.perf_counter()
            grads = jax.tree.leaves(grad(self.params, batch, None))
            for i, leaf in enumerate(grads):
                flat = np.abs(np.asarray(leaf).reshape(len(leaf), -1))
                values = np.concatenate([best[i], flat])
                whose = np.broadcast_to(self.table[t][:, None], flat.shape)
                whose = np.concatenate([ids[i], whose])
                top = np.argpartition(-values, 9, axis=0)[:10]
                best[i] = np.take_along_axis(values, top, 0)
                ids[i] = np.take_along_axis(whose, top, 0)
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken[1:]))


def questions(fixture: Fixture) -> dict[str, tuple[Callable[..., Any], range]]:
    """Return each question, and the steps whose training it is compared with."""
    run, settings = fixture.run, fixture.settings
    epoch = range(2 * settings.epoch_steps, 3 * settings.epoch_steps)
    grads = run.sample_grads.sel(step=slice(epoch.start, epoch.stop))
    shares = run.sample_updates.sel(step=slice(epoch.start, epoch.stop))
    labels = fixture.data["y"]
    usual = abs(run.grads).quantile(0.9, "weight").sel(step=slice(0, settings.spike_at))
    threshold = 1.5 * float(usual.max().compute())
    boom = ((abs(run.grads) > threshold).mean("weight") > 0.10).first("step")
    exploded = int(boom.compute())
    last = run.weights["layers_5/kernel"]
    crossed = last.crosses(0.0).first("step").compute()["layers_5/kernel"].values
    middle = np.abs(np.where(crossed < 0, 10**9, crossed - settings.steps // 2))
    index = [int(i) for i in np.unravel_index(int(middle.argmin()), crossed.shape)]
    weight, zero = ("layers_5/kernel", *index), int(crossed[tuple(index)])
    hit = run.weights[weight].crosses(0.0).first("step")
    print(f"explosion above {threshold:.3g} at step {exploded}; {weight} across 0 at step {zero}")
    whole = range(settings.steps)
    share = run.sample_updates[weight]
    share_above = (abs(run.grads) > 2.0**-10).mean("weight")  # which every index has counted
    often = float(share_above.sel(step=slice(0, settings.spike_at)).max().compute())
    beyond = (share_above > min(1.2 * often, 0.99)).first("step")
    return {
        "Q1 samples of each weight": (
            abs(grads).top_k(10, dim=("step", "position")).compute, epoch),
        "Q1 by class": (abs(grads).groupby(labels).sum().top_k(3, "group").compute, epoch),
        "Q1 shares of updates by class": (
            abs(shares).groupby(labels).sum().top_k(3, "group").compute, epoch),
        "Q2 weights that moved most": (
            abs(run.updates).sum("step").top_k(1000, "weight").compute, whole),
        "Q4 before an explosion": (run.samples.before(boom, last=64).compute, range(exploded + 1)),
        "Q4 with a threshold that is logged": (
            run.samples.before(beyond, last=64).compute, range(exploded + 1)),
        "Q5 across zero": (
            run.samples.before(hit, last=100, inclusive=True).join(share=share).compute,
            range(zero + 1)),
    }  # fmt: skip


class Peak:
    """The largest memory of this process meanwhile, beyond what it had before, in bytes."""

    def __enter__(self) -> "Peak":
        self._process, self._stop = psutil.Process(), threading.Event()
        self.before = self.largest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.largest = max(self.largest, self._process.memory_info().rss)

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()


def measure_questions(settings: Settings) -> list[Figure]:
    """Measure questions about one run."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        fixture = Fixture(settings, pathlib.Path(folder), settings.seed)
        fixture.train(range(8))
        for name, (ask, steps) in questions(fixture).items():
            ratios: list[float] = []
            with Peak() as peak:
                begun = time.perf_counter()
                answer = ask()
                cold = time.perf_counter() - begun
            for _ in range(settings.repeats):
                settle()
                trained = fixture.train(steps)
                settle()
                begun = time.perf_counter()
                answer = ask()
                ratios.append((time.perf_counter() - begun) / trained)
            trained = fixture.train(steps)
            each: Any = settings
            figures += [
                Figure(f"{name} / training", median(ratios, each), limit=LIMITS.get(name)),
                Figure(f"{name}: cold / training", counted(cold / trained)),
                Figure(f"{name}: steps replayed", counted(answer.attrs["steps"])),
                Figure(f"{name}: steps asked about", counted(len(steps))),
                Figure(f"{name}: memory", counted((peak.largest - peak.before) / 1e6), "MB"),
            ]
            print(*figures[-5:], sep="\n", flush=True)
        naive = fixture.naive(settings.naive_steps)
        trained = fixture.train(range(settings.epoch_steps)) / settings.epoch_steps
        figures.append(Figure("Q1 naively, scaled / training", counted(naive / trained)))
        print(figures[-1])
    return figures


def measure_comparison(settings: Settings) -> list[Figure]:
    """Measure the comparison of two orders after some steps."""
    with tempfile.TemporaryDirectory() as folder:
        one, other = (Fixture(settings, pathlib.Path(folder), seed) for seed in (1, 2))
        state = settings.steps // 2 + settings.epoch_steps // 2
        test = {k: v[: 8 * settings.batch] for k, v in one.data.items()}
        parts = []
        for fixture in (one, other):
            losses = fixture.run.on(test, name="test").sample_losses.sel(state=state)
            parts.append(losses.mean())
        gap = one.run.weights.sel(state=state) - other.run.weights.sel(state=state)
        ask = functools.partial(replay.compute, *parts, gap.norm("weight"))
        ask()
        ratios = []
        for _ in range(settings.repeats):
            settle()
            trained = one.train(range(state))
            begun = time.perf_counter()
            answers = ask()
            ratios.append((time.perf_counter() - begun) / trained)
    each: Any = settings
    steps = max(answer.attrs["steps"] for answer in answers) / 2
    within = settings.epoch_steps
    return [
        Figure("Q3 two orders / training of one up to there", median(ratios, each)),
        Figure("Q3 two orders: segments replayed of each run", counted(steps / within), limit=2.0),
    ]


def measure_processes(settings: Settings) -> list[Figure]:
    """Measure what two processes gain, on a run that was recorded with one thread."""
    environment = {**os.environ, "NPROC": "1"}
    code = (
        "import json, bench_query as b; "
        f"print(json.dumps(b.two_processes(b.Settings(**{dataclasses.asdict(settings)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=pathlib.Path(__file__).parent, text=True, stdout=subprocess.PIPE,
        check=True,
    )  # fmt: skip
    free, held, cores = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    each: Any = settings
    return [
        Figure("two processes / one", median(free, each), limit=1 / 1.8),
        Figure("two processes / one that is held to one core", median(held, each)),
        Figure("two processes: cores that the one keeps busy", median(cores, each)),
    ]


@contextlib.contextmanager
def held_to_one_core() -> Iterator[None]:
    """Hold all threads of this process, and those that they start, to one core."""
    before = os.sched_getaffinity(0)

    def hold(cores):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)

    hold({min(before)})
    try:
        yield
    finally:
        hold(before)


def two_processes(settings: Settings) -> list[tuple[float, float, float]]:
    """Return the seconds of two processes in those of one, free and held, and its cores."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        run = Fixture(settings, pathlib.Path(folder), settings.seed).run
        question = abs(run.sample_grads).max(dim=("step", "position"))
        ratios = []
        with concurrent.futures.ProcessPoolExecutor(settings.processes, context) as executor:
            for repeat in range(settings.repeats + 2):
                both = seconds(lambda: question.compute(executor=executor))
                begun = time.process_time()
                one = seconds(question.compute)
                busy = time.process_time() - begun
                with held_to_one_core():
                    held = seconds(question.compute)
                if repeat > 1:  # the first of each process compiles
                    ratios.append((both / one, both / held, busy / one))
    return ratios


def measure_cache(settings: Settings) -> list[Figure]:
    """Measure what keeping costs, what is had without a replay, and what of half a replay."""
    os.environ["REPLAY_CACHE_BYTES"] = str(2**32)
    figures: list[Figure] = []
    each: Any = settings
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CACHE_HOME"] = home
        fixture = Fixture(settings, pathlib.Path(folder), settings.seed)
        run, half = fixture.run, settings.steps // 2
        cold: dict[str, float] = {}
        for name, (ask, _) in questions(fixture).items():
            ask(cache=False)
            ratios, warm, bare, loaded = [], [], [], []
            for _ in range(settings.repeats):
                run.cache.clear()
                settle()
                cold[name] = seconds(lambda a=ask: a(cache=False))
                ratios.append(seconds(ask) / cold[name])
                kept = pathlib.Path(run.path, "cache", "answers").rglob("*")
                files = [file for file in kept if file.is_file()]
                for _ in range(settings.repeats):
                    warm.append(1e3 * seconds(ask))
                    bare.append(1e3 * seconds(lambda f=files: [file.read_bytes() for file in f]))
                    loaded.append(1e3 * seconds(lambda a=ask: a().load()))
            read = sum(file.stat().st_size for file in files) / 1e6
            size = sum(entry.bytes for entry in run.cache.entries()) / 1e6
            pure = [a - b for a, b in zip(warm, bare, strict=True)]
            figures += [
                Figure(f"{name}: kept / not kept", median(ratios, each)),
                Figure(f"{name}: asked again", median(warm, each), "ms"),
                Figure(f"{name}: asked again, every column made", median(loaded, each), "ms"),
                Figure(
                    f"{name}: asked again, without reading the answer",
                    median(pure, each), "ms", limit=20.0,
                ),
                Figure(f"{name}: read", counted(read), "MB"),
                Figure(f"{name}: kept", counted(size), "MB"),
            ]  # fmt: skip
            print(*figures[-6:], sep="\n", flush=True)
        halves: dict[str, Callable[[slice], Any]] = {
            "Q2 weights that moved most": lambda steps: (
                abs(run.updates.sel(step=steps)).sum("step").top_k(1000, "weight")),
            "Q4 steps of explosions": lambda steps: (
                (abs(run.grads.sel(step=steps)) > 1e-3).mean("weight") > 0.1).sum(),
            "Q1 by class": lambda steps: abs(
                run.sample_grads.sel(step=slice(steps.start, steps.stop // 4))
            ).groupby(fixture.data["y"]).sum().top_k(3, "group"),
        }  # fmt: skip
        for name, question in halves.items():
            whole, first = question(slice(0, settings.steps)), question(slice(0, half))
            ratios, steps = [], 0
            for _ in range(settings.repeats + 1):
                run.cache.clear()
                first.compute()
                settle()
                begun = time.perf_counter()
                steps = whole.compute().attrs["steps"]
                taken = time.perf_counter() - begun
                ratios.append(taken / seconds(lambda w=whole: w.compute(cache=False)))
            share = steps / whole.compute(cache=False).attrs["steps"]
            figures += [
                Figure(f"{name}: half kept / not kept", median(ratios[1:], each), limit=0.55),
                Figure(f"{name}: half kept: share of the steps replayed", counted(share)),
            ]
            print(*figures[-2:], sep="\n", flush=True)
        for level in ("scalars", "rows", "weights"):
            run.cache.clear()
            built = seconds(lambda at=level: run.index(at, progress=False))
            figures.append(Figure(f"index {level}: built after the training", counted(built), "s"))
            for name, (ask, _) in questions(fixture).items():
                if name.startswith(("Q1", "Q2")):
                    continue  # which no index narrows
                ask(cache=False)
                taken, steps = [], 0
                for _ in range(settings.repeats):
                    begun = time.perf_counter()
                    steps = ask(cache=False).attrs["steps"]
                    taken.append(1e3 * (time.perf_counter() - begun))
                limit = 50.0 if "logged" in name else None
                figures += [
                    Figure(f"index {level}: {name}", median(taken, each), "ms", limit=limit),
                    Figure(f"index {level}: {name}: steps replayed", counted(steps)),
                    Figure(f"index off: {name}, before", counted(1e3 * cold[name]), "ms"),
                ]
                print(*figures[-3:], sep="\n", flush=True)
    return figures


def measure_lookups(settings: Settings) -> list[Figure]:
    """Measure planning for a run of 100 thousand steps and 1,000 kept answers."""
    os.environ["REPLAY_CACHE_BYTES"] = str(2**32)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        return lookups(settings, pathlib.Path(folder, "long"))


def lookups(settings: Settings, path: pathlib.Path) -> list[Figure]:
    """Measure planning for a run that is recorded to a path."""
    steps, answers = (100_000, 1_000) if settings.steps > 1000 else (5_000, 20)
    rows = np.random.Generator(np.random.Philox(1)).normal(size=(64, 4)).astype(np.float32)
    program = replay.Program(
        {"w": np.ones((4, 3), np.float32)}, lambda p, x, key: jnp.square(x @ p["w"]).sum(),
        optax.sgd(1e-3),
    )  # fmt: skip
    run = replay.record(
        path, program, rows, replay.Order.shuffled(16, steps // 4, 0), key=jax.random.key(0),
        dispatch="block", checkpoints=steps // 100, self_test=False, progress=False,
    )  # fmt: skip
    losses = run.sample_losses.max("position")
    every = steps // answers
    for first in range(0, steps, every):
        losses.sel(step=slice(first, first + every)).compute()
    kept = sum(entry.kind == "answer" for entry in run.cache.entries())
    each: Any = settings
    asked = {
        "a kept answer": losses.sel(step=slice(every, 2 * every)),
        "all steps, in part kept": run.sample_losses.max("position"),
        "all steps, nothing kept": abs(run.updates).sum("step"),
    }
    figures = [Figure("lookups: kept answers", counted(kept))]
    for name, question in asked.items():
        taken = [1e3 * seconds(question.explain) for _ in range(3 * settings.repeats)]
        figures.append(Figure(f"lookups: planning, {name}", median(taken, each), "ms", limit=50.0))
    return figures


def seconds(call: Callable[[], Any]) -> float:
    """Return what a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


SECTIONS = {
    "cache": measure_cache,
    "lookups": measure_lookups,
    "questions": measure_questions,
    "comparison": measure_comparison,
    "processes": measure_processes,
}


def main() -> None:
    """Run the benchmark."""
    os.environ["REPLAY_CACHE_BYTES"] = "0"  # nothing is kept but where that is measured
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="keeps the other sections")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    for name in options.only or SECTIONS:
        described, begun = environment(), time.perf_counter()
        figures = in_new_process(SECTIONS[name], settings)
        print(f"-- {name}", *figures, sep="\n", flush=True)
        described["load after"] = os.getloadavg()
        described["minutes"] = (time.perf_counter() - begun) / 60
        if not options.quick:
            keep(RESULT, QUESTION, name, figures, dataclasses.asdict(settings), described)


if __name__ == "__main__":
    main()
