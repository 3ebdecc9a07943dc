"""Half-open connections and slow peers by the hundred: a healthy site's calls go on meanwhile."""

from __future__ import annotations

import os
import re
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from federation import Federation, Running, Site, wait_for
from raw_wire import (
    DATA,
    END_HEADERS,
    HEADERS,
    PREFACE,
    call_headers,
    client_context,
    connect,
    frame,
    grpc_message,
    settings,
)

from consilium_common.errors import ConsiliumError
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.methods import MEMBER_PROBE, SITE_DELIVER, SITE_STUDIES, fleet_method

HALF_OPEN = 600
NOBODY = 65534
#: CAP_DAC_READ_SEARCH, as a bit: the tests' Python may be root's own to read.
READING = 1 << 2
#: Before a command: where the tests are root's, the command is an ordinary user's all the same.
AS_NOBODY = (
    (
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(f"--{which}=-all,+dac_read_search" for which in ("bounding-set", "inh-caps")),
        *("--ambient-caps=-all,+dac_read_search", "--pdeathsig=KILL"),
    )
    if os.geteuid() == 0
    else ()
)


def give_away(folder: Path) -> None:
    """Let the folder belong to who is to run there."""
    if AS_NOBODY:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


class OnEveryAddress(Federation):
    """Its aggregator listens as `server start` does of itself, and runs as no root."""

    def start(self) -> None:
        give_away(self.folder)
        self.running = Running(
            ["server", "start", "--home", self.home], self.folder / "aggregator.log", AS_NOBODY
        )
        self.running.wait_until_says("listens on")


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    # Not among the other tests' folders, which root alone may enter.
    with tempfile.TemporaryDirectory() as folder, OnEveryAddress(Path(folder)) as running:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(running.join, ("healthy", "hostile")))
        yield running


def credentials(site: Site) -> Credentials:
    folder = site.home / "identity"
    return Credentials(
        (folder / "authority.pem").read_bytes(),
        (folder / "site.pem").read_bytes(),
        (folder / "site-key.pem").read_bytes(),
    )


class Healthy:
    """Asks and sends half a megabyte, again and again, and keeps how long each took.

    A call that the network ends is tried again, as a site's link does, and counted.
    """

    def __init__(self, federation: Federation) -> None:
        self.seconds: list[float] = []
        self.interrupted = 0
        self.problems: list[BaseException] = []
        self._ended = threading.Event()
        self._federation = federation
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Healthy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self.problems, self.problems
        assert len(self.seconds) >= 3

    def _work(self) -> None:
        site = self._federation.sites["healthy"]
        try:
            with Caller(self._federation.address, credentials(site)) as caller:
                while not self._ended.is_set():
                    begin = time.perf_counter()
                    try:
                        caller.call(SITE_STUDIES, {})
                        caller.call(MEMBER_PROBE, {"content": "x" * 500_000})
                        self.seconds.append(time.perf_counter() - begin)
                    except ConsiliumError as problem:
                        if not problem.code.startswith("network."):
                            raise
                        self.interrupted += 1
                    time.sleep(0.05)
        except BaseException as problem:
            self.problems.append(problem)


