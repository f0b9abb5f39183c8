import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.ad_checkpoint import checkpoint_name

import replay
from replay.comparing import compare

compile_once = tiny.compile_once

OTHER = replay.Order.shuffled(batch_size=tiny.BATCH, epochs=3, seed=7)
TEST = {"x": tiny.DATA["x"][:5] + 1, "y": tiny.DATA["y"][:5]}

# Sums of 20 squares in float64: each rounding is at most 2**-53 of the result.
ROUNDING = {"rtol": 32 * 2.0**-53, "atol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    return tiny.record(folder / "tiny")


@pytest.fixture(scope="module")
def other(folder):
    """Twelve steps in another order."""
    return tiny.record(folder / "other", order=OTHER)


@pytest.fixture(scope="module")
def swapped(folder):
    return tiny.record(folder / "swapped", order=tiny.ORDER.swap(12, 13))


@functools.cache
def flat(run, state):
    """Return the weights of a state in float64, one tensor after the other."""
    params = run.state(state).params
    return np.concatenate([params[name].ravel() for name in tiny.WEIGHTS]).astype(np.float64)


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


# ------------------------------------------------------------------------------------- distances


def test_distances_and_cosines_are_those_of_the_weights_of_each_state(run, swapped):
    found = compare(run, swapped, states=[5, 16, 24], train=0).distances
    assert found["state"].values.tolist() == [5, 16, 24]
    assert found["run"].values.tolist() == ["tiny", "swapped"]
    assert found["tensor"].values.tolist() == ["hidden", "out"]
    for state in (5, 16, 24):
        at = found.sel(state=state, run="swapped")
        a, b, a0, b0 = flat(run, state), flat(swapped, state), flat(run, 0), flat(swapped, 0)
        expected = {
            "distance": np.linalg.norm(a - b),
            "cosine": cosine(a, b),
            "moved": np.linalg.norm(b - b0),
            "moved_cosine": cosine(a - a0, b - b0),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(at[name].item(), value, **ROUNDING)
        for tensor, part in (("hidden", slice(0, 15)), ("out", slice(15, 20))):
            mine = at.sel(tensor=tensor)
            np.testing.assert_allclose(
                mine["tensor_distance"].item(), np.linalg.norm((a - b)[part]), **ROUNDING
            )
            np.testing.assert_allclose(
                mine["tensor_moved_cosine"].item(), cosine((a - a0)[part], (b - b0)[part]),
                **ROUNDING,
            )  # fmt: skip
    assert found["distance"].values[1, 0] == 0 < found["distance"].values[1, 1]


def test_a_run_is_at_no_distance_from_itself_and_never_parts_from_it(run):
    both = compare(run, run, test=TEST)
    assert both.names == ("tiny", "tiny (2)")
    for prefix in ("", "tensor_"):
        assert (both.distances[f"{prefix}distance"].values == 0).all()
        assert (both.distances[f"{prefix}cosine"].values == 1).all()
        assert (both.distances[f"{prefix}moved_cosine"].values[:, 1:] == 1).all()
    for on in ("train", "test"):
        losses = both.losses(on)["loss"].values
        assert (losses[0] == losses[1]).all()
        assert (both.samples(3, on=on)["difference"].values == 0).all()
    parting = both.partings["tiny (2)"]
    assert parting.never and parting.settings == ()
    assert str(parting).startswith("never differ: the same samples and losses in all 24 steps")


def test_tensors_are_matched_by_their_names_in_whatever_order_programs_list_them(folder):
    class Reversed(NamedTuple):
        b: np.ndarray
        a: np.ndarray

    def loss(params, example, key):
        params = params._asdict() if isinstance(params, Reversed) else params
        return ((example["x"] * params["a"]).sum() + params["b"].sum() * example["y"]) ** 2

    a, b = np.ones(3, np.float32), np.full(3, 2, np.float32)
    first, other = (
        tiny.record(folder / name, replay.Program(params, loss, optax.sgd(1e-3)))
        for name, params in (("by name", {"a": a, "b": b}), ("reversed", Reversed(b, a)))
    )
    assert [leaf.path for leaf in other.tensors] == ["b", "a"]
    both = compare(first, other)
    for prefix in ("", "tensor_"):
        assert (both.distances[f"{prefix}distance"].values == 0).all()
        assert (both.distances[f"{prefix}moved_cosine"].values[:, 1:] == 1).all()
    assert both.distances["tensor"].values.tolist() == ["a", "b"]
    moved = [np.linalg.norm(other.state(-1).params[name] - x) for name, x in (("a", a), ("b", b))]
    found = both.distances["tensor_moved"].sel(run="reversed", state=tiny.STEPS)
    np.testing.assert_allclose(found, moved, rtol=1e-6)


def test_a_run_that_was_trained_on_in_between_is_another(folder):
    with tiny.recorder(folder / "growing") as recorder:
        recorder.advance(8)
    early = replay.open(folder / "growing")
    with tiny.recorder(folder / "growing", resume=True) as recorder:
        recorder.advance()
    late = replay.open(folder / "growing")
    both = compare(early, late, replay.open(folder / "growing"))
    assert [run.steps for run in both.runs] == [8, 24, 24]
    assert both.runs[1] is both.runs[2]
    assert (both.sel(state=8).distances["distance"].values == 0).all()
    assert (both.travelled()["travelled"].values == both.travelled()["travelled"].values[0]).all()


def test_a_run_that_is_opened_twice_is_one_run(run):
    both = compare(run, replay.open(run.path), test=TEST, states=[3])
    assert (both.distances["distance"].values == 0).all()
    assert both.distances.attrs["steps"] == 3


def test_states_that_are_stored_are_compared_without_a_replay(run, swapped):
    both = compare(run, swapped, test=TEST)
    assert both.states == (0, 8, 16, 24)
    assert both.progress.attrs["steps"] == both.distances.attrs["steps"] == 0
    assert both.distances.attrs["grade"] == "BITWISE"


def test_all_that_is_asked_at_a_state_takes_one_replay_of_each_run(run, swapped, monkeypatch):
    both = compare(run, swapped, test=TEST).sel(state=13)
    asked = []
    through = replay.replaying.Replayer.steps

    def counted(self, start, stop, **options):
        asked.append((start, stop))
        return through(self, start, stop, **options)

    monkeypatch.setattr(replay.replaying.Replayer, "steps", counted)
    assert both.distances["state"].values.tolist() == [13]
    assert {"train_loss", "test_loss", "distance"} <= set(both.progress.data_vars)
    both.samples(2), both.tables()
    assert asked == [(8, 13), (8, 13)]
    assert both.distances.attrs["steps"] == 10


def test_weights_that_do_not_fit_at_once_are_compared_in_portions_with_the_same_result(
    run, swapped
):
    whole = compare(run, swapped, states=slice(None), test=TEST)
    parts = compare(run, swapped, states=slice(None), test=TEST, memory=8 * 4 * 20 * 3)
    for answers in (lambda x: x.distances, lambda x: x.progress, lambda x: x.losses()):
        for name, values in answers(whole).data_vars.items():
            np.testing.assert_array_equal(values.values, answers(parts)[name].values)


def test_the_length_of_a_path_adds_up_the_updates(run, other):
    found = compare(run, other, states=[0, 5, 12], train=0).travelled()
    for name, each in (("tiny", run), ("other", other)):
        norms = [np.linalg.norm(flat(each, t + 1) - flat(each, t)) for t in range(12)]
        lengths = np.concatenate([[0.0], np.cumsum(norms)])[[0, 5, 12]]
        # Updates are float32 differences, their norms float32 sums of 20 squares.
        np.testing.assert_allclose(found["travelled"].sel(run=name), lengths, rtol=1e-5)


def test_many_runs_are_compared_with_the_first(run, other, swapped):
    found = compare(run, swapped, other, names=["a", "b", "c"], states=[8], train=0)
    distances = found.distances["distance"].sel(state=8)
    assert distances.sel(run="a") == 0
    for name, each in (("b", swapped), ("c", other)):
        expected = np.linalg.norm(flat(each, 8) - flat(run, 8))
        np.testing.assert_allclose(distances.sel(run=name).item(), expected, **ROUNDING)
    assert list(found.partings) == ["b", "c"]


# -------------------------------------------------------------------------------- where they part


def test_the_first_step_and_state_that_differ_are_read_from_the_logs(run, swapped):
    parting = compare(run, swapped).partings["swapped"]
    assert (parting.samples, parting.losses, parting.state) == (12, 12, 16)
    assert (parting.agreed, parting.tensor) == (8, "params/hidden")
    assert (parting.forked, parting.settings) == (None, ("order",))
    assert str(parting) == (
        "samples, or their factors, first differ at step 12; losses first differ at step 12; "
        "state 8 agrees, state 16 differs, first in params/hidden; other order"
    )


def test_copies_of_a_recording_never_differ(run, folder):
    again = tiny.record(folder / "again")
    parting = compare(run, again).partings["again"]
    assert parting.never
    assert (parting.steps, parting.states, parting.agreed) == (24, 4, 24)


def test_another_key_parts_losses_of_the_same_samples(run, folder):
    keyed = tiny.record(folder / "keyed", key=jax.random.key(6))
    parting = compare(run, keyed).partings["keyed"]
    assert (parting.samples, parting.losses, parting.state) == (None, 0, 8)
    assert parting.settings == ("key",)


def test_a_factor_of_a_loss_parts_samples_before_losses(run, folder):
    factors = np.ones(tiny.SAMPLES, np.float32)
    factors[3] = 0
    weighted = tiny.record(folder / "weighted", sample_weights=factors)
    first = int(np.flatnonzero((run.ids(0, 24) == 3).any(axis=1))[0])
    parting = compare(run, weighted).partings["weighted"]
    assert (parting.samples, parting.losses) == (first, first + 1)


def test_batches_of_another_size_part_at_once(run, folder):
    order = replay.Order.shuffled(batch_size=8, epochs=2, seed=1)
    wide = tiny.record(folder / "wide", order=order)
    parting = compare(run, wide).partings["wide"]
    assert (parting.samples, parting.losses) == (0, 0)
    assert parting.settings[:2] == ("order", "program")


def test_another_optimizer_is_compared_by_the_leaves_that_both_have(run, folder):
    program = replay.Program(tiny.WEIGHTS, tiny.loss, optax.adam(0.01), name="tiny")
    adam = tiny.record(folder / "adam", program)
    parting = compare(run, adam).partings["adam"]
    assert (parting.samples, parting.losses, parting.state) == (None, 1, 8)
    assert (parting.agreed, parting.tensor) == (0, "params/hidden")
    assert parting.settings == ("program",)


def test_forks_part_from_their_parent_and_from_each_other(run, folder):
    first = run.fork(folder / "first", at=10, order=lambda order: order.swap(14, 15))
    empty = run.fork(folder / "empty", at=6)
    second = first.fork(folder / "second", at=18, order=lambda order: order.swap(20, 21))
    found = compare(run, first, empty, second).partings
    assert [found[name].forked for name in ("first", "empty", "second")] == [10, 6, 10]
    assert found["empty"].never
    assert [found[name].samples for name in ("first", "second")] == [14, 14]
    among = compare(first, second, empty).partings
    assert (among["second"].forked, among["second"].samples) == (18, 20)
    assert (among["empty"].forked, among["empty"].samples) == (6, 14)


# ------------------------------------------------------------------------------- what was learned


def test_progress_is_the_mean_loss_of_the_same_samples_at_each_state(run, swapped):
    both = compare(run, swapped, test=TEST, train=[2, 7, 11], states=[8, 24])
    picked = {name: leaf[[2, 7, 11]] for name, leaf in tiny.DATA.items()}
    for name, samples in (("train", picked), ("test", TEST)):
        for place, each in enumerate((run, swapped)):
            losses = each.on(samples).sample_losses.sel(state=[8, 24]).compute()["value"].values
            assert (both.losses(name)["loss"].values[place] == losses).all()
            means = losses.astype(np.float64).mean(axis=1)
            assert (both.progress[f"{name}_loss"].values[place] == means).all()
    assert both.losses("train")["sample"].values.tolist() == [2, 7, 11]
    assert both.progress["distance"].equals(both.distances["distance"])


def test_the_samples_that_differ_most_come_first(run, swapped):
    both = compare(run, swapped, train=16)
    losses = both.losses()["loss"].values[:, -1].astype(np.float64)
    differences = losses[1] - losses[0]
    best = np.argsort(-np.abs(differences), kind="stable")[:4]
    found = both.samples(4).sel(run="swapped")
    assert found["sample"].values.tolist() == best.tolist()
    assert (found["difference"].values == differences[best]).all()
    assert (found["loss"].values == losses[1][best]).all()
    assert (found["reference"].values == losses[0][best]).all()


def test_training_samples_are_spaced_evenly_and_can_be_left_out(run, swapped):
    assert compare(run, swapped, train=4).tested[0].ids.tolist() == [0, 5, 10, 15]
    bare = compare(run, swapped, train=0)
    assert list(bare.progress.data_vars) == ["moved", "distance"]
    with pytest.raises(replay.QueryError, match="compared without samples"):
        bare.losses()


@pytest.fixture(scope="module")
def classified(folder):
    """Two runs of a classifier that tags its logits."""
    random = np.random.Generator(np.random.Philox(3))
    data = {
        "x": random.normal(size=(12, 4)).astype(np.float32),
        "label": random.integers(0, 3, 12).astype(np.int32),
    }

    def loss(params, example, key):
        logits = checkpoint_name(example["x"] @ params["w"], "logits")
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    program = replay.Program({"w": np.eye(4, 3, dtype=np.float32)}, loss, optax.sgd(0.5))
    orders = [replay.Order.shuffled(batch_size=4, epochs=4, seed=seed) for seed in (0, 1)]
    runs = [
        tiny.record(folder / f"classified{i}", program, data, order)
        for i, order in enumerate(orders)
    ]
    return runs, data


def right(run, state, data):
    logits = data["x"] @ run.state(state).params["w"]
    return float((logits.argmax(axis=-1) == data["label"]).mean())


def test_accuracy_is_read_from_tagged_logits_or_told_by_a_function(classified):
    (a, b), data = classified
    test = {name: leaf[:7] for name, leaf in data.items()}

    def accuracy(params, batch):
        return (batch["x"] @ params["w"]).argmax(-1) == batch["label"]

    tagged = compare(a, b, test=test, states=[0, 5, 12])
    told = compare(a, b, test=test, states=[0, 5, 12], accuracy=accuracy)
    for found in (tagged, told):
        for place, each in enumerate((a, b)):
            for name, samples in (("test", test), ("train", data)):
                expected = [right(each, state, samples) for state in (0, 5, 12)]
                assert found.progress[f"{name}_accuracy"].values[place].tolist() == expected
    assert "activations 'logits'" in tagged.progress.attrs["accuracy"]
    assert told.progress.attrs["accuracy"] == "the function accuracy(params, batch)"
    untagged = compare(a, b, test=test, logits="no")
    assert "test_accuracy" not in untagged.progress
    assert untagged.progress.attrs["accuracy"].startswith("unknown: pass accuracy=")


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        (lambda z: z[0], [0, 1]),  # one number: its largest is always the first
        (lambda z: z[:1], [0, 1]),
        (lambda z: z[:2], [0, 1, 2]),  # a class that has no logit
        (lambda z: z[:2], [-1, 1]),
        (lambda z: jnp.stack([z, z]), [0, 1]),  # of each of several tokens
    ],
)
def test_what_is_no_logit_for_each_class_tells_no_accuracy(logits, label, tmp_path):
    data = {"x": tiny.DATA["x"], "label": np.resize(np.int32(label), tiny.SAMPLES)}

    def loss(params, example, key):
        tagged = checkpoint_name(logits(example["x"] @ params["w"]), "logits")
        return (tagged**2).sum() + 0 * example["label"].astype(jnp.float32)

    program = replay.Program({"w": np.eye(3, dtype=np.float32)}, loss, optax.sgd(0.1))
    run = tiny.record(tmp_path / "run", program, data)
    both = compare(run, run, test={name: x[:2] for name, x in data.items()}, states=[8])
    assert set(both.progress.data_vars) == {"train_loss", "test_loss", "moved", "distance"}
    assert both.progress.attrs["accuracy"].startswith("unknown: pass accuracy=")


