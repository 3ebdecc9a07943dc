"""Many sites at one aggregator on this machine: ``python tests/benchmarks/load.py`` prints JSON.

A real aggregator (``consilium server start``) and light sites that speak the real wire from a few
processes. ``--sites 200 --millions 25`` runs a study of ``--rounds`` rounds and says how long a
round took, what memory each of the aggregator's processes needed at most, and CPU seconds per site
and round. ``--idle 1000`` connects that many sites, lets them greet and beat for ``--seconds``, and
says what that costs. Sites are certified by the aggregator's own authority and entered into its
registry directly: joining is measured nowhere here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))

TICKS = os.sysconf("SC_CLK_TCK")
COMMAND = str(Path(sys.executable).with_name("consilium"))


def consilium(*arguments: object) -> Any:
    """Run a command and return the data of its JSON answer."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)["data"]


class Aggregator:
    """A running aggregator with sites of its own authority in its registry."""

    def __init__(self, folder: Path, sites: int) -> None:
        from consilium_common.processes import free_port

        self.home, self.port = folder / "aggregator", free_port()
        self.address = f"127.0.0.1:{self.port}"
        consilium("server", "init", "--home", self.home, "--address", self.address)
        self.sites = folder / "sites"
        self._certify(sites)
        self._log = (folder / "aggregator.log").open("wb")
        self.process = subprocess.Popen(
            [
                *(COMMAND, "server", "start"),
                *("--home", str(self.home), "--port", str(self.port)),
            ],
            stdout=self._log,
            stderr=self._log,
        )
        end = time.monotonic() + 300
        while b"listens on" not in (folder / "aggregator.log").read_bytes():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "aggregator.log").read_text())
            time.sleep(0.1)

    def _certify(self, count: int) -> None:
        from consilium_common.identity.authority import Authority, certificate_pem
        from consilium_common.identity.certificates import Role, describe
        from consilium_common.identity.keys import new_tls_key, save_private
        from consilium_server.home import ServerHome
        from consilium_server.registry import Registry
        from consilium_server.tables import Member, now

        home = ServerHome.existing(self.home)
        authority = Authority.load(home.identity)
        members = []
        for number in range(count):
            name, key = f"site-{number:04d}", new_tls_key()
            certificate = authority.issue(key.public_key(), Role.SITE, name)
            folder = self.sites / str(number % PROCESSES) / name
            folder.mkdir(parents=True)
            save_private(folder / "site-key.pem", key)
            (folder / "site.pem").write_bytes(certificate_pem(certificate))
            (folder / "authority.pem").write_bytes(certificate_pem(authority.certificate))
            members.append(
                Member(
                    name=name,
                    role="site",
                    status="active",
                    serial=describe(certificate).serial,
                    certificate_pem=certificate_pem(certificate).decode(),
                    signer_pem="",
                    node_id=None,
                    joined_at=now(),
                )
            )
        with Registry(home.database).transaction() as session:
            session.add_all(members)

    def approve(self, digest: str, count: int) -> None:
        """Enter every site's approval."""
        from consilium_server.home import ServerHome
        from consilium_server.registry import Registry
        from consilium_server.tables import Approval, now

        with Registry(ServerHome.existing(self.home).database).transaction() as session:
            session.add_all(
                Approval(
                    digest=digest,
                    site=f"site-{number:04d}",
                    decision="approved",
                    why="",
                    cohort_size=20,
                    evaluation_size=0,
                    signature="",
                    decided_at=now(),
                )
                for number in range(count)
            )

    def tree(self) -> dict[int, str]:
        """Return the aggregator's processes by what they are."""
        found = {self.process.pid: "gateway"}
        pending = [self.process.pid]
        while pending:
            pid = pending.pop()
            for child in _children(pid):
                found[child] = _kind(child)
                pending.append(child)
        return found

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


