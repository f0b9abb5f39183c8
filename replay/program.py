"""What is trained: pure functions from (state, inputs) to losses, gradients and the next state.

The training loss of a step is `sum(w_i * l_i) / B`, with the sample weights `w` an ordinary
input. A step is two functions, `gradient` and `update`, which become one executable with a barrier
between them: what is returned as the gradients is what was used, whoever looks at it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from replay.errors import ProgramError
from replay.tree import paths

# `split(key)[i]` and `fold_in(key, i)` are the same key under partitionable threefry, so an
# initialiser that splits the run's own key would share keys with the first steps. No step has
# this number.
INIT_FOLD = 2**32 - 1


class State(NamedTuple):
    """Everything that training carries from step to step."""

    params: PyTree
    opt_state: PyTree
    model_state: PyTree = ()


class Inputs(NamedTuple):
    """What one step consumes besides the state; keys are already folded.

    Attributes:
        step: the number of the step.
        ids: sample ids, -1 where a short batch is padded.
        weights: sample weights, 0 where a short batch is padded.
        batch: the examples, each leaf with a leading batch axis.
        key: `fold_in(run_key, step)`.
        sample_keys: `fold_in(key, id)` for every sample.
    """

    step: UInt32[Array, ""]
    ids: Int[Array, " batch"]
    weights: Float[Array, " batch"]
    batch: PyTree
    key: Key[Array, ""]
    sample_keys: Key[Array, " batch"]

    @classmethod
    def fold(cls, run_key: Key[Array, ""], step, ids, weights, batch) -> "Inputs":
        """Derive the step's key and the samples' keys from the run's key."""
        key = jax.random.fold_in(run_key, step)
        sample_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids.astype(jnp.uint32))
        return cls(step, ids, weights, batch, key, sample_keys)


def init_key(run_key: Key[Array, ""]) -> Key[Array, ""]:
    """Return the key that initialises a run: `fold_in(run_key, 2**32 - 1)`."""
    return jax.random.fold_in(run_key, jnp.uint32(INIT_FOLD))


