"""Deterministic preprocessing of one case, and the exact way back to its original grid.

Orientation is a permutation of axes (nibabel); spacing and size are linear interpolation (scipy)
through the affines, so that sheared (tilted) acquisitions come out straight. MONAI's transforms
do the same to aligned images, and cost four seconds of import and a shear taken for a rotation.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from consilium_client.data.ingest.volume import Affine, Array, Volume, reoriented
from consilium_common.study.schema import Intensity, Study

#: Voxel edges that agree to this share are not resampled.
_SAME_SPACING: Final = 1e-3
_STRAIGHT: Final = 1e-3
#: Voxels that an index may stray sideways for interpolation to go along the axes.
_ALONG_AXES: Final = 1e-4
_PERCENTILES: Final = (0.5, 99.5)

Grid = tuple[tuple[int, int, int], Affine]


def prepare(
    image: list[Array], label: Array | None, affine: Affine, study: Study
) -> tuple[npt.NDArray[np.float32], Array | None, Affine]:
    """Bring one case into the form a study trains on.

    Parameters
    ----------
    image : list of array
        One array per input channel, in the study's order; (I, J, K) or (rows, columns).
    label : array, optional
        Study class indices on the same grid.
    affine : array
        4×4, index to RAS millimetres.
    study : Study
        ``study.task`` and ``study.preprocessing`` decide.

    Returns
    -------
    (image, label, affine)
        float32 (C, *spatial), uint8 (*spatial) or None, and the new grid's affine.
    """
    steps = study.preprocessing
    dimensions = study.task.dimensions
    first = Volume(image[0], affine)
    if dimensions == 3 and steps.orientation != "none":
        channels = [reoriented(Volume(c, affine), steps.orientation).values for c in image]
        turned = reoriented(first, steps.orientation)
        if label is not None:
            label = reoriented(Volume(label, affine), steps.orientation).values
        affine, shape = turned.affine, turned.values.shape
    else:
        channels, shape = list(image), first.values.shape
    source: Grid = (_deep(shape), affine)
    target = _target_grid(source, study)
    if target is not source:
        channels = [resample_image(c, source, target)[_flat(dimensions)] for c in channels]
        if label is not None:
            label = resample_label(label, source, target)[_flat(dimensions)]
    normal = [normalise(c, steps.intensity) for c in channels]
    stacked = normal[0][np.newaxis] if len(normal) == 1 else np.stack(normal)
    affine = target[1]
    if study.task.kind == "segmentation" and steps.size is not None:
        stacked, affine = _fit(stacked, affine, steps.size, first=1)
        if label is not None:
            label, _ = _fit(label, affine, steps.size, first=0)
    return (
        np.ascontiguousarray(stacked, dtype=np.float32),
        None if label is None else np.ascontiguousarray(label, dtype=np.uint8),
        affine,
    )


def prepared_bytes(shape: tuple[int, ...], affine: Affine, study: Study) -> int:
    """Return the bytes that :func:`prepare` makes of a case of this shape, without reading it."""
    steps, dimensions = study.preprocessing, study.task.dimensions
    if dimensions == 3 and steps.orientation != "none":
        from nibabel.orientations import (
            axcodes2ornt,
            inv_ornt_aff,
            io_orientation,
            ornt_transform,
        )

        change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(steps.orientation)))
        affine = affine @ inv_ornt_aff(change, shape)
        shape = tuple(shape[axis] for axis in np.argsort(change[:, 0]))
    sizes, _ = _target_grid((_deep(shape), affine), study)
    if study.task.kind == "segmentation" and steps.size is not None:
        sizes = _deep(tuple(steps.size))
    label = 1 if study.task.kind == "segmentation" else 0
    return int(np.prod(sizes)) * (4 * len(study.task.inputs) + label)


def normalise(values: Array, intensity: Intensity) -> npt.NDArray[np.float32]:
    """Map an image's values to network inputs.

    zscore: mean 0, standard deviation 1 over all voxels. percentile: the 0.5th and 99.5th
    percentile to 0 and 1, clipped. window: ``low`` and ``high`` to 0 and 1, clipped. An image of
    one value becomes 0.
    """
    plain = np.asarray(values, dtype=np.float32)
    if intensity.kind == "none":
        return plain
    if intensity.kind == "zscore":
        # float64 sums: float32 loses digits over millions of voxels
        mean = plain.mean(dtype=np.float64, keepdims=True)
        scale = float(plain.std(dtype=np.float64, mean=mean))
        if not scale > 0:
            return np.zeros_like(plain)
        result = plain - np.float32(mean.item())
        result /= np.float32(scale)
        return np.asarray(result)
    if intensity.kind == "percentile":
        low, high = (float(edge) for edge in np.percentile(plain, _PERCENTILES))
    else:
        low, high = float(intensity.low or 0.0), float(intensity.high or 0.0)
    if high <= low:
        return np.zeros_like(plain)
    return np.asarray(np.clip((plain - low) / (high - low), 0, 1), dtype=np.float32)


# --- grids -------------------------------------------------------------------------------------


def _deep(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a shape with three axes; a plane has one slice."""
    padded = (*shape, 1, 1)[:3]
    return (int(padded[0]), int(padded[1]), int(padded[2]))


