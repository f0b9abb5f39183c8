"""What edits of a run have done to a metric, in its own units and in those of numerical noise."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from replay.errors import QueryError, printable
from replay.results import Result


class Changes(NamedTuple):
    """How much of which sample each edit has taken away.

    Attributes:
        edit: numbers of edits.
        sample: ids.
        less: factor of the sample's loss before the edit, minus that after it.
        samples: how many samples there are.
        reordered: names of the edits that change the order, of which this tells nothing.
    """

    edit: np.ndarray
    sample: np.ndarray
    less: np.ndarray
    samples: int
    reordered: tuple[str, ...]


class DatamodelingScore(NamedTuple):
    """How well scores of samples predict what edits do.

    Attributes:
        correlation: Spearman's, over the edits, for each component of the metric; NaN where the
            predictions or the effects are all the same, or fewer than two edits are left.
        mean: of those that are numbers.
        left_out: how many edits have an effect that is not a number, in any component: they are
            left out of the correlation there.
    """

    correlation: np.ndarray
    mean: float
    left_out: int


@dataclasses.dataclass(frozen=True, repr=False)
class Counterfactuals:
    """The answers to many counterfactuals.

    Attributes:
        dataset: `value`, `effect` and `effect_in_noise` by edit, `null_value` and `null_effect` by
            null lane, `control` of each batch of lanes, `recorded` and `noise`, the standard
            deviation of the null effects; all with the dimensions of the metric besides. Effects
            are those of the lane minus those of the control lane of its own batch.
            `effect_in_noise` is NaN where all null lanes agree, so that there is no noise to
            compare with, or where one of them is not finite. `attrs` tell how it was made.
        confirmed: what real forks of some edits came to, and how far the lanes were off; None
            where none was asked for.
        changes: which samples the edits take away.
    """

    dataset: Result
    confirmed: Result | None
    changes: Changes

    @property
    def value(self) -> Any:
        """The metric under each edit."""
        return self.dataset["value"]

    @property
    def effect(self) -> Any:
        """The metric under each edit, minus that of the unedited run beside it."""
        return self.dataset["effect"]

    @property
    def effect_in_noise(self) -> Any:
        """The same in standard deviations of what one unit in the last place of a weight does."""
        return self.dataset["effect_in_noise"]

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the effects of edits and of null lanes, averaged over a metric's components."""
        found = [np.asarray(self.dataset[name].values) for name in ("effect", "null_effect")]
        with np.errstate(invalid="ignore"):  # infinities of both signs
            edits, nulls = (x.reshape(len(x), -1).mean(1) for x in found)
        return edits, nulls

    def top(self, k: int = 10) -> pd.DataFrame:
        """Return the edits with the largest effects, either way; components are averaged.

        Edits under which the training has diverged come first: their effects are not numbers.

        Returns:
            Columns `edit`, `name`, `effect` and `effect_in_noise`, NaN where there is no noise.
        """
        effects, nulls = self.means()
        first = largest(effects)[:k]
        with np.errstate(invalid="ignore"):
            noise = nulls.std(ddof=1)
        return pd.DataFrame(
            {
                "edit": first,
                "name": self.dataset["name"].values[first],
                "effect": effects[first],
                "effect_in_noise": in_noise(effects[first], noise),
            }
        )

    def lds(self, scores: "ArrayLike | Result") -> DatamodelingScore:
        """Compare scores of samples with what leaving samples out has really done.

        The linear datamodeling score (Park et al., 2023): an edit is predicted to do the sum of the
        scores of the samples that it leaves out, and the predictions are ranked beside the effects.
        A factor that is changed in part counts in part. An edit whose effect is not a number has no
        rank, and is left out.

        Args:
            scores: `[samples]`, or `[samples, n]` for a metric of n components: by how much the
                metric is predicted to rise when the sample is left out. What `Run.tracin` returns
                may be of those samples alone that the edits leave out.

        Raises:
            QueryError: they have another shape, or are not of a sample that is left out; an edit
                changes the order, or there are fewer than two edits.
        """
        if isinstance(scores, Result):
            scores = self._of_all(scores)
        effects = np.asarray(self.effect.values)
        shape, effects = effects.shape[1:], effects.reshape(len(effects), -1)
        scores, changes = np.asarray(scores, np.float64), self.changes
        fits = scores.shape[1:] in ((), (effects.shape[1],))
        if scores.ndim not in (1, 2) or len(scores) != changes.samples or not fits:
            raise QueryError(
                f"the scores have shape {list(scores.shape)}",
                why=f"there are {changes.samples} samples, and the metric has "
                f"{effects.shape[1]} component{'s' * (effects.shape[1] != 1)}",
                fix=f"scores of shape [{changes.samples}] or [{changes.samples}, "
                f"{effects.shape[1]}]",
            )
        if changes.reordered or len(effects) < 2:
            raise QueryError(
                f"edit {changes.reordered[0]!r} changes the order"
                if changes.reordered
                else f"{len(effects)} edit{'s' * (len(effects) != 1)}",
                why="scores of samples predict what the weights of samples do, and ranks are "
                "compared of two edits or more",
                fix="edits of sample_weights: replay.edits.leave_some_out(samples, k, ...)",
            )
        predicted = np.zeros((len(effects), *scores.shape[1:]))
        less = changes.less.reshape(-1, *[1] * (scores.ndim - 1))
        np.add.at(predicted, changes.edit, less * scores[changes.sample])
        predicted = np.broadcast_to(predicted.reshape(len(effects), -1), effects.shape)
        lost = np.isnan(effects)
        each = [
            spearman(guess[~gone], effect[~gone])
            for guess, effect, gone in zip(predicted.T, effects.T, lost.T, strict=True)
        ]
        known = [x for x in each if np.isfinite(x)]
        mean = float(np.mean(known)) if known else float("nan")
        left_out = int(lost.any(axis=1).sum())
        return DatamodelingScore(np.asarray(each).reshape(shape), mean, left_out)

    def _of_all(self, scores: Result) -> np.ndarray:
        """Return scores of all samples from those of some, which their coordinate names."""
        if "sample" not in scores.coords or "value" not in scores:
            raise QueryError(
                f"the scores have dimensions {', '.join(map(str, scores.sizes))}",
                why="they are of samples, named by a coordinate of that name",
                fix="scores=run.tracin(test, learning_rate=...), or an array [samples]",
            )
        samples = scores["sample"].values
        missing = np.setdiff1d(self.changes.sample, samples)
        if len(missing):
            raise QueryError(
                f"the scores say nothing of sample {missing[0]}",
                why=f"it is left out by an edit; they are of {len(samples)} samples",
                fix="run.tracin(..., samples=...) with all samples that are left out",
            )
        values = scores["value"].transpose("sample", ...).values
        found = np.zeros((self.changes.samples, *values.shape[1:]))
        found[samples] = values
        return found

    def df(self) -> pd.DataFrame:
        """Return a long table: a row for each edit and component of the metric."""
        columns = ["name", "value", "effect", "effect_in_noise"]
        return self.dataset[columns].to_dataframe().reset_index()

    def plot(self, path: Any = None, **options: Any) -> Any:
        """Draw the effects beside the noise, and name the largest.

        Args:
            path: a file to write, in the format that its ending names.
            **options: as for `replay.report.draw_counterfactuals`.

        Returns:
            A matplotlib figure.

        Raises:
            ReplayError: matplotlib is not installed.
        """
        # By name: this layer knows nothing of pictures, and matplotlib is an extra.
        report = importlib.import_module("replay.report")
        figure = report.draw_counterfactuals(self, **options)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __repr__(self) -> str:
        attrs, effects = self.dataset.attrs, self.means()[0]
        lines = [
            f"{len(effects):,} counterfactuals of {attrs['run']}, steps {attrs['at']:,} to "
            f"{attrs['until']:,}: {attrs['batches']:,} batches of up to {attrs['lanes']:,} lanes "
            f"({attrs['form']}), {attrs['seconds']:.1f} s",
            f"control lanes: {attrs['control_deviation']:.3g} from the recorded metric, "
            f"{attrs['control_weight_deviation']:.3g} from its weights",
            f"null lanes: one unit in the last place of one weight changed the metric in "
            f"{attrs['nulls_felt']:,} of {attrs['nulls']:,}",
        ]
        if attrs["without_noise"]:
            lines.append(
                f"null lanes have no spread in {attrs['without_noise']:,} of "
                f"{attrs['components']:,} components: no units of noise for effects there"
            )
        if attrs["noise_not_finite"]:
            lines.append(
                f"null lanes are not finite in {attrs['noise_not_finite']:,} of "
                f"{attrs['components']:,} components: no units of noise for effects there"
            )
        top = self.top(3)
        columns = (top[name].tolist() for name in ("name", "effect", "effect_in_noise"))
        for name, effect, noise in zip(*columns, strict=True):
            known = f", {noise:.3g} of noise" * bool(np.isfinite(noise))
            lines.append(f"{name}: {effect:+.4g}{known}")
        return "\n".join(map(printable, lines))


