"""Reading side by side: what is remembered, what a crash costs, and what fits on the disk."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import home_in, study, write_list, write_nifti, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom.data import get_testdata_file

from consilium_client.data.cohort import open_cohort
from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest import readers, room, run
from consilium_client.data.ingest.cache import FolderWriter, cache_folder, ingested_folder
from consilium_client.data.ingest.case import Located
from consilium_client.data.ingest.facts import channel_facts
from consilium_client.data.ingest.readers import CaseRead, read_cases
from consilium_client.data.ingest.sources import Source
from consilium_client.data.prepare import prepare, prepared_bytes
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError

NAMED = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children read however few and small the cases are."""
    monkeypatch.setattr(run, "_WORTH_CHILDREN", 1)
    monkeypatch.setattr(run, "_SMALL_BYTES", 0)
    monkeypatch.setattr(run, "readers_for", lambda cases: 2)


def located(path: Path) -> Located:
    kind = "picture" if path.suffix == ".png" else "nifti"
    return Located({"image": Source(kind, (path,), str(path))}, None, None)


def stuck(folder: Path) -> Located:
    """Return a case whose file never ends and never says anything."""
    path = folder / "stuck.png"
    os.mkfifo(path)
    return located(path)


# --- what is remembered ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.int16, np.uint8, np.float32]),
        arrays.array_shapes(min_dims=2, max_dims=3, max_side=9),
        elements=st.integers(0, 200),
    ),
    st.sampled_from([0, -1000, 20_000]),
)
def test_facts_agree_with_numpy_and_the_hash_is_of_the_values_alone(
    values: np.ndarray, offset: int
) -> None:
    values = values.astype(np.float64) + offset
    facts = channel_facts(values.astype(np.float32))
    expected = (
        values.min(),
        values.max(),
        values.mean(),
        values.std(),
        *np.percentile(values, [1, 99]),
    )
    found = (facts.low, facts.high, facts.mean, facts.std, facts.p01, facts.p99)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert channel_facts(values.astype(np.int32)).pixel_hash == facts.pixel_hash
    changed = values.copy()
    changed.flat[-1] += 1
    assert channel_facts(changed).pixel_hash != facts.pixel_hash
    if values.shape != values.T.shape:
        assert channel_facts(values.reshape(values.T.shape)).pixel_hash != facts.pixel_hash


def test_facts_of_a_large_image_far_from_zero_stay_exact() -> None:
    values = np.random.default_rng(0).normal(30_000, 2, (130, 130, 90)).astype(np.float32)
    facts = channel_facts(values)
    assert facts.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-4)
    assert facts.std == pytest.approx(values.std(dtype=np.float64), rel=1e-6)
    assert (facts.p01, facts.p99) == pytest.approx(np.percentile(values, [1, 99]), abs=0.2)


