"""A program is traced and compiled once; its later recordings begin with what is kept of it."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import replay
from replay import artifact
from tests import tiny


@pytest.fixture
def traces(monkeypatch):
    """Return a list that grows with every trace of a whole program."""
    found, trace = [], artifact.trace

    def counted(*arguments, **options):
        found.append(arguments[0])
        return trace(*arguments, **options)

    monkeypatch.setattr(artifact, "trace", counted)
    return found


def start(key):
    return {"hidden": jax.random.normal(key, (3, 5)), "out": jnp.ones(5)}


def test_a_program_is_traced_once_and_its_recordings_have_the_same_bits(tmp_path, traces):
    program = tiny.program(init=start)
    first = tiny.record(tmp_path / "first", program)
    second = tiny.record(tmp_path / "second", program)
    assert len(traces) == 1
    assert first.log.header.programs == second.log.header.programs
    assert tiny.bits(first.state(tiny.STEPS)) == tiny.bits(second.state(tiny.STEPS))
    replay.open(tmp_path / "first", program=program, data=tiny.DATA)
    assert len(traces) == 2, "what is compared is what the program computes now"
    assert replay.open(tmp_path / "second").verify().grade is replay.Grade.BITWISE


def test_another_key_begins_from_other_weights(tmp_path):
    program = tiny.program(init=start)
    runs = [tiny.record(tmp_path / str(seed), program, key=jax.random.key(seed)) for seed in (0, 1)]
    states = [tiny.bits(run.state(0)) for run in runs]
    assert states[0] != states[1]


def test_other_forms_of_data_and_other_settings_are_traced_for_themselves(tmp_path, traces):
    program = tiny.program()
    tiny.record(tmp_path / "run", program)
    tiny.record(tmp_path / "block", program, dispatch="block")
    order = replay.Order.shuffled(batch_size=2, epochs=1, seed=1)
    tiny.record(tmp_path / "narrow", program, order=order)
    with jax.default_matmul_precision("highest"):
        tiny.record(tmp_path / "exact", program)
    assert len(traces) == 4


def test_keys_of_another_kind_are_another_program(tmp_path):
    def loss(params, example, key):
        noise = jax.random.normal(jax.random.key(7), (3,))
        return jnp.square((example["x"] + noise) @ params["hidden"] @ params["out"])

    program = tiny.program(loss, rate=1e-4)
    plain = tiny.record(tmp_path / "plain", program)
    with jax.default_prng_impl("rbg"):
        found = tiny.record(tmp_path / "rbg", program)
        fresh = tiny.record(tmp_path / "fresh", tiny.program(loss, rate=1e-4))
    losses = [run.sample_losses.compute()["value"].values for run in (plain, found, fresh)]
    assert losses[0].tobytes() != losses[1].tobytes() == losses[2].tobytes()


def test_a_run_is_compared_with_what_its_program_computes_now(tmp_path):
    scale = [1.0]

    def loss(params, example, key):
        return jnp.square(scale[0] * example["x"] @ params["hidden"] @ params["out"])

    program = tiny.program(loss, rate=1e-4)
    tiny.record(tmp_path / "run", program)
    scale[0] = 100.0
    with pytest.raises(replay.IdentityError, match="the program is not the one in"):
        replay.open(tmp_path / "run", program=program, data=tiny.DATA)


def test_weights_that_were_changed_in_place_are_those_of_the_next_recording(tmp_path):
    weights = {name: x.copy() for name, x in tiny.WEIGHTS.items()}
    program = tiny.program(init=weights)
    tiny.record(tmp_path / "run", program)
    weights["out"] += 1
    again = tiny.record(tmp_path / "again", program)
    assert (np.asarray(again.state(0).params["out"]) == weights["out"]).all()


def test_what_a_loss_reads_beside_its_arguments_may_not_change_between_recordings(tmp_path):
    scale = [1.0]
    program = tiny.program(lambda *given: scale[0] * tiny.loss(*given))
    tiny.record(tmp_path / "run", program)
    scale[0] = 2.0
    with pytest.warns(RuntimeWarning, match="the program, traced twice, differs"):
        run = tiny.record(tmp_path / "again", program, self_test=True)
    assert run.grade is replay.Grade.NUMERIC


def test_what_is_kept_goes_with_its_program(tmp_path):
    program = replay.Program(start, tiny.loss, optax.sgd(0.1))
    tiny.record(tmp_path / "run", program)
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None
