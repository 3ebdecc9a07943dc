"""The files of a BIDS folder: sessions with their images, masks under derivatives, tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import numpy as np

from consilium_client.data.case_list import read_list
from consilium_client.data.findings import reading
from consilium_client.data.importers.base import without_suffix
from consilium_client.data.ingest.nifti import open_nifti
from consilium_common.errors import ConsiliumError

_NIFTI: Final = (".nii", ".nii.gz")
#: Last words of file names that hold a label per voxel.
_MASKS: Final = frozenset({"dseg", "mask", "seg", "roi", "label"})
_RAW: Final = "raw"


@dataclass(frozen=True)
class BidsFile:
    """One NIfTI file.

    Parameters
    ----------
    path : Path
    key : str
        Its name without participant, session and ending: ``acq-3d_T1w``.
    pipeline : str
        Folder under derivatives, or ``raw``.
    """

    path: Path
    key: str
    pipeline: str = _RAW

    @property
    def names(self) -> tuple[str, ...]:
        """What a pattern may call it: the key, and the modality alone."""
        return self.key, self.key.rpartition("_")[2]

    @property
    def is_mask(self) -> bool:
        """Whether the name says that it holds labels."""
        return self.key.rpartition("_")[2] in _MASKS or "label-" in self.key

    def reference(self, root: Path) -> str:
        """Return what cases.csv calls it."""
        return self.path.relative_to(root).as_posix()

    def grid_like(self, other: BidsFile, tolerance: float) -> bool:
        """Whether both headers say one grid; a header that cannot be read says none."""
        try:
            with reading(self.path, "NIfTI file"):
                one, two = open_nifti(self.path), open_nifti(other.path)
                return one.shape[:3] == two.shape[:3] and bool(
                    np.allclose(one.affine, two.affine, atol=tolerance)
                )
        except ConsiliumError:
            return False


@dataclass(frozen=True)
class Session:
    """One session of one participant: a case."""

    participant: str
    session: str
    images: tuple[BidsFile, ...]

    @property
    def name(self) -> str:
        """The case's name: ``sub-01_ses-2``."""
        return f"{self.participant}_{self.session}" if self.session else self.participant


def sessions_of(folder: Path) -> list[Session]:
    """Return the sessions that have an image under anat."""
    found: list[Session] = []
    for person in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        for place in _sessions(person):
            session = place.name if place != person else ""
            files = (_file(path, person.name, session) for path in _niftis(place / "anat"))
            images = tuple(file for file in files if not file.is_mask)
            if images:
                found.append(Session(person.name, session, images))
    return found


def label_files(folder: Path, sessions: Sequence[Session], wanted: str = "") -> dict[str, BidsFile]:
    """Return the mask of each case that has one.

    Parameters
    ----------
    wanted : str
        Pattern for ``pipeline/key`` or the pipeline, where there are several kinds of masks.

    Raises
    ------
    ConsiliumError
        ``data.no-label`` where no mask fits, ``data.two-labels`` where several kinds do.
    """
    kinds: dict[str, dict[str, BidsFile]] = defaultdict(dict)
    for session in sessions:
        for file in _masks_of(folder, session):
            kinds[f"{file.pipeline}/{file.key}"][session.name] = file
    chosen = {
        kind: files
        for kind, files in kinds.items()
        if not wanted or any(fnmatchcase(name, wanted) for name in (kind, *kind.split("/", 1)))
    }
    listed = ", ".join(f"{kind} ({len(files)} cases)" for kind, files in sorted(kinds.items()))
    if not chosen:
        raise ConsiliumError(
            "data.no-label",
            f"No mask fits {wanted}; there are {listed}."
            if kinds
            else "The BIDS folder has no masks (derivatives/*/sub-*/**/*_dseg or *_mask).",
            where=str(folder),
            hint="Give --derivative PATTERN for masks, or --label-from COLUMN for a class or a "
            "number from participants.tsv.",
        )
    if len(chosen) > 1:
        raise ConsiliumError(
            "data.two-labels",
            f"There are several kinds of masks: {listed}.",
            where=str(folder),
            hint="Choose one: --derivative PIPELINE/NAME; * and ? stand for anything.",
        )
    return next(iter(chosen.values()))