def test_runs_of_which_one_has_other_logits_tell_no_accuracy(classified, folder):
    (a, _), data = classified

    def loss(params, example, key):
        logits = checkpoint_name((example["x"] @ params["w"])[0], "logits")
        return (logits - example["label"]) ** 2

    with jax.numpy_dtype_promotion("standard"):
        program = replay.Program({"w": np.eye(4, 3, dtype=np.float32)}, loss, optax.sgd(0.01))
        b = tiny.record(folder / "one logit", program, data)
    assert "train_accuracy" in compare(a, a, states=[0]).progress
    assert "train_accuracy" not in compare(a, b, states=[0]).progress


def test_a_function_of_accuracy_tells_of_every_sample(run, swapped):
    both = compare(run, swapped, accuracy=lambda params, batch: jnp.mean(batch["y"]))
    with pytest.raises(replay.QueryError, match=r"accuracy returned \[\] for a batch of 16"):
        both.progress  # noqa: B018


def test_curves_hold_what_all_runs_have_logged(run, other):
    curves = compare(run, other).curves
    assert (curves["loss"].values[0] == run.history()["loss"]).all()
    assert (curves["loss"].values[1, :12] == other.history()["loss"]).all()
    assert np.isnan(curves["loss"].values[1, 12:]).all()
    assert curves.attrs["grade"] == "LOGGED"


