"""Recording and replaying small runs: every option of a recorder, and what a run answers."""

import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import replay
import replay.trajectory
from replay.data import Data


def init(key):
    return {"w": jax.random.normal(key, (4, 3)) * 0.1, "b": jnp.zeros(3)}


def loss(params, example, key):
    x = example["x"] + 0.1 * jax.random.normal(key, (4,))
    value = optax.softmax_cross_entropy_with_integer_labels(
        x @ params["w"] + params["b"], example["y"]
    )
    return value, {"large": (value > 1).astype(jnp.float32)}


PROGRAM = replay.Program(init, loss, optax.adam(1e-2))
KEY = jax.random.key(3)


def samples(count=20):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "y": draw.integers(0, 3, count).astype(np.int32)}


class OneByOne:
    """A source of samples that are asked for one by one; some can be lost."""

    def __init__(self, arrays):
        self.arrays, self.lost = arrays, []

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i in self.lost:
            raise OSError("unplugged")
        return {name: rows[i] for name, rows in self.arrays.items()}


def order(epochs=4, **options):
    return replay.Order.shuffled(batch_size=5, epochs=epochs, seed=1, **options)


def record(path, **options):
    data = options.pop("data", samples())
    settings = {"key": KEY, "checkpoints": 6, "self_test": False} | options
    return replay.record(path, PROGRAM, data, settings.pop("order", order()), **settings)


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "plain")


def test_a_run_says_what_it_is(run):
    assert repr(run).endswith(
        ": loss, 16 steps (closed), 15 weights in 2 tensors, 4 stored states, UNAUDITED>"
    )
    assert (run.steps, run.dispatch, run.checkpoints) == (16, "step", [0, 6, 12, 16])
    assert [str(leaf) for leaf in run.tensors] == ["b: float32[3]", "w: float32[4,3]"]
    assert run.verify().grade is replay.Grade.BITWISE


def test_states_by_slices_negative_numbers_and_strides(run):
    every = dict(run.states(slice(None)))
    assert list(every) == list(range(17))
    assert bits(run.state(-1)) == bits(every[16])
    assert bits(run.state(9)) == bits(every[9])
    assert [t for t, _ in run.states(slice(3, 12, 4))] == [3, 7, 11]
    assert list(run.states(slice(5, 5))) == []
    assert [t for t, _ in run.states(slice(16, 17))] == [16]
    with pytest.raises(replay.OrderError, match="run backwards"):
        list(run.states(slice(9, 3, -1)))


