"""A study's report as one HTML file that needs nothing else: for a browser, a phone or paper."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from consilium_common.report import curves, wording
from consilium_common.report.content import (
    Picture,
    RoundReport,
    Score,
    SiteReport,
    StudyReport,
)
from consilium_common.report.pages import page_environment, styles

__all__ = ["StudyReport", "render_study_report"]

_ALL: Final = "All sites"
#: Wider than this, relative to its height, a picture takes the whole width.
_WIDE: Final = 1.6
_FILTERS: Final = (
    wording.data_size,
    wording.duration,
    wording.epsilon,
    wording.figure,
    wording.listed,
    wording.moment,
    wording.number,
    wording.percent,
    wording.plus_minus,
    wording.plural,
    wording.score,
)


@dataclass(frozen=True)
class Tile:
    """One figure in the summary."""

    what: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class ScoreRow:
    """One site's line in a table of scores."""

    site: str
    values: tuple[float | None, ...]
    mean: float | None
    cases: int | None
    total: bool


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one metric, a line per site and a column per class."""

    metric: str
    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]

    @property
    def has_mean(self) -> bool:
        """Whether there are several classes to take a mean of."""
        return len(self.columns) > 1

    @property
    def has_cases(self) -> bool:
        """Whether any line says how many cases it stands on."""
        return any(row.cases is not None for row in self.rows)


def render_study_report(data: StudyReport) -> str:
    """Return the report as one HTML document, UTF-8, with styles and pictures inside.

    Everything that ``data`` leaves out is left out of the document. All text is escaped; the
    document's own policy forbids it to load or run anything.
    """
    environment = page_environment(filters=_FILTERS)
    return environment.get_template("study_report.html").render(**_context(data))


def _context(data: StudyReport) -> dict[str, Any]:
    tables = score_tables(data.scores)
    private = [site for site in data.sites if site.epsilon is not None]
    return {
        "report": data,
        "css": styles(),
        "heading": data.title or data.name,
        "under": _under(data),
        "status_words": _status(data),
        "broken": [
            (site.name, site.ledger.detail)
            for site in data.sites
            if site.ledger is not None and not site.ledger.verified
        ],
        "tiles": _tiles(data, tables),
        "tables": tables,
        "pictures": [_picture(picture) for picture in data.pictures],
        "charts": _charts(data),
        "epsilon_sites": [
            {"name": site.name, "epsilon": site.epsilon, "share": _share(site)} for site in private
        ],
        "agreement": _agreement(private),
        "rounds_words": _rounds_words(data),
        "figure_columns": _figure_columns(data.rounds),
        "has_round_epsilon": any(one.epsilon for one in data.rounds),
        **_columns(data.sites),
    }


def score_tables(scores: Iterable[Score]) -> list[ScoreTable]:
    """Group scores by metric; the line over all sites comes last.

    The mean of a line is that of the classes that have a value there.
    """
    by_metric: dict[str, list[Score]] = {}
    for score in scores:
        by_metric.setdefault(score.metric, []).append(score)
    tables = []
    for metric, group in by_metric.items():
        columns = tuple(dict.fromkeys(name for score in group for name in score.values))
        rows = []
        for score in sorted(group, key=lambda one: one.site == ""):
            values = tuple(_finite(score.values.get(name)) for name in columns)
            present = [value for value in values if value is not None]
            mean = sum(present) / len(present) if present else None
            rows.append(
                ScoreRow(score.site or _ALL, values, mean, score.cases, total=not score.site)
            )
        tables.append(ScoreTable(metric, columns, tuple(rows)))
    return tables


def _under(data: StudyReport) -> list[str]:
    items = [data.name] if data.title else []
    if data.ended is not None:
        items.append(wording.moment(data.ended))
    elif data.created is not None:
        items.append(wording.moment(data.created))
    if data.digest:
        items.append(f"digest {data.digest[:16]}")
    return items


def _status(data: StudyReport) -> str:
    done = wording.plural(len(data.rounds), "round")
    planned = f" of {data.rounds_planned}" if data.rounds_planned else ""
    return {
        "finished": "",
        "running": f"The study is still running: {done}{planned} so far.",
        "stopped": f"The study was stopped after {done}{planned}.",
        "failed": f"The study did not succeed: it ended after {done}{planned}.",
    }[data.status]


def _tiles(data: StudyReport, tables: list[ScoreTable]) -> list[Tile]:
    tiles = []
    if tables:
        table = tables[0]
        totals = [row for row in table.rows if row.total]
        means = [row.mean for row in (totals or table.rows) if row.mean is not None]
        if means:
            over = "mean over classes" if table.has_mean else table.columns[0]
            over += ", all sites" if totals else ", mean over sites"
            tiles.append(Tile(table.metric, wording.score(sum(means) / len(means)), over))
    if data.noisy_scores:
        last = data.noisy_scores[-1]
        of = f"after round {last.rounds_done}" if last.rounds_done else "of the starting model"
        tiles.append(Tile("Score, noised", wording.plus_minus(last.score, last.standard_error), of))
    private = [site.epsilon for site in data.sites if site.epsilon is not None]
    if private:
        worst = max(private, key=lambda one: one.pld)
        tiles.append(
            Tile(
                "ε (largest site)" if len(private) > 1 else "ε of this study",
                wording.epsilon(worst.pld),
                f"at δ = {wording.number(worst.delta)}, per patient",
            )
        )
    elif data.privacy is None and data.rounds:
        tiles.append(Tile("Privacy", "none", "no differential privacy in this study"))
    ledgers = [site.ledger for site in data.sites if site.ledger is not None]
    if ledgers:
        good = sum(ledger.verified for ledger in ledgers)
        entries = sum(ledger.entries for ledger in ledgers)
        tiles.append(
            Tile(
                "Ledgers verified",
                f"{good} of {len(ledgers)}",
                wording.plural(entries, "signed entry"),
            )
        )
    if data.rounds:
        planned = f" of {data.rounds_planned}" if data.rounds_planned else ""
        seconds = [one.seconds for one in data.rounds if one.seconds is not None]
        typical = sorted(seconds)[len(seconds) // 2] if seconds else None
        tiles.append(
            Tile(
                "Rounds",
                f"{len(data.rounds)}{planned}",
                f"{wording.duration(typical)} each (median)" if seconds else "",
            )
        )
    if data.sites:
        cohorts = [site.cohort for site in data.sites if site.cohort is not None]
        more = f"{sum(cohorts)} patients declared" if len(cohorts) == len(data.sites) else ""
        tiles.append(Tile("Sites", str(len(data.sites)), more))
    if data.started is not None and data.ended is not None:
        span = (data.ended - data.started).total_seconds()
        tiles.append(Tile("Time", wording.duration(span), "from start to end"))
    return tiles


def _rounds_words(data: StudyReport) -> str:
    missed = sum(bool(one.missed) for one in data.rounds)
    words = wording.plural(len(data.rounds), "round")
    words += f" of {data.rounds_planned} planned. " if data.rounds_planned else ". "
    words += (
        f"In {missed} of them a site was missing; the others carried the round."
        if missed
        else "Every site that was asked answered in every round."
    )
    if data.privacy is not None and not any(one.figures for one in data.rounds):
        words += " Losses and metrics of a private study stay at the sites, so there are none here."
    return words


def _columns(sites: Iterable[SiteReport]) -> dict[str, bool]:
    """Say which columns have anything in them."""
    sites = list(sites)
    private = [site.epsilon for site in sites if site.epsilon is not None]
    return {
        "has_state": any(site.state for site in sites),
        "has_cohort": any(site.cohort is not None for site in sites),
        "has_rounds": any(site.rounds is not None for site in sites),
        "has_egress": any(site.egress is not None for site in sites),
        "has_device": any(site.device for site in sites),
        "has_ledger": any(site.ledger is not None for site in sites),
        "has_prv": any(one.prv is not None for one in private),
        "has_rdp": any(one.rdp is not None for one in private),
        "has_spent": any(one.spent is not None for one in private),
        "has_budget": any(one.budget is not None for one in private),
        "has_evaluation": any(one.evaluation is not None for one in private),
    }


def _share(site: SiteReport) -> float | None:
    """Share of the budget that is spent."""
    epsilon = site.epsilon
    if epsilon is None or epsilon.spent is None or not epsilon.budget:
        return None
    return epsilon.spent / epsilon.budget


def _agreement(sites: Iterable[SiteReport]) -> str:
    """Say how the other accountants compare, as far as they were asked."""
    epsilons = [site.epsilon for site in sites if site.epsilon is not None]
    gaps = [abs(one.pld - one.prv) for one in epsilons if one.prv is not None]
    words = f"; PRV (opacus) checks it and differs by at most {max(gaps):.3f}" if gaps else ""
    if any(one.rdp is not None for one in epsilons):
        words += "; RDP bounds it from above"
    return words


def _figure_columns(rounds: Iterable[RoundReport]) -> list[tuple[str, str]]:
    """Return (figure, site) of every figure in any round, in order of appearance."""
    found = (
        (name, site) for one in rounds for name, by_site in one.figures.items() for site in by_site
    )
    return list(dict.fromkeys(found))


def _charts(data: StudyReport) -> dict[str, Any]:
    last = max([one.number for one in data.rounds] + [data.rounds_planned or 0, 1])
    charts: dict[str, Any] = {"epsilon": "", "seconds": "", "figures": []}
    timed = [(o.number, o.seconds, not o.missed) for o in data.rounds if o.seconds is not None]
    if timed:
        drawn = curves.round_times(timed, title="Seconds per round", last=last)
        charts["seconds"] = _uri(drawn, "image/svg+xml")

    spent = _by_site(data.rounds, lambda one: one.epsilon)
    if spent:
        drawn = curves.over_rounds(
            spent, title="ε of this study", limits=_budgets(data.sites), last=last
        )
        charts["epsilon"] = _uri(drawn, "image/svg+xml")

    names = dict.fromkeys(name for one in data.rounds for name in one.figures)
    for name in names:
        found = _by_site(data.rounds, lambda one, name=name: one.figures.get(name, {}))
        drawn = curves.over_rounds(
            {site or _ALL: curve for site, curve in found.items()},
            title=name[:1].upper() + name[1:],
            last=last,
        )
        charts["figures"].append((name, _uri(drawn, "image/svg+xml")))
    return charts


def _by_site(rounds: Iterable[RoundReport], of: Any) -> dict[str, curves.Curve]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for one in rounds:
        for site, value in of(one).items():
            numbers, values = found.setdefault(site, ([], []))
            numbers.append(one.number)
            values.append(value)
    return dict(found)


def _budgets(sites: Iterable[SiteReport]) -> dict[str, float]:
    """Return the budgets to draw: one line where all sites have the same."""
    budgets = {
        site.name: site.epsilon.budget
        for site in sites
        if site.epsilon is not None and site.epsilon.budget is not None
    }
    by_value: dict[float, list[str]] = {}
    for name, value in budgets.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) == 1:
        return {f"budget {wording.number(value)}": value for value in by_value}
    return {
        f"budget {wording.number(value)} ({wording.listed(names)})": value
        for value, names in by_value.items()
    }


def _picture(picture: Picture) -> dict[str, Any]:
    width, height = picture.size
    place = f"{picture.site}: " if picture.site else ""
    caption = f"{place}{picture.caption}" if picture.caption else picture.site
    return {
        "uri": _uri(picture.png, "image/png"),
        "width": width,
        "height": height,
        "wide": width > _WIDE * height,
        "caption": caption,
        "alt": caption or "Picture of a case",
    }


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
