"""Covariates beside an image: in the study, as channels, through every engine, and learnt from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_samples import ENGINES, engine_of, patients_of, rows_of, small_study, task_of
from hypothesis import given, settings
from hypothesis import strategies as st
from study_samples import study_of
from training_samples import PRIVATE, MemoryCase, MemoryCohort, MemoryPatient, classification_study

from consilium_client.auditing.network import NetworkPatients
from consilium_client.training.patches import PatchSource
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import (
    build_network,
    initial_weights,
    network_problems,
    tensor_specs,
)
from consilium_common.study.covariates import covariate_channels, encode, input_channels
from consilium_common.study.plan import describe
from consilium_common.study.schema import Study

COVARIATES: list[dict[str, Any]] = [
    {"kind": "number", "name": "age", "centre": 60, "scale": 20},
    {"kind": "category", "name": "sex", "values": ["f", "m"]},
]


def with_covariates(study: Study) -> Study:
    value = study.to_canonical()
    value["task"]["covariates"] = COVARIATES
    return Study.model_validate(value)


def test_a_number_is_scaled_and_a_word_is_one_of_its_list() -> None:
    task = with_covariates(classification_study()).task
    assert (covariate_channels(task), input_channels(task)) == (4, 5)
    assert encode(task, {"age": 80, "sex": " M "}) == [1.0, 1.0, 0.0, 1.0]
    assert encode(task, {"age": None}) == [0.0, 0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=30)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_number_swamps_the_image(value: float) -> None:
    task = with_covariates(classification_study()).task
    assert max(map(abs, encode(task, {"age": value}))) <= 10


@pytest.mark.parametrize("values", [{"age": "old"}, {"sex": "x"}, {"sex": 1.0}])
def test_what_a_study_does_not_know_is_refused_without_saying_it(values: dict[str, Any]) -> None:
    with pytest.raises(ConsiliumError) as caught:
        encode(with_covariates(classification_study()).task, values)
    assert caught.value.code == "data.covariate"
    assert next(iter(values)) in caught.value.message
    assert "old" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kind": "segmentation"}, "classification only"),
        ({"covariates": [COVARIATES[0]] * 2}, "covariates has a name twice"),
        ({"covariates": [COVARIATES[0] | {"scale": 0}]}, "greater than 0"),
        ({"covariates": [COVARIATES[1] | {"values": ["f", "f"]}]}, "a word twice"),
        ({"covariates": [{"name": "age", "centre": 0, "scale": 1}]}, "kind"),
    ],
)
def test_covariates_that_make_no_sense_are_refused(change: dict[str, Any], part: str) -> None:
    value = with_covariates(study_of("resnet10", kind="classification")).to_canonical()
    value["task"] |= change
    with pytest.raises(ValueError, match=part):
        Study.model_validate(value)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", ["resnet10", "densenet121"])
def test_every_classifier_takes_covariates_and_answers_to_them(name: str, dimensions: int) -> None:
    study = with_covariates(small_study(name, dimensions))
    assert not network_problems(study)
    network = build_network(study).eval()
    assert [spec.name for spec in tensor_specs(study)] == sorted(network.state_dict())
    pixels = torch.randn(2, 1, *(32,) * dimensions)
    planes = torch.tensor(encode(study.task, {"age": 70, "sex": "f"}))

    def of(values: Any) -> Any:
        full = values.reshape(1, -1, *(1,) * dimensions).expand(2, -1, *pixels.shape[2:])
        return network(torch.cat([pixels, full], dim=1))

    assert of(planes).shape == (2, 2)
    assert not torch.allclose(of(planes), of(torch.zeros(4)))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_loops_gradients_with_covariates(engine: str) -> None:
    study = with_covariates(small_study("resnet10", 2))
    patients = [
        (torch.cat([x, torch.randn(len(x), 4, 1, 1).expand(-1, -1, *x.shape[2:])], dim=1), y)
        for x, y in patients_of(study, 3)
    ]
    network = build_network(study).double().train()
    task = task_of(study, [(x.double(), y.double()) for x, y in patients], network)
    expected = rows_of(engine_of("loop", task), range(3))
    found = rows_of(engine_of(engine, task), range(3))
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def told_by_age(count: int, seed: int) -> list[MemoryPatient]:
    """Return patients whose image is noise: the class follows from the first covariate alone."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = number % 3
        planes = np.zeros((4, 32, 32), dtype=np.float32)
        planes[0], planes[1] = label - 1 + rng.normal(0, 0.1), 1
        image = np.concatenate([rng.standard_normal((1, 32, 32)).astype(np.float32), planes])
        case = MemoryCase(f"case-{number}", image, np.array(label, dtype=np.int64))
        made.append(MemoryPatient((case,)))
    return made


def test_training_learns_from_covariates_what_the_image_does_not_say() -> None:
    # New noise at each step, so that no image can be learnt by heart.
    study = with_covariates(
        classification_study(
            steps_per_round=80, augmentation={"noise": 1.0}, optimiser={"learning_rate": 1e-2}
        )
    )
    cohort = MemoryCohort({"train": told_by_age(60, 0), "test": told_by_age(30, 1)})
    session = TrainingSession(study, cohort)
    weights = initial_weights(study)
    assert (session.evaluate(weights, "test").accuracy or 0) < 0.7
    result = session.train(weights, 0, 60)
    assert (session.evaluate(result.tensors, "test").accuracy or 0) > 0.9


def test_a_private_round_with_covariates_releases_every_tensor() -> None:
    study = with_covariates(classification_study(privacy=PRIVATE, steps_per_round=2))
    cohort = MemoryCohort({"train": told_by_age(6, 0)})
    result = TrainingSession(study, cohort).train(initial_weights(study), 0, 6)
    assert result.realised is not None
    assert {"joined.weight", "classes.bias"} <= set(result.tensors)


def test_augmentation_changes_pixels_and_never_a_covariate() -> None:
    changes = {"flip": 1.0, "rotate90": 1.0, "gain": 0.5, "shift": 0.5, "noise": 0.5, "copies": 3}
    study = with_covariates(classification_study(augmentation=changes))
    patients = told_by_age(3, 0)
    source = PatchSource(study, patients)
    images, _ = source.batch(source.cases, np.random.default_rng(0))
    assert images.shape == (9, 5, 32, 32)
    before = np.repeat([p.cases[0].image() for p in patients], 3, axis=0)
    assert np.array_equal(images[:, 1:], before[:, 1:])
    assert not np.isclose(images[:, 0], before[:, 0]).all(axis=(1, 2)).any()


def test_the_audit_attacks_a_study_with_covariates() -> None:
    study = with_covariates(classification_study(privacy=PRIVATE))
    engine = NetworkPatients(study).engine([1.0, 1.0])
    assert sum(len(rows) for rows in engine.gradients([0, 1])) == 2


def test_the_plan_names_the_covariates() -> None:
    (said,) = [
        line for line in describe(with_covariates(classification_study())) if "covariates" in line
    ]
    assert "age (a number; less 60, divided by 20), sex (f or m)" in said
