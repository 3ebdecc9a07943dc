"""The hazards of a differential-privacy claim: how each is met here, and what remains.

The list follows the layers of NIST SP 800-226 (Guidelines for Evaluating Differential Privacy
Guarantees, March 2025): parameters and unit, algorithms and their implementation, trust and data.
The words are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from consilium_common.report.wording import epsilon

Standing = Literal["met", "partly", "look", "outside"]

#: What a report says of each standing.
WORDS: Final[dict[Standing, str]] = {
    "met": "met",
    "partly": "partly met",
    "look": "look here",
    "outside": "outside",
}

#: Whom the noise protects against, by the threat model that the ledger names.
THREAT_MODELS: Final = {
    "silo-local": "Noise is added at the hospital, before anything leaves. The promise holds "
    "against the aggregator, the other hospitals and whoever receives the model; it trusts the "
    "hospital itself, its staff and its machines.",
}

#: What this report says nothing about; every reader must see it.
NOT_COVERED: Final = (
    "Time. How long a round takes depends weakly on how many patients were drawn, and the "
    "aggregator can measure it.",
    "What stays at the hospital: exact losses and scores, local reports, logs, the images.",
    "The hospital's own people and machines: they see the images, and could run other software. "
    "The ledger shows what the software recorded, signed; it cannot show what was done beside it.",
    "The aggregator outside what it signed: whom it gives the model to, and what else it keeps.",
    "Patients at several hospitals. Their losses compose over the hospitals' ledgers, and nobody "
    "links those.",
    "Relatives and others with alike records. What is learnt about a family from several of its "
    "members is not bounded by one member's ε.",
    "What is true of all patients. A model may learn that a finding goes with a disease, and that "
    "says something about everyone who has the finding, in the study or not.",
    "Studies without differential privacy, and numbers a person copied by hand.",
    "Sizes that the hospital declared in public (its rounded cohort), and that it took part.",
    "Whether the model is any good, or equally good for small groups: noise hurts those most.",
)


@dataclass(frozen=True)
class Facts:
    """What of one audit decides how a hazard stands."""

    epsilon: float
    delta: float
    patients: int
    budget: float | None
    accountants_agree: bool
    as_declared: bool
    clip_norms: tuple[float, ...]
    witnessed: int
    entries: int
    witness_checked: bool
    reconciled: bool
    serious: int
    without_privacy: int


@dataclass(frozen=True)
class Hazard:
    """One hazard, how it is met here, and what remains."""

    name: str
    standing: Standing
    met: str
    remains: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values."""
        return dict(self.__dict__)


def hazards(facts: Facts) -> tuple[Hazard, ...]:
    """Return every hazard as it stands in this audit."""
    return (*_parameters(facts), *_algorithms(facts), *_surroundings(facts))


def _parameters(facts: Facts) -> tuple[Hazard, ...]:
    within = facts.budget is None or facts.epsilon <= facts.budget
    budget = (
        "no budget is recorded"
        if facts.budget is None
        else f"the recorded budget is {facts.budget:g}"
    )
    small = facts.delta * max(facts.patients, 1) < 1
    return (
        Hazard(
            "A large ε that is called private",
            "look" if facts.epsilon > 10 or not within else "met",
            f"The largest loss of any patient over all studies is ε {epsilon(facts.epsilon)}; "
            f"{budget}.",
            "Judge it by what an attacker can do (below), not by the number. Above 10 ε by itself "
            "promises little; below 1 it is strong."
            if facts.epsilon > 1
            else "Strong, for one patient and these studies.",
        ),
        Hazard(
            "A δ so large that whole records may leak",
            "met" if small else "look",
            f"δ = {facts.delta:g} for {facts.patients} patients.",
            "It is below 1 over the number of patients; smaller still is better."
            if small
            else f"It is not below 1/{facts.patients}: publishing one whole record would keep the "
            "promise. Lower δ in the policy.",
        ),
        Hazard(
            "The wrong unit: images protected, patients not",
            "met",
            "The unit is the patient. All images, slices and augmentations of one patient make one "
            "gradient, clipped once; every event in the ledger names the unit.",
            "Two identities of one person at a site count as two patients. Families: see below.",
        ),
        Hazard(
            "Promises compared over different neighbours",
            "met",
            "Neighbouring data sets differ by one patient added or removed; each event says so.",
            "Against replacing a patient by another the same events have a larger ε, up to about "
            "double.",
        ),
    )


