"""Where the planes of a series lie: their order, their spacing, and the affine of the volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.ingest.volume import LPS_TO_RAS, Affine
from consilium_common.errors import ConsiliumError

#: Slices may lie this far (mm) from the straight, even line that the affine describes.
_OFF_LINE_MM: Final = 0.1
#: Direction cosines of one series agree to this.
_SAME_DIRECTION: Final = 1e-3
_STEEPEST_TILT_DEGREES: Final = 45.0
#: Gaps and stacks named in one message.
_NAMED: Final = 4


@dataclass(frozen=True)
class Plane:
    """One slice's grid, in DICOM's own terms (PS3.3 C.7.6.2).

    Parameters
    ----------
    name : str
        The file, or the frame in it, to name in an error.
    rows, columns : int
        Size in pixels.
    position, orientation : tuple of float, optional
        ImagePositionPatient and ImageOrientationPatient, LPS+ in millimetres.
    pixel_spacing : tuple of float, optional
        Millimetres between rows and between columns.
    thickness : float, optional
        Millimetres.
    """

    name: str
    rows: int
    columns: int
    position: tuple[float, float, float] | None
    orientation: tuple[float, float, float, float, float, float] | None
    pixel_spacing: tuple[float, float] | None
    thickness: float | None = None


def order_of(planes: Sequence[Plane]) -> list[int]:
    """Return the indices of ``planes`` in the order along their common normal.

    Raises
    ------
    ConsiliumError
        ``data.no-position``, ``data.geometry`` or ``data.mixed-geometry``.
    """
    first = planes[0]
    for plane in planes:
        if plane.position is None or plane.orientation is None or plane.pixel_spacing is None:
            raise ConsiliumError(
                "data.no-position",
                "A slice does not say where in the patient it lies.",
                where=plane.name,
                hint="Export the original series; name single pictures as files of their own.",
            )
    positions = np.array([plane.position for plane in planes], dtype=np.float64)
    directions = np.array([plane.orientation for plane in planes], dtype=np.float64)
    spacings = np.array([plane.pixel_spacing for plane in planes], dtype=np.float64)
    possible = (spacings > 0).all(axis=1)
    for known in (positions, directions, spacings):
        possible &= np.isfinite(known).all(axis=1)
    if not possible.all():
        raise ConsiliumError(
            "data.geometry",
            "A slice's position or pixel spacing is not a possible number.",
            where=planes[int(possible.argmin())].name,
            hint="Export the series again from its source.",
        )
    same = np.array(
        [(plane.rows, plane.columns) == (first.rows, first.columns) for plane in planes]
    )
    same &= np.isclose(directions, directions[0], atol=_SAME_DIRECTION).all(axis=1)
    same &= np.isclose(spacings, spacings[0], rtol=1e-3).all(axis=1)
    if not same.all():
        raise ConsiliumError(
            "data.mixed-geometry",
            "Slices of one series differ in size, direction or pixel spacing.",
            where=f"{first.name} and {planes[int(same.argmin())].name}",
            hint="Is a localiser among them? Take it out of the folder.",
        )
    depth = positions @ _normal(first)
    return [int(index) for index in np.argsort(depth, kind="stable")]


def stack_affine(ordered: Sequence[Plane], where: str) -> Affine:
    """Return (column, row, slice) index to RAS millimetres, after checking the slices' spacing.

    DICOM PS3.3 C.7.6.2.1.1, with the slice direction taken from the positions themselves: a
    tilted gantry gives a shear.

    Parameters
    ----------
    ordered : sequence of Plane
        At least two, ordered by :func:`order_of`.
    where : str
        The series, to name in an error.

    Raises
    ------
    ConsiliumError
        ``data.duplicate``, ``data.missing-slices``, ``data.uneven-slices`` or ``data.tilt``.
    """
    positions = np.array([plane.position for plane in ordered], dtype=np.float64)
    normal = _normal(ordered[0])
    _check_steps(ordered, positions @ normal, where)
    # The straight line through all positions by least squares: the first and the last alone would
    # carry their rounding into every slice.
    numbers = np.arange(len(ordered)) - (len(ordered) - 1) / 2
    step = numbers @ (positions - positions.mean(axis=0)) / (numbers @ numbers)
    start = positions.mean(axis=0) - step * (len(ordered) - 1) / 2
    off = np.linalg.norm(positions - (start + np.outer(np.arange(len(ordered)), step)), axis=1)
    worst = int(off.argmax())
    if off[worst] > _OFF_LINE_MM:
        raise ConsiliumError(
            "data.uneven-slices",
            f"Slices do not lie on one even line: one is {off[worst]:.2f} mm off.",
            where=ordered[worst].name,
            hint="Export the series resampled to even spacing, or leave it out.",
        )
    cosine = min(1.0, abs(float(step @ normal)) / float(np.linalg.norm(step)))
    tilt = float(np.degrees(np.arccos(cosine)))
    if tilt > _STEEPEST_TILT_DEGREES:
        raise ConsiliumError(
            "data.tilt",
            f"The slices are shifted against each other by {tilt:.0f}°; up to "
            f"{_STEEPEST_TILT_DEGREES:.0f}° is read.",
            where=where,
            hint="Export the series without tilt.",
        )
    return _affine(ordered[0], start, step)


def plane_affine(plane: Plane) -> Affine:
    """Return the affine of one image alone, indexed (row, column), RAS millimetres.

    Without a position in the patient only the pixel spacing is right.

    Raises
    ------
    ConsiliumError
        ``data.geometry`` or ``data.mixed-geometry``.
    """
    if plane.position is None or plane.orientation is None:
        between_rows, between_columns = plane.pixel_spacing or (1.0, 1.0)
        return np.diag([between_rows, between_columns, 1.0, 1.0])
    order_of([plane])
    step = _normal(plane) * (plane.thickness or 1.0)
    return _affine(plane, plane.position, step)[:, [1, 0, 2, 3]]


def _directions(plane: Plane) -> tuple[Affine, Affine]:
    """Return the directions along a row and along a column, of length 1.

    Headers hold rounded cosines: a length of 1.00001 is 5 µm at the far edge of an image.
    """
    row, column = np.array(plane.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(row @ column) > 1e-2:
        raise ConsiliumError(
            "data.mixed-geometry",
            "The image's direction cosines are not two perpendicular unit vectors.",
            where=plane.name,
            hint="Export the series again from its source.",
        )
    return row / lengths[0], column / lengths[1]


def _normal(plane: Plane) -> Affine:
    return np.asarray(np.cross(*_directions(plane)))


def _affine(plane: Plane, start: Any, step: Any) -> Affine:
    row, column = _directions(plane)
    between_rows, between_columns = plane.pixel_spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = row * between_columns
    affine[:3, 1] = column * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = start
    return LPS_TO_RAS @ affine


def _check_steps(ordered: Sequence[Plane], depth: Any, where: str) -> None:
    steps = np.diff(depth)
    usual = float(np.median(steps))
    tolerance = min(2 * _OFF_LINE_MM, 0.25 * usual) if usual > 0 else _OFF_LINE_MM
    close = np.flatnonzero(steps < 1e-3)
    if close.size:
        raise ConsiliumError(
            "data.duplicate",
            f"{close.size} positions hold two slices each.",
            where=_between(ordered, int(close[0])),
            hint="Remove repeated slices; give several time points folders of their own.",
        )
    odd = np.flatnonzero(np.abs(steps - usual) > tolerance)
    if not odd.size:
        return
    ratio = steps[odd] / usual
    whole = np.abs(ratio - np.round(ratio)) * usual <= 2 * tolerance
    if bool(np.all(whole & (np.round(ratio) >= 2))):
        absent = (np.round(ratio) - 1).astype(int)
        gaps = [
            f"{count} between {_between(ordered, int(index))}"
            for count, index in zip(absent, odd, strict=True)
        ]
        total = int(absent.sum())
        raise ConsiliumError(
            "data.missing-slices",
            f"{total} {'slice is' if total == 1 else 'slices are'} missing in {odd.size} "
            f"{'place' if odd.size == 1 else 'places'}: a step of {steps[odd[0]]:.2f} mm where "
            f"the others are {usual:.2f} mm.",
            where="; ".join(gaps[:_NAMED]),
            hint="Fetch the missing slices from the archive, or leave the series out.",
        )
    pair = [Path(plane.name).name for plane in ordered[odd[0] : odd[0] + 2]]
    raise ConsiliumError(
        "data.uneven-slices",
        f"The distance between slices changes: {_stacks(steps, tolerance)}.",
        where=f"{where}, first between {pair[0]} and {pair[1]}",
        hint="Split the series where its spacing changes, or export it resampled to even spacing.",
    )


def _between(ordered: Sequence[Plane], index: int) -> str:
    return f"{ordered[index].name} and {ordered[index + 1].name}"


def _stacks(steps: Any, tolerance: float) -> str:
    """Say how many steps of which length follow each other."""
    starts = [0, *(np.flatnonzero(np.abs(np.diff(steps)) > tolerance) + 1)]
    runs = np.split(steps, starts[1:])
    said = ", ".join(f"{len(run)} × {run.mean():.2f} mm" for run in runs[:_NAMED])
    return f"{said}, and so on" if len(runs) > _NAMED else said
