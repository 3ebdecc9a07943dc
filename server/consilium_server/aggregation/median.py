"""The coordinate-wise median of the sites' models (Yin et al., ICML 2018, definition 1).

Every site counts once: a weight is what a site says of itself. Withstands hostile sites while they
are fewer than half.
"""

from __future__ import annotations

from consilium_server.aggregation.ordering import median
from consilium_server.aggregation.rules import Rule, Step, Told
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step."""

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        return median(block.updates), ()

    return step


RULE = Rule(begin, chooses=True)
