"""Which samples precede an explosion of the loss, and does leaving them out prevent it?

Question: a network without any care (five layers, no normalisation, too large a rate) learns, and
then its loss explodes. Which samples came before? Does it still explode where those with the
largest gradients are left out from a few steps earlier on: more or less than where as many others
of the same steps are, or where all samples of these steps are weakened by as much?

Command:  python experiments/explode.py          writes results/explode.json and results/explode.png
          python experiments/explode.py --quick  runs all of it, briefly; writes nothing
Expected: gradients grow for most samples of a batch within the last two or three steps, and no few
          samples stand out beforehand. Without one random sample nearly all forks explode at the
          same step, without the one with the largest gradient two thirds. Without the 16 with the
          largest gradients a quarter explodes within 100 steps, which is not surely less than
          without 16 random ones (a third), nor than where all samples of these steps are weakened
          by as much. Half the rate prevents it always.
Run time: 5 minutes of computing, 13 on two busy cores; --quick 20 seconds.

The network is an MLP of five layers of 64 units on digits, plain SGD. For each key: the training
is recorded; the explosion is the first step whose mean loss exceeds twice that of guessing; forks
begin some steps before it, and leave samples out (weight 0) from there on. Losses are those that
the steps have computed, of all samples of a batch, left out or not.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "explode.json"
COLOURS = {"largest": "#c03d3e", "random": "#2f7ebc", "weakened": "#e1812c", "rate": "black"}
WORDS = {
    "largest": "without the {} with the largest gradients",
    "random": "without {} random ones of the same steps",
    "weakened": "all weakened by the share of the {} largest",
    "rate": "half the rate",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    keys: int = 28
    first: int = 0  # of the keys
    rate: float = 0.45
    width: int = 64
    batch: int = 32
    epochs: int = 20
    held_out: int = 359
    limit: float = 2 * float(np.log(10))  # mean loss of a step that has exploded
    alarm: float = 3.0  # times the usual gradient, which a tenth of all weights exceed
    before: tuple[int, ...] = (8, 2)  # steps between the fork and the explosion
    earliest: int = 44  # the first explosion that is looked at: after an epoch
    shown: int = 24  # steps before the explosion that are looked at
    horizon: int = 100  # steps after it within which a fork may explode
    left_out: tuple[int, ...] = (1, 16)
    randoms: int = 2
    seed: int = 0

    def quick(self) -> "Settings":
        """Return the same experiment in the size of a smoke test."""
        return dataclasses.replace(
            self,
            keys=1,
            rate=0.6,
            first=5,
            epochs=3,
            horizon=10,
            before=(2,),
            left_out=(8,),
            randoms=1,
        )


def init(width: int, key: Any) -> Any:
    sizes = (64, *[width] * 4, 10)
    return {
        f"layer{number}": {
            "kernel": (2 / wide) ** 0.5 * jax.random.normal(each, (wide, narrow)),
            "bias": jnp.zeros(narrow),
        }
        for number, (each, wide, narrow) in enumerate(
            zip(jax.random.split(key, 5), sizes, sizes[1:], strict=False)
        )
    }


def loss(params: Any, example: Any, key: Any) -> Any:
    x = example["image"]
    for number in range(5):
        layer = params[f"layer{number}"]
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(x, example["label"])


def load(settings: Settings) -> dict[str, np.ndarray]:
    """Return the training samples; the held-out ones are those of experiments/reorder.py."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    kept = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(labels))
    kept = kept[settings.held_out :]
    return {"image": (images / 16).astype("float32")[kept], "label": labels[kept].astype("int32")}


def explosion(run: replay.Run, start: int, limit: float) -> int | None:
    """Return the first step from `start` whose mean loss exceeds the limit, or is no number."""
    losses = run.sample_losses.sel(step=slice(start, None)).mean("position").compute()
    found = np.flatnonzero(~(losses["value"].values <= limit))
    return start + int(found[0]) if len(found) else None


def plain(values: np.ndarray) -> list[float]:
    """Return what a result file can hold: what is larger than a million, or no number, is that."""
    return np.minimum(np.nan_to_num(values, nan=1e6, posinf=1e6), 1e6).tolist()


