"""Models that move: so many at a time, in the order they came, and nobody keeps the others out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from transfer_samples import (
    MIB,
    SITE_DELIVER,
    SITE_FETCH,
    STUDY,
    Hospital,
    Moved,
    Port,
    deliver,
    fetched,
    run,
)

from consilium_client.received import model_file
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Reference
from consilium_server import places as places_module
from consilium_server.limits import Limits
from consilium_server.places import Places

#: More than gRPC's buffers hold: an end that does not read stops the other.
LARGE = os.urandom(24 * MIB)


class Visitor:
    """Takes a place, says so, and leaves when it is told to."""

    def __init__(self, places: Places, who: str, inside: list[str]) -> None:
        self._places, self._who, self._inside = places, who, inside
        self.leave = asyncio.Event()
        self.require: Callable[[], None] | None = None
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._places.one(self._who) as self.require:
            self._inside.append(self._who)
            await self.leave.wait()
        self._inside.remove(self._who)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_so_many_have_a_place_and_the_others_get_theirs_in_the_order_they_came() -> None:
    async def scenario() -> None:
        places, inside = Places(2), list[str]()
        names = ["a", "b", "c", "d", "e"]
        visitors = {name: Visitor(places, name, inside) for name in names}
        await _settle()
        assert inside == ["a", "b"]
        visitors["c"].task.cancel()  # a line that breaks while it waits takes no place
        for leaving, then in (("b", ["a", "d"]), ("a", ["d", "e"]), ("d", ["e"]), ("e", [])):
            visitors[leaving].leave.set()
            await _settle()
            assert inside == then

    run(scenario)


def test_one_caller_has_a_quarter_of_the_places_and_they_come_free_again() -> None:
    async def scenario() -> None:
        places, inside = Places(8), list[str]()
        mine = [Visitor(places, "a", inside) for _ in range(3)]
        await _settle()
        assert inside == ["a", "a"]
        with pytest.raises(ConsiliumError) as caught:
            await mine[2].task
        assert caught.value.code == "network.too-many-calls"
        other = Visitor(places, "b", inside)
        mine[0].leave.set()
        mine[1].task.cancel()
        await _settle()
        again = [Visitor(places, "a", inside) for _ in range(2)]
        await _settle()
        assert inside.count("b") == 1 and all(one.require is not None for one in again)
        other.leave.set()
        for one in again:
            one.leave.set()
        await asyncio.gather(other.task, *(one.task for one in again))

    run(scenario)


def test_a_place_is_kept_for_as_long_as_nobody_waits_and_a_minute_when_somebody_does() -> None:
    async def scenario() -> None:
        now = 0.0
        places, inside = Places(1, lambda: now), list[str]()
        first = Visitor(places, "a", inside)
        await _settle()
        assert first.require is not None
        now = 3600.0
        first.require()
        second = Visitor(places, "b", inside)
        await _settle()
        with pytest.raises(ConsiliumError) as caught:
            first.require()
        assert caught.value.code == "network.busy"
        first.leave.set()
        await _settle()
        assert inside == ["b"] and second.require is not None
        third = Visitor(places, "c", inside)
        await _settle()
        second.require()  # its minute has only begun
        for one in (second, third):
            one.leave.set()
        await asyncio.gather(second.task, third.task)

    run(scenario)


# --- over the real port -------------------------------------------------------------------------


def _one_place(folder: Path, limits: Limits) -> tuple[Port, Hospital, Hospital, Reference]:
    """Return a port that moves one model at a time, two sites, and a model on offer."""
    port = Port(folder)
    port.limits = limits
    authority = port.found()
    north, south = (Hospital(port, folder, authority, name) for name in ("north", "south"))
    return port, north, south, port.offer(LARGE)


def _move(
    hospital: Hospital, model: Reference, method: str, number: int
) -> Callable[[Any], Awaitable[object]]:
    if method == SITE_FETCH:
        return lambda transfers: fetched(transfers, model)
    update, path = hospital.store(LARGE[::-1], number)
    return lambda transfers: deliver(transfers, update, path)


@pytest.mark.parametrize("method", [SITE_FETCH, SITE_DELIVER])
def test_a_slow_line_lets_those_that_wait_pass_and_goes_on_where_it_was(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places_module, "_KEPT_SECONDS", 0.3)
    port, slow, quick, model = _one_place(tmp_path, Limits(transfers=1))
    moves = [_move(slow, model, method, 0), _move(quick, model, method, 0)]
    begun, passed = asyncio.Event(), asyncio.Event()

    async def dawdle(moved: Moved, _: Any) -> None:
        begun.set()
        if not passed.is_set():
            await asyncio.sleep(0.15)

    async def scenario() -> None:
        async with (
            port.open(),
            slow.connected() as (one, connection),
            quick.connected() as (other, _),
        ):
            connection.meanwhile = dawdle
            behind = asyncio.ensure_future(moves[0](one))
            await begun.wait()
            await moves[1](other)
            assert not behind.done()
            passed.set()
            await behind
            streams = [moved for moved in connection.of(method) if moved.bytes]
            assert len(streams) > 1
            if method == SITE_FETCH:
                assert sum(moved.bytes for moved in streams) == len(LARGE)
                assert streams[-1].first["offset"] > 0
                assert model_file(slow.home, STUDY, model).read_bytes() == LARGE
            else:
                assert streams[-1].said[0] > 0
                (arrived,) = port.came("north")
                folder = port.home.study_folder(STUDY) / "in" / "north"
                assert (folder / arrived).read_bytes() == LARGE[::-1]

    run(scenario)


def test_a_line_that_stands_still_loses_its_place(tmp_path: Path) -> None:
    port, still, quick, model = _one_place(tmp_path, Limits(transfers=1, body_seconds=1.0))
    begun, passed = asyncio.Event(), asyncio.Event()

    async def stand(*_: object) -> None:
        begun.set()
        await passed.wait()

    async def scenario() -> None:
        async with (
            port.open(),
            still.connected() as (one, connection),
            quick.connected() as (other, _),
        ):
            connection.meanwhile = stand
            behind = asyncio.create_task(fetched(one, model))
            await begun.wait()
            await asyncio.wait_for(fetched(other, model), 10)
            passed.set()
            await behind
        for hospital in (still, quick):
            assert model_file(hospital.home, STUDY, model).read_bytes() == LARGE

    run(scenario)
