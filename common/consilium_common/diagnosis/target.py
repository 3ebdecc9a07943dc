"""Whom the doctor wants to reach, and the way there: straight, or through the network's proxy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from consilium_common.errors import ConsiliumError
from consilium_common.identity.trust import Trust
from consilium_common.wire.proxy import Proxy

if TYPE_CHECKING:
    from consilium_common.wire.channel import Credentials


@dataclass(frozen=True)
class Target:
    """The aggregator's port as the doctor sees it.

    Parameters
    ----------
    trust : Trust
        Whose word proves that it is the aggregator.
    proxy : Proxy, optional
        Through which all connections go.
    credentials : Credentials, optional
        Who we are, where that is known: shown in the handshake, so that a look at the port does
        not stand in the aggregator's log as a stranger's attempt.
    """

    host: str
    port: int
    trust: Trust
    proxy: Proxy | None = None
    credentials: Credentials | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """``host:port``."""
        return joined(self.host, self.port)

    @property
    def first(self) -> tuple[str, int]:
        """Host and port that this machine itself connects to: the proxy's, or the aggregator's."""
        return (self.proxy.host, self.proxy.port) if self.proxy else (self.host, self.port)


def joined(host: str, port: int) -> str:
    """Write ``host:port``; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(address: str, *, where: str = "") -> tuple[str, int]:
    """Split ``host:port``, or raise ``state.bad-config``."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConsiliumError(
            "state.bad-config",
            f"The aggregator's address {address!r} is not host:port.",
            where=where,
            hint="Write it as it stands in the invitation, for example fl.example.org:8443.",
        )
    return host, int(port)
