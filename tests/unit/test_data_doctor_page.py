"""`site data check` and `site doctor`: table, page, exit status, what is mended and remembered."""

from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_fixtures import study, write_list, write_nifti, write_pairs, write_slices
from markupsafe import escape
from PIL import Image
from typer.testing import CliRunner

from consilium_client.cli import app
from consilium_client.data.doctor.memory import Memory, Remembered, files_key
from consilium_client.data.doctor.page import Subject, render_page
from consilium_client.data.findings import Finding
from consilium_client.data.thumbnail import picture_png
from consilium_client.home import SiteHome
from consilium_common.console import MODE
from consilium_common.errors import EXIT_STATUS, WARNINGS_ONLY, ConsiliumError

LABELS = ("--label", "background=0", "--label", "liver=1", "--input", "ct", "--site", "northfield")


def call(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, [*arguments, "--home", str(tmp_path / "home")])
    return answer.exit_code, answer.stdout, answer.stderr


def imported(tmp_path: Path, count: int = 3) -> Path:
    folder = write_pairs(tmp_path / "data", count)
    status, _, err = call(tmp_path, "data", "import", str(folder), *LABELS)
    assert status == 0, err
    return folder


def copied(folder: Path, source: str, target: str) -> None:
    for kind in ("images", "labels"):
        path = folder / kind / f"{target}.nii.gz"
        path.write_bytes((folder / kind / f"{source}.nii.gz").read_bytes())


# --- exit status, table, page ------------------------------------------------------------------


def test_the_exit_status_tells_a_clean_cohort_from_warnings_and_from_errors(tmp_path: Path) -> None:
    assert WARNINGS_ONLY not in {0, 130, *EXIT_STATUS.values()}
    folder = imported(tmp_path, 20)
    status, out, _ = call(tmp_path, "data", "check")
    assert (status, "Nothing stands out." in out) == (0, True)
    image = nibabel.load(folder / "images" / "scan3.nii.gz")
    brighter = np.asarray(image.dataobj) + 5000
    nibabel.save(nibabel.Nifti1Image(brighter, image.affine), image.get_filename())
    status, out, err = call(tmp_path, "data", "check")
    assert status == WARNINGS_ONLY
    assert "data.intensity-outlier" in err and "scan3" in err and "1 warning" in out
    copied(folder, "scan1", "scan2")
    status, out, err = call(tmp_path, "data", "check")
    assert status == 4 and out == ""
    assert "error data.same-image" in err and "warning data.intensity-outlier" in err


def test_all_findings_come_together_and_each_says_why_and_what_to_do(tmp_path: Path) -> None:
    folder = imported(tmp_path, 6)
    copied(folder, "scan1", "scan2")
    cut = folder / "images" / "scan4.nii.gz"
    cut.write_bytes(cut.read_bytes()[:700])
    listed = tmp_path / "home" / "data" / "cases.csv"
    rows = [line.split(",") for line in listed.read_text().splitlines()]
    rows[1][1] = rows[4][1]
    splits = ["split", "train", "", "", "test", "", ""]
    rows = [[*row, split] for row, split in zip(rows, splits, strict=True)]
    listed.write_text("\n".join(",".join(row) for row in rows) + "\n")
    status, _, err = call(tmp_path, "data", "check")
    reports = tmp_path / "home" / "reports"
    report = json.loads((reports / "data-report.json").read_text())
    found = {finding["code"]: finding for finding in report["findings"]}
    assert status == 4
    assert set(found) == {
        "data.truncated",
        "data.two-splits",
        "data.same-image",
        "data.tiny-cohort",
    }
    page = (reports / "data-check.html").read_text()
    for finding in found.values():
        assert escape(finding["why"]) in page and escape(finding["hint"]) in page
        assert finding["code"] in err and finding["why"] in err and finding["hint"] in err
    assert str(cut) in page
    assert page.count("data:image/png;base64,") >= 5
    assert "Patient-" not in page and "Patient-" not in err


