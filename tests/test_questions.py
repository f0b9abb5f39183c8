import numpy as np
import pytest
import tiny

import replay
from replay import questions
from replay.tree import Leaf

compile_once = tiny.compile_once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    order = replay.Order.shuffled(batch_size=tiny.BATCH, epochs=3, seed=7)
    return tiny.record(tmp_path_factory.mktemp("runs") / "reordered", order=order)


@pytest.fixture(scope="module")
def history(run):
    """Updates `[step, weight]` and gradients, flat, of every weight, tensor after tensor."""
    states = [state.params for _, state in run.states(slice(None))]
    flat = np.stack([np.concatenate([x["hidden"].ravel(), x["out"]]) for x in states])
    steps = list(run.trajectory())
    grads = [np.concatenate([x.grads["hidden"].ravel(), x.grads["out"]]) for x in steps]
    return flat, np.stack(grads)


def test_samples_are_ranked_by_the_sum_of_their_absolute_shares(run):
    (table,) = questions.samples(run, epoch=1, top=3).tables()
    shares = run.sample_updates.sel(epoch=1).compute()
    sums = sum(np.abs(shares[name].values).reshape(4, 4, -1).sum(axis=2) for name in tiny.WEIGHTS)
    by_sample = dict(zip(run.ids(4, 8).reshape(-1).tolist(), sums.reshape(-1), strict=True))
    best = sorted(by_sample, key=lambda sample: -by_sample[sample])[:3]
    rows = [row for row in table.rows if row[0] == "all weights"]
    assert table.columns == ("tensor", "rank", "sample", "sum |share|", "of the tensor")
    assert [int(row[2]) for row in rows] == best
    assert [float(row[3]) for row in rows] == pytest.approx([by_sample[i] for i in best], rel=1e-3)
    assert [row[0] for row in table.rows] == [
        *(name for name in ("all weights", "hidden", "out") for _ in range(3))
    ]


def test_a_pattern_narrows_the_tensors(run):
    (table,) = questions.samples(run, tensor="o*", top=2).tables()
    assert [row[0] for row in table.rows] == ["out", "out"]


def test_weights_are_ranked_by_their_paths_with_their_net_change(run, history):
    ranked, tensors = questions.weights(run, top=4).tables()
    flat, _ = history
    moved = np.diff(flat, axis=0)
    paths = np.abs(moved).sum(axis=0)
    names = [f"hidden[{i},{j}]" for i in range(3) for j in range(5)] + [
        f"out[{i}]" for i in range(5)
    ]
    best = np.argsort(-paths)[:4]
    assert [row[1] for row in ranked.rows] == [names[i] for i in best]
    assert [float(row[2]) for row in ranked.rows] == pytest.approx(paths[best], rel=1e-3)
    assert [float(row[3]) for row in ranked.rows] == pytest.approx(
        (flat[-1] - flat[0])[best], rel=1e-3
    )
    assert [row[:2] for row in tensors.rows] == [("hidden", "15"), ("out", "5")]


def test_two_runs_are_compared_at_the_same_state(run, other):
    question = questions.compare(run, other, step=8)
    distances, losses = question.tables()
    a, b = run.state(8).params, other.state(8).params
    parts = [np.linalg.norm((a[name] - b[name]).ravel()) for name in ("hidden", "out")]
    shown = [float(row[1]) for row in distances.rows]
    assert [row[0] for row in distances.rows] == ["all weights", "hidden", "out"]
    assert shown == pytest.approx([np.hypot(*parts), *parts], rel=1e-3)
    assert "after 8 steps" in distances.title
    assert "of the same 16 training samples" in losses.rows[0][0]
    assert question.answers["distance"]["state"].values.tolist() == list(range(9))
    assert question.answers["distance"]["value"].values[0] == 0


def test_a_run_is_at_no_distance_from_itself(run):
    distances, losses = questions.compare(run, run, step=5).tables()
    assert {row[1] for row in distances.rows} == {"0"}
    assert losses.rows[0][1] == losses.rows[0][2]


def test_by_default_runs_are_compared_after_as_many_steps_as_both_have(run, other):
    assert questions.compare(run, other).settings["step"] == 12


def test_the_last_samples_before_an_explosion_are_those_of_the_steps_before_it(run, history):
    _, grads = history
    shares = (np.abs(grads) > 2.0).mean(axis=1)
    limit = float(np.sort(shares)[-3])
    step = int(np.argmax(shares > limit))
    question = questions.explosion(run, threshold=2.0, share=limit, last=3)
    (table,) = question.tables()
    ids = run.ids(0, step).reshape(-1)[-3:]
    assert int(question.answers["step"]) == step
    assert [int(row[2]) for row in table.rows] == ids.tolist()
    assert f"before step {step}," in table.title


