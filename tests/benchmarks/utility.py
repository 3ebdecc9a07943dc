"""Prints what privacy costs on real images, and what wins it back: `python FILE [--quick]`.

Dice of the hippocampus at three sites of 50, 30 and 20 patients, over ε = 1, 3, 8 and none, at
δ = 1e-3, with patient-level noise added at each site. Studies, training sessions, mechanism and
aggregation are the product's own, in one process; only the network between the sites is left out.

Of the Decathlon's 130 patients, 100 train at the sites. Ten are declared public and are never at a
site. Six are for validation: ``--validation`` scores on them alone, and only then can settings be
tried (``--set``). Fourteen are for test; figures are reported on these. JSON goes to standard
output, progress and a table to standard error.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from training_samples import MemoryCase, MemoryCohort, MemoryPatient

from consilium_client.training.session import TrainingSession
from consilium_common.models.registry import (
    initial_weights,
    start_weights,
    trained_count,
)
from consilium_common.models.weights import pack, unpack
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.study import Study
from consilium_server.aggregation import SiteUpdate, aggregate, cohort_weights, running_average

IMAGES = Path(__file__).resolve().parents[3] / "shared" / "data" / "hippocampus"
SITES: Final = {"a": 50, "b": 30, "c": 20}
PUBLIC, VALIDATION, TEST = 10, 6, 14
DELTA: Final = 1e-3

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Lever:
    """One way to train: the settings of a study, by the same names."""

    says: str
    channels: tuple[int, ...]
    trainable: str | tuple[str, ...]
    optimiser: Mapping[str, Any]
    clip_norm: float
    sampling_rate: float
    steps_per_round: int
    rounds: int
    averaging: float = 0.0
    copies: int = 1
    public_start: bool = False


LEVERS: Final = {
    "plain": Lever(
        says="small U-Net from random weights, all of it trained; SGD with momentum, eight local "
        "steps a round",
        channels=(4, 8, 16),
        trainable="all",
        optimiser={"name": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.0},
        clip_norm=0.2,
        sampling_rate=0.5,
        steps_per_round=8,
        rounds=20,
    ),
    "scratch": Lever(
        says="smaller U-Net from random weights; small clip, plain SGD, one step a round, so that "
        "noise is averaged over sites before the next gradient is taken",
        channels=(4, 4, 8),
        trainable="all",
        optimiser={"name": "sgd", "learning_rate": 3.0, "momentum": 0.0, "weight_decay": 0.0},
        clip_norm=0.1,
        sampling_rate=0.5,
        steps_per_round=1,
        rounds=160,
        averaging=0.8,
    ),
    "start": Lever(
        says="larger U-Net pre-trained on ten public patients with strong random augmentation; "
        "then first and last layer, one step a round",
        channels=(8, 16, 32),
        trainable="first+last",
        optimiser={"name": "sgd", "learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.0},
        clip_norm=0.1,
        sampling_rate=1.0,
        steps_per_round=1,
        rounds=20,
        averaging=0.8,
        public_start=True,
    ),
}
#: Without privacy every lever trains alike, so that its ceiling is that of its network.
PLAIN_STEPS: Final = {"steps_per_round": 20, "rounds": 12}
PRE_TRAINING_ROUNDS: Final = 12


@dataclass(frozen=True)
class Case:
    """One run of one study."""

    lever: str
    epsilon: float | None
    seed: int


# --- data --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def patients() -> tuple[MemoryPatient, ...]:
    """Return the 130 patients in the data set's own order, prepared as a site prepares them."""
    from consilium_client.data.ingest.nifti import read_nifti
    from consilium_client.data.prepare import prepare

    study = study_of(LEVERS["plain"], None, 0)
    found = []
    for entry in json.loads((IMAGES / "dataset.json").read_text())["training"]:
        image, label = (read_nifti(IMAGES / entry[key]) for key in ("image", "label"))
        pixels, classes, _ = prepare([image.values], label.values, image.affine, study)
        assert classes is not None
        found.append(MemoryPatient((MemoryCase(Path(entry["image"]).name, pixels, classes),)))
    return tuple(found)


def parts() -> dict[str, tuple[MemoryPatient, ...]]:
    """Return the patients of each site, and ``public``, ``validation`` and ``test``."""
    sizes = {**SITES, "public": PUBLIC, "validation": VALIDATION, "test": TEST}
    everybody = patients()
    assert len(everybody) == sum(sizes.values())
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = everybody[start : start + size]
        start += size
    return found


def _cohort(**splits: Sequence[MemoryPatient]) -> MemoryCohort:
    return MemoryCohort({name: list(split) for name, split in splits.items()})


# --- studies -----------------------------------------------------------------------------------


