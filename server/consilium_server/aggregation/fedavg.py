"""The weighted mean of the sites' models (McMahan et al., AISTATS 2017).

Also what the aggregator does for the strategies whose difference is at the sites: FedProx (Li et
al., MLSys 2020), FedBN (Li et al., ICLR 2021), Ditto (Li et al., ICML 2021), FedRep (Collins et
al., ICML 2021), and cyclic weight transfer (Chang et al., JAMIA 2018), in which one site is asked a
round and the mean is its model.
"""

from __future__ import annotations

from consilium_server.aggregation.rules import Rule, Step, Told, mean
from consilium_server.aggregation.updates import Block, Updates, Values


def begin(updates: Updates, told: Told) -> Step:
    """Return the step: Σ wᵢ xᵢ / Σ wᵢ."""

    def step(block: Block) -> tuple[Values, tuple[Values, ...]]:
        return mean(block.updates, updates.weights), ()

    return step


RULE = Rule(begin)
