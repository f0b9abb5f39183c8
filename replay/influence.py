"""How much a step on one sample lowered the loss of another: idealised TracIn, along a replay.

For training sample i and another sample j, the sum over the steps t that i was visited at of
lr_t * w_i / B * <grad l_i, grad l_j>, both gradients at the exact weights of state t, each with the
sample's own key of that step (Pruthi et al., 2020, "Estimating training data influence by tracing
gradient descent", where the idealised form is replaced by a sum over a few checkpoints because
states in between are not kept). Known to be imperfect: it is of first order in the learning rate;
it holds for plain gradient descent, and under momentum or Adam leaves out what the optimizer's
memory makes of a gradient; and it says nothing of how later steps answer to an earlier one.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from replay.data import Data, whole_numbers
from replay.errors import Grade, QueryError
from replay.frames import elsewhere
from replay.grads.gradients import Form
from replay.grads.sources import Group, chunks, gradients_of
from replay.log import Log
from replay.progress import progress_bar
from replay.replaying import Replayed, Replayer
from replay.results import Result
from replay.sample_gradients import SampleGradients

RULE = "TracIn, idealised: sum of lr w_i/B <g_i, g_j> over the steps that visited i"
RULE_AT_STATES = "TracInCP: sum of lr/B <g_i, g_j> over the chosen states"

# What turns a step into a learning rate: a number, one for each step, or a schedule of optax.
LearningRate = float | Sequence[float] | Float[np.ndarray, " steps"] | Callable[[Any], Any]


class Scores:
    """Sums of products of gradients: products in float32 on the device, sums in float64 here.

    What a step adds to a pair of samples is added in the order of steps, of tensors with factors
    before those without, and of positions. Products of a step are fetched when the next is under
    way.

    Args:
        gradients: of the run.
        samples: `int[rows]`, those of the run that are asked about; others are left out.
        others: the other samples.
        size: of a batch.
        way: `factored` or `scan`.
        memory: bytes that materialised gradients may take.
        own: whether to sum each sample's product with itself too.
    """

    def __init__(
        self,
        gradients: SampleGradients,
        samples: Int[np.ndarray, " rows"],
        others: Data,
        size: int,
        *,
        way: str,
        memory: int,
        own: bool,
    ):
        self._gradients, self._size, self._memory = gradients, size, memory
        self._order = np.argsort(samples, kind="stable")
        self._sorted = samples[self._order]
        starts = range(0, len(others), size)
        ids = [np.arange(a, min(a + size, len(others)), dtype=np.int32) for a in starts]
        batches = [elsewhere(others, mine, size, 0, ()) for mine in ids]
        # One more than there are, never looked at: see `_multiplier`.
        leaves = zip(*((x.ids, x.weights, *x.batch) for x in (*batches, batches[-1])), strict=True)
        self._others = [jnp.asarray(np.stack(leaf)) for leaf in leaves]  # [batches, batch, ...]
        self._waiting: list[tuple] = []
        self.values = np.zeros((len(samples), len(others)))
        self.own = np.zeros(len(samples)) if own else None
        self.visits = np.zeros(len(samples), np.int64)
        self._parts = [
            self._of_factors(group) if group.strategy == "factored" else self._of_samples(group)
            for group in gradients.groups(way)
        ]

    def add(self, replayed: Replayed, rate: float) -> None:
        """Add what a step did: `rate * w_i / B * <g_i, g_j>` for every i of its batch."""
        rows = self._rows(replayed.ids)
        asked = np.flatnonzero(rows >= 0).astype(np.int32)
        np.add.at(self.visits, rows[asked], 1)
        factors = rate * replayed.weights.astype(np.float64) / self._size
        if not len(asked):
            return
        inputs = self._gradients.inputs(replayed)
        # What all samples share (state, key of the run, step) comes before what each has.
        shared, mine = inputs[: -len(self._others)], inputs[-len(self._others) :]
        before, self._waiting = self._waiting, []
        for part in self._parts:
            for into, found, positions in part(shared, mine, asked):
                self._waiting.append((into, found, rows[positions], factors[positions]))
        _settle(before)

    def finish(self) -> None:
        """Wait for what is still being computed."""
        waiting, self._waiting = self._waiting, []
        _settle(waiting)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Return where in the scores the samples of a batch are, -1 for nowhere."""
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._order[places], -1)

    def _of_factors(self, group: Group) -> Callable[..., Any]:
        """Return what yields where to add products, the products, and the positions they are of."""
        own, total = self.own is not None, self.values.shape[1]
        multiply = _multiplier(group.produce, _forms(group), total, own)
        batches = np.int32(len(self._others[0]) - 1)

        def parts(shared, mine, asked):
            products, squares = multiply(shared, mine, self._others, batches)
            yield self.values, products, slice(None)
            if own:
                yield self.own, squares, slice(None)

        return parts

    def _of_samples(self, group: Group) -> Callable[..., Any]:
        """Return the same of gradients that are materialised, as far as memory allows at once.

        Half of it is for those of the others, half for those of the batch. Where these do not fit,
        they are computed again for every few of the others.
        """
        forms, at_once = _forms(group), max(1, self._memory // 2 // max(group.sample_bytes, 1))

        def produced(positions, *inputs):
            pieces = chunks(len(positions), group.at_once)
            found = [group.produce(positions[a:b], *inputs) for a, b in pieces]
            return found[0] if len(found) == 1 else _joined(found)

        def parts(shared, mine, asked):
            pieces = [asked[a:b] for a, b in chunks(len(asked), at_once)]
            held = produced(asked, *shared, *mine) if len(pieces) == 1 else None
            total = self.values.shape[1]
            for number, first in enumerate(range(0, total, self._size)):
                other = [leaf[number] for leaf in self._others]
                for a, b in chunks(min(self._size, total - first), min(at_once, self._size)):
                    theirs = produced(np.arange(a, b, dtype=np.int32), *shared, *other)
                    into = self.values[:, first + a : first + b]
                    for piece in pieces:
                        ours = produced(piece, *shared, *mine) if held is None else held
                        yield into, _products(forms, ours, theirs), piece
            for piece in pieces if self.own is not None else ():
                ours = produced(piece, *shared, *mine) if held is None else held
                yield self.own, _squares(forms, ours), piece

        return parts


def _forms(group: Group) -> tuple[Form, ...]:
    return tuple(tensor.form for tensor in group.tensors.values())


# Kept, so that what was compiled once serves the next question about the same run.
@functools.lru_cache(maxsize=16)
def _multiplier(
    produce: Callable[..., Any], forms: tuple[Form, ...], others: int, own: bool
) -> Callable[..., tuple[Any, Any]]:
    """Return what takes the inputs of a step, others by batches and how many, to all products.

    One executable, because as several it took 1.4 times as long: the factors of a batch then go
    through memory, and a cotangent that a kernel and a bias share is multiplied twice. How many
    batches there are is an argument, and one more is passed: of a loop that XLA knows to pass once
    it makes none, and what it fuses instead rounds otherwise on some processors.
    """

    def multiply(shared, mine, batches, count):
        ours = produce(*shared, *mine)

        def products(number):
            other = [leaf[number] for leaf in batches]
            return _products(forms, ours, produce(*shared, *other))

        form = jax.eval_shape(products, 0)
        blank = jnp.zeros((len(batches[0]), *form.shape), form.dtype)
        found = lax.fori_loop(0, count, lambda i, x: x.at[i].set(products(i)), blank)
        found = jnp.moveaxis(found, 1, 0)  # [batch, batches, batch]
        found = found.reshape(len(found), -1)[:, :others]
        return found, _squares(forms, ours) if own else None

    return jax.jit(multiply)


@functools.partial(jax.jit, static_argnums=0)
def _products(forms: tuple[Form, ...], mine: Sequence[Any], theirs: Sequence[Any]) -> Any:
    """Return the inner products over all tensors, `[samples, others]`."""
    pairs = zip(forms, mine, theirs, strict=True)
    found = [gradients_of(f, a).gram(gradients_of(f, b)) for f, a, b in pairs]
    return functools.reduce(_sum, found)


@functools.partial(jax.jit, static_argnums=0)
def _squares(forms: tuple[Form, ...], mine: Sequence[Any]) -> Any:
    """Return the squared norms over all tensors, `[samples]`."""
    found = [gradients_of(f, a).square_norms() for f, a in zip(forms, mine, strict=True)]
    return functools.reduce(_sum, found)


def _sum(a: Any, b: Any) -> Any:
    """Add in the wider of two types, as tensors of several may have been mixed."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype) + b.astype(dtype)


@jax.jit
def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _settle(waiting: Sequence[tuple]) -> None:
    """Add products that were being computed; a sample that occurs twice is added twice."""
    for into, found, rows, factors in waiting:
        found = np.asarray(found, np.float64) * factors.reshape(-1, *[1] * (into.ndim - 1))
        if (rows < 0).any():
            rows, found = rows[rows >= 0], found[rows >= 0]
        if _distinct(rows):  # the usual case, and four times as fast
            into[rows] += found
        else:
            np.add.at(into, rows, found)


def _distinct(rows: np.ndarray) -> bool:
    rows = np.sort(rows)
    return not (rows[1:] == rows[:-1]).any()


def rates(learning_rate: LearningRate, steps: Sequence[int], total: int) -> dict[int, float]:
    """Return the learning rate of each of some steps.

    Args:
        learning_rate: a number; `float[total]`, one for each step of the run; or a function of the
            step, such as a schedule of optax.
        steps: those that are asked about.
        total: how many steps the run has.

    Raises:
        QueryError: it has another shape, or gives no finite number.

    >>> rates(lambda step: 0.5 / (1 + step), [0, 1, 4], 10)
    {0: 0.5, 1: 0.25, 4: 0.10000000149011612}
    """
    if callable(learning_rate):
        found = _scheduled(learning_rate, steps)
    else:
        try:
            given = np.asarray(learning_rate, np.float64)
        except (TypeError, ValueError) as error:
            raise QueryError(
                f"the learning rate is {learning_rate!r:.60}",
                why="every product is multiplied by it",
                fix=f"a number, float[{total}], or a function of the step such as an optax "
                "schedule",
            ) from error
        if given.shape not in ((), (total,)):
            raise QueryError(
                f"the learning rate has shape {list(given.shape)}",
                why=f"entry t is that of step t, and the run has {total} steps",
                fix=f"a number, float[{total}], or a function of the step such as an optax "
                "schedule",
            )
        beyond = [step for step in steps if given.ndim and step >= total]
        if beyond:
            raise QueryError(
                f"the learning rate of step {beyond[0]} is not given",
                why=f"state {beyond[0]} is the last, and the array ends with step {total - 1}",
                fix="a number or a function of the step",
            )
        found = [float(given[step] if given.ndim else given) for step in steps]
    wrong = [step for step, rate in zip(steps, found, strict=True) if not np.isfinite(rate)]
    if wrong:
        raise QueryError(
            f"the learning rate of step {wrong[0]} is {found[list(steps).index(wrong[0])]}",
            why="every product is multiplied by it",
            fix="pass the rate that the run was trained with",
        )
    return dict(zip(steps, found, strict=True))


def _scheduled(schedule: Callable[[Any], Any], steps: Sequence[int]) -> list[float]:
    """Call a schedule for every step: compiled where JAX can follow it, which is 100 times faster.

    The step is a Python integer, as nothing says of what type a schedule wants its count.
    """
    compiled = jax.jit(schedule)
    try:
        compiled(0)
    except TypeError:  # it branches on the step, or hands it to numpy
        compiled = schedule
    found = [np.asarray(compiled(int(step)), np.float64) for step in steps]
    if any(rate.shape for rate in found):
        raise QueryError(
            f"the learning rate of a step has shape {list(found[0].shape)}",
            why="a schedule gives one number for each step",
            fix="optax.cosine_decay_schedule(...), or lambda step: 0.1 / (1 + step)",
        )
    return [float(rate) for rate in found]


def states_of(checkpoints: Sequence[int], last: int) -> list[int]:
    """Return states in rising order, negative numbers counted from the end.

    Raises:
        QueryError: there are no such states, or some are given twice.
    """
    given = whole_numbers(checkpoints)
    plain = [] if given is None else given.tolist()
    found = sorted({x + last + 1 if x < 0 else x for x in plain})
    if len(found) < len(plain) or not found or found[0] < 0 or found[-1] > last:
        raise QueryError(
            f"checkpoints={checkpoints!r:.60} of a run with states 0 to {last}",
            why="each is a state that all samples are looked at in, once",
            fix="checkpoints=run.checkpoints, or some of the states",
        )
    return found


def rows_of(samples: Any, known: np.ndarray) -> np.ndarray:
    """Return the samples to give scores for: all that are known, or the chosen ones, checked.

    Raises:
        QueryError: what was chosen are no ids of such samples, or some are chosen twice.
    """
    if samples is None:
        return known
    chosen = whole_numbers(samples)
    unknown = [] if chosen is None else chosen[~np.isin(chosen, known)].tolist()
    if chosen is None or not len(chosen) or unknown or len(np.unique(chosen)) < len(chosen):
        what = f"{unknown[:6]} among them" if unknown else f"{samples!r:.60}"
        raise QueryError(
            f"scores are asked for samples, {what}",
            why="each sample that is visited can have one row of scores, and no other sample can",
            fix="samples=[3, 17, 20], or leave it out for all",
        )
    return chosen


def tracin(
    log: Log,
    replayer: Replayer,
    gradients: SampleGradients,
    data: Data | None,
    others: Data,
    *,
    learning_rate: LearningRate,
    steps: range,
    states: Sequence[int] | None,
    samples: Any,
    own: bool,
    way: str,
    memory: int,
    exact: bool,
    progress: bool | None,
) -> Result:
    """Replay steps, or visit states, and sum products of gradients.

    Args:
        log: of the run.
        replayer: of the run.
        gradients: of the run.
        data: the samples of the run, for states.
        others: the other samples, of the form of the run's.
        learning_rate: as for `rates`.
        steps: of the run, in a row.
        states: instead of steps, in rising order.
        samples: ids of those to score; None for all that are visited.
        own: whether to give `self_influence` too.
        way: `factored`, where a tensor has factors, or `scan`.
        memory: bytes that the scores, and that materialised gradients may take.
        exact: raise where the trajectory departs from the log.
        progress: whether to show a progress bar.

    Returns:
        `value` (sample, test), float64, `visits` (sample), and `self_influence` (sample).
    """
    if way not in ("factored", "scan"):
        raise QueryError(
            f"there is no strategy {way!r} for gradients of recorded steps",
            why="they come from archived programs: the factors, and the gradient of one sample",
            fix="factored, or scan",
        )
    begun, size = time.perf_counter(), log.header.signature.batch_size
    rate = rates(learning_rate, steps if states is None else states, log.durable.steps)
    if states is None:
        known = np.unique(log.ids(steps.start, steps.stop))
    elif data is not None:
        known = np.arange(len(data))
    else:
        raise QueryError(
            f"{log.place} has no data that could be looked at again",
            why="at a state all samples are looked at, whichever step visits them",
            fix="score steps, without checkpoints",
        )
    chosen = rows_of(samples, known[known >= 0])
    _check_memory(len(chosen), len(others), memory)
    scores = Scores(gradients, chosen, others, size, way=way, memory=memory, own=own)
    if states is None:
        with progress_bar("multiplying gradients", len(steps), progress) as report:
            grade = _visit_steps(replayer, steps, rate, scores, exact, report)
        of = {"rule": RULE, "steps": len(steps), "first_step": steps.start}
    else:
        assert data is not None
        batches = len(states) * -(-len(chosen) // size)
        with progress_bar("multiplying gradients", batches, progress) as report:
            for state in states:
                before = [jnp.asarray(leaf) for leaf in replayer.state(state, exact=exact)]
                for a, b in chunks(len(chosen), size):
                    replayed = elsewhere(data, chosen[a:b], size, state, before)
                    scores.add(replayed, rate[state])
                    report(1)
        # Stored ones were compared with their digests; of others only the losses on the way there.
        grade = Grade.BITWISE if {*states} <= {*log.durable.checkpoints} else Grade.UNAUDITED
        of = {"rule": RULE_AT_STATES, "steps": 0, "states": [*states]}
    scores.finish()
    variables: dict[str, Any] = {
        "value": (("sample", "test"), scores.values),
        "visits": (("sample",), scores.visits),
    }
    if scores.own is not None:
        variables["self_influence"] = (("sample",), scores.own)
    coordinates = {"sample": chosen, "test": np.arange(len(others))}
    low, high = min(rate.values()), max(rate.values())
    attributes = {
        **of,
        "grade": str(grade),
        "learning_rate": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "strategies": ", ".join(sorted(set(gradients.strategies(way).values()))),
        "seconds": time.perf_counter() - begun,
    }
    return Result.of(variables, coordinates, attributes)


def _visit_steps(
    replayer: Replayer,
    steps: range,
    rate: Mapping[int, float],
    scores: Scores,
    exact: bool,
    report: Callable[[int], None],
) -> Grade:
    deviation, closed = 0.0, -1
    for replayed in replayer.steps(steps.start, steps.stop, exact=exact, late=True):
        step = replayed.executed.start
        scores.add(replayed, rate[step])
        deviation, closed = replayed.deviation, replayed.closed
        report(1)
    if deviation:
        return Grade.NUMERIC
    return Grade.BITWISE if closed == steps.stop else Grade.UNAUDITED


def _check_memory(samples: int, others: int, memory: int) -> None:
    if (size := 8 * samples * others) > memory:
        raise QueryError(
            f"scores of {samples:,} samples for {others:,} others take {size:,} bytes",
            why=f"the limit is {memory:,}",
            fix=f"memory={size}, or fewer of them: samples=..., or a part of the source",
        )
