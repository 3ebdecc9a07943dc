"""Labels in the forms that hospitals have them, for tests: RTSTRUCT, fractional SEG, NRRD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from data_fixtures import rotation, write_slices
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.sources import Sources, read_image, read_label
from consilium_client.data.ingest.volume import Volume
from consilium_common.errors import ConsiliumError

TO_LPS = np.diag([-1.0, -1.0, 1.0])
VALUES = {"Liver": 7, "Tumour": 3}


def series(
    folder: Path, shape: tuple[int, int, int] = (8, 7, 6), seed: int = 1, **options: object
) -> tuple[Sources, Volume, list[Header], list[Path]]:
    """Write a series in ``folder/ct`` and read it."""
    values = np.random.default_rng(seed).integers(-900, 900, shape).astype(float)
    axes = rotation(np.random.default_rng(seed))
    paths = write_slices(folder / "ct", values, directions=axes, **options)
    sources = Sources(folder)
    return sources, *read_image(sources.find("ct")), paths


def refusal(
    sources: Sources, reference: str, image: Volume, slices: list[Header]
) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        read_label(sources.find(reference), image, slices, VALUES, "ct")
    return caught.value


def write_rtstruct(
    path: Path,
    slices: Sequence[Path],
    regions: Mapping[str, Sequence[np.ndarray]],
    *,
    kind: str = "CLOSED_PLANAR",
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write an RTSTRUCT on a series; regions hold contours of (points, 3) in LPS millimetres."""
    first = pydicom.dcmread(slices[0], stop_before_pixels=True)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.Modality = "RTSTRUCT"
    dataset.PatientID = first.PatientID
    dataset.StudyInstanceUID = first.StudyInstanceUID
    dataset.SeriesInstanceUID = generate_uid()
    series = Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    study = Dataset()
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence = []
    dataset.ROIContourSequence = []
    for number, (name, contours) in enumerate(regions.items(), start=1):
        region = Dataset()
        region.ROINumber = number
        region.ROIName = name
        region.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        dataset.StructureSetROISequence.append(region)
        drawn = Dataset()
        drawn.ReferencedROINumber = number
        drawn.ContourSequence = [_contour(points, kind) for points in contours]
        dataset.ROIContourSequence.append(drawn)
    for key, value in (changes or {}).items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _contour(points: np.ndarray, kind: str) -> Dataset:
    contour = Dataset()
    contour.ContourGeometricType = kind if len(points) > 1 else "POINT"
    contour.NumberOfContourPoints = len(points)
    contour.ContourData = [f"{value:.4f}" for value in np.asarray(points).ravel()]
    return contour


def write_segmentation(
    path: Path, slices: Sequence[Path], stack: np.ndarray, names: Sequence[str], kind: str
) -> Path:
    """Write a DICOM SEG of any kind from (columns, rows, slices, segments), or without the last
    axis for a label map.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(names, start=1)
    ]
    order = (2, 1, 0, 3)[: stack.ndim]
    highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(source) for source in slices],
        pixel_array=np.ascontiguousarray(np.transpose(stack, order)),
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="nobody",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
        max_fractional_value=200,
    ).save_as(path)
    return path


def write_nrrd_file(
    path: Path, values: np.ndarray, directions: np.ndarray, origin: np.ndarray, **fields: Any
) -> Path:
    """Write an NRRD in LPS; ``directions`` has one row per axis (of NaN where it is none of
    space's).
    """
    import nrrd

    header = {
        "space": "left-posterior-superior",
        "space directions": directions,
        "space origin": origin,
        "encoding": "gzip",
        **fields,
    }
    nrrd.write(str(path), values, {k: v for k, v in header.items() if v is not None})
    return path
