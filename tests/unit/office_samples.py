"""An aggregator's real port, register and services, in a thread, with certificates as short-lived
as a test wants them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from serving_samples import in_own_loop
from site_samples import NAME, JoinedSite, joined_site

from consilium_common.files import write_atomic
from consilium_common.identity.authority import (
    Authority,
    certificate_pem,
    requested_key,
)
from consilium_common.identity.certificates import SIGNING_ROLE_OF, Role, describe
from consilium_common.identity.invitation import Invitation, write_invitation
from consilium_common.identity.keys import new_tls_key, private_pem, save_private
from consilium_common.identity.trust import Trust
from consilium_common.processes import free_port
from consilium_common.wire.methods import (
    ENROL,
    MEMBER_RENEW,
    MEMBER_TRUST,
    SERVICE_ROLES,
    SITE_HELLO,
    STREAM_ROLES,
)
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.gateway import Gateway
from consilium_server.kicks import Kicks
from consilium_server.peers import Doorkeeper, Peer
from consilium_server.registry import Registry
from consilium_server.services.enrolment import Enrolment
from consilium_server.services.of_members import MemberServices
from consilium_server.services.of_sites import SiteServices
from consilium_server.tables import InvitationRow, Member, now
from consilium_server.waiting import Issued
from consilium_server.witness import Witness, WitnessKey

NODE = 4711


class ShortIssuer:
    """Issues certificates that live as long as it is told, of the newest authority it has."""

    def __init__(self, *authorities: Authority) -> None:
        self.authorities = list(authorities)
        self.lifetime = timedelta(days=397)
        self.offline = False
        self.cross_pem: str | None = None

    @property
    def trust(self) -> Trust:
        return Trust.of(*(authority.certificate for authority in self.authorities))

    def rotate(self) -> None:
        """Put a successor in force beside the authority before."""
        before = self.authorities[0]
        successor = before.successor()
        self.cross_pem = certificate_pem(before.cross_certify(successor)).decode()
        self.authorities.insert(0, successor)

    def certify(self, key: Any, role: Role, name: str) -> str:
        issued = self.authorities[0].issue(key, role, name, lifetime=self.lifetime)
        return certificate_pem(issued).decode()

    def issue(
        self,
        name: str,
        role: Role,
        request_pem: bytes,
        signer_request_pem: bytes | None,
        *,
        hosts: tuple[str, ...] = (),
    ) -> Issued | None:
        if self.offline:
            return None
        assert signer_request_pem is not None
        signing = SIGNING_ROLE_OF[role]
        return Issued(
            self.certify(requested_key(request_pem, role), role, name),
            self.certify(requested_key(signer_request_pem, signing), signing, name),
        )


class Control:
    """Flower's register of nodes."""

    def __init__(self) -> None:
        self.unregistered: list[int] = []
        self.registered = 0

    def register_node(self, key: bytes, name: str) -> int:
        self.registered += 1
        return NODE + self.registered

    def unregister_node(self, node_id: int) -> None:
        self.unregistered.append(node_id)


