"""Messages that were handed out to a line that died are handed out again, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata

from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.wire.methods import PULLED_KEY
from consilium_server import fleet as fleet_module
from consilium_server.fleet import FleetForwarder, Pulled
from consilium_server.kicks import Kicks

NODE = 7


def message(name: str) -> bytes:
    found = Message(metadata=Metadata(message_id=name))
    body: bytes = PullMessagesResponse(messages_list=[found]).SerializeToString()
    return body


class SuperLink:
    """Hands out each message once, as Flower does."""

    def __init__(self, folder: Path, authority: Path) -> None:
        self.kicks = Kicks(folder / "kicks")
        self.waiting: list[bytes] = []
        #: Cleared, it takes its time with an answer.
        self.answers = asyncio.Event()
        self.answers.set()
        self.fleet = FleetForwarder("https://127.0.0.1:1", authority, self.kicks)
        self.fleet.forward = self.forward  # type: ignore[method-assign]

    async def forward(self, call: str, body: bytes, headers: object) -> tuple[int, bytes]:
        content = self.waiting.pop(0) if self.waiting else b""
        await self.answers.wait()
        return 200, content

    def send(self, name: str) -> None:
        self.waiting.append(message(name))
        self.kicks.kick([NODE])

    def pull(self, session: str = "one", shown: str = "") -> asyncio.Task[Pulled]:
        headers = [(PULLED_KEY, f"{session}.{shown}")] if session else []
        return asyncio.create_task(self.fleet.pull(str(NODE), b"", headers, lambda: None))


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    path = tmp_path / "authority.pem"
    path.write_bytes(certificate_pem(Authority.create("test").certificate))
    return path


def run(scenario: Callable[[SuperLink], Awaitable[Any]], folder: Path, authority: Path) -> None:
    async def limited() -> None:
        link = SuperLink(folder, authority)
        await asyncio.wait_for(scenario(link), 20)
        await link.fleet.close()

    asyncio.run(limited())


def test_what_was_not_heard_comes_again_and_what_was_heard_does_not(
    tmp_path: Path, authority: Path
) -> None:
    async def scenario(link: SuperLink) -> None:
        link.send("first")
        first = await link.pull()
        assert (first.content, first.again) == (message("first"), False)
        for _ in range(2):
            again = await link.pull()
            assert (again.content, again.receipt, again.again) == (
                first.content,
                first.receipt,
                True,
            )
        link.send("second")
        second = await link.pull(shown=first.receipt)
        assert (second.content, second.again) == (message("second"), False)

    run(scenario, tmp_path, authority)


@pytest.mark.parametrize("session", ["two", ""])
def test_another_session_gets_nothing_that_was_asked_of_the_first(
    tmp_path: Path, authority: Path, session: str
) -> None:
    async def scenario(link: SuperLink) -> None:
        link.send("first")
        await link.pull()
        held = link.pull(session)
        link.send("second")
        assert (await held).content == message("second")

    run(scenario, tmp_path, authority)


def test_a_message_on_its_way_out_when_the_line_breaks_is_not_lost(
    tmp_path: Path, authority: Path
) -> None:
    async def scenario(link: SuperLink) -> None:
        link.answers.clear()
        link.send("first")
        broken = link.pull()
        while link.waiting:
            await asyncio.sleep(0.01)
        broken.cancel()
        await asyncio.wait({broken})
        link.answers.set()
        assert (await link.pull()).content == message("first")

    run(scenario, tmp_path, authority)


def test_what_a_call_of_a_dead_line_took_comes_to_the_call_that_lives(
    tmp_path: Path, authority: Path
) -> None:
    async def scenario(link: SuperLink) -> None:
        dead = link.pull()
        await asyncio.sleep(0.1)
        living = link.pull()
        await asyncio.sleep(0.1)
        link.send("first")
        both = await asyncio.gather(dead, living)
        assert {one.content for one in both} == {message("first")}
        assert sorted(one.again for one in both) == [False, True]

    run(scenario, tmp_path, authority)


def test_a_site_that_was_away_for_long_is_asked_by_the_rounds_alone(
    tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_AGAIN_SECONDS", 0.0)

    async def scenario(link: SuperLink) -> None:
        link.send("first")
        await link.pull()
        held = link.pull()
        link.send("second")
        assert (await held).content == message("second")

    run(scenario, tmp_path, authority)
