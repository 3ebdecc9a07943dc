"""A DICOM series to one volume: ordered by position, checked for gaps, and placed exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.multi_frame import is_multi_frame, read_multi_frame
from consilium_client.data.ingest.pixels import decode, without_padding
from consilium_client.data.ingest.slice_geometry import (
    Plane,
    order_of,
    plane_affine,
    stack_affine,
)
from consilium_client.data.ingest.slices import OpenedSlice, decode_slices
from consilium_client.data.ingest.volume import MAX_VOXELS, Volume, require_finite
from consilium_common.errors import ConsiliumError


def read_series(
    headers: Sequence[Header], where: str, opened: dict[Path, OpenedSlice] | None = None
) -> tuple[Volume, list[Header]]:
    """Read the slices of one series, whatever the order of their files.

    Parameters
    ----------
    opened : dict, optional
        The files as :func:`~consilium_client.data.ingest.slices.open_slices` has opened them; it
        is emptied. Others are opened here.

    Returns
    -------
    (volume, slices)
        (columns, rows, slices) in the series' own directions, values after rescale, and the
        headers in the order of the third axis; (rows, columns) for a single image. A tilted
        gantry gives an affine with a shear: every voxel lies where the scanner put it. Declared
        padding outside the measured range has the smallest measured value of the volume.

    Raises
    ------
    ConsiliumError
        ``data.two-patients``, ``data.several-series``, ``data.duplicate``,
        ``data.mixed-geometry``, ``data.missing-slices``, ``data.uneven-slices``, ``data.tilt``,
        ``data.no-position``, ``data.multi-frame``, ``data.truncated``, ``data.codec``,
        ``data.too-large``, ``data.geometry`` or ``data.format``.
    """
    if not headers:
        raise ConsiliumError(
            "data.missing",
            "The folder holds no DICOM image.",
            where=where,
            hint="Name a folder with the files of one series.",
        )
    _check_one_series(headers, where)
    for header in headers:
        _check_kind(header)
    if any(is_multi_frame(header) for header in headers):
        if len(headers) > 1:
            raise ConsiliumError(
                "data.multi-frame",
                f"The series holds {len(headers)} files, and each may hold several frames: "
                "phases, or parts of one volume.",
                where=where,
                hint="Name the file that is meant, or export the parts as one file.",
            )
        return read_multi_frame(headers[0]), [headers[0]]
    if len(headers) == 1:
        return _read_plane(headers[0]), [headers[0]]
    planes = [_plane(header) for header in headers]
    order = order_of(planes)
    affine = stack_affine([planes[index] for index in order], where)
    ordered = [headers[index] for index in order]
    if ordered[0].rows * ordered[0].columns * len(ordered) > MAX_VOXELS:
        raise ConsiliumError("data.too-large", "The series has more than 2^30 voxels.", where=where)
    parts = list(decode_slices(ordered, {} if opened is None else opened))
    values = np.concatenate([part.values for part in parts])
    if any(part.padding is not None for part in parts):
        padding = [
            np.zeros(part.values.shape, dtype=bool) if part.padding is None else part.padding
            for part in parts
        ]
        values = without_padding(values, np.concatenate(padding))
    require_finite(values, affine, where)
    return Volume(values.T, affine), ordered


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
        twice.sort(key=lambda header: (header.sop_instance, header.path))
        raise ConsiliumError(
            "data.duplicate",
            f"{sum(n - 1 for n in instances.values())} files repeat an instance of the series.",
            where=" and ".join(str(header.path) for header in twice[:2]),
            hint="Remove the copies.",
        )


def _check_kind(header: Header) -> None:
    if "MOSAIC" in header.image_type:
        raise ConsiliumError(
            "data.multi-frame",
            "The image is a Siemens mosaic: many slices drawn as tiles of one picture.",
            where=str(header.path),
            hint="Convert it to NIfTI (dcm2niix), or export it as enhanced multi-frame DICOM.",
        )


def _plane(header: Header) -> Plane:
    return Plane(
        name=str(header.path),
        rows=header.rows,
        columns=header.columns,
        position=header.position,
        orientation=header.orientation,
        pixel_spacing=header.pixel_spacing,
        thickness=header.slice_thickness,
    )


def _read_plane(header: Header) -> Volume:
    image = decode(header)
    values = without_padding(image.values, image.padding)
    known = header.pixel_spacing is not None
    affine = plane_affine(_plane(header)) if known else np.eye(4)
    require_finite(values, affine, str(header.path))
    return Volume(values, affine, spacing_known=known)
