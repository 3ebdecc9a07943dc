"""A DICOM series to one volume: ordered by position, checked for gaps, and placed exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.volume import (
    LPS_TO_RAS,
    MAX_VOXELS,
    Affine,
    Array,
    Volume,
    require_finite,
)
from consilium_common.errors import ConsiliumError

#: Slices may lie this far (mm) from the straight, even line that the affine describes.
_OFF_LINE_MM: Final = 0.1
#: Direction cosines of one series agree to this.
_SAME_DIRECTION: Final = 1e-3
_STEEPEST_TILT_DEGREES: Final = 45.0


def read_series(headers: Sequence[Header], where: str) -> tuple[Volume, list[Header]]:
    """Read the slices of one series, whatever the order of their files.

    Returns
    -------
    (volume, slices)
        (columns, rows, slices) in the series' own directions, values after rescale, and the
        headers in the order of the third axis; (rows, columns) for a single image. A tilted
        gantry gives an affine with a shear: every voxel lies where the scanner put it.

    Raises
    ------
    ConsiliumError
        ``data.two-patients``, ``data.several-series``, ``data.duplicate``,
        ``data.mixed-geometry``, ``data.missing-slices``, ``data.uneven-slices``, ``data.tilt``,
        ``data.no-position``, ``data.multi-frame``, ``data.truncated`` or ``data.format``.
    """
    if not headers:
        raise ConsiliumError(
            "data.missing",
            "The folder holds no DICOM image.",
            where=where,
            hint="Name a folder with the files of one series.",
        )
    _check_one_series(headers, where)
    if any(header.frames > 1 for header in headers):
        if len(headers) > 1:
            raise ConsiliumError(
                "data.multi-frame",
                "The series holds several files of several frames each.",
                where=where,
                hint="Name the file that is meant.",
            )
        return _read_multi_frame(headers[0]), [headers[0]]
    if len(headers) == 1:
        return _read_plane(headers[0]), [headers[0]]
    ordered = _ordered(headers, where)
    affine = _affine(ordered, where)
    first = ordered[0]
    if first.rows * first.columns * len(ordered) > MAX_VOXELS:
        raise ConsiliumError("data.too-large", "The series has more than 2^31 voxels.", where=where)
    planes = [read_pixels(header) for header in ordered]
    values = np.stack([plane.T for plane in planes], axis=-1)
    require_finite(values, affine, where)
    return Volume(values, affine), ordered


def _check_one_series(headers: Sequence[Header], where: str) -> None:
    if len({header.patient_id for header in headers}) > 1:
        raise ConsiliumError(
            "data.two-patients",
            f"The series folder holds images of {len({h.patient_id for h in headers})} patients.",
            where=where,
            hint="Move each patient's files into a folder of their own.",
        )
    if len({header.series for header in headers}) > 1:
        raise ConsiliumError(
            "data.several-series",
            f"The folder holds {len({h.series for h in headers})} series.",
            where=where,
            hint="Name the SeriesInstanceUID in the case list, or one folder per series.",
        )
    instances = Counter(header.sop_instance for header in headers)
    twice = [header for header in headers if instances[header.sop_instance] > 1]
    if twice:
        raise ConsiliumError(
            "data.duplicate",
            f"{sum(n - 1 for n in instances.values())} files repeat an instance of the series.",
            where=" and ".join(str(header.path) for header in twice[:2]),
            hint="Remove the copies.",
        )


def _ordered(headers: Sequence[Header], where: str) -> list[Header]:
    """Sort slices along the normal of their plane, after checking that they share one."""
    first = headers[0]
    for header in headers:
        if header.position is None or header.orientation is None or header.pixel_spacing is None:
            raise ConsiliumError(
                "data.no-position",
                "A slice does not say where in the patient it lies.",
                where=str(header.path),
                hint="Export the original series; name single pictures as files of their own.",
            )
        same = (
            (header.rows, header.columns) == (first.rows, first.columns)
            and np.allclose(header.orientation, first.orientation or (), atol=_SAME_DIRECTION)
            and np.allclose(header.pixel_spacing, first.pixel_spacing or (), rtol=1e-3)
        )
        if not same:
            raise ConsiliumError(
                "data.mixed-geometry",
                "Slices of one series differ in size, direction or pixel spacing.",
                where=f"{first.path} and {header.path}",
                hint="Is a localiser among them? Take it out of the folder.",
            )
    normal = _normal(first)
    return sorted(headers, key=lambda header: float(normal @ np.array(header.position)))


def _normal(header: Header) -> Affine:
    row, column = np.array(header.orientation).reshape(2, 3)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(row @ column) > 1e-2:
        raise ConsiliumError(
            "data.mixed-geometry",
            "The image's direction cosines are not two perpendicular unit vectors.",
            where=str(header.path),
            hint="Export the series again from its source.",
        )
    return np.asarray(np.cross(row, column))


def _affine(ordered: Sequence[Header], where: str) -> Affine:
    """Return index (column, row, slice) to RAS millimetres, after checking the slices' spacing.

    DICOM PS3.3 C.7.6.2.1.1, with the slice direction taken from the positions themselves.
    """
    positions = np.array([header.position for header in ordered])
    depth = positions @ _normal(ordered[0])
    _check_steps(ordered, depth, where)
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
            where=str(ordered[worst].path),
            hint="Export the series resampled to even spacing, or leave it out.",
        )
    cosine = min(1.0, abs(float(step @ _normal(ordered[0]))) / float(np.linalg.norm(step)))
    tilt = float(np.degrees(np.arccos(cosine)))
    if tilt > _STEEPEST_TILT_DEGREES:
        raise ConsiliumError(
            "data.tilt",
            f"The slices are shifted against each other by {tilt:.0f}°; up to "
            f"{_STEEPEST_TILT_DEGREES:.0f}° is read.",
            where=where,
            hint="Export the series without tilt.",
        )
    return LPS_TO_RAS @ _plane_affine(ordered[0], start, step)


def _plane_affine(header: Header, start: Any, step: Any) -> Affine:
    row, column = np.array(header.orientation).reshape(2, 3)
    between_rows, between_columns = header.pixel_spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = row * between_columns
    affine[:3, 1] = column * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = start
    return affine


def _check_steps(ordered: Sequence[Header], depth: Any, where: str) -> None:
    steps = np.diff(depth)
    usual = float(np.median(steps))
    tolerance = min(2 * _OFF_LINE_MM, 0.25 * usual) if usual > 0 else _OFF_LINE_MM
    close = np.flatnonzero(steps < 1e-3)
    if close.size:
        pair = ordered[close[0]], ordered[close[0] + 1]
        raise ConsiliumError(
            "data.duplicate",
            f"{close.size} positions hold two slices each.",
            where=f"{pair[0].path} and {pair[1].path}",
            hint="Remove repeated slices; give several time points folders of their own.",
        )
    odd = np.flatnonzero(np.abs(steps - usual) > tolerance)
    if not odd.size:
        return
    ratio = steps[odd] / usual
    whole = np.abs(ratio - np.round(ratio)) * usual <= 2 * tolerance
    pair = ordered[odd[0]], ordered[odd[0] + 1]
    between = f"{pair[0].path} and {pair[1].path}"
    if bool(np.all(whole & (np.round(ratio) >= 2))):
        missing = int((np.round(ratio) - 1).sum())
        raise ConsiliumError(
            "data.missing-slices",
            f"{missing} slices are missing in {odd.size} places: a step of "
            f"{steps[odd[0]]:.2f} mm where the others are {usual:.2f} mm.",
            where=f"between {between}",
            hint="Fetch the missing slices from the archive, or leave the series out.",
        )
    raise ConsiliumError(
        "data.uneven-slices",
        f"The distance between slices changes from {steps.min():.2f} to {steps.max():.2f} mm.",
        where=f"{where}, first between {pair[0].path.name} and {pair[1].path.name}",
        hint="Split the series where its spacing changes, or export it resampled to even spacing.",
    )


# --- pixels ------------------------------------------------------------------------------------


def read_pixels(header: Header) -> Array:
    """Read one image's values, (rows, columns), after modality rescale and inversion.

    MONOCHROME1 (low values bright) is turned over, so that bright means dense at every site;
    colours become luminance (ITU-R 601-2).

    Raises
    ------
    ConsiliumError
        ``data.truncated`` or ``data.format``.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut

    with reading(header.path, "DICOM image"):
        dataset: Any = pydicom.dcmread(header.path)
        values = _decoded(dataset, header)
        colours = str(dataset.get("PhotometricInterpretation", ""))
        if colours == "PALETTE COLOR":
            raise ConsiliumError(
                "data.format",
                "The image's values are colours of a palette, not measurements.",
                where=str(header.path),
                hint="Export it as greyscale.",
            )
        if values.ndim == 3 and values.shape[-1] == 3:
            values = np.rint(values @ np.array([0.299, 0.587, 0.114])).astype(np.int32)
        if values.shape != (header.rows, header.columns):
            raise ConsiliumError(
                "data.truncated",
                "The pixels do not have the size that the header says.",
                where=str(header.path),
            )
        if colours == "MONOCHROME1":
            values = _inverted(values, int(dataset.BitsStored), int(dataset.PixelRepresentation))
        scaled: Array = apply_modality_lut(values, dataset)
    if scaled.dtype.kind == "f" and np.array_equal(scaled, whole := np.rint(scaled)):
        scaled = whole.astype(np.int32) if np.abs(whole).max(initial=0) < 2**31 else scaled
    return scaled


