"""An index changes no bit of a training and no bit of an answer; it only spares replays.

The bounds are attacked twice: on arrays, by walks of NumPy that are as nasty as float32 allows, and
on recorded runs, whose answers are compared with those of a replay of everything.
"""

import math
import pathlib
import re
import shutil
import threading
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import zarr
from hypothesis import strategies as st
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import bounds, cli, indexing
from replay.indexes import Indexes, Scalars, Where
from replay.journal import frames
from replay.narrowing import narrowed
from replay.query.nodes import At, Group, Map, Part, Reduce, Scan
from replay.replaying import Replayer
from replay.store import Place, StoredArray

LEVELS = indexing.LEVELS


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("REPLAY_CACHE_BYTES", "0")  # every answer is to be found anew
        yield


# ---------------------------------------------------------------------------------- the 8-bit code


@hypothesis.given(st.floats(0, allow_nan=False, allow_infinity=True))
def test_a_code_errs_to_its_side_and_by_an_eighth_at_most(x):
    (up,) = bounds.above(bounds.rounded_up(np.array([x])))
    (down,) = bounds.below(bounds.rounded_down(np.array([x])))
    assert down <= x <= up
    if 2.0**-32 <= x <= 2.0**10:
        assert up <= x * 2 ** (1 / 6) * (1 + 1e-12) and down >= x / 2 ** (1 / 6) * (1 - 1e-12)


def test_codes_of_zero_are_zero_and_what_is_not_a_number_may_have_gone_anywhere():
    assert bounds.above(bounds.rounded_up(np.array([0.0, np.nan, np.inf]))).tolist() == [
        0.0,
        np.inf,
        np.inf,
    ]
    assert bounds.below(bounds.rounded_down(np.array([0.0, np.nan]))).tolist() == [0.0, 0.0]
    codes = np.arange(255, dtype=np.uint8)
    assert (bounds.rounded_up(bounds.above(codes)) == codes).all()
    assert (bounds.rounded_down(bounds.below(codes)) == codes).all()


# --------------------------------------------------------------------------------- the motion bound

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1.0, 1024.0, np.inf, -np.inf, np.nan, 3e38]


