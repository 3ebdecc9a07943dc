"""A ledger to audit with the keys to judge it: an evidence folder, or a file and a public key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium_common.audit.documents import (
    Egress,
    issued,
    judging,
    read_egress,
    read_json,
    signing_key,
)
from consilium_common.audit.receipts import Receipt, read_receipts_file
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from consilium_common.identity.certificates import Certified
    from consilium_common.identity.trust import Trust
    from consilium_common.study.schema import Study

LEDGER: Final = "ledger.jsonl"
KEY: Final = "ledger-public.pem"
SIGNER: Final = "ledger-signer.pem"
AUTHORITY: Final = "authority.pem"
WITNESS: Final = "witness.pem"
EGRESS: Final = "egress.json"
RECEIPTS: Final = "receipts.jsonl"
STUDIES: Final = "studies"


@dataclass(frozen=True)
class Evidence:
    """What one audit stands on; nothing of the ledger itself is verified yet.

    Parameters
    ----------
    ledger : Path
        An export, or a ledger's SQLite file.
    key : Ed25519PublicKey
        The site's ledger key.
    witness : Ed25519PublicKey or None
        The aggregator's witness key; None where it is not known.
    folder : Path or None
        The evidence folder it came in.
    trust, signer
        With a folder: the consortium's authorities, and whom one certified for the ledger key.
    egress : Egress or None
        What the site says it stored to send.
    receipts : tuple of Receipt or None
        Receipts of what left, chain and signatures checked; None in evidence that was made before
        there were receipts.
    studies : mapping
        Digest to study, as far as the documents are at hand.
    """

    ledger: Path
    key: Ed25519PublicKey
    witness: Ed25519PublicKey | None = None
    folder: Path | None = None
    trust: Trust | None = None
    signer: Certified | None = None
    egress: Egress | None = None
    receipts: tuple[Receipt, ...] | None = None
    studies: Mapping[str, Study] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """What the auditor named."""
        return str(self.folder or self.ledger)

    @property
    def taken(self) -> str | None:
        """When the site says it began to gather it; None where it does not say."""
        return None if self.egress is None else self.egress.written_at


def open_evidence(
    path: Path,
    *,
    key: Path | None = None,
    witness: Path | None = None,
    authority: Path | None = None,
    studies: Iterable[Path] = (),
) -> Evidence:
    """Read an evidence folder, or name a ledger file with its key.

    Parameters
    ----------
    path : Path
        An evidence folder, an exported ``.jsonl``, or a ledger's SQLite file.
    key : Path, optional
        The site's public ledger key, known from elsewhere. A folder must then agree with it; a
        file needs it.
    witness : Path, optional
        The aggregator's witness key or certificate, known from elsewhere.
    authority : Path, optional
        The consortium's authority certificate, known from elsewhere; a folder must be its own.
    studies : iterable of Path, optional
        Study documents besides those of the folder.

    Raises
    ------
    ConsiliumError
        ``usage.keys`` (a file without a key), ``privacy.evidence-incomplete``,
        ``privacy.evidence-mismatch`` (parts that contradict each other), ``identity.…`` for
        keys and certificates, ``privacy.evidence-read``, ``privacy.evidence-form`` and
        ``privacy.receipts-broken``.
    """
    known = {study.digest: study for study in map(_study_file, studies)}
    given = None if key is None else read_key(key)
    attests = None if witness is None else read_key(witness)
    if path.is_dir():
        return _folder(path, given, attests, authority, known)
    if given is None:
        raise ConsiliumError(
            "usage.keys",
            "A ledger file is verified with its site's public key.",
            where=str(path),
            hint="Add --key PUBLIC.pem, or give the whole evidence folder.",
        )
    return Evidence(ledger=path, key=given, witness=attests, studies=known)


def read_key(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key from a PEM file, a certificate or the bare key.

    Raises
    ------
    ConsiliumError
        ``identity.no-key``, ``identity.bad-key``.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: object = None
    try:
        content = path.read_bytes()
        if b"BEGIN CERTIFICATE" in content:
            found = x509.load_pem_x509_certificate(content).public_key()
        else:
            found = load_pem_public_key(content)
    except OSError as error:
        raise ConsiliumError(
            "identity.no-key",
            f"Cannot read the public key: {error.strerror or error}.",
            where=str(path),
            hint="Ask the site for its public ledger key.",
        ) from error
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise ConsiliumError(
            "identity.bad-key",
            "The file does not hold an Ed25519 public key in PEM.",
            where=str(path),
            hint="Ask the site for its public ledger key, the one it published when it joined.",
        )
    return found


def _folder(
    folder: Path,
    given: Ed25519PublicKey | None,
    attests: Ed25519PublicKey | None,
    trusted: Path | None,
    known: dict[str, Study],
) -> Evidence:
    from consilium_common.identity.certificates import Role
    from consilium_common.identity.keys import public_fingerprint

    for name in (LEDGER, KEY, SIGNER, AUTHORITY):
        if not (folder / name).is_file():
            raise ConsiliumError(
                "privacy.evidence-incomplete",
                f"The evidence has no {name}.",
                where=str(folder),
                hint="Ask the site for the whole folder that `consilium site evidence` wrote.",
            )
    key = read_key(folder / KEY)
    if given is not None and public_fingerprint(given) != public_fingerprint(key):
        raise _mismatch(folder, "its ledger key is not the one given with --key")
    bundle = (folder / AUTHORITY).read_bytes()
    trust = judging(bundle, trusted, where=str(folder / AUTHORITY))
    if trust is None:
        raise _mismatch(folder, "its authority is not the one given with --authority")
    signer = issued((folder / SIGNER).read_bytes(), trust, Role.SIGNER, where=str(folder / SIGNER))
    if signer.fingerprint != public_fingerprint(key):
        raise _mismatch(folder, f"{SIGNER} certifies another key than {KEY}")
    witness = attests
    if (folder / WITNESS).is_file():
        place = folder / WITNESS
        holder = issued(place.read_bytes(), trust, Role.WITNESS, where=str(place))
        if attests is not None and public_fingerprint(attests) != holder.fingerprint:
            raise _mismatch(folder, "its witness key is not the one given with --witness")
        witness = signing_key(holder)
    egress = read_egress(folder / EGRESS) if (folder / EGRESS).exists() else None
    if egress is not None and egress.site != signer.name:
        raise _mismatch(folder, f"{EGRESS} is of another site than {SIGNER}")
    receipts = None
    if (folder / RECEIPTS).exists():
        receipts = read_receipts_file(folder / RECEIPTS, key, site=signer.name)
    return Evidence(
        ledger=folder / LEDGER,
        key=key,
        witness=witness,
        folder=folder,
        trust=trust,
        signer=signer,
        egress=egress,
        receipts=receipts,
        studies={**known, **_studies(folder)},
    )


def check_site(evidence: Evidence, site: str) -> None:
    """Check that the ledger is of the site that the authority certified, or raise.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-mismatch``.
    """
    if evidence.signer is not None and evidence.signer.name != site:
        raise _mismatch(
            evidence.folder or evidence.ledger,
            f"the ledger is of {site}, and {SIGNER} certifies {evidence.signer.name}",
        )


def _studies(folder: Path) -> dict[str, Study]:
    found = {}
    for path in sorted((folder / STUDIES).glob("*.json")):
        study = _study_file(path)
        if study.digest != path.stem:
            raise _mismatch(folder, f"{STUDIES}/{path.name} is not the study of that digest")
        found[study.digest] = study
    return found


def _study_file(path: Path) -> Study:
    from consilium_common.study.load import load_study, study_from_canonical

    if path.suffix == ".json":
        return study_from_canonical(read_json(path))
    return load_study(path)


def _mismatch(where: Path, what: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.evidence-mismatch",
        f"The evidence contradicts itself: {what}.",
        where=str(where),
        hint="Do not rely on it; ask the site for its evidence again.",
    )
