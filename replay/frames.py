"""The quantities of one replayed step, computed when they are asked for, each by its own program.

Nothing here feeds the trajectory. What the run itself computed (weights, gradients, losses) is
handed on as it is; everything else comes from the run's archived programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from replay import artifact
from replay.data import Data, check_precision
from replay.errors import DataError, LogError, QueryError
from replay.grads.gradients import Gradients
from replay.grads.sources import gradients_of
from replay.log import Log
from replay.query.nodes import Part, Scan
from replay.replaying import Replayed
from replay.sample_gradients import SampleGradients, weighted
from replay.trajectory import Executed

# A sample's share of an update counts in rankings only where samples do not cancel more than this.
CONDITION_LIMIT = 1e3

# So many chosen weights of one tensor are had as dot products with their directions, not by
# multiplying out the gradients of the whole tensor.
FEW_WEIGHTS = 8


class Observers:
    """The archived programs of a run that look at a state, compiled when first used.

    Args:
        log: the run.
        gradients: returns its per-sample gradients, which not every run can have.
        others: data sources by name, for `run.on(source)`.
        allow: custom calls that its programs may make besides the usual ones.
        way: how per-sample gradients are had, `factored` where a tensor has factors, or `scan`.
    """

    def __init__(
        self,
        log: Log,
        gradients: Callable[[], SampleGradients],
        others: Mapping[str, Data],
        *,
        allow: Sequence[str],
        way: str,
    ):
        self.log, self._gradients, self.others, self.way = log, gradients, others, way
        self.signature, self._allow = log.header.signature, allow
        state = self.signature.state
        check_precision((*state, *self.signature.batch), str(log.place))
        self.number = {leaf.path: i for i, leaf in enumerate(state)}
        self.weights = {state[i].path.partition("/")[2]: i for i in self.signature.weights}
        self.tensor = {path: n for n, path in enumerate(self.weights)}

    @property
    def gradients(self) -> SampleGradients:
        """Its per-sample gradients.

        Raises:
            ProgramError: the run was recorded without the program for them.
        """
        return self._gradients()

    def leaf(self, scan: Scan, part: Part) -> int:
        """Return the number of the leaf of the state that a tensor of a quantity is."""
        if scan.quantity == "opt_state":
            return self.number[f"opt_state/{part.path}"]
        return self.weights[part.path]

    def key(self, step: int) -> np.ndarray:
        """Return the key data of the run, or of the ancestor of a fork, that a step folds."""
        return np.asarray(self.log.origin(step).header.key, np.uint32)

    def update(self, step: int) -> Any:
        """Return the archived update of a step, which may be that of an ancestor of a fork."""
        return self._program("update", self.log.origin(step))

    def program(self, name: str) -> Any:
        """Return an archived program, jitted.

        Raises:
            QueryError: the run was recorded without it.
        """
        return self._program(name, self.log)

    @functools.cache  # noqa: B019  # lives as long as the run
    def _program(self, name: str, log: Log) -> Any:
        programs = log.header.programs
        if name not in programs:
            what = {"losses": "sample losses", "activations": "activations"}.get(name, name)
            raise QueryError(
                f"{self.log.place} holds no program for {what}",
                why=f"it was recorded without {name!r}, which the loss did not have",
                fix="record it with a program that has it",
            )
        results = None
        if name == "activations":
            try:
                results = tuple(
                    jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
                    for leaf in programs[name]["table"]
                )
            except TypeError as error:
                raise LogError(
                    f"{self.log.place}: the table of activations is wrong: {error}",
                    why="it says what the archived program returns",
                    fix="restore run.msgpack from a copy of the run",
                ) from error
        return artifact.jitted(name, log.program(name), self.signature, tuple(self._allow), results)

    def activations(self) -> list[str]:
        """Return the names of the intermediates that were tagged."""
        entry = self.log.header.programs.get("activations")
        return [leaf["name"] for leaf in entry["table"]] if entry else []


class Few(dict[tuple[int, Part], Any]):
    """Chosen weights of a state: (number of the leaf, which of it) -> `[weights]`."""


def few(
    observers: Observers, scans: Iterable[Scan], *, overlaps: bool
) -> tuple[Callable[[Sequence[Any]], Few | None] | None, Callable[..., list[Any]] | None]:
    """Return what takes from a state all that quantities are made of, so that no step keeps it.

    None where they need whole tensors of it. Besides, what computes the factors of a step before it
    takes the memory of its state, where they are asked for and the replay does not overlap with it.
    """
    scans = list(scans)
    had, asked = None, any(scan.quantity == "sample_grads" and not scan.source for scan in scans)
    if asked and not overlaps:
        had = observers.gradients.beforehand(observers.way)
    take = _taker(
        observers, scans, _OF_NO_STATE if had is None else (*_OF_NO_STATE, "sample_grads")
    )
    return take, None if take is None else had


def _taker(
    observers: Observers, scans: Iterable[Scan], of_no_state: Sequence[str]
) -> Callable[[Sequence[Any]], Few | None] | None:
    wanted: set[tuple[int, Part]] = set()
    for scan in scans:
        if scan.source:
            return None
        if scan.quantity in of_no_state:
            continue
        whole = any(not isinstance(part.indices, tuple) for part in scan.tensors)
        if whole or scan.quantity not in ("weights", "updates", "opt_state"):
            return None
        wanted |= {(observers.leaf(scan, part), part) for part in scan.tensors}
    if not wanted:
        return lambda leaves: None
    keys = list(wanted)
    taken = _picker(tuple(part.indices or () for _, part in keys))

    def take(leaves: Sequence[Any]) -> Few:
        return Few(zip(keys, taken([leaves[number] for number, _ in keys]), strict=True))

    return take


# Quantities of a step that look at no weight.
_OF_NO_STATE = ("grads", "samples", "sample_losses", "column")


class Frame:
    """A step as observers see it, or, without inputs, only a state.

    Args:
        observers: of its run.
        step: its number; that of the state where there is no step.
        before: leaves of the state, or what is to be looked at of them.
        replayed: the step; None for a state alone.
    """

    def __init__(
        self,
        observers: Observers,
        step: int,
        before: Any,
        replayed: Replayed | None,
    ):
        self.observers, self.step, self.before, self.replayed = observers, step, before, replayed
        self._known: dict[Any, Any] = {}

    def close(self) -> None:
        """Let go of what was computed of the step, before the next one is."""
        self._known.clear()
        self.replayed = None

    @property
    def ids(self) -> np.ndarray:
        """The samples, -1 for padding."""
        assert self.replayed is not None
        return self.replayed.ids

    @property
    def valid(self) -> np.ndarray:
        """Where in the batch there is a sample."""
        return self.ids >= 0

    def get(self, scan: Scan, part: Part | None, offset: int = 0) -> Any:
        """Return a quantity: `[batch]`, `[weights]` or `[batch, weights]`.

        Weights have the axes of their tensor, or one where some of them are chosen.
        """
        key = (scan.quantity, scan.name, scan.source, part, offset)
        if key not in self._known:
            if scan.source:
                self._known[key] = self._elsewhere(scan, part)
            else:
                value = getattr(self, f"_{scan.quantity}")
                self._known[key] = value(scan, part, offset)
        return self._known[key]

    # ---- of the run itself

    def _weights(self, scan, part, offset):
        leaves = self.before
        if offset:
            assert self.replayed is not None
            leaves = self.replayed.executed.after
        number = self.observers.leaf(scan, part)
        if isinstance(leaves, Few):
            return leaves[number, part]
        return _choose(leaves[number], part.indices)

    _opt_state = _weights

    def _grads(self, scan, part, offset):
        assert self.replayed is not None
        grads = self.replayed.executed.grads
        return _choose(grads[self.observers.tensor[part.path]], part.indices)

    def _updates(self, scan, part, offset):
        return _difference(*(self._weights(scan, part, k) for k in (1, 0)))

    def _samples(self, scan, part, offset):
        return jnp.asarray(self.ids)

    def _sample_losses(self, scan, part, offset):
        assert self.replayed is not None
        losses = self.replayed.executed.losses
        if not isinstance(losses, jax.Array):  # a row of a block
            losses = np.asarray(losses).reshape(-1)
        return jnp.asarray(losses)

    # ---- by other programs

    def _inputs(self) -> tuple[Any, ...]:
        assert self.replayed is not None
        r, key = self.replayed, self.observers.key(self.step)
        return (*self.before, key, np.uint32(self.step), r.ids, r.weights, *r.batch)

    def _activations(self, scan, part, offset):
        if "activations" not in self._known:
            self._known["activations"] = self.observers.program("activations")(*self._inputs())
        value = self._known["activations"][self.observers.activations().index(scan.name)]
        return value.reshape(len(value), -1)

    def _deltas(self) -> tuple[list[Any], list[Any]]:
        """Return what the optimizer does with the batch gradient, and with none, by tensor."""
        if "deltas" not in self._known:
            observers, signature = self.observers, self.observers.signature
            assert self.replayed is not None
            executed = self.replayed.executed
            results = observers.program("gradient")(*self._inputs())
            carry = results[len(results) - len(signature.carry) :]
            update = observers.update(self.step)
            grads = [jnp.asarray(x) for x in executed.grads]
            blank = [jnp.zeros_like(x) for x in grads]
            losses = jnp.asarray(executed.losses)
            deltas = []
            for given in (grads, blank):
                after = update(*self.before, *carry, *given, losses)
                deltas.append([_difference(after[i], self.before[i]) for i in signature.weights])
            self._known["deltas"] = tuple(deltas)
        return self._known["deltas"]

    def _carried_updates(self, scan, part, offset):
        return _choose(self._deltas()[1][self.observers.tensor[part.path]], part.indices)

    def share(self, number: int) -> Any:
        """Return (Δ(g) - Δ(0)) / g of a tensor, 0 where g is 0, in its shape."""
        key = ("share", number)
        if key not in self._known:
            moved, carried = self._deltas()
            assert self.replayed is not None
            grad = jnp.asarray(self.replayed.executed.grads[number])
            self._known[key] = _share(moved[number], carried[number], grad)
        return self._known[key]

    def _residual_updates(self, scan, part, offset):
        number = self.observers.tensor[part.path]
        assert self.replayed is not None
        grad = jnp.asarray(self.replayed.executed.grads[number])
        whole = Part(part.path, part.shape)
        updates = self.get(dataclasses.replace(scan, quantity="updates"), whole)
        carried = self._deltas()[1][number]
        return _choose(_residual(updates, carried, self.share(number), grad), part.indices)

    def _condition(self, scan, part, offset):
        number = self.observers.tensor[part.path]
        return _choose(self.condition(number), part.indices)

    def condition(self, number: int) -> Any:
        """Return the sum of the samples' |share| of an update over |Δ(g) - Δ(0)|, by weight."""
        key = ("condition", number)
        if key not in self._known:
            assert self.replayed is not None
            total = 0.0
            for gradients, occurrences in self.parts(number):
                rows = np.asarray(occurrences) % self.observers.signature.batch_size
                weights = jnp.asarray(self.replayed.weights[rows])
                total = total + weighted(gradients.form, "magnitude", gradients.payload, weights)
            grad = jnp.asarray(self.replayed.executed.grads[number])
            size = self.observers.signature.batch_size
            self._known[key] = _condition(total, grad, self.share(number), size)
        return self._known[key]

    # ---- per-sample gradients

    def all_parts(self) -> list[tuple]:
        """Return `(group, payloads, occurrences)` of all tensors."""
        if "parts" not in self._known:
            assert self.replayed is not None
            gradients = self.observers.gradients
            self._known["parts"] = list(gradients.parts(self.replayed, self.observers.way))
        return self._known["parts"]

    def parts(self, number: int) -> Iterator[tuple["_Carried", Any]]:
        """Yield the per-sample gradients of one tensor, some samples after the others."""
        for group, payloads, occurrences in self.all_parts():
            if number in group.tensors:
                place = list(group.tensors).index(number)
                yield _Carried(group.tensors[number].form, payloads[place]), occurrences

    def _sample_grads(self, scan, part, offset):
        number, size = self.observers.tensor[part.path], self.observers.signature.batch_size
        rows, found = [], []
        for carried, occurrences in self.parts(number):
            rows.append(np.asarray(occurrences) % size)
            if part.indices is not None and len(part.indices) <= FEW_WEIGHTS:
                found.append(_some(carried.form, carried.payload, part.shape, part.indices))
            else:
                found.append(
                    _choose_rows(_materialised(carried.form, carried.payload), part.indices)
                )
        whole = found[0] if len(found) == 1 else jnp.concatenate(found)
        rows = np.concatenate(rows)
        if len(rows) == size:
            return whole
        return jnp.zeros((size, *whole.shape[1:]), whole.dtype).at[rows].set(whole)

    def _sample_updates(self, scan, part, offset):
        number, size = self.observers.tensor[part.path], self.observers.signature.batch_size
        grads = self.get(dataclasses.replace(scan, quantity="sample_grads"), part)
        assert self.replayed is not None
        share = _choose(self.share(number), part.indices)
        return _attributed(grads, share, jnp.asarray(self.replayed.weights), size)

    # ---- of other samples

    def _elsewhere(self, scan, part):
        observers, size = self.observers, self.observers.signature.batch_size
        data = observers.others[scan.source]
        found = []
        for first in range(0, len(data), size):
            ids = np.arange(first, min(first + size, len(data)), dtype=np.int32)
            key = ("frame", scan.source, first)
            if key not in self._known:
                self._known[key] = self._of(data, ids, size)
            frame = self._known[key]
            if scan.quantity == "sample_losses":
                losses = observers.program("losses")(*frame._inputs())
                found.append(losses[0][: len(ids)])
            else:
                value = frame.get(dataclasses.replace(scan, source=""), part)
                found.append(value[: len(ids)])
        return jnp.concatenate(found)

    def _of(self, data: Data, ids: np.ndarray, size: int) -> "Frame":
        replayed = elsewhere(data, ids, size, self.step, self.before)
        return Frame(self.observers, self.step, self.before, replayed)


