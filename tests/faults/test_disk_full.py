"""The aggregator's disk fills up: the study pauses and says why, and goes on when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import Federation, add_hospitals, small_study

from consilium_common.demo.hospitals import NAMES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB, where this machine lets us have one."""
    folder = tmp_path / "aggregator"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_study_pauses_while_the_disk_is_full_and_goes_on_by_itself(small_disk: Path) -> None:
    with Federation(small_disk.parent) as federation:
        add_hospitals(federation, NAMES[:1], NAMES[:1])
        digest = federation.propose(
            small_study(
                "cramped",
                training={"steps_per_round": 40},
                federation={"rounds": 6, "quorum": 1},
            )
        )
        federation.approve(digest, NAMES[0])
        federation.study("run", digest).data  # noqa: B018
        before = federation.wait_until(digest, lambda data: len(data["rounds"]) >= 1, "a round")
        reserve = federation.home / "run" / "reserve"
        assert reserve.is_file()
        ballast = small_disk / "ballast"
        _fill(ballast)
        paused = federation.wait_until(
            digest, lambda data: data["state"] == "paused", "the pause", timeout=150
        )
        assert "no room" in paused["reason"]
        assert "by itself" in paused["reason"]
        ballast.unlink()
        after = federation.study("watch", digest, timeout=200).data
        assert after["state"] == "finished"
        assert [row["number"] for row in after["rounds"]] == list(range(6))
        assert after["rounds"][: len(before["rounds"])] == before["rounds"]
        said = [row["why"] for row in federation.study("log", digest).data["history"]]
        assert "there is room on the disk again" in said
        assert reserve.is_file(), "it is kept again for the next time"


def _fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
