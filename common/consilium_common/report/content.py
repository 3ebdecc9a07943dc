"""What a study's report says, as plain frozen values; every part but the name may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

_PNG: Final = b"\x89PNG\r\n\x1a\n"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Frozen, and a misspelt field is an error rather than an empty place in the report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanSection(Part):
    """One heading of the study in words, with its sentences."""

    title: str
    lines: tuple[str, ...]


class LedgerOutcome(Part):
    """What the verification of one site's privacy ledger found."""

    verified: bool
    entries: Count = 0
    #: Hash of the last entry, hexadecimal; who keeps it can tell when a ledger was cut short.
    head: str = ""
    #: When not verified: which entry, and what is wrong with it.
    detail: str = ""


class SiteEpsilon(Part):
    """One site's privacy loss from its ledger; unit the patient, adjacency add or remove one."""

    #: ε of this study by the accountant of record (PLD), from the recorded events.
    pld: float
    #: The same by opacus' PRV accountant (cross-check) and by Rényi divergences (ceiling).
    prv: float | None = None
    rdp: float | None = None
    delta: float
    #: ε of the patient with the greatest loss over all studies at this site, and its limit.
    spent: float | None = None
    budget: float | None = None
    #: ε of the patients who are evaluated on; they are others than those trained on.
    evaluation: float | None = None


class Egress(Part):
    """What left one site by its receipts."""

    bytes_out: Count
    messages: Count | None = None
    #: Messages that the site's link refused to send.
    refused: Count | None = None


class SiteReport(Part):
    """One site's part in the study."""

    name: str
    #: In a word or two: finished, late in 2 rounds, revoked, …
    state: str = ""
    #: Patients the site declared (public, rounded); never an exact count.
    cohort: Count | None = None
    #: Rounds whose model has this site's update in it.
    rounds: Count | None = None
    device: str = ""
    epsilon: SiteEpsilon | None = None
    ledger: LedgerOutcome | None = None
    egress: Egress | None = None


class RoundReport(Part):
    """One round as the aggregator saw it."""

    number: Annotated[int, Field(ge=1)]
    seconds: float | None = None
    #: Sites whose update counted, and sites that were asked and did not answer well in time.
    replied: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    #: Figures that were permitted to leave: name of the figure, then site (or "" for all), value.
    figures: dict[str, dict[str, float]] = {}
    #: ε spent on this study at each site after this round.
    epsilon: dict[str, float] = {}


class Score(Part):
    """How good the final model is at one site, or over all of them."""

    #: Site, or "" for all sites together.
    site: str = ""
    #: Dice, AUC, accuracy, …; between 0 and 1.
    metric: str = "Dice"
    #: Class (or "all") to value; None where the class is absent there.
    values: dict[str, float | None]
    cases: Count | None = None


class NoisyScore(Part):
    """Mean score over all sites' test patients, from sums that each site noised and charged."""

    #: 0: the starting model, before any private step.
    rounds_done: Count
    #: Noise may take it out of [0, 1].
    score: float
    #: Of the noise alone.
    standard_error: Annotated[float, Field(gt=0)]
    sites: Count
    #: Patients evaluated on, as the sites declared.
    patients: Count

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Self:
        """Read one of the `evaluations` of `study show --json` that has a ``score``."""
        return cls(
            rounds_done=evaluation["rounds_done"],
            score=evaluation["score"],
            standard_error=evaluation["standard_error"],
            sites=len(evaluation["sites"]),
            patients=evaluation["patients"],
        )


class AttackerBound(Part):
    """The best any test for a patient's presence can do, at a rate of false alarms."""

    false_positive_rate: Share
    true_positive_rate: Share


class PrivacyReport(Part):
    """The promise and the mechanism behind it."""

    unit: str = "the patient: all scans, slices, patches and augmentations of one are one record"
    adjacency: str = "add or remove one patient"
    #: Who adds the noise and whom the promise protects against, in words.
    threat_model: str = ""
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    #: Noisy steps over the whole study, at each site.
    steps: Count
    delta: float
    #: Released evaluations, and the standard deviation of the noise on each sum of scores.
    evaluations: Count = 0
    evaluation_noise: float | None = None
    #: At the largest ε of the sites.
    attacker_bounds: tuple[AttackerBound, ...] = ()


class Picture(Part):
    """A picture of a case: PNG bytes without a patient's identity, and what it shows."""

    png: bytes
    caption: str = ""
    site: str = ""

    @field_validator("png")
    @classmethod
    def _check(cls, value: bytes) -> bytes:
        if not value.startswith(_PNG):
            raise ValueError("a picture must be a PNG image")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG header (PNG specification, 11.2.1)."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")


class StudyReport(Part):
    """Everything the report of one study may say."""

    name: str
    title: str = ""
    digest: str = ""
    #: finished: all rounds done. Anything else is said at the top of the report.
    status: Literal["finished", "running", "stopped", "failed"] = "finished"
    #: One sentence at the top that every reader must see, for example who may read this.
    banner: str = ""
    #: Who reads it: "aggregator", or the name of the site that this copy belongs to.
    audience: str = "aggregator"
    plan: tuple[PlanSection, ...] = ()
    rounds_planned: Count | None = None
    started: datetime | None = None
    ended: datetime | None = None
    created: datetime | None = None
    sites: tuple[SiteReport, ...] = ()
    rounds: tuple[RoundReport, ...] = ()
    scores: tuple[Score, ...] = ()
    #: Evaluations that sites released as private queries, in order.
    noisy_scores: tuple[NoisyScore, ...] = ()
    privacy: PrivacyReport | None = None
    pictures: tuple[Picture, ...] = ()
    #: What else the reader should know, one sentence each.
    notes: tuple[str, ...] = ()
    #: Program or library to version.
    versions: dict[str, str] = {}
