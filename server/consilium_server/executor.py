"""Runs ServerApps: takes tasks from the SuperLink and runs each in a process forked warm.

`multiprocessing`'s fork server imports Flower and our app once, and a run's process is forked from
it. torch is not among it: see :mod:`consilium_server.networks`. Started by `server start` as
``python -m consilium_server.executor``.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, Protocol

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.processes import die_with_starter
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.lifecycle import is_disk_full, pause_for_disk, run_died
from consilium_server.registry import Registry
from consilium_server.reserve import Reserve

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2
WARM_MODULES: Final = [
    "flwr.serverapp",
    "consilium_server.app",
    # What a task imports only when it begins.
    "flwr.cli.build",
    "flwr.supercore.heartbeat",
    "flwr.superlink.grid",
    "httpcore",
]
#: Looks this often whether a run is still wanted.
_WANTED_SECONDS: Final = 1.0
#: A run is named in the registry a moment after it has begun, and takes its leave of Flower a
#: moment after its study has ended; one that lives longer without a study is ended.
_UNWANTED_SECONDS: Final = 12.0
#: Exit status of a run whose disk is full: it could not write so into the registry itself.
_DISK_FULL: Final = 75


class Stops(Protocol):
    """Stops Flower runs."""

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended stays as it is."""
        ...


def run_task(address: str, certificate: str, token: str) -> None:
    """Run one task; the target of a forked process."""
    die_with_starter()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every poll
    from consilium_server.app import app
    from consilium_server.flower_private import run_server_task

    try:
        run_server_task(
            address,
            Path(certificate).read_bytes(),
            token,
            lambda grid, context: app(grid=grid, context=context),
        )
    except Exception as error:
        if is_disk_full(error):
            _log.exception("the disk is full")
            sys.exit(_DISK_FULL)
        raise


@dataclass
class Runs:
    """The processes of runs under way, and what is still to be written about those that ended."""

    registry: Registry
    stops: Stops
    reserve: Reserve
    _running: dict[int, BaseProcess] = field(default_factory=dict)
    _unwanted: dict[int, float] = field(default_factory=dict)
    _ended: dict[int, int | None] = field(default_factory=dict)
    _looked: float = 0.0

    def add(self, run_id: int, process: BaseProcess) -> None:
        """Look after the process of a run."""
        self._running[run_id] = process

    def look(self) -> None:
        """Note which processes have ended, and end those that nobody wants any more."""
        for run_id, process in list(self._running.items()):
            if not process.is_alive():
                del self._running[run_id]
                self._unwanted.pop(run_id, None)
                self._ended[run_id] = process.exitcode
        for run_id, status in list(self._ended.items()):
            if self._noted(run_id, status):
                del self._ended[run_id]
        if self._running and time.monotonic() - self._looked > _WANTED_SECONDS:
            self._looked = time.monotonic()
            # A registry that is away for a while ends no run.
            with contextlib.suppress(SQLAlchemyError):
                self._end_unwanted()

    def _noted(self, run_id: int, status: int | None) -> bool:
        """Write how a run ended where it could not do so itself; False: try again later."""
        try:
            row = self.registry.running_as(str(run_id))
            if row is not None and status == _DISK_FULL:
                pause_for_disk(self.registry, row)
            elif row is not None:
                # Its sites would work on for a run that nobody answers any more.
                self._stop(run_id)
                run_died(self.registry, str(run_id), "the process of its rounds died")
        except SQLAlchemyError as error:
            # A full disk keeps the registry from being written, too.
            if self.reserve.give_up():
                _log.warning("the reserve on the disk was given up to write the registry")
            _log.error("the end of run %d cannot be written yet: %s", run_id, type(error).__name__)
            return False
        return True

    def _stop(self, run_id: int) -> None:
        try:
            self.stops.stop_run(run_id)
        except Exception as error:
            # Flower's client raises what its transport does; a SuperLink that is away knows no run.
            _log.warning("Flower did not stop run %d: %s", run_id, type(error).__name__)

    def _end_unwanted(self) -> None:
        for run_id, process in self._running.items():
            if self.registry.running_as(str(run_id)) is not None:
                self._unwanted.pop(run_id, None)
                continue
            since = self._unwanted.setdefault(run_id, time.monotonic())
            if time.monotonic() - since > _UNWANTED_SECONDS:
                _log.info("ending the process of run %d: no study needs it any more", run_id)
                process.kill()


def main(address: str, certificate: str, secret_file: str) -> None:
    """Take tasks until ended."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = ServerHome.existing(Path(os.environ[HOME_VARIABLE]))
    registry = Registry(home.database)
    from consilium_server.flower_private import Control, TaskSource

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM_MODULES)
    # Now, so that the first study does not wait for the imports.
    forkserver.ensure_running()
    source = TaskSource(address, Path(certificate), Path(secret_file).read_bytes())
    runs = Runs(registry, Control(address, Path(certificate)), Reserve(home.run))
    while True:
        runs.look()
        task = source.acquire()
        if task is None:
            time.sleep(_POLL_SECONDS)
            continue
        token, run_id = task
        process = context.Process(target=run_task, args=(address, certificate, token))
        process.start()
        runs.add(run_id, process)


if __name__ == "__main__":
    main(*sys.argv[1:4])
