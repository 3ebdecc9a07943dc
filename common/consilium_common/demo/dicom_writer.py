"""Write a scan as a hospital's archive would hold it: a CT series and a DICOM SEG object.

Every UID and every byte follows from the given identity, so that the same seed writes the same
files. Standards: DICOM PS3.3 A.3 (CT Image), C.7.6.2 (Image Plane), A.51 (Segmentation).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from consilium_common import __version__
from consilium_common.demo.anatomy import CLASSES
from consilium_common.demo.scanner import Scan, Scanner

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

#: Rescale intercept: stored value 0 is this many Hounsfield units.
INTERCEPT: Final = -1024
_DATE: Final = "20240115"
_TIME: Final = "101500"
#: What each class is in SNOMED CT, as highdicom's attributes of its code dictionary.
_PROPERTIES: Final = {
    "liver": ("Organ", "Liver"),
    "tumour": ("MorphologicallyAbnormalStructure", "Neoplasm"),
}


@dataclass(frozen=True)
class Identity:
    """Whose scan it is: an invented patient of an invented hospital.

    Parameters
    ----------
    institution, patient_id : str
        As they stand in the header.
    study : str
        Names this visit; with the two above it decides every UID.
    """

    institution: str
    patient_id: str
    study: str

    def uid(self, *what: str) -> str:
        """Return a UID of this visit's own: 2.25 and a UUID as an integer (PS3.5 B.2)."""
        text = "\0".join((self.institution, self.patient_id, self.study, *what))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        # Version 4 and variant bits, so that it is a UUID by the letter too.
        number = (number & ~(0xF << 76) & ~(0x3 << 62)) | (0x4 << 76) | (0x2 << 62)
        return f"2.25.{number}"


def write_series(scan: Scan, scanner: Scanner, identity: Identity, folder: Path) -> list[Dataset]:
    """Write one CT Image Storage file per slice into ``folder``; return them, feet to head.

    File names say nothing about the order, as in an archive's export; only the positions do.

    Parameters
    ----------
    scan : Scan
        Stored axes must run to the left, the back and the head (LPS).
    """
    if not (np.diag(scan.affine)[:3] > 0).all():
        raise ValueError("a DICOM series is written from a scan in LPS order")
    folder.mkdir(parents=True)
    stored = np.round((scan.hounsfield - INTERCEPT) / scan.step).astype(np.uint16)
    datasets = []
    for k in range(stored.shape[2]):
        dataset = _slice(scan, scanner, identity, k)
        dataset.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        name = hashlib.sha256(dataset.SOPInstanceUID.encode()).hexdigest()[:12]
        dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
        datasets.append(dataset)
    return datasets


def write_segmentation(scan: Scan, series: list[Dataset], identity: Identity, path: Path) -> None:
    """Write the scan's label as one DICOM SEG object that refers to ``series``."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    present = [name for value, name in enumerate(CLASSES) if value and (scan.label == value).any()]
    numbers = {CLASSES.index(name): number for number, name in enumerate(present, start=1)}
    lookup = np.zeros(len(CLASSES), np.uint8)
    for value, number in numbers.items():
        lookup[value] = number
    segmentation = hd.seg.Segmentation(
        source_images=series,
        pixel_array=np.ascontiguousarray(lookup[scan.label].transpose(2, 1, 0)),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment_number=numbers[CLASSES.index(name)],
                segment_label=name,
                segmented_property_category=getattr(codes.SCT, _PROPERTIES[name][0]),
                segmented_property_type=getattr(codes.SCT, _PROPERTIES[name][1]),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
            )
            for name in present
        ],
        series_instance_uid=identity.uid("seg", "series"),
        series_number=2,
        sop_instance_uid=identity.uid("seg", "instance"),
        instance_number=1,
        manufacturer="Consilium",
        manufacturer_model_name="Demo",
        software_versions=__version__,
        device_serial_number="0",
        content_label="LIVER",
        content_description="Liver and tumour",
    )
    _fix_moments(segmentation, identity)
    segmentation.save_as(path, enforce_file_format=True)


def _slice(scan: Scan, scanner: Scanner, identity: Identity, k: int) -> Dataset:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    columns, rows, slices = scan.hounsfield.shape
    across, down, through = scan.spacing
    position = scan.affine @ (0, 0, k, 1)

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = identity.uid("ct", str(k))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyDate": _DATE,
        "SeriesDate": _DATE,
        "AcquisitionDate": _DATE,
        "ContentDate": _DATE,
        "StudyTime": _TIME,
        "SeriesTime": _TIME,
        "AcquisitionTime": _TIME,
        "ContentTime": _TIME,
        "AccessionNumber": "",
        "Modality": "CT",
        "Manufacturer": scanner.manufacturer,
        "ManufacturerModelName": scanner.model,
        "InstitutionName": identity.institution,
        "ReferringPhysicianName": "",
        "StudyDescription": "CT upper abdomen (synthetic)",
        "SeriesDescription": "Portal venous phase",
        "PatientName": f"Synthetic^{identity.patient_id}",
        "PatientID": identity.patient_id,
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "Synthetic images: no person was scanned",
        "BurnedInAnnotation": "NO",
        "BodyPartExamined": "ABDOMEN",
        "PatientPosition": "HFS",
        "KVP": "120",
        "SliceThickness": _decimal(through),
        "ConvolutionKernel": "SOFT",
        "StudyInstanceUID": identity.uid("study"),
        "SeriesInstanceUID": identity.uid("ct", "series"),
        "FrameOfReferenceUID": identity.uid("frame"),
        "StudyID": "1",
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        # Scanned from the head down, as abdomens usually are.
        "InstanceNumber": slices - k,
        "ImagePositionPatient": [_decimal(one) for one in position[:3]],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PositionReferenceIndicator": "",
        "SliceLocation": _decimal(position[2]),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "PixelSpacing": [_decimal(down), _decimal(across)],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleIntercept": str(INTERCEPT),
        "RescaleSlope": str(scan.step),
        "RescaleType": "HU",
        "WindowCenter": "60",
        "WindowWidth": "360",
    }
    dataset = Dataset()
    dataset.file_meta = meta
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _decimal(value: float) -> str:
    """Format as a DICOM decimal string: three decimals, enough for every position we write."""
    return f"{value:.3f}"


def _fix_moments(segmentation: Dataset, identity: Identity) -> None:
    """Replace what highdicom draws from the clock and at random, so that equal seeds agree."""
    for keyword in ("ContentDate", "SeriesDate", "InstanceCreationDate"):
        if keyword in segmentation:
            setattr(segmentation, keyword, _DATE)
    for keyword in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
        if keyword in segmentation:
            setattr(segmentation, keyword, _TIME)
    organization = identity.uid("seg", "dimensions")
    for item in segmentation.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = organization
    for item in segmentation.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
    for item in segmentation.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = _DATE + _TIME
