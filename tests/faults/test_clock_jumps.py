"""The aggregator's clock is set by an hour, forward and back: no site is dropped, no round ends.

Only the aggregator's processes have that clock: a small library between them and the system adds
the jump to the time of day. Clocks that count seconds go on, as they do when a real one is set.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import NAMES, Federation, small_study

HOUR = 3600
#: By how much it is wrong, one after the other. Never behind: certificates just made are not valid
#: in the past, and it is jumps that are tested here.
JUMPS = (HOUR, 2 * HOUR, HOUR, 0)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


class Clock:
    """The aggregator's clock."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "clock.so"
        self.file = folder / "offset"
        self.set(0)
        source = Path(__file__).with_name("clock.c")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", self.library, source, "-ldl"]
        subprocess.run(command, check=True)

    def set(self, seconds: int) -> None:
        """Let it be wrong by so much from now on, in the processes that run already."""
        with self.file.open("r+b" if self.file.exists() else "w+b") as stream:
            stream.write(struct.pack("q", seconds))


@pytest.fixture
def clock(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Clock]:
    """Start the aggregator anew with a clock that can be set."""
    clock = Clock(tmp_path)
    clock.set(JUMPS[0])
    federation.stop()
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(clock.library))
        patch.setenv("CLOCK_OFFSET", str(clock.file))
        federation.start()
    yield clock
    federation.stop()
    federation.start()


def test_a_clock_that_is_set_by_an_hour_drops_no_site_and_ends_no_round(
    federation: Federation, clock: Clock
) -> None:
    study = small_study(
        "clock", training={"steps_per_round": 40}, federation={"rounds": 9, "quorum": 3}
    )
    digest = federation.propose(study)
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    for jump in JUMPS:
        clock.set(jump)
        done = len(federation.show(digest)["rounds"])
        begun = time.monotonic()

        def on(data: dict[str, Any], least: int = done + 2) -> bool:
            return len(data["rounds"]) >= least

        federation.wait_until(digest, on, f"rounds at {jump:+d} s")
        print(f"two rounds at {jump:+d} s: {time.monotonic() - begun:.1f} s")
    found = federation.study("watch", digest).data
    assert found["state"] == "finished"
    assert [row["number"] for row in found["rounds"]] == list(range(9))
    assert all(row["sites"] == sorted(NAMES) for row in found["rounds"])
    assert all(row["dropped"] == {} for row in found["rounds"])
    assert found["alarms"] == []
