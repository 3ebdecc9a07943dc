"""Images and masks in two folders, paired by name: ``images/a.nii.gz``, ``labels/a.nii.gz``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import (
    NO_PATIENTS,
    PICTURES,
    Found,
    is_volume,
    new_case,
    without_suffix,
)
from consilium_client.data.importers.named_masks import segment_names
from consilium_client.data.schema import Case
from consilium_common.errors import ConsiliumError

_IMAGES: Final = re.compile(r"(?:images?|imgs?|scans?|volumes?)(?P<rest>.*)", re.IGNORECASE)
_LABELS: Final = re.compile(r"(?:labels?|masks?|segmentations?|segs?)(?P<rest>.*)", re.IGNORECASE)
_TAILS: Final = ("", "_seg", "_mask", "_label", "_segmentation", "-label", "-seg", "-mask")


def is_pair_folder(name: str) -> bool:
    """Whether a folder's name says that it holds images, or their labels."""
    return bool(_IMAGES.fullmatch(name) or _LABELS.fullmatch(name))


class PairsImporter:
    """Reads ``images*/NAME`` with ``labels*/NAME`` (or masks*, seg*), NIfTI, NRRD or pictures.

    The mask may be called ``NAME_seg``, ``NAME_mask`` or ``NAME_label``; both folders may be
    nested alike.
    """

    name = "pairs"
    understands: frozenset[str] = frozenset()

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        pairs = _folders(folder)
        if not pairs:
            return None
        for images, labels in pairs:
            if any(True for _ in _files(images)) and any(True for _ in _files(labels)):
                return f"{images.name}/ and {labels.name}/"
        return None

    def cases(self, folder: Path) -> Found:
        """List the pairs; the layout names no patients, so each case is its own.

        Raises
        ------
        ConsiliumError
            ``data.no-list`` when there are no two such folders with files of one name.
        """
        cases: list[Case] = []
        findings: list[Finding] = []
        pairs = _folders(folder)
        unpaired = 0
        for images, labels in pairs:
            masks = {_key(path, labels): path for path in _files(labels)}
            used: set[Path] = set()
            for path in _files(images):
                key = _key(path, images)
                fitting = [masks[key + tail] for tail in _TAILS if key + tail in masks]
                used.update(fitting)
                name = f"{images.name}/{key}" if len(pairs) > 1 else key
                if len(fitting) > 1:
                    findings.append(_two_masks(name, fitting))
                    continue
                cases.append(
                    new_case(
                        path,
                        case_id=name,
                        images={"image": str(path.relative_to(folder))},
                        label=str(fitting[0].relative_to(folder)) if fitting else "",
                    )
                )
            unpaired += len(set(masks.values()) - used)
        if not any(case.label for case in cases) and not findings:
            raise ConsiliumError(
                "data.no-list",
                "There are no two folders with images and masks of one name.",
                where=str(folder),
                hint="Call them images/ and labels/, and a mask as its image; or list the cases in "
                "a CSV file.",
            )
        names = segment_names(folder / case.label for case in cases if case.label)
        return Found(
            root=folder,
            cases=tuple(cases),
            label_kind="mask",
            labels=names,
            labels_by_name=bool(names),
            findings=tuple(findings),
            notes=(NO_PATIENTS, *([f"Masks without an image: {unpaired}."] if unpaired else [])),
        )


def _folders(folder: Path) -> list[tuple[Path, Path]]:
    """Return (images, labels): ``imagesTr`` goes with ``labelsTr``, ``images`` with ``masks``."""
    if not folder.is_dir():
        return []
    children = sorted(path for path in folder.iterdir() if path.is_dir())
    labels = {
        match["rest"].casefold(): path
        for path in reversed(children)
        if (match := _LABELS.fullmatch(path.name))
    }
    return [
        (path, labels[rest])
        for path in children
        if (match := _IMAGES.fullmatch(path.name)) and (rest := match["rest"].casefold()) in labels
    ]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        good = is_volume(path) or path.suffix.lower() in PICTURES
        if good and not path.name.startswith(".") and path.is_file():
            yield path


def _key(path: Path, folder: Path) -> str:
    return without_suffix(path.relative_to(folder).as_posix())


def _two_masks(name: str, masks: list[Path]) -> Finding:
    error = ConsiliumError(
        "data.two-labels",
        f"{len(masks)} masks belong to one image.",
        where=" and ".join(str(path) for path in masks[:3]),
        hint="Keep the one that the study is to learn from; move the others away.",
    )
    return Finding.of(name, error)
