"""SCAFFOLD at the aggregator (Karimireddy et al., ICML 2020, algorithm 1).

x ← x + η·mean(Δy) and c ← c + |S|/N·mean(Δc), where S are the sites of the round and N all of the
study. The paper's means are uniform. Where a study weighs its sites by cohort both are weighted
alike: then c is the weighted mean of the sites' own control variates, and the corrections of all
sites still cancel.
"""

from __future__ import annotations

from consilium_common.models.exchange import CONTROL
from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step for the model and the control variate."""
    rate = told.settings.server_learning_rate
    # More sites than the study has cannot answer; N may lag behind while one is being approved.
    share = min(len(updates) / told.sites, 1.0)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        assert block.extras is not None  # the rule names them
        (control,) = block.state
        change = mean(block.updates, updates.weights) - block.model
        control = control + share * mean(block.extras, updates.weights)
        return block.model + rate * change, (control,)

    return step


RULE = Rule(begin, state=(CONTROL,), extra=CONTROL)
