"""A tree of DICOM files, however nested: series by UID, patients by PatientID, labels beside."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from consilium_client.data.case_list import covariates_of
from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import Choices, Found, input_name, new_case
from consilium_client.data.importers.channels import matching, unfit_channel
from consilium_client.data.importers.dicom_labels import Labels, relative
from consilium_client.data.importers.dicom_tags import Tag, parse_tag, tag_values
from consilium_client.data.ingest.dicom_headers import (
    Header,
    files_below,
    index_files,
    is_dicom,
)
from consilium_client.data.ingest.dicomdir import dicomdir_findings, read_dicomdir
from consilium_client.data.schema import UNNAMED_INPUT, Case
from consilium_common.errors import ConsiliumError

_LOOKED_AT: Final = 200
_DIRECTORY: Final = "DICOMDIR"


@dataclass(frozen=True)
class _Image:
    """One image: a series, or a single file of one that is no stack."""

    members: tuple[Header, ...]
    #: What cases.csv calls it.
    reference: str
    #: What its case is named after.
    uid: str


class DicomImporter:
    """Indexes headers only. A label is a DICOM SEG or RTSTRUCT that refers to the series, a mask
    beside it, a class from ``labels.csv`` at the root, or a class or number from a tag.

    Parameters
    ----------
    choices : Choices
        ``channels`` makes each study (StudyInstanceUID) a case, with one series per channel;
        ``label_from`` and ``covariates`` name tags; ``segments`` names what is taken of drawings.
        ``mixed`` accepts folders that hold several patients' images (an archive's flat export).
        Without it such a folder is refused: more often it is a mistake, and one that costs a
        patient.
    progress : callable, optional
        Called with (files indexed, files).
    """

    name = "dicom"
    understands = frozenset({"--channel", "--label-from", "--covariate", "--segment", "--mixed"})

    def __init__(
        self,
        choices: Choices | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._choices = choices or Choices()
        self._progress = progress

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        if folder.is_file():
            return f"a {_DIRECTORY}" if folder.name.upper() == _DIRECTORY else None
        some = islice(_walk(folder), _LOOKED_AT)
        return "DICOM files" if any(is_dicom(path) for path in some) else None

    def cases(self, folder: Path) -> Found:
        """List the images; ``folder`` may be a DICOMDIR, and then only what it lists is read.

        Raises
        ------
        ConsiliumError
            ``data.no-list`` when there is no DICOM image, ``data.cases`` for labels.csv,
            ``usage.tag`` and ``usage.identifying-tag`` for tags.
        """
        choices = self._choices
        tags = [parse_tag(text) for text in choices.covariates.values()]
        root = folder.parent if folder.is_file() else folder
        files = read_dicomdir(folder) if folder.is_file() else files_below(folder)
        headers, findings = index_files(files, progress=self._progress)
        images = [header for header in headers if header.is_image]
        if not images and not findings:
            raise ConsiliumError(
                "data.no-list",
                "There is no DICOM image.",
                where=str(folder),
                hint="Leave --format out: the layout is then detected.",
            )
        series: dict[str, list[Header]] = defaultdict(list)
        for header in images:
            series[header.series].append(header)
        labels = Labels(root, headers, choices)
        good = self._good_series(series, root, findings)
        media = [folder, *(path for path in files if path.name.upper() == _DIRECTORY)]
        findings += [gap for path in media if path.is_file() for gap in _gaps(path)]
        neighbours: dict[Path, set[str]] = defaultdict(set)
        for header in images:
            neighbours[header.path.parent].add(header.series)
        several = [image for members in good for image in _images(members, neighbours, root)]
        if choices.channels:
            found = _studies(several, root, choices, findings, labels)
        else:
            channel = _modality(images)
            found = [{channel: image} for image in several]
        inputs = tuple(found[0]) if found else (*choices.channels,) or (_modality(images),)
        return Found(
            root=root,
            cases=self._cases(found, tags, labels, root),
            label_kind=labels.kind,
            inputs=inputs,
            labels=labels.names(),
            labels_by_name=labels.kind == "mask",
            findings=(*findings, *labels.findings),
            notes=_notes(headers, labels, series, len(several) - sum(map(len, found))),
            headers=tuple(headers),
            covariates=tuple(choices.covariates),
        )

    def _good_series(
        self, series: dict[str, list[Header]], root: Path, findings: list[Finding]
    ) -> list[list[Header]]:
        """Return the series that are one known patient's; the others become findings."""
        images = [header for members in series.values() for header in members]
        refused = {} if self._choices.mixed else _mixed_folders(images, root)
        # A broken file does not say which series it belongs to: no series of its folder can be
        # trusted to be whole, and the file's own finding stands for them.
        broken = {Path(finding.where).parent for finding in findings}
        good = []
        for members in series.values():
            folders = {header.path.parent for header in members}
            if _has_two_patients(members):
                if not refused.keys() & folders:
                    place = members[0].path.parent
                    findings.append(_two_patients(place.name, "The series", str(place)))
            elif not (broken | refused.keys()) & folders:
                if members[0].patient_id:
                    good.append(members)
                else:
                    findings.append(_no_patient(members, root))
        findings += refused.values()
        return good

    def _cases(
        self,
        found: Sequence[dict[str, _Image]],
        tags: Sequence[Tag],
        labels: Labels,
        root: Path,
    ) -> tuple[Case, ...]:
        names = tuple(self._choices.covariates)
        rows = []
        cases = []
        for images in found:
            members = [header for image in images.values() for header in image.members]
            label = labels.label(members, _place(members, root))
            if label is None:
                continue
            first = members[0]
            uid = first.study if self._choices.channels else next(iter(images.values())).uid
            rows.append(dict(zip(names, tag_values(first.path, tags), strict=True)) if tags else {})
            cases.append(
                new_case(
                    first.path.parent,
                    case_id=_case_id(first.modality, uid or first.series),
                    patient_id=first.patient_id,
                    images={name: image.reference for name, image in images.items()},
                    label=label,
                )
            )
        return tuple(
            case.model_copy(update={"covariates": known})
            for case, known in zip(cases, covariates_of(rows), strict=True)
        )


