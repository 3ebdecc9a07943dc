"""A site's own record: decisions bind to a digest, a round has one update for ever."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from site_samples import plain_study, private_study

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore, public_error
from consilium_common.canonical import canonical_json, digest
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
    approved = store.decide(STUDY, "approved", 20, "")
    taken_back = store.decide(STUDY, "declined", 0, "no")
    assert code_of(store.approved, STUDY.digest) == "study.not-approved"
    assert taken_back.approved_at == approved.decided_at  # that it was approved is not forgotten
    assert store.decide(private_study(), "declined", 0, "no").approved_at is None


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


def test_an_evaluation_and_the_training_of_one_round_are_kept_apart(home: SiteHome) -> None:
    store = StudyStore(home)
    trained = store.keep_update(STUDY.digest, 1, b"update", {}, clip_norm=0.75)
    figures = {"sum": 0.1 + 0.2}
    told = canonical_json(figures)
    evaluated = store.keep_update(STUDY.digest, 1, told, figures, purpose="evaluation")
    again = StudyStore(home)
    assert again.update(STUDY.digest, 1) == trained
    assert again.update(STUDY.digest, 1, "evaluation") == evaluated
    assert evaluated.sha256 == digest(figures)
    assert again.update(STUDY.digest, 0, "evaluation") is None
    with pytest.raises(ConsiliumError) as caught:
        store.keep_update(STUDY.digest, 1, b"{}", {}, purpose="evaluation")
    assert caught.value.code == "privacy.second-update"
    listed = [(row["purpose"], row["round"], row["sha256"]) for row in store.updates("")]
    assert listed == [("training", 1, trained.sha256), ("evaluation", 1, evaluated.sha256)]


def test_the_clip_norm_that_the_last_round_left_is_found_again(home: SiteHome) -> None:
    store = StudyStore(home)
    assert store.clip_norm_after(STUDY.digest, 0) is None
    store.keep_update(STUDY.digest, 0, b"a", {}, clip_norm=0.5)
    store.keep_update(STUDY.digest, 3, b"b", {}, clip_norm=0.25)
    store.keep_update(STUDY.digest, 4, b"c", {})
    found = [StudyStore(home).clip_norm_after(STUDY.digest, n) for n in range(6)]
    # Rounds that the site missed leave the norm of the round before them.
    assert found == [None, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert store.clip_norm_after(private_study().digest, 4) is None


def test_a_decision_remembers_who_is_left_out_and_how_many_are_evaluated(home: SiteHome) -> None:
    patients = {"b" * 32, "a" * 32}
    StudyStore(home).decide(STUDY, "approved", 20, "", evaluation_size=4, left_out=patients)
    StudyStore(home).decide(private_study(), "declined", 0, "no")
    found, declined = StudyStore(home).decisions()
    assert found == StudyStore(home).approved(STUDY.digest)
    assert (found.evaluation_size, found.left_out) == (4, patients)
    assert (declined.evaluation_size, declined.left_out) == (0, frozenset())


#: What the first release made, before evaluations were stored and patients left out.
FIRST_SCHEMA = """
CREATE TABLE decisions (
    digest TEXT PRIMARY KEY, canonical TEXT NOT NULL, decision TEXT NOT NULL,
    cohort_size INTEGER NOT NULL, why TEXT NOT NULL, decided_at TEXT NOT NULL
);
CREATE TABLE updates (
    digest TEXT NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    figures TEXT NOT NULL, stored_at TEXT NOT NULL, PRIMARY KEY (digest, round)
);
"""


def test_the_record_of_an_earlier_release_is_taken_over(home: SiteHome) -> None:
    blob = b"an update of an earlier release"
    sha256 = hashlib.sha256(blob).hexdigest()
    with sqlite3.connect(home.studies) as connection:
        connection.executescript(FIRST_SCHEMA)
        connection.execute(
            "INSERT INTO decisions VALUES (?,?,?,?,?,?)",
            (STUDY.digest, json.dumps(STUDY.to_canonical()), "approved", 20, "", "2026-01-01"),
        )
        connection.execute(
            "INSERT INTO updates VALUES (?,?,?,?,?,?)",
            (STUDY.digest, 1, sha256, len(blob), "{}", "2026-01-01"),
        )
    connection.close()
    (home.releases / f"{STUDY.digest[:16]}-00001.safetensors").write_bytes(blob)
    for _ in range(2):
        store = StudyStore(home)
        approved = store.approved(STUDY.digest)
        assert (approved.cohort_size, approved.approved_at) == (20, "2026-01-01")
        found = store.update(STUDY.digest, 1)
        assert found is not None
        assert (found.sha256, found.blob, found.clip_norm) == (sha256, blob, None)
        assert code_of(store.keep_update, STUDY.digest, 1, b"other", {}) == "privacy.second-update"


def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StudyStore(home)
    kept = store.keep_update(STUDY.digest, 0, b"update", {})
    connect = sqlite3.connect

    def full(*arguments: object, **options: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)  # type: ignore[call-overload]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", full)
    figures = {f"figure {n}": 0.5 for n in range(2000)}
    assert code_of(store.keep_update, STUDY.digest, 1, b"next", figures) == "state.store"
    monkeypatch.undo()
    assert store.update(STUDY.digest, 0) == kept
    assert store.update(STUDY.digest, 1) is None


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
