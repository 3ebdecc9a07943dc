"""DICOM headers without pixels: the few facts that group, order and place the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import Finding, reading
from consilium_common.errors import ConsiliumError

_TAGS: Final = [
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
]
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


def is_dicom(path: Path) -> bool:
    """Whether the file has the DICOM prefix; many have no suffix at all."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path) -> Header | None:
    """Read one file's header; None for a DICOMDIR.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` when the file ends or breaks before its series is known, or
        ``data.missing``.
    """
    import pydicom

    with reading(path, "DICOM file"):
        dataset: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        kind = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
        if kind == "1.2.840.10008.1.3.10":
            return None
        if not dataset.get("SeriesInstanceUID") or not dataset.get("SOPInstanceUID"):
            raise ConsiliumError(
                "data.truncated",
                "The DICOM file ends before it says which series it belongs to.",
                where=str(path),
                hint="Copy or export it again from its source.",
            )
        return Header(
            path=path,
            sop_class=str(dataset.get("SOPClassUID", kind)),
            sop_instance=str(dataset.SOPInstanceUID),
            series=str(dataset.SeriesInstanceUID),
            frame_of_reference=str(dataset.get("FrameOfReferenceUID") or ""),
            patient_id=str(dataset.get("PatientID") or "").strip(),
            modality=str(dataset.get("Modality") or "").strip().upper(),
            rows=int(dataset.get("Rows") or 0),
            columns=int(dataset.get("Columns") or 0),
            frames=int(dataset.get("NumberOfFrames") or 1),
            position=_numbers(dataset.get("ImagePositionPatient"), 3),
            orientation=_numbers(dataset.get("ImageOrientationPatient"), 6),
            pixel_spacing=_numbers(dataset.get("PixelSpacing"), 2)
            or _numbers(dataset.get("ImagerPixelSpacing"), 2),
            slice_thickness=float(dataset.SliceThickness)
            if dataset.get("SliceThickness")
            else None,
            referenced_series=tuple(
                str(item.SeriesInstanceUID)
                for item in dataset.get("ReferencedSeriesSequence") or ()
                if item.get("SeriesInstanceUID")
            ),
            segments=tuple(
                (int(item.SegmentNumber), str(item.get("SegmentLabel") or item.SegmentNumber))
                for item in dataset.get("SegmentSequence") or ()
                if item.get("SegmentNumber") is not None
            ),
            study=str(dataset.get("StudyInstanceUID") or ""),
            study_date=str(dataset.get("StudyDate") or ""),
            series_description=str(dataset.get("SeriesDescription") or ""),
            scanner=" ".join(
                word
                for name in ("Manufacturer", "ManufacturerModelName")
                if (word := str(dataset.get(name) or "").strip())
            ),
            photometric=str(dataset.get("PhotometricInterpretation") or ""),
            burned_in=str(dataset.get("BurnedInAnnotation") or "").strip().upper(),
            image_type=_words(dataset.get("ImageType")),
            person=_person(dataset),
        )


def index_files(
    paths: Iterable[Path], *, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Header], list[Finding]]:
    """Read the headers of all DICOM files among ``paths``; others are passed over.

    A file called ``.dcm`` that is not DICOM is a finding: its name says that it should be.

    Returns
    -------
    (headers, findings)
        In the order of ``paths``.
    """
    headers: list[Header] = []
    findings: list[Finding] = []
    listed = list(paths)
    for number, path in enumerate(listed, start=1):
        if progress is not None and (number % 50 == 0 or number == len(listed)):
            progress(number, len(listed))
        if is_dicom(path):
            try:
                header = read_header(path)
            except ConsiliumError as error:
                findings.append(Finding.of(path.parent.name, error))
                continue
            if header is not None:
                headers.append(header)
        elif path.suffix.lower() == ".dcm":
            misnamed = ConsiliumError(
                "data.truncated",
                "The file is called .dcm and is not DICOM (its first 132 bytes are not a prefix).",
                where=str(path),
                hint="Copy or export it again from its source, or take it out of the folder.",
            )
            findings.append(Finding.of(path.parent.name, misnamed))
    return headers, findings


def files_below(folder: Path) -> list[Path]:
    """Return all visible files below ``folder``, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _words(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(word) for word in value)


def _person(dataset: Any) -> str:
    """Return who the tags say the patient is; empty unless they say both name and birth date."""
    name = "".join(filter(str.isalnum, str(dataset.get("PatientName") or ""))).casefold()
    born = str(dataset.get("PatientBirthDate") or "").strip()
    sex = str(dataset.get("PatientSex") or "").strip().upper()
    return f"{name}|{born}|{sex}" if name and born else ""


def _numbers(value: Any, count: int) -> Any:
    if value is None or value == "" or len(value) != count:
        return None
    return tuple(float(number) for number in value)
