"""One page that needs nothing else, from verified evidence alone, with no patient in it."""

from __future__ import annotations

import functools
import html.parser
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from audit_samples import EVALUATION, STUDY, TRAINING, Site, consilium, sample_site, sha
from ledger_samples import KEY, open_ledger, patients

from consilium_common.audit.documents import read_records
from consilium_common.audit.ends import NotCompared
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.privacy_report import AuditReport, audit_report
from consilium_common.audit.report_page import rate, render, write_report
from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import public_pem
from consilium_common.privacy.accounting import cross_check, epsilon_of
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.privacy.tradeoff import true_positive_bound
from consilium_common.study.schema import PublicStart

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_site().write_evidence(tmp_path_factory.mktemp("audit") / "evidence")


@pytest.fixture(scope="module")
def report(folder: Path) -> AuditReport:
    records = sample_site().write_records(folder.parent / "records.json")
    return audit_report(open_evidence(folder), records=read_records(records))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return functools.partial(consilium, monkeypatch, capsys)


class Page(html.parser.HTMLParser):
    """What a page refers to, its text, and whether its elements nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [v or "" for name, v in attrs if name in ("src", "href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_figure_is_that_of_the_recorded_events(report: AuditReport) -> None:
    worst = (PrivacyEvent(0.2, 2.0, 30), PrivacyEvent(0.25, 1.5, 20))
    data = report.to_dict()
    assert data["ledger"]["worst_patient"] == cross_check(worst, 1e-3).to_dict()
    assert data["spend"]["epsilon"]["most"] == epsilon_of(worst, 1e-3)
    assert data["spend"]["epsilon"]["least"] == epsilon_of([EVALUATION] * 2, 1e-3)
    assert sum(part["patients"] for part in data["spend"]["histogram"]) == 67
    assert data["budget"] == 10.0
    points = [point["true_positive_rate"] for point in data["attacker"]]
    assert points == [
        point.true_positive_rate for point in true_positive_bound(worst, [0.001, 0.01, 0.1])
    ]
    bounds = {b["prior"]: b["bound"] for b in data["reconstruction"]["bounds"]}
    assert bounds[0.01] == points[1]
    study, other = data["studies"]
    assert (study["name"], study["title"], other["name"]) == ("tiny", "A tiny study", "")
    assert (study["as_declared"], other["as_declared"]) == (True, None)
    assert {(m["purpose"], m["steps"]) for m in study["mechanisms"]} == {
        ("training", 4 * TRAINING.steps),
        ("evaluation", 2),
    }
    assert data["reconciliation"]["differences"] == []
    assert data["reconciliation"]["released"] == data["reconciliation"]["received"] == 9
    assert list(data["threat_models"]) == ["silo-local"]
    assert json.loads(json.dumps(data)) == data


def test_spend_over_time_grows_to_what_is_spent_now(report: AuditReport) -> None:
    values = [epsilon for _, epsilon in report.timeline]
    assert len(values) == 9
    assert values == sorted(values)
    assert report.spend is not None
    assert values[-1] == report.spend.most
    assert values[0] == epsilon_of([EVALUATION], 1e-3)
    times = [time for time, _ in report.timeline]
    assert times == sorted(times)


def test_the_page_is_one_file_without_network_or_script(report: AuditReport) -> None:
    page = Page(render(report))
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "form", "base"}
    assert "default-src 'none'" in render(report)
    assert "@media print" in page.words
    assert "url(" not in page.words
    for must in (
        *("PLD", "PRV", "RDP", "dp-accounting", "silo-local", "add or remove one patient"),
        *("False alarms", "NIST SP 800-226", "does not cover", "What left, against the ledger"),
        *(STUDY.digest, report.ledger.key, str(report.ledger.head)),
    ):
        assert must in page.words, must


def test_what_was_not_compared_is_said_on_the_page_and_at_the_terminal(
    report: AuditReport,
) -> None:
    end = report.written_at
    left = NotCompared("received", 3, end, end, end)
    told = replace(report.reconciliation, not_compared=(left,))
    for said in (
        Page(render(replace(report, reconciliation=told))).words,
        replace(report, reconciliation=told).summary(Path("out.html")),
    ):
        assert "3 things that the aggregator received" in said
        assert "ewer evidence" in said
    assert "not compared" not in Page(render(report)).words


def test_a_planted_patient_never_appears(report: AuditReport, folder: Path) -> None:
    text = render(report) + json.dumps(report.to_dict())
    ledger = (folder / "ledger.jsonl").read_text()
    planted = [*patients(40), *patients(12, start=100)]
    assert all(patient in ledger for patient in planted)
    assert not any(patient in text for patient in planted)


def test_what_the_site_wrote_is_escaped(tmp_path: Path) -> None:
    hostile = STUDY.model_copy(update={"title": '<script>alert("x")</script>'})
    site = Site()
    site.train(0, study=hostile.digest, members=patients(3))
    folder = site.write_evidence(tmp_path / "evidence", studies=(hostile,))
    page = render(audit_report(open_evidence(folder)))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_page_says_which_public_data_a_study_began_with(tmp_path: Path) -> None:
    start = PublicStart(sha256="a" * 64, data="made-up shapes, public")
    study = STUDY.model_copy(update={"model": STUDY.model.model_copy(update={"start": start})})
    site = Site()
    site.train(0, study=study.digest, members=patients(3))
    folder = site.write_evidence(tmp_path / "evidence", studies=(study,))
    assert "made-up shapes, public" in render(audit_report(open_evidence(folder)))


@pytest.mark.parametrize(
    ("event", "purpose"),
    [
        (PrivacyEvent(0.25, 1.6, 5), "training"),
        (PrivacyEvent(0.2, 1.5, 5), "training"),
        (PrivacyEvent(0.25, 1.5, 4), "training"),
        (PrivacyEvent(1.0, 99.0, 1), "evaluation"),
    ],
)
def test_a_charge_of_another_mechanism_than_the_study_s_is_found(
    tmp_path: Path, event: PrivacyEvent, purpose: str
) -> None:
    site = Site()
    site.train(0, event=event, purpose=purpose, members=patients(3))
    report = audit_report(open_evidence(site.write_evidence(tmp_path / "evidence")))
    assert report.studies[0].as_declared is False
    assert "another mechanism than its document says" in Page(render(report)).words


def test_planted_differences_stand_on_top(tmp_path: Path) -> None:
    site = sample_site()
    site.egress.append({**site.egress[0], "sha256": sha("smuggled")})
    report = audit_report(open_evidence(site.write_evidence(tmp_path / "evidence")))
    page = Page(render(report))
    assert "1 difference that honest records never have" in page.words
    assert sha("smuggled")[:12] in page.words
    leaves = next(h for h in report.hazards if h.name.startswith("Numbers that leave"))
    assert leaves.standing == "look"


def test_a_broken_ledger_is_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(
        (folder / "ledger.jsonl").read_bytes().replace(b'"steps":5', b'"steps":4', 1)
    )
    out = tmp_path / "report.html"
    key = folder / "ledger-public.pem"
    status, said, _ = run("--json", "audit", "report", broken, "--key", key, "--out", out)
    assert status == 6
    assert json.loads(said)["error"]["code"] == "privacy.ledger-broken"
    assert not out.exists()


def test_the_command_writes_both_files_and_says_the_main_figures(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    out, data = tmp_path / "report.html", tmp_path / "report.json"
    status, said, _ = run("audit", "report", folder, "--out", out, "--json-out", data)
    assert status == 0
    assert "Most spent by any patient: ε 3." in said
    assert "0 differences" in said
    assert Page(out.read_text()).open == []
    written = json.loads(data.read_text())
    assert written["schema"] == "consilium/audit-report/v1"
    assert written["identity"]["consortium"]
    status, said, _ = run("--json", "audit", "report", folder, "--out", out.with_suffix(".txt"))
    assert (status, json.loads(said)["error"]["code"]) == (2, "usage.report")
    status, said, _ = run("--json", "audit", "report", folder / "ledger.jsonl", "--out", out)
    assert (status, json.loads(said)["error"]["code"]) == (2, "usage.keys")


def test_a_bare_ledger_without_charges_is_reported_as_such(tmp_path: Path) -> None:
    open_ledger(tmp_path / "ledger.db").close()
    (tmp_path / "key.pem").write_bytes(public_pem(KEY.public_key()))
    evidence = open_evidence(tmp_path / "ledger.db", key=tmp_path / "key.pem")
    report = audit_report(evidence)
    write_report(report, tmp_path / "report.html", tmp_path / "report.json")
    words = Page((tmp_path / "report.html").read_text()).words
    assert "Nothing was charged" in words
    assert "Only a bare public key was given" in words
    assert "not compared" in words


def test_spending_beyond_the_budget_is_said_first(tmp_path: Path) -> None:
    site = Site()
    site.policy(epsilon=0.5)
    site.train(0, members=patients(3))
    report = audit_report(open_evidence(site.write_evidence(tmp_path / "evidence")))
    assert "spent more than the budget of 0.5" in Page(render(report)).words


def test_records_of_another_site_are_refused(folder: Path, tmp_path: Path) -> None:
    records = read_records(Site(name="south").write_records(tmp_path / "south.json"))
    with pytest.raises(ConsiliumError) as caught:
        audit_report(open_evidence(folder), records=records)
    assert caught.value.code == "privacy.evidence-mismatch"


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0 %"), (1e-6, "0.0001 %"), (0.001, "0.1 %"), (0.01, "1 %"), (0.0744868, "7.5 %"),
     (0.00141, "0.15 %"), (0.2409, "24.1 %"), (1.0, "100 %")],
)  # fmt: skip
def test_rates_are_rounded_up_because_they_are_bounds(value: float, words: str) -> None:
    assert rate(value) == words
    assert float(re.sub(" %", "", words)) / 100 >= value * (1 - 1e-9)
