"""The basic profile of PS3.15 Annex E as data: what to do with each tag, and how grave it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

#: What happens to an element: remove it, empty it, give it a dummy, give it a new UID, or go into
#: the items of a sequence that is needed for its references.
Action = Literal["remove", "empty", "dummy", "uid", "enter"]
Weight = Literal["direct", "indirect"]

#: Edition of table E.1-1 that ``dicom-anonymizer`` ships and that we apply.
EDITION: Final = "2026c"

#: Root of the UIDs that the standard itself gives out.
REGISTERED: Final = "1.2.840.10008."

_ACTIONS: Final[Mapping[str, Action]] = {
    "X_TAGS": "remove",
    "Z_TAGS": "empty",
    "X_Z_TAGS": "empty",
    "D_TAGS": "dummy",
    "Z_D_TAGS": "dummy",
    "X_D_TAGS": "dummy",
    "X_Z_D_TAGS": "dummy",
    "U_TAGS": "uid",
    "X_Z_U_STAR_TAGS": "enter",
}

#: Tags that name the patient or a number under which a hospital finds them.
DIRECT: Final = frozenset(
    {
        "AccessionNumber",
        "AdmissionID",
        "ClinicalTrialSubjectID",
        "CountryOfResidence",
        "FillerOrderNumberImagingServiceRequest",
        "InsurancePlanIdentification",
        "IssuerOfPatientID",
        "MedicalRecordLocator",
        "OtherPatientIDs",
        "OtherPatientIDsSequence",
        "OtherPatientNames",
        "PatientAddress",
        "PatientBirthDate",
        "PatientBirthDateInAlternativeCalendar",
        "PatientBirthName",
        "PatientBirthTime",
        "PatientDeathDateInAlternativeCalendar",
        "PatientID",
        "PatientInsurancePlanCodeSequence",
        "PatientMotherBirthName",
        "PatientName",
        "PatientTelecomInformation",
        "PatientTelephoneNumbers",
        "PersonAddress",
        "PersonTelephoneNumbers",
        "PlacerOrderNumberImagingServiceRequest",
        "RegionOfResidence",
        "ResponsiblePerson",
        "ServiceEpisodeID",
    }
)

#: Direct identifiers whose words are searched for in every other text of the file.
NAMES: Final = ("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName")
NUMBERS: Final = ("PatientID", "OtherPatientIDs", "AccessionNumber", "MedicalRecordLocator")


@dataclass(frozen=True)
class Option:
    """An option of the profile: a code that files carry, and the tags it lets stay.

    Parameters
    ----------
    code, meaning : str
        Of context group CID 7050 (coding scheme DCM).
    keywords : frozenset of str
        Tags kept; further kinds of tag are ruled in the code.
    """

    code: str
    meaning: str
    keywords: frozenset[str]


BASIC: Final = Option("113100", "Basic Application Confidentiality Profile", frozenset())
FULL_DATES: Final = Option(
    "113106", "Retain Longitudinal Temporal Information Full Dates Option", frozenset()
)
MODIFIED_DATES: Final = Option(
    "113107", "Retain Longitudinal Temporal Information Modified Dates Option", frozenset()
)

#: What ``--keep`` may name.
OPTIONS: Final[Mapping[str, Option]] = {
    "descriptors": Option(
        "113105",
        "Clean Descriptors Option",
        frozenset(
            {
                "AcquisitionDeviceProcessingDescription",
                "AcquisitionProtocolDescription",
                "ContrastBolusAgent",
                "DerivationDescription",
                "PerformedProcedureStepDescription",
                "ProtocolName",
                "ROIDescription",
                "ROIName",
                "ROIObservationLabel",
                "RequestedProcedureDescription",
                "SeriesDescription",
                "StructureSetLabel",
                "StructureSetName",
                "StudyDescription",
            }
        ),
    ),
    "characteristics": Option(
        "113108",
        "Retain Patient Characteristics Option",
        frozenset(
            {
                "EthnicGroup",
                "PatientAge",
                "PatientSex",
                "PatientSize",
                "PatientWeight",
                "PregnancyStatus",
                "SmokingStatus",
            }
        ),
    ),
    "device": Option(
        "113109",
        "Retain Device Identity Option",
        frozenset(
            {
                "CassetteID",
                "DetectorID",
                "DeviceSerialNumber",
                "GantryID",
                "GeneratorID",
                "PlateID",
                "ScheduledStationName",
                "StationName",
            }
        ),
    ),
    "institution": Option(
        "113112",
        "Retain Institution Identity Option",
        frozenset({"InstitutionName", "InstitutionalDepartmentName"}),
    ),
}


@functools.cache
def _table() -> tuple[Mapping[int, Action], tuple[tuple[int, int], ...]]:
    """Return action by tag, and (value, mask) of the repeating groups that are removed."""
    from dicomanonymizer.dicomfields_selector import (  # type: ignore[import-untyped]
        dicom_anonymization_database_selector,
    )

    table = dicom_anonymization_database_selector(f"dicomfields_{EDITION}")
    actions: dict[int, Action] = {}
    repeating: list[tuple[int, int]] = []
    for category, action in _ACTIONS.items():
        for entry in table[category]:
            tag = entry[0] << 16 | entry[1]
            if len(entry) == 2:
                actions[tag] = action
            else:
                repeating.append((tag, entry[2] << 16 | entry[3]))
    return actions, tuple(repeating)


def action_for(tag: int, vr: str) -> Action | None:
    """Return what the basic profile does with a public element; None where it says nothing.

    A person's name, a date or a date with time is never left, even where the table is silent:
    the standard grows faster than the table.

    Parameters
    ----------
    tag : int
        Group and element, ``0x00100010``.
    vr : str
        Value representation, ``PN``.
    """
    actions, repeating = _table()
    action = actions.get(tag)
    if action is None and any(tag & mask == value for value, mask in repeating):
        action = "remove"
    if action is None and vr in ("PN", "DA", "DT"):
        return "empty"
    # Items of a listed sequence may hold anything; the images, segmentations and structure sets
    # that are copied need none of these sequences.
    if vr == "SQ" and action is not None and action != "enter":
        return "remove"
    return action


def weight_of(keyword: str) -> Weight:
    """Return whether a tag names the patient, or only helps to find them."""
    return "direct" if keyword in DIRECT else "indirect"


def is_date(vr: str) -> bool:
    """Whether the element tells a time."""
    return vr in ("DA", "DT", "TM")


#: Private elements known to hold physics and no text about a patient: (group, creator) -> low
#: bytes of the element. The part of table E.3.10-1 that CT, MR and PET scanners write most.
_SAFE_PRIVATE: Final[Mapping[tuple[int, str], frozenset[int]]] = {
    (0x0019, "SIEMENS MR HEADER"): frozenset(
        {0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F, *range(0x11, 0x19), 0x27, 0x28, 0x29}
    ),
    (0x0019, "GEMS_ACQU_01"): frozenset({0x23, 0x24, 0x27, 0x9E}),
    (0x0025, "GEMS_SERS_01"): frozenset({0x07}),
    (0x0043, "GEMS_PARM_01"): frozenset({0x27, 0x39, 0x6F}),
    (0x0045, "GEMS_HELIOS_01"): frozenset({0x01, 0x02}),
    (0x00E1, "ELSCINT1"): frozenset({0x21}),
    (0x01E1, "ELSCINT1"): frozenset({0x26, 0x50}),
    (0x01F1, "ELSCINT1"): frozenset({0x01, 0x07, 0x26, 0x27}),
    (0x2001, "Philips Imaging DD 001"): frozenset({0x03, 0x04}),
    (0x2005, "Philips MR Imaging DD 001"): frozenset({0x0D, 0x0E}),
    (0x7053, "Philips PET Private Group"): frozenset({0x00, 0x09}),
}


def is_safe_private(group: int, element: int, creator: str) -> bool:
    """Whether a private element is one of those that hold physics alone."""
    return element & 0xFF in _SAFE_PRIVATE.get((group, creator.strip()), frozenset())
