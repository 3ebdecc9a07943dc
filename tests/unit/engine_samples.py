"""Every registered network at its smallest, with patients' data, as gradient engines take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from study_samples import study_of

from consilium_client.training.engines.base import GradientEngine, PatientTask
from consilium_client.training.engines.choice import build_engine
from consilium_client.training.losses import build_loss, one_hot
from consilium_common.models.registry import NETWORKS, build_network
from consilium_common.study import Study

ENGINES = ("loop", "vmap", "opacus")

_SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [4, 8]},
    "dynunet": {"filters": [4, 4, 8]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    "densenet121": {"init_features": 8, "growth_rate": 4, "bn_size": 2, "groups": 4},
    "resnet10": {"block_inplanes": [4, 4, 8, 8], "groups": 2},
    "resnet18": {"block_inplanes": [4, 4, 8, 8], "groups": 2},
}
_SIZE = {"segmentation": 8, "classification": 32}
LOSSES = {
    "segmentation": ("dice_ce", "cross_entropy", "focal"),
    "classification": ("cross_entropy", "focal", "bce"),
}
#: Every network with each of its losses.
NETWORKS_AND_LOSSES = [(name, loss) for name in NETWORKS for loss in LOSSES[NETWORKS[name].task]]


def small_study(name: str, dimensions: int, loss: str | None = None, **changes: Any) -> Study:
    """Return a study of one network; ``changes`` are of its model."""
    kind = NETWORKS[name].task
    loss = loss or LOSSES[kind][0]
    study = study_of(
        name,
        _SMALL[name],
        kind=kind,
        dimensions=dimensions,
        size=[_SIZE[kind]] * dimensions,
        classes=2,
        # bce is for several labels: set below, where the task is written as a whole
        loss=loss if loss != "bce" else "focal",
    )
    value = study.to_canonical()
    value["task"]["multi_label"] = loss == "bce"
    value["training"]["loss"] = loss
    value["model"] |= changes
    return Study.model_validate(value)


def patients_of(study: Study, count: int, images: int = 2) -> list[tuple[Any, Any]]:
    """Return images and one-hot targets of some patients."""
    size = study.preprocessing.size or []
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        pixels = torch.randn(images, 1, *size, generator=generator)
        shape = (images, *size) if study.task.kind == "segmentation" else (images,)
        shape = (images, 2) if study.task.multi_label else shape
        made.append((pixels, one_hot(study, torch.randint(0, 2, shape, generator=generator))))
    return made


def task_of(study: Study, patients: Sequence[tuple[Any, Any]], network: Any = None) -> PatientTask:
    """Return the study's task over patients held in memory."""
    network = build_network(study).train() if network is None else network
    loss = build_loss(study)
    return PatientTask(network, lambda i: patients[i], lambda f, x, y: loss(f(x), y))


def rows_of(engine: GradientEngine, patients: Sequence[int]) -> Any:
    """Return all rows of an engine, one a patient."""
    return torch.cat(list(engine.gradients(patients)))


def engine_of(name: Any, task: PatientTask, expected: float = 4) -> Any:
    """Build an engine by name."""
    return build_engine(name, task, expected=expected)
