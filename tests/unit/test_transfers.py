"""Models and updates over the real port: whole, resumed, and ended at once."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from transfer_samples import (
    MIB,
    NAME,
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

from consilium_client import transfers as site_side
from consilium_client.received import model_file, wait_for_model
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority
from consilium_server import study_files
from consilium_server.limits import Limits
from consilium_server.tables import Member

LARGE = os.urandom(5 * MIB + 123)
#: More than the buffers of a line and of gRPC hold together: it can be broken in the midst.
HUGE = LARGE * 10


@pytest.fixture
def port(tmp_path: Path) -> Port:
    return Port(tmp_path)


@pytest.fixture
def authority(port: Port) -> Authority:
    return port.found()


@pytest.fixture
def hospital(port: Port, authority: Authority, tmp_path: Path) -> Hospital:
    return Hospital(port, tmp_path, authority)


# --- whole, and resumed -------------------------------------------------------------------------


def test_a_model_and_an_update_arrive_whole_and_a_second_delivery_sends_nothing(
    port: Port, hospital: Hospital
) -> None:
    model = port.offer(LARGE)
    update, path = hospital.store(LARGE[::-1])

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, connection):
            await fetched(transfers, model)
            assert wait_for_model(hospital.home, STUDY, model, 0).read_bytes() == LARGE
            transfers.fetch(STUDY, model, lambda: None)  # it is here
            for _ in range(2):
                assert await deliver(transfers, update, path)
            first, second = connection.of(SITE_DELIVER)
            assert (first.said, first.bytes) == ([0, update.bytes], update.bytes)
            assert (second.said, second.bytes) == ([update.bytes] * 2, 0)
            (fetch,) = connection.of(SITE_FETCH)
            assert fetch.bytes == model.bytes

    run(scenario)
    assert port.files.delivered(NAME, update).read_bytes() == LARGE[::-1]
    assert port.came() == {update.sha256}


def breaking(
    port: Port, method: str, how: str, after: int
) -> Callable[[Moved, Any], Awaitable[None]]:
    """Return what breaks the first stream of a method in the middle, once."""
    broken: list[Moved] = []

    async def meanwhile(moved: Moved, call: Any) -> None:
        if broken or moved.method != method or moved.bytes < after:
            return
        broken.append(moved)
        if how == "line":
            call.cancel()
        else:
            # What has been sent is on the aggregator's disk before it goes.
            await asyncio.sleep(0.1)
            await port.stop()
            await port.start()

    return meanwhile


@pytest.mark.parametrize("method", [SITE_FETCH, SITE_DELIVER])
def test_a_stream_that_the_aggregator_s_end_breaks_goes_on_where_it_was(
    port: Port, hospital: Hospital, method: str
) -> None:
    model = port.offer(HUGE)
    update, path = hospital.store(HUGE)

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, connection):
            connection.meanwhile = breaking(port, method, "aggregator", 3 * MIB)
            if method == SITE_FETCH:
                await fetched(transfers, model)
                resumed = [one for one in connection.of(method) if one.bytes][-1]
                held = resumed.first["offset"]
            else:
                assert await deliver(transfers, update, path)
                resumed = [one for one in connection.of(method) if one.said][-1]
                held = resumed.said[0]
            assert 2 * MIB <= held < len(HUGE)
            assert resumed.bytes == len(HUGE) - held

    run(scenario)
    if method == SITE_FETCH:
        assert model_file(hospital.home, STUDY, model).read_bytes() == HUGE
    else:
        assert port.files.delivered(NAME, update).read_bytes() == HUGE


@pytest.mark.parametrize("method", [SITE_FETCH, SITE_DELIVER])
def test_a_link_that_was_killed_goes_on_where_its_predecessor_was(
    port: Port, hospital: Hospital, method: str
) -> None:
    model = port.offer(HUGE)
    update, path = hospital.store(HUGE)
    far = asyncio.Event()

    async def stop(moved: Moved, _: Any) -> None:
        if moved.bytes >= 3 * MIB:
            far.set()
            await asyncio.sleep(30)

    async def work(transfers: Any) -> None:
        if method == SITE_FETCH:
            await fetched(transfers, model)
        else:
            assert await deliver(transfers, update, path)

    async def scenario() -> None:
        async with port.open():
            async with hospital.connected() as (transfers, connection):
                connection.meanwhile = stop
                task = asyncio.create_task(work(transfers))
                await far.wait()
                await asyncio.sleep(0.1)
                task.cancel()
            async with hospital.connected() as (transfers, connection):
                await work(transfers)
                (again,) = connection.of(method)
                held = again.first["offset"] if method == SITE_FETCH else again.said[0]
                assert held >= 2 * MIB
                assert again.bytes == len(HUGE) - held

    run(scenario)
    if method == SITE_FETCH:
        assert model_file(hospital.home, STUDY, model).read_bytes() == HUGE
    else:
        assert port.files.delivered(NAME, update).read_bytes() == HUGE


@pytest.mark.parametrize(
    ("bound", "pieces"), [("_QUEUED_SECONDS", []), ("_STALLED_SECONDS", [LARGE[:MIB]])]
)
def test_a_line_in_which_nothing_moves_is_given_up_and_is_no_fault_of_the_disk(
    bound: str,
    pieces: list[bytes],
    port: Port,
    hospital: Hospital,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = port.offer(LARGE)
    monkeypatch.setattr(site_side, bound, 0.3)
    first = True

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, connection):
            opened = connection.stream

            def stream(method: str) -> Any:
                nonlocal first
                first, silent = False, first
                return _Silent(pieces) if silent else opened(method)

            connection.stream = stream  # type: ignore[assignment]
            began = time.monotonic()
            await fetched(transfers, model)
            assert time.monotonic() - began < 10
            (moved,) = connection.of(SITE_FETCH)
            assert moved.first["offset"] == sum(map(len, pieces))

    run(scenario)
    assert not first
    assert model_file(hospital.home, STUDY, model).read_bytes() == LARGE


class _Silent:
    """A stream that takes everything, answers with some pieces, and then no more."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    async def __aenter__(self) -> _Silent:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is held."""

    async def write(self, _: bytes) -> None:
        """Take it."""

    async def done_writing(self) -> None:
        """Take it."""

    async def read(self) -> bytes:
        for piece in self._pieces:
            return piece
        await asyncio.sleep(30)
        return b""


