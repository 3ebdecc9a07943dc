"""The contract of standard output and standard error.

People by default: results on stdout, progress and diagnostics on stderr. With ``--json`` stdout
carries exactly one envelope, ``{"status": "ok", "data": …}`` or ``{"status": "error", "error":
{code, message, where, hint}}``; everything else stays on stderr. A traceback is printed only with
``--debug``. Exit statuses are those of :data:`consilium_common.errors.EXIT_STATUS`.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class OutputMode:
    """How this process talks; set once by the root command."""

    json: bool = False
    debug: bool = False


MODE = OutputMode()


def out() -> Console:
    """Return the console for results (stdout)."""
    from rich.console import Console

    # No emoji: a fingerprint may hold ":AB:", which is one.
    return Console(highlight=False, soft_wrap=True, emoji=False)


def err() -> Console:
    """Return the console for progress and diagnostics (stderr)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def note(message: str) -> None:
    """Say something to the person at the terminal, on stderr."""
    err().print(message, markup=False)


def result(data: Any, people: Callable[[Console], None] | str) -> None:
    """Print a command's result: ``data`` as the JSON envelope, or ``people`` for a person."""
    if MODE.json:
        sys.stdout.write(json.dumps({"status": "ok", "data": data}, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    elif isinstance(people, str):
        out().print(people, markup=False)
    else:
        people(out())


def print_error(error: ConsiliumError) -> None:
    """Print ``error`` in the current mode."""
    if MODE.json:
        envelope = {"status": "error", "error": error.to_dict()}
        sys.stdout.write(json.dumps(envelope, ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return
    console = err()
    console.print(f"error {error.code}: ", style="bold red", end="", markup=False)
    console.print(error.message, markup=False)
    if error.where:
        console.print(f"  where: {error.where}", markup=False)
    if error.hint:
        console.print(f"  to do: {error.hint}", markup=False)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that every error is one clear message and the documented exit status."""
    import typer

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ConsiliumError as error:
            if MODE.debug:
                traceback.print_exc()
            print_error(error)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt:
            print_error(ConsiliumError("run.interrupted", "Interrupted."))
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if MODE.debug:
                traceback.print_exc()
            # The class name alone: an unforeseen message may quote what must not be shown.
            print_error(
                ConsiliumError(
                    "internal.unexpected",
                    f"Something unforeseen happened: {type(error).__name__}.",
                    hint="Run the command again as `consilium --debug …` and report the traceback.",
                )
            )
            raise typer.Exit(1) from None

    return run
