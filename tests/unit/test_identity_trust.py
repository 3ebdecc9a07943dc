"""Who is trusted for what: usage, weak keys, the clock, rotations, and what TLS makes of it."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from issuing_samples import KEY, SIGNING, code_of

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import (
    Authority,
    EnrolmentKey,
    certificate_pem,
    load_request,
    signing_request,
)
from consilium_common.identity.certificates import (
    CERTIFYING_ROLES,
    SERVER_NAME,
    SIGNING_ROLES,
    Role,
    check_issued,
    due_for_renewal,
    urn,
)
from consilium_common.identity.keys import (
    is_locked,
    load_tls_key,
    new_signing_key,
    new_tls_key,
    private_pem,
    save_private,
)
from consilium_common.identity.passphrase import new_passphrase, read_passphrase
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words

FIRST = Authority.create("tests")
SECOND = FIRST.successor()
ELSEWHERE = Authority.create("tests")
HOLDERS = sorted(set(Role) - CERTIFYING_ROLES)
OVERLAP = Trust.of(SECOND.certificate, FIRST.certificate)


def issued(authority: Authority, role: Role, **options: Any) -> x509.Certificate:
    """Return a certificate of the right kind of key for a role."""
    key = SIGNING if role in SIGNING_ROLES else KEY
    return authority.issue(key.public_key(), role, "north", **options)


def forged(
    role: Role,
    *,
    key: Any = KEY,
    usage: tuple[bool, bool] = (True, False),
    extended: list[Any] | None = None,
    ca: bool = False,
) -> x509.Certificate:
    """Return a certificate that the authority's key really signed, with another content."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")]))
        .issuer_name(FIRST.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(urn(FIRST.consortium, role, "north"))]
            ),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(usage[0], False, False, False, False, usage[1], False, False, False),
            critical=True,
        )
    )
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=True)
    return builder.sign(FIRST.key, hashes.SHA384())


# --- one reason each ---------------------------------------------------------------------------

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize(
    "wrong",
    [
        forged(Role.SITE, extended=[SERVER]),
        forged(Role.SITE, extended=[CLIENT, SERVER]),
        forged(Role.SITE),
        forged(Role.SITE, extended=[CLIENT], usage=(False, False)),
        forged(Role.SITE, extended=[CLIENT], usage=(True, True)),
        forged(Role.SITE, extended=[CLIENT], ca=True),
        forged(Role.SERVER, extended=[CLIENT]),
        forged(Role.SIGNER, key=SIGNING, extended=[CLIENT]),
        forged(Role.AUTHORITY),
        forged(Role.ENROLMENT, extended=[CLIENT]),
    ],
)
def test_a_certificate_for_another_use_is_refused_as_such(wrong: x509.Certificate) -> None:
    assert code_of(check_issued, wrong, FIRST.certificate) == "identity.wrong-usage"


def test_the_same_content_with_the_right_use_is_taken() -> None:
    check_issued(forged(Role.SITE, extended=[CLIENT]), FIRST.certificate)
    check_issued(forged(Role.SIGNER, key=SIGNING), FIRST.certificate)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(65537, 2048),
        new_signing_key(),  # strong, and of no use for TLS here
    ],
)
def test_a_weak_key_is_refused_as_such(key: Any) -> None:
    weak = forged(Role.SITE, key=key, extended=[CLIENT])
    assert code_of(check_issued, weak, FIRST.certificate) == "identity.weak-key"


@settings(max_examples=30, deadline=None)
@given(role=st.sampled_from(HOLDERS), seconds=st.integers(-4000, 4000))
def test_every_role_holds_from_its_first_to_its_last_second(role: Role, seconds: int) -> None:
    certificate = issued(FIRST, role, lifetime=timedelta(minutes=30))
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    moment = begin + timedelta(seconds=seconds)
    if moment < begin:
        expected = "identity.not-yet-valid"
    elif moment > end:
        expected = "identity.expired"
    else:
        assert check_issued(certificate, FIRST.certificate, now=moment).role is role
        return
    assert code_of(check_issued, certificate, FIRST.certificate, now=moment) == expected


def test_with_a_clock_set_back_the_clock_is_blamed_and_both_times_are_named() -> None:
    certificate = issued(FIRST, Role.SITE)
    moment = certificate.not_valid_before_utc - timedelta(minutes=40)
    with pytest.raises(ConsiliumError) as caught:
        check_issued(certificate, FIRST.certificate, now=moment)
    assert caught.value.code == "identity.not-yet-valid"
    assert "clock is probably behind" in caught.value.message
    for time in (moment, certificate.not_valid_before_utc):
        assert f"{time:%Y-%m-%d %H:%M:%S} UTC" in caught.value.message


