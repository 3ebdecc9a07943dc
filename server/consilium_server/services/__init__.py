"""Our own services behind the gateway, by who may call them."""

from __future__ import annotations

from consilium_common.wire import methods
from consilium_server.acts import Acts
from consilium_server.flower_private import Control
from consilium_server.gateway import Service
from consilium_server.home import ServerHome
from consilium_server.issuing import Issuer
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.services.enrolment import Enrolment
from consilium_server.services.noting import noted
from consilium_server.services.of_auditors import AuditServices
from consilium_server.services.of_members import MemberServices
from consilium_server.services.of_operators import OperatorServices
from consilium_server.services.of_registrars import RegistrarServices
from consilium_server.services.of_runs import RunServices
from consilium_server.services.of_sites import SiteServices
from consilium_server.services.signatures import Signatures
from consilium_server.starts import PublicStarts
from consilium_server.witness import Witness


def services(
    home: ServerHome,
    registry: Registry,
    issuer: Issuer,
    control: Control,
    witness: Witness,
    *,
    scheduler: Scheduler,
) -> dict[str, Service]:
    """Return the handler of every method in the role table; privileged acts are noted."""
    acts = Acts(registry, witness.key)
    starts = PublicStarts(home.starts)
    handlers = {
        **Enrolment(registry, issuer, control).table(),
        **MemberServices(registry, issuer).table(),
        **SiteServices(registry, issuer, witness, control).table(),
        **OperatorServices(registry, issuer, starts).table(),
        **RunServices(registry, scheduler, starts).table(),
        **Signatures(registry, issuer).table(),
        **RegistrarServices(home, registry).table(),
        **AuditServices(registry, issuer, witness.key, acts).table(),
    }
    return {
        method: noted(acts, method, service) if method in methods.PRIVILEGED else service
        for method, service in handlers.items()
    }
