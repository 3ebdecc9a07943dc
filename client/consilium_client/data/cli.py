"""`consilium site data`: import, list, check, purge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.home import SiteHome
from consilium_common.console import command, err, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.data.importing import DataOutcome, Progress

data_app = typer.Typer(
    no_args_is_help=True, help="Import and check this site's images; they never leave it."
)

Home = Annotated[
    Path,
    typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder."),
]
_HERE = Path("site")


@data_app.command("import")
@command
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder of images and labels, or a CSV file.")],
    *,
    home: Home = _HERE,
    site: Annotated[str, typer.Option(help="Name of this site, if it is not joined yet.")] = "",
    layout: Annotated[
        str, typer.Option("--format", help="msd, csv, folders or dicom; detected by default.")
    ] = "",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Name of an input channel; once per channel, in order."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", help="NAME=VALUE of a label in the masks; once per label."),
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
        skip_bad=skip_bad,
        mixed=mixed,
        replace=replace,
        patients=patients,
    )
    opened = SiteHome.create(home)
    with _findings_shown(), _progress() as (progress, say):
        outcome = import_folder(opened, folder, options, progress=progress, say=say)
    if outcome.left_out:
        from consilium_client.data.findings import findings_table

        err().print(findings_table(outcome.left_out))
        note(f"Left out {len(outcome.left_out)} cases that cannot be used (--skip-bad).")
    counts = outcome.counts()
    where = opened.data / "site.yaml"
    result(
        {**_summary(outcome), "manifest": str(where)},
        f"{counts['cases']} cases of {counts['patients']} patients; {counts['read']} read now. "
        f"Patients: {counts['patients_train']} to train, {counts['patients_validation']} to "
        f"validate, {counts['patients_test']} to test.\nThe manifest is {where}.",
    )


@data_app.command("list")
@command
def list_(home: Home = _HERE) -> None:
    """List the cases: split, size, spacing, label. Patients appear by keyed hash."""
    from consilium_client.data.importing import list_cases

    rows = list_cases(SiteHome.existing(home))

    def people(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in ("case", "patient", "split", "voxels", "spacing (mm)", "label"):
            table.add_column(column, overflow="fold")
        for row in rows:
            shape = " × ".join(str(n) for n in row["shape"] or ())
            spacing = " × ".join(f"{n:.3g}" for n in row["spacing"] or ())
            cells = (row["case_id"], row["patient"][:12], row["split"], shape, spacing)
            table.add_row(*(Text(cell) for cell in (*cells, row["label"])))
        console.print(table)

    result(rows, people)


@data_app.command("check")
@command
def check(home: Home = _HERE) -> None:
    """Verify site.yaml, cases.csv and every image and label behind them."""
    from consilium_client.data.importing import check_data

    with _findings_shown(), _progress() as (progress, _):
        outcome = check_data(SiteHome.existing(home), progress=progress)
    counts = outcome.counts()
    result(
        _summary(outcome),
        f"{counts['cases']} cases of {counts['patients']} patients are good; "
        f"{counts['read']} had changed and were read again.",
    )


@data_app.command("purge")
@command
def purge(home: Home = _HERE) -> None:
    """Delete the cache of pixels; the manifest stays, and the cache is filled again when needed."""
    from consilium_client.data.importing import purge_cache

    freed = purge_cache(SiteHome.existing(home))
    result({"bytes": freed}, f"Deleted {freed / 2**20:.1f} MiB of cached pixels.")


def _labels(written: list[str]) -> dict[str, int | str]:
    labels: dict[str, int | str] = {}
    for item in written:
        name, equals, value = item.rpartition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConsiliumError(
                "usage.label", f"{item!r} is not NAME=VALUE.", hint="For example --label liver=1."
            )
        plain = value.strip()
        labels[name.strip()] = int(plain) if plain.isdecimal() else plain
    return labels


def _summary(outcome: DataOutcome) -> dict[str, Any]:
    site = outcome.manifest.site
    return {
        "site": site.site,
        **outcome.counts(),
        "inputs": list(site.inputs),
        "labels": dict(site.labels),
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
        if len(error.findings) > 1:
            err().print(findings_table(error.findings))
        raise


@contextmanager
def _progress() -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """Show a bar with time left on stderr; lines said meanwhile appear above it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err(), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        def say(line: str) -> None:
            bars.console.print(line, markup=False)

        yield advance, say
