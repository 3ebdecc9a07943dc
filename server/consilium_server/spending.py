"""ε that each site's patients have spent in a study, from public numbers alone.

Patients who are trained on and patients who are evaluated on are different people (the test part
of the split), so their ε stand side by side and are never added.

Computed when somebody looks and never inside a round: composing takes tenths of a second, which is
what a whole round may cost. While rounds race on, a figure may be two seconds old; it says of how
many rounds it speaks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
        counted: Iterable[str] = (),
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
        counted : iterable of str
            The sites that released statistics of the patients they train on.
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
            training=_composed(
                [
                    *((site, plan.event_per_round) for sites in participants for site in sites),
                    *((site, plan.statistics_event) for site in counted),
                ],
                plan.delta,
            ),
            evaluation=_composed(
                ((site, plan.evaluation_event) for sites in evaluated for site in sites), plan.delta
            ),
        )
        self._last[study.digest] = (time.monotonic(), found)
        return found


def _composed(charged: Iterable[tuple[str, PrivacyEvent | None]], delta: float) -> dict[str, float]:
    """Return ε of all events of each site; sites alike are computed once."""
    from consilium_common.privacy.accounting import epsilon_of
    from consilium_common.privacy.events import grouped

    events: dict[str, list[PrivacyEvent]] = {}
    for site, event in charged:
        if event is not None:
            events.setdefault(site, []).append(event)
    histories = {site: grouped(of) for site, of in events.items()}
    by_history = {
        history: round(epsilon_of(history, delta), 4) for history in set(histories.values())
    }
    return {site: by_history[history] for site, history in sorted(histories.items())}
