"""What a counterfactual changes: the order, the weights of samples, the optimizer, the key.

An edit is data until it meets a run. `Run.fork` takes the fields of one; `Run.counterfactuals`
takes many.
"""

import dataclasses
import itertools
import operator
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key

from replay.errors import DataError, OrderError
from replay.order import Order

# All orders of so many batches are 5,040; one more would be 40 thousand.
_MOST_BATCHES = 7


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One counterfactual: what is other from step `at` on. What is None stays as it was.

    Attributes:
        order: an order that agrees with the run's up to `at`; or a function that is given the
            run's order, of which its edits change nothing before `at`
            (`lambda order: order.reversed(9)`), and returns such an order.
        sample_weights: `{sample: factor}` of the loss, the others as they were; or factors of all
            samples, `float[samples]`.
        optimizer: an optax optimizer whose state has the form of the run's (of any form with
            `at=0`); or new values of injected hyperparameters, `{"learning_rate": 1e-3}`.
        key: another key of the run: other dropout and augmentation, in the same order.
        params: other initial weights, shaped like the run's; with `at=0` only.
        name: shown in tables; made from the rest where it is empty.
    """

    order: Order | Callable[[Order], Order] | None = None
    sample_weights: Mapping[int, float] | Float[Array, " samples"] | None = None
    optimizer: Any = None
    key: Key[Array, ""] | None = None
    params: Any = None
    name: str = ""

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise OrderError(
                f"the name of an edit is {self.name!r}",
                why="it is kept in the record of a fork, and shown",
                fix="name='without 17'",
            )

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the fields that change something."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "name")
        return tuple(name for name in fields if getattr(self, name) is not None)

    def order_after(self, order: Order, at: int) -> Order:
        """Return the edited order, bound; steps before `at` are those of `order`.

        Args:
            order: of the run, bound.
            at: the first step that may be another.

        Raises:
            OrderError: it has other steps before `at`, ends before it, or has batches of another
                size.
        """
        made: Any = order if self.order is None else self.order
        if callable(self.order):
            made = self.order(order.since(at))
        if not isinstance(made, Order):
            raise OrderError(
                f"the edit of the order returned a {type(made).__name__}",
                why="it says which samples make each batch from the step of the fork on",
                fix="order=lambda order: order.reversed(9)",
            )
        assert order.samples is not None, "the order of a run is bound"
        made = made.bind(order.samples)
        if made.batch_size != order.batch_size:
            raise OrderError(
                f"the new order has batches of {made.batch_size}, the run of {order.batch_size}",
                why="the run's own programs are compiled for one size of batch",
                fix="record another run for another batch size",
            )
        if len(made) <= at:
            raise OrderError(
                f"the order has {len(made)} steps, the fork begins at step {at}",
                why="no step would be left to take",
                fix=f"at= a number below {len(made)}"
                + (", or drop fewer samples" if len(made) < len(order) else ""),
            )
        proven = made is order or _begins_like(made, order, at)
        # Whole epochs are made once, and memory stays bounded.
        for start in range(0, 0 if proven else at, 1024):
            stop = min(start + 1024, at)
            both = [made.batches(start, stop), order.batches(start, stop)]
            differ = np.logical_or(*(a != b for a, b in zip(*both, strict=True))).any(axis=1)
            if differ.any():
                step = start + int(np.argmax(differ))
                raise OrderError(
                    f"the new order differs at step {step}, before step {at} where the fork begins",
                    why="a fork shares everything before that step with its parent",
                    fix=f"at={step}, or edit only what comes later: "
                    f"order=lambda order: ..., which is given order.since({at})",
                )
        return made

    def factors(self, before: np.ndarray) -> np.ndarray:
        """Return the factors of the losses, `float32[samples]`, from those before the edit.

        Raises:
            DataError: a sample does not exist, or a factor is not a finite number.
        """
        if self.sample_weights is None:
            return before
        count = len(before)
        if not isinstance(self.sample_weights, Mapping):
            after = _as_factors(self.sample_weights)
            if after.shape != (count,) or not np.isfinite(after).all():
                raise DataError(
                    f"sample_weights has shape {list(after.shape)}"
                    + ("" if np.isfinite(after).all() else " and values that are not finite"),
                    why=f"there is one factor for each of the {count} samples",
                    fix="sample_weights={17: 0.0} changes a few, float[samples] all",
                )
            return after
        ids = list(self.sample_weights)
        wrong = [i for i in ids if not _is_sample(i, count)]
        if wrong:
            raise DataError(
                f"sample_weights: there is no sample {', '.join(map(repr, wrong[:6]))}",
                why=f"the data has {count} samples, 0 to {count - 1}",
                fix="{sample: factor} with samples as the order counts them",
            )
        values = _as_factors(list(self.sample_weights.values()))
        if values.shape != (len(ids),) or not np.isfinite(values).all():
            raise DataError(
                "sample_weights has factors that are not finite numbers: "
                f"{reprlib.repr(list(self.sample_weights.values()))}",
                why="the training loss is the sum of the weighted losses",
                fix="0.0 leaves a sample out, 1.0 is as it was",
            )
        after = before.copy()
        after[np.array(ids, np.int64)] = values
        return after

    def described(self, before: Order, after: Order) -> str:
        """Return the edit in words, knowing the orders before and after it."""
        base, text = (repr(order).partition("  #")[0] for order in (before, after))
        if text.startswith(base):
            text = re.sub(r"^\.(since\(\d+\)\.?)?", "", text[len(base) :]).replace(").", "), ")
        return self._text(text)

    def __str__(self) -> str:
        return self._text("an order" if callable(self.order) else str(self.order))

    def _text(self, order: str) -> str:
        if self.name:
            return self.name
        parts = [order] if self.order is not None else []
        if isinstance(self.sample_weights, Mapping):
            few = [f"{i}: {w:g}" for i, w in itertools.islice(self.sample_weights.items(), 4)]
            more = ", …" * (len(self.sample_weights) > 4)
            parts.append(f"weights {{{', '.join(few)}{more}}}")
        elif self.sample_weights is not None:
            parts.append("weights of all samples")
        if isinstance(self.optimizer, Mapping):
            parts.append(", ".join(f"{k} {v:g}" for k, v in self.optimizer.items()))
        elif self.optimizer is not None:
            parts.append("optimizer")
        parts += ["key"] * (self.key is not None) + ["params"] * (self.params is not None)
        return "; ".join(parts) or "no edit"


def _begins_like(made: Order, order: Order, at: int) -> bool:
    """Tell whether an order is another one with edits that say themselves that they begin later."""
    edits = made.ops[len(order.ops) :]
    since = [op[1] for op in edits if op[0] == "since"]
    shared = made.ops[: len(order.ops)] == order.ops
    return shared and edits[:1] == (("since", at),) and min(since) >= at


def _is_sample(value: Any, count: int) -> bool:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return bool(integer and 0 <= value < count)


def _as_factors(values: Any) -> np.ndarray:
    """Return float32 that is not finite where a value is no number, or too large for a float32."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(np.float32)
    except (TypeError, ValueError):  # text, or rows of unequal length
        return np.array(np.nan, np.float32)


