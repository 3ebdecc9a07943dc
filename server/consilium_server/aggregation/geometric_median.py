"""The geometric median of the sites' models (Pillutla et al., IEEE TSP 2022, algorithm 2).

The smoothed Weiszfeld iteration z ← Σ βᵢ xᵢ / Σ βᵢ with βᵢ = wᵢ/max(ν, ‖z − xᵢ‖), from the weighted
mean. As every z is a mean of the xᵢ with weights λ, its distances follow from theirs,
‖z − xᵢ‖² = Σⱼ λⱼ Dᵢⱼ − ½ Σⱼₖ λⱼ λₖ Dⱼₖ, and the models are read twice, however many iterations.
"""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.distances import squared_distances
from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step: the mean by the weights that the iteration ends with."""
    weights = _weights(squared_distances(updates), updates.weights, told)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        return mean(block.updates, weights), ()

    return step


def _weights(distances: Values, start: Values, told: Told) -> Values:
    weights: Values = start / start.sum()
    for _ in range(told.settings.iterations):
        spread = distances @ weights
        squares = np.maximum(spread - 0.5 * (weights @ spread), 0.0)
        weights = start / np.maximum(np.sqrt(squares), told.settings.smoothing)
        weights /= weights.sum()
    return weights


RULE = Rule(begin, chooses=True)
