"""Text inside NIfTI headers, their extensions and BIDS sidecars; and the header without it."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from consilium_client.data.deid.profile import DIRECT, action_for
from consilium_client.data.findings import reading
from consilium_client.data.identifying import is_dummy, looks_like, mentions
from consilium_common.errors import ConsiliumError

#: Fields of a header that programs fill with text, and people with names.
FIELDS: Final = ("data_type", "db_name", "descrip", "aux_file", "intent_name")
#: Words that imaging programs write there, beside numbers.
_HARMLESS: Final = frozenset(
    word
    for line in (
        "acq afni analyze ants art avg brain c3d cifti converted cropped dcm2niix dim dti dwi echo",
        "fa float flirt fmri freesurfer fsl fslmaths fsleyes gz image imageset itk label labels ls",
        "mag mask matlab mean mhd monai motion mr mri mricron mrtrix ms nibabel nifti nii none",
        "normalized phase python real resampled rigid roi scaled segmentation simpleitk slicer",
        "space spm te ti time tr version volume warped",
    )
    for word in line.split()
)
_WORD: Final = re.compile(r"[^\W\d_]{2,}")
_CHUNK: Final = 1 << 20


def is_nifti(path: Path) -> bool:
    """Whether the file is called a single-file NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def telling_fields(path: Path, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Return what in a NIfTI file and the sidecar beside it may tell who the patient is.

    Parameters
    ----------
    path : Path
        ``.nii`` or ``.nii.gz``.
    pattern : Pattern, optional
        Finds the words of patients known at the site.

    Returns
    -------
    tuple of str
        Names of fields, ``extension 6``, ``PatientName in the sidecar``; never their content.

    Raises
    ------
    ConsiliumError
        ``data.truncated`` or ``data.missing``.
    """
    found: list[str] = []
    with reading(path, "NIfTI file"):
        header, extensions = _read_header(path)
        for field in _fields(header):
            text = bytes(header[field]).partition(b"\0")[0].decode("latin-1").strip()
            if _tells(text, pattern):
                found.append(field)
    found += [f"extension {code}" for code, content in extensions if content.strip(b"\0 \r\n\t")]
    return (*found, *_sidecar(path, pattern))


def _fields(header: Any) -> list[str]:
    """Return the text fields this version of NIfTI has; the second has fewer."""
    return [field for field in FIELDS if field in header.keys()]  # noqa: SIM118


def _tells(text: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether the text holds more than numbers and words of imaging programs."""
    if not text or is_dummy(text):
        return False
    if mentions(text, pattern) or looks_like(text):
        return True
    return not all(word.lower() in _HARMLESS for word in _WORD.findall(text))


def _sidecar(path: Path, pattern: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the keys of ``<name>.json`` beside the image that the DICOM profile would not leave."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    beside = path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) + ".json")
    if not beside.is_file():
        return
    with reading(beside, "sidecar"):
        content = json.loads(beside.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if is_dummy(str(value)):
            continue
        tag = tag_for_keyword(str(key))
        ruled = tag is not None and action_for(tag, dictionary_VR(tag)) not in (None, "enter")
        # Descriptions of a protocol are what a sidecar is for; a name in them is not.
        if key in DIRECT or mentions(str(value), pattern):
            yield f"{key if tag is not None else 'a text'} in the sidecar"
        elif ruled and (looks_like(str(value)) or str(key).endswith(("Date", "DateTime", "UID"))):
            yield f"{key} in the sidecar"


def _read_header(path: Path) -> tuple[Any, list[tuple[int, bytes]]]:
    """Return the header and its extensions as (code, bytes)."""
    with _opened(path) as stream:
        header = _header(stream, path)
        size = int(header["sizeof_hdr"])
        end = max(int(header["vox_offset"]), size)
        flag = stream.read(4)
        extensions: list[tuple[int, bytes]] = []
        place = size + 4
        order = "little" if header.endianness == "<" else "big"
        while flag[:1] not in (b"", b"\0") and place + 8 <= end:
            words = stream.read(8)
            length = int.from_bytes(words[:4], order, signed=True)  # type: ignore[arg-type]
            code = int.from_bytes(words[4:], order, signed=True)  # type: ignore[arg-type]
            if length < 8 or place + length > end:
                extensions.append((code, b"?"))
                break
            extensions.append((code, stream.read(length - 8)))
            place += length
    return header, extensions


def _header(stream: BinaryIO, path: Path) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    start = stream.read(4)
    kind = Nifti2Header if 540 in _both(start) else Nifti1Header
    if not {348, 540} & set(_both(start)):
        raise ConsiliumError(
            "data.format",
            "The file is called NIfTI and has no NIfTI header.",
            where=str(path),
            hint="Convert it again from its source.",
        )
    block = start + stream.read(kind.sizeof_hdr - 4)
    header = kind(block, check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise ConsiliumError(
            "data.format",
            "The NIfTI header lies apart from its image (.hdr and .img).",
            where=str(path),
            hint="Convert the pair to one .nii file.",
        )
    return header


def _both(start: bytes) -> tuple[int, int]:
    return int.from_bytes(start, "little"), int.from_bytes(start, "big")


def _opened(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def write_clean(source: Path, target: BinaryIO) -> None:
    """Write a copy without text and extensions; the voxels' bytes are the same.

    Parameters
    ----------
    target : binary stream
        Receives what the source's suffix says: compressed for ``.nii.gz``.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.format`` or ``data.missing``.
    OSError
        The target cannot be written.
    """
    with reading(source, "NIfTI file"):
        header, _ = _read_header(source)
        old = max(int(header["vox_offset"]), int(header["sizeof_hdr"]) + 4)
    for field in _fields(header):
        header[field] = b""
    # Voxels begin at a multiple of 16 right behind the header and its empty extension flag.
    new = (int(header["sizeof_hdr"]) + 4 + 15) // 16 * 16
    header["vox_offset"] = new
    block = header.binaryblock
    start = block + bytes(new - len(block))
    if not source.name.lower().endswith(".gz"):
        _copy(source, old, start, target)
        return
    # No name and no time of its own in the compressed file.
    with gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0, compresslevel=6) as packed:
        _copy(source, old, start, packed)


def _copy(source: Path, offset: int, start: bytes, target: Any) -> None:
    target.write(start)
    with _opened(source) as stream:
        with reading(source, "NIfTI file"):
            stream.seek(offset)
        while True:
            with reading(source, "NIfTI file"):
                block = stream.read(_CHUNK)
            if not block:
                return
            target.write(block)
