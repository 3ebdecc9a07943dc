"""What sites are offered and what they send: controls, compressed updates, screened ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from server_samples import SITES, House, a_study

from consilium_common.models.compression import encode
from consilium_common.models.exchange import CONTROL
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_server.round_tables import site_rounds


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


def test_under_scaffold_sites_get_the_aggregator_s_control_and_send_theirs(
    tmp_path: Path,
) -> None:
    study = a_study(federation={"strategy": {"name": "scaffold"}, "weighting": "uniform"})
    house = House(tmp_path, study)
    plain = house.answers.update

    def with_controls(model: dict[str, Any], site: str) -> dict[str, Any]:
        names = sorted(house.answers.trained)
        change = np.float32(SITES.index(site) + 1)
        return plain(model, site) | {
            CONTROL + name: np.full_like(model[name], change) for name in names
        }

    house.answers.update = with_controls  # type: ignore[method-assign]
    house.run()
    first, second = house.answers.models["train", 0], house.answers.models["train", 1]
    for name in house.answers.trained:
        assert not first[CONTROL + name].any()
        # All three of its sites sent a change of their own: their mean.
        np.testing.assert_allclose(second[CONTROL + name], 2.0)
    # What is evaluated and kept is the model alone.
    assert (
        set(house.answers.models["evaluate", 2]) == set(house.model) == set(initial_weights(study))
    )


@pytest.mark.parametrize(
    ("compression", "within"),
    [({"encoding": "bfloat16"}, 0.02), ({"encoding": "none", "level": 6}, 1e-6)],
)
def test_a_compressed_update_counts_as_what_it_stands_for_also_after_a_crash(
    tmp_path: Path, compression: dict[str, Any], within: float
) -> None:
    study = a_study(federation={"compression": compression, "quorum": 3, "rounds": 1})
    house = House(tmp_path, study)

    def encoded(site: str, kind: str, number: int) -> Any:
        if kind != "train":
            return None
        model = house.answers.models["train", number]
        update = house.answers.update(model, site)
        blob, _ = encode(study, update, model, None, np.random.default_rng(1).random)
        return house.answers.delivered(site, blob)

    def but_south(site: str, kind: str, number: int) -> Any:
        return (
            house.answers.delivered(site, b"?") if site == "south" else encoded(site, kind, number)
        )

    house.answers.instead = but_south
    house.stuck("train")
    house.answers.instead = encoded
    house.run()
    start = initial_weights(study)
    for name in house.answers.trained:
        np.testing.assert_allclose(house.model[name] - start[name], 2.0, atol=within)


def test_each_site_s_figures_stay_on_record(tmp_path: Path) -> None:
    study = a_study(federation={"screening": {"clip_norm": 40.0, "cosine": -0.5}, "rounds": 1})
    house = House(tmp_path, study)

    def hostile(site: str, kind: str, number: int) -> Any:
        if (site, kind) != ("south", "train"):
            return None
        model = house.answers.models["train", 0]
        names = sorted(house.answers.trained)
        return house.answers.delivered(site, pack({n: model[n] - np.float32(9) for n in names}))

    house.answers.instead = hostile
    house.run()
    east, north, south = site_rounds(house.registry, study.digest)[0]
    elements = sum(initial_weights(study)[name].size for name in house.answers.trained)
    for part, change in ((east, 1), (north, 2), (south, 9)):
        assert part.norm == pytest.approx(change * np.sqrt(elements), rel=1e-4)
        assert part.seconds is not None
        assert part.clipped == (part.norm > 40)
    assert (east.cosine, south.cosine) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert [part.outcome for part in (east, north, south)] == ["accepted", "accepted", "left-out"]
    assert "cosine -1.000" in south.why
    (row,) = house.show()["rounds"]
    assert row["sites"] == ["east", "north"]
    assert row["dropped"] == {"south": south.why}


def test_whose_updates_the_strategy_passed_over_is_on_record(tmp_path: Path) -> None:
    strategy = {"name": "multi-krum", "hostile": 0, "kept": 2}
    house = House(tmp_path, a_study(federation={"strategy": strategy, "quorum": 3, "rounds": 1}))

    def far(site: str, kind: str, number: int) -> Any:
        if (site, kind) != ("south", "train"):
            return None
        model = house.answers.models["train", 0]
        names = sorted(house.answers.trained)
        return house.answers.delivered(site, pack({n: model[n] - np.float32(9) for n in names}))

    house.answers.instead = far
    house.run()
    parts = site_rounds(house.registry, house.study.digest)[0]
    assert [(part.site, part.outcome, part.why) for part in parts] == [
        ("east", "accepted", ""),
        ("north", "accepted", ""),
        ("south", "accepted", "not chosen by the study's strategy"),
    ]
    # It is no fault of the site: it was not dropped.
    assert house.show()["rounds"][0]["dropped"] == {}


def test_where_screening_leaves_the_strategy_too_few_updates_the_study_says_so(
    tmp_path: Path,
) -> None:
    federation = {
        "strategy": {"name": "krum", "hostile": 0},
        "quorum": 3,
        "screening": {"cosine": 0.0},
    }
    house = House(tmp_path, a_study(federation=federation))

    def away(site: str, kind: str, number: int) -> Any:
        if (site, kind) != ("south", "train"):
            return None
        model = house.answers.models["train", 0]
        names = sorted(house.answers.trained)
        return house.answers.delivered(site, pack({n: model[n] - np.float32(9) for n in names}))

    house.answers.instead = away
    assert house.stuck("train").startswith(
        "waiting for 1 more site; Krum against 0 hostile sites needs the updates of 3; 2 are good."
    )
    assert house.show()["rounds"] == []


def test_a_buffered_study_s_quorum_is_not_above_what_makes_a_step() -> None:
    with pytest.raises(ValidationError, match=r"above buffered\.size"):
        a_study(federation={"buffered": {"size": 1}, "quorum": 2})
