"""What training asks of a site's data, as protocols: a cohort has patients, a patient has cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
Array = NDArray[Any]


class Case(Protocol):
    """One preprocessed image with its label."""

    @property
    def case_id(self) -> str:
        """The site's own name of the case; it never leaves the site."""

    def image(self) -> NDArray[np.float32]:
        """Return what the network is given, float32, shape (channels, \\*spatial): the preprocessed
        image, then the covariates' constant channels."""

    def label(self) -> Array:
        """Return the label.

        Segmentation: class indices, uint8, shape (\\*spatial). Classification: one class index,
        int64, shape (); multi-label: float32 zeros and ones, shape (classes,).
        """


class PatientRecord(Protocol):
    """Everything of one patient at this site: the unit of privacy."""

    @property
    def cases(self) -> Sequence[Case]:
        """The patient's cases, at least one."""


class PatientCohort(Protocol):
    """A site's patients, split by patient."""

    def patients(self, split: Split) -> Sequence[PatientRecord]:
        """Return the patients of one split, in an order that does not change."""
