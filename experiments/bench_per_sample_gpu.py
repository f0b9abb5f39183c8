"""How close to an accelerator's limits the reductions of per-sample gradients come.

Question: how many milliseconds does each reduction take on a GPU, beside a training step; and what
share of the chip's memory bandwidth and arithmetic does each kernel reach?

Command:  python3 experiments/bench_per_sample_gpu.py        writes its file in results/
          python3 experiments/bench_per_sample_gpu.py --cpu  smoke test, tiny; writes nothing
          (from a checkout with its root on PYTHONPATH, if `replay` is not installed; without a GPU
          and without --cpu it says so and does nothing)
Expected: a guess, not a measurement: reductions of dense layers at batch 512 run at more than half
          of the memory bandwidth; those of sequences are bound by arithmetic.
Run time: 10 minutes on one GPU (a guess), --cpu 3 minutes on two cores.

A kernel's work is counted by hand, as what no implementation can do without: bytes, each operand
read once and each result written once; operations, a multiplication and an addition for every
product. Limits are those that this chip reaches in this process, in a long sum of two arrays and
in a large product of float32 matrices at highest precision, beside what its data sheet says. A
share above 1 means that the count is not what was done, as where operands stay in a cache.

It has NOT BEEN RUN ON A GPU.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import inspect
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "bench_per_sample_gpu.json"

# Data sheets: bytes/s of memory, float32 operations/s outside of tensor cores.
CHIPS = {
    "H200": (4.8e12, 67e12),
    "H100 PCIe": (2.0e12, 51e12),
    "H100": (3.35e12, 67e12),
    "A100": (2.0e12, 19.5e12),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Factors `left[n, 1, t, i]` and `right[n, 1, t, j]` of one layer's gradients."""

    n: int
    t: int
    i: int
    j: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; the defaults are those of a GPU."""

    seed: int = 0
    rounds: int = 15
    block_s: float = 0.05
    resamples: int = 4_000
    memory: int = 8 * 2**30
    layers: tuple[Layer, ...] = (
        Layer(512, 1, 1024, 1024),
        Layer(512, 1, 4096, 4096),
        Layer(64, 128, 512, 512),
        Layer(32, 1024, 768, 768),
    )
    k: int = 10
    warm: int = 50
    widths: tuple[int, ...] = (4096, 4096)
    mlp_batch: int = 512
    depth: int = 6
    width: int = 512
    time: int = 256
    text_batch: int = 64
    image: int = 64
    channels: tuple[int, ...] = (32, 64)
    image_batch: int = 256
    peak_size: int = 8192

    def tiny(self) -> "Settings":
        """Return settings for a smoke test on a CPU."""
        return dataclasses.replace(
            self,
            rounds=2,
            block_s=0.0,
            memory=2**28,
            layers=(Layer(8, 1, 64, 32), Layer(4, 8, 32, 32)),
            warm=2,
            widths=(32,),
            mlp_batch=8,
            depth=1,
            width=32,
            time=16,
            text_batch=4,
            image=8,
            channels=(4,),
            image_batch=4,
            peak_size=256,
        )


# ------------------------------------------------------------------------------- measurement


def clock(function: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one of several calls that are in flight together."""
    begun = time.perf_counter()
    found = [function() for _ in range(repeats)]
    jax.block_until_ready(found[-1])
    return (time.perf_counter() - begun) / repeats


def interval(values: list[float], settings: Settings) -> dict[str, float]:
    """Return a median and its bootstrap interval of 95% (Efron, 1979)."""
    generator = np.random.default_rng(settings.seed)
    picks = generator.integers(len(values), size=(settings.resamples, len(values)))
    low, high = np.percentile(np.median(np.array(values)[picks], axis=1), [2.5, 97.5])
    return {"value": float(np.median(values)), "low": float(low), "high": float(high)}


