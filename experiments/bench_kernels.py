"""What the reductions of per-sample gradients cost, in training steps.

Question: can every sample of every step be asked for its gradient of every weight, for the price
of a few steps? Each reduction runs over all three dense layers of an MLP.

Command:  python experiments/bench_kernels.py            writes results/bench_kernels.json
          python experiments/bench_kernels.py --quick    runs all of it for a moment, writes nothing
Expected: over the time of one Adam step on the same batch, the sums of squares and of magnitudes
          take at most 1, the arg-max at most 3, the running top-10 at most 6 with the compiled
          kernel and at most 15 in XLA alone.
Run time: 2 minutes on two cores, --quick 30 seconds; nothing else should run meanwhile.

The step is jitted and donates its state. Batches change with every call; their factors are drawn
as they are after a ReLU, about half of them zero. The arg-max is that of one batch. The top-10 runs
on, after `warm` steps: of a running top-k that is the price that counts, the first batches cost
more, see `cold`. The kernels for GPU are not measured.

How it is measured. Figures of different minutes are never compared: blocks of calls alternate in
one process, and a ratio is the median over the rounds of (block of a reduction) / (block of steps
just before it), with a bootstrap interval of 95%. A target is met where the upper end of the
interval meets it.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from replay.kernels import square_sum, top_k

RESULT = pathlib.Path(__file__).parent / "results" / "bench_kernels.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    widths: tuple[int, ...] = (784, 512, 128, 10)
    batch: int = 128
    k: int = 10
    warm: int = 500
    rounds: int = 30
    calls: int = 8
    seed: int = 0
    resamples: int = 4_000
    limits: tuple[tuple[str, float], ...] = (
        ("square_sum, xla", 1),
        ("abs_sum, xla", 1),
        ("arg-max, xla", 3),
        ("arg-max, compiled", 3),
        ("running top-10, compiled", 6),
        ("running top-10, xla", 15),
    )

    def quick(self) -> "Settings":
        """Return settings for a smoke test of everything, too cold for the limits."""
        return dataclasses.replace(self, warm=20, rounds=2, calls=1, limits=())


class Estimate(NamedTuple):
    """A median and its interval of 95%."""

    value: float
    low: float
    high: float


class Factors(NamedTuple):
    """Of one dense layer: `left float32[n, 1, 1, i]`, `right float32[n, 1, 1, j]`."""

    left: Any
    right: Any


Call = Callable[[int, list[Factors]], None]  # takes the next batch: its number and factors


def median(values: Sequence[float] | np.ndarray, settings: Settings) -> Estimate:
    """Return the median of independent measurements and its bootstrap interval (Efron, 1979)."""
    values = np.asarray(values, np.float64)
    shape = (settings.resamples, len(values))
    picks = np.random.default_rng(settings.seed).integers(len(values), size=shape)
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def settle() -> None:
    """Wait until no thread of this process computes any more."""
    idle = False
    while not idle:
        before = time.process_time()
        time.sleep(0.005)
        idle = time.process_time() - before < 0.0005


# ------------------------------------------------------------------------------ what is compared


@functools.partial(jax.jit, static_argnames="settings")
def draw(number: Any, settings: Settings) -> list[Factors]:
    """Return the factors of a batch: activations after a ReLU, cotangents masked by one."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), number), 9)
    factors = []
    for layer, (i, j) in enumerate(itertools.pairwise(settings.widths)):
        last = layer == len(settings.widths) - 2
        left = jax.nn.relu(jax.random.normal(keys[3 * layer], (settings.batch, 1, 1, i)))
        right = 0.01 * jax.random.normal(keys[3 * layer + 1], (settings.batch, 1, 1, j))
        passed = jax.random.bernoulli(keys[3 * layer + 2], 0.5, right.shape) | last
        factors.append(Factors(left, jnp.where(passed, right, 0.0)))
    return factors


def training(settings: Settings) -> Call:
    """Return a function that takes an Adam step of the network and waits for it."""
    key = jax.random.key(settings.seed)
    shapes = list(itertools.pairwise(settings.widths))
    params = [
        {"w": jax.random.normal(key, shape) * shape[0] ** -0.5, "b": jnp.zeros(shape[1])}
        for shape in shapes
    ]
    optimizer = optax.adam(1e-3)
    data = np.random.default_rng(settings.seed)
    images = np.maximum(data.standard_normal((settings.batch, settings.widths[0])), 0)
    labels = data.integers(settings.widths[-1], size=settings.batch)

    def loss(params, images, labels):
        x = images
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    carry = [params, optimizer.init(params)]
    batch = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)

    def advance(number: int, factors: list[Factors]) -> None:
        carry[:] = jax.block_until_ready(step(*carry, *batch))

    return advance


