"""What a machine takes for a call, for an element and for a compilation, by kind of work.

`calibrate` measures it in some seconds and remembers it beside the other rates of this machine;
until then the prices are those that were measured where this file was written. An archived program
is priced by what stands in its text: products, convolutions, elements written, operations. Known to
be imperfect: a loop within a program is priced as if it ran once.
"""

import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from replay.grads.strategy import identity, recall, remember
from replay.query import states
from replay.query.nodes import Group, Part, Reduce, Scan
from replay.reducing import layouts, stepper


class Price(NamedTuple):
    """Seconds for each call, for each element, and to compile it once in a process."""

    call: float
    element: float
    compile: float


class Counts(NamedTuple):
    """What stands in the text of a program.

    Attributes:
        products: multiplications and additions of matrix products.
        convolved: those of convolutions.
        written: elements that its operations write.
        operations: how many there are.
        large: how many of them are convolutions, windows, scatters or sorts, which are code of
            their own.
    """

    products: float
    convolved: float
    written: float
    operations: float
    large: float


# Of the kinds that `calibrate` measures, on a virtual machine of two cores.
PRICES = {
    "element": Price(11e-6, 0.2e-9, 0.046),
    "sum": Price(15e-6, 0.08e-9, 0.066),
    "sum within": Price(36e-6, 0.081e-9, 0.067),
    "var": Price(39e-6, 0.21e-9, 0.23),
    "var within": Price(69e-6, 0.28e-9, 0.28),
    "top_k": Price(1600e-6, 240e-9, 1),
    "top_k sorted": Price(120e-6, 1100e-9, 0.95),
    "top_k within": Price(660e-6, 250e-9, 0.7),
    "top_k sorted within": Price(41e-6, 450e-9, 0.59),
    "hist": Price(59e-6, 11e-9, 0.45),
    "hist within": Price(56e-6, 5.8e-9, 0.36),
    "quantile within": Price(180e-6, 1e-9, 0.25),
    "selected": Price(25e-6, 7.6e-9, 0.3),
    "rows": Price(20e-6, 0.62e-9, 0.15),
    "eager": Price(30e-6, 0.15e-9, 0.084),
    "product": Price(13e-6, 0.014e-9, 0.014),
    "convolved": Price(100e-6, 0.11e-9, 0.68),
    "operation": Price(0.1e-6, 0.0, 0.002),
}

_NUMBER = re.compile(r"tensor<((?:\d+x)*)[A-Za-z]")
_CONTRACTED = re.compile(r"contracting_dims = \[([\d, ]*)\] x")
_FEATURE = re.compile(r"->\[([^\]]*)\]")
_LARGE = re.compile(r"stablehlo\.(convolution|reduce_window|select_and_scatter|sort|scatter)\b")
_OPERATION = re.compile(r"= \"?stablehlo\.(\w+)")


def _key() -> str:
    return identity("prices of what questions call, 3", 1, 0, 0)


def prices() -> tuple[dict[str, Price], bool]:
    """Return the prices by kind, and whether they were measured on this machine."""
    known = recall(_key())
    if not known:
        return PRICES, False
    named = {}
    for kind, price in PRICES.items():
        each = (known.get(f"{kind} {field}") for field in Price._fields)
        named[kind] = Price(*(p if k is None else k for k, p in zip(each, price, strict=True)))
    return named, True


def calibrate() -> dict[str, Price]:
    """Measure what this machine takes for each kind of work, and remember it.

    It takes about half a minute and is done once: later processes know it, too. Questions tell by
    `explain()` what they would take, and whether that stands on such measurements.

    Returns:
        The prices by kind.
    """
    found = {kind: _measured(kind) for kind in PRICES}
    flat = {f"{k} {field}": x for k, p in found.items()
            for field, x in p._asdict().items()}  # fmt: skip
    remember(_key(), flat)
    return found


# ------------------------------------------------------------------------------------ measuring

