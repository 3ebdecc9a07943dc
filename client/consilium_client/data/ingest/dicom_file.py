"""Opens DICOM files within bounds: no bomb is unpacked, and no header runs on for ever."""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

from consilium_client.data.findings import reading
from consilium_common.errors import ConsiliumError

#: Native pixel data has a length of 32 bits: no honest image file is larger.
_MOST_BYTES: Final = 2**32 + 2**26
#: What a deflated file may unpack to; few are written, and none of them large.
_MOST_INFLATED: Final = 2**28
#: Elements at the top level; a large enhanced image has some hundreds.
_MOST_ELEMENTS: Final = 100_000
#: Transfer syntax of files whose dataset is deflated as a whole.
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_DIRECTORY: Final = "1.2.840.10008.1.3.10"
#: Preamble, prefix and the element (0002,0000), which counts the bytes of the group behind it.
_BEFORE_META: Final = 144
#: Where the file meta information begins.
META_START: Final = 132
#: What it takes at most where files are compared; real ones have some hundred bytes.
_MOST_META: Final = 4096
_META_LENGTH: Final = b"\x02\x00\x00\x00UL\x04\x00"
#: Transfer syntaxes for which there are decoders (PS3.6 table A-1: JPEG to HTJ2K, run lengths).
_DECODED: Final = re.compile(rb"1\.2\.840\.10008\.1\.2\.[4-9]")
_VALUE_TYPES: Final = frozenset({b"UL", b"CS", b"UI", b"DA", b"TM", b"OB", b"SH", b"LO", b"DT"})


def is_dicom(path: Path) -> bool:
    """Whether the file is DICOM by its content; many have no suffix at all.

    Files of old archives begin with the first data element, without preamble and prefix.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    return has_prefix(head) or _begins_bare(head)


def has_prefix(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (132 bytes) has the DICOM prefix."""
    return head[128:132] == b"DICM"


def _begins_bare(head: bytes) -> bool:
    """Whether the bytes are the first data element of a header: small group, known value type."""
    if len(head) < 16:
        return False
    for order in "<>":
        group, element = struct.unpack(f"{order}HH", head[:4])
        if group in (2, 8) and element <= 0x20:
            if head[4:6] in _VALUE_TYPES:
                return True
            (length,) = struct.unpack("<I", head[4:8])
            # Implicit value types are little endian always; first values are short and even.
            return order == "<" and length <= 256 and length % 2 == 0
    return False


def is_compressed(path: Path) -> bool:
    """Whether the file's pixels need a decoder, by its file meta information; False in doubt."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_MOST_META)
    except OSError:  # reading it will say what is wrong
        return False
    end = end_of_meta(head)
    if end is not None and head[end : end + 2] not in (b"", b"\x02\x00"):
        # Wherever it stands, and whatever else is said: in doubt a decoder may be needed.
        return _DECODED.search(head, META_START, end) is not None
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import UID

    try:
        with quietly():
            syntax = UID(str(read_file_meta_info(path).get("TransferSyntaxUID", "")))
            return bool(syntax.is_encapsulated)
    except Exception:  # reading it will say what is wrong
        return False


@contextmanager
def quietly() -> Iterator[None]:
    """Silence pydicom while it converts values: its warnings quote the file's own text."""
    import pydicom

    log = logging.getLogger("pydicom")  # it says every warning a second time
    was, log.disabled = log.disabled, True  # unlike a level, this costs nothing to change
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = was


def open_dicom(path: Path, *, tags: Sequence[str] | None = None, last_group: int = 0xFFFF) -> Any:
    """Parse a DICOM file.

    Parameters
    ----------
    path : Path
        With or without preamble and prefix.
    tags : sequence of str, optional
        Keywords of the elements to keep (default: all). Others are skipped, not read.
    last_group : int
        Where to stop: elements of later groups are not looked at. Per-frame functional groups
        (5200) and pixels (7FE0) are most of a file.

    Returns
    -------
    pydicom.FileDataset
        Its values are converted when asked for: do that inside :func:`quietly`.

    Raises
    ------
    ConsiliumError
        ``data.truncated``, ``data.missing`` or ``data.too-large``.
    """
    return open_header(path, tags=tags, last_group=last_group)[0]


