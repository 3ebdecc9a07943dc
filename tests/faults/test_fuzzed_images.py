"""Ten thousand damaged images: none crashes, hangs, fills the memory or writes where it may not."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_files

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from data_fixtures import write_seg, write_slices
from fuzzed_images import bomb, damaged

from consilium_client.data.ingest.case import Located
from consilium_client.data.ingest.dicom_headers import index_files
from consilium_client.data.ingest.readers import read_cases
from consilium_client.data.ingest.sources import Source, Sources, read_image
from consilium_common.errors import ConsiliumError

_FILES = 10_000
_BATCH = 1000
_LABELS_SHARE = 0.25
_LARGEST_SEED = 120_000
_LIMIT_SECONDS = 5.0
_MEMORY = 1 << 30

#: What children report: files opened for writing, folders made, and programs started.
_WATCH = """
import os, sys
_log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _hook(event, arguments):
    if event == "open":
        name, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove"):
        name = arguments[0]
    elif event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec"):
        name = event
    else:
        return
    if not str(name).startswith(({cases!r}, "/dev/null", "/proc/self/oom_score_adj")):
        os.write(_log, (event + " " + str(name) + "\\n").encode(errors="replace"))
sys.addaudithook(_hook)
"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean files of every kind that a site reads."""
    folder = tmp_path_factory.mktemp("seeds")
    images, labels = folder / "images", folder / "labels"
    images.mkdir()
    labels.mkdir()
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (12, 10, 4)).astype(np.int16)
    for file in get_testdata_files():
        path = Path(file)
        if path.is_file() and path.stat().st_size < _LARGEST_SEED and path.suffix in ("", ".dcm"):
            shutil.copy(path, images / f"{path.stem}.dcm")
    slices = write_slices(folder / "clean", values)
    shutil.copy(slices[0], images / "slice.dcm")
    mask = (values > 0) * rng.integers(1, 3, values.shape).astype(np.uint8)
    write_seg(labels / "seg.dcm", slices, mask, "one", "two")
    affine = read_image(Sources(folder).find("clean"))[0].affine
    header = {
        "space": "right-anterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
    }
    for target, array in ((images, values), (labels, mask)):
        for copy in range(6):  # as likely to be drawn as DICOM files are, which are many
            for suffix in (".nii", ".nii.gz"):
                nibabel.save(nibabel.Nifti1Image(array, affine), target / f"{copy}{suffix}")
            for encoding in ("raw", "gzip"):
                path = target / f"{copy}-{encoding}.nrrd"
                nrrd.write(str(path), array, header | {"encoding": encoding})
    picture = Image.fromarray(rng.integers(0, 255, (24, 20), dtype=np.uint8))
    for suffix in (".png", ".jpg", ".tif", ".bmp"):
        picture.save(images / f"picture{suffix}")
    return folder


def batch(seeds: Path, work: Path, numbers: range) -> list[tuple[int, Located]]:
    """Write damaged files and return them as cases, each with the number that makes it again."""
    images, labels = sorted((seeds / "images").iterdir()), sorted((seeds / "labels").iterdir())
    clean = Sources(seeds).find("clean")
    cases = []
    for number in numbers:
        chance = random.Random(number)
        is_label = chance.random() < _LABELS_SHARE
        seed = chance.choice(labels if is_label else images)
        path = work / f"{number}{''.join(Path(seed.name).suffixes[-2:])}"
        path.write_bytes(damaged(seed, chance.choice(images), chance))
        # As cases.csv would name it, past the first look that refuses what is plainly no image.
        kind = Sources(seeds).find(f"{seed.parent.name}/{seed.name}").kind
        source = Source(kind, (path,), str(path))
        if is_label:
            cases.append((number, Located({"ct": clean}, source, {"one": 1, "two": 2})))
        else:
            cases.append((number, Located({"ct": source}, None, None)))
    return cases


@pytest.mark.timeout(400)
def test_ten_thousand_damaged_files_are_read_or_refused(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, watch = tmp_path / "cases", tmp_path / "watch"
    cases.mkdir()
    watch.mkdir()
    log = tmp_path / "written.txt"
    (watch / "sitecustomize.py").write_text(_WATCH.format(log=str(log), cases=str(cases)))
    monkeypatch.setenv("PYTHONPATH", str(watch))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    outcomes: Counter[str] = Counter()
    folders = (cases / f"case-{number}" for number in count())

    def next_folder() -> Path:
        folder = next(folders)
        folder.mkdir()
        return folder

    for first in range(0, _FILES, _BATCH):
        work = tmp_path / f"work-{first}"
        work.mkdir()
        tasks = batch(seeds, work, range(first, first + _BATCH))
        for _, located in tasks:
            files = [source.files[0] for source in located.images.values() if source.files]
            index_files([path for path in files if path.suffix == ".dcm" and path.parent == work])
        slow = []
        for number, outcome in read_cases(tasks, next_folder, readers=2, seconds=_LIMIT_SECONDS):
            if _given_up(outcome):
                slow.append(tasks[number - first])
            else:
                outcomes[_told(number, outcome)] += 1
        # Other tests run beside this one: what took long is given its time again, by itself.
        for task in slow:
            ((number, outcome),) = read_cases(
                [task], next_folder, readers=1, seconds=_LIMIT_SECONDS
            )
            outcomes[_told(number, outcome)] += 1
        shutil.rmtree(work)
    assert sum(outcomes.values()) == _FILES
    assert log.exists(), "the children were not watched"
    assert log.read_text() == ""
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < _MEMORY
    # A decoder of JPEG that aborts takes its reader along and costs its own case alone.
    assert outcomes["died"] < _FILES // 200
    # The damage is neither so heavy that nothing is read nor so light that nothing is refused.
    assert outcomes["read"] > _FILES // 50
    assert _FILES - outcomes["read"] > _FILES // 5
    assert len(outcomes) > 8, outcomes


def _given_up(outcome: object) -> bool:
    return isinstance(outcome, ConsiliumError) and "longer than" in outcome.message


def _told(number: int, outcome: object) -> str:
    """Return what became of a file, after checking that it is one of what may become of it."""
    if not isinstance(outcome, ConsiliumError):
        content = json.dumps(getattr(outcome, "content", None))
        assert "NaN" not in content, f"file {number}"
        assert "Infinity" not in content, f"file {number}"
        return "read"
    assert outcome.code.startswith("data."), f"file {number}: {outcome}"
    assert outcome.message, f"file {number}"
    assert outcome.where, f"file {number}"
    assert not _given_up(outcome), f"file {number} hangs"
    return "died" if "died" in outcome.message else outcome.code


_BOMBS = (
    "nifti-claims",
    "nifti-unpacks",
    "nrrd-unpacks",
    "dicom-rle",
    "dicom-claims",
    "dicom-deflated",
)


@pytest.mark.parametrize("kind", _BOMBS)
def test_a_file_that_claims_or_unpacks_to_gigabytes_costs_neither_time_nor_memory(
    kind: str, tmp_path: Path
) -> None:
    path = bomb(kind, tmp_path / "bomb")
    assert path.stat().st_size < 8 << 20
    with _bounded():
        try:
            # A stream may be longer than its header says: what is behind it is never unpacked.
            volume, _ = read_image(Sources(tmp_path).find(path.name))
            assert volume.values.size == 8**3
        except ConsiliumError as error:
            assert error.code.startswith("data.")


@contextmanager
def _bounded() -> Iterator[None]:
    """Hold the block to five seconds and half a gigabyte."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < _LIMIT_SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 512 << 20
