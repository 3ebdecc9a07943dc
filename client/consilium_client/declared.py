"""What a study declares that may leave and come, computed from its document alone.

The link must not ask the process that trains: a network's tensors and the study's privacy events
are computed in a process of their own, which sees the document and nothing else. The link itself
stays light: it imports neither torch nor an accountant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.models.weights import TensorSpec
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.study import Study
from consilium_common.wire.proxy import without_proxies

#: Importing torch from a slow disk takes a while; nothing takes this long.
_SECONDS: Final = 300.0
#: Studies come in bunches: at a site's start, and when several are approved by a person who reads
#: each of them first.
_IDLE_SECONDS: Final = 300.0


@dataclass(frozen=True)
class Declared:
    """What may leave for a study, and how much may come.

    Attributes
    ----------
    tensors : tuple of TensorSpec
        Of an update.
    events : dict
        What each kind of release costs; none: no privacy.
    most_received : int
        Bytes of the largest model that a round sends to a site.
    """

    tensors: tuple[TensorSpec, ...]
    events: dict[Purpose, PrivacyEvent]
    most_received: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "tensors": [asdict(spec) for spec in self.tensors],
            "events": {purpose: event.to_dict() for purpose, event in self.events.items()},
            "most_received": self.most_received,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Declared:
        """Read what :meth:`to_dict` returned."""
        return cls(
            tuple(
                TensorSpec(one["name"], tuple(one["shape"]), one["dtype"])
                for one in value["tensors"]
            ),
            {purpose: PrivacyEvent.from_dict(event) for purpose, event in value["events"].items()},
            int(value["most_received"]),
        )


def declared(study: Study) -> Declared:
    """Return what a study declares, computed here. Imports torch."""
    from consilium_common.models.exchange import received_specs, sent_specs
    from consilium_common.models.weights import packed_size
    from consilium_common.privacy.accounting import parameters

    plan = parameters(study)
    events: dict[Purpose, PrivacyEvent | None] = {}
    if plan is not None:
        events = {
            "training": plan.event_per_round,
            "evaluation": plan.evaluation_event,
            "statistics": plan.statistics_event,
        }
    found = {purpose: event for purpose, event in events.items() if event is not None}
    return Declared(sent_specs(study), found, packed_size(received_specs(study)))


class Apart:
    """Computes what studies declare in a process of its own, which stays a while for the next.

    It starts when it is asked: importing torch takes seconds. Left alone it ends, and gives back
    the memory that torch takes.

    Parameters
    ----------
    idle_seconds : float
        It ends when nobody has asked for so long.
    """

    def __init__(self, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._idle_seconds = idle_seconds
        self._idle: threading.Timer | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, study: Study) -> Declared:
        """Return what a study declares.

        Raises
        ------
        ConsiliumError
            ``run.declared`` when that process fails: nothing leaves for the study then.
        """
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            try:
                answer = self._ask(canonical_json(study.to_canonical()))
                self._idle = threading.Timer(self._idle_seconds, self._end_idle)
                self._idle.daemon = True
                self._idle.start()
                return Declared.from_dict(json.loads(answer))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.end()
                raise ConsiliumError(
                    "run.declared",
                    "Cannot compute which tensors the study declares; nothing leaves for it.",
                    where=study.digest[:12],
                    hint="See that this site's installation is complete: `consilium site doctor`.",
                ) from error

    def _end_idle(self) -> None:
        # Whoever is asking holds the lock: then it is not idle, and has a timer of its own.
        if self._lock.acquire(blocking=False):
            try:
                self.end()
            finally:
                self._lock.release()

    def stop(self) -> None:
        """End the process at once and for good, whoever waits for its answer: the site stops."""
        self._stopped = True
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, document: bytes) -> bytes:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "consilium_client.declared"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={
                    **without_proxies(os.environ),
                    "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1",
                },
            )
        if self._stopped:
            self._process.kill()
        ours, answers = self._process.stdin, self._process.stdout
        assert ours is not None and answers is not None
        late = threading.Timer(_SECONDS, self._process.kill)
        late.start()
        try:
            ours.write(document + b"\n")
            ours.flush()
            return answers.readline()
        finally:
            late.cancel()


class Declarations:
    """What studies declare, computed once for each, also when several threads ask at once.

    Parameters
    ----------
    compute : callable
        An :class:`Apart` (default) or :func:`declared`.
    """

    def __init__(self, compute: Callable[[Study], Declared] | None = None) -> None:
        self._compute = compute or Apart()
        self._found: dict[str, Declared] = {}
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Keep nobody waiting any more: the site stops."""
        if isinstance(self._compute, Apart):
            self._compute.stop()

    def of(self, study: Study) -> Declared:
        """Return what a study declares; raises as the computation does."""
        digest = study.digest
        known = self._found.get(digest)
        if known is not None:
            return known  # also while another is being computed
        with self._lock:
            if digest not in self._found:
                self._found[digest] = self._compute(study)
            return self._found[digest]


def main() -> None:
    """Read studies' canonical JSON from stdin, a line each; write a line of what each declares."""
    for line in sys.stdin.buffer:
        study = Study.model_validate(json.loads(line))
        sys.stdout.write(json.dumps(declared(study).to_dict()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
