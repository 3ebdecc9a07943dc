"""Two studies side by side: what differs in their documents, and what came of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.study.comparison import differences
from consilium_server.watching import evaluation_line

if TYPE_CHECKING:
    from rich.console import Console


def side_by_side(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the comparison of two studies as `study show` gives them.

    Raises
    ------
    ConsiliumError
        ``study.release`` for a study of another release.
    """
    found = differences(_study(first), _study(second))
    return {
        "studies": [_outcome(first), _outcome(second)],
        "differences": [one.to_dict() for one in found],
    }


def print_comparison(data: dict[str, Any], console: Console) -> None:
    """Print the comparison for people."""
    from rich.table import Table

    first, second = data["studies"]
    table = Table("", *(f"{one['name']} · {one['digest'][:12]}" for one in (first, second)))
    for key, what in (
        ("state", "state"),
        ("rounds", "rounds done"),
        ("seconds_per_round", "seconds per round"),
        ("left_out", "updates left out"),
        ("loss", "last loss"),
        ("evaluation", "evaluation"),
    ):
        table.add_row(what, *(_shown(one[key]) for one in (first, second)))
    for kind, what in (("epsilon", "ε training"), ("evaluation_epsilon", "ε tests")):
        for site in sorted({*first[kind], *second[kind]}):
            values = (one[kind].get(site) for one in (first, second))
            table.add_row(f"{what}, {site}", *(_shown(value) for value in values))
    console.print(table)
    if not data["differences"]:
        console.print("Their documents are one.")
        return
    documents = Table("key", "first", "second")
    for row in data["differences"]:
        documents.add_row(row["key"], row["was"] or "–", row["is"] or "–")
    console.print(documents)


def _study(shown: dict[str, Any]) -> Study:
    try:
        return Study.model_validate(shown["study"])
    except ValidationError as error:
        raise ConsiliumError(
            "study.release",
            f"The study {shown['name']} is of another release and cannot be read by this one.",
            hint="Compare its figures with `consilium study show`.",
        ) from error


def _outcome(shown: dict[str, Any]) -> dict[str, Any]:
    rounds = shown["rounds"]
    return {
        "name": shown["name"],
        "digest": shown["digest"],
        "state": shown["state"],
        "rounds": len(rounds),
        "seconds_per_round": (
            round(sum(one["seconds"] for one in rounds) / len(rounds), 3) if rounds else None
        ),
        "left_out": sum(len(one["dropped"]) for one in rounds),
        "loss": rounds[-1]["loss"] if rounds else None,
        "evaluation": evaluation_line(shown["evaluation"]) if shown["evaluation"] else None,
        "epsilon": shown["epsilon"],
        "evaluation_epsilon": shown["evaluation_epsilon"],
    }


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
