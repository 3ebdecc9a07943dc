"""What any attacker can do at most: true positives against false positives, from the events."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import (
    INTERVAL,
    MEANINGLESS,
    STEPS_OF_INTERVAL,
    composed,
    epsilon_of,
    rough,
)
from consilium_common.privacy.events import History, PrivacyEvent, grouped

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Rates of false positives that reports name: one in a thousand, in a hundred, in ten.
NAMED_RATES: Final = (0.001, 0.01, 0.1)
#: Points of the privacy profile; the curve is an upper bound with any number of them.
_POINTS: Final = 1200
#: δ at which the profile's grid ends: beyond that ε the bound ε contributes nothing visible.
_SMALLEST: Final = 1e-12


@dataclass(frozen=True)
class OperatingPoint:
    """One point of the trade-off: both are rates in [0, 1]; the second is an upper bound."""

    false_positive_rate: float
    true_positive_rate: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return dict(self.__dict__)


def true_positive_bound(
    events: Sequence[PrivacyEvent], rates: Sequence[float]
) -> tuple[OperatingPoint, ...]:
    """Bound how often any attacker recognises a patient who took part, by its rate of false alarms.

    The attacker sees everything that left under ``events``, may know every other patient's record
    and has any amount of computing. For every ε on a grid the events are (ε, δ(ε))-DP, with δ(ε)
    the privacy profile of their composition by PLD (both directions of adding and removing a
    patient; pessimistically rounded). Each pair bounds the true positive rate at the false
    positive rate α by exp(ε)·α + δ and by 1 − exp(−ε)·(1 − δ − α); the least of all is returned.
    So no grid makes it wrong, a finer one only tighter.

    Parameters
    ----------
    events : sequence of PrivacyEvent
        Everything that happened to one patient; empty: nothing to be learnt, so α itself.
    rates : sequence of float
        False positive rates α in [0, 1].

    Returns
    -------
    tuple of OperatingPoint
        One for each rate, in order. Where ε is beyond 1000 the bound is 1: nothing is protected.

    Raises
    ------
    ConsiliumError
        ``privacy.rate-invalid``.

    References
    ----------
    Wasserman & Zhou 2010, theorem 2.4, and Kairouz, Oh & Viswanath 2015, theorem 2.1 (the region
    of one (ε, δ)); Dong, Roth & Su 2022, proposition 6 (all of them together).
    """
    for rate in rates:
        if not (math.isfinite(rate) and 0 <= rate <= 1):
            raise ConsiliumError(
                "privacy.rate-invalid",
                f"A rate is {rate!r}, not in [0, 1].",
                hint="Give a share, such as 0.01 for one in a hundred.",
            )
    return tuple(OperatingPoint(rate, _bound(grouped(events), float(rate))) for rate in rates)


@functools.lru_cache(maxsize=4096)
def _bound(history: History, rate: float) -> float:
    if not history:
        return rate
    found = _profile(history)
    if found is None:
        return 1.0
    import numpy as np

    epsilons, deltas = found
    with np.errstate(over="ignore"):
        low = np.exp(epsilons) * rate + deltas
    high = 1 - np.exp(-epsilons) * (1 - deltas - rate)
    return float(min(1.0, max(rate, min(low.min(), high.min()))))


@functools.lru_cache(maxsize=64)
def _profile(history: History) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Return ε from 0 up, and δ(ε) for each; None where ε is beyond use."""
    ceiling = rough(history, _SMALLEST)
    if ceiling > MEANINGLESS:
        return None
    import numpy as np

    distribution: Any = composed(history, _interval(history, ceiling))
    most = max(1.0, float(epsilon_of(history, _SMALLEST)))
    if not math.isfinite(most):
        most = ceiling
    # Dense near 0, where the curve of a small ε bends, and even beyond.
    epsilons = most * np.linspace(0.0, 1.0, _POINTS) ** 1.5
    deltas = np.clip(np.asarray(distribution.get_delta_for_epsilon(epsilons), dtype=float), 0, 1)
    return epsilons, deltas


def _interval(history: History, ceiling: float) -> float:
    """Return the grid of the losses: that of ε's own computation up to ε = 30."""
    if ceiling > 30:
        return INTERVAL * float(10 ** math.ceil(math.log10(ceiling / 30)))
    steps = sum(event.steps for event in history if event.sampling_rate < 1)
    return INTERVAL / 10 if steps > STEPS_OF_INTERVAL else INTERVAL
