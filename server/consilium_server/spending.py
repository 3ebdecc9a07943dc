"""ε that each site's patients have spent in a study, from public numbers alone.

Computed when somebody looks and never inside a round: composing takes tenths of a second, which is
what a whole round may cost. While rounds race on, a figure may be two seconds old; it says of how
many rounds it speaks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from consilium_common.study import Study

_FRESH_SECONDS: Final = 2.0


class SpendMeter:
    """Remembers the last figures of every study that was looked at."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, dict[str, float]]] = {}

    def spent(
        self, study: Study, participants: Sequence[Sequence[str]], *, exact: bool
    ) -> Mapping[str, float]:
        """Return ε by site, for unit patient and the study's δ; empty without privacy.

        Parameters
        ----------
        participants : sequence of sequence of str
            The sites whose update was added, round by round.
        exact : bool
            Compute now, however recent the last figures are.
        """
        from consilium_common.privacy.accounting import epsilon_of, parameters

        plan = parameters(study)
        if plan is None:
            return {}
        moment, known = self._last.get(study.digest, (0.0, {}))
        if known and not exact and time.monotonic() - moment < _FRESH_SECONDS:
            return known
        rounds = Counter(site for sites in participants for site in sites)
        by_count = {
            count: round(epsilon_of([plan.event_of(count)], plan.delta), 4)
            for count in set(rounds.values())
        }
        figures = {site: by_count[count] for site, count in sorted(rounds.items())}
        self._last[study.digest] = (time.monotonic(), figures)
        return figures
