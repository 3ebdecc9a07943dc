"""NIfTI files to volumes (nibabel), one channel of a 4D file where the reference asks for it."""

from __future__ import annotations

import gzip
import io
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
#: NIfTI-1's size of a header, in either order of bytes, and its sign at the end of it.
_SIZE: Final = 348
_SIZE_1: Final = (struct.pack("<i", _SIZE), struct.pack(">i", _SIZE))
_MAGIC_1: Final = b"n+1\0"
#: Where NIfTI-1 says where its voxels start.
_START_AT: Final = 108
#: Files up to this size are read once for header and voxels.
_AT_ONCE: Final = 2**26
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
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            _check_start(stream.read(_HEAD), path)
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
    with reading(path, "NIfTI file"):
        held = _held(path)
        image: Any = open_nifti(path) if held is None else None
        header = image.header if held is None else _header_in(held, path)
        shape = tuple(int(n) for n in header.get_data_shape())
        _check_shape(shape, path)
        claimed = int(np.prod(shape, dtype=object)) * int(header.get_data_dtype().itemsize)
        _check_size(claimed, path)
        layer = volume_asked_for(shape[3] if len(shape) > 3 else 1, channel, path)
        if len(shape) > 3:
            values = np.asarray((image or open_nifti(path)).dataobj[..., layer])
        elif held is not None:
            values = _values(header, held, claimed, path)
        else:
            values = np.asarray(_unpacked(image, claimed, path).dataobj)
        affine = np.array(header.get_best_affine(), dtype=np.float64)
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


def _held(path: Path) -> bytes | None:
    """Return the bytes of a NIfTI-1 file, as they are stored; None for another or a large one."""
    if path.stat().st_size > _AT_ONCE:
        return None
    content = path.read_bytes()
    head = _first(content, _HEAD, path)
    _check_start(head, path)
    ours = head[:4] in _SIZE_1 and head[344:348] == _MAGIC_1
    return content if ours else None


def _header_in(content: bytes, path: Path) -> Any:
    """Return the header of a NIfTI-1 file, with its extensions."""
    from nibabel.nifti1 import Nifti1Image

    head = _first(content, _HEAD, path)
    (start,) = struct.unpack_from("<f" if head[:4] == _SIZE_1[0] else ">f", head, _START_AT)
    before = head if start <= len(head) else _first(content, int(start), path)
    return Nifti1Image.header_class.from_fileobj(io.BytesIO(before))


def _values(header: Any, content: bytes, claimed: int, path: Path) -> Array:
    """Return the voxels of a file that is held, with their scaling applied."""
    from nibabel.arrayproxy import ArrayProxy

    whole = _first(content, int(header.get_data_offset()) + claimed, path)
    return np.asarray(ArrayProxy(io.BytesIO(whole), header))


def _unpacked(image: Any, claimed: int, path: Path) -> Any:
    """Return nibabel's image of a packed file with its voxels unpacked in one go.

    Bit by bit, as nibabel does it, threads would wait for each other.
    """
    if path.suffix.lower() != ".gz":
        return image
    end = int(image.dataobj.offset) + claimed
    return type(image).from_bytes(_first(path.read_bytes(), end, path))


def _first(content: bytes, size: int, path: Path) -> bytes:
    """Return the first ``size`` bytes of a file, unpacked; fewer where it has no more.

    What follows stays packed.
    """
    if path.suffix.lower() != ".gz":
        return content[:size]
    packed, parts, held = content, [], 0
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
    return b"".join(parts)


def _plane(values: Array, affine: Any) -> Volume:
    # A plane is (rows, columns): NIfTI's first index runs along a row.
    return Volume(np.ascontiguousarray(values.T), affine[:, [1, 0, 2, 3]])


def _check_start(head: bytes, path: Path) -> None:
    """Check how much stands before the voxels: all of it would be read, or unpacked, at once."""
    # Where the voxels start: a float32 at 108 in NIfTI-1 (its header's size, 348, comes first in
    # the file's byte order), an int64 at 168 in NIfTI-2 (540). Else nibabel says what is wrong.
    for order in "<>":
        for size, kind, at in ((_SIZE, "f", _START_AT), (540, "q", 168)):
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
