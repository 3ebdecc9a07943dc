"""Who reviews a study reads which strategy it has, and what of it stays at the site."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from strategy_samples import strategy_study

from consilium_common.study import Study
from consilium_common.study.plan import describe
from consilium_common.study.strategies import ALL
from consilium_common.study.strategy_words import rounds_sentence, strategy_sentences

PRIVACY: dict[str, Any] = {
    "mode": "patient",
    "sampling_rate": 0.5,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": 1e-3,
}


def under(strategy: str, **changes: Any) -> Study:
    value = strategy_study(**changes).to_canonical()
    value["federation"] |= {"strategy": strategy, "quorum": 1 if strategy == "cyclic" else 5}
    return Study.model_validate(value)


@pytest.mark.parametrize("kind", ALL)
def test_every_strategy_is_named_with_its_paper(kind: Any) -> None:
    (name,) = get_args(kind.model_fields["name"].annotation)
    first, *more = strategy_sentences(under(name))
    assert first == f"Strategy: {name} ({kind.paper})."
    stays = any("stays there" in sentence or "stay there" in sentence for sentence in more)
    assert stays == (name in ("fedbn", "fedrep", "ditto"))


def test_the_plan_says_what_stays_and_what_a_personal_model_remembers() -> None:
    plan = "\n".join(describe(under("ditto", privacy=PRIVACY)))
    assert "It stays there, and is used." in plan
    assert "no figure of it leaves" in plan
    assert "no figure of it leaves" not in "\n".join(describe(under("ditto")))


def test_epochs_are_told_as_passes_over_the_declared_cohort() -> None:
    assert rounds_sentence(strategy_study()) == "4 rounds of 3 steps at each site: 12 steps in all."
    epochs = strategy_study(training={"epochs_per_round": 1})
    assert rounds_sentence(epochs) == (
        "4 rounds of 1 pass over the cohort that each site declared publicly."
    )
