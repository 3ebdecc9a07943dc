"""The worker: one process per running study that keeps model, data and CUDA context over rounds.

Forked warm from a process that has imported torch and MONAI and has never touched CUDA. It speaks
frames over a pipe: a JSON header and the weights, so nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_parent
from consilium_common.wire.messages import Instructions

_HEADER: Final = struct.Struct("!I")


@dataclass(frozen=True)
class Frame:
    """One message over the pipe."""

    header: dict[str, Any]
    blob: bytes = field(default=b"", repr=False)


def send_frame(connection: Connection, frame: Frame) -> None:
    """Write a frame."""
    header = json.dumps(frame.header).encode()
    connection.send_bytes(_HEADER.pack(len(header)) + header + frame.blob)


def receive_frame(connection: Connection) -> Frame:
    """Read a frame; EOFError when the other side is gone."""
    content = connection.recv_bytes()
    (length,) = _HEADER.unpack_from(content)
    start = _HEADER.size
    return Frame(json.loads(content[start : start + length]), content[start + length :])


def work(connection: Connection, home: str, log_file: str) -> None:
    """Serve one study's rounds until the pipe closes; the target of a forked process."""
    die_with_parent()
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
    while True:
        try:
            request = receive_frame(connection)
        except (EOFError, OSError):
            return
        try:
            instructions = Instructions(**request.header["instructions"])
            if study is None:
                study = _Study(Path(home), instructions.study)
            answer = study.answer(request.header["kind"], instructions, request.blob, connection)
        except ConsiliumError as error:
            logging.getLogger(__name__).error("%s", error)
            answer = Frame({"error": error.to_dict()})
        except Exception as error:
            logging.getLogger(__name__).exception("unforeseen")
            unforeseen = ConsiliumError("internal.unexpected", type(error).__name__)
            answer = Frame({"error": unforeseen.to_dict()})
        send_frame(connection, answer)


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
        decision = StudyStore(self._home).approved(digest)
        self._study = decision.study
        self._cohort = open_cohort(self._home, self._study)
        config = identity.config
        self._session = TrainingSession(
            self._study,
            self._cohort,
            device=config.device,
            precision=None if config.precision == "auto" else config.precision,
            threads=config.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        )
        patients = [patient.key for patient in self._cohort.patients("train")]
        self._rounds = LocalRounds(self._home, identity, decision, self._session, patients)

    def answer(
        self, kind: str, instructions: Instructions, weights: bytes, connection: Connection
    ) -> Frame:
        if kind == "train":

            def progress(step: int, steps: int) -> None:
                send_frame(connection, Frame({"progress": {"step": step, "steps": steps}}))

            update = self._rounds.train(instructions, weights, progress)
            return Frame({"figures": update.figures}, update.blob)
        from consilium_client.local_evaluation import evaluate, exact_figures

        evaluation = evaluate(
            self._home,
            self._session,
            self._cohort,
            weights,
            site=self._site,
            rounds_done=instructions.round_index,
            last=instructions.last,
        )
        figures = exact_figures(evaluation) if self._rounds.may_release() else {}
        return Frame({"figures": figures})


def request_frame(kind: str, instructions: Instructions, weights: bytes) -> Frame:
    """Return the frame that asks a worker for one piece of work."""
    return Frame({"kind": kind, "instructions": asdict(instructions)}, weights)
