"""What the aggregator hands to auditors: signed records of a site, and its audit log."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, Final

from consilium_common.canonical import canonical_json
from consilium_common.identity.trust import Trust
from consilium_common.ledger.entries import time_text
from consilium_common.wire.statements import sign
from consilium_server.acts import acts_of, note_local, witness_of
from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.witness import WitnessKey

SCHEMA: Final = "consilium/records/v1"


def site_records(
    registry: Registry, witness: WitnessKey, trust: Trust, site: str
) -> dict[str, Any]:
    """Return everything the aggregator can testify about a site, signed by the witness's key.

    Returns
    -------
    dict
        ``content`` and ``signature``, the Ed25519 signature of the content's canonical JSON.
        ``witnessed`` holds the records of every ledger the site ever showed, oldest first;
        ``received`` what of the site was used.

    Raises
    ------
    ConsiliumError
        ``identity.unknown`` for a site that never joined.
    """
    member = registry.site(site)
    content = {
        "schema": SCHEMA,
        "site": site,
        "written_at": time_text(datetime.now(UTC)),
        "signer_pem": member.signer_pem,
        "witness_pem": witness.pem,
        "authority_pem": trust.pem().decode(),
        "witnessed": [row.record for row in registry.witnessed(site)],
        "received": [
            {
                "study": row.study,
                "purpose": row.purpose,
                "round": row.round,
                "sha256": row.sha256,
                "bytes": row.bytes,
                "time": row.time,
            }
            for row in registry.received(site)
        ],
    }
    return {"content": content, "signature": sign(witness.key, content)}


def file_of(document: dict[str, Any]) -> bytes:
    """Return a signed document as the file that it is, wherever it is handed over."""
    return canonical_json(document) + b"\n"


def records_here(home: ServerHome, site: str) -> bytes:
    """Return a site's records as the file that is handed to auditors, and note that they were."""
    registry, witness = Registry(home.database), witness_of(home)
    content = file_of(site_records(registry, witness, _trust(home), site))
    note_local(home, "records", site, digest=hashlib.sha256(content).hexdigest())
    return content


def log_here(home: ServerHome) -> bytes:
    """Return the audit log as a file that `consilium audit verify` reads."""
    return file_of(acts_of(home).document(_trust(home)))


def _trust(home: ServerHome) -> Trust:
    return Trust.read(home.identity / "authority.pem")
