"""Importers: one per layout of images on disk, and the choice of the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from consilium_client.data.importers.base import Found, Importer
from consilium_client.data.importers.class_folders import ClassFolderImporter
from consilium_client.data.importers.csv_list import CsvImporter
from consilium_client.data.importers.dicom_tree import DicomImporter
from consilium_client.data.importers.msd import MsdImporter
from consilium_common.errors import ConsiliumError

__all__ = ["Found", "Importer", "choose_importer", "importers"]


def importers(
    *, mixed: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Importer]:
    """Return every importer by name, in the order in which they are tried."""
    known: list[Importer] = [
        MsdImporter(),
        CsvImporter(),
        ClassFolderImporter(),
        DicomImporter(mixed=mixed, progress=progress),
    ]
    return {importer.name: importer for importer in known}


def choose_importer(
    folder: Path, known: dict[str, Importer], name: str | None = None
) -> tuple[Importer, str]:
    """Return the importer for ``folder`` and one line that says why.

    Raises
    ------
    ConsiliumError
        ``data.missing`` when there is no such folder, ``data.unknown-format`` when no importer
        recognises it, ``usage.format`` for a name that is none.
    """
    if not folder.exists():
        raise ConsiliumError("data.missing", "There is no such folder.", where=str(folder))
    if name is not None:
        if name not in known:
            raise ConsiliumError(
                "usage.format",
                f"There is no format {name}.",
                hint=f"The formats are {', '.join(known)}.",
            )
        return known[name], f"Reading as {name}, as told."
    for importer in known.values():
        reason = importer.detect(folder)
        if reason is not None:
            return importer, f"Detected {importer.name}: {reason}."
    raise ConsiliumError(
        "data.unknown-format",
        "The folder has none of the layouts that are recognised.",
        where=str(folder),
        hint=f"Name it with --format ({', '.join(known)}), or list the cases in a CSV file: "
        "case_id, patient_id, image, label.",
    )
