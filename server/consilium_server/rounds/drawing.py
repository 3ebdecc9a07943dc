"""Which sites a round asks: all of them, a fair draw, or one after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from consilium_common.study import Study


class Drawing:
    """The order in which sites are asked; its state lies in the checkpoint.

    Those that were asked least come first. Ties are broken at random, in a cyclic study by name.
    A site that joins later begins where the least asked of the others stands, so that it does not
    have to make up for the rounds before it. The same state and the same sites give the same
    order, also after a crash.

    Parameters
    ----------
    random : mapping
        ``Checkpoint.random``; empty at the study's beginning.
    """

    def __init__(self, study: Study, random: Mapping[str, Any]) -> None:
        self._by_name = study.federation.strategy.name == "cyclic"
        #: Sites that a round asks; None: all.
        self.count = 1 if self._by_name else study.federation.sites_per_round
        self._generator = np.random.Generator(np.random.PCG64(int(study.digest[:16], 16)))
        if random:
            self._generator.bit_generator.state = random["generator"]
        self._asked: dict[str, int] = dict(random.get("asked", {}))
        self._ties: dict[str, float] = {}

    def begin(self, sites: Collection[str]) -> None:
        """Begin a round.

        Parameters
        ----------
        sites : collection of str
            All that take part in the study, online or not: so what is drawn does not depend on
            who happens to be there.
        """
        if self.count is None:
            return
        least = min((self._asked[site] for site in sites if site in self._asked), default=0)
        for site in sites:
            self._asked.setdefault(site, least)
        names = sorted(sites)
        self._ties = dict(zip(names, self._generator.random(len(names)).tolist(), strict=True))

    def order(self, sites: Collection[str]) -> list[str]:
        """Return the sites in the order in which this round asks them."""
        if self.count is None:
            return sorted(sites)
        return sorted(
            sites,
            key=lambda site: (
                self._asked.get(site, 0),
                0.0 if self._by_name else self._ties.get(site, 1.0),
                site,
            ),
        )

    def note(self, sites: Sequence[str]) -> None:
        """Note that the round has asked these."""
        if self.count is not None:
            for site in sites:
                self._asked[site] = self._asked.get(site, 0) + 1

    def state(self) -> dict[str, Any]:
        """Return what the next round begins with, as JSON."""
        if self.count is None:
            return {}
        return {"generator": self._generator.bit_generator.state, "asked": self._asked}
