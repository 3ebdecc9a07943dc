"""A site's policy approves within its bounds and never beyond; what it approves is signed."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from budget_samples import policy, refused
from hospital_samples import hospital_with
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import NAME, JoinedSite
from test_reviewing import asked
from typer.testing import CliRunner

from consilium_client import autoapproval, deciding, proposals, reviewing
from consilium_client.autoapproval import (
    Watch,
    approve_automatically,
    automatic_refusal,
    public_refusal,
)
from consilium_client.budget.policy import Policy, default_policy_text, parse_policy
from consilium_client.budget.policy_automatic import DAYS, Asked, AutomaticApproval
from consilium_client.cli import app
from consilium_client.deciding import approve, decline
from consilium_client.identity import SiteIdentity
from consilium_client.proposals import Proposal
from consilium_client.reviewing import review
from consilium_client.store import StudyStore
from consilium_client.worker import _named, _Study
from consilium_common.console import MODE
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.study import Study
from consilium_common.wire.methods import SITE_DECIDE

RULE: dict[str, Any] = {
    "operators": ["op"],
    "tasks": ["segmentation"],
    "epsilon_per_study": 6.0,
    "hours": "20:00-06:00",
    "gpu_share": 0.5,
}
TASKS: list[Literal["segmentation", "classification"]] = ["segmentation", "classification"]
NIGHT = dt.datetime(2026, 3, 2, 23, 30)  # a Monday
DAY = dt.datetime(2026, 3, 2, 12, 0)


def ruled(**changes: Any) -> Policy:
    return policy(minimal_cohort=2, approve_automatically={**RULE, **changes})


# --- the bounds ------------------------------------------------------------------------------

_MINUTES = st.integers(0, 24 * 60 - 1)


def clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


@st.composite
def rules(draw: st.DrawFn) -> AutomaticApproval:
    begin, end = draw(st.lists(_MINUTES, min_size=2, max_size=2, unique=True))
    return AutomaticApproval(
        operators=sorted(draw(st.sets(st.sampled_from(["op", "al", "bo"]), min_size=1))),
        tasks=sorted(draw(st.sets(st.sampled_from(TASKS), min_size=1))),
        epsilon_per_study=draw(st.floats(0.01, 10)),
        hours=draw(st.none() | st.just(f"{clock(begin)}-{clock(end)}")),
        days=draw(st.none() | st.lists(st.sampled_from(DAYS), min_size=1, unique=True)),
        gpu_share=draw(st.floats(0.01, 1)),
    )


_EPSILON = st.none() | st.floats(0, 12) | st.just(float("nan")) | st.just(float("inf"))


def within_hours(hours: str, moment: dt.datetime) -> dt.date | None:
    """The day on which the hours that hold a moment began; by counting minutes, one after another.

    Another way than the program's, so that the two can disagree.
    """
    begin, _, end = hours.partition("-")
    for back in (0, 1):
        day = moment.date() - dt.timedelta(days=back)
        at = dt.datetime.combine(day, dt.time.fromisoformat(begin))
        stop = dt.datetime.combine(day, dt.time.fromisoformat(end))
        if stop < at:
            stop += dt.timedelta(days=1)
        if at <= moment < stop:
            return day
    return None


@settings(max_examples=150, deadline=None)
@given(
    rule=rules(),
    operator=st.sampled_from(["op", "al", "bo", "mallory", ""]),
    task=st.sampled_from(TASKS),
    epsilon=_EPSILON,
    tested=_EPSILON,
    allowed=st.booleans(),
    moment=st.datetimes(dt.datetime(2026, 1, 1), dt.datetime(2026, 2, 1)),
)
def test_what_is_approved_automatically_is_within_every_bound(
    *,
    rule: AutomaticApproval,
    operator: str,
    task: str,
    epsilon: float | None,
    tested: float | None,
    allowed: bool,
    moment: dt.datetime,
) -> None:
    rules_of_site = policy(approve_automatically=rule.model_dump())
    found: Any = SimpleNamespace(
        proposal=SimpleNamespace(
            proposed_by=operator, study=SimpleNamespace(task=SimpleNamespace(kind=task))
        ),
        price=SimpleNamespace(
            study_epsilon=epsilon,
            evaluation_epsilon=tested,
            allowed=allowed,
            reason="over the budget",
        ),
    )
    began = moment.date() if rule.hours is None else within_hours(rule.hours, moment)
    bounds = (
        allowed,
        operator in rule.operators,
        task in rule.tasks,
        epsilon is not None and epsilon <= rule.epsilon_per_study,
        tested is None or tested <= rule.epsilon_per_study,
        began is not None and (rule.days is None or DAYS[began.weekday()] in rule.days),
    )
    # Both ways: nothing beyond a bound, and no bound that nobody has stated.
    assert (automatic_refusal(rules_of_site, found, moment) == "") is all(bounds)
    assert automatic_refusal(policy(), found, moment) != ""


def test_hours_may_pass_midnight_and_belong_to_the_day_on_which_they_begin() -> None:
    rule = AutomaticApproval.model_validate({**RULE, "days": ["monday"]})
    monday = dt.datetime(2026, 3, 2)
    for hours, inside in ((19.99, False), (20, True), (29.9, True), (30, False), (4, False)):
        moment = monday + dt.timedelta(hours=hours)
        assert (rule.time_refusal(moment) == "") is inside, hours
    to_midnight = AutomaticApproval.model_validate({**RULE, "hours": "20:00-24:00"})
    assert to_midnight.time_refusal(monday + dt.timedelta(hours=23.99)) == ""
    assert to_midnight.time_refusal(monday + dt.timedelta(hours=24)) != ""


@settings(max_examples=25, deadline=None)
@given(rule=rules())
def test_a_written_rule_reads_back_exactly(rule: AutomaticApproval) -> None:
    wanted = policy(approve_automatically=rule.model_dump())
    assert parse_policy(default_policy_text(wanted)) == wanted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hours": "20-6"}, "no hours from and to"),
        ({"hours": "20:00-25:00"}, "hours"),
        ({"hours": "20:00-20:00"}, "same minute"),
        ({"epsilon_per_study": 0.0}, "epsilon_per_study"),
        ({"epsilon_per_study": float("nan")}, "epsilon_per_study"),
        ({"gpu_share": 1.5}, "gpu_share"),
        ({"gpu_share": 0.0}, "gpu_share"),
        ({"days": ["someday"]}, "days"),
        ({"operators": []}, "operators"),
        ({"operators": ["op", "op"]}, "twice"),
        ({"tasks": ["detection"]}, "tasks"),
        ({"task": ["segmentation"]}, "task"),
    ],
)
def test_a_wrong_rule_is_one_error_with_line_and_key(change: dict[str, Any], says: str) -> None:
    text = default_policy_text().replace("approve_automatically: null", "")
    lines = "".join(f"  {key}: {_yaml(value)}\n" for key, value in {**RULE, **change}.items())
    with pytest.raises(ConsiliumError, match=says) as caught:
        parse_policy(f"{text}approve_automatically:\n{lines}")
    assert caught.value.code == "privacy.policy-invalid"
    assert caught.value.where.startswith("policy.yaml:")
    assert caught.value.hint


def _yaml(value: Any) -> str:
    return ".nan" if isinstance(value, float) and math.isnan(value) else json.dumps(value)


def test_a_policy_that_approves_nothing_is_recorded_as_it_always_was() -> None:
    assert "approve_automatically" not in policy().to_canonical()
    plain = ruled().to_canonical()["approve_automatically"]
    assert plain == {**RULE, "days": None}


# --- at a site -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> JoinedSite:
    """A joined site with 24 imported patients."""
    return hospital_with(tmp_path_factory.mktemp("hospital"), 24)


class Line:
    """Stands where the connection does."""

    def __init__(self) -> None:
        self.known: list[Proposal] = []
        self.heard: list[dict[str, Any]] = []
        self.closed = 0

    def call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        assert method == SITE_DECIDE
        self.heard.append(request)
        return {}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def line(site: JoinedSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The site with a fresh ledger and no decisions, and one proposal of the named operator."""
    for path in site.home.path.glob("*.db*"):
        path.unlink()
    site.home.policy.write_text(default_policy_text(ruled()))
    found = Line()
    found.known = [Proposal(asked(), "op", "now", "proposed", None)]
    monkeypatch.setattr(SiteIdentity, "caller", lambda _: found)
    for module in (reviewing, deciding, autoapproval, proposals):
        monkeypatch.setattr(module, "proposals", lambda _: found.known)
    monkeypatch.setattr(autoapproval, "proposals_over", lambda _, __: found.known)
    yield found


