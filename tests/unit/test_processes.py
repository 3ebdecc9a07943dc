"""Children are supervised, restarted with growing pauses, and never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from consilium_common.errors import ConsiliumError
from consilium_common.processes import (
    Child,
    check_port_free,
    flower_environment,
    free_port,
    only_one,
    wait_for_port,
)


def child(tmp_path: Path, program: str, **further: object) -> tuple[Child, list[str]]:
    said: list[str] = []
    made = Child(
        "worker",
        [sys.executable, "-c", program],
        environment=dict(os.environ),
        logs=tmp_path,
        say=said.append,
        **further,  # type: ignore[arg-type]
    )
    return made, said


async def until(holds: Callable[[], bool], timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process lives; one that only waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


#: Has a fork server make a process, says its process id, and waits.
STARTER = """
import multiprocessing, time
from consilium_common.processes import die_with_starter

def wait(connection):
    die_with_starter()
    connection.send(None)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    made = context.Process(target=wait, args=(theirs,))
    made.start()
    ours.recv()
    print(made.pid, flush=True)
    time.sleep(600)
"""

#: Starts a child of its own in its session, says its process id, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_stopping_ends_a_child_and_what_it_started(tmp_path: Path) -> None:
    made, said = child(tmp_path, PARENT)

    async def scenario() -> tuple[int, int]:
        task = asyncio.create_task(made.supervise())
        log = tmp_path / "worker.log"
        await until(lambda: log.exists() and log.read_text().strip().isdecimal())
        assert made.alive
        assert made.pid is not None
        grandchild = int(log.read_text())
        await made.stop(grace=5)
        await asyncio.wait_for(task, 5)
        await until(lambda: not alive(grandchild))
        return made.pid, grandchild

    pid, grandchild = asyncio.run(scenario())
    assert not alive(pid)
    assert not alive(grandchild)
    assert said == []  # a stop is no crash
    assert made.restarts == 0


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    made, _ = child(
        tmp_path,
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True);"
        "time.sleep(600)",
    )

    async def scenario() -> float:
        task = asyncio.create_task(made.supervise())
        log = tmp_path / "worker.log"
        await until(lambda: log.exists() and "on" in log.read_text())
        started = time.monotonic()
        await made.stop(grace=0.3)
        await asyncio.wait_for(task, 5)
        return time.monotonic() - started

    assert asyncio.run(scenario()) < 5
    assert not made.alive


def test_a_child_that_dies_is_started_again_after_what_prepares_it(tmp_path: Path) -> None:
    prepared: list[int] = []

    async def before() -> None:
        prepared.append(1)

    made, said = child(tmp_path, "raise SystemExit(7)", before_start=before)

    async def scenario() -> None:
        task = asyncio.create_task(made.supervise())
        await until(lambda: made.restarts >= 2)
        await made.stop()
        await asyncio.wait_for(task, 10)

    asyncio.run(scenario())
    assert len(prepared) >= 2
    assert "status 7" in said[0]
    # Each pause is longer than the one before.
    assert "0.3 s" in said[0]
    assert "0.6 s" in said[1]


def test_a_child_that_is_killed_on_purpose_is_started_again_too(tmp_path: Path) -> None:
    made, said = child(tmp_path, "import time; time.sleep(600)")
    statuses: list[int | None] = []

    async def scenario() -> None:
        supervising = asyncio.create_task(made.supervise())
        await until(lambda: made.alive)
        first = made.pid
        statuses.append(made.status)
        made.kill()
        await until(lambda: made.restarts == 1)
        statuses.append(made.status)
        await until(lambda: made.alive and made.pid != first)
        await made.stop()
        await supervising

    asyncio.run(scenario())
    assert statuses == [None, -signal.SIGKILL]
    assert "ended with status -9" in said[0]


def test_a_child_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    attempts: list[int] = []

    async def no_room() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")

    made, said = child(tmp_path, "import time; time.sleep(600)", before_start=no_room)

    async def scenario() -> None:
        task = asyncio.create_task(made.supervise())
        await until(lambda: made.alive)
        await made.stop()
        await task

    asyncio.run(scenario())
    assert len(attempts) == 2
    assert "cannot be started" in said[0] and "No space left" in said[0]


def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    program = f"""
import asyncio, os
from pathlib import Path
from consilium_common.processes import Child
made = Child("worker", [{sys.executable!r}, "-c", "import time; time.sleep(600)"],
             environment=dict(os.environ), logs=Path({str(tmp_path)!r}), say=print)
