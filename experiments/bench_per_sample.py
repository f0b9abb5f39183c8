"""What a reduction of per-sample gradients costs, in training steps of the same model and batch.

Question: how many training steps (jitted, donated, Adam) does one reduction of the gradients of
all samples of the batch take, by which strategy, with how much memory; does `auto` choose well;
and what do other libraries need, each in steps of its own framework?

Command:  python experiments/bench_per_sample.py            writes results/bench_per_sample.json
                                                            and results/bench_per_sample.png
          python experiments/bench_per_sample.py --quick    runs all of it, briefly; writes nothing
          python experiments/bench_per_sample.py --only "cells mlp" curves
                                                            measures these sections again
          python experiments/bench_per_sample.py --torch-python OTHER/bin/python
                    with torch 2.13, opacus 1.6 and backpack-for-pytorch 1.7, for those peers;
                    they are left out, and said to be, where it has no torch
Expected: the result says which of these targets are met. On the MLP norms take at most 0.45 steps,
          sums of squares and of magnitudes 1.0, the maximum 2.5, its position 3, the running ten
          largest after 500 steps 6 with the compiled kernel and 15 in XLA alone. `auto` takes at
          most 1.1 times the best of the strategies. Factors take at most 1.5 times the memory of a
          step, `vmap` never more than the limit that it was given. An epoch replayed with the
          squares of every sample takes 2.0 times its training on the MLP, 2.2 on the others. A
          plain `vmap(grad)` on the MLP takes 50 to 200 steps.
Run time: 40 minutes on two cores (a guess), --quick 10 minutes; nothing else should run meanwhile.

What is compared:
  factored, scan, vmap, auto   the strategies of `replay.per_sample`; `vmap` under a memory limit
  one by one                   by hand: a scan of `grad` over the samples
  all at once                  by hand: `vmap(grad)` of the whole batch, on the MLP alone

How it is measured. Blocks of training steps and of every cell alternate in one process, and a
ratio is the median of the ratios of neighbouring blocks, with a bootstrap interval of 95%. A
target is met where the upper end of the interval meets it. Where `auto` lowers to the very program
of the best strategy, their ratio is one, and not timed. Memory is the peak beyond the answer, on
both sides: of a step its state, its batch and what XLA reserves, of a reduction weights, batch and
what XLA reserves; what is reserved alone is compared beside it, without a target. The learning rate
is so small that the weights stay where they are, so that all cells see the same gradients; for the
running ten largest it is a real one.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_record import (
    Estimate,
    Figure,
    ahead,
    counted,
    digits,
    environment,
    in_new_process,
    keep,
    settle,
)
from bench_record import median as median_of

import replay

HERE = pathlib.Path(__file__).parent
RESULT = HERE / "results" / "bench_per_sample.json"
PEERS = HERE / "peers" / "torch_peers.py"
QUESTION = "what does a reduction of per-sample gradients cost, in training steps?"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and its batch.

    Attributes:
        model: `mlp`, `cnn`, `transformer` or `lstm`.
        widths: of its layers.
        batch: samples in a batch.
        warm: steps before the running ten largest are timed.
        limits: of reductions, in training steps.
        epoch_limit: of an epoch replayed with the squares of every sample, in trainings.
    """

    model: str
    widths: tuple[int, ...]
    batch: int
    warm: int = 100
    limits: tuple[tuple[str, float], ...] = ()
    epoch_limit: float = 2.2


