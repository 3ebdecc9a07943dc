"""From what an importer found, what a person says and what stood before, to a new manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from consilium_client.data.case_list import read_list, read_table
from consilium_client.data.importers.base import (
    NO_PATIENTS,
    Choices,
    Found,
    input_name,
    unique_inputs,
)
from consilium_client.data.ingest.run import IngestOutcome
from consilium_client.data.manifest import Manifest
from consilium_client.data.match import class_names, written_classes
from consilium_client.data.ranges import parse_number
from consilium_client.data.schema import Case, SiteManifest, SplitFractions
from consilium_client.data.site_file import explain
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural

#: So many different numbers in the label column are measurements rather than classes.
_MANY_NUMBERS: Final = 10


@dataclass(frozen=True)
class ImportOptions(Choices):
    """What a person may say about an import, beside how the layout is read.

    Parameters
    ----------
    format : str, optional
        Name of the importer; None detects it.
    site : str, optional
        Name of the site; None keeps the manifest's, or ``site.json``'s.
    labels : mapping
        Label name to value, as in site.yaml.
    skip_bad : bool
        Leave bad cases out instead of failing.
    replace : bool
        Permit another root than the manifest's.
    patients : Path, optional
        CSV with case_id and patient_id of every case, for layouts that name no patients.
    """

    format: str | None = None
    site: str | None = None
    labels: Mapping[str, int | str] = field(default_factory=dict)
    skip_bad: bool = False
    replace: bool = False
    patients: Path | None = None


def draft_manifest(
    home: SiteHome, found: Found, options: ImportOptions, old: Manifest | None
) -> Manifest:
    """Return the manifest of what was found; a person's names, classes, splits and covariates of
    an earlier import of the same folder stay.

    Raises
    ------
    ConsiliumError
        ``data.other-root`` for another folder than before without ``replace``,
        ``data.duplicate-case``; as for the list of patients; ``usage.inputs`` and
        ``usage.manifest``.
    """
    same = old is not None and old.root == found.root
    if old is not None and not same and not options.replace:
        raise ConsiliumError(
            "data.other-root",
            f"This site's {len(old.cases)} cases come from another folder.",
            where=str(old.root),
            hint="Give --replace to put the new folder in its place, or list both in one CSV file.",
        )
    before = old.site if old is not None and same else None
    inputs = _inputs(found, options, before)
    rename = dict(zip(found.inputs, inputs, strict=True))
    patients = _patients(options.patients, found)
    known = {case.case_id: case for case in old.cases} if old is not None and same else {}
    covariates = _covariates(found, before)
    cases = tuple(
        _case(case, known.get(case.case_id), covariates, rename, patients) for case in found.cases
    )
    _require_distinct(cases, found.root)
    return Manifest(
        _site(home, found, options, old=old, before=before, inputs=inputs), cases, found.root
    )


def _case(
    case: Case,
    before: Case | None,
    covariates: tuple[str, ...],
    rename: Mapping[str, str],
    patients: Mapping[str, str],
) -> Case:
    """Return a found case, with what a person has written about it since the last import."""
    facts = {**(before.covariates if before else {}), **case.covariates}
    return Case(
        case_id=case.case_id,
        patient_id=patients.get(case.case_id, case.patient_id),
        images={rename[name]: reference for name, reference in case.images.items()},
        label=case.label,
        split=case.split or (before.split if before else None),
        covariates={name: facts.get(name) for name in covariates},
    )


def _covariates(found: Found, before: SiteManifest | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*(before.covariates if before else ()), *found.covariates)))


def _require_distinct(cases: Sequence[Case], root: Path) -> None:
    counts = Counter(case.case_id for case in cases)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ConsiliumError(
            "data.duplicate-case",
            "Two images of the folder would be one case.",
            where=f"{root}: {twice}",
            hint="Take one of them away, or list the cases in a CSV file with names of their own.",
        )


def _site(
    home: SiteHome,
    found: Found,
    options: ImportOptions,
    *,
    old: Manifest | None,
    before: SiteManifest | None,
    inputs: tuple[str, ...],
) -> SiteManifest:
    labels = _labels(found, options, before)
    content = {
        "schema": "consilium/site/v1",
        "site": options.site or (old.site.site if old else _site_name(home)),
        "root": str(found.root),
        "inputs": list(inputs),
        "covariates": list(_covariates(found, before)),
        "label_kind": found.label_kind,
        "labels": labels,
        "classes": {
            name: to for name, to in (before.classes if before else {}).items() if name in labels
        },
        "split": old.site.split if old else SplitFractions(),
        "cache_quota_gib": old.site.cache_quota_gib if old else None,
    }
    try:
        return SiteManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ConsiliumError(
            "usage.manifest",
            f"site.yaml would not be valid: {explain(first)}.",
            hint="Say it otherwise: --site NAME, --input NAME, --covariate NAME=COLUMN, --label "
            "NAME=VALUE (for masks a number).",
        ) from error


def _inputs(found: Found, options: ImportOptions, before: SiteManifest | None) -> tuple[str, ...]:
    if options.inputs:
        if len(options.inputs) != len(found.inputs):
            raise ConsiliumError(
                "usage.inputs",
                f"{len(options.inputs)} inputs are named, the folder has {len(found.inputs)}.",
                hint="Give --input once per channel, in order.",
            )
        return unique_inputs(options.inputs)
    if before is not None and len(before.inputs) == len(found.inputs):
        return tuple(before.inputs)
    return found.inputs


def _labels(
    found: Found, options: ImportOptions, before: SiteManifest | None
) -> dict[str, int | str]:
    """Return label names to values; what a person has named before stays named so."""
    if options.labels:
        return dict(options.labels)
    labels = dict(found.labels or {})
    old = dict(before.labels) if before and before.label_kind == found.label_kind else {}
    if found.label_kind == "class" and found.labels is None:
        written = {name for case in found.cases for name in written_classes(case.label)}
        return {**old, **{name: name for name in sorted(written) if not _listed(name, before)}}
    if found.labels_by_name:
        # Segments go by name: values once given stay, new names get new values.
        kept = old or ({"background": 0} if labels else {})
        free = (n for n in range(1, 65536) if n not in kept.values())
        return {**kept, **{name: next(free) for name in labels if name not in kept}}
    named = {str(value): name for name, value in old.items()}
    merged = {named.get(str(value), name): value for name, value in labels.items()}
    return {**old, **merged} if not labels else merged


def _listed(written: str, before: SiteManifest | None) -> bool:
    """Whether site.yaml knows a class already, by its name, its value or a range."""
    if before is None or before.label_kind != "class":
        return False
    try:
        return bool(class_names(written, before))
    except ConsiliumError:
        return False


def notes_on(manifest: Manifest) -> tuple[str, ...]:
    """Return what a person should know about labels and covariates, without any patient's."""
    site, cases = manifest.site, manifest.cases
    notes = []
    numbers = [name for name in site.labels.values() if parse_number(str(name)) is not None]
    if site.label_kind == "class" and len(numbers) == len(site.labels) > _MANY_NUMBERS:
        notes.append(
            f"The labels are {len(numbers)} different numbers, each a class of its own. For "
            "classes by range give, for example, --label 'young=<40' --label 'old=>=40'."
        )
    for name in site.covariates if cases else ():
        values = [case.covariates.get(name) for case in cases]
        present = [value for value in values if value is not None]
        kind = "words" if any(isinstance(value, str) for value in present) else "numbers"
        lack = len(values) - len(present)
        notes.append(
            f"Covariate {name}: {kind}" + (f", missing in {plural(lack, 'case')}." if lack else ".")
        )
    return tuple(notes)


