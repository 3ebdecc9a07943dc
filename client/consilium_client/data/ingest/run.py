"""Ingest of all cases of a manifest: what is unchanged is left, what is wrong is collected."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import (
    FolderWriter,
    Ingested,
    entry_of,
    ingested_folder,
    load_entry,
)
from consilium_client.data.ingest.case import Located, locate, read_case
from consilium_client.data.ingest.dicom_file import quietly
from consilium_client.data.ingest.readers import CaseRead, read_cases, readers_for
from consilium_client.data.ingest.room import estimated_bytes, in_words, make_room
from consilium_client.data.ingest.sources import Sources
from consilium_client.data.manifest import Manifest
from consilium_client.data.match import class_names
from consilium_client.data.parallel import side_by_side
from consilium_client.data.schema import Case, SiteManifest
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import plural

#: From so many unread cases on, child processes read them: starting them takes half a second.
_WORTH_CHILDREN: Final = 9
#: Bytes of a case from which threads gain more than they wait for each other.
_WORTH_THREADS: Final = 2 * 2**20
#: Cases so small together are read here, unless a decoder may end the process.
_SMALL_BYTES: Final = 128 * 2**20


@dataclass(frozen=True)
class IngestOutcome:
    """What an ingest found.

    ``entries`` has every good case by case_id; ``read`` counts those whose files were read now.
    """

    entries: Mapping[str, Ingested]
    findings: tuple[Finding, ...]
    read: int


def ingest(
    home: SiteHome,
    manifest: Manifest,
    *,
    sources: Sources | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> IngestOutcome:
    """Bring every case of ``manifest`` into the cache.

    More than a few cases are read by child processes, side by side. Defects of a case become
    findings, also where a file crashes or hangs its reader; a full disk or an interruption ends
    the run, and the next one goes on from the cases that are done.

    Parameters
    ----------
    sources : Sources, optional
        Where an importer has already read DICOM headers.
    progress : callable, optional
        Called with (cases done, cases).
    say : callable, optional
        Takes one line on how much room the cache will take, before it is filled.

    Raises
    ------
    ConsiliumError
        ``state.disk``, ``state.quota``, ``state.busy``.
    """
    found = sources or Sources(manifest.root)
    outcomes: dict[int, Ingested | ConsiliumError] = {}
    unread: dict[int, _Unread] = {}
    folder = ingested_folder(home)
    for number, case in enumerate(manifest.cases):
        try:
            located = locate(manifest.site, case, found)
            name = located.stamp(case)
        except ConsiliumError as error:
            outcomes[number] = error
            continue
        entry = load_entry(folder / name)
        if entry is None:
            unread[number] = _Unread(name, located)
        else:
            outcomes[number] = entry
    children = needed = 0
    if unread:
        needed = estimated_bytes([case.located for case in unread.values()])
        free = make_room(home, needed, manifest.site.cache_quota_gib)
        if say is not None:
            say(
                f"{plural(len(unread), 'case')} to read: about {in_words(needed)} in the cache; "
                f"{in_words(free)} are free on its disk."
            )
        children = _children_for([case.located for case in unread.values()], needed)
    with FolderWriter(folder) as writer, closing(_read(writer, unread, children, needed)) as done:
        if progress is not None and (outcomes or not unread):
            progress(len(outcomes), len(manifest.cases))
        for number, outcome in done:
            if isinstance(outcome, CaseRead):
                name = unread[number].name
                writer.adopt(outcome.folder, name, outcome.size)
                outcomes[number] = entry_of(folder / name, outcome.content)
            else:
                outcomes[number] = outcome
            if progress is not None:
                progress(len(outcomes), len(manifest.cases))
    return _sorted_out(manifest, outcomes, unread)


@dataclass(frozen=True)
class _Unread:
    """A case that is not in the cache, and the folder it will have there."""

    name: str
    located: Located


def _children_for(cases: Sequence[Located], needed: int) -> int:
    """Return by how many child processes cases are read; 0: in this one."""
    many = len(cases) >= _WORTH_CHILDREN
    if not (many and needed >= _SMALL_BYTES) and not any(case.may_crash for case in cases):
        return 0
    return readers_for(len(cases)) if many else 1


def _read(
    writer: FolderWriter, unread: Mapping[int, _Unread], children: int, needed: int
) -> Generator[tuple[int, CaseRead | ConsiliumError]]:
    """Read cases of about ``needed`` bytes in so many child processes, or here."""
    tasks = [(number, case.located) for number, case in unread.items()]
    if children:
        yield from read_cases(tasks, writer.folder, readers=children)
        return
    large = needed > _WORTH_THREADS * len(tasks)
    plain = large and all(located.is_plain for _, located in tasks)
    dicom = plain and any(located.is_dicom for _, located in tasks)
    # Threads share what silences pydicom: it is silent throughout, as long as they run.
    with quietly() if dicom else nullcontext():
        read = side_by_side(partial(_attempt, writer), tasks, threads=None if plain else 1)
        with closing(read):
            yield from read


def _attempt(
    writer: FolderWriter, task: tuple[int, Located]
) -> tuple[int, CaseRead | ConsiliumError]:
    number, located = task
    try:
        arrays, content = read_case(located)
    except ConsiliumError as error:
        return number, error
    return number, CaseRead(*writer.write(arrays, content), content)


def _sorted_out(
    manifest: Manifest,
    outcomes: Mapping[int, Ingested | ConsiliumError],
    unread: Mapping[int, _Unread],
) -> IngestOutcome:
    """Return entries and findings in the order of cases.csv."""
    entries: dict[str, Ingested] = {}
    findings: list[Finding] = []
    read = 0
    for number, case in enumerate(manifest.cases):
        outcome = outcomes[number]
        try:
            if isinstance(outcome, ConsiliumError):
                raise outcome
            _check_label(case, manifest.site, outcome)
        except ConsiliumError as error:
            if not error.code.startswith("data."):
                raise
            findings.append(Finding.of(case.case_id, error))
        else:
            entries[case.case_id] = outcome
            read += number in unread
    return IngestOutcome(entries, tuple(findings), read)


@contextmanager
def writing(home: SiteHome) -> Iterator[None]:
    """Hold the site's data for writing: one import at a time.

    Raises
    ------
    ConsiliumError
        ``state.busy``.
    """
    import fcntl

    with (home.data / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConsiliumError(
                "state.busy",
                "Another command is writing this site's data.",
                where=str(home.data),
                hint="Wait until it has finished.",
            ) from error
        yield


@contextmanager
def using(home: SiteHome) -> Iterator[None]:
    """Hold the site's data for use: many at once, after a running import has finished."""
    import fcntl

    with (home.data / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def cached_entry(
    home: SiteHome, site: SiteManifest, case: Case, sources: Sources
) -> Ingested | None:
    """Return the case from the cache, or None where its files are gone or have changed."""
    try:
        return load_entry(ingested_folder(home) / locate(site, case, sources).stamp(case))
    except ConsiliumError:
        return None


def _check_label(case: Case, site: SiteManifest, entry: Ingested) -> None:
    """Check that the label says only what site.yaml lists (where it lists anything)."""
    if not site.labels:
        return
    if entry.label_values is None:
        class_names(case.label, site)
        return
    unknown = sorted(set(entry.label_values) - {0, *site.labels.values()})
    if unknown:
        raise ConsiliumError(
            "data.label-unknown",
            f"The mask holds the value {unknown[0]}, which site.yaml does not list.",
            where=case.label,
            hint="Add it under `labels` in site.yaml, or correct the label.",
        )