MLP_LIMITS = (
    ("norms", 0.45), ("square_sum", 1.0), ("abs_sum", 1.0), ("max", 2.5), ("argmax", 3.0),
)  # fmt: skip
CASES = {
    "mlp": Case("mlp", (512, 128), 128, warm=500, limits=MLP_LIMITS, epoch_limit=2.0),
    "cnn": Case("cnn", (8, 16), 64),
    "transformer": Case("transformer", (128, 128, 128, 128), 32),
    "lstm": Case("lstm", (128,), 32),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a full run."""

    cases: dict[str, Case] = dataclasses.field(default_factory=lambda: CASES)
    seed: int = 0
    resamples: int = 4_000
    budget_s: float = 1.0  # for each cell, steps between included
    rounds: tuple[int, int] = (3, 30)
    block_s: float = 0.008
    memory: int = 256 * 2**20
    memory_limit: float = 1.5
    auto_limit: float = 1.1
    learning_rate: float = 1e-7
    time: int = 64  # characters in a text

    running_rate: float = 1e-3
    running_rounds: int = 25
    running_limits: tuple[tuple[str, float], ...] = (("compiled kernel", 6.0), ("XLA", 15.0))

    epochs: int = 8
    epoch_steps: tuple[tuple[str, int], ...] = (("mlp", 400), ("cnn", 100))
    other_epoch_steps: int = 20

    curve_batches: tuple[int, ...] = (8, 32, 128, 512)
    curve_widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    torch_python: str = sys.executable
    peers_s: float = 900.0  # then torch's peers are given up

    def quick(self) -> "Settings":
        """Return settings for a smoke test of everything."""
        return dataclasses.replace(
            self,
            cases={k: dataclasses.replace(v, warm=3, batch=16) for k, v in self.cases.items()},
            budget_s=0.0,
            rounds=(2, 2),
            running_rounds=2,
            epochs=2,
            epoch_steps=(),
            other_epoch_steps=4,
            curve_batches=(8, 32),
            curve_widths=(32, 64),
        )


# ------------------------------------------------------------------------------ models and data


class Block(nn.Module):
    """One layer of a transformer that may look back only."""

    width: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[:, 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


class Transformer(nn.Module):
    """Predicts the next of 128 characters; one layer for each width."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, text):
        width = self.widths[0]
        x = nn.Embed(128, width)(text) + nn.Embed(len(text), width)(jnp.arange(len(text)))
        for width in self.widths:
            x = Block(width)(x)
        return nn.Dense(128)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    """Reads an image row by row."""

    width: int

    @nn.compact
    def __call__(self, image):
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(self.width))(image)[-1])


def network(case: Case) -> nn.Module:
    """Return the module of one example."""
    if case.model == "mlp":
        layers = [layer for width in case.widths for layer in (nn.Dense(width), nn.relu)]
        return nn.Sequential([jnp.ravel, *layers, nn.Dense(10)])
    if case.model == "cnn":
        pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        layers = [x for width in case.widths for x in (nn.Conv(width, (3, 3)), nn.relu, pool)]
        return nn.Sequential([lambda x: x[..., None], *layers, jnp.ravel, nn.Dense(10)])
    return Transformer(case.widths) if case.model == "transformer" else Lstm(case.widths[0])


def source(case: Case, settings: Settings) -> dict[str, np.ndarray]:
    """Return the data set: digits, or windows of the source text of Python's own library."""
    if case.model != "transformer":
        return digits(28)
    text = inspect.getsource(argparse).encode("ascii", "replace")
    characters = np.frombuffer(text, np.uint8).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(characters, settings.time + 1)[::16]
    return {"x": np.array(windows[:, :-1]), "y": np.array(windows[:, 1:])}


def build(case: Case, settings: Settings) -> tuple[Callable, Callable]:
    """Return `init(key) -> params` and `loss(params, example, key) -> scalar`."""
    module, data = network(case), source(case, settings)

    def init(key):
        return module.init(key, data["x"][0])["params"]

    def loss(params, example, key):
        logits: Any = module.apply({"params": params}, example["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"]).mean()

    return init, loss


def trained(loss: Callable, rate: float) -> tuple[Callable, optax.GradientTransformation]:
    """Return a training step `(state, batch) -> state, loss`, to be donated its state."""
    optimizer = optax.adam(rate)

    def train(state, batch):
        def mean_loss(params):
            return jax.vmap(loss, (None, 0, None))(params, batch, None).mean()

        value, grads = jax.value_and_grad(mean_loss)(state[0])
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return train, optimizer


