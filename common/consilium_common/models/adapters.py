"""Low-rank adapters: a frozen layer plus a small trained product of two layers. Imports torch."""

from __future__ import annotations

import math
from typing import Any, Final, cast

import torch
from torch import nn

#: Layers that an adapter can stand beside; convolutions of several groups stay as they are.
_CONVOLUTIONS: Final = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Final = (nn.ConvTranspose2d, nn.ConvTranspose3d)

#: Where the layer that was adapted stands within :class:`Adapted`.
BASE: Final = "base"


class Adapted(nn.Module):  # type: ignore[misc]
    """``base(x) + up(down(x))``: the layer's weight plus a product of rank r.

    Hu et al. 2021 (LoRA), section 4.1, here for convolutions too. With the weight of a convolution
    unfolded to (out, in · kernel), ``down`` is (r, in · kernel), a convolution to r channels with
    the layer's own kernel and stride, and ``up`` is (out, r), a 1 × 1 convolution. A transposed
    convolution is unfolded to (in, out · kernel): ``down`` is then the 1 × 1 convolution and ``up``
    has the kernel. ``up`` is zero at the start, so that the function begins unchanged. Both are
    ordinary layers: every gradient engine knows them.
    """

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = down
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for ``x``."""
        return cast(torch.Tensor, self.base(x) + self.up(self.down(x)))


def adapt(network: nn.Module, rank: int, kept: str) -> list[str]:
    """Freeze ``network`` and put adapters beside its layers, in place.

    Biases and the scales of norms stay frozen, as in Hu et al. 2021 (section 4.2) and for private
    training in Yu et al. 2022: they add noise and little else. The output layer is trained itself,
    as both do with their heads: its task is new, and it is small.

    Parameters
    ----------
    network : torch.nn.Module
        Its ``down`` layers draw their weights from torch's generator.
    rank : int
        Largest rank. A layer takes less where a product of that rank would have no fewer values
        than the layer; one where rank 1 has no fewer stays frozen.
    kept : str
        Path of the output layer, which is trained itself.

    Returns
    -------
    list of str
        Paths of the adapted layers.
    """
    network.requires_grad_(False)
    network.get_submodule(kept).requires_grad_(True)
    adapted = []
    for path, layer in list(network.named_modules()):
        pair = _pair(layer, rank) if path and path != kept else None
        if pair is None:
            continue
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, Adapted(layer, *pair))
        adapted.append(path)
    return adapted


def _pair(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module] | None:
    """Return ``down`` and ``up`` for a layer; None where it takes no adapter."""
    down: nn.Module
    up: nn.Module
    if isinstance(layer, nn.Linear):
        r = _rank(layer.in_features, layer.out_features, rank)
        if r == 0:
            return None
        down = nn.Linear(layer.in_features, r, bias=False)
        up = nn.Linear(r, layer.out_features, bias=False)
    elif isinstance(layer, _CONVOLUTIONS) and layer.groups == 1:
        kind: Any = type(layer)
        r = _rank(layer.in_channels * math.prod(layer.kernel_size), layer.out_channels, rank)
        if r == 0:
            return None
        down = kind(
            layer.in_channels,
            r,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        up = kind(r, layer.out_channels, 1, bias=False)
    elif isinstance(layer, _TRANSPOSED) and layer.groups == 1:
        kind = type(layer)
        narrow = nn.Conv2d if isinstance(layer, nn.ConvTranspose2d) else nn.Conv3d
        r = _rank(layer.in_channels, layer.out_channels * math.prod(layer.kernel_size), rank)
        if r == 0:
            return None
        down = narrow(layer.in_channels, r, 1, bias=False)
        up = kind(
            r,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation=layer.dilation,
            bias=False,
        )
    else:
        return None
    nn.init.zeros_(cast(torch.Tensor, up.weight))
    return down, up


def _rank(rows: int, columns: int, rank: int) -> int:
    """Return the largest rank up to ``rank`` whose two factors are fewer values than the matrix."""
    # r · (rows + columns) < rows · columns; such an r is below both, so it is a rank.
    return min(rank, (rows * columns - 1) // (rows + columns))
