"""site.yaml and cases.csv: read, written, and every error by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_fixtures import home_in
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.data.case_list import parse_cases, render_cases
from consilium_client.data.manifest import Manifest, load_manifest, save_manifest
from consilium_client.data.schema import Case, SiteManifest
from consilium_client.data.site_file import parse_site, render_site
from consilium_common.errors import ConsiliumError

SITE = """\
schema: consilium/site/v1
site: northfield
root: /images
label_kind: mask
labels:
  background: 0
  Liver: 1
"""
HEADER = "case_id,patient_id,image,label,split\n"

words = (
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")),
        min_size=1,
        max_size=20,
    )
    .map(str.strip)
    .filter(bool)
)


@settings(max_examples=60, deadline=None)
@given(labels=st.dictionaries(words, words, max_size=5), root=words)
def test_site_yaml_reads_back_as_it_was_written(labels: dict[str, str], root: str) -> None:
    content = {
        "schema": "consilium/site/v1",
        "site": "yes",
        "root": root,
        "label_kind": "class",
        "labels": {name: f"{number}{value}" for number, (name, value) in enumerate(labels.items())},
    }
    site = SiteManifest.model_validate(content)
    assert parse_site(render_site(site), where="site.yaml") == site


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(words, words, words, words), min_size=1, max_size=5))
def test_cases_csv_reads_back_as_it_was_written(rows: list[tuple[str, str, str, str]]) -> None:
    cases = tuple(
        Case(
            case_id=f"{number}{name}",
            patient_id=patient,
            images={"t1": image, "t2": f"{image}#1"},
            label=label,
        )
        for number, (name, patient, image, label) in enumerate(rows)
    )
    text = render_cases(cases, ["t1", "t2"])
    assert parse_cases(text, ["t1", "t2"], where="cases.csv") == cases


@pytest.mark.parametrize(
    ("change", "line", "words_said"),
    [
        (("site: northfield", "sitee: northfield"), 2, "did you mean site?"),
        (("Liver: 1", "Liver: one"), 5, "Liver needs a mask value"),
        (("Liver: 1", "Liver: 0"), 1, "one value to two names"),
        (("Liver: 1", "background: 1"), 7, "twice"),
        (("label_kind: mask", "label_kind: masks"), 4, "label_kind"),
        (("root: /images", "root: [unclosed"), 4, "not YAML"),
    ],
)
def test_a_fault_in_site_yaml_is_named_with_its_line(
    change: tuple[str, str], line: int, words_said: str
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_site(SITE.replace(*change), where="site.yaml")
    assert caught.value.code == "data.manifest"
    assert words_said in caught.value.message
    if "value to two" not in words_said and "mask value" not in words_said:
        assert f":{line} " in f"{caught.value.where} " or f"line {line}:" in caught.value.message


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (HEADER + "a,,x,y,\n", "data.no-patient", "line 2: patient_id is empty"),
        ("case_id,image,label\na,x,y\n", "data.no-patient", "patient_id is missing"),
        (HEADER + "a,SECRET,x,y,\na,SECRET,x,y,\n", "data.duplicate-case", "line 3"),
        (HEADER + "a,SECRET,,y,\n", "data.cases", "line 2: image is empty"),
        (HEADER + "a,SECRET,x,y,tset\n", "data.cases", "line 2: split must be"),
        (HEADER + "a,SECRET,x\n", "data.cases", "3 cells, the header 5"),
        ("case_id,patientid,image\n", "data.no-patient", "near patient_id"),
        ("", "data.cases", "empty"),
    ],
)
def test_a_fault_in_a_case_list_is_named_with_its_line_and_no_patient(
    text: str, code: str, said: str
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        parse_cases(text, ["image"], where="cases.csv")
    assert caught.value.code == code
    assert said in f"{caught.value.message} {caught.value.where}"
    assert "SECRET" not in str(caught.value.to_dict())


def test_several_faults_are_named_at_once() -> None:
    text = HEADER + "a,,x,y,\nb,p,,y,\nc,p,x,y,no\n"
    with pytest.raises(ConsiliumError) as caught:
        parse_cases(text, ["image"], where="cases.csv")
    assert [line.split(":")[0] for line in caught.value.message.splitlines()] == [
        "line 2",
        "line 3",
        "line 4",
    ]


def test_a_spreadsheets_semicolons_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    (home.data / "site.yaml").write_text(SITE)
    (home.data / "cases.csv").write_bytes(
        b"\xef\xbb\xbfcase_id;patient_id;image;label\r\na;p;x.nii;y.nii\r\n"
    )
    manifest = load_manifest(home)
    assert manifest.cases[0].images == {"image": "x.nii"}
    assert manifest.root == Path("/images")


def test_a_persons_comments_live_as_long_as_nothing_changes(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    (home.data / "site.yaml").write_text(SITE + "# checked by K.\n")
    (home.data / "cases.csv").write_text(HEADER + "a,p,x,y,\n")
    manifest = load_manifest(home)
    save_manifest(home, manifest)
    assert "checked by K." in (home.data / "site.yaml").read_text()
    changed = manifest.site.model_copy(update={"labels": {"background": 0, "liver": 1}})
    save_manifest(home, Manifest(changed, manifest.cases, manifest.root))
    assert load_manifest(home).site.labels == {"background": 0, "liver": 1}


def test_a_site_without_data_says_how_to_import(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError) as caught:
        load_manifest(home_in(tmp_path))
    assert caught.value.code == "data.no-manifest"
    assert "import" in caught.value.hint
