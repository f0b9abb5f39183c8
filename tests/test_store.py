import shutil

import ml_dtypes
import numpy as np
import pytest
import xarray
import zarr

from replay.errors import LogError
from replay.store import ArraySpec, Place, StoredArray, lay_out, rows


@pytest.fixture(params=["path", "url"])
def place(request, tmp_path):
    return Place(tmp_path / "run" if request.param == "path" else f"memory://{tmp_path.name}/run")


def test_files_are_written_read_appended_cut_listed_and_deleted(place):
    place.write("program/update", b"abc")
    place.write("program/update", b"abcdef")
    place.append("journal.msgpack", b"12")
    place.append("journal.msgpack", b"345")
    place.truncate("journal.msgpack", 4)
    assert place.read("journal.msgpack") == b"1234"
    assert place.list() == {"program/update": 6, "journal.msgpack": 4}
    assert place.size("program/update") == 6
    place.delete("program")
    place.delete("never there")
    assert place.list() == {"journal.msgpack": 4}


def test_deleting_a_row_leaves_rows_whose_numbers_begin_alike(place):
    for row in (1, 10, 12):
        place.write(f"states/0/c/{row}/0", b"x")
        place.write(f"states/1/c/{row}", b"x")
    place.delete("states/0/c/1")
    place.delete("states/1/c/1")
    left = {f"states/0/c/{row}/0" for row in (10, 12)} | {f"states/1/c/{row}" for row in (10, 12)}
    assert set(place.list()) == left


def test_what_is_missing_or_too_large_is_named(place):
    with pytest.raises(LogError, match="program/gradient is missing"):
        place.read("program/gradient")
    place.write("large", b"0123456789")
    with pytest.raises(LogError, match="large has 10 bytes, more than the 5"):
        place.read("large", limit=5)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        ((3, 4), "float32"),
        ((), "int32"),
        ((0, 2), "float32"),
        ((5,), "bfloat16"),
        ((5,), "float8_e4m3fn"),
        ((2,), "bool"),
        ((2,), "complex64"),
        ((3000, 1001), "float32"),
    ],
    ids=str,
)
def test_rows_come_back_with_the_same_bits(place, row, dtype):
    array = StoredArray(place, rows("states/0", row, 9, dtype, ["checkpoint", *"ab"[: len(row)]]))
    values = np.random.default_rng(0).normal(size=row).astype(dtype)
    array.write(4, values[None])
    again = array.read(4)
    assert (again.dtype, again.shape) == (values.dtype, values.shape)
    assert again.tobytes() == values.tobytes()


def test_zeros_are_stored_and_a_lost_row_is_an_error_not_zeros(tmp_path):
    place = Place(tmp_path)
    array = StoredArray(place, rows("states/0", (4,), 9, "float32", ["checkpoint", "a"]))
    array.write(0, np.zeros((1, 4), np.float32))
    assert array.read(0).tolist() == [0, 0, 0, 0]
    with pytest.raises(LogError, match="states/0 cannot be read.*missing"):
        array.read(1)


def test_every_flipped_bit_of_a_chunk_is_found(tmp_path):
    place = Place(tmp_path)
    array = StoredArray(place, rows("states/0", (4,), 9, "float32", ["checkpoint", "a"]))
    array.write(0, np.arange(4, dtype=np.float32)[None])
    file = tmp_path / "states/0/c/0/0"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(LogError, match="states/0"):
            array.read(0)


def test_zarr_and_xarray_open_a_group_and_see_names_and_bfloat16_as_integers(tmp_path):
    place = Place(tmp_path)
    specs = [
        rows("states/0", (2,), 3, "float32", ["checkpoint", "axis_0"]),
        rows("states/1", (2,), 3, "bfloat16", ["checkpoint", "axis_0"]),
    ]
    lay_out(place, "states", specs, note="hello")
    for row in range(3):
        StoredArray(place, specs[0]).write(row, np.full((1, 2), row, np.float32))
        StoredArray(place, specs[1]).write(row, np.full((1, 2), row, ml_dtypes.bfloat16))
    group = zarr.open_group(tmp_path / "states", mode="r")
    assert group.attrs["note"] == "hello"
    assert group["1"].attrs["dtype"] == "bfloat16"
    assert np.asarray(group["1"])[2].view(ml_dtypes.bfloat16).tolist() == [2, 2]
    dataset = xarray.open_zarr(tmp_path / "states", consolidated=False)
    assert dataset["0"].dims == ("checkpoint", "axis_0")
    assert dataset["0"].values.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_layout_comes_from_the_spec_and_not_from_the_folder(tmp_path):
    place = Place(tmp_path)
    spec = rows("states/0", (2,), 3, "float32", ["checkpoint", "axis_0"])
    StoredArray(place, spec).write(0, np.ones((1, 2), np.float32))
    place.write("states/0/zarr.json", b'{"zarr_format": 3, "shape": [99]}')
    assert StoredArray(place, spec).read(0).tolist() == [1, 1]


def test_a_spec_survives_msgpack_and_a_strange_one_is_refused():
    spec = ArraySpec("steps/ids", (10, 4), (5, 4), "int32", ("step", "position"), ids=True)
    assert ArraySpec.from_plain(spec.to_plain()) == spec
    strange = [
        {"name": "states/../../x"},
        {"name": "/etc/passwd"},
        {"shape": [-1, 4]},
        {"chunk": [0, 4]},
        {"chunk": [2**40, 4]},
        {"chunk": [5]},
    ]
    for change in strange:
        with pytest.raises(ValueError, match="."):
            ArraySpec.from_plain(spec.to_plain() | change)


def test_the_second_writer_is_told_who_holds_the_lock(tmp_path):
    with Place(tmp_path).lock():
        with pytest.raises(LogError, match=r"is being recorded by process \d+ on "):
            with Place(tmp_path).lock():
                pass
    with Place(tmp_path).lock():
        pass


def test_a_full_disk_is_an_os_error(tmp_path):
    array = StoredArray(Place(tmp_path), rows("states/0", (2,), 3, "float32", ["c", "a"]))
    (tmp_path / "states").write_bytes(b"a file where a folder should be")
    with pytest.raises(OSError, match="states/0"):
        array.write(0, np.ones((1, 2), np.float32))


def test_two_may_delete_a_folder_at_once(tmp_path, monkeypatch):
    place, rmtree, calls = Place(tmp_path), shutil.rmtree, []

    def first(path):
        calls.append(path)
        if len(calls) == 1:
            (path / "deep" / "file").unlink()
            raise FileNotFoundError(str(path / "deep" / "file"))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", first)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_bytes(b"")
    place.delete("folder")
    assert len(calls) == 2 and not (tmp_path / "folder").exists()
    place.delete("folder")  # nothing is there
