"""What is foretold of a replay: calls counted from a plan, and seconds that asking refines."""

import re

import pytest
import tiny
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import plan as planning
from replay import predicting, prices


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(predicting, "_seen", set())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("runs") / "run")


def loads(question):
    """Return what the one replay of a question calls, by kind, and the run."""
    node, asking = planning.canonical(question.plan), question.source
    (name,) = asking._names([node])
    asked = asking._asked(name, 2**30, "factored", False)
    (stage,) = planning.stages(planning.replays([node]))
    spans = planning.spans(asked.catalogue.checkpoints, *planning.union(stage))
    return predicting.loads(asked, spans, stage), asked


def told(question, compiled=(), **known):
    return predicting.seconds(*loads(question), known, compiled)


def calls(question, kind):
    return sum(load.calls for load in loads(question)[0] if load.kind == kind)


def test_a_program_is_called_once_for_each_replayed_or_looked_at_step(run):
    ten = run.sample_grads.sel(step=slice(10, 14)).max(("step", "position"))
    assert calls(ten, "step") == 6  # from the state at 8
    assert calls(ten, "factors") == 4
    shares = run.sample_updates.sel(step=slice(10, 14)).sum(("step", "position"))
    assert (calls(shares, "gradient"), calls(shares, "update")) == (4, 8)


def test_what_the_run_computed_itself_needs_no_other_program(run):
    kinds = {load.kind for load in loads(abs(run.grads).sum())[0]}
    assert kinds.isdisjoint(set(run.asking.subjects[next(iter(run.asking.subjects))]
                                .log.header.programs) - {"step"})  # fmt: skip


def test_a_longer_replay_is_foretold_to_take_longer(run):
    short, long = (told(run.grads.sel(step=slice(0, n)).sum()) for n in (4, 24))
    assert long.replay > 2 * short.replay and long.step == pytest.approx(6 * short.step)


def test_the_expensive_is_foretold_to_be_expensive(run):
    grads = abs(run.sample_grads)
    total, ranked = told(run.grads.sum("step")), told(run.grads.top_k(3, dim="step"))
    assert ranked.replay > total.replay
    assert told(grads.sum()).replay > told(run.grads.sum()).replay
    few = told(run.weights["hidden", 1, 0].sum("state"))
    assert few.compile < told(run.weights.sum("state")).compile


def test_what_is_compiled_already_is_not_foretold_again(run):
    question = run.grads.sum()
    first = told(question)
    again = told(question, {load.key for load in loads(question)[0]})
    assert first.compile > 0 and again.compile == 0 and again.replay == first.replay


def test_explain_tells_the_first_time_apart_until_the_question_was_asked(run):
    question = abs(run.updates).max("step")
    before = question.explain()
    assert re.search(r"about \S+ s, \S+ ms a step \(estimated\)", before)
    assert re.search(r"and about \S+ s to compile, the first time in this process", before)
    question.compute()
    assert "to compile" not in question.explain()
    assert "to compile" in abs(run.updates).var("step").explain()
    predicting.forget()
    assert "to compile" in question.explain()


def test_the_total_is_of_replay_and_compilation(run):
    text = abs(run.grads).norm("weight").explain()
    parts = re.findall(r"about (\S+) s(?:,| to compile)", text)
    total = float(re.findall(r"about (\S+) s in all", text)[0])
    assert len(parts) == 2 and total == pytest.approx(sum(map(float, parts)), rel=0.1)


def test_questions_asked_together_count_what_they_share_once(run):
    grads = run.sample_grads.sel(step=slice(10, 14))
    roots = [planning.canonical(x.plan) for x in (grads.max(("step", "position")), grads.norm())]
    asked = loads(grads.sum())[1]
    found = predicting.loads(asked, [planning.Span(8, 14)], roots)
    assert sum(load.calls for load in found if load.kind == "factors") == 4
    assert sum(load.calls for load in found if load.kind == "step") == 6


def test_what_was_asked_is_measured_the_next_time(run, monkeypatch):
    question = run.weights.mean("weight")
    assert "(estimated)" in question.explain()
    question.compute()
    assert "(measured)" in question.explain()
    assert "(estimated)" in run.opt_state.mean("weight").explain()
    made = dict.fromkeys(prices.PRICES, prices.Price(1e-6, 1e-9, 1e-3))
    monkeypatch.setattr(prices, "_measured", lambda kind: made[kind])
    # What was learnt belongs to other prices.
    assert "(calibrated)" in question.explain(calibrate=True)


def test_factors_that_were_learnt_multiply_what_is_foretold(run):
    question = run.grads.sum()
    plain = told(question)
    assert told(question, replay=2.0).replay == pytest.approx(2 * plain.replay)
    assert told(question, replay=2.0).how == "measured"
    slower = told(question, step=3.0)
    assert slower.replay - plain.replay == pytest.approx(2 * plain.step)
    assert told(question, step=3.0, replay=2.0).replay == pytest.approx(2 * plain.replay)


def test_what_is_learnt_of_the_steps_comes_from_replays_of_hardly_anything_else():
    mostly = predicting.Predicted(replay=1.0, compile=0.0, how="estimated", step=0.9)
    assert predicting.learnt(mostly, 3.0) == {"replay": 3.0, "step": 3.0}
    hardly = mostly._replace(step=0.1)
    assert predicting.learnt(hardly, 3.0) == {"replay": 3.0}
    assert predicting.learnt(hardly, 1e9) == {"replay": 20.0}


def test_a_compilation_within_another_counts_once(monkeypatch):
    compiling, now = predicting.Compiling(), 0.0
    monkeypatch.setattr(predicting.time, "perf_counter", lambda: now)
    for now, lasted in ((3.0, 1.0), (4.0, 4.0), (10.0, 2.0)):  # noqa: B007
        compiling._heard("/jax/core/compile/backend_compile_duration", lasted)
    compiling._heard("/jax/other", 100.0)
    assert compiling.seconds == 6.0


def test_a_comparison_counts_what_is_computed_of_both_runs_once(tmp_path, run):
    other = tiny.record(tmp_path / "other", order=replay.Order.shuffled(tiny.BATCH, 6, seed=2))
    states = slice(12, 16)
    gap = run.grads.sel(step=states) - other.grads.sel(step=states)
    root = planning.canonical(gap.norm("weight").plan)
    kinds = []
    for name in planning.runs_of(root):
        asked = gap.source._asked(name, 2**30, "factored", False)
        found = predicting.loads(asked, [planning.Span(8, 16)], [root])
        kinds.append({load.kind for load in found if load.calls})
    assert [{"step", "stored"} <= kind for kind in kinds] == [True, True]
    assert ["sum within" in kind for kind in kinds] == [True, False]


def test_a_prediction_that_fails_loses_no_answer(run, monkeypatch):
    wanted = run.grads.max("step").compute()

    def fail(*arguments):
        raise IndexError("of a dtype that nobody knows")

    monkeypatch.setattr(predicting, "loads", fail)
    with pytest.warns(UserWarning, match="is not remembered: IndexError"):
        found = run.grads.max("step").compute()
    assert found.identical(wanted)


def test_a_machine_is_calibrated_once(run, monkeypatch):
    called = []
    monkeypatch.setattr(prices, "calibrate", lambda: called.append(1))
    for measured in (False, True):
        monkeypatch.setattr(prices, "prices", lambda m=measured: (prices.PRICES, m))
        run.grads.max("step").explain(calibrate=True)
    assert called == [1]