def approved_by_policy(site: JoinedSite, moment: dt.datetime = NIGHT) -> None:
    approve_automatically(site.home, site.identity, asked().digest, clock=lambda: moment)


def test_an_automatic_approval_is_signed_and_names_the_ledger_s_policy(
    site: JoinedSite, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved_by_policy(site)
    (said,) = line.heard
    assert said["decision"] == "approved"
    with Ledger.open(site.home.ledger, site=NAME) as ledger:
        entries = [entry for entry in ledger.entries() if entry.kind == "policy"]
    assert entries[-1].body["policy"]["approve_automatically"] == {**RULE, "days": None}
    assert said["why"].endswith(f"ledger entry {entries[-1].head}")
    kept = StudyStore(site.home).approved(asked().digest)
    assert kept.automatic is not None
    assert (kept.automatic.operator, kept.automatic.task) == ("op", "segmentation")
    assert 0 < (kept.automatic.epsilon or 0) <= RULE["epsilon_per_study"]
    monkeypatch.setattr(MODE, "json", True)
    shown = CliRunner().invoke(app, ["studies", "--home", str(site.home.path)])
    (row,) = json.loads(shown.stdout)["data"]["studies"]
    assert (row["decision"], row["automatic"], row["why"]) == ("approved", True, said["why"])
    assert row["signatures"] == "signed by op"


def test_outside_a_bound_a_person_decides(site: JoinedSite, line: Line) -> None:
    with refused("study.not-automatic"):
        approved_by_policy(site, DAY)
    for changes, proposer in (
        ({"epsilon_per_study": 0.1}, "op"),
        ({"tasks": ["classification"]}, "op"),
        ({}, "mallory"),
    ):
        site.home.policy.write_text(default_policy_text(ruled(**changes)))
        line.known = [Proposal(asked(), proposer, "now", "proposed", None)]
        with refused("study.not-automatic"):
            approved_by_policy(site)
    plain = asked("none").to_canonical() | {"privacy": {"mode": "none"}}
    lax = policy(minimal_cohort=2, permit_non_private=True, approve_automatically=RULE)
    unprotected = Proposal(Study.model_validate(plain), "op", "now", "proposed", None)
    assert "without differential privacy" in public_refusal(lax, unprotected)
    assert line.heard == []
    assert StudyStore(site.home).decisions() == []


def test_what_a_person_decided_no_machine_replaces(site: JoinedSite, line: Line) -> None:
    decline(site.home, site.identity, "tiny", "not our question")
    with refused("study.decided"):
        approved_by_policy(site)
    found = review(site.home, site.identity, "tiny", None)
    with refused("study.decided"):  # decided while the machine was reviewing
        approve(site.home, site.identity, found, automatic=Asked("op", "segmentation", 1.0))
    assert [said["decision"] for said in line.heard] == ["declined"]
    approve(site.home, site.identity, found)  # a person may think again
    assert StudyStore(site.home).approved(asked().digest).automatic is None


def test_a_running_site_looks_at_what_is_new_and_tells_what_was_not_heard(
    site: JoinedSite, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviewed: list[str] = []
    said: list[str] = []
    now = [NIGHT]

    async def noted(_: Watch, digest: str) -> None:
        reviewed.append(digest)

    monkeypatch.setattr(Watch, "_review", noted)
    store = StudyStore(site.home)
    other = Study.model_validate({**asked().to_canonical(), "name": "other"})
    stranger = Study.model_validate({**asked().to_canonical(), "name": "stranger"})
    store.decide(other, "declined", 0, "no")
    line.known += [
        Proposal(other, "op", "now", "proposed", None),
        Proposal(stranger, "mallory", "now", "proposed", None),
    ]
    watch = Watch(site.home, site.identity, said.append, clock=lambda: now[0])

    def look() -> list[str]:
        asyncio.run(watch.look())
        found, reviewed[:] = list(reviewed), []
        return found

    now[0] = DAY
    assert look() == []
    assert [row["digest"] for row in line.heard] == [other.digest]  # told at any hour
    now[0] = NIGHT
    assert look() == [asked().digest]
    assert look() == []  # once, until the policy or an hour has changed it
    assert any("stranger" in one and "mallory" in one for one in said)
    assert len(said) == 2
    now[0] += dt.timedelta(hours=2)
    assert look() == [asked().digest]
    site.home.policy.write_text(default_policy_text(ruled(gpu_share=0.25)))
    assert look() == [asked().digest]
    site.home.policy.write_text("nonsense: [")
    assert look() == look() == []
    assert sum("nothing is approved automatically" in one for one in said) == 1
    assert line.closed == 5


def test_a_review_in_its_own_process_ends_in_one_line_whatever_happens(
    site: JoinedSite, line: Line
) -> None:
    """The process is real; without an aggregator it can only say so."""
    said: list[str] = []
    watch = Watch(site.home, site.identity, said.append, clock=lambda: NIGHT)
    asyncio.run(watch._review(asked().digest))
    (words,) = said
    assert "waits for a person" in words
    assert "network." in words
    assert line.heard == []


@pytest.mark.gpu
def test_training_takes_no_more_than_its_share_of_the_gpu() -> None:
    import torch
    from round_samples import keyed_cohort, tiny_study

    from consilium_client.training.session import TrainingSession

    session = TrainingSession(tiny_study(), keyed_cohort(), device="cuda")
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        session.take_at_most(0.05)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(whole // 10, dtype=torch.uint8, device="cuda")
        assert _named(caught.value).code == "run.out-of-memory"
    finally:
        session.take_at_most(1.0)


def test_want_of_memory_has_its_own_code_and_all_else_is_named_by_its_kind_alone() -> None:
    from torch import OutOfMemoryError

    assert _named(OutOfMemoryError("CUDA out of memory")).code == "run.out-of-memory"
    unforeseen = _named(ValueError("patient Doe"))
    assert (unforeseen.code, unforeseen.message) == ("internal.unexpected", "ValueError")


def test_the_share_of_the_gpu_comes_from_today_s_rule(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    worker = _Study.__new__(_Study)
    monkeypatch.setattr(worker, "_home", site.home, raising=False)
    session = SimpleNamespace(take_at_most=taken.append, require_model=lambda *_, **__: None)
    monkeypatch.setattr(worker, "_session", session, raising=False)

    def ends(*_: object) -> None:
        raise ConsiliumError("run.round", "")

    rounds = SimpleNamespace(train=ends)
    monkeypatch.setattr(worker, "_rounds", rounds, raising=False)
    by_policy = SimpleNamespace(automatic=Asked("op", "segmentation", 1.0))
    for decision, share in (
        (by_policy, 0.5),
        (by_policy, 0.25),
        (SimpleNamespace(automatic=None), 0.9),
    ):
        monkeypatch.setattr(worker, "_decision", decision, raising=False)
        site.home.policy.write_text(default_policy_text(ruled(gpu_share=share)))
        with refused("run.round"):
            worker.answer("train", None, None, None)  # type: ignore[arg-type]
    assert taken == [0.5, 0.25, 1.0]  # what a person approved has no bound
