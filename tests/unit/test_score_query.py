"""The one released number: no patient moves it by more than 1/2, and its noise is as charged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from consilium_client.score_query import ScoreQuery, centred_sum
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import SCORE_SENSITIVITY, PrivacyEvent

ANY = st.floats(allow_nan=True, allow_infinity=True)


class Source:
    """Noise from a list, asked for by deviation."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.asked: list[float] = []

    def uniform(self, count: int) -> NDArray[np.float64]:
        raise AssertionError("nothing is drawn by chance but noise")

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        assert count == 1
        self.asked.append(standard_deviation)
        return np.array([self.values.pop(0)])


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY, max_size=40), ANY, st.integers(0, 40))
def test_one_patient_more_moves_the_sum_by_at_most_a_half(
    scores: list[float], one: float, where: int
) -> None:
    more = [*scores[:where], one, *scores[where:]]
    # But for the last bit: either sum is rounded once.
    assert abs(centred_sum(more) - centred_sum(scores)) <= SCORE_SENSITIVITY * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30))
def test_honest_scores_are_summed_exactly_about_one_half(scores: list[float]) -> None:
    assert centred_sum(scores) == pytest.approx(sum(scores) - len(scores) / 2, abs=1e-12)


def test_a_score_that_is_no_number_counts_as_nothing_and_a_wild_one_as_the_nearest_end() -> None:
    assert centred_sum([float("nan")]) == 0
    assert centred_sum([float("inf"), 7.0]) == 1.0
    assert centred_sum([-float("inf"), -1e300]) == -1.0
    assert centred_sum([]) == 0


def test_the_noise_asked_for_is_what_the_event_says() -> None:
    query, source = ScoreQuery(6.0), Source(1.25)
    assert query.release([1.0, 0.5], source) == 0.5 + 1.25
    assert source.asked == [6.0 * SCORE_SENSITIVITY] == [query.deviation]
    assert query.event == PrivacyEvent(sampling_rate=1.0, noise_multiplier=6.0, steps=1)


@pytest.mark.parametrize("drawn", [0.0, 40.0, -40.0, float("nan"), float("inf")])
def test_a_sum_whose_noise_cannot_be_the_charged_one_is_withheld(drawn: float) -> None:
    with pytest.raises(ConsiliumError) as caught:
        ScoreQuery(2.0).release([0.7, 0.2], Source(drawn))
    assert caught.value.code == "privacy.truth"


def test_released_sums_have_the_charged_spread_and_never_repeat() -> None:
    query = ScoreQuery(4.0)
    drawn = np.array([query.release([0.9] * 5) for _ in range(2000)])
    assert len(set(drawn)) == 2000
    # Six standard errors of mean and of standard deviation.
    assert drawn.mean() == pytest.approx(2.0, abs=6 * 2.0 / np.sqrt(2000))
    assert drawn.std() == pytest.approx(2.0, rel=6 / np.sqrt(2 * 2000))
