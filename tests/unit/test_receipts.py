"""Receipts are signed, chained, written once for a release, and reconciled with what arrived."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_samples import OPEN_STUDY, STUDY, Site, sample_site
from egress_samples import private_study, trained
from ledger_samples import KEY
from site_samples import NAME, JoinedSite, joined_site
from typer.testing import CliRunner

from consilium_client.cli import app
from consilium_client.evidence import write_evidence
from consilium_client.receipts import Receipts, export_receipts, receipt_rows
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.ledger_report import audited
from consilium_common.audit.receipts import (
    Paid,
    Receipt,
    Release,
    SentTensor,
    read_receipts,
    sign_receipt,
)
from consilium_common.audit.reconcile import Reconciliation, reconcile
from consilium_common.canonical import canonical_json
from consilium_common.console import MODE
from consilium_common.errors import ConsiliumError


def release(number: int = 0, **change: Any) -> Release:
    content: dict[str, Any] = {
        "study": "d" * 64,
        "purpose": "training",
        "round": number,
        "tensors": [{"name": "w", "shape": [2, 3], "dtype": "float32"}],
        "figures": [],
        "bytes": 120,
        "sha256": "a" * 64,
        "objects": "b" * 64,
        "event": {"sequence": 3, "hash": "c" * 64},
    }
    return Release.model_validate({**content, **change})


def refused(action: Callable[[], object], code: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        action()
    assert caught.value.code == code, caught.value


def chain(count: int = 3) -> list[Receipt]:
    found: list[Receipt] = []
    for number in range(count):
        previous = found[-1] if found else None
        found.append(sign_receipt(KEY, release(number), site="north", previous=previous))
    return found


def read(lines: list[bytes]) -> tuple[Receipt, ...]:
    return read_receipts(lines, KEY.public_key(), site="north", where="test")


# --- the chain ----------------------------------------------------------------------------------


def test_a_chain_reads_back_as_it_was_written() -> None:
    receipts = chain()
    assert list(read([one.line() for one in receipts])) == receipts
    assert read([]) == ()


def test_a_chain_that_was_changed_anywhere_does_not_verify() -> None:
    lines = [one.line() for one in chain()]
    values = [json.loads(line) for line in lines]

    def changed(number: int, **change: Any) -> list[bytes]:
        return [
            canonical_json({**value, **change}) if at == number else lines[at]
            for at, value in enumerate(values)
        ]

    other = sign_receipt(KEY, release(1), site="south", previous=None)
    again = sign_receipt(KEY, release(2), site="north", previous=chain()[-1])
    for broken in (
        lines[1:],
        [lines[0], lines[2]],
        [lines[0], lines[0]],
        lines[::-1],
        changed(1, time="2031-01-01T00:00:00.000000Z"),
        changed(1, time="yesterday"),
        changed(1, release={**values[1]["release"], "bytes": 1}),
        changed(1, signature="0" * 128),
        changed(1, signature=values[0]["signature"]),
        changed(1, hash="0" * 64),
        changed(2, previous="0" * 64),
        changed(1, note="Doe"),
        [other.line()],
        [*lines, again.line()],  # a second release of a round
        [lines[0] + b" "],
        [b"Doe"],
        [b"[]"],
    ):
        refused(lambda b=broken: read(b), "privacy.receipts-broken")  # type: ignore[misc]


# --- the site's file ----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "receipts.db"


def test_a_release_has_one_receipt_for_ever_and_across_restarts(path: Path) -> None:
    first = Receipts(path, KEY, "north").issue(release())
    again = Receipts(path, KEY, "north")
    assert again.issue(release()) == first
    assert again.of("d" * 64, "training", 0) == first
    assert again.issue(release(1)).previous == first.hash
    refused(lambda: again.issue(release(sha256="e" * 64)), "privacy.second-release")
    refused(lambda: again.issue(release(objects="e" * 64)), "privacy.second-release")
    assert path.stat().st_mode & 0o077 == 0


def test_sent_is_noted_once_and_of_a_receipt_alone(path: Path) -> None:
    receipts = Receipts(path, KEY, "north")
    first = receipts.issue(release())
    second = receipts.issue(release(1))
    receipts.sent(first)
    receipts.sent(first)
    rows = receipt_rows(path, KEY.public_key(), "north", "")
    assert [row["sent"] for row in rows] == [True, False]
    assert receipt_rows(path, KEY.public_key(), "north", "ab") == []
    assert second.sequence == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE receipt SET line = x'00'",
        "DELETE FROM receipt",
        "INSERT OR REPLACE INTO receipt VALUES (0, x'00')",
        "INSERT INTO receipt VALUES (7, x'00')",
        "DELETE FROM sent",
        "UPDATE sent SET sequence = 9",
        "INSERT INTO sent VALUES (9)",
    ],
)
def test_the_file_only_grows(path: Path, statement: str) -> None:
    receipts = Receipts(path, KEY, "north")
    receipts.sent(receipts.issue(release()))
    with sqlite3.connect(path) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)
    assert len(receipt_rows(path, KEY.public_key(), "north", "")) == 1


def test_a_file_that_is_damaged_or_of_another_key_lets_nothing_out(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    Receipts(path, KEY, "north").issue(release())
    refused(
        lambda: Receipts(path, Ed25519PrivateKey.generate(), "north"), "privacy.receipts-broken"
    )
    refused(lambda: Receipts(path, KEY, "south"), "privacy.receipts-broken")
    path.write_bytes(b"not a database, but long enough to be taken for one" * 40)
    for beside in ("-wal", "-shm"):
        path.with_name(path.name + beside).unlink(missing_ok=True)
    refused(lambda: Receipts(path, KEY, "north"), "state.receipts")


# --- what the site shows and hands over ---------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> JoinedSite:
    joined = joined_site(tmp_path / "site")
    study = private_study()
    trained(joined, study)
    charged = Receipts(joined.home.receipts, joined.signer, NAME)
    charged.sent(charged.issue(release(study=study.digest)))
    return joined


def test_the_site_lists_its_receipts_and_what_has_not_left(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = ["--home", str(site.home.path)]
    said = CliRunner().invoke(app, ["egress", *home])
    assert said.exit_code == 0, said.output
    assert "entry 3" in said.stdout
    assert "has not left" not in said.stdout
    trained(site, private_study(), 1)
    assert "has not left" in CliRunner().invoke(app, ["egress", *home]).stdout
    monkeypatch.setattr(MODE, "json", True)
    data = json.loads(CliRunner().invoke(app, ["egress", *home]).stdout)["data"]
    assert [len(data["updates"]), len(data["receipts"])] == [2, 1]
    assert data["receipts"][0]["sent"] is True


def test_evidence_carries_the_receipts_and_opening_it_checks_them(
    site: JoinedSite, tmp_path: Path
) -> None:
    folder = tmp_path / "evidence"
    assert write_evidence(site.home, site.identity, folder)["receipts"] == 1
    opened = open_evidence(folder)
    assert opened.receipts is not None and len(opened.receipts) == 1
    file = folder / "receipts.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"bytes":120', b'"bytes":121'))
    refused(lambda: open_evidence(folder), "privacy.receipts-broken")
    file.unlink()
    assert open_evidence(folder).receipts is None  # made before receipts
    out = tmp_path / "out.jsonl"
    assert export_receipts(site.home.receipts, site.signer.public_key(), NAME, out) == 1
    assert out.read_bytes() == whole


# --- reconciled ---------------------------------------------------------------------------------


def receipts_of(site: Site, left: list[dict[str, Any]]) -> list[Receipt]:
    """Return the receipts that the link of a site writes for what left."""
    charges = {
        (e.body["study"], e.body["purpose"], e.body["round"]): e
        for e in site.entries
        if e.kind == "charge"
    }
    found: list[Receipt] = []
    for row in left:
        entry = charges.get((row["study"], row["purpose"], row["round"]))
        training = row["purpose"] == "training"
        of = Release(
            study=row["study"],
            purpose=row["purpose"],
            round=row["round"],
            tensors=[SentTensor(name="w", shape=[3], dtype="float32")] if training else [],
            figures=[] if training else ["sum"],
            bytes=row["bytes"],
            sha256=row["sha256"],
            objects="b" * 64,
            event=None if entry is None else Paid(sequence=entry.sequence, hash=entry.hash),
        )
        previous = found[-1] if found else None
        when = dt.datetime.fromisoformat(site.entries[0].time.replace("Z", "+00:00"))
        found.append(sign_receipt(KEY, of, site=site.name, previous=previous, time=when))
    return found


def reconciled(
    tmp_path: Path,
    *,
    receipts: Callable[[list[Receipt]], list[Receipt]] = lambda r: r,
    received: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    taken: str | None = None,
) -> Reconciliation:
    from consilium_common.audit.documents import read_records

    site = sample_site()
    site.leave(OPEN_STUDY.digest, "training", 0, "e" * 64)
    left = [dict(row) for row in site.received]
    received(site.received)
    site.taken = taken
    folder = site.write_evidence(tmp_path / "evidence", (STUDY, OPEN_STUDY))
    lines = [one.line() for one in receipts(receipts_of(site, left))]
    (folder / "receipts.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    evidence = open_evidence(folder)
    return reconcile(
        audited(evidence).state,
        egress=evidence.egress,
        receipts=evidence.receipts,
        records=read_records(site.write_records(tmp_path / "records.json")),
        studies=evidence.studies,
        taken=evidence.taken,
    )


def test_what_agrees_in_all_four_accounts_has_no_difference(tmp_path: Path) -> None:
    found = reconciled(tmp_path)
    assert found.differences == ()
    assert found.receipted == found.received == found.stored
    assert found.without_privacy == 1


def resigned(receipts: list[Receipt], **change: Any) -> list[Receipt]:
    """Return the chain with another first release, signed anew by a dishonest site."""
    found: list[Receipt] = []
    for number, one in enumerate(receipts):
        of = one.release
        if number == 0:
            of = Release.model_validate({**of.model_dump(), **change})
        previous = found[-1] if found else None
        found.append(sign_receipt(KEY, of, site=one.site, previous=previous))
    return found


def gone(rows: list[dict[str, Any]]) -> None:
    rows.pop()  # of the study without privacy


def other(rows: list[dict[str, Any]]) -> None:
    rows[-1]["sha256"] = "f" * 64


def larger(rows: list[dict[str, Any]]) -> None:
    rows[-1]["bytes"] += 1


@pytest.mark.parametrize(
    ("change", "codes", "serious"),
    [
        ({"received": gone}, {"receipt-not-received"}, False),
        ({"received": other}, {"received-other-than-receipt"}, True),
        ({"received": larger}, {"received-other-than-receipt"}, True),
        ({"receipts": lambda r: r[:-1]}, {"received-without-receipt"}, True),
        ({"receipts": lambda _: []}, {"received-before-receipts"}, False),
        (
            {"receipts": lambda r: resigned(r, sha256="f" * 64)},
            {"receipt-without-charge", "receipt-not-stored", "received-other-than-receipt"},
            True,
        ),
        ({"receipts": lambda r: resigned(r, event=None)}, {"receipt-without-charge"}, True),
        (
            {"receipts": lambda r: resigned(r, event={"sequence": 1, "hash": "0" * 64})},
            {"receipt-without-charge"},
            True,
        ),
    ],
)
def test_every_mismatch_is_named(
    tmp_path: Path, change: dict[str, Any], codes: set[str], serious: bool
) -> None:
    found = reconciled(tmp_path, **change)
    assert codes <= {one.code for one in found.differences}
    assert bool(found.serious) is serious


@pytest.mark.parametrize("came", ["2031-04-01T07:59:59.999+00:00", "2031-04-01T08:00:00.001+00:00"])
def test_a_receipt_is_missed_where_the_evidence_was_taken_after_the_release_came(
    tmp_path: Path, came: str
) -> None:
    def arrive(rows: list[dict[str, Any]]) -> None:
        rows[-1]["time"] = came

    taken = "2031-04-01T08:00:00.000000Z"
    found = reconciled(tmp_path, receipts=lambda r: r[:-1], received=arrive, taken=taken)
    late = dt.datetime.fromisoformat(came) > dt.datetime.fromisoformat(taken)
    codes = [one.code for one in found.serious]
    assert codes == ([] if late else ["received-without-receipt"])
    assert [one.kind for one in found.not_compared] == (["received"] if late else [])


def test_a_release_that_never_arrived_is_told_apart_by_its_receipt(tmp_path: Path) -> None:
    def lost(rows: list[dict[str, Any]]) -> None:
        del rows[0]

    (sent,) = reconciled(tmp_path / "a", received=lost).differences
    assert "it was sent, by its receipt" in sent.message
    (kept,) = reconciled(tmp_path / "b", received=lost, receipts=resigned_without_first).differences
    assert "was not sent" in kept.message


def resigned_without_first(receipts: list[Receipt]) -> list[Receipt]:
    found: list[Receipt] = []
    for one in receipts[1:]:
        previous = found[-1] if found else None
        found.append(sign_receipt(KEY, one.release, site=one.site, previous=previous))
    return found
