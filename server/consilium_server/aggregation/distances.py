"""How far the sites' models are from each other, in one pass over all of them."""

from __future__ import annotations

import numpy as np

from consilium_server.aggregation.updates import Updates, Values


def squared_distances(updates: Updates) -> Values:
    """Return the squared L2 distance of every two updates.

    By ‖a − b‖² = ‖a‖² + ‖b‖² − 2 a·b over the changes rather than the models, which are short, so
    that little is lost in the difference; in float64.

    Returns
    -------
    ndarray
        Shape ``(sites, sites)``, symmetric, zero on the diagonal.
    """
    products = np.zeros((len(updates), len(updates)))
    for block in updates.all_blocks():
        changes = block.updates - block.model
        products += changes @ changes.T
    squares = np.diag(products)
    found: Values = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(found, 0.0)
    return found
