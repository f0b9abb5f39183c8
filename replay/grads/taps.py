"""Where parameters meet data: one backward pass that yields the factors of per-sample gradients.

The jaxpr of a per-sample loss is interpreted. At every equation between a value made of
parameters alone and a value that depends on the data, a zero perturbation is added to the output;
the gradients with respect to the perturbations, and the data operands, are all that the gradient
of the parameter depends on. For a dense layer this is the outer product of Goodfellow (2015,
arXiv:1510.01799); in a scan both factors gain the time axis. What is made of parameters alone is
kept apart from the data, so that its own chain rule can be applied afterwards.

Known to be imperfect: what is under `jax.checkpoint` is stored, not recomputed; `while` and what
has its own derivative rule (`custom_jvp`, `custom_vjp`) is one meeting as a whole.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core

from replay.grads.factors import (
    Factor,
    Moves,
    Outer,
    Rows,
    Whole,
    convolution,
    dense,
    embedding,
    rows,
)


class Elements(NamedTuple):
    """The numbers of neighbouring parameter elements in their order, an array only when looked at.

    Attributes:
        start: the first number.
        shape: of the array.
    """

    start: int
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        stop = self.start + math.prod(self.shape)
        return np.arange(self.start, stop, dtype=dtype or np.int64).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value made of parameters alone, and of the time where a scan walks along it.

    Attributes:
        value: while the loss is interpreted, at one time of each scan.
        leaves: numbers of the parameter leaves that its gradient reaches.
        make: the value as a function of all parameter leaves, for all times.
        source: for each element of what `make` returns the number of the parameter element that
            it is, counted over all leaves one after the other, -1 for a constant; None where it
            is something else.
        along: depths of the scans that walk along it, outermost first: the leading axes of what
            `make` returns.
        known: what `make` returns, where no parameter has a say.
    """

    value: Any
    leaves: frozenset[int]
    make: Callable[..., Any]
    source: np.ndarray | Elements | None
    along: tuple[int, ...] = ()
    known: Any = None


@dataclasses.dataclass(frozen=True)
class Meeting:
    """One place where a value made of parameters meets data.

    Attributes:
        operation: name of the primitive.
        weight: the value.
        shape: of what `make` returns.
        factor: `factor(weights, operands, cotangents) -> Factor`, of one sample, at one time of
            each scan.
        moves: turn `[b, i, j]` of an `Outer`, or the table of `Rows`, into that shape.
        weights: the values made of parameters that `factor` needs.
        operands: which of all kept arrays are its data operands.
        cotangents: which of all perturbations are its own.
        times: lengths of the scans around it, outermost first.
    """

    operation: str
    weight: Weight
    shape: tuple[int, ...]
    factor: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Factor]
    moves: Moves
    weights: tuple[Weight, ...]
    operands: tuple[int, ...]
    cotangents: tuple[int, ...]
    times: tuple[int, ...] = ()

    @property
    def leaves(self) -> frozenset[int]:
        """The numbers of the parameter leaves that the value is made of."""
        return self.weight.leaves

    @property
    def make(self) -> Callable[[Sequence[Any]], Any]:
        """The value, as a function of all parameter leaves."""
        return self.weight.make

    @property
    def source(self) -> np.ndarray | Elements | None:
        """For each element of the value, which parameter element it is."""
        return self.weight.source

    def gathered(
        self, parameters: Sequence[Any], kept: Sequence[Any], cotangents: Sequence[Any]
    ) -> Factor:
        """Return the factor of one sample over all times.

        `t` runs over scans and positions, except that a scan which walks along the value is part
        of `b`: each of its times has a weight of its own.
        """
        weights = [weight.make(parameters) for weight in self.weights]
        factor = self.factor
        for depth in reversed(range(len(self.times))):
            axes = [0 if depth in weight.along else None for weight in self.weights]
            factor = jax.vmap(factor, in_axes=(axes, 0, 0))
        found = factor(
            weights,
            [kept[i] for i in self.operands],
            [cotangents[i] for i in self.cotangents],
        )
        own = self.weight.along
        summed = tuple(i for i in range(len(self.times)) if i not in own)
        if isinstance(found, Outer):
            return Outer(*(_merge_times(x, own, summed) for x in found))
        if isinstance(found, Rows):
            index, right = found
            return Rows(index.reshape(-1), right.reshape(-1, right.shape[-1]))
        return Whole(found.value.sum(axis=summed))


