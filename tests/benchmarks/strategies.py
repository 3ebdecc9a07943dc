"""Prints how strategies do on real images split unevenly: `python FILE [--quick]`.

Dice of the hippocampus at three sites, without privacy. Two splits of the Decathlon's 130 patients:
``size`` (at random, 70, 20 and 10 of a hundred who train) and ``intensity`` (one site for each of
three clusters of the images' own intensities, which are as many ways of scanning and exporting).
Every image is brought to mean 0 and deviation 1, as in any study of ours; the clusters differ all
the same. About one patient in four of every site is for test.

Each site's figure is that of the model it would use: its personal one where the strategy makes one,
else the global one. ``pooled`` trains one model on all patients together, which no federation may;
``local`` trains each site alone. All take equally many steps with one optimiser. Training sessions
and aggregation are the product's own, in one process. JSON goes to standard output, progress and a
table to standard error.
"""

from __future__ import annotations

import argparse
import json
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

from training_samples import MemoryCohort, MemoryPatient
from utility import IMAGES, patients

from consilium_client.training.session import TrainingSession
from consilium_common.models.exchange import steps_of
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study
from consilium_server.aggregation import SiteUpdate, aggregate, cohort_weights, offered

STRATEGIES: Final[dict[str, dict[str, Any]]] = {
    "fedavg": {"name": "fedavg"},
    "fedprox": {"name": "fedprox", "mu": 0.1},
    "scaffold": {"name": "scaffold"},
    "fedadam": {"name": "fedadam", "server_learning_rate": 0.3, "tau": 0.03},
    "ditto": {"name": "ditto", "pull": 0.1},
    "fedbn": {"name": "fedbn"},
}
ALONE: Final = ("pooled", "local")
SPLITS: Final = ("size", "intensity")
SHARES: Final = (0.7, 0.2, 0.1)
TEST_SHARE: Final = 3 / 13
ROUNDS, STEPS = 40, 10

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """One way to train on one split."""

    split: str
    strategy: str
    seed: int


# --- data --------------------------------------------------------------------------------------


def site_of_patients(split: str, seed: int) -> NDArray[np.int64]:
    """Return the number of each patient's site, the largest site first."""
    everybody = len(patients())
    if split == "size":
        order = np.random.default_rng(seed).permutation(everybody)
        ends = np.round(np.cumsum(SHARES) * everybody).astype(int)
        sites = np.empty(everybody, dtype=np.int64)
        sites[order] = np.searchsorted(ends, np.arange(everybody), side="right")
        return sites
    clusters = _clusters(np.log(_mean_intensities()), len(SHARES))
    by_size = np.argsort(-np.bincount(clusters), kind="stable")
    return np.argsort(by_size)[clusters]


def _mean_intensities() -> NDArray[np.float64]:
    """Return the mean of each image's values as they were exported."""
    from consilium_client.data.ingest.nifti import read_nifti

    entries = json.loads((IMAGES / "dataset.json").read_text())["training"]
    return np.array([read_nifti(IMAGES / entry["image"]).values.mean() for entry in entries])


def _clusters(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the cluster of each number: k-means on a line, begun at the quantiles."""
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    while True:
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        moved = np.array([values[nearest == k].mean() for k in range(count)])
        if np.allclose(moved, centres):
            return nearest
        centres = moved


def cohorts(split: str, seed: int) -> dict[str, MemoryCohort]:
    """Return the three sites' patients."""
    everybody, sites = patients(), site_of_patients(split, seed)
    rng = np.random.default_rng([seed, 1])
    found = {}
    for number in range(len(SHARES)):
        own: list[MemoryPatient] = [
            everybody[i] for i in rng.permutation(np.flatnonzero(sites == number))
        ]
        test = max(2, round(TEST_SHARE * len(own)))
        found["abc"[number]] = MemoryCohort({"test": own[:test], "train": own[test:]})
    return found


# --- one run -----------------------------------------------------------------------------------


def study_of(case: Case, rounds: int) -> Study:
    """Return the study of one case."""
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "strategies",
            "task": {
                "kind": "segmentation",
                "dimensions": 3,
                "inputs": ["mri"],
                "classes": ["background", "anterior", "posterior"],
            },
            # Batch norm, because that is what FedBN is about.
            "model": {"network": "unet", "arguments": {"channels": [4, 8, 16], "norm": "batch"}},
            "training": {
                "optimiser": {"name": "sgd", "learning_rate": 0.3, "weight_decay": 0.0},
                "steps_per_round": STEPS,
                "patch": [32, 32, 32],
                "seed": case.seed,
            },
            "privacy": {"mode": "none"},
            "federation": {
                "rounds": rounds,
                "strategy": STRATEGIES.get(case.strategy, {"name": "fedavg"}),
            },
        }
    )


