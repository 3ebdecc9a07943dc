"""The doctor's rules over a cohort: what each finds, and what it leaves in peace."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import home_in, study
from hypothesis import given, settings
from hypothesis import strategies as st

import consilium_client
from consilium_client.data.doctor.balance import class_findings, classes_by_case, size_findings
from consilium_client.data.doctor.patients import (
    person_name,
    same_image_findings,
    two_identifiers_findings,
    two_splits_findings,
)
from consilium_client.data.doctor.site import disk
from consilium_client.data.doctor.study_fit import background_findings, unfit_findings
from consilium_client.data.doctor.values import (
    blank_findings,
    intensity_findings,
    orientation_findings,
    scanner_findings,
    unit_findings,
)
from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.ingest.facts import channel_facts
from consilium_client.data.manifest import Case, Manifest, SiteManifest
from consilium_client.data.rules import RULES
from consilium_client.data.split import PatientKey
from consilium_common.errors import ConsiliumError

KEY = PatientKey(bytes(32))
OTHER = PatientKey(bytes([1] * 32))


def entry(values: np.ndarray | None = None, **changes: object) -> Ingested:
    """Return a cached case, as the ingest describes one, of these values."""
    values = np.random.default_rng(0).normal(100, 20, (8, 8, 8)) if values is None else values
    labels: Mapping[int, int] = {0: 100, 1: 20}
    made = Ingested(
        folder=Path("nowhere"),
        shape=values.shape,
        affine=np.eye(4),
        original_shape=values.shape,
        original_affine=np.eye(4),
        spacing_known=True,
        channels=("ct",),
        label_values=tuple(labels),
        sources={},
        content="",
        facts={"ct": channel_facts(values.astype(np.float32))},
        label_counts=labels,
        scanner="",
        modality="",
        axes="RAS",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def cohort(
    count: int, make: Callable[[int], np.ndarray] | None = None, **changes: object
) -> dict[str, Ingested]:
    """Return ``count`` cases of different values."""
    own = make or (lambda seed: np.random.default_rng(seed).normal(100, 20, (8, 8, 8)))
    return {f"scan{number}": entry(own(number), **changes) for number in range(count)}


def manifest(cases: list[Case], **site: object) -> Manifest:
    content = {
        "schema": "consilium/site/v1",
        "site": "northfield",
        "root": "data",
        "inputs": ["ct"],
        "label_kind": "mask",
        "labels": {"background": 0, "liver": 1},
        **site,
    }
    return Manifest(SiteManifest.model_validate(content), tuple(cases), Path("data"))


def case(number: int, patient: str = "", **changes: object) -> Case:
    values = {
        "case_id": f"scan{number}",
        "patient_id": patient or f"Q-{number}",
        "images": {"ct": f"scan{number}.nii"},
        "label": f"label{number}.nii",
        **changes,
    }
    return Case.model_validate(values)


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in findings]


# --- patients ----------------------------------------------------------------------------------


def test_the_same_image_under_two_patients_is_an_error_and_under_one_a_warning() -> None:
    entries = cohort(3)
    entries["scan2"] = entries["scan0"]
    (finding,) = same_image_findings([case(0), case(1), case(2)], entries, KEY)
    assert finding.code == "data.same-image" and finding.severity == "error"
    assert "scan0, scan2" in finding.where and "Q-" not in str(finding.to_dict())
    again = [case(0, "Q"), case(1), case(2, " Q ")]  # spaces around are not identity
    (finding,) = same_image_findings(again, entries, KEY)
    assert finding.code == "data.repeated-image" and finding.severity == "warning"


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([np.int16, np.uint16, np.float32]), st.integers(0, 9))
def test_a_copy_in_another_type_or_place_is_the_same_image(kind: type, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1000, (4, 5, 6))
    entries = {
        "scan0": entry(values),
        "scan1": replace(
            entry(), facts={"ct": channel_facts(values.astype(kind))}, affine=2 * np.eye(4)
        ),
    }
    assert codes(same_image_findings([case(0), case(1)], entries, KEY)) == ["data.same-image"]
    changed = values.copy()
    changed[0, 0, 0] += 1
    entries["scan1"] = entry(changed)
    assert same_image_findings([case(0), case(1)], entries, KEY) == ()


def test_blank_images_are_no_proof_of_one_person_and_are_named_themselves() -> None:
    entries = cohort(2, lambda _: np.zeros((4, 4, 4)))
    assert same_image_findings([case(0), case(1)], entries, KEY) == ()
    assert codes(blank_findings(entries)) == ["data.blank"] * 2


def test_a_patient_in_two_splits_is_one_finding_with_the_others() -> None:
    cases = [case(0, "A", split="train"), case(1, "A", split="test"), case(2, "B", split="test")]
    (finding,) = two_splits_findings(manifest(cases), KEY)
    assert finding.code == "data.two-splits" and "scan0, scan1" in finding.where


def test_one_person_under_two_identifiers_is_found_and_never_named() -> None:
    person = "kowalskaanna|19610314|F"
    told = {name: (person_name(person, KEY),) for name in ("scan0", "scan2")}
    (finding,) = two_identifiers_findings([case(n) for n in range(3)], told, KEY)
    assert finding.code == "data.two-identifiers" and finding.severity == "error"
    assert "scan0, scan2" in finding.where
    assert not re.search("kowalska|1961|Q-", str(finding.to_dict()))
    assert person_name(person, KEY) != person_name(person, OTHER)
    same = [case(0, "A"), case(1, "B"), case(2, "A")]
    assert two_identifiers_findings(same, told, KEY) == ()


@pytest.mark.parametrize(
    "person", ["", "anonymous|19610314|F", "anna|19000101|F", "x|19610314|", "patient07|19700101|"]
)
def test_placeholders_for_a_person_are_nobody(person: str) -> None:
    assert person_name(person, KEY) == ""


def test_a_name_that_many_patients_share_is_a_placeholder() -> None:
    told = {f"scan{n}": (person_name("johndoe|19610314|M", KEY),) for n in range(4)}
    assert two_identifiers_findings([case(n) for n in range(4)], told, KEY) == ()


# --- the cohort --------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "found"), [(19, ["data.tiny-cohort"]), (20, [])])
def test_a_cohort_is_tiny_below_twenty_patients(count: int, found: list[str]) -> None:
    cases = [case(n) for n in range(count)] + [case(99, "Q-0")]
    assert codes(size_findings(manifest(cases), KEY)) == found


def test_classes_of_few_patients_are_named_for_masks_and_for_the_label_column() -> None:
    cases = [case(n) for n in range(40)]
    entries = cohort(40)
    entries["scan7"] = entry(label_counts={0: 1, 2: 9})
    site = manifest(cases, labels={"background": 0, "liver": 1, "tumour": 2, "vessel": 3})
    found = class_findings(site, classes_by_case(site, entries), KEY)
    assert [finding.where.split()[-1] for finding in found] == ["tumour", "vessel"]
    assert "1 of 40 patients" in found[0].message and "0 of 40" in found[1].message
    written = [case(n, label="old" if n < 3 else "young") for n in range(40)]
    site = manifest(written, label_kind="class", labels={"young": "<65", "old": ">=65"})
    (finding,) = class_findings(site, classes_by_case(site, entries), KEY)
    assert finding.where.endswith("old") and "3 of 40" in finding.message


def test_a_case_with_far_values_is_named_and_an_ordinary_cohort_is_not() -> None:
    entries = cohort(12)
    assert intensity_findings(entries) == ()
    entries["scan5"] = entry(np.random.default_rng(5).normal(100, 20, (8, 8, 8)) + 1024)
    (finding,) = intensity_findings(entries)
    assert finding.case == "scan5" and finding.severity == "warning"
    assert intensity_findings({name: entries[name] for name in list(entries)[:7]}) == ()


def test_a_cohort_without_a_common_scale_is_one_finding() -> None:
    entries = cohort(20)
    for number in range(6):
        own = np.random.default_rng(number).normal(100, 20, (8, 8, 8))
        entries[f"scan{number}"] = entry(own * 1000)
    (finding,) = intensity_findings(entries)
    assert finding.case == "" and "6 of 20" in finding.message and "scan5" in finding.where


def test_ct_that_is_never_negative_has_lost_its_rescale() -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (8, 8, 8))
    (finding,) = unit_findings({"scan0": entry(stored, modality="CT")})
    assert finding.code == "data.unit-mismatch" and finding.case == "scan0"
    assert unit_findings({"scan0": entry(stored - 1024, modality="CT")}) == ()
    assert unit_findings({"scan0": entry(stored, modality="MR")}) == ()


def test_a_channel_of_hounsfield_and_other_units_is_one_finding_for_the_cohort() -> None:
    entries = cohort(9, lambda seed: np.random.default_rng(seed).integers(-1000, 900, (8, 8, 8)))
    assert unit_findings(entries) == ()
    entries["scan3"] = entry(np.random.default_rng(3).integers(0, 256, (8, 8, 8)))
    (finding,) = unit_findings(entries)
    assert finding.case == "" and "scan3" in finding.where


def test_a_single_turned_case_is_named_and_a_mixed_cohort_is_not() -> None:
    entries = cohort(10)
    assert orientation_findings(entries) == ()
    entries["scan4"] = replace(entries["scan4"], axes="LAS")
    (finding,) = orientation_findings(entries)
    assert finding.case == "scan4" and "LAS" in finding.message
    mixed = {
        name: replace(one, axes="LAS" if number % 2 else "RAS")
        for number, (name, one) in enumerate(entries.items())
    }
    assert orientation_findings(mixed) == ()


def test_a_rare_scanner_and_a_class_of_one_scanner_are_named_outside_the_message() -> None:
    entries = cohort(22, scanner="Acme One")
    assert scanner_findings(entries, {}) == ()
    entries["scan0"] = replace(entries["scan0"], scanner="Zeta Two")
    (finding,) = scanner_findings(entries, {})
    assert "Zeta Two: 1" in finding.where and "Zeta" not in finding.message
    half = {
        name: replace(one, scanner="Zeta Two" if number < 11 else "Acme One")
        for number, (name, one) in enumerate(entries.items())
    }
    classes = {name: ("sick" if number < 8 else "well",) for number, name in enumerate(half)}
    (finding,) = scanner_findings(half, classes)
    assert "class sick" in finding.where


# --- the study ---------------------------------------------------------------------------------


def segmentation(**task: object) -> object:
    base = study().model_dump(mode="json", by_alias=True)["task"]
    return study(task={**base, "inputs": ["ct"], "classes": ["background", "liver"], **task})


def test_an_empty_label_is_an_error_only_where_the_study_refuses_it() -> None:
    site = manifest([case(0), case(1)])
    entries = {"scan0": entry(), "scan1": entry(label_counts={0: 120})}
    assert unfit_findings(site, entries, segmentation()) == ()  # type: ignore[arg-type]
    refused = segmentation(empty_labels="refused")
    (finding,) = unfit_findings(site, entries, refused)  # type: ignore[arg-type]
    assert finding.code == "data.empty-label" and finding.case == "scan1"


def test_mask_values_without_a_class_of_the_study_are_said_to_become_background() -> None:
    site = manifest([case(0)], labels={"background": 0, "liver": 1, "spleen": 2})
    found = background_findings(site, {"scan0": entry(label_counts={0: 9, 2: 9})}, segmentation())  # type: ignore[arg-type]
    assert codes(found) == ["data.label-to-background"] and "spleen" in found[0].where
    assert background_findings(site, {"scan0": entry()}, segmentation()) == ()  # type: ignore[arg-type]


# --- the rules themselves ----------------------------------------------------------------------

#: Codes of the whole manifest, an importer, a study or a command: they end it, and no case carries
#: them.
_OF_COMMANDS = frozenset(
    {
        "data.cases",
        "data.channels",
        "data.dataset-json",
        "data.duplicate-case",
        "data.invalid",
        "data.label",
        "data.manifest",
        "data.no-list",
        "data.no-manifest",
        "data.no-patients",
        "data.no-sites",
        "data.not-empty",
        "data.other-root",
        "data.outside",
        "data.same-site",
        "data.purged",
        "data.several-lists",
        "data.size",
        "data.unknown-case",
        "data.unknown-format",
        "data.unknown-patient",
    }
)


def _codes_in_client() -> set[str]:
    found: set[str] = set()
    for path in Path(consilium_client.__file__).parent.rglob("*.py"):
        if path.name == "rules.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^(?:data|deid)\.[a-z-]+$", node.value))
    return found


def test_a_disk_that_will_soon_be_full_is_a_warning_and_a_roomy_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_in(tmp_path)
    free = {"free": 2**40}
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(**free))
    assert disk(home).findings == ()
    free["free"] = 2**20
    assert [finding.code for finding in disk(home).findings] == ["state.disk-low"]


def test_every_code_of_a_finding_has_a_rule_and_every_rule_is_used() -> None:
    used = _codes_in_client() | {"data.covariate"}  # raised by the common package
    rules = {code for code in RULES if code.startswith(("data.", "deid."))}
    assert used - rules - _OF_COMMANDS == set()
    assert rules - used == set()


def test_every_rule_says_why_in_one_sentence() -> None:
    for code, rule in RULES.items():
        assert rule.why.endswith(".") and 20 < len(rule.why) < 130, code


def test_a_warning_is_never_an_error_that_ends_a_command() -> None:
    for code, rule in RULES.items():
        if rule.severity == "error":
            ConsiliumError(code, "as an error")  # its category has an exit status
