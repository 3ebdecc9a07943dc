"""A check as a command runs it: its study from a file, and what it says when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consilium_client.data.doctor.fixes import apply_fixes
from consilium_client.data.doctor.site import Part
from consilium_client.data.findings import Finding
from consilium_client.data.importing import (
    DataOutcome,
    DataProblemsError,
    Progress,
    check_data,
)
from consilium_client.data.ingest.run import writing
from consilium_client.data.manifest import SITE_FILE
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural
from consilium_common.study.load import load_study


def checked(
    home: SiteHome,
    *,
    study: Path | None,
    fix: bool,
    page: Path | None,
    progress: Progress | None = None,
) -> DataOutcome:
    """Run :func:`~consilium_client.data.importing.check_data` for a study's file.

    Raises
    ------
    ConsiliumError
        ``usage.report`` for a page that is not called ``.html``; ``study.*``; as the check.
    """
    if page is not None and page.suffix != ".html":
        raise ConsiliumError(
            "usage.report",
            "The page must end in .html.",
            where=str(page),
            hint="Rename the output.",
        )
    against = load_study(study) if study is not None else None
    return check_data(home, study=against, fix=fix, page=page, progress=progress)


def summary(home: SiteHome, outcome: DataOutcome, page: Path | None) -> dict[str, Any]:
    """Return what ``--json`` says of a check without errors, beside the counts."""
    return {
        "warnings": [finding.to_dict() for finding in outcome.warnings],
        "fixed": list(outcome.fixed),
        "page": str(page or home.reports / "data-check.html"),
        "report": str(home.reports / "data-report.json"),
    }


def words(home: SiteHome, outcome: DataOutcome, page: Path | None) -> str:
    """Return what a person reads of a check without errors."""
    counts = outcome.counts()
    warned = (
        f"{plural(len(outcome.warnings), 'warning')}: look at them."
        if outcome.warnings
        else "Nothing stands out."
    )
    lines = [
        *outcome.fixed,
        f"Good: {plural(counts['cases'], 'case')} of {plural(counts['patients'], 'patient')}; "
        f"{counts['read']} read again because of a change.",
        warned,
        f"The page is {page or home.reports / 'data-check.html'}.",
    ]
    return "\n".join(lines)


def mended(home: SiteHome) -> tuple[str, ...]:
    """Mend what needs no judgement (`--fix`), and say it, one line each.

    Raises
    ------
    ConsiliumError
        ``state.busy`` where another command writes.
    """
    with writing(home):
        return apply_fixes(home)


def data_part(
    home: SiteHome, *, study: Path | None, progress: Progress | None = None
) -> tuple[Part, ConsiliumError | None]:
    """Check the site's data as one part of it; a site without data has none to check.

    Returns
    -------
    (part, error)
        The error ends the command: the data has errors, or cannot be looked at.
    """
    if not (home.data / SITE_FILE).exists():
        return Part("data", "none imported yet", ()), None
    error: ConsiliumError | None = None
    findings: tuple[Finding, ...]
    try:
        outcome = checked(home, study=study, fix=False, page=None, progress=progress)
        said, findings = words(home, outcome, None).replace("\n", " "), outcome.warnings
    except DataProblemsError as problems:
        said, findings, error = problems.message, problems.findings, problems
    except ConsiliumError as other:  # the manifest or the patients' key: there is nothing to judge
        said, findings, error = other.message, (Finding.of("", other),), other
    return Part("data", said, findings), error
