"""The cohort that training sees: names matched, patients grouped, misfits refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (
    classification,
    home_in,
    study,
    write_list,
    write_nifti,
    write_pairs,
    write_slices,
)

from consilium_client.data.cohort import Cohort, describe_cohort, open_cohort
from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest.cache import cache_folder
from consilium_client.data.ingest.sources import Sources, read_image
from consilium_client.data.split import SPLITS
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study


def segmented(tmp_path: Path, count: int = 4, **options: object) -> SiteHome:
    home = home_in(tmp_path)
    chosen = {"inputs": ("ct",), "labels": {"background": 0, "Liver": 1}, **options}
    import_folder(home, write_pairs(tmp_path / "data", count, patients=3), ImportOptions(**chosen))  # type: ignore[arg-type]
    return home


def pictures(tmp_path: Path, labels: list[str]) -> SiteHome:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number, label in enumerate(labels):
        values = np.random.default_rng(number).integers(0, 255, (16, 16)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        rows.append((f"c{number}", f"p{number}", f"{number}.png", label))
    write_list(folder, rows)
    home = home_in(tmp_path)
    import_folder(home, folder, ImportOptions())
    return home


def cases_of(cohort: Cohort) -> dict[str, np.ndarray]:
    return {
        case.case_id: case.label()
        for split in ("train", "validation", "test")
        for patient in cohort.patients(split)  # type: ignore[arg-type]
        for case in patient.cases
    }


def refused(home: SiteHome, wanted: object) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        open_cohort(home, wanted)  # type: ignore[arg-type]
    return caught.value


def edit(home: SiteHome, old: str, new: str) -> None:
    path = home.data / "site.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_patients_are_grouped_in_one_split_and_named_by_keyed_hash(tmp_path: Path) -> None:
    cohort = open_cohort(segmented(tmp_path, 7), study())
    patients = [p for split in ("train", "validation", "test") for p in cohort.patients(split)]  # type: ignore[arg-type]
    assert sorted(len(patient.cases) for patient in patients) == [2, 2, 3]
    assert len({patient.key for patient in patients}) == 3
    for patient in patients:
        assert len(patient.key) == 32
        assert {case.patient for case in patient.cases} == {patient.key}


def test_images_and_labels_are_memory_mapped_in_the_promised_types(tmp_path: Path) -> None:
    cohort = open_cohort(segmented(tmp_path), study(preprocessing={"size": [16, 16, 16]}))
    patients = [p for split in ("train", "validation", "test") for p in cohort.patients(split)]  # type: ignore[arg-type]
    case = patients[0].cases[0]
    assert case.image().dtype == np.float32 and case.image().shape == (1, 16, 16, 16)
    assert case.label().dtype == np.uint8 and case.label().shape == (16, 16, 16)
    assert isinstance(case.image().base, np.memmap)
    assert not case.image().flags.writeable
    assert set(np.unique(case.label())) == {0, 1}
    assert case.to_original(case.label()).sum() == 4 * 4 * 3


def test_preparing_happens_once(tmp_path: Path) -> None:
    home = segmented(tmp_path)
    calls: list[tuple[int, int]] = []
    open_cohort(home, study(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (folder,) = (cache_folder(home) / "prepared").iterdir()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    open_cohort(home, study(training={"loss": "focal"}))  # another study, prepared alike
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    open_cohort(home, study(preprocessing={"spacing": [1, 1, 1]}))
    assert len(list((cache_folder(home) / "prepared").iterdir())) == 2


def test_training_reads_no_dicom_and_no_other_original_once_it_is_imported(tmp_path: Path) -> None:
    values = np.arange(16 * 16 * 4).reshape(16, 16, 4)
    slices = write_slices(tmp_path / "ct", values)
    affine = read_image(Sources(tmp_path).find("ct"))[0].affine
    mask = write_nifti(tmp_path / "mask.nii", values > 300, affine)
    write_list(tmp_path, [("a", "P1", "ct", "mask.nii")])
    home = home_in(tmp_path)
    options = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})
    import_folder(home, tmp_path / "cases.csv", options)
    for path in (*slices, mask):
        was = path.stat()
        path.write_bytes(bytes(was.st_size))  # nothing is left of it but its place, size and time
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    cohort = open_cohort(home, study(preprocessing={"intensity": {"kind": "none"}}))
    (case,) = [c for split in SPLITS for patient in cohort.patients(split) for c in patient.cases]
    assert np.array_equal(np.sort(case.image().ravel()), values.ravel())
    assert case.label().sum() == (values > 300).sum()


def test_a_patient_taken_from_the_list_leaves_the_cache(tmp_path: Path) -> None:
    home = segmented(tmp_path, 3)
    open_cohort(home, study())
    (prepared,) = (cache_folder(home) / "prepared").iterdir()
    assert len(list(prepared.iterdir())) == 3
    lines = (tmp_path / "data" / "cases.csv").read_text().splitlines()
    (tmp_path / "data" / "cases.csv").write_text("\n".join(lines[:-1]) + "\n")
    import_folder(home, tmp_path / "data", ImportOptions())
    assert len(list(prepared.iterdir())) == 2


def test_a_class_that_the_site_lacks_is_named_with_what_to_do(tmp_path: Path) -> None:
    home = segmented(tmp_path)
    wanted = study(
        task={
            "kind": "segmentation",
            "dimensions": 3,
            "inputs": ["ct"],
            "classes": ["background", "liver", "tumour"],
        }
    )
    error = refused(home, wanted)
    assert error.code == "data.class-missing"
    assert "tumour" in error.message and "Liver" in error.message
    edit(home, "Liver: 1", "Liver: 1\n  tumour: 2")
    assert len(cases_of(open_cohort(home, wanted))) == 4


def test_local_names_map_to_study_classes_and_the_rest_is_background(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    values = np.zeros((9, 9, 9), np.uint8)
    values[1:3], values[3:5], values[5:7] = 10, 20, 30
    write_nifti(folder / "i.nii", values)
    write_nifti(folder / "l.nii", values)
    write_list(folder, [("a", "p", "i.nii", "l.nii")])
    home = home_in(tmp_path)
    labels = {"background": 0, "Leber": 10, "HCC": 20, "spleen": 30}
    import_folder(home, folder, ImportOptions(inputs=("ct",), labels=labels))
    edit(home, "classes: {}", "classes: {Leber: liver, HCC: liver}")
    (label,) = cases_of(open_cohort(home, study())).values()
    assert np.array_equal(label, ((values == 10) | (values == 20)).astype(np.uint8))


def test_a_missing_channel_kind_or_dimension_is_refused(tmp_path: Path) -> None:
    home = segmented(tmp_path)
    task = {"kind": "segmentation", "classes": ["background", "liver"]}
    other = study(task={**task, "dimensions": 3, "inputs": ["mri"]})
    assert refused(home, other).code == "data.channel-missing"
    flat = refused(home, study(task={**task, "dimensions": 2, "inputs": ["ct"]}))
    assert flat.code == "data.dimensions"
    assert ".nii" not in flat.where  # it may travel
    assert refused(home, classification(["liver", "spleen"])).code == "data.label-kind"


def test_a_bad_case_is_named_at_the_site_alone(tmp_path: Path) -> None:
    home = segmented(tmp_path)
    (tmp_path / "data" / "labels" / "scan1.nii.gz").unlink()
    error = refused(home, study())
    assert error.code == "data.missing"
    assert "scan1" not in str(error.to_dict())
    assert "labels/scan1.nii.gz" in Path(error.where).read_text()


def test_one_unnamed_channel_is_any_studys_one_input(tmp_path: Path) -> None:
    home = segmented(tmp_path, inputs=())
    assert len(cases_of(open_cohort(home, study()))) == 4


def test_classes_come_as_indices_whatever_their_spelling(tmp_path: Path) -> None:
    home = pictures(tmp_path, ["Chest CT", "Hand", "Chest CT"])
    cohort = open_cohort(home, classification(["hand", "chest-ct"]))
    found = cases_of(cohort)
    assert [int(found[f"c{n}"]) for n in range(3)] == [1, 0, 1]
    assert found["c0"].shape == () and found["c0"].dtype == np.int64


def test_cases_of_other_classes_are_left_out_and_counted(tmp_path: Path) -> None:
    home = pictures(tmp_path, ["a", "b", "c", "c"])
    cohort = open_cohort(home, classification(["a", "b"]))
    assert sorted(cases_of(cohort)) == ["c0", "c1"]
    assert cohort.left_out == 2
    assert describe_cohort(cohort)["left_out"] == 2


def test_several_classes_become_a_multi_hot_vector(tmp_path: Path) -> None:
    home = pictures(tmp_path, ["edema|mass", "-", "mass"])
    cohort = open_cohort(home, classification(["mass", "edema"], multi_label=True))
    found = cases_of(cohort)
    assert [found[f"c{n}"].tolist() for n in range(3)] == [[1, 1], [0, 0], [1, 0]]
    assert found["c0"].dtype == np.float32
    counts = [split["classes"] for split in describe_cohort(cohort)["splits"].values()]
    assert sum(count["mass"] for count in counts) == 2
    assert refused(home, classification(["mass", "edema"])).code == "data.label-values"


def test_pictures_without_size_cannot_be_resampled_to_one(tmp_path: Path) -> None:
    home = pictures(tmp_path, ["a", "b"])
    wanted = classification(["a", "b"])
    wanted = wanted.model_copy(
        update={"preprocessing": wanted.preprocessing.model_copy(update={"spacing": [1.0, 1.0]})}
    )
    assert refused(home, wanted).code == "data.no-spacing"


def test_a_purge_under_an_open_cohort_is_one_clear_error(tmp_path: Path) -> None:
    from consilium_client.data.importing import purge_cache

    home = segmented(tmp_path)
    cohort = open_cohort(home, study())
    patients = [p for split in ("train", "validation", "test") for p in cohort.patients(split)]  # type: ignore[arg-type]
    purge_cache(home)
    with pytest.raises(ConsiliumError) as caught:
        patients[0].cases[0].image()
    assert caught.value.code == "data.purged"


# --- several channels, covariates, ranges ------------------------------------------------------


def test_registered_channels_arrive_in_the_studys_order(tmp_path: Path) -> None:
    """Two DICOM series as channels, the files of one named against their order."""
    values = np.random.default_rng(1).integers(0, 900, (10, 9, 6)).astype(float)
    data = tmp_path / "data"
    write_slices(data / "t1", values)
    slices = write_slices(data / "flair", values + 7)
    for path, name in zip(slices, "fedcba", strict=True):
        path.rename(path.with_name(name))
    label = (values > 500).astype(np.uint8)
    affine = np.diag([-0.8, -0.7, 2.5, 1.0])
    affine[:3, 3] = (20, 30, 40)
    write_nifti(data / "mask.nii.gz", label, affine, np.uint8)
    rows = [("a", "p", "t1", "flair", "mask.nii.gz")]
    write_list(data, rows, "case_id,patient_id,image,image_flair,label")
    home = home_in(tmp_path)
    options = ImportOptions(inputs=("t1", "flair"), labels={"background": 0, "liver": 1})
    import_folder(home, data, options)
    task = {
        "kind": "segmentation",
        "dimensions": 3,
        "inputs": ["flair", "t1"],
        "classes": ["background", "liver"],
    }
    cohort = open_cohort(home, study(task=task, preprocessing={"intensity": {"kind": "none"}}))
    (case,) = [
        case
        for split in ("train", "validation", "test")
        for patient in cohort.patients(split)  # type: ignore[arg-type]
        for case in patient.cases
    ]
    flair, t1 = case.image()
    assert np.array_equal(flair, t1 + 7)
    assert np.array_equal(np.asarray(t1)[::-1, ::-1], values)
    assert np.array_equal(np.asarray(case.label())[::-1, ::-1], label)
    assert np.array_equal(case.to_original(case.label()), label)


def beside(tmp_path: Path, rows: list[tuple[str, ...]]) -> SiteHome:
    """Return a site of pictures with an age and a sex beside each."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(len(rows)):
        Image.new("L", (16, 16), number).save(folder / f"{number}.png")
    listed = [
        (f"c{number}", f"p{number}", f"{number}.png", *row) for number, row in enumerate(rows)
    ]
    write_list(folder, listed, "case_id,patient_id,image,label,covariate_age,covariate_sex")
    home = home_in(tmp_path)
    import_folder(home, folder, ImportOptions())
    return home


