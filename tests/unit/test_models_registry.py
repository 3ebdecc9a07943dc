"""Whatever the registry accepts can be built, trained, exchanged and kept private."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from study_samples import study_of
from torch import nn

from consilium_common.errors import ConsiliumError
from consilium_common.models import networks, registry
from consilium_common.models.networks import batch_norms
from consilium_common.models.private import check_private
from consilium_common.models.registry import (
    NETWORKS,
    build_network,
    initial_weights,
    normalised_layers,
    parameter_count,
    tensor_specs,
    trained_specs,
    validate_network,
)
from consilium_common.models.state import read_trained, read_weights, specs_of, write_weights
from consilium_common.models.weights import check_tensors
from consilium_common.study.schema import Study

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16, 32]},
    "dynunet": {"filters": [8, 16, 32]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 2]},
    "densenet121": {"init_features": 8, "growth_rate": 4, "bn_size": 2},
    "resnet10": {"block_inplanes": [8, 8, 16, 16]},
    "resnet18": {"block_inplanes": [8, 8, 16, 16]},
}


def small(name: str, dimensions: int, norm: str, **options: Any) -> Study:
    kind = NETWORKS[name].task
    arguments = {**SMALL[name], "norm": norm}
    if norm == "group":
        arguments["groups"] = 4
    size = [16] * dimensions if kind == "segmentation" else [64] * 2 + [32] * (dimensions - 2)
    return study_of(name, arguments, kind=kind, dimensions=dimensions, size=size, **options)


def refused(study: Study) -> str:
    with pytest.raises(ConsiliumError) as caught:
        validate_network(study)
    assert caught.value.code == "study.network"
    return caught.value.message


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_trains_and_is_fit_for_privacy(name: str, dimensions: int, norm: str) -> None:
    study = small(name, dimensions, norm, inputs=2)
    network = build_network(study)
    assert study.preprocessing.size is not None
    image = torch.randn(2, 2, *study.preprocessing.size)
    logits = network(image)
    tail = image.shape[2:] if study.task.kind == "segmentation" else ()
    assert logits.shape == (2, 3, *tail)
    torch.logsumexp(logits, 1).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert not [m for m in network.modules() if getattr(m, "inplace", False)]
    check_private(network)
    # Each image is normalised by itself: the other one changes nothing.
    alone = network.eval()(image[:1])
    assert torch.allclose(alone, network(image)[:1], atol=1e-4)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_tensors_are_those_of_the_network_each_once(name: str) -> None:
    study = small(name, 2, "group")
    network = build_network(study)
    specs = tensor_specs(study)
    assert specs == specs_of(network)
    assert [s.name for s in specs] == sorted(network.state_dict())
    assert {s.dtype for s in specs} == {"float32"}
    assert not list(network.buffers())
    assert parameter_count(study) == sum(s.size for s in specs)
    check_tensors(initial_weights(study), specs, norm_bound=None)


def test_weights_follow_from_the_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = initial_weights(small("unet", 2, "group", seed=1))
    torch.manual_seed(6)
    again = read_weights(build_network(small("unet", 2, "group", seed=1)))
    other = initial_weights(small("unet", 2, "group", seed=2))
    assert list(first) == list(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    initial_weights(small("resnet10", 3, "group"))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_written_are_the_weights_read() -> None:
    study = small("dynunet", 2, "instance")
    network = build_network(study)
    weights = {n: w + np.float32(0.5) for n, w in initial_weights(study).items()}
    write_weights(network, weights)
    back = read_weights(network)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    before = read_weights(network)
    name = next(iter(weights))
    for bad in (
        {**weights, name: weights[name][:1]},
        {**weights, name: weights[name] * np.nan},
        {n: w for n, w in weights.items() if n != name},
        {n: w * 2 for n, w in weights.items()} | {"other": weights[name]},
    ):
        with pytest.raises(ConsiliumError, match="bad-update"):
            write_weights(network, bad)
    assert all(np.array_equal(before[n], w) for n, w in read_weights(network).items())


@pytest.mark.parametrize(
    ("name", "options"),
    [("dynunet", {"res_block": True}), ("segresnet", {}), ("resnet18", {}), ("resnet10", {})],
)
def test_own_blocks_compute_what_monais_do(name: str, options: dict[str, Any]) -> None:
    study = small(name, 2, "group")
    model = study.model.model_copy(update={"arguments": study.model.arguments | options})
    network = build_network(study.model_copy(update={"model": model})).eval()
    image = torch.randn(2, 1, *study.preprocessing.size or [])
    own = network(image)
    swapped = 0
    for module in network.modules():
        theirs = {ours: monais for monais, ours in networks._ADDING.items()}.get(type(module))
        if theirs is not None:
            module.__class__ = theirs
            swapped += 1
    assert swapped
    assert torch.equal(own, network(image))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_batch_norm_is_averaged_without_its_counter_and_refused_in_private(name: str) -> None:
    study = small(name, 2, "batch")
    network = build_network(study)
    specs = trained_specs(study)
    assert specs == tensor_specs(study) == specs_of(network)
    statistics = [spec.name for spec in specs if spec.name.endswith("running_var")]
    assert statistics
    before = read_trained(network)[statistics[0]]
    network(torch.randn(4, 1, *study.preprocessing.size or []))
    assert not np.array_equal(before, read_trained(network)[statistics[0]])
    write_weights(network, initial_weights(study))
    assert np.array_equal(before, read_trained(network)[statistics[0]])
    with pytest.raises(ConsiliumError, match=r"set model\.normalise: true"):
        check_private(network)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_normalise_makes_every_batch_norm_a_group_norm(name: str) -> None:
    study = small(name, 2, "batch", inputs=2)
    layers = batch_norms(build_network(study))
    model = study.model.model_copy(update={"normalise": True})
    study = study.model_copy(update={"model": model})
    assert list(normalised_layers(study)) == layers != []
    network = build_network(study)
    check_private(network)
    for path in layers:
        norm = network.get_submodule(path)
        assert isinstance(norm, nn.GroupNorm)
        fitting = [g for g in range(1, 9) if norm.num_channels % g == 0]
        assert norm.num_groups == max(fitting)
    assert normalised_layers(small(name, 2, "group")) == ()


def test_the_groups_given_bound_those_that_replace_batch_norm() -> None:
    study = study_of("unet", {"channels": [12, 20, 7], "norm": "batch", "groups": 6})
    model = study.model.model_copy(update={"normalise": True})
    network = build_network(study.model_copy(update={"model": model}))
    groups = [m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [6, 5, 1, 6]


def test_own_dynunet_computes_what_monais_does() -> None:
    from monai.networks.nets import DynUNet

    study = study_of("dynunet", {"filters": [4, 8, 8, 16], "norm": "instance"}, dimensions=2)
    own = build_network(study).eval()
    theirs = DynUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=3,
        kernel_size=[3] * 4,
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[4, 8, 8, 16],
    ).eval()
    found = theirs.load_state_dict(own.state_dict(), strict=False)
    assert all(name.startswith("skip_layers.") for name in found.missing_keys)
    assert not found.unexpected_keys
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(own(image), theirs(image))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_trained_activation_has_one_name(name: str) -> None:
    study = small(name, 2, "group")
    arguments = study.model.arguments | {"act": "prelu"}
    model = study.model.model_copy(update={"arguments": arguments})
    network = build_network(study.model_copy(update={"model": model}))
    assert any(isinstance(layer, nn.PReLU) for layer in network.modules())
    check_private(network)


def test_monais_resnet_keeps_no_batch_norm() -> None:
    network = build_network(small("resnet18", 3, "group"))
    kinds = [type(m) for m in network.modules() if "Norm" in type(m).__name__]
    assert kinds == [nn.GroupNorm] * 20


def normalising(study: Study) -> Study:
    return study.model_copy(update={"model": study.model.model_copy(update={"normalise": True})})


@pytest.mark.parametrize("units", [0, 1, 2])
def test_unet_normalises_no_logits(units: int) -> None:
    arguments = {"channels": [4, 8], "num_res_units": units, "act": "relu"}
    network = build_network(study_of("unet", arguments, classes=2))
    norms = [m.num_features for m in network.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert norms
    assert 2 not in norms  # the only layers of two channels are the classes


@pytest.mark.parametrize(
    ("study", "part"),
    [
        (study_of("unett"), "there is no network `unett`; did you mean `unet`?"),
        (study_of("unet", kind="classification"), "take one of densenet121, resnet10, resnet18"),
        (study_of("resnet10"), "`resnet10` is for classification"),
        (study_of("unet", {"chanels": [8, 16]}), "did you mean `channels`?"),
        (study_of("unet", {"norm": "layer"}), "it can be group, instance or batch"),
        (study_of("unet", {"norm": "instance", "groups": 4}), "groups belongs to norm: group"),
        (study_of("unet", {"norm": "batch", "groups": 4}), "with `model.normalise: true`"),
        (study_of("unet", {"channels": [8, 1024]}), "less than or equal to 512"),
        (study_of("unet", {"channels": [8] * 8}), "at most 7 items"),
        (study_of("unet", {"channels": [8, 16], "strides": [2, 2]}), "one less than channels"),
        (study_of("unet", {"channels": [8, 16], "strides": [9]}), "a stride is one of 1, 2, 3, 4"),
        (study_of("unet", {"channels": [8, 16], "strides": [True]}), "a stride is one of"),
        (study_of("unet", {"kernel_size": 4}), "a kernel is one of 1, 3, 5, 7"),
        (study_of("unet", {"kernel_size": [3, 3, 1]}), "[3, 3, 1] in a study of 2 axes"),
        (study_of("unet", {"channels": "8"}), "it should be a list"),
        (study_of("unet", {"norm": "group", "channels": [12, 24]}), "take groups: 6"),
        (study_of("dynunet", {"filters": [8, 16]}), "at least 3 items"),
        (study_of("dynunet", {"filters": [8] * 3, "strides": [2, 2, 2]}), "first of strides is 1"),
        (
            study_of("dynunet", {"filters": [8] * 3, "strides": [1, 4, 1], "kernel_size": [1] * 3}),
            "too small for stride 4",
        ),
        (
            study_of("dynunet", {"filters": [8] * 3, "strides": [1, 4, 1], "res_block": True}),
            "with res_block a stride is 1 or 2",
        ),
        (study_of("segresnet", {"init_filters": 128}), "take init_filters 64"),
        (study_of("segresnet", {"blocks_up": [1]}), "needs one less"),
        (study_of("unet", size=[32, 36]), "take [32, 32] or [32, 40]"),
        (study_of("unet", size=[64, 64], patch=[20, 64]), "`training.patch` [20, 64] is not"),
        (study_of("unet", size=[8, 8]), "one voxel at the deepest level"),
        (normalising(study_of("unet", size=[8, 8])), "one voxel at the deepest level"),
        (study_of("densenet121", kind="classification", size=[28, 64]), "too small"),
    ],
)
def test_every_mistake_in_a_network_says_the_fix(study: Study, part: str) -> None:
    assert part in refused(study)


def test_images_of_unknown_size_are_refused() -> None:
    study = study_of("unet").model_copy(
        update={"preprocessing": study_of("unet").preprocessing.model_copy(update={"size": None})}
    )
    assert "give `training.patch` or `preprocessing.size`" in refused(study)


def test_all_mistakes_of_a_network_are_listed() -> None:
    message = refused(study_of("unet", {"norm": "layer", "act": "sine", "bias": True}))
    assert len(message.splitlines()) == 4


def test_a_network_too_large_is_refused_before_it_takes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"channels": [512] * 7, "kernel_size": 7, "up_kernel_size": 7}
    study = study_of("unet", arguments, size=[128, 128])
    with pytest.raises(ConsiliumError, match="parameters; at most 200,000,000"):
        build_network(study)
    monkeypatch.setattr(registry, "MAX_PARAMETERS", 100)
    with pytest.raises(ConsiliumError, match="at most 100"):
        tensor_specs(small("unet", 2, "group"))


def test_a_study_is_validated_without_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit')\n"
        "from study_samples import study_of\n"
        "from consilium_common.models.registry import validate_network\n"
        "validate_network(study_of('unet'))\n"
        "print([m for m in ('torch', 'monai', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def per_axis(draw: Any, values: list[int], dimensions: int) -> Any:
    one = st.sampled_from(values)
    return draw(st.one_of(one, st.lists(one, min_size=dimensions, max_size=dimensions)))


@st.composite
def any_study(draw: Any) -> Study:
    """Draw a small study: any network, arguments that may or may not fit it."""
    name = draw(st.sampled_from(list(NETWORKS)))
    dimensions = draw(st.sampled_from([2, 2, 3]))
    arguments: dict[str, Any] = {"norm": draw(st.sampled_from(["group", "instance", "batch"]))}
    if arguments["norm"] == "group":
        arguments["groups"] = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.integers(2, 4))
    widths = draw(st.lists(st.sampled_from([2, 4, 6, 8]), min_size=levels, max_size=levels))
    strides = [per_axis(draw, [1, 2, 3, 4], dimensions) for _ in range(levels)]
    kernels = [per_axis(draw, [1, 3, 5], dimensions) for _ in range(levels)]
    if name == "unet":
        units = draw(st.integers(0, 2))
        arguments |= {"channels": widths, "strides": strides[1:], "num_res_units": units}
        arguments |= {"kernel_size": kernels[0], "up_kernel_size": kernels[1]}
    elif name == "dynunet":
        arguments |= {"filters": widths, "strides": [1, *strides[1:]], "kernel_size": kernels}
        arguments["res_block"] = draw(st.booleans())
    elif name == "segresnet":
        arguments |= {"init_filters": widths[0], "blocks_down": [1] * levels}
        arguments["upsample_mode"] = draw(st.sampled_from(["deconv", "nontrainable"]))
    elif name == "densenet121":
        arguments |= {"init_features": 8, "growth_rate": 4, "bn_size": draw(st.integers(1, 2))}
    else:
        arguments |= {"block_inplanes": (widths * 4)[:4], "conv1_t_stride": strides[0]}
        arguments |= {"conv1_t_size": kernels[0], "no_max_pool": draw(st.booleans())}
    sizes = st.sampled_from([8, 12, 16, 24] if dimensions == 3 else [8, 16, 24, 48, 64])
    size = draw(st.lists(sizes, min_size=dimensions, max_size=dimensions))
    kind = NETWORKS[name].task
    study = study_of(name, arguments, kind=kind, dimensions=dimensions, size=size)
    model = study.model.model_copy(update={"normalise": draw(st.booleans())})
    return study.model_copy(update={"model": model})


@given(study=any_study())
@settings(max_examples=100, deadline=None)
def test_what_passes_the_check_builds_and_runs(study: Study) -> None:
    try:
        validate_network(study)
    except ConsiliumError as error:
        assert error.code == "study.network"
        return
    network = build_network(study)
    assert study.preprocessing.size is not None
    logits = network(torch.randn(1, 1, *study.preprocessing.size))
    tail = study.preprocessing.size if study.task.kind == "segmentation" else []
    assert list(logits.shape) == [1, 3, *tail]