def test_a_name_that_one_run_logs_by_step_and_another_by_state_is_two_curves(run, folder):
    def with_metric(params, example, key):
        return tiny.loss(params, example, key), {"accuracy": example["y"]}

    by_step = tiny.record(folder / "by step", tiny.program(with_metric))
    with tiny.recorder(folder / "by state") as recorder:
        while recorder.advance(8):
            recorder.log(accuracy=float(recorder.step), other=1.0)
    curves = compare(by_step, replay.open(folder / "by state"), run).curves
    assert set(curves.data_vars) == {"loss", "accuracy", "logged/accuracy", "other"}
    assert (curves["accuracy"].values[0] == by_step.history()["accuracy"]).all()
    assert np.isnan(curves["accuracy"].values[1:]).all()
    assert curves["logged/accuracy"].values[1, [8, 16, 24]].tolist() == [8.0, 16.0, 24.0]
    assert np.isnan(curves["logged/accuracy"].values[[0, 2]]).all()


# ----------------------------------------------------------------------------- states and refusals


def test_runs_of_different_length_are_compared_over_the_states_that_both_have(run, other):
    both = compare(run, other)
    assert both.states == (0, 8, 12)
    assert both.note == (
        "tiny has 24 steps, other has 12 steps: compared up to state 12, which all have"
    )
    assert both.sel(state=-1).states == (12,)
    assert both.sel(state=slice(None, None, 5)).states == (0, 5, 10)
    assert both.note in repr(both)
    assert compare(run, run).note == ""


