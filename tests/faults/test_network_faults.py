"""A slow line, a lossy one, a cut one, another address: a study goes on, and nothing counts twice.

The site is in a network namespace of its own; what lies between it and the aggregator is
`network.Line`. CONSILIUM_LONG_FAULTS=1 makes a partition last ten minutes in place of 20 seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from federation import (
    PRIVATE,
    Federation,
    Running,
    Site,
    add_hospitals,
    consilium,
    small_study,
    wait_for,
)
from network import Line, Weather, missing

from consilium_common.demo.hospitals import NAMES
from consilium_common.wire.methods import CHUNK_BYTES

LONG = os.environ.get("CONSILIUM_LONG_FAULTS") == "1"
PARTITION_SECONDS = 600.0 if LONG else 20.0
#: The site on the line, and one beside the aggregator.
FAR, NEAR = NAMES[0], NAMES[1]
#: Bytes per second from the site, and how much of its update has come when the line is cut.
UPLOAD, CUT_AFTER = 400_000.0, 4 * CHUNK_BYTES

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800 if LONG else 900),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


class OverLine(Federation):
    """Its aggregator listens on the line's end here; one hospital is at the other end."""

    def __init__(self, folder: Path, line: Line) -> None:
        super().__init__(folder)
        self.line = line
        self.address = f"{line.here}:{self.port}"

    def start(self) -> None:
        self.running = Running(
            ["server", "start", "--home", self.home, "--host", self.line.here],
            self.folder / "aggregator.log",
        )
        self.running.wait_until_says("listens on")

    def join(self, name: str) -> Site:
        site = super().join(name)
        if name == FAR:
            site.prefix = self.line.prefix
        return site

    def begin(self, study: dict[str, Any]) -> str:
        """Propose, have both hospitals approve and run a study."""
        digest = self.propose(study)
        self.approve(digest, FAR, NEAR)
        self.study("run", digest).data  # noqa: B018
        return digest

    def address_of(self, name: str) -> str:
        (row,) = [row for row in self.server("sites").data["sites"] if row["name"] == name]
        return str(row["address"])


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverLine]:
    with Line() as line, OverLine(tmp_path_factory.mktemp("line"), line) as running:
        add_hospitals(running, (FAR, NEAR))
        yield running


@pytest.fixture(autouse=True)
def _fair_weather(consortium: OverLine) -> Iterator[None]:
    """Leave the line as it was found, and the site connected."""
    yield
    consortium.line.weather = Weather()


def study(name: str, *, rounds: int = 2, quorum: int = 2, **parts: Any) -> dict[str, Any]:
    federation = {"rounds": rounds, "quorum": quorum, "deadline_seconds": 90.0}
    return small_study(name, **parts, federation=federation)


def heavy(name: str, *, quorum: int) -> dict[str, Any]:
    """Return a private study whose update has 3.5 MB: several pieces, and seconds to send."""
    model = {"arguments": {"channels": [8, 16, 128, 192], "strides": [2, 2, 1]}}
    return study(name, quorum=quorum, model=model, **PRIVATE)


def counted(consortium: OverLine, digest: str) -> list[tuple[str, int, str]]:
    """Return what the aggregator took of the far site: purpose, round, SHA-256."""
    with sqlite3.connect(f"file:{consortium.home / 'registry.db'}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT purpose, round, sha256 FROM received WHERE study = ? AND site = ? ORDER BY id",
            (digest, FAR),
        ).fetchall()
    return [(purpose, number, sha256) for purpose, number, sha256 in rows]


def received_bytes(consortium: OverLine, digest: str) -> int:
    """Return the size of the far site's first update."""
    with sqlite3.connect(f"file:{consortium.home / 'registry.db'}?mode=ro", uri=True) as database:
        (size,) = database.execute(
            "SELECT bytes FROM received WHERE study = ? AND site = ? ORDER BY id", (digest, FAR)
        ).fetchone()
    return int(size)


def come(consortium: OverLine, digest: str) -> int:
    """Return how many bytes of the far site's update are on the aggregator's disk, not all yet."""
    folder = consortium.home / "studies" / digest[:16] / "in" / FAR
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.glob("*.part"))
    return 0


def check_once(consortium: OverLine, found: dict[str, Any], out: Path) -> None:
    """Check that every update was charged, released, receipted and counted once, the same one."""
    digest = found["digest"]
    took_part = [row["number"] for row in found["rounds"] if FAR in row["sites"]]
    for row in found["rounds"]:
        assert len(set(row["sites"])) == len(row["sites"])
    received = counted(consortium, digest)
    assert [(purpose, number) for purpose, number, _ in received] == [
        ("training", number) for number in took_part
    ]
    site = consortium.sites[FAR]
    assert site("evidence", out).data["site"] == FAR
    receipts = [
        row["release"]
        for row in map(json.loads, (out / "receipts.jsonl").read_text().splitlines())
        if row["release"]["study"] == digest
    ]
    by_round = {row["round"]: row["sha256"] for row in receipts}
    assert len(by_round) == len(receipts)  # one receipt a round
    for _, number, sha256 in received:
        assert by_round[number] == sha256
    # The ledger has released exactly what has a receipt; whatever was voided never left.
    key = out / "ledger-public.pem"
    verified = consilium("audit", "verify", out / "ledger.jsonl", "--key", key)
    (report,) = verified.data["ledgers"]
    (cost,) = [one for one in report["studies"] if one["study"] == digest]
    assert cost["released"] == len(receipts)
    assert found["alarms"] == []
    assert hashlib.sha256((out / "studies" / f"{digest}.json").read_bytes()).hexdigest() == digest


