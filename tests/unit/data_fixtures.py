"""Small synthetic images for the tests of a site's data: DICOM series, NIfTI pairs, studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from consilium_client.home import SiteHome
from consilium_common.study.schema import Study

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def real(name: str) -> Path:
    """Return a folder of real images, or skip the test."""
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"the real images ../shared/data/{name} are not here")
    return folder


def home_in(folder: Path) -> SiteHome:
    """Return a fresh site in ``folder``."""
    return SiteHome.create(folder / "home")


def study(**changes: Any) -> Study:
    """Return a small valid study with ``changes`` of its top-level parts."""
    content: dict[str, Any] = {
        "schema": "consilium/study/v1",
        "name": "tested",
        "task": {
            "kind": "segmentation",
            "dimensions": 3,
            "inputs": ["ct"],
            "classes": ["background", "liver"],
        },
        "model": {"network": "unet"},
        "training": {"loss": "cross_entropy"},
        "privacy": {"mode": "none"},
    }
    content.update(changes)
    return Study.model_validate(content)


def classification(classes: Sequence[str], *, multi_label: bool = False, size: int = 16) -> Study:
    """Return a 2D classification study."""
    return study(
        task={
            "kind": "classification",
            "dimensions": 2,
            "inputs": ["image"],
            "classes": list(classes),
            "multi_label": multi_label,
        },
        preprocessing={"size": [size, size]},
        training={"loss": "bce" if multi_label else "cross_entropy"},
    )


def write_nifti(
    path: Path, values: np.ndarray, affine: np.ndarray | None = None, dtype: type = np.int16
) -> Path:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(
        nibabel.Nifti1Image(values.astype(dtype), np.eye(4) if affine is None else affine), path
    )
    return path


def write_pair(
    folder: Path, name: str, *, seed: int = 0, shape: Sequence[int] = (12, 10, 8)
) -> None:
    """Write ``images/<name>.nii.gz`` and ``labels/<name>.nii.gz`` with a box as label 1."""
    generator = np.random.default_rng(seed)
    image = generator.normal(50, 20, tuple(shape))
    label = np.zeros(tuple(shape))
    label[3:7, 2:6, 2:5] = 1
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    write_nifti(folder / "images" / f"{name}.nii.gz", image + 100 * label, affine)
    write_nifti(folder / "labels" / f"{name}.nii.gz", label, affine, np.uint8)


def write_list(folder: Path, rows: Sequence[Sequence[str]], header: str = "") -> Path:
    """Write a case list."""
    path = folder / "cases.csv"
    head = header or "case_id,patient_id,image,label"
    path.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
    return path


def write_pairs(folder: Path, count: int, *, patients: int | None = None) -> Path:
    """Write ``count`` NIfTI pairs and their list; patients have several cases if fewer."""
    rows = []
    for number in range(count):
        name = f"scan{number}"
        write_pair(folder, name, seed=number)
        patient = f"Patient-{number % (patients or count)}"
        rows.append((name, patient, f"images/{name}.nii.gz", f"labels/{name}.nii.gz"))
    write_list(folder, rows)
    return folder


def write_slices(
    folder: Path,
    values: np.ndarray,
    *,
    patient: str = "P-17",
    origin: Sequence[float] = (-20.0, -30.0, 40.0),
    directions: np.ndarray | None = None,
    spacing: Sequence[float] = (0.8, 0.7, 2.5),
    step: np.ndarray | None = None,
    slope: float = 1.0,
    intercept: float = -1024.0,
    names: Sequence[str] | None = None,
    series: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a CT series from (columns, rows, slices) of values in Hounsfield units.

    ``directions`` has the patient's (LPS) directions of columns index, rows index and slices as
    its columns; ``step`` overrides the vector between slices (a tilted gantry). InstanceNumber
    runs against the positions, as careless exports have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.eye(3) if directions is None else directions
    between = axes[:, 2] * spacing[2] if step is None else step
    series = series or generate_uid()
    frame = generate_uid()
    study_uid = generate_uid()
    paths = []
    count = values.shape[2]
    for number in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID = series
        dataset.StudyInstanceUID = study_uid
        dataset.FrameOfReferenceUID = frame
        dataset.PatientID = patient
        dataset.PatientName = "Doe^Unmistakable"
        dataset.PatientBirthDate = "19700101"
        dataset.PatientSex = "O"
        dataset.StudyID = "1"
        dataset.StudyDate = "20240101"
        dataset.StudyTime = "120000"
        dataset.ContentDate = "20240101"
        dataset.ContentTime = "120000"
        dataset.AccessionNumber = ""
        dataset.ReferringPhysicianName = ""
        dataset.Manufacturer = "nobody"
        dataset.PositionReferenceIndicator = ""
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Modality = "CT"
        dataset.SeriesNumber = 1
        dataset.InstanceNumber = count - number
        dataset.Rows, dataset.Columns = values.shape[1], values.shape[0]
        dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        dataset.SliceThickness = float(spacing[2])
        dataset.ImageOrientationPatient = [*map(float, axes[:, 0]), *map(float, axes[:, 1])]
        dataset.ImagePositionPatient = [float(x) for x in np.array(origin) + number * between]
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 1
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.RescaleType = "HU"
        dataset.KVP = 120
        dataset.AcquisitionNumber = 1
        for key, value in (changes or {}).items():
            setattr(dataset, key, value)
        stored = np.rint((values[:, :, number].T - intercept) / slope)
        kind = np.int16 if dataset.PixelRepresentation else np.uint16
        dataset.PixelData = stored.astype(kind).tobytes()
        path = folder / (names[number] if names else f"{(number * 7919) % 1000:03d}-{number}.dcm")
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def write_seg(path: Path, slices: Sequence[Path], label: np.ndarray, *segments: str) -> Path:
    """Write a DICOM SEG with one binary segment per name from (columns, rows, slices) values."""
    import highdicom
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(path) for path in slices]
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(segments, start=1)
    ]
    made = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(np.transpose(label, (2, 1, 0)).astype(np.uint8)),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="nobody",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
    )
    made.save_as(path)
    return path


def rotation(generator: np.random.Generator) -> np.ndarray:
    """Return a random rotation matrix, (3, 3)."""
    q, r = np.linalg.qr(generator.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q
