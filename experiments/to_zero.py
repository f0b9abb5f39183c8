"""What led chosen weights across zero, and whether they stay away without what led them there.

Question: in an MLP on digits some weights cross zero exactly once, late in the training. Which
samples brought each of them there; what share of its way belongs to samples, and what to the
optimizer's memory; and does a fork without the samples with the largest shares keep the weight on
its side? Asked for SGD, momentum and Adam.

Command:  python experiments/to_zero.py            writes results/to_zero.json and to_zero.png
          python experiments/to_zero.py --quick    runs all of it, briefly; writes nothing
Expected: under SGD all of the way belongs to samples, under momentum and Adam about a seventh.
          Forks without the 16 samples of the largest shares keep 3, 8 and 8 of 12 weights away for
          20 steps and more, forks without as many others of the same steps none. Shares order what
          leaving samples out does (r = 0.96), but under momentum and Adam it does 3 to 5 times
          as much as they say: what the optimizer carries had come from samples too.
Run time: 5 minutes on two idle cores (a guess: 4 of processor time; 12 beside other work), --quick
          20 seconds.

A chosen weight crosses zero once in the whole training, at a step `hit` of its second half. The
window is the `hit` and the steps before it, an epoch is more than two of them. The share of a
sample is that of `run.sample_updates`, summed over its visits in the window and counted towards
zero. A fork begins with the window and gives its samples the weight 0 from there to the end of the
training, visits after the window included; everything else, the batches of the others, the keys,
the order, is the same bit for bit. Arms, for each of some numbers of samples:

  largest   without the samples with the largest shares towards zero
  others    without as many others, drawn from the same steps; several draws
  opposed   without the samples with the largest shares away from zero

A weight is kept away if no step up to `after` steps after the hit takes it across. `delay` is the
first crossing of the fork minus the hit; where there is none before the training ends, as if it
came with its end.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "to_zero.json"
TENSOR = "hidden/kernel"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    optimizers: tuple[str, ...] = ("SGD", "momentum", "Adam")
    runs: int = 3
    weights: int = 4
    hidden: int = 32
    batch: int = 32
    epochs: int = 10
    held_out: int = 359
    window: int = 20
    after: int = 20
    counts: tuple[int, ...] = (1, 4, 16)
    shown: int = 4
    draws: int = 2
    seed: int = 0

    def quick(self) -> "Settings":
        """Return settings for a smoke test."""
        return dataclasses.replace(
            self, optimizers=("momentum",), runs=1, weights=1, epochs=4, counts=(1, 4), draws=1
        )


OPTIMIZERS = {
    "SGD": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "Adam": lambda: optax.adam(2e-3),
}


class Chosen(NamedTuple):
    """A weight that crosses zero once, and how it came there.

    Attributes:
        weight: tensor and index.
        hit: the step that takes it across.
        at: the first step of the window.
        values: `float32[states]`, of the whole run.
        samples: `int[n]`, those of the window.
        steps: `int[n]`, where in the window each moved the weight most.
        shares: `float64[n]`, towards zero.
        parts: by range of steps, the share of the way that belongs to samples, to what the
            optimizer carries, and to neither.
    """

    weight: tuple[str, int, int]
    hit: int
    at: int
    values: np.ndarray
    samples: np.ndarray
    steps: np.ndarray
    shares: np.ndarray
    parts: dict[str, dict[str, float]]


def digits(settings: Settings) -> dict[str, np.ndarray]:
    """Return the samples that are trained on."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    kept = np.random.default_rng(0).permutation(len(images))[settings.held_out :]
    return {"image": (images[kept] / 16).astype("float32"), "label": labels[kept].astype("int32")}


def train(path: pathlib.Path, optimizer: str, number: int, settings: Settings) -> replay.Run:
    """Record one training; its initialisation and its order are of its number."""

    def init(key):
        first, last = jax.random.split(key)
        return {
            "hidden": dense(first, 64, settings.hidden),
            "out": dense(last, settings.hidden, 10),
        }

    def dense(key, rows, columns):
        kernel = jax.random.normal(key, (rows, columns)) / np.float32(rows**0.5)
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    def loss(params, example, key):
        hidden, out = params["hidden"], params["out"]
        units = jax.nn.relu(example["image"] @ hidden["kernel"] + hidden["bias"])
        logits = units @ out["kernel"] + out["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    return replay.record(
        path,
        replay.Program(init, loss, OPTIMIZERS[optimizer]()),
        digits(settings),
        replay.Order.shuffled(settings.batch, settings.epochs, seed=number),
        key=jax.random.key(number),
        self_test=False,
        progress=False,
    )


