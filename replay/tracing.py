"""What a run carries of a program: traced once, whoever records it or compares it with a record."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from replay import artifact
from replay.activations import Tagged, tagged
from replay.artifact import KEY_IMPLEMENTATION, Signature, describe
from replay.data import Data
from replay.errors import IdentityError
from replay.grads.archive import Tapped, tapped
from replay.identity import environment, setting, settings
from replay.log import Log
from replay.program import Inputs, Program


class Traced(NamedTuple):
    """The programs of a run.

    Attributes:
        signature: the leaves that they take and return.
        exported: by name.
        files: what is archived of them.
        table: the entries that vouch for the files.
    """

    signature: Signature
    exported: dict[str, export.Exported]
    files: dict[str, bytes]
    table: dict[str, dict[str, Any]]

    @property
    def texts(self) -> dict[str, str]:
        """Hashes of what the programs compute."""
        return {name: entry["text"] for name, entry in self.table.items()}


def start(program: Program, key: Any) -> Any:
    """Return state 0, by an executable that is compiled once for each program.

    Weights that were given as arrays are read anew: somebody may have changed them in place.
    """
    if program.pretrained:
        return jax.jit(lambda key: program.init(key))(key)  # JAX knows no function that is new
    if "init" not in program.kept:
        program.kept["init"] = jax.jit(program.init)
    return program.kept["init"](key)


def trace(
    program: Program,
    state: Any,
    example: Any,
    *,
    batch_size: int,
    block: int,
    observed: bool,
    anew: bool = False,
) -> Traced:
    """Export the programs of a run, as `artifact.trace`, and keep them with the program.

    As with `jax.jit`, what a loss reads beside its arguments is read when it is traced first.

    Args:
        program: what is trained.
        state: state 0, or its shapes.
        example: a batch of the data, leaves with a leading axis of any length.
        batch_size: B.
        block: steps in one call of the block program; 0 for dispatch by step.
        observed: also export what observes a step: factors of per-sample gradients, and tagged
            intermediates.
        anew: trace even what is kept, and keep nothing.
    """
    forms = [(jax.tree.structure(tree), describe(tree)) for tree in (state, _one_of(example))]
    key = (*forms, batch_size, block, repr((environment(), settings())))
    for more in () if anew else (True, observed):
        if (found := program.kept.get((*key, more))) is not None:
            return found
    more = _observers(program, state, example, batch_size) if observed else {}
    signature, exported = artifact.trace(
        program, state, example, batch_size=batch_size, block=block, more=more
    )
    files, table = artifact.archived(exported)
    for name, observer in more.items():
        table[name]["table"] = observer.table
    found = Traced(signature, exported, files, table)
    if not anew:
        program.kept[(*key, observed)] = found
    return found


def state_tree(program: Program) -> Any:
    """Return the tree structure of a program's state."""
    return jax.tree.structure(_state_form(program))


def check_program(program: Program, log: Log, data: Data) -> None:
    """Compare a program with the archived one.

    Raises:
        IdentityError: they differ; the message names the leaf or the line.
    """
    header = log.header
    signature, exported, *_ = trace(
        program,
        _state_form(program),
        data.fetch(np.zeros(1, np.int32)),
        batch_size=header.signature.batch_size,
        block=header.signature.block,
        observed=False,
        anew=True,  # what it computes now, not what it computed when it was recorded
    )
    what = _first_difference(signature, header.signature)
    for name in () if what else header.signature.programs:
        # The text of the file itself: the hash in the header is only what somebody claims.
        archived = artifact.load(name, log.program(name), header.signature, allow=None)
        here, there = artifact.text(exported[name]), artifact.text(archived)
        if here != there:
            lines = zip(here.splitlines(), there.splitlines(), strict=False)
            differing = next((pair for pair in lines if pair[0] != pair[1]), ("more", "less"))
            what = f"{name} has {differing[0].strip()[:160]!r} where the run has "
            what += repr(differing[1].strip()[:160])
            break
    if what:
        raise IdentityError(
            f"the program is not the one in {log.place}: {what}",
            why="another program computes other weights",
            fix="open the run without program=: it carries its own; or check out the code (and "
            "the versions of jax, flax and optax) that recorded it",
        )


def _state_form(program: Program) -> Any:
    name = ("state", setting("jax_enable_x64"))
    if name not in program.kept:
        key = jax.eval_shape(lambda: jax.random.key(0))
        program.kept[name] = jax.eval_shape(program.init, key)
    return program.kept[name]


def _one_of(example: Any) -> Any:
    """Return the forms of one sample of a batch."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), example)


def _observers(
    program: Program, state: Any, example: Any, batch_size: int
) -> dict[str, Tapped | Tagged]:
    """Return what else observes a step: factors of per-sample gradients, tagged intermediates."""

    def inputs(key, batch):
        weights = jnp.ones(batch_size, jnp.float32)
        return Inputs.fold(key, jnp.uint32(0), jnp.zeros(batch_size, jnp.int32), weights, batch)

    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), example
    )
    key = jax.eval_shape(lambda: jax.random.key(0, impl=KEY_IMPLEMENTATION))
    given = jax.eval_shape(inputs, key, rows)
    found = {
        name: make(program, state, given)
        for name, make in (("factors", tapped), ("activations", tagged))
    }
    return {name: observer for name, observer in found.items() if observer is not None}


def _first_difference(here: Signature, there: Signature) -> str:
    for part in ("state", "batch", "aux", "grads", "carry", "losses"):
        mine, theirs = getattr(here, part), getattr(there, part)
        for a, b in zip(mine, theirs, strict=False):
            if a != b:
                return f"{part} has {a}, the run has {b}"
        if len(mine) != len(theirs):
            return f"{part} has {len(mine)} leaves, the run has {len(theirs)}"
    return ""
