"""`server start`: the SuperLink, the executor and the gateway, held together by one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import self_signed_loopback
from consilium_common.identity.keys import new_tls_key, save_private
from consilium_common.processes import (
    Child,
    check_port_free,
    flower_environment,
    free_port,
    wait_for_port,
)
from consilium_server.fleet import FleetForwarder
from consilium_server.flower_private import Control, superlink_command
from consilium_server.gateway import Gateway
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.services import Services

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
    certificate, key, secret = _loopback_secrets(home)
    superlink_port = free_port()
    address = f"127.0.0.1:{superlink_port}"
    environment = {
        **flower_environment(home.superlink_database.parent),
        HOME_VARIABLE: str(home.path),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    superlink = Child(
        "superlink",
        superlink_command(
            port=superlink_port,
            certificate=certificate,
            key=key,
            database=home.superlink_database,
            secret=secret,
        ),
        environment=environment,
        logs=home.logs,
        say=say,
    )
    executor = Child(
        "executor",
        [sys.executable, "-m", "consilium_server.executor", address, str(certificate), str(secret)],
        environment=environment,
        logs=home.logs,
        say=say,
    )
    tasks = [asyncio.create_task(superlink.supervise())]
    fleet: FleetForwarder | None = None
    gateway: Gateway | None = None
    try:
        await wait_for_port(
            superlink_port, timeout=_SUPERLINK_START_SECONDS, alive=lambda: superlink.restarts < 2
        )
        tasks.append(asyncio.create_task(executor.supervise()))
        fleet = FleetForwarder(f"https://{address}", certificate, home.kick)
        control = Control(address, certificate)
        _settle_interrupted(registry, control)
        services = Services(registry, authority, control)
        gateway = Gateway(Doorkeeper(authority.certificate, registry), fleet, services.table())
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


def _settle_interrupted(registry: Registry, control: Control) -> None:
    """Studies that ran when the aggregator went down stand still now: say so, and how to go on."""
    for row in registry.studies():
        if row.state == "running":
            if row.flower_run is not None:
                control.stop_run(int(row.flower_run))
            registry.set_study_state(
                row.digest,
                "stopped",
                "the aggregator was restarted; go on with `consilium study run`",
            )


def _loopback_secrets(home: ServerHome) -> tuple[Path, Path, Path]:
    """Make this start's loopback certificate and the executor's secret; none is kept longer."""
    certificate, key, secret = (
        home.run / name for name in ("superlink.pem", "superlink-key.pem", "executor-secret")
    )
    loopback_key = new_tls_key()
    save_private(key, loopback_key)
    write_atomic(certificate, certificate_pem(self_signed_loopback(loopback_key)))
    write_atomic(secret, secrets.token_bytes(32))
    return certificate, key, secret
