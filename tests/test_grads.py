"""Per-sample gradients of a zoo of losses, against `vmap(grad)` in float64."""

import functools
import math
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from zoo import BATCH, ZOO, normal, tokens

import replay
from replay.grads.factors import Outer, Rows, Whole
from replay.grads.taps import tap


def relaxed(function, *arguments):
    """Run what is written for the usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def wide(function, *arguments):
    """Run in float64."""
    with jax.enable_x64(True):
        upcast = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)) if x.dtype == np.float32 else x,
            arguments,
        )
        return relaxed(function, *upcast)


def vmap_of_grad(loss):
    return jax.vmap(jax.grad(lambda params, x: loss(params, x, None)), (None, 0))


class Case(NamedTuple):
    per_sample: Any
    params: Any
    batch: Any
    exact: Any
    rounded: Any


@functools.cache
def case(name):
    """Return a loss, with the gradients of `vmap(grad)` in float64 and in its own precision."""
    loss, params, batch = ZOO[name]()
    reference = vmap_of_grad(loss)
    exact, rounded = wide(reference, params, batch), relaxed(reference, params, batch)
    return Case(replay.per_sample(loss), params, batch, exact, rounded)


def allowed(truth, theirs):
    return 4 * np.abs(theirs - truth).max() + np.spacing(np.float32(np.abs(truth).max()))


def check(found, exact, rounded, what):
    """The largest error is at most 4 times that of `vmap(grad)`, plus one unit of the largest.

    There is no absolute floor. A loss that computes in bfloat16 is, in float64, the function that
    it rounds; `vmap(grad)` in bfloat16 then says what its rounding costs.
    """
    for path, ours, truth, theirs in zip(
        replay.tree.paths(exact),
        *map(jax.tree.leaves, (found, exact, rounded)),
        strict=True,
    ):
        place = f"{what} of {path}"
        assert ours.shape == truth.shape, place
        if truth.size:
            assert np.abs(ours.astype(np.float64) - truth).max() <= allowed(truth, theirs), place


QUICK = {
    "dense",
    "bfloat16 compute with float32 weights",
    "fused projection that is sliced",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in ZOO]
)
def test_every_reduction_is_as_exact_as_vmap_of_grad(name):
    per_sample, params, batch, exact, rounded = case(name)
    direction = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params
    )
    names = ["grads", "sum", "abs_sum", "square_sum", "max", "tensor_norms", "norms", "gram"]

    def ask(params, batch):
        found = {name: getattr(per_sample, name)(params, batch) for name in names}
        found["dot"] = per_sample.dot(direction, params, batch)
        return found | {"top_k": per_sample.top_k(2, params, batch)}

    found = relaxed(ask, params, batch)

    def compare(what, function):
        check(found[what], *(jax.tree.map(function, x) for x in (exact, rounded)), what)

    compare("grads", lambda g: g)
    compare("sum", lambda g: g.sum(0))
    compare("abs_sum", lambda g: np.abs(g).sum(0))
    compare("square_sum", lambda g: np.square(g).sum(0))
    compare("max", lambda g: np.abs(g).max(0))
    compare("tensor_norms", lambda g: np.linalg.norm(g.reshape(BATCH, -1), axis=1))
    flat, rough = (
        np.concatenate([g.reshape(BATCH, -1) for g in jax.tree.leaves(tree)], 1)
        for tree in (exact, rounded)
    )
    along = np.concatenate([np.ravel(d) for d in jax.tree.leaves(direction)])
    for what, function in {
        "norms": lambda g: np.linalg.norm(g, axis=1),
        "gram": lambda g: g @ g.T,
        "dot": lambda g: g @ along,
    }.items():
        check([found[what]], [function(flat)], [function(rough)], what)
    values, positions = found["top_k"]
    sort = lambda g: -np.sort(-np.abs(g), axis=0)[:2]  # noqa: E731
    check(values, *(jax.tree.map(sort, x) for x in (exact, rounded)), "top_k")
    for value, place, truth, theirs in zip(
        *map(jax.tree.leaves, (values, positions, exact, rounded)), strict=True
    ):
        there = np.take_along_axis(np.abs(truth), place, 0)
        assert np.abs(value - there).max() <= allowed(truth, theirs)


@functools.cache
def explained(name):
    """Return the path, the way and the reason of every tensor, as `explain` prints them."""
    loss, params, batch = ZOO[name]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lines = replay.per_sample(loss).explain(params, batch).splitlines()
    found = [(*line.split()[:2], line.partition("  (")[2][:-1]) for line in lines]
    return found, "\n".join(lines)


# The way of every tensor. `rule` never holds more than the factors and the answer.
WAYS = {
    "dense": "direct rule direct rule",
    "dense with a frozen first layer": "zero rule zero",
    "strided dilated and grouped convolutions": "direct rule direct rule direct rule direct rule",
    "one and three dimensional convolutions": "direct rule direct rule",
    "transposed convolution and group norm": "direct rule direct rule direct direct",
    "residual network with group norm": "rule rule rule direct direct direct direct "
    "rule rule direct direct direct direct direct rule direct rule",
    "u shaped network with resizing": "direct rule direct rule direct rule",
    "transformer with tied embedding": "direct rule direct rule factors direct direct direct "
    "direct direct rule direct rule direct rule direct rule",
    "attention with rotary embedding": "rule rule rule rule rule direct rule",
    "multi query attention by einsum": "rule rule rule rule",
    "lstm over a scan": "direct rule direct rule direct rule direct rule rule rule rule rule",
    "bidirectional gru": "direct rule rule rule direct rule direct rule direct rule "
    "direct rule rule rule direct rule direct rule direct rule",
    "nested scans": "direct direct rule rule",
    "scan from a learned state": "direct rule",
    "layers stacked for a scan": "direct direct rule rule rule",
    "stacked transformer blocks": "rule rule rule",
    "layers stacked around a scan over time": "direct rule rule",
    "layers taken by a loop": "direct rule",
    "linear state space by associative scan": "direct rule rule",
    "mixture of experts by gather": "rule rule",
    "experts behind a switch": "rule rule rule rule",
    "weight normalised layer": "factors factors",
    "low rank adapter on a frozen base": "factors factors",
    "low rank adapter applied in turn": "rule rule zero",
    "hypernetwork": "direct factors factors",
    "hypernetwork that reads the sample": "rule rule",
    "graph network by segment sum": "rule rule",
    "fourier features and complex values": "direct direct rule",
    "random fourier features": "direct rule rule",
    "activation with its own vjp": "direct rule",
    "branches and rematerialisation": "rule factors",
    "iterations counted by a while loop": "rule rule",
    "linear system with a learned matrix": "direct",
    "gradient inside the loss": "factors",
    "bfloat16 compute with float32 weights": "direct rule direct rule",
    "weight decay in the loss": "factors",
    "fused projection that is sliced": "rule factors",
    "nnx embedding": "direct rule rule",
    "nnx convolutions": "direct rule direct direct direct rule",
    "nnx attention": "direct rule direct rule direct rule direct rule",
    "equinox perceptron": "rule direct rule direct rule direct",
    "equinox convolutions": "rule direct direct direct rule direct",
    "equinox cell under a scan": "rule rule direct direct",
    "equinox attention": "rule rule rule rule",
}

# Why the gradients of a tensor are multiplied out, one sample at a time.
FALL_BACKS = {
    "transformer with tied embedding": {
        "Embed_0/embedding": "it is used 2 times (dot_general, gather)",
    },
    "weight normalised layer": {
        "g": "it is combined with other values before it meets the data",
        "v": "it is combined with other values before it meets the data",
    },
    "low rank adapter on a frozen base": {
        "a": "it is used 2 times (dot_general)",
        "b": "it is combined with other values before it meets the data",
    },
    "hypernetwork": {
        "h": "it is combined with other values before it meets the data",
        "z": "it is combined with other values before it meets the data",
    },
    "branches and rematerialisation": {
        "b": "it is used 2 times (dot_general)",
    },
    "gradient inside the loss": {
        "w": "it is used 3 times (dot_general)",
    },
    "weight decay in the loss": {
        "w": "it is used 2 times (add, dot_general)",
    },
    "fused projection that is sliced": {
        "qk": "it is used 2 times (dot_general)",
    },
}


@pytest.mark.parametrize("name", ZOO)
def test_the_way_of_every_tensor_and_the_reason_of_every_fall_back_are_as_expected(name):
    found, text = explained(name)
    assert [way for _, way, _ in found] == WAYS[name].split(), text
    reasons = {path: reason for path, way, reason in found if way == "factors"}
    assert reasons == FALL_BACKS.get(name, {}), text


def test_most_networks_have_no_fall_back_at_all():
    free = [name for name in ZOO if "factors" not in WAYS[name].split()]
    assert len(free) >= 35
    assert set(ZOO) - set(free) == set(FALL_BACKS)


def sizes(jaxpr):
    """Return the number of elements of every array that a jaxpr computes, in whatever depth."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                yield from sizes(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)


