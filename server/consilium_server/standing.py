"""Where the round under way stands: what each site does now, since when, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from consilium_server.benching import benched
from consilium_server.registry import Registry
from consilium_server.round_tables import ACCEPTED, ASKED, LATE, RoundNow, round_now
from consilium_server.states import State
from consilium_server.tables import Approval, Progress, Round, StudyRow, seconds_since

#: Time left is learned from so many rounds: conditions change over days.
_RECENT: Final = 5
#: What a site says when its work is done and its answer is on the way.
_SENDING: Final = frozenset({"sending", "uploading"})
#: Phases with steps that can be counted.
_STEPPING: Final = frozenset({"training", "evaluating", "counting"})


def round_standing(
    registry: Registry,
    row: StudyRow,
    rounds: Sequence[Round],
    approvals: Sequence[Approval],
    online: Mapping[str, bool],
) -> dict[str, Any]:
    """Return the round under way as plain values.

    ``sites`` holds one ``{"site", "state", "step", "steps", "why"}`` for each that approved:
    ``away``, ``waiting``, ``downloading``, ``training``, ``evaluating``, ``counting``,
    ``uploading``, ``done``, ``late``, ``failed``, ``left-out`` or ``benched``, with the reason of
    the last four; none while the study does not run. Whoever has not answered when the deadline is
    over is late, also while it is waited for in grace or for want of a quorum. ``seconds`` since
    the round began and ``seconds_left`` of the whole study are None where the study does not run,
    or where no round has ended yet. ``waits_for`` says in words what holds the round up.
    """
    if row.state != State.RUNNING:
        return {
            "round": len(rounds),
            "seconds": None,
            "deadline_seconds": None,
            "seconds_left": None,
            "waits_for": "",
            "sites": [],
        }
    number = len(rounds)
    now = round_now(registry, row.digest)
    if now is not None and now.number != number:
        now = None  # of the round before; a short round is not shown at all
    out = benched(registry, row.digest, {one.name: one.session for one in registry.sites()})
    out = {site: why for site, why in out.items() if now is None or site not in now.sites}
    said = {one.site: one for one in registry.progress(row.digest) if one.round == number}
    seconds = seconds_since(_began(row, rounds) if now is None else now.began_at)
    return {
        "round": number,
        "seconds": seconds,
        "deadline_seconds": None if now is None else now.deadline_seconds,
        "seconds_left": _left(row, rounds, seconds),
        "waits_for": "" if now is None else now.waits_for,
        "sites": [
            _site(one.site, said.get(one.site), now, online=online.get(one.site, False))
            | ({"state": "benched", "why": out[one.site]} if one.site in out else {})
            for one in approvals
            if one.decision == "approved"
        ],
    }


def _site(
    name: str, said: Progress | None, now: RoundNow | None, *, online: bool
) -> dict[str, Any]:
    outcome = ASKED if now is None else now.sites.get(name)
    stepping = False
    if outcome == ACCEPTED:
        state = "done"
    elif outcome not in (None, ASKED):
        state = str(outcome)
    elif not online:
        state = "away"
    elif outcome is None or said is None:
        state = "waiting"
    else:
        state = "uploading" if said.phase in _SENDING else said.phase
        stepping = said.phase in _STEPPING
    why = "" if now is None else now.why.get(name, "")
    if outcome == ASKED and online and now is not None and _overdue(name, now):
        state, why = LATE, f"{state} past the deadline"
    return {
        "site": name,
        "state": state,
        "step": said.step if stepping and said is not None else 0,
        "steps": said.steps if stepping and said is not None else 0,
        "why": why,
    }


def _overdue(name: str, now: RoundNow) -> bool:
    asked_at = now.asked_at.get(name)
    return asked_at is not None and seconds_since(asked_at) > now.deadline_seconds


def _began(row: StudyRow, rounds: Sequence[Round]) -> str | None:
    # After a pause the clock starts with the run, not with the round before it.
    ended = rounds[-1].ended_at if rounds else ""
    return max(ended, row.started_at or "") or None


def _left(row: StudyRow, rounds: Sequence[Round], seconds: float) -> float | None:
    """Return the seconds until the study ends if its rounds go on as the last ones did."""
    if not rounds:
        return None
    of_one = fmean(one.seconds for one in rounds[-_RECENT:])
    to_do = int(row.canonical["federation"]["rounds"]) - len(rounds)
    return of_one * to_do - min(seconds, of_one) if to_do > 0 else 0.0