def study(settings: Settings, number: int, folder: pathlib.Path) -> dict[str, Any]:
    """Train with one key; look at what preceded the explosion; fork before it."""
    data = load(settings)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=settings.rate)
    run = replay.record(
        folder / "run",
        replay.Program(lambda key: init(settings.width, key), loss, optimizer),
        data,
        replay.Order.shuffled(settings.batch, settings.epochs, number),
        key=jax.random.key(number),
        dispatch="block",
        checkpoints=len(data["label"]) // settings.batch,
        self_test=False,
        progress=False,
    )
    losses = run.history()["loss"]
    above = np.flatnonzero(~(losses <= settings.limit))
    found: dict[str, Any] = {
        "key": number, "steps": run.steps, "explosion": int(above[0]) if len(above) else None,
        "environment": run.log.header.environment,
    }  # fmt: skip
    boom = found["explosion"]
    if boom is None or not settings.earliest <= boom <= run.steps - settings.horizon:
        print(f"key {number}: explosion at step {boom}, left aside", flush=True)
        return found
    found |= look(run, settings, boom) | {"windows": [], "forks": []}
    found["losses"] = plain(losses[boom - settings.shown : boom + settings.horizon])
    for before in settings.before:
        window = rank(run, settings, data, boom, before)
        found["windows"].append(window)
        for kind, count, edit in edits(settings, number, window):
            path, at = folder / f"fork{len(found['forks'])}", boom - before
            fork = run.fork(path, edit, at=at, until=boom + settings.horizon, progress=False)
            again = explosion(fork, at, settings.limit)
            delay = None if again is None else again - boom
            found["forks"].append({"before": before, "kind": kind, "count": count, "delay": delay})
    shown = [tuple(x.values()) for x in found["forks"]]
    print(f"key {number}: explosion at step {boom}, alarm {found['alarm']}", *shown, flush=True)
    return found


