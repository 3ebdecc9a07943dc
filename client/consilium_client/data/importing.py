"""Import and check: from a folder, through an importer and the ingest, to site.yaml, cases.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from consilium_client.data.doctor.examination import examine
from consilium_client.data.doctor.fixes import apply_fixes
from consilium_client.data.doctor.page import Subject, render_page
from consilium_client.data.drafting import ImportOptions, draft_manifest, notes_on, with_value_names
from consilium_client.data.findings import Finding, error_of, write_report
from consilium_client.data.importers import choose_importer, importers
from consilium_client.data.importers.base import NO_PATIENTS, Found, closed_folders, listing
from consilium_client.data.ingest.cache import (
    Ingested,
    cache_folder,
    ingested_folder,
    prune,
    size_of,
)
from consilium_client.data.ingest.run import (
    cached_entry,
    ingest,
    writing,
)
from consilium_client.data.ingest.sources import Sources
from consilium_client.data.manifest import Manifest, existing_manifest, load_manifest, save_manifest
from consilium_client.data.split import Split, assign_splits, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.study.schema import Study

__all__ = [
    "DataOutcome",
    "DataProblemsError",
    "ImportOptions",
    "check_data",
    "import_folder",
    "list_cases",
    "purge_cache",
]

Progress = Callable[[str, int, int], None]


class DataProblemsError(ConsiliumError):
    """The error that ends an import or a check, with every finding, and what was mended before."""

    def __init__(
        self, error: ConsiliumError, findings: tuple[Finding, ...], fixed: tuple[str, ...] = ()
    ) -> None:
        super().__init__(error.code, error.message, where=error.where, hint=error.hint)
        self.findings = findings
        self.fixed = fixed


@dataclass(frozen=True)
class DataOutcome:
    """What stands after an import or a check.

    ``read`` counts the cases whose files were read now; ``left_out`` are those that
    ``skip_bad`` left out. ``warnings`` and ``fixed`` (one line each) are those of a check.
    """

    manifest: Manifest
    entries: Mapping[str, Ingested]
    splits: Mapping[str, Split]
    read: int
    left_out: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()
    fixed: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Return numbers of cases and patients, in all and by split; for the site alone."""
        by_split = dict.fromkeys(("train", "validation", "test"), 0)
        for split in self.splits.values():
            by_split[split] += 1
        return {
            "cases": len(self.manifest.cases),
            "patients": len(self.splits),
            **{f"patients_{name}": number for name, number in by_split.items()},
            "read": self.read,
            "left_out": len(self.left_out),
        }


