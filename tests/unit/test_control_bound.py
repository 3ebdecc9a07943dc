"""A control variate that no honest training makes is refused before anybody pays for the round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from strategy_samples import RATE, one_image_cohort, start_of, strategy_study

from consilium_client.training.control_bound import control_bound
from consilium_client.training.session import TrainingSession
from consilium_common.errors import ConsiliumError
from consilium_common.models.exchange import CONTROL
from consilium_common.models.weights import Array, pack
from consilium_common.privacy.accounting import parameters
from consilium_common.study import Study

PRIVACY: dict[str, Any] = {
    "mode": "patient",
    "sampling_rate": 0.5,
    "clip_norm": 0.5,
    "noise_multiplier": 0.5,
    "delta": 1e-3,
}


def scaffold(**changes: Any) -> Study:
    return strategy_study("scaffold", **changes)


def bound_of(study: Study, values: int = 100) -> float:
    return control_bound(study, parameters(study), values)


def sent_with(study: Study, norm: float) -> dict[str, Array]:
    """Return what the aggregator sends, with a control variate of that norm."""
    sent = start_of(study)
    names = [name for name in sent if name.startswith(CONTROL)]
    values = sum(sent[name].size for name in names)
    for name in names:
        sent[name] = np.full(sent[name].shape, norm / math.sqrt(values), np.float32)
    return sent


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
def test_a_huge_control_variate_is_refused_before_training_and_a_long_one_is_not(
    privacy: dict[str, Any] | None,
) -> None:
    study = scaffold(privacy=privacy)
    session = TrainingSession(study, one_image_cohort(), device="cpu")
    start = start_of(study)
    values = sum(one.size for name, one in start.items() if name.startswith(CONTROL))
    bound = bound_of(study, values)
    session.require_model(pack(sent_with(study, 0.99 * bound)), training=True)
    for norm in (1.01 * bound, 1e30):
        hostile = sent_with(study, norm)
        for check in (
            lambda sent=hostile: session.require_model(pack(sent), training=True),
            lambda sent=hostile: session.train(sent, 0, 1),
        ):
            with pytest.raises(ConsiliumError, match="no honest training") as caught:
                check()
            assert caught.value.code == "run.bad-update"
            assert f"{norm:.4g}" in caught.value.message
            assert caught.value.hint
    # What training really makes has much room.
    kept = session.train(start, 0, 1).kept
    norm = math.sqrt(sum(float(np.square(one).sum()) for one in kept.values()))
    assert 0 < norm < bound / 5


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("declared", [1, 10])
def test_no_released_gradient_of_an_honest_site_is_longer(rate: float, declared: int) -> None:
    clip, sigma, values = 0.7, 1.3, 500
    privacy = {**PRIVACY, "sampling_rate": rate, "clip_norm": clip, "noise_multiplier": sigma}
    rng = np.random.default_rng(0)
    # Twice as many patients as were declared, all of them drawn, all pulling one way.
    direction = np.ones(values) / math.sqrt(values)
    longest = max(
        float(np.linalg.norm(2 * declared * clip * direction + noise))
        for noise in rng.normal(0, sigma * clip, (200, values))
    )
    bound = bound_of(scaffold(privacy=privacy), values)
    assert longest / (rate * declared) <= bound


def test_without_privacy_the_study_s_own_learning_rate_bounds_it() -> None:
    loss = 1 + math.log(2)
    assert bound_of(scaffold()) == pytest.approx(100 * math.sqrt(loss / RATE))
    adam = scaffold(training={"optimiser": {"name": "adamw", "learning_rate": 1e-3}})
    assert bound_of(adam) == pytest.approx(100 * loss / 1e-3)
    adaptive = scaffold(privacy={**PRIVACY, "clipping": {"kind": "adaptive"}})
    # Its clip norm follows gradients' norms, which nothing else bounds.
    assert bound_of(adaptive) > bound_of(scaffold())
    assert bound_of(scaffold(privacy=PRIVACY)) < bound_of(adaptive) < math.inf
