"""How well `explain` tells the seconds that a question takes.

Question: on a machine whose prices were measured once, are the seconds that `explain` predicts for
random questions within a factor of two of the real ones?

Command:  python experiments/bench_explain.py            writes results/explain.json
          python experiments/bench_explain.py --quick    runs a few questions; writes nothing
Expected: within a factor of two for nine questions of ten.
Run time: a quarter of an hour on two cores, --quick 2 minutes.

Four runs (two MLPs, a convolutional network, a transformer) are recorded, and questions about them
drawn from a grammar: all quantities, ranges of steps, all tensors or one; sums, means, norms,
variances, maxima, rankings, histograms, quantiles, groups, first events. Each is predicted before
anything like it was asked: what is learnt from answers is put away before each prediction, so that
only the prices of the machine are known. Half of the questions are cold: each is the first about
its run in a new process. Half are warm: the same question was asked before, its seconds forgotten.
Questions that are predicted to take longer than a limit are left out, and counted.

Seconds are those of the processor, of a process that is held to one core: what a clock on the wall
would show on an idle machine. Prices are measured by the same clock. The wall's clock, which also
counts what others do with the core meanwhile, is told beside.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from bench_per_sample import Case, build, source
from bench_per_sample import Settings as Models
from bench_record import environment, in_new_process

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "explain.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    rounds: int = 8
    seed: int = 1
    longest_s: float = 5.0
    repeats: int = 2
    checkpoints: int = 32
    steps: int = 120
    share: float = 0.9

    def quick(self) -> "Settings":
        """Return settings for a smoke test."""
        return dataclasses.replace(self, rounds=1, steps=40, longest_s=1.0)


CASES = {
    "small": Case("mlp", (64, 32), 32),
    "mlp": Case("mlp", (512, 128), 128),
    "cnn": Case("cnn", (8, 16), 32),
    "transformer": Case("transformer", (32, 32), 16),
}
QUANTITIES = (
    "weights", "opt_state", "grads", "updates", "carried_updates", "residual_updates", "condition",
    "sample_losses", "sample_grads", "sample_updates",
)  # fmt: skip
REDUCTIONS = (
    "sum", "mean", "norm", "max", "var", "top_k", "hist", "quantile", "first", "labels", "epoch",
    "tensor",
)  # fmt: skip


def record(name: str, settings: Settings, folder: pathlib.Path) -> replay.Run:
    """Record the training of a model."""
    case = CASES[name]
    models = Models(time=24)
    init, loss = build(case, models)
    rows = 40 * case.batch  # of an epoch
    data = {k: np.resize(v, (rows, *v.shape[1:])) for k, v in source(case, models).items()}
    replay.record(
        folder / name,
        replay.Program(init, loss, optax.adam(1e-3)),
        data,
        replay.Order.shuffled(case.batch, settings.steps * case.batch // rows, settings.seed),
        key=jax.random.key(settings.seed),
        checkpoints=settings.checkpoints,
        embed=True,
        self_test=False,
        progress=False,
    )
    return replay.open(folder / name)


def draw(pick: random.Random, run: replay.Run, labels: np.ndarray) -> tuple[str, Any]:
    """Draw a question, and what to call it."""
    quantity = pick.choice(QUANTITIES)
    x = getattr(run, quantity)
    walk = "state" if "state" in x.dims else "step"
    steps = run.steps
    first = pick.randrange(steps - 8)
    some = slice(first, min(steps, first + pick.choice([4, 16, 48, steps])))
    x = x.sel(**{walk: some})
    name = f"{quantity} of {walk}s {some.start} to {some.stop}"
    if "weight" in x.dims and pick.random() < 0.5:
        tensor = pick.choice(x.tensors)
        x, name = x.sel(tensor=tensor), f"{name} of {tensor}"
    if pick.random() < 0.6:
        x, name = abs(x), f"|{name}|"
    inner = tuple(dim for dim in x.dims if dim != walk)
    choices: list[tuple[str, ...]] = [inner, (walk, *inner), (walk, inner[0])]
    if "position" not in inner:
        choices.append((walk,))
    over = pick.choice(choices)
    how = pick.choice(REDUCTIONS)
    if how == "first":
        return f"first {walk} at which the mean of {name} is huge", (x.mean(inner) > 1e9).first(
            walk
        )
    groups = {"labels": labels, "epoch": "epoch", "tensor": "tensor"}
    needs = {"labels": {"step", "position"}, "epoch": {"step"}, "tensor": {"weight"}}
    if how in groups and needs[how] <= set(over):
        return f"{name} summed over {over} by {how}", x.groupby(groups[how]).sum(dim=over)
    how = "sum" if how in groups else how
    arguments = {"top_k": (pick.choice([1, 5, 10]),), "hist": ([1e-4, 1e-3, 1e-2],),
                 "quantile": (0.9,)}.get(how, ())  # fmt: skip
    return f"{how} of {name} over {', '.join(over)}", getattr(x, how)(*arguments, dim=over)


def taken(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of the processor, and those on the wall."""
    begun, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - begun, time.perf_counter() - wall


