"""The coordinate-wise trimmed mean (Yin et al., ICML 2018, definition 2).

Of each coordinate the ⌊trim·n⌋ largest and as many smallest are left out. Every site counts once.
Withstands so many hostile sites.
"""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.ordering import ordered
from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step."""
    cut = int(told.settings.trim * len(updates))
    inner = slice(cut, len(updates) - cut)
    alike = np.ones(len(updates) - 2 * cut)

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        return mean(ordered(block.updates)[inner], alike), ()

    return step


RULE = Rule(begin, chooses=True)
