"""Why TLS refused a caller: said in our own log, for the wire says nothing and gRPC nearly nothing.

A caller whose certificate is foreign, expired, not yet valid or not a client's never becomes a
call: TLS ends the handshake with an alert, and gRPC's core writes one line on standard error, at
level INFO. So standard error goes through a pipe here. What the core says about handshakes is
reworded into log entries, a few for each reason a minute, because anybody can make them; its other
chatter is dropped; every other line passes unchanged.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

_log = logging.getLogger(__name__)

#: A line of gRPC's core: level, date, time, thread, file.
_CORE_LINE: Final = re.compile(rb"([IWEF])\d{4} [\d:.]+ +\d+ (\S+)\.cc:\d+\] (.*)")
#: Where the core reads what callers send: its errors there are theirs, and quote them.
_READERS: Final = re.compile(rb"ssl_transport_security|hpack_\w+|chttp2_\w+|frame_\w+|parsing")
_FAILED: Final = re.compile(
    rb"Handshake failed with error \w+: error:[0-9a-f]+:[^:]*:[^:]*:(\w+)(?:: (.*))?"
)

#: What BoringSSL says of a certificate, and what it means here.
_OF_CERTIFICATES: Final[dict[str, tuple[str, str]]] = {
    "certificate has expired": ("identity.expired", "the caller's certificate has expired"),
    "certificate is not yet valid": (
        "identity.not-yet-valid",
        "the caller's certificate is not valid yet (or its clock or ours is wrong)",
    ),
    "unsupported certificate purpose": (
        "identity.wrong-usage",
        "the caller's certificate is not one for clients (its role or key usage is wrong)",
    ),
    "unable to get local issuer certificate": (
        "identity.foreign",
        "the caller's certificate is not of this consortium",
    ),
    "certificate signature failure": (
        "identity.foreign",
        "the caller's certificate was not signed by this consortium's authority",
    ),
}
#: What BoringSSL says of the rest of a handshake.
_OF_HANDSHAKES: Final[dict[str, tuple[str, str]]] = {
    "CERTIFICATE_VERIFY_FAILED": (
        "identity.foreign",
        "the caller's certificate does not lead to this consortium's authority",
    ),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "identity.no-certificate",
        "the caller presented no certificate",
    ),
    "KEY_USAGE_BIT_INCORRECT": (
        "identity.wrong-usage",
        "the caller's certificate is of a key that may not prove itself",
    ),
    "NO_SHARED_CIPHER": ("network.no-tls13", "the caller speaks no TLS 1.3"),
    "UNSUPPORTED_PROTOCOL": ("network.no-tls13", "the caller speaks no TLS 1.3"),
    "BAD_SIGNATURE": ("identity.wrong-key", "the caller does not hold its certificate's key"),
    "HTTP_REQUEST": ("network.no-tls", "the caller speaks no TLS"),
    "WRONG_VERSION_NUMBER": ("network.no-tls", "the caller speaks no TLS"),
}
_OTHER: Final = "network.handshake"

#: So many entries of one reason a minute; the rest is counted.
_ENTRIES: Final = 5
_PERIOD_SECONDS: Final = 60.0
#: Longer than any line of ours; what has no line end by then passes as it is.
_LONGEST_LINE: Final = 64 * 1024


@dataclass(frozen=True)
class Refusal:
    """A handshake that did not come about."""

    code: str  #: as an error's code
    words: str  #: for the log


def refusal_of(message: bytes) -> Refusal | None:
    """Read what gRPC's core says; None when it is not about a failed handshake."""
    match = _FAILED.match(message)
    if match is None:
        return None
    reason, detail = match[1].decode(), (match[2] or b"").decode(errors="replace").strip()
    if reason == "CERTIFICATE_VERIFY_FAILED" and detail in _OF_CERTIFICATES:
        return Refusal(*_OF_CERTIFICATES[detail])
    words = f"the caller's TLS failed ({reason.lower().replace('_', ' ')})"
    return Refusal(*_OF_HANDSHAKES.get(reason, (_OTHER, words)))


class RefusalLog:
    """Passes on the first few refusals of each reason in a minute, and then how many there were.

    Parameters
    ----------
    tell : callable
        Takes a refusal's code and words.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        tell: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._since = clock()
        self._counts: dict[Refusal, int] = {}

    def note(self, refusal: Refusal) -> None:
        """Take in one refusal."""
        if self._clock() - self._since >= _PERIOD_SECONDS:
            self.sum_up()
        count = self._counts.get(refusal, 0) + 1
        self._counts[refusal] = count
        if count <= _ENTRIES:
            self._tell(refusal.code, refusal.words)

    def sum_up(self) -> None:
        """Say how many were not told one by one, and begin a new minute."""
        for refusal, count in self._counts.items():
            if count > _ENTRIES:
                self._tell(refusal.code, f"{refusal.words} ({count - _ENTRIES} more times)")
        self._counts.clear()
        self._since = self._clock()


def listen() -> None:
    """Have gRPC's core say why handshakes fail; call it before gRPC is imported."""
    if "grpc" in sys.modules and os.environ.get("GRPC_VERBOSITY") != "INFO":
        raise RuntimeError("gRPC was imported before it was told to say why handshakes fail")
    os.environ["GRPC_VERBOSITY"] = "INFO"


@contextmanager
def reworded(tell: Callable[[str, str], None] | None = None) -> Iterator[None]:
    """Lead this process's standard error through the rewording, as long as the context lasts.

    Parameters
    ----------
    tell : callable, optional
        Takes the code and words of refusals; by default they become warnings in the log.
    """
    tell = tell or _warn
    # Told by a thread of its own: the log writes to the very pipe that the reader empties.
    waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    told = RefusalLog(lambda code, words: waiting.put((code, words)))
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    reader = threading.Thread(target=_read, args=(source, kept, told), daemon=True)
    teller = threading.Thread(target=_tell_all, args=(waiting, tell), daemon=True)
    reader.start()
    teller.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)  # the pipe's last writing end: the reader sees its end
        reader.join(5.0)
        told.sum_up()
        waiting.put(None)
        teller.join(5.0)


def _warn(code: str, words: str) -> None:
    _log.warning("refused in the TLS handshake: %s: %s", code, words)


def _tell_all(
    waiting: queue.SimpleQueue[tuple[str, str] | None], tell: Callable[[str, str], None]
) -> None:
    while (refusal := waiting.get()) is not None:
        tell(*refusal)


def _read(source: int, kept: int, told: RefusalLog) -> None:
    """Sort lines until the pipe ends; whatever goes wrong, the pipe is emptied."""
    rest = b""
    while content := os.read(source, 65536):
        *lines, rest = (rest + content).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        _pass(b"".join(line + b"\n" for line in lines if not _taken(line, told)), kept)
    _pass(rest, kept)
    os.close(source)
    os.close(kept)


def _taken(line: bytes, told: RefusalLog) -> bool:
    """Return whether ``line`` is the core's chatter, and note it where it is a refusal."""
    match = _CORE_LINE.match(line)
    if match is None or match[1] == b"F":
        return False
    if match[1] == b"E":
        if not _READERS.fullmatch(match[2]):
            return False
        told.note(Refusal("network.garbage", f"a caller sent nonsense ({match[2].decode()})"))
        return True
    refusal = refusal_of(match[3])
    if refusal is not None:
        told.note(refusal)
    return True


def _pass(content: bytes, kept: int) -> None:
    try:
        while content:
            content = content[os.write(kept, content) :]
    except OSError:
        return  # nobody reads our standard error; serving goes on
