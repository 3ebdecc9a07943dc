"""A clean copy holds nothing of the patient, the same pixels, and the same relations."""

from __future__ import annotations

import base64
import errno
import json
import os
from datetime import date, datetime, timedelta
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import home_in, real, write_nifti, write_seg, write_slices
from deid_samples import NAME, NUMBER, SURNAME, holds, planted_series
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from consilium_client.data.cli import data_app
from consilium_client.data.deid.check import identity_findings
from consilium_client.data.deid.clean import Rules, clean_dataset, days_back, new_uid
from consilium_client.data.deid.copying import Copied, deidentify
from consilium_client.data.ingest.dicom_headers import files_below, read_header
from consilium_client.data.ingest.sources import Sources, read_image, read_label
from consilium_client.data.schema import SplitFractions
from consilium_client.data.split import PatientKey, open_patient_key
from consilium_common.errors import ConsiliumError

KEY = PatientKey(bytes(range(32)))


def copy(tmp_path: Path, folder: Path, rules: Rules | None = None, **further: bool) -> Copied:
    return deidentify(home_in(tmp_path), folder, tmp_path / "out", rules or Rules(), **further)


def test_the_copy_holds_nothing_of_the_patient_and_every_pixel(tmp_path: Path) -> None:
    paths = planted_series(tmp_path / "data" / f"{SURNAME} 1957-03-12")
    before = {path: path.read_bytes() for path in paths}
    copied = copy(tmp_path, tmp_path / "data")
    assert (copied.written, copied.failed) == (3, ())
    assert {path: path.read_bytes() for path in paths} == before  # never in place
    clean = files_below(copied.out)
    names = "\n".join(map(str, [path.relative_to(copied.out) for path in clean]))
    written = b"".join(path.read_bytes() for path in (*clean, copied.log))
    assert holds(names.encode() + written) == [] and b"19570312" not in written
    assert identity_findings(clean, copied.out, names={}) == ()
    pixels = {bytes(pydicom.dcmread(path).PixelData) for path in clean}
    assert pixels == {bytes(pydicom.dcmread(path).PixelData) for path in paths}
    first = pydicom.dcmread(clean[0])
    assert first.PatientIdentityRemoved == "YES"
    assert [item.CodeValue for item in first.DeidentificationMethodCodeSequence] == ["113100"]
    assert first.PatientID == open_patient_key(home_in(tmp_path)).pseudonym(NUMBER)


