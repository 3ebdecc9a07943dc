"""The way to the aggregator, through a proxy where there is one, and what a failed call says."""

from __future__ import annotations

import os
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from channel_samples import ConnectProxy, tls_server
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from office_samples import Office
from serving_samples import listening
from site_samples import member_credentials

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import SERVER_NAME, Role
from consilium_common.identity.keys import new_tls_key, private_pem
from consilium_common.processes import free_port
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.methods import MEMBER_TRUST, OPERATOR_RUN, SITE_HELLO
from consilium_common.wire.proxy import (
    Proxy,
    check_setting,
    choose_proxy,
    read_login,
    without_proxies,
)
from consilium_common.wire.unavailable import own_trouble

AUTHORITY = Authority.create("tests")
SITE = member_credentials(AUTHORITY, Role.SITE, "north")


def failed_call(
    address: str, credentials: Credentials = SITE, proxy: Proxy | None = None
) -> ConsiliumError:
    """Call something at an address where it must fail."""
    with Caller(address, credentials, proxy) as caller, pytest.raises(ConsiliumError) as caught:
        caller.call(SITE_HELLO, {}, timeout=5)
    assert caught.value.hint
    return caught.value


# --- who answers ---------------------------------------------------------------------------------


def test_an_address_where_nothing_listens_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    error = failed_call(address)
    assert (error.code, error.where) == ("network.refused", address)


def test_a_host_that_has_no_address_is_named() -> None:
    # The name is reserved: no resolver may ever know it (RFC 6761).
    assert failed_call("nowhere.invalid:443").code == "network.unknown-host"


def test_an_address_that_swallows_everything_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(*_: object, **__: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silence)
    error = failed_call(f"127.0.0.1:{free_port()}")
    assert error.code == "network.unreachable"
    assert "firewall" in error.hint


def test_a_server_that_speaks_no_tls_is_named() -> None:
    with listening(lambda connection: connection.sendall(b"SSH-2.0-x\r\n")) as address:
        assert failed_call(address).code == "network.no-tls"


def test_an_aggregator_of_another_consortium_is_an_identity_error() -> None:
    other, key = Authority.create("elsewhere"), new_tls_key()
    with tls_server(key, other.issue(key.public_key(), Role.SERVER, "aggregator")) as address:
        error = failed_call(address)
    assert error.code == "identity.wrong-aggregator"
    assert "do not go on" in error.hint


def test_a_network_that_opens_tls_is_named_with_who_does_it() -> None:
    key = new_tls_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Inspector Ltd")])
    moment = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(moment - timedelta(days=1))
        .not_valid_after(moment + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .sign(key, hashes.SHA384())
    )
    with tls_server(key, certificate) as address:
        error = failed_call(address)
    assert error.code == "network.foreign-tls"
    assert "Inspector Ltd" in error.message
    assert "exempt" in error.hint


@pytest.mark.parametrize(
    ("lifetime", "said"), [(timedelta(seconds=-1), "expired"), (timedelta(days=1), None)]
)
def test_a_server_certificate_that_expired_by_our_clock_points_at_the_clock(
    lifetime: timedelta, said: str | None
) -> None:
    key = new_tls_key()
    server = AUTHORITY.issue(key.public_key(), Role.SERVER, "aggregator", lifetime=lifetime)
    with tls_server(key, server) as address:
        error = failed_call(address)
    if said is None:
        # The right aggregator, whose TLS ends at once: it is not the certificate's date.
        assert error.code in ("identity.refused", "network.interrupted")
        return
    assert error.code == "identity.aggregator-expired"
    assert said in error.message
    assert "clock" in error.hint


def test_a_certificate_that_is_refused_though_it_is_valid_was_revoked_or_replaced_there() -> None:
    key = new_tls_key()
    server = AUTHORITY.issue(key.public_key(), Role.SERVER, "aggregator")
    with tls_server(key, server, Authority.create("elsewhere").certificate) as address:
        error = failed_call(address)
    assert error.code == "identity.refused"
    assert "revoked or replaced there" in error.message


# --- our own certificate -------------------------------------------------------------------------


def with_certificate(pem: bytes, key: bytes = b"") -> Credentials:
    return Credentials(SITE.authority, pem, key or SITE.key)


def expired() -> Credentials:
    key = new_tls_key()
    certificate = AUTHORITY.issue(
        key.public_key(), Role.SITE, "north", lifetime=timedelta(seconds=-1)
    )
    return with_certificate(certificate_pem(certificate), private_pem(key))


def not_yet_valid() -> Credentials:
    moment = datetime.now(UTC) + timedelta(hours=2)
    return _forged(new_tls_key(), moment, moment + timedelta(days=1))


def weak() -> Credentials:
    return _forged(ec.generate_private_key(ec.SECP256R1()))


