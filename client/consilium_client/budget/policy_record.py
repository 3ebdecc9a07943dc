"""A change of the site's policy is an entry of its ledger: what was permitted, and from when on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilium_client.budget.policy import Policy, load_policy
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_common.ledger.entries import Head
from consilium_common.ledger.store import Ledger


@dataclass(frozen=True)
class PolicyRecord:
    """The policy as it now stands in the ledger, and how it differs from the one before."""

    policy: Policy
    #: Whether this was a change, or the first policy of all.
    recorded: bool
    #: By dotted key what was and what is; of the first policy every key is new.
    changes: Mapping[str, tuple[Any, Any]]
    sequence: int | None  #: of the new entry

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "policy": self.policy.to_canonical(),
            "recorded": self.recorded,
            "changes": {key: {"was": a, "is": b} for key, (a, b) in self.changes.items()},
            "sequence": self.sequence,
        }

    def lines(self) -> list[str]:
        """Say the policy in words, and what of it is new."""
        policy, budget = self.policy, self.policy.budget
        metrics = policy.private_metrics_epsilon
        models = ", ".join(policy.permitted_threat_models) or "none: no private study may run"
        cap = "no cap of its own" if policy.per_study_epsilon is None else "at most ε "
        cap += "" if policy.per_study_epsilon is None else f"{policy.per_study_epsilon:g}"
        said = [
            f"Budget: ε {budget.epsilon:g} at δ {budget.delta:g} per patient, {budget.span} "
            "(unit patient, adjacency add or remove one).",
            f"One study: {cap}. Threat models permitted: {models}.",
            f"Studies without privacy: {_permitted(policy.permit_non_private)}; their exact "
            f"evaluation figures: {_permitted(policy.release_exact_metrics)}.",
            "Noised evaluation figures, and noised statistics, of private studies: "
            + ("refused." if metrics is None else f"at most ε {metrics:g} each a study."),
            f"At least {policy.minimal_cohort} patients here, and studies that need at least "
            f"{policy.minimal_sites} sites.",
        ]
        rule = policy.approve_automatically
        said += ["A person approves every study."] if rule is None else list(rule.lines())
        if budget.period_days is not None:
            said.append(
                "With a period the promise holds within the period, not over a lifetime: what "
                "was released stays released, and successive periods compose."
            )
        if not self.recorded:
            return [*said, "The ledger has recorded it already."]
        changed = [f"  {key}: {_shown(a)} → {_shown(b)}" for key, (a, b) in self.changes.items()]
        return [*said, f"Recorded in the ledger as entry {self.sequence}:", *changed]


def record_current_policy(home: SiteHome, identity: SiteIdentity) -> PolicyRecord:
    """Check ``policy.yaml``, and record it in the ledger where it differs from the last one.

    Raises
    ------
    ConsiliumError
        ``privacy.no-policy``, ``privacy.policy-invalid``, and those of opening the ledger.
    """
    policy = load_policy(home)
    with Ledger.open(home.ledger, identity.signer(), site=identity.config.name) as ledger:
        before = ledger.state.policy
        entry = ledger.record_policy(policy.to_canonical())
    changes = _differences(before or {}, policy.to_canonical()) if entry else {}
    return PolicyRecord(policy, entry is not None, changes, entry.sequence if entry else None)


def policy_entry(home: SiteHome, identity: SiteIdentity, policy: Policy) -> Head:
    """Return the ledger's entry that holds a policy, after recording it where it is new.

    An automatic approval names it, so that whoever reads the approval finds what permitted it.

    Raises
    ------
    ConsiliumError
        Those of opening and writing the ledger.
    """
    with Ledger.open(home.ledger, identity.signer(), site=identity.config.name) as ledger:
        recorded = ledger.record_policy(policy.to_canonical())
        if recorded is not None:
            return recorded.head
        newest = [entry for entry in ledger.entries() if entry.kind == "policy"][-1]
    return newest.head


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    old, new = _flat(before), _flat(after)
    keys = dict.fromkeys([*new, *old])
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k, ...) != new.get(k, ...)}


def _flat(policy: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in policy.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _permitted(allowed: bool) -> str:
    return "permitted" if allowed else "refused"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value).lower() if value in (True, False) else str(value)
