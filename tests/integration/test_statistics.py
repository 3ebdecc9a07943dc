"""Statistics over sites, over real processes: they arrive, are charged once, and stand an audit."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from federation import PRIVATE, Federation, consilium, small_study

from consilium_common.demo.hospitals import NAMES
from consilium_common.ledger.state import Charge
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.study import Study
from consilium_common.study.statistics import tables
from consilium_server.home import ServerHome

#: A private study of one round that asks for statistics.
STUDY: dict[str, Any] = {
    **small_study("counted", **PRIVATE, federation={"rounds": 1}),
    "statistics": {"epsilon": 1.0, "of": ["classes", "intensity", "spacing"]},
}


@pytest.fixture(scope="module")
def counted(federation: Federation) -> dict[str, Any]:
    """The study, run to its end."""
    return federation.run_to_end(STUDY)


def charges_of(federation: Federation, name: str, digest: str) -> list[Charge]:
    """Return a hospital's charges for a study, from its ledger as it lies there."""
    with Ledger.open(federation.sites[name].home / "ledger.db") as ledger:
        return [one for one in ledger.state.charges.values() if one.study == digest]


def test_statistics_arrive_noised_and_are_charged_before_the_first_round(
    federation: Federation, counted: dict[str, Any]
) -> None:
    found = federation.study("stats", counted["digest"]).data
    assert found["public"]["patients"] == sum(found["public"]["cohorts"].values()) > 0
    assert found["asked"] == STUDY["statistics"]
    statistics = found["statistics"]
    assert statistics == counted["statistics"]
    assert (statistics["sites"], statistics["dropped"]) == (sorted(NAMES), {})
    study = Study.model_validate(STUDY)
    wanted = tables(study)
    assert [one["name"] for one in statistics["tables"]] == [one.name for one in wanted]
    for one, table in zip(statistics["tables"], wanted, strict=True):
        shares = [row["share"] for row in one["bins"]]
        assert [row["bin"] for row in one["bins"]] == list(table.bins)
        assert len(set(shares)) == len(shares)  # each has noise of its own
        # Every table adds up to one for a patient whose images have a liver; each hospital
        # declares 5 of its 6 patients.
        spread = one["standard_error"] * len(shares) ** 0.5
        assert abs(sum(shares) - 1.2) < 6 * spread

    plan = parameters(study)
    assert plan is not None
    expected = epsilon_of(plan.events_of(1), plan.delta)
    for name in NAMES:
        charges = charges_of(federation, name, counted["digest"])
        assert [(one.purpose, one.round_index, one.state) for one in charges] == [
            ("statistics", 0, "released"),
            ("training", 0, "released"),
        ]
        assert charges[0].event == plan.statistics_event
        assert charges[0].clip_norm == plan.statistics_sensitivity == 2.0
        assert counted["epsilon"][name] == pytest.approx(expected, abs=0.001)


def test_an_audit_report_agrees_with_site_and_aggregator(
    federation: Federation, counted: dict[str, Any], tmp_path: Path
) -> None:
    name = NAMES[1]
    evidence, records = tmp_path / "evidence", tmp_path / "records.json"
    federation.sites[name]("evidence", evidence).data  # noqa: B018
    federation.server("records", name, records).data  # noqa: B018
    page = tmp_path / "report.html"
    report = consilium("audit", "report", evidence, "--records", records, "--out", page).data
    (found,) = [one for one in report["studies"] if one["study"] == counted["digest"]]
    assert (found["rounds"], found["statistics"], found["released"]) == (1, 1, 2)
    assert found["as_declared"] is True
    assert [one for one in report["reconciliation"]["differences"] if one["serious"]] == []


def test_statistics_asked_again_are_answered_from_the_store_without_a_charge(
    federation: Federation, counted: dict[str, Any]
) -> None:
    digest = counted["digest"]
    charged = {name: charges_of(federation, name, digest) for name in NAMES}
    _forget(federation, digest)
    federation.study("run", digest).data  # noqa: B018
    again = federation.study("watch", digest).data
    assert again["statistics"] == counted["statistics"]
    assert again["alarms"] == []  # no site sent other numbers than before
    assert {name: charges_of(federation, name, digest) for name in NAMES} == charged


def _forget(federation: Federation, digest: str) -> None:
    """Let the aggregator lose all that a study's run has left there, as after a bad restore."""
    home = ServerHome.existing(federation.home)
    (home.study_folder(digest) / "checkpoint.safetensors").unlink()
    with closing(sqlite3.connect(home.database, timeout=20)) as database, database:
        for table in ("statistics", "evaluations", "rounds"):
            database.execute(f"DELETE FROM {table} WHERE digest = ?", (digest,))
        database.execute("UPDATE studies SET state = 'stopped' WHERE digest = ?", (digest,))
