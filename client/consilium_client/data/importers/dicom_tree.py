"""A tree of DICOM files, however nested: series by UID, patients by PatientID, labels beside."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium_client.data.case_list import read_table
from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import Found, input_name
from consilium_client.data.ingest.dicom_headers import (
    Header,
    files_below,
    index_files,
    is_dicom,
)
from consilium_client.data.schema import UNNAMED_INPUT, Case
from consilium_common.errors import ConsiliumError

#: Class labels for a tree: columns ``label`` and one of ``series``, ``folder``, ``patient_id``.
LABELS_FILE: Final = "labels.csv"
_LOOKED_AT: Final = 200
_KEYS: Final = ("series", "folder", "patient_id")


class DicomImporter:
    """Indexes headers only. A label is a DICOM SEG that refers to the series, a NIfTI mask beside
    it, or a class from ``labels.csv`` at the root.

    Parameters
    ----------
    mixed : bool
        Accept folders that hold several patients' images (an archive's flat export). Without it
        such a folder is refused: more often it is a mistake, and one that costs a patient.
    progress : callable, optional
        Called with (files indexed, files).
    """

    name = "dicom"

    def __init__(
        self, *, mixed: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._mixed = mixed
        self._progress = progress

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        if not folder.is_dir():
            return None
        some = files_below(folder)[:_LOOKED_AT]
        return "DICOM files" if any(is_dicom(path) for path in some) else None

    def cases(self, folder: Path) -> Found:
        """List the image series.

        Raises
        ------
        ConsiliumError
            ``data.no-list`` when there is no DICOM image, ``data.cases`` for labels.csv.
        """
        headers, findings = index_files(files_below(folder), progress=self._progress)
        images = [header for header in headers if header.is_image]
        if not images and not findings:
            raise ConsiliumError("data.no-list", "There is no DICOM image.", where=str(folder))
        series: dict[str, list[Header]] = defaultdict(list)
        for header in images:
            series[header.series].append(header)
        refused = self._refused(images, folder)
        labels = _Labels(folder, [h for h in headers if h.is_segmentation])
        cases: list[Case] = []
        # A broken file does not say which series it belongs to: no series of its folder can be
        # trusted to be whole, and the file's own finding stands for them.
        broken = {Path(finding.where).parent for finding in findings}
        for uid, members in series.items():
            folders = {header.path.parent for header in members}
            if (broken | refused.keys()) & folders or _has_two_patients(members):
                continue
            if not members[0].patient_id:
                findings.append(_no_patient(members, folder))
                continue
            cases += self._cases_of(uid, members, images, folder, labels)
        findings += refused.values()
        findings += [
            _two_patients(members[0].path.parent.name, "The series", str(members[0].path.parent))
            for members in series.values()
            if _has_two_patients(members) and not refused.keys() & {h.path.parent for h in members}
        ]
        modalities = Counter(header.modality for header in images)
        absent = [
            h for h in headers if h.is_segmentation and not series.keys() & {*h.referenced_series}
        ]
        passed = [h.modality or "?" for h in headers if not h.is_image and not h.is_segmentation]
        return Found(
            root=folder,
            cases=tuple(cases),
            label_kind="class" if labels.classes else "mask",
            inputs=(input_name(modalities.most_common(1)[0][0]) if images else UNNAMED_INPUT,),
            labels=labels.names(),
            findings=(*findings, *labels.findings),
            notes=(
                *(f"Passed over {n} {kind} objects." for kind, n in Counter(passed).items()),
                *(
                    [f"{len(absent)} segmentations refer to series not found here."]
                    if absent
                    else []
                ),
            ),
            headers=tuple(headers),
        )

    def _refused(self, images: Sequence[Header], root: Path) -> dict[Path, Finding]:
        """Return folders whose images belong to several patients."""
        if self._mixed:
            return {}
        patients: dict[Path, set[str]] = defaultdict(set)
        for header in images:
            patients[header.path.parent].add(header.patient_id)
        return {
            folder: _two_patients(_relative(folder, root), "The folder", str(folder))
            for folder, found in patients.items()
            if len(found) > 1
        }

    def _cases_of(
        self,
        uid: str,
        members: Sequence[Header],
        images: Sequence[Header],
        root: Path,
        labels: _Labels,
    ) -> list[Case]:
        channel = input_name(Counter(header.modality for header in images).most_common(1)[0][0])
        first = members[0]
        label = labels.label(uid, members)
        if label is None:
            return []
        # Radiographs and the like have no place in a stack: each is an image of its own.
        if any(header.position is None or header.frames > 1 for header in members):
            return [
                Case(
                    case_id=_case_id(header.modality, header.sop_instance),
                    patient_id=header.patient_id,
                    images={channel: str(header.path.relative_to(root))},
                    label=label,
                )
                for header in members
            ]
        folder = first.path.parent
        alone = all(
            header.series == uid for header in images if header.path.parent == folder
        ) and all(header.path.parent == folder for header in members)
        reference = _relative(folder, root) if alone and folder != root else uid
        return [
            Case(
                case_id=_case_id(first.modality, uid),
                patient_id=first.patient_id,
                images={channel: reference},
                label=label,
            )
        ]


class _Labels:
    """Finds the label of a series."""

    def __init__(self, root: Path, segmentations: Sequence[Header]) -> None:
        self._root = root
        self._by_series: dict[str, list[Header]] = defaultdict(list)
        for header in segmentations:
            for uid in header.referenced_series:
                self._by_series[uid].append(header)
        self._segmentations = segmentations
        self.classes = _class_table(root / LABELS_FILE)
        self.findings: list[Finding] = []

    def label(self, uid: str, members: Sequence[Header]) -> str | None:
        """Return the label's reference or class, empty where there is none.

        Two candidates are a finding, and None.
        """
        if self.classes:
            keys = {
                "series": uid,
                "folder": _relative(members[0].path.parent, self._root),
                "patient_id": members[0].patient_id,
            }
            return next((self.classes[pair] for pair in keys.items() if pair in self.classes), "")
        drawn = [header.path for header in self._by_series.get(uid, [])]
        candidates = drawn or _masks_beside(members[0].path.parent, self._root)
        if len(candidates) > 1:
            error = ConsiliumError(
                "data.two-labels",
                f"{len(candidates)} segmentations belong to one series.",
                where=" and ".join(str(path) for path in candidates[:3]),
                hint="Keep the one that the study is to learn from; move the others away.",
            )
            self.findings.append(Finding.of(_relative(members[0].path.parent, self._root), error))
            return None
        return str(candidates[0].relative_to(self._root)) if candidates else ""

    def names(self) -> dict[str, int | str]:
        """Return label names to values: classes as they are, segments numbered from 1."""
        if self.classes:
            return {name: name for name in sorted(set(self.classes.values()))}
        segments = sorted({pair for header in self._segmentations for pair in header.segments})
        names = list(dict.fromkeys(name for _, name in segments))
        if not names:
            return {}
        return {"background": 0, **{name: value for value, name in enumerate(names, start=1)}}


def _class_table(path: Path) -> Mapping[tuple[str, str], str]:
    """Read labels.csv: (key column, key) to class; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "data.cases", f"{LABELS_FILE} cannot be read as UTF-8 text.", where=str(path)
        ) from error
    header, rows = read_table(text, where=str(path))
    key = next((name for name in _KEYS if name in header), None)
    if key is None or "label" not in header:
        raise ConsiliumError(
            "data.cases",
            f"{LABELS_FILE} needs the column label and one of {', '.join(_KEYS)}.",
            where=f"{path}:1",
        )
    return {(key, row[key]): row["label"] for _, row in rows if row[key]}


