"""Replacing keys while the consortium works: the server's, and the authority itself.

A new authority is trusted beside the old one until every member knows it and has a certificate of
it. Members follow it by themselves, because the old authority certifies the new one's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.identity.authority import (
    Authority,
    certificate_pem,
    signing_request,
)
from consilium_common.identity.certificates import Role, load_certificate, read_certificate
from consilium_common.identity.keys import (
    load_tls_key,
    new_tls_key,
    private_pem,
    save_private,
)
from consilium_common.identity.trust import Trust, key_of
from consilium_server.changing import changing_keys
from consilium_server.home import ServerHome
from consilium_server.issuing import (
    AGGREGATOR,
    AtHand,
    Issuer,
    authority_here,
    load_issuer,
    renew_operator,
    renew_own,
    server_hosts,
)
from consilium_server.pairs import install_pair
from consilium_server.registry import Registry
from consilium_server.waiting import withdraw
from consilium_server.witness import WITNESS_NAME


@dataclass(frozen=True)
class Custody:
    """Where the authority's key is, and what opens it."""

    home: ServerHome
    passphrase: bytes | None = None
    #: Folder of an offline authority; None: the key lies in the aggregator's home.
    offline: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder with ``authority-key.pem``."""
        return self.offline or self.home.identity

    def authority(self) -> Authority:
        """Open the authority in force, and check that it is the aggregator's.

        Raises
        ------
        ConsiliumError
            ``identity.no-key`` and others; ``identity.wrong-authority``.
        """
        if not (self.folder / "authority-key.pem").exists():
            raise ConsiliumError(
                "identity.no-key",
                "The authority's key is not here.",
                where=str(self.folder),
                hint="It is kept offline: give its folder with --authority.",
            )
        authority = (
            authority_here(self.home, self.passphrase)
            if self.offline is None
            else Authority.load(self.offline, self.passphrase)
        )
        trust = Trust.read(self.home.identity / "authority.pem")
        if key_of(authority.certificate) != key_of(trust.authorities[0]):
            raise ConsiliumError(
                "identity.wrong-authority",
                "This is not the authority in force here.",
                where=str(self.folder),
                hint="Give the folder of the newest authority of this consortium.",
            )
        return authority


def rotate_server(home: ServerHome, issuer: Issuer) -> bool:
    """Give the server a new key and certificate; a running aggregator takes them by itself.

    Returns
    -------
    bool
        False while the new key waits for the offline authority; the old one serves until then.

    Raises
    ------
    ConsiliumError
        ``state.running`` while another process changes keys.
    """
    with changing_keys(home):
        return _rotate_server(home, issuer)


def _rotate_server(home: ServerHome, issuer: Issuer) -> bool:
    folder = home.identity
    key = new_tls_key()
    withdraw(Registry(home.database), AGGREGATOR)
    issued = issuer.issue(
        AGGREGATOR,
        Role.SERVER,
        signing_request(key, AGGREGATOR),
        None,
        hosts=server_hosts(read_certificate(folder / "server.pem")),
    )
    if issued is None:
        save_private(folder / "server-waiting-key.pem", key)
        return False
    (folder / "server-waiting-key.pem").unlink(missing_ok=True)
    install_pair(folder, "server", private_pem(key), issued.certificate_pem.encode())
    return True


def rotate_authority(custody: Custody, keep_in: Path | None = None) -> Trust:
    """Make the next authority; old and new are trusted until :func:`finish_rotation`.

    Parameters
    ----------
    keep_in : Path, optional
        New folder for an offline authority's next key; must be given exactly where the key in
        force is offline.

    Raises
    ------
    ConsiliumError
        ``identity.rotation-open`` while a rotation is not finished, ``state.running`` while
        another process changes keys, and what :meth:`Custody.authority` raises.
    """
    with changing_keys(custody.home):
        return _rotate_authority(custody, keep_in)


def _rotate_authority(custody: Custody, keep_in: Path | None) -> Trust:
    home, folder = custody.home, custody.home.identity
    trust = Trust.read(folder / "authority.pem")
    if len(trust.authorities) > 1:
        raise ConsiliumError(
            "identity.rotation-open",
            "A new authority was made already, and not all is moved to it.",
            where=str(folder),
            hint="Finish with `consilium server rotate authority --finish`.",
        )
    if (keep_in is None) is not (custody.offline is None):
        raise ConsiliumError(
            "usage.authority",
            "An authority stays where it is kept: here, or offline.",
            hint="Give --authority OLD_FOLDER and --offline-authority NEW_FOLDER together.",
        )
    old = custody.authority()
    new = old.successor()
    bundle = Trust((new.certificate, old.certificate), trust.former)
    if keep_in is not None:
        kept = offline_folder(keep_in, home)
        new.save(kept, custody.passphrase)
        # It has to know the aggregator's witness, whom the old one certified.
        write_atomic(kept / "authority.pem", bundle.pem(), mode=0o644)
    crossing = folder / "authority-cross.pem"
    vouched = crossing.read_bytes() if crossing.exists() else b""
    write_atomic(crossing, vouched + certificate_pem(old.cross_certify(new)), mode=0o644)
    if keep_in is None:
        save_private(folder / "authority-old-key.pem", old.key, custody.passphrase)
        install_pair(folder, "authority", private_pem(new.key, custody.passphrase), bundle.pem())
    else:
        write_atomic(folder / "authority.pem", bundle.pem(), mode=0o644)
    # By the new key itself, which is at hand now even where it is kept offline from here on.
    renew_operator(home, AtHand(new))
    return bundle


def finish_rotation(custody: Custody, *, force: bool = False, distrust: bool = False) -> list[str]:
    """Trust the new authority alone.

    What the old one certified for signing still proves signatures of its time.

    Parameters
    ----------
    force : bool
        Go on although members have no certificate of the new authority yet: they are out, and
        need a new invitation.
    distrust : bool
        The old key may be in other hands: nothing that it certified proves anything any more,
        and studies that were signed under it must be proposed again.

    Returns
    -------
    list of str
        Members that are out.

    Raises
    ------
    ConsiliumError
        ``identity.no-rotation``; ``identity.rotation-unfinished`` names the members that are not
        ready; ``state.running`` while another process changes keys.
    """
    with changing_keys(custody.home):
        return _finish_rotation(custody, force=force, distrust=distrust)


def _finish_rotation(custody: Custody, *, force: bool, distrust: bool) -> list[str]:
    home, folder = custody.home, custody.home.identity
    trust = Trust.read(folder / "authority.pem")
    if len(trust.authorities) < 2:
        raise ConsiliumError(
            "identity.no-rotation",
            "No rotation of the authority is under way.",
            where=str(folder),
            hint="Begin one with `consilium server rotate authority`.",
        )
    new = custody.authority()
    if not trust.in_force(read_certificate(folder / "operator.pem")):
        # Cut short when the rotation began: its keys lie here, it needs no invitation.
        renew_operator(home, AtHand(new))
    behind = members_behind(Registry(home.database), trust)
    if behind and not force:
        raise ConsiliumError(
            "identity.rotation-unfinished",
            f"Not all members have a certificate of the new authority yet: {', '.join(behind)}.",
            hint="They get it by themselves when they connect. With --force they are out, and"
            " need a new invitation.",
        )
    if (folder / "enrolment-key.pem").exists():
        write_enrolment(folder, new)
    former = () if distrust else _retired(new, trust)
    server = read_certificate(folder / "server.pem")
    renewed = new.issue(
        load_tls_key(folder / "server-key.pem").public_key(),
        Role.SERVER,
        AGGREGATOR,
        hosts=server_hosts(server),
    )
    write_atomic(folder / "server.pem", certificate_pem(renewed))
    witness = read_certificate(folder / "witness.pem").public_key()
    write_atomic(folder / "witness.pem", certificate_pem(_witness(new, witness)), mode=0o644)
    # The bundle last: until it is written all of this can be done again.
    write_atomic(folder / "authority.pem", Trust((new.certificate,), former).pem(), mode=0o644)
    (folder / "authority-old-key.pem").unlink(missing_ok=True)
    renew_own(home, load_issuer(home, custody.passphrase))
    return behind


def members_behind(registry: Registry, trust: Trust) -> list[str]:
    """Return the active members whose certificate in force is not of the newest authority.

    The certificate in force is one that its holder has used, so a member that has one of the new
    authority knows that authority.
    """
    return [
        member.name
        for member in registry.members()
        if member.status == "active"
        and not trust.in_force(load_certificate(member.certificate_pem.encode()))
    ]


def offline_folder(path: Path, home: ServerHome) -> Path:
    """Make the new, private folder for an authority that is kept offline.

    Raises
    ------
    ConsiliumError
        ``state.exists`` when there is something in it; ``usage.authority`` inside the
        aggregator's own folder.
    """
    resolved = path.expanduser().resolve()
    if resolved == home.path or home.path in resolved.parents:
        raise ConsiliumError(
            "usage.authority",
            "The offline authority's folder lies in the aggregator's own.",
            where=str(resolved),
            hint="Give a folder on a medium that you take away.",
        )
    if resolved.is_dir() and any(resolved.iterdir()):
        raise ConsiliumError(
            "state.exists",
            "There is something in the folder already.",
            where=str(resolved),
            hint="Give a new, empty folder for the authority's key.",
        )
    return private_folder(resolved)


def write_enrolment(folder: Path, authority: Authority) -> None:
    """Let the enrolment key in ``folder`` certify invitations; make it where there is none."""
    key_file = folder / "enrolment-key.pem"
    if not key_file.exists():
        save_private(key_file, new_tls_key())
    certificate = authority.issue_enrolment(load_tls_key(key_file).public_key())
    write_atomic(folder / "enrolment.pem", certificate_pem(certificate), mode=0o644)


def _retired(new: Authority, trust: Trust) -> tuple[x509.Certificate, ...]:
    """Certify anew, by the new authority, what older ones certified for signing."""
    ended = [new.retire(former, ended=former.not_valid_after_utc) for former in trust.former]
    return (*(new.retire(old) for old in trust.authorities[1:]), *ended)


def _witness(authority: Authority, key: object) -> x509.Certificate:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    assert isinstance(key, Ed25519PublicKey)
    lifetime = authority.certificate.not_valid_after_utc - datetime.now(UTC)
    return authority.issue(key, Role.WITNESS, WITNESS_NAME, lifetime=lifetime)
