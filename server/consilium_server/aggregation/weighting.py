"""What a site counts in a mean: public facts alone."""

from __future__ import annotations

from collections.abc import Mapping


def cohort_weights(cohorts: Mapping[str, int], weighting: str) -> dict[str, float]:
    """Return each site's public weight: its declared cohort size, or 1 for all."""
    if weighting == "uniform":
        return dict.fromkeys(cohorts, 1.0)
    return {site: float(size) for site, size in cohorts.items()}
