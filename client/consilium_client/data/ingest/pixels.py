"""The values of one DICOM image: decoded within bounds, rescaled, padding settled."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.dicom_file import open_dicom, quietly
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.volume import MAX_VOXELS, Array
from consilium_common.errors import ConsiliumError

#: Elements that hold pixels.
PIXELS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
#: What decoding takes of a file.
TAGS: Final = (
    "SOPClassUID",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    *PIXELS,
)
#: Pixels of one frame: four times the largest mammography detectors.
_MOST_FRAME_PIXELS: Final = 2**27
#: Compressed pixels may unpack to this many bytes, or to this many times their own.
_FREE_BYTES: Final = 2**26
_MOST_RATIO: Final = 1000
#: ITU-R 601-2, red, green, blue.
_LUMINANCE: Final = (0.299, 0.587, 0.114)
#: Markers that begin a JPEG or JPEG-LS frame (ITU-T T.81 table B.1, T.87).
_START_OF_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_END_OF_STREAM: Final = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike
_JPEG_2000: Final = b"\xff\x4f\xff\x51"


@dataclass(frozen=True, eq=False)
class Pixels:
    """One image's values, and which of them are padding.

    Parameters
    ----------
    values : array
        (rows, columns), or (slices, rows, columns), after modality rescale.
    padding : array of bool, optional
        Of the same shape; None where there is none.
    """

    values: Array
    padding: Array | None


def read_pixels(header: Header) -> Array:
    """Read one image's values, (rows, columns), after modality rescale and inversion.

    MONOCHROME1 (low values bright) is turned over, so that bright means dense at every site;
    colours become luminance (ITU-R 601-2); padding is settled by :func:`without_padding`.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.format``, ``data.codec`` or ``data.too-large``.
    """
    pixels = decode(header)
    return without_padding(pixels.values, pixels.padding)


def decode(header: Header, opened: Any = None, *, slices: int | None = None) -> Pixels:
    """Read one image as :func:`read_pixels` does, with padding told apart and left as it is.

    Parameters
    ----------
    opened : pydicom.Dataset, optional
        The file, where it has been opened with all of :data:`TAGS`.
    slices : int, optional
        How many slices ``opened`` holds together, each of the header's size.

    Raises
    ------
    ConsiliumError
        As :func:`read_pixels`.
    """
    path = header.path
    shape = (
        (header.rows, header.columns) if slices is None else (slices, header.rows, header.columns)
    )
    dataset = opened if opened is not None else open_dicom(path, tags=TAGS, last_group=0x7FE0)
    with reading(path, "DICOM image"), quietly():
        stored = decoded(dataset, path)
        colours = str(dataset.get("PhotometricInterpretation", ""))
        if colours == "PALETTE COLOR":
            raise ConsiliumError(
                "data.format",
                "The image's values are colours of a palette, not measurements.",
                where=str(path),
                hint="Export it as greyscale.",
            )
        if stored.ndim == len(shape) + 1 and stored.shape[-1] == 3:
            stored = whole(np.rint(stored @ np.array(_LUMINANCE)))
        if stored.shape != shape:
            raise ConsiliumError(
                "data.truncated",
                "The pixels do not have the size that the header says.",
                where=str(path),
            )
        padding = padding_in(stored, dataset)
        if colours == "MONOCHROME1":
            stored = _inverted(stored, int(dataset.BitsStored), int(dataset.PixelRepresentation))
        scaled = _rescaled(stored, dataset)
    return Pixels(whole(scaled), padding)


def stored_frame(path: Path, index: int) -> Array:
    """Return the stored values of one frame, as they are: nothing rescaled, no colour changed.

    Raises
    ------
    ConsiliumError
        As :func:`read_pixels`.
    """
    from pydicom.pixels import pixel_array

    dataset = open_dicom(path, tags=TAGS, last_group=0x7FE0)
    with reading(path, "DICOM image"), quietly():
        require_bounded(dataset, path)
        values: Array = pixel_array(dataset, index=index, raw=True)
    return values


def decoded(dataset: Any, path: Path) -> Array:
    """Return the stored values of all frames, after checking that they can be unpacked safely.

    Raises
    ------
    ConsiliumError
        ``data.codec``, ``data.format``, ``data.too-large`` or ``data.truncated``; whatever else
        a decoder raises is for :func:`~consilium_client.data.findings.reading`.
    """
    from pydicom.pixels import pixel_array

    require_bounded(dataset, path)
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        values: Array = pixel_array(dataset)
    except (RuntimeError, NotImplementedError) as error:
        if not syntax.is_compressed:
            raise
        raise undecodable(syntax, path) from error
    return values


def undecodable(syntax: Any, path: Path) -> ConsiliumError:
    """Return the error for compressed pixels that no decoder here reads."""
    return ConsiliumError(
        "data.codec",
        f"The pixels, compressed as {syntax.name}, cannot be decoded: they are damaged, or of "
        "a variant that no decoder here reads.",
        where=str(path),
        hint="Export the series uncompressed (Explicit VR Little Endian).",
    )


def without_padding(values: Array, padding: Array | None) -> Array:
    """Give padding the smallest measured value, so that it counts as background.

    Scanners fill the corners outside the field of view with values far below air (−2000 in CT),
    which would ruin every statistic. Declared padding (PS3.3 C.7.5.1.1.2) that lies within the
    range of the measured values is left alone: careless headers declare a value that is also
    measured, and the two cannot be told apart.
    """
    if padding is None or padding.all():
        return values
    measured = values[~padding]
    low, high = measured.min(), measured.max()
    outside = padding & ((values < low) | (values > high))
    return np.asarray(np.where(outside, low, values))


def padding_in(stored: Array, dataset: Any) -> Array | None:
    """Return where stored values are padding; None where none is, or none is declared."""
    declared = [
        _as_stored(dataset.get(name), stored.dtype)
        for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ]
    if declared[0] is None:
        return None
    ends = [value for value in declared if value is not None]
    inside = np.asarray((stored >= min(ends)) & (stored <= max(ends)))
    return inside if inside.any() else None


def _as_stored(value: Any, dtype: Any) -> int | None:
    """Return a padding value as the pixels' own type: headers write −2000 as 63536."""
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        value = int.from_bytes(value[:2], "little")
    number = int(value)
    if dtype.kind == "i" and number > np.iinfo(dtype).max:
        number -= 2 ** (8 * dtype.itemsize)
    if dtype.kind == "u" and number < 0:
        number += 2 ** (8 * dtype.itemsize)
    return number


