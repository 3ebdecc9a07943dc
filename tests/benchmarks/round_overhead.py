"""What a round costs beside its training: a trivial model, three sites, the real wire.

Run ``python tests/benchmarks/round_overhead.py``; it prints one JSON object. A round's seconds are
those from the end of the round before to its own, so that all is in them: what is written durably,
and what lies between two rounds. The first is given apart, as the aggregator counts it: in it each
site prepares its cases and starts its worker.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

TARGET_SECONDS = 0.5


def measure(rounds: int, *, private: bool) -> dict[str, Any]:
    """Run a federation of three sites for some rounds and return seconds per round."""
    from federation import PRIVATE, Federation, add_hospitals, small_study

    parts: dict[str, Any] = {
        "training": {"steps_per_round": 1, "batch_size": 1},
        "federation": {"rounds": rounds + 1, "quorum": 3},
        "evaluation": {"release": "none"},
    }
    if private:
        parts |= PRIVATE
        parts["training"] = {"steps_per_round": 1, "patches_per_patient": 1}
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        add_hospitals(federation)
        load = os.getloadavg()
        found = federation.run_to_end(small_study("overhead", **parts), timeout=600)
        logged = federation.study("log", found["digest"]).data["rounds"]
        ends = [datetime.fromisoformat(row["ended_at"]) for row in logged]
        seconds = [round((b - a).total_seconds(), 3) for a, b in itertools.pairwise(ends)]
        assert all(len(row["sites"]) == 3 for row in found["rounds"]), found["rounds"]
    return {
        "private": private,
        "first_round_seconds": found["rounds"][0]["seconds"],
        "median_seconds": round(statistics.median(seconds), 3),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "rounds": rounds,
        "sites": 3,
        "target_seconds": TARGET_SECONDS,
        "load_average_before": [round(value, 2) for value in load],
        "load_average_after": [round(value, 2) for value in os.getloadavg()],
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that matter."""
    packages = ("consilium", "flwr", "torch", "monai", "grpcio")
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds to measure (default 20)")
    parser.add_argument("--private", action="store_true", help="with patient-level privacy")
    options = parser.parse_args()
    figures = measure(options.rounds, private=options.private)
    print(json.dumps({"benchmark": "round_overhead", **figures, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