def test_no_certificate_outlives_its_authority_and_its_end_has_its_own_reason() -> None:
    certificate = issued(FIRST, Role.SITE, lifetime=timedelta(days=99_999))
    end = FIRST.certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc == end
    late = end + timedelta(seconds=1)
    assert code_of(check_issued, certificate, FIRST.certificate, now=late) == (
        "identity.authority-expired"
    )


@pytest.mark.parametrize(("days", "due"), [(397, 30), (90, 30), (30, 10), (1, 1 / 3)])
def test_renewal_is_due_30_days_or_a_third_of_its_life_before_the_end(
    days: float, due: float
) -> None:
    certificate = issued(FIRST, Role.SITE, lifetime=timedelta(days=days))
    moment = certificate.not_valid_after_utc - timedelta(days=due)
    # A life begins ten minutes in the past: a third of that is the edge's width.
    assert not due_for_renewal(certificate, now=moment - timedelta(minutes=5))
    assert due_for_renewal(certificate, now=moment + timedelta(minutes=1))


# --- several authorities -----------------------------------------------------------------------


@pytest.mark.parametrize("role", HOLDERS)
def test_during_a_rotation_both_authorities_count_and_a_stranger_does_not(role: Role) -> None:
    for authority in (FIRST, SECOND):
        certified = OVERLAP.check(issued(authority, role))
        assert (certified.role, certified.consortium) == (role, FIRST.consortium)
    assert code_of(OVERLAP.check, issued(ELSEWHERE, role)) == "identity.foreign"
    assert OVERLAP.in_force(issued(SECOND, role))
    assert not OVERLAP.in_force(issued(FIRST, role))


def test_the_consortium_keeps_its_identifier_over_any_number_of_authorities() -> None:
    third = SECOND.successor()
    assert third.consortium == SECOND.consortium == FIRST.consortium != ELSEWHERE.consortium
    subjects = {a.certificate.subject for a in (FIRST, SECOND, third)}
    assert len(subjects) == 3
    trust = Trust.of(third.certificate, SECOND.certificate, FIRST.certificate)
    assert Trust.load(trust.pem()) == trust


@pytest.mark.parametrize("role", HOLDERS)
def test_a_replaced_authority_proves_old_signatures_and_nothing_else(role: Role) -> None:
    old = issued(FIRST, role)
    trust = Trust.of(SECOND.certificate, SECOND.retire(FIRST.certificate))
    moment = old.not_valid_before_utc
    if role in SIGNING_ROLES:
        assert trust.check(old, now=moment).role is role
    else:
        assert code_of(trust.check, old, now=moment) == "identity.authority-retired"


def test_a_replaced_authority_certifies_nothing_new() -> None:
    ended = datetime.now(UTC) - timedelta(hours=1)
    trust = Trust.of(SECOND.certificate, SECOND.retire(FIRST.certificate, ended=ended))
    assert code_of(trust.check, issued(FIRST, Role.SIGNER)) == "identity.authority-retired"


def test_a_bundle_holds_authorities_of_one_consortium_and_nothing_else() -> None:
    assert code_of(Trust.of) == "identity.bad-certificate"
    assert code_of(Trust.load, b"nonsense") == "identity.bad-certificate"
    assert code_of(Trust.of, FIRST.certificate, ELSEWHERE.certificate) == "identity.foreign"
    assert code_of(Trust.of, issued(FIRST, Role.SITE)) == "identity.bad-certificate"
    foreign = ELSEWHERE.retire(FIRST.certificate)
    assert code_of(Trust.of, SECOND.certificate, foreign) == "identity.foreign"
    # The old one's word for a new one is no authority by itself.
    cross = FIRST.cross_certify(SECOND)
    assert code_of(Trust.of, cross) == "identity.bad-certificate"


def test_a_new_authority_is_followed_only_on_the_word_of_one_that_is_trusted() -> None:
    trust, cross = Trust.of(FIRST.certificate), certificate_pem(FIRST.cross_certify(SECOND))
    assert trust.follow(OVERLAP.pem(), cross) == OVERLAP
    assert OVERLAP.follow(Trust.of(SECOND.certificate).pem(), None) == Trust.of(SECOND.certificate)
    for word in (
        None,
        certificate_pem(SECOND.cross_certify(SECOND)),
        certificate_pem(ELSEWHERE.cross_certify(SECOND)),
        certificate_pem(FIRST.retire(SECOND.certificate)),
        certificate_pem(FIRST.issue_enrolment(SECOND.key.public_key())),
    ):
        assert code_of(trust.follow, OVERLAP.pem(), word) == "identity.untrusted-authority"
    other = Trust.of(ELSEWHERE.certificate)
    assert code_of(trust.follow, other.pem(), cross) == "identity.foreign"


