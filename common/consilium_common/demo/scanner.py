"""Scanners that look at a synthetic anatomy, each with its own geometry and its own faults.

What differs between hospitals is in the pixels, not only in the headers: voxel size, orientation
of the stored axes, sharpness, a calibration error (gain), a bias that bends over the field of view
(cupping, as beam hardening makes it) and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from consilium_common.demo.anatomy import Anatomy

#: Extent of every scan in millimetres: left-right, front-back, feet-head.
FIELD_OF_VIEW: Final = (312.0, 272.0, 208.0)
_RANGE: Final = (-1024.0, 3071.0)
#: Sign of each LPS coordinate for an axis that runs towards the named side.
_TOWARDS: Final = {"L": 1, "R": -1, "P": 1, "A": -1, "S": 1, "I": -1}


@dataclass(frozen=True)
class Scanner:
    """One hospital's scanner.

    Parameters
    ----------
    manufacturer, model : str
        As they appear in DICOM headers; invented.
    coarseness : tuple of three floats
        Voxel size relative to the demo's basic one, per axis.
    orientation : str
        Sides the stored axes run towards, for example ``LPS``.
    gain : float
        Calibration error: factor on attenuation (air stays at -1000 HU).
    cupping : float
        Loss of attenuation in the middle of the field, as a share.
    noise : float
        Standard deviation of the noise in HU.
    blur : float
        Width of the reconstruction kernel (standard deviation), millimetres.
    step : float
        Spacing of the stored values in HU, as the rescale slope makes it.
    """

    manufacturer: str
    model: str
    coarseness: tuple[float, float, float]
    orientation: str
    gain: float
    cupping: float
    noise: float
    blur: float
    step: float


@dataclass(frozen=True)
class Scan:
    """One acquired volume with its label.

    Parameters
    ----------
    hounsfield : float32 array, shape (i, j, k)
        Multiples of ``step``, within -1024 to 3071.
    label : uint8 array, same shape
        Index in :data:`consilium_common.demo.anatomy.CLASSES`.
    affine : float64 array, shape (4, 4)
        Voxel index to millimetres in DICOM's frame (LPS).
    step : float
        Spacing of the stored values in HU.
    """

    hounsfield: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    step: float

    @property
    def affine_ras(self) -> NDArray[np.float64]:
        """The affine in NIfTI's frame: x to the right, y to the front, z to the head."""
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size per stored axis, millimetres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def acquire(
    anatomy: Anatomy, scanner: Scanner, rng: np.random.Generator, *, size: int = 48
) -> Scan:
    """Scan ``anatomy``: a volume of about ``size`` voxels from left to right.

    The patient lies a few millimetres off the centre, differently at every scan.
    """
    basic = FIELD_OF_VIEW[0] / size
    # Steps of 0.01 mm: a DICOM decimal string then holds the spacing and positions exactly.
    spacing = [round(basic * share, 2) for share in scanner.coarseness]
    shape = [round(extent / mm) for extent, mm in zip(FIELD_OF_VIEW, spacing, strict=True)]
    table = np.round(rng.normal(scale=(4, 4, 6)), 1)

    affine = np.eye(4)
    axes: list[NDArray[np.float32]] = []
    for axis, towards in enumerate(scanner.orientation):
        sign = _TOWARDS[towards]
        origin = round(-sign * spacing[axis] * (shape[axis] - 1) / 2 + float(table[axis]), 3)
        affine[axis, axis] = sign * spacing[axis]
        affine[axis, 3] = origin
        line = (origin + affine[axis, axis] * np.arange(shape[axis])).astype(np.float32)
        axes.append(line.reshape([-1 if axis == other else 1 for other in range(3)]))
    x, y, z = axes

    tissue = anatomy.at(x, y, z, edge=0.22 * min(spacing))
    hu = ndimage.gaussian_filter(tissue.hounsfield, [scanner.blur / mm for mm in spacing])
    hu = (hu + 1000) * scanner.gain * _bias(scanner, rng, shape) - 1000
    hu = hu + _noise(scanner, rng, shape)
    hu = np.round(np.clip(hu, *_RANGE) / scanner.step) * scanner.step
    return Scan(hu.astype(np.float32), tissue.label, affine, scanner.step)


def _bias(scanner: Scanner, rng: np.random.Generator, shape: list[int]) -> NDArray[np.float64]:
    """A factor per voxel: lower in the middle (cupping), with a slight tilt of this scan's own."""
    u, v, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    tilt = rng.normal(scale=scanner.cupping / 3, size=3)
    field = 1 - scanner.cupping * np.exp(-(u**2 + v**2) / 0.5)
    return np.asarray(field + tilt[0] * u + tilt[1] * v + tilt[2] * w)


def _noise(scanner: Scanner, rng: np.random.Generator, shape: list[int]) -> NDArray[np.float64]:
    """Noise with the grain of filtered back projection: neighbours in a slice go together."""
    grain = ndimage.gaussian_filter(rng.normal(size=shape), (0.6, 0.6, 0.0))
    return np.asarray(grain * (scanner.noise / grain.std()))
