"""The files of one series say nearly all the same: each is read once, and what is alike together.

A file that repeats the one before, but for its instance, its position and its pixels, is compared
byte by byte and not converted again; uncompressed slices of one description are decoded as the
frames of one image. What comes out is the same as file by file, and wherever anything differs or
is wrong, it is done file by file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest import dicom_headers, pixels
from consilium_client.data.ingest.dicom_file import (
    META_START,
    Stop,
    end_of_meta,
    numbers_of,
    open_header,
    quietly,
)
from consilium_client.data.ingest.dicom_headers import Header, header_of, index_one, numbers
from consilium_client.data.ingest.pixels import PIXELS, Pixels, decode
from consilium_common.errors import ConsiliumError

#: Files up to this size are read at once; larger ones element by element.
_AT_ONCE: Final = 2**26
#: Pixels decoded together: their float64 values take 32 MiB.
_TOGETHER: Final = 2**22
_LAST_GROUP: Final = 0x7FE0
_PIXEL_DATA: Final = 0x7FE00010
_TAGS: Final = tuple(dict.fromkeys((*dicom_headers.TAGS, *pixels.TAGS)))
#: What the slices of a series differ in.
_INSTANCE: Final = 0x00080018
_POSITION: Final = 0x00200032
_META_OWN: Final = frozenset({0x00020000, 0x00020003})  # length of the group, instance

#: An element as it is stored, equal where it says the same in the same way.
_Form = tuple[str | None, bytes | None, bool, bool]


@dataclass(frozen=True, eq=False)
class OpenedSlice:
    """One file.

    Parameters
    ----------
    dataset : pydicom.Dataset
        Its elements, or those of a file that differs in instance, position and pixels alone.
    pixels : pydicom.dataelem.RawDataElement, optional
        Its own pixels, as they are stored; None where they are those of ``dataset``.
    """

    dataset: Any
    pixels: Any = None

    @property
    def whole(self) -> Any:
        """Its elements with its own pixels."""
        return self.dataset if self.pixels is None else _with_pixels(self.dataset, self.pixels)


@dataclass
class OpenedSeries:
    """The files of a series.

    Parameters
    ----------
    headers, findings : list
        As :func:`~consilium_client.data.ingest.dicom_headers.index_files` gives them.
    slices : dict
        By file, with the pixels as they are stored; emptied by :func:`decode_slices`.
    digests : dict
        SHA-256 of the files that were read at once.
    """

    headers: list[Header] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    slices: dict[Path, OpenedSlice] = field(default_factory=dict)
    digests: dict[Path, bytes] = field(default_factory=dict)


def open_slices(paths: Sequence[Path]) -> OpenedSeries:
    """Open all files of a series once, header and pixels together."""
    series = OpenedSeries()
    before: _Before | None = None
    for path in paths:
        content = _content(path)
        if content is not None:
            series.digests[path] = hashlib.sha256(content).digest()
        alike = before.alike(path, content) if before is not None and content else None
        if alike is not None:
            header, series.slices[path] = alike
            series.headers.append(header)
            continue
        entry = index_one(path, partial(_open, series, content=content), content)
        before = None
        if isinstance(entry, Header):
            series.headers.append(entry)
            before = _Before.of(entry, series.slices[path], content)
        elif entry is not None:
            series.findings.append(entry)
    return series


def decode_slices(ordered: Sequence[Header], slices: dict[Path, OpenedSlice]) -> Iterator[Pixels]:
    """Yield the pixels of slices of one size, in order, several at a time: (slices, rows, columns).

    Parameters
    ----------
    slices : dict
        The files that are open; it is emptied, so that stored pixels are let go once they are
        decoded. Others are opened here.

    Raises
    ------
    ConsiliumError
        As :func:`~consilium_client.data.ingest.pixels.read_pixels`.
    """
    run: list[tuple[Header, OpenedSlice]] = []
    for header in ordered:
        opened = slices.pop(header.path, None)
        joins = (
            opened is not None
            and run
            and run[0][1].dataset is opened.dataset
            and (len(run) + 1) * header.rows * header.columns <= _TOGETHER
        )
        if not joins:
            yield from _decoded(run)
            run = []
        if opened is None:
            yield _single(decode(header))
        else:
            run.append((header, opened))
    yield from _decoded(run)


def _content(path: Path) -> bytes | None:
    """Return a file's bytes; None where it is too large for that, or cannot be read."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_AT_ONCE + 1)
    except OSError:
        return None  # opening it again will say what is wrong
    return content if len(content) <= _AT_ONCE else None


def _open(series: OpenedSeries, path: Path, *, content: bytes | None) -> Header | None:
    """Open a file by itself."""
    dataset, _ = open_header(path, tags=_TAGS, last_group=_LAST_GROUP, content=content)
    goes_on = any(number in dataset for number in numbers_of(PIXELS))
    header = header_of(dataset, path, goes_on=goes_on)
    if header is not None:
        series.slices[path] = OpenedSlice(dataset)
    return header


