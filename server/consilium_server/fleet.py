"""Forwards Fleet calls to the SuperLink on loopback: raw bytes, one call's worth of memory.

PullMessages is held open until there is a message, so that an idle SuperNode never sleeps while a
round waits for it. What was handed out to a line that is dead is handed out again.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import httpx

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import (
    FLEET_HEADER_PREFIX,
    FLEET_PATHS,
    PROTOBUF_MEDIA_TYPE,
    PULLED_KEY,
)
from consilium_server.arrivals import ArrivalLists
from consilium_server.flower_private import has_message, objects_to_push, pushed_object, replied_to
from consilium_server.kicks import Kicks
from consilium_server.outliving import Outliving

#: Shorter than the 30 s after which a SuperNode gives a call up.
HOLD_SECONDS: Final = 24.0
#: How long messages that nobody heard of are handed out again.
_AGAIN_SECONDS: Final = 60.0
#: How long a revoked site's held call may outlive the revocation.
_ADMIT_SECONDS: Final = 1.0

Headers = list[tuple[str, str]]


class Arrivals:
    """Tells the round loop that a reply is there, so that it need not ask the SuperLink.

    A reply is announced with the ids of its objects, which then come one by one; when the last one
    has come, the message that it replies to is noted in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._lists = ArrivalLists(folder)
        #: Of each node the message that it replies to, and what is missing of the reply.
        self._missing: dict[str, tuple[str, set[str]]] = {}

    def note(self, node_id: str, call: str, body: bytes, response: bytes) -> None:
        """Take in a Fleet call that the SuperLink has answered well."""
        if call == "PushMessages":
            self._missing[node_id] = replied_to(body), set(objects_to_push(response))
        elif call != "PushObject" or node_id not in self._missing:
            return
        message, missing = self._missing[node_id]
        if call == "PushObject":
            missing.discard(pushed_object(body))
        if not missing:
            del self._missing[node_id]
            self._lists.add(node_id, message)


@dataclass(frozen=True)
class Pulled:
    """What a pull brought.

    Attributes
    ----------
    status : int
        The SuperLink's HTTP status.
    receipt : str
        Of the messages in ``content``; empty where there are none.
    again : bool
        Whether they were handed out before.
    """

    status: int
    content: bytes
    receipt: str = ""
    again: bool = False


class FleetForwarder:
    """The gateway's hop to the SuperLink.

    Parameters
    ----------
    base_url : str
        ``https://127.0.0.1:port``.
    certificate : Path
        The SuperLink's loopback certificate, trusted for this hop alone.
    kicks : Kicks
        Says when messages wait.
    """

    def __init__(self, base_url: str, certificate: Path, kicks: Kicks) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        self._client = httpx.AsyncClient(
            base_url=base_url,
            verify=context,
            timeout=httpx.Timeout(60.0, connect=5.0),
            # As many as are kept open: a handshake costs more than waiting for one that is free.
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
            trust_env=False,
        )
        self._kicks = kicks
        #: The last messages that were handed out to a node, to which session, and when.
        self._handed: dict[str, tuple[str, Pulled, float]] = {}
        self._asking = Outliving()

    async def forward(self, call: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
        """Return the SuperLink's HTTP status and body for one call.

        Raises
        ------
        ConsiliumError
            ``network.superlink`` while the SuperLink is away; the site's side tries again.
        """
        try:
            response = await self._client.post(
                f"/v1/fleet/{FLEET_PATHS[call]}",
                content=body,
                headers={
                    **{k: v for k, v in headers if k.startswith(FLEET_HEADER_PREFIX)},
                    "content-type": PROTOBUF_MEDIA_TYPE,
                    "accept": PROTOBUF_MEDIA_TYPE,
                },
            )
        except httpx.HTTPError as error:
            raise ConsiliumError(
                "network.superlink", "The aggregator's Flower process is starting; try again."
            ) from error
        return response.status_code, response.content

    async def pull(
        self, node: str, body: bytes, headers: Headers, still_admitted: Callable[[], object]
    ) -> Pulled:
        """Forward PullMessages, and again whenever messages may have come, until one has.

        ``still_admitted`` raises when the caller was revoked meanwhile.
        """
        end = time.monotonic() + HOLD_SECONDS
        session, _, shown = dict(headers).get(PULLED_KEY, "").partition(".")
        while True:
            seen = self._kicks.seen(node)
            if lost := self._lost(node, session, shown):
                return lost
            # A line that breaks now ends this call, and not what the SuperLink is handing out.
            found = await self._asking.wait(self._pull_once(node, session, body, headers))
            if found.status != httpx.codes.OK or found.receipt:
                return found
            while self._kicks.seen(node) == seen:
                if time.monotonic() > end:
                    return found
                await self._kicks.wait(node, seen, _ADMIT_SECONDS)
                still_admitted()
                # A call of a line that is dead may be held still, and take what has just come.
                if lost := self._lost(node, session, shown):
                    return lost

    async def _pull_once(self, node: str, session: str, body: bytes, headers: Headers) -> Pulled:
        status, content = await self.forward("PullMessages", body, headers)
        if status != httpx.codes.OK or not has_message(content):
            return Pulled(status, content)
        found = Pulled(status, content, hashlib.sha256(content).hexdigest())
        self._handed[node] = session, found, time.monotonic()
        return found

    def _lost(self, node: str, session: str, shown: str) -> Pulled | None:
        """Return what was handed out to a session that did not hear it.

        A new session, and a site that was away for longer, are asked anew by the rounds themselves.
        A caller that names no session shows no receipts, and gets nothing twice.
        """
        before, handed, at = self._handed.get(node, ("", None, 0.0))
        if handed is None or not session or session != before or shown == handed.receipt:
            return None
        return replace(handed, again=True) if time.monotonic() - at < _AGAIN_SECONDS else None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