def study_of(
    lever: Lever, epsilon: float | None, seed: int, start: bytes | None = None, scale: float = 1.0
) -> Study:
    """Return the study of one case; ``scale`` shortens it (``--quick``)."""
    private = epsilon is not None
    optimiser = dict(lever.optimiser)
    length = {"steps_per_round": lever.steps_per_round, "rounds": lever.rounds}
    if not private:
        optimiser = {"name": "adamw", "learning_rate": 4e-3, "weight_decay": 1e-5}
        length = dict(PLAIN_STEPS)
    model: dict[str, Any] = {
        "network": "unet",
        "arguments": {"channels": list(lever.channels)},
        "trainable": lever.trainable if private else "all",
    }
    if start is not None:
        model["start"] = {
            "sha256": hashlib.sha256(start).hexdigest(),
            "data": f"{PUBLIC} patients of the Medical Segmentation Decathlon, Task04",
        }
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "utility",
            "task": {
                "kind": "segmentation",
                "dimensions": 3,
                "inputs": ["mri"],
                "classes": ["background", "anterior", "posterior"],
            },
            "model": model,
            "training": {
                "optimiser": optimiser,
                "steps_per_round": length["steps_per_round"],
                "patch": [32, 32, 32],
                "patches_per_patient": 2,
                "augmentation": {"copies": lever.copies if private else 1},
                "seed": seed,
            },
            "privacy": {
                "mode": "patient",
                "sampling_rate": lever.sampling_rate,
                "clip_norm": lever.clip_norm,
                "epsilon": epsilon,
                "delta": DELTA,
            }
            if private
            else {"mode": "none"},
            "federation": {
                "rounds": max(2, round(scale * length["rounds"])),
                "averaging": lever.averaging if private else 0.0,
            },
        }
    )


def pre_train(lever: Lever, seed: int, scale: float) -> bytes:
    """Train on the public patients, whose data is no secret, and return the weights packed."""
    study = study_of(lever, None, seed, scale=scale)
    strong = {"gain": 0.3, "shift": 0.5, "noise": 0.2}
    training = study.training.model_copy(
        update={"augmentation": study.training.augmentation.model_copy(update=strong)}
    )
    rounds = max(2, round(scale * PRE_TRAINING_ROUNDS))
    federation = study.federation.model_copy(update={"rounds": rounds})
    study = study.model_copy(update={"training": training, "federation": federation})
    session = TrainingSession(study, _cohort(train=parts()["public"]), device="cpu")
    weights = initial_weights(study)
    for index in range(rounds):
        weights = weights | session.train(weights, index, PUBLIC).tensors
    return pack(weights)


# --- one run -----------------------------------------------------------------------------------


