"""Asked to train or to evaluate, a site does what is permitted and charged, once, and no more."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from round_samples import (
    COHORT_SIZE,
    NAME,
    MemoryCohort,
    RoundsAtSite,
    deciding_site,
    keyed_cohort,
    keyed_patient,
    tiny_study,
)

from consilium_client.data import cohort as cohorts
from consilium_client.data.cohort import Cohort
from consilium_client.home import SiteHome
from consilium_client.score_query import centred_sum
from consilium_client.store import StudyStore
from consilium_client.worker import _Study, only_worker
from consilium_common.canonical import digest
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.state import Charge
from consilium_common.ledger.store import Ledger
from consilium_common.study import Study


def rounds_at(folder: Path, study: Study) -> RoundsAtSite:
    return RoundsAtSite(deciding_site(folder / "site", study), study, keyed_cohort())


def report_of(rounds: RoundsAtSite, rounds_done: int) -> dict[str, Any]:
    folder = rounds.site.home.reports / rounds.study.digest[:16]
    found: dict[str, Any] = json.loads((folder / f"round-{rounds_done:05d}.json").read_text())
    return found


def charges(rounds: RoundsAtSite) -> list[Charge]:
    if not rounds.site.home.ledger.exists():
        return []
    with Ledger.open(rounds.site.home.ledger, site=NAME) as ledger:
        return list(ledger.state.charges.values())


def code_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments)
    return caught.value.code


@pytest.fixture
def rounds(tmp_path: Path) -> RoundsAtSite:
    return rounds_at(tmp_path, tiny_study())


def test_an_evaluation_asked_again_sends_the_same_figures_and_draws_nothing_anew(
    rounds: RoundsAtSite,
) -> None:
    first = rounds.evaluate(0)
    assert set(first) == {"sum"}
    looked = len(rounds.cohort.asked)
    assert rounds.evaluate(0) == first
    # A worker that was started afresh knows it too, and asks no patient for it.
    again = RoundsAtSite(rounds.site, rounds.study, rounds.cohort)
    assert again.evaluate(0) == first
    assert len(rounds.cohort.asked) == looked
    (charge,) = charges(rounds)
    assert (charge.purpose, charge.round_index, charge.state) == ("evaluation", 0, "released")
    assert charge.update == digest(first)
    assert rounds.evaluate(2) != first
    assert len(charges(rounds)) == 2


def test_an_evaluation_is_charged_to_the_test_patients_and_noised_about_the_exact_score(
    rounds: RoundsAtSite,
) -> None:
    told = rounds.evaluate(0)["sum"]
    report = report_of(rounds, 0)  # exact, and here alone
    exact = centred_sum(row["values"]["organ"] for row in report["rows"])
    assert report["rounds_done"] == 0
    assert told != exact
    (charge,) = charges(rounds)
    assert abs(told - exact) < 8 * charge.event.noise_multiplier * charge.clip_norm
    assert charge.clip_norm == 0.5
    with Ledger.open(rounds.site.home.ledger, site=NAME) as ledger:
        members = ledger.state.cohorts[charge.cohort]
    assert set(members) == {patient.key for patient in rounds.cohort.splits["test"]}


def test_the_first_evaluation_leaves_the_training_data_alone(rounds: RoundsAtSite) -> None:
    rounds.evaluate(0)
    assert set(rounds.cohort.asked) == {"test"}


@pytest.mark.parametrize("private", [True, False])
def test_with_nothing_to_release_the_figures_stay_in_the_sites_report(
    tmp_path: Path, private: bool
) -> None:
    study = tiny_study(release="none", private=private)
    site = deciding_site(tmp_path / "site", study)
    policy = site.home.policy
    policy.write_text(policy.read_text() + "permit_non_private: true\n")
    rounds = RoundsAtSite(site, study, keyed_cohort())
    assert rounds.evaluate(0) == {}
    assert report_of(rounds, 0)["cases"] == 3
    assert charges(rounds) == []
    assert StudyStore(site.home).updates("") == []


def test_exact_figures_leave_only_where_study_and_policy_say_so(tmp_path: Path) -> None:
    study = tiny_study(release="exact", private=False)
    site = deciding_site(tmp_path / "site", study)
    allowing = site.home.policy.read_text() + "permit_non_private: true\n"
    site.home.policy.write_text(allowing + "release_exact_metrics: true\n")
    rounds = RoundsAtSite(site, study, keyed_cohort())
    assert set(rounds.evaluate(2)) == {"cases", "dice.organ.total", "dice.organ.count"}
    site.home.policy.write_text(allowing)
    assert code_of(rounds.evaluate, 2) == "privacy.metrics-refused"


def test_an_approval_that_was_taken_back_ends_training_and_evaluation_before_any_look(
    rounds: RoundsAtSite,
) -> None:
    StudyStore(rounds.site.home).decide(rounds.study, "declined", 0, "no")
    assert code_of(rounds.evaluate, 0) == "study.not-approved"
    assert code_of(rounds.train, 0) == "study.not-approved"
    assert rounds.cohort.asked == []
    assert charges(rounds) == []


def test_figures_of_other_patients_than_were_charged_are_withheld(tmp_path: Path) -> None:
    study = tiny_study()
    site = deciding_site(tmp_path / "site", study)
    rounds = RoundsAtSite(site, study, keyed_cohort())
    rounds.cohort.splits["test"].append(keyed_patient(777))
    fewer = RoundsAtSite(site, study, MemoryCohort({**rounds.cohort.splits, "test": []}))
    assert code_of(fewer.evaluate, 0) == "privacy.no-test-patients"
    rounds.rounds._evaluated = tuple(rounds.cohort.splits["test"][:2])
    assert code_of(rounds.evaluate, 0) == "privacy.truth"
    assert StudyStore(site.home).updates("") == []


def test_a_round_asked_again_sends_the_same_update_at_no_charge(rounds: RoundsAtSite) -> None:
    update = rounds.train(0)
    assert rounds.train(0) == update
    assert update.sha256 == hashlib.sha256(update.blob).hexdigest()
    assert update.figures == {}
    (charge,) = charges(rounds)
    assert (charge.purpose, charge.update) == ("training", update.sha256)


def test_a_clip_norm_that_adapts_is_carried_to_the_next_round_and_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(clipping={"kind": "adaptive", "count_noise": 3.0})
    rounds = rounds_at(tmp_path, study)
    told: list[float] = []
    train = rounds.session.train

    def listened(*arguments: Any, clip_norm: float, **more: Any) -> Any:
        told.append(clip_norm)
        return train(*arguments, clip_norm=clip_norm, **more)

    monkeypatch.setattr(rounds.session, "train", listened)
    first = rounds.train(0)
    assert first.clip_norm is not None
    assert first.clip_norm != 1.0
    rounds.train(1)
    assert told == [1.0, first.clip_norm]
    assert [charge.clip_norm for charge in charges(rounds)] == told
    assert first.figures == {}


def test_a_private_round_reports_no_step(rounds: RoundsAtSite) -> None:
    from consilium_common.wire.messages import Instructions

    told: list[tuple[int, int]] = []
    asked = Instructions(rounds.study.digest, 0, COHORT_SIZE)
    rounds.rounds.train(asked, rounds.weights, lambda *step: told.append(step))
    assert told == []


# --- the worker, which opens the cohort --------------------------------------------------------


def test_who_is_left_out_is_out_of_every_split() -> None:
    whole = {split: tuple(patients) for split, patients in keyed_cohort().splits.items()}
    cohort = Cohort(NAME, whole, classes=("background", "organ"), left_out=2)  # type: ignore[arg-type]
    gone = {whole["train"][1].key, whole["test"][0].key, "f" * 32}
    fewer = cohort.without(gone)
    assert [p.key for p in fewer.patients("train")] == [
        p.key for p in whole["train"] if p.key not in gone
    ]
    assert fewer.patients("test") == whole["test"][1:]
    assert (fewer.site, fewer.classes, fewer.left_out) == (NAME, cohort.classes, 2)
    assert len(cohort.patients("train")) == 6


def test_the_worker_charges_and_sees_nobody_who_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study()
    site = deciding_site(tmp_path / "site", study)
    splits = {split: tuple(patients) for split, patients in keyed_cohort().splits.items()}
    cohort = Cohort(NAME, splits, classes=study.task.classes)  # type: ignore[arg-type]
    monkeypatch.setattr(cohorts, "open_cohort", lambda _, __: cohort)
    gone = [splits["train"][0].key, splits["test"][0].key]
    StudyStore(site.home).decide(study, "approved", COHORT_SIZE, "", left_out=gone)

    worker = _Study(site.home.path, study.digest)
    at_site = RoundsAtSite(site, study, keyed_cohort())
    at_site.rounds, at_site.session, at_site.cohort = (
        worker._rounds,
        worker._session,
        worker._cohort,
    )
    assert math.isfinite(at_site.evaluate(0)["sum"])
    at_site.train(0)
    assert report_of(at_site, 0)["cases"] == 2
    with Ledger.open(site.home.ledger, site=NAME) as ledger:
        charged = {key for members in ledger.state.cohorts.values() for key in members}
    everybody = {patient.key for patients in splits.values() for patient in patients}
    assert charged == everybody - set(gone)

    assert not worker.decided_anew()
    StudyStore(site.home).decide(study, "approved", COHORT_SIZE, "")
    assert worker.decided_anew()  # the next piece of work opens the study afresh
    StudyStore(site.home).decide(study, "declined", 0, "no")
    assert code_of(worker.decided_anew) == "study.not-approved"


def test_a_study_has_one_worker_at_a_time_and_a_killed_one_makes_way(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "site").path
    study = "d" * 64
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        held = only_worker(home, study)
        os.write(write, b"held")
        signal.alarm(60)  # ends the child, whatever becomes of the test
        signal.pause()
        held.close()
        os._exit(0)
    try:
        assert os.read(read, 4) == b"held"
        assert code_of(lambda: only_worker(home, study, seconds=0.1)) == "run.worker-busy"
        only_worker(home, "e" * 64, seconds=0.1).close()  # another study's is its own
    finally:
        os.kill(child, signal.SIGKILL)
    only_worker(home, study, seconds=10).close()
    os.waitpid(child, 0)
