"""The aggregator's records of one site as a signed file: what it witnessed and what it received."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from consilium_common.canonical import canonical_json
from consilium_common.files import write_new
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.ledger.entries import time_text
from consilium_common.wire.statements import sign
from consilium_server.home import ServerHome
from consilium_server.registry import Registry
from consilium_server.witness import WitnessKey

SCHEMA: Final = "consilium/records/v1"


def site_records(home: ServerHome, site: str) -> dict[str, Any]:
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
    registry = Registry(home.database)
    member = registry.site(site)
    authority = Authority.load(home.identity)
    witness = WitnessKey.ensure(home.identity, authority)
    content = {
        "schema": SCHEMA,
        "site": site,
        "written_at": time_text(datetime.now(UTC)),
        "signer_pem": member.signer_pem,
        "witness_pem": witness.pem,
        "authority_pem": certificate_pem(authority.certificate).decode(),
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


def write_records(home: ServerHome, site: str, path: Path) -> dict[str, Any]:
    """Write :func:`site_records` to a new file, as canonical JSON, and return them.

    Raises
    ------
    ConsiliumError
        ``state.exists``: evidence is never overwritten; ``state.disk``.
    """
    records = site_records(home, site)
    write_new(path, canonical_json(records) + b"\n")
    return records
