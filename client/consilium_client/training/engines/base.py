"""What a gradient engine is, and what it is given: patients' data and the loss of one patient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from consilium_common.errors import ConsiliumError

#: Bytes that the rows and activations of one chunk of patients may take (512 MiB).
MEMORY_BOUND: Final = 512 << 20


class GradientEngine(Protocol):
    """Computes patients' gradients, one row a patient, each from that patient's data alone."""

    @property
    def size(self) -> int:
        """Number of trained parameters."""

    @property
    def device(self) -> str:
        """Device on which rows are given and the noisy gradient is wanted."""

    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield tensors (rows, size) until every patient in ``patients`` had exactly one row."""


class LocalEngine(ABC):
    """What the engines share: the trained parameters of one network, and the losses they saw.

    Parameters
    ----------
    network : torch.nn.Module
        Its parameters with ``requires_grad`` are the trained ones, in the order of
        ``network.parameters()``.
    """

    def __init__(self, network: Any) -> None:
        self._parameters = trained_parameters(network)
        #: Losses of the patients so far. Local only: they are neither clipped nor noised.
        self.losses: list[float] = []

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self._parameters)

    @property
    def device(self) -> str:
        """Device of the trained parameters."""
        return str(self._parameters[0].device)

    @abstractmethod
    def gradients(self, patients: Sequence[int]) -> Iterator[Any]:
        """Yield tensors (rows, size): exactly one row a patient."""


@dataclass(frozen=True)
class PatientTask:
    """One study's network and data, as every engine takes them.

    Parameters
    ----------
    network : torch.nn.Module
        Its parameters with ``requires_grad`` are the trained ones, in the order of
        ``network.parameters()``.
    draw : callable
        Takes a patient's number; returns that patient's images (images, channels, \\*size) and
        targets (images, classes, ...), on the network's device. Every patient gives the same
        number of images of the same size.
    loss : callable
        Takes a forward function, images and targets; returns the loss, with its graph. It is a
        mean of terms of one image each.
    """

    network: Any
    draw: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Callable[[Any], Any], Any, Any], Any]

    def patient_loss(self, patient: int) -> Any:
        """Return the mean loss over one patient's images, with its graph."""
        return self.loss(self.network, *self.draw(patient))


def trained_parameters(network: Any) -> list[Any]:
    """Return the parameters that are differentiated and noised, in the order of a row.

    Raises
    ------
    ConsiliumError
        ``privacy.engine`` when there are none.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise ConsiliumError(
            "privacy.engine",
            "No parameter of the network is trained.",
            where="model.trainable",
            hint="Name at least one parameter, or train all.",
        )
    return trained


class Chunks:
    """Cuts a draw into chunks of one fixed number of patients, short ones filled with nobody.

    The number follows from public facts: the network, the shape of a patient's batch, the expected
    size of a draw. Every forward pass has one shape, so the kernels that run, and with them the
    rounding of each patient's row, do not depend on how many others were drawn.

    Parameters
    ----------
    task : PatientTask
    expected : float
        Patients expected in a draw: the public denominator.
    copies : tuple of float
        Memory for one patient in units of the trained parameters' and of the activations' bytes.
    memory : int
        Bytes that a chunk may take. One patient is always computed, whatever it takes.
    """

    def __init__(
        self, task: PatientTask, *, expected: float, copies: tuple[float, float], memory: int
    ) -> None:
        self._task = task
        self._expected = expected
        self._copies = copies
        self._memory = memory
        self._size: int | None = None

    def of(self, patients: Sequence[int]) -> Iterator[tuple[int, Any, Any]]:
        """Yield (patients, images, targets): (chunk, images, ...) of which the rest is zeros."""
        import torch

        waiting = list(patients)
        while waiting:
            drawn = [self._task.draw(waiting[0])]
            size = self._size or self._measure(*drawn[0])
            chunk, waiting = waiting[:size], waiting[size:]
            drawn += [self._task.draw(patient) for patient in chunk[1:]]
            empty = [tuple(torch.zeros_like(part) for part in drawn[0])] * (size - len(chunk))
            images, targets = (torch.stack(parts) for parts in zip(*drawn, *empty, strict=True))
            yield len(chunk), images, targets

    def _measure(self, images: Any, targets: Any) -> int:
        """Choose the chunk's size from the bytes that one patient's forward pass keeps."""
        trained = trained_parameters(self._task.network)
        weights = sum(p.numel() * p.element_size() for p in trained)
        kept = _kept_bytes(self._task, images, targets)
        one = weights * self._copies[0] + kept * self._copies[1]
        # Half a draw at most: the filling of the last chunk is wasted work.
        useful = max(1, round(self._expected / 2))
        self._size = max(1, min(useful, int(self._memory // max(one, 1))))
        return self._size


def _kept_bytes(task: PatientTask, images: Any, targets: Any) -> int:
    """Return the bytes that autograd keeps for one patient's backward pass, parameters aside."""
    import torch

    parameters = {p.untyped_storage().data_ptr() for p in task.network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Zeros: how much is kept follows from shapes, and no patient's data takes part in the choice.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task.loss(task.network, torch.zeros_like(images), torch.zeros_like(targets))
    del loss
    return sum(kept.values())
