"""Evidence and records of two moments: what came between is named, and nothing else is forgiven."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from audit_samples import Site, sample_site, sha
from ledger_samples import witness

from consilium_common.audit.compare import Comparison, compare_records
from consilium_common.audit.documents import read_records
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.ledger_report import audited
from consilium_common.audit.reconcile import Reconciliation, reconcile
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import time_text

SECOND = dt.timedelta(seconds=1)


def after(site: Site, pause: dt.timedelta = SECOND) -> str:
    """A moment after all that the site wrote so far."""
    return time_text(dt.datetime.fromisoformat(site.entries[-1].time) + pause)


def compared(evidence: Path, records: Path) -> Comparison:
    return compare_records(open_evidence(evidence), read_records(records))


def reconciled(evidence: Path, records: Path) -> Reconciliation:
    opened = open_evidence(evidence)
    found = audited(opened)
    return reconcile(
        found.state,
        egress=opened.egress,
        records=read_records(records),
        studies=opened.studies,
        entries=found.entries,
        taken=opened.taken,
    )


def of_their_time(site: Site) -> Any:
    """Records whose attestations are as old as the entries: else they are all of one moment."""

    def change(content: dict[str, Any]) -> None:
        content["witnessed"] = [witness(one, time=one.time).to_dict() for one in site.entries]

    return change


@pytest.fixture
def running(tmp_path: Path) -> Site:
    """A site whose evidence is taken now, and which goes on."""
    site = sample_site()
    site.taken = after(site)
    site.write_evidence(tmp_path / "evidence")
    return site


def test_what_came_after_the_evidence_was_taken_is_named_and_no_difference(
    running: Site, tmp_path: Path
) -> None:
    entries = len(running.entries)
    running.train(4)
    running.train(5)
    records = running.write_records(tmp_path / "records.json", of_their_time(running))
    found = reconciled(tmp_path / "evidence", records)
    assert found.differences == ()
    numbers = {one.kind: one.number for one in found.not_compared}
    assert numbers == {"received": 2, "attested": len(running.entries) - entries}
    (message,) = [one.message for one in found.not_compared if one.kind == "received"]
    assert "2 things that the aggregator received" in message
    assert running.taken is not None
    assert f"{running.taken[:16].replace('T', ' ')} UTC" in message
    same = compared(tmp_path / "evidence", records)
    assert same.same
    assert same.not_compared == found.not_compared


def test_what_the_records_say_of_the_time_before_is_found_all_the_same(
    running: Site, tmp_path: Path
) -> None:
    running.leave("a" * 64, "training", 8, sha("smuggled"))  # dates from the last entry
    running.train(4)
    records = running.write_records(tmp_path / "records.json", of_their_time(running))
    found = reconciled(tmp_path / "evidence", records)
    assert [(one.code, one.serious) for one in found.differences] == [
        ("received-without-release", True)
    ]
    assert sha("smuggled")[:12] in found.differences[0].message


def test_other_bytes_for_a_round_that_was_released_differ_whenever_they_came(
    running: Site, tmp_path: Path
) -> None:
    late = {**running.received[-1], "sha256": sha("other"), "time": after(running, 9 * SECOND)}
    running.received.append(late)
    records = running.write_records(tmp_path / "records.json", of_their_time(running))
    found = reconciled(tmp_path / "evidence", records)
    assert [one.code for one in found.serious] == ["received-without-release"]


def test_entries_cut_off_are_found_where_they_were_attested_before_the_evidence(
    tmp_path: Path,
) -> None:
    site = sample_site()
    records = site.write_records(tmp_path / "records.json", of_their_time(site))
    site.taken = after(site)
    site.entries, site.egress = site.entries[:-1], site.egress[:-1]
    found = reconciled(site.write_evidence(tmp_path / "evidence"), records)
    assert [one.code for one in found.serious] == ["entry-cut-off", "received-without-release"]
    assert found.not_compared == ()


def test_evidence_cannot_claim_to_be_older_than_what_it_holds(tmp_path: Path) -> None:
    site = sample_site()
    site.taken = site.entries[0].time
    site.received.append({**site.received[0], "round": 77, "time": site.entries[-1].time})
    records = site.write_records(tmp_path / "records.json", of_their_time(site))
    found = reconciled(site.write_evidence(tmp_path / "evidence"), records)
    assert [one.code for one in found.serious] == ["received-without-release"]
    assert found.not_compared == ()


def test_evidence_that_does_not_say_when_it_was_taken_is_held_to_all_of_the_records(
    tmp_path: Path,
) -> None:
    site = sample_site()
    site.write_evidence(tmp_path / "evidence")
    site.train(4)
    records = site.write_records(tmp_path / "records.json", of_their_time(site))
    codes = {one.code for one in reconciled(tmp_path / "evidence", records).serious}
    assert codes == {"entry-cut-off", "received-without-release"}


def test_records_older_than_the_evidence_are_not_blamed_for_what_they_cannot_hold(
    tmp_path: Path,
) -> None:
    site = sample_site()
    lost = site.received.pop(2)
    until = after(site)

    def write(content: dict[str, Any]) -> None:
        of_their_time(before)(content)
        content["written_at"] = until

    before = sample_site()
    before.received = site.received
    records = before.write_records(tmp_path / "records.json", write)
    site.train(4)
    site.taken = after(site)
    folder = site.write_evidence(tmp_path / "evidence")
    found = reconciled(folder, records)
    assert [one.code for one in found.differences] == ["released-not-received"]
    assert lost["sha256"][:12] in found.differences[0].message
    assert {one.kind: one.number for one in found.not_compared} == {"unattested": 2, "released": 1}
    assert "Newer records" in found.not_compared[0].message


def test_a_time_that_is_none_is_refused_in_the_site_s_list(tmp_path: Path) -> None:
    site = sample_site()
    site.taken = "yesterday"
    with pytest.raises(ConsiliumError) as caught:
        open_evidence(site.write_evidence(tmp_path / "evidence"))
    assert caught.value.code == "privacy.evidence-form"
    assert "written_at" in caught.value.message
