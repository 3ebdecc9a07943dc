"""Messages to sites on Flower's Grid: pushed together, each reply taken as it comes and dropped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.wire.messages import (
    Instructions,
    Reference,
    figures_of,
    to_site,
    update_of,
)
from consilium_server.arrivals import ArrivalLists
from consilium_server.home import ServerHome
from consilium_server.kicks import Kicks
from consilium_server.networks import exchanged
from consilium_server.registry import Registry
from consilium_server.study_files import StudyFiles
from consilium_server.tables import ONLINE_SECONDS

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.01
#: Looks this often whether a site that is waited for has gone.
_GONE_SECONDS: Final = 2.0
#: The clock may drift by so much between two looks; more is a step.
_STEP_SECONDS: Final = 2.0
#: After a step of the clock every site that is there has greeted within so long.
_GREETED_SECONDS: Final = 2 * ONLINE_SECONDS
#: Messages to one site whose reply is still taken: the newest, and the one before it.
_PER_SITE: Final = 2
#: Messages that are pushed in one call.
_TOGETHER: Final = 64
#: Flower forgets a message after so long. A reply is waited for at most that long anyway, so that
#: no step of the clock, summer time included, ends a round before its deadline.
_LEAST_LIFE: Final = 12 * 3600.0


@dataclass(frozen=True)
class Participant:
    """A site in one round, as it stood when the round began."""

    name: str
    node_id: int
    cohort_size: int
    evaluation_size: int
    session: str | None


@dataclass
class Replies:
    """Whose reply to one message was accepted, and why others' was not."""

    accepted: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a site answered.

    Attributes
    ----------
    update : Path or None
        The file that it delivered, to a message of training alone.
    reference : Reference or None
        Name and length of that file.
    """

    figures: dict[str, float]
    update: Path | None = None
    reference: Reference | None = None


@dataclass(eq=False)
class Sent:
    """A message that was sent to a site.

    Attributes
    ----------
    at : float
        When, by ``time.monotonic``.
    arrivals : int
        Replies of the site's node when this message's was last looked for.
    """

    site: Participant
    number: int
    kind: str
    message_id: str
    at: float
    arrivals: int


@dataclass(frozen=True)
class Answer:
    """The end of a message: a reply, or why there is none."""

    sent: Sent
    reply: Reply | None
    error: ConsiliumError | None = None

    @property
    def site(self) -> Participant:
        """Who was asked."""
        return self.sent.site


#: Takes a reply in; raises ConsiliumError for one that must be left out.
Accept = Callable[[Participant, Reply], None]
#: Is told what is waited for; raises to end the waiting.
Patience = Callable[[str], None]


class Asking:
    """Sends the messages of one study's run, and keeps those that are not answered yet.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Connection to the SuperLink.
    """

    def __init__(self, home: ServerHome, registry: Registry, study: Study, grid: Grid) -> None:
        self._home = home
        self._registry = registry
        self._study = study
        self._digest = study.digest
        self._grid = grid
        self._kicks = Kicks(home.kicks)
        self._most: int | None = None
        self._arrivals = ArrivalLists(home.arrived)
        self._under_way: list[Sent] = []
        #: Ended, and not yielded yet.
        self._ended: list[Answer] = []
        self._look_for_gone = 0.0
        self._clock = _clock_offset()
        self._trusted_from = 0.0
        self.files = StudyFiles(home.study_folder(self._digest))

    # --- who is there ----------------------------------------------------------------------

    def participants(self) -> list[Participant]:
        """Return the sites that approved the study and are online now, by name."""
        nodes = set(self._grid.get_node_ids())
        approved = {
            a.site: a for a in self._registry.approvals(self._digest) if a.decision == "approved"
        }
        return [
            Participant(
                m.name,
                int(m.node_id),
                approved[m.name].cohort_size,
                approved[m.name].evaluation_size,
                m.session,
            )
            for m in self._registry.sites()
            if m.online and m.name in approved and m.node_id and int(m.node_id) in nodes
        ]

    def wait_for_quorum(self, patience: Patience) -> list[Participant]:
        """Return the participants once they are enough.

        Parameters
        ----------
        patience : callable
            Called again and again with what is waited for; whatever it raises ends the waiting.
        """
        quorum = self._study.federation.quorum
        while True:
            participants = self.participants()
            if len(participants) >= quorum:
                return participants
            patience(missing(quorum - len(participants)))
            time.sleep(0.2)

    # --- messages --------------------------------------------------------------------------

    @property
    def under_way(self) -> frozenset[str]:
        """The sites that were sent a message and have not answered it."""
        return frozenset(sent.site.name for sent in self._under_way) | {
            answer.site.name for answer in self._ended
        }

    def send(
        self,
        participants: Sequence[Participant],
        number: int,
        model: Reference | None,
        kind: str,
        *,
        last: bool = False,
    ) -> None:
        """Send one message to each of some sites; replies come from :meth:`answers`.

        Parameters
        ----------
        number : int
            Round from 0; for an evaluation the number of rounds done; for statistics 0.
        model : Reference or None
            What :meth:`StudyFiles.offer` returned; None for statistics.
        kind : str
            ``train``, ``evaluate`` or ``query`` (statistics).
        last : bool
            Whether the study ends with this message.
        """
        if kind == "train":
            for site in participants:
                self.files.expect(site.name, number, self._most_bytes())
        for start in range(0, len(participants), _TOGETHER):
            self._send(participants[start : start + _TOGETHER], number, model, kind, last)
        self._kicks.kick(site.node_id for site in participants)

    def _send(
        self,
        participants: Sequence[Participant],
        number: int,
        model: Reference | None,
        kind: str,
        last: bool,
    ) -> None:
        from flwr.app import Message

        messages = [
            Message(
                content=to_site(
                    Instructions(self._digest, number, site.cohort_size, last=last, model=model)
                ),
                dst_node_id=site.node_id,
                message_type=kind,
                group_id=str(number + 1),
                ttl=max(2 * self._study.federation.longest_seconds, _LEAST_LIFE),
            )
            for site in participants
        ]
        # Before anything is sent: the first site may answer while the last is still being asked.
        counts = [self._arrivals.of(str(site.node_id)) for site in participants]
        at = time.monotonic()
        identities = list(self._grid.push_messages(messages)) or [""] * len(messages)
        for site, identity, count in zip(participants, identities, counts, strict=True):
            sent = Sent(site, number, kind, identity or "", at, count)
            if not identity:
                error = ConsiliumError("run.not-sent", "Flower did not take the site's message.")
                self._ended.append(Answer(sent, None, error))
                continue
            before = [one for one in self._under_way if one.site.name == site.name]
            for old in before[: len(before) - _PER_SITE + 1]:
                self._under_way.remove(old)
            self._under_way.append(sent)

    def answers(self) -> Iterable[Answer]:
        """Yield the messages that have ended since the last look, each once.

        Whoever stops half-way gets the others at the next look.
        """
        while self._ended:
            yield self._ended.pop(0)
        for sent in list(self._under_way):
            # Asking for a reply that has come in part would wait long for the rest of it.
            arrivals = self._arrivals.of(str(sent.site.node_id))
            if arrivals == sent.arrivals or sent not in self._under_way:
                continue
            whole = self._arrivals.since(str(sent.site.node_id), sent.arrivals)
            sent.arrivals = arrivals
            if sent.message_id not in whole:
                continue
            reply = next(iter(self._grid.pull_messages([sent.message_id])), None)
            if reply is not None:
                self._under_way.remove(sent)
                yield self._answer(sent, reply)
        if time.monotonic() > self._look_for_gone:
            self._look_for_gone = time.monotonic() + _GONE_SECONDS
            gone = self._gone()
            for sent in [one for one in self._under_way if one.site.name in gone]:
                self._under_way.remove(sent)
                error = ConsiliumError(AWAY, "The site went away during the round.")
                yield Answer(sent, None, error)

    def forget(self, sites: Collection[str] | None = None) -> None:
        """Take no more replies to what was sent to these sites (None: to all)."""
        self._under_way = [
            one for one in self._under_way if sites is not None and one.site.name not in sites
        ]
        self._ended = [
            one for one in self._ended if sites is not None and one.site.name not in sites
        ]

    def ask(
        self,
        participants: Sequence[Participant],
        number: int,
        model: Reference | None,
        kind: str,
        *,
        accept: Accept,
        last: bool = False,
    ) -> Replies:
        """Send one message to every participant and take the replies until the deadline.

        Parameters as :meth:`send`, and

        accept : callable
            Called with each good reply. What it refuses is left out and named: a bad reply never
            stops a round. A full disk of our own does.
        """
        replies = Replies()
        self.send(participants, number, model, kind, last=last)
        waiting = {site.name for site in participants}
        deadline = time.monotonic() + self._study.federation.longest_seconds
        others: list[Answer] = []
        while waiting and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            for answer in self.answers():
                if answer.sent.kind != kind or answer.site.name not in waiting:
                    others.append(answer)  # to a message before this one: for whoever sent it
                    continue
                waiting.discard(answer.site.name)
                why = refusal_of(answer, accept)
                if why is None:
                    replies.accepted.append(answer.site.name)
                else:
                    replies.dropped[answer.site.name] = why
        for name in waiting:
            replies.dropped[name] = LATE
        self._under_way = [
            one for one in self._under_way if one.kind != kind or one.site.name not in waiting
        ]
        self._ended += others
        return replies

    def _answer(self, sent: Sent, reply: Message) -> Answer:
        try:
            if reply.has_error():
                raise _site_error(reply)
            update = reference = None
            if sent.kind == "train":
                reference = update_of(reply.content)
                update = self.files.delivered(sent.site.name, reference)
            return Answer(sent, Reply(figures_of(reply.content), update, reference))
        except ConsiliumError as error:
            return Answer(sent, None, error)

    def _most_bytes(self) -> int:
        """Return the most bytes that an update may have in the study's encoding."""
        if self._most is None:
            from consilium_common.models.compression import most_bytes

            self._most = most_bytes(self._study, exchanged(self._study).sent)
        return self._most

    def _gone(self) -> set[str]:
        """Return the sites that went silent, restarted or were revoked since they were asked."""
        waiting = {sent.site.name: sent.site.session for sent in self._under_way}
        if not waiting:
            return set()
        silent_counts = self._clock_is_steady()
        return {
            m.name
            for m in self._registry.sites()
            if m.name in waiting
            and (m.session != waiting[m.name] or (silent_counts and not m.online))
        }

    def _clock_is_steady(self) -> bool:
        """Whether it can be told from the clock since when a site has been silent.

        When the clock is set forward every site seems silent until it greets the next time.
        """
        before, self._clock = self._clock, _clock_offset()
        if abs(self._clock - before) > _STEP_SECONDS:
            _log.warning("the clock was set by %.0f s", self._clock - before)
            self._trusted_from = time.monotonic() + _GREETED_SECONDS
        return time.monotonic() >= self._trusted_from