def _flat(dimensions: int) -> Any:
    return np.s_[:, :, 0] if dimensions == 2 else np.s_[...]


def is_straight(affine: Affine) -> bool:
    """Whether the grid's axes are perpendicular to each other."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < _STRAIGHT)


def _target_grid(source: Grid, study: Study) -> Grid:
    """Return the grid that interpolation brings a case to; the source's own where it has none."""
    target = _resampled_grid(source, study.preprocessing.spacing)
    if study.task.kind == "classification" and study.preprocessing.size is not None:
        target = _resized_grid(target, study.preprocessing.size)
    return target


def _resampled_grid(source: Grid, spacing: list[float] | None) -> Grid:
    """Return the grid with the wanted spacing over the same field of view; the source's own grid
    where nothing changes. A sheared grid always gets straight axes.
    """
    shape, affine = source
    old = np.linalg.norm(affine[:3, :3], axis=0)
    new = old.copy()
    if spacing is not None:
        new[: len(spacing)] = spacing
    if is_straight(affine):
        if np.all(np.abs(new / old - 1) < _SAME_SPACING):
            return source
        sizes = np.maximum(1, np.round(np.array(shape) * old / new)).astype(int)
        return _centred(source, sizes, new)
    # Nearest rotation to the sheared axes (polar decomposition), and the box around all voxels.
    u, _, vt = np.linalg.svd(affine[:3, :3] / old)
    rotation = u @ vt
    index = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    along = rotation.T @ (affine[:3, :3] @ index)
    if spacing is None:  # the distance between planes, not along the shear
        new = np.abs(np.diag(rotation.T @ affine[:3, :3]))
    low, high = along.min(axis=1), along.max(axis=1)
    sizes = np.maximum(1, np.ceil((high - low) / new - 1e-6) + 1).astype(int)
    straight = np.eye(4)
    straight[:3, :3] = rotation * new
    straight[:3, 3] = affine[:3, 3] + rotation @ low
    return _shape(sizes), straight


def _resized_grid(source: Grid, size: list[int]) -> Grid:
    """Return the grid with ``size`` voxels over the same field of view."""
    shape, affine = source
    sizes = np.array(shape)
    sizes[: len(size)] = size
    if tuple(sizes) == shape:
        return source
    old = np.linalg.norm(affine[:3, :3], axis=0)
    return _centred(source, sizes, old * np.array(shape) / sizes)


def _centred(source: Grid, sizes: Any, spacing: Any) -> Grid:
    """Return a grid with the source's directions and centre."""
    shape, affine = source
    old = np.linalg.norm(affine[:3, :3], axis=0)
    centred = np.eye(4)
    centred[:3, :3] = affine[:3, :3] / old * spacing
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    centred[:3, 3] = middle - centred[:3, :3] @ ((sizes - 1) / 2)
    return _shape(sizes), centred


def _shape(sizes: Any) -> tuple[int, int, int]:
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _fit(values: Array, affine: Affine, size: list[int], *, first: int) -> tuple[Array, Affine]:
    """Pad with zeros or crop symmetrically to ``size``; axes before ``first`` stay."""
    moved = np.zeros(3)
    for axis, wanted in enumerate(size, start=first):
        extra = wanted - values.shape[axis]
        before = extra // 2 if extra >= 0 else -((-extra) // 2)
        if extra > 0:
            widths = [(0, 0)] * values.ndim
            widths[axis] = (before, extra - before)
            values = np.pad(values, widths)
        elif extra < 0:
            values = values[(slice(None),) * axis + (slice(-before, -before + wanted),)]
        moved[axis - first] = -before
    fitted = affine.copy()
    fitted[:3, 3] = affine[:3, 3] + affine[:3, :3] @ moved
    return values, fitted


# --- interpolation -----------------------------------------------------------------------------