class Stepper:
    """A training that owns its state; called, it makes one step and waits for it."""

    def __init__(self, loss: Callable, params: Any, batch: Any, rate: float):
        train, optimizer = trained(loss, rate)
        self.state = (jax.tree.map(jnp.copy, params), optimizer.init(params))
        self._compiled = jax.jit(train, donate_argnums=0).lower(self.state, batch).compile()
        self._batch = batch
        self.memory = Memory.of(self._compiled)

    def __call__(self, batch: Any = None) -> Any:
        self.state, value = self._compiled(self.state, self._batch if batch is None else batch)
        return jax.block_until_ready(value)


class Memory(NamedTuple):
    """The bytes that an executable takes while it runs.

    Attributes:
        peak: arguments, such as the state of a training or a batch, and what is reserved; not
            results, which take the place of arguments or are the answer itself.
        reserved: beside arguments and results.
    """

    peak: int
    reserved: int

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Ask the compiler."""
        found = compiled.memory_analysis()
        reserved = found.temp_size_in_bytes
        return cls(found.argument_size_in_bytes + reserved, reserved)


# ----------------------------------------------------------------------------------- reductions

Reduce = Callable[[Any, Any, Any], Any]  # (params, batch, keys) -> result

ROWS = 16  # of the random projection
REDUCTIONS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "norms": lambda of, params, batch, keys: of.norms(params, batch, keys),
    "square_sum": lambda of, params, batch, keys: of.square_sum(params, batch, keys),
    "abs_sum": lambda of, params, batch, keys: of.abs_sum(params, batch, keys),
    "max": lambda of, params, batch, keys: of.max(params, batch, keys),
    "argmax": lambda of, params, batch, keys: of.argmax(params, batch, keys),
    "gram": lambda of, params, batch, keys: of.gram(params, batch, keys),
    "dot": lambda of, params, batch, keys: of.dot(params, params, batch, keys),
    "project": lambda of, params, batch, keys: of.project(
        ROWS, jax.random.key(1), params, batch, keys
    ),
}


def of_samples(name: str, params: Any, grads: Any) -> Any:
    """Reduce materialised gradients `[n, ...]` to a row for each sample."""
    rows = [x.reshape(len(x), -1) for x in jax.tree.leaves(grads)]
    if name == "norms":
        return jnp.sqrt(sum((x * x).sum(axis=1) for x in rows))
    if name == "gram":
        return sum(x @ x.T for x in rows)
    if name == "dot":
        leaves = jax.tree.leaves(params)
        return sum(x @ leaf.reshape(-1) for x, leaf in zip(rows, leaves, strict=True))
    signs = [
        jax.random.rademacher(jax.random.key(i), (x.shape[1], ROWS), x.dtype)
        for i, x in enumerate(rows)
    ]
    return sum(x @ sign for x, sign in zip(rows, signs, strict=True)) / math.sqrt(ROWS)


def of_weights(name: str, state: Any, grads: Any, first: Any) -> Any:
    """Fold materialised gradients `[n, *shape]` of one tensor into a state for each weight."""
    if name == "square_sum":
        return state + jnp.square(grads).sum(axis=0)
    sizes = jnp.abs(grads)
    if name == "abs_sum":
        return state + sizes.sum(axis=0)
    if name == "max":
        return jnp.maximum(state, sizes.max(axis=0))
    best, where = state
    new = sizes.max(axis=0)
    return jnp.maximum(best, new), jnp.where(new > best, first + sizes.argmax(axis=0), where)


def by_hand(loss: Callable, name: str, many: int) -> Reduce:
    """Return a reduction that materialises the gradients of `many` samples at a time."""
    each = jax.vmap(jax.grad(loss), (None, 0, 0))

    def reduce(params, batch, keys):
        parts = jax.tree.map(lambda x: x.reshape(-1, many, *x.shape[1:]), (batch, keys))
        count = len(jax.tree.leaves(parts)[0])
        if name in ("norms", "gram", "dot", "project"):
            found = jax.lax.map(lambda part: of_samples(name, params, each(params, *part)), parts)
            return found.reshape(-1, *found.shape[2:])
        leaves, tree = jax.tree.flatten(params)
        states: Any = [jnp.zeros_like(x) for x in leaves]
        if name == "argmax":
            states = [(x - 1, jnp.zeros(x.shape, jnp.int32)) for x in states]

        def step(states, part):
            first, part = part
            grads = jax.tree.leaves(each(params, *part))
            folded = zip(states, grads, strict=True)
            return [of_weights(name, state, grad, first) for state, grad in folded], None

        starts = jnp.arange(0, count * many, many)
        states, _ = jax.lax.scan(step, states, (starts, parts))
        return tree.unflatten([x[1] if name == "argmax" else x for x in states])

    return reduce


STRATEGIES = ("factored", "scan", "vmap", "auto")


def question(name: str, params: Any) -> Any:
    """Return what `tune` is asked, so that `auto` knows how to answer a reduction."""
    return {
        "square_sum": replay.reductions.Sum("square"),
        "abs_sum": replay.reductions.Sum("magnitude"),
        "max": replay.reductions.Max(),
        "argmax": replay.reductions.TopK(1),
        "dot": replay.reductions.Dot(params),
    }.get(name, name)


def strategies(case: Case, loss: Callable, name: str, settings: Settings) -> dict[str, Reduce]:
    """Return a reduction by all strategies."""
    found: dict[str, Reduce] = {}
    for strategy in STRATEGIES:
        of = replay.per_sample(loss, strategy=strategy, memory=settings.memory)
        found[strategy] = functools.partial(REDUCTIONS[name], of)
    if name != "gram":
        found["one by one"] = by_hand(loss, name, 1)
    if case.model == "mlp":
        found["all at once"] = by_hand(loss, name, case.batch)
    return found


# ---------------------------------------------------------------------------------- measurement


def clock(function: Callable[[], Any], repeats: int = 1) -> float:
    """Return the seconds that one call takes."""
    begun = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(function())
    return (time.perf_counter() - begun) / repeats


def alternate(
    step: Callable[[], Any], cells: dict[Any, Callable[[], Any]], settings: Settings
) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """Return for each cell the seconds of a call, and of a training step just before, by round."""
    step_s = clock(step, 3)
    repeat = functools.partial(lambda s: max(1, round(settings.block_s / s)))
    plans = {}
    for name, cell in cells.items():
        clock(cell)  # compiles what is not compiled, and touches the memory
        seconds = clock(cell)
        both = max(seconds, settings.block_s) + max(step_s, settings.block_s)
        few, many = settings.rounds
        plans[name] = repeat(seconds), int(np.clip(settings.budget_s / both, few, many))
    found: dict[Any, list[tuple[float, float]]] = {name: [] for name in cells}
    for turn in range(max(rounds for _, rounds in plans.values())):
        for name, cell in cells.items():
            repeats, rounds = plans[name]
            if turn < rounds:
                settle()
                before = clock(step, repeat(step_s))
                found[name].append((clock(cell, repeats), before))
    return {
        name: (np.array([x for x, _ in pairs]), np.array([y for _, y in pairs]))
        for name, pairs in found.items()
    }


def ratio(pair: tuple[np.ndarray, np.ndarray], settings: Settings) -> Estimate:
    """Return how many neighbouring steps a cell takes."""
    return median_of(pair[0] / pair[1], settings)  # type: ignore[arg-type]


def beginning(case: Case, settings: Settings) -> tuple[Callable, Any, Any]:
    """Return the loss, initial weights and one batch."""
    init, loss = build(case, settings)
    data = source(case, settings)
    ids = np.random.default_rng(settings.seed).permutation(len(data["y"]))[: case.batch]
    batch = {name: jnp.asarray(array[ids]) for name, array in data.items()}
    return loss, jax.jit(init)(jax.random.key(settings.seed)), batch


def tune(loss: Callable, name: str, params: Any, batch: Any, settings: Settings) -> None:
    """Let `auto` measure what it chooses from, as a user is told to."""
    of = replay.per_sample(loss, memory=settings.memory)
    of.tune(question(name, params), params, batch)


def measure_cells(settings: Settings, model: str) -> list[Figure]:
    """Compare the strategies of all reductions, by time and by memory."""
    case = settings.cases[model]
    loss, params, batch = beginning(case, settings)
    step = Stepper(loss, params, batch, settings.learning_rate)
    cells: dict[Any, Callable[[], Any]] = {}
    memory: dict[Any, Memory] = {}
    texts: dict[Any, str] = {}
    for name in REDUCTIONS:
        tune(loss, name, params, batch, settings)
        for strategy, reduce in strategies(case, loss, name, settings).items():
            lowered = jax.jit(reduce).lower(params, batch, None)
            compiled, texts[name, strategy] = lowered.compile(), lowered.as_text()
            memory[name, strategy] = Memory.of(compiled)
            cells[name, strategy] = functools.partial(compiled, params, batch, None)
    found = alternate(step, cells, settings)

    each = np.concatenate([steps for _, steps in found.values()])
    figures = [
        Figure(f"{model} step", median_of(1e3 * each, settings), "ms"),  # type: ignore[arg-type]
        Figure(f"{model} step: memory", counted(step.memory.peak / 1e6), "MB"),
        Figure(f"{model} step: reserved", counted(step.memory.reserved / 1e6), "MB"),
    ]
    limits = dict(case.limits)
    for (name, strategy), pair in found.items():
        what, taken = f"{model} {name}: {strategy}", memory[name, strategy]
        peak, reserved = (x / y for x, y in zip(taken, step.memory, strict=True))
        limit = limits.get(name) if strategy == "auto" else None
        by_rule = texts[name, strategy] == texts[name, "factored"]
        most = settings.memory_limit if by_rule and strategy in ("factored", "auto") else None
        figures += [
            Figure(f"{what} / step", ratio(pair, settings), limit=limit),
            Figure(f"{what}, memory / step", counted(peak), limit=most),
            Figure(f"{what}, reserved / step", counted(reserved)),
        ]
        if strategy == "vmap":
            most = settings.memory / 1e6
            figures.append(
                Figure(f"{what}, reserved", counted(taken.reserved / 1e6), "MB", limit=most)
            )
    for name in REDUCTIONS:
        ratios = {strategy: np.divide(*found[name, strategy]) for strategy in STRATEGIES}
        chosen = ratios.pop("auto")
        best = min(ratios, key=lambda strategy: float(np.median(ratios[strategy])))
        rounds = min(len(chosen), len(ratios[best]))
        what = f"{model} {name}: auto / best ({best})"
        if texts[name, "auto"] == texts[name, best]:  # timing it against itself gives only noise
            figures.append(
                Figure(f"{what}, the same program", counted(1.0), limit=settings.auto_limit)
            )
            continue
        figures.append(
            Figure(
                what,
                median_of(chosen[:rounds] / ratios[best][:rounds], settings),  # type: ignore[arg-type]
                limit=settings.auto_limit,
            )
        )
    return figures


def measure_running(settings: Settings, model: str) -> list[Figure]:
    """Time one update of the running ten largest, far into a training."""
    case = settings.cases[model]
    loss, params, batch = beginning(case, settings)
    data, generator = source(case, settings), np.random.default_rng(settings.seed)

    def fresh():
        ids = generator.integers(len(data["y"]), size=case.batch)
        return {name: jnp.asarray(array[ids]) for name, array in data.items()}

    limits = dict(settings.running_limits) if model == "mlp" else {}
    figures = []
    # Without numba the kernel is XLA's, which is asked for here by taking the other away.
    kernels: Any = importlib.import_module("replay.kernels.top_k")
    compiled = kernels.compiled
    for kernel in ("compiled kernel", "XLA"):
        kernels.compiled = compiled if kernel == "compiled kernel" else None
        stream = replay.per_sample(loss, memory=settings.memory).stream(replay.reductions.TopK(10))
        step = Stepper(loss, params, batch, settings.running_rate)
        pairs = []
        for turn in range(case.warm + settings.running_rounds):
            chosen = fresh()
            if turn >= case.warm:
                settle()
            update = functools.partial(stream.update, step.state[0], chosen)
            # An update returns nothing to wait for, but leaves arrays behind.
            seconds = clock(lambda update=update: (update(), jax.live_arrays()))
            pairs.append((seconds, clock(functools.partial(step, chosen))))
        late = np.array(pairs)[case.warm :]
        what = f"{model} running top 10 after {case.warm} steps: {kernel} / step"
        value = ratio((late[:, 0], late[:, 1]), settings)
        figures.append(Figure(what, value, limit=limits.get(kernel)))
    return figures


def measure_epoch(settings: Settings, model: str) -> list[Figure]:
    """Compare an epoch replayed with the squares of every sample with training it plainly.

    Batches of the training are gathered in a thread, two ahead.
    """
    case = settings.cases[model]
    init, loss = build(case, settings)
    steps = dict(settings.epoch_steps).get(model, settings.other_epoch_steps)
    data, size = source(case, settings), steps * case.batch
    data = {name: np.resize(array, (size, *array.shape[1:])) for name, array in data.items()}
    squares = replay.reductions.Sum("square")
    order = replay.Order.shuffled(case.batch, settings.epochs, settings.seed)
    step = Stepper(
        loss,
        jax.jit(init)(jax.random.key(settings.seed)),
        {name: jnp.asarray(array[: case.batch]) for name, array in data.items()},
        settings.running_rate,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = replay.record(
            pathlib.Path(folder, "run"),
            replay.Program(init, loss, optax.adam(settings.running_rate)),
            data,
            order,
            key=jax.random.key(settings.seed),
            checkpoints=steps,  # each epoch begins at a stored state
            self_test=False,
            progress=False,
        )
        table, ratios = order.bind(size)[:], []
        for epoch in range(settings.epochs):
            chosen = slice(epoch * steps, (epoch + 1) * steps)
            settle()
            gather = [
                lambda ids=ids: {name: x[ids] for name, x in data.items()} for ids in table[chosen]
            ]
            train = clock(lambda gather=gather: [*map(step, ahead(gather))])
            settle()
            again = clock(lambda chosen=chosen: run.reduce(squares, steps=chosen, progress=False))
            ratios.append(again / train)
    what = f"{model} epoch of {steps} steps: replay with square sum / training"
    value = median_of(ratios[1:], settings)  # type: ignore[arg-type]  # the first compiles
    return [Figure(what, value, limit=case.epoch_limit)]


def measure_curves(settings: Settings) -> list[Figure]:
    """Measure how time grows with the batch and with the width."""
    figures = []
    base = settings.cases["mlp"]
    brief = dataclasses.replace(settings, budget_s=settings.budget_s / 3)
    sweeps = [
        ("batch", size, dataclasses.replace(base, batch=size)) for size in settings.curve_batches
    ] + [
        ("width", width, dataclasses.replace(base, widths=(width, width)))
        for width in settings.curve_widths
    ]
    for axis, value, case in sweeps:
        loss, params, batch = beginning(case, settings)
        step = Stepper(loss, params, batch, settings.learning_rate)
        for name in CURVES:
            tune(loss, name, params, batch, settings)
        cells = {
            (name, strategy): functools.partial(jax.jit(reduce), params, batch, None)
            for name in CURVES
            for strategy, reduce in strategies(case, loss, name, settings).items()
            if strategy not in ("one by one", "all at once")
        }
        found = alternate(step, cells, brief)
        steps = np.concatenate([steps for _, steps in found.values()])
        lines = {(name, "training step"): steps for name in CURVES}
        lines |= {cell: seconds for cell, (seconds, _) in found.items()}
        for (name, strategy), seconds in lines.items():
            estimate = median_of(1e3 * seconds, settings)  # type: ignore[arg-type]
            figures.append(Figure(f"curve {axis} {value} {name}: {strategy}", estimate, "ms"))
    return figures


CURVES = {"norms": "norms", "square_sum": "sum of squares", "max": "largest magnitude"}


def plot(figures: Sequence[Figure], path: pathlib.Path) -> None:
    """Draw the curves: a row for each reduction, time against batch and against width."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    lines: dict[tuple[str, str, str], list[tuple[int, Estimate]]] = {}
    for figure in figures:
        head, _, strategy = figure.name.partition(": ")
        _, axis, value, name = head.split()
        lines.setdefault((name, axis, strategy), []).append((int(value), figure.estimate))
    styles = {
        "training step": ("black", "--"), "factored": ("C0", "-"), "scan": ("C1", "-"),
        "vmap": ("C2", "-"), "auto": ("C3", ":"),
    }  # fmt: skip
    chart, axes = pyplot.subplots(len(CURVES), 2, figsize=(9, 10), sharey="row", sharex="col")
    columns = {"batch": "batch (samples)", "width": "width of both hidden layers (units)"}
    for row, column in itertools.product(range(len(CURVES)), range(2)):
        name, axis = list(CURVES)[row], list(columns)[column]
        area = axes[row, column]
        for strategy, (color, style) in styles.items():
            points = lines.get((name, axis, strategy), [])
            x = [value for value, _ in points]
            y, low, high = np.array([estimate for _, estimate in points]).reshape(-1, 3).T
            area.plot(x, y, style, color=color, marker="o", markersize=3, label=strategy)
            area.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        area.set(xscale="log", yscale="log", title=f"{CURVES[name]}, against {axis}")
        area.set_xticks(sorted({v for (n, a, _), p in lines.items() if a == axis for v, _ in p}))
        area.xaxis.set_major_formatter(ticker.ScalarFormatter())
        area.xaxis.set_minor_locator(ticker.NullLocator())
        area.grid(alpha=0.3)
        if column == 0:
            area.set_ylabel("time of one batch (ms)")
        if row == len(CURVES) - 1:
            area.set_xlabel(columns[axis])
    axes[0, 0].legend()
    chart.suptitle(
        "Gradients of every sample, MLP 784-512-128-10 (left), 784-w-w-10 at batch 128 (right)"
    )
    chart.tight_layout()
    path.parent.mkdir(exist_ok=True)
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


