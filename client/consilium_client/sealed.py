"""A file that leaves piece by piece, and only as it was when it was looked at as a whole.

Whoever trains can write to the site's folder. What is exchanged or altered after the gate has
judged it must not leave, not even in part, so each piece is told from any other before it goes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.poly1305 import Poly1305

from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import CHUNK_BYTES

_KEY_BYTES: Final = 32


class Sealed:
    """A stored update whose content has the name that was judged; reads it once.

    Parameters
    ----------
    path : Path
        The file.
    update : Reference
        What the gate has let out.

    Raises
    ------
    ConsiliumError
        ``privacy.update-lost``: the file is gone or altered.
    """

    def __init__(self, path: Path, update: Reference) -> None:
        self._path = path
        # A tag costs a tenth of a hash. The key and all tags stay in this process: who knows
        # neither makes no other piece of the same tag (Bernstein 2005, theorem 3.3).
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._tags: list[bytes] = []
        whole = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    whole.update(piece)
                    self._tags.append(Poly1305.generate_tag(self._key, piece))
        except OSError as error:
            raise _altered(path) from error
        if whole.hexdigest() != update.sha256:
            raise _altered(path)

    def piece(self, offset: int) -> bytes:
        """Return what follows after ``offset``, to the end of its piece; empty at the end.

        Raises
        ------
        ConsiliumError
            ``privacy.update-lost``: it is not what it was.
        """
        number, skip = divmod(offset, CHUNK_BYTES)
        if number >= len(self._tags):
            return b""
        try:
            with self._path.open("rb") as file:
                file.seek(number * CHUNK_BYTES)
                piece = file.read(CHUNK_BYTES)
        except OSError as error:
            raise _altered(self._path) from error
        if not hmac.compare_digest(Poly1305.generate_tag(self._key, piece), self._tags[number]):
            raise _altered(self._path)
        return piece[skip:]


def _altered(path: Path) -> ConsiliumError:
    return ConsiliumError(
        "privacy.update-lost",
        "A stored update was altered while it was on its way; the rest of it stays here.",
        where=str(path),
        hint="Restore the releases folder from your backup.",
    )
