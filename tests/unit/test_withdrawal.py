"""Withdrawal stops training at the next step, and is final for what has not been released."""

from __future__ import annotations

import datetime as dt
import sqlite3
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from budget_samples import policy, refused
from hospital_samples import hospital_with
from round_samples import (
    COHORT_SIZE,
    NAME,
    RoundsAtSite,
    deciding_site,
    keyed_cohort,
    tiny_study,
)
from site_samples import JoinedSite
from test_reviewing import asked
from typer.testing import CliRunner

from consilium_client.budget.policy import default_policy_text, load_policy
from consilium_client.budget.policy_automatic import Asked
from consilium_client.cli import app
from consilium_client.deciding import decline, tell, withdraw
from consilium_client.identity import SiteIdentity
from consilium_client.reviewing import declared_size
from consilium_client.standing import Standing, require_within_bounds
from consilium_client.store import StudyStore
from consilium_client.workers import WorkerPool
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.state import Charge
from consilium_common.ledger.store import Ledger
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions
from consilium_common.wire.methods import SITE_DECIDE

STEPS = 12


def long_study(*, private: bool = True) -> Study:
    plain = tiny_study(private=private, release="private" if private else "none").to_canonical()
    plain["training"]["steps_per_round"] = STEPS
    return Study.model_validate(plain)


def at_site(folder: Path, study: Study) -> RoundsAtSite:
    site = deciding_site(folder / "site", study)
    policy_file = site.home.policy
    policy_file.write_text(policy_file.read_text() + "permit_non_private: true\n")
    return RoundsAtSite(site, study, keyed_cohort())


