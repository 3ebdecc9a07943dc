"""The networks a study may name: checked without torch, built from the study alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pydantic import ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.models.arguments import (
    DenseNet121Arguments,
    DynUNetArguments,
    NetworkArguments,
    ResNetArguments,
    SegResNetArguments,
    UNetArguments,
)
from consilium_common.models.weights import Array, TensorSpec
from consilium_common.study.problems import Problem, nearest, problems_of, raise_problems
from consilium_common.study.schema import Study

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MAX_PARAMETERS",
    "NETWORKS",
    "TensorSpec",
    "build_network",
    "initial_weights",
    "network_arguments",
    "network_problems",
    "parameter_count",
    "tensor_specs",
    "validate_network",
]

#: Largest number of trained values: 800 MB of float32 a round and site.
MAX_PARAMETERS: Final = 200_000_000


@dataclass(frozen=True)
class NetworkEntry:
    """One registered network: its arguments and the task it serves (2D and 3D alike)."""

    arguments: type[NetworkArguments]
    task: Literal["segmentation", "classification"]
    title: str


NETWORKS: Final[dict[str, NetworkEntry]] = {
    "unet": NetworkEntry(UNetArguments, "segmentation", "U-Net"),
    "dynunet": NetworkEntry(DynUNetArguments, "segmentation", "DynUNet (nnU-Net's network)"),
    "segresnet": NetworkEntry(SegResNetArguments, "segmentation", "SegResNet"),
    "densenet121": NetworkEntry(DenseNet121Arguments, "classification", "DenseNet121"),
    "resnet10": NetworkEntry(ResNetArguments, "classification", "ResNet10"),
    "resnet18": NetworkEntry(ResNetArguments, "classification", "ResNet18"),
}


def validate_network(study: Study) -> None:
    """Check that the study's network exists, has valid arguments and fits the task. No torch.

    Raises
    ------
    ConsiliumError
        ``study.network``: everything that is wrong, each with its key path and the fix.
    """
    raise_problems(network_problems(study), f"study {study.name}")


def network_arguments(study: Study) -> NetworkArguments:
    """Return the checked arguments, every default filled in. Errors as `validate_network`."""
    validate_network(study)
    entry = NETWORKS[study.model.network]
    return entry.arguments.model_validate(study.model.arguments, strict=True)


def network_problems(study: Study) -> list[Problem]:
    """Return everything that is wrong with the study's network; empty when it fits."""
    name = study.model.network
    entry = NETWORKS.get(name)
    if entry is None:
        text = f"there is no network `{name}`; {nearest(name, NETWORKS)}"
        return [Problem(("model", "network"), text, "study.network")]
    found = []
    if entry.task != study.task.kind:
        fitting = ", ".join(key for key, one in NETWORKS.items() if one.task == study.task.kind)
        text = f"`{name}` is for {entry.task}; for {study.task.kind} take one of {fitting}"
        found.append(Problem(("model", "network"), text))
    try:
        arguments = entry.arguments.model_validate(study.model.arguments, strict=True)
    except ValidationError as error:
        found += problems_of(error, entry.arguments, ("model", "arguments"))
    else:
        found += _fit(study, arguments) if not found else []
    return [Problem(one.path, one.text, "study.network") for one in found]


def _fit(study: Study, arguments: NetworkArguments) -> Iterator[Problem]:
    """Yield what does not fit between valid arguments and the rest of the study."""
    dimensions = study.task.dimensions
    wrong_axes = [
        (field, value)
        for field, values in arguments.per_axis_fields().items()
        for value in values
        if isinstance(value, list) and len(value) != dimensions
    ]
    for field, value in wrong_axes:
        text = f"`model.arguments.{field}` has {value} in a study of {dimensions} axes"
        yield Problem(("model", "arguments", field), text)
    if wrong_axes:
        return  # nothing further can be computed from them
    if arguments.norm == "group":
        channels = arguments.normalised_channels(dimensions)
        odd = [n for n in channels if n % arguments.groups]
        if odd:
            text = f"`groups` {arguments.groups} does not divide {odd[0]} channels"
            fitting = _groups_for(channels, arguments.groups)
            yield Problem(("model", "arguments", "groups"), f"{text}; take groups: {fitting}")
    yield from _size_problems(study, arguments)


