"""Keys are replaced while the consortium works, and a crash leaves what works."""

from __future__ import annotations

import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
from issuing_samples import HOUR, KEY, SECRET, SIGNING, code_of, join, request_file, requests_of
from typer.testing import CliRunner

from consilium_common.audit.documents import judging
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, load_certificate, read_certificate
from consilium_common.identity.enrolment import read_certificates
from consilium_common.identity.keys import is_locked, load_tls_key
from consilium_common.identity.trust import Trust
from consilium_server import members
from consilium_server.acts import acts_of
from consilium_server.certifying import certify
from consilium_server.changing import changing_keys
from consilium_server.cli import app
from consilium_server.home import ServerHome
from consilium_server.issuing import (
    HomeIssuer,
    Issuer,
    load_issuer,
    renew_server_if_due,
)
from consilium_server.locking import lock_authority
from consilium_server.registry import Registry
from consilium_server.rotation import Custody, finish_rotation, rotate_authority, rotate_server


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """Return the home of a new aggregator, its authority's key open."""
    server = ServerHome.create(tmp_path / "aggregator")
    members.initialise(server, "tests", "fl.example.org:8443")
    return server


def renew(home: ServerHome, issuer: Issuer, name: str) -> None:
    """Renew a site's certificate and use it once."""
    issued = issuer.issue(name, Role.SITE, *requests_of(Role.SITE))
    assert issued is not None
    serial = f"{load_certificate(issued.certificate_pem.encode()).serial_number:x}"
    registry = Registry(home.database)
    with registry.transaction() as session:
        member = session.get_one(members.Member, name)
        member.next_serial, member.next_certificate_pem = serial, issued.certificate_pem
        member.next_signer_pem = issued.signer_pem
    registry.promote(name, serial)


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_the_authority_is_replaced_while_everybody_goes_on(
    tmp_path: Path, passphrase: bytes | None
) -> None:
    home = ServerHome.create(tmp_path / "aggregator")
    founder = members.initialise(home, "tests", "fl.example.org:8443", passphrase=passphrase)
    running = HomeIssuer(home, passphrase)
    site_trust = running.trust
    join(home, running, tmp_path, "north")
    custody = Custody(home, passphrase)
    assert code_of(finish_rotation, custody) == "identity.no-rotation"
    pending = members.invite(home, "south", HOUR)

    trust = rotate_authority(custody)
    assert running.trust.authorities == trust.authorities  # a running aggregator follows
    assert trust.consortium == founder.consortium
    assert code_of(rotate_authority, custody) == "identity.rotation-open"
    server = read_certificate(home.identity / "server.pem")
    assert site_trust.check(server).role is Role.SERVER  # who knows the old one alone gets in
    assert renew_server_if_due(home, running, moment=server.not_valid_after_utc)
    assert site_trust.check(read_certificate(home.identity / "server.pem"))
    cross = running.cross_pem
    assert cross is not None
    followed = site_trust.follow(running.trust.pem(), cross.encode())
    # An invitation from before still works, and the old member is told to renew.
    certify(home, running, request_file(tmp_path, pending), tmp_path / "south")
    read_certificates(tmp_path / "south", pending, KEY.public_key(), SIGNING.public_key())
    old = Registry(home.database).member("north")
    assert old is not None
    assert followed.wants_renewal(load_certificate(old.certificate_pem.encode()))

    with pytest.raises(ConsiliumError, match="north") as caught:
        finish_rotation(custody)
    assert caught.value.code == "identity.rotation-unfinished"
    assert "south" not in caught.value.message
    renew(home, running, "north")
    assert finish_rotation(custody) == []
    after = running.trust
    assert len(after.authorities) == 1
    assert not (home.identity / "authority-old-key.pem").exists()
    assert followed.follow(after.pem(), cross.encode()) == Trust.load(after.pem())
    for name, role in (("server", Role.SERVER), ("witness", Role.WITNESS)):
        assert after.check(read_certificate(home.identity / f"{name}.pem")).role is role
    # What was signed under the old authority still proves; its TLS certificates open nothing.
    signer = load_certificate(old.signer_pem.encode())
    assert after.check(signer).role is Role.SIGNER
    code = code_of(after.check, load_certificate(old.certificate_pem.encode()))
    assert code == "identity.authority-retired"
    join(home, running, tmp_path, "east")

    # The same again: what the first authority certified for signing still proves.
    rotate_authority(custody)
    assert finish_rotation(custody, force=True) == ["east", "north", "south"]
    assert len(running.trust.former) == 2
    assert running.trust.check(signer).role is Role.SIGNER
    assert followed.follow(running.trust.pem(), str(running.cross_pem).encode()) == Trust.load(
        running.trust.pem()
    )
    # Whoever knows the authority of today judges documents from before.
    today = home.identity / "authority.pem"
    assert judging(site_trust.pem(), today, where="") == Trust.read(today)


def test_members_that_are_not_ready_are_out_only_by_force_and_a_stolen_key_proves_nothing(
    home: ServerHome, tmp_path: Path
) -> None:
    issuer = load_issuer(home)
    join(home, issuer, tmp_path, "north")
    join(home, issuer, tmp_path, "gone")
    members.revoke(home, "gone")
    north = Registry(home.database).member("north")
    assert north is not None
    custody, old = Custody(home), issuer.trust.pem()
    rotate_authority(custody)
    assert finish_rotation(custody, force=True, distrust=True) == ["north"]
    signer = load_certificate(north.signer_pem.encode())
    assert code_of(issuer.trust.check, signer) == "identity.foreign"
    assert judging(old, home.identity / "authority.pem", where="") is None
    # A third authority keeps the consortium's identifier, and the first one is past for good.
    assert rotate_authority(custody).consortium == issuer.trust.consortium


