"""LEDGER.md is enough: a verifier written from it alone agrees with the program's."""

from __future__ import annotations

import hashlib
import json
import random
import re
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from ledger_samples import KEY, WITNESS_KEY, charge, witnessed_ledger

from consilium_common.ledger.verify import verify_lines

PUBLIC, WITNESS = KEY.public_key(), WITNESS_KEY.public_key()
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
SIGNATURE = re.compile(r"[0-9a-f]{128}")
BODIES = {
    "opened": {"public_key", "unit", "adjacency"},
    "cohort": {"patients", "cohort"},
    "charge": {
        *("study", "purpose", "round", "model", "event", "clip_norm", "delta", "cohort"),
    },
    "released": {"charge", "charge_hash", "update"},
    "voided": {"charge", "charge_hash", "reason"},
    "policy": {"policy"},
}


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def signed(key: Ed25519PublicKey, signature: str, message: bytes) -> bool:
    assert SIGNATURE.fullmatch(signature)
    try:
        key.verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        return False
    return True


class Reader:
    """What the document says, line by line; raises AssertionError at the first that fails."""

    def __init__(self) -> None:
        self.entries = self.witnessed = 0
        self.last: dict[str, Any] = {}
        self.cohorts: set[str] = set()
        self.fates: dict[int, tuple[str, str, tuple[Any, ...]]] = {}

    def read(self, line: bytes) -> None:
        value = json.loads(line)
        assert canonical(value) == line
        if set(value) == {"witness"}:
            self.record(value["witness"])
        else:
            self.entry(value)

    def entry(self, value: dict[str, Any]) -> None:
        assert set(value) == {"content", "hash", "signature"}
        content = value["content"]
        assert set(content) == {"format", "sequence", "previous", "time", "site", "kind", "body"}
        assert content["format"] == "consilium/ledger/v1"
        assert TIME.fullmatch(content["time"])
        body = content["body"]
        assert set(body) == BODIES[content["kind"]]
        assert content["sequence"] == self.entries
        assert content["previous"] == (self.last["hash"] if self.last else "0" * 64)
        assert value["hash"] == hashlib.sha256(canonical(content)).hexdigest()
        message = b"consilium/ledger/v1\n" + bytes.fromhex(value["hash"])
        assert signed(PUBLIC, value["signature"], message)
        if self.last:
            assert content["site"] == self.last["content"]["site"]
        assert (content["kind"] == "opened") == (self.entries == 0)
        self.rules(content["kind"], body, value["hash"])
        self.last = value
        self.entries += 1

    def rules(self, kind: str, body: dict[str, Any], digest: str) -> None:
        if kind == "opened":
            assert body["public_key"] == PUBLIC.public_bytes_raw().hex()
        elif kind == "cohort":
            assert body["patients"] == sorted(set(body["patients"]))
            assert body["cohort"] == hashlib.sha256(canonical(body["patients"])).hexdigest()
            assert body["cohort"] not in self.cohorts
            self.cohorts.add(body["cohort"])
        elif kind == "charge":
            assert body["cohort"] in self.cohorts
            assert body["purpose"] in ("training", "evaluation", "statistics")
            assert body["model"] == "silo-local"
            key = (body["study"], body["purpose"], body["round"])
            standing = [k for _, fate, k in self.fates.values() if fate != "voided"]
            assert key not in standing
            self.fates[self.entries] = (digest, "open", key)
        elif kind in ("released", "voided"):
            named, fate, key = self.fates[body["charge"]]
            assert (named, fate) == (body["charge_hash"], "open")
            self.fates[body["charge"]] = (named, kind, key)

    def record(self, value: dict[str, Any]) -> None:
        assert set(value) == {"statement", "signature"}
        said = value["statement"]
        assert set(said) == {"schema", "site", "sequence", "hash", "time"}
        assert said["schema"] == "consilium/witness/v1"
        assert TIME.fullmatch(said["time"])
        ours = self.last["content"]
        seen = (said["site"], said["sequence"], said["hash"])
        assert seen == (ours["site"], ours["sequence"], self.last["hash"])
        assert said["sequence"] == self.witnessed
        assert signed(WITNESS, value["signature"], canonical(said))
        self.witnessed += 1


