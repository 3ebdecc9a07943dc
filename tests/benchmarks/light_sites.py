"""Many light sites in one process: each speaks the real wire, and trains nothing.

``python light_sites.py FOLDER ADDRESS UPDATE`` plays every site whose credentials lie in FOLDER. A
site greets, holds PullMessages, fetches each model (checked against its hash, and dropped), and
delivers the file UPDATE in answer to training.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import sys
from pathlib import Path
from typing import Any, Final

from consilium_client.fleet_calls import FleetCalls
from consilium_client.flower_private_fleet import (
    Asked,
    accepted,
    heartbeat_seconds,
    make_request,
    node_headers,
    node_key,
    outgoing,
    push_object,
)
from consilium_client.greeting import greeting
from consilium_common.canonical import canonical_json
from consilium_common.identity.keys import load_tls_key
from consilium_common.wire.channel import Credentials, aio_channel
from consilium_common.wire.messages import Instructions, Reference, instructions_of, to_server
from consilium_common.wire.methods import (
    CHUNK_BYTES,
    HTTP_STATUS_KEY,
    SITE_DELIVER,
    SITE_FETCH,
    SITE_HELLO,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc

HELLO_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 0.5


class LightSite:
    """One site.

    Parameters
    ----------
    folder : Path
        Its key and certificate, and the authority's.
    update : Path
        What it answers training with.
    """

    def __init__(self, folder: Path, address: str, update: tuple[Path, Reference]) -> None:
        authority, certificate, key = (
            (folder / name).read_bytes() for name in ("authority.pem", "site.pem", "site-key.pem")
        )
        self._key = load_tls_key(folder / "site-key.pem")
        self._channel = aio_channel(address, Credentials(authority, certificate, key))
        self._calls = FleetCalls(node_key(self._key.public_key()))
        self._session = secrets.token_hex(8)
        self._update, self._reference = update
        self.greeted = 0
        self.trained = 0

    async def live(self) -> None:
        """Greet, beat and answer until cancelled."""
        await asyncio.gather(self._greet(), self._work())

    async def _greet(self) -> None:
        hello = self._channel.unary_unary(SITE_HELLO)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await hello(greeting(self._session, ""), timeout=20)
                self.greeted += 1
            await asyncio.sleep(HELLO_SECONDS)

    async def _work(self) -> None:
        while True:
            try:
                if self._calls.node_id is None:
                    await self._fleet(
                        "ActivateNode",
                        public_key=node_key(self._key.public_key()),
                        heartbeat_interval=heartbeat_seconds(),
                    )
                    beating = asyncio.create_task(self._beat())
                asked = await self._next()
                if asked is not None:
                    await self._answer(asked)
            except (grpc.aio.AioRpcError, ConnectionError, TimeoutError):
                await asyncio.sleep(PAUSE_SECONDS)
            except asyncio.CancelledError:
                beating.cancel()
                raise

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(heartbeat_seconds() / 2)
            with contextlib.suppress(grpc.aio.AioRpcError, ConnectionError):
                await self._fleet(
                    "SendNodeHeartbeat", node=self._node(), heartbeat_interval=heartbeat_seconds()
                )

    async def _next(self) -> Asked | None:
        content = await self._fleet("PullMessages", node=self._node())
        found = self._calls._asked
        if not found:
            return None
        asked = next(reversed(found.values()))
        if asked.replied or not content:
            return None
        for name in sorted(asked.objects):
            await self._fleet("PullObject", node=self._node(), run_id=asked.run_id, object_id=name)
        await self._fleet(
            "ConfirmMessageReceived",
            node=self._node(),
            run_id=asked.run_id,
            message_object_id=asked.message_id,
        )
        return asked

    async def _answer(self, asked: Asked) -> None:
        instructions = instructions_of(asked.settings())
        if instructions.model is not None:
            await self._fetch(instructions, instructions.model)
        update = None
        if asked.kind == "train":
            await self._deliver(instructions.study)
            update = self._reference
            self.trained += 1
        reply = outgoing(asked, self._calls.own_node(), content=to_server(update, None))
        session, wanted = accepted(await self._raw("PushMessages", reply.body))
        objects = {reply.message_id: reply.message, **_objects(update)}
        for name in wanted:
            node = self._calls.own_node()
            body = push_object(node, asked.run_id, session, name, objects[name])
            await self._raw("PushObject", body)
        asked.replied = reply.message_id

    async def _fetch(self, instructions: Instructions, model: Reference) -> None:
        call = self._channel.stream_stream(SITE_FETCH)()
        request = {"study": instructions.study, "sha256": model.sha256, "offset": 0}
        await call.write(canonical_json(request))
        await call.done_writing()
        seen = hashlib.sha256()
        async for piece in call:
            seen.update(piece)
        if seen.hexdigest() != model.sha256:
            raise RuntimeError("the model that came is another")

    async def _deliver(self, study: str) -> None:
        call = self._channel.stream_stream(SITE_DELIVER)()
        reference = self._reference
        said = {"study": study, "sha256": reference.sha256, "bytes": reference.bytes}
        await call.write(canonical_json(said))
        held = json.loads(await call.read())["held"]
        with self._update.open("rb", buffering=0) as file:
            file.seek(held)
            while piece := file.read(CHUNK_BYTES):
                await call.write(piece)
        await call.done_writing()
        await call.read()

    def _node(self) -> dict[str, int]:
        return {"node_id": self._calls.own_node()}

    async def _fleet(self, call: str, **values: Any) -> bytes:
        request = make_request(call, **values)
        content = await self._raw(call, request.SerializeToString(deterministic=True))
        self._calls.answered(call, request, content)
        return content

    async def _raw(self, call: str, body: bytes) -> bytes:
        invoke = self._channel.unary_unary(fleet_method(call))(
            body, metadata=node_headers(self._key), timeout=60
        )
        content: bytes = await invoke
        status = dict(await invoke.trailing_metadata() or ()).get(HTTP_STATUS_KEY, "200")
        if status != "200":
            raise ConnectionError(f"{call}: {status}")
        return content


def _objects(update: Reference | None) -> dict[str, bytes]:
    """Return the objects of a reply's content, by their names."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    parts = get_all_nested_objects(to_server(update, None))
    return {name: part.deflate() for name, part in parts.items()}


async def play(folder: Path, address: str, update: Path) -> None:
    """Play all sites of a folder; print a line of counts for each line on standard input."""
    named = (update, Reference.of(update))
    sites = [LightSite(one, address, named) for one in sorted(folder.iterdir())]
    tasks = []
    for site in sites:
        tasks.append(asyncio.create_task(site.live()))
        await asyncio.sleep(HELLO_SECONDS / max(1, len(sites)))  # not all in the same moment
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        counts = {
            "sites": len(sites),
            "greeted": sum(site.greeted for site in sites),
            "trained": sum(site.trained for site in sites),
            "ended": [repr(task.exception()) for task in tasks if task.done()][:3],
        }
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    asyncio.run(play(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
