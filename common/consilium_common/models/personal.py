"""What of a network is a site's own under FedBN and FedRep and never leaves it. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from consilium_common.errors import ConsiliumError
from consilium_common.models.state import trained_tensors
from consilium_common.models.trainable import ends
from consilium_common.study.document import printable
from consilium_common.study.strategies import FedBN, FedRep, Strategy

_NORMALISATIONS: Final = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def own_names(network: nn.Module, strategy: Strategy) -> frozenset[str]:
    """Return the names of the trained tensors that each site keeps for itself.

    FedBN: scale, shift and running statistics of every normalisation layer. FedRep: the head.
    Empty under every other strategy.

    Parameters
    ----------
    network : torch.nn.Module
        With ``requires_grad`` as it is trained; on the meta device too.

    Raises
    ------
    ConsiliumError
        ``study.strategy`` when nothing would be a site's own, or nothing would be shared.
    """
    match strategy:
        case FedBN():
            own = _normalisation(network)
            hint = "Give the network another norm in model.arguments, or take fedavg."
        case FedRep():
            own = _head(network, strategy.head)
            hint = "Name a part of what is trained in federation.strategy.head."
        case _:
            return frozenset()
    trained = {name for name, _ in trained_tensors(network)}
    parameters = {name for name, tensor in network.named_parameters() if tensor.requires_grad}
    if not own & trained:
        raise _unfit(f"{strategy.name} would leave nothing to the sites: no part is theirs", hint)
    if not parameters - own:
        raise _unfit(f"{strategy.name} would share nothing: every trained part stays", hint)
    return frozenset(own & trained)


def _normalisation(network: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, layer in network.named_modules()
        if isinstance(layer, _NORMALISATIONS)
        for name in layer.state_dict()
    }


def _head(network: nn.Module, patterns: Sequence[str] | None) -> set[str]:
    names = [name for name, _ in trained_tensors(network)]
    wanted = [f"{ends(network)[1]}.*"] if patterns is None else patterns
    for index, pattern in enumerate(wanted):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _unfit(
                f"`federation.strategy.head[{index}]` is {printable(pattern)!r}, which nothing "
                "that is trained matches"
                if patterns is not None
                else "the last layer, which is fedrep's head, is not trained",
                f"Trained here are {names[0]} … {names[-1]}; `*` stands for any text.",
            )
    return {name for name in names for pattern in wanted if fnmatchcase(name, pattern)}


def _unfit(message: str, hint: str) -> ConsiliumError:
    return ConsiliumError("study.strategy", f"{message}.", where="federation.strategy", hint=hint)