def test_of_two_streams_for_one_file_the_newer_goes_on(port: Port, hospital: Hospital) -> None:
    update, path = hospital.store(LARGE)
    old_far, new_done = asyncio.Event(), asyncio.Event()

    async def meanwhile(moved: Moved, _: Any) -> None:
        if moved.bytes >= 2 * MIB and not old_far.is_set():
            old_far.set()
            await new_done.wait()

    async def scenario() -> None:
        async with (
            port.open(),
            hospital.connected() as (old, connection),
            hospital.connected() as (new, fresh),
        ):
            connection.meanwhile = meanwhile
            before = asyncio.create_task(deliver(old, update, path))
            await old_far.wait()
            await asyncio.sleep(0.1)
            assert await deliver(new, update, path)
            assert fresh.moved[0].said[0] == 2 * MIB
            new_done.set()
            # The old one is told, comes back, and finds that all is there.
            assert await before
            assert connection.moved[-1].bytes == 0

    run(scenario)
    assert port.files.delivered(NAME, update).read_bytes() == LARGE


def test_many_streams_for_one_file_at_once_make_one_file(port: Port, hospital: Hospital) -> None:
    update, path = hospital.store(LARGE)

    async def scenario() -> None:
        async with port.open(), AsyncExitStack() as stack:
            ends = [(await stack.enter_async_context(hospital.connected()))[0] for _ in range(4)]
            assert all(await asyncio.gather(*(deliver(one, update, path) for one in ends)))

    run(scenario)
    assert port.files.delivered(NAME, update).read_bytes() == LARGE
    assert port.came() == {update.sha256}


# --- ended from outside -------------------------------------------------------------------------


def test_a_site_that_withdraws_in_mid_delivery_sends_no_further_piece(
    port: Port, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, path = hospital.store(LARGE)
    monkeypatch.setattr(site_side, "_STILL_SECONDS", 0.0)
    withdrawn = False

    def still() -> None:
        if withdrawn:
            raise ConsiliumError("study.not-approved", "This site has not approved the study.")

    async def withdraw(moved: Moved, _: Any) -> None:
        nonlocal withdrawn
        withdrawn = moved.bytes >= 2 * MIB

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, connection):
            connection.meanwhile = withdraw
            with pytest.raises(ConsiliumError) as caught:
                await deliver(transfers, update, path, still)
            assert caught.value.code == "study.not-approved"
            assert [one.bytes for one in connection.moved] == [2 * MIB]
            await asyncio.sleep(0.1)

    run(scenario)
    assert port.came() == {f"{update.sha256}.part"}
    with pytest.raises(ConsiliumError):
        port.files.delivered(NAME, update)