def convolve(x, kernel):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=numbers)[0]


# 37 samples, and a loss for each operation with its only tensor. The last number is what no
# array may reach: all gradients together, or more than the values that a bias or scale meets. The
# shapes are so large that an array padded to tiles of 128 is not mistaken for either.
OPERATIONS = {
    "dense": (lambda w, x: x @ w, (127, 113), normal(37, 127), 37 * 127 * 113),
    "sequence": (lambda w, x: x @ w, (127, 113), normal(37, 5, 127), 37 * 127 * 113),
    "wide sequence": (lambda w, x: x @ w, (113, 127), normal(37, 5, 113), 37 * 127 * 113),
    "convolution": (
        lambda w, x: convolve(x, w),
        (3, 31, 113),
        normal(37, 6, 31),
        37 * 3 * 31 * 113,
    ),
    "embedding": (lambda w, x: w[x], (127, 61), tokens(37, 3, size=127), 37 * 127 * 61),
    "bias": (lambda w, x: x + w, (4093,), normal(37, 5, 4093), 37 * 5 * 4093 + 1),
    "scale": (lambda w, x: x * w, (4093,), normal(37, 5, 4093), 37 * 5 * 4093 + 1),
}
METHODS = ["norms", "tensor_norms", "dot", "gram", "sum", "abs_sum", "square_sum", "max", "top_k"]


