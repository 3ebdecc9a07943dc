"""The witness countersigns what a site signed, once, and tells when history was rewritten."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.audit.documents import read_records
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, check_issued, load_certificate
from consilium_common.identity.keys import new_signing_key, new_tls_key, verify_signature
from consilium_common.ledger.entries import GENESIS, Entry, sign_entry
from consilium_common.ledger.witness import WitnessRecord
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.overview import sites_overview
from consilium_server.records import log_here, records_here
from consilium_server.registry import Registry
from consilium_server.tables import Member, Received, now
from consilium_server.witness import MAX_HEADS, Witness, WitnessKey

SITE = "north"
AUTHORITY = Authority.create("tests")
SIGNER = new_signing_key()
SIGNER_PEM = certificate_pem(AUTHORITY.issue(SIGNER.public_key(), Role.SIGNER, SITE)).decode()


def ledger_of(length: int, *, signer: Any = SIGNER, last: float = 0.1) -> list[Entry]:
    """A ledger's chain; ``last`` changes what its last entry says."""
    entries: list[Entry] = []
    for sequence in range(length):
        budget = last if sequence == length - 1 else 0.5
        entries.append(
            sign_entry(
                signer,
                sequence=sequence,
                previous=entries[-1].hash if entries else GENESIS,
                site=SITE,
                kind="policy",
                body={"policy": {"epsilon": budget}},
            )
        )
    return entries


LEDGER = ledger_of(8)


def heads(entries: list[Entry]) -> list[dict[str, Any]]:
    return [{"sequence": e.sequence, "hash": e.hash, "signature": e.signature} for e in entries]


class House:
    """A registry and its witness, opened anew whenever asked."""

    def __init__(self, folder: Path) -> None:
        self.home = ServerHome.create(folder)
        self.home.save_config(ServerConfig("tests", "127.0.0.1:1"))
        AUTHORITY.save(self.home.identity)
        self.key = WitnessKey.ensure(self.home.identity, AUTHORITY)
        self.registry = Registry(self.home.database)

    def ask(self, sent: object, signer_pem: str = SIGNER_PEM, site: str = SITE) -> dict[str, Any]:
        return Witness(Registry(self.home.database), self.key).countersign(site, signer_pem, sent)

    def refusal(self, sent: object, signer_pem: str = SIGNER_PEM) -> ConsiliumError:
        with pytest.raises(ConsiliumError) as caught:
            self.ask(sent, signer_pem)
        return caught.value


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def member(signer_pem: str = SIGNER_PEM) -> Member:
    certificate = AUTHORITY.issue(new_tls_key().public_key(), Role.SITE, SITE)
    return Member(
        name=SITE,
        role="site",
        status="active",
        serial="1",
        certificate_pem=certificate_pem(certificate).decode(),
        signer_pem=signer_pem,
        node_id=None,
        joined_at=now(),
    )


# --- the key -----------------------------------------------------------------------------------


def test_the_key_is_made_once_and_certified_for_witnessing_alone(house: House) -> None:
    again = WitnessKey.ensure(house.home.identity, AUTHORITY)
    assert again.pem == house.key.pem
    certified = check_issued(load_certificate(again.pem.encode()), AUTHORITY.certificate)
    assert (certified.role, certified.name) == (Role.WITNESS, "aggregator")
    assert certified.public_key == again.key.public_key()
    key_file = house.home.identity / "witness-key.pem"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    # A record must verify for as long as the consortium exists.
    left = AUTHORITY.certificate.not_valid_after_utc - certified.not_after
    assert abs(left.total_seconds()) < 60


def test_a_crash_between_key_and_certificate_keeps_the_key(house: House) -> None:
    (house.home.identity / "witness.pem").unlink()
    again = WitnessKey.ensure(house.home.identity, AUTHORITY)
    assert again.key.public_key() == house.key.key.public_key()


