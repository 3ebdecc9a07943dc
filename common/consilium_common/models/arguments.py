"""The arguments of every registered network: literal, bounded, checked against the study.

No torch here: a study is checked in milliseconds, on machines that train nothing. Names are
MONAI's own, so that its documentation applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

#: One number for all axes, or one per axis.
PerAxis = int | list[int]

MAX_CHANNELS = 512
MAX_LEVELS = 7


def _per_axis(value: Any, name: str, allowed: Sequence[int]) -> PerAxis:
    """Return one of ``allowed``, or a list of two or three of them."""
    items = value if isinstance(value, list) and len(value) in (2, 3) else [value]
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items) and all(
        item in allowed for item in items
    ):
        result: PerAxis = value
        return result
    options = ", ".join(str(item) for item in allowed)
    raise ValueError(f"a {name} is one of {options}, or a list with one of these per axis")


Kernel = Annotated[PerAxis, PlainValidator(lambda value: _per_axis(value, "kernel", (1, 3, 5, 7)))]
Stride = Annotated[PerAxis, PlainValidator(lambda value: _per_axis(value, "stride", (1, 2, 3, 4)))]
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
Dropout = Annotated[float, Field(ge=0, le=0.9)]
Activation = Literal["prelu", "relu", "leakyrelu", "elu", "gelu"]


@dataclass(frozen=True)
class Level:
    """One resolution of a network.

    Attributes
    ----------
    stride : tuple of int
        By how much the image has shrunk here, per axis.
    channels : int
        Fewest channels that are normalised here.
    """

    stride: tuple[int, ...]
    channels: int


def along(value: PerAxis, axis: int) -> int:
    """Return the number that ``value`` gives for ``axis``."""
    return value[axis] if isinstance(value, list) else value


class NetworkArguments(BaseModel):
    """What all networks share: their normalisation.

    Group and instance norm never look beyond one image. Batch norm mixes the patients of a step,
    so that no gradient belongs to one patient, and its running statistics leave the site: a private
    study refuses it, unless ``model.normalise`` turns it into group norm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: Sizes must be multiples of the total stride, because skip connections join the levels.
    needs_multiple: ClassVar[bool] = False

    norm: Literal["group", "instance", "batch"] = "group"
    #: Groups of channels that are normalised together; with batch norm that ``model.normalise``
    #: replaces, the most: each layer takes the largest number up to it that divides its channels.
    groups: Annotated[int, Field(ge=1, le=64)] = 8

    @model_validator(mode="after")
    def _groups_need_group_norm(self) -> Self:
        if self.norm == "instance" and "groups" in self.model_fields_set:
            raise ValueError("groups belongs to norm: group")
        return self

    def levels(self, dimensions: int) -> list[Level]:
        """Return the network's levels, from the finest to the deepest."""
        raise NotImplementedError

    def normalised_channels(self, dimensions: int) -> tuple[int, ...]:
        """Return the channel counts that a normalisation layer sees."""
        return tuple(level.channels for level in self.levels(dimensions))

    def total_stride(self, dimensions: int) -> tuple[int, ...]:
        """Return by how much the network shrinks an image at its deepest level, per axis."""
        return self.levels(dimensions)[-1].stride

    def size_at(self, level: Level, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of an image of ``size`` at a level, in voxels per axis."""
        return tuple(math.ceil(n / stride) for n, stride in zip(size, level.stride, strict=True))

    def per_axis_fields(self) -> dict[str, list[PerAxis]]:
        """Return the values that may carry one number per axis, by field."""
        return {}


class UNetArguments(NetworkArguments):
    """MONAI's UNet; the default without residual units."""

    needs_multiple: ClassVar[bool] = True

    norm: Literal["group", "instance", "batch"] = "instance"
    channels: Annotated[list[Channels], Field(min_length=2, max_length=MAX_LEVELS)] = [
        16,
        32,
        64,
        128,
    ]
    #: One less than channels; 2 everywhere when left out.
    strides: list[Stride] | None = None
    kernel_size: Kernel = 3
    up_kernel_size: Kernel = 3
    num_res_units: Annotated[int, Field(ge=0, le=4)] = 0
    act: Activation = "prelu"
    dropout: Dropout = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strides is not None and len(self.strides) != len(self.channels) - 1:
            raise ValueError(
                f"strides has {len(self.strides)} entries for {len(self.channels)} channels; it "
                "needs one less than channels"
            )
        return self

    def stride_list(self) -> list[PerAxis]:
        """Return the stride of every step down."""
        return list(self.strides) if self.strides is not None else [2] * (len(self.channels) - 1)

    def levels(self, dimensions: int) -> list[Level]:
        # The last channels are a bottom without a stride of its own.
        return _cumulative([*self.stride_list(), 1], self.channels, dimensions)

    def per_axis_fields(self) -> dict[str, list[PerAxis]]:
        return {
            "strides": self.stride_list(),
            "kernel_size": [self.kernel_size],
            "up_kernel_size": [self.up_kernel_size],
        }


class DynUNetArguments(NetworkArguments):
    """MONAI's DynUNet (nnU-Net's network), without deep supervision."""

    needs_multiple: ClassVar[bool] = True

    norm: Literal["group", "instance", "batch"] = "instance"
    filters: Annotated[list[Channels], Field(min_length=3, max_length=MAX_LEVELS)] = [
        32,
        64,
        128,
        256,
    ]
    #: As many as filters, the first 1; 1, 2, 2, … when left out.
    strides: list[Stride] | None = None
    #: As many as filters; 3 everywhere when left out.
    kernel_size: list[Kernel] | None = None
    res_block: bool = False
    act: Activation = "leakyrelu"
    dropout: Dropout = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.filters)
        for name, values in (("strides", self.strides), ("kernel_size", self.kernel_size)):
            if values is not None and len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries; it needs {levels}, as filters")
        if self.strides is not None and set(_flat(self.strides[0])) != {1}:
            raise ValueError("the first of strides is 1, so that the output has the input's size")
        for level, (kernel, stride) in enumerate(
            zip(self.kernel_list(), self.stride_list(), strict=True)
        ):
            if any(along(kernel, a) < along(stride, a) - 1 for a in range(_axes(kernel, stride))):
                raise ValueError(
                    f"kernel {kernel} of level {level} is too small for stride {stride}; voxels "
                    "would be skipped"
                )
        widest = max(number for stride in self.stride_list() for number in _flat(stride))
        if self.res_block and widest > 2:
            raise ValueError(
                f"with res_block a stride is 1 or 2, not {widest}; the shortcut would skip voxels"
            )
        return self

    def stride_list(self) -> list[PerAxis]:
        """Return the stride of every level."""
        if self.strides is not None:
            return list(self.strides)
        return [1, *[2] * (len(self.filters) - 1)]

    def kernel_list(self) -> list[PerAxis]:
        """Return the kernel of every level."""
        return list(self.kernel_size) if self.kernel_size is not None else [3] * len(self.filters)

    def levels(self, dimensions: int) -> list[Level]:
        return _cumulative(self.stride_list(), self.filters, dimensions)

    def per_axis_fields(self) -> dict[str, list[PerAxis]]:
        return {"strides": self.stride_list(), "kernel_size": self.kernel_list()}