def look(run: replay.Run, settings: Settings, boom: int) -> dict[str, Any]:
    """Return what the steps before the explosion were like, sample by sample."""
    usual = abs(run.grads.sel(step=slice(0, settings.earliest))).quantile(0.9, "weight").compute()
    threshold = settings.alarm * float(usual["value"].median())
    large = abs(run.grads.sel(step=slice(settings.earliest, boom + settings.horizon))) > threshold
    asked = slice(boom - settings.shown, boom + 1)
    alarm, losses, norms = replay.compute(
        (large.mean("weight") > 0.10).first("step"),
        run.sample_losses.sel(step=asked),
        run.sample_grads.sel(step=asked).norm("weight"),
    )
    losses, norms = (x["value"].values for x in (losses, norms))
    ordered = np.sort(norms, axis=1)[:, ::-1]
    tenth = max(1, settings.batch // 10)
    return {
        "alarm": int(alarm), "threshold": threshold,
        "median norm": plain(np.median(norms, axis=1)),
        "largest norm": plain(ordered[:, 0]),
        "share of the largest tenth": plain(ordered[:, :tenth].sum(1) / ordered.sum(1)),
        "median loss": plain(np.median(losses, axis=1)),
        "largest loss": plain(losses.max(axis=1)),
    }  # fmt: skip


def rank(run: replay.Run, settings: Settings, data: Any, boom: int, before: int) -> dict[str, Any]:
    """Return the samples of the last steps before the explosion, the largest gradients first."""
    last = run.samples.before(boom, last=before * settings.batch)
    last = last.join(norm=run.sample_grads.norm("weight")).compute()
    ids, norms = last["sample"].values, last["norm"].values
    ranked = ids[np.argsort(-norms, kind="stable")]
    ranked = ranked[np.sort(np.unique(ranked, return_index=True)[1])]  # each sample once
    begin = run.on({name: leaf[ranked] for name, leaf in data.items()}).sample_losses
    begin = begin.sel(state=boom - before).compute()["value"].values[0]
    most = max(settings.left_out)
    return {
        "before": before,
        "samples": ranked.tolist(),
        "shares": [
            float(norms[np.isin(ids, ranked[:count])].sum() / norms.sum())
            for count in settings.left_out
        ],
        "chance that one of the largest has the larger loss already": float(
            (begin[:most, None] > begin[None, most:]).mean()
        ),
    }


def edits(settings: Settings, number: int, window: dict[str, Any]) -> list[Any]:
    """Return `(kind, how many samples, edit)` of each fork."""
    ranked, found = window["samples"], []
    draw = np.random.Generator(np.random.Philox(key=[window["before"], number]))
    for count, share in zip(settings.left_out, window["shares"], strict=True):
        found.append(("largest", count, replay.edits.leave_out(ranked[:count])))
        for _ in range(settings.randoms):
            chosen = draw.choice(ranked, count, replace=False)
            found.append(("random", count, replay.edits.leave_out(chosen)))
        weaker = {int(sample): 1 - share for sample in ranked}
        found.append(("weakened", count, replay.edits.Edit(sample_weights=weaker)))
    slower = replay.edits.Edit(optimizer={"learning_rate": settings.rate / 2})
    return [*found, ("rate", 0, slower)]


def summarise(settings: Settings, keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count, for each kind of fork, how many explode again and when."""
    rows = []
    forks = [fork for key in keys for fork in key.get("forks", [])]
    kinds = ("before", "kind", "count")
    for what in dict.fromkeys(tuple(fork[name] for name in kinds) for fork in forks):
        delays = [x["delay"] for x in forks if tuple(x[name] for name in kinds) == what]
        again = [x for x in delays if x is not None]
        rows.append({
            **dict(zip(kinds, what, strict=True)), "forks": len(delays), "explode": len(again),
            "explode within 10 steps": sum(x <= 10 for x in again),
            "median delay of those that explode": float(np.median(again)) if again else None,
        })  # fmt: skip
        print(*(f"{name}: {value}" for name, value in rows[-1].items()), sep=", ")
    return rows


# --------------------------------------------------------------------------------- the picture


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the explosions, the gradients before them, and how long forks survive."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = result["settings"]
    keys = [key for key in result["keys"] if "forks" in key]
    figure, axes = pyplot.subplots(2, 2, figsize=(12.5, 8.6), layout="constrained")
    _draw_losses(axes[0, 0], keys, settings)
    _draw_norms(axes[0, 1], keys, settings)
    for axis, before in zip(axes[1], settings["before"], strict=False):
        _draw_survival(axis, keys, settings, before)
    lines, names = axes[1, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_losses(axis: Any, keys: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    for key in keys:
        values = np.clip(key["losses"], 1e-3, 1e3)
        axis.plot(np.arange(len(values)) - settings["shown"], values, lw=1, alpha=0.8)
    axis.axhline(np.log(10), color="black", lw=0.8, ls=":", label="guessing")
    axis.axhline(settings["limit"], color="black", lw=0.8, ls="--", label="twice that: exploded")
    for number, before in enumerate(settings["before"]):
        label = None if number else "forks begin"
        axis.axvline(-before, color="grey", lw=0.8, label=label)
    axis.set(yscale="log", xlabel="steps after the explosion",
             ylabel="mean loss of the batch (cut at 1,000)",
             title=f"{len(keys)} trainings (a line each) explode within four steps")  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_norms(axis: Any, keys: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    steps = np.arange(-settings["shown"], 1)
    for name, colour in (("largest norm", COLOURS["largest"]), ("median norm", COLOURS["random"])):
        values = np.maximum([key[name] for key in keys], 1e-4)
        axis.plot(steps, values.T, color=colour, lw=0.6, alpha=0.4)
        axis.plot(steps, np.median(values, axis=0), color=colour, lw=2.2,
                  label=f"{name} of the batch: median of trainings")  # fmt: skip
    for number, before in enumerate(settings["before"]):
        label = None if number else "forks begin"
        axis.axvline(-before, color="grey", lw=0.8, label=label)
    axis.set(yscale="log", xlabel="steps after the explosion", ylabel="norm of a sample's gradient",
             title="the median sample's gradient grows with the largest")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def _draw_survival(
    axis: Any, keys: list[dict[str, Any]], settings: dict[str, Any], at: int
) -> None:
    steps = np.arange(-at, settings["horizon"])
    most = max(settings["left_out"])
    for kind, colour in COLOURS.items():
        for count in settings["left_out"] if kind != "rate" else (0,):
            rows = [
                [np.inf if x["delay"] is None else x["delay"] for x in key["forks"]
                 if (x["kind"], x["count"], x["before"]) == (kind, count, at)]
                for key in keys
            ]  # fmt: skip
            alive = 100 * np.array([(np.array(row)[:, None] > steps).mean(axis=0) for row in rows])
            mean, style = alive.mean(axis=0), "-" if count in (0, most) else ":"
            axis.step(steps, mean, style, where="post", color=colour, lw=1.8,
                      label=WORDS[kind].format(count))  # fmt: skip
            if style == "-" and len(alive) > 1:
                error = alive.std(axis=0, ddof=1) / len(alive) ** 0.5
                axis.fill_between(steps, mean - error, mean + error, step="post", color=colour,
                                  alpha=0.13, lw=0)  # fmt: skip
    axis.axvline(0, color="grey", lw=0.8)
    axis.set(xlabel="steps after the explosion of the unedited training", ylim=(-3, 103),
             ylabel=f"forks not yet exploded, % (mean of {len(keys)} keys, ± s.e.)",
             title=f"edits from {at} steps before")  # fmt: skip


def measure(settings: Settings) -> dict[str, Any]:
    """Run all of it."""
    keys = []
    for number in range(settings.first, settings.first + settings.keys):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the mean loss of step")  # is no number: as expected
            keys.append(study(settings, number, pathlib.Path(folder)))
    described = [key.pop("environment") for key in keys]
    return {"environment": described[0], "summary": summarise(settings, keys), "keys": keys}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    quick = parser.parse_args().quick
    settings = Settings().quick() if quick else Settings()
    begun = datetime.datetime.now(datetime.UTC)
    found = measure(settings)
    seconds = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
    result = {
        "date": begun.isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "load": os.getloadavg(),
        "settings": dataclasses.asdict(settings),
        **found,
    }
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            draw(result, pathlib.Path(folder, "explode.png"))
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
