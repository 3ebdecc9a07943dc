"""Evidence folders and aggregator's records for tests, over months that never were."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import KEY, WITNESS_KEY, patients, witness
from study_samples import TEXT

from consilium_common import cli
from consilium_common.canonical import canonical_json, digest
from consilium_common.console import MODE
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import public_pem
from consilium_common.ledger.entries import GENESIS, Entry, Kind, cohort_digest, public_hex
from consilium_common.ledger.entries import sign_entry as signed
from consilium_common.privacy.accounting import calibrate
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study.load import parse_study
from consilium_common.study.schema import Study

START = dt.datetime(2031, 3, 3, 8, 0, tzinfo=dt.UTC)
STUDY = parse_study(TEXT + "evaluation:\n  release: private\n  epsilon: 1\n", "test")
TRAINING = PrivacyEvent(0.25, 1.5, 5)
EVALUATION = PrivacyEvent(1.0, calibrate(1.0, 1e-3, 1.0, 2), 1)
OPEN_STUDY = parse_study(
    TEXT[: TEXT.index("privacy:")].replace("name: tiny", "name: open") + "privacy:\n  mode: none\n",
    "test",
)
Change = Callable[[dict[str, Any]], None]


def consilium(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run `consilium …` as the command line does; return status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
    monkeypatch.setattr(MODE, "json", False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@functools.cache
def authority() -> Authority:
    """One authority for all tests: making keys and certificates takes a while."""
    return Authority.create("test")


@functools.cache
def certificate(key: bytes, role: Role, name: str) -> str:
    """A certificate of the test authority, PEM."""
    public = Ed25519PrivateKey.from_private_bytes(key).public_key()
    return certificate_pem(authority().issue(public, role, name)).decode()


def sha(*parts: object) -> str:
    """A SHA-256 that stands for the bytes of an update."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass
class Site:
    """A site's history in the making; times go on by ``pause`` with every entry."""

    name: str = "north"
    key: Ed25519PrivateKey = KEY
    entries: list[Entry] = field(default_factory=list)
    egress: list[dict[str, Any]] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)
    pause: dt.timedelta = dt.timedelta(hours=7)
    witnessed: int | None = None
    #: When its evidence says it was taken.
    taken: str | None = None

    def __post_init__(self) -> None:
        self.add("opened", {
            "public_key": public_hex(self.key.public_key()),
            "unit": "patient",
            "adjacency": "add-or-remove-one",
        })  # fmt: skip

    def add(self, kind: Kind, body: dict[str, Any]) -> Entry:
        """Append an entry."""
        entry = signed(
            self.key,
            sequence=len(self.entries),
            previous=self.entries[-1].hash if self.entries else GENESIS,
            site=self.name,
            kind=kind,
            body=body,
            time=START + len(self.entries) * self.pause,
        )
        self.entries.append(entry)
        return entry

    def policy(self, epsilon: float = 10.0, delta: float = 1e-3) -> None:
        """Record a budget."""
        self.add("policy", {"policy": {"budget": {"epsilon": epsilon, "delta": delta}}})

    def train(
        self,
        round_index: int,
        *,
        study: str = STUDY.digest,
        event: PrivacyEvent = TRAINING,
        members: list[str] | None = None,
        purpose: str = "training",
        released: bool = True,
        clip_norm: float | None = None,
    ) -> None:
        """Charge a round, release its update and let the aggregator receive it."""
        named = patients(40) if members is None else members
        named = sorted(named)
        cohort = cohort_digest(named)
        if not any(e.kind == "cohort" and e.body["cohort"] == cohort for e in self.entries):
            self.add("cohort", {"cohort": cohort, "patients": named})
        charge = self.add("charge", {
            "study": study,
            "purpose": purpose,
            "round": round_index,
            "model": "silo-local",
            "event": event.to_dict(),
            "clip_norm": clip_norm or (1.0 if purpose == "training" else 0.5),
            "delta": 1e-3,
            "cohort": cohort,
        })  # fmt: skip
        if not released:
            return
        update = sha(study, purpose, round_index)
        self.add(
            "released",
            {"charge": charge.sequence, "charge_hash": charge.hash, "update": update},
        )
        self.leave(study, purpose, round_index, update)

    def leave(self, study: str, purpose: str, round_index: int, update: str) -> None:
        """Store an update to send, and let the aggregator receive it."""
        size = 120_000 if purpose == "training" else 30
        item = {"study": study, "purpose": purpose, "round": round_index, "sha256": update}
        self.egress.append({**item, "bytes": size, "stored_at": self.entries[-1].time})
        self.received.append({**item, "bytes": size, "time": self.entries[-1].time})

    def lines(self) -> bytes:
        """The export, with the attestations of the first ``witnessed`` entries (default: all)."""
        upto = len(self.entries) if self.witnessed is None else self.witnessed
        found = b""
        for entry in self.entries:
            found += entry.line() + b"\n"
            if entry.sequence < upto:
                found += witness(entry).line() + b"\n"
        return found

    def write_evidence(self, folder: Path, studies: tuple[Study, ...] = (STUDY,)) -> Path:
        """Write the folder as `consilium site evidence` does."""
        (folder / "studies").mkdir(parents=True)
        (folder / "ledger.jsonl").write_bytes(self.lines())
        (folder / "ledger-public.pem").write_bytes(public_pem(self.key.public_key()))
        (folder / "ledger-signer.pem").write_text(self.signer())
        (folder / "authority.pem").write_bytes(certificate_pem(authority().certificate))
        (folder / "witness.pem").write_text(attester())
        for study in studies:
            path = folder / "studies" / f"{study.digest}.json"
            path.write_bytes(canonical_json(study.to_canonical()))
        egress = {"schema": "consilium/egress/v1", "site": self.name, "released": self.egress}
        if self.taken is not None:
            egress["written_at"] = self.taken
        (folder / "egress.json").write_text(json.dumps(egress))
        return folder

    def write_records(self, path: Path, change: Change | None = None) -> Path:
        """Write the aggregator's records as `consilium server records` does."""
        upto = len(self.entries) if self.witnessed is None else self.witnessed
        content: dict[str, Any] = {
            "schema": "consilium/records/v1",
            "site": self.name,
            "written_at": "2031-06-01T00:00:00.000000Z",
            "signer_pem": self.signer(),
            "witness_pem": attester(),
            "authority_pem": certificate_pem(authority().certificate).decode(),
            "witnessed": [witness(entry).to_dict() for entry in self.entries[:upto]],
            "received": self.received,
        }
        if change is not None:
            change(content)
        signature = WITNESS_KEY.sign(canonical_json(content)).hex()
        path.write_text(json.dumps({"content": content, "signature": signature}))
        return path

    def signer(self) -> str:
        """The certificate of the ledger key."""
        return certificate(self.key.private_bytes_raw(), Role.SIGNER, self.name)


def attester() -> str:
    """The certificate of the aggregator's witness key."""
    return certificate(WITNESS_KEY.private_bytes_raw(), Role.WITNESS, "aggregator")


def sample_site() -> Site:
    """A site with two studies, evaluations, and everything in order."""
    site = Site()
    site.policy()
    site.train(0, purpose="evaluation", event=EVALUATION, members=patients(12, start=100))
    for round_index in range(4):
        site.train(round_index)
    site.train(4, purpose="evaluation", event=EVALUATION, members=patients(12, start=100))
    for round_index in range(3):
        site.train(
            round_index,
            study=digest("another study"),
            event=PrivacyEvent(0.2, 2.0, 10),
            members=patients(30, start=25),
        )
    return site
