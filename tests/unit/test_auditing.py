"""The attack passes the installed code, and finds each fault that is planted in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from training_samples import PRIVATE, segmentation_study
from typer.testing import CliRunner

from consilium_client.auditing import attack as attack_module
from consilium_client.auditing import cli
from consilium_client.auditing import network as network_module
from consilium_client.auditing.attack import AttackReport, Effort, attack
from consilium_client.auditing.network import (
    NetworkPatients,
    network_distinguishing_check,
    network_influence_check,
)
from consilium_client.auditing.one_run import OneRun, one_run
from consilium_client.auditing.sampling import sampling_checks
from consilium_client.auditing.subject import Begin, Release, Subject, installed, subject_of
from consilium_client.training.clipping import clipped_sum
from consilium_client.training.entropy import SystemEntropy
from consilium_client.training.mechanism import Mechanism
from consilium_common import console
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import PrivacyParameters
from consilium_common.study.schema import AdaptiveClipping, AutomaticClipping

EFFORT = Effort(canaries=1000, releases=1000, steps=16)
PARAMETERS = PrivacyParameters(
    sampling_rate=0.5,
    clip_norm=0.2,
    noise_multiplier=2.0,
    steps_per_round=8,
    rounds=2,
    delta=1e-5,
)
TENSORS = (("first.weight", 900), ("first.bias", 4), ("last.weight", 2096))


def subject(begin: Begin = installed) -> Subject:
    return Subject(PARAMETERS, TENSORS, begin=begin)


@pytest.fixture(scope="module")
def right() -> AttackReport:
    return attack(subject(), EFFORT)


# --- the right code ----------------------------------------------------------------------------


def test_the_installed_code_is_not_refuted(right: AttackReport) -> None:
    assert right.refuted == ()
    right.require_unrefuted()
    # The attack sees something: it is not that nothing could have been found.
    assert 0.2 < right.run.lower_bound < right.run.claimed < right.run.reach
    assert right.run.lower_bound < right.run.estimate
    assert right.run.estimate_low < right.run.claimed


def test_what_is_said_of_the_false_alarm_adds_up(right: AttackReport) -> None:
    assert sum(check.false_alarm for check in right.checks) <= 1e-6 * (1 + 1e-9)
    assert all(check.false_alarm > 0 for check in right.checks)


@pytest.mark.parametrize(
    "clipping",
    [
        AutomaticClipping(kind="automatic", stability=0.5),
        AdaptiveClipping(kind="adaptive", count_noise=3.0),
    ],
    ids=lambda clipping: clipping.kind,
)
def test_the_other_rules_of_clipping_are_not_refuted(clipping: Any) -> None:
    report = attack(replace(subject(), clipping=clipping), Effort(200, 600, 8))
    assert report.refuted == ()


# --- planted faults ----------------------------------------------------------------------------


def half_the_noise(mechanism: Mechanism) -> Release:
    return installed(replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2))


def a_tenth_less_noise(mechanism: Mechanism) -> Release:
    return installed(replace(mechanism, noise_multiplier=mechanism.noise_multiplier * 0.9))


def own_step(sum_of: Callable[[Any, Any, list[int], float], Any]) -> Begin:
    """Return a mechanism that is right but for how it adds up the drawn patients."""

    def begin(mechanism: Mechanism) -> Release:
        entropy, clip = SystemEntropy(), mechanism.clip_norm

        def step(population: int, engine: Any) -> Any:
            drawn = mechanism.sample(population, entropy)
            total = sum_of(mechanism, engine, drawn, clip)
            noise = entropy.normal(engine.size, mechanism.noise_multiplier * clip)
            return ((total + torch.from_numpy(noise)) / mechanism.denominator).float()

        return step

    return begin


def clipped_by_slice(mechanism: Mechanism, engine: Any, drawn: list[int], clip: float) -> Any:
    total = torch.zeros(engine.size, dtype=torch.float64)
    for patient in drawn:
        slices = engine.slice_gradients(patient).double()
        norms = slices.norm(dim=1, keepdim=True)
        total += (slices * (clip / norms.clamp_min(clip))).sum(dim=0)
    return total


def not_clipped(mechanism: Mechanism, engine: Any, drawn: list[int], clip: float) -> Any:
    rows = [row.double().sum(0) for row in engine.gradients(drawn)]
    return torch.stack(rows).sum(0) if rows else torch.zeros(engine.size).double()


class Fixed:
    """The installed mechanism, fed with entropy that an attacker or a bug has shaped."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self._methods = methods

    def uniform(self, count: int) -> Any:
        return self._methods.get("uniform", SystemEntropy().uniform)(count)

    def normal(self, count: int, deviation: float) -> Any:
        return self._methods.get("normal", SystemEntropy().normal)(count, deviation)