class Watch:
    """The most memory, and the CPU time, of the aggregator's processes while it is looked at."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self.peak: dict[str, int] = {}
        self._began = self._cpu()
        self._gone: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        """Look once; often enough, since processes come and go."""
        for pid, kind in self._aggregator.tree().items():
            status = _read(pid, "status")
            line = next((x for x in status.splitlines() if x.startswith("VmHWM")), "")
            if line:
                self.peak[kind] = max(self.peak.get(kind, 0), int(line.split()[1]) * 1024)

    def cpu_seconds(self) -> dict[str, float]:
        """Return what each kind of process that still lives has used since the beginning."""
        now = self._cpu()
        return {kind: round(now[kind] - self._began.get(kind, 0.0), 2) for kind in now}

    def _cpu(self) -> dict[str, float]:
        used: dict[str, float] = {}
        for pid, kind in self._aggregator.tree().items():
            fields = _read(pid, "stat").rpartition(")")[2].split()
            if fields:
                used[kind] = used.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
        return used


def _children(pid: int) -> list[int]:
    return [int(one) for one in _read(pid, f"task/{pid}/children").split()]


def _kind(pid: int) -> str:
    line = _read(pid, "cmdline").replace("\0", " ")
    if "flower-superlink" in line:
        return "superlink"
    if "consilium_server.networks" in line:
        return "network child"  # lives for the seconds in which a study begins
    return "serverapp" if "forkserver" in line or "spawn" in line else "executor"


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_text()
    except (OSError, ValueError):
        return ""


PROCESSES = 2


def light_sites(stack: ExitStack, aggregator: Aggregator, update: Path) -> list[Any]:
    """Start the processes that play the sites."""
    running = []
    for folder in sorted(aggregator.sites.iterdir()):
        one = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).with_name("light_sites.py"))),
                *(str(folder), aggregator.address, str(update)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(one.wait)
        stack.callback(one.kill)
        running.append(one)
    for one in running:
        assert one.stdout is not None
        if one.stdout.readline().strip() != "ready":
            raise RuntimeError("a process of light sites did not come up")
    return running


def counts(running: list[Any]) -> dict[str, Any]:
    """Ask the light sites how far they are."""
    said = []
    for one in running:
        one.stdin.write("?\n")
        one.stdin.flush()
        said.append(json.loads(one.stdout.readline()))
    return {
        "sites": sum(row["sites"] for row in said),
        "greeted": sum(row["greeted"] for row in said),
        "trained": sum(row["trained"] for row in said),
        "ended": [why for row in said for why in row["ended"]],
    }


def rounds(folder: Path, sites: int, millions: int, number: int) -> dict[str, Any]:
    """Run a study and return its figures."""
    import numpy as np
    import yaml
    from wire import study_of

    from consilium_common.models.registry import trained_specs
    from consilium_common.models.weights import packed_header
    from consilium_common.study import Study

    study = Study.model_validate(
        {
            **study_of(millions).to_canonical(),
            "name": f"load-{millions}",
            "federation": {"rounds": number, "quorum": sites, "deadline_seconds": 3600.0},
        }
    )
    specs = trained_specs(study)
    size = sum(spec.size for spec in specs)
    update = folder / "update.safetensors"
    with update.open("wb") as file:
        file.write(packed_header(specs))
        file.write(np.random.default_rng(0).standard_normal(size, dtype="float32").tobytes())
    (folder / "study.yaml").write_text(yaml.safe_dump(study.to_canonical()))
    with ExitStack() as stack:
        aggregator = Aggregator(folder, sites)
        stack.callback(aggregator.stop)
        proposed = consilium("study", "propose", folder / "study.yaml", "--home", aggregator.home)
        digest = proposed["digest"]
        aggregator.approve(digest, sites)
        running = light_sites(stack, aggregator, update)
        time.sleep(5)
        watch = Watch(aggregator)
        consilium("study", "run", digest, "--home", aggregator.home)
        while True:
            for _ in range(50):
                watch.look()
                time.sleep(0.1)
            shown = consilium("study", "show", digest, "--home", aggregator.home)
            if shown["state"] in ("finished", "failed", "stopped"):
                break
        cpu = watch.cpu_seconds()
        if shown["state"] != "finished":
            raise RuntimeError(f"{shown['state']}: {shown['reason']} {counts(running)}")
        done = counts(running)
    return {
        "sites": sites,
        "parameters": size,
        "rounds": number,
        "seconds_per_round": [round(row["seconds"], 2) for row in shown["rounds"]],
        "sites_in_each_round": [len(row["sites"]) for row in shown["rounds"]],
        "trained": done["trained"],
        "peak_memory_mb": {kind: round(peak / 1e6) for kind, peak in watch.peak.items()},
        "update_mb": round(update.stat().st_size / 1e6, 1),
        "serverapp_peak_over_model": round(watch.peak["serverapp"] / update.stat().st_size, 2),
        "cpu_seconds": cpu,
        "cpu_seconds_per_site_and_round": round(sum(cpu.values()) / sites / number, 3),
    }


def idle(folder: Path, sites: int, seconds: float) -> dict[str, Any]:
    """Connect sites, leave them idle, and return what that costs."""
    update = folder / "update"
    update.write_bytes(b"nothing")
    with ExitStack() as stack:
        aggregator = Aggregator(folder, sites)
        stack.callback(aggregator.stop)
        running = light_sites(stack, aggregator, update)
        time.sleep(10)
        watch, before, began = Watch(aggregator), counts(running), time.monotonic()
        while time.monotonic() < began + seconds:
            watch.look()
            time.sleep(0.5)
        took, after, cpu = time.monotonic() - began, counts(running), watch.cpu_seconds()
        listed = consilium("server", "sites", "--home", aggregator.home)["sites"]
    return {
        "sites": sites,
        "online": sum(bool(row.get("online")) for row in listed),
        "greetings_per_second": round((after["greeted"] - before["greeted"]) / took, 1),
        "cores_used": {kind: round(used / took, 3) for kind, used in cpu.items()},
        "cpu_milliseconds_per_site_and_second": round(1e3 * sum(cpu.values()) / took / sites, 3),
        "peak_memory_mb": {kind: round(peak / 1e6) for kind, peak in watch.peak.items()},
        "ended": after["ended"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=20, help="sites of the study (200: in full)")
    parser.add_argument("--millions", type=int, choices=(1, 25, 100), default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--idle", type=int, default=100, help="idle sites (1000: in full)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they are idle")
    parser.add_argument("--folder", type=Path, help="where to work; needs sites × model of room")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in ("study", "idle"):
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            if name == "study" and options.sites:
                found[name] = rounds(folder, options.sites, options.millions, options.rounds)
            elif name == "idle" and options.idle:
                found[name] = idle(folder, options.idle, options.seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            found
            | {
                "load_average": os.getloadavg(),
                "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
