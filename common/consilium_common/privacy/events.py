"""What the private mechanism did to a patient: immutable events, the only thing a ledger keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from consilium_common.errors import ConsiliumError

#: What one record is: everything of one patient at a site.
UNIT: Final = "patient"
#: What neighbouring data sets differ in: one patient added or removed.
ADJACENCY: Final = "add-or-remove-one"
#: The one mechanism that is charged: the Gaussian on a Poisson sample of the patients.
MECHANISM: Final = "poisson-subsampled-gaussian"

#: Most that one patient moves the sum of a released evaluation: scores in [0, 1], less a half.
SCORE_SENSITIVITY: Final = 0.5

#: A patient's whole past in canonical form: equal pasts are equal values (see :func:`grouped`).
History = tuple["PrivacyEvent", ...]


@dataclass(frozen=True, order=True)
class PrivacyEvent:
    """Steps of one Poisson-subsampled Gaussian; unit the patient, adjacency add or remove one.

    Parameters
    ----------
    sampling_rate : float
        Probability q that a patient takes part in a step, 0 < q <= 1.
    noise_multiplier : float
        Standard deviation σ of the noise as a multiple of the clip norm, > 0.
    steps : int
        Number of steps, >= 1.

    Raises
    ------
    ConsiliumError
        ``privacy.event-invalid`` when a value is out of its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling_rate", _number("sampling_rate", self.sampling_rate))
        object.__setattr__(
            self, "noise_multiplier", _number("noise_multiplier", self.noise_multiplier)
        )
        if not 0 < self.sampling_rate <= 1:
            raise _invalid(f"sampling_rate is {self.sampling_rate}, not in (0, 1]")
        # Noise below 1e-6 or above 1e9 of the clip norm is a mistake and overflows accountants.
        if not 1e-6 <= self.noise_multiplier <= 1e9:
            raise _invalid(f"noise_multiplier is {self.noise_multiplier}, not in [1e-6, 1e9]")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise _invalid("steps is not an integer")
        if not 1 <= self.steps <= 10**12:
            raise _invalid(f"steps is {self.steps}, not in [1, 1e12]")

    def to_dict(self) -> dict[str, Any]:
        """Return the event as it stands in the ledger, with its unit and adjacency."""
        return {
            "mechanism": MECHANISM,
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "sampling_rate": self.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PrivacyEvent:
        """Read what :meth:`to_dict` wrote; refuse anything else.

        Raises
        ------
        ConsiliumError
            ``privacy.event-invalid``: a key is missing or unknown, or another mechanism, unit or
            adjacency is named.
        """
        if not isinstance(value, Mapping):
            raise _invalid("it is not an object")
        expected = {"mechanism": MECHANISM, "unit": UNIT, "adjacency": ADJACENCY}
        numbers = {"sampling_rate", "noise_multiplier", "steps"}
        if set(value) != set(expected) | numbers:
            raise _invalid("its keys are not those of an event")
        for key, known in expected.items():
            if value[key] != known:
                raise _invalid(f"{key} is not {known!r}")
        return cls(value["sampling_rate"], value["noise_multiplier"], value["steps"])


@dataclass(frozen=True)
class PrivacyParameters:
    """Everything public about a study's mechanism, fixed before the first step.

    Parameters
    ----------
    sampling_rate : float
        Probability q that a patient takes part in a step.
    clip_norm : float
        L2 bound C of one patient's gradient.
    noise_multiplier : float
        σ; the noise's standard deviation is σ·C.
    steps_per_round, rounds : int
        Local steps T of a round, and rounds R.
    delta : float
        δ at which the study states its ε.
    evaluations : int
        Released evaluations over the study, 0 where none are released.
    evaluation_noise : float or None
        Noise multiplier of one released evaluation: the standard deviation of the noise on the sum
        of patients' scores is half of it, because scores in [0, 1] are centred at a half. None
        where none are released.
    statistics_tables : int
        Tables of the statistics that are released once, 0 where none are; one patient moves their
        sum by at most √tables.
    statistics_noise : float or None
        Noise multiplier of the released statistics; None where none are released.
    """

    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    delta: float
    evaluations: int = 0
    evaluation_noise: float | None = None
    statistics_tables: int = 0
    statistics_noise: float | None = None

    @property
    def event_per_round(self) -> PrivacyEvent:
        """What one round costs every patient of the cohort."""
        return PrivacyEvent(self.sampling_rate, self.noise_multiplier, self.steps_per_round)

    @property
    def evaluation_event(self) -> PrivacyEvent | None:
        """What one released evaluation costs every patient it scores; None where none are."""
        if self.evaluation_noise is None:
            return None
        return PrivacyEvent(sampling_rate=1.0, noise_multiplier=self.evaluation_noise, steps=1)

    @property
    def evaluation_deviation(self) -> float | None:
        """Standard deviation of the noise on one released sum of scores; None without any."""
        return None if self.evaluation_noise is None else self.evaluation_noise * SCORE_SENSITIVITY

    @property
    def statistics_event(self) -> PrivacyEvent | None:
        """What the released statistics cost every patient trained on; None where none are."""
        if self.statistics_noise is None:
            return None
        return PrivacyEvent(sampling_rate=1.0, noise_multiplier=self.statistics_noise, steps=1)

    @property
    def statistics_sensitivity(self) -> float:
        """L2 norm of the most that one patient moves the released statistics."""
        return math.sqrt(self.statistics_tables)

    @property
    def statistics_deviation(self) -> float | None:
        """Standard deviation of the noise on one number of the statistics; None without any."""
        if self.statistics_noise is None:
            return None
        return self.statistics_noise * self.statistics_sensitivity

    @property
    def event_total(self) -> PrivacyEvent:
        """What the training of the whole study costs every patient of the cohort."""
        return self.event_of(self.rounds)

    def event_of(self, rounds: int) -> PrivacyEvent:
        """Return what ``rounds`` rounds cost (``rounds`` >= 1)."""
        return PrivacyEvent(
            self.sampling_rate, self.noise_multiplier, self.steps_per_round * rounds
        )

    def events_of(self, rounds: int) -> list[PrivacyEvent]:
        """Return all that ``rounds`` rounds cost a patient trained on: the statistics, too."""
        counted = self.statistics_event
        return [self.event_of(rounds), *([counted] if counted is not None else [])]


def grouped(events: Iterable[PrivacyEvent]) -> History:
    """Merge events of equal (q, σ) and sort them: the canonical form of a history.

    Composition of independent mechanisms does not depend on order, so patients whose grouped
    events are equal have spent equally.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.sampling_rate, event.noise_multiplier)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(PrivacyEvent(q, sigma, steps[q, sigma]) for q, sigma in sorted(steps))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise _invalid(f"{name} is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise _invalid(f"{name} is not finite")
    return number


def _invalid(what: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.event-invalid",
        f"A privacy event is not valid: {what}.",
        hint="Give a sampling rate in (0, 1], a positive noise multiplier and at least one step.",
    )
