"""Prints, as JSON, what the shipped studies reach on the real images: `python FILE [NAME …]`.

Every study runs through real processes over mutual TLS: one aggregator and three sites on this
machine. Names: hippocampus, hippocampus-private, mednist.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from real_studies import (
    Finished,
    hippocampus_sites,
    mednist_sites,
    pooled_dice,
    run_example,
)

NAMES = ("hippocampus", "hippocampus-private", "mednist")


def main(names: list[str]) -> None:
    """Run the studies named, all by default."""
    wanted = names or list(NAMES)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        segmentations = [name for name in wanted if name != "mednist"]
        if segmentations:
            with hippocampus_sites(Path(folder) / "hippocampus") as federation:
                for name in segmentations:
                    figures[name] = _figures(run_example(federation, name, timeout=1800))
        if "mednist" in wanted:
            with mednist_sites(Path(folder) / "mednist") as federation:
                figures["mednist"] = _figures(run_example(federation, "mednist", timeout=900))
    machine = {
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "flwr": version("flwr"),
    }
    print(json.dumps({"figures": figures, "machine": machine}, indent=2))


def _figures(finished: Finished) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "seconds": round(finished.seconds, 1),
        "rounds": len(finished.study["rounds"]),
        "epsilon": finished.study["epsilon"],
    }
    if "dice" in next(iter(finished.results.values())):
        figures["dice"] = {k: round(v, 3) for k, v in pooled_dice(finished.results).items()}
    else:
        correct = sum(r["correct"] for r in finished.results.values())
        decisions = sum(r["decisions"] for r in finished.results.values())
        figures["accuracy"] = round(correct / decisions, 4)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
