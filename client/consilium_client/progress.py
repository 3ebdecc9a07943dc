"""What the aggregator is told of a running round: phase and step, public facts alone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from consilium_client.home import SiteHome
from consilium_common.files import write_atomic
from consilium_common.wire.messages import Instructions

_SECONDS_BETWEEN: Final = 0.25


@dataclass(frozen=True)
class Work:
    """What a piece of work says of itself: that it begins, and each step of how many."""

    at_work: Callable[[], None]
    step: Callable[[int, int], None]


class ProgressFile:
    """``run/progress.json``, which the link passes on.

    Parameters
    ----------
    home : SiteHome
        The site.
    """

    def __init__(self, home: SiteHome) -> None:
        self._path = home.run / "progress.json"
        self._last = 0.0

    @contextlib.contextmanager
    def during(self, kind: str, instructions: Instructions) -> Iterator[Work]:
        """Say that a model is waited for, that work goes on, and that it is done afterwards."""
        phase = {"train": "training", "evaluate": "evaluating", "query": "counting"}[kind]

        def say(phase: str, number: int = 0, total: int = 0) -> None:
            self._write(phase, instructions, number, total)

        def step(number: int, total: int) -> None:
            if time.monotonic() - self._last > _SECONDS_BETWEEN:
                say(phase, number, total)

        say(phase if instructions.model is None else "downloading")
        try:
            yield Work(lambda: say(phase), step)
        except BaseException:
            say("failed")
            raise
        say("done" if kind == "evaluate" and instructions.last else "sending")

    def _write(self, phase: str, instructions: Instructions, step: int, total: int) -> None:
        self._last = time.monotonic()
        content = {
            "digest": instructions.study,
            "phase": phase,
            "round": instructions.round_index,
            "step": step,
            "steps": total,
        }
        # Worth nothing after a crash.
        write_atomic(self._path, json.dumps(content).encode(), durable=False)
