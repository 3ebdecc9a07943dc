"""Defects put into clean images, one by one: each is named, or read rightly all the same."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import write_nifti, write_slices
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import RLELossless

from consilium_client.data.ingest import dicom_file
from consilium_client.data.ingest.dicom_headers import files_below, index_files, read_header
from consilium_client.data.ingest.dicom_series import read_series
from consilium_client.data.ingest.dicomdir import dicomdir_findings, read_dicomdir
from consilium_client.data.ingest.nifti import read_nifti
from consilium_client.data.ingest.picture import read_picture
from consilium_client.data.ingest.volume import LPS_TO_RAS, Volume
from consilium_common.errors import ConsiliumError

_ORIGIN = np.array([-20.0, -30.0, 40.0])
_SPACING = (0.8, 0.7, 2.5)
_TILTED = np.array([0.0, 2.5 * np.tan(np.radians(-18.5)), 2.5])


def hounsfield(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).integers(-1000, 1500, shape).astype(float)


def read(folder: Path) -> Volume:
    headers, findings = index_files(files_below(folder))
    if findings:
        first = findings[0]
        raise ConsiliumError(first.code, first.message, where=first.where, hint=first.hint)
    return read_series(headers, str(folder))[0]


def refused(folder: Path) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        read(folder)
    assert caught.value.hint
    return caught.value


def change(path: Path, **values: Any) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def require_places(volume: Volume, step: np.ndarray) -> None:
    """Check the corners against DICOM's own definition (PS3.3 C.7.6.2.1.1), to 0.001 mm."""
    columns, rows, count = volume.values.shape
    for i in (0, columns - 1):
        for j in (0, rows - 1):
            for k in (0, count - 1):
                place = _ORIGIN + [i * _SPACING[0], j * _SPACING[1], 0] + k * step
                found = (LPS_TO_RAS @ volume.affine @ [i, j, k, 1])[:3]
                assert np.abs(found - place).max() < 1e-3


def enhanced(path: Path, slices: Sequence[Path]) -> Path:
    """Write single slices as one multi-frame image, frame by frame in the order given."""
    import highdicom

    sources = [pydicom.dcmread(slice_) for slice_ in slices]
    uid = pydicom.uid.generate_uid
    made = highdicom.legacy.LegacyConvertedEnhancedCTImage(sources, uid(), 3, uid(), 1)
    path.parent.mkdir(exist_ok=True)
    made.save_as(path)
    return path


# --- the table of what other readers do in silence -----------------------------------------------


def test_four_missing_slices_are_counted_and_every_gap_is_named(tmp_path: Path) -> None:
    names = [f"{n:02d}.dcm" for n in range(20)]
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 20), names=names)
    for number in (5, 6, 7, 12):
        paths[number].unlink()
    error = refused(tmp_path / "ct")
    assert error.code == "data.missing-slices"
    assert error.message.startswith("4 slices are missing in 2 places: a step of 10.00 mm")
    assert f"3 between {paths[4]} and {paths[8]}" in error.where
    assert f"1 between {paths[11]} and {paths[13]}" in error.where


def test_shuffled_instance_numbers_are_put_right_by_position(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 6)
    paths = write_slices(tmp_path / "ct", values, names=[f"{c}.dcm" for c in "fbdace"])
    for number, path in zip((4, 1, 6, 3, 2, 5), paths, strict=True):
        change(path, InstanceNumber=number)
    volume = read(tmp_path / "ct")
    assert np.array_equal(volume.values, values)
    require_places(volume, np.array([0, 0, 2.5]))


def test_a_duplicate_file_is_named_with_its_twin(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 6), names=[f"{c}.dcm" for c in "abcdef"])
    shutil.copy(paths[2], tmp_path / "ct" / "copy.dcm")
    error = refused(tmp_path / "ct")
    assert error.code == "data.duplicate"
    assert error.where == f"{paths[2]} and {tmp_path / 'ct' / 'copy.dcm'}"


