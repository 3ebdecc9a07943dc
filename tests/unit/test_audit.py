"""`consilium audit`: an outsider with a public key verifies a ledger and recomputes its ε."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_samples import consilium
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import EVENT, KEY, OTHER_STUDY, STUDY, charge, open_ledger, patients

from consilium_common.identity.keys import public_fingerprint, public_pem
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import cross_check
from consilium_common.privacy.events import PrivacyEvent

OTHER_EVENT = PrivacyEvent(0.2, 3.0, 40)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `consilium …` as the command line does; return status, stdout and stderr."""
    return functools.partial(consilium, monkeypatch, capsys)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "north.pem"
    path.write_bytes(public_pem(KEY.public_key()))
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    with open_ledger(path) as opened:
        for index in range(3):
            opened.release(charge(opened, index, members=patients(6)), f"{index:064x}")
        charge(opened, 0, study=OTHER_STUDY, event=OTHER_EVENT, members=patients(4, start=4))
        opened.void(charge(opened, 1, study=OTHER_STUDY, event=OTHER_EVENT), "killed")
    return path


def exported(run: Run, ledger: Path) -> tuple[Path, str]:
    out = ledger.with_suffix(".jsonl")
    status, said, _ = run("--json", "audit", "export", ledger, out)
    assert status == 0
    return out, json.loads(said)["data"]["head"]


def envelope(said: str) -> Any:
    assert said.count("\n") == 1
    return json.loads(said)


def test_the_recomputed_epsilon_is_that_of_the_recorded_events(
    run: Run, ledger: Path, key: Path
) -> None:
    status, said, _ = run("audit", "verify", ledger, "--key", key, "--delta", "1e-4", "--json")
    assert status == 0
    (found,) = envelope(said)["data"]["ledgers"]
    three = PrivacyEvent(EVENT.sampling_rate, EVENT.noise_multiplier, 3 * EVENT.steps)
    assert found["verified"] is True
    assert (found["site"], found["patients"]) == ("north", 8)
    assert found["charges"] == {"released": 3, "open": 1, "voided": 1}
    assert found["key"] == public_fingerprint(KEY.public_key())
    assert [(s["study"], s["rounds"], s["released"], s["patients"]) for s in found["studies"]] == [
        (STUDY, 3, 3, 6),
        (OTHER_STUDY, 1, 0, 4),
    ]
    assert found["studies"][0]["epsilon"] == cross_check([three], 1e-3).to_dict()
    assert found["studies"][1]["epsilon"] == cross_check([OTHER_EVENT], 1e-3).to_dict()
    worst = found["worst_patient"]
    assert worst == cross_check([three, OTHER_EVENT], 1e-4).to_dict()
    assert worst["agreement"] == "agrees"
    assert worst["epsilon"]["pld"] <= worst["epsilon"]["rdp"]
    assert (worst["unit"], worst["adjacency"]) == ("patient", "add-or-remove-one")
    assert not any(patient in said for patient in patients(8))


def test_the_export_verifies_like_the_database(run: Run, ledger: Path, key: Path) -> None:
    out, head = exported(run, ledger)
    status, said, _ = run(
        "audit", "verify", out, ledger, "--key", key, "--head", head, "--head", head
    )
    assert status == 0
    assert said.count("verified") == 2
    assert "unit patient" in said
    assert "agrees" in said


def test_the_policy_s_delta_prices_the_worst_patient(run: Run, ledger: Path, key: Path) -> None:
    with open_ledger(ledger) as opened:
        opened.record_policy({"budget": {"epsilon": 5.0, "delta": 2e-4}})
    _, said, _ = run("--json", "audit", "verify", ledger, "--key", key)
    assert envelope(said)["data"]["ledgers"][0]["worst_patient"]["delta"] == 2e-4


def test_a_ledger_without_charges_verifies(run: Run, tmp_path: Path, key: Path) -> None:
    open_ledger(tmp_path / "new.db").close()
    status, said, _ = run("audit", "verify", tmp_path / "new.db", "--key", key)
    assert status == 0
    assert "Nothing was charged" in said


def test_a_broken_ledger_ends_with_status_6_and_names_the_entry(
    run: Run, ledger: Path, key: Path
) -> None:
    out, _ = exported(run, ledger)
    lines = out.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b'"steps":20', b'"steps":10')
    out.write_bytes(b"\n".join(lines))
    status, said, _ = run("--json", "audit", "verify", out, "--key", key)
    error = envelope(said)["error"]
    assert status == 6
    assert error["code"] == "privacy.ledger-broken"
    assert error["where"] == f"{out}, entry 4, line 5"
    assert "entry 4" in error["message"]
    status, said, errors = run("audit", "verify", out, "--key", key)
    assert (status, said) == (6, "")
    assert "entry 4" in errors


