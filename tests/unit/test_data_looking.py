"""Looking at the site's own data: pictures and statistics that say what is there, and no name."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (
    home_in,
    real,
    study,
    write_list,
    write_nifti,
    write_pairs,
    write_seg,
    write_slices,
)
from PIL import Image
from typer.testing import CliRunner

from consilium_client.data.cli import data_app
from consilium_client.data.cohort import open_cohort
from consilium_client.data.importing import ImportOptions, import_folder
from consilium_client.data.ingest.facts import channel_facts
from consilium_client.data.looking.montage import Channel, chosen_slices, montage
from consilium_client.data.looking.show import show_case
from consilium_client.data.looking.stats import cohort_statistics
from consilium_client.data.looking.stats_page import write_plots
from consilium_client.home import SiteHome
from consilium_common.console import MODE
from consilium_common.errors import ConsiliumError

NAMED = ImportOptions(inputs=("ct",), labels={"background": 0, "liver": 1})
BLUE = (0x56, 0xB4, 0xE9)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture - np.array(colour)).sum(axis=-1) < 60


# --- the picture -------------------------------------------------------------------------------


def test_the_patients_right_is_on_the_left_and_the_front_above() -> None:
    values = np.zeros((40, 40, 1), np.float32)
    values[30:38, 30:38] = 100  # right and front in RAS
    values[2:6, 2:6] = 50
    plain = montage([Channel("ct", values, channel_facts(values))], None, {}, np.eye(4), title="a")
    white = np.argwhere(pixels(plain).min(axis=-1) > 250)
    height, width = pixels(plain).shape[:2]
    square = white[(white[:, 0] > 0.12 * height) & (white[:, 0] < 0.85 * height)]
    assert square[:, 1].mean() < 0.4 * width and square[:, 0].mean() < 0.45 * height


def test_label_contours_follow_the_label_and_its_name_is_in_the_legend() -> None:
    values = np.zeros((40, 40, 3), np.float32)
    label = np.zeros((40, 40, 3), np.uint8)
    label[10:20, 10:20, 1] = 1
    channel = Channel("ct", values, channel_facts(values))
    without = near(pixels(montage([channel], None, {}, np.eye(4), title="a")), BLUE).sum()
    one = near(pixels(montage([channel], label, {1: "liver"}, np.eye(4), title="a")), BLUE).sum()
    label[5:35, 5:35, 1] = 1
    larger = near(pixels(montage([channel], label, {1: "liver"}, np.eye(4), title="a")), BLUE).sum()
    assert without == 0 and one > 50 and larger > 1.5 * one


def test_slices_are_spread_evenly_and_those_with_most_label_are_among_them() -> None:
    label = np.zeros((4, 4, 100), np.uint8)
    label[:, :, 3] = 1
    label[0, 0, 1:9] = 1
    chosen = chosen_slices(label, 100)
    assert 3 in chosen and chosen == sorted(set(chosen))
    assert max(np.diff(chosen)) <= 13 and chosen[-1] > 85
    assert chosen_slices(None, 5) == [0, 1, 2, 3, 4]


def test_ct_is_shown_in_soft_tissue_and_other_values_by_their_percentiles() -> None:
    ct = np.random.default_rng(0).normal(40, 300, (20, 20, 4)) - 500
    assert Channel("ct", ct, channel_facts(ct), "CT").window == (-160.0, 240.0)
    mr = Channel("t1", ct, channel_facts(ct), "MR")
    assert mr.window == pytest.approx(tuple(np.percentile(ct, [1, 99])))


def test_a_case_of_two_dicom_series_and_a_segmentation_is_drawn_without_a_name(
    tmp_path: Path,
) -> None:
    values = np.random.default_rng(0).normal(0, 50, (24, 20, 6))
    label = np.zeros((24, 20, 6), np.uint8)
    label[5:12, 5:12, 2:5] = 1
    data = tmp_path / "data"
    slices = write_slices(data / "one", values, changes={"Manufacturer": "ACME"})
    write_slices(data / "two", values + 5, changes={"Modality": "MR", "Manufacturer": "ACME"})
    write_seg(data / "seg.dcm", slices, label, "liver")
    write_list(
        data, [("a/b", "P", "one", "two", "seg.dcm")], "case_id,patient_id,image,image_mr,label"
    )
    home = home_in(tmp_path)
    outcome = import_folder(
        home, data, ImportOptions(inputs=("ct", "mr"), labels={"background": 0, "liver": 1})
    )
    entry = outcome.entries["a/b"]
    assert (entry.modality, entry.scanner) == ("CT + MR", "ACME")
    assert np.allclose(entry.image("mr"), entry.image("ct") + 5, atol=1.01)
    path = show_case(home, "a/b")
    assert path == home.reports / "show-a_b.png"
    assert path.stat().st_mode & 0o077 == 0
    picture = Image.open(path)
    assert near(pixels(path.read_bytes()), BLUE).any()
    assert not picture.info or "Unmistakable" not in str(picture.info)
    assert b"Unmistakable" not in path.read_bytes()


def test_a_picture_with_a_class_is_drawn_and_a_missing_case_is_one_clear_error(
    tmp_path: Path,
) -> None:
    for name in ("ill", "well"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 6), 7).save(tmp_path / "data" / name / "x.png")
    home = home_in(tmp_path)
    import_folder(home, tmp_path / "data", ImportOptions())
    assert show_case(home, "ill/x.png", tmp_path / "out.png") == tmp_path / "out.png"
    with pytest.raises(ConsiliumError) as caught:
        show_case(home, "ill/y.png")
    assert caught.value.code == "usage.case" and "ill/x.png" in caught.value.hint


@pytest.mark.data
def test_real_images_are_drawn(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    source = real("hippocampus")
    name = sorted(path.name for path in (source / "imagesTr").glob("h*.nii.gz"))[0]
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir()
        (folder / kind / name).write_bytes((source / kind / name).read_bytes())
    write_list(folder, [("a", "p", f"imagesTr/{name}", f"labelsTr/{name}")])
    import_folder(
        home, folder, ImportOptions(labels={"background": 0, "anterior": 1, "posterior": 2})
    )
    picture = pixels(show_case(home, "a").read_bytes())
    assert near(picture, BLUE).sum() > 500  # anterior
    assert near(picture, (0xE6, 0x9F, 0x00)).sum() > 500  # posterior


# --- statistics --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteHome:
    """Five scans of two patients, an age and a sex beside each; one scan cannot be read."""
    folder = tmp_path_factory.mktemp("stats")
    data = write_pairs(folder / "data", 5, patients=2)
    rows = [
        (f"scan{i}", f"P{i % 2}", f"images/scan{i}.nii.gz", f"labels/scan{i}.nii.gz", age, sex)
        for i, (age, sex) in enumerate(
            [("40", "f"), ("50", "m"), ("", "f"), ("60", ""), ("1", "f")]
        )
    ]
    write_list(data, rows, "case_id,patient_id,image,label,covariate_age,covariate_sex")
    write_nifti(data / "images" / "scan0.nii.gz", np.full((12, 10, 8), 7), np.diag([2.0, 1, 2, 1]))
    write_nifti(data / "labels" / "scan0.nii.gz", np.zeros((12, 10, 8)), np.diag([2.0, 1, 2, 1]))
    home = home_in(folder)
    import_folder(home, data, NAMED)
    (data / "images" / "scan4.nii.gz").write_bytes(b"")
    return home


def test_statistics_say_what_is_there(site: SiteHome) -> None:
    found = cohort_statistics(site)
    assert (found.cases, found.patients, found.unusable) == (4, 2, 1)
    assert sum(patients for patients, _ in found.splits.values()) == 2
    assert sum(cases for _, cases in found.splits.values()) == 4
    assert [(one.low, one.high) for one in found.shapes] == [(12, 12), (10, 10), (8, 8)]
    assert (found.spacings[0].low, found.spacings[0].high) == (1.5, 2.0)
    liver = found.classes["liver"]
    assert "background" not in found.classes
    assert (liver.cases, liver.patients, liver.voxels) == (3, 2, 3 * 48)
    assert liver.millilitres is not None
    assert liver.millilitres.median == pytest.approx(48 * 1.5 * 1 * 2 / 1000)
    assert found.channels["ct"]["mean"].low == 7 and found.channels["ct"]["std"].low == 0
    assert found.axes == {"RAS": 4} and found.scanners == {"unknown": 4}
    age, sex = found.covariates["age"], found.covariates["sex"]
    assert (age["numbers"].low, age["numbers"].high, age["missing"]) == (40, 60, 1)
    assert (sex["words"], sex["missing"]) == ({"f": 2, "m": 1}, 1)


def test_statistics_come_as_table_json_and_plots(
    site: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner()
    shown = run.invoke(data_app, ["stats", "--home", str(site.path)])
    assert shown.exit_code == 0, shown.output
    assert "4 cases of 2 patients; 1 more cannot be used" in shown.stdout
    assert "class liver" in shown.stdout and "covariate age" in shown.stdout
    assert "they stay at this site" in shown.stderr
    assert (site.reports / "data-stats.png").stat().st_mode & 0o077 == 0
    monkeypatch.setattr(MODE, "json", True)
    out = str(tmp_path / "new")
    shown = run.invoke(data_app, ["stats", "--home", str(site.path), "--out", out])
    data = json.loads(shown.stdout)["data"]
    assert data["classes"]["liver"]["cases"] == 3 and "drawn" not in data
    assert Path(data["plots"]).parent == tmp_path / "new"
    picture = pixels(Path(data["plots"]).read_bytes())
    assert picture.shape[1] == 1200 and picture.std() > 10


def test_class_labels_count_by_patient_and_plots_need_no_volumes(tmp_path: Path) -> None:
    for name in ("ill", "well"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 6), number).save(tmp_path / "data" / name / f"{number}.png")
    home = home_in(tmp_path)
    import_folder(home, tmp_path / "data", ImportOptions())
    found = cohort_statistics(home)
    assert {name: one.cases for name, one in found.classes.items()} == {"ill": 2, "well": 2}
    assert found.spacings == [] and found.classes["ill"].millilitres is None
    assert write_plots(found, tmp_path / "page.png").exists()


def test_sizes_of_the_cache_are_shown_before_and_when_it_is_purged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_in(tmp_path)
    import_folder(home, write_pairs(tmp_path / "data", 2), NAMED)
    open_cohort(home, study())
    run = CliRunner()
    shown = run.invoke(data_app, ["list", "--home", str(home.path)])
    assert "In the cache: " in shown.stdout and "prepared for studies" in shown.stdout
    monkeypatch.setattr(MODE, "json", True)
    shown = run.invoke(data_app, ["purge", "--home", str(home.path)])
    freed = json.loads(shown.stdout)["data"]
    assert freed["imported"] > 2 * 12 * 10 * 8 * 3 and freed["prepared"] > 2 * 12 * 10 * 8 * 5
    assert freed["bytes"] >= freed["imported"] + freed["prepared"]
    assert not any((home.data / "cache").rglob("*.npy"))
