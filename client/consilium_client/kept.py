"""What a study keeps at its site from round to round, in files: personal layers, control variates.

It never leaves: the link reads only the folder of releases. A round's file is written with its
update and named by the round, so that the row that makes the update stand makes the file stand:
after a crash before it, the round begins again with what the round before kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic

#: Digits of a study's digest that its files are named by.
_NAMED: Final = 16


def write_kept(home: SiteHome, digest: str, round_index: int, content: bytes) -> None:
    """Write durably what a round keeps, beside what earlier rounds kept.

    Raises
    ------
    ConsiliumError
        ``state.disk``.
    """
    write_atomic(round_file(home, digest, round_index), content)


def read_kept(home: SiteHome, digest: str, round_index: int, sha256: str) -> bytes:
    """Read what a round kept.

    Raises
    ------
    ConsiliumError
        ``state.kept-lost`` when the file is gone or altered.
    """
    path = round_file(home, digest, round_index)
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConsiliumError(
            "state.kept-lost",
            "What the study keeps at this site from round to round is missing or altered.",
            where=str(path),
            hint="Restore it from your backup; or withdraw from the study and approve it again, "
            "and the site begins anew.",
        )
    return content


def drop_others(home: SiteHome, digest: str, round_index: int) -> None:
    """Remove what other rounds kept, and what a crash left of one whose update was never stored."""
    current = round_file(home, digest, round_index)
    for path in _rounds(home, digest):
        if path != current:
            path.unlink(missing_ok=True)


def drop_rounds(home: SiteHome, digest: str) -> None:
    """Remove what all rounds of a study kept; its :func:`own_file` stays."""
    for path in _rounds(home, digest):
        path.unlink(missing_ok=True)


def rounds_of(home: SiteHome) -> set[str]:
    """Return the beginnings of the digests of the studies of which a round's file is here."""
    return {path.name[:_NAMED] for path in _rounds(home, "?" * _NAMED)}


def round_file(home: SiteHome, digest: str, round_index: int) -> Path:
    """Return where a round's file is, or would be."""
    return home.kept / f"{digest[:_NAMED]}-{round_index:05d}.safetensors"


def own_file(home: SiteHome, digest: str) -> Path:
    """Return where a study's personal layers or model stay when the study has ended."""
    return home.kept / f"{digest[:_NAMED]}-personal.safetensors"


def _rounds(home: SiteHome, digest: str) -> Iterator[Path]:
    return home.kept.glob(f"{digest[:_NAMED]}-[0-9]*.safetensors")
