"""The program as the log carries it: StableHLO over flat leaves, exported, checked and compiled.

Recording runs through these artifacts from the start, so that a replay without the user's code
is the same program and not an equivalent one.
"""

import collections
import contextlib
import dataclasses
import functools
import re
import reprlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.layout import Format, Layout
from jax.extend import mlir
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.sharding import SingleDeviceSharding

from replay.errors import IdentityError, LogError, ProgramError
from replay.identity import setting, sha256
from replay.program import Inputs, Program
from replay.tree import Leaf, describe, lift, lower

# The versioned table of what may stand in `program/`. A reader refuses a version it does not know.
VERSIONS: dict[str, int] = dict.fromkeys(
    ("step", "block", "gradient", "update", "losses", "sample_gradient", "factors", "activations"),
    1,
)

KEY_IMPLEMENTATION = "threefry2x32"

_NUMBERS = re.compile(
    r"bool|u?int(4|8|16|32|64)|float(16|32|64)|bfloat16|float8_\w+|complex(64|128)"
)

# What a program from a stranger may call: pure numerics that jaxlib itself registers. A Python
# callback in this place has crashed the process; a Triton kernel would be foreign code.
_LAPACK = "gees geev gehrd geqrf gesdd getrf gtsv heevd hetrd orgqr potrf syevd sytrd trsm ungqr"
_SOLVER = "geqrf gesdd gesvd gesvdj getrf orgqr potrf syevd sytrd"
ALLOWED_CALLS = frozenset(
    {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"}
    | {"ApproxTopK", "AllocateBuffer", "cusparse_gtsv2_ffi"}
    | {f"lapack_{kind}{routine}_ffi" for kind in "sdcz" for routine in _LAPACK.split()}
    | {f"{gpu}solver_{routine}_ffi" for gpu in ("cu", "hip") for routine in _SOLVER.split()}
    | {
        f"{gpu}_{f}"
        for gpu in ("cu", "hip")
        for f in ("lu_pivots_to_permutation", "threefry2x32_ffi")
    }
)

_SYMBOL = re.compile(r'@("[^"]*"|[\w.$-]+)')

_COMPILED: collections.OrderedDict[tuple, Callable[..., Any]] = collections.OrderedDict()
_COMPILING, _MOST_COMPILED = threading.Lock(), 16

# No custom calls, but they wait for ever for something that this process does not send.
_WAITING = {f"stablehlo.{name}" for name in ("infeed", "outfeed", "send", "recv")}


@dataclasses.dataclass(frozen=True)
class Signature:
    """The leaves that go into and come out of a run's programs.

    Attributes:
        state: leaves of the state; the weights are those under `params`.
        batch: leaves of one example, without batch axis.
        losses: one leaf, `[batch_size]`.
        aux: what the loss reports besides, as `gradient` returns it.
        grads: gradients, in the order of the weights.
        carry: what `gradient` hands to `update`.
        batch_size: B.
        block: steps in one call of the block program; 0 for dispatch by step.
    """

    state: tuple[Leaf, ...]
    batch: tuple[Leaf, ...]
    losses: tuple[Leaf, ...]
    aux: tuple[Leaf, ...]
    grads: tuple[Leaf, ...]
    carry: tuple[Leaf, ...]
    batch_size: int
    block: int

    @property
    def weights(self) -> tuple[int, ...]:
        """Indices into `state` of the leaves that are weights."""
        return tuple(
            i for i, leaf in enumerate(self.state) if leaf.path.partition("/")[0] == "params"
        )

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of the trajectory programs, at present one: what alone may move the state."""
        return ("block",) if self.block else ("step",)

    def arguments(self, name: str) -> list[jax.ShapeDtypeStruct]:
        """Return the flat arguments of a program."""
        steps = (self.block,) if name == "block" else ()
        size = (*steps, self.batch_size)
        state = [leaf.struct for leaf in self.state]
        inputs = [
            _struct((), "uint32"),
            *([_struct((), "int32")] * 2 if steps else []),
            _struct(size, "int32"),
            _struct(size, "float32"),
            *[_struct((*size, *leaf.shape), leaf.dtype) for leaf in self.batch],
        ]
        if name == "update":
            return state + [leaf.struct for leaf in self.carry + self.grads + self.losses]
        position = [_struct((), "int32")] if name == "sample_gradient" else []
        return [*state, _struct((2,), "uint32"), *inputs, *position]

    def results(self, name: str) -> list[jax.ShapeDtypeStruct]:
        """Return the flat results of a program."""
        leaves = {
            "gradient": self.losses + self.aux + self.grads + self.carry,
            "update": self.state,
            "step": self.state + self.losses + self.aux + self.grads,
            "losses": self.losses,
            "sample_gradient": self.grads,
        }
        if name != "block":
            return [leaf.struct for leaf in leaves[name]]
        stacked = [
            _struct((self.block, *leaf.shape), leaf.dtype) for leaf in self.losses + self.aux
        ]
        return [leaf.struct for leaf in self.state] + stacked + [g.struct for g in self.grads]

    def to_plain(self) -> dict[str, Any]:
        """Return msgpack-able data, the inverse of `from_plain`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Any) -> "Signature":
        """Rebuild a signature from a record nobody vouches for.

        Raises:
            LogError: a field is missing or has the wrong form.
        """
        try:
            groups = {
                name: tuple(_leaf(item) for item in plain[name])
                for name in ("state", "batch", "losses", "aux", "grads", "carry")
            }
            batch_size, block = (_count(plain[name], 2**31) for name in ("batch_size", "block"))
            if not (groups["state"] and groups["batch"] and batch_size):
                raise ValueError("a state, a batch or the samples in it are missing")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LogError(
                "run.msgpack describes the program's leaves in a form that is not known: "
                f"{str(error)[:300]}",
                why="shapes and types decide what is read from disk and what is executed",
                fix="restore the file from a copy of the run",
            ) from error
        return cls(**groups, batch_size=batch_size, block=block)


