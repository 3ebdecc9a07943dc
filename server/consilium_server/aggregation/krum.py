"""Krum and Multi-Krum: the models whose neighbours are near (Blanchard et al., NeurIPS 2017).

With f hostile of n sites a model's score is the sum of its squared distances to its n − f − 2
nearest. Krum takes the model with the least score, Multi-Krum the mean of the m with the least.
Needs n ≥ 2 f + 3 (proposition 4.2).
"""

from __future__ import annotations

import numpy as np

from consilium_common.errors import ConsiliumError
from consilium_common.study.strategies import Krum, MultiKrum
from consilium_server.aggregation import fedavg
from consilium_server.aggregation.distances import squared_distances
from consilium_server.aggregation.rules import Rule, Told
from consilium_server.aggregation.updates import Updates


def select_krum(updates: Updates, told: Told) -> tuple[str, ...]:
    """Return the site of the one model of least score."""
    return _ranked(updates, told.settings)[:1]


def select_multi_krum(updates: Updates, told: Told) -> tuple[str, ...]:
    """Return the sites of the ``kept`` models of least score; their weighted mean is taken."""
    settings: MultiKrum = told.settings
    kept = len(updates) - settings.hostile if settings.kept is None else settings.kept
    return _ranked(updates, settings)[:kept]


def _ranked(updates: Updates, settings: Krum | MultiKrum) -> tuple[str, ...]:
    """Return the sites from the least score to the largest; of equal ones the first by name."""
    hostile = settings.hostile
    if len(updates) < settings.needed:
        raise ConsiliumError(
            "run.quorum",
            f"Krum against {hostile} hostile sites needs the updates of {settings.needed};"
            f" {len(updates)} are good.",
            where="federation.strategy.hostile",
            hint="See why the others were left out, or propose the study with fewer hostile sites.",
        )
    nearest = np.sort(squared_distances(updates), axis=1)[:, 1 : len(updates) - hostile - 1]
    ranked = np.argsort(nearest.sum(axis=1), kind="stable")
    return tuple(updates.sites[index] for index in ranked)


KRUM = Rule(fedavg.begin, chooses=True, select=select_krum)
MULTI_KRUM = Rule(fedavg.begin, chooses=True, select=select_multi_krum)
