"""Who takes part in a step: a Poisson sample, drawn anew for every patient and every step.

Each made-up patient moves a value of its own, and the noise of these releases is a thousandth of
the clip norm: whoever took part can be read off the release itself, whatever the code says it did.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.auditing.exact import Check, binomial_family
from consilium_client.auditing.noise import lagged
from consilium_client.auditing.planted import PlantedPatients
from consilium_client.auditing.subject import Subject

_PATIENTS: Final = 40
_NOISE: Final = 1e-3
_MOST_LAGS: Final = 64
#: At lower rates too few take part for their pairs to show anything.
_PAIRING_RATE: Final = 0.05


def sampling_checks(subject: Subject, releases: int, false_alarm: float) -> list[Check]:
    """Read from ``releases`` releases who took part, and test the sampler.

    Returns
    -------
    list of Check
        The rate of every patient, the size of the samples, independence between steps and
        between patients, all against exact binomial distributions.
    """
    rate = subject.parameters.sampling_rate
    share = false_alarm / 4
    engine = PlantedPatients(np.eye(_PATIENTS, dtype=np.float32), subject.long_gradient)

    def read(at: float) -> NDArray[np.bool_]:
        released = subject.release(
            engine, _PATIENTS, releases, sampling_rate=at, noise_multiplier=_NOISE
        )
        return np.asarray(released > 0.5)

    drawn = read(rate)
    pairing = max(rate, _PAIRING_RATE)
    paired = drawn if pairing == rate else read(pairing)
    return [
        binomial_family(
            (
                "sampling-rate",
                "Is every patient drawn at the claimed rate?",
                "share of the steps in which a patient takes part",
            ),
            np.append(drawn.sum(axis=0), drawn.sum()),
            trials=np.append(np.full(_PATIENTS, releases), releases * _PATIENTS),
            probabilities=rate,
            false_alarm=share,
            label=lambda index: f"patient {index}" if index < _PATIENTS else "all patients",
        ),
        _sizes(paired, pairing, share),
        _between_steps(paired, pairing, share),
        _between_patients(paired, pairing, share),
    ]


def _sizes(drawn: NDArray[np.bool_], rate: float, false_alarm: float) -> Check:
    from scipy.stats import binom

    sizes = np.bincount(drawn.sum(axis=1), minlength=_PATIENTS + 1)
    return binomial_family(
        (
            "sampling-size",
            "Does the sample's size vary as it does when everybody is drawn alone?",
            "share of the steps with a sample of one size",
        ),
        sizes,
        trials=len(drawn),
        probabilities=binom.pmf(np.arange(_PATIENTS + 1), _PATIENTS, rate),
        false_alarm=false_alarm,
        label=lambda size: f"size {size}",
    )


def _between_steps(drawn: NDArray[np.bool_], rate: float, false_alarm: float) -> Check:
    """Count who takes part in both of two steps: shuffling makes it too rare, or too common."""
    # An epoch of a shuffled order has 1/q steps: it must fit into the lags.
    lags = range(1, min(max(8, math.ceil(2 / rate)), _MOST_LAGS, len(drawn) // 4) + 1)
    pairs = [lagged(drawn.astype(np.float64), lag) for lag in lags]
    length = min(len(a) for a, _ in pairs)
    both = [int((a[:length] * b[:length]).sum()) for a, b in pairs]
    return binomial_family(
        (
            "sampling-between-steps",
            "Is a patient drawn independently of the steps before?",
            "share of the pairs of steps with the same patient in both",
        ),
        np.array(both),
        trials=length * _PATIENTS,
        probabilities=rate**2,
        false_alarm=false_alarm,
        label=lambda index: f"{lags[index]} steps apart",
    )


def _between_patients(drawn: NDArray[np.bool_], rate: float, false_alarm: float) -> Check:
    numbers = drawn.astype(np.float64)
    first, second = np.triu_indices(_PATIENTS, 1)
    return binomial_family(
        (
            "sampling-between-patients",
            "Is a patient drawn independently of the others?",
            "share of the steps in which two patients both take part",
        ),
        (numbers.T @ numbers)[first, second].round().astype(np.int64),
        trials=len(drawn),
        probabilities=rate**2,
        false_alarm=false_alarm,
        label=lambda index: f"patients {first[index]} and {second[index]}",
    )