def trace(
    program: Program,
    state: Any,
    examples: Any,
    *,
    batch_size: int,
    block: int = 0,
    more: Mapping[str, Callable[[Any, Inputs], list[Any]]] | None = None,
) -> tuple[Signature, dict[str, export.Exported]]:
    """Export every program of a run.

    Args:
        program: what is trained.
        state: state 0, concrete.
        examples: a batch of the data, leaves with a leading axis of any length.
        batch_size: B.
        block: steps in one call of the block program; 0 for dispatch by step.
        more: programs by name that observe a step: `function(state, inputs) -> leaves`.

    Raises:
        ProgramError: the program cannot be exported, or a step changes the form of its state.
    """
    state_leaves, state_tree = describe(state), jax.tree.structure(state)
    if len({leaf.path for leaf in state_leaves}) < len(state_leaves):
        raise ProgramError(
            "two leaves of the state have the same path",
            why="a weight is named by the path of its tensor",
            fix="rename the dict keys that contain '/' or repeat",
        )
    for leaf in state_leaves:
        if leaf.key not in (None, KEY_IMPLEMENTATION):
            raise ProgramError(
                f"{leaf.path} holds keys of the implementation {leaf.key!r}",
                why="their random numbers depend on the device and the compiler, so that a replay "
                "elsewhere would draw others",
                fix=f"jax.random.key(seed, impl={KEY_IMPLEMENTATION!r})",
            )
    batch_leaves = tuple(Leaf(leaf.path, leaf.shape[1:], leaf.dtype) for leaf in describe(examples))
    batch_tree = jax.tree.structure(examples)
    trees: dict[str, Any] = {}

    def as_state(raw):
        return lift(raw, state_leaves, state_tree)

    def as_inputs(key_data, step, ids, weights, *batch):
        run_key = jax.random.wrap_key_data(key_data, impl=KEY_IMPLEMENTATION)
        return Inputs.fold(run_key, step, ids, weights, jax.tree.unflatten(batch_tree, batch))

    count = len(state_leaves)

    def gradient(*raw):
        results = program.gradient(as_state(raw[:count]), as_inputs(*raw[count:]))
        losses, aux, grads, carry = results
        for name, part in zip(("losses", "aux", "grads", "carry"), results, strict=True):
            trees[name] = (describe(part), jax.tree.structure(part))
        return [*lower(losses), *lower(aux), *lower(grads), *lower(carry)]

    def update(*raw):
        parts, at = {}, count
        for name in ("carry", "grads", "losses"):
            leaves, tree = trees[name]
            parts[name], at = lift(raw[at : at + len(leaves)], leaves, tree), at + len(leaves)
        carry, grads, losses = (parts[name] for name in ("carry", "grads", "losses"))
        after = program.update(as_state(raw[:count]), carry, grads, losses)
        _same_form(state_leaves, after)
        return lower(after)

    blank = Signature(state_leaves, batch_leaves, (), (), (), (), batch_size, block)
    exported = {}
    with _without_locations():
        exported["gradient"] = _export(gradient, blank, "gradient")
        signature = dataclasses.replace(
            blank, **{name: leaves for name, (leaves, _) in trees.items()}
        )
        _check_results(signature)
        exported |= trajectory(gradient, update, signature)
        if (losses := program.losses) is not None:

            def losses_of(*raw):
                return lower(losses(as_state(raw[:count]), as_inputs(*raw[count:])))

            exported["losses"] = _export(losses_of, signature, "losses")
        if (sample_gradient := program.sample_gradient) is not None:

            def gradient_at(*raw):
                *raw, position = raw
                state, inputs = as_state(raw[:count]), as_inputs(*raw[count:])
                return lower(sample_gradient(state, inputs, position))

            exported["sample_gradient"] = _export(gradient_at, signature, "sample_gradient")
        for name, function in (more or {}).items():

            def observe(*raw, function=function):
                return function(as_state(raw[:count]), as_inputs(*raw[count:]))

            exported[name] = _export(observe, signature, name)
    return signature, exported


