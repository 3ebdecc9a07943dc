"""Builds MONAI's networks from checked arguments. Imports torch: import it only to build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from consilium_common.models import libraries  # noqa: F401

# isort: split
import torch
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import DenseNet, DynUNet, ResNet, SegResNet, UNet
from monai.networks.nets.resnet import ResNetBlock
from torch import nn

from consilium_common.models.arguments import (
    DenseNet121Arguments,
    DynUNetArguments,
    NetworkArguments,
    ResNetArguments,
    SegResNetArguments,
    UNetArguments,
)

#: Numbers in which an image network describes an image where covariates are joined to it.
FEATURES: Final = 32


def norm_of(arguments: NetworkArguments) -> tuple[str, dict[str, Any]]:
    """Return the normalisation as MONAI's layer factory takes it."""
    if arguments.norm == "group":
        return "group", {"num_groups": arguments.groups, "affine": True}
    return arguments.norm, {"affine": True}


def act_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return a named activation; those that could change their input in place do not.

    In-place operations break engines that keep what entered a layer.
    """
    if name == "leakyrelu":
        return name, {"inplace": False, "negative_slope": 0.01}
    if name in ("relu", "elu"):
        return name, {"inplace": False}
    return name, {}


class _UNet(UNet):  # type: ignore[misc]
    """UNet whose last step up normalises nothing.

    MONAI's own, with residual units, normalises the output logits of each image, which ruins
    learning. Without residual units the two are the same network.
    """

    def _get_up_layer(
        self, in_channels: int, out_channels: int, strides: Any, is_top: bool
    ) -> nn.Module:
        if not is_top or self.num_res_units == 0:
            return super()._get_up_layer(in_channels, out_channels, strides, is_top)
        up = Convolution(
            self.dimensions,
            in_channels,
            out_channels,
            strides=strides,
            kernel_size=self.up_kernel_size,
            conv_only=True,
            is_transposed=True,
        )
        unit = ResidualUnit(
            self.dimensions,
            out_channels,
            out_channels,
            strides=1,
            kernel_size=self.kernel_size,
            subunits=1,
            last_conv_only=True,
        )
        return nn.Sequential(up, unit)


class _DynUNet(DynUNet):  # type: ignore[misc]
    """DynUNet that holds every layer once.

    MONAI's own holds them a second time in ``skip_layers``, so that each tensor has two names.
    What is computed is the same.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.skip_layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_block(x)
        skips = [x]
        for down in self.downsamples:
            x = down(x)
            skips.append(x)
        x = self.bottleneck(x)
        for up, skip in zip(self.upsamples, reversed(skips), strict=True):
            x = up(x, skip)
        return self.output_block(x)


class _ResNetBlock(ResNetBlock):  # type: ignore[misc]
    """ResNet's block without MONAI's in-place sum, which hooks on its layers cannot bear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(torch.Tensor, self.act(inner + shortcut))


class _SegResNetBlock(ResBlock):  # type: ignore[misc]
    """SegResNet's block, likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(self.act(self.norm1(x)))
        return cast(torch.Tensor, self.conv2(self.act(self.norm2(inner))) + x)


