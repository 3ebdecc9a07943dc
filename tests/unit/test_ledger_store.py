"""What a ledger promises: durable, once per round, append-only, shared, and it loses nothing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import (
    EVENT,
    KEY,
    OTHER_STUDY,
    STUDY,
    charge,
    open_ledger,
    patients,
    small_ledger,
)

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file

PUBLIC = KEY.public_key()
SAMPLES = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def refused(code: str) -> Any:
    return pytest.raises(ConsiliumError, match=code.replace(".", r"\."))


def test_a_charge_is_found_again_with_its_fate(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert ledger.find_charge(STUDY, 0) is None
        entry = charge(ledger)
        found = ledger.find_charge(STUDY, 0)
        assert found is not None
        assert (found.state, found.entry, found.event) == ("open", entry, EVENT)
        ledger.release(entry, "c" * 64)
    with Ledger.open(path, site="north") as ledger:
        found = ledger.find_charge(STUDY, 0)
        assert found is not None
        assert (found.state, found.update) == ("released", "c" * 64)


def test_a_round_is_charged_once_while_its_charge_stands(path: Path) -> None:
    with open_ledger(path) as ledger:
        entry = charge(ledger)
        with refused("privacy.already-charged"):
            charge(ledger)
        ledger.release(entry, "c" * 64)
        with refused("privacy.already-charged"):
            charge(ledger)
        charge(ledger, 1)
        charge(ledger, 0, study=OTHER_STUDY)
        assert len(ledger.state.charges) == 3


def test_a_voided_charge_counts_nothing_and_makes_room(path: Path) -> None:
    with open_ledger(path) as ledger:
        entry = charge(ledger)
        voided = ledger.void(entry, "killed")
        assert ledger.void(entry, "asked again") == voided
        assert ledger.events_of(patients(1)[0]) == ()
        assert ledger.spent(1e-3).most == 0
        with refused("privacy.charge-voided"):
            ledger.release(entry, "c" * 64)
        again = charge(ledger)
        assert again.sequence > entry.sequence
        assert ledger.events_of(patients(1)[0]) == (EVENT,)


def test_a_released_charge_stands_for_ever_with_one_update(path: Path) -> None:
    with open_ledger(path) as ledger:
        entry = charge(ledger)
        released = ledger.release(entry, "c" * 64)
        assert ledger.release(entry, "c" * 64) == released
        head = ledger.head
        with refused("privacy.already-released"):
            ledger.release(entry, "d" * 64)
        with refused("privacy.charge-released"):
            ledger.void(entry, "please")
        assert ledger.head == head
        assert ledger.events_of(patients(1)[0]) == (EVENT,)


def test_a_charge_of_another_ledger_has_no_fate_here(path: Path, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "other.db") as other:
        foreign = charge(other, 5)
    with open_ledger(path) as ledger:
        charge(ledger)
        with refused("privacy.unknown-charge"):
            ledger.release(foreign, "c" * 64)


def test_a_cohort_is_recorded_once_whatever_its_order(path: Path) -> None:
    with open_ledger(path) as ledger:
        members = patients(5)
        charge(ledger, 0, members=members)
        charge(ledger, 1, members=[*reversed(members), members[0]])
        charge(ledger, 2, members=members[:4])
        kinds = [entry.kind for entry in ledger.entries()]
    assert kinds == ["opened", "cohort", "charge", "charge", "cohort", "charge"]


@pytest.mark.parametrize(
    "change",
    [
        {"members": []},
        {"members": ["Jane Doe"]},
        {"study": "not a digest"},
        {"round_index": -1},
    ],
)
def test_a_charge_that_names_no_proper_thing_is_refused_without_quoting_it(
    path: Path, change: dict[str, object]
) -> None:
    with open_ledger(path) as ledger:
        with refused("privacy.charge-invalid") as caught:
            charge(ledger, **change)  # type: ignore[arg-type]
        assert "Jane" not in str(caught.value)
        assert ledger.head.sequence == 0


def test_the_policy_is_recorded_when_it_changes_and_only_then(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert ledger.record_policy({"epsilon": 1.0}) is not None
        assert ledger.record_policy({"epsilon": 1.0}) is None
        assert ledger.record_policy({"epsilon": 2.0}) is not None
        assert ledger.state.policy == {"epsilon": 2.0}


def test_a_guard_that_refuses_leaves_no_trace(path: Path) -> None:
    seen: list[int] = []

    def guard(state: LedgerState) -> None:
        seen.append(len(state.charges))
        raise ConsiliumError("privacy.budget", "no")

    with open_ledger(path) as ledger:
        charge(ledger)
        head = ledger.head
        with refused("privacy.budget"):
            ledger.charge(
                study=STUDY,
                round_index=1,
                event=EVENT,
                clip_norm=1.0,
                delta=1e-3,
                patients=patients(9),
                guard=guard,
            )
        assert ledger.head == head
        charge(ledger, 1)
    assert seen == [1]
    assert verify_file(path, PUBLIC).ok


def test_the_file_belongs_to_its_owner_alone(path: Path) -> None:
    with open_ledger(path) as ledger:
        charge(ledger)
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.glob("ledger.db*")}
    assert set(modes.values()) == {0o600}
    assert "ledger.db-wal" in modes


def test_every_commit_is_synchronous(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET line = x'00' WHERE sequence = 1",
        "DELETE FROM entry WHERE sequence = 1",
        "DELETE FROM entry",
        "INSERT OR REPLACE INTO entry VALUES (1, x'00')",
        "INSERT INTO entry VALUES (99, x'00')",
    ],
)
def test_the_database_itself_refuses_to_forget(path: Path, statement: str) -> None:
    small_ledger(path).close()
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    db.close()
    assert verify_file(path, PUBLIC).ok


def test_reading_needs_no_key_and_changes_nothing(path: Path) -> None:
    small_ledger(path).close()
    before = path.read_bytes()
    with Ledger.open(path) as ledger:
        assert ledger.site == "north"
        with refused("privacy.ledger-read-only"):
            charge(ledger, 7)
    assert path.read_bytes() == before


def test_a_copy_in_a_read_only_folder_can_be_read(path: Path) -> None:
    small_ledger(path).close()
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        with Ledger.open(path) as ledger:
            assert ledger.head.sequence == 7
    finally:
        path.parent.chmod(0o700)


def test_a_reader_sees_what_a_writer_appends(path: Path) -> None:
    with open_ledger(path) as writer, Ledger.open(path) as reader:
        for index in range(3):
            charge(writer, index)
            assert reader.find_charge(STUDY, index) is not None
        assert reader.head == writer.head


def test_the_wrong_ledger_is_not_used(path: Path) -> None:
    small_ledger(path).close()
    with refused("privacy.ledger-site"):
        open_ledger(path, site="south")
    with refused("privacy.ledger-key"):
        Ledger.open(path, Ed25519PrivateKey.generate(), site="north")
    with refused("privacy.no-ledger"):
        Ledger.open(path.with_name("missing.db"), site="north")
    with refused("usage.site"):
        Ledger.open(path, KEY)
    assert verify_file(path, PUBLIC).ok


def damage(path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    for trigger in ("entry_no_update", "entry_no_delete", "entry_in_order"):
        db.execute(f"DROP TRIGGER {trigger}")
    db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET line = CAST(replace(CAST(line AS TEXT), '\"steps\":20', '\"steps\":10')"
        " AS BLOB)",
        "DELETE FROM entry WHERE sequence = 3",
        "DELETE FROM entry",
        "UPDATE entry SET line = 'text' WHERE sequence = 2",
        "UPDATE entry SET line = 7 WHERE sequence = 2",
    ],
)
def test_a_ledger_changed_behind_its_back_refuses_training(path: Path, statement: str) -> None:
    small_ledger(path).close()
    damage(path, statement)
    if statement == "DELETE FROM entry":
        with refused("privacy.ledger-corrupt"):
            Ledger.open(path)
        return
    for signer in (None, KEY):
        with refused("privacy.ledger-corrupt"):
            Ledger.open(path, signer, site="north")


def test_a_ledger_cut_while_it_is_open_refuses_to_go_on(path: Path) -> None:
    with small_ledger(path) as ledger:
        damage(path, "DELETE FROM entry WHERE sequence > 4")
        for _ in range(2):
            with refused("privacy.ledger-corrupt"):
                charge(ledger, 9)


@pytest.mark.parametrize("content", [b"not a database at all, but text" * 40, b"\0" * 8192])
def test_a_file_that_is_no_ledger_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with refused("privacy.ledger-corrupt"):
        open_ledger(path)
    assert path.read_bytes() == content


def test_another_program_s_database_is_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE patients (name TEXT)")
    db.close()
    with refused("privacy.ledger-corrupt"):
        open_ledger(path)


def test_a_torn_file_is_told_from_a_sound_one(path: Path) -> None:
    with open_ledger(path) as ledger:
        for index in range(40):
            charge(ledger, index)
    path.write_bytes(path.read_bytes()[:-9000])
    with refused("privacy.ledger-corrupt"):
        open_ledger(path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from typing import Any
from ledger_samples import charge, open_ledger
from consilium_common.errors import ConsiliumError

path = Path(sys.argv[1])
acknowledged = 0
with open_ledger(path) as ledger:
    # The system refuses writes past this size, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (96_000, resource.RLIM_INFINITY))
    try:
        while True:
            charge(ledger, acknowledged)
            acknowledged += 1
    except ConsiliumError as error:
        print(error.code, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    charge(ledger, acknowledged)  # space was made: the same object goes on
    print(acknowledged + 1)
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=SAMPLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_a_clear_error_and_loses_nothing(path: Path) -> None:
    process = child(FULL_DISK, path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    code, rounds = out.split()
    assert code == "privacy.ledger-write"
    assert int(rounds) > 10
    found = verify_file(path, PUBLIC)
    assert found.ok
    assert {c.round_index for c in found.state.standing()} == set(range(int(rounds)))


MANY = """
import sys
from pathlib import Path
from typing import Any
from ledger_samples import OTHER_STUDY, charge, open_ledger
from consilium_common.errors import ConsiliumError

