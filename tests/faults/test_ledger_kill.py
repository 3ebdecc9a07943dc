"""A ledger whose writer is killed at any moment verifies and has every acknowledged charge."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
STUDY = "a" * 64

#: Charges, releases and voids as fast as it can, and says so only after each call returned.
WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.events import PrivacyEvent

key = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
with Ledger.open(Path(sys.argv[1]), key, site="north") as ledger:
    index = int(sys.argv[2])
    while True:
        entry = ledger.charge(
            study="a" * 64, round_index=index, event=PrivacyEvent(0.1, 2.0, 20), clip_norm=1.0,
            delta=1e-3, patients=[f"{i:032x}" for i in range(50 + index % 2)],
        )
        print("charged", index, flush=True)
        if index % 3 == 0:
            ledger.release(entry, f"{index:064x}")
            print("released", index, flush=True)
        elif index % 3 == 1:
            ledger.void(entry, "test")
            print("voided", index, flush=True)
        index += 1
"""

KILLS = 15


def run_and_kill(path: Path, first: int, delay: float) -> dict[int, str]:
    """Kill a writer ``delay`` seconds after its first word; return its last word on each round."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    guard = threading.Timer(60, process.kill)  # a writer that never speaks ends the test
    guard.start()
    try:
        said = [process.stdout.readline()]
        threading.Timer(delay, process.send_signal, [signal.SIGKILL]).start()
        said += process.stdout.readlines()
        assert process.wait() == -signal.SIGKILL
    finally:
        guard.cancel()
        process.stdout.close()
    # A last line may have been cut; what was cut was not acknowledged.
    words = [line.split() for line in said if line.endswith("\n")]
    return {int(index): kind for kind, index in words}


def test_a_writer_killed_again_and_again_loses_no_acknowledged_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    chance = random.Random(20240607)
    fate = {"charged": "open", "released": "released", "voided": "voided"}
    settled: dict[int, str] = {}  # what the ledger said of each round after earlier kills
    first = 0
    head = None
    for _ in range(KILLS):
        said = run_and_kill(path, first, chance.uniform(0, 0.06))
        # As it lies there after the kill, with its write-ahead log: first for the auditor, ...
        found = verify_file(path, KEY.public_key(), expected_head=head)
        assert found.problem is None
        states = {c.round_index: str(c.state) for c in found.state.charges.values()}
        last = max(said)
        for index, kind in said.items():
            # Only the last one may have got further than it could say.
            assert states[index] == fate[kind] or (index == last and kind == "charged")
        # At most one charge more than was acknowledged, and none from before was changed.
        assert set(states) - set(settled) - set(said) <= {last + 1}
        assert {index: states[index] for index in settled} == settled
        settled = states
        # ... then for the site, which goes on where it was.
        with Ledger.open(path, KEY, site="north") as ledger:
            head = ledger.head
            assert head == found.head
            first = max(states) + 1
    assert len(settled) > KILLS
    with Ledger.open(path) as ledger:
        assert ledger.find_charge(STUDY, 0) is not None
        ledger.export_jsonl(tmp_path / "ledger.jsonl")
    assert verify_file(tmp_path / "ledger.jsonl", KEY.public_key(), expected_head=head).ok


def test_a_writer_killed_while_it_makes_the_file_leaves_one_that_can_be_used(
    tmp_path: Path,
) -> None:
    chance = random.Random(7)
    for attempt in range(5):
        path = tmp_path / f"{attempt}.db"
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), "0"], stdout=subprocess.DEVNULL
        )
        # Wait for the file itself, then for a moment within its making.
        while not path.exists() and process.poll() is None:
            pass
        threading.Event().wait(chance.uniform(0, 0.01))
        process.kill()
        process.wait()
        with Ledger.open(path, KEY, site="north") as ledger:
            assert ledger.head.sequence >= 0
        assert verify_file(path, KEY.public_key()).ok


#: Keeps a witness record of each entry of a ledger as fast as it can, and says so after each.
WITNESS = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.witness import WitnessRecord
from consilium_common.wire.statements import sign

key = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
time = "2031-05-06T07:08:09.000000Z"
with Ledger.open(Path(sys.argv[1]), key, site="north") as ledger:
    while True:
        last = ledger.witnessed
        for entry in ledger.from_entry(0 if last is None else last.sequence + 1, 3):
            unsigned = WitnessRecord("north", entry.head, time, "")
            record = WitnessRecord("north", entry.head, time, sign(key, unsigned.statement()))
            ledger.add_witness([record], key.public_key())
            print(entry.sequence, flush=True)
"""


def test_a_witnessing_killed_beside_a_writer_keeps_every_acknowledged_record(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    chance = random.Random(3)
    Ledger.open(path, KEY, site="north").close()
    witnessed = 0
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(10_000 * attempt)],
            stdout=subprocess.DEVNULL,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", WITNESS, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        guard = threading.Timer(60, process.kill)
        guard.start()
        try:
            said = [process.stdout.readline()]
            threading.Timer(chance.uniform(0.05, 0.2), process.kill).start()
            said += process.stdout.readlines()
            process.wait()
        finally:
            guard.cancel()
            writer.kill()
            writer.wait()
            process.stdout.close()
        last = max(int(line) for line in said if line.endswith("\n"))
        found = verify_file(path, KEY.public_key(), witness_key=KEY.public_key())
        assert found.problem is None
        # At most one record more than was acknowledged.
        assert found.witnessed in (last + 1, last + 2)
        assert found.witnessed > witnessed
        witnessed = found.witnessed