class _DynUNetBlock(UnetResBlock):  # type: ignore[misc]
    """DynUNet's residual block, likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(self.lrelu(self.norm1(self.conv1(x)))))
        shortcut = self.norm3(self.conv3(x)) if hasattr(self, "conv3") else x
        return cast(torch.Tensor, self.lrelu(inner + shortcut))


class Fusion(nn.Module):  # type: ignore[misc]
    """Late fusion: what an image network makes of the image, joined with covariates, to classes.

    Covariates come as constant channels behind the image's
    (:mod:`consilium_common.study.covariates`); one voxel of each says all.

    Parameters
    ----------
    image : torch.nn.Module
        Takes (N, inputs, *size); gives (N, :data:`FEATURES`).
    inputs, covariates, outputs : int
        Channels of the image and of the covariates; classes.
    """

    def __init__(self, image: nn.Module, inputs: int, covariates: int, outputs: int) -> None:
        super().__init__()
        self.image = image
        self.inputs = inputs
        # A hidden layer, so that a covariate may change what a feature of the image means; and a
        # straight way past it, on which few steps suffice to learn from a covariate by itself.
        self.joined = nn.Linear(FEATURES + covariates, FEATURES)
        self.act = nn.ReLU()
        self.classes = nn.Linear(FEATURES + covariates, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.act(self.image(x[:, : self.inputs]))
        values = x[:, self.inputs :].flatten(2)[..., 0].to(features.dtype)
        joined = self.act(self.joined(torch.cat([features, values], dim=1)))
        return cast(torch.Tensor, self.classes(torch.cat([joined, values], dim=1)))


#: Blocks of MONAI that add in place, and ours that compute the same.
_ADDING: Final[dict[type[nn.Module], type[nn.Module]]] = {
    ResNetBlock: _ResNetBlock,
    ResBlock: _SegResNetBlock,
    UnetResBlock: _DynUNetBlock,
}


def _sizes(values: list[Any]) -> list[Any]:
    return [tuple(value) if isinstance(value, list) else value for value in values]


def _unet(a: UNetArguments, dimensions: int, inputs: int, outputs: int) -> nn.Module:
    return _UNet(
        spatial_dims=dimensions,
        in_channels=inputs,
        out_channels=outputs,
        channels=tuple(a.channels),
        strides=tuple(_sizes(a.stride_list())),
        kernel_size=_sizes([a.kernel_size])[0],
        up_kernel_size=_sizes([a.up_kernel_size])[0],
        num_res_units=a.num_res_units,
        act=act_of(a.act),
        norm=norm_of(a),
        dropout=a.dropout,
    )


def _dynunet(a: DynUNetArguments, dimensions: int, inputs: int, outputs: int) -> nn.Module:
    strides = _sizes(a.stride_list())
    return _DynUNet(
        spatial_dims=dimensions,
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=_sizes(a.kernel_list()),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=list(a.filters),
        dropout=a.dropout or None,
        norm_name=norm_of(a),
        act_name=act_of(a.act),
        res_block=a.res_block,
    )


def _segresnet(a: SegResNetArguments, dimensions: int, inputs: int, outputs: int) -> nn.Module:
    network = SegResNet(
        spatial_dims=dimensions,
        in_channels=inputs,
        out_channels=outputs,
        init_filters=a.init_filters,
        blocks_down=tuple(a.blocks_down),
        blocks_up=tuple(a.up_list()),
        upsample_mode=a.upsample_mode,
        act=act_of(a.act),
        norm=norm_of(a),
        dropout_prob=a.dropout_prob or None,
    )
    # Held here and in the last block, so that a trained activation would have two names.
    del network.act_mod
    return network


def _densenet121(a: DenseNet121Arguments, dimensions: int, inputs: int, outputs: int) -> nn.Module:
    return DenseNet(
        spatial_dims=dimensions,
        in_channels=inputs,
        out_channels=outputs,
        init_features=a.init_features,
        growth_rate=a.growth_rate,
        block_config=a.LAYERS,
        bn_size=a.bn_size,
        act=act_of(a.act),
        norm=norm_of(a),
        dropout_prob=a.dropout_prob,
    )


def _resnet(layers: list[int]) -> Callable[[ResNetArguments, int, int, int], nn.Module]:
    def build(a: ResNetArguments, dimensions: int, inputs: int, outputs: int) -> nn.Module:
        return ResNet(
            block="basic",
            layers=layers,
            block_inplanes=list(a.block_inplanes),
            spatial_dims=dimensions,
            n_input_channels=inputs,
            num_classes=outputs,
            conv1_t_size=_sizes([a.conv1_t_size])[0],
            conv1_t_stride=_sizes([a.conv1_t_stride])[0],
            no_max_pool=a.no_max_pool,
            act=act_of(a.act),
            norm=norm_of(a),
        )

    return build


BUILDERS: dict[str, Callable[[Any, int, int, int], nn.Module]] = {
    "unet": _unet,
    "dynunet": _dynunet,
    "segresnet": _segresnet,
    "densenet121": _densenet121,
    "resnet10": _resnet([1, 1, 1, 1]),
    "resnet18": _resnet([2, 2, 2, 2]),
}


def build(
    name: str,
    arguments: NetworkArguments,
    *,
    dimensions: int,
    inputs: int,
    outputs: int,
    covariates: int = 0,
    normalise: bool = False,
) -> nn.Module:
    """Build a registered network.

    Parameters
    ----------
    name : str
        A key of :data:`BUILDERS`.
    arguments : NetworkArguments
        Checked by :func:`consilium_common.models.registry.validate_network`.
    dimensions : int
        2 or 3.
    inputs, outputs : int
        Channels of the image; classes.
    covariates : int
        Constant channels behind the image's, joined to its features (classification).
    normalise : bool
        Replace batch norm by group norm.

    Returns
    -------
    torch.nn.Module
        Takes ``(N, inputs + covariates, *size)``; gives logits ``(N, outputs, *size)`` for
        segmentation, ``(N, outputs)`` for classification. Nothing in place, every tensor float32.
    """
    made = FEATURES if covariates else outputs
    network = BUILDERS[name](arguments, dimensions, inputs, made)
    if covariates:
        network = Fusion(network, inputs, covariates, outputs)
    if arguments.norm != "batch" or normalise:
        replace_batch_norm(network, arguments)
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # layers that MONAI gives no argument for
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # The counter of batches is an integer and has no mean over sites; torch needs it only
            # to weigh all batches alike, which it does not do with a momentum.
            module.num_batches_tracked = None
        module.__class__ = _ADDING.get(type(module), type(module))
    return network


def batch_norms(network: nn.Module) -> list[str]:
    """Return the paths of all batch norms."""
    return [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]


def replace_batch_norm(network: nn.Module, arguments: NetworkArguments) -> None:
    """Replace every batch norm by the normalisation asked for, or else by group norm; in place.

    ResNet of MONAI 1.6 hands ``norm`` to its first layer only: resnet18 keeps 19 of 20.
    """
    for path in batch_norms(network):
        parent, _, name = path.rpartition(".")
        layer: Any = network.get_submodule(path)
        channels = layer.num_features
        norm: nn.Module
        if arguments.norm == "instance":
            three = isinstance(layer, nn.BatchNorm3d)
            kind = nn.InstanceNorm3d if three else nn.InstanceNorm2d
            norm = kind(channels, affine=True)
        else:
            groups = max(g for g in range(1, arguments.groups + 1) if channels % g == 0)
            norm = nn.GroupNorm(groups, channels)
        setattr(network.get_submodule(parent), name, norm)
