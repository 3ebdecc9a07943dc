"""A model both ways through link and gateway, against Flower's own HTTPS on the same machine.

Run ``python tests/benchmarks/wire.py``; it prints one JSON object. Every hop is a process of its
own: an unmodified SuperLink, our gateway and our link, and Flower's own SuperNode connection, which
speaks either to the SuperLink itself or to the link. The link's gate is at work as in a study: it
judges the reply, writes its receipt and sends what the site has stored. Times are the SuperNode's:
from asking for the message until the model is there (Flower: in memory; ours: on the disk), and
from announcing the reply until all of it is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))

TARGET_RATIO = 1.15
TARGET_CHUNKS = 2
CHUNK = 5 * 1000 * 1000  # Flower cuts arrays into pieces of this size
#: Widths and residual units of a 3D U-Net with about so many million parameters.
WIDTHS = {
    1: ((16, 32, 64, 128), 2),
    25: ((44, 88, 176, 352, 464), 2),
    100: ((61, 122, 244, 487, 487, 487), 3),
}


def study_of(millions: int) -> Any:
    """Return a study whose model has about so many million parameters."""
    from site_samples import plain_study

    from consilium_common.study import Study

    channels, units = WIDTHS[millions]
    return Study.model_validate(
        {
            **plain_study().to_canonical(),
            "name": f"wire-{millions}",
            "model": {
                "network": "unet",
                "arguments": {
                    "channels": list(channels),
                    "strides": [2] * (len(channels) - 1),
                    "num_res_units": units,
                },
            },
            "preprocessing": {"size": [64, 64, 64]},
            "federation": {"rounds": 1000},
        }
    )


# --- processes ---------------------------------------------------------------------------------


@contextmanager
def process(*arguments: object, ready: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Run this file in another role until the block ends."""
    running = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        if ready and running.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{arguments[0]} did not come up")
        yield running
    finally:
        running.kill()
        running.wait()


# --- memory ------------------------------------------------------------------------------------


