"""What lanes are compared by: a function of their weights, or their losses on samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from replay.data import Data, spaced
from replay.errors import ProgramError, QueryError
from replay.frames import of_the_form
from replay.lanes import Functions
from replay.log import Log

# Of training samples, where nothing else is asked for.
_MOST_SAMPLES = 1024


class Metric(NamedTuple):
    """What is compared.

    Attributes:
        function: `function(state, extra) -> array`, of the raw leaves of a state.
        extra: arrays that it needs besides.
        dim: names an axis of the array, by its number.
        name: how it is shown.
    """

    function: Callable[[Sequence[Any], Sequence[Any]], Any]
    extra: Sequence[Any]
    dim: Callable[[int], str]
    name: str


def metric_of(
    metric: Any,
    functions: Functions,
    log: Log,
    data: Data,
    params: Callable[[Sequence[Any]], Any],
    state: int,
) -> Metric:
    """Return what is compared.

    Args:
        metric: a function of the tree of weights; samples; or None for some of the training data.
        functions: that tell the losses of samples.
        log: of the run.
        data: its samples.
        params: makes the tree of weights from the raw leaves of a state.
        state: its number, which the keys of samples depend on.

    Raises:
        ProgramError: the program cannot tell losses.
        DataError: the samples have another form than the run's.
    """
    if callable(metric):
        name = getattr(metric, "__name__", "metric")
        name = "metric" if name == "<lambda>" else name
        return Metric(_of_params(metric, params), [], "metric_{}".format, name)
    losses = functions.losses
    if losses is None:
        raise ProgramError(
            "the program cannot tell the losses of samples",
            why="by default effects are those on losses, and so they are with samples as metric",
            fix="metric=lambda params: ..., or Program.from_functions(..., losses=...)",
        )
    data = data if metric is None else of_the_form(log, metric)
    count, size = len(data), log.header.signature.batch_size
    # Evenly spread, so that all kinds are there.
    ids = np.arange(count) if metric is not None else spaced(count, _MOST_SAMPLES)
    count = len(ids)
    padded = np.full(-(-count // size) * size, -1, np.int32)
    padded[:count] = ids
    rows = padded.reshape(-1, size)
    key = jnp.asarray(log.header.key, jnp.uint32)

    def of_samples(raw, extra):
        def one(row):
            ids, *batch = row
            return losses(raw, key, jnp.uint32(state), ids, (ids >= 0).astype(jnp.float32), batch)

        found = jax.lax.map(one, tuple(extra)).reshape(-1)[:count]
        return found.mean() if metric is None else found

    name = "mean training loss" if metric is None else "sample losses"
    return Metric(of_samples, [rows, *data.leaves(rows)], lambda axis: "sample", name)


def _of_params(metric: Callable, params: Callable) -> Callable:
    def of_params(raw, extra):
        leaves = jax.tree.leaves(metric(params(raw)))
        if len(leaves) != 1 or not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.number):
            raise QueryError(
                f"the metric returned {len(leaves)} leaves"
                + f" of {jnp.result_type(leaves[0])}" * (len(leaves) == 1),
                why="effects are differences of one number, or of one array of numbers",
                fix="metric=lambda params: ..., which returns a scalar or an array",
            )
        found = jnp.asarray(leaves[0])
        if not found.size or jnp.issubdtype(found.dtype, jnp.complexfloating):
            raise QueryError(
                f"the metric returned {found.dtype}{list(found.shape)}",
                why="effects are differences of real numbers, ranked by their size",
                fix="return one number or more; of a complex one the real part, or jnp.abs of it",
            )
        return found

    return of_params