path, worker = Path(sys.argv[1]), int(sys.argv[2])
won = 0
with open_ledger(path) as ledger:
    for index in range(20):
        charge(ledger, 100 * worker + index)
        try:
            charge(ledger, index, study=OTHER_STUDY)
            won += 1
        except ConsiliumError as error:
            assert error.code == "privacy.already-charged"
print(won)
"""


def test_processes_share_one_ledger_and_charge_each_round_once(path: Path) -> None:
    workers = [child(MANY, path, worker) for worker in range(3)]
    won = 0
    for worker in workers:
        out, err = worker.communicate(timeout=90)
        assert worker.returncode == 0, err
        won += int(out)
    found = verify_file(path, PUBLIC)
    assert found.ok
    assert won == 20
    assert len(found.state.standing()) == 60 + 20


def test_threads_share_one_ledger(path: Path) -> None:
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for index in range(10):
                charge(ledger, 100 * worker + index)
        except BaseException as error:
            errors.append(error)

    with open_ledger(path) as ledger:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(verify_file(path, PUBLIC).state.standing()) == 40


def test_a_forked_child_must_open_its_own(path: Path) -> None:
    with open_ledger(path) as ledger:
        process = os.fork()
        if process == 0:
            code = "none"
            try:
                ledger.find_charge(STUDY, 0)
            except ConsiliumError as error:
                code = error.code
            os._exit(0 if code == "internal.ledger-fork" else 1)
        assert os.waitpid(process, 0)[1] == 0
        charge(ledger)
