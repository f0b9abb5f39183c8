"""The one loop that executes steps exactly, to record and to replay.

An engine owns the compiled trajectory programs of a run. Recording and replaying hand it the same
stretches of inputs, so that whatever it computes it computes the same way both times.
"""

import contextlib
import functools
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Float, Int

from replay.artifact import Signature, compile
from replay.data import Data, checksum
from replay.errors import DataError
from replay.identity import fingerprint, settings_here, sha256
from replay.log import Log
from replay.tree import Leaf, copies

Item = TypeVar("Item")


class Stretch(NamedTuple):
    """Inputs of neighbouring steps, on the host. Steps `start + first` up to `start + stop`.

    Attributes:
        start: the step of row 0.
        first: first row to execute.
        stop: row after the last to execute.
        ids: `int32[rows, batch]`.
        weights: `float32[rows, batch]`; None where all are one.
        batch: leaves `[rows, batch, ...]`.
    """

    start: int
    first: int
    stop: int
    ids: np.ndarray
    weights: np.ndarray | None
    batch: Sequence[np.ndarray]

    @property
    def size(self) -> int:
        """How many steps are to be executed."""
        return self.stop - self.first

    @property
    def begin(self) -> int:
        """The first step."""
        return self.start + self.first

    def split(self, count: int) -> tuple["Stretch", "Stretch"]:
        """Return the first `count` steps and the rest."""
        middle = self.first + count
        return self._replace(stop=middle), self._replace(first=middle)


class Executed(NamedTuple):
    """What the steps of one call have computed.

    Attributes:
        start: the first step.
        count: how many; one unless a whole block ran at once.
        losses: `[batch]` of one step, or `[count, batch]` of a block.
        aux: `[]` or `[batch]` each, for a block with a leading axis.
        grads: of the last step; None where nobody observes it.
        before: the state before; None if it was donated.
        after: the state after the last step.
    """

    start: int
    count: int
    losses: Any
    aux: Sequence[Any]
    grads: Any
    before: Any
    after: Any


class Engine(Protocol):
    """What moves a state, in this process or in another."""

    def load(self, leaves: Sequence[Any]) -> Any:
        """Take raw leaves (copied) as a state."""
        ...

    def advance(self, state: Any, stretch: Stretch) -> Iterator[Executed]:
        """Execute the steps of a stretch, one by one or at once."""
        ...

    def fingerprint(self, state: Any) -> Any:
        """Return the fingerprint of a state, `uint32[leaves, 2]`."""
        ...

    def fetch(self, state: Any, into: Sequence[Any] | None = None) -> Sequence[Any]:
        """Return the raw leaves of a state, valid whatever happens to the state later.

        `into` are leaves fetched before, which nobody reads any more: their memory may be taken.
        """
        ...


