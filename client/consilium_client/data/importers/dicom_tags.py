"""A class, a number or a covariate from a DICOM tag; a tag that names the patient is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consilium_client.data.deid.profile import OPTIONS, action_for
from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ranges import parse_number
from consilium_common.errors import ConsiliumError

_BY_NUMBER: Final = re.compile(r"\(?\s*([0-9a-fA-F]{4})\s*,?\s*([0-9a-fA-F]{4})\s*\)?")
_AGE: Final = re.compile(r"(\d{3})([DWMY])")
#: Years in the units of a DICOM age (PS3.5 section 6.2, AS).
_YEARS: Final = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
#: What the profile removes and a study may still need: who the patient is like, not who they are.
_PERMITTED: Final = OPTIONS["characteristics"].keywords | OPTIONS["descriptors"].keywords
#: Sequences and bulk data are no class and no number.
_NO_VALUE: Final = frozenset({"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UI"})
_BEFORE_PIXELS: Final = 0x7FDF
_NAMES: Final = ("PatientID", "PatientName", "OtherPatientIDs", "AccessionNumber")


@dataclass(frozen=True)
class Tag:
    """One attribute: what a person calls it, and its number ``0xGGGGEEEE``."""

    written: str
    number: int


def parse_tag(text: str) -> Tag:
    """Read a keyword (``PatientAge``) or a number (``(0010,1010)``, private ones too).

    Raises
    ------
    ConsiliumError
        ``usage.tag`` for what is none; ``usage.identifying-tag`` for one that the basic profile of
        PS3.15 Annex E removes, except patient characteristics and descriptions.
    """
    from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

    plain = text.strip()
    match = _BY_NUMBER.fullmatch(plain)
    number = int(match[1] + match[2], 16) if match else tag_for_keyword(plain) if plain else None
    if number is None:
        raise ConsiliumError(
            "usage.tag",
            "This is not a DICOM tag.",
            where=text[:80],
            hint="Give its keyword, as PatientAge, or its number, as (0010,1010).",
        )
    if (number >> 16) % 2:  # private: the dictionary says nothing about it
        return Tag(plain, number)
    try:
        kind = dictionary_VR(number)
    except KeyError:
        kind = "UN"
    keyword = keyword_for_tag(number)
    if action_for(number, kind) is not None and keyword not in _PERMITTED:
        raise ConsiliumError(
            "usage.identifying-tag",
            f"The tag {keyword or plain[:20]} may identify a patient: it is not taken as a "
            "label or a covariate.",
            hint="If a study needs it, derive a value that names nobody and list the cases in a "
            "CSV file.",
        )
    if _NO_VALUE & set(kind.split(" or ")):
        raise ConsiliumError(
            "usage.tag",
            "The tag holds neither a word nor a number.",
            where=text[:80],
            hint="Name a tag with a word or a number, as PatientAge.",
        )
    return Tag(plain, number)


def tag_values(path: Path, tags: Sequence[Tag]) -> tuple[str, ...]:
    """Return what one file says under each tag, as text; empty where it says nothing.

    An age (``045Y``) is a number of years; several values are separated by ``|``.

    Raises
    ------
    ConsiliumError
        ``usage.identifying-tag`` where a value repeats the patient's name or an identifier, and
        ``data.truncated`` or ``data.missing``.
    """
    wanted = [*_NAMES, *(f"{tag.number:08x}" for tag in tags)]
    dataset = open_dicom(path, tags=wanted, last_group=_BEFORE_PIXELS)
    with reading(path, "DICOM file"), quietly():
        values = tuple(_text(dataset[tag.number]) if tag.number in dataset else "" for tag in tags)
        names = _identity(dataset)
    for tag, value in zip(tags, values, strict=True):
        if names & set(_words(value)):
            raise ConsiliumError(
                "usage.identifying-tag",
                f"The tag {tag.written[:40]} repeats the patient's name or identifier: it is not "
                "taken as a label or a covariate.",
                where=str(path),
                hint="Choose another tag, or list the cases in a CSV file.",
            )
    return values


def _identity(dataset: Any) -> frozenset[str]:
    """Return the words that name the patient in this file; short ones name nobody."""
    text = " ".join(str(dataset.get(name) or "") for name in _NAMES)
    return frozenset(word for word in _words(text) if len(word) > 3)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("_", " "))


def _text(element: Any) -> str:
    value = element.value
    if value is None:
        return ""
    if isinstance(value, bytes):  # a private element in implicit syntax: its type is unknown
        plain = value.rstrip(b"\0 ")
        return plain.decode("ascii").strip() if plain.isascii() and _printable(plain) else ""
    parts = value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
    return "|".join(_plain(str(part)) for part in parts)


def _plain(text: str) -> str:
    text = text.strip("\0 ")
    if age := _AGE.fullmatch(text):
        return f"{int(age[1]) * _YEARS[age[2]]:.6g}"
    number = parse_number(text)
    if number is None:
        return text.replace("|", ",").replace(";", ",")  # they would separate classes
    return repr(number).removesuffix(".0")  # 41, 41.0 and +41 are one number, and one class


def _printable(text: bytes) -> bool:
    return text.decode("ascii").isprintable()
