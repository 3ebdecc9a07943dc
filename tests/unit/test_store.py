"""A site's own record: decisions bind to a digest, a round has one update for ever."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from site_samples import plain_study, private_study

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore, public_error
from consilium_common.errors import ConsiliumError

STUDY = plain_study()


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome.create(tmp_path / "site")


def code_of(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments)
    return caught.value.code


def test_an_approval_is_of_one_digest(home: SiteHome) -> None:
    store = StudyStore(home)
    assert store.decision(STUDY.digest) is None
    assert code_of(store.approved, STUDY.digest) == "study.not-approved"
    store.decide(STUDY, "approved", 20, "")
    found = StudyStore(home).approved(STUDY.digest)
    assert (found.study, found.cohort_size) == (STUDY, 20)
    assert code_of(store.approved, private_study().digest) == "study.not-approved"


def test_a_later_decline_takes_the_approval_back(home: SiteHome) -> None:
    store = StudyStore(home)
    store.decide(STUDY, "approved", 20, "")
    store.decide(STUDY, "declined", 0, "no")
    assert code_of(store.approved, STUDY.digest) == "study.not-approved"


def test_a_record_that_was_put_under_another_digest_is_no_approval(home: SiteHome) -> None:
    store = StudyStore(home)
    store.decide(STUDY, "approved", 20, "")
    other = private_study().digest
    with sqlite3.connect(home.studies) as connection:
        connection.execute("UPDATE decisions SET digest = ?", (other,))
    assert code_of(store.approved, other) == "study.not-approved"


def test_an_update_reads_back_and_a_second_one_of_its_round_is_refused(home: SiteHome) -> None:
    store = StudyStore(home)
    assert store.update(STUDY.digest, 0) is None
    kept = store.keep_update(STUDY.digest, 0, b"update", {"loss": 0.5})
    assert StudyStore(home).update(STUDY.digest, 0) == kept
    assert store.update(STUDY.digest, 1) is None
    assert code_of(store.keep_update, STUDY.digest, 0, b"other", {}) == "privacy.second-update"


def test_a_refused_second_update_leaves_the_first_one_readable(home: SiteHome) -> None:
    store = StudyStore(home)
    kept = store.keep_update(STUDY.digest, 0, b"update", {})
    code_of(store.keep_update, STUDY.digest, 0, b"other", {})
    assert store.update(STUDY.digest, 0) == kept


@pytest.mark.parametrize("content", [b"changed", b"", None])
def test_an_update_that_was_changed_or_lost_is_never_sent(
    home: SiteHome, content: bytes | None
) -> None:
    store = StudyStore(home)
    store.keep_update(STUDY.digest, 2, b"update", {})
    (path,) = home.releases.iterdir()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert code_of(store.update, STUDY.digest, 2) == "privacy.update-lost"


def test_files_are_for_their_owner_alone(home: SiteHome) -> None:
    store = StudyStore(home)
    store.keep_update(STUDY.digest, 0, b"update", {})
    for path in (home.studies, *home.releases.iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_an_object_may_leave_once_it_was_registered(home: SiteHome) -> None:
    store = StudyStore(home)
    assert store.outgoing("o" * 64) is None
    store.permit_outgoing(["o" * 64, "p" * 64], STUDY.digest, 3, "train")
    assert StudyStore(home).outgoing("p" * 64) == (STUDY.digest, 3, "train")


def test_what_the_aggregator_hears_of_an_error_is_its_code_alone() -> None:
    error = ConsiliumError(
        "data.truncated", "Patient Doe", where="/images/Doe^John.dcm", hint="Ask Dr Roe"
    )
    told = public_error(error)
    assert told["code"] == "data.truncated"
    for secret in ("Doe", "images", "Roe"):
        assert secret not in str(told)


def test_a_damaged_record_is_one_clear_error(home: SiteHome) -> None:
    home.studies.write_bytes(b"not a database at all\n" * 100)
    assert code_of(StudyStore, home) == "state.store"
