"""Runs ServerApps: takes tasks from the SuperLink and runs each in a process forked warm.

`multiprocessing`'s fork server imports torch, MONAI and our app once; a run's process is forked
from it, so a study starts in tenths of a second. Started by `server start` as
``python -m consilium_server.executor``.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Final

from consilium_common.processes import die_with_parent
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.registry import Registry

_POLL_SECONDS: Final = 0.2
_WARM_MODULES: Final = ["torch", "monai.networks.nets", "flwr.serverapp", "consilium_server.app"]


def run_task(address: str, certificate: str, token: str) -> None:
    """Run one task; the target of a forked process."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every poll
    from consilium_server.app import app
    from consilium_server.flower_private import run_server_task

    run_server_task(
        address,
        Path(certificate).read_bytes(),
        token,
        lambda grid, context: app(grid=grid, context=context),
    )


def main(address: str, certificate: str, secret_file: str) -> None:
    """Take tasks until ended."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    registry = Registry(ServerHome.existing(Path(os.environ[HOME_VARIABLE])).database)
    from consilium_server.flower_private import TaskSource

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_WARM_MODULES)
    # Now, so that the first study does not wait for the imports.
    forkserver.ensure_running()
    source = TaskSource(address, Path(certificate), Path(secret_file).read_bytes())
    running: dict[int, multiprocessing.process.BaseProcess] = {}
    while True:
        for run_id, process in list(running.items()):
            if not process.is_alive():
                del running[run_id]
                _note_death(registry, run_id)
        task = source.acquire()
        if task is None:
            time.sleep(_POLL_SECONDS)
            continue
        token, run_id = task
        process = context.Process(target=run_task, args=(address, certificate, token))
        process.start()
        running[run_id] = process


def _note_death(registry: Registry, run_id: int) -> None:
    """A run whose process ended without saying how was killed: say so, or it runs for ever."""
    row = registry.running_as(str(run_id))
    if row is not None:
        registry.fail_running(
            row.digest, "the process of its rounds died; go on with `consilium study run`"
        )


if __name__ == "__main__":
    main(*sys.argv[1:4])
