"""The names that a label file carries itself: DICOM SEG segments, RTSTRUCT regions, .seg.nrrd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import is_dicom, open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.nrrd import NAMED_SUFFIXES
from consilium_client.data.ingest.nrrd import segment_names as nrrd_names
from consilium_client.data.ingest.rtstruct import MODALITY as RTSTRUCT
from consilium_common.errors import ConsiliumError

_STRUCTURES: Final = ["Modality", "ReferencedFrameOfReferenceSequence", "StructureSetROISequence"]
_SEGMENTS: Final = ["Modality", "SegmentSequence"]
_LAST_GROUP: Final = 0x3006


@dataclass(frozen=True)
class Drawing:
    """A DICOM SEG or RTSTRUCT: the series it was drawn on, and its segments' or regions' names."""

    path: Path
    series: tuple[str, ...]
    names: tuple[str, ...]


def drawing_of(header: Header) -> Drawing | None:
    """Return what was drawn, or None where the object is neither a DICOM SEG nor an RTSTRUCT.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` or ``data.missing``.
    """
    if header.is_segmentation:
        names = tuple(name for _, name in header.segments)
        return Drawing(header.path, header.referenced_series, names)
    if header.modality != RTSTRUCT:
        return None
    dataset = open_dicom(header.path, tags=_STRUCTURES, last_group=_LAST_GROUP)
    with reading(header.path, RTSTRUCT), quietly():
        series = tuple(
            str(one.SeriesInstanceUID)
            for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for one in study.get("RTReferencedSeriesSequence") or ()
        )
        return Drawing(header.path, series, _regions(dataset))


def names_in(path: Path) -> tuple[str, ...]:
    """Return the names of a label file's segments; empty where it carries none, or is broken."""
    try:
        if path.name.lower().endswith(NAMED_SUFFIXES):
            with reading(path, "NRRD file"):
                return nrrd_names(path)
        if not path.is_file() or not is_dicom(path):
            return ()
        wanted = sorted({*_SEGMENTS, *_STRUCTURES})
        dataset = open_dicom(path, tags=wanted, last_group=_LAST_GROUP)
        with reading(path, "DICOM file"), quietly():
            if dataset.get("Modality") == RTSTRUCT:
                return _regions(dataset)
            return tuple(
                str(item.get("SegmentLabel") or item.SegmentNumber)
                for item in dataset.get("SegmentSequence") or ()
            )
    except ConsiliumError:
        return ()  # the ingest names the file and what is wrong with it


def segment_names(masks: Iterable[Path]) -> dict[str, int | str]:
    """Return a value for each name that the masks carry; empty unless every mask carries names."""
    found: list[str] = []
    for path in masks:
        names = names_in(path)
        if not names:
            return {}
        found += names
    return numbered(found)


def numbered(names: Sequence[str]) -> dict[str, int | str]:
    """Return label names to values, from 1 in the order given; empty where there is none."""
    plain = list(dict.fromkeys(name for name in names if name))
    if not plain:
        return {}
    return {"background": 0, **{name: value for value, name in enumerate(plain, start=1)}}


def _regions(dataset: Any) -> tuple[str, ...]:
    return tuple(
        str(item.get("ROIName") or item.ROINumber)
        for item in dataset.get("StructureSetROISequence") or ()
    )
