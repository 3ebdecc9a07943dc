"""Ingest of all cases of a manifest: what is unchanged is left, what is wrong is collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import (
    FORMAT,
    FolderWriter,
    Ingested,
    entry_of,
    ingested_folder,
    load_entry,
    stamp_of,
)
from consilium_client.data.ingest.sources import (
    Source,
    Sources,
    content_digest,
    read_image,
    read_label,
)
from consilium_client.data.ingest.volume import (
    Array,
    Volume,
    as_labels,
    canonical,
    compact,
    require_same_grid,
)
from consilium_client.data.manifest import Manifest
from consilium_client.data.schema import Case, SiteManifest
from consilium_client.home import SiteHome
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError

#: In the label column: a case with none of the classes (multi-label).
NO_CLASS: Final = "-"


@dataclass(frozen=True)
class IngestOutcome:
    """What an ingest found.

    ``entries`` has every good case by case_id; ``read`` counts those whose files were read now.
    """

    entries: Mapping[str, Ingested]
    findings: tuple[Finding, ...]
    read: int


def ingest(
    home: SiteHome,
    manifest: Manifest,
    *,
    sources: Sources | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestOutcome:
    """Bring every case of ``manifest`` into the cache.

    Defects of a case become findings; a full disk or an interruption ends the run, and the next
    one goes on from the cases that are done.

    Parameters
    ----------
    sources : Sources, optional
        Where an importer has already read DICOM headers.
    progress : callable, optional
        Called with (cases done, cases).

    Raises
    ------
    ConsiliumError
        ``state.disk``, ``state.busy``.
    """
    found = sources or Sources(manifest.root)
    entries: dict[str, Ingested] = {}
    findings: list[Finding] = []
    read = 0
    folder = ingested_folder(home)
    with FolderWriter(folder) as writer:
        for number, case in enumerate(manifest.cases, start=1):
            try:
                entry, was_read = _ingest_case(writer, folder, manifest.site, case, found)
                _check_label(case, manifest.site, entry)
                entries[case.case_id] = entry
                read += was_read
            except ConsiliumError as error:
                if not error.code.startswith("data."):
                    raise
                findings.append(Finding.of(case.case_id, error))
            if progress is not None:
                progress(number, len(manifest.cases))
    return IngestOutcome(entries, tuple(findings), read)


@contextmanager
def writing(home: SiteHome) -> Iterator[None]:
    """Hold the site's data for writing: one import at a time.

    Raises
    ------
    ConsiliumError
        ``state.busy``.
    """
    import fcntl

    with (home.data / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConsiliumError(
                "state.busy",
                "Another command is writing this site's data.",
                where=str(home.data),
                hint="Wait until it has finished.",
            ) from error
        yield


@contextmanager
def using(home: SiteHome) -> Iterator[None]:
    """Hold the site's data for use: many at once, after a running import has finished."""
    import fcntl

    with (home.data / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def classes_of(case: Case) -> tuple[str, ...]:
    """Return the classes in the label column; several are separated by ``|`` or ``;``."""
    if case.label == NO_CLASS:
        return ()
    return tuple(part.strip() for part in re.split(r"[|;]", case.label) if part.strip())


def local_names(site: SiteManifest) -> Mapping[str, str]:
    """Return what cases.csv may call a class (its name or its value) to the local label name."""
    names = {str(value): name for name, value in site.labels.items()}
    return {**names, **{name: name for name in site.labels}}


def cached_entry(
    home: SiteHome, site: SiteManifest, case: Case, sources: Sources
) -> Ingested | None:
    """Return the case from the cache, or None where its files are gone or have changed."""
    try:
        return load_entry(ingested_folder(home) / _located(site, case, sources).stamp(case))
    except ConsiliumError:
        return None


@dataclass(frozen=True)
class _Located:
    """The files behind one case."""

    images: Mapping[str, Source]
    label: Source | None
    #: Values of DICOM SEG labels; None for other labels.
    segments: Mapping[str, int] | None

    def stamp(self, case: Case) -> str:
        return stamp_of(case, self.images, self.label, self.segments)


def _located(site: SiteManifest, case: Case, sources: Sources) -> _Located:
    images = {name: sources.find(case.images[name]) for name in site.inputs}
    if not case.label:
        raise ConsiliumError(
            "data.no-label",
            "The image has no label.",
            where=" and ".join(source.where for source in images.values()),
            hint="Add its label, or leave the image out (--skip-bad does).",
        )
    label = sources.find(case.label) if site.label_kind == "mask" else None
    segments = (
        {name: int(value) for name, value in site.labels.items()}
        if label is not None and label.kind == "dicom"
        else None
    )
    return _Located(images, label, segments)


def _ingest_case(
    writer: FolderWriter, folder: Path, site: SiteManifest, case: Case, sources: Sources
) -> tuple[Ingested, bool]:
    located = _located(site, case, sources)
    folder = folder / located.stamp(case)
    entry = load_entry(folder)
    if entry is not None:
        return entry, False
    arrays, content = _read_case(located.images, located.label, located.segments or {})
    writer.add(folder.name, arrays, content)
    return entry_of(folder, content), True


def _read_case(
    images: Mapping[str, Source], label: Source | None, segments: Mapping[str, int]
) -> tuple[dict[str, Array], dict[str, Any]]:
    arrays: dict[str, Array] = {}
    first: Volume | None = None
    first_where = ""
    mask: Volume | None = None
    for name, source in images.items():
        volume, slices = read_image(source)
        if first is None:
            first, first_where = volume, source.where
            if label is not None:
                mask = read_label(label, volume, slices, segments, source.where)
        else:
            require_same_grid(
                first,
                volume,
                what="Two channels of a case",
                where=f"{first_where} and {source.where}",
                hint="Register the channels to each other and resample them on one grid.",
            )
            # Shares of a voxel apart at most: the first channel's place holds for all.
            volume = Volume(volume.values, first.affine, first.spacing_known)
        arrays[f"image_{name}"] = compact(canonical(volume).values)
    if first is None:
        raise ValueError("a case without channels")
    turned = canonical(first)
    values: list[int] | None = None
    digests = {name: content_digest(source) for name, source in images.items()}
    segmented = dict(segments) if label is not None and label.kind == "dicom" else None
    if mask is not None and label is not None:
        arrays["label"] = as_labels(canonical(mask).values, label.where)
        values = [int(value) for value in np.flatnonzero(np.bincount(arrays["label"].ravel()))]
        digests["label"] = content_digest(label)
    content = {
        "shape": turned.values.shape,
        "affine": turned.affine.tolist(),
        "original_shape": first.values.shape,
        "original_affine": first.affine.tolist(),
        "spacing": turned.spacing,
        "spacing_known": first.spacing_known,
        "channels": list(images),
        "label_values": values,
        "sources": digests,
        "content": digest({"format": FORMAT, "sources": digests, "segments": segmented}),
    }
    return arrays, content


def _check_label(case: Case, site: SiteManifest, entry: Ingested) -> None:
    """Check that the label says only what site.yaml lists (where it lists anything)."""
    if not site.labels:
        return
    if entry.label_values is not None:
        unknown: list[Any] = sorted(set(entry.label_values) - {0, *site.labels.values()})
        what = "The mask holds the value"
    else:
        known = local_names(site)
        unknown = [name for name in classes_of(case) if name not in known]
        what = "The label column holds"
    if unknown:
        raise ConsiliumError(
            "data.label-unknown",
            f"{what} {unknown[0]}, which site.yaml does not list.",
            where=case.label if site.label_kind == "mask" else "cases.csv",
            hint="Add it under `labels` in site.yaml, or correct the label.",
        )
