"""NIfTI files to volumes (nibabel), one channel of a 4D file where the reference asks for it."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.volume import (
    MAX_VOXELS,
    Array,
    Volume,
    require_finite,
    volume_asked_for,
)
from consilium_common.errors import ConsiliumError

#: Bytes of a header, NIfTI-2's being the longer.
_HEAD: Final = 540
#: Header and extensions; real ones have some kilobytes.
_MOST_BEFORE: Final = 2**24
#: Eight bytes for each voxel of the largest volume, of all channels together.
_MOST_BYTES: Final = 2**33
#: From so many bytes on, unpacking in one go gains more than a second look at the header costs.
_LARGE: Final = 2**20
#: No gzip stream unpacks to more than 1032 times its size (zlib's technical details).
_GZIP_MOST: Final = 1032


def open_nifti(path: Path) -> Any:
    """Open a NIfTI file within bounds and return nibabel's image; its voxels are not read.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing`` or ``data.too-large``.
    """
    import nibabel

    with reading(path, "NIfTI file"):
        _check_start(path)
        return nibabel.load(path)


def read_nifti(path: Path, channel: int | None = None) -> Volume:
    """Read a NIfTI file with its scaling applied.

    Parameters
    ----------
    path : Path
        ``.nii`` or ``.nii.gz``.
    channel : int, optional
        Index along the fourth axis; needed when that axis is longer than one.

    Returns
    -------
    Volume
        (I, J, K), or (rows, columns) for a file with one slice.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing``, ``data.dimensions``, ``data.too-large``,
        ``data.not-finite`` or ``data.geometry``.
    """
    image = open_nifti(path)
    with reading(path, "NIfTI file"):
        shape = tuple(int(n) for n in image.shape)
        _check_shape(shape, path)
        claimed = int(np.prod(shape, dtype=object)) * int(image.get_data_dtype().itemsize)
        _check_size(claimed, path)
        layer = volume_asked_for(shape[3] if len(shape) > 3 else 1, channel, path)
        end = int(image.dataobj.offset) + claimed
        if path.suffix.lower() == ".gz" and len(shape) < 4 and end > _LARGE:
            # In one go: bit by bit, as nibabel does it, threads would wait for each other.
            image = type(image).from_bytes(_unpacked(path, end))
        data: Any = image.dataobj
        values = np.asarray(data if len(shape) < 4 else data[..., layer])
        affine = np.array(image.affine, dtype=np.float64)
    if values.dtype.kind not in "iubf":
        raise ConsiliumError(
            "data.format",
            "The NIfTI file holds colours or complex numbers, not one value per voxel.",
            where=str(path),
            hint="Convert it to one value per voxel.",
        )
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    require_finite(values, affine, str(path))
    if values.ndim == 2 or values.shape[2] == 1:
        return _plane(values.reshape(values.shape[:2]), affine)
    return Volume(values, affine)


def _unpacked(path: Path, size: int) -> bytes:
    """Return the first ``size`` bytes that a gzip file unpacks to; what follows stays packed."""
    packed, parts, held = path.read_bytes(), [], 0
    while held < size and packed:  # some writers make a file of several members
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        part = unpacker.decompress(packed, size - held)
        # One byte more: where nothing follows, this is when zlib compares the checksum.
        unpacker.decompress(unpacker.unconsumed_tail, 1)
        if not part and not unpacker.eof:
            break
        parts.append(part)
        held += len(part)
        packed = unpacker.unused_data
    if held < size:
        raise EOFError
    return b"".join(parts)


def _plane(values: Array, affine: Any) -> Volume:
    # A plane is (rows, columns): NIfTI's first index runs along a row.
    return Volume(np.ascontiguousarray(values.T), affine[:, [1, 0, 2, 3]])


def _check_start(path: Path) -> None:
    """Check how much stands before the voxels: all of it would be read, or unpacked, at once."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        head = stream.read(_HEAD)
    # Where the voxels start: a float32 at 108 in NIfTI-1 (its header's size, 348, comes first in
    # the file's byte order), an int64 at 168 in NIfTI-2 (540). Else nibabel says what is wrong.
    for order in "<>":
        for size, kind, at in ((348, "f", 108), (540, "q", 168)):
            field = struct.Struct(f"{order}{kind}")
            if head[:4] == struct.pack(f"{order}i", size) and len(head) >= at + field.size:
                (start,) = field.unpack_from(head, at)
                if not 0 <= start <= _MOST_BEFORE:
                    raise _unbelievable("voxels that start beyond any header", path)


def _check_size(claimed: int, path: Path) -> None:
    """Check that the file can hold the bytes of voxels it claims, before memory is taken."""
    packed = path.suffix.lower() == ".gz"
    held = path.stat().st_size * (_GZIP_MOST if packed else 1)
    if claimed > held:
        raise ConsiliumError(
            "data.truncated",
            f"The NIfTI file claims {claimed} bytes of voxels and cannot hold them.",
            where=str(path),
            hint="Copy or export it again from its source.",
        )
    if claimed > _MOST_BYTES:
        raise _unbelievable(f"{claimed} bytes of voxels", path)


def _unbelievable(what: str, path: Path) -> ConsiliumError:
    return ConsiliumError(
        "data.too-large",
        f"The NIfTI header claims {what}.",
        where=str(path),
        hint="If the image is real, crop it; else export it again.",
    )


def _check_shape(shape: tuple[int, ...], path: Path) -> None:
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise ConsiliumError(
            "data.dimensions",
            f"The NIfTI file has {len(shape)} axes; two, three or four are read.",
            where=str(path),
        )
    if np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise ConsiliumError(
            "data.too-large",
            f"The header claims {' × '.join(str(n) for n in shape)} voxels, more than 2^30.",
            where=str(path),
            hint="If the image is real, crop it; else export it again.",
        )