def test_runs_of_another_architecture_are_refused_with_the_first_difference(run, folder):
    weights = {"hidden": tiny.WEIGHTS["hidden"][:, :4].copy(), "out": tiny.WEIGHTS["out"][:4]}
    narrow = tiny.record(folder / "narrow", tiny.program(init=weights))
    with pytest.raises(replay.QueryError) as caught:
        compare(run, narrow)
    assert caught.value.what.endswith("hidden is [3, 5] in one and [3, 4] in the other")
    assert "each with that of the same tensor" in caught.value.why
    assert "runs of one architecture" in caught.value.fix


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda a, b: compare(a), "1 run is compared"),
        (lambda a, b: compare(a, b, states=13), "the runs are compared at state 13"),
        (lambda a, b: compare(a, b).sel(state=[3, 13]), "the runs are compared at state 13"),
        (lambda a, b: compare(a, b, states=[]), "the runs are compared at no state"),
        (lambda a, b: compare(a, b, states="x"), "the runs are compared at states='x'"),
        (lambda a, b: compare(a, b, states=1.5), "the runs are compared at states=1.5"),
        (lambda a, b: compare(a, b, states=[[1], [2, 3]]), "the runs are compared at states="),
        (lambda a, b: compare(a, b, states=slice(0.5)), "the runs are compared at states="),
        (lambda a, b: compare(a.path, b), "'/"),
        (lambda a, b: compare(a, b, train=[0.5]), "train=[0.5]"),
        (lambda a, b: compare(a, b, train=2.5), "train=2.5"),
        (lambda a, b: compare(a, b, names=["x"]), "1 names, 1 of them different, for 2 runs"),
        (lambda a, b: compare(a, b, names=["x", "x"]), "2 names, 1 of them different, for 2"),
        (lambda a, b: compare(a, b, train=[16]), "there is no training sample 16"),
        (lambda a, b: compare(a, b).samples(0), "top is 0"),
        (lambda a, b: compare(a, b).losses("test"), "the runs were compared without samples"),
        (lambda a, b: compare(a, b, test={"x": np.ones(3, np.float32)}), "examples of x"),
    ],
)
def test_what_cannot_be_compared_is_refused_when_it_is_asked(ask, what, run, other):
    with pytest.raises(replay.ReplayError) as caught:
        ask(run, other)
    assert caught.value.what.startswith(what)
    assert caught.value.why and caught.value.fix