def largest_array(operation, method):
    apply, shape, batch, _ = OPERATIONS[operation]
    w = normal(*shape)
    per_sample = replay.per_sample(lambda w, x, key: jnp.sin(apply(w, x)).sum())
    first = {"dot": [w], "top_k": [2]}.get(method, [])
    call = functools.partial(getattr(per_sample, method), *first)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return max(sizes(jax.make_jaxpr(call)(w, batch).jaxpr))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_no_reduction_holds_the_gradients_of_all_samples(operation, method):
    assert largest_array(operation, method) < OPERATIONS[operation][3]


@pytest.mark.parametrize("operation", ["dense", "sequence", "convolution", "embedding"])
def test_the_gradients_themselves_are_held_by_whoever_asks_for_them(operation):
    assert largest_array(operation, "grads") >= OPERATIONS[operation][3]


TIMES, WIDTH = 3, 4


def _attend(p, h):
    q, k, v = h @ p["q"], h @ p["k"], h @ p["v"]
    return jnp.einsum("ts,sd->td", jax.nn.softmax(jnp.einsum("td,sd->ts", q, k)), v)


def _remember(p, h):
    def step(state, x):
        state = jnp.tanh(state @ p["w"] + x * p["s"])
        return state, state

    return lax.scan(step, jnp.zeros(WIDTH, h.dtype), h)[1]


def _stack(p, h):
    return lax.scan(lambda h, own: (jnp.tanh(h @ own["w"]) + own["b"], None), h, p)[0]


def _fused(p, h):
    one, two = jnp.split(p["w"], 2, axis=1)
    return jnp.sin(h @ one) * (h @ two)


