"""A planted difference is found in each direction, named, and ends with status 6."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_samples import OPEN_STUDY, STUDY, Site, consilium, sample_site, sha

from consilium_common.audit.compare import compare_ledgers, compare_records
from consilium_common.audit.documents import read_records
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.ledger_report import audited
from consilium_common.audit.reconcile import reconcile
from consilium_common.errors import ConsiliumError


def differences(ledger: Path, records: Path) -> list[str]:
    found = compare_records(open_evidence(ledger), read_records(records))
    return [one.code for one in found.differences]


def test_what_agrees_has_no_difference_and_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(consilium, monkeypatch, capsys)
    site = sample_site()
    folder = site.write_evidence(tmp_path / "evidence")
    records = site.write_records(tmp_path / "records.json")
    for pair in ((folder, records), (records, folder), (folder, folder)):
        status, said, _ = run("audit", "compare", *pair)
        assert (status, said.splitlines()[-1]) == (0, "No difference.")


def test_a_difference_is_a_line_and_status_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(consilium, monkeypatch, capsys)
    site = sample_site()
    folder = site.write_evidence(tmp_path / "evidence")
    site.received.append({**site.received[0], "sha256": sha("smuggled")})
    records = site.write_records(tmp_path / "records.json")
    status, said, _ = run("audit", "compare", folder, records)
    assert status == 6
    assert sum(line.startswith("! The aggregator received") for line in said.splitlines()) == 1
    assert sha("smuggled")[:12] in said
    status, said, _ = run("--json", "audit", "compare", folder, records)
    data = json.loads(said)["data"]
    assert status == 6
    assert data["same"] is False
    assert [one["code"] for one in data["differences"]] == ["received-without-release"]


def test_an_update_that_never_arrived_is_found_and_not_called_a_breach(tmp_path: Path) -> None:
    site = sample_site()
    folder = site.write_evidence(tmp_path / "evidence")
    site.received.pop()
    found = compare_records(
        open_evidence(folder), read_records(site.write_records(tmp_path / "records.json"))
    )
    assert [(one.code, one.serious) for one in found.differences] == [
        ("released-not-received", False)
    ]


@pytest.mark.parametrize(
    ("plant", "code"),
    [
        (lambda site: site.egress.append({**site.egress[0], "sha256": sha("x")}), "stored-without"),
        (lambda site: site.egress.append({**site.egress[0], "round": 99}), "stored-without"),
        (
            lambda site: site.egress.append({**site.egress[-1], "purpose": "evaluation"}),
            "stored-without",
        ),
        (lambda site: site.egress.pop(), "released-not-stored"),
    ],
)
def test_the_site_s_own_list_is_reconciled_in_each_direction(
    tmp_path: Path, plant: Callable[[Site], Any], code: str
) -> None:
    site = sample_site()
    plant(site)
    evidence = open_evidence(site.write_evidence(tmp_path / "evidence"))
    found = reconcile(audited(evidence).state, egress=evidence.egress, studies=evidence.studies)
    assert len(found.serious) == 1
    assert found.serious[0].code.startswith(code)


def test_an_update_stored_before_a_crash_and_never_released_is_no_breach(tmp_path: Path) -> None:
    site = sample_site()
    site.train(9, released=False)
    kept = {**site.egress[-1], "study": STUDY.digest, "round": 9, "sha256": sha("kept")}
    site.egress.append(kept)
    evidence = open_evidence(site.write_evidence(tmp_path / "evidence"))
    found = reconcile(audited(evidence).state, egress=evidence.egress)
    assert [(one.code, one.serious) for one in found.differences] == [
        ("stored-not-released", False)
    ]
    # Had it reached the aggregator all the same, that would be another matter.
    site.received.append({**{k: v for k, v in kept.items() if k != "stored_at"}, "time": "now"})
    records = site.write_records(tmp_path / "records.json")
    assert differences(tmp_path / "evidence", records) == ["received-without-release"]


def test_a_study_without_privacy_needs_no_entry_and_is_counted(tmp_path: Path) -> None:
    site = sample_site()
    site.leave(OPEN_STUDY.digest, "training", 0, sha("open"))
    with_document = open_evidence(
        site.write_evidence(tmp_path / "with", studies=(STUDY, OPEN_STUDY))
    )
    without = open_evidence(site.write_evidence(tmp_path / "without"))
    state = audited(with_document).state
    known = reconcile(state, egress=with_document.egress, studies=with_document.studies)
    assert (known.without_privacy, known.differences) == (1, ())
    unknown = reconcile(state, egress=without.egress, studies=without.studies)
    assert [one.code for one in unknown.differences] == ["stored-without-release"]


def test_cut_off_rewritten_and_unattested_entries_are_told_apart(tmp_path: Path) -> None:
    site = sample_site()
    whole = site.write_records(tmp_path / "whole.json")
    cut = sample_site()
    cut.entries = cut.entries[:-3]
    cut.received = cut.received[:-1]
    codes = differences(cut.write_evidence(tmp_path / "cut"), whole)
    assert codes.count("entry-cut-off") == 3
    assert "received-without-release" in codes

    rewritten = Site(witnessed=0)
    rewritten.policy(epsilon=50.0)
    for entry in site.entries[2:]:
        rewritten.add(entry.kind, dict(entry.body))  # type: ignore[arg-type]
    with pytest.raises(ConsiliumError):  # charge hashes no longer fit: it does not even verify
        differences(rewritten.write_evidence(tmp_path / "rewritten"), whole)
    other = Site(witnessed=0)
    other.policy(epsilon=50.0)
    codes = differences(other.write_evidence(tmp_path / "other"), whole)
    assert "entry-rewritten" in codes

    site.witnessed = 5
    partly = site.write_records(tmp_path / "partly.json")
    assert differences(site.write_evidence(tmp_path / "evidence"), partly) == ["not-witnessed"]


def test_two_ledgers_differ_from_the_first_entry_that_does(tmp_path: Path) -> None:
    a = sample_site()
    b = sample_site()
    b.entries = b.entries[:-2]
    first = open_evidence(a.write_evidence(tmp_path / "a"))
    second = open_evidence(b.write_evidence(tmp_path / "b"))
    for one, other in ((first, second), (second, first)):
        found = compare_ledgers(one, other)
        missing = [d for d in found.differences if d.code == "entry-missing"]
        assert len(missing) == 2
        assert ("is in A" in missing[0].message) is (one is first)
    forked = Site(witnessed=0)
    forked.policy()
    forked.train(7)
    found = compare_ledgers(first, open_evidence(forked.write_evidence(tmp_path / "forked")))
    differs = [d for d in found.differences if d.code == "entry-differs"]
    assert len(differs) == 1
    assert differs[0].message.startswith("Entry 2 is ")
    assert differs[0].serious


def test_accounts_of_two_sites_or_consortia_are_not_compared(tmp_path: Path) -> None:
    north = open_evidence(sample_site().write_evidence(tmp_path / "north"))
    south = Site(name="south")
    with pytest.raises(ConsiliumError) as caught:
        compare_ledgers(north, open_evidence(south.write_evidence(tmp_path / "south")))
    assert caught.value.code == "usage.compare"
    with pytest.raises(ConsiliumError) as caught:
        compare_records(north, read_records(south.write_records(tmp_path / "south.json")))
    assert caught.value.code == "usage.compare"
