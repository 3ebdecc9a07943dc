"""A text for the network department: what to allow, from where to where, and what was tried.

It holds addresses, ports, public fingerprints and results; no key, no password, no patient's data.
"""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from consilium_common import __version__
from consilium_common.diagnosis.reaching import addresses_of, is_literal
from consilium_common.diagnosis.steps import Diagnosis, Outcome, Step
from consilium_common.diagnosis.target import Target
from consilium_common.diagnosis.tls import certificate_fingerprint
from consilium_common.errors import ConsiliumError, printable
from consilium_common.files import require_new, write_atomic
from consilium_common.identity.certificates import SERVER_NAME
from consilium_common.identity.words import fingerprint_words
from consilium_common.report.wording import listed, moment
from consilium_common.wire.channel import CHANNEL_OPTIONS

_WIDTH: Final = 79
_OPTIONS: Final = dict(CHANNEL_OPTIONS)
_KEEP_ALIVE: Final = int(_OPTIONS["grpc.keepalive_time_ms"]) // 1000
_ANSWER: Final = int(_OPTIONS["grpc.keepalive_timeout_ms"]) // 1000
#: Steps whose results a network department can use; the others are the site's own matter.
_OF_THE_NETWORK: Final = frozenset(
    {"clock", "DNS", "TCP", "proxy", "TLS", "revocation", "clock skew", "speed", "port", "outside"}
)


@dataclass(frozen=True)
class Ticket:
    """What is asked for, and the facts it rests on.

    Parameters
    ----------
    subject : str
        In one line.
    connections : sequence of (what, value)
        The rule to be made.
    requests : sequence of str
        Sentences, each of which somebody can act on.
    """

    subject: str
    connections: Sequence[tuple[str, str]]
    requests: Sequence[str]

    def text(self, target: Target, diagnosis: Diagnosis) -> str:
        """Return the whole text."""
        lines = [
            f"Subject: {self.subject}",
            "",
            *_wrapped(
                "Consilium trains models for medical imaging in several hospitals. Images stay "
                "where they are; encrypted models travel over one connection to a server that is "
                "called the aggregator. This text says what that connection needs."
            ),
            "",
            "THE CONNECTION",
            *_table(self.connections),
            "",
            "PLEASE",
            *_numbered(self.requests),
            "",
            "HOW TO RECOGNISE IT",
            *_table(_recognise(target, diagnosis)),
            "",
            "WHAT WAS TRIED",
            *_tried(diagnosis.steps),
            "",
            f"Written {moment(datetime.now(UTC))} by Consilium {__version__}. Nothing in this text "
            "is secret.",
        ]
        return "\n".join(printable(line) for line in lines) + "\n"


def site_ticket(target: Target) -> Ticket:
    """Return the ticket of a site, which connects outward and is never connected to."""
    aggregator = _addresses(target.host, target.port)
    proxy = target.proxy
    if proxy is None:
        way = "direct, no proxy is used"
    else:
        way = f"through the HTTP proxy {proxy.address}, by CONNECT {target.address}"
        way += ", with a login" if proxy.login else ", without a login"
    asked = f"from this machine to {target.address} over TCP"
    requests = [
        f"Allow connections {asked}"
        + (f", and CONNECT to it at {proxy.address}." if proxy else "."),
        f"Do not open or inspect TLS to {target.address}: both ends prove themselves with "
        "certificates of their own authority, so that an inspected connection always fails. Put it "
        "on the list of exceptions.",
        f"Let idle connections live: each end is asked for a sign of life every {_KEEP_ALIVE} s and"
        f" answers within {_ANSWER} s. Idle time-outs must be longer than"
        f" {_KEEP_ALIVE + _ANSWER} s; long connections must not be cut.",
        "Nothing has to be opened inward: no port, no forwarding, no fixed address for this site.",
    ]
    if proxy is None and not is_literal(target.host):
        requests.insert(1, f"Let this machine look up the name {target.host} (DNS).")
    return Ticket(
        f"Allow an outgoing TLS connection to {target.address}",
        (
            ("From", _here(target)),
            ("To", f"{target.address} ({aggregator})"),
            ("Direction", "outgoing only; this machine always begins"),
            ("Way", way),
            *_protocol(target),
        ),
        requests,
    )


