"""How many whole replies have come of each node: a counter that no clock can disturb."""

from __future__ import annotations

from pathlib import Path


class ArrivalCounts:
    """A file per node that grows by one byte with every whole reply.

    The gateway counts, the round loop compares. Times of files would be wrong when the clock is
    set, and equal for two replies in one tick of the file system.

    Parameters
    ----------
    folder : Path
        :attr:`~consilium_server.home.ServerHome.arrived`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, node_id: str) -> None:
        """Count one more reply of a node."""
        with (self._folder / node_id).open("ab", buffering=0) as stream:
            stream.write(b".")

    def of(self, node_id: str) -> int:
        """Return the replies of a node so far."""
        try:
            return (self._folder / node_id).stat().st_size
        except FileNotFoundError:
            return 0
