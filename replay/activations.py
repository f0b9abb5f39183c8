"""Intermediates that a loss has tagged by `checkpoint_name`, as a program that a run carries.

The table has an entry for each name: shape and dtype of what it stands for, `[batch, ...]`. Inside
a `scan` a name stands for its values at all turns, stacked behind the batch; of a name that is used
several times outside of one, the last value counts. Branches of `cond` and bodies of `while` are
not looked into.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from replay.program import Inputs, Program

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_INLINED |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_INLINED |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Tagged:
    """`function(state, inputs) -> leaves` of the tagged intermediates, to be exported.

    Attributes:
        table: one entry for each name, once the function was traced.
    """

    def __init__(self, program: Program):
        self._program = program
        self.table: list[dict[str, Any]] = []

    def __call__(self, state: Any, inputs: Inputs) -> list[Any]:
        """Return the values of all names, `[batch, ...]` each, in the order of the names."""
        size = inputs.ids.shape[0]
        loss = self._program.sample_loss
        if loss is not None:

            def one(example, key):
                return _collected(lambda *given: loss(state.params, *given), example, key)

            found = jax.vmap(one)(inputs.batch, inputs.sample_keys)
        else:
            losses = self._program.losses
            assert losses is not None
            found = _collected(losses, state, inputs)
            found = {name: x for name, x in found.items() if x.shape[:1] == (size,)}
        self.table = [
            {"name": name, "shape": list(found[name].shape), "dtype": str(found[name].dtype)}
            for name in sorted(found)
        ]
        return [found[name] for name in sorted(found)]


def tagged(program: Program, state: Any, inputs: Inputs) -> Tagged | None:
    """Return the tagged intermediates of a program, to be exported; None where there are none.

    Args:
        program: what is trained.
        state: shapes of a state.
        inputs: shapes of the inputs of a step.
    """
    if program.losses is None:
        return None
    found = Tagged(program)
    try:
        leaves = jax.eval_shape(found, state, inputs)
    except Exception:  # whatever a loss does that cannot be followed, training goes on without
        return None
    return found if leaves else None


def _collected(function: Any, *arguments: Any) -> dict[str, Any]:
    closed = jax.make_jaxpr(function)(*arguments)
    names: dict[str, Any] = {}
    _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), names)
    return names


def _evaluate(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], names: dict[str, Any]
) -> list[Any]:
    """Evaluate a jaxpr, and put what is tagged in it under its name."""
    known: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    known.update(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        kind = equation.primitive.name
        if kind == "name":
            names[equation.params["name"]] = given[0]
        if kind in _INLINED:
            inner = equation.params[_INLINED[kind]]
            inner, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            results = _evaluate(inner, consts, given, names)
        elif kind == "scan":
            results = _scan(equation.params, given, names)
        else:
            settings = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*given, **settings)
            results = results if equation.primitive.multiple_results else [results]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(params: Any, given: Sequence[Any], names: dict[str, Any]) -> list[Any]:
    body, fixed, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
    consts, carry, rows = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]

    def turn(carry, row):
        inner: dict[str, Any] = {}
        results = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *row], inner)
        return results[:carried], (results[carried:], inner)

    carry, (stacked, inner) = lax.scan(
        turn, list(carry), list(rows), length=params["length"], reverse=params["reverse"]
    )
    names |= inner
    return [*carry, *stacked]
