"""Statistics of a site's cohort: sizes, intensities, classes, scanners; for the site alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.ingest.run import ingest, using
from consilium_client.data.manifest import Manifest, load_manifest
from consilium_client.data.match import class_names
from consilium_client.data.schema import Case
from consilium_client.data.split import SPLITS, assign_splits, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        found = np.fromiter(values, dtype=np.float64)
        return cls(float(found.min()), float(np.median(found)), float(found.max()))


@dataclass(frozen=True)
class ClassStatistics:
    """One class: where it occurs and, in masks, how large it is there."""

    cases: int
    patients: int
    voxels: int
    #: Volume in a case that has it, millilitres; None for class labels and where no size is known.
    millilitres: Spread | None


@dataclass(frozen=True)
class CohortStatistics:
    """What a site's cohort looks like.

    Parameters
    ----------
    unusable : int
        Cases of cases.csv that cannot be used; they are in no other number.
    splits : mapping
        Split to (patients, cases).
    shapes, spacings : sequence of Spread
        By axis of the cached arrays; millimetres. Spacings of cases that say them.
    channels : mapping
        Channel to the spread over cases of each of ``low, p01, mean, std, p99, high``.
    classes : mapping
        Local label name to its statistics.
    scanners, modalities, axes : mapping
        Value to number of cases.
    covariates : mapping
        Name to the spread of its numbers or the counts of its words, and how many are missing.
    """

    site: str
    cases: int
    patients: int
    unusable: int
    splits: Mapping[str, tuple[int, int]]
    shapes: Sequence[Spread]
    spacings: Sequence[Spread]
    channels: Mapping[str, Mapping[str, Spread]]
    classes: Mapping[str, ClassStatistics]
    scanners: Mapping[str, int]
    modalities: Mapping[str, int]
    axes: Mapping[str, int]
    covariates: Mapping[str, Mapping[str, Any]]
    #: The single values behind the plots; not part of the JSON.
    drawn: Drawn

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics for ``--json``."""
        content = asdict(self)
        del content["drawn"]
        content["splits"] = {
            name: {"patients": patients, "cases": cases}
            for name, (patients, cases) in self.splits.items()
        }
        return content


@dataclass(frozen=True)
class Drawn:
    """Single values for plots.

    Parameters
    ----------
    intensities : mapping
        Channel to (p01, mean, p99) per case.
    volumes : mapping
        Label name to millilitres per case that has it.
    spacings, shapes : sequence
        By axis, per case.
    """

    intensities: Mapping[str, Sequence[tuple[float, float, float]]]
    volumes: Mapping[str, Sequence[float]]
    shapes: Sequence[Sequence[float]]
    spacings: Sequence[Sequence[float]]


def cohort_statistics(
    home: SiteHome,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> CohortStatistics:
    """Describe the site's cohort; cases that are not in the cache are read first.

    Raises
    ------
    ConsiliumError
        ``data.no-manifest``; ``data.invalid`` where no case at all can be used; ``state.*``.
    """
    manifest = load_manifest(home)
    key = open_patient_key(home)
    with using(home):
        outcome = ingest(
            home,
            manifest,
            progress=None if progress is None else lambda n, of: progress("read", n, of),
            say=say,
        )
    good = [case for case in manifest.cases if case.case_id in outcome.entries]
    if not good:
        raise ConsiliumError(
            "data.invalid",
            "No case of this site can be used.",
            hint="`consilium site data check` says what is wrong.",
        )
    splits = assign_splits(good, key, manifest.site.split)
    patients = {case.case_id: key.name(case.patient_id) for case in good}
    entries = {case.case_id: outcome.entries[case.case_id] for case in good}
    listed = list(entries.values())
    # Planes and volumes in one cohort have no axes in common: those of the majority count.
    dimensions = Counter(len(entry.shape) for entry in listed).most_common(1)[0][0]
    alike = [entry for entry in listed if len(entry.shape) == dimensions]
    shapes = [[float(entry.shape[axis]) for entry in alike] for axis in range(dimensions)]
    known = [_edges(entry) for entry in alike if entry.spacing_known]
    spacings = [[edges[axis] for edges in known] for axis in range(dimensions)] if known else []
    names = list(manifest.site.inputs)
    classes, volumes = _classes(manifest, good, entries, patients)
    return CohortStatistics(
        site=manifest.site.site,
        cases=len(good),
        patients=len(set(patients.values())),
        unusable=len(manifest.cases) - len(good),
        splits={
            split: (
                sum(of == split for of in splits.values()),
                sum(splits[patients[case.case_id]] == split for case in good),
            )
            for split in SPLITS
        },
        shapes=[Spread.of(values) for values in shapes],
        spacings=[Spread.of(values) for values in spacings],
        channels={
            name: {
                figure: Spread.of(getattr(entry.facts[name], figure) for entry in listed)
                for figure in ("low", "p01", "mean", "std", "p99", "high")
            }
            for name in names
        },
        classes=classes,
        scanners=_counts(entry.scanner for entry in listed),
        modalities=_counts(entry.modality for entry in listed),
        axes=_counts(entry.axes for entry in listed),
        covariates={
            name: _covariate([case.covariates.get(name) for case in good])
            for name in manifest.site.covariates
        },
        drawn=Drawn(
            intensities={
                name: [
                    (entry.facts[name].p01, entry.facts[name].mean, entry.facts[name].p99)
                    for entry in listed
                ]
                for name in names
            },
            volumes=volumes,
            shapes=shapes,
            spacings=spacings,
        ),
    )


def _edges(entry: Ingested) -> list[float]:
    lengths = np.linalg.norm(entry.affine[:3, : len(entry.shape)], axis=0)
    return [float(length) for length in lengths]


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(value or UNKNOWN for value in values).most_common())


def _classes(
    manifest: Manifest,
    cases: Sequence[Case],
    entries: Mapping[str, Ingested],
    patients: Mapping[str, str],
) -> tuple[dict[str, ClassStatistics], dict[str, list[float]]]:
    """Return statistics by local label name, and the volumes in millilitres behind them."""
    site = manifest.site
    holders: dict[str, list[str]] = {name: [] for name in site.labels}
    voxels: Counter[str] = Counter()
    volumes: dict[str, list[float]] = {name: [] for name in site.labels}
    by_value = {value: name for name, value in site.labels.items()}
    for case in cases:
        entry = entries[case.case_id]
        if entry.label_values is None:
            for name in class_names(case.label, site):
                holders.setdefault(name, []).append(case.case_id)
            continue
        size = abs(float(np.linalg.det(entry.affine[:3, :3]))) / 1000
        for value, count in entry.label_counts.items():
            if value == 0:
                continue
            name = by_value.get(value, f"value {value}")
            holders.setdefault(name, []).append(case.case_id)
            voxels[name] += count
            if entry.spacing_known and len(entry.shape) == 3:
                volumes.setdefault(name, []).append(count * size)
    background = by_value.get(0) if site.label_kind == "mask" else None
    found = {
        name: ClassStatistics(
            cases=len(held),
            patients=len({patients[case] for case in held}),
            voxels=voxels[name],
            millilitres=Spread.of(volumes[name]) if volumes.get(name) else None,
        )
        for name, held in holders.items()
        if name != background
    }
    return found, {name: values for name, values in volumes.items() if values}


def _covariate(values: Sequence[float | str | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    if known and all(not isinstance(value, str) for value in known):
        return {"missing": missing, "numbers": Spread.of(float(value) for value in known)}
    return {"missing": missing, "words": dict(Counter(map(str, known)).most_common())}