def whole(values: Array) -> Array:
    """Return floats that are all whole numbers as int32, in the machine's byte order.

    Others stay as they are.
    """
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind != "f":
        return values
    with np.errstate(invalid="ignore"):  # what int32 cannot hold differs, and stays a float
        rounded = values.astype(np.int32)
    return rounded if np.array_equal(rounded, values) else values


def _rescaled(stored: Array, dataset: Any) -> Array:
    """Apply the modality rescale or its table (PS3.3 C.11.1)."""
    from pydicom.pixels import apply_modality_lut

    rescale = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if (
        stored.dtype.kind in "iu"
        and all(isinstance(number, float) and number.is_integer() for number in rescale)
        and not dataset.get("ModalityLUTSequence")
    ):
        slope, intercept = (int(number) for number in rescale)
        range_ = np.iinfo(stored.dtype)
        # Whole numbers stay whole: what float64 gives besides, at a quarter of the time.
        if max(range_.max, -range_.min) * abs(slope) + abs(intercept) <= np.iinfo(np.int32).max:
            return np.asarray(stored.astype(np.int32) * np.int32(slope) + np.int32(intercept))
    return np.asarray(apply_modality_lut(stored, dataset))


def _inverted(values: Array, bits: int, signed: int) -> Array:
    # The range of stored values is mirrored in itself: signed from -2^(b-1), unsigned from 0.
    total = -1 if signed else 2**bits - 1
    return np.asarray(total - values.astype(np.int64))