def in_noise(effects: np.ndarray, noise: ArrayLike) -> np.ndarray:
    """Return effects in units of noise, NaN where there is none, or it is not finite."""
    noise = np.broadcast_to(noise, np.shape(effects))
    known = (noise > 0) & np.isfinite(noise)
    return np.divide(effects, noise, out=np.full(np.shape(effects), np.nan), where=known)


def largest(effects: np.ndarray) -> np.ndarray:
    """Return the numbers of effects by their size, what is not a number first.

    >>> largest(np.array([1.0, -3.0, np.nan, 2.0])).tolist()
    [2, 1, 3, 0]
    """
    return np.argsort(np.where(np.isnan(effects), -np.inf, -np.abs(effects)), kind="stable")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two rows of numbers.

    NaN where one of them never changes, or has something without a rank: NaN.

    >>> spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([-5.0, 0.0, 0.0, 99.0]))
    1.0
    """
    if np.isnan(a).any() or np.isnan(b).any() or len(a) < 2:
        return float("nan")
    ranked = [ranks(x) for x in (a, b)]
    first, second = (x - x.mean() for x in ranked)
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float(np.clip((first * second).sum() / scale, -1, 1)) if scale > 0 else float("nan")


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return ranks from 1, equal values sharing the mean of theirs.

    >>> ranks([30.0, 10.0, 10.0]).tolist()
    [3.0, 1.5, 1.5]
    """
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[places]
