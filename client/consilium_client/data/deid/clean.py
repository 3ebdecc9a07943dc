"""A DICOM dataset made clean by the basic profile; its pixels are not touched."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

from consilium_client.data.deid.elements import Found, walk
from consilium_client.data.deid.exposure import examine, patient_words
from consilium_client.data.deid.profile import (
    BASIC,
    EDITION,
    MODIFIED_DATES,
    OPTIONS,
    REGISTERED,
    Option,
    action_for,
    is_date,
)
from consilium_client.data.identifying import looks_like, mentions, searcher
from consilium_client.data.ingest.dicom_file import quietly
from consilium_client.data.split import PatientKey
from consilium_common.errors import ConsiliumError

_UID: Final = b"consilium/deid-uid/v1\0"
_SHIFT: Final = b"consilium/deid-shift/v1\0"
#: Dates move back by one day to about ten years.
_LONGEST_SHIFT: Final = 3650

#: Beside the odd groups: curves, overlays, signatures and padding hold nothing a study needs.
_REMOVED_GROUPS: Final = (0x5000, 0x6000)
_TRAILERS: Final = frozenset({0xFFFAFFFA, 0xFFFCFFFC})
_TEXT: Final = frozenset({"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_DUMMY_TEXT: Final = "REMOVED"
_DUMMIES: Final[Mapping[str, Any]] = {
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "CS": _DUMMY_TEXT,
    "UR": "",
    "DS": "0",
    "IS": "0",
    **dict.fromkeys(("FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"), 0),
    **dict.fromkeys(("AE", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), _DUMMY_TEXT),
}
#: Older patients are few enough to be found by their age.
_OLDEST: Final = 89


@dataclass(frozen=True)
class Rules:
    """How a copy is made.

    Parameters
    ----------
    longitudinal : bool
        Keep the time between a patient's studies: dates are moved, not removed.
    keep : tuple of str
        Keys of :data:`~consilium_client.data.deid.profile.OPTIONS`, sorted.
    """

    longitudinal: bool = False
    keep: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[Option, ...]:
        """The profile's options in use, the basic profile first."""
        dates = (MODIFIED_DATES,) if self.longitudinal else ()
        return (BASIC, *(OPTIONS[name] for name in self.keep), *dates)

    def to_dict(self) -> dict[str, Any]:
        """Return the rules for the log."""
        return {"longitudinal": self.longitudinal, "keep": list(self.keep), "edition": EDITION}


def new_uid(key: PatientKey, uid: str) -> str:
    """Return the UID that stands for ``uid`` in every copy this site makes (``2.25.`` + 128 bit).

    UIDs of the standard itself stay what they are.
    """
    plain = uid.strip("\0 ")
    if plain.startswith(REGISTERED):
        return plain
    mac = hmac.new(key.secret, _UID + plain.encode(), hashlib.sha256).digest()
    return f"2.25.{int.from_bytes(mac[:16], 'big')}"


def days_back(key: PatientKey, patient: str) -> int:
    """Return by how many days this patient's dates move into the past: 1 to 3650."""
    mac = hmac.new(key.secret, _SHIFT + key.name(patient).encode(), hashlib.sha256).digest()
    return 1 + int.from_bytes(mac[:8], "big") % _LONGEST_SHIFT


def clean_dataset(dataset: Any, key: PatientKey, rules: Rules) -> Counter[str]:
    """Clean a dataset in place.

    Returns
    -------
    Counter of str
        Tags removed, emptied or replaced, by keyword or number, with how often.

    Raises
    ------
    ConsiliumError
        ``data.no-patient`` without PatientID; ``data.format`` when the result would still name the
        patient.
    """
    patient = str(dataset.get("PatientID") or "").strip()
    if not patient:
        raise ConsiliumError(
            "data.no-patient",
            "The DICOM file has no PatientID: its pseudonym cannot be made.",
            hint="Write the PatientID at its source, and export the file again.",
        )
    with quietly():
        return _clean(dataset, key, rules, patient)


def _clean(dataset: Any, key: PatientKey, rules: Rules, patient: str) -> Counter[str]:
    found = list(walk(dataset))
    claimed = str(dataset.get("PatientIdentityRemoved") or "").strip().upper() == "YES"
    names, numbers = patient_words(found, claimed=claimed)
    pseudonym = key.pseudonym(patient)
    cleaner = _Cleaner(
        key=key,
        rules=rules,
        shift=days_back(key, patient),
        kept=frozenset(word for option in rules.options for word in option.keywords),
        pattern=searcher(names | numbers),
    )
    done: Counter[str] = Counter()
    for element in found:
        if element.tag in element.owner and cleaner.clean(element):
            done[element.keyword or element.label] += 1
    dataset.PatientName = pseudonym
    dataset.PatientID = pseudonym
    _declare(dataset, rules)
    _clean_meta(dataset, key)
    left = examine(dataset)
    if not left.clean:
        # The tags alone: what they hold is what must not be shown.
        raise ConsiliumError(
            "data.format",
            "The cleaned file would still name the patient: "
            f"{', '.join((*left.direct, *left.indirect, *left.private)[:5]) or 'dates or UIDs'}.",
            hint="Leave the file out, and report this: a rule is missing.",
        )
    return done