def alternate(cells: dict[Any, Callable[[], Any]], settings: Settings) -> dict[Any, Any]:
    """Return the milliseconds of every cell, blocks of all cells taking turns."""
    plans: dict[Any, int] = {}
    for name, cell in cells.items():
        clock(cell, 1)
        plans[name] = max(1, min(200, math.ceil(settings.block_s / clock(cell, 1))))
    found: dict[Any, list[float]] = {name: [] for name in cells}
    for _ in range(settings.rounds):
        for name, cell in cells.items():
            found[name].append(1e3 * clock(cell, plans[name]))
    return {name: interval(values, settings) for name, values in found.items()}


def limits(settings: Settings) -> dict[str, float]:
    """Return bytes/s and operations/s that the device reaches, and those of its data sheet."""
    size = settings.peak_size
    one = jnp.ones((size, size), jnp.float32)
    add = jax.jit(lambda x, y: x + y)
    product = jax.jit(functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST))
    times = alternate(
        {"add": lambda: add(one, one), "product": lambda: product(one, one)}, settings
    )
    found = {
        "bytes/s": 3 * 4 * size**2 / (1e-3 * times["add"]["value"]),
        "operations/s": 2 * size**3 / (1e-3 * times["product"]["value"]),
    }
    kind = jax.devices()[0].device_kind
    for chip, (memory, arithmetic) in CHIPS.items():
        if chip in kind:
            return found | {"sheet bytes/s": memory, "sheet operations/s": arithmetic}
    return found


# ----------------------------------------------------------------------------------- kernels


def kernels(layer: Layer, settings: Settings) -> Iterator[tuple[str, Callable, tuple, float]]:
    """Yield `(name, function, arguments, bytes that must be moved)` for one layer."""
    left, right = (
        jax.random.normal(jax.random.key(seed), (layer.n, 1, layer.t, size))
        for seed, size in enumerate((layer.i, layer.j))
    )
    weights, factors = layer.i * layer.j, layer.n * layer.t * (layer.i + layer.j)
    module = importlib.import_module("replay.kernels.square_sum")
    total = jnp.zeros((1, layer.i, layer.j))
    for name in ("xla", "pallas"):
        function = functools.partial(getattr(module, name), power=2)
        yield f"square_sum {name}", function, (total, left, right), 4.0 * (factors + 2 * weights)

    module = importlib.import_module("replay.kernels.top_k")
    occurrence = jnp.arange(layer.n, dtype=jnp.int32)
    for k in (1, settings.k):
        empty = tuple(map(jnp.asarray, module.empty(k, (1, layer.i, layer.j))))
        step = jax.jit(module.xla)
        state = empty
        for _ in range(settings.warm):  # a running state that changes rarely, as late in training
            state = step(*state, left, right, occurrence)
        for name in ("xla", "pallas"):
            arguments = (*state, left, right, occurrence)
            moved = 4.0 * (factors + 4 * k * weights)
            yield f"top_{k} {name}", getattr(module, name), arguments, moved


def measure_kernels(peaks: dict[str, float], settings: Settings) -> list[dict[str, Any]]:
    """Time every kernel on every layer, and give its share of the limits."""
    rows = []
    for layer in settings.layers:
        cells, moved = {}, {}
        for name, function, arguments, count in kernels(layer, settings):
            try:
                compiled = jax.jit(function).lower(*arguments).compile()
                jax.block_until_ready(compiled(*arguments))
            except Exception as error:  # a kernel for another kind of device
                rows.append({"kernel": name, "layer": dataclasses.asdict(layer),
                             "error": f"{type(error).__name__}: {str(error)[:200]}"})  # fmt: skip
                continue
            cells[name], moved[name] = functools.partial(compiled, *arguments), count
        operations = 2.0 * layer.n * layer.t * layer.i * layer.j
        for name, milliseconds in alternate(cells, settings).items():
            seconds = 1e-3 * milliseconds["value"]
            rows.append({
                "kernel": name, "layer": dataclasses.asdict(layer), "ms": milliseconds,
                "bytes/s": moved[name] / seconds, "operations/s": operations / seconds,
                "share of bandwidth": moved[name] / seconds / peaks["bytes/s"],
                "share of arithmetic": operations / seconds / peaks["operations/s"],
            })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------ models