SQUARE = (WIDTH, WIDTH)
# What a random network is made of: shapes of the parameters, and a function of `[TIMES, WIDTH]`.
LAYERS = {
    "dense": ({"w": SQUARE}, lambda p, h: h @ p["w"]),
    "mixing of times": ({"w": (TIMES, TIMES)}, lambda p, h: p["w"] @ h),
    "convolution": ({"w": (2, WIDTH, WIDTH)}, lambda p, h: convolve(h, p["w"])),
    "scale": (
        {"s": (WIDTH,)},
        lambda p, h: h * lax.rsqrt(1 + jnp.square(h).mean(1, keepdims=True)) * p["s"],
    ),
    "bias": ({"b": (WIDTH,)}, lambda p, h: h + p["b"]),
    "embedding": ({"e": (5, WIDTH)}, lambda p, h: h + p["e"][jnp.argmax(h, axis=1)]),
    "attention": ({name: SQUARE for name in "qkv"}, _attend),
    "scan": ({"w": SQUARE, "s": (WIDTH,)}, _remember),
    "stack": ({"w": (2, *SQUARE), "b": (2, WIDTH)}, _stack),
    "reshape": ({"w": (2, 6)}, lambda p, h: (h.reshape(6, 2) @ p["w"])[:, :2].reshape(h.shape)),
    "fused": ({"w": (WIDTH, 2 * WIDTH)}, _fused),
    "slice": ({"w": (6, WIDTH)}, lambda p, h: h @ p["w"][1:5]),
    "tied": ({"w": SQUARE}, lambda p, h: jnp.sin(h @ p["w"]) @ p["w"].T),
    "normalised": ({"w": SQUARE}, lambda p, h: h @ (p["w"] / jnp.linalg.norm(p["w"]))),
    "choice": (
        {"a": SQUARE, "b": SQUARE},
        lambda p, h: lax.cond(h[0, 0] > 0, lambda: h @ p["a"], lambda: jnp.cos(h @ p["b"])),
    ),
    "nothing": ({}, lambda p, h: jnp.tanh(h)[::-1]),
}
NETWORKS = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3)


