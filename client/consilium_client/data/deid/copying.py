"""A clean copy of a folder: never in place, resumable, each file checked before it lands."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from consilium_client.data.deid.burned_in import Suspect, burned_in_suspects
from consilium_client.data.deid.check import in_name
from consilium_client.data.deid.clean import Rules, clean_dataset
from consilium_client.data.deid.elements import read_dataset
from consilium_client.data.deid.exposure import examine_file
from consilium_client.data.deid.file_names import clean_name
from consilium_client.data.deid.journal import Journal, Record
from consilium_client.data.deid.nifti_text import is_nifti, telling_fields, write_clean
from consilium_client.data.findings import Finding
from consilium_client.data.identifying import searcher, words_of_name, words_of_number
from consilium_client.data.ingest.dicom_file import quietly
from consilium_client.data.ingest.dicom_headers import Header, files_below, index_files
from consilium_client.data.manifest import existing_manifest
from consilium_client.data.parallel import spread
from consilium_client.data.split import PatientKey, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic

Progress = Callable[[str, int, int], None]

_PIXELS: Final = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_STRUCTURES: Final = frozenset({"RTSTRUCT"})


@dataclass(frozen=True)
class Copied:
    """What a run has done; for the site alone, since it names files.

    Parameters
    ----------
    out, log : Path
        The copy, and the log beside it, which maps nothing back.
    written, kept : int
        Files copied now, and files that an earlier run had copied.
    suspects : tuple of Suspect
        Images that may carry text in their pixels; not copied unless asked for.
    passed_over : dict
        Reason -> files that are not copied: other formats, reports, duplicates.
    failed : tuple of Finding
        Files that cannot be cleaned.
    """

    out: Path
    log: Path
    written: int
    kept: int
    suspects: tuple[Suspect, ...]
    passed_over: dict[str, list[Path]]
    failed: tuple[Finding, ...]


def deidentify(
    home: SiteHome,
    folder: Path,
    out: Path,
    rules: Rules,
    *,
    include_burned_in: bool = False,
    progress: Progress | None = None,
) -> Copied:
    """Write a clean copy of the DICOM and NIfTI files of ``folder`` to ``out``.

    Raises
    ------
    ConsiliumError
        ``usage.folder`` for folders that are missing, lie in each other or hold something else;
        ``state.disk`` when a file cannot be written: run again, what is there is kept.
    """
    folder, out = folder.expanduser().resolve(), out.expanduser().resolve()
    _require_apart(folder, out)
    key = open_patient_key(home)
    journal = Journal.open(home, folder, out, rules)
    private_folder(out)
    _forget_halves(out)
    files = files_below(folder)
    headers, unreadable = index_files(files, progress=_named(progress, "index"))
    suspects = burned_in_suspects([header for header in headers if header.is_image])
    held = set() if include_burned_in else {h.path for s in suspects for h in s.headers}
    passed: dict[str, list[Path]] = {}
    jobs = [
        *_dicom_jobs(headers, held, passed),
        *(_Job(path, path.relative_to(folder).as_posix()) for path in files if is_nifti(path)),
    ]
    known = {header.path for header in headers} | {job.source for job in jobs}
    refused = {Path(finding.where) for finding in unreadable}
    passed["neither DICOM nor NIfTI"] = [p for p in files if p not in known and p not in refused]
    todo = [job for job in jobs if not journal.has(job.source)]
    pattern = _patients_pattern(home)
    work = partial(_copy_safely, out=out, key=key, rules=rules, pattern=pattern)
    failed, written = list(unreadable), 0
    with journal:
        for number, (job, done) in enumerate(zip(todo, spread(work, todo), strict=True), start=1):
            if isinstance(done, Record) and not journal.names(done.new):
                journal.add(done)
                written += 1
            elif done is None or isinstance(done, Record):
                passed.setdefault("a second copy of the same object", []).append(job.source)
            elif done.code == "state.disk":
                raise done
            else:
                failed.append(Finding.of(job.source.parent.name, done))
            if progress is not None:
                progress("clean", number, len(todo))
    copied = Copied(
        out,
        out.with_name(f"{out.name}.log.json"),
        written,
        len(jobs) - len(todo),
        suspects,
        {reason: paths for reason, paths in passed.items() if paths},
        tuple(failed),
    )
    _write_log(copied, journal, rules)
    return copied


@dataclass(frozen=True)
class _Job:
    """One file to copy; ``relative`` is empty for DICOM, whose new name follows from its UIDs."""

    source: Path
    relative: str = ""


def _dicom_jobs(
    headers: Sequence[Header], held: set[Path], passed: dict[str, list[Path]]
) -> Iterable[_Job]:
    for header in headers:
        if header.path in held:
            passed.setdefault("may carry text in the pixels", []).append(header.path)
        elif header.is_image or header.is_segmentation or header.modality in _STRUCTURES:
            yield _Job(header.path)
        else:
            # Reports, presentation states, doses: written findings, and nothing to train on.
            passed.setdefault("neither image, segmentation nor structure set", []).append(
                header.path
            )


def _copy_safely(
    job: _Job, *, out: Path, key: PatientKey, rules: Rules, pattern: re.Pattern[str] | None
) -> Record | ConsiliumError | None:
    """Copy one file; None when another file with the same identity is there already."""
    try:
        if job.relative:
            return _copy_nifti(job, out, key, pattern)
        return _copy_dicom(job.source, out, key, rules)
    except ConsiliumError as error:
        where = error.where if error.code == "state.disk" else str(job.source)
        return ConsiliumError(error.code, error.message, where=where, hint=error.hint)
    except OSError as error:
        return _disk(out, error)
    except Exception as error:
        return ConsiliumError(
            "data.format",
            f"The file cannot be cleaned ({type(error).__name__}).",
            where=str(job.source),
            hint="Export it again from its source, or take it out of the folder.",
        )


def _copy_dicom(source: Path, out: Path, key: PatientKey, rules: Rules) -> Record | None:
    dataset = read_dataset(source, pixels=True)
    pixels = _pixels(dataset)
    if "Rows" in dataset and not any(pixels):
        raise ConsiliumError(
            "data.truncated",
            "The DICOM file ends before its pixels.",
            hint="Copy or export it again from its source.",
        )
    changed = clean_dataset(dataset, key, rules)
    new = PurePosixPath(
        str(dataset.PatientID), str(dataset.SeriesInstanceUID), f"{dataset.SOPInstanceUID}.dcm"
    )

    def write(stream: BinaryIO) -> None:
        with quietly():
            dataset.save_as(stream, enforce_file_format=True)

    def check(written: Path) -> None:
        left = examine_file(written)
        if not left.clean or _pixels(read_dataset(written, pixels=True)) != pixels:
            raise _unconfirmed()

    return _put(source, out / new, changed, write, check)


def _copy_nifti(
    job: _Job, out: Path, key: PatientKey, pattern: re.Pattern[str] | None
) -> Record | None:
    new = PurePosixPath("nifti") / clean_name(PurePosixPath(job.relative), key)
    changed = Counter(telling_fields(job.source, pattern))

    def check(written: Path) -> None:
        if telling_fields(written, pattern) or any(in_name(part, pattern) for part in new.parts):
            raise _unconfirmed()

    return _put(
        job.source, out / new, changed, lambda stream: write_clean(job.source, stream), check
    )


def _put(
    source: Path,
    target: Path,
    changed: Counter[str],
    write: Callable[[BinaryIO], None],
    check: Callable[[Path], None],
) -> Record | None:
    """Write beside the target, check what was written, then let it take its name."""
    private_folder(target.parent)
    suffix = "".join(target.suffixes[-2:]) if target.name.endswith(".gz") else target.suffix
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=_HALF, suffix=suffix)
    half = Path(temporary)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        check(half)
        # A link fails where the name is taken: of two copies of one object the first stays.
        os.link(half, target)
    except FileExistsError:
        # The same bytes: an earlier run was killed before it could note them.
        if not filecmp.cmp(half, target, shallow=False):
            return None
    finally:
        half.unlink(missing_ok=True)
    stat = source.stat()
    return Record(source, stat.st_size, stat.st_mtime_ns, target, target.stat().st_size, changed)


_HALF: Final = ".half-"


def _forget_halves(out: Path) -> None:
    """Remove what a run that was killed has left half written."""
    for half in out.rglob(f"{_HALF}*"):
        half.unlink(missing_ok=True)


def _pixels(dataset: Any) -> tuple[bytes | None, ...]:
    """Return the pixel elements' bytes as they stand in the file."""
    return tuple(
        dataset.get_item(tag).value if tag in dataset else None  # raw: nothing is decoded
        for tag in _PIXELS
    )


