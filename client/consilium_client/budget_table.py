"""What a site's patients have spent and have left: `consilium site budget`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_client.home import SiteHome
from consilium_client.policy import Policy, load_policy
from consilium_common.console import result
from consilium_common.ledger.spend import Spend, spend
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class BudgetTable:
    """Spend of a site's patients against its policy, as ``consilium site budget`` shows it."""

    site: str
    budget: float
    delta: float
    spend: Spend

    @property
    def remaining(self) -> float:
        """ε that the patient who has spent most may still spend."""
        return max(0.0, self.budget - self.spend.most)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency."""
        return {
            "site": self.site,
            "budget": {"epsilon": self.budget, "delta": self.delta},
            "remaining": self.remaining,
            "spend": self.spend.to_dict(),
        }

    def print_to(self, console: Console) -> None:
        """Print the table for a person."""
        from rich.table import Table

        console.print(
            f"Privacy budget of {self.site}: ε {self.budget:g} at δ {self.delta:g} per patient, "
            "over all studies (unit patient, adjacency add or remove one).",
            markup=False,
        )
        if not self.spend.patients:
            console.print("Nothing was charged yet.")
            return
        spent = self.spend
        console.print(
            f"{spent.patients} patients have taken part. Spent: least {spent.least:.3f}, "
            f"median {spent.median:.3f}, most {spent.most:.3f}. "
            f"Left for the patient who has spent most: {self.remaining:.3f}.",
            markup=False,
        )
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for name in ("study", "rounds", "sent", "patients", "ε", "ε, δ as stated", "last (UTC)"):
            left = name in ("study", "last (UTC)")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row in spent.studies:
            table.add_row(
                row.study[:12],
                str(row.rounds),
                str(row.released),
                str(row.patients),
                f"{row.epsilon:.3f}",
                f"{row.study_epsilon:.3f}, {row.study_delta:g}",
                row.last[:16].replace("T", " "),
            )
        console.print(table)


def budget_table(ledger: Ledger | LedgerState, policy: Policy) -> BudgetTable:
    """Return the spend of all patients ever charged, at the policy's δ."""
    state = ledger.state if isinstance(ledger, Ledger) else ledger
    return BudgetTable(
        state.site, policy.budget.epsilon, policy.budget.delta, spend(state, policy.budget.delta)
    )


def budget_command(home: Path, patient: str | None = None) -> None:
    """Print the site's budget, or that of one patient.

    Parameters
    ----------
    home : Path
        The site's folder.
    patient : str, optional
        Keyed hash of one patient, as the site's data module makes it of an identity.

    Raises
    ------
    ConsiliumError
        ``state.no-site``, ``privacy.no-policy``, and those of opening a ledger.
    """
    site = SiteHome.existing(home)
    policy = load_policy(site)
    if not site.ledger.exists():
        state = LedgerState(site="this site")  # nothing was ever charged here
    else:
        with Ledger.open(site.ledger) as ledger:
            state = ledger.state
    if patient is None:
        table = budget_table(state, policy)
        result(table.to_dict(), table.print_to)
        return
    events = state.events_of(patient)
    spent = epsilon_of(events, policy.budget.delta)
    left = max(0.0, policy.budget.epsilon - spent)
    studies = [s for s in state.studies() if state.events_of(patient, s)]
    result(
        {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "budget": {"epsilon": policy.budget.epsilon, "delta": policy.budget.delta},
            "spent": spent,
            "remaining": left,
            "events": [event.to_dict() for event in events],
            "studies": studies,
        },
        f"This patient has spent ε {spent:.3f} of {policy.budget.epsilon:g} at "
        f"δ {policy.budget.delta:g} in {len(studies)} studies; {left:.3f} is left "
        "(unit patient, adjacency add or remove one).",
    )
