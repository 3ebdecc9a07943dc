"""The shipped studies on real images, through real processes: shared by tests and benchmarks."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from federation import NAMES, Federation, Site

from consilium_common.study.examples import example_study

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
#: Patients of the three sites that train; 30 more are kept as test, in the same proportion.
HIPPOCAMPUS_TRAIN = (50, 30, 20)
HIPPOCAMPUS_TEST = (15, 9, 6)
MEDNIST_SHARES = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class Finished:
    """A study that ran to its end."""

    study: dict[str, Any]  #: as `study show --json`
    results: dict[str, dict[str, Any]]  #: by site, as `site results --json`
    seconds: float  #: from `study run` to the end


@contextmanager
def hippocampus_sites(folder: Path) -> Iterator[Federation]:
    """Three hospitals of unequal size with the 130 patients of the Decathlon's Task04."""
    images = SHARED / "hippocampus"
    cases = json.loads((images / "dataset.json").read_text())["training"]
    rows = iter(
        {
            "case_id": Path(case["image"]).name.removesuffix(".nii.gz"),
            "image": str(images / case["image"]),
            "label": str(images / case["label"]),
        }
        for case in cases
    )
    with _federation(folder) as federation:
        lists = {}
        for name, train, test in zip(NAMES, HIPPOCAMPUS_TRAIN, HIPPOCAMPUS_TEST, strict=True):
            splits = ["train"] * train + ["test"] * test
            lists[name] = _case_list(
                folder / f"{name}.csv",
                [{**next(rows), "split": split} for split in splits],
            )
        classes = ("background=0", "anterior=1", "posterior=2")
        labels = [part for label in classes for part in ("--label", label)]
        _start_sites(federation, lists, ("--input", "mri", *labels))
        yield federation


@contextmanager
def mednist_sites(folder: Path) -> Iterator[Federation]:
    """Three hospitals with MedNIST's 1500 images; every image is a patient, 20 % are test."""
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in NAMES}
    for kind in sorted(path for path in (SHARED / "mednist").iterdir() if path.is_dir()):
        images = sorted(kind.iterdir())
        start = 0
        for name, share in zip(NAMES, MEDNIST_SHARES, strict=True):
            end = start + round(share * len(images))
            for index, image in enumerate(images[start:end]):
                rows[name].append(
                    {
                        "case_id": f"{kind.name}-{image.stem}",
                        "image": str(image),
                        "label": kind.name.lower(),
                        "split": "test" if index % 5 == 0 else "train",
                    }
                )
            start = end
    with _federation(folder) as federation:
        lists = {name: _case_list(folder / f"{name}.csv", rows[name]) for name in NAMES}
        _start_sites(federation, lists, ("--input", "image"))
        yield federation


def run_example(
    federation: Federation, name: str, *, timeout: float, rounds: int | None = None
) -> Finished:
    """Propose a shipped study, have all sites approve it, run it to its end.

    ``rounds`` shortens it; a private one still spends its whole ε, in fewer and louder steps.
    """
    study: dict[str, Any] = yaml.safe_load(example_study(name).read_text())
    path = federation.folder / f"{name}.yaml"
    path.write_bytes(example_study(name).read_bytes())
    if rounds is not None:
        study["federation"]["rounds"] = rounds
        path.write_text(yaml.safe_dump(study))
    digest: str = federation.study("propose", path).data["digest"]
    federation.approve(digest)
    started = time.monotonic()
    federation.study("run", digest).data  # noqa: B018
    shown = federation.study("watch", digest, timeout=timeout).data
    seconds = time.monotonic() - started
    assert len(shown["rounds"]) == study["federation"]["rounds"]
    results = {name: site("results", digest).data for name, site in federation.sites.items()}
    return Finished(shown, results, seconds)


def pooled_dice(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return Dice by class over the test patients of all sites together, and ``mean``."""
    names = list(next(iter(results.values()))["dice"])
    dice = {
        name: sum(r["dice"][name]["total"] for r in results.values())
        / sum(r["dice"][name]["count"] for r in results.values())
        for name in names
    }
    return {**dice, "mean": sum(dice.values()) / len(dice)}


def _federation(folder: Path) -> Federation:
    folder.mkdir(parents=True, exist_ok=True)
    return Federation(folder)


def _case_list(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        columns = ("case_id", "patient_id", "image", "label", "split")
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({**row, "patient_id": row["case_id"]} for row in rows)
    return path


def _start_sites(
    federation: Federation, lists: Mapping[str, Path], options: tuple[str, ...]
) -> None:
    def add(name: str) -> Site:
        site = federation.join(name)
        site("data", "import", lists[name], *options).data  # noqa: B018
        return site

    with ThreadPoolExecutor(3) as pool:
        sites = list(pool.map(add, lists))
    # From this thread: a site is tied to the one that starts it.
    for site in sites:
        site.launch()
    for site in sites:
        site.wait_until_ready()
