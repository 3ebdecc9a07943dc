"""The optimiser of one round, and the learning rate over all rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from consilium_common.study.schema import Optimiser


def build_optimiser(settings: Optimiser, parameters: Iterable[Any]) -> Any:
    """Return a fresh torch optimiser: federated averaging starts each round without memory."""
    import torch

    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    if settings.name == "adamw-bc":
        from consilium_client.training.corrected_adam import CorrectedAdamW

        return CorrectedAdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def learning_rate(settings: Optimiser, step: int, total: int) -> float:
    """Return the learning rate of ``step`` (0 to ``total`` − 1), counted over the whole study.

    ``cosine`` falls from the study's rate to nearly 0 (Loshchilov and Hutter 2017, one cycle).
    """
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