def silent_tensor(mechanism: Mechanism) -> Release:
    start = TENSORS[0][1]

    def normal(count: int, deviation: float) -> Any:
        noise = SystemEntropy().normal(count, deviation)
        noise[start : start + TENSORS[1][1]] = 0
        return noise

    return mechanism.begin(Fixed(normal=normal)).step


def no_noise(mechanism: Mechanism) -> Release:
    return mechanism.begin(Fixed(normal=lambda n, s: np.zeros(n))).step


def seeded_each_round(mechanism: Mechanism) -> Release:
    rng = np.random.default_rng(7)
    return mechanism.begin(Fixed(normal=lambda n, s: rng.normal(0, s, n))).step


def noise_kept_for_two_steps(mechanism: Mechanism) -> Release:
    kept: list[Any] = []

    def normal(count: int, deviation: float) -> Any:
        if kept:
            return kept.pop()
        kept.append(SystemEntropy().normal(count, deviation))
        return kept[0].copy()

    return mechanism.begin(Fixed(normal=normal)).step


def one_draw_for_two_values(mechanism: Mechanism) -> Release:
    def normal(count: int, deviation: float) -> Any:
        return np.resize(SystemEntropy().normal(-(-count // 2), deviation), count)

    return mechanism.begin(Fixed(normal=normal)).step


def laplace(mechanism: Mechanism) -> Release:
    rng = np.random.default_rng()
    return mechanism.begin(
        Fixed(normal=lambda n, s: rng.laplace(0, s / np.sqrt(2), n))  # the same deviation
    ).step


def sampler(choose: Callable[[int, float], Iterator[list[int]]]) -> Begin:
    """Return a mechanism whose draws come from ``choose(population, rate)``, one a step."""

    def begin(mechanism: Mechanism) -> Release:
        chosen: list[Iterator[list[int]]] = []

        def uniform(count: int) -> Any:
            if not chosen:
                chosen.append(choose(count, mechanism.sampling_rate))
            numbers = np.full(count, np.nextafter(1, 0))
            numbers[next(chosen[0])] = 0.0
            return numbers

        return mechanism.begin(Fixed(uniform=uniform)).step

    return begin


def shuffled(population: int, rate: float) -> Iterator[list[int]]:
    rng, size = np.random.default_rng(), max(1, round(rate * population))
    while True:
        order = rng.permutation(population).tolist()
        for start in range(0, max(1, population), size):
            yield order[start : start + size]


def of_fixed_size(population: int, rate: float) -> Iterator[list[int]]:
    rng, size = np.random.default_rng(), round(rate * population)
    while True:
        yield rng.choice(population, size, replace=False).tolist()


def in_couples(population: int, rate: float) -> Iterator[list[int]]:
    rng = np.random.default_rng()
    while True:
        pairs = np.flatnonzero(rng.random(population // 2) < rate)
        yield sorted([*(2 * pairs).tolist(), *(2 * pairs + 1).tolist()])


def too_often(population: int, rate: float) -> Iterator[list[int]]:
    rng = np.random.default_rng()
    while True:
        yield np.flatnonzero(rng.random(population) < 1.2 * rate).tolist()


@pytest.mark.parametrize(
    ("begin", "found_by"),
    [
        (half_the_noise, {"noise-per-value", "noise-per-tensor"}),
        (a_tenth_less_noise, {"noise-per-tensor"}),
        (own_step(clipped_by_slice), {"influence", "distinguishing", "one-run"}),
        (own_step(not_clipped), {"influence"}),
        (silent_tensor, {"noise-per-tensor"}),
        (no_noise, {"noise-per-tensor", "noise-shape", "distinguishing", "one-run"}),
        (seeded_each_round, {"noise-repeats", "noise-between-releases"}),
        (noise_kept_for_two_steps, {"noise-repeats", "noise-between-releases"}),
        (one_draw_for_two_values, {"noise-between-values"}),
        (laplace, {"noise-shape"}),
        (sampler(shuffled), {"sampling-size", "sampling-between-steps"}),
        (sampler(of_fixed_size), {"sampling-size"}),
        (sampler(in_couples), {"sampling-between-patients", "sampling-size"}),
        (sampler(too_often), {"sampling-rate"}),
    ],
    ids=[
        "halved-noise",
        "a-tenth-less-noise",
        "clipped-by-slice",
        "not-clipped",
        "no-noise-on-one-tensor",
        "no-noise",
        "seeded-each-round",
        "noise-used-in-two-steps",
        "one-draw-for-two-values",
        "laplace-noise",
        "shuffled",
        "batches-of-fixed-size",
        "patients-in-couples",
        "drawn-too-often",
    ],
)
def test_a_planted_fault_is_found(begin: Begin, found_by: set[str]) -> None:
    report = attack(subject(begin), EFFORT)
    assert found_by <= set(report.refuted)
    with pytest.raises(ConsiliumError) as caught:
        report.require_unrefuted()
    assert caught.value.code == "privacy.attack"
    assert caught.value.exit_status == 6
    assert all(name in caught.value.message for name in report.refuted)


def test_one_run_alone_tells_halved_noise_and_clipping_by_slice_from_the_right_code() -> None:
    def run(begin: Begin) -> OneRun:
        wide = Subject(PARAMETERS, (("weight", 8000),), begin=begin)
        return one_run(wide, 1500, steps=16, delta=1e-5, confidence=0.95)

    right, halved = run(installed), run(half_the_noise)
    by_slice = run(own_step(clipped_by_slice))
    assert right.passed
    assert right.lower_bound < right.estimate < right.claimed * 1.1
    assert not halved.passed
    assert halved.claimed < halved.estimate_low
    assert not by_slice.passed
    assert halved.estimate < by_slice.estimate


# --- through the study's own network -----------------------------------------------------------


def counted_twice(mechanism: Mechanism, engine: Any, drawn: list[int], clip: float) -> Any:
    return 2 * clipped_sum(engine.gradients(drawn), clip, engine.size, "cpu")[0]


def counted_four_times(mechanism: Mechanism, engine: Any, drawn: list[int], clip: float) -> Any:
    return 2 * counted_twice(mechanism, engine, drawn, clip)


@pytest.mark.parametrize("engine", ["loop", "vmap", "opacus"])
def test_no_engine_is_refuted_on_a_real_network(engine: str) -> None:
    study = segmentation_study(privacy=PRIVATE | {"engine": engine})
    patients = NetworkPatients(study)
    assert patients.choice.name == engine
    influence = network_influence_check(subject_of(study), patients, 1e-6)
    assert influence.passed
    # The patients do reach the bound: the check would see one that goes beyond.
    assert influence.observed > 0.99


@pytest.mark.parametrize("fault", [counted_twice, not_clipped])
def test_a_fault_is_seen_through_the_network(fault: Any) -> None:
    study = segmentation_study(privacy=PRIVATE)
    faulty = replace(subject_of(study), begin=own_step(fault))
    assert not network_influence_check(faulty, NetworkPatients(study), 1e-6).passed


def test_a_patient_behind_the_network_is_told_no_better_than_claimed_but_for_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random patients differ in what they show. With so many releases a fault of four patients'
    # worth is found each time (the least evidence of 30 runs was 3.1 against a bound of 2.0).
    monkeypatch.setattr(network_module, "_MOST_RELEASES", 500)
    study = segmentation_study(privacy=PRIVATE)
    right, patients = subject_of(study), NetworkPatients(study)
    check = network_distinguishing_check(right, patients, seconds=600, false_alarm=1e-6)
    assert check is not None
    assert check.passed
    faulty = replace(right, begin=own_step(counted_four_times))
    found = network_distinguishing_check(faulty, patients, seconds=600, false_alarm=1e-6)
    assert found is not None
    assert not found.passed


def test_a_network_too_slow_to_refute_anything_is_said_to_be_left_out() -> None:
    study = segmentation_study(privacy=PRIVATE)
    effort = Effort(canaries=24, releases=100, steps=1, network_seconds=0.0)
    report = attack(subject_of(study), effort, patients=NetworkPatients(study))
    assert len(report.omitted) == 1
    assert "network-influence" in {check.name for check in report.checks}


def test_dropout_is_not_taken_for_a_patients_influence() -> None:
    study = segmentation_study(privacy=PRIVATE)
    arguments = study.model.arguments | {"dropout": 0.5}
    model = study.model.model_copy(update={"arguments": arguments})
    study = study.model_copy(update={"model": model})
    assert network_influence_check(subject_of(study), NetworkPatients(study), 1e-6).passed


def test_a_rare_draw_is_tested_at_its_rate_and_at_one_that_shows_pairs() -> None:
    rare = replace(subject(), parameters=replace(PARAMETERS, sampling_rate=0.004))
    assert [check.passed for check in sampling_checks(rare, 1500, 1e-6)] == [True] * 4
    doubled = replace(rare, begin=sampler(lambda n, q: too_often(n, 2 * q)))
    assert not sampling_checks(doubled, 1500, 1e-6)[0].passed
    order = replace(rare, begin=sampler(shuffled))
    assert not all(check.passed for check in sampling_checks(order, 1500, 1e-6))


def test_frozen_tensors_are_no_part_of_the_claim() -> None:
    study = segmentation_study(privacy=PRIVATE)
    model = study.model.model_copy(update={"trainable": "first+last"})
    part = subject_of(study.model_copy(update={"model": model}))
    assert 0 < part.size < subject_of(study).size


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    small = Effort(canaries=100, releases=400, steps=4, network_seconds=0.3)
    monkeypatch.setattr(attack_module, "QUICK", small)
    monkeypatch.setattr(console.MODE, "json", True)
    app = typer.Typer()
    app.command()(cli.attack)

    def run(privacy: dict[str, Any], *options: str) -> Any:
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps(segmentation_study(privacy=privacy).to_canonical()))
        return CliRunner().invoke(app, ["--study", str(path), "--quick", *options])

    return run


def test_the_command_says_what_it_tested_and_what_it_found(run: Callable[..., Any]) -> None:
    done = run(PRIVATE)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert data["refuted"] == []
    assert (data["unit"], data["adjacency"]) == ("patient", "add-or-remove-one")
    assert {"noise-per-tensor", "sampling-size", "influence", "network-influence"} <= {
        check["name"] for check in data["checks"]
    }
    assert data["one_run"]["epsilon_lower_bound"] <= data["one_run"]["epsilon_claimed"]


def test_the_command_prints_for_people_what_it_does_not_show(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.MODE, "json", False)
    done = run(PRIVATE)
    assert done.exit_code == 0, done.output
    assert "No attack refuted the claim." in done.stdout
    assert "What this does not show: that ε holds." in done.stdout


def test_the_command_ends_with_status_6_where_the_installation_adds_too_little_noise(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SystemEntropy.normal
    monkeypatch.setattr(SystemEntropy, "normal", lambda self, n, s: whole(self, n, s / 2))
    done = run(PRIVATE)
    assert done.exit_code == 6
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "privacy.attack"
    assert "noise-per-tensor" in error["message"]


@pytest.mark.parametrize(
    ("privacy", "options", "code"),
    [
        ({"mode": "none"}, (), "study.not-private"),
        (PRIVATE, ("--canaries", "3"), "usage.canaries"),
        (PRIVATE, ("--canaries", "100000"), "usage.canaries"),
        (PRIVATE, ("--confidence", "1"), "usage.confidence"),
        (PRIVATE, ("--confidence", "nan"), "usage.confidence"),
    ],
)
def test_what_cannot_be_attacked_is_refused(
    run: Callable[..., Any], privacy: dict[str, Any], options: tuple[str, ...], code: str
) -> None:
    done = run(privacy, *options)
    assert json.loads(done.stdout)["error"]["code"] == code
    assert done.exit_code != 0
