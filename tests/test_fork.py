"""A fork shares what lies before it, changes one thing, and repeats everything else bit for bit."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BATCH, DATA, KEY, ORDER, SAMPLES, STEPS, bits, compile_once  # noqa: F401

import replay
from replay import edits
from replay import fork as fork_module
from replay.api import _work
from replay.asking import _address
from replay.journal import frame, only_frame
from replay.store import Place

TESTS = pathlib.Path(__file__).parent
LAST = STEPS * BATCH // SAMPLES - 1  # the number of the last epoch, which begins at step 20


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("runs") / "parent")


def states(run, start=0):
    return [bits(state) for _, state in run.states(slice(start, None))]


def refused(error, *parts):
    words = str(error.value)
    assert all(part in words for part in (*parts, "why:", "fix:")), words


def files(run):
    return {name: run.log.place.read(name) for name in run.log.place.list()}


# ---------------------------------------------------------------------------- what is shared


@pytest.mark.parametrize("at", [0, 8, 13, 23])
def test_a_fork_without_an_edit_repeats_its_parent(parent, tmp_path, at):
    fork = parent.fork(tmp_path / "fork", at=at)
    assert fork.steps == STEPS and fork.forked_at == at and fork.edit == "no edit"
    assert states(fork) == states(parent)
    assert fork.verify().grade is replay.Grade.BITWISE
    assert (fork.history()["loss"] == parent.history()["loss"]).all()


def test_a_fork_takes_nothing_from_its_parent_and_writes_nothing_to_it(parent, tmp_path):
    before = files(parent)
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    assert files(parent) == before
    assert sorted(files(fork)) == ["lock", "run.msgpack"]
    fork.resume()
    assert files(parent) == before
    assert {name.split("/")[0] for name in files(fork)} == {
        "run.msgpack", "journal.msgpack", "lock", "states", "steps",
    }  # fmt: skip
    stored = {name for name in files(fork) if name.startswith("states/0/c/")}
    assert stored == {f"states/0/c/{row}/0/0" for row in range(3)}  # states 13, 16, 24


def test_a_fork_that_has_not_run_answers_for_what_it_shares(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    assert fork.steps == 13 and fork.checkpoints == [0, 8]
    assert states(fork) == states(parent)[:14]
    path = abs(fork.updates).sum("step").compute()
    here = abs(parent.updates.sel(step=slice(0, 13))).sum("step").compute()
    assert (path["out"].values == here["out"].values).all()
    assert replay.open(fork.path).verify().grade is replay.Grade.UNAUDITED  # no digest of state 13


def test_states_before_the_fork_are_shared_and_those_after_it_differ(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, order=lambda order: order.swap(13, 20))
    assert states(fork)[:14] == states(parent)[:14]
    assert all(a != b for a, b in zip(states(fork, 14), states(parent, 14), strict=True))
    assert (fork.ids(0, 13) == parent.ids(0, 13)).all()
    assert (fork.ids(13, 14) == parent.ids(20, 21)).all()
    assert fork.edit == "swap(13, 20)" and "fork at step 13 (swap(13, 20))" in repr(fork)


def test_questions_go_across_the_step_of_the_fork(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, key=jax.random.key(6))
    found = fork.weights.sel(tensor="out").compute()["out"].values
    expected = np.stack([state.params["out"] for _, state in fork.states(slice(None))])
    assert (found == expected).all()
    shares = fork.sample_updates.sel(tensor="out").sum("position").compute()
    whole = (fork.updates - fork.carried_updates).sel(tensor="out").compute()
    np.testing.assert_allclose(
        shares["out"].values, whole["out"].values, rtol=0, atol=4 * 2**-23
    )  # sums of four shares of at most 1, rounded to float32
    gap = fork.reduce(replay.reductions.Norm(), steps=slice(11, 16)).gap
    assert gap < 1e-5  # with the keys of the other half the gradients would be other ones
    assert len(fork.sql("SELECT step, avg(value) FROM sample_losses GROUP BY step").rows) == STEPS
    noisy = [
        run.on(DATA).sample_losses.sel(state=slice(11, 15)).compute() for run in (fork, parent)
    ]
    ours, theirs = (found["value"].values for found in noisy)  # state 13 has other noise alone
    assert (ours[:2] == theirs[:2]).all() and (ours[2:] != theirs[2:]).all()


def test_a_fork_of_a_fork_shares_what_both_share(parent, tmp_path):
    first = parent.fork(tmp_path / "first", at=5, sample_weights={3: 0.0})
    second = first.fork(tmp_path / "second", at=13, key=jax.random.key(6))
    third = second.fork(tmp_path / "third", at=18, optimizer=optax.sgd(0.01, momentum=0.9))
    assert states(third)[:6] == states(parent)[:6]
    assert states(third)[:14] == states(first)[:14]
    assert states(third)[:19] == states(second)[:19]
    assert states(third, 19) != states(second, 19)
    carried = [run.carried_updates.sel(step=slice(15, 21)).compute() for run in (third, second)]
    ours, theirs = (found["out"].values for found in carried)  # by the update of each step's owner
    assert (ours[:3] == theirs[:3]).all() and (ours[3:] != theirs[3:]).all()
    for run in (first, second, third):
        assert replay.open(run.path).verify().grade is replay.Grade.BITWISE
    assert third.parent.path == second.path and third.parent.parent.parent.path == parent.path
    with pytest.raises(replay.OrderError) as error:
        third.fork(tmp_path / "earlier", at=9)
    refused(error, "is itself a fork at step 18", "run.parent.fork")


def test_a_fork_in_blocks_runs_in_blocks(tmp_path):
    run = tiny.record(tmp_path / "run", dispatch="block")
    fork = run.fork(tmp_path / "fork", at=11)
    assert fork.dispatch == "block" and states(fork) == states(run)
    assert "inherited" in fork.log.header.programs["block"]


def test_a_parent_that_was_thinned_or_taken_further_stays_the_parent(tmp_path):
    with tiny.recorder(tmp_path / "run") as recorder:
        recorder.advance(18)
    run = replay.open(tmp_path / "run")
    fork = run.fork(tmp_path / "fork", at=11)
    expected = states(fork)
    run.resume()
    assert run.steps == STEPS and run.verify().grade is replay.Grade.BITWISE
    run.thin(2)
    assert states(replay.open(tmp_path / "fork")) == expected


def test_a_run_without_its_code_goes_on_to_the_bits_of_the_whole(parent, tmp_path):
    with tiny.recorder(tmp_path / "run") as recorder:
        recorder.advance(10)
    run = replay.open(tmp_path / "run")
    run.resume(until=15)
    assert run.steps == 15
    run.resume()
    assert states(run) == states(parent) and run.log.durable.closed
    run.resume()  # nothing is left
    assert states(run) == states(parent)


def test_a_fork_gives_up_stored_states_of_its_own_and_no_others(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=5, checkpoints=4)
    expected = states(fork)
    assert fork.checkpoints == [0, 5, 8, 12, 16, 20, 24]
    fork.thin(2)
    assert fork.checkpoints == [0, 5, 24] and parent.checkpoints == [0, 8, 16, 24]
    assert states(fork) == expected and fork.verify().grade is replay.Grade.BITWISE


def test_a_fork_of_a_run_whose_ids_are_not_logged_logs_none(tmp_path):
    run = tiny.record(tmp_path / "run", log_ids=False)
    fork = run.fork(tmp_path / "fork", at=13, order=lambda order: order.swap(14, 15))
    assert not fork.log.has_column("ids") and (fork.ids(14, 15) == run.ids(15, 16)).all()
    assert states(fork)[:14] == states(run)[:14]
    assert fork.verify().grade is replay.Grade.BITWISE


def test_no_recorder_takes_up_a_fork(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    with pytest.raises(replay.LogError) as error, tiny.recorder(fork.path, resume=True):
        pass
    refused(error, "is a fork", ".resume()")


def test_a_fork_in_a_key_value_store_finds_its_parent_there(tmp_path):
    root = f"file://{tmp_path}"
    run = tiny.record(f"{root}/runs/parent/")
    fork = run.fork(f"{root}/runs/fork/", at=13)
    assert states(replay.open(f"{root}/runs/fork/")) == states(run)
    assert fork.detach() > 0 and fork.detach() == 0
    with pytest.raises(replay.LogError) as error:
        run.fork(tmp_path / "elsewhere", at=13)
    refused(error, "do not lie in one store")


# ------------------------------------------------------------------------------ what is changed


def test_a_sample_of_weight_zero_has_no_part_in_any_later_step(parent, tmp_path):
    sample = int(ORDER.bind(SAMPLES)[14][0])
    fork = parent.fork(tmp_path / "fork", at=13, sample_weights={sample: 0.0})
    weights = np.stack([step.weights for step in fork.trajectory()])
    seen = parent.ids(0, STEPS) == sample
    assert (weights == np.where(seen & (np.arange(STEPS) >= 13)[:, None], 0, 1)).all()
    assert fork.log.program("step") == parent.log.program("step")


def test_factors_multiply_and_are_inherited(tmp_path):
    factors = np.linspace(0.5, 1.5, SAMPLES, dtype=np.float32)
    run = tiny.record(tmp_path / "run", sample_weights=factors)
    first = run.fork(tmp_path / "first", at=6, sample_weights={2: 0.25})
    second = first.fork(tmp_path / "second", at=12, order=lambda order: order.reversed(LAST))
    after = np.where(np.arange(SAMPLES) == 2, np.float32(0.25), factors)
    for step in second.trajectory():
        assert (step.weights == (factors if step.step < 6 else after)[step.ids]).all()
    assert states(run.fork(tmp_path / "same", at=6)) == states(run)


def test_dropping_with_refill_may_shorten_the_rest(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=6, order=lambda order: order.drop([3], refill=True))
    assert fork.steps == len(fork.order) < STEPS
    assert 3 not in fork.ids(6, fork.steps)
    assert states(fork)[:7] == states(parent)[:7]
    assert fork.verify().grade is replay.Grade.BITWISE


def test_hyperparameters_in_the_state_are_set_and_the_programs_kept(tmp_path):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05, momentum=0.9)
    program = replay.Program(tiny.WEIGHTS, tiny.loss, optimizer)
    run = tiny.record(tmp_path / "run", program)
    slower = run.fork(tmp_path / "slower", at=13, optimizer={"learning_rate": 0.01})
    assert slower.log.program("step") == run.log.program("step")
    assert states(slower)[:13] == states(run)[:13]
    assert bits(slower.state(13).params) == bits(run.state(13).params)
    rate = slower.opt_state.sel(tensor="hyperparams/learning_rate").compute()
    values = rate["hyperparams/learning_rate"].values
    assert (values == np.where(np.arange(25) < 13, np.float32(0.05), np.float32(0.01))).all()
    early = run.fork(tmp_path / "early", at=13, optimizer={"learning_rate": 0.01}, train=False)
    assert states(early) == states(slower)[:14] and bits(early.state(13)) == states(slower)[13]
    assert slower.verify().grade is replay.Grade.BITWISE
    other = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01, momentum=0.9)
    again = run.fork(tmp_path / "again", at=13, optimizer=other)
    pairs = zip(slower.states(slice(None)), again.states(slice(None)), strict=True)
    moved = [np.abs(a.params["out"] - b.params["out"]).max() for (_, a), (_, b) in pairs]
    assert max(moved) < 1e-5  # the value counts and not the function, but for rounding
    with pytest.raises(replay.ProgramError) as error:
        run.fork(tmp_path / "bad", at=13, optimizer={"decay": 0.1})
    refused(error, "'decay'", "learning_rate, momentum")


def test_hyperparameters_are_set_anew_in_forks_of_forks(tmp_path):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05, momentum=0.9)
    run = tiny.record(tmp_path / "run", replay.Program(tiny.WEIGHTS, tiny.loss, optimizer))
    first = run.fork(tmp_path / "first", at=13, optimizer={"learning_rate": 0.01})

    def values(run):
        names = ("hyperparams/learning_rate", "hyperparams/momentum")
        found = (run.opt_state.sel(tensor=name).compute()[name].values for name in names)
        return np.stack([*found], axis=1)

    early = np.arange(25)[:, None] < 13
    old, slow = np.float32([[0.05, 0.9]]), np.float32([[0.01, 0.9]])
    for name, changes, last in (
        ("same", {}, slow),
        ("rate", {"learning_rate": 0.2}, np.float32([[0.2, 0.9]])),
        ("momentum", {"momentum": 0.5}, np.float32([[0.01, 0.5]])),
    ):
        fork = first.fork(tmp_path / name, at=13, optimizer=changes or None)
        assert (values(fork) == np.where(early, old, last)).all()
        assert replay.open(fork.path).verify().grade is replay.Grade.BITWISE
        if name == "same":
            assert states(fork) == states(first)
    later = first.fork(tmp_path / "later", at=18, optimizer={"learning_rate": 0.2})
    assert states(later)[:18] == states(first)[:18]
    assert (values(later)[18:] == np.float32([[0.2, 0.9]])).all()
    assert later.verify().grade is replay.Grade.BITWISE


def test_hyperparameters_that_nobody_reads_or_that_are_two_are_refused(tmp_path):
    scheduled = optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 20), momentum=0.9
    )
    twice = optax.chain(
        optax.inject_hyperparams(optax.scale)(step_size=0.5),
        optax.inject_hyperparams(optax.scale)(step_size=-0.1),
    )
    for name, optimizer, changes, part in (
        ("a", scheduled, {"learning_rate": 0.5}, "a schedule computes it anew"),
        ("b", twice, {"step_size": 0.5}, "it holds 2 of that name"),
        ("a", scheduled, {"momentum": 1e300}, "one number of the type float32"),
        ("a", scheduled, {"momentum": [1.0, 2.0]}, "one number of the type float32"),
    ):
        path = tmp_path / name
        program = replay.Program(tiny.WEIGHTS, tiny.loss, optimizer)
        run = replay.open(path) if path.exists() else tiny.record(path, program)
        with pytest.raises(replay.ProgramError) as error:
            run.fork(tmp_path / "fork", at=13, optimizer=changes)
        refused(error, part)
    run.fork(tmp_path / "fork", at=13, optimizer={"momentum": np.float32(0.5)}, train=False)


def test_another_optimizer_is_what_a_recording_with_it_would_have_been(tmp_path, parent):
    rate = replay.Program(tiny.WEIGHTS, tiny.loss, optax.adam(0.01), name="tiny")
    expected = tiny.record(tmp_path / "expected", rate)
    fork = parent.fork(tmp_path / "fork", at=0, optimizer=optax.adam(0.01))
    assert [leaf.path for leaf in fork.log.header.signature.state] == [
        leaf.path for leaf in expected.log.header.signature.state
    ]
    for mine, theirs in zip(states(fork), states(expected), strict=True):
        assert sorted(mine) == sorted(theirs)
    fork = replay.open(tmp_path / "fork")
    assert fork.verify().grade is replay.Grade.BITWISE
    shares = fork.sample_grads.sel(tensor="out", step=3).compute()["out"].values
    theirs = expected.sample_grads.sel(tensor="out", step=3).compute()["out"].values
    np.testing.assert_allclose(shares, theirs, rtol=2**-20)  # another program, the same formula
    assert fork.on(DATA).sample_losses.sel(state=5).compute()["value"].shape == (1, SAMPLES)


def test_other_initial_weights_begin_a_trajectory_of_their_own(parent, tmp_path):
    params = jax.tree.map(lambda w: w * np.float32(2), parent.state(0).params)
    fork = parent.fork(tmp_path / "fork", at=0, params=params, train=False)
    assert bits(fork.state(0).params) == bits(params)
    fork.resume()
    program = tiny.program(init=jax.tree.map(np.asarray, params))
    assert states(fork) == states(tiny.record(tmp_path / "expected", program))


def test_another_key_draws_other_noise_in_the_same_order(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, key=jax.random.key(6))
    assert (fork.ids(0, STEPS) == parent.ids(0, STEPS)).all()
    assert (fork.history()["loss"][:13] == parent.history()["loss"][:13]).all()
    assert (fork.history()["loss"][13:] != parent.history()["loss"][13:]).all()


# ---------------------------------------------------------------------------------- bad edits


def test_bad_edits_fail_at_the_call_and_leave_nothing_behind(parent, tmp_path):
    rare = replay.Order.explicit(np.arange(SAMPLES).reshape(-1, BATCH))
    once = tiny.record(tmp_path / "once", order=rare)
    sample = int(rare.bind(SAMPLES)[0][0])
    for run, error, parts, options in (
        (once, replay.DataError, ("no batch from step 2", str(sample)),
         {"at": 2, "sample_weights": {sample: 0.0}}),
        (parent, replay.OrderError, ("step 25", "steps 0 to 23"), {"at": 25}),
        (parent, replay.OrderError, ("begins at step 24", "24 steps"), {"at": STEPS}),
        (parent, replay.OrderError, ("step -1",), {"at": -1}),
        (parent, replay.DataError, ("no sample 16", "0 to 15"),
         {"at": 3, "sample_weights": {16: 0.0}}),
        (parent, replay.DataError, ("not finite",), {"at": 3, "sample_weights": {1: np.nan}}),
        (parent, replay.OrderError, ("differs at step 3", "begins", "at=3"),
         {"at": 8, "order": ORDER.swap(3, 12)}),
        (parent, replay.OrderError, ("batches of 2",),
         {"at": 8, "order": replay.Order.sequential(2, 6)}),
        (parent, replay.OrderError, ("step 8",),
         {"at": 8, "order": lambda order: order.swap(3, 12)}),
        (parent, replay.OrderError, ("differs at step 3",),
         {"at": 8, "order": lambda order: order.since(2).swap(3, 12).since(8)}),
        (parent, replay.OrderError, ("a int",), {"at": 8, "order": lambda order: 3}),
        (parent, replay.ProgramError, ("does not fit", "opt_state/0/count"),
         {"at": 8, "optimizer": optax.adam(1e-3)}),
        (parent, replay.ProgramError, ("without init and update",),
         {"at": 8, "optimizer": optax.adam}),
        (parent, replay.ProgramError, ("holds none",), {"at": 8, "optimizer": {"rate": 1.0}}),
        (parent, replay.ProgramError, ("at=0",), {"at": 8, "params": {}}),
        (parent, replay.ProgramError, ("float32[3,5]",),
         {"at": 0, "params": {"hidden": np.zeros((2, 5), np.float32), "out": np.zeros(5)}}),
        (parent, replay.ProgramError, ("not one typed key",), {"at": 8, "key": 5}),
        (parent, replay.OrderError, ("no weights",), {"at": 8, "weights": {}}),
        (parent, replay.OrderError, ("at=5.0",), {"at": 5.0}),
        (parent, replay.OrderError, ("at=True",), {"at": True}),
        (parent, replay.OrderError, ("until=1000",), {"at": 8, "until": 1000}),
        (parent, replay.OrderError, ("until=5",), {"at": 8, "until": 5}),
        (parent, replay.LogError, ("by {'every': -1}",), {"at": 8, "checkpoints": -1}),
        (parent, replay.OrderError, ("name of an edit is 5",), {"at": 8, "name": 5}),
    ):  # fmt: skip
        with pytest.raises(error) as raised:
            run.fork(tmp_path / "bad", **options)
        refused(raised, *parts)
        assert not (tmp_path / "bad" / "run.msgpack").exists(), options
    with pytest.raises(replay.LogError) as raised:
        parent.fork(parent.path, at=3)
    refused(raised, "in its parent")
    taken = parent.fork(tmp_path / "taken", at=np.int64(3), train=False)
    assert replay.open(taken.path).forked_at == 3
    with pytest.raises(replay.LogError) as raised:
        parent.fork(tmp_path / "taken", at=3)
    refused(raised, "already holds a run")


def test_what_has_no_order_or_no_optimizer_of_its_own_is_refused(tmp_path):
    with replay.Recorder(tmp_path / "fed", tiny.PROGRAM, key=KEY, self_test=False) as recorder:
        recorder.feed({name: leaf[:BATCH] for name, leaf in DATA.items()})
    with pytest.raises(replay.OrderError) as error:
        replay.open(tmp_path / "fed").fork(tmp_path / "fork", at=0)
    refused(error, "was fed and has no order")


# ------------------------------------------------------------------------ where the parent lies


def test_a_fork_says_where_it_misses_its_parent_and_takes_it_from_elsewhere(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    fork = replay.open(tmp_path / "run").fork(tmp_path / "fork", at=13)
    expected = states(fork)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(replay.LogError) as error:
        replay.open(tmp_path / "fork")
    refused(error, "is a fork at step 13", str(tmp_path / "run"), "moved or deleted", "--detach")
    found = replay.open(tmp_path / "fork", parent=tmp_path / "moved")
    assert states(found) == expected
    other = tiny.record(tmp_path / "run", order=ORDER.swap(1, 2))
    with pytest.raises(replay.LogError) as error:
        replay.open(tmp_path / "fork")
    refused(error, "another run", other.path)


def test_both_moved_together_stay_together(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "here" / "run")
    replay.open(tmp_path / "here" / "run").fork(tmp_path / "here" / "fork", at=13)
    expected = states(replay.open(tmp_path / "here" / "fork"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert states(replay.open(tmp_path / "there" / "fork")) == expected


@pytest.mark.parametrize("at", [8, 13])
def test_a_detached_fork_needs_no_parent(parent, tmp_path, at):
    shutil.copytree(parent.path, tmp_path / "run")
    first = replay.open(tmp_path / "run").fork(tmp_path / "first", at=5, sample_weights={3: 0.0})
    second = first.fork(tmp_path / "second", at=at, key=jax.random.key(6))
    expected, losses = states(second), second.history()["loss"]
    assert second.detach() > 0 and second.detach() == 0
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "first")
    found = replay.open(tmp_path / "second")
    assert states(found) == expected and found.verify().grade is replay.Grade.BITWISE
    assert (found.history()["loss"] == losses).all()
    with pytest.raises(replay.LogError) as error:
        found.parent.parent.detach()
    refused(error, "is not a fork")


def test_a_fork_that_has_not_run_can_be_detached_and_run(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    fork = replay.open(tmp_path / "run").fork(tmp_path / "fork", at=13, train=False)
    fork.detach()
    shutil.rmtree(tmp_path / "run")
    fork = replay.open(tmp_path / "fork")
    fork.resume()
    assert states(fork) == states(parent)


def test_what_a_parent_has_given_up_meanwhile_is_not_missed(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    fork = replay.open(tmp_path / "run").fork(tmp_path / "fork", at=20)
    replay.open(tmp_path / "run").thin(2)
    fork.detach()
    shutil.rmtree(tmp_path / "run")
    found = replay.open(tmp_path / "fork")
    assert states(found) == states(parent)
    assert found.verify().grade is replay.Grade.BITWISE


def test_another_run_inside_of_a_fork_does_not_hide_its_parent(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    tiny.record(tmp_path / "fork" / "parent", order=ORDER.swap(1, 2))
    assert replay.open(fork.path).parent.path == parent.path


def test_the_copy_of_a_parent_holds_nothing_that_came_after_the_fork(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=8, train=False)
    fork.detach()
    copied = {name for name in files(fork) if name.startswith("parent/states/0/c/")}
    assert copied == {f"parent/states/0/c/{row}/0/0" for row in range(2)}


def test_a_fork_from_a_stranger_names_no_path_but_a_relative_one(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    header = tmp_path / "fork" / "run.msgpack"
    plain = only_frame(header.read_bytes(), "run.msgpack")
    for path in ("/etc", "s3://bucket/run", "a\0b", 7):
        header.write_bytes(frame({**plain, "parent": {**plain["parent"], "path": path}}))
        with pytest.raises(replay.LogError, match="is not the header of a run"):
            replay.open(fork.path)
    for name, value in (("step", -1), ("leaves", {0: "x"}), ("shared", False), ("factors", [b"a"])):
        header.write_bytes(frame({**plain, "parent": {**plain["parent"], name: value}}))
        with pytest.raises(replay.LogError, match="is not the header of a run"):
            replay.open(fork.path)
    header.write_bytes(frame({**plain, "parent": {**plain["parent"], "leaves": {0: b"x"}}}))
    with pytest.raises(replay.LogError, match="leaf 0 of the state is set to 1 bytes"):
        replay.open(fork.path)
    for path in (".", "x" * 5000):
        header.write_bytes(frame({**plain, "parent": {**plain["parent"], "path": path}}))
        with pytest.raises(replay.LogError, match="is a fork at step 13"):
            replay.open(fork.path)
    far = [np.int32([10**9]).tobytes(), np.float32([0]).tobytes()]
    for changed in ({"parent": {**plain["parent"], "factors": far}}, {"factors": b"abcd"}):
        header.write_bytes(frame({**plain, **changed}))
        with pytest.raises(replay.LogError, match="is not the header of a run"):
            replay.open(fork.path)
    order = [replay.Order.sequential(BATCH // 2, 6).spec(), SAMPLES]
    header.write_bytes(frame({**plain, "order": order}))
    with pytest.raises(replay.LogError, match="an order of batches of 2"):
        replay.open(fork.path).resume()
    tiny.record(tmp_path / "half", order=replay.Order.sequential(BATCH // 2, 3))
    other = only_frame((tmp_path / "half" / "run.msgpack").read_bytes(), "run.msgpack")
    strange = {name: other[name] for name in ("signature", "arrays", "steps", "order")}
    header.write_bytes(frame({**plain, **strange}))
    with pytest.raises(replay.LogError, match="has other leaves than its parent"):
        replay.open(fork.path)


def test_a_line_of_forks_ends_before_python_does(parent, tmp_path, monkeypatch):
    monkeypatch.setattr("replay.log.MOST_GENERATIONS", 3)
    run = parent
    for number in range(3):
        run = run.fork(tmp_path / str(number), at=20, train=False)
    with pytest.raises(replay.LogError) as error:
        replay.open(run.fork(tmp_path / "last", at=20, train=False).path)
    refused(error, "3 generations")


def test_an_audit_names_what_is_other_than_when_the_parent_was_recorded(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    header = tmp_path / "run" / "run.msgpack"
    plain = only_frame(header.read_bytes(), "run.msgpack")
    environment = {**plain["environment"], "jaxlib": "0.0.1"}
    header.write_bytes(frame({**plain, "environment": environment}))
    fork = replay.open(tmp_path / "run").fork(tmp_path / "fork", at=13)
    differences = replay.open(fork.path).verify().differences
    assert [*differences] == ["jaxlib (before step 13)"]
    assert differences["jaxlib (before step 13)"][0] == "0.0.1"


def test_damage_to_a_parent_shows_in_its_fork(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    fork = replay.open(tmp_path / "run").fork(tmp_path / "fork", at=13)
    (chunk,) = (tmp_path / "run" / "steps" / "witness" / "c").iterdir()
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    audit = replay.open(fork.path).verify()
    assert audit.grade is replay.Grade.FAILED and "witness" in str(audit)


# ------------------------------------------------------------------------ broken off, side by side


def test_a_fork_that_was_killed_goes_on_to_the_same_bits(parent, tmp_path):
    expected = states(parent.fork(tmp_path / "whole", at=5, sample_weights={3: 0.0}))
    parent.fork(tmp_path / "fork", at=5, sample_weights={3: 0.0}, train=False)
    source = f"""
