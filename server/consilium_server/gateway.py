"""The aggregator's one port: mutual TLS 1.3 over gRPC, an allow-list, and nothing else.

Two kinds of methods have handlers: Flower's twelve Fleet calls, forwarded as raw bytes for sites
that speak as themselves, and our own services. Every other name is unknown to the server; Flower's
Control and Runtime APIs cannot be named here at all, and there is no reflection.

A call's body is read only after its caller was admitted and has room under its limits; until then
it stays with the caller, but for one window of HTTP/2.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    FLEET_ROLES,
    HTTP_STATUS_KEY,
    PULLED_KEY,
    SERVICE_ROLES,
    STREAM_ROLES,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.fleet import Arrivals, FleetForwarder, Headers
from consilium_server.flower_private import (
    claimed_node,
    node_key_bytes,
    public_key_header,
)
from consilium_server.grpc_private import Handler, PortServer
from consilium_server.handed import HandedOut
from consilium_server.limits import Allowances, Call, Limits, Meter
from consilium_server.lines import MeteredLine
from consilium_server.outliving import Outliving
from consilium_server.peers import Doorkeeper, Peer, while_admitted
from consilium_server.places import Places
from consilium_server.presenting import Presented
from consilium_server.transfers import Stream

_log = logging.getLogger(__name__)

Service = Callable[[Peer, dict[str, Any]], Awaitable[Any]]
_Answer = tuple[bytes, tuple[tuple[str, str], ...]]

#: What a refused caller learns, whatever the reason. Its own side can look at its certificate; why
#: it is refused beyond that, only the aggregator's log says.
_REFUSED: Final = ConsiliumError(
    "identity.refused",
    "The aggregator refuses this certificate.",
    hint="Ask the aggregator operator, whose log says why.",
)
#: Refusals for using too much, which gRPC has a status for.
_EXHAUSTED: Final = frozenset(
    f"network.{name}"
    for name in ("too-many-calls", "too-fast", "too-many-bytes", "too-large", "too-much", "busy")
)

#: It is looked so often whether gRPC's server still serves.
_WATCH_SECONDS: Final = 0.1


class Gateway:
    """Serves the port until stopped.

    Parameters
    ----------
    services, streams : mapping
        Handler of each of our own methods; their keys are those of ``SERVICE_ROLES`` and of
        ``STREAM_ROLES``.
    limits : Limits
        What one caller may use.
    """

    def __init__(
        self,
        door: Doorkeeper,
        fleet: FleetForwarder,
        arrivals: Arrivals,
        services: Mapping[str, Service],
        streams: Mapping[str, Stream],
        *,
        limits: Limits | None = None,
    ) -> None:
        if set(services) != set(SERVICE_ROLES) or set(streams) != set(STREAM_ROLES):
            raise ValueError("every method in the role table needs a handler, and no other has one")
        self._door = door
        self._fleet = fleet
        self._arrivals = arrivals
        self._passing = Outliving()
        self._services = dict(services)
        self._streams = dict(streams)
        self._limits = limits or Limits()
        self._meter = Meter(self._limits)
        self._places = Places(self._limits.transfers)
        self._allowances = Allowances(self._limits)
        self._handed = HandedOut()
        self._server: PortServer | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, identity: Path) -> None:
        """Listen on ``host:port`` with what :class:`Presented` reads from ``identity``."""
        presented = Presented(identity)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server = await self._listen(address, presented)
        self._watch = asyncio.create_task(self._keep_listening(address, presented))

    async def stop(self, grace: float = 1.0) -> None:
        """Stop listening; calls under way get ``grace`` seconds."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._server is not None:
            await self._server.shutdown(grace)

    async def _listen(self, address: str, presented: Presented) -> PortServer:
        options = [("grpc.so_reuseport", 0), *self._limits.for_grpc()]
        server = PortServer(self._handlers(), self._unknown, options)
        try:
            bound = server.add_secure_port(address.encode(), presented.credentials())
        except RuntimeError:
            bound = 0
        if not bound:
            raise ConsiliumError(
                "state.port-in-use",
                "Cannot listen on the aggregator's port.",
                where=address,
                hint="Stop the other program or choose another port with --port.",
            )
        await server.start()
        return server

    async def _keep_listening(self, address: str, presented: Presented) -> None:
        """Listen again when gRPC's server has ended: of no call that is known, but it is not ours.

        Calls under way end then, and everybody connects anew a moment later.
        """
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            before = self._server
            if before is None or before.is_running():
                continue
            _log.error("gRPC's server ended by itself; the port is opened again")
            ending = asyncio.create_task(before.shutdown(None))
            ending.add_done_callback(_forget)
            try:
                self._server = await self._listen(address, presented)
            except ConsiliumError as error:
                _log.error("%s", error)  # its port is not free yet: tried again

    def _handlers(self) -> dict[str, Handler]:
        handlers = {
            fleet_method(call): self._handler(fleet_method(call), FLEET_ROLES, self._fleet_call)
            for call in FLEET_PATHS
        }
        for method in self._services:
            handlers[method] = self._handler(method, SERVICE_ROLES[method], self._service_call)
        for method, stream in self._streams.items():
            handlers[method] = self._stream_handler(method, STREAM_ROLES[method], stream)
        return handlers

    def _handler(
        self,
        method: str,
        roles: frozenset[Role],
        answer: Callable[[str, Peer, bytes, grpc.aio.ServicerContext], Awaitable[_Answer]],
    ) -> Handler:
        call = method.rpartition("/")[2]

        async def handle(_: Any, context: grpc.aio.ServicerContext) -> None:
            who, role = _named(context)
            try:
                async with self._meter.call(who, enrolling=role is Role.INVITATION) as place:

                    def admit() -> Peer:
                        return self._admit(context, roles, method)

                    admit()
                    body = await while_admitted(self._body(context, place, call), admit)
                    # A body may have been long in coming: it counts who calls now.
                    content, trailing = await answer(method, admit(), body, context)
                    place.holds(len(content))
                    if trailing:
                        context.set_trailing_metadata(trailing)
                    # Who does not take its answers keeps its own places filled with them.
                    await while_admitted(context.write(content), admit)
            except ConsiliumError as error:
                await _refuse(context, who, error)

        return handle

    def _stream_handler(self, method: str, roles: frozenset[Role], stream: Stream) -> Handler:
        async def handle(_: Any, context: grpc.aio.ServicerContext) -> None:
            who, _role = _named(context)
            try:
                async with self._meter.call(who) as place:

                    def admit() -> Peer:
                        return self._admit(context, roles, method)

                    peer = admit()
                    line = MeteredLine(context, place, self._places, who, self._limits.body_seconds)
                    await while_admitted(stream(peer, line), admit)
            except ConsiliumError as error:
                await _refuse(context, who, error)

        return handle

    async def _unknown(self, context: grpc.aio.ServicerContext) -> None:
        """End a call of no method of ours at once: it holds no place, and nothing of it is read."""
        _log.warning("refused %s (%s): there is no such call", _named(context)[0], context.peer())
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)

    async def _body(self, context: grpc.aio.ServicerContext, place: Call, call: str) -> bytes:
        await place.expect_body()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await context.read()
        except TimeoutError:
            raise ConsiliumError("network.slow", "The call's body did not come in time.") from None
        if not isinstance(body, bytes):
            raise ConsiliumError("network.garbage", "The call has no body.")
        place.took_body(len(body), call)
        return body

    async def _service_call(
        self, method: str, peer: Peer, body: bytes, _: grpc.aio.ServicerContext
    ) -> _Answer:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            raise ConsiliumError("network.garbage", "The request is not a JSON object.")
        return canonical_json(await self._services[method](peer, request)), ()

    async def _fleet_call(
        self, method: str, peer: Peer, body: bytes, context: grpc.aio.ServicerContext
    ) -> _Answer:
        call = method.rpartition("/")[2]
        headers = [(k, v) for k, v in context.invocation_metadata() or () if isinstance(v, str)]
        try:
            _check_speaks_for_itself(peer, call, body, dict(headers))
        except ConsiliumError as error:
            raise _at_the_door(error) from error
        node = str(peer.member.node_id) if peer.member is not None else ""
        if call == "PullMessages":
            pulled = await self._fleet.pull(
                node, body, headers, lambda: self._admit(context, FLEET_ROLES, method)
            )
            if pulled.receipt:
                if not pulled.again:
                    self._allowances.message(node)
                    self._handed.note(node, pulled.content)
                return pulled.content, ((PULLED_KEY, pulled.receipt),)
            status, content = pulled.status, pulled.content
        else:
            self._handed.require(node, call, body)
            if call in ("PushObject", "PushMessages"):
                self._allowances.charge(node, len(body))
            # When the line breaks now, what the SuperLink takes is noted all the same.
            status, content = await self._passing.wait(self._pass_on(node, call, body, headers))
        return content, () if status == 200 else ((HTTP_STATUS_KEY, str(status)),)

    async def _pass_on(
        self, node: str, call: str, body: bytes, headers: Headers
    ) -> tuple[int, bytes]:
        status, content = await self._fleet.forward(call, body, headers)
        if status == 200:
            self._arrivals.note(node, call, body, content)
        return status, content

    def _admit(
        self, context: grpc.aio.ServicerContext, roles: frozenset[Role], method: str
    ) -> Peer:
        try:
            return self._door.admit(context, roles, method)
        except ConsiliumError as error:
            raise _at_the_door(error) from error


