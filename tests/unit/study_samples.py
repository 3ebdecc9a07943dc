"""Small valid studies for tests, as text and as values."""

from __future__ import annotations

from typing import Any

from consilium_common.study.schema import Study

TEXT = """\
schema: consilium/study/v1
name: tiny
title: A tiny study
task:
  kind: segmentation
  dimensions: 3
  inputs: [mri]
  classes: [background, organ]
model:
  network: unet
  arguments:
    channels: [8, 16, 32]
training:
  optimiser:
    learning_rate: 1e-3
  steps_per_round: 5
  patch: [16, 16, 16]
privacy:
  mode: patient
  sampling_rate: 0.25
  clip_norm: 1
  noise_multiplier: 1.5
  delta: 1e-3
federation:
  rounds: 4
"""


def study_of(
    network: str = "unet",
    arguments: dict[str, Any] | None = None,
    *,
    kind: str = "segmentation",
    dimensions: int = 2,
    size: list[int] | None = None,
    classes: int = 3,
    inputs: int = 1,
    **training: Any,
) -> Study:
    """Return a study without privacy around one network."""
    segmentation = kind == "segmentation"
    value = {
        "schema": "consilium/study/v1",
        "name": "tiny",
        "task": {
            "kind": kind,
            "dimensions": dimensions,
            "inputs": [f"channel{i}" for i in range(inputs)],
            "classes": [f"class{i}" for i in range(classes)],
        },
        "preprocessing": {"size": [32] * dimensions if size is None else size},
        "model": {"network": network, "arguments": arguments or {}},
        "training": {"loss": "dice_ce" if segmentation else "cross_entropy", **training},
        "privacy": {"mode": "none"},
    }
    return Study.model_validate(value)