def server_usage() -> Credentials:
    return _forged(new_tls_key(), usage=x509.ExtendedKeyUsageOID.SERVER_AUTH)


def signer() -> Credentials:
    return member_credentials(AUTHORITY, Role.SERVER, "north")


def foreign() -> Credentials:
    stranger = member_credentials(Authority.create("elsewhere"), Role.SITE, "north")
    return with_certificate(stranger.certificate, stranger.key)


def other_key() -> Credentials:
    return with_certificate(SITE.certificate, private_pem(new_tls_key()))


def damaged() -> Credentials:
    return with_certificate(b"-----BEGIN", SITE.key)


def _forged(
    key: ec.EllipticCurvePrivateKey,
    begin: datetime | None = None,
    end: datetime | None = None,
    usage: x509.ObjectIdentifier = x509.ExtendedKeyUsageOID.CLIENT_AUTH,
) -> Credentials:
    """A certificate that the authority would not make, with its signature."""
    model = x509.load_pem_x509_certificate(SITE.certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(model.subject)
        .issuer_name(model.issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(begin or model.not_valid_before_utc)
        .not_valid_after(end or model.not_valid_after_utc)
    )
    for extension in model.extensions:
        if isinstance(extension.value, x509.ExtendedKeyUsage):
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), extension.critical)
        elif not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(AUTHORITY.key, hashes.SHA384())
    return with_certificate(certificate_pem(certificate), private_pem(key))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (expired, "identity.expired"),
        (not_yet_valid, "identity.not-yet-valid"),
        (weak, "identity.weak-key"),
        (server_usage, "identity.wrong-usage"),
        (signer, "identity.wrong-role"),
        (foreign, "identity.foreign"),
        (other_key, "identity.bad-key"),
        (damaged, "identity.bad-certificate"),
    ],
)
def test_our_own_certificate_is_looked_at_before_the_aggregator_is_blamed(
    make: object, code: str
) -> None:
    assert callable(make)
    trouble = own_trouble(make())
    assert trouble is not None
    assert trouble.code == code


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR, Role.AUDITOR, Role.INVITATION])
def test_a_certificate_that_is_right_has_no_trouble(role: Role) -> None:
    assert own_trouble(member_credentials(AUTHORITY, role, "north")) is None


def test_the_cause_is_said_over_a_real_port(tmp_path: Path) -> None:
    office = Office(tmp_path / "aggregator")
    key = new_tls_key()
    certificate = office.authority.issue(
        key.public_key(), Role.SITE, "north", lifetime=timedelta(seconds=-1)
    )
    mine = Credentials(
        office.issuer.trust.tls_pem(), certificate_pem(certificate), private_pem(key)
    )
    with office.open():
        assert failed_call(office.address, mine).code == "identity.expired"
        unknown = member_credentials(office.authority, Role.SITE, "nobody")
        error = failed_call(office.address, unknown)
    assert (error.code, "valid in itself" in error.message) == ("identity.refused", True)


def test_a_role_that_may_not_do_this_is_told_so_by_its_own_side(tmp_path: Path) -> None:
    office = Office(tmp_path / "aggregator")
    site = office.site(tmp_path / "site")
    with (
        office.open(),
        site.identity.caller() as caller,
        pytest.raises(ConsiliumError) as caught,
    ):
        caller.call(OPERATOR_RUN, {})
    assert caught.value.code == "identity.wrong-role"
    assert "operator" in caught.value.hint


# --- through a proxy -----------------------------------------------------------------------------


def proxy_of(url: str, login: str = "") -> Proxy:
    found = choose_proxy(url, "aggregator.example:443", login=login)
    assert found is not None
    return found


def test_mutual_tls_goes_through_a_proxy_that_sees_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the environment says of proxies must not matter where one was chosen.
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HTTPS_PROXY", "http://nowhere.invalid:1")
    office = Office(tmp_path / "aggregator")
    site = office.site(tmp_path / "site")
    way = ConnectProxy(office.address, authorization="Basic dXNlcjpwYTpzcyB3w7ZyZA==")
    # A name that nobody but the proxy can resolve.
    address = "aggregator.hidden.invalid:8443"
    with office.open(), way.serving() as url:
        proxy = proxy_of(url, "user:pa:ss wörd")
        with Caller(address, site.identity.credentials(), proxy) as caller:
            assert "authority_pem" in caller.call(MEMBER_TRUST, {})
            # The connection is cut, as when the site's address changes: the next call finds a way.
            way.cut()
            end = time.monotonic() + 10
            while True:
                try:
                    caller.call(MEMBER_TRUST, {}, timeout=5)
                    break
                except ConsiliumError as error:
                    assert error.code.startswith("network.")
                    assert time.monotonic() < end
    assert set(way.asked) == {f"CONNECT {address} HTTP/1.1"}
    assert len(way.asked) >= 2
    assert b"authority_pem" not in b"".join(way.passed)
    assert b"north-clinic" not in b"".join(way.passed)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "network.proxy-forbids"),
        (407, "network.proxy-login"),
        (502, "network.proxy-failed"),
        (503, "network.proxy-failed"),
    ],
)
def test_a_proxy_that_refuses_is_named(status: int, code: str) -> None:
    with ConnectProxy("127.0.0.1:1", status=status).serving() as url:
        error = failed_call("aggregator.example:443", proxy=proxy_of(url))
    assert error.code == code
    assert url.endswith(error.where)


