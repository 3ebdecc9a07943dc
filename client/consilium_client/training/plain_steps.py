"""One round of ordinary training, for sites whose policy permits a study without privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilium_client.training.learner import Learner, Progress
from consilium_client.training.optimiser import RoundSteps, build_optimiser
from consilium_client.training.patches import TrainingCase
from consilium_common.errors import ConsiliumError

#: Changes the gradients of one step in place, after they are whole and before the optimiser.
Bend = Callable[[], None]


def unbent() -> None:
    """Leave the gradients as they are."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of a round that train the same parameters."""

    parameters: Sequence[Any]
    steps: int


def run_plain(
    learner: Learner,
    steps: RoundSteps,
    phases: Sequence[Phase],
    bend: Bend = unbent,
    progress: Progress | None = None,
) -> float:
    """Train one round in place and return the mean loss, for local use only.

    The order of cases is seeded by the study's seed and the round, so a round can be repeated.

    Raises
    ------
    ConsiliumError
        ``run.diverged`` when the loss is no longer finite.
    """
    import torch

    training = learner.study.training
    rng = np.random.default_rng([training.seed, steps.round_index])
    torch.manual_seed(int(rng.integers(2**63)))  # dropout
    batches = _batches(learner.source.cases, training.batch_size, rng)
    losses: list[Any] = []
    learner.network.train()
    for phase in phases:
        optimiser = build_optimiser(training.optimiser, phase.parameters)
        with _only(learner.network, phase.parameters):
            for _ in range(phase.steps):
                for group in optimiser.param_groups:
                    group["lr"] = steps.learning_rate(training.optimiser, len(losses))
                loss = learner.batch_loss(*learner.source.batch(next(batches), rng))
                optimiser.zero_grad()
                loss.backward()
                bend()
                optimiser.step()
                losses.append(loss.detach())
                if progress is not None:
                    progress(len(losses), steps.count)
    # Read once at the end: reading each loss would make a CUDA device wait every step.
    mean = float(torch.stack(losses).mean())
    if not np.isfinite(mean):
        raise ConsiliumError(
            "run.diverged",
            f"The loss is not finite in round {steps.round_index + 1}.",
            hint="Lower training.optimiser.learning_rate, or look for images that hold NaN.",
        )
    return mean


@contextmanager
def _only(network: Any, parameters: Sequence[Any]) -> Iterator[None]:
    """Freeze all other parameters that are trained, and thaw them afterwards."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _batches(
    cases: list[TrainingCase], size: int, rng: np.random.Generator
) -> Iterator[list[TrainingCase]]:
    """Yield batches for ever: passes over all cases, each in a new order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting.extend(rng.permutation(len(cases)).tolist())
        yield [cases[i] for i in waiting[:size]]
        del waiting[:size]