def mask_names(folder: Path, mask: BidsFile) -> dict[str, int | str]:
    """Return label names to values from the mask's ``dseg.tsv``, or from its ``label-`` entity;
    empty where neither tells.

    Raises
    ------
    ConsiliumError
        ``data.cases`` for a table that cannot be read.
    """
    home = folder / "derivatives" / mask.pipeline if mask.pipeline != _RAW else folder
    key = mask.key
    beside = mask.path.with_name(without_suffix(mask.path.name) + ".tsv")
    places = [beside, home / f"{key}.tsv", folder / f"{key}.tsv", home / "dseg.tsv"]
    places += [folder / "dseg.tsv"]
    tables = sorted(home.glob("*dseg.tsv"))
    table = next((path for path in places if path.is_file()), None)
    if table is None and len(tables) == 1 and key.endswith("dseg"):
        table = tables[0]
    if table is None:
        label = next((p.removeprefix("label-") for p in key.split("_") if p[:6] == "label-"), "")
        return {"background": 0, label: 1} if label and not key.endswith("dseg") else {}
    header, rows = _read_tsv(table)
    good = {"index", "name"} <= set(header) and all(row["index"].isdecimal() for row in rows)
    if not good:
        raise ConsiliumError(
            "data.cases",
            "The table of labels needs the columns index (a whole number) and name.",
            where=str(table),
            hint="Correct the table, or take it away: values then stand for themselves.",
        )
    named: dict[str, int | str] = {row["name"][:120]: int(row["index"]) for row in rows}
    return named if 0 in named.values() else {"background": 0, **named}


def facts_of(
    folder: Path, sessions: Sequence[Session], columns: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return what the tables say about each case, by its name; empty where no column is asked for.

    A session's own table (``sub-01_sessions.tsv``) goes before ``participants.tsv``.

    Raises
    ------
    ConsiliumError
        ``usage.column`` for a column that no table has, ``data.missing`` without
        ``participants.tsv``, ``data.cases`` where a table is broken.
    """
    if not columns:
        return {}
    own: dict[str, dict[str, str]] = {}
    for person in dict.fromkeys(session.participant for session in sessions):
        path = folder / person / f"{person}_sessions.tsv"
        for row in _read_tsv(path)[1] if path.is_file() else ():
            own[f"{person}_ses-{row.get('session_id', '').removeprefix('ses-')}"] = row
    known = {name for row in own.values() for name in row}
    shared = _participants(folder, [name for name in columns if name not in known])
    return {
        session.name: {**shared.get(session.participant, {}), **own.get(session.name, {})}
        for session in sessions
    }


def _participants(folder: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    path = folder / "participants.tsv"
    if not path.is_file() and not columns:
        return {}
    if not path.is_file():
        raise ConsiliumError(
            "data.missing",
            "There is no participants.tsv.",
            where=str(path),
            hint="It holds the columns for --label-from and --covariate.",
        )
    header, rows = _read_tsv(path)
    if "participant_id" not in header:
        raise ConsiliumError(
            "data.cases",
            "participants.tsv has no column participant_id.",
            where=str(path),
            hint="BIDS needs it: sub-01 and so on.",
        )
    unknown = [name for name in columns if name not in header]
    if unknown:
        others = ", ".join(name for name in header if name != "participant_id") or "none"
        raise ConsiliumError(
            "usage.column",
            f"participants.tsv has no column {unknown[0]}.",
            where=str(path),
            hint=f"Its columns are {others}.",
        )
    return {f"sub-{row['participant_id'].removeprefix('sub-')}": row for row in rows}


def _masks_of(folder: Path, session: Session) -> Iterator[BidsFile]:
    raw = folder / session.participant / session.session / "anat"
    for path in _niftis(raw):
        file = _file(path, session.participant, session.session)
        if file.is_mask:
            yield file
    derivatives = folder / "derivatives"
    for pipeline in sorted(derivatives.iterdir()) if derivatives.is_dir() else ():
        place = pipeline / session.participant / session.session
        for path in sorted(place.rglob("*")) if place.is_dir() else ():
            file = _file(path, session.participant, session.session, pipeline.name)
            nested = not session.session and f"{session.participant}_ses-" in path.name
            if file.is_mask and path.name.endswith(_NIFTI) and path.is_file() and not nested:
                yield file


def _sessions(person: Path) -> list[Path]:
    sessions = sorted(path for path in person.glob("ses-*") if path.is_dir())
    return [person, *sessions]


def _niftis(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(_NIFTI) and p.is_file())


def _file(path: Path, participant: str, session: str, pipeline: str = _RAW) -> BidsFile:
    parts = without_suffix(path.name).split("_")
    return BidsFile(path, "_".join(p for p in parts if p not in (participant, session)), pipeline)


def _read_tsv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    text = read_list(path, "table")
    lines = [line.split("\t") for line in text.split("\n") if line]  # BIDS knows no quotes
    header = [cell.strip() for cell in lines[0]] if lines else []
    for number, row in enumerate(lines[1:], start=2):
        if len(row) != len(header):
            raise ConsiliumError(
                "data.cases",
                f"The row has {len(row)} cells, the header {len(header)}.",
                where=f"{path}:{number}",
                hint="A BIDS table has a tab between cells, and n/a where there is no value.",
            )
    return header, [
        {name: cell.strip() for name, cell in zip(header, row, strict=True)} for row in lines[1:]
    ]
