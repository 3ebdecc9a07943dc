"""All attacks on one subject, and what together they show and do not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from consilium_client.auditing.exact import Check
from consilium_client.auditing.network import (
    NetworkPatients,
    network_distinguishing_check,
    network_influence_check,
)
from consilium_client.auditing.noise import noise_checks
from consilium_client.auditing.one_run import OneRun, one_run
from consilium_client.auditing.sampling import sampling_checks
from consilium_client.auditing.sensitivity import distinguishing_check, influence_check
from consilium_client.auditing.subject import Subject
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT

#: Probability that a right mechanism fails any of the exact checks, all together.
FALSE_ALARM: Final = 1e-6
#: The one-run bound loses its strength where δ is not far below 1 / canaries.
_AUDIT_DELTA: Final = 1e-5
#: Claims of at most this ε are what the one-run audit is given: larger ones it cannot refute.
_WITHIN_REACH: Final = 5.5


@dataclass(frozen=True)
class Effort:
    """How hard to attack.

    Parameters
    ----------
    canaries : int
        Canaries of the one-run audit, 24 to 5000.
    releases : int
        Releases of each mechanism test.
    steps : int
        Steps of the one-run audit, at most.
    network_seconds : float
        About how long to release one patient seen through the study's network.
    """

    canaries: int = 1000
    releases: int = 20_000
    steps: int = 160
    network_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 24 <= self.canaries <= 5000:
            raise ConsiliumError(
                "usage.canaries",
                f"There are to be {self.canaries} canaries, not 24 to 5000.",
                hint="Fewer can refute nothing, and more take too long; 1000 is usual.",
            )


#: A few seconds; finds gross faults.
QUICK: Final = Effort(canaries=400, releases=4000, steps=40, network_seconds=8.0)


@dataclass(frozen=True)
class AttackReport:
    """Every check of one attack, passed or not."""

    subject: Subject
    checks: tuple[Check, ...]
    run: OneRun
    #: The gradient engine attacked, and why it is the one chosen; empty if none was.
    engine: str
    #: What was not attacked, and why.
    omitted: tuple[str, ...]

    @property
    def refuted(self) -> tuple[str, ...]:
        """Names of the attacks that refute the claim."""
        found = [check.name for check in self.checks if not check.passed]
        return (*found, *([] if self.run.passed else ["one-run"]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        parameters = self.subject.parameters
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "claim": {
                "sampling_rate": parameters.sampling_rate,
                "clip_norm": parameters.clip_norm,
                "noise_multiplier": parameters.noise_multiplier,
                "steps": parameters.steps_per_round * parameters.rounds,
                "trained_values": self.subject.size,
            },
            "engine": self.engine,
            "false_alarm": FALSE_ALARM,
            "checks": [check.to_dict() for check in self.checks],
            "one_run": self.run.to_dict(),
            "omitted": list(self.omitted),
            "refuted": list(self.refuted),
        }

    def require_unrefuted(self) -> None:
        """Raise unless every check passed.

        Raises
        ------
        ConsiliumError
            ``privacy.attack`` naming the checks that refute the claim.
        """
        if not self.refuted:
            return
        details = [
            f"{check.name} is {check.observed:.4g}"
            + (f" at {check.where}" if check.where else "")
            + f", expected {expected(check)}"
            for check in self.checks
            if not check.passed
        ]
        if not self.run.passed:
            run = self.run
            details.append(
                f"one-run shows ε of at least {run.lower_bound:.2f} and estimates "
                f"{run.estimate:.2f} (at least {run.estimate_low:.2f}), claimed {run.claimed:.2f}"
            )
        raise ConsiliumError(
            "privacy.attack",
            f"The installed code does not keep its claim: {'; '.join(details)}.",
            where=f"{len(self.refuted)} of {len(self.checks) + 1} attacks",
            hint="Train nothing with this installation. Run the command again to exclude a chance "
            "finding, compare the installed package with the published one, and report it.",
        )


def expected(check: Check) -> str:
    """Say where a right mechanism's statistic lies."""
    if check.low is None:
        return f"at most {check.high:.4g}"
    if check.high is None:
        return f"at least {check.low:.4g}"
    return f"{check.low:.4g} to {check.high:.4g}"


def attack(
    subject: Subject,
    effort: Effort,
    *,
    confidence: float = 0.95,
    patients: NetworkPatients | None = None,
) -> AttackReport:
    """Attack ``subject`` in every way this package knows.

    Parameters
    ----------
    confidence : float
        Confidence of the one-run lower bounds, 0.5 <= confidence < 1.
    patients : NetworkPatients or None
        For the attacks through the study's network; None leaves them out.

    Raises
    ------
    ConsiliumError
        ``usage.confidence``; ``privacy.truth`` when the mechanism itself notices a fault first.
    """
    if not 0.5 <= confidence < 1:
        raise ConsiliumError(
            "usage.confidence",
            f"The confidence is {confidence:g}, not in [0.5, 1).",
            hint="Take 0.95, or 0.99.",
        )
    parameters = subject.parameters
    share = FALSE_ALARM / 6
    checks = noise_checks(subject, effort.releases, share)
    checks += sampling_checks(subject, effort.releases, share)
    checks.append(influence_check(subject, share))
    checks.append(distinguishing_check(subject, effort.releases, share))
    omitted = []
    if patients is None:
        omitted.append("The study's network and its gradient engine.")
    else:
        checks.append(network_influence_check(subject, patients, share))
        seen = network_distinguishing_check(
            subject, patients, seconds=effort.network_seconds, false_alarm=share
        )
        if seen is None:
            omitted.append(
                "Telling releases apart through the study's network: too slow here to release "
                "often enough."
            )
        else:
            checks.append(seen)
    delta = min(parameters.delta, _AUDIT_DELTA)
    steps = _steps(subject, effort, delta)
    run = one_run(
        subject,
        effort.canaries,
        steps=steps,
        delta=delta,
        confidence=confidence,
    )
    engine = "" if patients is None else f"{patients.choice.name} ({patients.choice.why})"
    return AttackReport(subject, tuple(checks), run, engine, tuple(omitted))


def _steps(subject: Subject, effort: Effort, delta: float) -> int:
    """Return how many steps to run: as many as keep the claim where canaries can refute it."""
    parameters = subject.parameters
    steps = min(effort.steps, parameters.steps_per_round * parameters.rounds)
    while steps > 1 and epsilon_of([subject.event(steps)], delta) > _WITHIN_REACH:
        steps = -(-steps // 2)
    return steps
