"""Running statistics of batch norm are averaged, whatever a strategy does to parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategy_samples import start_of, strategy_study

from consilium_common.models.exchange import sent_specs, statistics_names
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study
from consilium_server import networks
from consilium_server.aggregation import SiteUpdate, aggregate

MOVING: dict[str, Any] = {
    "fedavgm": {"name": "fedavgm", "server_learning_rate": 3.0},
    "fedadam": {"name": "fedadam"},
    "fedyogi": {"name": "fedyogi"},
    "fedadagrad": {"name": "fedadagrad"},
    "scaffold": {"name": "scaffold", "server_learning_rate": 2.0},
    "fednova": {"name": "fednova"},
}


def after_a_round(study: Study, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the next model, and the updates of three sites that it was made of."""
    model = folder / "model"
    start = start_of(study)
    model.write_bytes(pack({n: v for n, v in start.items() if not n.startswith("consilium.")}))
    sent, updates = [], []
    for number in range(3):
        rng = np.random.default_rng(number)
        update = {
            spec.name: (5 + rng.random(spec.shape)).astype("f4") for spec in sent_specs(study)
        }
        path = folder / f"update-{number}"
        path.write_bytes(pack(update))
        sent.append(update)
        updates.append(SiteUpdate(f"s{number}", path, weight=number + 1.0, steps=2 + number))
    aggregate(
        study,
        model,
        updates,
        None,
        out=folder / "out",
        out_state=folder / "state",
        round_index=0,
    )
    return unpack((folder / "out").read_bytes()), sent


@pytest.mark.parametrize("name", MOVING)
def test_a_strategy_that_moves_parameters_leaves_statistics_at_the_sites_mean(
    tmp_path: Path, name: str
) -> None:
    study = strategy_study(MOVING[name], norm="batch")
    statistics = statistics_names(study)
    assert {one.rsplit(".", 1)[1] for one in statistics} == {"running_mean", "running_var"}
    new, sent = after_a_round(study, tmp_path)
    means = {n: np.average([u[n] for u in sent], axis=0, weights=[1, 2, 3]) for n in new}
    for one, mean in means.items():
        assert np.allclose(new[one], mean, atol=1e-5) == (one in statistics), one


def test_a_robust_strategy_chooses_among_statistics_too(tmp_path: Path) -> None:
    study = strategy_study("median", norm="batch")
    new, sent = after_a_round(study, tmp_path)
    for one in statistics_names(study):
        assert np.allclose(new[one], np.median([u[one] for u in sent], axis=0))


def test_a_process_without_torch_learns_which_they_are() -> None:
    study = strategy_study(norm="batch")
    found = networks._ask(study)
    assert found == networks._build(study)
    assert found.statistics == statistics_names(study)
    assert statistics_names(strategy_study()) == frozenset()