def test_whoever_changes_keys_keeps_every_other_change_waiting(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, custody = load_issuer(home), Custody(home)
    server = read_certificate(home.identity / "server.pem")
    before = {path.name: path.read_bytes() for path in home.identity.iterdir()}
    acts = (
        lambda: rotate_server(home, issuer),
        lambda: rotate_authority(custody),
        lambda: finish_rotation(custody, force=True),
        lambda: lock_authority(custody, SECRET),
        lambda: renew_server_if_due(home, issuer, moment=server.not_valid_after_utc),
    )
    with monkeypatch.context() as patch:
        patch.setattr("consilium_server.changing.WAIT_SECONDS", 0.0)
        with changing_keys(home):
            assert [code_of(act) for act in acts] == ["state.running"] * len(acts)
    assert before == {path.name: path.read_bytes() for path in home.identity.iterdir()}
    # Whoever waits gets its turn, and of two that begin a rotation one is told that it is open.
    holding = threading.Event()

    def hold() -> None:
        with changing_keys(home):
            holding.set()
            time.sleep(0.3)
            assert len(Trust.read(home.identity / "authority.pem").authorities) == 1

    outcomes: list[str] = []

    def begin() -> None:
        try:
            rotate_authority(custody)
            outcomes.append("begun")
        except ConsiliumError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=one) for one in (hold, begin, begin)]
    threads[0].start()
    assert holding.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["begun", "identity.rotation-open"]
    assert len(Trust.read(home.identity / "authority.pem").authorities) == 2


def test_an_open_authority_is_locked_later_and_invites_on_without_its_passphrase(
    home: ServerHome, tmp_path: Path
) -> None:
    running = load_issuer(home)
    assert running.issue("early", Role.SITE, *requests_of(Role.SITE))
    key, secret = home.identity / "authority-key.pem", tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")
    secret.chmod(0o600)

    def typed(*arguments: object) -> tuple[int, str]:
        words = ["lock-authority", *map(str, arguments), "--home", str(home.path)]
        outcome = CliRunner().invoke(app, words)
        return outcome.exit_code, outcome.output

    (tmp_path / "short").write_bytes(b"hush\n")
    (tmp_path / "short").chmod(0o600)
    status, said = typed("--new-passphrase-file", tmp_path / "short")
    assert (status, is_locked(key)) == (5, False)
    assert "identity.weak-passphrase" in said
    status, said = typed("--new-passphrase-file", secret)
    assert (status, is_locked(key)) == (0, True), said
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert code_of(load_issuer, home) == "identity.passphrase-needed"
    assert load_issuer(home, SECRET).issue("north", Role.SITE, *requests_of(Role.SITE))
    # A running aggregator goes on as it was started; inviting needs no passphrase.
    assert running.issue("north", Role.SITE, *requests_of(Role.SITE))
    invitation = members.invite(home, "south", HOUR)
    certify(home, load_issuer(home, SECRET), request_file(tmp_path, invitation), tmp_path / "south")
    assert acts_of(home).document(running.trust)["content"]["entries"][-1]["act"] == "lock"

    # Another passphrase takes the one before, and only that.
    custody = Custody(home, b"a wrong passphrase")
    assert code_of(lock_authority, custody, b"the next passphrase") == "identity.wrong-passphrase"
    (tmp_path / "next").write_bytes(b"the next passphrase\n")
    (tmp_path / "next").chmod(0o600)
    status, said = typed("--passphrase-file", secret, "--new-passphrase-file", tmp_path / "next")
    assert status == 0, said
    assert code_of(load_issuer, home, SECRET) == "identity.wrong-passphrase"
    # While the key before lies here too, nothing is locked by halves.
    later = Custody(home, b"the next passphrase")
    rotate_authority(later)
    assert code_of(lock_authority, later, SECRET) == "identity.rotation-open"


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("what", ["server", "begin", "finish"])
def test_killed_before_any_of_its_writes_a_rotation_leaves_what_works_and_can_be_done_again(
    home: ServerHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    replace = Path.replace
    if what == "finish":
        rotate_authority(Custody(home))
    for writes in range(20):
        copy = ServerHome(tmp_path / f"{writes}")
        shutil.copytree(home.path, copy.path)
        left = [writes]

        def dying(self: Path, target: Path, left: list[int] = left) -> Path:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return replace(self, target)

        def rotate(copy: ServerHome = copy) -> None:
            if what == "server":
                rotate_server(copy, load_issuer(copy))
            elif what == "begin":
                rotate_authority(Custody(copy))
            else:
                finish_rotation(Custody(copy), force=True)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            try:
                rotate()
                done = True
            except Killed:
                done = False
        issuer = load_issuer(copy)
        folder = copy.identity
        for name, role in (("server", Role.SERVER), ("operator", Role.OPERATOR)):
            certificate = read_certificate(folder / f"{name}.pem")
            assert issuer.trust.check(certificate).role is role
            assert certificate.public_key() == load_tls_key(folder / f"{name}-key.pem").public_key()
        witness = read_certificate(folder / "witness.pem")
        assert issuer.trust.check(witness).role is Role.WITNESS
        assert issuer.issue("north", Role.SITE, *requests_of(Role.SITE))
        members.invite(copy, "north", HOUR)
        if done:
            assert writes > 2
            return
        # Begun again it ends: where it had gone far enough, there is nothing left to do.
        try:
            rotate()
        except ConsiliumError as error:
            assert error.code in {"identity.rotation-open", "identity.no-rotation"}
    raise AssertionError("it never ended")
