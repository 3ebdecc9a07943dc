"""The contract of standard output and standard error.

People by default: results on stdout, progress and diagnostics on stderr. With ``--json`` stdout
carries exactly one envelope, ``{"status": "ok", "data": …}`` or ``{"status": "error", "error":
{code, message, where, hint}}``; everything else stays on stderr. A traceback is printed only with
``--debug``. Exit statuses are those of :data:`consilium_common.errors.EXIT_STATUS`. Where whoever
reads has gone, as `head` does, a command ends without a word, with the status that shells give it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

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
#: What a shell says of a command that SIGPIPE ended: 128 and the signal's number.
UNREAD: Final = 141


class _ToReader:
    """A stream of text that ends the command when nobody reads it any more.

    Not by the signal itself: it would also end an aggregator one of whose connections breaks.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        # Python writes out what is left as it ends: to where nothing can go wrong.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        raise SystemExit(UNREAD)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def to_reader(stream: IO[str] | None) -> Any:
    """Return a stream that ends the command, without a word, when its reader has gone.

    None, of a process without that stream, stays None.
    """
    return stream if stream is None or isinstance(stream, _ToReader) else _ToReader(stream)


def out() -> Console:
    """Return the console for results (stdout)."""
    from rich.console import Console

    # No emoji: a fingerprint may hold ":AB:", which is one.
    return Console(file=to_reader(sys.stdout), highlight=False, soft_wrap=True, emoji=False)


def err() -> Console:
    """Return the console for progress and diagnostics (stderr)."""
    from rich.console import Console

    return Console(file=to_reader(sys.stderr), highlight=False, soft_wrap=True, emoji=False)


def note(message: str) -> None:
    """Say something to the person at the terminal, on stderr."""
    err().print(message, markup=False)


def result(data: Any, people: Callable[[Console], None] | str) -> None:
    """Print a command's result: ``data`` as the JSON envelope, or ``people`` for a person."""
    if MODE.json:
        _print_envelope({"status": "ok", "data": data})
    elif isinstance(people, str):
        out().print(people, markup=False)
    else:
        people(out())


def print_error(error: ConsiliumError) -> None:
    """Print ``error`` in the current mode."""
    if MODE.json:
        _print_envelope({"status": "error", "error": error.to_dict()})
        return
    console = err()
    console.print(f"error {error.code}: ", style="bold red", end="", markup=False)
    console.print(error.message, markup=False)
    if error.where:
        console.print(f"  where: {error.where}", markup=False)
    if error.hint:
        console.print(f"  to do: {error.hint}", markup=False)


def _print_envelope(envelope: dict[str, Any]) -> None:
    stream = to_reader(sys.stdout)
    stream.write(json.dumps(envelope, ensure_ascii=False) + "\n")
    stream.flush()


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
