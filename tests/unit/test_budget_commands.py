"""`site budget`, `site policy` and `site results`: what they say, and what they never say."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from budget_samples import COHORT, DELTA, ROUND, policy, refused, run_round, study
from data_fixtures import write_pairs
from ledger_samples import KEY, charge, open_ledger
from site_samples import joined_site
from typer.testing import CliRunner

from consilium_client.budget.charging import charge_round
from consilium_client.budget.policy import default_policy_text, parse_policy, write_default_policy
from consilium_client.budget.table import bars, budget_command, budget_table
from consilium_client.cli import app
from consilium_client.data.split import open_patient_key
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.console import MODE
from consilium_common.ledger.spend import Bin
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of, parameters

#: As a hospital might write one; it must never be shown.
#: Its number cannot stand in a key or a digest by chance: neither has a hyphen.
NUMBER = "7731-4408"
PATIENT = f"PID-{NUMBER} Grünwald"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    home = SiteHome.create(tmp_path / "site")
    write_default_policy(home)
    return home


@pytest.fixture
def as_json() -> Iterator[None]:
    MODE.json = True
    yield
    MODE.json = False


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the data of the one envelope that was printed."""
    return json.loads(capsys.readouterr().out)["data"]


def test_the_table_shows_the_spread_over_patients_and_studies(ledger: Ledger) -> None:
    run_round(ledger, policy(), 0, asked=study("first"))
    run_round(ledger, policy(), 0, asked=study("second"), members=COHORT[:12])
    table = budget_table(ledger, policy())
    one, two = (epsilon_of([ROUND] * n, DELTA) for n in (1, 2))
    assert (table.spend.least, table.spend.median, table.spend.most) == (one, two, two)
    assert table.remaining == 10 - two
    assert [s.patients for s in table.spend.studies] == [20, 12]
    plain = table.to_dict()
    assert plain["left"] == {"least": 10 - two, "median": 10 - two, "most": 10 - one}
    assert sum(row["patients"] for row in plain["spend"]["histogram"]) == 20
    assert [row["patients"] for row in plain["spend"]["years"]] == [20]


def test_a_single_patient_has_a_bar_beside_ten_thousand_and_nobody_has_none() -> None:
    lines = bars([Bin(0.0, 1.0, 10_000), Bin(1.0, 2.0, 0), Bin(2.0, 3.0, 1)])
    assert [line.count("█") for line in lines] == [40, 0, 1]
    assert lines[0].endswith("10,000")


def test_the_command_prints_for_people(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    budget_command(home.path)
    assert "Nothing was charged yet" in capsys.readouterr().out
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=study())
    budget_command(home.path)
    shown = capsys.readouterr().out
    assert "20 patients" in shown
    assert "unit patient" in shown
    assert "for ever" in shown
    assert "█" in shown
    assert study().digest[:12] in shown


def test_charges_outside_the_period_are_shown_by_year_and_not_as_spent(
    home: SiteHome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=study())
    text = default_policy_text().replace("period_days: null", "period_days: 30")
    home.policy.write_text(text)
    budget_command(home.path)
    assert "of the last 30 days" in capsys.readouterr().out
    # A ledger's time cannot be set from here, so the period is moved instead of the charge.
    since = parse_policy(text).budget.__class__
    monkeypatch.setattr(since, "since", lambda _: "2999-01-01T00:00:00.000000Z")
    budget_command(home.path)
    shown = capsys.readouterr().out
    assert "Nothing was charged within the period" in shown
    assert "ε of the worst" in shown


@pytest.fixture
def site_of_patients(home: SiteHome) -> SiteHome:
    """A site whose ledger has charged one patient for a round, and another for an evaluation."""
    asked = study("both", metrics=0.5)
    plan = parameters(asked)
    assert plan is not None and plan.evaluation_event is not None
    key = open_patient_key(home)
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=asked, members=[key.name(PATIENT), *COHORT])
        charge_round(
            ledger,
            policy(),
            asked,
            0,
            [key.name("tested")],
            event=plan.evaluation_event,
            clip_norm=0.5,
            purpose="evaluation",
        )
    StudyStore(home).decide(asked, "approved", 20, "")
    return home