def trajectory(
    gradient: Callable[..., Sequence[Any]],
    update: Callable[..., Sequence[Any]],
    signature: Signature,
) -> dict[str, export.Exported]:
    """Export `update`, and the step (or block of steps) that it makes together with `gradient`.

    Args:
        gradient: from flat state and inputs to flat losses, aux, gradients and carry.
        update: from flat state, carry, gradients and losses to the flat state after the step.
        signature: the leaves of both.
    """
    count, reported = len(signature.state), 1 + len(signature.aux)

    def step(*raw):
        """Return the state after a step, and its losses, aux and gradients.

        The barrier keeps the two halves apart: what `update` is given, and what is returned as
        the gradients, are the same numbers in memory, however the compiler fuses.
        """
        state = raw[:count]
        results = jax.lax.optimization_barrier(gradient(*raw))
        to_carry = reported + len(signature.grads)
        given, carry = results[:to_carry], results[to_carry:]
        return [*update(*state, *carry, *given[reported:], given[0]), *given]

    def block_of_steps(*raw):
        state, (key_data, start, first, stop, *staged) = raw[:count], raw[count:]
        empty = [jnp.zeros(x.shape, x.dtype) for x in signature.results("block")[count:]]
        stacks, grads = empty[:reported], empty[reported:]

        def body(i, carried):
            state, stacks, _ = carried
            now = [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in staged]
            results = step(*state, key_data, start + i.astype(jnp.uint32), *now)
            to_grads = count + len(stacks)
            stacks = [
                jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
                for stack, x in zip(stacks, results[count:to_grads], strict=True)
            ]
            return results[:count], stacks, results[to_grads:]

        state, stacks, grads = jax.lax.fori_loop(first, stop, body, (list(state), stacks, grads))
        return [*state, *stacks, *grads]

    name, function = ("block", block_of_steps) if signature.block else ("step", step)
    with _without_locations():
        return {
            "update": _export(update, signature, "update"),
            name: _export(function, signature, name),
        }


