"""Says before any budget is spent whether a cohort's signal can be heard above the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyParameters

Verdict = Literal["clear", "weak", "drowned"]

#: Noise over signal of the mean over sites, over the whole study, up to which training has kept
#: most of its score, and from which it has lost about two fifths of it: :func:`noise_to_signal`.
WEAK_FROM: Final = 0.5
DROWNED_FROM: Final = 0.9

_MEANING: Final[dict[Verdict, str]] = {
    "clear": "a cohort of this size can be heard; expect most of the score without privacy",
    "weak": "the noise weighs about as much as the patients; expect a clearly lower score",
    "drowned": "the noise drowns this cohort; train fewer values (model.trainable), start from "
    "public weights, or take more patients before you spend budget",
}


@dataclass(frozen=True)
class NoiseToSignal:
    """How much louder the privacy noise is than the patients.

    Attributes
    ----------
    per_step : float
        Noise norm over the largest expected norm of the patients' sum, in one step.
    over_study : float
        The same over all steps: signals add up as T, independent noise as √T.
    verdict : {"clear", "weak", "drowned"}
        By ``over_study``: below :data:`WEAK_FROM`, below :data:`DROWNED_FROM`, or more.
    sentence : str
        One sentence for a person, with both figures and what to do.
    """

    per_step: float
    over_study: float
    verdict: Verdict
    sentence: str


def noise_to_signal(
    parameters: PrivacyParameters, patients: int, values: int, sites: int = 1
) -> NoiseToSignal:
    """Compare the noise of a study with the most that the patients of its sites can say.

    A step sums on average q·n gradients of norm at most C, so that their sum is at most q·n·C long.
    Its noise is Gaussian with standard deviation σ·C in each of d values, so about σ·C·√d long. The
    ratio σ·√d / (q·n) does not depend on C; over T steps it falls with √T, and in the mean over K
    sites of equal size, each with noise of its own, with √K. The signal is taken at its largest
    (all patients pull one way, none is shorter than C), so the truth is never better; with adaptive
    clipping the gradient's own noise is a little larger than σ besides.

    The thresholds follow the utility table of the privacy rules (100 patients at three sites of 33
    on average, δ = 1e-3, ε = 8; Dice over Dice without privacy, trained from random weights).
    There σ/(q·√T) is 0.5 to 0.6, almost whatever q is, which gives: 9.5 k values with the noise of
    all 100 patients shared, ratio 0.5, .80 to .84 of the score; 9.5 k values with noise at each of
    the three sites, 0.9, .56 of it; 137 k values with shared noise, 2.0, .64 of it. So: below 0.5
    clear, from 0.9 drowned. Public pre-training makes the score better than these figures say, but
    the private steps then add less.

    Parameters
    ----------
    parameters : PrivacyParameters
        The study's mechanism with its σ.
    patients : int
        Patients n in the site's training cohort, >= 1. Private at a site: show the result there
        only, or use the declared, rounded size.
    values : int
        Trained values d, >= 1 (:func:`consilium_common.models.registry.trained_count`).
    sites : int
        Sites K of that size whose updates are averaged, >= 1 (default: 1).

    Raises
    ------
    ConsiliumError
        ``privacy.patients-invalid``: fewer than one patient or value.
    """
    if min(patients, values, sites) < 1:
        raise ConsiliumError(
            "privacy.patients-invalid",
            f"Noise cannot be compared for {patients} patients, {values} trained values and "
            f"{sites} sites.",
            hint="Give at least one of each.",
        )
    per_step, over_study = (
        ratio / (patients * math.sqrt(sites)) for ratio in _of_one_patient(parameters, values)
    )
    verdict: Verdict = "clear"
    if over_study >= WEAK_FROM:
        verdict = "weak" if over_study < DROWNED_FROM else "drowned"
    who = "1 patient" if patients == 1 else f"{patients:,} patients"
    if sites > 1:
        who += f" at each of {sites} sites"
    sentence = (
        f"With {who} and {values:,} trained values the noise is {per_step:.3g} times the "
        f"signal in a step and {over_study:.2g} times over the study: {_MEANING[verdict]}."
    )
    return NoiseToSignal(per_step, over_study, verdict, sentence)


def patients_needed(parameters: PrivacyParameters, values: int, sites: int = 1) -> tuple[int, int]:
    """Return from how many patients a site noise does not drown them, and they are clearly heard.

    The thresholds of :func:`noise_to_signal`, turned round; ``values`` and ``sites`` at least 1.
    """
    alone = _of_one_patient(parameters, values)[1] / math.sqrt(sites)
    # Strictly below a threshold: at a ratio equal to it the verdict is the worse one.
    afloat, clear = (math.floor(alone / limit) + 1 for limit in (DROWNED_FROM, WEAK_FROM))
    return afloat, clear


def _of_one_patient(parameters: PrivacyParameters, values: int) -> tuple[float, float]:
    """Return noise over signal of a cohort of one, in a step and over the study."""
    steps = parameters.steps_per_round * parameters.rounds
    per_step = parameters.noise_multiplier * math.sqrt(values) / parameters.sampling_rate
    return per_step, per_step / math.sqrt(steps)