def test_a_study_finishes_over_a_line_of_200_ms_that_loses_every_twentieth_packet(
    consortium: OverLine, tmp_path: Path
) -> None:
    consortium.line.weather = Weather(delay=0.1, loss=0.05)
    begin = time.monotonic()
    digest = consortium.begin(study("slow-line", **PRIVATE))
    found = consortium.study("watch", digest, timeout=300).data
    assert found["state"] == "finished"
    assert [row["sites"] for row in found["rounds"]] == [sorted((FAR, NEAR))] * 2
    print(f"two rounds at 200 ms and 5 % loss: {time.monotonic() - begin:.1f} s")
    check_once(consortium, found, tmp_path / "evidence")


@pytest.mark.parametrize("quorum", [2, 1])
def test_a_partition_in_mid_upload_makes_nothing_count_twice(
    consortium: OverLine, tmp_path: Path, quorum: int
) -> None:
    line = consortium.line
    far = consortium.sites[FAR]
    assert far.running is not None
    line.weather = Weather(upload=UPLOAD)
    digest = consortium.begin(heavy(f"partition-{quorum}", quorum=quorum))
    wait_for(lambda: come(consortium, digest) >= CUT_AFTER, "the upload", timeout=150, pause=0.01)
    line.weather = Weather(upload=UPLOAD, cut=True)
    cut_at = time.monotonic()
    assert consortium.show(digest)["rounds"] == []
    assert counted(consortium, digest) == []
    if quorum == 1:
        # The round goes on without the site that fell silent.
        found = consortium.wait_until(digest, lambda d: bool(d["rounds"]), "a round", timeout=200)
        assert found["rounds"][0]["sites"] == [NEAR]
        assert FAR in found["rounds"][0]["dropped"]
    time.sleep(max(0.0, PARTITION_SECONDS - (time.monotonic() - cut_at)))
    said = len(far.running.output)
    held, before = come(consortium, digest), line.sent
    line.weather = Weather()
    mended_at = time.monotonic()
    if quorum == 2:
        # What had come is not sent again.
        wait_for(lambda: counted(consortium, digest), "the update", timeout=120, pause=0.02)
        sent, whole = line.sent - before, received_bytes(consortium, digest)
        print(f"of {whole} bytes {held} had come; sent after the cut: {sent}")
        assert CUT_AFTER <= held < whole
        assert sent < 1.1 * (whole - held) + 200_000 < whole
    wait_for(lambda: _online(consortium, FAR), "the site to be back", timeout=120)
    print(f"partition of {time.monotonic() - cut_at:.0f} s with quorum {quorum}: online again"
          f" {time.monotonic() - mended_at:.1f} s after the line was")  # fmt: skip
    # However long the partition was, the study goes on by itself: nobody runs it again.
    found = consortium.show(digest)
    assert found["state"] not in ("failed", "stopped"), found["reason"]
    found = consortium.study("watch", digest, timeout=300).data
    assert found["state"] == "finished", far.running.output[said:]
    assert [row["number"] for row in found["rounds"]] == [0, 1]
    if quorum == 2:
        assert [row["sites"] for row in found["rounds"]] == [sorted((FAR, NEAR))] * 2
    check_once(consortium, found, tmp_path / "evidence")
    if quorum == 1:
        # The site that missed rounds takes part in the next study as if nothing had been.
        after = consortium.begin(study("after-partition", rounds=1, **PRIVATE))
        later = consortium.study("watch", after, timeout=200).data
        assert [row["sites"] for row in later["rounds"]] == [sorted((FAR, NEAR))]
        check_once(consortium, later, tmp_path / "later")


def test_a_site_goes_on_under_another_address(consortium: OverLine, tmp_path: Path) -> None:
    line = consortium.line
    digest = consortium.begin(study("new-address", rounds=3, **PRIVATE))
    consortium.wait_until(digest, lambda data: bool(data["rounds"]), "the first round")
    assert consortium.address_of(FAR) == line.there
    line.move(77)
    moved_at = time.monotonic()
    wait_for(lambda: consortium.address_of(FAR) == line.there, "the new address", timeout=120)
    print(f"seen under the new address after {time.monotonic() - moved_at:.1f} s")
    found = consortium.study("watch", digest, timeout=300).data
    assert found["state"] == "finished"
    assert [row["number"] for row in found["rounds"]] == [0, 1, 2]
    check_once(consortium, found, tmp_path / "evidence")
    # And the site is whole: it takes part in what comes next.
    after = consortium.begin(study("after-move", rounds=1, **PRIVATE))
    later = consortium.study("watch", after, timeout=200).data
    assert [row["sites"] for row in later["rounds"]] == [sorted((FAR, NEAR))]


def _online(consortium: OverLine, name: str) -> bool:
    rows = consortium.server("sites").data["sites"]
    return any(row["name"] == name and row["online"] for row in rows)
