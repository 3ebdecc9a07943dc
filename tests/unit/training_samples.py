"""Small cohorts in memory and small studies, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_common.study import Study


@dataclass(frozen=True, eq=False)
class MemoryCase:
    case_id: str
    pixels: NDArray[np.float32]
    classes: NDArray[Any]

    def image(self) -> NDArray[np.float32]:
        return self.pixels

    def label(self) -> NDArray[Any]:
        return self.classes


@dataclass(frozen=True)
class MemoryPatient:
    cases: tuple[MemoryCase, ...]


@dataclass
class MemoryCohort:
    splits: dict[str, list[MemoryPatient]]
    asked: list[str] = field(default_factory=list)

    def patients(self, split: str) -> list[MemoryPatient]:
        self.asked.append(split)
        return self.splits.get(split, [])


def ball(shape: Sequence[int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a label map with one ball of class 1 that lies inside the image."""
    centre = [rng.uniform(0.35, 0.65) * n for n in shape]
    grid = np.indices(shape)
    distance = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True))
    return (distance < (0.28 * min(shape)) ** 2).astype(np.uint8)


def segmentation_patient(
    number: int, *, shape: Sequence[int] = (16, 16, 16), cases: int = 1
) -> MemoryPatient:
    """Return a patient whose ball is brighter than what is around it."""
    made = []
    for index in range(cases):
        rng = np.random.default_rng([number, index])
        label = ball(shape, rng)
        noise = rng.standard_normal((1, *shape)) * 0.3
        made.append(
            MemoryCase(f"case-{number}-{index}", (label[None] * 2 + noise).astype("f4"), label)
        )
    return MemoryPatient(tuple(made))


def segmentation_cohort(train: int = 6, test: int = 3, **options: Any) -> MemoryCohort:
    return MemoryCohort(
        {
            "train": [segmentation_patient(i, **options) for i in range(train)],
            "test": [segmentation_patient(100 + i, **options) for i in range(test)],
        }
    )


def classification_cohort(count: int = 24, *, multi_label: bool = False) -> MemoryCohort:
    """Return images whose left, right or upper part is bright, by class."""

    bright = (np.s_[0, :16], np.s_[0, 16:], np.s_[0, :, :16])

    def patient(number: int) -> MemoryPatient:
        rng = np.random.default_rng([7, number])
        image = rng.standard_normal((1, 32, 32)).astype("f4") * 0.3
        kind = number % 3
        image[bright[kind]] += 2
        label = np.eye(3, dtype="f4")[kind] if multi_label else np.array(kind, dtype=np.int64)
        return MemoryPatient((MemoryCase(f"case-{number}", image, label),))

    return MemoryCohort(
        {
            "train": [patient(i) for i in range(count)],
            "test": [patient(1000 + i) for i in range(count // 2)],
        }
    )


def segmentation_study(
    *, privacy: dict[str, Any] | None = None, rounds: int = 4, **training: Any
) -> Study:
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "tiny",
            "task": {
                "kind": "segmentation",
                "dimensions": 3,
                "inputs": ["mri"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet", "arguments": {"channels": [4, 8]}},
            "training": {
                "optimiser": {"learning_rate": 1e-2},
                "steps_per_round": 5,
                "batch_size": 2,
                "patch": [16, 16, 16],
                **training,
            },
            "privacy": privacy or {"mode": "none"},
            "federation": {"rounds": rounds},
        }
    )


def classification_study(
    *, multi_label: bool = False, privacy: dict[str, Any] | None = None, **training: Any
) -> Study:
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "tiny",
            "task": {
                "kind": "classification",
                "dimensions": 2,
                "inputs": ["photo"],
                "classes": ["left", "right", "top"],
                "multi_label": multi_label,
            },
            "preprocessing": {"size": [32, 32]},
            "model": {
                "network": "resnet10",
                "arguments": {"block_inplanes": [8, 8, 16, 16], "groups": 4},
            },
            "training": {
                "loss": "bce" if multi_label else "cross_entropy",
                "optimiser": {"learning_rate": 3e-3},
                "steps_per_round": 15,
                "batch_size": 8,
                **training,
            },
            "privacy": privacy or {"mode": "none"},
            "federation": {"rounds": 2},
        }
    )


PRIVATE: dict[str, Any] = {
    "mode": "patient",
    "sampling_rate": 0.5,
    "clip_norm": 0.3,
    "noise_multiplier": 1.1,
    "delta": 1e-3,
}
