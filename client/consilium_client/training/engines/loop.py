"""The per-patient loop: one patient after the other, one backward pass each.

The reference gradient engine, and the default: as fast as ordinary training when a patient gives
several patches, in a fraction of the memory of per-sample hooks, and right for every network whose
layers keep patients apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from consilium_client.training.engines.base import LocalEngine


class PatientLoop(LocalEngine):
    """Gradients by one backward pass a patient.

    Parameters
    ----------
    network : torch.nn.Module
        Its parameters with ``requires_grad`` are the trained ones, in the order of
        ``network.parameters()``.
    patient_loss : callable
        Takes a patient's number and returns the mean loss over that patient's patches, images and
        augmentations, with its graph. It must depend on that patient's data alone.
    """

    def __init__(self, network: Any, patient_loss: Callable[[int], Any]) -> None:
        super().__init__(network)
        self._patient_loss = patient_loss

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield one tensor (1, size) per patient."""
        import torch

        for patient in patients:
            loss = self._patient_loss(patient)
            self.losses.append(float(loss.detach()))
            parts = torch.autograd.grad(
                loss, self._parameters, allow_unused=True, materialize_grads=True
            )
            yield torch.cat([part.reshape(-1).float() for part in parts])[None]
