"""Vectorised gradients: ``torch.func.vmap`` over the patients of a chunk, within a memory bound.

Fast where one patient alone is too little work for the machine; needs the activations of a whole
chunk at once. Right for every network that the loop is right for, because it differentiates the
same function (torch.func: functional_call, grad).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from consilium_client.training.engines.base import (
    MEMORY_BOUND,
    Chunks,
    LocalEngine,
    PatientTask,
)


class PatientVmap(LocalEngine):
    """Gradients of a chunk of patients at once.

    Parameters
    ----------
    task : PatientTask
    expected : float
        Patients expected in a draw, public.
    memory : int
        Bytes that a chunk may take (default: 512 MiB).
    """

    def __init__(self, task: PatientTask, *, expected: float, memory: int = MEMORY_BOUND) -> None:
        super().__init__(task.network)
        self._task = task
        # A row's parts and the row itself; activations, and as much again while going backwards.
        self._chunks = Chunks(task, expected=expected, copies=(3, 2), memory=memory)

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield one tensor (patients of the chunk, size) per chunk."""
        import torch
        from torch.func import functional_call, grad_and_value, vmap

        network = self._task.network
        values = {name: p.detach() for name, p in network.named_parameters()}
        trained = {n: values.pop(n) for n, p in network.named_parameters() if p.requires_grad}

        def loss(weights: dict[str, Any], images: Any, targets: Any) -> Any:
            def forward(inputs: Any) -> Any:
                return functional_call(network, {**values, **weights}, (inputs,))

            return self._task.loss(forward, images, targets)

        # Each patient its own dropout mask.
        per_patient = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
        for count, images, targets in self._chunks.of(patients):
            parts, losses = per_patient(trained, images, targets)
            self.losses.extend(losses[:count].tolist())
            yield torch.cat([part[:count].flatten(1).float() for part in parts.values()], dim=1)
