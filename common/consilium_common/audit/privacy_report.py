"""Everything that can be recomputed about a site's privacy, gathered once for HTML and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_common.audit.compare import check_consortium
from consilium_common.audit.hazards import (
    NOT_COVERED,
    THREAT_MODELS,
    Facts,
    Hazard,
    hazards,
)
from consilium_common.audit.ledger_report import (
    Audited,
    LedgerReport,
    audited,
    report_of,
)
from consilium_common.audit.reconcile import Reconciliation, reconcile
from consilium_common.audit.studies import AuditedStudy, audited_study
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.spend import Spend, spend, worst
from consilium_common.ledger.state import LedgerState
from consilium_common.privacy.events import ADJACENCY, UNIT, History
from consilium_common.privacy.reconstruction import (
    ASSUMPTIONS,
    ReconstructionBound,
    reconstruction_bound,
)
from consilium_common.privacy.tradeoff import NAMED_RATES, OperatingPoint, true_positive_bound
from consilium_common.report.wording import percent, plural

if TYPE_CHECKING:
    from cryptography import x509

    from consilium_common.audit.documents import Records
    from consilium_common.audit.evidence import Evidence

SCHEMA: Final = "consilium/audit-report/v1"
#: Moments in the curve of spend; more would not be seen.
_MOMENTS: Final = 40
#: False positive rates of the curve: 1e-4 to 1, even in the logarithm.
CURVE_RATES: Final = tuple(10 ** (-4 + 4 * index / 80) for index in range(81))


@dataclass(frozen=True)
class Identity:
    """Whose key signed, by whose word; empty where only a bare key was given."""

    consortium: str
    authority: str
    valid: str
    witness: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class AuditReport:
    """One audit of one site. Every ε is for unit patient, adjacency add or remove one.

    ``spend``, ``timeline``, ``curve``, ``points`` and ``reconstruction`` are of the δ in
    ``spend`` and empty where nothing was charged; the latter three are for the patient who has
    spent most.
    """

    written_at: datetime
    ledger: LedgerReport
    identity: Identity
    studies: tuple[AuditedStudy, ...]
    budget: float | None
    spend: Spend | None
    timeline: tuple[tuple[datetime, float], ...]
    curve: tuple[OperatingPoint, ...]
    points: tuple[OperatingPoint, ...]
    reconstruction: tuple[ReconstructionBound, ...]
    hazards: tuple[Hazard, ...]
    reconciliation: Reconciliation
    records_of: str
    versions: dict[str, str]

    @property
    def threat_models(self) -> dict[str, str]:
        """The models that the ledger's charges name, in words."""
        named = dict.fromkeys(m.model for study in self.studies for m in study.mechanisms)
        return {model: THREAT_MODELS[model] for model in named}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the report as JSON."""
        return {
            "schema": SCHEMA,
            "written_at": self.written_at.isoformat(),
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "threat_models": self.threat_models,
            "ledger": self.ledger.to_dict(),
            "identity": self.identity.to_dict(),
            "studies": [study.to_dict() for study in self.studies],
            "budget": self.budget,
            "spend": None if self.spend is None else self.spend.to_dict(),
            "spend_over_time": [
                {"time": time.isoformat(), "epsilon": epsilon} for time, epsilon in self.timeline
            ],
            "trade_off": [point.to_dict() for point in self.curve],
            "attacker": [point.to_dict() for point in self.points],
            "reconstruction": {
                "assumptions": list(ASSUMPTIONS),
                "bounds": [bound.to_dict() for bound in self.reconstruction],
            },
            "hazards": [hazard.to_dict() for hazard in self.hazards],
            "reconciliation": self.reconciliation.to_dict(),
            "records_written_at": self.records_of,
            "not_covered": list(NOT_COVERED),
            "versions": self.versions,
        }

    def summary(self, out: Path) -> str:
        """Say the main figures in a few lines, for the terminal."""
        check = self.ledger.worst
        lines = [f"{self.ledger.site}: {self.ledger.entries} entries verified."]
        if check is not None:
            budget = "" if self.budget is None else f" of a budget of {self.budget:g}"
            lines.append(
                f"Most spent by any patient: ε {check.pld:.3f}{budget} at δ {check.delta:g} "
                f"(PLD; {check.agreement.replace('-', ' ')} with PRV)."
            )
            lines += [
                f"An attacker with {percent(point.false_positive_rate)} false alarms recognises at "
                f"most {percent(point.true_positive_rate)} of the patients."
                for point in self.points[1:2]
            ]
        found = self.reconciliation
        lines.append(
            f"Egress: {plural(len(found.differences), 'difference')}, {len(found.serious)} serious."
        )
        lines += [f"Not compared: {one.message}" for one in found.not_compared]
        return "\n".join([*lines, f"Wrote {out}."])


def audit_report(
    evidence: Evidence,
    *,
    records: Records | None = None,
    delta: float | None = None,
    written_at: datetime | None = None,
) -> AuditReport:
    """Verify the evidence and recompute everything from it.

    Parameters
    ----------
    evidence : Evidence
        The ledger with its keys, and the site's egress list where it is at hand.
    records : Records, optional
        The aggregator's records of the site.
    delta : float, optional
        δ of the figures over all studies (default: the recorded policy's).
    written_at : datetime, optional
        (default: now).

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-broken``: nothing is reported of a ledger that does not verify;
        ``privacy.evidence-mismatch`` when evidence and records are of two sites or consortia.
    """
    found = audited(evidence)
    state = found.state
    ledger = report_of(evidence, found, delta=delta)
    reconciliation = _reconciled(evidence, found, records)
    at = None if ledger.worst is None else ledger.worst.delta
    history: History = () if at is None else worst(state, at).history
    studies = tuple(
        audited_study(state, cost, evidence.studies.get(cost.study)) for cost in ledger.studies
    )
    budget = _budget(state)
    return AuditReport(
        written_at=written_at or datetime.now(UTC),
        ledger=ledger,
        identity=_identity(evidence),
        studies=studies,
        budget=budget,
        spend=None if at is None else spend(state, at),
        timeline=() if at is None else _timeline(state, at),
        curve=true_positive_bound(history, CURVE_RATES) if history else (),
        points=true_positive_bound(history, NAMED_RATES) if history else (),
        reconstruction=reconstruction_bound(history) if history else (),
        hazards=hazards(
            _facts(
                evidence=evidence,
                records=records,
                ledger=ledger,
                studies=studies,
                budget=budget,
                reconciliation=reconciliation,
            )
        ),
        reconciliation=reconciliation,
        records_of="" if records is None else records.written_at,
        versions=_versions(),
    )


def _reconciled(evidence: Evidence, found: Audited, records: Records | None) -> Reconciliation:
    if records is not None:
        check_consortium(evidence, records)
        if records.site != found.state.site:
            raise ConsiliumError(
                "privacy.evidence-mismatch",
                f"The ledger is of {found.state.site}, the aggregator's records of {records.site}.",
                where=records.path,
                hint="Ask the aggregator for the records of this site.",
            )
    return reconcile(
        found.state,
        egress=evidence.egress,
        receipts=evidence.receipts,
        records=records,
        studies=evidence.studies,
        entries=found.entries,
        taken=evidence.taken,
    )


def _timeline(state: LedgerState, delta: float) -> tuple[tuple[datetime, float], ...]:
    times = sorted({charge.time for charge in state.standing()})
    if len(times) > _MOMENTS:
        times = [times[round(i * (len(times) - 1) / (_MOMENTS - 1))] for i in range(_MOMENTS)]
    # `until` leaves its own moment out, so a moment counts what comes before the next one.
    ends = [*times[1:], None]
    return tuple(
        (_moment(time), worst(state, delta, until=end).epsilon)
        for time, end in zip(times, ends, strict=True)
    )


def _moment(time: str) -> datetime:
    return datetime.strptime(time, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def _budget(state: LedgerState) -> float | None:
    budget = (state.policy or {}).get("budget")
    epsilon = budget.get("epsilon") if isinstance(budget, dict) else None
    return float(epsilon) if isinstance(epsilon, int | float) else None


def _identity(evidence: Evidence) -> Identity:
    from consilium_common.identity.keys import public_fingerprint

    signer, trust = evidence.signer, evidence.trust
    valid = "" if signer is None else f"{signer.not_before:%Y-%m-%d} to {signer.not_after:%Y-%m-%d}"
    return Identity(
        consortium="" if trust is None else trust.consortium,
        authority="" if trust is None else _fingerprint(trust.authorities[0]),
        valid=valid,
        witness="" if evidence.witness is None else public_fingerprint(evidence.witness),
    )


def _fingerprint(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import hashes

    return certificate.fingerprint(hashes.SHA256()).hex()


def _facts(
    *,
    evidence: Evidence,
    records: Records | None,
    ledger: LedgerReport,
    studies: tuple[AuditedStudy, ...],
    budget: float | None,
    reconciliation: Reconciliation,
) -> Facts:
    check = ledger.worst
    checks = [study.cost.epsilon for study in studies] + ([check] if check else [])
    clips = {
        clip
        for study in studies
        for one in study.mechanisms
        if one.purpose == "training"
        for clip in one.clip_norms
    }
    return Facts(
        epsilon=0.0 if check is None else check.pld,
        delta=0.0 if check is None else check.delta,
        patients=ledger.patients,
        budget=budget,
        as_declared=all(study.as_declared is not False for study in studies),
        accountants_agree=all(one.ok for one in checks),
        clip_norms=tuple(sorted(clips)),
        witnessed=ledger.witnessed,
        entries=ledger.entries,
        witness_checked=ledger.witness_checked,
        reconciled=evidence.egress is not None or records is not None,
        serious=len(reconciliation.serious),
        without_privacy=reconciliation.without_privacy,
    )


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("consilium", "dp-accounting", "opacus", "cryptography")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}
