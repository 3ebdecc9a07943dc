"""A diagnosis: steps in an order in which each relies on those before it, up to the first cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from consilium_common.errors import ConsiliumError


class Outcome(StrEnum):
    """How a step ended."""

    OK = "ok"
    #: It works, and wants a look.
    WARNING = "warning"
    #: The cause: later steps would only fail because of it.
    FAILED = "failed"
    #: There was nothing to try, or an earlier step failed.
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Found:
    """What a look found; a look that fails raises :class:`ConsiliumError` instead.

    Parameters
    ----------
    happened : str
        In words, for people.
    todo : str
        What to do; empty where nothing is.
    outcome : Outcome
        Never ``FAILED`` (default: ``OK``).
    facts : mapping
        The same in figures, for ``--json``.
    """

    happened: str
    todo: str = ""
    outcome: Outcome = Outcome.OK
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def warning(cls, happened: str, todo: str, **facts: Any) -> Found:
        """Return what wants a look."""
        return cls(happened, todo, Outcome.WARNING, facts)

    @classmethod
    def skipped(cls, happened: str, todo: str = "") -> Found:
        """Return that there was nothing to try, and why."""
        return cls(happened, todo, Outcome.SKIPPED)


@dataclass(frozen=True)
class Check:
    """One step to be taken.

    Parameters
    ----------
    name : str
        Of the step, as it stands in the report: ``DNS``.
    tried : str
        What is tried, in the past tense: ``looked up the aggregator's name``.
    look : callable
        Tries it.
    """

    name: str
    tried: str
    look: Callable[[], Found]


@dataclass(frozen=True)
class Step:
    """One step that was taken, or was not because an earlier one failed."""

    name: str
    tried: str
    happened: str
    todo: str
    outcome: Outcome
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: ConsiliumError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the step for ``--json``."""
        content: dict[str, Any] = {
            "name": self.name,
            "tried": self.tried,
            "happened": self.happened,
            "todo": self.todo,
            "outcome": str(self.outcome),
            **({"facts": dict(self.facts)} if self.facts else {}),
        }
        return content | ({"error": self.error.to_dict()} if self.error else {})


@dataclass(frozen=True)
class Diagnosis:
    """All steps in order; at most one of them failed."""

    steps: tuple[Step, ...]

    @property
    def cause(self) -> Step | None:
        """The step that failed."""
        return next((one for one in self.steps if one.outcome is Outcome.FAILED), None)

    @property
    def warned(self) -> bool:
        """Whether something wants a look."""
        return any(one.outcome is Outcome.WARNING for one in self.steps)

    def step(self, name: str) -> Step:
        """Return the step of that name."""
        return next(one for one in self.steps if one.name == name)

    def to_list(self) -> list[dict[str, Any]]:
        """Return all steps for ``--json``."""
        return [step.to_dict() for step in self.steps]


class DiagnosisError(ConsiliumError):
    """The cause that a diagnosis found, with every step that led to it."""

    def __init__(self, cause: ConsiliumError, diagnosis: Diagnosis) -> None:
        super().__init__(cause.code, cause.message, where=cause.where, hint=cause.hint)
        self.diagnosis = diagnosis

    def to_dict(self) -> dict[str, Any]:
        """Return the error with the steps, so that ``--json`` has both in its one envelope."""
        return {**super().to_dict(), "steps": self.diagnosis.to_list()}


def examine(checks: Iterable[Check], show: Callable[[Step], None]) -> Diagnosis:
    """Take the steps in order and stop at the first that fails.

    Parameters
    ----------
    checks : iterable of Check
        Each relies on all before it.
    show : callable
        Is given every step as soon as it was taken; those that were not taken are not shown.
    """
    steps: list[Step] = []
    cause: Step | None = None
    for check in checks:
        if cause is not None:
            happened = f"Not tried: {cause.name} comes first."
            steps.append(Step(check.name, check.tried, happened, "", Outcome.SKIPPED))
            continue
        step = _take(check)
        show(step)
        steps.append(step)
        if step.outcome is Outcome.FAILED:
            cause = step
    return Diagnosis(tuple(steps))


def _take(check: Check) -> Step:
    try:
        found = check.look()
    except ConsiliumError as error:
        return Step(check.name, check.tried, error.message, error.hint, Outcome.FAILED, error=error)
    return Step(
        check.name, check.tried, found.happened, found.todo, found.outcome, facts=found.facts
    )
