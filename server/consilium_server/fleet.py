"""Forwards Fleet calls to the SuperLink on loopback: raw bytes, one call's worth of memory.

PullMessages is held open until there is a message, so that an idle SuperNode never sleeps while a
round waits for it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import httpx

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import FLEET_HEADER_PREFIX, FLEET_PATHS, PROTOBUF_MEDIA_TYPE
from consilium_server.flower_private import has_message, objects_to_push, pushed_object

#: Shorter than the 30 s after which a SuperNode gives a call up.
HOLD_SECONDS: Final = 24.0
#: Asks again this often without a kick, in case one was missed;
#: also how long a revoked site's held call may outlive the revocation.
_SAFETY_SECONDS: Final = 1.0
_KICK_POLL_SECONDS: Final = 0.03
#: Bytes that are encrypted and sent at a time.
_SLICE: Final = 256 * 1024

Headers = list[tuple[str, str]]


class Arrivals:
    """Tells the round loop that a reply is there, so that it need not ask the SuperLink.

    A reply is announced with the ids of its objects, which then come one by one; when the last one
    has come, the node's file in ``folder`` is touched.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
            (self._folder / node_id).touch()


class FleetForwarder:
    """The gateway's hop to the SuperLink.

    Parameters
    ----------
    base_url : str
        ``https://127.0.0.1:port``.
    certificate : Path
        The SuperLink's loopback certificate, trusted for this hop alone.
    kick : Path
        File that is touched when messages wait.
    """

    def __init__(self, base_url: str, certificate: Path, kick: Path) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        self._client = httpx.AsyncClient(
            base_url=base_url,
            verify=context,
            timeout=httpx.Timeout(60.0, connect=5.0),
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=64),
            trust_env=False,
        )
        self._kick = kick

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
                content=_slices(body),
                headers={
                    **{k: v for k, v in headers if k.startswith(FLEET_HEADER_PREFIX)},
                    "content-length": str(len(body)),
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
        self, body: bytes, headers: Headers, still_admitted: Callable[[], object]
    ) -> tuple[int, bytes]:
        """Forward PullMessages, and again whenever messages may have come, until one has.

        ``still_admitted`` raises when the caller was revoked meanwhile.
        """
        end = time.monotonic() + HOLD_SECONDS
        while True:
            seen = self._kicked_at()
            status, content = await self.forward("PullMessages", body, headers)
            if status != httpx.codes.OK or has_message(content) or time.monotonic() > end:
                return status, content
            ask_again = min(time.monotonic() + _SAFETY_SECONDS, end)
            while time.monotonic() < ask_again and self._kicked_at() == seen:
                await asyncio.sleep(_KICK_POLL_SECONDS)
            still_admitted()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _kicked_at(self) -> int:
        try:
            return self._kick.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    """Yield a body in pieces: encrypted in one go, it would be in memory three times over."""
    for start in range(0, len(body), _SLICE):
        yield body[start : start + _SLICE]
