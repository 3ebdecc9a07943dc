"""From a name to an open connection: DNS, TCP, and the network's proxy."""

from __future__ import annotations

import errno
import queue
import socket
import threading
import time
from ipaddress import ip_address
from typing import Final

from consilium_common.diagnosis.steps import Found
from consilium_common.diagnosis.target import Target, joined
from consilium_common.errors import ConsiliumError
from consilium_common.report.wording import listed
from consilium_common.wire.proxy import FROM_ENVIRONMENT, choose_proxy, open_socket

#: A firewall that drops packets never answers; nobody waits longer for it.
CONNECT_SECONDS: Final = 5.0
_DNS_SECONDS: Final = 10.0
_TICKET: Final = "`--ticket` writes a text for your network department with every address and port."


def addresses_of(host: str, port: int) -> tuple[str, ...]:
    """Return the IP addresses of a host, in the order of preference.

    Raises
    ------
    ConsiliumError
        ``network.unknown-host``, or ``network.no-dns`` when no name server answers.
    """
    answers: queue.SimpleQueue[tuple[str, ...] | OSError] = queue.SimpleQueue()

    def look() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(tuple(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except OSError as error:
            answers.put(error)
        except UnicodeError:  # a part of the name is empty or too long
            answers.put(OSError(errno.EINVAL, "not a name"))

    # The system's resolver knows no time-out: a thread of its own may be left behind.
    threading.Thread(target=look, daemon=True).start()
    try:
        answer: tuple[str, ...] | OSError = answers.get(timeout=_DNS_SECONDS)
    except queue.Empty:
        answer = socket.gaierror(socket.EAI_AGAIN, "no answer")
    if not isinstance(answer, OSError):
        return answer
    if answer.errno == socket.EAI_AGAIN:
        raise ConsiliumError(
            "network.no-dns",
            f"No name server answered when asked for {host}.",
            where=host,
            hint="This machine's DNS does not work, or may not ask outside: check /etc/resolv.conf "
            "with your network department.",
        )
    raise ConsiliumError(
        "network.unknown-host",
        f"The name {host} is not known to this machine's DNS.",
        where=host,
        hint="Compare the name with the aggregator operator letter by letter. If it is right, "
        f"your network department must let it be looked up. {_TICKET}",
    )


def look_up(target: Target) -> Found:
    """Look up whom this machine connects to: the aggregator, or the proxy, which looks up itself.

    Raises
    ------
    ConsiliumError
        As :func:`addresses_of`.
    """
    host, port = target.first
    who = "the proxy " if target.proxy else ""
    if is_literal(host):
        return Found(f"{who}{host} is an address; there is no name to look up")
    found = addresses_of(host, port)
    return Found(f"{who}{host} is {listed(found)}", facts={"addresses": list(found)})


def try_tcp(target: Target) -> Found:
    """Connect to every address of whom this machine connects to; one must answer.

    Raises
    ------
    ConsiliumError
        ``network.refused`` or ``network.unreachable`` when none does.
    """
    host, port = target.first
    good: dict[str, float] = {}
    bad: dict[str, ConsiliumError] = {}
    for address in addresses_of(host, port):
        started = time.perf_counter()
        try:
            open_socket(joined(address, port), None, timeout=CONNECT_SECONDS).close()
        except ConsiliumError as error:
            bad[address] = error
        else:
            good[address] = round(1000 * (time.perf_counter() - started), 2)
    if not good:
        raise _unreached(next(iter(bad.values())), target)
    said = listed(f"{joined(address, port)} in {ms:.1f} ms" for address, ms in good.items())
    if not bad:
        return Found(f"connected to {said}", facts={"milliseconds": good})
    silent = listed(bad)
    return Found.warning(
        f"connected to {said}; no connection to {silent}",
        f"Each connection may lose seconds on {silent}: have your network department let it "
        "through, or the aggregator operator take it out of the name.",
        milliseconds=good,
    )


def open_way(target: Target) -> socket.socket:
    """Open a connection to the aggregator's port, through the proxy where there is one.

    Raises
    ------
    ConsiliumError
        As :func:`consilium_common.wire.proxy.open_socket`.
    """
    return open_socket(target.address, target.proxy, timeout=CONNECT_SECONDS)


def try_proxy(target: Target) -> Found:
    """Ask the proxy for a connection to the aggregator; without one, say which are not used.

    Raises
    ------
    ConsiliumError
        ``network.proxy-login``, ``network.proxy-forbids``, ``network.proxy-failed``.
    """
    if target.proxy is not None:
        open_way(target).close()
        return Found(f"the proxy {target.proxy.address} passes us on to {target.address}")
    unused = _in_environment(target)
    if unused:
        return Found(f"none is used; {unused}, which this machine's environment names, is ignored")
    return Found("none is used, none is needed")


def is_literal(host: str) -> bool:
    """Whether a host is an IP address and not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _unreached(error: ConsiliumError, target: Target) -> ConsiliumError:
    """Return the error with what helps most: the proxy that is not used, or a ticket."""
    hint = f"{error.hint} {_TICKET}"
    unused = "" if target.proxy else _in_environment(target)
    if unused:
        hint = (
            f"This machine's environment names the proxy {unused}, which this program does not use"
            f' by itself: if the way out leads through it, set "proxy": "{FROM_ENVIRONMENT}" in'
            f" site.json (before joining: --proxy {FROM_ENVIRONMENT}). {hint}"
        )
    if target.proxy is not None:
        hint = f"It is the proxy of site.json or --proxy: check its address. {hint}"
    return ConsiliumError(error.code, error.message, where=error.where, hint=hint)


def _in_environment(target: Target) -> str:
    try:
        found = choose_proxy(FROM_ENVIRONMENT, target.address)
    except ConsiliumError:
        return ""
    return found.address if found else ""
