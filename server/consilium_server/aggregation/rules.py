"""What a strategy is to the aggregator: a function from a block of all updates to the new model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilium_server.aggregation.updates import Block, Updates, Values

#: Makes a block of the new model, and what the strategy keeps of it until the next round.
Step = Callable[[Block], tuple[Values, tuple[Values, ...]]]
#: Names the sites whose updates are taken.
Select = Callable[[Updates, "Told"], tuple[str, ...]]


@dataclass(frozen=True)
class Told:
    """What a strategy is told beside the updates.

    Attributes
    ----------
    settings : pydantic model
        ``study.federation.strategy``, or ``study.federation.buffered``.
    round_index : int
        From 0.
    sites : int
        All sites of the study, asked in this round or not.
    """

    settings: Any
    round_index: int
    sites: int


@dataclass(frozen=True)
class Rule:
    """One strategy.

    Attributes
    ----------
    begin : callable
        Looks at the updates as a whole where it has to, and returns the step for each block.
    state : tuple of str
        Prefixes of the tensors that it keeps from round to round, one for each aggregated tensor.
    extra : str
        Prefix of the tensors that sites send beside the model's; empty: none.
    chooses : bool
        Whether it chooses among the sites' values rather than moving along their mean change. Only
        then is it right for the running statistics of batch norm; otherwise they are averaged.
    select : callable or None
        Names the sites whose updates the model is made of, where the strategy takes whole ones and
        leaves the others; ``begin`` gets those alone. None: all of them.
    """

    begin: Callable[[Updates, Told], Step]
    state: tuple[str, ...] = ()
    extra: str = ""
    chooses: bool = False
    select: Select | None = None


def mean(values: Values, weights: Values) -> Values:
    """Return the weighted mean over sites; of one site, that site's values exactly.

    Site after site and element by element: no library decides the order of a sum.

    Parameters
    ----------
    values : ndarray
        Shape ``(sites, elements)``.
    weights : ndarray
        Shape ``(sites,)``, positive.
    """
    total: Values = weights[0] * values[0]
    product = np.empty_like(total)
    for weight, row in zip(weights[1:], values[1:], strict=True):
        total += np.multiply(weight, row, out=product)
    total /= math.fsum(weights)
    return total
