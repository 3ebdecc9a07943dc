"""A study's rounds over the sites in words: who is asked, who is waited for, what is left out."""

from __future__ import annotations

from collections.abc import Iterator

from consilium_common.study.federation import Buffered, Screening
from consilium_common.study.schema import Study
from consilium_common.study.strategies import Cyclic
from consilium_common.study.words import count_of, duration_of, number_of


def federation_sentences(study: Study) -> Iterator[str]:
    """Yield what a study declares of its rounds and what it means for a site that signs it.

    Nothing is said of what is not declared: all sites are asked, and every update counts.
    """
    federation = study.federation
    weights = {
        "uniform": "all sites weigh alike",
        "cohort": "sites weigh by the cohort size they declared publicly",
    }[federation.weighting]
    longest = duration_of(federation.longest_seconds)
    if federation.buffered is not None:
        yield from _buffered(federation.buffered, federation.quorum, longest)
    else:
        quorum = count_of(federation.quorum, "site")
        yield f"A round needs {quorum} and waits for the others at most {longest}; {weights}."
    if federation.deadline_seconds == "learned":
        yield (
            "That time is learned from the rounds before, and may be shorter: a site that takes "
            "much longer than the others did is left out of the round."
        )
    if federation.grace_seconds:
        grace = duration_of(federation.grace_seconds)
        yield f"It holds a grace of {grace} for those who are late at the deadline."
    if federation.buffered is not None:
        yield f"In a round {weights}."
    yield from _asked(study)
    yield from _screening(federation.screening)
    if study.privacy.mode != "none" and _may_leave_out(study):
        yield (
            "ε is charged at the site before it computes: an update that is late, too old or left "
            "out costs what any other does."
        )


def _asked(study: Study) -> Iterator[str]:
    number = study.federation.sites_per_round
    # A cyclic study asks one site a round whatever else it says.
    if number is None or isinstance(study.federation.strategy, Cyclic):
        return
    if study.federation.buffered is not None:
        yield f"At most {count_of(number, 'site')} at work at a time; those asked least come first."
    else:
        yield (
            f"Each round asks {count_of(number, 'site')}, drawn at random, those asked least "
            "first; the others sit it out."
        )
    if study.privacy.mode != "none":
        yield "The ε below counts every round: a site that is asked in fewer spends less."


def _buffered(settings: Buffered, quorum: int, longest: str) -> Iterator[str]:
    usable = "" if quorum == settings.size else f", {quorum:,} of them usable"
    yield (
        "Buffered rounds (FedBuff; Nguyen et al., AISTATS 2022): no site waits for another. The "
        f"global model moves whenever updates of {count_of(settings.size, 'site')} are in{usable}; "
        "that is a round."
    )
    yield (
        "An update is left out when its round began more than "
        f"{count_of(settings.most_staleness, 'round')} ago, or when the site takes longer than "
        f"{longest}."
    )
    if settings.server_learning_rate != 1:
        share = number_of(settings.server_learning_rate)
        yield f"The global model moves by {share} times the updates' mean change."


def _screening(settings: Screening) -> Iterator[str]:
    if settings == Screening():
        return
    if settings.norm_bound is not None:
        yield (
            "Screening: an update that changes the global model by more than "
            f"{number_of(settings.norm_bound)} (L2 norm) is left out."
        )
    if settings.clip_norm is not None:
        yield (
            f"Screening: a change longer than {number_of(settings.clip_norm)} (L2 norm) is scaled "
            "down to that."
        )
    if settings.cosine is not None:
        yield (
            "Screening: an update is left out when the cosine between its change and the median "
            f"of all sites' changes is below {number_of(settings.cosine)}."
        )
    yield "The operator is shown these figures of each site."


def _may_leave_out(study: Study) -> bool:
    """Whether the study declares a reason to leave an honest update out."""
    federation = study.federation
    return (
        federation.buffered is not None
        or federation.deadline_seconds == "learned"
        or federation.screening.norm_bound is not None
        or federation.screening.cosine is not None
    )
