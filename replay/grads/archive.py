"""The factors of per-sample gradients as a program that a run carries, with the table to read it.

The table has an entry for each tensor of weights: which of the program's results are its factors,
and how they become its gradient. Tensors without an entry that can be written down (tied or
combined weights, slices) are left to the archived gradient of one sample.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from replay.artifact import Signature
from replay.errors import LogError
from replay.grads.factors import Outer, Rows, move
from replay.grads.gradients import Form, Tensor
from replay.grads.sources import Problem
from replay.program import Inputs, Program
from replay.tree import paths


class Tapped:
    """`function(state, inputs) -> factors` of a program, to be exported, and its table.

    Attributes:
        table: one entry for each tensor of weights; filled when the function is traced.
    """

    def __init__(self, program: Program):
        self._loss = program.sample_loss
        self.table: list[dict[str, Any]] = []

    def __call__(self, state: Any, inputs: Inputs) -> list[Any]:
        """Return the leaves of all factors, `[batch, ...]` each."""
        leaves, tree = jax.tree.flatten(state.params)
        rows, row_tree = jax.tree.flatten((inputs.batch, inputs.sample_keys))

        def loss(leaves, row, shared):
            assert self._loss is not None
            example, key = jax.tree.unflatten(row_tree, row)
            return self._loss(jax.tree.unflatten(tree, leaves), example, key)

        problem = Problem(
            loss,
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],
            paths(state.params),
            [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in rows],
            [],
            rows[0].shape[0],
        )
        known = problem.factored(2**62).tensors
        chosen = [i for i, tensor in known.items() if _written(tensor.form)]
        payloads = problem.factored(2**62, chosen).produce(leaves, rows, [])
        found = dict(zip(chosen, payloads, strict=True))
        self.table = [
            _entry(tensor, found[i]) if i in found else {"way": "none", "reason": tensor.reason}
            for i, tensor in known.items()
        ]
        return jax.tree.leaves(payloads)


def tapped(program: Program, state: Any, inputs: Inputs) -> Tapped | None:
    """Return the factors of a program, to be exported; None where it has none that are known.

    Args:
        program: what is trained.
        state: shapes of a state.
        inputs: shapes of the inputs of a step.
    """
    if program.sample_loss is None:
        return None
    found = Tapped(program)
    try:
        leaves = jax.eval_shape(found, state, inputs)
    except Exception:  # whatever a loss does that taps cannot follow, training goes on without
        return None
    return found if leaves else None


def _written(form: Form) -> bool:
    return form.way in ("direct", "zero") or (form.way == "rule" and form.places is None)


def _entry(tensor: Tensor, payload: Any) -> dict[str, Any]:
    form = tensor.form
    return {
        "way": form.way,
        "kind": form.kind,
        "value": list(form.value),
        "moves": [[name, list(numbers)] for name, numbers in form.moves],
        "alone": form.alone,
        "reason": tensor.reason,
        "leaves": [[list(x.shape), str(x.dtype)] for x in jax.tree.leaves(payload)],
    }


class Table(NamedTuple):
    """The table of a run, read.

    Attributes:
        tensors: those with factors, by number.
        results: what the program returns.
        missing: number -> why a tensor has no factors.
    """

    tensors: dict[int, Tensor]
    results: list[jax.ShapeDtypeStruct]
    missing: dict[int, str]

    def payloads(self, leaves: Sequence[Any]) -> list[Any]:
        """Return what belongs to each tensor, from the results of the program."""
        rest, payloads = list(leaves), []
        for tensor in self.tensors.values():
            kind = {"Outer": Outer, "Rows": Rows}.get(tensor.form.kind)
            if kind is None:
                payloads.append(rest.pop(0))
            else:
                payloads.append(kind(rest.pop(0), rest.pop(0)))
        return payloads


def read(plain: Any, signature: Signature) -> Table:
    """Read a table that nobody vouches for.

    Raises:
        LogError: it does not fit the tensors of the run.
    """
    try:
        return _read(plain, signature)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LogError(
            f"run.msgpack describes the program 'factors' in a form that is not known: "
            f"{str(error)[:200]}",
            why="the table says which results are the factors of which tensor",
            fix="restore the file from a copy of the run",
        ) from error


def _read(plain: Any, signature: Signature) -> Table:
    tensors: dict[int, Tensor] = {}
    results: list[jax.ShapeDtypeStruct] = []
    missing: dict[int, str] = {}
    weights = [signature.state[i] for i in signature.weights]
    for number, (entry, leaf) in enumerate(zip(plain, weights, strict=True)):
        way, reason, path = entry["way"], str(entry["reason"]), leaf.path.partition("/")[2]
        if way == "none":
            missing[number] = reason
            continue
        structs = [
            jax.ShapeDtypeStruct(tuple(map(_size, shape)), jnp.dtype(dtype))
            for shape, dtype in entry["leaves"]
        ]
        form = Form(tuple(leaf.shape), leaf.dtype, way)
        if way == "rule":
            moves = tuple((name, tuple(map(_size, numbers))) for name, numbers in entry["moves"])
            value = tuple(map(_size, entry["value"]))
            kind, alone = entry["kind"], entry["alone"] is True
            form = Form(tuple(leaf.shape), leaf.dtype, way, kind, value, moves, None, alone)
            _check_rule(form, structs)
        elif way == "direct":
            (struct,) = structs
            if struct.shape[1:] != form.shape:
                raise ValueError(f"{path} has gradients of shape {list(struct.shape)}")
        elif way != "zero" or len(structs) != 1 or len(structs[0].shape) != 1:
            raise ValueError(f"{path} has gradients by {way!r}")
        if any(x.shape[:1] != (signature.batch_size,) for x in structs):
            raise ValueError(f"{path} has factors of other than {signature.batch_size} samples")
        tensors[number] = Tensor(path, form, (), reason)
        results += structs
    return Table(tensors, results, missing)


def _check_rule(form: Form, structs: Sequence[jax.ShapeDtypeStruct]) -> None:
    left, right = structs
    if form.kind == "Outer":
        samples, b, t, i = left.shape
        if right.shape[:3] != (samples, b, t) or len(right.shape) != 4:
            raise ValueError(f"factors of shapes {left.shape} and {right.shape}")
        product = (b, i, right.shape[3])
    elif form.kind == "Rows" and left.shape == right.shape[:2] and len(right.shape) == 3:
        product = (form.value[0], right.shape[2])
    else:
        raise ValueError(f"a factor of kind {form.kind!r}")
    if any(name not in ("reshape", "transpose") for name, _ in form.moves):
        raise ValueError(f"moves {form.moves}")
    blank = jax.ShapeDtypeStruct(product, form.wide)
    try:
        moved = jax.eval_shape(lambda x: move(x, form.moves), blank)
    except Exception as error:  # whatever jax says of axes and sizes that do not fit
        raise ValueError(f"moves that do not fit {product}") from error
    if moved.shape != form.value or math.prod(form.value) != math.prod(form.shape):
        raise ValueError(f"a value of shape {list(form.value)}")


def _size(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**40:
        raise ValueError(f"{number!r} is no size")
    return number
