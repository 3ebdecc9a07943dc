"""site.yaml and cases.csv: read, written, and every error by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_fixtures import home_in
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.data.case_list import parse_cases, render_cases
from consilium_client.data.manifest import Manifest, load_manifest, save_manifest
from consilium_client.data.match import class_names
from consilium_client.data.ranges import Range, parse_number, parse_range
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
@given(
    labels=st.dictionaries(words, words.filter(lambda word: ".." not in word), max_size=5),
    root=words,
)
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


numbers = st.floats(allow_nan=False, allow_infinity=False)
letters = words.filter(lambda word: parse_number(word) is None and word.casefold() not in MISSING)
MISSING = ("n/a", "na", "nan")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(words, words, words, words, st.none() | numbers, st.none() | letters),
        min_size=1,
        max_size=5,
    )
)
def test_cases_csv_reads_back_as_it_was_written(
    rows: list[tuple[str, str, str, str, float | None, str | None]],
) -> None:
    cases = tuple(
        Case(
            case_id=f"{number}{name}",
            patient_id=patient,
            images={"t1": image, "t2": f"{image}#1"},
            label=label,
            covariates={"age": age, "arm": arm},
        )
        for number, (name, patient, image, label, age, arm) in enumerate(rows)
    )
    text = render_cases(cases, ["t1", "t2"], ["age", "arm"])
    covariates = ["age", "arm"]
    assert parse_cases(text, ["t1", "t2"], where="cases.csv", covariates=covariates) == cases


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
        (HEADER + f"a,SECRET,x,{'y' * 300},\n", "data.cases", "longer than a path"),
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


# --- covariates and ranges ---------------------------------------------------------------------


def test_a_covariate_is_a_number_where_every_value_is_one_and_a_word_otherwise() -> None:
    text = "case_id,patient_id,image,covariate_age,covariate_grade,label\n"
    text += "a,p,x,61,2,y\nb,q,x,n/a,3A,y\nc,r,x,1e2,,y\n"
    cases = parse_cases(text, ["image"], where="cases.csv", covariates=["age", "grade"])
    assert [case.covariates for case in cases] == [
        {"age": 61.0, "grade": "2"},
        {"age": None, "grade": "3A"},
        {"age": 100.0, "grade": None},
    ]
    assert "61" not in repr(cases[0])


def test_covariates_in_the_list_and_in_site_yaml_must_agree(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    (home.data / "site.yaml").write_text(SITE)
    (home.data / "cases.csv").write_text("case_id,patient_id,image,covariate_age\na,p,x,61\n")
    with pytest.raises(ConsiliumError) as caught:
        load_manifest(home)
    assert "covariate_age" in caught.value.message and "`covariates`" in caught.value.hint
    (home.data / "site.yaml").write_text(SITE + "covariates: [age, sodium]\n")
    with pytest.raises(ConsiliumError) as caught:
        load_manifest(home)
    assert "covariate_sodium is missing" in caught.value.message
    (home.data / "site.yaml").write_text(SITE + "covariates: [age]\n")
    manifest = load_manifest(home)
    assert manifest.cases[0].covariates == {"age": 61.0}
    save_manifest(home, manifest)
    assert load_manifest(home) == manifest


def classes(**labels: str | int) -> SiteManifest:
    content = {"schema": "consilium/site/v1", "site": "s", "root": "/", "label_kind": "class"}
    return SiteManifest.model_validate({**content, "labels": labels})


AGES = classes(young="<40", middle="40..65", old=">=65", unknown="?")


@settings(max_examples=100, deadline=None)
@given(age=st.floats(-1e6, 1e6) | st.sampled_from([39.999, 40, 64.999, 65]))
def test_every_number_falls_into_its_range_with_the_lower_bound_and_without_the_upper(
    age: float,
) -> None:
    expected = "young" if age < 40 else "middle" if age < 65 else "old"
    assert class_names(repr(age), AGES) == (expected,)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("?", ("unknown",)),
        ("old", ("old",)),
        (">=65", ("old",)),
        ("12|70; ?", ("young", "old", "unknown")),
        ("12|13", ("young",)),
        ("-", ()),
        ("", ()),
    ],
)
def test_a_label_cell_holds_names_values_and_numbers(label: str, expected: tuple[str, ...]) -> None:
    assert class_names(label, AGES) == expected


@pytest.mark.parametrize("label", ["forty", "4o", "nan", "inf", "12|forty"])
def test_what_site_yaml_does_not_list_is_refused_and_not_quoted(label: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        class_names(label, AGES)
    assert caught.value.code == "data.label-unknown"
    assert label not in caught.value.message
    with pytest.raises(ConsiliumError):
        class_names("66", classes(young="<40", old="65..66"))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"young": "<40", "old": ">=39"}, "a number may be young and old"),
        ({"young": "<=40", "old": "40..50"}, "part their ranges"),
        ({"young": "65..40"}, "65..40 holds no number"),
    ],
)
def test_ranges_that_overlap_or_hold_nothing_are_refused(labels: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classes(**labels)
    classes(young="<40", old="40..50", older=">=50")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-3 .. 4.5", Range(-3, 4.5, True, False)),
        ("40-65", None),
        ("", None),
        ("< x", None),
    ],
)
def test_a_range_is_read_or_is_none(text: str, expected: Range | None) -> None:
    assert parse_range(text) == expected
