"""Passphrases for keys: from a file, a descriptor or the terminal; never argv or environment."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError

#: A shorter passphrase of the consortium's key could be guessed from a stolen copy.
SHORTEST: Final = 12
_LONGEST: Final = 1023  #: more is refused by the format of the key


def read_passphrase(path: Path, *, forbidden: int = 0o077) -> bytes:
    """Read a passphrase: the file's first line, which may be a descriptor (``/dev/fd/3``).

    Parameters
    ----------
    forbidden : int
        Rights that the file must not give (default: any to group or others).

    Raises
    ------
    ConsiliumError
        ``identity.no-passphrase``, ``identity.key-exposed``.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            exposed = stat.S_ISREG(status.st_mode) and status.st_mode & forbidden
            line = b"" if exposed else stream.readline(_LONGEST + 2).rstrip(b"\r\n")
    except OSError as error:
        raise ConsiliumError(
            "identity.no-passphrase",
            f"Cannot read the passphrase: {error.strerror or error}.",
            where=str(path),
            hint="Give a file that holds the passphrase alone, or a descriptor (/dev/fd/3).",
        ) from None
    if exposed:
        raise ConsiliumError(
            "identity.key-exposed",
            "The passphrase can be read by other users of this machine.",
            where=str(path),
            hint=f"Run `chmod 600 {path}`; if others may have read it, choose another passphrase.",
        )
    if not 0 < len(line) <= _LONGEST:
        raise ConsiliumError(
            "identity.no-passphrase",
            "The passphrase is empty or too long.",
            where=str(path),
            hint="The passphrase is the file's first line.",
        )
    return line


def new_passphrase(path: Path | None) -> bytes:
    """Return a passphrase for a new key: from ``path``, or asked for twice at the terminal.

    Raises
    ------
    ConsiliumError
        ``identity.weak-passphrase`` below 12 characters, ``identity.no-passphrase``.
    """
    if path is not None:
        chosen = read_passphrase(path)
    else:
        chosen = _ask("Passphrase for the authority's key: ")
        if _ask("The same once more: ") != chosen:
            raise ConsiliumError(
                "identity.no-passphrase", "The two passphrases differ.", hint="Try again."
            )
    if len(chosen.decode("utf-8", "replace")) < SHORTEST:
        raise ConsiliumError(
            "identity.weak-passphrase",
            f"The passphrase has fewer than {SHORTEST} characters.",
            hint="Take five words drawn at random.",
        )
    return chosen


def ask_passphrase() -> bytes:
    """Ask for the passphrase of a key at the terminal, or raise ``identity.passphrase-needed``."""
    return _ask("Passphrase of the authority's key: ")


def _ask(prompt: str) -> bytes:
    import getpass

    if not sys.stdin.isatty():
        raise ConsiliumError(
            "identity.passphrase-needed",
            "The authority's key needs a passphrase, and there is no terminal to ask at.",
            hint="Give it with --passphrase-file FILE (a descriptor as /dev/fd/3 works too).",
        )
    return getpass.getpass(prompt, stream=sys.stderr).encode()
