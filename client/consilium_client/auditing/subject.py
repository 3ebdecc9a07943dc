"""What is attacked: the mechanism as installed, reached through one narrow seam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.clipping import FLAT, Clipping, gradient_multiplier
from consilium_client.training.mechanism import Mechanism
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters
from consilium_common.study.schema import AdaptiveClipping

if TYPE_CHECKING:
    from consilium_client.training.engines.base import GradientEngine
    from consilium_common.study import Study

#: Takes the number of patients present and their engine, and releases one noisy gradient.
Release = Callable[[int, "GradientEngine"], Any]
#: Begins one round of a mechanism.
Begin = Callable[[Mechanism], Release]

#: Declared cohort of the rounds made here; it sets the public denominator and nothing else.
_COHORT: Final = 100
#: Steps after which a new round begins: faults between rounds must show as well as within one.
_STEPS_PER_ROUND: Final = 50


def installed(mechanism: Mechanism) -> Release:
    """Begin a round of the mechanism as training does, with the operating system's entropy."""
    return mechanism.begin().step


@dataclass(frozen=True)
class Subject:
    """A mechanism with its claim, and how a round of it begins.

    Parameters
    ----------
    parameters : PrivacyParameters
        What the study claims.
    tensors : tuple of (str, int)
        Name and number of values of each trained tensor, in the order of the released vector.
    clipping : Clipping
        The study's rule (default: flat).
    begin : callable
        Begins a round (default: the installed code). Whoever audits other code puts it here.
    """

    parameters: PrivacyParameters
    tensors: tuple[tuple[str, int], ...]
    clipping: Clipping = FLAT
    begin: Begin = installed

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(size for _, size in self.tensors)

    @property
    def noise_multiplier(self) -> float:
        """Multiplier of the noise in a released gradient: adaptive clipping's is the larger one."""
        return gradient_multiplier(self.parameters.noise_multiplier, self.clipping)

    @property
    def long_gradient(self) -> float:
        """A length that every rule of clipping brings to the clip norm, to within .01 %."""
        return 1e6 * max(1.0, self.parameters.clip_norm)

    def event(self, steps: int) -> PrivacyEvent:
        """Return what ``steps`` steps are claimed to cost."""
        parameters = self.parameters
        return PrivacyEvent(parameters.sampling_rate, parameters.noise_multiplier, steps)

    def release(
        self,
        engine: GradientEngine,
        population: int,
        count: int,
        *,
        sampling_rate: float | None = None,
        noise_multiplier: float | None = None,
    ) -> NDArray[np.float32]:
        """Return ``count`` releases as they left the mechanism, in units of the clip norm.

        Parameters
        ----------
        engine : GradientEngine
            Gives the gradients of made-up patients.
        population : int
            Patients present.
        sampling_rate, noise_multiplier : float or None
            In place of the claimed ones.

        Returns
        -------
        numpy.ndarray
            Noisy sums, float32, shape (count, engine.size): each release times its public
            denominator, divided by the clip norm.
        """
        parameters = self.parameters
        rows = np.empty((count, engine.size), dtype=np.float32)
        # Adaptive clipping moves the unit within a round.
        most = 1 if isinstance(self.clipping, AdaptiveClipping) else _STEPS_PER_ROUND
        for start in range(0, count, most):
            steps = min(most, count - start)
            mechanism = Mechanism.for_round(
                replace(
                    parameters,
                    sampling_rate=sampling_rate or parameters.sampling_rate,
                    noise_multiplier=noise_multiplier or parameters.noise_multiplier,
                    steps_per_round=steps,
                    rounds=1,
                ),
                _COHORT,
                clipping=self.clipping,
            )
            release = self.begin(mechanism)
            for row in range(start, start + steps):
                rows[row] = release(population, engine).cpu().numpy()
            rows[start : start + steps] *= mechanism.denominator / mechanism.clip_norm
        return rows


def subject_of(study: Study) -> Subject:
    """Return what a study claims, with the layout of its trained tensors.

    Raises
    ------
    ConsiliumError
        ``study.not-private`` for a study without privacy; ``study.network`` and
        ``privacy.network`` as training would.
    """
    from consilium_common.models.private import check_private
    from consilium_common.models.registry import build_network
    from consilium_common.privacy.accounting import parameters

    claimed = parameters(study)
    if claimed is None:
        raise ConsiliumError(
            "study.not-private",
            "The study has no privacy, so there is no claim to attack.",
            where=f"study {study.name}",
            hint="Give a study with `privacy: mode: patient`, or none for the shipped one.",
        )
    network = build_network(study)
    check_private(network)
    tensors = [(name, p.numel()) for name, p in network.named_parameters() if p.requires_grad]
    assert study.privacy.mode == "patient"
    return Subject(claimed, tuple(tensors), study.privacy.clipping)
