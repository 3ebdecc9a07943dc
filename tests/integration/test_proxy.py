"""A hospital whose only way out is an HTTPS proxy: a real one (tinyproxy), through CONNECT."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import Answer, Federation, Site, add_hospitals, small_study, wait_for

from consilium_common.demo.hospitals import NAMES
from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_parent, free_port
from consilium_common.wire.proxy import Proxy, open_socket

_PROGRAM = shutil.which("tinyproxy") or "/usr/bin/tinyproxy"
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not Path(_PROGRAM).exists(), reason="tinyproxy is not installed (apt install tinyproxy)"
    ),
]
HOSPITAL = NAMES[0]


class TinyProxy:
    """A proxy on loopback that lets CONNECT through to one port alone.

    Parameters
    ----------
    port : int
        The aggregator's.
    login : str
        ``user:password`` without which it answers 407; empty asks for none.
    """

    def __init__(self, folder: Path, port: int, login: str = "") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"proxy-{self.port}.log"
        self._log.touch()
        self._configuration = folder / f"proxy-{self.port}.conf"
        lines = [
            f"Port {self.port}",
            "Listen 127.0.0.1",
            "Allow 127.0.0.1",
            "Timeout 600",
            "MaxClients 64",
            f"ConnectPort {port}",
            f'LogFile "{self._log}"',
            "LogLevel Connect",
            *([f"BasicAuth {login.replace(':', ' ')}"] if login else []),
        ]
        self._configuration.write_text("\n".join([*lines, ""]))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TinyProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Run it and wait until its port is open."""
        self._process = subprocess.Popen(
            [_PROGRAM, "-d", "-c", str(self._configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - from the main thread, as the product does
        )
        wait_for(self._listens, "the proxy's port")

    def kill(self) -> None:
        """Kill it: every tunnel through it breaks at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def asked(self, address: str) -> int:
        """Return how often CONNECT to ``address`` was asked for."""
        return self._log.read_text(errors="replace").count(f"CONNECT {address} ")

    def _listens(self) -> bool:
        try:
            open_socket("127.0.0.1:1", Proxy("127.0.0.1", self.port), timeout=2).close()
        except ConsiliumError as error:
            return error.code not in ("network.proxy-refused", "network.proxy-unreachable")
        return True


class BehindProxy(Federation):
    """Its hospitals know no other way to the aggregator than the proxy."""

    proxy: TinyProxy

    def join(self, name: str) -> Site:
        site = Site(name, self.folder / f"site-{name}", self.folder / f"{name}.log")
        site("join", self.invite(name), "--proxy", self.proxy.url).data  # noqa: B018
        site.set_policy()
        self.sites[name] = site
        return site


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BehindProxy]:
    """An aggregator, a proxy, and one hospital behind it that has joined, imported and started."""
    with (
        BehindProxy(tmp_path_factory.mktemp("proxy")) as running,
        TinyProxy(running.folder, running.port) as running.proxy,
    ):
        add_hospitals(running, [HOSPITAL])
        yield running


def study(name: str, rounds: int = 2) -> dict[str, Any]:
    return small_study(name, federation={"rounds": rounds, "quorum": 1})


def steps_of(answer: Answer) -> dict[str, str]:
    """Return how each step of a doctor's answer ended."""
    told = answer.envelope.get("data") or answer.envelope["error"]
    return {step["name"]: step["outcome"] for step in told["steps"]}


def test_a_hospital_joins_and_trains_a_study_to_its_end_through_the_proxy_alone(
    consortium: BehindProxy,
) -> None:
    asked = consortium.proxy.asked(consortium.address)
    assert asked > 0  # the join itself
    digest = consortium.propose(study("through-proxy"))
    consortium.approve(digest, HOSPITAL)
    assert consortium.proxy.asked(consortium.address) > asked
    consortium.study("run", digest).data  # noqa: B018
    found = consortium.study("watch", digest).data
    assert found["state"] == "finished"
    assert [row["sites"] for row in found["rounds"]] == [[HOSPITAL]] * 2


def test_the_doctor_says_that_the_way_leads_through_the_proxy(consortium: BehindProxy) -> None:
    steps = steps_of(consortium.sites[HOSPITAL]("doctor"))
    for name in ("DNS", "TCP", "proxy", "TLS", "identity", "revocation", "version"):
        assert steps[name] == "ok", steps


def test_a_proxy_that_forbids_the_port_is_named_as_the_cause(consortium: BehindProxy) -> None:
    proxy = Proxy("127.0.0.1", consortium.proxy.port)
    with pytest.raises(ConsiliumError) as caught:
        open_socket(f"127.0.0.1:{free_port()}", proxy)
    assert caught.value.code == "network.proxy-forbids"


def test_a_study_goes_on_after_the_proxy_died_in_its_midst(consortium: BehindProxy) -> None:
    digest = consortium.propose(study("proxy-dies", rounds=4))
    consortium.approve(digest, HOSPITAL)
    consortium.study("run", digest).data  # noqa: B018
    consortium.wait_until(digest, lambda data: len(data["rounds"]) >= 1, "the first round")
    asked = consortium.proxy.asked(consortium.address)
    consortium.proxy.kill()
    site = consortium.sites[HOSPITAL]
    assert site.running is not None
    site.running.wait_until_says("not connected: ")
    assert consortium.show(digest)["state"] == "running"
    consortium.proxy.start()
    found = consortium.study("watch", digest, timeout=180).data
    assert found["state"] == "finished"
    assert [row["number"] for row in found["rounds"]] == [0, 1, 2, 3]
    assert consortium.proxy.asked(consortium.address) > asked
    assert not site.running.ended()


def test_a_proxy_with_a_password_lets_in_who_knows_it_and_tells_who_does_not(
    consortium: BehindProxy, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("hospital:open-sesame\n")
    wrong.write_text("hospital:guessed-it\n")
    for file in (right, wrong):
        file.chmod(0o600)
    site = Site("behind-password", tmp_path / "site", tmp_path / "site.log")
    invitation = consortium.invite(site.name)
    with TinyProxy(tmp_path, consortium.port, "hospital:open-sesame") as proxy:
        refused = site("join", invitation, "--proxy", proxy.url)
        assert refused.code == "network.proxy-login"
        refused = site("join", invitation, "--proxy", proxy.url, "--proxy-login", wrong)
        assert refused.code == "network.proxy-login"
        assert "guessed-it" not in refused.stderr + str(refused.envelope)
        # The invitation is still good: nobody at the aggregator was ever reached.
        joined = site("join", invitation, "--proxy", proxy.url, "--proxy-login", right)
        assert joined.data["site"] == site.name
        site.set_policy()
        assert steps_of(site("doctor"))["proxy"] == "ok"
        # The password has changed since: the doctor stops there, and says what to do.
        kept = site.home / "identity" / "proxy-login"
        kept.write_bytes(wrong.read_bytes())
        told = site("doctor")
        assert told.code == "network.proxy-login"
        assert "proxy-login" in told.error["hint"]
        assert "guessed-it" not in told.stderr + str(told.envelope)
