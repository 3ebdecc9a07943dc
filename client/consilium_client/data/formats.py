"""The layouts of images on disk that an import knows, by the name ``--format`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: In the order in which they are tried: what says most about itself comes first.
FORMATS: Final[Mapping[str, str]] = {
    "csv": "a case list: case_id, patient_id, image, label",
    "nnunet": "nnU-Net's raw data: dataset.json, imagesTr/CASE_0000",
    "msd": "the Medical Segmentation Decathlon: dataset.json with its training pairs",
    "bids": "BIDS: sub-*/anat, with labels under derivatives",
    "pairs": "images/ and labels/ with files of one name",
    "folders": "one folder of pictures per class",
    "dicom": "DICOM files in any nesting, or a DICOMDIR",
}
