"""What every kind of step works with: network, device, loss and data of one study at one site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array
from consilium_client.training.compute import Compute
from consilium_client.training.losses import one_hot
from consilium_client.training.patches import PatchSource
from consilium_common.errors import ConsiliumError
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

    def batch_loss(self, images: NDArray[np.float32], targets: Array) -> Any:
        """Return the mean loss of a batch, with its graph."""
        import torch

        inputs = self.compute.place(torch.from_numpy(images))
        wanted = one_hot(self.study, torch.from_numpy(targets).to(self.compute.device))
        with self.compute.autocast():
            logits = self.network(inputs)
        # Softmax, Dice sums and logarithms in full precision.
        return self.loss(logits.float(), wanted)


def load_weights(network: Any, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy ``weights`` into ``network``; names and shapes must be exactly its own.

    Raises
    ------
    ConsiliumError
        ``run.bad-weights`` naming the tensor that is missing, unknown or of another shape.
    """
    import torch

    state = network.state_dict()
    for name in sorted(state.keys() ^ weights.keys()):
        _bad_weights(f"The tensor {name} is {'missing' if name in state else 'unknown'}")
    with torch.no_grad():
        for name, tensor in state.items():
            value = np.asarray(weights[name])
            if value.shape != tuple(tensor.shape) or value.dtype != np.float32:
                _bad_weights(
                    f"The tensor {name} is {value.dtype} of shape {value.shape} and should be "
                    f"float32 of shape {tuple(tensor.shape)}"
                )
            # A copy: tensors from the wire may be read-only, which torch does not know.
            tensor.copy_(torch.from_numpy(np.array(value)))


def read_weights(network: Any) -> dict[str, NDArray[np.float32]]:
    """Return a copy of the network's state, float32, by name."""
    return {
        name: np.array(tensor.detach().to("cpu").float().contiguous().numpy())
        for name, tensor in network.state_dict().items()
    }


def _bad_weights(what: str) -> None:
    raise ConsiliumError(
        "run.bad-weights",
        f"{what}.",
        hint="Aggregator and site must run the same release of consilium.",
    )
