"""`site results` reads what this site wrote of a study: the newest model, and the starting one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from budget_samples import refused
from typer.testing import CliRunner

from consilium_client.cli import app
from consilium_client.home import SiteHome
from consilium_client.results import newest_evaluation
from consilium_common.files import private_folder

DIGEST = "ab" * 32


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome.create(tmp_path / "site")


def write(home: SiteHome, name: str, rounds_done: int, dice: float, **more: Any) -> None:
    figures = {
        **{"site": "north", "study": DIGEST, "name": "liver", "rounds_done": rounds_done},
        **{"cases": 3, "dice": {"organ": {"mean": dice, "count": 3}}, **more},
    }
    folder = private_folder(home.reports / DIGEST[:16])
    (folder / name).write_text(json.dumps(figures))


def test_the_starting_model_is_shown_before_and_beside_the_trained_one(home: SiteHome) -> None:
    write(home, "round-00000.json", 0, 0.25)
    found = newest_evaluation(home, "liver")
    assert (found["rounds_done"], found["finished"]) == (0, False)
    shown = CliRunner().invoke(app, ["results", "liver", "--home", str(home.path)]).stdout
    assert "0.250" in shown

    write(home, "round-00002.json", 2, 0.5)
    assert newest_evaluation(home, DIGEST[:6])["rounds_done"] == 2
    write(home, "round-00010.json", 10, 0.75)
    write(home, "evaluation.json", 10, 0.75)
    found = newest_evaluation(home, "liver")
    assert (found["finished"], found["dice"]["organ"]["mean"]) == (True, 0.75)
    assert found["start"]["dice"]["organ"]["mean"] == 0.25
    shown = CliRunner().invoke(app, ["results", "liver", "--home", str(home.path)]).stdout
    assert "starting model" in shown and "0.250" in shown and "0.750" in shown


def test_an_unknown_study_and_a_damaged_report_are_one_clear_error_each(home: SiteHome) -> None:
    with refused("study.no-results"):
        newest_evaluation(home, "liver")
    write(home, "evaluation.json", 10, 0.75)
    with refused("study.no-results"):
        newest_evaluation(home, "")
    (home.reports / DIGEST[:16] / "evaluation.json").write_text("{")
    with refused("state.report"):
        newest_evaluation(home, "liver")