def test_two_patients_are_refused_and_neither_is_named(tmp_path: Path) -> None:
    for patient in ("SECRET-1", "SECRET-2"):
        names = [f"{patient[-1]}{n}.dcm" for n in range(4)]
        write_slices(tmp_path / "ct", hounsfield(4, 4, 4), patient=patient, names=names)
    error = refused(tmp_path / "ct")
    assert error.code == "data.two-patients" and "SECRET" not in str(error.to_dict())


@pytest.mark.parametrize("kept", [0, 50, 140, 400, 900, -5])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path: Path, kept: int) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(8, 8, 4))
    paths[1].write_bytes(paths[1].read_bytes()[:kept])
    error = refused(tmp_path / "ct")
    assert error.code == "data.truncated" and error.where == str(paths[1])


def test_a_tilted_gantry_is_read_with_every_voxel_in_its_place(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 6)
    write_slices(tmp_path / "ct", values, step=_TILTED)
    volume = read(tmp_path / "ct")
    assert np.array_equal(volume.values, values)
    require_places(volume, _TILTED)


def test_uneven_gaps_are_refused_and_the_stacks_are_told(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()
    values = hounsfield(4, 4, 10)
    names = [f"{n:02d}.dcm" for n in range(10)]
    write_slices(tmp_path / "ct", values[..., :6], series=uid, names=names[:6])
    above = (-20, -30, 40 + 5 * 2.5 + 4)
    apart = (0.8, 0.7, 4.0)
    upper = tmp_path / "ct" / "upper"
    write_slices(upper, values[..., 6:], series=uid, names=names[6:], origin=above, spacing=apart)
    error = refused(tmp_path / "ct")
    assert error.code == "data.uneven-slices"
    assert "5 × 2.50 mm, 4 × 4.00 mm" in error.message
    assert error.where.endswith("between 05.dcm and 06.dcm")


@pytest.mark.parametrize("step", [np.array([0, 0, 2.5]), _TILTED])
def test_a_multi_frame_image_is_put_in_order_rescaled_and_placed(
    tmp_path: Path, step: np.ndarray
) -> None:
    values = hounsfield(5, 4, 6)
    paths = write_slices(tmp_path / "ct", values, step=step, slope=0.5)
    enhanced(tmp_path / "enhanced" / "one.dcm", [paths[n] for n in (3, 0, 5, 1, 4, 2)])
    volume = read(tmp_path / "enhanced")
    assert np.array_equal(volume.values, values)
    require_places(volume, step)


def test_frames_missing_or_of_two_phases_are_refused_by_their_own_reason(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(5, 4, 6))
    gap = enhanced(tmp_path / "gap" / "one.dcm", [*paths[:2], *paths[3:]])
    error = refused(gap.parent)
    assert error.code == "data.missing-slices" and "one.dcm (frame " in error.where
    again = [shutil.copy(path, path.with_suffix(".again")) for path in paths]
    for path in again:
        change(path, SOPInstanceUID=pydicom.uid.generate_uid())
    error = refused(enhanced(tmp_path / "phases" / "one.dcm", [*paths, *again]).parent)
    assert error.code == "data.multi-frame" and "phases" in error.message
    shutil.copy(gap, gap.parent / "two.dcm")
    change(gap.parent / "two.dcm", SOPInstanceUID=pydicom.uid.generate_uid())
    assert refused(gap.parent).code == "data.multi-frame"


def test_a_single_enhanced_frame_is_rescaled_and_placed_too(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 1)
    paths = write_slices(tmp_path / "ct", values)
    enhanced(tmp_path / "enhanced" / "one.dcm", paths)
    single, multi = read(tmp_path / "ct"), read(tmp_path / "enhanced")
    assert np.array_equal(multi.values, values[:, :, 0].T)
    assert np.abs(single.affine - multi.affine).max() < 1e-6


def test_a_film_and_a_mosaic_are_refused_as_what_they_are(tmp_path: Path) -> None:
    film = Path(str(get_testdata_file("SC_rgb_rle_2frame.dcm")))
    (tmp_path / "film").mkdir()
    shutil.copy(film, tmp_path / "film")
    error = refused(tmp_path / "film")
    assert error.code == "data.multi-frame" and "film" in error.message
    changes = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}
    write_slices(tmp_path / "mosaic", hounsfield(4, 4, 3), changes=changes)
    error = refused(tmp_path / "mosaic")
    assert error.code == "data.multi-frame" and "mosaic" in error.message


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [-2000 + 1024, (-2000 + 1024) % 2**16])
def test_padding_becomes_the_smallest_measured_value(tmp_path: Path, written: int) -> None:
    values = hounsfield(5, 4, 3)
    values[0, 0] = -2000
    paths = write_slices(tmp_path / "ct", values)
    for path in paths:
        dataset = pydicom.dcmread(path)
        # Careless headers write a signed value as an unsigned one.
        dataset.add_new("PixelPaddingValue", "SS" if written < 0 else "US", written)
        dataset.save_as(path)
    measured = values > -2000
    expected = np.where(measured, values, values[measured].min())
    assert np.array_equal(read(tmp_path / "ct").values, expected)


