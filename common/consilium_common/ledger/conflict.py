"""The mark beside a ledger that the aggregator has contradicted: nothing is charged while it is.

Whoever puts an old copy of a ledger back would get spent budget back as well. The aggregator, which
has witnessed every entry, notices; the mark makes sure that no process of the site goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic


def conflict_file(ledger: Path) -> Path:
    """Return where the mark of a ledger lies: ``ledger.conflict`` beside ``ledger.db``."""
    return ledger.with_suffix(".conflict")


def mark_conflict(ledger: Path, conflict: ConsiliumError) -> None:
    """Leave the mark, durably, with what the aggregator said.

    Raises
    ------
    ConsiliumError
        ``state.disk``.
    """
    write_atomic(conflict_file(ledger), json.dumps(conflict.to_dict(), indent=2).encode() + b"\n")


def refuse_conflict(ledger: Path) -> None:
    """Do nothing, or raise ``privacy.ledger-rolled-back`` while the mark is there."""
    mark = conflict_file(ledger)
    if not mark.exists():
        return
    try:
        why = str(json.loads(mark.read_bytes())["message"])
    except (OSError, ValueError, KeyError, TypeError):
        why = "The aggregator contradicts this ledger."  # the mark counts, whatever it says
    raise ConsiliumError(
        "privacy.ledger-rolled-back",
        f"{why} Nothing is charged or trained until this is mended.",
        where=str(mark),
        hint="Stop the site, put the newest copy of ledger.db back that has every witnessed entry "
        "(`consilium audit verify` prints its head), remove the file ledger.conflict, and start "
        "the site: the aggregator checks it again. Without such a copy nobody knows what was "
        "spent: this site's patients must not be trained on again.",
    )
