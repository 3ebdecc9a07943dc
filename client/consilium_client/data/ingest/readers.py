"""Child processes that read cases side by side; one that dies or hangs costs its case alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from consilium_client.data.ingest.case import Located
from consilium_client.data.parallel import cores
from consilium_common.errors import ConsiliumError
from consilium_common.wire.proxy import without_proxies

Key = TypeVar("Key")

#: A case that takes longer than this is given up: the largest CT takes seconds.
CASE_SECONDS: Final = 600.0
_START_SECONDS: Final = 120.0
_MOST_READERS: Final = 8


@dataclass(frozen=True)
class CaseRead:
    """A case that lies in its temporary folder, whole but not yet durable."""

    folder: Path
    size: int
    content: dict[str, Any]


def readers_for(cases: int) -> int:
    """Return how many children pay for so many cases; a child starts in about half a second."""
    return max(1, min(cores(), _MOST_READERS, cases // 4))


def read_cases(
    tasks: Iterable[tuple[Key, Located]],
    folder_for_case: Callable[[], Path],
    *,
    readers: int,
    seconds: float = CASE_SECONDS,
) -> Generator[tuple[Key, CaseRead | ConsiliumError]]:
    """Read cases in child processes and yield each when it is done, in no particular order.

    As many cases are in memory as there are readers. Closing the iterator ends the children and
    removes what they have half written.

    Parameters
    ----------
    folder_for_case : callable
        Makes an empty folder for one case's arrays.
    readers : int
        Number of children, at least 1.
    seconds : float
        After which a case is given up.

    Raises
    ------
    ConsiliumError
        ``state.reader`` where no child can be started.
    """
    waiting = deque(tasks)
    children: list[_Child[Key]] = []
    try:
        while waiting or any(child.key is not None for child in children):
            while len(children) < readers and len(children) < len(waiting) + _busy(children):
                children.append(_Child())
            for child in children:
                if waiting and child.idle:
                    key, located = waiting.popleft()
                    child.give(key, located, folder_for_case(), seconds)
            until = min(child.deadline for child in children)
            ready = wait([child.socket for child in children], max(0.0, until - time.monotonic()))
            for child in list(children):
                late = time.monotonic() > child.deadline
                if child.socket not in ready and not late:
                    continue
                done = child.hear() if child.socket in ready else child.give_up(seconds)
                if child.ended:
                    children.remove(child)
                if done is not None:
                    yield done
    finally:
        for child in children:
            child.end()


def _busy(children: list[_Child[Key]]) -> int:
    return sum(child.key is not None for child in children)


@dataclass
class _Child(Generic[Key]):
    """One reader and what it works on."""

    key: tuple[Key] | None = None
    ended: bool = False
    deadline: float = field(default_factory=lambda: time.monotonic() + _START_SECONDS)
    _ready: bool = False
    _folder: Path | None = None
    _where: str = ""

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "consilium_client.data.ingest.reader", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Libraries complain there about broken files, and quote them.
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**without_proxies(os.environ), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            )
        self.socket = Connection(ours.detach())

    @property
    def idle(self) -> bool:
        """Whether it waits for a case."""
        return self._ready and self.key is None

    def give(self, key: Key, located: Located, folder: Path, seconds: float) -> None:
        """Hand over a case."""
        self.key, self._folder = (key,), folder
        self._where = " and ".join(source.where for source in located.images.values())
        self.deadline = time.monotonic() + seconds
        with suppress(ConnectionError):  # it has died; hearing from it tells
            self.socket.send((folder, located))

    def hear(self) -> tuple[Key, CaseRead | ConsiliumError] | None:
        """Take what it says; None where it only says that it is ready."""
        try:
            message = self.socket.recv_bytes()
        except (EOFError, OSError):
            return self._died()
        self.deadline = float("inf")
        if not self._ready:
            self._ready = True
            return None
        answer = json.loads(message)
        if "disk" in answer:
            raise ConsiliumError(
                "state.disk",
                f"Cannot write to the cache of images: {answer['disk']}.",
                where=str(self._folder.parent) if self._folder else "",
                hint="Free space on the disk and run the command again; it goes on where it "
                "stopped.",
            )
        if "error" in answer:
            return self._finish(ConsiliumError.from_dict(answer["error"]))
        if self._folder is None:
            raise ValueError("an answer without a question")
        read = CaseRead(self._folder, answer["bytes"], answer["content"])
        self._folder = None
        return self._finish(read)

    def give_up(self, seconds: float) -> tuple[Key, CaseRead | ConsiliumError] | None:
        """End a child that takes too long."""
        if not self._ready:
            return self._died()
        error = ConsiliumError(
            "data.truncated",
            f"Reading the case took longer than {seconds:.0f} seconds and was given up.",
            where=self._where,
            hint="Convert the image again from its source, or leave the case out (--skip-bad).",
        )
        done = self._finish(error)
        self.end()
        return done

    def _died(self) -> tuple[Key, CaseRead | ConsiliumError] | None:
        self.end()
        if self.key is None:
            if self._ready:
                return None  # between two cases: another child takes the next
            raise ConsiliumError(
                "state.reader",
                "The process that reads images does not start.",
                hint="Is there enough free memory? `consilium site doctor` checks the machine.",
            )
        if self._process.returncode == -signal.SIGKILL:
            code, why = "data.too-large", "The system ended the reader: memory ran out, most likely"
        else:
            code, why = "data.truncated", "The reader died on this case: a file is damaged"
        return self._finish(
            ConsiliumError(
                code,
                f"{why}.",
                where=self._where,
                hint="Convert the image again from its source, or leave the case out (--skip-bad).",
            )
        )

    def _finish(
        self, outcome: CaseRead | ConsiliumError
    ) -> tuple[Key, CaseRead | ConsiliumError] | None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        key, self.key = self.key, None
        return None if key is None else (key[0], outcome)

    def end(self) -> None:
        """End the process and remove what it has half written."""
        self.ended = True
        self._process.kill()
        self._process.wait()
        self.socket.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
