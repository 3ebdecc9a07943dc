"""Made-up patients whose gradients are chosen by the auditor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_CHUNK: Final = 64


@dataclass(frozen=True, eq=False)
class PlantedPatients:
    """A gradient engine: patient ``i`` has the gradient ``gradient_norm`` · ``directions[i]``.

    Every patient holds ``slices`` slices, and each slice alone has that same gradient, so that the
    patient's mean is it too: the worst case for code that clips slices and not patients.

    Parameters
    ----------
    directions : float32, (patients, size)
        Rows of unit length, but for rows that are meant to be hostile.
    gradient_norm : float
        Far above the clip norm, so that a patient moves a right sum by exactly the clip norm.
    slices : int
        Slices a patient (default: 8).
    """

    directions: NDArray[np.float32]
    gradient_norm: float
    slices: int = 8
    device: str = "cpu"

    @property
    def size(self) -> int:
        """Number of values of one gradient."""
        return int(self.directions.shape[1])

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield tensors (rows, size), one row a patient."""
        import torch

        for start in range(0, len(patients), _CHUNK):
            chosen = self.directions[list(patients[start : start + _CHUNK])]
            yield torch.from_numpy(chosen * np.float32(self.gradient_norm))

    def slice_gradients(self, patient: int) -> Any:
        """Return the gradients of one patient's slices, (slices, size)."""
        (row,) = self.gradients([patient])
        return row.expand(self.slices, -1)


def random_directions(count: int, size: int) -> NDArray[np.float32]:
    """Return ``count`` random unit vectors, float32, shape (count, size)."""
    rows = np.random.default_rng().standard_normal((count, size), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
