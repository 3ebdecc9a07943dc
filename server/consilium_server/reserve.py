"""A file that only takes up room: given up when the disk is full, so that this can be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

#: Enough for the registry to go on writing for hours.
RESERVE_BYTES: Final = 8 * 2**20


class Reserve:
    """Room on the aggregator's disk that is kept for a bad day.

    Parameters
    ----------
    run : Path
        The folder it lies in, on the disk of the registry.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "reserve"

    def keep(self) -> None:
        """Make it where it is missing and there is room for it three times over."""
        if self._path.exists():
            return
        if shutil.disk_usage(self._path.parent).free < 3 * RESERVE_BYTES:
            return
        try:
            with self._path.open("wb") as file:
                # Really taken: a file of holes would reserve nothing.
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self.give_up()  # somebody else was faster; there is no reserve then

    def give_up(self) -> bool:
        """Give its room to others; returns whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
