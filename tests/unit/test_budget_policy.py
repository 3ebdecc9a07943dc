"""A site's policy is read strictly: one clear error with line, key and remedy."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.budget.policy import (
    Policy,
    default_policy_text,
    load_policy,
    parse_policy,
    write_default_policy,
)
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError

DEFAULT = default_policy_text()


@settings(max_examples=40, deadline=None)
@given(
    epsilon=st.floats(1e-3, 100),
    delta=st.floats(1e-12, 0.01),
    period=st.none() | st.integers(1, 36500),
    cap=st.none() | st.floats(1e-9, 100),
    models=st.sampled_from([[], ["silo-local"]]),
    non_private=st.booleans(),
    cohort=st.integers(1, 10**6),
    sites=st.integers(1, 10_000),
    exact=st.booleans(),
    metrics=st.none() | st.floats(1e-9, 100),
)
def test_a_written_policy_reads_back_exactly(
    *,
    epsilon: float,
    delta: float,
    period: int | None,
    cap: float | None,
    models: list[str],
    non_private: bool,
    cohort: int,
    sites: int,
    exact: bool,
    metrics: float | None,
) -> None:
    wanted = {
        "schema": "consilium/policy/v1",
        "budget": {"epsilon": epsilon, "delta": delta, "period_days": period},
        "per_study_epsilon": cap,
        "permitted_threat_models": models,
        "permit_non_private": non_private,
        "minimal_cohort": cohort,
        "minimal_sites": sites,
        "release_exact_metrics": exact,
        "private_metrics_epsilon": metrics,
    }
    text = default_policy_text(Policy.model_validate(wanted))
    assert parse_policy(text).to_canonical() == wanted


def test_numbers_may_be_written_as_people_write_them() -> None:
    text = DEFAULT.replace("epsilon: 10.0", "epsilon: 8").replace("delta: 0.001", "delta: 1e-5")
    budget = parse_policy(text).budget
    assert (budget.epsilon, budget.delta, budget.period_days) == (8.0, 1e-5, None)


def test_a_period_counts_back_from_now_in_the_ledger_s_own_form_of_time() -> None:
    budget = parse_policy(DEFAULT.replace("period_days: null", "period_days: 365")).budget
    now = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
    assert budget.since(now) == "2025-03-01T12:00:00.000000Z"
    assert parse_policy(DEFAULT).budget.since(now) is None


def line_of(text: str, what: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(what))


@pytest.mark.parametrize(
    ("old", "new", "at", "says", "hint"),
    [
        (
            "minimal_cohort:",
            "minimal_cohorts:",
            "minimal_cohorts",
            "minimal_cohorts",
            "minimal_cohort",
        ),
        ("  epsilon: 10.0", "  epsilom: 10.0", "  epsilom", "budget.epsilom", "epsilon"),
        ("  epsilon: 10.0", "  epsilon: lots", "  epsilon", "budget.epsilon", ""),
        ("  epsilon: 10.0", "  epsilon: -1", "  epsilon", "greater than 0", ""),
        ("  epsilon: 10.0", "  epsilon: 1000", "  epsilon", "less than or equal to 100", ""),
        ("  epsilon: 10.0", "  epsilon: .nan", "  epsilon", "budget.epsilon", ""),
        ("  epsilon: 10.0", "  epsilon: true", "  epsilon", "budget.epsilon", ""),
        ("  delta: 0.001", "  delta: 0.5", "  delta", "less than or equal to 0.01", ""),
        ("permit_non_private: false", "permit_non_private: maybe", "permit_non", "boolean", ""),
        ("permit_non_private: false", "permit_non_private: 1", "permit_non", "boolean", ""),
        ("minimal_cohort: 10", "minimal_cohort: 0", "minimal_cohort", "greater than", ""),
        ("  period_days: null", "  period_days: 0", "  period_days", "greater than", ""),
        ("minimal_sites: 2", "minimal_sites: none", "minimal_sites", "integer", ""),
        ("[silo-local]", "[silo-lokal]", "permitted_threat", "silo-local", ""),
        ("private_metrics_epsilon: 1.0", "private_metrics_epsilon: 0", "private_m", "greater", ""),
        ("consilium/policy/v1", "consilium/policy/v9", "schema", "schema", ""),
        ("permit_non_private: false", "schema: x", "schema: x", "twice", "line"),
        ("  delta: 0.001", "  epsilon: 0.001", "  epsilon: 0.001", "twice", "line"),
    ],
)
def test_a_wrong_policy_is_one_error_with_line_key_and_remedy(
    old: str, new: str, at: str, says: str, hint: str
) -> None:
    text = DEFAULT.replace(old, new)
    assert text != DEFAULT
    with pytest.raises(ConsiliumError) as caught:
        parse_policy(text, where="policy.yaml")
    assert caught.value.code == "privacy.policy-invalid"
    assert caught.value.where == f"policy.yaml:{line_of(text, at)}"
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "- 1\n", "just text", "a: [", "a: b: c", "!!python/object:os.x {}"]
)
def test_what_is_no_policy_at_all_is_refused(text: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_policy(text)
    assert caught.value.code == "privacy.policy-invalid"


def test_a_missing_policy_permits_nothing_and_is_never_replaced_by_a_lax_one(
    tmp_path: Path,
) -> None:
    home = SiteHome.create(tmp_path)
    with pytest.raises(ConsiliumError) as caught:
        load_policy(home)
    assert caught.value.code == "privacy.no-policy"
    assert not home.policy.exists()


def test_the_default_is_written_once_and_kept(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path)
    write_default_policy(home)
    assert (
        load_policy(home)
        == load_policy(tmp_path)
        == Policy.model_validate({"schema": "consilium/policy/v1"})
    )
    home.policy.write_text(DEFAULT.replace("epsilon: 10.0", "epsilon: 3.0"))
    write_default_policy(home)
    assert load_policy(home).budget.epsilon == 3.0


def test_a_policy_that_is_no_text_is_refused(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path)
    home.policy.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConsiliumError) as caught:
        load_policy(home)
    assert caught.value.code == "privacy.policy-invalid"
