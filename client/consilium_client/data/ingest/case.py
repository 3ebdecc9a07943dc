"""One case: the files behind it, and its arrays and facts as the cache keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consilium_client.data.ingest.cache import FORMAT, stamp_of
from consilium_client.data.ingest.dicom_file import is_compressed
from consilium_client.data.ingest.dicom_headers import Header
from consilium_client.data.ingest.facts import channel_facts
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
    axes_of,
    canonical,
    compact,
    require_same_grid,
)
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:  # a reader imports what it reads with, and no more
    from consilium_client.data.schema import Case, SiteManifest


@dataclass(frozen=True)
class Located:
    """The files behind one case."""

    images: Mapping[str, Source]
    label: Source | None
    #: Values of named segments and regions; None for labels without names of their own.
    segments: Mapping[str, int] | None

    @property
    def is_dicom(self) -> bool:
        """Whether a file is DICOM."""
        return any(source.kind == "dicom" for source in self._sources())

    @property
    def is_plain(self) -> bool:
        """Whether no file is a picture: what numpy and zlib read, they read safely in threads."""
        return all(source.kind != "picture" for source in self._sources())

    @property
    def may_crash(self) -> bool:
        """Whether a file is compressed DICOM: some decoders end the process on a bad file."""
        return any(
            is_compressed(path)
            for source in self._sources()
            if source.kind == "dicom"
            for path in source.files
        )

    def _sources(self) -> list[Source]:
        return [*self.images.values(), *([self.label] if self.label else [])]

    def stamp(self, case: Case) -> str:
        """Return the digest of what the files are: where they lie, how long, of which time."""
        return stamp_of(case, self.images, self.label, self.segments)


def locate(site: SiteManifest, case: Case, sources: Sources) -> Located:
    """Return the files behind a case, without reading pixels.

    Raises
    ------
    ConsiliumError
        ``data.missing``, ``data.no-label`` or ``data.format``.
    """
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
        if label is not None and label.named
        else None
    )
    return Located(images, label, segments)


def read_case(located: Located) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a case's pixels.

    Returns
    -------
    (arrays, content)
        ``image_<channel>`` and ``label`` in the nearest RAS+ order, and what case.json holds.

    Raises
    ------
    ConsiliumError
        ``data.*``, one rule per defect.
    """
    label, segments = located.label, located.segments or {}
    arrays: dict[str, Array] = {}
    slices: list[Header] = []
    first: Volume | None = None
    turned: Volume | None = None
    first_where = ""
    mask: Volume | None = None
    known: dict[Path, bytes] = {}
    for name, source in located.images.items():
        volume, headers = read_image(source, known)
        slices += headers[:1]
        if first is None:
            first, first_where = volume, source.where
            if label is not None:
                mask = read_label(label, volume, headers, segments, source.where)
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
        # Compact first: turning moves half the bytes then.
        turned = canonical(Volume(compact(volume.values), volume.affine, volume.spacing_known))
        arrays[f"image_{name}"] = np.ascontiguousarray(turned.values)
    if first is None or turned is None:
        raise ValueError("a case without channels")
    counts: dict[int, int] = {}
    digests = {name: content_digest(source, known) for name, source in located.images.items()}
    if mask is not None and label is not None:
        labels = Volume(as_labels(mask.values, label.where), mask.affine, mask.spacing_known)
        arrays["label"] = np.ascontiguousarray(canonical(labels).values)
        voxels = np.bincount(arrays["label"].ravel())
        counts = {int(value): int(voxels[value]) for value in np.flatnonzero(voxels)}
        digests["label"] = content_digest(label)
    content = {
        "shape": turned.values.shape,
        "affine": turned.affine.tolist(),
        "original_shape": first.values.shape,
        "original_affine": first.affine.tolist(),
        "spacing_known": first.spacing_known,
        "channels": list(located.images),
        "label_values": None if mask is None else list(counts),
        "label_counts": {str(value): count for value, count in counts.items()},
        "facts": {
            name: channel_facts(arrays[f"image_{name}"]).to_dict() for name in located.images
        },
        "scanner": _joined(header.scanner for header in slices),
        "modality": _joined(header.modality for header in slices),
        "axes": _axes(first),
        "sources": digests,
        "content": digest({"format": FORMAT, "sources": digests, "segments": located.segments}),
    }
    return arrays, content


def _joined(values: Iterable[str]) -> str:
    """Return the channels' different values, in order."""
    return " + ".join(dict.fromkeys(value for value in values if value))


def _axes(volume: Volume) -> str:
    """Return where each of the image's own axes runs to, for example LPS."""
    if not volume.spacing_known:
        return ""
    return axes_of(volume.affine)[: volume.values.ndim]
