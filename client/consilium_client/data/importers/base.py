"""What an importer is: it recognises a folder and lists its cases, and reads no pixels."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.picture import SUFFIXES
from consilium_client.data.schema import UNNAMED_INPUT, Case
from consilium_common.errors import ConsiliumError

#: Layouts that name no patients say so.
NO_PATIENTS: Final = (
    "This layout names no patients: every case counts as a patient of its own. If patients have "
    "several cases, give --patients FILE.csv (case_id, patient_id); privacy per patient depends "
    "on it."
)
PICTURES: Final = SUFFIXES
#: Most characters of a case's name.
_LONGEST: Final = 200
_VOLUMES: Final = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd")


@dataclass(frozen=True)
class Choices:
    """What a person may say about how a layout is to be read; everything has a default.

    Parameters
    ----------
    inputs : tuple of str
        Names of the input channels, in order.
    channels : mapping
        Channel name to a pattern for the series or modality that it holds (DICOM, BIDS).
    label_from : str
        Where a class or a number comes from: a DICOM tag, a column of participants.tsv or of the
        case list. Empty: from the layout's own place.
    covariates : mapping
        Covariate name to such a tag or column.
    derivative : str
        Pattern for the labels to take where a BIDS folder has several.
    segments : tuple of str
        Segments or regions to take from DICOM SEG and RTSTRUCT; a later one covers an earlier.
    mixed : bool
        Accept DICOM folders that hold several patients.
    """

    inputs: tuple[str, ...] = ()
    channels: Mapping[str, str] = field(default_factory=dict)
    label_from: str = ""
    covariates: Mapping[str, str] = field(default_factory=dict)
    derivative: str = ""
    segments: tuple[str, ...] = ()
    mixed: bool = False


@dataclass(frozen=True)
class Found:
    """What an importer found in a folder.

    Parameters
    ----------
    root : Path
        Folder that the cases' references start from.
    cases : tuple of Case
    label_kind : str
        ``mask`` or ``class``.
    inputs : tuple of str
        Channel names; the first case's order.
    labels : mapping
        Label name to value; empty where the source names none, None where the classes are to be
        taken from the cases.
    labels_by_name : bool
        Whether the masks themselves name their labels, so that the values are ours to give.
    covariates : tuple of str
        Names of the cases' covariates.
    findings : tuple of Finding
        Cases that cannot be listed.
    notes : tuple of str
        What a person should know, without any patient's identity.
    headers : tuple of Header
        DICOM headers read on the way.
    """

    root: Path
    cases: tuple[Case, ...]
    label_kind: Literal["mask", "class"]
    inputs: tuple[str, ...] = (UNNAMED_INPUT,)
    labels: Mapping[str, int | str] | None = None
    labels_by_name: bool = False
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    headers: tuple[Header, ...] = ()
    covariates: tuple[str, ...] = ()


class Importer(Protocol):
    """One layout of images and labels on disk."""

    @property
    def name(self) -> str:
        """What ``--format`` calls it."""
        ...

    @property
    def understands(self) -> frozenset[str]:
        """The choices of a person that this layout has a use for, by their option."""
        ...

    def detect(self, folder: Path) -> str | None:
        """Say in a few words why ``folder`` has this layout, or None where it has not."""
        ...

    def cases(self, folder: Path) -> Found:
        """List the cases.

        Raises
        ------
        ConsiliumError
            ``data.*`` when the layout itself is broken; defects of single cases are findings.
        """
        ...


def input_name(text: str) -> str:
    """Turn a source's name of a channel into a valid one: ``T1 post`` becomes ``t1-post``."""
    plain = re.sub(r"[^a-z0-9_.]+", "-", text.strip().lower()).strip("-_.")
    return plain[:63] or UNNAMED_INPUT


