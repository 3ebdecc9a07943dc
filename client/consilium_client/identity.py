"""This site's own identity: the keys and certificates it keeps, checked when they are used."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.certificates import read_certificate
from consilium_common.identity.keys import load_signing_key, load_tls_key
from consilium_common.identity.trust import Trust
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.proxy import Proxy, choose_proxy, read_login

#: ``user:password`` for the hospital's proxy, in the identity folder.
LOGIN_FILE: Final = "proxy-login"
#: Folder of an enrolment under way, and the file in it that completes it.
JOINING: Final = "joining"
ANSWER: Final = "answer.json"
#: What a site does that cannot renew its certificate any more.
JOIN_AGAIN: Final = (
    "Ask the aggregator operator for a new invitation, stop the site, and run `consilium site join"
    " --again INVITATION` with the same --home: ledger, budgets and policy stay."
)


@dataclass(frozen=True)
class SiteConfig:
    """What `site join` learned and what the site operator may change in ``site.json``."""

    name: str
    consortium: str  #: its name, for people
    address: str  #: ``host:port`` of the aggregator
    device: str = "auto"  #: auto, cpu, cuda or cuda:N
    precision: str = "auto"  #: auto, float32 or bfloat16
    threads: int = 0  #: CPU threads of training; 0: OMP_NUM_THREADS, else all
    #: Way out: none, http://host:port, or environment (HTTPS_PROXY and NO_PROXY)
    proxy: str = "none"

    def compute(self) -> dict[str, Any]:
        """Return what a :class:`~consilium_client.training.session.TrainingSession` takes of it:
        device, precision (None: the study's) and threads.
        """
        return {
            "device": self.device,
            "precision": None if self.precision == "auto" else self.precision,
            "threads": self.threads
            or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        }


@dataclass(frozen=True)
class SiteIdentity:
    """The site's keys and certificates, checked when they were loaded.

    Attributes
    ----------
    authority, certificate : Certificate
        The authority in force and the site's certificate, as they were then. What lives long
        asks :attr:`trust`, :meth:`credentials` and :meth:`current_certificate`, which follow a
        renewal and a change of the authority.
    """

    config: SiteConfig
    folder: Path
    authority: x509.Certificate
    certificate: x509.Certificate

    @classmethod
    def load(cls, home: SiteHome) -> SiteIdentity:
        """Read the identity and check that it is valid now.

        Raises
        ------
        ConsiliumError
            ``identity.not-joined``, ``identity.expired`` and others of ``identity.*``.
        """
        complete_join(home)
        folder = home.identity
        if not home.config.is_file():
            raise ConsiliumError(
                "identity.not-joined",
                "This site has not joined a consortium.",
                where=str(home.path),
                hint="Run `consilium site join INVITATION`.",
            )
        config = read_config(home)
        trust = Trust.read(folder / "authority.pem")
        certificate = read_certificate(folder / "site.pem")
        try:
            trust.check(certificate)
        except ConsiliumError as error:
            if error.code == "identity.expired":
                error.hint = JOIN_AGAIN
            raise
        key = load_tls_key(folder / "site-key.pem")
        if key.public_key() != certificate.public_key():
            raise ConsiliumError(
                "identity.bad-key",
                "The site's private key is not its certificate's.",
                where=str(folder),
                hint="Restore both from the same backup, or join again with a new invitation.",
            )
        for name in ("site-key.openssh", "ledger-key.pem", LOGIN_FILE):
            refuse_exposed(folder / name)
        return cls(config, folder, trust.authorities[0], certificate)

    @property
    def trust(self) -> Trust:
        """Whom this site trusts now."""
        return Trust.read(self.folder / "authority.pem")

    def current_certificate(self) -> x509.Certificate:
        """Read the certificate that is in force now."""
        return read_certificate(self.folder / "site.pem")

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Return what differs when certificates on disk were replaced; costs two looks at files."""
        found = [(self.folder / name).stat() for name in ("site.pem", "authority.pem")]
        return tuple((status.st_mtime_ns, status.st_ino, status.st_size) for status in found)

    def credentials(self) -> Credentials:
        """Return what a mutual TLS connection needs, as it stands on disk now."""
        return Credentials(
            self.trust.tls_pem(),
            (self.folder / "site.pem").read_bytes(),
            (self.folder / "site-key.pem").read_bytes(),
        )

    def proxy(self) -> Proxy | None:
        """Return the way out of the hospital's network; None: straight."""
        login = read_login(self.folder / LOGIN_FILE)
        return choose_proxy(self.config.proxy, self.config.address, login=login)

    def caller(self) -> Caller:
        """Return a connection to the aggregator for our own services; it follows renewals."""
        return Caller(self.config.address, self.credentials, self.proxy())

    def signer(self) -> ed25519.Ed25519PrivateKey:
        """Return the key that signs the ledger and approvals."""
        return load_signing_key(self.folder / "ledger-key.pem")


def read_config(home: SiteHome) -> SiteConfig:
    """Read ``site.json``, or raise ``state.bad-config``."""
    try:
        return SiteConfig(**json.loads(home.config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConsiliumError(
            "state.bad-config", "site.json is damaged.", where=str(home.config)
        ) from error


def complete_join(home: SiteHome) -> bool:
    """Put an answered enrolment in place, also one that a crash interrupted; whether there was one.

    The answer is one file, written whole: until it is there nothing has changed, and from then on
    every file of the identity follows from it, however often this is tried.
    """
    folder = home.path / JOINING
    answer = folder / ANSWER
    if not answer.is_file():
        return False
    try:
        content = json.loads(answer.read_text(encoding="utf-8"))
        files = {str(name): str(text).encode() for name, text in content["files"].items()}
        config = json.dumps(content["config"], indent=2).encode() + b"\n"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConsiliumError(
            "state.bad-config",
            "The stored answer to this site's enrolment is damaged.",
            where=str(answer),
            hint="Restore it from your backup; else remove that folder and ask the aggregator"
            " operator for a new invitation.",
        ) from error
    for name, text in files.items():
        write_atomic(home.identity / name, text)
    write_atomic(home.config, config)
    shutil.rmtree(folder)
    return True


def refuse_exposed(path: Path) -> None:
    """Refuse a secret that other users of this machine can read: ``identity.key-exposed``."""
    if path.exists() and path.stat().st_mode & 0o077:
        raise ConsiliumError(
            "identity.key-exposed",
            "The file holds a secret and can be read by other users of this machine.",
            where=str(path),
            hint=f"Run `chmod 600 {path}`; if others may have read it, ask for a new identity.",
        )
