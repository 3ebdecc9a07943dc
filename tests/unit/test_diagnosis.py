"""A diagnosis stops at the first cause; each cause is produced for real, and named."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import time
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from diagnosis_samples import (
    answers_tls,
    cause_of,
    connect_proxy,
    diagnosed,
    inspecting_certificate,
    listening,
    shifted,
    target_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.diagnosis import machine
from consilium_common.diagnosis.machine import check_disk, check_gpu, check_memory, check_secrets
from consilium_common.diagnosis.page import line_of
from consilium_common.diagnosis.reaching import look_up, try_proxy, try_tcp
from consilium_common.diagnosis.standing import check_clock, check_standing, expiring
from consilium_common.diagnosis.steps import Check, Diagnosis, DiagnosisError, Found, Outcome
from consilium_common.diagnosis.target import parse_address
from consilium_common.diagnosis.tls import try_tls
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import new_tls_key
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.processes import free_port
from consilium_common.wire.proxy import Proxy

AUTHORITY = Authority.create("tests")
TRUST = Trust.of(AUTHORITY.certificate)


def code_of(look: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConsiliumError) as caught:
        look(*arguments, **named)
    assert caught.value.message and caught.value.hint, "what happened, and what to do"
    return caught.value.code


# --- the order ---------------------------------------------------------------------------------


def fails() -> Found:
    raise ConsiliumError("network.unreachable", "no answer", where="here", hint="do this")


LOOKS = {
    "ok": lambda: Found("fine"),
    "warning": lambda: Found.warning("odd", "look"),
    "skipped": lambda: Found.skipped("nothing to do"),
    "failed": fails,
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(LOOKS)), max_size=8))
def test_all_before_the_first_failure_is_tried_and_nothing_after_it(kinds: list[str]) -> None:
    taken: list[int] = []

    def check(number: int, kind: str) -> Check:
        def look() -> Found:
            taken.append(number)
            return LOOKS[kind]()

        return Check(str(number), "tried", look)

    found = diagnosed(check(*one) for one in enumerate(kinds))
    first = kinds.index("failed") if "failed" in kinds else len(kinds)
    assert taken == list(range(min(first + 1, len(kinds))))
    assert [str(step.outcome) for step in found.steps[: first + 1]] == kinds[: first + 1]
    assert all(step.outcome is Outcome.SKIPPED for step in found.steps[first + 1 :])
    assert (found.cause is None) == ("failed" not in kinds)


def test_the_error_of_a_diagnosis_carries_its_cause_and_every_step() -> None:
    checks = (Check("a", "tried a", LOOKS["ok"]), Check("b", "tried b", fails))
    found: Diagnosis = diagnosed(iter((*checks, Check("c", "tried c", LOOKS["ok"]))))
    assert found.cause is not None and found.cause.error is not None
    error = DiagnosisError(found.cause.error, found)
    told = error.to_dict()
    assert (error.exit_status, told["code"], told["where"]) == (7, "network.unreachable", "here")
    assert [(step["name"], step["outcome"]) for step in told["steps"]] == [
        ("a", "ok"),
        ("b", "failed"),
        ("c", "skipped"),
    ]
    assert told["steps"][1]["tried"] == "tried b" and told["steps"][1]["todo"] == "do this"


def test_a_line_says_what_happened_what_was_tried_and_what_to_do() -> None:
    found = diagnosed(iter((Check("disk", "looked for room", LOOKS["warning"]),)))
    assert line_of(found.steps[0]).plain == "! disk: odd (looked for room)\n    to do: look"


# --- the network -------------------------------------------------------------------------------


def test_a_name_that_nobody_knows_is_the_cause() -> None:
    # The name is reserved: no resolver may ever know it (RFC 6761). Without any resolver: no DNS.
    code = code_of(look_up, target_of("nowhere.invalid:443", AUTHORITY))
    assert code in ("network.unknown-host", "network.no-dns")
    assert "no name" in look_up(target_of("127.0.0.1:443", AUTHORITY)).happened
    assert "127.0.0.1" in look_up(target_of("localhost:443", AUTHORITY)).happened


def test_a_closed_port_is_the_cause_and_an_open_one_is_timed() -> None:
    closed = target_of(f"127.0.0.1:{free_port()}", AUTHORITY)
    assert code_of(try_tcp, closed) == "network.refused"
    with listening(lambda _: None) as address:
        found = try_tcp(target_of(address, AUTHORITY))
    assert found.outcome is Outcome.OK and found.facts["milliseconds"]["127.0.0.1"] < 5000


def test_a_proxy_in_the_environment_that_is_not_used_is_named_where_the_way_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://user:hush@proxy.example.org:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ConsiliumError) as caught:
        try_tcp(target_of(f"127.0.0.1:{free_port()}", AUTHORITY))
    assert "proxy.example.org:3128" in caught.value.hint and "hush" not in caught.value.hint
    said = try_proxy(target_of("127.0.0.1:1", AUTHORITY)).happened
    assert "proxy.example.org:3128" in said and "hush" not in said


def test_an_address_that_is_none_is_named() -> None:
    for wrong in ("host", "host:", ":8443", "host:99999", "host:0", "host:8443x"):
        assert code_of(parse_address, wrong) == "state.bad-config"
    assert parse_address("[2001:db8::7]:8443") == ("2001:db8::7", 8443)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("407 who are you", "network.proxy-login"),
        ("403 no", "network.proxy-forbids"),
        ("502 bad", "network.proxy-failed"),
    ],
)
def test_a_proxy_that_does_not_let_us_through_is_the_cause(status: str, code: str) -> None:
    with connect_proxy(status) as (address, _):
        host, _, port = address.rpartition(":")
        target = target_of("127.0.0.1:1", AUTHORITY, proxy=Proxy(host, int(port)))
        assert try_tcp(target).outcome is Outcome.OK  # the proxy's own port is open
        assert code_of(try_proxy, target) == code


def server_of(authority: Authority, lifetime: timedelta = timedelta(days=1)) -> tuple[Any, Any]:
    key = new_tls_key()
    return authority.issue(key.public_key(), Role.SERVER, "aggregator", lifetime=lifetime), key


def test_tls_with_the_aggregator_shows_its_words_also_through_a_proxy(tmp_path: Path) -> None:
    certificate, key = server_of(AUTHORITY)
    with (
        listening(answers_tls(tmp_path, certificate, key)) as address,
        connect_proxy() as (proxy, heads),
    ):
        host, _, port = proxy.rpartition(":")
        found = try_tls(target_of(address, AUTHORITY, proxy=Proxy(host, int(port), "me:hush")))
        assert heads and heads[0].startswith(f"CONNECT {address} ")
    assert found.facts["version"] == "TLS 1.3"
    assert found.facts["words"] == fingerprint_words(certificate) in found.happened


def test_an_aggregator_of_another_consortium_is_the_cause(tmp_path: Path) -> None:
    with listening(answers_tls(tmp_path, *server_of(Authority.create("other")))) as address:
        assert code_of(try_tls, target_of(address, AUTHORITY)) == "identity.wrong-aggregator"


def test_a_network_that_opens_tls_is_the_cause_and_who_does_it_is_named(tmp_path: Path) -> None:
    key = new_tls_key()
    certificate = inspecting_certificate(key, "Hospital Inspection Ltd")
    with (
        listening(answers_tls(tmp_path, certificate, key)) as address,
        pytest.raises(ConsiliumError) as caught,
    ):
        try_tls(target_of(address, AUTHORITY))
    assert caught.value.code == "network.foreign-tls"
    assert "Hospital Inspection Ltd" in caught.value.message
    assert "exempt" in caught.value.hint


def test_an_expired_aggregator_is_the_cause(tmp_path: Path) -> None:
    with listening(answers_tls(tmp_path, *server_of(AUTHORITY, -timedelta(minutes=5)))) as address:
        assert code_of(try_tls, target_of(address, AUTHORITY)) == "identity.aggregator-expired"


def test_what_speaks_no_tls_old_tls_no_http2_or_hangs_up_is_the_cause(tmp_path: Path) -> None:
    certificate, key = server_of(AUTHORITY)
    inspecting = inspecting_certificate(key, "An old device")
    old = answers_tls(tmp_path, inspecting, key, newest=ssl.TLSVersion.TLSv1_2)
    plain = answers_tls(tmp_path, certificate, key, http2=False)

    def hangs_up(connection: socket.socket) -> None:
        connection.recv(1)

    for answer, code in (
        (lambda connection: connection.sendall(b"SSH-2.0-x\r\n" * 9), "network.no-tls"),
        (old, "network.foreign-tls"),
        (plain, "network.no-http2"),
        (hangs_up, "network.cut"),
    ):
        with listening(answer) as address:
            assert code_of(try_tls, target_of(address, AUTHORITY)) == code


# --- clock and certificates --------------------------------------------------------------------


def test_a_clock_behind_a_certificate_or_a_file_is_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site.json"
    good, _ = server_of(AUTHORITY)
    assert check_clock([("The", good)], [file]).outcome is Outcome.OK
    with monkeypatch.context() as patch:
        shifted(patch, timedelta(hours=3))
        early, _ = server_of(AUTHORITY)
    assert code_of(check_clock, [("The server's", early)], []) == "network.clock"
    file.touch()
    os.utime(file, (time.time() + 7200,) * 2)
    assert code_of(check_clock, [("The", good)], [file]) == "network.clock"


def test_a_certificate_of_another_role_name_time_or_consortium_is_the_cause() -> None:
    key = new_tls_key().public_key()

    def judge(certificate: Any, trust: Trust = TRUST) -> Found:
        return check_standing(certificate, trust, Role.SITE, "north", by_itself=True)

    good = AUTHORITY.issue(key, Role.SITE, "north")
    assert fingerprint_words(good) in judge(good).happened
    soon = judge(AUTHORITY.issue(key, Role.SITE, "north", lifetime=timedelta(minutes=4)))
    assert soon.outcome is Outcome.WARNING and "site start" in soon.todo
    for certificate, code in (
        (AUTHORITY.issue(key, Role.OPERATOR, "north"), "identity.wrong-role"),
        (AUTHORITY.issue(key, Role.SITE, "south"), "identity.wrong-name"),
        (Authority.create("x").issue(key, Role.SITE, "north"), "identity.foreign"),
        (
            AUTHORITY.issue(key, Role.SITE, "north", lifetime=-timedelta(minutes=1)),
            "identity.expired",
        ),
    ):
        assert code_of(judge, certificate) == code


def test_members_whose_certificates_end_are_named() -> None:
    key = new_tls_key().public_key()

    def member(name: str, lifetime: timedelta) -> tuple[str, Any]:
        return name, AUTHORITY.issue(key, Role.SITE, name, lifetime=lifetime)

    fresh, due, gone = (
        member("fresh", timedelta(days=300)),
        member("due", timedelta(minutes=3)),
        member("gone", -timedelta(minutes=3)),
    )
    assert expiring([fresh]).outcome is Outcome.OK
    found = expiring([fresh, due, gone])
    assert found.outcome is Outcome.WARNING
    assert (found.facts["expired"], found.facts["due"]) == (["gone"], ["due"])


# --- the machine -------------------------------------------------------------------------------


def test_a_secret_that_others_can_read_is_the_cause(tmp_path: Path) -> None:
    secret = tmp_path / "site-key.pem"
    check_secrets([secret])  # none yet
    secret.write_text("secret")
    secret.chmod(0o600)
    check_secrets([secret])
    secret.chmod(0o640)
    assert code_of(check_secrets, [secret]) == "identity.key-exposed"


def test_a_full_disk_is_the_cause_and_a_nearly_full_one_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    for free, expected in ((5 * 10**9, Outcome.OK), (10**9, Outcome.WARNING)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**10, 0, free))
        assert check_disk(tmp_path).outcome is expected
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 10**6))
    assert code_of(check_disk, tmp_path) == "state.disk"


def test_memory_is_that_of_the_container_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{3 * 10**9}\n")
    used.write_text(f"{2 * 10**9}\n")
    monkeypatch.setattr(machine, "_CGROUPS", ((limit, used),))
    found = check_memory()
    assert found.outcome is Outcome.WARNING and found.facts["total"] == 3 * 10**9
    assert found.facts["free"] <= 10**9
    limit.write_text("max\n")
    assert check_memory().facts["total"] > 0


def test_a_site_that_computes_on_the_cpu_needs_no_gpu() -> None:
    assert check_gpu("cpu").outcome is Outcome.OK


def test_a_gpu_that_is_asked_for_and_not_there_is_the_cause_and_otherwise_a_warning() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert code_of(check_gpu, "cuda") == "state.device"
    found = check_gpu("auto")
    assert found.outcome is Outcome.WARNING and "slower" in found.todo


def test_the_product_that_a_gpu_must_get_right_is_right_here() -> None:
    import torch

    assert 0 < machine._product_error(torch, "cpu") < 1e-5


def test_a_gpu_that_does_not_compute_or_computes_wrongly_is_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU is there by all signs; what comes of a product on it is another thing."""
    import torch

    gib = 2**30
    for name, said in (
        ("is_available", True),
        ("device_count", 1),
        ("mem_get_info", (8 * gib, 16 * gib)),
        ("get_device_capability", (9, 0)),
        ("get_device_name", "a GPU"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, said=said: said)

    def on_it(moved: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _: moved(tensor))

    def raising(error: Exception) -> Callable[[Any], Any]:
        def moved(_: Any) -> Any:
            raise error

        return moved

    no_kernel = RuntimeError("CUDA error: no kernel image is available\nCompile with …")
    for moved, said, todo in (
        (raising(no_kernel), "fails: CUDA error: no kernel image is available.", "nvidia-smi"),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), "out of memory", "hold its memory"),
        (lambda tensor: tensor * 1.01, "computes wrongly: a matrix product is off by", "ECC"),
        (lambda tensor: tensor * float("nan"), "off by nan", "Do not train"),
    ):
        on_it(moved)
        with pytest.raises(ConsiliumError) as caught:
            check_gpu("auto")
        assert caught.value.code == "state.gpu"
        assert said in caught.value.message and todo in caught.value.hint
    on_it(lambda tensor: tensor)
    found = check_gpu("auto")
    assert found.outcome is Outcome.OK and "a matrix product is right" in found.happened
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gib, 16 * gib))
    assert check_gpu("cuda:0").outcome is Outcome.WARNING
    assert code_of(check_gpu, "cuda:1") == "state.device"


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does() -> None:
    found = check_gpu("auto")
    assert found.facts["relative_error"] < 1e-3 and found.facts["driver"]
    assert found.facts["total"] >= found.facts["free"] > 0
    assert code_of(check_gpu, "cuda:99") == "state.device"


def test_the_cause_of_a_closed_port_is_named_once() -> None:
    target = target_of(f"127.0.0.1:{free_port()}", AUTHORITY)
    checks = (
        Check("DNS", "looked up", lambda: look_up(target)),
        Check("TCP", "connected", lambda: try_tcp(target)),
        Check("TLS", "shook hands", lambda: try_tls(target)),
    )
    assert cause_of(iter(checks)) == ("TCP", "network.refused")
