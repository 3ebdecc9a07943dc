"""A network's exchanged tensors, read and written exactly. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from consilium_common.models.weights import DTYPE, Array, TensorSpec, check_tensors


def named_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers, each once, under their first name."""
    yield from network.named_parameters()
    kept = network.state_dict(keep_vars=True).keys()
    for name, buffer in network.named_buffers():
        if name in kept:
            yield name, buffer


def trained_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what training changes: parameters that are not frozen, and persistent buffers.

    Buffers are the running statistics of batch norm, in studies without privacy only.
    """
    for name, tensor in named_tensors(network):
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
            yield name, tensor


def specs_of(network: nn.Module) -> tuple[TensorSpec, ...]:
    """Return the specs of all exchanged tensors, sorted by name.

    Raises
    ------
    ValueError
        A tensor is not float32. No registered network has one, and an integer buffer (a counter
        of batches, for example) has no mean over sites.
    """
    return _specs(named_tensors(network))


def trained_specs_of(network: nn.Module) -> tuple[TensorSpec, ...]:
    """Return the specs of what training changes, sorted by name. Raises as :func:`specs_of`."""
    return _specs(trained_tensors(network))


def _specs(tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[TensorSpec, ...]:
    specs = []
    for name, tensor in tensors:
        if tensor.dtype != torch.float32:
            raise ValueError(f"tensor {name} is {tensor.dtype}, not {DTYPE}")
        specs.append(TensorSpec(name, tuple(tensor.shape)))
    return tuple(sorted(specs))


def read_weights(network: nn.Module) -> dict[str, Array]:
    """Return copies of all exchanged tensors as float32 arrays, sorted by name."""
    return _read(named_tensors(network))


def read_trained(network: nn.Module) -> dict[str, Array]:
    """Return copies of what training changes, as float32 arrays, sorted by name: the update."""
    return _read(trained_tensors(network))


def _read(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Array]:
    found = {
        name: np.array(tensor.detach().cpu().numpy(), dtype=np.float32, copy=True)
        for name, tensor in tensors
    }
    return {name: found[name] for name in sorted(found)}


def write_weights(network: nn.Module, tensors: Mapping[str, Array]) -> None:
    """Set all exchanged tensors, in place, on the device where each lives.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``: a name, shape or dtype differs or a value is not finite; the network is
        unchanged then.
    """
    check_tensors(tensors, specs_of(network), norm_bound=None)
    with torch.no_grad():
        for name, tensor in named_tensors(network):
            # torch.tensor copies: arrays from the wire are read-only views.
            tensor.copy_(torch.tensor(tensors[name]))
