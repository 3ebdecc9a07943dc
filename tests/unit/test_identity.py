"""Certificates say who may do what, keys stay where they are made, invitations are checked."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import (
    Authority,
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
    check_name,
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.invitation import Invitation, read_invitation, write_invitation
from consilium_common.identity.keys import (
    load_signing_key,
    load_tls_key,
    new_signing_key,
    new_tls_key,
    private_pem,
    public_fingerprint,
    save_private,
    verify_signature,
)
from consilium_common.identity.loopback import make_loopback
from consilium_common.wire.statements import (
    approval_statement,
    check_signed,
    proposal_statement,
    sign,
)

AUTHORITY = Authority.create("tests")
KEY = new_tls_key()
#: Every role that a holder of a certificate can have, and that certifies nobody.
HOLDERS = [role for role in Role if role not in CERTIFYING_ROLES]


def code_of(call: object, *arguments: object, **named: object) -> str:
    """Return the code of the error that a call raises."""
    assert callable(call)
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments, **named)
    return caught.value.code


# --- certificates ------------------------------------------------------------------------------


@pytest.mark.parametrize("role", HOLDERS)
def test_a_certificate_says_role_name_and_consortium(role: Role) -> None:
    key = new_signing_key() if role in SIGNING_ROLES else KEY
    certificate = AUTHORITY.issue(key.public_key(), role, "north-clinic")
    certified = check_issued(certificate, AUTHORITY.certificate)
    assert (certified.role, certified.name) == (role, "north-clinic")
    assert certified.consortium == AUTHORITY.consortium
    assert certified.fingerprint == public_fingerprint(key.public_key())
    assert check_issued(load_certificate(certificate_pem(certificate)), AUTHORITY.certificate) == (
        certified
    )


@pytest.mark.parametrize("role", HOLDERS)
def test_only_the_servers_certificate_can_serve(role: Role) -> None:
    hosts = ("127.0.0.1", "fl.example.org")
    certificate = AUTHORITY.issue(KEY.public_key(), role, "x", hosts=hosts)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    assert (SERVER_NAME in dns) == (role is Role.SERVER)
    assert bool(names.get_values_for_type(x509.IPAddress)) == (role is Role.SERVER)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca is False
    usage = {
        Role.SERVER: [ExtendedKeyUsageOID.SERVER_AUTH],
        Role.SIGNER: None,
        Role.PROPOSER: None,
        Role.WITNESS: None,
    }.get(role, [ExtendedKeyUsageOID.CLIENT_AUTH])
    if usage is None:
        with pytest.raises(x509.ExtensionNotFound):
            certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    else:
        found = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert (list(found.value), found.critical) == (usage, True)


def test_a_certificate_of_another_authority_is_foreign_even_with_its_name() -> None:
    certificate = Authority.create("tests").issue(KEY.public_key(), Role.SITE, "north-clinic")
    assert code_of(check_issued, certificate, AUTHORITY.certificate) == "identity.foreign"
    # Signed by our authority's name, with another key.
    forged = Authority(new_tls_key(), AUTHORITY.certificate).issue(
        KEY.public_key(), Role.OPERATOR, "operator"
    )
    assert code_of(check_issued, forged, AUTHORITY.certificate) == "identity.foreign"


def test_a_certificate_without_a_role_is_foreign(tmp_path: Path) -> None:
    loopback = read_certificate(make_loopback(tmp_path).certificate)
    assert code_of(describe, loopback) == "identity.foreign"


def test_a_certificate_holds_from_its_beginning_to_its_end_and_no_longer() -> None:
    certificate = AUTHORITY.issue(KEY.public_key(), Role.SITE, "x", lifetime=timedelta(days=1))
    now = datetime.now(UTC)
    for moment in (now - timedelta(minutes=5), now, now + timedelta(hours=23)):
        check_issued(certificate, AUTHORITY.certificate, now=moment)
    late, early = now + timedelta(hours=25), now - timedelta(hours=1)
    assert code_of(check_issued, certificate, AUTHORITY.certificate, now=late) == "identity.expired"
    assert (
        code_of(check_issued, certificate, AUTHORITY.certificate, now=early)
        == "identity.not-yet-valid"
    )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=70))
def test_a_name_is_taken_only_if_it_reads_back_unambiguously(name: str) -> None:
    plain = (
        0 < len(name) <= 63
        and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in name)
        and not name.startswith("-")
    )
    if plain:
        assert describe(AUTHORITY.issue(KEY.public_key(), Role.SITE, name)).name == name
    else:
        assert code_of(check_name, name) == "identity.bad-name"


@pytest.mark.parametrize("name", ["north\n", "a\x00", "north:operator:x", "ﬁeld", "nörd", " a"])
def test_a_name_that_could_be_read_as_another_is_refused(name: str) -> None:
    assert code_of(AUTHORITY.issue, KEY.public_key(), Role.SITE, name) == "identity.bad-name"


# --- requests ----------------------------------------------------------------------------------


def test_a_signing_request_is_certified_under_the_name_the_authority_decides() -> None:
    certificate = AUTHORITY.issue_from_request(signing_request(KEY, "asked"), Role.SITE, "given")
    certified = check_issued(certificate, AUTHORITY.certificate)
    assert certified.name == "given"
    assert certified.public_key == KEY.public_key()


def test_a_request_with_the_wrong_kind_of_key_is_refused() -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    signing = new_signing_key()
    for key, role in (
        (small, Role.SITE),
        (signing, Role.SITE),
        (KEY, Role.SIGNER),
        (KEY, Role.PROPOSER),
        (KEY, Role.WITNESS),
    ):
        request = signing_request(key, "x")
        assert code_of(AUTHORITY.issue_from_request, request, role, "x") == "identity.weak-key"


def test_a_request_that_was_changed_is_refused() -> None:
    der = load_request(signing_request(KEY, "north")).public_bytes(serialization.Encoding.DER)
    changed = x509.load_der_x509_csr(der.replace(b"north", b"south"))
    pem = changed.public_bytes(serialization.Encoding.PEM)
    assert code_of(load_request, pem) == "identity.bad-request"
    assert code_of(load_request, b"nonsense") == "identity.bad-request"


# --- keys --------------------------------------------------------------------------------------


def test_a_key_is_stored_for_its_owner_alone_and_reads_back(tmp_path: Path) -> None:
    for key, load in ((KEY, load_tls_key), (new_signing_key(), load_signing_key)):
        path = tmp_path / "key.pem"
        save_private(path, key)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert load(path).public_key() == key.public_key()


def test_a_key_that_others_can_read_or_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    assert code_of(load_tls_key, path) == "identity.no-key"
    save_private(path, KEY)
    assert code_of(load_signing_key, path) == "identity.bad-key"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        assert code_of(load_tls_key, path) == "identity.key-exposed"
    path.chmod(0o600)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\n")
    assert code_of(load_tls_key, path) == "identity.bad-key"


def test_a_signature_is_of_its_content_and_key() -> None:
    key = new_signing_key()
    signature = key.sign(b"content")
    assert verify_signature(key.public_key(), signature, b"content")
    assert not verify_signature(key.public_key(), signature, b"Content")
    assert not verify_signature(new_signing_key().public_key(), signature, b"content")


# --- invitations -------------------------------------------------------------------------------


def an_invitation(lifetime: timedelta = timedelta(hours=1)) -> Invitation:
    key = new_tls_key()
    certificate = AUTHORITY.issue(key.public_key(), Role.INVITATION, "north", lifetime=lifetime)
    return Invitation(
        consortium="tests",
        address="127.0.0.1:8443",
        name="north",
        role=Role.SITE,
        expires=describe(certificate).not_after,
        authority_pem=certificate_pem(AUTHORITY.certificate).decode(),
        certificate_pem=certificate_pem(certificate).decode(),
        private_key_pem=private_pem(key).decode(),
    )


def test_an_invitation_reads_back_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "invitation"
    invitation = an_invitation()
    write_invitation(path, invitation)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_invitation(path) == invitation
    assert code_of(write_invitation, path, invitation) == "state.exists"
    later = datetime.now(UTC) + timedelta(hours=2)
    assert code_of(read_invitation, path, now=later) == "identity.invitation-expired"


@pytest.mark.parametrize("field", list(Invitation.model_fields))
def test_an_invitation_without_a_field_or_with_another_one_is_refused(
    tmp_path: Path, field: str
) -> None:
    path = tmp_path / "invitation"
    name = "schema" if field == "schema_" else field
    content = json.loads(an_invitation().model_dump_json(by_alias=True))
    assert name in content
    if name != "schema":  # the schema has a default
        path.write_text(json.dumps({k: v for k, v in content.items() if k != name}))
        assert code_of(read_invitation, path) == "identity.bad-invitation"
    path.write_text(json.dumps({**content, name: [7]}))
    assert code_of(read_invitation, path) == "identity.bad-invitation"
    path.write_text(json.dumps({**content, f"{name}_2": 7}))
    assert code_of(read_invitation, path) == "identity.bad-invitation"


def test_an_invitation_whose_parts_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "invitation"
    one, other = an_invitation(), an_invitation()
    mixed = one.model_copy(update={"private_key_pem": other.private_key_pem})
    path.write_text(mixed.model_dump_json(by_alias=True))
    assert code_of(read_invitation, path) == "identity.bad-invitation"
    foreign = certificate_pem(Authority.create("elsewhere").certificate).decode()
    path.write_text(
        one.model_copy(update={"authority_pem": foreign}).model_dump_json(by_alias=True)
    )
    assert code_of(read_invitation, path) == "identity.foreign"


# --- statements --------------------------------------------------------------------------------


def test_a_statement_is_taken_from_the_named_signer_alone() -> None:
    key = new_signing_key()
    signer = certificate_pem(AUTHORITY.issue(key.public_key(), Role.SIGNER, "north")).decode()
    statement = approval_statement(
        "d" * 64, "north", "approved", cohort_size=20, evaluation_size=5, why=""
    )
    signature = sign(key, statement)
    check_signed(
        statement, signature, signer, AUTHORITY.certificate, name="north", role=Role.SIGNER
    )

    def refused(**changes: object) -> str:
        arguments = {
            "statement": statement,
            "signature": signature,
            "signer_pem": signer,
            "authority": AUTHORITY.certificate,
            "name": "north",
            "role": Role.SIGNER,
        }
        return code_of(check_signed, **{**arguments, **changes})

    for changed in (
        approval_statement(
            "e" * 64, "north", "approved", cohort_size=20, evaluation_size=5, why=""
        ),
        approval_statement(
            "d" * 64, "north", "approved", cohort_size=21, evaluation_size=5, why=""
        ),
        approval_statement(
            "d" * 64, "north", "approved", cohort_size=20, evaluation_size=6, why=""
        ),
        approval_statement(
            "d" * 64, "south", "approved", cohort_size=20, evaluation_size=5, why=""
        ),
        approval_statement(
            "d" * 64, "north", "declined", cohort_size=20, evaluation_size=5, why=""
        ),
        approval_statement(
            "d" * 64, "north", "approved", cohort_size=20, evaluation_size=5, why="x"
        ),
        proposal_statement("d" * 64, "north"),
    ):
        assert refused(statement=changed) == "identity.bad-signature"
    assert refused(name="south") == "identity.bad-signature"
    assert refused(signature="") == "identity.bad-signature"
    assert refused(signature="zz") == "identity.bad-signature"
    assert refused(signature=sign(new_signing_key(), statement)) == "identity.bad-signature"
    # The key must be certified for signing, by this consortium.
    for role, kind, code in (
        (Role.WITNESS, key, "identity.bad-signature"),
        (Role.PROPOSER, key, "identity.bad-signature"),
        (Role.SITE, KEY, "identity.bad-signature"),
        (Role.SITE, key, "identity.weak-key"),
    ):
        other = AUTHORITY.issue(kind.public_key(), role, "north")
        assert refused(signer_pem=certificate_pem(other).decode()) == code
    foreign = Authority.create("x").issue(key.public_key(), Role.SIGNER, "north")
    assert refused(signer_pem=certificate_pem(foreign).decode()) == "identity.foreign"
    assert refused(signer_pem="nonsense") == "identity.bad-certificate"


def test_a_signature_that_is_kept_outlives_its_signers_certificate() -> None:
    key = new_signing_key()
    short = AUTHORITY.issue(key.public_key(), Role.PROPOSER, "op", lifetime=timedelta(seconds=-1))
    statement = proposal_statement("d" * 64, "op")
    signed = (statement, sign(key, statement), certificate_pem(short).decode())
    judged = {"authority": AUTHORITY.certificate, "name": "op", "role": Role.PROPOSER}
    check_signed(*signed, **judged, kept=True)
    assert code_of(check_signed, *signed, **judged) == "identity.expired"
    other = {**judged, "name": "other"}
    assert code_of(check_signed, *signed, **other, kept=True) == "identity.bad-signature"


def test_a_certificate_file_that_is_missing_or_none_is_named(tmp_path: Path) -> None:
    assert code_of(read_certificate, tmp_path / "x.pem") == "identity.no-certificate"
    (tmp_path / "x.pem").write_text("nonsense")
    assert code_of(read_certificate, tmp_path / "x.pem") == "identity.bad-certificate"
