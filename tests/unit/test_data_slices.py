"""Reading a series' files together gives what reading each by itself gives, or names the file."""

from __future__ import annotations

import hashlib
import logging
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import home_in, write_nifti, write_slices
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_modality_lut
from pydicom.uid import RLELossless

from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest import run
from consilium_client.data.ingest.cache import FolderWriter
from consilium_client.data.ingest.case import Located
from consilium_client.data.ingest.dicom_file import is_compressed, quietly
from consilium_client.data.ingest.dicom_headers import read_header
from consilium_client.data.ingest.nifti import read_nifti
from consilium_client.data.ingest.pixels import _rescaled, decode
from consilium_client.data.ingest.slices import decode_slices, open_slices
from consilium_client.data.ingest.sources import Sources, content_digest, read_image
from consilium_common.errors import ConsiliumError


def pack(dataset: Any) -> None:
    """Compress, and keep the instance that the header says."""
    dataset.compress(RLELossless, generate_instance_uid=False)


#: What one slice of a series may say otherwise than the others.
CHANGES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda d: None,
    "rescale": lambda d: setattr(d, "RescaleSlope", 0.5),
    "padding": lambda d: d.add_new("PixelPaddingValue", "SS", 3),
    "inverted": lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"),
    "unsigned": lambda d: setattr(d, "PixelRepresentation", 0),
    "bits": lambda d: d.update({"BitsStored": 12, "HighBit": 11}),
    "name": lambda d: setattr(d, "PatientName", "Other^Person"),
    "letters": lambda d: setattr(d, "SpecificCharacterSet", "ISO_IR 100"),
    "no position": lambda d: d.pop("ImagePositionPatient", None),
    "no slope": lambda d: d.pop("RescaleSlope", None),
    "one frame": lambda d: setattr(d, "NumberOfFrames", 1),
    "packed": lambda d: None if d.file_meta.TransferSyntaxUID.is_encapsulated else pack(d),
    "source": lambda d: setattr(d, "ReferencedSeriesSequence", [pydicom.Dataset()]),
}


def changed(path: Path, *names: str) -> None:
    dataset = pydicom.dcmread(path)
    for name in names:
        CHANGES[name](dataset)
    dataset.save_as(path)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    odd=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(sorted(CHANGES))), max_size=4),
    slope=st.sampled_from([1.0, 2.0, 0.25]),
)
def test_files_read_together_are_the_same_as_files_read_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    seed: int,
    odd: list[tuple[int, str]],
    slope: float,
) -> None:
    folder = tmp_path_factory.mktemp("series")
    values = np.random.default_rng(seed).integers(0, 900, (4, 3, 6)).astype(float)
    paths = write_slices(folder, values, slope=slope, intercept=0.0)
    for number, name in odd:
        changed(paths[number], name)
    series = open_slices(paths)
    assert not series.findings
    alone = [read_header(path) for path in paths]
    assert series.headers == alone
    assert series.digests == {p: hashlib.sha256(p.read_bytes()).digest() for p in paths}
    together = list(decode_slices(series.headers, series.slices))
    assert not series.slices
    singly = [decode(header) for header in alone if header is not None]
    assert np.array_equal(
        np.concatenate([part.values for part in together]),
        np.stack([one.values for one in singly]),
    )
    masks = [np.zeros(p.values.shape, bool) if p.padding is None else p.padding for p in together]
    none = np.zeros(singly[0].values.shape, bool)
    expected = [none if one.padding is None else one.padding for one in singly]
    assert np.array_equal(np.concatenate(masks), np.stack(expected))


def test_slices_that_repeat_each_other_are_decoded_in_one_piece(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", np.zeros((4, 3, 6)))
    series = open_slices(paths)
    assert len(list(decode_slices(series.headers, series.slices))) == 1
    changed(paths[2], "inverted")
    series = open_slices(paths)
    assert len(list(decode_slices(series.headers, series.slices))) == 3


@pytest.mark.parametrize("number", [0, 3, 5])
def test_the_one_file_whose_pixels_are_short_is_named(tmp_path: Path, number: int) -> None:
    paths = write_slices(tmp_path / "ct", np.zeros((4, 3, 6)))
    dataset = pydicom.dcmread(paths[number])
    dataset.PixelData = dataset.PixelData[:-4]
    dataset.save_as(paths[number])
    with pytest.raises(ConsiliumError) as caught:
        read_image(Sources(tmp_path).find("ct"))
    assert caught.value.code == "data.truncated"
    assert caught.value.where == str(paths[number])


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", np.zeros((4, 3, 3)))
    content = paths[1].read_bytes()
    for length in range(0, len(content), 9):
        paths[1].write_bytes(content[:length])
        with pytest.raises(ConsiliumError) as caught:
            read_image(Sources(tmp_path).find("ct"))
        assert str(paths[1]) in caught.value.where


def test_a_files_digest_is_the_same_whether_it_was_read_on_the_way_or_not(tmp_path: Path) -> None:
    write_slices(tmp_path / "ct", np.zeros((4, 3, 3)))
    source = Sources(tmp_path).find("ct")
    known: dict[Path, bytes] = {}
    read_image(source, known)
    assert set(known) == set(source.files)
    assert content_digest(source, known) == content_digest(source)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]),
    slope=st.sampled_from([1.0, -1.0, 2.0, 0.5, 3e4, 1e9, 0.0]),
    intercept=st.sampled_from([0.0, -1024.0, 0.5, 2e9, -3e9]),
)
def test_rescaled_values_are_those_of_pydicom(dtype: Any, slope: float, intercept: float) -> None:
    dataset = pydicom.Dataset()
    dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
    ends = np.iinfo(dtype)
    stored = np.array([[ends.min, ends.max, 0, 1]], dtype=dtype)
    assert np.array_equal(_rescaled(stored, dataset), apply_modality_lut(stored, dataset))


