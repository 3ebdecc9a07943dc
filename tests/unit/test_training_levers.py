"""What closes the gap to training without privacy: optimiser, averaged copies, frozen layers."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from training_samples import (
    PRIVATE,
    classification_cohort,
    classification_study,
    segmentation_cohort,
    segmentation_study,
)

from consilium_client.training.corrected_adam import CorrectedAdamW
from consilium_client.training.optimiser import build_optimiser
from consilium_client.training.patches import PatchSource
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights, trained_specs
from consilium_common.study import Study
from consilium_common.study.schema import Optimiser


def changed(study: Study, **parts: dict[str, Any]) -> Study:
    """Return a study with some keys of its parts replaced."""
    value = study.to_canonical()
    for part, changes in parts.items():
        value[part] |= changes
    return Study.model_validate(value)


# --- AdamW without the noise's share -------------------------------------------------------------


def steps_of(optimiser: Any, parameter: Any, gradients: Any, noise: float = 0.0) -> Any:
    for gradient in gradients:
        for group in optimiser.param_groups:
            group["noise_deviation"] = noise
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


def test_without_noise_corrected_adam_is_adamw() -> None:
    gradients = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (CorrectedAdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.ones(50))
        optimiser = kind([parameter], lr=1e-2, weight_decay=0.1)
        found.append(steps_of(optimiser, parameter, gradients))
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_the_second_moment_is_freed_of_the_noises_variance() -> None:
    # A signal far below its noise: AdamW divides by the noise, corrected AdamW by the signal or
    # by what cannot be told from noise, whichever is larger.
    steps, noise, signal = 2000, 1.0, 0.5
    generator = torch.Generator().manual_seed(0)
    gradients = signal + noise * torch.randn(steps, 400, generator=generator)
    moved = []
    for kind, known in ((CorrectedAdamW, noise), (torch.optim.AdamW, 0.0)):
        parameter = torch.nn.Parameter(torch.zeros(400))
        optimiser = kind([parameter], lr=1e-3, weight_decay=0.0)
        steps_of(optimiser, parameter, gradients[:1000], known)
        before = parameter.detach().clone()
        moved.append(
            float((before - steps_of(optimiser, parameter, gradients[1000:], known)).mean())
        )
    # Of the exact ratio sqrt(signal² + noise²) / signal = 2.24, but for the variance of v.
    assert moved[0] / moved[1] == pytest.approx(math.sqrt(signal**2 + noise**2) / signal, rel=0.1)


def test_of_pure_noise_steps_stay_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimiser = CorrectedAdamW([parameter], lr=1.0, weight_decay=0.0)
    before = torch.zeros(1000)
    for gradient in 1e-3 * torch.randn(40, 1000, generator=generator):
        after = steps_of(optimiser, parameter, [gradient], 1e-3).clone()
        assert float((after - before).abs().max()) < 6
        before = after


def test_a_changing_noise_is_averaged_as_the_squares_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimiser = CorrectedAdamW([parameter], lr=1.0, weight_decay=0.0)
    for noise in (1.0, 3.0):
        steps_of(optimiser, parameter, [torch.ones(3)], noise)
    state = optimiser.state[parameter]
    assert state["noise"] == pytest.approx(1e-3 * (0.999 * 1.0 + 9.0))
    # After n equal weights the standard error of a variance is sqrt(2 / n) of it.
    weights = np.array([0.999, 1.0]) * 1e-3
    assert state["squared_weights"] == pytest.approx(float((weights**2).sum()))


def test_a_study_builds_the_optimiser_it_names() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adamw-bc": CorrectedAdamW}
    for name, kind in kinds.items():
        assert type(build_optimiser(Optimiser(name=name), [parameter])) is kind


@pytest.mark.parametrize("name", ["sgd", "adamw-bc"])
def test_private_rounds_of_each_optimiser_learn(name: str) -> None:
    rate = {"sgd": 0.5, "adamw-bc": 1e-2}[name]
    study = segmentation_study(
        privacy=PRIVATE | {"noise_multiplier": 0.21, "sampling_rate": 1.0},
        steps_per_round=15,
        rounds=2,
        optimiser={"name": name, "learning_rate": rate, "momentum": 0.9},
    )
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    weights = initial_weights(study)
    for number in range(2):
        weights = session.train(weights, number, 6).tensors
    score = session.evaluate(weights, "test").mean_dice
    assert score is not None
    assert score > 0.6


# --- averaged copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_each_patch_comes_in_as_many_differently_changed_copies_as_asked(kind: str) -> None:
    augmentation = {"copies": 3, "noise": 0.5}
    if kind == "segmentation":
        study = segmentation_study(augmentation=augmentation)
        patients = segmentation_cohort(train=2).patients("train")
    else:
        study = classification_study(augmentation=augmentation)
        patients = classification_cohort(2).patients("train")
    source = PatchSource(study, patients)
    images, targets = source.patient_batch(0, 2, np.random.default_rng(0))
    assert len(images) == len(targets) == 6
    for first in (0, 3):
        for other in (first + 1, first + 2):
            assert not np.array_equal(images[first], images[other])
            # One patch: the noise is all they differ in, and the label does not.
            assert np.abs(images[first] - images[other]).std() < 1
            assert np.array_equal(targets[first], targets[other])


@pytest.mark.parametrize("engine", ["loop", "vmap", "opacus"])
def test_copies_cost_a_patient_nothing_and_every_engine_takes_them(engine: str) -> None:
    study = classification_study(
        privacy=PRIVATE | {"engine": engine},
        steps_per_round=2,
        patches_per_patient=1,
        augmentation={"flip": 0.5, "copies": 2},
    )
    session = TrainingSession(study, classification_cohort(6), device="cpu")
    result = session.train(initial_weights(study), 0, 6)
    assert result.realised is not None
    assert (result.realised.steps, result.realised.noise_multiplier) == (2, 1.1)
    assert math.isnan(result.loss) or result.loss > 0


# --- parts of a network --------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("trainable", ["first+last", "adapters", ["*bias"]])
def test_only_what_is_trained_comes_back_and_the_rest_stays(trainable: Any, private: bool) -> None:
    study = segmentation_study(privacy=PRIVATE if private else None, steps_per_round=1)
    study = changed(study, model={"trainable": trainable, "adapter_rank": 2})
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    start = initial_weights(study)
    result = session.train(start, 0, 6)
    assert list(result.tensors) == [spec.name for spec in trained_specs(study)]
    assert 0 < len(result.tensors) < len(start)
    assert any(not np.array_equal(start[n], tensor) for n, tensor in result.tensors.items())
    everything = session._network.state_dict()
    for name in start.keys() - result.tensors.keys():
        assert np.array_equal(everything[name].numpy(), start[name])


# --- clipping and engine in a session ------------------------------------------------------------


def test_adaptive_clipping_goes_on_in_the_next_round_where_it_stood() -> None:
    study = segmentation_study(
        privacy=PRIVATE | {"clipping": {"kind": "adaptive", "rate": 0.5}, "clip_norm": 50.0},
        steps_per_round=3,
    )
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    first = session.train(initial_weights(study), 0, 60)
    assert first.clip_norm is not None
    # Every gradient is far below 50, so C falls, by a tenth and the count's noise.
    assert first.clip_norm != 50.0
    second = session.train(initial_weights(study), 1, 60, clip_norm=first.clip_norm)
    assert second.clip_norm is not None
    assert abs(math.log(second.clip_norm / first.clip_norm)) < 3
    assert second.realised == first.realised


def test_flat_clipping_stays_where_the_study_put_it() -> None:
    study = segmentation_study(privacy=PRIVATE, steps_per_round=1)
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    assert session.train(initial_weights(study), 0, 6, clip_norm=9.9).clip_norm == 0.3
    plain = TrainingSession(segmentation_study(), segmentation_cohort(), device="cpu")
    assert plain.train(initial_weights(segmentation_study()), 0, 6).clip_norm is None


def test_the_log_says_in_one_line_which_engine_runs_and_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        TrainingSession(segmentation_study(privacy=PRIVATE), segmentation_cohort(), device="cpu")
    (line,) = [r.getMessage() for r in caplog.records if "gradient engine" in r.getMessage()]
    assert line.startswith("gradient engine: loop (")


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_an_engine_that_cannot_run_here_is_refused_before_any_round(engine: str) -> None:
    study = segmentation_study(privacy=PRIVATE | {"engine": engine}, precision="bfloat16")
    with pytest.raises(ConsiliumError, match=r"privacy\.engine"):
        TrainingSession(study, segmentation_cohort(), device="cpu")


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
@pytest.mark.parametrize("kind", ["automatic", "adaptive"])
def test_every_engine_trains_under_every_clipping(engine: str, kind: str) -> None:
    privacy = PRIVATE | {"engine": engine, "clipping": {"kind": kind}}
    study = segmentation_study(privacy=privacy, steps_per_round=2)
    cohort = segmentation_cohort(train=4)
    cohort.splits["train"][1].cases[0].pixels[:] = np.nan
    session = TrainingSession(study, cohort, device="cpu")
    result = session.train(initial_weights(study), 0, 4)
    assert all(np.isfinite(tensor).all() for tensor in result.tensors.values())
    assert result.realised is not None
    assert result.realised.noise_multiplier == 1.1
