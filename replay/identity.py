"""What makes two computations the same: fingerprints of states, witnesses of losses, the machine.

The integer hashes mix the bits of every element with its position, so that swapped elements
show, and add up without regard to order, so that they are exact on any device. The mixing
steps are the finalisers `lowbias32` (Wellons, 2018) and SplitMix64 (Steele, Lea and Flood,
2014). They detect accidents; they are not meant to resist someone who forges a run.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# XLA flags that can change what is computed, and that a replay may therefore restore from a
# record. Anything else in a record's flags (dump folders, plug-in paths) is never restored.
NUMERIC_FLAGS = (
    "xla_cpu_enable_fast_math",
    "xla_cpu_enable_fast_min_max",
    "xla_cpu_fast_math_honor_division",
    "xla_cpu_fast_math_honor_functions",
    "xla_cpu_fast_math_honor_infs",
    "xla_cpu_fast_math_honor_nans",
    "xla_cpu_max_isa",
    "xla_cpu_prefer_vector_width",
    "xla_cpu_use_fusion_emitters",
    "xla_cpu_use_thunk_runtime",
    "xla_backend_optimization_level",
    "xla_disable_hlo_passes",
    "xla_allow_excess_precision",
    "xla_gpu_autotune_level",
    "xla_gpu_deterministic_ops",
    "xla_gpu_exclude_nondeterministic_ops",
    "xla_gpu_enable_triton_gemm",
    "xla_gpu_enable_cublaslt",
)

_OF_A_THREAD = (
    "enable_x64",
    "default_matmul_precision",
    "default_prng_impl",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
    "threefry_partitionable",
)

# No multiple of 8, the bytes of one leaf in a full fingerprint: the two never look alike.
SHORT_DIGEST = 12


def fingerprint(leaves: Sequence[jax.Array]) -> jax.Array:
    """Hash raw leaves on their device.

    Args:
        leaves: raw arrays of any dtype (no typed keys).

    Returns:
        `uint32[leaves, 2]`, two lanes for each leaf. Integer arithmetic only: every device,
        thread count and compiler version gives the same answer.
    """
    return jnp.stack([_lanes(leaf) for leaf in leaves])


def fingerprint_on_host(leaves: Sequence[np.ndarray]) -> np.ndarray:
    """Hash raw leaves that lie on the host, with 64-bit types whatever JAX's settings are."""
    plain = [
        np.ascontiguousarray(leaf).reshape(-1).view(np.uint32) if leaf.dtype.itemsize >= 8 else leaf
        for leaf in map(np.asarray, leaves)
    ]
    return np.asarray(_jitted_fingerprint(plain))


def short_digest(lanes: np.ndarray) -> bytes:
    """Fold a fingerprint into `SHORT_DIGEST` bytes, for states that are not stored."""
    return hashlib.sha256(np.ascontiguousarray(lanes, np.uint32).tobytes()).digest()[:SHORT_DIGEST]


def _lanes(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = leaf.dtype.itemsize
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
        width //= 2
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    bits = lax.bitcast_convert_type(leaf, unsigned).reshape(-1).astype(jnp.uint32)
    position = lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B1)
    first = _lowbias32(bits ^ (position + jnp.uint32(0x85EBCA77)))
    second = (first ^ (first >> 13) ^ jnp.uint32(0xC2B2AE3D)) * jnp.uint32(0x27D4EB2F)
    second = second ^ (second >> 15)
    # One reduction of both lanes, which XLA turns into one vectorised loop; two take seven times
    # the processor time.
    nothing = (jnp.uint32(0), jnp.uint32(0))
    sums = lax.reduce((first, second), nothing, lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))
    return jnp.stack(sums)


_jitted_fingerprint = jax.jit(fingerprint)


def _lowbias32(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def witness(losses: np.ndarray) -> np.ndarray:
    """Hash the losses of each batch.

    Args:
        losses: floating point `[steps, batch]`, as they left the program of a step.

    Returns:
        `uint64[steps]`. One changed bit of one loss always changes the witness.
    """
    unsigned = np.dtype(f"uint{8 * losses.dtype.itemsize}")
    x = np.ascontiguousarray(losses).view(unsigned).astype(np.uint64)
    with np.errstate(over="ignore"):
        position = np.arange(1, x.shape[1] + 1, dtype=np.uint64)
        x = x + position * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
        return x.sum(axis=1, dtype=np.uint64)


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def threads() -> int:
    """Count the threads of the XLA CPU pool in this process, starting the backend if need be.

    The pool takes its size from `NPROC` at the moment the backend starts, so the variable's
    value today proves nothing: on Linux the pool's threads are counted by their name.
    """
    jax.devices()
    count = 0
    for name in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has ended in the meantime
            count += name.read_text().startswith("tf_XLAEigen")
    return count or int(os.environ.get("NPROC", 0)) or (os.cpu_count() or 1)


def environment() -> dict[str, Any]:
    """Describe this process as far as it can change the bits of a compiled program."""
    device = jax.devices()[0]
    flags = dict(_flag(word) for word in shlex.split(os.environ.get("XLA_FLAGS", "")))
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "threads": threads(),
        "processor": _processor(),
        "xla_flags": {name: flags[name] for name in sorted(flags) if name in NUMERIC_FLAGS},
        "x64": bool(setting("jax_enable_x64")),
        "matmul_precision": str(setting("jax_default_matmul_precision")),
        "threefry_partitionable": bool(setting("jax_threefry_partitionable")),
    }


def setting(name: str) -> Any:
    """Return one of JAX's settings as it holds in this thread."""
    return getattr(jax.config, name)


def settings() -> dict[str, Any]:
    """Return all settings of this thread that decide what tracing makes of a function."""
    return {name: setting(f"jax_{name}") for name in _OF_A_THREAD}


def settings_here() -> Callable[[], contextlib.AbstractContextManager]:
    """Return what gives another thread the settings that hold in this one.

    A `with jax.enable_x64(True)` holds for one thread only: what reads data or traces a program
    beside the training has to see the same numbers.
    """
    values = settings()

    @contextlib.contextmanager
    def given() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(getattr(jax, name)(value))
            yield

    return given


def differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple]:
    """Return `{name: (recorded, here)}` for everything that differs between two environments."""
    names = sorted(set(recorded) | set(here))
    pairs = {name: (recorded.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flag(word: str) -> tuple[str, str]:
    name, _, value = word.lstrip("-").partition("=")
    return name, value or "true"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
