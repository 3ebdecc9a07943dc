"""Named points between durable operations at which a test may have this process killed.

Inert unless ``CONSILIUM_FAULT`` names a point. Setting it can only end a process early, which the
site must survive anyway: it opens no way around a charge.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError

#: Comma-separated points: ``name`` kills at every passing, ``name:n`` at the n-th.
FAULT_VARIABLE: Final = "CONSILIUM_FAULT"
#: File that counts passings, so that a process started again goes on counting.
COUNT_VARIABLE: Final = "CONSILIUM_FAULT_COUNT"

#: One release passes these in this order, with its purpose before the name.
_OF_A_RELEASE: Final = (
    "before-charge",
    "charged",
    "before-store",
    "file-written",
    "stored",
    "released",
)
#: Between what the worker does durably, and in mid-work.
WORKER_POINTS: Final = (
    *(f"{purpose}.{point}" for purpose in ("training", "evaluation") for point in _OF_A_RELEASE),
    "training.before-void",
    "training.voided",
    "training.step",
    "evaluation.before-void",
    "evaluation.voided",
    "evaluation.scored",
)
#: The same of released statistics.
STATISTICS_POINTS: Final = (
    *(f"statistics.{point}" for point in _OF_A_RELEASE),
    "statistics.before-void",
    "statistics.voided",
)
#: Of the reply, in the executor.
EXECUTOR_POINTS: Final = ("reply.made", "reply.pushed", "reply.done")
#: Of the calls by which a message comes and a reply leaves, in the link.
LINK_POINTS: Final = (
    "link.receipt",
    *(
        f"link.{when}.{call}"
        for call in ("PushMessages", "PushObject", "ConfirmMessageReceived")
        for when in ("before", "after")
    ),
)


def fault_point(name: str) -> None:
    """Kill this process (SIGKILL) if the environment says so; otherwise do nothing.

    Raises
    ------
    ConsiliumError
        ``usage.fault`` when the n-th passing is asked for and there is no file to count in.
    """
    plan = os.environ.get(FAULT_VARIABLE)
    if not plan:
        return
    wanted = [item.partition(":") for item in plan.split(",")]
    asked = {number for point, _, number in wanted if point == name}
    if asked and ("" in asked or str(_passed(name)) in asked):
        os.kill(os.getpid(), signal.SIGKILL)


def _passed(name: str) -> int:
    """Count this passing durably and return its number, from 1."""
    path = os.environ.get(COUNT_VARIABLE)
    if not path:
        raise ConsiliumError(
            "usage.fault",
            f"{FAULT_VARIABLE} asks for a passing by number and nothing counts them.",
            hint=f"Name a file to count in with {COUNT_VARIABLE}, or unset {FAULT_VARIABLE}.",
        )
    # Appending a short line is one write: several processes may count in one file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, f"{name}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Path(path).read_text(encoding="utf-8").split("\n").count(name)
