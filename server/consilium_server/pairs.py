"""A key and its certificate on disk: replaced together, and read again when they have changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from consilium_common.errors import ConsiliumError
from consilium_common.files import sync_folder, write_atomic
from consilium_common.identity.keys import load_tls_key
from consilium_common.identity.trust import load_bundle

T = TypeVar("T")


class Kept(Generic[T]):
    """A value read from files, read again when one of them has changed."""

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], T]) -> None:
        self._paths = paths
        self._read = read
        self._found: tuple[Any, T] | None = None

    def value(self) -> T:
        """Return the value; the one before while the files do not fit together."""
        stamp = tuple(_stamp(path) for path in self._paths)
        if self._found is None or self._found[0] != stamp:
            try:
                self._found = (stamp, self._read())
            except ConsiliumError:
                # Two files are replaced one after the other: between them the old value holds.
                if self._found is None:
                    raise
        return self._found[1]


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_ino, status.st_size)


def install_pair(folder: Path, stem: str, key_pem: bytes, certificates_pem: bytes) -> None:
    """Replace ``STEM-key.pem`` and ``STEM.pem`` so that a crash leaves what can be finished."""
    following = folder / f"{stem}-next.pem"
    write_atomic(following, certificates_pem, mode=0o644)
    write_atomic(folder / f"{stem}-key.pem", key_pem)
    # Another process may have finished it a moment ago.
    with contextlib.suppress(FileNotFoundError):
        following.replace(folder / f"{stem}.pem")
    sync_folder(folder)


def settle_pair(folder: Path, stem: str, passphrase: bytes | None = None) -> None:
    """Finish the replacement that a crash interrupted after the key was replaced.

    A certificate that does not fit the key is left: the replacement has not begun, or is under way.
    """
    following = folder / f"{stem}-next.pem"
    if not following.exists():
        return
    key = load_tls_key(folder / f"{stem}-key.pem", passphrase)
    with contextlib.suppress(FileNotFoundError):
        if load_bundle(following.read_bytes())[0].public_key() == key.public_key():
            following.replace(folder / f"{stem}.pem")
            sync_folder(folder)
