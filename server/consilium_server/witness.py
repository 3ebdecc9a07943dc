"""The witness: countersigns the heads of the sites' ledgers, so that no history can be rewritten.

A site sends the hash and the signature of each of its ledger's entries, never the entry. What was
countersigned once is kept for good; a site that shows another entry under the same number has
rewritten its ledger, and that is an alarm.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import select

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import (
    Role,
    check_issued,
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.keys import load_signing_key, new_signing_key, save_private
from consilium_common.ledger.entries import Entry, Head, is_hexadecimal, public_hex, time_text
from consilium_common.ledger.witness import WitnessRecord
from consilium_common.wire.statements import sign, witness_statement
from consilium_server.registry import Registry
from consilium_server.tables import Witnessed

#: Name in the witness's certificate.
WITNESS_NAME: Final = "aggregator"
#: Heads of one call: a site that was away longer catches up in several.
MAX_HEADS: Final = 500


@dataclass(frozen=True)
class SignedHead:
    """An entry's number and hash, and the site's signature of it."""

    head: Head
    signature: str


@dataclass(frozen=True)
class WitnessKey:
    """The aggregator's Ed25519 key that countersigns, and its certificate."""

    key: Ed25519PrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        """The certificate as PEM."""
        return certificate_pem(self.certificate).decode()

    @classmethod
    def ensure(cls, folder: Path, authority: Authority) -> WitnessKey:
        """Read the key and its certificate from ``folder``; make what is missing.

        The key is made once. Its certificate holds as long as the authority's: a record must
        verify years later.
        """
        key_file, certificate_file = folder / "witness-key.pem", folder / "witness.pem"
        if not key_file.exists():
            if certificate_file.exists():
                raise ConsiliumError(
                    "identity.no-key",
                    "The witness's key is gone, and its certificate is there.",
                    where=str(key_file),
                    hint="Restore it from your backup: sites know the aggregator by this key.",
                )
            save_private(key_file, new_signing_key())
        key = load_signing_key(key_file)
        if not certificate_file.exists():
            certificate = authority.issue(
                key.public_key(),
                Role.WITNESS,
                WITNESS_NAME,
                lifetime=authority.certificate.not_valid_after_utc - datetime.now(UTC),
            )
            write_atomic(certificate_file, certificate_pem(certificate), mode=0o644)
        certificate = read_certificate(certificate_file)
        certified = check_issued(certificate, authority.certificate)
        if certified.role is not Role.WITNESS or certified.public_key != key.public_key():
            raise ConsiliumError(
                "identity.bad-certificate",
                "The witness's certificate is not of its key.",
                where=str(certificate_file),
                hint="Restore both files from the same backup.",
            )
        return cls(key, certificate)


