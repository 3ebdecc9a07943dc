"""The evidence folder is complete or absent, fits together, and holds no secret and no identity."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from budget_samples import COHORT, policy, refused, run_round, study
from site_samples import NAME, JoinedSite, joined_site, plain_study
from typer.testing import CliRunner

from consilium_client import evidence
from consilium_client.cli import app
from consilium_client.evidence import egress_rows, write_evidence
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.audit.evidence import open_evidence
from consilium_common.console import MODE
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import check_issued, read_certificate
from consilium_common.ledger.entries import time_text
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file

PATIENT = "PID-7731"


@pytest.fixture
def site(tmp_path: Path) -> JoinedSite:
    """A site with a private study of one released round, a plain one, and a declined one."""
    joined = joined_site(tmp_path / "site")
    store = StudyStore(joined.home)
    asked, plain = study(), plain_study()
    store.decide(asked, "approved", 20, "", left_out=COHORT[:1])
    store.decide(plain, "approved", 20, "")
    store.decide(study("other"), "declined", 0, f"not our population, as {PATIENT} shows")
    with Ledger.open(joined.home.ledger, joined.signer, site=NAME) as ledger:
        run_round(ledger, policy(), 0, asked=asked)
        charge = ledger.find_charge(asked.digest, 0)
        assert charge is not None
        ledger.release(charge, store.keep_update(asked.digest, 0, b"update", {}).sha256)
    store.keep_update(plain.digest, 0, b"exact", {})
    (joined.home.data / "cases.csv").write_text(f"case_id,patient_id\nc,{PATIENT}\n")
    return joined


def test_the_folder_holds_what_the_auditor_needs_and_it_fits_together(
    site: JoinedSite, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "evidence"
    found = write_evidence(site.home, site.identity, folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    digests = {study().digest, study("other").digest, plain_study().digest}
    assert files == {
        "ledger.jsonl",
        "ledger-public.pem",
        "ledger-signer.pem",
        "authority.pem",
        "egress.json",
        "receipts.jsonl",
        *(f"studies/{digest}.json" for digest in digests),
    }
    verified = verify_file(folder / "ledger.jsonl", site.signer.public_key())
    assert verified.ok
    assert found["head"] == str(verified.head)
    certified = check_issued(
        read_certificate(folder / "ledger-signer.pem"), read_certificate(folder / "authority.pem")
    )
    assert (certified.name, certified.public_key) == (NAME, site.signer.public_key())
    for path in (folder / "studies").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    egress = json.loads((folder / "egress.json").read_bytes())
    assert (egress["schema"], egress["site"]) == ("consilium/egress/v1", NAME)
    assert egress["released"] == egress_rows(site.home)
    # It says from before anything was read: what came until then is in it.
    assert egress["released"][-1]["stored_at"] < egress["written_at"] < time_text(datetime.now(UTC))
    assert open_evidence(folder).taken == egress["written_at"]
    sent = {row["study"]: row["sha256"] for row in egress["released"]}
    assert sent[study().digest] == hashlib.sha256(b"update").hexdigest()
    charge = verified.state.charge_of(study().digest, 0)
    assert charge is not None and charge.update == sent[study().digest]


def test_the_egress_command_and_the_evidence_say_the_same(
    site: JoinedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODE, "json", True)
    home = ["--home", str(site.home.path)]
    answer = CliRunner().invoke(app, ["evidence", str(tmp_path / "out"), *home])
    assert answer.exit_code == 0, answer.output
    listed = CliRunner().invoke(app, ["egress", *home])
    written = json.loads((tmp_path / "out" / "egress.json").read_bytes())
    assert json.loads(listed.stdout)["data"]["updates"] == written["released"]
    monkeypatch.setattr(MODE, "json", False)
    assert "update of round 1" in CliRunner().invoke(app, ["egress", *home]).stdout


def test_the_witness_s_certificate_is_added_where_it_is_known(
    site: JoinedSite, tmp_path: Path
) -> None:
    site.home.witness_certificate.write_bytes(b"a certificate")
    found = write_evidence(site.home, site.identity, tmp_path / "out")
    assert found["witness"] is True
    assert (tmp_path / "out" / "witness.pem").read_bytes() == b"a certificate"


def test_no_secret_and_no_identity_is_in_it(site: JoinedSite, tmp_path: Path) -> None:
    write_evidence(site.home, site.identity, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, "open to others"
        if path.is_file():
            content = path.read_bytes()
            assert b"PRIVATE" not in content, path
            assert PATIENT.encode() not in content, path
            assert str(site.home.path).encode() not in content, path


def test_a_folder_that_holds_something_is_left_alone(site: JoinedSite, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_evidence(site.home, site.identity, folder)  # an empty one is as good as none
    before = sorted(folder.rglob("*"))
    with refused("state.not-empty"):
        write_evidence(site.home, site.identity, folder)
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "file").touch()
    with refused("state.not-empty"):
        write_evidence(site.home, site.identity, tmp_path / "file")
    with refused("state.folder"):
        write_evidence(site.home, site.identity, tmp_path / "file" / "below")


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    joined = joined_site(tmp_path / "site")
    with refused("privacy.no-ledger"):
        write_evidence(joined.home, joined.identity, tmp_path / "all" / "out")
    assert list((tmp_path / "all").iterdir()) == []


def test_an_update_without_its_release_is_waited_for_and_then_shown(
    site: JoinedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StudyStore(site.home)
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        run_round(ledger, policy(), 1, asked=study())
        stored = store.keep_update(study().digest, 1, b"second", {})

        def release(_: float) -> None:
            charge = ledger.find_charge(study().digest, 1)
            assert charge is not None
            ledger.release(charge, stored.sha256)

        waited: list[float] = []
        monkeypatch.setattr(evidence.time, "sleep", waited.append)
        write_evidence(site.home, site.identity, tmp_path / "shown")
        assert len(waited) == 4  # it tried again, and then wrote what there is
        egress = json.loads((tmp_path / "shown" / "egress.json").read_bytes())
        assert stored.sha256 in {row["sha256"] for row in egress["released"]}
        monkeypatch.setattr(evidence.time, "sleep", release)
        write_evidence(site.home, site.identity, tmp_path / "settled")
    verified = verify_file(tmp_path / "settled" / "ledger.jsonl", site.signer.public_key())
    charge = verified.state.charge_of(study().digest, 1)
    assert charge is not None and charge.state == "released"


def test_a_site_that_has_not_joined_has_no_evidence(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "site")
    answer = CliRunner().invoke(app, ["evidence", str(tmp_path / "out"), "--home", str(home.path)])
    assert answer.exit_code == ConsiliumError("identity.x", "").exit_status
    assert not (tmp_path / "out").exists()
