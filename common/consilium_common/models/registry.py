"""The networks a study may name: checked without torch, built from the study alone."""

from __future__ import annotations

import hashlib
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
from consilium_common.models.weights import Array, TensorSpec, check_tensors, unpack
from consilium_common.study.covariates import covariate_channels
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
    "normalised_layers",
    "outline",
    "parameter_count",
    "start_weights",
    "tensor_specs",
    "trained_count",
    "trained_specs",
    "validate_network",
]

#: Largest number of values: 800 MB of float32 a round and site.
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
    if (
        arguments.norm == "batch"
        and "groups" in arguments.model_fields_set
        and not study.model.normalise
    ):
        text = "`groups` belongs to norm: group, or to batch norm with `model.normalise: true`"
        yield Problem(("model", "arguments", "groups"), text)
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
    # `normalise` replaces batch norm alone.
    grouped = arguments.norm == "group" or (arguments.norm == "batch" and study.model.normalise)
    if alone and not grouped:
        text = f"`{key}` {size} leaves one voxel at the deepest level, which has no statistics"
        yield Problem(path, f"{text}; take twice the size, or `model.arguments.norm: group`")
        return
    single = [
        level.channels
        for level in alone
        if _groups_for((level.channels,), arguments.groups) == level.channels
    ]
    if single:
        text = f"`{key}` {size} leaves one voxel at a level of {single[0]} channels"
        yield Problem(path, f"{text}; take twice the size, or fewer `model.arguments.groups`")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` within the block and leave torch's generators as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would reseed those of the GPUs too.
        torch.default_generator.manual_seed(seed)
        yield


def _build(study: Study, *, normalise: bool) -> nn.Module:
    """Build the network without adapters, everything trained."""
    arguments = network_arguments(study)
    from consilium_common.models.networks import build

    return build(
        study.model.network,
        arguments,
        dimensions=study.task.dimensions,
        inputs=len(study.task.inputs),
        outputs=len(study.task.classes),
        covariates=covariate_channels(study.task),
        normalise=normalise,
    )


def _complete(study: Study) -> nn.Module:
    """Build the network as it is trained."""
    network = _build(study, normalise=study.model.normalise)
    from consilium_common.models.trainable import choose_trainable

    choose_trainable(network, study.model.trainable, study.model.adapter_rank)
    return network


def outline(study: Study) -> nn.Module:
    """Build the network on torch's meta device: layers and shapes without memory for weights.

    Raises
    ------
    ConsiliumError
        As :func:`build_network`.
    """
    import torch

    with torch.device("meta"):
        network = _complete(study)
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

    Batch norm is replaced where the study says ``normalise``, adapters are added where it asks for
    them, and ``requires_grad`` says what is trained. The weights, those of adapters too, follow
    from ``training.seed`` alone; torch's own generators are left untouched.

    Returns
    -------
    torch.nn.Module
        Takes ``(N, inputs, *size)``. Gives logits: ``(N, classes, *size)`` for segmentation
        (softmax over the classes, background first), ``(N, classes)`` for classification.

    Raises
    ------
    ConsiliumError
        ``study.network``: as :func:`validate_network`, or more than :data:`MAX_PARAMETERS`;
        ``study.trainable``: a pattern of ``model.trainable`` matches nothing.
    """
    outline(study)
    with _seeded(study.training.seed):
        return _complete(study)


def normalised_layers(study: Study) -> tuple[str, ...]:
    """Return the paths of the batch norms that ``model.normalise`` turns into group norms."""
    if not study.model.normalise:
        return ()
    import torch

    from consilium_common.models.networks import batch_norms

    with torch.device("meta"):
        return tuple(batch_norms(_build(study, normalise=False)))


def initial_weights(study: Study) -> dict[str, Array]:
    """Return the weights that follow from the seed, float32 by name, sorted. As `build_network`.

    A study with a public start begins with :func:`start_weights` instead.
    """
    network = build_network(study)
    from consilium_common.models.state import read_weights

    return read_weights(network)


def start_weights(study: Study, blob: bytes) -> dict[str, Array]:
    """Return the weights a study with a public start begins with, float32 by name, sorted.

    Parameters
    ----------
    study : Study
        With ``model.start``.
    blob : bytes
        The safetensors file: exactly the network's tensors before adapters, after ``normalise``.

    Returns
    -------
    dict of str to ndarray
        The file's tensors, and adapters as they begin: the function is the file's.

    Raises
    ------
    ConsiliumError
        ``study.start``: the study names no start, the file is another than the one named, or its
        tensors are not the network's; otherwise as :func:`build_network`.
    """
    start = study.model.start
    if start is None:
        raise ConsiliumError(
            "study.start",
            "The study begins from its seed; it names no public start.",
            where=f"study {study.name}",
            hint="Give model.start in the study, or leave the file of weights out.",
        )
    found = hashlib.sha256(blob).hexdigest()
    if found != start.sha256:
        raise ConsiliumError(
            "study.start",
            f"The file of weights has SHA-256 {found}, and the study names {start.sha256}.",
            where="model.start.sha256",
            hint="Hand over the file that the sites approved, or propose a study that names this.",
        )
    network = build_network(study)
    from consilium_common.models.state import read_weights
    from consilium_common.models.trainable import base_names

    weights, names = read_weights(network), base_names(network)
    specs = [TensorSpec(name, weights[here].shape) for name, here in names.items()]
    try:
        tensors = unpack(blob)
        check_tensors(tensors, specs, norm_bound=None)
    except ConsiliumError as error:
        raise ConsiliumError(
            "study.start",
            f"The public start does not fit the network. {error.message}",
            where="model.start",
            hint="Pre-train the very network of the study, before adapters, and write float32 "
            "safetensors without metadata.",
        ) from error
    return weights | {names[name]: tensor for name, tensor in tensors.items()}


def tensor_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return name, shape and dtype of every tensor of the network, sorted by name."""
    network = outline(study)
    from consilium_common.models.state import specs_of

    return specs_of(network)


def trained_specs(study: Study) -> tuple[TensorSpec, ...]:
    """Return the specs of what is trained, sent and aggregated, sorted by name."""
    network = outline(study)
    from consilium_common.models.state import trained_specs_of

    return trained_specs_of(network)


def parameter_count(study: Study) -> int:
    """Return how many parameters the network has, trained or frozen, adapters included."""
    return sum(parameter.numel() for parameter in outline(study).parameters())


def trained_count(study: Study) -> int:
    """Return how many values the study trains: those that privacy noise is added to."""
    return sum(p.numel() for p in outline(study).parameters() if p.requires_grad)
