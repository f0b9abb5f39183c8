import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import replay
from replay import artifact
from replay.program import init_key

KEY = jax.random.key(0)


def inputs(batch, weights=None, step=5):
    size = len(jax.tree.leaves(batch)[0])
    ids = jnp.arange(size, dtype=jnp.int32) + 10
    weights = jnp.ones(size) if weights is None else jnp.asarray(weights, jnp.float32)
    return replay.Inputs.fold(KEY, jnp.uint32(step), ids, weights, batch)


def quadratic(params, example, key):
    return jnp.square(params["w"] * example["x"]).sum()


def state_of(program):
    return program.init(init_key(KEY))


def test_keys_are_folded_as_defined():
    found = inputs({"x": jnp.ones(3)})
    key = jax.random.fold_in(KEY, 5)
    assert found.key == key
    assert found.sample_keys[2] == jax.random.fold_in(key, 12)


def test_the_key_of_the_initialiser_is_not_that_of_any_step_however_it_is_split():
    first = jax.random.split(KEY, 4)
    # This is why the initialiser has a key of its own.
    assert first[0] == jax.random.fold_in(KEY, 0)
    steps = {tuple(jax.random.key_data(jax.random.fold_in(KEY, t)).tolist()) for t in range(100)}
    split = jax.random.key_data(jax.random.split(init_key(KEY), 100)).tolist()
    assert not steps & {tuple(words) for words in split}


