"""Whatever is asked of a run is what an independent loop that kept everything would have found.

The loop (`truth`) knows only JAX, NumPy and optax: it trains by the definitions, keeps weights,
gradients, losses, per-sample gradients and the shares of updates as arrays, and NumPy answers.
"""

import concurrent.futures
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import tiny
from hypothesis import strategies as st
from optax import contrib
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import QueryError, reducing
from replay.query import states
from replay.replaying import Replayer, Rests
from replay.sample_gradients import SampleGradients
from replay.values import fused

TESTS = pathlib.Path(__file__).parent

# Another program, or another order of sums: a few units of float32, of the largest of an answer.
ROUNDING = 2e-5


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# ----------------------------------------------------------------------------------- the oracle


class Truth(NamedTuple):
    """Everything that happened, as NumPy arrays whose last axis runs over all weights.

    Attributes:
        sizes: path of each tensor -> shape.
        ids: `[steps, batch]`, -1 for padding.
        weights: `[steps + 1, weights]`.
        grads: `[steps, weights]`; likewise `updates`, `carried`.
        losses: `[steps, batch]`.
        sample_grads: `[steps, batch, weights]`; likewise `shares` of the updates.
        others: `[steps + 1, samples]`, the loss of every sample of the data at every state.
    """

    sizes: dict[str, tuple[int, ...]]
    ids: np.ndarray
    weights: np.ndarray
    grads: np.ndarray
    updates: np.ndarray
    carried: np.ndarray
    losses: np.ndarray
    sample_grads: np.ndarray
    shares: np.ndarray
    others: np.ndarray | None

    def __repr__(self):
        return f"the truth about {len(self.ids)} steps"

    def part(self, path):
        """Return which of all weights belong to a tensor."""
        sizes = [math.prod(shape) for shape in self.sizes.values()]
        ends = np.cumsum([0, *sizes])
        i = list(self.sizes).index(path)
        return slice(int(ends[i]), int(ends[i + 1]))

    def tensor_of(self):
        """Return the number of the tensor of each weight."""
        return np.repeat(np.arange(len(self.sizes)), [math.prod(s) for s in self.sizes.values()])

    def unit_of(self):
        """Return the number of the unit of each weight, counted through all tensors."""
        found, first = [], 0
        for shape in self.sizes.values():
            units = shape[-1] if shape else 1
            found.append(first + np.arange(math.prod(shape)) % units)
            first += units
        return np.concatenate(found)


def flat(tree):
    """Put all leaves one behind the other: `[..., weights]`."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


@functools.cache
def loop(losses_of, optimizer, size):
    """Return a step, what is looked at beside it, and losses at a state; compiled once for all."""
    optimizer = optax.with_extra_args_support(optimizer)

    def forward(params, model_state, batch, key, ids):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids.astype(jnp.uint32))
        return losses_of(params, model_state, batch, key, keys)

    def apply(params, opt_state, grads, value):
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def step(params, opt_state, model_state, batch, run_key, t, ids, weights):
        key = jax.random.fold_in(run_key, t)

        def total(params):
            losses, carry = forward(params, model_state, batch, key, ids)
            return jnp.sum(losses * weights) / size, (losses, carry)

        (value, (losses, carry)), grads = jax.value_and_grad(total, has_aux=True)(params)
        losses, grads, value, carry = jax.lax.optimization_barrier((losses, grads, value, carry))
        params, opt_state = apply(params, opt_state, grads, value)
        return losses, grads, value, params, opt_state, carry

    @jax.jit
    def looked_at(params, opt_state, model_state, batch, run_key, t, ids, grads, value):
        key = jax.random.fold_in(run_key, t)
        each = jax.jacrev(lambda p: forward(p, model_state, batch, key, ids)[0])(params)
        after, none = (
            apply(params, opt_state, g, value)[0]
            for g in (grads, jax.tree.map(jnp.zeros_like, grads))
        )
        return each, after, none

    @jax.jit
    def losses_at(params, model_state, batch, run_key, t, ids):
        return forward(params, model_state, batch, jax.random.fold_in(run_key, t), ids)[0]

    return step, looked_at, losses_at


def truth(init, losses_of, optimizer, data, ids, key, *, everywhere=False) -> Truth:
    """Train.

    Args:
        init: `init(key) -> params, model_state`.
        losses_of: `losses_of(params, model_state, batch, key, sample_keys) -> losses, model_state`.
        optimizer: of optax.
        data: dict of arrays.
        ids: `[steps, batch]`, -1 for padding.
        key: of the run.
        everywhere: whether to look at all samples at all states.
    """
    size = ids.shape[1]
    step, looked_at, losses_at = loop(losses_of, optimizer, size)
    params, model_state = jax.jit(init)(jax.random.fold_in(key, np.uint32(2**32 - 1)))
    opt_state = jax.jit(optimizer.init)(params)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    rows: dict[str, list[Any]] = {name: [] for name in Truth._fields[2:]}
    samples = len(jax.tree.leaves(data)[0])

    def look_everywhere(t):
        if not everywhere:
            return
        found = []
        for first in range(0, samples, size):
            mine = np.full(size, -1, np.int32)
            there = np.arange(first, min(first + size, samples))
            mine[: len(there)] = there
            batch = {name: rows[np.maximum(mine, 0)] for name, rows in data.items()}
            found.append(
                losses_at(params, model_state, batch, key, np.uint32(t), mine)[: len(there)]
            )
        rows["others"].append(np.concatenate(found))

    for t in range(len(ids)):
        weights = (ids[t] >= 0).astype(np.float32)
        batch = {name: values[np.maximum(ids[t], 0)] for name, values in data.items()}
        now = (batch, key, np.uint32(t), ids[t])
        rows["weights"].append(flat(params))
        look_everywhere(t)
        losses, grads, value, after, opt_after, carry = step(
            params, opt_state, model_state, *now, weights
        )
        each, moved, carried = looked_at(params, opt_state, model_state, *now, grads, value)
        each = np.concatenate([np.asarray(x).reshape(size, -1) for x in jax.tree.leaves(each)], 1)
        each = np.where(ids[t][:, None] < 0, 0, each)
        g, before = flat(grads), flat(params)
        given = (flat(moved) - before) - (flat(carried) - before)
        share = np.where(g == 0, 0, given / np.where(g == 0, 1, g))
        rows["losses"].append(np.asarray(losses))
        rows["grads"].append(g)
        rows["updates"].append(flat(after) - before)
        rows["carried"].append(flat(carried) - before)
        rows["sample_grads"].append(each)
        rows["shares"].append(share * (weights / size)[:, None] * each)
        params, opt_state, model_state = after, opt_after, carry
    rows["weights"].append(flat(params))
    look_everywhere(len(ids))
    arrays = {name: np.stack(values) if values else None for name, values in rows.items()}
    return Truth(sizes, ids, **arrays)  # type: ignore[arg-type]


@functools.cache
def separate(loss):
    """Give a loss of one sample the form that the oracle takes."""

    def losses_of(params, model_state, batch, key, sample_keys):
        return jax.vmap(lambda example, key: loss(params, example, key))(
            batch, sample_keys
        ), model_state

    return losses_of


# ------------------------------------------------------------------------------- the comparison


def values(result):
    """Return an answer as one array, its tensors one behind the other on the last axis."""
    if "value" in result.data_vars:
        return result["value"].values
    names = [name for name in result.data_vars if "field" not in result[name].attrs]
    parts = []
    for name in names:
        array = result[name]
        own = [array.sizes[d] for d in array.dims if str(d).startswith(f"{name}:")]
        lead = array.shape[: array.ndim - len(own)]
        parts.append(array.values.reshape(*lead, math.prod(own)))
    return np.concatenate(parts, -1)


def field(result, name):
    """Return what a ranking says besides, laid out as `values`."""
    if name in result.coords:
        return result[name].values
    names = [v for v in result.data_vars if result[v].attrs.get("field") == name]
    parts = []
    for each in names:
        array, tensor = result[each], result[each].attrs["tensor"]
        own = [dim for dim in array.dims if str(dim).startswith(f"{tensor}:")]
        parts.append(array.values.reshape(*array.shape[: array.ndim - len(own)], -1))
    return np.concatenate(parts, -1)


def close(found, expected, rtol=ROUNDING, scale=None):
    """Compare within the rounding of float32, absolute errors in units of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    scale = finite.max(initial=0) if scale is None else scale
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * float(scale))


def same(found, expected):
    """Compare bits."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def largest(x, k):
    """Return the k largest along the first axis, descending."""
    return -np.sort(-x, axis=0)[:k]


# ------------------------------------------------------------------------------------- the runs


class Recorded(NamedTuple):
    """A run, and what it has to answer."""

    run: replay.Run
    truth: Truth
    labels: np.ndarray

    def __repr__(self):
        return repr(self.run)


MOMENTUM = optax.sgd(0.05, momentum=0.9)


def tiny_truth(order=tiny.ORDER, *, loss=tiny.loss, optimizer=None, data=tiny.DATA, **options):
    optimizer = optimizer or MOMENTUM
    ids = order.bind(len(data["y"]))[:]
    weights = jax.tree.map(jnp.asarray, tiny.WEIGHTS)
    return truth(
        lambda key: (weights, ()), separate(loss), optimizer, data, ids, tiny.KEY, **options
    )


LABELS = np.arange(tiny.SAMPLES) % 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny run of 24 steps in 6 epochs, stored at 0, 8, 16, 24."""
    run = tiny.record(tmp_path_factory.mktemp("small") / "run")
    return Recorded(run, tiny_truth(everywhere=True), LABELS)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Batches of 4 out of 14 samples: the last batch of each epoch has two."""
    data = {name: rows[:14] for name, rows in tiny.DATA.items()}
    order = replay.Order.shuffled(batch_size=4, epochs=3, seed=2, pad=True)
    run = tiny.record(tmp_path_factory.mktemp("padded") / "run", data=data, order=order)
    return Recorded(run, tiny_truth(order, data=data), LABELS[:14])


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """200 steps, stored every 20."""
    order = replay.Order.shuffled(batch_size=4, epochs=50, seed=3)
    path = tmp_path_factory.mktemp("long") / "run"
    run = tiny.record(path, order=order, checkpoints=20)
    assert run.steps == 200
    return Recorded(run, tiny_truth(order), LABELS)


def plain_convolution(params, example, key):
    """Convolve by hand: an image of one channel, two kinds of kernels, a mean, a layer."""
    x = example["x"][None, None]
    x = jax.lax.conv(x, params["kernel"], (1, 1), "SAME") + params["bias"][None, :, None, None]
    x = jnp.tanh(x).mean(axis=(0, 2, 3)) + 0.01 * jax.random.normal(key, (4,))
    return models.cross_entropy(x @ params["out"], example["y"])


def convolution_init(key):
    first, second = jax.random.split(key)
    return {
        "kernel": 0.5 * jax.random.normal(first, (4, 1, 3, 3)),
        "bias": jnp.zeros(4),
        "out": jax.random.normal(second, (4, 10)),
    }


def normalised(params, model_state, batch, key, sample_keys):
    """Batch norm by flax, as `models.convolution` has it."""
    outputs, model_state = models._Convolution().apply(
        {"params": params, **model_state}, batch["x"][..., None], train=True,
        mutable=list(model_state), rngs={},
    )  # fmt: skip
    return models.cross_entropy(outputs, batch["y"]), model_state


KINDS = ("dense", "convolution", "batch_norm", "lstm", "transformer")
BY_DEFAULT = ("dense",)
STEPS, EVERY, SAMPLES, SIZE = 8, 4, 16, 4


def kind_of(name):
    """Return `program, init, losses_of, optimizer, data` of a model."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    if name == "convolution":
        program = replay.Program(convolution_init, plain_convolution, optimizer)
        data, losses_of = models.digits(SAMPLES), separate(plain_convolution)
        return program, lambda key: (convolution_init(key), ()), losses_of, optimizer, data
    build, data = models.MODELS["convolution" if name == "batch_norm" else name]
    program = build(optimizer)

    def init(key):
        state = program.init(key)
        return state.params, state.model_state

    losses_of = normalised if name == "batch_norm" else separate(program.sample_loss)
    return program, init, losses_of, optimizer, data(SAMPLES)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Return a function that records a model of each kind, once."""
    known = {}

    def recorded(name):
        if name not in known:
            program, init, losses_of, optimizer, data = kind_of(name)
            order = replay.Order.shuffled(SIZE, STEPS * SIZE // SAMPLES, models.SEED)
            key = jax.random.key(models.SEED)
            path = tmp_path_factory.mktemp(name) / "run"
            with replay.Recorder(
                path, program, data, order, key=key, checkpoints=EVERY, self_test=False
            ) as recorder:
                recorder.advance()
            ids = order.bind(SAMPLES)[:]
            labels = data["y"] if "y" in data else np.arange(SAMPLES) % 4
            expected = truth(init, losses_of, optimizer, data, ids, key)
            known[name] = Recorded(replay.open(path), expected, labels)
        return known[name]

    return recorded


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(params=[kind if kind in BY_DEFAULT else full(kind) for kind in KINDS])
def asked(request, kinds):
    return kinds(request.param)


# ------------------------------------------------------------------ the five questions of a run


def test_what_moved_is_bit_for_bit_what_the_loop_saw(asked):
    run, expected, _ = asked
    found = replay.compute(run.weights, run.grads, run.updates, run.sample_losses, run.samples)
    assert tuple(run.weights.tensors) == tuple(expected.sizes)
    for answer, wanted in zip(
        found,
        (expected.weights, expected.grads, expected.updates, expected.losses, expected.ids),
        strict=True,
    ):
        same(values(answer), wanted)
    assert [answer.attrs["grade"] for answer in found] == ["BITWISE"] * 4 + ["LOGGED"]


def test_which_samples_changed_each_weight_most(asked):
    """Magnitudes, each sample's gradient alone; signed ones; and what was asked by batch."""
    run, expected, _ = asked
    first = STEPS // 2
    each = expected.sample_grads[first:].reshape(-1, expected.sample_grads.shape[-1])
    chosen = run.sample_grads.sel(epoch=1)
    by_size, signed, batches = replay.compute(
        abs(chosen).top_k(3, dim=("step", "position")),
        chosen.top_k(2, dim=("step", "position"), smallest=True),
        abs(run.grads.sel(epoch=1)).top_k(2, dim="step"),
    )
    scale = np.abs(each).max()
    close(values(by_size), largest(np.abs(each), 3), scale=scale)
    close(values(signed), np.sort(each, 0)[:2], scale=scale)
    same(values(batches), largest(np.abs(expected.grads[first:]), 2))
    # Where two are equal but for rounding either may come first, so places are looked up.
    steps, positions = field(by_size, "step"), field(by_size, "position")
    weights = np.arange(each.shape[1])[None]
    there = np.abs(expected.sample_grads[steps, positions, weights])
    close(there, largest(np.abs(each), 3), scale=scale)
    same(field(by_size, "sample"), expected.ids[steps, positions])


