"""Runs commands as processes that need not import first: forked from one that has.

Tests call many hundreds of commands, and most of a command's time is Python's imports. Everything
else is as from a shell: arguments, environment, folder, streams, exit status, a process of its own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LONGEST = 1 << 17
#: Imported once. Neither torch nor what imports it: commands have no need of them.
_MODULES = (
    "consilium_common.wire.tls13",  # first of all: it restricts gRPC
    "consilium_client.approval_cli",
    "consilium_client.cli",
    "consilium_client.connection",
    "consilium_client.data.cli",
    "consilium_client.data.cohort",
    "consilium_client.data.importing",
    "consilium_client.deciding",
    "consilium_client.evidence",
    "consilium_client.reviewing",
    "consilium_common.audit.cli",
    "consilium_common.cli",
    "consilium_common.privacy.accounting",
    "consilium_common.study.check",
    "consilium_server.cli",
    "consilium_server.registry",
    "consilium_server.study_cli",
    "dp_accounting.pld",
    "grpc",
    "nibabel",
    "pydicom",
    "rich.table",
    "scipy.stats",
)


def run_warm(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """Run ``consilium`` with these arguments to its end, without input.

    Raises
    ------
    subprocess.TimeoutExpired
        It took longer, and was killed.
    """
    request = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": str(Path.cwd()),
    }
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(_address())
        connection.settimeout(timeout)
        socket.send_fds(connection, [json.dumps(request).encode()], [out.fileno(), errors.fileno()])
        try:
            status = int(connection.recv(_LONGEST))
        except TimeoutError:
            raise subprocess.TimeoutExpired(list(arguments), timeout) from None
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read(), errors.read())


@functools.cache
def _address() -> str:
    """Start the process that has imported everything, once for this one; it ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = f"{folder.name}/socket"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), address],
        stdin=subprocess.PIPE,  # ends when this process does, however it does
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    _KEPT.extend((folder, process))
    return address


#: Lives as long as this process.
_KEPT: list[Any] = []


def _next_command(address: str) -> dict[str, Any] | None:
    """Return what to run, each time in another process; None in this one at its end."""
    # Its commands' keepers end unwaited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(16)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if listener not in ready:
                return None
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    return _forked(connection)


def _forked(connection: socket.socket) -> dict[str, Any]:
    """Return what to run in a process of its own; wait for that one in this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content, streams, _, _ = socket.recv_fds(connection, _LONGEST, 2)
    request: dict[str, Any] = json.loads(content)
    command = os.fork()
    if command == 0:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        return request
    # Whoever asked may have given up: it closes the connection then.
    ended = os.pidfd_open(command)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(command, signal.SIGKILL)
    _, status = os.waitpid(command, 0)
    if ended in ready:
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _main() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    # What is imported stays: a collection in a command would copy every page of it.
    gc.collect()
    gc.freeze()
    request = _next_command(sys.argv[1])
    if request is not None:
        from consilium_common.cli import main

        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["consilium", *request["arguments"]]
        if "start" in sys.argv:  # services set up gRPC before they import it
            os.execv(Path(sys.executable).with_name("consilium"), sys.argv)
        _end_with(main)


def _end_with(command: Callable[[], object]) -> NoReturn:
    """Run a command and end this process with its status.

    All that a process does at its end is done, but for the taking apart of every module: that
    copies every page too, and takes twice as long as most commands.
    """
    status: object = None
    try:
        command()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))  # type: ignore[call-overload]


if __name__ == "__main__":
    _main()
