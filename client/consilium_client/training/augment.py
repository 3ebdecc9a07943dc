"""Random changes of one training patch, in numpy: mirror, rotate, gain, shift, noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilium_client.training.cases import Array
from consilium_common.study.schema import Augmentation


def augment(
    image: NDArray[np.float32],
    label: Array | None,
    settings: Augmentation,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], Array | None]:
    """Return ``image`` (channels, \\*spatial) and ``label`` (\\*spatial), changed at random.

    A label of None stands for an image whose label does not move with its pixels. Inputs are never
    written to: they may be memory-mapped.
    """
    dimensions = image.ndim - 1
    if settings.flip:
        axes = tuple(axis for axis in range(dimensions) if rng.random() < settings.flip)
        if axes:
            image = np.flip(image, tuple(axis + 1 for axis in axes))
            label = None if label is None else np.flip(label, axes)
    if settings.rotate90 and rng.random() < settings.rotate90:
        # A quarter turn swaps the two axes, so only a half turn fits a patch that is not square.
        turns = int(rng.integers(1, 4)) if image.shape[1] == image.shape[2] else 2
        image = np.rot90(image, turns, (1, 2))
        label = None if label is None else np.rot90(label, turns, (0, 1))
    per_channel = (image.shape[0],) + (1,) * dimensions
    if settings.gain:
        gain = rng.uniform(1 - settings.gain, 1 + settings.gain, per_channel)
        image = image * gain.astype(np.float32)
    if settings.shift:
        shift = rng.uniform(-settings.shift, settings.shift, per_channel)
        image = image + shift.astype(np.float32)
    if settings.noise:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image = image + np.float32(settings.noise) * noise
    return image, label
