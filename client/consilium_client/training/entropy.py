"""Random numbers for privacy, from the operating system alone: nothing to seed, copy or repeat.

Every call takes a fresh 256-bit key from ``os.urandom`` and expands it by AES-256 in counter mode.
There is no state between calls, so nothing can be checkpointed, survive a fork, or be steered by
the seed of training (torch's CPU generator keeps 32 bits of its seed only).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

#: Gaussians summed into one draw. A single floating-point Gaussian takes values on an uneven grid
#: that can tell apart neighbouring inputs (Mironov 2012); of a sum of four draws an attacker would
#: have to invert 2^208 combinations (Holohan and Braghin 2021, "Secure random sampling in
#: differential privacy").
DRAWS: Final = 4
#: Values made at a time: four draws of them fit into a core's own cache.
_CHUNK: Final = 1 << 13


class Entropy(Protocol):
    """A source of uniform and Gaussian numbers."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return ``count`` numbers uniform in the open interval (0, 1)."""

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        """Return ``count`` Gaussian numbers of mean 0."""


class SystemEntropy:
    """The only source that a release uses: the operating system's generator.

    Parameters
    ----------
    threads : int
        Threads that make noise (default: 1). Each piece of it has a key of its own.
    """

    _threads = 1

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return ``count`` numbers uniform in (0, 1), on a grid of 2^52 midpoints."""
        words = np.frombuffer(_keystream(8 * count), dtype="<u8")
        # Midpoints: neither 0 nor 1 occurs, so the Gaussian quantile is always finite.
        uniform: NDArray[np.float64] = (
            (words >> np.uint64(12)).astype(np.float64) + 0.5
        ) * 2.0**-52
        return uniform

    def normal(self, count: int, standard_deviation: float) -> NDArray[np.float64]:
        """Return ``count`` Gaussian numbers: the sum of four draws, scaled.

        Each draw is the Gaussian quantile of a uniform number, so tails reach 8.2 standard
        deviations per draw.
        """
        result = np.empty(count, dtype=np.float64)
        parts = [result[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        if min(self._threads, len(parts)) > 1:
            # A pool of this call alone: none is left for a fork to inherit.
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(self._fill, parts))
        else:
            for part in parts:
                self._fill(part)
        result *= standard_deviation / np.sqrt(DRAWS)
        return result

    def _fill(self, part: NDArray[np.float64]) -> None:
        draws = ndtri(self.uniform(DRAWS * len(part)))
        draws.reshape(DRAWS, len(part)).sum(axis=0, out=part)


def _keystream(size: int) -> bytes:
    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
    return cipher.encryptor().update(bytes(size))