def fusion(classes: list[str], number: str = "age") -> Study:
    return study(
        task={
            "kind": "classification",
            "dimensions": 2,
            "inputs": ["image"],
            "classes": classes,
            "covariates": [
                {"kind": "number", "name": number, "centre": 50, "scale": 10},
                {"kind": "category", "name": "sex", "values": ["f", "m"]},
            ],
        },
        preprocessing={"size": [16, 16]},
    )


def test_covariates_follow_the_image_as_constant_channels(tmp_path: Path) -> None:
    home = beside(tmp_path, [("ill", "60", "f"), ("well", "", "m"), ("ill", "45", "")])
    cohort = open_cohort(home, fusion(["ill", "well"]))
    found = {
        case.case_id: case
        for split in ("train", "validation", "test")
        for patient in cohort.patients(split)  # type: ignore[arg-type]
        for case in patient.cases
    }
    assert found["c0"].covariates == {"age": 60.0, "sex": "f"}
    assert found["c1"].covariates == {"age": None, "sex": "m"}
    channels = {name: case.image()[1:, 0, 0].tolist() for name, case in found.items()}
    # Scaled age, whether it is known, and one channel per word.
    assert channels == {"c0": [1, 1, 1, 0], "c1": [0, 0, 0, 1], "c2": [-0.5, 1, 0, 0]}
    for case in found.values():
        image = case.image()
        assert image.shape == (5, 16, 16) and image.dtype == np.float32
        assert (image[1:] == image[1:, :1, :1]).all()
        assert "60.0" not in repr(case) and "sex" not in repr(case)


