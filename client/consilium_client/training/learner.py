"""What every kind of step works with: network, device, loss and data of one study at one site."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array
from consilium_client.training.compute import Compute
from consilium_client.training.engines.base import PatientTask
from consilium_client.training.losses import one_hot
from consilium_client.training.patches import PatchSource
from consilium_common.study import Study

#: Told (step, steps) after each step. Public: neither number depends on patients.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Learner:
    """The parts of local training that live as long as the study."""

    study: Study
    network: Any
    compute: Compute
    loss: Callable[[Any, Any], Any]
    source: PatchSource

    def place(self, images: NDArray[np.float32], targets: Array) -> tuple[Any, Any]:
        """Return images and one-hot targets as tensors on the device."""
        import torch

        inputs = self.compute.place(torch.from_numpy(images))
        return inputs, one_hot(self.study, torch.from_numpy(targets).to(self.compute.device))

    def loss_of(self, forward: Callable[[Any], Any], inputs: Any, wanted: Any) -> Any:
        """Return the mean loss of a batch under ``forward``, with its graph."""
        with self.compute.autocast():
            logits = forward(inputs)
        # Softmax, Dice sums and logarithms in full precision.
        return self.loss(logits.float(), wanted)

    def batch_loss(self, images: NDArray[np.float32], targets: Array) -> Any:
        """Return the mean loss of a batch, with its graph."""
        return self.loss_of(self.network, *self.place(images, targets))

    def draw_patient(self, patient: int) -> tuple[Any, Any]:
        """Draw the patches of one patient for one step, as :meth:`place` returns them."""
        # A generator of its own for each patient and step: which patches one patient gives can
        # then never depend on who else is present.
        rng = np.random.default_rng(int.from_bytes(os.urandom(16), "little"))
        count = self.study.training.patches_per_patient
        return self.place(*self.source.patient_batch(patient, count, rng))

    @property
    def patient_task(self) -> PatientTask:
        """What a gradient engine works on."""
        return PatientTask(self.network, self.draw_patient, self.loss_of)
