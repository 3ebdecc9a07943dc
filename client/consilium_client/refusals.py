"""What the link refused to let out, counted for `site doctor`; our own words, no content."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.entries import time_text

#: So many are said one by one; after that each thousandth, so that nobody can flood the log.
_SAID: Final = 20
_THEN_EACH: Final = 1000


class Refusals:
    """``run/refused.json``: how many since the site started, and the last one.

    Parameters
    ----------
    path : Path
        The file; written anew with each refusal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        path.unlink(missing_ok=True)

    def note(self, call: str, error: ConsiliumError) -> bool:
        """Count a refusal; return whether it is to be said to the operator too."""
        self._count += 1
        content = {
            "count": self._count,
            "call": call,
            "code": error.code,
            "what": error.message,
            "time": time_text(datetime.now(UTC)),
        }
        # A full disk does not let anything out: the refusal stands without its note.
        with contextlib.suppress(ConsiliumError):
            write_atomic(self._path, json.dumps(content).encode(), durable=False)
        return self._count <= _SAID or self._count % _THEN_EACH == 0
