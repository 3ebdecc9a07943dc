"""What the demo ends with: a table on the terminal and one report file."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.report.content import (
    Egress,
    LedgerOutcome,
    NoisyScore,
    Picture,
    PlanSection,
    PrivacyReport,
    RoundReport,
    Score,
    SiteEpsilon,
    SiteReport,
    StudyReport,
)
from consilium_common.report.study_report import render_study_report
from consilium_common.study.cost import cost
from consilium_common.study.plan import sections

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_common.demo.federation import Demo
    from consilium_common.study import Study

_PICTURES_PER_SITE: Final = 2
#: ε is composed for at most so many rounds of a curve; between them a curve is straight enough.
_CURVE_POINTS: Final = 12
_THREAT: Final = (
    "silo-local noise: protects every patient against the aggregator, the other sites and"
    " whoever receives the model"
)


@dataclass(frozen=True)
class Outcome:
    """What the demo leaves."""

    folder: Path
    report: Path
    study: dict[str, Any]  #: as `study show --json`
    results: dict[str, dict[str, Any]]  #: by site, as `site results --json`
    audits: dict[str, dict[str, Any]]  #: by site, as `audit verify --json`
    seconds: float


def conclude(demo: Demo) -> Outcome:
    """Write the demo's report, one self-contained HTML file, and sum the demo up."""
    path = demo.folder / "report.html"
    write_atomic(path, render_study_report(study_report(demo)).encode(), mode=0o644)
    seconds = time.monotonic() - demo.started
    return Outcome(demo.folder, path, demo.shown, demo.results, demo.audits, seconds)


