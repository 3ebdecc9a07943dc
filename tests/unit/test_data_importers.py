"""Importers of files: nnU-Net, BIDS, pairs and CSV, and what is said where several would do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import home_in, write_list, write_nifti, write_pair, write_pairs

from consilium_client.data.drafting import draft_manifest, notes_on
from consilium_client.data.formats import FORMATS
from consilium_client.data.importers import Choices, choose_importer, importers
from consilium_client.data.importers.bids import BidsImporter
from consilium_client.data.importers.csv_list import CsvImporter
from consilium_client.data.importers.nnunet import NnunetImporter
from consilium_client.data.importers.pairs import PairsImporter
from consilium_client.data.importing import DataProblemsError, ImportOptions, import_folder
from consilium_client.data.manifest import load_manifest
from consilium_common.errors import ConsiliumError

IMAGE = np.arange(6 * 5 * 4).reshape(6, 5, 4)
MASK = (IMAGE > 60).astype(np.uint8)


def refused(importer: object, folder: Path) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        importer.cases(folder)  # type: ignore[attr-defined]
    return caught.value


# --- nnU-Net -----------------------------------------------------------------------------------


def nnunet(folder: Path, **changes: object) -> Path:
    """Two cases with two channels each."""
    for case in ("liver_0", "liver_1"):
        for channel in range(2):
            write_nifti(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", IMAGE + channel)
        write_nifti(folder / "labelsTr" / f"{case}.nii.gz", MASK, dtype=np.uint8)
    content = {
        "channel_names": {"0": "T1 post", "1": "FLAIR"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_nnunets_registered_channels_become_inputs(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data")
    outcome = import_folder(home_in(tmp_path), folder, ImportOptions())
    assert outcome.manifest.site.inputs == ["t1-post", "flair"]
    assert outcome.manifest.site.labels == {"background": 0, "tumour": 1}
    entry = outcome.entries["liver_1"]
    assert np.array_equal(entry.image("flair"), entry.image("t1-post") + 1)


def test_a_missing_channel_of_nnunet_is_a_finding_and_no_other_takes_its_place(
    tmp_path: Path,
) -> None:
    folder = nnunet(tmp_path / "data")
    (folder / "imagesTr" / "liver_0_0000.nii.gz").unlink()
    found = NnunetImporter().cases(folder)
    assert [case.case_id for case in found.cases] == ["liver_1"]
    assert [(f.case, f.code) for f in found.findings] == [("liver_0", "data.missing")]


def test_nnunets_regions_are_named_by_value_and_said(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    found = NnunetImporter().cases(nnunet(tmp_path, labels=labels))
    assert found.labels == {"background": 0, "enhancing": 3, "value-1": 1, "value-2": 2}
    assert any("whole, core" in note for note in found.notes)


def test_nnunets_own_list_of_files_is_followed_and_may_not_leave_the_folder(
    tmp_path: Path,
) -> None:
    images = ["imagesTr/liver_0_0000.nii.gz", "imagesTr/liver_1_0001.nii.gz"]
    folder = nnunet(tmp_path, dataset={"only": {"images": images, "label": "labelsTr/x.nii.gz"}})
    (case,) = NnunetImporter().cases(folder).cases
    assert list(case.images.values()) == images and case.label == "labelsTr/x.nii.gz"
    nnunet(tmp_path, dataset={"a": {"images": ["../secret.nii.gz", "b"], "label": ""}})
    assert refused(NnunetImporter(), folder).code == "data.outside"


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"background": 0, "ignore": 2}},
        {"labels": {"a": 1, "b": 1}},
        {"labels": {"a": -1}},
        {"labels": []},
        {"channel_names": {}},
        {"channel_names": {"1": "T1"}},
        {"file_ending": "../x"},
        {"file_ending": ".png"},
        {"dataset": {"a": "x"}},
    ],
)
def test_a_broken_description_of_nnunet_is_refused(tmp_path: Path, changes: dict) -> None:
    error = refused(NnunetImporter(), nnunet(tmp_path, **changes))
    assert error.code == "data.dataset-json" and error.hint


def test_the_first_version_of_nnunet_is_recognised_by_its_files(tmp_path: Path) -> None:
    changes = {"modality": {"0": "CT", "1": "PET"}, "labels": {"0": "background", "1": "x"}}
    nnunet(tmp_path, training=[{"image": "./imagesTr/liver_0.nii.gz"}], **changes)
    content = json.loads((tmp_path / "dataset.json").read_text())
    del content["channel_names"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    importer, line = choose_importer(tmp_path, importers())
    assert importer.name == "nnunet" and "msd" in line
    found = importer.cases(tmp_path)
    assert found.inputs == ("ct", "pet") and found.labels == {"background": 0, "x": 1}


# --- BIDS --------------------------------------------------------------------------------------


def bids(folder: Path, *, masks: tuple[str, ...] = ("manual/label-lesion_mask",)) -> Path:
    """Two participants, the first with two sessions; T1w and FLAIR on one grid everywhere."""
    (folder).mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text("{}")
    for person, session in (("01", "a"), ("01", "b"), ("02", "")):
        place = Path(f"sub-{person}") / (f"ses-{session}" if session else "") / "anat"
        stem = f"sub-{person}" + (f"_ses-{session}" if session else "")
        for kind in ("T1w", "FLAIR"):
            write_nifti(folder / place / f"{stem}_{kind}.nii.gz", IMAGE)
        for mask in masks:
            pipeline, name = mask.split("/")
            path = folder / "derivatives" / pipeline / place / f"{stem}_{name}.nii.gz"
            write_nifti(path, MASK, dtype=np.uint8)
    (folder / "participants.tsv").write_text(
        "participant_id\tage\tgroup\nsub-01\t61\tpatient\nsub-02\tn/a\tcontrol\n"
    )
    return folder


def test_bids_sessions_are_cases_of_one_patient_with_modalities_as_channels(
    tmp_path: Path,
) -> None:
    folder = bids(tmp_path / "data")
    outcome = import_folder(
        home_in(tmp_path), folder, ImportOptions(covariates={"age": "age", "arm": "group"})
    )
    assert [(c.case_id, c.patient_id) for c in outcome.manifest.cases] == [
        ("sub-01_ses-a", "sub-01"),
        ("sub-01_ses-b", "sub-01"),
        ("sub-02", "sub-02"),
    ]
    assert outcome.manifest.site.inputs == ["t1w", "flair"]
    assert outcome.manifest.site.labels == {"background": 0, "lesion": 1}
    assert [c.covariates for c in outcome.manifest.cases] == [
        {"age": 61.0, "arm": "patient"},
        {"age": 61.0, "arm": "patient"},
        {"age": None, "arm": "control"},
    ]
    assert "Covariate age: numbers, missing in 1 case." in outcome.notes


def test_a_modality_on_another_grid_is_left_aside_until_it_is_chosen(tmp_path: Path) -> None:
    folder = bids(tmp_path / "data")
    other = np.diag([2.0, 1, 1, 1])
    write_nifti(folder / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz", IMAGE, other)
    found = BidsImporter().cases(folder)
    assert found.inputs == ("t1w",)
    assert any("FLAIR (3 cases)" in note and "--channel" in note for note in found.notes)
    chosen = BidsImporter(Choices(channels={"pd": "FLAIR"})).cases(folder)
    assert chosen.inputs == ("pd",)
    assert chosen.cases[2].images == {"pd": "sub-02/anat/sub-02_FLAIR.nii.gz"}
    assert BidsImporter(Choices(inputs=("FLAIR",))).cases(folder).inputs == ("flair",)


def test_a_channel_that_is_missing_or_ambiguous_is_a_finding_of_its_case(tmp_path: Path) -> None:
    folder = bids(tmp_path)
    (folder / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz").unlink()
    write_nifti(folder / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_run-2_T1w.nii.gz", IMAGE)
    found = BidsImporter(Choices(channels={"t1": "*T1w", "t2": "FLAIR"})).cases(folder)
    assert [case.case_id for case in found.cases] == ["sub-01_ses-b"]
    assert {(f.case, f.code) for f in found.findings} == {
        ("sub-01_ses-a", "data.several-series"),
        ("sub-02", "data.missing"),
    }


def test_several_kinds_of_masks_are_listed_and_chosen(tmp_path: Path) -> None:
    folder = bids(tmp_path, masks=("fs/desc-aseg_dseg", "manual/label-lesion_mask"))
    error = refused(BidsImporter(), folder)
    assert error.code == "data.two-labels"
    assert "fs/desc-aseg_dseg (3 cases), manual/label-lesion_mask (3 cases)" in error.message
    (folder / "derivatives" / "fs" / "desc-aseg_dseg.tsv").write_text(
        "index\tname\n1\tCaudate\n2\tPutamen\n"
    )
    found = BidsImporter(Choices(derivative="fs")).cases(folder)
    assert found.labels == {"background": 0, "Caudate": 1, "Putamen": 2}
    assert all("derivatives/fs" in case.label for case in found.cases)
    assert refused(BidsImporter(Choices(derivative="none")), folder).code == "data.no-label"


def test_bids_classes_come_from_a_column_of_the_participants(tmp_path: Path) -> None:
    folder = bids(tmp_path, masks=())
    error = refused(BidsImporter(), folder)
    assert error.code == "data.no-label" and "--label-from" in error.hint
    found = BidsImporter(Choices(label_from="group")).cases(folder)
    assert [case.label for case in found.cases] == ["patient", "patient", "control"]
    error = refused(BidsImporter(Choices(label_from="grup")), folder)
    assert error.code == "usage.column" and "age, group" in error.hint
    (folder / "participants.tsv").write_text("participant_id\tgroup\nsub-01\n")
    assert refused(BidsImporter(Choices(label_from="group")), folder).code == "data.cases"


def test_a_sessions_own_table_goes_before_the_participants(tmp_path: Path) -> None:
    folder = bids(tmp_path)
    (folder / "sub-01" / "sub-01_sessions.tsv").write_text(
        "session_id\tage\tscore\nses-a\t61.5\t3\nses-b\t63\tn/a\n"
    )
    facts = {"age": "age", "score": "score"}
    found = BidsImporter(Choices(covariates=facts)).cases(folder)
    assert [case.covariates for case in found.cases] == [
        {"age": 61.5, "score": 3.0},
        {"age": 63.0, "score": None},
        {"age": None, "score": None},
    ]


# --- pairs -------------------------------------------------------------------------------------


def test_pairs_are_found_by_name_whatever_the_masks_tail(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path / "data", f"p{number}", seed=number)
    labels = tmp_path / "data" / "labels"
    (labels / "p1.nii.gz").rename(labels / "p1_seg.nii.gz")
    labels.rename(tmp_path / "data" / "masks")
    write_nifti(tmp_path / "data" / "masks" / "stray.nii.gz", MASK)
    home = home_in(tmp_path)
    outcome = import_folder(home, tmp_path / "data", ImportOptions())
    assert [case.label for case in outcome.manifest.cases] == [
        "masks/p0.nii.gz",
        "masks/p1_seg.nii.gz",
        "masks/p2.nii.gz",
    ]
    assert "Masks without an image: 1." in outcome.notes


def test_training_and_test_folders_pair_with_their_own_masks(tmp_path: Path) -> None:
    for part in ("Tr", "Ts"):
        write_nifti(tmp_path / f"images{part}" / "sub" / "a.nii.gz", IMAGE)
        write_nifti(tmp_path / f"labels{part}" / "sub" / "a.nii.gz", MASK)
    found = PairsImporter().cases(tmp_path)
    assert {case.case_id: case.label for case in found.cases} == {
        "imagesTr/sub/a": "labelsTr/sub/a.nii.gz",
        "imagesTs/sub/a": "labelsTs/sub/a.nii.gz",
    }


def test_two_masks_of_one_image_are_a_finding(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    write_nifti(tmp_path / "labels" / "a_mask.nii.gz", MASK)
    found = PairsImporter().cases(tmp_path)
    assert found.cases == () and found.findings[0].code == "data.two-labels"


def test_two_images_that_would_be_one_case_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "data", "a")
    write_nifti(tmp_path / "data" / "images" / "a.nii", IMAGE)
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home_in(tmp_path), tmp_path / "data", ImportOptions())
    assert caught.value.code == "data.duplicate-case"


def test_segments_of_nrrd_files_are_named_and_keep_their_values(tmp_path: Path) -> None:
    import nrrd

    space = {
        "space": "left-posterior-superior",
        "space directions": np.eye(3).tolist(),
        "space origin": [0.0, 0.0, 0.0],
    }
    folder = tmp_path / "data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)

    def write(case: str, *names: str) -> None:
        nrrd.write(str(folder / "images" / f"{case}.nrrd"), IMAGE.astype(np.int16), space)
        segments = {
            key: value
            for n, text in enumerate(names)
            for key, value in (
                (f"Segment{n}_ID", f"S{n}"),
                (f"Segment{n}_Name", text),
                (f"Segment{n}_LabelValue", str(n + 1)),
                (f"Segment{n}_Layer", "0"),
            )
        }
        mask = np.zeros(IMAGE.shape, np.uint8)
        mask.reshape(-1)[: len(names)] = range(1, len(names) + 1)
        nrrd.write(str(folder / "labels" / f"{case}.seg.nrrd"), mask, {**space, **segments})

    write("b", "Liver", "Spleen")
    home = home_in(tmp_path)
    outcome = import_folder(home, folder, ImportOptions())
    assert outcome.manifest.site.labels == {"background": 0, "Liver": 1, "Spleen": 2}
    write("a", "Kidney", "Liver")
    outcome = import_folder(home, folder, ImportOptions())
    assert outcome.manifest.site.labels == {"background": 0, "Liver": 1, "Spleen": 2, "Kidney": 3}
    assert outcome.entries["a"].label_values == (0, 1, 3)


# --- CSV ---------------------------------------------------------------------------------------


def test_a_lists_own_columns_become_the_label_and_covariates(tmp_path: Path) -> None:
    write_list(
        tmp_path,
        [("a", "p", "a.png", "ill", "61", "3A"), ("b", "q", "b.png", "well", "", "2")],
        "case_id,patient_id,image,diagnosis,years,covariate_grade",
    )
    found = CsvImporter(Choices(label_from="diagnosis", covariates={"age": "years"})).cases(
        tmp_path
    )
    assert [case.label for case in found.cases] == ["ill", "well"]
    assert found.covariates == ("age", "grade")
    assert [case.covariates for case in found.cases] == [
        {"age": 61.0, "grade": "3A"},
        {"age": None, "grade": "2"},
    ]
    assert refused(CsvImporter(), tmp_path).code == "data.cases"
    error = refused(CsvImporter(Choices(label_from="diagnose")), tmp_path)
    assert error.code == "usage.column" and "diagnosis" in error.hint


def test_measurements_that_would_be_a_class_each_are_pointed_out(tmp_path: Path) -> None:
    rows = [(f"c{n}", f"p{n}", f"{n}.png", str(30 + n)) for n in range(12)]
    (tmp_path / "data").mkdir()
    write_list(tmp_path / "data", rows)
    found = CsvImporter().cases(tmp_path / "data")
    home = home_in(tmp_path)
    (note,) = notes_on(draft_manifest(home, found, ImportOptions(), None))
    assert "12 different numbers" in note and "--label" in note
    ranges = ImportOptions(labels={"young": "<35", "old": ">=35"})
    assert notes_on(draft_manifest(home, found, ranges, None)) == ()


# --- which layout, and what stays -------------------------------------------------------------


def test_the_formats_of_the_help_text_are_those_that_exist() -> None:
    known = importers()
    assert list(known) == list(FORMATS)
    assert all(importer.name == name for name, importer in known.items())


def test_a_folder_of_two_layouts_says_which_was_taken_and_which_not(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", 1)
    _, line = choose_importer(tmp_path / "data", importers())
    assert line == (
        "Detected csv: the case list cases.csv. It could also be read as pairs: --format chooses."
    )
    for build, name in ((nnunet, "nnunet"), (bids, "bids")):
        importer, line = choose_importer(build(tmp_path / name), importers())
        assert importer.name == name and line.startswith(f"Detected {name}: ")


def test_an_option_that_a_layout_has_no_use_for_is_refused(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data")
    with pytest.raises(ConsiliumError) as caught:
        import_folder(home_in(tmp_path), folder, ImportOptions(channels={"t1": "T1"}))
    assert caught.value.code == "usage.option" and "--channel" in caught.value.message


def test_what_a_person_edited_survives_a_second_import_of_classes(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / "data" / f"{number}.png")
    rows = [(f"c{n}", f"p{n}", f"{n}.png", str(age)) for n, age in enumerate((31, 65, 80))]
    write_list(tmp_path / "data", rows)
    home = home_in(tmp_path)
    labels = {"young": "<40", "old": ">=65"}
    outcome = import_folder(home, tmp_path / "data", ImportOptions(labels=labels))
    assert outcome.manifest.site.labels == labels
    cases = (home.data / "cases.csv").read_text().splitlines()
    cases = [f"{cases[0]},covariate_sodium", *(f"{row},14{n}" for n, row in enumerate(cases[1:]))]
    (home.data / "cases.csv").write_text("\n".join(cases))
    site = (home.data / "site.yaml").read_text().replace("covariates: []", "covariates: [sodium]")
    (home.data / "site.yaml").write_text(site)
    import_folder(home, tmp_path / "data", ImportOptions())
    manifest = load_manifest(home)
    assert manifest.site.labels == labels
    assert [case.covariates["sodium"] for case in manifest.cases] == [140.0, 141.0, 142.0]
    write_list(tmp_path / "data", [*rows[:2], ("c2", "p2", "2.png", "50")])
    outcome = import_folder(home, tmp_path / "data", ImportOptions())
    assert outcome.manifest.site.labels == {**labels, "50": "50"}
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home, tmp_path / "data", ImportOptions(labels=labels))
    assert caught.value.code == "data.label-unknown"