def federated(study: Study, parts: Mapping[str, MemoryCohort], folder: Path) -> dict[str, Weights]:
    """Train over all sites; return the model that each would use."""
    sessions = {site: TrainingSession(study, part, device="cpu") for site, part in parts.items()}
    sizes = {site: len(part.splits["train"]) for site, part in parts.items()}
    shares = cohort_weights(sizes, study.federation.weighting)
    kept: dict[str, Weights] = {site: {} for site in parts}
    model, state = folder / "model", None
    model.write_bytes(pack(initial_weights(study)))
    for index in range(study.federation.rounds):
        sent = unpack(offered(study, model, state, folder / "offered").read_bytes())
        updates = []
        for site, session in sessions.items():
            result = session.train(sent, index, sizes[site], kept=kept[site])
            kept[site] = kept[site] | result.kept
            path = folder / f"update-{site}"
            path.write_bytes(pack(result.tensors))
            updates.append(SiteUpdate(site, path, shares[site], steps_of(study, sizes[site])))
        combined = aggregate(
            study,
            model,
            updates,
            state,
            out=folder / f"model-{index}",
            out_state=folder / f"state-{index}",
            round_index=index,
        )
        model, state = folder / f"model-{index}", combined.state
    last = unpack(model.read_bytes())
    return {site: session.personal(last, kept[site]) or last for site, session in sessions.items()}


def alone(study: Study, cohort: MemoryCohort) -> Weights:
    """Train on one cohort by itself, for as many steps as a site makes."""
    session = TrainingSession(study, cohort, device="cpu")
    weights: Weights = initial_weights(study)
    for index in range(study.federation.rounds):
        weights = session.train(weights, index, len(cohort.splits["train"])).tensors
    return weights


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Run one case to its end and score each site's model on the site's own test patients."""
    began = time.monotonic()
    study, parts = study_of(case, rounds), cohorts(case.split, case.seed)
    if case.strategy == "pooled":
        everybody = [one for part in parts.values() for one in part.splits["train"]]
        models = dict.fromkeys(parts, alone(study, MemoryCohort({"train": everybody})))
    elif case.strategy == "local":
        models = {site: alone(study, part) for site, part in parts.items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            models = federated(study, parts, Path(folder))
    dice = {site: _dice(study, part, models[site]) for site, part in parts.items()}
    everyone = np.concatenate(list(dice.values()))
    return asdict(case) | {
        "dice": float(everyone.mean()),
        "dice_by_site": {site: float(values.mean()) for site, values in dice.items()},
        "train": {site: len(part.splits["train"]) for site, part in parts.items()},
        "test": {site: len(values) for site, values in dice.items()},
        "seconds": round(time.monotonic() - began, 1),
    }


def _dice(study: Study, part: MemoryCohort, weights: Weights) -> NDArray[np.float64]:
    """Return each test patient's Dice, the mean over the foreground classes that are there."""
    found = TrainingSession(study, part, device="cpu").evaluate(weights, "test")
    return np.array(
        [np.mean([v for v in row.values.values() if v is not None]) for row in found.rows]
    )


def run_all(cases: Sequence[Case], rounds: int, workers: int) -> Iterator[dict[str, Any]]:
    """Run the cases, several at a time."""
    # Spawned and not forked: a copy of a process that has used torch may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for found in pool.map(run, cases, [rounds] * len(cases)):
            text = f"{found['split']} {found['strategy']} seed {found['seed']}: {found['dice']:.3f}"
            print(f"{text}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
            yield found


# --- what is printed ---------------------------------------------------------------------------


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean Dice over the seeds of each split and strategy, by patient and by site."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in found:
        rows.setdefault((one["split"], one["strategy"]), []).append(one)
    return [
        {
            "split": split,
            "strategy": strategy,
            "seeds": len(group),
            "dice": float(np.mean([one["dice"] for one in group])),
            "dice_by_site": {
                site: float(np.mean([one["dice_by_site"][site] for one in group]))
                for site in group[0]["dice_by_site"]
            },
        }
        for (split, strategy), group in rows.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary as Markdown: a line a strategy, Dice of all and of each site."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    lines = [
        "| Dice | " + " | ".join(f"{split}: all | a | b | c" for split in splits) + " |",
        "|---" * (1 + 4 * len(splits)) + "|",
    ]
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        cells = []
        for split in splits:
            row = next(r for r in rows if (r["split"], r["strategy"]) == (split, strategy))
            cells += [f"{row['dice']:.3f}", *(f"{v:.3f}" for v in row["dice_by_site"].values())]
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    names = [*ALONE, *STRATEGIES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, help="seeds from 0 (default: 3)")
    parser.add_argument("--quick", action="store_true", help="half as long, one seed")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    chosen = parser.parse_args()
    rounds = ROUNDS // 2 if chosen.quick else ROUNDS
    cases = [
        Case(split, strategy, seed)
        for seed in range(chosen.seeds or (1 if chosen.quick else 3))
        for split in chosen.splits
        for strategy in chosen.strategies
    ]
    found = list(run_all(cases, rounds, chosen.workers))
    rows = summary(found)
    report = {
        "question": "foreground Dice of the model that each site would use, on its own test "
        "patients",
        "rounds": rounds,
        "steps_per_round": STEPS,
        "strategies": {name: STRATEGIES.get(name, {}) for name in chosen.strategies},
        "summary": rows,
        "runs": found,
        "machine": {"processors": os.cpu_count(), "torch": version("torch")},
    }
    print(json.dumps(report, indent=2))
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
