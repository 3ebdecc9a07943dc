"""Tests against exact distributions, each a family with one probability of a false alarm.

A family holds tests of one kind (one a tensor, a patient, a pair …). Its false alarm is shared out
evenly (Bonferroni), and the member that fits worst speaks for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """One question to the installed code, and its answer."""

    #: Short name, for machines.
    name: str
    #: What was tested, in words.
    question: str
    #: What ``observed`` is, in words.
    statistic: str
    #: The statistic of the member that fits worst.
    observed: float
    #: Where a right mechanism's statistic lies, but for a false alarm; None: no bound there.
    low: float | None
    high: float | None
    #: Which member fits worst; empty where there is one alone.
    where: str = ""
    #: Probability that a right mechanism fails this check, at most.
    false_alarm: float = 0.0

    @property
    def passed(self) -> bool:
        """The statistic lies where a right mechanism's does; a value that is no number does not."""
        above = self.low is None or self.observed >= self.low
        below = self.high is None or self.observed <= self.high
        return above and below and bool(np.isfinite(self.observed))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "name": self.name,
            "question": self.question,
            "statistic": self.statistic,
            "observed": self.observed if np.isfinite(self.observed) else None,
            "low": self.low,
            "high": self.high,
            "where": self.where,
            "false_alarm": self.false_alarm,
            "passed": self.passed,
        }


#: Name, question and statistic of a check.
Words = tuple[str, str, str]


def deviation_family(
    words: Words,
    squares: NDArray[np.float64],
    *,
    degrees: NDArray[np.int64],
    variance: float,
    false_alarm: float,
    label: Callable[[int], str],
) -> Check:
    """Test sums of squares of Gaussian numbers of a known variance: chi-square.

    The statistic is the deviation seen as a multiple of the one claimed.
    """
    from scipy.stats import chi2

    scaled = squares / variance
    each = false_alarm / len(scaled)
    worst = _worst(chi2.cdf(scaled, degrees), chi2.sf(scaled, degrees))
    n = int(degrees[worst])
    low, high = chi2.ppf(each / 2, n), chi2.isf(each / 2, n)
    return Check(
        *words,
        observed=float(np.sqrt(scaled[worst] / n)),
        low=float(np.sqrt(low / n)),
        high=float(np.sqrt(high / n)),
        where=label(worst),
        false_alarm=false_alarm,
    )


def binomial_family(
    words: Words,
    counts: NDArray[np.int64],
    *,
    trials: int | NDArray[np.int64],
    probabilities: float | NDArray[np.float64],
    false_alarm: float,
    label: Callable[[int], str],
) -> Check:
    """Test counts among independent trials of known probability. The statistic is the share.

    ``trials`` and ``probabilities`` are one number for all counts, or one a count.
    """
    from scipy.stats import binom

    number = np.broadcast_to(np.asarray(trials), counts.shape)
    chance = np.broadcast_to(np.asarray(probabilities, dtype=np.float64), counts.shape)
    each = false_alarm / len(counts)
    worst = _worst(binom.cdf(counts, number, chance), binom.sf(counts - 1, number, chance))
    n, p = int(number[worst]), float(chance[worst])
    return Check(
        *words,
        observed=float(counts[worst] / n),
        low=float(binom.ppf(each / 2, n, p) / n),
        high=float(binom.isf(each / 2, n, p) / n),
        where=label(worst),
        false_alarm=false_alarm,
    )


def correlation_family(
    words: Words,
    correlations: NDArray[np.float64],
    *,
    length: int,
    false_alarm: float,
    label: Callable[[int], str],
) -> Check:
    """Test cosines of pairs of independent Gaussian vectors of ``length`` numbers.

    (1 + cosine) / 2 of such a pair is Beta((length − 1)/2, (length − 1)/2) distributed.
    """
    from scipy.stats import beta

    worst = int(np.argmax(np.abs(np.nan_to_num(correlations, nan=np.inf))))
    half = (length - 1) / 2
    bound = 2 * float(beta.isf(false_alarm / len(correlations) / 2, half, half)) - 1
    return Check(
        *words,
        observed=float(correlations[worst]),
        low=-bound,
        high=bound,
        where=label(worst),
        false_alarm=false_alarm,
    )


def shape_check(words: Words, values: NDArray[np.float64], false_alarm: float) -> Check:
    """Test that numbers are standard Gaussian, by the exact Kolmogorov-Smirnov distribution."""
    from scipy.special import ndtr
    from scipy.stats import kstwo

    below = ndtr(np.sort(values, axis=None))
    n = below.size
    steps = np.arange(n + 1) / n
    distance = max(float((steps[1:] - below).max()), float((below - steps[:-1]).max()))
    return Check(
        *words,
        observed=distance,
        low=None,
        high=float(kstwo.isf(false_alarm, n)),
        false_alarm=false_alarm,
    )


def _worst(below: NDArray[np.float64], above: NDArray[np.float64]) -> int:
    """Return the member with the smallest tail; one that is no number is the worst of all."""
    return int(np.argmin(np.nan_to_num(np.minimum(below, above), nan=-1.0)))
