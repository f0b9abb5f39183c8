"""Whether a replay on an accelerator has the bits of its recording, and whether autotuning matters.

Question: a CNN and a transformer are recorded in one process, which dumps XLA's autotune results,
and audited in that process, in a fresh one, and in a fresh one that loads the results; once with
default flags and once with `--xla_gpu_deterministic_ops`. Which grade does each audit give?

Command:  python experiments/gpu_replay.py              writes results/gpu_replay.json
          python experiments/gpu_replay.py --allow-cpu  smoke test, tiny; writes nothing on a CPU
Expected: BITWISE in the recording process, unless atomic additions (the gradients of max-pool and
          of the embedding) reorder themselves; BITWISE in a fresh process that loads the autotune
          results; without them NUMERIC wherever autotuning chose another kernel. With
          deterministic ops the transformer is BITWISE everywhere, and the CNN FAILED: its
          select-and-scatter has no deterministic form.
Run time: 5 minutes on one GPU (a guess); the smoke test 1 minute on two cores.

It has NOT BEEN RUN ON A GPU. The expectation was read, not measured, and holds nothing up until
results/gpu_replay.json exists.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen
from sklearn.datasets import load_digits

import replay

RESULT = pathlib.Path(__file__).parent / "results" / "gpu_replay.json"
VOCABULARY = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; batch and width are large enough for the autotuner to have a choice."""

    steps: int = 400
    checkpoints: int = 50
    batch: int = 128
    width: int = 256
    window: int = 128
    seed: int = 0
    models: tuple[str, ...] = ("convolution", "transformer")
    flags: tuple[str, ...] = ("", "--xla_gpu_deterministic_ops=true")
    allow_cpu: bool = False

    def small(self) -> "Settings":
        """Return the same experiment in the size of a smoke test."""
        return dataclasses.replace(self, steps=8, checkpoints=4, batch=8, width=16, window=16)


