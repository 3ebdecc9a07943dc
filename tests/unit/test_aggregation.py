"""The running mean is the weighted mean of exactly the good updates, whatever else arrives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.models.weights import TensorSpec, pack
from consilium_server.aggregation import RunningMean, cohort_weights, running_average

SPECS = (TensorSpec("a.weight", (3, 2)), TensorSpec("b.bias", (4,)), TensorSpec("c", ()))


def update(seed: int = 0, scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: np.asarray(scale * rng.normal(size=spec.shape), dtype=np.float32)
        for spec in SPECS
    }


def refusal(mean: RunningMean, tensors: dict[str, NDArray[np.float32]], weight: float = 1.0) -> str:
    with pytest.raises(ConsiliumError) as caught:
        mean.add(pack(tensors), weight)
    return caught.value.code


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.5, 1e4)), min_size=1, max_size=8))
def test_it_is_the_weighted_mean_in_any_order(sites: list[tuple[int, float]]) -> None:
    mean, backwards = RunningMean(SPECS), RunningMean(SPECS)
    for seed, weight in sites:
        mean.add(pack(update(seed)), weight)
    for seed, weight in reversed(sites):
        backwards.add(pack(update(seed)), weight)
    total = sum(weight for _, weight in sites)
    for name, tensor in mean.mean().items():
        expected = sum(w / total * update(s)[name].astype(np.float64) for s, w in sites)
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(backwards.mean()[name], tensor, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == np.float32


def test_one_update_comes_back_bit_for_bit() -> None:
    mean = RunningMean(SPECS)
    mean.add(pack(update(5)), 123.0)
    for name, tensor in mean.mean().items():
        np.testing.assert_array_equal(tensor, update(5)[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_leaves_the_sum_as_it_was(value: float) -> None:
    mean = RunningMean(SPECS)
    mean.add(pack(update(1)), 2.0)
    before = mean.mean()
    # In the last tensor by name: what came before it must not have been added.
    assert refusal(mean, {**update(2), "c": np.float32(value).reshape(())}) == "run.bad-update"
    spoilt = update(2)
    spoilt["a.weight"][1, 1] = value
    assert refusal(mean, spoilt) == "run.bad-update"
    for name, tensor in mean.mean().items():
        np.testing.assert_array_equal(tensor, before[name])


def test_missing_foreign_and_mis_shaped_tensors_are_refused_and_never_broadcast() -> None:
    mean = RunningMean(SPECS)
    good = update()
    for tensors in (
        {k: v for k, v in good.items() if k != "c"},
        {**good, "extra": good["c"]},
        {**good, "b.bias": np.ones(1, np.float32)},
        {**good, "b.bias": np.ones((1, 4), np.float32)},
        {**good, "a.weight": good["a.weight"].T.copy()},
        {},
    ):
        assert refusal(mean, tensors) == "run.bad-update"
    with pytest.raises(ConsiliumError) as caught:
        mean.mean()
    assert caught.value.code == "run.quorum"


@pytest.mark.parametrize("blob", [b"", b"nonsense", b"\x80\x04N.", pack({})[:4]])
def test_bytes_that_are_no_tensors_are_refused(blob: bytes) -> None:
    with pytest.raises(ConsiliumError) as caught:
        RunningMean(SPECS).add(blob, 1.0)
    assert caught.value.code == "run.bad-update"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    assert refusal(RunningMean(SPECS), update(), weight) == "run.bad-update"


def test_memory_does_not_grow_with_the_number_of_sites() -> None:
    import tracemalloc

    specs = (TensorSpec("w", (250_000,)),)
    blob = pack({"w": np.ones(250_000, np.float32)})
    mean = RunningMean(specs)
    mean.add(blob, 1.0)
    tracemalloc.start()
    for _ in range(50):
        mean.add(blob, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One sum in float64, one update and its conversion; never fifty.
    assert peak < 8 * len(blob)


def test_weights_are_the_declared_cohorts_or_equal() -> None:
    cohorts = {"north": 30, "south": 5}
    assert cohort_weights(cohorts, "cohort") == {"north": 30.0, "south": 5.0}
    assert cohort_weights(cohorts, "uniform") == {"north": 1.0, "south": 1.0}


def test_the_running_average_forgets_the_start_at_first_and_then_decays_as_declared() -> None:
    start, model = {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}
    # After one round the warm-up weighs the past by 2/11, whatever the decay.
    first = running_average(start, model, decay=0.999, rounds_done=1)
    np.testing.assert_allclose(first["w"], 9 / 11, rtol=1e-6)
    assert first["w"].dtype == np.float32
    late = running_average(start, model, decay=0.9, rounds_done=10_000)
    np.testing.assert_allclose(late["w"], 0.1, rtol=1e-6)
    # Frozen tensors are no part of it.
    assert set(
        running_average({**start, "frozen": start["w"]}, model, decay=0.5, rounds_done=1)
    ) == {"w"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0, 0.999))
def test_the_running_average_stays_between_the_models_it_averages(
    values: list[float], decay: float
) -> None:
    average = {"w": np.array([values[0]], np.float32)}
    for index, value in enumerate(values):
        model = {"w": np.array([value], np.float32)}
        average = running_average(average, model, decay=decay, rounds_done=index + 1)
    assert min(values) - 1e-5 <= average["w"][0] <= max(values) + 1e-5
