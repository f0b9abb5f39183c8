"""How a run and answers about it are drawn: as pictures, or as one line of a terminal."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from replay import questions
from replay.api import Run
from replay.comparing import Comparison
from replay.effects import Counterfactuals
from replay.errors import ReplayError
from replay.questions import Question
from replay.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
_LOSS, _BAD, _GREY = "#0072b2", "#d50000", "#8a8a8a"
_METRICS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# Of several runs, the reference first.
_RUNS = (_LOSS, *_METRICS)
_APART, _MOST_RUNS = "#404040", len(_RUNS)

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
    picture = _figure(width, width)
    history = run.history()
    loss, epoch = history["loss"].astype(np.float64), history.get("epoch")
    metrics = [name for name in history if name not in ("step", "loss", "epoch", "seconds")]
    panels = _panels({name: history[name] for name in metrics[:_MOST_METRICS]})
    picture.set_figheight(width * (0.4 + 0.2 * len(panels)))
    heights = [2.0] + [1.1] * len(panels)
    axes = picture.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    axes = list(axes[:, 0])
    for ax in axes:
        _plain_axes(ax)
    _draw_loss(axes[0], loss, run.checkpoints)
    for ax, panel in zip(axes[1:], panels, strict=True):
        _draw_metrics(ax, panel)
    if epoch is not None and epoch.size:
        _draw_epochs(axes, epoch)
    margin = max(0.5, 0.01 * run.steps)
    axes[-1].set_xlim(-margin, run.steps + margin)
    rest = len(metrics) - _MOST_METRICS
    _count_along(axes[-1], "step" + (f" ({rest:,} more metrics are not drawn)" * (rest > 0)))
    weights = sum(math.prod(leaf.shape) for leaf in run.tensors)
    title = f"{_run_name(run)}: {run.steps:,} step{'s' * (run.steps != 1)}, {weights:,} weights"
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


# ------------------------------------------------------------------- answers of any kind

_MOST_PANELS, _MOST_BARS, _MOST_LINES, _MOST_COLUMNS = 12, 40, 8, 800


def draw_result(result: Result, *, width: float = 9.0) -> "Figure":
    """Draw an answer of any kind: lines, bars, histograms over time, or tensors as images.

    Args:
        result: the answer.
        width: of the figure, in inches.

    Returns:
        A figure outside of pyplot; what is not drawn for lack of room is told in it.

    Raises:
        ReplayError: matplotlib is not installed.
    """
    panels = _result_panels(result)
    shown = panels[:_MOST_PANELS]
    columns = 2 if len(shown) > 2 and all(panel.small for panel in shown) else 1
    rows = -(-len(shown) // columns)
    heights = [
        max(p.height for p in shown[i : i + columns]) for i in range(0, rows * columns, columns)
    ]
    picture = _figure(width, sum(heights) + 0.7)
    axes = picture.subplots(rows, columns, squeeze=False, height_ratios=heights).reshape(-1)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes, shown, strict=False):
        panel.draw(ax)
        if panel.title:
            ax.set_title(_label(panel.title), loc="left", fontsize="medium")
    rest = len(panels) - len(shown)
    more = f"; {rest:,} more tensors are not drawn" if rest > 0 else ""
    _head(picture, _describe(result), f"{_footing(result)}{more}")
    return picture


def draw_counterfactuals(
    found: Counterfactuals, *, largest: int = 10, width: float = 9.0
) -> "Figure":
    """Draw how far the effects of edits stand out from noise, and name the largest.

    Effects on a metric of several components are averaged over them.

    Args:
        found: the answers.
        largest: how many effects are named.
        width: of the figure, in inches.

    Raises:
        ReplayError: matplotlib is not installed.
    """
    (effects, nulls), attrs = found.means(), found.dataset.attrs
    noise, top = float(nulls.std(ddof=1)), found.top(largest)
    picture = _figure(width, 3.6 + 0.28 * len(top))
    heights = [2.2, 0.6 + 0.28 * len(top)]
    above, below = picture.subplots(2, 1, height_ratios=heights)
    _plain_axes(above)
    unit = noise if noise > 0 else 1.0
    sizes = [np.abs(x[np.isfinite(x)]) / unit for x in (effects, nulls)]
    seen = np.concatenate(sizes)
    seen = seen[seen > 0]
    low, high = (seen.min(), seen.max()) if len(seen) else (0.1, 1.0)
    edges = np.geomspace(low, max(high, 1.001 * low), 41)
    named = ((f"edits ({len(effects):,})", _LOSS), (f"null lanes ({len(nulls):,})", _GREY))
    for values, (name, color) in zip(sizes, named, strict=True):
        zeros = np.count_nonzero(values == 0)
        label = name + f", {zeros:,} of them exactly 0" * bool(zeros)
        above.hist(values[values > 0], edges, color=color, alpha=0.75, label=label)
    above.set_xscale("log")
    above.set_ylabel("lanes")
    what = f"effect on {attrs['metric']}"
    above.set_xlabel(
        f"size of the {_label(what)}, in standard deviations of null lanes ({noise:.2g})"
        if noise > 0
        else f"size of the {_label(what)}; all null lanes agree"
    )
    above.legend(**_LEGEND)
    _bars(below, top["name"].tolist(), top["effect"].to_numpy(), what)
    below.set_title("largest effects", loc="left", fontsize="medium")
    title = f"{attrs['run']}: {len(effects):,} counterfactuals"
    note = (
        f"steps {attrs['at']:,} to {attrs['until']:,}; control lanes end "
        f"{attrs['control_weight_deviation']:.2g} from the run"
    )
    _head(picture, _label(title), note)
    return picture


class _Panel:
    """What stands in one pair of axes.

    Args:
        title: above it; nothing where the figure's own title says it.
        height: in inches.
        draw: draws it.
        small: whether two fit side by side.
    """

    def __init__(self, title: str, height: float, draw: Any, *, small: bool = False):
        self.title, self.height, self.draw, self.small = title, height, draw, small


def _result_panels(result: Result) -> list[_Panel]:
    if "centres" in result.data_vars:
        return [_Panel("", 4.5, lambda ax: _draw_centres(ax, result))]
    shown = {str(k): v for k, v in result.data_vars.items() if "field" not in v.attrs}
    found = []
    for name, array in shown.items():
        if "tensor" in array.attrs:
            found.append(_tensor_panel(result, name, len(shown) > 1))
        else:
            found.append(_array_panel(result, name, len(shown) > 1))
    return found


def _array_panel(result: Result, name: str, named: bool, what: str = "") -> _Panel:
    """Choose a picture by the dimensions of an array without tensors."""
    array = result[name]
    values, dims = np.asarray(array.values), list(map(str, array.dims))
    title = name if named else ""
    what = what or (name if named else _quantity(result))
    if values.dtype == bool:
        values, what = values.astype(np.int8), f"{what} (1: true)"
    if dims and not values.size:
        return _Panel(title, 1.5, lambda ax: _words(ax, result.attrs.get("empty", "nothing")))
    if not dims:
        return _Panel(title, 1.5, lambda ax: _words(ax, f"{values.item():.6g}", size=20))
    if dims[-1] == "bin" and "low" in result.coords:
        edges = np.asarray(result["low"].values[1:], np.float64)
        if len(dims) == 1:
            names = _bin_names(edges)
            return _Panel(title, 3.5, lambda ax: _columns(ax, names, values, "count"))
        if len(dims) == 2:
            along = _along(result, dims[0])
            return _Panel(title, 4.0, lambda ax: _heat_of_bins(ax, along, dims[0], values, edges))
    if len(dims) == 1:
        return _one_dimension(result, values, dims[0], title, what)
    if len(dims) == 2 and dims[-1] == "rank" and _places(result, dims)[0]:
        return _rankings_panel(result, values, dims, title, what)
    flat = values.reshape(-1, values.shape[-1])
    few = flat.shape[1] <= _MOST_LINES and len(dims) == 2
    if few and dims[0] in ("step", "state", "epoch", "window"):
        along, names = _along(result, dims[0]), _names(result, dims[1])
        return _Panel(title, 3.5, lambda ax: _lines(ax, along, dims[0], flat.T, names, what))
    across = [str(x) for x in _along(result, dims[-1])]
    down = _names(result, dims[0]) if len(dims) == 2 and len(flat) <= 24 else None

    def draw(ax: "Axes") -> None:
        _image(ax, flat, " x ".join(dims[:-1]), dims[-1], what, across)
        if down is not None:
            ax.set_yticks(range(len(down)), [_label(x) for x in down], fontsize="small")
            ax.set_ylabel("")

    return _Panel(title, 4.0, draw)


def _one_dimension(result: Result, values: np.ndarray, dim: str, title: str, what: str) -> _Panel:
    if dim == "occurrence" and np.array_equal(values, result.coords.get("sample", [])):
        names = _entry_names(result, dim, len(values))
        more = [f"and {len(names) - _MOST_BARS:,} more"] * (len(names) > _MOST_BARS)
        text = "\n".join([*names[:_MOST_BARS], *more])
        return _Panel(title, 0.5 + 0.2 * min(len(names), 40), lambda ax: _words(ax, text, size=9))
    if dim in ("rank", "tensor", "group", "occurrence", "unit", "quantile"):
        names = _entry_names(result, dim, len(values))
        shown = names[:_MOST_BARS]
        more = f" ({len(names) - len(shown):,} more are not drawn)" * (len(names) > len(shown))
        height = 0.9 + 0.26 * len(shown)
        return _Panel(title, height, lambda ax: _bars(ax, shown, values[: len(shown)], what + more))
    along = _along(result, dim)
    if dim == "sample":
        return _Panel(title, 3.5, lambda ax: _dots(ax, along, values, dim, what))
    return _Panel(title, 3.5, lambda ax: _lines(ax, along, dim, values[None], [""], what))


def _rankings_panel(
    result: Result, values: np.ndarray, dims: Sequence[str], title: str, what: str
) -> _Panel:
    """Draw a ranking for each of something: the first of each as a bar with its name."""
    first = [str(name) for name in _names(result, dims[0])]
    places = [f"{a}: {b}" for a, b in zip(first, _places(result, dims)[1], strict=True)]
    shown = places[:_MOST_BARS]
    label = f"{what}, the first of each {dims[0]}"
    return _Panel(
        title, 0.9 + 0.26 * len(shown), lambda ax: _bars(ax, shown, values[: len(shown), 0], label)
    )


def _tensor_panel(result: Result, name: str, several: bool) -> _Panel:
    array = result[name]
    single = [dim for dim in array.dims if dim in ("state", "step") and array.sizes[dim] == 1]
    array = array.squeeze(single)
    own = [str(dim) for dim in array.dims if str(dim).startswith(f"{name}:")]
    lead = [str(dim) for dim in array.dims if str(dim) not in own]
    values, what = np.asarray(array.values), _quantity(result)
    if values.dtype == bool:
        values = values.astype(np.int8)
    if several and "occurrence" in lead:
        what = name
    title = str(array.attrs.get("weight", name))
    if not own:
        stripped = Result.of({"value": (lead, values)}, _coordinates(result, lead), result.attrs)
        panel = _array_panel(stripped, "value", False, what)
        return _Panel(title, panel.height, panel.draw)
    shape = values.shape[len(lead) :]
    rows = values.reshape(*values.shape[: len(lead)], -1)
    if lead[-1:] == ["rank"]:
        rows, lead = rows[..., 0, :], lead[:-1]
        title += ", the first of each weight"
    if not lead:
        if len(shape) == 1 and shape[0] <= _MOST_BARS:
            names = [str(i) for i in range(shape[0])]
            return _Panel(title, 2.4, lambda ax: _columns(ax, names, rows, what), small=True)
        table = rows.reshape(-1, shape[-1]) if len(shape) > 1 else rows[None]
        across = "last axis of the tensor" if len(shape) > 1 else "weight"
        down = " x ".join(map(str, shape[:-1])) or "1"
        return _Panel(
            title,
            2.6,
            lambda ax: _image(ax, table, f"other axes ({down})", across, what),
            small=True,
        )
    along = _along(result, lead[0])
    series = rows.reshape(len(along), -1)
    if series.shape[1] <= _MOST_LINES:
        names = [f"weight {i}" for i in range(series.shape[1])]
        return _Panel(title, 3.0, lambda ax: _lines(ax, along, lead[0], series.T, names, what))
    inner = " x ".join([*lead[1:], "weight"])
    return _Panel(
        title, 2.8, lambda ax: _image(ax, series.T, inner, lead[0], what, list(map(str, along)))
    )


def _draw_centres(ax: "Axes", result: Result) -> None:
    centres, sizes = result["centres"].values, result["size"].values
    _plain_axes(ax)
    marks = "osv^DPX*"
    for number in np.argsort(-sizes, kind="stable"):
        color = (_LOSS, *_METRICS)[number % 7]
        ax.plot(
            np.arange(centres.shape[1]),
            centres[number],
            marker=marks[number % len(marks)],
            color=color,
            linewidth=1.2,
            markersize=4,
            label=f"cluster {number}: {sizes[number]:,} weights",
        )
    ax.axhline(0, color=_GREY, linewidth=0.8)
    _count_along(ax, f"window of {result.attrs.get('windows', 'steps')}")
    ax.set_ylabel("mean update, standardised")
    ax.legend(**{**_LEGEND, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)})


# ---- parts of pictures


def _lines(
    ax: "Axes", along: np.ndarray, dim: str, series: np.ndarray, names: Sequence[str], what: str
) -> None:
    _plain_axes(ax)
    finite = series[np.isfinite(series)]
    few = len(along) <= 60
    for number, (values, name) in enumerate(zip(series, names, strict=True)):
        color = (_LOSS, *_METRICS)[number % 7]
        kept = np.where(np.isfinite(values), values, np.nan)
        ax.plot(
            along, kept, "o-" if few else "-", color=color, linewidth=1.2, markersize=3,
            label=_label(name) if name else None,
        )  # fmt: skip
    bad = along[~np.isfinite(series).all(axis=0)]
    if len(bad):
        edge = ax.get_xaxis_transform()
        label = f"not finite: {len(bad):,} of {len(along):,}"
        ax.plot(bad[:1000], [0.97] * len(bad[:1000]), "x", color=_BAD, transform=edge, label=label)
    _choose_scale(ax, finite)
    ax.set_ylabel(_label(what))
    _count_along(ax, dim)
    if any(names) or len(bad):
        ax.legend(**_LEGEND)


def _dots(ax: "Axes", along: np.ndarray, values: np.ndarray, dim: str, what: str) -> None:
    _plain_axes(ax)
    ax.plot(along, values, ".", color=_LOSS, markersize=3)
    for i in np.argsort(-np.nan_to_num(values, nan=-np.inf))[:5]:
        if np.isfinite(values[i]):
            offset = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": "small"}
            ax.annotate(str(along[i]), (along[i], values[i]), va="center", **offset)
    ax.set_ylabel(_label(what))
    _count_along(ax, f"{dim} (the largest five are named)")


def _columns(ax: "Axes", names: Sequence[str], values: np.ndarray, what: str) -> None:
    _plain_axes(ax)
    ax.bar(np.arange(len(values)), np.where(np.isfinite(values), values, 0), color=_LOSS)
    every = -(-len(names) // 16)
    shown = [_label(name) for name in names]
    long = max(map(len, shown)) * len(shown[::every]) > 70
    ax.set_xticks(
        np.arange(len(shown))[::every],
        shown[::every],
        rotation=40 if long else 0,
        ha="right" if long else "center",
        fontsize="small",
    )
    ax.set_ylabel(_label(what))


def _bars(
    ax: "Axes",
    names: Sequence[str],
    values: np.ndarray,
    what: str,
    *,
    images: np.ndarray | None = None,
    form: str = "{:.3g}",
) -> None:
    """Draw a bar for each name, its value beside it, and a picture between where there is one."""
    _plain_axes(ax, "x")
    at, finite = np.arange(len(values)), np.isfinite(values)
    lengths = np.where(finite, values, 0.0)
    ax.barh(at, lengths, color=[_LOSS if x >= 0 else _METRICS[0] for x in lengths], height=0.72)
    ax.set_yticks(at, [_label(name) for name in names], fontsize="small")
    ax.set_ylim(len(values) - 0.4, -0.6)
    for i, (length, value) in enumerate(zip(lengths, values, strict=True)):
        ax.annotate(
            form.format(value),
            (length, i),
            xytext=(-3 if length < 0 else 3, 0),
            textcoords="offset points",
            ha="right" if length < 0 else "left",
            va="center",
            fontsize="small",
            color="#404040" if finite[i] else _BAD,
        )
    low, high = min(0.0, lengths.min(initial=0)), max(0.0, lengths.max(initial=0))
    span = (high - low) or 1.0
    # Room for the numbers, in parts of the axis: they are as wide whatever the bars are.
    ax.set_xlim(low - 0.3 * span * (low < 0), high + 0.24 * span)
    if low < 0:
        ax.axvline(0, color=_GREY, linewidth=0.8)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(_label(what))
    if images is not None:
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        size = 24.0
        ax.tick_params(axis="y", pad=size + 10, length=0)
        for i, pixels in enumerate(images):
            grey = "gray_r" if pixels.ndim == 2 else None
            zoom = size / max(pixels.shape[:2])
            box = OffsetImage(pixels, cmap=grey, zoom=zoom, interpolation="nearest")
            place = {"xybox": (-size / 2 - 5, 0), "boxcoords": "offset points", "pad": 0}
            where = {"xycoords": ("axes fraction", "data"), "frameon": False}
            ax.add_artist(AnnotationBbox(box, (0, i), **place, **where))


def _image(
    ax: "Axes",
    table: np.ndarray,
    down: str,
    across: str,
    what: str,
    names: Sequence[str] | None = None,
) -> None:
    """Draw a table of numbers as colours; zero is white where they have both signs."""
    table = np.asarray(table, np.float64)
    finite = table[np.isfinite(table)]
    largest = np.abs(finite).max(initial=0) or 1.0
    signed = finite.min(initial=0) < 0
    low = -largest if signed else finite.min(initial=0)
    thin = -(-table.shape[1] // _MOST_COLUMNS)
    drawn = ax.imshow(
        table[:, ::thin],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, table.shape[1] - 0.5, table.shape[0] - 0.5, -0.5),
        cmap="RdBu_r" if signed else "viridis",
        vmin=low,
        vmax=largest,
    )
    bar = ax.figure.colorbar(drawn, ax=ax, pad=0.01)
    bar.set_label(_label(what), fontsize="small")
    bar.ax.tick_params(labelsize="small")
    from matplotlib import ticker

    ax.set_ylabel(_label(down), fontsize="small")
    ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=6))
    if names is None or len(names) != table.shape[1]:
        _count_along(ax, across)
    else:
        at = np.unique(np.linspace(0, len(names) - 1, min(8, len(names))).astype(int))
        ax.set_xticks(at, [str(names[i]) for i in at])
        ax.set_xlabel(across)


def _heat_of_bins(
    ax: "Axes", along: np.ndarray, dim: str, counts: np.ndarray, edges: np.ndarray
) -> None:
    """Draw the share of each bin over steps; the lowest bin is at the bottom."""
    from matplotlib import colors

    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = 100 * (counts / totals)
    groups = np.array_split(np.arange(len(along)), min(len(along), _MOST_COLUMNS))
    shares = np.stack([shares[group].mean(axis=0) for group in groups], axis=1)
    some = shares[shares > 0]
    low, high = (max(some.min(), 0.01), max(some.max(), 0.02)) if some.size else (0.01, 100.0)
    # Edges are places between rows, so that half the picture is not white.
    used = np.flatnonzero(shares.sum(axis=1))
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, len(edges))
    drawn = ax.imshow(
        np.ma.masked_equal(shares[first : last + 1], 0),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        norm=colors.LogNorm(low, high) if high > 10 * low else None,
        extent=(along[0] - 0.5, along[-1] + 0.5, first - 0.5, last + 0.5),
    )
    names = _edge_names(edges)
    inside = [i for i in range(len(edges)) if first <= i < last]
    every = -(-len(inside) // 10) or 1
    ax.set_yticks([i + 0.5 for i in inside[::every]], [names[i] for i in inside[::every]])
    bar = ax.figure.colorbar(drawn, ax=ax, pad=0.01)
    bar.set_label(f"share of what was counted at each {dim} (%)")
    if high > 10 * low:
        from matplotlib import ticker

        if high < 1000 * low:
            bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    outside = []
    if first == 0:
        outside.append(f"lowest row: below {names[0]}")
    if last == len(edges):
        outside.append(f"highest row: {names[-1]} and above, or NaN")
    _count_along(ax, dim + "".join(f"; {text}" for text in outside))


def _words(ax: "Axes", text: str, size: int = 12) -> None:
    ax.set_axis_off()
    lines = [textwrap.fill(_plain_text(line), 80) for line in text.split("\n")]
    ax.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=size)


def _head(picture: "Figure", title: str, note: str) -> None:
    """Write a title at the left, and what stands behind the numbers below it."""
    lines = textwrap.wrap(title, 88) or [""]
    text = "\n".join(lines[:3])
    picture.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize="large")
    picture.supxlabel(note, x=0.99, ha="right", fontsize="small", color=_GREY)


# ---- names


def _describe(result: Result) -> str:
    """Say what an answer is, from its plan."""
    lines = [line.strip() for line in str(result.attrs.get("plan", "")).splitlines()]
    scans = [_scanned(line) for line in lines if line.startswith("scan ")]
    taken = [line for line in lines if line.startswith("take ")]
    if not scans:
        return "answer"
    what = ", ".join(dict.fromkeys(scans))
    if taken:
        where = taken[0].removeprefix("take ").replace("before -1", "before what never happens")
        return _plain_text(f"{what}: {where}")
    chain = [_operation(line) for line in lines if not line.startswith("scan ")]
    if "centres" in result.data_vars:
        return _plain_text(f"clusters of {what}: mean history of the weights of each")
    if len(scans) > 1:
        chain = chain[:1]
    return _plain_text(" of ".join([*chain, what]))


def _quantity(result: Result) -> str:
    """Name the numbers of an answer shortly."""
    return _describe(result).split(" of ")[0] if " of " in _describe(result) else _describe(result)


def _operation(line: str) -> str:
    return line.removeprefix("map ").partition(", ")[0].replace("top_k", "ranking")


def _scanned(line: str) -> str:
    """Take the quantity, and what is chosen of it, from the line of a scan."""
    head, _, rest = line.removeprefix("scan ").rpartition(": ")
    chosen = rest.partition(" of ")[2]
    name = head.rpartition(".")[2]
    return (
        f"{name} {chosen}"
        if chosen and "," not in chosen.replace("],", "") and "[" in chosen
        else name
    )


def _footing(result: Result) -> str:
    grade, steps = result.attrs.get("grade", ""), result.attrs.get("steps", 0)
    return f"{grade}, {steps:,} steps replayed" if steps else str(grade)


def _coordinates(result: Result, dims: Sequence[str]) -> dict[str, Any]:
    return {
        str(name): (array.dims, array.values)
        for name, array in result.coords.items()
        if set(map(str, array.dims)) <= set(dims)
    }


def _along(result: Result, dim: str) -> np.ndarray:
    return np.asarray(result[dim].values) if dim in result.coords else np.arange(result.sizes[dim])


def _names(result: Result, dim: str) -> list[str]:
    if dim in result.coords:
        return [f"{dim} {x}" if not isinstance(x, str) else x for x in _along(result, dim).tolist()]
    return [f"{dim} {i}" for i in range(result.sizes[dim])]


def _places(result: Result, dims: Sequence[str]) -> tuple[bool, list[str]]:
    """Name the first of each ranking, where the answer tells who it is."""
    found = [
        (str(name), array.transpose(*dims).values[:, 0])
        for name, array in result.coords.items()
        if set(map(str, array.dims)) == set(dims)
    ]
    count = result.sizes[dims[0]]
    return bool(found), [", ".join(f"{k} {v[i]}" for k, v in found) for i in range(count)]


def _entry_names(result: Result, dim: str, count: int) -> list[str]:
    """Name the entries of a ranking, or of what was taken, by all that is known of them."""
    known = {
        str(name): array.values
        for name, array in result.coords.items()
        if list(map(str, array.dims)) == [dim] and name not in ("low", "high")
    }
    if not known:
        return [f"{dim} {i}" for i in range(count)]
    if {"tensor", "weight"} <= set(known):
        pairs = zip(known.pop("tensor"), known.pop("weight"), strict=True)
        known = {"": np.asarray([f"{t}[{w}]" for t, w in pairs]), **known}
    if dim == "occurrence":
        known = {k: known[k] for k in ("step", "position", "sample") if k in known}
    if dim in known and len(known) == 1:
        texts = known[dim].tolist()
        return [x if isinstance(x, str) else f"{dim} {x}" for x in texts]
    return [
        ", ".join(f"{k} {v[i]}".strip() for k, v in known.items() if k != dim) for i in range(count)
    ]


def _edge_names(edges: np.ndarray) -> list[str]:
    powers = np.log2(np.where(edges > 0, edges, np.nan))
    if np.isfinite(powers).all() and (powers == np.rint(powers)).all():
        return [f"$2^{{{int(power)}}}$" for power in powers]
    return [f"{edge:.3g}" for edge in edges]


def _bin_names(edges: np.ndarray) -> list[str]:
    names = [f"{edge:.3g}" for edge in edges]
    inner = [f"{a} to {b}" for a, b in zip(names, names[1:], strict=False)]
    return [f"< {names[0]}", *inner, f"≥ {names[-1]}"]


# ------------------------------------------------------------------------------- questions


def draw_question(question: Question) -> "Figure":
    """Draw the answer of a ready-made question (see `replay.questions`)."""
    draw = {
        "samples": _draw_samples,
        "weights": _draw_weights,
        "compare": _draw_compare,
        "explosion": _draw_explosion,
        "zero": _draw_zero,
        "gradients": _draw_gradients,
    }[question.name]
    _figure(1.0, 1.0)  # without matplotlib nothing is replayed
    return draw(question)


def plot_samples(run: Run, **options: Any) -> "Figure":
    """Draw which samples, or classes, moved the tensors most; options of `questions.samples`."""
    return draw_question(questions.samples(run, **options))


def plot_weights(run: Run, **options: Any) -> "Figure":
    """Draw the paths of weights, by layer and one by one; options of `questions.weights`."""
    return draw_question(questions.weights(run, **options))


def plot_comparison(run: Run, other: Run, **options: Any) -> "Figure":
    """Draw how two runs part; options of `questions.compare`."""
    return draw_question(questions.compare(run, other, **options))


def draw_comparison(comparison: Comparison, *, width: float = 10.0) -> "Figure":
    """Draw runs side by side: losses, distances, what was learned, tensors, samples that differ.

    Args:
        comparison: of two runs or more; up to seven are drawn.
        width: of the figure, in inches.

    Raises:
        ReplayError: matplotlib is not installed.
    """
    _figure(1.0, 1.0)  # without matplotlib nothing is replayed
    names = list(comparison.names[:_MOST_RUNS])
    progress = comparison.progress.isel(run=slice(0, _MOST_RUNS))
    learned = [x for x in ("test_loss", "test_accuracy", "train_loss", "train_accuracy")
               if x in progress.data_vars][:2]  # fmt: skip
    leaves = [str(x) for x in comparison.distances["tensor"].values][:_MOST_BARS]
    along = len(comparison.states) > 1
    learned = learned if along else []  # of one state the title tells it
    heights = [2.6, 2.6] if along else [2.6]
    bars = max(0.9 + (0.17 * len(names) + 0.1) * len(leaves), 2.4)
    rows: list[Any] = [["losses"] * 2]
    rows += [["distance", *(learned[:1] or ["distance"])]] * along
    below = ["tensors", "samples"] if comparison.tested else ["tensors"] * 2
    if len(learned) > 1:
        rows.append([learned[1]] * 2)
        heights.append(2.0)
    rows.append(below)
    heights.append(max(bars, 4.6 if comparison.tested else 0.0))
    picture = _figure(width, sum(heights) + 0.9)
    axes = picture.subplot_mosaic(rows, height_ratios=heights)
    _draw_losses(axes["losses"], names, list(comparison.curves["loss"].values[: len(names)]))
    if along:
        _draw_distances(axes["distance"], comparison, names)
    for name in learned:
        _draw_learned(axes[name], comparison, progress[name].values, name, names)
    _draw_tensors(axes["tensors"], comparison, leaves, names)
    if comparison.tested:
        _draw_differing(axes["samples"], comparison, len(names))
    rest = len(comparison.names) - len(names)
    more = f"; {rest} more runs are not drawn" * (rest > 0)
    end, far = comparison.states[-1], comparison.distances.isel(state=-1)
    if len(names) == 2:
        moved = " and ".join(f"{x:.3g}" for x in far["moved"].values)
        title = f"{names[0]} and {names[1]} at state {end:,}: {far['distance'].values[1]:.3g} apart"
        title += f", {moved} from state 0"
        for kind in ("test", "train") if not along else ():
            if f"{kind}_loss" in progress.data_vars:
                means = " and ".join(f"{x:.3g}" for x in progress[f"{kind}_loss"].values[:, -1])
                title += f"; mean {kind} loss {means}"
    else:
        title = f"{len(comparison.names)} runs up to state {end:,}, compared with {names[0]}"
    told = [f"{name}: {found}" for name, found in list(comparison.partings.items())[:3]]
    note = "\n".join(textwrap.fill(_plain_text(x), 130) for x in [*told, comparison.note] if x)
    _head(picture, _plain_text(title), f"{note}\n{comparison.footing}{more}")
    return picture


def plot_explosions(run: Run, **options: Any) -> "Figure":
    """Draw the loss, and the steps whose gradients explode; options of `questions.explosion`."""
    return draw_question(questions.explosion(run, **options))


def plot_weight(run: Run, weight: str, **options: Any) -> "Figure":
    """Draw the path of a weight, and who pushed it to zero; options of `questions.zero`."""
    return draw_question(questions.zero(run, weight, **options))


def plot_gradients(run: Run, **options: Any) -> "Figure":
    """Draw the sizes of all gradients over time; options of `questions.gradients`."""
    return draw_question(questions.gradients(run, **options))


def plot_clusters(run: Run, k: int = 6, *, windows: int = 16, seed: int = 0) -> "Figure":
    """Draw groups of weights that moved alike: their mean histories, and where they are.

    Args:
        run: which is drawn.
        k: how many groups.
        windows: into how many spans of steps a history is summed.
        seed: of k-means.
    """
    picture = _figure(9.0, 7.0)
    found = run.updates.cluster(k, windows=windows, seed=seed)
    above, below = picture.subplots(2, 1, height_ratios=[4, 3])
    _draw_centres(above, found)
    tensors = [str(x) for x in found.data_vars if "tensor" in found[x].attrs][:_MOST_PANELS]
    left = np.zeros(len(tensors))
    flat = [found[name].values.reshape(-1) for name in tensors]
    for number in range(k):
        parts = np.asarray([100 * np.mean(x == number) for x in flat])
        below.barh(tensors, parts, left=left, color=(_LOSS, *_METRICS)[number % 7], height=0.75)
        left += parts
    still = sum(int((x == -1).sum()) for x in flat)
    below.set_yticks(range(len(tensors)), [_label(x) for x in tensors], fontsize="small")
    below.invert_yaxis()
    below.set_xlim(0, 100)
    below.spines[["top", "right"]].set_visible(False)
    rest = f"; {still:,} weights never moved" if still else ""
    below.set_xlabel(f"share of the weights of a tensor (%), in the colours above{rest}")
    _head(picture, f"{_run_name(run)}: {k} clusters of weights by how they moved", _footing(found))
    return picture


def _draw_samples(question: Question) -> "Figure":
    run, settings = question.run, question.settings
    ranked = questions.ranking(question.answers["moved"], settings["top"])
    shown = dict(list(ranked.items())[: _MOST_PANELS // 2 if len(ranked) > 1 else 1])
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    ids = [name for entries in shown.values() for name, _, _ in entries]
    drawn = None if settings["by"] else questions.images(run, ids)
    each = 0.9 + (0.27 if drawn is None else 0.42) * max(map(len, shown.values()))
    picture = _figure(9.0, 0.8 + rows * each)
    axes = picture.subplots(rows, columns, squeeze=False).reshape(-1)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    classes = None if settings["by"] else questions.labels(run)
    for ax, (tensor, entries) in zip(axes, shown.items(), strict=False):
        ids = [name for name, _, _ in entries]
        if settings["by"]:
            names, pictures = [f"{settings['by']} {name}" for name in ids], None
        else:
            pictures = questions.images(run, ids)
            names = _sample_names(ids, classes)
        parts = np.asarray([100 * part for _, _, part in entries])
        _bars(ax, names, parts, "part of all |shares| (%)", images=pictures, form="{:.2f}")
        ax.set_title(_label(tensor), loc="left", fontsize="medium")
    kind = "classes" if settings["by"] else "samples"
    rest = len(ranked) - len(shown)
    more = f"; {rest} more tensors are not drawn" * (rest > 0)
    title = f"{_run_name(run)}: {kind} that changed the weights most in epoch {settings['epoch']}"
    _head(picture, title, question.footing + more)
    return picture


def _draw_weights(question: Question) -> "Figure":
    answers, run = question.answers, question.run
    leaves = {leaf.path: leaf for leaf in run.tensors}
    tensors, paths = answers["tensors"]["tensor"].values, answers["tensors"]["value"].values
    means = np.asarray(
        [v / np.prod(leaves[str(t)].shape) for t, v in zip(tensors, paths, strict=True)]
    )
    order = np.argsort(-means, kind="stable")[:_MOST_BARS]
    top = answers["top"]
    rows = [i for i, x in enumerate(top["weight"].values) if x >= 0][:_MOST_BARS]
    names = [
        questions.weight_name(leaves[str(top["tensor"].values[i])], int(top["weight"].values[i]))
        for i in rows
    ]
    picture = _figure(10.0, 1.4 + 0.27 * max(len(order), len(rows)))
    left, right = picture.subplots(1, 2)
    layer = [f"{tensors[i]} ({np.prod(leaves[str(tensors[i])].shape):,})" for i in order]
    _bars(left, layer, means[order], "mean path of a weight (sum of |updates|)")
    left.set_title("tensors, with how many weights each has", loc="left", fontsize="medium")
    _bars(right, names, top["value"].values[rows].astype(float), "path (sum of |updates|)")
    right.set_title("weights", loc="left", fontsize="medium")
    title = f"{_run_name(run)}: what changed most over {run.steps:,} steps"
    _head(picture, title, question.footing)
    return picture


def _draw_compare(question: Question) -> "Figure":
    answers, run, settings = question.answers, question.run, question.settings
    other, step = settings["other"], settings["step"]
    picture = _figure(9.0, 7.5)
    above, middle, below = picture.subplots(3, 1, height_ratios=[3, 3, 3])
    names = [_run_name(run), _run_name(other)]
    _draw_losses(above, names, [answers[f"{key} logged"]["value"].values for key in "ab"])
    distance = answers["distance"]
    _lines(
        middle, distance["state"].values, "state", distance["value"].values[None], [""],
        "distance of the weights",
    )  # fmt: skip
    columns = [answers[x]["value"].values.reshape(-1) for x in ("apart", "a moved", "b moved")]
    tensors = [str(x) for x in answers["apart"]["tensor"].values]
    labels = [f"apart after {step:,} steps", f"{names[0]} moved", f"{names[1]} moved"]
    colors = (_APART, _LOSS, _METRICS[0])
    _draw_groups(below, tensors[:_MOST_BARS], columns, labels, colors, "Euclidean norm")
    picture.set_figheight(6.5 + 0.3 * len(tensors[:_MOST_BARS]))
    title = f"{names[0]} and {names[1]}: progress after {step:,} steps"
    if "a loss" in answers and "b loss" in answers:
        means = [answers[f"{x} loss"].item() for x in "ab"]
        title += f"; mean loss of {settings['tested']:,} samples {means[0]:.4g} and {means[1]:.4g}"
    _head(picture, title, question.footing)
    return picture


def _draw_losses(ax: "Axes", names: Sequence[str], columns: Sequence[np.ndarray]) -> None:
    """Draw the logged losses of several runs, `[steps]` each, NaN where a run has none."""
    _plain_axes(ax)
    finite = []
    for number, (name, losses) in enumerate(zip(names, columns, strict=True)):
        losses = np.asarray(losses, np.float64)
        losses = losses[: np.flatnonzero(~np.isnan(losses)).max(initial=-1) + 1]
        kept = np.where(np.isfinite(losses), losses, np.nan)
        _curve(ax, np.arange(len(kept)), kept, _RUNS[number % len(_RUNS)], _label(name))
        finite.append(losses[np.isfinite(losses)])
    _choose_scale(ax, np.concatenate(finite))
    ax.set_ylabel("loss (mean of the batch)")
    ax.legend(**_LEGEND)
    _count_along(ax, "step")


def _draw_groups(
    ax: "Axes",
    names: Sequence[str],
    columns: Sequence[np.ndarray],
    labels: Sequence[str],
    colors: Sequence[str],
    what: str,
) -> None:
    """Draw a group of bars for each name, one for each column."""
    at, each = np.arange(len(names)), 0.81 / len(columns)
    _plain_axes(ax, "x")
    for number, (column, label, color) in enumerate(zip(columns, labels, colors, strict=True)):
        values = np.where(np.isfinite(column[: len(at)]), column[: len(at)], 0)
        place = at + each * (number - (len(columns) - 1) / 2)
        ax.barh(place, values, 0.96 * each, color=color, label=_label(label))
    ax.set_yticks(at, [_label(x) for x in names], fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel(what)
    ax.legend(**_LEGEND)


def _draw_distances(ax: "Axes", comparison: Comparison, names: Sequence[str]) -> None:
    """Draw how far runs are from the reference, and how far each has come from its start."""
    _plain_axes(ax)
    states, found = np.asarray(comparison.states), comparison.distances
    for number, name in enumerate(names):
        color, moved = _RUNS[number % len(_RUNS)], found["moved"].values[number]
        label = _label(f"{name} from state 0")
        style = {"linestyle": ":", "marker": "o", "markersize": 2, "linewidth": 1.2}
        ax.plot(states, moved, color=color, label=label, **style)
    for number, name in list(enumerate(names))[1:]:
        color = _APART if len(names) == 2 else _RUNS[number % len(_RUNS)]
        apart, label = found["distance"].values[number], _label(f"{name} from {names[0]}")
        ax.plot(states, apart, "o-", color=color, linewidth=1.6, markersize=4, label=label)
    ax.set_ylabel("Euclidean distance")
    ax.set_ylim(bottom=0)
    ax.set_title("all weights", loc="left", fontsize="medium")
    ax.legend(**_LEGEND)
    _count_along(ax, "state")


def _draw_learned(
    ax: "Axes", comparison: Comparison, values: np.ndarray, name: str, names: Sequence[str]
) -> None:
    _plain_axes(ax)
    kind, what = name.split("_")
    count = next(len(tested.data) for tested in comparison.tested if tested.name == kind)
    shown = 100 * values if what == "accuracy" else values
    for number, run in enumerate(names):
        color = _RUNS[number % len(_RUNS)]
        style = {"color": color, "linewidth": 1.2, "markersize": 3, "label": _label(run)}
        ax.plot(comparison.states, shown[number], "o-", **style)
    if what == "loss":
        _choose_scale(ax, shown[np.isfinite(shown)])
    samples = f"{count:,} {'training' if kind == 'train' else 'held-out'} samples"
    ax.set_ylabel("accuracy (%)" if what == "accuracy" else "mean loss")
    ax.set_title(samples, loc="left", fontsize="medium")
    ax.legend(**_LEGEND)
    _count_along(ax, "state")


def _draw_tensors(
    ax: "Axes", comparison: Comparison, leaves: Sequence[str], names: Sequence[str]
) -> None:
    """Draw how far each tensor is from that of the reference, and of two runs from state 0."""
    found = comparison.distances.isel(state=-1)
    columns, labels, colors = [], [], []
    for number, name in list(enumerate(names))[1:]:
        columns.append(found["tensor_distance"].values[number])
        labels.append(f"{name} from {names[0]}")
        colors.append(_RUNS[number % len(_RUNS)])
    if len(names) == 2:
        columns += list(found["tensor_moved"].values[:2])
        labels += [f"{name} from state 0" for name in names]
        colors = [_APART, *_RUNS[:2]]
    _draw_groups(ax, leaves, columns, labels, colors, "Euclidean distance")
    title = f"tensors at state {comparison.states[-1]:,}"
    ax.set_title(title, loc="left", fontsize="medium")


def _draw_differing(ax: "Axes", comparison: Comparison, runs: int) -> None:
    """Draw the samples whose losses differ most, of the run where they do."""
    tested, ranked = comparison.tested[-1], comparison.samples(10)
    largest = np.abs(ranked["difference"].values[:runs, 0])
    number = int(np.argmax(np.nan_to_num(largest, nan=np.inf)))
    if not largest[number]:
        _words(ax, "the losses of all samples are the same")
        return
    found = ranked.isel(run=number)
    ids = [int(i) for i in found["sample"].values]
    places = [tested.ids.tolist().index(i) for i in ids]
    labels = tested.labels
    names = [
        f"sample {i}" + ("" if labels is None else f" ({labels[place]})")
        for i, place in zip(ids, places, strict=True)
    ]
    values = found["difference"].values.astype(np.float64)
    first, other = comparison.names[0], comparison.names[number]
    images = questions.images_of(tested.data, places)
    what = f"loss in {other} minus loss in {first}"
    _bars(ax, names, values, what, images=images, form="{:+.3g}")
    kind = "training" if tested.name == "train" else "held-out"
    title = f"{kind} samples that differ most at state {comparison.states[-1]:,}"
    ax.set_title(title, loc="left", fontsize="medium")


def _draw_explosion(question: Question) -> "Figure":
    answers, run, settings = question.answers, question.run, question.settings
    shares, first = 100 * answers["exceeding"]["value"].values.astype(float), int(answers["step"])
    limit = 100 * settings["share"]
    at = np.flatnonzero(shares > limit)
    picture = _figure(9.0, 6.0)
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for ax in (above, below):
        _plain_axes(ax)
    _draw_loss(above, run.history()["loss"].astype(np.float64), run.checkpoints)
    if len(at):
        edge = above.get_xaxis_transform()
        more = f" and {len(at) - 1:,} more" * (len(at) > 1)
        above.vlines(at[:1000], 0, 1, color=_BAD, linewidth=0.8, alpha=0.25, transform=edge)
        label = f"more than {limit:g}% exceed: step {first:,}{more}"
        above.plot(at[:1000], [0.97] * len(at[:1000]), "x", color=_BAD, transform=edge, label=label)
        above.legend(**_LEGEND)
    below.plot(shares, color=_LOSS, linewidth=1.0)
    below.axhline(
        limit, color=_BAD, linewidth=1.0, linestyle="--", label=f"{limit:g}% of all weights"
    )
    below.set_ylim(0, max(1.1 * shares.max(initial=0), 1.3 * limit, 1e-9))
    below.set_ylabel("share of weights (%)")
    below.set_title(f"|gradient| above {settings['threshold']:g}", loc="left", fontsize="medium")
    below.legend(**_LEGEND)
    _count_along(below, "step")
    when = f"first at step {first:,}" if first >= 0 else "at no step"
    found = f"more than {limit:g}% of |gradients| exceed {settings['threshold']:g} {when}"
    _head(picture, f"{_run_name(run)}: {found}", question.footing)
    return picture


def _draw_zero(question: Question) -> "Figure":
    answers, run, settings = question.answers, question.run, question.settings
    path, step = answers["path"], int(answers["step"])
    taken = questions.occurrences(answers["sample"]) if step >= 0 else ([], [], [])
    pushes = answers["share"]["value"].values.astype(float) if step >= 0 else np.zeros(0)
    order = np.argsort(-np.abs(np.nan_to_num(pushes, nan=np.inf)), kind="stable")
    order = [int(i) for i in order if pushes[i] != 0][:10]
    rows = max(len(order), 1)
    picture = _figure(9.0, 4.2 + 0.42 * rows)
    above, below = picture.subplots(2, 1, height_ratios=[3.0, 0.6 + 0.42 * rows])
    values = path["value"].values.astype(float)
    _lines(above, path["state"].values, "state", values[None], [""], settings["weight"])
    above.set_yscale("linear")
    above.axhline(0, color=_GREY, linewidth=0.8)
    name = _label(settings["weight"])
    if step < 0:
        _words(below, "it never crosses or reaches 0")
        title = f"{_run_name(run)}: the path of {name}"
        _head(picture, title, question.footing)
        return picture
    above.plot(
        [step + 1], [values[step + 1]], "o", color=_BAD, label=f"step {step:,} takes it across"
    )
    above.legend(**_LEGEND)
    if order:
        steps, _, ids = ([column[i] for i in order] for column in taken)
        named = _sample_names(ids, questions.labels(run))
        names = [f"{text}, step {at:,}" for text, at in zip(named, steps, strict=True)]
        pictures = questions.images(run, ids)
        _bars(below, names, pushes[order], "share in the update of the weight", images=pictures)
    else:
        _words(below, "no sample had a share in it: momentum and decay alone moved it")
    update, carried = (float(answers[x]["value"].values[0]) for x in ("update", "carried"))
    text = f"the largest shares among the last {len(pushes)} samples. Step {step:,} moved it by "
    text += f"{update:.3g}:\n{update - carried:.3g} its batch, {carried:.3g} momentum and decay"
    below.set_title(text, loc="left", fontsize="medium")
    title = f"{_run_name(run)}: who led {name} to zero"
    _head(picture, title, question.footing)
    return picture


def _draw_gradients(question: Question) -> "Figure":
    found, tensor = question.answers["counts"], question.settings["tensor"]
    picture = _figure(9.0, 4.5)
    ax = picture.subplots()
    edges = np.asarray(found["low"].values[1:], np.float64)
    _heat_of_bins(ax, found["step"].values, "step", found["value"].values, edges)
    ax.set_ylabel("|gradient| of a weight")
    whose = "all weights" if tensor == "*" else _label(tensor)
    _head(picture, f"{_run_name(question.run)}: gradients of {whose}", question.footing)
    return picture


def _sample_names(ids: Sequence[int], classes: np.ndarray | None) -> list[str]:
    if classes is None:
        return [f"sample {i}" for i in ids]
    return [f"sample {i} ({classes[i]})" for i in ids]


def _run_name(run: Run) -> str:
    return _label(run.path.rstrip("/").rpartition("/")[2])


def _plain_text(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ReplayError(
            "matplotlib is not installed",
            why="it draws the pictures, and is not needed for anything else",
            fix='pip install "jax-replay[plot]"',
        ) from error
    return figure.Figure(figsize=(width, height), layout="constrained")


def formats() -> list[str]:
    """Return the endings of the files that a figure can be written to.

    Raises:
        ReplayError: matplotlib is not installed.
    """
    return sorted(_figure(1.0, 1.0).canvas.get_supported_filetypes())


def _plain_axes(ax: "Axes", grid: str = "y") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e8e8e8", linewidth=0.7)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def _count_along(ax: "Axes", name: str) -> None:
    """Number steps, or anything else that is counted, along the horizontal axis."""
    from matplotlib import ticker

    ax.set_xlabel(name)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _label(text: str) -> str:
    """Make a name from a record plain text for matplotlib: no formulas, nothing invisible."""
    plain = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return plain[:60].lstrip("_") or "?"
