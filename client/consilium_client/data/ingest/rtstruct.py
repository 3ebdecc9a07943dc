"""RTSTRUCT contours to label values on their image's own grid (scikit-image fills polygons)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.named_labels import choose, lay_over
from consilium_client.data.ingest.volume import LPS_TO_RAS, Array, Volume
from consilium_common.errors import ConsiliumError

MODALITY: Final = "RTSTRUCT"
#: A contour may lie this far off its slice, as a share of the distance between slices: planning
#: systems round positions, and a contour drawn between slices belongs to none of them.
_OFF_SLICE: Final = 0.1
_CLOSED: Final = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})


def read_structures(
    path: Path,
    image: Volume,
    slices: Sequence[Header],
    labels: Mapping[str, int],
    wanted: str = "",
) -> Volume:
    """Read the regions of an RTSTRUCT as label values on the grid of ``image``.

    A voxel belongs to a region when its centre lies inside the contours of its slice (a centre on
    the line counts as inside). Contours of one region on one slice are combined by exclusive or,
    so that a contour inside another is a hole, as is one that a keyhole joins to the outer contour
    (DICOM PS3.3 C.8.8.6.3). Slices without a contour stay background: nothing is interpolated.

    Parameters
    ----------
    path : Path
        The RTSTRUCT object.
    image : Volume
        As :func:`~consilium_client.data.ingest.dicom_series.read_series` gives it.
    slices : sequence of Header
        The image's headers, in the order of its third axis.
    labels : mapping
        Region (ROI) name to the value it gets.
    wanted : str
        Regions that are meant, see :func:`~consilium_client.data.ingest.named_labels.choose`;
        where several overlap, the later one counts. Empty means all but mere points, and none may
        overlap.

    Raises
    ------
    ConsiliumError
        ``data.geometry``, ``data.overlap``, ``data.label-unknown``, ``data.label-values``,
        ``data.format`` or ``data.truncated``.
    """
    where = f"{path} and {slices[0].path.parent}"
    dataset = open_dicom(path)
    with reading(path, MODALITY), quietly():
        _check_series(dataset, slices[0], where)
        contours = {
            int(item.ReferencedROINumber): list(item.get("ContourSequence") or ())
            for item in dataset.get("ROIContourSequence") or ()
        }
        regions = {
            int(item.ROINumber): item for item in dataset.get("StructureSetROISequence") or ()
        }
        drawn = {n: contours.get(n, []) for n in regions if not _points(contours.get(n, []))}
        names = {n: str(regions[n].get("ROIName") or n) for n in drawn}
        chosen = choose(list(names.values()), wanted, labels, str(path))
        number_of = {name: n for n, name in names.items()}
        for name in chosen:
            _check_frame(regions[number_of[name]], slices[0], where)
        values = lay_over(
            ((labels[name], _mask(drawn[number_of[name]], image, where)) for name in chosen),
            image.values.shape,
            later_wins=bool(wanted),
            where=where,
        )
    return Volume(values, image.affine)


def _check_series(dataset: Any, first: Header, where: str) -> None:
    referenced = {
        str(series.SeriesInstanceUID)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
    }
    if referenced and first.series not in referenced:
        raise ConsiliumError(
            "data.geometry",
            "The contours were drawn on another series.",
            where=where,
            hint="Pair them with the series that they refer to.",
        )


def _check_frame(region: Any, first: Header, where: str) -> None:
    frame = str(region.get("ReferencedFrameOfReferenceUID") or "")
    if frame and first.frame_of_reference and frame != first.frame_of_reference:
        raise ConsiliumError(
            "data.geometry",
            "Image and contours have different frames of reference.",
            where=where,
            hint="The contours were drawn on another examination, or on a registered copy.",
        )


def _points(contours: Sequence[Any]) -> bool:
    """Whether a region is nothing but points: an isocentre or a marker, no region at all."""
    return bool(contours) and all(str(c.ContourGeometricType) == "POINT" for c in contours)


def _mask(contours: Sequence[Any], image: Volume, where: str) -> Array:
    """Return the voxels inside the contours, bool, on the image's grid."""
    from skimage.draw import polygon

    plane = image.values.ndim == 2
    mask = np.zeros((*image.values.shape, 1) if plane else image.values.shape, dtype=bool)
    seen: set[tuple[int, bytes]] = set()
    for contour in contours:
        kind = str(contour.ContourGeometricType)
        if kind == "POINT":
            continue
        if kind not in _CLOSED:
            raise ConsiliumError(
                "data.format",
                "A region is drawn with open lines, which enclose nothing.",
                where=where,
                hint="Close its contours in the program that drew them, or name another region.",
            )
        index = _indices(contour, image)
        if len(index) < 3:
            continue
        number = _slice_of(index[:, 2], image, mask.shape[2], where)
        # The same contour written twice would cancel itself.
        key = number, np.round(index[:, :2], 4).tobytes()
        if key in seen:
            continue
        seen.add(key)
        rows, columns = polygon(index[:, 0], index[:, 1], mask.shape[:2])
        mask[rows, columns, number] ^= True
    return mask[:, :, 0] if plane else mask


def _indices(contour: Any, image: Volume) -> Any:
    """Return a contour's points as fractional indices of the image, (points, 3)."""
    # The bytes as they stand: pydicom would make an object of every one of a million numbers.
    written = contour.get_item("ContourData").value
    numbers = written.strip(b" \0").split(b"\\") if isinstance(written, bytes) else written
    points = np.array([float(number) for number in numbers]).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ValueError("a contour with a point that is not a number")
    to_index = np.linalg.inv(image.affine) @ LPS_TO_RAS
    return points @ to_index[:3, :3].T + to_index[:3, 3]


def _slice_of(depth: Any, image: Volume, count: int, where: str) -> int:
    """Return the slice that a contour lies on."""
    number = int(np.rint(depth.mean()))
    off = float(np.abs(depth - number).max())
    outside = not 0 <= number < count
    if off > _OFF_SLICE or outside:
        axes = image.affine[:3, :3]
        normal = np.cross(axes[:, 0], axes[:, 1])
        step = abs(float(normal @ axes[:, 2])) / float(np.linalg.norm(normal))
        raise ConsiliumError(
            "data.geometry",
            "A contour lies beyond the image's first or last slice."
            if outside
            else f"A contour lies up to {off * step:.3g} mm off the image's slices, which are "
            f"{step:.3g} mm apart.",
            where=where,
            hint="Pair the contours with the series that they were drawn on.",
        )
    return number