def leave_out(samples: Iterable[int], *, name: str = "") -> Edit:
    """Return the edit that gives samples the weight 0: batches and shapes stay as they are.

    >>> leave_out([3, 17]).sample_weights
    {3: 0.0, 17: 0.0}
    """
    return Edit(sample_weights={operator.index(i): 0.0 for i in samples}, name=name)


def leave_one_out(samples: Iterable[int]) -> list[Edit]:
    """Return an edit for each sample, which leaves it out.

    >>> [str(edit) for edit in leave_one_out(range(2))]
    ['without 0', 'without 1']
    """
    return [leave_out([i], name=f"without {int(i)}") for i in samples]


def leave_some_out(samples: Sequence[int], k: int, *, count: int, seed: int) -> list[Edit]:
    """Return edits that each leave `k` of the samples out, drawn without replacement.

    Args:
        samples: from which; one that is named twice is no likelier.
        k: how many at once.
        count: how many such subsets.
        seed: of the draws, `Generator(Philox(key=[seed, number of the subset]))`.

    Raises:
        OrderError: there are fewer than `k` samples.
    """
    pool = np.unique(samples)
    if not 0 < k <= len(pool):
        raise OrderError(
            f"{k} of {len(pool)} samples are to be left out",
            why="a subset has at least one of them and at most all",
            fix=f"k from 1 to {len(pool)}",
        )
    found = []
    for number in range(count):
        draw = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        left = np.sort(draw.choice(pool, k, replace=False))
        found.append(leave_out(left.tolist(), name=f"without subset {number}"))
    return found


def all_orders(steps: Sequence[int]) -> list[Edit]:
    """Return an edit for each order of the batches of a handful of steps, their own one first.

    Raises:
        OrderError: they are more than seven, or repeat.

    >>> [str(edit) for edit in all_orders([5, 6])]
    ['steps 5, 6', 'steps 6, 5']
    """
    steps = [operator.index(step) for step in steps]
    if not 0 < len(steps) <= _MOST_BATCHES or len(set(steps)) < len(steps):
        raise OrderError(
            f"{len(steps)} steps are to be taken in all orders",
            why=f"{_MOST_BATCHES} different batches have 5,040 orders; each more multiplies them",
            fix="a handful of different steps, such as range(100, 105)",
        )

    def rearranged(taken: Sequence[int]) -> Callable[[Order], Order]:
        def edit(order: Order) -> Order:
            for place, step in _swaps(steps, taken):
                order = order.swap(place, step)
            return order

        return edit

    return [
        Edit(order=rearranged(taken), name=f"steps {', '.join(map(str, taken))}")
        for taken in itertools.permutations(steps)
    ]


def _swaps(steps: Sequence[int], taken: Sequence[int]) -> list[tuple[int, int]]:
    """Return the exchanges after which step `steps[i]` has the batch that `taken[i]` had."""
    present, found = list(steps), []
    for i, wanted in enumerate(taken):
        j = present.index(wanted)
        if i != j:
            found.append((steps[i], steps[j]))
            present[i], present[j] = present[j], present[i]
    return found
