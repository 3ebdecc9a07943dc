"""A study on one image, so that every batch is the same, and its gradient as a plain function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from training_samples import MemoryCase, MemoryCohort, MemoryPatient

from consilium_client.training.losses import build_loss, one_hot
from consilium_common.models.exchange import CONTROL, sent_specs
from consilium_common.models.registry import build_network, initial_weights
from consilium_common.study import Study

Weights = dict[str, np.ndarray]
RATE = 0.1
STEPS = 3


def strategy_study(
    strategy: str | dict[str, Any] = "fedavg",
    *,
    norm: str = "group",
    privacy: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **arguments: Any,
) -> Study:
    """Return a study of plain SGD on 8 × 8 images, under one strategy."""
    network = {"channels": [2, 4], "strides": [2], "norm": norm, **arguments}
    if norm == "group":
        network.setdefault("groups", 2)
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
            "model": {"network": "unet", "arguments": network, **(model or {})},
            "training": {
                "optimiser": {
                    "name": "sgd",
                    "learning_rate": RATE,
                    "momentum": 0.0,
                    "weight_decay": 0.0,
                    "schedule": "constant",
                },
                "steps_per_round": STEPS,
                "batch_size": 1,
                "patch": [8, 8],
                **(training or {}),
            },
            "privacy": privacy or {"mode": "none"},
            "federation": {"rounds": 4, "strategy": strategy},
        }
    )


def one_image(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.zeros((8, 8), dtype=np.uint8)
    label[:3] = 1
    return (label[None] * 2 + rng.standard_normal((1, 8, 8)) * 0.3).astype("f4"), label


def one_image_cohort(seed: int = 0) -> MemoryCohort:
    """Return a cohort of one patient with one image, so that every batch is that image."""
    patient = MemoryPatient((MemoryCase("case", *one_image(seed)),))
    return MemoryCohort({"train": [patient], "test": [patient]})


def start_of(study: Study, control: Mapping[str, np.ndarray] | None = None) -> Weights:
    """Return what the aggregator sends before the first round."""
    weights = initial_weights(study)
    if study.federation.strategy.name == "scaffold":
        for spec in sent_specs(study):
            if spec.name.startswith(CONTROL):
                zeros = np.zeros(spec.shape, np.float32)
                weights[spec.name] = zeros if control is None else control[spec.name]
    return weights


def gradient_of(study: Study, seed: int = 0) -> Callable[[Weights], Weights]:
    """Return the gradient of the study's loss on the one image, at any weights."""
    network, loss = build_network(study), build_loss(study)
    pixels, label = one_image(seed)
    images = torch.from_numpy(pixels[None])
    wanted = one_hot(study, torch.from_numpy(label[None]))

    def gradient(weights: Weights) -> Weights:
        leaves = {
            name: torch.tensor(weights[name], requires_grad=True)
            for name, _ in network.named_parameters()
        }
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        out = torch.func.functional_call(network.train(), {**buffers, **leaves}, (images,))
        found = torch.autograd.grad(loss(out, wanted), list(leaves.values()))
        return {name: g.numpy() for name, g in zip(leaves, found, strict=True)}

    return gradient


def close(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(np.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)
