"""Sites that fail round after round are asked no more for a while, and told so."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import func, select

from consilium_server.registry import Registry
from consilium_server.round_tables import ACCEPTED, BUSY, SiteRound

#: So many rounds running without an accepted update.
FAILURES: Final = 3
#: A benched site is tried again after so many rounds.
ROUNDS: Final = 10
_FRESH_SECONDS: Final = 5.0


def benched(registry: Registry, digest: str, sessions: Mapping[str, str | None]) -> dict[str, str]:
    """Return which of some sites a study's next round does not ask, and why.

    A site is benched when it was asked in three rounds running and gave no update that was
    accepted. It comes back when it is started anew, or after ten rounds; if it then fails again,
    that one round benches it again. Rounds that it missed over another study's work do not count.

    Parameters
    ----------
    sessions : mapping of str to str or None
        By site, what it runs under now.
    """
    with registry.transaction() as session:
        of_study = (SiteRound.digest == digest) & (SiteRound.why != BUSY)
        done = session.scalar(select(func.max(SiteRound.number)).where(SiteRound.digest == digest))
        if done is None:
            return {}
        lately = select(SiteRound.site).where(
            of_study,
            SiteRound.number > done - ROUNDS,
            SiteRound.outcome != ACCEPTED,
            SiteRound.site.in_(sessions),
        )
        found = {}
        for site in sorted(set(session.scalars(lately))):
            of_site = select(SiteRound).where(of_study, SiteRound.site == site)
            last = list(session.scalars(of_site.order_by(SiteRound.number.desc()).limit(FAILURES)))
            if len(last) == FAILURES and all(
                part.outcome != ACCEPTED and part.session == sessions[site] for part in last
            ):
                found[site] = _why(last)
        return found


class Benches:
    """Answers sites that ask all the time; it looks at a study every few seconds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, tuple[float, dict[str, str]]] = {}

    def of(self, site: str, studies: Collection[str]) -> dict[str, str]:
        """Return by study why it does not ask a site now; studies that ask it are not in it."""
        at = time.monotonic()
        self._known = {one: known for one, known in self._known.items() if known[0] > at}
        for digest in studies:
            if digest not in self._known:
                sessions = {member.name: member.session for member in self._registry.sites()}
                found = benched(self._registry, digest, sessions)
                self._known[digest] = at + _FRESH_SECONDS, found
        return {one: self._known[one][1][site] for one in studies if site in self._known[one][1]}


def _why(last: list[SiteRound]) -> str:
    rounds = ", ".join(str(part.number + 1) for part in reversed(last))
    why, until = last[0].why.removesuffix("."), last[0].number + 1 + ROUNDS
    return (
        f"no usable update in rounds {rounds}; the last time: {why}."
        f" Asked again after round {until}, or once the site was started anew."
    )