# ------------------------------------------------------------------------------- how it is shown


def test_what_it_takes_is_told_and_nothing_is_replayed(run, swapped):
    both = compare(run, swapped, states=[5])
    told = both.explain()
    assert f"replay 5 steps of {run.path}" in told and f"5 steps of {swapped.path}" in told
    assert "_found" not in vars(both)


def test_it_is_told_in_a_few_lines(run, swapped):
    shown = repr(compare(run, swapped)).splitlines()
    assert shown[0] == "<Comparison of 2 runs at 4 states (0 to 24): 20 weights in 2 tensors"
    assert shown[1] == f"  tiny: 24 steps of {run.path}, the reference"
    assert shown[2].startswith(f"  swapped: 24 steps of {swapped.path}: samples, or their factors")


def test_tables_hold_the_numbers_of_the_answers(run, swapped):
    both = compare(run, swapped, test=TEST)
    parted, progress, apart, samples = both.tables(3)
    assert parted.rows == [("swapped", "never", "12", "12", "16", "params/hidden")]
    assert [row[:2] for row in progress.rows[:3]] == [
        ("0", "tiny"),
        ("0", "swapped"),
        ("8", "tiny"),
    ]
    assert progress.rows[-1][progress.columns.index("test loss")] == (
        f"{both.progress['test_loss'].values[1, -1]:.4g}"
    )
    assert [row[:3] for row in apart.rows] == [
        ("swapped", name, f"{both.distances['tensor_distance'].values[1, -1, i]:.4g}")
        for i, name in enumerate(("hidden", "out"))
    ]
    assert [int(row[1]) for row in samples.rows] == both.samples(3)["sample"].values[1].tolist()


