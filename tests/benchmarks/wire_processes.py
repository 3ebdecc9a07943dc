"""The processes of the wire's benchmark: our gateway, our link, and Flower's own SuperNode."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


async def run_gateway(folder: Path, superlink: str, certificate: Path, port: int) -> None:
    """Serve the port with our gateway; the services behind it are not asked anything."""
    from consilium_common.identity.trust import Trust
    from consilium_common.wire.methods import SERVICE_ROLES
    from consilium_server.fleet import Arrivals, FleetForwarder
    from consilium_server.gateway import Gateway
    from consilium_server.home import ServerHome
    from consilium_server.kicks import Kicks
    from consilium_server.peers import Doorkeeper, Peer
    from consilium_server.registry import Registry
    from consilium_server.transfers import Transfers

    async def nothing(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    arrived = folder / "arrived"
    arrived.mkdir(exist_ok=True)
    registry = Registry(folder / "registry.db")
    gateway = Gateway(
        Doorkeeper(Trust.read(folder / "authority.pem"), registry),
        FleetForwarder(f"https://{superlink}", certificate, Kicks(folder / "kicks")),
        Arrivals(arrived),
        dict.fromkeys(SERVICE_ROLES, nothing),
        Transfers(ServerHome(folder), registry).table(),
    )
    await gateway.start("127.0.0.1", port, folder)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def run_link(site: Path, port: int) -> None:
    """Serve the link as `site start` does."""
    from consilium_client.endpoint import endpoint
    from consilium_client.home import SiteHome
    from consilium_client.identity import SiteIdentity
    from consilium_client.link import Link
    from consilium_common.identity.loopback import make_loopback

    home = SiteHome.existing(site)
    loopback = make_loopback(home.run)
    link = Link(home, SiteIdentity.load(home), lambda words: print(words, file=sys.stderr))
    server = endpoint(link.application, loopback, port)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    print("ready", flush=True)
    await serving


def flower_content(weights: bytes) -> Any:
    """Return a message's content as it is without us: the model rides in it."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(weights),), stype="blob", data=weights)
    return RecordDict({"model": ArrayRecord({"weights": array})})


def run_node(site: Path, address: str, certificate: Path, digest: str) -> None:
    """Be the SuperNode: for each line on standard input answer one message, and print seconds.

    With the SuperLink itself the model rides in the message and the update in the reply. With the
    link both are files beside them: down ends when the model is on the site's disk, up when the
    reply that names the update is taken, which it is after the update.
    """
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )
    from flwr.supercore.inflatable.inflatable_utils import (
        inflate_object_from_contents,
        pull_objects,
        push_object_contents_from_iterable,
    )
    from flwr.supernode.fleet_http_connection import http_request_response

    from consilium_client.home import SiteHome
    from consilium_client.received import wait_for_model
    from consilium_client.store import StudyStore
    from consilium_common.identity.keys import load_tls_key
    from consilium_common.wire.messages import Reference, instructions_of, to_server

    home = SiteHome.existing(site)
    key = load_tls_key(home.identity / "site-key.pem")
    store = StudyStore(home)
    with http_request_response(
        address, False, str(certificate), (key, key.public_key())
    ) as connection:
        _, receive, send, _, _, pull, push, confirm = connection
        print("ready", flush=True)
        for line in sys.stdin:
            who, number = line.split()
            update = store.update(digest, int(number))
            assert update is not None
            begin = time.perf_counter()
            received = receive()
            while received is None:
                begin = time.perf_counter()
                received = receive()
            message, tree = received
            run = message.metadata.run_id
            contents = pull_objects(
                [node.object_id for node in iterate_object_tree(tree)],
                pull_object_fn=lambda one, run=run: pull(run, one),
            )
            size = sum(map(len, contents.values()))
            if who == "consilium":
                asked = inflate_object_from_contents(tree.object_id, contents)
                model = instructions_of(asked.content).model
                size = wait_for_model(home, digest, model, 60).stat().st_size
            down = time.perf_counter() - begin
            del contents
            home.replied.touch()  # there is no task for which the link would wait
            os.utime(home.replied, ns=(time.time_ns(), time.time_ns()))
            confirm(run, message.metadata.message_id)

            content = (
                to_server(Reference(update.sha256, update.bytes), None)
                if who == "consilium"
                else flower_content(update.blob)
            )
            reply = Message(content=content, reply_to=message)
            objects = {k: v.deflate() for k, v in get_all_nested_objects(reply).items()}
            reply_tree = get_object_tree(reply)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            begin = time.perf_counter()
            wanted, session = send(reply, reply_tree, 0.0)
            push_object_contents_from_iterable(
                ((k, v) for k, v in objects.items() if k in wanted),
                lambda one, content, run=run, session=session: push(run, session, one, content),
            )
            up = time.perf_counter() - begin
            print(json.dumps({"down": down, "up": up, "bytes": size}), flush=True)
