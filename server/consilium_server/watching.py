"""A study as a person watches it: approvals, sites, rounds, ε, live on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from consilium_common.console import MODE, err
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plus_minus

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLL_SECONDS: Final = 0.5
_ENDED: Final = frozenset({"finished", "failed", "stopped"})
#: So long an aggregator may be away: it restarts in seconds, a network is mended in minutes.
_PATIENCE_SECONDS: Final = 600.0


def follow(fetch: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """Show the study live until it has ended; returns its last state.

    ``fetch`` returns the study as `study show --json` does; it may fail for up to ten minutes.
    ``say`` takes lines, where there is no terminal to draw on.
    """
    from rich.live import Live

    console = err()
    seen = ""
    with ExitStack() as stack:
        live: Live | None = None
        if console.is_terminal and not MODE.json:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            data = _fetch_patiently(fetch, say if live is None else live.console.print)
            if live is not None:
                live.update(study_view(data), refresh=True)
            else:
                line = one_line(data)
                if line != seen:
                    seen = line
                    say(line)
            if data["state"] in _ENDED:
                return data
            time.sleep(_POLL_SECONDS)


def one_line(data: dict[str, Any]) -> str:
    """Return where a study stands in one line, for logs and pipes."""
    rounds = data["rounds"]
    line = f"{data['name']}: {data['state']}"
    if data["state"] == "queued":
        line += f", {_queued(data)}"
    elif data["state"] == "paused":
        line += f": {data['reason']}"
    line += f", round {len(rounds)}/{data['rounds_planned']}"
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
    now = {row["site"]: row for row in data["standing"]["sites"]}
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
            _phase(now.get(name)),
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
    end.add_row(Text(f"round {len(rounds)} of {data['rounds_planned']} · {_where(data)}"))
    parts += [Text(), end]
    return Panel(Group(*parts), title=f"{data['name']} · {data['digest'][:12]}", title_align="left")


def log_view(data: dict[str, Any]) -> RenderableType:
    """Return a study's history and rounds as one table, in the order of time."""
    from rich.table import Table

    rows = [
        (one["at"], _change_words(one["from"], one["to"]), one["who"], one["why"])
        for one in data["history"]
    ]
    for one in data["rounds"]:
        left_out = "; ".join(f"{site} left out: {why}" for site, why in one["dropped"].items())
        said = f"{one['seconds']:.1f} s, {', '.join(one['sites'])}"
        rows.append(
            (
                one["ended_at"],
                f"round {one['number'] + 1}",
                "",
                "; ".join(filter(None, (said, left_out))),
            )
        )
    table = Table("when", "what", "who", "why", box=None)
    for row in sorted(rows, key=lambda one: one[0]):
        table.add_row(row[0][:19].replace("T", " "), *row[1:])
    return table


def round_view(data: dict[str, Any]) -> RenderableType:
    """Return each site's part in one round as a table."""
    from rich.table import Table

    table = Table(
        "site", "outcome", "seconds", "norm", "cosine", "clipped", "staleness", "why", box=None
    )
    for part in data["parts"]:
        table.add_row(
            part["site"],
            part["outcome"],
            *(
                "–" if part[key] is None else f"{part[key]:.4g}"
                for key in ("seconds", "norm", "cosine")
            ),
            "yes" if part["clipped"] else "",
            str(part["staleness"] or ""),
            part["why"],
        )
    return table


def _change_words(before: str | None, after: str) -> str:
    return f"{before} → {after}" if before and before != after else after


def _queued(data: dict[str, Any]) -> str:
    waits = data["waits_for"] or "starts in a moment"
    # Whoever leaves the queue in this moment has no place in it any more.
    return f"place {data['place']}: {waits}" if data["place"] else waits


def _where(data: dict[str, Any]) -> str:
    words = [data["state"]]
    if data["state"] == "queued":
        words.append(_queued(data))
    elif data["reason"]:
        words.append(data["reason"])
    if data["pause_asked"]:
        words.append("pauses after this round")
    if data["standing"]["waits_for"]:
        words.append(f"waits for {data['standing']['waits_for']}")
    left = data["standing"]["seconds_left"]
    if left:
        words.append(f"about {_duration(left)} left")
    return " · ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _phase(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    steps = f" step {row['step']}/{row['steps']}" if row["steps"] else ""
    why = f": {row['why']}" if row["why"] else ""
    return f"{row['state']}{steps}{why}"


def _fetch_patiently(
    fetch: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    end = time.monotonic() + _PATIENCE_SECONDS
    lost = False
    while True:
        try:
            data = fetch()
        except ConsiliumError as error:
            # What is overloaded says so, too; what is refused for good is not asked again.
            if not error.code.startswith("network.") or time.monotonic() > end:
                raise
            if not lost:
                lost = True
                say(f"the connection is lost, the study goes on; trying again ({error.message})")
            time.sleep(_POLL_SECONDS)
        else:
            if lost:
                say("connected again")
            return data
