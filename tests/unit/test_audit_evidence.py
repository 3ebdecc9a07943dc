"""An evidence folder stands only when every part of it agrees with every other."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from audit_samples import (
    STUDY,
    Site,
    attester,
    authority,
    certificate,
    consilium,
    sample_site,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import KEY, WITNESS_KEY

from consilium_common.audit.documents import read_records
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.ledger_report import audited
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import public_fingerprint, public_pem

OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(50, 82)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sample_site().write_evidence(tmp_path / "evidence")


def refused(action: Callable[[], object]) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        action()
    return caught.value


def test_a_folder_verifies_with_its_own_keys_and_witness(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(consilium, monkeypatch, capsys)
    status, said, _ = run("audit", "verify", folder, "--json")
    (found,) = json.loads(said)["data"]["ledgers"]
    assert status == 0
    number = len(sample_site().entries)
    assert found["entries"] == number
    assert found["witnessed"] == {"entries": number, "last": number - 1, "checked": True}
    assert [(s["rounds"], s["evaluations"], s["released"]) for s in found["studies"]] == [
        (4, 2, 6),
        (3, 0, 3),
    ]
    status, said, _ = run("audit", "verify", folder)
    assert "by the aggregator: all" in said
    # The same export with a bare key: records are there, their signatures are not checked.
    status, said, _ = run(
        *("audit", "verify", folder / "ledger.jsonl", "--key", folder / "ledger-public.pem")
    )
    assert status == 0
    assert "signatures not checked" in said


def test_the_witness_may_be_given_as_certificate_or_as_key(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "witness-public.pem"
    bare.write_bytes(public_pem(WITNESS_KEY.public_key()))
    for witness in (bare, folder / "witness.pem"):
        evidence = open_evidence(
            folder / "ledger.jsonl", key=folder / "ledger-public.pem", witness=witness
        )
        assert audited(evidence).result.witness_checked
    bare.write_bytes(public_pem(OTHER.public_key()))
    evidence = open_evidence(
        folder / "ledger.jsonl", key=folder / "ledger-public.pem", witness=bare
    )
    error = refused(lambda: audited(evidence))
    assert error.code == "privacy.ledger-broken"
    assert "witness" in error.message
    assert ", entry 0, line 2" in error.where


def test_what_a_folder_lacks_is_named(folder: Path) -> None:
    for name in ("ledger.jsonl", "ledger-public.pem", "ledger-signer.pem", "authority.pem"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        error = refused(lambda: open_evidence(folder))
        assert error.code == "privacy.evidence-incomplete"
        assert name in error.message
        (folder / name).write_bytes(kept)
    (folder / "witness.pem").unlink()
    (folder / "egress.json").unlink()
    assert open_evidence(folder).witness is None
    assert open_evidence(folder).egress is None


def test_a_key_known_from_elsewhere_must_be_the_folder_s(folder: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.pem"
    known.write_bytes(public_pem(KEY.public_key()))
    assert public_fingerprint(open_evidence(folder, key=known).key) == public_fingerprint(
        KEY.public_key()
    )
    known.write_bytes(public_pem(OTHER.public_key()))
    assert refused(lambda: open_evidence(folder, key=known)).code == "privacy.evidence-mismatch"
    assert refused(lambda: open_evidence(folder, witness=known)).code == "privacy.evidence-mismatch"


def test_the_ledger_key_is_the_one_the_authority_certified_for_this_site(folder: Path) -> None:
    signer = folder / "ledger-signer.pem"
    seed = KEY.private_bytes_raw()
    # Another key of the same consortium.
    signer.write_text(certificate(OTHER.private_bytes_raw(), Role.SIGNER, "north"))
    assert refused(lambda: open_evidence(folder)).code == "privacy.evidence-mismatch"
    # The right key, certified as something else.
    signer.write_text(certificate(seed, Role.WITNESS, "north"))
    assert refused(lambda: open_evidence(folder)).code == "identity.bad-role"
    # The right key, certified for another site.
    (folder / "egress.json").unlink()
    signer.write_text(certificate(seed, Role.SIGNER, "south"))
    error = refused(lambda: audited(open_evidence(folder)))
    assert error.code == "privacy.evidence-mismatch"
    assert "south" in error.message
    # The right key and site, certified by a stranger.
    stranger = Authority.create("stranger")
    foreign = stranger.issue(KEY.public_key(), Role.SIGNER, "north")
    signer.write_bytes(certificate_pem(foreign))
    assert refused(lambda: open_evidence(folder)).code == "identity.foreign"
    assert authority().consortium != stranger.consortium


def test_an_authority_known_from_elsewhere_must_be_the_evidence_s(
    folder: Path, tmp_path: Path
) -> None:
    records = sample_site().write_records(tmp_path / "records.json")
    known = tmp_path / "known.pem"
    known.write_bytes(certificate_pem(authority().certificate))
    assert open_evidence(folder, authority=known).signer is not None
    assert read_records(records, trusted=known).site == "north"
    known.write_bytes(certificate_pem(Authority.create("stranger").certificate))
    error = refused(lambda: open_evidence(folder, authority=known))
    assert error.code == "privacy.evidence-mismatch"
    error = refused(lambda: read_records(records, trusted=known))
    assert error.code == "privacy.records-broken"


def test_parts_of_another_site_or_study_are_found(folder: Path) -> None:
    egress = json.loads((folder / "egress.json").read_text())
    (folder / "egress.json").write_text(json.dumps({**egress, "site": "south"}))
    assert refused(lambda: open_evidence(folder)).code == "privacy.evidence-mismatch"
    (folder / "egress.json").write_text(json.dumps(egress))
    study = folder / "studies" / f"{STUDY.digest}.json"
    study.rename(study.with_name(f"{'0' * 64}.json"))
    assert refused(lambda: open_evidence(folder)).code == "privacy.evidence-mismatch"


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"schema": "consilium/egress/v2", "site": "north", "released": []}',
        '{"schema": "consilium/egress/v1", "site": "north", "released": [], "more": 1}',
        '{"schema": "consilium/egress/v1", "site": "", "site": "north", "released": []}',
        '{"schema": "consilium/egress/v1", "site": "north", "released": [{"study": "x"}]}',
    ],
)
def test_a_malformed_egress_list_is_one_clear_error(folder: Path, text: str) -> None:
    (folder / "egress.json").write_text(text)
    error = refused(lambda: open_evidence(folder))
    assert error.code == "privacy.evidence-form"
    assert error.where.endswith("egress.json")


def test_records_hold_only_with_every_signature_in_them(tmp_path: Path) -> None:
    site = sample_site()
    path = site.write_records(tmp_path / "records.json")
    assert len(read_records(path).witnessed) == len(site.entries)

    value = json.loads(path.read_text())
    value["content"]["received"].pop()
    path.write_text(json.dumps(value))
    assert refused(lambda: read_records(path)).code == "privacy.records-broken"

    def forged(content: dict[str, object]) -> None:
        content["witnessed"][3]["statement"]["hash"] = "0" * 64  # type: ignore[index]

    site.write_records(path, forged)
    assert "entry 3" in refused(lambda: read_records(path)).message

    def of_another(content: dict[str, object]) -> None:
        content["site"] = "south"

    site.write_records(path, of_another)
    assert refused(lambda: read_records(path)).code == "privacy.records-broken"

    def not_a_witness(content: dict[str, object]) -> None:
        content["witness_pem"] = site.signer()

    site.write_records(path, not_a_witness)
    assert refused(lambda: read_records(path)).code == "identity.bad-role"

    def malformed(content: dict[str, object]) -> None:
        content["witnessed"][0]["statement"].pop("time")  # type: ignore[index]

    site.write_records(path, malformed)
    assert refused(lambda: read_records(path)).code == "privacy.evidence-form"
    # Another key with the witness's certificate beside it.
    content = json.loads(site.write_records(path).read_text())["content"]
    forged_signature = OTHER.sign(canonical_json(content)).hex()
    path.write_text(json.dumps({"content": content, "signature": forged_signature}))
    assert refused(lambda: read_records(path)).code == "privacy.records-broken"
    assert refused(lambda: read_records(tmp_path / "none.json")).code == "privacy.evidence-read"


def test_a_ledger_of_another_site_in_a_folder_is_found(tmp_path: Path) -> None:
    folder = sample_site().write_evidence(tmp_path / "evidence")
    (folder / "ledger.jsonl").write_bytes(Site(name="south", witnessed=0).lines())
    assert refused(lambda: audited(open_evidence(folder))).code == "privacy.evidence-mismatch"
    assert attester()
