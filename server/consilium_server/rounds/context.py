"""What every part of a study's run shares: study, folders, messages, records, the wish to pause."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder
from consilium_common.ledger.entries import Purpose, time_text
from consilium_common.study import Study
from consilium_common.wire.messages import Reference
from consilium_server.asking import Asking, Participant
from consilium_server.benching import benched
from consilium_server.lifecycle import pause_if_asked
from consilium_server.registry import Registry
from consilium_server.released import checked_figures
from consilium_server.tables import Received

_log = logging.getLogger(__name__)

#: While a round cannot go on, an operator's wish is looked for this often.
_WISH_SECONDS: Final = 0.5
#: So long fewer sites than the quorum may be online before the study goes back into the queue,
#: where it holds nobody up; what was taken until then stays.
_AWAY_SECONDS: Final = 120.0
#: So long a round may wait for usable answers of sites that are there, before the study goes back
#: into the queue: it holds a place at its sites that others may be waiting for.
_STUCK_SECONDS: Final = 300.0


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """The study was paused or stopped: the run ends here, and nothing is wrong."""


@dataclass
class Run:
    """One study's run.

    Attributes
    ----------
    folder : Path
        Of the study.
    asking : Asking
        Its messages.
    """

    study: Study
    digest: str
    folder: Path
    registry: Registry
    asking: Asking

    def __post_init__(self) -> None:
        self._wish_at = 0.0
        self._away_since: float | None = None
        #: What was there when sites began to give nothing usable, and when that was.
        self._stuck: tuple[object, float] | None = None

    @property
    def work(self) -> Path:
        """Files of the round under way; what a crash leaves of them is made anew."""
        return private_folder(self.folder / "work")

    def require_wanted(self) -> None:
        """End the run when the study is to be paused or does not run any more."""
        if pause_if_asked(self.registry, self.digest):
            raise Interrupted

    def stay(self, waits_for: str, so_far: object) -> None:
        """Do so now and then, while something is waited for.

        Parameters
        ----------
        waits_for : str
            In words.
        so_far : object
            What has come: as long as it stays the same, the study gets nowhere.

        Raises
        ------
        ConsiliumError
            ``run.sites-away`` when too few sites have been online for two minutes: the scheduler
            begins the study again when they are back. ``run.stuck`` when enough are there and
            nothing more has come for five minutes: others go first then.
        """
        at = time.monotonic()
        if at < self._wish_at:
            return
        self._wish_at = at + _WISH_SECONDS
        self.require_wanted()
        there = len(self.asking.participants())
        if there >= self.study.federation.quorum:
            self._away_since = None
            self._require_progress(at, waits_for, so_far)
            return
        self._stuck = None
        if self._away_since is None:
            self._away_since = at
        elif at - self._away_since > _AWAY_SECONDS:
            raise ConsiliumError(
                "run.sites-away",
                f"{there} of the {self.study.federation.quorum} sites the study needs are online.",
                hint="It goes on by itself when they are back; nothing is lost.",
            )

    def _require_progress(self, at: float, waits_for: str, so_far: object) -> None:
        if self._stuck is None or self._stuck[0] != so_far:
            self._stuck = so_far, at
        elif at - self._stuck[1] > _STUCK_SECONDS:
            raise ConsiliumError(
                "run.stuck",
                f"Its sites are there, and nothing usable has come of them for"
                f" {_STUCK_SECONDS / 60:.0f} minutes ({waits_for}).",
                hint="It is tried again by itself; nothing is lost.",
            )

    def candidates(self) -> list[Participant]:
        """Return the sites that a round may ask: those that are there, but the benched ones.

        Where too few are left for the quorum, the benched ones are asked all the same: a study
        that waited for ten rounds to pass would wait for ever.
        """
        there = self.asking.participants()
        sessions = {site.name: site.session for site in there}
        out = benched(self.registry, self.digest, sessions)
        asked = [site for site in there if site.name not in out]
        return asked if len(asked) >= self.study.federation.quorum else there

    def approved(self) -> set[str]:
        """Return the sites that take part in the study, online or not."""
        approvals = self.registry.approvals(self.digest)
        return {one.site for one in approvals if one.decision == "approved"}

    def released(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of a trained update: exact ones, where the study releases such."""
        if self.study.evaluation.release != "exact":
            return {}
        return checked_figures(figures, "exact")

    def note(self, site: str, purpose: Purpose, number: int, received: Reference) -> None:
        """Note what came of a site, and say it aloud when it sent something else before."""
        changed = self.registry.note_received(
            Received(
                study=self.digest,
                site=site,
                purpose=purpose,
                round=number,
                sha256=received.sha256,
                bytes=received.bytes,
                time=time_text(datetime.now(UTC)),
            )
        )
        if changed and self.study.privacy.mode == "patient":
            self.registry.raise_alarm(
                site,
                "privacy.second-release",
                f"In study {self.digest[:12]} the site sent two different answers for one"
                f" {purpose}, round {number}; one charge covers one of them.",
            )


class BackOff:
    """When to ask again those that failed: soon at first, then ever more seldom."""

    def __init__(self, *, first: float = 1.0, longest: float = 60.0) -> None:
        self._pause = first
        self._longest = longest
        self._next = 0.0

    def due(self, at: float) -> bool:
        """Whether to ask now; if so, the next time is further away."""
        if at < self._next:
            return False
        self._next = at + self._pause
        self._pause = min(2 * self._pause, self._longest)
        return True


def named_reasons(dropped: Iterable[tuple[str, str]]) -> str:
    """Return sites and why they have no part, in one line."""
    return "; ".join(f"{site}: {why}" for site, why in sorted(dropped))
