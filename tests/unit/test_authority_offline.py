"""The authority's key is elsewhere: requests are carried there, certificates back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from issuing_samples import HOUR, KEY, SIGNING, code_of
from typer.testing import CliRunner

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem, signing_request
from consilium_common.identity.certificates import Role, load_certificate, read_certificate
from consilium_common.identity.enrolment import join_request, read_certificates, write_form
from consilium_common.identity.invitation import read_invitation, write_invitation
from consilium_common.identity.keys import (
    load_signing_key,
    load_tls_key,
    new_signing_key,
    new_tls_key,
)
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_server import members
from consilium_server.certifying import certify
from consilium_server.cli import app
from consilium_server.home import ServerHome
from consilium_server.issuing import HomeIssuer, renew_server_if_due
from consilium_server.offline import (
    Requests,
    Signed,
    read_requests,
    sign_offline,
    take,
    waiting_requests,
)
from consilium_server.registry import Registry
from consilium_server.rotation import Custody, finish_rotation, rotate_authority, rotate_server


def trust_at(stick: Path) -> Trust:
    """Return what an authority's own folder says of whom to trust."""
    return Trust.read(stick / "authority.pem")


class Place:
    """An aggregator and, elsewhere, its authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stick = folder / "stick"
        self.home = ServerHome.create(folder / "aggregator")
        members.initialise(self.home, "tests", "fl.example.org:8443", offline=self.stick)
        self.issuer = HomeIssuer(self.home)

    def ask(self, name: str = "north", role: Role = Role.SITE, key: Any = KEY) -> Any:
        """Ask for a member's certificates."""
        signer = None if role is Role.AUDITOR else signing_request(SIGNING, "x")
        return self.issuer.issue(name, role, signing_request(key, "x"), signer)

    def carried(self) -> Path:
        """Write what waits to a file."""
        path = self.folder / f"requests-{len(list(self.folder.iterdir()))}"
        write_form(path, waiting_requests(self.home, self.issuer))
        return path

    def signed(self, stick: Path | None = None) -> Path:
        """Certify all that waits, at the authority."""
        authority = Authority.load(stick or self.stick)
        content = read_requests(self.carried(), trust_at(stick or self.stick))
        path = self.folder / f"signed-{len(list(self.folder.iterdir()))}"
        write_form(path, sign_offline(authority, content, lambda _: True)[0])
        return path

    def take(self, path: Path) -> list[str]:
        """Bring certificates back."""
        return [row.name for row in take(self.home, self.issuer, path)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Return a new aggregator whose authority is offline."""
    return Place(tmp_path)


def test_the_authoritys_key_is_in_its_own_folder_alone(place: Place) -> None:
    assert load_tls_key(place.stick / "authority-key.pem")
    assert sorted(file.name for file in place.stick.iterdir()) == [
        "authority-key.pem",
        "authority.pem",
    ]
    assert place.stick.stat().st_mode & 0o077 == 0
    key = (place.stick / "authority-key.pem").read_bytes()
    for file in place.home.path.rglob("*"):
        assert not file.is_file() or key not in file.read_bytes()
    assert not (place.home.identity / "authority-key.pem").exists()


@pytest.mark.parametrize("kept", ["full", "inside"])
def test_a_folder_that_is_used_or_is_the_aggregators_own_is_refused(
    tmp_path: Path, kept: str
) -> None:
    home = ServerHome.create(tmp_path / "aggregator")
    folder = home.path / "authority" if kept == "inside" else tmp_path / "full"
    if kept == "full":
        folder.mkdir()
        (folder / "photo").touch()
    expected = "usage.authority" if kept == "inside" else "state.exists"
    assert (
        code_of(members.initialise, home, "tests", "fl.example.org:8443", offline=folder)
        == expected
    )
    assert not home.config_file.exists()


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR, Role.AUDITOR])
def test_a_request_waits_is_certified_once_and_then_answered(place: Place, role: Role) -> None:
    assert place.ask(role=role) is None
    assert place.ask(role=role) is None  # asked again: the same request
    content = waiting_requests(place.home, place.issuer)
    assert [(one.name, one.role, one.words) for one in content.requests] == [
        ("north", role, fingerprint_words(KEY.public_key()))
    ]
    assert code_of(place.ask, role=role, key=new_tls_key()) == "identity.request-waiting"
    signed = place.signed()
    assert place.take(signed) == ["north"]
    issued = place.ask(role=role)
    certified = place.issuer.trust.check(load_certificate(issued.certificate_pem.encode()))
    assert (certified.name, certified.role) == ("north", role)
    assert (issued.signer_pem is None) is (role is Role.AUDITOR)
    assert code_of(place.take, signed) == "identity.no-request"  # replayed
    assert code_of(waiting_requests, place.home, place.issuer) == "identity.no-request"


def test_an_invitation_is_made_without_the_authority_and_joins_by_file(place: Place) -> None:
    invitation = members.invite(place.home, "north", HOUR)
    path = place.folder / "invitation"
    write_invitation(path, invitation)
    assert read_invitation(path) == invitation
    request = place.folder / "request"
    form = join_request(
        invitation,
        request_pem=signing_request(KEY, "x"),
        signer_request_pem=signing_request(SIGNING, "x"),
        version="1",
    )
    write_form(request, form)
    out = place.folder / "certificates"
    assert certify(place.home, place.issuer, request, out)[1] is None
    assert not out.exists()
    # The invitation serves this request alone from now on.
    other = join_request(
        invitation,
        request_pem=signing_request(new_tls_key(), "x"),
        signer_request_pem=signing_request(SIGNING, "x"),
        version="1",
    )
    write_form(place.folder / "other", other)
    code = code_of(certify, place.home, place.issuer, place.folder / "other", out)
    assert code == "identity.invitation-used"
    place.take(place.signed())
    certify(place.home, place.issuer, request, out)
    read_certificates(out, invitation, KEY.public_key(), SIGNING.public_key())


def test_a_new_invitation_and_a_revocation_withdraw_what_waits(place: Place) -> None:
    place.ask()
    signed = place.signed()
    members.invite(place.home, "north", HOUR)
    assert code_of(place.take, signed) == "identity.no-request"
    assert place.ask(key=new_tls_key()) is None


def test_a_file_of_requests_that_was_changed_is_not_certified(place: Place) -> None:
    place.ask()
    authority, trust = Authority.load(place.stick), trust_at(place.stick)
    path = place.carried()
    good = json.loads(path.read_text())
    request = good["requests"][0]
    stranger = signing_request(new_tls_key(), "x").decode()
    for changes in (
        {"requests": [{**request, "request_pem": stranger}]},
        {"requests": [{**request, "role": "operator"}]},
        {"requests": [{**request, "name": "south"}]},
        {"requests": []},
        {"written_at": "2020-01-01"},
        {"signature": "00" * 64},
    ):
        path.write_text(json.dumps({**good, **changes}))
        assert code_of(read_requests, path, trust) == "identity.bad-signature", changes
    # Signed by somebody else's witness, or by a member's key.
    other = Authority.create("x")
    key = new_signing_key()
    for issuer, role, code in (
        (other, Role.WITNESS, "identity.foreign"),
        (authority, Role.SIGNER, "identity.bad-signature"),
    ):
        certificate = certificate_pem(issuer.issue(key.public_key(), role, "aggregator"))
        made = Requests.model_validate_json(json.dumps(good)).model_copy(
            update={"witness_pem": certificate.decode()}
        )
        made = made.model_copy(update={"signature": key.sign(made.signed()).hex()})
        path.write_text(made.model_dump_json(by_alias=True))
        assert code_of(read_requests, path, trust) == code
    path.write_text(json.dumps(good))
    assert code_of(read_requests, path, Trust.of(other.certificate)) == "identity.foreign"
    path.write_text(json.dumps({**good, "requests": [{**request, "role": "witness"}]}))
    assert code_of(read_requests, path, trust) == "identity.bad-file"


def test_certificates_that_do_not_fit_what_waits_are_not_taken(place: Place) -> None:
    place.ask()
    place.ask("south", key=new_tls_key())
    path = place.signed()
    good = Signed.model_validate_json(path.read_text())
    authority = Authority.load(place.stick)
    first, second = good.certificates

    def pem(role: Role = Role.SITE, name: str = "north", key: Any = KEY) -> str:
        return certificate_pem(authority.issue(key.public_key(), role, name)).decode()

    foreign = Authority.create("x").issue(KEY.public_key(), Role.SITE, "north")
    for changes, code in (
        ({"certificate_pem": second.certificate_pem}, "identity.bad-certificate"),
        ({"certificate_pem": pem(key=new_tls_key())}, "identity.bad-certificate"),
        ({"certificate_pem": pem(Role.OPERATOR)}, "identity.bad-certificate"),
        ({"certificate_pem": pem(name="east")}, "identity.bad-certificate"),
        ({"signer_pem": None}, "identity.bad-certificate"),
        ({"signer_pem": pem(Role.SIGNER, key=new_signing_key())}, "identity.bad-certificate"),
        ({"signer_pem": pem(Role.PROPOSER, key=SIGNING)}, "identity.bad-certificate"),
        ({"certificate_pem": certificate_pem(foreign).decode()}, "identity.foreign"),
        ({"certificate_pem": "nonsense"}, "identity.bad-certificate"),
        ({"id": "0" * 64}, "identity.no-request"),
    ):
        changed = good.model_copy(
            update={"certificates": [second, first.model_copy(update=changes)]}
        )
        bad = place.folder / "bad"
        bad.write_text(changed.model_dump_json(by_alias=True))
        assert code_of(place.take, bad) == code, changes
        # Nothing was stored, of the good one neither.
        assert len(waiting_requests(place.home, place.issuer).requests) == 2
    assert place.take(path) == ["north", "south"]


def test_a_person_at_the_authority_can_refuse_one_request(place: Place) -> None:
    place.ask()
    place.ask("south", key=new_tls_key())
    authority = Authority.load(place.stick)
    content = read_requests(place.carried(), trust_at(place.stick))
    signed, left = sign_offline(authority, content, lambda one: one.name != "south")
    assert len(signed.certificates) == 1
    assert [one.name for one in left] == ["south"]


def test_the_server_is_renewed_and_rotated_over_the_same_way(place: Place) -> None:
    before = read_certificate(place.home.identity / "server.pem")
    assert not renew_server_if_due(place.home, place.issuer, moment=before.not_valid_after_utc)
    asked = waiting_requests(place.home, place.issuer).requests
    assert {(one.name, one.role) for one in asked} == {
        ("aggregator", "server"),
        ("operator", "operator"),
    }
    place.take(place.signed())
    assert renew_server_if_due(place.home, place.issuer, moment=before.not_valid_after_utc)
    renewed = read_certificate(place.home.identity / "server.pem")
    assert renewed.serial_number != before.serial_number
    assert renewed.public_key() == before.public_key()
    assert not rotate_server(place.home, place.issuer)
    assert read_certificate(place.home.identity / "server.pem") == renewed  # until it is certified
    place.take(place.signed())
    rotated = read_certificate(place.home.identity / "server.pem")
    assert rotated.public_key() != before.public_key()
    key = load_tls_key(place.home.identity / "server-key.pem")
    assert key.public_key() == rotated.public_key()
    assert not (place.home.identity / "server-waiting-key.pem").exists()


def test_an_offline_authority_is_replaced_by_an_offline_one(place: Place) -> None:
    place.ask()
    place.take(place.signed())
    old = place.issuer.trust
    custody = Custody(place.home, offline=place.stick)
    assert code_of(rotate_authority, custody) == "usage.authority"
    assert code_of(rotate_authority, Custody(place.home)) == "identity.no-key"
    following = place.folder / "second"
    rotate_authority(custody, following)
    cross = place.issuer.cross_pem
    assert cross is not None
    assert (
        old.follow(place.issuer.trust.pem(), cross.encode()) == place.issuer.trust.with_enrolment()
    )
    assert code_of(finish_rotation, custody) == "identity.wrong-authority"
    newer = Custody(place.home, offline=following)
    # The operator in this home has a certificate of the new authority at once; what else waits,
    # the old stick certifies no more.
    operator = read_certificate(place.home.identity / "operator.pem")
    assert place.issuer.trust.in_force(operator)
    assert place.ask("east", key=new_tls_key()) is None
    content = read_requests(place.carried(), trust_at(following))
    signed, left = sign_offline(Authority.load(place.stick), content, lambda _: True)
    assert (len(signed.certificates), len(left)) == (0, 1)
    assert place.take(place.signed(following)) == ["east"]
    assert finish_rotation(newer) == []
    server = read_certificate(place.home.identity / "server.pem")
    assert place.issuer.trust.in_force(server)
    invitation = members.invite(place.home, "south", HOUR)
    write_invitation(place.folder / "late", invitation)
    read_invitation(place.folder / "late")


def test_forced_to_its_end_an_offline_rotation_leaves_out_who_is_not_ready_and_nobody_else(
    place: Place,
) -> None:
    for name, role in (("north", Role.SITE), ("ada", Role.OPERATOR)):
        invitation = members.invite(place.home, name, HOUR, role)
        request = place.folder / f"request-of-{name}"
        form = join_request(
            invitation,
            request_pem=signing_request(KEY, "x"),
            signer_request_pem=signing_request(SIGNING, "x"),
            version="1",
        )
        write_form(request, form)
        certify(place.home, place.issuer, request, place.folder / name)
        place.take(place.signed())
        certify(place.home, place.issuer, request, place.folder / name)
    before = (place.home.identity / "operator.pem").read_bytes()
    following = place.folder / "second"
    rotate_authority(Custody(place.home, offline=place.stick), following)
    # As a rotation that was cut short before its end leaves it.
    write_atomic(place.home.identity / "operator.pem", before)
    newer = Custody(place.home, offline=following)
    with pytest.raises(ConsiliumError, match="ada, north") as caught:
        finish_rotation(newer)
    assert caught.value.code == "identity.rotation-unfinished"
    assert "operator" not in caught.value.message
    assert finish_rotation(newer, force=True) == ["ada", "north"]
    operator = read_certificate(place.home.identity / "operator.pem")
    member = Registry(place.home.database).member("operator")
    assert member is not None
    assert member.serial == f"{operator.serial_number:x}"
    assert place.issuer.trust.in_force(operator)


def test_the_whole_way_as_a_person_types_it(tmp_path: Path) -> None:
    run = CliRunner()

    def typed(*arguments: object, answers: str = "") -> str:
        outcome = run.invoke(app, [str(one) for one in arguments], input=answers)
        assert outcome.exit_code == 0, outcome.output
        return outcome.output

    home, stick, secret = tmp_path / "agg", tmp_path / "stick", tmp_path / "secret"
    secret.write_text("five words drawn at random\n")
    secret.chmod(0o600)
    at, lock = ("--home", home), ("--passphrase-file", secret)
    made = typed(
        "init", "--address", "fl.example.org:8443", *lock, "--offline-authority", stick, *at
    )
    words = fingerprint_words(read_certificate(home / "identity" / "authority.pem"))
    assert words in made
    typed("invite", "north", "--out", tmp_path / "invitation", *at)
    invitation = read_invitation(tmp_path / "invitation")
    write_form(
        tmp_path / "request",
        join_request(
            invitation,
            request_pem=signing_request(KEY, "x"),
            signer_request_pem=signing_request(SIGNING, "x"),
            version="1",
        ),
    )
    out = tmp_path / "certificates"
    assert "waits" in typed("certify", tmp_path / "request", "--out", out, *at)
    assert fingerprint_words(KEY.public_key()) in typed(
        "requests", "--out", tmp_path / "requests", *at
    )
    offline = ("--authority", stick, *lock)
    no = run.invoke(
        app,
        [
            str(one)
            for one in ("sign-offline", tmp_path / "requests", *offline, "--out", tmp_path / "s")
        ],
        input="n\n",
    )
    assert no.exit_code != 0
    assert not (tmp_path / "s").exists()
    typed("sign-offline", tmp_path / "requests", *offline, "--out", tmp_path / "s", answers="y\n")
    assert "1 taken" in typed("take", tmp_path / "s", *at)
    typed("certify", tmp_path / "request", "--out", out, *at)
    read_certificates(out, invitation, KEY.public_key(), SIGNING.public_key())
    assert Registry(home / "registry.db").member("north") is not None
    # The passphrase stands in no file of the aggregator and in no output.
    for file in home.rglob("*"):
        assert not file.is_file() or b"five words" not in file.read_bytes()
    assert load_signing_key(home / "identity" / "witness-key.pem")
