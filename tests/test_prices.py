"""That programs are counted by their text, and that prices are measured once and remembered."""

import math

import jax
import jax.numpy as jnp
import pytest

from replay import prices


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counted(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return prices.counts_of(jax.jit(function).lower(*arguments).as_text())


def test_a_matrix_product_is_counted_by_its_multiplications_and_additions():
    found = counted(jnp.matmul, (3, 5), (5, 7))
    assert found.products == 2 * 3 * 5 * 7 and found.written == 3 * 7
    assert (found.convolved, found.operations, found.large) == (0, 1, 0)


def test_a_product_of_batches_is_counted_for_each():
    assert counted(jnp.matmul, (4, 3, 5), (4, 5, 7)).products == 4 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.complex64, jnp.int32], ids=str)
def test_a_product_of_any_dtype_is_counted(dtype):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, 5), (5, 7))]
    product = jax.jit(lambda a, b: jax.lax.dot(a, b))
    assert prices.counts_of(product.lower(*shapes).as_text()).products == 2 * 3 * 5 * 7


def test_a_convolution_is_counted_by_its_kernel_and_what_it_writes():
    dims = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    found = counted(convolve, (2, 6, 6, 3), (3, 3, 3, 8))
    assert found.convolved == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 3)
    assert found.products == 0 and found.large == 1


def test_a_damaged_program_has_no_price_and_is_no_error_before_it_is_executed():
    assert set(prices.counts(b"no program")) == {0.0}


def test_until_a_machine_is_measured_its_prices_are_those_of_the_table():
    assert prices.prices() == (prices.PRICES, False)


def test_what_is_measured_is_remembered_by_later_processes(monkeypatch):
    made = {kind: prices.Price(i + 1.0, 0.5, 0.25) for i, kind in enumerate(prices.PRICES)}
    monkeypatch.setattr(prices, "_measured", lambda kind: made[kind])
    assert prices.calibrate() == made
    assert prices.prices() == (made, True)


def test_what_others_do_with_the_cores_and_what_several_do_at_a_time_is_left_out(monkeypatch):
    told = iter([(0.0, 0.0), (8.0, 2.0), (10.0, 10.0), (11.0, 14.0)])
    monkeypatch.setattr(prices, "_clocks", lambda: next(told))
    assert prices._seconds(lambda: jnp.zeros(()), 2) == 1.0
    assert prices._seconds(lambda: jnp.zeros(()), 1) == 1.0


def test_a_kind_is_measured_by_calls_of_two_sizes():
    found = prices._measured("element")
    assert all(math.isfinite(x) and x > 0 for x in found)


@pytest.mark.full
@pytest.mark.parametrize("kind", prices.PRICES)
def test_every_kind_can_be_measured(kind):
    found = prices._measured(kind)
    assert all(math.isfinite(x) and x >= 0 for x in found) and found.call > 0


def test_a_price_grows_with_the_elements_where_the_clock_does(monkeypatch):
    elapsed, now = {2**9: 1.0, 2**12: 8.0}, 0.0

    def work(kind, size):
        def call():
            nonlocal now
            now += elapsed[size]
            return jnp.zeros(())

        return call, size

    monkeypatch.setitem(prices._WORK, "product", work)
    monkeypatch.setitem(prices.SIZES, "product", (2**9, 2**12))
    monkeypatch.setattr(prices, "_clocks", lambda: (now, now))
    found = prices._measured("product")
    assert found.element == pytest.approx(7 / (2**12 - 2**9))
    assert found.call == pytest.approx(
        0.1
    )  # 1 s is what 512 elements take: a tenth of it is the least


def test_a_program_is_priced_by_what_stands_in_it(monkeypatch):
    found = prices.Counts(products=10.0, convolved=0.0, written=0.0, operations=4.0, large=0.0)
    monkeypatch.setattr(prices, "counts", lambda data: found)
    blank = dict.fromkeys(prices.PRICES, prices.Price(0.0, 0.0, 0.0))
    table = blank | {
        "product": prices.Price(0.0, 3.0, 0.0), "operation": prices.Price(2.0, 0.0, 5.0),
    }  # fmt: skip
    assert prices.of_program(b"", table) == prices.Price(10 * 3.0 + 4 * 2.0, 0.0, 4 * 5.0)
