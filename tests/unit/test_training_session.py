"""A training session: rounds, privacy and evaluation of one study at one site."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from training_samples import (
    PRIVATE,
    MemoryCohort,
    classification_cohort,
    classification_study,
    segmentation_cohort,
    segmentation_patient,
    segmentation_study,
)

from consilium_client.training.compute import Compute, choose_compute
from consilium_client.training.losses import build_loss, one_hot
from consilium_client.training.optimiser import learning_rate
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import build_network, initial_weights
from consilium_common.privacy.accounting import parameters
from consilium_common.study import Study
from consilium_common.study.schema import Optimiser

Weights = dict[str, np.ndarray]


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


# --- without privacy ---------------------------------------------------------------------------


def test_federated_rounds_learn_to_segment() -> None:
    study = segmentation_study(steps_per_round=15, rounds=3)
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    weights = initial_weights(study)
    before = session.evaluate(weights, "test").mean_dice
    for number in range(3):
        weights = session.train(weights, number, 6).tensors
    after = session.evaluate(weights, "test").mean_dice
    assert before is not None
    assert after is not None
    assert before < 0.6
    assert after > 0.9


@pytest.mark.parametrize("multi_label", [False, True])
def test_federated_rounds_learn_to_classify(multi_label: bool) -> None:
    study = classification_study(multi_label=multi_label)
    cohort = classification_cohort(multi_label=multi_label)
    session = TrainingSession(study, cohort, device="cpu")
    weights = initial_weights(study)
    for number in range(2):
        weights = session.train(weights, number, 24).tensors
    evaluation = session.evaluate(weights, "test")
    assert evaluation.accuracy is not None
    assert evaluation.accuracy > 0.85
    assert min(figure.auc or 0 for figure in evaluation.auc) > 0.9
    probabilities = session.predict(weights, cohort.splits["test"][0].cases[0])
    assert probabilities.shape == (3,)
    assert multi_label or probabilities.sum() == pytest.approx(1.0)


def test_kernels_that_repeat_exactly_are_asked_for_where_no_noise_is_drawn() -> None:
    for study, exactly in (
        (segmentation_study(), True),
        (segmentation_study(privacy=PRIVATE), False),
    ):
        TrainingSession(study, segmentation_cohort(), device="cpu")
        assert torch.are_deterministic_algorithms_enabled() == exactly
        # An operation that has no such kernel is not a reason to refuse the study.
        assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_round_without_privacy_can_be_repeated_exactly() -> None:
    study = segmentation_study(augmentation={"flip": 0.5, "noise": 0.1})
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    start = initial_weights(study)
    first = session.train(start, 1, 6)
    session.train(start, 2, 6)
    second = session.train(start, 1, 6)
    assert equal(first.tensors, second.tensors)
    assert first.loss == second.loss
    assert first.realised is None


def test_rounds_differ_in_order_and_learning_rate() -> None:
    study = segmentation_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    start = initial_weights(study)
    first, last = (session.train(start, number, 6).tensors for number in (0, 3))
    moved = [sum(float(np.abs(t[n] - start[n]).sum()) for n in start) for t in (first, last)]
    assert moved[1] < 0.5 * moved[0]


def test_what_comes_back_is_float32_of_exactly_the_models_names_and_shapes() -> None:
    study = segmentation_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    start = initial_weights(study)
    for array in start.values():
        array.flags.writeable = False  # as they come from the wire
    before = {name: array.copy() for name, array in start.items()}
    result = session.train(start, 0, 6)
    assert {n: (a.shape, a.dtype) for n, a in result.tensors.items()} == {
        n: (a.shape, np.dtype("float32")) for n, a in start.items()
    }
    assert equal(start, before)
    kept = {name: array.copy() for name, array in result.tensors.items()}
    session.train(start, 1, 6)
    assert equal(result.tensors, kept)


def test_data_is_opened_once_for_all_rounds() -> None:
    study, cohort = segmentation_study(), segmentation_cohort()
    session = TrainingSession(study, cohort, device="cpu")
    for number in range(3):
        session.train(initial_weights(study), number, 6)
    assert cohort.asked.count("train") == 1


def test_progress_is_told_after_every_step() -> None:
    told: list[tuple[int, int]] = []
    study = segmentation_study(steps_per_round=3)
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    session.train(initial_weights(study), 0, 6, lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_loss_is_not_shown_where_a_result_is_printed() -> None:
    study = segmentation_study(steps_per_round=1)
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    result = session.train(initial_weights(study), 0, 6)
    assert math.isfinite(result.loss)
    assert "loss" not in repr(result)


def test_a_loss_that_is_not_finite_stops_the_round() -> None:
    cohort = segmentation_cohort(train=2)
    cohort.splits["train"][0].cases[0].pixels[:] = np.nan
    study = segmentation_study()
    session = TrainingSession(study, cohort, device="cpu")
    with pytest.raises(ConsiliumError, match=r"run\.diverged"):
        session.train(initial_weights(study), 0, 2)


def change_of(kind: str, weights: Weights) -> Weights:
    name = max(weights, key=lambda n: weights[n].size)
    match kind:
        case "missing":
            del weights[name]
        case "unknown":
            weights["extra"] = np.zeros(1, dtype=np.float32)
        case "shape":
            weights[name] = np.zeros((*weights[name].shape, 1), dtype=np.float32)
        case "broadcastable":
            weights[name] = np.zeros((1,) * weights[name].ndim, dtype=np.float32)
        case "dtype":
            weights[name] = weights[name].astype(np.float64)
    return weights


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "broadcastable", "dtype"])
def test_a_model_that_is_not_this_studys_is_refused(kind: str) -> None:
    study = segmentation_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    with pytest.raises(ConsiliumError, match=r"run\.bad-update"):
        session.train(change_of(kind, initial_weights(study)), 0, 6)


@pytest.mark.parametrize("number", [-1, 4])
def test_a_round_that_the_study_does_not_have_is_refused(number: int) -> None:
    study = segmentation_study(rounds=4)
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    with pytest.raises(ConsiliumError, match=r"run\.round"):
        session.train(initial_weights(study), number, 6)


def test_evaluation_covers_images_smaller_and_larger_than_a_patch() -> None:
    study = segmentation_study()
    cohort = MemoryCohort({"test": [segmentation_patient(i, shape=(12, 20, 33)) for i in range(2)]})
    session = TrainingSession(study, cohort, device="cpu")
    weights = initial_weights(study)
    evaluation = session.evaluate(weights, "test")
    assert [row.case_id for row in evaluation.rows] == ["case-0-0", "case-1-0"]
    prediction = session.predict(weights, cohort.splits["test"][0].cases[0])
    assert prediction.shape == (12, 20, 33)
    assert prediction.dtype == np.uint8


def test_an_empty_split_gives_an_evaluation_of_no_case() -> None:
    study = classification_study()
    session = TrainingSession(study, MemoryCohort({}), device="cpu")
    evaluation = session.evaluate(initial_weights(study), "validation")
    assert evaluation.rows == ()
    assert evaluation.accuracy is None


# --- with privacy --------------------------------------------------------------------------------


def private_study(**training: Any) -> Study:
    return segmentation_study(privacy=PRIVATE, **training)


def test_a_private_round_realises_the_event_that_the_study_claims() -> None:
    study = private_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    claimed = parameters(study)
    assert claimed is not None
    for number in range(2):
        result = session.train(initial_weights(study), number, 6)
        assert result.realised == claimed.event_per_round


def test_equal_seeds_give_private_rounds_with_other_noise() -> None:
    study = private_study()
    start = initial_weights(study)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        session = TrainingSession(study, segmentation_cohort(), device="cpu")
        results.append(session.train(start, 0, 6).tensors)
    assert not any(np.array_equal(results[0][name], results[1][name]) for name in start)


def test_noise_and_divisor_follow_the_declared_cohort_and_not_the_true_one() -> None:
    # Plain SGD of one step without a gradient: what moves is noise, learning rate and divisor.
    study = private_study(
        steps_per_round=1,
        optimiser={"name": "sgd", "learning_rate": 1.0, "momentum": 0, "weight_decay": 0},
    )
    cohort = segmentation_cohort(train=2)
    for patient in cohort.splits["train"]:
        patient.cases[0].pixels[:] = np.nan
    start = initial_weights(study)
    for declared in (10, 1000):
        session = TrainingSession(study, cohort, device="cpu")
        result = session.train(start, 0, declared)
        moved = np.concatenate([(result.tensors[n] - start[n]).ravel() for n in start])
        deviation = 1.1 * 0.3 / (0.5 * declared)
        assert moved.std() == pytest.approx(deviation, rel=0.15)
        assert math.isnan(result.loss)


def test_a_patient_full_of_nan_does_not_break_a_private_round() -> None:
    cohort = segmentation_cohort(train=4)
    cohort.splits["train"][1].cases[0].pixels[:] = np.nan
    study = private_study()
    session = TrainingSession(study, cohort, device="cpu")
    result = session.train(initial_weights(study), 0, 4)
    assert all(np.isfinite(tensor).all() for tensor in result.tensors.values())


def test_private_rounds_with_little_noise_learn() -> None:
    privacy = PRIVATE | {"noise_multiplier": 0.21, "sampling_rate": 1.0}
    study = segmentation_study(
        privacy=privacy,
        steps_per_round=15,
        rounds=2,
        optimiser={"learning_rate": 2e-2},
    )
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    weights = initial_weights(study)
    for number in range(2):
        # The divisor is public: declaring a larger cohort shrinks signal and noise alike, and
        # AdamW does not mind.
        weights = session.train(weights, number, 6).tensors
    score = session.evaluate(weights, "test").mean_dice
    assert score is not None
    assert score > 0.6


def test_private_classification_takes_augmented_copies_of_one_image() -> None:
    study = classification_study(
        privacy=PRIVATE, steps_per_round=2, patches_per_patient=3, augmentation={"flip": 0.5}
    )
    session = TrainingSession(study, classification_cohort(6), device="cpu")
    result = session.train(initial_weights(study), 0, 6)
    assert result.realised is not None
    assert result.realised.steps == 2


def test_a_tampered_mechanism_stops_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from consilium_client.training.entropy import SystemEntropy

    honest = SystemEntropy.normal
    monkeypatch.setattr(
        SystemEntropy, "normal", lambda self, count, sd: honest(self, count, sd / 2)
    )
    study = private_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu")
    with pytest.raises(ConsiliumError, match=r"privacy\.truth"):
        session.train(initial_weights(study), 0, 6)


def test_a_network_whose_privacy_cannot_be_proven_is_refused_before_any_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "consilium_common.models.registry.build_network",
        lambda study: torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2)),
    )
    with pytest.raises(ConsiliumError, match=r"privacy\.network"):
        TrainingSession(private_study(), segmentation_cohort(), device="cpu")


def test_one_patch_a_patient_in_3d_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"study\.patches"):
        TrainingSession(private_study(patches_per_patient=1), segmentation_cohort(), device="cpu")


# --- losses, schedule, devices -------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dice_ce", "cross_entropy", "focal"])
def test_losses_of_a_batch_are_means_over_its_images(loss: str) -> None:
    study = segmentation_study(loss=loss)
    function = build_loss(study)
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 2, 4, 4, 4), torch.randint(0, 2, (3, 4, 4, 4))
    hot = one_hot(study, targets)
    together = float(function(logits, hot))
    apart = [float(function(logits[i : i + 1], hot[i : i + 1])) for i in range(3)]
    assert together == pytest.approx(sum(apart) / 3, rel=1e-5)


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_multi_label_losses_fall_as_the_logits_come_right(loss: str) -> None:
    study = classification_study(multi_label=True, loss=loss)
    function = build_loss(study)
    hot = one_hot(study, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    losses = [float(function(scale * (2 * hot - 1), hot)) for scale in (-3.0, 0.0, 3.0)]
    assert losses[0] > losses[1] > losses[2] > 0


def test_focal_loss_of_single_labels_discounts_what_is_already_right() -> None:
    study = classification_study(loss="focal")
    function, cross_entropy = build_loss(study), torch.nn.CrossEntropyLoss()
    hot = one_hot(study, torch.tensor([0, 2]))
    assert hot.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert float(function(4 * hot, hot)) < 0.1 * float(cross_entropy(4 * hot, hot))


def test_the_cosine_falls_over_all_rounds_and_constant_stays() -> None:
    cosine = Optimiser(learning_rate=0.1, schedule="cosine")
    rates = [learning_rate(cosine, step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-3
    assert rates == sorted(rates, reverse=True)
    constant = Optimiser(learning_rate=0.1, schedule="constant")
    assert learning_rate(constant, 39, 40) == 0.1


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConsiliumError, match=r"state\.device") as caught:
        choose_compute(segmentation_study(), device)
    assert caught.value.hint


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"state\.precision"):
        choose_compute(segmentation_study(), "cpu", "float16")


def test_the_cpu_computes_in_bfloat16_only_when_asked() -> None:
    study = segmentation_study()
    assert choose_compute(study, "cpu").precision == "float32"
    assert choose_compute(study, "cpu", "auto").precision == "float32"
    assert choose_compute(study, "cpu", "bfloat16").precision == "bfloat16"
    assert choose_compute(segmentation_study(precision="bfloat16"), "cpu").precision == "bfloat16"


def test_bfloat16_trains_and_gives_float32_weights_back() -> None:
    study = private_study()
    session = TrainingSession(study, segmentation_cohort(), device="cpu", precision="bfloat16")
    result = session.train(initial_weights(study), 0, 6)
    assert {tensor.dtype for tensor in result.tensors.values()} == {np.dtype("float32")}
    assert session.evaluate(result.tensors, "test").mean_dice is not None


def test_the_channels_last_layout_changes_no_result() -> None:
    study = segmentation_study()
    torch.manual_seed(0)
    network, images = build_network(study).eval(), torch.randn(2, 1, 16, 16, 16)
    expected = network(images)
    compute = Compute("cpu", "float32", channels_last=True)
    placed = compute.place(network)
    found = placed(compute.place(images))
    kernel = next(p for p in placed.parameters() if p.dim() == 5 and p.shape[1] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.gpu
def test_auto_chooses_cuda_and_its_precision() -> None:
    compute = choose_compute(segmentation_study())
    assert compute.device == "cuda"
    expected = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    assert compute.precision == expected
    assert choose_compute(segmentation_study(), "cuda:0", "float32").precision == "float32"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_cuda_a_study_learns_and_a_session_survives_its_rounds(precision: str) -> None:
    study = segmentation_study(steps_per_round=15, rounds=3)
    session = TrainingSession(study, segmentation_cohort(), device="cuda", precision=precision)
    weights = initial_weights(study)
    for number in range(3):
        weights = session.train(weights, number, 6).tensors
    score = session.evaluate(weights, "test").mean_dice
    assert score is not None
    assert score > 0.9


@pytest.mark.gpu
def test_on_cuda_a_private_round_realises_its_event() -> None:
    study = private_study()
    session = TrainingSession(study, segmentation_cohort(), device="cuda")
    claimed = parameters(study)
    result = session.train(initial_weights(study), 0, 6)
    assert claimed is not None
    assert result.realised == claimed.event_per_round
    assert all(np.isfinite(tensor).all() for tensor in result.tensors.values())
