"""A hospital's way out: CONNECT asks its HTTPS proxy to pass our sealed TLS on to the aggregator.

The proxy sees the aggregator's address and sealed bytes; mutual TLS goes through it end to end.
"""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from consilium_common.errors import ConsiliumError

#: Settings that are no address: straight to the aggregator, and as HTTPS_PROXY and NO_PROXY say.
NO_PROXY: Final = "none"
FROM_ENVIRONMENT: Final = "environment"
#: Variables that send a program to a proxy; they may hold a password.
PROXY_VARIABLES: Final = frozenset({"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"})

_LONGEST_ANSWER: Final = 16 * 1024
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy; ``login`` is ``user:password``, empty where it asks for none."""

    host: str
    port: int
    login: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """``host:port``, as gRPC and people read it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authorization(self) -> str:
        """Value of the header ``Proxy-Authorization``; empty without a login (RFC 7617)."""
        if not self.login:
            return ""
        return "Basic " + base64.b64encode(self.login.encode()).decode("ascii")

    def channel_options(self, target: str) -> list[tuple[str, Any]]:
        """Return what makes a gRPC channel *to the proxy* one through it to ``target``.

        gRPC's own reading of proxies is not used: it would follow ``no_proxy`` of whatever
        environment it runs in, and takes a password as part of a URL.
        """
        options: list[tuple[str, Any]] = [("grpc.http_connect_server", target)]
        if self.authorization:
            header = f"Proxy-Authorization:{self.authorization}"
            options.append(("grpc.http_connect_headers", header))
        return options


def check_setting(setting: str) -> str:
    """Return a proxy setting that can be stored: ``none``, ``environment`` or ``http://host:port``.

    Raises
    ------
    ConsiliumError
        ``usage.proxy``; also for an address with a password in it, which others could read.
    """
    if setting not in (NO_PROXY, FROM_ENVIRONMENT) and _from_url(setting).login:
        raise ConsiliumError(
            "usage.proxy",
            "The proxy's address holds a user or password; there it could be read by others.",
            hint="Write user:password into a file that you alone can read, and name that file.",
        )
    return setting


def choose_proxy(setting: str, address: str, *, login: str = "") -> Proxy | None:
    """Return the proxy to ``address`` (``host:port``), None for the straight way.

    Parameters
    ----------
    setting : str
        As :func:`check_setting` takes it.
    login : str
        ``user:password`` for a proxy that is named by its address (default: none needed).
    """
    if setting == NO_PROXY:
        return None
    if setting != FROM_ENVIRONMENT:
        check_setting(setting)
        found = _from_url(setting)
        return Proxy(found.host, found.port, login)
    # typeshed does not know the second, which all systems have.
    from urllib.request import getproxies_environment
    from urllib.request import proxy_bypass_environment as bypassed  # type: ignore[attr-defined]

    host, _, _ = address.rpartition(":")
    environment = getproxies_environment()
    url = environment.get("https")
    if not url or bypassed(host.strip("[]"), environment):
        return None
    return _from_url(url if "://" in url else f"http://{url}")


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for processes that need no proxy, and no password of one."""
    return {
        name: value for name, value in environment.items() if name.lower() not in PROXY_VARIABLES
    }


def read_login(path: Path) -> str:
    """Read ``user:password`` from a file; empty where there is none.

    Raises
    ------
    ConsiliumError
        ``identity.key-exposed`` when others may read it, ``identity.bad-login``.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "identity.bad-login",
            "The file with the proxy's login cannot be read as text.",
            where=str(path),
            hint="It holds one line, user:password.",
        ) from error
    if mode & 0o077:
        raise ConsiliumError(
            "identity.key-exposed",
            "The proxy's password can be read by other users of this machine.",
            where=str(path),
            hint=f"Run `chmod 600 {path}`; if others may have read it, change the password.",
        )
    if ":" not in content or not content.isprintable():
        raise ConsiliumError(
            "identity.bad-login",
            "The file with the proxy's login does not hold one line, user:password.",
            where=str(path),
            hint="Write it anew.",
        )
    return content


