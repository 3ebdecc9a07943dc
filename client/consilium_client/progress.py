"""What the aggregator is told of a running round: phase and step, public facts alone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Final

from consilium_client.home import SiteHome
from consilium_common.files import write_atomic
from consilium_common.wire.messages import Instructions

_SECONDS_BETWEEN: Final = 0.25


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
    def during(self, kind: str, instructions: Instructions) -> Iterator[Callable[[int, int], None]]:
        """Say that work goes on, and that it is done afterwards."""
        phase = {"train": "training", "evaluate": "evaluating", "query": "counting"}[kind]
        self._write(phase, instructions, 0, 0)

        def step(number: int, total: int) -> None:
            if time.monotonic() - self._last > _SECONDS_BETWEEN:
                self._write(phase, instructions, number, total)

        try:
            yield step
        except BaseException:
            self._write("failed", instructions, 0, 0)
            raise
        self._write(
            "done" if kind == "evaluate" and instructions.last else "sending", instructions, 0, 0
        )

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
