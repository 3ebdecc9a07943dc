"""What a round costs at the aggregator once its updates are there, against plain Flower's FedAvg.

Run ``python tests/benchmarks/aggregation.py``; it prints one JSON object. Each measurement is a
process of its own, and its peak is the largest resident set the system saw.

Ours begins with the updates as files in the study's folder, as the gateway leaves them, and ends
with a durable checkpoint: every update is checked (form, finite, norm), then all are aggregated.
Flower's begins with the replies in memory, where its ServerApp holds all of them, and ends with the
new model in memory: ``FedAvg.aggregate_train`` alone, without its grid. Neither counts the way from
the sites. ``--scaling`` shows that our memory does not depend on the number of sites.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

TARGET_MEMORY_RATIO = 3
TARGET_MODEL_RATIO = 2.5
#: Widths and residual units of a 3D U-Net with about so many million parameters.
WIDTHS = {
    1: ((16, 32, 64, 128), 2),
    25: ((44, 88, 176, 352, 464), 2),
    50: ((48, 96, 192, 384, 384, 384), 2),
}
#: Millions of parameters, and numbers of sites.
SCALES = ((1, 4), (1, 16), (1, 64), (25, 4), (25, 16))


def study_of(millions: int, strategy: str) -> Any:
    """Return a study whose model has about so many million parameters."""
    from aggregation_samples import study_of as tiny

    channels, units = WIDTHS[millions]
    document = tiny(strategy).to_canonical()
    return type(tiny()).model_validate(
        {
            **document,
            "name": f"aggregation-{millions}",
            "task": {**document["task"], "dimensions": 3},
            "training": {**document["training"], "patch": [64, 64, 64]},
            "model": {
                "network": "unet",
                "arguments": {
                    "channels": list(channels),
                    "strides": [2] * (len(channels) - 1),
                    "num_res_units": units,
                },
            },
        }
    )


def names(sites: int) -> list[str]:
    """Return the names of so many sites."""
    return [f"site-{number:02d}" for number in range(sites)]


# --- one measurement, in a process of its own ----------------------------------------------------


def prepare(folder: Path, millions: int, sites: int) -> dict[str, Any]:
    """Write a model and the updates of the sites, each a little beside it."""
    from consilium_common.models.registry import tensor_specs
    from consilium_common.models.tensor_files import writing

    specs = tensor_specs(study_of(millions, "fedavg"))
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1_000_003).astype(np.float32)
    for name in ("model", *names(sites)):
        with writing(folder / name, specs, durable=False) as writer:
            for spec in specs:
                for start in range(0, spec.size, len(noise)):
                    piece = np.roll(noise, rng.integers(len(noise)))
                    writer.put(spec.name, piece[: spec.size - start])
    return {"bytes": sum(spec.nbytes for spec in specs)}


def ours(folder: Path, millions: int, sites: int, strategy: str) -> dict[str, Any]:
    """Check, aggregate, and keep a checkpoint."""
    import flwr.serverapp  # noqa: F401 - as in the process that runs the rounds

    from consilium_server.aggregation import SiteUpdate, aggregate, check_update
    from consilium_server.checkpoint import Checkpoint, save_checkpoint
    from consilium_server.networks import exchanged

    study = study_of(millions, strategy)
    exchanged(study)  # once in a study
    used, began = time.process_time(), time.perf_counter()
    norms = {name: check_update(study, folder / name, folder / "model") for name in names(sites)}
    checked = time.perf_counter()
    combined = aggregate(
        study,
        folder / "model",
        [SiteUpdate(n, folder / n, 1.0 + i, 1, norms[n]) for i, n in enumerate(names(sites))],
        None,
        out=folder / "next",
        out_state=folder / "state",
        round_index=0,
    )
    aggregated = time.perf_counter()
    save_checkpoint(folder, Checkpoint(1, folder / "next", combined.state))
    ended = time.perf_counter()
    assert len(combined.kept) == sites
    assert "torch" not in sys.modules
    return {
        "seconds": ended - began,
        "cpu_seconds": time.process_time() - used,
        "check_seconds": checked - began,
        "aggregate_seconds": aggregated - checked,
        "checkpoint_seconds": ended - aggregated,
    }


def flower(folder: Path, millions: int, sites: int, strategy: str) -> dict[str, Any]:
    """Have Flower's FedAvg aggregate replies that are in memory."""
    from aggregation_samples import Reply
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from consilium_common.models.tensor_files import TensorFile

    replies = []
    for index, name in enumerate(names(sites)):
        file = TensorFile(folder / name)
        arrays = ArrayRecord({s.name: Array(file.tensor(s.name)) for s in file.specs})
        metrics = MetricRecord({"num-examples": 1.0 + index})
        replies.append(Reply(RecordDict({"arrays": arrays, "metrics": metrics})))
    used, began = time.process_time(), time.perf_counter()
    found, _ = FedAvg().aggregate_train(1, replies)
    ended = time.perf_counter()
    assert found is not None
    return {"seconds": ended - began, "cpu_seconds": time.process_time() - used}


