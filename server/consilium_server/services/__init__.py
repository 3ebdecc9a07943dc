"""Our own services behind the gateway, by who may call them."""

from __future__ import annotations

from consilium_common.identity.authority import Authority
from consilium_server.flower_private import Control
from consilium_server.gateway import Service
from consilium_server.registry import Registry
from consilium_server.services.enrolment import Enrolment
from consilium_server.services.of_operators import OperatorServices
from consilium_server.services.of_sites import SiteServices
from consilium_server.starts import PublicStarts
from consilium_server.witness import Witness


def services(
    registry: Registry,
    authority: Authority,
    control: Control,
    witness: Witness,
    starts: PublicStarts,
) -> dict[str, Service]:
    """Return the handler of every method in the role table."""
    return {
        **Enrolment(registry, authority, control).table(),
        **SiteServices(registry, authority, witness).table(),
        **OperatorServices(registry, authority, control, starts).table(),
    }
