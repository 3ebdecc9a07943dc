"""However many rounds a study has, what is shown of it arrives whole and in messages that fit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scheduling_samples import House
from state_samples import add_round

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import MAX_MESSAGE_BYTES
from consilium_server import overview_pages
from consilium_server.overview import (
    history_overview,
    round_overview,
    studies_overview,
    study_overview,
)
from consilium_server.overview_pages import first_page, fitting, whole_study
from consilium_server.round_tables import ACCEPTED, SiteRound
from consilium_server.services.of_operators import OperatorServices
from consilium_server.spending import SpendMeter
from consilium_server.tables import EvaluationRow


def test_five_thousand_rounds_of_many_sites_are_shown_in_messages_that_fit() -> None:
    sites = ["hospital" * 250]  # as long as the names of a hundred
    study: dict[str, Any] = {
        "digest": "ab" * 32,
        "rounds": [{"number": n, "sites": sites} for n in range(5000)],
        "evaluations": [{"rounds_done": n, "note": "é" * 500} for n in range(2000)],
    }
    assert len(canonical_json(study["rounds"])) > MAX_MESSAGE_BYTES
    sizes = []

    def ask(request: dict[str, Any]) -> Any:
        rows = study.get(request.get("list", ""))
        answer = first_page(study) if rows is None else {"rows": fitting(rows[request["from"] :])}
        sizes.append(len(canonical_json(answer)))
        return json.loads(json.dumps(answer))

    assert whole_study(ask, "ab") == study
    assert max(sizes) < MAX_MESSAGE_BYTES * 3 / 4
    assert len(sizes) < 12


def test_a_row_that_is_larger_than_a_page_comes_alone() -> None:
    large = "x" * MAX_MESSAGE_BYTES
    assert fitting([large, "y"]) == [large]
    assert fitting([]) == []


def test_an_aggregator_that_breaks_its_word_is_a_clear_error() -> None:
    def ask(request: dict[str, Any]) -> Any:
        if "list" in request:
            return {"rows": []}
        return {"digest": "ab", "rounds": [], "evaluations": [], "lengths": {"rounds": 1}}

    with pytest.raises(ConsiliumError) as caught:
        whole_study(ask, "ab")
    assert caught.value.code == "network.garbage"


def test_what_the_service_hands_over_in_pages_is_the_whole_overview(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview_pages, "_ROOM", 300)
    house = House(tmp_path)
    digest = house.study("long", "north", "south", state="stopped")
    for number in range(12):
        add_round(house.registry, digest, number)
    with house.registry.transaction() as session:
        for done in (4, 12):
            session.add(
                EvaluationRow(
                    digest=digest, rounds_done=done, sites=["north"], dropped={}, figures={},
                    declared={}, noise=None,
                )
            )  # fmt: skip
    service = OperatorServices(house.registry, None, None)  # type: ignore[arg-type]
    asked = []

    def ask(request: dict[str, Any]) -> Any:
        asked.append(request)
        return asyncio.run(service.show(None, request))  # type: ignore[arg-type]

    found = whole_study(ask, "long")
    assert found == study_overview(house.registry, house.row(digest), SpendMeter())
    assert len(found["rounds"]) == 12
    assert len(asked) > 3
    with pytest.raises(ConsiliumError) as caught:
        ask({"digest": "long", "list": "progress", "from": 0})
    assert caught.value.code == "network.garbage"
    newest = [
        one["number"] for one in history_overview(house.registry, house.row(digest))["rounds"]
    ]
    assert newest == list(range(12))[-len(newest) :]
    assert 0 < len(newest) < 12


def test_a_round_s_parts_and_a_study_s_count_are_its_own(tmp_path: Path) -> None:
    house = House(tmp_path)
    first, second = (house.study(name, "north", "south") for name in ("first", "second"))
    for number in range(3):
        add_round(house.registry, first, number)
    with house.registry.transaction() as session:
        for digest, number, site in (
            (first, 1, "south"),
            (first, 1, "north"),
            (first, 2, "north"),
            (second, 1, "west"),
        ):
            session.add(SiteRound(digest=digest, number=number, site=site, outcome=ACCEPTED))
    parts = round_overview(house.registry, house.row(first), 1)["parts"]
    assert [part["site"] for part in parts] == ["north", "south"]
    done = {row["name"]: row["rounds_done"] for row in studies_overview(house.registry)}
    assert done == {"first": 3, "second": 0}
    with pytest.raises(ConsiliumError) as caught:
        round_overview(house.registry, house.row(second), 1)
    assert caught.value.code == "study.no-round"
