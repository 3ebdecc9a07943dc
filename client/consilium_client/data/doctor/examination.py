"""All rules over one site's cohort: what the ingest refused, and what only the whole shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from consilium_client.data.doctor.balance import class_findings, classes_by_case, size_findings
from consilium_client.data.doctor.identity import scan
from consilium_client.data.doctor.memory import Memory
from consilium_client.data.doctor.patients import (
    same_image_findings,
    two_identifiers_findings,
    two_splits_findings,
)
from consilium_client.data.doctor.study_fit import (
    background_findings,
    covariate_channels_of,
    unfit_findings,
)
from consilium_client.data.doctor.values import (
    blank_findings,
    intensity_findings,
    orientation_findings,
    scanner_findings,
    unit_findings,
)
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.run import IngestOutcome
from consilium_client.data.ingest.sources import Sources
from consilium_client.data.manifest import Manifest
from consilium_client.data.split import PatientKey
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.study.schema import Study


def examine(
    home: SiteHome,
    manifest: Manifest,
    outcome: IngestOutcome,
    sources: Sources,
    key: PatientKey,
    *,
    study: Study | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Finding, ...]:
    """Return every finding, errors first, each group in the cohort's order.

    Reads no pixels: what the ingest remembers of them is enough. Files' headers are read where
    they have changed since the last examination.

    Parameters
    ----------
    outcome : IngestOutcome
        Of an ingest of this manifest just now.
    study : Study, optional
        What the cases must fit besides.
    progress : callable, optional
        Called with (files whose tags are scanned, files).

    Raises
    ------
    ConsiliumError
        ``state.disk``.
    """
    memory = Memory.open(home)
    try:
        told = scan(manifest, sources, key, memory, progress=progress)
    finally:  # also an interrupted scan is not done again
        memory.save()
    entries, cases = outcome.entries, manifest.cases
    classes = classes_by_case(manifest, entries)
    by_column = classes if manifest.site.label_kind == "class" else {}
    return sorted_findings(
        (
            *outcome.findings,
            *two_splits_findings(manifest, key),
            *same_image_findings(cases, entries, key),
            *two_identifiers_findings(cases, told.persons, key),
            *(_of_study(manifest, outcome, study) if study is not None else ()),
            *size_findings(manifest, key),
            *class_findings(manifest, classes, key),
            *blank_findings(entries),
            *unit_findings(entries),
            *intensity_findings(entries),
            *orientation_findings(entries),
            *scanner_findings(entries, by_column),
            *told.findings,
        )
    )


def sorted_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return errors before warnings, and the findings of one rule together."""
    first: dict[str, int] = {}
    for number, finding in enumerate(findings):
        first.setdefault(finding.code, number)
    return tuple(
        sorted(findings, key=lambda one: (one.severity != "error", first[one.code]))  # stable
    )


def _of_study(manifest: Manifest, outcome: IngestOutcome, study: Study) -> tuple[Finding, ...]:
    try:
        return (
            *unfit_findings(manifest, outcome.entries, study),
            *covariate_channels_of(manifest, study)[1],
            *background_findings(manifest, outcome.entries, study),
        )
    except ConsiliumError as error:  # the site's names do not match the study's
        return (Finding.of("", error),)
