"""Studies that ask for statistics, and cases in memory that can be counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from round_samples import tiny_study
from training_samples import MemoryCase, MemoryCohort

from consilium_common.study import Study

EVERYTHING = ["classes", "intensity", "spacing", "size"]


@dataclass(frozen=True, eq=False)
class CountedMemoryCase(MemoryCase):
    original_shape: tuple[int, ...]
    original_affine: NDArray[np.float64]


@dataclass(frozen=True)
class CountedPatient:
    cases: tuple[CountedMemoryCase, ...]
    key: str


def counting_study(
    of: list[str] | None = None, *, epsilon: float = 0.5, name: str = "tiny", **changes: Any
) -> Study:
    """Return the tiny private study of two rounds, with statistics; ``changes`` replace parts."""
    plain = tiny_study(release="none").to_canonical()
    plain["preprocessing"] |= {"spacing": [1.0, 1.0]}
    statistics = {"epsilon": epsilon, "of": EVERYTHING if of is None else of}
    return Study.model_validate({**plain, "name": name, "statistics": statistics, **changes})


def case(
    pixels: Any,
    label: Any,
    *,
    shape: tuple[int, ...] = (256, 256),
    spacing: tuple[float, float, float] = (0.7, 0.7, 5.0),
) -> CountedMemoryCase:
    """Return one case."""
    return CountedMemoryCase(
        "case",
        np.asarray(pixels, dtype=np.float32),
        np.asarray(label),
        shape,
        np.diag([*spacing, 1.0]),
    )


def counted_cohort(train: int = 6) -> MemoryCohort:
    """Return patients of one 16 × 16 image; all but the first have the organ."""

    def patient(number: int) -> CountedPatient:
        rng = np.random.default_rng(number)
        label = np.zeros((16, 16), dtype=np.uint8)
        label[: 6 if number else 0] = 1
        found = case(rng.standard_normal((1, 16, 16)), label)
        return CountedPatient((found,), hashlib.sha256(b"%d" % number).hexdigest()[:32])

    tested = [patient(100 + number) for number in range(3)]
    return MemoryCohort({"train": [patient(n) for n in range(train)], "test": tested})  # type: ignore[dict-item]
