"""Figures that sites released, checked and pooled: exact sums over counts, or noised sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from consilium_common.errors import ConsiliumError


def checked_figures(figures: Mapping[str, float], release: str) -> dict[str, float]:
    """Return a reply's figures if they are what the study lets sites release.

    Parameters
    ----------
    release : str
        ``none``: nothing is taken, whatever came; ``exact``: any finite figures; ``private``:
        exactly ``sum``.

    Raises
    ------
    ConsiliumError
        ``run.bad-figures``.
    """
    if release == "none":
        return {}
    if release == "private" and set(figures) != {"sum"}:
        raise ConsiliumError(
            "run.bad-figures",
            "The reply does not hold one noised sum and nothing else.",
            hint="Site and aggregator need the same release of consilium.",
        )
    if not all(math.isfinite(value) for value in figures.values()):
        raise ConsiliumError("run.bad-figures", "A released figure is not finite.")
    return dict(figures)


def noisy_score(
    figures: Mapping[str, Mapping[str, float]], declared: Mapping[str, int], noise: float
) -> dict[str, Any]:
    """Return the mean score of all sites' test patients, from their noised sums.

    Each site releases Σ (score − 1/2) + N(0, noise²) over its patients. The mean over sites is
    1/2 + Σ sums / Σ declared; the noise alone has the standard error noise·√sites / Σ declared.
    What chance did in the choice of patients is not in it.

    Parameters
    ----------
    figures : mapping
        By site ``{"sum": …}``; not empty.
    declared : mapping of str to int
        Patients each site declared to evaluate on (public), at least 1 each.
    noise : float
        Standard deviation of the noise on one sum.

    Returns
    -------
    dict
        ``score`` (noise may take it out of [0, 1]), ``standard_error``, ``patients`` (declared).
    """
    patients = sum(declared[site] for site in figures)
    total = math.fsum(of_site["sum"] for of_site in figures.values())
    return {
        "score": 0.5 + total / patients,
        "standard_error": noise * math.sqrt(len(figures)) / patients,
        "patients": patients,
    }


def pooled(figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the figures of all sites' test cases taken together.

    Parameters
    ----------
    figures : mapping
        By site: ``dice.<class>.total`` and ``.count``, ``correct``, ``decisions``, ``cases``.

    Returns
    -------
    dict
        ``cases``; for segmentation ``dice`` by class (mean over cases) and ``mean_dice`` (mean
        over classes); for classification ``accuracy``. Empty where nothing was released.
    """
    sums: dict[str, float] = {}
    for of_site in figures.values():
        for key, value in of_site.items():
            sums[key] = sums.get(key, 0.0) + value
    if not sums:
        return {}
    result: dict[str, Any] = {"cases": int(sums.get("cases", 0))}
    names = [key[len("dice.") : -len(".total")] for key in sums if key.endswith(".total")]
    dice = {
        name: sums[f"dice.{name}.total"] / sums[f"dice.{name}.count"]
        for name in names
        if sums.get(f"dice.{name}.count")
    }
    if dice:
        result |= {"dice": dice, "mean_dice": sum(dice.values()) / len(dice)}
    if sums.get("decisions"):
        result["accuracy"] = sums["correct"] / sums["decisions"]
    return result
