"""The commands of `consilium site data`: what they say, where, and their exit status."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from data_fixtures import write_pairs
from rich.console import Console
from typer.testing import CliRunner

from consilium_client.data import terminal
from consilium_client.data.cli import data_app
from consilium_common.console import MODE
from consilium_common.errors import WARNINGS_ONLY

LABELS = ("--label", "background=0", "--label", "liver=1", "--input", "ct")


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODE, "json", True)


def call(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    answer = CliRunner().invoke(data_app, [*arguments, "--home", str(tmp_path / "home")])
    return answer.exit_code, answer.stdout, answer.stderr


def test_import_list_check_and_purge(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 3)
    status, out, err = call(tmp_path, "import", str(folder), "--site", "northfield", *LABELS)
    assert status == 0
    assert "Detected csv: the case list cases.csv. It could also be read as pairs" in err
    assert "3 cases of 3 patients; 3 read now" in out
    status, out, _ = call(tmp_path, "list")
    assert status == 0 and "scan1" in out and "Patient" not in out
    status, out, _ = call(tmp_path, "check")
    # A cohort of three is a warning, and nothing else is wrong.
    assert status == WARNINGS_ONLY
    assert "Good: 3 cases of 3 patients; 0 read again" in out and "1 warning" in out
    status, out, _ = call(tmp_path, "purge")
    assert status == 0 and out.startswith("Deleted ")


@pytest.mark.usefixtures("as_json")
def test_json_is_exactly_one_envelope(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    status, out, _ = call(tmp_path, "import", str(folder), "--site", "northfield", *LABELS)
    answer = json.loads(out)
    assert status == 0 and answer["status"] == "ok"
    assert answer["data"]["site"] == "northfield"
    assert answer["data"]["labels"] == {"background": 0, "liver": 1}
    _, out, _ = call(tmp_path, "list")
    assert [row["case_id"] for row in json.loads(out)["data"]] == ["scan0", "scan1"]


def test_an_import_takes_classes_by_range_and_covariates_from_columns(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    rows = [
        f"scan{n},p{n},images/scan{n}.nii.gz,{age},{kg}"
        for n, age, kg in ((0, 31, 70), (1, 80, ""))
    ]
    (folder / "cases.csv").write_text("\n".join(["case_id,patient_id,image,age,weight", *rows]))
    taken = ("--label-from", "age", "--covariate", "kg=weight", "--format", "csv")
    ranges = ("--label", "young=<40", "--label", "old=>=65")
    status, _, err = call(tmp_path, "import", str(folder), *taken, *ranges)
    assert status == 0, err
    assert "Covariate kg: numbers, missing in 1 case." in err
    site = (tmp_path / "home" / "data" / "site.yaml").read_text()
    assert 'old: ">=65"' in site and 'covariates: ["kg"]' in site
    assert "31" in (tmp_path / "home" / "data" / "cases.csv").read_text()


@pytest.mark.usefixtures("as_json")
def test_several_bad_cases_are_a_table_on_stderr_and_one_error(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 3)
    for number in (0, 2):
        (folder / "labels" / f"scan{number}.nii.gz").unlink()
    status, out, err = call(tmp_path, "import", str(folder), *LABELS)
    error = json.loads(out)["error"]
    assert status == 4
    assert error["code"] == "data.missing" and "2 of 3 cases" in error["message"]
    assert Path(error["where"]).is_file()
    assert "scan0" in err and "scan2" in err
    status, out, err = call(tmp_path, "import", str(folder), *LABELS, "--skip-bad")
    assert status == 0 and json.loads(out)["data"]["left_out"] == 2
    assert "Left out 2 cases" in err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("import", "no-such-folder"), 4, "no such folder"),
        (("import", ".", "--format", "zip"), 2, "no format zip"),
        (("import", ".", "--label", "liver"), 2, "NAME=VALUE"),
        (("import", ".", "--channel", "=T1"), 2, "NAME=VALUE"),
        (("import", ".", "--covariate", "a=x", "--covariate", "a=y"), 2, "twice"),
        (("check",), 8, "no site here"),
    ],
)
def test_wrong_calls_are_one_clear_error(
    tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    found, out, err = call(tmp_path, *arguments)
    assert found == status
    assert said in err and "Traceback" not in err and out == ""


def test_a_bar_tells_rate_and_time_left_on_a_terminal_and_lines_stay_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(terminal, "err", lambda: console)
    with terminal.progress_shown() as (progress, say):
        for done in range(1, 6):
            progress("reading", done, 50)
            time.sleep(0.06)
        say("4 cases to read")
    shown = screen.getvalue()
    assert "reading" in shown and "5/50" in shown and "4 cases to read" in shown
    assert re.search(r"\d/s", shown), "no rate"
    assert re.search(r"0:00:\d\d", shown), "no time left"
