"""Certificates are renewed and authorities followed while calls are under way, and none fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from office_samples import NODE, Office
from site_samples import JoinedSite

from consilium_client.connection import Connection
from consilium_client.flower_private_fleet import node_headers
from consilium_client.greeting import Greeting, greeting, read_greeting
from consilium_client.identity import SiteIdentity
from consilium_client.renewal import Renewal, follow_trust, renew
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.trust import Trust
from consilium_common.wire.methods import (
    MEMBER_RENEW,
    MEMBER_TRUST,
    PROTOCOL,
    SITE_HELLO,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "aggregator")


async def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.02)


def serial(site: JoinedSite) -> int:
    return site.identity.current_certificate().serial_number


def hello(site: JoinedSite) -> bytes:
    return greeting("session", site.identity.trust.digest)


def test_calls_go_on_while_short_lived_certificates_replace_each_other(
    office: Office, tmp_path: Path
) -> None:
    office.issuer.lifetime = timedelta(seconds=5)
    site = office.site(tmp_path / "site")
    first = site.identity.current_certificate()
    said: list[str] = []

    async def traffic() -> int:
        connection = Connection(site.identity)
        renewal = Renewal(site.home, site.identity, said.append)
        renewing = asyncio.create_task(renewal.renew_for_ever())
        calls = 0
        try:
            while datetime.now(UTC) < first.not_valid_after_utc + timedelta(seconds=1):
                # An expired or replaced certificate would end this with an error.
                answer = read_greeting(await connection.unary(SITE_HELLO)(hello(site), timeout=10))
                renewal.heard(answer)
                calls += 1
                await asyncio.sleep(0.01)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await connection.close()
        return calls

    with office.open():
        calls = asyncio.run(traffic())
    assert calls > 10
    assert office.counts[MEMBER_RENEW] >= 2
    assert serial(site) != first.serial_number
    # The newest may not have been used yet.
    assert f"{serial(site):x}" in (office.member().serial, office.member().next_serial)
    assert said
    assert all("the certificate was renewed" in line for line in said)


def test_a_call_that_is_held_survives_the_replacement_of_its_certificate(
    office: Office, tmp_path: Path
) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    site = office.site(tmp_path / "site")
    body = PullMessagesRequest(node=Node(node_id=NODE)).SerializeToString()

    async def scenario() -> None:
        connection = Connection(site.identity)
        held = asyncio.ensure_future(
            connection.unary(fleet_method("PullMessages"))(
                body, metadata=node_headers(site.key), timeout=29
            )
        )
        await until(lambda: len(office.forwarded) == 1)
        await asyncio.to_thread(renew, site.home, site.identity)
        await connection.unary(SITE_HELLO)(hello(site), timeout=10)
        assert office.member().serial == f"{serial(site):x}"
        # Asked again whether it may go on, the old certificate may not: the call is repeated.
        office.kicks.kick([NODE])
        await until(lambda: len(office.forwarded) >= 2)
        assert not held.done()
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await connection.close()

    with office.open():
        asyncio.run(scenario())


def test_the_old_certificate_works_until_the_new_one_was_used(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    before = (site.home.identity / "site.pem").read_bytes()
    with office.open():
        renew(site.home, site.identity)
        after = (site.home.identity / "site.pem").read_bytes()
        # A crash before the new one was written: the old one is asked with, again.
        write_atomic(site.home.identity / "site.pem", before)
        renew(site.home, site.identity)
        assert (site.home.identity / "site.pem").read_bytes() not in (before, after)
        with site.identity.caller() as caller:
            caller.call(MEMBER_TRUST, {})
        write_atomic(site.home.identity / "site.pem", before)
        with pytest.raises(ConsiliumError) as caught, site.identity.caller() as caller:
            caller.call(MEMBER_TRUST, {})
    assert caught.value.code == "identity.refused"
    assert "revoked or replaced there" in caught.value.message


def test_a_caller_that_lives_long_uses_the_renewed_certificate(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    with office.open(), site.identity.caller() as caller:
        caller.call(MEMBER_TRUST, {})
        renew(site.home, site.identity)
        caller.call(MEMBER_TRUST, {})
        caller.call(MEMBER_TRUST, {})
    assert office.member().serial == f"{serial(site):x}"


def test_certificates_that_cannot_be_read_leave_the_connection_as_it_is(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    request = hello(site)

    async def scenario() -> None:
        connection = Connection(site.identity)
        await connection.unary(SITE_HELLO)(request, timeout=10)
        (site.home.identity / "authority.pem").write_bytes(b"damaged")
        await connection.unary(SITE_HELLO)(request, timeout=10)
        (site.home.identity / "site.pem").unlink()
        await connection.unary(SITE_HELLO)(request, timeout=10)
        await connection.close()

    with office.open():
        asyncio.run(scenario())


def test_certificates_for_another_key_are_not_taken(office: Office, tmp_path: Path) -> None:
    site = office.site(tmp_path / "site")
    before = (site.home.identity / "site.pem").read_bytes()
    wrong = office.issuer.certify(Authority.create("x").key.public_key(), Role.SITE, "north-clinic")
    office.issuer.certify = lambda key, role, name: wrong  # type: ignore[method-assign]
    with office.open(), pytest.raises(ConsiliumError) as caught:
        renew(site.home, site.identity)
    assert caught.value.code.startswith("identity.")
    assert (site.home.identity / "site.pem").read_bytes() == before


def run_renewal(
    site: JoinedSite, condition: Callable[[Renewal, list[str]], bool], **heard: Any
) -> list[str]:
    """Run a site's renewal until something has happened; return what it told the operator."""
    said: list[str] = []

    async def scenario() -> None:
        renewal = Renewal(site.home, site.identity, said.append)
        task = asyncio.create_task(renewal.renew_for_ever())
        if heard:
            renewal.heard(Greeting("1", [], **heard))
        try:
            await until(lambda: condition(renewal, said))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    return said