def with_value_names(manifest: Manifest, outcome: IngestOutcome) -> Manifest:
    """Name mask values by number where nobody has named them."""
    if manifest.site.label_kind != "mask" or manifest.site.labels:
        return manifest
    values = {0}
    for entry in outcome.entries.values():
        values.update(entry.label_values or ())
    labels = {"background" if value == 0 else f"value-{value}": value for value in sorted(values)}
    site = manifest.site.model_copy(update={"labels": labels})
    return Manifest(site, manifest.cases, manifest.root)


def _patients(path: Path | None, found: Found) -> dict[str, str]:
    """Read the list of patients: case_id to patient_id.

    Raises
    ------
    ConsiliumError
        ``data.missing``, ``data.cases`` or ``data.duplicate-case`` for the list itself;
        ``data.no-patient`` where it lacks a case whose patient nothing else tells.
    """
    if path is None:
        return {}
    header, rows = read_table(read_list(path, "list of patients"), where=str(path))
    if not {"case_id", "patient_id"} <= set(header):
        raise ConsiliumError(
            "data.cases",
            "The list of patients needs the columns case_id and patient_id.",
            where=f"{path}:1",
            hint="Name them so in its first line.",
        )
    patients: dict[str, str] = {}
    for line, row in rows:
        patient = row["patient_id"]
        if patient and patients.setdefault(row["case_id"], patient) != patient:
            raise ConsiliumError(
                "data.duplicate-case",
                "The list of patients gives one case to two patients.",
                where=f"{path}:{line}",
                hint="Keep the line that is right.",
            )
    lacking = [case.case_id for case in found.cases if case.case_id not in patients]
    if lacking and NO_PATIENTS in found.notes:
        raise ConsiliumError(
            "data.no-patient",
            f"The list of patients does not name the patient of {plural(len(lacking), 'case')}.",
            where=f"{path}: case {lacking[0]}" + (" and others" if len(lacking) > 1 else ""),
            hint="Give every case a line, in the spelling of case_id: one that is left out would "
            "count as a patient of its own.",
        )
    return patients


def _site_name(home: SiteHome) -> str:
    """Return the name under which the site joined, else one made from its folder."""
    try:
        config = json.loads(home.config.read_bytes())
        name = config.get("name") or config.get("site")
    except (OSError, ValueError, AttributeError):
        name = None
    return input_name(str(name or home.path.name or "site"))
