"""What an operator gets wrong at an import is one clear error, and nothing is passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (
    home_in,
    write_list,
    write_nifti,
    write_pair,
    write_pairs,
    write_seg,
    write_slices,
)
from PIL import Image
from typer.testing import CliRunner

from consilium_client.cli import app
from consilium_client.data.cli import data_app
from consilium_client.data.findings import Finding
from consilium_client.data.importers.base import NO_PATIENTS
from consilium_client.data.importing import (
    DataOutcome,
    DataProblemsError,
    ImportOptions,
    check_data,
    import_folder,
)
from consilium_common.errors import ConsiliumError

MASK = np.zeros((12, 10, 8))
MASK[3:7, 2:6, 2:5] = 1


def imported(tmp_path: Path, folder: Path, **options: object) -> DataOutcome:
    return import_folder(home_in(tmp_path), folder, ImportOptions(**options))  # type: ignore[arg-type]


def refusal(tmp_path: Path, folder: Path, **options: object) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        imported(tmp_path, folder, **options)
    assert caught.value.hint
    return caught.value


def pairs(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_pair(folder, name, seed=seed)
    return folder


def classes(folder: Path, *names: str, file: str = "one") -> Path:
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 6), 50 * shade + 3).save(folder / name / f"{file}.png")
    return folder


# --- names -------------------------------------------------------------------------------------


def test_a_name_that_is_no_text_is_refused_and_can_be_printed(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "a")
    odd = Path(os.fsdecode(os.fsencode(folder / "images") + b"/caf\xe9.nii.gz"))
    (folder / "images" / "a.nii.gz").rename(odd)
    error = refusal(tmp_path, folder)
    assert error.code == "data.name"
    assert json.dumps(error.to_dict(), ensure_ascii=False).encode()
    finding = Finding("caf\udce9", "data.name", "", str(odd), "")
    assert json.dumps(finding.to_dict(), ensure_ascii=False).encode()


def test_a_name_that_commands_the_terminal_is_shown_as_text(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "red\x1b[31m", "b")
    (folder / "labels" / "red\x1b[31m.nii.gz").write_bytes(b"")
    error = refusal(tmp_path, folder)
    assert "\x1b" not in error.where and r"red\x1b[31m" in error.where
    imported(tmp_path, write_pairs(tmp_path / "good", 1))
    listed = tmp_path / "home" / "data" / "cases.csv"
    listed.write_text(listed.read_text().replace("scan0,", "scan\x1b[31m,"))
    home = ["--home", str(tmp_path / "home")]
    assert "\x1b[31m" not in CliRunner().invoke(data_app, ["list", *home]).stdout


def test_long_names_are_shortened_and_stay_apart(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    classes(folder, "ill", "well", file="p" * 240 + "1")
    for name in ("ill", "well"):
        (folder / name / ("p" * 240 + "2.png")).write_bytes(
            next((folder / name).iterdir()).read_bytes()
        )
    outcome = imported(tmp_path, folder)
    names = {case.case_id for case in outcome.manifest.cases}
    assert len(names) == 4 and max(map(len, names)) <= 200


def test_spaces_around_a_file_name_do_not_make_another_patient_of_it(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", " first", "last ", "in the middle")
    home = home_in(tmp_path)
    first = import_folder(home, folder, ImportOptions())
    assert import_folder(home, folder, ImportOptions()).read == 0
    again = check_data(home)
    assert again.read == 0 and again.splits == first.splits


@pytest.mark.parametrize("name", ["a|b", "a;b", "-", " ill"])
def test_a_folder_that_cannot_be_a_class_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path, classes(tmp_path / "data", name, "well"))
    assert error.code == "data.name" and name in error.where


# --- patients ----------------------------------------------------------------------------------


def test_a_list_of_patients_that_lacks_a_case_is_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "a", "b", "c")
    listed = tmp_path / "patients.csv"
    listed.write_text("case_id,patient_id\na,Anna\nB,Anna\n")
    error = refusal(tmp_path, folder, patients=listed)
    assert error.code == "data.no-patient" and "2 cases" in error.message
    assert "case b" in error.where and "Anna" not in str(error)
    listed.write_text("case_id,patient_id\na,Anna\nb,Anna\nc,Berta\na,Berta\n")
    error = refusal(tmp_path, folder, patients=listed)
    assert error.code == "data.duplicate-case" and error.where.endswith(":5")
    listed.write_text("case_id,patient_id\na,Anna\nb,Anna\nc,Berta\nanother,Carla\n")
    outcome = imported(tmp_path, folder, patients=listed)
    assert outcome.counts()["patients"] == 2 and NO_PATIENTS not in outcome.notes


def test_a_missing_list_is_said_to_be_missing(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "a")
    assert refusal(tmp_path, folder, patients=tmp_path / "no.csv").code == "data.missing"


# --- rights ------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that may not be listed; rights alone do not stop a test that runs as root."""
    folder = tmp_path / "data" / "P2"
    listed = os.scandir

    def scandir(path: object = ".") -> object:
        if not isinstance(path, int) and Path(os.fspath(path)) == folder:  # type: ignore[call-overload]
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    yield folder


