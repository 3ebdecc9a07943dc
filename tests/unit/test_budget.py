"""A study that would overrun any patient is refused, over all studies, at every round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_samples import KEY, charge, open_ledger, patients

from consilium_client.budget import (
    budget_command,
    budget_table,
    charge_round,
    price,
    require_affordable,
    require_permitted,
)
from consilium_client.home import SiteHome
from consilium_client.policy import Policy, parse_policy, write_default_policy
from consilium_common.console import MODE
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study.schema import Study

#: One round of the study below, and all of it: ε 2.62 at δ = 1e-3.
ROUND = PrivacyEvent(0.1, 2.0, 20)
ROUNDS = 10
WHOLE = PrivacyEvent(0.1, 2.0, 20 * ROUNDS)
DELTA = 1e-3
COST = epsilon_of([WHOLE], DELTA)
COHORT = patients(20)


def study(name: str = "first", *, release: str = "none", **privacy: Any) -> Study:
    private = {
        "mode": "patient",
        "sampling_rate": 0.1,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": DELTA,
    }
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": name,
            "task": {
                "kind": "segmentation",
                "dimensions": 2,
                "inputs": ["image"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet"},
            "training": {"steps_per_round": 20},
            "privacy": {"mode": "none"}
            if privacy.get("mode") == "none"
            else {**private, **privacy},
            "federation": {"rounds": ROUNDS},
            "evaluation": {"release": release},
        }
    )


def policy(epsilon: float = 10.0, delta: float = DELTA, **more: Any) -> Policy:
    return Policy.model_validate(
        {
            "schema": "consilium/policy/v1",
            "budget": {"epsilon": float(epsilon), "delta": delta},
            **more,
        }
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.db") as opened:
        yield opened


def run_round(
    ledger: Ledger, rules: Policy, index: int, *, asked: Study, members: list[str] | None = None
) -> None:
    charge_round(
        ledger,
        rules,
        asked,
        index,
        COHORT if members is None else members,
        event=ROUND,
        clip_norm=1.0,
    )


def refused(code: str) -> Any:
    return pytest.raises(ConsiliumError, match=code.replace(".", r"\."))


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
    assert (found.code, found.overrun) == ("privacy.budget", 20)
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


def test_one_patient_with_a_past_decides_for_the_whole_cohort(ledger: Ledger) -> None:
    veteran = COHORT[7]
    past = PrivacyEvent(0.1, 1.0, 200)
    charge(ledger, event=past, members=[veteran])
    found = price(ledger, policy(100.0), study(), COHORT)
    assert found.before == epsilon_of([past], DELTA)
    assert found.after == epsilon_of([past, WHOLE], DELTA)
    tight = price(ledger, policy(found.after - 0.01), study(), COHORT)
    assert (tight.allowed, tight.overrun) == (False, 1)
    without = [patient for patient in COHORT if patient != veteran]
    assert price(ledger, policy(found.after - 0.01), study(), without).allowed


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


def test_charging_records_the_policy_it_was_judged_by(ledger: Ledger) -> None:
    run_round(ledger, policy(), 0, asked=study())
    run_round(ledger, policy(), 1, asked=study())
    run_round(ledger, policy(9.0), 2, asked=study())
    kinds = [entry.kind for entry in ledger.entries()]
    assert kinds.count("policy") == 2
    assert ledger.state.policy == policy(9.0).to_canonical()


def test_the_table_shows_the_spread_over_patients_and_studies(ledger: Ledger) -> None:
    run_round(ledger, policy(), 0, asked=study("first"))
    run_round(ledger, policy(), 0, asked=study("second"), members=COHORT[:12])
    table = budget_table(ledger, policy())
    one, two = (epsilon_of([ROUND] * n, DELTA) for n in (1, 2))
    assert (table.spend.least, table.spend.median, table.spend.most) == (one, two, two)
    assert table.remaining == 10 - two
    assert [s.patients for s in table.spend.studies] == [20, 12]


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    home = SiteHome.create(tmp_path / "site")
    write_default_policy(home)
    return home


@pytest.fixture
def as_json() -> Iterator[None]:
    MODE.json = True
    yield
    MODE.json = False


def test_the_command_prints_for_people(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    budget_command(home.path, None)
    assert "Nothing was charged yet" in capsys.readouterr().out
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=study())
    budget_command(home.path, None)
    said = capsys.readouterr().out
    assert "20 patients" in said
    assert "unit patient" in said
    assert study().digest[:12] in said
    budget_command(home.path, COHORT[0])
    said = capsys.readouterr().out
    assert f"{epsilon_of([ROUND], DELTA):.3f} of 10" in said
    assert COHORT[0] not in said


@pytest.mark.usefixtures("as_json")
def test_the_command_prints_one_envelope(
    home: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger.open(home.ledger, KEY, site="north") as ledger:
        run_round(ledger, policy(), 0, asked=study())
    budget_command(home.path, None)
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["spend"]["epsilon"]["most"] == epsilon_of([ROUND], DELTA)
    assert (data["spend"]["unit"], data["spend"]["adjacency"]) == ("patient", "add-or-remove-one")
    budget_command(home.path, patients(1, start=500)[0])
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["spent"], data["remaining"], data["studies"]) == (0.0, 10.0, [])


def test_the_command_needs_a_site_with_a_policy(tmp_path: Path) -> None:
    with refused("state.no-site"):
        budget_command(tmp_path / "missing", None)
    with refused("privacy.no-policy"):
        budget_command(tmp_path, None)


def test_the_default_policy_is_the_cautious_one() -> None:
    from consilium_client.policy import default_policy_text

    read = parse_policy(default_policy_text())
    assert read == Policy.model_validate({"schema": "consilium/policy/v1"})
    assert (read.permit_non_private, read.release_exact_metrics) == (False, False)