def elsewhere(data: Data, ids: np.ndarray, size: int, step: int, before: Sequence[Any]) -> Replayed:
    """Return other samples at a state as if a step had been taken on them, padded to a batch.

    Args:
        data: the samples.
        ids: at most `size` of them.
        size: of a batch.
        step: whose key is folded.
        before: leaves of the state.
    """
    padded = np.full(size, -1, np.int32)
    padded[: len(ids)] = ids
    batch = data.leaves(np.maximum(padded, 0))
    executed = Executed(step, 1, None, (), None, list(before), None)
    weights = (padded >= 0).astype(np.float32)
    return Replayed(executed, padded, weights, batch, 0.0, -1, lambda: True)


def of_the_form(log: Log, source: Any) -> Data:
    """Return a source of other samples as data.

    Raises:
        DataError: its examples have another form than the run's.
    """
    data = Data.of(source)
    theirs, ours = data.spec, log.header.signature.batch
    if [(x.shape, x.dtype) for x in theirs] != [(x.shape, x.dtype) for x in ours]:
        raise DataError(
            f"examples of {', '.join(map(str, theirs))}",
            why=f"the run's loss takes {', '.join(map(str, ours))}",
            fix="pass examples of the same leaves, shapes and dtypes",
        )
    return data


@dataclasses.dataclass(frozen=True)
class _Carried:
    """The per-sample gradients of a tensor in whatever form they came."""

    form: Any
    payload: Any

    @property
    def gradients(self) -> Gradients:
        return gradients_of(self.form, self.payload)


