"""A federation for tests: real processes on this machine, driven by the public commands alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from warm_commands import run_warm

from consilium_common.demo.hospitals import NAMES, write_hospitals
from consilium_common.errors import WARNINGS_ONLY
from consilium_common.models.kept import CACHE_VARIABLE
from consilium_common.processes import die_with_parent, free_port

T = TypeVar("T")

CONSILIUM = str(Path(sys.executable).with_name("consilium"))
#: Set in a process's environment: all its descendants inherit it, whatever session they are in.
_MARK = "CONSILIUM_TEST_PROCESS"
#: Exit statuses of commands that have done what was asked.
_GOOD = (0, WARNINGS_ONLY)

POLICY: dict[str, Any] = {
    "schema": "consilium/policy/v1",
    "budget": {"epsilon": 10.0, "delta": 0.001},
    "permit_non_private": True,
    "minimal_cohort": 2,
    "minimal_sites": 1,
    "release_exact_metrics": True,
}


@dataclass(frozen=True)
class Answer:
    """What a command with ``--json`` answered: exactly one envelope, and its exit status."""

    status: int
    envelope: dict[str, Any]
    stderr: str

    @property
    def data(self) -> Any:
        """The data of a command that must have succeeded."""
        assert self.status in _GOOD, f"{self.envelope}\n{self.stderr}"
        return self.envelope["data"]

    @property
    def error(self) -> dict[str, str]:
        """The error of a command that must have failed."""
        assert self.status not in _GOOD, self.envelope
        error: dict[str, str] = self.envelope["error"]
        return error

    @property
    def code(self) -> str:
        """Code of the error."""
        return self.error["code"]


def environment(**further: str) -> dict[str, str]:
    """Return an environment in which nothing of the developer's own state is found."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == CACHE_VARIABLE or not name.startswith("CONSILIUM_")
    }
    return {**kept, "OMP_NUM_THREADS": "1", **further}


def consilium(*arguments: object, timeout: float = 120.0) -> Answer:
    """Run one command with ``--json`` to its end; asserts that stdout is exactly one envelope."""
    words = ["--json", *map(str, arguments)]
    done = run_warm(words, environment(), timeout)
    said, stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in stderr, stderr
    assert said.endswith("\n"), f"{arguments}: no envelope\n{stderr}"
    assert said.count("\n") == 1, f"{arguments}: more than one line\n{said}"
    envelope = json.loads(said)
    good = done.returncode in _GOOD
    assert set(envelope) == ({"status", "data"} if good else {"status", "error"}), envelope
    assert envelope["status"] == ("ok" if good else "error"), envelope
    return Answer(done.returncode, envelope, stderr)


def simulate(study: Mapping[str, Any], sites: Path, folder: Path, *, together: int = 1) -> Answer:
    """Simulate a study with the command itself: Ray must not find a forked process's gRPC."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(dict(study)))
    arguments = ["study", "simulate", file, "--sites", sites, "--out", folder / "out"]
    arguments += ["--together", together]
    done = subprocess.run(
        [CONSILIUM, "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280.0,
        env=environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.stdout.count("\n") == 1, f"not one envelope: {done.stdout}\n{done.stderr}"
    return Answer(done.returncode, json.loads(done.stdout), done.stderr)


def wait_for(
    look: Callable[[], T | None], what: str, *, timeout: float = 60.0, pause: float = 0.1
) -> T:
    """Return the first true value of ``look``; fails the test after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"waited {timeout:.0f} s in vain for {what}"
        time.sleep(pause)