def test_an_explosion_that_never_happens_tells_the_largest_gradient(run, history):
    (table,) = questions.explosion(run).tables()
    largest = np.abs(history[1]).max()
    assert table.rows == []
    assert table.title.startswith("at no step do more than 10% of |gradients| exceed 1024: at most")
    assert f"the largest |gradient| is {largest:.4g}" in table.title


def crossing(history):
    """Return the number, and the step, of a weight that crosses zero."""
    signs = np.sign(history[0])
    crosses = (signs[1:] != signs[:-1]) & (history[0][:-1] != 0)
    number = int(np.argmax(crosses.any(axis=0)))
    assert crosses[:, number].any()
    return number, int(np.argmax(crosses[:, number]))


def test_the_shares_of_the_samples_that_led_a_weight_to_zero_and_momentum_add_up(run, history):
    number, step = crossing(history)
    leaf = run.tensors[0] if number < 15 else run.tensors[1]
    name = questions.weight_name(leaf, number if number < 15 else number - 15)
    question = questions.zero(run, name, last=4)
    (table,) = question.tables()
    assert [row[0] for row in table.rows] == [str(step)] * 4
    assert [int(row[2]) for row in table.rows] == run.ids(step, step + 1)[0].tolist()
    batch = question.answers["share"]["value"].values.sum()
    carried, update = (question.answers[x]["value"].values[0] for x in ("carried", "update"))
    assert batch + carried == pytest.approx(update, rel=1e-4, abs=1e-7)
    assert table.title.startswith(f"{name} goes from ")


def test_a_weight_that_never_reaches_zero_tells_how_near_it_comes(run, history):
    flat = history[0]
    number = int(np.argmax(np.abs(flat).min(axis=0)))
    name = questions.weight_name(run.tensors[0], number)
    (table,) = questions.zero(run, name).tables()
    assert table.rows == []
    assert f"{name} never crosses or reaches 0" in table.title


def test_what_an_answer_takes_is_told_and_nothing_is_replayed(run, other):
    for question in (questions.weights(run), questions.compare(run, other)):
        assert "replay" in question.explain()
        assert "answers" not in vars(question)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda run: questions.samples(run, epoch=9), "there is no epoch 9"),
        (lambda run: questions.samples(run, tensor="no"), "there is no tensor 'no'"),
        (lambda run: questions.samples(run, top=0), "top is 0"),
        (lambda run: questions.samples(run, by="label"), "the data has no leaf 'label'"),
        (lambda run: questions.samples(run, by="x"), "the data has no leaf 'x'"),
        (lambda run: questions.explosion(run, share=1.0), "more than a share of 1.0"),
        (lambda run: questions.explosion(run, last=0), "last is 0"),
        (lambda run: questions.zero(run, "no[1]"), "there is no tensor 'no'"),
        (lambda run: questions.zero(run, "hidden[1]"), "hidden[1] is not one weight"),
        (lambda run: questions.zero(run, "hidden[3,0]"), "hidden[3,0] is not one weight"),
        (lambda run: questions.zero(run, ""), "there is no tensor ''"),
        (lambda run: questions.compare(run, run, step=25), "are compared after 25 steps"),
        (lambda run: questions.compare(run, run, step=0), "are compared after 0 steps"),
    ],
)
def test_a_question_about_what_does_not_exist_fails_when_it_is_built(ask, what, run):
    with pytest.raises(replay.ReplayError) as caught:
        ask(run)
    assert what in caught.value.what
    assert caught.value.why and caught.value.fix


def test_a_leaf_of_the_data_groups_samples_by_its_values(run):
    (table,) = questions.samples(run, epoch=0, by="y", top=2).tables()
    assert table.columns == ("tensor", "rank", "class", "sum |share|", "of the tensor")
    assert len(table.rows) == 6


@pytest.mark.parametrize(
    ("path", "shape", "is_image"),
    [
        ("image", (8, 8), True),
        ("x", (28, 28, 1), True),
        ("x", (3, 32, 32), True),
        ("x", (32, 32, 3), True),
        ("image", (64,), True),
        ("x", (64,), False),
        ("image", (65,), False),
        ("tokens", (4, 512), False),
        ("x", (8, 8, 8), False),
        ("y", (), False),
    ],
)
def test_a_leaf_is_a_picture_by_its_shape(path, shape, is_image):
    assert questions._is_image(Leaf(path, shape, "uint8")) == is_image
