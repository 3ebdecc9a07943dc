"""Noise is compared with the signal before any budget is spent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyParameters
from consilium_common.privacy.noise import noise_to_signal, patients_needed


def mechanism(sigma: float, q: float, steps: int, rounds: int = 1) -> PrivacyParameters:
    return PrivacyParameters(q, 0.7, sigma, steps, rounds, 1e-3)


def test_the_ratio_is_that_of_a_simulated_sum() -> None:
    draw = np.random.default_rng(0)
    sigma, q, steps, patients, values, clip = 1.3, 0.3, 40, 50, 2000, 0.7
    direction = draw.normal(size=values)
    direction *= clip / np.linalg.norm(direction)
    taken = draw.random((steps, patients)) < q
    signals = taken.sum(1)[:, None] * direction
    noises = draw.normal(0, sigma * clip, (steps, values))
    found = noise_to_signal(mechanism(sigma, q, 20, 2), patients, values)
    step = np.linalg.norm(noises, axis=1).mean() / np.linalg.norm(signals, axis=1).mean()
    study = np.linalg.norm(noises.sum(0)) / np.linalg.norm(signals.sum(0))
    assert found.per_step == pytest.approx(step, rel=0.03)
    assert found.over_study == pytest.approx(study, rel=0.06)


def test_the_measured_table_falls_into_the_verdicts() -> None:
    # The rows of the privacy rules that start from random weights: ε = 8, δ = 1e-3, 160 steps.
    parameters = mechanism(1.399, 0.2, 160)
    shared = noise_to_signal(parameters, 100, 9_500)  # .84 of the score without privacy
    alone = noise_to_signal(parameters, 33, 9_500, sites=3)  # .56 of it
    large = noise_to_signal(parameters, 100, 137_000)  # .64 of it
    assert (shared.verdict, alone.verdict, large.verdict) == ("weak", "drowned", "drowned")
    assert shared.over_study == pytest.approx(0.5, abs=0.05)
    assert alone.over_study == pytest.approx(0.93, abs=0.05)
    assert noise_to_signal(parameters, 120, 9_500).verdict == "clear"
    assert "train fewer values" in noise_to_signal(parameters, 30, 137_000).sentence


@given(
    sigma=st.floats(0.3, 50),
    q=st.floats(0.001, 1),
    steps=st.integers(1, 5000),
    values=st.integers(1, 10**7),
    sites=st.integers(1, 50),
)
@settings(max_examples=50, deadline=None)
def test_the_cohorts_named_are_where_the_verdict_turns(
    sigma: float, q: float, steps: int, values: int, sites: int
) -> None:
    parameters = mechanism(sigma, q, steps)
    afloat, clear = patients_needed(parameters, values, sites)
    assert 1 <= afloat <= clear
    assert noise_to_signal(parameters, afloat, values, sites).verdict != "drowned"
    assert noise_to_signal(parameters, clear, values, sites).verdict == "clear"
    # One patient fewer is on the other side (rounding aside, two are).
    if afloat > 2:
        assert noise_to_signal(parameters, afloat - 2, values, sites).verdict == "drowned"
    if clear > 2:
        assert noise_to_signal(parameters, clear - 2, values, sites).verdict != "clear"


@pytest.mark.parametrize(("patients", "values"), [(0, 10), (-3, 10), (10, 0)])
def test_a_cohort_of_nobody_is_refused(patients: int, values: int) -> None:
    with pytest.raises(ConsiliumError, match=r"privacy\.patients-invalid"):
        noise_to_signal(mechanism(1, 0.1, 10), patients, values)


def test_the_sentence_says_both_figures() -> None:
    found = noise_to_signal(mechanism(2, 0.1, 100), 1, 10_000)
    assert found.per_step == pytest.approx(2 * 100 / 0.1)
    assert found.over_study == pytest.approx(found.per_step / math.sqrt(100))
    assert found.sentence.startswith("With 1 patient and 10,000 trained values the noise is 2e+03")
