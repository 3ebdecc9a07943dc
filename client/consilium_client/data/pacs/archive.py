"""What an archive can do for us, whichever protocol it speaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from consilium_common.errors import ConsiliumError

_UID: Final = re.compile(r"[0-9][0-9.]{0,63}")


@dataclass(frozen=True)
class StudyQuery:
    """What the archive itself is asked to match; empty matches everything.

    Parameters
    ----------
    accession, patient : str
        Exact identifiers.
    modality : str
        Some series of the study has it.
    dates : str
        ``YYYYMMDD-YYYYMMDD``, either side open; as DICOM PS3.4 C.2.2.2.5 has it.
    """

    accession: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)
    modality: str = ""
    dates: str = ""


@dataclass(frozen=True)
class FoundStudy:
    """A study as the archive lists it. Identity is for comparison and never shown."""

    uid: str
    date: str = field(default="", repr=False)
    description: str = field(default="", repr=False)
    accession: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)


@dataclass(frozen=True)
class FoundSeries:
    """A series as the archive lists it.

    Parameters
    ----------
    images : int or None
        NumberOfSeriesRelatedInstances; None where the archive does not tell.
    """

    study: FoundStudy
    uid: str
    modality: str
    description: str = field(default="", repr=False)
    images: int | None = None


@dataclass(frozen=True)
class Instance:
    """One object of a series."""

    uid: str
    sop_class: str


#: Takes one received object as a DICOM file's bytes; raises ConsiliumError to refuse it.
Keep = Callable[[bytes], None]


class Archive(Protocol):
    """One open archive. Every method raises ConsiliumError with a code ``pacs.*``;
    :class:`~consilium_client.data.pacs.retry.TransientError` where trying again may help.
    """

    def studies(self, query: StudyQuery) -> list[FoundStudy]:
        """List the studies that match."""
        ...

    def series(self, study: FoundStudy) -> list[FoundSeries]:
        """List the series of a study."""
        ...

    def instances(self, series: FoundSeries) -> list[Instance]:
        """List the objects of a series."""
        ...

    def fetch(
        self, series: FoundSeries, wanted: Sequence[Instance], *, whole: bool, keep: Keep
    ) -> None:
        """Have ``wanted`` sent, each given to ``keep``; ``whole`` where that is all of the series.

        Returning does not promise that everything came: count what was kept.
        """
        ...

    def close(self) -> None:
        """End all connections and stop listening."""
        ...


def study_of(dataset: Any) -> FoundStudy:
    """Read a match at study level."""
    return FoundStudy(
        uid=uid_of(dataset, "StudyInstanceUID"),
        date=text_of(dataset, "StudyDate"),
        description=text_of(dataset, "StudyDescription"),
        accession=text_of(dataset, "AccessionNumber"),
        patient=text_of(dataset, "PatientID"),
    )


def series_of(study: FoundStudy, dataset: Any) -> FoundSeries:
    """Read a match at series level."""
    told = text_of(dataset, "NumberOfSeriesRelatedInstances")
    return FoundSeries(
        study=study,
        uid=uid_of(dataset, "SeriesInstanceUID"),
        modality=text_of(dataset, "Modality").upper(),
        description=text_of(dataset, "SeriesDescription"),
        images=int(told) if told.isdecimal() else None,
    )


def instance_of(dataset: Any) -> Instance:
    """Read a match at image level."""
    return Instance(uid_of(dataset, "SOPInstanceUID"), uid_of(dataset, "SOPClassUID"))


def text_of(dataset: Any, keyword: str) -> str:
    """Return an attribute as text without its padding; empty where it is absent."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def uid_of(dataset: Any, keyword: str) -> str:
    """Return a UID; what is none is an answer we do not go on with (``pacs.answer``)."""
    value = text_of(dataset, keyword)
    if not _UID.fullmatch(value):
        raise ConsiliumError(
            "pacs.answer",
            f"The archive's answer has no valid {keyword}.",
            hint="Tell the archive's administrator; its answers break the DICOM standard.",
        )
    return value
