"""Import as a whole: what is checked, what is kept, and what a failure leaves untouched."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_fixtures import (
    classification,
    home_in,
    real,
    study,
    write_list,
    write_nifti,
    write_pair,
    write_pairs,
    write_slices,
)

from consilium_client.data.importers import choose_importer, importers
from consilium_client.data.importing import (
    DataProblemsError,
    ImportOptions,
    check_data,
    import_folder,
    list_cases,
    purge_cache,
)
from consilium_client.data.ingest.cache import ingested_folder
from consilium_client.data.ingest.nifti import read_nifti
from consilium_client.data.ingest.run import writing
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError

NAMED = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})


def problems(home: SiteHome, folder: Path, options: ImportOptions = NAMED) -> DataProblemsError:
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home, folder, options)
    return caught.value


def break_mask(folder: Path, name: str, affine: np.ndarray | None = None) -> None:
    """Give a mask another place in the patient."""
    path = folder / "labels" / f"{name}.nii.gz"
    image = nibabel.load(path)
    moved = np.array(image.affine) if affine is None else affine
    moved[0, 3] += 3.0
    write_nifti(path, np.asarray(image.dataobj), moved, np.uint8)


def test_a_csv_list_is_imported_with_patients_that_have_several_scans(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 5, patients=2)
    outcome = import_folder(home_in(tmp_path), folder, NAMED)
    assert outcome.counts()["cases"] == 5
    assert outcome.counts()["patients"] == 2
    assert outcome.manifest.site.labels == {"background": 0, "liver": 1}


def test_a_second_import_reads_only_what_changed(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 4)
    home = home_in(tmp_path)
    assert import_folder(home, folder, NAMED).read == 4
    assert import_folder(home, folder, NAMED).read == 0
    write_pair(folder, "scan2", seed=99)
    assert import_folder(home, folder, NAMED).read == 1
    assert check_data(home).read == 0
    assert len(list(ingested_folder(home).iterdir())) == 4  # the old form is gone


def test_an_interrupted_import_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pairs(tmp_path / "data", 5)
    home = home_in(tmp_path)
    seen = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_folder(home, folder, NAMED, progress=interrupt)
    assert not (home.data / "site.yaml").exists()
    (ingested_folder(home) / ".part-left-by-a-kill").mkdir()
    assert import_folder(home, folder, NAMED).read == 2
    assert not list(ingested_folder(home).glob(".part-*"))


def test_all_bad_cases_are_reported_together_and_the_old_manifest_stands(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 6)
    home = home_in(tmp_path)
    import_folder(home, folder, NAMED)
    before = {path.name: path.read_bytes() for path in home.data.glob("*.*") if path.is_file()}
    break_mask(folder, "scan1")
    packed = folder / "images" / "scan2.nii.gz"
    packed.write_bytes(packed.read_bytes()[:-30])
    (folder / "labels" / "scan3.nii.gz").unlink()
    error = problems(home, folder)
    assert error.code == "data.invalid"
    assert "3 of 6 cases" in error.message
    report = json.loads((home.reports / "data-report.json").read_text())
    assert [(finding["case"], finding["code"]) for finding in report["findings"]] == [
        ("scan1", "data.geometry"),
        ("scan2", "data.truncated"),
        ("scan3", "data.missing"),
    ]
    after = {path.name: path.read_bytes() for path in home.data.glob("*.*") if path.is_file()}
    assert after == before
    assert "Patient-" not in str(error.to_dict()) + json.dumps(report)
    outcome = import_folder(
        home, folder, ImportOptions(inputs=("ct",), labels=NAMED.labels, skip_bad=True)
    )
    assert (outcome.counts()["cases"], outcome.counts()["left_out"]) == (3, 3)


def test_a_mask_of_another_geometry_is_refused_naming_both_files(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 3)
    break_mask(folder, "scan1")
    error = problems(home_in(tmp_path), folder)
    assert error.code == "data.geometry"
    assert "images/scan1.nii.gz" in error.where and "labels/scan1.nii.gz" in error.where
    assert "3 mm apart" in error.message


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    write_nifti(folder / "labels" / "scan0.nii.gz", np.zeros((12, 10, 7)), np.diag([1.5, 1, 2, 1]))
    error = problems(home_in(tmp_path), folder)
    assert error.code == "data.geometry" and "12 × 10 × 8 against 12 × 10 × 7" in error.message


def test_a_mask_stored_with_other_axes_is_turned(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 1)
    home = home_in(tmp_path)
    plain = next(iter(import_folder(home, folder, NAMED).entries.values())).label().copy()
    path = folder / "labels" / "scan0.nii.gz"
    image = nibabel.load(path)
    turned = nibabel.as_closest_canonical(image).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]], dtype=float)
    )
    assert turned.shape != image.shape
    nibabel.save(turned, path)
    entry = next(iter(import_folder(home, folder, NAMED).entries.values()))
    assert np.array_equal(entry.label(), plain)


def test_an_image_without_a_label_is_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    write_list(folder, [("scan0", "a", "images/scan0.nii.gz", "")])
    assert problems(home_in(tmp_path), folder, ImportOptions()).code == "data.no-label"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.full((12, 10, 8), 5.0), "data.label-unknown"),
        (np.full((12, 10, 8), 0.5), "data.label-values"),
        (np.full((12, 10, 8), -1.0), "data.label-values"),
        (np.full((12, 10, 8), np.nan), "data.not-finite"),
    ],
)
def test_label_values_outside_the_map_are_refused(
    tmp_path: Path, values: np.ndarray, code: str
) -> None:
    folder = write_pairs(tmp_path / "data", 1)
    affine = np.diag([1.5, 1, 2, 1])
    write_nifti(folder / "labels" / "scan0.nii.gz", values, affine, np.float32)
    assert problems(home_in(tmp_path), folder).code == code


def test_nan_in_an_image_and_absurd_headers_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 1)
    values = np.ones((12, 10, 8))
    values[3, 3, 3] = np.inf
    path = folder / "images" / "scan0.nii.gz"
    write_nifti(path, values, np.diag([1.5, 1, 2, 1]), np.float32)
    assert problems(home_in(tmp_path), folder).code == "data.not-finite"
    header = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    header.set_data_shape((32000, 32000, 32000))
    raw = folder / "images" / "bomb.nii"
    raw.write_bytes(header.binaryblock + b"\0" * 4)
    write_list(folder, [("scan0", "a", "images/bomb.nii", "labels/scan0.nii.gz")])
    assert problems(home_in(tmp_path), folder).code == "data.too-large"


def test_the_channels_of_a_four_dimensional_file_are_split(tmp_path: Path) -> None:
    folder = tmp_path / "msd"
    values = np.random.default_rng(0).integers(0, 99, (6, 5, 4, 2))
    write_nifti(folder / "imagesTr" / "a.nii.gz", values)
    write_nifti(folder / "labelsTr" / "a.nii.gz", values[..., 0] > 50, dtype=np.uint8)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "FLAIR", "1": "T1 w"},
                "labels": {"0": "background", "1": "lesion"},
                "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
            }
        )
    )
    outcome = import_folder(home_in(tmp_path), folder, ImportOptions())
    assert outcome.manifest.site.inputs == ["flair", "t1-w"]
    entry = outcome.entries["a"]
    for number, name in enumerate(("flair", "t1-w")):
        assert np.array_equal(entry.image(name), values[..., number])


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 1)
    write_nifti(folder / "t2.nii.gz", np.zeros((12, 10, 8)), np.diag([1.5, 1.1, 2, 1]))
    write_list(
        folder,
        [("scan0", "a", "images/scan0.nii.gz", "t2.nii.gz", "labels/scan0.nii.gz")],
        "case_id,patient_id,image,image_t2,label",
    )
    error = problems(home_in(tmp_path), folder, ImportOptions(inputs=("t1", "t2")))
    assert error.code == "data.geometry" and "t2.nii.gz" in error.where


def test_a_dataset_json_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    for reference in ("../secret.nii.gz", "/etc/passwd"):
        (tmp_path / "dataset.json").write_text(
            json.dumps(
                {
                    "modality": {"0": "CT"},
                    "labels": {"0": "background", "1": "x"},
                    "training": [{"image": reference, "label": "a"}],
                }
            )
        )
        with pytest.raises(ConsiliumError) as caught:
            import_folder(home_in(tmp_path), tmp_path, ImportOptions())
        assert caught.value.code == "data.outside"


def test_another_folder_replaces_the_cases_only_when_told(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    import_folder(home, write_pairs(tmp_path / "one", 2), NAMED)
    other = write_pairs(tmp_path / "two", 1)
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home, other, NAMED)
    assert caught.value.code == "data.other-root"
    options = ImportOptions(inputs=("ct",), labels=NAMED.labels, replace=True)
    assert import_folder(home, other, options).counts()["cases"] == 1


def test_what_a_person_wrote_survives_the_next_import(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    folder = write_pairs(tmp_path / "data", 3)
    import_folder(home, folder, ImportOptions())
    path = home.data / "site.yaml"
    assert "value-1: 1" in path.read_text()
    text = path.read_text().replace("value-1: 1", "liver: 1").replace('["image"]', '["ct"]')
    path.write_text(text.replace("classes: {}", "classes: {liver: hepar}"))
    cases = home.data / "cases.csv"
    lines = cases.read_text().splitlines()
    cases.write_text("\n".join([f"{lines[0]},split", *(f"{row},test" for row in lines[1:])]))
    write_pair(folder, "scan3")
    with (folder / "cases.csv").open("a") as stream:
        stream.write("scan3,new,images/scan3.nii.gz,labels/scan3.nii.gz\n")
    site = import_folder(home, folder, ImportOptions()).manifest
    assert site.site.labels == {"background": 0, "liver": 1}
    assert site.site.classes == {"liver": "hepar"}
    assert site.site.inputs == ["ct"]
    assert [case.split for case in site.cases] == ["test", "test", "test", None]


def test_patients_named_in_a_list_group_the_cases(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    from PIL import Image

    for name in ("ill", "well"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 6), number).save(folder / name / f"{number}.png")
    listed = tmp_path / "patients.csv"
    listed.write_text(
        "case_id,patient_id\nill/0.png,Anna\nill/1.png,B\nwell/0.png,C\nwell/1.png,Anna\n"
    )
    outcome = import_folder(home_in(tmp_path), folder, ImportOptions(patients=listed))
    assert outcome.counts()["cases"] == 4
    assert outcome.counts()["patients"] == 3


def test_one_import_at_a_time(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 1)
    home = home_in(tmp_path)
    with writing(home), pytest.raises(ConsiliumError) as caught:
        import_folder(home, folder, NAMED)
    assert caught.value.code == "state.busy"


def test_a_full_disk_is_one_clear_error_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    home = home_in(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home, folder, NAMED)
    assert caught.value.code == "state.disk"
    assert list(ingested_folder(home).iterdir()) == []


def test_the_cache_can_be_purged_and_fills_again(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    home = home_in(tmp_path)
    import_folder(home, folder, NAMED)
    rows = list_cases(home)
    assert {tuple(row["shape"]) for row in rows} == {(12, 10, 8)}
    assert all("Patient" not in json.dumps(row) for row in rows)
    assert purge_cache(home) > 1000
    assert [row["shape"] for row in list_cases(home)] == [None, None]
    assert check_data(home).read == 2


def test_every_layout_is_recognised_and_said(tmp_path: Path) -> None:
    from PIL import Image

    write_pairs(tmp_path / "csv", 1)
    write_slices(tmp_path / "dicom" / "deep" / "er", np.zeros((4, 4, 3)), names=["1", "2", "3"])
    for name in ("a", "b"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "folders" / name / "x.jpeg")
    (tmp_path / "msd").mkdir()
    (tmp_path / "msd" / "dataset.json").write_text("{}")
    known = importers()
    for name in ("csv", "dicom", "folders", "msd"):
        importer, reason = choose_importer(tmp_path / name, known)
        assert importer.name == name
        assert reason.startswith(f"Detected {name}: ") and "\n" not in reason
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConsiliumError) as caught:
        choose_importer(tmp_path / "nothing", known)
    assert caught.value.code == "data.unknown-format"
    assert choose_importer(tmp_path / "csv", known, "dicom")[0].name == "dicom"


def test_modules_that_the_command_line_imports_are_light() -> None:
    import subprocess
    import sys

    code = "import sys, consilium_client.data.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    heavy = {"torch", "monai", "pydicom", "nibabel", "highdicom", "scipy", "numpy"}
    assert not heavy & set(loaded)


@pytest.mark.data
def test_the_real_hippocampus_set_is_imported_and_opened(tmp_path: Path) -> None:
    from consilium_client.data.cohort import describe_cohort, open_cohort

    folder = real("hippocampus")
    home = home_in(tmp_path)
    outcome = import_folder(home, folder, ImportOptions())
    assert outcome.counts()["cases"] == outcome.counts()["read"] == 130
    assert outcome.manifest.site.inputs == ["mri"]
    task = {
        "kind": "segmentation",
        "dimensions": 3,
        "inputs": ["mri"],
        "classes": ["background", "anterior", "posterior"],
    }
    cohort = open_cohort(home, study(task=task))
    described = describe_cohort(cohort)["splits"]
    assert sum(split["patients"] for split in described.values()) == 130
    case = cohort.patients("train")[0].cases[0]
    file = nibabel.load(folder / "labelsTr" / f"{case.case_id}.nii.gz")
    assert np.array_equal(case.to_original(case.label()), np.asarray(file.dataobj))
    image = nibabel.as_closest_canonical(
        nibabel.load(folder / "imagesTr" / f"{case.case_id}.nii.gz")
    ).get_fdata()
    expected = (image - image.mean()) / image.std()
    assert case.image().dtype == np.float32
    assert np.abs(case.image()[0] - expected).max() < 1e-5


@pytest.mark.data
def test_real_class_folders_are_imported_and_opened(tmp_path: Path) -> None:
    from PIL import Image

    from consilium_client.data.cohort import describe_cohort, open_cohort

    folder = tmp_path / "some"
    for group in sorted(path for path in real("mednist").iterdir() if path.is_dir()):
        (folder / group.name).mkdir(parents=True)
        for path in sorted(group.iterdir())[:20]:
            shutil.copy(path, folder / group.name)
    home = home_in(tmp_path)
    outcome = import_folder(home, folder, ImportOptions())
    assert outcome.counts()["patients"] == 120
    classes = ["abdomen-ct", "breast-mri", "cxr", "chest-ct", "hand", "head-ct"]
    cohort = open_cohort(home, classification(classes, size=64))
    total = np.zeros(6, int)
    for split in describe_cohort(cohort)["splits"].values():
        total += [split["classes"][name] for name in classes]
    assert total.tolist() == [20] * 6
    case = cohort.patients("train")[0].cases[0]
    raw = np.asarray(Image.open(folder / case.case_id), dtype=float)
    assert case.image().shape == (1, 64, 64)
    assert np.abs(case.image()[0] - (raw - raw.mean()) / raw.std()).max() < 1e-4
    assert case.label().shape == () and case.label().dtype == np.int64
    assert case.case_id.split("/")[0].lower() == classes[int(case.label())].replace("-", "")


def test_nothing_but_the_case_list_holds_a_patients_identifier(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 3)
    text = (folder / "cases.csv").read_text().replace("Patient-", "VERY-SECRET-")
    (folder / "cases.csv").write_text(text)
    home = home_in(tmp_path)
    import_folder(home, folder, NAMED)
    from consilium_client.data.cohort import open_cohort

    open_cohort(home, study())
    holders = [
        path.name
        for path in home.path.rglob("*")
        if path.is_file() and b"VERY-SECRET" in path.read_bytes()
    ]
    assert holders == ["cases.csv"]


def test_a_packed_nifti_is_read_in_members_and_not_with_a_wrong_checksum(tmp_path: Path) -> None:
    values = np.arange(120 * 110 * 50).reshape(120, 110, 50) % 30_000
    plain = write_nifti(tmp_path / "plain.nii", values).read_bytes()
    members = [gzip.compress(plain[i : i + 100_000]) for i in range(0, len(plain), 100_000)]
    (tmp_path / "members.nii.gz").write_bytes(b"".join(members))
    assert np.array_equal(read_nifti(tmp_path / "members.nii.gz").values, values)
    (tmp_path / "longer.nii.gz").write_bytes(gzip.compress(plain + bytes(1 << 20)))
    assert np.array_equal(read_nifti(tmp_path / "longer.nii.gz").values, values)
    packed = bytearray(gzip.compress(plain))
    packed[-6] ^= 1  # the checksum comes before the length
    (tmp_path / "wrong.nii.gz").write_bytes(packed)
    (tmp_path / "short.nii.gz").write_bytes(b"".join(members[:-1]))
    for name in ("wrong.nii.gz", "short.nii.gz"):
        with pytest.raises(ConsiliumError) as caught:
            read_nifti(tmp_path / name)
        assert caught.value.code == "data.truncated"
