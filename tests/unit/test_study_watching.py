"""Watching outlives its connection, and its end is not the study's."""

from __future__ import annotations

from typing import Any

import pytest
from aggregator_samples import consilium

from consilium_common.errors import ConsiliumError
from consilium_server import watching
from consilium_server.watching import follow, log_view, one_line, round_view, study_view


def shown(**changes: Any) -> dict[str, Any]:
    """A study as `study show` gives it."""
    return {
        "digest": "ab" * 32,
        "name": "liver",
        "state": "running",
        "reason": "",
        "place": None,
        "waits_for": "",
        "pause_asked": False,
        "rounds_planned": 3,
        "rounds": [],
        "evaluations": [],
        "evaluation": {},
        "epsilon": {"north": 1.5},
        "evaluation_epsilon": {},
        "signatures": {"needed": 1, "missing": 0, "standing": ""},
        "alarms": [],
        "approvals": [
            {
                "site": "north",
                "decision": "approved",
                "cohort_size": 9,
                "evaluation_size": 3,
                "online": True,
            }
        ],
        "standing": {
            "round": 0,
            "seconds": 5.0,
            "deadline_seconds": 60.0,
            "seconds_left": 750.0,
            "waits_for": "",
            "sites": [{"site": "north", "state": "training", "step": 37, "steps": 120, "why": ""}],
        },
        **changes,
    }


def text_of(view: Any) -> str:
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


class Aggregator:
    """Answers in turn, or is away."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def __call__(self) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.0)


AWAY = ConsiliumError("network.unreachable", "Nobody answers.")


def test_watching_goes_on_when_the_aggregator_was_away() -> None:
    said: list[str] = []
    end = follow(
        Aggregator(shown(), AWAY, AWAY, shown(), AWAY, shown(state="finished")), said.append
    )
    assert end["state"] == "finished"
    assert said == [
        "liver: running, round 0/3",
        "the connection is lost, the study goes on; trying again (Nobody answers.)",
        "connected again",
        "the connection is lost, the study goes on; trying again (Nobody answers.)",
        "connected again",
        "liver: finished, round 0/3",
    ]


def test_ten_minutes_away_are_enough_to_give_up_and_a_refusal_is_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert watching._PATIENCE_SECONDS >= 600
    clock = iter(range(0, 100_000, 150))
    monkeypatch.setattr(watching.time, "monotonic", lambda: float(next(clock)))
    away = Aggregator(*[AWAY] * 50)
    with pytest.raises(ConsiliumError):
        follow(away, lambda _: None)
    assert len(away.answers) == 50 - 5
    refused = Aggregator(ConsiliumError("identity.refused", "No."), shown())
    with pytest.raises(ConsiliumError):
        follow(refused, lambda _: None)
    assert len(refused.answers) == 1


def test_control_c_ends_the_watching_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from contextlib import nullcontext

    from consilium_common.identity import personal

    monkeypatch.setattr(personal, "connect", lambda *_: nullcontext(None))

    def interrupted(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "follow", interrupted)
    assert consilium("study", "watch", "liver", "--home", tmp_path) == "run.interrupted"


def test_the_live_view_says_what_each_site_does_and_how_long_it_takes() -> None:
    view = text_of(study_view(shown()))
    assert "training step 37/120" in view
    assert "about 12 min left" in view
    assert "1.500" in view
    paused = text_of(study_view(shown(pause_asked=True)))
    assert "pauses after this round" in paused
    queued = shown(state="queued", place=2, waits_for="1 of the 2 sites it needs are online")
    assert "place 2: 1 of the 2 sites" in text_of(study_view(queued))
    assert one_line(queued) == (
        "liver: queued, place 2: 1 of the 2 sites it needs are online, round 0/3"
    )
    full = shown(state="paused", reason="the aggregator has no room left")
    assert "no room left" in one_line(full)


def test_a_round_s_table_says_each_site_s_part() -> None:
    part = {
        "site": "north",
        "outcome": "left-out",
        "why": "far from the others",
        "seconds": 2.5,
        "norm": None,
        "cosine": -0.5,
        "clipped": True,
        "staleness": 3,
    }
    view = text_of(round_view({"parts": [part]}))
    for words in ("left-out", "2.5", "–", "-0.5", "yes", "3", "far from the others"):
        assert words in view


def test_the_log_is_in_the_order_of_time() -> None:
    view = text_of(
        log_view(
            {
                "history": [
                    {
                        "from": "",
                        "to": "draft",
                        "who": "ada",
                        "why": "w1",
                        "at": "2026-01-01T00:00",
                    },
                    {"from": "a", "to": "b", "who": "bob", "why": "w3", "at": "2026-01-03T00:00"},
                ],
                "rounds": [
                    {
                        "number": 0,
                        "seconds": 2.0,
                        "sites": ["north"],
                        "dropped": {"south": "late"},
                        "ended_at": "2026-01-02T00:00",
                    }
                ],
            }
        )
    )
    lines = [line for line in view.splitlines() if "2026" in line]
    assert len(lines) == 3
    assert "w1" in lines[0]
    assert "south left out: late" in lines[1]
    assert "w3" in lines[2]
