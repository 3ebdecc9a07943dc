"""Members of a small consortium for tests, with the files that `init` and `join` write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import (
    new_signing_key,
    new_tls_key,
    openssh_pem,
    private_pem,
    public_pem,
    save_private,
)
from consilium_common.study import Study
from consilium_common.wire.channel import Credentials

NAME = "north-clinic"


@dataclass(frozen=True)
class JoinedSite:
    """A site that has joined, and who certified it."""

    home: SiteHome
    identity: SiteIdentity
    authority: Authority
    key: ec.EllipticCurvePrivateKey
    signer: ed25519.Ed25519PrivateKey


def joined_site(
    folder: Path,
    *,
    address: str = "127.0.0.1:1",
    authority: Authority | None = None,
    name: str = NAME,
) -> JoinedSite:
    """Return a site with the files that `site join` writes."""
    authority = authority or Authority.create("tests")
    home = SiteHome.create(folder)
    key, signer = new_tls_key(), new_signing_key()
    certificate = authority.issue(key.public_key(), Role.SITE, name)
    certified_signer = authority.issue(signer.public_key(), Role.SIGNER, name)
    save_private(home.identity / "site-key.pem", key)
    save_private(home.identity / "ledger-key.pem", signer)
    for file, content in (
        ("site-key.openssh", openssh_pem(key)),
        ("authority.pem", certificate_pem(authority.certificate)),
        ("site.pem", certificate_pem(certificate)),
        ("ledger-signer.pem", certificate_pem(certified_signer)),
        ("ledger-public.pem", public_pem(signer.public_key())),
    ):
        write_atomic(home.identity / file, content)
    # A key drawn at random would now and then leave nobody to test on.
    write_atomic(home.identity / "patient_key", bytes(range(32)))
    config = {"name": name, "consortium": "tests", "address": address}
    home.config.write_text(json.dumps(config))
    return JoinedSite(home, SiteIdentity.load(home), authority, key, signer)


def member_credentials(authority: Authority, role: Role, name: str) -> Credentials:
    """Return the credentials of a new member."""
    key = new_tls_key()
    certificate = authority.issue(key.public_key(), role, name)
    return Credentials(
        certificate_pem(authority.certificate), certificate_pem(certificate), private_pem(key)
    )


def private_study() -> Study:
    """Return a small private study."""
    return Study.model_validate(
        {
            **plain_study().to_canonical(),
            "privacy": {
                "mode": "patient",
                "sampling_rate": 0.5,
                "clip_norm": 1.0,
                "noise_multiplier": 2.0,
                "delta": 1e-3,
            },
        }
    )


def plain_study() -> Study:
    """Return a small study without privacy."""
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": "tiny",
            "task": {
                "kind": "segmentation",
                "dimensions": 3,
                "inputs": ["ct"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet", "arguments": {"channels": [4, 8], "strides": [2]}},
            "privacy": {"mode": "none"},
            "federation": {"rounds": 3},
        }
    )