def test_image_and_segmentation_still_fit_after_cleaning(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(-900, 900, (14, 12, 5)).astype(float)
    slices = write_slices(tmp_path / "data" / "ct", values)
    label = np.zeros(values.shape)
    label[3:8, 4:9, 1:4] = 1
    write_seg(tmp_path / "data" / "seg.dcm", slices, label, "liver")
    original, _ = read_image(Sources(tmp_path).find("data/ct"))
    copied = copy(tmp_path, tmp_path / "data", Rules(longitudinal=True))
    headers = [header for path in files_below(copied.out) if (header := read_header(path))]
    image = next(header for header in headers if header.is_image)
    mask = next(header for header in headers if header.is_segmentation)
    assert mask.patient_id == image.patient_id and mask.study == image.study
    assert mask.referenced_series == (image.series,)
    sources = Sources(copied.out)
    volume, parts = read_image(sources.find(str(image.path.parent.relative_to(copied.out))))
    assert np.array_equal(volume.values, original.values)
    assert np.allclose(volume.affine, original.affine)
    source = sources.find(str(mask.path.relative_to(copied.out)))
    read = read_label(source, volume, parts, {"liver": 1}, "image")
    assert int(read.values.sum()) == int(label.sum())


@pytest.mark.parametrize(("keep", "name"), [((), "ROI 7"), (("descriptors",), "liver")])
def test_structures_keep_their_contours_references_and_a_name(
    tmp_path: Path, keep: tuple[str, ...], name: str
) -> None:
    (path,) = write_slices(tmp_path / "data", np.zeros((8, 8, 1)))
    dataset = pydicom.dcmread(path)
    image = str(dataset.SOPInstanceUID)
    for word in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "BitsAllocated"):
        delattr(dataset, word)
    dataset.Modality, dataset.SOPClassUID = "RTSTRUCT", pydicom.uid.RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    roi, contours, contour, reference = (pydicom.Dataset() for _ in range(4))
    roi.ROINumber, roi.ROIName = 7, "liver"
    roi.ReferencedFrameOfReferenceUID = dataset.FrameOfReferenceUID
    reference.ReferencedSOPInstanceUID = image
    contour.ContourImageSequence = [reference]
    contour.ContourData = [1.0, 2.0, 3.0]
    contours.ContourSequence, contours.ReferencedROINumber = [contour], 7
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [contours]
    dataset.save_as(tmp_path / "data" / "rtstruct.dcm", enforce_file_format=True)
    copied = copy(tmp_path, tmp_path / "data", Rules(keep=keep))
    read = [pydicom.dcmread(path) for path in files_below(copied.out)]
    ct, drawn = sorted(read, key=lambda one: str(one.Modality))
    (named,), (body,) = drawn.StructureSetROISequence, drawn.ROIContourSequence
    assert (named.ROIName, named.ROINumber, body.ReferencedROINumber) == (name, 7, 7)
    (line,) = body.ContourSequence
    assert line.ContourImageSequence[0].ReferencedSOPInstanceUID == ct.SOPInstanceUID != image
    assert list(line.ContourData) == [1.0, 2.0, 3.0]
    assert named.ReferencedFrameOfReferenceUID == ct.FrameOfReferenceUID


def test_the_copy_is_the_same_patients_in_the_same_split() -> None:
    fractions = SplitFractions()
    for number in range(40):
        patient = f"P-{number}"
        other = KEY.pseudonym(patient)
        assert KEY.name(other) == KEY.name(patient) and KEY.pseudonym(other) == other
        assert KEY.split(other, fractions) == KEY.split(patient, fractions)
        # Whoever holds a copy and the ledger cannot tell which charge is whose.
        assert len(other) == 64 and KEY.name(patient)[:8] not in other
        assert KEY.name(patient) not in base64.b32decode(other, casefold=True).hex()
        assert days_back(KEY, other) == days_back(KEY, patient)
    forged = KEY.pseudonym("P-1")[:-1] + ("a" if KEY.pseudonym("P-1")[-1] != "a" else "b")
    assert KEY.name(forged) != KEY.name("P-1")
    assert PatientKey(bytes(32)).name(KEY.pseudonym("P-1")) != KEY.name("P-1")


@settings(max_examples=15, deadline=None)
@given(first=st.dates(date(1950, 1, 1), date(2090, 1, 1)), gap=st.integers(0, 3000))
def test_intervals_of_a_patient_are_kept_and_dates_are_not(first: date, gap: int) -> None:
    moved = []
    for day in (first, first + timedelta(days=gap)):
        dataset = pydicom.Dataset()
        dataset.PatientID, dataset.SOPClassUID, dataset.SOPInstanceUID = "P", "1.2", "1.2.3"
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        written = f"{day.year:04d}{day.month:02d}{day.day:02d}"
        dataset.StudyDate = written
        dataset.AcquisitionDateTime = f"{written}101112.5"
        dataset.PatientBirthDate = "19570312"
        clean_dataset(dataset, KEY, Rules(longitudinal=True))
        assert dataset.StudyDate != written and not dataset.PatientBirthDate
        assert str(dataset.AcquisitionDateTime) == f"{dataset.StudyDate}101112.5"
        moved.append(datetime.strptime(str(dataset.StudyDate), "%Y%m%d"))
    assert (moved[1] - moved[0]).days == gap