def predicted(told: str) -> tuple[float, float]:
    """Read what `explain` prints: the seconds of an answer, and those to compile for it."""
    compiling = re.findall(r"and about (\S+) s to compile", told)
    return float(re.findall(r"about (\S+) s in all", told)[-1]), sum(map(float, compiling))


def prepare(settings: Settings, folder: pathlib.Path) -> tuple[float, float]:
    """Record the runs and measure the prices of the machine; return the seconds of the latter."""
    held(folder)
    runs = [record(name, settings, folder) for name in CASES]
    return taken(lambda: runs[0].grads.sum().explain(calibrate=True))


def held(folder: pathlib.Path) -> None:
    """Hold this process to one core, and what it remembers to a folder."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {"REPLAY_CACHE_BYTES": "0", "XDG_CACHE_HOME": str(folder / "home")}


def measure(settings: Settings, folder: pathlib.Path, number: int) -> dict[str, Any]:
    """Ask two questions of each run in a process that has asked none: a cold and a warm one."""
    held(folder)
    known = folder / "home" / "jax-replay" / "strategies.json"
    learnt, counts = known.read_text(), {"refused": 0, "too long": 0}
    pick, rows = random.Random(1000 * settings.seed + number), []
    for cold in (True, False):
        for model, case in CASES.items():
            run = replay.open(folder / model)
            labels = np.arange(40 * case.batch) % 10
            row = None
            while row is None:
                known.write_text(learnt)
                try:
                    row = one(
                        *draw(pick, run, labels), settings, cold, lambda: known.write_text(learnt)
                    )
                    counts["too long"] += row is None
                except replay.QueryError:  # too large an answer, or one that makes no sense
                    counts["refused"] += 1
            rows.append({"run": model, "cold": cold, **row})
            print(f"{row['ratio']:6.2f} = {row['predicted']:6.2f} / {row['real']:6.2f} s  {model}, "
                  f"{'cold' if cold else 'warm'}: {row['question']}", flush=True)  # fmt: skip
    known.write_text(learnt)
    return {"rows": rows, **counts}


def one(
    name: str, question: Any, settings: Settings, cold: bool, forget: Callable[[], Any]
) -> dict[str, Any] | None:
    """Predict a question and ask it; None where it would take too long."""
    options: Any = {"cache": False, "index": False, "progress": False}
    told, compiling = predicted(question.explain(**options))
    if told - compiling > settings.longest_s:
        return None
    if not cold:
        question.compute(**options)
        forget()
        told, compiling = predicted(question.explain(**options))
    times = [taken(lambda: question.compute(**options))
             for _ in range(1 if cold else settings.repeats)]  # fmt: skip
    real, wall = (min(each) for each in zip(*times, strict=True))
    return {
        "question": name, "predicted": told, "of which to compile": compiling, "real": real,
        "on the wall": wall, "ratio": told / real,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Return the share within a factor of two, the median ratio and the worst ones."""
    found: dict[str, Any] = {}
    kinds = {"all": rows, "cold": [r for r in rows if r["cold"]],
             "warm": [r for r in rows if not r["cold"]]}  # fmt: skip
    for name, mine in kinds.items():
        ratios = [row["ratio"] for row in mine]
        if ratios:
            found[name] = {
                "questions": len(ratios),
                "within a factor of two": sum(0.5 <= x <= 2 for x in ratios) / len(ratios),
                "median ratio": statistics.median(ratios),
            }
    found["met"] = found["all"]["within a factor of two"] >= settings.share
    worst = sorted(rows, key=lambda row: -abs(np.log(row["ratio"])))[:8]
    found["worst"] = [f"{row['ratio']:.2f}: {row['run']}, {row['question']}" for row in worst]
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    options = parser.parse_args()
    settings = Settings().quick() if options.quick else Settings()
    described, begun = environment(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibration = in_new_process(prepare, settings, pathlib.Path(folder))
        rounds = [in_new_process(measure, settings, pathlib.Path(folder), number)
                  for number in range(settings.rounds)]  # fmt: skip
    described |= {"load after": os.getloadavg(), "minutes": (time.perf_counter() - begun) / 60}
    rows = [row for one in rounds for row in one["rows"]]
    told = summary(rows, settings)
    print(json.dumps(told, indent=1))
    if not options.quick:
        result = {
            "question": "are predicted seconds within a factor of two of the real ones?",
            "environment": described,
            "settings": dataclasses.asdict(settings),
            "figures": told,
            "calibration: seconds of the processor, and on the wall": calibration,
            "left out: refused": sum(one["refused"] for one in rounds),
            "left out: too long": sum(one["too long"] for one in rounds),
            "questions": rows,
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
