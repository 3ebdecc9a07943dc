"""One small picture of an image, for a person who has to look: a plane, or the middle slice."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import numpy.typing as npt

from consilium_client.data.ingest.volume import Array

#: Shares of the values that become black and white: a few bright voxels must not darken the rest.
_WINDOW: Final = (0.01, 0.99)
#: Stride over large planes before the window is measured: quick, and precise enough to look at.
_ENOUGH: Final = 256


def picture_png(values: Array, size: int = 128) -> bytes:
    """Return an 8-bit grey PNG of a plane, or of the middle slice of a volume.

    Parameters
    ----------
    values : array
        2D (rows, columns) as stored; or 3D in the cache's order (nearest RAS+), whose middle
        slice along the third axis is shown with anterior up and the patient's right on the left
        side of the picture, as radiologists look at it. Values that are not finite are black.
    size : int
        Pixels of the longer side at most (default: 128).

    Raises
    ------
    ValueError
        For other than two or three dimensions, or no pixels at all: a fault of the caller.
    """
    from PIL import Image

    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"a picture of an array of shape {values.shape}")
    plane = values if values.ndim == 2 else _axial(values[:, :, values.shape[2] // 2])
    step = max(1, max(plane.shape) // max(size, _ENOUGH))
    grey = Image.fromarray(_windowed(np.asarray(plane[::step, ::step])))
    grey.thumbnail((size, size), Image.Resampling.BOX)
    stream = io.BytesIO()
    grey.save(stream, format="PNG", optimize=False, compress_level=6)
    return stream.getvalue()


def _axial(plane: Array) -> Array:
    """Turn (x to the right, y to the front) into rows from front to back, the right on the left."""
    return plane.T[::-1, ::-1]


def _windowed(plane: Array) -> npt.NDArray[np.uint8]:
    floats = np.asarray(plane, dtype=np.float32)
    finite = np.isfinite(floats)
    if not finite.any():
        return np.zeros(floats.shape, dtype=np.uint8)
    low, high = (float(value) for value in np.quantile(floats[finite], _WINDOW))
    if high <= low:
        low, high = float(floats[finite].min()), float(floats[finite].max())
    scale = 255 / (high - low) if high > low else 0.0
    scaled = np.clip((np.where(finite, floats, low) - low) * scale, 0, 255)
    return np.asarray(scaled, dtype=np.uint8)