class LocalEngine:
    """The trajectory programs compiled in this process.

    Args:
        signature: their leaves.
        exported: the loaded programs by name.
        key: the run's key data, two `uint32`.
        keep: whether every state stays valid, for observers; else each step donates the last.

    Attributes:
        observed: whether gradients are handed out although states are not kept; blocks are then
            run step by step. It changes no program.
    """

    def __init__(
        self,
        signature: Signature,
        exported: Mapping[str, export.Exported],
        key: Sequence[int],
        *,
        keep: bool,
    ):
        self._signature, self._keep, self.observed = signature, keep, keep
        self._key = jnp.asarray(np.asarray(key, np.uint32))
        size = (signature.block,) * bool(signature.block) + (signature.batch_size,)
        self._ones = jnp.ones(size, jnp.float32)
        self._programs = {
            name: compile(exported[name], signature, name, donate=not keep)
            for name in signature.programs
        }
        self._fingerprint, self._copy = _of_states(signature.state)

    def load(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """Take raw leaves as a state; a copy, because the next step may donate it.

        Committed to a device, as what a program returns: `jit` would compile an observer twice.
        """
        copies = [jnp.array(leaf, copy=True) for leaf in leaves]
        return jax.device_put(copies, jax.devices()[0])

    def fingerprint(self, state: Sequence[jax.Array]) -> jax.Array:
        """Return the fingerprint of a state, still being computed."""
        return self._fingerprint(list(state))

    def fetch(
        self, state: Sequence[jax.Array], into: Sequence[jax.Array] | None = None
    ) -> list[jax.Array]:
        """Return a copy of the leaves, still being computed; several times faster into memory."""
        if into is None:
            return self._copy(list(state))
        return _copier(self._signature.state)(list(state), list(into))

    def advance(self, state: list[jax.Array], stretch: Stretch) -> Iterator[Executed]:
        """Execute the steps of a stretch."""
        if self._signature.block:
            return self._by_block(state, stretch)
        return self._by_step(state, stretch)

    def operations(self) -> float:
        """Return how many operations the compiler counts in a call, loops counted once."""
        costs = [program.cost_analysis() or {} for program in self._programs.values()]
        return float(sum(cost.get("flops", 0.0) for cost in costs))

    def optimized(self) -> dict[str, str]:
        """Return a hash of the optimized HLO of each program, for the identity of the run.

        Without the places in the code that led to it: they differ from process to process.
        """
        texts = {name: program.as_text() or "" for name, program in self._programs.items()}
        return {name: sha256(_PLACES.sub("", text).encode()) for name, text in texts.items()}

    def _by_step(self, state: list[jax.Array], stretch: Stretch) -> Iterator[Executed]:
        step, count = self._programs["step"], len(self._signature.state)
        start, first, stop, ids, weights, batch = stretch
        signature, key, ones = self._signature, self._key, self._ones
        to_grads = count + 1 + len(signature.aux)
        for i in range(first, stop):
            results = step(
                *state,
                key,
                np.uint32(start + i),
                ids[i],
                ones if weights is None else weights[i],
                *[leaf[i] for leaf in batch],
            )
            after, losses, aux = results[:count], results[count], results[count + 1 : to_grads]
            # Whom nobody observes, nobody holds: the gradients of a step are gone before the next.
            grads = self._in_rows(results[to_grads:]) if self.observed else None
            before = state if self._keep else None
            state, results = after, None
            yield Executed(start + i, 1, losses, aux, grads, before, after)
            grads = before = after = None

    @functools.cached_property
    def _turned(self) -> list[int]:
        """Which gradients do not lie in memory row by row."""
        (program,) = self._programs.values()
        found = list(program.output_formats)
        found = found[len(found) - len(self._signature.grads) :]
        orders = [tuple(format.layout.major_to_minor) for format in found]
        return [i for i, order in enumerate(orders) if order != tuple(range(len(order)))]

    def _in_rows(self, grads: Sequence[jax.Array]) -> list[jax.Array]:
        """Return gradients as observers know arrays, however the program has laid them out."""
        grads = list(grads)
        copied = _copied([grads[i] for i in self._turned]) if self._turned else ()
        for i, leaf in zip(self._turned, copied, strict=True):
            grads[i] = leaf
        return grads

    def _by_block(self, state: list[jax.Array], stretch: Stretch) -> Iterator[Executed]:
        """Run a whole stretch in one call, or, for observers, the same program step by step."""
        block, start = self._programs["block"], np.uint32(stretch.start)
        count, reported = len(self._signature.state), 1 + len(self._signature.aux)
        weights = self._ones if stretch.weights is None else stretch.weights
        staged = [stretch.ids, weights, *stretch.batch]
        if self.observed:
            staged = [jnp.asarray(leaf) for leaf in staged]
        size = 1 if self.observed else max(stretch.size, 1)
        for first in range(stretch.first, stretch.stop, size):
            rows = (np.int32(first), np.int32(first + size))
            results = block(*state, self._key, start, *rows, *staged)
            after, rest = results[:count], results[count:]
            losses, *aux = rest[:reported]
            grads = self._in_rows(rest[reported:]) if self.observed else None
            if self._keep:
                losses, *aux = (np.asarray(x)[first] for x in (losses, *aux))
            elif first or self.observed or size < self._signature.block:
                losses, *aux = (_Rows(x, first, first + size) for x in (losses, *aux))
            before = state if self._keep else None
            state, results, rest = after, None, None
            yield Executed(stretch.start + first, size, losses, aux, grads, before, after)
            grads = before = after = None


_copied = jax.jit(copies)

# The tables of files, functions and frames before the computations, and what refers to them.
_PLACES = re.compile(
    r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:\d+ .*\n)*"
    r'|, metadata=\{(?:"[^"]*"|[^}"])*\}',
    re.MULTILINE,
)