def test_what_is_remembered_of_a_case_is_what_its_files_hold(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    write_nifti(tmp_path / "data" / "a.nii.gz", values, affine)
    write_nifti(tmp_path / "data" / "m.nii.gz", values > 100, affine, np.uint8)
    (tmp_path / "data" / "cases.csv").write_text(
        "case_id,patient_id,image,label\na,p,a.nii.gz,m.nii.gz\n"
    )
    entry = import_folder(home, tmp_path / "data", NAMED).entries["a"]
    assert entry.axes == "LPS" and entry.scanner == "" and entry.modality == ""
    assert entry.label_counts == {0: 101, 1: 19}
    assert (entry.facts["ct"].low, entry.facts["ct"].high) == (0, 119)


# --- children ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("children")
def test_children_leave_the_same_cache_as_reading_here(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 5)
    (folder / "labels" / "scan3.nii.gz").write_bytes(b"broken")
    options = ImportOptions(inputs=("ct",), labels=NAMED.labels, skip_bad=True)
    side_by_side = import_folder(home_in(tmp_path), folder, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_WORTH_CHILDREN", 100)
        here = import_folder(SiteHome.create(tmp_path / "here"), folder, options)
    assert list(side_by_side.entries) == list(here.entries) == ["scan0", "scan1", "scan2", "scan4"]
    assert side_by_side.left_out == here.left_out
    for name, entry in here.entries.items():
        other = side_by_side.entries[name]
        assert (other.facts, other.content) == (entry.facts, entry.content)
        assert np.array_equal(other.image("ct"), entry.image("ct"))
        assert np.array_equal(other.label(), entry.label())
    assert not list(ingested_folder(home_in(tmp_path)).glob(".part-*"))


@pytest.mark.usefixtures("children")
def test_an_interrupted_parallel_import_keeps_whole_cases_and_goes_on(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 6)
    home = home_in(tmp_path)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "ingest" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_folder(home, folder, NAMED, progress=interrupt)
    assert len(list(ingested_folder(home).iterdir())) == 3
    assert import_folder(home, folder, NAMED).read == 3


def test_a_reader_that_dies_or_hangs_costs_its_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give = readers._Child.give

    def deadly(self: readers._Child[str], key: str, *rest: object) -> None:
        give(self, key, *rest)  # type: ignore[arg-type]
        if key in {"crash", "memory"}:
            self._process.send_signal(signal.SIGSEGV if key == "crash" else signal.SIGKILL)

    monkeypatch.setattr(readers._Child, "give", deadly)
    pairs = write_pairs(tmp_path / "data", 3)
    never = stuck(tmp_path)
    tasks = [("crash", never), ("hang", never), ("memory", never)]
    tasks += [(f"scan{i}", located(pairs / "images" / f"scan{i}.nii.gz")) for i in range(3)]
    cache = tmp_path / "cache"
    cache.mkdir()
    with FolderWriter(cache) as writer:
        found = dict(read_cases(tasks, writer.folder, readers=2, seconds=5))
        left = set(cache.iterdir())  # nothing is adopted: leaving the block takes it all away
    codes = {key: one.code for key, one in found.items() if isinstance(one, ConsiliumError)}
    assert codes == {
        "crash": "data.truncated",
        "hang": "data.truncated",
        "memory": "data.too-large",
    }
    good = [one for one in found.values() if isinstance(one, CaseRead)]
    assert len(good) == 3
    assert left == {one.folder for one in good}
    assert not list(cache.iterdir())


def test_children_end_with_the_iterator(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 1)
    tasks = [("good", located(pairs / "images" / "scan0.nii.gz")), ("stuck", stuck(tmp_path))]
    with FolderWriter(tmp_path) as writer:
        reading = read_cases(tasks, writer.folder, readers=2)
        assert next(reading)[0] == "good"
        reading.close()
    end = time.monotonic() + 5
    while _running() and time.monotonic() < end:
        time.sleep(0.02)
    assert not _running()


def _running() -> list[str]:
    """Return our children that read cases."""
    ours = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in ours if b"ingest.reader" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.usefixtures("children")
def test_a_disk_that_fills_under_a_child_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is gone stands for the full disk: the child cannot write either way."""
    folder = write_pairs(tmp_path / "data", 2)
    home = home_in(tmp_path)
    make = FolderWriter.folder

    def gone(self: FolderWriter) -> Path:
        made = make(self)
        made.rmdir()
        return made

    monkeypatch.setattr(FolderWriter, "folder", gone)
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home, folder, NAMED)
    assert caught.value.code == "state.disk"
    assert list(ingested_folder(home).iterdir()) == []


# --- room --------------------------------------------------------------------------------------


def test_the_size_is_said_before_and_is_close(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 4)
    home = home_in(tmp_path)
    said: list[str] = []
    outcome = import_folder(home, folder, NAMED, say=said.append)
    (line,) = [line for line in said if "in the cache" in line]
    assert "4 cases to read: about 11.2 KiB" in line and "free" in line
    pixels = sum(e.image("ct").nbytes + e.label().nbytes for e in outcome.entries.values())
    assert pixels == 4 * 12 * 10 * 8 * 3
    said.clear()
    open_cohort(home, study(), say=said.append)
    assert len(said) == 1 and "4 cases to prepare: 18.8 KiB" in said[0]
    said.clear()
    open_cohort(home, study(), say=said.append)
    assert said == []


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*[st.integers(3, 9)] * 3),
    st.permutations([0, 1, 2]),
    st.sampled_from([None, [1.0, 1.5, 2.0], [0.7, 0.7, 3.0]]),
    st.sampled_from([None, [8, 8, 8]]),
)
def test_the_bytes_foreseen_are_the_bytes_prepared(
    shape: tuple[int, ...], axes: list[int], spacing: list[float] | None, size: list[int] | None
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([1.2, 0.9, 2.5])[axes]
    wanted = study(preprocessing={"spacing": spacing, "size": size})
    image, label, _ = prepare(
        [np.zeros(shape, np.int16)], np.zeros(shape, np.uint8), affine, wanted
    )
    assert label is not None
    assert prepared_bytes(shape, affine, wanted) == image.nbytes + label.nbytes


def test_the_quota_refuses_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    home = home_in(tmp_path)
    import_folder(home, folder, NAMED)
    site = home.data / "site.yaml"
    site.write_text(site.read_text().replace("cache_quota_gib: null", "cache_quota_gib: 0.00002"))
    with pytest.raises(ConsiliumError) as caught:
        open_cohort(home, study(preprocessing={"size": [64, 64, 64]}))
    assert caught.value.code == "state.quota" and "site.yaml" in caught.value.where
    assert not any((cache_folder(home) / "prepared").rglob("*.npy"))


def test_a_disk_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(10, 10, 100))
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home_in(tmp_path), write_pairs(tmp_path / "data", 1), NAMED)
    assert caught.value.code == "state.disk" and "100 bytes are free" in caught.value.message


def test_room_is_made_from_ended_studies_alone_the_longest_unused_first(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    prepared = cache_folder(home) / "prepared"
    long_ago = time.time() - 30 * 86400
    for number, (name, used) in enumerate(
        [("running", long_ago), ("older", long_ago), ("newer", long_ago + 86400), ("today", None)]
    ):
        (prepared / name).mkdir(parents=True)
        (prepared / name / "image.npy").write_bytes(bytes(2**20))
        room.note_use(home, name, f"study-{number}")
        if used is not None:
            (cache_folder(home) / "uses" / f"{name}.json").write_text(
                json.dumps({f"study-{number}": used})
            )
    home.running.write_text(json.dumps(["study-0"]))
    quota = 3.5 / 1024
    room.make_room(home, 0, quota)
    assert {path.name for path in prepared.iterdir()} == {"running", "newer", "today"}
    with pytest.raises(ConsiliumError) as caught:
        room.make_room(home, 3 * 2**20, quota)
    assert caught.value.code == "state.quota"
    assert {path.name for path in prepared.iterdir()} == {"running", "today"}


def test_a_decoder_that_ends_its_process_costs_its_own_case_however_small_the_import(
    tmp_path: Path,
) -> None:
    clean = Path(get_testdata_file("SC_rgb_jpeg.dcm")).read_bytes()
    # A Huffman table of zeros: the decoder of JPEG calls abort() on it.
    (tmp_path / "bad.dcm").write_bytes(clean[:1065] + bytes(85) + clean[1150:])
    (tmp_path / "good.dcm").write_bytes(clean)
    write_list(tmp_path, [("a", "P1", "good.dcm", "x"), ("b", "P2", "bad.dcm", "y")])
    options = ImportOptions(skip_bad=True)
    outcome = import_folder(home_in(tmp_path), tmp_path / "cases.csv", options)
    assert list(outcome.entries) == ["a"]
    (finding,) = outcome.left_out
    assert finding.case == "b"
    assert "died" in finding.message
