"""An index changes no bit of a training and no bit of an answer; it only spares replays.

The bounds are attacked twice: on arrays, by walks of NumPy that are as nasty as float32 allows, and
on recorded runs, whose answers are compared with those of a replay of everything.
"""

import json
import math
import shutil
import threading

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import zarr
from hypothesis import strategies as st
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import bounds, cli, indexing
from replay.indexes import Indexes, Scalars, Where
from replay.log import Log
from replay.narrowing import narrowed
from replay.query.nodes import At, Group, Map, Part, Reduce, Scan
from replay.store import Place

LEVELS = indexing.LEVELS


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
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
    kinds = random.integers(0, 5, size=weights)
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


@hypothesis.given(walk=walks(wild=False), at=st.integers(0, 40))
def test_what_a_weight_touched_is_never_out_of_reach(walk, at):
    total, _ = observed(walk, flushed)
    length = bounds.path_length(total, len(walk) - 1)
    for i in range(walk.shape[1]):
        value = float(walk[at % len(walk), i])
        assert bounds.can_reach(walk[:1, i], walk[-1:, i], length[i : i + 1], value).all()


def test_a_weight_that_did_not_go_far_enough_cannot_have_reached_a_value():
    first, last, length = np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([1.9, 2.1])
    assert bounds.can_reach(first, last, length, 0.0).tolist() == [False, True]


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
