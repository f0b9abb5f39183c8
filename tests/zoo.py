"""Losses of many kinds of network, each with its parameters and a small batch of examples.

`ZOO[name]()` gives `(loss, params, batch)` with `loss(params, example, key)` of one example. Every
loss follows the dtype of its arguments, so that it can be evaluated in float64 as well.
"""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import lax

BATCH = 4
ZOO = {}


def zoo(make):
    ZOO[make.__name__.replace("_", " ")] = make
    return make


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(*shape, size=11):
    return jnp.asarray(np.random.default_rng(1).integers(0, size, shape), jnp.int32)


def sine(y):
    return jnp.sin(y).sum()


def filled(module, batch):
    """Return parameters for a flax module without compiling its initialisation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch[0])["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.5 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)])


def linen(module, batch, finish=sine):
    params = filled(module, batch)
    return lambda params, x, key: finish(module.apply({"params": params}, x)), params, batch


def recurrent(cell, batch, both=False):
    def module(dtype):  # flax starts the carry in this dtype, whatever that of the inputs
        one, other = (nn.RNN(cell(5, dtype=dtype, param_dtype=dtype)) for _ in range(2))
        return nn.Bidirectional(one, other) if both else one

    params = filled(module(jnp.float32), batch)
    return (
        lambda params, x, key: sine(module(x.dtype).apply({"params": params}, x)),
        params,
        batch,
    )


def of_nnx(module, batch, finish=sine):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    return lambda p, x, key: finish(nnx.merge(graph, p, rest)(x)), params, batch


def of_equinox(module, batch, finish=sine):
    params, rest = equinox.partition(module, equinox.is_inexact_array)
    return lambda p, x, key: finish(equinox.combine(p, rest)(x)), params, batch


@zoo
def dense():
    return linen(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(5)]), normal(BATCH, 7))


@zoo
def dense_with_a_frozen_first_layer():
    def loss(params, x, key):
        frozen = lax.stop_gradient(params["first"])
        return sine(jnp.tanh(x @ frozen) @ params["second"])

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
def residual_network_with_group_norm():
    class Block(nn.Module):
        features: int
        strides: int

        @nn.compact
        def __call__(self, x):
            h = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
            h = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(2)(h)))
            h = nn.GroupNorm(2)(h)
            if h.shape != x.shape:
                x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
            return nn.relu(x + h)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block(6, 2)(Block(4, 1)(nn.Conv(4, (3, 3))(x)))
            return nn.Dense(3)(x.mean(axis=(0, 1)))

    return linen(Net(), normal(BATCH, 6, 6, 2))


@zoo
def u_shaped_network_with_resizing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            fine = nn.silu(nn.Conv(4, (3, 3))(x))
            coarse = nn.silu(nn.Conv(6, (3, 3), strides=2)(fine))
            wide = jax.image.resize(coarse, (*fine.shape[:2], 6), "bilinear")
            return nn.Conv(2, (3, 3))(jnp.concatenate([fine, wide], axis=-1))

    return linen(Net(), normal(BATCH, 6, 6, 2))


@zoo
def transformer_with_tied_embedding():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(11, 8)
            h = embed(x)
            mask = nn.make_causal_mask(x)
            h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h), mask=mask)
            h = h + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(h))))
            return embed.attend(h)

    def finish(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(6)).sum()

    return linen(Net(), tokens(BATCH, 6), finish)


@zoo
def attention_with_rotary_embedding():
    def turn(x):  # [time, heads, features]
        rates = 0.1 ** jnp.arange(x.shape[-1] // 2, dtype=x.dtype)
        angles = (jnp.arange(len(x), dtype=x.dtype)[:, None] * rates)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        turned = [even * cos - odd * sin, even * sin + odd * cos]
        return jnp.stack(turned, axis=-1).reshape(x.shape)

    def loss(params, x, key):
        h = params["embed"][x]
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * params["scale"]
        q, k, v = jnp.moveaxis((h @ params["qkv"]).reshape(len(x), 3, 2, 4), 1, 0)
        scores = jnp.einsum("thk,shk->hts", turn(q), turn(k))
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -1e9)
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores), v)
        h = h + jnp.einsum("thk,hkd->td", mixed, params["out"])
        gated = jax.nn.silu(h @ params["gate"]) * (h @ params["up"])
        return sine(h + gated @ params["down"])

    params = {"embed": normal(11, 6), "scale": normal(6), "qkv": normal(6, 24, seed=1)}
    params |= {"out": normal(2, 4, 6, seed=2), "gate": normal(6, 9, seed=3)}
    return loss, params | {"up": normal(6, 9, seed=4), "down": normal(9, 6)}, tokens(BATCH, 5)


@zoo
def multi_query_attention_by_einsum():
    def loss(params, x, key):
        q = jnp.einsum("td,dhk->thk", x, params["q"])
        k, v = x @ params["k"], x @ params["v"]
        weights = jax.nn.softmax(jnp.einsum("thk,sk->hts", q, k))
        return sine(jnp.einsum("hts,sk,hkd->td", weights, v, params["o"]))

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
            h, out = lax.scan(inner, h, x, reverse=True)
            return h * params["s"], out.sum(0)

        return lax.scan(outer, jnp.zeros(4, x.dtype), x)[1].sum()

    params = {"w": normal(4, 4), "u": normal(3, 4), "b": normal(4), "s": normal(4, seed=5)}
    return loss, params, normal(BATCH, 2, 3, 3)


@zoo
def scan_from_a_learned_state():
    def loss(params, x, key):
        def step(carry, x):
            h, w = carry
            h = jnp.tanh(h @ w + x)
            return (h, w), None

        return sine(lax.scan(step, (params["start"], params["w"]), x)[0][0])

    return loss, {"start": normal(4), "w": normal(4, 4)}, normal(BATCH, 3, 4)


@zoo
def layers_stacked_for_a_scan():
    def loss(params, x, key):
        def layer(h, own):
            return jnp.tanh(h @ own["w"] * own["s"] + own["b"]) @ params["shared"], h @ own["u"]

        h, out = lax.scan(layer, x, params["layers"])
        return h.sum() + sine(out)

    layers = {"w": normal(3, 5, 5), "s": normal(3, 5), "b": normal(3, 5), "u": normal(3, 5, 2)}
    return loss, {"layers": layers, "shared": normal(5, 5)}, normal(BATCH, 5)


@zoo
def stacked_transformer_blocks():
    def loss(params, x, key):
        def block(h, own):
            q, k, v = jnp.split(h @ own["qkv"], 3, axis=1)
            h = h + jax.nn.softmax(q @ k.T) @ v
            return h + jax.nn.gelu(h @ own["in"]) @ own["out"], None

        return sine(lax.scan(jax.checkpoint(block), x, params, reverse=True)[0])

    params = {"qkv": normal(3, 4, 12), "in": normal(3, 4, 6, seed=2), "out": normal(3, 6, 4)}
    return loss, params, normal(BATCH, 5, 4)


@zoo
def layers_stacked_around_a_scan_over_time():
    def loss(params, x, key):
        def layer(x, own):
            def step(h, x):
                h = jnp.tanh(h @ own["w"] + x @ own["u"] + own["b"])
                return h, h

            return lax.scan(step, jnp.zeros(3, x.dtype), x)[1], None

        return sine(lax.scan(layer, x, params)[0])

    params = {"w": normal(2, 3, 3), "u": normal(2, 3, 3, seed=1), "b": normal(2, 3)}
    return loss, params, normal(BATCH, 4, 3)


@zoo
def layers_taken_by_a_loop():
    def loss(params, x, key):
        def layer(i, h):
            return jnp.tanh(h @ params["w"][i] + params["b"][i])

        return sine(lax.fori_loop(0, 3, layer, x))

    return loss, {"w": normal(3, 5, 5), "b": normal(3, 5)}, normal(BATCH, 5)


@zoo
def linear_state_space_by_associative_scan():
    def loss(params, x, key):
        decay = jax.nn.sigmoid(params["a"])
        u = x @ params["b"]
        rates = jnp.broadcast_to(decay, u.shape)

        def join(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, h = lax.associative_scan(join, (rates, u))
        return jnp.square(h @ params["c"]).sum()

    return loss, {"a": normal(4), "b": normal(3, 4), "c": normal(4, 2)}, normal(BATCH, 6, 3)


@zoo
def mixture_of_experts_by_gather():
    def loss(params, x, key):
        chosen = jnp.argmax(x @ params["router"])
        gate = jax.nn.softmax(x @ params["router"])[chosen]
        return gate * sine(x @ params["experts"][chosen])

    return loss, {"router": normal(5, 3), "experts": normal(3, 5, 4)}, normal(BATCH, 5)


@zoo
def experts_behind_a_switch():
    def loss(params, x, key):
        gates = jax.nn.softmax(x @ params["router"])
        chosen = jnp.argmax(gates)
        branches = [lambda h, i=i: h @ params[f"expert{i}"] / (1 + i) for i in range(3)]
        return gates[chosen] * sine(lax.switch(chosen, branches, x))

    experts = {f"expert{i}": normal(5, 4, seed=i) for i in range(3)}
    return loss, {"router": normal(5, 3), **experts}, normal(BATCH, 5)


@zoo
def weight_normalised_layer():
    def loss(params, x, key):
        w = params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True) * params["g"][None]
        return sine(x @ w)

    return loss, {"v": normal(5, 4), "g": normal(4)}, normal(BATCH, 5)


@zoo
def low_rank_adapter_on_a_frozen_base():
    base = normal(6, 5, seed=9)

    def loss(params, x, key):
        return sine(x @ (base + params["a"] @ params["b"])) + (x @ params["a"]).sum()

    return loss, {"a": normal(6, 2), "b": normal(2, 5)}, normal(BATCH, 6)


@zoo
def low_rank_adapter_applied_in_turn():
    def loss(params, x, key):
        base = lax.stop_gradient(params["base"])
        return sine(x @ base + 0.5 * ((x @ params["a"]) @ params["b"]))

    return loss, {"base": normal(6, 5), "a": normal(6, 2), "b": normal(2, 5)}, normal(BATCH, 6)


@zoo
def hypernetwork():
    def loss(params, x, key):
        made = jnp.tanh(params["z"] @ params["h"]).reshape(5, 3)
        return sine(x @ made + params["b"])

    return loss, {"z": normal(2), "h": normal(2, 15), "b": normal(3)}, normal(BATCH, 5)


@zoo
def hypernetwork_that_reads_the_sample():
    def loss(params, x, key):
        made = jnp.tanh(x @ params["h"]).reshape(5, 3)
        return sine(x @ made @ params["w"])

    return loss, {"h": normal(5, 15), "w": normal(3, 2)}, normal(BATCH, 5)


@zoo
def graph_network_by_segment_sum():
    source, target = jnp.array([0, 1, 2, 2]), jnp.array([1, 2, 0, 1])

    def loss(params, x, key):
        messages = jnp.tanh(x[source] @ params["m"])
        gathered = jax.ops.segment_sum(messages, target, 3)
        return sine(jnp.concatenate([x, gathered], 1) @ params["u"])

    return loss, {"m": normal(4, 3), "u": normal(7, 2)}, normal(BATCH, 3, 4)


@zoo
def fourier_features_and_complex_values():
    def loss(params, x, key):
        spectrum = jnp.fft.rfft(x) * (params["re"] + 1j * params["im"])
        return jnp.abs(jnp.fft.irfft(spectrum, 8) @ params["w"]).sum()

    return loss, {"re": normal(5), "im": normal(5, seed=2), "w": normal(8, 3)}, normal(BATCH, 8)


@zoo
def random_fourier_features():
    frequencies = normal(3, 6, seed=8)

    def loss(params, x, key):
        phases = x @ frequencies.astype(x.dtype)
        h = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)])
        return sine(jax.nn.softplus(h @ params["w"] + params["b"]) @ params["o"])

    return loss, {"w": normal(12, 4), "b": normal(4), "o": normal(4, 2)}, normal(BATCH, 3)


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
        return lax.cond(h[0] > 0, lambda: (h @ params["b"]).sum(), lambda: sine(h @ params["b"]))

    return loss, {"a": normal(5, 5), "b": normal(5, 3)}, normal(BATCH, 5)


@zoo
def iterations_counted_by_a_while_loop():
    def loss(params, x, key):
        def going(state):
            return (jnp.abs(state[0]).max() > 0.1) & (state[1] < 9)

        def step(state):
            return 0.5 * jnp.tanh(state[0] @ params["w"]), state[1] + 1

        _, count = lax.while_loop(going, step, (x, 0))
        fixed = lax.stop_gradient(params["w"])
        point, _ = lax.while_loop(going, lambda s: (0.3 * jnp.tanh(s[0] @ fixed), s[1] + 1), (x, 0))
        point = lax.stop_gradient(point)
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"] + x), point)
        return sine(h @ params["o"]) / (1 + count)

    return loss, {"w": normal(4, 4), "o": normal(4, 3)}, normal(BATCH, 4)


@zoo
def linear_system_with_a_learned_matrix():
    def loss(params, x, key):
        return sine(jnp.linalg.solve(params["a"] + 5 * jnp.eye(3, dtype=x.dtype), x))

    return loss, {"a": normal(3, 3)}, normal(BATCH, 3)


@zoo
def gradient_inside_the_loss():
    def energy(params, x):
        return jnp.tanh(x @ params["w"]).sum()

    def loss(params, x, key):
        return jnp.square(jax.grad(energy, argnums=1)(params, x)).sum() + energy(params, x)

    return loss, {"w": normal(5, 4)}, normal(BATCH, 5)


@zoo
def bfloat16_compute_with_float32_weights():
    def loss(params, x, key):
        # In float64 it is the function that bfloat16 rounds.
        compute = jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
        p, h = jax.tree.map(lambda leaf: leaf.astype(compute), (params, x))
        h = jax.nn.gelu(h @ p["w"] + p["b"]) * p["s"]
        return sine((h @ p["o"]).astype(x.dtype))

    params = {"w": normal(5, 8), "b": normal(8), "s": normal(8, seed=3), "o": normal(8, 4)}
    return loss, params, normal(BATCH, 3, 5)


@zoo
def weight_decay_in_the_loss():
    def loss(params, x, key):
        return sine(x @ params["w"]) + 0.1 * jnp.square(params["w"]).sum()

    return loss, {"w": normal(5, 4)}, normal(BATCH, 5)


@zoo
def fused_projection_that_is_sliced():
    def loss(params, x, key):
        q, k = jnp.split(params["qk"], 2, axis=1)
        return jnp.sum(jnp.sin(x @ q) * jnp.cos(x @ k)) + (x @ params["half"][:3].T).sum()

    return loss, {"qk": normal(5, 8), "half": normal(6, 5)}, normal(BATCH, 5)


@zoo
def nnx_embedding():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, rngs=rngs)
            self.dense = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.dense(self.embed(x)))

    return of_nnx(Net(nnx.Rngs(0)), tokens(BATCH, 5))


@zoo
def nnx_convolutions():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.up = nnx.ConvTranspose(4, 3, (2, 2), strides=(2, 2), rngs=rngs)

        def __call__(self, x):
            return self.up(nnx.relu(self.norm(self.conv(x))))

    return of_nnx(Net(nnx.Rngs(0)), normal(BATCH, 5, 5, 2))


@zoo
def nnx_attention():
    attention = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0), decode=False)
    return of_nnx(attention, normal(BATCH, 4, 6))


@zoo
def equinox_perceptron():
    net = equinox.nn.MLP(5, "scalar", 8, 2, key=jax.random.key(0))
    return of_equinox(net, normal(BATCH, 5))


@zoo
def equinox_convolutions():
    one, two = jax.random.split(jax.random.key(0))
    layers = [
        equinox.nn.Conv2d(2, 4, 3, padding=1, groups=2, key=one),
        equinox.nn.GroupNorm(2, 4),
        equinox.nn.Lambda(jax.nn.relu),
        equinox.nn.ConvTranspose2d(4, 3, 2, 2, key=two),
    ]
    return of_equinox(equinox.nn.Sequential(layers), normal(BATCH, 2, 5, 5))


@zoo
def equinox_cell_under_a_scan():
    cell = equinox.nn.GRUCell(3, 4, key=jax.random.key(0))
    params, rest = equinox.partition(cell, equinox.is_inexact_array)

    def loss(params, x, key):
        cell = equinox.combine(params, rest)
        start = jnp.zeros(4, x.dtype)
        return sine(lax.scan(lambda h, x: (cell(x, h), None), start, x)[0])

    return loss, params, normal(BATCH, 5, 3)


@zoo
def equinox_attention():
    attention = equinox.nn.MultiheadAttention(2, 6, key=jax.random.key(0))
    params, rest = equinox.partition(attention, equinox.is_inexact_array)
    return (
        lambda params, x, key: sine(equinox.combine(params, rest)(x, x, x)),
        params,
        normal(BATCH, 4, 6),
    )
