"""The mechanism of one round: sampler, clipper, noise and price in one immutable object.

The fields of :class:`Mechanism` are public facts; what depends on patients is only ever an
argument. Training hands over a source of gradients and gets back noisy ones: it never sees who was
sampled and has nothing to assemble by hand. What was really done is recorded where it is done, and
measured again on the numbers that were released.

Unit: the patient. Adjacency: add or remove one. One step is a Poisson-subsampled Gaussian mechanism
(Abadi et al. 2016; McMahan et al. 2018); the steps of a study compose adaptively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np

from consilium_client.training.clipping import (
    COUNT_SENSITIVITY,
    FLAT,
    ClippedSum,
    Clipping,
    clipped_sum,
    combined_multiplier,
    gradient_multiplier,
    next_clip_norm,
)
from consilium_client.training.engines.base import GradientEngine
from consilium_client.training.entropy import Entropy, SystemEntropy
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters
from consilium_common.study.schema import AdaptiveClipping

__all__ = ["GradientEngine", "Mechanism", "MechanismRun", "clipped_sum", "require_truth"]

#: A right mechanism fails one measurement of a round less often than this. The stop is a release
#: of its own and adds at most this much to δ, nothing beside any δ in use.
_FALSE_ALARM: Final = 1e-12
#: Relative difference that rounding explains.
_ROUNDING: Final = 1e-9
#: Values of one step that may show no noise at all. Float64 rounds away noise so small about once
#: in 10^12 values; a network has at most 2·10^8.
_SILENT: Final = 3


@dataclass(frozen=True)
class Mechanism:
    """The public facts of one round's private steps at one site."""

    #: Probability that a patient takes part in a step.
    sampling_rate: float
    #: L2 bound of one patient's gradient; with adaptive clipping, the bound the round begins with.
    clip_norm: float
    #: What one step costs: standard deviation of the noise as a multiple of the clip norm. With
    #: adaptive clipping the gradient and the count share it.
    noise_multiplier: float
    #: Steps of the round.
    steps: int
    #: What the noisy sum is divided by. Public: never the number of patients really sampled.
    denominator: float
    #: How gradients are brought within the clip norm.
    clipping: Clipping = FLAT
    #: Where noise and samples come from: the operating system.
    entropy: Entropy = field(default_factory=SystemEntropy, compare=False, repr=False)

    @classmethod
    def for_round(
        cls,
        parameters: PrivacyParameters,
        cohort_size: int,
        *,
        clipping: Clipping = FLAT,
        clip_norm: float | None = None,
        threads: int = 1,
    ) -> Mechanism:
        """Return the mechanism of one round.

        Parameters
        ----------
        parameters : PrivacyParameters
            What the study says.
        cohort_size : int
            The cohort size that the site has declared in public; the denominator is the expected
            number of sampled patients by that declaration.
        clipping : Clipping
            The study's rule (default: flat).
        clip_norm : float or None
            Where adaptive clipping stood after the round before; None begins at the study's clip
            norm, and other rules always do.
        threads : int
            Threads that make noise (default: 1).

        Raises
        ------
        ConsiliumError
            ``privacy.cohort`` when the declared size is not positive; ``privacy.clipping`` when
            adaptive clipping's count would use up the step's whole noise, or ``clip_norm`` is no
            positive number.
        """
        if cohort_size < 1:
            raise ConsiliumError(
                "privacy.cohort",
                f"The declared cohort size is {cohort_size}.",
                hint="Declare how many patients the site trains on, rounded as it likes.",
            )
        gradient_multiplier(parameters.noise_multiplier, clipping)
        start = parameters.clip_norm
        if clipping.kind == "adaptive" and clip_norm is not None:
            start = clip_norm
        if not 0 < start < math.inf:
            raise ConsiliumError(
                "privacy.clipping",
                f"The clip norm is {start!r}.",
                hint="It must be a positive number; what the round before returned is one.",
            )
        return cls(
            sampling_rate=parameters.sampling_rate,
            clip_norm=start,
            noise_multiplier=parameters.noise_multiplier,
            steps=parameters.steps_per_round,
            denominator=parameters.sampling_rate * cohort_size,
            clipping=clipping,
            entropy=SystemEntropy(threads),
        )

    @property
    def event(self) -> PrivacyEvent:
        """What the round is to cost."""
        return PrivacyEvent(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
        )

    @property
    def dp_event(self) -> Any:
        """What the round is to cost, as a ``dp_accounting.DpEvent`` for any accountant."""
        from dp_accounting import dp_event

        step = dp_event.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1:
            step = dp_event.PoissonSampledDpEvent(self.sampling_rate, step)
        return dp_event.SelfComposedDpEvent(step, self.steps)

    @property
    def gradient_multiplier(self) -> float:
        """Standard deviation of the gradient's noise as a multiple of the clip norm."""
        return gradient_multiplier(self.noise_multiplier, self.clipping)

    def sample(self, population: int, entropy: Entropy) -> list[int]:
        """Draw patients, each by itself with the sampling rate (Poisson sampling)."""
        drawn: list[int] = np.flatnonzero(entropy.uniform(population) < self.sampling_rate).tolist()
        return drawn

    def clipper(self, size: int, device: str, clip_norm: float) -> ClippedSum:
        """Return an empty sum that bounds every row by ``clip_norm``."""
        return ClippedSum(size, device, clip_norm, self.clipping)

    def begin(self, entropy: Entropy | None = None) -> MechanismRun:
        """Begin one round. Another entropy than the mechanism's own is for tests and audits."""
        return MechanismRun(self, self.entropy if entropy is None else entropy)


