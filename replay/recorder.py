"""How a recording begins: what is checked, written and compiled before the first step."""

import contextlib
import operator
import os
import reprlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from replay import artifact
from replay.artifact import KEY_IMPLEMENTATION
from replay.checkpoints import Checkpoints, Schedule
from replay.data import Data, checksum
from replay.errors import DataError, IdentityError, LogError, OrderError, ProgramError
from replay.identity import environment
from replay.indexing import LEVELS, Observer, default_level
from replay.log import HEADER, Header, Log, clear_torn, create, discard_unborn, layouts
from replay.order import Order
from replay.program import Program, init_key
from replay.recording import Recording
from replay.selftest import SelfTest
from replay.store import Place
from replay.tracing import check_program, start, state_tree, trace
from replay.trajectory import (
    LocalEngine,
    Stretch,
    cuts,
    read_stretch,
    stage,
    staged_steps,
    steps_at_once,
    stretch_of,
)
from replay.tree import lift, lower

EMBED_LIMIT = 64 * 2**20

# A fed run does not know its length; this only bounds the logical shape of its arrays.
_MOST_FED_STEPS = 2**31


class Recorder:
    """Records a training loop of your own.

    Args:
        path: the run directory, or the URL of a TensorStore key-value store.
        program: what is trained.
        data: the samples, anything that `Data.of` takes; None to `feed` batches instead.
        order: which samples make which batch; None to `feed`.
        key: a typed key, `jax.random.key(seed)`; every random number of the run derives from it.
        dispatch: `step` (one call a step), or `block` (one program for many steps, for steps
            well below a millisecond). The bits of a run depend on it, so it is never chosen by
            timing.
        like: a run whose form of dispatch is taken over instead.
        checkpoints: a `Checkpoints` policy, or a number of steps; twenty segments by default.
        sample_weights: `float[samples]`, factors of the losses; ones by default.
        index: what is logged of every step, so that questions need not replay it: `off`;
            `scalars` (norms, maxima, how many gradients exceed powers of two); `rows` (also how far
            rows and columns moved between stored states); `weights` (how far each weight did). By
            default `scalars` where a step computes so much for each weight that they cost about a
            hundredth of it, else `off`. A run that is resumed keeps its own.
        log_ids: keep the realised sample ids; else only the order and a checksum.
        embed: keep the data in the run; by default data of up to 64 MiB.
        resume: continue the run at `path` to the bits it would have had, or start it.
        on_log_error: `warn` goes on training when the log cannot be written, `raise` stops.
        self_test: execute the first steps a second time, here and in a fresh process, trace the
            program a second time, and say loudly if anything differs.
        commit_steps: steps after which what was computed is made durable, at the latest.
        commit_seconds: seconds after which it is, at the latest.

    Attributes:
        path: where the run lies.

    Raises:
        LogError: the path holds a run already, or somebody else records there.
        ProgramError, DataError, OrderError: they cannot be recorded, or not together.
        IdentityError: with `resume`, something is not what the run was recorded with.

    Example::

        with replay.Recorder("runs/x", program, data, order, key=key) as recorder:
            while recorder.advance(500):
                recorder.log(accuracy=evaluate(recorder.params))
    """

    def __init__(
        self,
        path: str | os.PathLike,
        program: Program,
        data: Any = None,
        order: Order | None = None,
        *,
        key: Key[Array, ""],
        dispatch: str = "step",
        like: Any = None,
        checkpoints: Checkpoints | int | None = None,
        sample_weights: Float[Array, " samples"] | None = None,
        index: str | None = None,
        log_ids: bool = True,
        embed: bool | None = None,
        resume: bool = False,
        on_log_error: str = "warn",
        self_test: bool = True,
        commit_steps: int = 1024,
        commit_seconds: float = 10.0,
    ):
        _check_choice("dispatch", dispatch, ("step", "block"))
        if index is not None:
            _check_choice("index", index, LEVELS)
        _check_choice("on_log_error", on_log_error, ("warn", "raise"))
        if (data is None) != (order is None):
            raise OrderError(
                f"a recorder was given {'an order' if data is None else 'data'} alone",
                why="an order addresses the samples of data",
                fix="pass both, or neither and hand over batches with recorder.feed(batch)",
            )
        self.path = os.fspath(path)
        self._place, self._program, self._resume = Place(path), program, resume
        self._key = key_words(key)
        self._data = None if data is None else Data.of(data)
        self._order = None
        if order is not None and not isinstance(order, Order):
            raise OrderError(
                f"order is a {type(order).__name__}",
                why="an order says for every step which samples make its batch",
                fix="replay.Order.shuffled(batch_size, epochs, seed), or .explicit(ids)",
            )
        if order is not None and self._data is not None:
            self._order = order.bind(len(self._data))
            if not len(self._order):
                raise OrderError(
                    f"{self._order!r} has no steps",
                    why="there is nothing to record",
                    fix="use a smaller batch_size, more epochs, or pad=True",
                )
        self._sample_weights = _factors(sample_weights, self._data)
        self._by_block = dispatch == "block" if like is None else like.dispatch == "block"
        if self._by_block and self._data is None:
            raise ProgramError(
                "batches that are fed one by one cannot be dispatched by block",
                why="a block is staged before it runs",
                fix='dispatch="step"',
            )
        self._checkpoints = Checkpoints.of(checkpoints, self.steps)
        self._embed, self._log_ids, self._index = embed, log_ids, index
        self._self_test = self_test
        self._commit = {"commit_steps": commit_steps, "commit_seconds": commit_seconds}
        self._commit["on_log_error"] = on_log_error
        self._exit = contextlib.ExitStack()
        self._recording: Recording | None = None
        self._pending: Stretch | None = None
        self._unchecked = self._entered = False

    @property
    def step(self) -> int:
        """Number of steps taken, which is the number of the state reached."""
        return 0 if self._recording is None else self._recording.step

    @property
    def steps(self) -> int | None:
        """Planned number of steps; None for a run that is fed."""
        return None if self._order is None else len(self._order)

    @property
    def state(self) -> Any:
        """The state reached: a copy of its own that later steps leave alone."""
        recording = self._open()
        raw = recording.engine.fetch(recording.state)
        return lift(raw, self._signature.state, self._tree)

    @property
    def params(self) -> PyTree:
        """The weights reached: a copy of their own that later steps leave alone."""
        return self.state.params

    @property
    def loss(self) -> float:
        """Unweighted mean loss of the last step, waited for; NaN before the first."""
        last = self._open().last
        if last is None:
            return float("nan")
        return float(np.atleast_2d(np.asarray(last.losses, np.float64))[-1].mean())

    def log(self, **metrics: float) -> None:
        """Log numbers at the present step; they become columns of the run, empty elsewhere.

        Raises:
            LogError: a value is not a number.
        """
        values = {}
        for name, value in metrics.items():
            shape = np.shape(value)
            try:
                values[name] = float(value) if shape == () else None
            except (TypeError, ValueError):
                values[name] = None
            if values[name] is None:
                raise LogError(
                    f"metric {name!r} "
                    + (f"has shape {list(shape)}" if shape else f"is {reprlib.repr(value)}"),
                    why="metrics are columns with one number for a step",
                    fix="log scalars; arrays can be recomputed from the run at any time",
                )
        self._under_way().measure(values)

    def advance(self, steps: int | None = None) -> bool:
        """Train for some steps, or to the end of the order.

        Returns:
            Whether any step was taken: False once the order is at its end.
        """
        if self._order is None:
            raise OrderError(
                "this recorder has no order to advance in",
                why="it was made without data, to be fed",
                fix="for batch in loader: recorder.feed(batch)",
            )
        recording = self._under_way()
        begin, total = recording.step, len(self._order)
        target = total if steps is None else min(begin + operator.index(steps), total)
        while recording.step < target:
            stretch = self._pending if self._pending is not None else next(self._staged, None)
            if stretch is None:
                raise self._interrupted()
            stretch, rest = stretch.split(min(stretch.size, target - recording.step))
            self._pending = rest if rest.size else None
            recording.execute(stretch)
        return recording.step > begin

    def feed(
        self,
        batch: PyTree,
        ids: Int[Array, " batch"] | None = None,
        weights: Float[Array, " batch"] | None = None,
    ) -> None:
        """Take one step on a batch that comes from elsewhere, and keep the batch in the run.

        Args:
            batch: arrays with a leading batch axis, of the same shapes at every step.
            ids: `int[batch]`, the sample ids; by default the running number of the occurrence.
            weights: `float[batch]`, factors of the losses; ones by default.

        Raises:
            DataError: the batch has other leaves than the first one, or ids or weights do not
                fit it.
        """
        if self._order is not None:
            raise OrderError(
                "this recorder reads its batches from data by an order",
                why="a step either follows the order or is fed",
                fix="recorder.advance(), or make the recorder without data and order",
            )
        fed = Data.of(batch)
        if self._entered and self._recording is None:
            self._begin(fed, len(fed))
            each = len(fed) * sum(leaf.nbytes for leaf in fed.spec)
            print(f"replay: every batch is kept in {self.path}, {each:,} bytes before compression")
        elif self._unchecked:
            check_program(self._program, self._under_way().log, fed)
        recording = self._under_way()
        self._unchecked = False
        size, step = self._signature.batch_size, self.step
        if fed.spec != self._signature.batch or len(fed) != size:
            raise DataError(
                f"the batch of step {step} is {fed!r}; the run has batches of {size} samples of "
                + ", ".join(map(str, self._signature.batch)),
                why="the program is compiled for one shape of batch",
                fix="pad the batch and give the padding weight 0: feed(batch, weights=...)",
            )
        running = (np.arange(size) + step * size) % (2**31 - 1)
        rows = np.asarray(running if ids is None else ids)
        if (
            rows.shape != (size,)
            or rows.dtype.kind not in "iu"
            or not -1 <= rows.min() <= rows.max() < 2**31
        ):
            raise DataError(
                f"the ids of step {step} are {reprlib.repr(rows.tolist())}",
                why=f"they are one integer for each of the {size} samples; -1 stands for padding",
                fix="pass int[batch], or leave ids out: the samples are then counted",
            )
        factors = None if weights is None else np.asarray(weights, np.float32)
        if factors is not None and (factors.shape != (size,) or not np.isfinite(factors).all()):
            raise DataError(
                f"the weights of step {step} are {reprlib.repr(factors.tolist())}",
                why=f"they are one finite factor for each of the {size} samples",
                fix="pass float[batch], with 0 for padding",
            )
        rows, factors = rows.astype(np.int32)[None], None if factors is None else factors[None]
        leaves = [leaf[None] for leaf in fed.leaves(np.arange(size))]
        recording.execute(Stretch(step, 0, 1, rows, factors, leaves))

    def __enter__(self) -> "Recorder":
        """Lock the run and write all that is known before the first step."""
        self._exit.enter_context(self._place.lock())
        self._recording, self._pending = None, None
        try:
            if self._resume:
                discard_unborn(self._place)
            if self._order is not None and self._data is not None:
                self._begin(self._data, self._order.batch_size)
            elif self._resume and self._place.size(HEADER) is not None:
                self._begin(None, 0)
        except BaseException:
            self._exit.close()
            raise
        self._entered = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Store the state reached and wait until the log is durable."""
        self._entered = False
        try:
            if self._recording is not None:
                self._recording.close(complete=kind is None)
        finally:
            self._exit.close()

    def __repr__(self) -> str:
        of = "" if self.steps is None else f" of {self.steps}"
        return f"<Recorder {self.path}: {self._program.name}, step {self.step}{of}>"

    def _open(self) -> Recording:
        if self._recording is None:
            raise LogError(
                f"{self.path} is not being recorded yet",
                why="a recorder holds a lock and a thread, which must end with it",
                fix="with replay.Recorder(...) as recorder: ..."
                + ("" if self._order else " and feed a first batch"),
            )
        if not self._recording.intact:
            raise self._interrupted()
        return self._recording

    def _under_way(self) -> Recording:
        if not self._entered and self._recording is not None:
            raise LogError(
                f"{self.path} is no longer being recorded",
                why="its recorder has given up the lock and the thread that write to it",
                fix="take it up again: with replay.Recorder(..., resume=True) as recorder: ...",
            )
        return self._open()

    def _interrupted(self) -> LogError:
        return LogError(
            f"{self.path}: what follows state {self.step} was interrupted half way",
            why="a batch that could not be read, or steps of which nobody knows how many were "
            "taken, would be missing from the run",
            fix="leave the with block and take the run up again with resume=True",
        )

    def _begin(self, data: Data | None, batch_size: int) -> None:
        if self._resume and self._place.size(HEADER) is not None:
            log = self._reopen(data)
            start = max(log.durable.checkpoints)
            leaves: Sequence[Any] = log.checkpoint(start)
            test = None
        else:
            assert data is not None
            log, leaves, test = self._create(data, batch_size)
            start = 0
        schedule = Schedule(
            self._checkpoints,
            steps=self.steps,
            state_bytes=sum(leaf.nbytes for leaf in self._signature.state),
            start=start,
            stored=tuple(log.durable.checkpoints),
        )
        level = log.header.index
        recording = Recording(
            log,
            self._engine,
            leaves,
            start=start,
            schedule=schedule,
            observer=None if level == "off" else Observer(self._signature, level),
            **self._commit,
        )
        self._recording = recording
        self._exit.callback(recording.writer.stop)
        if self._order is not None:
            size = staged_steps(self._signature)
            pieces = cuts(start, len(self._order), size, every=schedule.every)
            self._staged = stage(self._read, pieces)
            self._exit.callback(self._staged.close)
            if test is not None and self._self_test:
                self._pending = next(self._staged)
                recording.test = test(self._pending)
        for step in range(start, log.durable.steps) if self._order is None else ():
            recording.execute(read_stretch(log, None, step, step + 1))

    def _create(self, data: Data, batch_size: int):
        fed, order = self._order is None, self._order
        key = jax.random.wrap_key_data(jnp.asarray(self._key, jnp.uint32), impl=KEY_IMPLEMENTATION)
        state = start(self._program, init_key(key))
        example = data.fetch(np.zeros(1, np.int32))
        each = batch_size * sum(leaf.nbytes for leaf in data.spec)
        block = steps_at_once(each) if self._by_block else 0

        forms = {"batch_size": batch_size, "block": block, "observed": True}
        traced = trace(self._program, state, example, **forms)
        self._signature, files = traced.signature, traced.files
        self._tree, leaves = jax.tree.structure(state), lower(state)
        programs = {name: dict(entry) for name, entry in traced.table.items()}
        texts = {name: entry["text"] for name, entry in programs.items()}
        for name, optimized in self._compile(files, self._index).items():
            programs[name]["optimized"] = optimized
        index = self._index
        if index is None:
            index = default_level(self._engine.operations(), self._signature)
            self._engine.observed = index != "off"
        embed = not fed and (data.nbytes <= EMBED_LIMIT if self._embed is None else self._embed)
        if embed:
            self._data = data = data.in_memory()
        steps = len(order) if order is not None else _MOST_FED_STEPS
        header = Header(
            name=self._program.name,
            created=time.time(),
            key=self._key,
            signature=self._signature,
            programs=programs,
            environment=environment(),
            order=None if order is None else [order.spec(), order.samples],
            order_checksum=None if order is None or self._log_ids else order.checksum(),
            steps=steps,
            data="spooled" if fed else "embedded" if embed else "external",
            fingerprint=None if fed else data.fingerprint(),
            sample_weights=self._weights_checksum,
            factors=None
            if self._sample_weights is None
            else self._sample_weights.astype("<f4").tobytes(),
            arrays=layouts(
                self._signature,
                steps,
                ids=self._log_ids or fed,
                weights=order is None or order.weighted or self._sample_weights is not None,
                batch_checksums=not fed and not embed,
                samples=len(data) if embed else 0,
                spool=fed,
                index=index,
            ),
        )
        create(self._place, header, files, data.arrays if embed else None)

        def test(stretch: Stretch) -> SelfTest:
            return SelfTest(
                self._engine,
                leaves,
                stretch,
                signature=self._signature,
                files={name: files[name] for name in self._signature.programs},
                key=self._key,
                texts=texts,
                retrace=lambda: trace(self._program, state, example, **forms, anew=True).texts,
            )

        return Log(self._place), leaves, test

    def _reopen(self, data: Data | None) -> Log:
        log = Log(self._place)
        header = log.header
        if header.parent is not None:
            raise LogError(
                f"{self.path} is a fork, which no recorder takes up",
                why="it is trained by the archived programs of its parent",
                fix=f"replay.open({self.path!r}).resume(), or replay fork {self.path}",
            )
        if not log.durable.checkpoints:
            raise LogError(
                f"{self.path} holds no state to resume from: journal.msgpack names none",
                why="there are steps or later states, so the journal was lost",
                fix="restore the file from a copy of the run, or delete the directory and record "
                "again",
            )
        if self._key != header.key:
            raise IdentityError(
                f"the key is {list(self._key)}, the run has {list(header.key)}",
                why="every random number of the run derives from it",
                fix="resume with the key that the run was recorded with",
            )
        order = None if self._order is None else [self._order.spec(), self._order.samples]
        if order != header.order:
            recorded = log.order
            raise IdentityError(
                f"the order is {self._order!r}, the run has {recorded!r}",
                why="the remaining steps would see other samples",
                fix="resume with the order that the run was recorded with",
            )
        if self._weights_checksum != header.sample_weights:
            raise IdentityError(
                "sample_weights are not those of the run",
                why="the remaining steps would weight their samples otherwise",
                fix="resume with the sample_weights that the run was recorded with"
                + (": none" if header.sample_weights is None else ""),
            )
        self._signature = header.signature
        self._tree = state_tree(self._program)
        if data is not None:
            data.check(header.fingerprint)
            check_program(self._program, log, data)
            if header.data == "embedded":
                data = data.in_memory()
                data.check_arrays(log.embedded())
            self._data = data
        self._unchecked = data is None
        files = {name: log.program(name) for name in self._signature.programs}
        self._compile(files, header.index)
        clear_torn(log)
        return log

    @property
    def _weights_checksum(self) -> int | None:
        return None if self._sample_weights is None else checksum([self._sample_weights])

    def _compile(self, files: dict[str, bytes], index: str | None) -> dict[str, str]:
        """Compile what the run carries, so that recording and replay execute the same program."""
        loaded = {
            name: artifact.load(name, files[name], self._signature, allow=None)
            for name in self._signature.programs
        }
        self._engine = LocalEngine(self._signature, loaded, self._key, keep=False)
        self._engine.observed = index not in (None, "off")
        return self._engine.optimized()

    def _read(self, start: int, stop: int) -> Stretch:
        assert self._order is not None and self._data is not None
        ids, weights = self._order.batches(start, stop)
        if self._sample_weights is not None:
            weights = weights * self._sample_weights[np.maximum(ids, 0)]
        return stretch_of(self._signature, start, ids, weights, self._data.leaves(ids))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LogError(
            f"{name}={value!r}",
            why=f"it is one of {', '.join(map(repr, choices))}",
            fix=f"{name}={choices[0]!r}",
        )


def key_words(key: Any) -> tuple[int, int]:
    """Return the two words of a typed threefry key."""
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape != ():
        what = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)[:60]
        raise ProgramError(
            f"key is {what}, not one typed key",
            why="the keys of all steps and samples are folded from it, by its implementation",
            fix="key=jax.random.key(0); an old-style key: jax.random.wrap_key_data(key)",
        )
    name = str(jax.random.key_impl(key))
    if name != KEY_IMPLEMENTATION:
        raise ProgramError(
            f"the key is of the implementation {name!r}",
            why="its random numbers depend on the device and the compiler, so that a replay "
            "elsewhere would draw others",
            fix=f"jax.random.key(seed, impl={KEY_IMPLEMENTATION!r})",
        )
    first, second = np.asarray(jax.random.key_data(key)).tolist()
    return first, second


def _factors(sample_weights: Any, data: Data | None) -> np.ndarray | None:
    if sample_weights is None:
        return None
    values = np.asarray(sample_weights, np.float32)
    if data is None or values.shape != (len(data),) or not np.isfinite(values).all():
        raise DataError(
            f"sample_weights has shape {list(values.shape)}"
            + ("" if np.isfinite(values).all() else " and values that are not finite"),
            why=f"there is one factor for each of the {0 if data is None else len(data)} samples",
            fix="pass float[len(data)], or feed(batch, weights=...)",
        )
    return values
