"""A segmentation goes back onto the image as it came: to a thousandth of a millimetre."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import (
    home_in,
    real,
    rotation,
    study,
    write_list,
    write_nifti,
    write_seg,
    write_slices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import joined_site, plain_study
from typer.testing import CliRunner

from consilium_client.cli import app
from consilium_client.data.cohort import CaseData, Cohort, open_cohort
from consilium_client.data.export import Origin, export_dicom_seg, export_nifti
from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest.sources import Sources, read_image, read_label
from consilium_client.data.split import SPLITS
from consilium_client.home import SiteHome
from consilium_client.local_evaluation import evaluate
from consilium_client.segmenting import segment_case
from consilium_client.store import StudyStore
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study.schema import Study

TO_RAS = np.diag([-1.0, -1.0, 1.0])
CLASSES = ["background", "liver", "tumour"]
LABELS = {"background": 0, "liver": 1, "tumour": 2}
ORIGIN = Origin("tested", "ab" * 32)


def all_cases(cohort: Cohort) -> list[CaseData]:
    return [c for split in SPLITS for p in cohort.patients(split) for c in p.cases]


def places(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Return where voxels lie, (..., 3) in millimetres."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def require_there(file: Any, where: np.ndarray, label: np.ndarray, *, exact: bool) -> None:
    """Check a file, read by nibabel, against values whose places in the patient are known."""
    values = np.asarray(file.dataobj)
    assert values.size == label.size
    index = (where - file.affine[:3, 3]) @ np.linalg.inv(file.affine[:3, :3]).T
    nearest = np.rint(index).astype(int)
    back = nearest @ file.affine[:3, :3].T + file.affine[:3, 3]
    assert np.abs(back - where).max() < 1e-3
    found = values[tuple(np.moveaxis(nearest, -1, 0))]
    if exact:
        assert np.array_equal(found, label)


# --- all the way through -----------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["dicom", "tilted", "nifti", "permuted"]),
    orientation=st.sampled_from(["RAS", "LPS", "none"]),
    padded=st.booleans(),
    resampled=st.booleans(),
)
def test_from_the_scanner_through_the_cohort_and_back_into_the_patient(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    seed: int,
    form: str,
    orientation: str,
    padded: bool,
    resampled: bool,
) -> None:
    root = tmp_path_factory.mktemp("site")
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(4, 8, 3))
    spacing = generator.uniform(0.5, 3.0, 3)
    axes, origin = rotation(generator), generator.uniform(-300, 300, 3)
    values = generator.integers(-900, 900, shape).astype(float)
    label = generator.integers(0, 3, shape).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = origin
    data = root / "data"
    if form in {"dicom", "tilted"}:
        lean = np.tan(np.radians(generator.uniform(-20, 20))) if form == "tilted" else 0.0
        # Half of the series count their slices against the plane's normal.
        step = (axes[:, 2] + lean * axes[:, 1]) * spacing[2] * generator.choice([-1, 1])
        affine[:3, 2] = step
        written = write_slices(
            data / "ct",
            values,
            origin=origin,
            directions=axes,
            spacing=spacing,
            step=step,
            names=[f"{n}.dcm" for n in generator.permutation(shape[2])],
        )
        write_seg(data / "label.dcm", written, label, "liver", "tumour")
        row = ("one", "p", "ct", "label.dcm")
        affine[:3] = TO_RAS @ affine[:3]
    else:
        write_nifti(data / "image.nii.gz", values, affine, np.float32)
        turned = nibabel.Nifti1Image(label, affine)
        if form == "permuted":
            change = np.stack([generator.permutation(3), generator.choice([-1, 1], 3)], 1)
            turned = turned.as_reoriented(change)
        nibabel.save(turned, data / "label.nii.gz")
        row = ("one", "p", "image.nii.gz", "label.nii.gz")
    write_list(data, [row])
    home = home_in(root)
    import_folder(home, data, ImportOptions(inputs=("ct",), labels=LABELS))
    steps: dict[str, Any] = {"orientation": orientation}
    if padded:
        steps["size"] = [12, 12, 12]
    if resampled:
        steps["spacing"] = [float(x) for x in generator.uniform(0.8, 2.0, 3)]
    task = {"kind": "segmentation", "dimensions": 3, "inputs": ["ct"], "classes": CLASSES}
    (case,) = all_cases(open_cohort(home, study(task=task, preprocessing=steps)))
    back = case.to_original(case.label())

    export_nifti(back, case.original_affine, root / "out.nii.gz")
    file: Any = nibabel.load(root / "out.nii.gz")
    # A tilted series is made straight, which interpolates.
    exact = not resampled and form != "tilted"
    require_there(file, places(shape, affine), label, exact=exact)

    sources = Sources(data)
    image, slices = read_image(sources.find(row[2]))
    assert np.array_equal(
        read_label(Sources(root).find("out.nii.gz"), image, slices, {}, "ct").values, back
    )
    if slices:
        export_dicom_seg(back, image, slices, CLASSES, root / "out.dcm", origin=ORIGIN)
        again = read_label(Sources(root).find("out.dcm"), image, slices, LABELS, "ct")
        assert np.array_equal(again.values, back)


def test_a_plane_goes_back_as_a_plane(tmp_path: Path) -> None:
    axes = rotation(np.random.default_rng(4))
    label = np.random.default_rng(0).integers(0, 3, (6, 9)).astype(np.uint8)
    write_slices(tmp_path / "ct", np.zeros((9, 6, 1)), directions=axes)
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    export_nifti(label, image.affine, tmp_path / "out.nii")
    export_dicom_seg(label, image, slices, CLASSES, tmp_path / "out.dcm", origin=ORIGIN)
    for name in ("out.nii", "out.dcm"):
        found = read_label(sources.find(name), image, slices, LABELS, "ct")
        assert np.array_equal(found.values, label)
    file: Any = nibabel.load(tmp_path / "out.nii")
    first = pydicom.dcmread(slices[0].path)
    place = np.array(first.ImagePositionPatient) + 4 * 0.8 * axes[:, 0] + 2 * 0.7 * axes[:, 1]
    assert np.abs(file.affine @ [4, 2, 0, 1] - [*TO_RAS @ place, 1]).max() < 1e-3
    assert np.asarray(file.dataobj)[4, 2, 0] == label[2, 4]


# --- what the files say ------------------------------------------------------------------------


def test_a_dicom_seg_belongs_to_its_patient_and_says_what_drew_it(tmp_path: Path) -> None:
    written = {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müßig^Zoë"}
    paths = write_slices(tmp_path / "ct", np.zeros((6, 5, 4)), changes=written)
    for path in paths:  # what careless exports drop, and a SEG must hold though it be empty
        dataset = pydicom.dcmread(path)
        del dataset.StudyID, dataset.AccessionNumber, dataset.PositionReferenceIndicator
        dataset.save_as(path)
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct"))
    label = np.zeros(image.values.shape, np.uint8)
    export_dicom_seg(label, image, slices, CLASSES, tmp_path / "out.dcm", origin=ORIGIN)
    found = pydicom.dcmread(tmp_path / "out.dcm")
    first = pydicom.dcmread(paths[0])
    assert found.PatientID == first.PatientID == "P-17"
    assert str(found.PatientName) == str(first.PatientName) == "Müßig^Zoë"
    assert found.StudyInstanceUID == first.StudyInstanceUID
    assert found.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["liver", "tumour"]
    assert {item.SegmentAlgorithmType for item in found.SegmentSequence} == {"AUTOMATIC"}
    algorithm = found.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert "tested" in algorithm.AlgorithmName and "ab" * 8 in algorithm.AlgorithmVersion
    assert found.Manufacturer == "Consilium"
    assert (tmp_path / "out.dcm").stat().st_mode & 0o077 == 0
    # An empty segmentation is an answer too.
    empty = read_label(sources.find("out.dcm"), image, slices, LABELS, "ct")
    assert not empty.values.any()
    export_nifti(label, image.affine, tmp_path / "out.nii")
    content = (tmp_path / "out.nii").read_bytes()
    assert b"P-17" not in content and b"Zo" not in content


@pytest.mark.data
@pytest.mark.parametrize("series", ["dicom-seg/ct-3slice", "dicom-mr/Study3/11_HCropVolume"])
def test_real_series_take_their_segmentation_back(tmp_path: Path, series: str) -> None:
    folder = real(series)
    image, slices = read_image(Sources(folder.parent).find(folder.name))
    label = np.random.default_rng(0).integers(0, 3, image.values.shape).astype(np.uint8)
    label[..., 0] = 0
    export_dicom_seg(label, image, slices, CLASSES, tmp_path / "out.dcm", origin=ORIGIN)
    export_nifti(label, image.affine, tmp_path / "out.nii")
    for name in ("out.dcm", "out.nii"):
        found = read_label(Sources(tmp_path).find(name), image, slices, LABELS, "ct")
        assert np.array_equal(found.values, label)


def test_the_frames_of_a_multi_frame_image_find_their_places(tmp_path: Path) -> None:
    import highdicom

    generator = np.random.default_rng(3)
    values = generator.integers(-900, 900, (6, 5, 4)).astype(float)
    paths = write_slices(tmp_path / "single", values, directions=rotation(generator))
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(path) for path in reversed(paths)],
        pydicom.uid.generate_uid(),
        3,
        pydicom.uid.generate_uid(),
        1,
    )
    enhanced.save_as(tmp_path / "ct.dcm")
    sources = Sources(tmp_path)
    image, slices = read_image(sources.find("ct.dcm"))
    label = generator.integers(0, 3, image.values.shape).astype(np.uint8)
    export_dicom_seg(label, image, slices, CLASSES, tmp_path / "out.dcm", origin=ORIGIN)
    found = read_label(sources.find("out.dcm"), image, slices, LABELS, "ct")
    assert np.array_equal(found.values, label)


def test_nothing_is_written_over_or_under_a_wrong_name(tmp_path: Path) -> None:
    there = tmp_path / "there.nii"
    there.write_text("precious")
    for path, code in (
        (there, "state.exists"),
        (tmp_path / "out.img", "usage.output"),
        (tmp_path / "absent" / "out.nii", "state.folder"),
    ):
        with pytest.raises(ConsiliumError) as caught:
            export_nifti(np.zeros((2, 2, 2), np.uint8), np.eye(4), path)
        assert caught.value.code == code
    assert there.read_text() == "precious"
    with pytest.raises(ConsiliumError) as caught:
        write_slices(tmp_path / "ct", np.zeros((3, 3, 3)))
        image, slices = read_image(Sources(tmp_path).find("ct"))
        labels = np.zeros((4, 3, 3), np.uint8)
        export_dicom_seg(labels, image, slices, CLASSES, tmp_path / "o.dcm", origin=ORIGIN)
    assert caught.value.code == "data.format"


# --- site segment ------------------------------------------------------------------------------


@pytest.fixture
def finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[SiteHome, TrainingSession, dict[str, np.ndarray], Cohort]:
    """Return a site after the last round of a study on a DICOM case and NIfTI cases."""
    site = joined_site(tmp_path / "site")
    data = tmp_path / "data"
    generator = np.random.default_rng(0)
    values = generator.integers(-900, 900, (18, 17, 16)).astype(float)
    label = np.zeros(values.shape, np.uint8)
    label[4:10, 5:11, 3:9] = 1
    axes = rotation(np.random.default_rng(9))
    paths = write_slices(data / "ct", values, directions=axes, patient="P0")
    write_seg(data / "label.dcm", paths, label, "organ")
    rows = [("dicom", "P0", "ct", "label.dcm")]
    for number in range(1, 6):
        write_nifti(data / f"{number}.nii.gz", values + number, np.diag([1.0, 1.2, 2.0, 1.0]))
        write_nifti(data / f"{number}-label.nii.gz", label, np.diag([1.0, 1.2, 2.0, 1.0]), np.uint8)
        rows.append((f"scan{number}", f"P{number}", f"{number}.nii.gz", f"{number}-label.nii.gz"))
    write_list(data, rows)
    import_folder(
        site.home, data, ImportOptions(inputs=("ct",), labels={"background": 0, "organ": 1})
    )
    asked = Study.model_validate(
        {**plain_study().to_canonical(), "preprocessing": {"size": [20, 20, 20]}}
    )
    StudyStore(site.home).decide(asked, "approved", 4, "")
    cohort = open_cohort(site.home, asked)
    session = TrainingSession(asked, cohort, device="cpu")
    weights = initial_weights(asked)
    # Pictures for the report take a second and are tested elsewhere.
    monkeypatch.setattr("consilium_client.local_evaluation._write_pictures", lambda *_: None)
    evaluate(site.home, session, cohort, pack(weights), site="north", rounds_done=3, last=True)
    return site.home, session, weights, cohort


def test_the_final_model_draws_on_the_image_as_it_came(
    tmp_path: Path, finished: tuple[SiteHome, TrainingSession, dict[str, np.ndarray], Cohort]
) -> None:
    home, session, weights, cohort = finished
    cases = {case.case_id: case for case in all_cases(cohort)}
    runner = CliRunner()

    def command(*words: str) -> dict[str, Any]:
        given = ["segment", "tiny", *words, "--home", str(home.path)]
        done = runner.invoke(app, given)
        assert done.exit_code == 0, done.output
        return {"text": done.stdout}

    for name, out in (("scan1", "out.nii.gz"), ("dicom", "out.dcm"), ("dicom", "dicom.nii")):
        command(name, "--out", str(tmp_path / out))
        expected = cases[name].to_original(session.predict(weights, cases[name]))
        assert 0 < expected.sum() < expected.size
        sources = Sources(tmp_path)
        image, slices = read_image(sources.find("data/ct" if name == "dicom" else "data/1.nii.gz"))
        found = read_label(sources.find(out), image, slices, {"organ": 1}, "ct")
        assert np.array_equal(found.values, expected)
    before = (tmp_path / "out.dcm").read_bytes()

    def code(which: str, case: str, out: str, **options: Any) -> str:
        with pytest.raises(ConsiliumError) as caught:
            segment_case(home, which, case, tmp_path / out, **options)
        return caught.value.code

    assert code("tiny", "dicom", "out.dcm") == "state.exists"
    assert code("tiny", "dicom", "out.xyz") == "usage.output"
    assert code("tiny", "absent", "new.nii") == "data.unknown-case"
    assert code("tiny", "scan1", "new.dcm") == "data.format"
    assert code("other", "scan1", "new.nii") == "study.no-results"
    folder = home.reports / session.study.digest[:16]
    (folder / "evaluation.json").unlink()
    assert code("tiny", "scan1", "new.nii") == "study.not-finished"
    assert (tmp_path / "out.dcm").read_bytes() == before
    assert not list(tmp_path.glob("new*"))


def test_a_study_that_does_not_segment_is_refused(tmp_path: Path) -> None:
    site = joined_site(tmp_path / "site")
    asked = study(
        task={
            "kind": "classification",
            "dimensions": 2,
            "inputs": ["image"],
            "classes": ["a", "b"],
        },
        preprocessing={"size": [16, 16]},
    )
    StudyStore(site.home).decide(asked, "approved", 4, "")
    folder = site.home.reports / asked.digest[:16]
    folder.mkdir(parents=True)
    figures = {"name": asked.name, "study": asked.digest, "rounds_done": 1}
    (folder / "evaluation.json").write_text(json.dumps(figures))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConsiliumError) as caught:
        segment_case(site.home, asked.name, "x", tmp_path / "out.nii")
    assert caught.value.code == "study.task"
