"""Which way of having per-sample gradients is fastest on this machine: measured once, remembered.

A cost model of arithmetic and memory traffic is off by factors of two where caches, threads and
fusion decide, so what is remembered is the time that each strategy took for the very program and
shapes. Timing decides nothing by itself: `measure` is asked for, and its answer is part of the
identity of what is computed with it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from replay.identity import threads


def identity(*parts: Any) -> str:
    """Return the key under which a measurement is remembered: program, shapes and machine."""
    device = jax.devices()[0]
    count = threads() if device.platform == "cpu" else 1
    machine = (jax.__version__, device.platform, device.device_kind, count)
    return hashlib.sha256(repr((parts, machine)).encode()).hexdigest()[:32]


def recall(key: str) -> dict[str, float]:
    """Return the seconds that each strategy took; empty where nothing was measured."""
    return _read().get(key, {})


def remember(key: str, seconds: Mapping[str, float]) -> None:
    """Keep a measurement for later processes; a cache that cannot be written is no error."""
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {**_read(), key: dict(seconds)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(table, file)
        os.replace(file.name, path)


def measure(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int = 5, patience: float = 3.0
) -> dict[str, float]:
    """Return the least seconds of each call, in turn; each has already run once.

    The least, because other work on the machine only ever adds to it.

    Args:
        calls: by strategy; each returns arrays that are waited for.
        repeats: how often each is timed.
        patience: a call that takes this many times as long as the best is timed once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        best = min((min(taken) for taken in seconds.values() if taken), default=float("inf"))
        for name, call in calls.items():
            if seconds[name] and min(seconds[name]) > patience * best:
                continue
            begun = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begun)
    return {name: min(taken) for name, taken in seconds.items()}


def _path() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home, "jax-replay", "strategies.json")


def _read() -> dict[str, dict[str, float]]:
    try:
        table = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
