"""Approved studies never collide midway, evaluations cost their own patients, periods end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from budget_samples import (
    COHORT,
    COST,
    DELTA,
    ROUND,
    ROUNDS,
    WHOLE,
    policy,
    refused,
    run_round,
    study,
)
from ledger_samples import KEY, charge, open_ledger, patients

from consilium_client.budget.charging import charge_round, price, require_affordable
from consilium_client.budget.policy import Policy
from consilium_client.home import SiteHome
from consilium_client.store import Decision, StudyStore
from consilium_common.ledger import entries
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study.schema import Study

TESTED = patients(8, start=100)
FIRST, SECOND = study("first"), study("second")
BOTH = epsilon_of([WHOLE, WHOLE], DELTA)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore(SiteHome.create(tmp_path / "site"))


def whole_evaluation(asked: Study) -> PrivacyEvent:
    """All released evaluations of a study as one event."""
    plan = parameters(asked)
    assert plan is not None and plan.evaluation_noise is not None
    return PrivacyEvent(1.0, plan.evaluation_noise, plan.evaluations)


def evaluate(ledger: Ledger, rules: Policy, asked: Study, number: int, **changes: Any) -> None:
    plan = parameters(asked)
    assert plan is not None
    arguments = {"event": plan.evaluation_event, "clip_norm": 0.5, **changes}
    charge_round(ledger, rules, asked, number, TESTED, purpose="evaluation", **arguments)


# Reserved for other approved studies -------------------------------------------------------------


def others(store: StudyStore) -> list[Decision]:
    return store.decisions()


def test_an_approved_study_keeps_its_share_until_it_is_declined(
    ledger: Ledger, store: StudyStore
) -> None:
    store.decide(FIRST, "approved", 20, "")
    assert price(ledger, policy(BOTH), SECOND, COHORT, others=others(store)).allowed
    found = price(ledger, policy(BOTH - 0.01), SECOND, COHORT, others=others(store))
    assert (found.code, found.reserving, found.after) == ("privacy.budget", 1, BOTH)
    assert found.before == 0.0
    store.decide(FIRST, "declined", 0, "no")
    free = price(ledger, policy(BOTH - 0.01), SECOND, COHORT, others=others(store))
    assert (free.allowed, free.reserving, free.after) == (True, 0, COST)


def test_a_study_does_not_reserve_against_itself(ledger: Ledger, store: StudyStore) -> None:
    store.decide(FIRST, "approved", 20, "")
    assert price(ledger, policy(COST), FIRST, COHORT, others=others(store)).allowed


def test_only_the_rest_of_a_running_study_is_reserved_and_nothing_of_a_finished_one(
    ledger: Ledger, store: StudyStore
) -> None:
    rules = policy(BOTH)
    store.decide(FIRST, "approved", 20, "")
    for index in range(ROUNDS):
        found = price(ledger, rules, SECOND, COHORT, others=others(store))
        # What is spent and what is reserved are the whole first study at every moment.
        assert (found.after, found.reserving) == (BOTH, 1)
        run_round(ledger, rules, index, asked=FIRST)
    found = price(ledger, rules, SECOND, COHORT, others=others(store))
    assert (found.before, found.after, found.reserving) == (COST, BOTH, 0)


def test_rounds_that_a_site_missed_are_not_reserved_for_ever(
    ledger: Ledger, store: StudyStore
) -> None:
    store.decide(FIRST, "approved", 20, "")
    run_round(ledger, policy(), ROUNDS - 1, asked=FIRST)
    assert price(ledger, policy(), SECOND, COHORT, others=others(store)).reserving == 0


def test_a_share_is_kept_for_the_study_s_own_patients_alone(
    ledger: Ledger, store: StudyStore
) -> None:
    rules = policy(BOTH - 0.01, minimal_cohort=1)
    store.decide(FIRST, "approved", 10, "", left_out=COHORT[:3])
    before_any_charge = price(ledger, rules, SECOND, COHORT, others=others(store))
    assert before_any_charge.leaves_out == set(COHORT[3:])
    run_round(ledger, rules, 0, asked=FIRST, members=COHORT[3:10])
    known = price(ledger, rules, SECOND, COHORT, others=others(store))
    assert known.leaves_out == set(COHORT[3:10])


def test_two_studies_approved_one_after_the_other_both_run_to_their_end(
    ledger: Ledger, store: StudyStore
) -> None:
    rules = policy(epsilon_of([PrivacyEvent(0.1, 2.0, 20 * 3)] * 2, DELTA), minimal_cohort=1)
    short = [
        Study.model_validate({**s.to_canonical(), "federation": {"rounds": 3}})
        for s in (FIRST, SECOND)
    ]
    past = PrivacyEvent(0.1, 2.0, 20)
    charge(ledger, event=past, members=COHORT[:1])  # this one cannot afford both
    cohorts = []
    for asked in short:
        found = price(ledger, rules, asked, COHORT, others=others(store))
        assert found.allowed
        store.decide(asked, "approved", 5, "", left_out=found.leaves_out)
        cohorts.append([p for p in COHORT if p not in found.leaves_out])
    assert [len(cohort) for cohort in cohorts] == [20, 19]
    for index in range(3):
        for asked, cohort in zip(short, cohorts, strict=True):
            run_round(ledger, rules, index, asked=asked, members=cohort)
    assert ledger.spent(DELTA).most <= rules.budget.epsilon


# Evaluations ---------------------------------------------------------------------------------


def test_evaluations_cost_the_test_patients_and_training_the_others(ledger: Ledger) -> None:
    asked = study(metrics=0.5)
    found = price(ledger, policy(), asked, COHORT, TESTED)
    cost = epsilon_of([whole_evaluation(asked)], DELTA)
    assert 0.4 < cost <= 0.5
    assert (found.patients, found.evaluated, found.evaluations_left) == (20, 8, 2)
    assert (found.study_epsilon, found.evaluation_epsilon) == (COST, cost)
    assert (found.evaluation_before, found.evaluation_after) == (0.0, cost)
    assert f"ε {cost:.2f} for 8 test patients" in found.sentence()
    none = price(ledger, policy(), study(), COHORT, TESTED)
    assert (none.evaluated, none.evaluation_epsilon) == (0, None)
    assert "No evaluation figure leaves" in none.sentence()


def test_a_charged_evaluation_is_the_study_s_own_and_counts_in_every_budget(
    ledger: Ledger,
) -> None:
    asked = study(metrics=0.5)
    exact = policy(COST)
    evaluate(ledger, exact, asked, 0)
    assert ledger.find_charge(asked.digest, 0) is None  # no round of training was charged
    found = ledger.find_charge(asked.digest, 0, "evaluation")
    assert found is not None and (found.clip_norm, found.model) == (0.5, "silo-local")
    run_round(ledger, exact, 0, asked=asked)
    evaluate(ledger, exact, asked, ROUNDS)
    spent = epsilon_of([whole_evaluation(asked)], DELTA)
    assert epsilon_of(ledger.events_of(TESTED[0]), DELTA) == spent
    again = price(ledger, exact, asked, COHORT, TESTED)
    assert (again.evaluation_before, again.evaluations_left) == (spent, 0)
    with refused("privacy.already-charged"):
        evaluate(ledger, exact, asked, 0)
    # A test patient of one study may be trained on in another: one budget.
    later = price(ledger, policy(), SECOND, TESTED, ())
    assert later.before == spent


def test_test_patients_who_would_overrun_are_left_out_too(ledger: Ledger) -> None:
    asked = study(metrics=0.5)
    charge(ledger, event=WHOLE, members=TESTED[:3])
    found = price(ledger, policy(COST), asked, COHORT, TESTED)
    assert found.allowed
    assert (found.patients, found.left_out) == (20, 0)
    assert (found.evaluated, found.evaluated_left_out) == (5, 3)
    assert found.leaves_out == set(TESTED[:3])
    with refused("privacy.budget"):
        require_affordable(ledger, policy(COST), asked, TESTED, purpose="evaluation")
    alone = price(ledger, policy(COST), asked, COHORT, TESTED[:3])
    assert (alone.allowed, alone.code) == (False, "privacy.no-test-patients")


def test_figures_leave_only_within_their_share(ledger: Ledger) -> None:
    asked = study(metrics=0.5)
    assert price(ledger, policy(private_metrics_epsilon=0.5), asked, COHORT, TESTED).allowed
    for cap in (None, 0.3):
        found = price(ledger, policy(private_metrics_epsilon=cap), asked, COHORT, TESTED)
        assert found.code == "privacy.metrics-refused"
        with refused("privacy.metrics-refused"):
            evaluate(ledger, policy(private_metrics_epsilon=cap), asked, 0)
    assert ledger.state.charges == {}


@pytest.mark.parametrize(
    ("changes", "number", "code"),
    [
        ({"clip_norm": 1.0}, 0, "privacy.mechanism-differs"),
        ({"event": ROUND}, 0, "privacy.mechanism-differs"),
        ({}, 3, "privacy.round-unknown"),
        ({}, -1, "privacy.round-unknown"),
    ],
)
def test_an_evaluation_other_than_the_study_s_is_not_charged(
    ledger: Ledger, changes: dict[str, Any], number: int, code: str
) -> None:
    with refused(code):
        evaluate(ledger, policy(), study(metrics=0.5), number, **changes)
    assert ledger.state.charges == {}


def test_a_study_that_releases_no_figures_has_no_evaluation_to_charge(ledger: Ledger) -> None:
    with refused("privacy.nothing-to-charge"):
        evaluate(ledger, policy(), study(), 0, event=PrivacyEvent(1.0, 4.0, 1))


def test_few_test_patients_are_no_reason_to_refuse_an_evaluation(ledger: Ledger) -> None:
    rules = policy(minimal_cohort=20)
    assert price(ledger, rules, study(metrics=0.5), COHORT, TESTED[:1]).allowed
    evaluate(ledger, rules, study(metrics=0.5), 0)


# Periods ---------------------------------------------------------------------------------------


def charge_at(
    path: Path, when: dt.datetime, monkeypatch: pytest.MonkeyPatch, *, digest: str = "a" * 64
) -> None:
    """Charge a whole study's cost with the site's clock at another time."""

    class Clock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return when

    with monkeypatch.context() as patch:
        patch.setattr(entries.dt, "datetime", Clock)
        with Ledger.open(path, KEY, site="north") as ledger:
            charge(ledger, study=digest, event=WHOLE, members=COHORT)


@pytest.mark.parametrize(("days", "counts"), [(99, True), (101, False)])
def test_charges_older_than_the_period_no_longer_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, counts: bool
) -> None:
    path = tmp_path / "old.db"
    charge_at(path, dt.datetime.now(dt.UTC) - dt.timedelta(days=days), monkeypatch)
    rules = policy(COST, period_days=100)
    with open_ledger(path) as ledger:
        found = price(ledger, rules, SECOND, COHORT)
        assert found.allowed is not counts
        assert found.before == (COST if counts else 0.0)
        assert "in any 100 days" in found.sentence()
        assert price(ledger, policy(COST), SECOND, COHORT).code == "privacy.budget"
        if counts:
            with refused("privacy.budget"):
                run_round(ledger, rules, 0, asked=SECOND)
        else:
            run_round(ledger, rules, 0, asked=SECOND)


def test_the_cap_of_one_study_counts_its_charges_of_all_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.db"
    when = dt.datetime.now(dt.UTC) - dt.timedelta(days=200)
    charge_at(path, when, monkeypatch, digest=FIRST.digest)
    with open_ledger(path) as ledger:
        rules = policy(20.0, period_days=100, per_study_epsilon=COST)
        found = price(ledger, rules, FIRST, COHORT)
        assert found.before == 0.0
        assert found.code == "privacy.budget"  # round 0 was charged with the whole's cost
