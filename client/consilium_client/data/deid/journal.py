"""Which original became which clean file: what resuming needs, in the site's home alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from consilium_client.data.deid.clean import Rules
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder


@dataclass(frozen=True)
class Record:
    """One file copied.

    Parameters
    ----------
    source : Path
        The original; ``size`` and ``changed_at`` (ns) tell whether it is still the same.
    new : Path
        The clean file, which has ``bytes`` bytes.
    changed : Counter of str
        Tags that were removed, emptied or replaced.
    """

    source: Path
    size: int
    changed_at: int
    new: Path
    bytes: int
    changed: Counter[str]

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(
            {
                **self.__dict__,
                "source": str(self.source),
                "new": str(self.new),
                "changed": dict(self.changed),
            }
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Record:
        """Read one line back."""
        return cls(
            **{
                **content,
                "source": Path(content["source"]),
                "new": Path(content["new"]),
                "changed": Counter(content["changed"]),
            }
        )


@dataclass
class Journal:
    """The record of one copy, in ``data/deidentified/`` of the site's home (0600)."""

    path: Path
    out: Path
    _records: dict[Path, Record] = field(default_factory=dict)
    _names: set[Path] = field(default_factory=set)
    _stream: IO[str] | None = None

    @classmethod
    def open(cls, home: SiteHome, folder: Path, out: Path, rules: Rules) -> Journal:
        """Open the journal of a copy, or begin it.

        Raises
        ------
        ConsiliumError
            ``usage.folder`` when ``out`` holds something else, or a copy made otherwise.
        """
        name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
        path = private_folder(home.data / "deidentified") / f"{name}.jsonl"
        head = {"folder": str(folder), "out": str(out), **rules.to_dict()}
        lines = path.read_text().splitlines() if path.is_file() else []
        filled = out.exists() and (not out.is_dir() or any(out.iterdir()))
        same = bool(lines) and lines[0] == json.dumps(head)
        if filled and not same:
            raise ConsiliumError(
                "usage.folder",
                "The folder for the copy is not empty, and holds no copy of this folder made with "
                "these options.",
                where=str(out),
                hint="Give an empty folder, or the same folder and options to go on.",
            )
        journal = cls(path, out)
        if not same or not filled:
            # A private file from its first byte on.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(json.dumps(head) + "\n")
            return journal
        for line in lines[1:]:
            try:
                record = Record.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue  # The line a killed run was writing: its file is copied again.
            journal._take(record)
        return journal

    def has(self, source: Path) -> bool:
        """Whether the copy holds this file as it is now; a stale copy is taken away."""
        record = self._records.get(source)
        if record is None:
            return False
        there = record.new.is_file() and record.new.stat().st_size == record.bytes
        if there and unchanged(record):
            return True
        record.new.unlink(missing_ok=True)
        del self._records[source]
        self._names.discard(record.new)
        return False

    def names(self, new: Path) -> bool:
        """Whether a clean file of this name is noted already."""
        return new in self._names

    def _take(self, record: Record) -> None:
        self._records[record.source] = record
        self._names.add(record.new)

    def add(self, record: Record) -> None:
        """Note a file that is in place now."""
        self._take(record)
        if self._stream is not None:
            self._stream.write(record.to_json() + "\n")
            self._stream.flush()

    def records(self) -> list[Record]:
        """Return all records, by new name."""
        return sorted(self._records.values(), key=lambda record: record.new)

    def __enter__(self) -> Journal:
        self._stream = self.path.open("a")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def unchanged(record: Record) -> bool:
    """Whether the original is the file that was copied."""
    try:
        stat = record.source.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (record.size, record.changed_at)
