"""Room for the cache: what will be written, what the site allows, and what may go first."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from consilium_client.data.findings import reading
from consilium_client.data.ingest.cache import cache_folder, size_of
from consilium_client.data.ingest.case import Located
from consilium_client.data.ingest.dicom_headers import read_header
from consilium_client.data.ingest.nifti import open_nifti
from consilium_client.data.ingest.sources import Source
from consilium_client.data.ingest.volume import MAX_VOXELS
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic

#: Cases looked at for an estimate; the others are taken to be like them.
_SAMPLE: Final = 24
#: Voxels that a byte of a file can hold at most: no common codec packs denser.
_DENSEST: Final = 4096
#: A recipe opened this recently may be in use by a command, whatever runs.
_SETTLED_SECONDS: Final = 24 * 3600.0


def estimated_bytes(cases: Sequence[Located]) -> int:
    """Return about how many bytes the cases will take in the cache, from headers alone."""
    sample = cases[:: -(-len(cases) // _SAMPLE)] if cases else ()
    if not sample:
        return 0
    found = 0
    for case in sample:
        channels = [_channel_size(source) for source in case.images.values()]
        label = channels[0][0] if case.label else 0
        found += sum(voxels * size for voxels, size in channels) + label
    return found * len(cases) // len(sample)


def make_room(home: SiteHome, needed: int, quota_gib: float | None) -> int:
    """See that ``needed`` bytes fit on the disk and into the site's quota; return the free bytes.

    Where they do not, prepared forms that no running study uses are deleted first, those that
    were opened longest ago before others: they are made again when they are needed.

    Raises
    ------
    ConsiliumError
        ``state.quota`` or ``state.disk``, before anything is written.
    """
    folder = cache_folder(home)
    idle = _idle_recipes(home)
    while True:
        free = shutil.disk_usage(folder).free
        used = size_of(folder) if quota_gib is not None else 0
        allowed = float("inf") if quota_gib is None else quota_gib * 2**30
        if needed <= free and used + needed <= allowed:
            return free
        if not idle:
            break
        shutil.rmtree(idle.pop(0), ignore_errors=True)
    if used + needed > allowed:
        raise ConsiliumError(
            "state.quota",
            f"The cache takes {in_words(used)} and needs {in_words(needed)} more; site.yaml allows "
            f"{quota_gib:g} GiB.",
            where="site.yaml: cache_quota_gib",
            hint="Raise the quota, import fewer cases, or end studies that are not needed.",
        )
    raise ConsiliumError(
        "state.disk",
        f"The cache needs about {in_words(needed)} more; {in_words(free)} are free on its disk.",
        where=str(folder),
        hint="Free space on the disk, or move the site's folder to a larger one; then run the "
        "command again.",
    )


def cache_sizes(home: SiteHome) -> tuple[int, int]:
    """Return the bytes of cases as they were imported, and of cases prepared for studies."""
    folder = cache_folder(home)
    return size_of(folder / "ingested"), size_of(folder / "prepared")


def in_words(size: float) -> str:
    """Return bytes as a person reads them, for example ``1.4 GiB``."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    digits = 0 if size >= 100 or units[0] == "bytes" else 1
    return f"{size:.{digits}f} {units[0]}"


def note_use(home: SiteHome, recipe: str, study: str) -> None:
    """Note that a study, by its digest, uses a folder of prepared cases now."""
    path = _uses_folder(home) / f"{recipe}.json"
    uses = {**_uses(path), study: time.time()}
    write_atomic(path, json.dumps(uses).encode(), durable=False)


def _uses_folder(home: SiteHome) -> Path:
    return private_folder(cache_folder(home) / "uses")


def _uses(path: Path) -> dict[str, float]:
    try:
        uses: dict[str, float] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return uses


def _idle_recipes(home: SiteHome) -> list[Path]:
    """Return folders of prepared cases that no running study uses, longest unused first."""
    prepared = cache_folder(home) / "prepared"
    if not prepared.is_dir():
        return []
    try:
        running = set(json.loads(home.running.read_bytes()))
    except (OSError, ValueError):
        running = set()
    settled = time.time() - _SETTLED_SECONDS
    found = []
    for recipe in prepared.iterdir():
        uses = _uses(_uses_folder(home) / f"{recipe.name}.json")
        last = max(uses.values(), default=recipe.stat().st_mtime)
        if not running & uses.keys() and last < settled:
            found.append((last, recipe))
    return [recipe for _, recipe in sorted(found)]


# --- estimates ---------------------------------------------------------------------------------


def _channel_size(source: Source) -> tuple[int, int]:
    """Return voxels and bytes per voxel of a cached channel: what the header names, or what the
    files' sizes suggest.

    What the ingest will refuse takes no room: a header may claim anything.
    """
    length = sum(path.stat().st_size for path in source.files)
    voxels, size = length, {"dicom": 2, "picture": 1}.get(source.kind, 4)
    if source.kind == "nifti":
        with suppress(ConsiliumError), reading(source.files[0], "NIfTI file"):
            header = open_nifti(source.files[0]).header
            stored, scaled = header.get_data_dtype(), header.get_slope_inter()[0] not in (None, 1)
            voxels = _product(header.get_data_shape()[:3])
            # compact() keeps small integers small
            size = 4 if scaled or stored.kind == "f" else min(4, stored.itemsize)
    elif source.kind == "dicom" and source.files:
        with suppress(ConsiliumError):
            first = read_header(source.files[0])
            if first is not None and first.rows:
                voxels = first.rows * first.columns * first.frames * len(source.files)
    elif source.kind == "picture":
        from PIL import Image

        bomb = Image.DecompressionBombError
        with suppress(OSError, ValueError, bomb), Image.open(source.files[0]) as picture:
            voxels = _product(picture.size)
    return 0 if voxels > min(MAX_VOXELS, length * _DENSEST) else voxels, size


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= max(1, int(size))
    return total