TOGETHER = 4  # steps that a call folds, as those of a question do
SMALL, LARGE = 2**9, 2**17
SIZES = {
    "top_k": (2**15, 2**17), "top_k sorted": (2**8, 2**12), "top_k within": (2**13, 2**17),
    "top_k sorted within": (2**8, 2**12), "element": (2**9, 2**21), "sum": (2**9, 2**20),
    "sum within": (2**9, 2**20), "eager": (2**9, 2**20), "rows": (2**9, 2**20),
}  # fmt: skip
RANKS = 10  # of the rankings that are measured
FUSED = 0.4  # of the price of an element, where an operation is one of many in a fusion
LARGE_IN_CONVOLVED = 6  # operations that are code of their own, in what is measured


def _measured(kind: str) -> Price:
    """Return the price of a kind: calls of two sizes, each compiled for it."""
    points, compiled = [], []
    for size in SIZES.get(kind, (SMALL, LARGE)):
        call, elements = _WORK.get(kind.split()[0], _folded)(kind, size)
        first = _seconds(call, 1)
        each = _seconds(call, 1)
        repeats = max(1, min(20, int(0.005 / max(each, 1e-6))))
        each = min(_seconds(call, repeats) for _ in range(3))
        points.append((elements, each))
        compiled.append(max(first - each, 1e-3))
    (n, few), (m, many) = points
    element = max(many - few, 0.02 * many) / (m - n)
    if kind == "operation":  # of which one call has many
        return Price(few / n, 0.0, min(compiled) / n)
    return Price(max(few - n * element, 0.1 * few), element, statistics.mean(compiled))


def _clocks() -> tuple[float, float]:
    """Return the seconds on the wall, and those of the processor where it does all the work.

    What others do with the cores meanwhile is on the wall only; what several cores do at a time
    counts for each of them. The smaller of both is what an idle machine would take.
    """
    wall = time.perf_counter()
    return wall, time.process_time() if jax.default_backend() == "cpu" else wall


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    begun, found = _clocks(), None
    for _ in range(repeats):
        found = call()
    jax.block_until_ready(found)
    return min(b - a for a, b in zip(begun, _clocks(), strict=True)) / repeats


def _numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.Generator(np.random.Philox(0)).normal(size=shape), jnp.float32)


