"""Child processes that never outlive us, are started again when they die, and log to a file."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError

_PR_SET_PDEATHSIG: Final = 1
#: A child that lived this long is healthy: its next restart waits the shortest time again.
_HEALTHY_SECONDS: Final = 60.0
_LONGEST_BACK_OFF: Final = 15.0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def flower_environment(flower_home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: no telemetry, no update check, own state.

    Loopback traffic must not go to a proxy: with HTTP_PROXY set and no NO_PROXY, rounds hang.
    """
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(flower_home),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port_free(host: str, port: int) -> None:
    """Raise ``state.port-in-use`` when somebody listens on ``host:port`` already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConsiliumError(
                "state.port-in-use",
                f"Cannot listen: {error.strerror}.",
                where=f"{host}:{port}",
                hint="Stop the other program or choose another port with --port.",
            ) from error


async def wait_for_port(port: int, *, timeout: float, alive: Callable[[], bool]) -> None:
    """Wait until 127.0.0.1:``port`` accepts connections; ``timeout`` in seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        if not alive():
            break
        await asyncio.sleep(0.05)
    raise ConsiliumError(
        "state.child", "A process of ours did not come up.", hint="Its log says why."
    )


class Child:
    """One supervised child process.

    Parameters
    ----------
    name : str
        For messages and the log file ``<logs>/<name>.log``.
    command : sequence of str
        Program and arguments; secrets never stand here, only paths of files that hold them.
    before_start : callable, optional
        Awaited before each start, for example to free what a killed predecessor left.
    after_start : callable, optional
        Awaited after each start, while the process runs, for example to tell it what the one
        before it knew; an error in it ends the process, and the next start tries again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        logs: Path,
        say: Callable[[str], None],
        before_start: Callable[[], Awaitable[None]] | None = None,
        after_start: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.restarts = 0
        self._environment = dict(environment)
        self._log = logs / f"{name}.log"
        self._say = say
        self._before_start = before_start
        self._after_start = after_start
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether the process runs now."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Process id, None before the first start."""
        return self._process.pid if self._process else None

    async def supervise(self) -> None:
        """Start the process, and again whenever it dies, until :meth:`stop`."""
        back_off = 0.3
        while not self._stopping:
            started = time.monotonic()
            await self._start()
            assert self._process is not None
            await self._greet()
            status = await self._process.wait()
            self._kill_group()  # what it left behind
            if self._stopping:
                return
            if time.monotonic() - started > _HEALTHY_SECONDS:
                back_off = 0.3
            self.restarts += 1
            self._say(
                f"{self.name} ended with status {status}; starting it again in {back_off:.1f} s"
                f" (log: {self._log.name})"
            )
            await asyncio.sleep(back_off)
            back_off = min(back_off * 2, _LONGEST_BACK_OFF)

    async def stop(self, grace: float = 4.0) -> None:
        """End the process and its group: SIGTERM, and SIGKILL after ``grace`` seconds."""
        self._stopping = True
        if self._process is None:
            return
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace)
        self._kill_group()

    async def _start(self) -> None:
        if self._before_start is not None:
            await self._before_start()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    async def _greet(self) -> None:
        if self._after_start is None:
            return
        try:
            await self._after_start()
        except Exception as error:
            self._say(f"{self.name} did not come up well: {error}")
            self._kill_group()

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
