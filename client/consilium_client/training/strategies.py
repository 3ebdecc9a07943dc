"""What a site does differently under each strategy: its start, a bend of each step, what stays.

A round asks a strategy in this order: ``start`` (the weights to begin with), ``bend`` (a change of
every gradient between its computation and the optimiser's step), ``phases`` (what is trained for
how many steps), ``outcome`` (what leaves, and what the site keeps for its next round). FedAvg's
answers are the base class; each strategy changes what is its own. Imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consilium_client.training.plain_steps import Bend, Phase, unbent
from consilium_common.models.exchange import CONTROL
from consilium_common.models.personal import own_names
from consilium_common.models.state import read_trained, trained_tensors
from consilium_common.study import Study
from consilium_common.study.strategies import Ditto, FedBN, FedProx, FedRep, Scaffold

Tensors = Mapping[str, NDArray[np.float32]]


class SiteStrategy:
    """FedAvg at a site, and all that is the aggregator's matter alone.

    McMahan et al., AISTATS 2017.

    Parameters
    ----------
    study : Study
    network : torch.nn.Module
        With ``requires_grad`` as it is trained, on its device.

    Raises
    ------
    ConsiliumError
        ``study.strategy`` when the strategy does not fit the network.
    """

    #: How strongly a personal model, trained beside the shared one, is pulled; None: there is none.
    pull: float | None = None

    def __init__(self, study: Study, network: Any) -> None:
        self._study = study
        self._network = network
        self._own = own_names(network, study.federation.strategy)

    def start(self, model: Tensors, kept: Tensors) -> dict[str, NDArray[np.float32]]:
        """Return the weights that the round begins with: the global ones and the site's own."""
        return {**model, **{name: kept[name] for name in self._own if name in kept}}

    def personal(self, model: Tensors, kept: Tensors) -> dict[str, NDArray[np.float32]] | None:
        """Return the site's personal model beside a global one; None where it has none (yet)."""
        if not self._own or not self._own <= kept.keys():
            return None
        return self.start(model, kept)

    def bend(self, control: Tensors, kept: Tensors) -> Bend:
        """Return what changes each step's gradients; called when the network holds the start."""
        return unbent

    def phases(self, steps: int) -> list[Phase]:
        """Return what is trained for how many steps, in order."""
        return [Phase([p for p in self._network.parameters() if p.requires_grad], steps)]

    def outcome(
        self, bend: Bend, kept: Tensors
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Return what leaves the site, and what it keeps for its next round."""
        trained = read_trained(self._network)
        sent = {name: tensor for name, tensor in trained.items() if name not in self._own}
        return sent, {name: trained[name] for name in sorted(self._own)}


class _Prox(SiteStrategy):
    """FedProx: the gradient of μ/2·‖w − w_global‖² on every step (Li et al., MLSys 2020).

    In a private study it comes after clipping and noise. It is the same for every patient, a
    function of models that were released, so it is post-processing: it costs nothing, and clipping
    it with the patients' gradients would only cut into theirs.
    """

    def bend(self, control: Tensors, kept: Tensors) -> Bend:
        strategy = self._study.federation.strategy
        assert isinstance(strategy, FedProx)
        return Pull(self._network, strategy.mu)


class _Scaffold(SiteStrategy):
    """SCAFFOLD, option II: steps along g + c − c_i (Karimireddy et al., ICML 2020, algorithm 1).

    Option II sets c_i to c_i − c + (x − y_i)/(K·η), which for the paper's plain SGD is the mean of
    the round's K gradients. The mean itself is taken here: so momentum, AdamW and a falling
    learning rate do not distort it.

    In a private study the gradients are the noised ones, so the control variates are
    post-processing of what is charged, and the correction is added after clipping and noise.
    """

    def bend(self, control: Tensors, kept: Tensors) -> Bend:
        return Correction(self._network, control, kept)

    def outcome(
        self, bend: Bend, kept: Tensors
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        sent, _ = super().outcome(bend, kept)
        assert isinstance(bend, Correction)
        fresh = bend.variate()
        change, own = {}, {}
        for name, tensor in sent.items():
            # Running statistics have no gradient: their control variate stays zero.
            own[CONTROL + name] = fresh.get(name, np.zeros_like(tensor))
            before = kept.get(CONTROL + name)
            change[CONTROL + name] = (
                own[CONTROL + name] if before is None else own[CONTROL + name] - before
            )
        return {**sent, **change}, own


class _Rep(SiteStrategy):
    """FedRep: first the head alone, then the shared rest alone (Collins et al., ICML 2021)."""

    def phases(self, steps: int) -> list[Phase]:
        strategy = self._study.federation.strategy
        assert isinstance(strategy, FedRep)
        head: list[Any] = []
        rest: list[Any] = []
        for name, parameter in self._network.named_parameters():
            if parameter.requires_grad:
                (head if name in self._own else rest).append(parameter)
        # Of a round of one step, which a tiny cohort's epoch may be, the rest has it.
        first = min(max(1, round(strategy.head_share * steps)), steps - 1)
        return [Phase(head, first), Phase(rest, steps - first)]


class _Ditto(SiteStrategy):
    """Ditto: FedAvg, and a personal model v with gradients g(v) + λ(v − w_global).

    Li et al., ICML 2021, algorithm 1. The personal model is trained beside the shared one, from
    which nothing of it can be told: what leaves is FedAvg's update, bit for bit.
    """

    def __init__(self, study: Study, network: Any) -> None:
        super().__init__(study, network)
        strategy = study.federation.strategy
        assert isinstance(strategy, Ditto)
        self.pull = strategy.pull
        self._trained = {name for name, _ in trained_tensors(network)}

    def personal(self, model: Tensors, kept: Tensors) -> dict[str, NDArray[np.float32]] | None:
        if not self._trained <= kept.keys():
            return None
        return {**model, **{name: kept[name] for name in self._trained}}


class Pull:
    """Adds strength·(w − anchor) to the gradients; the anchor is where the network stands now."""

    def __init__(
        self, network: Any, strength: float, anchor: Mapping[str, NDArray[np.float32]] | None = None
    ) -> None:
        self._strength = strength
        self._pairs = [
            (
                parameter,
                parameter.detach().clone() if anchor is None else _like(parameter, anchor[name]),
            )
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]

    def __call__(self) -> None:
        """Change the gradients of one step, in place."""
        for parameter, anchor in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._strength)


class Correction:
    """Adds c − c_i to the gradients, and averages them as they were before."""

    def __init__(self, network: Any, control: Tensors, kept: Tensors) -> None:
        self._steps = 0
        self._parts = []
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            towards = _like(parameter, control[CONTROL + name])
            own = kept.get(CONTROL + name)
            if own is not None:
                towards = towards - _like(parameter, own)
            self._parts.append((name, parameter, towards, torch.zeros_like(parameter)))

    def __call__(self) -> None:
        """Change the gradients of one step, in place."""
        self._steps += 1
        for _, parameter, towards, total in self._parts:
            # A parameter that took no part in the loss has a gradient of zero.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total.add_(parameter.grad)
            parameter.grad.add_(towards)

    def variate(self) -> dict[str, NDArray[np.float32]]:
        """Return the mean of the gradients seen: the site's new control variate."""
        return {name: (total / self._steps).cpu().numpy() for name, _, _, total in self._parts}


_STRATEGIES: Mapping[type, type[SiteStrategy]] = {
    FedProx: _Prox,
    Scaffold: _Scaffold,
    FedBN: SiteStrategy,
    FedRep: _Rep,
    Ditto: _Ditto,
}


def site_strategy(study: Study, network: Any) -> SiteStrategy:
    """Return what the study's strategy does at a site; raises as :class:`SiteStrategy`."""
    return _STRATEGIES.get(type(study.federation.strategy), SiteStrategy)(study, network)


def _like(parameter: Any, array: NDArray[np.float32]) -> Any:
    return torch.tensor(array, dtype=parameter.dtype, device=parameter.device)
