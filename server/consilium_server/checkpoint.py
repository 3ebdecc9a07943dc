"""The state after a round, in one file that is replaced atomically."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.models.weights import pack, unpack

#: Rides in the same file as the weights, so that round and model can never disagree.
_ROUND = "consilium.rounds_done"
#: The running average rides along too, under names of its own.
_AVERAGE = "consilium.average."


@dataclass(frozen=True)
class Checkpoint:
    """A model and the number of rounds that made it.

    Attributes
    ----------
    weights : dict of str to ndarray
        The whole global model, frozen tensors included: training goes on from it.
    average : dict of str to ndarray
        Running average over rounds of the trained tensors; empty where a study keeps none.
    """

    rounds_done: int
    weights: dict[str, NDArray[np.float32]]
    average: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, NDArray[np.float32]]:
        """The model that is evaluated and kept: the average where there is one."""
        return {**self.weights, **self.average}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint.safetensors`` durably."""
    # float32 as every packed tensor: exact for up to 16 million rounds.
    rounds = np.array([checkpoint.rounds_done], dtype=np.float32)
    average = {_AVERAGE + name: tensor for name, tensor in checkpoint.average.items()}
    write_atomic(_path(folder), pack({**checkpoint.weights, **average, _ROUND: rounds}))


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the last checkpoint; None before the first round.

    Raises
    ------
    ConsiliumError
        ``state.checkpoint`` for a damaged file: a study never silently begins anew.
    """
    if not _path(folder).exists():
        return None
    try:
        tensors = unpack(_path(folder).read_bytes())
        rounds = int(tensors.pop(_ROUND)[0])
    except (OSError, KeyError, IndexError, ConsiliumError) as error:
        raise ConsiliumError(
            "state.checkpoint",
            "The study's checkpoint is damaged or cannot be read.",
            where=str(_path(folder)),
            hint="Restore it from your backup; a study is never begun anew by itself.",
        ) from error
    average = {
        name.removeprefix(_AVERAGE): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(_AVERAGE)
    }
    return Checkpoint(rounds, tensors, average)


def _path(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"
