"""One private step: sample patients, clip each one's gradient, add noise, and say what it cost.

The fields of :class:`Mechanism` are public facts; what depends on patients is only ever an
argument. Training hands over a source of gradients and gets back noisy ones: it never sees who was
sampled and has nothing to assemble by hand. What was really done is recorded where it is done, and
measured again on the numbers that were released.

Unit: the patient. Adjacency: add or remove one. One step is a Poisson-subsampled Gaussian mechanism
(Abadi et al. 2016; McMahan et al. 2018); the steps of a study compose adaptively.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

import numpy as np

from consilium_client.training.entropy import Entropy, SystemEntropy
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters

#: A right mechanism fails one measurement of a round less often than this. The stop is a release
#: of its own and adds at most this much to δ, nothing beside any δ in use.
_FALSE_ALARM: Final = 1e-12
#: Relative difference that rounding explains.
_ROUNDING: Final = 1e-9


class GradientEngine(Protocol):
    """Computes patients' gradients, one row a patient, each from that patient's data alone."""

    @property
    def size(self) -> int:
        """Number of trained parameters."""

    @property
    def device(self) -> str:
        """Device on which rows are given and the noisy gradient is wanted."""

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield tensors (rows, size) until every patient in ``patients`` had exactly one row."""


@dataclass(frozen=True)
class Mechanism:
    """The public facts of one round's private steps at one site."""

    #: Probability that a patient takes part in a step.
    sampling_rate: float
    #: L2 bound of one patient's gradient.
    clip_norm: float
    #: Standard deviation of the noise as a multiple of the clip norm.
    noise_multiplier: float
    #: Steps of the round.
    steps: int
    #: What the noisy sum is divided by. Public: never the number of patients really sampled.
    denominator: float

    @classmethod
    def for_round(cls, parameters: PrivacyParameters, cohort_size: int) -> Mechanism:
        """Return the mechanism of one round.

        Parameters
        ----------
        parameters : PrivacyParameters
            What the study says.
        cohort_size : int
            The cohort size that the site has declared in public; the denominator is the expected
            number of sampled patients by that declaration.

        Raises
        ------
        ConsiliumError
            ``privacy.cohort`` when the declared size is not positive.
        """
        if cohort_size < 1:
            raise ConsiliumError(
                "privacy.cohort",
                f"The declared cohort size is {cohort_size}.",
                hint="Declare how many patients the site trains on, rounded as it likes.",
            )
        return cls(
            sampling_rate=parameters.sampling_rate,
            clip_norm=parameters.clip_norm,
            noise_multiplier=parameters.noise_multiplier,
            steps=parameters.steps_per_round,
            denominator=parameters.sampling_rate * cohort_size,
        )

    @property
    def event(self) -> PrivacyEvent:
        """What the round is to cost."""
        return PrivacyEvent(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
        )

    def begin(self, entropy: Entropy | None = None) -> MechanismRun:
        """Begin one round. Randomness is the operating system's (default)."""
        return MechanismRun(self, SystemEntropy() if entropy is None else entropy)


class MechanismRun:
    """The steps of one round, and the record of what was really done in them."""

    def __init__(self, mechanism: Mechanism, entropy: Entropy) -> None:
        self._mechanism = mechanism
        self._entropy = entropy
        self._steps = 0
        self._rates: set[float] = set()
        self._multipliers: set[float] = set()
        self._candidates = 0
        self._drawn = 0
        self._noise_values = 0
        self._noise_squares = 0.0

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
        import torch

        mechanism = self._mechanism
        if self._steps >= mechanism.steps:
            _untrue(f"A step was asked for beyond the {mechanism.steps} of this round")
        rate, clip = mechanism.sampling_rate, mechanism.clip_norm
        deviation = mechanism.noise_multiplier * clip
        # Counted before anything is computed: a step that fails half-way is still spent.
        self._steps += 1
        self._rates.add(rate)
        self._multipliers.add(deviation / clip)

        drawn = np.flatnonzero(self._entropy.uniform(population) < rate).tolist()
        self._candidates += population
        self._drawn += len(drawn)
        total, rows = clipped_sum(
            engine.gradients(drawn) if drawn else (), clip, engine.size, engine.device
        )
        if rows != len(drawn):
            _untrue("The gradient engine returned another number of rows than patients")
        noise = torch.from_numpy(self._entropy.normal(engine.size, deviation))
        noisy = total + noise.to(engine.device)
        # Measured on what is released and not on what was meant to be added.
        self._noise_squares += float((((noisy - total) / deviation) ** 2).sum())
        self._noise_values += engine.size
        return (noisy / mechanism.denominator).float()

    def realised(self) -> PrivacyEvent:
        """Return the event that the steps so far really make, after measuring them.

        Raises
        ------
        ConsiliumError
            ``privacy.truth`` when the noise in the released gradients, or the number of patients
            drawn, cannot have come from the deviation and the rate that were used; or when these
            changed between steps.
        """
        from scipy.stats import binom, chi2

        if self._steps == 0:
            _untrue("No step was made")
        if len(self._rates) > 1 or len(self._multipliers) > 1:
            _untrue("Sampling rate, clip norm or noise changed within the round")
        (rate,), (multiplier,) = self._rates, self._multipliers
        # The squares of n standard Gaussian numbers sum to a chi-square of n degrees of freedom.
        noise = chi2(self._noise_values)
        least, most = noise.cdf(self._noise_squares), noise.sf(self._noise_squares)
        if not (least > _FALSE_ALARM / 4 and most > _FALSE_ALARM / 4):
            _untrue("The noise in the released gradients has not the deviation it should have")
        draws = binom(self._candidates, rate)
        least, most = draws.cdf(self._drawn), draws.sf(self._drawn - 1)
        if not (least > _FALSE_ALARM / 4 and most > _FALSE_ALARM / 4):
            _untrue("Patients were not drawn at the sampling rate")
        return PrivacyEvent(sampling_rate=rate, noise_multiplier=multiplier, steps=self._steps)


def clipped_sum(chunks: Iterable[Any], clip_norm: float, size: int, device: str) -> tuple[Any, int]:
    """Add up gradients, each row first scaled to an L2 norm of at most ``clip_norm``.

    Adding or removing one row moves the sum by at most ``clip_norm``, whatever the row holds: a row
    with a value that is not finite counts as zero. Norms and the sum are float64, so that squares
    of float32 values cannot overflow.

    Parameters
    ----------
    chunks : iterable of torch.Tensor
        Each (rows, size), float32.

    Returns
    -------
    tuple of torch.Tensor and int
        The sum, float64, shape (size,), and the number of rows.
    """
    import torch

    total = torch.zeros(size, dtype=torch.float64, device=device)
    rows = 0
    for chunk in chunks:
        wide = chunk.detach().to(torch.float64)
        norms = torch.linalg.vector_norm(wide, dim=1)
        finite = torch.isfinite(norms)
        factors = (clip_norm / norms.clamp_min(clip_norm)).where(finite, 0.0)
        # Not multiplied by zero alone: nan times zero is nan.
        total += factors @ wide.where(finite[:, None], 0.0)
        rows += len(chunk)
    return total, rows


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
