"""Where parameters meet data: one backward pass that yields the factors of per-sample gradients.

The jaxpr of a per-sample loss is interpreted. At every equation between a value made of
parameters alone and a value that depends on the data, a zero perturbation is added to the output;
the gradients with respect to the perturbations, and the data operands, are all that the gradient
of the parameter depends on. For a dense layer this is the outer product of Goodfellow (2015,
arXiv:1510.01799); in a scan both factors gain the time axis. What is made of parameters alone is
kept apart from the data, so that its own chain rule can be applied afterwards.

Known to be imperfect: what is under `jax.checkpoint` is stored, not recomputed; a scan that walks
along a parameter or carries one, and what is inside `cond`, is one meeting as a whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core


class Outer(NamedTuple):
    """The gradient `g[b, i, j] = sum_t left[b, t, i] * right[b, t, j]` of one sample."""

    left: Any
    right: Any


class Rows(NamedTuple):
    """The gradient `g[i] = sum_t right[t] where index[t] == i` of one sample, as of an embedding.

    `index` is `int32[t]`, `right` is `[t, j]`; an index outside the table adds nothing.
    """

    index: Any
    right: Any


class Whole(NamedTuple):
    """The gradient of one sample itself, no larger than what it is made of."""

    value: Any


Factor = Outer | Rows | Whole

# How `[b, i, j]` of an `Outer`, or the table of `Rows`, becomes the value: ("reshape", sizes) and
# ("transpose", axes), one after the other.
Moves = tuple[tuple[str, tuple[int, ...]], ...]


def move(array: Any, moves: Moves) -> Any:
    """Apply moves to an array."""
    for name, numbers in moves:
        array = getattr(array, name)(numbers)
    return array


@dataclasses.dataclass(frozen=True)
class Meeting:
    """One place where a value made of parameters meets data.

    Attributes:
        operation: name of the primitive.
        leaves: numbers of the parameter leaves that the value is made of.
        make: the value, as a function of all parameter leaves.
        source: for each element of the value the number of the parameter element that it is,
            counted over all leaves one after the other; None where it is something else.
        shape: of the value.
        factor: `factor(parameters, operands, cotangents) -> Factor`, of one sample, at one time
            of each scan.
        moves: turn `[b, i, j]` of an `Outer`, or the table of `Rows`, into the value's shape.
        times: lengths of the scans around it, outermost first.
        operands: which of all kept arrays are its data operands.
        cotangents: which of all perturbations are its own.
    """

    operation: str
    leaves: frozenset[int]
    make: Callable[[Sequence[Any]], Any]
    source: np.ndarray | None
    shape: tuple[int, ...]
    factor: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Factor]
    moves: Moves
    times: tuple[int, ...]
    operands: tuple[int, ...]
    cotangents: tuple[int, ...]

    def gathered(
        self, parameters: Sequence[Any], kept: Sequence[Any], cotangents: Sequence[Any]
    ) -> Factor:
        """Return the factor of one sample over all times: `t` runs over scans and positions."""
        operands = [kept[i] for i in self.operands]
        factor = functools.partial(self.factor, parameters)
        for _ in self.times:
            factor = jax.vmap(factor)
        found = factor(operands, [cotangents[i] for i in self.cotangents])
        many = len(self.times)
        if isinstance(found, Outer):
            return Outer(*(_merge_times(x, many, 1) for x in found))
        if isinstance(found, Rows):
            return Rows(*(_merge_times(x, many, 0) for x in found))
        return Whole(found.value.sum(axis=tuple(range(many))))


def _merge_times(array: Any, many: int, axis: int) -> Any:
    """Move the leading scan axes in front of the axis of positions, and merge them with it."""
    if not many:
        return array
    array = jnp.moveaxis(array, range(many), range(axis, axis + many))
    shape = array.shape
    merged = math.prod(shape[axis : axis + many + 1])
    return array.reshape(*shape[:axis], merged, *shape[axis + many + 1 :])


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A value made of parameters alone, while the loss is interpreted."""

    value: Any
    leaves: frozenset[int]
    make: Callable[[Sequence[Any]], Any]
    source: np.ndarray | None


class _Data(NamedTuple):
    """A value that depends on the sample."""

    value: Any


# Primitives that only move elements: run on numbers of elements, they say where each came from.
_MOVING = {"reshape", "transpose", "squeeze", "expand_dims", "slice", "concatenate", "rev"}
_MOVING |= {"split", "broadcast_in_dim", "copy", "copy_p", "dynamic_slice"}
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_INLINED |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


