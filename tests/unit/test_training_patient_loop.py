"""The per-patient loop: against opacus, against batches that couple, against bad patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_samples import PRIVATE, segmentation_patient, segmentation_study

from consilium_client.training.compute import choose_compute
from consilium_client.training.engines.loop import PatientLoop
from consilium_client.training.learner import Learner
from consilium_client.training.losses import build_loss
from consilium_client.training.mechanism import clipped_sum
from consilium_client.training.patches import PatchSource
from consilium_common.models.registry import build_network


def small_network() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.GroupNorm(2, 4),
        torch.nn.ReLU(),
        torch.nn.Conv3d(4, 2, 3, stride=2, padding=1),
    )


def test_clipped_sums_equal_those_of_opacus() -> None:
    from opacus import GradSampleModule

    images = torch.randn(6, 1, 8, 8, 8, requires_grad=True)
    targets = torch.randint(0, 2, (6, 4, 4, 4))
    loss = torch.nn.CrossEntropyLoss()

    network = small_network()
    loop = PatientLoop(network, lambda i: loss(network(images[i : i + 1]), targets[i : i + 1]))

    oracle = GradSampleModule(small_network(), loss_reduction="mean")
    loss(oracle(images), targets).backward()
    samples = torch.cat([p.grad_sample.reshape(6, -1) for p in oracle.parameters()], dim=1)
    norms = samples.norm(dim=1)
    median = float(norms.median())
    assert norms.min() < median < norms.max()
    for bound in (0.01, median, 100.0):  # all are clipped, some are, none is
        ours, _ = clipped_sum(loop.gradients(range(6)), bound, loop.size, "cpu")
        theirs = (samples * (bound / norms).clamp(max=1.0)[:, None]).sum(dim=0)
        assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))


def learner_of(patients: list[Any], **training: Any) -> Learner:
    study = segmentation_study(privacy=PRIVATE, **training)
    compute = choose_compute(study, "cpu")
    torch.manual_seed(0)
    return Learner(
        study, build_network(study), compute, build_loss(study), PatchSource(study, patients)
    )


def sum_over(learner: Learner, chosen: list[int], clip: float) -> Any:
    def loss(patient: int) -> Any:
        rng = np.random.default_rng(patient)
        return learner.batch_loss(*learner.source.patient_batch(patient, 2, rng))

    loop = PatientLoop(learner.network, loss)
    return clipped_sum(loop.gradients(chosen), clip, loop.size, loop.device)[0]


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["nan", "inf", "zeros", "huge", "noise", "one voxel"]),
    loss=st.sampled_from(["dice_ce", "cross_entropy", "focal"]),
    clip=st.sampled_from([0.01, 0.5]),
)
def test_a_hostile_patient_moves_the_sum_by_at_most_the_clip_norm(
    kind: str, loss: str, clip: float
) -> None:
    patients = [segmentation_patient(i) for i in range(3)]
    pixels = patients[0].cases[0].pixels
    rng = np.random.default_rng(0)
    match kind:
        case "nan":
            pixels[:] = np.nan
        case "inf":
            pixels[0, 3] = np.inf
        case "zeros":
            pixels[:] = 0
        case "huge":
            pixels[:] = 1e30 * rng.standard_normal(pixels.shape)
        case "noise":
            pixels[:] = 100 * rng.standard_normal(pixels.shape)
        case "one voxel":
            pixels[:] = 0
            pixels[0, 8, 8, 8] = 1e6
    learner = learner_of(patients, loss=loss)
    moved = sum_over(learner, [0, 1, 2], clip) - sum_over(learner, [1, 2], clip)
    assert torch.isfinite(moved).all()
    assert float(moved.norm()) <= clip * (1 + 1e-6)


def test_a_patients_row_does_not_depend_on_who_else_is_drawn() -> None:
    learner = learner_of([segmentation_patient(i) for i in range(4)])
    alone = sum_over(learner, [2], 1e9)
    among = sum_over(learner, [0, 2, 3], 1e9) - sum_over(learner, [0, 3], 1e9)
    assert float((alone - among).abs().max()) < 1e-9


def test_a_patient_gives_one_row_however_many_scans_it_has() -> None:
    learner = learner_of([segmentation_patient(0, cases=5), segmentation_patient(1)])
    clip = 1e-4
    assert float(sum_over(learner, [0], clip).norm()) <= clip * (1 + 1e-9)


def test_parameters_that_are_frozen_or_unused_take_part_as_nothing_or_as_zeros() -> None:
    network = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 1) for name in ("frozen", "unused", "used")}
    )
    network["frozen"].requires_grad_(False)
    loop = PatientLoop(network, lambda _: network["used"](torch.ones(1, 2)).sum())
    (row,) = loop.gradients([0])
    assert loop.size == 6
    assert row.tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    assert len(loop.losses) == 1


@pytest.mark.gpu
def test_on_cuda_a_row_agrees_with_the_cpus() -> None:
    sums = []
    for device in ("cpu", "cuda"):
        study = segmentation_study(privacy=PRIVATE, precision="float32")
        compute = choose_compute(study, device)
        torch.manual_seed(0)
        network = compute.place(build_network(study))
        source = PatchSource(study, [segmentation_patient(0)])
        learner = Learner(study, network, compute, build_loss(study), source)
        sums.append(sum_over(learner, [0], 1e9).cpu())
    assert float((sums[0] - sums[1]).norm() / sums[0].norm()) < 1e-2
