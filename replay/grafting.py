"""Another optimizer on the archived gradient of a run, without the code that the run was made of.

The gradient of a run says nothing about its optimizer: it needs the weights, the inputs and, where
batches are coupled, the model state. So the update of another optimizer is composed with it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from replay.artifact import Signature, reexport, trajectory
from replay.errors import ProgramError
from replay.program import State
from replay.tree import Leaf, describe, lift, lower, nest, paths

HYPERPARAMETERS = "hyperparams"  # the field of the state of `optax.inject_hyperparams`


class Grafted(NamedTuple):
    """What another optimizer makes of a run.

    Attributes:
        signature: of its programs.
        exported: programs that are other than the run's.
        initial: raw leaves of state 0, from those of the run's state 0; None where the optimizer
            takes the run's state over.
        leaves: of the state that are set where it takes over: number -> bytes.
        tree: the structure of the state, where that of the run is known.
    """

    signature: Signature
    exported: dict[str, export.Exported]
    initial: list[np.ndarray] | None
    leaves: dict[int, bytes]
    tree: Any


def graft(
    signature: Signature,
    loaded: Mapping[str, export.Exported],
    optimizer: optax.GradientTransformation,
    *,
    tree: Any,
    state: list[np.ndarray] | None,
) -> Grafted:
    """Compose an optimizer with the gradient of a run.

    Args:
        signature: of the run.
        loaded: its archived `gradient` and, to begin anew, what observes its steps.
        optimizer: of optax.
        tree: the structure of the run's state; None where weights are nested dicts by path.
        state: state 0 of the run, to begin anew from its weights; None to take over the optimizer
            state of the run.

    Raises:
        ProgramError: it is no optimizer, evaluates the loss itself, or its state has another form
            than the run's; or the run's own update is not that of an optimizer alone.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ProgramError(
            f"the optimizer is {optimizer!r:.60}, without init and update",
            why="a step asks it for the update of the weights",
            fix="optimizer=optax.sgd(0.1), or {'learning_rate': 0.1} for what is injected by "
            "optax.inject_hyperparams",
        )
    optimizer = optax.with_extra_args_support(optimizer)
    weights = list(signature.weights)
    names = [signature.state[i].path.partition("/")[2] for i in weights]
    rest = [i for i, leaf in enumerate(signature.state) if _part(leaf) == "model_state"]
    _check_update(signature, rest)
    blank = None if tree is None else jax.tree.unflatten(tree, signature.state)
    params_tree = None if blank is None else jax.tree.structure(blank.params)

    def params_of(values: Any) -> Any:
        if params_tree is not None:
            return jax.tree.unflatten(params_tree, values)
        return nest(names, list(values))

    def in_order(params: Any) -> list[Any]:
        by_path = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
        return [by_path[name] for name in names]

    shapes = params_of([signature.state[i].struct for i in weights])
    form = jax.eval_shape(optimizer.init, shapes)
    own = describe(form)
    fresh = state is not None
    if fresh:
        optimizer_leaves = tuple(
            Leaf(f"opt_state/{leaf.path}" if leaf.path else "opt_state", *_rest(leaf))
            for leaf in own
        )
        parts = [[signature.state[i] for i in weights], optimizer_leaves]
        new_state = (*parts[0], *parts[1], *(signature.state[i] for i in rest))
        where = {leaf.path: i for i, leaf in enumerate(new_state)}
        grafted = Signature(
            new_state, signature.batch, signature.losses, signature.aux, signature.grads,
            signature.carry, signature.batch_size, signature.block,
        )  # fmt: skip
    else:
        _check_form(signature, own)
        where = {leaf.path: i for i, leaf in enumerate(signature.state)}
        grafted = signature
    places = [where[f"opt_state/{leaf.path}" if leaf.path else "opt_state"] for leaf in own]
    new_weights, new_rest = list(grafted.weights), [where[signature.state[i].path] for i in rest]
    count, gradient = len(grafted.state), loaded["gradient"]

    def as_recorded(raw: Any) -> list[Any]:
        """Return a state of the run's own form; of its optimizer there is nothing to tell."""
        if not fresh:
            return list(raw[:count])
        known = dict(zip([*weights, *rest], [raw[i] for i in (*new_weights, *new_rest)]))  # noqa: B905
        return [
            known[i] if i in known else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(signature.state)
        ]

    def take_gradient(*raw: Any) -> Any:
        return gradient.call(*as_recorded(raw), *raw[count:])

    def update(*raw: Any) -> Any:
        carry = raw[count : count + len(signature.carry)]
        grads = raw[count + len(carry) :][: len(signature.grads)]
        params = params_of([raw[i] for i in new_weights])
        held = lift([raw[i] for i in places], own, jax.tree.structure(form))
        updates, held = optimizer.update(params_of(grads), held, params, value=carry[0])
        after = list(raw[:count])
        for i, value in zip(
            new_weights, in_order(optax.apply_updates(params, updates)), strict=True
        ):
            after[i] = value
        for i, value in zip(places, lower(held), strict=True):
            after[i] = value
        for i, value in zip(new_rest, carry[1:], strict=True):
            after[i] = value
        return after

    try:
        exported = trajectory(take_gradient, update, grafted)
    except TypeError as error:
        raise ProgramError(
            f"the optimizer cannot be updated with a gradient and a loss: {str(error)[:200]}",
            why="one that evaluates the loss itself (L-BFGS, line searches) would execute more "
            "than the archived gradient",
            fix="an optimizer that needs gradients, weights and the value of the loss alone",
        ) from error
    initial, leaves = None, {}
    values = lower(optimizer.init(params_of(_weights(state, weights, shapes, in_order))))
    if fresh:
        assert state is not None
        initial = [np.zeros(0)] * count
        for i, old in zip((*new_weights, *new_rest), (*weights, *rest), strict=True):
            initial[i] = state[old]
        for i, value in zip(places, values, strict=True):
            initial[i] = np.asarray(value)
        for name, program in loaded.items():
            exported[name] = reexport(name, _observer(program, as_recorded, count), grafted)
    else:
        for i, leaf, value in zip(places, own, values, strict=True):
            if f"/{HYPERPARAMETERS}/" in f"/{leaf.path}":
                leaves[i] = np.asarray(value).tobytes()
    full = None
    if blank is not None:
        full = jax.tree.structure(State(blank.params, form, blank.model_state))
    return Grafted(grafted, exported, initial, leaves, full)


