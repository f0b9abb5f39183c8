"""What a fork is a fork of: where its parent lies, what the two share, what the journals add up to.

A fork names its parent by a path relative to its own and by the parent's identity. A copy of the
parent may lie inside the fork, in `parent/`; it is looked for there first.
"""

import dataclasses
import os
import posixpath
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from replay.errors import LogError
from replay.journal import Durable
from replay.store import Place

FOLDER = "parent"  # where a detached fork keeps what it needs of its parent


@dataclasses.dataclass(frozen=True)
class Parent:
    """What a fork records about its parent.

    Attributes:
        path: of the parent, relative to the fork, with slashes.
        run: the identity of the parent.
        step: the first step that the fork has taken by itself.
        edit: what was changed, as it is shown.
        changed: the names of the fields of the edit.
        shared: whether the state before that step is the parent's; otherwise (with other initial
            weights, or an optimizer that begins anew) the fork has a state 0 of its own.
        factors: of the losses, where they are other than the parent's: `{sample: factor}`.
        leaves: of the state that the first step begins with, where the fork sets them: number of
            the leaf -> bytes (hyperparameters that are injected).
    """

    path: str
    run: str
    step: int
    edit: str
    changed: tuple[str, ...]
    shared: bool = True
    factors: dict[int, float] = dataclasses.field(default_factory=dict)
    leaves: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last state that is the parent's; -1 where there is none."""
        return self.step if self.shared and not self.leaves else self.step - 1

    def to_plain(self) -> dict[str, Any]:
        """Return msgpack-able data, the inverse of `from_plain`."""
        ids = np.array(sorted(self.factors), "<i4")
        values = np.array([self.factors[i] for i in ids.tolist()], "<f4")
        return {
            **dataclasses.asdict(self),
            "changed": list(self.changed),
            "factors": [ids.tobytes(), values.tobytes()],
        }

    @classmethod
    def from_plain(cls, plain: Any) -> "Parent":
        """Rebuild from a record nobody vouches for.

        Raises:
            ValueError, TypeError, LookupError: it is no such record.
        """
        fields = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
        ids, values = (
            np.frombuffer(part, kind)
            for part, kind in zip(fields["factors"], ("<i4", "<f4"), strict=True)
        )
        parent = cls(
            **{
                **fields,
                "changed": tuple(fields["changed"]),
                "factors": dict(zip(ids.tolist(), values.tolist(), strict=True)),
            }
        )
        for name, kind in (("path", str), ("run", str), ("edit", str), ("shared", bool)):
            if type(fields[name]) is not kind:
                raise ValueError(f"the parent's {name} is {fields[name]!r}")
        if type(parent.step) is not int or not 0 <= parent.step < 2**48:
            raise ValueError(f"a fork at step {parent.step!r}")
        if parent.path.startswith("/") or "://" in parent.path or "\0" in parent.path:
            raise ValueError(f"a parent is named by a relative path, not {parent.path!r}")
        if not parent.shared and parent.step:
            raise ValueError(f"a fork at step {parent.step} shares no state with its parent")
        if ids.size and not (ids.min() >= 0 and np.isfinite(values).all()):
            raise ValueError("a factor of a loss is not a finite number of a sample")
        if not all(type(name) is str for name in parent.changed):
            raise ValueError("the changes of a fork have no names")
        for number, data in parent.leaves.items():
            if type(number) is not int or type(data) is not bytes:
                raise ValueError("a leaf is not given by its number and bytes")
        return parent


def relative(fork: Place, parent: Place) -> str:
    """Return the path of a parent relative to its fork.

    Raises:
        LogError: the two do not lie in one store.
    """
    if fork.path is not None and parent.path is not None:
        ours, theirs = fork.path.resolve(), parent.path.resolve()
        if ours == theirs or theirs in ours.parents:
            raise LogError(
                f"the fork {fork} would lie in its parent {parent}",
                why="the folder of a run holds its own files and nothing else",
                fix=f"run.fork({str(parent).rstrip('/') + '-fork'!r}, ...)",
            )
        return posixpath.relpath(theirs.as_posix(), ours.as_posix())
    split = [urllib.parse.urlsplit(str(place)) for place in (fork, parent)]
    if split[0][:2] != split[1][:2]:
        raise LogError(
            f"the fork {fork} and its parent {parent} do not lie in one store",
            why="a fork finds its parent by a path relative to its own",
            fix="fork next to the parent, or copy the parent to the other store first",
        )
    return posixpath.relpath(split[1].path or "/", split[0].path or "/")


def located(fork: Place, parent: Parent) -> list[Place]:
    """Return where the parent of a fork may lie, the likeliest first."""
    if fork.path is not None:
        return [Place(fork.path / FOLDER), Place(_shown(fork, parent.path))]
    base = str(fork).rstrip("/")
    split = urllib.parse.urlsplit(base)
    path = posixpath.normpath(posixpath.join(split.path or "/", parent.path))
    return [Place(f"{base}/{FOLDER}"), Place(urllib.parse.urlunsplit(split._replace(path=path)))]


def _shown(fork: Place, path: str) -> str:
    """Return where a relative path leads, named as the fork itself was named."""
    assert fork.path is not None
    found = os.path.normpath(fork.path.resolve() / path)  # links are followed before `..` is
    return found if os.path.isabs(fork.where) else os.path.relpath(found)


def merged(parent: Parent, theirs: Durable, own: Durable) -> Durable:
    """Return what the journals of a fork and of its parent vouch for together."""
    last = parent.last

    def both(name: str) -> dict[int, Any]:
        kept: Mapping[int, Any] = getattr(theirs, name)
        return {s: x for s, x in kept.items() if s <= last} | getattr(own, name)

    return dataclasses.replace(
        own,
        steps=max(parent.step, own.steps),
        checkpoints=both("checkpoints"),
        digests=both("digests"),
        metrics=[item for item in theirs.metrics if item[0] <= last] + own.metrics,
        selftest=own.selftest or theirs.selftest,
    )
