"""The sum over samples of each weight's gradient squared, or of its magnitude.

    total'[b, i, j] = total[b, i, j] + sum_n |sum_t left[n, b, t, i] * right[n, b, t, j]| ** power

with `power` 2 or 1. All variants have one signature, `(total, left, right, *, power) -> total`:

    total  float32[b, i, j]
    left   float32[n, b, t, i]    t = 1 for a dense layer, else steps in time
    right  float32[n, b, t, j]

Variants and their use:

    reference  all gradients at once; the oracle of the tests
    xla        to be jitted; never holds more than the gradient of one sample
    compiled   None: a loop in numba took half the time of `xla` for t = 2, the same for t = 4,
               2 and 9 times as long for t = 16 and 64, and t = 1 is one matrix product
    pallas     Triton on a GPU, unproven; nobody calls it by default

With t = 1 the power of a product is the product of the powers, so that the sum over samples is one
matrix product: |left| ** power by |right| ** power. The variants round in another order each. Only
with power 2 and factors below 1e-19 or above 1e19 is there a larger difference: their squares leave
the range of float32, even where the square of the product would not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32

Total = Float32[Array, "b i j"]

compiled = None


def _raise(gradient: Any, power: int) -> Any:
    if power not in (1, 2):
        raise ValueError(
            f"power is {power}: only sums of magnitudes (1) and of squares (2) have a kernel. "
            "Use power=1 or power=2."
        )
    return jnp.abs(gradient) if power == 1 else jnp.square(gradient)


def reference(total: Any, left: Any, right: Any, *, power: int = 2) -> Total:
    """Hold all gradients at once; the oracle. Shapes and dtypes are at the head of this file."""
    gradients = jnp.einsum("nbti,nbtj->nbij", left, right, precision=lax.Precision.HIGHEST)
    return total + _raise(gradients, power).sum(axis=0)


def xla(total: Any, left: Any, right: Any, *, power: int = 2) -> Total:
    """Multiply powers where t = 1, else add one gradient after the other.

    Measured: XLA on CPU takes 6 to 20 times as long for a batch of matrix products as for one
    after the other. Shapes and dtypes are at the head of this file; to be jitted.
    """
    total, left, right = map(jnp.asarray, (total, left, right))
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    if left.shape[2] == 1 and left.shape[1] == 1:  # a batch of one product takes a third longer
        powers = _raise(left[:, 0, 0], power), _raise(right[:, 0, 0], power)
        return total + product("ni,nj->ij", *powers)[None]
    if left.shape[2] == 1:
        powers = _raise(left[:, :, 0], power), _raise(right[:, :, 0], power)
        return total + product("nbi,nbj->bij", *powers)

    def block(part):
        def add(total, sample):
            left, right = sample
            return total + _raise(product("ti,tj->ij", left, right), power), None

        total, left, right = part
        return lax.scan(add, total, (left, right))[0]

    return lax.map(block, (total, jnp.moveaxis(left, 1, 0), jnp.moveaxis(right, 1, 0)))


def pallas(
    total: Any,
    left: Any,
    right: Any,
    *,
    power: int = 2,
    tile: int = 32,
    interpret: bool = False,
) -> Total:
    """Sum up a tile of weights in registers while the samples pass by.

    Unproven: has only run in interpret mode. Shapes and dtypes are at the head of this file.

    Args:
        total: to add to.
        left: factors.
        right: factors.
        power: 1 or 2.
        tile: side of the square of weights that one program holds, a power of two.
        interpret: compute with JAX operations on any device.
    """
    b, i, j = total.shape
    n, _, t, _ = left.shape
    more_i, more_j = -i % tile, -j % tile
    total = jnp.pad(jnp.asarray(total), ((0, 0), (0, more_i), (0, more_j)))
    left = jnp.pad(jnp.asarray(left), ((0, 0), (0, 0), (0, 0), (0, more_i)))
    right = jnp.pad(jnp.asarray(right), ((0, 0), (0, 0), (0, 0), (0, more_j)))
    plane = pl.BlockSpec((1, tile, tile), lambda b, i, j: (b, i, j))
    return pl.pallas_call(
        functools.partial(_tile, n=n, t=t, power=power),
        grid=(b, (i + more_i) // tile, (j + more_j) // tile),
        in_specs=[
            plane,
            pl.BlockSpec((n, 1, t, tile), lambda b, i, j: (0, b, 0, i)),
            pl.BlockSpec((n, 1, t, tile), lambda b, i, j: (0, b, 0, j)),
        ],
        out_specs=plane,
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        interpret=interpret,
    )(total, left, right)[:, :i, :j]


def _tile(total, left, right, new_total, *, n, t, power):
    def product(s, time):
        return left[s, 0, time, :][:, None] * right[s, 0, time, :][None, :]

    def sample(s, total):
        gradient = lax.fori_loop(1, t, lambda time, g: g + product(s, time), product(s, 0))
        return total + _raise(gradient, power)

    new_total[0] = lax.fori_loop(0, n, sample, total[0])
