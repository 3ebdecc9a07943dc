"""Refuses networks for which patient-level privacy cannot be proven (rule 8 of the privacy rules).

The proof needs one patient's gradient to depend on that patient alone, and nothing but clipped,
noised gradients to change the network. Layers are judged by type and structure, never by what a
trial run happens to show. Losses need no check here: every loss that a study can name is the mean
of one term an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import nn
from torch.nn.parameter import is_lazy

from consilium_common.errors import ConsiliumError

#: Layers of MONAI whose forward adds to a tensor in place, whatever their arguments.
_ADDS_IN_PLACE: Final = frozenset(
    {
        "monai.networks.nets.resnet.ResNetBlock",
        "monai.networks.nets.resnet.ResNetBottleneck",
        "monai.networks.blocks.segresnet_block.ResBlock",
        "monai.networks.blocks.dynunet_block.UnetResBlock",
    }
)


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


def engine_problem(network: nn.Module, engine: str) -> str | None:
    """Return why a gradient engine cannot take a network, by layer path; None when it can.

    Judged by structure, without data. The loop takes every network that :func:`check_private`
    passes: it runs plain backpropagation. The others:

    - ``vmap`` runs one patient's computation for many: no layer may write to memory of its own
      (batch norm's statistics), and torch has no such rule for recurrent layers.
    - ``opacus`` hangs hooks on every trained layer. What a hook returned must not be changed in
      place afterwards, a trained layer may hold no buffer, and one that opacus has no gradient
      rule for may hold no further layers: it goes through torch.func as a whole. A parameter that
      takes no part in the output shows only when the network runs.

    Parameters
    ----------
    network : torch.nn.Module
        With ``requires_grad`` as it is trained; on the meta device too.
    engine : {"auto", "loop", "vmap", "opacus"}
        As the study names it.
    """
    if engine == "vmap":
        return next(_vmap_problems(network), None)
    if engine == "opacus":
        return next(_hook_problems(network), None)
    return None


def _vmap_problems(network: nn.Module) -> Iterator[str]:
    for path, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            yield f"{path or kind}: {kind} writes running statistics, which vmap cannot follow"
        if isinstance(module, nn.RNNBase):
            yield f"{path or kind}: {kind} is a recurrent layer, which vmap has no rule for"


def _hook_problems(network: nn.Module) -> Iterator[str]:
    from opacus import GradSampleModule

    for path, module in network.named_modules():
        kind = type(module).__name__
        place = path or kind
        if getattr(module, "inplace", False):
            yield f"{place}: {kind} changes its input in place, which hooks cannot bear"
        # By where the very class is defined: a class of our own that adds elsewhere is another.
        if f"{type(module).__module__}.{type(module).__qualname__}" in _ADDS_IN_PLACE:
            yield f"{place}: {kind} adds in place, which hooks cannot bear"
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if any(True for _ in module.buffers()):
            yield f"{place}: {kind} holds a buffer, which opacus refuses"
        # Layers without a rule of their own go through torch.func, which is right for one layer.
        known = type(module) in GradSampleModule.GRAD_SAMPLERS
        if not known and isinstance(module, nn.RNNBase):
            yield f"{place}: {kind} is a recurrent layer, which opacus has no rule for"
        if not known and any(True for _ in module.children()):
            yield (
                f"{place}: {kind} has parameters of its own beside further layers, for which "
                "opacus has no rule"
            )


def _findings(network: nn.Module) -> Iterator[str]:
    for path, module in network.named_modules():
        place = path or "the network itself"
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield (
                f"{place}: {kind} mixes the patients of a step; set model.normalise: true, or use "
                "group or instance norm (model.arguments.norm)"
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
