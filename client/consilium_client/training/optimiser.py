"""The optimiser of one round, and the learning rate over all rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from consilium_common.models.exchange import steps_of
from consilium_common.study import Study
from consilium_common.study.schema import Optimiser


@dataclass(frozen=True)
class RoundSteps:
    """Where the steps of one round stand among all steps of a site in the study; public."""

    #: From 0.
    round_index: int
    #: Steps of each round.
    count: int
    #: Steps of all rounds.
    total: int

    @classmethod
    def of(cls, study: Study, round_index: int, cohort_size: int) -> RoundSteps:
        """Return the steps of a round at a site that declared so many patients."""
        count = steps_of(study, cohort_size)
        return cls(round_index, count, count * study.federation.rounds)

    def learning_rate(self, settings: Optimiser, step: int) -> float:
        """Return the learning rate of the round's ``step``, from 0."""
        return learning_rate(settings, self.round_index * self.count + step, self.total)


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
