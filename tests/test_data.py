"""Every kind of source is read by id, its bits are kept, and what would change them is refused."""

import doctest
import sys
from typing import NamedTuple

import datasets
import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import sklearn.datasets

import replay.data
from replay.data import Data, checksum
from replay.errors import DataError
from replay.tree import Leaf, nest

DIGITS = sklearn.datasets.load_digits()
IMAGES = DIGITS.data.astype(np.float32)
LABELS = DIGITS.target  # int64
BATCH = np.array([[1796, 3], [3, -1]])
SPEC = (Leaf("x", (64,), "float32"), Leaf("y", (), "int32"))


class MapStyle:
    """A torch map-style dataset, as users write them."""

    def __init__(self, *columns, transform=lambda *example: example):
        self.columns, self.transform = columns, transform

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        if type(i) is not int:
            raise TypeError("an index is an int")
        if i >= len(self):
            raise IndexError(i)
        return self.transform(*(column[i] for column in self.columns))


class Tensor:
    """What torch returns: no ndarray, but it converts to one."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Windows:
    """A source that is only ever asked for many samples: windows of a text of tokens."""

    tokens = np.arange(20, dtype=np.uint16)

    def __len__(self):
        return 16

    def __getitem__(self, ids):
        return self.tokens[ids[:, None] + np.arange(4)]


class Example(NamedTuple):
    image: np.ndarray
    label: np.ndarray


def refusal(source):
    with pytest.raises(DataError) as caught:
        Data.of(source)
    return caught.value


def hugging_face(**columns):
    return datasets.Dataset.from_dict(columns)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (type(x), x.dtype, x.shape) == (np.ndarray, y.dtype, y.shape)
        assert x.flags.c_contiguous
        assert x.tobytes() == y.tobytes()


def digits_in(form):
    match form:
        case "arrays":
            return {"x": IMAGES, "y": LABELS}
        case "jax arrays":
            return {"x": jnp.asarray(IMAGES), "y": jnp.asarray(LABELS, jnp.int32)}
        case "fortran arrays":
            return {"x": np.asfortranarray(IMAGES), "y": LABELS.astype(">i4")}
        case "hugging face":
            return hugging_face(x=IMAGES, y=LABELS)
        case "hugging face in jax":
            return hugging_face(x=IMAGES, y=LABELS).with_format("jax")
        case "grain":
            pairs = MapStyle(IMAGES, LABELS)
            return grain.MapDataset.source(pairs).map(lambda pair: {"x": pair[0], "y": pair[1]})
        case "torch":
            return MapStyle(IMAGES, LABELS, transform=lambda x, y: {"x": Tensor(x), "y": int(y)})


# how samples are addressed


@pytest.mark.parametrize(
    "form",
    [
        "arrays",
        "jax arrays",
        "fortran arrays",
        "hugging face",
        "hugging face in jax",
        "grain",
        "torch",
    ],
)
def test_every_source_gives_the_same_digits_for_the_same_ids(form):
    data = Data.of(digits_in(form))
    rows = np.array([[1796, 3], [3, 0]])
    assert len(data) == 1797
    assert data.spec == SPEC
    assert data.nbytes == 1797 * (64 * 4 + 4)
    assert_same(data.fetch(BATCH), {"x": IMAGES[rows], "y": LABELS[rows].astype(np.int32)})


@pytest.mark.parametrize("ids", [7, [7], [[[7]], [[8]]], np.zeros((0, 3), np.int32)])
@pytest.mark.parametrize("form", ["arrays", "hugging face", "torch"])
def test_ids_of_any_shape_lead_the_shape_of_every_leaf(form, ids):
    data = Data.of(digits_in(form))
    ids = np.asarray(ids)
    expected = {"x": IMAGES[ids], "y": LABELS[ids].astype(np.int32)}
    assert_same(data.fetch(ids), expected)
    assert_same(data.leaves(ids), [expected["x"], expected["y"]])


def test_a_bare_array_is_an_example_with_one_leaf_and_no_path():
    data = Data.of(IMAGES)
    assert data.spec == (Leaf("", (64,), "float32"),)
    assert repr(data) == "Data(1797 samples, (the array): float32[64])"
    assert_same(data.fetch([5, 6]), IMAGES[[5, 6]])


def test_nested_trees_and_their_classes_are_kept():
    source = {"in": (IMAGES, [LABELS]), "out": Example(IMAGES, LABELS)}
    data = Data.of(source)
    assert [leaf.path for leaf in data.spec] == ["in/0", "in/1/0", "out/image", "out/label"]
    found = data.fetch([0, 9])
    images, labels = IMAGES[[0, 9]], np.array([0, 9], np.int32)
    assert_same(found, {"in": (images, [labels]), "out": Example(images, labels)})


def test_data_is_passed_through():
    data = Data.of(IMAGES)
    assert Data.of(data) is data


def test_a_source_of_scalars_and_flags_is_typed_as_jax_types_them():
    data = Data.of(MapStyle([3, 4], transform=lambda i: (i, i / 2, i > 3)))
    assert [leaf.dtype for leaf in data.spec] == ["int32", "float32", "bool"]
    assert_same(
        data.fetch([1, 0]),
        (np.array([4, 3], np.int32), np.array([2.0, 1.5], np.float32), np.array([True, False])),
    )


def test_a_source_that_wants_many_ids_gets_them():
    data = Data.of(Windows())
    assert data.spec == (Leaf("", (4,), "uint16"),)
    assert_same(data.fetch([2, 15]), np.array([[2, 3, 4, 5], [15, 16, 17, 18]], np.uint16))


def test_a_source_that_takes_one_id_is_never_given_many():
    # As a batch, each of these rows would be divided by the maximum of all of them.
    class Scaled:
        def __len__(self):
            return 3

        def __getitem__(self, ids):
            row = np.array([[1, 2], [2, 4], [4, 8]], np.float32)[ids]
            return row / row.max()

    assert_same(Data.of(Scaled()).fetch([0, 1, 2]), np.array([[0.5, 1]] * 3, np.float32))


def test_a_source_may_fill_one_buffer_again_and_again():
    class Reusing:
        buffer = np.zeros((64, 1), np.float32)

        def __len__(self):
            return 4

        def __getitem__(self, ids):
            self.buffer[: len(ids), 0] = ids
            return self.buffer[: len(ids)]

    data = Data.of(Reusing())
    first, second = data.fetch([1]), data.fetch([2])
    assert (first[0, 0], second[0, 0]) == (1, 2)


def test_memory_mapped_arrays_are_not_read_as_a_whole(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = Data.of({"x": mapped})
    assert data.arrays is not None
    assert np.shares_memory(data.arrays[0], mapped)
    assert_same(data.fetch([4]), {"x": IMAGES[[4]]})


def test_nested_columns_of_a_hugging_face_dataset_are_read_once_they_are_flat():
    nested = hugging_face(a=[{"b": [1, 2], "c": 3}, {"b": [4, 5], "c": 6}])
    assert refusal(nested).fix.endswith("or source.flatten() for nested columns)")
    data = Data.of(nested.flatten())
    assert [leaf.path for leaf in data.spec] == ["a.b", "a.c"]
    assert data.fetch([1])["a.b"].tolist() == [[4, 5]]


def test_a_grain_random_access_source_needs_no_second_epoch():
    data = Data.of(grain.sources.RangeDataSource(10, 20, 2))
    assert_same(data.fetch([4, 0]), np.array([18, 10], np.int32))


# dtypes


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        ("bool", "bool"),
        ("uint8", "uint8"),
        ("int16", "int16"),
        ("int64", "int32"),
        ("uint64", "uint32"),
        (">i8", "int32"),
        (">f4", "float32"),
        ("float16", "float16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        ("complex64", "complex64"),
    ],
)
@pytest.mark.parametrize("wrap", [np.asarray, lambda x: MapStyle(x)], ids=["array", "items"])
def test_values_keep_their_dtype_except_that_64_bit_integers_are_narrowed(dtype, held, wrap):
    data = Data.of(wrap(np.array([0, 1, 1, 0]).astype(dtype)))
    (leaf,), (found,) = data.spec, data.leaves([1, 3])
    assert (leaf.dtype, found.dtype.name) == (held, held)
    assert found.astype(bool).tolist() == [True, False]
    assert jnp.asarray(found).dtype == found.dtype  # JAX holds it unaltered
    assert data.nbytes == 4 * found.dtype.itemsize


@pytest.mark.parametrize("extreme", [-(2**31), 2**31 - 1])
def test_integers_that_just_fit_are_narrowed_exactly(extreme):
    assert Data.of(np.array([extreme])).fetch([0]).tolist() == [extreme]


@pytest.mark.parametrize(
    ("value", "dtype"), [(2**31, "int32"), (-(2**31) - 1, "int32"), (2**32, "uint32")]
)
def test_integers_that_do_not_fit_are_refused_with_the_value(value, dtype):
    wide = np.array([0, value], "int64" if dtype == "int32" else "uint64")
    error = refusal({"y": wide})
    assert error.what == f"leaf 'y' holds {value}, which does not fit {dtype}"
    assert error.why == "without x64, JAX keeps integers in 32 bits and would cut off the rest"
    assert error.fix == 'use smaller numbers, or jax.config.update("jax_enable_x64", True)'


def test_an_integer_that_does_not_fit_is_refused_where_it_is_read():
    labels = [0] * 99
    labels[3] = 2**40
    data = Data.of(MapStyle(labels))
    with pytest.raises(DataError, match=r"^sample 3: leaf '0' holds 1099511627776, which does"):
        data.fetch([2, 3])


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [("float64", "float32"), ("complex128", "complex64"), ("longdouble", "float32")],
)
def test_wide_floats_are_refused_with_the_way_to_convert_them(dtype, narrow):
    error = refusal({"x": np.zeros((3, 2), dtype)})
    assert error.what == f"leaf 'x' holds {np.dtype(dtype).name} values"
    assert error.why == f"without x64, JAX would round them to {narrow} and not say so"
    assert error.fix == (
        f"convert them with .astype(np.{narrow}), or keep 64 bits with "
        'jax.config.update("jax_enable_x64", True)'
    )


def test_a_float64_number_of_numpy_is_not_taken_for_a_python_float():
    error = refusal(MapStyle(np.array([0.1, 0.2])))
    assert error.what == "sample 0: leaf '0' holds float64 values"


def test_with_x64_all_64_bits_are_kept():
    with jax.enable_x64(True):
        data = Data.of((np.array([0.1]), np.array([2**40])))
    assert [leaf.dtype for leaf in data.spec] == ["float64", "int64"]
    assert data.fetch([0])[1].tolist() == [2**40]


@pytest.mark.parametrize(
    ("source", "what", "column"),
    [
        ({"a": {"text": np.array(["one"])}}, "leaf 'a/text' holds str96 values", "a"),
        ({"x": np.array([None])}, "leaf 'x' holds object values", "x"),
        ({"x": np.array(["2020-01-01"], "M8[D]")}, "leaf 'x' holds datetime64[D] values", "x"),
        ({"x": jax.random.split(jax.random.key(0))}, "leaf 'x' is a PRNGKeyArray", "x"),
        (hugging_face(s=["ab"]), "sample 0: leaf 's' holds str64 values", "s"),
        (MapStyle(["a"]), "sample 0: leaf '0' holds str32 values", "0"),
    ],
)
def test_what_is_not_a_number_is_refused_by_name(source, what, column):
    error = refusal(source)
    assert error.what == what
    assert error.why == "a JAX array holds numbers and booleans only"
    assert error.fix == (
        "encode the leaf as numbers, pad what varies in length, or leave it out (Hugging Face: "
        f"source.remove_columns({column!r}), or source.flatten() for nested columns)"
    )


# sources that are refused


def test_leaves_of_different_length_are_refused_with_their_lengths():
    error = refusal({"x": IMAGES[:5], "y": LABELS[:4], "z": np.float32(1)})
    assert error.what == (
        "the leaves do not share a leading axis: leaf 'x' [5], leaf 'y' [4], leaf 'z' []"
    )
    assert error.why == "entry i of every leaf, taken together, is sample i"
    assert "np.stack" in error.fix


def test_a_list_of_samples_is_refused_with_the_way_to_stack_them():
    samples = [(IMAGES[0], LABELS[0]), (IMAGES[1], LABELS[1])]
    assert "np.stack(rows), *samples)" in refusal(samples).fix
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *samples)
    assert len(Data.of(stacked)) == 2


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (IMAGES[:0], "the data is empty"),
        ({}, "the data is empty"),
        (None, "the data is empty"),
        (MapStyle([]), "the source is empty"),
        (hugging_face(x=[]), "the source is empty"),
        (MapStyle([1], transform=lambda i: None), "sample 0 is empty"),
    ],
)
def test_a_source_without_samples_or_without_arrays_is_refused(source, what):
    error = refusal(source)
    assert error.what == what
    assert error.why == "every sample needs at least one array, and a run at least one sample"
    assert "filter before, not while, reading" in error.fix


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (
            iter([1]),
            "a list_iterator cannot be asked for its samples by id: it only gives one after "
            "another",
        ),
        (
            grain.MapDataset.range(4).to_iter_dataset(),
            "a PrefetchIterDataset cannot be asked for its samples by id: ",
        ),
        (
            hugging_face(x=[1]).to_iterable_dataset(),
            "a IterableDataset cannot be asked for its samples by id: ",
        ),
        (
            MapStyle([1], transform=lambda i: 1 // 0),
            "a MapStyle cannot be asked for its samples by id: source[0] raised "
            "ZeroDivisionError('integer division or modulo by zero')",
        ),
        (
            datasets.DatasetDict({"train": hugging_face(x=[1]), "test": hugging_face(x=[2])}),
            "a DatasetDict cannot be asked for its samples by id: it maps names (train, test, …); "
            "pass one of its values",
        ),
        (
            sklearn.datasets.load_digits(),
            "a Bunch cannot be asked for its samples by id: it maps names (data, target, frame, "
            "feature_names, target_names, …); pass one of its values",
        ),
    ],
)
def test_a_stream_is_refused_and_its_batches_can_be_fed(source, what):
    error = refusal(source)
    assert error.what.startswith(what)
    assert error.why == "a replay reads the samples of any step again, by their ids"
    assert error.fix.endswith("the run keeps the batches: recorder.feed(batch)")


def test_an_endless_source_is_refused():
    error = refusal(grain.MapDataset.range(4).repeat())
    assert error.what == f"the source says that it has {sys.maxsize} samples"
    assert error.fix == (
        "pass the dataset as it is before .repeat(); epochs belong into replay.Order"
    )


@pytest.mark.parametrize("one", [np.arange(3), (np.arange(3), {"b": np.arange(3)})])
def test_keys_that_give_two_leaves_one_path_are_refused(one):
    error = refusal({"a/b": np.arange(3), "a": {"b": one}})
    assert error.what.startswith("two leaves claim the path 'a/b")
    assert error.fix == "rename one of the keys, and use no / inside a key"


# samples that change


def test_random_augmentation_in_a_dataset_is_refused():
    generator = np.random.default_rng(0)

    def flipped(x, y):
        return {"x": x[::-1] if generator.random() < 0.5 else x, "y": int(y)}

    error = refusal(MapStyle(IMAGES, LABELS, transform=flipped))
    assert error.what == "sample 0 (leaf 'x') gives other bits when it is read again"
    assert error.why == "a replay reads every sample again and must find what the training saw"
    assert error.fix.endswith("into the loss, with its key: loss(params, example, key)")


def test_a_random_transform_of_a_hugging_face_dataset_is_refused():
    generator = np.random.default_rng(0)
    source = hugging_face(x=[1.0, 2.0]).with_transform(
        lambda batch: {"x": generator.normal(size=len(batch["x"])).astype(np.float32)}
    )
    assert refusal(source).what == "sample 0 (leaf 'x') gives other bits when it is read again"


def test_bits_are_compared_so_nan_is_equal_to_itself_and_zero_has_a_sign():
    assert len(Data.of(MapStyle([float("nan")] * 3))) == 3
    signs = iter([0.0, 0.0, -0.0])  # once to see the example, then twice to compare
    assert "other bits" in refusal(MapStyle([0], transform=lambda i: next(signs))).what


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.shuffle(seed=1),
        lambda d: d.seed(1).random_map(lambda x, rng: x + rng.integers(100)),
        lambda d: d.shuffle(seed=1).map(lambda x: x * 2),
    ],
    ids=["shuffle", "random_map", "map after shuffle"],
)
def test_a_grain_dataset_whose_epochs_differ_is_refused(change):
    error = refusal(change(grain.MapDataset.range(100)))
    assert error.what == (
        "sample 0 (the array) is another example in the grain dataset's second epoch"
    )
    assert error.why == (
        "after shuffle or random_map an index is a place in one epoch, not a sample"
    )
    assert "put the shuffle into replay.Order" in error.fix
    assert "the augmentation into the loss" in error.fix


def test_a_grain_dataset_that_is_mapped_and_sliced_is_accepted():
    data = Data.of(grain.MapDataset.range(100).map(lambda x: x * 2)[10:20])
    assert_same(data.fetch([0, 9]), np.array([20, 38], np.int32))


# samples that are not alike


@pytest.mark.parametrize(
    ("odd", "got"),
    [
        ({"x": np.zeros(5, np.float32)}, "x: float32[5]"),
        ({"x": np.zeros(8, np.float16)}, "x: float16[8]"),
        ({"x": np.zeros((), np.float32)}, "x: float32[]"),
    ],
)
def test_a_sample_of_another_shape_or_dtype_is_refused_by_id_and_leaf(odd, got):
    rows = [{"x": np.zeros(8, np.float32)}] * 99
    rows[7] = odd
    data = Data.of(MapStyle(rows, transform=lambda row: row))
    assert data.fetch([5, 6])["x"].shape == (2, 8)
    with pytest.raises(DataError) as caught:
        data.fetch([6, 7])
    assert caught.value.what == f"sample 7 has {got}, sample 0 has x: float32[8]"
    assert caught.value.why == (
        "programs are compiled once, for one structure, shape and dtype of all examples"
    )
    assert caught.value.fix.startswith("pad what varies in length to one shape")


def test_a_sample_with_other_leaves_is_refused():
    error = refusal(MapStyle([0, 1], transform=lambda i: {"xy"[i]: np.float32(1)}))
    assert error.what == "sample 1 has the leaves ['y'], sample 0 has ['x']"


def test_a_sparse_grain_filter_is_refused():
    error = refusal(grain.MapDataset.range(4).filter(lambda x: x != 2))
    assert error.what == "sample 2 has the leaves [], sample 0 has ['']"
    assert error.fix.endswith("filter before, not while, reading")


def test_sequences_of_unequal_length_in_a_hugging_face_dataset_are_refused_by_id():
    lists = [[1, 2]] * 99
    lists[7] = [1, 2, 3]
    data = Data.of(hugging_face(tokens=lists))
    with pytest.raises(DataError, match=r"^sample 7 has tokens: int32\[3\], sample 0 has tokens"):
        data.fetch([6, 7])
    assert data.fetch([6, 8])["tokens"].tolist() == [[1, 2], [1, 2]]


def test_a_batch_of_the_wrong_length_is_refused():
    class Short(Windows):
        def __getitem__(self, ids):
            return super().__getitem__(ids[:8])

    error = refusal(Short())
    assert error.what == "a batch of samples has (the array): uint16[8,4], sample 0 has " + (
        "(the array): uint16[4]"
    )


# ids


@pytest.mark.parametrize(
    ("ids", "bad"), [([0, 1797, 5000], 1797), ([[3], [-2]], -2), (np.uint64(2**40), 2**40)]
)
@pytest.mark.parametrize("form", ["arrays", "hugging face", "torch"])
def test_an_id_out_of_range_is_named_with_the_number_of_samples(form, ids, bad):
    with pytest.raises(DataError) as caught:
        Data.of(digits_in(form)).fetch(ids)
    assert caught.value.what == f"sample {bad} does not exist: the data has 1797 samples"
    assert caught.value.why == "ids run from 0 to 1796; -1 stands for padding"
    assert caught.value.fix == (
        "make the order for this data: its ids must be smaller than len(data)"
    )


@pytest.mark.parametrize(("ids", "name"), [([0.0], "float64"), ([True], "bool"), ([], "float64")])
def test_ids_that_are_not_integers_are_refused(ids, name):
    with pytest.raises(DataError, match=f"^sample ids are {name}\n"):
        Data.of(IMAGES).fetch(ids)


# fingerprints and checksums


def test_the_fingerprint_of_the_digits_is_this_one():
    fingerprint = Data.of({"x": IMAGES, "y": LABELS}).fingerprint(probes=3)
    assert fingerprint == {
        "samples": 1797,
        "spec": [["x", [64], "float32"], ["y", [], "int32"]],
        "probes": [[0, 2349041566], [898, 2311994635], [1796, 1853707503]],
    }


@pytest.mark.parametrize("form", ["arrays", "hugging face", "grain", "torch"])
def test_a_fingerprint_survives_msgpack_and_fits_the_same_data_in_any_form(form):
    packed = msgpack.packb(Data.of(digits_in("arrays")).fingerprint())
    assert len(packed) < 300
    Data.of(digits_in(form)).check(msgpack.unpackb(packed))
    Data.of(digits_in(form)).check(msgpack.unpackb(packed, use_list=False))


def test_a_fingerprint_has_as_many_probes_as_there_are_samples_or_as_asked_for():
    def ids(samples, *probes):
        return [i for i, _ in Data.of(IMAGES[:samples]).fingerprint(*probes)["probes"]]

    assert ids(1) == [0]
    assert ids(5) == [0, 1, 2, 3, 4]
    assert ids(1797, 1) == [0]
    assert ids(1797) == [
        *(0, 119, 239, 359, 478, 598, 718, 838, 957, 1077, 1197, 1317, 1436, 1556, 1676, 1796)
    ]


def test_the_first_difference_from_a_fingerprint_is_named():
    fingerprint = Data.of({"x": IMAGES, "y": LABELS}).fingerprint()
    changed = IMAGES.copy()
    changed[119, 5] = np.nextafter(changed[119, 5], np.float32(99))
    for source, what in [
        (
            {"x": IMAGES[:99], "y": LABELS[:99]},
            "the data has 99 samples, the run was made with 1797",
        ),
        ({"x": IMAGES}, "the data lacks a leaf of the run: y: int32[]"),
        (
            {"x": IMAGES, "y": LABELS, "z": LABELS},
            "the data has a leaf that the run does not have: z: int32[]",
        ),
        (
            {"x": IMAGES.reshape(-1, 8, 8), "y": LABELS},
            "a leaf differs: x: float32[8,8] here, x: float32[64] in the run",
        ),
        (
            {"x": IMAGES, "y": LABELS.astype(np.uint8)},
            "a leaf differs: y: uint8[] here, y: int32[] in the run",
        ),
        ({"x": changed, "y": LABELS}, "sample 119 has other content: crc32c "),
    ]:
        with pytest.raises(DataError) as caught:
            Data.of(source).check(fingerprint)
        assert caught.value.what.startswith(what)
        assert caught.value.why == "a replay on other data does not give the bits of the run"
        assert caught.value.fix == (
            "pass the data that the run was recorded with; run.on(source) asks about other data"
        )


def test_leaves_in_another_order_are_other_data():
    # Programs take leaves by position, and sorted as strings "10" comes before "2".
    leaves = [np.full(3, i, np.int32) for i in range(11)]
    fingerprint = Data.of(tuple(leaves)).fingerprint()
    Data.of_leaves(leaves, [str(i) for i in range(11)]).check(fingerprint)
    with pytest.raises(DataError, match=r"^the leaves have the order \['0', '1', '10', '2'"):
        Data.of({str(i): leaf for i, leaf in enumerate(leaves)}).check(fingerprint)


@pytest.mark.parametrize(
    "damage",
    [
        {"samples": "3"},
        {"samples": 3.0},
        {"spec": "abc"},
        {"spec": [["x", [64]]]},
        {"spec": [["x", 64, "float32"]]},
        {"spec": [["x", ["64"], "float32"]]},
        {"probes": None},
        {"probes": [[0]]},
        {"probes": [[0, "0"]]},
        {"probes": {"0": 1}},
    ],
)
def test_a_malformed_fingerprint_is_refused(damage):
    data = Data.of(IMAGES[:3])
    with pytest.raises(DataError, match="^the recorded fingerprint of the data is malformed: "):
        data.check(data.fingerprint() | damage)


@pytest.mark.parametrize("nothing", [None, [], {}, b"", 5, [1, 2, 3]])
def test_what_is_no_fingerprint_at_all_is_refused(nothing):
    with pytest.raises(DataError) as caught:
        Data.of(IMAGES).check(nothing)
    assert caught.value.why == "without it nothing tells whether this is the data of the run"
    assert caught.value.fix.startswith("restore run.msgpack from a copy")


@pytest.mark.parametrize("i", [99, 2**70, -5])
def test_a_fingerprint_cannot_ask_for_samples_that_do_not_exist(i):
    data = Data.of(IMAGES[:3])
    with pytest.raises(DataError):
        data.check(data.fingerprint() | {"probes": [[i, 0]]})


def test_a_checksum_is_the_crc32c_of_the_bytes_of_all_leaves_in_order():
    digits = np.frombuffer(b"123456789", np.uint8)
    assert checksum([digits]) == 0xE3069283  # the check value of CRC-32C
    assert checksum([digits[:4], digits[4:]]) == 0xE3069283
    assert checksum([digits[4:], digits[:4]]) != 0xE3069283
    assert checksum([]) == 0


def test_a_checksum_depends_on_bits_and_not_on_layout():
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    assert checksum([np.asfortranarray(square)]) == checksum([square])
    assert checksum([square.T]) != checksum([square])
    assert checksum([np.float32([0.0])]) != checksum([np.float32([-0.0])])
    assert checksum([np.ones(2, ml_dtypes.bfloat16)]) == checksum([np.uint16([0x3F80] * 2)])


# in memory, and back from a run


@pytest.mark.parametrize("form", ["hugging face", "torch"])
def test_a_source_is_read_into_memory_with_its_tree(form, monkeypatch):
    monkeypatch.setattr(replay.data, "CHUNK_BYTES", 260 * 600)
    reports = []
    data = Data.of(digits_in(form)).in_memory(lambda *report: reports.append(report))
    assert reports == [(600, 1797), (1200, 1797), (1797, 1797)]
    assert data.spec == SPEC
    assert_same(data.fetch(BATCH), Data.of(digits_in("arrays")).fetch(BATCH))
    assert_same(list(data.arrays), [IMAGES, LABELS.astype(np.int32)])


def test_arrays_are_in_memory_already():
    reports = []
    data = Data.of(IMAGES)
    assert data.in_memory(lambda *report: reports.append(report)) is data
    assert reports == [(1797, 1797)]


def test_data_restored_with_its_structure_gives_the_same_batches():
    data = Data.of(MapStyle(IMAGES, LABELS)).in_memory()
    again = Data.of_leaves(data.arrays, tree=data.tree)
    assert again.spec == data.spec == (Leaf("0", (64,), "float32"), Leaf("1", (), "int32"))
    assert_same(again.fetch(BATCH), data.fetch(BATCH))


def test_data_restored_without_its_structure_gives_nested_dicts():
    data = Data.of_leaves([IMAGES, LABELS], ["in/0", "label"])
    assert_same(data.fetch([2]), {"in": {"0": IMAGES[[2]]}, "label": LABELS[[2]].astype(np.int32)})


def test_restored_leaves_keep_their_order():
    paths = [str(i) for i in range(11)]
    data = Data.of_leaves([np.full(2, i, np.int32) for i in range(11)])
    assert [leaf.path for leaf in data.spec] == paths
    assert [int(leaf[0]) for leaf in data.leaves([1])] == list(range(11))
    assert int(data.fetch(1)["10"]) == 10


def test_one_restored_leaf_without_a_path_is_a_bare_array():
    assert_same(Data.of_leaves([IMAGES]).fetch([1]), IMAGES[[1]])
    assert_same(Data.of_leaves([IMAGES], [""]).fetch([1]), IMAGES[[1]])
    assert_same(Data.of_leaves([IMAGES], ["x"]).fetch([1]), {"x": IMAGES[[1]]})


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]])
def test_paths_that_contradict_each_other_are_refused(paths):
    with pytest.raises(DataError, match=f"^two leaves claim the path {paths[1]!r}"):
        nest(paths, [1, 2])


def test_the_examples_in_the_documentation_are_right():
    assert doctest.testmod(replay.data) == (0, 6)
