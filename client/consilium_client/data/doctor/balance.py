"""Whether a cohort is large enough and its classes frequent enough to teach anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.manifest import Manifest
from consilium_client.data.match import class_names
from consilium_client.data.split import PatientKey
from consilium_common.report.wording import plural

#: With fewer patients the noise that hides one of them is of the size of what they teach.
_TINY: Final = 20
_FEW: Final = 5
_RARE: Final = 0.02


def classes_by_case(
    manifest: Manifest, entries: Mapping[str, Ingested]
) -> dict[str, tuple[str, ...]]:
    """Return each good case's classes, by local name; for masks those that occur in it."""
    site = manifest.site
    if site.label_kind == "class":
        return {
            case.case_id: class_names(case.label, site)
            for case in manifest.cases
            if case.case_id in entries
        }
    names = {value: name for name, value in site.labels.items() if value != 0}
    return {
        case: tuple(names[value] for value in entry.label_counts if value in names)
        for case, entry in entries.items()
    }


def size_findings(manifest: Manifest, key: PatientKey) -> tuple[Finding, ...]:
    """Warn of a cohort with few patients."""
    patients = len({key.name(case.patient_id) for case in manifest.cases})
    if patients >= _TINY:
        return ()
    return (
        Finding(
            "",
            "data.tiny-cohort",
            f"The cohort has {plural(patients, 'patient')}.",
            "cases.csv",
            "Import more patients. A private study costs each of these more budget, or learns less "
            f"from them, than from {_TINY} or more; `consilium site review` says what one costs.",
        ),
    )


def class_findings(
    manifest: Manifest, classes: Mapping[str, Sequence[str]], key: PatientKey
) -> tuple[Finding, ...]:
    """Warn of classes that few patients have: under five and a tenth of them, or under 2 %."""
    patients: dict[str, set[str]] = {
        name: set()
        for name, value in manifest.site.labels.items()
        if manifest.site.label_kind == "class" or value != 0
    }
    everybody = set()
    for case in manifest.cases:
        if case.case_id not in classes:
            continue
        patient = key.name(case.patient_id)
        everybody.add(patient)
        for name in classes[case.case_id]:
            patients.setdefault(name, set()).add(patient)
    total = len(everybody)
    return tuple(
        Finding(
            "",
            "data.class-imbalance",
            f"One class is seen in {len(having)} of {plural(total, 'patient')}.",
            f"site.yaml: labels: {name}",
            "Add patients with this class, or agree with the study to weigh or merge it.",
        )
        for name, having in patients.items()
        if (len(having) < _FEW and len(having) < 0.1 * total) or len(having) < _RARE * total
    )
