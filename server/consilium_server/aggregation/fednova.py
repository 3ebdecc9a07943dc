"""FedNova: who takes more steps pulls no harder (Wang et al., NeurIPS 2020, equation 8).

x ← x + τ_eff·Σ pᵢ (xᵢ − x)/τᵢ with τ_eff = Σ pᵢ τᵢ: exact for plain SGD at the sites, whose change
grows by one gradient a step. With momentum the paper weighs the steps; here they count alike.
"""

from __future__ import annotations

import math

from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step; τᵢ are the local steps that each site took."""
    effective = math.fsum(updates.weights * updates.steps) / math.fsum(updates.weights)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        per_step = (block.updates - block.model) / updates.steps[:, None]
        return block.model + effective * mean(per_step, updates.weights), ()

    return step


RULE = Rule(begin)
