"""`site start`: link, SuperNode, executor and witnessing, held together by one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

from consilium_client.autoapproval import approve_for_ever
from consilium_client.endpoint import endpoint
from consilium_client.executor import SUPERNODE_LOST
from consilium_client.flower_private import supernode_command
from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.leftovers import tidy_for_ever
from consilium_client.link import Link
from consilium_client.lock import only_one
from consilium_client.renewal import Renewal
from consilium_client.witnessing import Witnessing
from consilium_common.files import private_folder
from consilium_common.identity.loopback import make_loopback
from consilium_common.processes import Child, flower_environment, free_port
from consilium_common.service import Service
from consilium_common.wire.proxy import without_proxies

_log = logging.getLogger(__name__)

#: For the goodbye of a SuperNode that was stopped before it knew its node.
_GOODBYE_SECONDS: Final = 2.0
#: After an error that nobody foresaw.
_PAUSE_SECONDS: Final = 1.0


async def serve(home: SiteHome, say: Callable[[str], None]) -> None:
    """Run the site until SIGINT or SIGTERM.

    Raises
    ------
    ConsiliumError
        ``identity.*``; ``state.running`` when this site runs already.
    """
    private_folder(home.path)
    identity = SiteIdentity.load(home)
    service = Service()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with only_one(home):
        loopback = make_loopback(home.run)
        renewal = Renewal(home, identity, say)
        link = Link(home, identity, say, renewal.heard)
        witnessing = Witnessing(home, identity, say)
        link_port, runtime_port = free_port(), free_port()
        server = endpoint(link.application, loopback, link_port)
        flower_home = home.path / "flower"
        flower_home.mkdir(mode=0o700, exist_ok=True)
        environment = {
            # They speak on loopback alone: a proxy, and the password that its variable may hold,
            # is the link's concern.
            **without_proxies(flower_environment(flower_home)),
            HOME_VARIABLE: str(home.path),
        }
        supernode = Child(
            "supernode",
            supernode_command(
                link_port=link_port,
                link_certificate=loopback.certificate,
                runtime_port=runtime_port,
                key=identity.folder / "site-key.openssh",
                secret=loopback.secret,
            ),
            environment=environment,
            logs=home.logs,
            say=say,
            before_start=link.free_node,
            run=home.run,
        )

        served = 0

        async def forget_tasks() -> None:
            # A SuperNode waits a minute for a task whose executor has died, and without end for
            # the rest of a reply that has come in part; it takes no other meanwhile. A new one is
            # another session: the site is asked anew, within the round. An executor that has lost
            # its SuperNode needs none, unless it lives: a clock that is set ends a task as well.
            nonlocal served
            if executor.restarts and (
                executor.status != SUPERNODE_LOST or supernode.restarts == served
            ):
                served = supernode.restarts + supernode.alive
                supernode.kill()
            else:
                served = supernode.restarts

        executor = Child(
            "executor",
            [
                *(sys.executable, "-m", "consilium_client.executor"),
                *(f"127.0.0.1:{runtime_port}", str(loopback.secret)),
            ],
            environment=environment,
            logs=home.logs,
            say=say,
            before_start=forget_tasks,
            run=home.run,
        )
        tasks = [asyncio.create_task(_serve_quietly(server))]
        try:
            while not server.started:
                await asyncio.sleep(0.02)
            # After uvicorn, which installs handlers of its own.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            tasks += [
                asyncio.create_task(_kept_up(work, say))
                for work in (
                    supernode.supervise,
                    executor.supervise,
                    link.hello_for_ever,
                    link.progress_for_ever,
                    witnessing.witness_for_ever,
                    renewal.renew_for_ever,
                    lambda: approve_for_ever(home, identity, say),
                    lambda: tidy_for_ever(home, identity, say),
                    service.alive_for_ever,
                )
            ]
            say(f"site {identity.config.name} is running")
            service.ready(f"site {identity.config.name} is running")
            await stop.wait()
            say("stopping")
        finally:
            service.stopping()
            # The SuperNode says goodbye through the link, so the link goes last.
            await asyncio.gather(executor.stop(), supernode.stop())
            await link.free_node(_GOODBYE_SECONDS)
            server.should_exit = True
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await link.close()


async def _serve_quietly(server: object) -> None:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with contextlib.suppress(asyncio.CancelledError):
        await server.serve()  # type: ignore[attr-defined]


async def _kept_up(work: Callable[[], Awaitable[None]], say: Callable[[str], None]) -> None:
    """Do what is to be done as long as the site runs, whatever it fails by."""
    while True:
        try:
            return await work()
        except Exception as error:
            # Nothing of what others send should come this far. If it does, the site goes on.
            _log.exception("unforeseen")
            say(f"an internal error ({type(error).__name__}) was survived; the log says where")
        await asyncio.sleep(_PAUSE_SECONDS)
