"""What patients' gradients cost: each engine's time and extra memory against plain SGD.

Run ``python tests/benchmarks/engines.py`` (about five minutes on one core); it prints one JSON
object. ``--quick`` measures the smallest case once. Every figure comes from a process of its own,
on one thread: seconds are the processor's and the least of the repeats, memory is the peak of the
resident set above what network and data take. Plain SGD computes the same images as one batch.

``time`` and ``memory`` are of the gradients, clipped and summed; ``step_time`` and ``step_memory``
of the whole private step, with its sampling, noise and measurement of the noise.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENGINES = ("plain", "loop", "vmap", "opacus")
DEFAULT = "loop"
TARGET = {"time": 1.05, "memory": 0.5}


@dataclass(frozen=True)
class Case:
    """One network with its images."""

    network: str
    dimensions: int
    size: int
    patients: int
    #: Images a patient with which the target is to be met.
    several: int


CASES = {
    "unet-2d": Case("unet", 2, 128, 16, 4),
    "unet-3d": Case("unet", 3, 64, 4, 2),
    "densenet121": Case("densenet121", 2, 128, 16, 4),
}


def study_of(case: Case) -> Any:
    """Return a study of the case's network with its default arguments."""
    from consilium_common.study import Study

    segmentation = case.network == "unet"
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "engines",
            "task": {
                "kind": "segmentation" if segmentation else "classification",
                "dimensions": case.dimensions,
                "inputs": ["image"],
                "classes": ["zero", "one"],
            },
            "preprocessing": {"size": [case.size] * case.dimensions},
            "model": {"network": case.network},
            "training": {"loss": "dice_ce" if segmentation else "cross_entropy"},
            "privacy": {"mode": "none"},
        }
    )


def measure(name: str, images: int, engine: str, repeats: int) -> dict[str, float]:
    """Measure one engine on one case, in this process."""
    import torch

    from consilium_client.training.clipping import clipped_sum
    from consilium_client.training.engines.base import PatientTask
    from consilium_client.training.engines.choice import build_engine
    from consilium_client.training.losses import build_loss, one_hot
    from consilium_client.training.mechanism import Mechanism
    from consilium_common.models.registry import build_network

    torch.set_num_threads(1)
    case = CASES[name]
    study = study_of(case)
    network, loss = build_network(study).train(), build_loss(study)
    size = [case.size] * case.dimensions
    pixels = torch.randn(case.patients * images, 1, *size)
    shape = pixels.shape[2:] if study.task.kind == "segmentation" else ()
    wanted = one_hot(study, torch.randint(0, 2, (len(pixels), *shape)))
    drawn = [
        (pixels[i : i + images], wanted[i : i + images]) for i in range(0, len(pixels), images)
    ]
    task = PatientTask(network, lambda i: drawn[i], lambda f, x, y: loss(f(x), y))
    if engine == "plain":
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-6)

        def plain() -> None:
            optimiser.zero_grad()
            loss(network(pixels), wanted).backward()
            optimiser.step()

        seconds, peak = timed(plain, repeats)
        return {"seconds": seconds, "bytes": peak}
    gradients = build_engine(engine, task, expected=case.patients)  # type: ignore[arg-type]
    everybody = list(range(case.patients))

    def engine_alone() -> None:
        clipped_sum(gradients.gradients(everybody), 1.0, gradients.size, "cpu")

    run = Mechanism(1.0, 1.0, 1.0, 1, float(case.patients)).begin()

    def private_step() -> None:
        run.step(case.patients, gradients)

    seconds, peak = timed(engine_alone, repeats)
    step_seconds, step_peak = timed(private_step, 0)
    return {
        "seconds": seconds,
        "bytes": peak,
        "step_seconds": step_seconds,
        "step_bytes": step_peak,
    }


def timed(work: Callable[[], None], repeats: int) -> tuple[float, int]:
    """Return the least seconds and the peak of memory above what stood before.

    With repeats, a first run warms caches up and is not timed; with none, the one run is.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmHWM")
    best = float("inf")
    for repeat in range(repeats + 1):
        start = time.process_time()
        work()
        if repeat or not repeats:
            best = min(best, time.process_time() - start)
    return best, _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def in_fresh_process(name: str, images: int, engine: str, repeats: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(images), engine, str(repeats)]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    figures: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return figures


def compare(name: str, images: int, repeats: int) -> dict[str, Any]:
    """Measure every engine on one case and compare it with plain SGD."""
    case = CASES[name]
    figures = {e: in_fresh_process(name, images, e, repeats) for e in ENGINES}
    plain = figures.pop("plain")
    rows: dict[str, Any] = {}
    for engine, found in figures.items():
        rows[engine] = {
            "time": round(found["seconds"] / plain["seconds"], 2),
            "memory": round(found["bytes"] / plain["bytes"], 2),
            "step_time": round(found["step_seconds"] / plain["seconds"], 2),
            "step_memory": round(found["step_bytes"] / plain["bytes"], 2),
            "seconds": round(found["seconds"], 3),
            "megabytes": round(found["bytes"] / 2**20),
        }
    result = {
        **asdict(case),
        "images": images,
        "plain": {
            "seconds": round(plain["seconds"], 3),
            "megabytes": round(plain["bytes"] / 2**20),
        },
        "engines": rows,
    }
    if images == case.several:
        ours = rows[DEFAULT]
        result["target_met"] = {key: ours[key] <= bound for key, bound in TARGET.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest case, once")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of each (default 1)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, images, engine, repeats = options.one
        print(json.dumps(measure(name, int(images), engine, int(repeats))))
        return
    names = ["unet-2d"] if options.quick else options.case or list(CASES)
    load = os.getloadavg()
    found = {
        f"{name}, {images} image{'s' if images > 1 else ''} a patient": compare(
            name, images, 1 if options.quick else options.repeats
        )
        for name in names
        for images in (1, CASES[name].several)
    }
    print(
        json.dumps(
            {
                "benchmark": "engines",
                "default": DEFAULT,
                "target": TARGET,
                "cases": found,
                "load_average": {"before": load, "after": os.getloadavg()},
                "machine": {
                    "cpus": os.cpu_count(),
                    "platform": platform.platform(),
                    "python": platform.python_version(),
                    **{p: version(p) for p in ("consilium", "torch", "monai", "opacus")},
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