def test_which_classes_changed_each_weight_tensor_and_unit_most(asked):
    run, expected, labels = asked
    names = np.unique(labels)
    share = expected.shares[STEPS // 2 :]
    own = labels[expected.ids[STEPS // 2 :]]
    by_label = np.stack([np.abs(share[own == name]).sum(0) for name in names])
    signed = np.stack([share[own == name].sum(0) for name in names])
    chosen = run.sample_updates.sel(epoch=1)
    of_weights, all_signed, of_tensors, of_units = replay.compute(
        abs(chosen).groupby(labels).sum().top_k(2, dim="group"),
        chosen.groupby(labels).sum(),
        abs(chosen).groupby(labels).sum().groupby("tensor").sum("weight").top_k(2, dim="group"),
        abs(chosen).groupby(labels).sum().groupby("unit").sum("weight").top_k(1, dim="group"),
    )
    scale = np.abs(by_label).max()
    close(values(of_weights), largest(by_label, 2), scale=scale)
    close(values(all_signed), signed, scale=scale)
    close(values(of_tensors).T, largest(grouped(by_label, expected.tensor_of()), 2))
    close(values(of_units), largest(grouped(by_label, expected.unit_of()), 1))
    group = np.searchsorted(names, field(of_weights, "group"))
    close(by_label[group, np.arange(by_label.shape[1])], largest(by_label, 2), scale=scale)
    assert "(D(g) - D(0)) / g" in of_weights.attrs["rule"]


def grouped(x, key):
    """Add up the last axis by key."""
    return np.stack([x[..., key == k].sum(-1) for k in np.unique(key)], -1)


def test_which_weights_tensors_and_units_changed_most_during_training(asked):
    run, expected, _ = asked
    path = np.abs(expected.updates).sum(0)
    asked_for = abs(run.updates).sum("step")
    top, tensors, units, net = replay.compute(
        asked_for.top_k(20, dim="weight"),
        asked_for.by("tensor"),
        asked_for.by("unit"),
        run.updates.sum("step"),
    )
    close(values(top), largest(path, 20))
    places = [
        expected.part(str(tensor)).start + int(weight)
        for tensor, weight in zip(top["tensor"].values, top["weight"].values, strict=True)
    ]
    close(path[places], largest(path, 20))
    close(values(tensors), grouped(path, expected.tensor_of()))
    assert tensors["tensor"].values.tolist() == list(expected.sizes)
    close(values(units), grouped(path, expected.unit_of()))
    close(values(net), expected.weights[-1] - expected.weights[0], scale=path.max())


def test_the_last_samples_before_gradients_exploded(asked):
    run, expected, _ = asked
    sizes = np.abs(expected.grads).mean(1)
    limit = float(np.sort(sizes)[-2:].mean())  # only the largest lies above
    wanted = int(sizes.argmax())
    boom = (abs(run.grads).mean("weight") > limit).first("step")
    assert boom.compute().item() == wanted
    found = run.samples.before(boom, last=6).compute()
    flat_ids = expected.ids[:wanted].reshape(-1)[-6:]
    same(found["value"].values, flat_ids)
    found = run.samples.before(boom, last=6, inclusive=True).compute()
    same(found["value"].values, expected.ids[: wanted + 1].reshape(-1)[-6:])


def test_the_samples_that_led_a_weight_across_a_value_and_what_each_did_to_it(asked):
    run, expected, _ = asked
    path = next(iter(expected.sizes))
    of_tensor = expected.weights[:, expected.part(path)]
    weight = int((of_tensor[-1] - of_tensor[0]).argmax())
    series = of_tensor[:, weight]
    index = np.unravel_index(weight, expected.sizes[path])
    value = float((series[3] + series[4]) / 2)
    side = np.sign(series - np.float32(value))
    crossings = np.flatnonzero((side[:-1] != 0) & (side[1:] != side[:-1]))
    hit = run.weights[path, *map(int, index)].crosses(value).first("step")
    assert hit.compute().item() == crossings[0]
    shares = run.sample_updates[path, *map(int, index)]
    found = run.samples.before(hit, last=6, inclusive=True).join(share=shares).compute()
    stop = crossings[0] + 1
    assert found["sample"].values.tolist() == expected.ids[:stop].reshape(-1)[-6:].tolist()
    column = expected.shares[:, :, expected.part(path).start + weight]
    moved = np.abs(expected.updates[:, expected.part(path).start + weight]).max()
    close(found["share"].values, column[:stop].reshape(-1)[-6:], scale=moved)
    assert found["step"].values.tolist() == np.repeat(np.arange(stop), SIZE)[-6:].tolist()
    assert found["position"].values.tolist() == [2, 3, 0, 1, 2, 3]


def test_two_orders_are_compared_on_the_same_test_samples(small, tmp_path):
    order = tiny.ORDER.reversed(0)
    other = Recorded(
        tiny.record(tmp_path / "other", order=order), tiny_truth(order, everywhere=True), LABELS
    )
    each = [one.run.on(tiny.DATA).sample_losses for one in (small, other)]
    early, late, apart, progress = replay.compute(
        each[0].sel(state=20).mean(),
        each[1].sel(state=20).mean(),
        (small.run.weights - other.run.weights).norm("weight"),
        (each[0] - each[1]).mean("sample"),
    )
    close(early.item(), small.truth.others[20].mean())
    close(late.item(), other.truth.others[20].mean())
    difference = small.truth.weights - other.truth.weights
    close(values(apart), np.linalg.norm(difference, axis=1))
    assert values(apart)[0] == 0 and (values(apart)[1:] > 0).all()
    close(
        values(progress),
        (small.truth.others - other.truth.others).mean(1),
        scale=small.truth.others.max(),
    )


def test_weights_that_moved_alike_are_one_cluster(small):
    found = small.run.updates.cluster(3, windows=4)
    sums = small.truth.updates.reshape(4, 6, -1).sum(1)
    histories = ((sums - sums.mean(0)) / sums.std(0)).T
    labels = values(found[list(small.truth.sizes)])
    for cluster, centre in enumerate(found["centres"].values):
        np.testing.assert_allclose(centre, histories[labels == cluster].mean(0), atol=0.2)
    assert found["size"].values.tolist() == np.bincount(labels).tolist()


# -------------------------------------------------------------------- without the program's code


@pytest.mark.full
def test_a_fresh_process_without_the_code_answers_with_the_same_bits(kinds):
    source = f"""
import json, sys
sys.path[:0] = {[str(TESTS.parent)]}
for name in ("models", "tiny", "flax", "equinox"):
    sys.modules[name] = None
import numpy as np, replay

{inspect.getsource(several_questions)}
print(json.dumps([[np.asarray(v).tobytes().hex() for v in several_questions(replay.open(path))]
                  for path in json.load(sys.stdin)]))
"""
    runs = [kinds(name).run for name in BY_DEFAULT]
    done = subprocess.run(
        [sys.executable, "-I", "-c", source],
        env=dict(os.environ),
        input=json.dumps([run.path for run in runs]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for run, there in zip(runs, json.loads(done.stdout), strict=True):
        assert [np.asarray(x).tobytes().hex() for x in several_questions(run)] == there


def looked_into(path, fork):
    """Return bits of what states and gradients of every step are looked into for."""
    run, forked = replay.open(path), replay.open(fork)
    answers = [
        # Both are replayed side by side, by the same programs before the fork.
        abs(forked.updates - forked.parent.updates).sum("step").compute(),
        run.weights.sel(state=3).compute(),
        run.updates.norm("weight").compute(),
        run.sample_grads.sel(step=[2, 9]).norm("weight").compute(),
        replay.compare(run, run, states=[3]).distances,
    ]
    found = [x.values.tobytes().hex() for each in answers for x in each.data_vars.values()]
    norms = run.reduce(replay.reductions.Norm(), strategy="factored").answers[0]
    return found + [np.asarray(x).tobytes().hex() for x in jax.tree.leaves(norms)]


def test_a_process_with_another_thread_count_answers_with_the_same_bits(small, tmp_path):
    path, count = small.run.path, small.run.log.header.environment["threads"] + 1
    fork = str(tmp_path / "fork")
    small.run.fork(fork, at=small.run.steps // 2, key=jax.random.key(6))
    source = f"""
import sys
sys.path[:0] = {[str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent)]}
import test_query
print(*test_query.looked_into({path!r}, {fork!r}), sep=chr(10))
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "NPROC": str(count)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.splitlines() == looked_into(path, fork), done.stderr


def several_questions(run):
    results = replay.compute(
        abs(run.updates).sum("step"),
        run.weights.norm("weight"),
        abs(run.sample_grads.sel(epoch=1)).top_k(2, dim=("step", "position")),
        run.sample_updates.sum("position"),
        run.sample_losses.groupby("sample").mean(),
    )
    return [v.values for found in results for v in found.data_vars.values()]


# -------------------------------------------------------------------------------- brute force


class Brute(NamedTuple):
    """What a question stands for, all of it at hand.

    Attributes:
        dims: names of the axes.
        x: the values.
        axis: name -> labels of the entries of an axis: steps, states, or numbers of weights.
        truth: of the run.
    """

    dims: tuple[str, ...]
    x: np.ndarray
    axis: dict[str, np.ndarray]
    truth: Truth

    @property
    def walked(self):
        return next((dim for dim in self.dims if dim in ("step", "state")), "")

    def map(self, function):
        with np.errstate(all="ignore"):
            return self._replace(x=function(self.x))

    def sel(self, dim, wanted):
        """Choose entries by label; negative slices count from the end of those that there are."""
        known = self.axis[dim]
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(int(known[-1]) + 1 if len(known) else 0))
        places = np.flatnonzero(np.isin(known, wanted))
        return self._replace(
            x=np.take(self.x, places, self.dims.index(dim)),
            axis={**self.axis, dim: known[places]},
        )

    def diff(self, dim):
        place = self.dims.index(dim)
        x, known = np.diff(self.x, axis=place), self.axis[dim]
        if dim == "step":
            return self._replace(x=x, axis={**self.axis, "step": known[1:]})
        pairs = np.flatnonzero(np.diff(known) == 1)
        dims = tuple("step" if d == "state" else d for d in self.dims)
        axis = {name: v for name, v in self.axis.items() if name != "state"}
        return Brute(dims, np.take(x, pairs, place), {**axis, "step": known[pairs]}, self.truth)

    def key(self, kind):
        """Return the group of each element, -1 for none, in the shape of the values."""
        truth, size = self.truth, truth_size(self)
        if kind in ("labels", "sample"):
            ids = truth.ids[self.axis["step"]]
            key = ids if kind == "sample" else np.where(ids < 0, -1, LABELS[np.maximum(ids, 0)])
            over = ("step", "position")
        elif kind in ("tensor", "unit"):
            table = truth.tensor_of() if kind == "tensor" else truth.unit_of()
            key, over = table[self.axis["weight"]], ("weight",)
        else:
            steps = self.axis[self.walked]
            key, over = steps // (size if kind == "epoch" else WINDOW), (self.walked,)
        order = [dim for dim in self.dims if dim in over]
        shape = [n if dim in order else 1 for n, dim in zip(self.x.shape, self.dims, strict=True)]
        return np.broadcast_to(key.reshape(shape), self.x.shape)

    def reduce(self, how, over, by=None, **settings):
        """Return the answer, its axes in the order in which those of a query stand."""
        keep = [i for i, dim in enumerate(self.dims) if dim not in over]
        gone = [i for i, dim in enumerate(self.dims) if dim in over]
        arrange = lambda x: x.transpose([*keep, *gone]).reshape(  # noqa: E731
            *[x.shape[i] for i in keep], math.prod(x.shape[i] for i in gone)
        )
        valid = np.ones(self.x.shape, bool)
        if "position" in over:
            ids = self.truth.ids[self.axis["step"]] >= 0
            rest = [1] * (self.x.ndim - 2)
            valid = np.broadcast_to(ids.reshape(*ids.shape, *rest), self.x.shape)
        x, valid = arrange(self.x), arrange(valid)
        dims = tuple(self.dims[i] for i in keep)
        added = {"top_k": "rank", "hist": "bin", "quantile": "quantile"}.get(how)
        lead = [*dims, *([added] if added else [])]
        if by is None:
            found = each_row(how, x, valid, settings)
        else:
            key = arrange(self.key(by))
            names = np.arange(3) if by == "labels" else np.unique(key[key >= 0])
            names = np.arange(tiny.SAMPLES) if by == "sample" else names
            found = np.stack([each_row(how, x, valid & (key == k), settings) for k in names])
            lead = ["group" if by == "labels" else by, *lead]
        wanted = [d for d in PLACES if d in lead]
        axis = {dim: self.axis[dim] for dim in dims if dim in self.axis}
        found = found.transpose([lead.index(d) for d in wanted])
        return Brute(tuple(wanted), found, axis, self.truth)


WINDOW = 7
PLACES = (
    "epoch", "window", "step", "state", "position", "sample", "tensor", "group", "bin",
    "quantile", "rank", "unit", "weight",
)  # fmt: skip


def truth_size(brute):
    """Return how many steps an epoch has."""
    return math.ceil(tiny.SAMPLES / brute.truth.ids.shape[1])


def each_row(how, x, valid, settings):
    """Reduce the last axis of what is valid."""
    rows = math.prod(x.shape[:-1])
    pairs = zip(x.reshape(rows, x.shape[-1]), valid.reshape(rows, x.shape[-1]), strict=True)
    with np.errstate(all="ignore"):
        found = np.array([one_row(how, row[there], settings) for row, there in pairs])
    return found.reshape((*x.shape[:-1], *found.shape[1:]))


def one_row(how, x, settings):
    x = x.astype(np.float64) if x.dtype.kind == "f" else x
    ends = (-math.inf, math.inf) if x.dtype.kind == "f" else (-(2**31), 2**31 - 1)
    if how == "top_k":
        k, worst = settings["k"], math.inf if settings.get("smallest") else -math.inf
        found = np.sort(x) if settings.get("smallest") else -np.sort(-x)
        return np.concatenate([found, np.full(k, worst)])[:k]
    if how == "hist":
        edges = settings["edges"]
        return np.histogram(x, [-math.inf, *edges, math.inf])[0]
    if how == "quantile":
        return np.quantile(x, settings["q"]) if len(x) else np.full(len(settings["q"]), np.nan)
    return {
        "sum": lambda: x.sum(),
        "mean": lambda: x.mean() if len(x) else math.nan,
        "count": lambda: (~np.isnan(x)).sum(),
        "var": lambda: x.var(ddof=settings.get("ddof", 0)) if len(x) else math.nan,
        "std": lambda: x.std(ddof=settings.get("ddof", 0)) if len(x) else math.nan,
        "min": lambda: x.min(initial=ends[1]),
        "max": lambda: x.max(initial=ends[0]),
        "any": lambda: x.any(),
        "all": lambda: x.all(),
        "norm": lambda: np.sqrt(np.square(x).sum()),
    }[how]()


def brute(truth, quantity):
    x = {
        "weights": truth.weights, "grads": truth.grads, "updates": truth.updates,
        "sample_losses": truth.losses, "sample_grads": truth.sample_grads,
        "sample_updates": truth.shares,
    }[quantity]  # fmt: skip
    walked = "state" if quantity == "weights" else "step"
    dims = {1: (walked,), 2: (walked, "weight"), 3: (walked, "position", "weight")}[x.ndim]
    dims = ("step", "position") if quantity == "sample_losses" else dims
    axis = {walked: np.arange(len(x))}
    if "weight" in dims:
        axis["weight"] = np.arange(x.shape[-1])
    return Brute(dims, x, axis, truth)


def agrees(found, expected, tolerance=ROUNDING, scale=0.0):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if expected.dtype.kind in "bi":
        assert (found == expected).all()
        return
    finite = np.abs(expected[np.isfinite(expected)])
    atol = tolerance * float(max(scale, finite.max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=atol)


def subsets(dims):
    return [s for n in range(1, len(dims) + 1) for s in itertools.combinations(dims, n)]


REDUCTIONS = {
    "sum": {}, "mean": {}, "count": {}, "var": {"ddof": 1}, "std": {}, "min": {}, "max": {},
    "norm": {}, "top_k": {"k": 3}, "hist": {"edges": (-0.1, 0.0, 0.2)},
    "quantile": {"q": (0.0, 0.3, 1.0)},
}  # fmt: skip


def check_together(cases):
    """Ask all at once, and compare each with its brute force."""
    answers = replay.compute(*(question for question, *_ in cases.values()))
    for name, answer in zip(cases, answers, strict=True):
        _, expected, *tolerance = cases[name]
        try:
            agrees(values(answer), expected.x, *tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    ("which", "quantity"),
    [
        ("small", "sample_losses"),
        full("small", "grads"),
        ("padded", "sample_losses"),
        full("small", "weights"),
        full("small", "sample_grads"),
        full("padded", "sample_grads"),
    ],
)
def test_every_reduction_over_every_dimension_is_that_of_numpy(which, quantity, request):
    run, truth, _ = request.getfixturevalue(which)
    expected, question, cases = brute(truth, quantity), getattr(run, quantity), {}
    scale = np.abs(expected.x).max()
    for how, over in itertools.product(REDUCTIONS, subsets(expected.dims)):
        if which == "padded" and ("position" not in over or how not in ("mean", "top_k", "hist")):
            continue
        settings = REDUCTIONS[how]
        wanted = expected.reduce(how, over, **settings)
        if how == "quantile" and {"step", "state"} & set(over):
            continue  # of counts of bfloat16 values; see below
        if how in ("top_k", "hist", "quantile"):
            found = getattr(question, how)(*settings.values(), dim=over)
        else:
            found = getattr(question, how)(dim=over, **settings)
        cases[f"{how} over {over}"] = (found, wanted, ROUNDING, scale)
    check_together(cases)


@pytest.mark.parametrize("which", ["small", "padded"])
def test_quantiles_of_groups_within_a_step_are_exact(which, request):
    run, truth, labels = request.getfixturevalue(which)
    q, steps = (0.0, 0.3, 0.5, 1.0), range(5, 9)
    chosen = slice(steps.start, steps.stop)
    losses = run.sample_losses.sel(step=chosen).groupby(labels).quantile(q, dim="position")
    grads = run.sample_grads.sel(step=chosen, tensor="out").groupby(labels)
    grads = grads.quantile(q, dim=("position", "weight"))
    units = abs(run.grads.sel(step=chosen)).groupby("unit").quantile(q, dim="weight")
    each = run.sample_losses.sel(step=chosen).groupby("sample").quantile(q, dim="position")
    losses, grads, units, each = replay.compute(losses, grads, units, each, cache=False)

    def agrees_with(found, values):
        wanted = np.quantile(values, q) if len(values) else np.full(len(q), np.nan)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

    for place, step in enumerate(steps):
        ids, there = truth.ids[step], truth.ids[step] >= 0
        for name in range(3):
            mine = there & (labels[np.maximum(ids, 0)] == name)
            agrees_with(losses["value"].isel(step=place, group=name), truth.losses[step][mine])
            rows = truth.sample_grads[step][mine][:, tiny.WEIGHTS["hidden"].size :]  # of `out`
            agrees_with(grads["value"].isel(step=place, group=name), rows.ravel())
        for sample in range(len(labels)):
            agrees_with(each["value"].isel(step=place, sample=sample),
                        truth.losses[step][there & (ids == sample)])  # fmt: skip
        weights = np.abs(truth.grads[step][: tiny.WEIGHTS["hidden"].size]).reshape(3, 5)
        for unit in range(weights.shape[1]):
            agrees_with(units["hidden"].values[place, :, unit], weights[:, unit])


def test_quantiles_of_groups_are_exact_whatever_else_is_reduced(small):
    run, truth, labels = small
    losses = run.on(tiny.DATA, name="all").sample_losses.sel(state=slice(0, run.steps))
    means = losses.groupby("epoch").mean("state")
    found = means.groupby(labels).quantile(0.5, dim=("epoch", "sample")).compute()
    epochs = means.compute()["value"].transpose("epoch", "sample").values
    norms = run.sample_grads.groupby("unit").norm("weight")
    of_units = norms.groupby(labels).quantile(0.5, dim=("position", "unit")).compute()
    each = norms.compute()
    for name in range(3):
        wanted = np.quantile(epochs[:, labels == name], 0.5)
        np.testing.assert_allclose(found["value"].values[name], wanted, rtol=1e-5)
        for step in range(run.steps):
            mine = labels[truth.ids[step]] == name
            both = np.concatenate([each[x].values[step][mine].ravel() for x in ("hidden", "out")])
            wanted = np.quantile(both, 0.5) if mine.any() else np.nan
            np.testing.assert_allclose(of_units["value"].values[step, name], wanted, rtol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 23, 24, 100, 1000])
@pytest.mark.parametrize("kept", [(), (3,), (2, 3)])
def test_truth_values_are_counted_in_tables_as_one_by_one(size, kept, monkeypatch):
    monkeypatch.setattr(states, "LANES", 4)
    monkeypatch.setattr(states, "_ROWS", 7)  # so that tables of long arrays are wider
    random = np.random.Generator(np.random.Philox(size))
    for share in (0.0, 0.02, 0.5, 1.0):
        truth = random.random((*kept, size)) < share
        count = np.asarray(states._count_true(jnp.asarray(truth)))
        assert count.dtype == np.uint32 and (count == truth.sum(-1)).all()
        assert (np.asarray(states._any_true(jnp.asarray(truth))) == truth.any(-1)).all()


def test_no_row_of_a_table_counts_beyond_sixteen_bits(monkeypatch):
    monkeypatch.setattr(states, "LANES", 1)
    for size in (2**16 - 1, 2**16, 2**17 + 1):
        assert int(states._count_true(jnp.ones(size, bool))) == size


@pytest.mark.parametrize("which", ["small", "padded"])
def test_quantiles_over_steps_are_within_one_part_in_128_of_a_value_that_is_there(which, request):
    run, truth, labels = request.getfixturevalue(which)
    q = (0.0, 0.25, 0.5, 0.9, 1.0)
    found = run.sample_losses.quantile(q).compute()
    assert found["quantile"].values.tolist() == list(q)
    there = np.sort(truth.losses[truth.ids >= 0])
    wanted = there[np.floor(np.array(q) * (len(there) - 1)).astype(int)]
    np.testing.assert_allclose(found["value"].values, wanted, rtol=1 / 128)
    by_label = run.sample_losses.groupby(labels).quantile(0.5, dim=("step", "position")).compute()
    for name in range(3):
        mine = np.sort(truth.losses[(truth.ids >= 0) & (labels[truth.ids] == name)])
        wanted = mine[(len(mine) - 1) // 2]
        np.testing.assert_allclose(by_label["value"].values[name], wanted, rtol=1 / 128)


@pytest.mark.parametrize("case", [
    "normal", "ties", "infinite", "zeros", "none valid", "NaN", "subnormal"
])  # fmt: skip
def test_quantiles_that_are_selected_are_those_of_the_sorted_array(case):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(3, 2, 101)).astype(np.float32)
    x = {
        "ties": np.round(x),
        "infinite": np.where(abs(x) > 1, np.inf * x, x),
        "zeros": np.where(abs(x) < 1, np.copysign(np.float32(0), x), x),
        "subnormal": (x.astype(np.float64) * 1e-40).astype(np.float32),
        "NaN": np.where(x == x[1].max(), np.float32(np.nan), x),
    }.get(case, x)
    valid = np.zeros(101, bool) if case == "none valid" else rng.random(101) < 0.8
    valid |= np.isnan(x).any((0, 1))
    q = (0.0, 0.1, 0.25, 0.5, 0.731, 0.999, 1.0)
    few = np.asarray(jax.jit(states.quantiles, static_argnums=2)(x, valid, q))
    many = np.asarray(jax.jit(states.quantiles, static_argnums=2)(x, valid, 3 * q))[..., : len(q)]
    assert few.shape == (3, 2, len(q))
    assert np.array_equal(few, many, equal_nan=True)
    assert np.isnan(few).all() == (case == "none valid")
    if case == "subnormal":  # without interpolation, which XLA makes zero of
        assert (abs(few) < 1e-38).all()
        assert (few[..., 0] == x[..., valid].min(-1)).all()
        assert (few[..., -1] == x[..., valid].max(-1)).all() and (few[..., -1] > 0).all()
    if case in ("normal", "ties", "zeros"):
        wanted = np.moveaxis(np.quantile(x[..., valid].astype(np.float64), q, axis=-1), 0, -1)
        np.testing.assert_allclose(few, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("which", "by"),
    [
        pair if pair == ("padded", "sample") else full(*pair)
        for pair in itertools.product(
            ("small", "padded"), ("labels", "sample", "tensor", "unit", "epoch", "window")
        )
        if pair != ("padded", "window")
    ],
)
def test_every_reduction_by_every_kind_of_group_is_that_of_numpy(which, by, request):
    run, truth, labels = request.getfixturevalue(which)
    cases = {}
    over_of = {
        "labels": [("step", "position"), ("position",), ("step", "position", "weight")],
        "sample": [("step", "position"), ("step", "position", "weight")],
        "tensor": [("weight",), ("step", "weight"), ("position", "weight")],
        "unit": [("weight",), ("step", "weight"), ("step", "position", "weight")],
        "epoch": [("step",), ("step", "position"), ("step", "position", "weight")],
        "window": [("step",), ("step", "weight")],
    }
    expected = brute(truth, "sample_grads")
    scale = np.abs(expected.x).max()
    for over, how in itertools.product(over_of[by], ("sum", "mean", "var", "max", "top_k", "hist")):
        if which == "padded" and ("position" not in over or how == "hist"):
            continue
        if by == "sample" and how == "hist":
            continue
        question = run.sample_grads
        groups = (
            question.coarsen(step=WINDOW)
            if by == "window"
            else question.groupby(labels if by == "labels" else by)
        )
        settings = {"var": {}}.get(how, REDUCTIONS[how])
        found = getattr(groups, how)(*settings.values(), dim=over)
        wanted = expected.reduce(how, over, by, **settings)
        if which == "padded" and by == "sample":
            wanted = wanted._replace(x=wanted.x[:14])
        cases[f"{how} over {over} by {by}"] = (found, wanted, ROUNDING, scale)
    check_together(cases)


def test_any_and_all_and_the_first_and_last_step_at_which_something_holds(small):
    run, truth, _ = small
    holds, loud = np.abs(truth.grads) > 0.5, truth.losses > 2
    asked = abs(run.grads) > 0.5
    first, last, one, every, loudest, never, quiet = replay.compute(
        asked.first("step"), asked.last("step"), asked.any("weight"), asked.all("weight"),
        (run.sample_losses > 2).any(), (abs(run.grads) > 1e9).any("weight").first("step"),
        (run.sample_losses > -1).all("position"),
    )  # fmt: skip
    numbers = np.arange(24)[:, None]
    assert (values(first) == np.where(holds.any(0), holds.argmax(0), -1)).all()
    assert (values(last) == np.where(holds.any(0), (holds * numbers).max(0), -1)).all()
    assert (values(one) == holds.any(1)).all() and (values(every) == holds.all(1)).all()
    assert loudest.item() == loud.any() and never.item() == -1 and values(quiet).all()


def test_what_stops_early_waits_for_every_weight_that_is_asked_about(small):
    run, truth, _ = small
    both = (run.weights.sel(tensor=["hidden", "out"]) > -9).first("state")
    assert (values(both.compute()) == 0).all()
    series = {path: truth.weights[:, truth.part(path).start + 1] for path in truth.sizes}
    limit = max(series["hidden"].min(), series["out"].min()) + np.float32(0.01)
    chosen = [run.weights["hidden", 0, 1], run.weights["out", 1]]
    for one, path in zip(chosen, truth.sizes, strict=True):
        found = (one < float(limit)).first("state").compute()
        below = series[path] < limit
        assert found[path].item() == (below.argmax() if below.any() else -1)


def test_rankings_tell_where_their_entries_stand(small):
    run, truth, _ = small
    size = abs(run.sample_grads)
    within, everywhere, weights = replay.compute(
        size.top_k(2, dim="position"),
        size.top_k(5),
        abs(run.updates).sum("step").top_k(4, dim="weight"),
    )
    x = np.abs(truth.sample_grads)
    position = field(within, "position")
    expected = np.take_along_axis(x, position, 1)
    close(values(within), expected)
    close(expected, -np.sort(-x, 1)[:, :2])
    same(field(within, "sample"), np.take_along_axis(truth.ids[:, :, None], position, 1))
    places = [everywhere[name].values for name in ("step", "position", "tensor", "weight")]
    for value, step, place, tensor, weight in zip(values(everywhere), *places, strict=True):
        close(value, x[step, place, truth.part(str(tensor))][weight])
    close(values(everywhere), -np.sort(-x.reshape(-1))[:5])
    one, two = weights.sel(rank=0) if "rank" in weights.coords else weights.isel(rank=0), weights
    assert float(one["value"]) == two["value"].values[0]
    picked = abs(run.updates).sum("step").top_k(4, dim="weight").sel(rank=1).compute()
    assert picked["value"].item() == two["value"].values[1]
    assert picked["weight"].item() == two["weight"].values[1]


def test_of_equal_entries_the_earlier_comes_first(small):
    found = (small.run.samples * 0).top_k(6).compute()
    assert found["step"].values.tolist() == [0, 0, 0, 0, 1, 1]
    assert found["position"].values.tolist() == [0, 1, 2, 3, 0, 1]
    found = (abs(small.run.grads) * 0.0).top_k(3, dim="weight").compute()
    assert found["weight"].values.tolist() == [[0, 1, 2]] * 24


# ------------------------------------------------------------------------------------ selecting


def test_steps_states_and_epochs_are_chosen_by_number_list_slice_and_from_the_end(small):
    run, truth, _ = small
    for chosen in (3, -1, [2, 5, 11], [-2, 0], slice(4, 9), slice(1, 20, 5), slice(-6, None),
                   slice(None, None, 7), slice(30, 40)):  # fmt: skip
        steps = np.sort(np.atleast_1d(np.arange(24)[chosen]))
        same(values(run.grads.sel(step=chosen).compute()), truth.grads[steps])
        same(values(run.updates.sel(step=chosen).compute()), truth.updates[steps])
        found = run.weights.diff("state").sel(step=chosen).compute()
        same(values(found), truth.updates[steps])
        assert found["step"].values.tolist() == steps.tolist()
        states = np.sort(np.atleast_1d(np.arange(25)[chosen]))
        same(values(run.weights.sel(state=chosen).compute()), truth.weights[states])
    same(values(run.grads.sel(epoch=2).compute()), truth.grads[8:12])
    found = run.grads.sel(epoch=[0, 3]).compute()
    same(values(found), truth.grads[[0, 1, 2, 3, 12, 13, 14, 15]])
    twice = run.grads.sel(epoch=[0, 3]).sel(step=slice(2, 14)).compute()
    assert twice["step"].values.tolist() == [2, 3, 12, 13]


def test_tensors_and_weights_are_chosen_by_path_pattern_index_and_slice(small):
    run, truth, _ = small
    hidden = truth.weights[:, truth.part("hidden")].reshape(-1, 3, 5)
    same(run.weights["hidden"].compute()["hidden"].values, hidden)
    assert run.weights.sel(tensor="h*").tensors == ("hidden",)
    assert run.weights.sel(tensor=["o*", "hidden"]).tensors == ("hidden", "out")
    same(run.weights["hidden", 1, 2].compute()["hidden"].values, hidden[:, 1, 2])
    same(run.weights["hidden", -1].compute()["hidden"].values, hidden[:, -1])
    same(values(run.weights["hidden", :2, 1:4].compute()), hidden[:, :2, 1:4].reshape(-1, 6))
    flat_hidden = hidden.reshape(-1, 15)
    same(values(run.weights["hidden"].sel(weight=[3, -1]).compute()), flat_hidden[:, [3, -1]])
    same(values(run.weights["hidden"].sel(weight=slice(2, 9, 3)).compute()), flat_hidden[:, 2:9:3])
    some = run.sample_grads["hidden", 1:, 2:].compute()
    each = truth.sample_grads[..., truth.part("hidden")].reshape(24, 4, 3, 5)
    close(values(some), each[:, :, 1:, 2:].reshape(24, 4, -1))
    ranked = abs(run.weights["hidden", 1:, 2:]).sel(state=9).max("state").top_k(2).compute()
    order = np.argsort(-np.abs(hidden[9, 1:, 2:].reshape(-1)))[:2]
    flat_index = np.arange(15).reshape(3, 5)[1:, 2:].reshape(-1)[order]
    assert ranked["weight"].values.tolist() == flat_index.tolist()


def test_only_some_samples_are_looked_at(small):
    run, truth, _ = small
    chosen = np.isin(truth.ids, [3, 7])
    mean, kept, by_step, norms, loud, none = replay.compute(
        run.sample_losses.sel(sample=[3, 7]).mean(),
        run.sample_losses.sel(sample=3),
        run.sample_losses.sel(sample=3).count("position"),
        run.sample_grads.sel(sample=[7, 3]).norm("weight").max(),
        (run.sample_losses > 0).sel(sample=3).sum(),
        run.sample_losses.sel(sample=99).count(),
    )
    close(mean.item(), truth.losses[chosen].mean())
    only = truth.ids == 3
    close(np.nan_to_num(values(kept)), np.where(only, truth.losses, 0))
    assert (np.isnan(values(kept)) == ~only).all()
    assert (values(by_step) == only.sum(1)).all()
    close(norms.item(), np.linalg.norm(truth.sample_grads, axis=-1)[chosen].max())
    assert loud.item() == (truth.losses[only] > 0).sum() and none.item() == 0
    close(run.samples.sel(sample=3).sum().compute().item(), 3.0 * only.sum())


def test_groups_have_only_the_samples_that_are_looked_at(small):
    run, truth, labels = small
    chosen = [0, 3, 7]
    sums, means, each = replay.compute(
        run.sample_losses.sel(sample=chosen).groupby(labels).sum(),
        run.sample_losses.sel(sample=chosen).groupby(labels).mean(),
        abs(run.sample_grads.sel(sample=chosen)).groupby("sample").max(),
    )
    mine = np.isin(truth.ids, chosen)
    for name in (0, 1):
        there = truth.losses[mine & (labels[truth.ids] == name)]
        close(values(sums)[name], there.sum())
        close(values(means)[name], there.mean())
    assert values(sums)[2] == 0 and np.isnan(values(means)[2])
    for sample in chosen:
        close(values(each)[sample], np.abs(truth.sample_grads[truth.ids == sample]).max(0))


# ------------------------------------------------------------ differences, crossings, what is taken


def test_differences_along_steps_and_states_and_of_differences(small):
    run, truth, _ = small
    moved = np.diff(truth.weights, axis=0)
    one, two, strided, of_states, mixed = replay.compute(
        run.grads.diff("step"),
        run.grads.diff("step").diff("step"),
        run.grads.sel(step=slice(0, 24, 4)).diff("step"),
        run.weights.diff("state").diff("step"),
        run.grads.sel(step=slice(0, 24, 4)).diff("step") + run.grads.diff("step"),
    )
    first = np.diff(truth.grads, axis=0)
    same(values(one), first)
    close(values(two), np.diff(first, axis=0), scale=np.abs(truth.grads).max())
    assert two["step"].values[0] == 2
    fourth = np.diff(truth.grads[::4], axis=0)
    same(values(strided), fourth)
    close(values(of_states), np.diff(moved, axis=0), scale=np.abs(moved).max())
    close(values(mixed), fourth + first[3::4], scale=np.abs(truth.grads).max())


def test_a_difference_of_states_from_a_constant_is_one_of_states(small):
    run, truth, _ = small
    mean = truth.weights.astype(np.float64).mean(0)
    centred = run.weights - run.weights.mean("state")
    close(values(centred.compute()), truth.weights - mean, scale=np.abs(truth.weights).max())
    found = values(centred.diff("state").compute())
    np.testing.assert_allclose(found, truth.updates, atol=1e-6)


def test_a_weight_crosses_a_value_at_every_step_that_takes_it_to_the_other_side_or_onto_it(small):
    run, truth, _ = small
    series = truth.weights[:, :15]
    value = float(series[7, 4])
    found = values(run.weights["hidden"].crosses(value).compute())
    side = np.sign(series - np.float32(value))
    expected = (side[:-1] != 0) & (side[1:] != side[:-1])
    assert expected[:, 4].any() and (found == expected).all()
    assert not found[7, 4]  # it leaves the value, which is not to cross it


@pytest.mark.parametrize("anchor", [0, 5, 23, "plan", "never"])
def test_what_stands_before_and_after_a_step(small, anchor):
    run, truth, _ = small
    at = anchor
    step: Any = anchor
    if isinstance(anchor, str):
        limit = 1e9 if anchor == "never" else float(np.sort(truth.losses.max(1))[-3])
        step = (run.sample_losses.max("position") >= limit).first("step")
        at = -1 if anchor == "never" else int((truth.losses.max(1) >= limit).argmax())
    for before, inclusive, last, first in itertools.product(
        (True, False), (True, False), (None, 6), (None, 3)
    ):
        if last is not None and first is not None:
            continue
        side = run.samples.before if before else run.samples.after
        found = side(step, last=last, first=first, inclusive=inclusive).compute()
        start, stop = (0, at + inclusive) if before else (at + (not inclusive), 24)
        expected = truth.ids[start:stop].reshape(-1) if at >= 0 else truth.ids[:0].reshape(-1)
        expected = expected[-last:] if last else expected[:first] if first else expected
        assert found["value"].values.tolist() == expected.tolist()
        assert ("empty" in found.attrs) == (not len(expected))


def test_what_was_taken_can_be_reduced_ranked_and_joined(small):
    run, truth, _ = small
    taken = run.sample_losses.before(10, last=9)
    mean, largest_update, joined = replay.compute(
        taken.mean(),
        abs(run.updates).top_k(2, dim="weight").before(4, last=3),
        run.sample_grads.norm("weight").after(20, first=2, inclusive=True),
    )
    close(mean.item(), truth.losses[:10].reshape(-1)[-9:].mean())
    moved = np.abs(truth.updates[1:4])
    same(values(largest_update), -np.sort(-moved, 1)[:, :2])
    assert largest_update["step"].values.tolist() == [1, 2, 3]
    close(values(joined), np.linalg.norm(truth.sample_grads[20, :2], axis=-1))
    beside = run.samples.before(6, last=5).join(
        loss=run.sample_losses,
        size=run.sample_grads.norm("weight"),
        step_size=run.grads.norm("weight"),
    )
    found = beside.compute()
    assert found["sample"].values.tolist() == truth.ids[:6].reshape(-1)[-5:].tolist()
    same(found["loss"].values, truth.losses[:6].reshape(-1)[-5:])
    close(found["size"].values, np.linalg.norm(truth.sample_grads[:6], axis=-1).reshape(-1)[-5:])
    close(found["step_size"].values, np.linalg.norm(truth.grads[[4, 5, 5, 5, 5]], axis=1))
    assert "replay" in beside.explain()
    together, whole = replay.compute(beside, run.sample_losses.mean())
    assert together.equals(found) and whole.item() == run.sample_losses.mean().compute().item()


@pytest.mark.parametrize("size", [1, 3, 16, 100, 1000])
@pytest.mark.parametrize("how", ["min", "max"])
def test_one_nan_anywhere_is_the_smallest_and_the_largest(how, size):
    reduction = states.reduction(how, {}, jnp.float32)

    @jax.jit
    def found(x):
        values = states.Values(
            x, jnp.ones(size, bool), jnp.arange(size, dtype=jnp.int32), jnp.int32(0)
        )
        return reduction.step(reduction.init((), x.dtype), values)

    x = np.random.Generator(np.random.Philox(1)).normal(size=size).astype(np.float32)
    assert found(x) == getattr(x, how)()
    for place in {0, size // 2, size - 1}:
        assert np.isnan(found(np.where(np.arange(size) == place, np.float32("nan"), x)))


def test_positions_without_a_sample_have_no_part_in_what_is_reduced_along_steps(padded):
    kept = padded.run.sample_losses.sel(step=[0, 1, 2, 4])
    close(values(kept.mean("step").compute()), padded.truth.losses[[0, 1, 2, 4]].mean(0))
    with pytest.raises(QueryError, match="position 2 holds no sample at step 3"):
        padded.run.sample_losses.mean("step").compute()


def test_columns_of_the_log_are_quantities_of_steps_whatever_is_chosen_of_them(small):
    run, truth, _ = small
    loss = truth.losses.mean(1)
    late = run.column("loss").sel(step=slice(5, 17))
    alone, scaled, both = replay.compute(late, late * run.grads.norm("weight"), late.mean())
    close(values(alone), loss[5:17])
    close(values(scaled), loss[5:17] * np.linalg.norm(truth.grads[5:17], axis=1))
    close(both.item(), loss[5:17].mean())
    assert alone.attrs["grade"] == "LOGGED"
    assert (run.samples == 3).sum().compute().item() == (truth.ids == 3).sum()


def test_what_the_log_answers_is_reduced_within_each_step(small):
    run, truth, labels = small
    each, by_label, none = replay.compute(
        (run.samples > 7).sum("position"),
        (run.samples >= 0).groupby(labels).sum("position"),
        (run.samples > 7).sel(step=slice(5, 5)).sum("position"),
    )
    assert (values(each) == (truth.ids > 7).sum(1)).all() and values(none).shape == (0,)
    wanted = np.stack([(labels[truth.ids] == name).sum(1) for name in range(3)], 1)
    assert (values(by_label) == wanted).all()


def test_dimensions_of_answers_can_be_renamed(small):
    run, truth, _ = small
    renamed = run.sample_losses.rename(position="place")
    assert renamed.dims == ("step", "place")
    same(renamed.compute()["value"].values, truth.losses)
    close(
        (abs(renamed - 1.0)).sum("step").compute()["value"].values, np.abs(truth.losses - 1).sum(0)
    )


def test_where_puts_another_number_and_functions_of_elements_are_those_of_numpy(small):
    run, truth, _ = small
    g, w = truth.grads, truth.weights
    kept, squares, clipped, either, mixed = replay.compute(
        run.grads.where(run.grads > 0, 0.0),
        np.sqrt(abs(run.grads)) + np.square(run.grads),
        run.grads.clip(-0.1, 0.1),
        ((run.grads > 0.1) | ~(run.grads > -0.1)).mean("weight"),
        (2 - run.weights) / 4 % 0.3,
    )
    same(values(kept), np.where(g > 0, g, np.float32(0)))
    close(values(squares), np.sqrt(np.abs(g)) + np.square(g))
    same(values(clipped), np.clip(g, np.float32(-0.1), np.float32(0.1)))
    close(values(either), ((g > 0.1) | ~(g > -0.1)).mean(1))
    close(values(mixed), np.mod((2 - w) / 4, 0.3), 1e-4)
    dot = run.grads.dot(run.updates, "weight").compute()
    close(values(dot), (truth.grads * truth.updates).sum(1))


def test_constants_of_equal_value_and_other_type_are_other_questions(small):
    run = small.run
    whole, real = (run.samples * 1).compute(), (run.column("loss") * 0.0 + 1).compute()
    assert values(whole).dtype == np.int32 and values(real).dtype == np.float32
    up, down = (1 / (run.grads * 0.0 + zero) for zero in (0.0, -0.0))
    assert (values((abs(run.grads) * 0.0 * 1 + 0.0).compute()) == 0).all()
    assert up.plan != down.plan


# ------------------------------------------------------------------------- shares of the update


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "clipped_adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "muon": contrib.muon(1e-2),
}


@pytest.mark.parametrize(
    "name", [name if name == "momentum" else full(name) for name in OPTIMIZERS]
)
def test_shares_carried_and_residual_updates_add_up_to_the_update(tmp_path, name):
    optimizer = OPTIMIZERS[name]
    program = replay.Program(tiny.WEIGHTS, tiny.loss, optimizer, name=name)
    run, expected = tiny.record(tmp_path / "run", program), tiny_truth(optimizer=optimizer)
    shares, carried, residual, updates, condition, ranked = replay.compute(
        run.sample_updates,
        run.carried_updates,
        run.residual_updates,
        run.updates,
        run.condition,
        abs(run.sample_updates).top_k(4, dim=("step", "position")),
    )
    moved = np.abs(expected.updates).max()
    same(values(updates), expected.updates)
    total = values(shares).sum(1) + values(carried) + values(residual)
    np.testing.assert_allclose(total, expected.updates, atol=ROUNDING * moved, rtol=0)
    # What is left over is rounding, of the weights as well, unless weights are mixed.
    close(values(carried), expected.carried, scale=np.abs(expected.weights).max() * 0.01)
    sound = expected_condition(expected) < 100
    np.testing.assert_allclose(
        np.where(sound[:, None], values(shares), 0),
        np.where(sound[:, None], expected.shares, 0),
        atol=1e-3 * moved,
        rtol=1e-3,
    )
    close(
        np.where(sound, values(condition), 0),
        np.where(sound, expected_condition(expected), 0),
        1e-3,
    )
    if name in ("sgd", "momentum"):
        np.testing.assert_allclose(
            values(shares), -0.05 * expected.sample_grads / 4, atol=1e-4 * moved, rtol=1e-3
        )
    allowed = np.where((values(condition) <= 1e3)[:, None], np.abs(values(shares)), -np.inf)
    close(values(ranked), largest(allowed.reshape(-1, allowed.shape[-1]), 4), scale=moved)


def expected_condition(truth):
    """Return the sum of magnitudes over the magnitude of the sum."""
    each = truth.sample_grads
    with np.errstate(all="ignore"):
        ratio = np.abs(each).sum(1) / np.abs(each.sum(1))
    return np.where((truth.grads == 0) | (truth.shares == 0).all(1), 0, ratio)


def test_rankings_of_shares_leave_out_weights_whose_samples_cancel(tmp_path):
    """Two samples of opposite gradients, equal but for the last places, in one batch."""
    data = {"slope": np.array([1 + 2**-12, -1, 0.5, 2], np.float32)}

    def loss(params, example, key):
        return example["slope"] * jnp.sum(params["w"])

    program = replay.Program({"w": np.ones(3, np.float32)}, loss, optax.sgd(1.0))
    order = replay.Order.explicit([[0, 1], [2, 3], [2, 2]])
    run = tiny.record(tmp_path / "run", program, data, order)
    condition = run.condition.compute()["w"].values
    assert (condition[0] > 1e3).all() and (condition[1:] <= 2).all()
    found = abs(run.sample_updates).top_k(6, dim=("step", "position")).compute()
    steps = found["w.step"].values[:, 0]
    assert 0 not in steps.tolist() and found["w.sample"].values[0, 0] == 3
    assert steps.tolist().count(-1) == 2 and (found["w.sample"].values[4:] == -1).all()


# ------------------------------------------------------------------------------- the same bits


def questions_of(run):
    return (
        abs(run.updates).sum("step"),
        run.weights.norm("weight"),
        run.weights.var("state"),
        abs(run.sample_grads).top_k(2, dim=("step", "position")),
        run.sample_grads.sel(step=slice(3, 180)).norm(("step", "position")),
        run.sample_updates.groupby(LABELS).sum(),
        run.sample_losses.groupby("epoch").mean(dim=("step", "position")),
        run.sample_losses.quantile([0.1, 0.9]),
        (abs(run.grads) > 0.3).sum(),
        run.grads.groupby("tensor").var("weight").mean("step"),
    )


def bits_of(result):
    return {
        name: (variable.dtype.name, variable.shape, variable.values.tobytes())
        for name, variable in result.variables.items()
    }


def test_an_answer_has_the_same_bits_alone_and_among_others(long):
    together = replay.compute(*questions_of(long.run))
    for found, question in zip(together, questions_of(long.run), strict=True):
        assert bits_of(question.compute()) == bits_of(found)


@pytest.mark.full
def test_several_processes_give_the_bits_of_one(long):
    alone = replay.compute(*questions_of(long.run))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        parted = replay.compute(*questions_of(long.run), executor=executor)
    assert parted[0].attrs["steps"] > alone[0].attrs["steps"]  # each went from a stored state
    for here, there in zip(alone, parted, strict=True):
        assert bits_of(here) == bits_of(there)
        # A process that stops between stored states has no digest to compare at its end.
        assert (here.attrs["grade"], there.attrs["grade"]) == ("BITWISE", "UNAUDITED")


def test_sums_over_steps_are_folded_in_aligned_blocks_of_64_and_joined_in_a_tree(long):
    run, truth, _ = long
    first, last = 10, 195
    found = values(abs(run.updates).sel(step=slice(first, last)).sum("step").compute())
    blocks = []
    for begin in range(0, 256, 64):
        total = np.zeros(truth.updates.shape[1], np.float32)
        for step in range(max(begin, first), min(begin + 64, last)):
            total = total + np.abs(truth.updates[step])
        blocks.append(total)
    same(found, (blocks[0] + blocks[1]) + (blocks[2] + blocks[3]))


# --------------------------------------------------------------------------- random expressions


ELEMENTS = {
    "abs": (abs, np.abs),
    "square": (np.square, np.square),
    "negative": (lambda x: -x, np.negative),
    "half": (lambda x: 0.5 * x, lambda x: np.float32(0.5) * x),
    "large": (lambda x: abs(x) > 0.4, lambda x: np.abs(x) > np.float32(0.4)),
}


@st.composite
def questions(draw):
    """Draw a quantity, choices, functions of elements, and one or two reductions, as data."""
    quantity = draw(
        st.sampled_from(["weights", "grads", "updates", "sample_losses", "sample_grads"])
    )
    dims = brute_dims(quantity)
    chain: list[tuple] = []
    if draw(st.booleans()):
        bounds = st.one_of(st.none(), st.integers(-30, 30))
        chosen = slice(draw(bounds), draw(bounds), draw(st.sampled_from([None, 1, 2, 5])))
        chain.append(("sel", dims[0], chosen))
    if dims[0] == "step" and draw(st.integers(0, 3)) == 0:
        chain.append(("epoch", draw(st.integers(0, 5))))
    if "weight" in dims and draw(st.integers(0, 2)) == 0:
        chain.append(("tensor", draw(st.sampled_from(["hidden", "out"]))))
    if draw(st.integers(0, 3)) == 0:
        chain.append(("diff", dims[0]))
        dims = ("step", *dims[1:])
    for name in draw(st.lists(st.sampled_from(list(ELEMENTS)), max_size=2)):
        chain.append(("map", name))
        if name == "large":
            break
    condition = chain and chain[-1] == ("map", "large")
    for _ in range(draw(st.integers(0, 2))):
        if not dims:
            break
        over = tuple(d for d in dims if draw(st.booleans())) or dims[:1]
        kinds = [None]
        if dims[0] == "step":
            kinds += ["epoch", "window"] if "step" in over else []
            kinds += ["labels"] if "position" in over and dims[0] == "step" else []
        if (
            "weight" in over
            and ("tensor", "hidden") not in chain
            and ("tensor", "out") not in chain
        ):
            kinds += ["tensor"]
        by = draw(st.sampled_from(kinds))
        hows = ["sum"] if condition else ["sum", "mean", "max", "min", "var", "norm", "count"]
        chain.append(("reduce", draw(st.sampled_from(hows)), over, by))
        if by is not None:
            break
        dims, condition = tuple(d for d in dims if d not in over), False
        if "position" in dims and "step" not in dims:
            break  # a position holds another sample at each step
    return quantity, chain


def brute_dims(quantity):
    return {
        "weights": ("state", "weight"), "sample_losses": ("step", "position"),
        "sample_grads": ("step", "position", "weight"),
    }.get(quantity, ("step", "weight"))  # fmt: skip


def both(recorded, quantity, chain):
    """Build the expression and its brute force side by side."""
    run, truth, labels = recorded
    question, expected = getattr(run, quantity), brute(truth, quantity)
    for kind, *what in chain:
        if kind == "sel":
            dim, chosen = what
            question, expected = question.sel(**{dim: chosen}), expected.sel(dim, chosen)
        elif kind == "epoch":
            question = question.sel(epoch=what[0])
            expected = expected.sel("step", np.arange(4 * what[0], 4 * what[0] + 4))
        elif kind == "tensor":
            question = question.sel(tensor=what[0])
            part = truth.part(what[0])
            expected = expected.sel("weight", np.arange(part.start, part.stop))
        elif kind == "diff":
            question, expected = question.diff(what[0]), expected.diff(what[0])
        elif kind == "map":
            ours, theirs = ELEMENTS[what[0]]
            question, expected = ours(question), expected.map(theirs)
        else:
            how, over, by = what
            hypothesis.assume(by is None or expected.x.size)
            groups = question
            if by == "window":
                groups = question.coarsen(step=WINDOW)
            elif by is not None:
                groups = question.groupby(labels if by == "labels" else by)
            question, expected = getattr(groups, how)(dim=over), expected.reduce(how, over, by)
    return question, expected


@hypothesis.settings(
    max_examples=10 if hypothesis.settings.default.max_examples < 100 else 300,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(questions())
def test_any_question_is_answered_as_numpy_answers_it_and_explained_before(small, drawn):
    question, expected = both(small, *drawn)
    told = question.explain()
    found = question.compute()
    scale = 1.0 if expected.x.dtype.kind == "f" else 0.0
    agrees(values(found), expected.x, 1e-4, scale)
    announced = sum(int(n.replace(",", "")) for n in re.findall(r"replay ([\d,]+) steps", told))
    assert found.attrs["steps"] == announced


def test_what_may_stop_early_or_waits_for_an_anchor_is_announced_by_an_upper_bound(small):
    run, truth, _ = small
    loud = (run.sample_losses.max("position") >= float(truth.losses[:14].max())).first("step")
    told, found = loud.explain(), loud.compute()
    # Somebody looks at every fourth step, while that is under way, for what was before it.
    assert "replay up to 24 steps" in told and found.attrs["steps"] < 24
    assert found.attrs["steps"] == 4 * math.ceil((found.item() + 1) / 4) + 1
    rare = (run.sample_losses.sel(step=slice(0, None, 5)).max("position") > 0).first("step")
    assert rare.compute(cache=False).attrs["steps"] == 1  # nobody asks about step 1
    assert found.attrs["grade"] == "UNAUDITED"  # it stopped before a digest could be compared
    taken = run.sample_updates.before(loud, last=4)
    told, found = taken.explain(), taken.compute()
    announced = sum(map(int, re.findall(r"replay up to (\d+) steps", told)))
    assert loud.compute().attrs["steps"] < found.attrs["steps"] <= announced


def test_what_is_asked_about_an_anchor_goes_on_from_a_state_near_it(tmp_path, monkeypatch):
    run = tiny.record(tmp_path / "run", checkpoints=tiny.STEPS)
    late = run.sample_losses.sel(step=slice(15, None)).max("position")
    loud = (late > 0).first("step")
    taken = run.sample_updates.before(loud, last=6, inclusive=True).join(loss=run.sample_losses)
    searched = loud.compute(cache=False).attrs["steps"]
    monkeypatch.setattr(Rests, "EVERY", 4)
    near = taken.compute(cache=False)
    monkeypatch.setattr(Rests, "EVERY", 10**6)
    far = taken.compute(cache=False)
    assert int(loud.compute(cache=False)) == 15
    assert near.attrs["steps"] <= searched + 6 < searched + 15 <= far.attrs["steps"]
    assert bits_of(near) == bits_of(far)
    assert near.attrs["grade"] == far.attrs["grade"] == "UNAUDITED"


def test_a_state_to_go_on_from_is_no_evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(Rests, "EVERY", 3)
    run, rests = tiny.record(tmp_path / "run"), Rests()
    for _ in run._replayer.steps(0, 17, rests=rests, rest=True):
        pass
    assert rests.nearest(8, 14)[0] == 12 and rests.nearest(5, 8) is None  # 6 made room
    steps = list(run._replayer.steps(14, 18, rests=rests))
    assert [step.closed for step in steps] == [8, 16, 16, 16]  # of state 12 there is no digest
    kept = [np.array(leaf) for leaf in rests.nearest(8, 14)[1]]
    assert tiny.bits(kept) == tiny.bits(run._replayer.state(12))
    kept[0][..., 0] += 1
    rests._kept = [(12, kept, rests._kept[-1][2])]
    with pytest.raises(replay.DivergenceError, match="between state 8 and the losses of step 12"):
        list(run._replayer.steps(12, 18, rests=rests))


def with_other_losses(run, step, monkeypatch):
    """Let the log of a run say that a step had other losses."""
    column = run.log.column

    def other(name, start, stop):
        found = column(name, start, stop)
        return (
            np.where(np.arange(start, stop) == step, ~found, found) if name == "witness" else found
        )

    monkeypatch.setattr(run.log, "column", other)


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_is_ahead_of_who_takes_no_more_steps_is_not_held_against_him(
    tmp_path, monkeypatch, overlaps
):
    monkeypatch.setattr(Rests, "EVERY", 3)
    run, rests = tiny.record(tmp_path / "run"), Rests()
    monkeypatch.setitem(run._replayer.__dict__, "overlaps", overlaps)
    with_other_losses(run, 13, monkeypatch)
    steps = run._replayer.steps(0, 20, late=True, rests=rests, rest=True)
    taken = [next(steps) for _ in range(15)]  # up to state 15; the next digest is that of 16
    assert taken[12].agrees()
    with pytest.raises(replay.DivergenceError, match="the losses of step 13"):
        taken[13].agrees()
    assert taken[12].agrees()  # also where it is known what comes after
    steps.close()
    assert {state for state, *_ in rests._kept} >= {12, 15}
    assert rests.nearest(8, 15) is None  # the last digest that agrees is that of state 8


def test_what_could_not_be_compared_does_not_agree(tmp_path, monkeypatch):
    run, rests = tiny.record(tmp_path / "run"), Rests()
    monkeypatch.setattr(Rests, "EVERY", 3)
    column = run.log.column

    def unreadable(name, start, stop):
        if name == "witness" and stop > 12:
            raise replay.LogError("unreadable", why="", fix="")
        return column(name, start, stop)

    monkeypatch.setattr(run.log, "column", unreadable)
    steps = run._replayer.steps(0, 20, late=True, rests=rests, rest=True)
    taken = [next(steps) for _ in range(14)]
    assert taken[11].agrees()  # of whom no later step concerns
    for _ in range(2):
        with pytest.raises(replay.LogError, match="unreadable"):
            taken[13].agrees()
    steps.close()
    assert rests.nearest(8, 12)[0] == 12
    with pytest.raises(replay.LogError, match="unreadable"):
        rests.nearest(8, 15)


def test_an_answer_that_stops_early_has_compared_the_losses_of_its_steps(small, monkeypatch):
    run, truth, _ = small
    run = replay.open(run.path)
    loud = (run.sample_losses.max("position") >= float(truth.losses[:14].max())).first("step")
    step = int(loud.compute(cache=False))
    with_other_losses(run, step, monkeypatch)
    with pytest.raises(replay.DivergenceError, match=f"the losses of step {step}"):
        loud.compute(cache=False)


@pytest.mark.parametrize("dispatch", ["step", "block"])
def test_gradients_are_the_same_with_and_without_the_states_before_them(tmp_path, dispatch):
    run = tiny.record(tmp_path / "run", dispatch=dispatch)
    expected = [step.grads for step in run.trajectory()]
    alone = run.grads.compute(cache=False)
    among, _ = replay.compute(run.grads, abs(run.weights).max(), cache=False)
    for name in ("hidden", "out"):
        truth = np.stack([np.asarray(grads[name]) for grads in expected])
        for found in (alone, among):
            assert np.asarray(found[name].values).tobytes() == truth.tobytes()


@pytest.mark.parametrize("dispatch", ["step", "block"])
@pytest.mark.parametrize("first", [0, 5])
def test_chosen_weights_are_the_same_where_no_step_keeps_its_state(tmp_path, dispatch, first):
    run = tiny.record(tmp_path / "run", dispatch=dispatch)
    weight = ("hidden", 1, 2)
    steps = slice(first, tiny.STEPS)
    questions = [
        run.weights[weight].sel(state=slice(first, tiny.STEPS + 1)),
        run.weights[weight].diff("state").sel(step=steps),
        run.updates[weight].sel(step=steps),
        abs(run.updates[weight]).sel(step=steps).max("step"),
        run.opt_state["0/trace/hidden", 1, 2].sel(state=slice(first, tiny.STEPS + 1)),
    ]
    keeps, engine = [], Replayer.engine

    def noted(self, step, *, keep, observed=None):
        keeps.append(keep)
        return engine(self, step, keep=keep, observed=observed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replayer, "engine", noted)
        few = [question.compute(cache=False) for question in questions]
    assert keeps and not any(keeps)
    whole = replay.compute(*questions, run.weights.max(), cache=False)  # which needs all of a state
    for one, other in zip(few, whole, strict=False):
        names = [name for name in one if name.endswith("hidden")]
        assert names
        for name in names:
            assert one[name].values.tobytes() == other[name].values.tobytes()
    states = np.stack([np.asarray(run.state(t).params["hidden"])[1, 2]
                       for t in range(first, tiny.STEPS + 1)])  # fmt: skip
    assert few[0]["hidden"].values.tobytes() == states.tobytes()


@pytest.mark.parametrize("dispatch", ["step", "block"])
def test_samples_have_the_same_gradients_where_no_step_keeps_its_state(
    tmp_path, dispatch, monkeypatch
):
    data = {name: rows[:14] for name, rows in tiny.DATA.items()}  # the last batch of each epoch
    order = replay.Order.shuffled(batch_size=4, epochs=4, seed=2, pad=True)  # has two samples
    run = tiny.record(tmp_path / "run", data=data, order=order, dispatch=dispatch)
    steps = slice(3, 13)
    questions = [
        abs(run.sample_grads.sel(step=steps)).top_k(2, dim=("step", "position")),
        run.sample_grads["hidden", 1, 2].sel(step=steps),
        run.sample_grads.sel(step=steps).groupby(LABELS[:14]).sum(),
        run.sample_grads.sel(step=steps).norm("weight").max("position"),
    ]
    keeps, threads, engine = [], set(), Replayer.engine

    def noted(self, step, *, keep, observed=None):
        keeps.append(keep)
        threads.add(threading.current_thread().name)
        return engine(self, step, keep=keep, observed=observed)

    monkeypatch.setattr(Replayer, "engine", noted)
    monkeypatch.setitem(run._replayer.__dict__, "overlaps", True)
    beside = replay.compute(*questions, cache=False)  # in a thread of its own, where all are kept
    assert any(keeps) and threads == {"replay-steps"}
    keeps.clear()
    threads.clear()
    monkeypatch.setitem(run._replayer.__dict__, "overlaps", False)
    alone = replay.compute(*questions, cache=False)
    assert keeps and not any(keeps) and threads == {threading.current_thread().name}
    whole = replay.compute(*questions, run.weights.max(), cache=False)  # which needs all of a state
    assert any(keeps)
    for one, *others in zip(alone, whole, beside, strict=False):
        assert [bits_of(one)] * 2 == [bits_of(other) for other in others]

    reductions = (replay.reductions.Sum("square"), replay.reductions.Norm())
    keeps.clear()
    free = run.reduce(*reductions, steps=steps, strategy="factored")
    assert keeps and not any(keeps)
    monkeypatch.setattr(SampleGradients, "beforehand", lambda self, way: None)
    kept = run.reduce(*reductions, steps=steps, strategy="factored")
    monkeypatch.setitem(run._replayer.__dict__, "overlaps", True)
    beside = run.reduce(*reductions, steps=steps, strategy="factored")
    for other in (kept, beside):
        assert tiny.bits(free.answers) == tiny.bits(other.answers) and free.gap == other.gap


@pytest.mark.parametrize(
    "change", [{"key": jax.random.key(6)}, {"optimizer": optax.sgd(0.01, momentum=0.9)}]
)
def test_a_fork_is_asked_about_samples_and_anchors_on_both_sides_of_its_beginning(
    tmp_path, monkeypatch, change
):
    monkeypatch.setattr(Rests, "EVERY", 4)
    parent = tiny.record(tmp_path / "run", checkpoints=tiny.STEPS)
    run = parent.fork(tmp_path / "fork", at=13, **change)
    for first in (10, 18):  # found before it begins, and after
        late = run.sample_losses.sel(step=slice(first, None)).max("position") > 0
        taken = run.samples.before(late.first("step"), last=6, inclusive=True)
        taken = taken.join(share=run.sample_updates, grads=run.sample_grads)
        near = taken.compute(cache=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rests, "EVERY", 10**6)
            far = taken.compute(cache=False)
        assert bits_of(near) == bits_of(far) and near.attrs["steps"] < far.attrs["steps"]
    alone = run.sample_grads.norm("weight").compute(cache=False)
    whole, _ = replay.compute(run.sample_grads.norm("weight"), run.weights.max(), cache=False)
    assert bits_of(alone) == bits_of(whole)


def test_only_what_rounds_in_one_way_shares_an_executable(small):
    run, *_ = small
    fixed = abs(run.grads - 0.5) > 0.1
    rounds = run.grads * 3 + 0.5 > 0.1
    assert fused(fixed.plan)[1].fixed and not fused(rounds.plan)[1].fixed
    alone = [run.grads[name] for name in run.grads.tensors]
    for of in (lambda g: (abs(g - 0.5) > 0.1).mean("weight"), lambda g: (g > 0).sum("weight"),
               lambda g: (abs(g) > 1e-3).groupby("tensor").mean("weight")):  # fmt: skip
        together = of(run.grads).compute(cache=False)["value"].values
        each = [of(one).compute(cache=False)["value"].values for one in alone]
        if together.ndim == 2:  # by tensor
            assert together.tobytes() == np.concatenate(each, -1).tobytes()
        elif together.dtype.kind == "i":
            assert (together == np.sum(each, axis=0)).all()
        else:
            truth = [
                np.concatenate(
                    [
                        np.abs(np.asarray(g) - np.float32(0.5)).ravel() > 0.1
                        for g in jax.tree.leaves(s.grads)
                    ]
                )
                for s in run.trajectory()
            ]
            assert (together == np.float32([t.sum() / np.float32(t.size) for t in truth])).all()


def test_a_share_is_divided_even_where_its_executable_knows_the_divisor(small):
    run, *_ = small
    node = (run.grads > 0).mean("weight").plan
    shapes, dims = reducing.layouts(node)
    formula = fused(node.child)[1]
    read = reducing._read_once(reducing.kind_of(node), formula, tuple(shapes), dims, np.dtype(bool))
    sizes = [part.size for part in node.child.parts]
    total = sum(sizes)
    for count in range(total + 1):
        flat = np.where(np.arange(total) < count, 1.0, -1.0).astype(np.float32)
        parts = [[x] for x in np.split(flat, np.cumsum(sizes)[:-1])]
        (share,), _ = read(parts, np.int32(0), None, None)
        assert share == np.float32(count) / np.float32(total)


@pytest.mark.parametrize("dispatch", ["step", "block"])
def test_losses_of_samples_are_the_same_by_step_and_by_block(tmp_path, dispatch):
    run = tiny.record(tmp_path / "run", dispatch=dispatch)
    truth = np.stack([np.asarray(step.losses) for step in run.trajectory()])
    found = run.sample_losses.compute(cache=False)["value"].values
    assert found.astype(np.float32).tobytes() == truth.tobytes()


def test_shares_of_truth_values_are_those_of_their_groups(tmp_path):
    run = tiny.record(tmp_path / "run")
    labels = np.arange(tiny.SAMPLES) % 5  # as many groups as weights
    above = (run.sample_grads["out"] > 0).groupby(labels).mean(("step", "position"))
    found = above.compute(cache=False)["out"].values.reshape(5, 5)
    grad = jax.vmap(jax.grad(tiny.loss), (None, 0, 0))
    counts, totals = np.zeros(5), np.zeros((5, 5))
    for step in run.trajectory():
        grads = np.asarray(grad(step.state.params, step.batch, step.keys[1])["out"])
        for label, row in zip(labels[np.asarray(step.ids)], grads.reshape(-1, 5), strict=True):
            counts[label] += 1
            totals[label] += row > 0
    expected = (totals / counts[:, None]).astype(np.float32)
    assert len(np.unique(counts)) > 1 and np.abs(found - expected).max() < 1e-6


def test_explaining_names_segments_tensors_and_what_the_log_answers_alone(small):
    run = small.run
    told = run.sample_grads.sel(step=slice(9, 12)).max().explain()
    assert re.search(r"replay 4 steps of .* \(states 8 to 12\): 1 of 3 segments", told)
    assert re.search(r"hidden +factored", told) and "memory limit 1,024 MiB" in told
    assert "nothing is replayed" in run.samples.max().explain()
    several = run.asking.explain(run.weights.sel(state=8), run.weights.sel(state=10))
    assert "question 2" in several and "replay 2 steps" in several


# ---------------------------------------------------------------------------------------- edges


def test_padding_is_no_sample(padded):
    run, truth, labels = padded
    there = truth.ids >= 0
    assert (~there).sum() == 6
    mean, count, top, taken, by_sample, by_label = replay.compute(
        run.sample_losses.mean(),
        run.sample_losses.count("position"),
        run.sample_losses.top_k(50),
        run.samples.before(5, last=7),
        run.sample_losses.groupby("sample").count(),
        run.sample_grads.groupby(labels).mean(),
    )
    close(mean.item(), truth.losses[there].mean())
    assert (values(count) == there.sum(1)).all()
    real = -np.sort(-truth.losses[there])
    close(values(top)[: len(real)], real)
    assert (top["sample"].values[len(real) :] == -1).all()
    expected = truth.ids[:5].reshape(-1)
    assert taken["value"].values.tolist() == expected[expected >= 0][-7:].tolist()
    assert values(by_sample).tolist() == [3] * 14
    own = labels[np.maximum(truth.ids, 0)]
    means = [truth.sample_grads[there & (own == k)].mean(0) for k in range(3)]
    close(values(by_label), np.stack(means), scale=np.abs(truth.sample_grads).max())


def test_a_sample_that_occurs_twice_in_a_batch_stays_two_rows(tmp_path):
    order = replay.Order.explicit([[3, 3, 5, 1], [1, 3, 3, 3]])
    run, truth = tiny.record(tmp_path / "run", order=order), tiny_truth(order)
    losses, per_sample, counts, three = replay.compute(
        run.sample_losses,
        run.sample_losses.groupby("sample").sum(),
        run.sample_losses.groupby("sample").count(),
        run.sample_grads.sel(sample=3).norm(("step", "position")),
    )
    same(values(losses), truth.losses)
    assert values(counts)[[1, 3, 5]].tolist() == [2, 5, 1] and values(counts).sum() == 8
    close(values(per_sample)[3], truth.losses[truth.ids == 3].sum())
    close(values(three), np.sqrt(np.square(truth.sample_grads[truth.ids == 3]).sum(0)))


def test_a_run_of_one_step_answers(tmp_path):
    order = replay.Order.explicit([[0, 1, 2, 3]])
    run, truth = tiny.record(tmp_path / "run", order=order), tiny_truth(order)
    same(values(run.updates.compute()), truth.updates)
    same(values(run.weights.compute()), truth.weights)
    assert values(run.grads.diff("step").compute()).shape == (0, 20)
    close(run.sample_losses.mean().compute().item(), truth.losses.mean())
    assert run.samples.before(0).compute()["value"].size == 0


def test_of_no_step_there_are_empty_answers_and_those_of_nothing(small):
    nothing = small.run.grads.sel(step=slice(5, 5))
    whole, total, mean, norm, top, epochs, steps = replay.compute(
        nothing, nothing.sum(), nothing.mean(), nothing.norm("weight"),
        abs(nothing).top_k(2, dim="step"), nothing.groupby("epoch").sum("step"),
        nothing.count("step"),
    )  # fmt: skip
    assert values(whole).shape == (0, 20) and values(norm).shape == (0,)
    assert total.item() == 0 and math.isnan(mean.item())
    assert (field(top, "step") == -1).all() and (values(steps) == 0).all()
    assert epochs.sizes["epoch"] == 0 and total.attrs["steps"] == 0
    assert "replay 0 steps" in nothing.sum().explain()


def test_an_anchor_that_never_happens_gives_an_empty_answer_that_says_so(small):
    never = (abs(small.run.grads) > 1e9).any("weight").first("step")
    found = small.run.samples.before(never, last=5).join(loss=small.run.sample_losses).compute()
    assert found.sizes["occurrence"] == 0 and "never happens" in found.attrs["empty"]
    assert small.run.grads.after(never).compute().sizes["occurrence"] == 0


@pytest.fixture(scope="module")
def exploding(tmp_path_factory):
    """At step 2 a loss is infinite, and what follows is not a number."""
    data = {"x": tiny.DATA["x"], "y": tiny.DATA["y"].copy()}
    data["y"][9] = np.inf
    order = replay.Order.explicit([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]])
    with pytest.warns(RuntimeWarning, match="recording goes on"):
        run = tiny.record(tmp_path_factory.mktemp("exploding") / "run", data=data, order=order)
    with np.errstate(all="ignore"):
        return Recorded(run, tiny_truth(order, data=data), LABELS)


def test_what_is_not_finite_is_found_counted_and_ranked_first(exploding):
    run, truth, _ = exploding
    grads, each = truth.grads, truth.sample_grads
    assert np.isnan(grads[3]).all() and not np.isfinite(grads[2]).all()
    boom, total, largest_loss, count, bins, top, peak, early, all_bins = replay.compute(
        (~(abs(run.grads) <= 1024)).any("weight").first("step"),
        run.grads.sum("weight"),
        run.sample_losses.max("position"),
        run.grads.count("weight"),
        abs(run.grads).hist([1e3], dim="weight"),
        abs(run.grads).top_k(1, dim="step"),
        abs(run.sample_grads).max(("step", "position")),
        abs(run.sample_grads.sel(step=slice(0, 2))).max(("step", "position")),
        abs(run.sample_grads).hist([1e3]),
    )
    assert boom.item() == 2
    assert np.isfinite(values(total)[:2]).all() and np.isnan(values(total)[3])
    assert values(largest_loss)[2] == np.inf and np.isnan(values(largest_loss)[3])
    assert values(count).tolist() == (~np.isnan(grads)).sum(1).tolist()
    assert values(bins)[3].tolist() == [0, 20]
    assert np.isnan(values(top)).all() and set(field(top, "step").ravel().tolist()) <= {2, 3}
    assert np.isnan(values(peak)).all()
    close(values(early), np.abs(each[:2]).max((0, 1)))
    assert values(all_bins).tolist() == [
        int((np.abs(each) < 1e3).sum()), int((~(np.abs(each) < 1e3)).sum())
    ]  # fmt: skip
    assert run.samples.before(2, last=3, inclusive=True).compute()["value"].values.tolist() == [
        9, 10, 11,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.grads["Dense_0/bias"], "no tensor 'Dense_0/bias'(.|\n)*hidden, out"),
        (lambda r: r.grads.sel(tensor="x*"), r"there is no tensor 'x\*'"),
        (lambda r: r.grads[3], "3 is no tensor(.|\n)*hidden, out"),
        (lambda r: r.grads["hidden", 3], r"hidden has no weight \[3\](.|\n)*shape is \[3, 5\]"),
        (lambda r: r.grads["hidden"].sel(weight=15), "hidden has no weight 15(.|\n)*it has 15"),
        (lambda r: r.grads.sel(weight=1), "weights of 2 tensors are chosen by flat index"),
        (lambda r: r.grads.sel(step=24), "there is no step 24(.|\n)*0 to 23"),
        (lambda r: r.grads.sel(step=[-25]), "there is no step -1"),
        (lambda r: r.weights.sel(state=26), "there is no state 26(.|\n)*0 to 24"),
        (lambda r: r.grads.sel(epoch=6), "there is no epoch 6(.|\n)*epochs 0 to 5"),
        (lambda r: r.weights.sel(step=3), "no dimension 'step' for step(.|\n)*state, weight"),
        (lambda r: r.grads.sel(sample=3), "no dimension 'position' for sample"),
        (lambda r: r.grads.sel(rank=0), "no dimension 'rank'"),
        (lambda r: r.grads.top_k(2, "weight").sel(rank=2), "there is no rank 2(.|\n)*0 to 1"),
        (lambda r: r.grads.sum("position"), "no dimension 'position'(.|\n)*step, weight"),
        (lambda r: r.column("accuracy"), "there is no column 'accuracy'(.|\n)*loss"),
        (lambda r: r.grads.groupby([1, 2]), "2 labels for the 16 samples"),
        (lambda r: r.grads.groupby("class"), "no groups by 'class'(.|\n)*tensor, unit, epoch"),
        (lambda r: r.grads.groupby(LABELS), "groups by 3 labels of values over step, weight"),
        (lambda r: r.sample_losses.groupby(LABELS).sum("step"), "groups by 3 labels of a sum over"),
        (lambda r: r.sample_losses.sum("step").groupby(LABELS), "groups by 3 labels|told apart"),
        (lambda r: r.grads + r.weights, "steps and of states are combined(.|\n)*diff"),
        (lambda r: r.grads + r.updates["out"], "values of 2 and of 1 tensors are combined"),
        (lambda r: r.grads + np.ones(3), "ndarray stands in an expression"),
        (lambda r: bool(r.grads > 0), "neither true nor false before it is computed"),
        (lambda r: r.grads.top_k(0), "the 0 largest are asked for"),
        (lambda r: r.grads.hist([1, 1]), r"edges \[1.0, 1.0\] do not rise"),
        (lambda r: r.grads.quantile(1.5), "quantiles"),
        (lambda r: r.grads.quantile("weight", 0.5), "quantiles"),
        (lambda r: r.sample_losses.groupby(LABELS).quantile(1.5), "quantiles"),
        (lambda r: r.grads.groupby("tensor").hist([2, 1]), "do not rise"),
        (lambda r: r.grads.first("weight"), "what comes first is asked of steps or states"),
        (lambda r: r.grads.diff("weight"), "differences are taken along steps or states"),
        (lambda r: r.grads.crosses(0), "no dimension 'state' for crosses"),
        (lambda r: r.weights.before(3), "no dimension 'step' for before and after"),
        (lambda r: r.grads.before(3, last=1, first=1), "both the first and the last"),
        (lambda r: r.samples.before(r.grads), "the anchor has dimensions step, weight"),
        (lambda r: r.samples.join(x=r.grads), "there is nothing to join to"),
        (lambda r: r.samples.before(3).join(x=r.weights), "x has no steps"),
        (lambda r: r.grads.coarsen(step=0), "windows of 0 steps"),
        (lambda r: r.grads.rename(weight="w"), "no dimension 'w' for rename"),
        (lambda r: r.activations("x"), "no activations|cannot answer for activations"),
        (lambda r: r.sample_grads.compute(memory=1000), "the answer would take 0 MiB|would take"),
        (lambda r: r.sample_losses.compute(strategy="fast"), "no strategy 'fast'"),
        (lambda r: r.updates.norm("weight").cluster(2), "clusters of step"),
        (lambda r: r.updates.cluster(99), "99 clusters of 20 weights"),
        (lambda r: r.grads.compute().item(), "the answer is no single number"),
        (
            lambda r: r.samples.before(2).join(x=r.grads.diff("step").norm("weight")).compute(),
            "nothing at step 0",
        ),
    ],
)  # fmt: skip
def test_a_question_without_meaning_is_refused_with_what_there_is(small, ask, message):
    with pytest.raises(QueryError, match=message):
        ask(small.run)


def test_other_samples_have_the_form_of_those_of_the_run_and_labels_of_their_own(small):
    run, truth, _ = small
    with pytest.raises(replay.DataError, match="the run's loss takes"):
        run.on({"x": np.zeros((3, 4), np.float32), "y": np.zeros(3, np.float32)})
    twice = {name: np.concatenate([rows, rows[:5]]) for name, rows in tiny.DATA.items()}
    labels = np.arange(21) % 2
    losses = run.on(twice).sample_losses
    found = losses.groupby(labels).mean().sel(state=[0, 24]).compute()
    assert found["value"].dims == ("state", "group")
    with pytest.raises(QueryError, match="16 labels for the 21 samples"):
        losses.groupby(LABELS)
    alone = losses.sel(state=24).compute()["value"].values[0]
    for label in range(2):
        close(values(found)[1, label], alone[labels == label].mean())


def test_what_needs_no_gradients_of_samples_is_asked_of_a_run_without_them(tmp_path):
    def gradient(state, inputs):
        grads = jax.tree.map(jnp.ones_like, state.params)
        return jnp.zeros(tiny.BATCH), (), grads, ()

    def update(state, carry, grads, losses):
        return state._replace(params=jax.tree.map(lambda w: w - 1, state.params))

    def init(key):
        return replay.State({"a": jnp.zeros(2), "b": jnp.zeros(3)}, (), ())

    program = replay.Program.from_functions(init, gradient, update, name="plain")
    run = tiny.record(tmp_path / "run", program)
    assert (abs(run.grads) > 0).sum(("step", "weight")).compute()["value"].values == 24 * 5
    low = (run.weights["a"].diff("state") < 0).any("weight") & (run.grads["b"] > 0).all("weight")
    assert low.sum("step").compute()["value"].values == 24
    with pytest.raises(replay.ProgramError, match="no program for the gradient of one sample"):
        run.reduce(replay.reductions.Sum())


def test_a_replay_that_stops_early_has_found_what_is_asked_of_every_tensor(tmp_path):
    def gradient(state, inputs):
        late = jnp.where(inputs.step < 10, 0.0, 1.0)
        grads = {"a": jnp.ones(2), "b": late * jnp.ones(3)}
        return jnp.zeros(tiny.BATCH), (), grads, ()

    def update(state, carry, grads, losses):
        return state

    def init(key):
        return replay.State({"a": jnp.zeros(2), "b": jnp.zeros(3)}, (), ())

    run = tiny.record(
        tmp_path / "run", replay.Program.from_functions(init, gradient, update, name="late")
    )
    large = (run.grads > 0).groupby("tensor")
    assert large.any(("step", "weight")).compute()["value"].values.tolist() == [True, True]
    assert large.first("step").compute()["value"].values.tolist() == [0, 10]
