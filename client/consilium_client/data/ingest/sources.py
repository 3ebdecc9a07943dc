"""From what cases.csv says to a volume: a file, a series folder, a series' UID, or file#part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from consilium_client.data.ingest.dicom_headers import (
    Header,
    files_below,
    files_in,
    index_files,
    is_dicom,
    read_header,
)
from consilium_client.data.ingest.dicom_series import read_series
from consilium_client.data.ingest.nifti import read_nifti
from consilium_client.data.ingest.nrrd import (
    NAMED_SUFFIXES,
    files_of,
    read_named_nrrd,
    read_nrrd,
)
from consilium_client.data.ingest.nrrd import SUFFIXES as NRRD_SUFFIXES
from consilium_client.data.ingest.picture import SUFFIXES, read_picture
from consilium_client.data.ingest.rtstruct import MODALITY as RTSTRUCT
from consilium_client.data.ingest.rtstruct import read_structures
from consilium_client.data.ingest.segmentation import read_segmentation
from consilium_client.data.ingest.slices import open_slices
from consilium_client.data.ingest.volume import Volume, axes_of, reoriented, require_same_grid
from consilium_common.errors import ConsiliumError

_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)+")
_CHUNK: Final = 1 << 20

Kind = Literal["nifti", "picture", "dicom", "nrrd"]


@dataclass(frozen=True)
class Source:
    """Files behind one reference of cases.csv."""

    kind: Kind
    files: tuple[Path, ...]
    #: What to call it in an error: the file or the folder.
    where: str
    #: ``file#n``: the volume of a four-dimensional NIfTI or NRRD file.
    channel: int | None = None
    #: ``file#name``: the segment or region that is meant, or several; empty means all.
    segment: str = ""

    @property
    def named(self) -> bool:
        """Whether its labels carry names of their own: DICOM SEG, RTSTRUCT, ``.seg.nrrd``."""
        return self.kind == "dicom" or self.files[0].name.lower().endswith(NAMED_SUFFIXES)


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
        """Return the files behind ``reference``, without reading more than a header.

        Behind a file's name may stand ``#n``, a volume of a four-dimensional NIfTI or NRRD file,
        or ``#name``, a segment of a DICOM SEG or ``.seg.nrrd`` or a region of an RTSTRUCT. Several
        names are separated by ``|``; where they overlap the later one counts.

        Raises
        ------
        ConsiliumError
            ``data.missing``, ``data.format`` or ``data.truncated``.
        """
        path, part = self._parted(reference)
        if _is_there(path):
            if path.is_file():
                return _source(path, part)
            files = tuple(files_in(path))
            return Source("dicom", files, str(path))
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

    def _parted(self, reference: str) -> tuple[Path, str]:
        """Split a reference at the # behind its file; a file's own name may have one too."""
        ends = [place for place, sign in enumerate(reference) if sign == "#"]
        for place in [len(reference), *ends]:
            path = self.root / reference[:place]
            if _is_there(path):
                return path, reference[place + 1 :].strip()
        return self.root / reference, ""

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


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder; a name that is too long for any is none."""
    try:
        return path.exists()
    except OSError:
        return False


def _source(path: Path, part: str) -> Source:
    kind = _kind(path)
    files = files_of(path) if kind == "nrrd" else (path,)
    plain = Source(kind, files, str(path))
    if not part:
        return plain
    if plain.named:
        return Source(kind, files, str(path), segment=part)
    if kind in ("nifti", "nrrd") and part.isdecimal():
        return Source(kind, files, str(path), channel=int(part))
    raise ConsiliumError(
        "data.format",
        "What stands behind # in the case list is not a part that this kind of file has.",
        where=str(path),
        hint="#n names a volume of a four-dimensional NIfTI or NRRD file, #name a segment of a "
        "DICOM SEG, an RTSTRUCT or a .seg.nrrd file.",
    )


def _kind(path: Path) -> Kind:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith(NRRD_SUFFIXES):
        return "nrrd"
    if path.suffix.lower() in SUFFIXES:
        return "picture"
    if is_dicom(path) or path.suffix.lower() == ".dcm":
        return "dicom"
    raise ConsiliumError(
        "data.format",
        "The file is none of NIfTI, DICOM, NRRD, PNG, JPEG, TIFF and BMP.",
        where=str(path),
        hint="Convert it to NIfTI or name the original DICOM.",
    )


def read_image(
    source: Source, digests: dict[Path, bytes] | None = None
) -> tuple[Volume, list[Header]]:
    """Read an image on its own grid, with the DICOM headers of its slices where it has them.

    Parameters
    ----------
    digests : dict, optional
        Takes the SHA-256 of files whose bytes were all read on the way, for
        :func:`content_digest`.

    Raises
    ------
    ConsiliumError
        ``data.*``, one rule per defect; see the readers.
    """
    if source.kind == "nifti":
        return read_nifti(source.files[0], source.channel), []
    if source.kind == "nrrd":
        return read_nrrd(source.files[0], source.channel), []
    if source.kind == "picture":
        return read_picture(source.files[0]), []
    if len(source.files) == 1:  # it may be large: its pixels are opened after its header is good
        header = read_header(source.files[0])
        return read_series([header] if header and header.is_image else [], source.where)
    series = open_slices(source.files)
    if series.findings:
        first = series.findings[0]
        raise ConsiliumError(first.code, first.message, where=first.where, hint=first.hint)
    if digests is not None:
        digests.update(series.digests)
    images = [header for header in series.headers if header.is_image]
    return read_series(images, source.where, series.slices)


def read_label(
    source: Source,
    image: Volume,
    slices: Sequence[Header],
    labels: Mapping[str, int],
    image_where: str,
) -> Volume:
    """Read a mask on the grid of ``image``.

    A mask whose axes only run in another order or direction is turned; a ``.seg.nrrd`` that covers
    a part of the image's grid is background elsewhere. Any other difference is refused.

    Parameters
    ----------
    source : Source
        The label.
    image, slices : Volume, sequence of Header
        As :func:`read_image` gives them.
    labels : mapping
        Names of segments and regions to their values; for labels that are :attr:`Source.named`.
    image_where : str
        What to call the image in an error.

    Raises
    ------
    ConsiliumError
        ``data.geometry`` naming both files, ``data.format``, or as the readers say.
    """
    where = f"{image_where} and {source.where}"
    if source.kind == "dicom":
        return _read_drawn(source, image, slices, labels, where)
    if source.kind == "nifti":
        mask = read_nifti(source.files[0], source.channel)
    elif source.named:
        mask = read_named_nrrd(source.files[0], labels, source.segment)
    elif source.kind == "nrrd":
        mask = read_nrrd(source.files[0], source.channel)
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
    if source.named:
        turned = _laid_on(turned, image)
    if mask.spacing_known and image.spacing_known:
        require_same_grid(image, turned, what="Image and mask", where=where, hint=hint)
    else:
        loose = Volume(turned.values, image.affine)
        require_same_grid(image, loose, what="Image and mask", where=where, hint=hint)
    return Volume(turned.values, image.affine, image.spacing_known)


def _read_drawn(
    source: Source, image: Volume, slices: Sequence[Header], labels: Mapping[str, int], where: str
) -> Volume:
    """Read a DICOM SEG or RTSTRUCT, which only lie where their series says."""
    header = read_header(source.files[0]) if len(source.files) == 1 else None
    contours = header is not None and header.modality == RTSTRUCT
    if header is None or not (header.is_segmentation or contours) or not slices:
        raise ConsiliumError(
            "data.format",
            "A DICOM label must be one DICOM SEG or RTSTRUCT file, drawn on a DICOM series.",
            where=where,
            hint="Give the mask as DICOM SEG, RTSTRUCT, NIfTI or NRRD.",
        )
    if contours:
        return read_structures(source.files[0], image, slices, labels, source.segment)
    if header.referenced_series and slices[0].series not in header.referenced_series:
        raise ConsiliumError(
            "data.geometry",
            "The segmentation was drawn on another series.",
            where=where,
            hint="Pair it with the series that it refers to.",
        )
    return read_segmentation(source.files[0], image, slices, labels, source.segment)


def _turned_to(mask: Volume, image: Volume) -> Volume:
    """Bring a 3D mask's axes into the order and direction of the image's."""
    same = mask.values.shape == image.values.shape and np.allclose(
        mask.affine, image.affine, atol=1e-3
    )
    if mask.values.ndim != 3 or same:
        return mask
    return reoriented(mask, axes_of(image.affine))


def _laid_on(mask: Volume, image: Volume) -> Volume:
    """Pad or crop a segmentation to the image's grid: 3D Slicer may store the drawn part alone.

    A mask that is not shifted by whole voxels, or lies elsewhere, stays as it is for the check
    that follows.
    """
    if mask.values.ndim != 3 or mask.values.shape == image.values.shape:
        return mask
    change = np.linalg.inv(image.affine) @ mask.affine
    shift = np.rint(change[:3, 3]).astype(int)
    exact = np.eye(4)
    exact[:3, 3] = shift
    # A hundredth of a voxel, over the whole extent.
    if np.abs((change - exact) @ [*mask.values.shape, 1]).max() > 0.01:
        return mask
    laid = np.zeros(image.values.shape, dtype=mask.values.dtype)
    low = np.maximum(shift, 0)
    high = np.minimum(shift + mask.values.shape, laid.shape)
    if (high <= low).any():
        return mask  # beside the image altogether
    into = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    out = tuple(slice(a, b) for a, b in zip(low - shift, high - shift, strict=True))
    laid[into] = mask.values[out]
    return Volume(laid, image.affine)


def content_digest(source: Source, known: Mapping[Path, bytes] | None = None) -> str:
    """Return the SHA-256 over the SHA-256 of each of the source's files, in sorted order.

    ``known`` has the digests of files that need not be read again.
    """
    whole = hashlib.sha256()
    for path in sorted(source.files):
        whole.update((known or {}).get(path) or _file_digest(path))
    if source.channel is not None or source.segment:
        part = source.segment if source.channel is None else source.channel
        whole.update(f"#{part}".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> bytes:
    single = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            single.update(block)
    return single.digest()