class Witness:
    """Countersigns and keeps what it countersigned.

    Parameters
    ----------
    registry : Registry
        Where records and alarms are kept for good.
    """

    def __init__(self, registry: Registry, key: WitnessKey) -> None:
        self._registry = registry
        self._key = key
        self._lock = threading.Lock()

    @property
    def key(self) -> WitnessKey:
        """The key that countersigns; it signs the audit log and records too."""
        return self._key

    def countersign(self, site: str, signer_pem: str, heads: object) -> dict[str, Any]:
        """Countersign the heads of one site's ledger.

        Parameters
        ----------
        site : str
            Who calls, by its certificate.
        signer_pem : str
            Certificate of the key that signs this site's ledger.
        heads : list of dict
            ``{"sequence", "hash", "signature"}``, contiguous, at most :data:`MAX_HEADS`. An
            empty list asks only what is known.

        Returns
        -------
        dict
            ``records`` of these heads, ``witness_pem``, and ``known``: the last sequence that is
            witnessed, -1 for none. A head that was witnessed before gets the record of then.

        Raises
        ------
        ConsiliumError
            ``privacy.witness-form``, ``privacy.witness-signature``, ``privacy.witness-gap`` with
            the sequence wanted, ``privacy.witness-conflict`` where history was rewritten.
        """
        wanted = _read_heads(heads)
        signer = describe(load_certificate(signer_pem.encode())).public_key
        assert isinstance(signer, Ed25519PublicKey)  # enrolment certifies no other for signing
        for one in wanted:
            if not _signed_by(signer, site, one):
                raise ConsiliumError(
                    "privacy.witness-signature",
                    f"Entry {one.head.sequence} is not signed by the ledger key of {site!r}.",
                    hint="The key is the one that was certified when the site joined.",
                )
        # One at a time: what is known must not change between looking and writing.
        with self._lock:
            return self._store(site, public_hex(signer), wanted)

    def _store(self, site: str, ledger: str, wanted: Sequence[SignedHead]) -> dict[str, Any]:
        with self._registry.transaction() as session:
            of_site = select(Witnessed).where(Witnessed.site == site)
            of_ledger = of_site.where(Witnessed.ledger == ledger)
            last = session.scalars(of_ledger.order_by(Witnessed.sequence.desc()).limit(1)).first()
            known = last.sequence if last is not None else -1
            numbers = [one.head.sequence for one in wanted]
            before = {
                row.sequence: row
                for row in session.scalars(of_ledger.where(Witnessed.sequence.in_(numbers)))
            }
            former = None
            if known < 0 and wanted:
                former = session.scalars(of_site.order_by(Witnessed.id.desc()).limit(1)).first()
        for one in wanted:
            row = before.get(one.head.sequence)
            if row is not None and row.hash != one.head.hash:
                raise self._conflict(site, one.head, row.hash)
        if wanted and numbers[0] > known + 1:
            raise _gap(known + 1, f"begin with entry {numbers[0]}")
        if former is not None:
            self._registry.raise_alarm(
                site,
                "privacy.witness-new-ledger",
                f"A new ledger was begun under a new key; the one before was witnessed up to entry"
                f" {former.sequence}. What patients spent by it is not in the new one.",
            )
        records: list[dict[str, Any]] = []
        with self._registry.transaction() as session:
            for one in wanted:
                row = before.get(one.head.sequence)
                if row is None:
                    row = Witnessed(
                        site=site,
                        ledger=ledger,
                        sequence=one.head.sequence,
                        hash=one.head.hash,
                        record=self._record(site, one.head),
                    )
                    session.add(row)
                records.append(row.record)
        last_sent = numbers[-1] if numbers else -1
        return {
            "records": records,
            "witness_pem": self._key.pem,
            "known": max(known, last_sent),
        }

    def _record(self, site: str, head: Head) -> dict[str, Any]:
        time = time_text(datetime.now(UTC))
        statement = witness_statement(site, head.sequence, head.hash, time)
        return WitnessRecord(site, head, time, sign(self._key.key, statement)).to_dict()

    def _conflict(self, site: str, head: Head, known: str) -> ConsiliumError:
        message = (
            f"The site shows entry {head.sequence} of its ledger with hash {head.hash}, and it was"
            f" witnessed with hash {known}: its history was rewritten."
        )
        self._registry.raise_alarm(site, "privacy.witness-conflict", message)
        return ConsiliumError(
            "privacy.witness-conflict",
            message,
            hint="Train on no more until the site's ledger is restored from its backup; speak with"
            " the site's privacy officer.",
        )


def _read_heads(heads: object) -> list[SignedHead]:
    if not isinstance(heads, list) or len(heads) > MAX_HEADS:
        raise _form(f"it is not a list of at most {MAX_HEADS} heads")
    found: list[SignedHead] = []
    for value in heads:
        if not isinstance(value, dict) or set(value) != {"sequence", "hash", "signature"}:
            raise _form("a head has other keys than sequence, hash and signature")
        sequence = value["sequence"]
        if type(sequence) is not int or not 0 <= sequence < 2**53:
            raise _form("a sequence is not a number from 0 up")
        if not is_hexadecimal(value["hash"], 64) or not is_hexadecimal(value["signature"], 128):
            raise _form("a hash or a signature is not hexadecimal")
        if found and sequence != found[-1].head.sequence + 1:
            raise _gap(found[-1].head.sequence + 1, f"go on with entry {sequence}")
        found.append(SignedHead(Head(sequence, value["hash"]), value["signature"]))
    return found


def _signed_by(key: Ed25519PublicKey, site: str, one: SignedHead) -> bool:
    # The signature is of the hash alone, so the rest of the entry need not be known here.
    bare = Entry(one.head.sequence, "", "", site, "", {}, one.head.hash, one.signature)
    return bare.signed_by(key)


def _form(what: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.witness-form",
        f"The request to witness is not valid: {what}.",
        hint="Site and aggregator may run releases that do not fit; update the older one.",
    )


def _gap(wanted: int, found: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.witness-gap",
        f"The next entry to witness is {wanted}, and the heads sent {found}.",
        hint=f"Send the heads from entry {wanted} on.",
    )