import os, signal, sys
sys.path[:0] = {[str(TESTS.parent), str(TESTS)]}
import replay
from replay.store import Place
append, count = Place.append, [0]
def appended(self, name, data):
    append(self, name, data)
    count[0] += 1
    if count[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
Place.append = appended
run = replay.open({str(tmp_path / "fork")!r})
run.resume(checkpoints=4)
"""
    for kill in (1, 2, 3):
        done = subprocess.run(
            [sys.executable, "-c", source, str(kill)], capture_output=True, timeout=600
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        fork = replay.open(tmp_path / "fork")
        assert 5 <= fork.steps < STEPS and states(fork) == expected[: fork.steps + 1]
    fork.resume()
    assert states(fork) == expected and fork.verify().grade is replay.Grade.BITWISE


def test_a_fork_with_another_thread_count_runs_with_that_of_its_parent(parent, tmp_path):
    count = parent.log.header.environment["threads"] + 1
    source = f"""
import sys
sys.path[:0] = {[str(TESTS.parent), str(TESTS)]}
import replay
run = replay.open({parent.path!r})
fork = run.fork({str(tmp_path / "fork")!r}, at=13)
print(fork.verify().grade.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "NPROC": str(count)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == ["BITWISE"], done.stderr
    fork = replay.open(tmp_path / "fork")
    assert fork.log.header.environment["threads"] == count - 1
    assert states(fork) == states(parent) and fork.verify().grade is replay.Grade.BITWISE


def test_a_run_that_was_taken_further_since_it_was_opened_loses_nothing(parent, tmp_path):
    early = parent.fork(tmp_path / "fork", at=8, train=False)
    replay.open(early.path).resume()
    with pytest.raises(replay.OrderError) as error:
        early.resume(until=10)
    refused(error, "until=10", "has 24 steps")
    early.resume()
    assert early.steps == STEPS and states(early) == states(parent)


def test_only_one_of_two_makes_a_fork(parent, tmp_path, monkeypatch):
    create = fork_module.create

    def meanwhile(place, *arguments):
        monkeypatch.undo()
        with pytest.raises(replay.LogError, match="is being recorded by"):
            parent.fork(tmp_path / "fork", at=8, sample_weights={3: 0.0})
        create(place, *arguments)

    monkeypatch.setattr(fork_module, "create", meanwhile)
    assert states(parent.fork(tmp_path / "fork", at=13)) == states(parent)


def test_a_fork_that_was_killed_before_it_was_whole_can_be_made_again(
    parent, tmp_path, monkeypatch
):
    params = jax.tree.map(lambda w: w * np.float32(2), parent.state(0).params)
    write = Place.write

    def killed(place, name, data):
        if name == "run.msgpack":
            raise KeyboardInterrupt
        write(place, name, data)

    monkeypatch.setattr(Place, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        parent.fork(tmp_path / "fork", at=0, params=params)
    monkeypatch.undo()
    with pytest.raises(replay.LogError, match="is not a run"):
        replay.open(tmp_path / "fork")
    fork = parent.fork(tmp_path / "fork", at=0, params=params, train=False)
    assert bits(replay.open(fork.path).state(0).params) == bits(params)


def test_another_process_answers_for_a_fork_as_it_is_now(parent, tmp_path):
    shutil.copytree(parent.path, tmp_path / "run")
    replay.open(tmp_path / "run").fork(tmp_path / "fork", at=5, train=False)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    fork = replay.open(tmp_path / "fork", parent=tmp_path / "moved")
    options = {"memory": 2**28, "exact": True, "strategy": "factored", "cache": False}
    for until in (10, STEPS):
        fork.resume(until=until)
        plan = abs(fork.updates).sum("step").plan
        _, grade, steps = _work(_address(fork.log), (), [plan], range(until), options)
        assert (str(grade), steps) == ("BITWISE", until)


def test_two_processes_cannot_train_one_fork(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, train=False)
    with fork.log.place.lock(), pytest.raises(replay.LogError, match="is being recorded by"):
        replay.open(fork.path).resume()


def test_a_fork_of_data_that_lies_elsewhere_needs_the_data(tmp_path):
    tiny.record(tmp_path / "run", embed=False)
    run = replay.open(tmp_path / "run", data=DATA)
    fork = run.fork(tmp_path / "fork", at=13)
    assert states(fork) == states(run)
    with pytest.raises(replay.DataError):
        replay.open(tmp_path / "run").fork(tmp_path / "other", at=13)
    assert not (tmp_path / "other").exists()
    changed = {**DATA, "y": DATA["y"] + np.float32(1)}
    with pytest.raises(replay.DataError):
        replay.open(tmp_path / "fork", data=changed)


def test_an_index_of_a_fork_answers_as_a_replay_does(parent, tmp_path):
    fork = parent.fork(tmp_path / "fork", at=13, sample_weights={3: 0.0})
    fork.index("weights")
    weights = fork.weights["out"]
    for value in (0.0, 0.5, 1.0):
        first = weights.crosses(jnp.float32(value).item()).any("weight").first("step")
        assert first.compute()["value"] == first.compute(index=False)["value"]


# ----------------------------------------------------------------------------------- many edits


def test_ready_made_edits_fork_as_they_stand(parent, tmp_path):
    orders = edits.all_orders([20, 21])
    assert [str(edit) for edit in orders] == ["steps 20, 21", "steps 21, 20"]
    same, other = (parent.fork(tmp_path / str(i), edit, at=20) for i, edit in enumerate(orders))
    assert states(same) == states(parent) and states(other) != states(parent)
    assert other.edit == "steps 21, 20"
