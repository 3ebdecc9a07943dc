"""A volume: values and the affine that says where each voxel lies in the patient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consilium_common.errors import ConsiliumError

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

#: Patient axes of DICOM (left, posterior, superior) to those of NIfTI (right, anterior, superior).
LPS_TO_RAS: Final[Affine] = np.diag([-1.0, -1.0, 1.0, 1.0])
#: 1024³; larger volumes do not fit into the memory of a site's machine.
MAX_VOXELS: Final = 2**30
#: Voxel edges in millimetres, and the box of unit axes, beyond which a header is damaged.
_SHORTEST: Final = 1e-6
_LONGEST: Final = 1e6
_FLATTEST: Final = 0.05
#: Corners of label and image may lie this far apart, as a share of the smallest voxel edge.
_SAME_PLACE: Final = 0.05


@dataclass(frozen=True, eq=False)
class Volume:
    """Values on a grid.

    Parameters
    ----------
    values : array
        (I, J, K) for a volume, (rows, columns) for a plane.
    affine : array
        4×4; maps an index (for a plane with third index 0) to millimetres in RAS+. The columns
        need not be orthogonal: a tilted acquisition is a shear, kept exactly.
    spacing_known : bool
        False for pictures that carry no physical size; their pixels then count as 1 mm.
    """

    values: Array
    affine: Affine
    spacing_known: bool = True

    @property
    def spacing(self) -> tuple[float, ...]:
        """Length of a voxel's edges in millimetres, one per dimension."""
        lengths = np.linalg.norm(self.affine[:3, : self.values.ndim], axis=0)
        return tuple(float(length) for length in lengths)


def canonical(volume: Volume) -> Volume:
    """Return the volume with axes permuted and flipped to the nearest of R, A, S.

    No value is interpolated, and every voxel keeps its place. A plane stays as it is.
    """
    if volume.values.ndim != 3:
        return volume
    return reoriented(volume, "RAS")


def reoriented(volume: Volume, axes: str) -> Volume:
    """Return a 3D volume with axes permuted and flipped to the nearest of ``axes``, for example
    ``RAS``; places in the patient stay exact.
    """
    from nibabel.orientations import (
        apply_orientation,
        axcodes2ornt,
        inv_ornt_aff,
        ornt_transform,
    )

    change = ornt_transform(_orientation(volume.affine), axcodes2ornt(tuple(axes)))
    values = apply_orientation(volume.values, change)
    affine = volume.affine @ inv_ornt_aff(change, volume.values.shape)
    return Volume(np.ascontiguousarray(values), affine, volume.spacing_known)


def axes_of(affine: Affine) -> str:
    """Return where a grid's three axes run to, for example ``LPS``."""
    from nibabel.orientations import ornt2axcodes

    return "".join(str(code) for code in ornt2axcodes(_orientation(affine)))


def _orientation(affine: Affine) -> Any:
    return _orientation_of(np.asarray(affine, dtype=np.float64).tobytes())


@lru_cache(maxsize=16)  # image, label and channels of a case lie alike
def _orientation_of(affine: bytes) -> Any:
    from nibabel.orientations import io_orientation

    found = io_orientation(np.frombuffer(affine).reshape(4, 4))
    found.flags.writeable = False
    return found


def corners(shape: tuple[int, ...], affine: Affine) -> Affine:
    """Return where the centres of a grid's corner voxels lie, (2^n, 3), millimetres RAS+."""
    padded = (*shape, *(1,) * (3 - len(shape)))
    index = np.array(list(product(*((0, n - 1) for n in padded))), dtype=np.float64)
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def require_same_grid(
    first: Volume, second: Volume, *, what: str, where: str, hint: str = ""
) -> None:
    """Check that two volumes have one shape and one place.

    Raises
    ------
    ConsiliumError
        ``data.geometry``, with both shapes or the distance in millimetres.
    """
    if first.values.shape != second.values.shape:
        sizes = [" × ".join(str(n) for n in v.values.shape) for v in (first, second)]
        raise ConsiliumError(
            "data.geometry",
            f"{what} have different grids: {sizes[0]} against {sizes[1]} voxels.",
            where=where,
            hint=hint,
        )
    apart = corners(first.values.shape, first.affine) - corners(second.values.shape, second.affine)
    distance = float(np.linalg.norm(apart, axis=1).max())
    if distance > _SAME_PLACE * min(first.spacing):
        raise ConsiliumError(
            "data.geometry",
            f"{what} lie up to {distance:.3g} mm apart in the patient.",
            where=where,
            hint=hint,
        )


def volume_asked_for(count: int, channel: int | None, path: Path) -> int:
    """Return which of a file's ``count`` volumes is meant; ``channel`` is what stands behind #.

    Raises
    ------
    ConsiliumError
        ``data.dimensions``.
    """
    if channel is None and count > 1:
        raise ConsiliumError(
            "data.dimensions",
            f"The file holds {count} volumes and the case list names none of them.",
            where=str(path),
            hint=f"Give each channel its column, with {path.name}#0, {path.name}#1 and so on.",
        )
    if (channel or 0) >= count:
        raise ConsiliumError(
            "data.dimensions",
            f"Volume {channel} is asked for, the file has {count} (counted from 0).",
            where=str(path),
            hint="Correct the number behind #, or restore the file with all its channels.",
        )
    return channel or 0


def require_finite(values: Array, affine: Affine, where: str) -> None:
    """Check that every value is a finite number and that the affine can be inverted.

    Raises
    ------
    ConsiliumError
        ``data.not-finite`` or ``data.geometry``.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise ConsiliumError(
            "data.not-finite",
            f"{count} voxels are NaN or infinite.",
            where=where,
            hint="Convert the image again; if the voxels lie outside the body, set them to 0.",
        )
    if not _spans_space(affine):
        raise ConsiliumError(
            "data.geometry",
            "The header's axes are no three directions of a length: one is missing, not a number, "
            "or runs along another.",
            where=where,
            hint="Convert the image again from its source.",
        )


def _spans_space(affine: Affine) -> bool:
    """Whether the affine has three axes of some length, none of them along the others."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or not _SHORTEST < lengths.min() <= lengths.max() < _LONGEST:
        return False
    # The volume of the unit axes' box: 1 for right angles, .7 for a shear of 45°.
    return bool(abs(np.linalg.det(axes / lengths)) > _FLATTEST)


def compact(values: Array) -> Array:
    """Return image values in the smallest type that holds them exactly: int16 or float32.

    Integers that int16 cannot hold become int32, or float32 beyond (exact below 2^24). The order
    in memory stays as it is.
    """
    if values.dtype.kind in "iub":
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        for dtype in (np.uint8, np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return values.astype(dtype, copy=False)
    return values.astype(np.float32, copy=False)


def as_labels(values: Array, where: str) -> Array:
    """Return label values as uint8 (or uint16 above 255).

    Raises
    ------
    ConsiliumError
        ``data.label-values`` when a value is not a whole number between 0 and 65535.
    """
    if values.dtype.kind not in "iubf":
        raise _not_labels(where)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (low >= 0 and high <= 65535):
        raise _not_labels(where)
    whole = values.astype(np.uint8 if high <= 255 else np.uint16, copy=False)
    if values.dtype.kind == "f" and not np.array_equal(whole, values):
        raise _not_labels(where)
    return whole


def _not_labels(where: str) -> ConsiliumError:
    return ConsiliumError(
        "data.label-values",
        "The mask holds values that are not whole numbers between 0 and 65535.",
        where=where,
        hint="Export the mask as integers, without interpolation. Is it the image itself?",
    )