def test_the_loss_of_a_step_is_the_weighted_sum_over_the_batch_size():
    program = replay.Program({"w": jnp.array([2.0])}, quadratic, optax.sgd(1.0))
    state = state_of(program)
    batch = {"x": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
    losses, aux, grads, carry = program.gradient(state, inputs(batch, [1, 1, 0, 0.5]))
    assert losses.tolist() == [4, 16, 36, 64]
    assert aux == ()
    assert carry[0] == (4 + 16 + 32) / 4
    assert grads["w"].tolist() == [2 * 2 * (1 + 4 + 8) / 4]
    after = program.update(state, carry, grads, losses)
    assert after.params["w"].tolist() == [2 - 13]


def test_a_sample_gradient_is_that_of_its_own_loss_with_its_own_key():
    def noisy(params, example, key):
        return (params["w"] * (example["x"] + jax.random.normal(key, (1,)))).sum()

    program = replay.Program({"w": jnp.zeros(1)}, noisy, optax.sgd(1.0))
    state, given = state_of(program), inputs({"x": jnp.array([[1.0], [2.0], [3.0]])})
    sum_of_all = sum(program.sample_gradient(state, given, i)["w"] for i in range(3))
    expected = given.batch["x"][1] + jax.random.normal(given.sample_keys[1], (1,))
    assert program.sample_gradient(state, given, 1)["w"].tolist() == expected.tolist()
    grads = program.gradient(state, given)[2]
    np.testing.assert_allclose(sum_of_all / 3, grads["w"], rtol=1e-6)  # another order of adding


def test_a_batched_sample_gradient_has_the_whole_batch_as_context():
    def centred(params, model_state, batch, key, sample_keys):
        values = params["w"] * batch["x"]
        return jnp.square(values - values.mean()), model_state

    program = replay.Program({"w": jnp.array(1.0)}, centred, optax.sgd(1.0), batched=True)
    given = inputs({"x": jnp.array([0.0, 3.0])})
    assert float(program.sample_gradient(state_of(program), given, 0)["w"]) == 2 * 1.5**2


def test_a_pair_from_a_batched_initialiser_is_params_and_model_state():
    def init(key):
        return {"w": jnp.zeros(2)}, {"seen": jnp.zeros((), jnp.int32)}

    def count(params, model_state, batch, key, sample_keys):
        losses = batch["x"] @ params["w"]
        return losses, {"seen": model_state["seen"] + 1}

    program = replay.Program(init, count, optax.sgd(0.1), batched=True)
    state = state_of(program)
    assert set(state.params) == {"w"}
    losses, _, grads, carry = program.gradient(state, inputs({"x": jnp.ones((4, 2))}))
    assert int(program.update(state, carry, grads, losses).model_state["seen"]) == 1


def test_linen_streams_differ_between_samples_and_follow_the_sample_not_its_position():
    class Noise(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.5, deterministic=False)(linen.Dense(64)(x)).sum()

    program = replay.Program.linen(Noise(), lambda apply, x: apply(x), optax.sgd(1.0), jnp.ones(3))
    state, given = state_of(program), inputs(jnp.ones((3, 3)))
    losses = program.losses(state, given)
    assert len(set(losses.tolist())) == 3
    turned = given._replace(ids=given.ids[::-1], sample_keys=given.sample_keys[::-1])
    assert program.losses(state, turned).tolist() == losses[::-1].tolist()
    assert program.name == "Noise"


def test_linen_collections_need_a_batched_loss_and_are_carried_there():
    class Normal(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(x).sum(-1)

    with pytest.raises(replay.ProgramError, match="Normal keeps batch_stats beside params"):
        replay.Program.linen(Normal(), lambda apply, x: apply(x), optax.sgd(1.0), jnp.ones((2, 3)))
    program = replay.Program.linen(
        Normal(), lambda apply, x: apply(x), optax.sgd(1.0), jnp.ones((2, 3)), batched=True
    )
    state = state_of(program)
    losses, _, grads, carry = program.gradient(state, inputs(2 * jnp.ones((4, 3))))
    after = program.update(state, carry, grads, losses)
    mean = after.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, [0.02, 0.02, 0.02], rtol=1e-5)


def test_nnx_splits_params_from_what_a_batch_leaves_behind():
    class Normal(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = Normal(nnx.Rngs(0))
    program = replay.Program.nnx(
        model, lambda model, x, rngs: model(x).sum(-1), optax.sgd(1.0), batched=True
    )
    state = state_of(program)
    assert set(state.params["dense"]) == {"kernel", "bias"}
    assert set(state.model_state["norm"]) == {"mean", "var"}
    before = np.asarray(model.norm.mean[...]).tolist()
    losses, _, grads, carry = jax.jit(program.gradient)(state, inputs(jnp.ones((4, 3))))
    after = program.update(state, carry, grads, losses)
    assert after.model_state["norm"]["mean"].tolist() != before
    assert np.asarray(model.norm.mean[...]).tolist() == before


def test_what_is_no_optimizer_is_refused_by_its_name():
    with pytest.raises(replay.ProgramError, match="the optimizer is adam, without init") as caught:
        replay.Program({"w": jnp.zeros(1)}, quadratic, optax.adam)  # type: ignore[arg-type]
    assert "not optax.adam" in caught.value.fix


def test_optimizers_that_need_the_loss_value_get_the_weighted_mean():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    program = replay.Program({"w": jnp.array([1.0])}, quadratic, spy)
    state = state_of(program)
    results = program.gradient(state, inputs({"x": jnp.array([[1.0], [3.0]])}, [1, 2]))
    program.update(state, results[3], results[2], results[0])
    assert float(seen[-1]) == (1 + 2 * 9) / 2


def test_exports_hold_no_path_of_this_machine_and_do_not_depend_on_source_lines():
    program = replay.Program({"w": jnp.array([1.0])}, quadratic, optax.adam(1.0))
    state = state_of(program)
    example = {"x": np.ones((1, 1), np.float32)}
    _, first = artifact.trace(program, state, example, batch_size=4)
    _, again = artifact.trace(program, state, example, batch_size=4)
    assert set(first) == {"step", "gradient", "update", "losses", "sample_gradient"}
    for name, exported in first.items():
        data = bytes(exported.serialize())
        assert b".py" not in data
        assert data == bytes(again[name].serialize())


def test_what_jax_remembers_of_earlier_traces_does_not_change_the_text_of_a_program():
    """A helper that JAX has forgotten between two calls is traced again, and no longer shared."""
    forgetful = False

    def loss(params, example, key):
        x = jnp.where(example["x"] > 0, params["w"], 0.0)
        if forgetful:
            jax.clear_caches()
        return (x * jnp.where(example["x"] > 1, params["w"], 0.0)).sum()

    program = replay.Program({"w": jnp.ones(3)}, loss, optax.sgd(0.1))
    state, example = state_of(program), {"x": np.zeros((1, 3), np.float32)}

    def trace():
        return artifact.trace(program, state, example, batch_size=2)[1]

    first = trace()
    forgetful = True
    second = trace()
    files = [bytes(exported["step"].mlir_module_serialized) for exported in (first, second)]
    assert files[0] != files[1]
    for name in first:
        assert artifact.text(first[name]) == artifact.text(second[name]), name


def test_functions_are_told_apart_by_what_they_do_and_not_by_their_names():
    @jax.jit
    def square(x):
        return x * x

    @jax.jit
    def double(x):
        return x + x

    def text_of(*functions):
        def main(x):
            for function in functions:
                x = function(x)
            return x

        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        return artifact.text(jax.export.export(jax.jit(main))(shape))

    square_again = jax.jit(lambda x: x * x)
    assert text_of(square, double) == text_of(square_again, double)
    assert text_of(square, square) == text_of(square, square_again)
    assert text_of(square, double) != text_of(double, square)
    assert text_of(square, double) != text_of(square, square)


def test_a_signature_survives_msgpack():
    program = replay.Program({"w": jnp.array([1.0])}, quadratic, optax.adam(1.0))
    example = {"x": np.ones((1, 1), np.float32)}
    signature, _ = artifact.trace(program, state_of(program), example, batch_size=4, block=8)
    assert artifact.Signature.from_plain(signature.to_plain()) == signature
    assert signature.programs == ("block",)


def test_custom_calls_of_linear_algebra_are_allowed():
    def loss(params, example, key):
        solved = jnp.linalg.solve(params["w"] + 3 * jnp.eye(3), example["x"])
        return solved.sum() + jnp.linalg.eigvalsh(params["w"] + params["w"].T).sum()

    program = replay.Program({"w": jnp.ones((3, 3))}, loss, optax.sgd(1.0))
    example = {"x": np.ones((1, 3), np.float32)}
    signature, exported = artifact.trace(program, state_of(program), example, batch_size=2)
    calls = artifact.custom_calls(exported["gradient"])
    assert calls
    artifact.load("gradient", bytes(exported["gradient"].serialize()), signature)