@dataclasses.dataclass(frozen=True, init=False)
class Program:
    """A training program: how to start, how to take a gradient, how to update.

    Args:
        init: `init(key) -> params`, or a pytree of arrays to start from (pretrained weights).
            With `batched=True` it may also return the tuple `(params, model_state)`.
        loss: `loss(params, example, key) -> scalar` or `(scalar, aux)`, where `example` is one
            sample without batch axis and `aux` a pytree of scalars, logged as batch means.
            With `batched=True`: `loss(params, model_state, batch, key, sample_keys) ->
            (losses[B], model_state)`, for what couples the samples of a batch.
        optimizer: anything with optax's `init` and `update`; the mean loss is passed as
            `value` to those that ask for it.
        batched: which of the two forms `loss` has.
        name: shown by `replay show`.

    Raises:
        ProgramError: the optimizer is none, or evaluates the loss itself (L-BFGS, line
            searches), or a parameter is not a floating point array.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def init(key):
        ...     return {"w": jax.random.normal(key, (3,))}
        >>> def loss(params, example, key):
        ...     return (jnp.dot(params["w"], example["x"]) - example["y"]) ** 2
        >>> Program(init, loss, optax.sgd(0.1))
        Program(name='loss', batched=False)
    """

    init: Callable[[Key[Array, ""]], Any]
    gradient: Callable[[Any, Inputs], tuple]
    update: Callable[[Any, Any, Any, Any], Any]
    losses: Callable[[Any, Inputs], Any] | None
    sample_gradient: Callable[[Any, Inputs, Any], Any] | None
    sample_loss: Callable[[Any, Any, Any], Any] | None
    name: str
    batched: bool
    pretrained: bool

    def __init__(
        self,
        init: Callable | PyTree,
        loss: Callable,
        optimizer: optax.GradientTransformation,
        *,
        batched: bool = False,
        name: str | None = None,
    ):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ProgramError(
                f"the optimizer is {_name(optimizer)}, without init and update",
                why="a step asks it for the update of the weights",
                fix="call what makes it: optax.adam(1e-3), not optax.adam",
            )
        start = init if callable(init) else lambda key: jax.tree.map(jnp.asarray, init)
        optimizer = optax.with_extra_args_support(optimizer)
        batch_losses = _coupled(loss) if batched else _separate(loss)

        def init_state(key):
            params: Any = start(key)
            model_state: Any = ()
            if batched and type(params) is tuple and len(params) == 2:
                params, model_state = params
            return State(params, optimizer.init(params), model_state)

        def gradient(state, inputs):
            def total(params):
                losses, aux, carry = batch_losses(params, state.model_state, inputs)
                return _mean(losses, inputs.weights), (losses, aux, carry)

            (value, (losses, aux, carry)), grads = jax.value_and_grad(total, has_aux=True)(
                state.params
            )
            return losses, aux, grads, (value, carry)

        def update(state, carry, grads, losses):
            value, model_state = carry
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
            return State(optax.apply_updates(state.params, updates), opt_state, model_state)

        def losses_of(state, inputs):
            return batch_losses(state.params, state.model_state, inputs)[0]

        def sample_gradient(state, inputs, position):
            def one(params):
                if batched:
                    return batch_losses(params, state.model_state, inputs)[0][position]
                example = jax.tree.map(lambda x: x[position], inputs.batch)
                return _scalar(loss(params, example, inputs.sample_keys[position]))[0]

            return jax.grad(one)(state.params)

        def sample_loss(params, example, key):
            return _scalar(loss(params, example, key))[0]

        self._set(
            init_state,
            gradient,
            update,
            losses_of,
            sample_gradient,
            None if batched else sample_loss,
            name or _name(loss),
            batched,
            not callable(init),
        )
        _check_optimizer(optimizer, _shapes(init_state).params)

    @classmethod
    def from_functions(
        cls,
        init: Callable,
        gradient: Callable,
        update: Callable,
        *,
        losses: Callable | None = None,
        sample_gradient: Callable | None = None,
        name: str | None = None,
    ) -> "Program":
        """Build a program from the two functions of a step, for anything `Program` has no word for.

        Args:
            init: `init(key) -> state`, a NamedTuple with at least a field `params`.
            gradient: `gradient(state, inputs) -> losses[B], aux, grads, carry`, with `inputs`
                an `Inputs`, `grads` shaped like `state.params`, and `carry` whatever `update`
                needs besides. It decides itself how to use `inputs.weights`.
            update: `update(state, carry, grads, losses) -> state`.
            losses: `losses(state, inputs) -> losses[B]`, archived for questions about other
                samples.
            sample_gradient: `sample_gradient(state, inputs, position) -> grads` of one sample.
            name: shown by `replay show`.

        Raises:
            ProgramError: the state has no field `params`, or a parameter is not floating point.
        """
        program = cls.__new__(cls)
        program._set(
            init,
            gradient,
            update,
            losses,
            sample_gradient,
            None,
            name or _name(gradient),
            True,
            False,
        )
        state = _shapes(init)
        if not (hasattr(state, "_fields") and "params" in state._fields):
            raise ProgramError(
                f"init returned {type(state).__name__}, not a NamedTuple with a field 'params'",
                why="replay must know which leaves of the state are weights",
                fix="class State(NamedTuple): params: Any; opt_state: Any; ... as in replay.State",
            )
        _check_params(state.params)
        return program

    @classmethod
    def linen(
        cls,
        module: Any,
        loss: Callable,
        optimizer: optax.GradientTransformation,
        *example_inputs: Any,
        batched: bool = False,
        rngs: Sequence[str] = ("dropout",),
        name: str | None = None,
        **init_options: Any,
    ) -> "Program":
        """Build a program from a flax linen module.

        Args:
            module: the module.
            loss: `loss(apply, example) -> scalar`, where `apply(*inputs, **options)` is
                `module.apply` with the parameters and random keys filled in. With
                `batched=True`, `loss(apply, batch) -> losses[B]`; collections other than
                `params` (batch statistics) are the model state, and what the last `apply`
                leaves in them is carried on.
            optimizer: as for `Program`.
            *example_inputs: inputs for `module.init`, of the shapes that `apply` will see.
            batched: as for `Program`.
            rngs: names of the random streams that `apply` fills with the sample's key (with
                the step's key where `batched`).
            name: defaults to the class of the module.
            **init_options: further arguments for `module.init`, such as `train=False`.
        """

        def init(key):
            parameters_key, *others = jax.random.split(key, 1 + len(rngs))
            streams = {"params": parameters_key, **dict(zip(rngs, others, strict=True))}
            variables = dict(module.init(streams, *example_inputs, **init_options))
            params = variables.pop("params", {})
            if batched:
                return params, variables
            if variables:
                raise ProgramError(
                    f"{type(module).__name__} keeps {', '.join(sorted(variables))} beside params",
                    why="a per-sample loss has no place for what a batch leaves behind",
                    fix="Program.linen(..., batched=True) with loss(apply, batch) -> losses[B]",
                )
            return params

        def sample_loss(params, example, key):
            def apply(*args, **options):
                streams = {stream: jax.random.fold_in(key, i) for i, stream in enumerate(rngs)}
                return module.apply({"params": params}, *args, rngs=streams, **options)

            return loss(apply, example)

        def batch_loss(params, model_state, batch, key, sample_keys):
            carried = [model_state]

            def apply(*args, **options):
                streams = {stream: jax.random.fold_in(key, i) for i, stream in enumerate(rngs)}
                outputs, carried[0] = module.apply(
                    {"params": params, **carried[0]},
                    *args,
                    rngs=streams,
                    mutable=list(model_state),
                    **options,
                )
                return outputs

            return loss(apply, batch), carried[0]

        return cls(
            init,
            batch_loss if batched else sample_loss,
            optimizer,
            batched=batched,
            name=name or type(module).__name__,
        )

    @classmethod
    def nnx(
        cls,
        model: Any,
        loss: Callable,
        optimizer: optax.GradientTransformation,
        *,
        batched: bool = False,
        name: str | None = None,
    ) -> "Program":
        """Build a program from a flax nnx model; its present weights are the initial ones.

        Args:
            model: the module; it is not changed.
            loss: `loss(model, example, rngs) -> scalar`, with `rngs` an `nnx.Rngs` made from
                the sample's key (pass it on: `model(x, rngs=rngs)`). With `batched=True`,
                `loss(model, batch, rngs) -> losses[B]`; variables other than `nnx.Param` are
                the model state.
            optimizer: as for `Program`.
            batched: as for `Program`.
            name: defaults to the class of the model.
        """
        from flax import nnx  # an extra; the core works on functions and pytrees

        graph, params, rest = nnx.split(model, nnx.Param, ...)
        params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

        def sample_loss(params, example, key):
            return loss(nnx.merge(graph, params, rest), example, nnx.Rngs(key))

        def batch_loss(params, model_state, batch, key, sample_keys):
            merged = nnx.merge(graph, params, model_state)
            losses = loss(merged, batch, nnx.Rngs(key))
            return losses, nnx.to_pure_dict(nnx.state(merged, nnx.Not(nnx.Param)))

        return cls(
            (lambda key: (params, rest)) if batched else params,
            batch_loss if batched else sample_loss,
            optimizer,
            batched=batched,
            name=name or type(model).__name__,
        )

    def _set(self, *values):
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @functools.cached_property
    def kept(self) -> dict[Any, Any]:
        """What was traced and compiled of it; it goes when the program goes."""
        return {}

    def __repr__(self) -> str:
        return f"Program(name={self.name!r}, batched={self.batched})"


