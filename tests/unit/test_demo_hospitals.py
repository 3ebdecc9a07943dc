"""The demo's hospitals: real DICOM and NIfTI, the same voxels in both, equal for equal seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage

from consilium_client.data.cohort import open_cohort
from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.home import SiteHome
from consilium_common.demo.anatomy import CLASSES, draw_anatomy
from consilium_common.demo.dicom_writer import Identity, write_segmentation, write_series
from consilium_common.demo.hospitals import NAMES, Hospital, scanners, write_hospitals, write_nifti
from consilium_common.demo.scanner import acquire
from consilium_common.errors import ConsiliumError
from consilium_common.study.load import load_study

PATIENTS = (2, 2, 2)
SIZE = 20


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Hospital], list[Any]]:
    progress: list[Any] = []
    folder = tmp_path_factory.mktemp("hospitals")
    hospitals = write_hospitals(
        folder, patients=PATIENTS, size=SIZE, seed=3, progress=lambda *at: progress.append(at)
    )
    return hospitals, progress


def slices(series: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(series.iterdir())]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def image_pairs(hospital: Hospital) -> Iterator[tuple[Any, Any]]:
    """Image and label of every case of a NIfTI hospital."""
    if hospital.format == "msd":
        rows = json.loads((hospital.folder / "dataset.json").read_text())["training"]
    else:
        rows = csv.DictReader((hospital.folder / "cases.csv").open())
    for row in rows:
        yield tuple(nibabel.load(hospital.folder / row[name]) for name in ("image", "label"))


def test_a_dicom_series_agrees_exactly_with_its_nifti_twin(tmp_path: Path) -> None:
    scanner = scanners()[0]
    rng = np.random.default_rng(11)
    scan = acquire(draw_anatomy(rng), scanner, rng, size=24)
    identity = Identity("Test", "T-1", "visit")
    series = write_series(scan, scanner, identity, tmp_path / "ct")
    write_segmentation(scan, series, identity, tmp_path / "seg.dcm")
    write_nifti(scan, tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")

    volume = hd.get_volume_from_series(slices(tmp_path / "ct"))
    seg = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    seg = seg.match_geometry(volume)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    for from_dicom, name in ((volume, "image"), (seg, "label")):
        nifti = nibabel.as_closest_canonical(nibabel.load(tmp_path / f"{name}.nii.gz"))
        values = np.asarray(from_dicom.array, np.float64)
        dicom = nibabel.as_closest_canonical(
            nibabel.Nifti1Image(values, to_ras @ from_dicom.affine)
        )
        np.testing.assert_array_equal(dicom.get_fdata(), nifti.get_fdata())
        np.testing.assert_allclose(dicom.affine, nifti.affine, atol=1e-4)
    # And with what was scanned; half Hounsfield steps show that the slope counts.
    image = nibabel.load(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(), scan.hounsfield)
    assert (scan.hounsfield % 1 != 0).any()


def test_the_dicom_series_is_a_valid_one(written: tuple[list[Hospital], list[Any]]) -> None:
    northfield = written[0][0]
    patients = sorted(northfield.folder.iterdir())
    assert len(patients) == PATIENTS[0]
    ids, uids = set(), set()
    for patient in patients:
        series = slices(patient / "ct")
        for dataset in series:
            assert dataset.SOPClassUID == CTImageStorage
            assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (0.5, -1024)
            for uid in (
                dataset.SOPInstanceUID,
                dataset.SeriesInstanceUID,
                dataset.StudyInstanceUID,
            ):
                assert uid.is_valid
            uids.add(dataset.SOPInstanceUID)
        assert len({dataset.SeriesInstanceUID for dataset in series}) == 1
        ids.add(series[0].PatientID)

        heights = [float(dataset.ImagePositionPatient[2]) for dataset in series]
        assert heights != sorted(heights) and heights != sorted(heights, reverse=True), (
            "file names must not give the order away"
        )
        gaps = np.diff(sorted(heights))
        assert np.allclose(gaps, float(series[0].SliceThickness))

        seg = hd.seg.segread(patient / "liver-seg.dcm")
        assert seg.StudyInstanceUID == series[0].StudyInstanceUID
        assert seg.SeriesInstanceUID != series[0].SeriesInstanceUID
        assert seg.FrameOfReferenceUID == series[0].FrameOfReferenceUID
        assert {seg.get_segment_description(n).segment_label for n in seg.segment_numbers} == set(
            CLASSES[1:]
        )
        referenced = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert {item.ReferencedSOPInstanceUID for item in referenced} == {
            dataset.SOPInstanceUID for dataset in series
        }
    assert len(ids) == len(patients)
    assert len(uids) == sum(1 for _ in northfield.folder.rglob("ct/*.dcm"))


def test_labels_lie_on_their_images_and_hold_every_class(
    written: tuple[list[Hospital], list[Any]],
) -> None:
    for hospital in written[0][1:]:
        for image, label in image_pairs(hospital):
            assert image.shape == label.shape
            np.testing.assert_array_equal(image.affine, label.affine)
            assert set(np.unique(label.dataobj)) == {0, 1, 2}
            for file in (image, label):
                assert file.header["sform_code"] == file.header["qform_code"] == 1
                np.testing.assert_allclose(file.get_qform(), file.get_sform(), atol=1e-4)


def test_a_patient_of_the_csv_hospital_comes_twice(
    written: tuple[list[Hospital], list[Any]],
) -> None:
    rows = list(csv.DictReader((written[0][2].folder / "cases.csv").open()))
    assert list(rows[0]) == ["case_id", "patient_id", "image", "label"]
    assert len({row["case_id"] for row in rows}) == len(rows) == PATIENTS[2] + 1
    assert len({row["patient_id"] for row in rows}) == PATIENTS[2]


def test_the_anatomy_is_where_and_what_it_should_be() -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        scan = acquire(draw_anatomy(rng), scanners()[0], rng, size=32)
        liver = np.argwhere(scan.label == 1) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
        assert liver[:, 0].mean() < -20, "the liver is on the patient's right, which is -x in LPS"
        inside = {value: np.median(scan.hounsfield[scan.label == value]) for value in (1, 2)}
        assert 70 < inside[1] < 130, "a liver in the portal venous phase"
        assert inside[2] < inside[1] - 20, "a lesion darker than the liver"
        assert np.median(scan.hounsfield[0]) < -950, "air beside the body"
        volume = float(np.prod(scan.spacing)) / 1e6 * (scan.label > 0).sum()
        assert 0.7 < volume < 2.6, "litres"


def test_scanners_differ_in_the_pixels() -> None:
    scans = []
    for scanner in scanners():
        rng = np.random.default_rng(5)
        scans.append(acquire(draw_anatomy(rng), scanner, rng, size=32))
    assert len({scan.spacing for scan in scans}) == 3
    assert len({nibabel.aff2axcodes(scan.affine_ras) for scan in scans}) == 3
    # Noise: neighbours in air, where the anatomy itself is flat.
    air = [scan.hounsfield[:2, :6, :][scan.label[:2, :6, :] == 0].std() for scan in scans]
    assert air[0] + 3 < air[1] < air[2] - 3
    # Gain: the same liver reads differently.
    livers = [float(np.median(scan.hounsfield[scan.label == 1])) for scan in scans]
    assert max(livers) - min(livers) > 10


def test_equal_seeds_write_equal_bytes_and_other_seeds_other_patients(
    written: tuple[list[Hospital], list[Any]], tmp_path: Path
) -> None:
    first = contents(written[0][0].folder.parent)
    write_hospitals(tmp_path / "again", patients=PATIENTS, size=SIZE, seed=3)
    assert contents(tmp_path / "again") == first
    write_hospitals(tmp_path / "other", patients=(1, 1, 1), size=SIZE, seed=4)
    other = contents(tmp_path / "other")
    assert not set(other.values()) & {
        content for name, content in first.items() if name.endswith((".dcm", ".nii.gz"))
    }


def test_progress_counts_every_scan(written: tuple[list[Hospital], list[Any]]) -> None:
    scans = sum(PATIENTS) + 1
    assert written[1] == [(done, scans) for done in range(1, scans + 1)]


def test_hospitals_say_what_they_hold(written: tuple[list[Hospital], list[Any]]) -> None:
    assert [(h.name, h.format, h.patients) for h in written[0]] == [
        ("northfield", "dicom", 2),
        ("riverside", "msd", 2),
        ("st-anna", "csv", 2),
    ]
    assert [h.labels for h in written[0]] == [(), (), CLASSES]


def test_a_site_imports_each_hospital_for_the_demo_study(
    written: tuple[list[Hospital], list[Any]], tmp_path: Path
) -> None:
    import consilium_common.demo

    study = load_study(Path(consilium_common.demo.__file__).parent / "study.yaml")
    assert tuple(study.task.classes) == CLASSES
    for hospital in written[0]:
        home = SiteHome.create(tmp_path / hospital.name)
        labels = {name: value for value, name in enumerate(hospital.labels)}
        options = ImportOptions(site=hospital.name, inputs=("ct",), labels=labels)
        counts = import_folder(home, hospital.folder, options).counts()
        assert counts["patients"] == hospital.patients
        cohort = open_cohort(home, study)
        found = [
            case
            for split in ("train", "validation", "test")
            for patient in cohort.patients(split)
            for case in patient.cases
        ]
        assert len(found) == counts["cases"]
        for case in found:
            assert case.image().shape[1:] == case.label().shape
            assert set(np.unique(case.label())) == {0, 1, 2}
            # The window 0 to 160 HU maps a liver of 50 to 130 HU to about 0.3 to 0.8.
            assert 0.3 < float(np.median(case.image()[0][case.label() == 1])) < 0.9


@pytest.mark.parametrize(
    "arguments",
    [{"patients": (1, 1)}, {"patients": (1, 0, 1)}, {"size": 8}, {"seed": -1}],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError) as refused:
        write_hospitals(tmp_path, **arguments)
    assert refused.value.code == "usage.demo"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).mkdir()
    (tmp_path / NAMES[0] / "mine").touch()
    with pytest.raises(ConsiliumError) as refused:
        write_hospitals(tmp_path, patients=(1, 1, 1), size=16)
    assert refused.value.code == "state.not-empty"
    assert [path.name for path in tmp_path.rglob("*")] == [NAMES[0], "mine"]


def test_an_interrupted_run_leaves_no_half_written_hospital(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hospitals(tmp_path, patients=(1, 2, 1), size=16, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]
    # A draft that a kill left behind is in nobody's way either.
    (tmp_path / f".{NAMES[1]}.draft" / "imagesTr").mkdir(parents=True)
    (tmp_path / NAMES[0]).rename(tmp_path / "old")
    write_hospitals(tmp_path, patients=(1, 1, 1), size=16)
    assert {path.name for path in tmp_path.iterdir()} == {"old", *NAMES}


def test_a_disk_that_refuses_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConsiliumError) as refused:
        write_hospitals(tmp_path / "file" / "below", patients=(1, 1, 1), size=16)
    assert refused.value.code == "state.disk"
