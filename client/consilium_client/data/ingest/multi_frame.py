"""Enhanced multi-frame DICOM to a volume: geometry from its frames, values through highdicom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header, numbers
from consilium_client.data.ingest.pixels import (
    padding_in,
    require_bounded,
    undecodable,
    whole,
    without_padding,
)
from consilium_client.data.ingest.slice_geometry import (
    Plane,
    order_of,
    plane_affine,
    stack_affine,
)
from consilium_client.data.ingest.volume import Array, Volume, require_finite
from consilium_common.errors import ConsiliumError

#: Objects whose geometry and rescale stand in functional groups, even with a single frame.
_ENHANCED: Final = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}"
    for tail in (
        *("2.1", "2.2"),  # CT, and converted from single slices
        *("4.1", "4.3", "4.4"),  # MR, MR in colour, converted
        *("130", "128.1"),  # PET, converted
        *("6.2", "12.1.1", "12.2.1", "13.1.1", "13.1.3", "77.1.5.4"),  # US volume, X-ray, OCT
    )
)


def is_multi_frame(header: Header) -> bool:
    """Whether the file is to be read by :func:`read_multi_frame`."""
    return header.frames > 1 or header.sop_class in _ENHANCED


def read_multi_frame(header: Header) -> Volume:
    """Read an enhanced multi-frame image.

    The frames are ordered, checked and placed by the same rules as the files of a series.

    Returns
    -------
    Volume
        (columns, rows, slices), or (rows, columns) for a single frame, after the rescale of each
        frame; real-world value maps are not applied.

    Raises
    ------
    ConsiliumError
        ``data.multi-frame`` when the frames do not say where they lie or are several phases; else
        as for a series.
    """
    path, where = header.path, str(header.path)
    dataset = open_dicom(path)
    with reading(path, "DICOM image"), quietly():
        require_bounded(dataset, path)
        planes = list(_planes(dataset, header))
        if str(dataset.get("PhotometricInterpretation", "")) != "MONOCHROME2":
            raise ConsiliumError(
                "data.format",
                "The frames are not greyscale with high values bright (MONOCHROME2).",
                where=where,
                hint="Export them as greyscale, or as single images.",
            )
    if len(planes) == 1:
        order, affine = [0], plane_affine(planes[0])
    else:
        order = order_of(planes)
        affine = _one_stack([planes[index] for index in order], where)
    with reading(path, "DICOM image"), quietly():
        values = _values(dataset, order, header)
    if len(order) == 1:
        values, known = values[0], planes[0].pixel_spacing is not None
    else:
        values, known = np.transpose(values, (2, 1, 0)), True
    require_finite(values, affine, where)
    return Volume(whole(values), affine, spacing_known=known)


def _planes(dataset: Any, header: Header) -> Iterator[Plane]:
    """Yield where each frame lies, from its own functional groups or from the shared ones."""
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or ()), None)
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if len(per_frame) != header.frames:
        raise ConsiliumError(
            "data.multi-frame",
            "The frames do not say where they lie: a film, a scan over time, or an old kind of "
            "multi-frame image.",
            where=str(header.path),
            hint="Export the series as single slices or as enhanced multi-frame DICOM.",
        )
    for number, own in enumerate(per_frame, start=1):
        position = _macro(own, shared, "PlanePositionSequence")
        orientation = _macro(own, shared, "PlaneOrientationSequence")
        measures = _macro(own, shared, "PixelMeasuresSequence")
        yield Plane(
            name=f"{header.path} (frame {number})",
            rows=header.rows,
            columns=header.columns,
            position=numbers(position.get("ImagePositionPatient"), 3),
            orientation=numbers(orientation.get("ImageOrientationPatient"), 6),
            pixel_spacing=numbers(measures.get("PixelSpacing"), 2),
            thickness=float(measures.get("SliceThickness") or 0) or None,
        )


def _macro(own: Any, shared: Any, name: str) -> Any:
    for group in (own, shared):
        items = group.get(name) if group is not None else None
        if items:
            return items[0]
    return {}


def _one_stack(ordered: list[Plane], where: str) -> Any:
    try:
        return stack_affine(ordered, where)
    except ConsiliumError as error:
        if error.code != "data.duplicate":
            raise
        raise ConsiliumError(
            "data.multi-frame",
            "Several frames lie at one place: phases, echoes or repeated stacks in one file.",
            where=error.where,
            hint="Export one volume (one phase, one echo) of the series.",
        ) from error


def _values(dataset: Any, order: list[int], header: Header) -> Array:
    """Return the frames in order, (frames, rows, columns), after rescale and without padding."""
    import highdicom

    image = highdicom.Image.from_dataset(dataset, copy=False)

    def frames(*, rescaled: bool, dtype: Any) -> Array:
        return np.asarray(
            image.get_frames(
                order,
                as_indices=True,
                dtype=dtype,
                apply_real_world_transform=False,
                apply_modality_transform=None if rescaled else False,
                apply_presentation_lut=False,
            )
        )

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        values = frames(rescaled=True, dtype=np.float64)
        if dataset.get("PixelPaddingValue") is None:
            return values
        signed = bool(dataset.get("PixelRepresentation"))
        bits = int(dataset.BitsAllocated)
        stored = frames(rescaled=False, dtype=np.dtype(f"{'i' if signed else 'u'}{bits // 8}"))
    except (RuntimeError, NotImplementedError) as error:
        if not syntax.is_compressed:
            raise
        raise undecodable(syntax, header.path) from error
    return without_padding(values, padding_in(stored, dataset))