def test_a_certificate_that_is_not_due_is_left_and_one_that_is_asked_for_is_renewed_once(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    before = serial(site)
    trust = site.identity.trust.digest
    with office.open():
        assert run_renewal(site, lambda r, _: r._announced != "", trust=trust) == []
        assert serial(site) == before
        assert office.counts[MEMBER_RENEW] == 0
        said = run_renewal(site, lambda _, said: bool(said), trust=trust, renew=True)
    assert len(said) == 1
    assert serial(site) != before
    assert office.counts[MEMBER_RENEW] == 1


def test_a_renewal_that_fails_is_said_once_loudly_and_tried_again(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.issuer.lifetime = timedelta(seconds=20)
    site = office.site(tmp_path / "site")
    monkeypatch.setattr("consilium_client.renewal._LONGEST_PAUSE", timedelta(seconds=0.1))
    office.refuse_renewal = True
    with office.open():
        said = run_renewal(site, lambda *_: office.counts[MEMBER_RENEW] >= 3)
        assert len(said) == 1
        assert said[0].startswith("CERTIFICATE: it was not renewed")
        assert "shut out" in said[0]
        office.refuse_renewal = False
        assert "renewed" in run_renewal(site, lambda _, said: bool(said))[0]


def test_a_request_that_waits_for_the_offline_authority_leaves_the_certificate(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    before = serial(site)
    office.issuer.offline = True
    with office.open():
        assert renew(site.home, site.identity) is None
        trust = site.identity.trust.digest
        said = run_renewal(site, lambda _, said: bool(said), trust=trust, renew=True)
    assert "waits for the consortium's offline authority" in said[0]
    assert serial(site) == before


def test_an_expired_certificate_says_how_to_go_on(office: Office, tmp_path: Path) -> None:
    site = office.site(tmp_path / "site")
    office.issuer.lifetime = timedelta(seconds=-1)
    pem = office.issuer.certify(site.key.public_key(), Role.SITE, "north-clinic")
    write_atomic(site.home.identity / "site.pem", pem.encode())
    with pytest.raises(ConsiliumError) as caught:
        SiteIdentity.load(site.home)
    assert caught.value.code == "identity.expired"
    assert "--again" in caught.value.hint
    with office.open():
        said = run_renewal(site, lambda _, said: bool(said))
    assert "this site is shut out" in said[0]
    assert "--again" in said[0]


def test_a_new_authority_is_followed_and_the_certificate_is_renewed_under_it(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    office.issuer.rotate()
    office.publish_trust()
    new = office.issuer.authorities[0].certificate
    with office.open():
        said = run_renewal(site, lambda _, said: len(said) == 2, trust=office.issuer.trust.digest)
        assert "new authority" in said[0]
        assert site.identity.trust.authorities[0] == new
        assert site.identity.trust.in_force(site.identity.current_certificate())
        SiteIdentity.load(site.home)
        assert not follow_trust(site.home, site.identity)


def test_an_authority_that_nobody_trusted_vouches_for_is_refused(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    before = (site.home.identity / "authority.pem").read_bytes()
    stranger = office.authority.successor()  # same consortium by name, and nobody's word for it
    office.issuer.authorities.insert(0, stranger)
    office.issuer.cross_pem = certificate_pem(
        Authority.create("elsewhere").cross_certify(stranger)
    ).decode()
    with office.open(), pytest.raises(ConsiliumError) as caught:
        follow_trust(site.home, site.identity)
    assert caught.value.code == "identity.untrusted-authority"
    assert (site.home.identity / "authority.pem").read_bytes() == before
    # A running site says that it is about the authority: its own certificate is as good as before.
    with office.open():
        said = run_renewal(site, lambda _, said: bool(said), trust="another digest")
    assert said[0].startswith("AUTHORITY: ")
    assert "identity.untrusted-authority" in said[0] or "vouches" in said[0]
    assert "not renewed" not in said[0] and "shut out" not in said[0]
    assert "fingerprint words" in said[0]  # what to do
    assert (site.home.identity / "authority.pem").read_bytes() == before


def test_authorities_of_another_consortium_are_not_followed(office: Office, tmp_path: Path) -> None:
    site = office.site(tmp_path / "site")
    foreign = Trust.of(Authority.create("elsewhere").certificate).pem()
    with pytest.raises(ConsiliumError) as caught:
        site.identity.trust.follow(foreign, None)
    assert caught.value.code == "identity.foreign"
    assert "number you know" in caught.value.hint


# --- greetings -----------------------------------------------------------------------------------


def test_a_release_that_does_not_fit_names_both_and_who_must_update() -> None:
    answer = {"version": "9.9", "protocol": PROTOCOL + 1, "running": []}
    with pytest.raises(ConsiliumError) as caught:
        read_greeting(canonical_json(answer))
    assert caught.value.code == "network.version"
    assert "9.9" in caught.value.message
    assert "Update this side" in caught.value.hint
    del answer["protocol"]
    with pytest.raises(ConsiliumError) as caught:
        read_greeting(canonical_json(answer))
    assert "Update the aggregator" in caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 5000, b"{}", b'{"protocol": 1, "version": "1", "running": 3}']
)
def test_an_answer_of_another_form_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(ConsiliumError) as caught:
        read_greeting(content)
    assert caught.value.code in ("network.bad-answer", "network.version")


def test_clocks_that_differ_are_said_once(office: Office, tmp_path: Path) -> None:
    site = office.site(tmp_path / "site")
    said: list[str] = []

    async def scenario() -> None:
        renewal = Renewal(site.home, site.identity, said.append)
        off = datetime.now(UTC) - timedelta(minutes=10)
        for moment in (off, off, datetime.now(UTC)):
            renewal.heard(Greeting("1", [], time=moment))

    asyncio.run(scenario())
    assert len(said) == 1
    assert "10 minutes ahead of the aggregator's" in said[0]


def test_a_refused_call_is_not_repeated_on_the_same_certificate(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    with office.registry.transaction() as session:
        from consilium_server.tables import Member

        session.get_one(Member, "north-clinic").status = "revoked"

    async def scenario() -> ConsiliumError:
        connection = Connection(site.identity)
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connection.unary(SITE_HELLO)(hello(site), timeout=10)
            return await connection.explain(caught.value)
        finally:
            await connection.close()

    with office.open():
        error = asyncio.run(scenario())
    assert error.code == "identity.refused"
    assert "revoked or replaced there" in error.message
