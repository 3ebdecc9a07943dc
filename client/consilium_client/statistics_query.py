"""Statistics of the training patients that may leave: one noised sum of histograms.

A Gaussian query over the site's training patients. Each adds, for every table of the study, shares
over public bins (:mod:`consilium_common.study.statistics`) whose L2 norm is at most 1; adding or
removing one patient moves the sum of T tables by at most √T, whatever that patient's images are.
What reads the sum divides it by the declared size of the cohort, never by a true count.

Unit: the patient. Adjacency: add or remove one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array, Case
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import parameters
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study.statistics import Table, tables

if TYPE_CHECKING:
    from consilium_client.training.entropy import Entropy
    from consilium_common.study.schema import Study

Vector = NDArray[np.float64]

#: Shares are rounded down to multiples of this: sums of up to 2^23 patients are then exact, and
#: rounding cannot add up over patients.
_GRID: Final = 2.0**-30
#: A right query is taken for a wrong one less often than this (see Mechanism).
_FALSE_ALARM: Final = 1e-12
#: Voxels looked at in one go.
_CHUNK: Final = 1 << 22


class CountedCase(Case, Protocol):
    """A prepared case that knows the grid of the image it came from."""

    @property
    def original_shape(self) -> tuple[int, ...]:
        """Voxels along each axis of the image file or series itself."""

    @property
    def original_affine(self) -> Array:
        """4×4, voxel index of that image to millimetres."""


@dataclass(frozen=True)
class StatisticsQuery:
    """The public facts of one study's released statistics.

    Parameters
    ----------
    study : Study
        Says what is counted.
    tables : tuple of Table
        Its tables, at least one.
    noise_multiplier : float
        Standard deviation of the noise as a multiple of the sensitivity.
    sensitivity : float
        L2 norm of the most that one patient adds: √tables.
    """

    study: Study
    tables: tuple[Table, ...]
    noise_multiplier: float
    sensitivity: float

    @classmethod
    def of(cls, study: Study) -> Self | None:
        """Return the study's query; None where it asks for no statistics."""
        plan = parameters(study)
        if plan is None or plan.statistics_noise is None:
            return None
        return cls(study, tables(study), plan.statistics_noise, plan.statistics_sensitivity)

    @property
    def event(self) -> PrivacyEvent:
        """What the query costs every patient it counts."""
        return PrivacyEvent(sampling_rate=1.0, noise_multiplier=self.noise_multiplier, steps=1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each number."""
        return self.noise_multiplier * self.sensitivity

    def total(self, patients: Iterable[Sequence[CountedCase]]) -> Vector:
        """Return the exact sum over patients, each given as its cases. Private.

        One patient more or fewer moves it by at most ``sensitivity`` in L2 norm.
        """
        total = np.zeros(sum(len(table.bins) for table in self.tables))
        for cases in patients:
            total += self._contribution(cases)
        return total

    def release(
        self, patients: Iterable[Sequence[CountedCase]], entropy: Entropy | None = None
    ) -> dict[str, float]:
        """Return the noised sum by figure: ``<table>.<bin>``, bins from 0.

        Parameters
        ----------
        patients : iterable of sequence of CountedCase
            The training patients, each as its cases; read once. Private.
        entropy : Entropy, optional
            The operating system's (default).

        Raises
        ------
        ConsiliumError
            ``privacy.truth`` when the noise that the sum really got cannot have come from the
            deviation that is charged; ``data.purged`` when a prepared case is gone.
        """
        from consilium_client.training.entropy import SystemEntropy

        exact = self.total(patients)
        source = SystemEntropy() if entropy is None else entropy
        noisy = exact + source.normal(len(exact), self.deviation)
        # Measured on the numbers that are released, not on the noise that was meant to be added.
        _require_noise((noisy - exact) / self.deviation)
        names = [name for table in self.tables for name in table.figures]
        return dict(zip(names, noisy.tolist(), strict=True))

    def _contribution(self, cases: Sequence[CountedCase]) -> Vector:
        """Return what one patient adds: for each table the mean over the patient's cases."""
        return np.concatenate([self._shares(table, cases) for table in self.tables])

    def _shares(self, table: Table, cases: Sequence[CountedCase]) -> Vector:
        count = _COUNTS[table.name]
        shares = np.zeros(len(table.bins))
        for case in cases:
            shares += _proper(count(self.study, table, case))
        return bounded(shares * (table.weight / max(len(cases), 1)))


def bounded(shares: Vector) -> Vector:
    """Return numbers in [0, 1] of L2 norm at most 1, whatever was given.

    What is no number counts as 0; a longer vector is shortened. The numbers are rounded down to a
    grid on which sums over patients are exact.
    """
    proper = _proper(shares)
    longer = max(1.0, float(np.linalg.norm(proper)))
    return np.asarray(np.floor(proper / longer / _GRID) * _GRID, dtype=np.float64)


def _proper(shares: Vector) -> Vector:
    return np.asarray(np.clip(np.nan_to_num(shares, nan=0.0), 0.0, 1.0), dtype=np.float64)


def _classes(study: Study, table: Table, case: CountedCase) -> Vector:
    """Return 1 for each class that the case has, 0 for each other."""
    label = np.asarray(case.label())
    if study.task.kind == "segmentation":
        # The background is class 0 and is not counted.
        classes = len(table.bins) + 1
        counts = np.zeros(classes, dtype=np.int64)
        for part in _parts(label):
            counts += np.bincount(part[part < classes], minlength=classes)
        return (counts[1:] > 0).astype(np.float64)
    if study.task.multi_label:
        return np.asarray(label.ravel() == 1, dtype=np.float64)
    return np.asarray(np.arange(len(table.bins)) == int(label), dtype=np.float64)


def _intensity(study: Study, table: Table, case: CountedCase) -> Vector:
    """Return the share of voxels, over all input channels, in each bin."""
    # Behind the image's own channels come those of the covariates.
    values = case.image()[: len(study.task.inputs)]
    counts = np.zeros(len(table.bins), dtype=np.int64)
    for part in _parts(values):
        found = np.digitize(part[np.isfinite(part)], table.edges)
        counts += np.bincount(found, minlength=len(counts))
    return counts / max(values.size, 1)


def _parts(values: Array) -> Iterable[Array]:
    """Yield the values in pieces: a large memory-mapped image is never copied whole."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _size(study: Study, table: Table, case: CountedCase) -> Vector:
    return _one_hot(table, float(np.prod(case.original_shape, dtype=np.float64)))


def _smallest(study: Study, table: Table, case: CountedCase) -> Vector:
    return _one_hot(table, float(_voxel_edges(study, case).min()))


def _largest(study: Study, table: Table, case: CountedCase) -> Vector:
    return _one_hot(table, float(_voxel_edges(study, case).max()))


def _voxel_edges(study: Study, case: CountedCase) -> Vector:
    """Return the lengths of a voxel's edges, mm, along the axes of the task."""
    steps = np.asarray(case.original_affine, dtype=np.float64)[:3, : study.task.dimensions]
    return np.asarray(np.linalg.norm(steps, axis=0), dtype=np.float64)


def _one_hot(table: Table, value: float) -> Vector:
    found = np.zeros(len(table.bins))
    if np.isfinite(value):
        found[int(np.digitize(value, table.edges))] = 1.0
    return found


#: How each table counts one case: numbers in [0, 1] per bin.
_COUNTS: Final[dict[str, Callable[[Study, Table, CountedCase], Vector]]] = {
    "classes": _classes,
    "intensity": _intensity,
    "spacing.smallest": _smallest,
    "spacing.largest": _largest,
    "size": _size,
}


def _require_noise(drawn: Vector) -> None:
    """Refuse standardised draws that are none: of a wrong spread, not finite, or zero."""
    from scipy.stats import chi2

    law = chi2(len(drawn))
    squares = float(np.square(drawn).sum())
    likely = min(law.cdf(squares), law.sf(squares)) > _FALSE_ALARM / 2
    # Rounding may swallow one small draw in 10^9; a second one is no chance.
    if not (likely and int((drawn == 0).sum()) <= 1):
        raise ConsiliumError(
            "privacy.truth",
            "The noise of the statistics is not what was charged; they are withheld.",
            hint="The charge stands, nothing has left. Report this as a fault of the program.",
        )
