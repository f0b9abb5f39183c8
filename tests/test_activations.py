"""Intermediates that a loss has tagged, of every recorded step, from the run alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.ad_checkpoint import checkpoint_name
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay


def loss(params, example, key):
    @jax.checkpoint
    def layer(x):
        return checkpoint_name(jnp.tanh(x @ params["hidden"]), "hidden")

    def turn(carry, weight):
        return checkpoint_name(carry + weight, "turns"), None

    hidden = layer(example["x"])
    end, _ = jax.lax.scan(turn, jnp.float32(0), hidden * params["out"])
    return (checkpoint_name(end, "end") - example["y"]) ** 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("tagged") / "run", tiny.program(loss))


def test_every_tagged_intermediate_is_that_of_the_sample_at_the_weights_of_the_step(run):
    asked = [run.activations(name) for name in ("hidden", "turns", "end")]
    hidden, turns, end = (x["value"].values for x in replay.compute(*asked))
    assert asked[0].dims == ("step", "position", "unit")
    for step in run.trajectory():
        expected = np.tanh(step.batch["x"] @ step.state.params["hidden"])
        np.testing.assert_allclose(hidden[step.step], expected, rtol=1e-5, atol=1e-6)
        sums = np.cumsum(expected * np.asarray(step.state.params["out"]), axis=1)
        np.testing.assert_allclose(turns[step.step], sums, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(end[step.step, :, 0], sums[:, -1], rtol=1e-5, atol=1e-6)


def test_dead_units_are_asked_for_in_one_line(run):
    alive = (abs(run.activations("hidden")) > 0.5).any(dim=("step", "position")).compute()
    assert alive["value"].shape == (5,)


def test_a_name_that_was_not_tagged_is_told_from_those_that_were(run):
    with pytest.raises(replay.QueryError, match="one of end, hidden, turns"):
        run.activations("outputs")


def test_a_loss_without_tags_says_how_to_tag(tmp_path):
    run = tiny.record(tmp_path / "run")
    assert "activations" not in run.log.header.programs
    with pytest.raises(replay.QueryError, match="without a program 'activations'"):
        run.activations("hidden")


def test_a_batched_loss_is_tagged_as_well(tmp_path):
    def batched(params, model_state, batch, key, sample_keys):
        centred = batch["x"] - batch["x"].mean(0, keepdims=True)
        hidden = checkpoint_name(jnp.tanh(centred @ params["hidden"]), "hidden")
        return (hidden @ params["out"] - batch["y"]) ** 2, model_state

    program = replay.Program(tiny.WEIGHTS, batched, optax.sgd(0.05), batched=True)
    run = tiny.record(tmp_path / "run", program)
    found = run.activations("hidden").sel(step=3).compute()["value"].values[0]
    (step,) = run.trajectory(3, 4)
    centred = step.batch["x"] - step.batch["x"].mean(0, keepdims=True)
    expected = np.tanh(centred @ step.state.params["hidden"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