def measure(role: str, folder: Path, millions: int, sites: int, strategy: str) -> dict[str, Any]:
    """Run a role in a process of its own; return what it found and its peak memory."""
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--role", role, "--folder", folder, "--strategy", strategy),
            *("--millions", str(millions), "--sites", str(sites)),
        ],
        stdout=subprocess.PIPE,
        check=True,
        timeout=1800,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- the whole -----------------------------------------------------------------------------------


def compared(folder: Path, millions: int, sites: int, strategy: str) -> dict[str, Any]:
    """Compare both on the same updates."""
    size = measure("prepare", folder, millions, sites, strategy)["bytes"]
    mine = measure("ours", folder, millions, sites, strategy)
    theirs = measure("flower", folder, millions, sites, strategy)
    return {
        "model_megabytes": round(size / 1e6),
        "sites": sites,
        "consilium": {**mine, "peak_by_model": round(mine["peak_megabytes"] * 1e6 / size, 2)},
        "flower": {**theirs, "peak_by_model": round(theirs["peak_megabytes"] * 1e6 / size, 2)},
        "times_less_memory": round(theirs["peak_megabytes"] / mine["peak_megabytes"], 1),
        "target_times_less_memory": TARGET_MEMORY_RATIO,
        "target_peak_by_model": TARGET_MODEL_RATIO,
    }


def scaled(strategy: str) -> list[dict[str, Any]]:
    """Return our peak memory over models and numbers of sites."""
    found = []
    for millions, sites in SCALES:
        with tempfile.TemporaryDirectory() as folder:
            measure("prepare", Path(folder), millions, sites, strategy)
            mine = measure("ours", Path(folder), millions, sites, strategy)
            found.append({"millions": millions, "sites": sites, "strategy": strategy, **mine})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, choices=sorted(WIDTHS), default=50)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--scaling", action="store_true", help="memory over the number of sites")
    parser.add_argument("--role", choices=["prepare", "ours", "flower"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "prepare":
        found = prepare(options.folder, options.millions, options.sites)
    elif options.role is not None:
        role = ours if options.role == "ours" else flower
        timed = role(options.folder, options.millions, options.sites, options.strategy)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {key: round(value, 2) for key, value in timed.items()}
        found["peak_megabytes"] = round(peak / 1e6, 1)
    else:
        found = {"benchmark": "aggregation", "load_average": os.getloadavg()[0]}
        if options.scaling:
            found["scaling"] = scaled(options.strategy)
        else:
            with tempfile.TemporaryDirectory() as folder:
                found |= compared(Path(folder), options.millions, options.sites, options.strategy)
        found["machine"] = {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            **{name: version(name) for name in ("consilium", "flwr", "numpy")},
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
