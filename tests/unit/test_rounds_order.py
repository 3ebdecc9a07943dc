"""Whom a round asks, how long it waits for whom, and who is asked no more."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_samples import SITES, House, SitesGrid, a_study
from site_samples import joined_site
from sqlalchemy.orm import make_transient
from test_link import Aggregator

from consilium_client import link as link_module
from consilium_client.greeting import Greeting
from consilium_client.link import Link
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import initial_weights
from consilium_common.study import Study
from consilium_common.study.federation import Federation
from consilium_common.wire.methods import PROTOCOL
from consilium_server import asking as asking_module
from consilium_server import tables
from consilium_server.arrivals import ArrivalLists
from consilium_server.asking import Answer, Asking
from consilium_server.benching import benched
from consilium_server.round_tables import SiteRound, site_rounds
from consilium_server.rounds import training
from consilium_server.rounds.context import Run
from consilium_server.rounds.deadlines import Deadline, deadline_seconds, slowest
from consilium_server.rounds.drawing import Drawing
from consilium_server.services.of_sites import SiteServices
from consilium_server.tables import Member, Progress, Round, now


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


def test_a_site_that_approves_during_a_round_takes_part_from_the_next_on(tmp_path: Path) -> None:
    house = House(tmp_path, a_study())
    (approval,) = [
        one for one in house.registry.approvals(house.study.digest) if one.site == "south"
    ]
    with house.registry.transaction() as session:
        session.delete(session.merge(approval))

    def approves(site: str, kind: str, number: int) -> None:
        if (site, kind, number) == ("east", "train", 0):
            with house.registry.transaction() as session:
                make_transient(approval)
                session.add(approval)

    house.answers.instead = approves
    house.run()
    assert [row["sites"] for row in house.show()["rounds"]] == [["east", "north"], list(SITES)]
    assert house.show()["evaluations"][-1]["sites"] == list(SITES)


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


def test_who_answers_in_the_grace_after_the_deadline_is_shown_as_late_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = {"deadline_seconds": 0.3, "grace_seconds": 60, "rounds": 1, "weighting": "uniform"}
    house = House(tmp_path, a_study(federation=federation))
    house.answers.slow = {"south"}
    seen: list[str] = []
    real = Asking.answers

    def until_it_is_shown(asking: Asking) -> Iterable[Answer]:
        (south,) = [s for s in house.show()["standing"]["sites"] if s["site"] == "south"]
        seen.append(south["state"])
        if south["state"] == "late":
            house.answers.slow = set()
            asking.participants()  # and whoever is not slow any more answers
        return real(asking)

    monkeypatch.setattr(Asking, "answers", until_it_is_shown)
    house.run()
    (row,) = house.show()["rounds"]
    assert (row["sites"], row["dropped"]) == (list(SITES), {})
    assert 0.3 < row["seconds"] < 60, "the round ends with the last answer, not with the grace"
    assert "late" in seen
    start = initial_weights(house.study)
    for name in house.answers.trained:
        np.testing.assert_allclose(house.model[name] - start[name], 2.0, rtol=1e-5)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_HELLO_SECONDS", 0.01)
    house = House(tmp_path / "aggregator", a_study(federation={"rounds": 17}))
    session = "since this morning"
    with house.registry.transaction() as transaction:
        transaction.get_one(Member, "south").session = session
    asked: list[int] = []

    def broken(site: str, kind: str, number: int) -> Any:
        if (site, kind) == ("south", "train"):
            asked.append(number)
            if number in (1, 13):  # an update that cannot be used counts like no update
                return house.answers.delivered(site, b"no tensors")
            raise ConsiliumError("run.failed", "Its GPU is broken.")
        return None

    house.answers.instead = broken
    house.run()
    # Ten rounds later it is tried once, and sits out again.
    assert asked == [0, 1, 2, 13]
    assert len(house.show()["rounds"]) == 17
    why = benched(house.registry, house.study.digest, {"south": session, "north": None})
    assert list(why) == ["south"]
    assert "rounds 2, 3, 14; the last time: run.bad-update: The file of" in why["south"]
    assert "declares. Asked again after round 24" in why["south"]
    assert benched(house.registry, house.study.digest, {"south": "started anew"}) == {}
    # Operators see it while the study runs.
    house._set(state="running")
    seen = {one["site"]: one for one in house.show()["standing"]["sites"]}
    assert (seen["south"]["state"], seen["south"]["why"]) == ("benched", why["south"])
    assert seen["north"]["state"] == "waiting"
    # The site is told so with the answer to its next greeting, and its operator in a line.
    answer = greeted(house, "south", session)
    assert answer["benched"] == {house.study.digest: why["south"]}
    answer["benched"] = {house.study.digest: f"{why['south']}\x1b[2J"}
    words = f"study {house.study.digest[:12]} does not ask this site for now: {why['south']}"
    lines = said_at_site(tmp_path / "site", answer)
    assert [line for line in lines if "for now" in line] == [f"{words}[2J"], (
        "once, and nothing that the site's terminal would obey"
    )
    assert greeted(house, "north", "any")["benched"] == {}
    assert greeted(house, "south", "started anew")["benched"] == {}


def greeted(house: House, site: str, session: str) -> dict[str, Any]:
    """Return what the aggregator answers to a site's greeting."""
    issuer: Any = SimpleNamespace(trust=SimpleNamespace(digest=""))
    unused: Any = None
    member = house.registry.site(site)
    member.next_serial = "2"  # it was renewed a moment ago: its certificate is not looked at
    peer: Any = SimpleNamespace(name=site, member=member, address="192.0.2.7")
    said = {"version": "1", "protocol": PROTOCOL, "session": session}
    answer = SiteServices(house.registry, issuer, unused, unused).hello(peer, said)
    return dict(asyncio.run(answer))


