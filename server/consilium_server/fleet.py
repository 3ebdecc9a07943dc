"""Forwards Fleet calls to the SuperLink on loopback: raw bytes, one call's worth of memory.

PullMessages is held open until there is a message, so that an idle SuperNode never sleeps while a
round waits for it.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import FLEET_HEADER_PREFIX, FLEET_PATHS, PROTOBUF_MEDIA_TYPE
from consilium_server.arrivals import ArrivalCounts
from consilium_server.flower_private import has_message, objects_to_push, pushed_object
from consilium_server.kicks import Kicks

#: Shorter than the 30 s after which a SuperNode gives a call up.
HOLD_SECONDS: Final = 24.0
#: How long a revoked site's held call may outlive the revocation.
_ADMIT_SECONDS: Final = 1.0

Headers = list[tuple[str, str]]


class Arrivals:
    """Tells the round loop that a reply is there, so that it need not ask the SuperLink.

    A reply is announced with the ids of its objects, which then come one by one; when the last one
    has come, one more reply of the node is counted in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._counts = ArrivalCounts(folder)
        self._missing: dict[str, set[str]] = {}

    def note(self, node_id: str, call: str, body: bytes, response: bytes) -> None:
        """Take in a Fleet call that the SuperLink has answered well."""
        if call == "PushMessages":
            self._missing[node_id] = set(objects_to_push(response))
        elif call == "PushObject":
            self._missing.get(node_id, set()).discard(pushed_object(body))
        else:
            return
        if not self._missing.get(node_id):
            self._counts.add(node_id)


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
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=64),
            trust_env=False,
        )
        self._kicks = kicks

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
    ) -> tuple[int, bytes]:
        """Forward PullMessages, and again whenever messages may have come, until one has.

        ``still_admitted`` raises when the caller was revoked meanwhile.
        """
        end = time.monotonic() + HOLD_SECONDS
        while True:
            seen = self._kicks.seen(node)
            status, content = await self.forward("PullMessages", body, headers)
            if status != httpx.codes.OK or has_message(content):
                return status, content
            while self._kicks.seen(node) == seen:
                if time.monotonic() > end:
                    return status, content
                await self._kicks.wait(node, seen, _ADMIT_SECONDS)
                still_admitted()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
