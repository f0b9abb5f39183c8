"""Where two runs part, by what their logs hold: samples, witnesses of losses, digests of states.

Nothing is replayed. Losses that agree are no proof that weights do: a difference in the last place
takes steps to show in them. A fork shares what came before it with its parent, so that is not read.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from replay.errors import printable
from replay.identity import SHORT_DIGEST, short_digest
from replay.log import Log

# Steps that are read together.
_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where a run first differs from another.

    Attributes:
        steps: how many steps both have; only these, and the states up to it, are compared.
        samples: the first step whose samples, or the factors of whose losses, differ; None where
            none does.
        losses: the first step whose losses differ, by their witnesses; None where none does.
        state: the first state whose digest differs, of those that both have logged; None where
            none does.
        tensor: the first leaf that differs there; None where the digests do not tell.
        agreed: the last state before it whose digest agrees; None where none does.
        states: how many digests were compared.
        forked: the first step that at least one of the two took apart from the ancestor that they
            have in common; None where they have none.
        settings: what the headers say differently, such as `key` or `data`.
    """

    steps: int
    samples: int | None
    losses: int | None
    state: int | None
    tensor: str | None
    agreed: int | None
    states: int
    forked: int | None
    settings: tuple[str, ...]

    @property
    def never(self) -> bool:
        """Whether nothing that both have logged differs."""
        return self.samples is None and self.losses is None and self.state is None

    def __str__(self) -> str:
        parts = []
        if self.forked is not None:
            parts.append(f"forked at step {self.forked:,}")
        if self.samples is not None:
            parts.append(f"samples, or their factors, first differ at step {self.samples:,}")
        if self.losses is not None:
            parts.append(f"losses first differ at step {self.losses:,}")
        if self.state is not None:
            since = "" if self.agreed is None else f"state {self.agreed:,} agrees, "
            leaf = "" if self.tensor is None else f", first in {self.tensor}"
            parts.append(f"{since}state {self.state:,} differs{leaf}")
        if self.never:
            steps = f"all {self.steps:,} steps" if self.steps else "no step"
            parts.append(
                f"never differ: the same samples and losses in {steps} that both have, and "
                f"{self.states:,} states that agree, bit for bit"
            )
        if self.settings:
            parts.append(f"other {', '.join(self.settings)}")
        return printable("; ".join(parts))


def parting(first: Log, other: Log) -> Parting:
    """Compare the logs of two runs.

    Args:
        first: the log of a run.
        other: of another.

    Raises:
        LogError: a logged column is missing or damaged.
        IdentityError: sample ids were not logged, and this version of numpy makes others.
    """
    steps = min(first.durable.steps, other.durable.steps)
    forked = _forked(first, other, steps)
    begin = forked or 0
    state, tensor, agreed, states = _digests(first, other, steps)
    return Parting(
        steps=steps,
        samples=_first(_other_samples(first, other, begin, steps)),
        losses=_first(_other_losses(first, other, begin, steps)),
        state=state,
        tensor=tensor,
        agreed=agreed,
        states=states,
        forked=forked,
        settings=tuple(_settings(first, other)),
    )


def _first(found: Iterator[int]) -> int | None:
    return next(found, None)


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _AT_ONCE):
        yield first, min(first + _AT_ONCE, stop)


def _other_samples(first: Log, other: Log, start: int, stop: int) -> Iterator[int]:
    """Yield steps that were given other samples, or other factors of their losses."""
    weighted = first.has_column("weights") or other.has_column("weights")
    for a, b in _pieces(start, stop):
        ours, theirs = first.ids(a, b), other.ids(a, b)
        if ours.shape != theirs.shape:  # batches of another size
            yield a
            return
        differ = ours != theirs
        if weighted:
            differ |= (_factors(first, a, b) != _factors(other, a, b)) & (ours >= 0)
        yield from (a + np.flatnonzero(differ.any(axis=1))).tolist()


def _factors(log: Log, start: int, stop: int) -> np.ndarray:
    if log.has_column("weights"):
        return log.column("weights", start, stop)
    return np.ones((stop - start, log.header.signature.batch_size), np.float32)


def _other_losses(first: Log, other: Log, start: int, stop: int) -> Iterator[int]:
    for a, b in _pieces(start, stop):
        differ = first.column("witness", a, b) != other.column("witness", a, b)
        yield from (a + np.flatnonzero(differ)).tolist()


def _digests(first: Log, other: Log, steps: int) -> tuple[int | None, str | None, int | None, int]:
    """Return the first state that differs, its first leaf that does, what agreed, and how many.

    Leaves are matched by their paths: a run with another optimizer has other leaves beside the
    weights, and these are not compared.
    """
    ours, theirs = first.durable.digests, other.durable.digests
    leaves = [leaf.path for leaf in first.header.signature.state]
    places = {leaf.path: i for i, leaf in enumerate(other.header.signature.state)}
    shared = [(i, places[path]) for i, path in enumerate(leaves) if path in places]
    alike = leaves == list(places)
    agreed, count = None, 0
    for state in sorted(set(ours) & set(theirs)):
        if state > steps:
            break
        digests = ours[state], theirs[state]
        if all(len(digest) != SHORT_DIGEST for digest in digests):
            lanes = [np.frombuffer(digest, np.uint32).reshape(-1, 2) for digest in digests]
            differ = [i for i, j in shared if (lanes[0][i] != lanes[1][j]).any()]
            same, leaf = not differ, leaves[differ[0]] if differ else None
        elif alike:
            same, leaf = _short(digests[0]) == _short(digests[1]), None
        else:
            continue
        count += 1
        if not same:
            return state, leaf, agreed, count
        agreed = state
    return None, None, agreed, count


def _short(digest: bytes) -> bytes:
    if len(digest) == SHORT_DIGEST:
        return digest
    return short_digest(np.frombuffer(digest, np.uint32).reshape(-1, 2))


def _forked(first: Log, other: Log, steps: int) -> int | None:
    """Return up to where two runs are one: of the same ancestor, or one of them of the other."""
    if first.identity == other.identity:
        return None
    ours, theirs = _lineage(first), _lineage(other)
    shared = [min(ours[x], theirs[x], steps) for x in set(ours) & set(theirs)]
    return max(shared, default=None)


def _lineage(log: Log) -> dict[str, int]:
    """Return the identities of a run and of its ancestors, and how many steps each has given it."""
    found, shared, this = {}, log.durable.steps, log
    while True:
        found[this.identity] = shared
        if this.parent is None:
            return found
        shared, this = min(shared, this.first), this.parent


def _settings(first: Log, other: Log) -> Iterator[str]:
    ours, theirs = first.header, other.header
    for name in ("order", "key"):
        if getattr(ours, name) != getattr(theirs, name):
            yield name
    hashes = [
        {name: x.programs[name].get("sha256") for name in x.signature.programs}
        for x in (ours, theirs)
    ]
    if hashes[0] != hashes[1]:
        yield "program"
    if ours.fingerprint != theirs.fingerprint:
        yield "data"
    here, there = ours.environment, theirs.environment
    yield from (x for x in sorted({*here, *there}) if here.get(x) != there.get(x))
