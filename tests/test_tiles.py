"""Weights that do not go together within memory are folded one tile after the other.

Whatever the tiles, an answer has the very bits of the one that all weights together give.
"""

import concurrent.futures
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import tiny
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import QueryError, asking, tiles
from replay.cache import Cell
from replay.cells import Root
from replay.query import nodes
from replay.reducing import layouts, stepper

BATCH, SAMPLES, STEPS = 12, 42, 16
AMPLE = 2**34
SKETCH = 2**19 * (tiles.WORKING + 1)  # of a weight, and what is beside it
DIGITS = models.digits(SAMPLES)
LABELS = DIGITS["y"] % 3


def loss(params, example, key):
    hidden = jnp.tanh(example["x"].reshape(-1) @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = params["scale"] * (hidden @ params["out"])
    return models.cross_entropy(logits, example["y"])


def init(key):
    a, b = jax.random.split(key)
    return {
        "hidden": {"w": 0.1 * jax.random.normal(a, (64, 6)), "b": jnp.zeros(6)},
        "out": 0.3 * jax.random.normal(b, (6, 10)),
        "scale": jnp.float32(1),
    }


PROGRAM = replay.Program(init, loss, optax.adam(0.01), name="mlp")


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def recorded(path):
    """Record 16 steps of 12 digits, the last of each epoch padded."""
    order = replay.Order.shuffled(BATCH, 4, seed=3, pad=True)
    return tiny.record(path, PROGRAM, DIGITS, order, checkpoints=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("tiles") / "run")


def bits(answer):
    return {
        name: (x.dims, x.dtype.str, np.asarray(x).tobytes()) for name, x in answer.variables.items()
    }


def told(question, memory):
    """Return tiles and steps that are announced."""
    text = question.explain(memory=memory)
    found = re.search(r"in (\d+) tiles of the weights, each a replay of (\d+) steps", text)
    steps = sum(int(n.replace(",", "")) for n in re.findall(r"replay ([\d,]+) steps", text))
    return (int(found[1]) if found else 1), steps


def check(question, memory, count=None):
    """Compare bits with those of one pass, and steps with what was announced."""
    whole, parted = question.compute(memory=AMPLE), question.compute(memory=memory)
    assert bits(whole) == bits(parted)
    passes, steps = told(question, memory)
    assert told(question, AMPLE) == (1, whole.attrs["steps"])
    assert parted.attrs["steps"] == steps == passes * whole.attrs["steps"]
    assert parted.attrs["grade"] == whole.attrs["grade"]
    assert passes > 1 if count is None else passes == count


# ------------------------------------------------------------------------------- running states


def few(quantity):
    """Return a quantity of 67 weights in three tensors, at few steps: sketches are slow."""
    chosen = quantity.sel(tensor=["hidden/b", "out", "scale"])
    return chosen.sel(**{chosen.plan.walked: slice(6, 10)})


full = functools.partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize(("weights", "count"), [(66, 2), full(33, 3), full(9, 9)])
def test_a_sketch_of_every_weight_is_kept_for_as_many_weights_as_memory_holds(run, weights, count):
    check(few(run.weights).quantile(0.5, dim="state"), SKETCH * weights, count)


QUESTIONS = {
    "several shares": (lambda r: few(r.weights).quantile([0.1, 0.9], dim="state"), 40),
    "a difference of them": (
        lambda r: np.subtract(*(few(r.grads).quantile(q, dim="step") for q in (0.75, 0.25))), 40,
    ),
    "arithmetic": (lambda r: abs(few(r.updates) * 3 + few(r.grads) ** 2).quantile(0.5, "step"), 40),
    "what is the same at every step": (
        lambda r: (few(r.grads) - few(r.grads).mean("step")).quantile(0.5, "step"), 40,
    ),
    "the norm of all weights of a step": (
        lambda r: (few(r.grads) / r.grads.norm("weight")).quantile(0.5, "step"), 40,
    ),
    "the step before": (lambda r: few(r.weights.diff("state")).quantile(0.5, "step"), 40),
    "samples": (lambda r: few(r.sample_grads).quantile(0.5, dim=("step", "position")), 40),
    "of some samples": (
        lambda r: r.sample_grads["out"].sel(sample=[3, 5, 7], step=slice(6, 10)).quantile(
            0.5, ("step", "position")
        ), 40,
    ),
    "by epoch": (lambda r: few(r.grads).groupby("epoch").quantile(0.5, dim="step"), 70),
    "by window": (lambda r: few(r.grads).coarsen(step=3).quantile(0.5, dim="step"), 70),
    "by labels": (
        lambda r: few(r.sample_grads).groupby(LABELS).quantile(0.5, ("step", "position")), 90,
    ),
    "of chosen weights": (
        lambda r: r.weights["hidden/w"].sel(weight=range(3, 90, 2), state=[2, 5, 9]).quantile(
            0.5, "state"
        ), 15,
    ),
}  # fmt: skip


BY_DEFAULT = ("what is the same at every step",)


@pytest.mark.parametrize("name", [x if x in BY_DEFAULT else full(x) for x in QUESTIONS])
def test_sketches_in_tiles_have_the_bits_of_all_together(run, name):
    ask, weights = QUESTIONS[name]
    whole, parted = (ask(run).compute(memory=m) for m in (AMPLE, SKETCH * weights))
    assert bits(whole) == bits(parted)
    steps = told(ask(run), SKETCH * weights)[1]
    assert parted.attrs["steps"] == steps > whole.attrs["steps"]


EDGES = [2.0**e for e in range(-20, -1)]
REDUCED = {
    "a bin": (lambda r: abs(r.grads).hist(EDGES, dim="step").sel(bin=7), 451 * 80 - 1),
    "the fullest bin": (lambda r: abs(r.grads).hist(EDGES, dim="step").max("bin"), 451 * 80 - 1),
    "the k-th largest": (lambda r: abs(r.grads).top_k(4, "step").sel(rank=3), 451 * 16 - 1),
    "the mean of the largest": (lambda r: abs(r.grads).top_k(4, "step").mean("rank"), 451 * 400),
    "of samples": (
        lambda r: abs(r.sample_grads).top_k(9, ("step", "position")).sel(rank=8), 451 * 600,
    ),
    "bins of samples": (
        lambda r: abs(r.sample_grads).hist(EDGES, ("step", "position")).sel(bin=7), 451 * 80 - 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [x if x == "the k-th largest" else full(x) for x in REDUCED])
def test_of_a_state_only_what_is_made_of_it_is_put_together(run, name):
    """Where memory is short, what the further reduction looks at would not fit as a whole."""
    ask, memory = REDUCED[name]
    check(ask(run), memory)


def test_a_state_that_is_asked_for_itself_as_well_has_to_fit(run):
    bins = abs(run.grads).hist(EDGES, dim="step")
    with pytest.raises(QueryError, match="the answer would take"):
        replay.compute(bins.sel(bin=7), bins, memory=451 * 80 - 1)


# ------------------------------------------------------------------------- multiplied-out gradients


OUT = 4 * 384 * BATCH  # bytes of the widest tensor, for a batch


MULTIPLIED = {
    "rankings within a step": lambda r: abs(r.sample_grads.sel(step=[3, 7])).top_k(2, "position"),
    "exact quantiles": lambda r: r.sample_grads.sel(step=[3, 7]).quantile(0.3, "position"),
    "counts": lambda r: (abs(r.sample_grads) > 0.01).sum(("step", "position")),
    "shares of updates": lambda r: abs(r.sample_updates).top_k(2, dim=("step", "position")),
    "labels": lambda r: abs(r.sample_grads).groupby(LABELS).max(("step", "position")),
    "other samples": lambda r: abs(r.on(DIGITS).sample_grads.sel(state=[2, 9])).max("sample"),
}


@pytest.mark.parametrize(
    "name", [x if x == "rankings within a step" else full(x) for x in MULTIPLIED]
)
def test_gradients_of_samples_are_multiplied_out_for_a_tile_at_a_time(run, name, monkeypatch):
    at_once = []
    multiplied = tiles._multiplied

    def watched(form, payload):
        found = multiplied(form, payload)
        at_once.append(found.nbytes)
        return found

    monkeypatch.setattr(tiles, "_multiplied", watched)
    check(MULTIPLIED[name](run), OUT - 1)
    assert max(at_once) <= OUT // 4


def test_a_replay_of_each_tile_may_stop_early(run):
    question = (abs(run.sample_grads) > 0.02).any("position").first("step")
    whole, parted = (question.compute(memory=m) for m in (AMPLE, OUT - 1))
    assert bits(whole) == bits(parted)
    assert "replay up to 144 steps" in question.explain(memory=OUT - 1)
    assert parted.attrs["steps"] <= 144


@pytest.mark.full
@pytest.mark.parametrize("model", ["lstm", "transformer", "convolution"])
def test_sums_over_time_are_multiplied_out_alike_of_a_few_samples_at_a_time(tmp_path, model):
    case = models.Case(model, "momentum")
    run = tiny.record(tmp_path / "run", case.program(), case.data, case.order, checkpoints=24)
    largest = max(part.size for part in run.sample_grads.plan.parts)
    question = abs(run.sample_grads.sel(step=slice(0, 2))).min("position").max("step")
    check(question, 4 * largest * models.BATCH - 1)


# -------------------------------------------------------------------------- several, and elsewhere


def test_questions_that_are_asked_together_share_the_first_pass_only(run):
    asked = [
        few(run.weights).quantile(0.5, dim="state"),
        few(run.grads).norm("weight"),
        few(run.grads).quantile(0.5, dim="step"),
        run.grads["out"].sel(step=slice(6, 10)).quantile(0.5, dim="step"),
    ]
    whole, parted = (replay.compute(*asked, memory=m) for m in (AMPLE, SKETCH * 61))
    assert list(map(bits, whole)) == list(map(bits, parted))
    assert parted[0].attrs["steps"] == sum(
        int(n) for n in re.findall(r"replay (\d+) steps", run.asking.explain(
            *asked, memory=SKETCH * 61
        ))
    )  # fmt: skip


def test_every_step_of_every_pass_is_reported(run, monkeypatch):
    counted = []
    execute = asking.Execution

    def counting(*arguments, **options):
        return execute(*arguments, **options | {"progress": counted.append})

    monkeypatch.setattr(asking, "Execution", counting)
    answer = few(run.weights).quantile(0.5, dim="state").compute(memory=SKETCH * 33)
    assert sum(counted) == answer.attrs["steps"]


def test_tiles_go_through_indexes_and_other_processes(run):
    first = (abs(run.sample_grads) > 0.02).any("position").first("step")
    indexed = (abs(run.grads) > 0.02).first("step")
    sketch = few(run.weights).quantile(0.5, dim="state")
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        for question, memory in ((first, OUT - 1), (indexed, 3000), (sketch, SKETCH * 33)):
            whole = bits(question.compute(memory=AMPLE, index=False))
            for options in ({"index": True}, {"index": False}, {"executor": executor}):
                assert bits(question.compute(memory=memory, **options)) == whole


def test_an_answer_put_together_is_kept_whole_and_tiles_know_what_was_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLAY_CACHE_BYTES", str(2**28))
    order = replay.Order.shuffled(BATCH, 4, seed=3)
    run = tiny.record(tmp_path / "run", PROGRAM, DIGITS, order, checkpoints=4)
    question = (abs(run.sample_grads) > 0.01).sum(("step", "position"))
    first = question.compute(memory=OUT - 1)
    again = replay.open(tmp_path / "run")
    kept = (abs(again.sample_grads) > 0.01).sum(("step", "position")).compute(memory=OUT - 1)
    assert bits(first) == bits(kept) == bits(question.compute(memory=OUT - 1, cache=False))
    assert (first.attrs["steps"] > 0, kept.attrs["steps"]) == (True, 0)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("ask", "memory", "message"),
    [
        (lambda r: few(r.weights).quantile(0.5, "state"), 4 * 66, "the answer would take"),
        (lambda r: few(r.weights).quantile(0.5, "state"), SKETCH - 1, "the answer would take"),
        (lambda r: np.log(abs(few(r.grads))).quantile(0.5, "step"), 2**23, "the answer would take"),
        (
            lambda r: abs(r.grads).top_k(4, "step").mean("rank"),  # a sum, so whole tensors only
            451 * 16 - 1,
            "the answer would take",
        ),
        (lambda r: r.sample_grads.var("position").max("step"), OUT - 1, "be multiplied out"),
        (lambda r: r.sample_grads.max(), OUT - 1, "be multiplied out"),
        (
            lambda r: (r.sample_grads / r.sample_grads.max("weight")).max(("step", "position")),
            OUT - 1,
            "be multiplied out",
        ),
    ],
)
def test_what_does_not_fit_in_tiles_is_refused(run, ask, memory, message):
    with pytest.raises(QueryError, match=message):
        ask(run).compute(memory=memory)


def test_whole_tensors_part_where_the_bits_of_a_weight_depend_on_its_neighbours(run):
    question = np.arctan(few(run.grads)).quantile(0.5, dim="step")
    assert not tiles.splits(question.plan)
    check(question, SKETCH * 60, 3)


def test_a_tensor_that_is_a_scalar_has_the_gradients_of_chosen_samples(run):
    mine = np.asarray(run.sample_grads["scale"].compute()["scale"])  # [step, position]
    chosen = np.isin(run.ids(0, STEPS), [3, 5, 7])
    asked = run.sample_grads.sel(sample=[3, 5, 7])
    found = replay.compute(abs(asked).max(("step", "position")), abs(asked["out"]).max())
    assert found[0]["scale"] == abs(mine[chosen]).max()
    assert found[0]["out"].max() == found[1]["value"]


# ------------------------------------------------------------------------------------ the pieces


def test_a_constant_with_a_renamed_dimension_is_counted(run):
    largest = abs(run.weights.min("state").top_k(2, dim="weight").rename(rank="share"))
    found = (run.grads - largest).max("step").compute()
    each = run.grads.max("step").compute()["hidden/w"].values
    best = abs(run.weights.min("state").top_k(2, dim="weight").compute()["value"].values)
    assert found.sizes["share"] == 2
    names = ("share", *(dim for dim in found["hidden/w"].dims if dim != "share"))
    wanted = each[None] - best.reshape(2, *[1] * each.ndim)
    assert (found["hidden/w"].transpose(*names).values == wanted).all()  # rounding is monotone


def test_tensors_part_into_pieces_that_cover_them():
    parts = [nodes.Part("a", (3, 5)), nodes.Part("b", ()), nodes.Part("c", (9,), (8, 2, 4)),
             nodes.Part("none", (0, 4))]  # fmt: skip
    for limit, split in itertools.product(range(1, 22), (True, False)):
        found = tiles.parted(parts, limit, split=split)
        if not split and limit < 15:
            assert found is None
            continue
        assert found is not None and max(sum(p.size for p in tile) for tile in found) <= limit
        pieces = [piece for tile in found for piece in tile]
        for part in parts:
            mine = [piece for piece in pieces if piece.path == part.path]
            known = part.indices or range(part.size)
            assert [i for x in mine for i in x.indices or known] == list(known) or not part.size
    assert tiles.parted(parts, 8, split=True, least=8) is None


class Largest(Root):
    """Keeps the largest number."""

    exact = True

    def _merge(self, part):
        return lambda first, second: [np.maximum(first[0], second[0])]


def test_of_what_merges_in_any_order_one_state_is_held():
    root, other = Largest(nodes.Scan("run", "samples", (0, 3, 1))), Largest(None)  # type: ignore
    for number, x in enumerate([3, 9, 4]):
        root.push(number, 0, Cell({}, [[np.int32(x)]]))
    other.push(9, 0, Cell({}, [[np.int32(5)]]))
    other.absorb(root.state())
    assert root.found(0) == other.found(0) == [[9]]
    assert len(root.state()[1][0, 0]) == root.states([3 * root.span]) == 1


CUTS = [(0, 1), (0, 3), (5, 12), (7, 31), (13, 70)]


@pytest.mark.full
def test_functions_that_may_split_have_the_same_bits_beside_any_neighbours():
    random = np.random.Generator(np.random.Philox(1))
    x, y = (random.normal(size=(2, 70)) * np.exp(4 * random.normal(size=(2, 70)))).astype("f4")

    @jax.jit
    def all_of(x, y):
        found = []
        for name in sorted(tiles.ROUNDED):
            function, few = getattr(jnp, name), name.startswith(("logical", "bitwise", "invert"))
            given = (x > 0, y > x) if few else (x, y)
            if name == "where":
                found.append(function(x > y, x, y))
            elif name == "clip":
                found.append(function(x, -1.0, 1.0))
            else:
                one = name in ROUNDED_OF_ONE
                found.append(function(*given[: 1 if one else 2]))
        return found

    whole = [np.asarray(v) for v in all_of(x, y)]
    for a, b in CUTS:
        for name, v, w in zip(sorted(tiles.ROUNDED), all_of(x[a:b], y[a:b]), whole, strict=True):
            assert np.asarray(v).tobytes() == w[a:b].tobytes(), name


ROUNDED_OF_ONE = frozenset(
    "abs absolute positive negative sign square sqrt reciprocal rint floor ceil trunc isnan isinf "
    "isfinite signbit logical_not invert".split()
)


def folded(how, x, settings=()):
    """Fold `[steps, batch, weights]`, and return the leaves of the state."""
    part = nodes.Part("w", x.shape[2:])
    scan = nodes.Scan("run", "sample_grads", (0, len(x), 1), (part,))
    node = nodes.Reduce(scan, how, ("step", "position"), settings)
    start, step, _ = stepper(node, layouts(node)[0][0])
    state, valid = start([x[0]]), np.arange(x.shape[1]) > 0
    for i, row in enumerate(x):
        state = step(state, [row], np.int32(i), valid, None)
    return tiles.splits(node), [np.array(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("max", ()),
        ("sum", ()),
        full("min", ()),
        full("count", ()),
        full("hist", (("edges", (-1.0, 0.0, 1.0)),)),
        full("top_k", (("k", 3), ("smallest", False))),
        full("norm", ()),
        full("var", (("ddof", 0),)),
    ],
)
def test_folds_that_may_split_have_the_same_bits_beside_any_neighbours(how, settings):
    random = np.random.Generator(np.random.Philox(2))
    x = (random.normal(size=(3, 13, 70)) * np.exp(3 * random.normal(size=(3, 13, 70)))).astype("f4")
    x[:, :, ::7] = np.round(x[:, :, ::7])  # ties
    x[1, 4, 3:9] = np.nan
    may, whole = folded(how, x, settings)
    same = all(
        np.array_equal(part, all_[a:b], equal_nan=True)
        for a, b in CUTS
        for part, all_ in zip(folded(how, x[:, :, a:b], settings)[1], whole, strict=True)
        if all_.shape[:1] == (70,)
    )
    assert same or not may
    assert may == (how not in ("sum", "norm", "var"))
