"""Statistics at the aggregator: asked for once and first, summed, shown as what they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from server_samples import SITES, House, private

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.study import Study
from consilium_common.study.statistics import tables
from consilium_common.wire.messages import to_server
from consilium_server.statistics import print_view, public_view


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


def counting(of: list[str] | None = None) -> Study:
    """Return a private study of one input and three classes that asks for statistics."""
    canonical = private(evaluation={"release": "none", "epsilon": None}).to_canonical()
    wanted = {"epsilon": 0.5, "of": of or ["classes", "size"]}
    return Study.model_validate({**canonical, "statistics": wanted})


def answers(study: Study, **values: float) -> dict[str, float]:
    """Return a site's figures: 0 but for those given, with _ for the point of a name."""
    figures = dict.fromkeys((name for table in tables(study) for name in table.figures), 0.0)
    return figures | {name.replace("_", "."): value for name, value in values.items()}


def house_of(folder: Path, study: Study) -> House:
    house = House(folder, study)
    house.answers.statistics = {site: answers(study) for site in SITES}
    return house


def words(house: House) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        print_view(public_view(house.show()), console)
    return capture.get()


def test_sites_are_asked_once_and_before_anything_else(tmp_path: Path) -> None:
    house = house_of(tmp_path, counting())

    def broken(site: str, kind: str, number: int) -> Any:
        if kind == "evaluate":
            raise ConsiliumError("run.failed", "Not now.")
        if kind == "train":
            raise ConsiliumError("run.failed", "Not now.")

    house.answers.instead = broken
    assert house.stuck("train").startswith("waiting for 2 more sites; east: run.failed")
    assert house.answers.asked == [("query", 0), ("evaluate", 0), ("train", 0)]
    house.answers.instead = lambda *_: None
    house.answers.asked.clear()
    house.run()
    assert house.answers.asked == [("train", 0), ("train", 1), ("evaluate", 2)]
    noted = [row for row in house.registry.received("north") if row.purpose == "statistics"]
    assert [row.round for row in noted] == [0]


def test_a_study_without_statistics_asks_for_none_and_says_how_to(tmp_path: Path) -> None:
    house = House(tmp_path, private(evaluation={"release": "none", "epsilon": None}))
    house.run()
    assert "query" not in {kind for kind, _ in house.answers.asked}
    data = public_view(house.show())
    assert data["statistics"] is None
    assert data["public"] == {
        "cohorts": dict.fromkeys(sorted(SITES), 10),
        "patients": 30,
        "rounds": {"done": 2, "planned": 2},
        "inputs": house.study.task.inputs,
        "classes": house.study.task.classes,
    }
    assert "statistics: {epsilon: 1.0" in words(house)


def test_shares_are_the_sums_over_declared_patients_with_the_error_of_the_noise(
    tmp_path: Path,
) -> None:
    study = counting()
    house = house_of(tmp_path, study)
    root = math.sqrt(2)  # two classes beside the background share a patient's unit
    for site, share in zip(SITES, (2.0, 5.0, 8.0), strict=True):
        house.answers.statistics[site] = answers(study, classes_1=share / root, size_0=-1.0)
    house.run()
    found = house.show()["statistics"]
    assert (found["sites"], found["patients"], found["dropped"]) == (sorted(SITES), 30, {})
    plan = parameters(study)
    assert plan is not None
    assert plan.statistics_noise is not None
    noise = plan.statistics_noise * root
    assert found["noise"] == noise
    classes, size = found["tables"]
    assert [row["bin"] for row in classes["bins"]] == study.task.classes[1:]
    assert [row["share"] for row in classes["bins"]] == pytest.approx([0.0, 0.5])
    assert classes["standard_error"] == pytest.approx(noise * math.sqrt(3) / 30 * root)
    assert size["bins"][0]["share"] == pytest.approx(-0.1)  # noise; shown as it is
    assert size["standard_error"] == pytest.approx(noise * math.sqrt(3) / 30)
    shown = words(house)
    assert "one private query at each site, ε 0.5 at δ 0.001" in shown
    assert ".50 ± " in shown
    assert "-.10 ± " in shown


def test_a_site_that_fails_costs_its_share_and_nothing_else(tmp_path: Path) -> None:
    house = house_of(tmp_path, counting())

    def refuses(site: str, kind: str, number: int) -> Any:
        if (site, kind) == ("east", "query"):
            raise ConsiliumError("privacy.metrics-refused", "No.")

    house.answers.instead = refuses
    house.run()
    shown = house.show()
    assert shown["state"] == "finished"
    assert shown["statistics"]["sites"] == ["north", "south"]
    assert shown["statistics"]["patients"] == 20
    assert "privacy.metrics-refused" in shown["statistics"]["dropped"]["east"]
    assert "No statistics of east" in words(house)
    assert [row["sites"] for row in shown["rounds"]] == [sorted(SITES)] * 2
    # It trained as often as the others and released less.
    assert shown["epsilon"]["east"] < shown["epsilon"]["north"] == shown["epsilon"]["south"]


@pytest.mark.parametrize(
    "spoiled",
    [{"size.0": math.nan}, {"size.0": math.inf}, {"size.0": -1.7e308}, {"loss": 0.5}, None],
    ids=["nan", "infinite", "absurd", "one more", "none"],
)
def test_numbers_that_are_not_the_studys_are_left_out(
    tmp_path: Path, spoiled: dict[str, float] | None
) -> None:
    study = counting()
    house = house_of(tmp_path, study)
    sent = {} if spoiled is None else {**answers(study), **spoiled}
    house.answers.instead = lambda site, kind, number: (
        to_server(None, sent) if (site, kind) == ("south", "query") else None
    )
    house.run()
    found = house.show()["statistics"]
    assert found["sites"] == ["east", "north"]
    assert "run.bad-figures" in found["dropped"]["south"]
    assert "statistics" not in {row.purpose for row in house.registry.received("south")}


def test_where_nobody_answers_training_goes_on_and_the_reasons_are_shown(tmp_path: Path) -> None:
    house = house_of(tmp_path, counting())

    def refuse(site: str, kind: str, number: int) -> Any:
        if kind == "query":
            raise ConsiliumError("privacy.metrics-refused", "No.")

    house.answers.instead = refuse
    house.run()
    assert house.show()["state"] == "finished"
    found = house.show()["statistics"]
    assert (found["sites"], found["tables"]) == ([], [])
    assert "No site released statistics." in words(house)


def test_the_spend_that_is_shown_composes_training_and_statistics(tmp_path: Path) -> None:
    house = house_of(tmp_path, counting())
    house.run()
    plan = parameters(house.study)
    assert plan is not None
    expected = epsilon_of(plan.events_of(2), plan.delta)
    assert house.show()["epsilon"] == {site: round(expected, 4) for site in sorted(SITES)}
