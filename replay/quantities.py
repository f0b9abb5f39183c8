"""The quantities of a run: what can be asked for, for every past step."""

from typing import Any, Protocol

from replay.asking import Asking
from replay.query.expressions import Expression


class HasAsking(Protocol):
    """Whoever knows whom to ask."""

    @property
    def asking(self) -> Asking:
        """Whom its expressions ask."""
        ...


class Quantities:
    """Lazy expressions over all steps of a run; `compute()` answers, `explain()` tells the cost.

    Those of samples have dimensions (step, position); a sample that occurs twice in a batch stays
    two rows. Trajectory quantities (`weights`, `opt_state`, `grads`, `updates`, `sample_losses`)
    are bit for bit those of the run; the others are computed at its exact weights by archived
    programs of their own, and carry the ordinary rounding of those.
    """

    asking: Asking

    @property
    def weights(self) -> Expression:
        """The parameters at each state, (state, weight): states 0 to `steps`."""
        return self.asking.scan("weights")

    @property
    def opt_state(self) -> Expression:
        """The optimizer's state by its own paths, (state, weight)."""
        return self.asking.scan("opt_state")

    @property
    def grads(self) -> Expression:
        """The batch gradient that the run itself used, (step, weight)."""
        return self.asking.scan("grads")

    @property
    def updates(self) -> Expression:
        """Weights after a step minus weights before it, (step, weight)."""
        return self.asking.scan("updates")

    @property
    def carried_updates(self) -> Expression:
        """Δ(0): the update that the optimizer would have made without a gradient, (step, weight).

        Momentum and decay. Under Adam it is most of each update: little of what moves at a step
        belongs to the batch of that step.
        """
        return self.asking.scan("carried_updates")

    @property
    def residual_updates(self) -> Expression:
        """What is neither carried nor attributed to a sample, (step, weight).

        Rounding; and, where an optimizer mixes weights, what moves weights whose own gradient is 0.
        """
        return self.asking.scan("residual_updates")

    @property
    def condition(self) -> Expression:
        """Σ|share| / |Δ(g) - Δ(0)| over the samples of the batch, (step, weight).

        1 where all pull one way, large where they cancel. Rankings of `sample_updates` leave out
        what exceeds 1e3.
        """
        return self.asking.scan("condition")

    @property
    def samples(self) -> Expression:
        """The sample id at every occurrence, (step, position); -1 for padding."""
        return self.asking.scan("samples")

    @property
    def sample_losses(self) -> Expression:
        """The loss of each sample of the batch before the step, (step, position)."""
        return self.asking.scan("sample_losses")

    @property
    def sample_grads(self) -> Expression:
        """The gradient of each sample's own loss, with its own key, (step, position, weight)."""
        return self.asking.scan("sample_grads")

    @property
    def sample_updates(self) -> Expression:
        """The share of each sample in the update, (step, position, weight).

        A declared attribution, not a fact: ((Δ(g) - Δ(0)) / g) · wᵢgᵢ/B, weight by weight, 0 where
        g is 0, with Δ(g) the update that the optimizer returns for the batch gradient g. The shares
        add up to Δ(g) - Δ(0), the part of the update that belongs to the batch: all of it for SGD,
        under Adam often a tenth, see `carried_updates`.
        """
        return self.asking.scan("sample_updates")

    def activations(self, name: str) -> Expression:
        """An intermediate that the loss tagged by `checkpoint_name`, (step, position, unit)."""
        return self.asking.activations(name)

    def column(self, name: str) -> Expression:
        """A logged column, (step): `loss`, `seconds`, or what the loss and the user reported."""
        return self.asking.column(name)

    def on(self, source: Any, *, name: str = "") -> "OtherSamples":
        """Ask for other samples at the same states, such as a test set.

        Args:
            source: anything that `Data.of` takes; examples shaped like the run's.
            name: shown in plans.

        Example:
            `run.on(test).sample_losses.sel(state=100).mean()`
        """
        return OtherSamples(self.asking, self.asking.add(source, name))


class OtherSamples:
    """Quantities of samples that the run did not train on, at each of its states.

    A sample's key at state t is that which it would have had in step t.
    """

    def __init__(self, asking: Asking, name: str):
        self._asking, self._name = asking, name

    @property
    def sample_losses(self) -> Expression:
        """The loss of each sample, (state, sample)."""
        return self._asking.scan("sample_losses", source=self._name)

    @property
    def sample_grads(self) -> Expression:
        """The gradient of each sample's loss, (state, sample, weight)."""
        return self._asking.scan("sample_grads", source=self._name)

    def activations(self, name: str) -> Expression:
        """A tagged intermediate, (state, sample, unit)."""
        return self._asking.activations(name, source=self._name)
