"""The aggregator's one port: mutual TLS 1.3 over gRPC, an allow-list, and nothing else.

Two kinds of methods have handlers: Flower's twelve Fleet calls, forwarded as raw bytes for sites
that speak as themselves, and our own services. Every other name is unknown to the server; Flower's
Control and Runtime APIs cannot be named here at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    HTTP_STATUS_KEY,
    MAX_MESSAGE_BYTES,
    SERVICE_ROLES,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.flower_private import claimed_node, node_key_bytes, public_key_header
from consilium_server.peers import Doorkeeper, Peer

_log = logging.getLogger(__name__)

Service = Callable[[Peer, dict[str, Any]], Awaitable[Any]]
_Handler = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


class Gateway:
    """Serves the port until stopped.

    Parameters
    ----------
    services : mapping
        Handler of each of our own methods; its keys are those of ``SERVICE_ROLES``.
    """

    def __init__(
        self,
        door: Doorkeeper,
        fleet: FleetForwarder,
        arrivals: Arrivals,
        services: Mapping[str, Service],
    ) -> None:
        if set(services) != set(SERVICE_ROLES):
            raise ValueError("every method in the role table needs a handler, and no other has one")
        self._door = door
        self._fleet = fleet
        self._arrivals = arrivals
        self._services = dict(services)
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int, identity: Path) -> None:
        """Listen on ``host:port`` with the server certificate in ``identity``."""
        credentials = grpc.ssl_server_credentials(
            [((identity / "server-key.pem").read_bytes(), (identity / "server.pem").read_bytes())],
            root_certificates=(identity / "authority.pem").read_bytes(),
            require_client_auth=True,
        )
        server = grpc.aio.server(
            handlers=(_Handlers(self._handlers()),),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=4096,
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_secure_port(address, credentials)
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
        self._server = server

    async def stop(self, grace: float = 1.0) -> None:
        """Stop listening; calls under way get ``grace`` seconds."""
        if self._server is not None:
            await self._server.stop(grace)

    def _handlers(self) -> dict[str, _Handler]:
        handlers: dict[str, _Handler] = {
            fleet_method(call): self._fleet_handler(call) for call in FLEET_PATHS
        }
        for method, service in self._services.items():
            handlers[method] = self._service_handler(method, service)
        return handlers

    def _service_handler(self, method: str, service: Service) -> _Handler:
        async def handle(body: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                peer = self._admit(context, SERVICE_ROLES[method], method)
                try:
                    request = json.loads(body)
                except ValueError:
                    request = None
                if not isinstance(request, dict):
                    raise ConsiliumError("network.garbage", "The request is not a JSON object.")
                return canonical_json(await service(peer, request))
            except ConsiliumError as error:
                return await _refuse(context, error)

        return handle

    def _fleet_handler(self, call: str) -> _Handler:
        async def handle(body: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                peer = self._admit(context, frozenset({Role.SITE}), call)
                headers = [
                    (k, v) for k, v in context.invocation_metadata() or () if isinstance(v, str)
                ]
                _check_speaks_for_itself(peer, call, body, dict(headers))
                if call == "PullMessages":
                    status, content = await self._fleet.pull(
                        body, headers, lambda: self._door.admit(context)
                    )
                else:
                    status, content = await self._fleet.forward(call, body, headers)
            except ConsiliumError as error:
                return await _refuse(context, error)
            if status == 200 and peer.member is not None and peer.member.node_id is not None:
                self._arrivals.note(peer.member.node_id, call, body, content)
            if status != 200:
                context.set_trailing_metadata(((HTTP_STATUS_KEY, str(status)),))
            return content

        return handle

    def _admit(
        self, context: grpc.aio.ServicerContext, roles: frozenset[Role], method: str
    ) -> Peer:
        peer = self._door.admit(context)
        if peer.certified.role not in roles:
            raise ConsiliumError(
                "identity.wrong-role",
                f"A {peer.certified.role} may not call {method.rpartition('/')[2]}.",
            )
        return peer


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The allow-list: a method without an entry does not exist."""

    def __init__(self, handlers: Mapping[str, _Handler]) -> None:
        # Without serialisers gRPC hands over raw bytes.
        self._handlers = {
            method: grpc.unary_unary_rpc_method_handler(handler)
            for method, handler in handlers.items()
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)


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


async def _refuse(context: grpc.aio.ServicerContext, error: ConsiliumError) -> bytes:
    """End the call with ``error``; gRPC's status says only its kind."""
    _log.warning("refused %s: %s", context.peer(), error)
    code = {
        "identity": grpc.StatusCode.PERMISSION_DENIED,
        "network": grpc.StatusCode.UNAVAILABLE,
        "internal": grpc.StatusCode.INTERNAL,
    }.get(error.code.partition(".")[0], grpc.StatusCode.FAILED_PRECONDITION)
    await context.abort(
        code, error.code, trailing_metadata=((ERROR_KEY, canonical_json(error.to_dict())),)
    )
    raise AssertionError("abort raises")