def test_uids_and_shifts_depend_on_the_key_alone() -> None:
    assert new_uid(KEY, "1.2.3") == new_uid(KEY, "1.2.3") != new_uid(PatientKey(bytes(32)), "1.2.3")
    assert new_uid(KEY, "1.2.840.10008.1.4.1.1") == "1.2.840.10008.1.4.1.1"
    assert 1 <= days_back(KEY, "P") <= 3650
    assert days_back(KEY, "P") != days_back(KEY, "Q")


def test_what_is_kept_is_cleaned_and_declared(tmp_path: Path) -> None:
    changes = {
        "SeriesDescription": "T1 post contrast",
        "StudyDescription": "Mrs Unmistakable, follow-up",
        "PatientAge": "094Y",
        "PatientSex": "F",
    }
    write_slices(tmp_path / "data", np.zeros((8, 8, 1)), changes=changes)
    copied = copy(tmp_path, tmp_path / "data", Rules(keep=("characteristics", "descriptors")))
    (path,) = files_below(copied.out)
    dataset = pydicom.dcmread(path)
    assert dataset.SeriesDescription == "T1 post contrast"
    assert dataset.StudyDescription == "REMOVED"
    assert (dataset.PatientAge, dataset.PatientSex) == ("090Y", "F")
    codes = [item.CodeValue for item in dataset.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113108", "113105"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_keeps_its_voxels_and_loses_its_text(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header["descrip"] = NAME.encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, NAME.encode() * 40))
    nibabel.save(image, folder / f"scan_19570312{suffix}")
    copied = copy(tmp_path, tmp_path / "data")
    (path,) = files_below(copied.out)
    read = nibabel.load(path)
    assert np.array_equal(np.asanyarray(read.dataobj), values)
    assert np.array_equal(read.affine, image.affine) and not read.header.extensions
    assert path.relative_to(copied.out).parts[:2] == ("nifti", "images")
    assert "19570312" not in str(path) and path.name.startswith("scan_")
    assert holds(path.read_bytes()) == []


def test_names_that_pair_images_and_masks_still_pair(tmp_path: Path) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        write_nifti(
            tmp_path / "data" / kind / f"{SURNAME}^73405519_0001.nii.gz", np.zeros((4,) * 3)
        )
    copied = copy(tmp_path, tmp_path / "data")
    first, second = files_below(copied.out)
    assert first.name == second.name and first.name.endswith("_0001.nii.gz")
    assert (first.parent.name, second.parent.name) == ("imagesTr", "labelsTr")
    assert not holds(first.name.encode(), SURNAME, "73405519")


def test_a_second_run_copies_only_what_changed(tmp_path: Path) -> None:
    paths = planted_series(tmp_path / "data")
    copied = copy(tmp_path, tmp_path / "data")
    clean = files_below(copied.out)
    clean[0].write_bytes(b"broken")
    paths[1].touch()
    again = copy(tmp_path, tmp_path / "data")
    assert again.kept in (1, 2) and again.written == 3 - again.kept
    assert len(files_below(again.out)) == 3 and again.passed_over == {}
    assert identity_findings(files_below(again.out), again.out, names={}) == ()


def test_a_killed_run_is_taken_up(tmp_path: Path) -> None:
    planted_series(tmp_path / "data")
    copied = copy(tmp_path, tmp_path / "data")
    (journal,) = (tmp_path / "home" / "data" / "deidentified").iterdir()
    assert journal.stat().st_mode & 0o777 == 0o600
    whole = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(whole[:2]) + whole[2][:30])  # killed while writing a line
    half = copied.out / ".half-1.dcm"
    half.write_bytes(b"x")
    again = copy(tmp_path, tmp_path / "data")
    assert (again.written, again.kept, again.passed_over) == (2, 1, {}) and not half.exists()
    assert len(json.loads(again.log.read_text())["files"]) == 3


