"""What a check found in files that have not changed since, so that it reads them no second time.

It lies in the cache (0700, emptied by `site data purge`) under the digest of the files' places,
sizes and times. It holds findings, whose words identify nobody, their pictures, and keyed hashes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import cache_folder
from consilium_client.home import SiteHome
from consilium_common import __version__
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic

#: Raised whenever the same files would now be judged otherwise.
_FORMAT: Final = 1


@dataclass(frozen=True)
class Remembered:
    """What is known of a set of files."""

    findings: tuple[Finding, ...] = ()
    #: Keyed hashes of the people that the files' tags name.
    persons: tuple[str, ...] = ()


class Memory:
    """Findings by set of files; what is not asked for between opening and saving is forgotten.

    Parameters
    ----------
    path : Path
        The JSON file; a missing or damaged one is an empty memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = _read(path)
        self._now: dict[str, Remembered] = {}

    @classmethod
    def open(cls, home: SiteHome) -> Memory:
        """Open the site's memory."""
        return cls(private_folder(cache_folder(home) / "doctor") / "memory.json")

    def recall(self, key: str) -> Remembered | None:
        """Return what is known of the files with this key, or None where they are new."""
        known = self._old.get(key)
        if known is not None:
            self._now[key] = known
        return known

    def keep(self, key: str, found: Remembered) -> None:
        """Remember what was found in the files with this key."""
        self._now[key] = found

    def save(self) -> None:
        """Write the memory, where it has changed.

        Raises
        ------
        ConsiliumError
            ``state.disk``.
        """
        if self._now == self._old:
            return
        content = {key: _to_json(found) for key, found in self._now.items()}
        # After a crash it is only asked again: nobody waits for the disk.
        write_atomic(self._path, json.dumps(content).encode(), durable=False)


def files_key(case: str, files: Iterable[Path]) -> str:
    """Return the digest of where files lie, how long they are and when they changed, and of whose.

    Raises
    ------
    ConsiliumError
        ``data.missing`` where one is gone.
    """
    stamps = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise ConsiliumError(
                "data.missing", "The file is gone.", where=str(path), hint="Restore the file."
            ) from error
        stamps.append([str(path), status.st_size, status.st_mtime_ns])
    return digest({"format": _FORMAT, "version": __version__, "case": case, "files": stamps})


def _to_json(found: Remembered) -> dict[str, Any]:
    findings = [
        {
            "case": one.case,
            "code": one.code,
            "message": one.message,
            "where": one.where,
            "hint": one.hint,
            "pictures": [base64.b64encode(picture).decode() for picture in one.pictures],
        }
        for one in found.findings
    ]
    return {"findings": findings, "persons": list(found.persons)}


def _from_json(content: dict[str, Any]) -> Remembered:
    findings = tuple(
        Finding(
            **{**one, "pictures": tuple(base64.b64decode(picture) for picture in one["pictures"])}
        )
        for one in content["findings"]
    )
    return Remembered(findings, tuple(content["persons"]))


def _read(path: Path) -> dict[str, Remembered]:
    try:
        content = json.loads(path.read_bytes())
        return {key: _from_json(found) for key, found in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
