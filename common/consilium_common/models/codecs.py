"""How one tensor is written in fewer bits, and read again: bfloat16, 8 bits, the largest entries.

A codec turns a tensor's float64 values into a few arrays whose form follows from the study alone,
and back. It reads in blocks, so that whoever decodes needs no memory for the whole tensor, and it
refuses what no encoder writes: a place where anything could be written is a place to hide data in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from consilium_common.models.weights import Array, TensorSpec
from consilium_common.study.federation import Compression

Float64 = npt.NDArray[np.float64]
#: Returns so many numbers, uniform in [0, 1).
Uniform = Callable[[int], npt.NDArray[np.float64]]
#: Returns the elements from start to stop of one of the arrays that a tensor was encoded into.
Read = Callable[[int, int, int], Array]
#: Returns the decoded values from start to stop.
Block = Callable[[int, int], Float64]

#: Names of what is beside a tensor; no network has names that begin so.
_SCALE: Final = "consilium.scale."
_INDEX: Final = "consilium.index."
#: Largest magnitude of an 8-bit value; -128 has no counterpart and is not used.
_MOST: Final = 127


class Codec(Protocol):
    """One encoding of one tensor, taken flat."""

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the form of the arrays that a tensor is encoded into."""

    def encode(self, values: Float64, uniform: Uniform) -> tuple[Array, ...]:
        """Return those arrays, flat, for finite values."""

    def decoder(self, spec: TensorSpec, read: Read) -> Block:
        """Return what decodes a block; raises ValueError with the reason for what it refuses."""


class BFloat16:
    """Half the bits: float32 without the lower half of its mantissa, rounded to the nearest."""

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return one tensor of the same shape."""
        return (TensorSpec(spec.name, spec.shape, "bfloat16"),)

    def encode(self, values: Float64, uniform: Uniform) -> tuple[Array, ...]:
        """Return the upper halves of the float32 bits, ties rounded to even."""
        bits = values.astype("<f4").view("<u4")
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((rounded >> np.uint32(16)).astype("<u2"),)

    def decoder(self, spec: TensorSpec, read: Read) -> Block:
        """Every pattern of bits has a value; what is not finite is refused."""

        def block(start: int, stop: int) -> Float64:
            bits = read(0, start, stop).astype("<u4") << np.uint32(16)
            return _finite(bits.view("<f4").astype(np.float64))

        return block


class Int8:
    """A quarter of the bits: multiples of one scale, rounded at random so that the mean is kept.

    Alistarh et al., NeurIPS 2017 (QSGD), with the largest magnitude in place of the norm.
    """

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the multiples, of the tensor's shape, and the scale."""
        return (TensorSpec(spec.name, spec.shape, "int8"), TensorSpec(_SCALE + spec.name, (1,)))

    def encode(self, values: Float64, uniform: Uniform) -> tuple[Array, ...]:
        """Return ``floor(x / scale + u)``, whose expectation is ``x / scale``."""
        largest = float(np.abs(values).max(initial=0.0))
        scale = np.float32(largest / _MOST)
        if float(scale) * _MOST < largest:  # rounded down: the largest would not fit
            scale = np.nextafter(scale, np.float32(np.inf))
        multiples = np.zeros(values.shape, dtype="<i1")
        if scale > 0:
            multiples[...] = np.minimum(
                np.floor(values / float(scale) + uniform(values.size)),
                _MOST,  # a number next to 1 may round the sum up
            )
        return multiples, np.array([scale], dtype="<f4")

    def decoder(self, spec: TensorSpec, read: Read) -> Block:
        """The scale is finite and not negative, the multiples are from -127 to 127."""
        scale = float(_finite(read(1, 0, 1).astype(np.float64))[0])
        if scale < 0 or math.copysign(1, scale) < 0:
            raise ValueError("its scale is negative")

        def block(start: int, stop: int) -> Float64:
            multiples = read(0, start, stop)
            if (multiples < -_MOST).any() or (scale == 0 and multiples.any()):
                raise ValueError("it has a value that no encoder writes")
            return multiples.astype(np.float64) * scale

        return block


class TopK:
    """The entries of largest magnitude alone, with their places.

    Aji and Heafield, EMNLP 2017; Stich et al., NeurIPS 2018 with error feedback.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def _kept(self, size: int) -> int:
        return min(size, math.ceil(self._share * size))

    def parts(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the entries and their places in the flat tensor."""
        kept = (self._kept(spec.size),)
        return TensorSpec(spec.name, kept), TensorSpec(_INDEX + spec.name, kept, "uint32")

    def encode(self, values: Float64, uniform: Uniform) -> tuple[Array, ...]:
        """Return the largest entries in the order of their places; of equal ones the first."""
        kept = self._kept(values.size)
        magnitude = np.abs(values)
        least = np.partition(magnitude, values.size - kept)[values.size - kept] if kept else 0.0
        # Which of equal entries partition() would keep is its own affair; here it is the first.
        above = np.flatnonzero(magnitude > least)
        equal = np.flatnonzero(magnitude == least)[: kept - len(above)]
        index = np.sort(np.concatenate([above, equal])).astype("<u4")
        return values[index].astype("<f4"), index

    def decoder(self, spec: TensorSpec, read: Read) -> Block:
        """Places ascend and lie in the tensor; entries are finite."""
        kept = self._kept(spec.size)
        index = read(1, 0, kept)
        if kept and (int(index[-1]) >= spec.size or (index[1:] <= index[:-1]).any()):
            raise ValueError("its places are out of order or outside of it")

        def block(start: int, stop: int) -> Float64:
            first, last = (int(at) for at in np.searchsorted(index, [start, stop]))
            values = np.zeros(stop - start)
            values[index[first:last].astype(np.int64) - start] = _finite(
                read(0, first, last).astype(np.float64)
            )
            return values

        return block


def codec_for(compression: Compression, spec: TensorSpec) -> Codec | None:
    """Return how a tensor is encoded; None: exactly, as float32.

    Tensors of less than two dimensions (biases, scales and running statistics of normalisation)
    stay exact: they are a hundredth of the bytes, and a variance that rounding has made negative
    ruins a model.
    """
    if len(spec.shape) < 2:
        return None
    codecs: dict[str, Codec] = {
        "bfloat16": BFloat16(),
        "int8": Int8(),
        "top-k": TopK(compression.share),
    }
    return codecs.get(compression.encoding)


def _finite(values: Float64) -> Float64:
    if not np.isfinite(values).all():
        raise ValueError("it has a value that is not finite (NaN or infinity)")
    return values
