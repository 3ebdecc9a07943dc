"""Statistics that leave a site: no patient moves them by more than √tables, the noise is real."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from statistics_samples import EVERYTHING, CountedMemoryCase, case, counting_study

from consilium_client.statistics_query import StatisticsQuery, bounded
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.study import Study
from consilium_common.study.statistics import tables

ANY = st.floats(allow_nan=True, allow_infinity=True)


def query_of(study: Study) -> StatisticsQuery:
    found = StatisticsQuery.of(study)
    assert found is not None
    return found


def classification(*, multi_label: bool) -> Study:
    task = {
        "kind": "classification",
        "dimensions": 2,
        "inputs": ["ct"],
        "classes": ["a", "b", "c"],
        "multi_label": multi_label,
    }
    return counting_study(
        task=task,
        preprocessing={"size": [16, 16], "spacing": [1.0, 1.0]},
        training={"loss": "bce" if multi_label else "cross_entropy"},
    )


#: The public facts of each kind of task; built once, as calibration takes a while.
QUERIES = {
    "segmentation": query_of(counting_study()),
    "one class": query_of(classification(multi_label=False)),
    "many classes": query_of(classification(multi_label=True)),
}


@st.composite
def strange_cases(draw: st.DrawFn, kind: str) -> CountedMemoryCase:
    """A case whose every value may be anything that its type can hold."""
    values = draw(st.lists(st.floats(width=32), min_size=1, max_size=9))
    label: Any
    if kind == "segmentation":
        size = draw(st.integers(1, 9))
        label = np.array(draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), "u1")
    elif kind == "one class":
        label = np.array(draw(st.integers(-3, 9)), dtype=np.int64)
    else:
        label = np.array(draw(st.lists(ANY, min_size=3, max_size=3)), dtype=np.float32)
    shape = tuple(draw(st.lists(st.integers(0, 2**40), min_size=2, max_size=3)))
    edges = draw(st.tuples(ANY, ANY, ANY))
    return case(np.array(values, "f4")[None], label, shape=shape, spacing=edges)


@pytest.mark.parametrize("kind", QUERIES)
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_patient_more_moves_the_sum_by_at_most_the_root_of_the_tables(
    kind: str, data: st.DataObject
) -> None:
    query = QUERIES[kind]
    patient = st.lists(strange_cases(kind), max_size=3)
    others = data.draw(st.lists(patient, max_size=3))
    one = data.draw(patient)
    moved = query.total([*others, one]) - query.total(others)
    assert query.sensitivity == math.sqrt(5)
    assert np.linalg.norm(moved) <= query.sensitivity * (1 + 1e-9)
    assert (moved >= 0).all()
    # In whatever order: sums are exact, so that rounding does not add up over patients.
    assert (query.total([one, *others]) == query.total([*others, one])).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=40))
def test_a_bounded_vector_has_a_norm_of_at_most_one_whatever_it_was(values: list[float]) -> None:
    found = bounded(np.array(values))
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert np.linalg.norm(found) <= 1 + 1e-12


def test_one_patient_can_reach_the_bound_so_that_no_noise_is_wasted() -> None:
    plain = case(np.full((1, 16, 16), 0.25), np.ones((16, 16), dtype=np.uint8))
    query = QUERIES["segmentation"]
    assert np.linalg.norm(query.total([[plain]])) == pytest.approx(query.sensitivity, abs=1e-6)


def test_each_bin_holds_what_its_name_says() -> None:
    query = QUERIES["segmentation"]
    label = np.zeros((16, 16), dtype=np.uint8)
    with_organ = label.copy()
    with_organ[3] = 1
    pixels = np.full((1, 16, 16), -4.75)
    pixels[0, :4] = 0.3
    first = case(pixels, with_organ, shape=(512, 512), spacing=(0.7, 0.4, 99.0))
    second = case(pixels, label, shape=(64, 63), spacing=(0.7, 0.4, 99.0))
    total = query.total([[first, second]])
    found: dict[str, float] = {}
    for table in query.tables:
        for name in table.bins:
            value, total = total[0], total[1:]
            if value:
                found[f"{table.name}: {name}"] = round(float(value), 6)
    assert found == {
        "classes: organ": 0.5,  # one of the patient's two cases
        "intensity: below -3.5": 0.75,
        "intensity: 0 to 0.5": 0.25,
        "spacing.smallest: 0.25 to 0.5 mm": 1.0,
        "spacing.largest: 0.5 to 1 mm": 1.0,  # the third axis of a plane is none
        "size: below 4,096": 0.5,
        "size: 262,144 to 1,048,576": 0.5,
    }


def test_several_classes_of_one_case_share_one_unit_of_norm() -> None:
    query = QUERIES["many classes"]
    both = case(np.zeros((1, 16, 16)), np.array([1, 0, 1], dtype=np.float32))
    table = query.tables[0]
    assert query.total([[both]])[:3] / table.weight == pytest.approx([1, 0, 1], abs=1e-6)
    single = case(np.zeros((1, 16, 16)), np.array(2))
    assert list(QUERIES["one class"].total([[single]])[:3]) == [0, 0, 1]


def test_covariates_behind_the_images_channels_are_no_intensities() -> None:
    query = query_of(counting_study(["intensity"]))
    image = np.concatenate([np.full((1, 4, 4), -9.0), np.full((2, 4, 4), 9.0)])
    total = query.total([[case(image, np.zeros((4, 4), dtype=np.uint8))]])
    assert total[0] == 1
    assert total[1:].sum() == 0


class Source:
    """Noise from an array, asked for by deviation."""

    def __init__(self, noise: NDArray[np.float64]) -> None:
        self.noise = noise
        self.asked: list[tuple[int, float]] = []

    def uniform(self, count: int) -> NDArray[np.float64]:
        raise AssertionError("nothing is drawn by chance but noise")

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        self.asked.append((count, standard_deviation))
        return self.noise * standard_deviation


VALUES = sum(len(table.bins) for table in tables(counting_study()))
UNIT = np.random.default_rng(3).standard_normal(VALUES)


def test_the_noise_asked_for_is_what_the_event_and_the_study_say() -> None:
    study = counting_study(epsilon=0.5)
    query, source = QUERIES["segmentation"], Source(UNIT)
    query.release([], source)
    plan = parameters(study)
    assert plan is not None
    assert plan.statistics_tables == len(tables(study)) == len(EVERYTHING) + 1
    assert source.asked == [(VALUES, plan.statistics_noise * math.sqrt(5))]  # type: ignore[operator]
    assert query.event == plan.statistics_event
    spent = epsilon_of([query.event], 1e-3)
    assert 0.49 < spent <= 0.5


def test_what_is_released_is_the_sum_and_the_noise_by_name() -> None:
    query = QUERIES["segmentation"]
    patient = [case(np.zeros((1, 16, 16)), np.ones((16, 16), dtype=np.uint8))]
    found = query.release([patient] * 7, Source(UNIT))
    assert list(found) == [name for table in query.tables for name in table.figures]
    exact = np.array(list(found.values())) - UNIT * query.deviation
    assert exact == pytest.approx(query.total([patient] * 7), abs=1e-9)


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros(VALUES),
        UNIT * 0.2,
        UNIT * 4,
        np.where(np.arange(VALUES) < 2, 0, UNIT),
        np.full(VALUES, np.nan),
        np.full(VALUES, np.inf),
    ],
    ids=["none", "a fifth of it", "far too much", "two values without", "nan", "infinite"],
)
def test_a_sum_whose_noise_cannot_be_the_charged_one_is_withheld(
    noise: NDArray[np.float64],
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        QUERIES["segmentation"].release([], Source(noise))
    assert caught.value.code == "privacy.truth"


def test_released_sums_have_the_charged_spread_and_never_repeat() -> None:
    query = QUERIES["segmentation"]
    drawn = np.array([list(query.release([]).values()) for _ in range(100)])
    assert len(np.unique(drawn)) == drawn.size
    # Six standard errors of mean and of standard deviation.
    assert drawn.mean() == pytest.approx(0, abs=6 * query.deviation / math.sqrt(drawn.size))
    assert drawn.std() == pytest.approx(query.deviation, rel=6 / math.sqrt(2 * drawn.size))