def archived(exported: Mapping[str, export.Exported]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of programs by name, and the entries of the table that vouch for them."""
    files = {name: bytes(program.serialize()) for name, program in exported.items()}
    table = {
        name: {"version": VERSIONS[name], "sha256": sha256(file), "bytes": len(file)}
        | {"text": text_hash(exported[name]), "optimized": None}
        for name, file in files.items()
    }
    return files, table


def reexport(
    name: str, function: Callable[..., Sequence[Any]], signature: Signature
) -> export.Exported:
    """Export a program anew, for a signature with other leaves."""
    with _without_locations():
        return _export(function, signature, name)


def _export(function, signature, name):
    jitted, arguments = jax.jit(function), signature.arguments(name)
    jitted.trace(*arguments)  # what is wrong with the user's own code is said as it is
    try:
        return export.export(jitted)(*arguments)
    except (NotImplementedError, ValueError) as error:
        raise ProgramError(
            f"the {name} program cannot be exported: {str(error).splitlines()[0]}",
            why="a run carries its own program, and a callback into this Python process would "
            "not exist in the one that replays it",
            fix="remove callbacks, debug prints and custom calls from the loss and the optimizer",
        ) from error


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keep file names and line numbers of this machine out of the exported programs."""
    before = setting("jax_traceback_in_locations_limit")
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _same_form(before: Sequence[Leaf], state: Any) -> None:
    after = describe(state)
    if after == tuple(before):
        return
    changed = [f"{old} became {new}" for old, new in zip(before, after, strict=False) if old != new]
    raise ProgramError(
        f"update changes the form of the state: {changed[0] if changed else 'leaves come or go'}",
        why="every state is stored in the arrays that state 0 has laid out",
        fix="give init's state the shapes and dtypes that update returns",
    )


def _check_results(signature: Signature) -> None:
    size = (signature.batch_size,)
    if len(signature.losses) != 1 or signature.losses[0].shape != size:
        raise ProgramError(
            f"gradient returned losses {', '.join(map(str, signature.losses))}, "
            f"not one array of shape [{signature.batch_size}]",
            why="the witness of a step is a hash of the losses of its batch",
            fix="return one loss for each sample as the first result of gradient",
        )
    weights = [signature.state[i] for i in signature.weights]
    if [(w.path.partition("/")[2], w.shape) for w in weights] != [
        (g.path, g.shape) for g in signature.grads
    ]:
        raise ProgramError(
            "gradient returned grads that are not shaped like state.params",
            why="a gradient is asked for by the name of its weight",
            fix="return grads with the tree structure and the shapes of state.params",
        )
    for leaf in signature.aux:
        if leaf.shape not in ((), size):
            raise ProgramError(
                f"aux {leaf} is neither a scalar nor one number for each sample",
                why="metrics are logged as one number for each step",
                fix=f"return shape [] or [{signature.batch_size}] in aux",
            )


def text(exported: export.Exported) -> str:
    """Return the StableHLO of a program, equal for equal computations.

    Debug locations are left out, and functions are named by their content: whether equal ones are
    shared, and by which numbers they are told apart, depends on what JAX has traced before.
    """
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = mlir.deserialize_portable_artifact(exported.mlir_module_serialized, context)
        functions = {
            ir.StringAttr(function.attributes["sym_name"]).value: function.operation.get_asm(
                enable_debug_info=False
            )
            for function in module.body.operations
        }
    names: dict[str, str] = {}
    bodies: dict[str, str] = {}

    def name_of(function: str) -> str:
        if function not in names:
            names[function] = function  # in case it calls itself, as no program of ours does

            def named(found: re.Match) -> str:
                symbol = found[1].strip('"')
                if symbol == function:
                    return "@"
                return f"@{name_of(symbol)}" if symbol in functions else found[0]

            body = _SYMBOL.sub(named, functions[function])
            names[function] = sha256(body.encode())[:32]
            bodies.setdefault(names[function], body)
        return names[function]

    name_of("main")
    return "\n".join(bodies.values())


def text_hash(exported: export.Exported) -> str:
    """Hash what a program computes, not where its source stands."""
    return sha256(text(exported).encode())


def load(
    name: str,
    data: bytes,
    signature: Signature,
    *,
    allow: Sequence[str] | None = (),
    results: Sequence[jax.ShapeDtypeStruct] | None = None,
) -> export.Exported:
    """Read a program that nobody vouches for; nothing is executed.

    Args:
        name: its name in the table.
        data: bytes of the exported program.
        signature: the leaves it must take and return.
        allow: custom calls to accept besides `ALLOWED_CALLS`; None to accept all, for a program
            that this very process (or its parent) has made or checked.
        results: what it must return, where the signature does not say so.

    Raises:
        LogError: the bytes are not an exported program, or not one of this signature.
        IdentityError: it calls what is not on the allow-list, or is for another platform.
    """
    try:
        exported = export.deserialize(bytearray(data))
        calls = custom_calls(exported)
    except Exception as error:  # the parsers raise whatever damaged bytes lead them to
        raise LogError(
            f"program/{name} is not a readable exported program: {str(error).splitlines()[:1]}",
            why="without the archived program the run can only be replayed from its source",
            fix="restore the file from a copy of the run, or open it with a jax version near "
            "the one that recorded it (exports keep for six months)",
        ) from error
    unknown = [] if allow is None else sorted(calls - ALLOWED_CALLS - set(allow))
    if unknown:
        raise IdentityError(
            f"program/{name} calls {', '.join(map(repr, unknown))}",
            why="a custom call runs native code of this process that the run chooses; only "
            "numerical routines of jaxlib are allowed",
            fix=f"if you trust who recorded it: replay.open(path, allow={unknown!r})",
        )
    arguments = signature.arguments(name)
    results = signature.results(name) if results is None else results
    structure = jax.tree.structure((tuple(arguments), {}))
    if (
        exported.in_tree != structure
        or [_form(x) for x in exported.in_avals] != [_form(x) for x in arguments]
        or [_form(x) for x in exported.out_avals] != [_form(x) for x in results]
        or exported.nr_devices != 1
    ):
        raise LogError(
            f"program/{name} does not take or return the leaves that run.msgpack lists",
            why="the two files were not written by one recording",
            fix="restore both from a copy of the run",
        )
    here = jax.default_backend()
    if not {"gpu": {"cuda", "rocm"}}.get(here, {here}) & set(exported.platforms):
        raise IdentityError(
            f"the run was recorded on {'/'.join(exported.platforms)}; "
            f"this process computes on {here}",
            why="another kind of device has other arithmetic",
            fix="open the run on such a device; stored checkpoints can be read anywhere",
        )
    return exported


def custom_calls(exported: export.Exported) -> set[str]:
    """Return the targets of all custom calls in a program, and what would wait for a host."""
    found: set[str] = set()

    def walk(operation):
        if operation.name in _WAITING:
            found.add(operation.name)
        if "custom_call" in operation.name:
            found.add(ir.StringAttr(operation.attributes["call_target_name"]).value)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    walk(inner.operation)

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = mlir.deserialize_portable_artifact(exported.mlir_module_serialized, context)
        walk(module.operation)
    return found


def compile(
    exported: export.Exported, signature: Signature, name: str, *, donate: bool
) -> Callable[..., Any]:
    """Compile a program for its concrete shapes, donating the state if asked to.

    Gradients lie in memory as the compiler likes: who trains does not look at them, and those of
    attention would have to be turned at every step.

    The last few are kept: runs that carry one program, such as forks of a run, and a run that is
    opened again, share what is compiled of it.
    """
    key = (bytes(exported.mlir_module_serialized), signature, name, donate)
    with _COMPILING:
        if key not in _COMPILED:
            donated = tuple(range(len(signature.state))) if donate else ()
            results, grads = len(signature.results(name)), len(signature.grads)
            # On a device that is named: of arrays that are not committed to one, `jit` (jax 0.10.2)
            # ignores in what order they lie in memory, and computes with other numbers.
            free = Format(Layout.AUTO, SingleDeviceSharding(jax.devices()[0]))
            formats = [*[None] * (results - grads), *[free] * grads]
            formats = jax.tree.unflatten(exported.out_tree, formats)
            program = jax.jit(exported.call, donate_argnums=donated, out_shardings=formats)
            _COMPILED[key] = program.lower(*signature.arguments(name)).compile()
            while len(_COMPILED) > _MOST_COMPILED:
                _COMPILED.popitem(last=False)
        _COMPILED.move_to_end(key)
        return _COMPILED[key]


@functools.lru_cache(maxsize=64)
def jitted(
    name: str,
    data: bytes,
    signature: Signature,
    allow: tuple[str, ...],
    results: tuple[jax.ShapeDtypeStruct, ...] | None,
) -> Callable[..., Any]:
    """Return a program that observes, as `load` reads it; compiled once for all that carry it."""
    return jax.jit(load(name, data, signature, allow=allow, results=results).call)


def _struct(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _form(aval) -> tuple:
    return tuple(aval.shape), str(aval.dtype)


def _count(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{reprlib.repr(value)} is not a count below {limit}")
    return value


def _leaf(plain: Any) -> Leaf:
    shape = tuple(_count(n, 2**40) for n in plain["shape"])
    path, dtype, key = plain["path"], plain["dtype"], plain["key"]
    if type(path) is not str or type(dtype) is not str or not _NUMBERS.fullmatch(dtype):
        raise ValueError(f"{reprlib.repr(plain)} is not a leaf")
    if key is not None and (key != KEY_IMPLEMENTATION or dtype != "uint32" or shape[-1:] != (2,)):
        raise ValueError(f"{reprlib.repr(plain)} is not a random key")
    if len(shape) > 32:
        raise ValueError(f"an array of {len(shape)} dimensions")
    return Leaf(path, shape, str(jnp.dtype(dtype)), key)
