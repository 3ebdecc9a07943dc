"""What a round costs the ServerApp, against plain Flower's ``FedAvg(...).start`` of one round.

Run ``python tests/benchmarks/aggregation.py``; it prints one JSON object. Each measurement is a
process of its own, and its peak is the largest resident set the system saw.

Both sides begin with the global model in hand and the sites' answers as files, byte for byte as
they came, and end with the next global model. Counted of ours: offering the model to the sites,
checking every update (form, finite, norm) against the model, aggregating in float64, and a
checkpoint that survives a crash: hashed, written, waited for. ``consilium_not_durable`` is the same
without waiting for the disk, as Flower keeps its model in memory alone. Counted of Flower's: all of
``start`` with its own grid: pushing the model as messages, pulling the replies object by object,
inflating, validating, aggregating in float32. See ``plain_flower.py``.

Counted of neither: the way from and to the sites (sockets, TLS, authentication), what stands
between (our gateway; Flower's SuperLink, which holds each reply as well), imports, and the making
of the updates. ``flower_aggregate_train`` is Flower's arithmetic alone, on replies that are
inflated already: no round is made of that alone, and it is given for frankness. ``--scaling`` shows
that our memory does not depend on the number of sites.
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
TARGET_TIME_RATIO = 1
TARGET_MODEL_RATIO = 2.5
#: Widths and residual units of a 3D U-Net with about so many million parameters.
WIDTHS = {
    1: ((16, 32, 64, 128), 2),
    25: ((44, 88, 176, 352, 464), 2),
    50: ((48, 96, 192, 384, 384, 384), 2),
}
#: What one process does.
ROLES = ("prepare", "ours", "ours-not-durable", "flower-prepare", "flower", "flower-arithmetic")
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


def ours(
    folder: Path, millions: int, sites: int, strategy: str, *, durable: bool = True
) -> dict[str, Any]:
    """Offer the model, check the updates, aggregate, and keep a checkpoint."""
    import flwr.serverapp  # noqa: F401 - as in the process that runs the rounds

    from consilium_server.aggregation import SiteUpdate, aggregate, check_update
    from consilium_server.checkpoint import Checkpoint, save_checkpoint
    from consilium_server.networks import exchanged
    from consilium_server.study_files import StudyFiles

    study = study_of(millions, strategy)
    exchanged(study)  # once in a study
    before = save_checkpoint(folder, Checkpoint(0, folder / "model"))
    if not durable:
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    used, began = time.process_time(), time.perf_counter()
    StudyFiles(folder).offer(before.model, before.sha256_of(before.model))
    norms = {name: check_update(study, folder / name, before.model) for name in names(sites)}
    checked = time.perf_counter()
    combined = aggregate(
        study,
        before.model,
        [SiteUpdate(n, folder / n, 1.0 + i, 1, norms[n]) for i, n in enumerate(names(sites))],
        None,
        out=folder / "next",
        out_state=folder / "state",
        round_index=0,
    )
    aggregated = time.perf_counter()
    after = save_checkpoint(folder, Checkpoint(1, folder / "next", combined.state))
    ended, used = time.perf_counter(), time.process_time() - used
    assert len(combined.kept) == sites
    assert "torch" not in sys.modules
    return {
        "seconds": ended - began,
        "cpu_seconds": used,
        "offer_and_check_seconds": checked - began,
        "aggregate_seconds": aggregated - checked,
        "checkpoint_seconds": ended - aggregated,
        "sum": checksum(after.model),
    }


def checksum(path: Path) -> float:
    """Return the sum of the squares of a model: that both sides found the same one."""
    from consilium_common.models.tensor_files import TensorFile

    file, found = TensorFile(path), 0.0
    for spec in file.specs:
        for _, values in file.pieces(spec):
            found += float(np.square(values, dtype=np.float64).sum())
    return found


def flower(folder: Path, updates: list[Path], role: str) -> dict[str, Any]:
    """Have plain Flower do it: by ``start``, or its arithmetic alone."""
    import plain_flower

    if role == "flower-prepare":
        plain_flower.prepare(folder, updates)
        return {}
    if role == "flower":
        return plain_flower.start(folder)
    return plain_flower.aggregate_train(updates)


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

    def measured(role: str) -> dict[str, Any]:
        return measure(role, folder, millions, sites, strategy)

    size = measured("prepare")["bytes"]
    found = {
        "model_megabytes": round(size / 1e6),
        "sites": sites,
        "consilium": measured("ours"),
        "consilium_not_durable": measured("ours-not-durable"),
    }
    if strategy == "fedavg":
        measured("flower-prepare")
        found["flower"] = measured("flower")
        found["flower_aggregate_train"] = measured("flower-arithmetic")
    sides = [one for one in found.values() if isinstance(one, dict)]
    sums = [one.pop("sum") for one in sides]
    # Flower's arithmetic is float32.
    assert np.allclose(sums, sums[0], rtol=1e-5), sums
    for side in sides:
        side["peak_by_model"] = round(side["peak_megabytes"] * 1e6 / size, 2)
    if strategy != "fedavg":
        return found
    mine, theirs = found["consilium"], found["flower"]
    return found | {
        "times_less_memory": round(theirs["peak_megabytes"] / mine["peak_megabytes"], 1),
        "seconds_by_flower": round(mine["seconds"] / theirs["seconds"], 2),
        "cpu_seconds_by_flower": round(mine["cpu_seconds"] / theirs["cpu_seconds"], 2),
        "target_times_less_memory": TARGET_MEMORY_RATIO,
        "target_seconds_by_flower": TARGET_TIME_RATIO,
        "target_peak_by_model": TARGET_MODEL_RATIO,
    }


def scaled(strategy: str) -> list[dict[str, Any]]:
    """Return our peak memory over models and numbers of sites."""
    found = []
    for millions, sites in SCALES:
        with tempfile.TemporaryDirectory() as folder:
            measure("prepare", Path(folder), millions, sites, strategy)
            mine = measure("ours", Path(folder), millions, sites, strategy)
            del mine["sum"]
            found.append({"millions": millions, "sites": sites, "strategy": strategy, **mine})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, choices=sorted(WIDTHS), default=50)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--scaling", action="store_true", help="memory over the number of sites")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "prepare":
        found = prepare(options.folder, options.millions, options.sites)
    elif options.role is not None:
        folder, role = options.folder, options.role
        if role.startswith("ours"):
            timed = ours(
                *(folder, options.millions, options.sites, options.strategy),
                durable=role == "ours",
            )
        else:
            timed = flower(folder, [folder / name for name in names(options.sites)], role)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {key: round(value, 6 if key == "sum" else 2) for key, value in timed.items()}
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
