"""ε that each site's patients have spent in a study, from public numbers alone.

Patients who are trained on and patients who are evaluated on are different people (the test part
of the split), so their ε stand side by side and are never added.

Computed when somebody looks and never inside a round: composing takes tenths of a second, which is
what a whole round may cost. While rounds race on, a figure may be two seconds old; it says of how
many rounds it speaks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from consilium_common.study import Study

if TYPE_CHECKING:
    from consilium_common.privacy.events import PrivacyEvent

_FRESH_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Spend:
    """ε by site at the study's δ; unit the patient, adjacency add or remove one."""

    training: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)


class SpendMeter:
    """Remembers the last figures of every study that was looked at."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Spend]] = {}

    def spent(
        self,
        study: Study,
        participants: Sequence[Sequence[str]],
        evaluated: Iterable[Iterable[str]] = (),
        *,
        exact: bool,
    ) -> Spend:
        """Return ε by site; empty without privacy.

        Parameters
        ----------
        participants : sequence of sequence of str
            The sites whose update was added, round by round.
        evaluated : iterable of iterable of str
            The sites whose noised figure was released, evaluation by evaluation.
        exact : bool
            Compute now, however recent the last figures are.
        """
        if study.privacy.mode == "none":
            return Spend()
        moment, known = self._last.get(study.digest, (0.0, Spend()))
        if moment and not exact and time.monotonic() - moment < _FRESH_SECONDS:
            return known
        from consilium_common.privacy.accounting import parameters

        plan = parameters(study)
        assert plan is not None  # the study is private
        found = Spend(
            training=_composed(plan.event_per_round, participants, plan.delta),
            evaluation=_composed(plan.evaluation_event, evaluated, plan.delta),
        )
        self._last[study.digest] = (time.monotonic(), found)
        return found


def _composed(
    event: PrivacyEvent | None, took_part: Iterable[Iterable[str]], delta: float
) -> dict[str, float]:
    """Return ε of as many events as each site took part in; sites alike are computed once."""
    from consilium_common.privacy.accounting import epsilon_of

    if event is None:
        return {}
    counts = Counter(site for sites in took_part for site in sites)
    by_count = {
        count: round(epsilon_of([replace(event, steps=event.steps * count)], delta), 4)
        for count in set(counts.values())
    }
    return {site: by_count[count] for site, count in sorted(counts.items())}