def _choose(value, indices):
    if indices is not None:
        return _taken(value, indices)
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _choose_rows(value, indices):
    return value if indices is None else _taken_rows(value, indices)


@functools.partial(jax.jit, static_argnums=1)
def _taken(value, indices):
    return value.reshape(-1)[np.asarray(indices, np.int32)]


@functools.lru_cache(maxsize=256)
def _picker(indices: tuple[tuple[int, ...], ...]) -> Callable[[Sequence[Any]], list[Any]]:
    """Return what picks weights out of several leaves, by one executable."""
    chosen = [np.asarray(some, np.int32) for some in indices]
    return jax.jit(lambda leaves: [x.reshape(-1)[i] for x, i in zip(leaves, chosen, strict=True)])


@functools.partial(jax.jit, static_argnums=1)
def _taken_rows(value, indices):
    return value.reshape(len(value), -1)[:, np.asarray(indices, np.int32)]


@jax.jit
def _difference(after, before):
    return after - before


@jax.jit
def _share(moved, carried, grad):
    blank = grad == 0
    return jnp.where(blank, 0, (moved - carried) / jnp.where(blank, 1, grad))


@jax.jit
def _residual(updates, carried, share, grad):
    return updates - carried - share * grad


@functools.partial(jax.jit, static_argnums=3)
def _condition(total, grad, share, size):
    used = jnp.abs(grad)
    ratio = total / size / jnp.where(used == 0, 1, used)
    return jnp.where((used == 0) | (share == 0), 0, ratio)


@functools.partial(jax.jit, static_argnums=0)
def _materialised(form, payload):
    return gradients_of(form, payload).materialised()


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _some(form, payload, shape, indices):
    """Return the gradients of a few weights, `[samples, weights]`."""
    gradients = gradients_of(form, payload)
    blank = jnp.zeros(int(np.prod(shape)), form.wide)

    def one(index):
        return gradients.dots(blank.at[index].set(1).reshape(shape))

    return lax.map(one, jnp.asarray(indices, jnp.int32)).T


@functools.partial(jax.jit, static_argnums=3)
def _attributed(grads, share, weights, size):
    return share[None] * (weights / size).reshape(-1, *[1] * share.ndim) * grads
