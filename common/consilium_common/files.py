"""Files that survive a crash: private folders, atomic durable writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from consilium_common.errors import ConsiliumError


def private_folder(path: Path) -> Path:
    """Create ``path`` (and parents) readable by its owner alone (0700) and return it."""
    try:
        # `parents=True` would make those with the system's mode.
        for folder in (*reversed([above for above in path.parents if not above.exists()]), path):
            folder.mkdir(exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise ConsiliumError(
            "state.folder",
            f"Cannot use the folder: {error.strerror or error}.",
            where=str(path),
            hint="Choose a folder that you own, on a disk that is writable.",
        ) from error
    return path


@contextmanager
def replacing(path: Path, *, mode: int = 0o600, durable: bool = True) -> Iterator[BinaryIO]:
    """Give a stream whose content replaces ``path`` when the block ends well, else nothing does.

    Parameters
    ----------
    durable : bool
        False for what is worth nothing after a crash: a reader still never sees half of it, but
        nobody waits for the disk (default: True).

    Raises
    ------
    ConsiliumError
        ``state.disk`` when the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        Path(temporary).replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> ConsiliumError:
    """Return ``state.disk``: what could not be written, and why."""
    return ConsiliumError(
        "state.disk",
        f"Cannot write the file: {error.strerror or error}.",
        where=str(path),
        hint="Free space on the disk or check its permissions; nothing was lost.",
    )


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace ``path`` by ``content`` durably: a reader or a crash sees all of it or the old file.

    Parameters and errors as :func:`replacing`.
    """
    with replacing(path, mode=mode, durable=durable) as stream:
        stream.write(content)


def require_new(path: Path) -> None:
    """Check that nothing of this name is there and that the folder to write in is.

    Raises
    ------
    ConsiliumError
        ``state.exists`` or ``state.folder``.
    """
    if path.exists() or path.is_symlink():
        raise ConsiliumError(
            "state.exists",
            "There is a file of this name already; it is not overwritten.",
            where=str(path),
            hint="Choose another name, or move the file away.",
        )
    if not path.parent.is_dir():
        raise ConsiliumError(
            "state.folder",
            "The folder to write in does not exist.",
            where=str(path.parent),
            hint="Make it first, or choose another.",
        )


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, whole or not at all (mode 0600).

    Raises
    ------
    ConsiliumError
        As :func:`require_new` and :func:`write_atomic`.
    """
    require_new(path)
    write_atomic(path, content)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable (POSIX needs an fsync of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
