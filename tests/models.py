"""The zoo: small models on real data, each with something that makes training hard to repeat."""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import linen, nnx
from sklearn.datasets import load_digits

import replay

BATCH, STEPS, EPOCHS, SEED = 8, 48, 4, 11
STEPS_PER_EPOCH = STEPS // EPOCHS
WINDOW = 16  # characters in one sample of text
VOCABULARY = 128

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


# ---------------------------------------------------------------------------------------- data


@functools.cache
def digits(samples: int) -> dict[str, np.ndarray]:
    """Return scanned digits: `x float32[samples, 8, 8]` from 0 to 1, and `y int32[samples]`."""
    images, labels = load_digits(return_X_y=True)
    x = (images[:samples].reshape(-1, 8, 8) / 16).astype(np.float32)
    return {"x": x, "y": labels[:samples].astype(np.int32)}


@functools.cache
def text(samples: int) -> dict[str, np.ndarray]:
    """Return neighbouring windows of Python source, `int32[samples, 17]`, overlapping by one."""
    source = pathlib.Path(argparse.__file__).read_bytes()
    characters = np.minimum(np.frombuffer(source, np.uint8), VOCABULARY - 1).astype(np.int32)
    starts = np.arange(samples)[:, None] * WINDOW
    return {"characters": characters[starts + np.arange(WINDOW + 1)]}


# ---------------------------------------------------------------------------------- optimizers


def momentum():
    return optax.sgd(0.05, momentum=0.9)


def adamw():
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 8, STEPS))


def clipped_adam():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))


def accumulated():
    return optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3)


def plateau():
    slower = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=3)
    return optax.chain(optax.adam(1e-2), slower)


OPTIMIZERS = {f.__name__: f for f in (momentum, adamw, clipped_adam, accumulated, plateau)}


# -------------------------------------------------------------------------------------- models


class _Dense(linen.Module):
    """Dropout, whose masks must not depend on position or neighbours."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.relu(linen.Dense(32)(x.reshape(-1)))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(10)(x)


def dense(optimizer) -> replay.Program:
    def loss(apply, example):
        logits = apply(example["x"], train=True)
        right = (logits.argmax() == example["y"]).astype(jnp.float32)
        return cross_entropy(logits, example["y"]), {"accuracy": right, "largest": logits.max()}

    return replay.Program.linen(_Dense(), loss, optimizer, jnp.zeros((8, 8)), train=False)


class _Convolution(linen.Module):
    """Convolutions, whose bits depend on where in the program they stand; batch statistics."""

    @linen.compact
    def __call__(self, x, train):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        for features in (16, 32):
            x = linen.Conv(features, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = linen.max_pool(x, (2, 2), (2, 2))
        return linen.Dense(10)(x.reshape(x.shape[0], -1))


def convolution(optimizer) -> replay.Program:
    def loss(apply, batch):
        return cross_entropy(apply(batch["x"][..., None], train=True), batch["y"])

    blank = jnp.zeros((1, 8, 8, 1))
    module = _Convolution()
    return replay.Program.linen(module, loss, optimizer, blank, batched=True, rngs=(), train=False)


class _Lstm(nnx.Module):
    """A loop over time inside the step."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(16, 24, rngs=rngs))
        self.head = nnx.Linear(24, VOCABULARY, rngs=rngs)

    def __call__(self, characters):
        return self.head(self.lstm(self.embed(characters)))


def lstm(optimizer) -> replay.Program:
    def loss(model, example, rngs):
        return _next_character(model, example["characters"])

    return replay.Program.nnx(_Lstm(nnx.Rngs(3)), loss, optimizer)


