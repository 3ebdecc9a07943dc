"""The one number of an evaluation that may leave: a noised sum of patients' scores.

A Gaussian query over the site's test patients. Each has a score in [0, 1] and adds score − 1/2 to
the sum, so adding or removing one patient moves it by at most 1/2. What reads it divides by a
public number, never by the true count of patients: mean score = 1/2 + sum / declared size.

Unit: the patient. Adjacency: add or remove one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import SCORE_SENSITIVITY, PrivacyEvent

if TYPE_CHECKING:
    from consilium_client.training.entropy import Entropy

#: Counts as nothing: what a patient adds who has nothing to score.
NEUTRAL: Final = 0.5
#: A right draw is taken for a wrong one less often than this (see Mechanism).
_FALSE_ALARM: Final = 1e-12


@dataclass(frozen=True)
class ScoreQuery:
    """The public facts of one released evaluation.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise as a multiple of the sensitivity.
    """

    noise_multiplier: float

    @property
    def event(self) -> PrivacyEvent:
        """What the query costs every patient it scores."""
        return PrivacyEvent(sampling_rate=1.0, noise_multiplier=self.noise_multiplier, steps=1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on the sum, in scores."""
        return self.noise_multiplier * SCORE_SENSITIVITY

    def release(self, scores: Iterable[float], entropy: Entropy | None = None) -> float:
        """Return the noised sum of the centred scores.

        Parameters
        ----------
        scores : iterable of float
            One per patient. Private. Any value is safe: see :func:`centred_sum`.
        entropy : Entropy, optional
            The operating system's (default).

        Raises
        ------
        ConsiliumError
            ``privacy.truth`` when the noise that the sum really got cannot have come from the
            deviation that is charged.
        """
        from consilium_client.training.entropy import SystemEntropy

        exact = centred_sum(scores)
        source = SystemEntropy() if entropy is None else entropy
        noisy = exact + float(source.normal(1, self.deviation)[0])
        # Measured on the number that is released, not on the noise that was meant to be added.
        _require_noise((noisy - exact) / self.deviation)
        return noisy


def centred_sum(scores: Iterable[float]) -> float:
    """Return the sum of score − 1/2 over patients.

    One more or one fewer score moves it by at most 1/2, whatever the score is: values outside
    [0, 1] count as the nearest end, and nan as 1/2, which adds nothing.
    """
    # Rounded once, at the end: rounding does not add up over patients.
    return math.fsum(
        0.0 if math.isnan(score) else min(max(score, 0.0), 1.0) - NEUTRAL for score in scores
    )


def _require_noise(drawn: float) -> None:
    """Refuse a standardised draw that is none: exactly zero, not finite, or far too large."""
    far = math.erfc(abs(drawn) / math.sqrt(2))  # chance of a draw at least as far from zero
    near = math.erf(abs(drawn) / math.sqrt(2))
    if not (far > _FALSE_ALARM / 2 and near > _FALSE_ALARM / 2):
        raise ConsiliumError(
            "privacy.truth",
            "The noise of the evaluation's figures is not what was charged; they are withheld.",
            hint="The charge stands, nothing has left. Report this as a fault of the program.",
        )
