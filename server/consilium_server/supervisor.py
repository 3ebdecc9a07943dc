"""`server start`: the SuperLink, the executor and the gateway, held together by one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import (
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.keys import load_signing_key
from consilium_common.identity.loopback import make_loopback
from consilium_common.processes import (
    Child,
    check_port_free,
    flower_environment,
    free_port,
    only_one,
    wait_for_port,
)
from consilium_common.service import Service
from consilium_common.wire.proxy import without_proxies
from consilium_server.acts import Acts
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.flower_private import Control, node_key_bytes, superlink_command
from consilium_server.gateway import Gateway
from consilium_server.handshakes import reworded
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.issuing import Issuer, load_issuer, renew_server_if_due
from consilium_server.kicks import Kicks
from consilium_server.limits import Limits
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.services import services
from consilium_server.tables import now
from consilium_server.transfers import Transfers
from consilium_server.witness import Witness, WitnessKey

_log = logging.getLogger(__name__)

_SUPERLINK_START_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
#: The aggregator looks this often whether its own certificates are due for renewal.
_RENEWAL_SECONDS = 3600.0


async def serve(
    home: ServerHome,
    host: str,
    port: int,
    say: Callable[[str], None],
    *,
    passphrase: bytes | None = None,
) -> None:
    """Run the aggregator until SIGINT or SIGTERM.

    Parameters
    ----------
    passphrase : bytes, optional
        Opens the authority's key where it is locked.

    Raises
    ------
    ConsiliumError
        ``state.running``, ``state.port-in-use``, ``state.child``, ``usage.limits``;
        ``identity.*`` when the authority's key does not open.
    """
    check_port_free(host, port)
    limits = Limits.read(home.config_file)
    issuer = load_issuer(home, passphrase)
    with (
        only_one(
            home.run / "lock",
            "This aggregator is running already.",
            hint="Stop the other `consilium server start` first.",
        ),
        reworded(),
    ):
        _raise_open_files()
        await _serve(
            home,
            issuer,
            _witness_key(home.identity, passphrase),
            limits=limits,
            listen=(host, port),
            say=say,
        )


class Journal:
    """Says what the supervisor does and keeps the last of it in a file, for `server doctor`.

    Parameters
    ----------
    path : Path
        Holds a JSON list of ``{"at", "what"}``, the newest last.
    """

    _KEPT = 50

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say

    def __call__(self, what: str) -> None:
        """Say it and keep it."""
        self._say(what)
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = []
        kept = [*kept, {"at": now(), "what": what}][-self._KEPT :]
        # A full disk must not end the supervisor.
        with contextlib.suppress(OSError, ConsiliumError):
            write_atomic(self._path, json.dumps(kept).encode(), durable=False)


async def _serve(
    home: ServerHome,
    issuer: Issuer,
    witness_key: WitnessKey,
    *,
    limits: Limits,
    listen: tuple[str, int],
    say: Callable[[str], None],
) -> None:
    service = Service()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    say = Journal(home.run / "supervisor.json", say)
    registry = Registry(home.database)
    host, port = listen
    witness, acts = Witness(registry, witness_key), Acts(registry, witness_key)
    loopback = make_loopback(home.run)
    certificate = loopback.certificate
    superlink_port = free_port()
    address = f"127.0.0.1:{superlink_port}"
    environment = {
        # They speak on loopback alone, and need no proxy's password.
        **without_proxies(flower_environment(home.flower)),
        HOME_VARIABLE: str(home.path),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    environment.pop("GRPC_VERBOSITY", None)  # set for this process alone
    ready = asyncio.Event()
    scheduler = Scheduler(
        home, registry, Control(address, certificate), lambda: ready.is_set() and superlink.alive
    )

    async def forget() -> None:
        ready.clear()

    async def prepare() -> None:
        await wait_for_port(
            superlink_port, timeout=_SUPERLINK_START_SECONDS, alive=lambda: superlink.alive
        )
        await asyncio.to_thread(_teach, registry, Control(address, certificate))
        who = "SuperLink" if superlink.restarts else "aggregator"
        await scheduler.lost(f"the {who} was started anew", stop=False)
        ready.set()

    async def give_up_runs() -> None:
        while executor.restarts:
            try:
                await scheduler.lost("the executor of its rounds was started anew", stop=True)
                return
            except SQLAlchemyError as error:
                # Until it is written, nobody would begin those runs again.
                _log.error("the registry cannot be written: %s", type(error).__name__)
                await asyncio.sleep(_AGAIN_SECONDS)

    superlink = Child(
        "superlink",
        superlink_command(
            port=superlink_port,
            certificate=certificate,
            key=loopback.key,
            secret=loopback.secret,
        ),
        environment=environment,
        logs=home.logs,
        say=say,
        before_start=forget,
        after_start=prepare,
        run=home.run,
    )
    executor = Child(
        "executor",
        [
            sys.executable,
            "-m",
            "consilium_server.executor",
            address,
            str(certificate),
            str(loopback.secret),
        ],
        environment=environment,
        logs=home.logs,
        say=say,
        before_start=give_up_runs,
        run=home.run,
    )
    tasks = [asyncio.create_task(superlink.supervise())]
    fleet: FleetForwarder | None = None
    gateway: Gateway | None = None
    try:
        await _first(ready.wait(), stop.wait())
        tasks.append(asyncio.create_task(executor.supervise()))
        fleet = FleetForwarder(f"https://{address}", certificate, Kicks(home.kicks))
        gateway = Gateway(
            Doorkeeper(lambda: issuer.trust, registry, acts),
            fleet,
            Arrivals(home.arrived),
            services(
                home,
                registry,
                issuer,
                Control(address, certificate),
                witness,
                scheduler=scheduler,
            ),
            Transfers(home, registry).table(),
            limits=limits,
        )
        await gateway.start(host, port, home.identity)
        tasks += [
            asyncio.create_task(work)
            for work in (
                scheduler.run_for_ever(),
                _renew_for_ever(home, issuer),
                service.alive_for_ever(),
            )
        ]
        status = {"pid": os.getpid(), "address": f"{host}:{port}"}
        write_atomic(home.run / "status.json", json.dumps(status).encode())
        say(f"the aggregator listens on {host}:{port} (mutual TLS 1.3)")
        service.ready(f"listens on {host}:{port}")
        await stop.wait()
        say("stopping")
    finally:
        service.stopping()
        (home.run / "status.json").unlink(missing_ok=True)
        if gateway is not None:
            await gateway.stop()
        await asyncio.gather(executor.stop(), superlink.stop())
        if fleet is not None:
            await fleet.close()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _teach(registry: Registry, control: Control) -> None:
    """Tell a SuperLink that has just started what it does not remember: every active site's key."""
    for site in registry.sites():
        if site.status == "active":
            key = describe(load_certificate(site.certificate_pem.encode())).public_key
            registry.set_node(site.name, control.register_node(node_key_bytes(key), site.name))
    control.close()


def _witness_key(folder: Path, passphrase: bytes | None) -> WitnessKey:
    certificate = folder / "witness.pem"
    if not certificate.exists():  # a home of an earlier release
        return WitnessKey.ensure(folder, Authority.load(folder, passphrase))
    return WitnessKey(load_signing_key(folder / "witness-key.pem"), read_certificate(certificate))


async def _renew_for_ever(home: ServerHome, issuer: Issuer) -> None:
    """Renew the aggregator's own certificates before they end; the port reads them anew."""
    while True:
        try:
            if await asyncio.to_thread(renew_server_if_due, home, issuer):
                _log.info("the server's certificate was renewed")
        except ConsiliumError as error:
            _log.error("the aggregator's own certificates could not be renewed: %s", error)
        await asyncio.sleep(_RENEWAL_SECONDS)


def _raise_open_files() -> None:
    """Permit as many open files, and so connections, as this machine lets an ordinary user have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first of several things."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
