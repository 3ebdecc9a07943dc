"""FedBuff: a step whenever enough updates are in (Nguyen et al., AISTATS 2022, algorithm 1).

x ← x + η·Σ wᵢ Δᵢ/√(1 + τᵢ) / Σ wᵢ, where Δᵢ is the change against the model that site i began from
and τᵢ how many steps the global model has made since. Old changes count less, and do not make the
others count more.
"""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step."""
    rate = told.settings.server_learning_rate
    discounts = 1.0 / np.sqrt(1.0 + updates.staleness)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        changes = (block.updates - block.model) * discounts[:, None]
        return block.model + rate * mean(changes, updates.weights), ()

    return step


RULE = Rule(begin)
