"""How well a patient's record could be reconstructed at most, for a stated prior chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from consilium_common.privacy.events import PrivacyEvent
from consilium_common.privacy.tradeoff import true_positive_bound

#: Prior chances that reports state: from a secret of six decimal digits to a choice of ten.
NAMED_PRIORS: Final = (1e-6, 1e-4, 1e-3, 1e-2, 0.1)

#: What the bound takes for granted; printed wherever it is shown.
ASSUMPTIONS: Final = (
    "The attacker knows the records of all other patients, the mechanism and everything that left.",
    "The prior is the best chance of a good enough reconstruction without anything that left: "
    "for a record that is one of 1000 candidates, all alike, it is 0.001.",
    "“Good enough” may mean anything, as long as it is fixed beforehand: exact, or within some "
    "distance. The prior must be that of the same meaning.",
    "One patient at one site. A relative's record, or the same patient's at another site, is "
    "part of the prior.",
)


@dataclass(frozen=True)
class ReconstructionBound:
    """Chance of a good enough reconstruction: before anything left, and after (an upper bound)."""

    prior: float
    bound: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return dict(self.__dict__)


def reconstruction_bound(
    events: Sequence[PrivacyEvent], priors: Sequence[float] = NAMED_PRIORS
) -> tuple[ReconstructionBound, ...]:
    """Bound the chance that an informed attacker reconstructs a patient's record.

    An attacker who succeeds with probability κ without seeing the output succeeds with at most
    the largest probability, under the output with the patient, of any event that has probability
    κ without: the true positive rate at the false positive rate κ. Taken from the bound of
    :func:`true_positive_bound`, which holds for both directions and so is never too small.

    Parameters
    ----------
    events : sequence of PrivacyEvent
        Everything that happened to the patient.
    priors : sequence of float
        Chances κ in [0, 1]; see :data:`ASSUMPTIONS`.

    Raises
    ------
    ConsiliumError
        ``privacy.rate-invalid``.

    References
    ----------
    Hayes, Mahloujifar & Balle 2023, "Bounding training data reconstruction in DP-SGD",
    theorem 2; Balle, Cherubin & Hayes 2022, "Reconstructing training data with informed
    adversaries".
    """
    return tuple(
        ReconstructionBound(point.false_positive_rate, point.true_positive_rate)
        for point in true_positive_bound(events, priors)
    )
