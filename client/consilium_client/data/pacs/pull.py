"""A pull: series after series, each whole and checked before it counts, resumed where it ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from consilium_client.data.pacs.archive import Archive, FoundSeries
from consilium_client.data.pacs.download import Download, public_name
from consilium_client.data.pacs.retry import BackOff, IncompleteError, SeriesError, patiently
from consilium_common.errors import ConsiliumError


@dataclass(frozen=True)
class Step:
    """How far a pull is.

    Parameters
    ----------
    series, of : int
        Series that are done, and all.
    position : int
        Images that lie behind, those of earlier pulls included, as the archive counts them.
    images : int
        Images received by this pull.
    bytes : int
        Their size.
    """

    series: int
    of: int
    position: int
    images: int
    bytes: int


@dataclass(frozen=True)
class Pulled:
    """What a pull brought.

    Parameters
    ----------
    series : int
        Series received now.
    already : int
        Series that were whole before.
    images, bytes : int
        Received now.
    failures : tuple of (str, ConsiliumError)
        Folder name of each series that is not whole, and why.
    """

    series: int
    already: int
    images: int
    bytes: int
    failures: tuple[tuple[str, ConsiliumError], ...]

    def check(self) -> None:
        """Raise one error where a series failed: its own, or ``pacs.incomplete`` for several."""
        if not self.failures:
            return
        if len(self.failures) == 1:
            raise self.failures[0][1]
        counts = Counter(error.code for _, error in self.failures)
        listed = ", ".join(f"{number} × {code}" for code, number in sorted(counts.items()))
        raise ConsiliumError(
            "pacs.incomplete",
            f"{len(self.failures)} series could not be pulled: {listed}.",
            where=", ".join(name for name, _ in self.failures[:5]),
            hint="All others are there. Give the same command again to try these once more.",
        )


def pull(
    archive: Archive,
    wanted: Sequence[FoundSeries],
    download: Download,
    back_off: BackOff,
    *,
    progress: Callable[[Step], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Pulled:
    """Fetch every series of ``wanted`` that is not whole yet.

    Raises
    ------
    ConsiliumError
        What stops the whole pull: the archive cannot be reached any more, refuses us, or sends
        what was not asked for; or the disk is full. What is whole by then stays.
    """
    already = received = 0
    failures: list[tuple[str, ConsiliumError]] = []
    tally = _Tally(len(wanted), progress)
    for series in wanted:
        if download.is_whole(series):
            already += 1
        else:
            fetching = _Fetching(archive, series, download, tally)
            try:
                patiently(fetching.attempt, back_off, progress=tally.count, say=say, sleep=sleep)
                received += 1
            except SeriesError as error:
                failures.append((public_name(series.uid), error))
                say(f"{error.message} Going on with the next series.")
        tally.series_done(series)
    return Pulled(received, already, tally.images, tally.bytes, tuple(failures))


class _Tally:
    """What has come so far."""

    def __init__(self, of: int, progress: Callable[[Step], None]) -> None:
        self.images = 0
        self.bytes = 0
        self._series = 0
        self._behind = 0
        self._current = 0
        self._of = of
        self._progress = progress

    def count(self) -> int:
        """Return the images so far: while it grows, the archive is worth waiting for."""
        return self.images

    def add(self, images: int, size: int) -> None:
        """Count what was kept."""
        self.images += images
        self.bytes += size
        self._current += images
        self._show()

    def series_done(self, series: FoundSeries) -> None:
        """Count a series, whatever became of it."""
        self._series += 1
        self._behind += series.images or 0
        self._current = 0
        self._show()

    def _show(self) -> None:
        self._progress(
            Step(self._series, self._of, self._behind + self._current, self.images, self.bytes)
        )


class _Fetching:
    """One series over all its attempts."""

    def __init__(
        self, archive: Archive, series: FoundSeries, download: Download, tally: _Tally
    ) -> None:
        self._archive = archive
        self._series = series
        self._download = download
        self._tally = tally

    def attempt(self) -> None:
        """Fetch what is missing, count it, and record the series once it is whole."""
        instances = self._archive.instances(self._series)
        told = self._series.images or 0
        if not instances or len(instances) < told:
            raise SeriesError(
                "pacs.count",
                f"The archive counts {told} images in a series and lists {len(instances)}.",
                where=public_name(self._series.uid),
                hint="Ask the archive's administrator to check the series; the others are pulled.",
            )
        inbox = self._download.inbox(self._series, instances)
        missing = inbox.missing

        def keep(content: bytes) -> None:
            before = inbox.kept, inbox.bytes
            inbox.keep(content)
            self._tally.add(inbox.kept - before[0], inbox.bytes - before[1])

        if missing:
            whole = len(missing) == len(instances)
            self._archive.fetch(self._series, missing, whole=whole, keep=keep)
        if inbox.missing:
            here = len(instances) - len(inbox.missing)
            raise IncompleteError(
                "pacs.incomplete",
                f"Of {len(instances)} images of a series the archive sent {here}.",
                where=public_name(self._series.uid),
                hint="Give the same command again later: it asks for the rest alone.",
            )
        self._download.record(self._series, inbox)
