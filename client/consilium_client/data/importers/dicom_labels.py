"""The label of a DICOM series: drawn on it, beside it, listed in labels.csv, or from a tag."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from consilium_client.data.case_list import read_list, read_table
from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import Choices, is_volume
from consilium_client.data.importers.dicom_tags import parse_tag, tag_values
from consilium_client.data.importers.named_masks import Drawing, drawing_of, numbered
from consilium_client.data.ingest.dicom_headers import Header
from consilium_common.errors import ConsiliumError

#: Class labels for a tree: columns ``label`` and one of ``series``, ``folder``, ``patient_id``.
LABELS_FILE: Final = "labels.csv"
_KEYS: Final = ("series", "folder", "patient_id")


class Labels:
    """Finds the label of an image.

    Parameters
    ----------
    root : Path
        Folder that references start from.
    headers : sequence of Header
        All that was indexed.
    choices : Choices
        ``label_from`` a tag, ``segments`` to take.
    """

    def __init__(self, root: Path, headers: Sequence[Header], choices: Choices) -> None:
        self._root = root
        self._segments = choices.segments
        self._tag = parse_tag(choices.label_from) if choices.label_from else None
        self._classes = {} if self._tag else _class_table(root / LABELS_FILE)
        self._by_series: dict[str, list[Drawing]] = defaultdict(list)
        self._drawings: list[Drawing] = []
        self._beside: dict[Path, list[Path]] = {}
        self.findings: list[Finding] = []
        by_frame: dict[tuple[str, str], set[str]] = defaultdict(set)
        for header in headers:
            if header.is_image and header.frame_of_reference:
                by_frame[header.patient_id, header.frame_of_reference].add(header.series)
        for header in headers:
            try:
                drawing = drawing_of(header)
            except ConsiliumError as error:
                self.findings.append(Finding.of(relative(header.path.parent, root), error))
                continue
            if drawing is not None:
                # Some programs leave the reference out; one series in its space is meant then.
                alone = by_frame.get((header.patient_id, header.frame_of_reference), set())
                if not drawing.series and len(alone) == 1:
                    drawing = replace(drawing, series=tuple(alone))
                self._drawings.append(drawing)
                for uid in dict.fromkeys(drawing.series):
                    self._by_series[uid].append(drawing)

    @property
    def kind(self) -> Literal["mask", "class"]:
        """Whether labels are masks or classes."""
        return "class" if self._tag or self._classes else "mask"

    def label(self, members: Sequence[Header], case: str) -> str | None:
        """Return the label's reference or class for an image's headers, empty where there is none.

        Two candidates are a finding under ``case``, and None.

        Raises
        ------
        ConsiliumError
            ``usage.identifying-tag``.
        """
        first = members[0]
        if self._tag:
            return tag_values(first.path, [self._tag])[0]
        if self._classes:
            keys = {
                "series": first.series,
                "folder": relative(first.path.parent, self._root),
                "patient_id": first.patient_id,
            }
            return next((self._classes[pair] for pair in keys.items() if pair in self._classes), "")
        series = dict.fromkeys(header.series for header in members)
        drawn = {d.path: d for uid in series for d in self._by_series.get(uid, [])}
        candidates = list(
            dict.fromkeys(
                reference for d in drawn.values() if (reference := self._reference(d)) is not None
            )
        )
        if not candidates:
            folders = dict.fromkeys(header.path.parent for header in members)
            beside = [path for folder in folders for path in self._masks_beside(folder)]
            candidates = [relative(path, self._root) for path in dict.fromkeys(beside)]
        if len(candidates) > 1:
            error = ConsiliumError(
                "data.two-labels",
                f"{len(candidates)} segmentations belong to one series.",
                where=" and ".join(str(self._root / name) for name in candidates[:3]),
                hint="Keep the one that the study is to learn from and move the others away, or "
                "name the segments that are meant with --segment.",
            )
            self.findings.append(Finding.of(case, error))
            return None
        return candidates[0] if candidates else ""

    def has_drawing(self, series: str) -> bool:
        """Whether a segmentation refers to the series."""
        return series in self._by_series

    def names(self) -> dict[str, int | str] | None:
        """Return label names to values: segments numbered from 1; None for classes, which are
        taken from the cases.

        Raises
        ------
        ConsiliumError
            ``usage.segment`` for a segment that no file has.
        """
        if self.kind == "class":
            return None
        present = [name for drawing in self._drawings for name in drawing.names]
        unknown = next((name for name in self._segments if name not in present), None)
        if unknown is not None:
            raise ConsiliumError(
                "usage.segment",
                f"No segment or region is called {unknown}.",
                where=str(self._root),
                hint="Check the spelling; an import without --segment lists them in site.yaml.",
            )
        wanted = [name for name in self._segments if name in present]
        return numbered(wanted if self._segments else sorted(set(present), key=present.index))

    def lost(self, series: Mapping[str, object]) -> int:
        """Return how many segmentations refer to none of ``series``."""
        return sum(not series.keys() & set(drawing.series) for drawing in self._drawings)

    def _masks_beside(self, folder: Path) -> list[Path]:
        # A flat export has all series in one folder: it is listed once.
        if folder not in self._beside:
            self._beside[folder] = _masks_beside(folder, self._root)
        return self._beside[folder]

    def _reference(self, drawing: Drawing) -> str | None:
        """Return the reference to what is meant of a drawing, None where nothing of it is."""
        path = relative(drawing.path, self._root)
        if not self._segments:
            return path
        meant = [name for name in self._segments if name in drawing.names]
        return f"{path}#{'|'.join(meant)}" if meant else None


def _class_table(path: Path) -> Mapping[tuple[str, str], str]:
    """Read labels.csv: (key column, key) to class; empty where there is no such file."""
    if not path.is_file():
        return {}
    header, rows = read_table(read_list(path, "list of labels"), where=str(path))
    key = next((name for name in _KEYS if name in header), None)
    if key is None or "label" not in header:
        raise ConsiliumError(
            "data.cases",
            f"{LABELS_FILE} needs the column label and one of {', '.join(_KEYS)}.",
            where=f"{path}:1",
            hint="Name the columns so, or take the file out of the folder.",
        )
    return {(key, row[key]): row["label"] for _, row in rows if row[key]}


def _masks_beside(folder: Path, root: Path) -> list[Path]:
    """Return NIfTI and NRRD masks in the series' folder, or beside it under the folder's name."""
    inside = [path for path in sorted(folder.iterdir()) if is_volume(path)]
    if inside or folder == root:
        return inside
    tails = ("", "_seg", "_label", "_mask")
    endings = [f"{tail}{kind}" for tail in tails for kind in (".nii", ".nii.gz", ".nrrd")]
    endings.append(".seg.nrrd")
    return [path for end in endings if (path := folder.parent / f"{folder.name}{end}").is_file()]


def relative(path: Path, root: Path) -> str:
    """Return a path as cases.csv writes it."""
    return path.relative_to(root).as_posix()
