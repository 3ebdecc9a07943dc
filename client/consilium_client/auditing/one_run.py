"""The one-run audit: many canaries, each in or out by a fair coin, guessed from what was released.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run": one run of the
mechanism with m canaries of independent coins says as much as many runs with one. The guess here is
the best linear one: an attacker who knows every canary and sees the sum of all releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.auditing.bounds import gaussian_epsilon, one_run_bound, one_run_p_value
from consilium_client.auditing.planted import PlantedPatients, random_directions
from consilium_client.auditing.subject import Subject
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent

#: Values a canary's gradient has at most: canaries hide in fewer as well as in more.
MOST_VALUES: Final = 12_000
#: Shares of the canaries that are guessed; the rest, too near to call, are not.
_GUESSED: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
#: Probability that a right mechanism is called refuted, at most: half of it by the right guesses,
#: half by the estimate.
RUN_FALSE_ALARM: Final = 1e-5


@dataclass(frozen=True)
class OneRun:
    """What one run with canaries showed about a claim."""

    canaries: int
    #: What was run, and δ at which every ε here stands.
    event: PrivacyEvent
    delta: float
    claimed: float
    guesses: int
    correct: int
    confidence: float
    #: At ``confidence``, the mechanism has at least this ε.
    lower_bound: float
    #: The largest lower bound that so many canaries could show, all guesses being right.
    reach: float
    #: How likely so many right guesses are, at most, if the claim holds.
    p_value: float
    #: ε if the scores are Gaussian, and its limits (each wrong with 5e-6). No proof.
    estimate: float
    estimate_low: float
    estimate_high: float

    @property
    def passed(self) -> bool:
        """Neither the right guesses nor the estimate's lower limit speak against the claim."""
        return self.p_value >= RUN_FALSE_ALARM / 2 and self.estimate_low <= self.claimed

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "canaries": self.canaries,
            "event": self.event.to_dict(),
            "delta": self.delta,
            "epsilon_claimed": self.claimed,
            "guesses": self.guesses,
            "correct": self.correct,
            "confidence": self.confidence,
            "epsilon_lower_bound": self.lower_bound,
            "p_value": self.p_value,
            "epsilon_reach": self.reach,
            "epsilon_estimate": self.estimate,
            "epsilon_estimate_low": self.estimate_low,
            "epsilon_estimate_high": self.estimate_high,
            "passed": self.passed,
        }


def one_run(
    subject: Subject, canaries: int, *, steps: int, delta: float, confidence: float
) -> OneRun:
    """Toss the coins, run the mechanism once, guess, and bound ε.

    The canaries' gradients are random directions, far longer than the clip norm: nearly
    orthogonal, so that they do not hide each other. Through a network they would: gradients of
    different images have most of their length in common.

    Parameters
    ----------
    steps : int
        Steps of the run.
    delta, confidence : float
        δ of every ε, and the confidence of the lower bound.
    """
    gradients = random_directions(canaries, min(subject.size, MOST_VALUES))
    coins = np.random.default_rng().random(canaries) < 0.5
    included = np.flatnonzero(coins)
    engine = PlantedPatients(gradients[included], subject.long_gradient)
    released = subject.release(engine, len(included), steps)
    event = subject.event(steps)
    scores = _scores(released.sum(axis=0, dtype=np.float64), gradients, event)
    claimed = epsilon_of([event], delta)
    guesses = _guesses(canaries, event, delta, confidence)
    order = np.argsort(scores)
    correct = int((~coins[order[: guesses // 2]]).sum())
    correct += int(coins[order[canaries - (guesses - guesses // 2) :]].sum())
    mu, error = _separation(scores, coins)
    return OneRun(
        canaries=canaries,
        event=event,
        delta=delta,
        claimed=claimed,
        guesses=guesses,
        correct=correct,
        confidence=confidence,
        lower_bound=one_run_bound(canaries, guesses, correct, delta, confidence),
        p_value=one_run_p_value(canaries, guesses, correct, claimed, delta),
        reach=one_run_bound(canaries, canaries, canaries, delta, confidence),
        estimate=gaussian_epsilon(mu, delta),
        estimate_low=gaussian_epsilon(mu - error, delta),
        estimate_high=gaussian_epsilon(mu + error, delta),
    )


def _scores(
    total: NDArray[np.float64], gradients: NDArray[np.float32], event: PrivacyEvent
) -> NDArray[np.float64]:
    """Return how often each canary seems to have taken part: the best linear estimate."""
    mean, variance = _participation(event)
    noise = event.noise_multiplier**2 * event.steps
    rest = gradients @ (total - mean * gradients.sum(axis=0, dtype=np.float64)).astype(np.float32)
    system = (gradients @ gradients.T).astype(np.float64)
    system[np.diag_indices_from(system)] += noise / variance
    return np.asarray(np.linalg.solve(system, rest.astype(np.float64)))


def _participation(event: PrivacyEvent) -> tuple[float, float]:
    """Return mean and variance of a canary's steps, its coin included."""
    q, steps = event.sampling_rate, event.steps
    return q * steps / 2, (q * steps / 2) ** 2 + q * (1 - q) * steps / 2


def _expected_separation(event: PrivacyEvent) -> float:
    q, sigma = event.sampling_rate, event.noise_multiplier
    return float(q * np.sqrt(event.steps) / np.sqrt(sigma**2 + q * (1 - q) / 2))


def _guesses(canaries: int, event: PrivacyEvent, delta: float, confidence: float) -> int:
    """Return how many guesses promise the best bound against the claimed mechanism.

    Decided before the run from public facts alone, so that the bound stays a bound.
    """
    from scipy.special import ndtr

    half = _expected_separation(event) / 2
    thresholds = np.linspace(0, half + 6, 600)
    share = ndtr(half - thresholds) + ndtr(-half - thresholds)
    right = ndtr(half - thresholds) / share

    def promise(guesses: int) -> float:
        at = int(np.argmin(np.abs(share - guesses / canaries)))
        return one_run_bound(canaries, guesses, round(guesses * right[at]), delta, confidence)

    options = sorted({max(2, round(part * canaries)) for part in _GUESSED})
    return max(options, key=promise)


def _separation(scores: NDArray[np.float64], coins: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the distance of the two groups' scores in standard deviations, and its error.

    The standard error is that of a standardised difference of means (Hedges and Olkin 1985).
    """
    from scipy.special import ndtri

    inside, outside = scores[coins], scores[~coins]
    if min(len(inside), len(outside)) < 2:
        return 0.0, 0.0
    spread = np.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
    if spread == 0:
        return 0.0, 0.0
    mu = float((inside.mean() - outside.mean()) / spread)
    error = np.sqrt(1 / len(inside) + 1 / len(outside) + mu**2 / (2 * len(scores)))
    return mu, float(-ndtri(RUN_FALSE_ALARM / 2) * error)
