"""The folder of a pull: only what was asked for gets in, and what is whole is remembered."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from consilium_client.data.ingest.dicom_file import quietly
from consilium_client.data.pacs.archive import FoundSeries, Instance, text_of
from consilium_client.data.pacs.retry import SeriesError
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, sync_folder, write_atomic

_STATE: Final = ".pull"
_SCHEMA: Final = "consilium/pulled/v1"
#: Length of a value that ends with a mark instead (DICOM PS3.5 7.1.2).
_UNDEFINED: Final = 0xFFFFFFFF
_TAGS: Final = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


def public_name(uid: str) -> str:
    """Return the name of a series' folder or of an image's file.

    A UID may hold dates and device numbers, and comes from the network: its hash says nothing and
    leads nowhere.
    """
    return hashlib.sha256(uid.encode()).hexdigest()[:24]


class Download:
    """``<series>/<image>.dcm``, and one record in ``.pull`` for each series that is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / _STATE

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Download]:
        """Open ``folder`` for one pull at a time.

        Raises
        ------
        ConsiliumError
            ``state.busy``, ``state.folder``, or ``data.not-empty`` where somebody else's files
            lie: they would be imported together with ours.
        """
        folder = folder.expanduser().resolve()
        if folder.is_dir() and not (folder / _STATE).is_dir() and any(folder.iterdir()):
            raise ConsiliumError(
                "data.not-empty",
                "The folder is not empty and holds no earlier pull.",
                where=str(folder),
                hint="Name a new folder, or the one of a pull that is to go on.",
            )
        private_folder(folder)
        private_folder(folder / _STATE)
        lock = os.open(folder / _STATE, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield cls(folder)
        except BlockingIOError as error:
            raise ConsiliumError(
                "state.busy",
                "Another pull is filling this folder.",
                where=str(folder),
                hint="Wait until it ends, or name another folder.",
            ) from error
        finally:
            os.close(lock)

    def is_whole(self, series: FoundSeries) -> bool:
        """Whether the series was recorded, its files are there, and the archive has no more."""
        try:
            record = json.loads(self._record(series).read_text(encoding="utf-8"))
            files: dict[str, int] = record["files"]
            known = record["schema"] == _SCHEMA
            there = all(
                (self._series(series) / name).stat().st_size == size for name, size in files.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return known and there and bool(files) and (series.images or 0) <= len(files)

    def inbox(self, series: FoundSeries, instances: Sequence[Instance]) -> Inbox:
        """Return the place for one series; what an earlier pull brought is there already."""
        folder = private_folder(self._series(series))
        for torn in folder.glob(".*"):
            torn.unlink()
        return Inbox(folder, series, instances)

    def record(self, series: FoundSeries, inbox: Inbox) -> None:
        """Remember that the series is whole, after its files are safely on the disk."""
        files = {}
        for path in sorted(inbox.paths):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                files[path.name] = os.fstat(stream.fileno()).st_size
        sync_folder(inbox.folder)
        content = {"schema": _SCHEMA, "files": files}
        write_atomic(self._record(series), json.dumps(content).encode() + b"\n")

    def _series(self, series: FoundSeries) -> Path:
        return self.folder / public_name(series.uid)

    def _record(self, series: FoundSeries) -> Path:
        return self._records / f"{public_name(series.uid)}.json"


class Inbox:
    """Takes the objects of one series, and refuses every other.

    Attributes
    ----------
    folder : Path
    kept : int
        Objects stored by this inbox.
    bytes : int
        Their size.
    """

    def __init__(self, folder: Path, series: FoundSeries, instances: Sequence[Instance]) -> None:
        self.folder = folder
        self.kept = 0
        self.bytes = 0
        self._series = series
        self._paths = {item.uid: folder / f"{public_name(item.uid)}.dcm" for item in instances}
        self._instances = tuple(instances)
        self._there = {uid for uid, path in self._paths.items() if path.is_file()}

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the objects of the series lie."""
        return tuple(self._paths.values())

    @property
    def missing(self) -> tuple[Instance, ...]:
        """What has not come yet."""
        return tuple(item for item in self._instances if item.uid not in self._there)

    def keep(self, content: bytes) -> None:
        """Check one object and store it; half a file is never seen under its name.

        Raises
        ------
        ConsiliumError
            ``pacs.unasked``: the pull ends, because an archive that sends somebody else's images
            is not to be believed. ``pacs.damaged`` (this series alone), ``state.disk``.
        """
        header = self._header(content)
        wrong = [
            what
            for what, same in (
                ("study", header["StudyInstanceUID"] == self._series.study.uid),
                ("series", header["SeriesInstanceUID"] == self._series.uid),
                ("image", header["SOPInstanceUID"] in self._paths),
                ("patient", self._series.study.patient in ("", header["PatientID"])),
            )
            if not same
        ]
        if wrong:
            raise ConsiliumError(
                "pacs.unasked",
                f"The archive sent an object that was not asked for: another {wrong[0]}.",
                where=f"asked for the series in {self.folder}",
                hint="Nothing of it was stored. Tell the archive's administrator before you pull "
                "again.",
            )
        uid = header["SOPInstanceUID"]
        if uid in self._there:
            return
        # Made durable with the record of the whole series: waiting for each file would be slow.
        write_atomic(self._paths[uid], content, durable=False)
        self._there.add(uid)
        self.kept += 1
        self.bytes += len(content)

    def _header(self, content: bytes) -> dict[str, str]:
        import pydicom

        try:
            # Values that break a rule of form are the importer's matter.
            with quietly():
                # Read to the end: half an object is found out here.
                dataset: Any = pydicom.dcmread(BytesIO(content))
                if _is_cut(dataset):
                    raise EOFError
                header = {name: text_of(dataset, name) for name in (*_TAGS, "PatientID")}
        except Exception as error:
            raise self._damaged(f"cannot be read ({type(error).__name__})") from error
        absent = [name for name in _TAGS if not header[name]]
        if absent:
            raise self._damaged(f"has no {absent[0]}")
        return header

    def _damaged(self, what: str) -> SeriesError:
        return SeriesError(
            "pacs.damaged",
            f"The archive sent an object that {what}.",
            where=str(self.folder),
            hint="Ask the archive's administrator to check the series; the others are pulled.",
        )


def _is_cut(dataset: Any) -> bool:
    """Whether the last attribute is shorter than it says: the library passes over it."""
    tags = list(dataset.keys())
    last = dataset.get_item(tags[-1]) if tags else None
    declared = getattr(last, "length", 0)  # only what was not decoded yet still has its length
    return declared != _UNDEFINED and declared > len(getattr(last, "value", None) or b"")