# --- what needs a decoder ----------------------------------------------------------------------


def test_the_quick_look_for_compression_says_what_pydicom_says() -> None:
    folder = Path(str(get_testdata_file("CT_small.dcm"))).parent
    files = [path for path in sorted(folder.glob("*.dcm")) if path.is_file()]
    packed = 0
    for path in files:
        try:
            with quietly():
                syntax = read_file_meta_info(path).get("TransferSyntaxUID", "")
                expected = bool(pydicom.uid.UID(str(syntax)).is_encapsulated)
        except Exception:
            expected = False
        assert is_compressed(path) == expected, path.name
        packed += expected
    assert packed > 10


@pytest.mark.parametrize("hidden", ["as text", "behind the group's end"])
def test_compression_that_is_badly_declared_is_seen(tmp_path: Path, hidden: str) -> None:
    path = write_slices(tmp_path / "ct", np.zeros((4, 3, 1)))[0]
    changed(path, "packed")
    content = path.read_bytes()
    if hidden == "as text":
        at = content.index(b"\x02\x00\x10\x00UI")
        content = content[: at + 4] + b"LO" + content[at + 6 :]
    else:
        content = content[:140] + struct.pack("<I", 14) + content[144:]
    path.write_bytes(content)
    assert is_compressed(path)


def test_reading_in_threads_leaves_warnings_and_the_log_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_WORTH_THREADS", 0)
    shape = (6, 5, 4)
    rows = ["case_id,patient_id,image,label"]
    for number in range(6):
        folder = tmp_path / "data" / f"s{number}"
        for path in write_slices(folder, np.full(shape, number * 10.0)):
            dataset = pydicom.dcmread(path)
            dataset.add_new("PatientBirthDate", "DA", "Nobody's birthday")
            dataset.save_as(path)
        header = read_image(Sources(folder.parent).find(folder.name))[0]
        write_nifti(folder.parent / f"l{number}.nii.gz", np.ones(shape), header.affine, np.uint8)
        rows.append(f"c{number},p{number},s{number},l{number}.nii.gz")
    (tmp_path / "data" / "cases.csv").write_text("\n".join(rows) + "\n")
    log = logging.getLogger("pydicom")
    before = (list(warnings.filters), log.disabled, pydicom.config.settings.reading_validation_mode)
    capfd.readouterr()
    labels = {"background": 0, "organ": 1}
    outcome = import_folder(
        home_in(tmp_path), tmp_path / "data" / "cases.csv", ImportOptions(labels=labels)
    )
    after = (list(warnings.filters), log.disabled, pydicom.config.settings.reading_validation_mode)
    assert after == before
    assert len(outcome.entries) == 6
    assert {entry.image("image").max() for entry in outcome.entries.values()} == set(
        range(0, 60, 10)
    )
    assert "birthday" not in "".join(capfd.readouterr())


def test_cases_with_compressed_files_are_read_by_children(tmp_path: Path) -> None:
    plain = write_slices(tmp_path / "plain", np.zeros((4, 3, 3)))
    packed = write_slices(tmp_path / "packed", np.zeros((4, 3, 3)))
    changed(packed[1], "packed")
    sources = Sources(tmp_path)
    cases = [Located({"image": sources.find("plain")}, None, None)] * 9
    assert run._children_for(cases, needed=len(plain)) == 0
    risky = Located({"image": sources.find("packed")}, None, None)
    assert run._children_for([*cases, risky], needed=len(plain)) >= 1
    assert run._children_for([risky], needed=len(plain)) == 1
    assert run._children_for(cases, needed=2**30) >= 1


# --- NIfTI, and what is left behind ------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.int16, np.float32, np.float64, np.int32]),
    scaled=st.booleans(),
    swapped=st.booleans(),
    version=st.sampled_from([1, 2]),
    note=st.booleans(),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_a_nifti_is_read_as_nibabel_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    dtype: Any,
    scaled: bool,
    swapped: bool,
    version: int,
    note: bool,
    suffix: str,
) -> None:
    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    header = kind.header_class(endianness=">" if swapped else "<")
    header.set_data_dtype(np.dtype(dtype).newbyteorder(">" if swapped else "<"))
    values = np.random.default_rng(0).integers(0, 90, (4, 5, 6)).astype(dtype)
    image = kind(
        values, np.array([[0, 2, 0, 4], [1.5, 0, 0, 3], [0, 0, 3, 2], [0, 0, 0, 1.0]]), header
    )
    if note:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 700))
    if scaled:
        image.header.set_slope_inter(0.5, 3)
    path = tmp_path_factory.mktemp("nifti") / f"image{suffix}"
    nibabel.save(image, path)
    expected, found = nibabel.load(path), read_nifti(path)
    assert np.array_equal(found.values, np.asarray(expected.dataobj))
    assert np.array_equal(found.affine, expected.affine)


def test_a_case_that_was_begun_and_not_adopted_leaves_nothing(tmp_path: Path) -> None:
    with FolderWriter(tmp_path) as writer:
        kept, size = writer.write({"image": np.zeros(3)}, {"a": 1})
        writer.write({"image": np.zeros(3)}, {"b": 2})
        writer.adopt(kept, "kept", size)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_header_differs_from_its_neighbours_in_instance_and_position_alone(
    tmp_path: Path,
) -> None:
    headers = open_slices(write_slices(tmp_path / "ct", np.zeros((4, 3, 4)))).headers
    first = headers[0]
    for one in headers:
        assert one == replace(
            first, path=one.path, sop_instance=one.sop_instance, position=one.position
        )
    assert len({one.sop_instance for one in headers}) == len({one.position for one in headers}) == 4
