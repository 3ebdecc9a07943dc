"""The aggregator certifies members, renews itself, and changes keys while it works."""

from __future__ import annotations

import io
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from issuing_samples import HOUR, KEY, SECRET, SIGNING, code_of, request_file, requests_of

from consilium_common.identity.authority import Authority, signing_request
from consilium_common.identity.certificates import (
    MEMBER_ROLES,
    RENEW_DAYS,
    Role,
    read_certificate,
)
from consilium_common.identity.enrolment import (
    check_answer,
    join_request,
    read_certificates,
    read_join_request,
    write_form,
)
from consilium_common.identity.invitation import read_invitation, write_invitation
from consilium_common.identity.keys import (
    load_tls_key,
    new_signing_key,
    new_tls_key,
    private_pem,
    save_private,
)
from consilium_common.identity.trust import Trust
from consilium_server import members
from consilium_server.certifying import certify
from consilium_server.home import ServerHome
from consilium_server.issuing import (
    load_issuer,
    passphrase_for,
    renew_server_if_due,
    server_hosts,
)
from consilium_server.pairs import install_pair, settle_pair
from consilium_server.registry import Registry
from consilium_server.rotation import rotate_server


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """Return the home of a new aggregator, its authority's key open."""
    server = ServerHome.create(tmp_path / "aggregator")
    members.initialise(server, "tests", "fl.example.org:8443")
    return server


# --- issuing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", MEMBER_ROLES)
def test_a_member_gets_what_its_role_needs_and_a_site_believes_it(
    home: ServerHome, role: Role
) -> None:
    issuer = load_issuer(home)
    issued = issuer.issue("north", role, *requests_of(role))
    assert issued is not None
    answer = {
        "certificate_pem": issued.certificate_pem,
        "signer_pem": issued.signer_pem,
        "authority_pem": issuer.trust.pem().decode(),
    }
    signer = None if role is Role.AUDITOR else SIGNING.public_key()
    assert (issued.signer_pem is None) is (role is Role.AUDITOR)
    holder = ("north", role)
    check_answer(answer, issuer.trust, holder, KEY.public_key(), signer)
    for wrong in (
        (("south", role), KEY.public_key(), signer),
        (("north", Role.SERVER), KEY.public_key(), signer),
        (holder, new_tls_key().public_key(), signer),
        (holder, KEY.public_key(), new_signing_key().public_key()),
    ):
        if wrong[2] is None or issued.signer_pem is not None:
            code = code_of(check_answer, answer, issuer.trust, *wrong)
            assert code == "identity.bad-certificate"
    foreign = Trust.of(Authority.create("x").certificate)
    code = code_of(check_answer, answer, foreign, holder, KEY.public_key(), signer)
    assert code == "identity.foreign"


def test_a_request_for_the_wrong_kind_of_key_is_refused(home: ServerHome) -> None:
    issuer, ed25519 = load_issuer(home), signing_request(SIGNING, "x")
    pem = signing_request(KEY, "x")
    for arguments, code in (
        ((ed25519, ed25519), "identity.weak-key"),
        ((pem, pem), "identity.weak-key"),
        ((b"nonsense", ed25519), "identity.bad-request"),
    ):
        assert code_of(issuer.issue, "north", Role.SITE, *arguments) == code