class _Tapper:
    """Interprets a jaxpr, adding perturbations and keeping operands; without any, counts them."""

    def __init__(self, perturbations: Sequence[Any] | None = None):
        self._given = perturbations
        self.perturbed: list[jax.ShapeDtypeStruct] = []
        self.kept: list[Any] = []
        self.meetings: list[Meeting] = []

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr on values each of which is a `_Weight`, a `_Data` or a constant."""
        known: dict[core.Var, Any] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
        name = equation.primitive.name
        weights = [isinstance(value, _Weight) for value in values]
        data = any(isinstance(value, _Data) for value in values)
        if not any(weights):
            if data:
                return [_Data(x) for x in _bind(equation, [_plain(value) for value in values])]
            with jax.ensure_compile_time_eval():  # may be needed outside of this trace
                return _bind(equation, values)
        if not data:
            return _combine(equation, values)
        if name in _INLINED:
            inner = equation.params[_INLINED[name]]
            closed = isinstance(inner, core.ClosedJaxpr)
            body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
            return self.run(body, consts, values)
        if name == "scan" and not any(weights[equation.params["num_consts"] :]):
            return self._scan(equation, values)
        return self._meet(equation, values)

    def _meet(self, equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Evaluate an equation between parameters and data, and tap it."""
        results = _bind(equation, [_plain(value) for value in values])
        places, outputs = [], []
        for result in results:
            if jnp.issubdtype(result.dtype, jnp.inexact):
                result, place = self._perturb(result)
                places.append(place)
            outputs.append(_Data(result))
        if not places:
            return outputs
        operands = [value for value in values if not isinstance(value, _Weight)]
        kept = tuple(self._keep(_plain(value)) for value in operands)
        for number, value in enumerate(values):
            if isinstance(value, _Weight) and jnp.issubdtype(value.value.dtype, jnp.inexact):
                factor, moves = _rule(equation, values, number)
                self.meetings.append(
                    Meeting(
                        operation=equation.primitive.name,
                        leaves=value.leaves,
                        make=value.make,
                        source=value.source,
                        shape=jnp.shape(value.value),
                        factor=factor,
                        moves=moves,
                        times=(),
                        operands=kept,
                        cotangents=tuple(places),
                    )
                )
        return outputs

    def alone(self, out: _Weight) -> Any:
        """Tap a loss in which the data has no say: it has a gradient, the same for each sample."""
        value, place = self._perturb(out.value)
        self.meetings.append(
            Meeting(
                operation="loss",
                leaves=out.leaves,
                make=out.make,
                source=out.source,
                shape=(),
                factor=lambda parameters, operands, cotangents: Whole(cotangents[0]),
                moves=(),
                times=(),
                operands=(),
                cotangents=(place,),
            )
        )
        return value

    def _scan(self, equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
        """Evaluate a scan whose constants are parameters, with taps inside that gain its axis."""
        settings = equation.params
        body: core.ClosedJaxpr = settings["jaxpr"]
        consts, carries = settings["num_consts"], settings["num_carry"]
        fixed, moving = values[:consts], [_plain(value) for value in values[consts:]]
        start, xs = moving[:carries], moving[carries:]
        inner: list[_Tapper] = []

        def step(tapper: _Tapper, carry, x):
            arguments = [*fixed, *map(_Data, carry), *map(_Data, x)]
            results = [_plain(r) for r in tapper.run(body.jaxpr, body.consts, arguments)]
            return results[:carries], results[carries:]

        def count(carry, x):
            tapper = _Tapper()
            step(tapper, carry, x)
            inner.append(tapper)
            return [tapper.kept]

        jax.eval_shape(count, start, [jax.tree.map(lambda x: x[0], leaf) for leaf in xs])
        counted, length = inner[0], settings["length"]
        blanks = [jax.ShapeDtypeStruct((length, *x.shape), x.dtype) for x in counted.perturbed]
        given, places = [], []
        for blank in blanks:
            zeros, place = self._blank(blank)
            given.append(zeros)
            places.append(place)

        def tapped(carry, both):
            x, perturbations = both
            tapper = _Tapper(perturbations)
            carry, ys = step(tapper, carry, x)
            return carry, (ys, tapper.kept)

        options = {key: settings[key] for key in ("reverse", "length", "unroll")}
        carry, (ys, kept) = lax.scan(tapped, start, (xs, given), **options)
        stored = [self._keep(x) for x in kept]
        for meeting in counted.meetings:
            self.meetings.append(
                dataclasses.replace(
                    meeting,
                    times=(length, *meeting.times),
                    operands=tuple(stored[i] for i in meeting.operands),
                    cotangents=tuple(places[i] for i in meeting.cotangents),
                )
            )
        return [_Data(x) for x in (*carry, *ys)]

    def _perturb(self, result: Any) -> tuple[Any, int]:
        zeros, place = self._blank(jax.ShapeDtypeStruct(result.shape, result.dtype))
        return (result if self._given is None else result + zeros), place

    def _blank(self, struct: jax.ShapeDtypeStruct) -> tuple[Any, int]:
        place = len(self.perturbed)
        self.perturbed.append(struct)
        if self._given is None:
            return jnp.zeros(struct.shape, struct.dtype), place
        return self._given[place], place

    def _keep(self, value: Any) -> int:
        self.kept.append(value)
        return len(self.kept) - 1


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Weight | _Data) else value