def test_rotations_that_were_missed_are_followed_one_after_the_other() -> None:
    third = SECOND.successor()
    words = certificate_pem(SECOND.cross_certify(third)) + certificate_pem(
        FIRST.cross_certify(SECOND)
    )
    newest = Trust.of(third.certificate)
    assert Trust.of(FIRST.certificate).follow(newest.pem(), words) == newest


# --- the enrolment key -------------------------------------------------------------------------

ENROLMENT = EnrolmentKey(KEY, FIRST.issue_enrolment(KEY.public_key()))


@pytest.mark.parametrize("role", HOLDERS)
def test_the_enrolment_key_certifies_invitations_and_nothing_else(role: Role) -> None:
    trust = Trust.of(FIRST.certificate).with_enrolment(ENROLMENT.certificate)
    certificate = issued(Authority(ENROLMENT.key, ENROLMENT.certificate), role)
    if role is Role.INVITATION:
        assert trust.check(certificate).role is role
        assert code_of(Trust.of(FIRST.certificate).check, certificate) == "identity.foreign"
    else:
        assert code_of(trust.check, certificate) == "identity.wrong-usage"


def test_an_enrolment_key_must_be_the_authoritys() -> None:
    foreign = ELSEWHERE.issue_enrolment(KEY.public_key())
    assert code_of(Trust.of(FIRST.certificate).with_enrolment, foreign) == "identity.foreign"
    site = issued(FIRST, Role.SITE)
    assert code_of(Trust.of(FIRST.certificate).with_enrolment, site) == "identity.bad-certificate"


# --- what TLS makes of it ----------------------------------------------------------------------


def handshake(
    folder: Path, *, server: bytes, client: bytes, roots: bytes, server_roots: bytes | None = None
) -> None:
    """Shake hands in memory as site and aggregator do; the key of both is KEY."""
    key = folder / "key.pem"
    key.write_bytes(private_pem(KEY))
    contexts = []
    for chain, side, trusted in (
        (server, ssl.PROTOCOL_TLS_SERVER, server_roots or roots),
        (client, ssl.PROTOCOL_TLS_CLIENT, roots),
    ):
        (folder / "chain.pem").write_bytes(chain)
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / "chain.pem", key)
        context.load_verify_locations(cadata=trusted.decode())
        contexts.append(context)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[1].wrap_bio(back, there, server_hostname=SERVER_NAME),
        contexts[0].wrap_bio(there, back, server_side=True),
    ]
    done: set[int] = set()
    for _ in range(10):
        for index, end in enumerate(ends):
            try:
                end.do_handshake()
                done.add(index)
            except ssl.SSLWantReadError:
                continue
    assert done == {0, 1}


def chain_of(*certificates: x509.Certificate) -> bytes:
    """Return certificates as one PEM."""
    return b"".join(certificate_pem(one) for one in certificates)


def test_tls_takes_an_invitation_of_the_enrolment_key_and_no_server_of_it(tmp_path: Path) -> None:
    server = chain_of(issued(FIRST, Role.SERVER))
    invitation = ENROLMENT.issue(KEY.public_key(), "north", lifetime=timedelta(hours=1))
    roots = Trust.of(FIRST.certificate).tls_pem()
    handshake(
        tmp_path, server=server, client=chain_of(invitation, ENROLMENT.certificate), roots=roots
    )
    rogue = issued(Authority(ENROLMENT.key, ENROLMENT.certificate), Role.SERVER)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        handshake(
            tmp_path,
            server=chain_of(rogue, ENROLMENT.certificate),
            client=chain_of(issued(FIRST, Role.SITE)),
            roots=roots,
        )


