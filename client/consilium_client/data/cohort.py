"""What training sees: a site's patients by split, prepared once for a study, then memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consilium_client.data.findings import Finding
from consilium_client.data.importing import require_good
from consilium_client.data.ingest.cache import FolderWriter, Ingested, cache_folder
from consilium_client.data.ingest.run import classes_of, ingest, local_names, using
from consilium_client.data.ingest.volume import Affine, Array
from consilium_client.data.manifest import Manifest, load_manifest
from consilium_client.data.match import Match, match_study
from consilium_client.data.prepare import prepare, restore_label
from consilium_client.data.schema import Case
from consilium_client.data.split import SPLITS, Split, assign_splits, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder
from consilium_common.study.schema import Study

#: Raised whenever the same case would now be prepared differently.
FORMAT: Final = 1


@dataclass(frozen=True, eq=False)
class CaseData:
    """One prepared case.

    Parameters
    ----------
    case_id : str
        As in cases.csv; local only.
    patient : str
        The patient's keyed hash, 32 hexadecimal digits.
    folder : Path
        Where the prepared arrays lie.
    affine : array
        4×4, prepared index to RAS millimetres.
    original_shape, original_affine : tuple, array
        Of the image file or series itself.
    """

    case_id: str
    patient: str
    folder: Path
    affine: Affine
    original_shape: tuple[int, ...]
    original_affine: Affine
    _label: npt.NDArray[Any] | None = None

    def image(self) -> npt.NDArray[np.float32]:
        """Return the image, float32 (C, *spatial), memory-mapped and read-only."""
        return self._load("image")

    def label(self) -> npt.NDArray[Any]:
        """Return the label.

        Segmentation: uint8 (*spatial), study class indices. Classification: int64 scalar array,
        or float32 (classes,) of zeros and ones when the study is multi-label.
        """
        if self._label is not None:
            return self._label
        return self._load("label")

    def _load(self, name: str) -> npt.NDArray[Any]:
        try:
            return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise ConsiliumError(
                "data.purged",
                "A prepared case is no longer in the cache, or is damaged.",
                where=str(self.folder),
                hint="Run `consilium site data purge`, then the command again.",
            ) from error

    def to_original(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Bring class indices on the prepared grid back to the original image's grid."""
        return restore_label(labels, self.affine, self.original_shape, self.original_affine)


@dataclass(frozen=True)
class Patient:
    """One patient: the unit of privacy and of splits."""

    key: str
    cases: tuple[CaseData, ...]


class Cohort:
    """A site's patients, prepared for one study.

    Parameters
    ----------
    site : str
        Name of the site.
    left_out : int
        Cases whose class the study does not name.
    """

    def __init__(
        self,
        site: str,
        patients: Mapping[Split, tuple[Patient, ...]],
        *,
        classes: tuple[str, ...],
        left_out: int = 0,
    ) -> None:
        self.site = site
        self.classes = classes
        self.left_out = left_out
        self._patients = dict(patients)

    def patients(self, split: Split) -> tuple[Patient, ...]:
        """Return the patients of a split, ordered by keyed hash."""
        return self._patients[split]

    def without(self, keys: Collection[str]) -> Cohort:
        """Return the cohort without the patients of these keyed hashes, whatever their split."""
        return Cohort(
            self.site,
            {
                split: tuple(patient for patient in patients if patient.key not in keys)
                for split, patients in self._patients.items()
            },
            classes=self.classes,
            left_out=self.left_out,
        )


def open_cohort(
    home: SiteHome, study: Study, *, progress: Callable[[int, int], None] | None = None
) -> Cohort:
    """Check the site's data against the study, prepare what is not prepared, and open it.

    Parameters
    ----------
    progress : callable, optional
        Called with (cases prepared, cases).

    Raises
    ------
    ConsiliumError
        ``data.no-manifest``, ``data.class-missing``, ``data.channel-missing``,
        ``data.label-kind``, ``data.dimensions``, ``data.no-spacing``, and whatever is wrong with
        single cases. ``where`` never names an image file: the report at the site does.
    """
    with using(home):
        return _open_cohort(home, study, progress)


def _open_cohort(
    home: SiteHome, study: Study, progress: Callable[[int, int], None] | None
) -> Cohort:
    manifest = load_manifest(home)
    match = match_study(manifest.site, study)
    key = open_patient_key(home)
    splits = assign_splits(manifest.cases, key, manifest.site.split)
    outcome = ingest(home, manifest)
    unfit = _unfit(manifest, outcome.entries, study)
    findings = (*outcome.findings, *unfit)
    require_good(home, findings, len(manifest.cases), name_files=False)
    folder = private_folder(cache_folder(home) / "prepared" / _recipe(study, match))
    found: dict[str, list[CaseData]] = {}
    left_out = 0
    with FolderWriter(folder) as writer:
        for number, case in enumerate(manifest.cases, start=1):
            entry = outcome.entries[case.case_id]
            label = None
            if study.task.kind == "classification":
                label = _class_label(case, manifest, match, study)
                if label is None:
                    left_out += 1
                    continue
            content = _content(folder / entry.content)
            if content is None:
                arrays, content = _prepare(entry, study, match)
                writer.add(entry.content, arrays, content)
            name = key.name(case.patient_id)
            found.setdefault(name, []).append(
                CaseData(
                    case_id=case.case_id,
                    patient=name,
                    folder=folder / entry.content,
                    affine=np.array(content["affine"]),
                    original_shape=entry.original_shape,
                    original_affine=entry.original_affine,
                    _label=label,
                )
            )
            if progress is not None:
                progress(number, len(manifest.cases))
    patients: dict[Split, tuple[Patient, ...]] = {
        split: tuple(
            Patient(name, tuple(found[name])) for name in sorted(found) if splits[name] == split
        )
        for split in SPLITS
    }
    return Cohort(
        manifest.site.site, patients, classes=tuple(study.task.classes), left_out=left_out
    )


