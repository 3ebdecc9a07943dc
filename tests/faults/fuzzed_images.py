"""Images damaged at random, and small files that claim or unpack to gigabytes."""

from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np

#: How far into a file headers reach, more or less: most mutations go there.
_HEADER = 2048
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return ``content`` damaged in one to four ways."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        if not data:
            break
        at = _place(len(data), chance)
        match chance.randrange(7):
            case 0:
                for _ in range(chance.randint(1, 16)):
                    data[_place(len(data), chance)] = chance.randrange(256)
            case 1:
                del data[at:]
            case 2:
                size = chance.choice((1, 2, 4))
                value = chance.choice(_EXTREMES) & (256**size - 1)
                data[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))
            case 3:
                del data[at : at + chance.randint(1, 64)]
            case 4:
                data[at:at] = data[at : at + chance.randint(1, 256)]
            case 5:
                length = min(chance.randint(1, 512), len(data) - at)
                data[at : at + length] = bytes(length)
            case 6:
                start = _place(len(other), chance)
                data[at : at + 256] = other[start : start + 256]
    return bytes(data)


def _place(length: int, chance: random.Random) -> int:
    near = chance.random() < 0.7
    return chance.randrange(min(length, _HEADER) if near else length)


def damaged(seed: Path, other: Path, chance: random.Random) -> bytes:
    """Return the seed's content damaged; of a gzip file half the time what is inside it."""
    content, second = seed.read_bytes(), other.read_bytes()
    if seed.suffix == ".gz" and chance.random() < 0.7:
        return gzip.compress(mutate(gzip.decompress(content), second, chance), 1)
    return mutate(content, second, chance)


def bomb(kind: str, path: Path) -> Path:
    """Write a small file that claims or unpacks to far more than it is."""
    import nibabel

    huge = 1 << 30
    if kind.startswith("nifti"):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.uint8)
        header.set_data_shape((8, 8, 8))
        raw = bytearray(header.binaryblock + bytes(4))
        if kind == "nifti-claims":
            raw[42:48] = np.array([30000, 30000, 30000], dtype="<i2").tobytes()
        with gzip.open(path.with_suffix(".nii.gz"), "wb", 6) as stream:
            stream.write(bytes(raw))
            for _ in range(huge >> 20 if kind == "nifti-unpacks" else 1):
                stream.write(bytes(1 << 20))
        return path.with_suffix(".nii.gz")
    if kind == "nrrd-unpacks":
        text = (
            "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 8 8 8\nencoding: gzip\n"
            "space: left-posterior-superior\nspace origin: (0,0,0)\n"
            "space directions: (1,0,0) (0,1,0) (0,0,1)\n\n"
        )
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        with path.with_suffix(".nrrd").open("wb") as stream:
            stream.write(text.encode())
            for _ in range(huge >> 20):
                stream.write(packer.compress(bytes(1 << 20)))
            stream.write(packer.flush())
        return path.with_suffix(".nrrd")
    return _dicom_bomb(kind, path.with_suffix(".dcm"), huge)


def _dicom_bomb(kind: str, path: Path, huge: int) -> Path:
    import pydicom
    from pydicom.data import get_testdata_file
    from pydicom.encaps import encapsulate
    from pydicom.uid import RLELossless

    dataset: Any = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    if kind == "dicom-rle":
        # One segment that repeats a byte for ever, and a header that wants it.
        dataset.file_meta.TransferSyntaxUID = RLELossless
        dataset.Rows = dataset.Columns = 65535
        segment = np.zeros(16, dtype="<u4")
        segment[:2] = 2, 64
        run = b"\x81\x00" * (1 << 20)
        dataset.PixelData = encapsulate([segment.tobytes() + run])
        dataset["PixelData"].is_undefined_length = True
    elif kind == "dicom-claims":
        dataset.Rows = dataset.Columns = 65535
        dataset.NumberOfFrames = 60000
    elif kind == "dicom-deflated":
        plain: Any = pydicom.dcmread(str(get_testdata_file("image_dfl.dcm")))
        plain.save_as(path)
        content = path.read_bytes()
        start = 132 + 12 + int.from_bytes(content[140:144], "little")
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        inner = zlib.decompress(content[start:], -15)
        # A private element of undefined meaning and enormous length before the pixels.
        with path.open("wb") as stream:
            stream.write(content[:start])
            stream.write(packer.compress(inner))
            for _ in range(huge >> 20):
                stream.write(packer.compress(bytes(1 << 20)))
            stream.write(packer.flush())
        return path
    else:
        raise ValueError(kind)
    dataset.save_as(path)
    return path