def test_revocation_ends_busy_streams_both_ways_within_two_seconds(
    port: Port, hospital: Hospital
) -> None:
    model = port.offer(HUGE)
    update, path = hospital.store(HUGE)
    last = {SITE_FETCH: 0.0, SITE_DELIVER: 0.0}

    async def meanwhile(moved: Moved, _: Any) -> None:
        if moved.bytes < MIB:
            return  # what a refused stream begins with is no piece
        last[moved.method] = time.monotonic()
        await asyncio.sleep(0.03)

    async def scenario() -> float:
        async with port.open(), hospital.connected() as (transfers, connection):
            connection.meanwhile = meanwhile
            tasks = [
                asyncio.create_task(fetched(transfers, model)),
                asyncio.create_task(deliver(transfers, update, path)),  # type: ignore[arg-type]
            ]
            while not all(last.values()):
                await asyncio.sleep(0.01)
            with port.registry.transaction() as session:
                session.get_one(Member, NAME).status = "revoked"
            began = time.monotonic()
            while time.monotonic() - max(last.values()) < 0.8:
                await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)  # they try again, and nothing moves
            for task in tasks:
                task.cancel()
            return max(last.values()) - began

    assert run(scenario) < 2.0
    assert not model_file(hospital.home, STUDY, model).exists()
    assert update.sha256 not in port.came()


def test_what_a_site_uploads_stays_within_its_rate(port: Port, hospital: Hospital) -> None:
    port.limits = Limits(upload_bytes_per_second=4.0 * MIB, upload_burst_bytes=8 * MIB)
    update, path = hospital.store(os.urandom(13 * MIB))

    async def scenario() -> float:
        async with port.open(), hospital.connected() as (transfers, _):
            began = time.monotonic()
            assert await deliver(transfers, update, path)
            return time.monotonic() - began

    # Eight at once, one owed, four at four a second.
    assert run(scenario) >= 0.95


def test_a_full_disk_at_the_aggregator_is_said_and_the_site_tries_until_there_is_room(
    port: Port,
    hospital: Hospital,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    update, path = hospital.store(LARGE)
    room = 2 * MIB

    class Disk(study_files.FileIO):
        def write(self, content: Any) -> int:
            nonlocal room
            taken = min(room, len(content))
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room -= taken
            return super().write(memoryview(content)[:taken])

    monkeypatch.setattr(study_files, "FileIO", Disk)

    async def scenario() -> None:
        nonlocal room
        async with port.open(), hospital.connected() as (transfers, connection):
            assert not await deliver(transfers, update, path, seconds=0.7)
            assert port.came() == {f"{update.sha256}.part"}
            room = 100 * MIB
            assert await deliver(transfers, update, path)
            assert connection.moved[-1].said[0] == 2 * MIB

    run(scenario)
    said = [one.getMessage() for one in caplog.records if "state.disk" in one.getMessage()]
    assert said and "Free space on the aggregator's disk" in said[0]
    assert port.files.delivered(NAME, update).read_bytes() == LARGE


def test_a_full_disk_at_the_site_is_said_to_the_round_that_waits(
    port: Port, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = port.offer(LARGE)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        async with port.open(), hospital.connected() as (transfers, _):
            with monkeypatch.context() as patch:
                patch.setattr(site_side, "_keep", full)
                await fetched(transfers, model)
            with pytest.raises(ConsiliumError) as caught:
                wait_for_model(hospital.home, STUDY, model, 5)
            assert caught.value.code == "state.disk"
            await fetched(transfers, model)  # asked again, it is tried again
            assert wait_for_model(hospital.home, STUDY, model, 5).read_bytes() == LARGE

    run(scenario)


# --- memory -------------------------------------------------------------------------------------


def test_a_file_of_64_mib_takes_no_room_in_the_gateway(port: Port, hospital: Hospital) -> None:
    content = os.urandom(64 * MIB)
    served = Path(__file__).with_name("transfer_samples.py")
    command = [sys.executable, str(served), str(port.folder), str(port.port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"

        def peak() -> int:
            status = Path(f"/proc/{child.pid}/status").read_text()
            (line,) = [one for one in status.splitlines() if one.startswith("VmHWM:")]
            return int(line.split()[1]) * 1024

        async def both_ways(content: bytes, number: int) -> None:
            model = port.offer(content)
            update, path = hospital.store(content, number)
            async with hospital.connected() as (transfers, _):
                await fetched(transfers, model)
                assert await deliver(transfers, update, path)
            assert port.files.delivered(NAME, update).stat().st_size == len(content)

        # What gRPC and its threads keep for themselves they have taken after this.
        run(lambda: both_ways(content[: 16 * MIB], 0))
        before = peak()
        run(lambda: both_ways(content, 1))
        grown = peak() - before
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)
    print(f"the gateway's peak grew by {grown / MIB:.1f} MiB")
    # About two of the pieces in which Flower sends a model, beyond which no hop may grow; what gRPC
    # has in its buffers depends a little on which end is given the processor.
    assert grown < 16 * MIB
