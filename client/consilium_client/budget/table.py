"""What a site's patients have spent and have left: `consilium site budget`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_client.budget.policy import Policy, load_policy
from consilium_client.budget.price import people
from consilium_client.home import SiteHome
from consilium_common.console import result
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.spend import Bin, Spend, spend
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT

if TYPE_CHECKING:
    from rich.console import Console

#: Characters of the histogram's longest bar.
_BAR: Final = 40


@dataclass(frozen=True)
class BudgetTable:
    """Spend of a site's patients against its policy, as ``consilium site budget`` shows it."""

    site: str
    policy: Policy
    spend: Spend

    @property
    def remaining(self) -> float:
        """ε that the patient who has spent most may still spend."""
        return max(0.0, self.policy.budget.epsilon - self.spend.most)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency."""
        budget = self.policy.budget
        return {
            "site": self.site,
            "budget": budget.model_dump(),
            "remaining": self.remaining,
            "left": {
                "least": self.remaining,
                "median": max(0.0, budget.epsilon - self.spend.median),
                "most": max(0.0, budget.epsilon - self.spend.least),
            },
            "spend": self.spend.to_dict(),
        }

    def print_to(self, console: Console) -> None:
        """Print the table for a person."""
        console.print(_heading(f"Privacy budget of {self.site}", self.policy), markup=False)
        if self.spend.years and not self.spend.patients:
            console.print("Nothing was charged within the period.")
        if not self.spend.years:
            console.print("Nothing was charged yet.")
            return
        if self.spend.patients:
            self._print_spread(console)
        from rich.table import Table

        years = Table(box=None, pad_edge=False, padding=(0, 1))
        for name in ("year (UTC)", "charges", "patients", "ε of the worst"):
            years.add_column(name, justify="right", no_wrap=True)
        for year in self.spend.years:
            years.add_row(
                str(year.year), str(year.charges), f"{year.patients:,}", f"{year.epsilon:.3f}"
            )
        console.print(years)

    def _print_spread(self, console: Console) -> None:
        from rich.table import Table

        spent = self.spend
        console.print(
            f"{people(spent.patients)} have taken part. Spent: least {spent.least:.3f}, "
            f"median {spent.median:.3f}, most {spent.most:.3f}. "
            f"Left for the patient who has spent most: {self.remaining:.3f}.",
            markup=False,
        )
        for line in bars(spent.histogram):
            console.print(line, markup=False)
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        columns = ("study", "rounds", "scored", "sent", "patients", "ε", "ε, δ as stated")
        for name in (*columns, "last (UTC)"):
            left = name in ("study", "last (UTC)")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for row in spent.studies:
            table.add_row(
                row.study[:12],
                str(row.rounds),
                str(row.evaluations),
                str(row.released),
                f"{row.patients:,}",
                f"{row.epsilon:.3f}",
                f"{row.study_epsilon:.3f}, {row.study_delta:g}",
                row.last[:10],
            )
        console.print(table)


def bars(histogram: Iterable[Bin]) -> list[str]:
    """Return a histogram as lines of text: ε from and to, a bar, patients."""
    rows = list(histogram)
    most = max((row.patients for row in rows), default=0)
    lines = []
    for row in rows:
        # Nobody has no bar, and anybody has one: a single patient must not vanish.
        length = 0 if not row.patients else max(1, round(_BAR * row.patients / most))
        lines.append(
            f"  ε {row.low:7.3f} – {row.high:7.3f}  {'█' * length:<{_BAR}} {row.patients:,}"
        )
    return lines


def budget_table(ledger: Ledger | LedgerState, policy: Policy) -> BudgetTable:
    """Return the spend of all patients ever charged, at the policy's δ, within its period."""
    state = ledger.state if isinstance(ledger, Ledger) else ledger
    budget = policy.budget
    return BudgetTable(state.site, policy, spend(state, budget.delta, budget.since()))


def budget_command(home: Path, patient_id: str | None = None, study: str | None = None) -> None:
    """Print the site's budget, or that of one patient, or of one study.

    Parameters
    ----------
    home : Path
        The site's folder.
    patient_id : str, optional
        One patient as the hospital knows it. It is hashed at once and never shown.
    study : str, optional
        First digits of a study's digest, or the name of one that this site has decided about:
        count its charges alone.

    Raises
    ------
    ConsiliumError
        ``state.no-site``, ``privacy.no-policy``, ``data.unknown-patient``, ``study.unknown``,
        ``study.ambiguous``, and those of opening a ledger.
    """
    site = SiteHome.existing(home)
    policy = load_policy(site)
    if not site.ledger.exists():
        state = LedgerState(site="this site")  # nothing was ever charged here
    else:
        with Ledger.open(site.ledger) as ledger:
            state = ledger.state
    digest = None if study is None else _charged_study(site, state, study)
    if patient_id is not None:
        from consilium_client.budget.patient import patient_budget

        found = patient_budget(site, state, policy, patient_id, digest)
        result(found.to_dict(), "\n".join(found.lines()))
    elif digest is not None:
        _print_study(state, policy, digest)
    else:
        table = budget_table(state, policy)
        result(table.to_dict(), table.print_to)


def _print_study(state: LedgerState, policy: Policy, digest: str) -> None:
    budget = policy.budget
    charges = state.standing(digest)
    groups = sorted(
        (epsilon_of(history, budget.delta), number)
        for history, number in state.histories(study=digest).items()
    )
    by_year = []
    for year in sorted({charge.time[:4] for charge in charges}):
        inside = [charge for charge in charges if charge.time[:4] == year]
        by_year.append({"year": int(year), "charges": len(inside)})
    counted = Counter(charge.purpose for charge in charges)
    released = sum(charge.state == "released" for charge in charges)
    lines = [
        f"Study {digest[:12]} by itself: {counted['training']} rounds and "
        f"{counted['evaluation']} evaluations"
        + (" and the statistics" if counted["statistics"] else "")
        + f" charged, {released} of them released (δ {budget.delta:g}, unit patient, adjacency "
        "add or remove one).",
        *(f"  {people(number)}: ε {epsilon:.3f} each" for epsilon, number in groups),
        *(f"  {row['year']}: {row['charges']} charges" for row in by_year),
    ]
    result(
        {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "study": digest,
            "delta": budget.delta,
            "rounds": counted["training"],
            "evaluations": counted["evaluation"],
            "statistics": counted["statistics"],
            "released": released,
            "patients": [{"epsilon": epsilon, "patients": number} for epsilon, number in groups],
            "years": by_year,
        },
        "\n".join(lines),
    )


def _charged_study(site: SiteHome, state: LedgerState, which: str) -> str:
    """Return the digest of the one charged study of that name or beginning of its digest."""
    from consilium_client.store import StudyStore

    charged = state.studies()
    found = [digest for digest in charged if which and digest.startswith(which)]
    if not found and site.studies.exists():
        decided = [d.study for d in StudyStore(site).decisions() if d.study.name == which]
        found = [study.digest for study in decided if study.digest in charged]
    if len(found) != 1:
        raise ConsiliumError(
            "study.unknown" if not found else "study.ambiguous",
            f"{which!r} stands for {len(found) or 'no'} studies with a charge here.",
            hint="`consilium site budget` lists the charged studies; give more digits.",
        )
    return found[0]


def _heading(what: str, policy: Policy) -> str:
    budget = policy.budget
    return (
        f"{what}: ε {budget.epsilon:g} at δ {budget.delta:g} per patient, {budget.span} "
        "(unit patient, adjacency add or remove one)."
    )
