"""What the aggregator's witness records add: history that neither side rewrites unseen."""

from __future__ import annotations

import functools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import (
    KEY,
    WITNESS_KEY,
    charge,
    open_ledger,
    small_ledger,
    witness,
    witnessed_ledger,
)

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.conflict import conflict_file, mark_conflict
from consilium_common.ledger.entries import Entry, Head
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import VerifyResult, verify_file, verify_lines
from consilium_common.ledger.witness import MalformedRecordError, WitnessRecord

PUBLIC = KEY.public_key()
WITNESS = WITNESS_KEY.public_key()
#: Lines of an export: entries 0 to 5 each with its record, then 6 and 7 without.
LINES = 14


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("witnessed")
    with witnessed_ledger(folder / "ledger.db") as ledger:
        ledger.export_jsonl(folder / "ledger.jsonl")
    return (folder / "ledger.jsonl").read_bytes().split(b"\n")[:-1]


def refused(code: str) -> Any:
    return pytest.raises(ConsiliumError, match=code.replace(".", r"\."))


def check(lines: list[bytes]) -> VerifyResult:
    return verify_lines(lines, PUBLIC, witness_key=WITNESS)


def broken(lines: list[bytes]) -> tuple[int, str, int | None]:
    problem = check(lines).problem
    assert problem is not None
    return problem.position, problem.code, problem.line


