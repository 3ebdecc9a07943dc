"""An update made smaller as its study says, and made whole again: file to file, tensor by tensor.

What leaves a site is one safetensors file whose header follows from the study to the last byte;
with a lossless level that file, packed. Under privacy all this comes after the noise: whatever is
done to a noised update, with the earlier ones and with the global models at hand, is
post-processing and costs no budget. Before the noise it would change what a patient can do to the
update, and with it the sensitivity that the noise is made for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from consilium_common.errors import ConsiliumError
from consilium_common.files import disk_error
from consilium_common.models import lossless
from consilium_common.models.codecs import Float64, Read, Uniform, codec_for
from consilium_common.models.exchange import CONTROL
from consilium_common.models.tensor_files import PIECE, TensorFile, writing
from consilium_common.models.weights import (
    Array,
    TensorSpec,
    in_file_order,
    pack,
    packed_header,
    packed_size,
)

if TYPE_CHECKING:
    from consilium_common.study import Study
    from consilium_common.study.federation import Compression

#: How the elements of parts lie in planes are read again.
_ELEMENTS = {"float32": "<f4", "uint32": "<u4", "bfloat16": "<u2"}


def is_plain(compression: Compression) -> bool:
    """Return whether an update travels as it is: then its form is that of ``pack``."""
    return compression.encoding == "none" and compression.level == 0


def encoded_specs(study: Study, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the tensors of the file that leaves, before it is packed, sorted by name.

    Parameters
    ----------
    specs : sequence of TensorSpec
        What an update is made of: :func:`~consilium_common.models.exchange.sent_specs`.
    """
    compression = study.federation.compression
    return tuple(
        sorted(_stored(compression, part) for spec in specs for part in _parts(compression, spec))
    )


def most_bytes(study: Study, specs: Sequence[TensorSpec]) -> int:
    """Return the size of the file that leaves; with a lossless level the most that it can be."""
    size = packed_size(encoded_specs(study, specs))
    return lossless.most(size) if study.federation.compression.level else size


def encode(
    study: Study,
    update: Mapping[str, Array],
    model: Mapping[str, Array],
    residual: Mapping[str, Array] | None,
    uniform: Uniform,
) -> tuple[bytes, dict[str, Array] | None]:
    """Return an update in the form in which it leaves, and what that form lost.

    Parameters
    ----------
    update : mapping of str to float32 array
        The site's new tensors, noised in a private study.
    model : mapping of str to float32 array
        The global model that the round began with.
    residual : mapping or None
        What the last update lost, which is added to this one; None: nothing.
    uniform : callable
        Returns so many numbers in [0, 1), for rounding at random.

    Returns
    -------
    bytes, dict of str to float32 array or None
        The file, and the new residual where the study has error feedback.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` for values that are not finite, before or after rounding.
    """
    compression = study.federation.compression
    if is_plain(compression):
        return pack(update), None
    parts: dict[str, tuple[TensorSpec, Array]] = {}
    lost: dict[str, Array] = {}
    for name in sorted(update):
        spec = TensorSpec(name, update[name].shape)
        given = np.ascontiguousarray(update[name], dtype="<f4").reshape(-1)
        _require_finite(name, given)
        start = model[name].reshape(-1) if _is_relative(compression, spec) else None
        codec = codec_for(compression, spec)
        if codec is None:
            arrays: tuple[Array, ...] = (_exclusive_or(given, start),)
        else:
            wanted = given.astype(np.float64)
            if residual is not None:
                wanted += residual[name].reshape(-1)
            try:
                with np.errstate(over="ignore"):  # infinity is refused
                    arrays = codec.encode(wanted if start is None else wanted - start, uniform)
                    change = codec.decoder(spec, _held(arrays))(0, spec.size)
            except ValueError as error:
                raise _bad(f"Tensor {name} is refused: {error}.") from error
            restored = _restored(name, change, start)
            if compression.error_feedback:
                lost[name] = (wanted - restored).astype(np.float32).reshape(spec.shape)
                _require_finite(name, lost[name])
        for part, array in zip(_parts(compression, spec), arrays, strict=True):
            parts[part.name] = part, array
    specs = [_stored(compression, part) for part, _ in parts.values()]
    blob = packed_header(specs) + b"".join(
        _laid_out(compression, *parts[spec.name]) for spec in in_file_order(specs)
    )
    if compression.level:
        blob = b"".join(lossless.deflate(lossless.cut(blob), len(blob), compression.level))
    return blob, (lost or None)


def check_encoded(study: Study, specs: Sequence[TensorSpec], encoded: Path) -> None:
    """Refuse a file that :func:`encode` cannot have written, whatever the update was.

    For a site's gate: header, length and every value that has a rule are checked, and a packed file
    is packed anew and compared, so that nothing else can leave in it.

    Raises
    ------
    ConsiliumError
        ``run.bad-update``.
    """
    with _unpacked(study, specs, encoded, canonical=True) as file:
        for spec in specs:
            for _ in _pieces(study.federation.compression, file, spec, None):
                pass


