"""A weighted mean that holds one model, however many sites send: validate, add, drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.models.weights import TensorSpec, check_tensors, unpack


class RunningMean:
    """Adds updates one by one, in float64.

    Parameters
    ----------
    specs : sequence of TensorSpec
        Names, shapes and dtypes that every update must have exactly: nothing is broadcast.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    def add(self, blob: bytes, weight: float) -> None:
        """Add one update.

        Parameters
        ----------
        weight : float
            Public weight of the site, positive.

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` when a tensor is missing, foreign, mis-shaped, or not finite; the sum
            stays as it was.
        """
        if not weight > 0:
            raise ConsiliumError("run.bad-update", f"The weight {weight} is not positive.")
        tensors = unpack(blob)
        check_tensors(tensors, self._specs, norm_bound=None)
        for name, tensor in tensors.items():
            if name in self._sums:
                self._sums[name] += weight * tensor.astype(np.float64)
            else:
                self._sums[name] = weight * tensor.astype(np.float64)
        self._weight += weight

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """Return the weighted mean of all that was added, float32.

        Raises
        ------
        ConsiliumError
            ``run.quorum`` when nothing was added.
        """
        if self._weight == 0.0:
            raise ConsiliumError("run.quorum", "No update was added in this round.")
        return {name: (s / self._weight).astype(np.float32) for name, s in self._sums.items()}


def cohort_weights(cohorts: Mapping[str, int], weighting: str) -> dict[str, float]:
    """Return each site's public weight: its declared cohort size, or 1 for all."""
    if weighting == "uniform":
        return dict.fromkeys(cohorts, 1.0)
    return {site: float(size) for site, size in cohorts.items()}


def running_average(
    average: Mapping[str, NDArray[np.float32]],
    model: Mapping[str, NDArray[np.float32]],
    *,
    decay: float,
    rounds_done: int,
) -> dict[str, NDArray[np.float32]]:
    """Return the exponential average of the global models after one more round.

    ``d·average + (1 − d)·model`` with ``d = min(decay, (1 + t)/(10 + t))`` after t rounds: the
    usual warm-up, so that the starting model is soon forgotten. It costs no privacy: a function of
    what was released.

    Parameters
    ----------
    average : mapping of str to ndarray
        Average before; the starting model before the first round.
    model : mapping of str to ndarray
        Global model after this round; its tensors are those averaged.
    decay : float
        In [0, 1).
    rounds_done : int
        t, this round included.
    """
    d = min(decay, (1 + rounds_done) / (10 + rounds_done))
    return {
        name: (d * average[name].astype(np.float64) + (1 - d) * tensor).astype(np.float32)
        for name, tensor in model.items()
    }
