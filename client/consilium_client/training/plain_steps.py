"""One round of ordinary training, for sites whose policy permits a study without privacy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from consilium_client.training.learner import Learner, Progress
from consilium_client.training.optimiser import build_optimiser, learning_rate
from consilium_client.training.patches import TrainingCase
from consilium_common.errors import ConsiliumError


def run_plain(learner: Learner, round_index: int, progress: Progress | None) -> float:
    """Train one round in place and return the mean loss, for local use only.

    The order of cases is seeded by the study's seed and the round, so a round can be repeated.

    Raises
    ------
    ConsiliumError
        ``run.diverged`` when the loss is no longer finite.
    """
    import torch

    training = learner.study.training
    rng = np.random.default_rng([training.seed, round_index])
    torch.manual_seed(int(rng.integers(2**63)))  # dropout
    trained = [p for p in learner.network.parameters() if p.requires_grad]
    optimiser = build_optimiser(training.optimiser, trained)
    batches = _batches(learner.source.cases, training.batch_size, rng)
    first, total = round_index * training.steps_per_round, learner.study.total_steps
    losses = []
    learner.network.train()
    for step in range(training.steps_per_round):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training.optimiser, first + step, total)
        loss = learner.batch_loss(*learner.source.batch(next(batches), rng))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        if progress is not None:
            progress(step + 1, training.steps_per_round)
    # Read once at the end: reading each loss would make a CUDA device wait every step.
    mean = float(torch.stack(losses).mean())
    if not np.isfinite(mean):
        raise ConsiliumError(
            "run.diverged",
            f"The loss is not finite in round {round_index + 1}.",
            hint="Lower training.optimiser.learning_rate, or look for images that hold NaN.",
        )
    return mean


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
