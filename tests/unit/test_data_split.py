"""Patients by keyed hash: names, splits that never move, and a key that is never replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from data_fixtures import home_in
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_client.data.schema import Case, SplitFractions
from consilium_client.data.split import PatientKey, assign_splits, open_patient_key
from consilium_common.errors import ConsiliumError

patients = st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=30)


def case(patient: str, number: int, split: str | None = None) -> Case:
    return Case.model_validate(
        {
            "case_id": f"c{number}",
            "patient_id": patient,
            "images": {"image": "x"},
            "label": "y",
            "split": split,
        }
    )


@settings(max_examples=60, deadline=None)
@given(first=patients, later=patients, secret=st.binary(min_size=32, max_size=32))
def test_a_patients_split_never_changes_when_cases_are_added(
    first: list[str], later: list[str], secret: bytes
) -> None:
    key, fractions = PatientKey(secret), SplitFractions()
    before = assign_splits([case(p, i) for i, p in enumerate(first)], key, fractions)
    grown = [case(p, i) for i, p in enumerate([*later, *first, *later])]
    after = assign_splits(grown, key, fractions)
    assert {name: after[name] for name in before} == dict(before)


def test_splits_have_the_asked_shares() -> None:
    key = PatientKey(bytes(range(32)))
    fractions = SplitFractions(train=0.5, validation=0.2, test=0.3)
    splits = [key.split(f"patient {n}", fractions) for n in range(4000)]
    for name, share in (("train", 0.5), ("validation", 0.2), ("test", 0.3)):
        # Five standard deviations of a binomial count.
        assert abs(splits.count(name) / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5


def test_the_split_column_holds_for_the_whole_patient() -> None:
    key = PatientKey(os.urandom(32))
    cases = [case("a", 0), case("a", 1, "test"), case("a", 2)]
    assert set(assign_splits(cases, key, SplitFractions()).values()) == {"test"}


def test_a_patient_written_into_two_splits_is_an_error_that_names_no_patient() -> None:
    cases = [case("Jane Doe", 0, "train"), case("Jane Doe ", 1, "test")]
    with pytest.raises(ConsiliumError) as caught:
        assign_splits(cases, PatientKey(os.urandom(32)), SplitFractions())
    assert caught.value.code == "data.two-splits"
    assert "Jane" not in str(caught.value.to_dict())


def test_patients_have_other_names_at_another_site_and_the_key_is_not_shown() -> None:
    one, two = PatientKey(b"1" * 32), PatientKey(b"2" * 32)
    assert one.name("a") != two.name("a")
    assert one.name("a") == one.name(" a ")
    assert len(one.name("a")) == 32 and set(one.name("a")) <= set("0123456789abcdef")
    assert "1111" not in repr(one)


def test_the_key_is_made_once_private_and_random(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    key = open_patient_key(home)
    assert open_patient_key(home) == key
    assert stat.S_IMODE((home.identity / "patient_key").stat().st_mode) == 0o600
    assert open_patient_key(home_in(tmp_path / "other")).secret != key.secret


def test_a_lost_key_is_not_replaced_in_silence(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    open_patient_key(home)
    path = home.identity / "patient_key"
    secret = path.read_bytes()
    path.unlink()
    with pytest.raises(ConsiliumError, match="gone"):
        open_patient_key(home)
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    with pytest.raises(ConsiliumError, match="not the one"):
        open_patient_key(home)
    path.write_bytes(secret)
    assert open_patient_key(home).secret == secret


def test_a_key_open_to_others_is_refused(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    open_patient_key(home)
    (home.identity / "patient_key").chmod(0o644)
    with pytest.raises(ConsiliumError, match="open to others") as caught:
        open_patient_key(home)
    assert caught.value.code == "state.patient-key"
