"""The mechanism of one round: sampler, clipper, noise and price in one immutable object.

The fields of :class:`Mechanism` are public facts; what depends on patients is only ever an
argument. Training hands over a source of gradients and gets back noisy ones: it never sees who was
sampled and has nothing to assemble by hand. What was really done is recorded where it is done, and
measured again on the numbers that were released (:mod:`consilium_client.training.mechanism_run`).

Unit: the patient. Adjacency: add or remove one. One step is a Poisson-subsampled Gaussian mechanism
(Abadi et al. 2016; McMahan et al. 2018); the steps of a study compose adaptively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from consilium_client.training.clipping import (
    FLAT,
    ClippedSum,
    Clipping,
    clipped_sum,
    gradient_multiplier,
)
from consilium_client.training.engines.base import GradientEngine
from consilium_client.training.entropy import Entropy, SystemEntropy
from consilium_client.training.mechanism_run import MechanismRun, require_truth
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters

__all__ = ["GradientEngine", "Mechanism", "MechanismRun", "clipped_sum", "require_truth"]


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
