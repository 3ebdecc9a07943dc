"""Channels to the aggregator: mutual TLS always, and one clear error when it does not come about.

The aggregator's certificate is checked against the consortium's authority and the fixed name
``SERVER_NAME``, so it may move to another address without new certificates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import SERVER_NAME
from consilium_common.wire.methods import ERROR_KEY, MAX_MESSAGE_BYTES
from consilium_common.wire.proxy import Proxy
from consilium_common.wire.tls13 import grpc

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.ssl_target_name_override", SERVER_NAME),
    # Keep-alives survive firewalls that drop idle connections after a few minutes.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a ping that is lost in silence counts as such after a minute only.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect quickly: a round may be waiting.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The aggregator may have moved: its name is looked up again soon (default: every 30 s).
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # Never through a proxy that the environment names by accident (one that was chosen is set by
    # `channel_target`), and never resolved into a service configuration.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
]


@dataclass(frozen=True)
class Credentials:
    """PEM of the authority, and of one's own certificate and key."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    def for_grpc(self) -> grpc.ChannelCredentials:
        """Return gRPC's form."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def channel_target(address: str, proxy: Proxy | None) -> tuple[str, list[tuple[str, Any]]]:
    """Return what gRPC connects to and with which options, to reach ``address``."""
    if proxy is None:
        return address, CHANNEL_OPTIONS
    return proxy.address, [*CHANNEL_OPTIONS, *proxy.channel_options(address)]


def aio_channel(
    address: str, credentials: Credentials, proxy: Proxy | None = None
) -> grpc.aio.Channel:
    """Open a channel for asynchronous calls; nothing is connected before the first."""
    target, options = channel_target(address, proxy)
    return grpc.aio.secure_channel(target, credentials.for_grpc(), options=options)


class Caller:
    """Calls our own methods: JSON in, JSON out, errors as :class:`ConsiliumError`.

    Parameters
    ----------
    address : str
        ``host:port`` of the aggregator.
    credentials : Credentials or callable
        A callable is asked before each call, so that a renewed certificate is used at once.
    proxy : Proxy, optional
        Way out of the hospital's network (default: straight).
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | Callable[[], Credentials],
        proxy: Proxy | None = None,
    ) -> None:
        self.address = address
        self._source = credentials if callable(credentials) else lambda: credentials
        self._proxy = proxy
        self._credentials = self._source()
        self._channel = self._open()
        self._closed = False

    def call(self, method: str, request: dict[str, Any], *, timeout: float = 20.0) -> Any:
        """Call ``method``; ``timeout`` in seconds.

        Raises
        ------
        ConsiliumError
            What the aggregator refused, or ``network.*`` when it could not be reached.
        """
        self._follow()
        invoke = self._channel.unary_unary(method)
        try:
            return json.loads(invoke(canonical_json(request), timeout=timeout))
        except grpc.RpcError as error:
            raise rpc_error(
                error, self.address, self._credentials, self._proxy, method=method
            ) from None

    def close(self) -> None:
        """Close the channel, and for good: another thread's call ends at once."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        now = self._source()
        if now == self._credentials or self._closed:
            return
        before, self._credentials = self._channel, now
        self._channel = self._open()
        before.close()
        if self._closed:  # meanwhile, by another thread
            self._channel.close()

    def _open(self) -> grpc.Channel:
        target, options = channel_target(self.address, self._proxy)
        return grpc.secure_channel(target, self._credentials.for_grpc(), options=options)


def said_in(error: Any) -> ConsiliumError | None:
    """Return the error that the other side sent with a failed gRPC call; None: it sent none.

    What cannot be read is ``network.bad-answer``: whoever is there need not mean well.
    """
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            try:
                return ConsiliumError.from_dict(json.loads(value))
            except (ValueError, TypeError, AttributeError, RecursionError):
                return ConsiliumError("network.bad-answer", "The other side's error is none.")
    return None


def rpc_error(
    error: Any,
    address: str,
    credentials: Credentials | None = None,
    proxy: Proxy | None = None,
    *,
    method: str = "",
) -> ConsiliumError:
    """Translate a gRPC failure into the one error that says what to do.

    Where gRPC says no more than that the aggregator is unavailable, and where the aggregator says
    no more than that it refuses the certificate, the cause is looked for from here.
    """
    from consilium_common.wire.unavailable import no_way, why_refused, why_unavailable

    said = said_in(error)
    if said is not None:
        if said.code == "identity.refused" and credentials is not None:
            return why_refused(address, credentials, method)
        return said
    code = error.code()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        # Where packets vanish on the way, gRPC's time is up before it says so.
        return no_way(address, proxy) or ConsiliumError(
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
        return why_unavailable(address, credentials, proxy)
    return ConsiliumError("network.failed", f"The call failed ({code.name}).", where=address)
