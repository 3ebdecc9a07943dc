"""A connection without calls is ended, however lively it is besides; nobody keeps one for ever."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from diagnosis_samples import Port
from raw_wire import PREFACE, frame, settings
from site_samples import member_credentials

from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import SERVER_NAME, Role
from consilium_common.processes import free_port
from consilium_common.wire.unavailable import tls_context
from consilium_server.limits import Limits
from consilium_server.registry import Registry

PING, GOAWAY = 6, 7


def test_a_connection_that_pings_and_never_calls_is_ended(tmp_path: Path) -> None:
    authority = Authority.create("tests")
    port = Port(tmp_path, authority, Registry(tmp_path / "registry.db"))
    port.certify()
    port.limits = Limits(idle_seconds=10.0)
    # Certified, and unknown to the register: every call of it would be refused.
    own = member_credentials(authority, Role.SITE, "south")
    number, came = free_port(), b""
    with (
        port.open(number),
        socket.create_connection(("127.0.0.1", number), timeout=2) as raw,
        tls_context(own.authority, own).wrap_socket(raw, server_hostname=SERVER_NAME) as stream,
    ):
        stream.sendall(PREFACE + settings())
        begin = time.monotonic()
        while True:
            assert time.monotonic() - begin < 40, "it was never ended"
            try:
                content = stream.recv(65536)
            except TimeoutError:
                stream.sendall(frame(PING, 0, 0, bytes(8)))
                continue
            if not content:
                break
            came += content
        assert time.monotonic() - begin > 5, "it was ended before it was idle"
    assert bytes([GOAWAY, 0, 0, 0, 0, 0]) in came