class SegResNetArguments(NetworkArguments):
    """MONAI's SegResNet, without the variational branch."""

    needs_multiple: ClassVar[bool] = True

    init_filters: Annotated[int, Field(ge=1, le=128)] = 16
    blocks_down: Annotated[
        list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=2, max_length=MAX_LEVELS)
    ] = [1, 2, 2, 4]
    #: One less than blocks_down; 1 everywhere when left out.
    blocks_up: list[Annotated[int, Field(ge=1, le=8)]] | None = None
    upsample_mode: Literal["nontrainable", "deconv"] = "nontrainable"
    act: Activation = "relu"
    dropout_prob: Dropout = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.blocks_down)
        if self.blocks_up is not None and len(self.blocks_up) != levels - 1:
            raise ValueError(
                f"blocks_up has {len(self.blocks_up)} entries for {levels} blocks_down; it needs "
                "one less"
            )
        widest = self.init_filters * 2 ** (levels - 1)
        if widest > MAX_CHANNELS:
            raise ValueError(
                f"init_filters {self.init_filters} doubles to {widest} channels over {levels} "
                f"levels; at most {MAX_CHANNELS}: take init_filters "
                f"{max(1, MAX_CHANNELS // 2 ** (levels - 1))} or fewer levels"
            )
        return self

    def up_list(self) -> list[int]:
        """Return the number of blocks at every step up."""
        return self.blocks_up if self.blocks_up is not None else [1] * (len(self.blocks_down) - 1)

    def levels(self, dimensions: int) -> list[Level]:
        return [
            Level((2**level,) * dimensions, self.init_filters * 2**level)
            for level in range(len(self.blocks_down))
        ]