def test_a_closed_folder_of_dicom_is_never_passed_over(tmp_path: Path, closed: Path) -> None:
    for patient in ("P1", "P2"):
        files = write_slices(tmp_path / "data" / patient, 100 * MASK, patient=patient)
        write_seg(tmp_path / "data" / patient / "seg.dcm", files, MASK, "liver")
    error = refusal(tmp_path, tmp_path / "data")
    assert isinstance(error, DataProblemsError)
    assert error.code == "data.missing" and error.where == str(closed)
    outcome = imported(tmp_path, tmp_path / "data", skip_bad=True)
    assert outcome.counts()["cases"] == 1
    assert [finding.where for finding in outcome.left_out] == [str(closed)]


def test_a_folder_that_detection_may_not_look_at_is_named(tmp_path: Path, closed: Path) -> None:
    error = refusal(tmp_path, classes(tmp_path / "data", "P1", "P2", "P3"))
    assert error.code == "data.missing" and error.where == str(closed)


def test_a_folder_of_something_else_is_never_made_a_site_and_closed(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "a")
    folder.chmod(0o755)
    for arguments in (["list"], ["import", str(folder)]):
        answer = CliRunner().invoke(data_app, [*arguments, "--home", str(folder)])
        assert answer.exit_code == 8
    assert "state.not-a-site" in answer.stderr
    assert folder.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in folder.iterdir()) == ["images", "labels"]


def test_a_broken_dicomdir_in_the_tree_is_one_finding(tmp_path: Path) -> None:
    files = write_slices(tmp_path / "data" / "P1", 100 * MASK)
    write_seg(tmp_path / "data" / "P1" / "seg.dcm", files, MASK, "liver")
    (tmp_path / "data" / "CD" / "x").mkdir(parents=True)
    (tmp_path / "data" / "CD" / "DICOMDIR").write_bytes(b"rubbish")
    assert refusal(tmp_path, tmp_path / "data").code == "data.truncated"
    outcome = imported(tmp_path, tmp_path / "data", skip_bad=True)
    assert outcome.counts()["cases"] == 1 and len(outcome.left_out) == 1


# --- lists and options -------------------------------------------------------------------------


def test_a_channel_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "data", "a")
    image = "images/a.nii.gz"
    write_list(
        folder,
        [("a", "p", f"{image}#0", f"{image}#1", "labels/a.nii.gz")],
        "case_id,patient_id,image,image_t2,label",
    )
    assert refusal(tmp_path, folder).code == "data.dimensions"
    write_nifti(folder / image, np.stack([MASK, 2 * MASK], axis=3), np.diag([1.5, 1.0, 2.0, 1.0]))
    assert imported(tmp_path, folder).counts()["cases"] == 1


def test_a_list_with_tabs_is_read(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "data", 2)
    listed = folder / "cases.csv"
    listed.write_text(listed.read_text().replace(",", "\t"))
    assert imported(tmp_path, folder).counts()["cases"] == 2


def test_a_segment_that_no_file_has_is_named(tmp_path: Path) -> None:
    files = write_slices(tmp_path / "data" / "P1", 100 * MASK)
    write_seg(tmp_path / "data" / "seg.dcm", files, MASK, "liver")
    error = refusal(tmp_path, tmp_path / "data", segments=("kidney",))
    assert error.code == "usage.segment" and "kidney" in error.message


def test_a_format_without_its_file_says_which_file_lacks(tmp_path: Path) -> None:
    error = refusal(tmp_path, pairs(tmp_path / "data", "a"), format="msd")
    assert error.code == "data.no-list" and "dataset.json" in error.message


def test_a_bad_name_of_the_site_is_said_in_words(tmp_path: Path) -> None:
    error = refusal(tmp_path, pairs(tmp_path / "data", "a"), site="My Hospital!")
    assert error.code == "usage.manifest" and "^" not in error.message


def test_a_case_list_that_is_gone_is_written_anew_under_the_same_names(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    folder = write_pairs(tmp_path / "data", 2)
    named = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})
    import_folder(home, folder, named)
    (home.data / "cases.csv").unlink()
    outcome = import_folder(home, folder, ImportOptions())
    assert outcome.read == 0
    assert outcome.manifest.site.labels == named.labels and outcome.manifest.site.inputs == ["ct"]


def test_a_check_of_an_emptied_case_list_is_an_error_and_keeps_the_cache(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    folder = write_pairs(tmp_path / "data", 2)
    import_folder(home, folder, ImportOptions())
    listed = home.data / "cases.csv"
    listed.write_text(listed.read_text().split("\n")[0] + "\n")
    with pytest.raises(ConsiliumError) as caught:
        check_data(home)
    assert caught.value.code == "data.cases" and caught.value.hint
    assert import_folder(home, folder, ImportOptions()).read == 0


# --- what is shown -----------------------------------------------------------------------------


def test_the_doctor_marks_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    import_folder(home, write_pairs(tmp_path / "data", 1), ImportOptions())
    (home.data / "site.yaml").write_text("site: [")
    answer = CliRunner().invoke(app, ["doctor", "--home", str(home.path)])
    assert answer.exit_code == 4
    assert "✗ data:" in answer.stdout and "✓ data:" not in answer.stdout


def test_the_list_keeps_each_fact_on_one_line_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    home = home_in(tmp_path)
    folder = write_pairs(tmp_path / "data", 1)
    row = ("hippocampus_001", "p", "images/scan0.nii.gz", "labels/scan0.nii.gz", "validation")
    write_list(folder, [row], "case_id,patient_id,image,label,split")
    import_folder(home, folder, ImportOptions())
    shown = CliRunner().invoke(data_app, ["list", "--home", str(home.path)]).stdout
    assert "hippocampus_001" in shown and "12 × 10 × 8" in shown and "1.5 × 1 × 2" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