def test_a_range_of_padding_above_all_values_becomes_background_too(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 3)
    values[0, 0], values[1, 1] = 3000, 3070
    changes = {"PixelPaddingValue": 3071 + 1024, "PixelPaddingRangeLimit": 3000 + 1024}
    write_slices(tmp_path / "ct", values, changes=changes)
    measured = values < 2000
    expected = np.where(measured, values, values[measured].min())
    assert np.array_equal(read(tmp_path / "ct").values, expected)


def test_declared_padding_that_is_also_measured_stays(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 3)
    values[2, 2] = 0  # water
    write_slices(tmp_path / "ct", values, changes={"PixelPaddingValue": 1024})
    assert np.array_equal(read(tmp_path / "ct").values, values)


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 3)
    paths = write_slices(tmp_path / "ct", values)
    factors = np.array([1.0, 2.0, 0.25])
    for path, factor in zip(paths, factors, strict=True):
        change(path, RescaleSlope=factor, RescaleIntercept=-1024 * factor)
    assert np.array_equal(read(tmp_path / "ct").values, values * factors)


# --- headers -------------------------------------------------------------------------------------


def test_a_file_of_an_old_archive_without_preamble_is_read(tmp_path: Path) -> None:
    values = hounsfield(5, 4, 3)
    for number, path in enumerate(write_slices(tmp_path / "ct", values)):
        dataset = pydicom.dcmread(path)
        bare = path.with_name(f"IMAGE{number}")
        dataset.preamble = None
        dataset.file_meta = FileMetaDataset()
        pydicom.dcmwrite(bare, dataset, implicit_vr=True, little_endian=True)
        assert bare.read_bytes()[:4] == b"\x08\x00\x08\x00"
        path.unlink()
    (tmp_path / "ct" / "notes").write_bytes(b"\x08\x00\x16\x00\x04\x00\x00\x00abcd" + b"x" * 200)
    assert np.array_equal(read(tmp_path / "ct").values, values)


def test_the_index_is_the_same_with_any_number_of_processes(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 110))
    paths[70].write_bytes(b"no image at all")
    told: list[tuple[int, int]] = []
    alone = index_files(files_below(tmp_path), workers=1)
    together = index_files(files_below(tmp_path), workers=2, progress=lambda *n: told.append(n))
    assert together == alone
    assert len(alone[0]) == 109 and [finding.where for finding in alone[1]] == [str(paths[70])]
    assert told[-1] == (110, 110) and told == sorted(told)


