"""DICOM SEG objects to label values on their image's own grid (highdicom)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.named_labels import choose, lay_over, overlap
from consilium_client.data.ingest.volume import LPS_TO_RAS, MAX_VOXELS, Array, Volume
from consilium_common.errors import ConsiliumError

#: Affines of a segmentation laid over its image agree to this share of a voxel.
_SAME_GRID: Final = 0.02
#: highdicom's own tolerance (shares of a voxel) while it permutes and pads.
_MATCH_TOLERANCE: Final = 0.01
#: A voxel belongs to a fractional segment from this probability or occupancy on: the more likely
#: side, and what binary contours of the same shape would hold.
_HALF: Final = 0.5


def read_segmentation(
    path: Path,
    image: Volume,
    slices: Sequence[Header],
    labels: Mapping[str, int],
    wanted: str = "",
) -> Volume:
    """Read a DICOM SEG as label values on the grid of ``image``.

    Binary, fractional (a voxel belongs to a segment from half of MaximumFractionalValue on) and
    label map. Empty frames may be absent in the file; they read as background. Nothing is
    interpolated: a segmentation that needs it is refused.

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
    wanted : str
        Segments that are meant, see :func:`~consilium_client.data.ingest.named_labels.choose`;
        where several overlap, the later one counts. Empty means all, and none may overlap.

    Raises
    ------
    ConsiliumError
        ``data.geometry``, ``data.overlap``, ``data.label-unknown``, ``data.label-values`` or
        ``data.truncated``.
    """
    import highdicom

    dataset = open_dicom(path)
    with reading(path, "DICOM SEG"), quietly():
        segmentation: Any = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
        numbers = [
            (int(item.SegmentNumber), str(item.get("SegmentLabel") or item.SegmentNumber))
            for item in segmentation.SegmentSequence
            if int(item.SegmentNumber) != 0  # a label map may describe its background
        ]
        fractional = str(segmentation.get("SegmentationType", "")) == "FRACTIONAL"
        frame_of_reference = str(segmentation.get("FrameOfReferenceUID") or "")
    where = f"{path} and {slices[0].path.parent}"
    chosen = choose([name for _, name in numbers], wanted, labels, str(path))
    own = slices[0].frame_of_reference
    if frame_of_reference and own and frame_of_reference != own:
        raise ConsiliumError(
            "data.geometry",
            "Image and segmentation have different frames of reference.",
            where=where,
            hint="The segmentation was drawn on another examination, or on a registered copy.",
        )
    if not chosen:
        return Volume(np.zeros(image.values.shape, dtype=np.uint16), image.affine)
    number_of = {name: number for number, name in numbers}
    if fractional or (wanted and len(chosen) > 1):
        masks = (
            (labels[name], found >= _HALF if fractional else found == number_of[name])
            for name in chosen
            for found in [
                _on_grid(segmentation, [number_of[name]], image, slices, where, shares=fractional)
            ]
        )
        values = lay_over(masks, image.values.shape, later_wins=bool(wanted), where=where)
        return Volume(values, image.affine)
    # All at once: one pass over the frames, and highdicom looks for overlaps.
    found = _on_grid(segmentation, [number_of[name] for name in chosen], image, slices, where)
    # Of a label map, highdicom hands out the segments that were not asked for too.
    described = [number for number, _ in numbers]
    if not set(np.flatnonzero(np.bincount(found.ravel()))) <= {0, *described}:
        raise ConsiliumError(
            "data.label-values",
            "The segmentation holds a value that none of its segments has.",
            where=str(path),
            hint="Export it again from the program that drew it.",
        )
    table = np.zeros(max(described) + 1, dtype=np.uint16)
    for name in chosen:
        table[number_of[name]] = labels[name]
    return Volume(table[found], image.affine)


def _on_grid(
    segmentation: Any,
    numbers: Sequence[int],
    image: Volume,
    slices: Sequence[Header],
    where: str,
    *,
    shares: bool = False,
) -> Array:
    """Return segment numbers, or one segment's shares (0 to 1), on the image's grid, indexed as
    the image is.
    """
    import highdicom

    plane = image.values.ndim == 2
    # highdicom wants (slice, row, column) in LPS; ours is (column, row, slice) or (row, column).
    order = [2, 0, 1, 3] if plane else [2, 1, 0, 3]
    affine = (LPS_TO_RAS @ image.affine)[:, order]
    shape = (1, *image.values.shape) if plane else image.values.shape[::-1]
    multi_frame = slices[0].frames > 1
    what: dict[str, Any] = {
        "segment_numbers": list(numbers),
        "combine_segments": not shares,
        "dtype": np.float32 if shares else np.uint16,
    }
    try:
        with reading(where, "DICOM SEG"), quietly():
            if not plane and not multi_frame and _sheared(affine):
                found = _by_source(segmentation, slices, what)
            else:
                _check_size(segmentation, where)
                drawn = segmentation.get_volume(**what)
                if plane and drawn.spatial_shape[0] == 1:
                    # How thick one slice is, and to which side it counts, places no voxel.
                    affine[:, 0] = drawn.affine[:, 0]
                target = highdicom.VolumeGeometry(affine, shape, coordinate_system="PATIENT")
                laid = drawn.match_geometry(target, tol=_MATCH_TOLERANCE)
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
            raise overlap(where) from cause
        raise _elsewhere(where) from cause
    if shares:
        found = found[..., 0]
    return found[0] if plane else np.transpose(found, (2, 1, 0))


def _check_size(segmentation: Any, where: str) -> None:
    """Refuse a segmentation whose frames span a volume that no memory holds, before it is made."""
    spanned = segmentation.get_volume_geometry()
    if spanned is not None and math.prod(spanned.spatial_shape) > MAX_VOXELS:
        raise ConsiliumError(
            "data.too-large",
            "The segmentation's frames span more than 2^30 voxels.",
            where=where,
            hint="Export it again from the program that drew it.",
        )


def _sheared(affine: Any) -> bool:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3)


def _by_source(segmentation: Any, slices: Sequence[Header], what: Mapping[str, Any]) -> Array:
    """Lay frames over the slices they name: for a tilted series, whose grid is no box."""
    return np.asarray(
        segmentation.get_pixels_by_source_instance(
            [header.sop_instance for header in slices],
            assert_missing_frames_are_empty=True,
            **what,
        )
    )


def _elsewhere(where: str) -> ConsiliumError:
    return ConsiliumError(
        "data.geometry",
        "The segmentation does not fit the image's grid without interpolation.",
        where=where,
        hint="Draw or resample the segmentation on this very series.",
    )
