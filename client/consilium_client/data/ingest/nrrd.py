"""NRRD files to volumes: pynrrd reads the header, pixels are read within the header's bounds."""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from consilium_client.data.findings import reading
from consilium_client.data.ingest.named_labels import choose, lay_over
from consilium_client.data.ingest.volume import (
    MAX_VOXELS,
    Affine,
    Array,
    Volume,
    require_finite,
    volume_asked_for,
)
from consilium_common.errors import ConsiliumError

SUFFIXES: Final = (".nrrd", ".nhdr")
#: What 3D Slicer calls a segmentation: its labels carry names.
NAMED_SUFFIXES: Final = (".seg.nrrd", ".seg.nhdr")
_HEADER_BYTES: Final = 1 << 20
#: Deflate cannot pack better than this (zlib's technical notes).
_DEFLATE_RATIO: Final = 1032
#: Signs that bring a space's axes to right, anterior, superior.
_SPACES: Final[Mapping[str, tuple[float, float, float]]] = {
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0),
    "lps": (-1.0, -1.0, 1.0),
}
#: NRRD's many names of types to numpy's.
_TYPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(
        ("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"
    ),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), "i8"),
    **dict.fromkeys(("signed long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files behind an NRRD: itself, and its data file where that is apart.

    Raises
    ------
    ConsiliumError
        ``data.format`` when the data file lies outside the header's folder or is a list of files,
        ``data.missing`` or ``data.truncated``.
    """
    with reading(path, "NRRD file"):
        header, _ = _header(path)
        data = _data_file(header, path)
    return (path,) if data is None else (path, data)


def read_nrrd(path: Path, channel: int | None = None) -> Volume:
    """Read an NRRD image or mask.

    Parameters
    ----------
    path : Path
        ``.nrrd``, or ``.nhdr`` beside its data file; raw or gzip.
    channel : int, optional
        Index along the axis that is none of space; needed when that axis is longer than one.

    Returns
    -------
    Volume
        (I, J, K) in RAS+ millimetres, or (rows, columns) for a file with one slice.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing``, ``data.format``, ``data.dimensions``,
        ``data.too-large``, ``data.not-finite`` or ``data.geometry``.
    """
    with reading(path, "NRRD file"):
        header, offset = _header(path)
        layers, affine = _layers(header, offset, path)
        values = layers[volume_asked_for(layers.shape[0], channel, path)]
    return _volume(values, affine, path)


def read_named_nrrd(path: Path, labels: Mapping[str, int], wanted: str = "") -> Volume:
    """Read a segmentation of 3D Slicer (``.seg.nrrd``) as label values on its own grid.

    Parameters
    ----------
    labels : mapping
        Segment name to the value it gets.
    wanted : str
        Segments that are meant, see :func:`~consilium_client.data.ingest.named_labels.choose`.

    Raises
    ------
    ConsiliumError
        As :func:`read_nrrd`; also ``data.label-unknown``, ``data.label-values``, ``data.overlap``.
    """
    with reading(path, "NRRD file"):
        header, offset = _header(path)
        layers, affine = _layers(header, offset, path)
        segments = _segments(header, layers.shape[0])
        if not segments:
            raise ConsiliumError(
                "data.format",
                "The file is called a segmentation and names no segments.",
                where=str(path),
                hint="Export it again from 3D Slicer, or call it .nrrd to read it as a mask.",
            )
        chosen = choose([name for name, _, _ in segments], wanted, labels, str(path))
        _check_described(layers, segments, path)
        place = {name: (layer, value) for name, layer, value in segments}
        values = lay_over(
            ((labels[name], layers[place[name][0]] == place[name][1]) for name in chosen),
            layers.shape[1:],
            later_wins=bool(wanted),
            where=str(path),
        )
    return _volume(values, affine, path)


def segment_names(path: Path) -> tuple[str, ...]:
    """Return the names of a ``.seg.nrrd``'s segments from its header alone.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` or ``data.missing``.
    """
    with reading(path, "NRRD file"):
        header, _ = _header(path)
        return tuple(name for name, _ in _named(header))


def _named(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each segment's name and how its fields begin, in the file's order."""
    found: list[tuple[str, str]] = []
    while any(f"Segment{len(found)}_{field}" in header for field in ("ID", "Name")):
        prefix = f"Segment{len(found)}"
        name = header.get(f"{prefix}_Name") or header.get(f"{prefix}_ID") or prefix
        found.append((str(name), prefix))
    return found


def _segments(header: Mapping[str, Any], layers: int) -> list[tuple[str, int, int]]:
    """Return (name, layer, value) of each segment, in the file's order."""
    found = []
    for number, (name, prefix) in enumerate(_named(header)):
        # Before Slicer 4.11 each segment had a layer of its own, and the value 1.
        layer = int(header.get(f"{prefix}_Layer", number if layers > 1 else 0))
        value = int(header.get(f"{prefix}_LabelValue", 1))
        if not 0 <= layer < layers:
            raise ValueError("a segment on a layer that the file does not have")
        found.append((name, layer, value))
    return found


def _check_described(layers: Array, segments: list[tuple[str, int, int]], path: Path) -> None:
    for number, layer in enumerate(layers):
        described = [0, *(value for _, at, value in segments if at == number)]
        if not np.isin(layer, described).all():
            raise ConsiliumError(
                "data.label-values",
                "The segmentation holds a value that none of its segments has.",
                where=str(path),
                hint="Export it again from the program that drew it.",
            )


def _volume(values: Array, affine: Affine, path: Path) -> Volume:
    require_finite(values, affine, str(path))
    if values.shape[2] == 1:
        # A plane is (rows, columns): the file's first index runs along a row.
        return Volume(np.ascontiguousarray(values[:, :, 0].T), affine[:, [1, 0, 2, 3]])
    return Volume(values, affine)


# --- header ------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """Return the parsed header and how many bytes it takes."""
    import nrrd

    with path.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
    lines: list[str] = []
    size = 0
    for line in io.BytesIO(start):
        size += len(line)
        lines.append(line.decode("utf-8", "replace"))
        if not line.strip():
            break
    else:
        if path.suffix.lower() != ".nhdr" or len(start) == _HEADER_BYTES:
            raise ValueError("a header without an end")
    return dict(nrrd.read_header(lines)), size


def _data_file(header: Mapping[str, Any], path: Path) -> Path | None:
    name = header.get("data file", header.get("datafile"))
    if name is None:
        return None
    data = path.parent / str(name)
    folder = path.parent.resolve()
    if (" " in str(name) and not data.is_file()) or str(name).upper().startswith("LIST"):
        problem = "The NRRD header names several data files."
        hint = "Save the image as one .nrrd file."
    elif not data.resolve().is_relative_to(folder):
        problem = "The NRRD header names a data file outside its own folder."
        hint = "Put the data file beside the header, or save the image as one .nrrd file."
    else:
        if not data.is_file():
            raise ConsiliumError(
                "data.missing",
                "The data file that the NRRD header names does not exist.",
                where=str(path),
                hint="Put the data file beside the header, under the name that the header says.",
            )
        return data
    raise ConsiliumError("data.format", problem, where=str(path), hint=hint)


def _layers(header: Mapping[str, Any], offset: int, path: Path) -> tuple[Array, Affine]:
    """Return the values as (layers, I, J, K) and the affine of I, J, K in RAS+ millimetres."""
    sizes = tuple(int(n) for n in header["sizes"])
    if len(sizes) != int(header["dimension"]) or len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ConsiliumError(
            "data.dimensions",
            f"The NRRD file has {len(sizes)} axes; three or four are read.",
            where=str(path),
            hint="Save one volume as .nrrd; give pictures as PNG or TIFF.",
        )
    voxels = 1
    for size in sizes:
        voxels *= size
    if voxels > MAX_VOXELS:
        raise ConsiliumError(
            "data.too-large",
            f"The header claims {' × '.join(str(n) for n in sizes)} voxels, more than 2^30.",
            where=str(path),
            hint="If the image is real, crop it; else export it again.",
        )
    affine, spatial = _affine(header, len(sizes), path)
    values = _values(header, offset, path, sizes, voxels)
    others = [axis for axis in range(len(sizes)) if axis not in spatial]
    values = np.transpose(values, (*others, *spatial))
    return (values if others else values[np.newaxis]), affine


def _affine(header: Mapping[str, Any], axes: int, path: Path) -> tuple[Affine, list[int]]:
    """Return the affine in RAS+ millimetres and which axes are those of space."""
    space = str(header.get("space", "")).strip().lower()
    directions, origin = header.get("space directions"), header.get("space origin")
    if space not in _SPACES or directions is None or origin is None:
        raise ConsiliumError(
            "data.geometry",
            "The NRRD file does not say where its voxels lie in the patient.",
            where=str(path),
            hint="It needs the fields space (left-posterior-superior or its like), space "
            "directions and space origin: export it again from 3D Slicer.",
        )
    units = [str(unit).strip().strip('"') for unit in header.get("space units") or ()]
    if any(unit not in ("mm", "") for unit in units):
        raise ConsiliumError(
            "data.geometry",
            "The NRRD file's sizes are not in millimetres.",
            where=str(path),
            hint="Export it again with millimetres as unit.",
        )
    rows = [
        np.full(3, np.nan) if row is None else np.asarray(row, dtype=np.float64)
        for row in directions
    ]
    spatial = [axis for axis, row in enumerate(rows) if np.isfinite(row).all()]
    if len(rows) != axes or len(spatial) != 3:
        raise ConsiliumError(
            "data.dimensions",
            f"{len(spatial)} of the NRRD file's {axes} axes are axes of space; three must be.",
            where=str(path),
            hint="Save one volume as .nrrd.",
        )
    affine = np.eye(4)
    signs = np.array(_SPACES[space])
    for column, axis in enumerate(spatial):
        affine[:3, column] = signs * rows[axis]
    affine[:3, 3] = signs * np.asarray(origin, dtype=np.float64)
    return affine, spatial


# --- values ------------------------------------------------------------------------------------


def _values(
    header: Mapping[str, Any], offset: int, path: Path, sizes: tuple[int, ...], voxels: int
) -> Array:
    kind = _TYPES.get(str(header["type"]).strip().lower())
    encoding = str(header["encoding"]).strip().lower()
    skipped = header.get("line skip", header.get("lineskip", 0))
    if kind is None or encoding not in ("raw", "gzip", "gz") or int(skipped) != 0:
        raise ConsiliumError(
            "data.format",
            "The NRRD file's values are stored in a way that is not read here.",
            where=str(path),
            hint="Save it with numbers as raw or gzip, as 3D Slicer and ITK do.",
        )
    dtype = np.dtype(kind).newbyteorder(">" if header.get("endian") == "big" else "<")
    wanted = voxels * dtype.itemsize
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    data = _data_file(header, path)
    packed = encoding != "raw"
    with (data or path).open("rb") as stream:
        stored = stream.seek(0, io.SEEK_END) - (0 if data else offset)
        # Nothing is allocated for a claim that the file cannot hold.
        if wanted > stored * (_DEFLATE_RATIO if packed else 1):
            raise EOFError("fewer values than the header says")
        stream.seek(0 if data else offset)
        if packed:
            with gzip.open(stream, "rb") as unpacked:
                content = _exactly(unpacked, wanted, skip)
        else:
            if skip == -1:
                stream.seek(-wanted, io.SEEK_END)
            content = _exactly(stream, wanted, max(skip, 0))
    values = np.frombuffer(content, dtype).reshape(sizes, order="F")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _exactly(stream: BinaryIO | gzip.GzipFile, size: int, skip: int) -> bytes:
    if skip < 0:
        raise ValueError("a byte skip that is no count")
    stream.seek(skip, io.SEEK_CUR)
    content = stream.read(size)
    if len(content) != size or stream.read(1):
        raise EOFError("more or fewer values than the header says")
    return content
