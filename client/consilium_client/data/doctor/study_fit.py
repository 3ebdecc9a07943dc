"""Which good cases do not fit a study: one rule for the check and for the start of training."""

from __future__ import annotations

from collections.abc import Mapping

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.manifest import Manifest
from consilium_client.data.match import Match, class_names, match_study
from consilium_client.data.schema import Case, SiteManifest
from consilium_common.errors import ConsiliumError
from consilium_common.study.covariates import encode
from consilium_common.study.schema import Study


def unfit_findings(
    manifest: Manifest, entries: Mapping[str, Ingested], study: Study
) -> tuple[Finding, ...]:
    """Find cases that are good in themselves and do not fit this study.

    Parameters
    ----------
    entries : mapping
        The good cases by case_id; others are passed over.

    Raises
    ------
    ConsiliumError
        The site's channels or labels do not match the study's; see
        :func:`~consilium_client.data.match.match_study`.
    """
    match = match_study(manifest.site, study)
    findings = []
    for case in manifest.cases:
        entry = entries.get(case.case_id)
        error = _misfit(case, entry, manifest.site, study, match) if entry is not None else None
        if error is not None:
            findings.append(Finding.of(case.case_id, error))
    return tuple(findings)


def covariate_channels_of(
    manifest: Manifest, study: Study
) -> tuple[Mapping[str, tuple[float, ...]], tuple[Finding, ...]]:
    """Return each case's covariate channels by case_id, and what cannot be one of them.

    Raises
    ------
    ConsiliumError
        ``data.covariate-missing`` where the site has no such column at all: training would take
        it for a value that nobody knows.
    """
    names = [one.name for one in study.task.covariates]
    missing = [name for name in names if name not in manifest.site.covariates]
    if missing:
        raise ConsiliumError(
            "data.covariate-missing",
            f"The study needs the covariate {missing[0]}; this site has "
            f"{', '.join(manifest.site.covariates) or 'none'}.",
            where="site.yaml: covariates",
            hint=f"Add the column covariate_{missing[0]} to cases.csv and its name under "
            "`covariates` in site.yaml. A cell may stay empty where the value is not known.",
        )
    found: dict[str, tuple[float, ...]] = {}
    findings = []
    for case in manifest.cases:
        try:
            found[case.case_id] = tuple(encode(study.task, case.covariates))
        except ConsiliumError as error:
            findings.append(Finding.of(case.case_id, error))
    return found, tuple(findings)


def background_findings(
    manifest: Manifest, entries: Mapping[str, Ingested], study: Study
) -> tuple[Finding, ...]:
    """Say which labels of the site's masks the study has no class for: they become background.

    Raises
    ------
    ConsiliumError
        As :func:`unfit_findings`.
    """
    if study.task.kind != "segmentation":
        return ()
    match = match_study(manifest.site, study)
    findings = []
    for name, value in manifest.site.labels.items():
        count = sum(value in entry.label_counts for entry in entries.values())
        if value in match.values or value == 0 or not count:
            continue
        findings.append(
            Finding(
                "",
                "data.label-to-background",
                f"The study has no class for the mask value {value}: it becomes background in "
                f"{count} of {len(entries)} cases.",
                f"site.yaml: labels: {name}",
                "If it belongs to one of the study's classes, map it under `classes` in site.yaml.",
            )
        )
    return tuple(findings)


def _misfit(
    case: Case, entry: Ingested, site: SiteManifest, study: Study, match: Match
) -> ConsiliumError | None:
    wanted = study.task.dimensions
    where = next(iter(case.images.values()))
    if len(entry.shape) != wanted:
        return ConsiliumError(
            "data.dimensions",
            f"The study is {wanted}D and an image has {len(entry.shape)} dimensions.",
            where=where,
            hint="Take part in a study for such images, or leave the case out.",
        )
    if study.preprocessing.spacing is not None and not entry.spacing_known:
        return ConsiliumError(
            "data.no-spacing",
            "The study resamples to a spacing and an image does not say how large its pixels are.",
            where=where,
            hint="Import the original DICOM or NIfTI; pictures carry no size.",
        )
    if study.task.kind == "classification":
        count = len(class_names(case.label, site))
        if count != 1 and not study.task.multi_label:
            return ConsiliumError(
                "data.label-values",
                f"The study takes one class per case and a case has {count}.",
                where="cases.csv",
                hint="Correct the label column, or take part in a multi-label study.",
            )
    elif study.task.empty_labels == "refused" and not _has_foreground(entry, match):
        return ConsiliumError(
            "data.empty-label",
            "The study refuses cases without foreground, and a mask has none of its classes.",
            where=case.label,
            hint="Restore the mask if it was lost on export; else leave the case out.",
        )
    return None


def _has_foreground(entry: Ingested, match: Match) -> bool:
    return any(
        count > 0 and match.values.get(value, 0) > 0 for value, count in entry.label_counts.items()
    )
