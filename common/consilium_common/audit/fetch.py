"""Evidence fetched from the aggregator: signed documents, handed over in pieces."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from consilium_common.audit.documents import Records, read_records
from consilium_common.audit.evidence import Evidence
from consilium_common.errors import ConsiliumError
from consilium_common.identity.personal import person
from consilium_common.wire import methods
from consilium_common.wire.channel import Caller

#: Characters; no honest document is larger.
_LARGEST: Final = 1_000_000_000


def fetch_records(caller: Caller, site: str) -> bytes:
    """Return the aggregator's records of a site: the bytes that `server records` writes."""
    return _fetch(caller, methods.AUDIT_RECORDS, site=site)


def fetch_log(caller: Caller) -> bytes:
    """Return the aggregator's audit log: the bytes that `server log` writes."""
    return _fetch(caller, methods.AUDIT_LOG)


def records_for(
    evidence: Evidence, file: Path | None, connect: Path | None, authority: Path | None
) -> Records | None:
    """Return the aggregator's records of the site that evidence is of.

    Parameters
    ----------
    file
        Records that were handed over; None: fetch them where ``connect`` names an identity.
    authority
        The consortium's authority, known to the auditor (default: that of the identity).

    Raises
    ------
    ConsiliumError
        ``usage.records``, and what reading, connecting and fetching raise.
    """
    if connect is None:
        return None if file is None else read_records(file, trusted=authority)
    if file is not None or evidence.signer is None:
        raise ConsiliumError(
            "usage.records",
            "Records come from a file or from the aggregator, not from both."
            if file is not None
            else "A ledger alone does not say which site's records to fetch.",
            hint="Leave out --records or --connect."
            if file is not None
            else "Give the site's evidence folder, or fetch them with `consilium server records`.",
        )
    who = person(connect)
    with who.caller() as caller:
        content = fetch_records(caller, evidence.signer.name)
    # What people read is where the records are from, and not the file that is gone afterwards.
    source = f"records of {evidence.signer.name} at {who.settings.address}"
    with TemporaryDirectory(prefix="consilium-") as folder:
        path = Path(folder) / "records.json"
        path.write_bytes(content)
        try:
            records = read_records(path, trusted=authority or who.folder / "authority.pem")
        except ConsiliumError as error:
            error.where = error.where.replace(str(path), source)
            raise
    return replace(records, path=source)


def _fetch(caller: Caller, method: str, **request: str) -> bytes:
    """Fetch a document piece by piece, and hold the whole to its SHA-256.

    Raises
    ------
    ConsiliumError
        ``network.garbage`` when what came is not what was announced.
    """
    answer = caller.call(method, request, timeout=120)
    sha256, total, pieces = answer["sha256"], answer["characters"], [answer["piece"]]
    held = len(pieces[0])
    while held < min(total, _LARGEST) and answer["piece"]:
        answer = caller.call(method, {**request, "sha256": sha256, "offset": held}, timeout=120)
        pieces.append(answer["piece"])
        held += len(answer["piece"])
    content = "".join(pieces).encode()
    if held != total or hashlib.sha256(content).hexdigest() != sha256:
        raise ConsiliumError(
            "network.garbage",
            "The document that the aggregator handed over is not whole.",
            hint="Fetch it again.",
        )
    return content
