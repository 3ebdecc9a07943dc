"""A study changes state as the table permits and no other way, and its history says each change."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_samples import add_study, put, way

from consilium_common.errors import ConsiliumError
from consilium_server.registry import Registry
from consilium_server.states import ENDED, TRANSITIONS, State, change


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("states") / "registry.db")


def test_every_state_is_reached_from_a_draft_and_only_finished_is_for_good() -> None:
    for state in State:
        assert state is State.DRAFT or way(State.DRAFT, state)
        assert (state is State.FINISHED) == (not TRANSITIONS[state])
    # What a person ended, or an error did, can be run on.
    assert all(State.QUEUED in TRANSITIONS[state] for state in ENDED - {State.FINISHED})


@settings(max_examples=25, deadline=None)
@given(wanted=st.lists(st.sampled_from(State), max_size=12), number=st.integers(0, 10**9))
def test_whatever_is_asked_the_history_is_a_way_through_the_table(
    registry: Registry, wanted: list[State], number: int
) -> None:
    name = f"s{number}-{len(registry.studies())}"
    digest = add_study(registry, name, state="draft")
    for to in wanted:
        before = State(registry.study(digest).state)
        try:
            registry.set_study_state(digest, to, f"to {to}", who="ada")
            assert to in TRANSITIONS[before]
        except ConsiliumError as error:
            assert to not in TRANSITIONS[before]
            assert error.code == f"study.{before}"
            assert registry.study(digest).state == before
    at = State.DRAFT
    for event in registry.history(digest):
        assert (event.before, event.who, event.why) == (at, "ada", f"to {event.after}")
        at = State(event.after)
    assert registry.study(digest).state == at


def test_a_change_that_does_not_hold_any_more_changes_nothing(registry: Registry) -> None:
    digest = add_study(registry, "conditions")
    put(registry, digest, "running")
    events = len(registry.history(digest))
    with registry.transaction() as session:
        assert not change(session, digest, State.STOPPED, "", only_from={State.QUEUED})
        assert not change(session, digest, State.FAILED, "", only_run="17")
    assert registry.study(digest).state == "running"
    assert len(registry.history(digest)) == events


def test_of_many_who_start_a_study_at_once_one_does(registry: Registry) -> None:
    digest = add_study(registry, "raced")
    put(registry, digest, "queued")
    began: list[bool] = []
    start = threading.Barrier(6)

    def attempt() -> None:
        start.wait(10)
        with registry.transaction() as session:
            began.append(change(session, digest, State.RUNNING, "", only_from={State.QUEUED}))

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(began) == [False] * 5 + [True]
    assert sum(event.after == "running" for event in registry.history(digest)) == 1


def test_a_study_that_runs_on_has_no_end_any_more(registry: Registry) -> None:
    digest = add_study(registry, "again")
    put(registry, digest, "running")
    started = registry.study(digest).started_at
    registry.set_study_state(digest, "running", "begun again")
    assert registry.study(digest).started_at == started
    registry.set_study_state(digest, "failed", "it broke")
    found = registry.study(digest)
    assert found.ended_at is not None
    assert found.reason == "it broke"
    put(registry, digest, "running")
    assert registry.study(digest).ended_at is None


def test_a_draft_is_shown_to_no_site(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.db")
    digest = add_study(registry, "quiet", state="draft")
    assert not registry.study(digest).proposed_to("north")
    put(registry, digest, "proposed")
    assert registry.study(digest).proposed_to("north")
