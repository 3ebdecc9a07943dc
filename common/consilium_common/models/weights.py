"""Weights as named NumPy arrays: packed by safetensors, checked name by name, never broadcast."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consilium_common.errors import ConsiliumError

#: The one dtype on the wire. Low precision is a matter of arithmetic at the site.
DTYPE: Final = "float32"

#: What else a compressed update is made of: bytes of an element, and safetensors' name of it.
_DTYPES: Final[dict[str, tuple[int, str]]] = {
    DTYPE: (4, "F32"),
    "uint32": (4, "U32"),
    "bfloat16": (2, "BF16"),
    "int8": (1, "I8"),
    "uint8": (1, "U8"),
}

#: Largest safetensors header in bytes; a network of a thousand tensors has about 120 kB.
MAX_HEADER: Final = 4 * 1024 * 1024

Array = npt.NDArray[Any]


@dataclass(frozen=True, order=True)
class TensorSpec:
    """Name, shape and dtype of one tensor that is exchanged: public facts of the study."""

    name: str
    shape: tuple[int, ...]
    dtype: str = DTYPE

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the elements."""
        return self.size * self.width

    @property
    def width(self) -> int:
        """Number of bytes of one element."""
        return _DTYPES[self.dtype][0]


def pack(tensors: Mapping[str, Array]) -> bytes:
    """Serialise tensors; equal tensors give equal bytes, whatever their order.

    Raises
    ------
    ValueError
        A tensor is not float32: nothing else is ever exchanged.
    """
    from safetensors.numpy import save

    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"tensor {name} is {tensor.dtype}, not {DTYPE}")
    # Names sorted, elements in C order and little endian: nothing is left to chance.
    ordered = {
        name: np.ascontiguousarray(tensors[name], dtype="<f4").reshape(tensors[name].shape)
        for name in sorted(tensors)
    }
    blob: bytes = save(ordered)
    return blob


def packed_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the bytes before the elements in :func:`pack` for tensors of these specs.

    They follow from the specs alone: the widest dtype first, which aligns every element, then
    sorted by name, no metadata, no gap.
    """
    header: dict[str, Any] = {}
    end = 0
    for spec in in_file_order(specs):
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": _DTYPES[spec.dtype][1],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the specs in the order in which :func:`pack` lays their elements out."""
    return sorted(specs, key=lambda spec: (-spec.width, spec))


def header_specs(header: bytes) -> tuple[TensorSpec, ...]:
    """Return the specs that the header of a file names, sorted by name.

    They are what the header says and no more: compare it with :func:`packed_header` of them.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``: no header of tensors.
    """
    dtypes = {code: dtype for dtype, (_, code) in _DTYPES.items()}
    try:
        entries = json.loads(header[8:])
        specs = [
            TensorSpec(name, tuple(int(n) for n in entry["shape"]), dtypes[entry["dtype"]])
            for name, entry in entries.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _bad("The file of tensors cannot be read: it has no header of tensors.") from error
    return tuple(sorted(specs))


def packed_size(specs: Iterable[TensorSpec]) -> int:
    """Return the exact length of :func:`pack` for tensors of these specs, without making them."""
    specs = tuple(specs)
    return len(packed_header(specs)) + sum(spec.nbytes for spec in specs)


def unpack(blob: bytes) -> dict[str, Array]:
    """Read what :func:`pack` wrote. The arrays are read-only views of ``blob``'s content.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``: not safetensors, damaged, with a tensor that is not float32, or with
        text beside the tensors (metadata is a place to hide data in).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(blob[:8], "little")
        if length > min(MAX_HEADER, len(blob)):
            raise ValueError("the header is longer than any header is")
        header = json.loads(blob[8 : 8 + length])
        if not isinstance(header, dict) or not all(isinstance(v, dict) for v in header.values()):
            raise ValueError("the header is not a list of tensors")
        if "__metadata__" in header:
            raise ValueError("it carries text beside the tensors")
        odd = sorted(name for name, entry in header.items() if entry.get("dtype") != "F32")
        if odd:
            raise ValueError(f"tensor {_shown(odd[0])} is not {DTYPE}")
        tensors: dict[str, Array] = load(bytes(blob))
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "the bytes are damaged or not tensors"
        raise _bad(f"The update cannot be read: {reason}.") from error
    return {name: tensors[name] for name in sorted(tensors)}


def check_tensors(
    tensors: Mapping[str, Array], specs: Iterable[TensorSpec], *, norm_bound: float | None
) -> None:
    """Refuse tensors that are not exactly those of ``specs``.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        What came.
    specs : iterable of TensorSpec
        What the study says comes.
    norm_bound : float or None
        Largest L2 norm over all tensors together, in float64; None sets no bound.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` that names the tensor: missing or unexpected, of another shape or
        dtype, with NaN or infinity; or the norm and its bound.
    """
    expected = {spec.name: spec for spec in specs}
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise _bad(f"Tensor {missing[0]} is missing{_more(missing)}.")
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise _bad(
            f"Tensor {_shown(extra[0])} does not belong to the study's network{_more(extra)}."
        )
    squares = 0.0
    for name, spec in sorted(expected.items()):
        tensor = tensors[name]
        if tensor.shape != spec.shape:
            shape = list(tensor.shape)[:8]
            raise _bad(f"Tensor {name} has shape {shape} in place of {list(spec.shape)}.")
        if tensor.dtype != np.dtype(spec.dtype):
            raise _bad(f"Tensor {name} is {tensor.dtype} in place of {spec.dtype}.")
        if not np.isfinite(tensor).all():
            raise _bad(f"Tensor {name} has a value that is not finite (NaN or infinity).")
        if norm_bound is not None:
            squares += float(np.square(tensor, dtype=np.float64).sum())
    if norm_bound is not None and not math.sqrt(squares) <= norm_bound:
        raise _bad(
            f"The norm over all tensors is {math.sqrt(squares):.4g}, above {norm_bound:.4g}."
        )


def _shown(name: str) -> str:
    # A name from outside must not steer a terminal or forge a line of a log.
    return name[:100] if name.isprintable() else ascii(name[:100])


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _bad(message: str) -> ConsiliumError:
    return ConsiliumError(
        "run.bad-update",
        message,
        hint="Sender and receiver need the same study and the same release of consilium.",
    )
