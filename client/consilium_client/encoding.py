"""A round's update in the form in which it leaves, and what that form lost, which stays here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np

from consilium_client.training.entropy import SystemEntropy
from consilium_common.models.codecs import Uniform
from consilium_common.models.compression import encode
from consilium_common.models.weights import Array
from consilium_common.study import Study

#: Begins the names under which a site keeps what an encoding lost (error feedback).
LOST: Final = "consilium.lost."


def encoded_update(
    study: Study,
    update: Mapping[str, Array],
    model: Mapping[str, Array],
    kept: Mapping[str, Array],
    *,
    site: str,
    round_index: int,
) -> tuple[bytes, dict[str, Array]]:
    """Return the file that leaves, and what the site keeps of it for its next update.

    Parameters
    ----------
    update : mapping of str to float32 array
        What training made, noised already in a private study.
    model : mapping of str to float32 array
        The global model that the round began with.
    kept : mapping of str to float32 array
        What the study kept at this site; what the last update lost is under names that begin
        with :data:`LOST`.
    site : str
        Name of the site: no two sites round by the same numbers, nor two rounds.

    Returns
    -------
    bytes, dict of str to float32 array
        The second under such names too; empty without error feedback.

    Raises
    ------
    ConsiliumError
        ``run.bad-update`` for values that are not finite.
    """
    earlier = {
        name.removeprefix(LOST): values for name, values in kept.items() if name.startswith(LOST)
    }
    uniform = _rounding(study, round_index, site)
    blob, lost = encode(study, update, model, earlier or None, uniform)
    return blob, {LOST + name: values for name, values in (lost or {}).items()}


def _rounding(study: Study, round_index: int, site: str) -> Uniform:
    """Return the random numbers that an update of a site is rounded by."""
    if study.privacy.mode != "none":
        # What is noised already needs no secret to be rounded by. But nothing random that is in a
        # private release comes from a seed: there is one rule for all, and nothing to argue over.
        return SystemEntropy().uniform
    # The same study twice gives the same updates, at a site that was killed and came back too.
    seed = hashlib.sha256(f"{study.digest}/{round_index}/{site}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed))).random
