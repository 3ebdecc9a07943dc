"""A registry, its scheduler, and a Flower that only notes what it is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from state_samples import add_study, put

from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.tables import Member, StudyRow


class Flower:
    """Starts runs, or does not."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[int] = []
        self.broken = False

    def start_run(self, digest: str) -> int:
        if self.broken:
            raise RuntimeError("no connection")
        self.started.append(digest)
        return 100 + len(self.started)

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)


class House:
    """A registry and its scheduler."""

    def __init__(self, folder: Path) -> None:
        self.home = ServerHome.create(folder)
        self.registry = Registry(self.home.database)
        self.flower = Flower()
        self.there = True
        self.scheduler = Scheduler(self.home, self.registry, self.flower, lambda: self.there)

    def study(self, name: str, *sites: str, state: str = "queued", **row: Any) -> str:
        digest = add_study(self.registry, name, *sites, **row)
        put(self.registry, digest, state)
        return digest

    def look(self) -> None:
        asyncio.run(self.scheduler.look())

    def row(self, digest: str) -> StudyRow:
        return self.registry.study(digest)

    def state(self, digest: str) -> str:
        return self.row(digest).state

    def run(self, digest: str) -> str:
        run = self.row(digest).flower_run
        assert run is not None
        return run

    def due(self, digest: str) -> None:
        """Let the back-off be over."""
        with self.registry.transaction() as session:
            session.get_one(StudyRow, digest).not_before = None

    def member(self, name: str, **values: Any) -> None:
        with self.registry.transaction() as session:
            member = session.get_one(Member, name)
            for key, value in values.items():
                setattr(member, key, value)
