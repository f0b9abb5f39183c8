"""A digest tells every change of what was read, whatever the size of its pieces."""

import concurrent.futures
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from replay import pieces
from replay.pieces import Stretch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 8)
    monkeypatch.setattr(pieces, "_WORKERS", 3)  # more than one, whatever the machine


def test_a_digest_is_that_of_the_digests_of_pieces():
    found = pieces.digests([b"", b"12345678", b"123456789"])
    assert [digest.hex()[:16] for digest in found] == [
        "e3b0c44298fc1c14", "18b84ae5b24e6518", "3090e4259e2adffd",
    ]  # fmt: skip


@hypothesis.given(st.binary(min_size=1, max_size=100), st.data())
def test_no_two_values_have_one_digest(value, data):
    place = data.draw(st.integers(0, 8 * len(value) - 1))
    flipped = bytearray(value)
    flipped[place // 8] ^= 1 << place % 8
    first, second = value[:8], value[8:16]
    others = {bytes(flipped), value[:-1], value + b"\0", second + first + value[16:]} - {value}
    digest, *rest = pieces.digests([value, *others])
    assert digest not in rest


def test_what_is_read_of_files_has_the_digests_of_its_bytes(tmp_path):
    values = [np.random.default_rng(i).bytes(size) for i, size in enumerate((0, 1, 7, 8, 9, 1000))]
    stretches = []
    for i, value in enumerate(values):
        (tmp_path / str(i)).write_bytes(b"before" + value + b"after")
        stretches.append(Stretch(tmp_path / str(i), 6, len(value), 5))

    def check(_):
        for value, digest, one in zip(
            values, pieces.digests(values), pieces.read(stretches), strict=True
        ):
            assert one is not None
            assert (one[0].tobytes(), one[1]) == (value, digest)
            assert one[0].flags.writeable
            assert not value or one[0].ctypes.data % pieces.ALIGNED == 0

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # more than threads that digest
        list(pool.map(check, range(40)))


def test_a_file_of_another_size_and_what_is_no_file_is_as_good_as_missing(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(20))
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it
    stretches = [
        Stretch(file, 0, 20), Stretch(file, 0, 19), Stretch(file, 0, 21), Stretch(file, 4, 12, 3),
        Stretch(tmp_path, 0, 20), Stretch(tmp_path / "pipe", 0, 0), Stretch(tmp_path / "no", 0, 0),
        Stretch(file, 4, 12, 4),
    ]  # fmt: skip
    there = [one is not None for one in pieces.read(stretches)]
    assert there == [True, *[False] * 6, True]


def test_a_file_that_is_cut_while_it_is_read_is_as_good_as_missing(tmp_path, monkeypatch):
    file, read = tmp_path / "file", os.preadv
    file.write_bytes(bytes(64))

    def cut(*arguments):
        os.truncate(file, 60)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", cut)
    assert pieces.read([Stretch(file, 0, 64)]) == [None]


def test_who_changes_a_file_later_changes_nothing_of_what_was_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"a" * 5000)
    (one,) = pieces.read([Stretch(file, 0, 5000)])
    assert one is not None
    found, digest = one
    with open(file, "r+b") as opened:
        opened.write(b"b" * 5000)
    assert found.tobytes() == b"a" * 5000 and pieces.digests([found.data]) == [digest]