def empty(settings: Settings, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [top_k.empty(k, (1, *shape)) for shape in itertools.pairwise(settings.widths)]


def occurrence(number: int, settings: Settings) -> np.ndarray:
    return np.arange(settings.batch, dtype=np.int32) + np.int32(number * settings.batch)


def reductions(settings: Settings) -> tuple[dict[str, Call], dict[str, float]]:
    """Return the reductions, and what the first batches of the running top-k took."""

    def total(power: int) -> Call:
        shapes = itertools.pairwise(settings.widths)
        carry = [[jnp.zeros((1, *shape)) for shape in shapes]]

        @functools.partial(jax.jit, donate_argnums=0)
        def add(totals, factors):
            return [
                square_sum.xla(total, each.left, each.right, power=power)
                for total, each in zip(totals, factors, strict=True)
            ]

        def call(number: int, factors: list[Factors]) -> None:
            carry[0] = jax.block_until_ready(add(carry[0], factors))

        return call

    @jax.jit
    def largest(factors):
        return [top_k.largest(*each) for each in factors]

    @functools.partial(jax.jit, donate_argnums=0)
    def insert(states, factors, occurrence):
        return [
            top_k.xla(values, occurrences, each.left, each.right, occurrence)
            for (values, occurrences), each in zip(states, factors, strict=True)
        ]

    @jax.jit
    def arg_max(factors, occurrence):
        states = [
            (jnp.full((1, 1, *shape), -jnp.inf), jnp.full((1, 1, *shape), -1, jnp.int32))
            for shape in itertools.pairwise(settings.widths)
        ]
        return insert(states, factors, occurrence)

    def insert_compiled(states: Any, number: int, factors: list[Factors]) -> None:
        numbers = occurrence(number, settings)
        assert top_k.compiled is not None, "it is measured where there is numba"
        for (values, occurrences), each in zip(states, factors, strict=True):
            top_k.compiled(values, occurrences, each.left, each.right, numbers)

    carry = [jax.tree.map(jnp.array, empty(settings, settings.k))]

    def insert_xla(number: int, factors: list[Factors]) -> None:
        carry[0] = jax.block_until_ready(insert(carry[0], factors, occurrence(number, settings)))

    def arg_max_xla(number: int, factors: list[Factors]) -> None:
        jax.block_until_ready(arg_max(factors, occurrence(number, settings)))

    def arg_max_compiled(number: int, factors: list[Factors]) -> None:
        insert_compiled(empty(settings, 1), number, factors)

    top = f"running top-{settings.k}"
    found = {
        "square_sum, xla": total(2),
        "abs_sum, xla": total(1),
        "max, xla": lambda number, factors: jax.block_until_ready(largest(factors)),
        "arg-max, xla": arg_max_xla,
        f"{top}, xla": insert_xla,
    }
    states = empty(settings, settings.k)
    warm = insert_xla
    if top_k.compiled is not None:
        warm = functools.partial(insert_compiled, states)
        found |= {"arg-max, compiled": arg_max_compiled, f"{top}, compiled": warm}
        insert_compiled(empty(settings, 1), 0, draw(0, settings))  # compiles
    times = [milliseconds(warm, [number], settings) for number in range(settings.warm)]
    if top_k.compiled is not None:
        carry[0] = jax.tree.map(jnp.array, states)
    cold = {
        f"{top}, batches {low} to {high - 1}": float(np.mean(times[low:high]))
        for low, high in ((0, 1), (1, 10), (10, 100), (100, 500))
        if high <= settings.warm
    }
    return found, cold


# ------------------------------------------------------------------------------------------ all


def milliseconds(call: Call, numbers: Sequence[int], settings: Settings) -> float:
    """Return the milliseconds that each of some batches takes; none is ever drawn twice."""
    batches = jax.block_until_ready([draw(number, settings) for number in numbers])
    settle()
    begun = time.perf_counter()
    for number, batch in zip(numbers, batches, strict=True):
        call(number, batch)
    return 1e3 * (time.perf_counter() - begun) / len(numbers)


def measure(settings: Settings) -> dict[str, Any]:
    """Return the figures of all reductions."""
    step = training(settings)
    found, cold = reductions(settings)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    numbers = settings.warm
    for call in (step, *found.values()):
        milliseconds(call, [numbers], settings)  # compiles
    numbers += 1
    for _ in range(settings.rounds):
        fresh = range(numbers, numbers := numbers + settings.calls)
        for name, call in found.items():
            ours = milliseconds(step, fresh, settings)
            times[name].append((ours, milliseconds(call, fresh, settings)))
    figures = {}
    for name, pairs in times.items():
        steps, calls = np.array(pairs).T
        ratio, limit = median(calls / steps, settings), dict(settings.limits).get(name)
        figures[name] = {
            "ratio": ratio._asdict(),
            "ms": median(calls, settings)._asdict(),
            "limit": limit,
            "met": None if limit is None else ratio.high <= limit,
        }
    alone = np.concatenate([np.array(pairs)[:, 0] for pairs in times.values()])
    return {"step, ms": median(alone, settings)._asdict(), "figures": figures, "cold, ms": cold}


def environment() -> dict[str, Any]:
    """Describe the machine and the software."""
    names = ("jax", "jaxlib", "numpy", "optax") + (("numba",) if top_k.compiled else ())
    processor = pathlib.Path("/proc/cpuinfo").read_text().partition("model name")[2]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor.partition(":")[2].partition("\n")[0].strip(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    described, begun = environment(), time.perf_counter()
    result = measure(settings)
    print(f"step {result['step, ms']['value']:.2f} ms; cold {result['cold, ms']}")
    for name, figure in result["figures"].items():
        ratio = figure["ratio"]
        verdict = {None: "", True: "met", False: "NOT MET"}[figure["met"]]
        target = "" if figure["limit"] is None else f"<= {figure['limit']:g}  {verdict}"
        interval = f"[{ratio['low']:.3g}, {ratio['high']:.3g}]"
        print(f"{name:<26}{ratio['value']:>7.3g} steps {interval:<16}{target}".rstrip())
    minutes = (time.perf_counter() - begun) / 60
    print(f"{minutes:.1f} minutes")
    if not options.quick:
        record = {
            "question": "what do reductions of per-sample gradients cost, in training steps?",
            "environment": described | {"load after": os.getloadavg(), "minutes": minutes},
            "settings": dataclasses.asdict(settings),
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
