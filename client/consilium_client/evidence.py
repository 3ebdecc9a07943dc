"""What the privacy officer takes along: ledger, keys, studies, egress, receipts; for `audit`."""

from __future__ import annotations

import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.receipts import export_receipts
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.ledger.entries import time_text
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger

EGRESS_SCHEMA: Final = "consilium/egress/v1"
_KEYS: Final = ("ledger-public.pem", "ledger-signer.pem", "authority.pem")
#: Between storing an update and recording its release lie milliseconds.
_TRIES: Final = 5
_PAUSE_SECONDS: Final = 0.2


def egress_rows(home: SiteHome, which: str = "") -> list[dict[str, Any]]:
    """Return everything that was stored to leave: study, purpose, round, SHA-256, bytes, time.

    Parameters
    ----------
    which : str
        First digits of a study's digest (default: every study).
    """
    names = ("study", "purpose", "round", "sha256", "bytes", "stored_at")
    return [{name: row[name] for name in names} for row in StudyStore(home).updates(which)]


def write_evidence(home: SiteHome, identity: SiteIdentity, folder: Path) -> dict[str, Any]:
    """Write the evidence folder; it is there complete, or not at all.

    ``ledger.jsonl`` (with the witness's records), ``ledger-public.pem``, ``ledger-signer.pem``,
    ``authority.pem``, ``witness.pem`` where it is known, ``studies/<digest>.json`` (canonical
    JSON, so a file's SHA-256 is its name), ``egress.json`` (what was stored to leave) and
    ``receipts.jsonl`` (signed receipts of what left). No private key, no identity; the ledger names
    patients by keyed hash.

    Returns
    -------
    dict
        Folder, site, head of the ledger, number of studies, of stored releases and of receipts.

    Raises
    ------
    ConsiliumError
        ``state.not-empty`` when the folder holds anything, ``privacy.no-ledger``, and those of
        opening the ledger; ``privacy.receipts-broken``, ``state.receipts``; ``state.disk``.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConsiliumError(
            "state.not-empty",
            "Evidence is written into a new folder, and this one holds something.",
            where=str(folder),
            hint="Name a folder that does not exist yet.",
        )
    partial = _beside(folder)
    try:
        written = _write(home, identity, partial)
        partial.replace(folder)
    except OSError as error:
        raise ConsiliumError(
            "state.disk",
            f"Cannot write the evidence: {error.strerror or error}.",
            where=str(folder),
            hint="Free space on the disk or choose a folder that you may write.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"folder": str(folder), **written}


def _beside(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ConsiliumError(
            "state.folder",
            f"Cannot use the folder: {error.strerror or error}.",
            where=str(folder.parent),
            hint="Choose a folder that you own, on a disk that is writable.",
        ) from error


def _write(home: SiteHome, identity: SiteIdentity, folder: Path) -> dict[str, Any]:
    site = identity.config.name
    # Before anything is read: what dates from before this moment is in the evidence.
    began = time_text(datetime.now(UTC))
    # Receipts first: what leaves meanwhile is in the ledger already, and has its receipt next time.
    public = identity.signer().public_key()
    receipts = export_receipts(home.receipts, public, site, folder / "receipts.jsonl")
    with Ledger.open(home.ledger, site=site) as ledger:
        head, rows = _export(home, ledger, folder / "ledger.jsonl")
    for name in _KEYS:
        write_atomic(folder / name, (identity.folder / name).read_bytes())
    witness = home.witness_certificate
    if witness.exists():
        write_atomic(folder / "witness.pem", witness.read_bytes())
    studies = private_folder(folder / "studies")
    decisions = StudyStore(home).decisions()
    for decision in decisions:
        content = canonical_json(decision.study.to_canonical())
        write_atomic(studies / f"{decision.study.digest}.json", content)
    egress = {"schema": EGRESS_SCHEMA, "site": site, "written_at": began, "released": rows}
    write_atomic(folder / "egress.json", canonical_json(egress))
    return {
        "site": site,
        "head": head,
        "studies": len(decisions),
        "released": len(rows),
        "receipts": receipts,
        "witness": witness.exists(),
    }


def _export(home: SiteHome, ledger: Ledger, path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Export the ledger, and what was stored to leave, so that the two belong together.

    A running site stores an update a moment before it records the release. What is still without
    a release after some tries is written as it is: the auditor shall see it.
    """
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        head = ledger.export_jsonl(path)
        rows = egress_rows(home)
        state = ledger.state
        if state.head == head and all(_recorded(state, row) for row in rows):
            break
    return str(head), rows


def _recorded(state: LedgerState, row: dict[str, Any]) -> bool:
    """Return whether the ledger says of a stored update what there is to say."""
    charge = state.charge_of(row["study"], row["round"], row["purpose"])
    # A study without privacy has no charges.
    return charge is None or charge.update == row["sha256"]