# ---------------------------------------------------------------------------------------- peers


def clipped_sum(loss: Callable, engine: Any) -> Reduce:
    """Return the sum of gradients clipped to norm 1: norms, then one weighted backward pass."""

    def reduce(params, batch, keys):
        scales = 1 / jnp.maximum(engine.norms(params, batch, keys), 1)
        return jax.grad(lambda p: engine.losses(p, batch, keys) @ scales)(params)

    return reduce


def clipped_by_optax(loss: Callable) -> Reduce:
    """Return the same by optax, which is given the gradients of all samples."""
    clip = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)

    def reduce(params, batch, keys):
        grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, batch, keys)
        return clip.update(grads, clip.init(params))[0]

    return reduce


def clipped_by_jax_privacy(loss: Callable, many: int | None) -> Reduce:
    """Return the same by jax-privacy, in micro-batches or all at once."""
    import jax_privacy.clipping  # pyright: ignore[reportMissingImports]

    clip = jax_privacy.clipping.clipped_grad(
        loss, l2_clip_norm=1.0, keep_batch_dim=False, microbatch_size=many
    )
    return lambda params, batch, keys: clip(params, batch, keys)


def measure_peers(settings: Settings, model: str) -> list[Figure]:
    """Compare with other libraries on the same network and batch, in steps of their framework."""
    case = settings.cases[model]
    loss, params, batch = beginning(case, settings)
    engine = replay.per_sample(loss, memory=settings.memory)
    reductions: dict[tuple[str, str], Reduce] = {
        ("clipped sum", "replay"): clipped_sum(loss, engine),
        ("clipped sum", "optax"): clipped_by_optax(loss),
    }
    for name in ("norms", "square_sum", "abs_sum", "max"):
        tune(loss, name, params, batch, settings)
        reductions[name, "replay"] = functools.partial(REDUCTIONS[name], engine)
    if importlib.util.find_spec("jax_privacy"):
        for many, name in ((None, "jax-privacy"), (8, "jax-privacy, by 8")):
            reductions["clipped sum", name] = clipped_by_jax_privacy(loss, many)
    step = Stepper(loss, params, batch, settings.learning_rate)
    cells = {
        cell: functools.partial(jax.jit(reduce), params, batch, None)
        for cell, reduce in reductions.items()
    }
    pairs = alternate(step, cells, settings) | torch_peers(case, batch, settings)
    return [
        Figure(f"{model} {name}: {peer} / step", ratio(pair, settings))
        for (name, peer), pair in pairs.items()
    ]


