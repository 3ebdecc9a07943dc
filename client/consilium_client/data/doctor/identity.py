"""Who the files' own text tells about: scanned once for each set of files, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from consilium_client.data.doctor.memory import Memory, Remembered, files_key
from consilium_client.data.doctor.patients import listed_cases, person_name
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.case import locate
from consilium_client.data.ingest.dicom_file import is_compressed
from consilium_client.data.ingest.dicom_headers import Header, read_header
from consilium_client.data.ingest.sources import Source, Sources
from consilium_client.data.manifest import Manifest
from consilium_client.data.split import PatientKey
from consilium_common.errors import ConsiliumError

#: Burned-in text of a series stands in all of its slices; these many are looked at.
_LOOKED_AT: Final = 3
#: Files between two entries in the memory: what an interruption loses at most.
_BATCH: Final = 2000
#: Fewer series are looked at sooner in this process than another one starts.
_MANY: Final = 24
_UNKNOWN: Final = "data.burned-in-unknown"


@dataclass(frozen=True)
class Told:
    """What the files tell.

    Parameters
    ----------
    findings : tuple of Finding
        ``deid.*`` and ``data.burned-in-unknown``.
    persons : mapping
        Case to the keyed hashes of the people its tags name.
    """

    findings: tuple[Finding, ...]
    persons: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Files:
    """The files behind one case, images and label."""

    case: str
    sources: tuple[Source, ...]
    #: Digest of what the files are.
    key: str
    #: Those that are reported under this case: a file that several cases share has one place.
    own: tuple[Path, ...]


def scan(
    manifest: Manifest,
    sources: Sources,
    key: PatientKey,
    memory: Memory,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Told:
    """Scan all files that have changed, and recall the others.

    Cases whose files are missing are passed over: the ingest says so.

    Parameters
    ----------
    memory : Memory
        Asked first and told after every batch; the caller saves it, also when this is interrupted.
    progress : callable, optional
        Called with (files done, files).
    """
    behind = _behind(manifest, sources)
    known = {found.case: memory.recall(found.key) for found in behind}
    new = [found for found in behind if known[found.case] is None]
    done, total = 0, sum(len(found.own) for found in new)
    for batch in _batches(new):
        scanned = _scanned(batch, manifest.root, key)
        for found in batch:
            memory.keep(found.key, scanned[found.case])
        known |= scanned
        done += sum(len(found.own) for found in batch)
        if progress is not None:
            progress(done, total)
    told = {case: remembered for case, remembered in known.items() if remembered is not None}
    return Told(
        _merged([one for remembered in told.values() for one in remembered.findings], len(behind)),
        {case: remembered.persons for case, remembered in told.items()},
    )


def _behind(manifest: Manifest, sources: Sources) -> list[_Files]:
    """Return the files behind every case that has all of its files."""
    found = []
    taken: set[Path] = set()
    for case in manifest.cases:
        try:
            located = locate(manifest.site, case, sources)
            parts = (*located.images.values(), *((located.label,) if located.label else ()))
            paths = dict.fromkeys(path for source in parts for path in source.files)
            own = tuple(path for path in paths if path not in taken)
            # What is whose is part of the key: without the case that has a shared file, the next
            # one has it.
            key = files_key(case.case_id, (*paths, *own))
            found.append(_Files(case.case_id, parts, key, own))
            taken.update(own)
        except ConsiliumError:
            continue
    return found


def _batches(new: Sequence[_Files]) -> Iterator[list[_Files]]:
    """Yield cases in batches of so many files that starting other processes pays."""
    batch: list[_Files] = []
    files = 0
    for found in new:
        batch.append(found)
        files += len(found.own)
        if files >= _BATCH:
            yield batch
            batch, files = [], 0
    if batch:
        yield batch


def _scanned(new: Sequence[_Files], root: Path, key: PatientKey) -> dict[str, Remembered]:
    from consilium_client.data.deid.check import identity_findings
    from consilium_client.data.parallel import cores, spread

    names = {path: found.case for found in new for path in found.own}
    by_case: dict[str, list[Finding]] = {found.case: [] for found in new}
    for finding in identity_findings(list(names), root, names=names):
        by_case[finding.case].append(finding)
    series = [found for found in new if any(one.kind == "dicom" for one in found.sources)]
    workers = cores() if len(series) >= _MANY else 1
    persons: dict[str, set[str]] = {found.case: set() for found in new}
    # Decoders may end their process on a damaged file; the ingest will name it.
    risky = any(
        one.kind == "dicom" and is_compressed(one.files[0])
        for found in series
        for one in found.sources
    )
    looks = spread(_looked_at, series, workers=workers, otherwise=_unseen if risky else None)
    for found, (burned, named) in zip(series, looks, strict=True):
        by_case[found.case] += burned
        persons[found.case] = {person_name(person, key) for person in named} - {""}
    return {
        found.case: Remembered(tuple(by_case[found.case]), tuple(sorted(persons[found.case])))
        for found in new
    }


def _unseen(_: _Files) -> tuple[list[Finding], set[str]]:
    return [], set()


def _looked_at(found: _Files) -> tuple[list[Finding], set[str]]:
    """Return what the pixels of a case's DICOM images may say, and whom their tags name.

    Findings about all images stand under the case, so that they can be remembered with it.
    """
    from consilium_client.data.deid.burned_in import burned_in_findings

    headers = [header for source in found.sources for header in _headers(source)]
    names = {header.path: found.case for header in headers}
    burned = [replace(one, case=found.case) for one in burned_in_findings(headers, names=names)]
    return burned, {header.person for header in headers}


def _headers(source: Source) -> list[Header]:
    """Read the headers of a series' first, middle and last image; those of others are none."""
    if source.kind != "dicom" or not source.files:
        return []
    last = len(source.files) - 1
    chosen = sorted({round(last * n / (_LOOKED_AT - 1)) for n in range(_LOOKED_AT)})
    headers = []
    for number in chosen:
        try:
            header = read_header(source.files[number])
        except ConsiliumError:  # a damaged file is the ingest's finding
            continue
        if header is not None and header.is_image:
            headers.append(header)
    return headers


def _merged(findings: list[Finding], cases: int) -> tuple[Finding, ...]:
    """Say once for the cohort that files do not tell whether text is burned in."""
    unknown = [one for one in findings if one.code == _UNKNOWN]
    if not unknown:
        return tuple(findings)
    names = list(dict.fromkeys(one.case for one in unknown))
    whole = Finding(
        "",
        _UNKNOWN,
        f"{len(names)} of {cases} cases do not say whether text is burned into their pixels.",
        f"cases {listed_cases(names)}",
        unknown[0].hint,
    )
    return (*(one for one in findings if one.code != _UNKNOWN), whole)