async def main():
    task = asyncio.create_task(made.supervise())
    while made.pid is None:
        await asyncio.sleep(0.01)
    print(made.pid, flush=True)
    await task
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=10)
    end = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.02)


def test_what_a_fork_server_made_dies_with_who_asked_for_it(tmp_path: Path) -> None:
    program = tmp_path / "starter.py"
    program.write_text(STARTER)
    starter = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert starter.stdout is not None
        made = int(starter.stdout.readline())
        server = int(Path(f"/proc/{made}/stat").read_text().rpartition(")")[2].split()[1])
        assert server != starter.pid
        assert alive(made)
    finally:
        starter.kill()
        starter.communicate()
    asyncio.run(until(lambda: not alive(made) and not alive(server)))


@pytest.mark.parametrize("leader_lives", [True, False])
def test_what_a_killed_supervisor_left_is_ended_before_the_first_start(
    tmp_path: Path, leader_lives: bool
) -> None:
    left, _ = child(tmp_path, PARENT, run=tmp_path)

    async def leave() -> tuple[int, int]:
        await left._start()
        log = tmp_path / "worker.log"
        await until(lambda: log.exists() and log.read_bytes().endswith(b"\n"))
        assert left.pid is not None
        if not leader_lives:
            os.kill(left.pid, signal.SIGKILL)
            assert left._process is not None
            await left._process.wait()
        return left.pid, int(log.read_text().split()[-1])

    leader, grandchild = asyncio.run(leave())
    assert alive(grandchild)
    made, said = child(tmp_path, "import time; time.sleep(600)", run=tmp_path)

    async def begin_and_end() -> None:
        task = asyncio.create_task(made.supervise())
        await until(lambda: made.alive)
        await until(lambda: not alive(grandchild) and not alive(leader))
        await made.stop()
        await task

    asyncio.run(begin_and_end())
    assert said == [f"ended worker, process {leader}, which was left from before"]
    assert not (tmp_path / "worker.pid").exists()


def test_a_process_that_only_has_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for words in (f"{stranger.pid} {boot} 1", f"{stranger.pid} another-boot 1", "torn"):
            (tmp_path / "worker.pid").write_text(words)
            made, said = child(tmp_path, "", run=tmp_path)
            made._end_orphans()
            assert stranger.poll() is None
            assert said == []
    finally:
        stranger.kill()
        stranger.wait(10)


def test_a_lock_is_held_by_one_and_free_again_after(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with only_one(lock, "It runs already.", hint="Stop it."):
        second = only_one(lock, "It runs already.", hint="Stop it.")
        with pytest.raises(ConsiliumError, match="It runs already") as caught, second:
            pytest.fail("two at once")
        assert caught.value.code == "state.running"
    with only_one(lock, "It runs already.", hint="Stop it."):
        pass


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    held, wanted = threading.Event(), threading.Event()

    def hold() -> None:
        with only_one(lock, "", hint=""):
            held.set()
            wanted.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    threading.Timer(0.2, wanted.set).start()
    with only_one(lock, "", hint="", wait=20):
        assert wanted.is_set()
    holder.join(20)


def test_a_free_port_is_free_and_a_taken_one_is_refused_by_name() -> None:
    port = free_port()
    check_port_free("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConsiliumError) as caught:
            check_port_free("127.0.0.1", port)
    assert caught.value.code == "state.port-in-use"
    assert caught.value.where == f"127.0.0.1:{port}"
    assert caught.value.exit_status == 8


def test_waiting_for_a_port_ends_when_it_opens_or_its_process_is_gone() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        asyncio.run(wait_for_port(port, timeout=5, alive=lambda: True))
    started = time.monotonic()
    with pytest.raises(ConsiliumError) as caught:
        asyncio.run(wait_for_port(free_port(), timeout=30, alive=lambda: False))
    assert caught.value.code == "state.child"
    assert time.monotonic() - started < 5


def test_flowers_processes_phone_nobody_and_use_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    found = flower_environment(tmp_path)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_HOME"] == str(tmp_path)
    assert "127.0.0.1" in found["NO_PROXY"].split(",")
    assert "127.0.0.1" in found["no_proxy"].split(",")
