"""Public starting weights on their way to the aggregator: in pieces, kept under their SHA-256."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import sync_folder
from consilium_common.ledger.entries import is_hexadecimal
from consilium_common.models.registry import MAX_PARAMETERS
from consilium_common.wire.methods import OPERATOR_PROPOSE

if TYPE_CHECKING:
    from consilium_common.study import Study

    # Not at run time: Flower brings gRPC into a run's process before ours could restrict it.
    from consilium_common.wire.channel import Caller

#: Bytes of one call; a third more as base64, which is well below the largest message.
CHUNK_BYTES: Final = 4 * 1024 * 1024
#: The largest network that a study may name, and its header.
_MAX_BYTES: Final = 4 * MAX_PARAMETERS + 8 * 1024 * 1024
_CALL_SECONDS: Final = 120.0


class PublicStarts:
    """The files of starting weights that operators have handed over.

    Parameters
    ----------
    folder : Path
        Holds ``<sha256>.safetensors``, and ``<sha256>.part`` while one is on its way.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return where the file of this hash is, or will be."""
        return self._folder / f"{sha256}.safetensors"

    def take(self, piece: object) -> dict[str, int]:
        """Take the next piece of a file; returns how many bytes are held.

        A piece that does not begin where the file ends so far is left out: whoever sends goes on
        from the number returned. So a connection that breaks costs one piece.

        Raises
        ------
        ConsiliumError
            ``study.start`` when the piece is not valid, or the whole is not what its hash names;
            ``state.disk``.
        """
        sha256, offset, total, data = _read_piece(piece)
        whole, part = self.path(sha256), self._folder / f"{sha256}.part"
        with self._lock:
            if whole.exists():
                return {"held": total}
            try:
                with part.open("ab") as stream:
                    held = stream.tell()
                    if held == offset and held + len(data) <= total:
                        stream.write(data)
                        held += len(data)
                if held >= total:
                    self._finish(part, whole, sha256)
            except OSError as error:
                raise ConsiliumError(
                    "state.disk",
                    f"The aggregator cannot keep the starting weights: {error.strerror or error}.",
                    where=str(part),
                    hint="Free space on the aggregator's disk and propose the study again.",
                ) from error
        return {"held": held}

    def _finish(self, part: Path, whole: Path, sha256: str) -> None:
        part.chmod(0o600)
        with part.open("r+b") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found == sha256:
                os.fsync(stream.fileno())
        if found != sha256:
            part.unlink()
            raise ConsiliumError(
                "study.start",
                f"The starting weights have SHA-256 {found}, and {sha256} was announced.",
                hint="Hand over the file that the study names.",
            )
        part.replace(whole)
        sync_folder(self._folder)

    def require(self, study: Study) -> None:
        """Refuse a study whose starting weights are not here.

        Raises
        ------
        ConsiliumError
            ``study.start``.
        """
        start = study.model.start
        if start is not None and not self.path(start.sha256).exists():
            raise ConsiliumError(
                "study.start",
                f"The starting weights {start.sha256[:12]}… that the study names are not here.",
                hint="Propose it with `consilium study propose FILE --start WEIGHTS.safetensors`.",
            )


def read_start(study: Study, file: Path | None) -> bytes | None:
    """Return the weights a study begins with, checked against it; None where it names none.

    Raises
    ------
    ConsiliumError
        ``study.start``.
    """
    from consilium_common.models.registry import start_weights

    if file is None and study.model.start is None:
        return None
    if file is None:
        raise ConsiliumError(
            "study.start",
            "The study begins with public weights, and no file of them was given.",
            where="model.start",
            hint="Give it: consilium study propose FILE --start WEIGHTS.safetensors",
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            "study.start",
            f"Cannot read the starting weights: {error.strerror or error}.",
            where=str(file),
            hint="Give the safetensors file that model.start.sha256 names.",
        ) from error
    start_weights(study, content)
    return content


def send_start(caller: Caller, content: bytes) -> None:
    """Hand a file of starting weights over to the aggregator, in pieces.

    Raises
    ------
    ConsiliumError
        ``network.*``, or what :meth:`PublicStarts.take` raises.
    """
    sha256, total = hashlib.sha256(content).hexdigest(), len(content)

    def send(offset: int, data: bytes) -> int:
        piece = {
            "sha256": sha256,
            "offset": offset,
            "total": total,
            "data": base64.b64encode(data).decode(),
        }
        answer = caller.call(OPERATOR_PROPOSE, {"start": piece}, timeout=_CALL_SECONDS)
        return int(answer["held"])

    held = send(0, b"")  # nothing yet: how much came in an attempt before?
    while held < total:
        before, held = held, send(held, content[held : held + CHUNK_BYTES])
        if held <= before:
            raise ConsiliumError(
                "network.failed",
                "The aggregator took no more of the starting weights.",
                hint="Somebody else may be handing over the same file; try again.",
            )


def _read_piece(piece: Any) -> tuple[str, int, int, bytes]:
    try:
        sha256, offset, total = piece["sha256"], piece["offset"], piece["total"]
        data = base64.b64decode(piece["data"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise _invalid("a piece is not one") from error
    if not is_hexadecimal(sha256, 64):
        raise _invalid("its SHA-256 is not 64 hexadecimal digits")
    if type(offset) is not int or type(total) is not int or not 0 <= offset <= total:
        raise _invalid("its offset is not within it")
    if not 0 < total <= _MAX_BYTES:
        raise _invalid(f"a file has between 1 and {_MAX_BYTES:,} bytes")
    return sha256, offset, total, data


def _invalid(what: str) -> ConsiliumError:
    return ConsiliumError(
        "study.start",
        f"The starting weights cannot be taken: {what}.",
        hint="Propose the study with --start and a safetensors file.",
    )