class Peak:
    """The most memory a process takes from now on, beyond what it has now."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc") / str(pid)
        (self._folder / "clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = self._kilobytes("VmRSS")

    def bytes(self) -> int:
        """Return the difference."""
        return (self._kilobytes("VmHWM") - self._before) * 1024

    def _kilobytes(self, name: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise RuntimeError(f"no {name}")


# --- the measurement ---------------------------------------------------------------------------


class Bench:
    """One aggregator and one site in a folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec
        from site_samples import NAME, joined_site

        from consilium_common.identity.authority import Authority, certificate_pem
        from consilium_common.identity.certificates import Role, describe
        from consilium_common.identity.keys import new_tls_key, save_private
        from consilium_common.identity.loopback import make_loopback
        from consilium_common.processes import die_with_parent, flower_environment, free_port
        from consilium_server.flower_private import Control, node_key_bytes, superlink_command
        from consilium_server.registry import Registry
        from consilium_server.tables import Member, now

        self.folder = folder
        authority = Authority.create("benchmark")
        key = new_tls_key()
        save_private(folder / "server-key.pem", key)
        server = authority.issue(key.public_key(), Role.SERVER, "aggregator")
        (folder / "server.pem").write_bytes(certificate_pem(server))
        (folder / "authority.pem").write_bytes(certificate_pem(authority.certificate))
        self.gateway_port, self.link_port = free_port(), free_port()
        site = joined_site(
            folder / "site", address=f"127.0.0.1:{self.gateway_port}", authority=authority
        )
        self.site = site.home

        (folder / "run").mkdir()
        self.loopback = make_loopback(folder / "run")
        port = free_port()
        self.superlink = f"127.0.0.1:{port}"
        flower = folder / "flower"
        flower.mkdir()
        log = stack.enter_context((folder / "superlink.log").open("wb"))
        running = subprocess.Popen(
            superlink_command(
                port=port,
                certificate=self.loopback.certificate,
                key=self.loopback.key,
                secret=self.loopback.secret,
            ),
            env=flower_environment(flower),
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - as the product does
        )
        stack.callback(running.wait)
        stack.callback(running.kill)
        self.control = _patiently(lambda: Control(self.superlink, self.loopback.certificate))
        public = site.key.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        self.node = _patiently(lambda: self.control.register_node(node_key_bytes(public), NAME))
        with Registry(folder / "registry.db").transaction() as session:
            session.add(
                Member(
                    name=NAME,
                    role="site",
                    status="active",
                    serial=describe(site.identity.certificate).serial,
                    certificate_pem="",
                    signer_pem="",
                    node_id=str(self.node),
                    joined_at=now(),
                )
            )
        self.gateway = stack.enter_context(
            process("gateway", folder, self.superlink, self.loopback.certificate, self.gateway_port)
        )
        self.link = stack.enter_context(process("link", self.site.path, self.link_port))

    def _approve(self, study: Any) -> None:
        from site_samples import NAME

        from consilium_server.registry import Registry
        from consilium_server.tables import Approval, now

        with Registry(self.folder / "registry.db").transaction() as session:
            session.add(
                Approval(
                    digest=study.digest,
                    site=NAME,
                    decision="approved",
                    why="",
                    cohort_size=20,
                    evaluation_size=0,
                    signature="",
                    decided_at=now(),
                )
            )

    def run(self, grid: Any, millions: int, repeats: int) -> dict[str, Any]:
        """Measure both ways in turn, each ``repeats`` times after one to warm up."""
        import numpy as np
        from flwr.app import Message
        from site_samples import NAME
        from wire_processes import flower_content

        from consilium_client.declared import declared
        from consilium_client.store import StudyStore
        from consilium_common.files import write_atomic
        from consilium_common.models.weights import packed_header
        from consilium_common.wire.messages import Instructions, to_site
        from consilium_server.home import ServerHome
        from consilium_server.study_files import StudyFiles

        study = study_of(millions)
        specs = declared(study).tensors
        parameters = sum(spec.size for spec in specs)
        store = StudyStore(self.site)
        store.decide(study, "approved", 20, "")
        self._approve(study)
        files = StudyFiles(ServerHome(self.folder).study_folder(study.digest))
        model = self.folder / "model.safetensors"
        header = packed_header(specs)

        def blob() -> bytes:
            # Zeros would be one chunk, again and again; any other numbers travel alike.
            random = np.random.default_rng().standard_normal(parameters, dtype="float32")
            return header + random.tobytes()

        seconds: dict[str, list[dict[str, float]]] = {"flower": [], "consilium": []}
        peaks: dict[str, int] = {}
        for number in range(2 * (repeats + 1)):
            who = ("flower", "consilium")[number % 2]
            content = blob()
            store.keep_update(study.digest, number, content, {})
            address, certificate = (
                (self.superlink, self.loopback.certificate)
                if who == "flower"
                else (f"127.0.0.1:{self.link_port}", self.site.run / "loopback.pem")
            )
            with process("node", self.site.path, address, certificate, study.digest) as node:
                assert node.stdin is not None
                assert node.stdout is not None
                # The SuperLink takes messages to nodes that are there alone.
                if who == "flower":
                    carried = flower_content(content)
                else:
                    write_atomic(model, content)  # replaced: what is on offer stays as it is
                    files.expect(NAME, number, 2 * len(content))
                    asked = Instructions(study.digest, number, 20, model=files.offer(model))
                    carried = to_site(asked)
                pushed = grid.push_messages(
                    [Message(content=carried, dst_node_id=self.node, message_type="train")]
                )
                if not all(pushed):
                    raise RuntimeError("the SuperLink took no message")
                del content, carried
                watched = {"gateway": Peak(self.gateway.pid), "link": Peak(self.link.pid)}
                node.stdin.write(f"{who} {number}\n")
                node.stdin.flush()
                measured = json.loads(node.stdout.readline())
                if who == "consilium" and number >= 2:  # what is loaded once is no model's
                    peaks = {
                        name: max(peaks.get(name, 0), p.bytes()) for name, p in watched.items()
                    }
                node.stdin.close()
                node.wait()
            print(f"{millions} million, {who}: {measured}", file=sys.stderr, flush=True)
            if number >= 2:
                seconds[who].append(measured)
        return _figures(parameters, seconds, peaks)


