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
from pathlib import Path
from typing import Final

from consilium_common.processes import die_with_parent
from consilium_server.home import HOME_VARIABLE, ServerHome

_POLL_SECONDS: Final = 0.2
_WARM_MODULES: Final = ["torch", "monai.networks.nets", "flwr.serverapp", "consilium_server.app"]


def run_task(address: str, certificate: str, token: str) -> None:
    """Run one task; the target of a forked process."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
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
    ServerHome.existing(Path(os.environ[HOME_VARIABLE]))
    from consilium_server.flower_private import TaskSource

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_WARM_MODULES)
    source = TaskSource(address, Path(certificate), Path(secret_file).read_bytes())
    running: list[multiprocessing.process.BaseProcess] = []
    while True:
        running = [process for process in running if process.is_alive()]
        token = source.acquire()
        if token is None:
            time.sleep(_POLL_SECONDS)
            continue
        process = context.Process(target=run_task, args=(address, certificate, token))
        process.start()
        running.append(process)


if __name__ == "__main__":
    main(*sys.argv[1:4])