def check_network(names, again):
    """Compare with `vmap(grad)`, both in float64, which 1e-12 of the largest tells from a mistake.

    `again` is the layer that is used once more at the end, with the same parameters.
    """
    rng = np.random.default_rng(0)
    params = [
        {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
        for shapes, _ in (LAYERS[name] for name in names)
    ]
    order = [*range(len(names)), *([again % len(names)] if again else [])]

    def loss(params, x, key):
        for i in order:
            x = LAYERS[names[i]][1](params[i], x)
        return jnp.sin(x).sum()

    per_sample = replay.per_sample(loss)

    def both(params, batch):
        ours = [
            per_sample.grads(params, batch),
            per_sample.square_sum(params, batch),
            per_sample.abs_sum(params, batch),
            per_sample.norms(params, batch),
        ]
        g = vmap_of_grad(loss)(params, batch)
        squares = [jnp.square(x).reshape(BATCH, -1).sum(1) for x in jax.tree.leaves(g)]
        theirs = [
            g,
            jax.tree.map(lambda x: jnp.square(x).sum(0), g),
            jax.tree.map(lambda x: jnp.abs(x).sum(0), g),
            jnp.sqrt(sum(squares, jnp.zeros(BATCH))),
        ]
        return ours, theirs

    found = wide(both, params, normal(BATCH, TIMES, WIDTH))
    for ours, theirs in zip(*found, strict=True):
        largest = max((np.abs(x).max() for x in jax.tree.leaves(theirs)), default=0.0)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.abs(one - other).max() <= 1e-12 * largest


@pytest.mark.parametrize("many", [5, pytest.param(300, marks=pytest.mark.full)])
def test_random_networks_agree_with_vmap_of_grad(many):
    @hypothesis.settings(max_examples=many)
    @hypothesis.given(NETWORKS.filter(lambda n: set(n) != {"nothing"}), st.integers(0, 3))
    def explore(names, again):
        check_network(names, again)

    explore()


def test_a_branch_that_is_not_taken_leaves_no_trace_of_what_it_would_have_divided_by():
    def loss(params, x, key):
        return lax.cond(x > 1, lambda: params["a"] / (x - 1), lambda: params["b"] * x)

    params = {"a": jnp.float32(2), "b": jnp.float32(3)}
    grads = replay.per_sample(loss).grads(params, jnp.array([3.0, 1.0, 0.0]))
    assert grads["a"].tolist() == [0.5, 0.0, 0.0]
    assert grads["b"].tolist() == [0.0, 1.0, 0.0]


def test_a_value_made_of_parameters_is_made_once_however_often_it_is_used():
    def loss(params, x, key):
        w = params["w"]
        for _ in range(60):  # 2 ** 60 multiplications, if every use made it again
            w = 0.5 * (w + w)
        return jnp.dot(x, w)

    grads = replay.per_sample(loss).grads({"w": jnp.ones(3)}, jnp.eye(3)[:2])
    assert grads["w"].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_loss_may_close_over_what_an_outer_jit_traces():
    @jax.jit
    def outer(scale, params, batch):
        def loss(params, x, key):
            stack = jnp.stack([scale, scale])
            h, _ = lax.scan(lambda h, own: (h * own[0] * own[1], None), x, (stack, params["v"]))
            return jnp.dot(h, params["w"] * scale)

        return replay.per_sample(loss).grads(params, batch)

    params = {"v": jnp.full((2, 2), 3.0), "w": jnp.array([5.0, 7.0])}
    grads = outer(jnp.full(2, 2.0), params, jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    assert grads["w"].tolist() == [[72, 0], [0, 72]]
    assert grads["v"].tolist() == [[[120, 0], [120, 0]], [[0, 168], [0, 168]]]


def test_the_layers_of_a_stack_are_an_axis_of_the_factors_and_times_are_summed_over():
    loss, params, batch = ZOO["layers stacked around a scan over time"]()
    taps = tap(loss, params, batch[0], None)
    leaves = jax.tree.leaves(params)
    _, factors = jax.eval_shape(taps.factors, leaves, [batch[0]])
    outer = [x for x in factors if isinstance(x, Outer)]
    assert {x.left.shape for x in outer} == {x.right.shape for x in outer} == {(2, 4, 3)}
    assert [x.value.shape for x in factors if isinstance(x, Whole)] == [(2, 3)]


def test_keys_reach_the_loss_of_their_sample():
    def loss(params, x, key):
        return jnp.sum(jax.random.normal(key, (3,)) * params["w"] * x)

    keys = jax.random.split(jax.random.key(0), 4)
    grads = replay.per_sample(loss).grads({"w": jnp.ones(3)}, jnp.ones((4, 3)), keys)["w"]
    expected = np.stack([np.asarray(jax.random.normal(key, (3,))) for key in keys])
    np.testing.assert_allclose(grads, expected, rtol=1e-6)  # fused otherwise than in eager mode


@pytest.mark.parametrize("method", ["grads", "abs_sum", "square_sum", "max"])
def test_dropout_is_that_of_each_samples_key_in_every_reduction(method):
    def loss(params, x, key):
        first, second = jax.random.split(key)
        h = (x @ params["w"]) * jax.random.bernoulli(first, 0.5, (8,)).astype(x.dtype)
        return (h * jax.random.rademacher(second, (8,), x.dtype) * params["s"]).sum()

    params = {"w": jnp.ones((3, 8)), "s": jnp.full(8, 2.0)}
    batch, keys = jnp.ones((5, 3)), jax.random.split(jax.random.key(1), 5)
    g = jax.vmap(jax.grad(loss), (None, 0, 0))(params, batch, keys)
    reduce = {
        "grads": lambda g: g,
        "abs_sum": lambda g: jnp.abs(g).sum(0),
        "square_sum": lambda g: jnp.square(g).sum(0),
        "max": lambda g: jnp.abs(g).max(0),
    }[method]
    found = getattr(replay.per_sample(loss), method)(params, batch, keys)
    for name, gradients in g.items():  # all are small integers: no rounding
        assert found[name].tolist() == reduce(gradients).tolist()
    assert len(np.unique(g["s"], axis=0)) == 5


def test_equal_values_go_to_the_earlier_sample_and_short_batches_are_filled_up():
    per_sample = replay.per_sample(lambda p, x, key: jnp.sum(p["w"] * x))
    batch = jnp.array([[1.0, 0.0], [-1.0, 2.0], [1.0, -2.0]])
    values, positions = per_sample.top_k(4, {"w": jnp.ones(2)}, batch)
    assert positions["w"].tolist() == [[0, 1], [1, 2], [2, 0], [-1, -1]]
    assert values["w"].tolist() == [[1, 2], [1, 2], [1, 0], [-np.inf, -np.inf]]
    assert per_sample.argmax({"w": jnp.ones(2)}, batch)["w"].tolist() == [0, 1]


def test_a_histogram_counts_every_sample_and_weight_once():
    per_sample = replay.per_sample(lambda p, x, key: jnp.sum(p["w"] * x))
    batch = jnp.array([[0.5, 1.0], [-1.5, 3.0], [2.0, jnp.nan]])
    counts = per_sample.histogram(jnp.array([1.0, 2.0]), {"w": jnp.ones(2)}, batch)
    assert counts["w"].tolist() == [1, 2, 3]


def test_one_weight_of_one_tensor_for_all_samples():
    per_sample, params, batch, exact, _ = case("dense")
    name = replay.tree.paths(params)[3]
    found = per_sample.at(name, (2, 1), params, batch)
    np.testing.assert_allclose(found, jax.tree.leaves(exact)[3][:, 2, 1], rtol=1e-5)
    with pytest.raises(replay.ProgramError, match="there is no tensor 'nowhere'"):
        per_sample.at("nowhere", (0,), params, batch)


def test_a_projection_keeps_norms_on_average_and_is_the_same_for_every_batch():
    per_sample, params, batch, exact, _ = case("dense")
    key = jax.random.key(5)
    projected = per_sample.project(512, key, params, batch)
    flat = np.concatenate([g.reshape(BATCH, -1) for g in jax.tree.leaves(exact)], 1)
    ratio = np.linalg.norm(projected, axis=1) / np.linalg.norm(flat, axis=1)
    assert (np.abs(ratio - 1) < 0.15).all()
    part = per_sample.project(512, key, params, batch[1:3])
    np.testing.assert_allclose(part, projected[1:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "params", "batch", "message"),
    [
        (lambda p, x, k: p["w"] * x, {"w": jnp.ones(3)}, jnp.ones((4, 3)), r"has shape \[3\]"),
        (lambda p, x, k: 0.0, {"w": jnp.ones(3, jnp.int32)}, jnp.ones((4, 3)), "'w' is int32"),
        (
            lambda p, x, k: 0.0,
            {"w": jnp.ones(3)},
            {"a": jnp.ones((4, 3)), "b": jnp.ones(5)},
            r"do not share a leading axis: \[4, 3\], \[5\]",
        ),
        (lambda p, x, k: 0.0, {"w": jnp.ones(3)}, jnp.float32(1), "do not share a leading axis"),
    ],
)
def test_what_is_not_per_sample_is_refused_with_advice(loss, params, batch, message):
    with pytest.raises(replay.ProgramError, match=message) as caught:
        replay.per_sample(loss).norms(params, batch)
    assert caught.value.why
    assert caught.value.fix


def test_a_direction_of_another_structure_is_refused():
    per_sample = replay.per_sample(lambda p, x, key: jnp.sum(p["w"] * x))
    with pytest.raises(replay.ProgramError, match="another tree structure"):
        per_sample.dot({"v": jnp.ones(3)}, {"w": jnp.ones(3)}, jnp.ones((4, 3)))


def test_the_factors_are_those_of_the_two_kinds():
    assert Outer._fields == ("left", "right")
    assert Rows._fields == ("index", "right")


def test_a_chain_of_sums_has_one_perturbation():
    def both(params, x):
        return jnp.tanh(x @ params["w"] + params["b"] + x @ params["v"]).sum()

    def twice(params, x):  # the cotangent of the product is not that of the sum alone
        product = x @ params["w"]
        return (jnp.tanh(product + params["b"]) * product).sum()

    params = {"w": normal(3, 2), "b": normal(2, seed=2), "v": normal(3, 2, seed=3)}
    x = normal(4, 3, seed=4)
    for function, count in ((both, 1), (twice, 2)):
        assert len(tap(function, params, x[0]).perturbed) == count
        grads = jax.vmap(jax.grad(function), (None, 0))(params, x)
        found = replay.per_sample(lambda p, x, key, f=function: f(p, x), strategy="factored")
        for a, b in zip(*map(jax.tree.leaves, (found.grads(params, x), grads)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
