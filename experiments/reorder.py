"""How much does the order of the samples matter, and until when does a change of it?

Question: how far do trainings spread that differ only in the order of the samples, beside such that
differ only in their initial weights, and such that differ by one unit in the last place of one
weight? What do sorted orders do? And how much is left in the end of an edit of the order at step t?

Command:  python experiments/reorder.py          writes results/reorder.json and results/reorder.png
          python experiments/reorder.py --quick  runs all of it, briefly; writes nothing
Expected: with a careful rate orders spread the held-out loss more than initial weights do in the
          end, and one unit in the last place does next to nothing. What a new order does is done by
          the last few batches, so that an edit matters however late it is made. Orders that are
          sorted by class or hard first in every epoch are far worse; one sorted first epoch is made
          up for. With a rate eight times as large one unit in the last place comes to as much as a
          new order does within some hundred steps.
Run time: 3 minutes on two busy cores, --quick 1 minute.

The network is an MLP 64-64-10 on digits, SGD with momentum, ten epochs; 359 images are held out.
Orders, and the edits at step t, are lanes of `Run.counterfactuals`, which trains many of them in
one call; initial weights and sorted orders are real forks. All of them share the run's keys and
programs, so that every difference is the doing of the edit; but one edit is one draw.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "reorder.json"
KINDS = ("initial weights", "orders", "last place")
LABELS = {"initial weights": "initial weights", "orders": "orders",
          "last place": "one unit in the last place"}  # fmt: skip
COLOURS = {"initial weights": "#7a5195", "orders": "#2f7ebc", "last place": "#8a8a8a",
           "reshuffled rest": "#2f7ebc", "two batches swapped": "#ef8a3c"}  # fmt: skip
TITLES = (
    ("the order matters, rounding does not", "late edits matter as much as early ones"),
    ("rounding matters in the end, too", "early on, rounding does as much"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    rates: tuple[float, ...] = (0.05, 0.4)  # careful, and too large
    momentum: float = 0.9
    width: int = 64
    batch: int = 32
    epochs: int = 10
    orders: int = 32
    initials: int = 16
    crossed: int = 8  # orders under each of the initial weights
    states: tuple[int, ...] = (11, 44, 132, 440)
    times: int = 10
    repeats: int = 8  # edits of each kind at each time
    nulls: int = 32  # trainings that begin one unit in the last place beside the run
    held_out: int = 359
    fixed: int = 512  # training samples that all are tested on
    resamples: int = 4_000
    seed: int = 0

    def quick(self) -> "Settings":
        """Return the same experiment in the size of a smoke test."""
        return dataclasses.replace(
            self, epochs=1, orders=4, initials=3, crossed=2, states=(11, 44), times=2, repeats=2,
            nulls=16, resamples=200,
        )  # fmt: skip


def logits(params: Any, images: Any) -> Any:
    hidden = images @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden = jax.nn.leaky_relu(
        hidden, 0.1
    )  # units of relu die at the larger rate, and hide changes
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params: Any, example: Any, key: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, example["image"]), example["label"]
    )


def right(params: Any, batch: Any) -> Any:
    """Tell which samples of a batch are classified rightly."""
    found = jax.vmap(logits, (None, 0))(params, batch["image"])
    return found.argmax(axis=-1) == batch["label"]


def init(width: int, key: Any) -> Any:
    hidden, out = jax.random.split(key)
    return {
        "hidden": {
            "kernel": jax.random.normal(hidden, (64, width)) / 8,
            "bias": jnp.zeros(width),
        },
        "out": {
            "kernel": jax.random.normal(out, (width, 10)) * width**-0.5,
            "bias": jnp.zeros(10),
        },
    }


class Ends(NamedTuple):
    """What some trainings have come to.

    Attributes:
        weights: `[runs, weights]`.
        test: held-out losses, `[runs, samples]`.
        right: which of them are classified rightly, `[runs, samples]`.
        train: losses of the fixed training samples, `[runs, samples]`.
    """

    weights: np.ndarray
    test: np.ndarray
    right: np.ndarray
    train: np.ndarray


class Bench:
    """One run, whose edits are compared; and how their ends are read."""

    def __init__(self, settings: Settings, rate: float, folder: pathlib.Path):
        images, labels = load_digits(return_X_y=True)
        whole = {"image": (images / 16).astype("float32"), "label": labels.astype("int32")}
        shuffle = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(labels))
        held, kept = np.split(shuffle, [settings.held_out])
        self.test, self.data = ({k: v[i] for k, v in whole.items()} for i in (held, kept))
        self.settings, self.folder = settings, folder
        self.init = jax.jit(functools.partial(init, settings.width))
        self.run = replay.record(
            folder / "run",
            replay.Program(self.init, loss, optax.sgd(rate, momentum=settings.momentum)),
            self.data,
            replay.Order.shuffled(settings.batch, settings.epochs, settings.seed),
            key=jax.random.key(settings.seed),
            dispatch="block",
            checkpoints=len(kept) // settings.batch,
            self_test=False,
            progress=False,
        )
        test, fixed = (
            {k: jnp.asarray(v) for k, v in part.items()}
            for part in (self.test, {k: v[: settings.fixed] for k, v in self.data.items()})
        )

        def metric(params):
            flat = [leaf.reshape(-1) for leaf in jax.tree.leaves(params)]
            losses = [jax.vmap(loss, (None, 0, None))(params, x, None) for x in (test, fixed)]
            whether = right(params, test).astype(jnp.float32)
            return jnp.concatenate([*flat, losses[0], whether, losses[1]])

        self.metric = metric
        self.initial = self.read([self.run.state(0).params]).weights

    def split(self, values: np.ndarray) -> Ends:
        """Take apart what `metric` returned, `[runs, ...]`."""
        test, fixed = self.settings.held_out, self.settings.fixed
        ends = np.cumsum([values.shape[1] - 2 * test - fixed, test, test])
        return Ends(*np.split(np.asarray(values, np.float64), ends, axis=1))

    def read(self, params: Sequence[Any]) -> Ends:
        """Return what weights come to."""
        metric = jax.jit(self.metric)
        return self.split(np.stack([np.asarray(metric(each)) for each in params]))

    def edited(self, run: replay.Run, edits: Sequence[Any], **options: Any) -> Any:
        """Train a run anew under each of many edits."""
        options |= {"metric": self.metric, "nulls": self.settings.nulls, "progress": False}
        return run.counterfactuals(edits, **options)


def reshuffles(count: int) -> list[Any]:
    """Return edits that each shuffle all that is left, by a seed of their own."""
    return [
        replay.edits.Edit(
            order=lambda order, seed=seed: order.shuffled_again(None, 1000 + seed),
            name=f"order {seed}",
        )
        for seed in range(count)
    ]


# ------------------------------------------------------------------- orders and initial weights


def measure_spread(bench: Bench, *, crossed: bool) -> dict[str, Any]:
    """Compare orders, initial weights and last places at several states."""
    settings, run = bench.settings, bench.run
    forks = [
        run.fork(
            bench.folder / f"initial{number}",
            at=0,
            params=bench.init(jax.random.key(100 + number)),
            progress=False,
        )
        for number in range(settings.initials)
    ]
    starts = bench.read([fork.state(0).params for fork in forks]).weights
    rows, deviation = [], 0.0
    for state in settings.states:
        last = state == settings.states[-1]
        found = bench.edited(
            run, reshuffles(settings.orders), at=0, until=state, confirm=[0] if last else 0
        )
        if last:
            deviation = float(abs(found.confirmed["difference"].values).max())
        ends = {
            "initial weights": bench.read([fork.state(state).params for fork in forks]),
            "orders": bench.split(found.value.values),
            "last place": bench.split(found.dataset["null_value"].values),
        }
        begun = {"initial weights": starts, "orders": bench.initial, "last place": bench.initial}
        rows += [row_of(bench, kind, state, ends[kind], begun[kind]) for kind in KINDS]
        print(*(text(row) for row in rows[-3:]), sep="\n", flush=True)
    return {
        "rows": rows,
        "fork minus lane": deviation,
        "crossed": cross(bench, forks) if crossed else None,
    }


def row_of(bench: Bench, kind: str, state: int, ends: Ends, begun: np.ndarray) -> dict[str, Any]:
    """Return how far some ends are spread: of each run, and the deviation over the runs."""
    pairs = [
        float(np.linalg.norm(ends.weights[i] - ends.weights[j]))
        for i in range(len(ends.weights))
        for j in range(i)
    ]
    each = {
        "held-out loss": ends.test.mean(axis=1),
        "held-out accuracy": ends.right.mean(axis=1),
        "training loss": ends.train.mean(axis=1),
        "moved": np.linalg.norm(ends.weights - begun, axis=1),
    }
    row: dict[str, Any] = {"kind": kind, "state": state, "runs": len(ends.weights)}
    for name, values in each.items():
        row[name] = {
            "mean": float(values.mean()),
            "deviation": interval(values, bench.settings),
            "each": values.tolist(),
        }
    row["distance to each other"] = {"mean": float(np.mean(pairs)), "largest": max(pairs)}
    return row


def interval(values: np.ndarray, settings: Settings) -> list[float]:
    """Return the standard deviation, and its 95% interval by resampling the runs."""
    draw = np.random.Generator(np.random.Philox(settings.seed))
    picked = draw.integers(len(values), size=(settings.resamples, len(values)))
    low, high = np.quantile(values[picked].std(axis=1, ddof=1), [0.025, 0.975])
    return [float(values.std(ddof=1)), float(low), float(high)]


def text(row: dict[str, Any]) -> str:
    value, (deviation, low, high) = row["held-out loss"]["mean"], row["held-out loss"]["deviation"]
    return (
        f"state {row['state']:4} {row['kind']:16} held-out loss {value:.4f}, deviation "
        f"{deviation:.2g} [{low:.2g}, {high:.2g}], {row['distance to each other']['mean']:.3g} "
        f"apart, moved {row['moved']['mean']:.3g}"
    )


def cross(bench: Bench, forks: Sequence[replay.Run]) -> dict[str, Any]:
    """Put the same orders under each of the initial weights: whose is the spread in the end?

    The variance is taken apart into that of initial weights, of orders, and of what only both
    together decide (two-way analysis of variance with one training in each cell). A component
    below zero is an estimate of a small one.
    """
    edits = reshuffles(bench.settings.crossed)
    table = np.stack(
        [
            bench.split(bench.edited(fork, edits, at=0).value.values).test.mean(axis=1)
            for fork in forks
        ]
    )
    rows, columns = table.shape
    by_row, by_column = table.mean(axis=1), table.mean(axis=0)
    rest = table - by_row[:, None] - by_column[None] + table.mean()
    both = (rest**2).sum() / ((rows - 1) * (columns - 1))
    return {
        "held-out loss": table.tolist(),
        "variance": {
            "initial weights": float(by_row.var(ddof=1) - both / columns),
            "orders": float(by_column.var(ddof=1) - both / rows),
            "both together": float(both),
        },
    }


# ------------------------------------------------------------------------------- sorted orders


def measure_sorted(bench: Bench) -> dict[str, Any]:
    """Sort the samples by difficulty and by class, in all epochs or in the first alone."""
    run, labels, settings = bench.run, bench.data["label"], bench.settings
    hard = run.on(bench.data).sample_losses.sel(state=run.steps).compute()["value"].values[0]
    last = run.steps - len(labels) // settings.batch
    edits = {
        "easy first": (0, lambda order: order.sorted_by(hard)),
        "hard first": (0, lambda order: order.sorted_by(hard, descending=True)),
        "class by class": (0, lambda order: order.sorted_by(labels)),
        "easy first, in epoch 0": (0, lambda order: order.sorted_by(hard, epoch=0)),
        "hard first, in epoch 0": (
            0, lambda order: order.sorted_by(hard, epoch=0, descending=True)),
        "class by class, in epoch 0": (0, lambda order: order.sorted_by(labels, epoch=0)),
        "last epoch reversed": (last, lambda order: order.reversed(order.epochs - 1)),
    }  # fmt: skip
    forks = [
        run.fork(bench.folder / f"sorted{number}", at=at, order=edit, progress=False)
        for number, (at, edit) in enumerate(edits.values())
    ]
    compared = replay.compare(
        run,
        *forks,
        names=["shuffled", *edits],
        test=bench.test,
        train=np.arange(settings.fixed),
        accuracy=right,
        progress=False,
    )
    found = compared.progress
    for name, value in zip(compared.names, found["test_loss"].values[:, -1], strict=True):
        print(f"{name:28} held-out loss in the end {value:.4f}", flush=True)
    return {
        "states": list(compared.states),
        "grade": found.attrs["grade"],
        "runs": {
            name: {key: found[key].values[i].tolist() for key in found.data_vars}
            for i, name in enumerate(compared.names)
        },
    }


# ------------------------------------------------------------------------------ edits at step t


def measure_edits(bench: Bench) -> list[dict[str, Any]]:
    """Edit the order at several steps: what is left of it in the end?"""
    settings, rows = bench.settings, []
    latest = bench.run.steps - 2 * settings.repeats
    for at in np.linspace(0, latest, settings.times).astype(int).tolist():
        swaps = [
            replay.edits.Edit(order=lambda order, step=step: order.swap(step, step + 1))
            for step in range(at, at + 2 * settings.repeats, 2)
        ]
        found = bench.edited(bench.run, [*swaps, *reshuffles(settings.repeats)], at=at)
        control = bench.split(found.dataset["control"].values[:1])
        ends, nulls = (
            bench.split(found.value.values),
            bench.split(found.dataset["null_value"].values),
        )
        lanes = {
            "two batches swapped": Ends(*(x[: settings.repeats] for x in ends)),
            "reshuffled rest": Ends(*(x[settings.repeats :] for x in ends)),
            "last place": nulls,
        }
        for kind, them in lanes.items():
            weights = np.linalg.norm(them.weights - control.weights, axis=1)
            losses = np.sqrt(((them.test - control.test) ** 2).mean(axis=1))
            mean = np.abs(them.test.mean(axis=1) - control.test.mean(axis=1))
            rows.append({
                "at": at, "kind": kind,
                "distance of weights": weights.tolist(),
                "root mean square difference of held-out losses": losses.tolist(),
                "difference of the mean held-out loss": mean.tolist(),
            })  # fmt: skip
            print(f"at {at:4} {kind:20} weights {np.median(weights):.2e} losses "
                  f"{np.median(losses):.2e} mean {np.median(mean):.2e}", flush=True)  # fmt: skip
    return rows


# --------------------------------------------------------------------------------- the picture


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw spreads, sorted orders, and what is left of edits."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    for place, (row, part) in enumerate(zip(axes, result["rates"], strict=True)):
        spread, edits = TITLES[place]
        _draw_spread(row[0], part["spread"]["rows"], f"rate {part['rate']:g}: {spread}")
        _draw_edits(row[2], part["edits"], f"rate {part['rate']:g}: {edits}")
    _draw_sorted(axes[0, 1], result)
    _draw_distances(axes[1, 1], result)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_spread(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    states = sorted({row["state"] for row in rows})
    for row in rows:
        kind, values = row["kind"], row["held-out loss"]["each"]
        place = states.index(row["state"]) + 0.26 * (KINDS.index(kind) - 1)
        places = place + np.linspace(-0.08, 0.08, len(values))
        label = f"{len(values)} × {LABELS[kind]}" if row["state"] == states[0] else None
        axis.plot(places, values, "o", ms=3.5, alpha=0.7, color=COLOURS[kind], label=label)
    axis.set(yscale="log", xticks=range(len(states)), ylabel="held-out loss",
             xlabel="steps trained; a dot is one training",
             title=title)  # fmt: skip
    axis.set_xticklabels([str(state) for state in states])
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.legend(frameon=False, fontsize=8)


def _draw_sorted(axis: Any, result: dict[str, Any]) -> None:
    part, first = result["sorted"], result["rates"][0]
    states = np.array(part["states"])
    colours = {"easy first": "#3a923a", "hard first": "#c03d3e", "class by class": "#e1812c",
               "last epoch reversed": "#7a5195", "shuffled": "black"}  # fmt: skip
    for name, values in part["runs"].items():
        base = name.partition(",")[0]
        axis.plot(states[1:], values["test_loss"][1:], "--" if base != name else "-",
                  color=colours[base], lw=1.4, label=name, zorder=3)  # fmt: skip
    orders = [row for row in first["spread"]["rows"] if row["kind"] == "orders"]
    orders = [row for row in orders if row["state"] >= states[1]]
    each = np.array([row["held-out loss"]["each"] for row in orders])
    axis.fill_between([row["state"] for row in orders], each.min(axis=1), each.max(axis=1),
                      color=COLOURS["orders"], alpha=0.3, lw=0,
                      label=f"range of {each.shape[1]} shuffled orders")  # fmt: skip
    axis.set(yscale="log", xlabel="steps trained (ends of epochs); a line is one training",
             ylabel="held-out loss", ylim=(0.1, 12))  # fmt: skip
    axis.set_title(f"rate {first['rate']:g}: a sorted first epoch is made up for")
    worst = part["runs"]["class by class"]["test_loss"][-1]
    axis.annotate(f"class by class: to {worst:,.0f}", (states[4], 9), fontsize=8)
    axis.legend(frameon=False, fontsize=7.5, loc="upper right", bbox_to_anchor=(1, 0.93))


def _draw_distances(axis: Any, result: dict[str, Any]) -> None:
    for part, style in zip(result["rates"], ("-", "--"), strict=False):
        for kind in KINDS:
            rows = [row for row in part["spread"]["rows"] if row["kind"] == kind]
            shares = [row["distance to each other"]["mean"] / row["moved"]["mean"] for row in rows]
            label = f"{LABELS[kind]}, rate {part['rate']:g}"
            axis.plot([row["state"] for row in rows], shares, style, marker="o", ms=4,
                      color=COLOURS[kind], label=label)  # fmt: skip
    axis.axhline(2**0.5, color="black", lw=0.7, ls=":", label="√2: moves at right angles")
    axis.set(yscale="log", xscale="log", xlabel="steps trained",
             ylabel="mean distance to each other / distance moved",
             title="how far apart they are in weights")  # fmt: skip
    axis.legend(frameon=False, fontsize=7.5, handlelength=3.5)


def _draw_edits(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    measure = "root mean square difference of held-out losses"
    for kind in ("reshuffled rest", "two batches swapped", "last place"):
        mine = [row for row in rows if row["kind"] == kind]
        # A nudge of a weight that no image uses, at a dark pixel, has no effect at all.
        seen = [np.array([x for x in row[measure] if x > 0]) for row in mine]
        values = np.array([np.quantile(x, [0, 0.5, 1]) for x in seen if len(x)])
        at = [row["at"] for row, x in zip(mine, seen, strict=True) if len(x)]
        counts = sorted({len(x) for x in seen})
        label = f"{LABELS.get(kind, kind)} ({counts[0]}" + (
            f" to {counts[-1]})" if len(counts) > 1 else ")"
        )
        axis.plot(at, values[:, 1], marker="o", ms=4, color=COLOURS[kind], label=label)
        axis.fill_between(at, values[:, 0], values[:, 2], color=COLOURS[kind], alpha=0.2, lw=0)
    axis.set(yscale="log", xlabel="step t at which it is made",
             ylabel=f"{measure}\nin the end: median and range of edits", ylim=(1e-9, 20),
             title=title)  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def measure(settings: Settings) -> dict[str, Any]:
    """Run all of it."""
    result: dict[str, Any] = {"rates": []}
    for number, rate in enumerate(settings.rates):
        print(f"learning rate {rate:g}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(settings, rate, pathlib.Path(folder))
            spread = measure_spread(bench, crossed=not number)
            part = {"rate": rate, "spread": spread, "edits": measure_edits(bench)}
            result["rates"].append(part)
            if not number:
                result["sorted"] = measure_sorted(bench)
            result["environment"] = bench.run.log.header.environment
    return result


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
            draw(result, pathlib.Path(folder, "reorder.png"))
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
