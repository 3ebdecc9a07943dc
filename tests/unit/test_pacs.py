"""A pull takes what was asked for and nothing else, survives every end, and names no patient."""

from __future__ import annotations

import datetime as dt
import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pacs_fixtures import MemoryArchive, series_files

from consilium_client.data.pacs.archive import FoundSeries, FoundStudy, Instance, Keep, StudyQuery
from consilium_client.data.pacs.download import Download, public_name
from consilium_client.data.pacs.filters import Filters, find, read_identifiers
from consilium_client.data.pacs.pull import Step, pull
from consilium_client.data.pacs.retry import BackOff, TransientError, patiently
from consilium_common.errors import ConsiliumError

NOW = BackOff(retries=3, first=0.0)


def broken() -> TransientError:
    return TransientError("pacs.broken", "The connection ended.")


def pulled(archive: MemoryArchive, folder: Path, **options: Any) -> Any:
    wanted = find(archive, Filters(modalities=("CT",))).series
    with Download.opened(folder) as download:
        return pull(archive, wanted, download, NOW, **options)


# --- patience ---


@given(failures=st.integers(1, 200), after=st.floats(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_waits_double_up_to_the_longest_and_keep_what_the_archive_asks(
    failures: int, after: float
) -> None:
    back_off = BackOff(first=1.0, longest=60.0)
    wait = back_off.wait(failures, after)
    full = min(60.0, 2.0 ** min(failures - 1, 10))
    assert max(full / 2, min(after, 60.0)) <= wait <= max(full, min(after, 60.0))


def test_patience_ends_after_failures_in_a_row_and_begins_anew_with_progress() -> None:
    waits: list[float] = []
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        raise broken()

    with pytest.raises(TransientError):
        patiently(fails, BackOff(retries=3), sleep=waits.append)
    assert calls == 4 and len(waits) == 3 and waits[0] < waits[1] < waits[2]

    def moves_on() -> str:
        nonlocal calls
        calls += 1
        if calls < 10:
            raise broken()
        return "done"

    calls = 0
    waits.clear()
    back_off = BackOff(retries=1)
    assert patiently(moves_on, back_off, progress=lambda: calls, sleep=waits.append) == "done"
    assert max(waits) <= 1.0  # each failure counts as the first


def test_what_will_not_pass_is_not_tried_again() -> None:
    def refused() -> None:
        raise ConsiliumError("pacs.denied", "No.")

    with pytest.raises(ConsiliumError, match="No"):
        patiently(refused, NOW, sleep=lambda _: pytest.fail("waited"))


# --- filters ---


def test_without_a_filter_nothing_is_pulled() -> None:
    with pytest.raises(ConsiliumError) as caught:
        Filters(min_images=10)
    assert caught.value.code == "usage.no-filter"


@pytest.mark.parametrize("line", ["A*", "A?7", "A\\B", "x" * 65, "a\x07b"])
def test_an_identifier_that_would_match_others_is_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        read_identifiers(io.StringIO(f"A1\n{line}\n"), "list.txt")
    assert caught.value.code == "usage.identifiers"
    assert caught.value.where == "list.txt:2"
    assert line not in str(caught.value)


def test_a_list_is_read_line_by_line() -> None:
    assert read_identifiers(io.StringIO("\ufeffA1\r\n\n A2 \nA1\n"), "-") == {"A1": 1, "A2": 3}
    with pytest.raises(ConsiliumError, match="empty"):
        read_identifiers(io.StringIO("\n\n"), "-")


def test_filters_are_checked_here_because_archives_ignore_keys(tmp_path: Path) -> None:
    archive = MemoryArchive()
    rows = {
        "wanted": {"SeriesDescription": "Liver 5mm", "StudyDescription": "ABDOMEN"},
        "other": {"SeriesDescription": "Scout", "StudyDescription": "abdomen"},
        "old": {"SeriesDescription": "liver", "StudyDate": "20190101"},
        "mr": {"SeriesDescription": "liver", "Modality": "MR"},
    }
    series = {
        name: archive.add(series_files(tmp_path / name, patient=name, **told))
        for name, told in rows.items()
    }

    def names(**wanted: Any) -> set[str]:
        found = find(archive, Filters(**wanted)).series
        return {name for name, one in series.items() if one in found}

    assert names(modalities=("MR",)) == {"mr"}
    assert names(until=dt.date(2019, 12, 31)) == {"old"}
    assert names(since=dt.date(2020, 1, 1), series="LIVER*") == {"wanted", "mr"}
    assert names(study="abd*", series="*5mm") == {"wanted"}
    assert names(patients={"old": 1, "other": 2}) == {"old", "other"}
    assert names(modalities=("CT", "MR"), min_images=4) == set()


def test_the_lines_without_a_match_are_told_and_a_limit_ends_the_search(tmp_path: Path) -> None:
    archive = MemoryArchive()
    for name in ("A", "B"):
        archive.add(series_files(tmp_path / name, patient=name, AccessionNumber=f"acc-{name}"))
    wanted = Filters(accessions={"acc-A": 1, "acc-C": 4, "acc-B": 5})
    selection = find(archive, wanted)
    assert len(selection.series) == 2 and selection.unmatched == (4,) and not selection.more
    assert [query.accession for query in archive.queries] == ["acc-A", "acc-C", "acc-B"]
    few = find(archive, wanted, limit=1)
    assert len(few.series) == 1 and few.more and few.unmatched == ()


def test_a_search_is_as_patient_as_a_transfer(tmp_path: Path) -> None:
    class Breaking(MemoryArchive):
        def series(self, study: FoundStudy) -> list[FoundSeries]:
            if len(said) < 2:
                raise broken()
            return super().series(study)

    said: list[str] = []
    archive = Breaking()
    archive.add(series_files(tmp_path / "a"))
    found = find(archive, Filters(modalities=("CT",)), back_off=NOW, say=said.append)
    assert len(found.series) == 1 and len(said) == 2


def test_queries_ask_for_dates_as_the_standard_writes_them() -> None:
    since, until = dt.date(2024, 1, 2), dt.date(2024, 3, 4)
    assert [q.dates for q in Filters(since=since, until=until).queries()] == ["20240102-20240304"]
    assert [q.dates for q in Filters(since=since).queries()] == ["20240102-"]
    both = list(Filters(modalities=("CT", "MR"), until=until).queries())
    assert both == [StudyQuery(modality=m, dates="-20240304") for m in ("CT", "MR")]


# --- the folder ---


def test_what_is_pulled_is_private_whole_and_named_by_hashes(tmp_path: Path) -> None:
    archive = MemoryArchive()
    found = archive.add(series_files(tmp_path / "a", patient="Doe^Jane"))
    steps: list[Step] = []
    outcome = pulled(archive, tmp_path / "out", progress=steps.append)
    assert (outcome.series, outcome.already, outcome.images) == (1, 0, 3)
    assert steps[-1] == Step(1, 1, 3, 3, outcome.bytes)
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    assert {path.read_bytes() for path in files} == set(archive.objects.values())
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        private = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == private, path
        assert found.uid not in str(path) and "Doe" not in str(path)
    for record in (tmp_path / "out" / ".pull").glob("*.json"):
        text = record.read_text()
        assert "Doe" not in text and not any(uid in text for uid in (found.uid, *archive.objects))


def test_a_second_pull_fetches_only_what_is_missing(tmp_path: Path) -> None:
    archive = MemoryArchive()
    first = archive.add(series_files(tmp_path / "a"))
    second = archive.add(series_files(tmp_path / "b"))
    pulled(archive, tmp_path / "out")
    archive.fetched.clear()
    again = pulled(archive, tmp_path / "out")
    assert (again.series, again.already, archive.fetched) == (0, 2, [])
    lost = next((tmp_path / "out" / public_name(second.uid)).glob("*.dcm"))
    lost.unlink()
    again = pulled(archive, tmp_path / "out")
    assert archive.fetched == [(second.uid, 1, False)] and lost.is_file()
    assert (again.series, again.already, again.images) == (1, 1, 1)
    assert first.uid != second.uid


def test_a_broken_transfer_goes_on_with_the_rest(tmp_path: Path) -> None:
    class Breaking(MemoryArchive):
        def fetch(self, series: FoundSeries, wanted: Any, *, whole: bool, keep: Keep) -> None:
            super().fetch(series, wanted[:2], whole=whole, keep=keep)
            if len(wanted) > 2:
                raise broken()

    archive = Breaking()
    found = archive.add(series_files(tmp_path / "a", images=5))
    said: list[str] = []
    outcome = pulled(archive, tmp_path / "out", say=said.append, sleep=lambda _: None)
    assert outcome.images == 5 and len(said) == 2 and "Trying again" in said[0]
    assert archive.fetched == [(found.uid, 2, whole) for whole in (True, False)] + [
        (found.uid, 1, False)
    ]


def test_a_torn_file_of_a_killed_pull_is_cleared_away(tmp_path: Path) -> None:
    archive = MemoryArchive()
    found = archive.add(series_files(tmp_path / "a"))
    pulled(archive, tmp_path / "out")
    folder = tmp_path / "out" / public_name(found.uid)
    torn = folder / ".x.dcm.tmp123"
    torn.write_bytes(b"half")
    next(folder.glob("*.dcm")).unlink()
    pulled(archive, tmp_path / "out")
    assert not torn.exists() and len(list(folder.iterdir())) == 3


def test_an_archive_that_sends_too_little_leaves_one_clear_error(tmp_path: Path) -> None:
    class Short(MemoryArchive):
        def fetch(self, series: FoundSeries, wanted: Any, *, whole: bool, keep: Keep) -> None:
            super().fetch(series, wanted[1:] if series == short else wanted, whole=whole, keep=keep)

    archive = Short()
    short = archive.add(series_files(tmp_path / "a"))
    archive.add(series_files(tmp_path / "b"))
    outcome = pulled(archive, tmp_path / "out", sleep=lambda _: None)
    assert outcome.series == 1 and outcome.failures[0][0] == public_name(short.uid)
    with pytest.raises(ConsiliumError) as caught:
        outcome.check()
    assert caught.value.code == "pacs.incomplete"
    assert "Of 3 images of a series the archive sent 2" in caught.value.message
    # What came is kept, and the series does not count as whole.
    assert pulled(archive, tmp_path / "out", sleep=lambda _: None).already == 1


def test_an_archive_that_lists_less_than_it_counts_is_named(tmp_path: Path) -> None:
    archive = MemoryArchive()
    archive.add(series_files(tmp_path / "a"))
    archive.listed.popitem()
    failure = pulled(archive, tmp_path / "out").failures[0][1]
    assert failure.code == "pacs.count" and "counts 3 images" in failure.message


@pytest.mark.parametrize(
    ("keyword", "what"),
    [
        ("StudyInstanceUID", "study"),
        ("SeriesInstanceUID", "series"),
        ("SOPInstanceUID", "image"),
        ("PatientID", "patient"),
    ],
)
def test_what_was_not_asked_for_ends_the_pull_and_is_not_stored(
    tmp_path: Path, keyword: str, what: str
) -> None:
    import pydicom

    archive = MemoryArchive()
    files = series_files(tmp_path / "a")
    archive.add(files)
    dataset = pydicom.dcmread(files[1])
    setattr(dataset, keyword, "1.2.3.4")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stream = io.BytesIO()
    dataset.save_as(stream)
    archive.objects[list(archive.objects)[1]] = stream.getvalue()
    with pytest.raises(ConsiliumError) as caught:
        pulled(archive, tmp_path / "out")
    assert caught.value.code == "pacs.unasked" and caught.value.message.endswith(f"another {what}.")
    assert "1.2.3.4" not in str(caught.value) and "P-17" not in str(caught.value)
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 1


@pytest.mark.parametrize("cut", [10, 200, -5])
def test_half_an_object_is_refused_and_the_other_series_are_pulled(
    tmp_path: Path, cut: int
) -> None:
    archive = MemoryArchive()
    archive.add(series_files(tmp_path / "a"))
    uid = next(iter(archive.objects))
    archive.objects[uid] = archive.objects[uid][:cut]
    archive.add(series_files(tmp_path / "b"))
    outcome = pulled(archive, tmp_path / "out")
    assert outcome.series == 1
    assert [error.code for _, error in outcome.failures] == ["pacs.damaged"]


def test_a_full_disk_is_one_error_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = MemoryArchive()
    archive.add(series_files(tmp_path / "a"))
    real, done = os.fchmod, 0

    def full(descriptor: int, mode: int) -> None:
        nonlocal done
        done += 1
        if done == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(ConsiliumError) as caught:
        pulled(archive, tmp_path / "out")
    assert caught.value.code == "state.disk"
    monkeypatch.setattr(os, "fchmod", real)
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 1
    assert pulled(archive, tmp_path / "out").images == 2


def test_one_folder_takes_one_pull_at_a_time_and_nobody_elses_files(tmp_path: Path) -> None:
    with Download.opened(tmp_path / "out"):
        with pytest.raises(ConsiliumError) as caught, Download.opened(tmp_path / "out"):
            pass
        assert caught.value.code == "state.busy"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConsiliumError) as caught, Download.opened(tmp_path / "other"):
        pass
    assert caught.value.code == "data.not-empty"


@given(uid=st.text("./\\0129 %", min_size=1))
@settings(max_examples=50, deadline=None)
def test_a_name_from_the_network_never_becomes_a_path(uid: str) -> None:
    name = public_name(uid)
    assert len(name) == 24 and set(name) <= set("0123456789abcdef")


def test_several_failures_are_one_error(tmp_path: Path) -> None:
    archive = MemoryArchive()
    for name in ("a", "b"):
        archive.add(series_files(tmp_path / name))
    for uid in archive.objects:
        archive.objects[uid] = b"nothing"
    with pytest.raises(ConsiliumError) as caught:
        pulled(archive, tmp_path / "out").check()
    assert caught.value.code == "pacs.incomplete" and "2 × pacs.damaged" in caught.value.message


def test_identity_is_never_in_what_a_value_shows() -> None:
    study = FoundStudy("1.2", "20240101", "Doe", "ACC-9", "Doe^Jane")
    shown = repr(FoundSeries(study, "1.2.3", "CT", "Jane")) + repr(Instance("1.2.3.4", "1.2"))
    shown += repr(Filters(accessions={"ACC-9": 1})) + repr(StudyQuery(patient="Doe^Jane"))
    assert not any(word in shown for word in ("Doe", "Jane", "ACC-9", "20240101"))
