"""Record a JAX training run log-light; ask afterwards what happened, bit for bit."""

from replay import edits
from replay.api import Run, Step, compute, open, record
from replay.checkpoints import Checkpoints
from replay.comparing import compare
from replay.data import Data
from replay.errors import (
    DataError,
    DivergenceError,
    Grade,
    IdentityError,
    LogError,
    OrderError,
    ProgramError,
    QueryError,
    ReplayError,
)
from replay.grads import reductions
from replay.grads.per_sample import per_sample
from replay.order import Order
from replay.program import Inputs, Program, State
from replay.recorder import Recorder

__all__ = [
    "Checkpoints",
    "Data",
    "DataError",
    "DivergenceError",
    "Grade",
    "IdentityError",
    "Inputs",
    "LogError",
    "Order",
    "OrderError",
    "Program",
    "ProgramError",
    "QueryError",
    "Recorder",
    "ReplayError",
    "Run",
    "State",
    "Step",
    "compare",
    "compute",
    "edits",
    "open",
    "per_sample",
    "record",
    "reductions",
]