@pytest.mark.parametrize("states", [None, 24])
def test_a_picture_is_drawn_and_written(states, run, swapped, tmp_path):
    both = compare(run, swapped, test=TEST, states=states)
    figure = both.plot(tmp_path / "compared.png")
    assert (tmp_path / "compared.png").read_bytes().startswith(b"\x89PNG")
    labels = [ax.get_title(loc="left") for ax in figure.axes]
    assert "tensors at state 24" in labels
    assert "held-out samples that differ most at state 24" in labels
    far = both.distances["distance"].values[1, -1]
    assert (
        figure.get_suptitle()
        .replace("\n", " ")
        .startswith(f"tiny and swapped at state 24: {far:.3g} apart")
    )
    if states is None:
        (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == "all weights"]
        drawn = [line.get_ydata().tolist() for line in ax.get_lines()]
        moved = both.distances["moved"].values
        assert drawn == [*moved.tolist(), both.distances["distance"].values[1].tolist()]


def test_more_runs_than_there_are_colours_and_equal_runs_are_drawn(run):
    figure = compare(*[run] * 9).plot()
    figure.savefig(io.BytesIO(), format="png")
    assert "2 more runs are not drawn" in figure.get_supxlabel()
    assert "the losses of all samples are the same" in {
        text.get_text() for ax in figure.axes for text in ax.texts
    }
