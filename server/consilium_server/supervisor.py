"""`server start`: the SuperLink, the executor and the gateway, held together by one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import (
    describe,
    load_certificate,
)
from consilium_common.identity.loopback import make_loopback
from consilium_common.processes import (
    Child,
    check_port_free,
    flower_environment,
    free_port,
    wait_for_port,
)
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.flower_private import Control, node_key_bytes, superlink_command
from consilium_server.gateway import Gateway
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.services import services
from consilium_server.starts import PublicStarts
from consilium_server.witness import Witness, WitnessKey

_SUPERLINK_START_SECONDS = 60.0


async def serve(home: ServerHome, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run the aggregator until SIGINT or SIGTERM.

    Raises
    ------
    ConsiliumError
        ``state.port-in-use``, ``state.child``.
    """
    check_port_free(host, port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    registry = Registry(home.database)
    authority = Authority.load(home.identity)
    # A home of an earlier release has no witness's key yet.
    witness = Witness(registry, WitnessKey.ensure(home.identity, authority))
    loopback = make_loopback(home.run)
    certificate = loopback.certificate
    superlink_port = free_port()
    address = f"127.0.0.1:{superlink_port}"
    environment = {
        **flower_environment(home.flower),
        HOME_VARIABLE: str(home.path),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    ready = asyncio.Event()

    async def prepare() -> None:
        await wait_for_port(
            superlink_port, timeout=_SUPERLINK_START_SECONDS, alive=lambda: superlink.alive
        )
        await asyncio.to_thread(_teach, registry, Control(address, certificate))
        ready.set()

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
        after_start=prepare,
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
    )
    tasks = [asyncio.create_task(superlink.supervise())]
    fleet: FleetForwarder | None = None
    gateway: Gateway | None = None
    try:
        await _first(ready.wait(), stop.wait())
        tasks.append(asyncio.create_task(executor.supervise()))
        fleet = FleetForwarder(f"https://{address}", certificate, home.kick)
        gateway = Gateway(
            Doorkeeper(authority.certificate, registry),
            fleet,
            Arrivals(home.arrived),
            services(
                registry,
                authority,
                Control(address, certificate),
                witness,
                PublicStarts(home.starts),
            ),
        )
        await gateway.start(host, port, home.identity)
        status = {"pid": os.getpid(), "address": f"{host}:{port}"}
        write_atomic(home.run / "status.json", json.dumps(status).encode())
        say(f"the aggregator listens on {host}:{port} (mutual TLS 1.3)")
        await stop.wait()
        say("stopping")
    finally:
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
    """Tell a SuperLink that has just started what it does not remember.

    Every active site's key is registered anew. A study that ran stands still now: its state says
    so, and how to go on.
    """
    for site in registry.sites():
        if site.status == "active":
            key = describe(load_certificate(site.certificate_pem.encode())).public_key
            registry.set_node(site.name, control.register_node(node_key_bytes(key), site.name))
    for digest in registry.running():
        registry.set_study_state(
            digest, "stopped", "the aggregator was restarted; go on with `consilium study run`"
        )
    control.close()


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first of several things."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
