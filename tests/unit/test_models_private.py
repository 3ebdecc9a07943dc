"""Networks for which privacy cannot be proven are refused, by layer."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from study_samples import TEXT, study_of
from torch import nn

from consilium_common.errors import ConsiliumError
from consilium_common.models.private import check_private, engine_problem
from consilium_common.study.load import parse_study
from consilium_common.study.rules import check_network
from consilium_common.study.schema import Training


def refused(network: nn.Module) -> str:
    with pytest.raises(ConsiliumError) as caught:
        check_private(network)
    assert caught.value.code == "privacy.network"
    assert caught.value.hint
    return caught.value.message


def inside(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(layer))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm_is_refused_by_type_whatever_its_settings(kind: type[nn.Module]) -> None:
    for options in ({}, {"affine": False}, {"track_running_stats": False}):
        network = inside(kind(2, **options)).eval()
        network.requires_grad_(False)
        assert f"1.0: {kind.__name__} mixes the patients" in refused(network)
    assert "set model.normalise: true" in refused(inside(nn.LazyBatchNorm2d()))


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def test_a_subclass_of_batch_norm_is_refused_too() -> None:
    assert "1.0: OwnBatchNorm" in refused(inside(OwnBatchNorm(2)))


def test_running_statistics_and_other_buffers_are_refused() -> None:
    assert "track_running_stats=False" in refused(
        inside(nn.InstanceNorm2d(2, track_running_stats=True))
    )
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3))
    assert "holds the buffer '_u'" in refused(inside(spectral))
    counter = nn.Identity()
    counter.register_buffer("seen", torch.zeros(1), persistent=False)
    assert "1.0: Identity holds the buffer 'seen'" in refused(inside(counter))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_other_than_zeros_is_refused(mode: str) -> None:
    message = refused(inside(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)))
    assert f"1.0: Conv2d pads with '{mode}'" in message


def test_a_layer_used_under_two_names_is_refused() -> None:
    layer = nn.Linear(2, 2)
    message = refused(nn.ModuleDict({"first": layer, "again": layer}))
    assert "again.weight: the same parameter as first.weight" in message


def test_parameters_in_shared_memory_are_refused() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    network["b"].weight = nn.Parameter(network["a"].weight.data.t())
    assert "b.weight: shares memory with a.weight" in refused(network)


def test_lazy_layers_are_refused() -> None:
    assert "0: LazyConv2d has no parameters" in refused(nn.Sequential(nn.LazyConv2d(2, 3)))


def test_every_finding_is_listed() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding_mode="reflect"), nn.BatchNorm2d(1)
    )
    assert len(refused(network).splitlines()) == 4


def test_a_layer_without_parameters_may_be_used_twice() -> None:
    relu = nn.ReLU()
    check_private(nn.Sequential(nn.Conv2d(1, 2, 3), relu, nn.GroupNorm(1, 2), relu))


GROUPS = ("group", {"num_groups": 4})


class Prompted(nn.Module):
    """A layer with a parameter of its own beside a layer, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, 2))
        self.layer = nn.Linear(2, 2)


def test_what_hooks_cannot_take_is_named_by_layer() -> None:
    from monai.networks.nets import ResNet, SegResNet

    for network, part in (
        (inside(nn.ReLU(inplace=True)), "1.0: ReLU changes its input in place"),
        (
            SegResNet(spatial_dims=2, norm="instance", act="prelu"),
            "down_layers.0.1: ResBlock adds in place",
        ),
        (
            ResNet("basic", [1] * 4, [8] * 4, spatial_dims=2, act="prelu", norm=GROUPS),
            "layer1.0: ResNetBlock adds in place",
        ),
        (inside(Prompted()), "1.0: Prompted has parameters of its own beside further layers"),
        (inside(nn.BatchNorm2d(2)), "1.0: BatchNorm2d holds a buffer"),
        (inside(nn.LSTM(2, 2)), "1.0: LSTM is a recurrent layer"),
    ):
        assert part in str(engine_problem(network, "opacus"))
    frozen = inside(Prompted()).requires_grad_(False)
    assert engine_problem(frozen, "opacus") is None  # hooks hang on trained layers only


def test_the_engine_that_a_private_study_names_must_suit_its_network() -> None:
    from monai.networks.nets import SegResNet

    network = SegResNet(spatial_dims=2, norm=GROUPS, act=("relu", {"inplace": False}))
    for engine in ("loop", "vmap", "auto"):
        check_network(
            parse_study(TEXT.replace("delta:", f"engine: {engine}\n  delta:"), "x"), network
        )
    study = parse_study(TEXT.replace("delta:", "engine: opacus\n  delta:"), "x")
    with pytest.raises(
        ConsiliumError, match="opacus cannot take this network: down_layers"
    ) as caught:
        check_network(study, network)
    assert caught.value.code == "privacy.engine"
    with pytest.raises(ConsiliumError, match=r"privacy\.network"):
        check_network(study, inside(nn.BatchNorm2d(2)))
    check_network(study_of("unet"), inside(nn.BatchNorm2d(2)))  # no privacy, nothing to prove


def test_what_vmap_cannot_follow_is_named_by_layer() -> None:
    assert "1.0: LSTM" in str(engine_problem(inside(nn.LSTM(2, 2)), "vmap"))
    assert "1.0: BatchNorm2d" in str(engine_problem(inside(nn.BatchNorm2d(2)), "vmap"))
    assert engine_problem(inside(Prompted()), "vmap") is None
    for engine in ("auto", "loop"):
        assert engine_problem(inside(nn.LSTM(2, 2)), engine) is None


LOSSES = [
    (kind, loss)
    for kind in ("segmentation", "classification")
    for loss in get_args(Training.model_fields["loss"].annotation)
    # The others are refused by the schema.
    if (kind, loss) not in {("segmentation", "bce"), ("classification", "dice_ce")}
]


@pytest.mark.parametrize(("kind", "loss"), LOSSES)
def test_no_loss_couples_patients(kind: str, loss: str) -> None:
    from consilium_client.training.losses import build_loss, one_hot

    multi_label = kind == "classification" and loss in ("bce", "focal")
    network = "unet" if kind == "segmentation" else "resnet10"
    study = study_of(network, kind=kind, loss="cross_entropy" if multi_label else loss)
    task = study.task.model_copy(update={"multi_label": multi_label})
    training = study.training.model_copy(update={"loss": loss})
    study = study.model_copy(update={"task": task, "training": training})
    tail = (6, 5) if kind == "segmentation" else ()
    logits = torch.randn(4, 3, *tail, dtype=torch.float64)
    shape = (4, 3) if multi_label else (4, *tail)
    targets = one_hot(study, torch.randint(0, 2 if multi_label else 3, shape)).double()
    of = build_loss(study)
    alone = [of(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert torch.allclose(of(logits, targets), torch.stack(alone).mean())
