"""The round loop on Flower's Grid: push all, pull each reply as it comes, add it, drop it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.models.registry import initial_weights, tensor_specs
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, figures_of, to_site, weights_of
from consilium_server.aggregation import RunningMean, cohort_weights
from consilium_server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from consilium_server.home import ServerHome
from consilium_server.registry import Registry, Round, now

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.01
#: Looks this often whether a site that is waited for has gone.
_GONE_SECONDS: Final = 2.0
#: Sites may come online this long before a round gives up; it is not counted as a failed attempt.
_QUORUM_WAIT_SECONDS: Final = 120.0
#: A round that misses its quorum is asked again this often; sites answer a repeated round from
#: their store, so asking again costs no privacy.
_ATTEMPTS: Final = 3


@dataclass
class Participant:
    """A site in one round, as it stood when the round began."""

    name: str
    node_id: int
    cohort_size: int
    session: str | None


@dataclass
class Replies:
    """What came of one message to every participant."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)


class StudyRun:
    """Runs one study from its last checkpoint to its end.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Connection to the SuperLink.
    """

    def __init__(self, home: ServerHome, registry: Registry, digest: str, grid: Grid) -> None:
        row = registry.study(digest)
        self.study: Study = row.study
        self.digest = row.digest
        self._home = home
        self._registry = registry
        self._grid = grid
        self._folder = home.study_folder(self.digest)
        self._specs = tensor_specs(self.study)

    def run(self) -> None:
        """Train the rounds that are left, evaluate, write the model, finish the study."""
        checkpoint = load_checkpoint(self._folder) or Checkpoint(0, initial_weights(self.study))
        rounds = self.study.federation.rounds
        while checkpoint.rounds_done < rounds:
            checkpoint = self._round(checkpoint)
            done = checkpoint.rounds_done
            every = self.study.evaluation.every
            if every and done % every == 0 and done < rounds:
                self._evaluate(checkpoint, last=False)
        self._evaluate(checkpoint, last=True)
        write_atomic(self._folder / "model.safetensors", pack(checkpoint.weights))
        self._registry.set_study_state(self.digest, "finished")

    def _round(self, checkpoint: Checkpoint) -> Checkpoint:
        number = checkpoint.rounds_done
        started = time.monotonic()
        blob = pack(checkpoint.weights)
        dropped: dict[str, str] = {}
        for attempt in range(_ATTEMPTS):
            mean = RunningMean(self._specs)
            participants = self._wait_for_quorum()
            weights = cohort_weights(
                {p.name: p.cohort_size for p in participants}, self.study.federation.weighting
            )
            replies = self._ask(participants, number, blob, "train", mean=mean, weights=weights)
            dropped |= replies.dropped
            if len(replies.added) >= self.study.federation.quorum:
                break
            _log.warning("round %d attempt %d missed its quorum", number + 1, attempt + 1)
        else:
            raise ConsiliumError(
                "run.quorum",
                f"Round {number + 1} missed its quorum {_ATTEMPTS} times: "
                + "; ".join(f"{site}: {why}" for site, why in sorted(dropped.items())),
                hint="Mend what the sites report, then go on with `consilium study run`.",
            )
        after = Checkpoint(number + 1, mean.mean())
        _check_finite(after.weights)
        save_checkpoint(self._folder, after)
        self._record(number, time.monotonic() - started, replies, dropped)
        return after

    def _evaluate(self, checkpoint: Checkpoint, *, last: bool) -> None:
        participants = self._participants()
        replies = self._ask(
            participants, checkpoint.rounds_done, pack(checkpoint.weights), "evaluate", last=last
        )
        if replies.figures:
            with self._registry.transaction() as session:
                row = session.get_one(Round, (self.digest, checkpoint.rounds_done - 1))
                row.metrics = {**row.metrics, "evaluation": replies.figures}
        for site, why in replies.dropped.items():
            _log.warning("evaluation at %s: %s", site, why)

    def _wait_for_quorum(self) -> list[Participant]:
        end = time.monotonic() + min(_QUORUM_WAIT_SECONDS, self.study.federation.deadline_seconds)
        while True:
            participants = self._participants()
            if len(participants) >= self.study.federation.quorum:
                return participants
            if time.monotonic() > end:
                raise ConsiliumError(
                    "run.quorum",
                    f"{len(participants)} of the {self.study.federation.quorum} sites the study"
                    " needs are online.",
                    hint="When they are back, go on with `consilium study run`; nothing is lost.",
                )
            time.sleep(0.2)

    def _participants(self) -> list[Participant]:
        nodes = set(self._grid.get_node_ids())
        cohorts = {
            a.site: a.cohort_size
            for a in self._registry.approvals(self.digest)
            if a.decision == "approved"
        }
        return [
            Participant(m.name, int(m.node_id), cohorts[m.name], m.session)
            for m in self._registry.sites()
            if m.online and m.name in cohorts and m.node_id and int(m.node_id) in nodes
        ]

    def _ask(
        self,
        participants: list[Participant],
        number: int,
        blob: bytes,
        kind: str,
        *,
        mean: RunningMean | None = None,
        weights: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> Replies:
        """Send one message to every participant and take the replies until the deadline."""
        from flwr.app import Message

        replies = Replies()
        waiting: dict[str, Participant] = {}
        deadline = time.monotonic() + self.study.federation.deadline_seconds
        # Before anything is sent: the first site may answer while the last is still being asked.
        sent_at = time.time_ns()
        for site in participants:
            message = Message(
                content=to_site(
                    Instructions(self.digest, number, site.cohort_size, last=last), blob
                ),
                dst_node_id=site.node_id,
                message_type=kind,
                group_id=str(number + 1),
                ttl=self.study.federation.deadline_seconds + 60,
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
                        self._take(reply, site, replies, mean, weights)
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

    def _take(
        self,
        reply: Message,
        site: Participant,
        replies: Replies,
        mean: RunningMean | None,
        weights: Mapping[str, float] | None,
    ) -> None:
        """Add one reply, or note why it was left out; a bad one never stops the round."""
        try:
            if reply.has_error():
                raise _site_error(reply)
            if mean is not None and weights is not None:
                mean.add(weights_of(reply.content), weights[site.name])
            replies.added.append(site.name)
            if self.study.evaluation.release == "exact":
                replies.figures[site.name] = figures_of(reply.content)
        except ConsiliumError as error:
            _log.warning("left out the update of %s: %s", site.name, error)
            replies.dropped[site.name] = f"{error.code}: {error.message}"

    def _gone(self, sites: Sequence[Participant]) -> set[str]:
        """Return the sites that went silent, restarted or were revoked since the round began."""
        members = {m.name: m for m in self._registry.sites()}
        return {
            site.name
            for site in sites
            if not members[site.name].online or members[site.name].session != site.session
        }

    def _record(
        self, number: int, seconds: float, replies: Replies, dropped: dict[str, str]
    ) -> None:
        losses = [f["loss"] for f in replies.figures.values() if "loss" in f]
        with self._registry.transaction() as session:
            session.merge(
                Round(
                    digest=self.digest,
                    number=number,
                    seconds=seconds,
                    sites=sorted(replies.added),
                    dropped=dropped,
                    loss=float(np.mean(losses)) if losses else None,
                    ended_at=now(),
                )
            )


def _check_finite(weights: Mapping[str, NDArray[np.float32]]) -> None:
    # Each update was finite, but a sum of huge ones may still overflow float32.
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise ConsiliumError("run.diverged", f"The mean of {name} is not finite.")


def _site_error(reply: Message) -> ConsiliumError:
    """Return the error a site replied with; ours are JSON, Flower's are words."""
    try:
        return ConsiliumError.from_dict(json.loads(reply.error.reason))
    except (ValueError, AttributeError, TypeError):
        return ConsiliumError("run.site-failed", "The site's training process failed.")
