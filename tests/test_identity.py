import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.identity import (
    SHORT_DIGEST,
    differences,
    environment,
    fingerprint,
    fingerprint_on_host,
    short_digest,
    witness,
)


def lanes_by_definition(array):
    """The fingerprint of one 32-bit array, written element by element."""
    first = second = 0
    mask = 0xFFFFFFFF
    for i, bits in enumerate(np.ascontiguousarray(array).reshape(-1).view(np.uint32).tolist()):
        x = bits ^ ((i * 0x9E3779B1 + 0x85EBCA77) & mask)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        x ^= x >> 16
        y = ((x ^ (x >> 13) ^ 0xC2B2AE3D) * 0x27D4EB2F) & mask
        y ^= y >> 15
        first, second = (first + x) & mask, (second + y) & mask
    return [first, second]


def test_a_fingerprint_is_what_its_definition_says():
    leaves = [np.arange(7, dtype=np.float32), np.array([[1, -2], [3, 4]], np.int32)]
    assert fingerprint(leaves).tolist() == [lanes_by_definition(leaf) for leaf in leaves]


@pytest.mark.parametrize(
    "leaf",
    [
        np.array([True, False]),
        np.array([1, 2, 3], np.uint8),
        np.array([1.5, 2.5], np.float16),
        np.array([1.5, 2.5], ml_dtypes.bfloat16),
        np.array([1 + 2j], np.complex64),
        np.array(3.0, np.float32),
        np.zeros((0, 3), np.float32),
        np.array([1.0, -2.0], np.float64),
        np.array([2**40], np.int64),
    ],
    ids=str,
)
def test_every_dtype_has_a_fingerprint_and_a_changed_bit_shows(leaf):
    lanes = fingerprint_on_host([leaf])
    assert lanes.shape == (1, 2)
    for bit in range(8 * leaf.nbytes):
        raw = bytearray(leaf.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape)
        if leaf.dtype != bool:
            assert (fingerprint_on_host([changed]) != lanes).all()


def test_the_host_and_the_device_agree():
    leaf = np.linspace(0, 1, 1001, dtype=np.float32)
    assert (fingerprint_on_host([leaf]) == np.asarray(fingerprint([jnp.asarray(leaf)]))).all()


def test_swapped_elements_show_in_a_fingerprint_and_in_a_witness():
    x = np.array([1.0, 2.0, 3.0], np.float32)
    y = x[[1, 0, 2]]
    assert (fingerprint_on_host([x]) != fingerprint_on_host([y])).all()
    assert witness(x[None])[0] != witness(y[None])[0]


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.integers(0, 255))
def test_one_changed_bit_of_one_loss_always_changes_the_witness(losses, place):
    x = np.array([losses], np.float32)
    y = x.copy()
    bits = y.view(np.uint32)
    bits[0, place % x.shape[1]] ^= np.uint32(1 << place % 32)
    assert witness(x)[0] != witness(y)[0]


def test_a_witness_of_many_steps_is_that_of_each():
    losses = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert witness(losses).tolist() == [int(witness(row[None])[0]) for row in losses]
    assert witness(losses).dtype == np.uint64


def test_a_short_digest_cannot_be_taken_for_a_full_one():
    assert SHORT_DIGEST % 8 != 0
    assert len(short_digest(np.zeros((3, 2), np.uint32))) == SHORT_DIGEST


def test_only_what_differs_is_named():
    assert differences({"jax": "1", "threads": 2}, {"jax": "1", "threads": 8}) == {
        "threads": (2, 8)
    }


def test_the_environment_counts_the_threads_that_xla_has_started():
    program = "from replay.identity import environment; print(environment()['threads'])"
    for count in ("1", "3"):
        # Changing the variable after the backend has started must not change the answer.
        late = "import jax, os; jax.devices(); os.environ['NPROC'] = '7'; "
        found = subprocess.run(
            [sys.executable, "-c", late + program],
            env={**os.environ, "NPROC": count},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == count


def test_the_environment_keeps_only_flags_that_change_numbers(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere --xla_cpu_enable_fast_math=true")
    assert environment()["xla_flags"] == {"xla_cpu_enable_fast_math": "true"}