def _merge_times(array: Any, own: Sequence[int], summed: Sequence[int]) -> Any:
    """Merge the leading scan axes of `[..., b, t, i]` with `b`, or with `t`."""
    many = len(own) + len(summed)
    array = array.transpose(*own, many, *summed, many + 1, many + 2)
    b = math.prod(array.shape[: len(own) + 1])
    return array.reshape(b, math.prod(array.shape[len(own) + 1 : -1]), array.shape[-1])


def _along(meeting: Meeting, depth: int, length: int) -> Meeting:
    """Return a meeting as seen from outside of the scan that is around it."""
    times = (length, *meeting.times)
    if depth not in meeting.weight.along:
        return dataclasses.replace(meeting, times=times)
    moves = tuple(
        (name, (length, *numbers) if name == "reshape" else (0, *(i + 1 for i in numbers)))
        for name, numbers in meeting.moves
    )
    return dataclasses.replace(meeting, times=times, moves=moves, shape=(length, *meeting.shape))


class _Data(NamedTuple):
    """A value that depends on the sample."""

    value: Any


# Primitives that only move elements: run on numbers of elements, they say where each came from.
_MOVING = {"reshape", "transpose", "squeeze", "expand_dims", "slice", "concatenate", "rev"}
_MOVING |= {"split", "broadcast_in_dim", "copy", "copy_p", "dynamic_slice", "gather", "pad"}
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_INLINED |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


