"""Tensors in a file, read and written in pieces: memory does not grow with the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from consilium_common.errors import ConsiliumError
from consilium_common.files import replacing
from consilium_common.models.weights import (
    MAX_HEADER,
    Array,
    TensorSpec,
    header_specs,
    in_file_order,
    packed_header,
    packed_size,
)

#: Elements that are looked at in one go: 2 MB of float64.
PIECE: Final = 256 * 1024


class TensorFile:
    """The tensors of one file, of the form that :mod:`consilium_common.models.weights` packs.

    Only the header is held. Pieces are read when they are asked for, not mapped, so that what was
    read does not stay in the memory of the process.

    Parameters
    ----------
    path : Path
        Must stay as it is while it is read: files are replaced, never changed.
    specs : iterable of TensorSpec, optional
        What must be in the file, to the last byte of its header; None takes what it says.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``: no such file, damaged, other tensors, metadata, gaps or another length.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec] | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                header, size = _header(stream), os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise _bad(path, f"cannot be read: {error.strerror or error}") from error
        self.specs = tuple(sorted(specs)) if specs is not None else header_specs(header)
        if header != packed_header(self.specs) or size != packed_size(self.specs):
            raise _bad(path, "is not, byte for byte, of the form that the study declares")
        self._offsets = _offsets(self.specs, len(header))

    def read(
        self, name: str, start: int = 0, count: int | None = None, *, out: Array | None = None
    ) -> Array:
        """Return ``count`` elements of a tensor from ``start`` in C order, in one dimension.

        Parameters
        ----------
        out : ndarray, optional
            What to fill and return the front of: one-dimensional, of the tensor's dtype, at least
            so long (default: a new array).

        Raises
        ------
        ConsiliumError
            ``run.bad-update`` when the file is gone or has become shorter.
        """
        spec, offset = self._offsets[name]
        count = spec.size - start if count is None else count
        dtype = _stored(spec).newbyteorder("<")
        if out is None:
            out = np.empty(count, dtype)
        elif out.dtype != dtype or out.size < count:
            raise ValueError(f"{count} elements of {dtype} do not fit what is to be filled")
        found = out[:count]
        try:
            whole = _fill(self.path, found, offset + start * dtype.itemsize)
        except OSError as error:
            raise _bad(self.path, f"cannot be read: {error.strerror or error}") from error
        if not whole:
            raise _bad(self.path, "ended while it was read")
        return found

    def pieces(self, spec: TensorSpec, length: int = PIECE) -> Iterator[tuple[int, Array]]:
        """Yield a tensor from front to back: where each piece begins, and its elements."""
        for start in range(0, spec.size, length):
            yield start, self.read(spec.name, start, min(length, spec.size - start))

    def tensor(self, name: str) -> Array:
        """Return one whole tensor in its shape."""
        return self.read(name).reshape(self._offsets[name][0].shape)


class TensorWriter:
    """Fills a file of tensors; made by :func:`writing`."""

    def __init__(self, stream: BinaryIO, specs: tuple[TensorSpec, ...]) -> None:
        header = packed_header(specs)
        stream.write(header)
        stream.flush()
        self._descriptor = stream.fileno()
        self._offsets = _offsets(specs, len(header))
        self._written = dict.fromkeys(self._offsets, 0)

    def put(self, name: str, values: Array) -> None:
        """Write the next elements of a tensor; each is filled from front to back.

        Raises
        ------
        ValueError
            Values of another dtype, or more than the tensor has.
        """
        spec, offset = self._offsets[name]
        dtype = _stored(spec)
        start = self._written[name]
        if values.dtype != dtype or start + values.size > spec.size:
            raise ValueError(f"{values.size} values of {values.dtype} do not fit tensor {name}")
        flat = np.ascontiguousarray(values, dtype.newbyteorder("<")).reshape(-1)
        rest = flat.view(np.uint8).data
        position = offset + start * dtype.itemsize
        while rest:
            done = os.pwrite(self._descriptor, rest, position)
            position, rest = position + done, rest[done:]
        self._written[name] = start + values.size

    def finish(self) -> None:
        """Check that every tensor is whole."""
        short = [name for name, n in self._written.items() if n != self._offsets[name][0].size]
        if short:
            raise ValueError(f"tensor {short[0]} was not written whole")


@contextmanager
def writing(
    path: Path, specs: Iterable[TensorSpec], *, durable: bool = True
) -> Iterator[TensorWriter]:
    """Write a file of tensors piece by piece; it is there whole or not at all.

    The bytes are those of :func:`~consilium_common.models.weights.pack`.

    Parameters
    ----------
    durable : bool
        Whether it must survive a crash when the block ends (default: True).

    Raises
    ------
    ConsiliumError
        ``state.disk`` when the disk is full; what was there before stays.
    ValueError
        At the end, when a tensor was not written whole.
    """
    with replacing(path, durable=durable) as stream:
        writer = TensorWriter(stream, tuple(sorted(specs)))
        yield writer
        writer.finish()


def _offsets(specs: tuple[TensorSpec, ...], start: int) -> dict[str, tuple[TensorSpec, int]]:
    found = {}
    for spec in in_file_order(specs):
        found[spec.name] = (spec, start)
        start += spec.nbytes
    return found


def _fill(path: Path, values: Array, position: int) -> bool:
    """Fill an array with a file's bytes from ``position``; return whether there were so many."""
    rest = values.view(np.uint8).data
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while rest:
            done = os.preadv(descriptor, [rest], position)
            if done == 0:
                return False
            position, rest = position + done, rest[done:]
    finally:
        os.close(descriptor)
    return True


def _header(stream: BinaryIO) -> bytes:
    """Return the bytes before the elements: a length, and so many bytes."""
    length = stream.read(8)
    return length + stream.read(min(int.from_bytes(length, "little"), MAX_HEADER))


def _stored(spec: TensorSpec) -> np.dtype[Any]:
    # NumPy knows no bfloat16; its bits are given as they are.
    return np.dtype("uint16" if spec.dtype == "bfloat16" else spec.dtype)


def _bad(path: Path, what: str) -> ConsiliumError:
    return ConsiliumError(
        "run.bad-update",
        f"The file of tensors {what}.",
        where=path.name,
        hint="Sender and receiver need the same study and the same release of consilium.",
    )
