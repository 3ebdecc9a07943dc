"""DICOM and NIfTI files full of a patient that never was, for the tests of de-identification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from data_fixtures import write_slices
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset

from consilium_client.data.ingest.dicom_file import quietly

#: Words found nowhere else: whatever holds one of them has it from the patient.
SURNAME = "Quellenzwirbel"
GIVEN = "Xanthippa"
NAME = f"{SURNAME}^{GIVEN}"
NUMBER = "KH-7340-5519"
WORDS = (SURNAME, GIVEN, NUMBER)

_TEXTS = {"LO", "SH", "LT", "ST", "UT", "UC", "PN"}
#: What identifies the file to a reader, and what the clean copy says of itself.
_NOT_PLANTED = {"SpecificCharacterSet", "PatientName", "PatientID"}


def text_tags() -> Iterator[tuple[int, str]]:
    """Yield (tag, VR) of every text attribute in the standard's dictionary, groups 0008 to 5000."""
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        known = vr in _TEXTS and not retired and keyword and keyword not in _NOT_PLANTED
        if known and 0x00080000 <= tag < 0x50000000:
            yield tag, vr


def identity_everywhere(dataset: Any) -> None:
    """Plant the patient in every text attribute, in nested sequences, private tags and trailers."""
    dataset.PatientName, dataset.PatientID = NAME, NUMBER
    dataset.PatientBirthDate = "19570312"
    for tag, vr in text_tags():
        dataset.add_new(tag, vr, NAME if vr == "PN" else f"of {GIVEN} {SURNAME}")
    dataset.OperatorsName = [NAME, NAME]
    inner, deep = Dataset(), Dataset()
    deep.PatientName = NAME
    deep.TextValue = f"{SURNAME}, {NUMBER}"
    inner.ConceptNameCodeSequence = [deep]
    inner.ImageComments = f"see {NUMBER}"
    dataset.AnatomicRegionSequence = [inner]
    block = dataset.private_block(0x0029, f"MAKER OF {SURNAME}", create=True)
    block.add_new(0x01, "LO", f"Mrs {SURNAME}")
    block.add_new(0x02, "UN", f"{NAME} {NUMBER}".encode())
    nested = Dataset()
    nested.PatientName = NAME
    block.add_new(0x03, "SQ", [nested])
    dataset.add_new(0x60000022, "LO", f"Overlay of {SURNAME}")
    dataset.add_new(0x60004000, "LT", f"{GIVEN} {SURNAME}")
    dataset.add_new(0xFFFCFFFC, "OB", f"{SURNAME} {NUMBER} ".encode())


def planted_series(folder: Path, *, count: int = 3, patient: str = NUMBER) -> list[Path]:
    """Write a small CT series whose every text names the patient."""
    values = np.random.default_rng(3).integers(-1000, 1000, (12, 10, count))
    paths = write_slices(folder, values.astype(float), patient=patient)
    with quietly():
        for path in paths:
            dataset = pydicom.dcmread(path)
            identity_everywhere(dataset)
            dataset.PatientID = patient
            dataset.file_meta.SourceApplicationEntityTitle = SURNAME[:16].upper()
            dataset.preamble = SURNAME.encode().ljust(128, b"\0")
            dataset.save_as(path, enforce_file_format=True)
    return paths


def holds(content: bytes, *words: str) -> list[str]:
    """Return which of the patient's words the bytes hold, in any case and in 8 or 16 bits."""
    low = content.lower()
    wide = low.replace(b"\0", b"")
    return [w for w in words or WORDS if w.lower().encode() in low or w.lower().encode() in wide]
