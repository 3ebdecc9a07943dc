"""From an attacker's successes to ε: lower bounds at a confidence, and a Gaussian estimate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

#: Beyond this ε an attack has shown that nothing is protected; bounds are not told apart there.
LARGEST_EPSILON = 60.0


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """Return how likely so many right guesses are, at most, if the claim holds.

    Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2:
    with f(v) = P[Binomial(r, e^ε/(1 + e^ε)) ≥ v],
    P[right guesses ≥ v] ≤ f(v) + 2mδ · max over i ≥ 1 of (f(v − i) − f(v)) / i.

    Parameters
    ----------
    canaries : int
        m canaries, each included by a fair coin of its own.
    guesses : int
        r <= m guesses; the rest are abstentions.
    correct : int
        v of them were right.
    epsilon, delta : float
        The claim, for adding or removing one canary.

    Returns
    -------
    float
        Between 0 and 1; below 1 − confidence the claim is refuted.
    """
    from scipy.special import expit
    from scipy.stats import binom

    if correct <= 0:
        return 1.0
    chance = float(expit(epsilon))
    base = float(binom.sf(correct - 1, guesses, chance))
    if delta <= 0:
        return min(1.0, base)
    shifts = np.arange(1, correct + 1)
    gains = (binom.sf(correct - 1 - shifts, guesses, chance) - base) / shifts
    return min(1.0, base + 2 * canaries * delta * float(gains.max()))


def one_run_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """Return the largest ε that so many right guesses refute at ``confidence``; 0 if none."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    return _last_true(refuted)


def share_bounds(successes: int, trials: int, false_alarm: float) -> tuple[float, float]:
    """Return lower and upper limit of a probability, each wrong at most with ``false_alarm``.

    Clopper and Pearson 1934: exact.
    """
    from scipy.stats import beta

    low = beta.ppf(false_alarm, successes, trials - successes + 1) if successes else 0.0
    rest = trials - successes
    high = beta.isf(false_alarm, successes + 1, rest) if rest else 1.0
    return float(low), float(high)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at ``delta`` of telling N(0, 1) from N(``mu``, 1).

    Balle and Wang 2018, Theorem 8: δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).
    """
    from scipy.special import log_ndtr, ndtr

    if mu <= 0:
        return 0.0

    def above(epsilon: float) -> bool:
        tail = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
        return float(ndtr(mu / 2 - epsilon / mu)) - tail > delta

    return _last_true(above)


def _last_true(holds: Callable[[float], bool]) -> float:
    """Return the ε, to 1e-6, up to which ``holds``, a falling condition, is true."""
    if not holds(0.0):
        return 0.0
    if holds(LARGEST_EPSILON):
        return LARGEST_EPSILON
    low, high = 0.0, LARGEST_EPSILON
    while high - low > 1e-6:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
