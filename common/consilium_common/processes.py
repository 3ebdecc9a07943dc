"""Child processes that never outlive us, are started again when they die, and log to a file."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError

_PR_SET_PDEATHSIG: Final = 1
#: A child that lived this long is healthy: its next restart waits the shortest time again.
_HEALTHY_SECONDS: Final = 20.0
_LONGEST_BACK_OFF: Final = 15.0
#: Below the ports for outgoing connections of every system, and above the well-known ones.
_PORTS: Final = range(20_000, 32_000)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_starter() -> None:
    """Have a process that a fork server made die with its parent, and with who asked for it.

    A fork server holds out as long as one that it made is there, and so each would keep the other
    alive when the process that uses both is killed.
    """
    import multiprocessing

    die_with_parent()
    starter = multiprocessing.parent_process()
    assert starter is not None  # a fork server made us

    def follow() -> None:
        starter.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow", daemon=True).start()


@contextlib.contextmanager
def only_one(
    lock: Path, what: str, *, hint: str, wait: float = 0.0, where: Path | None = None
) -> Iterator[None]:
    """Hold a lock file while the body runs; the lock ends with its process.

    Parameters
    ----------
    what : str
        Said where another process holds it, for example "This aggregator is running already."
    wait : float
        Seconds in which the other may still give it up (default: none).
    where : Path, optional
        What the lock stands for, in the error (default: its file).

    Raises
    ------
    ConsiliumError
        ``state.running``.
    """
    with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as file:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise ConsiliumError(
                        "state.running", what, where=str(where or lock), hint=hint
                    ) from error
            time.sleep(0.05)
        yield


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
    """Return a TCP port of 127.0.0.1 that nobody listens on now.

    It is none of those that the system gives to outgoing connections (RFC 6056): one of these
    could take it before whoever asked listens there.
    """
    for port in (*random.SystemRandom().sample(_PORTS, 50), 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ConsiliumError(
        "state.port-in-use",
        "No port is free.",
        where="127.0.0.1",
        hint="Stop programs that hold thousands of connections open.",
    )


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
    run : Path, optional
        Folder in which ``<name>.pid`` names the process. One that it names from before, because
        whoever supervised it was killed and it was not, is ended before the first start.
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
        run: Path | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.restarts = 0
        self._environment = dict(environment)
        self._log = logs / f"{name}.log"
        self._say = say
        self._before_start = before_start
        self._after_start = after_start
        self._pid_file = None if run is None else run / f"{name}.pid"
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

    @property
    def status(self) -> int | None:
        """Exit status of the last process, minus a signal's number; None while it runs."""
        return self._process.returncode if self._process else None

    async def supervise(self) -> None:
        """Start the process, and again whenever it dies, until :meth:`stop`."""
        back_off = 0.3
        self._end_orphans()
        while not self._stopping:
            started = time.monotonic()
            try:
                await self._start()
            except (OSError, ConsiliumError) as error:
                # A full disk, or no memory for another process: that passes.
                ended = f"cannot be started ({error})"
            else:
                ended = f"ended with status {await self._ended()}"
            if self._stopping:
                return
            if time.monotonic() - started > _HEALTHY_SECONDS:
                back_off = 0.3
            self.restarts += 1
            self._say(
                f"{self.name} {ended}; starting it again in {back_off:.1f} s"
                f" (log: {self._log.name})"
            )
            await asyncio.sleep(back_off)
            back_off = min(back_off * 2, _LONGEST_BACK_OFF)

    async def _ended(self) -> int:
        """Wait for the end of the process that was just started; returns its status."""
        assert self._process is not None
        await self._greet()
        status = await self._process.wait()
        self._kill_group()  # what it left behind
        return status

    def kill(self) -> None:
        """End the process and its group at once; it is started again like one that has died."""
        self._kill_group()

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
        if self._pid_file is not None:
            pid = self._process.pid
            with contextlib.suppress(OSError):  # on a full disk it runs all the same
                self._pid_file.write_text(f"{pid} {_boot()} {_born(pid)}", encoding="ascii")

    def _end_orphans(self) -> None:
        """End what a killed supervisor has left of this child: the process, or its group."""
        if self._pid_file is None or not self._pid_file.exists():
            return
        words = self._pid_file.read_text(encoding="ascii").split()
        self._pid_file.unlink()
        if len(words) != 3 or words[1] != _boot():
            return
        pid = int(words[0])
        # A process id is used again, and then with another time of start; not as long as a
        # process of its group lives, though.
        if _born(pid) not in ("", words[2]):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
            self._say(f"ended {self.name}, process {pid}, which was left from before")

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
            if self._pid_file is not None:
                self._pid_file.unlink(missing_ok=True)


def _boot() -> str:
    """Return what tells one start of this machine from another; ``-`` where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "-"


def _born(pid: int) -> str:
    """Return when a process was started, in the kernel's ticks; empty where that is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The 22nd field; the second, the program's name in parentheses, may hold anything.
    return stat.rpartition(")")[2].split()[19]
