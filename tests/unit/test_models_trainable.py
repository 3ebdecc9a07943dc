"""What a study trains is what it says: layers by name, adapters, and a public start."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from study_samples import study_of
from test_models_registry import small
from torch import nn
from torch.func import functional_call, grad, vmap

from consilium_common.errors import ConsiliumError
from consilium_common.models.adapters import Adapted, adapt
from consilium_common.models.private import check_private, engine_problem
from consilium_common.models.registry import (
    NETWORKS,
    build_network,
    initial_weights,
    outline,
    parameter_count,
    start_weights,
    tensor_specs,
    trained_count,
    trained_specs,
)
from consilium_common.models.state import read_trained, read_weights
from consilium_common.models.trainable import base_names, ends
from consilium_common.models.weights import Array, pack
from consilium_common.study.schema import Network, PublicStart, Study


def training(study: Study, **model: Any) -> Study:
    """Return the study with another choice of what is trained."""
    return study.model_copy(update={"model": study.model.model_copy(update=model)})


def image_of(study: Study, count: int = 1) -> torch.Tensor:
    assert study.preprocessing.size is not None
    return torch.randn(count, 1, *study.preprocessing.size)


def trained_names(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("trainable", ["all", "first+last", "adapters", ["*.weight"]])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_what_is_sent_is_what_is_trained_and_nothing_else_moves(name: str, trainable: Any) -> None:
    study = training(small(name, 2, "group"), trainable=trainable, adapter_rank=2)
    network = build_network(study)
    check_private(network)
    before = read_weights(network)
    specs = trained_specs(study)
    assert {spec.name for spec in specs} == trained_names(network) == set(read_trained(network))
    assert trained_count(study) == sum(spec.size for spec in specs)
    assert (trained_count(study) < parameter_count(study)) == (trainable != "all")
    assert set(specs) <= set(tensor_specs(study))
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # an adapter's first half has no gradient while the second is zero
        optimiser.zero_grad()
        torch.logsumexp(network(image_of(study, 2)), 1).square().mean().backward()
        assert all(p.grad is not None for p in parameters)
        optimiser.step()
    after = read_weights(network)
    moved = {key for key in before if not np.array_equal(before[key], after[key])}
    assert moved <= trained_names(network)
    assert len(moved) > len(parameters) / 2


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_first_layer_sees_the_image_and_none_comes_after_the_last(
    name: str, dimensions: int
) -> None:
    study = small(name, dimensions, "group")
    network = build_network(study)
    first, last = ends(network)
    seen: list[tuple[str, bool]] = []
    image = image_of(study)
    for path, layer in network.named_modules():
        if list(layer.parameters(recurse=False)):
            layer.register_forward_hook(
                lambda _layer, inputs, _output, path=path: seen.append((path, inputs[0] is image))
            )
    logits = network(image)
    assert seen[0] == (first, True)
    assert seen[-1][0] == last
    chosen = trained_names(build_network(training(study, trainable="first+last")))
    assert {name.rpartition(".")[0] for name in chosen} == {first, last}
    assert logits.shape[1] == 3


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_adapters_begin_as_the_network_without_them(name: str, dimensions: int) -> None:
    study = small(name, dimensions, "group")
    plain = build_network(study).eval()
    adapted = build_network(training(study, trainable="adapters", adapter_rank=3)).eval()
    image = image_of(study)
    assert torch.equal(plain(image), adapted(image))
    names = base_names(adapted)
    assert list(names) == list(plain.state_dict())
    state = adapted.state_dict()
    assert all(torch.equal(value, state[names[key]]) for key, value in plain.state_dict().items())
    _, last = ends(plain)
    chosen = trained_names(adapted)
    assert {f"{last}.weight", f"{last}.bias"} & set(state) <= chosen
    assert all(
        key.rpartition(".")[0] == last or key.endswith((".down.weight", ".up.weight"))
        for key in chosen
    )
    again = build_network(training(study, trainable="adapters", adapter_rank=3))
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 9)),
        (nn.Conv3d(6, 8, (3, 1, 3), padding=(1, 0, 2), dilation=(1, 1, 2)), (6, 7, 5, 9)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (6, 5, 5)),
        (nn.ConvTranspose3d(6, 8, 2, stride=2), (6, 3, 4, 3)),
        (nn.Linear(6, 8), (6,)),
    ],
)
def test_an_adapter_is_a_change_of_the_weight_of_low_rank(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    network = nn.ModuleDict({"layer": layer, "last": nn.Linear(1, 1)})
    before: torch.Tensor = layer.weight.detach().clone()  # type: ignore[assignment]
    assert adapt(network, 2, "last") == ["layer"]
    adapted = network["layer"]
    assert isinstance(adapted, Adapted)
    nn.init.normal_(adapted.up.weight)  # type: ignore[arg-type]
    down, up = (part.weight.detach() for part in (adapted.down, adapted.up))  # type: ignore[union-attr]
    transposed = isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d)
    first, second = (down.flatten(1).t(), up) if transposed else (up.flatten(1), down)
    product = first @ second.flatten(1)
    assert torch.linalg.matrix_rank(product) == 2
    x = torch.randn(3, *shape)
    found = adapted(x)
    with torch.no_grad():
        layer.weight.copy_(before + product.reshape(before.shape))  # type: ignore[operator]
    assert torch.allclose(found, layer(x), atol=1e-4)


def test_an_adapter_never_has_more_values_than_its_layer() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),  # 9 x 4: rank 2 has 26 values, rank 3 would have 39 of 36
        nn.Conv2d(4, 1, 1),  # one row: no product is smaller
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Linear(4, 2),
    )
    assert adapt(network, 8, "3") == ["0"]
    assert tuple(network.get_submodule("0.down").weight.shape) == (2, 1, 3, 3)
    assert trained_names(network) == {"0.down.weight", "0.up.weight", "3.weight", "3.bias"}


@pytest.mark.parametrize("trainable", ["first+last", "adapters"])
@pytest.mark.parametrize(("name", "dimensions"), [("unet", 3), ("dynunet", 2), ("resnet10", 2)])
def test_every_engine_gives_the_gradients_of_what_is_trained(
    name: str, dimensions: int, trainable: str
) -> None:
    from opacus import GradSampleModule

    study = training(small(name, dimensions, "group"), trainable=trainable, adapter_rank=2)
    network = build_network(study)
    with torch.no_grad():  # as after a step: neither half of an adapter is zero
        for name_, parameter in network.named_parameters():
            if name_.endswith("up.weight"):
                parameter.normal_(0, 0.1)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in network.named_parameters() if not p.requires_grad}
    images = image_of(study, 3)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(logits, 1).square().flatten(1 - (logits.dim() == 2)).mean()

    def of_one(values: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(network, {**values, **frozen}, (image[None],)))

    alone = [
        torch.autograd.grad(loss(network(image[None])), list(trained.values())) for image in images
    ]
    at_once = vmap(grad(of_one), in_dims=(None, 0))(
        {n: p.detach() for n, p in trained.items()}, images
    )
    hooks = GradSampleModule(network, loss_reduction="mean")
    loss(hooks(images)).backward()
    for index, (key, parameter) in enumerate(trained.items()):
        expected = torch.stack([one[index] for one in alone])
        assert torch.allclose(at_once[key], expected, rtol=1e-3, atol=1e-5), key
        assert torch.allclose(parameter.grad_sample, expected, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("trainable", ["all", "first+last", "adapters"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_registered_network_suits_every_engine(name: str, trainable: str) -> None:
    options: dict[str, Any] = {"trainable": trainable}
    for norm in ("group", "instance"):
        network = outline(training(small(name, 3, norm), **options))
        assert [engine_problem(network, one) for one in ("auto", "loop", "vmap", "opacus")] == [
            None
        ] * 4


def test_a_pattern_that_names_nothing_is_refused_by_key() -> None:
    study = training(small("unet", 2, "group"), trainable=["model.0.*", "modle.2.*"])
    for use in (build_network, trained_specs, trained_count):
        with pytest.raises(ConsiliumError, match=r"`model.trainable\[1\]` is 'modle") as caught:
            use(study)
        assert caught.value.code == "study.trainable"
        assert "model.0.conv.weight" in caught.value.hint
    two = training(study, trainable=["model.0.conv.*", "model.2.*bias"])
    assert {spec.name for spec in trained_specs(two)} == {
        "model.0.conv.weight",
        "model.0.conv.bias",
        "model.2.conv.bias",
    }


def begun(study: Study, tensors: dict[str, Array]) -> tuple[Study, bytes]:
    """Return the study with these weights as its public start, and their file."""
    blob = pack(tensors)
    start = PublicStart(sha256=hashlib.sha256(blob).hexdigest(), data="made for this test")
    return training(study, start=start), blob


@pytest.mark.parametrize("trainable", ["all", "adapters"])
def test_a_public_start_is_completed_with_fresh_adapters(trainable: str) -> None:
    plain = small("unet", 2, "group")
    public = {n: w + np.float32(0.25) for n, w in initial_weights(plain).items()}
    study, blob = begun(training(plain, trainable=trainable), public)
    weights = start_weights(study, blob)
    fresh = initial_weights(study)
    assert list(weights) == list(fresh) == [spec.name for spec in tensor_specs(study)]
    names = base_names(build_network(study))
    assert all(np.array_equal(weights[names[name]], value) for name, value in public.items())
    others = weights.keys() - set(names.values())
    assert bool(others) == (trainable == "adapters")
    assert all(np.array_equal(weights[name], fresh[name]) for name in others)


def test_a_start_that_is_not_the_one_approved_or_does_not_fit_is_refused() -> None:
    plain = training(small("unet", 2, "group"), trainable="adapters")
    base = initial_weights(small("unet", 2, "group"))
    name = "model.0.conv.weight"
    study, blob = begun(plain, base)
    for refused, file, part in (
        (plain, blob, "names no public start"),
        (study, pack({n: w + 1 for n, w in base.items()}), "the study names"),
        (study, blob + b"\0", "the study names"),
        (*begun(plain, {n: w for n, w in base.items() if n != name}), f"Tensor {name} is missing"),
        (*begun(plain, base | {name: base[name][:1]}), f"Tensor {name} has shape"),
        (*begun(plain, base | {name: base[name] * np.float32("nan")}), "not finite"),
        (*begun(plain, initial_weights(plain)), "is missing"),  # with adapters: another network
    ):
        with pytest.raises(ConsiliumError, match=part) as caught:
            start_weights(refused, file)
        assert caught.value.code == "study.start"
        assert caught.value.hint
    noise = b"no tensors at all"
    start = PublicStart(sha256=hashlib.sha256(noise).hexdigest(), data="made for this test")
    with pytest.raises(ConsiliumError, match=r"study\.start.*cannot be read"):
        start_weights(training(plain, start=start), noise)


def test_patterns_and_free_text_are_no_code_and_no_argument() -> None:
    from consilium_common.study.load import study_from_canonical

    start = {"sha256": "0" * 64, "data": "$HOME; a set of volumes, CC BY 4.0 (https://example.org)"}
    study = study_of("unet")
    for trainable in ("first+last", ["model.*.conv.*", "[!a]*"]):
        chosen = Network.model_validate(
            {"network": "unet", "trainable": trainable, "start": start}, strict=True
        )
        sent = study.model_copy(update={"model": chosen})
        assert study_from_canonical(sent.to_canonical()) == sent