def test_one_broken_ledger_among_sound_ones_is_an_error(
    run: Run, ledger: Path, tmp_path: Path, key: Path
) -> None:
    out, _ = exported(run, ledger)
    out.write_bytes(out.read_bytes()[:-2])
    status, said, errors = run("audit", "verify", ledger, out, "--key", key, "--json")
    assert status == 6
    assert envelope(said)["error"]["where"].startswith(str(out))
    assert f"{ledger}: verified" in errors


def test_entries_cut_off_are_found_by_the_head_that_the_export_printed(
    run: Run, ledger: Path, key: Path
) -> None:
    out, head = exported(run, ledger)
    out.write_bytes(b"".join(out.read_bytes().splitlines(True)[:-2]))
    assert run("audit", "verify", out, "--key", key)[0] == 0
    status, _, errors = run("audit", "verify", out, "--key", key, "--head", head)
    assert status == 6
    assert "cut off" in errors


def test_the_key_of_another_site_is_found(run: Run, ledger: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pem"
    foreign.write_bytes(public_pem(Ed25519PrivateKey.generate().public_key()))
    status, _, errors = run("audit", "verify", ledger, "--key", foreign)
    assert status == 6
    assert "entry 0 is not signed by the given key" in errors


def test_each_file_may_have_its_own_key(run: Run, ledger: Path, tmp_path: Path, key: Path) -> None:
    other = Ed25519PrivateKey.generate()
    with Ledger.open(tmp_path / "south.db", other, site="south"):
        pass
    (tmp_path / "south.pem").write_bytes(public_pem(other.public_key()))
    files = ["audit", "verify", ledger, tmp_path / "south.db"]
    keys = ["--key", key, "--key", tmp_path / "south.pem"]
    assert run(*files, *keys)[0] == 0
    assert run(*files, *reversed(keys[1::2]), "--key", key)[0] != 0
    assert run(*files, "--key", tmp_path / "south.pem", "--key", key)[0] == 6
    status, _, errors = run(*files, ledger, *keys)
    assert status == 2
    assert "3 files and 2 keys" in errors
    status, _, errors = run(*files, "--key", key, "--head", "0:" + "0" * 64)
    assert status == 2
    assert "2 files and 1 heads" in errors


def test_wrong_arguments_are_one_clear_error(
    run: Run, ledger: Path, tmp_path: Path, key: Path
) -> None:
    def error(*arguments: object) -> tuple[int, str]:
        status, said, _ = run("--json", "audit", *arguments)
        return status, envelope(said)["error"]["code"]

    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")
    curve = tmp_path / "curve.pem"
    curve.write_bytes(public_pem(ec.generate_private_key(ec.SECP256R1()).public_key()))
    missing = tmp_path / "missing.db"
    assert error("verify", ledger, "--key", tmp_path / "missing.pem") == (5, "identity.no-key")
    assert error("verify", ledger, "--key", wrong) == (5, "identity.bad-key")
    assert error("verify", ledger, "--key", curve) == (5, "identity.bad-key")
    assert error("verify", missing, "--key", key) == (6, "privacy.no-ledger")
    assert error("verify", missing.with_suffix(".jsonl"), "--key", key) == (6, "privacy.no-ledger")
    assert error("verify", wrong, "--key", key) == (6, "privacy.ledger-corrupt")
    assert error("verify", ledger, "--key", key, "--head", "x") == (2, "usage.head")
    assert error("verify", ledger, "--key", key, "--delta", "2") == (6, "privacy.delta-invalid")
    assert error("verify", ledger) == (2, "usage.keys")
    assert error("verify") == (2, "usage.arguments")
    assert error("export", missing, tmp_path / "out.jsonl") == (6, "privacy.no-ledger")
    assert error("export", ledger, tmp_path / "out.txt") == (2, "usage.export")


def test_an_earlier_export_is_never_overwritten(run: Run, ledger: Path) -> None:
    out, _ = exported(run, ledger)
    before = out.read_bytes()
    status, _, errors = run("audit", "export", ledger, out)
    assert status == 8
    assert "not overwritten" in errors
    assert out.read_bytes() == before