def decode(
    study: Study,
    encoded: Path,
    model: Path,
    out: Path,
    *,
    specs: Sequence[TensorSpec] | None = None,
) -> None:
    """Write the float32 update that a file stands for; memory does not grow with the model.

    The same files give the same bytes on every machine: float64 additions and multiplications of
    single elements, rounded once to float32.

    Parameters
    ----------
    encoded : Path
        What arrived.
    model : Path
        The global model that the site's round began with.
    out : Path
        Written whole or not at all.
    specs : sequence of TensorSpec, optional
        ``sent_specs(study)`` where they are known.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` for what does not match the study, ``state.disk``.
    """
    if specs is None:
        from consilium_common.models.exchange import sent_specs

        specs = sent_specs(study)
    started = TensorFile(model)
    with _unpacked(study, specs, encoded) as file, writing(out, specs, durable=False) as writer:
        for spec in specs:
            for values in _pieces(study.federation.compression, file, spec, started):
                writer.put(spec.name, values)


def _parts(compression: Compression, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    codec = codec_for(compression, spec)
    return (spec,) if codec is None else codec.parts(spec)


def _in_planes(compression: Compression, part: TensorSpec) -> bool:
    # First bytes of all elements together, then second ones: signs and exponents are alike and
    # pack well, the rest is noise and would be in their way.
    return compression.level > 0 and part.width > 1


def _stored(compression: Compression, part: TensorSpec) -> TensorSpec:
    """Return the form of a part in the file."""
    if not _in_planes(compression, part):
        return part
    return TensorSpec(part.name, (part.width, part.size), "uint8")


def _laid_out(compression: Compression, part: TensorSpec, array: Array) -> bytes:
    if _in_planes(compression, part):
        array = array.view(np.uint8).reshape(part.size, part.width).T
    return array.tobytes()


def _held(arrays: Sequence[Array]) -> Read:
    """Return what reads elements of arrays that are in memory."""
    return lambda index, start, stop: arrays[index][start:stop]


def _reader(compression: Compression, file: TensorFile, parts: Sequence[TensorSpec]) -> Read:
    """Return what reads elements of the parts, also where they lie in planes."""

    def read(index: int, start: int, stop: int) -> Array:
        part = parts[index]
        if not _in_planes(compression, part):
            return file.read(part.name, start, stop - start)
        planes = [
            file.read(part.name, plane * part.size + start, stop - start)
            for plane in range(part.width)
        ]
        return np.stack(planes, axis=1).reshape(-1).view(_ELEMENTS[part.dtype])

    return read


def _is_relative(compression: Compression, spec: TensorSpec) -> bool:
    """Return whether a tensor is written relative to that of the global model."""
    # A site's control is a change already, of its own and not of the global model's.
    if not compression.delta or spec.name.startswith(CONTROL):
        return False
    # An exact difference of bits saves nothing before it is packed.
    return codec_for(compression, spec) is not None or compression.level > 0


def _exclusive_or(values: Array, start: Array | None) -> Array:
    """Return the bits that differ, which is its own inverse and loses nothing."""
    if start is None:
        return values
    bits: Array = values.view("<u4") ^ np.ascontiguousarray(start, dtype="<f4").view("<u4")
    return bits.view("<f4")


def _restored(name: str, change: Float64, start: Array | None) -> Array:
    """Return the float32 values that a change stands for."""
    whole = change if start is None else change + start
    with np.errstate(over="ignore"):  # it is refused in the next line
        values: Array = whole.astype(np.float32)
    _require_finite(name, values)
    return values


def _pieces(
    compression: Compression, file: TensorFile, spec: TensorSpec, model: TensorFile | None
) -> Iterator[Array]:
    """Yield the float32 values of a tensor from front to back; without a model those of its change.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` that names the tensor.
    """
    codec, relative = codec_for(compression, spec), _is_relative(compression, spec)
    read = _reader(compression, file, _parts(compression, spec))
    try:
        block = None if codec is None else codec.decoder(spec, read)
        for first in range(0, spec.size, PIECE):
            last = min(first + PIECE, spec.size)
            start = (
                model.read(spec.name, first, last - first)
                if model is not None and relative
                else None
            )
            if block is not None:
                yield _restored(spec.name, block(first, last), start)
                continue
            values = _exclusive_or(read(0, first, last), start)
            # A difference of bits says nothing without what it is a difference to.
            if model is not None or not relative:
                _require_finite(spec.name, values)
            yield values
    except ValueError as error:
        raise _bad(f"Tensor {spec.name} is refused: {error}.") from error


@contextmanager
def _unpacked(
    study: Study, specs: Sequence[TensorSpec], encoded: Path, *, canonical: bool = False
) -> Iterator[TensorFile]:
    """Open the file that arrived; a packed one is unpacked beside it for as long as it is read."""
    level, wanted = study.federation.compression.level, encoded_specs(study, specs)
    if not level:
        yield TensorFile(encoded, wanted)
        return
    with tempfile.NamedTemporaryFile(dir=encoded.parent, prefix=".unpacked.") as beside:
        path = Path(beside.name)
        try:
            for piece in lossless.inflate(encoded, packed_size(wanted)):
                beside.write(piece)
            beside.flush()
            if canonical:
                lossless.require_canonical(encoded, path, level)
        except ValueError as error:
            raise _bad(f"The update is refused: {error}.") from error
        except OSError as error:
            raise disk_error(path, error) from error
        yield TensorFile(path, wanted)


def _require_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise _bad(f"Tensor {name} has a value that is not finite (NaN or infinity).")


def _bad(message: str) -> ConsiliumError:
    return ConsiliumError(
        "run.bad-update",
        message,
        hint="Sender and receiver need the same study and the same release of consilium.",
    )
