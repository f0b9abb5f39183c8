import io
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import replay
from replay.report import plot_loss, sparkline
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
