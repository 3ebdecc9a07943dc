"""systemd hears that a service is ready, alive and stopping; its children are not heard."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from consilium_common.service import Service


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    way = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    way.settimeout(10)
    way.bind(str(tmp_path / "notify"))
    return way


def test_it_says_that_it_is_ready_and_that_it_stops(manager: socket.socket, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "OTHER": "1"}
    service = Service(environment)
    assert environment == {"OTHER": "1"}, "a child would speak in its name"
    service.ready("listens on 1.2.3.4:443")
    assert manager.recv(200) == b"READY=1\nSTATUS=listens on 1.2.3.4:443"
    service.stopping()
    assert manager.recv(200).startswith(b"STOPPING=1")


def test_it_says_twice_within_the_time_that_it_is_alive(
    manager: socket.socket, tmp_path: Path
) -> None:
    environment = {
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "400000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    service = Service(environment)

    async def live() -> None:
        task = asyncio.create_task(service.alive_for_ever())
        await asyncio.sleep(0)
        started = time.monotonic()
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
        assert time.monotonic() - started > 0.3
        task.cancel()

    asyncio.run(asyncio.wait_for(live(), 10))


def test_a_watchdog_of_another_process_and_none_at_all_are_left_alone(
    manager: socket.socket, tmp_path: Path
) -> None:
    way = str(tmp_path / "notify")
    for environment in (
        {},
        {"WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": way},
        {"NOTIFY_SOCKET": way, "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": way, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ):
        asyncio.run(asyncio.wait_for(Service(environment).alive_for_ever(), 5))
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)


def test_a_manager_that_went_away_is_no_reason_to_stop(tmp_path: Path) -> None:
    Service({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("ready")
    Service({"NOTIFY_SOCKET": "@consilium-nobody-listens"}).stopping()
