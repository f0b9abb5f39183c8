"""Per-sample gradients of a zoo of losses, against `vmap(grad)` in float64."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import replay
from replay.grads.gradients import Gradients
from replay.grads.taps import Outer, Rows

BATCH = 4
ZOO = {}


def zoo(make):
    ZOO[make.__name__.replace("_", " ")] = make
    return make


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(*shape, size=11):
    return jnp.asarray(np.random.default_rng(1).integers(0, size, shape), jnp.int32)


def linen(module, batch, finish=lambda y: jnp.sin(y).sum()):
    params = module.init(jax.random.key(0), batch[0])["params"]
    return lambda params, x, key: finish(module.apply({"params": params}, x)), params, batch


def recurrent(cell, batch, both=False):
    def module(dtype):  # flax starts the carry in this dtype, whatever that of the inputs
        one, other = (nn.RNN(cell(5, dtype=dtype, param_dtype=dtype)) for _ in range(2))
        return nn.Bidirectional(one, other) if both else one

    params = module(jnp.float32).init(jax.random.key(0), batch[0])["params"]

    def loss(params, x, key):
        return jnp.sin(module(x.dtype).apply({"params": params}, x)).sum()

    return loss, params, batch


@zoo
def dense():
    return linen(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(5)]), normal(BATCH, 7))


@zoo
def dense_with_a_frozen_first_layer():
    def loss(params, x, key):
        frozen = jax.lax.stop_gradient(params["first"])
        return jnp.sin(jnp.tanh(x @ frozen) @ params["second"]).sum()

    return loss, {"first": normal(7, 6), "second": normal(6, 5), "unused": normal(3)}, normal(4, 7)


@zoo
def strided_dilated_and_grouped_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            x = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)(x)
            x = nn.Conv(8, (2, 2), feature_group_count=8, padding="VALID")(x)
            return nn.Dense(3)(nn.max_pool(x, (2, 2)).reshape(-1))

    return linen(Net(), normal(BATCH, 9, 9, 2))


@zoo
def one_and_three_dimensional_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Conv(3, (2, 2, 2))(x))
            return nn.Conv(4, (3,), padding="CIRCULAR")(x.reshape(-1, 3))

    return linen(Net(), normal(BATCH, 3, 4, 3, 2))


@zoo
def transposed_convolution_and_group_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)
            return nn.Conv(3, (1, 1))(x + nn.GroupNorm(2)(x))

    return linen(Net(), normal(BATCH, 4, 4, 2))


@zoo
def transformer_with_tied_embedding():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(11, 8)
            h = embed(x)
            mask = nn.make_causal_mask(x)
            h = h + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(h), mask=mask)
            h = h + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(h))))
            return embed.attend(h)

    def finish(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(6)).sum()

    return linen(Net(), tokens(BATCH, 6), finish)


@zoo
def multi_query_attention_by_einsum():
    def loss(params, x, key):
        q = jnp.einsum("td,dhk->thk", x, params["q"])
        k, v = x @ params["k"], x @ params["v"]
        weights = jax.nn.softmax(jnp.einsum("thk,sk->hts", q, k))
        return jnp.sin(jnp.einsum("hts,sk,hkd->td", weights, v, params["o"])).sum()

    params = {"q": normal(6, 2, 4), "k": normal(6, 4, seed=1), "v": normal(6, 4, seed=2)}
    return loss, params | {"o": normal(2, 4, 6, seed=3)}, normal(BATCH, 5, 6)


@zoo
def lstm_over_a_scan():
    return recurrent(nn.OptimizedLSTMCell, normal(BATCH, 6, 3))


@zoo
def bidirectional_gru():
    return recurrent(nn.GRUCell, normal(BATCH, 5, 3), both=True)


@zoo
def nested_scans():
    def loss(params, x, key):
        def inner(h, x):
            h = jnp.tanh(h @ params["w"] + x @ params["u"] + params["b"])
            return h, h

        def outer(h, x):
            h, out = jax.lax.scan(inner, h, x, reverse=True)
            return h * params["s"], out.sum(0)

        return jax.lax.scan(outer, jnp.zeros(4), x)[1].sum()

    params = {"w": normal(4, 4), "u": normal(3, 4), "b": normal(4), "s": normal(4, seed=5)}
    return loss, params, normal(BATCH, 2, 3, 3)


@zoo
def layers_stacked_for_a_scan():
    def loss(params, x, key):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0])

    return loss, {"w": normal(3, 5, 5)}, normal(BATCH, 5)


@zoo
def linear_state_space_by_associative_scan():
    def loss(params, x, key):
        decay = jax.nn.sigmoid(params["a"])
        u = x @ params["b"]
        rates = jnp.broadcast_to(decay, u.shape)

        def join(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, h = jax.lax.associative_scan(join, (rates, u))
        return jnp.square(h @ params["c"]).sum()

    return loss, {"a": normal(4), "b": normal(3, 4), "c": normal(4, 2)}, normal(BATCH, 6, 3)


@zoo
def mixture_of_experts_by_gather():
    def loss(params, x, key):
        chosen = jnp.argmax(x @ params["router"])
        gate = jax.nn.softmax(x @ params["router"])[chosen]
        return gate * jnp.sin(x @ params["experts"][chosen]).sum()

    return loss, {"router": normal(5, 3), "experts": normal(3, 5, 4)}, normal(BATCH, 5)


@zoo
def weight_normalised_layer():
    def loss(params, x, key):
        w = params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True) * params["g"][None]
        return jnp.sin(x @ w).sum()

    return loss, {"v": normal(5, 4), "g": normal(4)}, normal(BATCH, 5)


@zoo
def low_rank_adapter_on_a_frozen_base():
    base = normal(6, 5, seed=9)

    def loss(params, x, key):
        return jnp.sin(x @ (base + params["a"] @ params["b"])).sum() + (x @ params["a"]).sum()

    return loss, {"a": normal(6, 2), "b": normal(2, 5)}, normal(BATCH, 6)


@zoo
def hypernetwork():
    def loss(params, x, key):
        made = jnp.tanh(params["z"] @ params["h"]).reshape(5, 3)
        return jnp.sin(x @ made + params["b"]).sum()

    return loss, {"z": normal(2), "h": normal(2, 15), "b": normal(3)}, normal(BATCH, 5)


@zoo
def graph_network_by_segment_sum():
    source, target = jnp.array([0, 1, 2, 2]), jnp.array([1, 2, 0, 1])

    def loss(params, x, key):
        messages = jnp.tanh(x[source] @ params["m"])
        gathered = jax.ops.segment_sum(messages, target, 3)
        return jnp.sin(jnp.concatenate([x, gathered], 1) @ params["u"]).sum()

    return loss, {"m": normal(4, 3), "u": normal(7, 2)}, normal(BATCH, 3, 4)


@zoo
def fourier_features_and_complex_values():
    def loss(params, x, key):
        spectrum = jnp.fft.rfft(x) * (params["re"] + 1j * params["im"])
        return jnp.abs(jnp.fft.irfft(spectrum, 8) @ params["w"]).sum()

    return loss, {"re": normal(5), "im": normal(5, seed=2), "w": normal(8, 3)}, normal(BATCH, 8)


@zoo
def activation_with_its_own_vjp():
    @jax.custom_vjp
    def clip(x):
        return jnp.clip(x, -1, 1)

    clip.defvjp(lambda x: (clip(x), x), lambda x, g: (g * 0.5,))

    @jax.custom_jvp
    def scaled(w, x):
        return w * x

    @scaled.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return w * x, 2 * dw * x + w * dx

    def loss(params, x, key):
        return jnp.sum(scaled(params["s"], clip(x @ params["w"])))

    return loss, {"w": normal(5, 4), "s": normal(4)}, normal(BATCH, 5)


@zoo
def branches_and_rematerialisation():
    def loss(params, x, key):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        h = layer(x, params["a"])
        return jax.lax.cond(
            h[0] > 0, lambda: (h @ params["b"]).sum(), lambda: jnp.sin(h @ params["b"]).sum()
        )

    return loss, {"a": normal(5, 5), "b": normal(5, 3)}, normal(BATCH, 5)


@zoo
def gradient_inside_the_loss():
    def energy(params, x):
        return jnp.tanh(x @ params["w"]).sum()

    def loss(params, x, key):
        return jnp.square(jax.grad(energy, argnums=1)(params, x)).sum() + energy(params, x)

    return loss, {"w": normal(5, 4)}, normal(BATCH, 5)


@zoo
def weight_decay_in_the_loss():
    def loss(params, x, key):
        return jnp.sin(x @ params["w"]).sum() + 0.1 * jnp.square(params["w"]).sum()

    return loss, {"w": normal(5, 4)}, normal(BATCH, 5)


@zoo
def fused_projection_that_is_sliced():
    def loss(params, x, key):
        q, k = jnp.split(params["qk"], 2, axis=1)
        return jnp.sum(jnp.sin(x @ q) * jnp.cos(x @ k)) + (x @ params["half"][:3].T).sum()

    return loss, {"qk": normal(5, 8), "half": normal(6, 5)}, normal(BATCH, 5)


@zoo
def nnx_network():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, rngs=rngs)
            self.dense = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.dense(self.embed(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(params)
    return lambda p, x, key: nnx.merge(graph, p)(x).sum(), params, tokens(BATCH, 5)


@zoo
def equinox_network():
    net = equinox.nn.MLP(5, "scalar", 8, 2, key=jax.random.key(0))
    params, rest = equinox.partition(net, equinox.is_inexact_array)
    return lambda p, x, key: equinox.combine(p, rest)(x), params, normal(BATCH, 5)


def wide(function, *arguments):
    """Run in float64."""
    with jax.enable_x64(True):
        upcast = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)) if x.dtype == np.float32 else x,
            arguments,
        )
        return jax.tree.map(np.asarray, function(*upcast))


@functools.cache
def case(name):
    loss, params, batch = ZOO[name]()

    def gradients(params, batch):
        return jax.vmap(jax.grad(lambda p, x: loss(p, x, None)), (None, 0))(params, batch)

    def relaxed(*arguments):  # the losses are written for the usual promotion
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.jit(gradients)(*arguments)

    exact = wide(relaxed, params, batch)
    rounded = jax.tree.map(np.asarray, relaxed(params, batch))
    return replay.per_sample(loss), params, batch, exact, rounded


def check(found, exact, rounded):
    """The largest error is at most 4 times that of float32 `vmap(grad)`, plus one unit."""
    for path, ours, truth, theirs in zip(
        replay.tree.paths(exact),
        *map(jax.tree.leaves, (found, exact, rounded)),
        strict=True,
    ):
        scale = np.abs(truth).max() if truth.size else 0.0
        allowed = 4 * np.abs(theirs - truth).max(initial=0.0) + np.spacing(np.float32(scale))
        # Where the true gradient vanishes, only the rounding of what cancels is left.
        allowed = max(allowed, 1e-6)
        assert np.asarray(ours).shape == truth.shape, path
        assert np.abs(np.asarray(ours, np.float64) - truth).max(initial=0.0) <= allowed, path


QUICK = {
    "dense",
    "strided dilated and grouped convolutions",
    "transformer with tied embedding",
    "lstm over a scan",
    "weight normalised layer",
    "activation with its own vjp",
    "weight decay in the loss",
    "fused projection that is sliced",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in ZOO]
)
def test_every_reduction_is_as_exact_as_vmap_of_grad(name):
    per_sample, params, batch, exact, rounded = case(name)

    def call(method, *arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.jit(lambda p, x: getattr(per_sample, method)(*arguments, p, x))(
                params, batch
            )

    def both(function):
        return jax.tree.map(function, exact), jax.tree.map(function, rounded)

    check(call("grads"), exact, rounded)
    check(call("sum"), *both(lambda g: g.sum(0)))
    check(call("abs_sum"), *both(lambda g: np.abs(g).sum(0)))
    check(call("square_sum"), *both(lambda g: np.square(g).sum(0)))
    check(call("max"), *both(lambda g: np.abs(g).max(0)))
    check(call("tensor_norms"), *both(lambda g: np.linalg.norm(g.reshape(BATCH, -1), axis=1)))
    flat, rough = (
        np.concatenate([g.reshape(BATCH, -1) for g in jax.tree.leaves(tree)], 1)
        for tree in (exact, rounded)
    )
    check([call("norms")], [np.linalg.norm(flat, axis=1)], [np.linalg.norm(rough, axis=1)])
    check([call("gram")], [flat @ flat.T], [rough @ rough.T])
    direction = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params
    )
    along = np.concatenate([np.ravel(d) for d in jax.tree.leaves(direction)])
    check([call("dot", direction)], [flat @ along], [rough @ along])
    values, positions = call("top_k", 2)
    check(values, *both(lambda g: -np.sort(-np.abs(g), axis=0)[:2]))
    for v, p, g in zip(*map(jax.tree.leaves, (values, positions, exact)), strict=True):
        chosen = np.take_along_axis(np.abs(g), np.asarray(p), 0)
        np.testing.assert_allclose(chosen, v, rtol=1e-3, atol=1e-5)  # another only at a near tie


# The way of every tensor. `rule` never holds more than the factors and the answer.
WAYS = {
    "dense": "direct rule direct rule",
    "dense with a frozen first layer": "factors rule zero",
    "strided dilated and grouped convolutions": "direct rule " * 4,
    "one and three dimensional convolutions": "direct rule " * 2,
    "transposed convolution and group norm": "direct rule direct rule direct direct",
    "transformer with tied embedding": "direct rule direct rule factors "
    "direct direct direct direct rule rule rule rule",
    "multi query attention by einsum": "rule " * 4,
    "lstm over a scan": "direct rule " * 4 + "rule " * 4,
    "nested scans": "direct direct rule rule",
    "layers stacked for a scan": "direct",
    "linear state space by associative scan": "direct rule rule",
    "weight normalised layer": "factors factors",
    "low rank adapter on a frozen base": "factors factors",
    "hypernetwork": "direct factors factors",
    "graph network by segment sum": "rule rule",
    "weight decay in the loss": "factors",
    "fused projection that is sliced": "rule factors",
    "nnx network": "direct rule rule",
}


@pytest.mark.parametrize("name", list(WAYS))
def test_the_way_of_every_tensor_is_as_expected(name):
    loss, params, batch = ZOO[name]()
    per_sample = replay.per_sample(loss)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lines = per_sample.explain(params, batch).splitlines()
    assert [line.split()[1] for line in lines] == WAYS[name].split(), "\n".join(lines)


@pytest.mark.parametrize("method", ["square_norms", "square_sum", "abs_sum"])
def test_a_dense_layer_is_never_materialised(method, monkeypatch):
    per_sample, params, batch, exact, _ = case("dense")

    def fail(*_):
        raise AssertionError("the gradient of a sample was materialised")

    monkeypatch.setattr(Gradients, "one", fail)
    gradients, _ = per_sample._gradients(params, batch, None)
    for gradient in gradients:
        if gradient.tensor.way == "rule":
            getattr(gradient, method)()


def test_keys_reach_the_loss_of_their_sample():
    def loss(params, x, key):
        return jnp.sum(jax.random.normal(key, (3,)) * params["w"] * x)

    keys = jax.random.split(jax.random.key(0), 4)
    grads = replay.per_sample(loss).grads({"w": jnp.ones(3)}, jnp.ones((4, 3)), keys)["w"]
    expected = np.stack([np.asarray(jax.random.normal(key, (3,))) for key in keys])
    np.testing.assert_allclose(grads, expected, rtol=1e-6)  # fused otherwise than in eager mode


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
