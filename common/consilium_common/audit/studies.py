"""What a ledger charged for one study, and whether it is the mechanism that the study declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilium_common.audit.ledger_report import StudyCost
from consilium_common.ledger.state import Charge, LedgerState
from consilium_common.privacy.accounting import parameters
from consilium_common.privacy.events import SCORE_SENSITIVITY

if TYPE_CHECKING:
    from consilium_common.study.schema import Study


@dataclass(frozen=True)
class Mechanism:
    """Events of one kind that a study charged: ``steps`` are all that stand."""

    purpose: str
    model: str
    sampling_rate: float
    noise_multiplier: float
    clip_norms: tuple[float, ...]
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "clip_norms": list(self.clip_norms)}


@dataclass(frozen=True)
class AuditedStudy:
    """One study in the ledger; the words are of its document, where that was at hand.

    ``start`` says which public data the first weights were trained on, if any were;
    ``as_declared`` whether every charge is of the mechanism that the document declares (None
    without the document).
    """

    cost: StudyCost
    name: str
    title: str
    start: str
    as_declared: bool | None
    mechanisms: tuple[Mechanism, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "title": self.title,
            "public_start": self.start,
            "as_declared": self.as_declared,
            **self.cost.to_dict(),
            "mechanisms": [one.to_dict() for one in self.mechanisms],
        }


def audited_study(state: LedgerState, cost: StudyCost, document: Study | None) -> AuditedStudy:
    """Gather what a verified ledger charged for one study, and hold it against its document.

    Parameters
    ----------
    state : LedgerState
        Of a verified ledger.
    cost : StudyCost
        The study's price, recomputed.
    document : Study or None
        None where it is not at hand.

    Raises
    ------
    ConsiliumError
        ``privacy.unreachable`` when the document asks for an ε that no noise keeps.
    """
    kinds: dict[tuple[str, str, float, float], list[tuple[int, float]]] = {}
    for charge in state.standing(cost.study):
        event = charge.event
        key = (charge.purpose, charge.model, event.sampling_rate, event.noise_multiplier)
        kinds.setdefault(key, []).append((event.steps, charge.clip_norm))
    return AuditedStudy(
        cost=cost,
        name="" if document is None else document.name,
        title="" if document is None else document.title,
        start="" if document is None or document.model.start is None else document.model.start.data,
        as_declared=None
        if document is None
        else _as_declared(state.standing(cost.study), document),
        mechanisms=tuple(
            Mechanism(*key, tuple(sorted({clip for _, clip in of})), sum(step for step, _ in of))
            for key, of in kinds.items()
        ),
    )


def _as_declared(charges: list[Charge], study: Study) -> bool:
    """Whether the charges are those of the study's document; a clip norm that adapts may differ."""
    declared = parameters(study)
    if declared is None or study.privacy.mode == "none":
        return False
    events = {
        "training": declared.event_per_round,
        "evaluation": declared.evaluation_event,
        "statistics": declared.statistics_event,
    }
    bounds = {"evaluation": SCORE_SENSITIVITY, "statistics": declared.statistics_sensitivity}
    if study.privacy.clipping.kind != "adaptive":
        bounds["training"] = declared.clip_norm
    return all(
        charge.event == events[charge.purpose]
        and charge.model == study.privacy.model
        and charge.clip_norm == bounds.get(charge.purpose, charge.clip_norm)
        for charge in charges
    )
