"""The gateway's wire by hand: TLS, HTTP/2 frames and gRPC messages as no library sends them."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from consilium_common.identity.certificates import SERVER_NAME

#: What an HTTP/2 client says first, and its empty settings.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1


def client_context(identity: Path) -> ssl.SSLContext:
    """Return the TLS of a site, from the folder that `site join` wrote."""
    context = ssl.create_default_context(cafile=str(identity / "authority.pem"))
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(identity / "site.pem", identity / "site-key.pem")
    return context


def connect(port: int, context: ssl.SSLContext, *, timeout: float = 10.0) -> ssl.SSLSocket:
    """Open a TLS connection to a port of this machine."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    return context.wrap_socket(raw, server_hostname=SERVER_NAME)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """Return a SETTINGS frame; names are those of the RFC in lower case."""
    numbers = {"initial_window_size": 4, "max_concurrent_streams": 3, "enable_push": 2}
    content = b"".join(struct.pack(">HI", numbers[name], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, content)


def header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers in HPACK, literal and never indexed (RFC 7541, section 6.2.3)."""
    block = b""
    for name, value in headers:
        block += b"\x10" + _integer(len(name)) + name + _integer(len(value)) + value
    return block


def call_headers(method: str, *further: tuple[bytes, bytes]) -> bytes:
    """Return the header block of a gRPC call."""
    return header_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", method.encode()),
            (b":authority", SERVER_NAME.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *further,
        ]
    )


def grpc_message(content: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """Return a gRPC message: a flag, a length that may lie, and the content."""
    return struct.pack(">BI", flag, len(content) if length is None else length) + content


def _integer(value: int) -> bytes:
    """Encode a length with a prefix of 7 bits (RFC 7541, section 5.1)."""
    if value < 127:
        return bytes([value])
    out, value = b"\x7f", value - 127
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])
