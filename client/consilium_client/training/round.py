"""One round of local training: the shared model's steps, then those of a personal model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.learner import Learner, Progress
from consilium_client.training.optimiser import RoundSteps
from consilium_client.training.plain_steps import run_plain
from consilium_client.training.private_steps import run_private
from consilium_client.training.strategies import Pull, SiteStrategy
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from consilium_client.training.engines.choice import Choice
    from consilium_client.training.mechanism import Mechanism
    from consilium_common.privacy.events import PrivacyEvent

_log = logging.getLogger(__name__)

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TrainResult:
    """What one round of local training gives."""

    #: What leaves, float32, by name: exactly :func:`~consilium_common.models.exchange.sent_specs`.
    #: Frozen tensors are left out: every site has them.
    tensors: dict[str, NDArray[np.float32]]
    #: Mean training loss. LOCAL ONLY: it depends on patients and is not protected; nan when a
    #: private round drew nobody.
    loss: float = field(repr=False)
    #: The privacy event of the steps really made, measured; None without privacy.
    realised: PrivacyEvent | None
    #: The clip norm that this site's next round begins with (adaptive clipping moves it); None
    #: without privacy. Local: it need not leave.
    clip_norm: float | None = None
    #: What the strategy keeps at the site for its next round, by name: personal layers, a personal
    #: model, a control variate. It NEVER leaves.
    kept: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Round:
    """One round at one site; the network holds what the strategy begins with.

    Parameters
    ----------
    learner : Learner
    strategy : SiteStrategy
        Of the learner's network.
    steps : RoundSteps
    model, control : mapping of str to float32 arrays
        The global model, and what the strategy was sent beside it.
    kept : mapping of str to float32 arrays
        What the site's last round kept.
    progress : callable or None
        Told (step, steps) after each step.
    """

    learner: Learner
    strategy: SiteStrategy
    steps: RoundSteps
    model: Mapping[str, NDArray[np.float32]]
    control: Mapping[str, NDArray[np.float32]]
    kept: Mapping[str, NDArray[np.float32]]
    progress: Progress | None

    def run(self, mechanism: Mechanism | None = None, engine: Choice | None = None) -> TrainResult:
        """Train, with a mechanism and an engine privately, and return what came of it.

        Raises
        ------
        ConsiliumError
            ``run.diverged``, ``privacy.truth``.
        """
        bend = self.strategy.bend(self.control, self.kept)
        realised: PrivacyEvent | None = None
        clip: float | None = None
        if mechanism is None or engine is None:
            phases = self.strategy.phases(self.steps.count)
            loss = run_plain(self.learner, self.steps, phases, bend, self._part(0))
        else:
            loss, realised, clip = run_private(
                self.learner, mechanism, engine, self.steps, bend=bend, progress=self._part(0)
            )
        sent, kept = self.strategy.outcome(bend, self.kept)
        _require_finite({**sent, **kept}, self.steps)
        if self.strategy.pull is not None:
            kept = self._beside(self.strategy.pull)
        return TrainResult(sent, loss, realised, clip, kept)

    def _beside(self, strength: float) -> Tensors:
        """Train the site's personal model; return it, or nothing when it diverged.

        Called when what leaves has been read out. In a private study these steps use patients
        without noise, so nothing of them may reach what leaves: not torch's generators, not a
        gradient left behind, and not a failure, which the aggregator would see.
        """
        import torch

        from consilium_common.models.state import read_trained, write_weights

        network = self.learner.network
        write_weights(network, self.strategy.personal(self.model, self.kept) or self.model)
        pull = Pull(network, strength, self.model)
        device = torch.device(self.learner.compute.device)
        phases = self.strategy.phases(self.steps.count)
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device]):
                run_plain(self.learner, self.steps, phases, pull, self._part(1))
            personal = read_trained(network)
            _require_finite(personal, self.steps)
        except ConsiliumError as error:
            if error.code != "run.diverged":
                raise
            _log.warning("the personal model diverged and stays as it was: %s", error)
            return {}
        finally:
            network.zero_grad(set_to_none=True)
        return personal

    def _part(self, part: int) -> Progress | None:
        """Return what tells the progress of the first or the second half, or of a whole."""
        progress = self.progress
        if progress is None or self.strategy.pull is None:
            return progress
        return lambda step, steps: progress(part * steps + step, 2 * steps)


def _require_finite(tensors: Mapping[str, NDArray[np.float32]], steps: RoundSteps) -> None:
    for tensor in tensors.values():
        if not np.isfinite(tensor).all():
            raise ConsiliumError(
                "run.diverged",
                f"A weight is not finite after round {steps.round_index + 1}.",
                hint="Lower training.optimiser.learning_rate.",
            )
