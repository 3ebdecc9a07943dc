"""What training sees: a site's patients by split, prepared once for a study, then memory-mapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consilium_client.data.doctor.patients import same_image_findings
from consilium_client.data.doctor.study_fit import covariate_channels_of, unfit_findings
from consilium_client.data.importing import require_good
from consilium_client.data.ingest.cache import FolderWriter, Ingested, cache_folder
from consilium_client.data.ingest.room import note_use
from consilium_client.data.ingest.run import ingest, using
from consilium_client.data.ingest.volume import Affine
from consilium_client.data.manifest import Manifest, load_manifest
from consilium_client.data.match import Match, class_names, match_study
from consilium_client.data.parallel import side_by_side
from consilium_client.data.prepare import restore_label
from consilium_client.data.prepared import content_of, prepare_case, recipe_of, require_room
from consilium_client.data.schema import Case
from consilium_client.data.split import SPLITS, Split, assign_splits, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder
from consilium_common.study.schema import Study

#: Voxels of a case from which threads gain more than they wait for each other.
_WORTH_THREADS: Final = 2**20


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
    covariates : mapping
        Facts beside the image, by the site's own name: a number, a word, or None where missing.
    """

    case_id: str
    patient: str
    folder: Path
    affine: Affine
    original_shape: tuple[int, ...]
    original_affine: Affine
    covariates: Mapping[str, float | str | None] = field(default_factory=dict, repr=False)
    _label: npt.NDArray[Any] | None = None
    #: Values of the channels that follow the image's own: the study's covariates.
    _beside: tuple[float, ...] = field(default=(), repr=False)

    def image(self) -> npt.NDArray[np.float32]:
        """Return what the network is given, float32 (C, *spatial).

        The image is memory-mapped and read-only. Where the study has covariates, their constant
        channels follow, in an array of its own.
        """
        pixels = self._load("image")
        if not self._beside:
            return pixels
        whole = np.empty((len(pixels) + len(self._beside), *pixels.shape[1:]), dtype=np.float32)
        whole[: len(pixels)] = pixels
        for channel, value in enumerate(self._beside, start=len(pixels)):
            whole[channel] = value
        return whole

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
    home: SiteHome,
    study: Study,
    *,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Cohort:
    """Check the site's data against the study, prepare what is not prepared, and open it.

    Parameters
    ----------
    progress : callable, optional
        Called with (cases prepared, cases).
    say : callable, optional
        Takes a line on how much room the prepared cases will take, before they are made.

    Raises
    ------
    ConsiliumError
        ``data.no-manifest``, ``data.class-missing``, ``data.channel-missing``,
        ``data.label-kind``, ``data.covariate-missing``, ``data.covariate``, ``data.dimensions``,
        ``data.no-spacing``, whatever is wrong with single cases, ``state.quota`` and
        ``state.disk``. ``where`` never names an image file: the report at the site does.
    """
    with using(home):
        return _open_cohort(home, study, progress, say)


def _open_cohort(
    home: SiteHome,
    study: Study,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None] | None,
) -> Cohort:
    manifest = load_manifest(home)
    match = match_study(manifest.site, study)
    key = open_patient_key(home)
    splits = assign_splits(manifest.cases, key, manifest.site.split)
    outcome = ingest(home, manifest, say=say)
    unfit = unfit_findings(manifest, outcome.entries, study)
    beside, unknown = covariate_channels_of(manifest, study)
    # One image under two patients: the promise per patient would be broken.
    alike = same_image_findings(manifest.cases, outcome.entries, key)
    twice = [finding for finding in alike if finding.severity == "error"]
    findings = (*outcome.findings, *unfit, *unknown, *twice)
    require_good(home, findings, len(manifest.cases), name_files=False)
    folder = private_folder(cache_folder(home) / "prepared" / recipe_of(study, match))
    note_use(home, folder.name, study.digest)
    entries = outcome.entries.values()
    require_room(home, folder, entries, study, quota_gib=manifest.site.cache_quota_gib, say=say)
    found: dict[str, list[CaseData]] = {}
    classes: dict[str, npt.NDArray[Any]] = {}
    if study.task.kind == "classification":
        classes = {
            case.case_id: label
            for case in manifest.cases
            if (label := _class_label(case, manifest, match, study)) is not None
        }
    masks = study.task.kind == "segmentation"
    taken = [case for case in manifest.cases if masks or case.case_id in classes]
    wanted = {entry.content: entry for entry in (outcome.entries[c.case_id] for c in taken)}
    contents = {content: content_of(folder / content) for content in wanted}
    new = [entry for content, entry in wanted.items() if contents[content] is None]
    large = sum(math.prod(entry.shape) for entry in new) > _WORTH_THREADS * len(new)
    writer = FolderWriter(folder)

    def make(entry: Ingested) -> tuple[Path, int, dict[str, Any]]:
        arrays, content = prepare_case(entry, study, match)
        return *writer.write(arrays, content), content

    with writer, closing(side_by_side(make, new, threads=None if large else 1)) as made:
        for number, case in enumerate(taken, start=1):
            entry = outcome.entries[case.case_id]
            content = contents[entry.content]
            if content is None:  # in the order in which they are made
                place, size, content = next(made)
                contents[entry.content] = content
                writer.adopt(place, entry.content, size)
            name = key.name(case.patient_id)
            found.setdefault(name, []).append(
                CaseData(
                    case_id=case.case_id,
                    patient=name,
                    folder=folder / entry.content,
                    affine=np.array(content["affine"]),
                    original_shape=entry.original_shape,
                    original_affine=entry.original_affine,
                    covariates=case.covariates,
                    _label=classes.get(case.case_id),
                    _beside=beside[case.case_id],
                )
            )
            if progress is not None:
                progress(number, len(taken))
    patients: dict[Split, tuple[Patient, ...]] = {
        split: tuple(
            Patient(name, tuple(found[name])) for name in sorted(found) if splits[name] == split
        )
        for split in SPLITS
    }
    return Cohort(
        manifest.site.site,
        patients,
        classes=tuple(study.task.classes),
        left_out=len(manifest.cases) - len(taken),
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


def _class_label(
    case: Case, manifest: Manifest, match: Match, study: Study
) -> npt.NDArray[Any] | None:
    """Return the case's class label, or None where its class is none of the study's."""
    names = class_names(case.label, manifest.site)
    found = sorted({match.classes[name] for name in names if name in match.classes})
    if study.task.multi_label:
        label = np.zeros(len(study.task.classes), dtype=np.float32)
        label[found] = 1
        return label
    return np.array(found[0], dtype=np.int64) if found else None