def _unconfirmed() -> ConsiliumError:
    return ConsiliumError(
        "data.format",
        "The cleaned file did not pass its own check and was not kept.",
        hint="Leave the file out, and report this.",
    )


def _disk(out: Path, error: OSError) -> ConsiliumError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ConsiliumError(
        "state.disk",
        "The disk is full." if full else f"Cannot write the copy: {error.strerror or 'I/O error'}.",
        where=str(out),
        hint="Free space or check the permissions, then run the command again: it goes on where "
        "it stopped.",
    )


def _require_apart(folder: Path, out: Path) -> None:
    if not folder.is_dir():
        raise ConsiliumError(
            "usage.folder", "The folder to clean does not exist.", where=str(folder)
        )
    if out.is_relative_to(folder) or folder.is_relative_to(out):
        raise ConsiliumError(
            "usage.folder",
            "The copy and the original lie in each other: nothing is ever cleaned in place.",
            where=f"{folder} and {out}",
            hint="Give a folder elsewhere.",
        )


def _patients_pattern(home: SiteHome) -> re.Pattern[str] | None:
    """Find the patients of the site's case list in names of files and in NIfTI headers."""
    manifest = existing_manifest(home)
    if manifest is None:
        return None
    ids = [case.patient_id for case in manifest.cases]
    return searcher(
        {word for name in ids for word in words_of_number(name) | words_of_name(name)}, inside=True
    )


def _write_log(copied: Copied, journal: Journal, rules: Rules) -> None:
    """Write what was done, by new name: this file may travel with the copy."""
    content = {
        "schema": "consilium/deidentification-log/v1",
        **rules.to_dict(),
        "files": [
            {
                "name": record.new.relative_to(copied.out).as_posix(),
                "changed": dict(sorted(record.changed.items())),
            }
            for record in journal.records()
        ],
        "not_copied": {reason: len(paths) for reason, paths in copied.passed_over.items()},
        "may_carry_text": sum(len(suspect.headers) for suspect in copied.suspects),
        "failed": dict(Counter(finding.code for finding in copied.failed)),
    }
    write_atomic(copied.log, (json.dumps(content, indent=1) + "\n").encode())


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
