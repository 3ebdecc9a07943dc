"""A segmentation back out, in the original geometry of its image: NIfTI or DICOM SEG."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.volume import LPS_TO_RAS, Affine, Array, Volume
from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_new

_PRODUCT: Final = "Consilium"
#: Far above a scanner's own series, so that a viewer lists the segmentation last.
_SERIES_NUMBER: Final = 9001
#: Groups behind this one hold pixels; the frames' places (5200) come before.
_LAST_GROUP: Final = 0x5FFF
#: Attributes that DICOM wants present and permits to be empty (type 2); exports often drop them.
_MAY_BE_EMPTY: Final = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)


@dataclass(frozen=True)
class Origin:
    """What drew a segmentation; it stands in the file, for those who will ask.

    Parameters
    ----------
    name : str
        The study's name, up to 63 characters.
    digest : str
        The study's digest.
    """

    name: str
    digest: str


def export_nifti(labels: Array, affine: Affine, path: Path) -> None:
    """Write label values as NIfTI.

    Parameters
    ----------
    labels : array
        uint8, (I, J, K) or (rows, columns), on the grid of the image itself.
    affine : array
        4×4, index to RAS millimetres, of the image itself. A shear (tilted gantry) is kept.
    path : Path
        New ``.nii`` or ``.nii.gz`` file. It holds no text: no name comes along.

    Raises
    ------
    ConsiliumError
        ``usage.output`` for another ending, ``state.exists``, ``state.folder``, ``state.disk``.
    """
    import nibabel

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ConsiliumError(
            "usage.output",
            "A NIfTI file is called .nii or .nii.gz.",
            where=str(path),
            hint="Choose such a name, or --format seg for DICOM SEG (.dcm).",
        )
    values = np.asarray(labels, dtype=np.uint8)
    if values.ndim == 2:  # NIfTI's first index runs along a row
        values, affine = values.T[:, :, np.newaxis], affine[:, [1, 0, 2, 3]]
    image: Any = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)
    image.header.set_xyzt_units("mm")
    content: bytes = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    write_new(path, content)


def export_dicom_seg(
    labels: Array,
    image: Volume,
    slices: Sequence[Header],
    classes: Sequence[str],
    path: Path,
    *,
    origin: Origin,
) -> None:
    """Write label values as a binary DICOM SEG that refers to its source series.

    It carries the source's patient and study, because it belongs into the same archive beside its
    series: it is as confidential as the images.

    Parameters
    ----------
    labels : array
        uint8 class indices on the grid of ``image``; 0 is background.
    image, slices : Volume, sequence of Header
        The source, as :func:`~consilium_client.data.ingest.dicom_series.read_series` gives it.
    classes : sequence of str
        Names of the classes, the background first.
    path : Path
        New file, for example ``.dcm``.
    origin : Origin
        What drew it: named as the algorithm, with the product and its version.

    Raises
    ------
    ConsiliumError
        ``data.format`` where the image is no DICOM series or lacks what a SEG must repeat;
        ``state.exists``, ``state.folder``, ``state.disk``, and as the readers say.
    """
    import highdicom

    if not slices or labels.shape != image.values.shape:
        raise ConsiliumError(
            "data.format",
            "A DICOM SEG needs the DICOM series that it was drawn on.",
            hint="Write NIfTI: --format nifti.",
        )
    deep = labels[:, :, np.newaxis] if labels.ndim == 2 else labels
    # (slice, row, column), as DICOM counts; a plane is (rows, columns) already.
    order = (2, 0, 1) if labels.ndim == 2 else (2, 1, 0)
    frames: Any = np.ascontiguousarray(np.transpose(deep, order), dtype=np.uint8)
    where = str(slices[0].path.parent)
    with reading(where, "DICOM series"), quietly():
        sources = [_source(header.path) for header in slices]
    if slices[0].frames > 1:
        # Frames of one file may stand in any order: the volume's own place decides, not theirs.
        frames = highdicom.Volume(
            frames,
            (LPS_TO_RAS @ image.affine)[:, [2, 1, 0, 3]],
            coordinate_system="PATIENT",
            frame_of_reference_uid=slices[0].frame_of_reference or None,
        )
    stream = io.BytesIO()
    try:
        with quietly():
            made: Any = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=frames,
                segmentation_type="BINARY",
                segment_descriptions=_described(classes, origin),
                series_instance_uid=highdicom.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer=_PRODUCT,
                manufacturer_model_name=_PRODUCT,
                software_versions=__version__,
                device_serial_number=origin.digest[:16],
                omit_empty_frames=bool(labels.any()),
                # What the source wrote in another character set, or in none, is written anew.
                specific_character_set="ISO_IR 192",
                content_label="SEGMENTATION",
                series_description=f"{_PRODUCT}: {origin.name}"[:64],
            )
            made.save_as(stream)
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ConsiliumError(
            "data.format",
            "The DICOM series lacks what a segmentation of it must repeat.",
            where=where,
            hint="Write NIfTI: --format nifti. The original export of the series may have it.",
        ) from error
    write_new(path, stream.getvalue())


def _source(path: Path) -> Any:
    """Read what a segmentation repeats of a source image, without its pixels."""
    dataset = open_dicom(path, last_group=_LAST_GROUP)
    for name in _MAY_BE_EMPTY:
        if name not in dataset:
            setattr(dataset, name, "")
    return dataset


def _described(classes: Sequence[str], origin: Origin) -> list[Any]:
    """Describe the classes: their names, under the general code for tissue.

    A study's class names are free text, and a guessed code would claim more than is known.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"{_PRODUCT}: {origin.name}"[:64],
        family=codes.DCM.ArtificialIntelligence,
        version=f"{__version__}, study {origin.digest[:16]}",
        source=_PRODUCT,
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(classes[1:], start=1)
    ]
