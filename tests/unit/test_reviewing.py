"""What is approved is what was priced: who is left out, what is declared, what is signed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from budget_samples import policy, refused
from data_fixtures import write_pairs
from ledger_samples import charge
from site_samples import NAME, JoinedSite, joined_site, private_study
from typer.testing import CliRunner

from consilium_client import deciding, reviewing
from consilium_client.budget.policy import Policy, default_policy_text
from consilium_client.cli import app
from consilium_client.data.manifest import load_manifest
from consilium_client.data.split import assign_splits, open_patient_key
from consilium_client.deciding import approve, decline, withdraw
from consilium_client.identity import SiteIdentity
from consilium_client.proposals import Proposal
from consilium_client.reviewing import (
    declared_evaluation_size,
    declared_size,
    review,
)
from consilium_client.store import StudyStore
from consilium_common.console import MODE
from consilium_common.identity.authority import certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study import Study
from consilium_common.wire.methods import SITE_DECIDE
from consilium_common.wire.statements import approval_statement, check_signed

#: Costs far more than anybody's budget.
RUINOUS = PrivacyEvent(1.0, 0.3, 20)
CASES = 24


def asked(release: str = "private") -> Study:
    """Return a private study of two rounds that fits the cases of :func:`write_pairs`."""
    evaluation = {"release": "private", "epsilon": 0.8} if release == "private" else {}
    plain = private_study().to_canonical()
    plain["task"]["classes"] = ["background", "liver"]
    plain["privacy"]["sampling_rate"] = 0.1
    plain["federation"]["rounds"] = 2
    plain["training"]["patch"] = [8, 8, 8]
    return Study.model_validate({**plain, "evaluation": {**plain["evaluation"], **evaluation}})


class Aggregator:
    """Stands where the connection does, and keeps what was said to it."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        self.heard.append((method, request))
        return {"digest": request["digest"], "decision": request["decision"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> JoinedSite:
    """A joined site with 24 imported patients."""
    folder = tmp_path_factory.mktemp("hospital")
    joined = joined_site(folder / "site")
    labels = ["--label", "background=0", "--label", "liver=1", "--input", "ct", "--site", NAME]
    home = ["--home", str(joined.home.path)]
    pairs = write_pairs(folder / "data", CASES)
    answer = CliRunner().invoke(app, ["data", "import", str(pairs), *labels, *home])
    assert answer.exit_code == 0, answer.output
    return joined


@pytest.fixture
def aggregator(site: JoinedSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aggregator]:
    """The site with a fresh ledger, no decisions, an easy policy, and two proposals."""
    for path in site.home.path.glob("*.db*"):
        path.unlink()
    set_policy(site, policy(minimal_cohort=2))
    heard = Aggregator()

    @contextmanager
    def caller(_: SiteIdentity) -> Iterator[Aggregator]:
        yield heard

    plain = Study.model_validate({**asked("none").to_canonical(), "name": "quiet"})
    known = [Proposal(study, "op", "now", "proposed", None) for study in (asked(), plain)]
    monkeypatch.setattr(SiteIdentity, "caller", caller)
    for module in (reviewing, deciding):
        monkeypatch.setattr(module, "proposals", lambda _: known)
    yield heard


def set_policy(site: JoinedSite, rules: Policy) -> None:
    site.home.policy.write_text(default_policy_text(rules))


def keys(site: JoinedSite, split: str) -> list[str]:
    """Keyed hashes of the patients of a split, counted here by the site's own rule."""
    manifest = load_manifest(site.home)
    found = assign_splits(manifest.cases, open_patient_key(site.home), manifest.site.split)
    return sorted(name for name, where in found.items() if where == split)


def test_what_is_declared_is_signed_stored_and_sent(
    site: JoinedSite, aggregator: Aggregator
) -> None:
    found = review(site.home, site.identity, "tiny", None)
    trained, tested = len(keys(site, "train")), len(keys(site, "test"))
    assert (found.patients, found.evaluated) == (trained, tested)
    assert found.cohort_size == declared_size(trained)
    assert found.evaluation_size == declared_evaluation_size(tested)
    approve(site.home, site.identity, found)
    ((method, said),) = aggregator.heard
    assert method == SITE_DECIDE
    statement = approval_statement(
        asked().digest,
        NAME,
        "approved",
        cohort_size=said["cohort_size"],
        evaluation_size=said["evaluation_size"],
        why="",
    )
    signer = certificate_pem(site.authority.issue(site.signer.public_key(), Role.SIGNER, NAME))
    check_signed(
        statement,
        said["signature"],
        signer.decode(),
        site.authority.certificate,
        name=NAME,
        role=Role.SIGNER,
    )
    kept = StudyStore(site.home).approved(asked().digest)
    assert (kept.cohort_size, kept.evaluation_size) == (
        said["cohort_size"],
        said["evaluation_size"],
    )
    assert kept.left_out == frozenset()


def test_who_would_overrun_is_left_out_for_good_and_nobody_is_named(
    site: JoinedSite, aggregator: Aggregator
) -> None:
    spent = [keys(site, "train")[0], keys(site, "test")[0]]
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        charge(ledger, event=RUINOUS, members=spent)
    found = review(site.home, site.identity, "tiny", None)
    assert (found.price.left_out, found.price.evaluated_left_out) == (1, 1)
    assert found.patients == len(keys(site, "train")) - 1
    assert found.cohort_size == declared_size(found.patients)
    approve(site.home, site.identity, found)
    assert StudyStore(site.home).approved(asked().digest).left_out == frozenset(spent)
    ((_, said),) = aggregator.heard
    assert set(said) == {
        *("digest", "decision", "cohort_size", "evaluation_size", "why", "signature"),
    }
    shown = CliRunner().invoke(app, ["review", "tiny", "--home", str(site.home.path)])
    assert shown.exit_code == 0, shown.output
    assert "1 patient would overrun and is left out" in shown.stdout
    assert not any(name in shown.output for name in spent)


def test_a_refused_study_is_not_approved(site: JoinedSite, aggregator: Aggregator) -> None:
    set_policy(site, policy(minimal_cohort=1000))
    found = review(site.home, site.identity, "tiny", None)
    assert not found.price.allowed
    with refused("privacy.cohort-too-small"):
        approve(site.home, site.identity, found)
    assert aggregator.heard == []
    assert StudyStore(site.home).decision(asked().digest) is None


def test_the_rest_of_another_approved_study_is_counted(
    site: JoinedSite, aggregator: Aggregator
) -> None:
    approve(site.home, site.identity, review(site.home, site.identity, "quiet", None))
    found = review(site.home, site.identity, "tiny", None)
    assert found.price.reserving == 1
    decline(site.home, site.identity, "quiet", "not now")
    assert review(site.home, site.identity, "tiny", None).price.reserving == 0
    assert [said["decision"] for _, said in aggregator.heard] == ["approved", "declined"]


def test_test_patients_are_declared_only_where_figures_leave(
    site: JoinedSite, aggregator: Aggregator
) -> None:
    found = review(site.home, site.identity, "quiet", None)
    assert (found.evaluated, found.evaluation_size) == (0, 0)
    with refused("usage.evaluation-size"):
        review(site.home, site.identity, "quiet", None, 5)
    home = ["--home", str(site.home.path)]
    sizes = ["--cohort-size", "12", "--evaluation-size", "4"]
    answer = CliRunner().invoke(app, ["approve", "tiny", "--yes", *sizes, *home])
    assert answer.exit_code == 0, answer.output
    assert "declaring 12 patients and 4 test patients. ε " in answer.stdout
    ((_, said),) = aggregator.heard
    assert (said["cohort_size"], said["evaluation_size"]) == (12, 4)


@pytest.mark.usefixtures("aggregator")
def test_a_review_says_all_that_a_person_must_know(site: JoinedSite) -> None:
    shown = CliRunner().invoke(app, ["review", "tiny", "--home", str(site.home.path)]).stdout
    for part in (
        f"{len(keys(site, 'train'))} training patients",
        f"of 10.00 left for {len(keys(site, 'train'))} patients.",
        "unit patient, adjacency add or remove one",
        "for ever",
        "Noised evaluation figures leave the site: ε 0.",
        "test patient",
        "Threat model silo-local",
    ):
        assert part in shown, (part, shown)


def test_a_review_says_on_which_cases_and_keeps_the_list_of_the_others_at_the_site(
    site: JoinedSite, aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = keys(site, "train")[0]
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        charge(ledger, event=RUINOUS, members=[spent])
    monkeypatch.setattr(MODE, "json", True)
    shown = CliRunner().invoke(app, ["review", "tiny", "--home", str(site.home.path)])
    data = json.loads(shown.stdout)["data"]
    trained, tested = len(keys(site, "train")), len(keys(site, "test"))
    assert data["cases"]["splits"]["train"] == {"patients": trained - 1, "cases": trained - 1}
    assert data["cases"]["splits"]["test"] == {"patients": tested, "cases": tested}
    assert list(data["cases"]["left_out"].values()) == [1]
    listing = Path(data["cases"]["left_out_list"])
    assert listing.stat().st_mode & 0o077 == 0
    (row,) = list(csv.DictReader(listing.read_text().splitlines()))
    assert "privacy budget" in row["why"]
    assert f'"{row["case_id"]}"' not in shown.stdout
    assert data["leaves"]["tensors"] > 0
    assert data["leaves"]["bytes_per_round"] > 0
    site.home.ledger.unlink()
    found = review(site.home, site.identity, "tiny", None)
    assert (found.cases.left_out, found.cases.listing, listing.exists()) == ({}, None, False)


@pytest.mark.usefixtures("aggregator")
def test_a_review_says_what_changed_since_the_version_approved_last(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert review(site.home, site.identity, "tiny", None).change is None
    approve(site.home, site.identity, review(site.home, site.identity, "tiny", None))
    changed = asked().to_canonical()
    changed["federation"]["rounds"] = 4
    newer = Study.model_validate(changed)
    known = [Proposal(study, "op", "now", "proposed", None) for study in (asked(), newer)]
    monkeypatch.setattr(reviewing, "proposals", lambda _: known)
    found = review(site.home, site.identity, newer.digest, None)
    assert found.change is not None
    assert found.change.old == asked()
    assert [one.key for one in found.change.differences] == ["federation.rounds"]
    shown = CliRunner().invoke(app, ["review", newer.digest, "--home", str(site.home.path)])
    for part in (f"Changed against tiny ({asked().digest[:12]})", "federation.rounds: 2 → 4"):
        assert part in shown.stdout, (part, shown.stdout)
    assert "ε of the whole study for a training patient" in shown.stdout
    # The changed study is another one: what was approved before permits nothing of it.
    with refused("study.not-approved"):
        StudyStore(site.home).approved(newer.digest)
    same = review(site.home, site.identity, newer.digest, None, against=newer.digest[:8])
    assert same.change is not None
    assert same.change.differences == ()
    with refused("study.unknown"):
        review(site.home, site.identity, newer.digest, None, against="nothing")


@pytest.mark.usefixtures("aggregator")
def test_the_version_approved_last_is_remembered_though_it_was_withdrawn_from(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(rounds: int) -> Study:
        plain = asked().to_canonical()
        return Study.model_validate(
            {**plain, "federation": plain["federation"] | {"rounds": rounds}}
        )

    first, second, third = (of(rounds) for rounds in (2, 3, 4))
    known = [Proposal(one, "op", "now", "proposed", None) for one in (first, second, third)]
    monkeypatch.setattr(reviewing, "proposals", lambda _: known)

    def compared() -> str:
        (topic,) = (
            line
            for line in shown(third).splitlines()
            if line.startswith(("Changed against", "No other version"))
        )
        return topic

    def shown(study: Study) -> str:
        home = ["--home", str(site.home.path)]
        return CliRunner().invoke(app, ["review", study.digest, *home]).stdout

    def approve_it(study: Study) -> None:
        approve(site.home, site.identity, review(site.home, site.identity, study.digest, None))

    assert compared().startswith("No other version")
    approve_it(first)
    withdraw(site.home, site.identity, first.digest, "an audit")
    assert first.digest[:12] in compared()
    assert shown(first).count("No other version") == 1
    approve_it(second)
    assert second.digest[:12] in compared()
    # Decided last is not approved last.
    decline(site.home, site.identity, first.digest, "no")
    assert second.digest[:12] in compared()
    approve_it(first)
    assert first.digest[:12] in compared()


@pytest.mark.usefixtures("aggregator")
def test_a_study_that_lacks_signatures_is_not_even_opened(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    approval = {"operators": ["op", "al"], "signatures": 2}
    study = Study.model_validate({**asked().to_canonical(), "approval": approval})
    one, both = (Proposal(study, "op", "now", "proposed", None, who) for who in ((), ("al",)))
    monkeypatch.setattr(reviewing, "proposals", lambda _: [one])
    with refused("study.signatures-missing"):
        review(site.home, site.identity, "tiny", None)
    monkeypatch.setattr(reviewing, "proposals", lambda _: [both])
    found = review(site.home, site.identity, "tiny", None)
    with refused("study.signatures-missing"):
        approve(site.home, site.identity, replace(found, proposal=one))
    approve(site.home, site.identity, found)


def test_declared_sizes_are_rounded_and_never_zero() -> None:
    assert [declared_size(n) for n in (0, 1, 9, 10, 14, 15)] == [1, 1, 9, 10, 10, 15]
    assert [declared_evaluation_size(n) for n in (0, 9, 10, 12, 13, 17, 18)] == [
        *(1, 9, 10, 10, 15, 15, 20),
    ]
    # The mean is off by a share of its distance from 1/2, whatever the scores are.
    for number in range(10, 200):
        assert abs(number / declared_evaluation_size(number) - 1) <= 0.2