class _Transformer(linen.Module):
    """A weight with two uses (tied embeddings), attention, dropout in several places."""

    width = 32

    @linen.compact
    def __call__(self, characters, train):
        embed = linen.Embed(VOCABULARY, self.width)
        place = self.param("place", linen.initializers.normal(0.1), (WINDOW, self.width))
        x = embed(characters) + place
        drop = functools.partial(linen.Dropout, 0.1, deterministic=not train)
        attend = linen.MultiHeadDotProductAttention(2, deterministic=True)
        x = x + drop()(attend(linen.LayerNorm()(x), mask=linen.make_causal_mask(characters)))
        wide = linen.gelu(linen.Dense(16 * self.width)(linen.LayerNorm()(x)))
        x = x + drop()(linen.Dense(self.width)(wide))
        return embed.attend(linen.LayerNorm()(x))


def transformer(optimizer) -> replay.Program:
    def loss(apply, example):
        return _next_character(functools.partial(apply, train=True), example["characters"])

    blank = jnp.zeros(WINDOW, jnp.int32)
    return replay.Program.linen(_Transformer(), loss, optimizer, blank, train=False)


def memory(optimizer) -> replay.Program:
    """A recurrence that goes on reading where the batch before stopped; plain functions."""
    width = 24

    def init(key):
        embed, inner, out = jax.random.split(key, 3)
        params = {
            "embed": 0.3 * jax.random.normal(embed, (VOCABULARY, width)),
            "inner": 0.2 * jax.random.normal(inner, (width, width)),
            "out": [0.2 * jax.random.normal(out, (width, VOCABULARY)), jnp.zeros(VOCABULARY)],
        }
        return params, {"hidden": jnp.zeros((BATCH, width))}

    def loss(params, model_state, batch, key, sample_keys):
        def read(hidden, characters):
            hidden = jnp.tanh(params["embed"][characters] + hidden @ params["inner"])
            return hidden, hidden @ params["out"][0] + params["out"][1][None]

        now, following = batch["characters"][:, :-1], batch["characters"][:, 1:]
        hidden, logits = jax.lax.scan(read, model_state["hidden"], now.T)
        return cross_entropy(logits, following.T).mean(axis=0), {"hidden": hidden}

    return replay.Program(init, loss, optimizer, batched=True, name="memory")


def equinox(optimizer) -> replay.Program:
    """A network that is itself a pytree of a class of its own."""

    def build(key):
        return eqx.nn.MLP(64, 10, 24, 2, activation=jax.nn.silu, key=key)

    def init(key):
        return eqx.filter(build(key), eqx.is_array)

    rest = eqx.filter(build(jax.random.key(0)), eqx.is_array, inverse=True)

    def loss(params, example, key):
        return cross_entropy(eqx.combine(params, rest)(example["x"].reshape(-1)), example["y"])

    return replay.Program(init, loss, optimizer, name="equinox")


def _half_init(key):
    first, second = jax.random.split(key)
    return {
        "first": {"kernel": 0.2 * jax.random.normal(first, (64, 32)), "bias": jnp.zeros(32)},
        "second": {"kernel": 0.2 * jax.random.normal(second, (32, 10)), "bias": jnp.zeros(10)},
    }


def _half_loss(params, example, dtype):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    x = example["x"].reshape(-1).astype(dtype)
    x = jax.nn.relu(x @ half["first"]["kernel"] + half["first"]["bias"])
    logits = x @ half["second"]["kernel"] + half["second"]["bias"]
    return cross_entropy(logits.astype(jnp.float32), example["y"])


def bfloat16(optimizer) -> replay.Program:
    """Weights in float32, arithmetic in bfloat16."""

    def loss(params, example, key):
        return _half_loss(params, example, jnp.bfloat16)

    return replay.Program(_half_init, loss, optimizer, name="bfloat16")


class ScaledState(NamedTuple):
    """A state with fields of its own: the loss scale, and good steps since it last changed."""

    params: Any
    opt_state: Any
    scale: jax.Array
    good: jax.Array


