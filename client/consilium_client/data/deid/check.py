"""Who a site's files give away: every file searched, one finding per case and rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from consilium_client.data.deid.exposure import Exposure, examine_file
from consilium_client.data.deid.nifti_text import is_nifti, telling_fields
from consilium_client.data.findings import Finding
from consilium_client.data.identifying import looks_like, mentions, searcher
from consilium_client.data.ingest.dicom_headers import is_dicom
from consilium_client.data.parallel import spread
from consilium_common.errors import ConsiliumError

#: Tags named in one finding; the others are counted.
_NAMED: Final = 8
_CLEAN: Final = "`consilium site data deidentify` writes a clean copy."


@dataclass
class _Case:
    """What the files of one case give away, gathered."""

    files: list[Path] = field(default_factory=list)
    exposed: list[tuple[Path, Exposure]] = field(default_factory=list)
    texts: list[tuple[Path, tuple[str, ...]]] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)


def identity_findings(
    files: Sequence[Path],
    root: Path,
    *,
    names: Mapping[Path, str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Finding, ...]:
    """Search DICOM and NIfTI files, and the names of all files, for the patient's identity.

    Parameters
    ----------
    files : sequence of Path
        Any files; other formats than DICOM and NIfTI are judged by their names.
    root : Path
        Folder from which on a path's parts are judged.
    names : mapping of Path to str
        The case that a file is reported under; a file that is not named here is reported under its
        folder's name.
    progress : callable, optional
        Told how many files are done and how many there are.

    Returns
    -------
    tuple of Finding
        ``deid.tags``, ``deid.claim-untrue``, ``deid.private-tags``, ``deid.filename`` and
        ``deid.nifti-text``; at most one of each per case. They name tags and files, never a value.
    """
    cases: dict[str, _Case] = {}
    images: list[Path] = []
    # A NIfTI header is searched below, sooner than another process starts.
    searched = spread(_search, [path for path in files if not is_nifti(path)])
    for number, path in enumerate(files, start=1):
        seen = "nifti" if is_nifti(path) else next(searched)
        case = cases.setdefault(names.get(path, path.parent.name), _Case())
        case.files.append(path)
        if isinstance(seen, Exposure):
            case.exposed.append((path, seen))
        elif seen == "unread":
            case.unread.append(path)
        elif seen == "nifti":
            images.append(path)
        if progress is not None and (number % 50 == 0 or number == len(files)):
            progress(number, len(files))
    everyone = searcher(
        {w for case in cases.values() for _, seen in case.exposed for w in seen.words}
    )
    for path in images:
        case = cases[names.get(path, path.parent.name)]
        try:
            case.texts.append((path, telling_fields(path, everyone)))
        except ConsiliumError:
            case.unread.append(path)
    return tuple(finding for name, case in cases.items() for finding in _of_case(name, case, root))


def _search(path: Path) -> Exposure | str:
    """Return what a DICOM file gives away; for others what they are."""
    if is_nifti(path):
        return "nifti"
    try:
        return examine_file(path) if is_dicom(path) else "other"
    except ConsiliumError:
        return "unread"


def _of_case(name: str, case: _Case, root: Path) -> Iterator[Finding]:
    untrue = [(path, seen) for path, seen in case.exposed if seen.claimed and seen.direct]
    tagged = [
        (path, seen)
        for path, seen in case.exposed
        if not (seen.claimed and seen.direct)
        and (seen.direct or seen.indirect or seen.dates or seen.uids)
    ]
    if untrue:
        yield Finding(
            name,
            "deid.claim-untrue",
            f"{_files(untrue)} PatientIdentityRemoved = YES and {_tags(untrue)}",
            _where([path for path, _ in untrue]),
            f"Do not rely on the flag. {_CLEAN}",
        )
    if tagged:
        yield Finding(
            name,
            "deid.tags",
            f"{_files(tagged, 'hold')} tags that the basic profile removes: {_tags(tagged)}",
            _where([path for path, _ in tagged]),
            _CLEAN,
        )
    private = [(path, seen.private) for path, seen in case.exposed if seen.private]
    if private:
        yield Finding(
            name,
            "deid.private-tags",
            f"{_count(private, 'file')} with private tags that are not known to be safe: "
            f"{_listed(_union(private))}.",
            _where([path for path, _ in private]),
            _CLEAN,
        )
    texts = [(path, found) for path, found in case.texts if found]
    if texts:
        yield Finding(
            name,
            "deid.nifti-text",
            f"{_count(texts, 'NIfTI file')} with text that may name the patient: "
            f"{_listed(_union(texts))}.",
            _where([path for path, _ in texts]),
            f"Look at the text. {_CLEAN}",
        )
    if case.unread:
        yield Finding(
            name,
            "deid.tags",
            f"{_count(case.unread, 'file')} could not be searched to the end.",
            _where(case.unread),
            "Copy or export the files again from their source, then check again.",
        )
    yield from _of_names(name, case, root)


def _of_names(name: str, case: _Case, root: Path) -> Iterator[Finding]:
    pattern = searcher({w for _, seen in case.exposed for w in seen.words}, inside=True)
    told: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    bad: list[Path] = []
    for path in case.files:
        parts = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
        for part in parts:
            if part not in told:
                told[part] = in_name(part, pattern)
        seen = {told[part] for part in parts if told[part]}
        kinds.update(seen)
        if seen:
            bad.append(path)
    if bad:
        yield Finding(
            name,
            "deid.filename",
            f"{_count(bad, 'path')} with {' and '.join(sorted(kinds))} in the name of the file or "
            "of a folder.",
            _where(bad),
            f"Name files by a pseudonym. {_CLEAN}",
        )


def in_name(part: str, pattern: re.Pattern[str] | None) -> str:
    """Return what the name of a file or folder gives away; empty if nothing."""
    if mentions(part, pattern):
        return "the patient's name or number"
    return looks_like(part)


def _files(group: Sequence[tuple[Path, Exposure]], verb: str = "say") -> str:
    return f"1 file {verb}s" if len(group) == 1 else f"{len(group)} files {verb}"


def _tags(group: Sequence[tuple[Path, Exposure]]) -> str:
    """Name the direct identifiers, then what only helps to find the patient, weaker."""
    direct = _union([(path, seen.direct) for path, seen in group])
    indirect = _union([(path, seen.indirect) for path, seen in group])
    dates = max((seen.dates for _, seen in group), default=0)
    uids = max((seen.uids for _, seen in group), default=0)
    also = [_listed(indirect)] if indirect else []
    also += [f"up to {dates} dates and times"] if dates else []
    also += [f"up to {uids} original UIDs"] if uids else []
    parts = [f"{_listed(direct)} name the patient"] if direct else []
    parts += [f"{', '.join(also)} help to find them"] if also else []
    return "; ".join(parts) + "."


def _union(group: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    return list(dict.fromkeys(label for _, labels in group for label in labels))


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more


def _count(group: Sequence[object], what: str) -> str:
    return f"{len(group)} {what}{'' if len(group) == 1 else 's'}"


def _where(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"