@dataclass(frozen=True)
class _Cleaner:
    key: PatientKey
    rules: Rules
    shift: int
    kept: frozenset[str]
    pattern: re.Pattern[str] | None

    def clean(self, element: Found) -> bool:
        """Clean one element in its dataset; return whether anything changed."""
        owner, tag = element.owner, element.tag
        group = tag >> 16
        if (
            element.is_private
            or (tag & 0xFFFF) == 0
            or group & 0xFF00 in _REMOVED_GROUPS
            or tag in _TRAILERS
            or element.vr == "UN"
        ):
            del owner[tag]
            return True
        action = action_for(tag, element.vr)
        if action == "uid" or (action is None and element.vr == "UI" and self._is_foreign(element)):
            return self._replace_uids(element)
        if action in ("remove", "empty", "dummy"):
            return self._by_profile(element, action)
        if element.vr in _TEXT and mentions(element.text(), self.pattern):
            owner[tag].value = _DUMMY_TEXT
            return True
        return False

    def _is_foreign(self, element: Found) -> bool:
        """Whether a UID outside the table refers to an object rather than to the standard."""
        return element.keyword.endswith("InstanceUID")

    def _replace_uids(self, element: Found) -> bool:
        data = element.owner[element.tag]
        uids = [uid for uid in element.text().split("\\") if uid]
        if uids:
            new = [new_uid(self.key, uid) for uid in uids]
            data.value = new if len(new) > 1 else new[0]
        return bool(uids)

    def _by_profile(self, element: Found, action: str) -> bool:
        owner, tag, text = element.owner, element.tag, element.text()
        if self.rules.longitudinal and is_date(element.vr) and "Birth" not in element.keyword:
            return self._move_date(element)
        if element.keyword in self.kept:
            if element.keyword == "PatientAge":
                return _cap_age(owner)
            telling = element.vr in _TEXT and looks_like(text)
            if not telling and not mentions(text, self.pattern):
                return False
            owner[tag].value = _DUMMY_TEXT
            return True
        before = bool(text) or element.value not in (None, "", b"")
        if action == "remove":
            del owner[tag]
        elif element.keyword == "ROIName":
            # A structure without a name is nothing; its number names nobody.
            owner[tag].value = f"ROI {owner.get('ROINumber', 1)}"
        elif action == "dummy" and element.vr in _DUMMIES:
            owner[tag].value = _DUMMIES[element.vr]
        else:
            owner[tag].value = None
        return before

    def _move_date(self, element: Found) -> bool:
        if element.vr == "TM":
            return False
        data = element.owner[element.tag]
        moved = [_moved(part, self.shift) for part in element.text().split("\\")]
        data.value = moved if len(moved) > 1 else moved[0]
        return True


def _moved(written: str, days: int) -> str:
    """Return a DA or DT moved back by whole days; empty where it is no date."""
    plain = written.strip().replace(".", "", 2) if written[4:5] == "." else written.strip()
    try:
        day = date(int(plain[:4]), int(plain[4:6]), int(plain[6:8]))
        return (day - timedelta(days=days)).strftime("%Y%m%d") + plain[8:]
    except (ValueError, OverflowError):
        return ""


def _cap_age(owner: Any) -> bool:
    written = str(owner.PatientAge or "")
    if re.fullmatch(r"\d{3}Y", written) and int(written[:3]) > _OLDEST:
        owner.PatientAge = f"{_OLDEST + 1:03d}Y"
        return True
    return False


def _declare(dataset: Any, rules: Rules) -> None:
    """Say in the file what was done, as PS3.15 E.1.1 asks."""
    from pydicom.dataset import Dataset

    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = f"Consilium, PS3.15 E.1 {EDITION}"
    codes = []
    for option in rules.options:
        item = Dataset()
        item.CodeValue = option.code
        item.CodingSchemeDesignator = "DCM"
        item.CodeMeaning = option.meaning
        codes.append(item)
    dataset.DeidentificationMethodCodeSequence = codes
    dataset.LongitudinalTemporalInformationModified = (
        "MODIFIED" if rules.longitudinal else "REMOVED"
    )


def _clean_meta(dataset: Any, key: PatientKey) -> None:
    """Leave in the file's meta information what a reader needs, and nothing of who wrote it."""
    from pydicom.dataset import FileMetaDataset

    old = dataset.file_meta
    new = FileMetaDataset()
    new.MediaStorageSOPClassUID = dataset.SOPClassUID
    new.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    new.TransferSyntaxUID = old.TransferSyntaxUID
    dataset.file_meta = new
    dataset.preamble = bytes(128)
