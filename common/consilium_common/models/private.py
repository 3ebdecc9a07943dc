"""Refuses networks for which patient-level privacy cannot be proven (rule 8 of the privacy rules).

The proof needs one patient's gradient to depend on that patient alone, and nothing but clipped,
noised gradients to change the network. Layers are judged by type and structure, never by what a
trial run happens to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from consilium_common.errors import ConsiliumError


def check_private(network: nn.Module) -> None:
    """Refuse a network that patient-level DP-SGD cannot be proven for.

    Refused: batch norm of any form; padding that is not zeros; parameters with two names or in
    shared memory; buffers of any kind (running statistics, spectral norm's vectors: they may be
    updated from data without clipping or noise); lazy layers, whose parameters do not exist yet.

    Raises
    ------
    ConsiliumError
        ``privacy.network``: every finding with its layer's path and what to do.
    """
    findings = list(_findings(network))
    if findings:
        listed = "\n".join(f"  {finding}" for finding in findings)
        raise ConsiliumError(
            "privacy.network",
            f"Privacy of a patient cannot be proven for this network:\n{listed}",
            where=type(network).__name__,
            hint="Change the layers named, or train without privacy where the site permits it.",
        )


def _findings(network: nn.Module) -> Iterator[str]:
    for path, module in network.named_modules():
        place = path or "the network itself"
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield (
                f"{place}: {kind} mixes the patients of a step; use group or instance norm "
                "(model.arguments.norm)"
            )
            continue
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(
            is_lazy(p) for p in module.parameters(recurse=False)
        ):
            yield f"{place}: {kind} has no parameters before its first input; give its sizes"
            continue
        padding = getattr(module, "padding_mode", "zeros")
        if padding != "zeros":
            yield f"{place}: {kind} pads with {padding!r}; use padding_mode 'zeros'"
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            yield (
                f"{place}: {kind} keeps running statistics of the images; use "
                "track_running_stats=False"
            )
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None:
                yield (
                    f"{place}: {kind} holds the buffer {name!r}, which data could change without "
                    "clipping or noise; use a layer without buffers"
                )
    yield from _shared(network)


def _shared(network: nn.Module) -> Iterator[str]:
    """Find parameters under two names, and different ones in the same memory."""
    names: dict[int, str] = {}
    memory: dict[Any, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            continue
        if id(parameter) in names:
            yield (
                f"{name}: the same parameter as {names[id(parameter)]}; give each layer parameters "
                "of its own"
            )
            continue
        names[id(parameter)] = name
        if parameter.device.type == "meta":  # has no memory to share
            continue
        storage = parameter.untyped_storage().data_ptr()
        if storage and storage in memory:
            yield f"{name}: shares memory with {memory[storage]}; give each layer memory of its own"
        memory.setdefault(storage, name)
