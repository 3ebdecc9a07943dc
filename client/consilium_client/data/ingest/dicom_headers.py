"""DICOM headers without pixels: the few facts that group, order and place the images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import Finding, reading
from consilium_client.data.identifying import (
    mentions,
    searcher,
    words_of_name,
    words_of_number,
)
from consilium_client.data.ingest.dicom_file import (
    has_prefix,
    is_dicom,
    is_directory,
    open_header,
    quietly,
)
from consilium_common.errors import ConsiliumError

__all__ = ["Header", "files_below", "index_files", "is_dicom", "numbers", "read_header"]

TAGS: Final = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "ReferencedSeriesSequence",
    "SegmentSequence",
    "MediaStorageSOPClassUID",
    "StudyInstanceUID",
    "StudyDate",
    "SeriesDescription",
    "Manufacturer",
    "ManufacturerModelName",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
    "ImageType",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
)
#: The last group of ``TAGS``; per-frame functional groups and pixels lie behind it.
_LAST_GROUP: Final = 0x0062
#: Files between two words on progress.
_TOLD_EVERY: Final = 50
#: Objects with a pixel matrix that are not the images a study trains on.
_NOT_IMAGES: Final = frozenset({"SEG", "RTDOSE", "RTIMAGE", "PR", "KO", "SR", "REG"})


@dataclass(frozen=True)
class Header:
    """One DICOM file's header. ``patient_id`` never goes into a message."""

    path: Path
    sop_class: str
    sop_instance: str
    series: str
    frame_of_reference: str
    patient_id: str = field(repr=False)
    modality: str
    rows: int
    columns: int
    frames: int
    position: tuple[float, float, float] | None
    orientation: tuple[float, float, float, float, float, float] | None
    #: Millimetres between rows and between columns.
    pixel_spacing: tuple[float, float] | None
    slice_thickness: float | None
    #: Series that a segmentation was drawn on, and its (number, label) segments.
    referenced_series: tuple[str, ...] = ()
    segments: tuple[tuple[int, str], ...] = ()
    study: str = ""
    study_date: str = field(default="", repr=False)
    series_description: str = field(default="", repr=False)
    #: Manufacturer and model, for example ``GE MEDICAL SYSTEMS LightSpeed``.
    scanner: str = ""
    photometric: str = ""
    #: ``YES``, ``NO`` or empty: most files do not say.
    burned_in: str = ""
    image_type: tuple[str, ...] = ()
    #: Name, birth date and sex as the tags tell them, folded for comparison; empty where the name
    #: or the birth date is absent. Never goes into a message or a file.
    person: str = field(default="", repr=False)

    @property
    def is_image(self) -> bool:
        """Whether this is a picture of a patient rather than something drawn or written on one."""
        return self.rows > 0 and self.columns > 0 and self.modality not in _NOT_IMAGES

    @property
    def is_segmentation(self) -> bool:
        """Whether this is a DICOM SEG object."""
        return self.modality == "SEG"


def read_header(path: Path) -> Header | None:
    """Read one file's header; None for a DICOMDIR.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` when the file ends or breaks before its series is known,
        ``data.too-large`` or ``data.missing``.
    """
    dataset, goes_on = open_header(path, tags=TAGS, last_group=_LAST_GROUP)
    return header_of(dataset, path, goes_on=goes_on)


def header_of(dataset: Any, path: Path, *, goes_on: bool) -> Header | None:
    """Take the header out of an opened file (:data:`TAGS`); None for a DICOMDIR.

    Parameters
    ----------
    goes_on : bool
        Whether anything follows the header: an image's pixels should.

    Raises
    ------
    ConsiliumError
        As :func:`read_header`.
    """
    with reading(path, "DICOM file"), quietly():
        if is_directory(dataset):
            return None
        # Once for all: asking a dataset by keyword costs more than the conversion.
        said = {element.keyword: element.value for element in dataset}
        if not said.get("SeriesInstanceUID") or not said.get("SOPInstanceUID"):
            raise ConsiliumError(
                "data.truncated",
                "The DICOM file does not say which series it belongs to: it ends early, or was "
                "stripped.",
                where=str(path),
                hint="Copy or export it again from its source.",
            )
        kind = dataset.file_meta.get("MediaStorageSOPClassUID", "")
        header = Header(
            path=path,
            sop_class=str(said.get("SOPClassUID", kind)),
            sop_instance=str(said["SOPInstanceUID"]),
            series=str(said["SeriesInstanceUID"]),
            frame_of_reference=str(said.get("FrameOfReferenceUID") or ""),
            patient_id=str(said.get("PatientID") or "").strip(),
            modality=str(said.get("Modality") or "").strip().upper(),
            rows=int(said.get("Rows") or 0),
            columns=int(said.get("Columns") or 0),
            frames=int(said.get("NumberOfFrames") or 1),
            position=numbers(said.get("ImagePositionPatient"), 3),
            orientation=numbers(said.get("ImageOrientationPatient"), 6),
            pixel_spacing=numbers(said.get("PixelSpacing"), 2)
            or numbers(said.get("ImagerPixelSpacing"), 2),
            slice_thickness=float(said["SliceThickness"]) if said.get("SliceThickness") else None,
            referenced_series=tuple(
                str(item.SeriesInstanceUID)
                for item in said.get("ReferencedSeriesSequence") or ()
                if item.get("SeriesInstanceUID")
            ),
            segments=tuple(
                (int(item.SegmentNumber), str(item.get("SegmentLabel") or item.SegmentNumber))
                for item in said.get("SegmentSequence") or ()
                if item.get("SegmentNumber") is not None
            ),
            study=str(said.get("StudyInstanceUID") or ""),
            study_date=str(said.get("StudyDate") or ""),
            series_description=str(said.get("SeriesDescription") or ""),
            scanner=_scanner(said),
            photometric=str(said.get("PhotometricInterpretation") or ""),
            burned_in=str(said.get("BurnedInAnnotation") or "").strip().upper(),
            image_type=_words(said.get("ImageType")),
            person=_person(said),
        )
    # By its class, not by what was read of it: a cut header must not pass as "no image".
    if not (goes_on and header.rows > 0 and header.columns > 0) and _stores_images(header):
        raise ConsiliumError(
            "data.truncated",
            "The DICOM image ends before its pixels.",
            where=str(path),
            hint="Copy or export it again from its source.",
        )
    return header


