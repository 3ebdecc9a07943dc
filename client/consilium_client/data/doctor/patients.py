"""One person is one patient in one split: what breaks the unit that privacy is promised for."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from typing import Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.manifest import Manifest
from consilium_client.data.schema import Case
from consilium_client.data.split import PatientKey

_PERSON: Final = b"consilium/person/v1\0"
#: What de-identification and scanners' own tests write in place of a name, folded; whole words,
#: for there are people called Testa.
_NOT_NAMES: Final = re.compile(
    "(anon|anonym|anonymous|anonymi[sz]ed|deid|deidentified|unknown|noname|name|no|removed|phantom"
    "|qa|test|patient|subject|case|x+)*[0-9]*"
)
#: Nobody who is scanned today was born before; such dates stand for "not said".
_FIRST_YEAR: Final = "1905"
#: One person under more identifiers than this is a placeholder that many files carry.
_MOST_IDENTIFIERS: Final = 3
_SHOWN: Final = 8


def listed_cases(names: Sequence[str]) -> str:
    """Join the names of cases, the first few: ``a, b and 12 more``."""
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def two_splits_findings(manifest: Manifest, key: PatientKey) -> tuple[Finding, ...]:
    """Find patients whose cases cases.csv writes into different splits."""
    written: dict[str, dict[str, str]] = {}
    for case in manifest.cases:
        if case.split is not None:
            splits = written.setdefault(key.name(case.patient_id), {})
            splits.setdefault(case.split, case.case_id)
    return tuple(
        Finding(
            min(splits.values()),
            "data.two-splits",
            f"Cases of one patient are written into {' and '.join(sorted(splits))}.",
            f"cases.csv, cases {listed_cases(sorted(splits.values()))}",
            "Give all cases of a patient the same split, or leave the column empty.",
        )
        for splits in written.values()
        if len(splits) > 1
    )


def same_image_findings(
    cases: Sequence[Case], entries: Mapping[str, Ingested], key: PatientKey
) -> tuple[Finding, ...]:
    """Find images that stand in several cases: of two patients an error, of one a warning.

    Images of one single value are passed over: that they are alike says nothing.
    """
    places: dict[str, list[Case]] = {}
    for case in cases:
        entry = entries.get(case.case_id)
        if entry is None:
            continue
        hashes = {fact.pixel_hash for fact in entry.facts.values() if fact.low < fact.high}
        for pixels in sorted(hashes):
            places.setdefault(pixels, []).append(case)
    found: dict[tuple[str, ...], Finding] = {}  # two channels alike are one finding
    for alike in places.values():
        if len(alike) < 2:
            continue
        names = tuple(case.case_id for case in alike)
        patients = len({key.name(case.patient_id) for case in alike})
        where = f"cases.csv, cases {listed_cases(names)}"
        if patients > 1:
            found[names] = Finding(
                names[0],
                "data.same-image",
                f"The same pixels stand under {patients} patients.",
                where,
                "If they are one person, give these cases one patient_id; if a file was copied by "
                "mistake, leave it out.",
            )
        else:
            found[names] = Finding(
                names[0],
                "data.repeated-image",
                f"The same pixels stand in {len(names)} cases of one patient.",
                where,
                "Keep one of the cases.",
            )
    return tuple(found.values())


def person_name(person: str, key: PatientKey) -> str:
    """Return the keyed hash of who a header says the patient is; empty where it says nobody.

    Parameters
    ----------
    person : str
        :attr:`~consilium_client.data.ingest.dicom_headers.Header.person`.
    """
    name, _, rest = person.partition("|")
    born = rest.partition("|")[0]
    said = not _NOT_NAMES.fullmatch(name) and born > _FIRST_YEAR
    return (
        hmac.new(key.secret, _PERSON + person.encode(), hashlib.sha256).hexdigest() if said else ""
    )


def two_identifiers_findings(
    cases: Sequence[Case], persons: Mapping[str, Sequence[str]], key: PatientKey
) -> tuple[Finding, ...]:
    """Find people whom the tags show under several patient identifiers.

    Parameters
    ----------
    persons : mapping
        Case to the :func:`person_name` of each of its series.
    """
    people: dict[str, dict[str, str]] = {}  # person, patient, first case
    for case in cases:
        for person in persons.get(case.case_id, ()):
            patients = people.setdefault(person, {})
            patients.setdefault(key.name(case.patient_id), case.case_id)
    found = {
        tuple(patients.values())
        for patients in people.values()
        if 1 < len(patients) <= _MOST_IDENTIFIERS
    }
    return tuple(
        Finding(
            names[0],
            "data.two-identifiers",
            f"One person, by name and birth date in the tags, has {len(names)} patient "
            "identifiers.",
            f"cases.csv, cases {listed_cases(names)}",
            "If it is one person, give all these cases one patient_id in cases.csv.",
        )
        for names in sorted(found)
    )