def test_an_export_holds_each_record_after_its_entry(exported: list[bytes]) -> None:
    kinds = ["witness" if b'{"witness"' in line[:12] else "entry" for line in exported]
    assert kinds == ["entry", "witness"] * 6 + ["entry", "entry"]
    found = check(exported)
    assert found.ok
    assert (found.entries, found.witnessed, found.last_witnessed, found.unwitnessed) == (8, 6, 5, 2)
    assert found.witness_checked


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember what parsing and signatures of the same bytes gave: most lines stay the same."""
    monkeypatch.setattr(Entry, "parse", functools.lru_cache(Entry.parse))
    monkeypatch.setattr(WitnessRecord, "parse", functools.lru_cache(WitnessRecord.parse))
    for signed in (Entry, WitnessRecord):
        monkeypatch.setattr(signed, "signed_by", remembering(signed.signed_by))


def remembering(signed_by: Any) -> Any:
    known: dict[tuple[bytes, bytes], bool] = {}

    def look_up(said: Entry | WitnessRecord, key: Any) -> bool:
        question = (said.line(), key.public_bytes_raw())
        if question not in known:
            known[question] = signed_by(said, key)
        return known[question]

    return look_up


@pytest.mark.usefixtures("remembered")
def test_every_flipped_byte_is_found_in_its_own_line(exported: list[bytes]) -> None:
    content = b"\n".join(exported) + b"\n"
    entries = [b'{"content"' in line[:12] for line in exported]
    missed = []
    tried = line = 0
    for position, byte in enumerate(content[:-1]):  # the last line break is the file reader's
        # The lowest bit; the bit that makes another case, which careless decoders of hexadecimal
        # overlook; one of the others in turn; and a line break.
        for other in {byte ^ 0x01, byte ^ 0x20, byte ^ 1 << position % 8, 0x0A} - {byte}:
            changed = content[:position] + bytes([other]) + content[position + 1 :]
            problem = check(changed.split(b"\n")[:-1]).problem
            tried += 1
            if (
                problem is None
                or problem.line != line + 1
                or (entries[line] and problem.position != sum(entries[:line]))
            ):
                missed.append((position, other, line, problem))
        line += byte == 0x0A
    assert missed == []
    assert line == LINES - 1
    assert tried > 3 * len(content)


def test_the_file_reader_finds_a_cut_last_line_that_is_a_record(
    path: Path, exported: list[bytes]
) -> None:
    file = path.with_suffix(".jsonl")
    content = b"\n".join(exported[:12]) + b"\n"
    for cut in (1, 2, 100):
        file.write_bytes(content[:-cut])
        found = verify_file(file, PUBLIC, witness_key=WITNESS)
        assert found.problem is not None
        assert (found.problem.code, found.problem.line) == ("witness", 12)
    file.write_bytes(content)
    assert verify_file(file, PUBLIC, witness_key=WITNESS).ok


@pytest.mark.parametrize("index", range(LINES - 1))
def test_a_removed_line_is_found(exported: list[bytes], index: int) -> None:
    lines = exported[:index] + exported[index + 1 :]
    if index == 11:  # the last record: what is left has an unwitnessed end, and says so
        found = check(lines)
        assert (found.ok, found.witnessed, found.unwitnessed) == (True, 5, 3)
    elif index % 2 and index < 12:
        assert broken(lines) == (index // 2 + 1, "witness", index + 2)
    elif index < 12:  # its record now follows the entry before
        assert broken(lines) == (max(index // 2 - 1, 0), "witness", index + 1)
    else:
        assert broken(lines) == (6, "sequence", 13)


@pytest.mark.parametrize("index", range(LINES - 1))
def test_reordered_lines_are_found(exported: list[bytes], index: int) -> None:
    lines = list(exported)
    lines[index], lines[index + 1] = lines[index + 1], lines[index]
    assert broken(lines)[2] in (index + 1, index + 2)


@pytest.mark.parametrize("index", range(LINES))
def test_a_repeated_line_is_found(exported: list[bytes], index: int) -> None:
    lines = [*exported[: index + 1], *exported[index:]]
    assert broken(lines)[2] == index + 2


@pytest.mark.parametrize("kept", range(1, LINES))
def test_a_truncated_export_says_how_far_it_is_witnessed(exported: list[bytes], kept: int) -> None:
    head = Entry.parse(exported[-1]).head
    found = check(exported[:kept])
    assert found.ok
    assert found.witnessed == min(kept, 12) // 2
    assert verify_lines(exported[:kept], PUBLIC, expected_head=head).problem is not None


def test_a_foreign_witness_key_is_found_at_the_first_record(exported: list[bytes]) -> None:
    foreign = Ed25519PrivateKey.generate().public_key()
    problem = verify_lines(exported, PUBLIC, witness_key=foreign).problem
    assert problem is not None
    assert (problem.position, problem.code, problem.line) == (0, "witness", 2)


def test_a_ledger_rewritten_by_the_site_itself_contradicts_its_witness(
    path: Path, exported: list[bytes]
) -> None:
    with open_ledger(path) as other:
        for index in range(4):
            charge(other, index)
        rewritten = [entry.line() for entry in other.entries()]
    assert verify_lines(rewritten, PUBLIC).ok
    # With the records that the aggregator made of the true one, even without its key.
    for key in (WITNESS, None):
        lines = [rewritten[0], exported[1], *rewritten[1:]]
        problem = verify_lines(lines, PUBLIC, witness_key=key).problem
        assert problem is not None
        assert (problem.code, problem.line) == ("witness", 2)


def test_without_the_witness_key_signatures_stay_open_and_that_is_said(
    exported: list[bytes],
) -> None:
    forged = witness(Entry.parse(exported[0]), key=Ed25519PrivateKey.generate())
    lines = [exported[0], forged.line(), *exported[2:]]
    found = verify_lines(lines, PUBLIC)
    assert (found.ok, found.witness_checked) == (True, False)
    assert broken(lines) == (0, "witness", 2)


def test_records_outlive_the_process_and_verify_in_the_database(path: Path) -> None:
    witnessed_ledger(path).close()
    with Ledger.open(path) as ledger:
        assert ledger.witnessed == ledger.from_entry(5, 1)[0].head
    found = verify_file(path, PUBLIC, witness_key=WITNESS)
    assert (found.ok, found.witnessed, found.entries) == (True, 6, 8)


def test_records_kept_before_are_checked_and_passed_over(path: Path) -> None:
    with witnessed_ledger(path) as ledger:
        entries = ledger.from_entry(0, 8)
        head = ledger.add_witness([witness(entry) for entry in entries[3:]], WITNESS)
        assert head == ledger.witnessed == entries[-1].head
        foreign = Ed25519PrivateKey.generate()
        with refused("privacy.witness-invalid"):
            ledger.add_witness([witness(entries[2], key=foreign)], WITNESS)
        assert ledger.add_witness([], WITNESS) == head
    assert verify_file(path, PUBLIC, witness_key=WITNESS).witnessed == 8


def of_another_entry(entry: Entry) -> WitnessRecord:
    return witness(Entry(**{**entry.__dict__, "hash": "0" * 64}))


def of_another_site(entry: Entry) -> WitnessRecord:
    return witness(Entry(**{**entry.__dict__, "site": "south"}))


def of_a_stranger(entry: Entry) -> WitnessRecord:
    return witness(entry, key=Ed25519PrivateKey.generate())


def of_a_later_entry(entry: Entry) -> WitnessRecord:
    return witness(Entry(**{**entry.__dict__, "sequence": entry.sequence + 1}))


def of_no_entry_here(entry: Entry) -> WitnessRecord:
    return witness(Entry(**{**entry.__dict__, "sequence": 99}))


@pytest.mark.parametrize(
    "wrong", [of_another_entry, of_another_site, of_a_stranger, of_a_later_entry, of_no_entry_here]
)
def test_a_record_that_does_not_hold_is_not_kept_nor_those_with_it(path: Path, wrong: Any) -> None:
    with small_ledger(path) as ledger:
        first, second = ledger.from_entry(0, 2)
        with refused("privacy.witness-invalid"):
            ledger.add_witness([witness(first), wrong(second)], WITNESS)
        with refused("privacy.witness-invalid"):
            ledger.add_witness([wrong(first)], WITNESS)
        assert ledger.witnessed is None
        with Ledger.open(path) as reader, refused("privacy.ledger-read-only"):
            reader.add_witness([witness(first)], WITNESS)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE witness SET line = x'00' WHERE sequence = 1",
        "DELETE FROM witness WHERE sequence = 5",
        "DELETE FROM witness",
        "INSERT OR REPLACE INTO witness VALUES (1, x'00')",
        "INSERT INTO witness VALUES (7, x'00')",
        "INSERT INTO witness VALUES (99, x'00')",
    ],
)
def test_the_database_itself_refuses_to_forget_a_record(path: Path, statement: str) -> None:
    witnessed_ledger(path).close()
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    db.close()
    assert verify_file(path, PUBLIC, witness_key=WITNESS).witnessed == 6


def test_an_older_ledger_without_a_place_for_records_is_read_and_gets_one(path: Path) -> None:
    small_ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE witness")
    db.close()
    with Ledger.open(path) as reader:
        assert reader.witnessed is None
        reader.export_jsonl(path.with_suffix(".jsonl"))
    assert verify_file(path, PUBLIC).unwitnessed == 8
    with open_ledger(path) as ledger:
        assert ledger.add_witness([witness(ledger.from_entry(0, 1)[0])], WITNESS) is not None
    assert verify_file(path, PUBLIC, witness_key=WITNESS).witnessed == 1


@pytest.mark.parametrize("kept", [0, 3])
def test_entries_cut_behind_their_witness_are_missed(path: Path, kept: int) -> None:
    witnessed_ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER entry_no_delete")
    db.execute("DELETE FROM entry WHERE sequence >= ?", (kept,))
    db.commit()
    db.close()
    for signer in (None, KEY):
        with refused("privacy.ledger-corrupt"):
            Ledger.open(path, signer, site="north")
    problem = verify_file(path, PUBLIC, witness_key=WITNESS).problem
    assert problem is not None
    assert problem.code == "witness"


def test_a_damaged_log_that_drops_charges_is_found_by_the_witness(path: Path) -> None:
    ledger = witnessed_ledger(path, 8)
    log = path.with_name("ledger.db-wal")
    copy = path.with_name("copy.db")
    # As a power cut on a dishonest disk leaves it: the log's end is lost, with all its frames.
    copy.write_bytes(path.read_bytes())
    content = log.read_bytes()
    copy.with_name("copy.db-wal").write_bytes(content[: len(content) * 2 // 3])
    known = Head(7, ledger.head.hash)
    ledger.close()
    try:
        found = verify_file(copy, PUBLIC, expected_head=known, witness_key=WITNESS)
    except ConsiliumError as error:
        assert error.code == "privacy.ledger-corrupt"
        return
    assert found.problem is not None
    assert found.entries < 8 or found.witnessed < 8


def test_a_contradicted_ledger_is_not_charged_until_it_is_mended(path: Path) -> None:
    with open_ledger(path) as ledger:
        entry = charge(ledger)
        said = ConsiliumError("privacy.witness-conflict", "The aggregator has seen an entry 9.")
        mark_conflict(path, said)
        head = ledger.head
        with refused("privacy.ledger-rolled-back") as caught:
            charge(ledger, 1)
        assert "seen an entry 9" in str(caught.value)
        assert "ledger.conflict" in str(caught.value)
        with refused("privacy.ledger-rolled-back"):
            ledger.release(entry, "c" * 64)
        assert ledger.head == head
        with refused("privacy.ledger-rolled-back"):
            open_ledger(path)
        with Ledger.open(path) as reader:  # what is there can be read and shown
            assert reader.head == head
        for content in (b"", b"[]", b"\xff"):
            conflict_file(path).write_bytes(content)
            with refused("privacy.ledger-rolled-back"):
                charge(ledger, 1)
        conflict_file(path).unlink()
        charge(ledger, 1)
    assert verify_file(path, PUBLIC).ok


def test_a_missing_ledger_that_is_marked_is_not_begun_anew(path: Path) -> None:
    mark_conflict(path, ConsiliumError("privacy.witness-conflict", "It had entries."))
    with refused("privacy.ledger-rolled-back"):
        open_ledger(path)
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"signature": None},
        {"signature": "G" * 128},
        {"more": 1},
        {"statement": []},
        {"statement": {"more": 1}},
        {"statement": {"sequence": True}},
        {"statement": {"sequence": 1.0}},
        {"statement": {"sequence": -1}},
        {"statement": {"hash": "A" * 64}},
        {"statement": {"site": ""}},
        {"statement": {"time": "2031-05-06T07:08:09Z"}},
        {"statement": {"time": "2031-02-30T07:08:09.000000Z"}},
        {"statement": {"schema": "consilium/witness/v2"}},
    ],
)
def test_a_record_of_another_form_is_none(exported: list[bytes], change: dict[str, Any]) -> None:
    value = json.loads(exported[3])["witness"]
    assert WitnessRecord.from_dict(value).line() == exported[3]
    inner = change.get("statement")
    changed = {**value, **change}
    if isinstance(inner, dict):
        changed["statement"] = {**value["statement"], **inner}
    with pytest.raises(MalformedRecordError):
        WitnessRecord.from_dict(changed)


@pytest.mark.parametrize("value", [None, 7, "text", [], {}, {"statement": {}, "signature": ""}])
def test_what_is_no_record_at_all_is_malformed(value: object) -> None:
    with pytest.raises(MalformedRecordError):
        WitnessRecord.from_dict(value)


FULL_DISK = """
import resource, sys
from pathlib import Path
from ledger_samples import WITNESS_KEY, charge, open_ledger, witness
from consilium_common.errors import ConsiliumError

path = Path(sys.argv[1])
with open_ledger(path) as ledger:
    for index in range(60):
        charge(ledger, index)
    records = [witness(entry) for entry in ledger.from_entry(0, 62)]
    size = path.with_name("ledger.db-wal").stat().st_size
    # The system refuses writes past this size, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5_000, resource.RLIM_INFINITY))
    try:
        ledger.add_witness(records, WITNESS_KEY.public_key())
    except ConsiliumError as error:
        print(error.code, ledger.witnessed, ledger.head.sequence)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(ledger.add_witness(records, WITNESS_KEY.public_key()).sequence)
"""


def test_a_full_disk_keeps_no_half_of_the_records_and_no_entry_is_lost(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["privacy.ledger-write", "None", "61", "61"]
    assert verify_file(path, PUBLIC, witness_key=WITNESS).witnessed == 62
