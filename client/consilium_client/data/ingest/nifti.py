"""NIfTI files to volumes (nibabel), one channel of a 4D file where the reference asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.volume import MAX_VOXELS, Array, Volume, require_finite
from consilium_common.errors import ConsiliumError


def read_nifti(path: Path, channel: int | None = None) -> Volume:
    """Read a NIfTI file with its scaling applied.

    Parameters
    ----------
    path : Path
        ``.nii`` or ``.nii.gz``.
    channel : int, optional
        Index along the fourth axis; needed when that axis is longer than one.

    Returns
    -------
    Volume
        (I, J, K), or (rows, columns) for a file with one slice.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing``, ``data.dimensions``, ``data.too-large``,
        ``data.not-finite`` or ``data.geometry``.
    """
    import nibabel

    with reading(path, "NIfTI file"):
        image: Any = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        _check_shape(shape, path)
        data: Any = image.dataobj
        values = np.asarray(data if len(shape) < 4 else data[..., _index(shape, channel, path)])
        affine = np.array(image.affine, dtype=np.float64)
    if values.dtype.kind not in "iubf":
        raise ConsiliumError(
            "data.format",
            "The NIfTI file holds colours or complex numbers, not one value per voxel.",
            where=str(path),
            hint="Convert it to one value per voxel.",
        )
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    require_finite(values, affine, str(path))
    if values.ndim == 2 or values.shape[2] == 1:
        return _plane(values.reshape(values.shape[:2]), affine)
    return Volume(values, affine)


def _plane(values: Array, affine: Any) -> Volume:
    # A plane is (rows, columns): NIfTI's first index runs along a row.
    return Volume(np.ascontiguousarray(values.T), affine[:, [1, 0, 2, 3]])


def _check_shape(shape: tuple[int, ...], path: Path) -> None:
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise ConsiliumError(
            "data.dimensions",
            f"The NIfTI file has {len(shape)} axes; two, three or four are read.",
            where=str(path),
        )
    if np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise ConsiliumError(
            "data.too-large",
            f"The header claims {' × '.join(str(n) for n in shape)} voxels, more than 2^31.",
            where=str(path),
            hint="If the image is real, crop it; else export it again.",
        )


def _index(shape: tuple[int, ...], channel: int | None, path: Path) -> int:
    if channel is None and shape[3] == 1:
        return 0
    if channel is None:
        raise ConsiliumError(
            "data.dimensions",
            f"The NIfTI file holds {shape[3]} volumes and the case list names none of them.",
            where=str(path),
            hint=f"Give each channel its column, with {path.name}#0, {path.name}#1 and so on.",
        )
    if channel >= shape[3]:
        raise ConsiliumError(
            "data.dimensions",
            f"Volume {channel} is asked for, the file has {shape[3]} (counted from 0).",
            where=str(path),
        )
    return channel