def _folded(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    """Return one step of a reduction of weights, and how many elements it takes in."""
    how, within = kind.split()[0], kind.endswith("within")
    settings = {
        "top_k": (("k", RANKS), ("smallest", False)), "var": (("ddof", 0),),
        "hist": (("edges", (-1.0, 0.0, 1.0)),), "quantile": (("q", (0.5,)),),
    }.get(how, ())  # fmt: skip
    scan = Scan("", "grads", (0, 8, 1), (Part("w", (size,)),))
    node = Reduce(scan, how, ("step", "weight") if within else ("step",), settings)
    init, _, many = stepper(node, layouts(node)[0][0])
    x = _numbers(size)
    state = init([x])

    def call():
        nonlocal state
        state = many(state, [[x]] * TOGETHER, np.arange(TOGETHER, dtype=np.int32))
        return state

    return call, TOGETHER * size


def _rows(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    rows = 16
    labels = np.arange(rows, dtype="<i4") % 4
    scan = Scan("", "sample_grads", (0, 8, 1), (Part("w", (size // rows,)),))
    by = Group("labels", labels.tobytes(), tuple(range(4)))
    node = Reduce(scan, "sum", ("step", "position"), (), by)
    init, step, _ = stepper(node, layouts(node)[0][0])
    x = _numbers(rows, size // rows)
    valid = np.ones(rows, bool)
    state = init([x])

    def call():
        nonlocal state
        state = step(state, [x], np.int32(1), valid, labels)
        return state

    return call, size


def _element(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    x, run = _numbers(size), jax.jit(lambda x, y: jnp.abs(x) * 0.5 - y)
    return lambda: run(x, x), size


def _eager(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    x = _numbers(size)
    return lambda: jnp.where(x > 0, x, jnp.nan), 2 * size


def _selected(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    x, valid = _numbers(size), jnp.ones(size, bool)
    run = jax.jit(lambda x: states.quantiles(x, valid, (0.9,)))
    return lambda: run(x), size


def _product(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    side = 2 * math.isqrt(size) // 2
    a, b = _numbers(64, side), _numbers(side, side)
    run = jax.jit(jnp.matmul)
    return lambda: run(a, b), 2 * 64 * side * side


def _convolved(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    """The gradient of two convolutions, each pooled: how networks use them."""
    images = 1 if size == SMALL else 16
    x, kernels = _numbers(images, 28, 28, 1), [_numbers(3, 3, 1, 8), _numbers(3, 3, 8, 16)]

    def loss(kernels):
        y = x
        for kernel in kernels:
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=dims)
            window = (1, 2, 2, 1)
            y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, window, window, "VALID")
        return y.sum()

    run = jax.jit(jax.grad(loss))
    found = counts_of(run.lower(kernels).as_text())
    return lambda: run(kernels), found.convolved


def _operation(kind: str, size: int) -> tuple[Callable[[], Any], float]:
    """A few layers of a network and their gradient, of next to no elements."""
    layers = 6 if size == SMALL else 10
    weights = [_numbers(4, 4) for _ in range(layers)]

    def loss(weights, x):
        for w in weights:
            x = x + jax.nn.gelu(x @ w) / (1 + jnp.abs(x).sum(-1, keepdims=True))
        return jnp.square(x).mean()

    run, x = jax.jit(jax.grad(loss)), _numbers(2, 4)
    found = counts_of(jax.jit(jax.grad(loss)).lower(weights, x).as_text())
    return lambda: run(weights, x), found.operations


_WORK: dict[str, Callable[[str, int], tuple[Callable[[], Any], float]]] = {
    "rows": _rows, "element": _element, "eager": _eager, "selected": _selected, "product": _product,
    "convolved": _convolved, "operation": _operation,
}  # fmt: skip


# ------------------------------------------------------------------------------------- programs


def counts_of(text: str) -> Counts:
    """Count what stands in the text of a program in StableHLO.

    >>> counts_of("%1 = stablehlo.add %0, %0 : tensor<2x3xf32>").written
    6.0
    """
    products = convolved = written = 0.0
    operations = large = 0
    for line in text.splitlines():
        named = _OPERATION.search(line)
        if named is None or named[1] in ("constant", "return"):
            continue
        shapes = [_shape(found) for found in _NUMBER.findall(line)]
        if not shapes:
            continue
        out = math.prod(shapes[-1])
        operations, written = operations + 1, written + out
        large += bool(_LARGE.search(line))
        if named[1] == "dot_general" and (dims := _CONTRACTED.search(line)):
            inner = [int(d) for d in dims[1].split(",") if d.strip()]
            products += 2.0 * out * math.prod(shapes[-3][d] for d in inner)
        elif named[1] == "convolution" and (dims := _FEATURE.search(line)):
            names = [x.strip() for x in dims[1].split(",")]
            features = shapes[-1][names.index("f")]
            convolved += 2.0 * out * math.prod(shapes[-2]) / max(features, 1)
    return Counts(products, convolved, written, float(operations), float(large))


def _shape(text: str) -> list[int]:
    return [int(n) for n in text.split("x") if n]


@functools.lru_cache(maxsize=128)
def counts(data: bytes) -> Counts:
    """Count what stands in an exported program; remembered, as reading one takes a while."""
    key = identity("counts", 2, data)
    known = recall(key)
    if set(known) != set(Counts._fields):
        try:
            text = export.deserialize(bytearray(data)).mlir_module()
        except Exception:  # whoever executes damaged bytes tells what is wrong with them
            return Counts(*[0.0] * len(Counts._fields))
        known = counts_of(text)._asdict()
        remember(key, known)
    return Counts(**known)


def of_program(data: bytes, table: dict[str, Price]) -> Price:
    """Return the price of a call of an archived program, and to compile it."""
    found = counts(data)
    seconds = (
        found.products * table["product"].element
        + found.convolved * table["convolved"].element
        + found.written * FUSED * table["element"].element
        + found.operations * table["operation"].call
    )
    compiled = found.operations * table["operation"].compile
    compiled += found.large * table["convolved"].compile / LARGE_IN_CONVOLVED
    return Price(table["element"].call + seconds, 0.0, compiled)
