"""Buffered asynchronous rounds: a step of the model whenever enough updates are in (FedBuff).

Nguyen et al., AISTATS 2022. A site is asked again as soon as a step has used its update, each time
with the newest model; nobody waits for the slow. A step is a round here: its number is the index
under which sites train from the model before it. A site is asked under one index once, and gives a
buffer one update, so that its store, its ledger and what it is charged know one update for each
index, as in rounds. So a step needs ``size`` different sites.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.wire.messages import Reference
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
from consilium_server.round_tables import ACCEPTED, LEFT_OUT, site_rounds
from consilium_server.rounds.board import Board
from consilium_server.rounds.concluding import conclude
from consilium_server.rounds.context import BackOff, Run, named_reasons
from consilium_server.rounds.deadlines import deadline_seconds, slowest
from consilium_server.rounds.drawing import Drawing
from consilium_server.rounds.taking import Began, Taken, Taking

#: Between two looks at who is free.
_LOOK_SECONDS: Final = 0.1


class Buffered:
    """The steps of a buffered study; messages stay under way from one step to the next."""

    def __init__(self, run: Run) -> None:
        settings = run.study.federation.buffered
        assert settings is not None  # whoever calls has looked
        self._run, self._study, self._asking = run, run.study, run.asking
        self._settings = settings
        self._taking = Taking(
            run.study, run.folder, lambda site, n, what: run.note(site, "training", n, what)
        )
        #: What each site that is at work began from, and when it was asked.
        self._at_work: dict[str, tuple[Began, Reference, float]] = {}
        #: When a site that failed is asked again.
        self._failed: dict[str, BackOff] = {}
        #: What sites that went away began from: back, they are asked for that first.
        self._again: dict[str, tuple[Began, Reference]] = {}
        self._fresh = True
        # Until it is known who is at work, any model may be one that somebody began from.
        self._asking.files.kept = self._asking.files.on_offer()

    def round(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make one step; return the checkpoint after it.

        Raises as :meth:`consilium_server.rounds.training.Training.round`.
        """
        study, run = self._study, self._run
        number = checkpoint.rounds_done
        self._number = number
        self._seconds = deadline_seconds(study.federation, slowest(run, number))
        self._board = Board(run.registry, run.digest, number, "training", self._seconds)
        self._drawing = Drawing(study, checkpoint.random)
        self._drawing.begin(run.approved())
        self._taken: dict[str, Taken] = {}
        if self._fresh:
            self._fresh = False
            self._resume()
        for site, (began, _, _) in list(self._at_work.items()):
            if self._too_old(began):
                self._give_up(site, "its model is too old for the study by now")
        self._again = {
            site: (began, model)
            for site, (began, model) in self._again.items()
            if not self._too_old(began)
        }
        files = self._asking.files
        files.kept = frozenset(
            began.model
            for began in (
                *(began for began, _, _ in self._at_work.values()),
                *(began for began, _ in self._again.values()),
                *(taken.began for taken in self._taken.values()),
            )
        )
        self._model = files.offer(checkpoint.model, checkpoint.sha256_of(checkpoint.model))
        offered = files.offered(self._model.sha256)
        assert offered is not None  # a moment ago
        self._began = Began(number, self._model.sha256, offered)
        while True:
            self._collect()
            try:
                after = conclude(run, checkpoint, self._taken, self._board, self._drawing)
            except ConsiliumError as error:
                if error.code != "run.quorum":
                    raise
                # None of them can be used: the buffer is filled anew.
                for site in self._taken:
                    self._board.failed(site, error.message)
                    self._failed.setdefault(site, BackOff()).due(time.monotonic())
                self._taken.clear()
                self._taking.clear()
                continue
            self._taking.clear()
            files.forget_all(but=self._at_work)
            return after

    # --- collecting ------------------------------------------------------------------------

    def _collect(self) -> None:
        """Ask whoever is free and take updates until the buffer is full."""
        asked_at = 0.0
        while len(self._taken) < self._settings.size:
            for answer in self._asking.answers():
                self._hear(answer)
                if len(self._taken) >= self._settings.size:
                    break  # the others are for the next step
            at = time.monotonic()
            for site, (_, _, since) in list(self._at_work.items()):
                if at - since > self._seconds + self._study.federation.grace_seconds:
                    self._give_up(site, LATE)
            if at >= asked_at:
                # Who is there is a question to Flower and to the registry: not a hundred a second.
                asked_at = at + _LOOK_SECONDS
                self._ask(at)
                self._say()
            self._board.show()
            time.sleep(POLL_SECONDS)
        self._board.waits_for("")

    def _ask(self, at: float) -> None:
        there = {site.name: site for site in self._run.candidates()}
        free = [name for name in there if name not in self._at_work and name not in self._taken]
        order = self._drawing.order(free)
        if self._drawing.count is not None:
            order = order[: max(self._drawing.count - len(self._at_work), 0)]
        order = [name for name in order if name not in self._failed or self._failed[name].due(at)]
        if not order:
            return
        newest = (self._began, self._model)
        by_model: dict[tuple[Began, Reference], list[Participant]] = {}
        for name in order:
            begin_from = self._again.pop(name, newest)
            self._at_work[name] = (*begin_from, at)
            by_model.setdefault(begin_from, []).append(there[name])
        self._remember()
        self._drawing.note(order)
        for (began, model), sites in by_model.items():
            self._board.asked(sites)
            self._asking.send(sites, began.number, model, "train")

    def _say(self) -> None:
        lacking = self._settings.size - len(self._taken)
        overdue = self._board.seconds > self._seconds + self._study.federation.grace_seconds
        if lacking <= 0 or (self._at_work and not overdue):
            self._board.waits_for("")
            return
        why = named_reasons(self._board.dropped.items())
        self._board.patience(self._run)("; ".join(one for one in (missing(lacking), why) if one))

    def _hear(self, answer: Answer) -> None:
        site = answer.site.name
        at_work = self._at_work.get(site)
        if at_work is None or answer.sent.kind != "train":
            return
        began, model, since = at_work
        if answer.sent.number != began.number:
            return  # it was given up meanwhile
        seconds = time.monotonic() - since

        def accept(participant: Participant, reply: Reply) -> None:
            taken = self._taking.take(
                participant,
                replace(reply, figures=self._run.released(reply.figures)),
                into=self._number,
                began=began,
                seconds=seconds,
            )
            self._take_in(taken)

        why = refusal_of(answer, accept)
        del self._at_work[site]
        self._asking.forget({site})
        if answer.error is not None and answer.error.code == AWAY:
            self._again[site] = (began, model)
        self._remember()
        if why is None:
            self._failed.pop(site, None)
        else:
            self._board.failed(site, why)
            self._failed.setdefault(site, BackOff()).due(time.monotonic())

    def _take_in(self, taken: Taken) -> None:
        self._taken[taken.site] = taken
        clip = self._study.federation.screening.clip_norm
        self._board.accepted(
            taken.site,
            taken.norm,
            clipped=clip is not None and taken.norm > clip,
            staleness=taken.update.staleness,
            seconds=taken.seconds,
            session=taken.session,
        )

    def _too_old(self, began: Began) -> bool:
        return self._number - began.number > self._settings.most_staleness

    def _give_up(self, site: str, why: str) -> None:
        _, _, asked = self._at_work.pop(site)
        self._asking.forget({site})
        self._remember()
        self._board.late(site, why, asked=asked)

    # --- after a crash ---------------------------------------------------------------------

    @property
    def _memory(self) -> Path:
        return self._run.folder / "at-work.json"

    def _remember(self) -> None:
        """Keep who is at work from which model: after a crash they go on with it."""
        at_work = {site: (began, model) for site, (began, model, _) in self._at_work.items()}
        content = {
            site: {"number": began.number, "sha256": model.sha256, "bytes": model.bytes}
            for site, (began, model) in (self._again | at_work).items()
        }
        write_atomic(self._memory, json.dumps(content).encode(), durable=False)

    def _resume(self) -> None:
        """Take what was taken before, and have those at work asked for the same update again."""
        files = self._asking.files
        for taken in self._taking.again(self._number, files.offered):
            self._take_in(taken)
        try:
            content = json.loads(self._memory.read_bytes())
        except (OSError, ValueError):
            content = {}
        used = self._used()
        for site, said in content.items():
            model, number = Reference(said["sha256"], said["bytes"]), said["number"]
            base = files.offered(model.sha256)
            if base is not None and number < self._number and (site, number) not in used:
                self._again[site] = (Began(number, model.sha256, base), model)
        for site in self._taken:
            self._again.pop(site, None)
        self._remember()

    def _used(self) -> set[tuple[str, int]]:
        """Return of which sites the model holds the update of which index already.

        Records are durable before the step's checkpoint, the file of who is at work is not: what it
        says is not believed where the records say otherwise.
        """
        since = max(self._number - 2 * self._settings.most_staleness - 1, 0)
        found = site_rounds(self._run.registry, self._run.digest, since=since)
        return {
            (part.site, part.number - part.staleness)
            for number, parts in found.items()
            for part in parts
            if number < self._number and part.outcome in (ACCEPTED, LEFT_OUT)
        }
