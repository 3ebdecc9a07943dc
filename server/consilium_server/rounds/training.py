"""One round of training: ask, take, and when enough is there, make the next model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_server.aggregation import offered
from consilium_server.asking import (
    AWAY,
    LATE,
    POLL_SECONDS,
    Answer,
    Participant,
    Reply,
    missing,
    refusal_of,
)
from consilium_server.checkpoint import Checkpoint
from consilium_server.rounds.board import Board
from consilium_server.rounds.concluding import conclude
from consilium_server.rounds.context import BackOff, Run, named_reasons
from consilium_server.rounds.deadlines import Deadline, deadline_seconds, slowest
from consilium_server.rounds.drawing import Drawing
from consilium_server.rounds.taking import Began, Taken, Taking

#: Looks this often whether a site that went away is back.
_BACK_SECONDS: Final = 2.0


class Training:
    """The rounds of a study, one after the other, each from the checkpoint before it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._study = run.study
        self._taking = Taking(
            run.study, run.folder, lambda site, n, what: run.note(site, "training", n, what)
        )

    def round(self, checkpoint: Checkpoint) -> Checkpoint:
        """Do the round after a checkpoint; return the checkpoint after it.

        Raises
        ------
        Interrupted
            The study is to be paused, and the quorum is not there.
        ConsiliumError
            ``run.diverged``, ``run.sites-away``, ``run.stuck``, ``state.*``.
        """
        return _Round(self._run, self._taking, checkpoint).do()


class _Round:
    def __init__(self, run: Run, taking: Taking, checkpoint: Checkpoint) -> None:
        self._run, self._taking, self._before = run, taking, checkpoint
        self._study, self._asking = run.study, run.asking
        self._number = checkpoint.rounds_done
        self._drawing = Drawing(run.study, checkpoint.random)
        self._drawing.begin(run.approved())
        seconds = deadline_seconds(run.study.federation, slowest(run, self._number))
        self._deadline = Deadline(run.study.federation, seconds, time.monotonic())
        self._board = Board(run.registry, run.digest, self._number, "training", seconds)
        self._patience = self._board.patience(run)
        model = offered(
            run.study, checkpoint.model, checkpoint.state, run.work / "offered.safetensors"
        )
        self._model = self._asking.files.offer(model, checkpoint.sha256_of(model))
        self._taken: dict[str, Taken] = {}
        #: Fewest updates: the quorum, or more where the strategy turns out to need more.
        self._fewest = run.study.federation.quorum
        self._needs = ""
        #: Sites that went away; back before the round is over, they are asked again.
        self._away: set[str] = set()
        self._look_at = 0.0

    def do(self) -> Checkpoint:
        for taken in self._taking.again(self._number, self._base):
            self._take_in(taken, seconds=taken.seconds, session=taken.session)
        while True:
            self._collect()
            try:
                return self._end()
            except ConsiliumError as error:
                if error.code != "run.quorum":
                    raise
                # Krum among others needs more updates than a quorum may be.
                self._fewest, self._needs = len(self._taken) + 1, error.message

    def _base(self, model: str) -> Path | None:
        return self._before.model if model == self._model.sha256 else None

    # --- collecting ------------------------------------------------------------------------

    def _collect(self) -> None:
        """Ask sites and take their updates until the round may end."""
        back_off = BackOff()
        begun = False
        while True:
            for answer in self._asking.answers():
                self._hear(answer)
            at = time.monotonic()
            enough = len(self._taken) >= self._fewest
            if enough:
                self._deadline.note_quorum(at)
                self._board.waits_for("")
            waiting = bool(self._asking.under_way)
            if enough and begun and (not waiting or self._deadline.over(at)):
                break
            if not begun:
                begun = self._begin()
            elif not enough and (not waiting or self._deadline.silent(at)):
                self._patience(self._lacking())
                if back_off.due(at):
                    self._ask_more()
            elif self._away and at >= self._look_at:
                self._look_at = at + _BACK_SECONDS
                self._ask([site for site in self._run.candidates() if site.name in self._away])
            self._board.show()
            time.sleep(POLL_SECONDS)
        for site in self._board.silent:
            self._board.late(site, LATE)
        self._asking.forget()

    def _begin(self) -> bool:
        """Ask for the first time, once there are enough sites."""
        there = self._run.candidates()
        lacking = self._fewest - len({site.name for site in there} | set(self._taken))
        if lacking > 0:
            self._patience("; ".join(one for one in (missing(lacking), self._needs) if one))
            return False
        self._board.waits_for("")
        self._deadline.begin(time.monotonic())
        self._ask(there)
        return True

    def _ask_more(self) -> None:
        """Ask those that failed or are silent again, or others in their place."""
        for site in self._board.silent:
            if site in self._asking.under_way:
                self._board.late(site, LATE)
        self._deadline.again(time.monotonic())
        self._ask(self._run.candidates())

    def _ask(self, there: list[Participant]) -> None:
        by_name = {site.name: site for site in there if site.name not in self._taken}
        order = self._drawing.order(by_name)
        if self._drawing.count is not None:
            failed = self._board.dropped
            order.sort(key=lambda name: name in failed)  # stable: others first, in their order
            order = order[: max(self._drawing.count, self._fewest) - len(self._taken)]
        asked = [by_name[name] for name in order]
        self._away -= set(order)
        self._board.asked(asked)
        self._drawing.note(order)
        self._asking.send(asked, self._number, self._model, "train")

    def _hear(self, answer: Answer) -> None:
        site = answer.site.name
        if answer.sent.kind != "train" or answer.sent.number != self._number:
            return  # of a message before this round
        if site in self._taken:
            return  # asked twice, it answered twice
        seconds = time.monotonic() - answer.sent.at
        why = refusal_of(answer, lambda s, reply: self._take(s, reply, seconds))
        if why is None:
            self._asking.forget({site})
        elif site not in self._asking.under_way:
            self._board.failed(site, why)
            if answer.error is not None and answer.error.code == AWAY:
                self._away.add(site)

    def _take(self, site: Participant, reply: Reply, seconds: float) -> None:
        figures = self._run.released(reply.figures)
        taken = self._taking.take(
            site,
            replace(reply, figures=figures),
            into=self._number,
            began=Began(self._number, self._model.sha256, self._before.model),
            seconds=seconds,
        )
        self._take_in(taken, seconds=seconds, session=site.session)

    def _take_in(self, taken: Taken, *, seconds: float | None, session: str | None) -> None:
        self._taken[taken.site] = taken
        clip = self._study.federation.screening.clip_norm
        self._board.accepted(
            taken.site,
            taken.norm,
            clipped=clip is not None and taken.norm > clip,
            seconds=seconds,
            session=session,
        )

    def _lacking(self) -> str:
        why = named_reasons(self._board.dropped.items())
        text = missing(self._fewest - len(self._taken))
        return "; ".join(part for part in (text, self._needs, why) if part)

    # --- the end ---------------------------------------------------------------------------

    def _end(self) -> Checkpoint:
        """Make the next model of what was taken, and keep it."""
        after = conclude(self._run, self._before, self._taken, self._board, self._drawing)
        self._taking.clear()
        self._asking.files.forget_all()
        return after