def _between(source: Grid, target: Grid) -> Affine:
    """Return the map from target index to source index."""
    return np.asarray(np.linalg.inv(source[1]) @ target[1])


def resample_image(values: Array, source: Grid, target: Grid) -> npt.NDArray[np.float32]:
    """Interpolate linearly on ``target``, smoothing first where it is coarser.

    Outside a straight source the nearest voxel holds (half a voxel at the edges); outside a
    sheared one there is nothing, and the image's smallest value stands for it.
    """
    from scipy.ndimage import gaussian_filter

    change = _between(source, target)
    plain = np.asarray(values, dtype=np.float32).reshape(source[0])
    coarser = np.linalg.norm(change[:3, :3], axis=1)
    # Half the surplus of the coarser voxel, as scikit-image's resize: no aliasing, little blur.
    sigma = np.where(np.array(source[0]) > 1, np.maximum(0, (coarser - 1) / 2), 0)
    if np.any(sigma > 0.05):
        plain = gaussian_filter(plain, sigma, mode="nearest")
    result = _interpolated(plain, change, target[0], edge=_edge(source))
    return np.asarray(result, dtype=np.float32)


def resample_label(values: Array, source: Grid, target: Grid) -> npt.NDArray[np.uint8]:
    """Give each target voxel the class with the largest share in it (linear weights)."""
    change = _between(source, target)
    plain = np.asarray(values).reshape(source[0])
    best = np.zeros(target[0], dtype=np.float32)
    result = np.zeros(target[0], dtype=np.uint8)
    for value in np.flatnonzero(np.bincount(plain.ravel())):
        share = _interpolated((plain == value).astype(np.float32), change, target[0], _edge(source))
        larger = share > best
        best[larger] = share[larger]
        result[larger] = value
    return result


def _edge(source: Grid) -> Literal["nearest", "constant"]:
    return "nearest" if is_straight(source[1]) else "constant"


def _interpolated(
    values: npt.NDArray[np.float32],
    change: Affine,
    shape: tuple[int, int, int],
    edge: Literal["nearest", "constant"],
) -> npt.NDArray[np.float32]:
    """Interpolate linearly at ``change`` of each index of ``shape``; outside, the nearest voxel or
    the smallest value.
    """
    scale, shift = np.diag(change)[:3], change[:3, 3]
    turned = np.abs(change[:3, :3] - np.diag(scale)).max() * max(shape)
    if edge == "nearest" and turned < _ALONG_AXES:
        # Linear weights are products over the axes: one axis at a time is twenty times faster
        # than scipy's general transform, and the same to rounding. Shrinking axes go first.
        for axis in np.argsort(np.array(shape) / values.shape):
            values = _along(values, int(axis), scale[axis] * np.arange(shape[axis]) + shift[axis])
        return values
    from scipy.ndimage import affine_transform

    smallest = float(values.min())
    result = affine_transform(
        values, change[:3, :3], shift, shape, order=1, mode=edge, cval=smallest
    )
    return np.asarray(result)


def _along(
    values: npt.NDArray[np.float32], axis: int, positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Interpolate linearly along one axis; beyond its ends the last voxel holds."""
    last = values.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    before = np.floor(positions).astype(np.intp)
    if np.array_equal(positions, np.arange(last + 1)):
        return values
    share = (positions - before).astype(np.float32)
    share = share.reshape([-1 if at == axis else 1 for at in range(values.ndim)])
    result = np.take(values, before, axis)
    above = np.take(values, np.minimum(before + 1, last), axis)
    above -= result
    above *= share
    result += above
    return result


def restore_label(
    values: Array, affine: Affine, shape: tuple[int, ...], original: Affine
) -> npt.NDArray[np.uint8]:
    """Bring class indices from a prepared grid back to the original one.

    Parameters
    ----------
    values : array
        uint8 on the prepared grid with ``affine``.
    shape, original
        Of the image file or series itself.

    Returns
    -------
    array
        uint8 on the original grid; voxels outside the prepared grid are background. Where
        preparing did not interpolate, neither does this.
    """
    from scipy.ndimage import affine_transform

    change = _between((_deep(values.shape), affine), (_deep(shape), original))
    rounded = np.rint(change)
    if np.abs(change - rounded).max() < 1e-3:
        change = rounded  # a permutation, flip or shift: exact
    result = affine_transform(
        np.asarray(values, dtype=np.uint8).reshape(_deep(values.shape)),
        change[:3, :3],
        change[:3, 3],
        _deep(shape),
        order=0,
        mode="constant",
    )
    return np.asarray(result.reshape(shape), dtype=np.uint8)
