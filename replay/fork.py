"""Counterfactuals: what a fork shares with its parent, what it changes, how the rest is trained.

A fork is a run like any other. Its own log begins where it departs from its parent; what lies
before is read from the parent's log. It is trained by the archived programs of its parent wherever
the edit allows it, so that an empty edit gives the parent's own bits.
"""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from replay import artifact
from replay.ancestry import FOLDER, Parent, relative
from replay.artifact import Signature
from replay.checkpoints import Checkpoints, Schedule
from replay.data import Data, checksum
from replay.edits import Edit
from replay.errors import DataError, LogError, OrderError, ProgramError
from replay.grads import archive
from replay.grafting import graft, injected
from replay.identity import environment
from replay.indexing import Observer
from replay.journal import frame
from replay.log import HEADER, JOURNAL, Header, Log, clear_torn, create, layouts
from replay.order import Order
from replay.recorder import key_words
from replay.recording import Recording
from replay.replaying import Replayer
from replay.store import Place, lay_out
from replay.trajectory import Stretch, cuts, stage, staged_steps, stretch_of
from replay.tree import Leaf, describe, lower, paths
from replay.worker import SETTABLE


@dataclasses.dataclass(frozen=True)
class Training:
    """How the steps that are left are to be taken.

    Attributes:
        data: the samples; None where they are not at hand.
        until: the state to stop at; None for the end of the order.
        checkpoints: when states are stored; None for as far apart as they are.
    """

    data: Data | None
    until: int | None
    checkpoints: Checkpoints | int | None

    def check(self, place: Place, order: Order, steps: int) -> int:
        """Return the state to stop at.

        Raises:
            DataError: the samples are not at hand.
            OrderError: there is no such state, or it is passed already.
            LogError: the checkpoints are no policy.
        """
        if self.data is None:
            raise DataError(
                f"{place} does not hold its data, and none was given",
                why="the steps that are left are taken on it",
                fix="replay.open(..., data=...)",
            )
        Checkpoints.of(self.checkpoints, len(order))
        stop = len(order) if self.until is None else _step("until", self.until)
        if not steps <= stop <= len(order):
            raise OrderError(
                f"until={self.until}: {place} has {steps:,} steps, its order {len(order):,}",
                why="it goes on from where it is, along its order",
                fix=f"until={len(order)}, or a step between",
            )
        return stop