class _Outside(HTMLParser):
    """Collects whatever a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "iframe", "object"}:
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in {"src", "href"} and value and ":" in value[:9]):
                inside = tag == "img" and (value or "").startswith("data:image/png;base64,")
                self.found += [] if inside else [f"{tag} {name}={value}"]


def test_the_page_needs_nothing_else_and_escapes_what_files_are_called() -> None:
    finding = Finding(
        "<b>a</b>", "data.missing", "Gone.", "/x/<script>alert(1)</script>", "Restore."
    )
    subject = Subject("north <i>field</i>", "", 1, 1, {})
    page = render_page(subject, [finding], fixed=["Closed <x>."])
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    assert "<script" not in page and "<b>a" not in page and "<i>f" not in page
    assert "default-src 'none'" in page and "url(" not in page


def test_a_page_of_five_thousand_findings_stays_small() -> None:
    findings = [
        Finding(
            f"scan{n}", "data.missing", "The file does not exist.", f"/data/{n}.nii", "Restore."
        )
        for n in range(5000)
    ]
    page = render_page(Subject("northfield", "", 5000, 5000, {}), findings)
    assert len(page) < 100_000 and "and 4900 more" in page


def test_the_page_goes_where_html_says(tmp_path: Path) -> None:
    imported(tmp_path)
    target = tmp_path / "out.html"
    status, out, _ = call(tmp_path, "data", "check", "--html", str(target))
    assert status == WARNINGS_ONLY and str(target) in out and target.is_file()
    status, _, err = call(tmp_path, "data", "check", "--html", str(tmp_path / "out.txt"))
    assert status == 2 and ".html" in err


def test_json_is_one_envelope_with_the_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(tmp_path)
    monkeypatch.setattr(MODE, "json", True)
    status, out, _ = call(tmp_path, "data", "check")
    answer = json.loads(out)
    assert status == WARNINGS_ONLY and answer["status"] == "ok"
    (warning,) = answer["data"]["warnings"]
    assert warning["code"] == "data.tiny-cohort" and Path(answer["data"]["page"]).is_file()


# --- identity ----------------------------------------------------------------------------------


def test_one_person_of_two_identifiers_is_found_in_tags_and_named_nowhere(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-900, 900, (8, 8, 5))
    rows = ["case_id,patient_id,image,label"]
    for number, person in enumerate(("Unmistakable^Anna", "Unmistakable^Anna", "Other^Bob")):
        changes = {"PatientName": person, "PatientBirthDate": "19610314"}
        folder = tmp_path / "data" / f"series{number}"
        write_slices(folder, values + number, patient=f"ID-{number}", changes=changes)
        rows.append(f"scan{number},ID-{number},series{number},{'young' if number else 'old'}")
    (tmp_path / "data" / "cases.csv").write_text("\n".join(rows) + "\n")
    status, _, err = call(
        tmp_path, "data", "import", str(tmp_path / "data" / "cases.csv"), "--site", "northfield"
    )
    assert status == 0, err
    status, _, err = call(tmp_path, "data", "check")
    assert status == 4
    assert "data.two-identifiers" in err and "deid.tags" in err
    told = "".join(
        path.read_text(errors="replace")
        for path in (tmp_path / "home").rglob("*")
        if path.is_file() and path.suffix in {".html", ".json"}
    )
    assert "scan0, scan1" in told
    assert not re.search("Unmistakable|19610314|ID-[012]", told + err, re.IGNORECASE)


# --- memory ------------------------------------------------------------------------------------


def test_a_second_check_reads_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilium_client.data.deid import check as searching

    folder = imported(tmp_path, 4)
    read: list[str] = []
    real = searching.identity_findings

    def watched(files: list[Path], *rest: object, **named: object) -> object:
        read.extend(path.name for path in files)
        return real(files, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "identity_findings", watched)
    call(tmp_path, "data", "check")
    assert len(read) == 8
    read.clear()
    call(tmp_path, "data", "check")
    assert read == []
    os.utime(folder / "images" / "scan2.nii.gz", (1, 1))
    _, out, _ = call(tmp_path, "data", "check")
    assert sorted(set(read)) == ["scan2.nii.gz"] and "1 read again" in out


def test_an_interrupted_scan_goes_on_from_its_last_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilium_client.data.deid import check as searching
    from consilium_client.data.doctor import identity

    imported(tmp_path, 4)
    monkeypatch.setattr(identity, "_BATCH", 2)
    calls: list[list[str]] = []

    def interrupted(files: list[Path], *_: object, **__: object) -> tuple[Finding, ...]:
        calls.append([path.name for path in files])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ()

    monkeypatch.setattr(searching, "identity_findings", interrupted)
    assert call(tmp_path, "data", "check")[0] == 130
    assert call(tmp_path, "data", "check")[0] == WARNINGS_ONLY
    assert [names[0] for names in calls] == [f"scan{n}.nii.gz" for n in (0, 1, 2, 2, 3)]


def test_a_file_of_two_cases_is_reported_once_and_not_lost_with_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    values = np.random.default_rng(0).normal(0, 9, (6, 6, 6, 2))
    write_nifti(folder / "born-1961-03-14.nii.gz", values)
    rows = [(f"scan{n}", "P", f"born-1961-03-14.nii.gz#{n}", "x") for n in range(2)]
    write_list(folder, rows)
    status, _, err = call(tmp_path, "data", "import", str(folder / "cases.csv"), "--site", "n")
    assert status == 0, err
    listed = tmp_path / "home" / "data" / "cases.csv"
    for expected in ("scan0", "scan1"):
        assert call(tmp_path, "data", "check")[0] == WARNINGS_ONLY
        report = json.loads((tmp_path / "home" / "reports" / "data-report.json").read_text())
        named = [f["case"] for f in report["findings"] if f["code"] == "deid.filename"]
        assert named == [expected]
        lines = listed.read_text().splitlines(keepends=True)
        listed.write_text("".join([lines[0], *lines[2:]]))


def test_memory_returns_what_it_was_told_and_forgets_what_nobody_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    finding = Finding("scan1", "deid.tags", "Tags.", "/data/a", "Clean.", (b"\x89PNG",))
    memory = Memory(path)
    memory.keep("a", Remembered((finding,), ("person",)))
    memory.keep("b", Remembered())
    memory.save()
    again = Memory(path)
    found = again.recall("a")
    assert found == Remembered((finding,), ("person",))
    assert found is not None and found.findings[0].pictures == (b"\x89PNG",)
    again.save()
    assert Memory(path).recall("b") is None
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("{damaged")
    assert Memory(path).recall("a") is None


def test_files_are_known_by_place_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    key = files_key("scan", [path])
    assert files_key("scan", [path]) == key != files_key("other", [path])
    os.utime(path, (5, 5))
    assert files_key("scan", [path]) != key
    path.unlink()
    with pytest.raises(ConsiliumError, match=r"data\.missing"):
        files_key("scan", [path])


# --- mending -----------------------------------------------------------------------------------


def test_fix_mends_rights_leftovers_and_the_cache_and_never_an_image(tmp_path: Path) -> None:
    folder = imported(tmp_path, 3)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    home = SiteHome.existing(tmp_path / "home")
    listed = (home.data / "cases.csv").read_bytes()
    ingested = home.path / "data" / "cache" / "ingested"
    first = min(ingested.iterdir())
    array = first / "image_ct.npy"
    array.write_bytes(array.read_bytes()[:-100])
    home.path.chmod(0o750)
    (home.identity / "old.key").write_text("old")
    (home.identity / "old.key").chmod(0o644)
    status, _, err = call(tmp_path, "doctor")
    assert status == WARNINGS_ONLY
    for code in ("state.open-to-others", "state.cache-damaged"):
        assert code in err
    (ingested / ".part-left").mkdir()
    status, out, err = call(tmp_path, "doctor", "--fix")
    assert out.count("Closed") == 2 and "interrupted import" in out and "damaged" in out
    assert "state." not in err and "✓ rights" in out
    assert np.load(array).shape == (12, 10, 8)
    assert not (ingested / ".part-left").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (home.data / "cases.csv").read_bytes() == listed
    assert call(tmp_path, "doctor", "--fix")[1].count("Closed") == 0


def test_the_doctor_looks_at_a_site_without_data_too(tmp_path: Path) -> None:
    SiteHome.create(tmp_path / "home")
    status, out, _ = call(tmp_path, "doctor")
    assert status in (0, WARNINGS_ONLY) and "data: none imported yet" in out  # 10: without a GPU
    assert "has not joined" in out


def test_a_key_open_to_others_is_closed_by_fix_and_an_error_without(tmp_path: Path) -> None:
    imported(tmp_path)
    key = tmp_path / "home" / "identity" / "patient_key"
    key.chmod(0o644)
    status, out, err = call(tmp_path, "doctor")
    assert status == 8 and "✗ data" in out and "state.open-to-others" in err and str(key) in err
    status, out, _ = call(tmp_path, "doctor", "--fix")
    assert status == WARNINGS_ONLY and key.stat().st_mode & 0o777 == 0o600


def test_the_doctor_ends_with_the_data_s_error(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    (folder / "images" / "scan1.nii.gz").unlink()
    status, out, err = call(tmp_path, "doctor")
    assert status == 4 and "✓ rights" in out and "✗ data" in out and "data.missing" in err


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(0, 1, (40, 30, 20)),
        np.random.default_rng(0).integers(0, 4096, (700, 900)).astype(np.uint16),
        np.full((5, 6), np.nan),
        np.zeros((3, 4, 1)),
        np.array([[np.inf, 1.0], [2.0, -np.inf]]),
    ],
)
def test_a_thumbnail_is_a_small_grey_png_of_anything(values: np.ndarray) -> None:
    picture = Image.open(BytesIO(picture_png(values, 128)))
    assert picture.mode == "L" and max(picture.size) <= 128 and picture.format == "PNG"


def test_a_volume_is_shown_as_a_radiologist_looks_at_it() -> None:
    values = np.zeros((20, 10, 3))  # x grows to the right of the patient, y to the front
    values[18:, 8:, 1] = 1  # right and front
    picture = np.asarray(Image.open(BytesIO(picture_png(values))))
    assert picture[0, 0] == 255 and picture[-1, -1] == 0


def test_pictures_of_findings_are_inside_the_page() -> None:
    png = picture_png(np.eye(8))
    page = render_page(
        Subject("northfield", "", 1, 1, {}),
        [Finding("scan1", "deid.burned-in", "Look at these.", "", "", (png,))],
    )
    assert base64.b64encode(png).decode() in page


def test_no_study_trains_on_one_image_under_two_patients(tmp_path: Path) -> None:
    from consilium_client.data.cohort import open_cohort

    copied(imported(tmp_path), "scan0", "scan2")
    with pytest.raises(ConsiliumError, match=r"data\.same-image"):
        open_cohort(SiteHome.existing(tmp_path / "home"), study())


def test_a_study_s_wishes_are_part_of_the_check(tmp_path: Path) -> None:
    imported(tmp_path)
    written = study().model_dump(mode="json", by_alias=True)
    written["task"]["classes"] = ["background", "spleen"]
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(written))
    status, _, err = call(tmp_path, "data", "check", "--study", str(path))
    assert status == 4 and "data.class-missing" in err and "spleen" in err
    written["task"]["classes"] = ["background", "liver"]
    path.write_text(json.dumps(written))
    assert call(tmp_path, "data", "check", "--study", str(path))[0] == WARNINGS_ONLY
