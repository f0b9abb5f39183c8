"""How many counterfactuals a minute, what a fork costs, and what idealised TracIn costs.

Question: how many trainings with one thing changed can be had in a minute, against a loop that
anybody would write and against replay's own block form, one after the other? How many bytes and
seconds does a fork take before it has run? How long do TracIn scores of an epoch take?

Command:  python experiments/bench_forks.py            writes results/bench_forks.json
          python experiments/bench_forks.py --quick    runs all of it for a moment, writes nothing
          python experiments/bench_forks.py --only counterfactuals
Expected: the result says which of these targets are met. On CPU a counterfactual in lanes takes at
          most 1/3 of the time of the plain jitted loop, and at most the time of the block form.
          A fork is created in less than 100 ms, and takes less than 64 kB before it has run.
          Idealised TracIn of 100 others against the samples of an epoch takes at most 3 times the
          plain training of that epoch (MLP 784-512-128-10, 2 ms a step, batch 128; for the digits
          MLP, of 80 us a step, it is told without a target: the replay alone takes several).
Run time: 6 minutes on two cores, --quick 1 minute; nothing else should run meanwhile.

A counterfactual is ten epochs of a digits MLP 64-128-10 (9,610 weights) without one sample: 220
steps of batch 64 over 1,438 samples, SGD with momentum or Adam. The sides alternate in one process,
and a ratio is the median of the ratios of neighbours; everything is compiled before.
  plain  one jitted, donated step, fed by numpy batches: what a good user writes; the sample has the
         weight 0
  block  a run recorded with dispatch="block" is replayed from its first state: a training of the
         same steps by that program, which compares the losses with the log besides
  lanes  `run.counterfactuals` as a whole: null lanes, control lanes, the metric and the answer
Both forms of lanes are measured, `map` (one lane after the other, what a CPU has) and `vmap`; the
targets are those of `map` on a CPU, of `vmap` elsewhere. "Cold" is the first call, which compiles.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_query import Fixture as Mlp
from bench_query import Settings as Queries
from bench_record import Estimate, Figure, counted, environment, in_new_process, median, settle
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "bench_forks.json"
OPTIMIZERS = {
    "momentum": functools.partial(optax.sgd, 0.1, momentum=0.9),
    "adam": functools.partial(optax.adam, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    training: int = 1_438
    hidden: int = 128
    batch: int = 64
    epochs: int = 10
    rounds: int = 7
    edits: int = 1_438
    one_by_one: int = 8
    others: int = 100
    tracin_steps: int = 256
    creations: int = 8
    long_steps: int = 100_000
    limits: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"plain": 1 / 3, "block": 1.0}
    )

    seed: int = 0
    resamples: int = 4_000

    def quick(self) -> "Settings":
        """Return settings for a smoke test of everything."""
        return dataclasses.replace(
            self, rounds=3, edits=48, one_by_one=2, tracin_steps=64, long_steps=2_000
        )


# ------------------------------------------------------------------------------ counterfactuals


class Digits:
    """The run, the metric, and the same training by hand."""

    def __init__(self, settings: Settings, optimizer: str, folder: pathlib.Path):
        self.settings, self.optimizer = settings, OPTIMIZERS[optimizer]()
        images, labels = load_digits(return_X_y=True)
        x, y = (images / 16).astype(np.float32), labels.astype(np.int32)
        self.data = {"x": x[: settings.training], "y": y[: settings.training]}
        self.test = {"x": x[settings.training :], "y": y[settings.training :]}
        self.program = replay.Program(self.init, self.loss, self.optimizer)
        order = replay.Order.shuffled(settings.batch, settings.epochs, settings.seed)
        self.ids = order.bind(settings.training)[:]
        self.run = replay.record(
            folder / optimizer,
            self.program,
            self.data,
            order,
            key=jax.random.key(settings.seed),
            checkpoints=10**6,  # so that a replay starts from state 0
            dispatch="block",
            self_test=False,
        )
        self.run = replay.open(folder / optimizer, program=self.program)
        self.start = self.run.state(0)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the initial weights."""
        keys, hidden = jax.random.split(key), self.settings.hidden
        return {
            "w1": jax.random.normal(keys[0], (64, hidden)) / 8,
            "b1": jnp.zeros(hidden),
            "w2": jax.random.normal(keys[1], (hidden, 10)) / hidden**0.5,
            "b2": jnp.zeros(10),
        }

    @staticmethod
    def loss(params: Any, example: Any, key: Any = None) -> jax.Array:
        """Return the cross entropy of one image."""
        hidden = jax.nn.relu(example["x"] @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    def _step(self, params, state, batch, weights):
        def mean(params):
            losses = jax.vmap(self.loss, (None, 0))(params, batch)
            return (losses * weights).sum() / self.settings.batch

        updates, state = self.optimizer.update(jax.grad(mean)(params), state, params)
        return optax.apply_updates(params, updates), state

    def by_hand(self, without: int) -> Any:
        """Train without a sample, by the loop that a good user writes."""
        params = jax.tree.map(jnp.array, self.start.params)
        state = self.optimizer.init(params)
        for ids in self.ids:
            batch = {name: x[ids] for name, x in self.data.items()}
            params, state = self.step(params, state, batch, (ids != without).astype(np.float32))
        return jax.block_until_ready(params)

    def by_block(self) -> Any:
        """Train by the program of the block form; all steps but the last, whose state is stored."""
        return self.run.state(len(self.ids) - 1)

    def in_lanes(self, form: str, count: int) -> Any:
        """Train `count` times, each time without another sample."""
        samples = np.arange(count) % self.settings.training
        return self.run.counterfactuals(
            replay.edits.leave_one_out(samples.tolist()),
            metric=self.test,
            form=form,
            cache=False,
            progress=False,
        )


def measure_counterfactuals(settings: Settings, optimizer: str) -> list[Figure]:
    """Compare the time of a training in lanes to that of one by itself."""
    with tempfile.TemporaryDirectory() as folder:
        digits = Digits(settings, optimizer, pathlib.Path(folder))
        steps, forms = len(digits.ids), ("map", "vmap")
        own = forms[0] if jax.default_backend() == "cpu" else forms[1]
        cold, answers = {}, {}
        for form in forms:
            begun = time.perf_counter()
            answers[form] = digits.in_lanes(form, settings.edits)
            cold[form] = time.perf_counter() - begun
        by_hand = digits.by_hand(0)
        digits.by_block()
        lane = float(answers[own].value.values[0].mean())
        losses = jax.vmap(digits.loss, (None, 0))(by_hand, digits.test)
        gap = abs(float(losses.mean()) - lane) / lane
        sides: dict[str, Callable[[], float]] = {
            "plain": lambda: timed(
                lambda: [digits.by_hand(i) for i in range(settings.one_by_one)],
                settings.one_by_one,
            ),
            "block": lambda: timed(
                lambda: [digits.by_block() for _ in range(settings.one_by_one)],
                settings.one_by_one * (steps - 1) / steps,
            ),
            **{
                form: functools.partial(
                    timed, functools.partial(digits.in_lanes, form, settings.edits), settings.edits
                )
                for form in forms
            },
        }
        found: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(settings.rounds):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                settle()
                found[side].append(sides[side]())
    each = {side: np.asarray(values) for side, values in found.items()}
    figures = []
    known: Any = settings
    for form in forms:
        for side, limit in settings.limits.items():
            ratio = median(each[form] / each[side], known)
            name = f"{optimizer}: {form} / {side}"
            figures.append(Figure(name, ratio, limit=limit if form == own else None))
    for side, values in each.items():
        figures.append(Figure(f"{optimizer}: {side}", rate(median(values, known)), "/min"))
    deviations = [answers[form].dataset.attrs["control_weight_deviation"] for form in forms]
    return [
        *figures,
        *(Figure(f"{optimizer}: {form}, cold", counted(s), "s") for form, s in cold.items()),
        *(
            Figure(f"{optimizer}: {form}, control lanes from the run", counted(x))
            for form, x in zip(forms, deviations, strict=True)
        ),
        Figure(f"{optimizer}: held-out loss by hand from that of the lane", counted(gap)),
    ]


def timed(function: Callable[[], Any], count: float) -> float:
    """Return the seconds of a call, in parts."""
    begun = time.perf_counter()
    function()
    return (time.perf_counter() - begun) / count


def rate(seconds: Estimate) -> Estimate:
    """Return how many a minute, from the seconds of one."""
    return Estimate(60 / seconds.value, 60 / seconds.high, 60 / seconds.low)


# ---------------------------------------------------------------------------------------- forks


def measure_forks(settings: Settings) -> list[Figure]:
    """Count the bytes and the time of creating a fork, of a short run and of one of many steps."""
    known: Any = settings
    with tempfile.TemporaryDirectory() as folder:
        digits = Digits(settings, "momentum", pathlib.Path(folder))
        cases = {
            "digits MLP, 220 steps": (digits.run, len(digits.ids) // 2),
            f"{settings.long_steps:,} steps": (long_run(settings, pathlib.Path(folder)), 90_000),
        }
        figures = []
        for name, (run, at) in cases.items():
            assert run.order is not None
            at, last = min(at, run.steps - 4), run.order.epochs - 1
            few = {int(i): 0.0 for i in np.unique(run.ids(at, run.steps))[:100]}
            first = min(few)
            edits = {
                "no edit": {},
                "two batches swapped": {"order": lambda order, at=at: order.swap(at, at + 1)},
                "an epoch reshuffled": {"order": lambda order, e=last: order.shuffled_again(e, 1)},
                "a sample dropped, refilled": {"order": lambda order, i=first: order.drop([i])},
                "100 sample weights": {"sample_weights": few},
                "another key": {"key": jax.random.key(1)},
            }
            if "digits" in name:
                edits["another rate"] = {"optimizer": optax.sgd(0.01, momentum=0.9)}
            for what, changes in edits.items():
                seconds, sizes = [], []
                for number in range(settings.creations):
                    path = pathlib.Path(folder, "forks", f"{run.steps} {what} {number}")
                    begun = time.perf_counter()
                    run.fork(path, at=at, train=False, **changes)
                    seconds.append(1e3 * (time.perf_counter() - begun))
                    files = (file for file in path.rglob("*") if file.is_file())
                    sizes.append(sum(file.stat().st_size for file in files) / 1e3)
                created = median(seconds[1:], known)
                figures.append(Figure(f"{name}: {what}: created", created, "ms", limit=100.0))
                figures.append(Figure(f"{name}: {what}", counted(max(sizes)), "kB", limit=64.0))
    return figures


def long_run(settings: Settings, folder: pathlib.Path) -> replay.Run:
    """Record a run of many steps of next to no work."""
    data = {"x": np.arange(1600, dtype=np.float32) / 1600}
    order = replay.Order.shuffled(16, settings.long_steps // 100, settings.seed)
    program = replay.Program(
        {"w": jnp.zeros(2)}, lambda w, x, key: (w["w"].sum() - x["x"]) ** 2, optax.sgd(0.1)
    )
    options: Any = {"dispatch": "block", "self_test": False, "progress": False}
    return replay.record(folder / "long", program, data, order, key=jax.random.key(0), **options)


# --------------------------------------------------------------------------------------- TracIn


def measure_tracin(settings: Settings) -> list[Figure]:
    """Compare scores of the samples of an epoch, for some others, with the training of it."""
    known: Any = settings
    with tempfile.TemporaryDirectory() as folder:
        queries = Queries(epochs=2, epoch_steps=settings.tracin_steps)
        mlp = Mlp(queries, pathlib.Path(folder), settings.seed)
        digits = Digits(settings, "momentum", pathlib.Path(folder))
        epoch = range(queries.epoch_steps, 2 * queries.epoch_steps)
        whole = range(len(digits.ids))
        cases: dict[str, tuple[Any, range, Callable[[], float], float | None]] = {
            "MLP 784-512-128-10": (mlp, epoch, lambda: mlp.train(epoch), 3.0),
            "digits MLP": (digits, whole, lambda: timed(lambda: digits.by_hand(-1), 1), None),
        }
        figures = []
        for name, (case, steps, train, limit) in cases.items():
            others = {k: np.asarray(v[: settings.others]) for k, v in case.data.items()}
            options: Any = {"steps": slice(steps.start, steps.stop), "progress": False}
            tracin = functools.partial(case.run.tracin, others, learning_rate=0.1, **options)
            asks = {
                f"TracIn for {settings.others} others": (tracin, limit),
                "TracIn with self-influence": (
                    functools.partial(tracin, self_influence=True), None),
                "norms of the gradients alone": (
                    functools.partial(case.run.reduce, replay.reductions.Norm(), **options), None),
            }  # fmt: skip
            for what, (ask, most) in asks.items():
                train()  # compiles, as the next does
                ask()
                ratios = []
                for _ in range(settings.rounds):
                    settle()
                    trained = train()
                    settle()
                    ratios.append(timed(ask, trained))
                ratio = median(ratios, known)
                figures.append(Figure(f"{name}: {what} / training", ratio, limit=most))
            took = counted(1e6 * train() / len(steps))
            figures.append(Figure(f"{name}: a step of the training", took, "us"))
    return figures


# ------------------------------------------------------------------------------------- sections

SECTIONS: dict[str, Callable[[Settings], list[Figure]]] = {
    f"counterfactuals, {name}": functools.partial(measure_counterfactuals, optimizer=name)
    for name in OPTIMIZERS
} | {"forks": measure_forks, "tracin": measure_tracin}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    parser.add_argument("--only", nargs="+", help="beginnings of sections; writes nothing")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    described, begun, figures = environment(), time.perf_counter(), []
    for name, measure in SECTIONS.items():
        if options.only and not any(name.startswith(start) for start in options.only):
            continue
        found = in_new_process(measure, settings)
        figures += found
        print(*found, sep="\n", flush=True)
    minutes = (time.perf_counter() - begun) / 60
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"{minutes:.1f} minutes; targets that are not met: {', '.join(missed) or 'none'}")
    if not options.quick and not options.only:
        result = {
            "question": "how many counterfactuals a minute, and what do forks and TracIn cost?",
            "environment": described | {"load after": os.getloadavg(), "minutes": minutes},
            "settings": dataclasses.asdict(settings),
            "figures": [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures],
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
