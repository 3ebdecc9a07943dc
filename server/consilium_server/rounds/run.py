"""A study's run: statistics, the starting model evaluated, rounds trained, the result kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_common.files import disk_error
from consilium_common.study import Study
from consilium_server.asking import Asking
from consilium_server.checkpoint import Checkpoint, load_checkpoint
from consilium_server.home import ServerHome
from consilium_server.networks import recall, remember, write_start
from consilium_server.registry import Registry
from consilium_server.rounds.board import Board
from consilium_server.rounds.buffered import Buffered
from consilium_server.rounds.concluding import require_recorded
from consilium_server.rounds.context import Interrupted, Run
from consilium_server.rounds.evaluating import content_of, evaluate, sufficient
from consilium_server.rounds.training import Training
from consilium_server.starts import PublicStarts
from consilium_server.statistics import gather

if TYPE_CHECKING:
    from flwr.serverapp import Grid


class StudyRun:
    """Runs one study from its last checkpoint to its end, or until it is paused.

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
        self._run = Run(
            self.study,
            row.digest,
            home.study_folder(row.digest),
            registry,
            Asking(home, registry, self.study, grid),
        )

    def run(self) -> None:
        """Go on from the last checkpoint: count, train, evaluate where asked, keep the model.

        What was evaluated is not evaluated again: stage 0, the starting model, is one of these.
        """
        try:
            self._go_on()
        except Interrupted:
            return

    def _go_on(self) -> None:
        run = self._run
        run.asking.files.verify()
        # A process killed while it wrote leaves a whole model's worth behind.
        shutil.rmtree(run.work, ignore_errors=True)
        network = run.folder / "network.json"
        recalled = recall(self.study, network)
        checkpoint = load_checkpoint(run.folder) or Checkpoint(0, self._start())
        if not recalled:
            remember(self.study, network)
        require_recorded(run, checkpoint)
        if checkpoint.rounds_done == 0:
            seconds = self.study.federation.longest_seconds
            board = Board(self._registry, self.digest, 0, "statistics", seconds)
            gather(
                self.study,
                run.asking,
                self._registry,
                lambda site, found: run.note(site, "statistics", 0, content_of(found)),
                board.patience(run),
            )
        rounds = Training(run) if self.study.federation.buffered is None else Buffered(run)
        while True:
            done = checkpoint.rounds_done
            if done in self.study.evaluations:
                evaluation = self._registry.evaluation(self.digest, done)
                if evaluation is None:
                    evaluation = evaluate(run, checkpoint)
                reason = sufficient(run, evaluation) if done == 0 else ""
                if reason:
                    return self._finish(checkpoint, reason)
            if done >= self.study.federation.rounds:
                return self._finish(checkpoint, f"all {done} rounds are done")
            run.require_wanted()
            checkpoint = rounds.round(checkpoint)

    def _start(self) -> Path:
        """Write the model that the study begins with; return its file."""
        path = self._run.work / "start.safetensors"
        start = self.study.model.start
        public = None if start is None else PublicStarts(self._home.starts).path(start.sha256)
        write_start(self.study, path, public)
        return path

    def _finish(self, checkpoint: Checkpoint, reason: str) -> None:
        result = self._run.folder / "model.safetensors"
        beside = result.with_name(f".{result.name}")
        try:
            beside.unlink(missing_ok=True)
            os.link(checkpoint.result, beside)
            beside.replace(result)
            beside.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(result, error) from error
        self._registry.set_study_state(self.digest, "finished", reason)