def test_a_dicomdir_leads_to_files_below_its_folder_only(tmp_path: Path) -> None:
    source = Path(str(get_testdata_file("DICOMDIR"))).parent
    medium = tmp_path / "medium"
    shutil.copytree(source / "77654033", medium / "77654033")
    shutil.copytree(source / "98892003", medium / "98892003".lower())
    content = (source / "DICOMDIR").read_bytes()
    (medium / "DICOMDIR").write_bytes(content)
    found = read_dicomdir(medium / "DICOMDIR")
    assert len(found) == 24 and all(path.is_relative_to(medium) for path in found)
    (finding,) = dicomdir_findings(medium / "DICOMDIR")
    assert finding.code == "data.missing" and "7 files" in finding.message
    (tmp_path / "7765403").mkdir()
    shutil.move(medium / "77654033" / "CR1", tmp_path / "7765403" / "CR1")
    (medium / "DICOMDIR").write_bytes(content.replace(rb"77654033\CR1", rb"..\7765403\CR1"[:12]))
    assert all(path.is_relative_to(medium) for path in read_dicomdir(medium / "DICOMDIR"))
    assert index_files([medium / "DICOMDIR"]) == ([], [])


def test_nothing_of_the_file_is_quoted_while_it_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 3))
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"Doe^Unmistakable", b"Doe^\xff\\=Mistak^=="))
        content = path.read_bytes()
        path.write_bytes(content.replace(b"19700101", b"SECRETSE").replace(b"nobody", b"SECRET"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path / "ct")
    written = capfd.readouterr()
    assert not caught and "SECRET" not in written.out + written.err


# --- bounds --------------------------------------------------------------------------------------


def peak_while_refused(path: Path) -> tuple[ConsiliumError, int]:
    """Return the error and the most bytes that were held while it was found."""
    tracemalloc.start()
    try:
        with pytest.raises(ConsiliumError) as caught:
            header = read_header(path)
            assert header is not None
            read_series([header], str(path))
        return caught.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("syntax", ["plain", "run lengths", "frames"])
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path, syntax: str) -> None:
    (path,) = write_slices(tmp_path / "ct", hounsfield(64, 64, 1))
    read_header(path)  # what imports take is not the file's
    if syntax == "run lengths":
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    if syntax == "frames":
        change(path, NumberOfFrames=2_000_000)
    else:
        change(path, Rows=11_000, Columns=11_000)
    error, peak = peak_while_refused(path)
    assert error.code in ("data.too-large", "data.truncated")
    assert peak < 50e6


def test_a_compressed_stream_that_claims_another_size_is_not_decoded(tmp_path: Path) -> None:
    content = Path(str(get_testdata_file("MR_small_jp2klossless.dcm"))).read_bytes()
    start = content.index(b"\xff\x4f\xff\x51") + 8
    lying = content[:start] + struct.pack(">2I", 60_000, 60_000) + content[start + 8 :]
    (tmp_path / "image.dcm").write_bytes(lying)
    error, peak = peak_while_refused(tmp_path / "image.dcm")
    assert error.code == "data.truncated" and "60000 × 60000" in error.message
    assert peak < 50e6


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_gdcm.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_a_compressed_stream_that_was_cut_is_not_filled_up_in_grey(
    tmp_path: Path, name: str
) -> None:
    dataset = pydicom.dcmread(str(get_testdata_file(name)))
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) * 3 // 4]])
    dataset.save_as(tmp_path / "image.dcm")
    error = refused(tmp_path)
    assert error.code == "data.truncated" and "end early" in error.message