class _Noise:
    """Squares of the standardised noise of one kind of release."""

    def __init__(self) -> None:
        self.values = 0
        self.squares = 0.0

    def add(self, values: int, squares: float) -> None:
        self.values += values
        self.squares += squares

    def plausible(self) -> bool:
        """Return whether the squares can be those of standard Gaussian numbers.

        The squares of n such numbers sum to a chi-square of n degrees of freedom.
        """
        from scipy.stats import chi2

        if self.values == 0:
            return True
        law = chi2(self.values)
        return bool(min(law.cdf(self.squares), law.sf(self.squares)) > _FALSE_ALARM / 6)


class MechanismRun:
    """The steps of one round, and the record of what was really done in them."""

    def __init__(self, mechanism: Mechanism, entropy: Entropy) -> None:
        self._mechanism = mechanism
        self._entropy = entropy
        #: C of the next step. Public: it follows from the study and from noisy counts.
        self.clip_norm = mechanism.clip_norm
        #: Standard deviation, per value, of the noise in the last released gradient. Public.
        self.noise_deviation = 0.0
        self._steps = 0
        self._rates: list[float] = []
        self._multipliers: list[float] = []
        self._candidates = 0
        self._drawn = 0
        self._silent = 0
        self._gradient_noise = _Noise()
        self._count_noise = _Noise()

    def step(self, population: int, engine: GradientEngine) -> Any:
        """Release one noisy gradient.

        Parameters
        ----------
        population : int
            Patients present at the site, numbered from 0. Private.
        engine : GradientEngine
            Computes the gradients of those patients that are drawn. Private.

        Returns
        -------
        torch.Tensor
            float32, shape (engine.size,): (sum of clipped gradients + noise) / denominator. An
            empty draw gives noise alone and costs the same.

        Raises
        ------
        ConsiliumError
            ``privacy.truth`` when the round's steps are used up or the engine returns another
            number of rows than patients.
        """
        mechanism, clip = self._mechanism, self.clip_norm
        if self._steps >= mechanism.steps:
            _untrue(f"A step was asked for beyond the {mechanism.steps} of this round")
        deviation = mechanism.gradient_multiplier * clip
        # Counted before anything is computed: a step that fails half-way is still spent.
        self._steps += 1
        self._rates.append(mechanism.sampling_rate)
        self._multipliers.append(self._price(deviation / clip))

        drawn = mechanism.sample(population, self._entropy)
        self._candidates += population
        self._drawn += len(drawn)
        clipped = mechanism.clipper(engine.size, engine.device, clip)
        for chunk in engine.gradients(drawn) if drawn else ():
            clipped.add(chunk)
        if clipped.rows != len(drawn):
            _untrue("The gradient engine returned another number of rows than patients")
        if isinstance(mechanism.clipping, AdaptiveClipping):
            self._follow(mechanism.clipping, clipped)
        self.noise_deviation = deviation / mechanism.denominator
        noisy = self._noised(clipped.total, deviation)
        return noisy.div_(mechanism.denominator).float()

    def realised(self) -> PrivacyEvent:
        """Return the event that the steps so far really make, after measuring them.

        Raises
        ------
        ConsiliumError
            ``privacy.truth`` when the noise in the released gradients or counts, or the number of
            patients drawn, cannot have come from the deviation and the rate that were used; or
            when these changed between steps.
        """
        from scipy.stats import binom

        if self._steps == 0:
            _untrue("No step was made")
        for used in (self._rates, self._multipliers):
            if max(used) - min(used) > _ROUNDING * max(used):
                _untrue("Sampling rate, clip norm or noise changed within the round")
        rate, multiplier = max(self._rates), min(self._multipliers)
        if not self._gradient_noise.plausible():
            _untrue("The noise in the released gradients has not the deviation it should have")
        if self._silent > _SILENT:
            _untrue("A part of the released gradients has no noise")
        if not self._count_noise.plausible():
            _untrue("The noise in adaptive clipping's counts has not the deviation it should have")
        draws = binom(self._candidates, rate)
        least, most = draws.cdf(self._drawn), draws.sf(self._drawn - 1)
        if not min(least, most) > _FALSE_ALARM / 6:
            _untrue("Patients were not drawn at the sampling rate")
        return PrivacyEvent(sampling_rate=rate, noise_multiplier=multiplier, steps=self._steps)

    def _price(self, gradient: float) -> float:
        """Return the multiplier that all releases of this step cost together."""
        clipping = self._mechanism.clipping
        if not isinstance(clipping, AdaptiveClipping):
            return gradient
        return combined_multiplier(gradient, clipping.count_noise / COUNT_SENSITIVITY)

    def _noised(self, total: Any, deviation: float) -> Any:
        """Return ``total`` with noise, and measure what was added. ``total`` is overwritten."""
        import torch

        noisy = torch.from_numpy(self._entropy.normal(len(total), deviation)).to(total.device)
        noisy.add_(total)
        # Measured on what is released and not on what was meant to be added.
        added = total.sub_(noisy).div_(deviation)
        self._silent = max(self._silent, len(added) - int(torch.count_nonzero(added)))
        self._gradient_noise.add(len(added), float(torch.dot(added, added)))
        return noisy

    def _follow(self, clipping: AdaptiveClipping, clipped: ClippedSum) -> None:
        """Release the noisy count of gradients within C, and move C by it."""
        count = clipped.within - COUNT_SENSITIVITY * clipped.rows
        noisy = count + float(self._entropy.normal(1, clipping.count_noise)[0])
        self._count_noise.add(1, ((noisy - count) / clipping.count_noise) ** 2)
        self.clip_norm = next_clip_norm(
            self.clip_norm, noisy, self._mechanism.denominator, clipping
        )


def require_truth(claimed: PrivacyEvent, realised: PrivacyEvent) -> PrivacyEvent:
    """Stop unless what was done is what the ledger was charged for.

    Returns
    -------
    PrivacyEvent
        ``claimed``, to which ``realised`` is equal but for rounding (1e-9, relative).

    Raises
    ------
    ConsiliumError
        ``privacy.truth`` when rate, noise or number of steps differ, in either direction.
    """
    for name in ("sampling_rate", "noise_multiplier", "steps"):
        told, done = getattr(claimed, name), getattr(realised, name)
        if not abs(told - done) <= _ROUNDING * told:
            _untrue(f"The charge says {name} {told:g} and the round really used {done:g}")
    return claimed


def _untrue(what: str) -> NoReturn:
    raise ConsiliumError(
        "privacy.truth",
        f"{what}. The update is withheld.",
        hint="The charge stands, nothing has left. Report this as a fault: the mechanism that ran "
        "is not the one that was approved.",
    )