def _walk(folder: Path) -> Iterator[Path]:
    """Yield visible files one by one: an archive's tree is not listed to look at a few."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _gaps(media: Path) -> list[Finding]:
    """Return what a DICOMDIR refers to in vain; one that is broken itself is a finding too."""
    try:
        return dicomdir_findings(media)
    except ConsiliumError as error:
        return [Finding.of(media.parent.name, error)]


def _studies(
    images: Sequence[_Image],
    root: Path,
    choices: Choices,
    findings: list[Finding],
    labels: Labels,
) -> list[dict[str, _Image]]:
    """Return one image per channel for each study of a patient; what is amiss is a finding."""
    studies: dict[tuple[str, str], list[_Image]] = defaultdict(list)
    for image in images:
        first = image.members[0]
        studies[first.patient_id, first.study or first.frame_of_reference].append(image)
    found: list[dict[str, _Image]] = []
    for several in studies.values():
        chosen: dict[str, _Image] = {}
        place = _place([header for image in several for header in image.members], root)
        for channel, pattern in choices.channels.items():
            fitting = matching(several, pattern, lambda image: _series_names(image, root))
            if len(fitting) == 1:
                chosen[channel] = fitting[0]
            else:
                findings.append(unfit_channel(place, channel, len(fitting), str(root / place)))
        if len(chosen) == len(choices.channels):
            found.append(chosen)
    # Segmentations lie on the grid of the first channel: it is the one they were drawn on.
    drawn = Counter(
        channel
        for images_of in found
        for channel, image in images_of.items()
        if labels.has_drawing(image.members[0].series)
    )
    order = sorted(choices.channels, key=lambda channel: -drawn[channel])
    return [{channel: images_of[channel] for channel in order} for images_of in found]


def _series_names(image: _Image, root: Path) -> tuple[str, ...]:
    """Return what a pattern may call a series."""
    first = image.members[0]
    place = relative(first.path.parent, root)
    return first.series_description, first.path.parent.name, place, first.modality


def _images(
    members: Sequence[Header], neighbours: Mapping[Path, set[str]], root: Path
) -> list[_Image]:
    """Return a series as one image; ``neighbours`` has the series of each folder."""
    first = members[0]
    # Radiographs and the like have no place in a stack: each is an image of its own.
    if any(header.position is None or header.frames > 1 for header in members):
        return [
            _Image((header,), relative(header.path, root), header.sop_instance)
            for header in members
        ]
    folder = first.path.parent
    alone = neighbours[folder] == {first.series} and all(h.path.parent == folder for h in members)
    reference = relative(folder, root) if alone and folder != root else first.series
    return [_Image(tuple(members), reference, first.series)]


def _notes(
    headers: Sequence[Header], labels: Labels, series: dict[str, list[Header]], aside: int
) -> tuple[str, ...]:
    passed = Counter(
        header.modality or "?"
        for header in headers
        if not header.is_image and not header.is_segmentation and header.modality != "RTSTRUCT"
    )
    notes = [f"Passed over {count} {name} objects." for name, count in passed.items()]
    if aside:
        notes.append(f"{aside} series are no case's channel and are left aside.")
    lost = labels.lost(series) if labels.kind == "mask" else 0
    if lost:
        notes.append(f"{lost} segmentations refer to series not found here.")
    return tuple(notes)


def _mixed_folders(images: Sequence[Header], root: Path) -> dict[Path, Finding]:
    """Return folders whose images belong to several patients."""
    patients: dict[Path, set[str]] = defaultdict(set)
    for header in images:
        patients[header.path.parent].add(header.patient_id)
    return {
        folder: _two_patients(relative(folder, root), "The folder", str(folder))
        for folder, found in patients.items()
        if len(found) > 1
    }


def _modality(images: Sequence[Header]) -> str:
    if not images:
        return UNNAMED_INPUT
    return input_name(Counter(header.modality for header in images).most_common(1)[0][0])


def _place(members: Sequence[Header], root: Path) -> str:
    """Return the folder that holds all of an examination's files, as a person finds it."""
    common = os.path.commonpath([header.path.parent for header in members])
    return relative(Path(common), root)


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
    return Finding.of(relative(members[0].path.parent, root), error)


def _case_id(modality: str, uid: str) -> str:
    # The UID itself may carry dates and device numbers; its hash is stable and says nothing.
    return f"{input_name(modality)}-{hashlib.sha256(uid.encode()).hexdigest()[:12]}"
