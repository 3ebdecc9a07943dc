"""Exact figures that sites released, pooled rightly: sums over counts, never means of means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
