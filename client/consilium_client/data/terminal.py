"""What the data commands share at the terminal: the option for the site's folder, and the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from consilium_common.console import err

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

Home = Annotated[
    Path,
    typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder."),
]
HERE: Final = Path("site")
#: What `site data check` and `site doctor` ask alike.
FitsStudy = Annotated[
    Path | None, typer.Option("--study", help="A study's file: do the cases fit it as well?")
]
Fix = Annotated[
    bool,
    typer.Option("--fix", help="Mend first what is safe: rights, leftovers, a damaged cache."),
]


@contextmanager
def progress_shown() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """Show a bar with rate and time left on stderr; lines said meanwhile appear above it.

    Yields
    ------
    (progress, say)
        ``progress`` is called with (what, done, total), ``say`` with a line.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")

    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = err()
    # Where nobody watches (a log, a pipe) the bar would leave nothing but an empty line.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        def say(line: str) -> None:
            bars.console.print(line, markup=False)

        yield advance, say
