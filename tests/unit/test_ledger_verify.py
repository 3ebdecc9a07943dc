"""Whatever is done to a ledger, the verifier finds it and names the first broken entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import KEY, STUDY, charge, open_ledger, patients, small_ledger

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Entry, Head, Kind, cohort_digest, sign_entry
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import (
    VerifyResult,
    verify_entries,
    verify_file,
    verify_lines,
)
from consilium_common.privacy.events import PrivacyEvent

PUBLIC = KEY.public_key()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("ledger")
    with small_ledger(folder / "ledger.db") as ledger:
        ledger.export_jsonl(folder / "ledger.jsonl")
    return (folder / "ledger.jsonl").read_bytes()


def split(content: bytes) -> list[bytes]:
    # Not splitlines(): a flipped byte may be another kind of line break.
    parts = content.split(b"\n")
    return parts[:-1] if parts[-1] == b"" else [*parts[:-1], parts[-1] + b"\n"]


def broken_at(result: VerifyResult) -> tuple[int, str]:
    assert result.problem is not None
    assert not result.ok
    assert result.entries == result.problem.position
    return result.problem.position, result.problem.code


def test_an_untouched_ledger_verifies(exported: bytes) -> None:
    found = verify_lines(split(exported), PUBLIC)
    assert found.ok
    assert found.entries == 8
    assert [c.state for c in found.state.charges.values()] == ["released", "voided", "open"]


def test_the_file_reader_finds_a_flipped_line_break_and_a_cut_last_line(
    exported: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "ledger.jsonl"
    ends = [i for i, byte in enumerate(exported) if byte == 0x0A]
    for number, end in enumerate(ends):
        for replacement in (b"", b"\r", b"\r\n", b" \n", b"\n\n", b"\x0b"):
            file.write_bytes(exported[:end] + replacement + exported[end + 1 :])
            expected = number + 1 if replacement == b"\n\n" else number
            assert broken_at(verify_file(file, PUBLIC)) == (expected, "form")
    file.write_bytes(exported[:-100])
    assert broken_at(verify_file(file, PUBLIC)) == (7, "form")
    file.write_bytes(exported)
    assert verify_file(file, PUBLIC).ok


@pytest.mark.parametrize("index", range(8))
def test_a_removed_entry_is_found_where_it_is_missing(exported: bytes, index: int) -> None:
    lines = split(exported)
    head = Entry.parse(lines[-1]).head
    del lines[index]
    expected = (index, "sequence") if index < 7 else (7, "head")
    assert broken_at(verify_lines(lines, PUBLIC, expected_head=head)) == expected


@pytest.mark.parametrize("index", range(7))
def test_reordered_entries_are_found(exported: bytes, index: int) -> None:
    lines = split(exported)
    lines[index], lines[index + 1] = lines[index + 1], lines[index]
    assert broken_at(verify_lines(lines, PUBLIC)) == (index, "sequence")


@pytest.mark.parametrize("index", range(8))
def test_a_repeated_entry_is_found(exported: bytes, index: int) -> None:
    lines = split(exported)
    lines.insert(index, lines[index])
    assert broken_at(verify_lines(lines, PUBLIC)) == (index + 1, "sequence")


@pytest.mark.parametrize("kept", range(8))
def test_a_truncated_ledger_is_found_by_whoever_knows_a_later_head(
    exported: bytes, kept: int
) -> None:
    lines = split(exported)
    head = Entry.parse(lines[-1]).head
    result = verify_lines(lines[:kept], PUBLIC, expected_head=head)
    assert broken_at(result) == (kept, "head" if kept else "empty")
    # Without the head a shorter ledger is sound in itself, as LEDGER.md says.
    assert verify_lines(lines[:kept], PUBLIC).ok == (kept > 0)


def test_a_rewritten_history_is_found_by_an_older_head(exported: bytes, tmp_path: Path) -> None:
    old = Entry.parse(split(exported)[4]).head
    with open_ledger(tmp_path / "other.db") as other:
        for index in range(6):
            charge(other, index)
        lines = [entry.line() for entry in other.entries()]
    assert verify_lines(lines, PUBLIC).ok
    assert broken_at(verify_lines(lines, PUBLIC, expected_head=old)) == (4, "head")


def test_a_ledger_may_have_grown_since_the_head_was_noted(exported: bytes) -> None:
    lines = split(exported)
    for line in lines:
        assert verify_lines(lines, PUBLIC, expected_head=Entry.parse(line).head).ok


def test_a_foreign_key_is_found_at_the_first_entry(exported: bytes) -> None:
    foreign = Ed25519PrivateKey.generate().public_key()
    assert broken_at(verify_lines(split(exported), foreign)) == (0, "signature")


def test_an_entry_resigned_by_a_foreign_key_is_found(exported: bytes) -> None:
    entries = [Entry.parse(line) for line in split(exported)]
    old = entries[5]
    entries[5] = sign_entry(
        Ed25519PrivateKey.generate(),
        sequence=old.sequence,
        previous=old.previous,
        site=old.site,
        kind="charge",
        body=old.body,
    )
    assert broken_at(verify_entries(entries, PUBLIC)) == (5, "signature")


def test_a_change_hidden_by_a_new_hash_still_lacks_the_signature(exported: bytes) -> None:
    lines = split(exported)
    value = json.loads(lines[3])
    value["content"]["body"]["event"]["steps"] = 1
    entry = Entry(
        **{k: v for k, v in value["content"].items() if k != "format"},
        hash="0" * 64,
        signature=value["signature"],
    )
    lines[3] = Entry(**{**entry.__dict__, "hash": entry.computed_hash()}).line()
    assert broken_at(verify_lines(lines, PUBLIC)) == (3, "signature")


def chain(*steps: tuple[Kind, dict[str, object]], site: str = "north") -> list[Entry]:
    """Sign entries with the right key, whatever they say."""
    entries: list[Entry] = []
    for kind, body in steps:
        entries.append(
            sign_entry(
                KEY,
                sequence=len(entries),
                previous=entries[-1].hash if entries else "0" * 64,
                site=site,
                kind=kind,
                body=body,
            )
        )
    return entries


OPENED: tuple[Kind, dict[str, object]] = (
    "opened",
    {"public_key": PUBLIC.public_bytes_raw().hex()},
)
MEMBERS = sorted(patients(2))
COHORT: tuple[Kind, dict[str, object]] = (
    "cohort",
    {"cohort": cohort_digest(MEMBERS), "patients": MEMBERS},
)
CHARGE: tuple[Kind, dict[str, object]] = (
    "charge",
    {
        "study": STUDY,
        "purpose": "training",
        "round": 0,
        "model": "silo-local",
        "event": PrivacyEvent(0.1, 1.0, 5).to_dict(),
        "clip_norm": 1.0,
        "delta": 1e-3,
        "cohort": cohort_digest(MEMBERS),
    },
)


def fate(kind: Kind, charge_: Entry, **more: object) -> tuple[Kind, dict[str, object]]:
    return kind, {"charge": charge_.sequence, "charge_hash": charge_.hash, **more}


def with_fates(*fates: tuple[Kind, dict[str, object]]) -> list[Entry]:
    entries = chain(OPENED, COHORT, CHARGE)
    for kind, more in fates:
        entries.append(
            sign_entry(
                KEY,
                sequence=len(entries),
                previous=entries[-1].hash,
                site="north",
                kind=kind,
                body=fate(kind, entries[2], **more)[1],
            )
        )
    return entries


RELEASED: tuple[Kind, dict[str, object]] = ("released", {"update": "e" * 64})
VOIDED: tuple[Kind, dict[str, object]] = ("voided", {"reason": "died"})


@pytest.mark.parametrize(
    ("entries", "position"),
    [
        (chain(COHORT), 0),
        (chain(OPENED, OPENED), 1),
        (chain(OPENED, COHORT, COHORT), 2),
        (chain(OPENED, CHARGE), 1),
        (chain(OPENED, COHORT, CHARGE, CHARGE), 3),
        (with_fates(RELEASED, VOIDED), 4),
        (with_fates(VOIDED, RELEASED), 4),
        (with_fates(RELEASED, ("released", {"update": "f" * 64})), 4),
        (with_fates(("voided", {"reason": "died", "charge": 1})), 3),
        (with_fates(("released", {"update": "e" * 64, "charge_hash": "0" * 64})), 3),
    ],
    ids=[
        "not opened",
        "opened twice",
        "cohort twice",
        "unknown cohort",
        "charged twice",
        "voided after release",
        "released after voiding",
        "two updates for one charge",
        "fate of what is no charge",
        "fate of another charge",
    ],
)
def test_a_rule_broken_by_the_site_itself_is_found(entries: list[Entry], position: int) -> None:
    assert broken_at(verify_entries(entries, PUBLIC)) == (position, "rule")


def test_an_entry_of_another_site_is_found() -> None:
    entries = chain(OPENED, COHORT)
    entries.append(
        sign_entry(
            KEY, sequence=2, previous=entries[1].hash, site="south", kind="charge", body=CHARGE[1]
        )
    )
    assert broken_at(verify_entries(entries, PUBLIC)) == (2, "rule")


def test_a_voided_round_may_be_charged_again() -> None:
    entries = with_fates(VOIDED)
    entries.append(
        sign_entry(
            KEY, sequence=4, previous=entries[3].hash, site="north", kind="charge", body=CHARGE[1]
        )
    )
    found = verify_entries(entries, PUBLIC)
    assert found.ok
    assert found.state.events_of(MEMBERS[0]) == (PrivacyEvent(0.1, 1.0, 5),)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b'{"content":{},"hash":"","signature":""}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"content":{"format":"consilium/ledger/v2"}}',
        b'{"a":1e999}',
        b"9" * 10_000,
    ],
)
def test_what_is_no_entry_at_all_is_malformed(line: bytes) -> None:
    assert broken_at(verify_lines([line], PUBLIC)) == (0, "form")


def test_the_database_verifies_like_its_export(tmp_path: Path) -> None:
    with small_ledger(tmp_path / "ledger.db") as ledger:
        head = ledger.head
        assert verify_file(tmp_path / "ledger.db", PUBLIC, expected_head=head).ok
    assert verify_file(tmp_path / "ledger.db", PUBLIC, expected_head=head).ok
    assert not verify_file(
        tmp_path / "ledger.db", PUBLIC, expected_head=Head(head.sequence + 1, head.hash)
    ).ok


def test_a_flipped_byte_of_the_database_never_changes_what_it_says_unnoticed(
    tmp_path: Path,
) -> None:
    with small_ledger(tmp_path / "ledger.db") as ledger:
        said = [entry.line() for entry in ledger.entries()]
        head = ledger.head
    content = (tmp_path / "ledger.db").read_bytes()
    file = tmp_path / "changed.db"
    found = 0
    for position in range(0, len(content), 53):
        for side in tmp_path.glob("changed.db*"):
            side.unlink()
        file.write_bytes(
            content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]
        )
        try:
            result = verify_file(file, PUBLIC, expected_head=head)
        except ConsiliumError as error:
            assert error.code in ("privacy.ledger-corrupt", "privacy.ledger-read")
            found += 1
            continue
        if result.ok:
            copy = tmp_path / "copy.jsonl"
            with Ledger.open(file) as ledger:
                ledger.export_jsonl(copy)
            assert split(copy.read_bytes()) == said
        else:
            found += 1
    assert found > 20


@pytest.mark.parametrize(
    "text", ["", "7", "x:" + "0" * 64, "7:0", "-1:" + "0" * 64, "7:" + "G" * 64]
)
def test_a_head_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        Head.parse(text)
    assert caught.value.code == "usage.head"


def test_a_head_survives_writing_and_reading() -> None:
    head = Head(12, "ab" * 32)
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"steps":20', b'"steps": 20'),
        (b'"steps":20', b'"steps":20,"steps":20'),
        (b'"steps":20', b'"steps":2e1'),
        (b'"clip_norm":1.0', b'"clip_norm":1.00'),
        (b'"clip_norm":1.0', b'"clip_norm":1'),
        (b'"site":"north"', b'"site":"\\u006eorth"'),
        (b'{"content"', b'{"comment":"","content"'),
        (b'"sequence":3', b'"sequence":3.0'),
    ],
)
def test_another_spelling_of_the_same_values_is_not_the_entry(
    exported: bytes, old: bytes, new: bytes
) -> None:
    lines = split(exported)
    assert old in lines[3]
    lines[3] = lines[3].replace(old, new, 1)
    position, code = broken_at(verify_lines(lines, PUBLIC))
    assert position == 3
    assert code in ("form", "hash")
