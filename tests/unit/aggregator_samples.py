"""An aggregator as `server init` makes it, behind its real port, and people who join it.

Flower alone is missing: its register of nodes, and the SuperLink behind the Fleet calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from serving_samples import in_own_loop
from typer.testing import CliRunner

from consilium_common import __version__
from consilium_common.audit.acts import Act, verify_acts
from consilium_common.cli import app
from consilium_common.console import MODE
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import Role
from consilium_common.identity.invitation import write_invitation
from consilium_common.identity.keys import new_signing_key, new_tls_key, private_pem
from consilium_common.identity.personal import Personal
from consilium_common.identity.personal_join import join
from consilium_common.processes import free_port
from consilium_common.wire import methods
from consilium_common.wire.channel import Caller, Credentials
from consilium_server import members
from consilium_server.acts import Acts
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.gateway import Gateway, Service
from consilium_server.home import ServerHome
from consilium_server.issuing import load_issuer
from consilium_server.kicks import Kicks
from consilium_server.limits import Limits
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.services import services
from consilium_server.tables import Member
from consilium_server.transfers import Transfers
from consilium_server.witness import Witness, WitnessKey


class Nodes:
    """Flower's register of nodes."""

    def __init__(self) -> None:
        self.registered: dict[bytes, int] = {}

    def register_node(self, key: bytes, name: str) -> int:
        return self.registered.setdefault(key, 1000 + len(self.registered))

    def unregister_node(self, node_id: int) -> None:
        self.registered = {k: v for k, v in self.registered.items() if v != node_id}


class Aggregator:
    """The aggregator's home, its port, and what was asked of the SuperLink."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = ServerHome.create(folder / "aggregator")
        self.port = free_port()
        self.authority = members.initialise(self.home, "tests", f"127.0.0.1:{self.port}")
        self.nodes = Nodes()
        self.forwarded: list[str] = []
        self.superlink: Callable[[str], bytes] = lambda _: b""
        self.limits = Limits()
        self.start_anew()

    def start_anew(self) -> None:
        """Know what lies in the home and nothing else, as after a restart; for a closed port."""
        self.registry = Registry(self.home.database)
        self.issuer = load_issuer(self.home)
        self.key = WitnessKey.ensure(self.home.identity, self.authority)

    @property
    def acts(self) -> list[tuple[str, str, str, str, str]]:
        """The audit log: who, role, act, subject, outcome."""
        return [(a.who, a.role, a.act, a.subject, a.outcome) for a in self.log]

    @property
    def log(self) -> list[Act]:
        """The audit log, verified."""
        document = Acts(self.registry, self.key).document(self.issuer.trust)
        acts = [Act.model_validate(entry) for entry in document["content"]["entries"]]
        verify_acts(acts, self.key.key.public_key())
        return acts

    def member(self, name: str) -> Member:
        found = self.registry.member(name)
        assert found is not None
        return found

    def invitation(self, name: str, role: Role) -> Path:
        """Write an invitation file, once."""
        path = self.folder / f"{name}.invitation"
        write_invitation(path, members.invite(self.home, name, timedelta(hours=1), role))
        return path

    def join(self, name: str, role: Role) -> Personal:
        """Let a person join over the open port."""
        made = join(self.invitation(name, role), self.folder / name)
        assert made is not None
        return made

    def site(self, name: str) -> Credentials:
        """Let a site join over the open port; returns what it connects with."""
        invited = members.invite(self.home, name, timedelta(hours=1))
        key, signer = new_tls_key(), new_signing_key()
        bootstrap = Credentials(
            invited.authority_pem.encode(),
            invited.certificate_pem.encode(),
            invited.private_key_pem.encode(),
        )
        request = {
            "request_pem": signing_request(key, name).decode(),
            "signer_request_pem": signing_request(signer, name).decode(),
            "version": __version__,
        }
        with Caller(invited.address, bootstrap) as caller:
            answer = caller.call(methods.ENROL, request)
        certificate = answer["certificate_pem"].encode()
        return Credentials(invited.authority_pem.encode(), certificate, private_pem(key))

    def services(self) -> dict[str, Service]:
        """The handlers behind the port, with their acts noted."""
        return services(
            self.home,
            self.registry,
            self.issuer,
            self.nodes,  # type: ignore[arg-type]
            Witness(self.registry, self.key),
            scheduler=Scheduler(self.home, self.registry, self.nodes, lambda: False),  # type: ignore[arg-type]
        )

    def caller(self, credentials: Credentials) -> Caller:
        return Caller(f"127.0.0.1:{self.port}", credentials)

    def open(self) -> AbstractContextManager[None]:
        """Serve the port in a thread of its own, for the length of a block."""
        return in_own_loop(self._serve)

    async def _serve(self) -> Any:
        fleet = FleetForwarder(
            "https://127.0.0.1:1", self.home.identity / "authority.pem", Kicks(self.home.kicks)
        )

        async def forward(call: str, body: bytes, headers: object) -> tuple[int, bytes]:
            self.forwarded.append(call)
            return 200, self.superlink(call)

        fleet.forward = forward  # type: ignore[method-assign]
        gateway = Gateway(
            Doorkeeper(lambda: self.issuer.trust, self.registry, Acts(self.registry, self.key)),
            fleet,
            Arrivals(self.home.arrived),
            self.services(),
            Transfers(self.home, self.registry).table(),
            limits=self.limits,
        )
        await gateway.start("127.0.0.1", self.port, self.home.identity)

        async def stop() -> None:
            await gateway.stop(0.1)
            await fleet.close()

        return stop


def consilium(*arguments: str | Path) -> Any:
    """Run a command with --json in this process; returns its data, or its error's code."""
    try:
        done = CliRunner().invoke(app, ["--json", *map(str, arguments)])
    finally:
        MODE.json = False
    envelope = json.loads(done.stdout)
    return envelope["data"] if envelope["status"] == "ok" else envelope["error"]["code"]