def _decoded(dataset: Any, header: Header) -> Array:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        values: Array = dataset.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        if not syntax.is_compressed:
            raise
        raise ConsiliumError(
            "data.codec",
            f"The pixels, compressed as {syntax.name}, cannot be decoded: they are damaged, or of "
            "a variant that no decoder here reads.",
            where=str(header.path),
            hint="Export the series uncompressed (Explicit VR Little Endian).",
        ) from error
    return values


def _inverted(values: Array, bits: int, signed: int) -> Array:
    # The range of stored values is mirrored in itself: signed from -2^(b-1), unsigned from 0.
    total = -1 if signed else 2**bits - 1
    return np.asarray(total - values.astype(np.int64))


def _read_plane(header: Header) -> Volume:
    values = read_pixels(header)
    if header.pixel_spacing is None:
        return Volume(values, np.eye(4), spacing_known=False)
    if header.position is None or header.orientation is None:
        affine = np.diag([header.pixel_spacing[0], header.pixel_spacing[1], 1.0, 1.0])
    else:
        step = _normal(header) * (header.slice_thickness or 1.0)
        placed = LPS_TO_RAS @ _plane_affine(header, header.position, step)
        affine = placed[:, [1, 0, 2, 3]]  # a plane's first index counts rows
    require_finite(values, affine, str(header.path))
    return Volume(values, affine)


