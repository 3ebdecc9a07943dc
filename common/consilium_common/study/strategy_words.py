"""A study's strategy in words: how its rounds go, whose work it is, what of it stays at a site."""

from __future__ import annotations

from collections.abc import Iterator

from consilium_common.study.schema import Study
from consilium_common.study.strategies import Cyclic, Ditto, FedBN, FedProx, FedRep, Scaffold
from consilium_common.study.words import count_of, number_of


def rounds_sentence(study: Study) -> str:
    """Return how many rounds of how many steps or epochs a site makes."""
    rounds, epochs = count_of(study.federation.rounds, "round"), study.training.epochs_per_round
    if epochs is not None:
        passes = count_of(epochs, "pass", "passes")
        return f"{rounds} of {passes} over the cohort that each site declared publicly."
    steps = count_of(study.training.steps_per_round, "step")
    return f"{rounds} of {steps} at each site: {count_of(study.total_steps, 'step')} in all."


def strategy_sentences(study: Study) -> Iterator[str]:
    """Yield the strategy with its paper, and what it does and keeps at a site."""
    strategy = study.federation.strategy
    yield f"Strategy: {strategy.name} ({strategy.paper})."
    match strategy:
        case FedProx():
            yield f"Every step is pulled towards the global model by {number_of(strategy.mu)}."
        case Scaffold():
            yield (
                "Beside the model travel control variates, as many values again; each site keeps "
                "its own."
            )
        case FedBN():
            yield "The normalisation layers are each site's own: they stay there, and are used."
        case FedRep():
            yield (
                "The head is each site's own: it stays there, and is used. It is trained in "
                f"{number_of(100 * strategy.head_share)}% of a round's steps."
            )
        case Ditto():
            yield (
                "Each site trains a personal model beside the shared one, with as many steps, "
                f"pulled towards it by {number_of(strategy.pull)}. It stays there, and is used."
            )
            if study.privacy.mode != "none":
                yield (
                    "The personal model sees patients without noise: no figure of it leaves, and "
                    "who is given it is given what it remembers."
                )
        case Cyclic():
            yield "The model goes from site to site, one a round, those asked least first."
        case _:
            return
