"""One round of patient-level private training: the mechanism's noisy gradients, then the optimiser.

Everything after the mechanism is post-processing. The update that leaves is the trained state, a
function of noisy gradients and of the global model alone.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from consilium_client.training.learner import Learner, Progress
from consilium_client.training.mechanism import Mechanism, require_truth
from consilium_client.training.optimiser import build_optimiser, learning_rate
from consilium_client.training.patient_loop import PatientLoop
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters


def run_private(
    learner: Learner,
    parameters: PrivacyParameters,
    cohort_size: int,
    round_index: int,
    progress: Progress | None,
) -> tuple[float, PrivacyEvent]:
    """Train one round in place.

    Returns
    -------
    tuple of float and PrivacyEvent
        The mean loss of the patients drawn (nan when none was), for local use only; and the event
        that was really realised, equal to the one that the study claims.

    Raises
    ------
    ConsiliumError
        ``privacy.truth`` when what was done is not what the study says.
    """
    training = learner.study.training
    trained = [p for p in learner.network.parameters() if p.requires_grad]
    optimiser = build_optimiser(training.optimiser, trained)
    engine = PatientLoop(learner.network, lambda patient: _patient_loss(learner, patient))
    run = Mechanism.for_round(parameters, cohort_size).begin()
    first, total = round_index * training.steps_per_round, learner.study.total_steps
    learner.network.train()
    for step in range(training.steps_per_round):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training.optimiser, first + step, total)
        _set_gradients(trained, run.step(len(learner.source.patients), engine))
        optimiser.step()
        if progress is not None:
            progress(step + 1, training.steps_per_round)
    realised = require_truth(parameters.event_per_round, run.realised())
    finite = [loss for loss in engine.losses if np.isfinite(loss)]
    return (float(np.mean(finite)) if finite else float("nan")), realised


def _patient_loss(learner: Learner, patient: int) -> Any:
    # A generator of its own for each patient and step: which patches one patient gives can then
    # never depend on who else is present.
    rng = np.random.default_rng(int.from_bytes(os.urandom(16), "little"))
    count = learner.study.training.patches_per_patient
    return learner.batch_loss(*learner.source.patient_batch(patient, count, rng))


def _set_gradients(parameters: list[Any], flat: Any) -> None:
    start = 0
    for parameter in parameters:
        part = flat[start : start + parameter.numel()]
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        start += parameter.numel()
