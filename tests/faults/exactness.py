"""What must hold of a site after any number of deaths: charged, kept, released and used agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from federation import Site

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.identity.keys import load_signing_key
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.verify import verify_file


def state_of(site: Site) -> LedgerState:
    """Return what a site's ledger says, verified from its first entry on."""
    home = SiteHome.existing(site.home)
    key = load_signing_key(home.identity / "ledger-key.pem").public_key()
    found = verify_file(home.ledger, key)
    assert found.problem is None, found.problem
    return found.state


def require_exact(site: Site, digest: str, rounds: Sequence[dict[str, Any]]) -> None:
    """Check ledger, store and the aggregator's rounds of a study against each other."""
    state = state_of(site)
    standing = {(c.purpose, c.round_index): c for c in state.standing(digest)}
    assert len(standing) == len(state.standing(digest))
    kept = {
        (row["purpose"], row["round"]): row["sha256"]
        for row in StudyStore(SiteHome.existing(site.home)).updates(digest)
    }
    # What was kept is paid for; a charge without an update is of a round that went on without it.
    assert set(kept) <= set(standing)
    for release, charge in standing.items():
        assert charge.update in (None, kept.get(release))
    # What the aggregator used was released, once.
    for row in rounds:
        if site.name in row["sites"]:
            charge = standing["training", row["number"]]
            assert charge.state == "released"
            assert charge.update == kept["training", row["number"]]