def new_case(
    place: Path,
    *,
    case_id: str,
    images: Mapping[str, str],
    label: str,
    patient_id: str | None = None,
    covariates: Mapping[str, float | str | None] | None = None,
) -> Case:
    """Return a case under a name that the case list can hold.

    Parameters
    ----------
    place : Path
        Where the case was found, for the error.
    case_id : str
        Spaces at its ends are left out; what is too long is shortened, with a hash of the whole.
    patient_id : str, optional
        None where the layout names no patients: the case is a patient of its own.

    Raises
    ------
    ConsiliumError
        ``data.name`` for what would not be the same when it is read from the list.
    """
    name = case_id.strip()
    if len(name) > _LONGEST:  # two long names that differ at their ends stay two
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
        name = f"{name[: _LONGEST - 13]}-{digest}"
    try:
        if any(cell != cell.strip() for cell in (*images.values(), label)):
            raise ValueError("the list's cells are stripped")
        return Case(
            case_id=name,
            patient_id=name if patient_id is None else patient_id,
            images=dict(images),
            label=label,
            covariates=dict(covariates or {}),
        )
    except ValueError as error:  # pydantic's errors are such
        raise ConsiliumError(
            "data.name",
            "The case list cannot hold the name of a file, a folder or a patient.",
            where=str(place),
            hint="Names are UTF-8 text without a space at either end, a patient's identifier has "
            "at most 200 characters. Rename what is not, or list the cases in a CSV file.",
        ) from error


@contextmanager
def listing(folder: Path) -> Iterator[None]:
    """Turn what the system refuses while a layout is looked at into one clear error.

    Raises
    ------
    ConsiliumError
        ``data.missing``.
    """
    try:
        yield
    except OSError as error:
        raise ConsiliumError(
            "data.missing",
            f"A file or folder cannot be looked at: {error.strerror or type(error).__name__}.",
            where=str(error.filename or folder),
            hint="Give this user the right to read it, or move it out of the folder.",
        ) from error


def closed_folders(folder: Path) -> list[Finding]:
    """Return a finding for each folder below that this user may not list: whatever looks through
    the tree would pass over its images without a word."""
    closed: list[Finding] = []

    def refused(error: OSError) -> None:
        said = ConsiliumError(
            "data.missing",
            "The folder may not be read by this user.",
            where=str(error.filename),
            hint="Give this user the right to read it, or leave its images out (--skip-bad does).",
        )
        closed.append(Finding.of(Path(error.filename).name, said))

    for _, folders, _ in os.walk(folder, onerror=refused):
        folders[:] = [name for name in folders if name != "lost+found" and name[:1] != "."]
    return closed


def without_suffix(text: str) -> str:
    """Return a file's name without what says its format: ``a.nii.gz`` becomes ``a``."""
    lower = text.lower()
    known = next((suffix for suffix in (*_VOLUMES, *PICTURES) if lower.endswith(suffix)), "")
    return text[: len(text) - len(known)]


def is_volume(path: Path) -> bool:
    """Whether the file's name says NIfTI or NRRD."""
    return path.name.lower().endswith(_VOLUMES)


def unique_inputs(names: Sequence[str]) -> tuple[str, ...]:
    """Return valid channel names, numbered where two would be the same."""
    plain = [input_name(name) for name in names]
    return tuple(
        name if plain.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(plain)
    )


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Read the ``dataset.json`` of the Decathlon and of nnU-Net.

    Raises
    ------
    ConsiliumError
        ``data.dataset-json``.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConsiliumError(
            "data.no-list",
            f"There is no {path.name}.",
            where=str(path.parent),
            hint="Leave --format out: the layout is then detected.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise broken_dataset_json(path, "it cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise broken_dataset_json(path, "it holds no object")
    return content


def broken_dataset_json(path: Path, why: str) -> ConsiliumError:
    """Return the error for a ``dataset.json`` that says something impossible."""
    return ConsiliumError(
        "data.dataset-json",
        f"{path.name} is not in its layout: {why}.",
        where=str(path),
        hint="Mend it, or list the cases in a CSV file: case_id, patient_id, image, label.",
    )


def inside(reference: str, listed_in: Path) -> str:
    """Return a path that a list names, from the list's own folder.

    Raises
    ------
    ConsiliumError
        ``data.outside``: the list came from elsewhere, and may not point at anything but its own
        folder.
    """
    relative = Path(reference)
    if relative.is_absolute() or ".." in relative.parts:
        raise ConsiliumError(
            "data.outside",
            f"A path in {listed_in.name} leaves the folder.",
            where=f"{listed_in}: {reference[:200]}",
            hint="List such images in a CSV file of your own instead.",
        )
    return str(relative)
