"""Small studies and policies for tests of budgets."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_samples import patients

from consilium_client.budget.charging import charge_round
from consilium_client.budget.policy import Policy
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study.schema import Study

#: One round of the study below, and all of it: ε 2.62 at δ = 1e-3.
ROUND = PrivacyEvent(0.1, 2.0, 20)
ROUNDS = 10
WHOLE = PrivacyEvent(0.1, 2.0, 20 * ROUNDS)
DELTA = 1e-3
COST = epsilon_of([WHOLE], DELTA)
COHORT = patients(20)


def study(
    name: str = "first", *, release: str = "none", metrics: float | None = None, **privacy: Any
) -> Study:
    """Return a private study of ten rounds; ``metrics`` is ε of released evaluation figures."""
    evaluation: dict[str, Any] = {"release": release}
    if metrics is not None:
        evaluation = {"release": "private", "epsilon": metrics}
    private = {
        "mode": "patient",
        "sampling_rate": 0.1,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": DELTA,
    }
    return Study.model_validate(
        {
            "schema": "consilium/study/v1",
            "name": name,
            "task": {
                "kind": "segmentation",
                "dimensions": 2,
                "inputs": ["image"],
                "classes": ["background", "organ"],
            },
            "model": {"network": "unet"},
            "training": {"steps_per_round": 20},
            "privacy": {"mode": "none"}
            if privacy.get("mode") == "none"
            else {**private, **privacy},
            "federation": {"rounds": ROUNDS},
            "evaluation": evaluation,
        }
    )


def policy(
    epsilon: float = 10.0, delta: float = DELTA, period_days: int | None = None, **more: Any
) -> Policy:
    """Return a policy; the cautious defaults where nothing else is said."""
    return Policy.model_validate(
        {
            "schema": "consilium/policy/v1",
            "budget": {"epsilon": float(epsilon), "delta": delta, "period_days": period_days},
            **more,
        }
    )


def run_round(
    ledger: Ledger, rules: Policy, index: int, *, asked: Study, members: list[str] | None = None
) -> None:
    charge_round(
        ledger,
        rules,
        asked,
        index,
        COHORT if members is None else members,
        event=ROUND,
        clip_norm=1.0,
    )


def refused(code: str) -> Any:
    """Expect one error of this code."""
    return pytest.raises(ConsiliumError, match=code.replace(".", r"\."))
