"""Which strategy a study's name means."""

from __future__ import annotations

from typing import Final

from consilium_common.study.federation import Federation
from consilium_server.aggregation import (
    fedavg,
    fedavgm,
    fedbuff,
    fednova,
    fedopt,
    geometric_median,
    krum,
    median,
    scaffold,
    trimmed_mean,
)
from consilium_server.aggregation.rules import Rule

RULES: Final[dict[str, Rule]] = {
    "fedavg": fedavg.RULE,
    "fedprox": fedavg.RULE,
    "fedavgm": fedavgm.RULE,
    "fedadam": fedopt.FEDADAM,
    "fedyogi": fedopt.FEDYOGI,
    "fedadagrad": fedopt.FEDADAGRAD,
    "scaffold": scaffold.RULE,
    "fednova": fednova.RULE,
    "fedbn": fedavg.RULE,
    "ditto": fedavg.RULE,
    "fedrep": fedavg.RULE,
    "cyclic": fedavg.RULE,
    "median": median.RULE,
    "trimmed-mean": trimmed_mean.RULE,
    "krum": krum.KRUM,
    "multi-krum": krum.MULTI_KRUM,
    "geometric-median": geometric_median.RULE,
}


def rule_of(federation: Federation) -> Rule:
    """Return what the study's aggregator does with the updates of a round."""
    return RULES[federation.strategy.name] if federation.buffered is None else fedbuff.RULE