def _stores_images(header: Header) -> bool:
    from pydicom.uid import UID

    return str(UID(header.sop_class).name).endswith("Image Storage")


def index_files(
    paths: Iterable[Path],
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> tuple[list[Header], list[Finding]]:
    """Read the headers of all DICOM files among ``paths``; others are passed over.

    A file called ``.dcm`` that is not DICOM is a finding: its name says that it should be.

    Parameters
    ----------
    paths : iterable of Path
        Any files.
    progress : callable, optional
        Told how many files are done and how many there are.
    workers : int, optional
        Processes to read with (default: one per core for many files, none for a few). The result
        does not depend on it.

    Returns
    -------
    (headers, findings)
        In the order of ``paths``.
    """
    from consilium_client.data.parallel import spread  # a reader has no use for it

    listed = list(paths)
    headers: list[Header] = []
    findings: list[Finding] = []
    for done, entry in enumerate(spread(index_one, listed, workers=workers), start=1):
        if isinstance(entry, Header):
            headers.append(entry)
        elif entry is not None:
            findings.append(entry)
        if progress is not None and (done % _TOLD_EVERY == 0 or done == len(listed)):
            progress(done, len(listed))
    return headers, findings


def index_one(
    path: Path, read: Callable[[Path], Header | None] | None = None, content: bytes | None = None
) -> Header | Finding | None:
    """Read one file's header as :func:`index_files` does, by ``read`` (default: `read_header`).

    ``content`` is the whole file, where it has been read.
    """
    named = path.suffix.lower() == ".dcm"
    try:
        prefixed = has_prefix(_start_of(path) if content is None else content[:132])
        if not prefixed and not is_dicom(path):
            return Finding.of(path.parent.name, _misnamed(path)) if named else None
        return (read or read_header)(path)
    except OSError:
        return None if not named else Finding.of(path.parent.name, _misnamed(path))
    except ConsiliumError as error:
        # Without the prefix it was a guess that the file is DICOM: only its name can claim it.
        return Finding.of(path.parent.name, error) if prefixed or named else None


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(132)


def _misnamed(path: Path) -> ConsiliumError:
    return ConsiliumError(
        "data.truncated",
        "The file is called .dcm and is not DICOM (its first 132 bytes are not a prefix).",
        where=str(path),
        hint="Copy or export it again from its source, or take it out of the folder.",
    )


def files_below(folder: Path) -> list[Path]:
    """Return all visible files below ``folder``, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def files_in(folder: Path) -> list[Path]:
    """Return the visible files of one folder, sorted by path."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_file()]
    return [folder / name for name in sorted(names)]


def _words(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(word) for word in value)


def _scanner(said: Mapping[str, Any]) -> str:
    """Return manufacturer and model; without a text that somebody wrote the patient into."""
    names = words_of_name(str(said.get("PatientName") or ""))
    patient = searcher(names | words_of_number(str(said.get("PatientID") or "")))
    texts = (str(said.get(n) or "").strip() for n in ("Manufacturer", "ManufacturerModelName"))
    return " ".join(text for text in texts if text and not mentions(text, patient))


def _person(said: Mapping[str, Any]) -> str:
    """Return who the tags say the patient is; empty unless they say both name and birth date."""
    name = "".join(filter(str.isalnum, str(said.get("PatientName") or ""))).casefold()
    born = str(said.get("PatientBirthDate") or "").strip()
    sex = str(said.get("PatientSex") or "").strip().upper()
    return f"{name}|{born}|{sex}" if name and born else ""


def numbers(value: Any, count: int) -> Any:
    """Return an element's ``count`` numbers as a tuple; None when it has another number."""
    if value is None or value == "" or len(value) != count:
        return None
    return tuple(float(number) for number in value)
