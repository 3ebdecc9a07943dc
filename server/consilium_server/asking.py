"""One message to every site on Flower's Grid: push all, take each reply as it comes, drop it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, to_site
from consilium_server.home import ServerHome
from consilium_server.registry import Registry

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.01
#: Looks this often whether a site that is waited for has gone.
_GONE_SECONDS: Final = 2.0
#: Sites may come online this long before a round gives up; it is not counted as a failed attempt.
_QUORUM_WAIT_SECONDS: Final = 120.0


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


#: Takes a reply in; raises ConsiliumError for one that must be left out.
Accept = Callable[[Participant, "RecordDict"], None]


class Asking:
    """Sends the messages of one study's run.

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

    def participants(self) -> list[Participant]:
        """Return the sites that approved the study and are online now."""
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

    def wait_for_quorum(self) -> list[Participant]:
        """Return the participants once they are enough; waits a while for sites to come back.

        Raises
        ------
        ConsiliumError
            ``run.quorum``.
        """
        federation = self._study.federation
        end = time.monotonic() + min(_QUORUM_WAIT_SECONDS, federation.deadline_seconds)
        while True:
            participants = self.participants()
            if len(participants) >= federation.quorum:
                return participants
            if time.monotonic() > end:
                raise ConsiliumError(
                    "run.quorum",
                    f"{len(participants)} of the {federation.quorum} sites the study needs are"
                    " online.",
                    hint="When they are back, go on with `consilium study run`; nothing is lost.",
                )
            time.sleep(0.2)

    def ask(
        self,
        participants: Sequence[Participant],
        number: int,
        blob: bytes | None,
        kind: str,
        *,
        accept: Accept,
        last: bool = False,
    ) -> Replies:
        """Send one message to every participant and take the replies until the deadline.

        Parameters
        ----------
        number : int
            Round from 0; for an evaluation the number of rounds done; for statistics 0.
        blob : bytes or None
            The whole global model; None for statistics.
        kind : str
            ``train``, ``evaluate`` or ``query`` (statistics).
        accept : callable
            Called with each good reply. What it refuses is left out and named: a bad reply never
            stops a round.
        last : bool
            Whether the study ends with this message.
        """
        from flwr.app import Message

        replies = Replies()
        waiting: dict[str, Participant] = {}
        deadline = time.monotonic() + self._study.federation.deadline_seconds
        # Before anything is sent: the first site may answer while the last is still being asked.
        sent_at = time.time_ns()
        for site in participants:
            message = Message(
                content=to_site(
                    Instructions(self._digest, number, site.cohort_size, last=last), blob
                ),
                dst_node_id=site.node_id,
                message_type=kind,
                group_id=str(number + 1),
                ttl=self._study.federation.deadline_seconds + 60,
            )
            waiting[next(iter(self._grid.push_messages([message])))] = site
        self._home.kick.touch()
        look_for_gone = time.monotonic() + _GONE_SECONDS
        while waiting and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            for message_id, site in list(waiting.items()):
                # Asking for a reply that has come in part would wait long for the rest of it.
                if self._has_arrived(site, sent_at):
                    for reply in self._grid.pull_messages([message_id]):
                        del waiting[message_id]
                        _take(reply, site, replies, accept)
            if time.monotonic() > look_for_gone:
                look_for_gone = time.monotonic() + _GONE_SECONDS
                gone = self._gone(list(waiting.values()))
                for message_id, site in list(waiting.items()):
                    if site.name in gone:
                        del waiting[message_id]
                        replies.dropped[site.name] = "the site went away during the round"
        for site in waiting.values():
            replies.dropped[site.name] = "no reply before the deadline"
        return replies

    def _has_arrived(self, site: Participant, since: int) -> bool:
        """Return whether the gateway has seen a whole reply of the site since ``since`` (ns)."""
        try:
            return (self._home.arrived / str(site.node_id)).stat().st_mtime_ns >= since
        except FileNotFoundError:
            return False

    def _gone(self, sites: Sequence[Participant]) -> set[str]:
        """Return the sites that went silent, restarted or were revoked since the round began."""
        members = {m.name: m for m in self._registry.sites()}
        return {
            site.name
            for site in sites
            if not members[site.name].online or members[site.name].session != site.session
        }


def _take(reply: Message, site: Participant, replies: Replies, accept: Accept) -> None:
    try:
        if reply.has_error():
            raise _site_error(reply)
        accept(site, reply.content)
        replies.accepted.append(site.name)
    except ConsiliumError as error:
        _log.warning("left out the reply of %s: %s", site.name, error)
        replies.dropped[site.name] = f"{error.code}: {error.message}"


def _site_error(reply: Message) -> ConsiliumError:
    """Return the error a site replied with; ours are JSON, Flower's are words."""
    try:
        return ConsiliumError.from_dict(json.loads(reply.error.reason))
    except (ValueError, AttributeError, TypeError):
        return ConsiliumError("run.site-failed", "The site's training process failed.")
