"""What is signed when somebody decides something: the same canonical bytes on both sides."""

from __future__ import annotations

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import (
    Role,
    check_issued,
    load_certificate,
)
from consilium_common.identity.keys import verify_signature
from consilium_common.identity.trust import Trust


def proposal_statement(digest: str, operator: str) -> dict[str, Any]:
    """Return what an operator signs when proposing a study."""
    return {"schema": "consilium/proposal/v1", "study": digest, "operator": operator}


def approval_statement(
    digest: str, site: str, decision: str, *, cohort_size: int, evaluation_size: int, why: str
) -> dict[str, Any]:
    """Return what a site signs when it decides about a study.

    Parameters
    ----------
    cohort_size, evaluation_size : int
        Patients that the site declares in public: those it trains on, and those it evaluates on.
    """
    return {
        "schema": "consilium/approval/v1",
        "study": digest,
        "site": site,
        "decision": decision,
        "cohort_size": cohort_size,
        "evaluation_size": evaluation_size,
        "why": why,
    }


def witness_statement(site: str, sequence: int, entry_hash: str, time: str) -> dict[str, Any]:
    """Return what the aggregator signs when it has seen a site's ledger end in an entry.

    Parameters
    ----------
    sequence, entry_hash
        The entry's, as it stands in the ledger.
    time : str
        When the aggregator saw it, by its clock, in the form of the ledger's times.
    """
    return {
        "schema": "consilium/witness/v1",
        "site": site,
        "sequence": sequence,
        "hash": entry_hash,
        "time": time,
    }


def sign(key: ed25519.Ed25519PrivateKey, statement: dict[str, Any]) -> str:
    """Return the Ed25519 signature of the statement's canonical JSON, hexadecimal."""
    return key.sign(canonical_json(statement)).hex()


def check_signed(
    statement: dict[str, Any],
    signature: str,
    signer_pem: str,
    authority: x509.Certificate | Trust,
    *,
    name: str,
    role: Role,
    kept: bool = False,
) -> None:
    """Check that ``name`` of this consortium signed the statement.

    Parameters
    ----------
    role : Role
        Of the signer's certificate: a site's key signs no study, and an operator's no approval.
    kept : bool
        True for what was signed earlier: whoever took it first asked whether the signer's
        certificate was in force then, and that it has ended or was renewed since takes nothing
        back. False for what is signed now (default: False).

    Raises
    ------
    ConsiliumError
        ``identity.bad-signature``, or what :func:`check_issued` raises for the signer.
    """
    certificate = load_certificate(signer_pem.encode())
    signer = check_issued(
        certificate, authority, now=certificate.not_valid_before_utc if kept else None
    )
    key = signer.public_key
    try:
        content = bytes.fromhex(signature)
    except ValueError:
        content = b""
    if (
        signer.role is not role
        or signer.name != name
        or not isinstance(key, ed25519.Ed25519PublicKey)
        or not verify_signature(key, content, canonical_json(statement))
    ):
        raise ConsiliumError(
            "identity.bad-signature",
            f"The statement was not signed by {name!r}.",
            hint="Do not trust it; ask the person who is said to have made it.",
        )


def cosignature_statement(digest: str, operator: str) -> dict[str, Any]:
    """Return what a further operator signs of a study that needs several signatures."""
    return {"schema": "consilium/cosignature/v1", "study": digest, "operator": operator}