def test_the_mean_of_the_losses_is_logged_and_aux_beside_it(run):
    history = run.history()
    assert history["epoch"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    for step in run.trajectory(0, 16):
        mean = np.float32(step.losses.astype(np.float64).mean())
        assert history["loss"][step.step] == mean
        assert history["large"][step.step] == np.float32((step.losses > 1).mean())
    assert (history["seconds"] > 0).all()


def test_a_trajectory_has_the_batches_keys_and_gradients_of_the_definitions(run):
    data = samples()
    gradient = jax.jit(PROGRAM.gradient)
    for step in run.trajectory(5, 9):
        ids = run.ids(step.step, step.step + 1)[0]
        assert step.ids.tolist() == ids.tolist()
        assert step.batch["x"].tolist() == data["x"][ids].tolist()
        key = jax.random.fold_in(KEY, step.step)
        assert (jax.random.key_data(step.keys[0]) == jax.random.key_data(key)).all()
        each = [jax.random.key_data(jax.random.fold_in(key, int(i))) for i in ids]
        assert jax.random.key_data(step.keys[1]).tolist() == np.stack(each).tolist()
        inputs = replay.Inputs(
            jnp.uint32(step.step), ids, jnp.ones(5), step.batch, step.keys[0], step.keys[1]
        )
        losses, _, grads, _ = gradient(step.state, inputs)
        assert bits(losses) == [step.losses.tobytes()]
        assert bits(grads) == bits(step.grads)
        assert step.deviation == 0


def test_what_an_observer_keeps_stays_valid(run):
    kept = list(run.trajectory(0, 16))
    assert bits(kept[3].state) == bits(run.state(3))


def test_a_step_that_does_not_exist_is_named(run):
    with pytest.raises(replay.LogError, match="has states 0 to 16, not 17"):
        run.state(17)
    with pytest.raises(replay.LogError, match="has states 0 to 16, not 20"):
        list(run.trajectory(3, 20))


def test_an_audit_of_some_steps_covers_their_segments(run):
    audit = run.verify(7)
    assert [(segment.start, segment.stop) for segment in audit.segments] == [(6, 12)]
    assert not audit.complete
    assert str(audit).startswith("BITWISE: every witness and every digest agrees")
    assert [s.start for s in run.verify(slice(3, 7)).segments] == [0, 6]
    assert [s.start for s in run.verify(range(12, 16)).segments] == [12]


def test_steps_of_an_audit_are_counted_as_python_counts(run):
    for steps, segments in [
        (-1, [12]),
        (np.int64(0), [0]),
        (slice(-5, None), [6, 12]),
        (range(-5, 0), [6, 12]),
        (range(15, -1, -7), [0, 6, 12]),
        (slice(10, 99), [6, 12]),
    ]:
        assert [segment.start for segment in run.verify(steps).segments] == segments, steps


@pytest.mark.parametrize(
    ("steps", "asked"),
    [
        (16, "16"),
        (-17, "-17"),
        (slice(5, 2), "5:2"),
        (slice(99, None), "99:"),
        (range(3, 17), r"range\(3, 17\)"),
        (range(0), r"range\(0, 0\)"),
    ],
)
def test_an_audit_of_nothing_is_refused(run, steps, asked):
    with pytest.raises(replay.LogError, match=f"has steps 0 to 15, not {asked}\n") as caught:
        run.verify(steps)
    assert "run.verify()" in caught.value.fix


def test_dispatch_by_block_gives_a_run_of_its_own_that_replays_step_by_step(tmp_path, run):
    block = record(tmp_path / "block", dispatch="block")
    assert block.dispatch == "block"
    assert block.verify().grade is replay.Grade.BITWISE
    states = dict(block.states(slice(None)))
    assert bits(block.state(13)) == bits(states[13])
    like = record(tmp_path / "like", like=block)
    assert bits(like.state(16)) == bits(states[16])
    assert record(tmp_path / "unlike", like=run).dispatch == "step"


def test_advancing_in_other_portions_changes_no_bit(tmp_path, run):
    for name, dispatch in (("step", "step"), ("block", "block")):
        settings = {"key": KEY, "dispatch": dispatch, "checkpoints": 6, "self_test": False}
        whole = replay.record(tmp_path / f"{name}1", PROGRAM, samples(), order(), **settings)
        with replay.Recorder(
            tmp_path / f"{name}2", PROGRAM, samples(), order(), **settings
        ) as recorder:
            seen = []
            while recorder.advance(3):
                seen.append(recorder.step)
                recorder.log(accuracy=recorder.step / 100)
        assert seen == [3, 6, 9, 12, 15, 16]
        parts = replay.open(tmp_path / f"{name}2")
        assert parts.verify().grade is replay.Grade.BITWISE
        assert bits(parts.state(16)) == bits(whole.state(16))
        logged = parts.history()["accuracy"]
        assert np.flatnonzero(~np.isnan(logged)).tolist() == seen
        assert logged[15] == 0.15


def test_params_and_state_of_a_recorder_are_copies_that_stay_valid(tmp_path):
    with replay.Recorder(
        tmp_path / "run", PROGRAM, samples(), order(), key=KEY, self_test=False
    ) as recorder:
        recorder.advance(4)
        params, state = recorder.params, recorder.state
        recorder.advance()
    assert bits(params) == bits(replay.open(tmp_path / "run").state(4).params)
    assert bits(state) == bits(replay.open(tmp_path / "run", program=PROGRAM).state(4))


def test_stopping_early_closes_a_shorter_run(tmp_path):
    with replay.Recorder(
        tmp_path / "run", PROGRAM, samples(), order(), key=KEY, self_test=False
    ) as recorder:
        recorder.advance(7)
    run = replay.open(tmp_path / "run")
    assert (run.steps, run.log.durable.closed) == (7, True)
    assert run.verify().grade is replay.Grade.BITWISE


def test_a_url_of_a_key_value_store_is_a_place_for_a_run(tmp_path):
    run = record(f"memory://{tmp_path.name}/run")
    assert run.verify().grade is replay.Grade.BITWISE
    assert run.thin(2) == [6, 12]
    assert run.verify().grade is replay.Grade.BITWISE


def test_ids_can_be_left_out_and_come_from_the_order_then(tmp_path, run):
    small = record(tmp_path / "small", log_ids=False)
    assert not small.log.has_column("ids")
    assert small.ids(3, 9).tolist() == run.ids(3, 9).tolist()
    assert small.verify().grade is replay.Grade.BITWISE


def test_data_that_is_not_kept_must_be_passed_again(tmp_path):
    outside = record(tmp_path / "run", embed=False)
    assert outside.verify().grade is replay.Grade.BITWISE
    bare = replay.open(tmp_path / "run")
    assert bits(bare.state(6)) == bits(outside.state(6))
    with pytest.raises(replay.DataError, match="does not hold its data, and none was given"):
        bare.state(7)
    why = f"FAILED: {bare.path} does not hold its data, and none was given"
    assert str(bare.verify()).splitlines()[2:] == [f"  states 0 to 16: {why}"]
    assert replay.open(tmp_path / "run", data=samples()).verify().grade is replay.Grade.BITWISE


def test_weights_of_samples_and_of_padding_are_inputs_of_the_same_program(tmp_path, run):
    weights = np.linspace(0, 2, 20).astype(np.float32)
    weighted = record(tmp_path / "weighted", sample_weights=weights)
    assert weighted.verify().grade is replay.Grade.BITWISE
    step = next(weighted.trajectory(2, 3))
    assert step.weights.tolist() == weights[step.ids].tolist()
    expected = (step.losses.astype(np.float64) * step.weights).sum() / 5
    assert weighted.history()["loss"][2] == np.float32(expected)
    texts = [{k: v["text"] for k, v in r.log.header.programs.items()} for r in (run, weighted)]
    assert texts[0] == texts[1]
    padded = record(tmp_path / "padded", data=samples(18), order=order(pad=True))
    last = next(padded.trajectory(3, 4))
    assert (last.ids[3:].tolist(), last.weights.tolist()) == ([-1, -1], [1, 1, 1, 0, 0])
    assert padded.verify().grade is replay.Grade.BITWISE


def test_fed_batches_are_kept_and_a_stopped_run_goes_on(tmp_path, capsys):
    batches = [Data.of(samples(60)).fetch(np.arange(5 * i, 5 * i + 5)) for i in range(12)]
    settings = {"key": KEY, "checkpoints": 4, "self_test": False}
    with replay.Recorder(tmp_path / "whole", PROGRAM, **settings) as recorder:
        for batch in batches:
            recorder.feed(batch)
    assert "every batch is kept in" in capsys.readouterr().out
    whole = replay.open(tmp_path / "whole")
    assert (whole.steps, whole.checkpoints) == (12, [0, 4, 8, 12])
    assert whole.verify().grade is replay.Grade.BITWISE
    assert next(whole.trajectory(7, 8)).batch["x"].tolist() == batches[7]["x"].tolist()
    assert whole.ids(2, 3).tolist() == [[10, 11, 12, 13, 14]]

    with pytest.raises(RuntimeError, match="stop here"):
        with replay.Recorder(tmp_path / "parts", PROGRAM, **settings) as recorder:
            for batch in batches[:7]:
                recorder.feed(batch)
            raise RuntimeError("stop here")
    with replay.Recorder(tmp_path / "parts", PROGRAM, resume=True, **settings) as recorder:
        assert recorder.step == 7
        for batch in batches[recorder.step :]:
            recorder.feed(batch)
    parts = replay.open(tmp_path / "parts")
    assert parts.verify().grade is replay.Grade.BITWISE
    assert bits(parts.state(12)) == bits(whole.state(12))


def test_fed_weights_and_ids_are_used_and_another_shape_is_refused(tmp_path):
    batch = samples(5)
    ids = [9, 8, 7, 6, 5]
    with replay.Recorder(tmp_path / "run", PROGRAM, key=KEY, self_test=False) as recorder:
        recorder.feed(batch, ids, np.array([1, 1, 0, 0, 2], np.float32))
        with pytest.raises(replay.DataError, match="the batch of step 1 is Data"):
            recorder.feed(samples(4))
        with pytest.raises(replay.OrderError, match="no order to advance in"):
            recorder.advance()
    step = next(replay.open(tmp_path / "run").trajectory(0, 1))
    assert (step.ids.tolist(), step.weights.tolist()) == (ids, [1, 1, 0, 0, 2])


def test_thinning_loses_no_answer(tmp_path):
    run = record(tmp_path / "run", checkpoints=2)
    before = {t: bits(state) for t, state in run.states(slice(None))}
    assert run.thin(3) == [2, 4, 6, 10, 12, 14]
    again = replay.open(tmp_path / "run")
    assert again.checkpoints == run.checkpoints == [0, 8, 16]
    assert {t: bits(state) for t, state in again.states(slice(None))} == before
    assert again.verify().grade is replay.Grade.BITWISE
    assert not (tmp_path / "run/states/0/c/1").exists()


def test_resuming_a_thinned_run_and_extending_its_order_is_refused(tmp_path):
    record(tmp_path / "run")
    with pytest.raises(replay.IdentityError, match="the order is Order.shuffled.*epochs=9"):
        record(tmp_path / "run", order=order(epochs=9), resume=True)


def test_the_self_test_of_a_sound_program_finds_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = record(tmp_path / "run", self_test=True)
    assert run.log.durable.selftest == ""
    assert run.grade is replay.Grade.UNAUDITED


def test_a_run_remembers_its_audit_and_no_other_does(tmp_path):
    run = record(tmp_path / "run")
    run.verify(2)
    assert run.grade is replay.Grade.UNAUDITED, "of a part"
    run.verify()
    assert run.grade is replay.Grade.BITWISE
    assert "BITWISE" in repr(run)
    assert replay.open(run.path).grade is replay.Grade.UNAUDITED


@pytest.mark.parametrize("width", [pytest.param("32 bits", marks=pytest.mark.full), "64 bits"])
def test_settings_that_hold_in_one_thread_hold_for_all_that_is_done_beside_it(tmp_path, width):
    """The data is read, and the self-test traces and executes, in threads of their own."""
    wide = width == "64 bits"
    x = samples()["x"].astype(np.float64 if wide else np.float32)

    def square(params, example, key):
        return jnp.dot(params["w"], example["x"]) ** 2

    program = replay.Program(lambda key: {"w": jnp.full(4, 1 / 3)}, square, optax.sgd(0.1))
    settings = {"key": KEY, "checkpoints": 6}
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        recorded = replay.record(tmp_path / "run", program, OneByOne({"x": x}), order(), **settings)
        expected = [bits(state) for _, state in recorded.states(slice(None))]
    assert recorded.log.durable.selftest == ""
    run = replay.open(tmp_path / "run")
    assert run.log.header.environment["x64"] is wide
    assert run.verify().grade is replay.Grade.BITWISE
    assert [bits(state) for _, state in run.states(slice(None))] == expected
    assert next(run.trajectory(3, 4)).batch["x"].dtype == x.dtype


def test_a_program_that_cannot_be_traced_again_has_not_proved_itself(tmp_path):
    def once(params, example, key):
        if threading.current_thread().name == "replay-selftest":
            raise KeyError("spent")
        return loss(params, example, key)

    program = replay.Program(init, once, optax.adam(1e-2))
    with pytest.warns(RuntimeWarning, match="cannot be traced a second time: KeyError.'spent'"):
        with replay.Recorder(tmp_path / "run", program, samples(), order(), key=KEY):
            pass
    assert replay.open(tmp_path / "run").grade is replay.Grade.NUMERIC


def test_after_an_interruption_a_recorder_does_not_go_on_as_if_nothing_were_missing(
    tmp_path, monkeypatch
):
    settings = {"key": KEY, "self_test": False, "resume": True, "checkpoints": 6}
    recorder = replay.Recorder(tmp_path / "run", PROGRAM, samples(), order(), **settings)
    with recorder:
        recorder.advance(2)
        engine = recorder._recording.engine
        execute = engine.advance

        def interrupted(state, stretch):
            yield next(execute(state, stretch))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine, "advance", interrupted)
            with pytest.raises(KeyboardInterrupt):
                recorder.advance(3)
        for question in (recorder.advance, lambda: recorder.params, lambda: recorder.log(a=1)):
            with pytest.raises(replay.LogError, match="what follows state 2 was interrupted"):
                question()
    assert not replay.open(tmp_path / "run").log.durable.closed
    with recorder:
        recorder.advance()
    run = replay.open(tmp_path / "run")
    assert (run.steps, run.verify().grade) == (16, replay.Grade.BITWISE)
    assert bits(run.state(16)) == bits(record(tmp_path / "whole").state(16))