@pytest.mark.usefixtures("as_json")
def test_one_patient_s_spend_by_study_and_year(
    site_of_patients: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    home = site_of_patients
    digest = study("both", metrics=0.5).digest
    budget_command(home.path, PATIENT)
    data = said(capsys)
    cost = epsilon_of([ROUND], DELTA)
    assert (data["spent"], data["remaining"]) == (cost, 10 - cost)
    part = {"rounds": 1, "evaluations": 0, "statistics": 0, "epsilon": cost}
    assert data["studies"] == [{"study": digest, **part}]
    (year,) = data["years"]
    assert year == {"year": year["year"], **part}
    budget_command(home.path, "  tested ")  # DICOM pads identifiers
    data = said(capsys)
    assert (data["studies"][0]["rounds"], data["studies"][0]["evaluations"]) == (0, 1)
    budget_command(home.path, "tested", digest[:8])
    assert said(capsys)["spent"] == data["spent"]
    charge_free = epsilon_of([], DELTA)
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        charge(ledger, members=COHORT)
    budget_command(home.path, PATIENT, "a" * 10)
    assert said(capsys)["spent"] == charge_free


def test_a_patient_s_identifier_reaches_no_output_no_log_and_no_file(
    site_of_patients: SiteHome,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    home = site_of_patients
    key = open_patient_key(home).name(PATIENT)
    budget_command(home.path, PATIENT)
    shown = capsys.readouterr().out
    assert "of 10" in shown
    with refused("data.unknown-patient") as caught:
        budget_command(home.path, PATIENT + "x")
    told = str(caught.value.to_dict())
    stdin = CliRunner().invoke(
        app, ["budget", "--patient", "-", "--home", str(home.path)], input=PATIENT + "\n"
    )
    assert stdin.exit_code == 0 and "of 10" in stdin.stdout, stdin.output
    for text in (shown, told, stdin.output, caplog.text):
        assert NUMBER not in text and "Grünwald" not in text and key not in text
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert files and all(NUMBER.encode() not in path.read_bytes() for path in files)


def test_a_patient_of_the_manifest_who_was_never_charged_has_spent_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    home = SiteHome.create(tmp_path / "site")
    write_default_policy(home)
    with refused("data.unknown-patient"):
        budget_command(home.path, "anybody")
    assert not (home.identity / "patient_key").exists()  # asking makes no key
    labels = ["--label", "background=0", "--label", "liver=1", "--input", "ct"]
    imported = CliRunner().invoke(
        app, ["data", "import", str(folder), "--site", "n", *labels, "--home", str(home.path)]
    )
    assert imported.exit_code == 0, imported.output
    known = first_patient(home)
    capsys.readouterr()
    budget_command(home.path, known)
    assert "has spent ε 0.000 of 10" in capsys.readouterr().out


def first_patient(home: SiteHome) -> str:
    from consilium_client.data.manifest import load_manifest

    return load_manifest(home).cases[0].patient_id


@pytest.mark.usefixtures("as_json")
def test_one_study_by_name_or_digest(
    site_of_patients: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    home, digest = site_of_patients, study("both", metrics=0.5).digest
    for which in ("both", digest[:6]):
        budget_command(home.path, study=which)
        data = said(capsys)
        assert (data["study"], data["rounds"], data["evaluations"]) == (digest, 1, 1)
        assert sorted(row["patients"] for row in data["patients"]) == [1, 21]
    with refused("study.unknown"):
        budget_command(home.path, study="none-such")
    with refused("study.unknown"):
        budget_command(home.path, study="")


@pytest.mark.usefixtures("as_json")
def test_the_command_prints_one_envelope(
    home: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=study())
    budget_command(home.path)
    data = said(capsys)
    assert data["spend"]["epsilon"]["most"] == epsilon_of([ROUND], DELTA)
    assert (data["spend"]["unit"], data["spend"]["adjacency"]) == ("patient", "add-or-remove-one")
    assert not any(patient in json.dumps(data) for patient in COHORT)


def test_the_command_needs_a_site_with_a_policy(tmp_path: Path) -> None:
    with refused("state.no-site"):
        budget_command(tmp_path / "missing")
    with refused("privacy.no-policy"):
        budget_command(tmp_path)


def test_a_policy_is_recorded_when_it_changes_and_says_what_changed(tmp_path: Path) -> None:
    home = joined_site(tmp_path / "site").home
    write_default_policy(home)

    def call() -> str:
        answer = CliRunner().invoke(app, ["policy", "--home", str(home.path)])
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    first = call()
    assert "Recorded in the ledger as entry 1" in first
    assert "ε 10 at δ 0.001 per patient, over all studies, for ever" in first
    assert "recorded it already" in call()
    text = default_policy_text().replace("period_days: null", "period_days: 90")
    home.policy.write_text(text)
    changed = call()
    assert "budget.period_days: none → 90" in changed
    assert "successive periods compose" in changed
    with Ledger.open(home.ledger) as ledger:
        assert [entry.kind for entry in ledger.entries()] == ["opened", "policy", "policy"]
    home.policy.write_text("nonsense")
    assert CliRunner().invoke(app, ["policy", "--home", str(home.path)]).exit_code == 6


def test_a_site_that_starts_records_its_policy_and_stays_reachable_with_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = joined_site(tmp_path / "site").home
    write_default_policy(home)
    served = []

    async def serve(started: SiteHome, _: object) -> None:
        served.append(started)

    monkeypatch.setattr("consilium_client.supervisor.serve", serve)

    def start() -> str:
        answer = CliRunner().invoke(app, ["start", "--home", str(home.path)])
        assert answer.exit_code == 0, answer.output
        return answer.stderr

    assert start() == ""
    with Ledger.open(home.ledger) as ledger:
        assert ledger.state.policy == parse_policy(default_policy_text()).to_canonical()
    home.policy.write_text(default_policy_text().replace("minimal_cohort", "minimal_cohorts"))
    said = start()
    assert "nothing will be trained" in said and "minimal_cohort" in said
    assert served == [home, home]