def test_a_wrong_login_is_named_and_never_shown() -> None:
    with ConnectProxy("127.0.0.1:1", authorization="Basic eDp5").serving() as url:
        error = failed_call("aggregator.example:443", proxy=proxy_of(url, "user:geheim"))
    assert error.code == "network.proxy-login"
    assert "geheim" not in str(error)
    assert "geheim" not in repr(proxy_of(url, "user:geheim"))


def test_a_proxy_that_is_not_there_is_none_or_unknown_is_named() -> None:
    address = "aggregator.example:443"
    gone = proxy_of(f"http://127.0.0.1:{free_port()}")
    assert failed_call(address, proxy=gone).code == "network.proxy-refused"
    unknown = proxy_of("http://nowhere.invalid:3128")
    assert failed_call(address, proxy=unknown).code == "network.proxy-unknown-host"
    with listening(lambda connection: connection.sendall(b"SSH-2.0-x\r\n")) as other:
        assert failed_call(address, proxy=proxy_of(f"http://{other}")).code == (
            "network.proxy-failed"
        )


def test_who_answers_is_found_out_through_the_proxy_too() -> None:
    other, key = Authority.create("elsewhere"), new_tls_key()
    certificate = other.issue(key.public_key(), Role.SERVER, "aggregator")
    with tls_server(key, certificate) as address, ConnectProxy(address).serving() as url:
        error = failed_call("aggregator.example:443", proxy=proxy_of(url))
    assert error.code == "identity.wrong-aggregator"


# --- which proxy ---------------------------------------------------------------------------------


def test_none_is_straight_and_the_environment_is_asked_only_when_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    address = "aggregator.example:443"
    assert choose_proxy("environment", address) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://us%20er:p%40ss@proxy.example:3128/")
    assert choose_proxy("none", address) is None
    assert choose_proxy("environment", address) == Proxy("proxy.example", 3128, "us er:p@ss")
    assert choose_proxy("http://other.example:80", address) == Proxy("other.example", 80)
    monkeypatch.setenv("NO_PROXY", "localhost,.example")
    assert choose_proxy("environment", address) is None
    assert choose_proxy("environment", "elsewhere.org:443") is not None


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "proxy.example:3128",
        "https://proxy.example:3128",
        "socks5://proxy.example:1080",
        "http://proxy.example",
        "http://proxy.example:port",
        "http://proxy.example:3128/path",
        "http://user:geheim@proxy.example:3128",
        "http://user:geheim@",
    ],
)
def test_a_setting_that_is_no_proxy_or_holds_a_password_is_refused(setting: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        check_setting(setting)
    assert caught.value.code == "usage.proxy"
    assert caught.value.hint
    assert "geheim" not in str(caught.value)


def test_tls_to_the_proxy_is_refused_and_what_to_give_instead_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "https://me:geheim@proxy.example:3128"
    monkeypatch.setenv("https_proxy", url)
    monkeypatch.setenv("no_proxy", "localhost")
    for setting in (url, "environment"):
        with pytest.raises(ConsiliumError, match="TLS to the proxy itself") as caught:
            choose_proxy(setting, "a.example:443")
        assert "http://host:port" in caught.value.hint and "geheim" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_setting_or_one_clear_error(setting: str) -> None:
    try:
        assert check_setting(setting) == setting
    except ConsiliumError as error:
        assert error.code == "usage.proxy"


def test_a_login_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "proxy-login"
    assert read_login(file) == ""
    file.write_text("user:word\n")
    file.chmod(0o600)
    assert read_login(file) == "user:word"
    file.chmod(0o640)
    with pytest.raises(ConsiliumError) as caught:
        read_login(file)
    assert caught.value.code == "identity.key-exposed"
    file.chmod(0o600)
    for content in (b"nothing", b"a:b\nProxy-Evil: 1\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ConsiliumError) as caught:
            read_login(file)
        assert caught.value.code == "identity.bad-login"


def test_children_get_no_proxy_and_no_password_of_one() -> None:
    environment = {"HTTPS_PROXY": "http://u:p@x:1", "all_proxy": "x", "NO_PROXY": "y", "PATH": "z"}
    assert without_proxies(environment) == {"NO_PROXY": "y", "PATH": "z"}
