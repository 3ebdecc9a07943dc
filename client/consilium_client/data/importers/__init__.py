"""Importers: one per layout of images on disk, and the choice of the right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from consilium_client.data.formats import FORMATS
from consilium_client.data.importers.base import Choices, Found, Importer
from consilium_client.data.importers.bids import BidsImporter
from consilium_client.data.importers.class_folders import ClassFolderImporter
from consilium_client.data.importers.csv_list import CsvImporter
from consilium_client.data.importers.dicom_tree import DicomImporter
from consilium_client.data.importers.msd import MsdImporter
from consilium_client.data.importers.nnunet import NnunetImporter
from consilium_client.data.importers.pairs import PairsImporter
from consilium_common.errors import ConsiliumError

__all__ = ["Choices", "Found", "Importer", "choose_importer", "importers"]

#: Options that not every layout has a use for, by the field of Choices that they set.
_OPTIONS: Final = {
    "channels": "--channel",
    "label_from": "--label-from",
    "covariates": "--covariate",
    "derivative": "--derivative",
    "segments": "--segment",
    "mixed": "--mixed",
}


def importers(
    choices: Choices | None = None, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Importer]:
    """Return every importer by name, in the order in which they are tried."""
    told = choices or Choices()
    known: list[Importer] = [
        CsvImporter(told),
        NnunetImporter(),
        MsdImporter(),
        BidsImporter(told),
        PairsImporter(),
        ClassFolderImporter(),
        DicomImporter(told, progress=progress),
    ]
    by_name = {importer.name: importer for importer in known}
    return {name: by_name[name] for name in FORMATS}


def choose_importer(
    folder: Path,
    known: Mapping[str, Importer],
    name: str | None = None,
    choices: Choices | None = None,
) -> tuple[Importer, str]:
    """Return the importer for ``folder`` and one line that says why.

    Parameters
    ----------
    name : str, optional
        The format that a person has named; None detects it.
    choices : Choices, optional
        What a person has said; an option that the format has no use for is an error.

    Raises
    ------
    ConsiliumError
        ``data.missing`` when there is no such folder, ``data.unknown-format`` when no importer
        recognises it, ``data.several-lists``, ``usage.format`` for a name that is none,
        ``usage.option`` for an option that the format does not know.
    """
    if not folder.exists():
        raise ConsiliumError(
            "data.missing",
            "There is no such folder or file.",
            where=str(folder),
            hint="Check the path; it is relative to the folder you are in.",
        )
    if name is not None:
        if name not in known:
            raise ConsiliumError(
                "usage.format",
                f"There is no format {name}.",
                hint=f"The formats are {', '.join(known)}.",
            )
        _require_understood(known[name], choices or Choices())
        return known[name], f"Reading as {name}, as told."
    detected = _detected(folder, known)
    if not detected:
        raise ConsiliumError(
            "data.unknown-format",
            f"The {'folder' if folder.is_dir() else 'file'} has none of the layouts that are "
            "recognised.",
            where=str(folder),
            hint=f"Name it with --format ({', '.join(known)}), or list the cases in a CSV file: "
            "case_id, patient_id, image, label.",
        )
    taken = next(iter(detected))
    _require_understood(known[taken], choices or Choices())
    line = f"Detected {taken}: {detected.pop(taken)}."
    if detected:
        line += f" It could also be read as {', '.join(detected)}: --format chooses."
    return known[taken], line


def _detected(folder: Path, known: Mapping[str, Importer]) -> dict[str, str]:
    """Return the layouts that the folder has, each with its reason, in the order of trying."""
    detected: dict[str, str] = {}
    for importer in known.values():
        try:
            reason = importer.detect(folder)
        except ConsiliumError:
            if not detected:
                raise
            continue  # doubts about another layout do not concern the one that was found
        if reason is not None:
            detected[importer.name] = reason
    return detected


def _require_understood(importer: Importer, choices: Choices) -> None:
    for field, option in _OPTIONS.items():
        if getattr(choices, field) and option not in importer.understands:
            raise ConsiliumError(
                "usage.option",
                f"The format {importer.name} has no use for {option}.",
                hint="Leave the option out, or name another format with --format.",
            )