def create_fork(
    log: Log,
    replayer: Replayer,
    place: Place,
    at: int,
    edit: Edit,
    *,
    tree: Any,
    allow: tuple[str, ...],
    training: Training | None,
) -> Any:
    """Write what a fork is: its header, and what it does not share with its parent.

    Args:
        log: the parent.
        replayer: of the parent; asked for state 0 where the fork begins with another.
        place: where the fork is to lie.
        at: the first step that it takes by itself.
        edit: what is other from there on.
        tree: the structure of the parent's state; None where it is not known.
        allow: custom calls that the parent's programs may make besides the usual ones.
        training: how it is to be trained afterwards, which is checked before anything is written.

    Returns:
        The structure of the fork's state; None where that of the parent is not known.

    Raises:
        OrderError, DataError, ProgramError, LogError: the edit does not fit the run, or says
            nothing; or the place is taken.
    """
    header, at = log.header, _step("at", at)
    order = _order(log, at)
    after = edit.order_after(order, at)
    if training is not None:
        training.check(place, after, at)
    before = log.factors
    factors = edit.factors(before)
    changed = np.flatnonzero(factors != before)
    given = edit.sample_weights
    named = np.array(list(given) if isinstance(given, Mapping) else [], np.int64)
    _check_seen(after, at, named)
    key = header.key if edit.key is None else key_words(edit.key)
    signature, leaves, shared = header.signature, {}, True
    programs = {name: {**entry, "inherited": True} for name, entry in header.programs.items()}
    files: dict[str, bytes] = {}
    initial: list[np.ndarray] | None = None
    if (edit.params is not None or edit.optimizer is not None) and at == 0:
        initial, shared = replayer.state(0), False
    if edit.params is not None:
        initial = _with_params(signature, initial, edit.params, at)
    if isinstance(edit.optimizer, Mapping):
        leaves = injected(signature, edit.optimizer)
    elif edit.optimizer is not None:
        loaded = {
            name: artifact.load(
                name, log.program(name), signature, allow=allow, results=_results(header, name)
            )
            for name in header.programs
            # What observes is made anew only where the state has another form.
            if name == "gradient" or (at == 0 and name not in (*signature.programs, "update"))
        }
        grafted = graft(signature, loaded, edit.optimizer, tree=tree, state=initial)
        signature, leaves, initial = grafted.signature, grafted.leaves, grafted.initial
        files, table = artifact.archived(grafted.exported)
        for name, entry in table.items():
            more = {"table": programs[name]["table"]} if "table" in programs[name] else {}
            programs[name] = entry | more
        tree = grafted.tree
    if initial is not None and leaves:
        for number, data in leaves.items():
            initial[number] = np.frombuffer(data, initial[number].dtype).reshape(
                initial[number].shape
            )
        leaves = {}
    here, recorded = environment(), header.environment
    settings = {name: recorded[name] for name in SETTABLE if name in recorded}
    logs_ids = header.order_checksum is None
    parent = Parent(
        path=relative(place, log.place),
        run=log.identity,
        step=at,
        edit=edit.described(order, after),
        changed=edit.changed,
        shared=shared,
        factors={int(i): float(factors[i]) for i in changed},
        leaves=leaves,
    )
    made = dataclasses.replace(
        header,
        created=time.time(),
        key=key,
        signature=signature,
        programs=programs,
        environment=here | settings,
        order=[after.spec(), after.samples],
        order_checksum=None if logs_ids else after.checksum(),
        steps=len(after),
        sample_weights=None if (factors == 1).all() else checksum([factors]),
        arrays=layouts(
            signature,
            len(after),
            ids=logs_ids,
            weights=after.weighted or bool((factors != 1).any()),
            batch_checksums=log.has_column("batch_crc32c"),
            samples=header.arrays["data"][0].shape[0] if header.data == "embedded" else 0,
        ),
        parent=parent,
        factors=None,
    )
    with place.lock():
        create(place, made, files, None, initial)
    return tree


def train(
    log: Log,
    replayer: Replayer,
    training: Training,
    on_log_error: str,
    progress: Callable[[int, float], None],
) -> None:
    """Take the steps of a run that it has not taken yet, by its archived programs.

    Args:
        log: the run.
        replayer: of the run.
        training: how.
        on_log_error: as for `Recorder`.
        progress: called with the number of steps taken since the last call, and a loss.

    Raises:
        OrderError: the run was fed, or has no such step.
        DataError: the run does not hold its data, and none was given.
        LogError: somebody else is at work on it, or the log cannot be written.
        DivergenceError: what was durable is not repeated.
    """
    with contextlib.ExitStack() as ending:
        ending.enter_context(log.place.lock())
        # Others may have taken it further since it was opened.
        log = Log(log.place, None if log.parent is None else log.parent.place)
        replayer, header, order = replayer.reopened(log), log.header, log.order
        if order is None:
            raise _fed(log)
        stop = training.check(log.place, order, log.durable.steps)
        data, factors = training.data, log.factors
        stored = tuple(log.own.checkpoints)
        if not stored and header.parent is None:
            raise LogError(
                f"{log.place} holds no state to go on from",
                why="the recording was broken off before its first commit",
                fix="record it with replay.Recorder(..., resume=True)",
            )

        def read(start: int, stop: int) -> Stretch:
            assert data is not None and order is not None
            ids, weights = order.batches(start, stop)
            weights = weights * factors[np.maximum(ids, 0)]
            return stretch_of(header.signature, start, ids, weights, data.leaves(ids))

        start = max(stored, default=log.first)
        if start == stop:
            return
        if log.own.steps == 0:  # a fork is laid out when it is first trained
            for group in ("states", "steps"):
                lay_out(log.place, group, header.arrays[group])
        clear_torn(log)
        leaves = replayer.state(start)
        indexed = header.index != "off"
        engine = replayer.engine(start, keep=indexed)
        schedule = Schedule(
            Checkpoints.of(training.checkpoints or _spacing(log), len(order)),
            steps=len(order),
            state_bytes=sum(leaf.nbytes for leaf in header.signature.state),
            start=start,
            stored=stored,
        )
        recording = Recording(
            log,
            engine,
            leaves,
            start=start,
            schedule=schedule,
            observer=Observer(header.signature, header.index) if indexed else None,
            on_log_error=on_log_error,
            commit_steps=1024,
            commit_seconds=10.0,
        )
        ending.callback(recording.writer.stop)
        pieces = cuts(start, stop, staged_steps(header.signature), every=schedule.every)
        staged = stage(read, pieces)
        ending.callback(staged.close)
        complete = False
        try:
            told, taken = time.perf_counter(), 0
            for stretch in staged:
                recording.execute(stretch)
                taken += stretch.size
                if time.perf_counter() - told > 0.2 and recording.last is not None:
                    losses = np.atleast_2d(np.asarray(recording.last.losses, np.float64))
                    progress(taken, float(losses[-1].mean()))
                    told, taken = time.perf_counter(), 0
            progress(taken, float("nan"))
            complete = True
        finally:
            recording.close(complete=complete)


