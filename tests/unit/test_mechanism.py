"""The private mechanism: what it releases, what it charges, and what it refuses to pass off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from consilium_client.training.entropy import SystemEntropy
from consilium_client.training.mechanism import Mechanism, clipped_sum, require_truth
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters

SIZE = 2000


@dataclass
class Rows:
    """An engine whose patients' gradients are the rows of a table."""

    table: NDArray[np.float32]
    asked: list[list[int]] = field(default_factory=list)
    device: str = "cpu"

    @property
    def size(self) -> int:
        return int(self.table.shape[1])

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        self.asked.append(list(patients))
        for patient in patients:
            yield torch.from_numpy(self.table[patient : patient + 1])


def rows(patients: int, value: float = 0.0, size: int = SIZE) -> Rows:
    return Rows(np.full((patients, size), value, dtype=np.float32))


def mechanism(**changes: Any) -> Mechanism:
    facts: dict[str, Any] = {
        "sampling_rate": 0.3,
        "clip_norm": 0.7,
        "noise_multiplier": 1.3,
        "steps": 5,
        "denominator": 10.0,
    }
    return Mechanism(**(facts | changes))


# --- clipping ----------------------------------------------------------------------------------

any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None)
@given(
    table=arrays(np.float32, st.tuples(st.integers(1, 5), st.just(7)), elements=any_float32),
    clip=st.floats(1e-4, 1e4),
)
def test_one_patient_whatever_it_holds_moves_the_clipped_sum_by_at_most_the_clip_norm(
    table: NDArray[np.float32], clip: float
) -> None:
    whole, count = clipped_sum([torch.from_numpy(table)], clip, 7, "cpu")
    assert count == len(table)
    for patient in range(len(table)):
        others = torch.from_numpy(np.delete(table, patient, axis=0))
        without, _ = clipped_sum([others], clip, 7, "cpu")
        assert float((whole - without).norm()) <= clip * (1 + 1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_contribution_that_is_not_finite_counts_as_zero(bad: float) -> None:
    table = np.ones((2, 4), dtype=np.float32)
    table[0, 2] = bad
    total, count = clipped_sum([torch.from_numpy(table)], 10.0, 4, "cpu")
    assert count == 2
    assert total.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_gradients_whose_squares_overflow_float32_are_clipped_and_not_lost() -> None:
    table = np.full((1, 4), 3e38, dtype=np.float32)
    total, _ = clipped_sum([torch.from_numpy(table)], 1.0, 4, "cpu")
    assert float(total.norm()) == pytest.approx(1.0, abs=1e-12)


def test_gradients_within_the_bound_are_not_touched() -> None:
    table = np.array([[0.3, 0.4]], dtype=np.float32)
    total, _ = clipped_sum([torch.from_numpy(table)], 1.0, 2, "cpu")
    assert np.array_equal(total.numpy(), table[0].astype(np.float64))


# --- noise -------------------------------------------------------------------------------------


def test_the_noise_in_a_release_has_the_claimed_deviation() -> None:
    facts = mechanism(steps=20, sampling_rate=1.0)
    run, engine = facts.begin(), rows(0, size=20_000)
    released = torch.stack([run.step(0, engine) for _ in range(20)]).numpy()
    claimed = facts.noise_multiplier * facts.clip_norm / facts.denominator
    # 400 000 values: the relative error of their deviation is .11 % (one standard error).
    assert released.std() == pytest.approx(claimed, rel=0.006)
    assert abs(released.mean()) < 6 * claimed / np.sqrt(released.size)


def test_steps_share_no_noise() -> None:
    run, engine = mechanism(steps=2).begin(), rows(0)
    first, second = run.step(0, engine).numpy(), run.step(0, engine).numpy()
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(SIZE)
    assert (first == second).mean() < 0.01


@pytest.mark.parametrize("threads", [1, 3])
def test_gaussian_numbers_pass_a_test_of_their_distribution(threads: int) -> None:
    from scipy.stats import kstest

    values = SystemEntropy(threads).normal(200_000, 2.5)
    assert len(np.unique(values)) == len(values)
    assert kstest(values / 2.5, "norm").pvalue > 1e-9
    assert np.abs(values / 2.5).max() > 3.5


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_most_extreme_random_bits_still_give_a_finite_number(
    byte: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium_client.training.entropy._keystream", lambda size: byte * size)
    uniform = SystemEntropy().uniform(3)
    assert ((uniform > 0) & (uniform < 1)).all()
    assert np.isfinite(SystemEntropy().normal(3, 1.0)).all()


def test_equal_seeds_of_torch_and_numpy_never_repeat_noise_or_samples() -> None:
    seen = []
    for _ in range(3):
        torch.manual_seed(1)
        np.random.seed(1)
        seen.append(SystemEntropy().uniform(64))
        seen.append(SystemEntropy().normal(64, 1.0))
    values = np.concatenate(seen)
    assert len(np.unique(values)) == len(values)


def test_a_forked_process_draws_other_numbers_than_its_parent() -> None:
    source = SystemEntropy()
    source.normal(8, 1.0)  # whatever state there might be exists before the fork
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, source.normal(64, 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        theirs = np.frombuffer(stream.read(), dtype=np.float64)
    assert len(theirs) == 64
    assert not np.intersect1d(theirs, source.normal(64, 1.0)).size


NUMBERS = """
from consilium_client.training.entropy import SystemEntropy
import numpy
numpy.random.seed(1)
print(*SystemEntropy().normal(32, 1.0).tolist())
"""


def test_a_restarted_process_draws_other_numbers() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", NUMBERS], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    values = [value for run in runs for value in run.stdout.split()]
    assert len(values) == len(set(values)) == 64


def test_rounds_of_one_mechanism_share_neither_noise_nor_samples() -> None:
    facts, engine = mechanism(steps=1, sampling_rate=0.5), rows(200)
    released = []
    for _ in range(4):
        torch.manual_seed(1)
        np.random.seed(1)
        released.append(facts.begin().step(200, engine).numpy())
    values = np.stack(released).astype(np.float64)
    values -= values.mean(axis=1, keepdims=True)
    correlation = np.corrcoef(values)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 6 / np.sqrt(SIZE)
    assert len({tuple(drawn) for drawn in engine.asked}) == 4


# --- sampling ----------------------------------------------------------------------------------


def test_patients_are_drawn_one_by_one_at_the_public_rate() -> None:
    patients, steps, rate = 40, 1500, 0.15
    run, engine = mechanism(steps=steps, sampling_rate=rate).begin(), rows(patients, size=1)
    for _ in range(steps):
        run.step(patients, engine)
    counts = np.zeros((steps, patients))
    for step, drawn in enumerate(engine.asked):
        counts[step, drawn] = 1
    error = np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(counts.mean(axis=0) - rate).max() < 5.5 * error
    # Poisson sampling: the number drawn varies as a binomial does; shuffling would fix it.
    sizes = counts.sum(axis=1)
    assert sizes.var() == pytest.approx(patients * rate * (1 - rate), rel=0.25)


def test_a_rate_of_one_draws_every_patient() -> None:
    run, engine = mechanism(sampling_rate=1.0).begin(), rows(30)
    run.step(30, engine)
    assert engine.asked == [list(range(30))]


def test_an_empty_draw_is_a_step_of_noise_alone_and_is_charged() -> None:
    facts = mechanism(sampling_rate=1e-12, steps=1)
    run, engine = facts.begin(), rows(3, value=1e6)
    released = run.step(3, engine)
    assert engine.asked == []
    claimed = facts.noise_multiplier * facts.clip_norm / facts.denominator
    assert float(released.std()) == pytest.approx(claimed, rel=0.2)
    assert run.realised() == facts.event


def test_the_divisor_is_public_and_not_the_number_drawn() -> None:
    facts = mechanism(sampling_rate=1.0, noise_multiplier=1e-6, clip_norm=100.0)
    for patients in (1, 4):
        engine = rows(patients, value=0.5, size=4)
        released = facts.begin().step(patients, engine)
        assert released.numpy() == pytest.approx(patients * 0.5 / facts.denominator, rel=1e-2)


# --- what was done, and what was claimed ---------------------------------------------------------


def run_through(facts: Mechanism, patients: int = 50, entropy: Any = None) -> PrivacyEvent:
    run, engine = facts.begin(entropy), rows(patients)
    for _ in range(facts.steps):
        run.step(patients, engine)
    return run.realised()


@pytest.mark.parametrize("clip", [0.7, 0.1, 3.3, 1e-3])
def test_what_a_right_run_realised_is_what_it_claimed(clip: float) -> None:
    facts = mechanism(clip_norm=clip)
    assert require_truth(facts.event, run_through(facts)) == facts.event


def test_the_round_of_a_study_claims_the_events_of_the_study() -> None:
    parameters = PrivacyParameters(0.2, 0.5, 1.4, steps_per_round=3, rounds=9, delta=1e-3)
    facts = Mechanism.for_round(parameters, cohort_size=40)
    assert facts.event == parameters.event_per_round
    assert facts.denominator == pytest.approx(8.0)
    with pytest.raises(ConsiliumError, match=r"privacy\.cohort"):
        Mechanism.for_round(parameters, cohort_size=0)


@dataclass
class Scaled(SystemEntropy):
    """Entropy with a fault: its noise is too small, or it draws too many or too few patients."""

    noise: float = 1.0
    uniforms: float = 1.0

    def uniform(self, count: int) -> NDArray[np.float64]:
        return super().uniform(count) * self.uniforms

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        return SystemEntropy().normal(count, standard_deviation) * self.noise


@pytest.mark.parametrize("noise", [0.0, 0.5, 0.9, 1.1])
def test_noise_that_is_not_what_was_asked_for_is_found_by_measuring(noise: float) -> None:
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*deviation"):
        run_through(mechanism(), entropy=Scaled(noise=noise))


class Patchy(SystemEntropy):
    """Entropy that forgets the noise of a few values, as a forgotten tensor would."""

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        noise = super().normal(count, standard_deviation)
        noise[10:18] = 0.0
        return noise


def test_a_small_tensor_without_noise_is_found_among_many_that_have_it() -> None:
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*no noise"):
        run_through(mechanism(), entropy=Patchy())


@pytest.mark.parametrize("uniforms", [0.0, 0.3, 5.0])
def test_a_sampler_that_draws_at_another_rate_is_found_by_counting(uniforms: float) -> None:
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*rate"):
        run_through(mechanism(), entropy=Scaled(uniforms=uniforms))


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_the_mechanisms_dp_event_costs_what_its_ledger_event_costs(rate: float) -> None:
    from dp_accounting.pld import PLDAccountant

    from consilium_common.privacy.accounting import epsilon_of

    facts = mechanism(sampling_rate=rate, steps=40)
    accountant = PLDAccountant()
    assert accountant.supports(facts.dp_event)
    accountant.compose(facts.dp_event)
    assert epsilon_of([facts.event], 1e-3) == pytest.approx(accountant.get_epsilon(1e-3), abs=0.02)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.65}, {"sampling_rate": 0.6}, {"clip_norm": 1.4}]
)
def test_a_mechanism_changed_in_mid_run_is_found(change: dict[str, float]) -> None:
    facts = mechanism()
    run, engine = facts.begin(), rows(50)
    run.step(50, engine)
    for name, value in change.items():
        object.__setattr__(facts, name, value)  # past what frozen allows
    run.step(50, engine)
    if "clip_norm" in change:  # noise follows the clip norm: the multiplier is still the truth
        assert run.realised().noise_multiplier == pytest.approx(1.3)
        return
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*changed"):
        run.realised()


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 1.2}, {"sampling_rate": 0.31}, {"steps": 4}, {"steps": 6}]
)
def test_a_mechanism_other_than_the_one_charged_is_refused(change: dict[str, Any]) -> None:
    charged = mechanism().event
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*" + next(iter(change))):
        require_truth(charged, run_through(mechanism(**change)))