@dataclass(frozen=True, eq=False)
class _Before:
    """A file that the next ones may repeat."""

    header: Header
    dataset: Any
    meta: Mapping[int, _Form]
    stored: Mapping[int, _Form]

    @classmethod
    def of(cls, header: Header, opened: OpenedSlice, content: bytes | None) -> _Before | None:
        """Return what the next files are compared with; None where that cannot be told."""
        dataset = opened.dataset
        found = None if content is None else _scanned(header.path, content, dataset)
        if found is None:
            return None
        meta, stored, own = found
        # The scan must have seen what pydicom has made of the file: it may know better.
        seen = _PIXEL_DATA in own and own[_PIXEL_DATA].value == _stored_pixels(opened)
        if not seen or {*stored, *own} != {int(one.tag) for one in dataset.values()}:
            return None
        return cls(header, dataset, meta, stored)

    def alike(self, path: Path, content: bytes) -> tuple[Header, OpenedSlice] | None:
        """Return a file that repeats this one; None where it differs, or in doubt."""
        from pydicom.dataelem import convert_raw_data_element

        found = _scanned(path, content, self.dataset)
        if found is None:
            return None
        meta, stored, own = found
        if meta != self.meta or stored != self.stored or not {_INSTANCE, _PIXEL_DATA} <= own.keys():
            return None
        said = {}
        with suppress(Exception), quietly():  # opened by itself, it will say what is wrong
            for tag in own.keys() - {_PIXEL_DATA}:
                said[tag] = convert_raw_data_element(own[tag]).value
            header = replace(
                self.header,
                path=path,
                sop_instance=str(said[_INSTANCE] or ""),
                position=numbers(said.get(_POSITION), 3),
            )
            if header.sop_instance:
                return header, OpenedSlice(self.dataset, own[_PIXEL_DATA])
        return None


def _scanned(
    path: Path, content: bytes, like: Any
) -> tuple[dict[int, _Form], dict[int, _Form], dict[int, Any]] | None:
    """Return a file's meta information, its elements, and those that are its own, by tag.

    They are read as the file ``like`` was encoded, and not converted. None where there is more
    than elements of a stated length, or none of that.
    """
    from pydicom.filereader import data_element_generator

    end = end_of_meta(content)
    if end is None:
        return None
    stored: dict[int, _Form] = {}
    own: dict[int, Any] = {}
    with suppress(Exception), quietly():  # opened by itself, it will say what is wrong
        elements = data_element_generator(BytesIO(content[META_START:end]), False, True)
        meta = {tag: _form(e) for e in elements if (tag := int(e.tag)) not in _META_OWN}
        with BytesIO(content) as stream:
            stream.seek(end)
            for element in data_element_generator(
                stream,
                *like.original_encoding,
                stop_when=Stop(_LAST_GROUP, path),
                specific_tags=list(numbers_of(_TAGS)),
            ):
                tag = int(element.tag)
                if tag in (_INSTANCE, _POSITION, _PIXEL_DATA) and element.is_raw:
                    own[tag] = element
                else:
                    stored[tag] = _form(element)
        return meta, stored, own
    return None


def _form(element: Any) -> _Form:
    """Return an element as it is stored; a sequence that was parsed at once is refused."""
    return element.VR, element.value, element.is_implicit_VR, element.is_little_endian


def _stored_pixels(opened: OpenedSlice) -> Any:
    element = opened.pixels
    if element is None and _PIXEL_DATA in opened.dataset:
        element = opened.dataset.get_item(_PIXEL_DATA)
    return None if element is None else element.value


def _decoded(run: Sequence[tuple[Header, OpenedSlice]]) -> Iterator[Pixels]:
    """Yield the pixels of files that repeat each other: in one piece, or of each by itself."""
    joined = _joined([opened for _, opened in run]) if len(run) > 1 else None
    if joined is not None:
        with suppress(ConsiliumError):  # one by one, to say which file it is
            pixels = decode(run[0][0], joined, slices=len(run))
            yield pixels
            return
    for header, opened in run:
        yield _single(decode(header, opened.whole))


def _single(image: Pixels) -> Pixels:
    return Pixels(image.values[None], None if image.padding is None else image.padding[None])


def _joined(slices: Sequence[OpenedSlice]) -> Any:
    """Return uncompressed images of one description as one image of so many frames.

    None where one does not hold exactly the bytes that its description asks for, or where they
    are not plain: one grey value after another.
    """
    from pydicom.dataelem import DataElement

    like = slices[0].dataset
    with quietly():
        try:
            bits = int(like.Rows) * int(like.Columns) * int(like.BitsAllocated)
            plain = int(like.SamplesPerPixel) == 1 and int(like.get("NumberOfFrames") or 1) == 1
            compressed = like.file_meta.TransferSyntaxUID.is_encapsulated
            kind = like[_PIXEL_DATA].VR
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        data = [_stored_pixels(one) for one in slices]
        if compressed or not plain or any(8 * len(part or b"") != bits for part in data):
            return None
        joined = _with_pixels(like, DataElement(_PIXEL_DATA, kind, b"".join(data)))
        joined.NumberOfFrames = len(slices)
    return joined


def _with_pixels(dataset: Any, element: Any) -> Any:
    """Return a dataset of the same elements with other pixels."""
    from pydicom.dataset import Dataset

    image = Dataset({one.tag: one for one in dataset.values()})
    image[_PIXEL_DATA] = element
    image.file_meta = dataset.file_meta
    image.set_original_encoding(*dataset.original_encoding, dataset.original_character_set)
    return image