def at_step(
    rounds: RoundsAtSite, number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Do something in the middle of a step; returns the steps that were done, as they are."""
    from consilium_client.training import optimiser

    done: list[int] = []
    rate = optimiser.learning_rate

    def counted(*arguments: Any) -> float:
        done.append(len(done) + 1)
        if len(done) == number:
            act()
        return rate(*arguments)

    monkeypatch.setattr(optimiser, "learning_rate", counted)
    return done


def charges(rounds: RoundsAtSite) -> list[Charge]:
    with Ledger.open(rounds.site.home.ledger, site=NAME) as ledger:
        return list(ledger.state.charges.values())


@pytest.mark.parametrize("private", [True, False])
def test_training_stops_at_the_very_step_in_which_the_approval_was_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    rounds = at_site(tmp_path, long_study(private=private))
    store = StudyStore(rounds.site.home)
    done = at_step(rounds, 3, lambda: store.decide(rounds.study, "declined", 0, "no"), monkeypatch)
    with refused("study.withdrawn"):
        rounds.train(0)
    assert done == [1, 2, 3]
    assert store.updates("") == []
    assert list(rounds.site.home.releases.iterdir()) == []
    if private:
        # Charged before anything was computed: it stands.
        (charge,) = charges(rounds)
        assert charge.state == "open"
    with refused("study.not-approved"):
        rounds.train(0)


def test_an_approval_given_anew_in_mid_round_gives_the_round_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = at_site(tmp_path, long_study())
    store = StudyStore(rounds.site.home)
    gone = [rounds.cohort.splits["train"][0].key]

    def again() -> None:
        store.decide(rounds.study, "approved", COHORT_SIZE, "", left_out=gone)

    done = at_step(rounds, 2, again, monkeypatch)
    with refused("study.decided-anew"):
        rounds.train(0)
    assert len(done) == 2
    assert store.updates("") == []


def test_a_withdrawal_between_the_last_step_and_storing_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = at_site(tmp_path, long_study())
    store = StudyStore(rounds.site.home)
    keep = StudyStore.keep_update

    def late(self: StudyStore, *arguments: Any, **more: Any) -> Any:
        store.decide(rounds.study, "declined", 0, "no")
        return keep(self, *arguments, **more)

    monkeypatch.setattr(StudyStore, "keep_update", late)
    works: tuple[Callable[[RoundsAtSite], object], ...] = (
        lambda at: at.train(0),
        lambda at: at.evaluate(0),
    )
    for work in works:
        store.decide(rounds.study, "approved", COHORT_SIZE, "", evaluation_size=3)
        with refused("study.withdrawn"):
            work(RoundsAtSite(rounds.site, rounds.study, rounds.cohort))
    assert store.updates("") == []
    assert list(rounds.site.home.releases.iterdir()) == []


@pytest.mark.parametrize("private", [True, False])
def test_an_evaluation_stops_before_the_next_case(tmp_path: Path, private: bool) -> None:
    rounds = at_site(tmp_path, long_study(private=private))
    store = StudyStore(rounds.site.home)
    seen: list[int] = []

    def before_case() -> None:
        seen.append(len(seen))
        if len(seen) == 2:
            store.decide(rounds.study, "declined", 0, "no")
        rounds.rounds.standing.require()

    told = Instructions(rounds.study.digest, 0, COHORT_SIZE)
    weights = initial_weights(rounds.study)
    with refused("study.withdrawn"):
        rounds.rounds.evaluate(told, lambda: rounds.session.evaluate(weights, "test", before_case))
    assert len(seen) == 2
    assert len(rounds.cohort.splits["test"]) == 3


def test_what_was_stored_before_a_withdrawal_stays_here_whatever_is_approved_later(
    tmp_path: Path,
) -> None:
    rounds = at_site(tmp_path, tiny_study())
    store = StudyStore(rounds.site.home)
    rounds.train(0)
    store.decide(rounds.study, "declined", 0, "no")
    (row,) = store.updates("")
    assert row["withheld"]

    store.decide(rounds.study, "approved", COHORT_SIZE, "", evaluation_size=3)
    again = RoundsAtSite(rounds.site, rounds.study, rounds.cohort)
    with refused("study.withheld"):
        again.train(0)
    assert again.train(1).round_index == 1  # it takes part again from here on


def test_a_look_between_steps_costs_next_to_nothing(tmp_path: Path) -> None:
    study = long_study()
    site = deciding_site(tmp_path / "site", study)
    store = StudyStore(site.home)
    standing = Standing(site.home, store.approved(study.digest))
    standing.begin(load_policy(site.home))
    started = time.process_time()
    for _ in range(1000):
        standing.require()
    # Microseconds each; the bound leaves room for a slow machine. A step takes milliseconds.
    assert time.process_time() - started < 0.5
    store.decide(tiny_study(), "approved", 5, "")
    standing.require()  # something else was written: looked at, and gone on
    store.decide(study, "declined", 0, "no")
    with refused("study.withdrawn"):
        standing.require()
    with refused("study.withdrawn"):
        standing.require()
    site.home.studies.unlink()
    standing.close()
    with refused("state.store"):
        standing.require()


def test_an_automatic_approval_waits_outside_its_hours_and_ends_with_its_rule(
    tmp_path: Path,
) -> None:
    study = long_study()
    site = deciding_site(tmp_path / "site", study)
    store = StudyStore(site.home)
    store.decide(study, "declined", 0, "")  # a person's word comes first
    with refused("study.decided"):
        store.decide(study, "approved", 5, "", automatic=Asked("op", "segmentation", 1.0))
    with sqlite3.connect(site.home.studies) as connection:
        connection.execute("DELETE FROM decisions")
    connection.close()
    decision = store.decide(study, "approved", 5, "", automatic=Asked("op", "segmentation", 1.0))
    assert store.approved(study.digest) == decision
    rule: dict[str, Any] = {
        "operators": ["op"],
        "tasks": ["segmentation"],
        "epsilon_per_study": 1.0,
        "hours": "20:00-06:00",
    }
    night = dt.datetime(2026, 1, 2, 23, 0).astimezone()
    day = dt.datetime(2026, 1, 2, 6, 0).astimezone()
    times = iter([night, night, day])
    site.home.policy.write_text(default_policy_text(policy(approve_automatically=rule)))
    standing = Standing(site.home, decision, clock=lambda: next(times))
    standing.begin(load_policy(site.home))
    standing.require()
    with refused("study.outside-hours"):
        standing.require()
    stricter = policy(approve_automatically={**rule, "epsilon_per_study": 0.5})
    for changed, code in ((policy(), "ended"), (stricter, "bounds")):
        with refused(f"study.automatic-{code}"):
            require_within_bounds(decision, changed, night)
    by_hand = store.decide(study, "approved", 5, "")
    require_within_bounds(by_hand, policy(), day)


# --- with a real worker, and the commands ------------------------------------------------------


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> JoinedSite:
    """A joined site with eight imported patients, which permits studies without privacy."""
    joined = hospital_with(tmp_path_factory.mktemp("hospital"), 8)
    rules = policy(minimal_cohort=2, permit_non_private=True)
    joined.home.policy.write_text(default_policy_text(rules))
    return joined


class Unreachable:
    """Stands where the connection does; refuses as often as it is told to."""

    def __init__(self) -> None:
        self.down = True
        self.heard: list[dict[str, Any]] = []

    def call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        if self.down:
            raise ConsiliumError("network.unreachable", "Nobody answers.")
        assert method == SITE_DECIDE
        self.heard.append(request)
        return {}


@pytest.fixture
def aggregator(monkeypatch: pytest.MonkeyPatch) -> Unreachable:
    line = Unreachable()

    @contextmanager
    def caller(_: SiteIdentity) -> Any:
        yield line

    monkeypatch.setattr(SiteIdentity, "caller", caller)
    return line


def test_a_real_worker_stops_and_its_process_ends(
    hospital: JoinedSite, aggregator: Unreachable
) -> None:
    plain = asked("none").to_canonical()
    plain["privacy"] = {"mode": "none"}
    plain["training"] |= {"steps_per_round": 5000, "batch_size": 4}
    study = Study.model_validate(plain)
    store = StudyStore(hospital.home)
    store.decide(study, "approved", declared_size(5), "")
    pool = WorkerPool(hospital.home)
    told = Instructions(study.digest, 0, declared_size(5))
    model = hospital.home.models / "model"
    model.write_bytes(pack(initial_weights(study)))
    seen: list[int] = []
    after: list[int] = []

    def progress(step: int, _: int) -> None:
        seen.append(step)
        if step == 3:
            withdraw(hospital.home, hospital.identity, study.digest[:10], "an audit")
            # Frames that waited in the pipe while this was committed are of steps before it.
            after.append(time.monotonic_ns())

    try:
        with refused("study.withdrawn"):
            pool.do("train", told, model, progress)
        # Of 5000: those that were done while the withdrawal was being written, and no more.
        assert seen[-1] < 2000
        assert time.monotonic_ns() - after[0] < 10e9
        assert pool._workers == {}
    finally:
        pool.end_all_but(set())
    assert store.updates(study.digest) == []
    assert [one.decision for one in store.untold()] == ["declined"]


def test_withdrawing_needs_no_connection_and_the_aggregator_is_told_later(
    hospital: JoinedSite, aggregator: Unreachable
) -> None:
    study = asked("none")
    store = StudyStore(hospital.home)
    home = ["--home", str(hospital.home.path)]
    answer = CliRunner().invoke(app, ["withdraw", study.name, "--why", "x", *home])
    assert answer.exit_code != 0
    assert "study.not-approved" in answer.output
    store.decide(study, "approved", 5, "")
    store.keep_update(study.digest, 0, b"an update", {})
    answer = CliRunner().invoke(app, ["withdraw", study.digest[:12], "--why", "x", *home])
    assert answer.exit_code == 0, answer.output
    for words in ("stops at its next step", "1 stored result stays here", "ledger keeps", "told"):
        assert words in answer.output, answer.output
    (untold,) = [one for one in store.untold() if one.study == study]
    assert (untold.decision, untold.why) == ("declined", "x")
    aggregator.down = False
    assert tell(hospital.home, hospital.identity, untold) is None
    assert [(row["decision"], row["why"]) for row in aggregator.heard] == [("declined", "x")]
    assert untold not in store.untold()
    # Declining what was decided here needs no list of the aggregator's either.
    assert decline(hospital.home, hospital.identity, study.digest[:12], "y").untold is None