def normal(key: Any, *shape: int) -> Any:
    """Return a random matrix that keeps the size of what it multiplies."""
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def cross_entropy(logits: Any, label: Any) -> Any:
    """Return the mean over all leading axes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def mlp(settings: Settings) -> tuple[Callable, Any, Any]:
    """Return the loss, weights and a batch of a network of dense layers on noise."""
    sizes = (784, *settings.widths, 10)
    keys = jax.random.split(jax.random.key(settings.seed), len(sizes))
    params = [
        {"w": normal(key, inside, outside), "b": jnp.zeros(outside)}
        for key, inside, outside in zip(keys[1:], sizes, sizes[1:], strict=False)
    ]

    def loss(params, example, key):
        x = example["x"]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], example["y"])

    n = settings.mlp_batch
    return loss, params, {"x": jax.random.normal(keys[0], (n, 784)), "y": jnp.arange(n) % 10}


def cnn(settings: Settings) -> tuple[Callable, Any, Any]:
    """Return a network of strided convolutions on noise."""
    sizes, n = (3, *settings.channels), settings.image_batch
    keys = jax.random.split(jax.random.key(settings.seed), len(sizes) + 1)
    pairs = zip(keys[2:], sizes, sizes[1:], strict=False)
    params = {
        "kernels": [normal(key, 3, 3, inside, outside) for key, inside, outside in pairs],
        "out": normal(keys[1], sizes[-1], 10),
    }

    def loss(params, example, key):
        x = example["x"][None]
        for kernel in params["kernels"]:
            layout = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
            x = jax.nn.relu(x)
        return cross_entropy(x.mean(axis=(0, 1, 2)) @ params["out"], example["y"])

    images = jax.random.normal(keys[0], (n, settings.image, settings.image, 3))
    return loss, params, {"x": images, "y": jnp.arange(n) % 10}


def transformer(settings: Settings) -> tuple[Callable, Any, Any]:
    """Return a transformer that reads the source text of Python's standard library."""
    width, length, n = settings.width, settings.time, settings.text_batch
    keys = iter(jax.random.split(jax.random.key(settings.seed), 3 + 6 * settings.depth))
    shapes = {name: (width, width) for name in ("query", "key", "value", "out")}
    shapes |= {"wide": (width, 4 * width), "narrow": (4 * width, width)}
    params = {
        "letters": jax.random.normal(next(keys), (128, width)),
        "places": jax.random.normal(next(keys), (length, width)),
        "head": normal(next(keys), width, 128),
        "layers": [
            {name: normal(next(keys), *shape) for name, shape in shapes.items()}
            | {"scale": jnp.ones((2, width))}
            for _ in range(settings.depth)
        ],
    }

    def normed(x, scale):
        return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale

    def loss(params, example, key):
        x = params["letters"][example["x"]] + params["places"]
        for layer in params["layers"]:
            y = normed(x, layer["scale"][0])
            heads = [(y @ layer[name]).reshape(length, 8, -1) for name in ("query", "key", "value")]
            found = jax.nn.dot_product_attention(*heads, is_causal=True)
            x = x + found.reshape(length, width) @ layer["out"]
            y = normed(x, layer["scale"][1])
            x = x + jax.nn.gelu(y @ layer["wide"]) @ layer["narrow"]
        return cross_entropy(x @ params["head"], example["y"])

    text = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8)
    starts = np.arange(n) * ((len(text) - length - 1) // n)
    windows = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return loss, params, {"x": jnp.asarray(windows[:, :-1]), "y": jnp.asarray(windows[:, 1:])}


def reductions(strategy: str, loss: Callable, settings: Settings) -> dict[str, Callable]:
    """Return what is asked, each as `(params, batch) -> result`."""
    of = replay.per_sample(loss, strategy=strategy, memory=settings.memory)
    return {
        "norms": of.norms,
        "square_sum": of.square_sum,
        "abs_sum": of.abs_sum,
        "max": of.max,
        "argmax": of.argmax,
        "gram": of.gram,
        "dot": lambda params, batch: of.dot(params, params, batch),
        "project": lambda params, batch: of.project(16, jax.random.key(1), params, batch),
    }


def measure_models(peaks: dict[str, float], settings: Settings) -> list[dict[str, Any]]:
    """Time all reductions of all models by all strategies, beside a training step."""
    optimizer, rows = optax.adam(1e-6), []
    for make in (mlp, cnn, transformer):
        loss, params, batch = make(settings)
        opt_state = optimizer.init(params)

        def step(params, opt_state, batch, loss=loss):
            def mean_loss(params):
                return jax.vmap(loss, (None, 0, None))(params, batch, None).mean()

            grads = jax.grad(mean_loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        # Not donated, so that a block of calls can start from one state.
        cells: dict[Any, Any] = {("step", ""): (jax.jit(step), (params, opt_state, batch))}
        for strategy in ("factored", "scan", "vmap"):
            for name, function in reductions(strategy, loss, settings).items():
                cells[name, strategy] = jax.jit(function), (params, batch)
        ready: dict[Any, Callable[[], Any]] = {}
        memory = {}
        for (name, strategy), (function, arguments) in cells.items():
            try:
                compiled = function.lower(*arguments).compile()
                jax.block_until_ready(compiled(*arguments))
            except Exception as error:  # does not fit, or has no kernel here
                rows.append({"model": make.__name__, "reduction": name, "strategy": strategy,
                             "error": f"{type(error).__name__}: {str(error)[:200]}"})  # fmt: skip
                continue
            ready[name, strategy] = functools.partial(compiled, *arguments)
            found: Any = compiled.memory_analysis()
            memory[name, strategy] = found.temp_size_in_bytes
        times = alternate(ready, settings)
        answer = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
        for (name, strategy), milliseconds in times.items():
            least = answer / peaks["bytes/s"]  # to read the weights, or to write as many answers
            rows.append({
                "model": make.__name__, "reduction": name, "strategy": strategy,
                "ms": milliseconds, "steps": milliseconds["value"] / times["step", ""]["value"],
                "temporary bytes": memory[name, strategy], "bytes of weights": answer,
                "weights once at full bandwidth / time": 1e3 * least / milliseconds["value"],
            })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows, most telling columns first."""
    for row in rows:
        name = " ".join(
            str(row[x]) for x in ("model", "kernel", "reduction", "strategy") if x in row
        )
        if "layer" in row:
            name += " " + "x".join(map(str, row["layer"].values()))
        if "error" in row:
            print(f"{name:<50}{row['error'].splitlines()[0]}")
            continue
        ms = row["ms"]
        rest = [f"{k} {row[k]:.3g}" for k in ("steps", "share of bandwidth", "share of arithmetic")
                if k in row]  # fmt: skip
        span = f"[{ms['low']:.4g}, {ms['high']:.4g}]"
        print(f"{name:<50}{ms['value']:>9.4g} ms {span:<20} {', '.join(rest)}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="run tiny on a CPU; writes nothing")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.cpu:
        print("JAX has no GPU here, so there is nothing to measure; --cpu runs a smoke test.")
        sys.exit(0)
    settings, begun = (Settings().tiny() if options.cpu else Settings()), time.perf_counter()
    peaks = limits(settings)
    print(f"{device.device_kind}:", ", ".join(f"{x:.3g} {name}" for name, x in peaks.items()))
    found_kernels = measure_kernels(peaks, settings)
    show(found_kernels)
    found_models = measure_models(peaks, settings)
    show(found_models)
    minutes = (time.perf_counter() - begun) / 60
    print(f"{minutes:.1f} minutes")
    if not options.cpu:
        packages = ("jax", "jaxlib", "numpy", "optax")
        result = {
            "question": "how close to a GPU's limits are reductions of per-sample gradients?",
            "environment": {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "device": device.device_kind,
                "system": platform.platform(),
                "python": platform.python_version(),
                "versions": {name: importlib.metadata.version(name) for name in packages},
                "minutes": minutes,
            },
            "settings": dataclasses.asdict(settings),
            "limits": peaks,
            "kernels": found_kernels,
            "models": found_models,
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
