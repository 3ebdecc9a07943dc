"""DICOM SEG objects to label values on their image's own grid (highdicom)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.volume import LPS_TO_RAS, Array, Volume
from consilium_common.errors import ConsiliumError

#: Affines of a segmentation laid over its image agree to this share of a voxel.
_SAME_GRID: Final = 0.02
#: highdicom's own tolerance (shares of a voxel) while it permutes and pads.
_MATCH_TOLERANCE: Final = 0.01


def read_segmentation(
    path: Path, image: Volume, slices: Sequence[Header], labels: Mapping[str, int]
) -> Volume:
    """Read a DICOM SEG as label values on the grid of ``image``.

    Empty frames may be absent in the file; they read as background. Nothing is interpolated: a
    segmentation that needs it is refused.

    Parameters
    ----------
    path : Path
        The SEG object.
    image : Volume
        As :func:`~consilium_client.data.ingest.dicom_series.read_series` gives it.
    slices : sequence of Header
        The image's headers, in the order of its third axis.
    labels : mapping
        Segment label to the value it gets.

    Raises
    ------
    ConsiliumError
        ``data.geometry``, ``data.overlap``, ``data.label-unknown``, ``data.label-values`` or
        ``data.truncated``.
    """
    import highdicom

    with reading(path, "DICOM SEG"):
        segmentation: Any = highdicom.seg.segread(path)
        numbers = {
            int(item.SegmentNumber): str(item.get("SegmentLabel") or item.SegmentNumber)
            for item in segmentation.SegmentSequence
            if int(item.SegmentNumber) != 0  # a label map may describe its background
        }
        kind = str(segmentation.get("SegmentationType", ""))
        frame_of_reference = str(segmentation.get("FrameOfReferenceUID") or "")
    where = f"{path} and {slices[0].path.parent}"
    _check_meaning(numbers, labels, kind, path)
    own = slices[0].frame_of_reference
    if frame_of_reference and own and frame_of_reference != own:
        raise ConsiliumError(
            "data.geometry",
            "Image and segmentation have different frames of reference.",
            where=where,
            hint="The segmentation was drawn on another examination, or on a registered copy.",
        )
    values = _on_grid(segmentation, image, slices, where)
    table = np.zeros(max(numbers, default=0) + 1, dtype=np.uint16)
    for number, name in numbers.items():
        table[number] = labels[name]
    return Volume(table[values], image.affine)


def _check_meaning(
    numbers: Mapping[int, str], labels: Mapping[str, int], kind: str, path: Path
) -> None:
    if kind == "FRACTIONAL":
        raise ConsiliumError(
            "data.label-values",
            "The segmentation holds probabilities or fractions, not labels.",
            where=str(path),
            hint="Export it as a binary segmentation or a label map.",
        )
    unknown = sorted(set(numbers.values()) - set(labels))
    if unknown:
        raise ConsiliumError(
            "data.label-unknown",
            f"The segmentation has a segment {unknown[0]!r}, which site.yaml does not list.",
            where=str(path),
            hint="Add it under `labels` in site.yaml, or import the folder again.",
        )
    if len(set(numbers.values())) != len(numbers):
        raise ConsiliumError(
            "data.label-values",
            "Two segments have the same label.",
            where=str(path),
            hint="Give each segment its own label, or merge them.",
        )


def _on_grid(segmentation: Any, image: Volume, slices: Sequence[Header], where: str) -> Array:
    """Return segment numbers on the image's grid, indexed as the image is."""
    import highdicom

    plane = image.values.ndim == 2
    # highdicom wants (slice, row, column) in LPS; ours is (column, row, slice) or (row, column).
    order = [2, 0, 1, 3] if plane else [2, 1, 0, 3]
    affine = (LPS_TO_RAS @ image.affine)[:, order]
    shape = (1, *image.values.shape) if plane else image.values.shape[::-1]
    multi_frame = slices[0].frames > 1
    try:
        with reading(where, "DICOM SEG"):
            if not plane and not multi_frame and _sheared(affine):
                found = _by_source(segmentation, slices)
            else:
                target = highdicom.VolumeGeometry(affine, shape, coordinate_system="PATIENT")
                laid = segmentation.get_volume(
                    combine_segments=True, dtype=np.uint16
                ).match_geometry(target, tol=_MATCH_TOLERANCE)
                found = np.asarray(laid.array)
                voxel = min(image.spacing)
                if np.abs(laid.affine - affine)[:3].max() > _SAME_GRID * voxel:
                    raise _elsewhere(where)
    except ConsiliumError as error:
        cause = error.__cause__
        if cause is None or not isinstance(cause, RuntimeError | ValueError | KeyError):
            raise
        # highdicom says by words alone which of the two it is; both keep the image out.
        if "overlap" in str(cause):
            raise ConsiliumError(
                "data.overlap",
                "Segments overlap: a voxel would have two labels.",
                where=where,
                hint="Export the segments that the study needs without overlap.",
            ) from cause
        raise _elsewhere(where) from cause
    return found[0] if plane else np.transpose(found, (2, 1, 0))


def _sheared(affine: Any) -> bool:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3)


def _by_source(segmentation: Any, slices: Sequence[Header]) -> Array:
    """Lay frames over the slices they name: for a tilted series, whose grid is no box."""
    return np.asarray(
        segmentation.get_pixels_by_source_instance(
            [header.sop_instance for header in slices],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
            dtype=np.uint16,
        )
    )


def _elsewhere(where: str) -> ConsiliumError:
    return ConsiliumError(
        "data.geometry",
        "The segmentation does not fit the image's grid without interpolation.",
        where=where,
        hint="Draw or resample the segmentation on this very series.",
    )