def test_a_step_beyond_the_rounds_last_is_refused() -> None:
    run, engine = mechanism(steps=1).begin(), rows(1)
    run.step(1, engine)
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*beyond"):
        run.step(1, engine)


def test_an_engine_that_returns_too_few_or_too_many_rows_is_refused() -> None:
    class Wrong(Rows):
        def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
            yield torch.zeros(len(patients) + 1, SIZE)

    run = mechanism(sampling_rate=1.0).begin()
    with pytest.raises(ConsiliumError, match=r"privacy\.truth.*rows"):
        run.step(4, Wrong(np.zeros((4, SIZE), dtype=np.float32)))


def test_a_step_that_fails_half_way_is_counted_as_made() -> None:
    class Broken(Rows):
        def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
            raise OSError("disk")

    facts = mechanism(sampling_rate=1.0, steps=2)
    run = facts.begin()
    with pytest.raises(OSError, match="disk"):
        run.step(2, Broken(np.zeros((2, SIZE), dtype=np.float32)))
    run.step(2, rows(2))
    with pytest.raises(ConsiliumError, match=r"privacy\.truth"):
        run.step(2, rows(2))


def test_a_run_without_a_step_claims_nothing() -> None:
    with pytest.raises(ConsiliumError, match=r"privacy\.truth"):
        mechanism().begin().realised()
