"""An aggregator in an attacker's hands that answers a site's calls with mutated answers.

It has the aggregator's own certificate and key, and nothing else of ours between it and the wire:
its answers need be no protobuf and no JSON, and status, error and receipt beside them may be
anything that gRPC carries.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from egress_samples import Question, SuperLink
from federation import Federation
from fuzzed_frames import mutated
from serving_samples import in_own_loop

from consilium_common import __version__
from consilium_common.canonical import canonical_json
from consilium_common.study import Study
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    HTTP_STATUS_KEY,
    PROTOCOL,
    PULLED_KEY,
    SITE_DELIVER,
    SITE_FETCH,
    SITE_HELLO,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.presenting import Presented

#: Answers that are well formed somewhere, and never where a site expects them.
_STRANGE = (
    b"",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"null",
    b"[]",
    b'{"held": -1}',
    b'{"held": 1e999}',
    b'{"version": "\\ud800", "protocol": {}, "running": 7}',
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\xff" * 300,
)
_STATUSES = ("200", "400", "401", "403", "404", "500", "503", "", "-1", "x", "9" * 30)
#: Not "unavailable": a link then holds the call, as it should, and few would come.
_ENDS = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
)


class HostileAggregator:
    """Answers at the aggregator's address.

    Parameters
    ----------
    study : Study
        Its messages ask for rounds of this study.

    Attributes
    ----------
    sent : int
        Answers of Fleet calls that were not the honest one.
    question : Question
        The message of the last pull.
    """

    def __init__(self, federation: Federation, study: Study, source: random.Random) -> None:
        self.sent = 0
        self.question = Question(study)
        self._study = study
        self._federation = federation
        self._source = source
        self._honest = SuperLink()

    def serving(self) -> AbstractContextManager[None]:
        """Serve until the end of the block."""
        return in_own_loop(self._start)

    async def _start(self) -> Callable[[], Awaitable[Any]]:
        server = grpc.aio.server(handlers=(_Everything(self._answer),))
        presented = Presented(self._federation.home / "identity")
        assert server.add_secure_port(self._federation.address, presented.credentials())
        await server.start()
        return lambda: server.stop(0.1)

    async def _answer(self, method: str, context: Any) -> None:
        asked = await context.read()
        body = asked if isinstance(asked, bytes) else b""
        trailing: dict[str, Any] = {}
        source, call = self._source, method.rpartition("/")[2]
        content = self._honest_answer(method, call, body)
        if source.random() < 0.1:
            trailing[HTTP_STATUS_KEY] = source.choice(_STATUSES)
        if source.random() < 0.1:
            trailing[PULLED_KEY] = source.choice(("", "x" * 300, "a.b.c", "\x20"))
        if source.random() < 0.8:
            content = source.choice(_STRANGE) if source.random() < 0.2 else mutated(source, content)
            self.sent += call in FLEET_PATHS
        if source.random() < 0.1:
            code = source.choice(("identity.refused", "network.busy", "run.no-model", "\x00", "x"))
            error = canonical_json({"code": code, "message": "No.", "where": "", "hint": ""})
            trailing[ERROR_KEY] = mutated(source, error) if source.random() < 0.8 else error
            self.sent += call in FLEET_PATHS
            await context.abort(source.choice(_ENDS), "x", tuple(trailing.items()))
        context.set_trailing_metadata(tuple(trailing.items()))
        await context.write(content)
        if method in (SITE_FETCH, SITE_DELIVER):
            for _ in range(source.randrange(3)):
                await context.write(source.randbytes(source.choice((0, 1, 1000, 200_000))))

    def _honest_answer(self, method: str, call: str, body: bytes) -> bytes:
        if method == SITE_HELLO:
            now = datetime.now(UTC).isoformat()
            said = {"version": __version__, "protocol": PROTOCOL, "time": now, "trust": ""}
            return canonical_json({**said, "running": [self._study.digest], "renew": False})
        if call not in FLEET_PATHS:
            return b"{}"
        if call == "PullMessages":
            created = self.question.message.metadata.created_at + 1
            self.question = Question(
                self._study, self._source.choice(("train", "evaluate")), created_at=created
            )
            self._honest.waiting = [self.question]
            self._honest.objects = self.question.objects
        return self._honest._answer(call, body, {})


class _Everything(grpc.GenericRpcHandler):  # type: ignore[misc]
    """There is no method that it does not answer."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def handle(_: Any, context: Any) -> None:
            await self._answer(handler_call_details.method, context)

        return grpc.stream_stream_rpc_method_handler(handle)
