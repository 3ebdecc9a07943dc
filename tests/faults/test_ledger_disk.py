"""A disk that is full or that lies: training is refused with a clear error, and nothing is lost."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file
from consilium_common.privacy.events import PrivacyEvent

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PATIENTS = [f"{index:032x}" for index in range(50)]
PAGE = 4096

#: Fills a file system of its own, makes room, and goes on; prints what it was told.
WRITER = """
import shutil, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.verify import verify_file
from consilium_common.privacy.events import PrivacyEvent

disk, out = Path(sys.argv[1]), Path(sys.argv[2])
key = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
filler = disk / "filler"
filler.write_bytes(b"0" * 400_000)

def charge(ledger, index):
    return ledger.charge(
        study="a" * 64, round_index=index, event=PrivacyEvent(0.1, 2.0, 20), clip_norm=1.0,
        delta=1e-3, patients=[f"{i:032x}" for i in range(50)],
    )

acknowledged = 0
with Ledger.open(disk / "ledger.db", key, site="north") as ledger:
    for _ in range(3):  # asked again while it is full it refuses again
        try:
            while True:
                charge(ledger, acknowledged)
                acknowledged += 1
        except ConsiliumError as error:
            print(error.code)
            assert "Nothing was lost" in error.message, error.message
            assert "Free space" in error.hint, error.hint
    full = verify_file(disk / "ledger.db", key.public_key())
    assert full.ok and len(full.state.standing()) == acknowledged, full
    try:
        Ledger.open(disk / "second.db", key, site="north").close()
    except ConsiliumError as error:
        print("second", error.code)
    filler.unlink()
    charge(ledger, acknowledged)
    acknowledged += 1
    ledger.export_jsonl(disk / "ledger.jsonl")
shutil.copy(disk / "ledger.jsonl", out)
print(acknowledged)
"""


def own_file_system(size: str) -> list[str]:
    """Return the beginning of a command that runs with a small file system at its first word."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "$1" && shift && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]


def test_a_file_system_that_is_full_refuses_charges_and_loses_none(tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out.jsonl"
    disk.mkdir()
    begin = [*own_file_system("700k"), str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*begin, "true"], check=False).returncode:
        pytest.skip("this system does not let a test mount a file system of its own")
    done = subprocess.run(
        [*begin, sys.executable, "-c", WRITER, str(disk), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *codes, second, second_code, acknowledged = done.stdout.split()
    assert codes == ["privacy.ledger-write"] * 3
    assert (second, second_code) == ("second", "privacy.ledger-write")
    found = verify_file(out, KEY.public_key())
    assert found.ok
    assert int(acknowledged) > 20
    assert {c.round_index for c in found.state.standing()} == set(range(int(acknowledged)))


def charge(ledger: Ledger, index: int) -> None:
    ledger.charge(
        study="a" * 64,
        round_index=index,
        event=PrivacyEvent(0.1, 2.0, 20),
        clip_norm=1.0,
        delta=1e-3,
        patients=PATIENTS,
    )


def test_a_page_that_went_bad_is_never_built_upon(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.open(path, KEY, site="north") as ledger:
        for index in range(40):
            charge(ledger, index)
        head = ledger.head
    sound = path.read_bytes()
    pages = len(sound) // PAGE
    assert pages > 8
    chance = random.Random(11)
    refused = 0
    for page in range(pages):
        start = page * PAGE
        swapped = (page + 1) % pages * PAGE
        for bad in (bytes(PAGE), chance.randbytes(PAGE), sound[swapped : swapped + PAGE]):
            copy = tmp_path / "copy.db"
            for side in tmp_path.glob("copy.db*"):
                side.unlink()
            damaged = sound[:start] + bad + sound[start + PAGE :]
            copy.write_bytes(damaged)
            try:
                with Ledger.open(copy, KEY, site="north") as ledger:
                    assert ledger.head == head  # the page held nothing
            except ConsiliumError as error:
                assert error.code == "privacy.ledger-corrupt", (page, error)
                assert error.hint
                refused += 1
                # What is damaged is kept as it is, for whoever restores it.
                assert copy.read_bytes() == damaged, page
    assert refused > 2 * pages
    path.write_bytes(sound)
    with Ledger.open(path, KEY, site="north") as ledger:
        charge(ledger, 40)
    assert verify_file(path, KEY.public_key(), expected_head=head).ok
