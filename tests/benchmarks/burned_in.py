"""How often the detector sees rendered text, and how often it cries wolf; prints JSON.

python tests/benchmarks/burned_in.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from burned_in_samples import clean_planes, with_text

from consilium_client.data.deid.text_regions import text_regions

SIZES = (9, 11, 14, 18)


def main() -> None:
    """Measure every group of real images at every size of letters."""
    figures = {}
    for group, planes in clean_planes().items():
        start = time.perf_counter()
        alarms = sum(bool(text_regions(plane)) for plane in planes)
        seconds = time.perf_counter() - start
        random = np.random.default_rng(0)
        seen = {
            size: sum(bool(text_regions(with_text(plane, random, size))) for plane in planes)
            for size in SIZES
        }
        figures[group] = {
            "images": len(planes),
            "false_alarm_rate": round(alarms / len(planes), 4),
            "detection_rate": {size: round(n / len(planes), 3) for size, n in seen.items()},
            "ms_per_image": round(1000 * seconds / len(planes), 1),
        }
    json.dump(figures, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
