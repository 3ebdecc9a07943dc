"""Running the public commands as processes of their own, so that the demo shows the real thing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_parent

_CONSILIUM: Final = (sys.executable, "-m", "consilium_common")
_STOP_SECONDS: Final = 12.0


class Processes:
    """All processes of one demo: whatever happens, none outlives the ``with`` block.

    Parameters
    ----------
    logs : Path
        Folder for what background processes print.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._background: dict[str, subprocess.Popen[bytes]] = {}
        # Three sites share this machine: one thread each, or they would fight for the cores.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not cut the cleaning-up short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            self.stop()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``consilium ARGUMENTS`` in the background; its output goes to ``<name>.log``."""
        with (self._logs / f"{name}.log").open("ab") as log:
            self._background[name] = self._spawn(arguments, stdout=log, stderr=log)

    def wait_for(self, name: str, words: str, seconds: float) -> None:
        """Wait until a background process has printed ``words``.

        Raises
        ------
        ConsiliumError
            ``run.demo`` with the end of its output when it ended or took longer.
        """
        path, end = self._logs / f"{name}.log", time.monotonic() + seconds
        while time.monotonic() < end:
            text = path.read_text(encoding="utf-8", errors="replace")
            if words in text:
                return
            if self._background[name].poll() is not None:
                break
            time.sleep(0.1)
        raise ConsiliumError(
            "run.demo",
            f"{name} did not come up: {path.read_text(errors='replace')[-600:]}",
            where=str(path),
        )

    def call(self, *arguments: str) -> Any:
        """Run ``consilium --json ARGUMENTS`` and return its data, or raise its error."""
        return self.call_all([arguments])[0]

    def call_all(self, commands: Sequence[Sequence[str]]) -> list[Any]:
        """Run several commands side by side and return the data of each."""
        pipe = subprocess.PIPE
        running = [self._spawn(("--json", *c), stdout=pipe, stderr=pipe) for c in commands]
        with _killed_on_error(running):
            outputs = [process.communicate() for process in running]
        results = []
        for command, (output, errors) in zip(commands, outputs, strict=True):
            results.append(_data(command, output, errors))
        return results

    def show(self, *arguments: str) -> int:
        """Run ``consilium ARGUMENTS`` on this terminal; returns its exit status."""
        process = self._spawn(arguments, stdout=sys.stderr, stderr=None)
        with _killed_on_error([process]):
            return process.wait()

    def stop(self) -> None:
        """End all background processes: the newest first, each with its whole group."""
        processes = list(reversed(self._background.values()))
        for process in processes:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + _STOP_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            _kill_group(process)
        self._background.clear()

    def _spawn(
        self, arguments: Sequence[str], *, stdout: Any, stderr: Any
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*_CONSILIUM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=self._environment,
            # A session of its own: Ctrl-C reaches the demo alone, which ends the others in order.
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - the demo has no threads of its own
        )


@contextlib.contextmanager
def _killed_on_error(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for process in processes:
            _kill_group(process)
        raise


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _data(command: Sequence[str], output: bytes, errors: bytes) -> Any:
    try:
        envelope = json.loads(output)
    except ValueError as error:
        raise ConsiliumError(
            "run.demo",
            f"`consilium {' '.join(command)}` gave no answer: "
            + errors.decode(errors="replace")[-600:],
        ) from error
    if envelope["status"] != "ok":
        raise ConsiliumError.from_dict(envelope["error"])
    return envelope["data"]