def test_after_a_batch_that_could_not_be_read_a_recorder_keeps_what_it_has(tmp_path):
    source = OneByOne(samples())
    settings = {"key": KEY, "self_test": False, "resume": True, "embed": False}
    arguments = (tmp_path / "run", PROGRAM, source, order())
    with replay.Recorder(*arguments, **settings) as recorder:
        source.lost = order().bind(20)[1].tolist()
        recorder._staged = replay.trajectory.stage(recorder._read, [(0, 1), (1, 16)])
        recorder.advance(1)
        with pytest.raises(OSError, match="unplugged"):
            recorder.advance()
        with pytest.raises(replay.LogError, match="what follows state 1 was interrupted"):
            recorder.advance()
    assert replay.open(tmp_path / "run").steps == 1
    source.lost = []
    with replay.Recorder(*arguments, **settings) as recorder:
        recorder.advance()
    run = replay.open(tmp_path / "run", data=samples())
    assert run.verify().grade is replay.Grade.BITWISE
    assert bits(run.state(16)) == bits(record(tmp_path / "whole").state(16))


def test_a_recorder_records_only_between_its_beginning_and_its_end(tmp_path):
    settings = {"key": KEY, "self_test": False, "commit_steps": 1}
    ordered = replay.Recorder(tmp_path / "ordered", PROGRAM, samples(), order(), **settings)
    fed = replay.Recorder(tmp_path / "fed", PROGRAM, **settings)
    feed = lambda: fed.feed(samples(5))  # noqa: E731
    for question in (ordered.advance, feed):
        with pytest.raises(replay.LogError, match="is not being recorded yet"):
            question()
    assert not list(tmp_path.iterdir())
    with ordered, fed:
        ordered.advance(3)
        feed()
    for question in (ordered.advance, feed, lambda: ordered.log(a=1)):
        with pytest.raises(replay.LogError, match="is no longer being recorded") as caught:
            question()
        assert "resume=True" in caught.value.fix
    assert (ordered.step, fed.step) == (3, 1)
    assert bits(ordered.params) == bits(replay.open(tmp_path / "ordered").state(3).params)