def _bind(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    settings = equation.primitive.get_bind_params(equation.params)
    results = equation.primitive.bind(*values, **settings)
    return list(results) if equation.primitive.multiple_results else [results]


def _combine(equation: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Evaluate an equation that makes a value of parameters alone."""
    plain = _bind(equation, [_plain(value) for value in values])
    leaves = frozenset().union(*(v.leaves for v in values if isinstance(v, _Weight)))
    sources: list[np.ndarray | None] = [None] * len(plain)
    name = equation.primitive.name
    if name == "convert_element_type" and jnp.issubdtype(plain[0].dtype, jnp.floating):
        sources = [values[0].source]
    elif name in _MOVING and all(isinstance(v, _Weight) and v.source is not None for v in values):
        with jax.ensure_compile_time_eval():
            moved = _bind(equation, [jnp.asarray(value.source) for value in values])
        sources = [np.asarray(x) for x in moved]

    def maker(place):
        def make(parameters):
            made = [v.make(parameters) if isinstance(v, _Weight) else v for v in values]
            return _bind(equation, made)[place]

        return make

    return [
        _Weight(value, leaves, maker(place), source)
        for place, (value, source) in enumerate(zip(plain, sources, strict=True))
    ]


def _rule(equation: core.JaxprEqn, values: list[Any], number: int):
    """Return `(factor, moves)` for the parameter that is operand `number` of an equation."""
    name, settings = equation.primitive.name, equation.params
    others = [i for i in range(len(values)) if i != number]
    alone = not any(isinstance(values[i], _Weight) for i in others)
    shapes = [jnp.shape(_plain(value)) for value in values]
    if name == "dot_general" and alone:
        return _dot(settings["dimension_numbers"], shapes, number)
    if name == "conv_general_dilated" and alone and number == 1:
        if settings["batch_group_count"] == 1:
            return _convolution(settings, shapes)
    if name == "gather" and alone and number == 0:
        found = _embedding(settings, shapes)
        if found is not None:
            return found
    fixed = [value if isinstance(value, _Weight) else None for value in values]

    def factor(parameters, operands, cotangents):
        left = iter(operands)
        given = [next(left) if value is None else value.make(parameters) for value in fixed]

        def through(weight):
            outputs = _bind(equation, [*given[:number], weight, *given[number + 1 :]])
            return [x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)]

        _, pull = jax.vjp(through, given[number])
        return Whole(pull(list(cotangents))[0])

    return factor, ()


def _dot(numbers, shapes, number):
    """The rule of a matrix product, the parameter on either side."""
    (contract, batch) = numbers
    other = 1 - number
    weight_rank, data_rank = len(shapes[number]), len(shapes[other])
    c_w, b_w = tuple(contract[number]), tuple(batch[number])
    c_d, b_d = tuple(contract[other]), tuple(batch[other])
    free_w = tuple(i for i in range(weight_rank) if i not in c_w + b_w)
    free_d = tuple(i for i in range(data_rank) if i not in c_d + b_d)
    order = (*b_w, *c_w, *free_w)
    sizes = tuple(shapes[number][i] for i in order)
    b = math.prod(shapes[number][i] for i in b_w)
    i = math.prod(shapes[number][k] for k in c_w)
    j = math.prod(shapes[number][k] for k in free_w)
    t = math.prod(shapes[other][k] for k in free_d)

    def factor(parameters, operands, cotangents):
        left = operands[0].transpose(*b_d, *free_d, *c_d).reshape(b, t, i)
        right = cotangents[0]
        if number == 0:  # its free axes come before those of the data
            right = right.reshape(b, j, t).transpose(0, 2, 1)
        return Outer(left, right.reshape(b, t, j))

    return factor, (("reshape", sizes), ("transpose", _inverse(order)))


def _convolution(settings, shapes):
    """The rule of a convolution: a matrix product with the patches of its input."""
    numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
    kernel = tuple(shapes[1][axis] for axis in numbers.rhs_spec)  # out, in, spatial
    window = kernel[2:]
    outs, ins = kernel[0] // groups, kernel[1]
    spatial = range(2, 2 + len(window))

    def factor(parameters, operands, cotangents):
        patches = lax.conv_general_dilated_patches(
            operands[0].transpose(numbers.lhs_spec),
            window,
            settings["window_strides"],
            settings["padding"],
            settings["lhs_dilation"],
            settings["rhs_dilation"],
            precision=settings["precision"],
        )  # [batch, in * window, spatial]
        right = cotangents[0].transpose(numbers.out_spec)  # [batch, out, spatial]
        left = patches.transpose(1, 0, *spatial).reshape(groups, ins * math.prod(window), -1)
        right = right.transpose(1, 0, *spatial).reshape(groups, outs, -1)
        return Outer(left.transpose(0, 2, 1), right.transpose(0, 2, 1))

    split = (groups, ins, *window, outs)  # of [group, in * window, out]
    outs_first = (0, len(split) - 1, *range(1, len(split) - 1))
    moves = (("reshape", split), ("transpose", outs_first), ("reshape", kernel))
    return factor, (*moves, ("transpose", _inverse(numbers.rhs_spec)))


def _embedding(settings, shapes):
    """The rule of looking up rows of a table; None for any other gather."""
    numbers, table, indices = settings["dimension_numbers"], shapes[0], shapes[1]
    mode = settings["mode"]
    known = mode in (lax.GatherScatterMode.FILL_OR_DROP, lax.GatherScatterMode.CLIP)
    known |= mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if (
        not known
        or tuple(numbers.collapsed_slice_dims) != (0,)
        or tuple(numbers.start_index_map) != (0,)
        or numbers.operand_batching_dims
        or tuple(settings["slice_sizes"]) != (1, *table[1:])
        or indices[-1:] != (1,)
    ):
        return None
    lead = len(indices) - 1
    offsets = tuple(numbers.offset_dims)
    front = tuple(i for i in range(lead + len(offsets)) if i not in offsets)

    def factor(parameters, operands, cotangents):
        index = operands[0].reshape(-1).astype(jnp.int32)
        if mode == lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, table[0] - 1)
        right = cotangents[0].transpose(*front, *offsets)
        return Rows(index, right.reshape(index.shape[0], -1))

    return factor, (("reshape", table),)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(axes))


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of one loss, for arguments of known shapes.

    Attributes:
        meetings: where parameters meet data.
        perturbed: shapes of the perturbations.
        evaluate: `evaluate(parameters, arguments, perturbations) -> loss, kept` on flat leaves.
    """

    meetings: tuple[Meeting, ...]
    perturbed: tuple[jax.ShapeDtypeStruct, ...]
    evaluate: Callable[..., Any]

    def factors(self, parameters: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, list]:
        """Return the loss of one sample and a factor for each meeting: one backward pass."""
        zeros = [jnp.zeros(x.shape, x.dtype) for x in self.perturbed]
        loss, pull, kept = jax.vjp(
            functools.partial(self.evaluate, parameters, arguments), zeros, has_aux=True
        )
        (cotangents,) = pull(jnp.ones_like(loss))
        return loss, [meeting.gathered(parameters, kept, cotangents) for meeting in self.meetings]


def tap(loss: Callable[..., Any], parameters: Any, *arguments: Any) -> Taps:
    """Find the taps of a per-sample loss.

    Args:
        loss: `loss(parameters, *arguments) -> scalar`, of one sample.
        parameters: a pytree of arrays or their shapes.
        *arguments: pytrees of arrays or their shapes, of one sample.
    """
    flat, tree = jax.tree.flatten(parameters)
    structs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in flat]
    closed = jax.make_jaxpr(loss)(jax.tree.unflatten(tree, structs), *arguments)
    offsets = np.cumsum([0] + [math.prod(x.shape) for x in structs])
    sources = [
        np.arange(start, stop, dtype=np.int64).reshape(x.shape)
        for start, stop, x in zip(offsets[:-1], offsets[1:], structs, strict=True)
    ]

    def interpret(tapper, leaves, rest):
        weights = [
            _Weight(leaf, frozenset([i]), lambda p, i=i: p[i], sources[i])
            for i, leaf in enumerate(leaves)
        ]
        (out,) = tapper.run(closed.jaxpr, closed.consts, [*weights, *map(_Data, rest)])
        return tapper.alone(out) if isinstance(out, _Weight) else _plain(out)

    def evaluate(leaves, rest, perturbations):
        tapper = _Tapper(perturbations)
        return interpret(tapper, leaves, rest), tapper.kept

    counted = _Tapper()
    flat_rest = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in closed.jaxpr.invars[len(flat) :]
    ]
    jax.eval_shape(lambda p, r: interpret(counted, p, r), structs, flat_rest)
    return Taps(tuple(counted.meetings), tuple(counted.perturbed), evaluate)
