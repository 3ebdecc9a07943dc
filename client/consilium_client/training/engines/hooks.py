"""Gradients by opacus' per-layer hooks: an implementation by other people, which the loop is
tested against.

Opacus gives one gradient per image. A patient's is the mean over its images, which is exact because
every loss here is a mean of terms of one image each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from consilium_client.training.engines.base import (
    MEMORY_BOUND,
    Chunks,
    LocalEngine,
    PatientTask,
)
from consilium_common.errors import ConsiliumError


class PatientHooks(LocalEngine):
    """Gradients of a chunk of patients by one backward pass with hooks.

    The hooks and everything opacus writes onto the network are there during a chunk's passes only.
    A chunk is never empty, which opacus 1.6 cannot compute.

    Parameters
    ----------
    task : PatientTask
        A network that :func:`consilium_common.models.private.engine_problem` has no objection to.
    expected : float
        Patients expected in a draw, public.
    memory : int
        Bytes that a chunk may take (default: 512 MiB).
    """

    def __init__(self, task: PatientTask, *, expected: float, memory: int = MEMORY_BOUND) -> None:
        super().__init__(task.network)
        self._task = task
        images_of_rows = 4  # rows exist per image, and once more as they are averaged
        # Opacus unfolds a convolution's input, a kernel's size larger, one layer at a time.
        self._chunks = Chunks(task, expected=expected, copies=(images_of_rows, 8), memory=memory)

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield one tensor (patients of the chunk, size) per chunk.

        Raises
        ------
        ConsiliumError
            ``privacy.engine`` when autograd reaches a parameter that the hooks do not.
        """
        import torch

        for count, images, targets in self._chunks.of(patients):
            slots, per_patient = images.shape[:2]
            samples, logits = self._samples(images.flatten(0, 1), targets.flatten(0, 1))
            logits = logits.view(slots, per_patient, *logits.shape[1:])
            for slot in range(count):
                self.losses.append(float(self._loss_of(logits[slot], images[slot], targets[slot])))
            yield torch.cat(
                [
                    sample.view(slots, per_patient, -1)[:count].float().mean(dim=1)
                    for sample in samples
                ],
                dim=1,
            )

    def _samples(self, images: Any, targets: Any) -> tuple[list[Any], Any]:
        """Return, per parameter, the gradients of every image, and the logits."""
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

        network = self._task.network
        found = []

        def forward(inputs: Any) -> Any:
            logits = network(inputs)
            found.append(logits.detach())
            return logits

        hooks = GradSampleHooks(network, loss_reduction="mean")
        try:
            with warnings.catch_warnings():
                # The first layer's input, the image, has no gradient, and torch remarks on it.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                self._task.loss(forward, images, targets).backward()
            return [_sample_of(p, len(images)) for p in self._parameters], found[0]
        finally:
            hooks.cleanup()
            for parameter in network.parameters():
                parameter.grad = None
            for module in network.modules():
                for name in ("activations", "max_batch_len"):
                    module.__dict__.pop(name, None)

    def _loss_of(self, logits: Any, images: Any, targets: Any) -> Any:
        return self._task.loss(lambda _: logits, images, targets)


def _sample_of(parameter: Any, images: int) -> Any:
    import torch

    sample = parameter.grad_sample
    if sample is None and parameter.grad is None:  # takes no part in the loss
        return torch.zeros((images, *parameter.shape), device=parameter.device)
    if not isinstance(sample, torch.Tensor) or len(sample) != images:
        raise ConsiliumError(
            "privacy.engine",
            "The hooks of opacus do not reach every use of a trained parameter.",
            where="privacy.engine",
            hint="Set privacy.engine to loop or auto.",
        )
    return sample
