"""`consilium site data pull`: images from the hospital's archive into a folder."""

from __future__ import annotations

import datetime as dt
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.home import SiteHome
from consilium_common.console import command, err, note, result
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from consilium_client.data.pacs.archive import Archive
    from consilium_client.data.pacs.config import Config
    from consilium_client.data.pacs.filters import Selection
    from consilium_client.data.pacs.pull import Pulled, Step

_LIST_HELP = "File with one {} per line; - reads standard input."


@command
def pull_(
    archive: Annotated[str, typer.Argument(help="Name of the archive in pacs.yaml.")] = "",
    folder: Annotated[
        Path | None, typer.Argument(help="Where the images go; an earlier pull goes on.")
    ] = None,
    *,
    home: Annotated[
        Path,
        typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder."),
    ] = Path("site"),
    modality: Annotated[
        list[str] | None, typer.Option("--modality", help="CT, MR, …; once per modality.")
    ] = None,
    since: Annotated[str, typer.Option("--from", help="First study date, YYYY-MM-DD.")] = "",
    until: Annotated[str, typer.Option("--to", help="Last study date, YYYY-MM-DD.")] = "",
    study: Annotated[
        str, typer.Option(help="Pattern of the study's description, such as '*abdomen*'.")
    ] = "",
    series: Annotated[
        str, typer.Option(help="Pattern of the series' description, such as 'T2 *'.")
    ] = "",
    accessions: Annotated[
        str, typer.Option(metavar="FILE", help=_LIST_HELP.format("accession number"))
    ] = "",
    patients: Annotated[
        str, typer.Option(metavar="FILE", help=_LIST_HELP.format("patient identifier"))
    ] = "",
    min_images: Annotated[
        int, typer.Option("--min-images", min=0, help="Leave out series with fewer images.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most series to pull.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be pulled, and pull nothing.")
    ] = False,
    init: Annotated[
        bool, typer.Option("--init", help="Write a commented pacs.yaml to edit, and end.")
    ] = False,
) -> None:
    """Pull images from an archive (PACS) by DICOM or DICOMweb: filtered, checked, resumed."""
    from consilium_client.data.pacs.config import load_archive, write_example
    from consilium_client.data.pacs.filters import Filters, find
    from consilium_client.data.pacs.retry import BackOff

    if init:
        path = write_example(SiteHome.create(home).path)
        result({"file": str(path)}, f"Wrote {path}. Edit it, then pull with --dry-run first.")
        return
    config = load_archive(SiteHome.existing(home).path, archive)
    if folder is None and not dry_run:
        raise ConsiliumError(
            "usage.folder",
            "Where should the images go?",
            hint="Name a folder after the archive, or look first with --dry-run.",
        )
    if accessions == "-" and patients == "-":
        raise ConsiliumError("usage.identifiers", "Only one list can be read from standard input.")
    filters = Filters(
        modalities=tuple(name.upper() for name in modality or ()),
        since=_date(since, "--from"),
        until=_date(until, "--to"),
        study=study,
        series=series,
        accessions=_identifiers(accessions),
        patients=_identifiers(patients),
        min_images=min_images,
    )
    with warnings.catch_warnings(), closing(connect(config)) as connected:
        # Warnings about an archive's answers quote them.
        warnings.simplefilter("ignore")
        with _looking() as seen:
            back_off = BackOff(retries=config.retries)
            selection = find(
                connected, filters, limit=limit, progress=seen, back_off=back_off, say=note
            )
        _tell_unmatched(selection, accessions or patients)
        if not selection.series:
            raise ConsiliumError(
                "pacs.nothing",
                "The archive has nothing that fits.",
                hint="Loosen the filters; `--dry-run` shows what they find.",
            )
        if dry_run or folder is None:
            counts = _counts(selection)
            result(counts, _described(counts))
            return
        pulled = _pull(connected, config, selection, folder)
    pulled.check()
    data = {
        "folder": str(folder),
        "series": pulled.series,
        "already": pulled.already,
        "images": pulled.images,
        "bytes": pulled.bytes,
        "unmatched_lines": list(selection.unmatched),
    }
    already = f", {pulled.already} series were there already" if pulled.already else ""
    result(
        data,
        f"Pulled {pulled.series} series with {pulled.images} images "
        f"({pulled.bytes / 2**20:.1f} MiB){already}.\n"
        f"Next: consilium site data import {folder}",
    )


