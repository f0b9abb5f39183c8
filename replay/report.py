"""How a run is drawn: its losses and metrics as a picture, or as one line of a terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from replay.api import Run
from replay.errors import ReplayError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
_LOSS, _BAD, _GREY = "#0072b2", "#d50000", "#8a8a8a"
_METRICS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_LEGEND = {"loc": "best", "fontsize": "small", "edgecolor": "none", "framealpha": 0.85}

# Name, steps and values of a metric where it was logged.
_Metric = tuple[str, np.ndarray, np.ndarray]

_MOST_METRICS = 20

_BLOCKS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"


def sparkline(values: ArrayLike, width: int = 60) -> str:
    """Draw numbers as one line of text.

    Args:
        values: `[n]`, such as the loss of every step.
        width: the most characters; each stands for the median of its share of the values, and
            is `×` where one of them is not finite.

    >>> sparkline([4.0, 3.0, 2.0, 1.0, 0.0, float("nan")])
    '█▆▅▃▁×'
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return ""
    parts = np.array_split(values, min(width, values.size))
    heights = np.array([np.median(p) if np.isfinite(p).all() else np.nan for p in parts])
    finite = heights[np.isfinite(heights)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    # Halves keep the difference of the largest floats finite.
    span = (high / 2 - low / 2) or 1.0
    scaled = np.rint((heights / 2 - low / 2) / span * (len(_BLOCKS) - 1))
    return "".join(_NOT_FINITE if x != x else _BLOCKS[int(x)] for x in scaled)


def plot_loss(run: Run, *, width: float = 9.0) -> "Figure":
    """Draw the losses and metrics of a run; nothing is replayed.

    Every step is drawn lightly, a running median over it. Losses that are not finite are red.
    Metrics between 0 and 1 share a panel, every other metric has its own. Epochs stand at the
    top, stored states as marks at the bottom.

    Args:
        run: the run, also one that is still being recorded.
        width: of the figure, in inches.

    Returns:
        A figure outside of pyplot: `figure.savefig("loss.png", dpi=150)` draws it without a
        display.

    Raises:
        ReplayError: matplotlib is not installed.
        LogError: a logged column is missing or damaged.
    """
    try:
        from matplotlib import figure, ticker
    except ImportError as error:
        raise ReplayError(
            "matplotlib is not installed",
            why="it draws the pictures, and is not needed for anything else",
            fix='pip install "jax-replay[plot]"',
        ) from error

    history = run.history()
    loss, epoch = history["loss"].astype(np.float64), history.get("epoch")
    metrics = [name for name in history if name not in ("step", "loss", "epoch", "seconds")]
    panels = _panels({name: history[name] for name in metrics[:_MOST_METRICS]})
    picture = figure.Figure(
        figsize=(width, width * (0.4 + 0.2 * len(panels))), layout="constrained"
    )
    heights = [2.0] + [1.1] * len(panels)
    axes = picture.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    axes = list(axes[:, 0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e8e8e8", linewidth=0.7)
        ax.set_axisbelow(True)
    _draw_loss(axes[0], loss, run.checkpoints)
    for ax, panel in zip(axes[1:], panels, strict=True):
        _draw_metrics(ax, panel)
    if epoch is not None and epoch.size:
        _draw_epochs(axes, epoch)
    margin = max(0.5, 0.01 * run.steps)
    axes[-1].set_xlim(-margin, run.steps + margin)
    rest = len(metrics) - _MOST_METRICS
    axes[-1].set_xlabel("step" + (f" ({rest:,} more metrics are not drawn)" if rest > 0 else ""))
    axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[-1].xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    weights = sum(math.prod(leaf.shape) for leaf in run.tensors)
    name = run.path.rstrip("/").rpartition("/")[2]
    title = f"{_label(name)}: {run.steps:,} step{'s' * (run.steps != 1)}, {weights:,} weights"
    axes[0].set_title(title, loc="left", fontweight="bold", pad=8)
    return picture


def _panels(columns: dict[str, np.ndarray]) -> list[list[_Metric]]:
    """Group metrics by the scale they need; each is `(name, steps, values)` where it is finite."""
    fractions, others = [], []
    for name, column in columns.items():
        at = np.flatnonzero(np.isfinite(column))
        if not at.size:
            continue
        values = column[at].astype(np.float64)
        same_scale = values.min() >= 0 and values.max() <= 1
        (fractions if same_scale else others).append((name, at, values))
    return ([fractions] if fractions else []) + [[metric] for metric in others]


def _draw_loss(ax: "Axes", loss: np.ndarray, checkpoints: Sequence[int]) -> None:
    at, finite = np.arange(len(loss)), np.isfinite(loss)
    _curve(ax, at, np.where(finite, loss, np.nan), _LOSS)
    _choose_scale(ax, loss[finite])
    edge = ax.get_xaxis_transform()
    ax.plot(
        checkpoints,
        np.zeros(len(checkpoints)),
        linestyle="none",
        marker="^",
        markersize=5,
        color=_GREY,
        transform=edge,
        clip_on=False,
        label=f"stored states ({len(checkpoints)})",
    )
    bad = at[~finite]
    if len(bad):
        # A thousand lines are a red field already.
        ax.vlines(bad[:1000], 0, 1, color=_BAD, linewidth=0.8, alpha=0.35, transform=edge)
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        label = f"not finite: step {bad[0]} ({loss[bad[0]]}){more}"
        ax.plot(bad[:1000], [0.97] * len(bad[:1000]), "x", color=_BAD, transform=edge, label=label)
    ax.set_ylabel("loss (mean of the batch)")
    ax.legend(**_LEGEND)


def _draw_metrics(ax: "Axes", metrics: Sequence[_Metric]) -> None:
    for number, (name, at, values) in enumerate(metrics):
        _curve(ax, at, values, _METRICS[number % len(_METRICS)], _label(name))
    alone = len(metrics) == 1
    ax.set_ylabel(_label(metrics[0][0])[:24] if alone else "metrics")
    ax.legend(**_LEGEND)


def _curve(ax: "Axes", at: np.ndarray, values: np.ndarray, color: str, name: str = "") -> None:
    """Draw a value at each step: with dots where they are few, else lightly under a median."""
    if len(values) <= 60:
        ax.plot(
            at, values, "o-", color=color, linewidth=1.2, markersize=3, label=name or "each step"
        )
        return
    half = len(values) // 50
    median = f"running median of {2 * half + 1}"
    each, median = ("", f"{name}, {median}") if name else ("each step", median)
    # Minimum and maximum of what falls into one pixel look like all of it.
    starts = np.arange(0, len(values), -(-len(values) // 2000))
    extremes = [np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)]
    light = np.stack(extremes, axis=1).reshape(-1)
    ax.plot(np.repeat(at[starts], 2), light, color=color, linewidth=0.6, alpha=0.35, label=each)
    centres = np.unique(np.linspace(0, len(values) - 1, 400).round().astype(int))
    # The first windows grow from nothing, lest the median hide how steeply a training starts.
    windows = [values[max(0, c - min(half, c)) : c + min(half, c) + 1] for c in centres]
    medians = [np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows]
    ax.plot(at[centres], medians, color=color, linewidth=1.8, label=median)


def _choose_scale(ax: "Axes", values: np.ndarray) -> None:
    """Use a logarithmic scale where the values are positive and span more than a factor of 10."""
    from matplotlib import ticker

    if not values.size or values.min() <= 0 or values.max() <= 10 * np.quantile(values, 0.02):
        return
    ax.set_yscale("log")
    if values.max() < 1000 * values.min():
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_epochs(axes: Sequence["Axes"], epoch: np.ndarray) -> None:
    starts = np.flatnonzero(np.diff(epoch, prepend=-1))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if len(starts) / n <= 12)
    for ax in axes:
        for start in starts[1:] if len(starts) <= 60 else starts[every::every]:
            ax.axvline(start, color="#dcdcdc", linewidth=0.6, zorder=0)
    top = axes[0].secondary_xaxis("top")
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, labelsize="small", labelcolor=_GREY)
    shown = starts[::every]
    top.set_xticks(shown, [f"epoch {epoch[0]}", *map(str, epoch[shown[1:]])])


def _label(text: str) -> str:
    """Make a name from a record plain text for matplotlib: no formulas, nothing invisible."""
    plain = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return plain[:60].lstrip("_") or "?"
