"""What one walk through each of several runs tells: weights against those of the first, losses.

Weights are read in portions of states that fit into memory, one run after the other, and only the
first run and one other are held. Losses of samples are asked for in the same replay.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from replay.api import Run, compute
from replay.data import Data
from replay.errors import Grade, QueryError
from replay.quantities import OtherSamples
from replay.query.expressions import Expression
from replay.results import Result
from replay.tree import nest

# `accuracy(params, batch) -> [samples]`
Accuracy = Callable[[Any, Any], Any]

# Samples that are given to it at once.
_BATCH = 512


class Tested(NamedTuple):
    """Samples that all runs are tested on.

    Attributes:
        name: `train` or `test`.
        data: the samples.
        ids: of training samples, their ids in the data of the reference; else their places.
        labels: the class of each, where a leaf of the data is one.
        of: the same samples as each run sees them.
    """

    name: str
    data: Data
    ids: np.ndarray
    labels: np.ndarray | None
    of: Mapping[Run, OtherSamples]


class Found(NamedTuple):
    """What one walk through each run gives.

    Attributes:
        sums: over the weights of each tensor, `float64[runs, states, tensors]`: squared
            differences to the first run, `apart`; products with the weights of the first run,
            `dot`; squares, `own`; the same of the weights minus those of state 0, `moved_dot` and
            `moved`.
        losses: of each set of samples, `[runs, states, samples]`.
        right: the share of each set that is classified rightly, `float64[runs, states]`.
        grade: the worst of the replays.
        steps: replayed in all.
    """

    sums: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    grade: Grade
    steps: int


@dataclasses.dataclass(frozen=True)
class Walk:
    """What is asked of each run, at which states.

    Attributes:
        states: ascending.
        tested: sets of samples whose losses are asked for.
        accuracy: tells which samples are classified rightly, or None.
        logits: the name of activations whose largest tells a class, or None.
        options: `memory`, `exact` and `progress`, as for `replay.compute`.
    """

    states: tuple[int, ...]
    tested: tuple[Tested, ...]
    accuracy: Accuracy | None
    logits: str | None
    options: Mapping[str, Any]

    def explain(self, run: Run) -> str:
        """Tell what it takes; nothing is replayed."""
        asked = [x for part in self._portions(run) for x in self._asked(run, part).values()]
        return run.asking.explain(*asked, cache=False)

    def through(self, runs: Sequence[Run]) -> Found:
        """Replay what is needed of each run; one that is given twice is replayed once."""
        # Tensors are matched by path: programs of one architecture may list them differently.
        paths = [leaf.path for leaf in runs[0].tensors]
        grade, steps = Grade.BITWISE, 0
        parts: list[list[dict[str, np.ndarray]]] = []
        for states in self._portions(runs[0]):
            first, rows = None, {}
            for run in dict.fromkeys(runs):
                asked = self._asked(run, states)
                # Weights are not kept among the answers: they lie in the run already.
                found = compute(*asked.values(), cache=False, **self.options)
                answers = dict(zip(asked, found, strict=True))
                grade = grade & worst(found)
                steps += max(answer.attrs["steps"] for answer in found)
                weights = _flat(answers["weights"], paths), _flat(answers["initial"], paths)
                first = first or weights
                rows[run] = (_sums(*first, *weights), *self._judged(answers, run))
            each = [rows[run] for run in runs]
            parts.append([
                {name: np.stack([row[kind][name] for row in each]) for name in each[0][kind]}
                for kind in range(3)
            ])  # fmt: skip
        joined = [
            {name: np.concatenate([part[kind][name] for part in parts], 1) for name in whole}
            for kind, whole in enumerate(parts[0])
        ]
        sums, losses, right = joined
        return Found(sums, losses, right, grade, steps)

    def _asked(self, run: Run, states: Sequence[int]) -> dict[str, Expression]:
        at = list(states)
        found = {"weights": run.weights.sel(state=at), "initial": run.weights.sel(state=[0])}
        for tested in self.tested:
            other = tested.of[run]
            found[f"{tested.name} losses"] = other.sample_losses.sel(state=at)
            if self.accuracy is None and self.logits is not None and tested.labels is not None:
                found[f"{tested.name} logits"] = other.activations(self.logits).sel(state=at)
        return found

    def _portions(self, run: Run) -> Iterator[tuple[int, ...]]:
        """Cut the states so that the weights of one run take an eighth of the memory."""
        weights = sum(math.prod(leaf.shape) for leaf in run.tensors)
        each = max(1, self.options["memory"] // (8 * 4 * max(weights, 1)))
        for first in range(0, len(self.states), each):
            yield self.states[first : first + each]

    def _judged(self, answers: Mapping[str, Result], run: Run) -> tuple[dict, dict]:
        """Return losses `[states, samples]` and shares of right answers `[states]`, by set."""
        losses, right = {}, {}
        for tested in self.tested:
            losses[tested.name] = answers[f"{tested.name} losses"]["value"].values
            if self.accuracy is not None:
                right[tested.name] = _right(self.accuracy, answers["weights"], run, tested.data)
            elif (logits := answers.get(f"{tested.name} logits")) is not None:
                values = next(iter(logits.data_vars.values())).values
                assert tested.labels is not None
                right[tested.name] = (values.argmax(axis=-1) == tested.labels).mean(axis=-1)
        return losses, right


def worst(answers: Sequence[Result]) -> Grade:
    """Return the worst grade of some answers; what was only logged has none."""
    found = Grade.BITWISE
    for answer in answers:
        grade = answer.attrs["grade"]
        found = found & Grade[grade] if grade in Grade.__members__ else found
    return found


_SUMS = ("apart", "dot", "own", "moved", "moved_dot")

_Weights = list[np.ndarray]


def _flat(answer: Result, paths: Sequence[str]) -> _Weights:
    """Return the tensors, `[states, weights]` each."""
    arrays = [answer[path].values for path in paths]
    return [array.reshape(len(array), -1) for array in arrays]


def _sums(
    reference: _Weights, reference0: _Weights, weights: _Weights, weights0: _Weights
) -> dict[str, np.ndarray]:
    """Return sums over the weights of each tensor, `float64[states, tensors]`."""
    shape = (len(weights[0]) if weights else 0, len(weights))
    found = {name: np.zeros(shape) for name in _SUMS}
    for tensor, parts in enumerate(zip(reference, weights, reference0, weights0, strict=True)):
        x0, y0 = (part[0].astype(np.float64) for part in parts[2:])
        for state, rows in enumerate(zip(*parts[:2], strict=True)):
            x, y = (row.astype(np.float64) for row in rows)
            with np.errstate(invalid="ignore", over="ignore"):
                apart, moved, theirs = y - x, y - y0, x - x0
            pairs = ((apart, apart), (x, y), (y, y), (moved, moved), (theirs, moved))
            for name, pair in zip(_SUMS, pairs, strict=True):
                with np.errstate(invalid="ignore", over="ignore"):
                    found[name][state, tensor] = np.einsum("i,i->", *pair)
    return found


def cosine(dots: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return cosines with the first run, from dot products and squared lengths `[runs, ...]`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip(dots / np.sqrt(own) / np.sqrt(own[:1]), -1.0, 1.0)
    # Where all three are one number the root of its square need not be that number.
    return np.where((dots == own) & (dots == own[:1]) & (dots > 0), 1.0, found)


def _right(accuracy: Accuracy, weights: Result, run: Run, data: Data) -> np.ndarray:
    """Return the share of samples that a function calls right, at each state."""
    judge = jax.jit(accuracy)
    tensors = [weights[leaf.path].values for leaf in run.tensors]
    found = np.zeros(len(tensors[0]))
    for first in range(0, len(data), _BATCH):
        ids = np.arange(first, min(first + _BATCH, len(data)))
        leaves = data.leaves(ids)
        batch = (
            jax.tree.unflatten(data.tree, leaves)
            if data.tree is not None
            else nest([leaf.path for leaf in data.spec], leaves)
        )
        for state in range(len(found)):
            params = nest([leaf.path for leaf in run.tensors], [x[state] for x in tensors])
            right = np.asarray(judge(params, batch))
            if right.shape != ids.shape:
                raise QueryError(
                    f"accuracy returned {list(right.shape)} for a batch of {len(ids)} samples",
                    why="it is to tell of each sample whether it is classified rightly",
                    fix="return logits.argmax(-1) == batch['label']",
                )
            found[state] += right.sum(dtype=np.float64)
    return found / len(data)
