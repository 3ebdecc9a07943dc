"""The DICOM importer: channels, labels from tags and drawings, covariates, media."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_fixtures import home_in, real, write_seg, write_slices
from hypothesis import given
from hypothesis import strategies as st
from label_fixtures import write_rtstruct
from pydicom.data import get_testdata_file

from consilium_client.data.importers import Choices, choose_importer, importers
from consilium_client.data.importers.channels import matching
from consilium_client.data.importers.dicom_tags import parse_tag, tag_values
from consilium_client.data.importers.dicom_tree import DicomImporter
from consilium_client.data.importing import DataProblemsError, ImportOptions, import_folder
from consilium_common.errors import ConsiliumError

VALUES = np.random.default_rng(0).integers(-1000, 1500, (6, 6, 3)).astype(float)


def refused(folder: Path, choices: Choices) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        DicomImporter(choices).cases(folder)
    return caught.value


def examination(folder: Path, patient: str, *descriptions: str) -> list[list[Path]]:
    """Write one study with a series per description, all on one grid."""
    uid = pydicom.uid.generate_uid()
    frame = pydicom.uid.generate_uid()
    return [
        write_slices(
            folder / f"s{number}",
            VALUES + number,
            patient=patient,
            changes={
                "StudyInstanceUID": uid,
                "FrameOfReferenceUID": frame,
                "SeriesDescription": text,
            },
        )
        for number, text in enumerate(descriptions)
    ]


# --- channels ----------------------------------------------------------------------------------


def test_series_of_a_study_become_its_channels(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    examination(root / "one", "P1", "T1 post", "T2_reg", "localizer")
    examination(root / "two", "P2", "T2_reg", "T1 POST")
    (root / "labels.csv").write_text("patient_id,label\nP1,ill\nP2,well\n")
    options = ImportOptions(channels={"t1": "t1*", "t2": "T2"})
    outcome = import_folder(home_in(tmp_path), root, options)
    assert outcome.manifest.site.inputs == ["t1", "t2"]
    assert "1 series are no case's channel and are left aside." in outcome.notes
    cases = {case.patient_id: case for case in outcome.manifest.cases}
    assert cases["P1"].images == {"t1": "one/s0", "t2": "one/s1"}
    assert cases["P2"].images == {"t1": "two/s1", "t2": "two/s0"}
    entry = outcome.entries[cases["P2"].case_id]
    assert np.array_equal(entry.image("t1"), entry.image("t2") + 1)


def test_a_missing_or_ambiguous_channel_is_a_finding_and_the_others_stand(tmp_path: Path) -> None:
    examination(tmp_path / "whole", "P1", "T1", "T2")
    examination(tmp_path / "lacks", "P2", "T1")
    examination(tmp_path / "many", "P3", "T1", "T2 a", "T2 b")
    found = DicomImporter(Choices(channels={"t1": "T1", "t2": "T2"})).cases(tmp_path)
    assert [case.patient_id for case in found.cases] == ["P1"]
    assert {(f.case, f.code) for f in found.findings} == {
        ("lacks/s0", "data.missing"),
        ("many", "data.several-series"),
    }
    assert all(f.where and f.hint for f in found.findings)
    assert "P2" not in repr(found.findings)


def test_two_examinations_of_a_patient_are_two_cases(tmp_path: Path) -> None:
    for visit in ("a", "b"):
        examination(tmp_path / visit, "P1", "T1", "T2")
    found = DicomImporter(Choices(channels={"t1": "T1", "t2": "T2"})).cases(tmp_path)
    assert len({case.case_id for case in found.cases}) == 2
    assert {case.patient_id for case in found.cases} == {"P1"}


def test_the_channel_that_was_drawn_on_comes_first(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    _, second = examination(root / "one", "P1", "T1", "T2")
    write_seg(root / "seg.dcm", second, (VALUES > 0).astype(np.uint8), "Lesion")
    options = ImportOptions(channels={"t1": "T1", "t2": "T2"})
    outcome = import_folder(home_in(tmp_path), root, options)
    assert outcome.manifest.site.inputs == ["t2", "t1"]
    (entry,) = outcome.entries.values()
    assert np.array_equal(entry.label() > 0, entry.image("t2") > 1)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    uid = pydicom.uid.generate_uid()
    for number, name in enumerate(("T1", "T2")):
        changes = {"StudyInstanceUID": uid, "SeriesDescription": name}
        write_slices(root / name, VALUES, spacing=(0.8, 0.7, 2.5 + number), changes=changes)
    (root / "labels.csv").write_text("patient_id,label\nP-17,ill\n")
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home_in(tmp_path), root, ImportOptions(channels={"t1": "T1", "t2": "T2"}))
    assert caught.value.code == "data.geometry"


@given(st.lists(st.text("aT12* ", max_size=6), max_size=5), st.text("aT12 ", min_size=1))
def test_a_pattern_fits_whole_names_before_parts_of_them(names: list[str], pattern: str) -> None:
    found = matching(names, pattern, lambda name: (name,))
    wanted = pattern.strip().casefold()
    whole = [name for name in names if name and name.casefold() == wanted]
    parts = [name for name in names if name and wanted in name.casefold()]
    assert found == (whole or parts)


# --- labels ------------------------------------------------------------------------------------


def test_an_rtstruct_is_the_label_of_the_series_it_refers_to(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    paths = write_slices(root / "ct", VALUES, origin=(0.0, 0.0, 0.0), spacing=(1.0, 1.0, 2.0))
    square = np.array([[0.6, 0.6], [3.4, 0.6], [3.4, 3.4], [0.6, 3.4]])
    contour = np.c_[square, np.full(4, 2.0)]
    everything = np.c_[np.array([[-1, -1], [9, -1], [9, 9], [-1, 9]]), np.full(4, 2.0)]
    write_rtstruct(root / "rs.dcm", paths, {"Liver": [contour], "BODY": [everything]})
    with pytest.raises(DataProblemsError) as caught:
        import_folder(home_in(tmp_path), root, ImportOptions())
    assert caught.value.code == "data.overlap"
    outcome = import_folder(home_in(tmp_path), root, ImportOptions(segments=("Liver",)))
    assert outcome.manifest.site.labels == {"background": 0, "Liver": 1}
    (case,) = outcome.manifest.cases
    assert case.label == "rs.dcm#Liver"
    assert int(outcome.entries[case.case_id].label().sum()) == 9


@pytest.mark.parametrize(("series", "labels"), [(("T1",), ["seg.dcm"]), (("T1", "T2"), ["", ""])])
def test_a_segmentation_without_a_reference_belongs_to_the_one_series_in_its_space(
    tmp_path: Path, series: tuple[str, ...], labels: list[str]
) -> None:
    paths, *_ = examination(tmp_path / "one", "P1", *series)
    examination(tmp_path / "two", "P2", "T1")
    path = write_seg(tmp_path / "seg.dcm", paths, np.ones(VALUES.shape, np.uint8), "Liver")
    dataset = pydicom.dcmread(path)
    dataset.PatientID = "P1"
    del dataset.ReferencedSeriesSequence
    dataset.save_as(path)
    found = DicomImporter().cases(tmp_path)
    assert [case.label for case in found.cases if case.patient_id == "P1"] == labels
    assert [case.label for case in found.cases if case.patient_id == "P2"] == [""]
    assert ("1 segmentations refer to series not found here." in found.notes) == (
        labels == ["", ""]
    )


def test_named_segments_decide_between_two_segmentations(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "ct", VALUES)
    mask = np.ones(VALUES.shape, np.uint8)
    write_seg(tmp_path / "a.dcm", paths, mask, "Liver")
    write_seg(tmp_path / "b.dcm", paths, mask, "Spleen")
    assert DicomImporter().cases(tmp_path).findings[0].code == "data.two-labels"
    found = DicomImporter(Choices(segments=("Spleen",))).cases(tmp_path)
    assert [case.label for case in found.cases] == ["b.dcm#Spleen"]
    assert found.labels == {"background": 0, "Spleen": 1}


def test_a_class_and_covariates_come_from_tags(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for patient, part, age, weight in (
        ("A", "CHEST", "045Y", "70.5"),
        ("B", "HEAD", "006M", None),
        ("C", "HEAD", "", "81"),
    ):
        changes = {"BodyPartExamined": part, "PatientAge": age, "PatientWeight": weight}
        write_slices(root / patient, VALUES, patient=patient, changes=changes)
    options = ImportOptions(
        label_from="BodyPartExamined", covariates={"age": "PatientAge", "kg": "(0010,1030)"}
    )
    outcome = import_folder(home_in(tmp_path), root, options)
    site, cases = outcome.manifest.site, {case.patient_id: case for case in outcome.manifest.cases}
    assert site.label_kind == "class" and site.covariates == ["age", "kg"]
    assert site.labels == {"CHEST": "CHEST", "HEAD": "HEAD"}
    assert cases["A"].covariates == {"age": 45.0, "kg": 70.5}
    assert cases["B"].covariates == {"age": 0.5, "kg": None}
    assert cases["C"].covariates == {"age": None, "kg": 81.0}


def test_an_age_becomes_a_class_by_its_range(tmp_path: Path) -> None:
    for patient, age in (("A", "039Y"), ("B", "040Y")):
        changes = {"PatientAge": age}
        write_slices(tmp_path / "tree" / patient, VALUES, patient=patient, changes=changes)
    options = ImportOptions(label_from="PatientAge", labels={"young": "<40", "old": ">=40"})
    outcome = import_folder(home_in(tmp_path), tmp_path / "tree", options)
    assert sorted(case.label for case in outcome.manifest.cases) == ["39", "40"]


@pytest.mark.parametrize(
    "tag",
    ["PatientName", "(0010,0020)", "PatientBirthDate", "AccessionNumber", "0008,0080", "StudyDate"],
)
def test_a_tag_that_identifies_is_refused(tag: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_tag(tag)
    assert caught.value.code == "usage.identifying-tag" and caught.value.hint


@pytest.mark.parametrize("tag", ["NoSuchTag", "", "(0010)", "PixelData", "SegmentSequence"])
def test_what_is_no_tag_or_holds_no_value_is_refused(tag: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_tag(tag)
    assert caught.value.code.startswith("usage.")


def test_a_tag_that_repeats_the_patients_name_is_refused_and_not_quoted(tmp_path: Path) -> None:
    write_slices(tmp_path / "ct", VALUES, changes={"ProtocolName": "Head UNMISTAKABLE routine"})
    error = refused(tmp_path, Choices(label_from="ProtocolName"))
    assert error.code == "usage.identifying-tag"
    assert "unmistakable" not in str(error.to_dict()).casefold()


def test_private_tags_are_read_by_number(tmp_path: Path) -> None:
    (path, *_) = write_slices(tmp_path / "ct", VALUES)
    dataset = pydicom.dcmread(path)
    block = dataset.private_block(0x0019, "NOBODY 1.0", create=True)
    block.add_new(0x10, "DS", ["3.50", "4"])
    block.add_new(0x11, "LO", "group; two")
    dataset.save_as(path)
    tags = [parse_tag("(0019,1010)"), parse_tag("0019,1011"), parse_tag("(0019,1099)")]
    assert tag_values(path, tags) == ("3.5|4", "group, two", "")


# --- media and real images ---------------------------------------------------------------------


def test_a_dicomdir_is_read_with_the_files_it_lists(tmp_path: Path) -> None:
    source = Path(str(get_testdata_file("DICOMDIR"))).parent
    root = tmp_path / "medium"
    shutil.copytree(source, root)
    importer, line = choose_importer(root / "DICOMDIR", importers(Choices(mixed=True)))
    assert line.startswith("Detected dicom: a DICOMDIR")
    found = importer.cases(root / "DICOMDIR")
    assert found.root == root and len(found.headers) > 10
    series = {header.series for header in found.headers}
    references = [reference for case in found.cases for reference in case.images.values()]
    assert references and all(name in series or (root / name).exists() for name in references)
    lost = found.headers[0].path
    lost.unlink()
    for start in (root, root / "DICOMDIR"):
        findings = DicomImporter(Choices(mixed=True)).cases(start).findings
        assert "data.missing" in {finding.code for finding in findings}


@pytest.mark.data
def test_the_real_registered_sequences_become_channels(tmp_path: Path) -> None:
    folder = real("dicom-mr")
    options = ImportOptions(
        channels={"t1": "T1post", "t2": "T2"},
        label_from="PatientSex",
        covariates={"age": "PatientAge"},
    )
    home = home_in(tmp_path)
    outcome = import_folder(home, folder, options)
    (case,) = outcome.manifest.cases
    assert case.images["t1"].endswith("11-T1post-18670")
    assert case.images["t2"].endswith("37830-T2reg-78532")
    assert case.label == "M" and case.covariates == {"age": 41.0}
    assert outcome.entries[case.case_id].image("t2").shape == (280, 320, 22)
    with pytest.raises(DataProblemsError) as caught:
        import_folder(
            home,
            folder,
            ImportOptions(channels={"t1": "T1post", "crop": "Hippo"}, label_from="PatientSex"),
        )
    assert caught.value.code == "data.geometry"
