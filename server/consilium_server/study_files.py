"""A study's models on their way out and updates on their way in: files, named by their content.

The round loop offers and expects; the gateway reads what is offered and keeps what is expected.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Collection
from io import FileIO
from pathlib import Path
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import CHUNK_BYTES

#: Models that stay on offer: a late site may still be fetching the one before.
_OFFERED: Final = 3
_EXPECTED: Final = "expected.json"
_PART: Final = ".part"
_NAME_LENGTH: Final = 64


class StudyFiles:
    """The folder of one study's files under way.

    Parameters
    ----------
    folder : Path
        The study's folder at the aggregator.
    """

    def __init__(self, folder: Path) -> None:
        self._out = folder / "out"
        self._in = folder / "in"
        #: The oldest first. By order and not by the files' times, which follow the clock.
        self._offered: list[str] = []
        #: Names that stay on offer however many come after them.
        self.kept: frozenset[str] = frozenset()

    # --- for the round loop ----------------------------------------------------------------

    def offer(self, model: Path, sha256: str | None = None) -> Reference:
        """Let the study's sites fetch a file, which must not change; return its name.

        Parameters
        ----------
        sha256 : str, optional
            Digest of the file where it is known (default: all of the file is read for it).

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        reference = Reference(sha256, model.stat().st_size) if sha256 else Reference.of(model)
        path = private_folder(self._out) / reference.sha256
        try:
            # Replaced: what a crash left under this name need not be what the name says.
            beside = path.with_name(f".{path.name}")
            beside.unlink(missing_ok=True)
            os.link(model, beside)
            beside.replace(path)
            # A link onto the same file again leaves both names.
            beside.unlink(missing_ok=True)
            self._offered = [one for one in self._offered if one != reference.sha256]
            self._offered.append(reference.sha256)
            staying = {*self._offered[-_OFFERED:], *self.kept}
            self._offered = [one for one in self._offered if one in staying]
            for old in self._out.iterdir():
                if old.name not in staying:
                    old.unlink()
        except OSError as error:
            raise _disk(path, error) from error
        return reference

    def on_offer(self) -> frozenset[str]:
        """Return the names of all files on offer."""
        return frozenset(path.name for path in self._out.glob("*"))

    def expect(self, site: str, round_index: int, most: int) -> None:
        """Let a site deliver one file of at most ``most`` bytes; files of other rounds go.

        What it delivered for this very round stays: asked again, it need not send it again.
        """
        folder = private_folder(self._in / site)
        if self._expected(site).get("round") != round_index:
            self.forget(site)
            private_folder(folder)
        content = json.dumps({"round": round_index, "most": most}).encode()
        write_atomic(folder / _EXPECTED, content, durable=False)

    def delivered(self, site: str, reference: Reference) -> Path:
        """Return the file that a site delivered, whole and of the content that its name says.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` when it has not come.
        """
        path = self.arrived(site, reference)
        if path is None:
            raise ConsiliumError("run.bad-update", "The update that the reply names has not come.")
        return path

    def forget(self, site: str) -> None:
        """Remove what a site delivered; it may deliver no more."""
        shutil.rmtree(self._in / site, ignore_errors=True)

    def forget_all(self, *, but: Collection[str] = ()) -> None:
        """Do so for every site but these: the round is over."""
        for folder in self._in.iterdir() if self._in.is_dir() else ():
            if folder.name not in but:
                self.forget(folder.name)

    def verify(self) -> None:
        """Remove what is not what its name says: a crash of the machine may leave such files."""
        for path in self._in.glob("*/*"):
            if len(path.name) == _NAME_LENGTH:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != path.name:
                    path.unlink(missing_ok=True)

    # --- for the gateway -------------------------------------------------------------------

    def offered(self, sha256: str) -> Path | None:
        """Return the file on offer under a name; None where there is none."""
        path = self._out / sha256
        return path if path.is_file() else None

    def most(self, site: str) -> int:
        """Return how many bytes the file may have that a site is expected to deliver; 0: none."""
        most = self._expected(site).get("most")
        return most if type(most) is int else 0

    def arrived(self, site: str, reference: Reference) -> Path | None:
        """Return a file that a site has delivered whole; None before."""
        path = self._in / site / reference.sha256
        try:
            return path if path.stat().st_size == reference.bytes else None
        except FileNotFoundError:
            return None

    def arriving(self, site: str, reference: Reference) -> Arriving:
        """Return a file that a site delivers, to be opened."""
        folder = self._in / site
        for other in folder.iterdir():
            # A site has one file at a time, under way or here: it cannot fill the disk.
            if other.name not in (reference.sha256 + _PART, _EXPECTED):
                other.unlink(missing_ok=True)
        return Arriving(folder / reference.sha256, reference)

    def _expected(self, site: str) -> dict[str, Any]:
        try:
            found = json.loads((self._in / site / _EXPECTED).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Arriving:
    """A file that is being delivered; what has come stays when the line breaks.

    Attributes
    ----------
    held : int
        Bytes that have come.
    """

    def __init__(self, path: Path, reference: Reference) -> None:
        self._path, self._reference = path, reference
        self._part = path.with_name(path.name + _PART)
        self._hash = hashlib.sha256()
        self._stream: FileIO | None = None
        self._ended = False
        # Opened and written in threads: a line that is given up closes the file in between, never
        # beneath a piece.
        self._lock = threading.Lock()
        self.held = 0

    def open(self) -> None:
        """Go on from what has come; reads all of that.

        Raises
        ------
        ConsiliumError
            ``network.replaced`` once closed; ``state.disk``.
        """
        with self._lock:
            try:
                stream = self._stream = FileIO(self._part, "a+")
                stream.seek(0)
                while not self._ended and (piece := stream.read(CHUNK_BYTES)):
                    self._hash.update(piece)
                    self.held += len(piece)
            except OSError as error:
                raise _disk(self._part, error) from error
            self._require_open()

    def write(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` for more than was announced; ``network.replaced`` once closed;
            ``state.disk``.
        """
        if self.held + len(piece) > self._reference.bytes:
            self.discard()
            raise ConsiliumError("run.bad-update", "More came than was announced.")
        with self._lock:
            stream = self._require_open()
            try:
                written = 0
                while written < len(piece):
                    written += stream.write(memoryview(piece)[written:]) or 0
            except OSError as error:
                raise _disk(self._part, error) from error
        self._hash.update(piece)
        self.held += len(piece)

    def finish(self) -> None:
        """Keep the file under its name, now that all of it has come.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` when it is not what its name says; then nothing of it is kept.
        """
        if self._hash.hexdigest() != self._reference.sha256:
            self.discard()
            raise ConsiliumError("run.bad-update", "What came is not the file that was announced.")
        self.close()
        try:
            self._part.replace(self._path)
        except OSError as error:
            raise _disk(self._path, error) from error

    def close(self) -> None:
        """Write no more; what has come stays."""
        self._ended = True
        with self._lock:
            if self._stream is not None:
                self._stream.close()

    def discard(self) -> None:
        """Keep nothing of it."""
        self.close()
        self._part.unlink(missing_ok=True)

    def _require_open(self) -> FileIO:
        if self._ended or self._stream is None:
            if self._stream is not None:
                self._stream.close()
            raise ConsiliumError("network.replaced", "The site sends this over another line now.")
        return self._stream


def _disk(path: Path, error: OSError) -> ConsiliumError:
    return ConsiliumError(
        "state.disk",
        f"The aggregator cannot keep a study's files: {error.strerror or error}.",
        where=str(path),
        hint="Free space on the aggregator's disk; the study goes on by itself.",
    )