def test_a_deflated_file_is_read_and_a_deflated_bomb_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = write_slices(tmp_path / "ct", hounsfield(16, 16, 1))
    dataset = pydicom.dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated.dcm")
    header = read_header(tmp_path / "deflated.dcm")
    assert header is not None
    whole = read_series([header], "")[0].values
    assert np.array_equal(whole, read(tmp_path / "ct").values)
    content = (tmp_path / "deflated.dcm").read_bytes()
    written = pydicom.dcmread(tmp_path / "deflated.dcm").file_meta
    meta = 144 + int(written.FileMetaInformationGroupLength)
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(2**24)) + bomb.flush()
    (tmp_path / "bomb.dcm").write_bytes(content[:meta] + packed)
    monkeypatch.setattr(dicom_file, "_MOST_INFLATED", 2**20)
    error, peak = peak_while_refused(tmp_path / "bomb.dcm")
    assert error.code == "data.too-large" and peak < 4e6


def test_a_copy_that_was_never_filled_is_refused_at_once(tmp_path: Path) -> None:
    (path,) = write_slices(tmp_path / "ct", hounsfield(16, 16, 1))
    content = path.read_bytes()
    meta = 144 + int(pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength)
    for kept, code in ((132, "data.truncated"), (meta, "data.truncated"), (500, "data.too-large")):
        path.write_bytes(content[:kept] + bytes(2**22))
        assert refused(path.parent).code == code


@pytest.mark.parametrize("defect", ["short", "gzip", "start", "axes"])
def test_a_nifti_header_that_claims_too_much_is_refused_before_memory_is_taken(
    tmp_path: Path, defect: str
) -> None:
    path = write_nifti(tmp_path / "image.nii", hounsfield(8, 8, 8))
    content = bytearray(path.read_bytes())
    if defect == "start":
        content[108:112] = struct.pack("<f", 3e9)
    elif defect == "axes":
        content[40:48] = struct.pack("<4h", 3, 30_000, 30_000, 30_000)
    else:
        content[40:48] = struct.pack("<4h", 3, 900, 900, 900)
    if defect == "gzip":
        path = path.with_name("image.nii.gz")
        path.write_bytes(gzip.compress(bytes(content)))
    else:
        path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ConsiliumError) as caught:
        read_nifti(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    codes = {"short": "data.truncated", "gzip": "data.truncated"}
    assert caught.value.code == codes.get(defect, "data.too-large")


def test_a_stream_longer_than_its_nifti_header_says_is_not_unpacked(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "plain.nii", hounsfield(8, 8, 8))
    longer = tmp_path / "longer.nii.gz"
    longer.write_bytes(gzip.compress(path.read_bytes() + bytes(2**26)))
    tracemalloc.start()
    volume = read_nifti(longer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert np.array_equal(volume.values, np.asarray(nibabel.load(path).dataobj))


def test_a_program_in_a_pictures_clothes_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF")
    with pytest.raises(ConsiliumError) as caught:
        read_picture(tmp_path / "image.png")
    assert caught.value.code == "data.truncated"


def test_positions_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 4))
    headers, _ = index_files(paths)
    for bad in (np.nan, np.inf):
        changed = dataclasses.replace(headers[1], position=(0.0, 0.0, bad))
        with pytest.raises(ConsiliumError) as caught:
            read_series([headers[0], changed, *headers[2:]], "ct")
        assert caught.value.code == "data.geometry"


def test_slices_that_do_not_say_where_they_lie_are_not_put_in_file_order(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", hounsfield(4, 4, 4))
    change(paths[2], ImagePositionPatient=None)
    error = refused(tmp_path / "ct")
    assert error.code == "data.no-position" and error.where == str(paths[2])


@pytest.mark.parametrize(("degrees", "code"), [(44.0, None), (46.0, "data.tilt")])
def test_a_shear_is_read_up_to_45_degrees(tmp_path: Path, degrees: float, code: str | None) -> None:
    step = np.array([0.0, np.tan(np.radians(degrees)), 1.0]) * 2.5
    write_slices(tmp_path / "ct", hounsfield(4, 4, 5), step=step)
    if code is None:
        read_series(index_files(files_below(tmp_path / "ct"))[0], "ct")
    else:
        assert refused(tmp_path / "ct").code == code