def test_a_lost_or_foreign_key_is_an_error_and_no_new_one_is_made(house: House) -> None:
    folder = house.home.identity
    with pytest.raises(ConsiliumError) as caught:
        WitnessKey.ensure(folder, Authority.create("elsewhere"))
    assert caught.value.code == "identity.foreign"
    (folder / "witness-key.pem").unlink()
    with pytest.raises(ConsiliumError) as caught:
        WitnessKey.ensure(folder, AUTHORITY)
    assert caught.value.code == "identity.no-key"
    assert not (folder / "witness-key.pem").exists()


# --- countersigning ----------------------------------------------------------------------------


def test_an_empty_list_asks_what_is_known(house: House) -> None:
    answer = house.ask([])
    assert answer == {"records": [], "witness_pem": house.key.pem, "known": -1}
    house.ask(heads(LEDGER[:3]))
    assert house.ask([])["known"] == 2


def test_each_head_gets_a_record_that_the_witness_s_certificate_verifies(house: House) -> None:
    answer = house.ask(heads(LEDGER))
    key = load_certificate(answer["witness_pem"].encode()).public_key()
    assert answer["known"] == 7
    for value, entry in zip(answer["records"], LEDGER, strict=True):
        record = WitnessRecord.from_dict(value)
        assert (record.site, record.head) == (SITE, entry.head)
        assert record.signed_by(key)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=6))
def test_however_a_site_sends_its_heads_each_has_one_record_for_good(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[int, int]]
) -> None:
    house = House(tmp_path_factory.mktemp("witness"))
    first: dict[int, Any] = {}
    known = -1
    for start, count in sent:
        part = LEDGER[start : start + count]
        if start > known + 1:
            error = house.refusal(heads(part))
            assert error.code == "privacy.witness-gap"
            assert f"next entry to witness is {known + 1}," in error.message
            continue
        answer = house.ask(heads(part))
        for entry, record in zip(part, answer["records"], strict=True):
            assert first.setdefault(entry.sequence, record) == record
        known = max(known, part[-1].sequence)
        assert answer["known"] == known
    assert [row.sequence for row in house.registry.witnessed(SITE)] == list(range(known + 1))
    assert house.registry.alarms() == []


def test_a_rewritten_entry_is_refused_and_raises_an_alarm_that_stays(house: House) -> None:
    house.ask(heads(LEDGER[:5]))
    with house.registry.transaction() as session:
        session.add(member())
    rewritten = ledger_of(5, last=9.0)
    assert rewritten[4].hash != LEDGER[4].hash
    for _ in range(2):
        error = house.refusal(heads([rewritten[4]]))
        assert error.code == "privacy.witness-conflict"
        assert "entry 4" in error.message
    # Nothing of a call that conflicts is kept, however much of it was sound.
    house.refusal(heads([rewritten[4], sign_after(rewritten[4])]))
    assert house.ask([])["known"] == 4
    (alarm,) = house.registry.alarms()
    assert (alarm.site, alarm.code) == (SITE, "privacy.witness-conflict")
    (row,) = sites_overview(house.registry)
    assert [one["code"] for one in row["alarms"]] == ["privacy.witness-conflict"]
    assert row["witnessed"] == 4
    # The history that was witnessed goes on.
    assert house.ask(heads(LEDGER[3:6]))["known"] == 5


def sign_after(entry: Entry) -> Entry:
    return sign_entry(
        SIGNER,
        sequence=entry.sequence + 1,
        previous=entry.hash,
        site=SITE,
        kind="policy",
        body={"policy": {}},
    )


def test_a_head_that_the_site_s_ledger_key_did_not_sign_is_refused(house: House) -> None:
    sent = heads(LEDGER[:2])
    sent[1]["signature"] = sent[0]["signature"]
    assert house.refusal(sent).code == "privacy.witness-signature"
    foreign = heads(ledger_of(1, signer=new_signing_key()))
    assert house.refusal(foreign).code == "privacy.witness-signature"
    assert house.ask([])["known"] == -1