def _groups_for(channels: tuple[int, ...], groups: int) -> int:
    """Return the largest number of groups up to ``groups`` that divides every channel count."""
    return max(g for g in range(1, groups + 1) if all(n % g == 0 for n in channels))


def _size_problems(study: Study, arguments: NetworkArguments) -> Iterator[Problem]:
    """Yield what is wrong with the size of the images that the network is trained on."""
    if study.training.patch is not None:
        path, size = ("training", "patch"), study.training.patch
    elif study.preprocessing.size is not None:
        path, size = ("preprocessing", "size"), study.preprocessing.size
    else:
        text = "images of different sizes cannot be trained on; give `training.patch`"
        yield Problem(("training",), f"{text} or `preprocessing.size`")
        return
    key = ".".join(path)
    strides = arguments.total_stride(len(size))
    if arguments.needs_multiple and any(n % s for n, s in zip(size, strides, strict=True)):
        lower = [max(n // s, 1) * s for n, s in zip(size, strides, strict=True)]
        upper = [-(-n // s) * s for n, s in zip(size, strides, strict=True)]
        options = f"{lower} or {upper}" if lower != upper else f"{upper}"
        text = f"`{key}` {size} is not a multiple of the network's stride {list(strides)}"
        yield Problem(path, f"{text}; take {options}")
        return
    levels = arguments.levels(len(size))
    if any(0 in arguments.size_at(level, size) for level in levels):
        text = f"`{key}` {size} is too small: the network shrinks it by {list(strides)}"
        yield Problem(path, f"{text}; take at least {list(strides)}")
        return
    # torch refuses to normalise a single value.
    alone = [one for one in levels if all(n == 1 for n in arguments.size_at(one, size))]
    if alone and arguments.norm == "instance":
        text = f"`{key}` {size} leaves one voxel at the deepest level, which has no statistics"
        yield Problem(path, f"{text}; take twice the size, or `model.arguments.norm: group`")
    elif any(level.channels == arguments.groups for level in alone):
        text = f"`{key}` {size} leaves one voxel at a level of {arguments.groups} channels"
        yield Problem(path, f"{text}; take twice the size, or fewer `model.arguments.groups`")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` within the block and leave torch's generators as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would reseed those of the GPUs too.
        torch.default_generator.manual_seed(seed)
        yield


def _build(study: Study) -> nn.Module:
    arguments = network_arguments(study)
    from consilium_common.models.networks import build

    return build(
        study.model.network,
        arguments,
        dimensions=study.task.dimensions,
        inputs=len(study.task.inputs),
        outputs=len(study.task.classes),
    )


def _outline(study: Study) -> nn.Module:
    """Build the network without memory: shapes only, however large."""
    import torch

    with torch.device("meta"):
        network = _build(study)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > MAX_PARAMETERS:
        raise ConsiliumError(
            "study.network",
            f"The network has {count:,} parameters; at most {MAX_PARAMETERS:,}.",
            where=f"study {study.name}",
            hint="Take fewer channels, smaller kernels or fewer levels in model.arguments.",
        )
    return network


def build_network(study: Study) -> nn.Module:
    """Build the study's network on the CPU, in training mode, with its initial weights.

    The weights follow from ``training.seed`` alone; torch's own generators are left untouched.

    Returns
    -------
    torch.nn.Module
        Takes ``(N, inputs, *size)``. Gives logits: ``(N, classes, *size)`` for segmentation
        (softmax over the classes, background first), ``(N, classes)`` for classification.

    Raises
    ------
    ConsiliumError
        ``study.network``: as :func:`validate_network`, or more than :data:`MAX_PARAMETERS`.
    """
    _outline(study)
    with _seeded(study.training.seed):
        return _build(study)


def initial_weights(study: Study) -> dict[str, Array]:
    """Return the weights a study starts from, float32 by name, sorted. As `build_network`."""
    network = build_network(study)
    from consilium_common.models.state import read_weights

    return read_weights(network)


def tensor_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return name, shape and dtype of every exchanged tensor, sorted by name."""
    network = _outline(study)
    from consilium_common.models.state import specs_of

    return specs_of(network)


def parameter_count(study: Study) -> int:
    """Return how many values the study trains."""
    return sum(parameter.numel() for parameter in _outline(study).parameters())
