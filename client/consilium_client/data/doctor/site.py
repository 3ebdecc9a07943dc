"""The quick facts about a site's own house: who may read it, room on the disk, a sound cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Final

from consilium_client.data.doctor.fixes import damaged_entries, open_to_others
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import cache_folder, size_of
from consilium_client.home import SiteHome
from consilium_common.report.wording import data_size, plural

#: Less room than this, and updates, ledgers and logs are soon in the way of each other.
_ROOM: Final = 2 * 10**9
_FIX: Final = "Run the command again with --fix."


@dataclass(frozen=True)
class Part:
    """One part of the site that was looked at.

    Parameters
    ----------
    name : str
        Of the part.
    said : str
        The facts, in one line.
    findings : tuple of Finding
        What is wrong with it.
    """

    name: str
    said: str
    findings: tuple[Finding, ...]


def rights(home: SiteHome) -> Part:
    """Look who may read the site's folders and keys."""
    found = open_to_others(home)
    findings = tuple(
        Finding(
            "",
            "state.open-to-others",
            f"Other users of this machine may use it (mode {path.stat().st_mode & 0o777:04o}).",
            str(path),
            _FIX,
        )
        for path in found
    )
    said = f"{plural(len(found), 'place')} open to other users" if found else "yours alone"
    return Part("rights", said, findings)


def disk(home: SiteHome) -> Part:
    """Look at the room on the disk, beside what the cache takes."""
    free, used = shutil.disk_usage(home.path).free, size_of(cache_folder(home))
    said = f"{data_size(free)} free; the cache of images takes {data_size(used)}"
    needed = max(_ROOM, used)
    if free >= needed:
        return Part("disk", said, ())
    finding = Finding(
        "",
        "state.disk-low",
        f"{data_size(free)} are free, and the cache takes {data_size(used)}.",
        str(home.path),
        "Free space, move the site's folder to a larger disk, or empty the cache: "
        "consilium site data purge.",
    )
    return Part("disk", said, (finding,))


def cache(home: SiteHome) -> Part:
    """Look for cases in the cache of images that cannot be read as they were written."""
    damaged = list(damaged_entries(home))
    findings = tuple(
        Finding(
            "",
            "state.cache-damaged",
            "A case in the cache of images is damaged.",
            str(path),
            f"{_FIX} It is read again from the original files.",
        )
        for path in damaged
    )
    entries = sum(1 for path in (cache_folder(home) / "ingested").glob("*/case.json"))
    said = f"{plural(entries, 'case')}, {len(damaged) or 'none'} damaged"
    return Part("cache", said, findings)