def _masks_beside(folder: Path, root: Path) -> list[Path]:
    """Return NIfTI masks in the series' folder, or beside it under the folder's name."""
    inside = [
        path for path in sorted(folder.iterdir()) if path.name.lower().endswith((".nii", ".nii.gz"))
    ]
    if inside or folder == root:
        return inside
    tails = ("", "_seg", "_label", "_mask")
    endings = [f"{tail}{kind}" for tail in tails for kind in (".nii", ".nii.gz")]
    return [path for end in endings if (path := folder.parent / f"{folder.name}{end}").is_file()]


def _has_two_patients(members: Sequence[Header]) -> bool:
    return len({header.patient_id for header in members}) > 1


def _two_patients(case: str, what: str, where: str) -> Finding:
    error = ConsiliumError(
        "data.two-patients",
        f"{what} holds images of more than one patient.",
        where=where,
        hint="Move each patient's files into a folder of their own; if the folder is an archive's "
        "flat export and every series is one patient's, import with --mixed.",
    )
    return Finding.of(case, error)


def _no_patient(members: Sequence[Header], root: Path) -> Finding:
    error = ConsiliumError(
        "data.no-patient",
        "The series has no PatientID.",
        where=str(members[0].path.parent),
        hint="List the series in a CSV file with a patient_id of your own.",
    )
    return Finding.of(_relative(members[0].path.parent, root), error)


def _case_id(modality: str, uid: str) -> str:
    # The UID itself may carry dates and device numbers; its hash is stable and says nothing.
    return f"{input_name(modality)}-{hashlib.sha256(uid.encode()).hexdigest()[:12]}"


def _relative(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root))