def study_report(demo: Demo) -> StudyReport:
    """Gather what the aggregator knows and what each site reports of itself.

    In a real consortium the sites' own figures and pictures stay at the sites; the demo may put
    them side by side because all three hospitals are on this machine.
    """
    shown, study = demo.shown, demo.study
    return StudyReport(
        name=study.name,
        title=study.title,
        digest=shown["digest"],
        status=shown["state"],
        banner=(
            "A demonstration on one machine: it shows the hospitals' own figures and pictures side"
            " by side, which in a real consortium each hospital alone would see."
        ),
        plan=tuple(
            PlanSection(title=part.title, lines=part.lines) for part in sections(study, cost(study))
        ),
        rounds_planned=shown["rounds_planned"],
        started=_moment(shown["started_at"]),
        ended=_moment(shown["ended_at"]),
        created=datetime.now().astimezone(),
        sites=tuple(_site(demo, approval) for approval in shown["approvals"]),
        rounds=tuple(_rounds(study, shown["rounds"])),
        scores=tuple(score for site, data in demo.results.items() for score in _scores(site, data)),
        privacy=_privacy(study),
        noisy_scores=tuple(NoisyScore.of(row) for row in shown["evaluations"] if "score" in row),
        pictures=tuple(
            picture for site, data in demo.results.items() for picture in _pictures(site, data)
        ),
        versions={
            "consilium": __version__,
            **{name: version(name) for name in ("flwr", "torch", "monai", "dp-accounting")},
        },
    )


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """Return the demo's result for ``--json``."""
    return {
        "folder": str(outcome.folder),
        "report": str(outcome.report),
        "seconds": round(outcome.seconds, 1),
        "study": outcome.study["digest"],
        "rounds": len(outcome.study["rounds"]),
        "results": {
            site: {key: data.get(key) for key in ("mean_dice", "dice", "accuracy", "cases")}
            for site, data in outcome.results.items()
        },
        "epsilon": {site: _audited(data) for site, data in outcome.audits.items()},
    }


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print figures by site, ε and δ from the verified ledgers, and where the report is."""
    from rich.table import Table

    classes = sorted({name for data in outcome.results.values() for name in data.get("dice", {})})
    columns = [f"Dice {name}" for name in classes] or ["accuracy"]
    table = Table("site", "test cases", *columns, "ε", "δ", "ledger")
    for site, data in outcome.results.items():
        dice = data.get("dice", {})
        figures = [dice.get(name, {}).get("mean") for name in classes] or [data.get("accuracy")]
        audited = _audited(outcome.audits[site]) if site in outcome.audits else None
        table.add_row(
            site,
            str(data["cases"]),
            *("–" if value is None else f"{value:.3f}" for value in figures),
            f"{audited['epsilon']:.3f}" if audited else "none",
            f"{audited['delta']:g}" if audited else "–",
            "verified" if audited else "nothing charged",
        )
    console.print(table)
    console.print(f"report: {outcome.report}", markup=False)
    console.print(f"everything else: {outcome.folder}", markup=False)
    console.print(f"done in {outcome.seconds:.0f} s; all processes are shut down", markup=False)


def _site(demo: Demo, approval: dict[str, Any]) -> SiteReport:
    name = approval["site"]
    audit = demo.audits.get(name)
    ledger = audit["ledgers"][0] if audit else None
    participation = Counter(site for row in demo.shown["rounds"] for site in row["sites"])
    sent = demo.egress.get(name, [])
    return SiteReport(
        name=name,
        state="done" if name in demo.results else "",
        cohort=approval["cohort_size"],
        rounds=participation[name],
        epsilon=(
            _site_epsilon(
                ledger, demo.prices[name]["budget"], demo.shown["evaluation_epsilon"].get(name)
            )
            if ledger
            else None
        ),
        ledger=(
            LedgerOutcome(
                verified=ledger["verified"], entries=ledger["entries"], head=ledger["head"]
            )
            if ledger
            else None
        ),
        egress=Egress(bytes_out=sum(row["bytes"] for row in sent), messages=len(sent)),
    )


def _site_epsilon(ledger: dict[str, Any], budget: float, evaluation: float | None) -> SiteEpsilon:
    # The worst patient of the study is one it trains on: evaluating costs others, and little.
    study = ledger["studies"][0]["epsilon"]
    return SiteEpsilon(
        pld=study["epsilon"]["pld"],
        prv=study["epsilon"]["prv"],
        rdp=study["epsilon"]["rdp"],
        delta=study["delta"],
        evaluation=evaluation,
        spent=ledger["worst_patient"]["epsilon"]["pld"],
        budget=budget,
    )


def _rounds(study: Study, rows: list[dict[str, Any]]) -> list[RoundReport]:
    plan = parameters(study)
    every = max(1, -(-len(rows) // _CURVE_POINTS))
    done: Counter[str] = Counter()
    reports = []
    for index, row in enumerate(rows):
        done.update(row["sites"])
        epsilon: dict[str, float] = {}
        if plan is not None and ((index + 1) % every == 0 or index + 1 == len(rows)):
            epsilon = {
                site: epsilon_of([plan.event_of(count)], plan.delta) for site, count in done.items()
            }
        reports.append(
            RoundReport(
                number=row["number"] + 1,
                seconds=row["seconds"],
                replied=tuple(row["sites"]),
                missed=tuple(sorted(row["dropped"])),
                figures={} if row["loss"] is None else {"loss": {"": row["loss"]}},
                epsilon=epsilon,
            )
        )
    return reports


def _scores(site: str, data: dict[str, Any]) -> list[Score]:
    scores = []
    if "dice" in data:
        values = {name: row["mean"] for name, row in data["dice"].items()}
        scores.append(Score(site=site, metric="Dice", values=values, cases=data["cases"]))
    if "accuracy" in data:
        scores.append(
            Score(
                site=site,
                metric="accuracy",
                values={"all classes": data["accuracy"]},
                cases=data["cases"],
            )
        )
    return scores


def _privacy(study: Study) -> PrivacyReport | None:
    plan = parameters(study)
    if plan is None:
        return None
    return PrivacyReport(
        threat_model=_THREAT,
        sampling_rate=plan.sampling_rate,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.steps_per_round * plan.rounds,
        delta=plan.delta,
        evaluations=plan.evaluations,
        evaluation_noise=plan.evaluation_deviation,
    )


def _pictures(site: str, data: dict[str, Any]) -> list[Picture]:
    files = sorted(Path(data["folder"]).glob("case-*.png"))[:_PICTURES_PER_SITE]
    return [
        Picture(
            png=file.read_bytes(),
            site=site,
            caption="test case: contours of the label and of the prediction",
        )
        for file in files
    ]


def _audited(audit: dict[str, Any]) -> dict[str, float]:
    ledger = audit["ledgers"][0]
    if not ledger["verified"]:
        raise ConsiliumError("privacy.ledger-corrupt", "A site's ledger did not verify.")
    worst = ledger["worst_patient"]
    return {"epsilon": worst["epsilon"]["pld"], "delta": worst["delta"]}


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
