"""AdamW that knows how much of the squared gradient is privacy noise. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


class CorrectedAdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW whose second moment is freed of the noise's known variance (DP-AdamBC).

    Adam's second moment of a private gradient is mostly noise: all values of the gradient then get
    one step size and Adam becomes momentum SGD. Subtracting the variance (σC/B)², which is public,
    brings the signal back (Tang, Shpilevskiy and Lécuyer 2023, "DP-AdamBC"):
    m̂ / sqrt(max(v̂ − (σC/B)², floor)). Post-processing: it costs nothing.

    In place of the paper's tuned floor: the standard error of v̂ when the gradient is noise alone,
    (σC/B)²·sqrt(2/n), where n is the number of steps that v̂ effectively averages. What lies below
    cannot be told from noise.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
    lr, weight_decay : float
        As those of ``torch.optim.AdamW``; decay is decoupled.
    betas : tuple of float
        Decays of the moments (default: .9 and .999).

    Notes
    -----
    The key ``noise_deviation`` of every parameter group is the standard deviation, per value, of
    the noise in the gradients of the coming step. With 0 this is AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "noise_deviation": 0.0}
        super().__init__(parameters, settings)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        """Make one step from the parameters' gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)


def _update(parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = 0
        # Of the noise's variance at each step, the same average as that of the squared gradients:
        # adaptive clipping changes it between steps. And of the weights, their sum of squares.
        state["noise"] = state["squared_weights"] = 0.0
        state["first"] = torch.zeros_like(parameter)
        state["second"] = torch.zeros_like(parameter)
    one, two = group["betas"]
    state["step"] += 1
    state["noise"] = two * state["noise"] + (1 - two) * group["noise_deviation"] ** 2
    state["squared_weights"] = two**2 * state["squared_weights"] + (1 - two) ** 2
    state["first"].lerp_(parameter.grad, 1 - one)
    state["second"].mul_(two).addcmul_(parameter.grad, parameter.grad, value=1 - two)

    weight = 1 - two ** state["step"]
    noise = state["noise"] / weight
    floor = noise * math.sqrt(2 * state["squared_weights"]) / weight
    squares = (state["second"] / weight).sub_(noise).clamp_(min=floor)
    mean = state["first"] / (1 - one ** state["step"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    # 1e-8 as in AdamW: without noise a gradient of zeros has no second moment.
    parameter.addcdiv_(mean, squares.sqrt_().add_(1e-8), value=-group["lr"])
