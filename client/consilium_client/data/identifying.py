"""What text gives away: dummies, the patient's own words elsewhere, dates and numbers in names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from datetime import date
from typing import Final

#: Values that say "removed", folded to letters and digits.
_DUMMIES: Final = frozenset(
    {
        *("anon", "anonym", "anonymized", "anonymised", "anonymous", "anonymousized"),
        *("deidentified", "dummy", "hidden", "masked", "na", "none", "noname", "null"),
        *("redacted", "removed", "unknown", "unspecified", "patient", "subject", "phantom"),
        *("000y", "000000", "00010101", "19000101", "000101010101010000000000"),
    }
)
#: Parts of names that are no name: they would be found everywhere.
_NO_NAMES: Final = frozenset({"mrs", "miss", "prof", "the", "van", "von", "der", "del", "and"})

#: What a cleaned structure is called: its number names nobody.
_NUMBERED: Final = re.compile(r"roi\d+")

_WORD: Final = re.compile(r"[^\W_]+")
_UID: Final = re.compile(r"\d+(?:\.\d+){4,}")
_UUID_UID: Final = re.compile(r"(?<![\d.])2\.25\.\d+(?![\d.]*\d)")
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
#: Keyed hashes, and the pseudonyms of :class:`~consilium_client.data.split.PatientKey`.
_HASH: Final = re.compile(
    r"(?<![0-9a-z])(?:[0-9a-f]{32,64}|[a-z2-7]{64})(?![0-9a-z])", re.IGNORECASE
)
_DATE: Final = re.compile(r"(?<!\d)(\d{4})([-_. ]?)(\d{2})\2(\d{2})(?!\d)")
_DAY_FIRST: Final = re.compile(r"(?<!\d)(\d{1,2})([-_.])(\d{1,2})\2(\d{4})(?!\d)")
DATES: Final = (_DATE, _DAY_FIRST)
LONG_NUMBER: Final = re.compile(r"[1-9]\d{5,}")
_PERSON: Final = re.compile(r"[^\W\d_]{2,}\^[^\W\d_]")


def folded(text: str) -> str:
    """Return the text in lower case without accents, for comparison."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).casefold()


def is_dummy(text: str) -> bool:
    """Whether a value tells nothing: empty, zeros, one repeated character, or a word for that."""
    plain = "".join(_WORD.findall(folded(text)))
    repeated = len(set(plain)) == 1 and (len(plain) > 1 or not plain.isalpha())
    return (
        plain.strip("0") == ""
        or repeated
        or plain in _DUMMIES
        or plain in ("o", "x")
        or _NUMBERED.fullmatch(plain) is not None
    )


def words_of_name(name: str) -> set[str]:
    """Return the words of a person's name that may be searched for."""
    if is_dummy(name):
        return set()
    words = {word for word in _WORD.findall(folded(name)) if len(word) > 2 and not is_dummy(word)}
    return words - _NO_NAMES


def words_of_number(number: str) -> set[str]:
    """Return a record number as it may be searched for; short ones would be found by chance."""
    plain = folded(number).strip()
    return {plain} if len(plain) > 3 and not is_dummy(number) else set()


def searcher(words: Iterable[str], *, inside: bool = False) -> re.Pattern[str] | None:
    """Return a pattern that finds any of the words in folded text; None without words.

    Parameters
    ----------
    inside : bool
        Find words of five letters and more inside longer ones too, as file names run them together
        (default: False).
    """
    listed = sorted(set(words), key=lambda word: (-len(word), word))
    if not listed:
        return None
    parts = [
        re.escape(word) if inside and len(word) > 4 else rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
        for word in listed
    ]
    return re.compile("|".join(parts))


def mentions(text: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether the text holds one of the words behind ``pattern``."""
    return pattern is not None and pattern.search(folded(text)) is not None


def looks_like(text: str) -> str:
    """Return what in a text may identify a patient: ``a name``, ``a date``, …; empty if nothing.

    Keyed hashes, UUIDs and UIDs made of a UUID (``2.25.``) hold no facts and are passed over.
    """
    rest = _HASH.sub(" ", _UUID.sub(" ", _UUID_UID.sub(" ", text)))
    uids = _UID.findall(rest)
    rest = _UID.sub(" ", rest)
    for pattern, order in zip(DATES, ((1, 3, 4), (4, 3, 1)), strict=True):
        for found in pattern.finditer(rest):
            year, month, day = (int(found.group(part)) for part in order)
            if _is_day(year, month, day):
                return "a date"
    if _PERSON.search(rest):
        return "a person's name"
    if any(len(uid) > 24 for uid in uids):
        return "a UID"
    return "a long number" if LONG_NUMBER.search(rest) else ""


def _is_day(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return 1900 < year < 2100
