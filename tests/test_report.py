import io
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import replay
from replay import questions, report
from replay.report import draw_result, plot_loss, sparkline
from replay.results import Result
from replay.tree import Leaf

PROGRAM = replay.Program(
    {"w": np.ones(3, np.float32)},
    lambda params, example, key: jnp.sum(params["w"] * example) ** 2,
    optax.sgd(0.01),
)
SAMPLES = np.linspace(0.1, 1.0, 24, dtype=np.float32).reshape(8, 3)


def record(path, *, steps=100, data=SAMPLES, program=PROGRAM, each=None):
    """Record steps of two samples, four to an epoch; `each` is called with the recorder."""
    order = replay.Order.shuffled(2, -(-steps // 4), seed=0)
    options = {"key": jax.random.key(0), "checkpoints": 10, "self_test": False}
    with replay.Recorder(path, program, data, order, **options) as recorder:
        while recorder.step < steps:
            recorder.advance(1)
            if each is not None:
                each(recorder)
    return replay.open(path)


def logged(loss, *, name="run", **columns):
    """Stand in for a run of three weights that has logged these columns."""
    steps = len(loss)
    history = {"step": np.arange(steps), "loss": np.asarray(loss, np.float32), **columns}
    return types.SimpleNamespace(
        path=f"runs/{name}",
        steps=steps,
        checkpoints=[0, steps],
        tensors=(Leaf("w", (3,), "float32"),),
        history=lambda: history,
    )


def draw(figure):
    """Render, as some mistakes show only then; warnings are errors."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_picture_names_the_run_its_units_and_what_is_drawn(tmp_path):
    figure = plot_loss(record(tmp_path / "digits"))
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "digits: 100 steps, 3 weights"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (mean of the batch)")
    assert legend(ax) == ["each step", "running median of 5", "stored states (11)"]
    assert draw(figure).startswith(b"\x89PNG")


def test_every_loss_and_every_stored_state_is_drawn_where_it_belongs(tmp_path):
    run = record(tmp_path / "run")
    each, _, stored = plot_loss(run).axes[0].get_lines()[:3]
    assert each.get_xdata()[::2].tolist() == list(range(100))
    assert each.get_ydata()[::2].tolist() == run.history()["loss"].tolist()
    assert each.get_ydata()[1::2].tolist() == run.history()["loss"].tolist()
    assert stored.get_xdata().tolist() == list(range(0, 101, 10))


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (20, ["epoch 0", "1", "2", "3", "4"]),
        (46, ["epoch 0", *map(str, range(1, 12))]),
        (200, ["epoch 0", *map(str, range(5, 50, 5))]),
    ],
)
def test_the_top_names_up_to_twelve_epochs_where_they_begin(steps, names):
    figure = plot_loss(logged(np.ones(steps), epoch=np.arange(steps) // 4))
    (top,) = figure.axes[0].child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == names
    assert top.get_xticks().tolist() == [4 * int(name.split()[-1]) for name in names]
    assert draw(figure)


def test_metrics_between_0_and_1_share_a_panel_and_others_have_their_own(tmp_path):
    def each(recorder):
        if recorder.step % 10 == 0:
            recorder.log(accuracy=recorder.step / 20, area=0.5, temperature=-3.0)

    figure = plot_loss(record(tmp_path / "run", steps=20, each=each))
    _, fractions, temperature = figure.axes
    assert legend(fractions) == ["accuracy", "area"]
    assert fractions.get_lines()[0].get_xdata().tolist() == [10, 20]
    assert fractions.get_lines()[0].get_ydata().tolist() == [0.5, 1.0]
    assert (fractions.get_ylabel(), temperature.get_ylabel()) == ("metrics", "temperature")
    assert draw(figure)


def test_a_metric_called_loss_leaves_the_losses_alone(tmp_path):
    plain = record(tmp_path / "plain", steps=8)

    def loss(params, example, key):
        value = jnp.sum(params["w"] * example) ** 2
        return value, {"loss": value + 7}

    program = replay.Program({"w": np.ones(3, np.float32)}, loss, optax.sgd(0.01))
    run = record(tmp_path / "x", steps=8, program=program, each=lambda r: r.log(loss=9.0, step=5))
    history = run.history()
    assert history["loss"].tolist() == plain.history()["loss"].tolist()
    assert history["step"].tolist() == list(range(8))
    assert (history["aux/loss"] > 7).all()
    assert history["logged/loss"][1:].tolist() == [9.0] * 8
    labels = [text for ax in plot_loss(run).axes[1:] for text in legend(ax)]
    assert labels == ["aux/loss", "logged/loss", "logged/step"]


def test_a_run_that_was_fed_is_drawn_without_epochs(tmp_path, capsys):
    with replay.Recorder(tmp_path / "fed", PROGRAM, key=jax.random.key(0)) as recorder:
        for _ in range(3):
            recorder.feed(SAMPLES[:4])
    figure = plot_loss(replay.open(tmp_path / "fed"))
    assert figure.axes[0].child_axes == []
    assert figure.axes[0].get_title(loc="left") == "fed: 3 steps, 3 weights"
    assert draw(figure)


@pytest.mark.parametrize(("steps", "title"), [(0, "0 steps"), (1, "1 step")])
def test_a_run_that_has_hardly_begun_is_drawn(steps, title):
    figure = plot_loss(logged(np.ones(steps), epoch=np.zeros(steps, np.int64)))
    assert figure.axes[0].get_title(loc="left") == f"run: {title}, 3 weights"
    assert draw(figure)


@pytest.fixture
def exploded(tmp_path):
    """A run whose losses are not finite wherever sample 3 occurs, and nowhere else."""

    def loss(params, example, key):
        value = jnp.sum(params["w"] * jnp.minimum(example, 1.0)) ** 2
        return jnp.where(jax.lax.stop_gradient(example[0]) > 1, jnp.nan, 1.0) + 0.0 * value

    data = np.where(np.arange(8)[:, None] == 3, np.float32(2), SAMPLES)
    program = replay.Program({"w": np.ones(3, np.float32)}, loss, optax.set_to_zero())
    with pytest.warns(RuntimeWarning, match="the mean loss of step 3 is nan"):
        return record(tmp_path / "run", steps=100, data=data, program=program)


def test_losses_that_are_not_finite_are_red_and_the_first_is_named(exploded):
    bad = np.flatnonzero(np.isnan(exploded.history()["loss"])).tolist()
    assert (bad[0], len(bad)) == (3, 25)
    figure = plot_loss(exploded)
    ax = figure.axes[0]
    assert "not finite: step 3 (nan) and 24 more" in legend(ax)
    (marks,) = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert marks.get_xdata().tolist() == bad
    assert marks.get_color() == "#d50000"
    assert draw(figure)


@pytest.mark.parametrize(
    ("least", "scale"), [(0.001, "log"), (0.01, "log"), (0.5, "linear"), (-1.0, "linear")]
)
def test_the_scale_is_logarithmic_where_losses_span_more_than_a_factor_of_ten(least, scale):
    figure = plot_loss(logged(np.linspace(2.0, least, 100)))
    assert figure.axes[0].get_yscale() == scale
    assert draw(figure)


def test_one_step_that_nearly_vanishes_does_not_make_the_scale_logarithmic():
    figure = plot_loss(logged([1e-9] + [1.0] * 99))
    assert figure.axes[0].get_yscale() == "linear"


def test_a_long_run_is_drawn_with_at_most_two_points_a_pixel():
    loss = np.ones(100_000)
    loss[54_321] = 3.0
    each = plot_loss(logged(loss)).axes[0].get_lines()[0]
    assert len(each.get_xdata()) == 4000
    assert each.get_ydata().max() == 3.0


def test_of_very_many_metrics_the_first_twenty_are_drawn():
    metrics = {f"m{i}": np.full(4, 2.0) for i in range(23)}
    *_, last = plot_loss(logged(np.ones(3), **metrics)).axes
    assert last.get_ylabel() == "m19"
    assert last.get_xlabel() == "step (3 more metrics are not drawn)"


def test_names_from_a_record_are_plain_text():
    hostile = "$\\frac{$ \x1b[31m_"
    figure = plot_loss(logged(np.ones(3), name=hostile, **{hostile: np.full(4, 2.0)}))
    assert figure.axes[0].get_title(loc="left") == "\\$\\frac{\\$ ?[31m_: 3 steps, 3 weights"
    assert legend(figure.axes[1]) == ["\\$\\frac{\\$ ?[31m_"]
    assert draw(figure)


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend():
    assert legend(plot_loss(logged(np.ones(3), _secret=np.full(4, 0.5))).axes[1]) == ["secret"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(replay.ReplayError, match="matplotlib is not installed") as caught:
        plot_loss(logged([1.0]))
    assert caught.value.fix == 'pip install "jax-replay[plot]"'


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([5.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([3.0, float("nan"), 1.0, float("inf")], "█×▁×"),
        ([float("nan")], "×"),
        ([-1.7e308, 1.7e308], "▁█"),
    ],
)
def test_a_sparkline_spans_its_finite_values(values, line):
    assert sparkline(values) == line


def test_a_sparkline_takes_the_median_of_what_shares_a_character():
    assert sparkline([0, 0, 9, 7, 7, 0], width=2) == "▁█"
    assert len(sparkline(np.arange(1000))) == 60


# ------------------------------------------------------------------------ answers of any kind


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("runs") / "tiny")


def title(figure):
    return figure.get_suptitle()


def values_of_bars(ax):
    return [patch.get_width() for patch in ax.patches]


def names_of_bars(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


EDGES = [0.01, 0.1, 1.0]
THIRDS = np.arange(tiny.SAMPLES) % 3

ANSWERS = {
    "a number": lambda run: run.grads.norm().compute(),
    "a line over steps": lambda run: run.grads.norm("weight").compute(),
    "lines over steps": lambda run: run.grads.groupby("tensor").norm().compute(),
    "a condition": lambda run: (run.column("loss") > 1).compute(),
    "epochs": lambda run: run.sample_losses.groupby("epoch").mean(("step", "position")).compute(),
    "quantiles": lambda run: run.sample_losses.quantile([0.1, 0.9], "position").compute(),
    "samples": lambda run: run.sample_losses.groupby("sample").mean().compute(),
    "a histogram": lambda run: abs(run.grads).hist(EDGES).compute(),
    "histograms": lambda run: abs(run.grads).hist(EDGES, "weight").compute(),
    "a ranking": lambda run: abs(run.updates).sum("step").top_k(3, "weight").compute(),
    "a ranking for each weight": lambda run: run.sample_grads.top_k(
        2, ("step", "position")
    ).compute(),
    "a ranking for each tensor": lambda run: (
        abs(run.updates).by("tensor").top_k(2, "step").compute()
    ),
    "tensors": lambda run: abs(run.updates).by("tensor").sum("step").compute(),
    "units": lambda run: abs(run.updates).groupby("unit").sum().sum("step").compute(),
    "groups": lambda run: abs(run.sample_updates).by("tensor").groupby(THIRDS).sum().compute(),
    "a state": lambda run: run.weights.sel(state=5).compute(),
    "a weight": lambda run: run.weights["hidden", 1, 2].compute(),
    "some weights": lambda run: run.weights["out"].compute(),
    "a tensor over states": lambda run: run.weights["hidden"].compute(),
    "all sample gradients": lambda run: run.sample_grads.compute(),
    "the last samples": lambda run: run.samples.before(9, last=5).compute(),
    "samples and what they did": lambda run: (
        run.samples.before(9, last=5)
        .join(share=run.sample_updates["hidden", 1, 2], loss=run.sample_losses)
        .compute()
    ),
    "nothing": lambda run: run.samples.before(0, last=5).compute(),
    "clusters": lambda run: run.updates.cluster(3, windows=4),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_of_any_kind_is_drawn_with_its_title_and_its_grade(kind, trained):
    figure = ANSWERS[kind](trained).plot()
    assert draw(figure).startswith(b"\x89PNG")
    assert title(figure) and figure.get_supxlabel()
    for ax in figure.axes:
        if ax.axison and ax.get_visible() and ax.get_label() != "<colorbar>":
            assert ax.get_xlabel() or ax.get_ylabel()


def test_a_line_has_the_values_of_the_answer(trained):
    answer = trained.grads.norm("weight").compute()
    figure = answer.plot()
    (ax,) = figure.axes
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == list(range(tiny.STEPS))
    assert line.get_ydata().tolist() == answer["value"].values.tolist()
    assert (title(figure), ax.get_xlabel()) == ("norm over weight of grads", "step")
    assert figure.get_supxlabel() == "BITWISE, 24 steps replayed"


def test_a_ranking_is_drawn_as_bars_with_the_names_of_the_weights(trained):
    answer = abs(trained.updates).sum("step").top_k(3, dim="weight").compute()
    (ax,) = answer.plot().axes
    pairs = zip(answer["tensor"].values, answer["weight"].values, strict=True)
    assert names_of_bars(ax) == [f"{tensor}[{weight}]" for tensor, weight in pairs]
    assert values_of_bars(ax) == answer["value"].values.tolist()


def test_a_histogram_over_time_is_drawn_as_the_share_of_each_bin(trained):
    answer = abs(trained.grads).hist(EDGES, dim="weight").compute()
    ax, bar = answer.plot().axes
    (image,) = ax.get_images()
    counts = answer["value"].values.T
    assert np.ma.filled(image.get_array(), 0).tolist() == (100 * (counts / 20)).tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.01", "0.1", "1"]
    assert bar.get_ylabel() == "share of what was counted at each step (%)"


def test_edges_that_are_powers_of_two_are_named_so():
    assert report._edge_names(np.asarray([0.25, 2.0])) == ["$2^{-2}$", "$2^{1}$"]


def test_a_joined_answer_has_a_panel_for_each_of_its_parts(trained):
    figure = ANSWERS["samples and what they did"](trained).plot()
    share, loss = figure.axes
    assert (share.get_title(loc="left"), loss.get_title(loc="left")) == ("hidden[1,2]", "loss")
    ids = trained.ids(0, 9).reshape(-1)[-5:].tolist()
    assert [name.rpartition(" ")[2] for name in names_of_bars(loss)] == list(map(str, ids))


def test_a_state_is_drawn_as_an_image_of_each_tensor(trained):
    figure = trained.weights.sel(state=5).compute().plot()
    hidden = figure.axes[0].get_images()[0].get_array()
    assert np.asarray(hidden).tolist() == trained.state(5).params["hidden"].tolist()


def test_values_that_are_not_finite_are_marked_and_not_drawn():
    values = ("step", np.asarray([1.0, np.nan, np.inf, 2.0]))
    figure = draw_result(Result.of({"value": values}, {}, {"plan": ""}))
    _, marks = figure.axes[0].get_lines()
    assert marks.get_xdata().tolist() == [1, 2]
    assert legend(figure.axes[0]) == ["not finite: 2 of 4"]
    assert draw(figure)


def test_an_answer_with_hostile_names_is_drawn_as_plain_text():
    names = np.asarray(["$\\frac{$\x1b[31m", "b"])
    result = Result.of(
        {"value": (("tensor",), np.asarray([1.0, 2.0]))},
        {"tensor": names},
        {"plan": "scan x.grads: steps 0 to 3 of $\\frac{$"},
    )
    figure = draw_result(result)
    assert names_of_bars(figure.axes[0])[0] == "\\$\\frac{\\$?[31m"
    assert draw(figure)


# --------------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A run whose samples are pictures with a label."""
    random = np.random.Generator(np.random.Philox(3))
    data = {
        "image": random.integers(0, 16, (16, 4, 4, 1)).astype(np.uint8),
        "label": (np.arange(16) % 3).astype(np.int32),
    }

    def loss(params, example, key):
        logits = example["image"].astype(jnp.float32).reshape(-1) / 16 @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    program = replay.Program({"w": np.zeros((16, 3), np.float32)}, loss, optax.sgd(0.5))
    order = replay.Order.shuffled(4, 6, seed=1)
    options = {"key": jax.random.key(0), "checkpoints": 8, "self_test": False}
    return replay.record(
        tmp_path_factory.mktemp("runs") / "pictured", program, data, order, **options
    )


def pictures(ax):
    return [x for x in ax.artists if type(x).__name__ == "AnnotationBbox"]


def test_the_samples_that_moved_a_tensor_stand_beside_their_pictures(pictured):
    figure = report.plot_samples(pictured, epoch=1, top=3)
    (ax,) = figure.axes
    assert title(figure) == "pictured: samples that changed the weights most in epoch 1"
    assert len(pictures(ax)) == 3
    widths = values_of_bars(ax)
    assert widths == sorted(widths, reverse=True)
    for name in names_of_bars(ax):
        number, label = name.removeprefix("sample ").rstrip(")").split(" (")
        assert int(label) == int(number) % 3
    assert draw(figure)


def test_classes_are_ranked_without_pictures(pictured):
    (ax,) = report.plot_samples(pictured, epoch=1, by="label").axes
    assert sorted(names_of_bars(ax)) == ["label 0", "label 1", "label 2"]
    assert sum(values_of_bars(ax)) == pytest.approx(100, rel=1e-4)
    assert pictures(ax) == []


def test_samples_of_other_kinds_are_named_without_pictures(trained):
    figure = report.plot_samples(trained, epoch=1, top=2)
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()] == [
        "all weights",
        "hidden",
        "out",
    ]
    assert not any(map(pictures, figure.axes))
    assert draw(figure)


def test_explosions_are_marked_where_they_are(trained):
    grads = abs(trained.grads).compute()
    flat = np.concatenate([grads["hidden"].values.reshape(24, -1), grads["out"].values], axis=1)
    bad = np.flatnonzero((flat > 2).mean(axis=1) > 0.1).tolist()
    assert 0 < len(bad) < 24
    figure = report.plot_explosions(trained, threshold=2)
    above, below = figure.axes
    assert title(figure) == (f"tiny: more than 10% of |gradients| exceed 2 first at step {bad[0]}")
    (marks,) = [line for line in above.get_lines() if line.get_marker() == "x"]
    assert marks.get_xdata().tolist() == bad
    shares = below.get_lines()[0].get_ydata()
    assert shares.tolist() == pytest.approx((100 * (flat > 2).mean(axis=1)).tolist())
    assert draw(figure)


def test_a_run_without_explosions_says_so(trained):
    figure = report.plot_explosions(trained)
    assert title(figure) == "tiny: more than 10% of |gradients| exceed 1024 at no step"
    assert draw(figure)


def test_a_weight_is_drawn_over_all_states_with_those_who_pushed_it(trained):
    path = trained.weights.compute()
    number = np.argmax((np.diff(np.sign(path["hidden"].values.reshape(25, -1)), axis=0)).any(0))
    name = f"hidden[{number // 5},{number % 5}]"
    figure = report.plot_weight(trained, name, last=4)
    above, below = figure.axes
    values = path["hidden"].values.reshape(25, -1)[:, number]
    assert above.get_lines()[0].get_ydata().tolist() == values.tolist()
    step = int(above.get_lines()[-1].get_xdata()[0]) - 1
    assert np.sign(values[step]) != np.sign(values[step + 1])
    ids = {f"sample {i}, step {step}" for i in trained.ids(step, step + 1)[0]}
    assert set(names_of_bars(below)) <= ids
    assert f"who led {name} to zero" in title(figure)
    assert draw(figure)


def test_a_weight_that_never_reaches_zero_is_drawn_alone(trained):
    values = np.abs(trained.weights["hidden"].compute()["hidden"].values).min(axis=0).reshape(-1)
    number = int(values.argmax())
    figure = report.plot_weight(trained, f"hidden[{number // 5},{number % 5}]")
    assert "the path of hidden" in title(figure)
    assert draw(figure)


def test_gradients_are_counted_between_powers_of_two(trained):
    figure = report.plot_gradients(trained, low=-8, high=2, tensor="hidden")
    assert title(figure) == "tiny: gradients of hidden"
    assert figure.axes[0].get_ylabel() == "|gradient| of a weight"
    assert draw(figure)


def test_the_paths_of_weights_are_ranked_by_layer_and_one_by_one(trained):
    figure = report.plot_weights(trained, top=5)
    layers, single = figure.axes
    assert sorted(names_of_bars(layers)) == ["hidden (15)", "out (5)"]
    assert len(names_of_bars(single)) == 5
    assert draw(figure)


def test_clusters_are_drawn_with_their_sizes_and_where_they_are(trained):
    figure = report.plot_clusters(trained, 3, windows=4)
    above, below = figure.axes
    sizes = [int(text.split()[2]) for text in legend(above)]
    assert sum(sizes) == 20 and sizes == sorted(sizes, reverse=True)
    assert names_of_bars(below) == ["hidden", "out"]
    assert draw(figure)


def test_two_runs_are_drawn_with_their_distance_at_every_state(trained):
    figure = report.plot_comparison(trained, trained, step=6)
    _, distance, _ = figure.axes
    assert distance.get_lines()[0].get_ydata().tolist() == [0.0] * 7
    assert draw(figure)


def test_without_matplotlib_nothing_is_replayed(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    question = questions.weights(trained)
    with pytest.raises(replay.ReplayError, match="matplotlib is not installed"):
        report.draw_question(question)
    assert "answers" not in vars(question)
