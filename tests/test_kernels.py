"""Every variant of a kernel computes what its reference does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.kernels import square_sum, top_k

needs_numba = pytest.mark.skipif(top_k.compiled is None, reason="needs numba")


def compiled_top_k(values, occurrences, left, right, occurrence):
    return top_k.compiled(np.array(values), np.array(occurrences), left, right, occurrence)


reference_top_k = jax.jit(top_k.reference)
xla_top_k = jax.jit(top_k.xla)


pallas_top_k = jax.jit(functools.partial(top_k.pallas, tile=4, interpret=True))
TOP_K = [
    pytest.param(xla_top_k, id="xla"),
    pytest.param(compiled_top_k, id="compiled", marks=needs_numba),
    pytest.param(pallas_top_k, id="pallas", marks=pytest.mark.full),
]


def integers(rng, *shape):
    """Return small integers, whose sums of products are exact in any order, with many ties."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def reals(rng, *shape):
    """Return what a ReLU returns."""
    return np.maximum(rng.standard_normal(shape), 0).astype(np.float32)


def batches(draw, seed, count, n, b, t, i, j):
    rng = np.random.default_rng(seed)
    for number in range(count):
        occurrence = np.arange(n, dtype=np.int32) + number * n
        yield draw(rng, n, b, t, i), draw(rng, n, b, t, j), occurrence


def same(ours, theirs):
    """Whether two states agree in every bit."""
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(ours, theirs, strict=True)
    )


def test_the_version_for_gpus_agrees_with_the_reference_where_it_is_interpreted():
    ours = theirs = top_k.empty(3, (1, 5, 3))
    for batch in batches(integers, 3, 2, n=4, b=1, t=2, i=5, j=3):
        theirs, ours = reference_top_k(*theirs, *batch), pallas_top_k(*ours, *batch)
        assert same(ours, theirs)


def test_the_reference_keeps_the_largest_and_their_occurrences():
    left, right = top_k.from_rows(jnp.array([[1.0], [-3.0], [2.0], [3.0]]))
    state = top_k.reference(*top_k.empty(2, (1, 1, 1)), left, right, np.arange(4, dtype=np.int32))
    assert state[0].ravel().tolist() == [3.0, 3.0]
    assert state[1].ravel().tolist() == [1, 3]


@pytest.mark.parametrize("update", TOP_K)
@pytest.mark.parametrize(
    ("draw", "k", "n", "b", "t", "i", "j"),
    [
        (integers, 3, 5, 1, 1, 3, 4),
        (integers, 4, 19, 2, 3, 3, 5),
        (integers, 1, 9, 2, 2, 5, 3),
        (integers, 9, 2, 1, 1, 2, 3),
        (reals, 3, 40, 1, 1, 7, 150),
        (reals, 1, 40, 1, 1, 7, 150),
    ],
)
def test_a_running_top_k_has_the_bits_of_the_reference(update, draw, k, n, b, t, i, j):
    ours = theirs = top_k.empty(k, (b, i, j))
    for batch in batches(draw, 0, 3, n, b, t, i, j):
        theirs = reference_top_k(*theirs, *batch)
        ours = update(*ours, *batch)
        assert same(ours, theirs)


@pytest.mark.parametrize("update", TOP_K)
def test_sums_of_rounded_products_agree_with_the_reference(update):
    ours = theirs = top_k.empty(3, (2, 4, 5))
    rng = np.random.default_rng(0)
    for number in range(2):
        left, right = (rng.standard_normal((20, 2, 6, size)).astype(np.float32) for size in (4, 5))
        batch = left, right, np.arange(20, dtype=np.int32) + 20 * number
        theirs, ours = reference_top_k(*theirs, *batch), update(*ours, *batch)
    # A sum of 6 products of size 1 is rounded 6 times, to 2**-24 of itself; no two of these
    # samples are that close, so that the occurrences agree.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=6 * 8 * 2.0**-24)
    assert np.array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("update", TOP_K)
@pytest.mark.parametrize("k", [1, 3])
def test_what_is_not_a_number_ranks_above_infinity_and_the_earlier_first(update, k):
    nan, inf = np.nan, np.inf
    left = np.array([[1, 0], [nan, 1], [0, inf], [inf, -nan]], np.float32)[:, None, None, :]
    right = np.array([[0, 5], [1, 1], [nan, inf], [0, -nan]], np.float32)[:, None, None, :]
    ours = theirs = top_k.empty(k, (1, 2, 2))
    for number in range(2):
        batch = left, right, np.arange(4, dtype=np.int32) + 4 * number
        theirs, ours = reference_top_k(*theirs, *batch), update(*ours, *batch)
        assert same(ours, theirs)
    assert theirs[1][0].tolist() == [[[1, 1], [2, 3]]]