def test_a_full_disk_is_one_error_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted_series(tmp_path / "data")
    open_patient_key(home_in(tmp_path))
    real_link, calls = os.link, []

    def link(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(ConsiliumError) as caught:
            copy(tmp_path, tmp_path / "data")
    assert caught.value.code == "state.disk" and "full" in caught.value.message
    left = list((tmp_path / "out").rglob("*.dcm"))
    assert len(left) == 1 and not list((tmp_path / "out").rglob(".half-*"))
    again = copy(tmp_path, tmp_path / "data")
    assert (again.kept, again.written) == (1, 2)


@pytest.mark.parametrize("place", ["data", "data/inner", ".", "full", "absent"])
def test_refused_folders(tmp_path: Path, place: str) -> None:
    write_slices(tmp_path / "data", np.zeros((8, 8, 1)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    folder = tmp_path / ("nothing" if place == "absent" else "data")
    with pytest.raises(ConsiliumError) as caught:
        deidentify(home_in(tmp_path), folder, tmp_path / place, Rules())
    assert caught.value.code == "usage.folder"
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def test_other_options_need_another_folder(tmp_path: Path) -> None:
    write_slices(tmp_path / "data", np.zeros((8, 8, 1)))
    copy(tmp_path, tmp_path / "data")
    with pytest.raises(ConsiliumError, match="not empty"):
        copy(tmp_path, tmp_path / "data", Rules(longitudinal=True))


@pytest.mark.parametrize("damage", ["cut", "no-patient", "no-pixels", "text"])
def test_bad_files_are_named_once_and_the_others_are_copied(tmp_path: Path, damage: str) -> None:
    good, bad = write_slices(tmp_path / "data", np.zeros((8, 8, 2)))
    dataset = pydicom.dcmread(bad)
    if damage == "no-patient":
        dataset.PatientID = ""
    elif damage == "no-pixels":
        del dataset.PixelData
    dataset.save_as(bad)
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:-30])
    elif damage == "text":
        bad.write_bytes(b"not DICOM")
    arguments = ["deidentify", str(tmp_path / "data"), str(tmp_path / "out")]
    arguments += ["--home", str(tmp_path / "home")]
    answer = CliRunner().invoke(data_app, arguments)
    assert answer.exit_code == 4, answer.output
    wanted = "data.no-patient" if damage == "no-patient" else "data.truncated"
    assert answer.stderr.count("error data.") == 1 and f"error {wanted}" in answer.stderr
    assert bad.name in answer.stderr and "Unmistakable" not in answer.output
    assert len(files_below(tmp_path / "out")) == 1
    assert CliRunner().invoke(data_app, [*arguments, "--skip-bad"]).exit_code == 0
    assert good.is_file() and bad.is_file()


def test_screen_captures_are_left_out_and_shown(tmp_path: Path) -> None:
    write_slices(tmp_path / "data" / "a", np.zeros((64, 64, 1)))
    capture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"}
    noise = np.random.default_rng(0).normal(size=(64, 64, 1)) * 100
    write_slices(tmp_path / "data" / "b", noise, changes=capture)
    arguments = ["deidentify", str(tmp_path / "data"), "--home", str(tmp_path / "home")]
    answer = CliRunner().invoke(data_app, [*arguments, str(tmp_path / "out")])
    assert answer.exit_code == 0 and "Look at these" in answer.stderr
    assert len(files_below(tmp_path / "out")) == 1
    assert len(list((tmp_path / "home" / "reports" / "burned-in").glob("*.png"))) == 1
    more = [*arguments, str(tmp_path / "all"), "--include-burned-in"]
    assert CliRunner().invoke(data_app, more).exit_code == 0
    assert len(files_below(tmp_path / "all")) == 2


@pytest.mark.data
def test_the_shared_studies_come_out_clean(tmp_path: Path) -> None:
    for name in ("dicom-seg", "dicom-mr/Study3/11_HCropVolume"):
        folder = real(name)
        out = tmp_path / folder.name
        copied = deidentify(home_in(tmp_path), folder, out, Rules())
        assert copied.failed == () and copied.written == sum(
            1 for path in files_below(folder) if path.suffix == ".dcm"
        )
        assert identity_findings(files_below(out), out, names={}) == ()
