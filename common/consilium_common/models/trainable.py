"""What of a network is trained; everything else stays as it began. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from consilium_common.errors import ConsiliumError
from consilium_common.models.adapters import BASE, Adapted, adapt
from consilium_common.study.document import printable

#: Layers that mix channels; norms and activations have weights too, but no output of their own.
_WEIGHTED = (
    nn.Linear,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def choose_trainable(network: nn.Module, trainable: str | Sequence[str], rank: int) -> None:
    """Set ``requires_grad`` as the study asks; with ``adapters``, add them first. In place.

    Parameters
    ----------
    network : torch.nn.Module
        As built, everything trained.
    trainable : {"all", "first+last", "adapters"} or sequence of str
        ``first+last``: the first and the last convolution or linear layer in the order in which
        images pass them, weight and bias. A sequence: shell-style patterns on parameter names,
        upper and lower case distinguished.
    rank : int
        Largest rank of the adapters.

    Raises
    ------
    ConsiliumError
        ``study.trainable`` when a pattern matches no parameter; it names the key.
    """
    if trainable == "all":
        return
    first, last = ends(network)
    if trainable == "adapters":
        adapt(network, rank, last)
    elif trainable == "first+last":
        network.requires_grad_(False)
        network.get_submodule(first).requires_grad_(True)
        network.get_submodule(last).requires_grad_(True)
    else:
        _by_patterns(network, trainable)


def ends(network: nn.Module) -> tuple[str, str]:
    """Return the paths of the first and last convolution or linear layer.

    Registered networks hold their layers in the order in which images pass them.
    """
    paths = [path for path, layer in network.named_modules() if isinstance(layer, _WEIGHTED)]
    if not paths:
        raise ValueError("the network has no convolution and no linear layer")
    return paths[0], paths[-1]


def base_names(network: nn.Module) -> dict[str, str]:
    """Return the name of every tensor of the base network here, by its name without adapters."""
    inside = [path for path, layer in network.named_modules() if isinstance(layer, Adapted)]
    names = {}
    for name in network.state_dict():
        home = next((path for path in inside if name.startswith(f"{path}.")), None)
        if home is None:
            names[name] = name
        elif name.startswith(f"{home}.{BASE}."):
            names[f"{home}.{name.removeprefix(f'{home}.{BASE}.')}"] = name
    return names


def _by_patterns(network: nn.Module, patterns: Sequence[str]) -> None:
    parameters = dict(network.named_parameters())
    chosen = set()
    for index, pattern in enumerate(patterns):
        matched = {name for name in parameters if fnmatchcase(name, pattern)}
        if not matched:
            some = list(parameters)
            raise ConsiliumError(
                "study.trainable",
                f"`model.trainable[{index}]` is {printable(pattern)!r}, which no parameter's name "
                "matches.",
                hint=f"Names here are {some[0]} … {some[-1]}; `*` stands for any text.",
            )
        chosen |= matched
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