def test_a_new_ledger_under_a_new_key_begins_anew_and_is_told(house: House) -> None:
    house.ask(heads(LEDGER[:4]))
    signer = new_signing_key()
    pem = certificate_pem(AUTHORITY.issue(signer.public_key(), Role.SIGNER, SITE)).decode()
    assert house.ask([], pem)["known"] == -1
    assert house.registry.alarms() == []
    assert house.ask(heads(ledger_of(2, signer=signer)), pem)["known"] == 1
    (alarm,) = house.registry.alarms()
    assert alarm.code == "privacy.witness-new-ledger"
    assert "up to entry 3" in alarm.message
    # Another site's ledger is no former ledger of this one.
    house.ask(heads(LEDGER[:1]), site="south")
    assert len(house.registry.alarms()) == 1


@pytest.mark.parametrize(
    "sent",
    [
        None,
        {},
        "[]",
        [None],
        [{**heads(LEDGER)[0], "sequence": True}],
        [{**heads(LEDGER)[0], "sequence": -1}],
        [{**heads(LEDGER)[0], "sequence": 0.0}],
        [{**heads(LEDGER)[0], "hash": "A" * 64}],
        [{**heads(LEDGER)[0], "hash": None}],
        [{**heads(LEDGER)[0], "signature": "0" * 127}],
        [{**heads(LEDGER)[0], "entry": {}}],
        [{"sequence": 0}],
        heads(LEDGER[:1]) * (MAX_HEADS + 1),
    ],
)
def test_a_request_of_another_form_is_refused(house: House, sent: object) -> None:
    assert house.refusal(sent).code == "privacy.witness-form"


def test_heads_that_leave_one_out_are_refused(house: House) -> None:
    for left_out in (heads([LEDGER[0], LEDGER[2]]), heads([LEDGER[1], LEDGER[0]])):
        assert house.refusal(left_out).code == "privacy.witness-gap"
    assert house.ask([])["known"] == -1


def test_calls_at_once_give_one_record_each(house: House) -> None:
    witness = Witness(house.registry, house.key)
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: witness.countersign(SITE, SIGNER_PEM, heads(LEDGER)), range(8))
        )
    assert all(answer["records"] == answers[0]["records"] for answer in answers)
    assert len(house.registry.witnessed(SITE)) == len(LEDGER)


# --- records for an auditor --------------------------------------------------------------------


def test_a_site_s_records_are_complete_signed_and_noted(house: House, tmp_path: Path) -> None:
    with house.registry.transaction() as session:
        session.add(member())
    answer = house.ask(heads(LEDGER[:3]))
    house.registry.note_received(
        Received(
            study="d" * 64,
            site=SITE,
            purpose="training",
            round=0,
            sha256="a" * 64,
            bytes=12,
            time="2026-01-01T00:00:00.000000Z",
        )
    )
    path = tmp_path / "north.json"
    path.write_bytes(records_here(house.home, SITE))
    written = json.loads(path.read_bytes())
    content = written["content"]
    assert content["schema"] == "consilium/records/v1"
    assert content["witnessed"] == answer["records"]
    assert content["signer_pem"] == SIGNER_PEM
    assert content["received"] == [
        {
            "study": "d" * 64,
            "purpose": "training",
            "round": 0,
            "sha256": "a" * 64,
            "bytes": 12,
            "time": "2026-01-01T00:00:00.000000Z",
        }
    ]
    # The auditor's reader takes it, and every signature in it holds there.
    read = read_records(path)
    assert [record.head for record in read.witnessed] == [entry.head for entry in LEDGER[:3]]
    assert [(one.purpose, one.round, one.bytes) for one in read.received] == [("training", 0, 12)]
    authority = load_certificate(content["authority_pem"].encode())
    key = check_issued(load_certificate(content["witness_pem"].encode()), authority).public_key
    signature = bytes.fromhex(written["signature"])
    assert verify_signature(key, signature, canonical_json(content))  # type: ignore[arg-type]
    # That they were handed out stands in the audit log, with their digest.
    (entry,) = json.loads(log_here(house.home))["content"]["entries"]
    assert (entry["act"], entry["subject"], entry["role"]) == ("records", SITE, "local")
    assert entry["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_records_of_a_site_that_never_joined_are_an_error(house: House) -> None:
    with pytest.raises(ConsiliumError) as caught:
        records_here(house.home, "nobody")
    assert caught.value.code == "identity.unknown"
