"""The worker: one process per running study that keeps model, data and CUDA context over rounds.

Forked warm from a process that has imported torch and MONAI and has never touched CUDA. It speaks
JSON over a pipe, so nothing is ever unpickled; models and updates are files.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from consilium_client.budget.policy import load_policy
from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_starter
from consilium_common.wire.messages import Instructions

if TYPE_CHECKING:
    from consilium_client.training.evaluation import Evaluation

#: A killed worker is gone at once; nothing that is alive gives way in this time.
_PREDECESSOR_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.02


Answer = dict[str, Any]


def send(connection: Connection, said: Answer) -> None:
    """Write one message over the pipe."""
    connection.send_bytes(json.dumps(said).encode())


def receive(connection: Connection) -> Answer:
    """Read one message; EOFError when the other side is gone."""
    said = json.loads(connection.recv_bytes())
    assert isinstance(said, dict)
    return said


def work(connection: Connection, home: str, log_file: str) -> None:
    """Serve one study's rounds until the pipe closes; the target of a forked process."""
    die_with_starter()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s worker %(process)d %(levelname)s %(message)s",
        force=True,
    )
    study: _Study | None = None
    alone: IO[str] | None = None
    while True:
        try:
            request = receive(connection)
        except (EOFError, OSError):
            return
        try:
            instructions = Instructions(**request["instructions"])
            alone = alone or only_worker(Path(home), instructions.study)
            if study is None or study.decided_anew():
                study = _Study(Path(home), instructions.study)
            answer = study.answer(request["kind"], instructions, request["model"], connection)
        except ConsiliumError as error:
            logging.getLogger(__name__).error("%s", error)
            answer = {"error": error.to_dict()}
        except Exception as error:
            logging.getLogger(__name__).exception("unforeseen")
            answer = {"error": _named(error).to_dict()}
        send(connection, answer)


def _named(error: Exception) -> ConsiliumError:
    """Return an unforeseen error by name alone; want of GPU memory is one that people can mend."""
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return ConsiliumError(
            "run.out-of-memory",
            "The training process needs more GPU memory than there is, or than gpu_share permits.",
            hint="Free the GPU, raise gpu_share in policy.yaml, or ask for a smaller study.",
        )
    return ConsiliumError("internal.unexpected", type(error).__name__)


def only_worker(home: Path, digest: str, *, seconds: float = _PREDECESSOR_SECONDS) -> IO[str]:
    """Hold the study's lock while this process lives, and return what holds it.

    A worker is replaced when it or its parents are killed. Should the one before still be dying,
    its successor waits: of two at work, one would void the charge of the other.

    Raises
    ------
    ConsiliumError
        ``run.worker-busy`` when another process holds it for longer than a killed one could.
    """
    from consilium_client.home import SiteHome

    lock = (SiteHome.existing(home).run / f"worker-{digest[:16]}.lock").open("a", encoding="utf-8")
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                lock.close()
                raise ConsiliumError(
                    "run.worker-busy",
                    "Another process of this site is at work on the study.",
                    where=digest[:12],
                    hint="Stop the site, see that no process of it is left, and start it again.",
                ) from error
            time.sleep(_LOOK_SECONDS)
        else:
            return lock


class _Study:
    """What lives across the rounds of one study."""

    def __init__(self, home: Path, digest: str) -> None:
        from consilium_client.data.cohort import open_cohort
        from consilium_client.home import SiteHome
        from consilium_client.identity import SiteIdentity
        from consilium_client.local_round import LocalRounds
        from consilium_client.store import StudyStore
        from consilium_client.training.session import TrainingSession

        self._home = SiteHome.existing(home)
        identity = SiteIdentity.load(self._home)
        self._site = identity.config.name
        self._store = StudyStore(self._home)
        self._decision = self._store.approved(digest)
        # Whoever is left out is out of everything: training and evaluation never see them.
        self._cohort = open_cohort(self._home, self._decision.study).without(
            self._decision.left_out
        )
        config = identity.config
        self._session = TrainingSession(
            self._decision.study,
            self._cohort,
            **config.compute(),
        )
        self._rounds = LocalRounds(
            self._home,
            identity,
            self._decision,
            self._session,
            [patient.key for patient in self._cohort.patients("train")],
            evaluated=self._cohort.patients("test"),
        )

    def decided_anew(self) -> bool:
        """Whether the site has since approved the study again: with other patients, perhaps."""
        return self._store.approved(self._decision.study.digest) != self._decision

    def answer(
        self, kind: str, instructions: Instructions, model: str | None, connection: Connection
    ) -> Answer:
        self._session.take_at_most(self._gpu_share())
        weights = b"" if model is None else Path(model).read_bytes()
        if kind != "query":
            # Before anything is charged: nobody pays for a model that cannot be used.
            self._session.require_model(weights, training=kind == "train")
        if kind == "train":

            def progress(step: int, steps: int) -> None:
                send(connection, {"progress": {"step": step, "steps": steps}})

            update = self._rounds.train(instructions, weights, progress)
            return {"figures": update.figures, "sha256": update.sha256, "bytes": update.bytes}
        if kind == "query":
            counted = self._cohort.patients("train")
            return {"figures": self._rounds.statistics(instructions, counted)}
        from consilium_client.local_evaluation import evaluate

        def evaluation() -> Evaluation:
            return evaluate(
                self._home,
                self._session,
                self._cohort,
                weights,
                site=self._site,
                rounds_done=instructions.round_index,
                last=instructions.last,
                before_case=self._rounds.standing.require,
            )

        return {"figures": self._rounds.evaluate(instructions, evaluation)}

    def _gpu_share(self) -> float:
        """Return the share of the GPU that today's policy leaves to the study."""
        if self._decision.automatic is None:
            return 1.0
        rule = load_policy(self._home).approve_automatically
        # Without a rule the round is refused, before anything is computed.
        return 1.0 if rule is None else rule.gpu_share


def request(kind: str, instructions: Instructions, model: Path | None) -> Answer:
    """Return what asks a worker for one piece of work, with the file of its model."""
    return {
        "kind": kind,
        "instructions": asdict(replace(instructions, model=None)),
        "model": None if model is None else str(model),
    }
