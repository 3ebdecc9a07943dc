"""`consilium site data deidentify`: a clean copy of a folder, never in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.data.terminal import HERE, Home, progress_shown
from consilium_client.home import SiteHome
from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from consilium_client.data.deid.copying import Copied

_KEEP = ("descriptors", "characteristics", "device", "institution")


@command
def deidentify_(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM and NIfTI files.")],
    out: Annotated[Path, typer.Argument(help="New folder for the clean copy.")],
    *,
    home: Home = HERE,
    longitudinal: Annotated[
        bool,
        typer.Option(
            "--retain-longitudinal",
            help="Keep the time between studies: each patient's dates move by a secret number of "
            "days.",
        ),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep descriptors (cleaned), characteristics, device or institution; repeatable."
        ),
    ] = None,
    include_burned_in: Annotated[
        bool,
        typer.Option(
            "--include-burned-in", help="Copy images that may carry text in their pixels too."
        ),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Succeed although some files cannot be cleaned.")
    ] = False,
) -> None:
    """Write a clean copy: basic profile of PS3.15, UIDs and patients by keyed hash."""
    from consilium_client.data.deid.clean import Rules
    from consilium_client.data.deid.copying import deidentify
    from consilium_client.data.findings import error_of, write_report

    rules = Rules(longitudinal=longitudinal, keep=_kept(keep or []))
    opened = SiteHome.create(home)
    with progress_shown() as (progress, _):
        copied = deidentify(
            opened, folder, out, rules, include_burned_in=include_burned_in, progress=progress
        )
    _tell(copied, opened, included=include_burned_in)
    if copied.failed and not skip_bad:
        total = copied.written + copied.kept + len(copied.failed)
        report = opened.reports / "deidentify-report.json"
        write_report(report, copied.failed, cases=total)
        error = error_of(copied.failed, cases=total, report=report, name_files=True)
        raise ConsiliumError(
            error.code,
            f"{error.message} All other files are in the copy.",
            where=error.where,
            hint=f"{error.hint} --skip-bad takes the copy as it is.".strip(),
        )
    result(
        _summary(copied),
        f"{copied.written} files cleaned, {copied.kept} were there already.\n"
        f"The copy is {copied.out}; what was changed is in {copied.log}.",
    )


def _kept(words: list[str]) -> tuple[str, ...]:
    for word in words:
        if word not in _KEEP:
            raise ConsiliumError(
                "usage.keep", f"{word!r} cannot be kept.", hint=f"Choose from {', '.join(_KEEP)}."
            )
    return tuple(sorted(set(words)))


def _tell(copied: Copied, home: SiteHome, *, included: bool) -> None:
    """Say on stderr what a person should look at; the pictures stay in the site's home."""
    for reason, paths in copied.passed_over.items():
        note(f"Not copied, {reason}: {plural(len(paths), 'file')}.")
        for path in paths[:20]:
            note(f"  {path}")
        if len(paths) > 20:
            note(f"  and {len(paths) - 20} more")
    if not copied.suspects:
        return
    from consilium_common.files import private_folder, write_atomic

    folder = private_folder(home.reports / "burned-in")
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = [picture for suspect in copied.suspects for picture in suspect.pictures]
    for number, picture in enumerate(pictures, start=1):
        write_atomic(folder / f"{number:04d}.png", picture, durable=False)
    state = "copied because you asked for it" if included else "not copied"
    note(f"Look at these: images that may carry text in their pixels ({state}).")
    for suspect in copied.suspects[:20]:
        more = f" and {len(suspect.headers) - 1} more" if len(suspect.headers) > 1 else ""
        note(f"  {suspect.headers[0].path}{more}: they {suspect.reason}.")
    if pictures:
        note(f"  Thumbnails are in {folder}.")


def _summary(copied: Copied) -> dict[str, Any]:
    return {
        "copy": str(copied.out),
        "log": str(copied.log),
        "written": copied.written,
        "kept": copied.kept,
        "look_at": sum(len(suspect.headers) for suspect in copied.suspects),
        "not_copied": {
            reason: [str(path) for path in paths] for reason, paths in copied.passed_over.items()
        },
        "failed": [finding.to_dict() for finding in copied.failed],
    }