# --- bounds ------------------------------------------------------------------------------------


def require_bounded(dataset: Any, path: Path) -> None:
    """Check, before anything is allocated, that the pixels can be what the header claims.

    Raises
    ------
    ConsiliumError
        ``data.format`` without pixels, ``data.too-large`` or ``data.truncated``.
    """
    from pydicom.encaps import generate_frames

    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    data = _pixel_bytes(dataset)
    if data is None or rows < 1 or columns < 1 or frames < 1:
        raise ConsiliumError(
            "data.format",
            "The DICOM file holds no pixels.",
            where=str(path),
            hint="Name the image series; reports, plans and waveforms are no images.",
        )
    bits = int(dataset.get("BitsAllocated") or 0)
    size = rows * columns * frames * samples * bits // 8
    absurd = rows * columns > _MOST_FRAME_PIXELS or rows * columns * frames > MAX_VOXELS
    _complete_syntax(dataset, path)
    compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if absurd or (compressed and size > max(_FREE_BYTES, _MOST_RATIO * len(data))):
        raise ConsiliumError(
            "data.too-large",
            f"The header claims {frames} frames of {rows} × {columns} pixels, which "
            f"{len(data)} bytes of pixel data cannot be.",
            where=str(path),
            hint="Export the image again from its source.",
        )
    if not compressed:
        return  # pydicom compares the bytes with the claim before it allocates
    for frame in generate_frames(data, number_of_frames=frames):
        stated = _stated_size(frame)
        if stated is not None and stated != (rows, columns, samples):
            raise ConsiliumError(
                "data.truncated",
                f"The header says {rows} × {columns} × {samples}, the compressed pixels say "
                f"{stated[0]} × {stated[1]} × {stated[2]}.",
                where=str(path),
                hint="Copy or export it again from its source.",
            )
        # Decoders fill up what a cut stream lacks, in grey, and say nothing. Writers pad the end.
        if stated is not None and _END_OF_STREAM not in frame[-16:]:
            raise ConsiliumError(
                "data.truncated",
                "The compressed pixels end early.",
                where=str(path),
                hint="Copy or export it again from its source.",
            )


def _pixel_bytes(dataset: Any) -> Any:
    for name in PIXELS:
        if data := dataset.get(name):
            return data
    return None


def _complete_syntax(dataset: Any, path: Path) -> None:
    """Fill in the transfer syntax of a file that does not say it, where there is no doubt."""
    import pydicom

    if dataset.file_meta.get("TransferSyntaxUID"):
        return
    implicit, little = dataset.original_encoding
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise ConsiliumError(
            "data.format",
            "The file does not say how its pixels are compressed.",
            where=str(path),
            hint="Export it again; its file meta information was lost.",
        )
    plain = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else plain


def _stated_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and samples that a compressed frame claims for itself.

    Decoders allocate what the compressed stream says, whatever the DICOM header says. None for
    run lengths, which claim nothing, and for streams whose header is not found: decoders refuse
    those at once.
    """
    start = frame.find(_JPEG_2000, 0, 4096)
    if start >= 0 and len(frame) >= start + 42:
        # ISO 15444-1 A.5.1: Xsiz, Ysiz, XOsiz, YOsiz, then the tiles, then Csiz.
        right, bottom, left, top = struct.unpack(">4I", frame[start + 8 : start + 24])
        (samples,) = struct.unpack(">H", frame[start + 40 : start + 42])
        return bottom - top, right - left, samples
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 10 <= len(frame):
        if frame[position] != 0xFF:
            return None
        marker = frame[position + 1]
        if marker in _START_OF_FRAME:
            rows, columns, samples = struct.unpack(">HHB", frame[position + 5 : position + 10])
            return rows, columns, samples
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        (length,) = struct.unpack(">H", frame[position + 2 : position + 4])
        position += 2 + length
    return None
