"""Who signs a study reads what its rounds mean for a site, and what of that has changed."""

from __future__ import annotations

from typing import Any

import pytest
from strategy_samples import strategy_study

from consilium_common.study import Study
from consilium_common.study.comparison import compare
from consilium_common.study.federation_words import federation_sentences
from consilium_common.study.strategy_words import strategy_sentences

PRIVACY: dict[str, Any] = {
    "mode": "patient",
    "sampling_rate": 0.5,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": 1e-3,
}
PLAIN = "A round needs 2 sites and waits for the others at most 30 min; sites weigh by the cohort"

#: What a study declares of its rounds; what is said of it; what is said to a site that approved
#: the study before.
DECLARED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "sampling": (
        {"sites_per_round": 3},
        ["Each round asks 3 sites, drawn at random"],
        ["federation.sites_per_round: none → 3"],
    ),
    "a learned deadline": (
        {"deadline_seconds": "learned", "deadline_bound_seconds": 900.0},
        ["waits for the others at most 15 min", "learned from the rounds before"],
        [
            "federation.deadline_bound_seconds: 1800 → 900",
            "federation.deadline_seconds: 1800 → learned",
        ],
    ),
    "grace": (
        {"grace_seconds": 600.0},
        ["waits for the others at most 40 min", "It holds a grace of 10 min"],
        ["federation.grace_seconds: 0 → 600"],
    ),
    "a bound of the norm": (
        {"screening": {"norm_bound": 5.0}},
        ["by more than 5 (L2 norm) is left out", "The operator is shown these figures"],
        ["federation.screening.norm_bound: none → 5"],
    ),
    "clipping": (
        {"screening": {"clip_norm": 2.5}},
        ["a change longer than 2.5 (L2 norm) is scaled", "The operator is shown these figures"],
        ["federation.screening.clip_norm: none → 2.5"],
    ),
    "a cosine": (
        {"screening": {"cosine": 0.25}},
        ["changes is below 0.25", "The operator is shown these figures"],
        ["federation.screening.cosine: none → 0.25"],
    ),
    "buffered rounds": (
        {
            "buffered": {"size": 3, "most_staleness": 4, "server_learning_rate": 0.5},
            "sites_per_round": 6,
        },
        [
            "Buffered rounds (FedBuff",
            "updates of 3 sites are in, 2 of them usable",
            "more than 4 rounds ago, or when the site takes longer than 30 min",
            "moves by 0.5 times",
            "At most 6 sites at work at a time",
        ],
        [
            "federation.buffered.most_staleness: 4 is new",
            "federation.buffered.server_learning_rate: 0.5 is new",
            "federation.buffered.size: 3 is new",
            "federation.sites_per_round: none → 6",
        ],
    ),
}


def study_of(federation: dict[str, Any], *, private: bool = False) -> Study:
    value = strategy_study(privacy=PRIVACY if private else None).to_canonical()
    value["federation"] |= federation
    return Study.model_validate(value)


@pytest.mark.parametrize("what", DECLARED)
def test_what_is_declared_of_the_rounds_is_said_and_so_is_its_change(what: str) -> None:
    federation, said, changed = DECLARED[what]
    study, plain = study_of(federation), study_of({})
    text = "\n".join(federation_sentences(study))
    for part in said:
        assert part in text
    assert sorted(compare(plain, study)) == changed
    assert len(compare(study, plain)) == len(changed)
    assert compare(study, study) == []


@pytest.mark.parametrize("private", [False, True])
def test_of_what_is_not_declared_nothing_is_said(private: bool) -> None:
    (sentence,) = federation_sentences(study_of({}, private=private))
    assert sentence.startswith(PLAIN)


def test_a_change_of_strategy_is_told_by_its_name() -> None:
    assert compare(study_of({}), study_of({"strategy": {"name": "fedprox", "mu": 1.0}})) == [
        "federation.strategy.name: fedavg → fedprox",
        "federation.strategy.mu: 1 is new",
    ]


def test_a_cyclic_study_asks_one_site_a_round_whatever_else_it_says() -> None:
    study = study_of({"strategy": "cyclic", "quorum": 1, "sites_per_round": 3})
    assert "one a round" in "\n".join(strategy_sentences(study))
    assert "drawn at random" not in "\n".join(federation_sentences(study))


@pytest.mark.parametrize("what", DECLARED)
def test_a_private_study_says_what_updates_that_do_not_count_cost(what: str) -> None:
    federation, _, _ = DECLARED[what]
    text = "\n".join(federation_sentences(study_of(federation, private=True)))
    leaves_out = what not in ("sampling", "grace", "clipping")
    assert ("late, too old or left out costs what any other does" in text) == leaves_out
    assert ("a site that is asked in fewer spends less" in text) == (
        "sites_per_round" in federation
    )
    assert "ε" not in "\n".join(federation_sentences(study_of(federation)))