def run(
    case: Case, lever: Lever, start: bytes | None, held_out: str, scale: float
) -> dict[str, Any]:
    """Run one study to its end and score it on the held-out patients."""
    began = time.monotonic()
    study = study_of(lever, case.epsilon, case.seed, start, scale)
    split = parts()
    sessions = {
        site: TrainingSession(study, _cohort(train=split[site]), device="cpu") for site in SITES
    }
    judge = TrainingSession(study, _cohort(test=split[held_out]), device="cpu")
    weights: Weights = initial_weights(study) if start is None else start_weights(study, start)
    before = judge.evaluate(weights, "test").mean_dice
    shares, decay = cohort_weights(SITES, study.federation.weighting), study.federation.averaging
    clips: dict[str, float | None] = dict.fromkeys(SITES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, average = folder / "model", folder / "average"
        for path in (model, average):
            path.write_bytes(pack(weights))
        for index in range(study.federation.rounds):
            for site, session in sessions.items():
                result = session.train(weights, index, SITES[site], clip_norm=clips[site])
                clips[site] = result.clip_norm
                (folder / site).write_bytes(pack(result.tensors))
            aggregate(
                study,
                model,
                [SiteUpdate(site, folder / site, shares[site], 1) for site in SITES],
                None,
                out=model,
                out_state=folder / "state",
                round_index=index,
            )
            running_average(average, model, decay=decay, rounds_done=index + 1, out=average)
            weights = unpack(model.read_bytes())
        averaged = unpack(average.read_bytes())
    after = judge.evaluate(averaged if decay else weights, "test")
    private = parameters(study)
    return asdict(case) | {
        "dice": after.mean_dice,
        "dice_by_class": {figure.name: figure.mean for figure in after.dice},
        "dice_of_start": before,
        "dice_of_last": judge.evaluate(weights, "test").mean_dice if decay else after.mean_dice,
        "trained_values": trained_count(study),
        "steps": study.total_steps,
        "noise_multiplier": None if private is None else private.noise_multiplier,
        "epsilon_by_pld": None
        if private is None
        else round(epsilon_of([private.event_total], DELTA), 3),
        "seconds": round(time.monotonic() - began, 1),
    }


def run_all(
    cases: Sequence[Case], levers: Mapping[str, Lever], held_out: str, scale: float, workers: int
) -> Iterator[dict[str, Any]]:
    """Run the cases, several at a time; the public starts first, one a seed."""
    wanted = sorted({(c.lever, c.seed) for c in cases if levers[c.lever].public_start})
    # Spawned and not forked: a copy of a process that has used torch may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        starts = {key: pool.submit(pre_train, levers[key[0]], key[1], scale) for key in wanted}
        blobs = {key: future.result() for key, future in starts.items()}
        futures = [
            pool.submit(run, c, levers[c.lever], blobs.get((c.lever, c.seed)), held_out, scale)
            for c in cases
        ]
        for future in futures:
            found = future.result()
            print(_line(found), file=sys.stderr, flush=True)
            yield found


# --- what is printed ---------------------------------------------------------------------------


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, least and most Dice over the seeds of each lever and ε."""
    rows: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for one in found:
        rows.setdefault((one["lever"], one["epsilon"]), []).append(one)
    return [
        {
            "lever": lever,
            "epsilon": epsilon,
            "seeds": len(group),
            "dice_mean": float(np.mean([one["dice"] for one in group])),
            "dice_least": min(one["dice"] for one in group),
            "dice_most": max(one["dice"] for one in group),
            "dice_of_start": float(np.mean([one["dice_of_start"] for one in group])),
        }
        for (lever, epsilon), group in rows.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary for people."""
    lines = ["lever     ε      Dice (least to most)   of the start   seeds"]
    lines += [
        f"{row['lever']:<9} {_epsilon(row['epsilon']):<6} {row['dice_mean']:.3f} "
        f"({row['dice_least']:.3f} to {row['dice_most']:.3f})   {row['dice_of_start']:.3f}"
        f"          {row['seeds']}"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw Dice over ε, one line a lever; without privacy at the right edge."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    finite = [row["epsilon"] for row in rows if row["epsilon"] is not None]
    edge = 3 * max(finite, default=8.0)
    for lever in dict.fromkeys(row["lever"] for row in rows):
        own = sorted(
            (row for row in rows if row["lever"] == lever),
            key=lambda row: math.inf if row["epsilon"] is None else row["epsilon"],
        )
        where = [edge if row["epsilon"] is None else row["epsilon"] for row in own]
        mean = [row["dice_mean"] for row in own]
        spread = [
            [row["dice_mean"] - row["dice_least"] for row in own],
            [row["dice_most"] - row["dice_mean"] for row in own],
        ]
        axes.errorbar(where, mean, yerr=spread, marker="o", capsize=3, label=lever)
    axes.set_xscale("log")
    ticks = [*sorted(set(finite)), edge]
    axes.set_xticks(ticks, [*(f"{e:g}" for e in sorted(set(finite))), "none"])
    axes.minorticks_off()
    axes.set(xlabel=f"ε per patient (δ = {DELTA:g})", ylabel="Dice, foreground", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def _epsilon(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['lever']} ε={_epsilon(found['epsilon'])} seed {found['seed']}: Dice "
        f"{found['dice']:.3f} (start {found['dice_of_start']:.3f}, last model "
        f"{found['dice_of_last']:.3f}), {found['seconds']:.0f} s"
    )


def _overridden(lever: Lever, settings: Sequence[str]) -> Lever:
    """Return ``lever`` with settings such as ``clip_norm=0.2`` or ``learning_rate=1``."""
    values = {field: getattr(lever, field) for field in lever.__dataclass_fields__}
    values["optimiser"] = dict(lever.optimiser)
    for setting in settings:
        name, _, text = setting.partition("=")
        value = json.loads(text) if text[:1] in "[0123456789" else text
        if name in ("learning_rate", "momentum", "weight_decay", "name"):
            values["optimiser"][name] = value
        elif name in values and name != "optimiser":
            values[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise SystemExit(f"there is no setting {name!r}")
    return Lever(**values)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", nargs="+", help="of 1 3 8 none (default: all)")
    parser.add_argument("--seeds", type=int, help="seeds from 0 (default: 3)")
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--quick", action="store_true", help="half as long, ε 8 and none, a seed")
    parser.add_argument("--validation", action="store_true", help="score on validation patients")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="try a setting")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--plot", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    if chosen.set and not chosen.validation:
        parser.error("--set is for choosing settings: give --validation too")
    epsilons = chosen.epsilon or (["8", "none"] if chosen.quick else ["1", "3", "8", "none"])
    seeds = chosen.seeds or (1 if chosen.quick else 3)
    levers = {name: _overridden(LEVERS[name], chosen.set) for name in chosen.levers}
    cases = [
        Case(lever, None if epsilon == "none" else float(epsilon), seed)
        for seed in range(seeds)
        for lever in levers
        for epsilon in epsilons
    ]
    held_out = "validation" if chosen.validation else "test"
    scale = 0.5 if chosen.quick else 1.0
    found = list(run_all(cases, levers, held_out, scale, chosen.workers))
    rows = summary(found)
    report = {
        "question": f"foreground Dice on {held_out} patients, sites of 50, 30 and 20 patients",
        "unit": "patient",
        "adjacency": "add-or-remove-one",
        "model": "silo-local",
        "delta": DELTA,
        "public": f"{PUBLIC} of the Decathlon's patients, at no site and in no test",
        "levers": {name: lever.says for name, lever in levers.items()},
        "summary": rows,
        "runs": found,
        "machine": {"processors": os.cpu_count(), "torch": version("torch")},
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))
    print(table(rows), file=sys.stderr)
    if chosen.plot is not None:
        plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
