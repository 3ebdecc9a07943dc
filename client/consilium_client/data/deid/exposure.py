"""What one DICOM file gives away: names of tags and counts, never their values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from consilium_client.data.deid.elements import Found, read_dataset, walk
from consilium_client.data.deid.profile import (
    BASIC,
    DIRECT,
    FULL_DATES,
    MODIFIED_DATES,
    NAMES,
    NUMBERS,
    OPTIONS,
    REGISTERED,
    action_for,
    is_date,
    is_safe_private,
    weight_of,
)
from consilium_client.data.identifying import (
    is_dummy,
    looks_like,
    mentions,
    searcher,
    words_of_name,
    words_of_number,
)
from consilium_client.data.ingest.dicom_file import quietly

_FREE_TEXT: Final = frozenset({"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UN", "UT", "OB"})
#: A pseudonym is not a bare number: that is what a hospital's record number looks like.
_RECORD_NUMBER: Final = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class Exposure:
    """What a file gives away.

    Parameters
    ----------
    direct, indirect, private : tuple of str
        Labels of tags: keyword, number and the way through sequences.
    dates, uids : int
        How many dates and times, and how many UIDs of the original system, are in it.
    claimed : bool
        Whether the file says PatientIdentityRemoved = YES.
    words : frozenset of str
        The patient's own words, to search file names for; never shown.
    """

    direct: tuple[str, ...] = ()
    indirect: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    dates: int = 0
    uids: int = 0
    claimed: bool = False
    words: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.direct or self.indirect or self.private or self.dates or self.uids)


def examine_file(path: Path) -> Exposure:
    """Search a DICOM file.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing``, ``data.too-large`` or ``data.format``.
    """
    dataset = read_dataset(path, pixels=False)
    with quietly():
        return examine(dataset)


def examine(dataset: Any) -> Exposure:
    """Search a dataset and its file meta information at every depth by the basic profile.

    A tag counts when the profile removes, empties or replaces it and it holds more than a dummy.
    Options of the profile that the file declares are believed for what only helps to find a
    patient; never for what names one.
    """
    found = [*walk(getattr(dataset, "file_meta", None)), *walk(dataset)]
    claimed = str(dataset.get("PatientIdentityRemoved") or "").strip().upper() == "YES"
    declared = _declared(dataset)
    names, numbers = patient_words(found, claimed=claimed)
    pattern = searcher(names | numbers)
    kept = frozenset(
        word for option in OPTIONS.values() if option.code in declared for word in option.keywords
    )
    dates_kept = bool(declared & {MODIFIED_DATES.code, FULL_DATES.code})
    direct: dict[str, None] = {}
    repeated: dict[str, None] = {}
    indirect: dict[str, None] = {}
    private: dict[str, None] = {}
    dates = uids = 0
    for element in found:
        if _is_direct(element, claimed=claimed):
            direct[element.label] = None
            continue
        if element.vr in _FREE_TEXT and mentions(element.text(), pattern):
            repeated[f"{element.label} (repeats the patient's name or number)"] = None
            continue
        if element.is_private:
            if not _is_safe(element):
                private[element.label] = None
            continue
        action = action_for(element.tag, element.vr)
        if action is None or action == "enter" or not _tells(element):
            continue
        if is_date(element.vr):
            dates += not dates_kept
        elif action == "uid":
            ours = all(uid.startswith(("2.25.", REGISTERED)) for uid in element.text().split("\\"))
            uids += not ours and BASIC.code not in declared
        elif claimed and element.keyword in ("PatientName", "PatientID"):
            continue  # The pseudonym that stands in their place.
        elif element.keyword not in kept or (
            element.vr in _FREE_TEXT and looks_like(element.text())
        ):
            indirect[element.label] = None
    return Exposure(
        (*direct, *repeated), tuple(indirect), tuple(private), dates, uids, claimed, names | numbers
    )


def patient_words(found: list[Found], *, claimed: bool) -> tuple[frozenset[str], frozenset[str]]:
    """Return the words of the patient's names, and of the numbers the hospital knows them by.

    Parameters
    ----------
    claimed : bool
        The file says that the identity was removed: PatientID is then a pseudonym, unless it looks
        like a record number.
    """
    names: set[str] = set()
    numbers: set[str] = set()
    for element in found:
        if element.keyword in NAMES:
            names |= words_of_name(element.text())
        elif element.keyword in NUMBERS and _is_direct(element, claimed=claimed):
            numbers |= words_of_number(element.text())
    pseudonyms = {
        word
        for element in found
        if claimed and element.keyword == "PatientID" and not _is_direct(element, claimed=True)
        for word in words_of_name(element.text())
    }
    return frozenset(names - pseudonyms), frozenset(numbers)


def _is_direct(element: Found, *, claimed: bool) -> bool:
    if weight_of(element.keyword) != "direct" or not _tells(element):
        return False
    if element.keyword == "PatientID" and claimed:
        return _RECORD_NUMBER.fullmatch(element.text().strip()) is not None
    if element.keyword == "PatientName" and claimed:
        pseudonym = str(element.owner.get("PatientID") or "").strip()
        if pseudonym and element.text().strip() == pseudonym:
            return _RECORD_NUMBER.fullmatch(pseudonym) is not None
    return element.keyword in DIRECT


def _is_safe(element: Found) -> bool:
    group, number = element.tag >> 16, element.tag & 0xFFFF
    if 0x10 <= number <= 0xFF and element.vr != "SQ":
        return True  # A private creator: it names the vendor's block, and its elements count.
    if not _tells(element):
        return True
    creator = element.owner.get((group, number >> 8))
    return is_safe_private(group, number, str(creator.value if creator is not None else ""))


def _tells(element: Found) -> bool:
    """Whether the element holds more than nothing or a dummy."""
    if element.vr == "SQ":
        return bool(element.value)
    if element.vr in _FREE_TEXT or isinstance(element.value, str):
        return not is_dummy(element.text())
    if isinstance(element.value, bytes):
        return bool(element.value.strip(b"\0 "))
    text = element.text()
    return not is_dummy(text) if text else element.value not in (None, "", 0, 0.0, [])


def _declared(dataset: Any) -> frozenset[str]:
    """Return the codes of DeidentificationMethodCodeSequence."""
    items = dataset.get("DeidentificationMethodCodeSequence") or ()
    return frozenset(str(item.get("CodeValue") or "") for item in items)
