"""Certificates and authorities are replaced under a running aggregator; sites do not notice."""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from federation import Federation, Running, add_hospitals, small_study, wait_for

from consilium_common.demo.hospitals import NAMES
from consilium_common.files import write_atomic
from consilium_common.identity.authority import MEMBER_DAYS, Authority, certificate_pem
from consilium_common.identity.certificates import SERVER_NAME, Role, read_certificate
from consilium_common.identity.keys import load_tls_key
from consilium_common.identity.trust import Trust

#: `consilium` as it is, but that the hour until the aggregator looks again is half a second.
_HURRIED = """
import os, sys
os.environ["GRPC_VERBOSITY"] = "INFO"  # as `server start` sets it, before gRPC is imported
from consilium_server import supervisor
assert supervisor._RENEWAL_SECONDS == 3600.0
supervisor._RENEWAL_SECONDS = 0.5
sys.argv = sys.argv[1:]
from consilium_common.cli import main
main()
"""


class Hurried(Federation):
    """Its aggregator looks every half second whether its certificate is due."""

    def start(self) -> None:
        self.running = Running(
            ["server", "start", "--home", self.home, "--host", "127.0.0.1"],
            self.folder / "aggregator.log",
            prefix=(sys.executable, "-c", _HURRIED),
        )
        self.running.wait_until_says("listens on")


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[Hurried]:
    with Hurried(tmp_path) as running:
        yield running


def shown(federation: Federation, site: Path) -> x509.Certificate:
    """Return the certificate that the port shows to a site that connects now."""
    context = ssl.create_default_context(cafile=str(site / "identity" / "authority.pem"))
    context.load_cert_chain(site / "identity" / "site.pem", site / "identity" / "site-key.pem")
    with (
        socket.create_connection(("127.0.0.1", federation.port), timeout=10) as stream,
        context.wrap_socket(stream, server_hostname=SERVER_NAME) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


def connections_to(port: int) -> set[int]:
    """Return the local ports of established connections to a port of this machine."""
    found = set()
    for table in ("tcp", "tcp6"):  # gRPC's sockets are of both families
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *_ = line.split()
            if state == "01" and int(remote.rpartition(":")[2], 16) == port:
                found.add(int(local.rpartition(":")[2], 16))
    return found


def test_the_servers_certificate_is_renewed_under_calls_that_are_held(hurried: Hurried) -> None:
    site = hurried.join("north")
    site.start()
    assert hurried.running is not None and site.running is not None
    identity = hurried.home / "identity"
    before = read_certificate(identity / "server.pem")
    time.sleep(1.5)  # it has looked more than once, and renewed nothing that is not due
    assert read_certificate(identity / "server.pem") == before
    held = connections_to(hurried.port)
    assert held

    key = load_tls_key(identity / "server-key.pem").public_key()
    ending = Authority.load(identity).issue(
        key, Role.SERVER, "aggregator", lifetime=timedelta(minutes=2), hosts=("127.0.0.1",)
    )
    write_atomic(identity / "server.pem", certificate_pem(ending))
    hurried.running.wait_until_says("the server's certificate was renewed", timeout=20)

    renewed = wait_for(
        lambda: next(
            (one for one in (shown(hurried, site.home),) if one not in (before, ending)), None
        ),
        "the new certificate at the port",
        timeout=10,
    )
    assert renewed == read_certificate(identity / "server.pem")
    assert renewed.public_key() == before.public_key()
    lifetime = renewed.not_valid_after_utc - renewed.not_valid_before_utc
    assert lifetime >= timedelta(days=MEMBER_DAYS)
    # The site's connections, with the poll that is held on one, are those of before.
    time.sleep(2)
    assert held <= connections_to(hurried.port)
    (row,) = hurried.server("sites").data["sites"]
    assert (row["name"], row["online"]) == ("north", True)
    assert "Traceback" not in hurried.running.output + site.running.output
    for words in ("interrupted", "cannot reach", "not connected"):
        assert words not in site.running.output
    # And it is not renewed again and again.
    assert hurried.running.output.count("the server's certificate was renewed") == 1


def test_the_authority_is_replaced_under_a_study_that_goes_on(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        add_hospitals(federation, NAMES[:1], NAMES[:1])
        site = federation.sites[NAMES[0]]
        assert federation.running is not None and site.running is not None
        old = read_certificate(federation.home / "identity" / "authority.pem")
        many = small_study("rotation", federation={"rounds": 500, "quorum": 1})
        digest = federation.propose(many)
        federation.approve(digest, site.name)
        federation.study("run", digest).data  # noqa: B018

        def goes_on() -> None:
            before = len(federation.show(digest)["rounds"])
            federation.wait_until(digest, lambda data: len(data["rounds"]) > before + 1, "rounds")

        goes_on()
        assert federation.server("rotate", "authority").data["authorities"] == 2
        goes_on()
        # A member that has not followed yet would be shut out, so it is waited for.
        wait_for(
            lambda: not federation.server("rotate", "authority", "--finish").status,
            "the site to follow the new authority",
        )
        goes_on()
        new = Trust.read(federation.home / "identity" / "authority.pem").authorities
        assert len(new) == 1 and old not in new
        certified = read_certificate(site.home / "identity" / "site.pem")
        certified.verify_directly_issued_by(new[0])
        assert shown(federation, site.home).issuer == new[0].subject
        assert "interrupted" not in site.running.output
        # Whoever starts now knows the new one alone.
        site.stop()
        site.start()
        goes_on()
        federation.study("stop", digest).data  # noqa: B018
        federation.wait_until(digest, lambda data: data["state"] == "stopped", "its end")
        assert Trust.read(site.home / "identity" / "authority.pem").authorities == new
        assert "Traceback" not in federation.running.output + site.running.output
