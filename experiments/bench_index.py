"""What an index costs while a training is recorded, and how many replays it spares afterwards.

Question: how much longer does a step take with each level of an index than without one, how many
bytes does it write, and how many segments are still replayed to find the first step at which a
weight crosses zero?

Command:  python experiments/bench_index.py            writes results/index.json
          python experiments/bench_index.py --quick    runs all of it for a moment, writes nothing
          python experiments/bench_index.py --only "10 ms" crossing
Expected: the result says which of these targets are met. `scalars` takes at most 1.05 times a step
          of 10 ms. Of 40 segments, 4 are replayed on average with `rows`, and 1 with `weights`.
Run time: 7 minutes on two cores, --quick 1 minute; nothing else should run meanwhile.

The steps are those of bench_record.py, and so is the way of measuring: recorders of all levels
alternate block by block in one process, and a ratio is the median of the ratios of neighbouring
blocks, with a bootstrap interval of 95%. What an index costs depends on what a step computes for
each weight: at 2 ms 550 operations for each of 469 thousand weights, at 100 ms 8,500 for each of
405 thousand, at 10 ms 11,000 for each of nine thousand.

"Crossing" asks for 200 seeded weights of one matrix of an MLP of 2,000 steps, some of which never
cross. The truth comes from one replay that keeps these weights at every state. Segments are counted
by planning: of those that hold a step up to the crossing, how many the index does not exclude. For
some of the weights the question is executed, and has to find the true step.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from bench_record import (
    CASES,
    Case,
    Figure,
    counted,
    digits,
    environment,
    in_new_process,
    median,
    model,
    settle,
)

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "index.json"
LEVELS = ("off", "scalars", "rows", "weights")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    rounds: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"2 ms": 24, "10 ms": 24, "100 ms": 12}
    )
    epochs: int = 4_000
    limits: dict[tuple[str, str], float] = dataclasses.field(
        default_factory=lambda: {("10 ms", "scalars"): 1.05}
    )

    crossing: Case = Case("mlp", (512, 128), 128, 28, interval=50, block=0, rounds=0)
    crossing_steps: int = 2_000
    crossing_weights: int = 200
    crossing_executed: int = 6
    crossing_limits: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"rows": 4.0, "weights": 1.0}
    )

    seed: int = 0
    resamples: int = 4_000

    def quick(self) -> "Settings":
        """Return settings for a smoke test of everything."""
        return dataclasses.replace(
            self,
            rounds={"2 ms": 3, "10 ms": 3, "100 ms": 1},
            crossing=dataclasses.replace(self.crossing, widths=(64, 32), interval=10),
            crossing_steps=200,
            crossing_weights=40,
            crossing_executed=2,
        )


def recorder(case: Case, settings: Settings, path: pathlib.Path, **options: Any) -> replay.Recorder:
    """Return a recorder of a case of bench_record.py."""
    init, loss = model(case)
    return replay.Recorder(
        path,
        replay.Program(init, loss, optax.adam(1e-3)),
        digits(case.side),
        replay.Order.shuffled(case.batch, settings.epochs, settings.seed),
        key=jax.random.key(settings.seed),
        self_test=False,
        **options,
    )


def index_bytes(path: pathlib.Path) -> int:
    """Return the bytes of what an index has written."""
    columns = re.compile("(grads|updates)_(max|norm|above)$")
    files = [*path.glob("steps/*/**/*"), *path.glob("segments/**/*")]
    mine = [
        file
        for file in files
        if file.parts[len(path.parts)] == "segments"
        or columns.match(file.parts[len(path.parts) + 1])
    ]
    return sum(file.stat().st_size for file in mine if file.is_file())


def measure_steps(settings: Settings, name: str) -> list[Figure]:
    """Compare the time of a step with each level to that without."""
    case = CASES[name]
    found: dict[str, list[float]] = {level: [] for level in LEVELS}
    steps = {}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with contextlib.ExitStack() as recording:
            loops = {
                level: recording.enter_context(
                    recorder(case, settings, folder / level, index=level, checkpoints=case.interval)
                )
                for level in LEVELS
            }
            for loop in loops.values():
                loop.advance(max(case.block, 8))
                jax.block_until_ready(loop.state)
            for turn in range(settings.rounds[name]):
                for level in list(loops)[:: 1 if turn % 2 else -1]:
                    settle()
                    begun = time.perf_counter()
                    loops[level].advance(case.block)
                    jax.block_until_ready(loops[level].state)
                    found[level].append((time.perf_counter() - begun) / case.block)
            settle()
            steps = {level: loop.step for level, loop in loops.items()}
        sizes = {level: index_bytes(folder / level) for level in LEVELS}
    each: Any = settings
    figures = [Figure(f"{name} step: off", median(1e3 * np.array(found["off"]), each), "ms")]
    for level in LEVELS[1:]:
        ratios = np.divide(found[level], found["off"])
        limit = settings.limits.get((name, level))
        thousand = 1e3 * sizes[level] / steps[level] / 1e3
        figures += [
            Figure(f"{name} step: {level} / off", median(ratios, each), limit=limit),
            Figure(f"{name}: {level}, a thousand steps", counted(thousand), "kB"),
        ]
    return figures


def measure_crossing(settings: Settings) -> list[Figure]:
    """Count the segments that are replayed until a weight has crossed zero."""
    case, steps = settings.crossing, settings.crossing_steps
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run"
        options = {"index": "off", "checkpoints": case.interval}
        with recorder(case, settings, path, **options) as recording:
            recording.advance(steps)
        run = replay.open(path)
        matrices = [leaf for leaf in run.tensors if len(leaf.shape) == 2]
        tensor = sorted(matrices, key=lambda leaf: -leaf.nbytes)[1]
        random = np.random.default_rng(settings.seed)
        size = int(np.prod(tensor.shape))
        chosen = np.sort(random.choice(size, settings.crossing_weights, replace=False))
        walk = run.weights[tensor.path].sel(weight=chosen.tolist()).compute(cache=False)
        walk = walk[tensor.path].values
        crossed = (walk[:-1] != 0) & (np.sign(walk[:-1]) != np.sign(walk[1:]))
        hits = np.where(crossed.any(0), crossed.argmax(0), -1)
        seen = np.where(hits < 0, steps - 1, hits) // case.interval + 1
        figures = [
            Figure("crossing 0: weights that never do", counted(float((hits < 0).mean()))),
            Figure("crossing 0: segments without an index, mean", counted(float(seen.mean()))),
        ]
        executed = random.choice(len(chosen), settings.crossing_executed, replace=False)
        for level in LEVELS[1:]:
            begun = time.perf_counter()
            run.index(level, progress=False)
            built = time.perf_counter() - begun
            counts = []
            for place, (weight, hit) in enumerate(zip(chosen.tolist(), hits.tolist(), strict=True)):
                crosses = run.weights[tensor.path].sel(weight=weight).crosses(0.0)
                counts.append(segments(crosses, steps if hit < 0 else hit + 1))
                if place in executed:
                    answer = crosses.first("step").compute(cache=False)
                    assert int(answer[tensor.path].values) == hit
                    assert answer.attrs["steps"] <= counts[-1] * case.interval
            limit, what = settings.crossing_limits.get(level), f"crossing 0: segments with {level}"
            figures += [
                Figure(f"{what}, mean", counted(float(np.mean(counts))), limit=limit),
                Figure(f"{what}, 95th percentile", counted(float(np.percentile(counts, 95)))),
                Figure(f"crossing 0: {level} built afterwards", counted(built), "s"),
            ]
    return figures


def segments(crosses: Any, stop: int) -> int:
    """Return how many segments are replayed for the steps before `stop`."""
    told = crosses.sel(step=slice(0, stop)).first("step").explain(cache=False)
    found = re.search(r": (\d+) of \d+ segments", told)
    return int(found.group(1)) if found else 0


SECTIONS: dict[str, Callable[[Settings], list[Figure]]] = {
    **{name: functools.partial(measure_steps, name=name) for name in ("2 ms", "10 ms", "100 ms")},
    "crossing": measure_crossing,
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="keeps the other sections")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    result: dict[str, Any] = {"sections": {}}
    if RESULT.exists() and options.only:
        result = json.loads(RESULT.read_text())
    result["question"] = "what does an index cost, and how many replays does it spare?"
    for name in options.only or SECTIONS:
        described, begun = environment(), time.perf_counter()
        figures = in_new_process(SECTIONS[name], settings)
        print(f"-- {name}", *figures, sep="\n", flush=True)
        described["load after"] = os.getloadavg()
        described["minutes"] = (time.perf_counter() - begun) / 60
        plain = dataclasses.asdict(settings)
        plain["limits"] = {" ".join(key): value for key, value in settings.limits.items()}
        result["sections"][name] = {
            "environment": described,
            "settings": plain,
            "figures": [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures],
        }
        if not options.quick:
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