@pytest.mark.parametrize("update", TOP_K)
def test_products_too_small_to_be_normal_are_zeros(update):
    left, right = top_k.from_rows(jnp.full((3, 2), 1e-30))
    batch = left * 1e-10, right, np.arange(3, dtype=np.int32)
    ours = update(*top_k.empty(2, (1, 1, 2)), *batch)
    assert same(ours, top_k.reference(*top_k.empty(2, (1, 1, 2)), *batch))
    assert np.asarray(ours[1]).ravel().tolist() == [0, 0, 1, 1]


@needs_numba
@settings(max_examples=12)
@given(
    k=st.sampled_from([1, 3]),
    times=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32 - 1),
    dense=st.floats(0, 1),
)
def test_no_pattern_of_zeros_and_ties_is_missed(k, times, seed, dense):
    def draw(rng, *shape):
        return integers(rng, *shape) * (rng.random(shape) < dense).astype(np.float32)

    ours = theirs = xlas = top_k.empty(k, (2, 3, 4))
    for batch in batches(draw, seed, 3, 4, 2, times, 3, 4):
        theirs, ours = reference_top_k(*theirs, *batch), compiled_top_k(*ours, *batch)
        xlas = xla_top_k(*xlas, *batch)
    assert same(ours, theirs)
    assert same(xlas, theirs)


def test_merged_states_are_the_state_of_all_samples():
    first, second = batches(integers, 0, 2, 7, 1, 1, 3, 4)
    blank = top_k.empty(3, (1, 3, 4))
    parts = [top_k.reference(*blank, *batch) for batch in (first, second)]
    whole = top_k.reference(*top_k.reference(*blank, *first), *second)
    assert same(jax.jit(top_k.merge)(*parts[0], *parts[1]), whole)
    assert same(top_k.merge(*blank, *whole), whole)
    assert same(top_k.merge(*whole, *blank), whole)


@needs_numba
def test_the_compiled_kernel_refuses_a_state_that_it_cannot_write_to():
    values, occurrences = top_k.empty(1, (1, 1, 1))
    batch = (*top_k.from_rows(jnp.ones((1, 1))), np.zeros(1, np.int32))
    with pytest.raises(TypeError, match=r"values is a .* cannot be updated in place.*top_k\.empty"):
        top_k.compiled(jnp.asarray(values), occurrences, *batch)


SQUARE_SUM = [
    pytest.param(square_sum.xla, id="xla"),
    pytest.param(functools.partial(square_sum.pallas, tile=4, interpret=True), id="pallas"),
]


@pytest.mark.parametrize("update", SQUARE_SUM)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    ("n", "b", "t", "i", "j"),
    [(5, 2, 1, 3, 4), (4, 2, 3, 3, 5), (1, 1, 1, 1, 1)],
)
def test_sums_of_powers_of_integers_have_the_bits_of_the_reference(update, power, n, b, t, i, j):
    update = jax.jit(update, static_argnames="power")
    ours = theirs = np.zeros((b, i, j), np.float32)
    for left, right, _ in batches(integers, 0, 2, n, b, t, i, j):
        theirs = square_sum.reference(theirs, left, right, power=power)
        ours = update(ours, left, right, power=power)
        assert same([ours], [theirs])


@pytest.mark.parametrize("update", SQUARE_SUM)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("t", [1, 6])
def test_sums_of_powers_agree_with_the_reference(update, power, t):
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((20, 2, t, size)).astype(np.float32) for size in (4, 5))
    total = np.ones((2, 4, 5), np.float32)
    theirs = square_sum.reference(total, left, right, power=power)
    ours = jax.jit(update, static_argnames="power")(total, left, right, power=power)
    # Nothing cancels in the sum of the 20 powers; what cancels in a gradient, a sum of t products
    # of at most 8, is rounded to 2**-24 of 8 each time, and raised to a power again by 2 * 48.
    limit = 20 * t * 8 * 2.0**-24 * (96 if power == 2 else 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


def test_other_powers_are_refused():
    one = np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match=r"power is 3.*Use power=1 or power=2"):
        square_sum.xla(one[0], one, one, power=3)


@pytest.mark.parametrize("t", [1, 2])
def test_the_largest_of_a_batch_is_the_top_1(t):
    ((left, right, occurrence),) = batches(integers, 0, 1, 5, 2, t, 3, 4)
    left[2, 1, 0, 2] = np.nan
    values, _ = reference_top_k(*top_k.empty(1, (2, 3, 4)), left, right, occurrence)
    assert same([top_k.largest(left, right)], [values[0]])