def torch_peers(case: Case, batch: Any, settings: Settings) -> dict[Any, Any]:
    """Return what the peers that need torch measured, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "batch.npz")
        np.savez(file, x=np.asarray(batch["x"]), y=np.asarray(batch["y"]))
        options = {
            "model": case.model, "widths": case.widths, "batch": str(file),
            "budget_s": settings.budget_s, "rounds": settings.rounds, "block_s": settings.block_s,
            "learning_rate": settings.learning_rate,
        }  # fmt: skip
        command = [settings.torch_python, str(PEERS), json.dumps(options)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=settings.peers_s, check=True
            )
        except subprocess.SubprocessError as error:
            why = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
            print(f"{case.model}: no figures from torch: {why}")
            return {}
    answer = json.loads(done.stdout.splitlines()[-1])
    for note in answer["notes"]:
        print(f"{case.model}: {note}")
    return {
        (cell["reduction"], cell["peer"]): (np.array(cell["seconds"]), np.array(cell["steps"]))
        for cell in answer["cells"]
    }


# ------------------------------------------------------------------------------------------ all

SECTIONS: dict[str, Callable[[Settings], list[Figure]]] = {
    f"{what} {model}": functools.partial(measure, model=model)
    for what, measure in (
        ("cells", measure_cells),
        ("running", measure_running),
        ("epoch", measure_epoch),
        ("peers", measure_peers),
    )
    for model in CASES
} | {"curves": measure_curves}


def versions(settings: Settings) -> dict[str, str]:
    """Return the versions of the peers, in this environment and in torch's."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({x.name: x.version for x in m.distributions()}))"
    )
    found: dict[str, str] = {}
    for python in (settings.torch_python, sys.executable):
        found |= json.loads(subprocess.check_output([python, "-c", code]))
    names = ("torch", "opacus", "backpack-for-pytorch", "jax-privacy", "jax_privacy", "numba")
    return {name: found[name] for name in names if name in found}