def test_the_error_of_a_loss_is_said_as_it_is(tmp_path):
    program = replay.Program(init, lambda params, x, key: params["w"] + x["x"], optax.sgd(0.1))
    with pytest.raises((TypeError, ValueError), match="shapes"):
        replay.record(tmp_path / "run", program, samples(), order(), key=KEY)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_a_directory_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(replay.LogError, match=f"{place} cannot be written") as caught:
        record(tmp_path / place)
    assert "choose a directory" in caught.value.fix
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_other_things_is_not_offered_to_be_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(replay.LogError, match="already holds notes.txt") as caught:
        record(tmp_path)
    assert caught.value.fix == "choose another directory"


def test_an_open_run_without_its_program_has_states_of_nested_dicts(run, tmp_path):
    bare = replay.open(run.path)
    state = bare.state(5)
    assert set(state.params) == {"w", "b"}
    assert set(state.opt_state["0"]) == {"count", "mu", "nu"}
    theirs = replay.open(run.path, program=PROGRAM).state(5)
    assert isinstance(theirs.opt_state[0], optax.ScaleByAdamState)
    assert sorted(bits(state)) == sorted(bits(theirs))


def test_the_zarr_groups_of_a_closed_run_open_in_xarray(run):
    import xarray

    steps = xarray.open_zarr(f"{run.path}/steps", consolidated=False)
    assert dict(steps.sizes) == {"step": 16, "position": 5}
    assert steps["loss"].values.tolist() == run.history()["loss"].tolist()
    states = xarray.open_zarr(f"{run.path}/states", consolidated=False)
    assert states.attrs["states"] == {"0": 0, "6": 1, "12": 2, "16": 3}
    w = next(v for v in states.values() if v.attrs["path"] == "params/w")
    assert w.values[2].tolist() == run.state(12).params["w"].tolist()
