"""DICOMDIR: the files that an exported medium says it holds, within its own folder only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from consilium_client.data.findings import Finding, reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural


def read_dicomdir(path: Path) -> list[Path]:
    """Return the files that a DICOMDIR refers to and that exist, in its order, each once.

    References out of the DICOMDIR's folder are passed over, whoever wrote them. Names are found
    whatever their case: media are often copied to lower case.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.too-large`` or ``data.missing`` (the DICOMDIR itself).
    """
    found = (_found(path.parent, parts) for parts in _references(path))
    return list(dict.fromkeys(file for file in found if file is not None))


def dicomdir_findings(path: Path) -> list[Finding]:
    """Return one finding ``data.missing`` when files that the DICOMDIR refers to are not there.

    Raises
    ------
    ConsiliumError
        As :func:`read_dicomdir`.
    """
    absent = [parts for parts in _references(path) if _found(path.parent, parts) is None]
    if not absent:
        return []
    error = ConsiliumError(
        "data.missing",
        f"Not in the folder of the DICOMDIR that refers to them: {plural(len(absent), 'file')}.",
        where=f"{path}, first {'/'.join(absent[0])}",
        hint="Copy the whole medium again, or leave out the series that lack files.",
    )
    return [Finding.of(path.parent.name, error)]


def _references(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the file IDs of all directory records, each the parts of a path (PS3.10 8.2)."""
    dataset = open_dicom(path, tags=["DirectoryRecordSequence"])
    with reading(path, "DICOMDIR"), quietly():
        for record in dataset.get("DirectoryRecordSequence") or ():
            named = record.get("ReferencedFileID")
            if named:
                yield (named,) if isinstance(named, str) else tuple(str(part) for part in named)


def _found(folder: Path, parts: tuple[str, ...]) -> Path | None:
    here = folder
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\\" in part:
            return None
        exact = here / part
        here = exact if exact.exists() else _any_case(here, part)
        if not here.exists():
            return None
    inside = here.resolve().is_relative_to(folder.resolve())
    return here if inside and here.is_file() else None


def _any_case(folder: Path, name: str) -> Path:
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path for path in names if path.name.lower() == name.lower()), folder / name)