def _read_multi_frame(header: Header) -> Volume:
    """Read an enhanced multi-frame image through highdicom, which knows its functional groups."""
    import highdicom

    with reading(header.path, "DICOM image"):
        image: Any = highdicom.imread(header.path)
        try:
            volume: Any = image.get_volume(
                dtype=np.float64, apply_modality_transform=None, apply_presentation_lut=False
            )
            if volume.array.ndim != 3:
                raise ValueError("colours")
        except (RuntimeError, ValueError, AttributeError) as error:
            if not _complete(header.path):
                raise
            raise ConsiliumError(
                "data.multi-frame",
                "The frames are not the evenly spaced slices of one volume.",
                where=str(header.path),
                hint="Export one volume (one phase, one stack) of the series.",
            ) from error
    # highdicom counts (slice, row, column) and the patient in LPS.
    values = np.transpose(np.asarray(volume.array), (2, 1, 0))
    affine = LPS_TO_RAS @ np.asarray(volume.affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    require_finite(values, affine, str(header.path))
    if np.array_equal(values, np.rint(values)) and np.abs(values).max(initial=0) < 2**31:
        values = values.astype(np.int32)
    return Volume(values, affine)


def _complete(path: Path) -> bool:
    """Whether the file's pixels can be decoded at all."""
    import pydicom

    try:
        return bool(pydicom.dcmread(path).pixel_array.size)
    except Exception:  # any failure of a decoder means the same here
        return False
