"""Flat, automatic and adaptive clipping: what bounds a patient, and what following a norm costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from test_mechanism import Rows, Scaled

from consilium_client.training.clipping import (
    FLAT,
    ClippedSum,
    clipped_sum,
    combined_multiplier,
    gradient_multiplier,
    next_clip_norm,
)
from consilium_client.training.entropy import SystemEntropy
from consilium_client.training.mechanism import Mechanism, require_truth
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyParameters
from consilium_common.study.schema import AdaptiveClipping, AutomaticClipping

AUTOMATIC = AutomaticClipping(kind="automatic", stability=0.01)
ADAPTIVE = AdaptiveClipping(kind="adaptive", quantile=0.5, rate=0.2, count_noise=5.0)


# --- the bound -----------------------------------------------------------------------------------

any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    table=arrays(np.float32, st.tuples(st.integers(1, 4), st.just(5)), elements=any_float32),
    clip=st.floats(1e-4, 1e4),
    rule=st.sampled_from([FLAT, AUTOMATIC, ADAPTIVE]),
)
def test_whatever_the_rule_a_patient_moves_the_sum_by_at_most_c_and_the_count_by_a_half(
    table: NDArray[np.float32], clip: float, rule: Any
) -> None:
    def sum_of(rows: NDArray[np.float32]) -> ClippedSum:
        clipped = ClippedSum(5, "cpu", clip, rule)
        clipped.add(torch.from_numpy(rows))
        return clipped

    whole = sum_of(table)
    for patient in range(len(table)):
        rest = sum_of(np.delete(table, patient, axis=0))
        assert float((whole.total - rest.total).norm()) <= clip * (1 + 1e-9)
        moved = (whole.within - whole.rows / 2) - (rest.within - rest.rows / 2)
        assert abs(moved) == 0.5


def test_automatic_clipping_gives_gradients_nearly_one_length_and_small_ones_a_smaller() -> None:
    table = torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.003, 0.004], [0.0, 0.0]])
    lengths = [float(clipped_sum([row[None]], 2.0, 2, "cpu", AUTOMATIC)[0].norm()) for row in table]
    assert lengths == pytest.approx(
        [2 * n / (n + 0.01) for n in (50.0, 0.5, 0.005)] + [0.0], rel=1e-6
    )


def test_rows_longer_than_a_block_are_summed_whole() -> None:
    rows = torch.randn(2, 150_000, generator=torch.Generator().manual_seed(0))
    wide = rows.double()
    expected = (wide * (3.0 / wide.norm(dim=1))[:, None]).sum(dim=0)
    found, _ = clipped_sum([rows], 3.0, 150_000, "cpu")
    assert float((found - expected).norm()) < 1e-9
    rows[0, 149_999] = math.nan
    assert float(clipped_sum([rows], 3.0, 150_000, "cpu")[0].norm()) == pytest.approx(3.0)


def test_the_count_tells_how_many_gradients_are_within_c_and_not_those_that_are_no_numbers() -> (
    None
):
    clipped = ClippedSum(2, "cpu", 1.0, ADAPTIVE)
    clipped.add(torch.tensor([[0.5, 0.0], [0.0, 1.0], [2.0, 0.0], [math.nan, 0.0]]))
    assert (clipped.rows, clipped.within) == (4, 2)


# --- the price of the count ----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(z=st.floats(0.21, 50), factor=st.floats(1.001, 1e4))
def test_gradient_and_count_together_cost_exactly_the_studys_multiplier(
    z: float, factor: float
) -> None:
    rule = AdaptiveClipping(kind="adaptive", count_noise=min(1e4, z * factor / 2))
    gradient = gradient_multiplier(z, rule)
    assert gradient > z
    assert combined_multiplier(gradient, 2 * rule.count_noise) == pytest.approx(z, rel=1e-12)


def test_two_gaussians_on_one_sample_cost_what_their_combination_costs() -> None:
    # The precision of independent Gaussian releases adds: against dp-accounting used directly.
    from dp_accounting.pld import privacy_loss_distribution as pld

    z, count = 1.3, 4.0
    gradient = gradient_multiplier(z, AdaptiveClipping(kind="adaptive", count_noise=count / 2))
    both = pld.from_gaussian_mechanism(gradient).compose(pld.from_gaussian_mechanism(count))
    one = pld.from_gaussian_mechanism(z)
    assert both.get_epsilon_for_delta(1e-5) == pytest.approx(
        one.get_epsilon_for_delta(1e-5), abs=2e-3
    )


@pytest.mark.parametrize("count_noise", [0.65, 0.6])
def test_a_count_that_would_cost_the_whole_step_is_refused(count_noise: float) -> None:
    rule = AdaptiveClipping(kind="adaptive", count_noise=count_noise)
    parameters = PrivacyParameters(0.2, 0.5, 1.3, steps_per_round=3, rounds=9, delta=1e-3)
    with pytest.raises(ConsiliumError, match="whole noise multiplier") as caught:
        Mechanism.for_round(parameters, 40, clipping=rule)
    assert caught.value.code == "privacy.clipping"
    assert caught.value.hint


# --- adaptive rounds -----------------------------------------------------------------------------


def adaptive(**changes: Any) -> Mechanism:
    facts: dict[str, Any] = {
        "sampling_rate": 1.0,
        "clip_norm": 8.0,
        "noise_multiplier": 1.1,
        "steps": 60,
        "denominator": 400.0,
        "clipping": ADAPTIVE,
    }
    return Mechanism(**(facts | changes))


def run_of(mechanism: Mechanism, engine: Rows, entropy: Any = None) -> Any:
    run = mechanism.begin(entropy)
    for _ in range(mechanism.steps):
        run.step(len(engine.table), engine)
    return run


def lengths(patients: int) -> Rows:
    """Return gradients whose norms are spread evenly over (0, 1]."""
    table = np.zeros((patients, 4), dtype=np.float32)
    table[:, 0] = np.arange(1, patients + 1) / patients
    return Rows(table)


@pytest.mark.parametrize("start", [8.0, 0.05])
def test_c_finds_the_quantile_from_above_and_from_below(start: float) -> None:
    run = run_of(adaptive(clip_norm=start), lengths(400))
    assert run.clip_norm == pytest.approx(0.5, abs=0.08)


def test_an_adaptive_round_realises_the_event_that_was_charged_for_it() -> None:
    mechanism = adaptive(steps=10)
    run = run_of(mechanism, lengths(50))
    assert require_truth(mechanism.event, run.realised()) == mechanism.event
    assert run.clip_norm != mechanism.clip_norm


def test_the_gradients_noise_follows_the_moving_clip_norm() -> None:
    mechanism = adaptive(steps=1, clip_norm=3.0)
    released = mechanism.begin().step(0, Rows(np.zeros((0, 20_000), dtype=np.float32)))
    assert mechanism.gradient_multiplier > mechanism.noise_multiplier
    deviation = mechanism.gradient_multiplier * 3.0 / mechanism.denominator
    assert float(released.std()) == pytest.approx(deviation, rel=0.03)


class NoisyGradientOnly(SystemEntropy):
    """Noise for vectors, none for the single number that the count is."""

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        scale = 0.0 if count == 1 else 1.0
        return super().normal(count, standard_deviation) * scale


def test_a_count_without_noise_is_found() -> None:
    run = run_of(adaptive(), lengths(50), NoisyGradientOnly())
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*counts"):
        run.realised()


def test_a_gradient_with_too_little_noise_is_found_under_adaptive_clipping_too() -> None:
    engine = Rows(np.zeros((3, 3000), dtype=np.float32))
    run = run_of(adaptive(steps=2), engine, Scaled(noise=0.9))
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*gradients"):
        run.realised()


@pytest.mark.parametrize("change", [{"count_noise": 2.0}, {"count_noise": 50.0}])
def test_a_count_with_other_noise_than_was_priced_is_found(change: dict[str, float]) -> None:
    mechanism = adaptive(steps=3)
    run = mechanism.begin()
    run.step(50, lengths(50))
    other = ADAPTIVE.model_copy(update=change)
    object.__setattr__(mechanism, "clipping", other)  # past what frozen allows
    gradient = gradient_multiplier(1.1, ADAPTIVE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Mechanism, "gradient_multiplier", gradient)
        run.step(50, lengths(50))
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*changed"):
        run.realised()


@pytest.mark.parametrize("noisy", [-1e12, 1e12, 0.0])
def test_c_stays_positive_and_moves_by_little_whatever_the_noise_says(noisy: float) -> None:
    for clip in (1e-6, 1.0, 1e6):
        moved = next_clip_norm(clip, noisy, 5.0, ADAPTIVE)
        assert 1e-6 <= moved <= 1e6
        assert 0.3 < moved / clip < 3


def test_c_is_taken_up_where_the_round_before_left_it_by_adaptive_clipping_alone() -> None:
    parameters = PrivacyParameters(0.2, 0.5, 1.4, steps_per_round=3, rounds=9, delta=1e-3)
    taken = {
        rule.kind: Mechanism.for_round(parameters, 40, clipping=rule, clip_norm=0.8).clip_norm
        for rule in (FLAT, AUTOMATIC, ADAPTIVE)
    }
    assert taken == {"flat": 0.5, "automatic": 0.5, "adaptive": 0.8}
    assert Mechanism.for_round(parameters, 40, clipping=ADAPTIVE).clip_norm == 0.5


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip: float) -> None:
    parameters = PrivacyParameters(0.2, 0.5, 1.4, steps_per_round=3, rounds=9, delta=1e-3)
    with pytest.raises(ConsiliumError, match=r"privacy\.clipping"):
        Mechanism.for_round(parameters, 40, clipping=ADAPTIVE, clip_norm=clip)