def test_a_covariate_that_the_site_lacks_or_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    home = beside(tmp_path, [("ill", "60", "f"), ("well", "50", "other")])
    error = refused(home, fusion(["ill", "well"]))
    assert error.code == "data.covariate" and "other" not in str(error)
    error = refused(home, fusion(["ill", "well"], number="weight"))
    assert error.code == "data.covariate-missing" and "covariate_weight" in error.hint


def test_numbers_in_the_label_column_become_classes_by_range(tmp_path: Path) -> None:
    home = pictures(tmp_path, ["39.9", "40", "64", "65", "80"])
    path = home.data / "site.yaml"
    text = path.read_text()
    start, end = text.index("labels:"), text.index("# Local label names")
    ranges = 'labels:\n  young: "<40"\n  middle: "40..65"\n  old: ">=65"\n\n'
    path.write_text(text[:start] + ranges + text[end:])
    cohort = open_cohort(home, classification(["young", "middle", "old"]))
    assert {name: int(label) for name, label in cases_of(cohort).items()} == {
        "c0": 0,
        "c1": 1,
        "c2": 1,
        "c3": 2,
        "c4": 2,
    }


def test_a_label_that_could_be_either_of_two_classes_is_for_a_person(tmp_path: Path) -> None:
    home = segmented(tmp_path)
    names = ["background", "liver", "li-ver"]
    wanted = study(
        task={"kind": "segmentation", "dimensions": 3, "inputs": ["ct"], "classes": names}
    )
    error = refused(home, wanted)
    assert error.code == "data.class-ambiguous" and "Liver" in error.message


def test_all_that_is_kept_of_images_belongs_to_the_site_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        home = segmented(tmp_path)
        open_cohort(home, study())
    finally:
        os.umask(before)
    folders = [home.data, *(path for path in (home.data / "cache").rglob("*") if path.is_dir())]
    assert len(folders) > 4
    assert [path for path in folders if path.stat().st_mode & 0o777 != 0o700] == []
