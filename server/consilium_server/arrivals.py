"""Which replies of each node have come whole: a list that no clock can disturb."""

from __future__ import annotations

from pathlib import Path


class ArrivalLists:
    """A file per node with a line for every whole reply: the message that it replies to.

    The gateway writes, the round loop looks whether the file has grown. Times of files would be
    wrong when the clock is set, and equal for two replies in one tick of the file system.

    Parameters
    ----------
    folder : Path
        :attr:`~consilium_server.home.ServerHome.arrived`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, node_id: str, replied_to: str) -> None:
        """Note that the reply of a node to a message is there, all of it."""
        with (self._folder / node_id).open("ab", buffering=0) as stream:
            stream.write(replied_to.encode() + b"\n")

    def of(self, node_id: str) -> int:
        """Return how long a node's list is, in bytes: it changes when a reply has come."""
        try:
            return (self._folder / node_id).stat().st_size
        except FileNotFoundError:
            return 0

    def since(self, node_id: str, length: int) -> set[str]:
        """Return the messages whose replies have come since the list had a length."""
        with (self._folder / node_id).open("rb") as stream:
            stream.seek(length)
            return set(stream.read().decode().split())
