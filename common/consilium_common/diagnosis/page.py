"""How a diagnosis is shown: a line per step as it is taken, then the one cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from consilium_common.console import MODE, err, out, result
from consilium_common.diagnosis.steps import Diagnosis, DiagnosisError, Outcome, Step
from consilium_common.errors import WARNINGS_ONLY, printable

if TYPE_CHECKING:
    from rich.text import Text

_MARKS: Final = {
    Outcome.OK: ("✓", "green"),
    Outcome.WARNING: ("!", "yellow"),
    Outcome.FAILED: ("✗", "bold red"),
    Outcome.SKIPPED: ("–", "dim"),
}


def live() -> Callable[[Step], None]:
    """Return what prints a step at once: on stdout for people, on stderr beside ``--json``."""
    console = err() if MODE.json else out()

    def show(step: Step) -> None:
        console.print(line_of(step))

    return show


def line_of(step: Step) -> Text:
    """Return a step's line for people: what happened, what was tried, what to do."""
    from rich.text import Text

    mark, style = _MARKS[step.outcome]
    line = Text.assemble(
        (mark, style),
        f" {step.name}: {printable(step.happened)}",
        (f" ({step.tried})", "dim"),
    )
    # What to do about the cause stands in the error that follows.
    if step.todo and step.outcome is not Outcome.FAILED:
        line.append(f"\n    to do: {printable(step.todo)}")
    return line


def conclude(diagnosis: Diagnosis, data: dict[str, Any]) -> None:
    """End a doctor's command: its result, or its cause.

    Parameters
    ----------
    data : dict
        What stands in the result beside the steps.

    Raises
    ------
    DiagnosisError
        When a step failed.
    typer.Exit
        Status 10 when nothing failed and something wants a look.
    """
    import typer

    cause = diagnosis.cause
    if cause is not None and cause.error is not None:
        left = [step.name for step in diagnosis.steps[diagnosis.steps.index(cause) + 1 :]]
        if left:
            err().print(f"Not tried: {', '.join(left)}. Mend {cause.name} first.", style="dim")
        raise DiagnosisError(cause.error, diagnosis)
    warned = sum(step.outcome is Outcome.WARNING for step in diagnosis.steps)
    said = f"Nothing failed; {warned} of the lines above want a look." if warned else "All is well."
    result({**data, "steps": diagnosis.to_list()}, said)
    if warned:
        raise typer.Exit(WARNINGS_ONLY)