def describe_cohort(cohort: Cohort) -> dict[str, Any]:
    """Return counts of patients, cases and classes by split: for the site's operator alone.

    For segmentation a class counts the cases in which it occurs.
    """
    described: dict[str, Any] = {"site": cohort.site, "left_out": cohort.left_out, "splits": {}}
    for split in SPLITS:
        patients = cohort.patients(split)
        cases = [case for patient in patients for case in patient.cases]
        counts = np.zeros(len(cohort.classes), dtype=np.int64)
        for case in cases:
            counts += _present(case, len(cohort.classes))
        described["splits"][split] = {
            "patients": len(patients),
            "cases": len(cases),
            "classes": {name: int(n) for name, n in zip(cohort.classes, counts, strict=True)},
        }
    return described


def _present(case: CaseData, classes: int) -> npt.NDArray[np.int64]:
    label = case.label()
    if label.dtype == np.float32:  # multi-label
        return label.astype(np.int64)
    return (np.bincount(label.ravel(), minlength=classes)[:classes] > 0).astype(np.int64)


# --- one case ----------------------------------------------------------------------------------


def _recipe(study: Study, match: Match) -> str:
    """Return the name of the folder that holds cases prepared in this way."""
    return digest(
        {
            "format": FORMAT,
            "kind": study.task.kind,
            "dimensions": study.task.dimensions,
            "preprocessing": study.preprocessing.model_dump(mode="json"),
            "channels": list(match.channels),
            "values": sorted([value, index] for value, index in match.values.items()),
        }
    )[:32]


def _prepare(
    entry: Ingested, study: Study, match: Match
) -> tuple[dict[str, Array], dict[str, Any]]:
    label = None
    if study.task.kind == "segmentation":
        values = entry.label()
        table = np.zeros(int(np.iinfo(values.dtype).max) + 1, dtype=np.uint8)
        for value, index in match.values.items():
            if value < table.size:
                table[value] = index
        label = table[values]
    images = [entry.image(name) for name in match.channels]
    image, label, affine = prepare(images, label, entry.affine, study)
    arrays: dict[str, Array] = {"image": image}
    if label is not None:
        arrays["label"] = label
    return arrays, {"affine": affine.tolist()}


def _content(folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / "case.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _class_label(
    case: Case, manifest: Manifest, match: Match, study: Study
) -> npt.NDArray[Any] | None:
    """Return the case's class label, or None where its class is none of the study's."""
    names = local_names(manifest.site)
    written = classes_of(case)
    found = sorted({match.classes[names[n]] for n in written if names[n] in match.classes})
    if study.task.multi_label:
        label = np.zeros(len(study.task.classes), dtype=np.float32)
        label[found] = 1
        return label
    return np.array(found[0], dtype=np.int64) if found else None


def _unfit(
    manifest: Manifest, entries: Mapping[str, Ingested], study: Study
) -> tuple[Finding, ...]:
    """Find cases that are good in themselves and do not fit this study."""
    findings = []
    wanted = study.task.dimensions
    for case in manifest.cases:
        entry = entries.get(case.case_id)
        if entry is None:
            continue
        error = None
        if len(entry.shape) != wanted:
            error = ConsiliumError(
                "data.dimensions",
                f"The study is {wanted}D and an image has {len(entry.shape)} dimensions.",
                where=next(iter(case.images.values())),
                hint="Take part in a study for such images, or leave the case out.",
            )
        elif study.preprocessing.spacing is not None and not entry.spacing_known:
            error = ConsiliumError(
                "data.no-spacing",
                "The study resamples to a spacing and an image does not say how large its "
                "pixels are.",
                where=next(iter(case.images.values())),
                hint="Import the original DICOM or NIfTI; pictures carry no size.",
            )
        elif study.task.kind == "classification" and not study.task.multi_label:
            count = len(classes_of(case))
            if count != 1:
                error = ConsiliumError(
                    "data.label-values",
                    f"The study takes one class per case and a case has {count}.",
                    where="cases.csv",
                    hint="Correct the label column, or take part in a multi-label study.",
                )
        if error is not None:
            findings.append(Finding.of(case.case_id, error))
    return tuple(findings)
