"""What leaving one sample out really does, whether it is more than rounding, and who predicts it.

Question: 600 training samples of digits are left out one at a time, everything else the same bit
for bit. How large are the effects on the losses of 359 held-out images, in their own units, in
those of numerical noise, and beside what another seed changes? How well do norms of gradients,
TracIn at the last checkpoint and idealised TracIn predict them; and how well does the executed
truth of one seed predict that of another?

Command:  python experiments/leave_one_out.py            writes results/leave_one_out.json and .png
          python experiments/leave_one_out.py --quick    runs all of it, briefly; writes nothing
          python experiments/leave_one_out.py --draw     draws the written result again
Expected: effects are four to five orders of magnitude above the noise of rounding, and lanes are
          real forks to the bit; but one effect is some hundredths of what another seed changes.
          TracIn orders them by 0.57 for softmax regression over three epochs, by less than 0.2 for
          an MLP over ten. The truth of another seed does better by SGD (0.72, 0.47), but by Adam it
          is no better than anything else (0.21). Sums of effects predict subsets by 0.8 and more.
Run time: 3 minutes on two cores, --quick 20 seconds.

Models are trained with batches of 32: softmax regression by SGD for three epochs, which is nearly
convex and short, and an MLP with 32 hidden units by SGD and by Adam for ten. Each is trained with
eight seeds, which decide initialisation and order; samples are left out of three of these runs, and
questions about predictions are asked of the first. An effect is the loss without the sample minus
the loss with it. Scores predict it:

  norms       sum over the visits of lr/B |g_i|^2: the same for all held-out images
  last        TracIn at the final state alone
  idealised   TracIn summed over the visits, at the exact weights of each
  other seed  the executed effect of leaving the sample out of a run of another seed

Spearman's correlation over the samples, for each held-out image (median and quartiles) and for the
mean held-out loss (95% bootstrap over the samples). The linear datamodelling score (LDS) does the
same over lanes that each leave 30 of the samples out; `executed` is there the sum of the effects
of leaving them out singly. Null lanes differ from the run by one unit in the last place of one
initial weight.
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
from scipy.stats import rankdata
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "leave_one_out.json"


class Case(NamedTuple):
    """A training: hidden units (none for softmax regression), optimizer, its rate, epochs."""

    hidden: int
    optimizer: str
    rate: float
    epochs: int


CASES = {
    "softmax, SGD, 3 epochs": Case(0, "sgd", 0.1, 3),
    "MLP, SGD, 10 epochs": Case(32, "sgd", 0.1, 10),
    "MLP, Adam, 10 epochs": Case(32, "adam", 2e-3, 10),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    cases: tuple[str, ...] = tuple(CASES)
    seeds: int = 3
    recorded: int = 8
    samples: int = 600
    held_out: int = 359
    batch: int = 32
    nulls: int = 32
    subsets: int = 128
    subset_size: int = 30
    confirmed: int = 20
    largest: int = 5
    resamples: int = 1_000
    seed: int = 0

    def quick(self) -> "Settings":
        """Return settings for a smoke test."""
        return dataclasses.replace(
            self, cases=tuple(CASES)[:1], seeds=2, recorded=2, samples=24, nulls=16,
            subsets=8, subset_size=4, confirmed=1, largest=1, resamples=50,
        )  # fmt: skip


def digits(settings: Settings) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the samples that are trained on, and those held out."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    places = np.random.default_rng(0).permutation(len(images))
    parts = places[settings.held_out :], places[: settings.held_out]
    one, other = (
        {"image": (images[ids] / 16).astype("float32"), "label": labels[ids].astype("int32")}
        for ids in parts
    )
    return one, other


def train(path: pathlib.Path, case: Case, seed: int, settings: Settings) -> replay.Run:
    """Record one training; its initialisation and its order are of its seed."""

    def dense(key, rows, columns):
        kernel = jax.random.normal(key, (rows, columns)) / np.float32(rows**0.5)
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    def init(key):
        first, last = jax.random.split(key)
        if not case.hidden:
            return {"out": dense(last, 64, 10)}
        return {"hidden": dense(first, 64, case.hidden), "out": dense(last, case.hidden, 10)}

    def loss(params, example, key):
        units = example["image"]
        if case.hidden:
            units = jax.nn.relu(units @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        logits = units @ params["out"]["kernel"] + params["out"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[case.optimizer](case.rate)
    return replay.record(
        path,
        replay.Program(init, loss, optimizer),
        digits(settings)[0],
        replay.Order.shuffled(settings.batch, case.epochs, seed=seed),
        key=jax.random.key(seed),
        self_test=False,
        progress=False,
    )


def measure(case: Case, folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Answer every question about one case."""
    held_out = digits(settings)[1]
    runs = [train(folder / f"{seed}", case, seed, settings) for seed in range(settings.recorded)]
    generator = np.random.default_rng(settings.seed)
    ids = np.sort(generator.permutation(len(digits(settings)[0]["label"]))[: settings.samples])
    edits, options = replay.edits.leave_one_out(ids), {"metric": held_out, "progress": False}
    options["nulls"] = settings.nulls
    alone = [run.counterfactuals(edits, **options) for run in runs[: settings.seeds]]
    last = [run.on(held_out).sample_losses.sel(state=run.steps).mean() for run in runs]
    losses = [float(loss) for loss in replay.compute(*last, progress=False)]
    first, run = alone[0], runs[0]
    subsets = run.counterfactuals(
        replay.edits.leave_some_out(
            ids.tolist(), settings.subset_size, count=settings.subsets, seed=settings.seed
        ),
        **options,
    )
    scores = scores_of(runs[0], case, held_out)
    for name, found in {"executed": alone[0], "other seed": alone[1]}.items():
        scores[name] = np.zeros(scores["last"].shape)
        scores[name][ids] = found.effect.values
    effects = first.effect.values
    predictions = {
        name: predicted(score[ids], effects, settings)
        for name, score in scores.items()
        if name != "executed"
    }
    datamodels = {name: datamodel(score, subsets, settings) for name, score in scores.items()}
    # The same lanes again, which are taken from the cache, and forks of some of them.
    largest = np.argsort(-np.abs(first.means()[0]), kind="stable")[: settings.largest]
    rest = np.setdiff1d(np.arange(len(ids)), largest)
    drawn = generator.choice(rest, settings.confirmed, replace=False)
    confirmed = run.counterfactuals(edits, **options, confirm=[*largest, *drawn]).confirmed
    assert confirmed is not None
    means = first.means()[0]
    norms = scores["norms"][ids]
    return {
        "steps": run.steps,
        "training loss": float(run.history()["loss"][-run.steps // case.epochs :].mean()),
        "held-out loss": losses,
        "effects": sizes(first, losses),
        "norms and size": float(correlations(norms[:, None], np.abs(means)[:, None])[0]),
        "predictions": predictions,
        "LDS": datamodels,
        "control deviation": first.dataset.attrs["control_weight_deviation"],
        "largest deviation of a fork": float(np.abs(confirmed["difference"].values).max()),
        "confirmed": [
            {
                "sample": int(ids[int(edit)]),
                "largest": number < settings.largest,
                "effect by lane": float(confirmed["effect_by_lane"].values[number].mean()),
                "effect by fork": float(confirmed["effect_by_fork"].values[number].mean()),
                "deviation": float(np.abs(confirmed["difference"].values[number]).max()),
            }
            for number, edit in enumerate(confirmed["edit"].values)
        ],
        "seconds of lanes": [found.dataset.attrs["seconds"] for found in alone],
        "samples": ids.tolist(),
        "mean effects": [[float(f"{x:.4g}") for x in found.means()[0]] for found in alone],
        "mean null effects": [float(f"{x:.4g}") for x in first.means()[1]],
        "idealised": [float(f"{x:.4g}") for x in scores["idealised"][ids].mean(1)],
    }


def scores_of(run: replay.Run, case: Case, held_out: Any) -> dict[str, np.ndarray]:
    """Return scores of all samples, `float64[samples]` or `float64[samples, held out]`."""
    options = {"learning_rate": case.rate, "progress": False}
    every = run.tracin(held_out, self_influence=True, **options)
    last = run.tracin(held_out, checkpoints=[run.steps], **options)
    return {
        "norms": every["self_influence"].values,
        "last": last["value"].values,
        "idealised": every["value"].values,
    }


def sizes(found: Any, losses: Sequence[float]) -> dict[str, Any]:
    """Return how large the effects are, in three units."""
    effects, nulls = (found.dataset[name].values for name in ("effect", "null_effect"))
    means, noises = found.means()
    noise = float(noises.std(ddof=1))
    seeds = float(np.std(losses, ddof=1))
    beyond = np.abs(effects) > np.abs(nulls).max(axis=0)
    return {
        "|effect| on the mean": quartiles(np.abs(means)),
        "largest |effect| on the mean": float(np.abs(means).max()),
        "lowers the mean": float((means < 0).mean()),
        "noise of the mean": noise,
        "|effect| / noise": quartiles(np.abs(means) / noise),
        "beyond all null lanes, mean": float((np.abs(means) > np.abs(noises).max()).mean()),
        "beyond all null lanes, each image": float(beyond.mean()),
        "null lanes without effect": float((nulls == 0).all(axis=1).mean()),
        "images on which no null lane has an effect": float((nulls == 0).all(axis=0).mean()),
        "spread of the mean over seeds": seeds,
        "|effect| / spread over seeds": quartiles(np.abs(means) / seeds),
    }


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's correlations of the columns of two tables; NaN where one is constant."""
    first, second = (rankdata(x, axis=0) for x in (a, b))
    first, second = (x - x.mean(axis=0) for x in (first, second))
    scale = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(axis=0) / scale


def predicted(scores: np.ndarray, effects: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Return how well scores of samples order the effects of leaving them out."""
    wide = np.broadcast_to(scores.reshape(len(scores), -1), effects.shape)
    return {
        "each image": quartiles(correlations(wide, effects)),
        "mean": resampled(wide.mean(axis=1), effects.mean(axis=1), settings),
    }


def datamodel(scores: np.ndarray, subsets: Any, settings: Settings) -> dict[str, Any]:
    """Return how well sums of scores order the effects of leaving subsets out."""
    found, changes = subsets.lds(scores), subsets.changes
    sums, means = np.zeros(len(subsets.effect)), scores.reshape(len(scores), -1).mean(axis=1)
    np.add.at(sums, changes.edit, changes.less * means[changes.sample])
    return {
        "each image": quartiles(found.correlation),
        "mean of images": found.mean,
        "mean": resampled(sums, subsets.means()[0], settings),
    }


def resampled(a: np.ndarray, b: np.ndarray, settings: Settings) -> dict[str, float]:
    """Return Spearman's correlation of two rows, and its 95% interval by the bootstrap."""
    generator = np.random.default_rng(settings.seed)
    drawn = generator.integers(len(a), size=(settings.resamples, len(a)))
    low, high = np.quantile(correlations(a[drawn].T, b[drawn].T), [0.025, 0.975])
    return {
        "value": float(correlations(a[:, None], b[:, None])[0]),
        "low": float(low),
        "high": float(high),
    }


def quartiles(values: Any) -> dict[str, float]:
    low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


COLORS = {
    "norms": "#8a8a8a",
    "last": "#e0a030",
    "idealised": "#c1272d",
    "other seed": "#0000a7",
    "executed": "#1b7f4d",
}


def draw(found: dict[str, dict[str, Any]]) -> Any:
    """Draw the effects beside noise and seeds, the best scores against them, and correlations."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, len(found), figsize=(4.6 * len(found), 11.5), squeeze=False, layout="constrained"
    )
    for column, (name, each) in enumerate(found.items()):
        axes[0, column].set_title(name, fontweight="bold")
        distribution(axes[0, column], each)
        against(axes[1, column], each)
        bars(axes[2, column], each)
    axes[2, 0].legend(fontsize=8, ncols=2, loc="lower left", frameon=False)
    axes[0, 0].set_ylabel("share of lanes with a smaller effect")
    axes[1, 0].set_ylabel("executed effect of leaving one out\n(mean held-out loss, nats)")
    axes[2, 0].set_ylabel("Spearman's correlation")
    figure.suptitle(
        "Leaving one sample out does far more than rounding, mostly far less than another seed;\n"
        "TracIn orders the effects for softmax regression, and hardly for an MLP"
    )
    return figure


def distribution(axis: Any, each: dict[str, Any]) -> None:
    effects, sizes = np.abs(each["mean effects"][0]), each["effects"]
    nulls = np.abs(each["mean null effects"])
    lanes = {"null lanes: 1 unit in the last place": nulls, "one sample left out": effects}
    for (label, values), color in zip(lanes.items(), ("#8a8a8a", "#c1272d"), strict=True):
        # A null lane that changes nothing at all has no place on this axis, but counts.
        heights = np.arange(1, len(values) + 1) / len(values)
        ordered = np.maximum(np.sort(values), 1e-10)
        axis.step(ordered, heights, where="post", color=color, label=label, lw=2)
    axis.axvline(
        sizes["spread of the mean over seeds"], ymax=1.03 / 1.43, color="black", ls="--",
        label="another seed (standard deviation of 8)",
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_ylim(-0.03, 1.4)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_xlim(1e-10, 1)
    axis.set_xlabel("|effect| on the mean held-out loss (nats)")
    axis.legend(loc="upper left", fontsize=8, frameon=False)


def against(axis: Any, each: dict[str, Any]) -> None:
    score, effect = np.array(each["idealised"]), np.array(each["mean effects"][0])
    axis.axhline(0, color="black", lw=0.5)
    axis.axvline(0, color="black", lw=0.5)
    axis.scatter(score, effect, s=7, color=COLORS["idealised"], alpha=0.6)
    axis.set_xlabel("idealised TracIn (mean over held-out images)")
    value = each["predictions"]["idealised"]["mean"]
    axis.set_title(
        f"Spearman {value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}], "
        f"{len(score)} samples",
        fontsize=10,
    )


def bars(axis: Any, each: dict[str, Any]) -> None:
    tables = {
        "one out,\nmean loss": ("predictions", "mean", "value"),
        "one out,\neach image": ("predictions", "each image", "median"),
        "LDS,\nmean loss": ("LDS", "mean", "value"),
        "LDS,\neach image": ("LDS", "each image", "median"),
    }
    for shift, (name, color) in enumerate(COLORS.items()):
        for place, (table, kind, middle) in enumerate(tables.values()):
            if name not in each[table]:
                continue
            found = each[table][name][kind]
            spread = [[found[middle] - found["low"]], [found["high"] - found[middle]]]
            axis.errorbar(
                place + 0.14 * (shift - 2), found[middle], np.maximum(spread, 0), fmt="o",
                color=color, capsize=3, label=name if place == len(tables) - 1 else None,
            )  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(tables)), list(tables), fontsize=8)
    axis.set_ylim(-0.35, 1.05)
    axis.set_title("mean loss: 95% intervals; each image: median, quartiles", fontsize=9)


def environment() -> dict[str, Any]:
    """Describe the machine and the software."""
    names = ("jax", "jaxlib", "numpy", "optax", "scipy", "scikit-learn", "matplotlib")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run briefly; writes nothing")
    parser.add_argument("--draw", action="store_true", help="draw the written result again")
    quick, again = (getattr(parser.parse_args(), name) for name in ("quick", "draw"))
    settings = Settings().quick() if quick else Settings()
    if again:
        written = json.loads(RESULT.read_text())["cases"]
        draw(written).savefig(RESULT.with_suffix(".png"), dpi=110)
        return
    described, begun, found = environment(), time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(settings.cases):
            started = time.perf_counter()
            place = pathlib.Path(folder) / str(number)
            found[name] = measure(CASES[name], place, settings)
            print(f"{name}: {time.perf_counter() - started:.0f} s")
            for key in ("effects", "predictions", "LDS", "largest deviation of a fork"):
                print(f"  {key}: {json.dumps(found[name][key])}", flush=True)
    figure = draw(found)
    if quick:
        return
    RESULT.parent.mkdir(exist_ok=True)
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)
    result = {
        "question": "what does leaving one sample out do, and who predicts it?",
        "environment": {**described, "minutes": (time.perf_counter() - begun) / 60},
        "settings": dataclasses.asdict(settings),
        "cases": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