def said_at_site(folder: Path, answer: dict[str, Any]) -> list[str]:
    """Return what a site tells its operator that gets this answer to two greetings."""
    site, said = joined_site(folder), list[str]()
    heard: asyncio.Queue[Greeting] = asyncio.Queue()

    async def scenario() -> None:
        link = Link(site.home, site.identity, said.append, heard.put_nowait)
        await link._connection.close()
        link._connection = Aggregator(canonical_json(answer))  # type: ignore[assignment]
        greeting = asyncio.create_task(link.hello_for_ever())
        for _ in range(2):
            await asyncio.wait_for(heard.get(), 30)
        greeting.cancel()
        await link.close()

    asyncio.run(scenario())
    return said


@pytest.mark.parametrize("other", ["training", None])
def test_a_site_that_is_late_over_another_study_s_work_is_not_benched(
    tmp_path: Path, other: str | None
) -> None:
    house = House(tmp_path, a_study(federation={"rounds": 4, "deadline_seconds": 0.3}))
    house.answers.slow = {"south"}

    def at_work(site: str, kind: str, number: int) -> None:
        if kind == "evaluate":
            house.answers.slow = set()
        if other is not None:
            said = {"phase": other, "round": 7, "step": number, "steps": 9, "at": now()}
            with house.registry.transaction() as session:
                session.merge(Progress(site="south", digest="f" * 64, **said))

    with house.registry.transaction() as session:
        old = {"phase": "sending", "round": 6, "step": 0, "steps": 0}
        at = "2020-01-01T00:00:00+00:00"
        session.add(Progress(site="south", digest="f" * 64, at=at, **old))
    house.answers.instead = at_work
    house.run()
    dropped = [row["dropped"].get("south") for row in house.show()["rounds"]]
    out = benched(house.registry, house.study.digest, {"south": None})
    if other is not None:
        assert (dropped, out) == (["it was at work on another study"] * 4, {})
    else:
        assert (dropped, list(out)) == (["no reply before the deadline"] * 3 + [None], ["south"])


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
