"""From what cases.csv says to a volume: a file, a series folder, a SeriesInstanceUID, file#n."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.dicom_headers import (
    Header,
    files_below,
    index_files,
    is_dicom,
    read_header,
)
from consilium_client.data.ingest.dicom_series import read_series
from consilium_client.data.ingest.nifti import read_nifti
from consilium_client.data.ingest.picture import SUFFIXES, read_picture
from consilium_client.data.ingest.segmentation import read_segmentation
from consilium_client.data.ingest.volume import Volume, reoriented, require_same_grid
from consilium_common.errors import ConsiliumError

_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)+")
_CHUNK: Final = 1 << 20

Kind = Literal["nifti", "picture", "dicom"]


@dataclass(frozen=True)
class Source:
    """Files behind one reference of cases.csv."""

    kind: Kind
    files: tuple[Path, ...]
    #: What to call it in an error: the file or the folder.
    where: str
    channel: int | None = None


@dataclass
class Sources:
    """Finds the files behind references; indexes the root's DICOM series when one is first named.

    Parameters
    ----------
    root : Path
        Folder that relative references start from.
    """

    root: Path
    _series: dict[str, list[Path]] | None = field(default=None, repr=False)

    def find(self, reference: str) -> Source:
        """Return the files behind ``reference``, without reading more than a DICOM prefix.

        Raises
        ------
        ConsiliumError
            ``data.missing`` or ``data.format``.
        """
        name, _, number = reference.rpartition("#")
        channel = int(number) if name and number.isdecimal() else None
        path = self.root / (name if channel is not None else reference)
        if path.is_dir():
            files = tuple(p for p in files_below(path) if p.parent == path)
            return Source("dicom", files, str(path))
        if path.is_file():
            return Source(_kind(path), (path,), str(path), channel)
        if _UID.fullmatch(reference):
            found = self._index().get(reference)
            if found:
                return Source("dicom", tuple(found), f"series {reference} in {self.root}")
            raise ConsiliumError(
                "data.missing",
                "No DICOM series with this SeriesInstanceUID is below the root.",
                where=f"{reference} in {self.root}",
                hint="Restore the series, or import the folder again.",
            )
        raise ConsiliumError(
            "data.missing",
            "The file does not exist.",
            where=str(path),
            hint="Correct the path in the case list, or restore the file.",
        )

    def adopt(self, headers: Sequence[Header]) -> None:
        """Take over the headers an importer has read, so that they are not read again."""
        self._series = {}
        for header in headers:
            if header.is_image:
                self._series.setdefault(header.series, []).append(header.path)

    def _index(self) -> Mapping[str, list[Path]]:
        if self._series is None:
            headers, _ = index_files(files_below(self.root))
            self.adopt(headers)
        return self._series or {}


def _kind(path: Path) -> Kind:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if path.suffix.lower() in SUFFIXES:
        return "picture"
    if is_dicom(path) or path.suffix.lower() == ".dcm":
        return "dicom"
    raise ConsiliumError(
        "data.format",
        "The file is none of NIfTI, DICOM, PNG, JPEG, TIFF and BMP.",
        where=str(path),
        hint="Convert it to NIfTI or name the original DICOM.",
    )


def read_image(source: Source) -> tuple[Volume, list[Header]]:
    """Read an image on its own grid, with the DICOM headers of its slices where it has them.

    Raises
    ------
    ConsiliumError
        ``data.*``, one rule per defect; see the readers.
    """
    if source.kind == "nifti":
        return read_nifti(source.files[0], source.channel), []
    if source.kind == "picture":
        return read_picture(source.files[0]), []
    headers, findings = _headers(source)
    if findings:
        first = findings[0]
        raise ConsiliumError(first.code, first.message, where=first.where, hint=first.hint)
    return read_series([header for header in headers if header.is_image], source.where)


def _headers(source: Source) -> tuple[list[Header], list[Finding]]:
    if len(source.files) == 1:
        header = read_header(source.files[0])
        return ([header] if header else []), []
    return index_files(source.files)


def read_label(
    source: Source,
    image: Volume,
    slices: Sequence[Header],
    labels: Mapping[str, int],
    image_where: str,
) -> Volume:
    """Read a mask on the grid of ``image``.

    A mask whose axes only run in another order or direction is turned; any other difference is
    refused.

    Raises
    ------
    ConsiliumError
        ``data.geometry`` naming both files, ``data.format``, or as the readers say.
    """
    where = f"{image_where} and {source.where}"
    if source.kind == "dicom":
        header = read_header(source.files[0]) if len(source.files) == 1 else None
        if header is None or not header.is_segmentation or not slices:
            raise ConsiliumError(
                "data.format",
                "A DICOM label must be one DICOM SEG file, drawn on a DICOM series.",
                where=where,
                hint="Give the mask as DICOM SEG or NIfTI.",
            )
        series = slices[0].series
        if header.referenced_series and series not in header.referenced_series:
            raise ConsiliumError(
                "data.geometry",
                "The segmentation was drawn on another series.",
                where=where,
                hint="Pair it with the series that it refers to.",
            )
        return read_segmentation(source.files[0], image, slices, labels)
    if source.kind == "nifti":
        mask = read_nifti(source.files[0], source.channel)
    else:
        mask = read_picture(source.files[0], mask=True)
    hint = "Resample the mask on the image's grid, or pair it with the image it was drawn on."
    if mask.values.ndim != image.values.ndim:
        raise ConsiliumError(
            "data.geometry",
            f"Image and mask have {image.values.ndim} and {mask.values.ndim} dimensions.",
            where=where,
            hint=hint,
        )
    turned = _turned_to(mask, image)
    if mask.spacing_known and image.spacing_known:
        require_same_grid(image, turned, what="Image and mask", where=where, hint=hint)
    else:
        loose = Volume(turned.values, image.affine)
        require_same_grid(image, loose, what="Image and mask", where=where, hint=hint)
    return Volume(turned.values, image.affine, image.spacing_known)


def _turned_to(mask: Volume, image: Volume) -> Volume:
    """Bring a 3D mask's axes into the order and direction of the image's."""
    same = mask.values.shape == image.values.shape and np.allclose(
        mask.affine, image.affine, atol=1e-3
    )
    if mask.values.ndim != 3 or same:
        return mask
    from nibabel.orientations import aff2axcodes

    axes = "".join(str(code) for code in aff2axcodes(image.affine))
    return reoriented(mask, axes)


def content_digest(source: Source) -> str:
    """Return the SHA-256 over the bytes of the source's files, in sorted order."""
    whole = hashlib.sha256()
    for path in sorted(source.files):
        single = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                single.update(block)
        whole.update(single.digest())
    if source.channel is not None:
        whole.update(f"#{source.channel}".encode())
    return whole.hexdigest()
