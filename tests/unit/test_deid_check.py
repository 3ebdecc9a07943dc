"""Who a site's files give away is found at any depth and named by tag, never by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from data_fixtures import real, write_slices
from deid_samples import NAME, NUMBER, SURNAME, WORDS, holds, planted_series, text_tags
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from consilium_client.data.deid.check import identity_findings
from consilium_client.data.deid.exposure import examine
from consilium_client.data.deid.profile import OPTIONS, action_for
from consilium_client.data.findings import Finding
from consilium_client.data.identifying import is_dummy, looks_like
from consilium_client.data.ingest.dicom_headers import files_below


def found(folder: Path) -> dict[str, Finding]:
    files = files_below(folder)
    findings = identity_findings(files, folder, names=dict.fromkeys(files, "case"))
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def quiet(**tags: Any) -> Dataset:
    """Return a dataset that the profile has nothing to say about, with ``tags`` added."""
    dataset = Dataset()
    dataset.Modality, dataset.Rows, dataset.KVP = "CT", 4, "120"
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def test_every_planted_text_is_named_and_no_value_is(tmp_path: Path) -> None:
    planted_series(tmp_path / "s", count=1)
    findings = found(tmp_path)
    assert {"deid.tags", "deid.private-tags"} <= set(findings)
    tags = findings["deid.tags"]
    assert "PatientName (0010,0010)" in tags.message and "PatientID (0010,0020)" in tags.message
    assert tags.severity == "warning" and "deidentify" in tags.hint
    assert not holds(json.dumps([finding.to_dict() for finding in findings.values()]).encode())


def test_nested_private_overlay_and_trailing_elements_are_reached(tmp_path: Path) -> None:
    (path,) = planted_series(tmp_path / "s", count=1)
    labels = " | ".join(examine(pydicom.dcmread(path)).direct)
    for place in (
        "AnatomicRegionSequence > ConceptNameCodeSequence > PatientName (0010,0010)",
        "AnatomicRegionSequence > ImageComments (0020,4000)",
        "(0029,1003) > PatientName (0010,0010)",
        "(0029,1002)",
        "(0029,0010)",
        "(6000,4000)",
        "DataSetTrailingPadding (FFFC,FFFC)",
    ):
        assert place in labels


@settings(max_examples=25, deadline=None)
@given(tag=st.sampled_from(sorted(text_tags())), depth=st.integers(0, 4), private=st.booleans())
def test_the_patients_name_is_found_in_any_text_at_any_depth(
    tag: tuple[int, str], depth: int, private: bool
) -> None:
    inner = Dataset()
    inner.add_new(tag[0], tag[1], f"Prof {SURNAME}" if tag[1] != "PN" else NAME)
    for level in range(depth):
        outer = Dataset()
        if private and level == 0:
            outer.private_block(0x0011, "X", create=True).add_new(0x05, "SQ", [inner])
        else:
            outer.AnatomicRegionSequence = [inner]
        inner = outer
    whole = quiet(PatientName=NAME)
    whole.update(inner)
    seen = examine(whole)
    number = f"({tag[0] >> 16:04X},{tag[0] & 0xFFFF:04X})"
    assert any(number in label for label in seen.direct)
    assert not any(word in " ".join(seen.direct) for word in WORDS)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
def test_a_declared_option_covers_its_tags_and_never_a_name(option: Any) -> None:
    code = Dataset()
    code.CodeValue = option.code
    kept = {"PatientAge": "041Y", "SeriesDescription": "T1 post", "StationName": "CT2"}
    kept |= {"InstitutionName": "Northfield"}
    known = {word: value for word, value in kept.items() if word in option.keywords}
    assert known
    open_ = examine(quiet(**known))
    assert len(open_.indirect) == len(known)
    declared = quiet(**known, PatientIdentityRemoved="YES")
    declared.DeidentificationMethodCodeSequence = [code]
    assert examine(declared).clean
    declared.PatientName = NAME
    assert examine(declared).direct == ("PatientName (0010,0010)",)


def test_dummies_and_pseudonyms_are_not_reported() -> None:
    assert examine(quiet(PatientName="ANONYMOUS", PatientBirthDate="19000101")).clean
    assert examine(
        quiet(PatientName="S-017", PatientID="S-017", PatientIdentityRemoved="YES")
    ).clean
    # A bare number is what a record number looks like, whatever the flag says.
    assert not examine(quiet(PatientID="73405519", PatientIdentityRemoved="YES")).clean
    assert not examine(quiet(PatientID="S-017")).clean


def test_known_physics_in_private_tags_is_safe() -> None:
    dataset = quiet()
    dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    assert examine(dataset).clean
    dataset.private_block(0x0019, "SIEMENS MR HEADER").add_new(0x99, "LO", "whatever")
    assert examine(dataset).private == ("(0019,1099)",)


def test_what_the_table_does_not_know_is_still_never_left() -> None:
    assert action_for(0x00100010, "PN") == "empty"
    assert action_for(0x60014000, "LT") == "remove" and action_for(0x50120010, "US") == "remove"
    assert action_for(0x7FE10102, "PN") == "empty" and action_for(0x00280010, "US") is None


@pytest.mark.data
def test_the_shared_mr_study_claims_to_be_clean_and_carries_a_name() -> None:
    findings = found(real("dicom-mr"))
    assert "PatientName (0010,0010)" in findings["deid.claim-untrue"].message
    assert findings["deid.claim-untrue"].message.startswith("44 files say")
    assert not holds(json.dumps([f.to_dict() for f in findings.values()]).encode(), "Dumbledore")


@pytest.mark.data
def test_a_clean_public_cohort_is_quiet() -> None:
    assert found(real("hippocampus")) == {}


def test_a_file_that_breaks_off_is_said_to_be_unsearched(tmp_path: Path) -> None:
    (path,) = write_slices(tmp_path / "s", np.zeros((8, 8, 1)))
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    assert "could not be searched" in found(tmp_path)["deid.tags"].message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{SURNAME.lower()}_ct.dcm", "the patient's name or number"),
        (f"scan-{NUMBER}.dcm", "the patient's name or number"),
        ("ct_1957-03-12.dcm", "a date"),
        ("ct-12.3.1957.dcm", "a date"),
        ("00734055.dcm", "a long number"),
        ("1.2.840.113619.2.5.1762583153.215519.dcm", "a UID"),
        ("Doe^Jane.dcm", "a person's name"),
        ("IM-0001-0001.dcm", ""),
        ("2.25.329800735698586629295641978511506172918.dcm", ""),
    ],
)
def test_file_names_are_judged(tmp_path: Path, name: str, what: str) -> None:
    (path,) = planted_series(tmp_path / "s", count=1)
    path.rename(path.with_name(name))
    findings = found(tmp_path)
    assert ("deid.filename" in findings) == bool(what)
    if what:
        assert what in findings["deid.filename"].message


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_texts_extensions_and_sidecars_are_judged(tmp_path: Path, kind: Any) -> None:
    image = kind(np.zeros((4, 4, 4), np.int16), np.eye(4))
    image.header["descrip"] = b"FSL5.0 TE=2.1"
    nibabel.save(image, tmp_path / "quiet.nii.gz")
    assert found(tmp_path) == {}
    image.header["descrip"] = SURNAME.encode()
    image.header["aux_file"] = b"19570312.img"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"by " + NAME.encode()))
    nibabel.save(image, tmp_path / "loud.nii")
    (tmp_path / "loud.json").write_text(json.dumps({"PatientName": NAME, "EchoTime": 0.002}))
    message = found(tmp_path)["deid.nifti-text"].message
    for field in ("descrip", "aux_file", "extension 6", "PatientName in the sidecar"):
        assert field in message
    assert "EchoTime" not in message and not holds(message.encode())


@given(st.sampled_from(["", "0", "0000", "XXXX", "Anonymous", "REMOVED", "n/a", "000Y"]))
def test_dummies_tell_nothing(text: str) -> None:
    assert is_dummy(text) and is_dummy(f" {text} ")


@given(st.integers(0, 2**240 - 1))
def test_keyed_hashes_look_like_nothing(number: int) -> None:
    assert looks_like(f"{number:060x}") == "" and looks_like(f"2.25.{number % 2**128}") == ""
