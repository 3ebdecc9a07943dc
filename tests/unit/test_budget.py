"""No study overruns any patient: left out at approval, refused at a round, over all studies."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import charge, open_ledger, patients

from consilium_client.budget.charging import (
    charge_round,
    price,
    require_affordable,
    require_permitted,
)
from consilium_client.budget.policy import Policy, default_policy_text, parse_policy
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.db") as opened:
        yield opened


def test_a_first_study_costs_what_it_costs_alone(ledger: Ledger) -> None:
    found = price(ledger, policy(), study(), COHORT)
    assert found.allowed
    assert found.study_epsilon == found.after == found.declared_epsilon == COST
    assert (found.before, found.remaining, found.patients) == (0.0, 10.0, 20)
    assert (found.rounds_charged, found.rounds_left) == (0, ROUNDS)
    assert "unit patient" in found.sentence()


def test_the_price_of_a_study_stays_the_same_while_its_rounds_are_charged(ledger: Ledger) -> None:
    for index in range(3):
        run_round(ledger, policy(), index, asked=study())
        found = price(ledger, policy(), study(), COHORT)
        assert found.after == found.study_epsilon == COST
        assert found.before == epsilon_of([PrivacyEvent(0.1, 2.0, 20 * (index + 1))], DELTA)
        assert (found.rounds_charged, found.rounds_left) == (index + 1, ROUNDS - index - 1)


def test_a_study_that_fits_exactly_runs_to_its_end_and_not_further(ledger: Ledger) -> None:
    exact = policy(COST)
    for index in range(ROUNDS):
        run_round(ledger, exact, index, asked=study())
    assert ledger.spent(DELTA).most == COST
    assert price(ledger, exact, study(), COHORT).remaining == 0
    with refused("privacy.already-charged"):
        run_round(ledger, exact, 0, asked=study())
    with refused("privacy.round-unknown"):
        run_round(ledger, exact, ROUNDS, asked=study())


def test_a_study_that_would_overrun_is_refused_before_its_first_round(ledger: Ledger) -> None:
    tight = policy(COST - 1e-6)
    found = price(ledger, tight, study(), COHORT)
    assert not found.allowed
    assert (found.code, found.left_out, found.patients) == ("privacy.budget", 20, 0)
    head = ledger.head
    with refused("privacy.budget"):
        require_affordable(ledger, tight, study(), COHORT)
    with refused("privacy.budget"):
        run_round(ledger, tight, 0, asked=study())
    assert ledger.state.charges == {}
    assert ledger.head.sequence == head.sequence + 1  # the policy alone


def test_budgets_hold_over_studies(ledger: Ledger) -> None:
    both = epsilon_of([WHOLE, WHOLE], DELTA)
    for index in range(ROUNDS):
        run_round(ledger, policy(both), index, asked=study("first"))
    second = price(ledger, policy(both), study("second"), COHORT)
    assert second.allowed
    assert (second.before, second.after, second.study_epsilon) == (COST, both, COST)
    assert both < 2 * COST
    with refused("privacy.budget"):
        require_affordable(ledger, policy(both - 1e-6), study("second"), COHORT)


def test_a_patient_who_would_overrun_is_left_out_and_the_others_take_part(ledger: Ledger) -> None:
    veteran = COHORT[7]
    past = PrivacyEvent(0.1, 1.0, 200)
    charge(ledger, event=past, members=[veteran])
    generous = price(ledger, policy(100.0), study(), COHORT)
    assert generous.before == epsilon_of([past], DELTA)
    assert generous.after == epsilon_of([past, WHOLE], DELTA)
    assert (generous.patients, generous.left_out) == (20, 0)

    rules = policy(generous.after - 0.01)
    found = price(ledger, rules, study(), COHORT)
    assert found.allowed
    assert (found.patients, found.left_out) == (19, 1)
    assert found.leaves_out == {veteran}
    assert (found.before, found.after) == (0.0, COST)
    assert "19 patients; 1 patient would overrun and is left out" in found.sentence()
    # At a round nobody is left out any more: who was not left out at approval must afford it.
    with refused("privacy.budget"):
        require_affordable(ledger, rules, study(), COHORT)
    require_affordable(ledger, rules, study(), [p for p in COHORT if p != veteran])


def test_a_study_for_which_too_few_remain_is_refused(ledger: Ledger) -> None:
    charge(ledger, event=PrivacyEvent(0.1, 1.0, 200), members=COHORT[:11])
    found = price(ledger, policy(COST), study(), COHORT)
    assert (found.allowed, found.code) == (False, "privacy.budget")
    assert (found.patients, found.left_out) == (9, 11)
    assert " 9 " not in found.reason and "11" not in found.reason
    assert price(ledger, policy(COST, minimal_cohort=9), study(), COHORT).allowed


@settings(max_examples=15, deadline=None)
@given(
    charged=st.lists(st.frozensets(st.integers(0, 11), min_size=1), max_size=3),
    others=st.frozensets(st.integers(0, 11), min_size=1),
)
def test_being_left_out_depends_on_one_s_own_charges_alone(
    charged: list[frozenset[int]], others: frozenset[int]
) -> None:
    people = patients(12)
    with tempfile.TemporaryDirectory() as folder, open_ledger(Path(folder) / "l.db") as ledger:
        for index, members in enumerate(charged):
            charge(ledger, index, event=WHOLE, members=[people[i] for i in sorted(members)])
        rules = policy(epsilon_of([WHOLE] * 2, DELTA), minimal_cohort=1)
        everyone = price(ledger, rules, study(), people).leaves_out
        expected = {p for i, p in enumerate(people) if sum(i in c for c in charged) > 1}
        assert everyone == expected
        some = [people[i] for i in sorted(others)]
        assert price(ledger, rules, study(), some).leaves_out == everyone & set(some)


def test_a_round_is_refused_when_another_study_spent_meanwhile(ledger: Ledger) -> None:
    rules = policy(COST + 0.5)
    run_round(ledger, rules, 0, asked=study())
    charge(ledger, event=WHOLE, members=COHORT)
    with refused("privacy.budget"):
        run_round(ledger, rules, 1, asked=study())
    assert len(ledger.state.standing(study().digest)) == 1


def test_a_voided_round_is_not_paid_for(ledger: Ledger) -> None:
    run_round(ledger, policy(COST), 0, asked=study())
    found = ledger.find_charge(study().digest, 0)
    assert found is not None
    ledger.void(found, "killed")
    assert price(ledger, policy(COST), study(), COHORT).before == 0
    run_round(ledger, policy(COST), 0, asked=study())


def test_the_policy_s_delta_counts_and_not_the_study_s(ledger: Ledger) -> None:
    found = price(ledger, policy(delta=1e-5), study(), COHORT)
    assert found.study_epsilon == epsilon_of([WHOLE], 1e-5)
    assert found.declared_epsilon == COST
    assert found.study_epsilon > found.declared_epsilon


def test_a_cap_for_one_study_holds_beside_the_budget(ledger: Ledger) -> None:
    assert price(ledger, policy(per_study_epsilon=COST), study(), COHORT).allowed
    with refused("privacy.budget"):
        require_affordable(ledger, policy(per_study_epsilon=COST - 0.01), study(), COHORT)


def test_a_study_named_by_epsilon_costs_at_most_that(ledger: Ledger) -> None:
    asked = study(noise_multiplier=None, epsilon=3.0)
    found = price(ledger, policy(3.0), asked, COHORT)
    assert found.allowed
    assert found.study_epsilon is not None
    assert 2.9 < found.study_epsilon <= 3.0


def test_a_study_without_privacy_runs_only_where_it_is_permitted(ledger: Ledger) -> None:
    asked = study(mode="none")
    with refused("privacy.non-private-refused"):
        require_affordable(ledger, policy(), asked, COHORT)
    with refused("privacy.non-private-refused"):
        require_permitted(policy(), asked, COHORT)
    found = require_affordable(ledger, policy(permit_non_private=True), asked, COHORT)
    assert (found.private, found.study_epsilon, found.after) == (False, None, None)
    assert "No differential privacy" in found.sentence()
    json.dumps(found.to_dict(), allow_nan=False)
    with refused("privacy.nothing-to-charge"):
        run_round(ledger, policy(permit_non_private=True), 0, asked=asked)


def test_exact_figures_leave_only_where_they_are_permitted(ledger: Ledger) -> None:
    asked = study(mode="none", release="exact")
    with refused("privacy.metrics-refused"):
        require_affordable(ledger, policy(permit_non_private=True), asked, COHORT)
    rules = policy(permit_non_private=True, release_exact_metrics=True)
    require_affordable(ledger, rules, asked, COHORT)


def test_a_threat_model_that_is_not_permitted_is_refused(ledger: Ledger) -> None:
    rules = policy(permitted_threat_models=[], permit_non_private=True)
    with refused("privacy.threat-model-refused"):
        require_affordable(ledger, rules, study(), COHORT)
    require_affordable(ledger, rules, study(mode="none"), COHORT)  # it has no threat model


def test_a_study_that_needs_too_few_sites_is_refused(ledger: Ledger) -> None:
    require_affordable(ledger, policy(minimal_sites=2), study(), COHORT)
    with refused("privacy.too-few-sites"):
        require_affordable(ledger, policy(minimal_sites=3), study(), COHORT)


@pytest.mark.parametrize("mode", ["none", "patient"])
def test_a_small_cohort_is_refused_without_saying_how_small(ledger: Ledger, mode: str) -> None:
    rules = policy(permit_non_private=True, minimal_cohort=10)
    asked = study(mode=mode)
    require_affordable(ledger, rules, asked, patients(10))
    with refused("privacy.cohort-too-small") as caught:
        require_affordable(ledger, rules, asked, [*patients(9), patients(1)[0]])
    assert "9" not in caught.value.message


def test_a_delta_that_promises_nothing_is_refused(ledger: Ledger) -> None:
    require_affordable(ledger, policy(delta=1e-3), study(), patients(999))
    with refused("privacy.delta-too-large"):
        require_affordable(ledger, policy(delta=1e-3), study(), patients(1000))


@pytest.mark.parametrize(
    ("event", "clip_norm"),
    [
        (PrivacyEvent(0.1, 1.0, 20), 1.0),
        (PrivacyEvent(0.2, 2.0, 20), 1.0),
        (PrivacyEvent(0.1, 2.0, 21), 1.0),
        (ROUND, 2.0),
    ],
)
def test_a_mechanism_other_than_the_study_s_is_not_charged(
    ledger: Ledger, event: PrivacyEvent, clip_norm: float
) -> None:
    with refused("privacy.mechanism-differs"):
        charge_round(ledger, policy(), study(), 0, COHORT, event=event, clip_norm=clip_norm)
    assert ledger.state.charges == {}


def test_adaptive_clipping_may_charge_any_clip_norm_and_nothing_else(ledger: Ledger) -> None:
    asked = study(clipping={"kind": "adaptive", "quantile": 0.5})
    charge_round(ledger, policy(), asked, 0, COHORT, event=ROUND, clip_norm=0.37)
    for clip_norm, event in ((0.0, ROUND), (0.37, PrivacyEvent(0.1, 1.0, 20))):
        with refused("privacy.mechanism-differs"):
            charge_round(ledger, policy(), asked, 1, COHORT, event=event, clip_norm=clip_norm)


def test_a_charge_names_its_purpose_and_threat_model(ledger: Ledger) -> None:
    run_round(ledger, policy(), 0, asked=study())
    found = ledger.find_charge(study().digest, 0)
    assert found is not None
    assert (found.purpose, found.model) == ("training", "silo-local")


def test_charging_records_the_policy_it_was_judged_by(ledger: Ledger) -> None:
    run_round(ledger, policy(), 0, asked=study())
    run_round(ledger, policy(), 1, asked=study())
    run_round(ledger, policy(9.0), 2, asked=study())
    kinds = [entry.kind for entry in ledger.entries()]
    assert kinds.count("policy") == 2
    assert ledger.state.policy == policy(9.0).to_canonical()


def test_the_default_policy_is_the_cautious_one() -> None:
    read = parse_policy(default_policy_text())
    assert read == Policy.model_validate({"schema": "consilium/policy/v1"})
    assert (read.permit_non_private, read.release_exact_metrics) == (False, False)
    assert (read.minimal_sites, read.permitted_threat_models) == (2, ["silo-local"])
    assert read.private_metrics_epsilon == 1.0