def detach(log: Log) -> int:
    """Copy into a fork what it needs of its parent; return the bytes that were copied.

    Nothing of it changes: the copy lies in the folder `parent/` of the fork, with all that the
    steps before the fork need, and is looked for there first. Copies of grandparents lie in it.

    Raises:
        LogError: it is no fork, or cannot be written.
    """
    if log.parent is None or log.header.parent is None:
        raise LogError(
            f"{log.place} is not a fork",
            why="only a fork shares files with another run",
            fix="nothing is to be done: it is independent already",
        )
    inside = Place(f"{str(log.place).rstrip('/')}/{FOLDER}")
    if str(log.parent.place) == str(inside) or inside.size(HEADER) is not None:
        return 0
    with log.place.lock():
        return _copy(Log(log.parent.place), inside, log.first)


def _copy(log: Log, target: Place, steps: int) -> int:
    """Copy the first steps of a run, its programs and its data; the header comes last."""
    # Up to the first commit that covers them: no digest is known of the states between commits.
    end = min((s for s in log.own.digests if s >= steps), default=steps) if steps > log.first else 0
    listed = log.place.list()
    chunks_of = (name.partition("/c/") for name in listed)
    there = {f"{array}/{chunk.split('/')[0]}" for array, _, chunk in chunks_of}
    kept = {
        state: row
        for state, row in log.own.checkpoints.items()
        # What somebody gives up meanwhile is no longer there to be copied.
        if state <= max(steps, log.first)
        and all(f"{spec.name}/{row}" in there for spec in log.header.arrays["states"])
    }
    rows, copied = set(kept.values()), 0
    chunks = {spec.name: -(-end // spec.chunk[0]) for spec in log.header.arrays["steps"]}
    for name, size in listed.items():
        group, *rest = name.split("/")
        number = int(rest[2]) if rest[1:2] == ["c"] else -1
        take = group in ("program", "data", "states", "steps") and not name.endswith(
            (".part", ".__lock")
        )
        if number >= 0 and group == "states":
            take = take and number in rows
        if number >= 0 and group == "steps":
            take = take and number < chunks.get(f"steps/{rest[0]}", 0)
        if take:
            target.write(name, log.place.read(name, limit=max(size, 1)))
            copied += size
    if log.parent is not None:
        copied += _copy(log.parent, Place(f"{str(target).rstrip('/')}/{FOLDER}"), log.first)
    records: list[dict[str, Any]] = [
        {"kind": "steps", "end": state, "digest": digest, "metrics": []}
        for state, digest in sorted(log.own.digests.items())
        if state <= end and state not in kept
    ]
    records += [
        {"kind": "checkpoint", "state": state, "row": row, "digest": log.own.digests[state]}
        for state, row in sorted(kept.items())
    ]
    if end:
        digest, metrics = log.own.digests[end], [m for m in log.own.metrics if m[0] <= steps]
        records.append({"kind": "steps", "end": end, "digest": digest, "metrics": metrics})
    if log.own.selftest is not None:
        records.append({"kind": "selftest", "differs": log.own.selftest})
    for name, data in (
        (JOURNAL, b"".join(map(frame, records))),
        (HEADER, log.place.read(HEADER, limit=2**28)),
    ):
        target.write(name, data)
        copied += len(data)
    return copied


# --------------------------------------------------------------------------------- what is asked


def _step(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise OrderError(
            f"{name}={value!r} is not the number of a state",
            why="states are counted from 0",
            fix=f"{name}=0, or another whole number",
        ) from error


def _order(log: Log, at: int) -> Order:
    order = log.order
    if order is None:
        raise _fed(log)
    if 0 <= at < log.first:
        raise OrderError(
            f"a fork at step {at} of {log.place}, which is itself a fork at step {log.first}",
            why="what comes before was trained by its parent, perhaps with another optimizer",
            fix=f"run.parent.fork(..., at={at}), or at={log.first} and later",
        )
    if not 0 <= at <= log.durable.steps:
        raise OrderError(
            f"a fork at step {at} of {log.place}, which has steps 0 to {log.durable.steps - 1}",
            why="it begins with a state that the run has reached",
            fix=f"at= a number from {log.first} to {min(log.durable.steps, len(order) - 1)}",
        )
    return order


def _fed(log: Log) -> OrderError:
    return OrderError(
        f"{log.place} was fed and has no order",
        why="which batches would follow is not known",
        fix="record with data and an order to fork, or to go on without the code",
    )


def _check_seen(order: Order, at: int, samples: np.ndarray) -> None:
    """Refuse weights of samples that never occur any more.

    Raises:
        DataError: there are such.
    """
    missing = set(samples.tolist())
    for start in range(at, len(order), 1024):
        if not missing:
            return
        ids = order.batches(start, min(start + 1024, len(order))).ids
        missing -= set(np.unique(ids[np.isin(ids, list(missing))]).tolist())
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:6])) + ", …" * (len(missing) > 6)
        raise DataError(
            f"sample_weights: no batch from step {at} on has sample {shown}",
            why="another weight of theirs would change nothing",
            fix="fork earlier, or weigh samples that occur: np.unique(run.order[at:])",
        )


