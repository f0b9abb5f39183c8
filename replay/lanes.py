"""Training many lanes at once: executables that take the same steps from many states.

A lane is a state of its own, with weights of its own for the samples and, where orders are edited,
batches of its own. There are two forms. `map` takes one lane after the other through all steps of a
call, by the programs that the run itself was recorded with; `vmap` takes all lanes through each
step, which needs the user's program, as what was exported does not support `vmap`.

On two cores `map` takes 0.8 to 1.05 times as long as `vmap` for an MLP of digits, since a lane
stays in the cache of its core; and a lane mostly has the very bits of the run, where `vmap` has its
own (convolutions have others in a loop, unless the run was recorded in blocks).
On an accelerator a single small lane leaves most of the device idle. So CPUs have `map` and
everything else `vmap`: the platform decides, and never a measurement, as the bits depend on it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from replay import artifact
from replay.artifact import KEY_IMPLEMENTATION, Signature
from replay.identity import setting, sha256
from replay.program import Inputs, Program
from replay.tree import lower

FORMS = ("map", "vmap")


class Functions(NamedTuple):
    """What lanes are made of.

    Attributes:
        form: `map` or `vmap`.
        step: `step(state, key, step, ids, weights, batch) -> state`, with raw leaves of a state and
            of a batch, the run's key `uint32[2]`, `uint32`, `int32[batch]` and `float32[batch]`.
        losses: of the same arguments, `[batch]`; None where the program has no word for it.
    """

    form: str
    step: Callable[..., list[Any]]
    losses: Callable[..., Any] | None


def archived(load: Callable[[str], export.Exported], signature: Signature, names) -> Functions:
    """Return the functions of a run's own programs, for lanes one after the other.

    Args:
        load: returns an archived program by name.
        signature: their leaves.
        names: of the programs that there are.
    """
    gradient, update = load("gradient"), load("update")
    to_grads = 1 + len(signature.aux)
    to_carry = to_grads + len(signature.grads)

    def step(state, key, step, ids, weights, batch):
        # As in the step of the run: what is returned as the gradients is what is used.
        results = lax.optimization_barrier(gradient.call(*state, key, step, ids, weights, *batch))
        carry, grads = results[to_carry:], results[to_grads:to_carry]
        return list(update.call(*state, *carry, *grads, results[0]))

    if "losses" not in names:
        return Functions("map", step, None)
    loaded = load("losses")

    def losses(state, key, step, ids, weights, batch):
        return loaded.call(*state, key, step, ids, weights, *batch)[0]

    return Functions("map", step, losses)


def of_program(
    program: Program, state_of: Callable[[Sequence[Any]], Any], batch_of: Callable
) -> Functions:
    """Return the functions of the user's program, for lanes side by side.

    Args:
        program: what was recorded.
        state_of: makes the program's state of raw leaves.
        batch_of: makes its batch of leaves.
    """

    def inputs(key, step, ids, weights, batch):
        run_key = jax.random.wrap_key_data(key, impl=KEY_IMPLEMENTATION)
        return Inputs.fold(run_key, step, ids, weights, batch_of(batch))

    def step(state, key, step, ids, weights, batch):
        state = state_of(state)
        results = program.gradient(state, inputs(key, step, ids, weights, batch))
        losses, _, grads, carry = lax.optimization_barrier(results)
        return lower(program.update(state, carry, grads, losses))

    given = program.losses
    if given is None:
        return Functions("vmap", step, None)

    def losses(state, key, step, ids, weights, batch):
        return given(state_of(state), inputs(key, step, ids, weights, batch))

    return Functions("vmap", step, losses)


class Layout(NamedTuple):
    """How many lanes go through how many steps in one call.

    Attributes:
        lanes: in one call, at most.
        rows: steps in one call, at most.
        own: whether each lane has batches of its own.
        table: samples that lie on the device, from which batches are gathered.
    """

    lanes: int
    rows: int
    own: bool
    table: int


class Inflow(NamedTuple):
    """What the lanes of one call consume.

    Attributes:
        ids: `int32[1 or lanes, rows, batch]`, -1 for padding.
        places: like `ids`, where each sample lies in the table.
        weights: `float32[lanes, rows, batch]`.
        table: leaves `[samples, ...]`.
    """

    ids: Any
    places: Any
    weights: Any
    table: Sequence[Any]


class Lanes:
    """The compiled training of lanes.

    Args:
        functions: a step.
        signature: of the run.
        layout: how many lanes and steps.

    Attributes:
        hash: of what is computed, the same in every process.
        bytes: what a call takes, as the compiler counts it.
    """

    def __init__(self, functions: Functions, signature: Signature, layout: Layout):
        self.layout = layout
        make = _one_by_one if functions.form == "map" else _side_by_side
        size = (layout.rows, signature.batch_size)
        ids = jax.ShapeDtypeStruct((layout.lanes if layout.own else 1, *size), jnp.int32)
        inflow = Inflow(
            ids,
            ids,
            jax.ShapeDtypeStruct((layout.lanes, *size), jnp.float32),
            [_rows(layout.table, leaf.struct) for leaf in signature.batch],
        )
        count = jax.ShapeDtypeStruct((), jnp.int32)
        states = [_rows(layout.lanes, leaf.struct) for leaf in signature.state]
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        first = jax.ShapeDtypeStruct((), jnp.uint32)
        arguments = (states, key, first, count, count, inflow)

        def train(states, key, first, steps, lanes, ids, places, weights, table):
            inflow = Inflow(ids, places, weights, table)
            return make(functions.step, layout.own, states, key, first, steps, lanes, inflow)

        flat = (*arguments[:5], *inflow)
        exported = export.export(jax.jit(train))(*flat)
        self.hash, self._train = _compiled(exported, flat, donate=True)
        self.bytes = _bytes(self._train)

    def __call__(
        self, states: Sequence[Any], key: Any, first: int, steps: int, lanes: int, inflow: Inflow
    ) -> list[Any]:
        """Return the states after some steps; those before are given up.

        Args:
            states: raw leaves `[lanes, ...]`.
            key: of the run, `uint32[2]`.
            first: number of the first step.
            steps: how many rows are taken.
            lanes: how many lanes are taken; with `vmap` all are.
            inflow: what they consume.
        """
        counts = np.int32(steps), np.int32(lanes)
        return self._train(list(states), key, np.uint32(first), *counts, *inflow)


def _one_by_one(step, own, states, key, first, steps, lanes, inflow):
    """Take one lane after the other through all steps."""
    ids, places, weights, table = inflow

    def lane(number, states):
        mine = number if own else 0

        def one(row, state):
            batch = [leaf[places[mine, row]] for leaf in table]
            at = first + row.astype(jnp.uint32)
            return list(step(state, key, at, ids[mine, row], weights[number, row], batch))

        state = [lax.dynamic_index_in_dim(x, number, keepdims=False) for x in states]
        state = lax.fori_loop(0, steps, one, state)
        return [
            lax.dynamic_update_index_in_dim(x, mine, number, 0)
            for x, mine in zip(states, state, strict=True)
        ]

    return lax.fori_loop(0, lanes, lane, list(states))


def _side_by_side(step, own, states, key, first, steps, lanes, inflow):
    """Take all lanes through one step after the other."""
    ids, places, weights, table = inflow
    # Where all have the same batches, they are gathered once, and so are the keys of the samples.
    along = (0, None, None, 0, 0, 0) if own else (0, None, None, None, 0, None)
    each = jax.vmap(lambda *arguments: list(step(*arguments)), along)

    def one(row, states):
        at = first + row.astype(jnp.uint32)
        now = [x[:, row] if own else x[0, row] for x in (ids, places)]
        batch = [leaf[now[1]] for leaf in table]
        return each(states, key, at, now[0], weights[:, row], batch)

    return lax.fori_loop(0, steps, one, list(states))


class Measure:
    """A metric of each lane, compiled; one number, or an array of them.

    Args:
        form: `map` or `vmap`.
        metric: `metric(state, extra) -> array`, of raw leaves.
        signature: of the run.
        lanes: how many at most.
        extra: arrays that it needs besides.

    Attributes:
        shape: of the metric of one lane.
        hash: of what is computed, with all constants and with the content of `extra`, which is an
            argument of the program; None where it cannot be exported.
    """

    def __init__(
        self,
        form: str,
        metric: Callable[[Sequence[Any], Sequence[Any]], Any],
        signature: Signature,
        lanes: int,
        extra: Sequence[Any] = (),
    ):
        self._extra = [jnp.asarray(x) for x in extra]
        state = [leaf.struct for leaf in signature.state]
        given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self._extra]
        found = jax.eval_shape(metric, state, given)
        self.shape = tuple(found.shape)

        def measure(states, count, extra):
            if form == "vmap":
                return jax.vmap(lambda *state: metric(state, extra))(*states)

            def one(number, values):
                mine = [lax.dynamic_index_in_dim(x, number, keepdims=False) for x in states]
                value = metric(mine, extra)
                return lax.dynamic_update_index_in_dim(values, value, number, 0)

            return lax.fori_loop(0, count, one, jnp.zeros((lanes, *found.shape), found.dtype))

        states = [_rows(lanes, leaf) for leaf in state]
        arguments = (states, jax.ShapeDtypeStruct((), jnp.int32), given)
        jitted = jax.jit(measure)
        try:
            exported = export.export(jitted)(*arguments)
        except (NotImplementedError, ValueError):  # a callback, of which no hash tells anything
            self.hash, self._measure = None, jitted.lower(*arguments).compile()
        else:
            text, self._measure = _compiled(exported, arguments, donate=False)
            content = [
                (str(x.dtype), x.shape, sha256(np.asarray(x).tobytes())) for x in self._extra
            ]
            self.hash = sha256(repr((text, content)).encode())

    def __call__(self, states: Sequence[Any], lanes: int) -> np.ndarray:
        """Return the metric of the first lanes, `[lanes, *shape]`."""
        found = np.asarray(self._measure(list(states), np.int32(lanes), self._extra))[:lanes]
        return found.astype(np.float64)


_MOST_KNOWN = 16
_known: dict[tuple, Any] = {}


def _compiled(
    exported: export.Exported, arguments: Sequence[Any], *, donate: bool
) -> tuple[str, Any]:
    """Return the hash of a program and its executable: that of an equal one, where one is known.

    The next question of a run, with other edits or another metric, then begins at once.
    """
    text = artifact.text_hash(exported)
    key = (text, donate, jax.default_backend(), setting("jax_default_device"))
    if key not in _known:
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        call = jax.jit(exported.call, donate_argnums=0 if donate else ())
        _known[key] = call.lower(*arguments).compile()
    return text, _known[key]


def _rows(count: int, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)


def _bytes(compiled: Any) -> int:
    """Return what a call takes besides what lies on the device anyway; 0 where nobody counts."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(sizes) - found.alias_size_in_bytes)
