"""Bounds what one patient can move: flat, automatic and adaptive clipping of gradients.

Every rule scales a patient's gradient to an L2 norm of at most C, whatever the gradient holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.study.schema import AdaptiveClipping, AutomaticClipping, FlatClipping

Clipping = FlatClipping | AutomaticClipping | AdaptiveClipping

FLAT: Final = FlatClipping()
#: One patient, counted as a half when its gradient is within C and as minus a half otherwise,
#: moves the count by this much.
COUNT_SENSITIVITY: Final = 0.5
#: Values that are widened to float64 at a time on a CPU.
_BLOCK: Final = 1 << 16
#: Adaptive clipping keeps C in this range, far beyond any useful bound on either side.
_RANGE: Final = (1e-6, 1e6)


class ClippedSum:
    """A sum of gradients, each row first scaled to an L2 norm of at most ``clip_norm``.

    Adding or removing one row moves ``total`` by at most ``clip_norm``, whatever the row holds: a
    row with a value that is not finite counts as zero. Norms and the sum are float64, so that
    squares of float32 values cannot overflow.

    Parameters
    ----------
    size : int
        Values of one row.
    device : str
        Where the rows are.
    clip_norm : float
        C, > 0.
    clipping : Clipping
        Flat and adaptive: g·min(1, C/‖g‖) (Abadi et al. 2016). Automatic: g·C/(‖g‖ + γ) (Bu et
        al. 2023, AUTO-S).
    """

    def __init__(self, size: int, device: str, clip_norm: float, clipping: Clipping = FLAT) -> None:
        import torch

        self._clip = clip_norm
        # On a CPU in blocks that fit into its cache, six times as fast as whole rows (measured at
        # seven million values).
        self._block = _BLOCK if device == "cpu" else max(size, 1)
        self._clipping = clipping
        #: float64, shape (size,).
        self.total: Any = torch.zeros(size, dtype=torch.float64, device=device)
        #: Rows added so far.
        self.rows = 0
        #: How many of them were no longer than C.
        self.within = 0

    def add(self, chunk: Any) -> None:
        """Add rows: a tensor (rows, size), float32."""
        for row in chunk.detach():
            self.rows += 1
            norm = self._norm(row)
            # Left out and not multiplied by zero: nan times zero is nan.
            if math.isfinite(norm):
                self.within += norm <= self._clip
                factor = self._factor(norm)
                for sum_, part in zip(
                    self.total.split(self._block), row.split(self._block), strict=True
                ):
                    sum_.add_(part.double(), alpha=factor)

    def _norm(self, row: Any) -> float:
        import torch

        squares = torch.zeros((), dtype=torch.float64, device=row.device)
        for part in row.split(self._block):
            wide = part.double()
            squares += torch.dot(wide, wide)
        return math.sqrt(float(squares))

    def _factor(self, norm: float) -> float:
        if isinstance(self._clipping, AutomaticClipping):
            return self._clip / (norm + self._clipping.stability)
        return self._clip / max(norm, self._clip)


def clipped_sum(
    chunks: Iterable[Any], clip_norm: float, size: int, device: str, clipping: Clipping = FLAT
) -> tuple[Any, int]:
    """Add up gradients as :class:`ClippedSum` does; return the sum and the number of rows.

    Parameters
    ----------
    chunks : iterable of torch.Tensor
        Each (rows, size), float32.
    """
    clipped = ClippedSum(size, device, clip_norm, clipping)
    for chunk in chunks:
        clipped.add(chunk)
    return clipped.total, clipped.rows


def gradient_multiplier(noise_multiplier: float, clipping: Clipping) -> float:
    """Return the noise multiplier of the gradient when all releases of a step are to cost σ.

    Two Gaussian releases of multipliers a and b on the same sample are one of
    (a⁻² + b⁻²)^(-1/2). Adaptive clipping's count has b = count_noise / ½, so the gradient gets
    (σ⁻² − (2·count_noise)⁻²)^(-1/2) (Andrew et al. 2021, theorem 1).

    Raises
    ------
    ConsiliumError
        ``privacy.clipping`` when the count alone costs as much as the whole step may.
    """
    if not isinstance(clipping, AdaptiveClipping):
        return noise_multiplier
    count = clipping.count_noise / COUNT_SENSITIVITY
    if not noise_multiplier < count:
        raise ConsiliumError(
            "privacy.clipping",
            f"Adaptive clipping's count, with noise {clipping.count_noise:g}, would use up the "
            f"whole noise multiplier of {noise_multiplier:g}.",
            where="privacy.clipping.count_noise",
            hint=f"Set it well above half the noise multiplier, for example "
            f"{5 * noise_multiplier:.3g}.",
        )
    # As one quotient, so that a large count noise does not cancel.
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / count) ** 2)


def combined_multiplier(gradient: float, count: float) -> float:
    """Return the one multiplier that releases of multipliers ``gradient`` and ``count`` cost."""
    return gradient / math.sqrt(1 + (gradient / count) ** 2)


def next_clip_norm(
    clip_norm: float, noisy_count: float, denominator: float, clipping: AdaptiveClipping
) -> float:
    """Return C·exp(−rate·(noisy fraction − quantile)) (Andrew et al. 2021, equation 4).

    Post-processing of the noisy count: the sum over sampled patients of ½ (within C) or −½, plus
    noise. ``denominator`` is public, the expected number of sampled patients.
    """
    fraction = COUNT_SENSITIVITY + noisy_count / denominator
    # The exponent is bounded first: with a handful of patients the noisy fraction can be anything.
    change = min(max(-clipping.rate * (fraction - clipping.quantile), -1.0), 1.0)
    return min(max(clip_norm * math.exp(change), _RANGE[0]), _RANGE[1])
