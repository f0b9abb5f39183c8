"""Exceptions and grades: what went wrong, why it matters, and what to do about it."""

import enum


class ReplayError(Exception):
    """Base of every error that replay raises on purpose.

    The message has three parts: what happened (with the values), why it matters, and what
    to do. They stay readable one by one in `what`, `why` and `fix`.
    """

    def __init__(self, what: str, *, why: str, fix: str):
        self.what, self.why, self.fix = map(printable, (what, why, fix))
        super().__init__(f"{self.what}\n  why: {self.why}\n  fix: {self.fix}")

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.why, self.fix)


def _rebuild(kind: type[ReplayError], what: str, why: str, fix: str) -> ReplayError:
    return kind(what, why=why, fix=fix)


def printable(text: str) -> str:
    r"""Escape control characters, with which a name from a record could steer a terminal.

    >>> printable("caf\u00e9 \x1b[2J")
    'café \\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ProgramError(ReplayError):
    """A loss, an initialiser or an optimizer that cannot be recorded exactly."""


class OrderError(ReplayError):
    """An order of samples that does not fit its data, or an edit that does not fit its order."""


class DataError(ReplayError):
    """A data source that cannot be addressed, has changed, or holds values JAX would alter."""


class LogError(ReplayError):
    """A run directory that is damaged, missing, busy, or written in an unknown format."""


class IdentityError(ReplayError):
    """A program, machine or setting that is not the one the run was recorded with."""


class QueryError(ReplayError):
    """A question that names what does not exist, or asks for what has no meaning."""


class DivergenceError(ReplayError):
    """A replayed step whose bits differ from what the run logged."""


class Grade(enum.Enum):
    """What an audit has established; the value says what a reader may conclude.

    Only a comparison of bits ever gives a grade, never a flag or a version number.
    """

    BITWISE = "every witness and every digest agrees: the replay is the run, bit for bit"
    NUMERIC = "the replay departs from the run: read the interval and the deviation before use"
    FAILED = "the run could not be replayed: read the error in the audit"
    UNAUDITED = "nothing has been compared yet: call run.verify()"

    def __str__(self) -> str:
        return self.name

    def __and__(self, other: "Grade") -> "Grade":
        """Return the worse of two grades, as a run is only as good as its worst segment."""
        order = [Grade.BITWISE, Grade.UNAUDITED, Grade.NUMERIC, Grade.FAILED]
        return max(self, other, key=order.index)