def test_a_locked_authority_opens_with_its_passphrase_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = ServerHome.create(tmp_path / "locked")
    members.initialise(home, "tests", "fl.example.org:8443", passphrase=SECRET)
    key = home.identity / "authority-key.pem"
    assert b"ENCRYPTED" in key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert code_of(load_issuer, home) == "identity.passphrase-needed"
    assert code_of(load_issuer, home, b"another passphrase") == "identity.wrong-passphrase"
    assert load_issuer(home, SECRET).issue("north", Role.SITE, *requests_of(Role.SITE))
    # An invitation needs no passphrase.
    invitation = members.invite(home, "north", HOUR)
    write_invitation(tmp_path / "invitation", invitation)
    assert read_invitation(tmp_path / "invitation") == invitation
    # Where it comes from: a file, systemd's credential, a terminal; never the environment.
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert code_of(passphrase_for, key, None) == "identity.passphrase-needed"
    (tmp_path / "authority-passphrase").write_bytes(SECRET + b"\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for mode in (0o400, 0o440):  # as systemd writes it: owned by the service's user, or by an ACL
        (tmp_path / "authority-passphrase").chmod(mode)
        assert passphrase_for(key, None) == SECRET
    (tmp_path / "authority-passphrase").chmod(0o444)
    assert code_of(passphrase_for, key, None) == "identity.key-exposed"
    assert passphrase_for(home.identity / "server-key.pem", None) is None


# --- joining by file ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", MEMBER_ROLES)
def test_whoever_cannot_connect_joins_by_file(home: ServerHome, tmp_path: Path, role: Role) -> None:
    issuer = load_issuer(home)
    invitation = members.invite(home, "north", HOUR, role)
    request, out = request_file(tmp_path, invitation), tmp_path / "certificates"
    certify(home, issuer, request, out)
    signer = None if role is Role.AUDITOR else SIGNING.public_key()
    answer = read_certificates(out, invitation, KEY.public_key(), signer)
    assert (answer.name, answer.role, answer.address) == ("north", role, "fl.example.org:8443")
    member = Registry(home.database).member("north")
    assert member is not None
    assert (member.role, member.status) == (role, "active")
    assert member.certificate_pem == answer.certificate_pem
    # The invitation is spent: the same request brings the same again, another nothing.
    certify(home, issuer, request, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == out.read_bytes()
    assert code_of(certify, home, issuer, request, out) == "state.exists"
    key = new_tls_key()
    other = join_request(
        invitation,
        request_pem=signing_request(key, "x"),
        signer_request_pem=requests_of(role)[1],
        version="1",
    )
    write_form(tmp_path / "other", other)
    code = code_of(certify, home, issuer, tmp_path / "other", tmp_path / "no")
    assert code == "identity.invitation-used"
    assert not (tmp_path / "no").exists()


def test_a_request_that_was_changed_or_has_no_invitation_is_refused(
    home: ServerHome, tmp_path: Path
) -> None:
    issuer = load_issuer(home)
    invitation = members.invite(home, "north", HOUR)
    good = read_join_request(request_file(tmp_path, invitation), issuer.trust)
    another = members.invite(home, "south", HOUR)
    for number, changes in enumerate(
        (
            {"name": "south"},
            {"role": "operator"},
            {"version": "2"},
            {"request_pem": signing_request(new_tls_key(), "x").decode()},
            {"signer_request_pem": None},
            {"invitation_pem": another.certificate_pem},
            {"invitation": good.invitation.model_copy(update={"serial": "ab"})},
            {"signature": "00" * 96},
        )
    ):
        path = tmp_path / f"changed-{number}"
        write_form(path, good.model_copy(update=changes))
        code = code_of(certify, home, issuer, path, tmp_path / "no")
        assert code == "identity.bad-signature", changes
    # Made with an invitation that the register does not know, or of another consortium.
    stranger = ServerHome.create(tmp_path / "stranger")
    members.initialise(stranger, "tests", "fl.example.org:8443")
    foreign = request_file(tmp_path, members.invite(stranger, "north", HOUR))
    assert code_of(certify, home, issuer, foreign, tmp_path / "no") == "identity.foreign"
    late = datetime.now(UTC) + 2 * HOUR
    path = request_file(tmp_path, invitation)
    assert code_of(read_join_request, path, issuer.trust, now=late) == "identity.expired"
    for content in (b"", b"{}", b"[]", b"\xff", b'{"schema": 1}', b"x" * 2_000_000):
        (tmp_path / "bad").write_bytes(content)
        code = code_of(certify, home, issuer, tmp_path / "bad", tmp_path / "no")
        assert code == "identity.bad-file"
    assert Registry(home.database).member("north") is None


def test_a_revoked_member_and_its_invitations_open_nothing(
    home: ServerHome, tmp_path: Path
) -> None:
    issuer = load_issuer(home)
    request = request_file(tmp_path, members.invite(home, "north", HOUR))
    certify(home, issuer, request, tmp_path / "certificates")
    pending = request_file(tmp_path, members.invite(home, "north", HOUR))
    members.revoke(home, "north")
    for path in (request, pending):
        code = code_of(certify, home, issuer, path, tmp_path / "no")
        assert code == "identity.invitation-used"
    assert code_of(members.revoke, home, "nobody") == "identity.unknown"
    assert code_of(members.revoke, home, "operator") == "identity.last-operator"


def test_a_name_keeps_its_role_and_only_members_are_invited(
    home: ServerHome, tmp_path: Path
) -> None:
    request = request_file(tmp_path, members.invite(home, "north", HOUR))
    certify(home, load_issuer(home), request, tmp_path / "certificates")
    assert code_of(members.invite, home, "north", HOUR, Role.AUDITOR) == "identity.name-taken"
    assert code_of(members.invite, home, "operator", HOUR) == "identity.name-taken"
    for role in set(Role) - set(MEMBER_ROLES):
        assert code_of(members.invite, home, "east", HOUR, role) == "identity.bad-role"


# --- the aggregator's own certificates ---------------------------------------------------------


def test_the_server_renews_itself_before_its_end_and_keeps_its_key(home: ServerHome) -> None:
    issuer, path = load_issuer(home), home.identity / "server.pem"
    before = read_certificate(path)
    assert not renew_server_if_due(home, issuer)
    assert read_certificate(path) == before
    moment = before.not_valid_after_utc - timedelta(days=RENEW_DAYS - 1)
    assert renew_server_if_due(home, issuer, moment=moment)
    after = read_certificate(path)
    assert after.serial_number != before.serial_number
    assert after.public_key() == before.public_key()
    assert server_hosts(after) == server_hosts(before) == ("fl.example.org",)
    operator = read_certificate(home.identity / "operator.pem")
    member = Registry(home.database).member("operator")
    assert member is not None
    assert member.serial == f"{operator.serial_number:x}"


def test_a_rotated_server_key_is_complete_at_every_moment_of_a_crash(home: ServerHome) -> None:
    folder, issuer = home.identity, load_issuer(home)
    before = read_certificate(folder / "server.pem").public_key()
    assert rotate_server(home, issuer)
    after = read_certificate(folder / "server.pem")
    assert after.public_key() != before
    assert after.public_key() == load_tls_key(folder / "server-key.pem").public_key()
    assert issuer.trust.check(after).role is Role.SERVER
    # Killed after the certificate was laid ready, and after the key was replaced.
    key = new_tls_key()
    following = issuer.issue("aggregator", Role.SERVER, signing_request(key, "x"), None)
    assert following is not None
    (folder / "server-next.pem").write_text(following.certificate_pem)
    settle_pair(folder, "server")
    assert read_certificate(folder / "server.pem") == after
    (folder / "server-next.pem").write_text(following.certificate_pem)
    save_private(folder / "server-key.pem", key)
    settle_pair(folder, "server")
    assert read_certificate(folder / "server.pem").public_key() == key.public_key()
    assert not (folder / "server-next.pem").exists()
    install_pair(folder, "server", private_pem(KEY), following.certificate_pem.encode())
