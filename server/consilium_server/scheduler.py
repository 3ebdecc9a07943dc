"""Starts queued studies when their sites are there and free, and begins dead runs again."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Final, Protocol

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.errors import ConsiliumError
from consilium_server import lifecycle
from consilium_server.home import ServerHome
from consilium_server.lifecycle import approved, quorum_of
from consilium_server.registry import Registry
from consilium_server.reserve import RESERVE_BYTES, Reserve
from consilium_server.states import State, change
from consilium_server.tables import Member, StudyRow

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.5
#: Room for a study that ran out of it: so many times its largest file, and this for its records.
_FILES_OF_ROOM: Final = 4
_LEAST_ROOM: Final = 2 * RESERVE_BYTES
#: With less than this left, the disk is full.
_FULL: Final = 2 * 2**20


class Runs(Protocol):
    """Starts and stops Flower runs."""

    def start_run(self, digest: str) -> int:
        """Start a run for a study; returns its id."""
        ...

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended stays as it is."""
        ...


class Scheduler:
    """Looks at the studies twice a second, and at once when an operator wants something.

    Parameters
    ----------
    runs : Runs
        The SuperLink.
    ready : callable
        Whether the SuperLink is there and knows the sites; nothing is started before.
    """

    def __init__(
        self, home: ServerHome, registry: Registry, runs: Runs, ready: Callable[[], bool]
    ) -> None:
        self._home = home
        self._registry = registry
        self._runs = runs
        self._ready = ready
        self._reserve = Reserve(home.run)
        self._lock = asyncio.Lock()
        self._said = ""
        self._settled: tuple[object, ...] = ()
        #: Of each study that waits after a death: until when it was told to, and until when it
        #: does, by a clock that nobody sets.
        self._waits: dict[str, tuple[str, float]] = {}

    async def run_for_ever(self) -> None:
        """Look again and again until cancelled; what goes wrong is said once and tried again."""
        while True:
            try:
                await self.look()
                self._said = ""
            except (ConsiliumError, SQLAlchemyError, OSError) as error:
                if str(error) != self._said:
                    self._said = str(error)
                    _log.error("studies cannot be looked after: %s", error)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Start what can start now."""
        async with self._lock:
            await asyncio.to_thread(self._look)

    async def end_run(self, run: str | None) -> None:
        """Stop a Flower run, so that its sites turn to other work at once."""
        await asyncio.to_thread(self._stop, run)

    async def lost(self, why: str, *, stop: bool) -> None:
        """Note that no process does any rounds; each running study gets a new run.

        Parameters
        ----------
        stop : bool
            Whether the SuperLink still knows the runs and must end them.
        """
        async with self._lock:
            runs = [row.flower_run for row in self._registry.in_states(State.RUNNING)]
            await asyncio.to_thread(lifecycle.lost_runs, self._registry, why)
            if stop:
                for run in runs:
                    await self.end_run(run)

    def _look(self) -> None:
        self._keep_room()
        decided = lifecycle.decisions_so_far(self._registry)
        if decided != self._settled:  # each study costs a look at its document
            lifecycle.settle_approvals(self._registry)
            self._settled = decided
        self._resume_where_room_is()
        if not self._ready():
            return
        for row in self._registry.in_states(State.RUNNING):
            if row.flower_run is None and self._due(row):
                self._start(row.digest)
        for row in queue(self._registry):
            if not self._due(row) or lacks(self._registry, row):
                continue  # the ones behind it may be able to
            with self._registry.transaction() as session:
                begun = change(
                    session,
                    row.digest,
                    State.RUNNING,
                    "its sites are there and free",
                    only_from={State.QUEUED},
                    flower_run=None,
                    not_before=None,
                    pause_by=None,
                )
            if begun:
                self._start(row.digest)

    def _due(self, row: StudyRow) -> bool:
        """Whether what died or got nowhere may begin again, whatever the clock is set to.

        The time to wait is taken once from what was written down, which a restart of the
        aggregator may find again: then it is at most the pause that was planned.
        """
        if row.not_before is None:
            return True
        told, until = self._waits.get(row.digest, ("", 0.0))
        if told != row.not_before:
            until = monotonic() + min(_left(row.not_before), lifecycle.longest_pause(row))
            self._waits[row.digest] = (row.not_before, until)
        return monotonic() >= until

    def _start(self, digest: str) -> None:
        try:
            run = str(self._runs.start_run(digest))
        except Exception as error:
            # Flower's client raises what its transport does. It counts like a run that died.
            _log.warning("Flower did not start a run: %s", type(error).__name__)
            lost = f"unstarted-{digest[:12]}"
            if lifecycle.begin_run(self._registry, digest, lost):
                lifecycle.run_died(self._registry, lost, "Flower did not start the run")
            return
        if not lifecycle.begin_run(self._registry, digest, run):
            self._runs.stop_run(int(run))  # stopped or paused in that moment

    def _keep_room(self) -> None:
        """Pause what runs while the disk is full; the reserve lets that be written down."""
        if shutil.disk_usage(self._home.path).free >= _FULL:
            self._reserve.keep()
            return
        if self._reserve.give_up():
            _log.critical("the disk is full: the reserve on it was given up")
        for row in self._registry.in_states(State.RUNNING):
            lifecycle.pause_for_disk(self._registry, row)
            self._stop(row.flower_run)

    def _stop(self, run: str | None) -> None:
        if run is None or not run.isdecimal() or not self._ready():
            return
        try:
            self._runs.stop_run(int(run))
        except Exception as error:
            # A SuperLink that does not answer is about to be started anew, without any run.
            _log.warning("Flower did not stop run %s: %s", run, type(error).__name__)

    def _resume_where_room_is(self) -> None:
        for row in self._registry.in_states(State.PAUSED):
            if row.goes_on_with == "disk" and self._has_room(row.digest):
                with self._registry.transaction() as session:
                    change(
                        session,
                        row.digest,
                        State.QUEUED,
                        "there is room on the disk again",
                        only_from={State.PAUSED},
                        goes_on_with="",
                    )

    def _has_room(self, digest: str) -> bool:
        folder = self._home.study_folder(digest)
        largest = max((_size(path) for path in folder.rglob("*")), default=0)
        free = shutil.disk_usage(folder).free
        return free >= _FILES_OF_ROOM * largest + _LEAST_ROOM


def queue(registry: Registry) -> list[StudyRow]:
    """Return the queued studies in the order in which they are started."""
    rows = registry.in_states(State.QUEUED)
    return sorted(rows, key=lambda row: (-row.priority, row.queued_at or "", row.digest))


def waits_for(registry: Registry, row: StudyRow) -> str:
    """Return in words what a queued study waits for; empty when it can start now."""
    lacking = lacks(registry, row)
    left = 0.0 if row.not_before is None else _left(row.not_before)
    if lacking or left <= 0:
        return lacking
    return f"others go first, for {min(left, lifecycle.longest_pause(row)):.0f} s"


def lacks(registry: Registry, row: StudyRow) -> str:
    """Return in words which sites a queued study lacks; empty when they are there and free."""
    here = {site.name: site for site in registry.sites() if site.online}
    wanted = [one.site for one in approved(registry, row.digest)]
    there = [name for name in wanted if name in here]
    quorum = quorum_of(row)
    if len(there) < quorum:
        return f"{len(there)} of the {quorum} sites it needs are online"
    free = _free(registry, [here[name] for name in there])
    if len(free) < quorum:
        busy = ", ".join(sorted(set(there) - free))
        return f"{len(free)} of the {quorum} sites it needs are free; {busy} at work on others"
    return ""


def _free(registry: Registry, sites: list[Member]) -> set[str]:
    """Return those of the sites that would take part in one more study."""
    if all(site.studies_at_once is None for site in sites):
        return {site.name for site in sites}
    busy = Counter(one.site for digest in registry.running() for one in approved(registry, digest))
    return {
        site.name
        for site in sites
        if site.studies_at_once is None or busy[site.name] < site.studies_at_once
    }


def _left(moment: str) -> float:
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0  # it went while we looked
