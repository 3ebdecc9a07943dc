"""One round of patient-level private training: the mechanism's noisy gradients, then the optimiser.

Everything after the mechanism is post-processing. The update that leaves is the trained state, a
function of noisy gradients and of the global model alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium_client.training.engines.base import trained_parameters
from consilium_client.training.engines.choice import Choice, build_engine
from consilium_client.training.learner import Learner, Progress
from consilium_client.training.mechanism import Mechanism, require_truth
from consilium_client.training.optimiser import RoundSteps, build_optimiser
from consilium_client.training.plain_steps import Bend, unbent
from consilium_common.privacy.events import PrivacyEvent


def run_private(
    learner: Learner,
    mechanism: Mechanism,
    choice: Choice,
    steps: RoundSteps,
    *,
    bend: Bend = unbent,
    progress: Progress | None = None,
) -> tuple[float, PrivacyEvent, float]:
    """Train one round in place.

    Parameters
    ----------
    bend : callable
        The strategy's change of each noisy gradient, made of released models and earlier noisy
        gradients alone. It comes after clipping and noise, so it is post-processing; before them
        it would be clipped with the patients' gradients and leave them less room.

    Returns
    -------
    tuple of float, PrivacyEvent and float
        The mean loss of the patients drawn (nan when none was), for local use only; the event that
        was really realised, equal to the one that the mechanism claims; and the clip norm that the
        next round begins with.

    Raises
    ------
    ConsiliumError
        ``privacy.truth`` when what was done is not what the mechanism says.
    """
    training = learner.study.training
    trained = trained_parameters(learner.network)
    optimiser = build_optimiser(training.optimiser, trained)
    engine = build_engine(choice.name, learner.patient_task, expected=mechanism.denominator)
    run = mechanism.begin()
    learner.network.train()
    for step in range(steps.count):
        _set_gradients(trained, run.step(len(learner.source.patients), engine))
        bend()
        for group in optimiser.param_groups:
            group["lr"] = steps.learning_rate(training.optimiser, step)
            group["noise_deviation"] = run.noise_deviation
        optimiser.step()
        if progress is not None:
            progress(step + 1, steps.count)
    realised = require_truth(mechanism.event, run.realised())
    finite = [loss for loss in engine.losses if np.isfinite(loss)]
    mean = float(np.mean(finite)) if finite else float("nan")
    return mean, realised, run.clip_norm


def _set_gradients(parameters: list[Any], flat: Any) -> None:
    start = 0
    for parameter in parameters:
        part = flat[start : start + parameter.numel()]
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        start += parameter.numel()
