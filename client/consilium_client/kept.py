"""What a study keeps at its site from round to round, in files: personal layers, control variates.

It never leaves: the link reads only the folder of releases. A round's file is written with its
update and named by the round, so that the row that makes the update stand makes the file stand:
after a crash before it, the round begins again with what the round before kept.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic


def write_kept(home: SiteHome, digest: str, round_index: int, content: bytes) -> None:
    """Write durably what a round keeps, beside what earlier rounds kept.

    Raises
    ------
    ConsiliumError
        ``state.disk``.
    """
    write_atomic(_file(home, digest, round_index), content)


def read_kept(home: SiteHome, digest: str, round_index: int, sha256: str) -> bytes:
    """Read what a round kept.

    Raises
    ------
    ConsiliumError
        ``state.kept-lost`` when the file is gone or altered.
    """
    path = _file(home, digest, round_index)
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
    current = _file(home, digest, round_index)
    for path in current.parent.glob(f"{digest[:16]}-*.safetensors"):
        if path != current:
            path.unlink(missing_ok=True)


def _file(home: SiteHome, digest: str, round_index: int) -> Path:
    return home.kept / f"{digest[:16]}-{round_index:05d}.safetensors"