def _figures(
    parameters: int, seconds: dict[str, list[dict[str, float]]], peaks: dict[str, int]
) -> dict[str, Any]:
    def both(rows: list[dict[str, float]]) -> dict[str, float]:
        return {
            way: round(statistics.median(row[way] for row in rows), 3) for way in ("down", "up")
        }

    medians = {who: both(rows) for who, rows in seconds.items()}
    sums = {who: sum(ways.values()) for who, ways in medians.items()}
    size = seconds["consilium"][0]["bytes"]
    return {
        "parameters": parameters,
        "bytes_each_way": size,
        "seconds": medians,
        "ratio": round(sums["consilium"] / sums["flower"], 3),
        "ratio_each_way": {
            way: round(medians["consilium"][way] / medians["flower"][way], 3)
            for way in ("down", "up")
        },
        "megabytes_per_second": {who: round(2 * size / 1e6 / s, 1) for who, s in sums.items()},
        "peak_memory_beyond_idle_bytes": peaks,
        # Of the payload itself no hop holds more than the pieces under way.
        "chunks_beyond_idle": {name: round(peak / CHUNK, 1) for name, peak in peaks.items()},
    }


def _patiently(attempt: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while True:
        try:
            return attempt()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def measure(millions: list[int], repeats: int) -> list[dict[str, Any]]:
    """Start everything and measure each size."""
    from consilium_server.flower_private import TaskSource, run_server_task

    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, stack)
        bench.control.start_run("0" * 64)
        secret = bench.loopback.secret.read_bytes()
        source = TaskSource(bench.superlink, bench.loopback.certificate, secret)
        task = _patiently(lambda: source.acquire() or _none_yet())

        def main(grid: Any, _: Any) -> None:
            found.extend(bench.run(grid, size, repeats) for size in millions)

        run_server_task(bench.superlink, bench.loopback.certificate.read_bytes(), task[0], main)
    return found


def _none_yet() -> Any:
    raise LookupError("no task yet")


def main() -> None:
    """Measure and print, or be one of the processes."""
    from wire_processes import run_gateway, run_link, run_node

    roles: dict[str, Callable[..., None]] = {
        "gateway": lambda folder, superlink, certificate, port: asyncio.run(
            run_gateway(Path(folder), superlink, Path(certificate), int(port))
        ),
        "link": lambda site, port: asyncio.run(run_link(Path(site), int(port))),
        "node": lambda site, address, certificate, digest: run_node(
            Path(site), address, Path(certificate), digest
        ),
    }
    if len(sys.argv) > 1 and sys.argv[1] in roles:
        roles[sys.argv[1]](*sys.argv[2:])
        return
    from round_overhead import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--millions", type=int, nargs="+", choices=sorted(WIDTHS), default=[25, 100]
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each (default 3)")
    options = parser.parse_args()
    load = os.getloadavg()
    figures = measure(options.millions, options.repeats)
    print(
        json.dumps(
            {
                "benchmark": "wire",
                "sizes": figures,
                "repeats": options.repeats,
                "target_ratio": TARGET_RATIO,
                "target_chunks_beyond_payload": TARGET_CHUNKS,
                "load_average_before": [round(value, 2) for value in load],
                "load_average_after": [round(value, 2) for value in os.getloadavg()],
                "machine": machine(),
            },
            indent=2,
        )
    )
    missed = [
        one["parameters"]
        for one in figures
        if one["ratio"] > TARGET_RATIO or max(one["chunks_beyond_idle"].values()) > TARGET_CHUNKS
    ]
    if missed:
        sys.exit(f"over a target with {missed} parameters")


if __name__ == "__main__":
    main()
