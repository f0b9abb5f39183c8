from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from replay.errors import DataError
from replay.tree import Leaf, describe, lift, lower, nest, paths


class Pair(NamedTuple):
    weights: dict
    rest: tuple


def tree():
    return Pair({"a": jnp.ones((2, 3)), "b": jnp.zeros((), jnp.int32)}, (jax.random.key(7),))


def test_leaves_are_named_by_their_path():
    assert paths(tree()) == ["weights/a", "weights/b", "rest/0"]


def test_a_key_is_described_by_its_data_and_implementation_also_where_only_shapes_are_known():
    expected = (
        Leaf("weights/a", (2, 3), "float32"),
        Leaf("weights/b", (), "int32"),
        Leaf("rest/0", (2,), "uint32", "threefry2x32"),
    )
    assert describe(tree()) == expected
    assert describe(jax.eval_shape(tree)) == expected


def test_a_tree_survives_lowering_and_lifting():
    before = tree()
    after = lift(lower(before), describe(before), jax.tree.structure(before))
    assert isinstance(after, Pair)
    assert (jax.random.key_data(after.rest[0]) == jax.random.key_data(before.rest[0])).all()
    assert after.weights["a"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_without_its_structure_a_tree_becomes_nested_dicts_by_path():
    lifted = lift(lower(tree()), describe(tree()))
    assert set(lifted) == {"weights", "rest"}
    assert set(lifted["rest"]) == {"0"}


def test_leaves_that_claim_one_path_are_refused():
    for names in (["a", "a"], ["a", "a/b"], ["a/b", "a"]):
        with pytest.raises(DataError, match="two leaves claim the path"):
            nest(names, [1, 2])


def test_a_leaf_prints_its_type_and_knows_its_bytes():
    assert str(Leaf("w", (3, 4), "bfloat16")) == "w: bfloat16[3,4]"
    assert Leaf("w", (3, 4), "bfloat16").nbytes == 24
    assert Leaf("", (), "float32").struct == jax.ShapeDtypeStruct((), np.float32)
