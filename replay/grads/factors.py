"""The factors of a per-sample gradient, and the rules that give them for single operations.

A rule takes the shapes of an operation and returns `(factor, moves)`: `factor(weights, operands,
cotangents)` of one sample, and how its product becomes the value that met the data.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax


class Outer(NamedTuple):
    """The gradient `g[b, i, j] = sum_t left[b, t, i] * right[b, t, j]` of one sample."""

    left: Any
    right: Any


class Rows(NamedTuple):
    """The gradient `g[i] = sum_t right[t] where index[t] == i` of one sample, as of an embedding.

    `index` is `int32[t]`, `right` is `[t, j]`; an index outside the table adds nothing.
    """

    index: Any
    right: Any


class Whole(NamedTuple):
    """The gradient of one sample itself, no larger than what it is made of."""

    value: Any


Factor = Outer | Rows | Whole

# How `[b, i, j]` of an `Outer`, or the table of `Rows`, becomes the value: ("reshape", sizes) and
# ("transpose", axes), one after the other.
Moves = tuple[tuple[str, tuple[int, ...]], ...]


def move(array: Any, moves: Moves) -> Any:
    """Apply moves to an array."""
    for name, numbers in moves:
        array = getattr(array, name)(numbers)
    return array


def dense(numbers, shapes, number):
    """The rule of a matrix product, the parameter on either side."""
    (contract, batch) = numbers
    other = 1 - number
    weight_rank, data_rank = len(shapes[number]), len(shapes[other])
    c_w, b_w = tuple(contract[number]), tuple(batch[number])
    c_d, b_d = tuple(contract[other]), tuple(batch[other])
    free_w = tuple(i for i in range(weight_rank) if i not in c_w + b_w)
    free_d = tuple(i for i in range(data_rank) if i not in c_d + b_d)
    order = (*b_w, *c_w, *free_w)
    sizes = tuple(shapes[number][i] for i in order)
    b = math.prod(shapes[number][i] for i in b_w)
    i = math.prod(shapes[number][k] for k in c_w)
    j = math.prod(shapes[number][k] for k in free_w)
    t = math.prod(shapes[other][k] for k in free_d)

    def factor(weights, operands, cotangents):
        left = operands[0].transpose(*b_d, *free_d, *c_d).reshape(b, t, i)
        right = cotangents[0]
        if number == 0:  # its free axes come before those of the data
            right = right.reshape(b, j, t).transpose(0, 2, 1)
        return Outer(left, right.reshape(b, t, j))

    return factor, (("reshape", sizes), ("transpose", _inverse(order)))


def convolution(settings, shapes):
    """The rule of a convolution: a matrix product with the patches of its input."""
    numbers, groups = settings["dimension_numbers"], settings["feature_group_count"]
    kernel = tuple(shapes[1][axis] for axis in numbers.rhs_spec)  # out, in, spatial
    window = kernel[2:]
    outs, ins = kernel[0] // groups, kernel[1]

    def factor(weights, operands, cotangents):
        left = _patches(_grouped(operands[0], numbers.lhs_spec, groups), window, settings)
        right = _grouped(cotangents[0], numbers.out_spec, groups)
        return Outer(*(x.reshape(groups, -1, x.shape[-1]) for x in (left, right)))

    split = (groups, *window, ins, outs)  # of [group, window * in, out]
    last = len(split) - 1
    outs_first = (0, last, last - 1, *range(1, last - 1))
    moves = (("reshape", split), ("transpose", outs_first), ("reshape", kernel))
    return factor, (*moves, ("transpose", _inverse(numbers.rhs_spec)))


def _grouped(image, spec, groups):
    """Return an image as `[group, batch, *spatial, channels of the group]`."""
    image = image.transpose(spec[0], *spec[2:], spec[1])
    return jnp.moveaxis(image.reshape(*image.shape[:-1], groups, -1), -2, 0)


def _patches(image, window, settings):
    """Return what each element of an output sees, `[group, batch, *spatial, window * channels]`.

    One axis of the window after the other, each put together along the channels, which lie next to
    each other in memory: on CPU a tenth of the time of all offsets at once. Not by
    `lax.conv_general_dilated_patches`, which multiplies by ones and zeros: that is slower still,
    and makes NaN of what stands beside an infinity.
    """
    strides, dilation = settings["window_strides"], settings["rhs_dilation"]
    edges = zip(settings["padding"], settings["lhs_dilation"], strict=True)
    interior = [(low, high, between - 1) for (low, high), between in edges]
    none = (0, 0, 0)
    image = lax.pad(image, jnp.zeros((), image.dtype), [none, none, *interior, none])
    for axis in reversed(range(len(window))):
        stride, step, place = strides[axis], dilation[axis], axis + 2
        count = (image.shape[place] - (window[axis] - 1) * step - 1) // stride + 1
        ends = [(n * step, n * step + (count - 1) * stride + 1) for n in range(window[axis])]
        seen = [lax.slice_in_dim(image, *both, stride, place) for both in ends]
        image = jnp.concatenate(seen, axis=-1)
    return image


def embedding(settings, shapes):
    """The rule of looking up rows of a table; None for any other gather."""
    numbers, table, indices = settings["dimension_numbers"], shapes[0], shapes[1]
    mode = settings["mode"]
    known = mode in (lax.GatherScatterMode.FILL_OR_DROP, lax.GatherScatterMode.CLIP)
    known |= mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if (
        not known
        or tuple(numbers.collapsed_slice_dims) != (0,)
        or tuple(numbers.start_index_map) != (0,)
        or numbers.operand_batching_dims
        or tuple(settings["slice_sizes"]) != (1, *table[1:])
        or indices[-1:] != (1,)
    ):
        return None
    lead = len(indices) - 1
    offsets = tuple(numbers.offset_dims)
    front = tuple(i for i in range(lead + len(offsets)) if i not in offsets)

    def factor(weights, operands, cotangents):
        index = operands[0].reshape(-1).astype(jnp.int32)
        if mode == lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, table[0] - 1)
        right = cotangents[0].transpose(*front, *offsets)
        return Rows(index, right.reshape(index.shape[0], -1))

    return factor, (("reshape", table),)


def rows(table, sizes, first_moves):
    """The rule of taking neighbouring rows of a table where the data says, else None."""
    if not table or sizes[1:] != table[1:] or not first_moves:
        return None

    def factor(weights, operands, cotangents):
        first = jnp.clip(operands[0].astype(jnp.int32), 0, table[0] - sizes[0])
        right = cotangents[0].reshape(sizes[0], -1)
        return Rows(first + jnp.arange(sizes[0], dtype=jnp.int32), right)

    return factor, (("reshape", table),)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(axes))
