"""`consilium site data`: import, list, check, purge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from consilium_client.data.deid.cli import deidentify_
from consilium_client.data.formats import FORMATS
from consilium_client.data.looking.cli import show_, stats_
from consilium_client.data.pacs.cli import pull_
from consilium_client.data.terminal import HERE, FitsStudy, Fix, Home, progress_shown
from consilium_client.home import SiteHome
from consilium_common.console import command, err, note, result
from consilium_common.errors import WARNINGS_ONLY, ConsiliumError, printable
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.data.importing import DataOutcome

data_app = typer.Typer(
    no_args_is_help=True, help="Import and check this site's images; they never leave it."
)
#: A case's name up to so many characters stays on one line of the list.
_SHORT: Final = 24


def _listed(formats: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({what})" for name, what in formats.items())


@data_app.command("import")
@command
def import_(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images and labels, a CSV file or a DICOMDIR.")
    ],
    *,
    home: Home = HERE,
    site: Annotated[str, typer.Option(help="Name of this site, if it is not joined yet.")] = "",
    layout: Annotated[
        str,
        typer.Option("--format", help=f"Detected by default. {_listed(FORMATS)}."),
    ] = "",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Name of an input channel; once per channel, in order."),
    ] = None,
    channels: Annotated[
        list[str] | None,
        typer.Option(
            "--channel",
            help="NAME=PATTERN: which series of a study (DICOM: description, folder or modality; "
            "BIDS: T1w) is this input channel; once per channel.",
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            help="NAME=VALUE of a label in the masks, or of a class (a range too: 'old=>=65'); "
            "once per label.",
        ),
    ] = None,
    label_from: Annotated[
        str,
        typer.Option(
            "--label-from",
            "--label-tag",
            help="Take the class or number from a DICOM tag (BodyPartExamined, (0010,1010)) or a "
            "column of the table.",
        ),
    ] = "",
    covariates: Annotated[
        list[str] | None,
        typer.Option(
            "--covariate",
            help="NAME=SOURCE of a fact beside the image: a DICOM tag or a column; once per fact.",
        ),
    ] = None,
    derivative: Annotated[
        str, typer.Option(help="BIDS: which masks, where derivatives hold several kinds.")
    ] = "",
    segments: Annotated[
        list[str] | None,
        typer.Option(
            "--segment",
            help="Segment or region to take from DICOM SEG and RTSTRUCT; once per name, a later "
            "one covers an earlier.",
        ),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="CSV of case_id and patient_id, where the folder names no patients."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out cases that cannot be used, and say so.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="DICOM folders hold several patients on purpose.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put this folder in place of the one imported before.")
    ] = False,
) -> None:
    """Import images and labels: detect, check every case, fill the cache, write the manifest."""
    from consilium_client.data.drafting import ImportOptions
    from consilium_client.data.importing import import_folder

    options = ImportOptions(
        format=layout or None,
        site=site or None,
        inputs=tuple(inputs or ()),
        labels=_labels(labels or []),
        channels=_pairs(channels or [], "--channel", "t1='T1 post'"),
        label_from=label_from.strip(),
        covariates=_pairs(covariates or [], "--covariate", "age=PatientAge"),
        derivative=derivative.strip(),
        segments=tuple(segments or ()),
        skip_bad=skip_bad,
        mixed=mixed,
        replace=replace,
        patients=patients,
    )
    opened = SiteHome.create(home)
    with _findings_shown(), progress_shown() as (progress, say):
        outcome = import_folder(opened, folder, options, progress=progress, say=say)
    if outcome.left_out:
        from consilium_client.data.findings import findings_table

        err().print(findings_table(outcome.left_out))
        note(f"Left out {plural(len(outcome.left_out), 'case')} that cannot be used (--skip-bad).")
    counts = outcome.counts()
    where = opened.data / "site.yaml"
    result(
        {**_summary(outcome), "manifest": str(where)},
        f"{plural(counts['cases'], 'case')} of {plural(counts['patients'], 'patient')}; "
        f"{counts['read']} read now. "
        f"Patients: {counts['patients_train']} to train, {counts['patients_validation']} to "
        f"validate, {counts['patients_test']} to test.\nThe manifest is {where}.",
    )


@data_app.command("list")
@command
def list_(home: Home = HERE) -> None:
    """List the cases: split, size, spacing, label. Patients appear by keyed hash."""
    from consilium_client.data.importing import list_cases
    from consilium_client.data.ingest.room import cache_sizes, in_words

    opened = SiteHome.existing(home)
    rows = list_cases(opened)
    imported, prepared = cache_sizes(opened)

    def people(console: Console) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        longest = max((len(row["case_id"]) for row in rows), default=0)
        table.add_column("case", overflow="fold", no_wrap=longest <= _SHORT)
        for column in ("patient", "split", "voxels", "spacing (mm)"):
            table.add_column(column, no_wrap=True)
        table.add_column("label", overflow="fold")
        for row in rows:
            shape = " × ".join(str(n) for n in row["shape"] or ())
            spacing = " × ".join(f"{n:.3g}" for n in row["spacing"] or ())
            cells = (row["case_id"], row["patient"][:8], row["split"], shape, spacing)
            table.add_row(*(Text(printable(cell)) for cell in (*cells, row["label"])))
        console.print(table)
        console.print(
            f"In the cache: {in_words(imported)} of cases, {in_words(prepared)} prepared for "
            "studies.",
            style="dim",
        )

    result(rows, people)


@data_app.command("check")
@command
def check(
    home: Home = HERE,
    *,
    study: FitsStudy = None,
    fix: Fix = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Where to write the page (default: reports/data-check.html)."),
    ] = None,
) -> None:
    """Check every image and label, and the cohort as a whole; write a page with pictures.

    Exit status: 0 nothing found, 10 warnings only, 4 errors among the data.
    """
    from consilium_client.data.doctor.outcome import checked, summary, words

    opened = SiteHome.existing(home)
    with _findings_shown(), progress_shown() as (progress, _):
        outcome = checked(opened, study=study, fix=fix, page=html, progress=progress)
    if outcome.warnings:
        from consilium_client.data.findings import findings_table

        err().print(findings_table(outcome.warnings))
    result({**_summary(outcome), **summary(opened, outcome, html)}, words(opened, outcome, html))
    if outcome.warnings:
        raise typer.Exit(WARNINGS_ONLY)


@data_app.command("purge")
@command
def purge(home: Home = HERE) -> None:
    """Delete the cache of pixels; the manifest stays, and the cache is filled again when needed."""
    from consilium_client.data.importing import purge_cache
    from consilium_client.data.ingest.room import cache_sizes, in_words

    opened = SiteHome.existing(home)
    imported, prepared = cache_sizes(opened)
    freed = purge_cache(opened)
    result(
        {"bytes": freed, "imported": imported, "prepared": prepared},
        f"Deleted {in_words(freed)} of cached pixels: {in_words(imported)} of cases, "
        f"{in_words(prepared)} prepared for studies.",
    )


def _labels(written: list[str]) -> dict[str, int | str]:
    pairs = _pairs(written, "--label", "liver=1")
    return {name: int(value) if value.isdecimal() else value for name, value in pairs.items()}


def _pairs(written: list[str], option: str, example: str) -> dict[str, str]:
    """Read NAME=VALUE; the first = separates, for a value may be ``>=65``."""
    found: dict[str, str] = {}
    for item in written:
        name, _, value = (part.strip() for part in item.partition("="))
        if not name or not value or name in found:
            raise ConsiliumError(
                f"usage.{option.removeprefix('--')}",
                f"{item!r} is not NAME=VALUE, or names {name} twice.",
                hint=f"For example {option} {example}.",
            )
        found[name] = value
    return found


def _summary(outcome: DataOutcome) -> dict[str, Any]:
    site = outcome.manifest.site
    return {
        "site": site.site,
        **outcome.counts(),
        "inputs": list(site.inputs),
        "labels": dict(site.labels),
        "covariates": list(site.covariates),
        "notes": list(outcome.notes),
    }


@contextmanager
def _findings_shown() -> Iterator[None]:
    """Show all findings as a table on stderr before the one error that ends the command."""
    from consilium_client.data.findings import findings_table
    from consilium_client.data.importing import DataProblemsError

    try:
        yield
    except DataProblemsError as error:
        for line in error.fixed:
            note(line)
        if len(error.findings) > 1:
            err().print(findings_table(error.findings))
        raise


data_app.command("pull")(pull_)
data_app.command("show")(show_)
data_app.command("stats")(stats_)
data_app.command("deidentify")(deidentify_)
