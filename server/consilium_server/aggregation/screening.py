"""Cosine screening: whose change points away from where most sites go."""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.ordering import median
from consilium_server.aggregation.updates import Updates


def cosines(updates: Updates) -> dict[str, float]:
    """Return the cosine between each site's change and the median of all changes.

    The median is taken coordinate by coordinate: fewer than half of the sites cannot turn it. A
    change of length zero has cosine 0.

    Returns
    -------
    dict of str to float
        By site, in [-1, 1]; empty where the median itself is zero, which has no direction.
    """
    dots, squares = np.zeros(len(updates)), np.zeros(len(updates))
    length = 0.0
    for block in updates.all_blocks():
        changes = block.updates - block.model
        middle = median(changes)
        # Sums, not BLAS: the same on every machine, whatever its number of threads.
        dots += (changes * middle).sum(axis=1)
        squares += np.square(changes).sum(axis=1)
        length += float(np.square(middle).sum())
    if length == 0.0:
        return {}
    lengths = np.sqrt(squares * length)
    found = np.divide(dots, lengths, out=np.zeros(len(updates)), where=lengths > 0)
    return dict(zip(updates.sites, np.clip(found, -1.0, 1.0).tolist(), strict=True))
