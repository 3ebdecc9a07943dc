"""What approving a study would mean here: its cases, what leaves, what it costs, what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilium_client.budget.charging import Price, price
from consilium_client.budget.policy import load_policy
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.proposals import Proposal, find, proposals, unclear
from consilium_client.review_cases import OnCases, on_cases
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import validate_network
from consilium_common.study import Study
from consilium_common.study.comparison import cost_differences, differences
from consilium_common.study.cost import Cost, cost

if TYPE_CHECKING:
    from consilium_common.study.comparison import Difference


@dataclass(frozen=True)
class Change:
    """What changed against a version that this site approved before."""

    old: Study
    differences: tuple[Difference, ...]
    #: What changes in what leaves and in ε, in words.
    cost: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "digest": self.old.digest,
            "name": self.old.name,
            "differences": [one.to_dict() for one in self.differences],
            "cost": list(self.cost),
        }

    def lines(self) -> list[str]:
        """Say it in words, by topic."""
        head = f"Changed against {self.old.name} ({self.old.digest[:12]})"
        if not self.differences:
            return [f"{head}: nothing."]
        said, topic = [f"{head}:"], ""
        for one in sorted(self.differences, key=lambda one: one.topic):
            if one.topic != topic:
                topic = one.topic
                said.append(f"  {topic}")
            said.append(f"    {one.sentence()}")
        return [*said, *(f"  {line}" for line in self.cost)]


@dataclass(frozen=True)
class Review:
    """What approving would mean here."""

    proposal: Proposal
    patients: int  #: training patients who would take part, exact; stays here
    evaluated: int  #: test patients whom evaluations would score, exact; stays here
    cohort_size: int  #: training patients as they would be declared
    evaluation_size: int  #: test patients as they would be declared; 0 where no figure leaves
    price: Price
    cases: OnCases  #: on which cases; stays here
    cost: Cost  #: what leaves, and ε of the whole study at its own δ
    change: Change | None  #: None: no other version of it was approved here


def review(
    home: SiteHome,
    identity: SiteIdentity,
    which: str,
    cohort_size: int | None,
    evaluation_size: int | None = None,
    *,
    against: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Review:
    """Open the cohort that the study would train and evaluate on, and price the study for it.

    Parameters
    ----------
    cohort_size : int or None
        Number of training patients to declare; None declares :func:`declared_size` of those who
        are not left out.
    evaluation_size : int or None
        Number of test patients to declare, the denominator of the released mean score; None
        declares :func:`declared_evaluation_size`. Only for a study that releases noised figures.
    against : str, optional
        Name or first digits of the study to compare with (default: the one of the same name that
        this site approved last, withdrawn from since or not).
    say : callable, optional
        Takes a line on how much room the prepared cases will take, before they are made.

    Raises
    ------
    ConsiliumError
        ``data.*`` when the data does not fit the study, ``study.*`` (``study.signatures-missing``
        while named operators still have to sign), ``identity.*``; ``usage.evaluation-size`` where
        the study releases no noised figures.
    """
    from consilium_client.data.cohort import open_cohort
    from consilium_common.ledger.store import Ledger

    known = proposals(identity)
    proposal = find(known, which)
    proposal.require_signed()
    study = proposal.study
    releases = study.evaluation.release == "private"
    if evaluation_size is not None and not releases:
        raise ConsiliumError(
            "usage.evaluation-size",
            "The study releases no noised evaluation figures, so no number of test patients is "
            "declared.",
            hint="Leave --evaluation-size out.",
        )
    old = _version_before(home, study, known, against)
    validate_network(study)
    cohort = open_cohort(home, study, say=say)
    patients = [patient.key for patient in cohort.patients("train")]
    tested = [patient.key for patient in cohort.patients("test")]
    policy = load_policy(home)
    others = StudyStore(home).decisions()
    with Ledger.open(home.ledger, identity.signer(), site=identity.config.name) as ledger:
        price_here = price(ledger, policy, study, patients, tested, others=others)
    whole = cost(study)
    return Review(
        proposal=proposal,
        patients=price_here.patients,
        evaluated=price_here.evaluated,
        cohort_size=cohort_size or declared_size(price_here.patients),
        evaluation_size=(evaluation_size or declared_evaluation_size(price_here.evaluated))
        if releases
        else 0,
        price=price_here,
        cases=on_cases(home, study, cohort, price_here.leaves_out),
        cost=whole,
        change=None if old is None else _change(old, study, whole),
    )


def declared_size(patients: int) -> int:
    """Return the cohort size to declare: rounded down, so one patient more or less rarely shows."""
    step = 5 if patients >= 10 else 1
    return max(1, patients // step * step)


def declared_evaluation_size(patients: int) -> int:
    """Return the number of test patients to declare: from ten on the nearest multiple of five.

    It is the denominator of the released mean. Scores are centred before they are summed, so a
    denominator that is off by a share scales only the mean's distance from 1/2 by that share: at
    20 patients and a mean of .8 one of two off moves it by .03. Nearest, and not down as for the
    cohort, because rounding down would show every mean better than it is.
    """
    return max(1, patients if patients < 10 else (patients + 2) // 5 * 5)


def _version_before(
    home: SiteHome, study: Study, known: list[Proposal], against: str | None
) -> Study | None:
    """Return the study to compare with; None where there is none of the same name."""
    decisions = StudyStore(home).decisions()
    if against is None:
        approved = [
            (one.approved_at, one.study)
            for one in decisions
            if one.approved_at is not None
            and one.study.name == study.name
            and one.study.digest != study.digest
        ]
        return max(approved, key=lambda one: one[0])[1] if approved else None
    # Whatever this site has decided about, and whatever is proposed now.
    studies = [*(one.study for one in decisions), *(one.study for one in known)]
    everything = {one.digest: one for one in studies}
    found = [one for digest, one in everything.items() if against and digest.startswith(against)]
    found = found or [one for one in everything.values() if one.name == against]
    if len(found) != 1:
        raise unclear(against, len(found))
    return found[0]


def _change(old: Study, new: Study, whole: Cost) -> Change:
    try:
        priced = tuple(cost_differences(cost(old), whole))
    except ConsiliumError as error:
        # A release may refuse what one before it approved; the keys still say what changed.
        priced = (f"What the version before costs cannot be computed any more: {error.message}",)
    return Change(old, tuple(differences(old, new)), priced)
