"""This site's own identity: joining a consortium, and the keys and certificates it keeps."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from consilium_client.home import SiteHome
from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import (
    Role,
    check_issued,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.invitation import read_invitation
from consilium_common.identity.keys import (
    load_signing_key,
    load_tls_key,
    new_signing_key,
    new_tls_key,
    openssh_pem,
    public_pem,
    save_private,
)
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.methods import ENROL


@dataclass(frozen=True)
class SiteConfig:
    """What `site join` learned and what the site operator may change in ``site.json``."""

    name: str
    consortium: str  #: its name, for people
    address: str  #: ``host:port`` of the aggregator
    device: str = "auto"  #: auto, cpu, cuda or cuda:N
    precision: str = "auto"  #: auto, float32 or bfloat16
    threads: int = 0  #: CPU threads of training; 0: OMP_NUM_THREADS, else all

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
    """The site's keys and certificates, checked."""

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
        folder = home.identity
        if not home.config.is_file():
            raise ConsiliumError(
                "identity.not-joined",
                "This site has not joined a consortium.",
                where=str(home.path),
                hint="Run `consilium site join INVITATION`.",
            )
        try:
            config = SiteConfig(**json.loads(home.config.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConsiliumError(
                "state.bad-config", "site.json is damaged.", where=str(home.config)
            ) from error
        authority = read_certificate(folder / "authority.pem")
        certificate = read_certificate(folder / "site.pem")
        check_issued(certificate, authority)
        load_tls_key(folder / "site-key.pem")
        return cls(config, folder, authority, certificate)

    def credentials(self) -> Credentials:
        """Return what a mutual TLS connection needs."""
        return Credentials(
            (self.folder / "authority.pem").read_bytes(),
            (self.folder / "site.pem").read_bytes(),
            (self.folder / "site-key.pem").read_bytes(),
        )

    def caller(self) -> Caller:
        """Return a connection to the aggregator for our own services."""
        return Caller(self.config.address, self.credentials())

    def signer(self) -> ed25519.Ed25519PrivateKey:
        """Return the key that signs the ledger and approvals."""
        return load_signing_key(self.folder / "ledger-key.pem")


def join(home: SiteHome, invitation_file: Path) -> SiteConfig:
    """Make this site's keys, have them certified, store the identity.

    The private keys never leave this folder; two signing requests do. Nothing is stored before the
    aggregator has answered, so a failed attempt leaves no half identity behind.

    Raises
    ------
    ConsiliumError
        ``identity.*`` of the invitation, ``network.*``, ``state.exists``.
    """
    if home.config.exists():
        raise ConsiliumError(
            "state.exists",
            "This site has joined already.",
            where=str(home.path),
            hint="Choose another folder with --home to join a second consortium.",
        )
    invitation = read_invitation(invitation_file)
    key, signer = new_tls_key(), new_signing_key()
    bootstrap = Credentials(
        invitation.authority_pem.encode(),
        invitation.certificate_pem.encode(),
        invitation.private_key_pem.encode(),
    )
    with Caller(invitation.address, bootstrap) as caller:
        answer = caller.call(
            ENROL,
            {
                "request_pem": signing_request(key, invitation.name).decode(),
                "signer_request_pem": signing_request(signer, invitation.name).decode(),
                "version": __version__,
            },
        )
    authority = load_certificate(invitation.authority_pem.encode())
    certificate_pem, signer_pem = answer["certificate_pem"], answer["signer_pem"]
    certified = check_issued(load_certificate(certificate_pem.encode()), authority)
    if certified.role is not Role.SITE or certified.public_key != key.public_key():
        raise ConsiliumError(
            "identity.bad-certificate", "The aggregator certified another key than ours."
        )
    folder = home.identity
    save_private(folder / "site-key.pem", key)
    save_private(folder / "ledger-key.pem", signer)
    # Flower reads OpenSSH's format only; it is the same key.
    write_atomic(folder / "site-key.openssh", openssh_pem(key))
    write_atomic(folder / "authority.pem", invitation.authority_pem.encode())
    write_atomic(folder / "site.pem", certificate_pem.encode())
    write_atomic(folder / "ledger-signer.pem", signer_pem.encode())
    write_atomic(folder / "ledger-public.pem", public_pem(signer.public_key()))
    config = SiteConfig(certified.name, invitation.consortium, invitation.address)
    write_atomic(home.config, json.dumps(asdict(config), indent=2).encode() + b"\n")
    return config