def import_folder(
    home: SiteHome,
    folder: Path,
    options: ImportOptions,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> DataOutcome:
    """Import a folder of images and labels.

    Parameters
    ----------
    folder : Path
        A folder, or a CSV file.
    progress : callable, optional
        Called with (what, done, total).
    say : callable, optional
        Takes one line about what was detected, and notes.

    Raises
    ------
    DataProblemsError
        Cases cannot be used; the previous manifest stands.
    ConsiliumError
        ``data.*``, ``usage.*`` or ``state.*``.
    """
    folder = folder.expanduser().resolve()
    with writing(home):
        old = existing_manifest(home, rewriting=True)
        found = _found(folder, options, progress, say)
        manifest = draft_manifest(home, found, options, old)
        told = set() if options.patients is None else {NO_PATIENTS}
        notes = (*(note for note in found.notes if note not in told), *notes_on(manifest))
        if say is not None:
            for line in notes:
                say(line)
        sources = Sources(manifest.root)
        if found.headers:
            sources.adopt(found.headers)
        outcome = ingest(
            home, manifest, sources=sources, progress=_named(progress, "ingest"), say=say
        )
        manifest = with_value_names(manifest, outcome)
        findings = (*found.findings, *outcome.findings)
        good = tuple(case for case in manifest.cases if case.case_id in outcome.entries)
        if findings:
            total = len(manifest.cases) + len(found.findings)
            report = home.reports / "data-report.json"
            write_report(report, findings, cases=total)
            if not options.skip_bad or not good:
                error = error_of(findings, cases=total, report=report, name_files=True)
                raise DataProblemsError(error, findings)
        manifest = Manifest(manifest.site, good, manifest.root)
        splits = assign_splits(good, open_patient_key(home), manifest.site.split)
        save_manifest(home, manifest)
        forget_others(home, outcome.entries)
    return DataOutcome(manifest, outcome.entries, splits, outcome.read, findings, notes)


def _found(
    folder: Path,
    options: ImportOptions,
    progress: Progress | None,
    say: Callable[[str], None] | None,
) -> Found:
    """Return what the folder's importer finds; folders that may not be read are findings too."""
    with listing(folder):
        known = importers(options, progress=_named(progress, "index"))
        importer, reason = choose_importer(folder, known, options.format, options)
        if say is not None:
            say(reason)
        closed = closed_folders(folder) if folder.is_dir() and importer.name != "csv" else []
        if closed and not options.skip_bad:
            raise DataProblemsError(_closed(closed), tuple(closed))
        found = importer.cases(folder)
    return replace(found, findings=(*closed, *found.findings))


def _closed(findings: Sequence[Finding]) -> ConsiliumError:
    first, more = findings[0], len(findings) - 1
    return ConsiliumError(
        first.code,
        first.message if not more else f"{len(findings)} folders may not be read by this user.",
        where=first.where + (f" and {more} more" if more else ""),
        hint=first.hint,
    )


def check_data(
    home: SiteHome,
    *,
    study: Study | None = None,
    fix: bool = False,
    page: Path | None = None,
    progress: Progress | None = None,
) -> DataOutcome:
    """Verify the manifest as it stands now and examine the cohort; read what has changed.

    Writes ``reports/data-report.json`` and one HTML page, whatever it finds.

    Parameters
    ----------
    study : Study, optional
        What the cases must fit besides.
    fix : bool
        Mend first what needs no judgement: see :mod:`consilium_client.data.doctor.fixes`.
    page : Path, optional
        Where to write the page (default: ``reports/data-check.html`` in the site's home).
    progress : callable, optional
        Called with (what, done, total).

    Raises
    ------
    DataProblemsError
        There are errors among the findings.
    ConsiliumError
        ``data.no-manifest``, ``data.manifest``, ``data.cases`` and the like, or ``state.*``.
    """
    with writing(home):
        fixed = apply_fixes(home) if fix else ()
        manifest = load_manifest(home)
        if not manifest.cases:  # nothing would be wrong with it, and the cache be emptied
            raise ConsiliumError(
                "data.cases",
                "The case list has no cases.",
                where=str(home.data / manifest.site.cases),
                hint="Put its lines back, or import the folder again.",
            )
        key = open_patient_key(home)
        sources = Sources(manifest.root)
        outcome = ingest(home, manifest, sources=sources, progress=_named(progress, "check"))
        findings = examine(
            home, manifest, outcome, sources, key, study=study, progress=_named(progress, "scan")
        )
        patients = len({key.name(case.patient_id) for case in manifest.cases})
        subject = Subject(
            manifest.site.site,
            (study.title or study.name) if study is not None else "",
            len(manifest.cases),
            patients,
            outcome.entries,
        )
        page = page or home.reports / "data-check.html"
        write_atomic(page, render_page(subject, findings, fixed=fixed).encode())
        write_report(home.reports / "data-report.json", findings, cases=len(manifest.cases))
        errors = tuple(finding for finding in findings if finding.severity == "error")
        if errors:
            error = error_of(errors, cases=len(manifest.cases), report=page, name_files=True)
            raise DataProblemsError(error, findings, fixed)
        splits = assign_splits(manifest.cases, key, manifest.site.split)
        forget_others(home, outcome.entries)
    return DataOutcome(
        manifest, outcome.entries, splits, outcome.read, warnings=findings, fixed=fixed
    )


def require_good(
    home: SiteHome, findings: tuple[Finding, ...], cases: int, *, name_files: bool
) -> None:
    """Raise the one error for these findings, after writing their report.

    Raises
    ------
    DataProblemsError
        There are findings.
    """
    if not findings:
        return
    report = home.reports / "data-report.json"
    write_report(report, findings, cases=cases)
    error = error_of(findings, cases=cases, report=report, name_files=name_files)
    raise DataProblemsError(error, findings)


def forget_others(home: SiteHome, entries: Mapping[str, Ingested]) -> None:
    """Remove from the cache every case that the site no longer lists, prepared forms too."""
    prune(ingested_folder(home), (entry.folder.name for entry in entries.values()))
    prepared = cache_folder(home) / "prepared"
    kept = {entry.content for entry in entries.values()}
    if prepared.is_dir():
        for recipe in prepared.iterdir():
            prune(recipe, kept)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


# --- looking and forgetting --------------------------------------------------------------------


def list_cases(home: SiteHome) -> list[dict[str, Any]]:
    """Return one row per case for the site's operator; patients by keyed hash.

    Shape and spacing are None for a case whose files have changed since they were ingested.
    """
    manifest = load_manifest(home)
    key = open_patient_key(home)
    splits = assign_splits(manifest.cases, key, manifest.site.split)
    sources = Sources(manifest.root)
    rows = []
    for case in manifest.cases:
        entry = cached_entry(home, manifest.site, case, sources)
        lengths = np.linalg.norm(entry.affine[:3, : len(entry.shape)], axis=0) if entry else None
        patient = key.name(case.patient_id)
        rows.append(
            {
                "case_id": case.case_id,
                "patient": patient,
                "split": splits[patient],
                "shape": list(entry.shape) if entry else None,
                "spacing": lengths.tolist()
                if entry and entry.spacing_known and lengths is not None
                else None,
                "label": case.label,
            }
        )
    return rows


def purge_cache(home: SiteHome) -> int:
    """Delete all cached pixels and return how many bytes they took."""
    with writing(home):
        folder = cache_folder(home)
        freed = size_of(folder)
        prune(folder, ())
    return freed
