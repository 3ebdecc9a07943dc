"""From right guesses to ε: the audit's bounds agree with simple cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from consilium_client.auditing.bounds import (
    gaussian_epsilon,
    one_run_bound,
    one_run_p_value,
    share_bounds,
)
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent


def test_without_delta_the_p_value_is_that_of_randomised_response() -> None:
    # All 10 of 10 right against ε = 0 is ten fair coins; against ε = ln 3, coins of 3/4.
    assert one_run_p_value(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert one_run_p_value(10, 10, 10, math.log(3), 0.0) == pytest.approx(0.75**10)
    assert one_run_p_value(10, 10, 9, math.log(3), 0.0) == pytest.approx(
        0.75**10 + 10 * 0.75**9 * 0.25
    )


def test_the_bound_without_delta_solves_the_binomial_by_hand() -> None:
    # e^ε / (1 + e^ε) = .05^(1/100) when all of 100 guesses are right.
    right = 0.05 ** (1 / 100)
    assert one_run_bound(100, 100, 100, 0.0, 0.95) == pytest.approx(
        math.log(right / (1 - right)), abs=1e-4
    )


def test_delta_adds_what_the_theorem_adds() -> None:
    m, r, v, epsilon, delta = 40, 20, 17, 1.0, 1e-3
    chance = math.e / (1 + math.e)

    def at_least(k: int) -> float:
        return sum(float(binom.pmf(j, r, chance)) for j in range(max(k, 0), r + 1))

    slope = max((at_least(v - i) - at_least(v)) / i for i in range(1, m + 1))
    expected = at_least(v) + 2 * m * delta * slope
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    guesses=st.integers(1, 300),
    share=st.floats(0, 1),
    epsilon=st.floats(0, 8),
    more=st.floats(0, 4),
)
def test_a_weaker_claim_is_never_easier_to_refute(
    guesses: int, share: float, epsilon: float, more: float
) -> None:
    correct = round(share * guesses)
    p = one_run_p_value(300, guesses, correct, epsilon, 1e-5)
    assert 0 <= p <= 1
    assert p <= one_run_p_value(300, guesses, correct, epsilon + more, 1e-5) + 1e-12
    assert p <= one_run_p_value(300, guesses, correct, epsilon, 1e-3) + 1e-12


def test_randomised_response_itself_is_refuted_no_more_often_than_stated() -> None:
    # The mechanism for which the theorem is tight: each coin is told right with e^ε/(1 + e^ε).
    epsilon, rng = 1.0, np.random.default_rng(3)
    correct = rng.binomial(200, math.e / (1 + math.e), size=2000)
    refuted = sum(one_run_p_value(200, 200, int(v), epsilon, 0.0) < 0.05 for v in correct)
    # 2000 runs at 5 %: above 150 with a probability below 1e-6.
    assert 20 < refuted < 150


def test_guesses_no_better_than_chance_refute_nothing() -> None:
    assert one_run_bound(1000, 1000, 500, 1e-5, 0.95) == 0.0
    assert one_run_bound(1000, 10, 0, 1e-5, 0.95) == 0.0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_the_gaussian_formula_is_the_accountants(sigma: float) -> None:
    claimed = epsilon_of([PrivacyEvent(1.0, sigma, 1)], 1e-5)
    assert gaussian_epsilon(1 / sigma, 1e-5) == pytest.approx(claimed, abs=2e-3)
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(-1.0, 1e-5) == 0.0


def test_the_limits_of_a_share_are_exact_tails() -> None:
    low, high = share_bounds(7, 50, 0.01)
    assert binom.sf(6, 50, low) == pytest.approx(0.01)
    assert binom.cdf(7, 50, high) == pytest.approx(0.01)
    assert share_bounds(0, 50, 0.01)[0] == 0.0
    assert share_bounds(50, 50, 0.01)[1] == 1.0
