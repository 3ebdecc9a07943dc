"""An archive in memory for the tests of a pull, and series to put into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from data_fixtures import write_slices

from consilium_client.data.pacs.archive import (
    FoundSeries,
    FoundStudy,
    Instance,
    Keep,
    StudyQuery,
    instance_of,
    series_of,
    study_of,
)


@dataclass
class MemoryArchive:
    """Holds objects as bytes; ``studies`` ignores what it is asked, as some archives do."""

    objects: dict[str, bytes] = field(default_factory=dict)
    listed: dict[str, tuple[FoundSeries, Instance]] = field(default_factory=dict)
    fetched: list[tuple[str, int, bool]] = field(default_factory=list)
    queries: list[StudyQuery] = field(default_factory=list)

    def add(self, files: Sequence[Path]) -> FoundSeries:
        """Take in the files of one series."""
        for path in files:
            dataset = pydicom.dcmread(path)
            dataset.NumberOfSeriesRelatedInstances = len(files)
            found = series_of(study_of(dataset), dataset)
            instance = instance_of(dataset)
            self.listed[instance.uid] = (found, instance)
            self.objects[instance.uid] = path.read_bytes()
        return found

    def studies(self, query: StudyQuery) -> list[FoundStudy]:
        self.queries.append(query)
        return list(dict.fromkeys(series.study for series, _ in self.listed.values()))

    def series(self, study: FoundStudy) -> list[FoundSeries]:
        return list(dict.fromkeys(s for s, _ in self.listed.values() if s.study == study))

    def instances(self, series: FoundSeries) -> list[Instance]:
        return [instance for found, instance in self.listed.values() if found.uid == series.uid]

    def fetch(
        self, series: FoundSeries, wanted: Sequence[Instance], *, whole: bool, keep: Keep
    ) -> None:
        self.fetched.append((series.uid, len(wanted), whole))
        for instance in wanted:
            keep(self.objects[instance.uid])

    def close(self) -> None:
        """Nothing is open."""


def series_files(
    folder: Path, *, images: int = 3, patient: str = "P-17", **changes: str
) -> list[Path]:
    """Write one CT series of ``images`` small slices."""
    values = np.zeros((6, 5, images))
    told = {"StudyDate": "20240305", "Modality": "CT", **changes}
    return write_slices(folder, values, patient=patient, changes=told)