def server_ticket(target: Target, listening: str, sites: Iterable[tuple[str, str]]) -> Ticket:
    """Return the ticket of the aggregator, to which sites connect.

    Parameters
    ----------
    listening : str
        ``host:port`` on which this machine listens.
    sites : iterable of (name, address)
        Whence sites were seen last.
    """
    seen = [f"{name} {address}" for name, address in sites if address]
    return Ticket(
        f"Allow incoming TLS connections to {target.address}",
        (
            ("From", "the sites' networks" + (f"; last seen: {listed(seen)}" if seen else "")),
            ("To", f"{target.address} ({_addresses(target.host, target.port)})"),
            ("Machine", f"{_here(target)}, listening on {listening}"),
            ("Direction", "incoming only; sites always begin"),
            *_protocol(target),
        ),
        (
            f"Allow incoming connections to {target.address} over TCP, and forward them to this "
            "machine if it has another address inside.",
            "Pass them through unchanged (layer 4). A load balancer or reverse proxy must not end "
            "TLS: both ends prove themselves with certificates of their own authority.",
            f"Let idle connections live: each end is asked for a sign of life every {_KEEP_ALIVE} s"
            f" and answers within {_ANSWER} s. Idle time-outs must be longer than "
            f"{_KEEP_ALIVE + _ANSWER} s; long connections must not be cut.",
            f"Let the name {target.host} be looked up from outside."
            if not is_literal(target.host)
            else f"Keep the address {target.host}: it stands in the sites' invitations.",
            "Nothing has to be opened outward: this machine begins no connection to a site.",
        ),
    )


def save_ticket(path: Path, text: str) -> None:
    """Write the text where nothing is yet, readable to all: it goes to other people.

    Raises
    ------
    ConsiliumError
        ``state.exists``, ``state.folder``, ``state.disk``.
    """
    require_new(path)
    write_atomic(path, text.encode(), mode=0o644)


def _protocol(target: Target) -> tuple[tuple[str, str], ...]:
    return (
        ("Port", f"TCP {target.port}, one connection or a few, held open"),
        ("Protocol", "TLS 1.3 with certificates on both sides, HTTP/2 inside (gRPC, ALPN h2)"),
        ("TLS name", f"{SERVER_NAME} (SNI; a fixed name that is not in the DNS)"),
        ("Amount", "small calls all day; models of up to some hundred MB both ways in a round"),
    )


def _recognise(target: Target, diagnosis: Diagnosis) -> list[tuple[str, str]]:
    authority = target.trust.authorities[0]
    rows = [
        ("Authority", f"SHA-256 {certificate_fingerprint(authority)}"),
        ("", f"words: {fingerprint_words(authority)}"),
    ]
    shown = next((one.facts for one in diagnosis.steps if one.name == "TLS"), {})
    if shown:
        rows += [
            ("Aggregator", f"SHA-256 {shown['fingerprint']}"),
            ("", f"words: {shown['words']}; valid until {shown['valid_until'][:10]}"),
        ]
    return rows


def _tried(steps: Sequence[Step]) -> list[str]:
    lines = []
    for step in steps:
        if step.name not in _OF_THE_NETWORK or (
            step.outcome is Outcome.SKIPPED and step.happened.startswith("Not tried")
        ):
            continue
        lines += _wrapped(
            f"{step.name}: {step.tried}. {str(step.outcome).upper()}: {step.happened}",
            first="- ",
            rest="  ",
        )
    return lines or ["- nothing yet"]


def _here(target: Target) -> str:
    """Return this machine's name and the address that it would use on the way out."""
    name = socket.gethostname()
    host, port = target.first
    try:
        for address in addresses_of(host, port):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, port))  # sends nothing: it only chooses the way
                return f"{name} ({probe.getsockname()[0]})"
    except (ConsiliumError, OSError):
        pass
    return name


def _addresses(host: str, port: int) -> str:
    try:
        return listed(addresses_of(host, port))
    except ConsiliumError:
        return "the name is not known to this machine's DNS"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for what, value in rows:
        label = f"{what}:" if what else ""
        lines += _wrapped(value, first=f"  {label:<12}", rest=" " * 14)
    return lines


def _numbered(sentences: Iterable[str]) -> list[str]:
    lines = []
    for number, sentence in enumerate(sentences, start=1):
        lines += _wrapped(sentence, first=f"{number}. ", rest="   ")
    return lines


def _wrapped(text: str, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