def read(lines: list[bytes]) -> tuple[int, Reader]:
    """Return the first line that fails (from 1; 0: none) and the reader."""
    reader = Reader()
    for number, line in enumerate(lines, start=1):
        try:
            reader.read(line)
        except (AssertionError, ValueError, KeyError, TypeError):
            return number, reader
    return 0, reader


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("document")
    with witnessed_ledger(folder / "ledger.db") as ledger:
        charge(ledger, 0, purpose="evaluation")
        charge(ledger, 0, purpose="statistics")
        ledger.export_jsonl(folder / "ledger.jsonl")
    return (folder / "ledger.jsonl").read_bytes().split(b"\n")[:-1]


def test_the_document_s_verifier_accepts_a_real_export(lines: list[bytes]) -> None:
    bad, reader = read(lines)
    assert bad == 0
    assert (reader.entries, reader.witnessed) == (10, 6)


def test_both_verifiers_name_the_same_line_of_a_changed_export(lines: list[bytes]) -> None:
    chance = random.Random(5)
    agreed = 0
    for _ in range(250):
        changed = list(lines)
        match chance.choice(["flip", "remove", "repeat", "swap", "digit"]):
            case "flip":
                number = chance.randrange(len(changed))
                line = bytearray(changed[number])
                line[chance.randrange(len(line))] ^= 1 << chance.randrange(8)
                changed[number] = bytes(line)
            case "digit":
                number = chance.randrange(len(changed))
                place = chance.choice(list(re.finditer(rb"[0-9a-f]", changed[number]))).start()
                digit = b"%x" % chance.randrange(16)
                changed[number] = changed[number][:place] + digit + changed[number][place + 1 :]
            case "remove":
                del changed[chance.randrange(len(changed))]
            case "repeat":
                number = chance.randrange(len(changed))
                changed.insert(number, changed[number])
            case "swap":
                number = chance.randrange(len(changed) - 1)
                changed[number : number + 2] = reversed(changed[number : number + 2])
        ours = verify_lines(changed, PUBLIC, witness_key=WITNESS).problem
        assert read(changed)[0] == (0 if ours is None else ours.line)
        agreed += ours is not None
    assert agreed > 180


def test_both_verifiers_refuse_what_the_site_itself_signed_against_the_rules(
    lines: list[bytes],
) -> None:
    """A second charge, a second fate and a change of the past, each signed with the right key."""
    last = json.loads(lines[-1])
    charged = next(line for line in lines if b'"kind":"charge"' in line)
    released = next(line for line in lines if b'"kind":"released"' in line)
    voided = next(line for line in lines if b'"kind":"voided"' in line)
    for line, fine in ((charged, False), (released, False), (voided, False), (lines[2], True)):
        content = json.loads(line)["content"]
        content |= {"sequence": last["content"]["sequence"] + 1, "previous": last["hash"]}
        if fine:  # a policy may change at any time
            assert content["kind"] == "policy"
        digest = hashlib.sha256(canonical(content)).hexdigest()
        message = b"consilium/ledger/v1\n" + bytes.fromhex(digest)
        more = canonical({"content": content, "hash": digest, "signature": KEY.sign(message).hex()})
        ours = verify_lines([*lines, more], PUBLIC, witness_key=WITNESS)
        assert (read([*lines, more])[0] == 0) == ours.ok == fine
        if not fine:
            assert ours.problem is not None
            assert ours.problem.code == "rule"


def test_both_verifiers_refuse_a_foreign_key(lines: list[bytes]) -> None:
    foreign = Ed25519PrivateKey.generate()
    first = json.loads(lines[0])
    message = b"consilium/ledger/v1\n" + bytes.fromhex(first["hash"])
    first["signature"] = foreign.sign(message).hex()
    changed = [canonical(first), *lines[1:]]
    assert read(changed)[0] == 1
    problem = verify_lines(changed, PUBLIC).problem
    assert problem is not None
    assert (problem.code, problem.line) == ("signature", 1)
