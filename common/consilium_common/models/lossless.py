"""Zstandard in pieces, within bounds: what comes from outside may claim to be any size.

Compressed data has room beside its content: other matches, empty blocks, frames to be skipped. A
site's gate therefore compresses anew what it unpacked and compares, see :func:`require_canonical`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

#: Bytes that are packed or unpacked in one go. Both sides of a comparison cut alike.
PIECE: Final = 1024 * 1024
#: Largest window that unpacking holds in memory; level 9 uses half of it.
_MOST_WINDOW: Final = 8 * 1024 * 1024


def deflate(pieces: Iterable[bytes | memoryview], size: int, level: int) -> Iterator[bytes]:
    """Yield ``size`` bytes packed at a level of 1 to 9; equal pieces give equal bytes."""
    from zstandard import ZstdCompressor

    packing = ZstdCompressor(level=level).compressobj(size=size)
    for piece in pieces:
        yield packing.compress(piece)
    yield packing.flush()


def cut(content: bytes) -> Iterator[memoryview]:
    """Yield content in pieces."""
    view = memoryview(content)
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


def cut_file(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces."""
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def inflate(path: Path, size: int) -> Iterator[bytes]:
    """Yield the unpacked content of a file in pieces, or raise.

    Raises
    ------
    ValueError
        It is not Zstandard, damaged, holds more or less than ``size`` bytes, or needs more memory
        than a level from 1 to 9 does. Never more than ``size`` bytes and a piece are unpacked.
    """
    from zstandard import ZstdDecompressor, ZstdError

    unpacking = ZstdDecompressor(max_window_size=_MOST_WINDOW)
    held = 0
    try:
        with path.open("rb") as stream:
            reader = unpacking.stream_reader(stream, read_across_frames=True)
            while piece := reader.read(PIECE):
                held += len(piece)
                if held > size:
                    raise ValueError("it holds more than the study declares")
                yield piece
    except ZstdError as error:
        raise ValueError("it is damaged or not compressed as the study says") from error
    if held != size:
        raise ValueError("it holds less than the study declares")


def require_canonical(packed: Path, unpacked: Path, level: int) -> None:
    """Refuse a packed file that is not, byte for byte, what :func:`deflate` makes of its content.

    Raises
    ------
    ValueError
        It is another one.
    """
    with packed.open("rb") as stream:
        for piece in deflate(cut_file(unpacked), unpacked.stat().st_size, level):
            if stream.read(len(piece)) != piece:
                raise ValueError("it has bytes that packing does not give")
        if stream.read(1):
            raise ValueError("it has bytes after its end")


def most(size: int) -> int:
    """Return the most bytes that ``size`` bytes take when they are packed."""
    # Zstandard's own bound for content that cannot be made smaller, for any cut into pieces.
    return size + (size >> 8) + 1024