def test_grpc_takes_an_invitation_of_the_enrolment_key_and_no_server_of_it() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from consilium_common.wire.channel import CHANNEL_OPTIONS
    from consilium_common.wire.tls13 import grpc

    key, roots = private_pem(KEY), Trust.of(FIRST.certificate).tls_pem()
    invitation = ENROLMENT.issue(KEY.public_key(), "north", lifetime=timedelta(hours=1))
    rogue = issued(Authority(ENROLMENT.key, ENROLMENT.certificate), Role.SERVER)
    for chain, expected in (
        (chain_of(issued(FIRST, Role.SERVER)), grpc.StatusCode.UNIMPLEMENTED),  # it got through
        (chain_of(rogue, ENROLMENT.certificate), grpc.StatusCode.UNAVAILABLE),
    ):
        server = grpc.server(ThreadPoolExecutor(1))
        port = server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)], roots, True)
        )
        server.start()
        mine = chain_of(invitation, ENROLMENT.certificate)
        with grpc.secure_channel(
            f"127.0.0.1:{port}",
            grpc.ssl_channel_credentials(roots, key, mine),
            options=CHANNEL_OPTIONS,
        ) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/x/y")(b"", timeout=10)
            assert caught.value.code() is expected
        server.stop(None)


def test_tls_follows_a_rotation_and_ends_with_it(tmp_path: Path) -> None:
    old_server, new_server = (chain_of(issued(a, Role.SERVER)) for a in (FIRST, SECOND))
    old_site, new_site = (chain_of(issued(a, Role.SITE)) for a in (FIRST, SECOND))
    for server in (old_server, new_server):
        for site in (old_site, new_site):
            handshake(tmp_path, server=server, client=site, roots=OVERLAP.tls_pem())
    # Whoever has not heard of the new authority yet still gets in during the overlap.
    handshake(
        tmp_path,
        server=old_server,
        client=old_site,
        roots=chain_of(FIRST.certificate),
        server_roots=OVERLAP.tls_pem(),
    )
    over = Trust.of(SECOND.certificate, SECOND.retire(FIRST.certificate))
    for roots in (over.tls_pem(), over.pem()):  # even if the former one were among the roots
        handshake(tmp_path, server=new_server, client=new_site, roots=roots)
        with pytest.raises(ssl.SSLError):
            handshake(tmp_path, server=new_server, client=old_site, roots=roots)


# --- words and passphrases ---------------------------------------------------------------------


def test_a_key_has_the_same_six_words_wherever_it_stands_and_no_other_key_has_them() -> None:
    words = fingerprint_words(KEY.public_key())
    assert len(words.split()) == 6
    assert words == fingerprint_words(issued(FIRST, Role.SITE))
    assert words != fingerprint_words(new_tls_key().public_key())
    assert words != fingerprint_words(SIGNING.public_key())


def test_the_words_are_the_first_66_bits_of_the_fingerprint() -> None:
    from mnemonic import Mnemonic

    from consilium_common.identity.keys import public_fingerprint

    request = load_request(signing_request(KEY, "north")).public_key()
    bits = bin(int("1" + public_fingerprint(KEY.public_key()), 16))[3:]
    listed = Mnemonic("english").wordlist
    assert isinstance(request, ec.EllipticCurvePublicKey)
    assert [listed.index(word) for word in fingerprint_words(request).split()] == [
        int(bits[11 * place : 11 * place + 11], 2) for place in range(6)
    ]


def test_a_locked_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    save_private(path, KEY, b"five words drawn at random")
    assert is_locked(path)
    assert load_tls_key(path, b"five words drawn at random").public_key() == KEY.public_key()
    assert code_of(load_tls_key, path) == "identity.passphrase-needed"
    assert code_of(load_tls_key, path, b"five words drawn at randoM") == "identity.wrong-passphrase"
    save_private(path, KEY)
    assert not is_locked(path)
    load_tls_key(path, b"not asked for")


def test_a_passphrase_is_read_from_a_private_file_or_a_descriptor(tmp_path: Path) -> None:
    import os

    path = tmp_path / "passphrase"
    path.write_bytes(b"five words drawn at random\nnot this\n")
    path.chmod(0o600)
    assert read_passphrase(path) == new_passphrase(path) == b"five words drawn at random"
    reading, writing = os.pipe()
    os.write(writing, b"through a pipe it came\n")
    os.close(writing)
    assert read_passphrase(Path(f"/dev/fd/{reading}")) == b"through a pipe it came"
    os.close(reading)
    path.chmod(0o640)
    assert code_of(read_passphrase, path) == "identity.key-exposed"
    path.chmod(0o600)
    path.write_bytes(b"\n")
    assert code_of(read_passphrase, path) == "identity.no-passphrase"
    path.write_bytes(b"elevenchars")
    assert code_of(new_passphrase, path) == "identity.weak-passphrase"
    assert code_of(read_passphrase, tmp_path / "none") == "identity.no-passphrase"
