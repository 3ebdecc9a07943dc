"""Whom a round asks, how long it waits for whom, and who is asked no more."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_samples import SITES, House, SitesGrid, a_study

from consilium_client.greeting import read_greeting
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights
from consilium_common.study import Study
from consilium_common.study.federation import Federation
from consilium_common.wire.methods import PROTOCOL
from consilium_server import asking as asking_module
from consilium_server import tables
from consilium_server.arrivals import ArrivalLists
from consilium_server.asking import Answer, Asking
from consilium_server.benching import Benches, benched
from consilium_server.round_tables import SiteRound, site_rounds
from consilium_server.rounds import training
from consilium_server.rounds.context import Run
from consilium_server.rounds.deadlines import Deadline, deadline_seconds, slowest
from consilium_server.rounds.drawing import Drawing
from consilium_server.tables import Member, Round, now


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


def drawing(count: int) -> Study:
    return a_study(federation={"sites_per_round": count, "quorum": 1})


# --- who is asked ------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 50))
def test_every_site_is_drawn_as_often_as_any_other(sites: int, count: int, crash: int) -> None:
    study = drawing(min(count, sites))
    names = [f"s{n}" for n in range(sites)]
    random: dict[str, Any] = {}
    again: dict[str, Any] = {}
    asked: Counter[str] = Counter()
    for number in range(60):
        draw = Drawing(study, random)
        draw.begin(names)
        order = draw.order(names)[: draw.count]
        if number == crash:
            repeat = Drawing(study, again)
            repeat.begin(set(names))
            assert repeat.order(names)[: draw.count] == order
        draw.note(order)
        asked.update(order)
        random = again = draw.state()
        assert max(asked.values()) - min(asked[name] for name in names) <= 1


def test_a_site_that_joins_later_makes_up_for_nothing() -> None:
    study = drawing(1)
    random: dict[str, Any] = {}
    for _ in range(10):
        draw = Drawing(study, random)
        draw.begin(["a", "b"])
        draw.note(draw.order(["a", "b"])[:1])
        random = draw.state()
    asked = []
    for _ in range(6):
        draw = Drawing(study, random)
        draw.begin(["a", "b", "new"])
        asked += draw.order(["a", "b", "new"])[:1]
        draw.note(asked[-1:])
        random = draw.state()
    assert Counter(asked) == {"a": 2, "b": 2, "new": 2}


def test_the_draw_is_part_of_the_study_and_not_of_the_machine() -> None:
    orders = []
    for seed in (1, 1, 2):
        draw = Drawing(a_study(federation={"sites_per_round": 2}, training={"seed": seed}), {})
        draw.begin(SITES)
        orders.append(draw._ties)
    assert orders[0] == orders[1] != orders[2]


def test_a_drawn_round_asks_so_many_and_the_model_is_theirs(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"sites_per_round": 2, "rounds": 3, "quorum": 2}))
    house.run()
    rounds = [row["sites"] for row in house.show()["rounds"]]
    assert all(len(sites) == 2 for sites in rounds)
    assert Counter(site for sites in rounds for site in sites) == dict.fromkeys(SITES, 2)


def test_one_that_was_drawn_and_fails_is_replaced_by_another(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"sites_per_round": 2, "rounds": 1, "quorum": 2}))
    drawn: list[str] = []

    def first_fails(site: str, kind: str, number: int) -> None:
        if kind != "train":
            return
        drawn.append(site)
        if len(drawn) == 1:
            raise ConsiliumError("run.failed", "Not now.")

    house.answers.instead = first_fails
    house.run()
    (row,) = house.show()["rounds"]
    assert len(drawn) == 3
    assert row["sites"] == sorted(drawn[1:])
    assert row["dropped"] == {drawn[0]: "run.failed: Not now."}


def test_the_cyclic_strategy_goes_from_site_to_site(tmp_path: Path) -> None:
    study = a_study(federation={"strategy": {"name": "cyclic"}, "quorum": 1, "rounds": 5})
    house = House(tmp_path, study)
    house.run()
    asked = [row["sites"] for row in house.show()["rounds"]]
    assert asked == [["east"], ["north"], ["south"], ["east"], ["north"]]
    start = initial_weights(study)
    for name in house.answers.trained:
        np.testing.assert_allclose(house.model[name] - start[name], 1 + 2 + 3 + 1 + 2, rtol=1e-5)


# --- how long ----------------------------------------------------------------------------------


def test_a_learned_deadline_is_three_times_the_usual_slowest_site_within_bounds() -> None:
    learned = Federation(deadline_seconds="learned", deadline_bound_seconds=600)
    assert deadline_seconds(Federation(deadline_seconds=7), [1000.0]) == 7
    assert deadline_seconds(learned, [50.0]) == 600
    assert deadline_seconds(learned, [50.0, 70.0]) == 180
    assert deadline_seconds(learned, [1.0, 1.0, 1.0]) == 30
    assert deadline_seconds(learned, [50.0] * 5 + [500.0]) == 150
    assert deadline_seconds(learned, [400.0] * 5) == 600


def test_a_round_with_a_late_site_counts_with_its_whole_length(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"deadline_seconds": "learned"}))
    run = Run(house.study, house.study.digest, tmp_path, house.registry, None)  # type: ignore[arg-type]
    with house.registry.transaction() as session:
        for number, outcome in enumerate(["accepted", "late", "failed"]):
            of = {"digest": house.study.digest, "number": number}
            session.add(Round(**of, seconds=100.0, sites=[], dropped={}))
            session.add(SiteRound(**of, site="east", outcome="accepted", seconds=10.0 + number))
            session.add(SiteRound(**of, site="north", outcome=outcome))
    assert slowest(run, 3) == [10.0, 100.0, 12.0]


def test_grace_begins_at_the_deadline_or_at_the_quorum_whichever_is_later() -> None:
    deadline = Deadline(Federation(grace_seconds=5), 10.0, 100.0)
    assert not deadline.over(1e9), "without a quorum a round does not end"
    deadline.note_quorum(103.0)
    assert deadline.silent(110.0)
    assert not deadline.over(114.9)
    assert deadline.over(115.0)
    late = Deadline(Federation(grace_seconds=5), 10.0, 100.0)
    late.again(125.0)
    assert not late.silent(130.0)
    late.note_quorum(130.0)
    late.note_quorum(134.0)
    assert not late.over(134.9)
    assert late.over(135.0)


def test_a_late_reply_counts_neither_in_its_round_nor_in_the_next(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"deadline_seconds": 0.5, "weighting": "uniform"}))
    house.answers.slow = {"south"}

    def late(site: str, kind: str, number: int) -> Any:
        if (kind, number) == ("train", 1):
            house.answers.slow = set()  # and now it answers round 0 first, then this one

    house.answers.instead = late
    house.run()
    first, second = house.show()["rounds"]
    assert (first["sites"], first["dropped"]) == (
        ["east", "north"],
        {"south": "no reply before the deadline"},
    )
    assert second["sites"] == list(SITES)
    start = initial_weights(house.study)
    for name in house.answers.trained:
        np.testing.assert_allclose(house.model[name] - start[name], 1.5 + 2.0, rtol=1e-5)
    assert [row.round for row in house.registry.received("south")] == [1]
    outcomes = [part.outcome for part in site_rounds(house.registry, house.study.digest)[0]]
    assert outcomes == ["accepted", "accepted", "late"]


def test_arrivals_are_counted_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, a_study(federation={"rounds": 3}))
    jumps = iter([1e9, -1e9, 3e8, 0.0] * 100)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + next(jumps)) * 1e9))
    house.run()
    assert [row["sites"] for row in house.show()["rounds"]] == [list(SITES)] * 3
    counts = ArrivalLists(house.home.arrived)
    before = counts.of("1")
    counts.add("1", "a")
    between = counts.of("1")
    counts.add("1", "b")  # in the same tick of any clock
    assert before < between < counts.of("1")
    assert (counts.since("1", before), counts.since("1", between)) == ({"a", "b"}, {"b"})


def test_a_site_that_went_away_and_is_back_before_the_round_is_over_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_module, "_GONE_SECONDS", 0.02)
    monkeypatch.setattr(training, "_BACK_SECONDS", 0.02)
    house = House(tmp_path, a_study(federation={"rounds": 1}))
    house.answers.slow = {"east", "south"}
    answered: list[str] = []
    house.answers.instead = lambda site, kind, number: answered.append(site)
    real = Asking.answers

    def meanwhile(asking: Asking) -> Iterable[Answer]:
        """South is started anew and loses its message; east answers after it is back."""
        asked = {(sent.site.name, sent.site.session) for sent in asking._under_way}
        if asked == {("east", None), ("south", None)}:
            with house.registry.transaction() as session:
                session.get_one(Member, "south").session = "another"
        elif asked == {("east", None), ("south", "another")}:
            house.answers.slow = {"east"}
        elif asked == {("east", None)} and "south" in answered:
            house.answers.slow = set()
        asking.participants()  # and whoever is not slow any more answers
        return real(asking)

    monkeypatch.setattr(Asking, "answers", meanwhile)
    house.run()
    (row,) = house.show()["rounds"]
    assert (row["sites"], row["dropped"]) == (list(SITES), {})
    assert answered.count("south") == 3, "lost, sent anew, and the evaluation"


def test_a_clock_that_is_set_forward_makes_no_site_seem_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, a_study())
    house.answers.slow = set(SITES)
    asking = Asking(house.home, house.registry, house.study, SitesGrid(house.home, house.answers))
    model = tmp_path / "model"
    model.write_bytes(b"model")

    def left() -> list[str]:
        asking._look_for_gone = 0.0
        return sorted(answer.site.name for answer in asking.answers())

    asking.send(asking.participants(), 0, asking.files.offer(model), "train")
    assert left() == []
    with house.registry.transaction() as session:
        for site in SITES:
            session.get_one(Member, site).last_seen = now()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    monkeypatch.setattr(tables, "seconds_since", lambda moment: 3600.0)
    assert left() == [], "an hour has passed for the clock, not for the sites"
    monkeypatch.setattr(asking, "_trusted_from", 0.0)
    assert left() == list(SITES), "they have had the time to greet, and have not"


# --- who is benched ----------------------------------------------------------------------------


def test_a_site_that_fails_three_rounds_running_is_asked_no_more_and_comes_back(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, a_study(federation={"rounds": 17}))
    asked: list[int] = []

    def broken(site: str, kind: str, number: int) -> Any:
        if (site, kind) == ("south", "train"):
            asked.append(number)
            raise ConsiliumError("run.failed", "Its GPU is broken.")

    house.answers.instead = broken
    house.run()
    # Ten rounds later it is tried once, and sits out again.
    assert asked == [0, 1, 2, 13]
    assert len(house.show()["rounds"]) == 17
    why = benched(house.registry, house.study.digest, {"south": None, "north": None})
    assert list(why) == ["south"]
    assert "rounds 2, 3, 14; the last time: run.failed: Its GPU is broken." in why["south"]
    assert "Asked again after round 24" in why["south"]
    assert benched(house.registry, house.study.digest, {"south": "started anew"}) == {}
    # Operators see it while the study runs.
    house._set(state="running")
    seen = {one["site"]: one for one in house.show()["standing"]["sites"]}
    assert (seen["south"]["state"], seen["south"]["why"]) == ("benched", why["south"])
    assert seen["north"]["state"] == "waiting"
    # The site is told so with the answer to its next greeting.
    benches = Benches(house.registry)
    told = benches.of("south", [house.study.digest])
    answer = {
        "version": "1",
        "protocol": PROTOCOL,
        "running": [],
        "time": now(),
        "trust": "",
        "renew": False,
        "benched": {digest: f"{why}\x1b[2J" for digest, why in told.items()},
    }
    read = read_greeting(json.dumps(answer).encode()).benched[house.study.digest]
    assert read == why["south"] + "[2J", "nothing that the site's terminal would obey"
    assert benches.of("north", [house.study.digest]) == {}


def test_where_the_quorum_needs_it_a_benched_site_is_asked(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"quorum": 3, "rounds": 1}))
    with house.registry.transaction() as session:
        for number in (-3, -2, -1):
            session.add(
                SiteRound(digest=house.study.digest, number=number, site="south", outcome="failed")
            )
    assert list(benched(house.registry, house.study.digest, {"south": None})) == ["south"]
    house.run()
    assert house.show()["rounds"][0]["sites"] == list(SITES)
