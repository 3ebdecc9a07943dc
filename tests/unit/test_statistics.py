"""A study that asks for statistics: what it may ask, says and costs, and what an auditor sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from audit_samples import Site, consilium
from ledger_samples import charge, small_ledger
from pydantic import ValidationError
from statistics_samples import EVERYTHING, counting_study
from study_samples import TEXT

from consilium_common.audit.planning import plan_study
from consilium_common.ledger.spend import spend
from consilium_common.privacy.accounting import calibrate, epsilon_of, parameters
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study import Study
from consilium_common.study.check import check
from consilium_common.study.cost import cost
from consilium_common.study.load import parse_study, study_from_canonical
from consilium_common.study.plan import describe
from consilium_common.study.statistics import tables

ASKED = TEXT + "statistics:\n  epsilon: 0.5\n  of: [classes, intensity, spacing, size]\n"
DECLARED = parse_study(ASKED, "test")


def problem(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Study.model_validate({**counting_study().to_canonical(), **changes})
    return str(caught.value.errors()[0]["msg"])


def test_statistics_are_part_of_a_studys_identity_and_survive_the_wire() -> None:
    assert DECLARED.digest != parse_study(TEXT, "test").digest
    assert study_from_canonical(DECLARED.to_canonical()) == DECLARED


def test_what_cannot_be_a_private_query_over_public_bins_is_refused() -> None:
    plain = counting_study().to_canonical()
    assert "a study with privacy" in problem(privacy={"mode": "none"})
    bins = {**plain["preprocessing"], "intensity": {"kind": "none"}}
    assert "bins must be public" in problem(preprocessing=bins)
    unknown = {**plain["preprocessing"], "spacing": None}
    assert "how large their pixels are" in problem(preprocessing=unknown)
    assert "a name twice" in problem(statistics={"epsilon": 1.0, "of": ["size", "size"]})
    for wrong in ({"epsilon": 1.0, "of": []}, {"epsilon": 0.0, "of": ["size"]}, {"of": ["size"]}):
        problem(statistics=wrong)


@pytest.mark.parametrize("of", [["classes"], ["spacing"], EVERYTHING])
def test_the_noise_is_calibrated_for_as_many_tables_as_are_released(of: list[str]) -> None:
    study = counting_study(of)
    plan = parameters(study)
    assert plan is not None
    assert plan.statistics_tables == len(tables(study))
    assert plan.statistics_noise == calibrate(0.5, 1e-3, 1.0, 1)
    assert plan.statistics_deviation == plan.statistics_noise * math.sqrt(len(tables(study)))
    names = [name for table in tables(study) for name in table.figures]
    assert len(names) == len(set(names))
    for table in tables(study):
        assert len(table.edges) in (0, len(table.bins) - 1)
        assert list(table.edges) == sorted(set(table.edges))


def test_the_plan_says_what_leaves_and_that_it_composes_with_training(tmp_path: Path) -> None:
    price = cost(DECLARED)
    plan = price.privacy
    assert plan is not None
    assert price.epsilon == epsilon_of([plan.event_total], plan.delta)
    assert price.patient_epsilon == epsilon_of(plan.events_of(plan.rounds), plan.delta)
    assert price.epsilon is not None
    assert price.epsilon < price.patient_epsilon
    said = "\n".join(describe(DECLARED, price))
    numbers = sum(len(table.bins) for table in tables(DECLARED))
    assert f"Once, before the first round, {numbers} noised numbers" in said
    assert f"with training ε = {price.patient_epsilon:.3f} in all" in said
    path = tmp_path / "asked.yaml"
    path.write_text(ASKED)
    data = check(path).data
    assert [one["name"] for one in data["statistics"]] == [one.name for one in tables(DECLARED)]
    assert data["privacy"]["patient_epsilon"] == price.patient_epsilon
    without = cost(parse_study(TEXT, "test"))
    assert without.patient_epsilon == without.epsilon
    assert without.statistics_epsilon is None


def test_a_plan_for_cohorts_counts_the_statistics_too() -> None:
    # With every patient in every step ε is exact and quick.
    sampled = counting_study().privacy.model_copy(update={"sampling_rate": 1.0})
    changes: dict[str, Any] = {"privacy": sampled.model_dump()}
    asking = counting_study(**changes)
    silent = Study.model_validate({**asking.to_canonical(), "statistics": None})
    asked, without = (
        plan_study(study, [20], values=1000, budget=10.0, sites=2).rows[0]
        for study in (asking, silent)
    )
    plan = parameters(asking)
    assert plan is not None
    assert asked.epsilon == epsilon_of(plan.events_of(plan.rounds), plan.delta) > without.epsilon
    assert asked.second > without.second
    assert asked.rounds_left <= without.rounds_left


def test_a_ledger_says_how_often_patients_were_counted(tmp_path: Path) -> None:
    with small_ledger(tmp_path / "ledger.db") as ledger:
        charge(ledger, 0, purpose="statistics", event=PrivacyEvent(1.0, 6.0, 1))
        first, second = spend(ledger.state, 1e-3).studies
    assert (first.rounds, first.evaluations, first.statistics) == (1, 0, 1)
    assert (second.rounds, second.statistics) == (1, 0)
    assert first.epsilon > second.epsilon


# --- what an auditor sees ----------------------------------------------------------------------


def audited_site(*, event: PrivacyEvent | None = None, norm: float | None = None) -> Site:
    """A site that was asked for statistics before it trained, in the way its study declares."""
    plan = parameters(DECLARED)
    assert plan is not None
    assert plan.statistics_event is not None
    site = Site()
    site.policy()
    site.train(
        0,
        study=DECLARED.digest,
        purpose="statistics",
        event=event or plan.statistics_event,
        clip_norm=norm or plan.statistics_sensitivity,
    )
    for number in range(4):
        site.train(number, study=DECLARED.digest)
    return site


def report(site: Site, folder: Path, *with_cli: Any, records: bool = True) -> tuple[int, str, str]:
    evidence = site.write_evidence(folder / "evidence", (DECLARED,))
    more = ["--records", site.write_records(folder / "records.json")] if records else []
    return consilium(
        *with_cli, "--json", "audit", "report", evidence, *more, "--out", folder / "report.html"
    )


def test_an_audit_finds_the_statistics_as_declared_and_reconciled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = report(audited_site(), tmp_path, monkeypatch, capsys)
    assert status == 0, err + out
    page = (tmp_path / "report.html").read_text()
    assert "charged as its document declares" in page
    assert '<td data-label="For">statistics</td>' in page
    assert '<td data-label="Statistics" class="n">1</td>' in page


@pytest.mark.parametrize(
    "wrong",
    [{"event": PrivacyEvent(1.0, 3.0, 1)}, {"norm": 1.0}],
    ids=["less noise", "another bound"],
)
def test_statistics_charged_otherwise_than_declared_are_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: dict[str, Any],
) -> None:
    report(audited_site(**wrong), tmp_path, monkeypatch, capsys)
    page = (tmp_path / "report.html").read_text()
    assert "not charged as its document declares" in page


def test_statistics_that_arrived_without_a_release_are_a_serious_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = audited_site()
    site.received.append(
        {
            "study": DECLARED.digest,
            "purpose": "statistics",
            "round": 0,
            "sha256": "f" * 64,
            "bytes": 30,
            "time": site.entries[-1].time,
        }
    )
    report(site, tmp_path, monkeypatch, capsys)
    page = (tmp_path / "report.html").read_text()
    assert '<span class="badge bad">serious</span> The aggregator received statistics of' in page
