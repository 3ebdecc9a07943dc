"""No attacker does better than the bounds say, and the bounds are as tight as theory allows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.privacy.reconstruction import NAMED_PRIORS, reconstruction_bound
from consilium_common.privacy.tradeoff import NAMED_RATES, true_positive_bound


def rates_of(events: list[PrivacyEvent], *rates: float) -> list[float]:
    return [point.true_positive_rate for point in true_positive_bound(events, rates)]


def test_the_officer_s_figures_at_epsilon_7_32() -> None:
    # privacy.md: σ 1.0, q .032, 1563 steps is ε 7.32 at δ = 1e-4.
    found = rates_of([PrivacyEvent(0.032, 1.0, 1563)], 0.001, 0.01)
    assert found == pytest.approx([0.074, 0.241], abs=0.0006)


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (5.0, 30), (0.7, 1)])
def test_the_curve_of_a_full_batch_is_the_exact_gaussian_one(sigma: float, steps: int) -> None:
    # Dong, Roth & Su 2022: TPR(α) = Φ(Φ⁻¹(α) + μ), μ = √T/σ, and nobody can do better.
    mu = math.sqrt(steps) / sigma
    for alpha, found in zip(
        NAMED_RATES, rates_of([PrivacyEvent(1.0, sigma, steps)], *NAMED_RATES), strict=True
    ):
        exact = norm.cdf(norm.ppf(alpha) + mu)
        assert exact <= found <= exact + 0.002


def test_a_subsampled_attacker_s_real_success_stays_below_the_bound() -> None:
    # The best test of one step against one known gradient, by Neyman and Pearson, in closed form:
    # without the patient N(0, σ²), with the patient (1 − q) N(0, σ²) + q N(1, σ²).
    q, sigma = 0.3, 0.8
    for alpha in NAMED_RATES:
        real = (1 - q) * alpha + q * norm.cdf(norm.ppf(alpha) + 1 / sigma)
        (bound,) = rates_of([PrivacyEvent(q, sigma, 1)], alpha)
        assert real <= bound <= real + 0.02


def test_who_took_no_part_is_recognised_by_guessing_only() -> None:
    assert rates_of([], 0.0, 0.01, 1.0) == [0.0, 0.01, 1.0]


def test_without_protection_the_bound_promises_nothing() -> None:
    assert rates_of([PrivacyEvent(1.0, 0.01, 10**6)], 0.001) == [1.0]


events_ = st.builds(
    PrivacyEvent, st.sampled_from([0.05, 1.0]), st.sampled_from([2.5, 8.0]), st.sampled_from([1, 9])
)


@settings(max_examples=6, deadline=None)
@given(st.lists(events_, max_size=2), events_, st.floats(0, 1), st.floats(0, 1))
def test_more_false_alarms_or_more_events_never_lower_the_bound(
    events: list[PrivacyEvent], more: PrivacyEvent, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    at_low, at_high = rates_of(events, low, high)
    assert low <= at_low <= at_high + 1e-9
    assert at_high <= 1
    # A hair for the rounding of either composition.
    assert rates_of([*events, more], low)[0] >= at_low - 1e-6


def test_a_reconstruction_succeeds_no_more_often_than_the_exact_gaussian_allows() -> None:
    # Hayes et al. 2023: for one Gaussian the bound is Φ(Φ⁻¹(κ) + 1/σ).
    found = reconstruction_bound([PrivacyEvent(1.0, 2.0, 1)])
    assert tuple(bound.prior for bound in found) == NAMED_PRIORS
    for bound in found:
        exact = norm.cdf(norm.ppf(bound.prior) + 0.5)
        assert exact <= bound.bound <= exact * 1.02 + 1e-9


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConsiliumError) as caught:
        true_positive_bound([], [rate])
    assert caught.value.code == "privacy.rate-invalid"