def injected(signature: Signature, values: Mapping[str, float]) -> dict[int, bytes]:
    """Return the leaves of a state that new values of injected hyperparameters set.

    Raises:
        QueryError: the state holds no such hyperparameter, or a value is no number.
    """
    known: dict[str, list[int]] = {}
    scheduled = set()
    for i, leaf in enumerate(signature.state):
        parent, _, name = leaf.path.rpartition("/")
        if parent.rpartition("/")[2] == HYPERPARAMETERS and not leaf.shape:
            known.setdefault(name, []).append(i)
        above, states, below = leaf.path.rpartition(f"/{HYPERPARAMETERS}_states/")
        if states:  # of a schedule, which computes its value anew at every step
            scheduled.add(f"{above}/{HYPERPARAMETERS}/{below.partition('/')[0]}")
    found = {}
    for name, value in values.items():
        places = known.get(name, [])
        why = (
            f"it holds {', '.join(known)}"
            if known
            else ("it holds none: only those of optax.inject_hyperparams are part of the state")
        )
        if len(places) > 1:
            why = f"it holds {len(places)} of that name, and which is meant is not said"
        if len(places) == 1 and signature.state[places[0]].path in scheduled:
            why, places = "a schedule computes it anew at every step, whatever the state holds", []
        number = value if isinstance(value, int | float) else np.asarray(value)
        if len(places) == 1:
            dtype = jnp.dtype(signature.state[places[0]].dtype)
            with np.errstate(over="ignore"):
                cast = np.asarray(number).astype(dtype) if np.shape(number) == () else None
            exact = dtype.kind == "f" or cast == number
            if cast is not None and np.isfinite(cast.astype(np.float64)) and exact:
                found[places[0]] = cast.tobytes()
                continue
            why = f"it is one number of the type {dtype}"
        raise ProgramError(
            f"the optimizer state has no hyperparameter {name!r} that could be {value!r}",
            why=why,
            fix="optimizer=optax.sgd(0.05), the whole optimizer with other values",
        )
    return found


def _weights(state: Any, weights: list[int], shapes: Any, in_order: Any) -> list[Any]:
    """Return the weights of a state, or zeros where only the optimizer's own numbers matter."""
    if state is not None:
        return [jnp.asarray(state[i]) for i in weights]
    return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in in_order(shapes)]


def _observer(program: export.Exported, as_recorded: Any, count: int) -> Any:
    def observe(*raw: Any) -> Any:
        return program.call(*as_recorded(raw), *raw[count:])

    return observe


def _part(leaf: Leaf) -> str:
    return leaf.path.partition("/")[0]


def _rest(leaf: Leaf) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, leaf.key


def _check_update(signature: Signature, rest: list[int]) -> None:
    known = {"params", "opt_state", "model_state"}
    strange = next((leaf.path for leaf in signature.state if _part(leaf) not in known), None)
    if strange is None and len(signature.carry) == 1 + len(rest) and not signature.carry[0].shape:
        return
    raise ProgramError(
        "the update of this run is not that of an optimizer alone"
        + (f": its state has {strange}" if strange else ""),
        why="it was recorded by Program.from_functions, whose update does what it likes",
        fix="record another run with the other update",
    )


def _check_form(signature: Signature, own: tuple[Leaf, ...]) -> None:
    """Compare the form of the optimizer's state with that of the run.

    Raises:
        ProgramError: they differ; the first leaf is named.
    """
    theirs = {leaf.path: _rest(leaf) for leaf in signature.state if _part(leaf) == "opt_state"}
    ours = {f"opt_state/{leaf.path}" if leaf.path else "opt_state": _rest(leaf) for leaf in own}
    for path in sorted({*theirs, *ours}):
        if theirs.get(path) != ours.get(path):
            a, b = (
                f"{form[1]}[{','.join(map(str, form[0]))}]" if form else "nothing"
                for form in (theirs.get(path), ours.get(path))
            )
            raise ProgramError(
                f"the state of the new optimizer does not fit: at {path} the run has {a}, the new "
                f"optimizer {b}",
                why="from the step of the fork on it goes on with the state that the run had there",
                fix="an optimizer of the same kind with other hyperparameters; or at=0, where any "
                "optimizer can begin",
            )
