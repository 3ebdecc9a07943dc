"""A tiny study, its models as files, and a round of updates to aggregate."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_common.models.exchange import CONTROL, sent_specs, shared_specs
from consilium_common.models.registry import tensor_specs
from consilium_common.models.weights import TensorSpec, pack, unpack
from consilium_common.study import Study
from consilium_server.aggregation import Combined, SiteUpdate, aggregate

Model = dict[str, NDArray[np.float32]]


def study_of(strategy: str | dict[str, Any] = "fedavg", **federation: Any) -> Study:
    """Return a study of a network with a few hundred parameters."""
    settings = {"name": strategy} if isinstance(strategy, str) else strategy
    fewest = {"cyclic": 1, "krum": 5, "multi-krum": 5}
    quorum = (
        2 * settings["hostile"] + 3 if "hostile" in settings else fewest.get(settings["name"], 2)
    )
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "tiny",
            "task": {
                "kind": "segmentation",
                "dimensions": 2,
                "inputs": ["ct"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet", "arguments": {"channels": [2, 4], "strides": [2]}},
            "training": {"steps_per_round": 2, "batch_size": 2, "patch": [16, 16]},
            "privacy": {"mode": "none"},
            "federation": {"quorum": quorum, "strategy": settings, **federation},
            "evaluation": {"release": "none"},
        }
    )


def random_tensors(
    specs: Sequence[TensorSpec], seed: int, scale: float = 1.0
) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: np.asarray(scale * rng.normal(size=spec.shape), dtype=np.float32)
        for spec in specs
    }


@functools.cache
def _specs(name: str) -> tuple[tuple[TensorSpec, ...], ...]:
    study = study_of(name)
    return tensor_specs(study), shared_specs(study), sent_specs(study)


@dataclass(frozen=True)
class Reply:
    """What a strategy looks at of a message; Flower makes real ones within a run alone."""

    content: Any

    def has_error(self) -> bool:
        return False


class Rounds:
    """The aggregator's part of a study: rounds in a folder, each made of given updates.

    Parameters
    ----------
    weights : sequence of float, optional
        Public weights of the sites (default: 1, 2, …).
    """

    def __init__(
        self, folder: Path, study: Study, *, seed: int = 0, weights: Sequence[float] | None = None
    ) -> None:
        self.folder, self.study = folder, study
        self.weights = weights
        whole, self.shared, self.sent = _specs(study.federation.strategy.name)
        self.model = self.write("model-0", random_tensors(whole, seed))
        self.state: Path | None = None
        self.done = 0

    def write(self, name: str, tensors: Mapping[str, NDArray[np.float32]]) -> Path:
        path = self.folder / f"{name}.safetensors"
        path.write_bytes(pack(tensors))
        return path

    @property
    def tensors(self) -> Model:
        """The present global model."""
        return unpack(self.model.read_bytes())

    def drifted(self, count: int, seed: int = 1, scale: float = 0.1) -> list[Model]:
        """Return what so many sites might send: each near the global model."""
        model = self.tensors
        found = []
        for number in range(count):
            noise = random_tensors(self.sent, 1000 * seed + number, scale)
            found.append(
                {
                    name: noise[name] if name.startswith(CONTROL) else model[name] + noise[name]
                    for name in noise
                }
            )
        return found

    def updates(
        self, sent: Sequence[Model], steps: Sequence[int] | None = None
    ) -> list[SiteUpdate]:
        return [
            SiteUpdate(
                f"site-{index:02d}",
                self.write(f"update-{self.done}-{index:02d}", tensors),
                self.weights[index] if self.weights else index + 1.0,
                steps[index] if steps else 1,
            )
            for index, tensors in enumerate(sent)
        ]

    def aggregate(self, updates: Sequence[SiteUpdate], sites: int | None = None) -> Combined:
        """Aggregate without going on."""
        return aggregate(
            self.study,
            self.model,
            updates,
            self.state,
            out=self.folder / f"model-{self.done + 1}.safetensors",
            out_state=self.folder / f"state-{self.done + 1}.safetensors",
            round_index=self.done,
            sites=sites,
        )

    def round(
        self,
        sent: Sequence[Model],
        *,
        steps: Sequence[int] | None = None,
        sites: int | None = None,
    ) -> Combined:
        """Make one round of what sites send, and go on with its result."""
        combined = self.aggregate(self.updates(sent, steps), sites)
        self.done += 1
        self.model = self.folder / f"model-{self.done}.safetensors"
        self.state = combined.state
        return combined
