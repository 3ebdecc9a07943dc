"""Draw training patches by class, cheaply: where each class lies is looked up once per case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.augment import augment
from consilium_client.training.cases import Array, Case, PatientRecord
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.study.covariates import input_channels

#: Voxels remembered per class and case. More would not make patches more varied.
_REMEMBERED: Final = 20_000
#: Data up to this size is held in memory; more stays memory-mapped.
MEMORY_LIMIT: Final = 2 << 30


@dataclass
class TrainingCase:
    """One case's arrays, and per foreground class the flat indices of its voxels."""

    image: NDArray[np.float32]
    label: Array
    _voxels: list[Array] | None = field(default=None, repr=False)

    def voxels(self, classes: int) -> list[Array]:
        """Return, for each foreground class that is present, flat indices of its voxels."""
        if self._voxels is None:
            flat = np.ascontiguousarray(self.label).reshape(-1)
            found = []
            for value in range(1, classes):
                where = np.flatnonzero(flat == value)
                if len(where):
                    found.append(where[:: -(-len(where) // _REMEMBERED)].copy())
            self._voxels = found
        return self._voxels


class PatchSource:
    """A site's training data, from which batches of patches are drawn.

    Parameters
    ----------
    study : Study
        Says patch size, share of foreground and augmentation.
    patients : sequence of PatientRecord
        The patients of the training split.
    memory_limit : int
        Bytes up to which the data is copied into memory (default: 2 GiB).

    Raises
    ------
    ConsiliumError
        ``data.no-patients``, ``data.channels``, ``data.geometry``, ``data.label`` or ``data.size``
        when the data does not fit the study. No error names a patient.
    """

    def __init__(
        self,
        study: Study,
        patients: Sequence[PatientRecord],
        *,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._study = study
        self._segmentation = study.task.kind == "segmentation"
        self._classes = len(study.task.classes)
        self._patch = None if study.training.patch is None else tuple(study.training.patch)
        self.patients: list[list[TrainingCase]] = [
            [_load(study, case) for case in patient.cases] for patient in patients
        ]
        self.cases: list[TrainingCase] = [case for cases in self.patients for case in cases]
        if not self.cases:
            raise ConsiliumError(
                "data.no-patients",
                "The training split holds no case.",
                hint="Import more data, or change the split, with `consilium site data`.",
            )
        if self._patch is None and len({case.image.shape for case in self.cases}) > 1:
            raise ConsiliumError(
                "data.size",
                "Images differ in size, and the study trains on whole images.",
                hint="Set preprocessing.size or training.patch in the study.",
            )
        if sum(case.image.nbytes + case.label.nbytes for case in self.cases) <= memory_limit:
            for case in self.cases:
                case.image, case.label = np.array(case.image), np.array(case.label)

    def batch(
        self, cases: Sequence[TrainingCase], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Array]:
        """Draw one patch from each of ``cases``, changed in ``augmentation.copies`` ways.

        Returns
        -------
        images : float32, (len(cases) · copies, channels, \\*patch)
        targets : as many; uint8 class indices (\\*patch) for segmentation; int64 or float32
            (classes,) for classification
        """
        drawn = [changed for case in cases for changed in self._draw(case, rng)]
        return (
            np.stack([image for image, _ in drawn]),
            np.stack([target for _, target in drawn]),
        )

    def patient_batch(
        self, patient: int, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Array]:
        """Draw ``count`` patches of one patient, spread over the patient's cases; as `batch`."""
        cases = self.patients[patient]
        # Whole passes over the cases, then a random rest: no case is drawn twice before another
        # has been drawn once.
        order = np.concatenate(
            [rng.permutation(len(cases)) for _ in range(-(-count // len(cases)))]
        )
        return self.batch([cases[i] for i in order[:count]], rng)

    def _draw(
        self, case: TrainingCase, rng: np.random.Generator
    ) -> list[tuple[NDArray[np.float32], Array]]:
        """Draw one patch, or the whole image, and change each of its copies at random."""
        settings = self._study.training.augmentation
        image = case.image
        label = case.label if self._segmentation else None
        if label is not None and self._patch is not None:
            start = self._start(case, self._patch, rng)
            image = _cut(image, start, self._patch)
            label = _cut(label[np.newaxis], start, self._patch)[0]
        pixels = len(self._study.task.inputs)
        drawn = []
        for _ in range(settings.copies):
            new, moved = augment(image[:pixels], label, settings, rng)
            if len(image) > pixels:  # covariates are facts: nothing changes them
                new = np.concatenate([new, image[pixels:]])
            drawn.append((new, case.label if moved is None else moved))
        return drawn

    def _start(
        self, case: TrainingCase, patch: tuple[int, ...], rng: np.random.Generator
    ) -> list[int]:
        """Choose the patch's first corner: around a voxel of one class, or anywhere."""
        shape = case.label.shape
        room = [max(size - extent, 0) for size, extent in zip(shape, patch, strict=True)]
        if rng.random() < self._study.training.foreground_share:
            present = case.voxels(self._classes)
            if present:
                voxels = present[int(rng.integers(len(present)))]
                centre = np.unravel_index(int(voxels[int(rng.integers(len(voxels)))]), shape)
                return [
                    min(max(int(c) - extent // 2, 0), most)
                    for c, extent, most in zip(centre, patch, room, strict=True)
                ]
        return [int(rng.integers(most + 1)) for most in room]


def _cut(array: Array, start: Sequence[int], patch: Sequence[int]) -> Array:
    """Cut (channels, \\*patch) out of ``array``; where it is smaller, pad with 0 on both sides.

    The padding is that of sliding-window inference, so training and evaluation see the same.
    """
    ends = [s + p for s, p in zip(start, patch, strict=True)]
    cut = array[(slice(None), *(slice(s, e) for s, e in zip(start, ends, strict=True)))]
    missing = [p - size for p, size in zip(patch, cut.shape[1:], strict=True)]
    if any(missing):
        return np.pad(cut, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    return cut


def _load(study: Study, case: Case) -> TrainingCase:
    image, label = case.image(), np.asarray(case.label())
    spatial = image.shape[1:]
    channels = input_channels(study.task)
    if image.shape[0] != channels or len(spatial) != study.task.dimensions:
        raise ConsiliumError(
            "data.channels",
            f"An image has {image.shape[0]} channels in {len(spatial)} dimensions; the study "
            f"wants {channels} in {study.task.dimensions}.",
            hint="Import the data again with `consilium site data import`.",
        )
    classes = len(study.task.classes)
    if study.task.kind == "segmentation":
        fits, largest = label.shape == spatial, int(label.max(initial=0))
    elif study.task.multi_label:
        fits, largest = label.shape == (classes,), 0
    else:
        fits, largest = label.shape == (), int(label)
    if not fits:
        raise ConsiliumError(
            "data.geometry",
            f"A label has the shape {label.shape}, which does not fit its image {spatial}.",
            hint="Import the data again with `consilium site data import`.",
        )
    if not 0 <= largest < classes:
        raise ConsiliumError(
            "data.label",
            f"A label holds the class {largest}; the study has classes 0 to {classes - 1}.",
            hint="Check the site's map of label names with `consilium site data check`.",
        )
    return TrainingCase(image, label)