def open_socket(address: str, proxy: Proxy | None, *, timeout: float = 5.0) -> socket.socket:
    """Open TCP to ``address``, through the proxy where there is one; ``timeout`` in seconds.

    Raises
    ------
    ConsiliumError
        ``network.unknown-host``, ``network.refused``, ``network.unreachable`` of the aggregator;
        ``network.proxy-unknown-host``, ``network.proxy-unreachable``, ``network.proxy-login``
        (407), ``network.proxy-forbids`` (403), ``network.proxy-failed`` of the proxy.
    """
    if proxy is None:
        return _connect(address, "aggregator", "network.", timeout)
    stream = _connect(proxy.address, "proxy", "network.proxy-", timeout)
    try:
        _ask_through(stream, address, proxy)
    except BaseException:
        stream.close()
        raise
    return stream


def _connect(address: str, who: str, code: str, timeout: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout)
    except socket.gaierror as problem:
        raise ConsiliumError(
            f"{code}unknown-host",
            f"The {who}'s host name cannot be resolved.",
            where=address,
            hint=f"Check the {who}'s address and this machine's DNS.",
        ) from problem
    except ConnectionRefusedError as problem:
        raise ConsiliumError(
            f"{code}refused",
            f"The {who}'s machine answers, and nothing listens on this port.",
            where=address,
            hint=f"Check that the {who} runs, and its port; a firewall may refuse it as well.",
        ) from problem
    except TimeoutError as problem:
        raise ConsiliumError(
            f"{code}unreachable",
            f"Nobody answers at the {who}'s address within {timeout:g} s.",
            where=address,
            hint="A firewall on the way may drop it: ask your network department to let this"
            " port out.",
        ) from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "no connection"
        raise ConsiliumError(
            f"{code}unreachable",
            f"Nobody answers at the {who}'s address: {reason}.",
            where=address,
            hint=f"Check that the {who} runs and that your firewall lets this port out.",
        ) from problem


def _ask_through(stream: socket.socket, address: str, proxy: Proxy) -> None:
    """Send CONNECT (RFC 9110, section 9.3.6) and read the answer's head."""
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    try:
        stream.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        # Byte by byte: what follows the head is TLS already, and not ours to take.
        while not head.endswith(b"\r\n\r\n") and len(head) < _LONGEST_ANSWER:
            byte = stream.recv(1)
            if not byte:
                break
            head += byte
    except OSError:
        head = b""
    status = _STATUS.match(head)
    if status is None:
        raise ConsiliumError(
            "network.proxy-failed",
            "What answers at the proxy's address is no HTTP proxy.",
            where=proxy.address,
            hint="Check the proxy's address and port.",
        )
    number = int(status[1])
    if number // 100 == 2:
        return
    # A login that is wrong some proxies (tinyproxy) answer with 401, meant for web servers.
    if number == 407 or (number == 401 and proxy.login):
        raise ConsiliumError(
            "network.proxy-login",
            f"The proxy refuses the login ({number})."
            if proxy.login
            else "The proxy asks for a login (407).",
            where=proxy.address,
            hint="Put user:password, as your network department gave them, into the file"
            " proxy-login of the identity folder (chmod 600).",
        )
    if number in (401, 403, 405):
        raise ConsiliumError(
            "network.proxy-forbids",
            f"The proxy does not let us through to {address} ({number}).",
            where=proxy.address,
            hint="Ask your network department to permit CONNECT to that address and port.",
        )
    raise ConsiliumError(
        "network.proxy-failed",
        f"The proxy cannot reach {address} ({number}).",
        where=proxy.address,
        hint="Check the aggregator's address and that it runs; then ask your network department.",
    )


def _from_url(url: str) -> Proxy:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme == "https":
        # gRPC speaks CONNECT in the clear alone, and a relay of ours would be one more open port.
        raise ConsiliumError(
            "usage.proxy",
            "TLS to the proxy itself (https://…) is not spoken.",
            hint="Give the proxy's plain address, http://host:port: what goes through it is mutual"
            " TLS with the aggregator in any case. Only the aggregator's address, and a login"
            " where the proxy asks for one, are seen on the way to it.",
        )
    if parts.scheme != "http" or not host or port is None or parts.path.strip("/") or parts.query:
        # Not quoted: it may hold a password.
        raise ConsiliumError(
            "usage.proxy",
            "The proxy's address is not of the form http://host:port.",
            hint=f"Give http://proxy.example.org:3128, {FROM_ENVIRONMENT!r} for HTTPS_PROXY,"
            f" or {NO_PROXY!r}.",
        )
    user = unquote(parts.username or "")
    return Proxy(host, port, f"{user}:{unquote(parts.password or '')}" if user else "")
