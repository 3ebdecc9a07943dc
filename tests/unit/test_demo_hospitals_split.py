"""A folder of one's own over the demo's sites: whole patients, unequal parts, always the same."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.demo.split import _partition, shares, split_dataset
from consilium_common.errors import ConsiliumError

REAL = Path(__file__).parents[2].parent / "shared" / "data"
HEADER = ["case_id", "patient_id", "image", "label"]


def csv_folder(folder: Path, rows: list[list[str]], name: str = "cases.csv") -> Path:
    """Write a case list and an empty file for everything that looks like a path."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        for value in row[2:4]:
            if "." in Path(value).name:
                path = folder / value.partition("#")[0]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(value)
    with (folder / name).open("w", newline="") as stream:
        csv.writer(stream).writerows([HEADER, *rows])
    return folder


def many(patients: int) -> list[list[str]]:
    return [
        [f"c{n}{visit}", f"p{n}", f"images/c{n}{visit}.nii.gz", f"masks/c{n}{visit}.nii.gz"]
        for n in range(patients)
        for visit in range(1 + n % 3)
    ]


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "cases.csv").open()))


def refusal(folder: Path, out: Path, sites: int = 3) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as refused:
        split_dataset(folder, out, sites)
    assert not out.exists(), "nothing is written where something is wrong"
    return refused.value


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=60, unique=True), st.data())
def test_every_item_is_in_exactly_one_part_and_no_part_is_empty(
    names: list[str], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, min(len(names), 26)))
    found = _partition(names, names, parts, Path())
    assert sorted(name for part in found for name in part) == sorted(names)
    assert all(found)
    assert len(found) == parts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=3, max_size=40, unique=True), st.randoms())
def test_the_split_does_not_depend_on_the_order_of_the_list(
    names: list[str], random: object
) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = _partition(names, names, 3, Path())
    other = _partition(shuffled, shuffled, 3, Path())
    assert [set(part) for part in one] == [set(part) for part in other]


@pytest.mark.parametrize("sites", [1, 2, 3, 7])
def test_shares_are_unequal_and_whole(sites: int) -> None:
    assert sum(shares(sites)) == pytest.approx(1)
    assert sorted(set(shares(sites)), reverse=True) == list(shares(sites))


def test_a_csv_is_split_by_patient_with_its_files(tmp_path: Path) -> None:
    source = csv_folder(tmp_path / "mine", many(20))
    before = sorted(source.rglob("*"))
    hospitals = split_dataset(source, tmp_path / "out")
    assert [(h.name, h.format, h.patients) for h in hospitals] == [
        ("northfield", "csv", 10),
        ("riverside", "csv", 6),
        ("st-anna", "csv", 4),
    ]
    seen: Counter[str] = Counter()
    cases = []
    for hospital in hospitals:
        rows = rows_of(hospital.folder)
        seen.update({row["patient_id"] for row in rows})
        cases += [row["case_id"] for row in rows]
        for row in rows:
            assert (hospital.folder / row["image"]).read_text() == row["image"]
            assert (hospital.folder / row["label"]).read_text() == row["label"]
    assert len(seen) == 20
    assert set(seen.values()) == {1}, "a patient at two sites"
    assert sorted(cases) == sorted(row[0] for row in many(20))
    assert sorted(source.rglob("*")) == before

    again = split_dataset(source, tmp_path / "again")
    assert [rows_of(h.folder) for h in again] == [rows_of(h.folder) for h in hospitals]


def test_labels_that_are_classes_and_fragments_stay(tmp_path: Path) -> None:
    rows = [
        ["a", "p1", "a.png", "benign"],
        ["b", "p2", "b.png", "3"],
        ["c", "p3", "c.nii.gz#1", "rt.dcm#liver"],
    ]
    folder = csv_folder(tmp_path / "mine", rows, name="list.csv")
    hospitals = split_dataset(folder / "list.csv", tmp_path / "out")
    found = {row["case_id"]: row for h in hospitals for row in rows_of(h.folder)}
    assert {row["label"] for row in found.values()} == {"benign", "3", "rt.dcm#liver"}
    assert found["c"]["image"] == "c.nii.gz#1"
    assert len(list((tmp_path / "out").rglob("c.nii.gz"))) == 1
    assert len(list((tmp_path / "out").rglob("rt.dcm"))) == 1