class _DoorError(ConsiliumError):
    """A refusal of the caller itself: its reason stays here."""


def _at_the_door(error: ConsiliumError) -> ConsiliumError:
    if not error.code.startswith("identity."):
        return error
    return _DoorError(error.code, error.message, where=error.where, hint=error.hint)


def _check_speaks_for_itself(
    peer: Peer, call: str, body: bytes, headers: Mapping[str, str]
) -> None:
    """Refuse a call in another node's name: certificate, header and body are one identity."""
    assert peer.member is not None
    if headers.get("flwr-public-key") != public_key_header(peer.certified.public_key):
        raise ConsiliumError("identity.foreign-node", "The node key is not the certificate's key.")
    claimed = claimed_node(call, body)
    own: tuple[object, ...] = (
        (node_key_bytes(peer.certified.public_key),)
        if isinstance(claimed, bytes)
        else (int(peer.member.node_id or 0), None)
    )
    if claimed not in own:
        raise ConsiliumError("identity.foreign-node", f"{call} names another node.")


def _forget(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # how it ended was said already


def _named(context: grpc.aio.ServicerContext) -> tuple[str, Role | None]:
    """Return by which name a caller's use is counted: that of the certificate TLS has verified."""
    pem = context.auth_context().get("x509_pem_cert")
    return _name_in(pem[0]) if pem else ("nobody", None)


@lru_cache(maxsize=4096)
def _name_in(pem: bytes) -> tuple[str, Role | None]:
    try:
        certified = describe(load_certificate(pem))
    except ConsiliumError:
        return "unnamed", None  # the consortium's own certificate, and none of a member's
    return f"{certified.role} {certified.name}", certified.role


async def _refuse(context: grpc.aio.ServicerContext, who: str, error: ConsiliumError) -> None:
    """End the call with ``error``; gRPC's status says only its kind."""
    _log.warning("refused %s (%s): %s", who, context.peer(), error)
    told = _REFUSED if isinstance(error, _DoorError) else error
    if error.code in _EXHAUSTED:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    else:
        code = {
            "identity": grpc.StatusCode.PERMISSION_DENIED,
            "network": grpc.StatusCode.UNAVAILABLE,
            "internal": grpc.StatusCode.INTERNAL,
        }.get(error.code.partition(".")[0], grpc.StatusCode.FAILED_PRECONDITION)
    await context.abort(
        code, told.code, trailing_metadata=((ERROR_KEY, canonical_json(told.to_dict())),)
    )