class Office:
    """The aggregator, and one site that has joined it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.issuer = ShortIssuer(Authority.create("tests"))
        self.control = Control()
        self.registry = Registry(folder / "registry.db")
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.kicks = Kicks(folder / "kicks")
        self.forwarded: list[str] = []
        self.refuse_renewal = False
        self.counts = dict.fromkeys(SERVICE_ROLES, 0)
        (folder / "arrived").mkdir()
        key = new_tls_key()
        save_private(folder / "server-key.pem", key)
        self.authority = self.issuer.authorities[0]
        server = self.authority.issue(key.public_key(), Role.SERVER, "aggregator")
        write_atomic(folder / "server.pem", certificate_pem(server))
        self.publish_trust()

    def publish_trust(self) -> None:
        """Let the port trust whom the issuer trusts."""
        write_atomic(self.folder / "authority.pem", self.issuer.trust.pem())

    def site(self, folder: Path, **settings: Any) -> JoinedSite:
        """Return a member whose certificate lives as long as the issuer's do now."""
        site = joined_site(folder, address=self.address, authority=self.authority, **settings)
        pem = self.issuer.certify(site.key.public_key(), Role.SITE, NAME)
        write_atomic(site.home.identity / "site.pem", pem.encode())
        certified = describe(site.identity.current_certificate())
        signer_pem = (site.home.identity / "ledger-signer.pem").read_text()
        with self.registry.transaction() as session:
            session.merge(
                Member(
                    name=NAME,
                    role=Role.SITE,
                    status="active",
                    serial=certified.serial,
                    certificate_pem=pem,
                    signer_pem=signer_pem,
                    node_id=str(NODE),
                    joined_at=now(),
                )
            )
        return site

    def invite(self, path: Path, name: str = NAME, role: Role = Role.SITE) -> Path:
        """Write an invitation file."""
        key = new_tls_key()
        certificate = self.authority.issue(
            key.public_key(), Role.INVITATION, name, lifetime=timedelta(days=1)
        )
        expires = describe(certificate).not_after
        with self.registry.transaction() as session:
            serial = describe(certificate).serial
            row = InvitationRow(serial=serial, name=name, role=role, expires=expires.isoformat())
            session.add(row)
        invitation = Invitation(
            consortium="tests",
            address=self.address,
            name=name,
            role=role.value,
            expires=expires,
            authority_pem=self.issuer.trust.pem().decode(),
            certificate_pem=certificate_pem(certificate).decode(),
            private_key_pem=private_pem(key).decode(),
        )
        write_invitation(path, invitation)
        return path

    def member(self, name: str = NAME) -> Member:
        member = self.registry.member(name)
        assert member is not None
        return member

    def open(self) -> AbstractContextManager[None]:
        """Serve the port in a thread of its own, for the length of a block."""
        return in_own_loop(self._start)

    async def _start(self) -> Any:
        fleet = FleetForwarder("https://127.0.0.1:1", self.folder / "authority.pem", self.kicks)

        async def forward(call: str, body: bytes, headers: object) -> tuple[int, bytes]:
            self.forwarded.append(call)
            return 200, b""

        fleet.forward = forward  # type: ignore[method-assign]
        gateway = Gateway(
            Doorkeeper(lambda: self.issuer.trust, self.registry),
            fleet,
            Arrivals(self.folder / "arrived"),
            {method: self._counted(method, service) for method, service in self._table().items()},
            dict.fromkeys(STREAM_ROLES, _no_stream),
        )
        await gateway.start("127.0.0.1", self.port, self.folder)

        async def stop() -> None:
            await gateway.stop(0.1)
            await fleet.close()

        return stop

    def _table(self) -> dict[str, Any]:
        async def not_here(peer: Peer, request: dict[str, Any]) -> Any:
            return {}

        control: Any = self.control
        witness = Witness(self.registry, WitnessKey.ensure(self.folder, self.authority))
        real = {
            **Enrolment(self.registry, self.issuer, control).table(),
            **MemberServices(self.registry, self.issuer).table(),
            **SiteServices(self.registry, self.issuer, control, witness).table(),
        }
        kept = (ENROL, MEMBER_RENEW, MEMBER_TRUST, SITE_HELLO)
        return {**dict.fromkeys(SERVICE_ROLES, not_here), **{name: real[name] for name in kept}}

    def _counted(self, method: str, service: Any) -> Any:
        async def handle(peer: Peer, request: dict[str, Any]) -> Any:
            self.counts[method] += 1
            if method == MEMBER_RENEW and self.refuse_renewal:
                raise RuntimeError("the authority's disk is broken")
            return await service(peer, request)

        return handle


async def _no_stream(*_: Any) -> Any:
    raise AssertionError("these tests move no files")
