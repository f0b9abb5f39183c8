"""Settings of every test: strict promotion, reproducible examples, GPU tests only on a GPU."""

import functools
import os

import flax.linen
import flax.nnx
import hypothesis
import jax
import optax
import pytest

# Answers come from replays, except where a test is about what is kept.
os.environ["REPLAY_CACHE_BYTES"] = "0"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("quick", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=500)
hypothesis.settings.load_profile("quick")


def _with_standard_promotion(function):
    @functools.wraps(function)
    def wrapped(*args, **options):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return wrapped


# Strictness is for our own code. optax mixes int32 counts with floats throughout (Adam's bias
# correction, schedules, MultiSteps, reduce_on_plateau), and so does flax's avg_pool; what they
# compute under standard promotion is what users get. The rest of flax and equinox is strict.
# Every optax transformation is one of these tuples, so one constructor covers them all.
_new_transformation = optax.GradientTransformation.__new__
optax.GradientTransformation.__new__ = lambda cls, init, update: _new_transformation(
    cls, _with_standard_promotion(init), _with_standard_promotion(update)
)
for _owner, _name in [
    (optax.MultiSteps, "update"),
    (flax.linen, "avg_pool"),
    (flax.nnx, "avg_pool"),
]:
    setattr(_owner, _name, _with_standard_promotion(getattr(_owner, _name)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


# The files that take longest; processes side by side then end at about the same time.
LONG = (
    "contract query cache readme sql kill recorder cli counterfactuals fork reduce indexes grads "
    "influence"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
