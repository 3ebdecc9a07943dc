"""The aggregator's clock and a site's are set by an hour: no site is dropped, no round ends.

Only their processes have those clocks: a small library between them and the system adds the jump to
the time of day. Clocks that count seconds go on, as they do when a real one is set.
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
#: By how much the aggregator's is wrong, one after the other. Never behind: certificates just made
#: are not valid in the past, and it is jumps that are tested here.
JUMPS = (HOUR, 2 * HOUR, HOUR, 0)
#: By how much the site's is wrong then: ahead of the aggregator's by an hour, behind it by as much.
JUMPS_OF_SITE = (2 * HOUR, HOUR, 0, HOUR)
SITE = NAMES[0]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


class Clock:
    """A clock of all processes that are started with it."""

    def __init__(self, library: Path, file: Path, seconds: int) -> None:
        self.library = library
        self.file = file
        self.set(seconds)

    def of_what_starts(self, patch: pytest.MonkeyPatch) -> None:
        """Give it to the processes that are started from now on."""
        patch.setenv("LD_PRELOAD", str(self.library))
        patch.setenv("CLOCK_OFFSET", str(self.file))

    def set(self, seconds: int) -> None:
        """Let it be wrong by so much from now on, in the processes that run already."""
        with self.file.open("r+b" if self.file.exists() else "w+b") as stream:
            stream.write(struct.pack("q", seconds))


@pytest.fixture
def clocks(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Clock, Clock]]:
    """Start the aggregator and a site anew with clocks that can be set."""
    library, source = tmp_path / "clock.so", Path(__file__).with_name("clock.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    clock = Clock(library, tmp_path / "offset", JUMPS[0])
    of_site = Clock(library, tmp_path / "offset-of-site", JUMPS_OF_SITE[0])
    site = federation.sites[SITE]
    site.stop()
    federation.stop()
    with monkeypatch.context() as patch:
        clock.of_what_starts(patch)
        federation.start()
    with monkeypatch.context() as patch:
        of_site.of_what_starts(patch)
        site.start()
    yield clock, of_site
    # Whoever needs them next starts them anew, by the true time.
    site.stop()
    federation.stop()


def test_clocks_that_are_set_by_an_hour_drop_no_site_and_end_no_round(
    federation: Federation, clocks: tuple[Clock, Clock]
) -> None:
    clock, of_site = clocks
    study = small_study(
        "clock", training={"steps_per_round": 40}, federation={"rounds": 9, "quorum": 3}
    )
    digest = federation.propose(study)
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    for jump, jump_of_site in zip(JUMPS, JUMPS_OF_SITE, strict=True):
        clock.set(jump)
        of_site.set(jump_of_site)
        done = len(federation.show(digest)["rounds"])
        begun = time.monotonic()

        def on(data: dict[str, Any], least: int = done + 2) -> bool:
            return len(data["rounds"]) >= least

        federation.wait_until(digest, on, f"rounds at {jump:+d} s and {jump_of_site:+d} s")
        print(f"two rounds at {jump:+d} s, the site at {jump_of_site:+d} s:"
              f" {time.monotonic() - begun:.1f} s")  # fmt: skip
    found = federation.study("watch", digest).data
    assert found["state"] == "finished"
    assert [row["number"] for row in found["rounds"]] == list(range(9))
    assert all(row["sites"] == sorted(NAMES) for row in found["rounds"])
    assert all(row["dropped"] == {} for row in found["rounds"])
    assert found["alarms"] == []
