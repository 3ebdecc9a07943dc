"""What is remembered of a channel's values, so that a check reads no pixels again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from consilium_client.data.ingest.volume import Array

#: Values at a time: few enough that large images cost no second copy.
_CHUNK: Final = 1 << 20
#: Values that percentiles are taken from; larger images are sampled evenly.
_SAMPLE: Final = 1 << 15


@dataclass(frozen=True)
class ChannelFacts:
    """One channel of one case, in the image's own units.

    Parameters
    ----------
    pixel_hash : str
        SHA-256 over shape and values (as float32), 64 hexadecimal digits: the same for the same
        picture, whatever its type, file or place in the patient.
    low, high, mean, std : float
        Over all voxels.
    p01, p99 : float
        First and 99th percentile, from at most 2^15 evenly spread voxels.
    """

    pixel_hash: str
    low: float
    high: float
    mean: float
    std: float
    p01: float
    p99: float

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for case.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ChannelFacts:
        """Read what :meth:`to_dict` wrote."""
        return cls(**content)


def channel_facts(values: Array) -> ChannelFacts:
    """Return the facts of one channel of finite values."""
    flat = np.ascontiguousarray(values).reshape(-1)
    seen = hashlib.sha256(repr(tuple(values.shape)).encode())
    # Squares are summed about a value of the image: far from zero they would lose digits.
    around = float(flat[flat.size // 2])
    total = squares = 0.0
    low, high = float("inf"), float("-inf")
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        # Adding zero makes -0.0 and 0.0 one value.
        seen.update((np.asarray(part, dtype="<f4") + np.float32(0)).data)
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        away = np.subtract(part, around, dtype=np.float64)
        total += float(away.sum())
        squares += float(np.dot(away, away))
    shift = total / flat.size
    # An odd step: an even one would look at the same columns of every row.
    step = max(1, -(-flat.size // _SAMPLE)) | 1
    p01, p99 = np.percentile(flat[:: step if flat.size > _SAMPLE else 1], (1, 99))
    return ChannelFacts(
        pixel_hash=seen.hexdigest(),
        low=low,
        high=high,
        mean=around + shift,
        std=float(np.sqrt(max(0.0, squares / flat.size - shift * shift))),
        p01=float(p01),
        p99=float(p99),
    )