def open_header(
    path: Path, *, tags: Sequence[str] | None, last_group: int, content: bytes | None = None
) -> tuple[Any, bool]:
    """Parse a DICOM file as :func:`open_dicom`, and say whether it goes on behind ``last_group``.

    An image whose file does not go on ends before its pixels.

    Parameters
    ----------
    content : bytes, optional
        The whole file, where it has been read.
    """
    from pydicom.filereader import read_partial

    with reading(path, "DICOM file"), quietly(), _stream(path, content) as stream:
        if content is None and path.stat().st_size > _MOST_BYTES:
            raise _too_large("The file is larger than any DICOM image.", path)
        head = stream.read(_BEFORE_META)
        prefixed = has_prefix(head)
        source: BinaryIO = stream
        if prefixed:
            end = _end_of_meta(head, path)
            meta = stream.read(max(0, end - _BEFORE_META))
            _require_more(stream.read(8), path)
            if DEFLATED.encode() in meta:
                source = _inflated(head + meta, stream, path)
        stream.seek(0)
        stop = Stop(last_group, path)
        dataset = read_partial(
            source,
            stop_when=stop,
            force=not prefixed and is_dicom(path),
            specific_tags=list(numbers_of(tuple(tags))) if tags else None,
        )
    return dataset, stop.stopped


def _stream(path: Path, content: bytes | None) -> BinaryIO:
    return path.open("rb") if content is None else BytesIO(content)


@cache
def numbers_of(keywords: tuple[str, ...]) -> tuple[int, ...]:
    """Return the tags of elements as plain numbers, which compare faster than pydicom's own."""
    from pydicom.tag import Tag

    return tuple(int(Tag(keyword)) for keyword in keywords)


def is_directory(dataset: Any) -> bool:
    """Whether an opened file is a DICOMDIR."""
    return str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) == _DIRECTORY


@dataclass
class Stop:
    """Tells pydicom when to stop: behind a group, or in a header that runs on for ever."""

    last_group: int
    path: Path
    seen: int = 0
    stopped: bool = False

    def __call__(self, tag: Any, _kind: str | None, _length: int) -> bool:
        self.seen += 1
        if self.seen > _MOST_ELEMENTS:
            what = f"The header has more than {_MOST_ELEMENTS} elements."
            raise _too_large(what, self.path)
        self.stopped = bool(tag >> 16 > self.last_group)
        return self.stopped


def _end_of_meta(head: bytes, path: Path) -> int:
    """Return where the file meta information ends, which nearly every file says at its start."""
    if head[132:140] == _META_LENGTH:
        return _BEFORE_META + int.from_bytes(head[140:144], "little")
    from pydicom.filereader import read_file_meta_info

    length = read_file_meta_info(path).get("FileMetaInformationGroupLength")
    return 132 if length is None else _BEFORE_META + int(length)


def end_of_meta(content: bytes) -> int | None:
    """Return where a file's meta information ends, if it says so and is of the usual size."""
    if not has_prefix(content) or content[132:140] != _META_LENGTH:
        return None
    end = _BEFORE_META + int.from_bytes(content[140:144], "little")
    return end if end <= min(_MOST_META, len(content)) else None


def _require_more(following: bytes, path: Path) -> None:
    """Refuse a file that goes on with zeros: a copy that was begun and never filled.

    pydicom would take them for millions of command elements, one by one.
    """
    if following == bytes(8):
        raise ConsiliumError(
            "data.truncated",
            "The DICOM file goes on with zeros behind its first bytes.",
            where=str(path),
            hint="Copy or export it again from its source.",
        )


def _inflated(before: bytes, stream: BinaryIO, path: Path) -> BytesIO:
    """Return the file as if it had been written without deflation (PS3.5 A.5)."""
    stream.seek(len(before))
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    body = unpacker.decompress(stream.read(), _MOST_INFLATED)
    if unpacker.unconsumed_tail:
        raise _too_large("The deflated file unpacks to more than 256 MiB.", path)
    if not unpacker.eof:
        raise zlib.error("the deflated stream ends early")
    # The plain syntax's UID in the deflated one's place, padded to its length.
    plain = DEFLATED.removesuffix(".99").encode()
    return BytesIO(before.replace(DEFLATED.encode(), plain.ljust(len(DEFLATED), b"\0")) + body)


def _too_large(what: str, path: Path) -> ConsiliumError:
    return ConsiliumError(
        "data.too-large",
        what,
        where=str(path),
        hint="Export the image again from its source; take the file out of the folder.",
    )