@st.composite
def walks(draw, steps=40, weights=6, wild=True):
    """Draw float32 walks: of any scale, in steps of an ulp, onto a value, or through anything."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    count = draw(st.integers(1, steps))
    scale = 2.0 ** random.integers(-140, 120, size=(1, weights))
    moves = 2.0 ** random.integers(-30, 3, size=(1, weights))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        walk = np.cumsum(random.normal(size=(count + 1, weights)) * moves, axis=0) + random.normal(
            size=(1, weights)
        )
        walk = (walk * np.where(random.random((1, weights)) < 0.5, 1.0, scale)).astype(np.float32)
    mild = random.random() < 0.5
    if mild:
        walk = (random.normal(size=walk.shape) * 2.0 ** random.integers(-3, 3)).astype(np.float32)
        drift = 2.0 ** random.integers(-8, 1)
        walk = np.where(random.random() < 0.5, walk, np.cumsum(walk * drift, axis=0))
        walk = walk.astype(np.float32)
    kinds = np.where(mild, random.integers(0, 50, size=weights), random.integers(0, 5, weights))
    for i, kind in enumerate(kinds):
        if kind == 1:  # to and fro by one unit in the last place
            ahead = np.cumsum(random.integers(-1, 2, count + 1))
            start = np.float32(random.normal()).view(np.int32)
            walk[:, i] = (start + ahead).astype(np.int32).view(np.float32)
        elif kind == 2:  # exactly onto zero, or another value
            walk[random.integers(0, count + 1), i] = random.choice([0.0, 0.5, walk[0, i]])
        elif kind == 3 and wild:
            walk[random.integers(0, count + 1), i] = random.choice(SPECIAL)
        elif kind == 4:  # small numbers
            walk[:, i] = (random.normal(size=count + 1) * 2.0**-126).astype(np.float32)
    return walk


def flushed(x):
    """Return what a processor makes of it that takes the smallest numbers for zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def observed(walk, flush):
    """Return the sums of the updates' magnitudes as a device adds them up, and the least |w|."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = flush(walk)
        total = np.zeros(walk.shape[1], np.float32)
        for before, after in zip(x, x[1:], strict=False):
            total = flush(total + np.abs(flush(after - before)))
    return total, np.abs(x).min(axis=0)


@pytest.mark.parametrize("flush", [lambda x: x, flushed])
@hypothesis.given(walk=walks())
def test_no_way_is_longer_than_the_bound_and_no_weight_leaves_its_reach(flush, walk):
    steps = len(walk) - 1
    total, least = observed(walk, flush)
    length = bounds.path_length(total, steps)
    coded = bounds.above(bounds.rounded_up(length))
    assert (coded >= length).all()
    finite = np.isfinite(walk).all(0)
    for i in range(walk.shape[1]):
        if finite[i]:
            true = math.fsum(np.abs(np.diff(walk[:, i].astype(np.float64))))
            assert length[i] >= true
        else:
            assert steps == 0 or np.isinf(length[i])
    least = bounds.below(bounds.rounded_down(np.where(np.isnan(least), 0, least)))
    # What was taken for zero was not told from what is.
    least = np.where(least < 2 * bounds.TINY, 0, least)
    for bound in (length, coded):
        for some in (0.0, least):
            low, high = bounds.reach(walk[0], walk[-1], bound, some)
            inside = (low <= walk) & (walk <= high) | np.isnan(walk)
            assert inside.all()
            assert (np.isinf(low) & np.isinf(high))[~finite].all()
        low, high = bounds.reach(walk[0], None, bound)
        assert ((low <= walk) & (walk <= high) | np.isnan(walk)).all()


def test_a_weight_that_did_not_go_far_enough_cannot_have_reached_a_value():
    first, last, length = np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([1.9, 2.1])
    low, high = bounds.reach(first, last, length)
    assert ((low <= 0) & (0 <= high)).tolist() == [False, True]


def test_a_way_too_short_to_lead_from_end_to_end_proves_nothing():
    low, high = bounds.reach(np.array([0.0]), np.array([1.0]), np.array([0.5]))
    assert low[0] == -np.inf and high[0] == np.inf


def test_a_long_segment_is_still_bounded():
    random = np.random.default_rng(3)
    walk = np.cumsum(random.normal(size=(20_001, 3)) * 1e-3, axis=0).astype(np.float32) + 1000
    total, _ = observed(walk, flushed)
    length = bounds.path_length(total, 20_000)
    assert (length >= np.abs(np.diff(walk.astype(np.float64), axis=0)).sum(0)).all()
    assert np.isinf(bounds.path_length(total, 2**20)).all()


# ------------------------------------------------------------------------------------------- counts


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.floats(-2, 2e6, width=32, allow_subnormal=False) | st.sampled_from(bounds.EDGES),
)
def test_counts_bracket_a_threshold_and_decide_an_edge(seed, threshold):
    random = np.random.default_rng(seed)
    x = np.abs(random.normal(size=300) * 2.0 ** random.integers(-25, 25, 300)).astype(np.float32)
    x[:5] = [0, 1024, np.inf, 1, 2.0**-10]
    counts = np.array([[(x > edge).sum() for edge in bounds.EDGES]])
    at, total = np.array([threshold]), np.array([300])
    low, high = bounds.larger(counts, total, at, at)
    assert low <= (x > threshold).sum() <= high
    if threshold in bounds.EDGES:
        assert low == high
    low, high = bounds.at_least(counts, total, at, at)
    assert low <= (x >= threshold).sum() <= high


def test_a_thousand_lies_between_edges_and_1024_is_one():
    assert {1.0, 512.0, 1024.0} <= set(bounds.EDGES) and 1000.0 not in bounds.EDGES
    counts = np.array([[int(edge < 700) * 7 for edge in bounds.EDGES]])
    ask = lambda at: bounds.larger(counts, np.array([9]), np.array([at]), np.array([at]))  # noqa: E731
    assert [x.tolist() for x in ask(1000.0)] == [[0], [7]]
    assert [x.tolist() for x in ask(1024.0)] == [[0], [0]]


# ------------------------------------------------------------- intervals, on trajectories of NumPy


class Script:
    """A trajectory that is known in full, and what an index would have logged of it."""

    def __init__(self, weights, grads, edges, level, flush):
        self.weights, self.grads, self.level, self._flush = weights, grads, level, flush
        self.segments = list(zip(edges, edges[1:], strict=False))
        self.steps = len(next(iter(grads.values())))

    def dtype(self, path):
        return np.dtype(np.float32)

    def updates(self, path):
        with np.errstate(over="ignore", invalid="ignore"):
            walk = self._flush(self.weights[path])
            return self._flush(np.diff(walk, axis=0))

    def scalars(self, path):
        with np.errstate(over="ignore", invalid="ignore"):
            g, u = np.abs(self.grads[path]), np.abs(self.updates(path))
            norms = [self._flush(np.sqrt(np.square(x).sum(1))) for x in (g, u)]
            above = np.stack([(g > edge).sum(1) for edge in bounds.EDGES], axis=1)
        return Scalars(g.max(1), norms[0], above, np.isnan(g).sum(1), u.max(1), norms[1])

    def where(self, part, start, stop):
        walk = self.weights[part.path][start : stop + 1]
        walk = walk if part.indices is None else walk[:, list(part.indices)]
        total, least = observed(walk, self._flush)
        length, least = bounds.path_length(total, stop - start), np.nan_to_num(least, nan=0.0)
        if self.level == "weights":
            length = bounds.above(bounds.rounded_up(length))
            least = bounds.below(bounds.rounded_down(least))
        else:
            length, least = np.full(len(length), length.max()), np.zeros(len(least))
        low, high = bounds.reach(walk[0], walk[-1], length, least)
        return Where(low, high, least, "a bound")

    def at(self, part, state):
        if not any(state in segment for segment in self.segments):
            return None
        row = self.weights[part.path][state].astype(np.float64)
        return row if part.indices is None else row[list(part.indices)]


class Oracle:
    """The values of nodes by NumPy, at every step."""

    def __init__(self, script, flush):
        self._script, self._flush = script, flush

    def value(self, node, steps):
        """Return an array for each part, `[steps, ...]`."""
        if isinstance(node, Scan):
            return [self._chosen(node, part, steps) for part in node.tensors]
        if isinstance(node, At):
            return self.value(node.child, steps + node.offset)
        if isinstance(node, Map):
            given = [self.value(x, steps) if isinstance(x, (Map, Scan, At, Reduce)) else x
                     for x in node.arguments]  # fmt: skip
            count = max(len(x) for x in given if isinstance(x, list))
            with np.errstate(all="ignore"):
                return [self._apply(node, [x[i if len(x) > 1 else 0] if isinstance(x, list)
                        else np.float32(x) for x in given]) for i in range(count)]  # fmt: skip
        assert isinstance(node, Reduce)
        parts = self.value(node.child, steps)
        if node.by is None:
            parts = [np.concatenate(parts, axis=1)]
        function = {"mean": np.mean, "any": np.any, "all": np.all, "sum": np.sum, "max": np.max}
        options = {"dtype": np.float32} if node.how == "mean" else {}
        with np.errstate(all="ignore"):
            found = [function[node.how](x, axis=1, **options) for x in parts]
        found = [x.astype(np.int32) if node.how == "sum" else x for x in found]
        return [np.stack(found, axis=1)] if node.by is not None else [found[0][:, None]]

    def _apply(self, node, given):
        wide = max(x.ndim for x in given)
        given = [x if x.ndim in (0, wide) else x[..., None] for x in given]
        numbers = [self._flush(x) if x.dtype == np.float32 else x for x in given]
        found = getattr(np, node.function)(*numbers)
        return self._flush(found) if found.dtype == np.float32 else found

    def _chosen(self, scan, part, steps):
        source = {
            "weights": self._script.weights, "grads": self._script.grads,
            "updates": {part.path: self._script.updates(part.path)},
        }[scan.quantity]  # fmt: skip
        rows = source[part.path][steps]
        return rows if part.indices is None else rows[:, list(part.indices)]


THRESHOLDS = [0.0, 1e-3, 0.25, 0.5, 1.0, 1000.0, 1024.0, 2.0**-10, 1e30]


@st.composite
def conditions(draw, tensors, steps):
    """Draw a condition with a truth for each step, or for each step and weight, and its walk."""
    parts = tuple(Part(path, (size,)) for path, size in tensors.items())
    scan = lambda quantity, parts=parts: Scan(  # noqa: E731
        "run", quantity, (0, steps + (quantity == "weights"), 1), parts
    )
    threshold = draw(st.sampled_from(THRESHOLDS) | st.floats(-2, 2, width=32))
    compare = draw(st.sampled_from(["greater", "greater_equal", "less", "less_equal"]))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    near = st.sampled_from([0.03125, 0.25, 1.0, 2.0])
    threshold = draw(near) if draw(st.booleans()) else threshold

    def of_grads():
        x = scan(draw(st.sampled_from(["grads", "updates"])))
        kind = draw(st.sampled_from(["magnitude", "value", "scaled"]))
        x = x if kind == "value" else Map("abs", (x,))
        x = Map("multiply", (x, 2.0)) if kind == "scaled" else x
        how = draw(st.sampled_from(["mean", "any", "all", "sum", "max", "not"]))
        by = draw(st.sampled_from([None, Group("tensor")])) if len(parts) > 1 else None
        if how == "max":
            return Map(compare, (Reduce(x, "max", ("weight",), (), by), threshold))
        held = Map(compare, (x, threshold))
        if draw(st.booleans()):
            other = Map(draw(st.sampled_from(["greater", "less"])), (x, draw(near)))
            held = Map(draw(st.sampled_from(["logical_and", "logical_or"])), (held, other))
        if how == "not":
            held, how = Map("logical_not", (held,)), "mean"
        held = Reduce(held, how, ("weight",), (), by)
        if how in ("any", "all"):
            return held
        return Map(draw(st.sampled_from(["greater", "less_equal"])), (held, share))

    def of_weights(offset=None):
        chosen = parts
        if draw(st.booleans()):
            path = draw(st.sampled_from(sorted(tensors)))
            chosen = (Part(path, (tensors[path],), (draw(st.integers(0, tensors[path] - 1)),)),)
        w = scan("weights", chosen)
        if draw(st.booleans()):  # crosses
            before, after = (At(w, k) for k in (0, 1))
            signs = [Map("sign", (Map("subtract", (x, threshold)),)) for x in (before, after)]
            held = Map("not_equal", (before, threshold)), Map("not_equal", tuple(signs))
            return Map("logical_and", held)
        w = At(w, draw(st.integers(0, 1)))
        w = Map("abs", (w,)) if draw(st.booleans()) else w
        return Map(compare, (w, threshold))

    kind = draw(st.sampled_from(["grads", "weights", "both"]))
    if kind == "grads":
        return of_grads()
    held = of_weights()
    if kind == "weights":
        return held
    other = of_grads()
    if "tensor" in other.dims:
        return other
    held = Reduce(held, draw(st.sampled_from(["any", "all"])), ("weight",))
    return Map(draw(st.sampled_from(["logical_and", "logical_or"])), (held, other))


def expected(how, truth, steps):
    """Return what a reduction over all steps of a truth `[steps, lanes]` is."""
    if how in ("any", "all"):
        return getattr(np, how)(truth, axis=0)
    if how == "sum":
        return truth.sum(0, dtype=np.int64)
    hit = truth.any(0)
    place = truth.argmax(0) if how == "first" else len(truth) - 1 - truth[::-1].argmax(0)
    if not len(steps):
        return np.full(truth.shape[1], -1)
    return np.where(hit, steps[place], -1)


@st.composite
def scripts(draw):
    sizes = {"a": draw(st.integers(1, 7)), "b": draw(st.integers(1, 3))}
    walk = draw(walks(steps=30, weights=sum(sizes.values())))
    steps = len(walk) - 1
    other = draw(walks(steps=max(steps, 1), weights=sum(sizes.values())))
    grads = np.resize(other, walk.shape)[:steps]
    cut = sizes["a"]
    edges = sorted({0, steps, *draw(st.lists(st.integers(0, steps), max_size=4))})
    flush = draw(st.sampled_from([lambda x: x, flushed]))
    level = draw(st.sampled_from(["rows", "weights"]))
    weights = {"a": walk[:, :cut], "b": walk[:, cut:]}
    script = Script(weights, {"a": grads[:, :cut], "b": grads[:, cut:]}, edges, level, flush)
    return script, sizes, flush


@hypothesis.settings(max_examples=hypothesis.settings().max_examples * 12)
@hypothesis.given(st.data())
def test_whatever_intervals_decide_is_what_numpy_finds(data):
    script, sizes, flush = data.draw(scripts())
    condition = data.draw(conditions(sizes, script.steps))
    how = data.draw(st.sampled_from(["first", "last", "any", "all", "sum", "each"]))
    each = how == "each" and "weight" not in condition.dims
    how = "first" if how == "each" else how
    root = condition if each else Reduce(condition, how, ("step",))
    steps = condition.steps
    found = narrowed(root, script)
    if found is None:
        return
    oracle = Oracle(script, flush)
    truth = oracle.value(condition, steps)
    lanes = [np.broadcast_to(x, (len(steps), x.shape[1])) for x in truth]
    data_ = None
    if found.rest is not None:
        left = np.asarray((found.rest if each else found.rest.child).steps)
        assert len(left) == found.left and set(left.tolist()) <= set(steps.tolist())
        rows = np.searchsorted(steps, left)
        if each:
            data_ = [x[rows] if "tensor" in root.dims else x[rows, 0] for x in lanes]
        else:
            data_ = [expected(how, x[rows], left).astype(np.int64) for x in lanes]
            data_ = [x.astype(bool) if how in ("any", "all") else x for x in data_]
    answer = found.combine(data_)
    for mine, x in zip(answer, lanes, strict=True):
        if each:
            assert (mine.reshape(len(steps), -1) == x).all()
        else:
            assert (mine.reshape(-1) == expected(how, x, steps)).all()


# ---------------------------------------------------------------------------------- recorded runs


def recorded_levels(tmp_path_factory, **options):
    folder = tmp_path_factory.mktemp("levels")
    return {level: tiny.record(folder / level, index=level, **options) for level in LEVELS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return recorded_levels(tmp_path_factory)


def assert_the_same_training(run, other):
    for name in ("witness", "loss", "ids"):
        found, expected = (x.log.column(name, 0, x.steps) for x in (run, other))
        assert found.tobytes() == expected.tobytes(), name
    assert run.log.durable.digests == other.log.durable.digests
    assert run.checkpoints == other.checkpoints
    for state in run.checkpoints:
        assert bits(run.log.checkpoint(state)) == bits(other.log.checkpoint(state)), state


@pytest.mark.parametrize("dispatch", ["step", pytest.param("block", marks=pytest.mark.full)])
def test_no_level_changes_a_bit_of_the_training(tmp_path_factory, runs, dispatch):
    if dispatch == "block":
        runs = recorded_levels(tmp_path_factory, dispatch=dispatch)
    for level, run in runs.items():
        assert run.log.header.index == level
        assert run.indexes == (() if level == "off" else (level,))
        assert_the_same_training(run, runs["off"])
        programs = [{k: v["optimized"] for k, v in x.log.header.programs.items()}
                    for x in (run, runs["off"])]  # fmt: skip
        assert programs[0] == programs[1]
        assert run.verify().grade is replay.Grade.BITWISE


def test_by_block_an_index_is_recorded_step_by_step_to_the_same_bits(tmp_path, runs):
    run = tiny.record(tmp_path / "run", index="weights", dispatch="block")
    plain = tiny.record(tmp_path / "plain", dispatch="block")
    assert_the_same_training(run, plain)
    assert run.steps == Indexes(run.log).steps and len(run.log.durable.segments) == 3


def tables(run, path):
    found = Indexes(run.log).scalars(path)
    return [(x.dtype, x.shape, x.tobytes()) for x in found]


def test_what_is_built_afterwards_has_the_bits_of_what_is_recorded(tmp_path, runs):
    shutil.copytree(runs["off"].path, tmp_path / "run")
    for level in LEVELS[1:]:
        run = replay.open(tmp_path / "run")
        run.index(level)
        assert level in run.indexes and level in replay.open(tmp_path / "run").indexes
        own = Indexes(replay.open(tmp_path / "run").log)._all()[-1]
        theirs = Indexes(runs[level].log)._all()[0]
        for name in own.specs:
            count = run.steps if name in (*indexing.NUMBERS, "grads_above") else 3
            mine, other = (
                StoredArray(x.log.place, kept.specs[name]).read(slice(0, count))
                for x, kept in ((run, own), (runs[level], theirs))
            )
            assert mine.tobytes() == other.tobytes(), name
        assert [s[:2] for s in own.segments] == [(0, 8), (8, 16), (16, 24)]
    assert "index of scalars and rows and weights" in repr(run)
    assert tables(run, "out") == tables(runs["scalars"], "out")


def test_other_tools_read_the_columns_by_their_names(runs):
    steps = zarr.open_group(f"{runs['rows'].path}/steps", mode="r")
    assert steps["grads_max"].metadata.dimension_names == ("step", "tensor")
    assert steps["grads_above"].shape == (24, 2, len(bounds.EDGES) + 1)
    assert steps["grads_above"].attrs["tensors"] == "hidden\nout"
    segments = zarr.open_group(f"{runs['rows'].path}/segments", mode="r")
    assert segments["columns_0"].shape == (3, 5) and segments["rows_0"].shape == (3, 3)


def test_columns_are_those_of_the_history(runs):
    found = runs["scalars"].history()
    expected = abs(runs["scalars"].grads["hidden"]).max("weight").compute(index=False)
    assert (found["grads_max/hidden"] == expected["value"].values).all()
    assert "grads_max/hidden" not in runs["off"].history()


def test_the_default_is_cheap_and_known_before_the_first_step(runs):
    signature = runs["off"].log.header.signature
    assert indexing.default_level(1e6, signature) == "off"
    assert indexing.default_level(1e9, signature) == "scalars"


# -------------------------------------------------------------------- a run that follows a script


class ScriptState(NamedTuple):
    params: Any
    opt_state: Any = ()


SHAPES = {"half": (3,), "kernel": (4, 3), "scalar": (), "brain": (2, 2)}
DTYPES = {"half": jnp.float16, "brain": jnp.bfloat16}


def scripted(path, walk, grads, **options):
    """Record a training that goes through given weights, and has given gradients."""

    def tree(batch, prefix):
        return {name: batch[f"{prefix}_{name}"][0] for name in SHAPES}

    def init(key):
        return ScriptState({name: jnp.asarray(x[0]) for name, x in walk.items()})

    def gradient(state, inputs):
        losses = jnp.zeros(1, jnp.float32)
        return losses, (), tree(inputs.batch, "g"), tree(inputs.batch, "w")

    def update(state, carry, grads, losses):
        return ScriptState(carry)

    steps = len(grads["kernel"])
    data = {f"w_{name}": x[1:] for name, x in walk.items()}
    data |= {f"g_{name}": x for name, x in grads.items()}
    program = replay.Program.from_functions(init, gradient, update, name="script")
    order = replay.Order.explicit(np.arange(steps)[:, None])
    return tiny.record(path, program, data, order, **options)


def script_arrays(seed, steps=48):
    """Return walks and gradients with everything nasty in them."""
    random = np.random.default_rng(seed)
    walk, grads = {}, {}
    for name, shape in SHAPES.items():
        dtype = DTYPES.get(name, np.float32)
        moves = random.normal(size=(steps + 1, *shape)) * 2.0 ** random.integers(-8, 0, shape)
        x = np.cumsum(moves, axis=0) + random.normal(size=shape)
        g = random.normal(size=(steps, *shape))
        g = g * 2.0 ** random.integers(-20, 14, (steps, *[1] * len(shape)))
        walk[name], grads[name] = np.asarray(x, dtype), np.asarray(g, dtype)
    kernel, g = walk["kernel"], grads["kernel"]
    kernel[20:, 0, 0] = 0.0
    kernel[10, 1, 1], kernel[30, 2, 2], kernel[33, 3, 0] = 1e-40, np.nan, np.inf
    kernel[:, 1, 2] = 3.0 + np.arange(steps + 1) * 1e-6
    g[5, 0, 0], g[6, 1, 1], g[7], g[8], g[9] = np.nan, np.inf, 0.0, 1e-41, 1024.0
    g[12:14] = np.nan
    return walk, grads


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    walk, grads = script_arrays(1)
    run = scripted(tmp_path_factory.mktemp("script") / "run", walk, grads, index="off")
    return run, walk, grads


def questions(run):
    """Return questions that an index might decide, and some that it cannot."""
    g, u, w = run.grads, run.updates, run.weights
    kernel = g["kernel"]
    first = next(iter(run.tensors)).path
    near = (abs(w["kernel", 1, 2]).diff("state") < 1).any("weight")
    found = {}
    for c in (0.25, 1000.0, 1024.0):
        found[f"mean > {c}"] = ((abs(kernel) > c).mean("weight") > 0.1).first("step")
        found[f"not <= {c}"] = ((~(abs(kernel) <= c)).mean("weight") > 0.1).first("step")
    return found | {
        "last": ((abs(kernel) > 1024).mean("weight") > 0.3).last("step"),
        "any": (abs(g) > 3e4).any(),
        "all": (abs(kernel) < 3e4).all(("step", "weight")),
        "by tensor": (abs(g) > 1).groupby("tensor").any(("step", "weight")),
        "mean by tensor": ((abs(g) > 1).groupby("tensor").mean("weight") > 0.2).first("step"),
        "count": (abs(kernel) > 2).any("weight").sum("step"),
        "count all": (abs(kernel) > 1).sum(("step", "weight")),
        "each": abs(kernel).max("weight") > 2,
        "largest": abs(kernel).max("weight"),
        "largest by tensor": abs(g[first]).groupby("tensor").max("weight"),
        "largest update": abs(u["kernel"]).max("weight"),
        "norm": (kernel.norm("weight") > 1).first("step"),
        "not finite": (~np.isfinite(kernel)).any("weight").first("step"),
        "where nan": np.isnan(kernel).sum("weight"),
        "cross 0": w["kernel"].crosses(0.0).first("step"),
        "cross 3": w["kernel", 1, 2].crosses(3.0).first("step"),
        "cross half": w[first].crosses(0.5).last("step"),
        "one": w["kernel", 0, 0].crosses(0.0).first("step"),
        "small": (abs(w["kernel", 1]) < 1e-3).first("state"),
        "small any": (abs(w["kernel"]) < 1e-3).any("weight").first("state"),
        "both": (near | (abs(kernel) > 1e3).any("weight")).sum("step"),
    }  # fmt: skip


def assert_equal_answers(found, expected):
    assert set(found.data_vars) == set(expected.data_vars)
    for name in expected.data_vars:
        mine, other = found[name], expected[name]
        assert (mine.dims, mine.dtype, mine.shape) == (other.dims, other.dtype, other.shape), name
        assert mine.values.tobytes() == other.values.tobytes(), name
        assert list(mine.coords) == list(other.coords)
        for coordinate in other.coords:
            assert (mine[coordinate].values == other[coordinate].values).all()


@pytest.fixture(scope="module")
def whole(script):
    """Return the answers of a replay of everything."""
    run, *_ = script
    return {name: asked.compute(index=False) for name, asked in questions(run).items()}


@pytest.mark.parametrize("level", LEVELS[1:])
def test_answers_do_not_depend_on_the_level_of_the_index(script, whole, level):
    run, *_ = script
    run.index(level)
    assert level in run.indexes
    spared = 0
    for name, asked in questions(run).items():
        answer = asked.compute()
        assert_equal_answers(answer, whole[name])
        assert answer.attrs["steps"] <= whole[name].attrs["steps"], name
        spared += whole[name].attrs["steps"] - answer.attrs["steps"]
    assert spared > 300


def indexed(run, level):
    if level not in run.indexes:
        run.index(level)
    return run


def test_where_a_weight_is_said_to_have_been_it_was(script):
    run, walk, _ = script
    indexed(run, "weights")
    known = Indexes(run.log)
    for name in SHAPES:
        part = Part(name, SHAPES[name])
        for start, stop in known.segments:
            found = known.where(part, start, stop)
            rows = np.asarray(walk[name], np.float64)[start : stop + 1].reshape(
                stop - start + 1, -1
            )
            inside = (found.low <= rows) & (rows <= found.high)
            assert (inside | ~np.isfinite(rows)).all()
            assert np.isinf(found.high[~np.isfinite(rows).all(0)]).all()
            assert (np.abs(rows) >= np.where(found.least < 1e-37, 0, found.least)).all(
                where=np.isfinite(rows)
            )


def test_thresholds_at_an_edge_replay_nothing_and_between_edges_little(script):
    run, _, grads = script
    indexed(run, "scalars")
    with np.errstate(invalid="ignore"):
        share = (np.abs(grads["kernel"]) > 1024).mean((1, 2))
    edge = ((abs(run.grads["kernel"]) > 1024).mean("weight") > 0.1).sum("step").compute()
    assert edge.attrs["steps"] == 0 and edge.attrs["grade"] == "LOGGED"
    assert edge["value"].values == (share > 0.1).sum()
    between = ((abs(run.grads["kernel"]) > 1000).mean("weight") > 0.1).sum("step").compute()
    assert 0 < between.attrs["steps"] < 48 and between.attrs["grade"] != "LOGGED"


@pytest.mark.full
@pytest.mark.parametrize(
    "seed", [2, 3, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(4, 8))]
)
def test_answers_of_other_scripts_do_not_depend_on_the_index(tmp_path, seed):
    run = scripted(tmp_path / "run", *script_arrays(seed), index=LEVELS[1 + seed % 3])
    for asked in questions(run).values():
        assert_equal_answers(asked.compute(), asked.compute(index=False))


# --------------------------------------------------------------- resumed, cut off, thinned, damaged


def some_questions(run):
    g, w = run.grads, run.weights
    return [
        ((abs(g) > 0.25).mean("weight") > 0.4).last("step"),
        w["hidden", 0, 0].crosses(0.0).first("step"),
        (abs(w["hidden"]) < 1e-3).any("weight").first("state"),
    ]


def assert_right(run):
    for asked in some_questions(run):
        found, expected = asked.compute(), asked.compute(index=False)
        assert_equal_answers(found, expected)
        assert found.attrs["steps"] <= expected.attrs["steps"]


def test_a_recording_that_is_cut_anywhere_goes_on_with_its_index(tmp_path, runs):
    """Cut the journal after each of its records, as a kill would leave it, and resume."""
    run = runs["weights"]
    journal = (pathlib.Path(run.path) / "journal.msgpack").read_bytes()
    ends = [end for end, _ in frames(journal, "journal")]
    for end in (ends[2], ends[-3]):
        path = tmp_path / f"cut{end}"
        shutil.copytree(run.path, path)
        (path / "journal.msgpack").write_bytes(journal[:end])
        assert_right(replay.open(path))
        with tiny.recorder(path, resume=True) as recorder:
            recorder.advance()
        again = replay.open(path)
        assert again.indexes == ("weights",)
        assert_the_same_training(again, run)
        assert tables(again, "out") == tables(run, "out")
        spans = {s[:2] for s in again.log.durable.segments}
        assert {(0, 8), (8, 16), (16, 24)} <= spans
        assert_right(again)


def test_steps_after_the_last_stored_state_are_bounded_from_one_side(tmp_path):
    with pytest.raises(ZeroDivisionError), tiny.recorder(tmp_path / "run", index="rows",
                                                         commit_steps=1) as recorder:  # fmt: skip
        recorder.advance(11)
        raise ZeroDivisionError
    run = replay.open(tmp_path / "run")
    assert run.steps == 11
    assert_right(run)


def test_thinned_segments_are_joined(tmp_path, runs):
    for level in ("rows", "weights"):
        shutil.copytree(runs[level].path, tmp_path / level)
        run = replay.open(tmp_path / level)
        run.thin(2)
        assert run.checkpoints == [0, 24]
        part = Part("hidden", (3, 5))
        found = Indexes(run.log).where(part, 0, 24)
        parts = [Indexes(runs[level].log).where(part, a, b) for a, b in ((0, 8), (8, 16), (16, 24))]
        assert found.bound == parts[0].bound and np.isfinite(found.high).all()
        assert (found.least == np.min([p.least for p in parts], axis=0)).all()
        for state in range(25):
            weights = np.asarray(run.state(state).params["hidden"]).reshape(-1)
            assert ((found.low <= weights) & (weights <= found.high)).all()
        assert_right(run)


def test_a_damaged_index_is_not_used_and_says_so(tmp_path, runs):
    names = runs["weights"].log.place.list()
    names = [name for name in names if re.match("segments/|steps/(grads|updates)_", name)]
    chunks = [name for name in names if "/c/" in name]
    assert len(chunks) >= 5 + 4 * 3
    for name in ("steps/grads_above/c/0/0/0", "steps/updates_max/c/0/0", "segments/path_0/c/1/0/0"):
        assert name in chunks
        path = tmp_path / name.replace("/", "_")
        shutil.copytree(runs["weights"].path, path)
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 16
        (path / name).write_bytes(data)
        run = replay.open(path)
        with pytest.warns(RuntimeWarning, match="questions replay what it would have spared"):
            assert_right(run)


def test_a_built_index_that_is_damaged_or_of_another_run_is_not_used(tmp_path, runs):
    shutil.copytree(runs["off"].path, tmp_path / "run")
    replay.open(tmp_path / "run").index("rows")
    file = tmp_path / "run" / "index" / "rows.msgpack"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    with pytest.warns(RuntimeWarning, match=r"index/rows\.msgpack is damaged"):
        assert replay.open(tmp_path / "run").indexes == ()
    file.write_bytes(intact)
    other = tiny.record(tmp_path / "other", key=jax.random.key(6))
    shutil.copytree(tmp_path / "run" / "index", tmp_path / "other" / "index")
    assert replay.open(other.path).indexes == ()
    assert replay.open(tmp_path / "run").indexes == ("rows",)


def test_an_index_that_was_not_finished_does_not_exist(tmp_path, runs, monkeypatch):
    shutil.copytree(runs["off"].path, tmp_path / "run")
    run = replay.open(tmp_path / "run")
    write, count = Place.write, []

    def fail(place, name, data):
        count.append(name)
        if name == "index/rows.msgpack":
            raise OSError("no space left")
        write(place, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", fail)
        with pytest.raises(OSError, match="no space left"):
            run.index("rows")
    assert replay.open(run.path).indexes == ()
    run.index("rows")
    assert_right(replay.open(run.path))


def test_several_may_build_the_same_index_at_once(tmp_path, runs):
    shutil.copytree(runs["off"].path, tmp_path / "run")
    opened = [replay.open(tmp_path / "run") for _ in range(3)]
    threads = [threading.Thread(target=run.index, args=("weights",)) for run in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = replay.open(tmp_path / "run")
    assert run.indexes == ("weights",)
    assert tables(run, "hidden") == tables(runs["weights"], "hidden")
    assert_right(run)


# ------------------------------------------------------------------------------------ what is told


def test_explain_names_the_bound_and_executes_nothing(runs, monkeypatch):
    monkeypatch.setattr(Replayer, "steps", None)
    run = runs["weights"]
    told = run.weights["hidden", 1, 0].crosses(5.0).first("step").explain()
    assert "24 of 24 decided by the log" in told
    assert "3 segments skipped by path of each weight: states 0 to 8, 8 to 16, 16 to 24" in told
    assert "answered from the log: nothing is replayed" in told
    told = run.weights["hidden", 1, 0].crosses(5.0).first("step").explain(index=False)
    assert "replay up to 24 steps" in told and "decided" not in told
    told = ((abs(run.grads) > 1024).mean("weight") > 0.1).first("step").explain()
    assert "skipped by norms, maxima and counts of each step" in told


def test_an_anchor_that_the_log_finds_replays_only_what_is_taken(runs):
    run = runs["scalars"]
    boom = ((abs(run.grads) > 1).mean("weight") > 0.2).first("step")
    found = run.samples.before(boom, last=5, inclusive=True).compute()
    expected = run.samples.before(boom, last=5, inclusive=True).compute(index=False)
    assert found.attrs["steps"] == 0 and expected.attrs["steps"] > 0
    assert_equal_answers(found, expected)


def test_what_is_kept_of_answers_mixes_with_what_is_decided(tmp_path, runs, monkeypatch):
    shutil.copytree(runs["weights"].path, tmp_path / "run")
    expected = [asked.compute(index=False) for asked in some_questions(runs["weights"])]
    monkeypatch.setenv("REPLAY_CACHE_BYTES", str(2**24))
    for index in (True, False, True):
        run = replay.open(tmp_path / "run")
        for asked, whole in zip(some_questions(run), expected, strict=True):
            asked.explain(index=index)
            part = asked.source.compute(asked, index=index)[0]
            assert_equal_answers(part, whole)
        half = run.weights["hidden", 0, 0].sel(state=slice(0, 12)).crosses(0.0).first("step")
        assert_equal_answers(half.compute(index=index), half.compute(index=False, cache=False))


def test_a_wrong_level_is_refused_with_those_that_exist(tmp_path, runs):
    with pytest.raises(replay.QueryError, match="one of scalars, rows, weights"):
        runs["off"].index("columns")
    with pytest.raises(replay.LogError, match="index='columns'"):
        tiny.recorder(tmp_path / "run", index="columns")


def test_the_command_builds_an_index(tmp_path, runs, capsys):
    shutil.copytree(runs["off"].path, tmp_path / "run")
    assert cli.main(["index", str(tmp_path / "run"), "--level", "scalars"]) == 0
    assert "has an index of scalars" in capsys.readouterr().out
    assert replay.open(tmp_path / "run").indexes == ("scalars",)