def _algorithms(facts: Facts) -> tuple[Hazard, ...]:
    clips = ", ".join(f"{clip:g}" for clip in facts.clip_norms) or "–"
    return (
        Hazard(
            "Contributions without a bound",
            "met",
            f"A patient's whole contribution to a step is clipped (C = {clips}); networks that mix "
            "patients, such as batch normalisation, are refused.",
            "Rests on the software; “consilium audit attack” tests it as installed.",
        ),
        Hazard(
            "Losses that add up over studies, and are forgotten",
            "met",
            "The ledger composes every event of every study per patient, before data is touched. "
            "A round asked again returns the same stored update.",
            "A policy with a period lets old charges lapse; the figures here count them all.",
        ),
        Hazard(
            "Accounting for another mechanism than the one that ran",
            "met" if facts.accountants_agree and facts.as_declared else "look",
            "ε is computed here from recorded events by three accountants"
            + (", which bear each other out." if facts.accountants_agree else "; see their table.")
            + (
                " The charges are those of the studies' documents, as far as they are at hand."
                if facts.as_declared
                else " Some charges are of another mechanism than their study's document says."
            ),
            "Patients are drawn independently (Poisson); the software checks at run time that the "
            "noise and rate used are those recorded.",
        ),
        Hazard(
            "Choices made by looking at the data",
            "met",
            "Steps, noise and rates are fixed before the first step. Scores that leave are private "
            "queries, charged; exact ones stay local.",
            "What people saw locally may shape the next study. That study is charged, too.",
        ),
        Hazard(
            "Weak randomness",
            "partly",
            "Noise and sampling come from the operating system's entropy, never from a seed, and "
            "are not stored.",
            "The machine's generator is trusted; noise cannot be checked after the fact.",
        ),
        Hazard(
            "Floating-point numbers that betray the noise",
            "partly",
            "Noise is a sum of several independent draws, which defeats the known attack.",
            "It is no discrete Gaussian, so the bound holds for ideal arithmetic.",
        ),
    )


def _surroundings(facts: Facts) -> tuple[Hazard, ...]:
    seen = facts.witnessed == facts.entries and facts.witness_checked
    if not facts.witnessed:
        witness = "No entry of this ledger is attested by the aggregator."
    else:
        witness = f"The aggregator attested {facts.witnessed} of {facts.entries} entries" + (
            "." if facts.witness_checked else "; its signatures were not checked."
        )
    if not facts.reconciled:
        egress: Standing = "look"
        told = "Neither the site's egress list nor the aggregator's records were handed over."
    else:
        egress = "look" if facts.serious else "met"
        told = (
            f"{facts.serious} serious differences between what left and the ledger: see below."
            if facts.serious
            else "What left was compared with the ledger, without a serious difference."
        )
    if facts.without_privacy:
        told += f" {facts.without_privacy} updates left for studies without differential privacy."
    return (
        Hazard(
            "A record that can be rewritten",
            "met" if seen else "partly",
            f"Entries are chained and signed by the site. {witness}",
            "Site and aggregator together could still rewrite it; note heads elsewhere."
            if facts.witnessed
            else "Entries cut off at the end go unnoticed unless a later head is known.",
        ),
        Hazard(
            "Numbers that leave beside the mechanism",
            "look" if facts.without_privacy and egress == "met" else egress,
            told,
            "The lists are the parties' own. Traffic outside the software is not seen.",
        ),
        Hazard(
            "Trust in the wrong party",
            "partly",
            THREAT_MODELS["silo-local"],
            "Whether that is the right trust is a decision, not a computation.",
        ),
        Hazard(
            "Side channels",
            "outside",
            "Durations, counts and batch sizes are not sent.",
            "Timing of messages remains visible to the aggregator and the network.",
        ),
        Hazard(
            "Access to the data itself",
            "outside",
            "Images stay at the hospital; connections are mutual TLS with certified roles.",
            "The hospital's own access control, backups and disks.",
        ),
        Hazard(
            "Records that belong together",
            "outside",
            "One patient at one site is protected as a whole.",
            "Families, and a patient at several sites, lose more than one ε.",
        ),
    )