class Convolution(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, train):
        for features in (self.width // 4, self.width // 2, self.width):
            x = linen.Conv(features, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            x = linen.max_pool(x, (2, 2), (2, 2))
        return linen.Dense(10)(x.reshape(x.shape[0], -1))


class Transformer(linen.Module):
    width: int

    @linen.compact
    def __call__(self, characters, train):
        embed = linen.Embed(VOCABULARY, self.width)
        place = self.param("place", linen.initializers.normal(0.02), (len(characters), self.width))
        x = embed(characters) + place
        for _ in range(2):
            attend = linen.MultiHeadDotProductAttention(
                4, dropout_rate=0.1, deterministic=not train
            )
            x = x + attend(linen.LayerNorm()(x), mask=linen.make_causal_mask(characters))
            wide = linen.gelu(linen.Dense(4 * self.width)(linen.LayerNorm()(x)))
            x = x + linen.Dropout(0.1, deterministic=not train)(linen.Dense(self.width)(wide))
        return embed.attend(linen.LayerNorm()(x))


def convolution(settings: Settings) -> tuple[replay.Program, Any]:
    """Return a CNN with batch norm and max-pool, and scanned digits at 32 by 32 pixels."""

    def loss(apply, batch):
        logits = apply(batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32).repeat(4, axis=1).repeat(4, axis=2)
    program = replay.Program.linen(
        Convolution(settings.width),
        loss,
        optax.sgd(0.05, momentum=0.9),
        jnp.zeros((1, 32, 32, 1)),
        batched=True,
        rngs=(),
        train=False,
    )
    return program, {"x": x, "y": labels.astype(np.int32)}


def transformer(settings: Settings) -> tuple[replay.Program, Any]:
    """Return a transformer with tied embeddings and dropout, and text of the standard library."""

    def loss(apply, characters):
        logits = apply(characters[:-1], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, characters[1:]).mean()

    source = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.arange(0, len(source) - settings.window - 1, 16)[:, None]
    windows = np.minimum(source, VOCABULARY - 1)[starts + np.arange(settings.window + 1)]
    blank = jnp.zeros(settings.window, jnp.int32)
    program = replay.Program.linen(
        Transformer(settings.width), loss, optax.adamw(1e-3), blank, train=False
    )
    return program, windows.astype(np.int32)


MODELS = {"convolution": convolution, "transformer": transformer}


def record(path: str, model: str, settings: Settings) -> replay.Run:
    program, data = MODELS[model](settings)
    samples = len(jax.tree.leaves(data)[0])
    epochs = -(-settings.steps // (samples // settings.batch))
    order = replay.Order.shuffled(settings.batch, epochs, settings.seed)
    with replay.Recorder(
        path,
        program,
        data,
        order,
        key=jax.random.key(settings.seed),
        checkpoints=settings.checkpoints,
        self_test=False,  # a second process would find the memory of the accelerator taken
    ) as recorder:
        recorder.advance(settings.steps)
    return replay.open(path)


def child(path: str, model: str, recording: bool, plain: dict[str, Any]) -> dict[str, Any]:
    """Record or open a run, audit it, and return what a result file needs."""
    try:
        run = record(path, model, Settings(**plain)) if recording else replay.open(path)
        audit = run.verify()
    except Exception as error:  # a finding of its own: XLA refuses some programs with some flags
        return _failed(f"{type(error).__name__}: {error}")
    divergences = [str(s.divergence or s.error) for s in audit.segments if s.divergence or s.error]
    return {
        "grade": str(audit.grade),
        "segments": len(audit.segments),
        "departing": len(divergences),
        "first": divergences[0] if divergences else None,
        "replay_seconds": round(audit.seconds, 2),
        "differences": {name: list(pair) for name, pair in audit.differences.items()},
        "environment": run.log.header.environment,
        "device": jax.devices()[0].client.platform_version,
    }


def in_process(flags: str, *asked: Any) -> dict[str, Any]:
    """Run `child` in a process of its own, because XLA reads its flags once."""
    done = subprocess.run(
        [sys.executable, __file__, "child", json.dumps(asked)],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return _failed(f"the process ended with code {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _failed(why: str) -> dict[str, Any]:
    return {"grade": "FAILED", "first": " ".join(why.split())[:300]}


def measure(settings: Settings, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Record and replay every model with every set of flags."""
    rows = []
    for model in settings.models:
        for number, flags in enumerate(settings.flags):
            path = str(folder / f"{model}-{number}")
            tuned = pathlib.Path(f"{path}.autotune.textproto")
            asked = (path, model, False, dataclasses.asdict(settings))
            dump = f"{flags} --xla_gpu_dump_autotune_results_to={tuned}"
            answers = {"recording": in_process(dump, path, model, True, asked[-1])}
            if answers["recording"]["grade"] != "FAILED":
                answers["fresh"] = in_process(flags, *asked)
            if tuned.exists() and "fresh" in answers:
                load = f"{flags} --xla_gpu_load_autotune_results_from={tuned}"
                answers["fresh, autotune results loaded"] = in_process(load, *asked)
            for process, answer in answers.items():
                row = {"model": model, "flags": flags, "process": process, **answer}
                rows.append(row | {"autotune_bytes": tuned.stat().st_size if tuned.exists() else 0})
                print(f"{model:12} {flags or 'default flags':34} {process:32}", end=" ")
                print(answer["grade"], answer["first"] or "", flush=True)
    return rows


def main() -> None:
    settings = tyro.cli(Settings)
    platform = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()  # asked elsewhere: the backend would take the accelerator's memory here
    if platform == "cpu" and not settings.allow_cpu:
        raise SystemExit("there is no accelerator here; --allow-cpu runs a smoke test")
    with tempfile.TemporaryDirectory() as folder:
        small = platform == "cpu"
        rows = measure(settings.small() if small else settings, pathlib.Path(folder))
    if small:
        return
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child(*json.loads(sys.argv[2]))))
    else:
        main()
