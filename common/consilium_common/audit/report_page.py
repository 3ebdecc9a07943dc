"""The audit as one HTML page that needs nothing else: no network, no script; prints on A4."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Final

from consilium_common.audit import drawings
from consilium_common.audit.hazards import NOT_COVERED, WORDS
from consilium_common.audit.ledger_report import witness_words
from consilium_common.audit.privacy_report import AuditReport
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.privacy.reconstruction import ASSUMPTIONS
from consilium_common.report import wording
from consilium_common.report.pages import page_environment, styles
from consilium_common.report.study_report import Tile

_TEMPLATES: Final = Path(__file__).parent / "templates"
_BADGES: Final = {"met": "good", "partly": "warn", "look": "bad", "outside": "plain"}


def render(report: AuditReport) -> str:
    """Return the page, UTF-8, with its styles and pictures inside; all text is escaped."""
    named = (wording.epsilon, wording.number, wording.moment, wording.plural, wording.data_size)
    environment = page_environment(_TEMPLATES, filters=(*named, rate))
    ledger = report.ledger
    return environment.get_template("audit_report.html").render(
        report=report,
        ledger=ledger,
        css=styles(),
        more_css=styles(_TEMPLATES / "audit_report.css"),
        tiles=_tiles(report),
        charts=_charts(report),
        witness=witness_words(ledger.witnessed, ledger.entries, checked=ledger.witness_checked),
        badges=_BADGES,
        words=WORDS,
        assumptions=ASSUMPTIONS,
        not_covered=NOT_COVERED,
        banners=_banners(report),
    )


def write_report(report: AuditReport, out: Path, json_out: Path | None = None) -> None:
    """Write the report as one HTML file, and as JSON where a place is given.

    Raises
    ------
    ConsiliumError
        ``usage.report`` for another file name than ``.html`` (``.json``); ``state.disk``.
    """
    for path, suffix in ((out, ".html"), (json_out, ".json")):
        if path is not None and path.suffix != suffix:
            raise ConsiliumError(
                "usage.report",
                f"This file must end in {suffix}.",
                where=str(path),
                hint="Rename the output.",
            )
    write_atomic(out, render(report).encode())
    if json_out is not None:
        text = json.dumps(report.to_dict(), ensure_ascii=False, indent=2)
        write_atomic(json_out, text.encode() + b"\n")


def rate(value: float) -> str:
    """Write a rate as a percentage, rounded up: it is a bound. Small ones keep two digits."""
    scaled = 100 * value
    if scaled >= 1 or scaled <= 0:
        return wording.percent(value).replace(".0 %", " %")
    step = float(10 ** (math.floor(math.log10(scaled)) - 1))
    # The small term forgives the last bits of a float, as in the other wordings.
    return f"{math.ceil(scaled / step - 1e-6) * step:.2g} %"


def _tiles(report: AuditReport) -> list[Tile]:
    ledger, check, found = report.ledger, report.ledger.worst, report.reconciliation
    tiles = []
    if check is not None:
        of = "no budget recorded" if report.budget is None else f"of a budget of {report.budget:g}"
        delta = wording.number(check.delta)
        tiles.append(Tile("Most spent", f"ε {wording.epsilon(check.pld)}", f"{of}, δ = {delta}"))
        point = report.points[1]
        alarms = f"of patients, at {rate(point.false_positive_rate)} false alarms"
        tiles.append(Tile("Recognised", f"≤ {rate(point.true_positive_rate)}", alarms))
    studies = wording.plural(len(report.studies), "study")
    tiles.append(Tile("Patients charged", str(ledger.patients), f"by {studies}"))
    tiles.append(Tile("Ledger", "verified", wording.plural(ledger.entries, "signed entry")))
    checked = "signatures checked" if ledger.witness_checked else "signatures not checked"
    tiles.append(Tile("Attested entries", f"{ledger.witnessed} of {ledger.entries}", checked))
    if found.stored is None and found.received is None and found.receipted is None:
        tiles.append(Tile("Egress and ledger", "not compared", "no list was handed over"))
    else:
        count = wording.plural(len(found.differences), "difference")
        words = "differ" if found.differences else "agree"
        more = f"{count}, {len(found.serious)} serious" if found.differences else "no difference"
        tiles.append(Tile("Egress and ledger", words, more))
    return tiles


def _charts(report: AuditReport) -> dict[str, str]:
    if report.spend is None:
        return {}
    return {
        "time": _uri(drawings.spend_over_time(report.timeline, budget=report.budget)),
        "patients": _uri(drawings.patients_by_spend(report.spend.histogram, budget=report.budget)),
        "trade_off": _uri(drawings.trade_off({"at most": report.curve})),
    }


def _banners(report: AuditReport) -> list[tuple[str, str]]:
    """Return what every reader must see first: its class, and the sentence."""
    found = []
    worst = report.ledger.worst
    serious = len(report.reconciliation.serious)
    if serious:
        found.append(
            (
                "bad",
                f"{wording.plural(serious, 'difference')} that honest records never have: see "
                "“What left, against the ledger”.",
            )
        )
    if report.budget is not None and worst is not None and worst.pld > report.budget:
        found.append(("bad", f"A patient has spent more than the budget of {report.budget:g}."))
    checks = [study.cost.epsilon for study in report.studies] + ([worst] if worst else [])
    if not all(check.ok for check in checks):
        found.append(("bad", "The accountants contradict each other: see ε by three accountants."))
    if any(study.as_declared is False for study in report.studies):
        found.append(("bad", "A study was charged for another mechanism than its document says."))
    if not report.identity.consortium:
        found.append(("", "Only a bare public key was given: whose it is, this report cannot say."))
    return found


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