class Running:
    """A long-running command and everything it has started.

    Parameters
    ----------
    log : Path
        Takes stdout and stderr.
    prefix : sequence of str
        Stands before the command: ``ip netns exec NAME``.
    """

    def __init__(self, arguments: list[object], log: Path, prefix: Sequence[str] = ()) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}".encode()
        self._log = log
        with log.open("ab") as stream:
            self._start = stream.tell()
            key, _, value = self._mark.decode().partition("=")
            self._process = subprocess.Popen(
                [*prefix, CONSILIUM, "--debug", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment(**{key: value}),
                start_new_session=True,
                # Killed with the test run, too. The kernel ties it to the thread that starts it,
                # so that is always the main one.
                preexec_fn=die_with_parent,  # noqa: PLW1509 - as the product does
            )

    @property
    def pid(self) -> int:
        """Process id of the command itself."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What this start has written so far."""
        return self._log.read_bytes()[self._start :].decode(errors="replace")

    def ended(self) -> bool:
        """Whether the command itself has ended."""
        return self._process.poll() is not None

    def wait_until_ended(self, *, timeout: float = 60.0) -> int:
        """Wait until the command has ended by itself; returns its exit status."""
        return self._process.wait(timeout)

    def processes(self) -> dict[int, str]:
        """Return all living processes of this command, by process id, with their command lines."""
        return dict(_marked(self._mark))

    def wait_until_says(self, words: str, *, timeout: float = 60.0) -> None:
        """Wait until the command has written ``words``; fails when it ends before."""

        def look() -> bool:
            said = words in self.output
            assert said or not self.ended(), f"it ended before saying {words!r}:\n{self.output}"
            return said

        wait_for(look, f"{words!r} in {self._log.name}", timeout=timeout)

    def interrupt(self, number: signal.Signals = signal.SIGINT, *, timeout: float = 10.0) -> None:
        """End it as Ctrl-C does; no process of it may be left after ``timeout`` seconds."""
        if not self.ended():
            os.kill(self.pid, number)
        self._wait_until_gone(timeout)

    def kill(self) -> None:
        """Kill the whole tree with SIGKILL, all at once."""
        for pid in self.processes():
            _send(pid, signal.SIGKILL)
        self._wait_until_gone(10.0)

    def kill_main(self) -> None:
        """Kill the command itself with SIGKILL; its children must not outlive it."""
        _send(self.pid, signal.SIGKILL)
        self._wait_until_gone(10.0)

    def clean(self) -> None:
        """Leave nothing behind, whatever happened; for the end of a test."""
        for pid in self.processes():
            _send(pid, signal.SIGKILL)
        self._process.wait(timeout=10)

    def _wait_until_gone(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            self._process.poll()  # reaps it
            left = self.processes()
            if not left and self.ended():
                return
            assert time.monotonic() < end, f"after {timeout:.0f} s these are left: {left}"
            time.sleep(0.05)


def _marked(mark: bytes) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if mark in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(folder.name), command.decode(errors="replace")
        except (OSError, ProcessLookupError):
            continue  # it ended meanwhile, or is not ours


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@dataclass
class Site:
    """A hospital of the federation."""

    name: str
    home: Path
    log: Path
    running: Running | None = None
    _launched: float = 0.0
    prefix: tuple[str, ...] = ()

    def __call__(self, *arguments: object) -> Answer:
        """Run ``consilium site …`` here."""
        return consilium("site", *arguments, "--home", self.home)

    def set_policy(self, **changes: Any) -> None:
        """Write ``policy.yaml``: that of the tests with ``changes``."""
        (self.home / "policy.yaml").write_text(yaml.safe_dump({**POLICY, **changes}))

    def progress(self, digest: str) -> dict[str, Any]:
        """Return what it says that it is at in a study; empty while it is at nothing of it."""
        try:
            said: dict[str, Any] = json.loads((self.home / "run" / "progress.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return said if said["digest"] == digest else {}

    def start(self) -> None:
        """Run ``site start`` and wait until the aggregator and Flower know that it is there."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Run ``site start``."""
        self._launched = time.time()
        self.running = Running(["site", "start", "--home", self.home], self.log, self.prefix)

    def wait_until_ready(self) -> None:
        """Wait until the aggregator and Flower know that the site is there."""
        assert self.running is not None
        node = self.home / "run" / "node.json"
        self.running.wait_until_says("connected to")
        wait_for(
            lambda: node.exists() and node.stat().st_mtime >= self._launched,
            f"the SuperNode of {self.name}",
        )

    def kill(self) -> None:
        """Kill the whole tree with SIGKILL."""
        assert self.running is not None
        self.running.kill()
        self.running = None

    def stop(self) -> None:
        """End it with Ctrl-C."""
        if self.running is not None:
            self.running.interrupt()
            self.running = None


class Federation:
    """One aggregator and its sites, in one folder.

    Parameters
    ----------
    folder : Path
        Everything lies below it.
    init : object
        Further options of ``server init``.
    """

    def __init__(self, folder: Path, *init: object) -> None:
        self.folder = folder
        self._init = init
        self.home = folder / "aggregator"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.sites: dict[str, Site] = {}
        self.running: Running | None = None

    def __enter__(self) -> Federation:
        self.server("init", "--address", self.address, "--name", "tests", *self._init).data  # noqa: B018
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for holder in (*self.sites.values(), self):
            self._clean(holder)

    def server(self, *arguments: object) -> Answer:
        """Run ``consilium server …``."""
        return consilium("server", *arguments, "--home", self.home)

    def study(self, *arguments: object, timeout: float = 120.0) -> Answer:
        """Run ``consilium study …``."""
        return consilium("study", *arguments, "--home", self.home, timeout=timeout)

    def start(self) -> None:
        """Run ``server start`` and wait until the port is open."""
        self.running = Running(
            ["server", "start", "--home", self.home, "--host", "127.0.0.1"],
            self.folder / "aggregator.log",
        )
        self.running.wait_until_says("listens on")

    def heal(self) -> None:
        """Start what does not run of the aggregator and the three hospitals."""
        if self.running is None or self.running.ended():
            self._clean(self)
            self.start()
        for name in NAMES:
            site = self.sites.get(name)
            if site is not None and (site.running is None or site.running.ended()):
                self._clean(site)
                site.start()

    @staticmethod
    def _clean(holder: Federation | Site) -> None:
        if holder.running is not None:
            holder.running.clean()
            holder.running = None

    def kill(self) -> None:
        """Kill the aggregator's whole tree with SIGKILL."""
        assert self.running is not None
        self.running.kill()
        self.running = None

    def stop(self) -> None:
        """End the aggregator with Ctrl-C."""
        assert self.running is not None
        self.running.interrupt()
        self.running = None

    def invite(self, name: str, *options: object) -> Path:
        """Write an invitation and return its file."""
        path = self.folder / f"{name}-{uuid.uuid4().hex[:6]}.invitation"
        self.server("invite", name, "--out", path, *options).data  # noqa: B018
        return path

    def join(self, name: str) -> Site:
        """Have a new site join, with the tests' policy."""
        site = Site(name, self.folder / f"site-{name}", self.folder / f"{name}.log")
        site("join", self.invite(name)).data  # noqa: B018
        site.set_policy()
        self.sites[name] = site
        return site

    def propose(self, study: Mapping[str, Any]) -> str:
        """Propose a study and return its digest."""
        path = self.folder / f"{study['name']}.yaml"
        path.write_text(yaml.safe_dump(dict(study)))
        digest: str = self.study("propose", path).data["digest"]
        return digest

    def approve(self, digest: str, *names: str) -> None:
        """Have sites approve a study, all of the hospitals by default."""
        with ThreadPoolExecutor(4) as pool:
            sites = [self.sites[name] for name in names or NAMES]
            answers = list(pool.map(lambda site: site("approve", digest, "--yes"), sites))
        for answer in answers:
            answer.data  # noqa: B018

    def show(self, digest: str) -> dict[str, Any]:
        """Return what ``study show`` says."""
        data: dict[str, Any] = self.study("show", digest).data
        return data

    def wait_until(
        self,
        digest: str,
        holds: Callable[[dict[str, Any]], bool],
        what: str,
        timeout: float = 90.0,
        pause: float = 0.4,
    ) -> dict[str, Any]:
        """Wait until ``holds`` is true of the study; fails at once when the study has failed.

        Each look is a command: a shorter ``pause`` takes the processor from what is waited for.
        """

        def look() -> dict[str, Any] | None:
            data = self.show(digest)
            if holds(data):
                return data
            assert data["state"] != "failed", data["reason"]
            return None

        return wait_for(look, what, timeout=timeout, pause=pause)

    def run_to_end(self, study: Mapping[str, Any], *, timeout: float = 120.0) -> dict[str, Any]:
        """Propose, have all hospitals approve, run and watch a study; return its last state."""
        digest = self.propose(study)
        self.approve(digest)
        self.study("run", digest).data  # noqa: B018
        data: dict[str, Any] = self.study("watch", digest, timeout=timeout).data
        return data

    def model(self, digest: str) -> Path:
        """Return the file of a finished study's model."""
        return self.home / "studies" / digest[:16] / "model.safetensors"

    def simulate(self, study: Mapping[str, Any], folder: Path, *, together: int = 1) -> Answer:
        """Simulate a study over the data of the three hospitals, in a folder of its own."""
        sites = folder / "homes"
        sites.mkdir()
        for name in NAMES:  # other tests add sites of their own
            (sites / name).symlink_to(self.sites[name].home, target_is_directory=True)
        return simulate(study, sites, folder, together=together)


def add_hospitals(
    federation: Federation, names: Sequence[str] = NAMES, started: Sequence[str] = NAMES
) -> None:
    """Add the demo's hospitals, small: one keeps DICOM, one the MSD layout, one a CSV."""
    hospitals = write_hospitals(federation.folder / "images", patients=(9, 9, 9), size=16)
    hospitals = [hospital for hospital in hospitals if hospital.name in names]

    def add(hospital: Any) -> Site:
        site = federation.join(hospital.name)
        labels = [
            part
            for value, name in enumerate(hospital.labels)
            if value
            for part in ("--label", f"{name}={value}")
        ]
        site("data", "import", hospital.folder, *labels).data  # noqa: B018
        _every_third_is_tested(site.home / "data" / "cases.csv")
        return site

    with ThreadPoolExecutor(2) as pool:
        sites = [site for site in pool.map(add, hospitals) if site.name in started]
    for site in sites:
        site.launch()
    for site in sites:
        site.wait_until_ready()


def _every_third_is_tested(cases: Path) -> None:
    """Fix the split: drawn by a site's own key, so few patients may leave nobody to test on."""
    with cases.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    patients = sorted({row["patient_id"] for row in rows})
    for row in rows:
        row["split"] = "train" if patients.index(row["patient_id"]) % 3 else "test"
    with cases.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def small_study(name: str, **changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study that the hospitals can train in a moment; ``changes`` replace keys of parts.

    Every name makes another study: names are part of a study's digest.
    """
    study: dict[str, Any] = {
        "schema": "consilium/study/v1",
        "name": name,
        "task": {
            "kind": "segmentation",
            "dimensions": 3,
            "inputs": ["ct"],
            "classes": ["background", "liver"],
        },
        "preprocessing": {
            "orientation": "RAS",
            "size": [16, 16, 16],
            "intensity": {"kind": "window", "low": -160.0, "high": 240.0},
        },
        "model": {"network": "unet", "arguments": {"channels": [4, 8], "strides": [2]}},
        "training": {"steps_per_round": 2, "batch_size": 2},
        "privacy": {"mode": "none"},
        "federation": {"rounds": 2, "quorum": 2, "deadline_seconds": 60.0},
        "evaluation": {"release": "exact"},
    }
    for part, values in changes.items():
        study[part] = {**study[part], **values}
    return study


#: A private study's parts; two rounds of it cost an ε well inside the tests' budget.
PRIVATE: dict[str, dict[str, Any]] = {
    "privacy": {
        "mode": "patient",
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "noise_multiplier": 4.0,
        "delta": 0.001,
    },
    "evaluation": {"release": "none"},
}
