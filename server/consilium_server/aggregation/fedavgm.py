"""FedAvg with momentum at the aggregator (Hsu et al., arXiv:1909.06335, section 4)."""

from __future__ import annotations

from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step: v ← β v + Δ, x ← x + η v, where Δ is the mean change."""
    settings = told.settings

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        (velocity,) = block.state
        change = mean(block.updates, updates.weights) - block.model
        velocity = settings.server_momentum * velocity + change
        return block.model + settings.server_learning_rate * velocity, (velocity,)

    return step


RULE = Rule(begin, state=("consilium.velocity.",))
