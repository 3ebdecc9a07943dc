"""A study's federated statistics: asked for once, summed over sites, read as shares with an error.

What a site sends is noised and charged there; everything here is arithmetic on it and on public
numbers. A site that does not answer costs nothing but its share: training goes on without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import parameters
from consilium_common.report.wording import plus_minus
from consilium_common.study import Study
from consilium_common.study.statistics import Table, tables
from consilium_server.asking import Asking, Participant, Patience, Reply
from consilium_server.registry import Registry
from consilium_server.tables import StatisticsRow, now

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger(__name__)

#: No sum of patients' shares and noise is larger: beyond, one site's number would stand for all
#: sites' statistics, or break their sum.
_LARGEST: Final = 1e12


def gather(
    study: Study,
    asking: Asking,
    registry: Registry,
    note: Callable[[str, dict[str, float]], None],
    patience: Patience,
) -> None:
    """Ask every site for the study's statistics and keep what comes; does nothing the second time.

    Sites answer a repeated question from their store, so that asking again costs no privacy. What
    nobody answered is asked again when the study is run again.

    Parameters
    ----------
    note : callable
        Called with a site's name and what it released.
    patience : callable
        Called again and again with what is waited for, while too few sites are online to begin
        the study; what it raises ends the waiting.
    """
    plan = parameters(study)
    if plan is None or plan.statistics_deviation is None:
        return
    known = registry.statistics(study.digest)
    if known is not None and known.figures:
        return
    wanted = tables(study)
    participants = asking.wait_for_quorum(patience)
    figures: dict[str, dict[str, float]] = {}

    def accept(site: Participant, reply: Reply) -> None:
        found = checked(reply.figures, wanted)
        note(site.name, found)
        figures[site.name] = found

    replies = asking.ask(participants, 0, None, "query", accept=accept)
    for site, why in replies.dropped.items():
        _log.warning("statistics of %s: %s", site, why)
    with registry.transaction() as session:
        session.merge(
            StatisticsRow(
                digest=study.digest,
                dropped=replies.dropped,
                figures=figures,
                declared={p.name: p.cohort_size for p in participants if p.name in figures},
                noise=plan.statistics_deviation,
                ended_at=now(),
            )
        )


def checked(figures: Mapping[str, float], wanted: tuple[Table, ...]) -> dict[str, float]:
    """Return a site's figures if they are one possible number for each bin of the tables.

    Raises
    ------
    ConsiliumError
        ``run.bad-figures``.
    """
    if set(figures) != {name for table in wanted for name in table.figures}:
        raise ConsiliumError(
            "run.bad-figures",
            "The reply does not hold the study's statistics and nothing else.",
            hint="Site and aggregator need the same release of consilium.",
        )
    # What is not finite is refused by the same comparison.
    if not all(abs(value) <= _LARGEST for value in figures.values()):
        raise ConsiliumError(
            "run.bad-figures",
            "A released figure is no number of patients, whatever the noise.",
            hint="Site and aggregator need the same release of consilium.",
        )
    return dict(figures)


def estimates(study: Study, row: StatisticsRow | None) -> dict[str, Any] | None:
    """Return the statistics of all sites together; None where none were gathered.

    A site releases, for each bin, weight · Σ shares of its patients + N(0, noise²). The estimate
    over sites is Σ sums / (weight · Σ declared), with the standard error
    noise · √sites / (weight · Σ declared) from the noise alone. Declared sizes are rounded down,
    so that shares read too large by as much as patients were left undeclared.

    Returns
    -------
    dict or None
        ``sites``, ``dropped``, ``patients`` (declared), ``noise`` and ``tables``: of each its
        ``name``, ``title``, ``standard_error`` and ``bins`` (``bin``, ``share``). Noise may take a
        share out of [0, 1]. Without any site there are no tables.
    """
    if row is None:
        return None
    patients = sum(row.declared.values())
    found = []
    for table in tables(study) if row.figures else ():
        scale = 1 / (table.weight * patients)
        sums = [math.fsum(of[name] for of in row.figures.values()) for name in table.figures]
        found.append(
            {
                "name": table.name,
                "title": table.title,
                "standard_error": row.noise * math.sqrt(len(row.figures)) * scale,
                "bins": [
                    {"bin": name, "share": value * scale}
                    for name, value in zip(table.bins, sums, strict=True)
                ],
            }
        )
    return {
        "sites": sorted(row.figures),
        "dropped": row.dropped,
        "patients": patients,
        "noise": row.noise,
        "tables": found,
    }


def public_view(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `study stats` says of a study, from what `study show --json` says.

    ``public`` holds what everybody knows, exact; ``statistics`` what sites released, noised (None
    where nothing was gathered); ``asked`` what the study asks for (None: nothing).
    """
    study = shown["study"]
    approved = [row for row in shown["approvals"] if row["decision"] == "approved"]
    return {
        "digest": shown["digest"],
        "name": shown["name"],
        "state": shown["state"],
        "public": {
            "cohorts": {row["site"]: row["cohort_size"] for row in approved},
            "patients": sum(row["cohort_size"] for row in approved),
            "rounds": {"done": len(shown["rounds"]), "planned": shown["rounds_planned"]},
            "inputs": study["task"]["inputs"],
            "classes": study["task"]["classes"],
        },
        "asked": study["statistics"],
        "delta": study["privacy"].get("delta"),
        "statistics": shown["statistics"],
    }


def print_view(data: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`public_view` returned, for people."""
    from rich.table import Table as Shown

    public, found = data["public"], data["statistics"]
    console.print(f"{data['name']} · {data['digest'][:12]}: {data['state']}", markup=False)
    console.print("Public, exact:", markup=False)
    facts = Shown(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    cohorts = ", ".join(f"{site} {size}" for site, size in sorted(public["cohorts"].items()))
    facts.add_row("  patients declared", f"{public['patients']} ({cohorts or 'no site yet'})")
    rounds = public["rounds"]
    facts.add_row("  rounds", f"{rounds['done']} of {rounds['planned']}")
    facts.add_row("  inputs", ", ".join(public["inputs"]))
    facts.add_row("  classes", ", ".join(public["classes"]))
    console.print(facts, markup=False)
    console.print(_said(data), markup=False)
    for table in found["tables"] if found else ():
        shown = Shown("", "share ± noise", box=None)
        for row in table["bins"]:
            shown.add_row(row["bin"], plus_minus(row["share"], table["standard_error"]))
        console.print(f"\n{table['title']}:", markup=False)
        console.print(shown, markup=False)


def _said(data: Mapping[str, Any]) -> str:
    """Say what the tables after it are, or why there are none."""
    asked, found = data["asked"], data["statistics"]
    if asked is None:
        return (
            "Nothing else left the sites. For noised statistics propose a private study with\n"
            "  statistics: {epsilon: 1.0, of: [classes, intensity, spacing, size]}"
        )
    if found is None:
        return (
            "Sites are asked for noised statistics before the first round: `consilium study run`."
        )
    said = [f"No statistics of {site}: {why}." for site, why in sorted(found["dropped"].items())]
    if not found["tables"]:
        return "\n".join([*said, "No site released statistics."])
    first = (
        f"Noised, from {', '.join(found['sites'])} ({found['patients']} patients declared): "
        f"one private query at each site, ε {asked['epsilon']:g} at δ {data['delta']:g} for each "
        "training patient (unit patient, adjacency add or remove one). ± is the standard error "
        "of the noise alone; it may take a share below 0 or above 1. Declared sizes are rounded "
        "down, so shares read a little large."
    )
    return "\n".join([first, *said])
