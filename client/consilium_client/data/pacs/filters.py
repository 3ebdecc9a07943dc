"""Which series of an archive are wanted, and how they are found."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Final, TextIO, TypeVar

from consilium_client.data.pacs.archive import Archive, FoundSeries, FoundStudy, StudyQuery
from consilium_client.data.pacs.retry import BackOff, patiently
from consilium_common.errors import ConsiliumError

T = TypeVar("T")

_PATIENT: Final = BackOff()
#: In a query these would match other patients too (DICOM PS3.4 C.2.2.2).
_WILD: Final = re.compile(r"[*?\\\x00-\x1f\x7f]")
_LONGEST: Final = 64
_MODALITY: Final = re.compile(r"[A-Z0-9_]{1,16}")


@dataclass(frozen=True)
class Filters:
    """What is wanted; every condition must hold, and one that is empty always does.

    Parameters
    ----------
    modalities : tuple of str
        Any of these, in capitals.
    since, until : date or None
        Of the study, both included.
    study, series : str
        Patterns of the descriptions; ``*`` and ``?`` as in file names, capitals do not matter.
    accessions, patients : mapping
        Identifier to its line in the list it came from.
    min_images : int
        Series with fewer images are left out.
    """

    modalities: tuple[str, ...] = ()
    since: dt.date | None = None
    until: dt.date | None = None
    study: str = ""
    series: str = ""
    accessions: Mapping[str, int] = field(default_factory=dict, repr=False)
    patients: Mapping[str, int] = field(default_factory=dict, repr=False)
    min_images: int = 0

    def __post_init__(self) -> None:
        for modality in self.modalities:
            if not _MODALITY.fullmatch(modality):
                raise ConsiliumError(
                    "usage.modality",
                    "A modality has capitals and digits only.",
                    hint="For example --modality CT.",
                )
        if self.since and self.until and self.since > self.until:
            raise ConsiliumError("usage.dates", "--from lies after --to.")
        if not any(
            (
                self.modalities,
                self.since,
                self.until,
                self.study,
                self.series,
                self.accessions,
                self.patients,
            )
        ):
            raise ConsiliumError(
                "usage.no-filter",
                "Without a filter the whole archive would be pulled.",
                hint="Say what the study needs: a modality, dates, a description, or a list.",
            )

    def queries(self) -> Iterator[StudyQuery]:
        """Ask for one identifier at a time, or for one modality at a time.

        Descriptions are not asked for: archives differ in whether capitals matter there.
        """
        dates = ""
        if self.since or self.until:
            since, until = (f"{day:%Y%m%d}" if day else "" for day in (self.since, self.until))
            dates = f"{since}-{until}"
        if self.accessions:
            yield from (StudyQuery(accession=name, dates=dates) for name in self.accessions)
        elif self.patients:
            yield from (StudyQuery(patient=name, dates=dates) for name in self.patients)
        else:
            yield from (StudyQuery(modality=name, dates=dates) for name in self.modalities or ("",))

    def wants_study(self, study: FoundStudy) -> bool:
        """Check again here: archives may ignore keys they do not support."""
        if (self.since or self.until) and not self._within(study.date):
            return False
        return (
            (not self.accessions or study.accession in self.accessions)
            and (not self.patients or study.patient in self.patients)
            and _fits(study.description, self.study)
        )

    def wants_series(self, series: FoundSeries) -> bool:
        """Whether modality and description fit; the number of images is not looked at."""
        return (not self.modalities or series.modality in self.modalities) and _fits(
            series.description, self.series
        )

    def _within(self, date: str) -> bool:
        try:
            day = dt.datetime.strptime(date, "%Y%m%d").date()
        except ValueError:
            return False
        return (not self.since or self.since <= day) and (not self.until or day <= self.until)


def _fits(text: str, pattern: str) -> bool:
    return not pattern or fnmatchcase(text.casefold(), pattern.casefold())


@dataclass(frozen=True)
class Selection:
    """The series found.

    Parameters
    ----------
    series : tuple of FoundSeries
        In the archive's order, each once.
    unmatched : tuple of int
        Lines of the list whose identifier has no study that is wanted.
    more : bool
        The limit was reached: there may be more.
    """

    series: tuple[FoundSeries, ...]
    unmatched: tuple[int, ...] = ()
    more: bool = False


def find(
    archive: Archive,
    filters: Filters,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    back_off: BackOff = _PATIENT,
    say: Callable[[str], None] = lambda _: None,
) -> Selection:
    """Find the series that ``filters`` want.

    Parameters
    ----------
    limit : int, optional
        Most series to return.
    progress : callable
        Called with the number of series found so far.
    back_off, say
        As in :func:`~consilium_client.data.pacs.retry.patiently`, for every question.
    """

    def ask(question: Callable[[], T]) -> T:
        return patiently(question, back_off, say=say)

    found: dict[str, FoundSeries] = {}
    seen: set[str] = set()
    missed = {**filters.accessions} or {**filters.patients}
    more = False
    for query in filters.queries():
        for study in ask(partial(archive.studies, query)):
            if study.uid in seen or not filters.wants_study(study):
                continue
            seen.add(study.uid)
            missed.pop(study.accession if filters.accessions else study.patient, None)
            for series in ask(partial(archive.series, study)):
                if not filters.wants_series(series) or not ask(
                    partial(_enough, archive, series, filters)
                ):
                    continue
                if limit is not None and len(found) >= limit:
                    more = True
                    break
                found.setdefault(series.uid, series)
                progress(len(found))
            if more:
                break
        if more:
            break
    # With a limit the rest of the list was never asked for.
    return Selection(tuple(found.values()), () if more else tuple(missed.values()), more)


def _enough(archive: Archive, series: FoundSeries, filters: Filters) -> bool:
    if not filters.min_images:
        return True
    count = len(archive.instances(series)) if series.images is None else series.images
    return count >= filters.min_images


def read_identifiers(stream: TextIO, where: str) -> dict[str, int]:
    """Read one identifier per line; empty lines are passed over.

    Returns
    -------
    dict
        Identifier to its line (from 1).

    Raises
    ------
    ConsiliumError
        ``usage.identifiers`` with the line; the identifier itself is not repeated.
    """
    found: dict[str, int] = {}
    try:
        for number, line in enumerate(stream, start=1):
            name = line.strip().removeprefix("\ufeff")
            if _WILD.search(name) or len(name) > _LONGEST:
                raise ConsiliumError(
                    "usage.identifiers",
                    "This line is no identifier: it has a wildcard (* ? \\) or is too long.",
                    where=f"{where}:{number}",
                    hint="Put one accession number or patient identifier on each line.",
                )
            if name:
                found.setdefault(name, number)
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            "usage.identifiers", "The list is not UTF-8 text.", where=where
        ) from error
    if not found:
        raise ConsiliumError("usage.identifiers", "The list is empty.", where=where)
    return found