def _separate(loss):
    """Turn a per-sample loss into `(params, model_state, inputs) -> losses, aux, model_state`."""

    def batch_losses(params, model_state, inputs):
        losses, aux = jax.vmap(
            lambda example, key: _scalar(loss(params, example, key)), in_axes=(0, 0)
        )(inputs.batch, inputs.sample_keys)
        return losses, aux, model_state

    return batch_losses


def _coupled(loss):
    """Give a batched loss the same form as `_separate` gives a per-sample one."""

    def batch_losses(params, model_state, inputs):
        result = loss(params, model_state, inputs.batch, inputs.key, inputs.sample_keys)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ProgramError(
                f"the batched loss returned {type(result).__name__}, not (losses, model_state)",
                why="what one batch leaves behind is part of the state of the next step",
                fix="return losses, model_state (the one that came in, if it never changes)",
            )
        losses, model_state = result
        size = inputs.weights.shape[0]
        if jnp.shape(losses) != (size,) or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise ProgramError(
                f"the batched loss returned {jnp.result_type(losses)}{list(jnp.shape(losses))}, "
                f"not one floating point loss for each of the {size} samples",
                why="witnesses, sample weights and per-sample gradients need the loss of a sample",
                fix="return losses of shape [batch]; replay takes their weighted mean",
            )
        return losses, (), model_state

    return batch_losses


def _scalar(result):
    """Split what a per-sample loss returned into `(scalar, aux)`."""
    pair: Any = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    value, aux = pair
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ProgramError(
            f"the loss of one example is {jnp.result_type(value)}{list(jnp.shape(value))}, "
            "not a floating point scalar",
            why="a per-sample loss is called with one example, without batch axis",
            fix="reduce it to a scalar, or pass batched=True if it needs the whole batch",
        )
    for path, leaf in zip(paths(aux), jax.tree.leaves(aux), strict=True):
        if jnp.shape(leaf) != ():
            raise ProgramError(
                f"aux {path!r} of one example has shape {list(jnp.shape(leaf))}",
                why="metrics are logged as one number for each step, their mean over the batch",
                fix="return scalars in aux; larger intermediates can be asked for after the run",
            )
    return jnp.asarray(value), aux


def _mean(losses, weights):
    return jnp.sum(losses * weights.astype(losses.dtype)) / losses.shape[0]


def _shapes(init):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(init, key)


def _check_params(params):
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ProgramError(
                f"parameter {path!r} is {leaf.dtype}{list(leaf.shape)}, not floating point",
                why="training takes the gradient with respect to every parameter",
                fix="keep integers and constants in the closure of the loss, or in model_state",
            )


def _check_optimizer(optimizer, params):
    _check_params(params)

    def attempt(params):
        return optimizer.update(params, optimizer.init(params), params, value=jnp.zeros(()))

    try:
        jax.eval_shape(attempt, params)
    except TypeError as error:
        if "value_fn" not in str(error):
            raise
        raise ProgramError(
            f"the optimizer evaluates the loss itself ({error})",
            why="its extra evaluations would be part of the step, but nobody could name their "
            "inputs; L-BFGS and line searches do this",
            fix="use an optimizer that needs at most the value of the loss, or write the step "
            "with Program.from_functions",
        ) from error


def _name(function) -> str:
    name = getattr(inspect.unwrap(function), "__name__", type(function).__name__)
    return "program" if name == "<lambda>" else name