def choose(run: replay.Run, settings: Settings, generator: np.random.Generator) -> list[Chosen]:
    """Draw weights that cross zero once and late, and ask what led each of them there."""
    crosses = run.weights[TENSOR].crosses(0.0)
    questions = [
        crosses.first("step"),
        crosses.sum("step"),
        run.weights[TENSOR],
        run.sample_updates[TENSOR].sum("position"),
        run.carried_updates[TENSOR],
        run.residual_updates[TENSOR],
    ]
    answers = replay.compute(*questions, progress=False)
    hits, times, values, *parts = (np.asarray(answer[TENSOR].values) for answer in answers)
    late = (hits >= run.steps // 2) & (hits < run.steps - 2 * settings.after)
    drawn = generator.permutation(np.argwhere((times == 1) & late))[: settings.weights]
    weights = [(TENSOR, int(row), int(column)) for row, column in drawn]
    ways = []
    for weight in weights:
        hit = run.weights[weight].crosses(0.0).first("step")
        led = run.samples.before(hit, last=settings.window * settings.batch, inclusive=True)
        ways.append(led.join(share=run.sample_updates[weight]))
    found = []
    for weight, way in zip(weights, ways, strict=True):
        hit, own = int(hits[weight[1:]]), (slice(None), *weight[1:])
        at = hit - settings.window + 1
        side = float(np.sign(values[own][at]))
        shares = {}
        answer = way.compute(progress=False)
        for sample, share, step in zip(
            *(answer[name].values for name in ("sample", "share", "step")), strict=True
        ):
            if step >= at:  # an epoch's last batch is short, so 640 samples reach farther
                shares.setdefault(int(sample), []).append((-side * float(share), int(step)))
        found.append(
            Chosen(
                weight,
                hit,
                at,
                values[own],
                np.array(list(shares)),
                np.array([max(visits)[1] for visits in shares.values()]),
                np.array([sum(share for share, _ in visits) for visits in shares.values()]),
                {
                    "window": divided([part[own][at : hit + 1] for part in parts]),
                    "training": divided([part[own][: hit + 1] for part in parts]),
                },
            )
        )
    return found


def divided(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """Return which shares of a way belong to samples, to what is carried, and to neither."""
    sums = [float(part.astype(np.float64).sum()) for part in parts]
    whole = sum(sums)
    return dict(zip(("samples", "carried", "residual"), (x / whole for x in sums), strict=True))


def arms(
    chosen: Chosen, settings: Settings, generator: np.random.Generator
) -> list[tuple[str, int, np.ndarray]]:
    """Return `(arm, count, places of its samples)` of all forks of a weight."""
    ranked, found = np.argsort(-chosen.shares, kind="stable"), []
    for count in settings.counts:
        largest = ranked[:count]
        found += [("largest", count, largest), ("opposed", count, ranked[::-1][:count])]
        for _ in range(settings.draws):
            taken = set(largest.tolist())
            for place in largest:
                rest = [i for i in np.flatnonzero(chosen.steps == chosen.steps[place])]
                rest = [int(i) for i in rest if int(i) not in taken]
                # A step that has no other sample left lends one of any step.
                rest = rest or [i for i in range(len(ranked)) if i not in taken]
                taken.add(int(generator.choice(rest)))
            found.append(("others", count, np.array(sorted(taken - set(largest.tolist())))))
    return found


def fork(
    run: replay.Run, chosen: Chosen, arm: tuple[str, int, np.ndarray], settings: Settings
) -> dict[str, Any]:
    """Train on without some samples; return what became of the weight."""
    name, count, places = arm
    with tempfile.TemporaryDirectory() as folder:
        fork = run.fork(
            pathlib.Path(folder) / "fork",
            replay.edits.leave_out(chosen.samples[places].tolist()),
            at=chosen.at,
            progress=False,
        )
        asked = fork.weights[chosen.weight].sel(state=slice(chosen.at, None))
        values = np.ravel(asked.compute(progress=False)[TENSOR].values)
    assert values[0] == chosen.values[chosen.at]  # the fork shares what comes before it
    side = float(np.sign(values[0]))
    across = np.flatnonzero(np.sign(values[1:]) != side)
    first = chosen.at + int(across[0]) if len(across) else None
    after = chosen.hit + 1 - chosen.at
    moved = float(side) * (float(values[after]) - float(chosen.values[chosen.hit + 1]))
    return {
        "arm": name,
        "count": count,
        "kept": first is None or first > chosen.hit + settings.after,
        "first": first,
        "delay": (run.steps if first is None else first) - chosen.hit,
        "predicted": float(chosen.shares[places].sum()),
        "moved": moved,
        "values": values,
    }


def measure(settings: Settings, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return every weight with all its forks."""
    rows = []
    for optimizer in settings.optimizers:
        for number in range(settings.runs):
            begun = time.perf_counter()
            generator = np.random.default_rng([settings.seed, number])
            run = train(folder / f"{optimizer}-{number}", optimizer, number, settings)
            for chosen in choose(run, settings, generator):
                forks = [
                    fork(run, chosen, arm, settings) for arm in arms(chosen, settings, generator)
                ]
                towards = chosen.shares[chosen.shares > 0]
                top = np.sort(towards)[::-1][: settings.shown]
                rows.append(
                    {
                        "optimizer": optimizer,
                        "run": number,
                        "weight": list(chosen.weight),
                        "hit": chosen.hit,
                        "at": chosen.at,
                        "value at the window": float(chosen.values[chosen.at]),
                        "parts": chosen.parts,
                        "samples in the window": len(chosen.samples),
                        "pushing towards zero": len(towards),
                        "push of the largest": float(top.sum() / towards.sum()),
                        "largest": chosen.samples[np.argsort(-chosen.shares)[:5]].tolist(),
                        "values": chosen.values,
                        "forks": forks,
                    }
                )
            print(f"{optimizer} {number}: {time.perf_counter() - begun:.0f} s", flush=True)
    return rows


def interval(rate: float, count: int) -> list[float]:
    """Return the 95% interval of Wilson (1927) of a rate over a number of weights."""
    z = 1.96
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return [float(centre - half), float(centre + half)]


def summarise(rows: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Return the figures of each optimizer."""
    found = {}
    for optimizer in settings.optimizers:
        own = [row for row in rows if row["optimizer"] == optimizer]
        figures: dict[str, Any] = {"weights": len(own), "parts": {}, "arms": []}
        for within in ("window", "training"):
            for part in ("samples", "carried", "residual"):
                values = [row["parts"][within][part] for row in own]
                figures["parts"][f"{part} in the {within}"] = quartiles(values)
        figures["push of the largest"] = quartiles([row["push of the largest"] for row in own])
        for count in settings.counts:
            for arm in ("largest", "others", "opposed"):
                each = [
                    [fork for fork in row["forks"] if (fork["arm"], fork["count"]) == (arm, count)]
                    for row in own
                ]
                kept = [float(np.mean([fork["kept"] for fork in forks])) for forks in each]
                flat = [fork for forks in each for fork in forks]
                figures["arms"].append(
                    {
                        "arm": arm,
                        "count": count,
                        "forks": len(flat),
                        "kept": float(np.mean(kept)),
                        # Draws of one weight are alike, so weights are counted, not forks.
                        "interval": interval(float(np.mean(kept)), len(own)),
                        "delay": quartiles([fork["delay"] for fork in flat]),
                        "never crosses": float(np.mean([fork["first"] is None for fork in flat])),
                        "predicted": quartiles([fork["predicted"] for fork in flat]),
                        "moved": quartiles([fork["moved"] for fork in flat]),
                    }
                )
        forks = [fork for row in own for fork in row["forks"]]
        predicted, moved = (np.array([fork[k] for fork in forks]) for k in ("predicted", "moved"))
        own = np.array([fork["arm"] == "largest" for fork in forks])
        figures["moved / predicted"] = float((predicted * moved).sum() / (predicted**2).sum())
        figures["correlation"] = float(np.corrcoef(predicted, moved)[0, 1])
        # By themselves: extremes of both signs raise the correlation of all.
        figures["correlation of the largest"] = float(np.corrcoef(predicted[own], moved[own])[0, 1])
        found[optimizer] = figures
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


COLORS = {"largest": "#c1272d", "others": "#8a8a8a", "opposed": "#0000a7"}
WORDS = {
    "largest": "without the largest shares towards 0",
    "others": "without others of the same steps",
    "opposed": "without the largest shares away from 0",
}


def draw(rows: Sequence[dict[str, Any]], figures: dict[str, Any], settings: Settings) -> Any:
    """Draw an example, how often weights were kept away, and shares against what they did."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, names = settings.shown, settings.optimizers
    figure, axes = pyplot.subplots(
        3, len(names), figsize=(4.3 * len(names), 11), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        own = [row for row in rows if row["optimizer"] == name]
        example(axes[0, column], own[0], count, settings)
        samples = figures[name]["parts"]["samples in the window"]
        axes[0, column].set_title(
            f"{name}: of the way in the last {settings.window} steps\n"
            f"{samples['median']:.0%} belongs to samples (median weight)"
        )
        kept(axes[1, column], figures[name], settings)
        against(axes[2, column], own, figures[name])
    axes[0, 0].set_ylabel("value of one chosen weight")
    axes[1, 0].set_ylabel(f"kept away {settings.after} steps beyond the hit\n(share of weights)")
    axes[2, 0].set_ylabel("how much farther from 0\nthe weight was at the hit")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "Without a few samples with the largest shares weights cross zero later, or stay away;\n"
        "without as many others of the same steps they cross when they did"
    )
    return figure


def example(axis: Any, row: dict[str, Any], count: int, settings: Settings) -> None:
    first, at = max(row["at"] - settings.window, 0), row["at"]
    states = np.arange(first, min(row["hit"] + 3 * settings.window, len(row["values"])))
    axis.axhline(0, color="black", lw=0.8)
    axis.axvspan(at, row["hit"] + 1, color="#f2e6c9", label="the window, which ends with the hit")
    shown = set()
    for fork in row["forks"]:
        if fork["count"] == count:
            arm, inside = fork["arm"], states[states >= at]
            label = None if arm in shown else WORDS[arm]
            shown.add(arm)
            axis.plot(inside, fork["values"][inside - at], color=COLORS[arm], label=label)
    axis.plot(states, row["values"][states], color="black", lw=2, label="the run")
    axis.set_xlabel(f"state (without {count} samples; {TENSOR}{row['weight'][1:]})")


def kept(axis: Any, figures: dict[str, Any], settings: Settings) -> None:
    places = np.arange(len(settings.counts))
    for shift, arm in zip((-0.12, 0.0, 0.12), COLORS, strict=True):
        own = [each for each in figures["arms"] if each["arm"] == arm]
        rates = np.array([each["kept"] for each in own])
        low, high = np.array([each["interval"] for each in own]).T
        spread = [np.maximum(rates - low, 0), np.maximum(high - rates, 0)]
        axis.errorbar(places + shift, rates, spread, fmt="o", color=COLORS[arm], capsize=3)
    axis.set_xticks(places, [str(count) for count in settings.counts])
    axis.set_xlabel(f"samples left out, of about {settings.window * settings.batch} in the window")
    axis.set_ylim(-0.05, 1.05)
    axis.set_title(f"{figures['weights']} weights, 95% intervals", fontsize=10)


def against(axis: Any, rows: Sequence[dict[str, Any]], figures: dict[str, Any]) -> None:
    for arm in COLORS:
        forks = [fork for row in rows for fork in row["forks"] if fork["arm"] == arm]
        points = [[fork["predicted"], fork["moved"]] for fork in forks]
        axis.scatter(*np.array(points).T, s=10, color=COLORS[arm], alpha=0.7)
    ends = np.array(axis.get_xlim())
    axis.plot(ends, ends, color="black", lw=0.8, ls=":")
    axis.plot(ends, figures["moved / predicted"] * ends, color="black", lw=0.8)
    axis.set_xlim(ends)
    axis.set_xlabel("shares of the samples left out, towards 0")
    axis.set_title(
        f"moved = {figures['moved / predicted']:.2g} × shares, r = {figures['correlation']:.2f}; "
        "dotted: equal",
        fontsize=10,
    )


def environment() -> dict[str, Any]:
    """Describe the machine and the software."""
    names = ("jax", "jaxlib", "numpy", "optax", "scikit-learn", "matplotlib")
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


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without the values of weights, which the picture shows."""
    return [
        {
            **{name: value for name, value in row.items() if name != "values"},
            "forks": [{k: v for k, v in fork.items() if k != "values"} for fork in row["forks"]],
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run briefly; writes nothing")
    quick = parser.parse_args().quick
    settings = Settings().quick() if quick else Settings()
    described, begun = environment(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(settings, pathlib.Path(folder))
    figures = summarise(rows, settings)
    for name, found in figures.items():
        print(name, json.dumps(found["parts"]["samples in the window"]))
        for arm in found["arms"]:
            print(f"  {arm['arm']:8} {arm['count']:3}: kept {arm['kept']:.2f} {arm['interval']}")
    figure = draw(rows, figures, settings)
    if quick:
        return
    RESULT.parent.mkdir(exist_ok=True)
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)
    result = {
        "question": "what led weights to zero, and do they stay away without it?",
        "environment": {**described, "minutes": (time.perf_counter() - begun) / 60},
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "weights": plain(rows),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
