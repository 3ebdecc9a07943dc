"""How far one patient moves a release, whatever that patient holds, and how well that is seen.

With everybody drawn and noise of a millionth of the clip norm, the difference of two releases, with
and without one patient, is that patient's influence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.auditing.bounds import share_bounds
from consilium_client.auditing.exact import Check
from consilium_client.auditing.planted import PlantedPatients, random_directions
from consilium_client.auditing.subject import Subject

if TYPE_CHECKING:
    from consilium_client.training.engines.base import GradientEngine

_NOISE: Final = 1e-6
_WIDTH: Final = 64
#: Values of the releases held at a time.
_VALUES: Final = 1 << 23
#: Clip norms by which rounding in float32, in the sum and in a network, can move a release.
_ROUNDING: Final = 1e-4
#: What the one patient's gradient is: a multiple of the clip norm, or a value in every place.
_LENGTHS: Final = {
    "ordinary": 0.5,
    "long": 1e3,
    "enormous": 1e30,
    "zero": 0.0,
    "not a number": np.nan,
    "infinite": np.inf,
}


def influence_check(subject: Subject, false_alarm: float) -> Check:
    """Test that one patient, with eight slices, moves the sum by at most the clip norm."""
    clip = subject.parameters.clip_norm
    found: dict[str, float] = {}
    for name, length in _LENGTHS.items():
        with np.errstate(invalid="ignore", over="ignore"):
            directions = random_directions(4, _WIDTH)
            # The others hold gradients of their own; the last is the one who comes and goes.
            directions[-1] *= np.float32(length)
        engine = PlantedPatients(directions, clip)
        found[name] = influence(subject, engine, len(directions))
    return influence_verdict(
        (
            "influence",
            "Does one patient with many slices move a release by the clip norm at most?",
            "distance of two releases, with and without one patient, in clip norms",
        ),
        found,
        _WIDTH,
        false_alarm,
    )


def influence(subject: Subject, engine: GradientEngine, population: int) -> float:
    """Return how far the last of ``population`` patients moves the sum, in clip norms."""
    options = {"sampling_rate": 1.0, "noise_multiplier": _NOISE}
    (present,) = subject.release(engine, population, 1, **options)
    (absent,) = subject.release(engine, population - 1, 1, **options)
    return float(np.linalg.norm(present.astype(np.float64) - absent))


def influence_verdict(
    words: tuple[str, str, str], found: dict[str, float], size: int, false_alarm: float
) -> Check:
    """Compare the largest influence with one clip norm and what the little noise can add."""
    from scipy.stats import chi2

    noise = float(np.sqrt(2 * chi2.isf(false_alarm / len(found), size))) * _NOISE
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    return Check(
        *words,
        observed=found[worst],
        low=None,
        high=1.0 + noise + _ROUNDING,
        where=f"{worst} gradients",
        false_alarm=false_alarm,
    )


def distinguishing_check(subject: Subject, releases: int, false_alarm: float) -> Check:
    """Tell releases with one planted patient from releases without."""
    engine = PlantedPatients(random_directions(1, _WIDTH), subject.long_gradient)
    return distinguishing(
        (
            "distinguishing",
            "Can an attacker tell a release with a patient from one without better than claimed?",
        ),
        subject,
        engine,
        releases=releases,
        false_alarm=false_alarm,
    )


def _own_direction(subject: Subject, engine: GradientEngine) -> NDArray[np.float32]:
    """Return the direction in which the only patient of ``engine`` moves a release."""
    (row,) = subject.release(engine, 1, 1, sampling_rate=1.0, noise_multiplier=_NOISE)
    return np.asarray(row / np.linalg.norm(row))


def distinguishing(
    words: tuple[str, str],
    subject: Subject,
    engine: GradientEngine,
    *,
    releases: int,
    false_alarm: float,
) -> Check:
    """Attack ``releases`` releases with the engine's only patient, and as many without.

    Everybody is drawn, so that one release is claimed to be as private as telling N(0, 1) from
    N(1/σ, 1). The threshold is chosen on one half of the releases; the true and false positives of
    the other half, by Clopper and Pearson's exact limits, give a lower bound of that distance
    (Nasr et al. 2023, "Tight auditing of differentially private machine learning", in one step).
    """
    direction = _own_direction(subject, engine)
    scores = [_scores(subject, engine, direction, there, releases) for there in (0, 1)]
    half = releases // 2
    (out_chosen, out_held), (in_chosen, in_held) = ((s[:half], s[half:]) for s in scores)
    candidates = np.quantile(np.concatenate([out_chosen, in_chosen]), np.linspace(0.02, 0.98, 49))
    threshold = max(candidates, key=lambda t: _distance(in_chosen, out_chosen, t, false_alarm / 2))
    return Check(
        *words,
        f"distance shown by {2 * (releases - half)} held-out releases, in standard deviations",
        observed=_distance(in_held, out_held, float(threshold), false_alarm / 2),
        low=None,
        high=1 / subject.noise_multiplier,
        false_alarm=false_alarm,
    )


def _scores(
    subject: Subject,
    engine: GradientEngine,
    direction: NDArray[np.float32],
    population: int,
    releases: int,
) -> NDArray[np.float32]:
    """Project releases a few at a time: those of a large network do not fit into memory."""
    most = max(1, min(releases, _VALUES // engine.size))
    parts = [
        subject.release(engine, population, min(most, releases - done), sampling_rate=1.0)
        @ direction
        for done in range(0, releases, most)
    ]
    return np.concatenate(parts)


def _distance(
    present: NDArray[np.float32],
    absent: NDArray[np.float32],
    threshold: float,
    false_alarm: float,
) -> float:
    """Return Φ⁻¹(TPR) − Φ⁻¹(FPR), each share at its limit to the claim's favour."""
    from scipy.special import ndtri

    true, _ = share_bounds(int((present > threshold).sum()), len(present), false_alarm)
    _, false = share_bounds(int((absent > threshold).sum()), len(absent), false_alarm)
    if not 0 < true <= 1 or not 0 <= false < 1:
        return 0.0
    return max(0.0, float(ndtri(true) - ndtri(false)))