def _with_params(
    signature: Signature, state: list[np.ndarray] | None, params: Any, at: int
) -> list[np.ndarray]:
    """Return state 0 with other weights.

    Raises:
        ProgramError: the fork begins later, or they are not shaped like the run's.
    """
    if state is None:
        raise ProgramError(
            f"other initial weights for a fork at step {at}",
            why="initial weights are those of state 0",
            fix="at=0",
        )
    mine = dict(zip(paths(params), zip(describe(params), lower(params), strict=True), strict=True))
    after = list(state)
    for i in signature.weights:
        leaf = signature.state[i]
        name = leaf.path.partition("/")[2]
        found, value = mine.pop(name, (None, None))
        if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise _unfit(Leaf(name, leaf.shape, leaf.dtype), found)
        after[i] = np.asarray(value)
    for name in mine:
        raise _unfit(None, mine[name][0])
    return after


def _unfit(wanted: Leaf | None, found: Leaf | None) -> ProgramError:
    return ProgramError(
        f"params: the run has {wanted or 'nothing'} where {found or 'nothing'} is given",
        why="the run's own programs are compiled for its weights",
        fix="weights of the same tree and shapes, such as run.state(0).params changed",
    )


def _results(header: Header, name: str) -> list[jax.ShapeDtypeStruct] | None:
    """Return what an archived program returns, where the signature does not say so."""
    table = header.programs[name].get("table")
    if name == "factors":
        return archive.read(table, header.signature).results
    if name == "activations" and table is not None:
        return [jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"])) for x in table]
    return None


def _spacing(log: Log) -> int | None:
    """Return how many steps apart states are mostly stored, here or by the parent."""
    stored = sorted(log.own.checkpoints)  # of what was broken off, as it was begun
    if len(stored) < 3:
        stored = sorted(log.durable.checkpoints)
    if len(stored) < 3 and log.parent is not None:
        stored = sorted(log.parent.durable.checkpoints)
    apart, counts = np.unique(np.diff(stored), return_counts=True)
    return int(apart[np.argmax(counts)]) if apart.size else None
