"""Workers of running studies: forked warm, one per study, started again when they die or hang."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Final

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_client.worker import Answer, receive, request, send, work
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Instructions

_log = logging.getLogger(__name__)

#: Imported once, before any fork: a study's worker starts in tenths of a second.
_WARM_MODULES: Final = [
    "consilium_common.models.networks",
    "monai.losses",
    "monai.inferers",
    "consilium_client.worker",
    "consilium_client.data.cohort",
    "consilium_client.local_evaluation",
    "consilium_client.local_round",
    "consilium_client.statistics_query",
    "consilium_client.training.session",
    # What they import only when they first use it: the optimiser, the accounting, the pictures.
    "torch._dynamo",
    "dp_accounting.rdp",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
]
_STOP_SECONDS: Final = 3.0
#: A worker may be silent for as long as a round of its study may take, and at least so long: what
#: is done after a short deadline is stored, and sent when it is asked for again.
_LEAST_SILENCE: Final = 600.0
#: Work that tells no steps (evaluations, private rounds) may be silent for so many times as long.
_WITHOUT_STEPS: Final = 2


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection
    silence: float  #: seconds without a word after which it is taken to hang
    steps: bool  #: whether it tells each step of a round


class WorkerPool:
    """Hands work to the worker of its study.

    Parameters
    ----------
    home : SiteHome
        The site.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        self._workers: dict[str, _Worker] = {}
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_WARM_MODULES)

    def warm(self) -> None:
        """Start the warm process now, so that the first round does not wait for its imports."""
        from multiprocessing.forkserver import ensure_running

        ensure_running()

    def do(
        self,
        kind: str,
        instructions: Instructions,
        model: Path | None,
        progress: Callable[[int, int], None],
    ) -> Answer:
        """Have one piece of work done; a worker that dies is replaced and asked once more.

        So is one that lacks GPU memory while workers of other studies hold some: they are ended,
        and start again when their turn comes. Asking again is safe: a round that was stored is
        returned from the store, one that was only charged is voided and charged anew.

        Raises
        ------
        ConsiliumError
            The worker's own; ``run.worker-died`` when it died twice; ``run.worker-hung`` when it
            was ended because nothing came of it: others wait for this process.
        """
        try:
            return self._do(kind, instructions, model, progress)
        except ConsiliumError as error:
            if error.code != "run.out-of-memory" or not self._workers:
                raise
            # They wait for their next rounds with their models on the GPU.
            _log.warning("GPU memory is short: the workers of other studies are ended")
            self.end_all_but(set())
        return self._do(kind, instructions, model, progress)

    def _do(
        self,
        kind: str,
        instructions: Instructions,
        model: Path | None,
        progress: Callable[[int, int], None],
    ) -> Answer:
        for _ in range(2):
            worker = self._worker(instructions.study)
            try:
                send(worker.connection, request(kind, instructions, model))
                told = kind == "train" and worker.steps
                silence = worker.silence * (1 if told else _WITHOUT_STEPS)
                answer = self._wait(worker, progress, silence)
            except TimeoutError as silent:
                _log.error("the worker of %s hangs and is ended", instructions.study[:12])
                self._end(instructions.study)
                raise ConsiliumError(
                    "run.worker-hung",
                    f"The training process was ended: nothing came of it for {silence:.0f} s.",
                    hint="See worker.log, and whether disk and GPU answer.",
                ) from silent
            except (EOFError, OSError):
                _log.error("the worker of %s died", instructions.study[:12])
                self._end(instructions.study)
                continue
            if "error" in answer:
                error = ConsiliumError.from_dict(answer["error"])
                # A worker that could not open its study starts afresh next time.
                self._end(instructions.study)
                raise error
            if instructions.last:
                self._end(instructions.study)
            return answer
        raise ConsiliumError(
            "run.worker-died", "The training process died twice.", hint="See worker.log."
        )

    def end_all_but(self, running: set[str]) -> None:
        """End the workers of studies that run no longer."""
        for digest in set(self._workers) - running:
            self._end(digest)

    def _worker(self, digest: str) -> _Worker:
        worker = self._workers.get(digest)
        if worker is not None and worker.process.is_alive():
            return worker
        self._end(digest)
        study = StudyStore(self._home).approved(digest).study
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work,
            args=(theirs, str(self._home.path), str(self._home.logs / "worker.log")),
            daemon=True,
        )
        process.start()
        theirs.close()
        silence = max(study.federation.longest_seconds, _LEAST_SILENCE)
        self._workers[digest] = _Worker(process, ours, silence, study.privacy.mode == "none")
        return self._workers[digest]

    def _wait(
        self, worker: _Worker, progress: Callable[[int, int], None], silence: float
    ) -> Answer:
        while True:
            if not worker.connection.poll(silence):
                raise TimeoutError
            answer = receive(worker.connection)
            step: dict[str, Any] | None = answer.get("progress")
            if step is None:
                return answer
            progress(step["step"], step["steps"])

    def _end(self, digest: str) -> None:
        worker = self._workers.pop(digest, None)
        if worker is None:
            return
        worker.connection.close()
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            # What waits for a disk that does not answer cannot even be killed.
            worker.process.join(_STOP_SECONDS)