def connect(config: Config) -> Archive:
    """Open the archive by the protocol that ``config`` names; nothing is sent yet."""
    if config.kind == "dimse":
        from consilium_client.data.pacs.dimse import DimseArchive

        return DimseArchive(config)
    from consilium_client.data.pacs.web import WebArchive

    return WebArchive(config)


def _pull(archive: Archive, config: Config, selection: Selection, folder: Path) -> Pulled:
    from consilium_client.data.pacs.download import Download
    from consilium_client.data.pacs.pull import pull
    from consilium_client.data.pacs.retry import BackOff

    images = [series.images for series in selection.series]
    total = sum(n for n in images if n is not None) if None not in images else None
    with Download.opened(folder) as download, _progress(total) as (progress, say):
        return pull(
            archive,
            selection.series,
            download,
            BackOff(retries=config.retries),
            progress=progress,
            say=say,
        )


def _identifiers(name: str) -> dict[str, int]:
    from consilium_client.data.pacs.filters import read_identifiers

    if not name:
        return {}
    if name == "-":
        return read_identifiers(sys.stdin, "standard input")
    try:
        with Path(name).expanduser().open(encoding="utf-8") as stream:
            return read_identifiers(stream, name)
    except OSError as error:
        raise ConsiliumError(
            "usage.identifiers",
            "The list cannot be opened.",
            where=name,
            hint="Give a file, or - to read standard input; never the identifier itself.",
        ) from error


def _date(text: str, option: str) -> dt.date | None:
    if not text:
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConsiliumError(
            "usage.dates", f"{option} is not a date.", hint="Write it as 2024-03-31."
        ) from error


def _tell_unmatched(selection: Selection, name: str) -> None:
    if selection.more:
        note("There are more: the limit was reached.")
    if selection.unmatched:
        lines = ", ".join(str(line) for line in selection.unmatched[:20])
        rest = len(selection.unmatched) - 20
        more = f" and {rest} more" if rest > 0 else ""
        note(f"Nothing fits for line {lines}{more} of {'standard input' if name == '-' else name}.")


def _counts(selection: Selection) -> dict[str, Any]:
    series = selection.series
    counted = [s.images for s in series if s.images is not None]
    return {
        "patients": len({s.study.patient for s in series}),
        "studies": len({s.study.uid for s in series}),
        "series": len(series),
        "images": sum(counted),
        "series_of_unknown_size": len(series) - len(counted),
        "modalities": dict(Counter(s.modality for s in series).most_common()),
        "unmatched_lines": list(selection.unmatched),
        "more": selection.more,
    }


def _described(counts: dict[str, Any]) -> str:
    unknown = counts["series_of_unknown_size"]
    kinds = ", ".join(f"{number} {name}" for name, number in counts["modalities"].items())
    return (
        f"{counts['series']} series ({kinds}) in {plural(counts['studies'], 'study')} of "
        f"{plural(counts['patients'], 'patient')}: {plural(counts['images'], 'image')}"
        + (f", and {unknown} series whose size the archive does not tell." if unknown else ".")
        + "\nNothing was pulled (--dry-run)."
    )


@contextmanager
def _looking() -> Iterator[Callable[[int], None]]:
    with err().status("Asking the archive …") as status:
        yield lambda found: status.update(f"Asking the archive … {found} series found")


@contextmanager
def _progress(total: int | None) -> Iterator[tuple[Callable[[Step], None], Callable[[str], None]]]:
    """Show series, images, rate and time left on stderr; lines said appear above."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err(), transient=True) as bars:
        task = bars.add_task("pull", total=total, said="")

        def show(step: Step) -> None:
            elapsed = bars.tasks[0].elapsed or 0.0
            rate = step.bytes / 2**20 / elapsed if elapsed > 0 else 0.0
            # Where an archive does not count images, only the series tell how far it is.
            bars.update(
                task,
                completed=step.series if total is None else step.position,
                total=step.of if total is None else total,
                said=f"series {step.series} of {step.of}, {step.images} images, {rate:.1f} MiB/s",
            )

        yield show, lambda line: bars.console.print(line, markup=False)
