"""Channels to the aggregator: mutual TLS always, and one clear error when it does not come about.

The aggregator's certificate is checked against the consortium's authority and the fixed name
``SERVER_NAME``, so it may move to another address without new certificates.
"""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import SERVER_NAME
from consilium_common.wire.methods import ERROR_KEY, MAX_MESSAGE_BYTES
from consilium_common.wire.tls13 import grpc

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.ssl_target_name_override", SERVER_NAME),
    # Keep-alives survive firewalls that drop idle connections after a few minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect quickly: a round may be waiting.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Never through a proxy by accident, and never resolved into a service configuration.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
]


@dataclass(frozen=True)
class Credentials:
    """PEM of the authority, and of one's own certificate and key."""

    authority: bytes
    certificate: bytes
    key: bytes

    def for_grpc(self) -> grpc.ChannelCredentials:
        """Return gRPC's form."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


class Caller:
    """Calls our own methods: JSON in, JSON out, errors as :class:`ConsiliumError`.

    Parameters
    ----------
    address : str
        ``host:port`` of the aggregator.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.address = address
        self._credentials = credentials
        self._channel = grpc.secure_channel(
            address, credentials.for_grpc(), options=CHANNEL_OPTIONS
        )

    def call(self, method: str, request: dict[str, Any], *, timeout: float = 20.0) -> Any:
        """Call ``method``; ``timeout`` in seconds.

        Raises
        ------
        ConsiliumError
            What the aggregator refused, or ``network.*`` when it could not be reached.
        """
        invoke = self._channel.unary_unary(method)
        try:
            return json.loads(invoke(canonical_json(request), timeout=timeout))
        except grpc.RpcError as error:
            raise rpc_error(error, self.address, self._credentials) from None

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rpc_error(error: Any, address: str, credentials: Credentials | None = None) -> ConsiliumError:
    """Translate a gRPC failure into the one error that says what to do."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            return ConsiliumError.from_dict(json.loads(value))
    code = error.code()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return ConsiliumError(
            "network.timeout",
            "The aggregator did not answer in time.",
            where=address,
            hint="Try again; if it stays so, ask the aggregator operator.",
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ConsiliumError(
            "network.version",
            "The aggregator does not know this call.",
            where=address,
            hint="Site and aggregator run versions that do not fit; update the older one.",
        )
    if code == grpc.StatusCode.UNAVAILABLE:
        return _why_unavailable(address, credentials)
    return ConsiliumError("network.failed", f"The call failed ({code.name}).", where=address)


def _why_unavailable(address: str, credentials: Credentials | None) -> ConsiliumError:
    """Find out what gRPC folds into one word: nobody there, wrong aggregator, or refused."""
    host, _, port = address.rpartition(":")
    try:
        raw = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
    except socket.gaierror:
        return ConsiliumError(
            "network.unknown-host",
            "The aggregator's host name cannot be resolved.",
            where=address,
            hint="Check the address in the invitation and this machine's DNS.",
        )
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "no connection"
        return ConsiliumError(
            "network.unreachable",
            f"Nobody answers at the aggregator's address: {reason}.",
            where=address,
            hint="Check that the aggregator runs and that your firewall lets this port out.",
        )
    if credentials is None:
        raw.close()
        return ConsiliumError(
            "network.unavailable", "The aggregator is unavailable.", where=address
        )
    context = ssl.create_default_context(cadata=credentials.authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with raw, context.wrap_socket(raw, server_hostname=SERVER_NAME):
            pass
    except ssl.SSLCertVerificationError:
        return ConsiliumError(
            "identity.wrong-aggregator",
            "The aggregator at this address belongs to another consortium.",
            where=address,
            hint="Check the address; do not go on if you did not expect this.",
        )
    except (OSError, ssl.SSLError):
        return ConsiliumError(
            "network.no-tls", "What answers at this address speaks no TLS 1.3.", where=address
        )
    return ConsiliumError(
        "identity.refused",
        "The aggregator refuses this certificate.",
        where=address,
        hint="It may be revoked, expired or of another consortium; ask the aggregator operator.",
    )