def loss_scaling(optimizer) -> replay.Program:
    """Dynamic loss scaling, written out, in float16, where gradients do overflow."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init(key):
        params = _half_init(key)
        return ScaledState(params, optimizer.init(params), jnp.float32(2.0**17), jnp.int32(0))

    def losses_of(state, inputs):
        one = functools.partial(_half_loss, dtype=jnp.float16)
        return jax.vmap(one, (None, 0))(state.params, inputs.batch)

    def gradient(state, inputs):
        def total(params):
            losses = losses_of(state._replace(params=params), inputs)
            mean = jnp.sum(losses * inputs.weights) / BATCH
            return mean * state.scale, (losses, mean)

        scaled, (losses, mean) = jax.grad(total, has_aux=True)(state.params)
        return losses, (), jax.tree.map(lambda g: g / state.scale, scaled), mean

    def update(state, mean, grads, losses):
        finite = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=mean)
        stepped = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            functools.partial(jnp.where, finite), stepped, (state.params, state.opt_state)
        )
        good = jnp.where(finite, state.good + 1, 0)
        grown = jnp.where(good == 8, 2 * state.scale, state.scale)
        scale = jnp.where(finite, grown, state.scale / 2)
        return ScaledState(params, opt_state, scale, jnp.where(good == 8, 0, good))

    return replay.Program.from_functions(
        init, gradient, update, losses=losses_of, name="loss_scaling"
    )


def _next_character(model, characters):
    return cross_entropy(model(characters[:-1]), characters[1:]).mean()


MODELS: dict[str, tuple[Callable[[Any], replay.Program], Callable]] = {
    "dense": (dense, digits),
    "convolution": (convolution, digits),
    "lstm": (lstm, text),
    "transformer": (transformer, text),
    "memory": (memory, text),
    "equinox": (equinox, digits),
    "bfloat16": (bfloat16, digits),
    "loss_scaling": (loss_scaling, digits),
}


# --------------------------------------------------------------------------------------- cases


@functools.cache  # a program is traced once
def _program(model: str, optimizer: str) -> replay.Program:
    return MODELS[model][0](OPTIMIZERS[optimizer]())


@dataclasses.dataclass(frozen=True)
class Case:
    """A training of 48 steps: a model, an optimizer, a form of dispatch, and a peculiarity.

    The memory reads eight streams of text side by side, in explicit order; everything else is
    shuffled over four epochs, whose last short batch is dropped or padded.
    """

    model: str
    optimizer: str
    dispatch: str = "step"
    pad: bool = False
    weighted: bool = False

    def __str__(self) -> str:
        more = [name for name in ("pad", "weighted") if getattr(self, name)]
        return "-".join([self.model, self.optimizer, self.dispatch, *more])

    @property
    def samples(self) -> int:
        if self.model == "memory":
            return STEPS * BATCH
        return STEPS_PER_EPOCH * BATCH + (-4 if self.pad else 4)

    @property
    def data(self) -> dict[str, np.ndarray]:
        return MODELS[self.model][1](self.samples)

    @property
    def order(self) -> replay.Order:
        if self.model == "memory":
            return replay.Order.explicit(self.streams)
        return replay.Order.shuffled(BATCH, EPOCHS, SEED, pad=self.pad)

    @property
    def streams(self) -> np.ndarray:
        """Ids `[steps, batch]` of eight streams: stream s reads windows 48 s, 48 s + 1, ..."""
        return np.arange(STEPS)[:, None] + STEPS * np.arange(BATCH)

    @property
    def sample_weights(self) -> np.ndarray | None:
        return np.linspace(0, 2, self.samples, dtype=np.float32) if self.weighted else None

    @property
    def key(self) -> jax.Array:
        return jax.random.key(SEED)

    def program(self) -> replay.Program:
        return _program(self.model, self.optimizer)

    def recorder(self, path: pathlib.Path, **options: Any) -> replay.Recorder:
        settings = {"checkpoints": 16, "self_test": False, "dispatch": self.dispatch}
        settings |= {"key": self.key, "sample_weights": self.sample_weights}
        return replay.Recorder(path, self.program(), self.data, self.order, **settings | options)