def test_a_series_folder_and_images_elsewhere_come_along(tmp_path: Path) -> None:
    for place in ("mine/series", "other/x", "other/y"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.dcm").write_text(place)
    rows = [
        ["a", "p1", "series", "benign"],
        ["b", "p2", "../other/x", "benign"],
        ["c", "p3", str(tmp_path / "other" / "y"), "benign"],
    ]
    hospitals = split_dataset(csv_folder(tmp_path / "mine", rows), tmp_path / "out")
    found = {}
    for hospital in hospitals:
        for row in rows_of(hospital.folder):
            image = (hospital.folder / row["image"]).resolve()
            assert image.is_relative_to(hospital.folder.resolve())
            found[row["case_id"]] = (image / "1.dcm").read_text()
    assert found == {"a": "mine/series", "b": "other/x", "c": "other/y"}


def test_other_numbers_of_sites_are_possible(tmp_path: Path) -> None:
    source = csv_folder(tmp_path / "mine", many(10))
    hospitals = split_dataset(source, tmp_path / "out", 4)
    assert [h.name for h in hospitals] == ["site-1", "site-2", "site-3", "site-4"]
    assert [h.patients for h in hospitals] == [4, 3, 2, 1]


@pytest.mark.parametrize("sites", [0, 27])
def test_an_impossible_number_of_sites_is_refused(sites: int, tmp_path: Path) -> None:
    assert refusal(tmp_path, tmp_path / "out", sites).code == "usage.demo"


def test_a_folder_without_a_layout_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none", tmp_path / "out").code == "data.layout"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    assert refusal(tmp_path / "mine", tmp_path / "out").code == "data.layout"
    for name in ("a.csv", "b.csv"):
        csv_folder(tmp_path / "mine", many(3), name=name)
    assert refusal(tmp_path / "mine", tmp_path / "out").code == "data.layout"


def test_a_missing_image_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "mine", many(9))
    (folder / many(9)[-1][2]).unlink()
    error = refusal(folder, tmp_path / "out")
    assert error.code == "data.missing-file"
    assert "p8" not in str(error), "no patient in an error"


def test_too_few_patients_are_refused(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "mine", many(2))
    assert refusal(folder, tmp_path / "out").code == "data.too-few-patients"


@pytest.mark.parametrize(
    "text",
    [
        "case_id,image,label\na,a.png,1\n",
        "case_id,patient_id,image,label\na, ,a.png,1\n",
        "case_id,patient_id,image,label\na,p\n",
        "case_id,patient_id,image,label\na,p,a.png,1,2,3\n",
        'case_id,patient_id,image,label\n"a"x,p,a.png,1\n',
        "",
    ],
)
def test_a_malformed_list_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cases.csv").write_text(text)
    assert refusal(tmp_path / "mine", tmp_path / "out").code == "data.malformed"


@pytest.mark.parametrize("text", ["", "[]", '{"training": [{"image": "a"}]}', '{"a": 1}'])
def test_a_malformed_dataset_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text(text)
    assert refusal(tmp_path / "mine", tmp_path / "out").code == "data.malformed"


def test_a_site_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "st-anna").mkdir(parents=True)
    with pytest.raises(ConsiliumError) as refused:
        split_dataset(csv_folder(tmp_path / "mine", many(9)), tmp_path / "out")
    assert refused.value.code == "state.not-empty"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["st-anna"]


@pytest.mark.data
def test_hippocampus_is_split_in_unequal_parts(tmp_path: Path) -> None:
    hospitals = split_dataset(REAL / "hippocampus", tmp_path)
    assert [(h.format, h.patients) for h in hospitals] == [("msd", 65), ("msd", 39), ("msd", 26)]
    images = []
    for hospital in hospitals:
        description = json.loads((hospital.folder / "dataset.json").read_text())
        assert description["numTraining"] == hospital.patients == len(description["training"])
        assert description["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
        for case in description["training"]:
            assert (hospital.folder / case["image"]).stat().st_size > 0
            assert (hospital.folder / case["label"]).stat().st_size > 0
            images.append(case["image"])
    assert len(set(images)) == 130


@pytest.mark.data
def test_mednist_gives_every_class_to_every_site(tmp_path: Path) -> None:
    hospitals = split_dataset(REAL / "mednist", tmp_path)
    assert [(h.format, h.patients) for h in hospitals] == [
        ("folders", 750),
        ("folders", 450),
        ("folders", 300),
    ]
    classes = {path.name for path in (REAL / "mednist").iterdir() if path.is_dir()}
    for hospital in hospitals:
        found = Counter(path.parent.name for path in hospital.folder.rglob("*.jpeg"))
        assert set(found) == classes
        assert len(set(found.values())) == 1