class DenseNet121Arguments(NetworkArguments):
    """MONAI's DenseNet with the 6, 12, 24, 16 layers of DenseNet121."""

    LAYERS: ClassVar[tuple[int, ...]] = (6, 12, 24, 16)

    init_features: Annotated[int, Field(ge=8, le=128)] = 64
    growth_rate: Annotated[int, Field(ge=4, le=64)] = 32
    bn_size: Annotated[int, Field(ge=1, le=8)] = 4
    act: Activation = "relu"
    dropout_prob: Dropout = 0.0

    def normalised_channels(self, dimensions: int) -> tuple[int, ...]:
        # As DenseNet.__init__ counts them: every layer adds growth_rate, every transition halves.
        counts, width = {self.init_features, self.bn_size * self.growth_rate}, self.init_features
        for block, layers in enumerate(self.LAYERS):
            counts |= {width + layer * self.growth_rate for layer in range(layers + 1)}
            width += layers * self.growth_rate
            if block < len(self.LAYERS) - 1:
                width //= 2
        return tuple(sorted(counts))

    def levels(self, dimensions: int) -> list[Level]:
        fewest = min(self.normalised_channels(dimensions))
        return [Level((stride,) * dimensions, fewest) for stride in (2, 4, 8, 16, 32)]

    def size_at(self, level: Level, size: Sequence[int]) -> tuple[int, ...]:
        # The first two steps round up (padded), the transitions round down.
        stride = level.stride[0]
        return tuple(math.ceil(n / min(stride, 4)) // max(1, stride // 4) for n in size)


class ResNetArguments(NetworkArguments):
    """MONAI's ResNet of basic blocks: resnet10 and resnet18."""

    block_inplanes: Annotated[list[Channels], Field(min_length=4, max_length=4)] = [
        64,
        128,
        256,
        512,
    ]
    conv1_t_size: Kernel = 7
    conv1_t_stride: Stride = 2
    no_max_pool: bool = False
    act: Activation = "relu"

    def levels(self, dimensions: int) -> list[Level]:
        pool = 1 if self.no_max_pool else 2
        stem = Level(
            tuple(along(self.conv1_t_stride, axis) for axis in range(dimensions)),
            self.block_inplanes[0],
        )
        blocks = [
            Level(tuple(s * pool * 2**index for s in stem.stride), channels)
            for index, channels in enumerate(self.block_inplanes)
        ]
        return [stem, *blocks]

    def per_axis_fields(self) -> dict[str, list[PerAxis]]:
        return {"conv1_t_size": [self.conv1_t_size], "conv1_t_stride": [self.conv1_t_stride]}


def _cumulative(
    strides: Sequence[PerAxis], channels: Sequence[int], dimensions: int
) -> list[Level]:
    """Return the levels of a network that shrinks by ``strides[i]`` before ``channels[i]``."""
    total = (1,) * dimensions
    levels = []
    for stride, width in zip(strides, channels, strict=True):
        total = tuple(n * along(stride, axis) for axis, n in enumerate(total))
        levels.append(Level(total, width))
    return levels


def _flat(value: PerAxis) -> list[int]:
    return value if isinstance(value, list) else [value]


def _axes(*values: PerAxis) -> int:
    """Return how many axes the values name; lists of different length are refused later."""
    lengths = [len(value) for value in values if isinstance(value, list)]
    return min(lengths) if lengths else 1
