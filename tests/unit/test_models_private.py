"""Networks for which privacy cannot be proven are refused, by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from consilium_common.errors import ConsiliumError
from consilium_common.models.private import check_private


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
    assert "use group or instance norm" in refused(inside(nn.LazyBatchNorm2d()))


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
