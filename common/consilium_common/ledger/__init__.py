"""The privacy ledger of a site: append-only, hash-chained, signed; format in common/LEDGER.md."""

from consilium_common.ledger.entries import Entry, Head
from consilium_common.ledger.state import Charge, LedgerState
from consilium_common.ledger.store import Ledger

__all__ = ["Charge", "Entry", "Head", "Ledger", "LedgerState"]
