"""What `--fix` may do: mend our own files and rights. Images and case lists are never touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from consilium_client.data.ingest.cache import cache_folder, ingested_folder
from consilium_client.home import SiteHome
from consilium_common.report.wording import plural


def apply_fixes(home: SiteHome) -> tuple[str, ...]:
    """Mend what can be mended without a person's judgement, and say it, one line each.

    Closes folders and files to other users, removes what interrupted imports left, and removes
    damaged entries of the cache, which the next ingest fills again. The caller holds the site's
    data for writing.
    """
    lines = []
    for path in open_to_others(home):
        path.chmod(0o700 if path.is_dir() else 0o600)
        lines.append(f"Closed {path.relative_to(home.path.parent)} to other users.")
    left = list(_leftovers(home))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    if left:
        lines.append(f"Removed {plural(len(left), 'folder')} that an interrupted import had left.")
    damaged = list(damaged_entries(home))
    for path in damaged:
        shutil.rmtree(path, ignore_errors=True)
    if damaged:
        lines.append(f"Removed {plural(len(damaged), 'damaged entry')} of the cache to fill again.")
    return tuple(lines)


def open_to_others(home: SiteHome) -> tuple[Path, ...]:
    """Return the site's folders and key files that other users may read or write."""
    looked = [home.path, *(path for path in sorted(home.path.iterdir()) if path.is_dir())]
    keys = home.path / "identity"
    if keys.is_dir():
        looked += [path for path in sorted(keys.iterdir()) if path.is_file()]
    return tuple(path for path in looked if not path.is_symlink() and _mode(path) & 0o077)


def damaged_entries(home: SiteHome) -> Iterator[Path]:
    """Yield ingested and prepared cases in the cache that cannot be read as they were written."""
    folders = [ingested_folder(home)]
    prepared = cache_folder(home) / "prepared"
    if prepared.is_dir():
        folders += [path for path in prepared.iterdir() if path.is_dir()]
    for parent in folders:
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and not _sound(folder):
                yield folder


def _leftovers(home: SiteHome) -> Iterator[Path]:
    cache = cache_folder(home)
    for pattern in ("ingested/.part-*", "prepared/*/.part-*"):
        yield from (path for path in cache.glob(pattern) if path.is_dir())


def _sound(folder: Path) -> bool:
    """Whether case.json is whole and every array of ingested cases has its place and shape."""
    try:
        content: dict[str, Any] = json.loads((folder / "case.json").read_bytes())
        names = [f"image_{name}" for name in content.get("channels", ())]
        if content.get("label_values") is not None:
            names.append("label")
        for path in (*(folder / f"{name}.npy" for name in names), *folder.glob("*.npy")):
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # a short file does not map
            if path.stem in names and list(array.shape) != list(content["shape"]):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777