def worst(figures: Sequence[Figure]) -> list[str]:
    """Tell which reduction takes the most steps as it is chosen."""
    chosen = [figure for figure in figures if figure.name.endswith(": auto / step")]
    return [f"worst: {max(chosen, key=lambda figure: figure.estimate.value)}"] if chosen else []


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="keeps the other sections")
    parser.add_argument("--torch-python", default=sys.executable, help="with torch and its peers")
    options = parser.parse_args()
    settings = Settings(torch_python=options.torch_python)
    settings = settings.quick() if options.quick else settings
    begun, figures = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # hides what `auto` has measured here before
        for name in options.only or SECTIONS:
            described, started = environment(), time.perf_counter()
            found = in_new_process(SECTIONS[name], settings)
            figures += found
            shown = [figure for figure in found if figure.met is not None or "peers" in name]
            print(f"-- {name}", *shown, *worst(found), sep="\n", flush=True)
            if not options.quick:
                described["versions"] |= versions(settings)
                described["load after"] = os.getloadavg()
                described["minutes"] = (time.perf_counter() - started) / 60
                plain = dataclasses.asdict(settings) | {"torch_python": None}
                keep(RESULT, QUESTION, name, found, plain, described)
    minutes = (time.perf_counter() - begun) / 60
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"{minutes:.1f} minutes; targets that are not met: {', '.join(missed) or 'none'}")
    curves = [figure for figure in figures if figure.name.startswith("curve ")]
    if curves:
        chart = RESULT.with_suffix(".png") if not options.quick else None
        with tempfile.TemporaryDirectory() as folder:
            plot(curves, chart or pathlib.Path(folder, "chart.png"))


if __name__ == "__main__":
    main()