class _Tapper:
    """Interprets a jaxpr, adding perturbations and keeping operands; without any, counts them.

    `depth` is the number of scans around.
    """

    def __init__(self, perturbations: Sequence[Any] | None = None, depth: int = 0):
        self._given = perturbations
        self._depth = depth
        self.perturbed: list[jax.ShapeDtypeStruct] = []
        self.kept: list[Any] = []
        self.meetings: list[Meeting] = []

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        arguments: Sequence[Any],
        live: Sequence[bool],
    ) -> list[Any]:
        """Evaluate a jaxpr on values each of which is a `Weight`, a `_Data` or a constant.

        `live` tells which results the gradient passes through.
        """
        known: dict[core.Var, Any] = {}
        known.update(zip(jaxpr.constvars, map(_closed_over, consts), strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        ends, blanks = _ends(jaxpr), {}

        def place(variable):
            """Return which perturbation has the cotangent of a variable."""
            end = ends.get(variable, variable)
            if end not in blanks:
                aval = _aval(end)
                blanks[end] = self._blank(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
            return blanks[end][1]

        for equation, alive in zip(jaxpr.eqns, _alive(jaxpr, live), strict=True):
            values = [read(atom) for atom in equation.invars]
            results = self._equation(equation, values, alive, place)
            for variable, result in zip(equation.outvars, results, strict=True):
                if variable in blanks and self._given is not None:
                    result = _Data(_plain(result) + blanks[variable][0])
                known[variable] = result
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self,
        equation: core.JaxprEqn,
        values: list[Any],
        live: Sequence[bool],
        place: Callable[[core.Var], int],
    ) -> list[Any]:
        name = equation.primitive.name
        weights = any(isinstance(value, Weight) for value in values)
        data = any(isinstance(value, _Data) for value in values)
        if not weights and not data:
            with jax.ensure_compile_time_eval():  # may be needed outside of this trace
                return _bind(equation, values)
        reached = any(isinstance(value, Weight) and value.leaves for value in values)
        if data and not (reached and any(live)):
            return [_Data(x) for x in _bind(equation, [_plain(value) for value in values])]
        if name in _INLINED:
            inner = equation.params[_INLINED[name]]
            closed = isinstance(inner, core.ClosedJaxpr)
            body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
            return self.run(body, consts, values, live)
        if not data:
            return _combine(equation, values, live)
        if name == "scan":
            return self._scan(equation, values, live)
        if name == "cond":
            return self._cond(equation, values, live)
        return self._meet(equation, values, live, place)

    def _meet(
        self,
        equation: core.JaxprEqn,
        values: list[Any],
        live: Sequence[bool],
        place: Callable[[core.Var], int],
    ) -> list[Any]:
        """Evaluate an equation between parameters and data, and tap it."""
        outputs = _bind(equation, [_plain(value) for value in values])
        places = [place(out) for out, alive in zip(equation.outvars, live, strict=True) if alive]
        kept = tuple(self._keep(value.value) for value in values if isinstance(value, _Data))
        for number, value in enumerate(values):
            if isinstance(value, Weight) and value.leaves:
                factor, moves = _rule(equation, values, number, live)
                self.meetings.append(
                    Meeting(
                        operation=equation.primitive.name,
                        weight=value,
                        shape=jnp.shape(value.value),
                        factor=factor,
                        moves=moves,
                        weights=tuple(v for v in values if isinstance(v, Weight)),
                        operands=kept,
                        cotangents=tuple(places),
                    )
                )
        return [_Data(x) for x in outputs]

    def release(self, weight: Weight, operation: str) -> Any:
        """Return a value made of parameters as if it were data; its gradient is a cotangent."""
        value, place = self._perturb(weight.value)
        self.meetings.append(
            Meeting(
                operation=operation,
                weight=weight,
                shape=jnp.shape(value),
                factor=lambda weights, operands, cotangents: Whole(cotangents[0]),
                moves=(),
                weights=(),
                operands=(),
                cotangents=(place,),
            )
        )
        return value

    def _scan(self, equation: core.JaxprEqn, values: list[Any], live: Sequence[bool]) -> list[Any]:
        """Evaluate a scan with taps inside that gain its axis.

        What it walks along and what is carried unchanged stays a value made of parameters; what
        it carries otherwise is data from the start.
        """
        settings = equation.params
        body: core.Jaxpr = settings["jaxpr"].jaxpr
        consts, carries, length = (settings[key] for key in ("num_consts", "num_carry", "length"))
        start, rows, arguments, unmoved = [], [], list(values[:consts]), {}

        def carry(value):
            place = len(start)
            start.append(value)
            return lambda carried, row: _Data(carried[place])

        def walk(value):
            place = len(rows)
            rows.append(_plain(value))
            if isinstance(value, _Data):
                return lambda carried, row: _Data(row[place])
            weight = value if isinstance(value, Weight) else _constant(value)
            along = (*weight.along, self._depth)
            return lambda carried, row: dataclasses.replace(weight, value=row[place], along=along)

        for number, value in enumerate(values[consts : consts + carries]):
            into, out = body.invars[consts + number], body.outvars[number]
            if into is out:
                arguments.append(value)
                unmoved[number] = value
            elif (count := _counter(body, into, out, value, length)) is not None:
                arguments.append(walk(count[:-1] if not settings["reverse"] else count[-2::-1]))
                unmoved[number] = count[-1]
            elif isinstance(value, Weight) and value.leaves:
                arguments.append(carry(self.release(value, "scan")))
            else:
                arguments.append(carry(_plain(value)))
        arguments += map(walk, values[consts + carries :])
        moved = [number for number in range(carries) if number not in unmoved]
        alive = [jnp.issubdtype(_aval(v).dtype, jnp.inexact) for v in body.outvars[:carries]]

        def step(tapper, carried, row):
            given = [x(carried, row) if callable(x) else x for x in arguments]
            results = tapper.run(body, settings["jaxpr"].consts, given, [*alive, *live[carries:]])
            results = [_plain(x) for x in results]
            return [results[number] for number in moved], results[carries:]

        def tapped(carried, both):
            row, perturbations = both
            tapper = _Tapper(perturbations, self._depth + 1)
            carried, ys = step(tapper, carried, row)
            return carried, (ys, tapper.kept)

        counted = _Tapper(depth=self._depth + 1)
        jax.eval_shape(lambda *both: step(counted, *both), start, [x[0] for x in rows])
        blanks = [jax.ShapeDtypeStruct((length, *x.shape), x.dtype) for x in counted.perturbed]
        given, places = self._blanks(blanks)
        options = {key: settings[key] for key in ("reverse", "length", "unroll")}
        carried, (ys, kept) = lax.scan(tapped, start, (rows, given), **options)
        stored = [self._keep(x) for x in kept]
        for meeting in counted.meetings:
            meeting = _along(meeting, self._depth, length)
            self.meetings.append(_renumbered(meeting, stored, places))
        ends = dict(zip(moved, map(_Data, carried), strict=True)) | unmoved
        return [*(ends[number] for number in range(carries)), *map(_Data, ys)]

    def _cond(self, equation: core.JaxprEqn, values: list[Any], live: Sequence[bool]) -> list[Any]:
        """Evaluate branches with taps inside; those of a branch not taken have no gradient."""
        branches, arguments = equation.params["branches"], values[1:]
        chosen = jnp.clip(_plain(values[0]), 0, len(branches) - 1)

        def branch(number, tapper):
            closed = branches[number]
            results = tapper.run(closed.jaxpr, closed.consts, arguments, live)
            outs = zip(map(_plain, results), closed.jaxpr.outvars, strict=True)
            return [_typed(x, out.aval.dtype) for x, out in outs]

        tappers = [_Tapper(depth=self._depth) for _ in branches]
        structs, found = [], []
        for number, tapper in enumerate(tappers):
            kept = jax.eval_shape(lambda n=number, t=tapper: (branch(n, t), t.kept)[1])
            structs.append(kept)
            found.append(self._blanks(tapper.perturbed))

        def tapped(number):
            tapper = _Tapper(found[number][0], self._depth)
            outs = branch(number, tapper)
            kept = [[jnp.zeros(x.shape, x.dtype) for x in own] for own in structs]
            kept[number] = [_typed(x, x.dtype) for x in tapper.kept]
            return outs, kept

        options = [functools.partial(tapped, number) for number in range(len(branches))]
        outs, kept = lax.switch(chosen, options)
        for number, tapper in enumerate(tappers):
            stored = [self._keep(x) for x in kept[number]]
            for meeting in tapper.meetings:
                meeting = _renumbered(meeting, stored, found[number][1])
                whose = self._keep(jnp.broadcast_to(chosen == number, meeting.times))
                self.meetings.append(_where_taken(meeting, whose))
        return [_Data(x) for x in outs]

    def _blanks(self, structs: Sequence[jax.ShapeDtypeStruct]) -> tuple[list[Any], list[int]]:
        found = [self._blank(struct) for struct in structs]
        return [zeros for zeros, _ in found], [place for _, place in found]

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


def _alive(jaxpr: core.Jaxpr, live: Sequence[bool]) -> list[list[bool]]:
    """Tell for each result of each equation whether the gradient passes through it.

    A `while` cannot be differentiated backwards, but a count of its iterations may well be used.
    """
    ends = zip(jaxpr.outvars, live, strict=True)
    used = {v for v, on in ends if on and not isinstance(v, core.Literal)}
    marks = []
    for equation in reversed(jaxpr.eqns):
        mark = [v in used and jnp.issubdtype(_aval(v).dtype, jnp.inexact) for v in equation.outvars]
        marks.append(mark)
        if any(mark) and equation.primitive.name != "stop_gradient":
            used.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return marks[::-1]


def _ends(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    """Return where the cotangent of a value is met again: at the end of a chain of sums.

    A value that is used once, in a sum of its own shape, has the cotangent of that sum. So one
    perturbation does for a product, the bias added to it, and another product added to both.
    """
    variables = [v for equation in jaxpr.eqns for v in equation.invars] + list(jaxpr.outvars)
    uses = collections.Counter(v for v in variables if not isinstance(v, core.Literal))
    ends: dict[Any, Any] = {}
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name != "add":
            continue
        (out,) = equation.outvars
        form = _aval(out).shape, _aval(out).dtype
        for v in equation.invars:
            same = (_aval(v).shape, _aval(v).dtype) == form
            if same and not isinstance(v, core.Literal) and uses[v] == 1:
                ends[v] = ends.get(out, out)
    return ends


def _counter(body, into, out, start, length) -> np.ndarray | None:
    """Return what a carried integer is at each time and at the end, if it counts in equal steps."""
    if isinstance(start, Weight | _Data):
        return None
    if not jnp.issubdtype(into.aval.dtype, jnp.integer) or into.aval.shape:
        return None
    for equation in body.eqns:
        if equation.outvars == [out] and equation.primitive.name == "add":
            by = [v.val for v in equation.invars if isinstance(v, core.Literal)]
            if len(by) == 1 and into in equation.invars:
                return (np.arange(length + 1) * int(by[0]) + int(start)).astype(into.aval.dtype)
    return None


def _constant(value: Any) -> Weight:
    """Return a constant as a value made of no parameter."""
    return Weight(value, frozenset(), lambda parameters, memo=None: value, None, known=value)


def _closed_over(value: Any) -> Any:
    """Return a value that the loss closes over; under an outer `jit` it is not known yet."""
    if isinstance(value, Tracer):
        return dataclasses.replace(_constant(value), known=None)
    return value


def _renumbered(meeting: Meeting, kept: Sequence[int], places: Sequence[int]) -> Meeting:
    return dataclasses.replace(
        meeting,
        operands=tuple(kept[i] for i in meeting.operands),
        cotangents=tuple(places[i] for i in meeting.cotangents),
    )


def _where_taken(meeting: Meeting, whose: int) -> Meeting:
    """Return a meeting inside a branch; what is kept where it is not taken is arbitrary."""

    def factor(weights, operands, cotangents):
        found = meeting.factor(weights, operands[:-1], cotangents)
        if isinstance(found, Whole):  # such as a division by what was not kept
            return Whole(jnp.where(operands[-1], found.value, jnp.zeros_like(found.value)))
        return found

    return dataclasses.replace(meeting, factor=factor, operands=(*meeting.operands, whose))


def _typed(value: Any, dtype: Any) -> Any:
    """Return a value whose type is not weak, as branches must agree on it."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return value
    return lax.convert_element_type(value, dtype)


def _aval(variable: Any) -> Any:
    return variable.aval


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Weight | _Data) else value


def _bind(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    settings = equation.primitive.get_bind_params(equation.params)
    results = equation.primitive.bind(*values, **settings)
    return list(results) if equation.primitive.multiple_results else [results]


def _combine(equation: core.JaxprEqn, values: list[Any], live: Sequence[bool]) -> list[Any]:
    """Evaluate an equation that makes a value of parameters alone."""
    plain = _bind(equation, [_plain(value) for value in values])
    weights = [value for value in values if isinstance(value, Weight)]
    reached = frozenset().union(*(weight.leaves for weight in weights))
    if equation.primitive.name == "stop_gradient":
        reached = frozenset()
    along = tuple(sorted(set().union(*(weight.along for weight in weights))))
    each = [value.along if isinstance(value, Weight) else () for value in values]

    def over_times(arguments):
        function = functools.partial(_bind, equation)
        for depth in reversed(along):
            function = jax.vmap(function, ([0 if depth in own else None for own in each],))
        return function(arguments)

    node = object()

    def make_all(parameters, memo):  # a value used twice is made once
        if node not in memo:
            made = [v.make(parameters, memo) if isinstance(v, Weight) else v for v in values]
            memo[node] = over_times(made)
        return memo[node]

    known = [None] * len(plain)
    with jax.ensure_compile_time_eval():
        if all(weight.known is not None for weight in weights):
            known = over_times([v.known if isinstance(v, Weight) else v for v in values])
        sources = _sources(equation, values, plain, over_times)
    return [
        Weight(
            value=value,
            leaves=reached if alive else frozenset(),
            make=lambda parameters, memo=None, place=place: make_all(
                parameters, {} if memo is None else memo
            )[place],
            source=sources[place],
            along=along,
            known=known[place],
        )
        for place, (value, alive) in enumerate(zip(plain, live, strict=True))
    ]


def _sources(equation, values, plain, over_times) -> Sequence[np.ndarray | Elements | None]:
    """Return which parameter elements the results of a primitive are, where it only moves them."""
    name = equation.primitive.name
    if name == "convert_element_type" and jnp.issubdtype(plain[0].dtype, jnp.floating):
        return [values[0].source]
    whole = values[0].source if isinstance(values[0], Weight) and not values[0].along else None
    if name in ("reshape", "squeeze", "expand_dims") and isinstance(whole, Elements):
        return [whole._replace(shape=jnp.shape(plain[0]))]
    moved = len(values) if name in ("concatenate", "pad") else 1
    numbers = []
    for place, value in enumerate(values):
        if place >= moved:  # says where to, and must be the same for every sample
            number = value.known if isinstance(value, Weight) else value
        elif isinstance(value, Weight):
            number = value.source
        else:
            number = np.full(jnp.shape(value), -1)
        numbers.append(number)
    if name not in _MOVING or any(number is None for number in numbers):
        return [None] * len(plain)
    numbers[:moved] = [jnp.asarray(np.asarray(number)) for number in numbers[:moved]]
    return [np.asarray(x) for x in over_times(numbers)]


def _rule(equation: core.JaxprEqn, values: list[Any], number: int, live: Sequence[bool]):
    """Return `(factor, moves)` for the parameter that is operand `number` of an equation."""
    name, settings = equation.primitive.name, equation.params
    own = values[number]
    others = [value for place, value in enumerate(values) if place != number]
    alone = not any(isinstance(value, Weight) for value in others)
    shapes = [jnp.shape(_plain(value)) for value in values]
    if name == "dot_general" and alone:
        return dense(settings["dimension_numbers"], shapes, number)
    if name == "conv_general_dilated" and alone and number == 1:
        if settings["batch_group_count"] == 1:
            return convolution(settings, shapes)
    if alone and number == 0 and not own.along:
        found = None
        if name == "gather":
            found = embedding(settings, shapes)
        if name == "dynamic_slice":
            found = rows(shapes[0], _aval(equation.outvars[0]).shape, isinstance(others[0], _Data))
        if found is not None:
            return found

    # All at once, though one is asked for: some rules presume that what belongs together, such
    # as a matrix and its decomposition, is differentiated together.
    reached = [i for i, v in enumerate(values) if isinstance(v, Weight) and v.leaves]

    def factor(weights, operands, cotangents):
        weights, operands = iter(weights), iter(operands)
        given = []
        for value in values:
            source = {Weight: weights, _Data: operands}.get(type(value))
            given.append(value if source is None else next(source))

        def through(chosen):
            full = list(given)
            for place, weight in zip(reached, chosen, strict=True):
                full[place] = weight
            return [x for x, alive in zip(_bind(equation, full), live, strict=True) if alive]

        _, pull = jax.vjp(through, [given[place] for place in reached])
        return Whole(pull(list(cotangents))[0][reached.index(number)])

    return factor, ()


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
        Elements(int(start), tuple(x.shape)) for start, x in zip(offsets, structs, strict=False)
    ]

    def interpret(tapper, leaves, rest):
        weights = [
            Weight(leaf, frozenset([i]), lambda p, memo=None, i=i: p[i], sources[i])
            for i, leaf in enumerate(leaves)
        ]
        arguments = [*weights, *map(_Data, rest)]
        (out,) = tapper.run(closed.jaxpr, closed.consts, arguments, [True])
        if isinstance(out, Weight) and out.leaves:  # the same gradient for each sample
            return tapper.release(out, "loss")
        return _plain(out)

    def evaluate(leaves, rest, perturbations):
        tapper = _Tapper(perturbations)
        return interpret(tapper, leaves, rest), tapper.kept

    counted = _Tapper()
    flat_rest = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in closed.jaxpr.invars[len(flat) :]
    ]
    jax.eval_shape(lambda p, r: interpret(counted, p, r), structs, flat_rest)
    return Taps(tuple(counted.meetings), tuple(counted.perturbed), evaluate)
