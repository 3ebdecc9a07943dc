"""Adaptive steps at the aggregator: FedAdam, FedYogi, FedAdagrad (Reddi et al., ICLR 2021).

The mean change Δ of a round is taken for a negative gradient. m is its running mean, v that of its
square, and the model moves by η·m/(√v + τ). As in Flower v begins at 0 (the paper: τ²), and FedAdam
corrects both for having begun at 0 (Kingma and Ba, ICLR 2015, section 2).
"""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values

_FIRST = "consilium.first-moment."
_SECOND = "consilium.second-moment."


def begin_fedadam(updates: Updates, told: Told) -> Step:
    """Return the step: v ← β₂ v + (1 − β₂) Δ²."""
    settings, t = told.settings, told.round_index + 1
    rate = settings.server_learning_rate
    rate *= np.sqrt(1 - settings.beta2**t) / (1 - settings.beta1**t)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        first, second = block.state
        change = mean(block.updates, updates.weights) - block.model
        first = settings.beta1 * first + (1 - settings.beta1) * change
        second = settings.beta2 * second + (1 - settings.beta2) * change**2
        return block.model + rate * first / (np.sqrt(second) + settings.tau), (first, second)

    return step


def begin_fedyogi(updates: Updates, told: Told) -> Step:
    """Return the step: v ← v − (1 − β₂) Δ² sign(v − Δ²), which grows v slower than Adam."""
    settings = told.settings

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        first, second = block.state
        change = mean(block.updates, updates.weights) - block.model
        square = change**2
        first = settings.beta1 * first + (1 - settings.beta1) * change
        second = second - (1 - settings.beta2) * square * np.sign(second - square)
        moved = settings.server_learning_rate * first / (np.sqrt(second) + settings.tau)
        return block.model + moved, (first, second)

    return step


def begin_fedadagrad(updates: Updates, told: Told) -> Step:
    """Return the step: v ← v + Δ², and m = Δ."""
    settings = told.settings

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        (second,) = block.state
        change = mean(block.updates, updates.weights) - block.model
        second = second + change**2
        moved = settings.server_learning_rate * change / (np.sqrt(second) + settings.tau)
        return block.model + moved, (second,)

    return step


FEDADAM = Rule(begin_fedadam, state=(_FIRST, _SECOND))
FEDYOGI = Rule(begin_fedyogi, state=(_FIRST, _SECOND))
FEDADAGRAD = Rule(begin_fedadagrad, state=(_SECOND,))