#: Code of the error of a site that went silent, restarted or was revoked.
AWAY: Final = "run.site-away"
#: Why a site that has not answered is left out.
LATE: Final = "no reply before the deadline"


def _clock_offset() -> float:
    return time.time() - time.monotonic()


def missing(sites: int) -> str:
    """Return in words that so many sites are waited for."""
    return f"waiting for {sites} more {'site' if sites == 1 else 'sites'}"


def refusal_of(answer: Answer, accept: Accept) -> str | None:
    """Let ``accept`` take an answer; return why it is left out, None where it is taken.

    Raises
    ------
    ConsiliumError
        ``state.*``: it is our own disk that failed, not the site.
    """
    error = answer.error
    if answer.reply is not None:
        try:
            accept(answer.site, answer.reply)
        except ConsiliumError as refused:
            if refused.code.startswith("state."):
                raise
            error = refused
    if error is None:
        return None
    _log.warning("left out the reply of %s: %s", answer.site.name, error)
    return f"{error.code}: {error.message}"


def _site_error(reply: Message) -> ConsiliumError:
    """Return the error a site replied with; ours are JSON, Flower's are words."""
    try:
        return ConsiliumError.from_dict(json.loads(reply.error.reason))
    except (ValueError, AttributeError, TypeError):
        return ConsiliumError("run.site-failed", "The site's training process failed.")
