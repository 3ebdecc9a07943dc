"""A study as a person watches it: approvals, sites, rounds, ε, live on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from consilium_common.console import MODE, err, note
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plus_minus

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLL_SECONDS: Final = 0.5
_ENDED: Final = frozenset({"finished", "failed", "stopped"})
#: An aggregator that restarts is away for seconds; watching survives that.
_PATIENCE_SECONDS: Final = 60.0


def follow(fetch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Show the study live until it has ended; returns its last state.

    ``fetch`` returns the study as `study show --json` does; it may fail for up to a minute.
    """
    from rich.live import Live

    console = err()
    seen = (-1, -1)
    with ExitStack() as stack:
        live: Live | None = None
        if console.is_terminal and not MODE.json:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            data = _fetch_patiently(fetch)
            if live is not None:
                live.update(study_view(data), refresh=True)
            else:
                done = (len(data["rounds"]), len(data["evaluations"]))
                if done != seen:
                    seen = done
                    note(one_line(data))
            if data["state"] in _ENDED:
                return data
            time.sleep(_POLL_SECONDS)


def one_line(data: dict[str, Any]) -> str:
    """Return where a study stands in one line, for logs and pipes."""
    rounds = data["rounds"]
    line = f"{data['name']}: {data['state']}, round {len(rounds)}/{data['rounds_planned']}"
    if rounds:
        last = rounds[-1]
        line += f", {last['seconds']:.1f} s, sites {', '.join(last['sites'])}"
        if last["loss"] is not None:
            line += f", loss {last['loss']:.4f}"
        if data["epsilon"]:
            spent = ", ".join(f"{site} {value:.2f}" for site, value in data["epsilon"].items())
            line += f", ε {spent}"
        for site, why in last["dropped"].items():
            line += f"; {site} left out: {why}"
    if data["evaluation"]:
        line += f"; {evaluation_line(data['evaluation'])}"
    return line


def evaluation_line(evaluation: dict[str, Any]) -> str:
    """Return a released evaluation in one line; what noise does to it is said beside it."""
    done = evaluation["rounds_done"]
    when = f"after round {done}" if done else "the starting model"
    if "score" in evaluation:
        return (
            f"{when}: score"
            f" {plus_minus(evaluation['score'], evaluation['standard_error'])} (noise),"
            f" {len(evaluation['sites'])} sites, {evaluation['patients']} patients declared"
        )
    line = f"{when}, {evaluation['cases']} test cases:"
    for name, value in evaluation.get("dice", {}).items():
        line += f" Dice {name} {value:.3f}"
    if "mean_dice" in evaluation:
        line += f", mean {evaluation['mean_dice']:.3f}"
    if "accuracy" in evaluation:
        line += f" accuracy {evaluation['accuracy']:.3f}"
    return line


def study_view(data: dict[str, Any]) -> RenderableType:
    """Return the study as a panel of tables."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rounds = data["rounds"]
    epsilon, evaluated = data["epsilon"], data["evaluation_epsilon"]
    progress = {row["site"]: row for row in data["progress"]}
    sites = Table(
        "site", "decision", "cohort", "tested", "online", "now", "ε training", "ε tests", box=None
    )
    for approval in data["approvals"]:
        name = approval["site"]
        sites.add_row(
            name,
            approval["decision"],
            str(approval["cohort_size"]),
            str(approval["evaluation_size"]),
            "yes" if approval["online"] else "no",
            _phase(progress.get(name)),
            f"{epsilon[name]:.3f}" if epsilon.get(name) else "–",
            f"{evaluated[name]:.3f}" if evaluated.get(name) else "–",
        )
    parts: list[RenderableType] = [sites]
    parts += [
        Text(f"ALARM {alarm['site']}: {alarm['message']}", style="bold red")
        for alarm in data["alarms"]
    ]
    if data["signatures"]["needed"] > 1 or data["signatures"]["missing"]:
        parts += [Text(), Text(data["signatures"]["standing"])]
    if rounds:
        table = Table("round", "seconds", "sites", "loss", "left out", box=None)
        for row in rounds[-8:]:
            table.add_row(
                str(row["number"] + 1),
                f"{row['seconds']:.1f}",
                str(len(row["sites"])),
                "–" if row["loss"] is None else f"{row['loss']:.4f}",
                "; ".join(f"{s}: {why}" for s, why in row["dropped"].items()),
            )
        parts += [Text(), table]
    lines = [evaluation_line(row) for row in data["evaluations"] if row["figures"]]
    if lines:
        parts += [Text(), *(Text(line) for line in lines[-4:])]
    # A bar ends without a line break of its own; rows of a grid have one.
    end = Table.grid()
    end.add_row(ProgressBar(total=data["rounds_planned"], completed=len(rounds), width=60))
    end.add_row(
        Text(f"round {len(rounds)} of {data['rounds_planned']} · {data['state']} {data['reason']}")
    )
    parts += [Text(), end]
    return Panel(Group(*parts), title=f"{data['name']} · {data['digest'][:12]}", title_align="left")


def _phase(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    steps = f" {row['step']}/{row['steps']}" if row["steps"] else ""
    return f"{row['phase']}{steps}"


def _fetch_patiently(fetch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fetch()
        except ConsiliumError as error:
            if not error.code.startswith("network.") or time.monotonic() > end:
                raise
            time.sleep(_POLL_SECONDS)
