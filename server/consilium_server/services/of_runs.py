"""What an operator may call about a study's runs: queue, pause, resume, stop; and their history."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.wire import methods
from consilium_server.gateway import Service
from consilium_server.lifecycle import ask_pause, require_approval, settle_approval
from consilium_server.overview import history_overview, queue_place, round_overview
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler, waits_for
from consilium_server.services.fields import number, text
from consilium_server.starts import PublicStarts
from consilium_server.states import State, change, not_permitted
from consilium_server.tables import StudyRow

#: Priorities are small: people compare them.
_HIGHEST: Final = 100


@dataclass
class RunServices:
    """The handlers, over one registry and one scheduler."""

    registry: Registry
    scheduler: Scheduler
    starts: PublicStarts

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.OPERATOR_RUN: self.run,
            methods.OPERATOR_PAUSE: self.pause,
            methods.OPERATOR_RESUME: self.resume,
            methods.OPERATOR_STOP: self.stop,
            methods.OPERATOR_LOG: self.log,
        }

    async def run(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Queue a study, from its last finished round; it starts now where it can.

        ``priority`` from -100 to 100 may be given; with it a queued study moves in the queue.
        """
        row = self.registry.study(text(request, "digest"))
        priority = _priority(request)
        if row.state == State.QUEUED and priority is not None and priority != row.priority:
            return await self._queue(
                row, State.QUEUED, f"priority {priority} by {peer.name}", peer, priority=priority
            )
        if row.state in (State.PROPOSED, State.APPROVED):
            lacking = settle_approval(self.registry, row)
            if lacking is not None:
                raise lacking
        elif row.state not in (State.STOPPED, State.FAILED):
            raise not_permitted(row.digest, State(row.state), State.QUEUED)
        return await self._queue(
            row,
            State(row.state) if row.state != State.PROPOSED else State.APPROVED,
            f"queued by {peer.name}",
            peer,
            priority=row.priority if priority is None else priority,
        )

    async def resume(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Let a paused study go on from its last finished round."""
        row = self.registry.study(text(request, "digest"))
        if row.state == State.RUNNING and row.pause_by is not None:
            with self.registry.transaction() as session:
                why = f"{peer.name} wants it to go on"
                change(session, row.digest, State.RUNNING, why, who=peer.name, pause_by=None)
            return self._answer(row.digest)
        if row.state != State.PAUSED:
            raise ConsiliumError(
                "study.not-paused",
                f"The study is {row.state}, not paused.",
                hint=f"See `consilium study show {row.digest[:12]}`.",
            )
        return await self._queue(row, State.PAUSED, f"resumed by {peer.name}", peer)

    async def pause(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Pause a study after the round under way; with ``now`` at once, and the round is lost."""
        row = self.registry.study(text(request, "digest"))
        if row.state not in (State.QUEUED, State.RUNNING):
            raise _not_running(row)
        if request.get("now") is not True:
            await asyncio.to_thread(ask_pause, self.registry, row, peer.name)
            return self._answer(row.digest)
        return await self._end(row, State.PAUSED, f"paused by {peer.name}", peer)

    async def stop(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Stop a study after what is done; it can be run on later."""
        row = self.registry.study(text(request, "digest"))
        if row.state not in (State.QUEUED, State.RUNNING, State.PAUSED):
            raise _not_running(row)
        return await self._end(row, State.STOPPED, f"stopped by {peer.name}", peer)

    async def log(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return the changes of a study's state, and its rounds with what was left out.

        With ``round`` (from 0) each site's part in that round alone.
        """
        row = self.registry.study(text(request, "digest"))
        if "round" in request:
            wanted = number(request, "round")
            return await asyncio.to_thread(round_overview, self.registry, row, wanted)
        return await asyncio.to_thread(history_overview, self.registry, row)

    async def _queue(
        self, row: StudyRow, before: State, why: str, peer: Peer, **values: Any
    ) -> Any:
        require_approval(self.registry, row)
        self.starts.require(row.study)
        with self.registry.transaction() as session:
            queued = change(
                session,
                row.digest,
                State.QUEUED,
                why,
                who=peer.name,
                only_from={before},
                failures=0,
                not_before=None,
                pause_by=None,
                goes_on_with="",
                **values,
            )
        if not queued:  # somebody else was first
            raise not_permitted(
                row.digest, State(self.registry.study(row.digest).state), State.QUEUED
            )
        await self.scheduler.look()
        return self._answer(row.digest)

    async def _end(self, row: StudyRow, to: State, why: str, peer: Peer) -> Any:
        with self.registry.transaction() as session:
            change(session, row.digest, to, why, who=peer.name, pause_by=None, goes_on_with="")
        await self.scheduler.end_run(row.flower_run)
        return self._answer(row.digest)

    def _answer(self, digest: str) -> dict[str, Any]:
        row = self.registry.study(digest)
        queued = row.state == State.QUEUED
        return {
            "digest": row.digest,
            "name": row.name,
            "state": row.state,
            "priority": row.priority,
            "place": queue_place(self.registry, row),
            "waits_for": waits_for(self.registry, row) if queued else "",
            "pause_asked": row.pause_by is not None,
        }


def _priority(request: dict[str, Any]) -> int | None:
    value = request.get("priority")
    if value is None:
        return None
    if type(value) is not int or not -_HIGHEST <= value <= _HIGHEST:
        raise ConsiliumError(
            "usage.priority",
            f"A priority is a whole number from {-_HIGHEST} to {_HIGHEST}.",
            hint="Leave it out for 0.",
        )
    return value


def _not_running(row: StudyRow) -> ConsiliumError:
    return ConsiliumError(
        "study.not-running",
        f"The study is {row.state}, neither queued nor running.",
        hint=f"See `consilium study show {row.digest[:12]}`.",
    )