@functools.lru_cache(maxsize=16)
def _of_states(leaves: tuple[Leaf, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what takes the fingerprint of a state, and what copies one.

    Compiled here, because `jit` would compile twice, for the leaves that `load` makes and for those
    that a program returns: the second time in the middle of the training.
    """
    state = [leaf.struct for leaf in leaves]
    copy = jax.jit(copies)
    return jax.jit(fingerprint).lower(state).compile(), copy.lower(state).compile()


@functools.lru_cache(maxsize=16)
def _copier(leaves: tuple[Leaf, ...]) -> Callable[..., Any]:
    """Return what copies a state into the memory of another."""
    state = [leaf.struct for leaf in leaves]
    return jax.jit(copies, donate_argnums=1, keep_unused=True).lower(state, state).compile()


class _Rows(NamedTuple):
    """Some rows of a stacked result, cut out on the host when somebody waits for them."""

    stack: Any
    first: int
    stop: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.stack, dtype)[self.first : self.stop]


def stage(
    read: Callable[[int, int], Stretch], cuts: Iterable[tuple[int, int]], *, ahead: int = 2
) -> Generator[Stretch, None, None]:
    """Read stretches in a thread, a few ahead of the loop that executes them.

    Args:
        read: reads the inputs of steps `[a, b)`.
        cuts: the neighbouring `(a, b)` to read.
        ahead: how many stretches may lie ready.
    """
    return prefetch((read(start, stop) for start, stop in cuts), ahead, name="replay-stage")


def prefetch(
    items: Generator[Item, None, None], size: int, *, name: str, wait: bool = False
) -> Generator[Item, None, None]:
    """Make items in a thread, ahead of who takes them.

    Args:
        items: what is made; closed by the thread.
        size: how many may lie ready.
        name: of the thread.
        wait: whether to wait, where somebody takes no more of them, until none is made any more.
    """
    ready: queue.Queue = queue.Queue(maxsize=size)
    stopped, settings = threading.Event(), settings_here()

    def put(item) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return not stopped.is_set()
        return False

    def work():
        try:
            with settings(), contextlib.closing(items):
                for item in items:
                    if not put((item,)):
                        return
                    item = None  # who takes it holds it
            put(None)
        except BaseException as error:  # raised again where the item was wanted
            put(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    found = None
    try:
        thread.start()
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            (item,), found = found, None
            yield item
            item = None
    finally:
        del found  # an error holds what its frames hold, this one among them
        stopped.set()
        with contextlib.suppress(queue.Empty):
            while wait:
                ready.get_nowait()  # whoever waits for room sees at once that he is stopped
        if wait and thread.is_alive() and thread is not threading.current_thread():
            thread.join()


def cuts(
    start: int, stop: int, size: int, *, every: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cut steps `[start, stop)` at multiples of `size` and of `every`, counted from step 0.

    >>> list(cuts(3, 20, 8, every=10))
    [(3, 8), (8, 10), (10, 16), (16, 20)]
    """
    while start < stop:
        end = (start // size + 1) * size
        if every:
            end = min(end, (start // every + 1) * every)
        yield start, min(end, stop)
        start = end


def stretch_of(
    signature: Signature,
    start: int,
    ids: Int[np.ndarray, "steps batch"],
    weights: Float[np.ndarray, "steps batch"] | None,
    batch: Sequence[np.ndarray],
) -> Stretch:
    """Make a stretch of steps from `start` on, padded to a whole block where there are blocks."""
    count = len(ids)
    if weights is not None and (weights == 1).all():
        weights = None
    short = signature.block - count

    def fill(rows):
        return np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)])

    if short > 0:
        ids, batch = fill(ids), [fill(leaf) for leaf in batch]
        weights = None if weights is None else fill(weights)
    return Stretch(start, 0, count, ids, weights, batch)


def staged_steps(signature: Signature) -> int:
    """Return how many steps are staged together."""
    each = signature.batch_size * sum(leaf.nbytes for leaf in signature.batch)
    return signature.block or steps_at_once(each)


def steps_at_once(batch_bytes: int) -> int:
    """Return how many batches of this size are staged together: 64, or what fits in 16 MiB."""
    return max(1, min(64, 2**24 // max(batch_bytes, 1)))


def read_stretch(log: Log, data: Data | None, start: int, stop: int) -> Stretch:
    """Read the inputs of logged steps, checking external data against what was logged.

    Raises:
        DataError: a batch is not what it was when the run was recorded, or no data is at hand.
    """
    header, ids = log.header, log.ids(start, stop)
    weights = log.column("weights", start, stop) if log.has_column("weights") else None
    if header.data == "spooled":
        batch = log.spooled(start, stop)
    elif data is None:
        raise DataError(
            f"{log.place} does not hold its data, and none was given",
            why="a step is replayed on the batch it was trained on",
            fix=f"replay.open({str(log.place)!r}, data=...), or --data FILE.npz for a command",
        )
    else:
        batch = data.leaves(ids)
    if log.has_column("batch_crc32c"):
        differ = np.flatnonzero(checksums(batch) != log.column("batch_crc32c", start, stop))
        if len(differ):
            step = start + int(differ[0])
            raise DataError(
                f"the data has changed: the batch of step {step} (samples "
                f"{ids[differ[0]][:8].tolist()}, ...) has other content than when it was recorded",
                why="a step is replayed on the bits it was trained on",
                fix="pass the data as it was, in the same order and preprocessing",
            )
    return stretch_of(header.signature, start, ids, weights, batch)


def checksums(batches: Sequence[np.ndarray]) -> np.ndarray:
    """Return the crc32c of each batch, `uint32[steps]`, from leaves `[steps, batch, ...]`."""
    steps = len(batches[0])
    return np.array([checksum([leaf[i] for leaf in batches]) for i in range(steps)], np.uint32)