def test_six_hundred_half_open_connections_hold_nobody_up(federation: Federation) -> None:
    """A third says nothing, a third sends half a greeting, a third sends what is no TLS."""
    hello = client_hello()
    assert federation.running is not None
    with ExitStack() as stack, Healthy(federation) as healthy:
        opened = []
        for number in range(HALF_OPEN):
            raw = stack.enter_context(
                socket.create_connection(("127.0.0.1", federation.port), timeout=10)
            )
            raw.sendall((b"", hello[: len(hello) // 2], b"GET / HTTP/1.1\r\n")[number % 3])
            opened.append(raw)
        wait_for(lambda: len(healthy.seconds) >= 10, "ten calls of the healthy site", timeout=60)
        # None is kept for long: those that never finish the handshake are hung up on.
        opened[0].settimeout(30)
        assert opened[0].recv(1) == b""
        # A new caller gets in, too.
        with Caller(federation.address, credentials(federation.sites["healthy"])) as another:
            another.call(SITE_STUDIES, {})
    print(f"healthy calls: median {statistics.median(healthy.seconds):.3f} s,"
          f" slowest {max(healthy.seconds):.3f} s")  # fmt: skip
    assert healthy.interrupted == 0
    assert statistics.median(healthy.seconds) < 5.0
    assert not federation.running.ended()


def test_a_member_that_never_ends_its_calls_fills_only_its_own_places(
    federation: Federation,
) -> None:
    """It opens hundreds of calls whose bodies never come, and reads none of its answers."""
    context = client_context(federation.sites["hostile"].home / "identity")
    assert federation.running is not None
    with ExitStack() as stack, Healthy(federation) as healthy:
        for _ in range(6):
            connection = stack.enter_context(connect(federation.port, context))
            connection.sendall(PREFACE + settings(initial_window_size=0))
            for stream in range(1, 200, 2):
                method = (MEMBER_PROBE, fleet_method("PushObject"), SITE_DELIVER)[stream // 2 % 3]
                connection.sendall(
                    frame(HEADERS, END_HEADERS, stream, call_headers(method))
                    # A message of 5 MB is announced, and its first byte comes.
                    + frame(DATA, 0, stream, grpc_message(b"x", length=5_000_000))
                )
        wait_for(lambda: len(healthy.seconds) >= 10, "ten calls of the healthy site", timeout=60)
        assert federation.running is not None
        wait_for(
            lambda: "network.too-many" in federation.running.output,  # type: ignore[union-attr]
            "a refusal for too many calls",
        )
    print(f"healthy calls: median {statistics.median(healthy.seconds):.3f} s,"
          f" slowest {max(healthy.seconds):.3f} s")  # fmt: skip
    assert statistics.median(healthy.seconds) < 5.0


def test_a_path_that_is_no_text_is_refused_by_name_and_disturbs_nobody(
    federation: Federation,
) -> None:
    """A server loop of gRPC's own ends of such a call, and takes everybody's calls with it."""
    context = client_context(federation.sites["hostile"].home / "identity")
    with Caller(federation.address, credentials(federation.sites["healthy"])) as caller:
        caller.call(SITE_STUDIES, {})
        for _ in range(3):
            with connect(federation.port, context) as connection:
                bad = call_headers("/x").replace(b"/x", b"\xaa\xff")
                connection.sendall(PREFACE + settings() + frame(HEADERS, END_HEADERS | 1, 1, bad))
                for _ in range(5):
                    caller.call(SITE_STUDIES, {}, timeout=5)  # on the connection it had
                    time.sleep(0.05)
    running = federation.running
    assert running is not None
    refusal = re.compile(r"refused site hostile \(\S+\): there is no such call")
    wait_for(lambda: len(refusal.findall(running.output)) == 3, "the refusals in the log")
    assert "gRPC's server ended" not in running.output
    assert not running.ended()


def client_hello() -> bytes:
    """Return what a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    stream = context.wrap_bio(incoming, outgoing, server_hostname="aggregator.consilium.internal")
    with pytest.raises(ssl.SSLWantReadError):
        stream.do_handshake()
    return outgoing.read()


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return the addresses on which these processes accept TCP connections, from the kernel."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            except OSError:
                continue
            if match:
                inodes.add(match[1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                address, _, port = local.partition(":")
                found.add((address, int(port, 16)))
    return found


#: 127.0.0.1 as the kernel writes it, and ::1 likewise.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def test_only_the_one_port_is_open_to_others(federation: Federation) -> None:
    """The aggregator listens on every address at its port and on loopback for all else."""
    assert federation.running is not None
    found = listening(set(federation.running.processes()))
    outside = {port for address, port in found if address not in LOOPBACK}
    assert outside == {federation.port}
    assert len(found) > 1  # the SuperLink is there, on loopback


def test_a_site_listens_on_loopback_alone(federation: Federation) -> None:
    site = federation.sites["healthy"]
    give_away(federation.folder)
    site.prefix = AS_NOBODY
    site.start()
    assert site.running is not None
    assert_ordinary(site.running)
    found = listening(set(site.running.processes()))
    assert found
    assert {address for address, _ in found} <= LOOPBACK
    site.stop()


def test_state_folders_are_private_and_nothing_needs_root(federation: Federation) -> None:
    for folder in (federation.home, federation.sites["healthy"].home):
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                assert path.stat().st_mode & 0o077 == 0 or private_above(path, folder), path
    assert federation.running is not None
    assert_ordinary(federation.running)


def assert_ordinary(running: Running) -> None:
    """No process of it is root's, or may do what an ordinary user may not, but for reading."""
    processes = running.processes()
    assert len(processes) > 1
    for pid in processes:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert "0" not in status["Uid"].split(), processes[pid]
        assert int(status["CapEff"], 16) & ~READING == 0, processes[pid]


def private_above(path: Path, folder: Path) -> bool:
    """Whether nobody else can reach ``path``, because ``folder`` or one between is closed."""
    return any(
        parent.stat().st_mode & 0o077 == 0
        for parent in path.parents
        if parent == folder or folder in parent.parents
    )
